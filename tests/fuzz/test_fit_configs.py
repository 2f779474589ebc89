"""Configs of ``fit``, through LightningCLI's own parser and up to the model, the data and the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import check, names_in
from mutate import Mutator
from watch import Payload, watched

from entropy_pl import training
from entropy_pl.config import UsageError
from entropy_pl.training import EntropyCLI, RunWatch, run_fit

CONFIGS = Path(__file__).parents[2] / "configs"


class ParsedError(BaseException):
    """As far as a first run goes here."""


@pytest.fixture(scope="module")
def cli() -> EntropyCLI:
    """A command line that has parsed once: making its parser takes ten times as long as using it."""
    made = []

    def stop(self: EntropyCLI) -> None:
        made.append(self)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EntropyCLI, "before_instantiate_classes", stop)
        with pytest.raises(ParsedError):
            training._run(["fit", f"--config={CONFIGS / 'quickstart.yaml'}"], RunWatch())
    return made[0]


@pytest.fixture
def refuse(cli, tmp_path, monkeypatch) -> Callable[[bytes], None]:
    """``fit`` with a config file of these bytes, which it may refuse; no model is loaded, and no step made."""
    file = tmp_path / "broken.yaml"

    def parse_only(words: list[str], watch: RunWatch) -> None:
        cli.watch = watch
        cli.parse_arguments(cli.parser, words)
        cli.instantiate_classes()

    monkeypatch.setattr(training, "_run", parse_only)

    def run(content: bytes) -> None:
        file.write_bytes(content)
        run_fit(["fit", "--config", str(file)])

    return run


@pytest.fixture
def good() -> dict[str, Any]:
    return configured("quickstart")


def configured(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return content | {"trainer": content["trainer"] | {"accelerator": "cpu", "logger": False}}


@pytest.mark.parametrize("name", ["quickstart", "grpo_gsm8k"])
def test_a_config_of_fit(name, refuse):
    """A class_path may import what it names, here alone: callbacks and loggers of one's own come in by it."""
    content = configured(name)

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        if mutator.random.random() < 0.2:
            data = mutator.text(yaml.safe_dump(content))
            return lambda: refuse(data), ["broken.yaml", *names_in(content)]
        broken, touched = mutator.broken(content)
        data = yaml.safe_dump(broken).encode()
        return lambda: refuse(data), ["broken.yaml", *(str(key) for path in touched for key in path)]

    check(f"fit {name}", case, (UsageError,), imports=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"entropy_coefficient": None}}, "model.entropy_coefficient: expected float, got null"),
        ({"trainer": 3}, "trainer: "),
        ({"probe": {"": 1}}, "broken.yaml"),
        ({"model": {5: 1}}, "broken.yaml"),
        ({"probe": "\x00"}, "broken.yaml"),
        ({"model": {"reward_weights": [10**400, 1]}}, "reward_weights"),
        ({"data": {"prompt_template": "no place"}}, "data: expected a prompt template that contains {question}"),
        ({"model": {"reward_weights": [1.0]}}, "model: expected one weight per reward"),
    ],
    ids=["null", "number for a section", "empty key", "key of a number", "nul", "huge", "of the data", "of the model"],
)
def test_the_key_or_the_file_is_named(change, message, good, refuse):
    """Found by the cases: TypeErrors, OverflowErrors, and words that left open where to look."""
    for section, keys in change.items():
        good[section] = good[section] | keys if isinstance(keys, dict) else keys
    with pytest.raises(UsageError) as raised:
        refuse(yaml.safe_dump(good).encode())
    assert message in str(raised.value)


def test_a_checkpoint_to_resume_from_is_read_before_lightning_loads_it(good, refuse, tmp_path):
    """Lightning's own loading unpickles what it finds."""
    file = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": Payload(tmp_path / "executed")}, file)
    with watched() as seen, pytest.raises(UsageError, match=r"evil\.ckpt, got a pickled \w+\.system"):
        refuse(yaml.safe_dump(good | {"ckpt_path": str(file)}).encode())
    assert not seen
    assert not (tmp_path / "executed").exists()
