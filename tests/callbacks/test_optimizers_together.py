"""The probe in runs whose step is that of several optimizers: as a loop without the probe takes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import LR, Deterministic, fit, probe
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from entropy_pl.updates.left_out import LeftOut


class Both(Deterministic):
    """Adapters' A and B by optimizers of their own, one after another in every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.thetas: list[dict[str, Tensor]] = [self.theta()]

    def theta(self) -> dict[str, Tensor]:
        return {n: p.detach().clone().double() for n, p in self.policy.named_parameters() if p.requires_grad}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.policy(input_ids=batch, labels=batch).loss)
        self.take_steps(batch_idx)
        self.thetas.append(self.theta())

    def take_steps(self, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = [[p for n, p in self.policy.named_parameters() if kind in n] for kind in ("lora_A", "lora_B")]
        return self.make(*parts)

    def make(self, first: list[nn.Parameter], second: list[nn.Parameter]) -> list[Optimizer]:
        return [SGD(first, lr=LR / 10), AdamW(second, lr=LR)]


class InTurn(Both):
    def take_steps(self, batch_idx: int) -> None:
        self.optimizers()[batch_idx % 2].step()


class OneTwice(Both):
    def take_steps(self, batch_idx: int) -> None:
        for which in (0, 0, 1):
            self.optimizers()[which].step()


class Rounds(Both):
    """Two steps of both for one batch."""

    def take_steps(self, batch_idx: int) -> None:
        super().take_steps(batch_idx)
        super().take_steps(batch_idx)


class WithMuon(Both):
    def make(self, first: list[nn.Parameter], second: list[nn.Parameter]) -> list[Optimizer]:
        return [torch.optim.Muon(first, lr=LR), AdamW(second, lr=LR / 10)]


def changes(module: Both, step: int) -> dict[str, float]:
    """‖Δθ‖ of a training step, by adapter."""
    before, after = module.thetas[step : step + 2]
    return {
        kind: math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before if kind in n))
        for kind in ("lora_A", "lora_B")
    }


def run(module: Both, folder: Path, **options: Any) -> list[dict[str, Any]]:
    callback = probe(every_n_steps=1, **options)
    fit(module, folder, callback, steps=4, gradient_clip_val=None, logger=False, default_root_dir=folder)
    return callback.records


def test_which_are_meant_must_be_said(tmp_path):
    message = (
        r'expected one optimizer over .* got 0: SGD with 4; 1: AdamW with 4: say optimizer="all" for the step that '
        r"they take together, or which of them, optimizer=0, for its part"
    )
    with pytest.raises(MisconfigurationException, match=message):
        run(Both(), tmp_path)
    with pytest.raises(MisconfigurationException, match="expected optimizer 2 to hold trainable parameters"):
        run(Both(), tmp_path, optimizer=[0, 2])
    for nonsense in ("both", [], [0, "all"], -1, 1.0):
        with pytest.raises(MisconfigurationException, match='expected optimizer as a number, several numbers, "all"'):
            probe(optimizer=nonsense)


@pytest.mark.parametrize("kind", [Both, WithMuon])
def test_the_step_that_all_take_together(tmp_path, kind):
    """θ before the first and after the last one, as the run without the probe has them; and the run is that one."""
    if kind is WithMuon and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch < 2.9 has no Muon")
    plain, probed = kind(), kind()
    fit(plain, tmp_path, steps=4, gradient_clip_val=None)
    records = run(probed, tmp_path, optimizer="all")
    assert [(r["step"], r["status"], r["message"], r["lr"]) for r in records] == [(n, "ok", None, LR) for n in range(2)]
    for ours, theirs in zip(probed.thetas, plain.thetas, strict=True):
        assert all(torch.equal(ours[n], theta) for n, theta in theirs.items())
    for step, record in enumerate(records):
        expected = math.hypot(*changes(plain, step).values())
        assert record["lr"] * record["update_norm"] == pytest.approx(expected, rel=1e-12)
        assert "update_left_out" not in record
        assert (record["update_components"] is None) == (kind is WithMuon)


