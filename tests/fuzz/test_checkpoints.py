"""Checkpoints of every kind: loaded, or refused by name; what is in them is never executed."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import check
from mutate import Mutator
from watch import Payload

from entropy_pl.policy import LoraSettings, checkpoint_weights, load_checkpoint, load_policy
from entropy_pl.policy.stored import named, read_checkpoint, read_optimizer
from entropy_pl.updates import match_optimizer_state

LORA = LoraSettings(rank=2, alpha=4, target_modules=["q_proj"])
REFUSALS = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def policy(tiny_policy_dir):
    return load_policy(str(tiny_policy_dir), lora=LORA)


@pytest.fixture(scope="module")
def optimizer_state(policy) -> dict[str, Any]:
    """AdamW's after one step."""
    trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    for parameter in trainable:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()


@pytest.fixture(scope="module")
def lightning(policy, optimizer_state, tiny_policy_dir) -> dict[str, Any]:
    """What a ``.ckpt`` of GRPOModule holds."""
    return {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.{name}": p.detach() for name, p in policy.model.named_parameters() if p.requires_grad},
        "optimizer_states": [optimizer_state],
        "lr_schedulers": [],
        "hyper_parameters": {"num_generations": 4, "temperature": 1.0},
        "policy": {
            **{"name": str(tiny_policy_dir), "dtype": "float32", "attn_implementation": None, "adapter": None},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj"]},
        },
    }


