"""Where and how large: processes, batches, dtypes, what is recomputed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sdxl_core.sections import Section


class MemoryOptions(Section):
    train_batch_size: int = Field(1, ge=1, le=4096, description="pictures a micro-batch, all of one bucket")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="micro-batches an optimizer step")
    weights_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="bfloat16: weights held in bf16 and updated with stochastic rounding, so that small steps count; "
        "float32: full weights, twice the memory",
    )
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="precision of forward and backward")
    gradient_checkpointing: bool = Field(True, description="recompute activations: less memory, about a third slower")
    num_processes: int = Field(1, ge=1, le=64, description="training processes, one a card (data parallel)")
    use_cpu: bool | None = Field(None, description="train on the CPU; left out: only where no CUDA card is found")
