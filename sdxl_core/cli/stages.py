"""The stage commands: one table, from which command, options, core function and flow follow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from sdxl_core.catalog.config import CatalogConfig
from sdxl_core.cli.common import add_command, add_flow, run_stage
from sdxl_core.cli.options import add_options, collect_options
from sdxl_core.cli.training import add_train
from sdxl_core.config import (
    CacheLatentsConfig,
    CompactLatentsConfig,
    ConvertLatentsConfig,
    ImportLatentsConfig,
    MergeJsonConfig,
    MergeTagsConfig,
    PackTarsConfig,
    RemoveLatentsConfig,
    StatisticsConfig,
    SubsetConfig,
    TrainConfig,
    VerifyLatentsConfig,
)
from sdxl_core.config.convert import ConvertModelConfig
from sdxl_core.configfile import check, read_toml


class Stage(NamedTuple):
    """A stage command: its config, the core function that does it, whether `out` is a run folder, its help line."""

    config: type[BaseModel]
    function: str
    in_run_folder: bool
    help: str


STAGES = {
    "catalog": Stage(
        CatalogConfig,
        "sdxl_core.catalog.build:build_catalog",
        False,
        "describe a collection in one memory-mapped table",
    ),
    "subset": Stage(
        SubsetConfig, "sdxl_core.subset.stage:subset", False, "pick pictures by tags: a list of them, copies or links"
    ),
    "statistics": Stage(
        StatisticsConfig,
        "sdxl_core.statistics.stage:statistics",
        False,
        "what the pictures that a query picks hold",
    ),
    "merge-tags": Stage(
        MergeTagsConfig, "sdxl_core.merge.plan:merge_tags", False, "tags and captions of a folder into one JSON"
    ),
    "merge-json": Stage(MergeJsonConfig, "sdxl_core.merge.jsons:merge_jsons", False, "several metadata JSONs into one"),
    "cache-latents": Stage(
        CacheLatentsConfig, "sdxl_core.latents.cache:cache_latents", True, "encode pictures into bucketed .npz latents"
    ),
    "train": Stage(
        TrainConfig, "sdxl_core.training.launch:launch_training", True, "fine-tune SDXL on the cached latents"
    ),
    "convert-model": Stage(
        ConvertModelConfig,
        "sdxl_core.models.convert:convert_model",
        False,
        "an SDXL model as one file, as a diffusers folder, or in another precision",
    ),
}
SET_STAGES = {
    "verify": Stage(
        VerifyLatentsConfig,
        "sdxl_core.latents.verify:verify_latents",
        False,
        "read every byte of a latent set; with --repair encode again exactly what is bad",
    ),
    "remove-latents": Stage(
        RemoveLatentsConfig,
        "sdxl_core.latents.remove:remove_latents",
        False,
        "take the latents of some pictures out of a latent set",
    ),
    "convert-latents": Stage(
        ConvertLatentsConfig,
        "sdxl_core.latents.convert.layouts:convert_latents",
        False,
        "a latent set in the other layout, per_image or packed; nothing is encoded again",
    ),
    "import-latents": Stage(
        ImportLatentsConfig,
        "sdxl_core.latents.convert.importing:import_latents",
        False,
        "take an sd-scripts cache over where it lies: check every file, record it, change none",
    ),
    "compact-latents": Stage(
        CompactLatentsConfig,
        "sdxl_core.latents.convert.compact:compact_latents",
        False,
        "merge the small files of a packed set, and drop removed rows",
    ),
    "pack-tars": Stage(
        PackTarsConfig,
        "sdxl_core.latents.convert.tars:pack_tars",
        False,
        "per-image files into tars with a JSON index each, as large collections are shared",
    ),
}


def add_stages(commands: Any) -> None:
    """Every stage's command, its options made from its config."""
    for name, stage in STAGES.items():
        if name == "train":
            add_train(commands, stage)
            continue
        if name == "catalog":
            _add_catalog(commands, stage)
            continue
        command = add_command(commands, name, stage.help, _stage, stage=stage, name=name)
        if name != "convert-model":  # minutes at most, nothing to resume
            add_flow(command)
        add_options(command, stage.config, all_optional=name == "subset")  # --explain needs no --out
        if name == "subset":
            command.add_argument(
                "--explain", action="store_true", help="print how many pictures each term of the query finds, and end"
            )
    for name, stage in SET_STAGES.items():
        command = add_command(commands, name, stage.help, _on_a_set, stage=stage, name=name)
        if name == "verify":
            add_flow(command)
        command.add_argument("path", type=Path, metavar="DIR", help=stage.config.model_fields["path"].description)
        add_options(command, stage.config, leave_out=("path",))


def _add_catalog(commands: Any, stage: Stage) -> None:
    command = add_command(commands, "catalog", stage.help, _catalog, stage=stage, name="catalog")
    add_flow(command)
    command.add_argument("--config", type=Path, metavar="CATALOG.toml", help="[[sources]] with all their parameters")
    add_options(command, stage.config, all_optional=True)


def _catalog(options: argparse.Namespace) -> None:
    """Options win over the file."""
    values = {} if options.config is None else read_toml(options.config)
    values |= collect_options(options, CatalogConfig)
    where = "sdxl-flows catalog" if options.config is None else str(options.config)
    run_stage(check(CatalogConfig, values, where=where), options)


def _stage(options: argparse.Namespace) -> None:
    values = collect_options(options, options.stage.config)
    if options.name == "subset" and options.explain:
        _explain(values)
        return
    run_stage(check(options.stage.config, values, where=f"sdxl-flows {options.name}"), options)


def _explain(values: dict[str, Any]) -> None:
    """Count the terms of a query; only of a folder, and where `out` is named, its catalog is left beside `out`."""
    from tempfile import TemporaryDirectory

    from sdxl_core.progress import terminal_progress
    from sdxl_core.subset.stage import explain_query

    with TemporaryDirectory(prefix="sdxl-flows-") as folder, terminal_progress() as progress:
        values.setdefault("out", str(Path(folder) / "subset"))
        config = check(SubsetConfig, values, where="sdxl-flows subset --explain")
        print(explain_query(config, progress=progress))


def _on_a_set(options: argparse.Namespace) -> None:
    values = collect_options(options, options.stage.config)
    options.flow = getattr(options, "flow", False)
    run_stage(check(options.stage.config, values, where=f"sdxl-flows {options.name}"), options)
