"""`entropy-pl measure` as a person meets it."""

from __future__ import annotations

import json

import yaml

from entropy_pl.cli import main


def test_measure_prints_the_sweep_and_where_things_are(config, tmp_path, capsys):
    file, folder = tmp_path / "measure.yaml", tmp_path / "results"
    file.write_text(yaml.safe_dump(config(output_directory=str(folder))))
    main(["measure", f"--config={file}", "--estimator.eta_list=[1e-3, 2e-3, 4e-3]"])
    out = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert [point["eta"] for point in results["sweep"]] == [1e-3, 2e-3, 4e-3]
    for words in ("0.001", "0.002", "0.004", f"H = {results['entropy']['value']:.4f} ±", "N = 16"):
        assert words in out
    assert "log-log slope" in out
    assert str(folder / "results.json") in out
