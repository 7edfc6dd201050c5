"""latents.html: what a latent set holds, on one page that needs nothing beside it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.files import write_atomic
from sdxl_core.latents.report import channel_statistics, contact_sheet, shard_limits, speed_over_time
from sdxl_core.refs import LatentSetRef
from sdxl_core.rejected import count_reasons, read_rejected
from sdxl_core.report.charts import bar_chart, line_chart, range_chart
from sdxl_core.report.page import STYLE, data_url
from sdxl_core.summary import describe

NUM_PICTURES, NUM_REJECTED = 24, 200
# Means and deviations of SDXL's unscaled latents, by channel. Source: latents_mean and latents_std in the VAE config of
# Playground v2.5, which uses SDXL's VAE.
USUAL = ((-1.6574, 8.4927), (1.886, 5.9022), (-1.383, 6.5498), (2.5155, 5.2299))


def write_latents_page(config: CacheLatentsConfig, ref: LatentSetRef) -> Path:
    """Draw `out/latents.html`, unless it was drawn of this very set. Returns its path."""
    path = config.out / "latents.html"
    mark = f"<!-- {ref.metadata.sha256} {ref.num_kept} {ref.num_rejected} -->".encode()
    if path.exists():
        with open(path, "rb") as file:
            if file.read(len(mark)) == mark:
                return path
    sheet = data_url(contact_sheet(config, num_pictures=NUM_PICTURES))
    parts = [
        f"<p>{escape(describe(ref))}</p>",
        f"<h2>Buckets</h2>{bar_chart(ref.buckets)}",
        "<h2>Pictures and their latents</h2>",
        f"<img alt='pictures beside their latents' src='{sheet}'>",
        "<p class='note'>by bucket: the picture, its latents as kept (cropped to the bucket, in false colour)"
        f"{'' if config.vae == 'tiny' else ', what the VAE makes of their middle'}</p>",
        f"<h2>Latents by channel</h2>{_channels(config, ref)}",
        f"<h2>Speed</h2>{_speed(ref)}",
        _limits(ref),
        _rejected(ref),
        "<p class='note'><a href='report.html'>Back to the report</a>, once the job that these latents belong to has "
        "ended.</p>",
    ]
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(config.out.name)}: latents</title>"
        f"<style>{STYLE}</style><main><h1>{escape(config.out.name)}: latents</h1>{''.join(parts)}</main></html>"
    )
    write_atomic(path, mark + page.encode())
    return path


def _speed(ref: LatentSetRef) -> str:
    speed = speed_over_time(ref.path)
    if len(speed) < 2:
        told = f"{speed[0][1]:,.1f} pictures a second between the two commits." if speed else "One commit: no speed."
        return f"<p>{told}</p>"
    last_s = speed[-1][0]
    unit, seconds = ("hours", 3600) if last_s > 7200 else ("minutes", 60) if last_s > 120 else ("seconds", 1)
    points = [(time_s / seconds, rate) for time_s, rate in speed]
    return line_chart(
        {"pictures a second, all devices": points}, x_label=f"{unit} of encoding", y_label="pictures a second"
    )


def _channels(config: CacheLatentsConfig, ref: LatentSetRef) -> str:
    rows, is_far, ranges = "", False, {}
    for number, (mean, deviation) in enumerate(channel_statistics(ref.path)):
        usual_mean, usual = USUAL[number]
        far = abs(mean - usual_mean) > usual or not 0.5 < deviation / usual < 2
        is_far = is_far or far
        ranges[f"channel {number}"] = ((mean, deviation), USUAL[number])
        rows += (
            f"<tr><td>{number}</td><td>{mean:.2f}</td><td>{deviation:.2f}</td><td>{usual_mean:.2f}</td>"
            f"<td>{usual:.2f}</td><td>{'far off' if far else ''}</td></tr>"
        )
    note = "Within SDXL's range."
    if config.vae == "tiny":
        note = "The tiny VAE has random weights: its latents need not be in SDXL's range."
    elif is_far:
        note = (
            "Far off is a mean more than one deviation away, or less than half or more than twice the deviation: "
            "another VAE than SDXL's, or pictures of one kind only."
        )
    return (
        f"{range_chart(ranges, names=('here', 'SDXL'))}<table><tr><th>channel</th><th>mean</th><th>deviation</th>"
        "<th>SDXL: mean</th><th>deviation</th><th></th></tr>"
        f"{rows}</table><p class='note'>unscaled, over at most 256 pictures. {note}</p>"
    )


def _limits(ref: LatentSetRef) -> str:
    bound, seconds = shard_limits(ref.path)
    shards = ", ".join(f"{name} ({count} of {bound.total()} shards)" for name, count in bound.most_common())
    stages = ", ".join(f"{name} {value:,.1f} s" for name, value in seconds.most_common() if value >= 0.05)
    return (
        f"<p class='note'>Bound by {escape(shards)}. Seconds by stage, summed over shards (stages overlap): "
        f"{escape(stages) or 'none'}.</p>"
    )


def _rejected(ref: LatentSetRef) -> str:
    rows = [row for row in read_rejected(ref.rejected) if row.stage == "latents"]
    shown = "".join(
        f"<tr><td>{escape(row.key)}</td><td>{escape(row.reason)}</td><td>{row.attempts}</td>"
        f"<td style='white-space: normal'>{escape(row.detail)}</td></tr>"
        for row in rows[:NUM_REJECTED]
    )
    if not rows:
        return "<h2>Rejected</h2><p>No picture was rejected.</p>"
    heading = "<table><tr><th>picture</th><th>reason</th><th>attempts</th><th>detail</th></tr>"
    more = f"<p>and {len(rows) - NUM_REJECTED} more in rejected.jsonl</p>" if len(rows) > NUM_REJECTED else ""
    return f"<h2>Rejected: {len(rows):,}</h2>{bar_chart(count_reasons(rows))}{heading}{shown}</table>{more}"
