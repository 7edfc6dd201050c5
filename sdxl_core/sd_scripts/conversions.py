"""How the values of sdxl_train.py's options become ours. What is said of an option is said in options.toml."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from sdxl_core.errors import ConfigError
from sdxl_core.sd_scripts.options import Given, option_table

_NOT_IN_TRAINING = "the latents are cached already; it mattered when they were made"
_PATHS = {"pretrained_model_name_or_path", "train_data_dir", "in_json", "output_dir", "vae", "sample_prompts"}
_OPTIMIZERS = {"adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "adafactor"}
_NO_DECAY = {"lion8bit", "adafactor"}  # without weight decay unless they are told, as these libraries have them
_OWN_PARAMETERS = {"betas": "adam_betas", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
_TAKES = {  # which of them are parameters of ours; other optimizers get optimizer_args alone
    **dict.fromkeys(("adamw", "adamw8bit", "pagedadamw8bit"), frozenset(_OWN_PARAMETERS)),
    **dict.fromkeys(_NO_DECAY, frozenset({"weight_decay"})),
}
_SCHEDULERS = {
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay",
}  # fmt: skip
_SPECIAL = {
    "learning_rate", "learning_rate_te1", "learning_rate_te2", "block_lr", "optimizer_type", "use_8bit_adam",
    "use_lion_optimizer", "optimizer_args", "lr_scheduler", "mixed_precision", "full_bf16", "save_precision",
    "save_model_as", "save_state", "save_last_n_epochs", "save_last_n_steps", "save_last_n_epochs_state",
    "save_last_n_steps_state", "caption_separator", "v_parameterization", "resolution", "max_train_steps", "alpha_mask",
    "masked_loss", "max_token_length",
}  # fmt: skip


def mapped_path(text: str, root_map: Mapping[str, str]) -> str:
    """A path with forward slashes, its beginning replaced; drive letters count in either case."""
    path = text.replace("\\", "/")
    for start, replacement in sorted(root_map.items(), key=lambda item: -len(item[0])):
        beginning = start.replace("\\", "/").rstrip("/")
        if path.lower() == beginning.lower() or path.lower().startswith(beginning.lower() + "/"):
            return replacement.rstrip("/") + path[len(beginning) :]
    return path


class Conversion:
    """One command line on its way. `launched`: what accelerate launch was told, by name.

    values: "train.x" -> value.   mapped: option -> our parameter.   not_mapped: option -> why.
    """

    def __init__(self, given: Given, *, root_map: Mapping[str, str]) -> None:
        self.given, self.root_map = given, root_map
        self.launched: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.mapped: dict[str, str] = {}
        self.not_mapped: dict[str, str] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """Fill values, mapped, not_mapped and notes."""
        for name, value in self.given.items():
            option = option_table()[name]
            if not option.to:
                self.not_mapped[name] = option.why
            elif name.startswith("metadata_"):
                self._set(
                    name, option.to, self.values.get(option.to, {}) | {name.removeprefix("metadata_"): str(value)}
                )
            elif name not in _SPECIAL:
                self._set(name, option.to, mapped_path(str(value), self.root_map) if name in _PATHS else value)
        self._precision()
        self._rates()
        self._optimizer()
        self._schedule()
        self._length_and_saving()
        self._captions_and_data()
        self._windows_paths()

    def nested(self, kind: str) -> dict[str, Any]:
        """The values as a TrainConfig ("train") or a JobConfig ("job") takes them."""
        values = dict(self.values)
        if kind == "train":
            for name, place in list(self.mapped.items()):
                if place.startswith(("latents.", "source.")):
                    del self.mapped[name]
                    self.not_mapped[name] = _NOT_IN_TRAINING
                    values.pop(place, None)
            return {key.removeprefix("train."): value for key, value in values.items()}
        result: dict[str, Any] = {}
        if "latents" in values:
            values["source.path"] = values.pop("latents")
            self.mapped["train_data_dir"] = "source.path"
        values.setdefault("latents.vae", values.get("train.base_model", "tiny"))
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            (result.setdefault(section, {}) if section else result)[name] = value
        return result

    def _has(self, name: str) -> bool:
        return name in self.given

    def _text(self, name: str) -> str:
        """An option's value, or sd-scripts' default."""
        return str(self.given.get(name, option_table()[name].default))

    def _number(self, name: str) -> float:
        """As `_text`. Raises: ConfigError: it is none."""
        return _number(name, self._text(name))

    def _set(self, name: str, place: str, value: Any) -> None:
        self.values[place] = value
        if self._has(name):
            self.mapped[name] = place

    def _say(self, name: str, why: str) -> None:
        """An option that has a counterpart, but whose value has none."""
        self.mapped.pop(name, None)
        self.not_mapped[name] = why

    def _precision(self) -> None:
        half = self._has("full_bf16") or self._has("full_fp16")
        self._set("full_bf16", "train.weights_dtype", "bfloat16" if half else "float32")
        mixed = self._text("mixed_precision")
        mixed = self.launched.get("mixed_precision", mixed) if not self._has("mixed_precision") else mixed
        self._set("mixed_precision", "train.mixed_precision", "no" if mixed == "no" and not half else "bf16")
        if mixed == "fp16":
            self.notes.append("fp16 training became bf16: the same size, but the range of float32, so no loss scaling")
        if "num_processes" in self.launched:
            self.values["train.num_processes"] = self.launched["num_processes"]
        self.values["train.gradient_checkpointing"] = bool(self.given.get("gradient_checkpointing"))

    def _rates(self) -> None:
        rate = self._number("learning_rate")
        trains_texts = self._has("train_text_encoder")
        self._set("learning_rate", "train.learning_rate", rate)
        for name in ("learning_rate_te1", "learning_rate_te2"):
            own = self._number(name) if self._has(name) else rate
            self._set(name, f"train.{name}", own if trains_texts else 0.0)
            if self._has(name) and not trains_texts:
                self._say(name, "without --train_text_encoder sdxl_train.py ignores it: text encoders stay frozen")
        if self._has("block_lr"):
            self._set(
                "block_lr", "train.block_lr", [_number("block_lr", part) for part in self._text("block_lr").split(",")]
            )

    def _optimizer(self) -> None:
        wanted = self._text("optimizer_type")
        plain = wanted.lower().replace("_", "")
        if self._has("use_8bit_adam"):
            self._set("use_8bit_adam", "train.optimizer", "adamw8bit")
        elif self._has("use_lion_optimizer") or plain == "lion":
            self._set("use_lion_optimizer", "train.optimizer", "lion8bit")
            self.notes.append("Lion became bitsandbytes' Lion8bit")
        elif plain in _OPTIMIZERS or "." in wanted:
            self._set("optimizer_type", "train.optimizer", plain if plain in _OPTIMIZERS else wanted)
        else:
            self.values["train.optimizer"] = "adamw"
        if self._has("optimizer_type") and "optimizer_type" not in self.mapped:
            if plain in ("", "lion"):
                self._set("optimizer_type", "train.optimizer", self.values["train.optimizer"])
            else:
                self._say(
                    "optimizer_type",
                    f"{wanted} is not among the optimizers here; adamw stands in its place. Any module.Class can be "
                    f"named as optimizer",
                )
        if self.values["train.optimizer"] in _NO_DECAY:
            self.values["train.weight_decay"] = 0.0
        if self._has("optimizer_args"):
            self._optimizer_arguments(self.given["optimizer_args"])
        if self.values["train.optimizer"] == "adafactor":
            self._adafactor()

    def _optimizer_arguments(self, words: list[str]) -> None:
        takes = _TAKES.get(self.values["train.optimizer"], frozenset())
        more, places = {}, []
        for word in words:
            name, _, text = word.partition("=")
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text
            value = list(value) if isinstance(value, tuple) else value
            if name in takes:
                self.values[f"train.{_OWN_PARAMETERS[name]}"] = value
                places.append(_OWN_PARAMETERS[name])
            else:
                more[name] = value
        if more:
            self.values["train.optimizer_args"] = more
        self.mapped["optimizer_args"] = "train." + ", ".join([*(["optimizer_args"] if more else []), *places])

    def _adafactor(self) -> None:
        """There it finds a rate of its own unless it is told not to, and scales by the parameter; ours does neither."""
        arguments = self.values.setdefault("train.optimizer_args", {})
        if arguments.pop("relative_step", True):
            self.notes.append(
                "Adafactor with relative steps finds a rate of its own in sd-scripts and ignores learning_rate; here "
                "learning_rate counts, so look at it"
            )
        arguments.pop("warmup_init", None)  # belongs to relative steps
        arguments.setdefault("scale_parameter", True)

    def _schedule(self) -> None:
        name = self._text("lr_scheduler")
        warmup = self._number("lr_warmup_steps")
        if name not in _SCHEDULERS:
            self._say("lr_scheduler", f"{name} is not among the schedules here; constant stands in its place")
            name = "constant"
        else:
            self._set("lr_scheduler", "train.lr_scheduler", name)
        self.values["train.lr_scheduler"] = "constant_with_warmup" if name == "constant" and warmup else name
        if self._number("lr_decay_steps") and name != "warmup_stable_decay" and self._has("lr_decay_steps"):
            self._say("lr_decay_steps", f"{name} has no phase of decay; sdxl_train.py ignores it as well")
            self.values.pop("train.lr_decay_steps")

    def _length_and_saving(self) -> None:
        self._set("max_train_steps", "train.max_train_steps", self._text("max_train_steps"))
        trained = "bf16" if self.values["train.weights_dtype"] == "bfloat16" else "fp32"
        precision = {"float": "fp32", "None": trained}.get(self._text("save_precision"), self._text("save_precision"))
        self._set("save_precision", "train.save_precision", precision)
        saved_as = self._text("save_model_as")
        if saved_as.startswith("diffusers"):
            self._set("save_model_as", "train.save_model_as", "diffusers")
        elif saved_as == "ckpt":
            self._say(
                "save_model_as", "a .ckpt is a pickle, which can run code when it is opened; .safetensors instead"
            )
        elif self._has("save_model_as"):
            self._set("save_model_as", "train.save_model_as", "safetensors")
        self._kept_files()
        if self._has("save_state"):
            for unit in ("epochs", "steps"):
                if self._has(f"save_every_n_{unit}"):
                    self._set("save_state", f"train.save_every_{unit}", self.given[f"save_every_n_{unit}"])
            if "save_state" not in self.mapped:
                self._say("save_state", "the state at the end is always kept")

    def _kept_files(self) -> None:
        for state, place in (("", "train.keep_models"), ("_state", "train.keep_states")):
            epochs, steps = f"save_last_n_epochs{state}", f"save_last_n_steps{state}"
            if self._has(epochs):
                self._set(epochs, place, max(int(self._number(epochs)), 2 if state else 1))
            if self._has(steps) and not self._has("save_every_n_steps"):
                self._say(steps, "says for how many steps files are kept; without --save_every_n_steps there are none")
            elif self._has(steps):
                every = self._number("save_every_n_steps")
                self._set(steps, place, max(math.ceil(self._number(steps) / every), 2 if state else 1))

    def _captions_and_data(self) -> None:
        separator = self._text("caption_separator")
        self._set("caption_separator", "train.caption_separator", ", " if separator.strip() == "," else separator)
        if self._has("enable_wildcard"):
            self.values["train.caption_line"] = "random"  # two things in one switch there
        if self._has("max_token_length"):
            self._set("max_token_length", "train.max_token_length", int(self._number("max_token_length")))
        if self._has("v_parameterization"):
            self._set("v_parameterization", "train.prediction_type", "v_prediction")
        for name in ("masked_loss", "alpha_mask"):
            if self._has(name):
                self._set(name, "train.masked_loss", self._has("masked_loss"))
        if self._has("resolution"):
            sides = [int(_number("resolution", side)) for side in self._text("resolution").split(",")]
            self._set("resolution", "latents.resolution_px", math.isqrt(sides[0] * sides[-1]))
        if not self._has("in_json"):  # the latents are yet to be made, with all that training needs of them
            self.values["latents.max_bucket_px"] = self._text("max_bucket_reso")
            self.values |= {f"latents.{name}": True for name in ("flip_aug", "alpha_mask") if self._has(name)}
        if self._has("sample_prompts"):
            self.values |= {"train.sample_inference_steps": 30, "train.sample_size_px": 512}
        if not self._has("seed"):
            self.notes.append("without --seed sd-scripts draws another one each time; seed = 0 here, every run repeats")

    def _windows_paths(self) -> None:
        """Say once that a path is one of Windows."""
        for key, value in self.values.items():
            if isinstance(value, str) and re.match(r"[A-Za-z]:/", value):
                drive = re.split("/", value)[0]
                self.notes.append(
                    f"{key} = {value} is a Windows path; on Linux or WSL2 import again with "
                    f"--root-map {drive}=/mnt/{drive[0].lower()}, or wherever that drive is"
                )
                return


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--{name}: {text!r} is not a number.") from error
