"""Anything with ``step()``: watched before and after each step it really takes, whatever wraps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, Protocol

import torch

# Libraries whose wrappers move nothing themselves: their step() calls, or does not call, the one of what they wrap.
DELEGATING = ("accelerate", "lightning", "pytorch_lightning")


class Stepping(Protocol):
    """What is asked of an optimizer, torch's or not."""

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """Groups as torch has them: ``params``, and ``lr`` where it is not 1."""

    @property
    def step(self) -> Callable[..., Any]:
        """Moves the parameters once."""


class StepWatch:
    """The handle that :func:`watch_steps` returns."""

    def __init__(self, before: Callable[[], object], after: Callable[[], object]) -> None:
        self._before, self._after = before, after
        self._depth = 0  # a step() that calls its parent class's step() is one step, though torch runs hooks for both
        self._undo: list[Callable[[], object]] = []

    @property
    def under_way(self) -> bool:
        """Whether a step has begun and not ended: a closure is being called, say."""
        return self._depth > 0

    def reset(self) -> None:
        """Between steps: forget one that raised, of which a torch optimizer does not tell."""
        self._depth = 0

    def remove(self) -> None:
        """Stop watching and leave the optimizer as it was; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    @torch.compiler.disable  # a compiled optimizer step would take the watch for its own code
    def _enter(self, *_: object) -> None:
        if not self._depth:
            self._before()
        self._depth += 1

    @torch.compiler.disable
    def _leave(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._after()

    def _hook(self, optimizer: torch.optim.Optimizer) -> None:
        self._undo.append(optimizer.register_step_pre_hook(self._enter).remove)
        self._undo.append(optimizer.register_step_post_hook(self._leave).remove)

    def _wrap(self, optimizer: Any) -> None:
        step = optimizer.step
        own = vars(optimizer).get("step")

        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self._undo:  # removed, but somebody has wrapped this wrapper meanwhile
                return step(*args, **kwargs)
            self._enter()
            try:
                result = step(*args, **kwargs)
            except BaseException:
                self._depth -= 1
                raise
            self._leave()
            return result

        def put_back() -> None:
            if vars(optimizer).get("step") is not watched:
                return
            if own is None:
                del optimizer.step
            else:
                optimizer.step = own

        optimizer.step = watched
        self._undo.append(put_back)


def watch_steps(optimizer: object, before: Callable[[], object], after: Callable[[], object]) -> StepWatch:
    """Call ``before()`` right before and ``after()`` right after each step the optimizer executes.

    A step that a wrapper or a gradient scaler leaves out calls neither; nor is ``after()`` called for a step that
    raised (of a torch optimizer, reset the watch then). One that a fused kernel suppresses by itself calls both: ask
    :func:`was_skipped` in ``after()``. Under automatic optimization in Lightning the closure runs between the two.

    Torch's optimizers are watched by their hooks. Wrappers of accelerate and Lightning are watched in what they wrap;
    any other object at its own ``step``, which may do more than that of an optimizer inside it: its instance gets
    another attribute ``step`` for the time.

    Args:
        optimizer: anything with ``step()`` and ``param_groups``.
        before: called without arguments.
        after: likewise; parameters, gradients, state and learning rate are those of the step.

    Returns:
        The handle to stop watching by.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
    """
    _check(optimizer)
    while is_of(optimizer, DELEGATING) and _is_optimizer(getattr(optimizer, "optimizer", None)):
        optimizer = getattr(optimizer, "optimizer", None)
    watch = StepWatch(before, after)
    if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks"):
        watch._hook(optimizer)
    else:
        watch._wrap(optimizer)
    return watch


def inner_optimizer(optimizer: object) -> Stepping:
    """The optimizer inside wrappers that keep it in ``.optimizer``: it has the state. Without wrapper, itself.

    Args:
        optimizer: any wrapper, or none.

    Returns:
        The innermost object with ``step()`` and ``param_groups``.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
    """
    _check(optimizer)
    inner: Any = optimizer
    while _is_optimizer(getattr(inner, "optimizer", None)) and inner.optimizer is not inner:
        inner = inner.optimizer
    return inner


def holders(optimizer: object) -> list[Stepping]:
    """The optimizers that hold parameters and state: the inner one, or those that a stand-in keeps for its parameters.

    Layer-wise optimizers of Transformers (``optim="galore_adamw_layerwise"``) step in the backward pass, one for each
    parameter, and the run has one in their place that does nothing and keeps them in ``optimizer_dict``.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
    """
    inner = inner_optimizer(optimizer)
    kept = getattr(inner, "optimizer_dict", None)
    several = [one for one in kept.values() if _is_optimizer(one)] if isinstance(kept, Mapping) else []
    return several or [inner]


def parameters_of(optimizer: Stepping) -> Iterator[Any]:
    """All that it holds, group by group."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def stepper_name(optimizer: object) -> str:
    """What it is called, without wrappers."""
    return type(inner_optimizer(optimizer)).__name__


def was_skipped(optimizer: object) -> bool:
    """Whether a fused step found gradients that are not finite and suppressed itself; to be asked in its ``after()``.

    A fused optimizer under a ``torch.amp.GradScaler`` is always called, hooks and all: ``found_inf`` is a tensor on it
    for the time of the call, and its kernel moves nothing where that is not zero (torch/amp/grad_scaler.py). A step
    that is done leaves the gradients unscaled in place.

    Args:
        optimizer: the one that was called.

    Returns:
        False for every optimizer that is not fused, or without a gradient scaler.
    """
    found_inf = getattr(inner_optimizer(optimizer), "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _check(optimizer: object) -> None:
    lacking = [
        what
        for what, there in (
            ("step()", callable(getattr(optimizer, "step", None))),
            ("param_groups", hasattr(optimizer, "param_groups")),
        )
        if not there
    ]
    if lacking:
        raise TypeError(
            f"expected an optimizer with step() and param_groups, got {type(optimizer).__name__} without "
            f"{' and '.join(lacking)}: pass the optimizer itself, or give its class what is missing"
        )


def _is_optimizer(candidate: object) -> bool:
    return callable(getattr(candidate, "step", None)) and hasattr(candidate, "param_groups")


def is_of(thing: object, libraries: Sequence[str]) -> bool:
    """Whether its class or a parent of it comes from one of these packages; none of them is imported."""
    return any(kind.__module__.partition(".")[0] in libraries for kind in type(thing).__mro__)
