"""The update read off the real optimizer: θ before, θ after, and the learning rate that lay between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.updates.change import Change, Splits, Stepped, kept_update, lazy_update, split_in_turn
from entropy_pl.updates.displace import parameters_set_to
from entropy_pl.updates.shared import Alias, aliases_of
from entropy_pl.updates.split import NextSplitter, Split, check_gradient, update_of
from entropy_pl.updates.steps import Stepping, holders, stepper_name, was_skipped, watch_steps
from entropy_pl.updates.vector import UpdateVector
from entropy_pl.updates.watched import TakenStep, Watched

# Owner of memory → what was stepped on it, one after another: parameter, its splitter, its unit and its place.
_InTurn = Mapping[str, Sequence[tuple[str, Any, float, Alias | None]]]


class UpdateRecorder:
    """Reads one optimizer step as an :class:`UpdateVector`, whatever optimizer, clipping or schedule made it.

    Call :meth:`snapshot` before the step and :meth:`read` after it, before gradients are cleared and before a
    scheduler moves the learning rate; :func:`record_update` does both. Then :meth:`step_with` tells the step that
    another gradient would have made.

    Of several optimizers the step is what all of them did between the two; call :meth:`took_step` right after each.

    Parameters that share memory (:mod:`~entropy_pl.updates.shared`) are one parameter of the update, by the name of the
    first: their memory is in v, its norms and its components once. If each of them is stepped, as parameters of their
    own with gradients of their own, the memory moves by the sum of the steps, and so do its components.

    Args:
        model: whose parameters are watched, under their ``named_parameters`` names.
        optimizer: anything with ``step()`` and ``param_groups``, a wrapper with such a thing in its ``.optimizer``, or
            several of them. Watched are its parameters that belong to the model and require a gradient.
        watches: which of them instead of those that require a gradient now.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
        ValueError: if an optimizer holds no trainable parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Stepping | Sequence[Stepping],
        watches: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
    ) -> None:
        self._model = model
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        trainable = {n: p for n, p in model.named_parameters() if watches(p)}
        name_of = {id(p): n for n, p in trainable.items()}
        self._watched: list[Watched] = []
        for one in given:
            watched = [Watched.of(inner, name_of) for inner in holders(one)]
            self._watched += [inner for inner in watched if inner.names]
            if not any(inner.names for inner in watched):
                raise ValueError(
                    f"expected {stepper_name(one)} to hold trainable parameters of {type(model).__name__}, "
                    "got none: pass the parameters with requires_grad=True to the optimizer, of this very model object"
                )
        names = {name for inner in self._watched for name in inner.names.values()}
        held = {n: p for n, p in trainable.items() if n in names}
        self._aliases = aliases_of(held, held)
        self._parameters = {n: p for n, p in held.items() if n not in self._aliases}
        self._steps: dict[int, TakenStep] = {}
        self._before: dict[str, Tensor] | None = None
        self._all_moments = False
        self._no_split: str | None = None
        self._next: _InTurn = {}
        self._update: UpdateVector | None = None

    @property
    def update(self) -> UpdateVector:
        """The update read last.

        Raises:
            RuntimeError: before :meth:`read`.
        """
        if self._update is None:
            raise RuntimeError("no step has been read yet: call snapshot() before optimizer.step() and read() after")
        return self._update

    def snapshot(self, moments: bool = False) -> None:
        """Keep a copy of θ, and what is needed to split the step: 8-bit moments, and who had a momentum buffer.

        Args:
            moments: keep copies of all moments of the parameters watched, for :meth:`step_with`. An optimizer whose
                step cannot be split has none to keep.
        """
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for watched in self._watched:
            watched.keep(moments)
        self._all_moments = moments
        self._steps = {}
        self._next = {}
        self._update = None

    def bytes(self) -> int:
        """Bytes of the snapshot: θ and the moments kept, in their own dtypes. 0 without a snapshot."""
        theta = sum(value.nbytes for value in (self._before or {}).values())
        return theta + sum(kept.bytes() for watched in self._watched for kept in watched.moments.values())

    def moved(self) -> bool:
        """Whether a parameter differs from the snapshot.

        Raises:
            RuntimeError: without a snapshot.
        """
        before = self._snapshot()
        return any(not torch.equal(parameter.detach(), before[n]) for n, parameter in self._parameters.items())

    def took_step(self, optimizer: Stepping) -> None:
        """One of several optimizers has just stepped: note its learning rate, state and gradients.

        Those that were not noted are taken as they are at :meth:`read`.

        Args:
            optimizer: one of those given, as it was given.
        """
        inner = {id(one) for one in holders(optimizer)}
        for watched in self._watched:
            if id(watched.optimizer) in inner:
                self._steps.pop(id(watched), None)
                self._steps[id(watched)] = self._taken(watched)

    def read(self, *, no_split: str | None = None) -> UpdateVector:
        """Return Δθ/lr_ref in float64, and the components where the optimizer is of Adam's family or torch's SGD.

        All of it is held, 40 bytes a number with components.

        Components are there only where they add up to the step, but for rounding
        (:mod:`~entropy_pl.updates.check`): a step that is not that of the optimizer's base class, or that a wrapper
        changed, has none, and ``split_absent`` says by how much they miss it.

        No movement (a skipped step, a learning rate of zero) gives a direction of zeros. An optimizer without a
        learning rate (Adafactor's own schedule) counts as one of rate 1.

        Args:
            no_split: why the step is not to be split, where the caller knows.

        Raises:
            RuntimeError: without a snapshot.
            ValueError: if parameters moved at a learning rate of zero.
        """
        return self._read(kept_update, no_split)

    def read_lazily(self, *, no_split: str | None = None) -> UpdateVector:
        """Return the update of :meth:`read` without holding any of it.

        Direction, components and preconditioner compute a parameter's tensor anew at every access from the snapshot,
        the parameters' storage and the optimizer's state. Such a vector is good until the optimizer steps again or
        zeroes its gradients in place; that the parameters hold other values for a while (:meth:`at_theta_before`,
        :func:`~entropy_pl.updates.displace.displaced`) does not disturb it. It keeps the snapshot alive, :meth:`forget`
        or not.

        Args:
            no_split: why the step is not to be split, where the caller knows.

        Raises:
            RuntimeError: without a snapshot; from the vector, where it notices that the parameters were written to.
            ValueError: if parameters moved at a learning rate of zero.
        """
        return self._read(lazy_update, no_split)

    def _read(self, make: Callable[..., UpdateVector], no_split: str | None) -> UpdateVector:
        before = self._snapshot()
        after = {name: parameter.detach() for name, parameter in self._parameters.items()}
        # Those noted come first, in the order in which they stepped.
        order = sorted(self._watched, key=lambda watched: [*self._steps, id(watched)].index(id(watched)))
        steps = [self._steps.get(id(watched)) or self._taken(watched) for watched in order]
        lr = max(step.lr for step in steps)
        moved = self.moved()
        if moved and lr <= 0:
            raise ValueError(f"expected a learning rate > 0 behind a step that moved the parameters, got {lr}")
        change = Change(before, after, {n: tensor._version for n, tensor in after.items()}, lr if moved else None)
        self._no_split = no_split or next((step.absent for step in steps if step.absent), None)
        absent = self._no_split if moved else "the step moved no parameter"
        splits = None
        if not absent:
            stepped = self._in_turn([(step.splits, step.unit / lr) for step in steps])
            in_turn = {owner: [Stepped(*rest) for _, *rest in steps_on] for owner, steps_on in stepped.items()}
            splits = Splits(before, in_turn, lr, " and ".join(stepper_name(w.optimizer) for w in order))
        self._update = make(change, splits, lr, absent)
        if moved:
            self._no_split = self._update.split_absent
        if self._all_moments and lr > 0 and not self._no_split:
            self._next = self._in_turn([(step.next_splits, step.unit / lr) for step in steps])
        return self._update

    @torch.no_grad()
    def step_with(self, gradients: Mapping[str, Tensor | None], *, momentum: bool = True) -> UpdateVector:
        """The update that the optimizer would have made with other gradients, from θ and the moments of before.

        At the hyper-parameters and learning rates of the step read last, in float64; optimizer and model are not
        touched. After :meth:`read`, until the next :meth:`snapshot` or :meth:`forget`; also of a step that was left
        out, as a gradient scaler does. The gradients of the step itself give back the update recorded, but for the
        rounding of θ.

        Args:
            gradients: parameter name → g of θ's shape, as the optimizer would see it: summed, unscaled, clipped
                (:func:`~entropy_pl.updates.clipping.clip_gradients`). A parameter that is not among them, or with None,
                has no gradient and does not move.
            momentum: False for the same step without memory of direction: β₁ = 0 (the second moment and its bias
                correction stay as they are), of SGD a momentum of 0.

        Returns:
            With components and preconditioner, held, on the devices of θ; ``direction`` is the sum of ``components``.

        Raises:
            RuntimeError: before :meth:`read`, or without ``snapshot(moments=True)``.
            ValueError: if the optimizer's step cannot be split, its learning rate was zero, a name is not that of a
                parameter watched, or a gradient is of another shape or not finite.
        """
        before, lr = self._snapshot(), self.update.lr
        if self._no_split:
            raise ValueError(f"expected an optimizer whose step can be taken apart, got another: {self._no_split}")
        if not self._all_moments:
            raise RuntimeError("the moments of before the step were not kept: call snapshot(moments=True)")
        if lr <= 0:
            raise ValueError(f"expected a step at a learning rate > 0, got {lr}: there is no step per unit of it")
        unknown = sorted(gradients.keys() - before.keys() - self._aliases.keys())
        if unknown:
            raise ValueError(
                f"expected gradients of parameters that the optimizer trains, got {unknown[:3]} ({len(unknown)} "
                "unknown): name them as model.named_parameters() does, and leave frozen ones out"
            )
        splits, thetas = {}, self._thetas()
        for owner, theta in before.items():
            in_turn = []
            for name, split, factor, alias in self._next[owner]:
                gradient = gradients.get(name)
                if gradient is not None:
                    check_gradient(name, gradient, thetas[name])
                    gradient = gradient.to(theta.device, torch.float64)
                in_turn.append(Stepped(partial(_with_gradient, split, gradient, momentum), factor, alias))
            splits[owner] = split_in_turn(in_turn, theta, lr)
        return update_of(splits, lr)

    @property
    def theta_before(self) -> Mapping[str, Tensor]:
        """θ of before the step, by parameter name, in the parameters' own dtype.

        Raises:
            RuntimeError: without a snapshot.
        """
        return self._snapshot()

    @property
    def names(self) -> set[str]:
        """The parameters watched, those that share another one's memory among them."""
        return {*self._parameters, *self._aliases}

    def at_theta_before(self) -> AbstractContextManager[None]:
        """The model as it was before the step, for as long as the context lasts."""
        return parameters_set_to(self._model, self._snapshot())

    def forget(self) -> None:
        """Free the snapshot."""
        self._before = None
        for watched in self._watched:
            watched.moments = {}
        self._steps = {}
        self._next = {}

    def _snapshot(self) -> dict[str, Tensor]:
        if self._before is None:
            raise RuntimeError("no snapshot of the parameters: call snapshot() before optimizer.step()")
        return self._before

    def _thetas(self) -> dict[str, Tensor]:
        """θ of before the step, of parameters that share another one's memory too."""
        before = self._snapshot()
        return before | {name: alias.of(before[alias.owner]) for name, alias in self._aliases.items()}

    def _taken(self, watched: Watched) -> TakenStep:
        return watched.taken(self._thetas(), self._all_moments)

    def _in_turn(self, steps: Sequence[tuple[Mapping[str, Any], float]]) -> _InTurn:
        """Splitters of several optimizers, each with its unit, by owner of memory."""
        found: dict[str, list[tuple[str, Any, float, Alias | None]]] = {}
        for splits, factor in steps:
            for name, split in splits.items():
                alias = self._aliases.get(name)
                found.setdefault(name if alias is None else alias.owner, []).append((name, split, factor, alias))
        return found


