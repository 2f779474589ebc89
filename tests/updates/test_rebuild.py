"""The rebuilt step against the step that torch then really took."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import build_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from entropy_pl.updates import UpdateVector, clip_gradients, match_optimizer_state, rebuild_update, record_update

KERNELS = [{"foreach": False}, {"foreach": True}, {"fused": True}]
VARIANTS = [{}, {"amsgrad": True}, {"maximize": True}]


class Net(nn.Module):
    """A frozen layer, and one that had a gradient in other steps only."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.frozen, self.second, self.spare = (nn.Linear(5, 5) for _ in range(4))
            self.never = nn.Linear(2, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        x = self.frozen(self.second(torch.tanh(self.first(x))))
        return self.spare(x) if spare else x


def groups(model: Net) -> list[dict[str, Any]]:
    """Every group with hyper-parameters of its own; named, for they share shapes."""
    first, second, others = (
        [(name, p) for name, p in model.named_parameters() if name.split(".")[0] in of_group]
        for of_group in (("first",), ("second",), ("spare", "never"))
    )
    return [
        {"params": first, "lr": 1e-2, "weight_decay": 0.3},
        {"params": second, "lr": 3e-3, "betas": (0.7, 0.99), "eps": 1e-4, "weight_decay": 0.0},
        {"params": others, "lr": 1e-3, "weight_decay": 0.1},
    ]


@dataclass
class Step:
    """What lay before a step, and what torch made of it."""

    saved: dict[str, Any]
    before: dict[str, Tensor]
    gradients: dict[str, Tensor | None]  # as backward left them
    taken: UpdateVector
    after: dict[str, Tensor]

    def rebuilt(self, max_norm: float | None = None, **options: Any) -> UpdateVector:
        state = match_optimizer_state(self.saved, self.before)
        clipped, _, _ = clip_gradients(self.gradients, max_norm)
        return rebuild_update(self.before, clipped, state, **options)


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take_step(
    model: nn.Module, optimizer: Optimizer, backwards: Iterator[Callable[[], None]], max_norm: float | None = None
) -> Step:
    """Step once for every backward pass, clipped, under a schedule; the last step is the one recorded."""
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    passes = list(backwards)
    for number, backward in enumerate(passes):
        optimizer.zero_grad()
        backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in trained.items()}
        if max_norm is not None:
            clip_grad_norm_(model.parameters(), max_norm)
        if number == len(passes) - 1:
            saved = through_a_file(optimizer.state_dict())
            before = {name: p.detach().clone() for name, p in trained.items()}
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        scheduler.step()
    return Step(saved, before, gradients, recorder.update, {name: p.detach() for name, p in trained.items()})


def step_of_net(kind: type[Optimizer], dtype: torch.dtype, max_norm: float | None = None, **options: Any) -> Step:
    model = Net().to(dtype)
    generator = torch.Generator().manual_seed(1)

    def backward(number: int) -> Callable[[], None]:
        x = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype)
        return lambda: (model(x, spare=number % 2 == 0) - 1).square().mean().backward()

    return take_step(model, kind(groups(model), **options), (backward(n) for n in range(24)), max_norm)


