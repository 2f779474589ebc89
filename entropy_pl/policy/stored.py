"""What the files of a checkpoint hold, read without executing any of it.

A pickle is a program. Torch files are read by ``torch.load(weights_only=True)``, which knows tensors and plain values
and refuses the rest; everything else is safetensors or JSON.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from entropy_pl.policy.memory import wants_memory

# Where a torch file keeps the weights, if they are not all of it; the first key wins.
_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "module", "policy")
_OPTIMIZER_KEYS = ("optimizer_states", "optimizer_state_dict", "optimizer")  # Lightning's first: a list
_HYPER_PARAMETER_KEYS = ("datamodule_hyper_parameters", "hyper_parameters")  # Lightning's; the module's win
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")  # of Hugging Face's Trainer; under FSDP
# What torch's reader raises of bytes that are no torch file, which it interprets as far as they go.
_DAMAGE = (
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError),
    *(struct.error, zipfile.BadZipFile),
)
# What no file can be blamed for; the last is new in torch 2.8.
_OF_THE_MACHINE = (
    *(OSError, ImportError, MemoryError, torch.OutOfMemoryError),
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)


@dataclass(frozen=True, eq=False)
class StoredCheckpoint:
    """A checkpoint as it lies on the disk; its tensors are read when they are used, where the format allows it.

    Args:
        kind: a folder with a PEFT ``adapter``, a folder with a whole Hugging Face ``model``, or a single ``file``.
        weights: the file's own names → tensors, on the CPU.
        config: ``adapter_config.json`` of an adapter, ``config.json`` of a model; empty otherwise.
        policy: fields of the `PolicySettings` that GRPOModule leaves in its checkpoints; None in other files.
        optimizers: raw state dicts of the optimizers in the same file.
        hyper_parameters: what Lightning kept of the module's and the datamodule's arguments.
    """

    kind: Literal["adapter", "model", "file"]
    weights: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] | None = None
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> StoredCheckpoint:
    """Read a checkpoint of any kind: a folder, a Lightning checkpoint, a state dict.

    Raises:
        FileNotFoundError: if there is nothing, or a file of it is missing.
        ValueError: if it is of another kind, damaged, or would have to be executed.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return StoredCheckpoint("file", _read_safetensors(path))
    content = _read_torch(path)
    policy = content.get("policy")
    return StoredCheckpoint(
        "file",
        _weights_in(content, path),
        policy=dict(policy) if isinstance(policy, Mapping) and isinstance(policy.get("name"), str) else None,
        optimizers=_optimizers_in(content),
        hyper_parameters={
            name: value
            for key in _HYPER_PARAMETER_KEYS
            if isinstance(content.get(key), Mapping)
            for name, value in content[key].items()
        },
    )


