"""The README's Python, run as printed, on a run that knows nothing of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule
from peft import LoraConfig
from printed import blocks, lines_of
from tiny import build_model, build_tokenizer

BLOCKS = blocks("README.md")
PROMPTS = [f"{a}+{b}=" for a in range(16) for b in range(16)]


class Run(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.policy, self.tokenizer = build_model(max_position_embeddings=128), build_tokenizer()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.policy(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randint(4, 40, (400, 8)), batch_size=4)


def test_attaching_to_lightning_takes_ten_lines(tmp_path, monkeypatch):
    [block] = [block for block in BLOCKS if "EntropyProbeCallback" in block]
    assert len(lines_of(block)) <= 10
    monkeypatch.chdir(tmp_path)
    module = Run()
    scope: dict[str, Any] = {"module": module, "evaluation_prompts": PROMPTS}
    exec(block, scope)
    assert [(record["step"], record["status"]) for record in scope["probe"].records] == [
        (10 * n, "ok") for n in range(10)
    ]


def test_attaching_to_trl_takes_ten_lines(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    [block] = [block for block in BLOCKS if "EntropyProbeTrainerCallback" in block]
    assert len(lines_of(block)) <= 10
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path / "policy")  # a policy and its tokenizer as they come: in a folder
    build_model().save_pretrained(tmp_path / "policy")
    scope: dict[str, Any] = {
        "model": str(tmp_path / "policy"),
        "reward_funcs": lambda completions, **_: [float(len(text)) for text in completions],
        "args": trl.GRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            max_steps=11,
            report_to=["tensorboard"],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        "train_dataset": Dataset.from_dict({"prompt": [f"{n}-1=" for n in range(20)]}),
        "peft_config": LoraConfig(r=2, target_modules="all-linear"),
        "evaluation_prompts": PROMPTS,
    }
    exec(block, scope)
    assert [record["status"] for record in scope["probe"].records] == ["ok", "ok"]
    assert (tmp_path / "run/entropy_probe/records.jsonl").is_file()


def test_by_hand(capsys):
    [block] = [block for block in BLOCKS if "record_update" in block]
    model = build_model(max_position_embeddings=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(4, 40, (4, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    scope = {
        "model": model,
        "tokenizer": build_tokenizer(),
        "optimizer": optimizer,
        "evaluation_prompts": PROMPTS[:32],
    }
    exec(block, scope)
    true = capsys.readouterr().out.split()[0]
    assert float(true) == pytest.approx(scope["result"].taken.true.value, rel=1e-3)
