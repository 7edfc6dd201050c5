"""Pick pictures of a folder by their tags and place them, with their text files, in a new folder."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from dataclasses import dataclass

from sdxl_core.config import SubsetConfig
from sdxl_core.dataset.listing import ImageFile, ImageListing, list_images
from sdxl_core.dataset.query import TagQuery
from sdxl_core.dataset.text import UnreadableText, normalise_tag, parse_tags, read_text
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.lock import output_lock
from sdxl_core.progress import Progress, no_progress
from sdxl_core.refs import SubsetRef
from sdxl_core.rejected import Rejected, count_reasons, update_rejected
from sdxl_core.subset.methods import PlacingFailed
from sdxl_core.subset.placed import Placed, check_out
from sdxl_core.subset.wanted import Wanted, WantedGroup

STAGE = "subset"
MAX_TAGS_SEARCHED = 20_000  # near misses are looked for among this many most frequent tags


@dataclass(frozen=True, slots=True)
class Selection:
    """What the query picked. `tag_counts`: how many of the pictures looked at have a tag."""

    picked: tuple[ImageFile, ...]
    num_unmatched: int
    rejected: tuple[Rejected, ...]
    tag_counts: Counter[str]


def subset(config: SubsetConfig, *, progress: Progress = no_progress) -> SubsetRef:
    """Place every picture that the query picks, with its text files; afterwards `out` holds these, no earlier picks.

    A second run copies what is missing or has changed in the source, and removes its own copies of what the query no
    longer picks. Files that it did not write, or that were changed since, are never touched.
    Raises: ConfigError: a wrong query, or `out` belongs to other settings.   DataError: nothing matches, or a file of
    another content is in the way.   DiskFullError.
    """
    query = TagQuery.parse(config.query)
    if config.how == "manifest":
        raise ConfigError(
            f"how = manifest lists pictures of a catalog, and source = {config.source} is a folder. "
            f"`sdxl-flows catalog --source {config.source} --out DIR` makes a catalog of it."
        )
    check_out(config.out, [config.source])
    with output_lock(config.out, purpose="makes a subset"):
        return _subset(config, query, progress)


def _subset(config: SubsetConfig, query: TagQuery, progress: Progress) -> SubsetRef:
    extensions = (config.tag_extension, config.caption_extension)
    placed = Placed.open(config.out, how=config.how, settings=_settings(config))
    listing = list_images(config.source, recursive=config.recursive, stage=STAGE, text_extensions=extensions)
    selection = _select(config, listing, query, progress)
    if not selection.picked:
        raise DataError(_nothing_matches(config, listing, query, selection))
    groups = [_files_of(config, listing, image) for image in selection.picked]
    placed.begin(groups)
    num_kept = 0
    rejected = list(selection.rejected)
    for number, group in enumerate(groups):
        try:
            placed.place(group)
            num_kept += 1
        except PlacingFailed as error:
            rejected.append(Rejected(stage=STAGE, key=group.key, reason="unreadable_file", detail=str(error)))
        progress(f"subset: {config.how}", number + 1, len(groups))
    rejected_path = config.out / "rejected.jsonl"
    update_rejected(rejected_path, STAGE, rejected)
    placed.finish()
    return SubsetRef(
        path=config.out,
        digest=placed.digest(),
        query=config.query,
        how=config.how,
        num_seen=listing.num_seen,
        num_kept=num_kept,
        num_unmatched=selection.num_unmatched,
        num_rejected=len(rejected),
        rejected=rejected_path,
        parents=(listing.digest,),
    )


def _settings(config: SubsetConfig) -> dict[str, str]:
    """The settings that `out` belongs to."""
    names = ("query", "recursive", "tag_extension", "caption_extension")
    return {"source": str(config.source.resolve())} | {name: str(getattr(config, name)) for name in names}


def _select(config: SubsetConfig, listing: ImageListing, query: TagQuery, progress: Progress) -> Selection:
    if not (query.wanted or query.unwanted):
        return Selection(listing.images, 0, listing.rejected, Counter())
    picked: list[ImageFile] = []
    rejected = list(listing.rejected)
    counts: Counter[str] = Counter()
    num_unmatched = 0
    for number, image in enumerate(listing.images):
        progress("subset: read tags", number + 1, len(listing.images))
        tags = _tags(config, listing, image)
        if isinstance(tags, Rejected):
            rejected.append(tags)
            continue
        counts.update(tags)
        if query.matches(tags):
            picked.append(image)
        else:
            num_unmatched += 1
    return Selection(tuple(picked), num_unmatched, tuple(rejected), counts)


def _tags(config: SubsetConfig, listing: ImageListing, image: ImageFile) -> set[str] | Rejected:
    name = image.key + config.tag_extension
    if name not in listing.texts:
        detail = f"there is no {os.path.basename(name)}, so the query cannot be answered"
        return Rejected(stage=STAGE, key=image.key, reason="no_caption", detail=detail)
    try:
        text = read_text(config.source / name)
    except UnreadableText as error:
        return Rejected(stage=STAGE, key=image.key, reason=error.reason, detail=str(error))
    except OSError as error:
        detail = f"{os.path.basename(name)} cannot be read: {error.strerror}"
        return Rejected(stage=STAGE, key=image.key, reason="unreadable_text", detail=detail)
    return {normalise_tag(tag) for tag in parse_tags(text)}


def _nothing_matches(config: SubsetConfig, listing: ImageListing, query: TagQuery, selection: Selection) -> str:
    lines = [f"query {config.query!r} matches none of the {listing.num_seen} pictures in {config.source}."]
    if selection.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(selection.rejected).items())
        lines.append(f"  {len(selection.rejected)} of them cannot be judged ({reasons}).")
    known = [tag for tag, _ in selection.tag_counts.most_common(MAX_TAGS_SEARCHED)]
    for sign, tags in (("", query.wanted), ("-", query.unwanted)):
        for tag in tags:
            count = selection.tag_counts[tag]
            line = f"  {sign}{tag}: {count} {'picture has' if count == 1 else 'pictures have'} it"
            near = difflib.get_close_matches(tag, known, n=3, cutoff=0.6) if not count else []
            if near:
                line += "; near it: " + ", ".join(f"{name} ({selection.tag_counts[name]})" for name in near)
            lines.append(line)
    return "\n".join(lines)


def _files_of(config: SubsetConfig, listing: ImageListing, image: ImageFile) -> WantedGroup:
    """The files that belong to a picture."""
    texts = dict.fromkeys((image.key + config.tag_extension, image.key + config.caption_extension))
    names = [*(name for name in texts if name in listing.texts), image.name]
    return WantedGroup(image.key, tuple(Wanted(name, f"{config.source.resolve()}/{name}") for name in names))