def cosine(a: UpdateVector, b: UpdateVector) -> float:
    return a.dot(b) / (a.norm() * b.norm())


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    gap = {name: found[name] - value for name, value in expected.items()}
    return UpdateVector(gap, 1.0).norm() / UpdateVector(expected, 1.0).norm()


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_float64(kind, variant, kernel, max_norm):
    step = step_of_net(kind, torch.float64, max_norm, **variant, **kernel)
    taken, rebuilt = step.taken, step.rebuilt(max_norm)
    assert rebuilt.lr == taken.lr == pytest.approx(1e-2 / 3.3)  # the schedule's, not the first
    assert list(rebuilt.direction) == list(taken.direction)
    assert cosine(rebuilt, taken) >= 1 - 1e-12
    # Δθ is known to 1e-16 of θ ~ 0.4, over lr·v ~ 3e-3: 1e-13.
    assert relative_error(rebuilt.direction, taken.direction) < 1e-11
    for part, expected in taken.components.items():
        assert relative_error(rebuilt.components[part], expected) < 1e-12  # float64 on both sides
    assert relative_error(rebuilt.preconditioner, taken.preconditioner) < 1e-12
    for name in ("spare.weight", "never.bias"):  # no gradient in this step; in no step
        assert not any(tensor.any() for tensor in (rebuilt.direction[name], rebuilt.preconditioner[name]))
    assert rebuilt.gap() == 0
    assert all(value.dtype == torch.float64 for value in rebuilt.direction.values())


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.0, 0.99),
    st.floats(0.5, 0.9999),
    st.floats(0.0, 1.0),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.lists(st.floats(-10, 10), min_size=1, max_size=5),
)
def test_any_hyper_parameters(beta1, beta2, weight_decay, switches, gradients):
    """From the first step on, gradients of exactly zero included."""
    decoupled, amsgrad, maximize = switches
    theta = nn.Parameter(torch.tensor([0.8], dtype=torch.float64))
    optimizer = (AdamW if decoupled else Adam)(
        [theta], 0.5, (beta1, beta2), 1e-3, weight_decay, amsgrad, maximize=maximize
    )
    for gradient in gradients:
        before, saved = {"w": theta.detach().clone()}, copy.deepcopy(optimizer.state_dict())
        theta.grad = torch.tensor([gradient], dtype=torch.float64)
        rebuilt = rebuild_update(before, {"w": theta.grad}, match_optimizer_state(saved, before))
        optimizer.step()
        # Sizes reach 1/(1 − β₁) = 100 and 1/√(1 − β₂) = 100.
        expected = (theta.item() - before["w"].item()) / 0.5
        assert rebuilt.direction["w"].item() == pytest.approx(expected, rel=1e-10, abs=1e-11)


class TestFloat32:
    """How near θ + lr·v, formed in float64 and rounded once, comes to the θ that torch formed in float32.

    Torch rounds at every operation. With u = 2⁻²⁴ and S the sum of |momentum| + |gradient| + |L2 decay|, its Δθ is off
    by up to 8u·lr·S: some ten roundings of terms no larger than lr·S, the scalars β₁, β₂, lr/(1−β₁ᵗ) among them (found:
    5.5 over 8e7 elements; S counts the terms by size, since m_t may be a small difference of large ones). θ itself is
    rounded once by torch and once here: half an ulp each. Decoupled decay adds half an ulp for its product and half for
    its factor 1 − lr·wd, a float32: two ulps in all (found in some ten of 1e5 elements at the worst lr·wd). So what is
    within an ulp or two wherever θ is large beside the step is many ulps of θ where θ is near zero.
    """

    N = 50_000
    CASES = ((Adam, 0.0), (Adam, 0.1), (AdamW, 0.0), (AdamW, 0.1))

    @classmethod
    def step(cls, kind: type[Optimizer], weight_decay: float, start: float, lr: float, warm: int, **options) -> Step:
        generator = torch.Generator().manual_seed(1)
        model = nn.ParameterDict({"w": start * torch.randn(cls.N, generator=generator)})
        mean = 1e-3 * torch.randn(cls.N, generator=generator)

        def backward(_: int) -> Callable[[], None]:
            size = 1e-2 * torch.rand(cls.N, generator=generator)
            model["w"].grad = mean + size * torch.randn(cls.N, generator=generator)
            return lambda g=model["w"].grad: setattr(model["w"], "grad", g)

        optimizer = kind(model.parameters(), lr=lr, weight_decay=weight_decay, **options)
        return take_step(model, optimizer, (backward(n) for n in range(warm + 1)))

    @pytest.mark.parametrize("kernel", [{"foreach": False}, {"fused": True}], ids=str)
    @pytest.mark.parametrize("lr", [1e-2, 1e-5])
    @pytest.mark.parametrize(("start", "warm"), [(0.02, 0), (0.02, 1), (0.02, 20), (0.0, 0), (0.0, 3), (0.0, 20)])
    @pytest.mark.parametrize(("kind", "weight_decay"), CASES)
    def test_every_element(self, kind, weight_decay, start, warm, lr, kernel):
        step = self.step(kind, weight_decay, start, lr, warm, **kernel)
        rebuilt = step.rebuilt()
        ulps, error, ulp = compared(step, rebuilt)
        of_theta = 2 if kind is AdamW and weight_decay > 0 else 1
        terms = bracket(rebuilt, kind)["w"]
        assert (error <= of_theta * ulp + 8 * 2**-24 * terms).all()
        large = (
            step.before["w"].abs() >= 16 * terms
        )  # half an ulp for the terms; and an error is a whole number of ulps
        assert (ulps[large] <= of_theta).all()

    @pytest.mark.parametrize("kind", [Adam, AdamW])
    def test_what_is_beyond_one_ulp_is_torch_s_rounding(self, kind):
        """θ near zero, m_t cancelling. Torch's own step in float64 from the same state says what the step is."""
        step = self.step(kind, 0.1, 0.0, 1e-3, 3)
        rebuilt = step.rebuilt()
        ulps, _, _ = compared(step, rebuilt)
        assert 0.001 < (ulps > 1).double().mean() < 0.1
        assert ulps.max() > 8

        wide = nn.Parameter(step.before["w"].double())
        optimizer = kind([wide], lr=1e-3, weight_decay=0.1)
        optimizer.load_state_dict(copy.deepcopy(step.saved))  # casts the moments to float64
        wide.grad = step.gradients["w"].double()
        optimizer.step()
        ours = step.before["w"].double() + rebuilt.lr * rebuilt.direction["w"]
        # Both in float64: 1e-16 times a condition of 1e2 where m_t cancels.
        torch.testing.assert_close(ours, wide.detach(), rtol=1e-13, atol=1e-16)
        assert torch.equal(ours.float(), wide.detach().float())

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_a_lora_adapter(self, weight_decay):
        """A starts at 0.1, B at zero: after 24 steps of 1e-3 a part of B is still near it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(build_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(3)

        def backward(_: int) -> Callable[[], None]:
            ids = torch.randint(4, 50, (2, 12), generator=generator)
            return lambda: model(input_ids=ids, labels=ids).loss.backward()

        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=weight_decay)
        step = take_step(model, optimizer, (backward(n) for n in range(25)), max_norm=1.0)
        rebuilt = step.rebuilt(max_norm=1.0)
        # The taken Δθ is known to 3e-8 of θ ~ 0.1, over lr·v ~ 1e-4: 3e-5; the cosine lacks half its square.
        assert cosine(rebuilt, step.taken) > 1 - 5e-9
        terms = bracket(rebuilt, AdamW)
        for name in step.before:
            _, error, ulp = compared(step, rebuilt, name)
            assert (error <= (2 if weight_decay else 1) * ulp + 8 * 2**-24 * terms[name]).all()


def compared(step: Step, update: UpdateVector, name: str = "w") -> tuple[Tensor, Tensor, Tensor]:
    """Errors in ulps of the larger of |θ| and |θ'|, the errors, and that ulp."""
    before, after = step.before[name], step.after[name]
    ours = (before.double() + update.lr * update.direction[name]).float()
    error = (ours.double() - after.double()).abs()
    larger = torch.maximum(before.abs(), after.abs())
    ulp = (torch.nextafter(larger, torch.full_like(larger, math.inf)) - larger).double()
    return error / ulp, error, ulp


