"""What a run has set on its policy besides parameters and modes, and a probe must not meet, set aside for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PLAIN_OUTPUTS = {
    "output_router_logits": False,  # with them comes the routers' loss, which knows no row of another length
    "output_hidden_states": False,
    "output_attentions": False,
    "_output_attentions": False,  # where Transformers 5 keeps it
    "return_dict": True,
}
"""What a configuration asks of every forward pass, and what a pass that wants logits alone asks."""


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Forward passes that return logits by name and nothing else, whatever the model's configurations ask for.

    Training may want more of every pass: the routers' logits for their auxiliary loss, all hidden states, attention
    weights, a tuple in the place of an output with names.
    """
    with ExitStack() as stack:
        for config in {id(c): c for c in (vars(m).get("config") for m in model.modules())}.values():
            for name, plain in PLAIN_OUTPUTS.items():
                held = getattr(config, "__dict__", {})  # past its setters, which check and warn
                if name in held and held[name] is not plain:
                    stack.callback(held.__setitem__, name, held[name])
                    held[name] = plain
        yield


@contextmanager
def nothing_remembered(model: nn.Module) -> Iterator[None]:
    """Forward passes in eval mode that compute from the parameters as they are, not from what was kept of others.

    Some layers keep in eval mode what they have computed from their parameters, and forget it when ``train()`` is
    called: PEFT's DoRA with caching enabled keeps the norm of its weights. A probe moves parameters in eval mode. Here
    such layers start with nothing kept, and everything they held is back afterwards: every pass at other parameters
    has to begin in a block of its own.

    Args:
        model: in whatever mode; the flags ``training`` are the caller's to put back.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).train is nn.Module.train or isinstance(module, PreTrainedModel):
                continue
            if getattr(module, "merged", False):  # forgetting would change its weights, and round them
                continue
            stack.callback(_hold_again, module, _held(module))
            module.train()
        yield


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _held(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes that are the layer's own, and of those that can be changed in place also a copy."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {name: (value, value.copy() if type(value) in (dict, list) else None) for name, value in own.items()}


def _hold_again(module: nn.Module, held: dict[str, tuple[Any, Any]]) -> None:
    attributes = vars(module)
    for name in [name for name in attributes if name not in _OF_EVERY_MODULE and name not in held]:
        del attributes[name]
    for name, (value, content) in held.items():
        attributes[name] = value
        if content is not None:
            value.clear()
            value.update(content) if type(value) is dict else value.extend(content)
