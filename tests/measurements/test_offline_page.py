"""The Python of docs/offline.md, run as printed, on a measurement with a detailed log."""

from __future__ import annotations

import pytest
import yaml
from printed import blocks, run_blocks

from entropy_pl import TokenStats


def classical_slope(base: TokenStats, tangent: TokenStats) -> float:
    """δH₁ per unit η and token under `sequence` weighting, by its closed form in loops: theory.md, §4."""
    N, T = base.mask.shape
    here = [[k for k in range(T) if base.mask[i, k]] for i in range(N)]
    length = sum(map(len, here)) / N
    mean = sum(float(base.entropy[i, k]) for i in range(N) for k in here[i]) / (N * length)
    slopes = [
        sum(float(tangent.entropy[i, k]) for k in here[i])
        + sum(float(tangent.logp[i, k]) for k in here[i]) * sum(float(base.entropy[i, k]) - mean for k in here[i])
        for i in range(N)
    ]
    return sum(slopes) / N / length


def test_the_page(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = {"enabled": True, "level": "debug", "output_directory": "logs/entropy"}  # the page's folder; with tensors
    (tmp_path / "measure.yaml").write_text(yaml.safe_dump(config(detailed_logging=log)))
    assert len(blocks("docs/offline.md")) == 3
    scope = run_blocks("docs/offline.md", {}, slice(0, 1))
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.count(" ") == 3]
    sweep = scope["results"]["sweep"]
    assert [float(words[1]) for words in shown] == [point["deltaH_true"] for point in sweep]

    run_blocks("docs/offline.md", scope, slice(1, 2))
    influences = [abs(record["sweep"][-1]["influence"]) for record in scope["sequences"]]
    assert len(influences) == 16
    assert [abs(record["sweep"][-1]["influence"]) for record in scope["loudest"]] == sorted(influences)[:-4:-1]

    capsys.readouterr()
    run_blocks("docs/offline.md", scope, slice(2, 3))
    printed = float(capsys.readouterr().out.split()[0])
    assert printed == pytest.approx(classical_slope(scope["base"], scope["tangent"]), rel=1e-3)  # printed to 4 digits
