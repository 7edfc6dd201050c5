"""Tags and captions of a folder into one metadata JSON, byte-identical to what sd-scripts writes.

plan_merge lists the folder once and cuts the list into shards; merge_shard reads the text files of one shard into a
fragment of the JSON; join_shards streams the fragments into place. Fragments are named by their content's digest, so a
second run over unchanged files reads none of them again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from itertools import islice
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset import forked
from sdxl_core.dataset.listing import NameListing, key_of, list_names
from sdxl_core.dataset.text import UnreadableText, read_text
from sdxl_core.errors import ConfigError, DataError, ShardError
from sdxl_core.files import atomic_writer, digest_of, remove_stale_partials, sha256_file, write_atomic
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import MergeShardRef, MetadataRef, ShardRef, to_json
from sdxl_core.rejected import Rejected, count_reasons, read_rejected, update_rejected

STAGE = "merge"
FORMAT = 2
ENTRIES_A_WRITE = 256  # more only fills memory
MIN_IMAGES_A_PROCESS = 2_000  # below, a fork costs more than it saves (benchmarks/merge_tags.md)


def merge_tags(config: MergeTagsConfig, *, progress: Progress = no_progress) -> MetadataRef:
    """Plan, merge every shard (in several processes where the folder is large) and join.

    Raises: ConfigError, DataError (no pictures; none with text), DiskFullError.
    """
    shards = plan_merge(config)
    merged: list[MergeShardRef] = []
    num_left = sum(shard.stop - shard.start for shard in shards if not shard_is_merged(shard, config))
    count = forked.num_processes(min(len(shards), num_left // MIN_IMAGES_A_PROCESS))
    for shard in forked.map_forked(partial(merge_shard, config=config), shards, count=count):
        merged.append(shard)
        progress("merge tags", shards[len(merged) - 1].stop, shards[-1].stop)
    return join_shards(config, merged)


def plan_merge(config: MergeTagsConfig) -> list[ShardRef]:
    """List the pictures and cut them into at most `num_shards` contiguous shards.

    A shard's digest covers the names of its pictures, the sizes and times of their text files, and the settings; not
    the pictures themselves, which merging does not open.
    Raises: ConfigError, DataError.
    """
    _check_out(config.out)
    extensions = (config.tag_extension, config.caption_extension)
    listing = list_names(config.source, recursive=config.recursive, stage=STAGE, text_extensions=extensions)
    if not listing.names:
        raise DataError(
            f"{config.source}: every picture was rejected, the first: {listing.rejected[0].key}: "
            f"{listing.rejected[0].detail}."
        )
    settings = config.model_dump_json(exclude={"out", "num_shards"})
    num_shards = min(config.num_shards, len(listing.names))
    plan = partial(_plan_shard, config=config, listing=listing, settings=settings, num_shards=num_shards)
    count = forked.num_processes(min(num_shards, len(listing.names) // MIN_IMAGES_A_PROCESS))
    return list(forked.map_forked(plan, range(num_shards), count=count))


def _plan_shard(
    index: int, *, config: MergeTagsConfig, listing: NameListing, settings: str, num_shards: int
) -> ShardRef:
    """Look at the shard's text files and store its rows, unless they are merged already."""
    start, stop = (len(listing.names) * i // num_shards for i in (index, index + 1))
    names = listing.names[start:stop]
    columns = {
        "names": names,
        "tags": _text_stats(config.source, names, listing.texts, config.tag_extension),
        "captions": _text_stats(config.source, names, listing.texts, config.caption_extension),
        "rejected": [[row.key, row.reason, row.detail] for row in listing.rejected] if index == 0 else [],
    }
    body = orjson.dumps(columns)
    digest = digest_of(FORMAT, settings, body)
    path = work_folder(config) / f"{digest[:32]}.rows.json"
    shard = ShardRef(index=index, start=start, stop=stop, digest=digest, path=path)
    if not shard_is_merged(shard, config) and not (path.exists() and path.read_bytes() == body):
        write_atomic(path, body, sync=False)
    return shard


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"out = {out}: this is a folder; name the JSON file to write in it.")
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ConfigError(f"out = {out}: {parent} is a file, not a folder. Choose another place.")
            return


def _text_stats(source: Path, names: Sequence[str], texts: frozenset[str], extension: str) -> list[int]:
    """Size in bytes and mtime_ns of each picture's text file, one after the other; -1, -1 where there is none."""
    prefix, stat = os.path.join(source, ""), os.stat
    numbers: list[int] = []
    for name in names:
        text = key_of(name) + extension
        if text not in texts:
            numbers += (-1, -1)
            continue
        try:
            status = stat(prefix + text)
        except FileNotFoundError:
            numbers += (-1, -1)
        except OSError:
            numbers += (0, 0)  # merge_shard meets the same failure and rejects the picture
        else:
            numbers += (status.st_size, status.st_mtime_ns)
    return numbers


