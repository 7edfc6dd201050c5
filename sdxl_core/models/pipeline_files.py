"""What a diffusers folder holds beside its weights: model_index.json and both tokenizers, made from what ships with us.

With them `StableDiffusionXLPipeline.from_pretrained(FOLDER)` works without a network.
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import orjson

from sdxl_core.files import write_atomic

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PADDING = {"tokenizer": END, "tokenizer_2": "!"}  # bigG pads with 0, the token of "!" inside a word
LEAST_DIFFUSERS = "0.36.0"
_PARTS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def write_pipeline_files(folder: Path, *, scheduler_class: str) -> None:
    """Both tokenizers, then model_index.json, which names every part of an SDXL pipeline. Each file whole or not there.

    Raises: DiskFullError.   DataError: no permission.
    """
    for name, padding in PADDING.items():
        for file, content in _tokenizer_files(padding).items():
            write_atomic(folder / name / file, content)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": LEAST_DIFFUSERS,
        "force_zeros_for_empty_prompt": True,  # as SDXL base 1.0 has it
        "scheduler": ["diffusers", scheduler_class],
        **_PARTS,
    }
    write_atomic(folder / "model_index.json", _json(index))


def merges() -> list[str]:
    """CLIP's 48,894 byte-pair merges, the first to be applied first, each "left right"."""
    packed = files("sdxl_core.models").joinpath("configs", "clip_merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().splitlines()


def vocabulary() -> dict[str, int]:
    """Token -> id, 49,408 of them: bytes, bytes at a word's end, merged pairs, begin and end.

    Source: simple_tokenizer.py of github.com/openai/CLIP.
    """
    letters = _letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [pair.replace(" ", "") for pair in merges()]
    return {token: number for number, token in enumerate([*tokens, BEGIN, END])}


def _letters() -> list[str]:
    """A character for each byte, in CLIP's order: those that are printable, then the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]


@cache
def _common_files() -> dict[str, bytes]:
    return {
        "vocab.json": orjson.dumps(vocabulary()),
        "merges.txt": "\n".join(["#version: 0.2", *merges(), ""]).encode(),
    }


def _tokenizer_files(padding: str) -> dict[str, bytes]:
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": padding}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    return _common_files() | {"special_tokens_map.json": _json(special), "tokenizer_config.json": _json(config)}


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2)