@pytest.mark.parametrize(("which", "own", "other"), [(0, "lora_A", "lora_B"), (1, "lora_B", "lora_A")])
def test_what_one_of_them_leaves_out_is_said(tmp_path, which, own, other):
    """Whether the others step before it or after it in the training step."""
    module = Both()
    records = run(module, tmp_path, optimizer=which)
    sizes = {kind: sum(t.numel() for n, t in module.thetas[0].items() if kind in n) for kind in (own, other)}
    for step, record in enumerate(records):
        change = changes(module, step)
        assert record["lr"] * record["update_norm"] == pytest.approx(change[own], rel=1e-12)
        left_out = record["update_left_out"]
        assert left_out["parameters"] == pytest.approx(sizes[other] / sum(sizes.values()))
        assert left_out["change"] == pytest.approx(change[other] / math.hypot(*change.values()), rel=1e-9)
        assert any("whose change is" in sentence and 'optimizer="all"' in sentence for sentence in record["warnings"])


def test_little_is_left_out_without_a_word():
    model = nn.Linear(50, 40)
    left_out = LeftOut(model, {"weight"})
    with torch.no_grad():
        model.bias += 0.001
    share, sentence = left_out.said(taken_in=1.0)
    assert share == pytest.approx({"parameters": 40 / 2040, "change": 0.001 * 40**0.5}, rel=1e-4)  # of float32
    assert sentence is not None
    share, sentence = LeftOut(nn.Linear(200, 1), {"weight"}).said(taken_in=1.0)
    assert share == {"parameters": 1 / 201, "change": 0.0}
    assert sentence is None
    assert LeftOut(model, {"weight", "bias"}).parameters == 0


@pytest.mark.parametrize(
    ("kind", "said"), [(InTurn, "0: SGD 1×, 1: AdamW 0×"), (OneTwice, "0: SGD 2×, 1: AdamW 1×")], ids=["turns", "twice"]
)
def test_steps_that_are_not_one(tmp_path, kind, said):
    records = run(kind(), tmp_path, optimizer="all")
    assert {record["status"] for record in records} == {"failed"}
    assert f"to step once in a training step, got {said}: their steps are not one step" in records[0]["message"]
    assert len(records) > 1


def test_several_rounds_in_one_training_step(tmp_path):
    records = run(Rounds(), tmp_path, optimizer=0)
    assert [(r["step"], r["status"]) for r in records] == [(0, "ok"), (1, "ok")]
    assert all(0 < r["update_left_out"]["change"] < 1 for r in records)


def test_one_that_a_gradient_scaler_skips(tmp_path):
    """The first's gradients overflow at the first step, the second's do not."""

    class Overflows(Both):
        def take_steps(self, batch_idx: int) -> None:
            if batch_idx == 0:
                next(p for n, p in self.policy.named_parameters() if "lora_A" in n).grad.fill_(float("inf"))
            super().take_steps(batch_idx)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    callback = probe(every_n_steps=1, optimizer="all")
    options: dict[str, Any] = {"gradient_clip_val": None, "logger": False, "default_root_dir": tmp_path}
    fit(Overflows(), tmp_path, callback, steps=3, plugins=[plugin], **options)
    assert [r["status"] for r in callback.records][:2] == ["failed", "ok"]
    assert "got 0: SGD 0×, 1: AdamW 1×" in callback.records[0]["message"]


def test_the_count_goes_on_from_a_checkpoint(tmp_path):
    """Of the steps that they take together; Lightning counts each."""
    callbacks: list[Any] = [probe(every_n_steps=1, optimizer=which) for which in ([0, 1], (0, 1))]
    options: dict[str, Any] = {"gradient_clip_val": None, "logger": False, "default_root_dir": tmp_path}
    trainer = fit(Both(), tmp_path, callbacks[0], steps=2, **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(Both(), tmp_path, callbacks[1], steps=4, ckpt_path=tmp_path / "half.ckpt", **options)
    assert resumed.global_step == 4
    assert [r["step"] for c in callbacks for r in c.records] == [0, 1]
