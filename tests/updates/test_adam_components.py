"""The components against Adam written out for one number at a time, in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Adam, AdamW

from entropy_pl.updates import UpdateVector, record_update

PARTS = ("momentum", "gradient", "weight_decay")


@dataclass
class ScalarAdam:
    """Kingma & Ba 2015, algorithm 1, and Loshchilov & Hutter 2019, algorithm 2, for one parameter.

    Each step returns (Δθ, its three parts, P), all per unit of this parameter's own learning rate. P is what the
    gradient part is −P times.
    """

    theta: float
    lr: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool = False
    maximize: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    m: float = 0.0
    v: float = 0.0
    v_max: float = 0.0
    t: int = 0

    def step(self, gradient: float) -> tuple[float, dict[str, float], float]:
        self.t += 1
        g = -gradient if self.maximize else gradient
        decay = self.weight_decay * self.theta
        seen = g if self.decoupled else g + decay
        old_m = self.m
        self.m = self.beta1 * self.m + (1 - self.beta1) * seen
        self.v = self.beta2 * self.v + (1 - self.beta2) * seen**2
        self.v_max = max(self.v_max, self.v)
        v_hat = (self.v_max if self.amsgrad else self.v) / (1 - self.beta2**self.t)
        denominator = math.sqrt(v_hat) + self.eps
        correction = 1 - self.beta1**self.t
        moved = -(self.m / correction) / denominator - (decay if self.decoupled else 0.0)
        parts = {
            "momentum": -self.beta1 * old_m / correction / denominator,
            "gradient": -(1 - self.beta1) * g / correction / denominator,
            "weight_decay": -decay if self.decoupled else -(1 - self.beta1) * decay / correction / denominator,
        }
        self.theta += self.lr * moved
        return moved, parts, (-1 if self.maximize else 1) * (1 - self.beta1) / correction / denominator


def model_of(thetas: list[float], dtype: torch.dtype = torch.float64) -> nn.ParameterList:
    """One parameter per number, so that each may have its own group, or no gradient."""
    return nn.ParameterList([nn.Parameter(torch.tensor([theta], dtype=dtype)) for theta in thetas])


THETAS, LRS, DECAYS = [0.7, -1.3, 0.2], [1e-2, 2e-3, 5e-3], [0.1, 0.5, 0.0]
GRADIENTS = [[1.0, -0.3, 0.02], [-2.0, 0.4, 0.5], [0.05, 0.05, -0.7], [0.3, -5.0, 0.0], [0.0, 1e-4, 2.0]]


@pytest.mark.parametrize("kernel", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_every_part_over_several_steps(kind, variant, kernel):
    model = model_of(THETAS)
    optimizer = kind(
        [{"params": [p], "lr": lr, "weight_decay": wd} for p, lr, wd in zip(model, LRS, DECAYS, strict=True)],
        **variant,
        **kernel,
    )
    scalars = [
        ScalarAdam(theta, lr, wd, decoupled=kind is AdamW, **variant)
        for theta, lr, wd in zip(THETAS, LRS, DECAYS, strict=True)
    ]
    for gradients in GRADIENTS:
        for parameter, gradient in zip(model, gradients, strict=True):
            parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        update = recorder.update
        assert update.lr == max(LRS)
        for i, scalar in enumerate(scalars):
            moved, parts, P = scalar.step(gradients[i])
            ratio = LRS[i] / max(LRS)
            # Δθ comes as a difference of θ: 1e-16 / lr of 2e-3.
            assert update.direction[str(i)].item() == pytest.approx(ratio * moved, rel=0, abs=2e-13)
            assert set(update.components) == set(PARTS)
            for part in PARTS:
                # The momentum part cancels: 1e-16 of the gradient over 1 − β₁, times P ≤ 10.
                assert update.components[part][str(i)].item() == pytest.approx(
                    ratio * parts[part], rel=1e-12, abs=1e-13
                )
            assert update.preconditioner[str(i)].item() == pytest.approx(ratio * P, rel=1e-12)
        assert update.gap() < 1e-12  # 1e-16/lr over a norm of O(1)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.0, 0.99),
    st.floats(0.5, 0.9999),
    st.floats(1e-4, 1.0),
    st.floats(0.0, 1.0),
    st.booleans(),
    st.lists(st.floats(-10, 10).filter(lambda g: g == 0 or abs(g) > 1e-6), min_size=1, max_size=6),
)
def test_any_hyper_parameters(beta1, beta2, lr, weight_decay, decoupled, gradients):
    """Over betas, epsilon-sized denominators excluded: gradients of exactly zero included."""
    model = model_of([0.8])
    kind = AdamW if decoupled else Adam
    optimizer = kind(model.parameters(), lr=lr, betas=(beta1, beta2), eps=1e-3, weight_decay=weight_decay)
    scalar = ScalarAdam(0.8, lr, weight_decay, decoupled, beta1=beta1, beta2=beta2, eps=1e-3)
    for gradient in gradients:
        model[0].grad = torch.tensor([gradient], dtype=torch.float64)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        moved, parts, _ = scalar.step(gradient)
        update = recorder.update
        if update.components is None:
            assert abs(moved) < 1e-12
            continue
        # Sizes reach 1/(1 − β₁) = 100 and 1/√(1 − β₂) = 100; Δθ is known to 1e-16/lr.
        assert update.direction["0"].item() == pytest.approx(moved, rel=1e-10, abs=1e-11 + 1e-14 / lr)
        for part in PARTS:
            assert update.components[part]["0"].item() == pytest.approx(parts[part], rel=1e-10, abs=1e-10)


class TestSum:
    @staticmethod
    def step_of(dtype: torch.dtype, lr: float) -> tuple[UpdateVector, nn.Module]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)
        optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(10, 8, generator=generator).to(dtype)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            with record_update(model, optimizer) as recorder:
                optimizer.step()
        return recorder.update, model

    def test_float64(self):
        update, _ = self.step_of(torch.float64, 1e-3)
        assert update.gap() < 1e-12  # θ ~ 0.3 rounded at 5e-17, over lr·v ~ 1e-3

    @pytest.mark.parametrize("lr", [1e-2, 1e-4])
    def test_float32(self, lr):
        """θ ~ 0.3 is rounded at 1e-8, over lr·v ~ lr: the gap is θ's rounding, and it is there to be reported."""
        update, _ = self.step_of(torch.float32, lr)
        assert update.gap() < 3e-8 / lr
        assert update.gap() > 1e-10 / lr

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_gradient_part_is_minus_p_times_the_clipped_gradient(self, dtype):
        update, model = self.step_of(dtype, 1e-3)
        for name, parameter in model.named_parameters():
            expected = -update.preconditioner[name] * parameter.grad.double()
            # The same product, taken in float64.
            torch.testing.assert_close(update.components["gradient"][name], expected, rtol=1e-15, atol=0)
            assert (update.preconditioner[name] > 0).all()

    @pytest.mark.parametrize("kind", [Adam, AdamW])
    def test_under_maximize_p_has_the_sign(self, kind):
        model = model_of([0.5])
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.2, maximize=True)
        model[0].grad = torch.tensor([2.0], dtype=torch.float64)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        gradient = recorder.update.components["gradient"]["0"].item()
        assert gradient == -recorder.update.preconditioner["0"].item() * 2.0  # a product with 2 is exact
        assert gradient > 0


