# A systemd user manager of its own, in namespaces of its own: `unshare … bash units.sh CHECKOUT VENV HOME`.
# Starts the units of deployments/systemd, kills server and worker, runs a deployment, stops them; says what it sees.
set -euo pipefail
checkout=$1 venv=$2
export HOME=$3
"$venv/bin/python" -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))'  # loopback up
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0 "$HOME"/{.config/systemd/user,sdxl-flows,in}
export XDG_RUNTIME_DIR=/run/user/0
ln -s "$checkout"/* "$HOME/sdxl-flows/"
ln -s "$venv" "$HOME/sdxl-flows/.venv"
cp "$checkout"/deployments/systemd/*.service "$HOME/.config/systemd/user/"
unset PYTHONPATH PREFECT_HOME SDXL_FLOWS_HOME "${!PREFECT_@}"
export PREFECT_API_URL=http://127.0.0.1:4200/api
/usr/lib/systemd/systemd --user --log-level=info --log-target=console >"$HOME/systemd.log" 2>&1 &
until systemctl --user is-system-running >/dev/null 2>&1; do sleep 0.2; done

units=(sdxl-flows-server sdxl-flows-worker sdxl-flows-tensorboard)
main_pids() { systemctl --user show --property MainPID --value sdxl-flows-server sdxl-flows-worker | grep -v '^$'; }
systemctl --user start sdxl-flows-worker
echo "started: $(systemctl --user is-active "${units[@]}" | xargs)"
old=$(main_pids | xargs)
# shellcheck disable=SC2086
kill -KILL $old
until [ "$(systemctl --user is-active "${units[@]}" | sort -u)" = active ] && [ "$(main_pids | xargs)" != "$old" ]; do
  sleep 0.5
done
echo "back: $(systemctl --user is-active "${units[@]}" | xargs)"
touch "$HOME/in/a.png"
echo 1girl >"$HOME/in/a.txt"
cd "$HOME/sdxl-flows"
.venv/bin/python -m prefect deployment run merge-tags/merge-tags --watch \
  --params "{\"config\": {\"source\": \"$HOME/in\", \"out\": \"$HOME/m.json\"}}" >"$HOME/run.log" 2>&1
echo "ran: $(tr -d ' \n' <"$HOME/m.json")"
systemctl --user stop "${units[@]}"
echo "stopped: $(systemctl --user is-active "${units[@]}" | xargs)"
