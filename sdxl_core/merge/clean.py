"""The clean-up steps of a merge, each by its name; the same rule for one text and for a whole vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sdxl_core.dataset.text import normalise_tag, parse_tags

# Faces are written with their underscore; these are the ones that booru taggers use.
# fmt: off
FACES = frozenset({
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9",
    ">_o", "@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||", "-_-", ";_;", "t_t",
})
# fmt: on


def spelled(tag: str, steps: Collection[str]) -> str:
    """A tag as it is written out. `underscores`: spaces in place of underscores, but not in faces such as ^_^."""
    if "underscores" not in steps or "_" not in tag or tag.lower() in FACES:
        return tag
    return " ".join(tag.replace("_", " ").split())


def ends_list(tag: str, steps: Collection[str]) -> bool:
    """`rating`: whether this tag and all behind it are left out, as sd-scripts' clean-up does from "rating" on."""
    return "rating" in steps and tag.lower().startswith("rating")


def clean_tags(tags: Iterable[str], steps: Collection[str]) -> list[str]:
    """The tags that remain, as written out. `repeated`: only the first of tags that compare equal."""
    kept: list[str] = []
    seen: set[str] = set()
    for tag in tags:
        if ends_list(tag, steps):
            break
        if "repeated" in steps:
            same = normalise_tag(tag)
            if same in seen:
                continue
            seen.add(same)
        kept.append(spelled(tag, steps))
    return kept


def cleaned_text(text: str, steps: Collection[str], separator: str = ", ") -> str:
    """A text of tags, cleaned."""
    return separator.join(clean_tags(parse_tags(text), steps))
