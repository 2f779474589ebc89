"""Does a tokenizer belong to a model? What their sizes, their special tokens and their names tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

PADDING = 127
"""Embeddings without a token that no one need explain: vocabularies are padded to multiples of up to 128."""

SPARE = 0.1
"""The same as a share of the embeddings: Phi-2 and DeepSeek-V2-Lite keep 2 %, and nobody is known to keep 10 %."""

OTHER_IDS = 0.05
"""Share of a vocabulary that may have other ids, as renamed and reserved tokens have."""


def foreign_tokenizer(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the tokenizer looks like another model's, as a sentence; None where it does not.

    Looked at are the number of tokens beside that of embeddings, whether the model's EOS token is a special one to the
    tokenizer, and, where model and tokenizer go by different names, the ids of the tokens in the ``tokenizer.json``
    that lies with the model, if it is on this machine. Spare embeddings, added tokens and a second EOS are common, and
    nothing is said of them.

    Args:
        model: the policy.
        tokenizer: that is to be the policy's.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    model_name = str(getattr(base.config, "_name_or_path", "") or "")
    tokenizer_name = str(tokenizer.name_or_path or "")
    found = [
        _of_sizes(len(cast("nn.Embedding", base.get_input_embeddings()).weight), tokenizer),
        _of_special_tokens(base, tokenizer),
        _of_names(model_name, tokenizer_name, tokenizer),
    ]
    reasons = "; ".join(reason for reason in found if reason is not None)
    if not reasons:
        return None
    return (
        f"the tokenizer{_called(tokenizer_name)} looks like another model's than that of the policy"
        f"{_called(model_name)}: {reasons}. What it writes and reads is then not the text that the policy was trained "
        "on: give the tokenizer that was saved with the policy"
    )


def _of_sizes(embeddings: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
    tokens = len(tokenizer)
    spare = embeddings - tokens
    # Without added tokens: Gemma 3's text models ship one for images, which they do not embed.
    if tokenizer.vocab_size > embeddings or spare > max(PADDING, SPARE * embeddings):
        return f"it has {tokens:,} tokens, and the policy embeds {embeddings:,}"
    return None


def _of_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Whether the token that ends the model's texts is one of the tokenizer's words."""
    own = tokenizer.eos_token_id
    ends = _ids(model.config.get_text_config()) | _ids(getattr(model, "generation_config", None))
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if own is None or not ends or ends & (special | {own}):
        return None
    end = min(ends)
    word = tokenizer.convert_ids_to_tokens(end) if end < len(tokenizer) else None
    seen = "does not have" if word is None else f"reads as {word!r}"
    return f"the policy's EOS is token {end}, which it {seen}, and its own is {own}"


def _of_names(model_name: str, tokenizer_name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Whether the tokenizer that lies with the model, which has another name, has other ids."""
    if not model_name or not tokenizer_name or Path(model_name) == Path(tokenizer_name):
        return None
    own = _vocabulary_beside(model_name)
    if not own:
        return None
    given = tokenizer.get_vocab()
    others = sum(given.get(token) != index for token, index in own.items())
    if others <= OTHER_IDS * len(own):
        return None
    return f"of the {len(own):,} tokens in the tokenizer.json of {model_name}, {others:,} have other ids in it, or none"


def _vocabulary_beside(name: str) -> dict[str, int]:
    """Token → id, of the ``tokenizer.json`` in the model's folder or the hub's local cache; empty where none is."""
    try:
        path: Any = Path(name) / "tokenizer.json"
        if not path.is_file():
            path = None if Path(name).exists() else cached_file(name, "tokenizer.json", local_files_only=True)
        content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        vocabulary = content.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, dict):
            return {str(token): int(index) for token, index in vocabulary.items()}
        return {str(entry[0]): index for index, entry in enumerate(vocabulary)}  # unigrams, with their scores
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}


def _ids(config: Any) -> set[int]:
    value = getattr(config, "eos_token_id", None)
    return {int(token) for token in (value if isinstance(value, list | tuple) else [value]) if token is not None}


def _called(name: str) -> str:
    return f" ({name})" if name else ""
