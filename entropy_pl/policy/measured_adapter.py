"""Which adapter is the policy, in a model that may hold several: the one that is measured, whatever was active last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import nn

from entropy_pl.policy.wrapper import wrapper_kept

_SWITCHES = ("_active_adapter", "_disable_adapters")  # of PEFT's layers, and of modules that it trains as a whole
_OF_WRAPPERS = ("active_adapter", "_adapters_disabled", "disabled")  # of its model, its tuner, X-LoRA
_Switch = tuple[dict[str, Any], str, Any]


class MeasuredAdapter:
    """Remembers which adapters a model had switched on, and switches to them for as long as it is measured.

    PEFT's own ``set_adapter`` also changes which parameters require a gradient, and unmerges; this does neither.

    Args:
        model: the policy, with or without adapters, as it is when the run begins.
        name: of the adapter that is the policy; None takes what is active now, one or several.

    Raises:
        ValueError: for a name without an adapter, or one that would have to be switched to while another is merged.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        self._model = model
        if name is None:
            self._switches = _switches(model)
        else:
            known = sorted({key for _, key, _ in _keyed(model)})
            if name not in known:
                raise ValueError(
                    f"expected adapter={name!r} to name an adapter of the policy, got one with "
                    f"{', '.join(map(repr, known)) or 'no adapters'}: leave it out for the one that is active"
                )
            _refuse_merged(model)
            with _put_back(model):
                model.set_adapter(name)  # type: ignore[operator]  # PEFT's, or Transformers' own
                self._switches = _switches(model)
        self._on = {id(a): _listed(value) for a, attribute, value in self._switches if attribute == "_active_adapter"}
        self.names: list[str] = sorted({adapter for layer in self._on.values() for adapter in layer})
        """Of the adapters that are the policy; none where it has no adapter."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """The policy as it is measured: its adapters on, all others off, as when the run began.

        Afterwards every switch, and every ``requires_grad``, is as it was before.

        Raises:
            ValueError: if an adapter is merged into the base weights, and the step moves one or another has to be
                switched to.
        """
        if not self._switches:
            yield
            return
        watched = self.watches()
        turned = [
            (attributes, name, value)
            for attributes, name, value in [*self._switches_of_new_layers(), *self._switches]
            if attributes.get(name) != value
        ]
        if turned or any(watched(parameter) for _, _, parameter in _keyed(self._model)):
            _refuse_merged(self._model)
        with _put_back(self._model), wrapper_kept(self._model):
            for attributes, name, value in turned:
                attributes[name] = _copied(value)
            for parameter in self._model.parameters():
                if not parameter.requires_grad and watched(parameter):
                    parameter.requires_grad_(True)
            yield

    def watches(self) -> Callable[[nn.Parameter], bool]:
        """Which parameters the step is read from: those that require a gradient and belong to no other adapter.

        An adapter that is switched off just now counts as requiring one: PEFT has taken it away for the time.
        """
        acting: set[int] = set()
        other: set[int] = set()
        off: set[int] = set()
        for module, key, parameter in _keyed(self._model):
            attributes = vars(module)
            (acting if key in self._measured_in(module) else other).add(id(parameter))
            if key not in _listed(attributes["_active_adapter"]) or attributes.get("_disable_adapters"):
                off.add(id(parameter))
        disabled = any(value for _, name, value in self._switches if name == "_disable_adapters")
        switched_off = set() if disabled else acting & off

        def watched(parameter: nn.Parameter) -> bool:
            if id(parameter) in other and id(parameter) not in acting:
                return False
            return parameter.requires_grad or id(parameter) in switched_off

        return watched

    def others_in(self, optimizers: Sequence[Any]) -> list[str]:
        """Adapters beside the measured ones that an optimizer trains, sorted.

        PEFT takes the gradient from an adapter that is off, so that one which is trained in turn with others may look
        like a frozen one: it shows by its first gradient, or by what the optimizer keeps of it after its first step.

        Args:
            optimizers: of the run, with ``param_groups``.
        """
        keys = {id(p): key for module, key, p in _keyed(self._model) if key not in self._measured_in(module)}
        found: set[str] = set()
        for optimizer in optimizers:
            state = getattr(optimizer, "state", None)
            stepped = state if isinstance(state, Mapping) else {}
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                seen = parameter.requires_grad or parameter.grad is not None
                if id(parameter) in keys and (seen or _keeps_something(stepped.get(parameter))):
                    found.add(keys[id(parameter)])
        return sorted(found - set(self.names))

    def _measured_in(self, module: nn.Module) -> Sequence[str]:
        """The adapters that are on in a layer while the policy is measured."""
        return self._on.get(id(vars(module)), self.names)

    def _switches_of_new_layers(self) -> list[_Switch]:
        """Layers that came after the run began have the measured adapters at most."""
        known = {id(attributes) for attributes, _, _ in self._switches}
        attributes = (vars(module) for module in self._model.modules())
        return [(a, "_active_adapter", self.names) for a in attributes if "_active_adapter" in a and id(a) not in known]


def _switches(model: nn.Module) -> list[_Switch]:
    """Everything that says which adapters are on."""
    layers = [
        (attributes, name, _copied(attributes[name]))
        for attributes in (vars(module) for module in model.modules())
        for name in _SWITCHES
        if "_active_adapter" in attributes and name in attributes
    ]
    wrappers = [vars(module) for module in (model, getattr(model, "base_model", None)) if module is not None]
    return layers and layers + [
        (attributes, name, _copied(attributes[name]))
        for attributes in wrappers
        for name in _OF_WRAPPERS
        if name in attributes
    ]


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """All switches and every ``requires_grad`` as they are now, when the block has ended."""
    switches = _switches(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for attributes, name, value in switches:
            attributes[name] = value
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _keyed(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Layer, adapter and parameter of everything that belongs to one adapter."""
    for module in model.modules():
        if "_active_adapter" not in vars(module):
            continue
        for path in getattr(module, "adapter_layer_names", ()):
            try:
                table = attrgetter(path)(module)
            except AttributeError:
                continue
            if isinstance(table, nn.ModuleDict | nn.ParameterDict):
                for key, value in table.items():
                    for parameter in _parameters(value):
                        yield module, key, parameter


def _parameters(value: Any) -> list[nn.Parameter]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, nn.Parameter) else []


def _keeps_something(state: Any) -> bool:
    return len(state) > 0 if isinstance(state, Mapping) else state is not None


def _refuse_merged(model: nn.Module) -> None:
    merged = {adapter for module in model.modules() for adapter in getattr(module, "merged_adapters", None) or ()}
    if merged:
        raise ValueError(
            "expected adapters beside the base weights while a step is measured, got "
            f"{', '.join(map(repr, sorted(merged)))} merged into them, where a change of the adapter changes nothing: "
            "call model.unmerge_adapter() before the optimizer's step"
        )


def _listed(adapters: str | Sequence[str]) -> Sequence[str]:
    return [adapters] if isinstance(adapters, str) else adapters


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
