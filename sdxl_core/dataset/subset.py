"""Pick pictures by their tags and copy them, with their text files, to a new folder."""

from __future__ import annotations

import difflib
import os
import shutil
from collections import Counter
from dataclasses import dataclass

import orjson

from sdxl_core.config import SubsetConfig
from sdxl_core.dataset.listing import ImageFile, ImageListing, list_images
from sdxl_core.dataset.query import TagQuery
from sdxl_core.dataset.text import UnreadableText, normalise_tag, parse_tags, read_text
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.files import atomic_writer, digest_of, write_atomic
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import Rejected, read_rejected, update_rejected

STAGE = "subset"
SETTINGS_FILE = ".subset.json"


@dataclass(frozen=True, slots=True)
class Selection:
    """What the query picked. `tag_counts`: how many of the pictures looked at have a tag."""

    picked: tuple[ImageFile, ...]
    num_unmatched: int
    rejected: tuple[Rejected, ...]
    tag_counts: Counter[str]


def subset(config: SubsetConfig, *, progress: Progress = no_progress) -> SubsetRef:
    """Copy every picture that the query picks; a second run copies only what is missing.

    Raises: ConfigError: a wrong query, or `out` belongs to another query.   DataError: nothing matches, or a file of
    another content is in the way.   DiskFullError.
    """
    query = TagQuery.parse(config.query)
    settings = _check_folders(config)
    extensions = (config.tag_extension, config.caption_extension)
    listing = list_images(config.source, recursive=config.recursive, stage=STAGE, text_extensions=extensions)
    selection = _select(config, listing, query, progress)
    if not selection.picked:
        raise DataError(_nothing_matches(config, listing, query, selection))
    if not (config.out / SETTINGS_FILE).exists():
        write_atomic(config.out / SETTINGS_FILE, orjson.dumps(settings))
    for number, image in enumerate(selection.picked):
        _copy_pair(config, listing, image)
        progress("subset: copy", number + 1, len(selection.picked))
    rejected_path = config.out / "rejected.jsonl"
    if read_rejected(rejected_path) != list(selection.rejected):
        update_rejected(rejected_path, STAGE, selection.rejected)
    return SubsetRef(
        path=config.out,
        digest=digest_of(*(f"{image.name}|{image.num_bytes}|{image.mtime_ns}" for image in selection.picked)),
        query=config.query,
        num_seen=listing.num_seen,
        num_kept=len(selection.picked),
        num_unmatched=selection.num_unmatched,
        num_rejected=len(selection.rejected),
        rejected=rejected_path,
        parents=(listing.digest(),),
    )


def _check_folders(config: SubsetConfig) -> dict[str, str]:
    """Refuse an `out` that lies in the source or belongs to other settings. Returns the settings to remember."""
    source, out = config.source.resolve(), config.out.resolve()
    if out == source or source in out.parents:
        raise ConfigError(f"out = {config.out} lies inside source = {config.source}: a later run would see the copies.")
    names = ("query", "recursive", "tag_extension", "caption_extension")
    settings = {"source": str(source)} | {name: str(getattr(config, name)) for name in names}
    path = config.out / SETTINGS_FILE
    old = orjson.loads(path.read_bytes()) if path.exists() else settings
    for name, value in settings.items():
        if old.get(name) != value:
            raise ConfigError(
                f"{config.out} holds a subset made with {name} = {old.get(name)!r}; now it is {value!r}. "
                f"Choose another out folder, or delete this one."
            )
    return settings


def _select(config: SubsetConfig, listing: ImageListing, query: TagQuery, progress: Progress) -> Selection:
    picked: list[ImageFile] = []
    rejected = list(listing.rejected)
    counts: Counter[str] = Counter()
    num_unmatched = 0
    for number, image in enumerate(listing.images):
        if config.query.strip():
            tags = _tags(config, listing, image)
            if isinstance(tags, Rejected):
                rejected.append(tags)
                continue
            counts.update(tags)
            if not query.matches(tags):
                num_unmatched += 1
                continue
        picked.append(image)
        progress("subset: read tags", number + 1, len(listing.images))
    return Selection(tuple(picked), num_unmatched, tuple(rejected), counts)


def _tags(config: SubsetConfig, listing: ImageListing, image: ImageFile) -> set[str] | Rejected:
    name = image.key + config.tag_extension
    if name not in listing.texts:
        detail = f"there is no {os.path.basename(name)}, so the query cannot be answered"
        return Rejected(stage=STAGE, key=image.key, reason="no_caption", detail=detail)
    try:
        return {normalise_tag(tag) for tag in parse_tags(read_text(config.source / name))}
    except UnreadableText as error:
        return Rejected(stage=STAGE, key=image.key, reason=error.reason, detail=str(error))


def _nothing_matches(config: SubsetConfig, listing: ImageListing, query: TagQuery, selection: Selection) -> str:
    lines = [f"query {config.query!r} matches none of the {len(listing.images)} pictures in {config.source}."]
    for sign, tags in (("", query.wanted), ("-", query.unwanted)):
        for tag in tags:
            count = selection.tag_counts[tag]
            line = f"  {sign}{tag}: {count} pictures have it"
            near = difflib.get_close_matches(tag, selection.tag_counts, n=3, cutoff=0.6) if not count else []
            if near:
                line += "; near it: " + ", ".join(f"{name} ({selection.tag_counts[name]})" for name in near)
            lines.append(line)
    return "\n".join(lines)


def _copy_pair(config: SubsetConfig, listing: ImageListing, image: ImageFile) -> None:
    _copy(config, image.name, image.num_bytes, image.mtime_ns)
    for extension in (config.tag_extension, config.caption_extension):
        name = image.key + extension
        if name in listing.texts:
            _copy(config, name, *listing.texts[name])


def _copy(config: SubsetConfig, name: str, num_bytes: int, mtime_ns: int) -> None:
    source, target = config.source / name, config.out / name
    if target.exists():
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (num_bytes, mtime_ns):
            return
        if source.read_bytes() != target.read_bytes():
            raise DataError(
                f"{target} exists with another content than {source}; it is not overwritten. Remove it, or choose "
                f"another out folder."
            )
    else:
        with open(source, "rb") as reading, atomic_writer(target, sync=False) as writing:
            shutil.copyfileobj(reading, writing, 1 << 20)
    os.utime(target, ns=(mtime_ns, mtime_ns))