def bracket(update: UpdateVector, kind: type[Optimizer]) -> dict[str, Tensor]:
    """lr·S: the terms that Adam divides by D, each by its size."""
    parts = ["momentum", "gradient", *(["weight_decay"] if kind is Adam else [])]
    return {n: update.lr * sum(update.components[part][n].abs() for part in parts) for n in update.direction}


class TestLearningRate:
    def test_another_scales_all_groups(self):
        """Against a step really taken with every learning rate threefold: decay is not what lr says, v is the same."""
        model = Net().double()
        optimizer = AdamW(groups(model))
        model(torch.ones(3, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        state = match_optimizer_state(copy.deepcopy(optimizer.state_dict()), before)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        for group in optimizer.param_groups:
            group["lr"] *= 3
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        rebuilt = rebuild_update(before, gradients, state, lr=3e-2)
        assert rebuilt.lr == 3e-2
        assert relative_error(rebuilt.direction, recorder.update.direction) < 1e-12  # Δθ: 1e-16 over 1e-2

    @pytest.mark.parametrize("initial", [True, False])
    def test_the_end_of_a_schedule(self, initial):
        """Groups keep the proportions that the schedule started from; where it did not say, they are alike."""
        step = step_of_net(AdamW, torch.float64)
        expected = step.rebuilt()
        for group in step.saved["param_groups"]:
            group["lr"] = 0.0
            if not initial:
                del group["initial_lr"]
        with pytest.raises(
            ValueError, match=r"learning rate > 0 in the saved state, got \[0\.0\] \(the end of a sched"
        ):
            step.rebuilt()
        rebuilt = step.rebuilt(lr=0.2)
        assert rebuilt.lr == 0.2
        ratio = 1.0 if initial else 1e-2 / 3e-3
        for name in ("first.weight", "second.weight"):
            factor = ratio if name.startswith("second") else 1.0
            torch.testing.assert_close(rebuilt.direction[name], factor * expected.direction[name])

    @pytest.mark.parametrize("lr", [0.0, -1.0, math.nan])
    def test_not_positive(self, lr):
        with pytest.raises(ValueError, match=r"expected lr > 0, got .*: give None for the learning rate saved"):
            step_of_net(AdamW, torch.float64).rebuilt(lr=lr)


def test_from_no_state_it_is_the_first_step():
    """−g/|g| − wd·θ, whatever the gradient."""
    before = {"w": torch.tensor([0.5, -2.0], dtype=torch.float64)}
    optimizer = AdamW([nn.Parameter(before["w"])], lr=0.1, weight_decay=0.01, eps=0.0)
    state = match_optimizer_state(optimizer.state_dict(), before)
    rebuilt = rebuild_update(before, {"w": torch.tensor([3.0, -1e-3], dtype=torch.float64)}, state)
    # 1 − β₂ is known to 1e-16/1e-3.
    assert rebuilt.direction["w"].tolist() == pytest.approx([-1.005, 1.02], abs=1e-12)
    assert rebuilt.components["momentum"]["w"].tolist() == pytest.approx([0, 0], abs=1e-12)


def test_nothing_given_is_changed():
    step = step_of_net(AdamW, torch.float32, amsgrad=True)
    kept = copy.deepcopy((step.saved, step.before, step.gradients))
    step.rebuilt(max_norm=1e-3)
    assert step.saved.pop("param_groups") == kept[0].pop("param_groups")
    torch.testing.assert_close((step.saved, step.before, step.gradients), kept, rtol=0, atol=0)


class TestClip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @settings(deadline=None, max_examples=30)
    @given(max_norm=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
    def test_as_torch_does(self, dtype, max_norm, seed):
        generator = torch.Generator().manual_seed(seed)
        gradients = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in (("a", (3, 5)), ("b", (7,)))}
        model = nn.ParameterDict({name: torch.zeros_like(g) for name, g in gradients.items()} | {"c": torch.zeros(2)})
        for name, gradient in gradients.items():
            model[name].grad = gradient.clone()
        expected = clip_grad_norm_(model.parameters(), max_norm)
        clipped, norm, scale = clip_gradients(gradients | {"c": None}, max_norm)
        assert norm == expected.item()
        assert clipped["c"] is None
        assert scale == (1 if norm + 1e-6 <= max_norm else pytest.approx(max_norm / (norm + 1e-6), rel=1e-6))
        for name, gradient in gradients.items():
            assert torch.equal(clipped[name], model[name].grad)
            assert torch.equal(clipped[name], gradient * scale)

    def test_none_is_no_clipping(self):
        gradients = {"a": torch.tensor([3.0, 4.0]), "b": None}
        assert clip_gradients(gradients, None) == (gradients, 5.0, 1.0)
        assert clip_gradients({"b": None}, 1.0) == ({"b": None}, 0.0, 1.0)

    @pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
    def test_not_positive(self, max_norm):
        """Zero is no clipping to some trainers, and no gradient to torch."""
        with pytest.raises(ValueError, match=r"expected max_norm > 0, got .*: give None for no clipping"):
            clip_gradients({"a": torch.ones(1)}, max_norm)


class TestErrors:
    @pytest.fixture
    def step(self) -> Step:
        return step_of_net(AdamW, torch.float64)

    def test_a_gradient_is_missing(self, step):
        del step.gradients["first.bias"]
        with pytest.raises(
            ValueError, match=r"gradients of the same 8 parameters, got 1 missing \['first.bias'\] and 0 others \[\]"
        ):
            step.rebuilt()

    def test_a_parameter_more_than_in_the_state(self, step):
        state = match_optimizer_state(step.saved, step.before)
        one_more = {"w": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"the optimizer state of the same 9 parameters, got 1 missing \['w'\]"):
            rebuild_update(step.before | one_more, step.gradients | one_more, state)

    def test_a_gradient_of_another_shape(self, step):
        step.gradients["first.bias"] = torch.zeros(4)
        with pytest.raises(ValueError, match=r"the gradient of first\.bias of shape \[5\], got \[4\]"):
            step.rebuilt()

    def test_a_gradient_not_finite(self, step):
        step.gradients["first.bias"][:2] = math.nan
        with pytest.raises(ValueError, match=r"a finite gradient, got 2 numbers in first\.bias that are not"):
            step.rebuilt()