def read_optimizer(path: Path) -> dict[str, Any]:
    """The raw state dict of the one optimizer in a torch file, or in a Trainer's checkpoint folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no optimizer or several, is damaged, or would have to be executed.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in _OPTIMIZER_FILES if (path / name).is_file()), path / _OPTIMIZER_FILES[0])
    content = _read_torch(file)
    state = one_optimizer(_optimizers_in(content), file)
    if state is None:
        raise ValueError(
            f"expected an optimizer's state dict in {file} ('state' and 'param_groups', by itself or under one of "
            f"{', '.join(_OPTIMIZER_KEYS)}), got {_keys(content)}: save it with torch.save(optimizer.state_dict(), ...)"
        )
    return state


def one_optimizer(states: list[dict[str, Any]], path: Path) -> dict[str, Any] | None:
    """The state of the one optimizer, None where there is none.

    Raises:
        ValueError: if there are several.
    """
    if len(states) > 1:
        raise ValueError(
            f"expected one optimizer in {path}, got {len(states)}: save the state dict of the policy's with torch.save "
            "and give that file as optimizer_path"
        )
    return states[0] if states else None


def optimizer_near(path: Path) -> Path | None:
    """The ``optimizer.pt`` in a checkpoint's folder or beside it, as Hugging Face's Trainer leaves it, if there is."""
    folders = [path, path.parent] if path.is_dir() else [path.parent]
    return next((folder / name for folder in folders for name in _OPTIMIZER_FILES if (folder / name).is_file()), None)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """What is in a checkpoint's files is put to use in here, by libraries that raise whatever they stumble over.

    Args:
        path: of the checkpoint, or of the file.

    Raises:
        ValueError: in the place of an error that does not say where it comes from, or is of another kind; but for what
            no file can be blamed for (no memory, no file, no package, no device).
    """
    try:
        yield
    except _OF_THE_MACHINE:
        raise
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if wants_memory(error):  # the CPU's allocator has no error of its own, and a size in the file may be wrong
            raise ValueError(
                f"expected a checkpoint that fits into memory, got {path}, which is too large for what is free, or in "
                f"which a size is wrong: {said}"
            ) from error
        raise ValueError(
            f"expected a checkpoint that can be loaded, got {path}, in which something is of another kind than it "
            f"should be: {said}"
        ) from error


def _read_folder(folder: Path) -> StoredCheckpoint:
    shards = list(folder.glob("*.distcp"))
    if shards or (folder / ".metadata").is_file():
        raise ValueError(
            f"expected a checkpoint in one piece, got {folder} with {len(shards)} shards of a torch distributed "
            "checkpoint: gather them with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            f"({str(folder)!r}, 'gathered.pt') and load that file"
        )
    if (folder / "adapter_config.json").is_file():
        config = _read_json(folder / "adapter_config.json")
        return StoredCheckpoint("adapter", _read_parts(folder, "adapter_model"), config=config)
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        return StoredCheckpoint("model", _read_parts(folder, "model", "pytorch_model"), config=config)
    raise ValueError(
        f"expected a folder with a PEFT adapter (adapter_config.json) or a Hugging Face model (config.json), or a file "
        f"(.ckpt, .pt, .safetensors), got {folder} with neither of the two: {_entries(folder)}"
    )


def _read_parts(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The weights in a folder: one file, or the shards that an index lists."""
    for stem in stems:
        for suffix in ("safetensors", "bin"):
            file = folder / f"{stem}.{suffix}"
            index = folder / f"{file.name}.index.json"
            if file.is_file():
                return _read_part(file)
            if index.is_file():
                return {name: weight for shard in _shards(index) for name, weight in _read_part(shard).items()}
    raise FileNotFoundError(
        f"expected weights in {folder} ({stems[0]}.safetensors), found none: {_entries(folder)}. Was it saved in full?"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index lists; they lie beside it, since a name with a folder in it could lead anywhere."""
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise _damaged(index, ValueError("it has no weight_map of parameter names to file names"))
    names = sorted(set(listed.values()))
    elsewhere = [name for name in names if name in ("", "..") or PureWindowsPath(name).name != name]
    if elsewhere:
        raise ValueError(
            f"expected the names of files beside it in {index}, got {elsewhere[0]!r}: keep all shards in one folder"
        )
    return [index.parent / name for name in names]


def _read_part(file: Path) -> dict[str, Tensor]:
    return _read_safetensors(file) if file.suffix == ".safetensors" else _weights_in(_read_torch(file), file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(_there(file))
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _read_torch(file: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Detected pickle protocol"
            )  # it is refused or read: both are said
            # The old format, from before torch 1.6, cannot be mapped into memory.
            content = torch.load(
                _there(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _damaged(file, error) from error
        raise ValueError(
            f"expected tensors and plain values in {file}, got a pickled {refused[1]}, which is not loaded, since that "
            "would execute code of the file's. Keep it out of the checkpoint (a LightningModule's save_hyperparameters "
            "takes ignore=[...]); if you trust the file, load it by hand and save its 'state_dict' and "
            "'optimizer_states' alone with torch.save"
        ) from error
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch's reader has sought before the beginning of a short file
            raise
        raise _damaged(file, error) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict in {file} (name → tensor), got a {type(content).__name__}")
    return dict(content)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise _damaged(file, ValueError(f"a JSON {type(content).__name__}, not an object"))
    return content


def _weights_in(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    inner = next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), Mapping)), content)
    weights = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(
            f"expected a state dict in {path} (name → tensor), by itself or under one of {', '.join(_WEIGHT_KEYS)}; "
            f"got {_keys(content)} and no tensor: save it with torch.save(model.state_dict(), ...)"
        )
    return weights


def _optimizers_in(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    if {"state", "param_groups"} <= content.keys():
        return [dict(content)]
    inner: Any = next((content[key] for key in _OPTIMIZER_KEYS if content.get(key)), [])
    states = inner if isinstance(inner, list) else [inner]
    return [found for state in states if isinstance(state, Mapping) for found in _optimizers_in(state)]


def _there(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {file}, and there is no such file: check the path")
    return file


def _damaged(file: Path, error: Exception) -> ValueError:
    # Torch says the same of every damaged file, that it may be pickled by other means; the rest it says is its own.
    reason = "not a torch file" if isinstance(error, pickle.UnpicklingError) else str(error).strip().split("\n")[0]
    return ValueError(
        f"expected a readable checkpoint, got {file}, which is damaged or of another format: "
        f"{reason.rstrip('.') or 'it ends too early'}. If it was cut short while being saved or copied, take an "
        "earlier one"
    )


def _keys(content: Mapping[str, Any]) -> str:
    return f"keys {', '.join(map(str, list(content)[:8]))}" if content else "no keys"


def _entries(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"it has {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"