@pytest.fixture(scope="module")
def adapter(policy, optimizer_state, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    policy.model.save_pretrained(folder)
    torch.save(optimizer_state, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
    return folder


def shortened(value: object) -> str:
    """Of a parameter, for the test's name."""
    return str(value)[:40]


def packed(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def spoilt(mutator: Mutator, content: dict[str, Any], marker: Path) -> Any:
    """Other keys and values, tensors of other shapes and kinds, and at times a pickle that would run a command."""
    broken = mutator.broken(content)[0]
    if mutator.random.random() < 0.15 and isinstance(broken, dict):
        broken[mutator.random.choice(["callbacks", "policy", "state_dict", "optimizer_states"])] = Payload(marker)
    if mutator.random.random() < 0.3 and isinstance(broken, dict) and isinstance(broken.get("state_dict"), dict):
        weights = broken["state_dict"]
        name = mutator.random.choice(sorted(map(str, weights)) or ["x"])
        weights[name] = mutator.random.choice(odd_tensors())
    return broken


def odd_tensors() -> list[Any]:
    return [
        *(
            torch.zeros(0),
            torch.tensor(1.0),
            torch.zeros(3, 3),
            torch.full((2, 32), torch.nan),
            torch.ones(2, 32).int(),
        ),
        *(
            torch.ones(2, 32).bool(),
            torch.ones(2, 32, dtype=torch.complex64),
            torch.ones(32, 2),
            torch.ones(2, 32).half(),
        ),
        *(torch.sparse_coo_tensor([[0], [0]], [1.0], (2, 32)), torch.ones(2, 32, device="meta"), "text", None, [1.0]),
    ]


def test_a_lightning_checkpoint(lightning, policy, tmp_path):
    file, marker = tmp_path / "broken.ckpt", tmp_path / "executed"

    def load(whole: bool) -> None:
        if whole:
            load_checkpoint(file)
        else:
            checkpoint_weights(file, policy.model)

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        data = packed(lightning) if mutator.random.random() < 0.2 else packed(spoilt(mutator, lightning, marker))
        file.write_bytes(mutator.bytes(data) if mutator.random.random() < 0.3 else data)
        whole = mutator.random.random() < 0.3
        return lambda: load(whole), [str(file), "owner/repository"]

    check("lightning", case, (*REFUSALS, OSError))  # the last: of a base model that only the hub could have
    assert not marker.exists()


def test_an_optimizer(optimizer_state, policy, tmp_path):
    file, marker = tmp_path / "optimizer.pt", tmp_path / "executed"
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        content = mutator.broken(optimizer_state)[0]
        if mutator.random.random() < 0.05:
            content = {"state": Payload(marker), "param_groups": []}
        data = packed(content)
        file.write_bytes(mutator.bytes(data) if mutator.random.random() < 0.2 else data)
        names = [str(file), "param_groups", "state[", "in state of", "exp_avg", "moments", "entries", "a group", "keys"]
        return lambda: match_optimizer_state(read_optimizer(file), parameters), names

    check("optimizer", case, (ValueError,))
    assert not marker.exists()


def test_an_adapters_folder(adapter, tiny_policy_dir, tmp_path):
    marker = tmp_path / "executed"

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter, folder)
        config = folder / "adapter_config.json"
        (folder / "training_args.bin").write_bytes(pickle.dumps(Payload(marker), protocol=2))
        kind = mutator.random.randrange(6)
        if kind <= 2:
            config.write_text(json.dumps(mutator.broken(json.loads(config.read_text()))[0]))
        elif kind == 3:
            config.write_bytes(mutator.text(config.read_text()))
        elif kind == 4:
            weights = folder / "adapter_model.safetensors"
            weights.write_bytes(header_broken(mutator, weights.read_bytes()))
        else:
            (folder / "trainer_state.json").write_bytes(mutator.bytes(b'{"global_step": 1, "log_history": []}'))
            (folder / "adapter_model.safetensors").unlink()
            (folder / "adapter_model.bin").write_bytes(mutator.bytes(packed(Payload(marker))))
        return lambda: load_checkpoint(folder, backbone=str(tiny_policy_dir)), [str(folder), "adapter"]

    check("adapter", case, REFUSALS)
    assert not marker.exists()


def header_broken(mutator: Mutator, data: bytes) -> bytes:
    """A safetensors file whose header says something else of its tensors."""
    if mutator.random.random() < 0.3:
        return mutator.bytes(data)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(mutator.broken(json.loads(data[8 : 8 + size]))[0]).encode()
    claimed = mutator.random.choice([len(header)] * 3 + [0, 2**63, len(header) + 1])
    return struct.pack("<Q", claimed) + header + data[8 + size :]


MODEL_FILES = ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def test_a_whole_models_folder(tiny_policy_dir, tmp_path):
    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        folder = tmp_path / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_policy_dir, folder)
        file = folder / mutator.random.choice(MODEL_FILES)
        if mutator.random.random() < 0.1:
            weights = folder / "model.safetensors"
            weights.write_bytes(header_broken(mutator, weights.read_bytes()))
        elif mutator.random.random() < 0.2:
            file.write_bytes(mutator.bytes(file.read_bytes()))
        else:
            file.write_text(json.dumps(mutator.broken(json.loads(file.read_text()))[0]))
        return lambda: load_checkpoint(folder), [str(folder)]

    check("model", case, (ValueError, OSError))


def test_an_index_of_shards(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model-1.bin")
    index = {"metadata": {"total_size": 8}, "weight_map": {"w": "pytorch_model-1.bin", "x": "pytorch_model-1.bin"}}

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        file = folder / "pytorch_model.bin.index.json"
        text = json.dumps(mutator.broken(index)[0])
        file.write_bytes(mutator.bytes(text.encode()) if mutator.random.random() < 0.2 else text.encode())
        return lambda: read_checkpoint(folder), [str(folder)]

    check("shards", case, REFUSALS)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("param_groups",), 3),
        (("param_groups", 0), "x"),
        (("param_groups", 0, "params"), None),
        (("param_groups", 0, "params"), [{}]),
        (("param_groups", 0, "param_names"), ["one"]),
        (("param_groups", 0, "lr"), {}),
        (("param_groups", 0, "lr"), 10**400),
        (("param_groups", 0, "betas"), [0.9, 0.99, 0.999]),
        (("param_groups", 0, "betas"), True),
        (("state",), []),
        (("state", 0), [1]),
        (("state", 0, "step"), {}),
        (("state", 0, "exp_avg"), 1.0),
        (("state", 0, "exp_avg_sq"), "x"),
        (("state", 0, "exp_avg_sq"), torch.ones(2, 32, device="meta")),
        (("state", 0, "exp_avg"), torch.ones(2, 32, dtype=torch.int64)),
    ],
    ids=shortened,
)
def test_the_place_in_an_optimizers_state_is_named(place, value, optimizer_state, policy):
    """Found by the cases: 41 of the first 100 ended in a KeyError, TypeError or AttributeError."""
    state = copy.deepcopy(optimizer_state)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    name = place[0] + "".join(f"[{key!r}]" for key in place[1:])
    with pytest.raises(ValueError, match=rf"expected .* in {re.escape(name)} of the optimizer's state, got"):
        match_optimizer_state(state, parameters)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attn_implementation", 1.5, "attn_implementation: expected str or null, got 1.5"),
        ("attn_implementation", "none of them", "none of them"),
        ("lora", {"rank": "x"}, "lora.rank"),
        ("lora", {"rank": 2, "alhpa": 4}, "lora.alpha"),
        ("name", 5, "name"),
    ],
)
def test_saved_settings_are_checked(key, value, message, lightning, tmp_path):
    """They were handed on as they are, for Transformers to stumble over."""
    file = tmp_path / "broken.ckpt"
    torch.save(lightning | {"policy": lightning["policy"] | {key: value}}, file)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_checkpoint(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"num_attention_heads": "x"}),
        ("config.json", {"layer_types": ["full_attention", 2]}),
        ("config.json", {"model_type": 2}),
        ("tokenizer_config.json", {"pad_token": 5}),
        ("tokenizer_config.json", {"tokenizer_class": {}}),
        ("tokenizer.json", {"model": {}}),
    ],
    ids=shortened,
)
def test_a_models_folder_is_named(file, change, tiny_policy_dir, tmp_path):
    """Transformers' validation errors, its TypeErrors and AttributeErrors name neither folder nor file."""
    folder = shutil.copytree(tiny_policy_dir, tmp_path / "whole")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    for load in (load_checkpoint, lambda path: load_policy(str(path), lora=None)):
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"eva_config": 1},
        {"task_type": "True"},
        {"target_modules": [{}]},
        {"lora_alpha": 10**400},
        {"layers_pattern": "x"},
    ],
    ids=shortened,
)
def test_an_adapters_folder_is_named(change, adapter, tiny_policy_dir, tmp_path):
    """PEFT's errors, likewise."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load_checkpoint(folder, backbone=str(tiny_policy_dir))


def test_archives_that_are_hardly_any(tmp_path):
    """Found by the cases: what Python's zipfile and torch's own reader raise of one wrong byte."""
    data = packed({"w": torch.ones(2)})
    disks = data.index(b"PK\x06\x07") + 16  # of the archive's last records: the number of disks it lies on
    (tmp_path / "disks.pt").write_bytes(data[:disks] + b"\x02" + data[disks + 1 :])
    with zipfile.ZipFile(tmp_path / "tensor.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02K\x05Q.")  # "the tensor with the number 5"; others have a name
        archive.writestr("archive/version", "3\n")
    for name in ("disks.pt", "tensor.pt"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}, which is damaged or of another format"):
            read_checkpoint(tmp_path / name)


def test_what_does_not_fit_into_memory_is_said_to(tmp_path):
    """The CPU's allocator raises a RuntimeError, and a file that asks for too much has it raise one."""
    said = f"expected a checkpoint that fits into memory, got {tmp_path}, which is too large for what is free"
    with pytest.raises(ValueError, match=re.escape(said)), named(tmp_path):
        torch.empty(2**60)


def test_out_of_memory_is_no_fault_of_the_file(tmp_path):
    for error in (MemoryError("no room"), torch.OutOfMemoryError("no room"), FileNotFoundError("gone")):
        with pytest.raises(type(error)), named(tmp_path):
            raise error
