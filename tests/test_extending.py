"""What docs/extending.md prints does what it says: a backbone, a dataset, a reward, an estimator."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from printed import blocks, commands, lines_of

from entropy_pl import PromptDataModule, load_policy, record_update, sample_completions
from entropy_pl.reporting import read_records

PAGE = "docs/extending.md"
BACKBONE, DATASET, REWARD, RUN, SCRIPT, ESTIMATOR, USE = blocks(PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody has followed the page."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "my_things.py").write_text("\n\n".join([BACKBONE, DATASET, REWARD, ESTIMATOR]))
    (folder / "my_run.py").write_text(SCRIPT)
    return folder


@pytest.fixture
def things(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's functions, registered; a name is registered once in a process."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    import my_things

    return my_things


@pytest.mark.parametrize(
    "code", [BACKBONE, DATASET, REWARD, ESTIMATOR], ids=("backbone", "dataset", "reward", "estimator")
)
def test_each_takes_less_than_twenty_lines(code):
    assert len(lines_of(code)) < 20


def test_the_backbone_loads_by_its_name(things, folder):
    model, tokenizer = load_policy("tiny_llama")
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    assert (folder / "tiny_llama/config.json").is_file()
    assert tokenizer.decode(tokenizer("7 * 8 = ")["input_ids"]) == "7 * 8 = "


def test_the_dataset_comes_through_the_datamodule(things):
    data = PromptDataModule("times_tables", e_size=64, batch_size=4)
    products = {f"{a} * {b} = ": str(a * b) for a in range(2, 20) for b in range(2, 20)}
    assert len(set(data.e_prompts)) == 64
    assert set(data.e_prompts) | set(data.u_prompts) <= products.keys()
    assert not set(data.e_prompts) & set(data.u_prompts)
    for batch in data.train_dataloader():
        assert batch.answers == [products[prompt] for prompt in batch.prompts]


def test_all_three_in_a_run(things, folder):
    scope: dict[str, Any] = {}
    exec(RUN, scope)
    assert [(record["step"], record["status"]) for record in scope["probe"].records] == [(0, "ok"), (1, "ok")]
    assert all(0 < record["reward"] <= 1 for record in scope["probe"].records)  # 1/(1 + length), never 0
    metrics = scope["module"].trainer.callback_metrics
    assert metrics["train/reward"] == metrics["train/reward_brief"]
    before, after = load_policy("tiny_llama")[0], scope["module"].model
    moved = [
        name for name, p in after.named_parameters() if p.requires_grad and bool((p != 0).any()) and "lora_B" in name
    ]
    assert moved  # LoRA's B begins at zero: the reward had a gradient
    assert not any(bool((p != 0).any()) for name, p in before.named_parameters() if "lora_B" in name)


def test_the_command_line_knows_the_names(things, folder, monkeypatch, tmp_path):
    [words] = commands(PAGE)
    assert words[:2] == ["python", "my_run.py"]
    config = Path(__file__).parents[1] / "configs/quickstart.yaml"
    less = ["--trainer.max_steps=1", "--probe.num_sequences=8", "--data.e_size=8", "--data.batch_size=2"]
    quiet = ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    words = [str(config) if word.endswith("quickstart.yaml") else word for word in words]
    monkeypatch.setattr(sys, "argv", [*words[1:], *less, *quiet])
    exec((folder / "my_run.py").read_text(), {})
    [record] = read_records(next(tmp_path.rglob("records.jsonl")))
    assert record["status"] == "ok"


def test_the_estimator_is_what_it_says(things, capsys):
    """Against loops over tokens and a jackknife, which know nothing of influences."""
    torch.manual_seed(0)
    model, tokenizer = load_policy("tiny_llama")
    prompts = [f"{a} * {b} = " for a in range(10) for b in range(8)]
    rollout = sample_completions(model, tokenizer, prompts, max_new_tokens=8)
    ids = rollout.prompt_ids
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    scope: dict[str, Any] = {"model": model, "rollout": rollout, "update": recorder.update}
    scope["pathwise_slope"] = things.pathwise_slope
    with recorder.at_theta_before():
        exec(USE, scope)
    scores, estimate = scope["scores"], things.pathwise_slope(scope["scores"])
    assert capsys.readouterr().out.startswith(f"{estimate} of ")

    rows = [
        (
            sum(float(scores.tangent.entropy[i, k]) for k in range(8) if scores.base.mask[i, k]),
            int(scores.base.mask[i].sum()),
        )
        for i in range(len(prompts))
    ]

    def slope_of(kept: list[tuple[float, int]]) -> float:
        return sum(moved for moved, _ in kept) / sum(length for _, length in kept)

    without = torch.tensor([slope_of(rows[:i] + rows[i + 1 :]) for i in range(len(rows))], dtype=torch.float64)
    jackknife = float(((len(rows) - 1) * (without - without.mean()).square().mean()).sqrt())
    assert estimate.value == pytest.approx(slope_of(rows), rel=1e-12)  # float64 sums in another order
    # Influences and jackknife differ by O(1/N) of themselves: 80 sequences, and some room for what the O hides.
    assert estimate.stderr == pytest.approx(jackknife, rel=0.05)
    assert estimate.n_sequences == len(prompts)
