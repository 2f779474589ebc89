"""Load a policy: base model, tokenizer and the adapter that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from entropy_pl.policy.adapter import attach_lora, resume_adapter, trainable_parameters
from entropy_pl.policy.backbones import ModelLocation, locate_backbone
from entropy_pl.policy.settings import Dtype, LoraSettings, PolicySettings, Quantization
from entropy_pl.policy.stored import named
from entropy_pl.policy.vocabulary import foreign_tokenizer

_DEFAULT_LORA = LoraSettings()


class Policy(NamedTuple):
    """A policy π_θ and what turns text into its tokens.

    Args:
        model: a causal language model, with its adapter if it has one; in training mode.
        tokenizer: pads on the left and has a pad token.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_policy(
    name: str,
    *,
    adapter: str | None = None,
    lora: LoraSettings | None = _DEFAULT_LORA,
    quantization: Quantization | None = None,
    dtype: Dtype = "float32",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
) -> Policy:
    """Load a policy by folder, backbone key or hub name, ready to be trained.

    With a new LoRA adapter (the default) the policy equals the base model, which stays its reference policy::

        model, tokenizer = load_policy("qwen2_5_15", lora=LoraSettings(rank=32), quantization="nf4")
        with reference_policy(model):
            ...

    Code that comes with a model is never executed, and an attention kernel of the hub only if it is asked for here.

    Args:
        name: a model folder, a backbone key (see ``available_backbones``), or a hub name ``owner/repository``.
        adapter: folder of a PEFT adapter to go on training.
        lora: settings of a new adapter; with ``adapter`` the adapter's own hold. None and no adapter: every parameter
            of the plain model is trained.
        quantization: ``"nf4"`` for QLoRA: 4-bit base weights, doubly quantized, through bitsandbytes; CPU works too.
        dtype: of the base weights, or of the matrix products under quantization.
        device_map: placement by accelerate; None loads to the CPU (quantized: the current GPU, if any).
        attn_implementation: attention kernel; None takes the model's default.
        gradient_checkpointing: recompute activations in the backward pass.

    Returns:
        Model and tokenizer, which unpack as a pair.

    Warns:
        UserWarning: if the tokenizer looks like another model's.

    Raises:
        ValueError: if the name means nothing, settings exclude each other, weights or tokens are missing, the adapter
            does not fit, nothing would be trainable, or the model needs code of its own or names a hub's kernel.
        OSError: if a hub name cannot be fetched.
        ImportError: if quantization is asked for without bitsandbytes.
    """
    PolicySettings(name, adapter, lora, quantization, dtype, device_map, attn_implementation, gradient_checkpointing)
    if device_map is not None and device_map.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"expected a GPU for device_map={device_map!r}, and PyTorch finds none: leave device_map out, or install "
            "a PyTorch with CUDA"
        )
    compute_dtype: torch.dtype = getattr(torch, dtype)
    quantization_config = _nf4_config(compute_dtype) if quantization else None
    location = locate_backbone(name)

    with named(location.source):
        config = load_config(location, name, attn_implementation)
        tokenizer = _load_tokenizer(location)
        model = _load_base_model(
            location,
            config=config,
            dtype=compute_dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
        )
    embeddings = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    # Without added tokens: Gemma 3's text models ship one for images, which they do not embed.
    if tokenizer.vocab_size > embeddings:
        raise ValueError(
            f"expected the tokenizer of {location.source} to have at most as many tokens as the model embeds, got "
            f"{tokenizer.vocab_size} tokens and {embeddings} embeddings: they do not belong together"
        )
    doubt = foreign_tokenizer(model, tokenizer)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=2)
    if quantization_config is not None:
        # Freezes the base, casts what stays in 16 bits (norms, head) to float32. Checkpointing is a choice of its own.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if gradient_checkpointing:
        # The reentrant kind loses the gradient of a block whose inputs need none, as under a frozen embedding.
        # Transformers 5.23 renamed the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    policy: PreTrainedModel | PeftModel = model
    if adapter is not None:
        with named(adapter):
            policy = resume_adapter(model, adapter, location.source, lora)
    elif lora is not None:
        policy = attach_lora(model, lora)
    trainable_parameters(policy)
    return Policy(policy.train(), tokenizer)


def load_policy_from(settings: PolicySettings) -> Policy:
    """``load_policy`` with the arguments of a config file's section.

    Args:
        settings: the section.

    Returns:
        As :func:`load_policy`.

    Raises:
        ValueError: with OSError and ImportError as :func:`load_policy`.
    """
    return load_policy(**{field.name: getattr(settings, field.name) for field in fields(settings)})


