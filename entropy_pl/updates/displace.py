"""Other values in a model's parameters for a while, the old ones put back to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from entropy_pl.updates.shared import aliased
from entropy_pl.updates.vector import UpdateVector


def parameters_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The model's parameters of these names.

    Raises:
        KeyError: if the model has no parameter of a name.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(names) - parameters.keys())
    if unknown:
        raise KeyError(
            f"expected names of the model's parameters, got {unknown[:3]} ({len(unknown)} unknown): take the update "
            "of this very model, by the names that its named_parameters() gives"
        )
    return {name: parameters[name] for name in names}


@contextmanager
def parameters_set_to(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold ``values`` in the named parameters; on leaving, even by an error, the very tensors of before are back.

    The parameters' storage is exchanged rather than written to, so nothing is rounded or copied on the way back.
    Parameters that share memory with a named one go with it (:mod:`~entropy_pl.updates.shared`).

    Args:
        model: any module.
        values: by parameter name.

    Raises:
        KeyError: if the model has no parameter of a name.
        ValueError: if a shape is not the parameter's.
    """
    parameters = parameters_named(model, values)
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            raise ValueError(f"expected {name} of shape {list(parameters[name].shape)}, got {list(value.shape)}")
    others = aliased(model, values)
    owned = {alias.owner: alias for alias in others.values()}
    parameters |= parameters_named(model, others)
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        try:
            for name, value in values.items():
                value = value.to(kept[name].device)
                parameters[name].data = owned[name].laid_out(value) if name in owned else value
            for name, alias in others.items():
                parameters[name].data = alias.of(parameters[alias.owner].data)
            yield
        finally:
            _put_back(parameters, kept)
    except BaseException:  # once more, for an interrupt in the midst of it
        _put_back(parameters, kept)
        raise


def _put_back(parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    for name, data in kept.items():
        parameters[name].data = data


@contextmanager
def displaced(model: nn.Module, update: UpdateVector, eta: float) -> Iterator[None]:
    """The model at θ+ηv, formed in float64 and rounded once to the parameter's dtype, float32 at the least.

    Args:
        model: the policy at θ.
        update: v.
        eta: η.

    Raises:
        KeyError: if the model has no parameter of a name in v.
        ValueError: if v has another shape than a parameter of its name.
    """
    values = {
        name: _moved(name, parameter.data, update.direction[name], eta)
        for name, parameter in parameters_named(model, update.direction).items()
    }
    with parameters_set_to(model, values):
        yield


def _moved(name: str, theta: Tensor, direction: Tensor, eta: float) -> Tensor:
    """One parameter's θ+ηv; nothing in float64 outlives it."""
    if direction.shape != theta.shape:
        raise ValueError(
            f"expected v of {name} of shape {list(theta.shape)}, got {list(direction.shape)}: take the update of this "
            "very model"
        )
    moved = theta.double() + eta * direction.to(theta.device, torch.float64)
    return moved.to(torch.promote_types(theta.dtype, torch.float32))
