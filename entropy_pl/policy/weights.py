"""Saved weights by the model's own parameter names, whatever wrapped the model when it was saved."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from entropy_pl.policy.adapter import trainable_parameters
from entropy_pl.policy.precision import quantized_layers
from entropy_pl.updates.names import unwrapped

_LORA_A = re.compile(r"(\w+)\.lora_(?:embedding_)?A(?:\.|$)")  # its first dimension is the rank
_STALE_BUFFER = re.compile(r"inv_freq$|masked_bias$")  # computed nowadays, saved formerly


def match_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str = "the weights given"
) -> dict[str, Tensor]:
    """Saved weights by the names of ``model.named_parameters()``.

    Wrappers do not matter: neither the attribute the policy was under (one prefix, the same for all its parameters) nor
    what DDP, FSDP, ``torch.compile`` and PEFT insert. Weights beside the policy are left out (a value head, a second
    network). So are those of quantized layers, which are what the base model makes them. Of tied weights either name
    will do.

    Args:
        model: whose trainable parameters must all be there; frozen ones may.
        weights: the file's names → tensors.
        source: of the weights, for messages.

    Returns:
        Parameter name → the tensor given, untouched.

    Raises:
        ValueError: if a trainable parameter is missing, a shape differs, there are weights the model has no place for
            (further layers, a wider adapter), tied weights differ, or a parameter is there twice.
    """
    trainable = trainable_parameters(model)
    check_lora(lora_ranks(trainable), weights, source)
    parameters = dict(model.named_parameters())
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    places = {_plain(alias): name_of[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
    quantized = tuple(f"{_plain(name)}." for name in quantized_layers(model))
    buffers = {_plain(name) for name, _ in model.named_buffers()}
    roots = {plain.split(".")[0] for plain in places}

    prefix = _common_prefix(weights, {_plain(name) for name in trainable}, source)
    found: dict[str, list[str]] = defaultdict(list)
    foreign = []
    for key in weights:
        plain = _plain(key)
        if not plain.startswith(prefix):
            continue
        plain = plain.removeprefix(prefix)
        if plain.startswith(quantized):
            continue
        if plain in places:
            found[places[plain]].append(key)
        elif plain.split(".")[0] in roots and plain not in buffers and not _STALE_BUFFER.search(plain):
            foreign.append(key)

    missing = [name for name in trainable if name not in found]
    misshapen = [
        f"{key}: {list(weights[key].shape)}, here {list(parameters[name].shape)}"
        for name, keys in found.items()
        for key in keys
        if weights[key].shape != parameters[name].shape
    ]
    if missing or misshapen or foreign:
        raise ValueError(
            f"expected the {len(trainable)} trained parameters of this {type(model).__name__} in {source}, got one "
            f"that lacks {_count(missing)}, has {_count(misshapen)} of another shape and {_count(foreign)} that the "
            "model has no place for: load it with the base model and LoRA settings it was trained with"
        )
    for name, keys in found.items():
        if any(not torch.equal(weights[keys[0]].float(), weights[key].float()) for key in keys[1:]):
            raise ValueError(
                f"expected one value of {name} in {source}, got {len(keys)} that differ: {', '.join(keys)}. If the "
                "model ties these, training did not: load it with the base model it was trained with"
            )
    return {name: weights[keys[0]] for name, keys in found.items()}


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into the model's parameters.

    A trainable parameter in half precision becomes float32 where its weight is: training held it so, and a step is
    small beside what half precision rounds away.

    Args:
        model: the model.
        weights: parameter name → tensor of the parameter's shape.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameter, half = parameters[name], (torch.bfloat16, torch.float16)
            if parameter.requires_grad and parameter.dtype in half and weight.dtype not in half:
                parameter.data = parameter.data.float()
            parameter.copy_(weight)


def lora_ranks(weights: Mapping[str, Tensor]) -> set[int]:
    """The ranks of the LoRA adapters among the weights; empty where there is none."""
    return {weight.shape[0] for name, weight in weights.items() if _LORA_A.search(name)}


def check_lora(expected: set[int], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse an adapter for a whole model, a whole model for an adapter, and an adapter of another rank.

    Args:
        expected: ranks of the model's adapter; empty: it has none.
        weights: saved ones.
        source: of them, for messages.

    Raises:
        ValueError: saying which rank and layers the weights have.
    """
    ranks = lora_ranks(weights)
    if bool(ranks) == bool(expected) and expected <= ranks:
        return
    wanted = f"LoRA weights of rank {_listed(expected)}" if expected else "the weights of a whole model"
    if not ranks:
        raise ValueError(
            f"expected {wanted}, as the model has them, in {source}, got weights without LoRA: leave lora out to load "
            "a whole model, and compare checkpoints of one kind only"
        )
    layers = sorted({match[1] for match in map(_LORA_A.search, weights) if match})
    raise ValueError(
        f"expected {wanted}, as the model has them, in {source}, got LoRA weights of rank {_listed(ranks)} on "
        f"{', '.join(layers)}: load the model with lora=LoraSettings(rank={max(ranks)}, alpha=..., target_modules=...) "
        "as in training (the weights do not tell alpha), and compare checkpoints of one kind only"
    )


def check_scaling(model: PeftModel, lora: LoraConfig, source: str) -> None:
    """Refuse an adapter that scales its layers otherwise than the model's: the same weights are another policy there.

    Args:
        model: with an adapter on the same layers.
        lora: settings the other adapter was saved with.
        source: of it, for messages.

    Raises:
        ValueError: naming a layer and both scales.
    """
    adapter = model.active_adapter
    # By PEFT's own names, without its prefix: patterns may be anchored.
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        rank = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern, name), lora.r)
        alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, name), lora.lora_alpha)
        scale = alpha / (math.sqrt(rank) if lora.use_rslora else rank)
        here, dora = layer.scaling[adapter], model.peft_config[adapter].use_dora
        if not math.isclose(scale, here) or lora.use_dora != dora:
            raise ValueError(
                f"expected {_scaled(here, dora)} on {name}, as in the model, in {source}, got "
                f"{_scaled(scale, lora.use_dora)}: the same weights would be another policy there, so that the two are "
                "not two points of one run"
            )


def _scaled(scale: float, dora: bool) -> str:
    return f"{'DoRA' if dora else 'LoRA'} scaled by {scale:g}"


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    plain = f".{unwrapped(name)}"
    plain = plain.replace(".base_model.model.", ".")
    # DoRA's magnitudes lose their last part in PEFT's files.
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", plain)[1:]


def _common_prefix(weights: Iterable[str], wanted: set[str], source: str) -> str:
    """What stands before all of the policy's names, with its dot: the attribute it was under.

    Raises:
        ValueError: if there are several policies.
    """
    prefixes = Counter(prefix for key in weights for prefix, name in _splits(_plain(key)) if name in wanted)
    complete = sorted(prefix for prefix, count in prefixes.items() if count >= len(wanted))
    if len(complete) > 1:
        raise ValueError(
            f"expected one policy in {source}, got its weights {len(complete)} times, under "
            f"{', '.join(map(repr, complete))}: save the state dict of the one that is trained to a file of its own"
        )
    return max(prefixes, key=lambda prefix: prefixes[prefix], default="")


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to take a name for prefix and name."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def _count(names: list[str]) -> str:
    return f"{len(names)} (e.g. {names[0]})" if names else "0"


def _listed(ranks: set[int]) -> str:
    return " and ".join(map(str, sorted(ranks)))
