"""Configs of ``measure`` and ``study``, as files, as dicts and as words: read, or refused with the key or the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import SHARES, check, names_in
from mutate import LAUGHS, Mutator
from watch import watched

from entropy_pl.config import SettingsParser
from entropy_pl.measurements import MeasurementSettings
from entropy_pl.studies import STUDIES

CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS = {"measure": MeasurementSettings} | {
    f"study_{name.replace('-', '_')}": study.settings for name, study in STUDIES.items()
}
KEYS = [
    *("checkpoint", "checkpoint.checkpoint_path", "update.lr", "seed", "batch_config", "config", "estimator.eta_list"),
    *("update.rewards", "nothing.at_all", "study.sizes"),
]


def test_the_shares_are_a_thousand():
    assert sum(SHARES.values()) == 1000


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config(name, tmp_path):
    """As a file with broken text, or as a file or dict with broken content."""
    parser = SettingsParser(SETTINGS[name])
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    good = yaml.safe_load(text)
    file = tmp_path / "broken.yaml"

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        if mutator.random.random() < 0.3:
            file.write_bytes(mutator.text(text))
            return lambda: parser.read(file), [file.name, *names_in(good)]
        content, touched = mutator.broken(good)
        names = [str(key) for path in touched for key in path]
        if mutator.random.random() < 0.5:
            return lambda: parser.read(content), names
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return lambda: parser.read(file), [file.name, *names]

    check(name, case)


def test_words():
    parser = SettingsParser(MeasurementSettings)

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        words: list[str] = []
        for _ in range(mutator.random.randint(1, 3)):
            key, value = mutator.random.choice(KEYS), mutator.hostile()
            value = mutator.random.choice([str, json.dumps])(value) if not isinstance(value, str) else value
            words += mutator.random.choice(
                [[f"--{key}", value], [f"--{key}={value}"], [f"--{key}"], [value], [f"-{key}", value]]
            )
        # a required key that is missing, or a word that is not `--KEY VALUE`, is answered with those
        return lambda: parser.parse(words), [*words, *KEYS, "--KEY"]

    check("words", case)


def refusal(source: Any) -> str:
    with pytest.raises(ValueError, match=r".") as raised, watched() as seen:
        SettingsParser(MeasurementSettings).read(source)
    assert not seen
    return str(raised.value)


@pytest.mark.parametrize(
    "value",
    ["!!bool maybe", "!!int x", "!!timestamp x", "[" * 3_000, LAUGHS, "{a: " * 60 + "1" + "}" * 60],
    ids=["bool", "int", "timestamp", "deep", "laughs", "nested"],
)
def test_yaml_that_is_no_config(value, tmp_path):
    """Found by the cases: PyYAML's KeyError, ValueError, AttributeError and RecursionError; 8⁹ values."""
    file = tmp_path / "config.yaml"
    file.write_text(f"checkpoint: {value}\n")
    assert "config.yaml" in refusal(file)


def test_a_number_that_no_float_can_be():
    """It was an OverflowError."""
    given = {"checkpoint": {"checkpoint_path": "x"}}
    assert refusal(given | {"update": {"lr": 10**400}}).startswith("update.lr: expected a number that a float has room")
    assert refusal(given | {"estimator": {"eta_list": [1e-5, 10**400]}}).startswith("estimator.eta_list: ")
    for text in ("9" * 400, "-1" + "0" * 400):
        assert refusal(given | {"estimator": {"eta_list": [text]}}).startswith("estimator.eta_list: ")


def test_what_a_section_refuses_is_told_with_its_name():
    """Its own words do not always name a key."""
    given = {"checkpoint": {"checkpoint_path": "x"}}
    assert refusal(given | {"update": {"rewards": ["b"]}}).startswith("update: expected a reward out of")
    assert refusal(given | {"estimator": {"eta_list": [float("nan")]}}).startswith("estimator: expected every number")
