"""A saved Adam state laid beside the model it belongs to: whose moments are whose."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from entropy_pl.updates.adamw import AdamMoments, AdamSettings
from entropy_pl.updates.names import unwrapped
from entropy_pl.updates.saved_form import check_form, check_numbers

# Transformers' and PEFT's outer models, which some savers leave out of a name.
OUTER_MODELS = frozenset(("model", "base_model"))
# By a key of its state: optimizers that are not Adam, and what to say of them.
FOREIGN = {
    "momentum_buffer": "SGD's or Muon's",
    "state1": "bitsandbytes', whose moments are quantized",
    "qmap1": "bitsandbytes', whose moments are quantized",
    "exp_inf": "Adamax's",
    "mu_product": "NAdam's",
    "exp_avg_sq_row": "Adafactor's",
    "square_avg": "RMSprop's or Adadelta's",
    "sum": "Adagrad's",
}


@dataclass(frozen=True, eq=False)
class MatchedGroup:
    """One parameter group: its hyper-parameters, and by parameter name the moments, None before a first gradient."""

    settings: AdamSettings
    moments: dict[str, AdamMoments | None]


@dataclass(frozen=True, eq=False)
class MatchedState:
    """An Adam state by the model's parameter names; groups without a parameter of the model are left out.

    Args:
        groups: in the file's order; together they hold every parameter once.
        matched_by: the rule that told whose entry is whose.
    """

    groups: tuple[MatchedGroup, ...]
    matched_by: Literal["name", "position", "shape"]

    def names(self) -> set[str]:
        """Of all parameters."""
        return {name for group in self.groups for name in group.moments}


@dataclass(frozen=True, eq=False)
class _Entry:
    """One parameter as the file has it."""

    group: int
    name: str | None
    state: Mapping[str, Any]  # empty where it never had a gradient
    shape: torch.Size | None  # None without state


def match_optimizer_state(
    saved: Mapping[str, Any], parameters: Mapping[str, Tensor], *, decoupled: bool | None = None
) -> MatchedState:
    """Find for every parameter its entry in a saved optimizer state.

    1. By name, where the file has names: ``param_names`` in its groups (torch ≥ 2.6, optimizers made of
       ``named_parameters()``), or a full FSDP/DCP state, keyed by name. Names may differ by what wrappers put in
       (:func:`~entropy_pl.updates.names.unwrapped`) and by one leading path. Names decide: where they disagree, no
       other rule is tried.
    2. By position, where all is in one group: as many entries as parameters, every known shape that of the parameter
       at its place. Entries of one shape that were given to the optimizer in another order cannot be told from this.
    3. By shape: a shape tells the group, and the k-th entry of a shape there is the k-th parameter of that shape. This
       is what decay and no-decay groups (Hugging Face's Trainer) need. A shape must not lie in two groups, whatever
       their hyper-parameters: layer-wise learning rates may have been given from the first layer up or from the last
       one down.

    Parameters that never had a gradient have no moments, hence no known shape. They are taken if they are all in one
    group, where the shapes that are left are theirs: by their positions there, or all of one shape. Where nothing has
    moments, groups of the same hyper-parameters are as good as one. If there are more entries than parameters, those
    without moments are frozen parameters that the optimizer was given too, and are left out.

    Args:
        saved: ``state_dict()`` of Adam or AdamW. No moments at all (no step taken yet) is Adam's start, t = 0.
        parameters: the model's trainable parameters by name, in the order of ``named_parameters()``.
        decoupled: whether decay is decoupled, AdamW's True or Adam's False. None: as the groups say, AdamW's where they
            do not (torch < 2.7).

    Raises:
        ValueError: if there is no such state, it is not Adam's, it does not match or could match in several ways, a
            group contradicts ``decoupled``, or a moment is not finite.
    """
    groups, entries = _read(saved)
    for entry in entries:
        _check_adam(entry.state, groups[entry.group])
    for number, group in enumerate(groups):
        check_numbers(group, number)
    settings = [AdamSettings.of(group, decoupled=decoupled is not False) for group in groups]
    _check_decay(settings, decoupled)
    matched_by: Literal["name", "position", "shape"]
    if entries and all(entry.name is not None for entry in entries):
        matched_by, found = "name", _by_name(entries, parameters)
    else:
        with_state = [entry for entry in entries if entry.state]
        trained = entries if len(entries) <= len(parameters) else with_state
        matched_by, found = "position", _by_position(trained, parameters, settings)
        if found is None:
            matched_by, found = "shape", _by_shape(trained, parameters)
    if found is None:
        _mismatch(entries, parameters)
    held: list[dict[str, AdamMoments | None]] = [{} for _ in groups]
    for name, entry in found.items():
        held[entry.group][name] = _moments(name, entry, parameters[name], settings[entry.group])
    return MatchedState(
        tuple(MatchedGroup(group, moments) for group, moments in zip(settings, held, strict=True) if moments),
        matched_by,
    )


def _read(saved: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[_Entry]]:
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        got = f"the keys {_first(saved, 6)}" if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(
            f"expected an optimizer's state_dict with the keys 'state' and 'param_groups', got {got}: pass "
            "that part of the checkpoint (Lightning: checkpoint['optimizer_states'][0]; Hugging Face's Trainer: "
            "optimizer.pt), of a sharded optimizer the gathered full state"
        )
    check_form(saved)
    entries = []
    for number, group in enumerate(saved["param_groups"]):
        keys = group["params"]
        names = group.get("param_names") or [key if isinstance(key, str) else None for key in keys]
        for key, name in zip(keys, names, strict=True):
            state = saved["state"].get(key) or {}
            shape = state["exp_avg"].shape if "exp_avg" in state else None
            entries.append(_Entry(number, name, state, shape))
    return list(saved["param_groups"]), entries


def _check_adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    needed = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group.get("amsgrad") else set())
    if state and not needed <= state.keys():
        whose = next((f" ({whose})" for key, whose in FOREIGN.items() if key in state), "")
        got = f"entries with {sorted(state)}{whose}"
    # RAdam's and NAdam's entries look like Adam's; their groups have no amsgrad, Adam's and AdamW's always do.
    elif missing := {"lr", "betas", "eps", "weight_decay", "amsgrad"} - group.keys():
        got, needed = f"a group without {sorted(missing)}", {"lr", "betas", "eps", "weight_decay", "amsgrad"}
    else:
        return
    raise ValueError(
        f"expected the state of torch's Adam or AdamW, with {sorted(needed)}, got {got}: the step of another optimizer "
        "is not rebuilt from its state; record it in training (record_update, EntropyProbeCallback)"
    )


def _check_decay(settings: Sequence[AdamSettings], decoupled: bool | None) -> None:
    if decoupled is not None and any(group.decoupled_weight_decay != decoupled for group in settings):
        raise ValueError(
            f"expected the weight decay of the file's groups, decoupled_weight_decay={not decoupled}, got "
            f"decoupled={decoupled}: leave it out (None), it is for files that do not say"
        )


def _by_name(entries: Sequence[_Entry], parameters: Mapping[str, Tensor]) -> dict[str, _Entry] | None:
    for form in (str, _bare):
        ours = {form(name): name for name in parameters}
        theirs = {form(str(entry.name)): entry for entry in entries}
        if len(ours) < len(parameters) or len(theirs) < len(entries):
            continue  # not one-to-one
        for added, dropped in _leading_paths(next(iter(ours), ""), theirs):
            keys = {name: added + ours_name.removeprefix(dropped) for ours_name, name in ours.items()}
            left = theirs.keys() - keys.values()
            if (
                all(name.startswith(dropped) for name in ours)
                and theirs.keys() >= set(keys.values())
                and not any(theirs[key].state for key in left)
            ):
                return {name: theirs[key] for name, key in keys.items()}
    return None


def _bare(name: str) -> str:
    return unwrapped(name, also=OUTER_MODELS)


def _leading_paths(name: str, others: Iterable[str]) -> Iterable[tuple[str, str]]:
    """What may stand before every name there, and before every name here: (added, dropped), one of them empty."""
    yield "", ""
    for other in others:
        if other.endswith("." + name):
            yield other.removesuffix(name), ""
        elif name.endswith("." + other):
            yield "", name.removesuffix(other)


def _by_position(
    entries: Sequence[_Entry], parameters: Mapping[str, Tensor], settings: Sequence[AdamSettings]
) -> dict[str, _Entry] | None:
    # Groups come in any order. Nothing hangs on it where there are no moments and the hyper-parameters are the same.
    fresh = not any(entry.state for entry in entries)
    if len({settings[entry.group] if fresh else entry.group for entry in entries}) > 1:
        return None
    return _in_place(entries, parameters)


def _by_shape(entries: Sequence[_Entry], parameters: Mapping[str, Tensor]) -> dict[str, _Entry] | None:
    wanted = Counter(parameter.shape for parameter in parameters.values())
    known = Counter(entry.shape for entry in entries if entry.shape is not None)
    left = wanted - known
    groups_left = {entry.group for entry in entries if entry.shape is None}
    if len(entries) != len(parameters) or not known <= wanted or (len(left) > 1 and len(groups_left) > 1):
        return None  # the last: which of these groups has which of these shapes
    groups_of = {
        shape: {entry.group for entry in entries if entry.shape == shape or (entry.shape is None and shape in left)}
        for shape in wanted
    }
    if shared := [list(shape) for shape, groups in groups_of.items() if len(groups) > 1]:
        raise ValueError(
            f"expected the entries of one shape to lie in one group, got the shapes {_first(shared)} in several, so "
            "that their order among the model's parameters is not known: write the parameters' names into each "
            "group, group['param_names'], in the order of its group['params']"
        )
    found: dict[str, _Entry] = {}
    for group in {entry.group for entry in entries}:
        of_group = [entry for entry in entries if entry.group == group]
        theirs = {name: parameter for name, parameter in parameters.items() if group in groups_of[parameter.shape]}
        matched = _in_place(of_group, theirs) or _in_place_of_shape(of_group, theirs)
        if matched is None:
            return None
        found |= matched
    return found


def _in_place(entries: Sequence[_Entry], parameters: Mapping[str, Tensor]) -> dict[str, _Entry] | None:
    """The k-th entry is the k-th parameter."""
    if len(entries) != len(parameters):
        return None
    if any(e.shape not in (None, p.shape) for e, p in zip(entries, parameters.values(), strict=True)):
        return None
    return dict(zip(parameters, entries, strict=True))


def _in_place_of_shape(entries: Sequence[_Entry], parameters: Mapping[str, Tensor]) -> dict[str, _Entry] | None:
    """The k-th entry of a shape is the k-th parameter of it; as many of either, but for shapes that are not known."""
    shapes = [parameter.shape for parameter in parameters.values()]
    left = list(Counter(shapes) - Counter(entry.shape for entry in entries if entry.shape is not None))
    if len(left) > 1:
        return None
    queues: dict[torch.Size, deque[_Entry]] = {shape: deque() for shape in shapes}
    for entry in entries:
        queues[left[0] if entry.shape is None else entry.shape].append(entry)
    return {name: queues[parameter.shape].popleft() for name, parameter in parameters.items()}


def _mismatch(entries: Sequence[_Entry], parameters: Mapping[str, Tensor]) -> NoReturn:
    ours = Counter(str(list(parameter.shape)) for parameter in parameters.values())
    theirs = Counter("not known" if entry.shape is None else str(list(entry.shape)) for entry in entries)
    shapes = [f"{s} × {ours[s]} and × {theirs[s]}" for s in sorted({*ours, *theirs}) if ours[s] != theirs[s]]
    names = {_bare(entry.name) for entry in entries if entry.name is not None}
    if names:
        bare = {_bare(name) for name in parameters}
        odd = (
            f"only in the model {_first(n for n in parameters if _bare(n) not in names)}, only in the file "
            f"{_first(e.name for e in entries if e.name is not None and _bare(e.name) not in bare)}"
        )
        advice = "rename them in the file; or, if their order is right, remove 'param_names' from its groups"
    else:
        odd = f"in the model {_first(parameters)}, in the file none"
        advice = (
            "write the parameters' names into each group, group['param_names'], in the order of its group['params']"
        )
    raise ValueError(
        f"expected the optimizer state of the model's {len(parameters)} trainable parameters, got {len(entries)} "
        f"entries, {sum(bool(entry.state) for entry in entries)} of them with moments, that do not match. Shapes in "
        f"the model and in the file: {', '.join(shapes) or 'the same'}. Names: {odd}. Give the model as it was "
        f"trained, the same adapter and the same parameters frozen; {advice}"
    )


def _moments(name: str, entry: _Entry, parameter: Tensor, settings: AdamSettings) -> AdamMoments | None:
    if not entry.state:
        return None
    moments = AdamMoments.of(entry.state)
    kept = {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
    if settings.amsgrad and moments.max_exp_avg_sq is not None:
        kept["max_exp_avg_sq"] = moments.max_exp_avg_sq
    for key, moment in kept.items():
        if moment.shape != parameter.shape:
            raise ValueError(
                f"expected {key} of {name} of the parameter's shape {list(parameter.shape)}, got {list(moment.shape)}: "
                "give the model as it was trained; of a sharded optimizer, the gathered full state"
            )
        if not moment.isfinite().all():
            raise ValueError(
                f"expected finite moments, got {int((~moment.isfinite()).sum())} numbers in {key} of {name} that are "
                "not: training had diverged; take an earlier checkpoint"
            )
    return moments


def _first(things: Iterable[Any], number: int = 3) -> list[Any]:
    """The first few of a list that may be long."""
    return list(things)[:number]