def test_the_first_step_has_no_momentum():
    """v = −g/|g| − wd·θ, whatever the gradient: with m₀ = 0, all of m₁ is this gradient."""
    model = model_of([0.5, -2.0])
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.01, eps=0.0)
    for parameter, gradient in zip(model, (3.0, -1e-3), strict=True):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    for name, gradient, decay in (("0", -1.0, -0.005), ("1", 1.0, 0.02)):
        found = {part: recorder.update.components[part][name].item() for part in PARTS}
        # 1 − β₂ is known to 1e-16/1e-3.
        assert found == pytest.approx({"momentum": 0, "gradient": gradient, "weight_decay": decay}, abs=1e-12)


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("had_one_before", [False, True])
def test_a_parameter_without_gradient_has_no_part_in_it(kind, had_one_before):
    """Torch leaves it where it is, its momentum and decay too."""
    model = model_of([1.0, 2.0])
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    if had_one_before:
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    model[0].grad = torch.ones_like(model[0])
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    update = recorder.update
    assert update.direction["1"].item() == 0
    assert [update.components[part]["1"].item() for part in PARTS] == [0, 0, 0]
    assert update.preconditioner["1"].item() == 0
    assert update.gap() < 1e-13  # 1e-16/lr


def test_adam_of_a_pytorch_that_does_not_say_how_it_decays():
    """Before 2.7 no group held ``decoupled_weight_decay``: then the class must tell."""
    for kind in (Adam, AdamW):
        model = model_of([1.5])
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.3)
        model[0].grad = torch.tensor([0.2], dtype=torch.float64)
        with record_update(model, optimizer) as recorder:
            hooks = optimizer._optimizer_step_post_hooks
            # Runs before the recorder reads: the key is there for the step, gone for the reading.
            handle = optimizer.register_step_post_hook(lambda o, *_: o.param_groups[0].pop("decoupled_weight_decay", 0))
            hooks.move_to_end(handle.id, last=False)
            optimizer.step()
        assert recorder.update.gap() < 1e-13


def test_other_optimizers_have_no_components():
    model = model_of([1.0])
    model[0].grad = torch.ones(1, dtype=torch.float64)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    assert recorder.update.components is None
    assert recorder.update.preconditioner is None
    assert recorder.update.gap() is None
    assert recorder.update.direction["0"].item() == pytest.approx(-1, rel=1e-9)  # −g/(|g| + 1e-10)
