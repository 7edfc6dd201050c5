"""Where data roots are set, nothing outside of them is reached: not by a parameter, not by a link."""

import os
from pathlib import Path

import pytest
from support.pictures import encoded, picture

from sdxl_core.catalog.images import ImagePlace, ImageReader
from sdxl_core.config import CacheLatentsConfig, JobConfig, MergeJsonConfig, MergeTagsConfig
from sdxl_core.configfile import check
from sdxl_core.dataset.listing import list_names
from sdxl_core.errors import ConfigError, DataError
from sdxl_core.merge.plan import merge_tags
from sdxl_core.roots import ROOTS_VARIABLE


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data` and `models` are roots; `secret` lies beside them, `data-more` only begins like one."""
    for name in ("data", "models", "secret", "data-more"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(ROOTS_VARIABLE, os.pathsep.join([str(tmp_path / "data"), str(tmp_path / "models")]))
    return tmp_path


def merge(source: object, out: object) -> MergeTagsConfig:
    return check(MergeTagsConfig, {"source": str(source), "out": str(out)}, where="here")


def test_paths_inside_are_taken(roots: Path) -> None:
    merge(roots / "data" / "in", roots / "data" / "new" / "m.json")
    paths = dict.fromkeys(("source", "metadata", "out"), str(roots / "data"))
    check(CacheLatentsConfig, paths | {"vae": "tiny"}, where="here")


@pytest.mark.parametrize("path", ["secret/in", "data/../secret", "data-more", "data/link/in", "/etc", "data/link"])
def test_a_path_outside_is_refused_by_its_name(roots: Path, path: str) -> None:
    (roots / "data" / "link").symlink_to(roots / "secret")
    with pytest.raises(ConfigError, match=r"source = .*lies outside the data roots"):
        merge(roots / path, roots / "data" / "m.json")


def test_paths_in_lists_sections_and_model_names_are_judged_too(roots: Path) -> None:
    inside, outside = str(roots / "data" / "a"), str(roots / "secret" / "a")
    with pytest.raises(ConfigError, match=r"sources = .*lies outside"):
        check(MergeJsonConfig, {"sources": [inside, outside], "out": inside}, where="here")
    with pytest.raises(ConfigError, match=r"path = .*lies outside"):
        check(JobConfig, {"out": inside, "source": {"path": outside}}, where="here")
    with pytest.raises(ConfigError, match=r"vae = .*lies outside"):
        check(JobConfig, {"out": inside, "source": {"path": inside}, "latents": {"vae": outside}}, where="here")
    with pytest.raises(ConfigError, match=r"base_model = .*lies outside"):
        check(JobConfig, {"out": inside, "source": {"path": inside}, "train": {"base_model": outside}}, where="here")


def test_another_ray_cluster_than_the_one_of_whoever_runs_the_service_is_refused(roots: Path) -> None:
    """What it answers can run as code."""
    paths = dict.fromkeys(("source", "metadata", "out"), str(roots / "data")) | {"vae": "tiny"}
    with pytest.raises(ConfigError, match=r"ray_address = evil:6379: .*write auto"):
        check(CacheLatentsConfig, paths | {"engine": "ray", "ray_address": "evil:6379"}, where="here")
    check(CacheLatentsConfig, paths | {"engine": "ray", "ray_address": "auto"}, where="here")


def test_links_among_the_pictures_are_not_followed_out(roots: Path) -> None:
    source = roots / "data" / "in"
    source.mkdir()
    (roots / "secret" / "more").mkdir()
    for folder in (source, roots / "secret", roots / "secret" / "more"):
        (folder / f"{folder.name}.png").write_bytes(encoded(picture(64, 64), "PNG"))
    (roots / "secret" / "words").write_text("password")
    (source / "linked.png").symlink_to(roots / "secret" / "secret.png")
    (source / "in.txt").symlink_to(roots / "secret" / "words")
    (source / "folder").symlink_to(roots / "secret" / "more")
    listing = list_names(source, recursive=True, stage="merge", text_extensions=(".txt",))
    assert list(listing.names) == ["in.png"] and not listing.texts
    assert [(row.key, row.reason) for row in listing.rejected] == [("linked.png", "outside_roots")]
    with pytest.raises(DataError):  # its only picture has no text that may be read
        merge_tags(merge(source, roots / "data" / "m.json"))
    assert "password" not in (roots / "data" / "rejected.jsonl").read_text()


def test_a_place_outside_is_not_read(roots: Path) -> None:
    (roots / "secret" / "1.png").write_bytes(encoded(picture(64, 64), "PNG"))
    size = (roots / "secret" / "1.png").stat().st_size
    with ImageReader() as reader, pytest.raises(DataError, match=r"out of the data roots"):
        reader.read(ImagePlace(roots / "secret" / "1.png", "1.png", 0, size, False))


def test_without_roots_there_is_no_limit(tmp_path: Path) -> None:
    merge("/etc", tmp_path / "m.json")
