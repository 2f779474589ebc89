"""The vocabulary head: which positions reach it, and how many at a time.

Sequences are packed to the left and padded on the right, so that a causal model needs no attention mask and no
position ids: real tokens never see padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.policy.wrapper import generates_by_itself, head_sees_positions, scoring_arguments
from entropy_pl.rollout import Rollout

HEAD_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Of one chunk of logits. Larger than what the statistics take at once, for the head's matrix product."""
MIN_HEAD_ROWS = 64


def output_head(model: nn.Module) -> Any:
    """The layer that maps hidden states to logits.

    Raises:
        ValueError: if the model is not a Hugging Face language model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        raise ValueError(f"expected a Hugging Face causal language model, got {type(model).__name__} without a head")
    return head


def head_sizes(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of the output head: V, and d of the hidden states it reads.

    What adapters have put around the layer (trainable tokens, LoRA, a copy that is trained) has not all of a layer's
    attributes; the innermost layer has.

    Raises:
        ValueError: if the model is not a Hugging Face language model.
    """
    layer = output_head(model)
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    if hasattr(layer, "in_features"):  # a quantized weight has another shape
        return layer.out_features, layer.in_features
    rows, columns = layer.weight.shape
    return rows, columns


def head_chunk(vocabulary: int, device_type: str, dtype: torch.dtype) -> int:
    """How many tokens' logits are made at once where not all of them have to be there together."""
    limit = HEAD_CHUNK_BYTES.get(device_type, HEAD_CHUNK_BYTES["cuda"])
    return max(MIN_HEAD_ROWS, limit // (dtype.itemsize * vocabulary))


def completion_logits(model: nn.Module, rollout: Rollout) -> Tensor:
    """Logits that predict the completion tokens, ``[number of tokens, V]`` in the order of ``completion_mask``."""
    ids, rows, columns = _packed(rollout)
    arguments = scoring_arguments(model, rollout, ids.shape[1])
    if head_sees_positions(model, output_head(model)):
        return _at(model(input_ids=ids, use_cache=False, **arguments).logits, rows, columns)
    with _head_reads(model, lambda hidden: _at(hidden, rows, columns)[None]):
        return model(input_ids=ids, use_cache=False, **arguments).logits[0]


def completion_logit_chunks(model: nn.Module, rollout: Rollout) -> Iterator[Tensor]:
    """The same logits, a chunk of consecutive tokens at a time: those of a long completion never exist together.

    The model's body runs once. For every chunk the model's own forward method then turns a part of its hidden states
    into logits, with whatever it does to them (Gemma 2 caps them). A model that does not name its body
    (``get_decoder``) gets one chunk.
    """
    ids, rows, columns = _packed(rollout)
    size = head_chunk(head_sizes(model)[0], ids.device.type, torch.get_default_dtype())
    body = _body(model)
    if len(rows) <= size or body is None:
        yield completion_logits(model, rollout)
        return
    outputs: list[Any] = []

    def keep(_: nn.Module, __: Any, output: Any) -> Any:
        outputs.append(output)
        return _with_states(output, output.last_hidden_state[:, :0])  # nothing is left for the head to do

    handle = body.register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False, **scoring_arguments(model, rollout, ids.shape[1]))
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise RuntimeError(
            f"expected the model's body to run once in a forward pass, got {len(outputs)} times: score a model that "
            "torch.compile has compiled inside `evaluation`, which runs what it was made from"
        )
    [output] = outputs
    for chunk in _at(output.last_hidden_state, rows, columns).split(size):
        # No name here holds the logits while the next ones are made.
        yield _logits_of(model, body, _with_states(output, chunk[None]), ids[:1, :1])


def emitting_states(model: nn.Module, rollout: Rollout) -> Tensor:
    """The hidden states that emit the completion tokens of one micro-batch, ``[number of tokens, d]``."""
    ids, rows, columns = _packed(rollout)
    states: list[Tensor] = []
    whole = head_sees_positions(model, output_head(model))

    def keep(hidden: Tensor) -> Tensor:
        states.append(_at(hidden, rows, columns))
        return hidden if whole else hidden[:, :0]  # nothing is left for the head to do

    with _head_reads(model, keep):
        model(input_ids=ids, use_cache=False, **scoring_arguments(model, rollout, ids.shape[1]))
    return states[-1]  # of X-LoRA's two passes the one with its adapters


def _packed(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids ``[n, L]``, packed to the left, and rows and columns of the positions that emit completion tokens."""
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first, in their order
    length = int(mask.sum(1).max())
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1).masked_fill(~mask, 0)
    rows, columns = rollout.completion_mask.nonzero(as_tuple=True)
    columns = rollout.prompt_lengths[rows] + columns - 1  # the position before a token predicts it
    return ids.gather(1, order)[:, :length], rows, columns


@contextmanager
def _head_reads(model: nn.Module, chosen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the vocabulary head see ``chosen(hidden)``, a few positions of the hidden states, as ``[1, n, hidden]``.

    A hook on the head's input works for every architecture and keeps what a model does to its logits afterwards.
    """

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (chosen(args[0]), *args[1:])

    handle = output_head(model).register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _at(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Chosen positions ``[n, d]``; the last layer may lie on another device than the token ids."""
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


def _body(model: nn.Module) -> nn.Module | None:
    """The part of a language model below its head, where it runs once and nothing else reads its output."""
    if generates_by_itself(model) or head_sees_positions(model, output_head(model)):
        return None
    getter = getattr(model, "get_decoder", None)
    body = getter() if getter is not None else None
    # A model that cannot tell gives itself.
    return None if body is None or any(module is output_head(model) for module in body.modules()) else body


def _with_states(output: Any, states: Tensor) -> Any:
    changed = copy.copy(output)
    changed.last_hidden_state = states
    return changed


def _logits_of(model: nn.Module, body: nn.Module, output: Any, ids: Tensor) -> Tensor:
    with _body_returns(body, output):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


@contextmanager
def _body_returns(body: nn.Module, output: Any) -> Iterator[None]:
    """Let the body have computed ``output`` already."""
    attributes = vars(body)
    own = attributes.get("forward")  # some tools put a method of their own in front of the class's
    attributes["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own