def shard_is_merged(shard: ShardRef, config: MergeTagsConfig) -> bool:
    """Whether the shard's fragment and its rejected rows are there, with the size they were written with."""
    return _finished(shard) is not None


def merge_shard(shard: ShardRef, config: MergeTagsConfig) -> MergeShardRef:
    """Read one shard's text files into a fragment of the JSON; a finished fragment is not read again.

    A text file that could not be read for reasons outside it (permissions, a failing disk) is rejected, and the shard
    is not remembered as finished: the next run tries it again.
    Raises: DataError: the shard's listing is gone (the out folder was cleaned meanwhile).   DiskFullError.
    """
    finished = _finished(shard)
    if finished is not None:
        return finished
    try:
        listing = orjson.loads(shard.path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError) as error:
        raise DataError(f"{shard.path}: the listing of shard {shard.index} is gone. Run the merge again.") from error
    counts = _Counts([Rejected(stage=STAGE, key=k, reason=r, detail=d) for k, r, d in listing["rejected"]])
    entries = _entries(config, listing, counts)
    digest, num_bytes, num_kept = hashlib.sha256(), 0, 0
    with atomic_writer(_fragment_path(shard)) as file:
        while batch := list(islice(entries, ENTRIES_A_WRITE)):
            piece = (",\n" * bool(num_kept) + ",\n".join(batch)).encode("ascii")
            file.write(piece)
            digest.update(piece)
            num_bytes += len(piece)
            num_kept += len(batch)
    if counts.rejected:
        update_rejected(_rejected_path(shard), STAGE, counts.rejected)
    ref = MergeShardRef(
        index=shard.index,
        digest=shard.digest,
        path=_fragment_path(shard),
        sha256=digest.hexdigest(),
        num_bytes=num_bytes,
        rejected=_rejected_path(shard),
        num_seen=num_kept + len(counts.rejected),
        num_kept=num_kept,
        num_rejected=len(counts.rejected),
        num_empty=counts.num_empty,
    )
    if not counts.num_failed_reads:
        write_atomic(_result_path(shard), orjson.dumps(to_json(ref)))
    return ref


@dataclass(slots=True)
class _Counts:
    """What one shard has besides its entries."""

    rejected: list[Rejected]
    num_empty: int = 0
    num_failed_reads: int = 0


def _entries(config: MergeTagsConfig, listing: dict[str, Any], counts: _Counts) -> Iterator[str]:
    """Read the text files of a stored listing, in its order: entries as JSON text; the rest goes into `counts`."""
    full_path, spelled = config.key_style == "full_path", str(config.source / "x")[:-1]
    base = os.path.join(config.source, "")
    for name, tags_size, caption_size in zip(
        listing["names"], listing["tags"][::2], listing["captions"][::2], strict=True
    ):
        key = key_of(name)
        caption = tags = None
        try:
            if caption_size >= 0:
                caption = read_text(base + key + config.caption_extension)
            if tags_size >= 0:
                tags = read_text(base + key + config.tag_extension)
        except UnreadableText as error:
            counts.rejected.append(_rejected(key, error.reason, str(error)))
            continue
        except OSError as error:
            counts.num_failed_reads += 1
            detail = f"its text file cannot be read: {error.strerror}"
            counts.rejected.append(_rejected(key, "unreadable_text", detail))
            continue
        if not (tags or caption):
            if tags is None and caption is None:
                short = os.path.basename(key)
                detail = f"there is no {short}{config.tag_extension} or {short}{config.caption_extension} beside {name}"
                counts.rejected.append(_rejected(key, "no_caption", detail))
                continue
            if config.empty_tags == "reject":
                counts.rejected.append(_rejected(key, "empty_caption", "its text files are empty"))
                continue
            counts.num_empty += 1
        fields = f'    "tags": {quoted(tags)}' if tags is not None else ""
        if caption is not None:
            fields = f'    "caption": {quoted(caption)}' + (",\n" + fields if fields else "")
        yield f"  {quoted(spelled + name if full_path else key)}: {{\n{fields}\n  }}"


