"""A policy as it was in the middle of a training run, with the state of its optimizer; and the difference of two."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from entropy_pl.config import SettingsParser
from entropy_pl.policy.backbones import ModelLocation, locate_backbone
from entropy_pl.policy.load import Policy, load_config, load_policy_from
from entropy_pl.policy.settings import Dtype, LoraSettings, PolicySettings, Quantization
from entropy_pl.policy.stored import (
    StoredCheckpoint,
    named,
    one_optimizer,
    optimizer_near,
    read_checkpoint,
    read_optimizer,
)
from entropy_pl.policy.weights import check_lora, check_scaling, copy_weights, match_weights

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "spiece*")
# Of a model's config.json: what has no part in its logits.
_NOT_THE_MODEL = frozenset(
    (
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "eos_token_id",
        "bos_token_id",
    )
)
# What of a PEFT adapter's settings has a part in the scale of its update.
_SCALING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A policy and its optimizer at one moment of a training run.

    Args:
        policy: model and tokenizer; in training mode, trainable as it was in training.
        optimizer: the optimizer's raw ``state_dict()``, on the CPU; None where none was saved, or none asked for.
        path: where it was read from.
        hyper_parameters: what a Lightning checkpoint tells of the module's and the datamodule's arguments.
    """

    policy: Policy
    optimizer: dict[str, Any] | None = field(repr=False)
    path: Path
    hyper_parameters: dict[str, Any] = field(default_factory=dict, repr=False)


def load_checkpoint(
    checkpoint_path: str | Path,
    *,
    optimizer_path: str | Path | None = None,
    optimizer: bool = True,
    backbone: str | None = None,
    lora: LoraSettings | None = None,
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> Checkpoint:
    """Load a policy from a checkpoint, with the state of its optimizer if that was saved.

    A checkpoint is one of

    * a folder with a PEFT adapter, as TRL and Hugging Face's Trainer leave it; the adapter names its base model and
      brings its LoRA settings;
    * a folder with a whole Hugging Face model: every parameter is trained;
    * a ``.ckpt`` file of Lightning. GRPOModule's name the policy and its settings; of another module's the policy is
      found under whatever attribute it was, frozen base model included or not, and ``backbone`` is needed, for LoRA
      ``lora`` too: the weights tell the rank but not alpha;
    * a file with a state dict (``.pt``, ``.pth``, ``.bin``, ``.safetensors``), as FSDP's full one: likewise.

    Nothing in the files is executed, and no network is touched but for a base model that is named by its hub name.

    Args:
        checkpoint_path: the folder or file.
        optimizer_path: a torch file with an optimizer's state dict (a Lightning checkpoint will do), or a folder with
            ``optimizer.pt``. None: the one in the checkpoint itself, else ``optimizer.pt`` in its folder or beside it,
            else none.
        optimizer: False reads none at all, wherever it is.
        backbone: the base model: a folder, backbone key or hub name; instead of the one that the checkpoint names. To
            a whole model's folder without tokenizer it lends its own.
        lora: LoRA settings of the run; instead of those in the checkpoint, an adapter it was continued from included.
            (An adapter's folder has the last word on its own, as in ``load_policy``.)
        dtype: of the base weights. None: what the checkpoint says, else float32. Trained parameters that were saved in
            float32 stay so: a whole model, or an adapter beside which modules are trained in full, is then loaded in
            float32 altogether.
        quantization: ``"nf4"`` for 4-bit base weights. None: what the checkpoint says, else none.
        device_map: placement by accelerate; None loads to the CPU.
        attn_implementation: attention kernel. None: what the checkpoint says, else the model's default.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if it is damaged or of no known kind, holds what only code could load or names an attention kernel
            of the hub, does not fit the base model or the LoRA settings, or these are needed and not given.
        OSError: if a hub name cannot be fetched.
    """
    path = Path(checkpoint_path).expanduser()
    stored = read_checkpoint(path)
    # First whatever fails at once: a large base model takes minutes.
    state = _optimizer(path, stored, optimizer_path) if optimizer else None
    given: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "attn_implementation": attn_implementation}
    given = {name: value for name, value in given.items() if value is not None} | {"device_map": device_map}
    with named(path):
        settings = _unrounded(_settings(path, stored, backbone, lora, given), stored)
        policy = load_policy_from(settings)
        if stored.kind == "file" or (stored.kind == "model" and settings.name == backbone):
            copy_weights(policy.model, match_weights(policy.model, stored.weights, source=str(path)))
    return Checkpoint(policy, state, path, stored.hyper_parameters)


