"""The Adam family of bitsandbytes, taken apart: 8-bit moments are kept from before the step, 32-bit ones read after it.

The 8-bit kernel widens the moments, takes the gradient in, moves θ by the float32 result, and only then quantizes
again: what moved θ is in no state afterwards. It is rebuilt from the moments of before and the gradient. The formula
is AdamW's, whatever the class is called: decay is decoupled, and −lr √c₂/c₁ · m/(√v + ε√c₂), with c = 1−βᵗ, is
−lr (m/c₁)/(√(v/c₂) + ε)   (bitsandbytes 0.50: backends/cpu/ops.py, csrc/kernels.cu).

On CUDA decay comes last, (θ + u)(1 − lr wd), which takes lr·wd of u as well, and βs are float32. Its 8-bit kernel
takes βᵗ by a fast intrinsic with an absolute error around 1e-7: up to 1e-4 of 1 − β₂ᵗ at the first steps, and of the
update. That is in the gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entropy_pl.updates.adamw import AdamMoments, AdamSettings, next_moments, split_step
from entropy_pl.updates.split import NextSplitter, Split, Splitter, watched
from entropy_pl.updates.steps import is_of

BLOCK_SIZES = (256, 2048)  # bitsandbytes' own, and what it was before version 0.44


@dataclass(frozen=True, eq=False)
class BlockQuantized:
    """Numbers as 8-bit codes: number i is ``table[codes[i]] · absmax[i // block_size]``.

    Args:
        codes: uint8.
        absmax: float32 [number of blocks].
        table: float32 [256]; the optimizer's own, which it never writes to.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Any], number: int) -> BlockQuantized:
        """A copy of the first (1) or second (2) moment in a parameter's state."""
        return cls(state[f"state{number}"].clone(), state[f"absmax{number}"].clone(), state[f"qmap{number}"])

    @property
    def block_size(self) -> int | None:
        """Numbers that share an absmax; None where it is no known one."""
        n, blocks = self.codes.numel(), self.absmax.numel()
        return next((size for size in BLOCK_SIZES if -(-n // size) == blocks), None)

    def values(self, device: torch.device) -> Tensor:
        """Float32, of the codes' shape: one float32 product, as in the kernel."""
        assert self.block_size is not None
        codes, absmax, table = (tensor.to(device) for tensor in (self.codes, self.absmax, self.table))
        scales = absmax.repeat_interleave(self.block_size)[: codes.numel()]
        return (table[codes.flatten().int()] * scales).reshape(codes.shape)

    def bytes(self) -> int:
        """Of the copies."""
        return self.codes.nbytes + self.absmax.nbytes


@dataclass(frozen=True, eq=False)
class QuantizedMoments:
    """One parameter's moments after ``step`` steps, in 8 bits."""

    step: float
    first: BlockQuantized
    second: BlockQuantized

    def values(self, device: torch.device) -> AdamMoments:
        """Widened to float32."""
        return AdamMoments(self.step, self.first.values(device), self.second.values(device))

    def bytes(self) -> int:
        """Of the copies."""
        return self.first.bytes() + self.second.bytes()


def is_bitsandbytes_adam(optimizer: object) -> bool:
    """Whether it is Adam or AdamW of bitsandbytes, of any width, paged or not; without importing the library."""
    return is_of(optimizer, ("bitsandbytes",)) and getattr(optimizer, "optimizer_name", None) == "adam"


def keep_moments(
    optimizer: Any, names: Mapping[int, str], *, all_widths: bool = False
) -> dict[str, QuantizedMoments | AdamMoments]:
    """Copies of the 8-bit moments, by parameter name: 2 bytes a number, and 8 a block.

    Not there are parameters that have no moments yet, those whose 8-bit moments are not in blocks, and, but for
    ``all_widths``, those whose moments are of 32 bits.
    """
    kept: dict[str, QuantizedMoments | AdamMoments] = {}
    for name, parameter, _ in watched(optimizer, names):
        state = optimizer.state.get(parameter)
        if state and _blockwise(state):
            kept[name] = QuantizedMoments(
                float(state["step"]), BlockQuantized.of(state, 1), BlockQuantized.of(state, 2)
            )
        elif all_widths and state and not _is_quantized(state):
            kept[name] = _wide(state).copy()
    return kept


def why_no_split(optimizer: Any, names: Mapping[int, str]) -> str | None:
    """What in the step just taken keeps it from being split, in words; None where nothing does."""
    for parameter, config in _configs(optimizer):
        if id(parameter) not in names:
            continue
        options = {
            "max_unorm": config.get("max_unorm", 0.0) > 0,
            "skip_zeros": bool(config.get("skip_zeros", False)),
            "percentile_clipping": config.get("percentile_clipping", 100) < 100,
            "block_wise=False": not config.get("block_wise", True),
        }
        used = [option for option, on in options.items() if on]
        if used:
            return f"{type(optimizer).__name__} with {' and '.join(used)} does not step as Adam does"
        state = optimizer.state.get(parameter)
        if state and not _readable(state):
            return f"{type(optimizer).__name__} holds moments of {names[id(parameter)]} in an unknown layout"
    return None


def bitsandbytes_splits(
    optimizer: Any, names: Mapping[int, str], lr_ref: float, kept: Mapping[str, QuantizedMoments | AdamMoments]
) -> dict[str, Splitter]:
    """As :func:`~entropy_pl.updates.adamw.adam_splits`, for the Adam family of bitsandbytes.

    Args:
        optimizer: right after its step.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.
        kept: :func:`keep_moments` from before the step.
    """
    splits: dict[str, Splitter] = {}
    for parameter, config in _configs(optimizer):
        name = names.get(id(parameter))
        if name is None:
            continue
        settings = AdamSettings.of(config, decoupled=True)
        state = optimizer.state.get(parameter)
        splits[name] = partial(
            split_bitsandbytes_step,
            settings,
            kept.get(name),
            _wide(state) if state and not _is_quantized(state) else None,
            None if parameter.grad is None else parameter.grad.detach(),
            scale=settings.lr / lr_ref,
            decay_last=_decay_last(parameter),
        )
    return splits


def bitsandbytes_next_splits(
    optimizer: Any, names: Mapping[int, str], lr_ref: float, kept: Mapping[str, QuantizedMoments | AdamMoments]
) -> dict[str, NextSplitter]:
    """As :func:`~entropy_pl.updates.adamw.adam_next_splits`, for the Adam family of bitsandbytes.

    Args:
        optimizer: right after its step.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.
        kept: :func:`keep_moments` of all widths, from before the step.
    """
    splits: dict[str, NextSplitter] = {}
    for parameter, config in _configs(optimizer):
        name = names.get(id(parameter))
        if name is not None:
            settings = AdamSettings.of(config, decoupled=True)
            splits[name] = partial(
                _split_next_step,
                settings,
                kept.get(name),
                scale=settings.lr / lr_ref,
                decay_last=_decay_last(parameter),
            )
    return splits


def _split_next_step(
    settings: AdamSettings,
    before: QuantizedMoments | AdamMoments | None,
    gradient: Tensor | None,
    theta: Tensor,
    *,
    scale: float,
    decay_last: bool,
    momentum: bool,
) -> Split:
    if not momentum:
        settings = settings.without_momentum()
    return split_bitsandbytes_step(settings, before, None, gradient, theta, scale=scale, decay_last=decay_last)


def split_bitsandbytes_step(
    settings: AdamSettings,
    before: QuantizedMoments | AdamMoments | None,
    after: AdamMoments | None,
    gradient: Tensor | None,
    theta: Tensor,
    *,
    scale: float,
    decay_last: bool,
) -> Split:
    """As :func:`~entropy_pl.updates.adamw.split_step`, for a step of bitsandbytes.

    Args:
        settings: of the parameter.
        before: moments before the step, of either width; None before the first step. Not looked at if there is
            ``after``.
        after: 32-bit moments after the step; None where they are not of 32 bits, or no step was taken.
        gradient: as the optimizer saw it, or None.
        theta: θ before the step.
        scale: lr_g/lr_ref.
        decay_last: as on CUDA: see the module.
    """
    if decay_last:
        beta1, beta2 = torch.tensor(settings.betas, dtype=torch.float32).tolist()
        settings = replace(settings, betas=(beta1, beta2))
    if gradient is not None and after is None:
        widened = None if before is None else before.values(theta.device)
        after = next_moments(settings, widened, gradient, theta)
    elif after is not None:  # paged ones lie elsewhere
        after = after.values(theta.device)
    parts, preconditioner = split_step(settings, after, gradient, theta, scale)
    if not decay_last:
        return parts, preconditioner
    left = 1 - settings.lr * settings.weight_decay
    momentum, gradient_part, weight_decay = parts
    return [left * momentum, left * gradient_part, weight_decay], left * preconditioner


def _configs(optimizer: Any) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Every parameter with its hyper-parameters, GlobalOptimManager's overrides among them."""
    for i, group in enumerate(optimizer.param_groups):
        for k, parameter in enumerate(group["params"]):
            yield parameter, optimizer.get_config(i, k, group)


def _decay_last(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda"


def _wide(state: Mapping[str, Any]) -> AdamMoments:
    """32-bit moments, which may lie on another device than the parameter (paged ones)."""
    return AdamMoments(float(state["step"]), state["state1"], state["state2"])


def _is_quantized(state: Mapping[str, Any]) -> bool:
    return state["state1"].dtype == torch.uint8


def _blockwise(state: Mapping[str, Any]) -> bool:
    return _is_quantized(state) and {"absmax1", "absmax2", "qmap1", "qmap2"} <= state.keys()


def _readable(state: Mapping[str, Any]) -> bool:
    """Codes are in memory's order, and the split in the parameter's: they must be one and the same."""
    if not _is_quantized(state):
        return True
    if not _blockwise(state) or not state["state1"].is_contiguous():
        return False
    return BlockQuantized(state["state1"], state["absmax1"], state["qmap1"]).block_size is not None
