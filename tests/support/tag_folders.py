"""Folders of pictures and their texts, merged by us and as sd-scripts merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from sdxl_core.config import MergeTagsConfig
from sdxl_core.merge.plan import merge_tags
from sdxl_core.refs import MetadataRef

EXTENSIONS = [".png", ".jpg", ".jpeg", ".webp", ".bmp"]


NESTED = {
    "b/2.PNG": "tag with \"quotes\" and \\ backslash",
    "b-c/1.jpg": "日本語, ünïcode, \U0001f600",
    "b/a/3.webp": "line one\r\nline two\rline three\n",
    "1.png": "",
    ".hidden.png": "1girl",
    "b/with.dots.bmp": "  stripped  ",
}  # fmt: skip


def as_sd_scripts(folder: Path, *, full_path: bool, recursive: bool) -> str:
    """The reference: captions merged first, then tags, one file at a time, dumped once (its documented behaviour)."""
    found: set[Path] = set()
    for extension in EXTENSIONS + [extension.upper() for extension in EXTENSIONS]:
        found.update(folder.rglob("*" + extension) if recursive else folder.glob("*" + extension))
    metadata: dict[str, dict[str, str]] = {}
    for field, extension in (("caption", ".caption"), ("tags", ".txt")):
        for image in sorted(found):
            source = image.with_suffix(extension)
            if source.exists():
                key = str(image) if full_path else image.stem
                metadata.setdefault(key, {})[field] = source.read_text("utf-8").strip()
    order = [str(image) if full_path else image.stem for image in sorted(found)]
    return json.dumps({key: metadata[key] for key in order if key in metadata}, indent=2)


def make(folder: Path, files: dict[str, str | None]) -> Path:
    """Pictures (never opened by merging) and their texts; None: a picture without text."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
        if text is not None:
            path.with_suffix(".txt").write_bytes(text.encode())
    return folder


def merge(folder: Path, out: Path, **options: Any) -> MetadataRef:
    return merge_tags(MergeTagsConfig(source=folder, out=out, **options))


names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cc"]), min_size=1, max_size=12
)
stems = names.filter(lambda name: name not in (".", "..") and len(name.encode()) < 100 and name == name.strip("."))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=40)
