"""report.html: what a run did, on one page that needs nothing beside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.config import CacheLatentsConfig
from sdxl_core.files import write_atomic
from sdxl_core.rejected import read_rejected
from sdxl_core.report.charts import bar_chart, line_chart
from sdxl_core.report.curves import read_scalars
from sdxl_core.report.pictures import preview_text

NUM_PICTURES_SHOWN = 12
NUM_REJECTED_SHOWN = 200

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22303a; background: #f6f8f9; margin: 0; }
main { max-width: 860px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; } h2 { font-size: 19px; margin-top: 36px; border-bottom: 1px solid #d5dde3; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td, th { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid #e3e9ed; vertical-align: top; }
img, svg { max-width: 100%; height: auto; background: #fff; border: 1px solid #e3e9ed; border-radius: 4px; }
figure { display: inline-block; margin: 0 12px 12px 0; max-width: 256px; }
td:first-child, td:last-child { white-space: nowrap; }
figcaption { font-size: 13px; color: #5a6872; }
code, pre { font-size: 13px; overflow-wrap: anywhere; } pre { background: #fff; padding: 12px; overflow-x: auto; }
p.note { color: #5a6872; }
"""


def write_report(out: Path) -> Path:
    """Draw `out/report.html` from what the run left in `out`. Returns its path; unchanged content is not rewritten."""
    record = orjson.loads((out / "run.json").read_bytes())
    parts = [
        _summary(record),
        _lineage(out),
        _buckets(record),
        _latents(record),
        _curves(out),
        _previews(record),
        _rejected(out),
        _settings(record),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(out.name)}</title><style>{STYLE}</style>'
        f"<main><h1>{escape(out.name)}</h1>{''.join(parts)}</main></html>"
    ).encode()
    path = out / "report.html"
    if not path.exists() or path.read_bytes() != page:
        write_atomic(path, page)
    return path


def _summary(record: dict[str, Any]) -> str:
    rows = "".join(_summary_row(name, stage) for name, stage in record["stages"].items())
    return f"<table><tr><th>stage</th><th>result</th><th>finished (UTC)</th></tr>{rows}</table>"


def _summary_row(name: str, stage: dict[str, Any]) -> str:
    finished = stage["finished"][:16].replace("T", " ")
    return f"<tr><td>{escape(name)}</td><td>{escape(stage['summary'])}</td><td>{escape(finished)}</td></tr>"


def _lineage(out: Path) -> str:
    if not (out / "lineage.html").exists():
        return ""
    return (
        '<p><a href="lineage.html">How the checkpoint came to be</a>: from the query to the file, and its pictures</p>'
    )


def _buckets(record: dict[str, Any]) -> str:
    latents = record["stages"].get("cache-latents")
    if latents is None:
        return ""
    result = latents["result"]
    return (
        f"<h2>Buckets</h2>{bar_chart(result['buckets'])}"
        f'<p class="note">width x height in pixels; mean aspect-ratio error {result["mean_ar_error"]:.4f}</p>'
    )


def _latents(record: dict[str, Any]) -> str:
    from sdxl_core.latents.report import contact_sheet

    if "cache-latents" not in record["stages"]:
        return ""
    config = CacheLatentsConfig.model_validate(record["stages"]["cache-latents"]["config"])
    sheet = contact_sheet(config, num_pictures=NUM_PICTURES_SHOWN)
    return (
        f'<h2>Pictures and their latents</h2><img alt="pictures beside their latents" src="{data_url(sheet)}">'
        '<p class="note">left the picture, right its latents as cached: cropped to the bucket, in false colour. '
        '<a href="latents.html">More about the latents</a></p>'
    )


def _curves(out: Path) -> str:
    scalars = read_scalars(out / "tensorboard")
    loss = {name: points for name, points in scalars.items() if name in ("loss", "avr_loss")}
    rates = {name: points for name, points in scalars.items() if name.startswith("lr/")}
    charts = [line_chart(loss, x_label="step", y_label="loss")] if loss else []
    charts += [line_chart(rates, x_label="step", y_label="learning rate")] if rates else []
    charts += _heldout(out)
    return f"<h2>Training</h2>{''.join(charts)}" if charts else ""


def _heldout(out: Path) -> list[str]:
    """The held-out loss over the steps, and over the timesteps at the first and the newest measurement."""
    try:
        record = orjson.loads((out / "heldout.json").read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return []
    measured = record["measurements"]
    middles = [(low + high) / 2 for low, high in record["bins"]]
    by_timestep = {
        f"after step {one['step']}": list(zip(middles, one["by_bin"], strict=True))
        for one in (measured[0], measured[-1])
    }
    note = f"{record['num_samples']} pictures that are not trained on, with the same noise each time"
    return [
        line_chart({"held out": [(m["step"], m["loss"]) for m in measured]}, x_label="step", y_label="held-out loss"),
        line_chart(by_timestep, x_label="timestep", y_label="held-out loss"),
        f'<p class="note">{note}</p>',
    ]


def _previews(record: dict[str, Any]) -> str:
    train = record["stages"].get("train")
    if train is None or not train["result"]["samples"]:
        return ""
    tiny = train["config"]["base_model"] == "tiny"
    note = "The tiny preset has random weights: its previews are texture, not art." if tiny else ""
    figures = "".join(_figure(path) for path in map(Path, train["result"]["samples"]) if path.exists())
    return f'<h2>Previews</h2><p class="note">{note}</p>{figures}'


def _figure(path: Path) -> str:
    caption = ": ".join(preview_text(path)) if any(preview_text(path)) else path.name
    return (
        f'<figure><img alt="preview" title="{escape(path.name)}" src="{data_url(path.read_bytes())}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _rejected(out: Path) -> str:
    rows = read_rejected(out / "rejected.jsonl")
    if not rows:
        return "<h2>Rejected</h2><p>No picture was rejected.</p>"
    shown = "".join(
        f"<tr><td>{escape(row.stage)}</td><td>{escape(row.key)}</td><td>{escape(row.reason)}</td>"
        f"<td>{escape(row.detail)}</td></tr>"
        for row in rows[:NUM_REJECTED_SHOWN]
    )
    more = len(rows) - NUM_REJECTED_SHOWN
    return (
        f"<h2>Rejected: {len(rows)}</h2><table><tr><th>stage</th><th>picture</th><th>reason</th><th>detail</th></tr>"
        f"{shown}</table>" + (f"<p>and {more} more in rejected.jsonl</p>" if more > 0 else "")
    )


def _settings(record: dict[str, Any]) -> str:
    text = orjson.dumps(record.get("job", {}), option=orjson.OPT_INDENT_2).decode()
    versions = ", ".join(f"{name} {version}" for name, version in _versions(record).items())
    return f"<h2>Settings</h2><pre>{escape(text)}</pre><p class='note'>{escape(versions)}</p>"


def _versions(record: dict[str, Any]) -> dict[str, str]:
    newest: dict[str, str] = {}
    for stage in record["stages"].values():
        newest |= stage["versions"]
    return newest


def data_url(png: bytes) -> str:
    """A PNG as a `data:` URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