def join_shards(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> MetadataRef:
    """Stream the fragments into `config.out`; nothing is written where it holds exactly that already.

    Raises: DataError: no picture has a text.   ShardError: a fragment is not as it was written.   DiskFullError.
    """
    num_kept = sum(shard.num_kept for shard in shards)
    rejected = [row for shard in shards for row in _rejected_rows(shard)]
    rejected_path = config.out.parent / "rejected.jsonl"
    remove_stale_partials(rejected_path.parent, name=rejected_path.name)
    update_rejected(rejected_path, STAGE, rejected)
    if not num_kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected).items())
        raise DataError(
            f"{config.source}: none of its {sum(shard.num_seen for shard in shards)} pictures has a usable text "
            f"({reasons}; see {rejected_path}). Tags are looked for in F{config.tag_extension} beside F.png; "
            f"see --tag-extension."
        )
    sha256 = _write_whole_json(config.out, [shard for shard in shards if shard.num_kept])
    _remove_old_work(config, shards)
    return MetadataRef(
        path=config.out,
        sha256=sha256,
        num_seen=sum(shard.num_seen for shard in shards),
        num_kept=num_kept,
        num_rejected=len(rejected),
        num_empty=sum(shard.num_empty for shard in shards),
        rejected=rejected_path,
        parents=tuple(shard.digest for shard in shards),
    )


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """A meta_cap*.json or meta_lat.json, checked.

    Raises: ConfigError: no such file.   DataError: not JSON, or not metadata; the key and what was expected are named.
    """
    try:
        data = orjson.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such metadata file. `sdxl-flows merge-tags` makes it.") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: this is a folder; name the metadata JSON in it.") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Make it again with `sdxl-flows merge-tags`.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}; metadata is one object, picture key -> entry.")
    if not data:
        raise DataError(f"{path}: holds no picture.")
    for key, entry in data.items():
        problem = _entry_problem(entry)
        if problem:
            raise DataError(
                f"{path}: the entry of {key!r} {problem}. This is not a metadata file of ours or sd-scripts'."
            )
    return data


def _entry_problem(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"is {type(entry).__name__}, not an object"
    for field in ("tags", "caption"):
        if not isinstance(entry.get(field, ""), str):
            return f"has {field} that is not a text"
    size = entry.get("train_resolution", [8, 8])
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return "has a train_resolution that is not [width, height]"
    return ""


def work_folder(config: MergeTagsConfig) -> Path:
    """Where the shards' listings and fragments are kept, beside the output."""
    return config.out.parent / f".{config.out.name}.work"


def _rejected(key: str, reason: str, detail: str) -> Rejected:
    return Rejected(stage=STAGE, key=key, reason=reason, detail=detail)


def _finished(shard: ShardRef) -> MergeShardRef | None:
    """The finished shard as its result file tells it, None where a part of it is missing."""
    try:
        stored = MergeShardRef(**orjson.loads(_result_path(shard).read_bytes()))
        there = _fragment_path(shard).stat().st_size
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    if there != stored.num_bytes or (stored.num_rejected and not _rejected_path(shard).exists()):
        return None
    return replace(stored, index=shard.index, path=_fragment_path(shard), rejected=_rejected_path(shard))


def _fragment_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".fragment")


def _rejected_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".rejected.jsonl")


def _result_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".result.json")


def _rejected_rows(shard: MergeShardRef) -> list[Rejected]:
    try:
        rows = read_rejected(shard.rejected) if shard.num_rejected else []
    except DataError:
        rows = []
    if len(rows) != shard.num_rejected:
        raise _damaged(shard, shard.rejected)
    return rows


def _write_whole_json(out: Path, shards: Sequence[MergeShardRef]) -> str:
    """Write `json.dumps(metadata, indent=2)` unless `out` holds those bytes. Returns their SHA-256."""
    size = len("{\n") + len("\n}") + sum(shard.num_bytes for shard in shards) + len(",\n") * (len(shards) - 1)
    if out.exists() and out.stat().st_size == size:
        digest = hashlib.sha256()
        for piece in _whole_json(shards):
            digest.update(piece)
        if sha256_file(out) == digest.hexdigest():
            return digest.hexdigest()
    remove_stale_partials(out.parent, name=escape(out.name))
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for piece in _whole_json(shards):
            digest.update(piece)
            yield piece

    write_atomic(out, hashed())
    return digest.hexdigest()


def _whole_json(shards: Sequence[MergeShardRef]) -> Iterator[bytes]:
    """The bytes of the JSON, in pieces. Raises: ShardError: a fragment is not the one that was written."""
    yield b"{\n"
    for number, shard in enumerate(shards):
        if number:
            yield b",\n"
        digest = hashlib.sha256()
        try:
            with open(shard.path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
                    yield piece
        except FileNotFoundError as error:
            raise _damaged(shard, shard.path) from error
        if digest.hexdigest() != shard.sha256:
            raise _damaged(shard, shard.path)
    yield b"\n}"


def _damaged(shard: MergeShardRef, path: Path) -> ShardError:
    """The error for a shard whose stored files are not what was written; it is forgotten, so that it is redone."""
    shard.path.with_suffix(".result.json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return ShardError(
        f"{path}: this part of shard {shard.index} was changed or removed after it was written. Nothing was taken from "
        f"it; run the same command again, it reads that shard's text files anew."
    )


def _remove_old_work(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> None:
    current = {shard.digest[:32] for shard in shards}
    for path in work_folder(config).iterdir():
        if path.name.split(".")[0] not in current:
            path.unlink(missing_ok=True)
