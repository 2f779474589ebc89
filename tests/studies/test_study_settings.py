"""Settings of the studies, and the folder they work in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from entropy_pl.config import SettingsParser
from entropy_pl.studies import STUDIES
from entropy_pl.studies.folder import StudyFolder

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", STUDIES)
def test_the_example_config_is_read(name):
    file = CONFIGS / f"study_{name.replace('-', '_')}.yaml"
    settings = SettingsParser(STUDIES[name].settings).read(file)
    assert settings.output_directory == f"runs/study_{name.replace('-', '_')}"


def test_the_variance_example_spells_out_the_default_options():
    settings = STUDIES["variance"].settings
    read = SettingsParser(settings).read(CONFIGS / "study_variance.yaml")
    default = SettingsParser(settings).read({"checkpoint": {"checkpoint_path": "x"}, "output_directory": "y"})
    assert read.study.options == default.study.options


@pytest.mark.parametrize("name", STUDIES)
def test_the_config_in_a_study_folder_can_be_read_again(name, settings_of, tmp_path):
    settings = settings_of(name, tmp_path / "study", {})
    StudyFolder(name, settings)
    assert SettingsParser(STUDIES[name].settings).read(tmp_path / "study" / "config.yaml") == settings


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("convergence", {"output_directory": None}, "expected output_directory"),
        ("convergence", {"detailed_logging": {"enabled": True}}, "expected detailed_logging.enabled: false"),
        ("variance", {"attribution": {"enabled": True}}, "expected attribution.enabled: false and no counterfactuals"),
        ("convergence", {"study": {"sizes": [64]}}, "expected study.sizes between 2 and B_E = 32"),
        ("convergence", {"study": {"size": [8]}}, "did you mean 'study.sizes'"),
        ("variance", {"study": {"reference": "prefix+gae(0.8)"}}, "expected an unbiased study.reference"),
        ("variance", {"study": {"compared_to": "nothing"}}, "expected study.compared_to among the options sequence,"),
        ("variance", {"study": {"jackknife_groups": 1}}, "expected study.jackknife_groups of at least 2"),
        ("variance", {"study": {"options": [{"name": "a"}, {"name": "a"}]}}, "once, got a, a"),
        ("variance", {"study": {"options": [{"name": "a", "weighting": "none"}]}}, "study.options"),
        ("linear-regime", {"study": {"seeds": []}}, "expected study.seeds to be at least one"),
        ("linear-regime", {"study": {"seeds": [-1]}}, "expected study.seeds of at least 0"),
        ("linear-regime", {"study": {"precisions": ["float16"]}}, "study.precisions"),
        ("linear-regime", {"study": {"fit_min": 1.0, "fit_max": 0.1}}, "study.fit_min < study.fit_max"),
    ],
)
def test_wrong_settings_are_refused(name, wrong, message, settings_of, tmp_path):
    sections = {"study": {}, "output_directory": str(tmp_path)} | wrong
    sections["batch_config"] = {"B_E": 32}
    sections["checkpoint"] = {"checkpoint_path": "x"}
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        SettingsParser(STUDIES[name].settings).read(sections)


def test_a_folder_of_another_config_is_refused(settings_of, tmp_path):
    StudyFolder("convergence", settings_of("convergence", tmp_path / "study", {"sizes": [4]}))  # with nothing to keep
    folder = StudyFolder("convergence", settings_of("convergence", tmp_path / "study", {"sizes": [8]}))
    folder.add("one", seconds=1.0, rows=[])
    assert "one" in StudyFolder("convergence", settings_of("convergence", tmp_path / "study", {"sizes": [8]}))
    with pytest.raises(ValueError, match="results of another config"):
        StudyFolder("convergence", settings_of("convergence", tmp_path / "study", {"sizes": [16]}))


def test_a_folder_of_something_else_is_refused_and_left_alone(settings_of, tmp_path):
    (tmp_path / "config.yaml").write_text("of: a measurement")
    with pytest.raises(ValueError, match=r"got .* with config\.yaml: give another folder"):
        StudyFolder("convergence", settings_of("convergence", tmp_path, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_other_versions_are_told(settings_of, tmp_path):
    settings = settings_of("convergence", tmp_path / "study", {})
    StudyFolder("convergence", settings).add("one", seconds=1.0, rows=[])
    file = tmp_path / "study" / "study.json"
    identity = json.loads(file.read_text())
    file.write_text(json.dumps(identity | {"versions": identity["versions"] | {"torch": "1.0"}}))
    with pytest.warns(UserWarning, match=r"begun with torch 1\.0 and goes on with torch"):
        assert StudyFolder("convergence", settings).versions["torch"] == "1.0"


def test_cells_come_back_to_the_bit_and_an_unfinished_line_does_not(settings_of, tmp_path):
    settings = settings_of("convergence", tmp_path / "study", {})
    folder = StudyFolder("convergence", settings)
    folder.add("one", seconds=1.5, table=[{"x": 0.1 + 0.2, "y": None}, {"x": 1e-300, "y": 2.0}])
    folder.add("two", seconds=0.25, table=[{"x": float("nan"), "y": 1 / 3}])
    at_once = folder.table("table", ["two", "one"])
    with open(tmp_path / "study" / "cells.jsonl", "a") as file:
        file.write('{"schema": 1, "kind": "cell", "cell": "three", "tab')
    with pytest.warns(UserWarning, match="line 3 is not a record"):
        folder = StudyFolder("convergence", settings)
    assert "one" in folder
    assert "three" not in folder
    folder.add("three", seconds=0.0, table=[{"x": 3.0, "y": 3.0}])
    assert folder.table("table", ["two", "one"]).equals(at_once)
    assert folder.table("table", ["one"])["x"].tolist() == [0.1 + 0.2, 1e-300]
    assert folder.table("table", ["three"])["x"].tolist() == [3.0]
    assert folder.seconds(["one", "two"]) == 1.75
    assert yaml.safe_load((tmp_path / "study" / "study.json").read_text())["study"] == "convergence"
