"""The form of a saved optimizer's state, checked before anything is made of it: a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_NUMBERS = ("lr", "eps", "weight_decay", "initial_lr")


def check_form(saved: Mapping[str, Any]) -> None:
    """Refuse what has not the form of a torch optimizer's ``state_dict()``.

    Args:
        saved: with the keys ``state`` and ``param_groups``.

    Raises:
        ValueError: naming the place in it, what was expected and what came.
    """
    groups, states = saved["param_groups"], saved["state"]
    _expect(isinstance(groups, list), "param_groups", "a list", groups)
    for number, group in enumerate(groups):
        place = f"param_groups[{number}]"
        _expect(isinstance(group, Mapping) and all(isinstance(key, str) for key in group), place, "a dict", group)
        keys, names = group.get("params"), group.get("param_names")
        numbered = isinstance(keys, list) and all(isinstance(key, int | str) for key in keys)
        _expect(numbered, f"{place}['params']", "a list of numbers, or of names", keys)
        named = names is None or (
            isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) in (0, len(keys))
        )
        _expect(named, f"{place}['param_names']", f"{len(keys)} names", names)
    _expect(isinstance(states, Mapping), "state", "a dict", states)
    for key, state in states.items():
        place = f"state[{key!r}]"
        _expect(isinstance(state, Mapping) and all(isinstance(name, str) for name in state), place, "a dict", state)
        for name in set(_MOMENTS) & state.keys():
            _expect(_is_dense(state[name]), f"{place}[{name!r}]", "a tensor of floats", state[name])
        if _MOMENTS[0] in state and "step" in state:
            _expect(_is_number(state["step"]), f"{place}['step']", "a number", state["step"])


def check_numbers(group: Mapping[str, Any], number: int) -> None:
    """Refuse a group of Adam's whose hyper-parameters are no numbers.

    Args:
        group: with ``betas``, ``lr`` and so on.
        number: of the group, for the message.

    Raises:
        ValueError: as :func:`check_form`.
    """
    place, betas = f"param_groups[{number}]", group["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(map(_is_number, betas))
    _expect(pair, f"{place}['betas']", "two numbers", betas)
    for name in _NUMBERS:
        if name != "initial_lr" or group.get(name) is not None:
            _expect(_is_number(group[name]), f"{place}[{name!r}]", "a number", group[name])


def _is_dense(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.device.type != "meta"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and _is_dense(value.float() if not value.is_complex() else value)
    try:
        return isinstance(value, int | float) and float(value) is not None
    except OverflowError:
        return False


def _expect(holds: bool, place: str, expected: str, value: Any) -> None:
    if not holds:
        got = repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
        raise ValueError(
            f"expected {expected} in {place} of the optimizer's state, got {got[:80]}: take the file as torch.save "
            "of optimizer.state_dict() left it"
        )
