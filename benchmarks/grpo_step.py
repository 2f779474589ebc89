"""One GRPO step, sampling to optimizer step: this package's module, and TRL's GRPOTrainer on the same work.

The same policy, adapter, prompts and reward; float32, no KL, `grpo` loss, AdamW, no gradient checkpointing (which TRL
has on by default). Rounds take turns: in each, a new trainer of either kind takes a step that is not counted and some
that are. TRL's step also collects what it will log (entropies, lengths, rewards, the texts), and so does this module's
(all but the texts); neither has a logger to write to.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from typing import Any, cast

import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from benchmarks.options import Options
from benchmarks.policies import LORA, MAX_NEW_TOKENS, build_policy
from benchmarks.tables import Table
from benchmarks.timing import ratio_of
from entropy_pl import GRPOModule
from entropy_pl.data.batch import PromptBatch
from entropy_pl.objectives import available_rewards, register_reward
from entropy_pl.policy import Policy
from entropy_pl.policy.rng import isolated_rng

GROUP, STEPS, LR = 8, 2, 1e-6
REWARD = "benchmark_even_length"
TRL, OURS = "TRL's GRPOTrainer", "GRPOModule"


def even_length(completion: str, answer: str) -> float:
    """1 for every other completion, so that every group has something to learn, whatever the policy can do."""
    return float(len(completion) % 2 == 0)


def run(options: Options) -> list[Table]:
    """Seconds of whole steps, and their ratio by round."""
    if REWARD not in available_rewards():
        register_reward(REWARD)(even_length)
    prompts, most = options.pick(16, 2), options.pick(MAX_NEW_TOKENS, 4)
    seconds: dict[str, list[float]] = {TRL: [], OURS: []}
    for _ in range(1 if options.small else max(2, options.rounds - 1)):
        for name, steps in ((TRL, trl_steps), (OURS, our_steps)):
            with isolated_rng(0):
                # TRL knows one end token, the tokenizer's.
                model, tokenizer, texts, what = build_policy(options, prompts * (STEPS + 1), ending=False)
                seconds[name].append(statistics.median(steps(model, tokenizer, texts, prompts, most, options)[1:]))
    ratios = {name: ratio_of([a / b for a, b in zip(seconds[name], seconds[TRL], strict=True)]) for name in seconds}
    rows = [
        (name, str(ratios[name]), "0.7" if name == OURS else "", f"{statistics.median(took):.1f}")
        for name, took in seconds.items()
    ]
    title = f"One GRPO step, {prompts} prompts × {GROUP} completions × ≤ {most} tokens; {what}"
    return [Table("grpo_step", title, ("step", "of TRL's", "at most", "s"), rows)]


def our_steps(model: Any, tokenizer: Any, texts: list[str], prompts: int, most: int, options: Options) -> list[float]:
    """Seconds of every step of this package's module."""
    module = GRPOModule(
        cast(Any, Policy(model, tokenizer)),
        num_generations=GROUP,
        max_new_tokens=most,
        rewards=[REWARD],
        optimizer=lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0),
    )
    batches = [texts[i : i + prompts] for i in range(0, len(texts), prompts)]
    data: Any = [PromptBatch(batch, ["0"] * len(batch)) for batch in batches]
    clock = _LightningClock()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        max_steps=STEPS + 1,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=None))
    return clock.seconds


def trl_steps(model: Any, tokenizer: Any, texts: list[str], prompts: int, most: int, options: Options) -> list[float]:
    """Seconds of every step of TRL's trainer, on the same policy with the same kind of adapter."""
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        """Seconds of every step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self._start)

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [even_length(text, "0") for text in completions]

    clock = Clock()
    adapter = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=LORA.target_modules, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model.unload(),
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=prompts * GROUP,
                num_generations=GROUP,
                max_completion_length=most,
                max_steps=STEPS + 1,
                learning_rate=LR,
                lr_scheduler_type="constant",
                loss_type="grpo",
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=options.device == "cpu",
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                shuffle_dataset=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


class _LightningClock(Callback):
    """Seconds of every training step, optimizer included (the module steps it by hand)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
