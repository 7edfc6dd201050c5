"""What a stage says when it is done: one readable line a result, the same in terminal, browser and log."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from sdxl_core.refs import (
    CatalogRef,
    CheckpointRef,
    FileRef,
    LatentFilesRef,
    LatentSetRef,
    MetadataRef,
    RemovedRef,
    StatisticsRef,
    SubsetRef,
    VerifiedRef,
)
from sdxl_core.rejected import count_reasons, read_rejected

_LACKING = {
    "tags": "without tags",
    "caption": "without caption",
    "text": "without either",
    "image": "texts without a picture",
}


def counted(number: int, what: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


@singledispatch
def describe(ref: Any) -> str:
    """One line about a result reference."""
    return str(ref)


@describe.register
def _(ref: CatalogRef) -> str:
    lacking = ", ".join(f"{count:,} no {what}" for what, count in ref.missing.items() if count)
    doubled = ", ".join(f"{count:,} {what}" for what, count in ref.conflicts.items() if count)
    return (
        f"catalog: {counted(ref.num_records, 'picture')} of {counted(ref.num_seen, 'row')}, "
        f"{counted(ref.num_tags, 'tag')}"
        f"{rejected_text(ref.rejected, 'catalog', ref.num_rejected)}"
        + (f", {ref.num_filtered:,} of other ratings" if ref.num_filtered else "")
        + (f" (with them {ref.num_taken_out:,} pictures of other sources)" if ref.num_taken_out else "")
        + (f"; {lacking}" if lacking else "")
        + (f"; sizes of {ref.num_sized:,} of {ref.num_records:,} known" if ref.num_sized is not None else "")
        + (f"; told by several sources, the first used: {doubled}" if doubled else "")
        + f" -> {ref.path}"
    )


@describe.register
def _(ref: FileRef) -> str:
    return f"model: {ref.num_bytes / 1e6:,.1f} MB -> {ref.path}"


@describe.register
def _(ref: SubsetRef) -> str:
    unmatched = f", {ref.num_unmatched} did not match" if ref.num_unmatched else ""
    lonely = f"; {ref.missing['text']} kept without a text" if ref.missing.get("text") else ""
    how = "" if ref.how == "copy" else f" ({ref.how})"
    return (
        f"subset: kept {ref.num_kept:,} of {counted(ref.num_seen, 'picture')}{unmatched}"
        f"{rejected_text(ref.rejected, 'subset', ref.num_rejected)}{lonely} -> {ref.path}{how}"
    )


@describe.register
def _(ref: StatisticsRef) -> str:
    return f"statistics: {ref.num_kept:,} of {counted(ref.num_seen, 'picture')} -> {ref.path}"


@describe.register
def _(ref: MetadataRef) -> str:
    empty = f", {ref.num_empty} with empty text" if ref.num_empty else ""
    lacking = ", ".join(f"{ref.missing[what]:,} {words}" for what, words in _LACKING.items() if ref.missing.get(what))
    return (
        f"merge:  kept {ref.num_kept:,} of {counted(ref.num_seen, 'picture')}{empty}"
        f"{rejected_text(ref.rejected, 'merge' if ref.missing else 'merge-json', ref.num_rejected)}"
        + (f"; {lacking}" if lacking else "")
        + f" -> {ref.path}"
    )


@describe.register
def _(ref: LatentSetRef) -> str:
    return (
        f"latents: kept {ref.num_kept:,} of {counted(ref.num_seen, 'picture')}"
        f"{rejected_text(ref.rejected, 'latents', ref.num_rejected)}, {counted(len(ref.buckets), 'bucket')}, "
        f"mean aspect-ratio error {ref.mean_ar_error:.4f} -> {ref.path}"
    )


@describe.register
def _(ref: VerifiedRef) -> str:
    repaired = f", {ref.num_repaired:,} encoded again" if ref.num_repaired else ", nothing was bad"
    return (
        f"verify: {ref.num_rows:,} good latents in {counted(ref.num_files, 'file')}, {ref.num_bytes / 1e9:.2f} GB read "
        f"in {ref.seconds:.1f} s{repaired} -> {ref.path}"
    )


@describe.register
def _(ref: RemovedRef) -> str:
    unknown = f", {ref.num_unknown:,} keys have none here" if ref.num_unknown else ""
    return f"remove: latents of {counted(ref.num_removed, 'picture')} taken out{unknown} -> {ref.path}"


@describe.register
def _(ref: LatentFilesRef) -> str:
    refused = rejected_text(ref.rejected, ref.what, ref.num_rejected) if ref.rejected else ""
    metadata = f", {ref.metadata}" if ref.metadata else ""
    return (
        f"{ref.what}: latents of {counted(ref.num_rows, 'picture')} in {counted(ref.num_files, 'file')}, "
        f"{ref.num_bytes / 1e6:,.1f} MB{refused} -> {ref.path}{metadata}"
    )


@describe.register
def _(ref: CheckpointRef) -> str:
    return (
        f"train:  {counted(ref.num_steps, 'step')} on {counted(ref.num_images, 'picture')}, "
        f"avr_loss {ref.final_avr_loss:.4f} -> {ref.file.path} ({ref.file.num_bytes / 1e6:.1f} MB), "
        f"{counted(len(ref.samples), 'preview picture')}"
    )


def rejected_text(path: Path, stage: str, num_rejected: int) -> str:
    """` (2 rejected: 1 no_caption, 1 undecodable)`, or nothing."""
    if not num_rejected:
        return ""
    reasons = count_reasons(row for row in read_rejected(path) if row.stage == stage)
    return f" ({num_rejected} rejected: {', '.join(f'{count} {reason}' for reason, count in reasons.items())})"
