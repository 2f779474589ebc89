"""The probe where parameters move in the backward pass, or by other code: never a wrong reason, and measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from foreign import LR, PROMPTS, Deterministic, fit, probe
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import build_model, build_tokenizer
from torch import Tensor, nn
from torch.optim import SGD
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback


class Lomo(torch.optim.Optimizer):
    """Moves each parameter as soon as its gradient is there, and forgets it; its ``step()`` does nothing."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p, group=group: self.move(p, group["lr"]))

    @torch.no_grad()
    def move(self, parameter: Tensor, lr: float) -> None:
        parameter.data.add_(parameter.grad, alpha=-lr)
        parameter.grad = None

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class Recipe(Deterministic):
    """PyTorch's recipe in a loop of one's own, with an optimizer that only has the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.thetas = [self.theta()]

    def theta(self) -> dict[str, Tensor]:
        return {n: p.detach().clone().double() for n, p in self.policy.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        inner = {p: SGD([p], lr=LR) for p in trainable}

        def hook(parameter: Tensor) -> None:
            inner[parameter].step()
            inner[parameter].zero_grad()

        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(hook)
        return SGD(trainable, lr=LR)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(self.policy(input_ids=batch, labels=batch).loss)
        self.after_backward()
        self.thetas.append(self.theta())

    def after_backward(self) -> None: ...


class NobodysStep(Recipe):
    """Moved by the training step itself, without a hook to tell it by."""

    def configure_optimizers(self) -> Any:
        return SGD([p for p in self.policy.parameters() if p.requires_grad], lr=LR)

    @torch.no_grad()
    def after_backward(self) -> None:
        for parameter in self.policy.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(LR * parameter.grad)
                parameter.grad = None


class AskedForNothing(NobodysStep):
    """And then the optimizer is asked to step, without a gradient."""

    def after_backward(self) -> None:
        super().after_backward()
        self.optimizers().step()


def change(thetas: list[dict[str, Tensor]], step: int) -> float:
    before, after = thetas[step : step + 2]
    return math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))


OPTIONS: dict[str, Any] = {"gradient_clip_val": None, "logger": False, "max_epochs": 1}


def test_a_loop_of_ones_own(tmp_path):
    """Nobody calls ``step()``: a step is a training step. The run is the one without the probe."""
    plain, probed, callback = Recipe(), Recipe(), probe(every_n_steps=2)
    fit(plain, tmp_path, default_root_dir=tmp_path, **(OPTIONS | {"max_epochs": 2}))
    fit(probed, tmp_path, callback, default_root_dir=tmp_path, **(OPTIONS | {"max_epochs": 2}))
    assert [(r["step"], r["status"], r["lr"]) for r in callback.records] == [(0, "ok", LR), (2, "ok", LR)]
    assert len(plain.thetas) == 5  # of four batches
    for ours, theirs in zip(probed.thetas, plain.thetas, strict=True):
        assert all(torch.equal(ours[n], theta) for n, theta in theirs.items())
    for record in callback.records:
        assert record["lr"] * record["update_norm"] == pytest.approx(change(plain.thetas, record["step"]), rel=1e-12)
        assert record["update_components"] is None
        assert "in the backward pass" in record["update_split_absent"]


@pytest.mark.parametrize("kind", [NobodysStep, AskedForNothing])
def test_what_nothing_tells_beforehand_is_seen_and_measured_from_then_on(tmp_path, kind):
    module, callback = kind(), probe(every_n_steps=1)
    with pytest.warns(UserWarning, match="expected the parameters to move in the optimizer's step, but it moved"):
        fit(module, tmp_path, callback, default_root_dir=tmp_path, **OPTIONS)
    assert [(r["step"], r["status"]) for r in callback.records] == [(0, "failed"), (1, "ok")]
    assert "they moved before it in this training step" in callback.records[0]["message"]
    record = callback.records[1]
    assert record["lr"] * record["update_norm"] == pytest.approx(change(module.thetas, 1), rel=1e-12)


def test_accumulated_under_automatic_optimization(tmp_path):
    """Two batches for a step, each of which moves the parameters: the step is from before the first."""

    class Accumulates(Deterministic):
        def configure_optimizers(self) -> Any:
            return Lomo([p for p in self.policy.parameters() if p.requires_grad], lr=LR)

        def on_train_batch_start(self, *_: Any) -> None:
            self.before = getattr(self, "before", [])
            self.before.append([p.detach().clone().double() for p in self.policy.parameters()])

    module, callback = Accumulates(), probe(every_n_steps=1)
    fit(module, tmp_path, callback, accumulate_grad_batches=2, default_root_dir=tmp_path, **OPTIONS)
    [record] = callback.records
    after = [p.detach().double() for p in module.policy.parameters()]
    expected = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, module.before[0], strict=True)))
    assert record["status"] == "ok"
    assert record["lr"] * record["update_norm"] == pytest.approx(expected, rel=1e-12)


def test_without_an_optimizer_there_is_no_learning_rate(tmp_path):
    class NoOptimizer(Recipe):
        def configure_optimizers(self) -> Any:
            super().configure_optimizers()

    with pytest.raises(
        MisconfigurationException, match=r"may move them in the backward pass\. To have that measured, give"
    ):
        fit(NoOptimizer(), tmp_path, probe(), default_root_dir=tmp_path, **OPTIONS)


class Thetas(TrainerCallback):
    def __init__(self) -> None:
        self.thetas: list[dict[str, Tensor]] = []

    def keep(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.thetas.append({n: p.detach().clone().double() for n, p in model.named_parameters()})

    on_train_begin = on_step_end = keep


@pytest.mark.parametrize("kind", ["lomo", "layer-wise"])
def test_in_a_trainer(tmp_path: Path, kind):
    """Accumulated over two batches where that is allowed; against θ as a callback sees it."""
    model, tokenizer = build_model(), build_tokenizer()
    if kind == "layer-wise":  # as Transformers makes it of GaLore and the like
        inner = {p: SGD([p], lr=LR) for p in model.parameters()}

        def hook(parameter: Tensor) -> None:
            inner[parameter].step()
            inner[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(hook)
        optimizer: torch.optim.Optimizer = LayerWiseDummyOptimizer(optimizer_dict=inner, lr=1.0)
    else:
        optimizer = Lomo(model.parameters(), lr=LR)
    watcher = Thetas()
    callback = EntropyProbeTrainerCallback(PROMPTS, num_sequences=16, every_n_steps=1, max_new_tokens=5)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer([f"{a}+{a}=9" for a in range(9)])["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1 if kind == "layer-wise" else 2,
        lr_scheduler_type="constant",
        learning_rate=LR,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=[watcher, callback],
    )
    trainer.train()
    assert [(r["step"], r["status"], r["lr"]) for r in callback.records] == [(0, "ok", LR), (1, "ok", LR)]
    for step, record in enumerate(callback.records):
        assert record["lr"] * record["update_norm"] == pytest.approx(change(watcher.thetas, step), rel=1e-12)
        assert record["update_components"] is None
