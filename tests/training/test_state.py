"""Generations of training state: whole or not there, and never of another run."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from sdxl_core.errors import CheckpointError, ConfigError
from sdxl_core.files import digest_of
from sdxl_core.training.loss_average import LossAverage
from sdxl_core.training.parallel import Piece
from sdxl_core.training.state import Snapshot, load_newest, read_generation, read_manifest, save_snapshot

SETTINGS = {"seed": 1, "learning_rate": 4e-7, "dataset": "abc"}


def save(folder: Path, step: int, **settings: Any) -> Path:
    tensors = {
        "weights": {"unet.w": torch.full((3, 4), float(step), dtype=torch.bfloat16)},
        "optimizer": {"unet.w/state1": torch.arange(5, dtype=torch.uint8), "unet.w/step": torch.tensor(float(step))},
    }
    snapshot = Snapshot(
        step=step, run={"settings": SETTINGS | settings, "config": {}}, scalars={"losses": {"total": 0.1 + step}},
        tensors=tensors, numbers={"unet.w": {"step": step}},
    )  # fmt: skip
    return save_snapshot(folder, snapshot)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_what_was_saved_comes_back_exactly(tmp_path: Path) -> None:
    save(tmp_path, 7)
    loaded = load_newest(tmp_path, settings=SETTINGS)
    assert loaded is not None and loaded.step == 7
    assert loaded.scalars == {"losses": {"total": 7.1}} and loaded.run["settings"] == SETTINGS
    assert loaded.parts[0].numbers == {"unet.w": {"step": 7}}
    assert torch.equal(loaded.tensors["weights"]["unet.w"], torch.full((3, 4), 7.0, dtype=torch.bfloat16))
    assert loaded.tensors["optimizer"]["unet.w/state1"].dtype == torch.uint8


def test_two_generations_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert steps(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_damaged_later_generation_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (save(tmp_path, 9) / "weights.safetensors").unlink()
    for step in (4, 5):
        save(tmp_path, step)
    whole = ["step-00000004", "step-00000005"]
    assert steps(tmp_path) == [*whole, "step-00000009"]
    for step in (9, 10):
        save(tmp_path, step)
    assert steps(tmp_path) == ["step-00000009", "step-00000010"]


def test_no_state_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "state", settings=SETTINGS) is None


@pytest.mark.parametrize("victim", ["manifest.json", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_newest_state_falls_back_with_a_warning(
    tmp_path: Path, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / victim
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif victim != "manifest.json":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.write_bytes(b"[]" + data[2:])
    with caplog.at_level(logging.WARNING):
        loaded = load_newest(tmp_path, settings=SETTINGS)
    assert loaded is not None and loaded.step == 1
    assert str(path) in caplog.text and "before it" in caplog.text


def test_any_flipped_byte_of_a_manifest_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            read_manifest(path.parent)
    at = data.index(b"2.1")  # a number of the loss: still a manifest, but of another run
    path.write_bytes(data[:at] + b"3" + data[at + 1 :])
    loaded = load_newest(tmp_path, settings=SETTINGS)
    assert loaded is not None and loaded.step == 1
    assert "manifest.json: is not what was written (sha256 differs). Falling back to the generation" in caplog.text


def test_states_of_the_first_version_are_read(
    tmp_path: Path, as_written_before: Callable[[Path, list[float]], dict[str, Any]]
) -> None:
    """Their manifest holds all about the run and has no digest, and they know the base model otherwise."""
    path = save(tmp_path, 1, base_model="dated") / "manifest.json"
    manifest = as_written_before(path.parent, [0.5])
    path.write_bytes(orjson.dumps(manifest | {"format": 3}))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        read_generation(path.parent)
    path.write_bytes(orjson.dumps(manifest))
    asked = SETTINGS | {"base_model": "by content"}
    assert load_newest(tmp_path, settings=asked, formerly={"base_model": "dated"}) is not None
    with pytest.raises(ConfigError, match=r"base_model \('dated' there"):
        load_newest(tmp_path, settings=asked, formerly={"base_model": "another"})


def test_only_damaged_states_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "manifest.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="Delete the folder to start again"):
        load_newest(tmp_path, settings=SETTINGS)


def test_a_run_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"learning_rate \(4e-07 there, 1e-05 now\)"):
        load_newest(tmp_path, settings=SETTINGS | {"learning_rate": 1e-5})


def test_a_write_that_was_cut_leaves_the_older_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("sdxl_core.training.state.sha256_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert steps(tmp_path) == ["step-00000001"]


def test_avr_loss_is_the_mean_of_the_last_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = [0.5, 0.3, 0.9, 0.1, 0.2, 0.7, 0.4]
    average = LossAverage(tmp_path / "losses", 3)
    seen = []
    for step, loss in enumerate(losses):
        average.add(step, loss)
        seen.append(average.value)
    assert seen == pytest.approx([sum(losses[max(0, i - 2) : i + 1]) / min(3, i + 1) for i in range(7)])
    state = average.state()
    resumed, late = LossAverage(tmp_path / "losses", 3), LossAverage(tmp_path / "gone", 3)
    resumed.load(state, step=7)
    assert not caplog.text
    for other in (average, resumed):
        other.add(7, 0.6)
    assert resumed.value == average.value
    late.load(state, step=7)
    assert "gone: is missing, or not of this run. avr_loss begins anew at step 7." in caplog.text
    for step, loss in enumerate([0.6, 0.1, 0.3, 0.8], 7):
        late.add(step, loss)
    assert late.value == pytest.approx((0.1 + 0.3 + 0.8) / 3)
    again = LossAverage(tmp_path / "gone", 3)
    again.load(late.state(), step=11)
    assert again.value == late.value and caplog.text.count("begins anew") == 1
    shown_by_another_process = LossAverage(None, 3)
    shown_by_another_process.add(0, 1.0)
    assert shown_by_another_process.value == 0


def test_a_state_is_less_than_a_kilobyte_besides_weights_and_optimizer(tmp_path: Path) -> None:
    """Of eight divided processes with an average, after millions of steps, ten of the last bad."""
    guard = {"bad_steps": list(range(98_765_000, 98_765_010)), "average": 0.12345678901234567, "count": 98_765_432}
    losses = {"total": 1234567.1234567891, "count": 12_345_678}
    snapshots = [
        Snapshot(
            step=98_765_432, run={"settings": SETTINGS, "config": {"out": "x" * 4000}},
            scalars={"losses": losses, "guard": guard},
            tensors={name: {"w": torch.ones(3)} for name in ("weights", "optimizer", "ema")},
            numbers={f"w{i}": {"step": 98_765_432} for i in range(1680)},
            pieces={f"w{i}": Piece(offset=0, count=3, total=24) for i in range(1680)},
        )
        for _ in range(8)
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        saved = [pool.submit(save_snapshot, tmp_path, s, rank=i, num_ranks=8) for i, s in enumerate(snapshots)]
        (path,) = {each.result() for each in saved}
    others = [file for file in path.iterdir() if file.suffix != ".safetensors"]
    assert [file.name for file in others] == ["manifest.json"]
    assert others[0].stat().st_size < 1024
    loaded = read_generation(path, settings=SETTINGS)
    assert loaded.scalars == {"losses": losses, "guard": guard} and len(loaded.parts) == 8
    assert loaded.parts[7].pieces["w5"] == Piece(offset=0, count=3, total=24)
    assert loaded.parts[7].numbers["w5"] == {"step": 98_765_432}


def test_states_move_with_their_run_and_not_without(tmp_path: Path) -> None:
    save(tmp_path / "old", 1)
    state = save(tmp_path / "old", 2)
    (record,) = (tmp_path / "old").glob("settings-*.json")
    alone = shutil.copytree(state, tmp_path / "alone" / state.name)
    with pytest.raises(CheckpointError, match=rf"{record.name}, which belongs to it, cannot be read.*put it back"):
        read_generation(alone)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert load_newest(tmp_path / "new", settings=SETTINGS) is not None
    record = tmp_path / "new" / record.name
    record.write_bytes(record.read_bytes().replace(b"4e-7", b"5e-7").replace(b"4e-07", b"5e-07"))
    with pytest.raises(CheckpointError, match=r"none of the 2 saved states can be used. The newest: .*sha256 differs"):
        load_newest(tmp_path / "new", settings=SETTINGS)


def test_a_state_of_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    manifest = orjson.loads(path.read_bytes()) | {"format": 5}
    del manifest["sha256"]
    manifest["sha256"] = digest_of(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS))
    path.write_bytes(orjson.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"another version of sdxl-flows \(format 5, not 4\)"):
        read_generation(path.parent)
