"""How much a forward pass keeps for its backward pass: counted on meta tensors, which have shapes and no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from sdxl_core.config.train import TrainOptions
from sdxl_core.models.presets import Component, Preset, component_config
from sdxl_core.training.rates import learning_rates

ATTENTION = torch.nn.functional.scaled_dot_product_attention
CLIP_LAYER_WIDTHS = 34  # a CLIP layer keeps about this many times its input (projections, attention, 4-wide MLP)


def kept_bytes(
    modules: Mapping[str, Any], options: TrainOptions, preset: Preset, *, width_px: int, height_px: int
) -> int:
    """Activations of one micro-batch at the peak: what is kept, and the largest part that is computed again.

    modules: on the meta device, with gradients where they train; they are changed (bf16, checkpointing switched on).
    bf16 throughout; float32 without autocast is twice that, with autocast half of it more (norms, casts of weights).
    """
    texts = _text_bytes(options, preset)
    rates = learning_rates(options)
    unet = modules["unet"].train()
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    batch, tokens = options.train_batch_size, 75 * (options.max_token_length // 75) + 2
    counter = _Counter({parameter.untyped_storage()._cdata for parameter in unet.parameters()})
    unet.disable_gradient_checkpointing()
    if options.gradient_checkpointing != "none":
        unet.enable_gradient_checkpointing(counter.recomputed)
        for module in unet.modules():
            is_attention = type(module).__name__ == "Transformer2DModel"
            if options.gradient_checkpointing == "blocks" and hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = is_attention
    width = component_config(preset, "unet")["cross_attention_dim"]
    pooled = component_config(preset, "text_encoder_2")["projection_dim"]
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    texts_train = bool(rates["text_encoder"] or rates["text_encoder_2"])
    with counter, _FlashAttention():
        output = unet(
            torch.empty(batch, 4, height_px // 8, width_px // 8, **meta),
            torch.empty(batch, device="meta", dtype=torch.int64),
            encoder_hidden_states=torch.empty(batch, tokens, width, requires_grad=texts_train, **meta),
            added_cond_kwargs={
                "text_embeds": torch.empty(batch, pooled, requires_grad=texts_train, **meta),
                "time_ids": torch.empty(batch, 6, **meta),
            },
            return_dict=False,
        )[0]
        del output
    total: int = counter.kept + counter.largest + texts
    if options.weights_dtype == "bfloat16":
        return total
    if options.mixed_precision == "no":
        return 2 * total
    casts: int = 2 * sum(parameter.numel() for parameter in unet.parameters())
    return total + total // 2 + casts


def _text_bytes(options: TrainOptions, preset: Preset) -> int:
    rates = learning_rates(options)
    tokens = 77 * (options.max_token_length // 75)
    total = 0
    encoders: tuple[Component, ...] = ("text_encoder", "text_encoder_2")
    for part in encoders:
        config = component_config(preset, part)
        one = options.train_batch_size * tokens * config["hidden_size"] * 2
        layers = config["num_hidden_layers"]
        if rates[part]:
            all_again = options.gradient_checkpointing == "all"
            total += one * (layers + CLIP_LAYER_WIDTHS if all_again else layers * CLIP_LAYER_WIDTHS)
    return total


class _Counter(saved_tensors_hooks):
    """Adds up the storages of what is saved for the backward pass, each once, weights not at all."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._weights, self._seen = weights, set[int]()
        self._alive: list[Any] = []  # so that no number of a storage is used again
        self.kept, self.largest, self._again = 0, 0, 0
        self._is_again = False

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or key in self._weights:
            return tensor
        self._seen.add(key)
        self._alive.append(storage)
        if self._is_again:
            self._again += storage.nbytes()
        else:
            self.kept += storage.nbytes()
        return tensor

    def recomputed(self, function: Any, *inputs: Any, **named: Any) -> Any:
        """In the place of torch.utils.checkpoint: its inputs are kept, what it saves itself is there for a while."""
        for value in inputs:
            if isinstance(value, Tensor):
                self._pack(value)
        self._is_again, self._again, seen = True, 0, set(self._seen)
        outputs = function(*inputs, **named)
        self._is_again, self._seen = False, seen
        self.largest = max(self.largest, self._again)
        return outputs


class _Attention(torch.autograd.Function):
    """Saves what flash attention saves: queries, keys, values, the output and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("meta tensors have no gradients to compute")


class _FlashAttention(TorchFunctionMode):
    """PyTorch's attention on meta tensors would save the whole matrix, as no card does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is ATTENTION:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))
