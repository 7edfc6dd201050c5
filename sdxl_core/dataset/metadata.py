"""Tags and captions of a folder into one metadata JSON, byte-identical to what sd-scripts writes.

plan_merge lists the folder once and cuts the list into shards; merge_shard reads the text files of one shard into a
fragment of the JSON; join_shards streams the fragments into place. Fragments are named by their content's digest, so a
second run over unchanged files reads none of them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from json.encoder import encode_basestring_ascii as quoted
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.config import MergeTagsConfig
from sdxl_core.dataset.listing import list_images
from sdxl_core.dataset.text import UnreadableText, read_text
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import digest_of, sha256_file, write_atomic
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import MergeShardRef, MetadataRef, ShardRef, to_json
from sdxl_core.rejected import Rejected, count_reasons, read_rejected, update_rejected

STAGE = "merge"
FORMAT = 1
MIN_IMAGES_FOR_PROCESSES = 20_000


def merge_tags(config: MergeTagsConfig, *, progress: Progress = no_progress) -> MetadataRef:
    """Plan, merge every shard (in processes where the folder is large) and join.

    Raises: ConfigError, DataError (no pictures; none with text), DiskFullError.
    """
    shards = plan_merge(config)
    total, done, merged = shards[-1].stop, 0, []
    work = partial(merge_shard, config=config)
    if total < MIN_IMAGES_FOR_PROCESSES:
        results: Iterator[MergeShardRef] = map(work, shards)
        pool = None
    else:
        pool = ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1), get_context("spawn"))
        results = pool.map(work, shards)
    try:
        for shard in results:
            merged.append(shard)
            done += shard.num_seen
            progress("merge tags", done, total)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return join_shards(config, merged)


def plan_merge(config: MergeTagsConfig) -> list[ShardRef]:
    """List the pictures and cut them into at most `num_shards` contiguous shards.

    A shard's digest covers the names, sizes and times of its text files, and the settings.
    Raises: ConfigError, DataError.
    """
    if config.out.is_dir():
        raise ConfigError(f"out = {config.out}: this is a folder; name the JSON file to write in it.")
    extensions = (config.tag_extension, config.caption_extension)
    listing = list_images(config.source, recursive=config.recursive, stage=STAGE, text_extensions=extensions)
    if not listing.images:
        raise DataError(f"{config.source}: every picture was rejected, the first: {listing.rejected[0].detail}.")
    settings = config.model_dump_json(exclude={"out", "num_shards"})
    num_shards = min(config.num_shards, len(listing.images))
    shards = []
    for index in range(num_shards):
        start, stop = (len(listing.images) * i // num_shards for i in (index, index + 1))
        rows = [
            [image.name, *(listing.texts.get(image.key + extension) for extension in extensions)]
            for image in listing.images[start:stop]
        ]
        rejected = [[row.key, row.reason, row.detail] for row in listing.rejected] if index == 0 else []
        body = orjson.dumps({"rows": rows, "rejected": rejected})
        digest = digest_of(FORMAT, settings, body)
        path = work_folder(config) / f"{digest[:32]}.rows.json"
        if not path.exists():
            write_atomic(path, body, sync=False)
        shards.append(ShardRef(index=index, start=start, stop=stop, digest=digest, path=path))
    return shards


def shard_is_merged(shard: ShardRef, config: MergeTagsConfig) -> bool:
    """Whether the shard's fragment is there."""
    return _result_path(shard).exists() and _fragment_path(shard).exists()