def checkpoint_weights(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights of another checkpoint of the model's run, without a second model: θ′, where the model is at θ.

    Args:
        path: a checkpoint of any kind that ``load_checkpoint`` takes, trained as the model was: an adapter goes with an
            adapter, a whole model with a whole model.
        model: as ``load_checkpoint`` loaded it.

    Returns:
        Trainable parameter's name → tensor of its shape, in the dtype it was saved in, on the CPU. To subtract the two
        points, take both to float64 first: a step is small beside what rounding either takes away.

    Warns:
        UserWarning: if an adapter says that it was trained on another base model.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if it is damaged or of no known kind, its weights are not this model's, frozen ones included, or its
            adapter scales them otherwise.
    """
    path = Path(path).expanduser()
    stored = read_checkpoint(path)
    parameters = dict(model.named_parameters())
    with named(path):
        found = match_weights(model, stored.weights, source=str(path))
        if isinstance(model, PeftModel):
            _check_adapter(path, stored, model)
        for name, weight in found.items():
            if not parameters[name].requires_grad and not _same_but_for_rounding(weight, parameters[name]):
                raise ValueError(
                    f"expected the model's frozen parameters in {path} where it has them, got another {name}: the two "
                    "are not of one run"
                )
    return {name: weight for name, weight in found.items() if parameters[name].requires_grad}


def _optimizer(path: Path, stored: StoredCheckpoint, optimizer_path: str | Path | None) -> dict[str, Any] | None:
    """The raw state of the one optimizer: where it is said to be, else in the checkpoint, else beside it."""
    if optimizer_path is not None:
        return read_optimizer(Path(optimizer_path).expanduser())
    near = None if stored.optimizers else optimizer_near(path)
    return read_optimizer(near) if near else one_optimizer(stored.optimizers, path)


def _settings(
    path: Path, stored: StoredCheckpoint, backbone: str | None, lora: LoraSettings | None, given: dict[str, Any]
) -> PolicySettings:
    """What the policy is loaded with, before a file's weights are written into it."""
    if stored.kind == "adapter":
        name = backbone or _named_base(path, stored.config.get("base_model_name_or_path"))
        return PolicySettings(name, adapter=str(path), lora=lora, **given)
    if stored.kind == "model":
        name = _whole_model(path, backbone, lora, given.get("attn_implementation"))
        return PolicySettings(name, lora=None, **given)

    if stored.policy is None:
        if backbone is None:
            raise ValueError(
                f"expected the base model of {path}, which does not name it, got none: give it as backbone=, and the "
                "run's LoRA settings, if it had any, as lora="
            )
        settings = PolicySettings(backbone, lora=lora, **given)
    else:
        settings = _saved_settings(path, stored.policy, given)
        settings = replace(settings, name=backbone or _named_base(path, settings.name))
        if lora is not None:
            settings = replace(settings, lora=lora, adapter=None)
    if settings.adapter is None:
        check_lora(set() if settings.lora is None else {settings.lora.rank}, stored.weights, str(path))
    return settings


def _unrounded(settings: PolicySettings, stored: StoredCheckpoint) -> PolicySettings:
    """The settings, with float32 in the place of a half dtype that would round what a folder's run trained in full.

    All of the model, since none multiplies float32 by bfloat16. Adapters are float32 in any case, as is whatever is not
    quantized under quantization; a file's weights are written into the model as they are (``copy_weights``).
    """
    in_full = [weight for name, weight in stored.weights.items() if "lora_" not in name and weight.is_floating_point()]
    if stored.kind == "file" or settings.quantization or all(weight.dtype.itemsize <= 2 for weight in in_full):
        return settings
    return replace(settings, dtype="float32")


def _named_base(path: Path, name: str | None) -> str:
    """The base model that a checkpoint names, if it can be found."""
    try:
        if not name or not isinstance(name, str):
            raise ValueError("no name at all")
        locate_backbone(name)
    except ValueError as error:
        raise ValueError(
            f"expected the base model that {path} names to be here, got {name!r}: {error}. Give it as backbone="
        ) from error
    return name


def _whole_model(path: Path, backbone: str | None, lora: LoraSettings | None, attn_implementation: str | None) -> str:
    """The name to load a whole model by: its folder, or the backbone whose place it takes, for the tokenizer's sake."""
    if lora is not None:
        raise ValueError(
            f"expected lora=None with {path}, which holds a whole model, got {lora}: a new adapter on it is not what "
            f"was trained; for a run that starts there, load_policy({str(path)!r}, lora=...)"
        )
    if any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        return str(path.absolute())
    if backbone is None:
        raise ValueError(
            f"expected a tokenizer in {path}, found none: give the model it was trained from as backbone=, to take "
            "that one's, or save it there with tokenizer.save_pretrained"
        )
    of_folder, of_backbone = (
        load_config(location, name, attn_implementation).to_dict()
        for location, name in (
            (ModelLocation(str(path), is_local=True), str(path)),
            (locate_backbone(backbone), backbone),
        )
    )
    differing = sorted(
        key
        for key in (of_folder.keys() | of_backbone.keys()) - _NOT_THE_MODEL
        if of_folder.get(key) != of_backbone.get(key)
    )
    if differing:
        raise ValueError(
            f"expected the tokenizer of {path} in it, or a backbone of the same configuration to take it from, got "
            f"{backbone!r}, which differs in {', '.join(differing)}: save the tokenizer there with "
            "tokenizer.save_pretrained"
        )
    return backbone


def _saved_settings(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> PolicySettings:
    """The settings GRPOModule left in its checkpoint, those given in their place.

    Raises:
        ValueError: if they are no such settings, or name a kernel that would be downloaded and executed.
    """
    kernel = saved.get("attn_implementation")
    if "attn_implementation" not in given and "/" in str(kernel):
        raise ValueError(
            f"expected the name of a built-in attention kernel in {path}, got {kernel!r}, which would be fetched and "
            "executed: if you trust it, say so with attn_implementation="
        )
    try:
        return SettingsParser(PolicySettings).read(saved | given)
    except ValueError as error:
        known = ", ".join(entry.name for entry in fields(PolicySettings))
        raise ValueError(
            f"expected policy settings ({known}) in {path}, got others: {error}. Load it with the version of this "
            "package that saved it"
        ) from error


def _check_adapter(path: Path, stored: StoredCheckpoint, model: PeftModel) -> None:
    """Compare what a checkpoint says of its adapter with the model's.

    Raises:
        ValueError: if it scales its weights otherwise, or says something else than an adapter's settings.
    """
    trained_on, base = stored.config.get("base_model_name_or_path"), model.get_base_model().name_or_path
    if isinstance(trained_on, str) and trained_on and base and Path(trained_on).name != Path(base).name:
        warnings.warn(
            f"the adapter in {path} says it was trained on {trained_on!r}, and is compared with one on {base!r}: if "
            "these are not the same weights, the two are not two points of one run",
            stacklevel=3,
        )
    try:
        lora = _told_lora(stored)
        if lora is not None:
            check_scaling(model, lora, str(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, re.error) as error:
        raise ValueError(f"expected the settings of a LoRA adapter in {path}, got others: {error}") from error


def _told_lora(stored: StoredCheckpoint) -> LoraConfig | None:
    """The LoRA settings that a checkpoint tells of itself; None where it tells none."""
    if stored.kind == "adapter":
        return LoraConfig(**{name: stored.config[name] for name in _SCALING if stored.config.get(name) is not None})
    settings = stored.policy or {}
    lora = settings.get("lora")
    # Beside an adapter that the run was continued from, they have no effect.
    return None if lora is None or settings.get("adapter") else LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"])


def _same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in the narrower of their dtypes."""
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(dtype), other.detach().to("cpu", dtype))
