"""The components against SGD written out for one number at a time, in Python floats, and against torch's own step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import SGD

from entropy_pl.updates import record_update

PARTS = ("momentum", "gradient", "weight_decay")


@dataclass
class ScalarSGD:
    """torch.optim.SGD's documented algorithm for one parameter.

    Each step returns its three parts and P, all per unit of this parameter's own learning rate: what earlier steps left
    in the buffer, this gradient by itself and through the buffer, this decay likewise.
    """

    theta: float
    lr: float
    weight_decay: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    buffer: float | None = None

    def step(self, gradient: float) -> tuple[dict[str, float], float]:
        g, decay = (-gradient if self.maximize else gradient), self.weight_decay * self.theta
        old, of_g, of_decay = 0.0, g, decay  # what the step is made of
        if self.momentum:
            if self.buffer is None:
                kept, new = 0.0, 1.0
            else:
                kept, new = self.momentum * self.buffer, 1 - self.dampening
            self.buffer = kept + new * (g + decay)
            if self.nesterov:
                old = self.momentum * kept
                of_g, of_decay = g + self.momentum * new * g, decay + self.momentum * new * decay
            else:
                old, of_g, of_decay = kept, new * g, new * decay
        self.theta -= self.lr * (old + of_g + of_decay)
        return {"momentum": -old, "gradient": -of_g, "weight_decay": -of_decay}, of_g / gradient


def model_of(thetas: list[float], dtype: torch.dtype = torch.float64) -> nn.ParameterList:
    """One parameter per number, so that each may have its own group, or no gradient."""
    return nn.ParameterList([nn.Parameter(torch.tensor([theta], dtype=dtype)) for theta in thetas])


THETAS, LRS, DECAYS = [0.7, -1.3, 0.2, 0.4], [1e-1, 2e-2, 5e-2, 1e-1], [0.1, 0.5, 0.0, 0.0]
VARIANTS = {
    "plain": {},
    "maximize": {"maximize": True},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
    "dampening-1": {"momentum": 0.7, "dampening": 1.0},
    "dampening-maximize": {"momentum": 0.7, "dampening": 0.4, "maximize": True},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov-maximize": {"momentum": 0.9, "nesterov": True, "maximize": True},
}


@pytest.mark.parametrize("kernel", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_over_several_steps(variant, kernel):
    """The third parameter has its first gradient two steps later than the others, and its first buffer then."""
    options = VARIANTS[variant]
    model = model_of(THETAS)
    optimizer = SGD(
        [{"params": [p], "lr": lr, "weight_decay": wd} for p, lr, wd in zip(model, LRS, DECAYS, strict=True)],
        lr=1.0,
        **options,
        **kernel,
    )
    scalars = [ScalarSGD(theta, lr, wd, **options) for theta, lr, wd in zip(THETAS, LRS, DECAYS, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        gradients = torch.randn(4, generator=generator, dtype=torch.float64).tolist()
        for i, parameter in enumerate(model):
            parameter.grad = None if i == 2 and step < 2 else torch.tensor([gradients[i]], dtype=torch.float64)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        update = recorder.update
        assert update.lr == max(LRS)
        assert update.split_absent is None
        assert set(update.components) == set(PARTS)
        for i, scalar in enumerate(scalars):
            found = {part: update.components[part][str(i)].item() for part in PARTS}
            P = update.preconditioner[str(i)].item()
            if i == 2 and step < 2:
                assert [*found.values(), P, update.direction["2"].item()] == [0] * 5
                continue
            parts, expected_P = scalar.step(gradients[i])
            ratio = LRS[i] / max(LRS)
            # Sizes are of O(1) to O(10); the momentum part is b_t − (1−τ) s, which cancels.
            assert found == pytest.approx({part: ratio * value for part, value in parts.items()}, rel=1e-12, abs=1e-14)
            assert ratio * expected_P == pytest.approx(P, rel=1e-14)
            assert found["gradient"] == pytest.approx(-P * gradients[i], rel=1e-14)  # g before torch's kernel had it
            # θ ~ 1 rounded at 1e-16, over lr ≥ 2e-2.
            assert sum(found.values()) == pytest.approx(update.direction[str(i)].item(), rel=1e-12, abs=1e-14)
        assert update.gap() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("foreach", [True, False])
def test_a_kernel_that_overwrites_the_gradients(foreach, dtype):
    """Nesterov's foreach kernel leaves g + μ b_t where g was: the component is that of g all the same."""
    model = nn.Linear(6, 6).to(dtype)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=foreach)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        update = recorder.update
        eps = torch.finfo(dtype).eps
        for name, gradient in gradients.items():
            # g is had as a difference of numbers up to 10, rounded; times P = 1.9.
            expected = -update.preconditioner[name] * gradient.double()
            torch.testing.assert_close(update.components["gradient"][name], expected, rtol=0, atol=20 * eps)
        assert update.gap() < 20 * eps  # θ ~ 0.4 rounded, over lr = 0.1 and ‖v‖ of some per number


