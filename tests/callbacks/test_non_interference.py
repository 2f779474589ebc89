"""A run is the same to the bit with the probe and without: weights, optimizer, random streams, modes, gradients, data.

The runs are somebody's own and know nothing of this package. Each is taken twice, from the same seeds, and what it
leaves behind is compared with ``torch.equal`` and ``==``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny import build_model, build_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from entropy_pl.callbacks import EntropyProbeCallback

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]
STEPS = 4

AXES: dict[str, tuple[Any, ...]] = {
    "trainer": ("automatic", "manual", "grpo"),
    "optimizer": ("sgd", "adamw", "fused", "adamw8bit"),
    "policy": ("full", "lora", "qlora"),
    "precision": ("32", "bf16", "fp16"),
    "extra": ("none", "checkpointing", "compiled"),
    "clip": ("none", "norm", "value"),
    "accumulate": (1, 3),
}
CASES = [
    ("automatic", "adamw", "qlora", "fp16", "none", "value", 3),
    ("grpo", "sgd", "full", "32", "checkpointing", "none", 3),
    ("manual", "adamw8bit", "lora", "bf16", "compiled", "norm", 1),
    ("manual", "fused", "full", "32", "none", "value", 1),
    ("automatic", "fused", "qlora", "bf16", "checkpointing", "none", 1),
    ("manual", "fused", "lora", "fp16", "compiled", "none", 3),
    ("grpo", "adamw", "full", "bf16", "compiled", "norm", 1),
    ("automatic", "sgd", "lora", "32", "compiled", "norm", 3),
    ("manual", "sgd", "qlora", "fp16", "checkpointing", "norm", 1),
    ("grpo", "adamw8bit", "qlora", "32", "none", "none", 3),
    ("automatic", "adamw8bit", "lora", "bf16", "checkpointing", "value", 3),
    ("grpo", "fused", "lora", "bf16", "none", "norm", 3),
    ("automatic", "adamw8bit", "full", "fp16", "compiled", "value", 3),
    ("manual", "adamw", "lora", "32", "checkpointing", "none", 1),
    ("automatic", "sgd", "full", "bf16", "none", "value", 1),
]


def is_possible(case: Mapping[str, Any]) -> bool:
    """Whether the libraries allow these values together."""
    if case["trainer"] == "grpo":  # Accelerate has no fp16 on a CPU, and the Trainer clips by norm
        possible = case["precision"] != "fp16" and case["clip"] != "value"
    else:  # Lightning's mixed precision does not clip for an optimizer that unscales by itself
        possible = case["optimizer"] != "fused" or case["precision"] == "32" or case["clip"] == "none"
    return possible and not (case["policy"] == "qlora" and case["extra"] == "compiled")


def pairs_of(case: Mapping[str, Any]) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))


def test_every_pair_of_options_is_among_the_cases():
    everything = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    possible = set().union(*(pairs_of(case) for case in everything if is_possible(case)))
    chosen = [dict(zip(AXES, values, strict=True)) for values in CASES]
    assert all(map(is_possible, chosen))
    assert possible == set().union(*map(pairs_of, chosen))


@dataclass
class Trace:
    """What a run leaves behind."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def build_policy(kind: str, folder: Path) -> nn.Module:
    if kind == "qlora":
        build_model().save_pretrained(folder / "base")
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        return AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=config, dtype=torch.float32)
    return build_model()


def adapted(model: nn.Module, kind: str) -> nn.Module:
    if kind == "full":
        return model.train()
    if kind == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, lora_config())
    return model.train()


def lora_config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, init_lora_weights=False)


def build_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.5)
    if kind == "adamw8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3, min_8bit_size=16)
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=kind == "fused")


def seed_everything(seed: int = 1) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: leaf for index, item in items for key, leaf in flat(item, f"{name}.{index}").items()}


def trace(model: nn.Module, optimizer: Any, gradients: list[torch.Tensor], **facts: Any) -> Trace:
    streams = {"torch": torch.rand(3), "numpy": torch.from_numpy(np.random.rand(3)), "python": random.random()}
    state = optimizer.state_dict()
    return Trace(
        {
            **{f"weights.{name}": p.detach().clone() for name, p in model.named_parameters()},
            **{f"buffers.{name}": b.clone() for name, b in model.named_buffers()},
            **flat(state["state"], "optimizer"),
            **flat(gradients, "gradients"),
            **flat(streams, "streams"),
        },
        {
            "python": streams["python"],
            "training": {name: module.training for name, module in model.named_modules()},
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            # caches, hooks and patched methods would be attributes that were not there
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "hooks": {
                name: [len(vars(module)[kind]) for kind in sorted(vars(module)) if kind.endswith("_hooks")]
                for name, module in model.named_modules()
            },
            "generation": str(getattr(model, "generation_config", None)),
            "config": str(getattr(model, "config", None)),
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            "optimizer": type(optimizer).__name__,
            "optimizer_attributes": sorted(vars(optimizer)),
            "optimizer_hooks": [len(vars(optimizer)[f"_optimizer_step_{when}_hooks"]) for when in ("pre", "post")],
            **facts,
        },
    )


