"""How a probe computes: outside autocast, in float32 at the least, or in float64 all the way through."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from entropy_pl.policy.kernels import attention_in_any_precision, experts_in
from entropy_pl.policy.set_aside import nothing_remembered, plain_outputs

MatmulPrecision = Literal["highest", "high", "medium"]
_MATMUL_PRECISION: ContextVar[MatmulPrecision] = ContextVar("matmul_precision", default="highest")


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model as a probe uses it: eval mode, no autocast, no TF32, every floating tensor float32 or better.

    (TF32 only where `matmul_precision` asks for it.) What trainers wrap around ``forward`` is off: `torch.compile`, and
    the autocast that Accelerate puts inside it, where no outer context reaches; so is what gradient checkpointing hooks
    onto the embeddings. Attention and experts' products that know half precision only give way to PyTorch's own.
    Modes, tensors and settings are put back to the bit on leaving. Quantized layers keep their weights and compute in
    float32. Entering it again inside costs nothing but a walk over the modules.

    Args:
        model: the policy, in whatever state its trainer left it.
    """
    with _undisguised(model, torch.float32), chosen_matmul():
        yield


@contextmanager
def float64_evaluation(model: nn.Module) -> Iterator[None]:
    """Every float operation of a stock Hugging Face model really runs in float64.

    ``model.double()`` is not enough: RMSNorm, rotary tables and softmax cast to float32 inside. Here those casts
    become casts to float64, and the parameters and buffers are float64 while the context lasts (the old tensors are
    back after it, to the bit).

    Args:
        model: a stock Hugging Face model, or PEFT's around one.

    Raises:
        ValueError: if the model has 4-bit or 8-bit layers, which have no float64 arithmetic.
    """
    refuse_quantized(model, "float64", "load it unquantized, or probe in float32")
    with (
        _undisguised(model, torch.float64),
        _default_dtype(torch.float64),
        _Float32BecomesFloat64(),
    ):
        yield


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose weights are quantized (bitsandbytes), recognised without importing the library."""
    return [
        name for name, module in model.named_modules() if any(is_quantized(p) for p in module.parameters(recurse=False))
    ]


def refuse_quantized(model: nn.Module, purpose: str, instead: str) -> None:
    """Refuse what quantized layers cannot do.

    Raises:
        ValueError: if the model has 4-bit or 8-bit layers.
    """
    quantized = quantized_layers(model)
    if quantized:
        raise ValueError(
            f"expected a policy without quantized layers for {purpose}, got {quantized[0]} ({len(quantized)} in all): "
            f"{instead}"
        )


def computes_in_half(model: nn.Module) -> bool:
    """Whether a forward pass would now compute in bfloat16 or float16: by its parameters, its layers, or autocast."""
    half = (torch.bfloat16, torch.float16)
    kinds = {parameter.device.type for parameter in model.parameters()}
    return (
        any(torch.is_autocast_enabled(kind) for kind in kinds)
        or any(parameter.dtype in half for parameter in model.parameters())
        or any(getattr(module, "compute_dtype", None) in half for module in model.modules())
    )


def coarse_arithmetic(model: nn.Module) -> str | None:
    """Why two passes over the same tokens may differ by far more than the rounding of float32; None where they do not.

    To be asked where the model computes as a probe lets it (:func:`evaluation`).

    Args:
        model: the policy.

    Returns:
        In words: what it computes in, or what it decides by comparing numbers.
    """
    if computes_in_half(model):
        return "it computes in half precision"
    if _MATMUL_PRECISION.get() != "highest":
        return "its products are not in full float32 (matmul_precision)"
    if any(type(parameter).__name__ == "Int8Params" for parameter in model.parameters()):
        return "its activations are rounded to 8 bits"
    config: Any = getattr(model, "config", None)
    # bitsandbytes' 4-bit layers compute in float32 here.
    if getattr(config, "quantization_config", None) is not None and not quantized_layers(model):
        return "its quantized layers compute in a precision of their own"
    getter = getattr(config, "get_text_config", None)
    config = config if getter is None else getter()
    if any(getattr(config, name, None) for name in ROUTED):
        return "it routes tokens to experts, and rounding decides between two that are equally likely"
    return None


ROUTED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_experts",
    "num_local_experts",
    "moe_topk",
    "top_k_experts",
)
"""What Transformers' configurations of mixtures of experts have one or the other of."""


class _Float32BecomesFloat64(TorchFunctionMode):
    """Turns every request for float32 (a cast or a ``dtype=``) into one for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards every module has its own ``training`` flag back.

    ``model.train()`` would not do: parts that were held in eval mode on purpose would start to train. Nor would
    ``model.eval()``: it may change more than flags (Transformers exchanges kernels, some adapters merge their weights),
    and flags are all that is put back. Layers that keep in eval mode what they made of their parameters keep nothing
    here, and forward passes return logits alone, whatever else the model's configuration asks for.

    Args:
        model: any module.
    """
    flags = [(module, module.training) for module in model.modules()]
    # In eval mode bitsandbytes' 4-bit layers repack their weights for good on CPUs that know bfloat16: no way back, and
    # no backward either. https://github.com/bitsandbytes-foundation/bitsandbytes, nn/modules.py, Linear4bit.forward
    packing: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    try:
        with plain_outputs(model), nothing_remembered(model):
            for module, _ in flags:
                module.training = False
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module in packing:
            module.support_avx512bf16_for_cpu = True


