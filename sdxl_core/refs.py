"""References that travel between tasks: path + digest + counts, small and JSON-serialisable.

Pydantic dataclasses: frozen values that also rebuild themselves (nested, with `Path`s) from plain JSON, which is how
Prefect stores results. `parents` names the references a result was made from, so lineage needs no database.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """A finished file. `sha256`: 64 hex digits of its content. `num_bytes`: its size."""

    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """A folder of images as it was when listed. `digest` covers names, sizes and modification times."""

    path: Path
    digest: str
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetRef:
    """Pictures picked by a query. seen = kept + unmatched + rejected.

    `catalog`: what it was picked from.   `how`: a SubsetHow; of a manifest, `path` has manifest.arrow.
    `missing`: picked without image, tags, caption; text: with neither tags nor caption. Pictures without text are kept,
    and listed in missing.jsonl.
    """

    path: Path
    catalog: Path
    digest: str
    query: str
    how: str
    num_seen: int
    num_kept: int
    num_unmatched: int
    num_rejected: int
    missing: dict[str, int]
    rejected: Path
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRef:
    """A page about `num_kept` of the `num_seen` pictures of a catalog; `tables` has the same as markdown."""

    path: Path
    sha256: str
    tables: Path
    query: str
    num_seen: int
    num_kept: int
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRef:
    """A contiguous range [start, stop) of rows: the unit of retry, resume and scheduling.

    `path`: file that lists the rows. `digest`: identity of the rows' content (names, sizes, times).
    """

    index: int
    start: int
    stop: int
    digest: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetPlanRef:
    """Picks whose files will be placed, in shards. `path`: which records of which catalog.

    `num_refused`: what the source has besides its records.
    """

    path: Path
    digest: str
    shards: tuple[ShardRef, ...]
    num_refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedShardRef:
    """Placed files of one shard of a subset; `path`: its ledger, that names them.

    seen = kept + failed + pictures that no source has.   `num_failed`: pictures that could not be read.
    """

    index: int
    digest: str
    path: Path
    num_seen: int
    num_kept: int
    num_failed: int
    num_files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataRef:
    """A metadata JSON (`meta_cap_dd.json`). seen = kept + rejected; `num_empty` of the kept have no tag at all.

    `missing`: pictures without tags, without caption, text: with neither; image: texts without a picture. A picture
    whose text cannot be read is not among them.
    """

    path: Path
    sha256: str
    num_seen: int
    num_kept: int
    num_rejected: int
    num_empty: int
    missing: dict[str, int]
    rejected: Path
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeShardRef:
    """A finished merge shard: `path` is its fragment of the JSON, `rejected` its rejected rows. seen = kept + rejected.

    `crc32`, `num_bytes`: of the fragment.   `missing`: as of MetadataRef; a folder's first shard has its lonely texts.
    """

    index: int
    digest: str
    path: Path
    crc32: int
    num_bytes: int
    rejected: Path
    num_seen: int
    num_kept: int
    num_rejected: int
    num_empty: int
    missing: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShardRef:
    """A finished latent shard as its ledger tells it. seen = kept + rejected."""

    index: int
    digest: str
    ledger: Path
    num_seen: int
    num_kept: int
    num_rejected: int
    images_per_s: float
    bound_by: str
    device: str
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSetRef:
    """A whole latent cache: `path` holds the .npz files, `metadata` is meta_lat.json, `fingerprint` its settings."""

    path: Path
    metadata: FileRef
    fingerprint: str
    num_seen: int
    num_kept: int
    num_rejected: int
    mean_ar_error: float
    buckets: dict[str, int]
    rejected: Path
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRef:
    """A latent set all of whose bytes were read.

    findings: what was bad, a JSON line each; all of it is repaired. None where the set cannot be written to.
    num_rows: latents that were good when read.   num_repaired: the others, encoded again.
    """

    path: Path
    fingerprint: str
    num_files: int
    num_bytes: int
    num_rows: int
    num_repaired: int
    findings: Path | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedRef:
    """What `remove-latents` took out of a set. `num_unknown`: keys that it has no latents of."""

    path: Path
    num_removed: int
    num_unknown: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFilesRef:
    """What a conversion left: `what` was done, in how many files and bytes, of how many pictures.

    metadata: the JSON that goes with it, None where it has none of its own.   rejected: of which some were refused.
    """

    what: str
    path: Path
    num_rows: int
    num_files: int
    num_bytes: int
    metadata: Path | None = None
    num_rejected: int = 0
    rejected: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """A trained model as single-file SDXL .safetensors, and the state it can be continued from."""

    file: FileRef
    state: Path
    tensorboard: Path
    samples: tuple[Path, ...]
    num_steps: int
    num_images: int
    final_avr_loss: float
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by component: of each card, of the machine's main memory for each process, of the disk.

    num_trained, num_parameters: elements of U-Net and text encoders.   largest_buffer: elements of the largest single
    buffer that holds weights or gradients together.
    """

    card: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    num_trained: int
    num_parameters: int
    largest_buffer: int

    @property
    def card_bytes(self) -> int:
        return sum(self.card.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRef:
    """A finished run: `path` is its run.json, `report` and `lineage` pages to look at.

    `lineage`: None of a model that carries no record of its making (a diffusers folder).
    """

    path: Path
    sha256: str
    checkpoint: Path
    report: Path
    lineage: Path | None = None


def to_json(ref: Any) -> dict[str, Any]:
    """A reference as plain JSON values (paths as strings)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    result: dict[str, Any] = plain(asdict(ref))
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogPlanRef:
    """What one part of a catalog will be read from. `digest`: identity of that content and of the settings.

    `source`: position of the source.   `payload`: which rows of it, for the source's own reader.
    """

    index: int
    source: int
    digest: str
    label: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogPartRef:
    """A finished part of a catalog: `path` + .rows.arrow, .vocab.arrow, .rejected.jsonl.

    seen = kept + filtered + rejected.   `num_filtered`: rows that the source's `ratings` leave out.
    """

    index: int
    source: int
    digest: str
    path: Path
    num_seen: int
    num_kept: int
    num_filtered: int = 0
    num_rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogRef:
    """A catalog. Rows seen = rows kept + filtered + rejected; `num_records` pictures are made of the rows kept.

    `num_filtered`: rows that the sources' `ratings` leave out, and the rows in other sources of the `num_taken_out`
    pictures that these name: they are no pictures of the catalog.
    `missing`: records without image, tags, caption, facts.   `conflicts`: records for which two sources had it.
    `num_sized`: records of known size, where sizes were read from all headers; else None.
    """

    path: Path
    digest: str
    num_records: int
    num_tags: int
    num_seen: int
    num_filtered: int = 0
    num_taken_out: int = 0
    num_rejected: int
    missing: dict[str, int]
    conflicts: dict[str, int]
    num_sized: int | None = None
    rejected: Path
    parents: tuple[str, ...] = ()
