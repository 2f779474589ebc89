"""Somebody's DDP run, as one of its processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from tiny import build_model, build_tokenizer

PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(4)]


class Run(LightningModule):
    """Supervised steps in float64, so that what two ranks find can be compared to the last digits."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.tokenizer = build_model().double(), build_tokenizer()
        self.weights = [self._copy()]

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.policy.named_parameters()}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.policy(input_ids=batch, labels=batch).loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self._copy())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)

    def train_dataloader(self) -> Any:
        tokens = torch.randint(4, 40, (64, 8), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(tokens, batch_size=4, shuffle=True)


class Apart(Run):
    """A run that steps every rank by its own gradient."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.mine = self.policy(input_ids=batch, labels=batch).loss
        return 0 * sum(p.sum() for p in self.parameters())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad.normal_(generator=torch.Generator().manual_seed(self.global_rank))


def take_part(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train as one of the processes that a launcher has started; what it leaves behind.

    Args:
        rank: which of them.
        folder: for what the run writes.
        options: ``processes``; ``probe``, the callback's options, or None for a run without it; ``steps``; ``apart``:
            the ranks' gradients are not reduced; ``fails``: [rank, step] of a probe that cannot sample, ["keep", rank]
            that has no room for its snapshot, or ["start", rank] that has no prompts.
    """
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # as a launcher does: Lightning then launches nothing
    torch.manual_seed(0)
    module = (Apart if options.get("apart") else Run)()
    callbacks: list[Any] = []
    if options["probe"] is not None:
        from entropy_pl.callbacks import EntropyProbeCallback
        from entropy_pl.monitor import run_probe

        fails = options.get("fails") or [None, None]
        prompts = [] if fails == ["start", rank] else PROMPTS
        callbacks.append(EntropyProbeCallback(prompts, **options["probe"]))
        if fails[0] == "keep":

            def snapshot(self: Any, moments: bool = False) -> None:
                if rank == fails[1] and module.global_step == 0:
                    raise torch.OutOfMemoryError("no room for this rank's snapshot")
                keep(self, moments)

            keep = run_probe.UpdateRecorder.snapshot
            run_probe.UpdateRecorder.snapshot = snapshot
        elif isinstance(fails[0], int):
            failing, step = fails
            draw = run_probe.sample_completions

            def sample(*args: Any, **kwargs: Any) -> Any:
                if rank == failing and module.global_step == step:
                    raise torch.OutOfMemoryError("no room for this rank's keys and values")
                return draw(*args, **kwargs)

            run_probe.sample_completions = sample
    trainer = Trainer(
        max_steps=options.get("steps", 2),
        accelerator="cpu",
        devices=options["processes"],
        strategy="ddp",
        precision="64-true",
        logger=False,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module)
    return {
        "records": json.loads(json.dumps(callbacks[0].records if callbacks else [])),
        "weights": module.weights,
        "random": torch.rand(2),
        "steps": trainer.global_step,
    }