def merge_shard(shard: ShardRef, config: MergeTagsConfig) -> MergeShardRef:
    """Read one shard's text files into a fragment of the JSON; a finished fragment is not read again.

    Raises: DataError: the shard's listing is gone (the out folder was cleaned meanwhile).   DiskFullError.
    """
    if shard_is_merged(shard, config):
        return MergeShardRef(**orjson.loads(_result_path(shard).read_bytes()))
    try:
        listing = orjson.loads(shard.path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{shard.path}: the listing of shard {shard.index} is gone. Run the merge again.") from error
    rejected = [Rejected(stage=STAGE, key=k, reason=r, detail=d) for k, r, d in listing["rejected"]]
    pieces: list[str] = []
    num_empty = 0
    for name, tags, caption in listing["rows"]:
        entry = _entry(config, name, has_tags=tags is not None, has_caption=caption is not None)
        if isinstance(entry, Rejected):
            rejected.append(entry)
            continue
        num_empty += not any(entry.values())
        fields = ",\n".join(f'    "{field}": {quoted(text)}' for field, text in entry.items())
        key = str(config.source / name) if config.key_style == "full_path" else os.path.splitext(name)[0]
        pieces.append(f"  {quoted(key)}: {{\n{fields}\n  }}")
    fragment = ",\n".join(pieces).encode("ascii")
    write_atomic(_fragment_path(shard), fragment)
    update_rejected(_rejected_path(shard), STAGE, rejected)
    ref = MergeShardRef(
        index=shard.index,
        digest=shard.digest,
        path=_fragment_path(shard),
        rejected=_rejected_path(shard),
        num_seen=len(pieces) + len(rejected),
        num_kept=len(pieces),
        num_rejected=len(rejected),
        num_empty=num_empty,
    )
    write_atomic(_result_path(shard), orjson.dumps(to_json(ref)))
    return ref


def _entry(config: MergeTagsConfig, name: str, *, has_tags: bool, has_caption: bool) -> dict[str, str] | Rejected:
    stem = config.source / os.path.splitext(name)[0]
    entry: dict[str, str] = {}
    try:
        if has_caption:
            entry["caption"] = read_text(f"{stem}{config.caption_extension}")
        if has_tags:
            entry["tags"] = read_text(f"{stem}{config.tag_extension}")
    except UnreadableText as error:
        return Rejected(stage=STAGE, key=_key(name), reason=error.reason, detail=str(error))
    except OSError as error:
        detail = f"its text file cannot be read: {error.strerror}"
        return Rejected(stage=STAGE, key=_key(name), reason="unreadable_text", detail=detail)
    if not entry:
        detail = f"there is no {stem.name}{config.tag_extension} or {config.caption_extension} beside {name}"
        return Rejected(stage=STAGE, key=_key(name), reason="no_caption", detail=detail)
    if config.empty_tags == "reject" and not any(entry.values()):
        return Rejected(stage=STAGE, key=_key(name), reason="empty_caption", detail="its text files are empty")
    return entry


def join_shards(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> MetadataRef:
    """Stream the fragments into `config.out`; nothing is written where it holds exactly that already.

    Raises: DataError: no picture has a text.   DiskFullError.
    """
    num_kept = sum(shard.num_kept for shard in shards)
    rejected = [row for shard in shards for row in read_rejected(shard.rejected)]
    rejected_path = config.out.parent / "rejected.jsonl"
    if not num_kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected).items())
        raise DataError(
            f"{config.source}: none of its {sum(shard.num_seen for shard in shards)} pictures has a usable text "
            f"({reasons}). Tags are looked for in F{config.tag_extension} beside F.png; see --tag-extension."
        )
    pieces = _whole_json(shards)
    size = sum(map(len, _whole_json(shards)))
    if not (config.out.exists() and config.out.stat().st_size == size and _same(config.out, pieces)):
        write_atomic(config.out, _whole_json(shards))
    if [row for row in read_rejected(rejected_path) if row.stage == STAGE] != rejected:
        update_rejected(rejected_path, STAGE, rejected)
    _remove_old_work(config, shards)
    return MetadataRef(
        path=config.out,
        sha256=sha256_file(config.out),
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


def _key(name: str) -> str:
    return os.path.splitext(name)[0]


def _fragment_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".fragment")


def _rejected_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".rejected.jsonl")


def _result_path(shard: ShardRef) -> Path:
    return shard.path.with_suffix("").with_suffix(".result.json")


def _whole_json(shards: Sequence[MergeShardRef]) -> Iterator[bytes]:
    """The bytes of `json.dumps(metadata, indent=2)`, in pieces."""
    separator = b"{\n"
    for shard in shards:
        with open(shard.path, "rb") as file:
            first = True
            while piece := file.read(1 << 20):
                if first:
                    yield separator
                    separator, first = b",\n", False
                yield piece
    yield b"\n}"


def _same(path: Path, pieces: Iterator[bytes]) -> bool:
    with open(path, "rb") as file:
        return all(file.read(len(piece)) == piece for piece in pieces)


def _remove_old_work(config: MergeTagsConfig, shards: Sequence[MergeShardRef]) -> None:
    current = {shard.digest[:32] for shard in shards}
    for path in work_folder(config).iterdir():
        if path.name.split(".")[0] not in current:
            path.unlink(missing_ok=True)
