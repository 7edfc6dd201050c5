"""The key of a picture from what a dump or a metadata file calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdxl_core.catalog.sources.base import key_problem
from sdxl_core.dataset.listing import IMAGE_EXTENSIONS, key_of

_SEPARATOR = re.compile(r"\\(?![()\[\]{}])")  # not the escape of a bracket in a tag-like name


class BadKey(ValueError):
    """A name that is no key below a source; `str(error)` says why."""


def picture_key(name: str, root_map: Mapping[str, str]) -> str:
    r"""A path or stem as a key: `H:\art\1.png` with {"H:/art/": ""} is `1`; so are `./1.webp` and `1`.

    Args:   root_map: beginnings of names and what stands for them; the longest that fits is used.
    Raises: BadKey: empty, absolute, leading out of the source, with a NUL byte or half a surrogate pair.
    """
    path = _SEPARATOR.sub("/", name)
    for start in sorted(root_map, key=len, reverse=True):
        root = _SEPARATOR.sub("/", start)
        if path.startswith(root):
            path = root_map[start] + path[len(root) :]
            break
    while path.startswith("./"):
        path = path[2:]
    key = key_of(path) if path.lower().endswith(IMAGE_EXTENSIONS) else path
    problem = key_problem(key)
    if problem:
        raise BadKey(problem)
    try:
        key.encode()
    except UnicodeEncodeError:
        raise BadKey("it is not valid UTF-8") from None
    return key
