"""The recorded update against θ_after − θ_before, whatever made the step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from entropy_pl.updates import UpdateRecorder, displaced, record_update


class Net(nn.Module):
    """Three trainable layers, one of them not always used, and a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.spare, self.frozen = (nn.Linear(5, 5) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        return self.frozen(self.second(torch.tanh(self.first(x))))


def batch(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def groups(model: Net) -> list[dict[str, object]]:
    """Every group with a learning rate and a decay of its own."""
    return [
        {"params": list(model.first.parameters()), "lr": 1e-2, "weight_decay": 0.3},
        {"params": list(model.second.parameters()), "lr": 3e-3, "weight_decay": 0.0},
        {"params": [*model.spare.parameters(), *model.frozen.parameters()], "lr": 1e-3, "weight_decay": 0.1},
    ]


OPTIMIZERS: dict[str, Callable[[Net], Optimizer]] = {
    "sgd": lambda m: SGD(groups(m)),
    "sgd-momentum": lambda m: SGD(groups(m), momentum=0.9, nesterov=True),
    "rmsprop": lambda m: RMSprop(groups(m), momentum=0.5),
    "adam": lambda m: Adam(groups(m)),
    "adamw": lambda m: AdamW(groups(m)),
    "adamw-amsgrad": lambda m: AdamW(groups(m), amsgrad=True),
    "adamw-maximize": lambda m: AdamW(groups(m), maximize=True),
    "adam-maximize": lambda m: Adam(groups(m), maximize=True),
    "adamw-foreach": lambda m: AdamW(groups(m), foreach=True),
    "adamw-fused": lambda m: AdamW(groups(m), fused=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_update_times_lr_is_the_change(optimizer_name, dtype):
    """Several groups, decay, clipping, accumulation over three batches, a scheduler and zero_grad in the block."""
    model = Net(dtype)
    optimizer = OPTIMIZERS[optimizer_name](model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(4):
        for accumulated in range(3):
            (model(batch(10 * step + accumulated, dtype)).square().mean() / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
        with record_update(model, optimizer) as recorder:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        update = recorder.update
        assert update.lr == 1e-2 * 0.5**step  # of the step, not the next one's; the largest of the groups
        assert list(update.direction) == [n for n, p in model.named_parameters() if p.requires_grad]
        for name, parameter in model.named_parameters():
            change = parameter.detach().double() - before[name]
            if name.startswith("frozen"):
                assert not change.any()
                continue
            assert update.direction[name].dtype == torch.float64
            # One division and one product: two roundings of 1.1e-16.
            torch.testing.assert_close(update.direction[name] * update.lr, change, rtol=3e-16, atol=0)
        if dtype is not torch.bfloat16:  # which may round a small step away
            assert update.norm() > 0
        assert not any(update.direction[f"spare.{part}"].any() for part in ("weight", "bias"))  # had no gradient


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_step_taken_is_eta_equal_to_lr(optimizer_name):
    """θ_before + lr·v is θ_after to the bit in float32."""
    model = Net()
    optimizer = OPTIMIZERS[optimizer_name](model)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step, torch.float32)).square().mean().backward()
        before = copy.deepcopy(model)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        with displaced(before, recorder.update, recorder.update.lr):
            for p, q in zip(before.parameters(), model.parameters(), strict=True):
                assert torch.equal(p, q)


def make(lr: float = 1e-2, **options) -> tuple[Net, AdamW]:
    model = Net()
    model(batch(0, torch.float32)).square().mean().backward()
    return model, AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


class TestLearningRate:
    def test_a_group_without_trainable_parameters_does_not_count(self):
        model = Net()
        optimizer = SGD(
            [
                {"params": model.frozen.parameters(), "lr": 1.0},
                {"params": [nn.Parameter(torch.zeros(2))], "lr": 2.0},  # of no concern to this model
                {"params": model.first.parameters(), "lr": 0.1},
            ]
        )
        model(batch(0, torch.float32)).sum().backward()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        assert recorder.update.lr == 0.1
        assert set(recorder.update.direction) == {"first.weight", "first.bias"}
        # v = −g for plain SGD, up to the rounding of θ: 6e-8 of θ ~ 0.4, over lr.
        torch.testing.assert_close(
            recorder.update.direction["first.weight"], -model.first.weight.grad.double(), rtol=0, atol=5e-7
        )

    def test_lr_in_a_tensor(self):
        model, optimizer = make(lr=torch.tensor(1e-2), foreach=False)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        assert recorder.update.lr == pytest.approx(1e-2, rel=1e-7)  # a float32 tensor
        assert type(recorder.update.lr) is float

    def test_zero_is_no_movement(self):
        """Warm-up from zero."""
        model, optimizer = make(lr=0.0)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        update = recorder.update
        assert update.lr == 0
        assert update.norm() == 0
        assert update.components is update.preconditioner is update.gap() is None
        assert update.direction["first.weight"].shape == (5, 5)


class TestWhatIsNoStep:
    def test_none_in_the_block(self):
        """A skipped step, as a GradScaler does on overflow."""
        model, optimizer = make()
        with record_update(model, optimizer) as recorder:
            pass
        assert recorder.update.norm() == 0
        assert recorder.update.lr == 1e-2

    def test_two_in_the_block(self):
        model, optimizer = make()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
            with pytest.raises(RuntimeError, match=r"one optimizer\.step\(\) inside record_update, got a second"):
                optimizer.step()
        assert recorder.update.norm() > 0

    def test_an_error_in_the_block(self):
        model, optimizer = make()
        with pytest.raises(ZeroDivisionError), record_update(model, optimizer):
            _ = 1 / 0
        assert not optimizer._optimizer_step_post_hooks
        optimizer.step()  # and nothing is counted any more
        optimizer.step()

    def test_the_hook_is_gone_afterwards(self):
        model, optimizer = make()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        kept = recorder.update
        optimizer.step()
        assert recorder.update is kept
        assert not optimizer._optimizer_step_post_hooks

    def test_a_change_without_a_learning_rate(self):
        model, optimizer = make(lr=0.0)
        recorder = UpdateRecorder(model, optimizer)
        recorder.snapshot()
        with torch.no_grad():
            model.first.weight.add_(1.0)
        with pytest.raises(ValueError, match=r"learning rate > 0 behind a step that moved the parameters, got 0\.0"):
            recorder.read()


class TestWhoseParameters:
    @pytest.mark.parametrize("which", ["frozen", "another"])
    def test_no_trainable_parameter(self, which):
        model = Net()
        parameters = (model.frozen if which == "frozen" else Net()).parameters()
        with (
            pytest.raises(ValueError, match=r"expected SGD to hold trainable parameters of Net, got none"),
            record_update(model, SGD(parameters, lr=0.1)),
        ):
            pass

    def test_a_frozen_parameter_stays_out(self):
        model = Net()
        optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        model(batch(0, torch.float32)).sum().backward()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        assert not [name for name in recorder.update.direction if name.startswith("frozen")]
        assert recorder.update.components is not None
        assert set(recorder.update.components["gradient"]) == set(recorder.update.direction)

    def test_tied_parameters_are_named_once(self):
        model = Net()
        model.second.weight = model.first.weight
        optimizer = SGD(model.parameters(), lr=0.1)
        model(batch(0, torch.float32)).sum().backward()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        assert "first.weight" in recorder.update.direction
        assert "second.weight" not in recorder.update.direction


class TestNothingElseChanges:
    def test_the_step_is_the_one_without_recording(self):
        (model, optimizer), (twin, other) = make(), make()
        gradients = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
        pointers = [p.data_ptr() for p in model.parameters()]
        with record_update(model, optimizer):
            optimizer.step()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
        for name, parameter in model.named_parameters():
            if name in gradients:
                assert parameter.grad is gradients[name][0]
                assert torch.equal(parameter.grad, gradients[name][1])
        assert [p.data_ptr() for p in model.parameters()] == pointers

    def test_no_warning_from_a_scheduler(self):
        """A wrapped ``step`` would make it believe that it came first."""
        model, optimizer = make()
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with record_update(model, optimizer):
                optimizer.step()
                scheduler.step()

    def test_the_direction_is_a_copy(self):
        model, optimizer = make()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        kept = recorder.update.direction["first.weight"].clone()
        optimizer.step()
        assert torch.equal(recorder.update.direction["first.weight"], kept)


class TestRecorder:
    def test_theta_before(self):
        model, optimizer = make()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        recorder = UpdateRecorder(model, optimizer)
        recorder.snapshot()
        optimizer.step()
        recorder.read()
        after = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
        with recorder.at_theta_before():
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == after[name][0]
            assert torch.equal(parameter, after[name][1])
        recorder.forget()
        assert recorder.update.norm() > 0
        with pytest.raises(RuntimeError, match=r"no snapshot of the parameters: call snapshot\(\)"):
            recorder.at_theta_before()

    def test_out_of_order(self):
        recorder = UpdateRecorder(*make())
        with pytest.raises(RuntimeError, match=r"no snapshot"):
            recorder.read()
        with pytest.raises(RuntimeError, match=r"no step has been read yet"):
            _ = recorder.update
        recorder.snapshot()
        recorder.read()
        recorder.snapshot()
        with pytest.raises(RuntimeError, match=r"no step has been read yet"):
            _ = recorder.update
