"""What an offline measurement is given may be another run's, or spoilt: it is refused in words, and writes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from entropy_pl.cli import main
from entropy_pl.measurements import EntropyMeasurements


@pytest.fixture
def altered(run_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint after five steps, changed by a function of its content."""

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        content = torch.load(run_dir / "step-5.ckpt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "altered.ckpt")
        return tmp_path / "altered.ckpt"

    return make


def optimizer_of(run: dict[str, Any]) -> dict[str, Any]:
    return run["optimizer_states"][0]


def of_another_rank(run: dict[str, Any]) -> None:
    for entry in optimizer_of(run)["state"].values():
        entry.update({key: torch.cat([entry[key], entry[key]]) for key in ("exp_avg", "exp_avg_sq")})


def of_fewer_parameters(run: dict[str, Any]) -> None:
    state = optimizer_of(run)
    gone = state["param_groups"][0]["params"].pop()
    state["param_groups"][0].get("param_names", [None]).pop()
    del state["state"][gone]


def of_sgd(run: dict[str, Any]) -> None:
    state = optimizer_of(run)
    state["state"] = {n: {"momentum_buffer": entry["exp_avg"]} for n, entry in state["state"].items()}


def spoilt_moment(run: dict[str, Any]) -> None:
    optimizer_of(run)["state"][0]["exp_avg"][0, 0] = math.nan


def spoilt_weight(run: dict[str, Any]) -> None:
    name = next(name for name in run["state_dict"] if "q_proj.lora_B" in name)
    run["state_dict"][name][0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_another_rank, ["the optimizer state of the model's 28 trainable", "Shapes in the model and in the file"]),
        (of_fewer_parameters, ["trainable parameters", "Give the model as it was trained"]),
        (of_sgd, ["expected the state of torch's Adam or AdamW", "momentum_buffer", "SGD's"]),
        (spoilt_moment, ["expected finite moments", "exp_avg of ", "lora_A", "earlier checkpoint"]),
        (spoilt_weight, ["finite", "lora_"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_belong_or_is_spoilt_is_named(change, words, altered, config, tmp_path):
    path, results = altered(change), tmp_path / "results"
    sections = config(checkpoint={"checkpoint_path": str(path)}, output_directory=str(results))
    with pytest.raises((ValueError, ArithmeticError)) as raised:
        EntropyMeasurements(sections).run_experiments()
    for word in words:
        assert word in str(raised.value)
    assert list(results.iterdir()) == []


def test_weights_that_collapse_are_said_so_with_the_results(config, tmp_path, capsys):
    """At 50 and at 100 times the learning rate; the learning rate itself is well."""
    file, folder = tmp_path / "measure.yaml", tmp_path / "results"
    file.write_text(yaml.safe_dump(config(output_directory=str(folder))))
    main(
        [
            "measure",
            f"--config={file}",
            "--batch_config.B_E=64",
            "--batch_config.completions_per_prompt=2",
            "--estimator.eta_list=[1e-2, 0.5, 1.0]",
        ]
    )
    results, out = json.loads((folder / "results.json").read_text()), capsys.readouterr().out
    assert [point["true"]["trustworthy"] for point in results["sweep"]] == [True, False, False]
    assert (results["status"], results["untrustworthy_from"]) == ("ok", 0.5)
    assert any("ΔH must not be used at η = 0.5" in warning for warning in results["warnings"])
    assert "ΔH must not be used at η = 0.5" in " ".join(out.split())
    assert "! ΔH not to be trusted" in " ".join(out.split())


def test_an_e_batch_of_one_prompt_has_no_error_bar(config, tmp_path):
    sections = config(batch_config={"B_E": 4, "completions_per_prompt": 4}, output_directory=str(tmp_path / "results"))
    with pytest.raises(ValueError, match=r"2 .*completions of one prompt|at least 2"):
        EntropyMeasurements(sections).run_experiments()
