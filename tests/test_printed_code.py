"""The Python that pages of docs/ print, run as printed. README, offline.md and extending.md have tests of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from printed import PAGES, blocks, run_blocks
from tiny import build_model, build_tokenizer

from entropy_pl import sample_completions
from entropy_pl.attribution import UpdateBatch
from entropy_pl.reporting import read_records

TESTED = {  # page → where its code is run
    "README.md": "tests/test_readme.py",
    "docs/attaching-to-lightning.md": "tests/test_printed_code.py",
    "docs/attaching-to-trl.md": "tests/test_printed_code.py",
    "docs/attaching.md": "tests/test_printed_code.py",
    "docs/attribution.md": "tests/test_printed_code.py",
    "docs/extending.md": "tests/test_extending.py",
    "docs/offline.md": "tests/measurements/test_offline_page.py",
    "docs/precision.md": "tests/test_printed_code.py",
    "docs/reading-the-curves.md": "tests/runs/test_run.py",
}


def test_all_python_that_is_printed_is_run():
    assert TESTED.keys() == {page for page in PAGES if blocks(page)}


@pytest.fixture(scope="module")
def lightning_run(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the Lightning page's code has run, and its names."""
    folder = tmp_path_factory.mktemp("lightning")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run_blocks("docs/attaching-to-lightning.md", {"folder": tiny_policy_dir})


@pytest.fixture(scope="module")
def trl_run(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the TRL page's code has run."""
    pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    folder = tmp_path_factory.mktemp("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_blocks("docs/attaching-to-trl.md", {"folder": tiny_policy_dir})
    return folder / "run"


def test_attaching_to_lightning(lightning_run):
    folder, scope = lightning_run
    records = read_records(folder / "entropy_probe/records.jsonl")  # where the page says
    assert [(record["step"], record["status"]) for record in records] == [(0, "ok"), (10, "ok"), (20, "ok")]
    early = scope["Early"](prompts=["1+1="])
    assert [step for step in range(301) if early.is_due(step)] == [*range(10), 100, 200, 300]


@pytest.mark.slow
def test_attaching_to_trl(trl_run):
    records = read_records(trl_run / "entropy_probe/records.jsonl")
    assert [(record["step"], record["status"]) for record in records] == [(0, "ok"), (10, "ok")]
    assert all(record["attribution"] and record["exchange_rate"] for record in records)


def test_reading_records(lightning_run, monkeypatch, capsys):
    folder, _ = lightning_run
    monkeypatch.chdir(folder)
    run_blocks("docs/attaching.md", {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    taken = [next(p for p in record["sweep"] if p["taken"]) for record in read_records("entropy_probe/records.jsonl")]
    assert [line[0] for line in lines] == ["0", "10", "20"]
    assert [float(line[1]) for line in lines] == [point["true"]["value"] for point in taken]


@pytest.mark.slow
def test_attributed_tokens(trl_run, monkeypatch, tmp_path):
    monkeypatch.chdir(trl_run)
    run_blocks("docs/attribution.md", {}, slice(0, 1))
    assert (trl_run / "share.png").stat().st_size > 5_000  # a picture with something in it


def test_a_module_of_ones_own_supplies_its_batch():
    scope = run_blocks("docs/attribution.md", {"LightningModule": LightningModule}, slice(1, 2))
    module = scope["MyModule"]()
    module.rollout = sample_completions(build_model(), build_tokenizer(), ["1+1=", "2+2="], max_new_tokens=4)
    module.coefficients = torch.zeros(module.rollout.completion_mask.shape)
    module.advantages = torch.tensor([1.0, -1.0])
    batch = module.update_batch()
    assert isinstance(batch, UpdateBatch)
    assert batch.rollout is module.rollout


def test_sampler_and_scorer_compared_by_hand():
    scope = {"evaluation_prompts": ["1+1=", "what is 2+2="], "tokenizer": build_tokenizer()}
    scope["model"] = build_model(max_position_embeddings=128)
    assert run_blocks("docs/precision.md", scope, slice(0, 1))["gap"].mean < 1e-5  # float32's rounding


def test_a_float64_pass():
    model, tokenizer = build_model(), build_tokenizer()
    rollout = sample_completions(model, tokenizer, ["1+1=", "2+2="], max_new_tokens=4)
    stats = run_blocks("docs/precision.md", {"model": model, "rollout": rollout}, slice(1, 2))["stats"]
    model.double()  # of this tiny model's passes float32 casts are all that a double model lacks: to float32's 1e-7
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1).long()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logp = logits[:, rollout.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
    expected = logp.gather(2, rollout.completion_ids[..., None])[..., 0]
    real = rollout.completion_mask.bool()
    assert stats.logp[real].tolist() == pytest.approx(expected[real].tolist(), abs=1e-5)
    assert stats.logp.dtype == torch.float64
