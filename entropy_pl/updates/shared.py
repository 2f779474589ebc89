"""Parameters that share memory: of two that are one and the same numbers, one stands for both.

Tied weights are one parameter of two names, which PyTorch itself lists once. Two parameter objects over the same memory
it lists twice: LoRA on tied embeddings (``ensure_weight_tying`` of PEFT), a matrix and its transpose, views of a flat
buffer that is a parameter too. Views of a buffer that have no number in common share nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Alias:
    """A parameter whose numbers are all among those of another one, its owner.

    Args:
        owner: name of the other parameter.
        owner_layout: its sizes and strides.
        layout: sizes and strides of this one.
        offset: of this one's first number from the owner's, in numbers.
    """

    owner: str
    owner_layout: tuple[tuple[int, ...], tuple[int, ...]]
    layout: tuple[tuple[int, ...], tuple[int, ...]]
    offset: int

    def laid_out(self, value: Tensor) -> Tensor:
        """A tensor of the owner's shape with the owner's strides; the one given if it has them."""
        size, stride = self.owner_layout
        if value.stride() == stride:
            return value
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device).copy_(value)

    def of(self, value: Tensor) -> Tensor:
        """What this parameter is where the owner is ``value``: a view of it, if it is laid out as the owner is."""
        value = self.laid_out(value)
        return value.as_strided(*self.layout, value.storage_offset() + self.offset)

    def onto_owner(self, value: Tensor) -> Tensor:
        """A tensor of this parameter's shape by the owner's numbers, with zeros where it has none."""
        size, stride = self.owner_layout
        total = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device).zero_()
        total.as_strided(*self.layout, self.offset).copy_(value)
        return total


def aliases_of(parameters: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Alias]:
    """Those of the parameters whose memory is that of a parameter named, by their names.

    Args:
        parameters: parameter name → parameter.
        names: of those that may be owners. Of two of them that are the same memory the first owns it, unless the other
            is the larger one; two that overlap in part are two.

    Returns:
        Parameter name → its owner and its place in it. An owner is not among them.
    """
    order = {name: i for i, name in enumerate(names)}
    by_storage: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, parameter in parameters.items():
        storage = _storage(parameter)
        if storage:
            by_storage.setdefault((storage, parameter.dtype), []).append(name)
    found: dict[str, Alias] = {}
    for sharing in by_storage.values():
        owners = sorted((n for n in sharing if n in order), key=lambda n: (-parameters[n].numel(), order[n]))
        for owner in owners:
            for name in sharing:
                if owner not in found and name not in found and name != owner:
                    alias = _alias(owner, parameters[owner], parameters[name])
                    if alias is not None:
                        found[name] = alias
    return found


def aliased(model: nn.Module, names: Iterable[str]) -> dict[str, Alias]:
    """The model's parameters that are not named and share their memory with one that is."""
    named = dict.fromkeys(names)
    found = aliases_of(dict(model.named_parameters()), named)
    return {name: alias for name, alias in found.items() if name not in named}


def _storage(parameter: Tensor) -> int:
    """Address of its memory; 0 where there is none to be shared."""
    if nn.parameter.is_lazy(parameter) or parameter.layout is not torch.strided or not parameter.numel():
        return 0
    try:
        return parameter.untyped_storage().data_ptr()
    except RuntimeError:  # a tensor that is made of others, as some quantized weights are
        return 0


def _alias(owner_name: str, owner: Tensor, other: Tensor) -> Alias | None:
    if other.numel() > owner.numel():
        return None
    offset = int(other.storage_offset()) - int(owner.storage_offset())
    if offset < 0 or offset + _extent(other) > _extent(owner):
        return None
    layouts = tuple(owner.shape), owner.stride(), tuple(other.shape), other.stride()
    if not _is_dense(owner):  # between its numbers may lie those of others
        taken = torch.zeros(_extent(owner), dtype=torch.bool)
        taken.as_strided(*layouts[:2]).fill_(True)
        if not taken.as_strided(*layouts[2:], offset).all():
            return None
    return Alias(owner_name, layouts[:2], layouts[2:], offset)


def _extent(tensor: Tensor) -> int:
    """From its first number to its last one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor: Tensor) -> bool:
    return _extent(tensor) == tensor.numel()
