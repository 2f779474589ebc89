"""The demo teaches something: its reward rises, and its probes say what the entropy did meanwhile."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from entropy_pl.cli import main
from entropy_pl.reporting import read_records

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
SEEDS = [int(seed) for seed in os.environ.get("ENTROPY_PL_DEMO_SEEDS", "0").split(",")]


@pytest.mark.parametrize("seed", SEEDS)
def test_reward_rises_and_every_probe_stands(tmp_path, seed, capsys):
    """Mean reward of the last fifth of the steps exceeds the first fifth's by at least 0.1."""
    logger = f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, name: demo}}}}"
    main(["fit", f"--config={CONFIG}", f"--trainer.logger={logger}", f"--model.seed={seed}", f"--data.seed={seed}"])
    shown = capsys.readouterr().out
    with open(tmp_path / "demo/version_0/metrics.csv", newline="") as file:
        rewards = [float(row["train/reward"]) for row in csv.DictReader(file) if row["train/reward"]]
    assert len(rewards) == 40
    fifth = len(rewards) // 5
    first, last = sum(rewards[:fifth]) / fifth, sum(rewards[-fifth:]) / fifth
    with capsys.disabled():
        print(f"\nseed {seed}: mean reward {first:.3f} in the first fifth of the steps, {last:.3f} in the last")
    assert last - first >= 0.1
    records = read_records(tmp_path / "demo/version_0/entropy_probe/records.jsonl")
    assert [record["status"] for record in records] == ["ok"] * 8
    assert "ΔH ± SE" in shown
    assert "delta_entropy.png" in shown
