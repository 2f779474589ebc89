"""Somebody's GRPO run, started by ``accelerate launch``: ``trl_run.py OUT OPTIONS`` leaves ``OUT/rank<r>.pt`` behind.

OPTIONS are those of the probe, as JSON. The run is made twice, without the probe and with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import build_model, build_tokenizer

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]


def reward_digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def run(folder: Path, options: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
    """What a process leaves behind, and its rank; ``options`` None: without the probe."""
    torch.manual_seed(0)
    trainer = GRPOTrainer(
        model=build_model(),
        reward_funcs=reward_digits,
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            max_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=["tensorboard"],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,  # on by default; its rounding of the gradient would be all that attribution leaves
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    probe = None
    if options is not None:
        from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback

        probe = EntropyProbeTrainerCallback(
            [f"{a}*{b}=" for a in range(4) for b in range(4)], trainer=trainer, **options
        )
        trainer.add_callback(probe)
    trainer.train()
    logged = [
        {k: v for k, v in row.items() if "time" not in k and "second" not in k} for row in trainer.state.log_history
    ]
    left = {
        "records": json.loads(json.dumps(probe.records if probe else [])),
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        "logged": json.dumps(logged),
        "random": torch.rand(2),
    }
    return left, trainer.accelerator.process_index


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    (folder / f"begun{os.environ.get('LOCAL_RANK', 0)}").touch()
    plain, rank = run(folder / "plain", None)
    probed, _ = run(folder / "probed", options)
    torch.save((plain, probed), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