def test_a_first_step_has_no_momentum():
    """To the bit, in float32 too, where b_1 − (g + wd·θ) is not zero in float64."""
    model = nn.Linear(5, 5)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.3)
    model(torch.ones(1, 5)).square().sum().backward()
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    update = recorder.update
    assert update.component_norms()["momentum"] == 0
    assert all((P == 1).all() for P in update.preconditioner.values())  # no dampening
    for name, parameter in model.named_parameters():
        assert torch.equal(update.components["gradient"][name], -parameter.grad.double())
        torch.testing.assert_close(
            update.components["weight_decay"][name], -0.3 * recorder.theta_before[name].double(), rtol=1e-15, atol=0
        )


def test_sparse_gradients():
    model = nn.Embedding(6, 3, sparse=True, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1, 4, 1])).square().sum().backward()
    assert model.weight.grad.is_sparse
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    expected = -model.weight.grad.to_dense()
    assert torch.equal(recorder.update.components["gradient"]["weight"], expected)
    assert recorder.update.gap() < 1e-14  # 1e-16 of θ ~ 1, over lr = 0.1 and v ~ 4


class Heir(SGD):
    """SGD under another name."""


class Slowed(SGD):
    """Takes half of the step back."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        with torch.no_grad():
            for old, p in zip(before, (p for group in self.param_groups for p in group["params"]), strict=True):
                p.lerp_(old, 0.5)


class Told(SGD):
    """Steps as SGD does, and tells of it."""

    def step(self, closure=None):
        self.told = True
        return super().step(closure)


class TestWhoIsSGD:
    """Whoever steps as SGD does, whatever it is called."""

    @staticmethod
    def record(kind: type[SGD], **options):
        model = model_of([1.0, 2.0])
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9, **options)
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps the instance's step
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        return recorder.update

    @pytest.mark.parametrize("kind", [SGD, Heir, Told])
    def test_its_step(self, kind):
        assert self.record(kind).gap() < 1e-13  # 1e-16 of θ ~ 1, over lr·v of 0.03

    def test_a_step_of_its_own(self):
        update = self.record(Slowed)
        assert update.components is update.preconditioner is None
        assert "read off Slowed as its base class steps, leave 100% of the step unexplained" in update.split_absent


@pytest.mark.parametrize("kernel", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_step_smaller_than_the_rounding(kernel):
    """Then θ does not tell whether the gradient was overwritten; the components are those of the gradient given."""
    model = nn.Linear(40, 40)
    optimizer = SGD(model.parameters(), lr=1e-9, momentum=0.9, nesterov=True, **kernel)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        for name, gradient in gradients.items():
            # As where the kernel overwrites them: differences of numbers up to 10, rounded; times P = 1.9.
            expected = -recorder.update.preconditioner[name] * gradient.double()
            torch.testing.assert_close(recorder.update.components["gradient"][name], expected, rtol=0, atol=20 * 1.2e-7)