class Run(LightningModule):
    """Supervised steps, automatic or manual, drawing from every random stream as they go."""

    def __init__(self, trainer_kind: str, optimizer: str, policy: nn.Module, clip: str, accumulate: int) -> None:
        super().__init__()
        self.automatic_optimization = trainer_kind == "automatic"
        self.policy, self.tokenizer = policy, build_tokenizer()
        self._kind, self._clip, self._accumulate = optimizer, clip, accumulate
        self.batches: list[Any] = []
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        self.batches.append(batch.tolist())
        noise = float(torch.rand(1)) + random.random() + float(np.random.rand())
        loss = self.policy(input_ids=batch, labels=batch).loss * (1 + 0.01 * noise)
        self.losses.append(float(loss.detach()))
        self.log("train/reward", -loss.detach())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / self._accumulate)
        if (batch_idx + 1) % self._accumulate == 0:
            if self._clip != "none":
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm=self._clip)
            optimizer.step()
            self.keep_gradients()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return None

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.automatic_optimization:
            self.keep_gradients()

    def keep_gradients(self) -> None:
        self.gradients += [p.grad.clone() for p in self.policy.parameters() if p.grad is not None]

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self._kind, self.policy)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    def train_dataloader(self) -> Any:
        tokens = torch.randint(4, 40, (64, 8), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(tokens, batch_size=4, shuffle=True)


def lightning_run(case: Mapping[str, Any], folder: Path, with_probe: bool) -> tuple[Trace, list[Any]]:
    seed_everything()
    policy = adapted(build_policy(case["policy"], folder), case["policy"])
    if case["extra"] == "checkpointing":
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if case["policy"] != "full":
            policy.enable_input_require_grads()
    inner = policy
    if case["extra"] == "compiled":
        torch._dynamo.reset()
        policy = torch.compile(policy, backend="eager")
    module = Run(case["trainer"], case["optimizer"], policy, case["clip"], case["accumulate"])
    plugins, precision = [], {"32": "32-true", "bf16": "bf16-mixed", "fp16": None}[case["precision"]]
    if precision is None:
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))]
    automatic = case["trainer"] == "automatic"
    probe = EntropyProbeCallback(PROMPTS, num_sequences=12, every_n_steps=1, max_new_tokens=5, eta_multipliers=())
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder / f"{with_probe}",
        callbacks=[probe] if with_probe else [],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        precision=precision,
        plugins=plugins,
        accumulate_grad_batches=case["accumulate"] if automatic else 1,
        gradient_clip_val=0.5 if automatic and case["clip"] != "none" else None,
        gradient_clip_algorithm=case["clip"] if automatic and case["clip"] != "none" else None,
    )
    trainer.fit(module)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    found = trace(
        inner, trainer.optimizers[0], module.gradients, batches=module.batches, losses=module.losses, metrics=metrics
    )
    return found, probe.records


class Watcher(TrainerCallback):
    """Keeps the gradients of every step of a Trainer."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]


TIMES = ("time", "runtime", "per_second")


def grpo_run(case: Mapping[str, Any], folder: Path, with_probe: bool) -> tuple[Trace, list[Any]]:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    from datasets import Dataset

    from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback

    seed_everything()
    torch._dynamo.reset()
    seen: list[Any] = []

    def reward(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
        if not prompts[0].endswith("?"):  # E's
            seen.append([prompts, completions])
        return [sum(c.isdigit() for c in text) + random.random() for text in completions]

    args = trl.GRPOConfig(
        output_dir=str(folder / f"{with_probe}"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=case["accumulate"],
        num_generations=2,
        num_iterations=2,
        beta=0.1 if case["policy"] != "full" else 0.0,  # the reference is the policy with its adapter off
        max_completion_length=6,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=case["precision"] == "bf16",
        gradient_checkpointing=case["extra"] == "checkpointing",
        torch_compile=case["extra"] == "compiled",
        torch_compile_backend="eager" if case["extra"] == "compiled" else None,
        max_grad_norm=0.5 if case["clip"] == "norm" else 0.0,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    watcher = Watcher()
    peft = case["policy"] != "full"
    trainer = trl.GRPOTrainer(
        model=build_policy(case["policy"], folder),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=build_tokenizer(),
        peft_config=lora_config() if peft else None,
        callbacks=[watcher],
    )
    trainer.create_optimizer = lambda *_, **__: (
        setattr(  # of the user's own choice
            trainer, "optimizer", build_optimizer(case["optimizer"], trainer.model)
        )
        or trainer.optimizer
    )
    probe = EntropyProbeTrainerCallback(
        [f"{prompt}?" for prompt in PROMPTS], trainer=trainer, num_sequences=12, every_n_steps=1, eta_multipliers=()
    )
    if with_probe:
        trainer.add_callback(probe)
    trainer.train()
    logs = [{k: v for k, v in entry.items() if not any(t in k for t in TIMES)} for entry in trainer.state.log_history]
    return trace(trainer.model, trainer.optimizer.optimizer, watcher.gradients, logs=logs, seen=seen), probe.records


@pytest.mark.parametrize("values", CASES, ids=lambda values: "-".join(map(str, values)))
def test_the_run_is_the_same_with_and_without(tmp_path, values):
    case = dict(zip(AXES, values, strict=True))
    run = grpo_run if case["trainer"] == "grpo" else lightning_run
    plain, none = run(case, tmp_path, with_probe=False)
    probed, records = run(case, tmp_path, with_probe=True)
    assert not none
    assert [(r["step"], r["status"], r["message"]) for r in records] == [(n, "ok", None) for n in range(STEPS)]
    assert plain.facts == probed.facts
    kinds = {"sgd": "SGD", "adamw": "AdamW", "fused": "AdamW", "adamw8bit": "AdamW8bit"}
    assert plain.facts["optimizer"] == kinds[case["optimizer"]]
    assert plain.tensors.keys() == probed.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert torch.equal(tensor, probed.tensors[name]), name
    assert any(name.startswith("gradients") for name in plain.tensors)
    for record in records:  # what is measured is the case's own kind of run
        assert record["method"] == "central_difference"
        assert record["update_components"] is not None
