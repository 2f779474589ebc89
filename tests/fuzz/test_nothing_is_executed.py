"""No way leads from a file to code: neither in this package's own lines, nor through the libraries it reads with."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mutate import SENTINEL
from peft import LoraConfig
from watch import Payload, watched

import entropy_pl
from entropy_pl.policy import LoraSettings, load_checkpoint, load_policy

ROOT = Path(__file__).parents[2]
SOURCES = sorted(file for folder in ("entropy_pl", "callbacks") for file in (ROOT / folder).rglob("*.py"))
# name of the function → what a call of it must say
DEMANDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "yaml.full_load"),
    *("joblib.load", "dill.load", "marshal.loads", "shelve.open", "torch.hub.load", "os.system"),
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call and the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults(source: str) -> list[str]:
    """What a module does that could execute what a file holds."""
    found = []
    for name, call in calls(ast.parse(source)):
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        key, value = DEMANDED.get(name, ("", None))
        if key and said.get(key) != str(value):
            found.append(f"{name} without {key}={value}, line {call.lineno}")
        if name in FORBIDDEN or said.get("trust_remote_code", "False") != "False":
            found.append(f"{name}, line {call.lineno}")
        if name == "yaml.load" and not said.get("Loader", "").endswith("_Loader"):
            found.append(f"yaml.load with {said.get('Loader')}, line {call.lineno}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_evaluates(path):
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        *("torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "pickle.loads(b)"),
        *(
            "eval(x)",
            "yaml.load(f, Loader=yaml.Loader)",
            "yaml.load(f)",
            "A.from_pretrained(x, trust_remote_code=True)",
        ),
    ],
)
def test_such_a_line_is_seen(line):
    assert len(faults(line)) == 1


def test_the_config_loader_is_a_safe_one():
    import yaml

    from entropy_pl.config import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_the_payload_is_one_and_is_seen(tmp_path):
    """What these tests and the cases look for would be there."""
    buffer = io.BytesIO()
    torch.save(Payload(tmp_path / "executed"), buffer)
    buffer.seek(0)
    with watched() as seen:
        torch.load(buffer, weights_only=False)
        with pytest.raises(ModuleNotFoundError):
            __import__(SENTINEL)
    assert (tmp_path / "executed").exists()
    assert any(event.startswith("os.system") for event in seen)
    assert any(event.startswith("pickle.find_class") for event in seen)
    assert f"import of {SENTINEL}" in seen


def adapter_folder(folder: Path, policy_dir: Path, **config: object) -> Path:
    model = load_policy(str(policy_dir), lora=LoraSettings(rank=2, alpha=4, target_modules=["q_proj"])).model
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_an_adapters_config_names_no_module(tiny_policy_dir, tmp_path):
    """PEFT imports ``megatron_core`` where there is a ``megatron_config``; older ones whatever module that is."""
    assert {"megatron_config", "megatron_core"} <= LoraConfig().to_dict().keys()
    folder = adapter_folder(
        tmp_path / "adapter",
        tiny_policy_dir,
        megatron_config={"hidden_size": 1},
        megatron_core=SENTINEL,
        auto_mapping={"base_model_class": "X", "parent_library": SENTINEL},
    )
    with watched() as seen, pytest.raises(ValueError, match=r"megatron_config in its adapter_config\.json"):
        load_checkpoint(folder)
    assert not seen


def test_the_trainers_arguments_are_never_opened(tiny_policy_dir, tmp_path):
    """``training_args.bin`` is a pickle; a folder that has one is loaded without it."""
    folder = adapter_folder(tmp_path / "adapter", tiny_policy_dir)
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    (folder / "rng_state.pth").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    opened = []

    def open_(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and listening:
            opened.append(os.path.basename(arguments[0]))

    listening = True
    sys.addaudithook(open_)
    try:
        with watched() as seen:
            load_checkpoint(folder)
    finally:
        listening = False
    assert "adapter_config.json" in opened
    assert not {"training_args.bin", "rng_state.pth"} & set(opened)
    assert not seen
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_offline_commands_import_nothing_that_a_config_names(tmp_path):
    """A process of its own, whole: ``measure`` with a module that lies ready to be imported."""
    (tmp_path / f"{SENTINEL}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nclass X: pass\n")
    spec = {"class_path": f"{SENTINEL}.X"}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"checkpoint": {"checkpoint_path": "x", "lora": spec}}))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(entropy_pl.__file__).parents[1]}"}
    command = [sys.executable, "-m", "entropy_pl.cli", "measure", "--config", str(config)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "unknown key 'checkpoint.lora.class_path'" in ended.stderr
    assert not (tmp_path / "executed").exists()
