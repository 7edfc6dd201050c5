"""A lineage for people: lines in a terminal, and one self-contained page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.files import write_atomic
from sdxl_core.lineage.trace import Lineage
from sdxl_core.report.charts import bar_chart
from sdxl_core.report.page import STYLE

NUM_TAGS_SHOWN, NUM_IMAGES_SHOWN = 30, 40
MAX_METADATA_BYTES = 256 << 20  # of a meta_lat.json that is read whole to count its tags: about 250,000 pictures
CHECK_WORDS = {"same": "unchanged", "changed": "CHANGED since", "gone": "not there"}
CHAIN_STYLE = """
ol.chain { list-style: none; padding: 0; } ol.chain li { background: #fff; border: 1px solid #d5dde3;
border-left: 4px solid #30638e; border-radius: 4px; padding: 8px 14px; margin: 0 0 14px; position: relative; }
ol.chain li:not(:last-child)::after { content: "↓"; position: absolute; left: 16px; bottom: -19px; color: #5a6872; }
ol.chain b { display: block; } .same { color: #2d7a4b; } .changed, .gone { color: #b3412a; font-weight: 600; }
"""


def lineage_text(lineage: Lineage) -> str:
    """The chain from query to checkpoint, a line a stage, then code, versions and what was checked."""
    lines = [
        f"{lineage.file}",
        f"  sha256   {lineage.sha256}",
        f"  made by  {lineage.num_steps} steps; {_code_words(lineage)}",
        f"  run      {lineage.run or 'not at hand (name it with --run)'}",
        "",
    ]
    lines += [f"  query    {lineage.query or 'none: every picture'}"]
    lines += [f"  {summary}" for _, summary, _ in _chain(lineage)]
    lines += ["", "  packages " + ", ".join(f"{name} {version}" for name, version in lineage.versions.items())]
    lines += [f"  {CHECK_WORDS[check.state]:13} {check.what}: {check.path}" for check in lineage.checks]
    return "\n".join(lines)


def lineage_markdown(lineage: Lineage) -> str:
    """The chain from query to checkpoint, what was checked, and the commonest tags, for the browser's artifacts."""
    lines = [f"# How {lineage.file.name} came to be", ""]
    lines += [
        f"1. **query**: `{lineage.query}`" if lineage.query else "1. **query**: none, every picture of the source"
    ]
    lines += [f"1. **{name}**: {summary}" for name, summary, _ in _chain(lineage)]
    lines += [f"1. **checkpoint**: {lineage.num_steps} steps, SHA-256 `{lineage.sha256}`", ""]
    lines += [f"Made by {_code_words(lineage)}.", "", "| checked | what | where |", "|---|---|---|"]
    lines += [f"| {CHECK_WORDS[check.state]} | {check.what} | `{check.path}` |" for check in lineage.checks]
    if _fits_a_page(lineage.metadata):
        lines += ["", "| tag | pictures |", "|---|---|"]
        lines += [f"| {_cell(tag)} | {count} |" for tag, count in lineage.tag_counts().most_common(NUM_TAGS_SHOWN)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fits_a_page(metadata: Path | None) -> bool:
    return metadata is not None and metadata.stat().st_size <= MAX_METADATA_BYTES


def write_lineage_page(lineage: Lineage, path: Path) -> Path:
    """Draw the page; unchanged content is not rewritten. Returns `path`."""
    parts = [_chain_html(lineage), _checks_html(lineage), _pictures_html(lineage), _settings_html(lineage)]
    title = escape(lineage.file.name)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Lineage of {title}</title>'
        f"<style>{STYLE}{CHAIN_STYLE}</style><main><h1>How {title} came to be</h1>{''.join(parts)}</main></html>"
    ).encode()
    if not path.exists() or path.read_bytes() != page:
        write_atomic(path, page)
    return path


def _code_words(lineage: Lineage) -> str:
    code = lineage.code
    commit = f", commit {code['commit'][:12]}" if code["commit"] else ""
    return f"sdxl-flows {code['version']}{commit}{' with local changes' if code['changed'] else ''}"


def _chain(lineage: Lineage) -> list[tuple[str, str, str]]:
    """(stage, what it said, when it finished) from the first stage to this file."""
    return [(name, stage["summary"], stage.get("finished", "")) for name, stage in lineage.stages.items()]


def _chain_html(lineage: Lineage) -> str:
    items = [("query", lineage.query or "none: every picture of the source", ""), *_chain(lineage)]
    items += [("checkpoint", f"{lineage.file.name}, {lineage.num_steps} steps, SHA-256 {lineage.sha256}", "")]
    rows = "".join(
        f"<li><b>{escape(name)}</b>{escape(summary)}"
        + (f'<br><span class="note">{escape(finished[:16].replace("T", " "))} UTC</span>' if finished else "")
        + "</li>"
        for name, summary, finished in items
    )
    return f'<ol class="chain">{rows}</ol>'


def _checks_html(lineage: Lineage) -> str:
    if not lineage.checks:
        return "<h2>Checked</h2><p>The run's folder was not at hand, so nothing beside the file was looked at.</p>"
    rows = "".join(
        f'<tr><td class="{check.state}">{CHECK_WORDS[check.state]}</td><td>{escape(check.what)}</td>'
        f"<td><code>{escape(str(check.path))}</code></td></tr>"
        for check in lineage.checks
    )
    return f"<h2>Checked</h2><table>{rows}</table>"


def _pictures_html(lineage: Lineage) -> str:
    if lineage.metadata is None:
        return "<h2>Pictures</h2><p>The run's meta_lat.json as it was is not at hand.</p>"
    if not _fits_a_page(lineage.metadata):
        return "<h2>Pictures</h2><p>Too many to count for a page: sdxl-flows lineage FILE --images lists them.</p>"
    images = list(lineage.images())
    tags = dict(lineage.tag_counts().most_common(NUM_TAGS_SHOWN))
    rows = "".join(
        f"<tr><td>{escape(image['key'])}</td><td>{escape(image.get('caption', ''))}</td>"
        f"<td style='white-space: normal'>{escape(image.get('tags', ''))}</td></tr>"
        for image in images[:NUM_IMAGES_SHOWN]
    )
    more = len(images) - NUM_IMAGES_SHOWN
    return (
        f"<h2>Tags of {len(images):,} pictures</h2>{bar_chart(tags) if tags else '<p>none</p>'}"
        f"<h2>Pictures</h2><table><tr><th>picture</th><th>caption</th><th>tags</th></tr>{rows}</table>"
        + (f"<p class='note'>and {more:,} more: sdxl-flows lineage FILE --images</p>" if more > 0 else "")
    )


def _settings_html(lineage: Lineage) -> str:
    parts = [f"<h3>{escape(name)}</h3>{_pre(stage.get('config', {}))}" for name, stage in lineage.stages.items()]
    if "train" not in lineage.stages:
        parts.append(f"<h3>train</h3>{_pre(lineage.config)}")
    versions = ", ".join(f"{name} {version}" for name, version in lineage.versions.items())
    return (
        f"<h2>Settings</h2>{''.join(parts)}<h2>Code</h2><p>{escape(_code_words(lineage))}</p><p>{escape(versions)}</p>"
    )


def _pre(values: dict[str, Any]) -> str:
    return f"<pre>{escape(orjson.dumps(values, option=orjson.OPT_INDENT_2).decode())}</pre>"
