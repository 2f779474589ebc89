"""Which models can be a policy at all."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def refuse_not_causal(model: nn.Module) -> None:
    """Refuse a model that does not write text from left to right, token by token, with a probability for each.

    Args:
        model: a Hugging Face model, PEFT or plain.

    Raises:
        ValueError: for an encoder-decoder, a model without a vocabulary head, and one that does not generate.
    """
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    head: Any = getattr(base, "get_output_embeddings", lambda: None)
    generates: Any = getattr(base, "can_generate", lambda: False)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        why = "an encoder-decoder, in which a prompt and its completion are not one text"
    elif head() is None:
        why = "which has no vocabulary head (a classifier, a reward or value model, the body of a language model)"
    elif not generates():
        why = "which does not generate (a masked language model)"
    else:
        return
    raise ValueError(
        f"expected a policy that is a causal language model, got {type(base).__name__}, {why}: a causal language model "
        "is needed, for the entropy measured is that of completions it writes itself. Name the policy where it is "
        "another part of the run, or leave the probe out"
    )


def refuse_merged(model: nn.Module) -> None:
    """Refuse a policy whose adapter is merged into the weights below it: neither training nor a probe would move it.

    Raises:
        ValueError: naming the first layer.
    """
    merged = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and m.merged]
    if merged:
        raise ValueError(
            f"expected adapters beside the weights they are trained on, got {merged[0]} ({len(merged)} in all) merged "
            "into them: the policy would not move with its trainable parameters. Call unmerge_adapter() first"
        )