def _nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "expected bitsandbytes for quantization='nf4', and it does not import: pip install 'entropy_pl[gpu]', "
            "or leave quantization out"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_config(location: ModelLocation, name: str, attn_implementation: str | None = None) -> PreTrainedConfig:
    """A model's configuration: its smallest file, so that an unreachable hub is said once and plainly.

    Args:
        location: of the model.
        name: by which it was asked for, for messages.
        attn_implementation: attention kernel asked for; None: the configuration's may be none of the hub's.

    Raises:
        ValueError: if loading the model would execute code that comes with it or that it names.
        OSError: if it cannot be fetched.
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(location.source, local_files_only=location.is_local)
        _refuse_code(location.source, content, attn_implementation)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            location.source, local_files_only=location.is_local, trust_remote_code=False
        )
    except OSError as error:
        if location.is_local:
            raise
        asked = "" if name == location.source else f" (backbone key {name!r})"
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"expected {location.source}{asked} on the Hugging Face hub or in its local cache, and it could not be "
            f"fetched (there is no folder of that name either): {reason} "
            "Give a local model folder as the policy's name, or check the name, the network and the access rights"
        ) from error
    return config


def _refuse_code(source: str, content: Mapping[str, Any], attn_implementation: str | None) -> None:
    """Refuse a configuration with which Transformers would execute a stranger's code, or ask whether to.

    Of an architecture that Transformers has itself, it takes its own classes, whatever else ``auto_map`` names.
    """
    if content.get("auto_map") and str(content.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"expected a causal language model that Transformers {transformers_version} has itself in {source}, got "
            f"{content.get('model_type')!r} with code of its own (auto_map: {content['auto_map']}), which is not "
            "executed: give a model of another architecture, or install a version of Transformers that has this one"
        )
    kernel = next(_hub_kernels(content), None)
    if kernel is not None and attn_implementation is None:
        raise ValueError(
            f"expected the name of a built-in attention kernel in {source} (config.json), got {kernel!r}, which would "
            "be fetched and executed: give attn_implementation= ('sdpa', 'eager'; or that one, if you trust it)"
        )


def _hub_kernels(content: Any, of_attention: bool = False) -> Iterator[str]:
    """The hub's kernels (``owner/repository``) among a configuration's attention kernels, those of its parts too."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _hub_kernels(value, of_attention or "attn_implementation" in key)
    elif isinstance(content, list):
        for value in content:
            yield from _hub_kernels(value, of_attention)
    elif of_attention and "/" in str(content):
        yield str(content)


def _load_base_model(location: ModelLocation, **options: object) -> PreTrainedModel:
    # The configuration is among the options: where Transformers reads it itself, a kernel that it names can win over
    # the one asked for.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        location.source,
        local_files_only=location.is_local,
        trust_remote_code=False,
        output_loading_info=True,
        **{key: value for key, value in options.items() if value is not None},
    )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        # Transformers would fill them with random numbers and only log it.
        raise ValueError(
            f"expected all weights of {type(model).__name__} in {location.source}, got a checkpoint that lacks "
            f"{len(missing)} of them, e.g. {missing[0]}: save it again with save_pretrained"
        )
    return model


def _load_tokenizer(location: ModelLocation) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, its pad token falling back to EOS.

    Raises:
        ValueError: if there is no tokenizer, or it has neither a pad nor an EOS token.
    """
    options: dict[str, Any] = {
        "padding_side": "left",
        "local_files_only": location.is_local,
        "trust_remote_code": False,
    }
    # AutoTokenizer puts the architecture's own splitting rules and special tokens in the place of a tokenizer that was
    # saved as a plain fast one (a Qwen2 model with a tokenizer of its own): take such a tokenizer as it was saved.
    saved_as = get_tokenizer_config(location.source, local_files_only=location.is_local).get("tokenizer_class")
    kind: Any = (
        PreTrainedTokenizerFast if saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
    )
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(location.source, **options)
        if location.is_local:
            files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
            if not any((Path(location.source) / file).is_file() for file in files):
                raise ValueError("none of its files is there")  # Transformers makes an empty one up
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a tokenizer beside the model in {location.source} (tokenizer.json), and it could not be loaded: "
            f"{str(error).strip().splitlines()[0]}. Save it there with tokenizer.save_pretrained"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"expected the tokenizer of {location.source} to have a pad or an EOS token, got neither: "
                "set tokenizer.eos_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
