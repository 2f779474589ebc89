"""Forward-mode derivatives by PyTorch's dual numbers themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from entropy_pl.updates.displace import parameters_named
from entropy_pl.updates.shared import aliased


def derivatives(
    model: nn.Module, along: Mapping[str, Tensor], function: Callable[[], tuple[Tensor, ...]]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Values of a function of the model's parameters and their derivatives along a direction, in one pass.

    ``torch.func`` gives the same where no module is found by two names and none changes its parameters in a forward
    pass. PEFT does both: trained tokens that are tied to the head (``functional_call`` leaves its own tensor behind in
    the place of such a parameter), and adapters of parameters that are no layer's.

    Args:
        model: whose parameters are moved.
        along: the direction, by parameter name.
        function: calls the model, in whatever way.

    Returns:
        Values, and derivatives of their shapes; zero for a value that does not depend on the parameters.

    Raises:
        KeyError: if the model has no parameter of a name.
        NotImplementedError: for an operation without forward-mode derivative.
    """
    parameters = parameters_named(model, along)
    others = aliased(model, along)  # parameters that share memory with one that moves, and so move with it
    with forward_ad.dual_level():
        moved = {
            name: forward_ad.make_dual(parameter.detach(), along[name].to(parameter.detach()))
            for name, parameter in parameters.items()
        }
        moved |= {name: alias.of(moved[alias.owner]) for name, alias in others.items()}
        duals = {id(parameter): moved[name] for name, parameter in parameters_named(model, moved).items()}
        with _in_place_of_parameters(model, duals):
            parts = [forward_ad.unpack_dual(value) for value in function()]
    values = tuple(part.primal for part in parts)
    return values, tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts)


@contextmanager
def _in_place_of_parameters(model: nn.Module, others: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors wherever the model has these parameters, by identity."""
    kept: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    for module in model.modules():
        slots: dict[str, Any] = module._parameters
        kept += [(slots, name, p) for name, p in slots.items() if id(p) in others]
    try:
        for slots, name, parameter in kept:
            slots[name] = others[id(parameter)]
        yield
    finally:
        for slots, name, parameter in kept:
            slots[name] = parameter