@contextmanager
def _undisguised(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model without what training has put around it, its tensors in ``dtype`` or better."""
    with (
        _rotary_state_kept(model),
        evaluation_mode(model),
        own_forward(model),
        _inputs_without_gradient(model),
        attention_in_any_precision(model),
        experts_in(model, dtype),
        _without_autocast(model),
        _at_least(model, dtype),
    ):
        yield


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Every module with the ``forward`` of its class or its author, not the one that a trainer has put over it.

    Set aside are `torch.compile`'s in all its forms, which would compile anew for every shape of a probe, and the
    autocast with which Accelerate wraps a prepared model's ``forward``.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            attributes = vars(module)
            if attributes.get("_compiled_call_impl") is not None:
                kept.append((attributes, "_compiled_call_impl", attributes["_compiled_call_impl"]))
                attributes["_compiled_call_impl"] = None
            forward = attributes.get("forward")
            if forward is None:
                continue
            if "_original_forward" in attributes:
                own = attributes["_original_forward"]
            elif hasattr(forward, "_torchdynamo_orig_callable"):
                wrapped = module._modules.get("_orig_mod")
                own = forward._torchdynamo_orig_callable if wrapped is None else wrapped
                if inspect.ismethod(forward) and not inspect.ismethod(own):
                    own = MethodType(own, module)
            else:
                continue  # the author's own
            kept.append((attributes, "forward", forward))
            attributes["forward"] = own
        yield
    finally:
        for attributes, name, value in reversed(kept):
            attributes[name] = value


@contextmanager
def _rotary_state_kept(model: nn.Module) -> Iterator[None]:
    """What rotary embeddings remember of the sequences they have seen (dynamic scaling, longrope) stays the run's."""
    kept = [
        (module, dict(vars(module)), {n: (b, b.clone()) for n, b in module._buffers.items() if b is not None})
        for module in model.modules()
        if _remembers(vars(module).get("rope_type"))
    ]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            for name, (buffer, values) in buffers.items():
                if not torch.equal(buffer, values):  # written in place; or exchanged for another
                    buffer.copy_(values)
                module._buffers[name] = buffer


def _remembers(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]  # one for each kind of layer
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


@contextmanager
def _inputs_without_gradient(model: nn.Module) -> Iterator[None]:
    """The embeddings without the hook by which gradient checkpointing makes their outputs require a gradient.

    Nothing is checkpointed in eval mode, and forward mode cannot pass the hook.
    """
    kept = [
        (module._forward_hooks, key, hook)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "").startswith("make_inputs_require_grad")  # Transformers' and PEFT's
    ]
    try:
        for hooks, key, _ in kept:
            hooks[key] = lambda *_: None
        yield
    finally:
        for hooks, key, hook in kept:
            hooks[key] = hook


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    kinds = {"cpu"} | {parameter.device.type for parameter in model.parameters()}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()  # of what a model makes without naming a dtype, and of integer / integer
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """How float32 products are computed by every `evaluation` inside the block; elsewhere it is exact float32.

    Args:
        precision: `highest`, or `high` (TF32) or `medium` (bfloat16 inside), as in
            ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: for another precision.
    """
    if precision not in get_args(MatmulPrecision):
        raise ValueError(f"expected matmul_precision out of {get_args(MatmulPrecision)}, got {precision!r}")
    token = _MATMUL_PRECISION.set(precision)
    try:
        yield
    finally:
        _MATMUL_PRECISION.reset(token)


@contextmanager
def chosen_matmul() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products, unless `matmul_precision` chose them; put back on leaving."""
    wanted = _MATMUL_PRECISION.get()
    # The switch of each backend, where PyTorch has them (2.9): the old, common one raises once these were used.
    switches = [b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b, "matmul")]
    kept = [(switch, switch.fp32_precision) for switch in switches if hasattr(switch, "fp32_precision")]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = wanted
        for switch, precision in kept:
            allowed = ("none", "ieee") if wanted == "highest" else ("tf32",)
            if precision not in allowed:
                switch.fp32_precision = allowed[-1]
    if before != wanted:
        torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        if before != wanted:
            torch.set_float32_matmul_precision(before)
        for switch, precision in kept:
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


@contextmanager
def _at_least(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold every floating parameter and buffer narrower than ``dtype`` in ``dtype``.

    The modules get other tensors for a while; the old ones are not touched. (New data of another dtype in an old
    parameter would part it from its gradient accumulator, and so from the hooks by which DDP reduces gradients.)
    """
    widened: dict[int, Tensor] = {}  # by identity: tied tensors stay tied
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in tables:
            for name, tensor in slots.items():
                if tensor is not None and _narrower(tensor, dtype):
                    kept.append((slots, name, tensor))
    # What a 4-bit layer dequantizes into: forwards by the layer's own setting, backwards by its weights'.
    holders: list[tuple[Any, str]] = [(module, "compute_dtype") for module in model.modules()]
    holders += [(getattr(p, "quant_state", None), "dtype") for p in model.parameters() if is_quantized(p)]
    compute = [(holder, name, getattr(holder, name, None)) for holder, name in holders]
    compute = [entry for entry in compute if isinstance(entry[2], torch.dtype) and entry[2] != dtype]
    try:
        for slots, name, tensor in kept:
            if id(tensor) not in widened:
                wide = tensor.detach().to(dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                widened[id(tensor)] = nn.Parameter(wide, tensor.requires_grad) if is_parameter else wide
            slots[name] = widened[id(tensor)]
        for holder, name, _ in compute:
            setattr(holder, name, dtype)
        yield
    finally:
        for slots, name, tensor in kept:
            slots[name] = tensor
        for holder, name, before in compute:
            setattr(holder, name, before)


def _narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    plain = tensor.is_floating_point() and not is_quantized(tensor)
    return plain and torch.promote_types(tensor.dtype, dtype) != tensor.dtype


def is_quantized(tensor: Tensor) -> bool:
    """Whether a parameter is bitsandbytes' (recognised without importing the library)."""
    return type(tensor).__module__.startswith("bitsandbytes")
