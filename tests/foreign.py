"""Somebody's Lightning run, which knows nothing of this package, and how the tests attach the probe to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import nn

from entropy_pl.callbacks import EntropyProbeCallback

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]
LR = 1e-2


class ForeignModule(LightningModule):
    """Somebody's own run: automatic optimization, warm-up, clipping by the Trainer, knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.policy = get_peft_model(build_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
            for name, parameter in self.policy.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        self.tokenizer = build_tokenizer()
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        noise = torch.rand(1) + random.random() + np.random.rand()  # a run that draws from every stream
        loss = self.policy(input_ids=batch, labels=batch).loss * (1 + 0.01 * float(noise))
        self.log("train/reward", -loss.detach())
        self.seen.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        tokens = torch.randint(4, 40, (64, 8), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(tokens, batch_size=4, shuffle=True)


def probe(**options: Any) -> EntropyProbeCallback:
    settings = {"prompts": PROMPTS, "num_sequences": 16, "every_n_steps": 2, "max_new_tokens": 5}
    return EntropyProbeCallback(**(settings | options))


def fit(module: LightningModule, folder: Path, *callbacks: Any, steps: int = 6, **options: Any) -> Trainer:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    checkpoint = options.pop("ckpt_path", None)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=options.pop("logger", TensorBoardLogger(folder, name="run")),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        gradient_clip_val=options.pop("gradient_clip_val", 0.5),
        **options,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return trainer


class Deterministic(ForeignModule):
    """One batch, no noise: what a resumed run sees does not depend on where its dataloader stood."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.policy(input_ids=batch, labels=batch).loss

    def train_dataloader(self) -> Any:
        tokens = torch.randint(4, 40, (1, 8), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(tokens.expand(8, 8), batch_size=4)
