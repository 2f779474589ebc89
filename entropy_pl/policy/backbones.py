"""Backbone keys: short names for base models, and what may stand where a policy's name is asked for.

Anyone can add one::

    from entropy_pl.policy import register_backbone

    register_backbone("my_lab_7b", "/models/my-lab-7b")            # a folder or hub name
    register_backbone("my_tiny", lambda: build_and_cache_model())  # a callable: runs when the key is first asked for
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from entropy_pl.registry import did_you_mean

BackboneSource = str | Callable[[], str | Path]

# The hub's own rule: an owner and a repository of letters, digits, '-', '_' and '.'.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_KEY = re.compile(r"\w+")

_REGISTRY: dict[str, BackboneSource] = {}


@dataclass(frozen=True)
class ModelLocation:
    """Where a policy is read from.

    Args:
        source: a folder path, or a hub name ``owner/repository``.
        is_local: True for a folder: then no network is touched.
    """

    source: str
    is_local: bool


def register_backbone(key: str, source: BackboneSource) -> None:
    """Make ``key`` a name that ``load_policy`` and the config files understand; a key already there is replaced.

    Args:
        key: letters, digits and underscores.
        source: a hub name, a folder path, or a zero-argument callable returning a folder path (it may build or download
            the model; it runs each time the key is loaded, so it should cache).

    Raises:
        ValueError: if the key could be mistaken for a path or a hub name.
        TypeError: if the source is neither text nor callable.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"expected a backbone key of letters, digits and underscores, got {key!r}")
    if not (isinstance(source, str) or callable(source)):
        raise TypeError(
            f"expected the source of backbone {key!r} to be a hub name, a folder path or a callable returning one, "
            f"got {type(source).__name__}"
        )
    _REGISTRY[key] = source


def available_backbones() -> list[str]:
    """The registered keys, sorted.

    Returns:
        What `load_policy` and a config's `model.policy.name` understand besides folders and hub names.
    """
    return sorted(_REGISTRY)


def locate_backbone(name: str) -> ModelLocation:
    """Find what ``name`` means, in this order: a registered key, a folder, a hub name. No network is touched.

    A folder that is called like a key is reached as ``./name``.

    Raises:
        ValueError: if it is none of the three (the nearest key is suggested), or a folder without a model in it.
    """
    source = _REGISTRY.get(name, name)
    if callable(source):
        return ModelLocation(str(_checked_folder(Path(source()))), is_local=True)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return ModelLocation(str(_checked_folder(folder)), is_local=True)
    if _HUB_NAME.fullmatch(source):
        return ModelLocation(source, is_local=False)
    suggestion = did_you_mean(name, _REGISTRY, cutoff=0.4) or ";"
    raise ValueError(
        f"expected a model folder, a hub name 'owner/repository' or a backbone key, got {name!r}: there is no such "
        f"folder and no such key{suggestion} Available keys: {', '.join(available_backbones())}"
    )


def _checked_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"expected a base model in {folder}, found a PEFT adapter: give the base model as the name "
            f"and this folder as adapter={str(folder)!r}"
        )
    raise ValueError(
        f"expected a Hugging Face model in {folder} (config.json, weights, tokenizer), found no config.json"
    )


def _demo_arithmetic() -> Path:
    """The demo policy: trained on this machine by the package's own recipe when first asked for, then cached."""
    from entropy_pl.policy.demo import demo_policy_path

    return Path(demo_policy_path())


_SHIPPED: dict[str, BackboneSource] = {
    "qwen2_5_05": "Qwen/Qwen2.5-0.5B",
    "qwen2_5_15": "Qwen/Qwen2.5-1.5B",
    "qwen2_5_3": "Qwen/Qwen2.5-3B",
    "qwen2_5_7": "Qwen/Qwen2.5-7B",
    "qwen2_5_05_instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5_15_instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2_5_3_instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2_5_7_instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2_5_math_15": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2_5_math_7": "Qwen/Qwen2.5-Math-7B",
    "llama3_2_1": "meta-llama/Llama-3.2-1B",
    "llama3_2_1_instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_3": "meta-llama/Llama-3.2-3B",
    "llama3_2_3_instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma3_1": "google/gemma-3-1b-pt",
    "gemma3_1_instruct": "google/gemma-3-1b-it",
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2_360m": "HuggingFaceTB/SmolLM2-360M",
    "demo_arithmetic": _demo_arithmetic,
}
for _key, _source in _SHIPPED.items():
    register_backbone(_key, _source)