def _with_gradient(split: NextSplitter, gradient: Tensor | None, momentum: bool, theta: Tensor) -> Split:
    return split(gradient, theta, momentum=momentum)


@contextmanager
def record_update(
    model: nn.Module, optimizer: Stepping | Sequence[Stepping], *, moments: bool = False
) -> Iterator[UpdateRecorder]:
    """Record the optimizer step taken inside the block.

    The step is read the moment it ends, so that a scheduler or ``zero_grad`` in the same block does no harm. A block
    in which no step happened (a skipped one) records no movement. Of several optimizers the step is that of all of
    them, one after another, and is read when each has stepped.

    Args:
        model: the policy.
        optimizer: whose ``step()`` is called in the block, torch's or not; a wrapper of it serves as well
            (:func:`~entropy_pl.updates.steps.watch_steps`); or several.
        moments: keep the moments of before the step too, for :meth:`UpdateRecorder.step_with`.

    Yields:
        The recorder, whose ``update`` is there when the block has ended.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
        ValueError: if an optimizer holds no trainable parameter of the model.
        RuntimeError: if it stepped more than once, or if only some of several did.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> with record_update(model, optimizer) as recorder:
        ...     optimizer.step()
        >>> recorder.update.lr, recorder.update.direction["bias"].round(decimals=5)
        (0.1, tensor([-1.], dtype=torch.float64))
    """
    several = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    recorder = UpdateRecorder(model, several)
    recorder.snapshot(moments)
    taken: list[int] = []

    def after_step(which: int) -> None:
        if was_skipped(several[which]):
            return
        if which in taken:
            raise RuntimeError("expected one optimizer.step() inside record_update, got a second: record each apart")
        taken.append(which)
        recorder.took_step(several[which])
        if len(taken) == len(several):
            recorder.read()

    watches = [watch_steps(one, before=lambda: None, after=partial(after_step, i)) for i, one in enumerate(several)]
    try:
        yield recorder
    finally:
        for watch in watches:
            watch.remove()
    if taken and len(taken) < len(several):
        idle = " and ".join(stepper_name(one) for i, one in enumerate(several) if i not in taken)
        raise RuntimeError(f"expected every optimizer to step inside record_update, got none of {idle}: leave it out")
    if not taken:
        recorder.read()
