"""The settings of a policy, as config files and the command line spell them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Quantization = Literal["nf4"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adaptation: W becomes W + (alpha / rank) B A, and only A and B are trained.

    Args:
        rank: rank of every update, the inner size of B A.
        alpha: numerator of the scale alpha / rank in front of B A.
        dropout: probability of dropping an input of A while training; sampling and scoring never drop.
        target_modules: names of the layers to adapt (a layer matches by the end of its name, as `q_proj`), a regular
            expression over full names, or `all-linear` for every linear layer except the output head.

    Raises:
        ValueError: for a setting out of range, or no layer to adapt.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"expected a LoRA rank of at least 1, got {self.rank} (for no LoRA at all: lora=None)")
        if self.alpha <= 0:
            raise ValueError(f"expected a LoRA alpha above 0, got {self.alpha} (it scales the update by alpha / rank)")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"expected a LoRA dropout in [0, 1), got {self.dropout}")
        if not self.target_modules:
            raise ValueError(
                f"expected LoRA target_modules to name at least one layer, got {self.target_modules!r} "
                "(use 'all-linear' for every linear layer)"
            )


@dataclass(frozen=True)
class PolicySettings:
    """What `load_policy` is called with.

    Args:
        name: a model folder, a backbone key (`qwen2_5_15`, `demo_arithmetic`, ...), or a hub name `owner/repository`.
        adapter: folder of a PEFT adapter to go on training; it brings its own LoRA settings. None starts a new one.
        lora: settings of a new LoRA adapter. None, with no adapter, trains every parameter of the model.
        quantization: `nf4` keeps the base model in 4 bits (QLoRA, needs bitsandbytes). None keeps it in `dtype`.
        dtype: number format of the base model's weights, or of its matrix products under quantization. The adapter's
            own weights are float32 always.
        device_map: placement by accelerate, as `auto` or `cuda:0`. None loads to the CPU and leaves the placing to the
            trainer (a quantized model goes to the current GPU, where there is one).
        attn_implementation: attention kernel, as `sdpa`, `eager` or `flash_attention_2`. None: the model's default.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        ValueError: for an empty name, an unknown option, or quantization without an adapter.
    """

    name: str
    adapter: str | None = None
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    quantization: Quantization | None = None
    dtype: Dtype = "float32"
    device_map: str | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("expected a policy name: a model folder, a backbone key or a hub name; got an empty one")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"expected dtype to be one of {', '.join(get_args(Dtype))}, got {self.dtype!r}")
        if self.quantization not in (None, *get_args(Quantization)):
            raise ValueError(f"expected quantization to be 'nf4' or None, got {self.quantization!r}")
        if self.quantization and self.lora is None and self.adapter is None:
            raise ValueError(
                f"expected LoRA settings or an adapter with quantization={self.quantization!r}, got lora=None and "
                "adapter=None: 4-bit weights cannot be trained themselves"
            )
