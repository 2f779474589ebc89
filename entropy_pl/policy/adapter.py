"""The trainable part of a policy: attach a LoRA adapter, resume one, switch it off for the reference policy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from entropy_pl.policy.settings import LoraSettings


def attach_lora(model: PreTrainedModel, lora: LoraSettings) -> PeftModel:
    """Freeze the model and put a new LoRA adapter on it (B = 0: the policy starts as the base model).

    A's initial values are drawn from the global torch RNG.

    Raises:
        ValueError: if ``lora.target_modules`` matches no layer.
    """
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        linear = sorted(
            {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ValueError(
            f"expected LoRA target_modules to name layers of this model, got {lora.target_modules!r}: none matches. "
            f"Its linear layers: {', '.join(linear)}"
        ) from error


def resume_adapter(model: PreTrainedModel, folder: str, base_name: str, lora: LoraSettings | None = None) -> PeftModel:
    """Put a saved PEFT adapter on the model and go on training it.

    Args:
        model: the base model the adapter was trained on.
        folder: where ``save_pretrained`` left the adapter.
        base_name: folder or hub name of ``model``, for messages.
        lora: settings asked for beside the adapter; the adapter's own hold, with a warning where these differ from both
            them and the defaults.

    Raises:
        ValueError: if there is no adapter in the folder, it is not of the LoRA kind, or it does not fit the model.
    """
    path = Path(folder).expanduser()
    if not (path / "adapter_config.json").is_file():
        found = "a whole model: give it as the name" if (path / "config.json").is_file() else "no adapter_config.json"
        raise ValueError(
            f"expected a folder with a PEFT adapter (adapter_config.json and weights), got {path}: {found}"
        )
    config = PeftConfig.from_pretrained(str(path), local_files_only=True)
    if config.is_prompt_learning:
        raise ValueError(
            f"expected a LoRA adapter in {path}, got {config.peft_type.value}: prompt learning is not supported"
        )
    if getattr(config, "megatron_config", None):
        raise ValueError(
            f"expected an adapter of plain layers in {path}, got one with megatron_config in its adapter_config.json, "
            "for which PEFT would import the module that the file names: take the key out if the layers are plain ones"
        )
    _warn_of_differences(config, path, base_name, lora)
    saved = set(load_peft_weights(str(path), device="cpu"))
    with warnings.catch_warnings():
        # PEFT only warns of keys that are missing; the comparison below is stricter.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        try:
            peft_model = PeftModel.from_pretrained(model, str(path), is_trainable=True, local_files_only=True)
        except (RuntimeError, ValueError, KeyError) as error:
            raise _misfit(path, base_name, config, " ".join(str(error).split())[:300]) from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    extra = {key for key in saved - expected if "lora_" in key}
    if expected - saved or extra:
        example = sorted((expected - saved) or extra)[0]
        raise _misfit(
            path,
            base_name,
            config,
            f"{len(expected - saved)} of the model's adapter weights are not in the file and {len(extra)} in the file "
            f"have no place in the model, e.g. {example}",
        )
    return peft_model


def _misfit(path: Path, base_name: str, config: PeftConfig, why: str) -> ValueError:
    return ValueError(
        f"expected an adapter trained on {base_name}, got {path}, which was trained on "
        f"{config.base_model_name_or_path!r} and does not fit: {why}. Give the base model it was trained on"
    )


def _warn_of_differences(config: PeftConfig, path: Path, base_name: str, lora: LoraSettings | None) -> None:
    """Say what would otherwise go unseen: another base of the same shape, LoRA settings that have no effect."""
    trained_on = config.base_model_name_or_path
    if trained_on and Path(trained_on).name != Path(base_name).name:
        warnings.warn(
            f"the adapter in {path} says it was trained on {trained_on!r}, and is put on {base_name!r}: if these are "
            "not the same weights, the policy is not the one that was saved",
            stacklevel=4,
        )
    asked = None if lora is None else (lora.rank, float(lora.alpha), lora.dropout)
    default = LoraSettings()
    has = (getattr(config, "r", None), float(getattr(config, "lora_alpha", 0)), getattr(config, "lora_dropout", None))
    if asked is not None and asked not in ((default.rank, float(default.alpha), default.dropout), has):
        warnings.warn(
            f"the adapter in {path} brings its own LoRA settings (rank, alpha, dropout) = {has}; "
            f"those asked for, {asked}, have no effect",
            stacklevel=4,
        )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training moves, by their name in ``model.named_parameters()`` (tied ones once).

    Args:
        model: any module.

    Returns:
        The parameters with ``requires_grad``, in the model's order.

    Raises:
        ValueError: if there are none.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            f"expected a model with trainable parameters, got {type(model).__name__} with "
            f"{sum(1 for _ in model.parameters())} parameters, none of which has requires_grad=True: load it with "
            "lora=LoraSettings(), resume an adapter with is_trainable=True, or unfreeze what should be trained"
        )
    return trainable


@contextmanager
def reference_policy(model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel | PeftModel]:
    """The same model with its adapter switched off: the policy before training, at no further memory.

    On leaving, also by an error, every adapter is on or off as before and every ``requires_grad`` has its old value
    (PEFT's own context turns adapters that were frozen on purpose trainable).

    Args:
        model: a policy with a LoRA adapter.

    Yields:
        ``model`` itself.

    Raises:
        ValueError: if the model has no adapter, or one merged into the base weights (unmerging would round them).
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"expected a model with a LoRA adapter, got a plain {type(model).__name__}: the reference policy is the "
            "same model with its adapter off, so KL to the reference needs LoRA (load_policy(..., lora=LoraSettings()))"
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise ValueError(
            "expected a LoRA adapter beside the base weights, got one merged into them: "
            "call model.unmerge_adapter() first"
        )
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # Tuner layers, and PEFT's wrappers of modules trained as a whole (modules_to_save), keep this flag.
    disabled = [
        (module, module._disable_adapters) for module in model.modules() if hasattr(module, "_disable_adapters")
    ]
    try:
        with warnings.catch_warnings():
            # Some adapters on and some off: PEFT warns that it will turn all on; the flags are put back below.
            warnings.filterwarnings("ignore", message="The model contains some adapter layers that are enabled")
            with model.disable_adapter():
                yield model
    finally:
        for module, flag in disabled:
            module._disable_adapters = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
