"""step_with() against the same optimizer on a copy of the model and its state, stepped with the other gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from entropy_pl.updates import UpdateRecorder, UpdateVector, record_update


class Net(nn.Module):
    """Two trainable layers and a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.frozen = (nn.Linear(5, 5) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.to(dtype)


def groups(model: Net) -> list[dict[str, Any]]:
    """Learning rates and decay of their own, not in the order of the names; the frozen one's does not count."""
    return [
        {"params": [*model.second.parameters(), *model.frozen.parameters()], "lr": 3e-3, "weight_decay": 0.0},
        {"params": list(model.first.parameters()), "lr": 1e-2, "weight_decay": 0.3},
    ]


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "adam": lambda g: Adam(g),
    "adam-maximize": lambda g: Adam(g, maximize=True),
    "adamw": lambda g: AdamW(g, betas=(0.8, 0.95)),
    "adamw-amsgrad": lambda g: AdamW(g, amsgrad=True, maximize=True),
    "adamw-fused": lambda g: AdamW(g, fused=True),
    "sgd": lambda g: SGD(g),
    "sgd-momentum": lambda g: SGD(g, momentum=0.9),
    "sgd-dampening": lambda g: SGD(g, momentum=0.9, dampening=0.4, maximize=True),
    "sgd-nesterov": lambda g: SGD(g, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda g: SGD(g, momentum=0.9, nesterov=True, foreach=True),
}
PARTS = ("momentum", "gradient", "weight_decay")


def gradients_of(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None


class Recorded:
    """A recorded step, and the model and the optimizer's state of before it; ``steps`` were taken earlier."""

    def __init__(self, name: str, steps: int, make: Callable[..., Optimizer] | None = None) -> None:
        self.make = make or OPTIMIZERS[name]
        self.model = Net()
        self.optimizer = self.make(groups(self.model))
        for seed in range(steps):
            put(self.model, gradients_of(self.model, seed))
            self.optimizer.step()
        self.model_before = copy.deepcopy(self.model)
        self.state_before = copy.deepcopy(self.optimizer.state_dict())
        self.gradients = gradients_of(self.model, 100)
        put(self.model, self.gradients)
        self.recorder = UpdateRecorder(self.model, self.optimizer)
        self.recorder.snapshot(moments=True)
        self.optimizer.step()
        self.update = self.recorder.read()

    def oracle(self, gradients: Mapping[str, Tensor], **changed: Any) -> dict[str, Tensor]:
        """Δθ/lr_ref of torch's own step, with some hyper-parameters changed."""
        model = copy.deepcopy(self.model_before)
        optimizer = self.make(groups(model))
        optimizer.load_state_dict(copy.deepcopy(self.state_before))
        for group in optimizer.param_groups:
            group.update(changed)
        put(model, gradients)
        optimizer.step()
        before = dict(self.model_before.named_parameters())
        lr = max(group["lr"] for group in optimizer.param_groups)
        return {n: (p - before[n]).detach() / lr for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-11) -> None:
    """Relative to each tensor's norm: θ ~ 0.3 is rounded at 5e-17, over lr·v of 1e-3."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        assert (found[name] - value).norm() <= rtol * value.norm(), name


def assert_whole(update: UpdateVector, gradients: Mapping[str, Tensor]) -> None:
    """Direction, components and preconditioner are of one piece."""
    for name, value in update.direction.items():
        assert torch.equal(value, sum(update.components[part][name] for part in PARTS))
        if name in gradients:
            expected = -update.preconditioner[name] * gradients[name].double()
            assert torch.equal(update.components["gradient"][name], expected)
        else:
            assert not any(update.components[part][name].any() for part in PARTS)
            assert not update.preconditioner[name].any()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_own_step_with_another_gradient(name, steps):
    recorded = Recorded(name, steps)
    for seed in (200, 201):
        gradients = gradients_of(recorded.model, seed)
        update = recorded.recorder.step_with(gradients)
        assert update.lr == 1e-2
        assert_same(update.direction, recorded.oracle(gradients))
        assert_whole(update, gradients)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_actual_gradients_give_the_actual_step(name, steps):
    recorded = Recorded(name, steps)
    again, update = recorded.recorder.step_with(recorded.gradients), recorded.update
    assert again.lr == update.lr
    assert_same(again.direction, update.direction)
    assert_same(again.preconditioner, update.preconditioner)
    for part in PARTS:
        for parameter, value in update.components[part].items():
            # The momentum recorded is m_t − (1−β₁) g: 1e-16 of g ~ 3, times P/(1−β₁) ≤ 100.
            torch.testing.assert_close(again.components[part][parameter], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_some_parameters_without_gradient(name):
    recorded = Recorded(name, 3)
    gradients = gradients_of(recorded.model, 200)
    del gradients["first.bias"], gradients["second.weight"]
    update = recorded.recorder.step_with(gradients)
    assert_same(update.direction, recorded.oracle(gradients))
    assert_whole(update, gradients)
    with_none = recorded.recorder.step_with(gradients | {"first.bias": None, "second.weight": None})
    assert all(torch.equal(with_none.direction[n], value) for n, value in update.direction.items())
    assert recorded.recorder.step_with({}).norm() == 0


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
class TestWithoutMomentum:
    def test_torchs_own_step(self, name, steps):
        """With β₁ or the momentum set to 0 for this step, on the same state."""
        recorded = Recorded(name, steps)
        gradients = gradients_of(recorded.model, 200)
        update = recorded.recorder.step_with(gradients, momentum=False)
        if "sgd" in name:
            changed = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
        else:
            changed = {"betas": (0.0, recorded.optimizer.param_groups[0]["betas"][1])}
        assert_same(update.direction, recorded.oracle(gradients, **changed))
        assert_whole(update, gradients)
        assert update.component_norms()["momentum"] == 0

    def test_number_by_number(self, name, steps):
        recorded = Recorded(name, steps)
        gradients = gradients_of(recorded.model, 200)
        update = recorded.recorder.step_with(gradients, momentum=False)
        parameters = dict(recorded.model_before.named_parameters())
        group_of = {id(p): group for group in recorded.optimizer.param_groups for p in group["params"]}
        # Numbers of the state dict count the parameters through the groups.
        keys = {id(p): k for k, p in enumerate(p for g in recorded.optimizer.param_groups for p in g["params"])}
        for parameter_name, parameter in recorded.model.named_parameters():
            if not parameter.requires_grad:
                continue
            group = group_of[id(parameter)]
            state = recorded.state_before["state"].get(keys[id(parameter)], {})
            sign, decay, expected = (-1 if group["maximize"] else 1), group["weight_decay"], []
            for i, theta in enumerate(parameters[parameter_name].flatten().tolist()):
                g = sign * gradients[parameter_name].flatten()[i].item()
                if "sgd" in name:
                    expected.append(-g - decay * theta)
                    continue
                beta2, decoupled = group["betas"][1], group["decoupled_weight_decay"]
                seen = g if decoupled else g + decay * theta
                v = state["exp_avg_sq"].flatten()[i].item() if state else 0.0
                v = beta2 * v + (1 - beta2) * seen**2
                if group["amsgrad"] and state:
                    v = max(v, state["max_exp_avg_sq"].flatten()[i].item())
                size = math.sqrt(v / (1 - beta2 ** (steps + 1))) + group["eps"]
                expected.append(-seen / size - (decay * theta if decoupled else 0.0))
            wanted = group["lr"] / 1e-2 * torch.tensor(expected, dtype=torch.float64).view_as(parameter)
            # Both in float64; 1 − β₂ᵗ is known to 1e-16/1e-3.
            torch.testing.assert_close(update.direction[parameter_name], wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_it_was_at_the_step(name):
    """A scheduler, another step and cleared gradients after read() change nothing."""
    recorded = Recorded(name, 3)
    gradients = gradients_of(recorded.model, 200)
    update = recorded.recorder.step_with(gradients)
    for group in recorded.optimizer.param_groups:
        group["lr"] *= 0.1
        group["weight_decay"] = 5.0
    recorded.optimizer.step()
    recorded.optimizer.zero_grad(set_to_none=False)
    later = recorded.recorder.step_with(gradients)
    assert later.lr == update.lr == 1e-2
    assert all(torch.equal(later.direction[n], value) for n, value in update.direction.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_touched(name):
    recorded = Recorded(name, 3)
    model, optimizer = recorded.model, recorded.optimizer
    gradients = gradients_of(model, 200)
    given = {n: g.clone() for n, g in gradients.items()}
    parameters = {n: (p, p.detach().clone(), p._version) for n, p in model.named_parameters()}
    grads = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    state, versions = copy.deepcopy(optimizer.state_dict()), [t._version for t in tensors(optimizer.state)]
    recorded.recorder.step_with(gradients)
    recorded.recorder.step_with(gradients, momentum=False)
    for n, p in model.named_parameters():
        assert parameters[n][0] is p
        assert torch.equal(parameters[n][1], p)
        assert parameters[n][2] == p._version
        assert grads[n][0] is p.grad
        assert p.grad is None or torch.equal(grads[n][1], p.grad)
    assert all(torch.equal(gradients[n], g) for n, g in given.items())
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    assert [t._version for t in tensors(optimizer.state)] == versions
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors(optimizer.state_dict()["state"]), tensors(state["state"]), strict=True)
    )


def tensors(state: Mapping[Any, Mapping[str, Any]]) -> list[Tensor]:
    return [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("keep", [True, False])
def test_float32_by_record_update(keep):
    """The kernel's own rounding and that of θ ~ 0.3, 3e-8, over lr·v ≥ 3e-3·1."""
    model = Net(torch.float32)
    optimizer = AdamW(groups(model))
    for seed in range(3):
        put(model, gradients_of(model, seed))
        with record_update(model, optimizer, moments=True) as recorder:
            optimizer.step()
        (recorder.read() if keep else recorder.read_lazily())
        again = recorder.step_with({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert_same(again.direction, recorder.update.direction, rtol=3e-5)


def test_a_step_that_was_left_out():
    """An overflow, say: the gradients of another loss may be finite, and there is a step that they would make."""
    recorded = Recorded("adamw", 3)
    gradients = gradients_of(recorded.model, 200)
    recorder = UpdateRecorder(recorded.model, recorded.optimizer)
    recorder.snapshot(moments=True)
    assert recorder.read().split_absent == "the step moved no parameter"
    update = recorder.step_with(gradients)
    put(recorded.model, gradients)
    recorder.snapshot()
    recorded.optimizer.step()
    assert_same(update.direction, recorder.read().direction)


class TestErrors:
    def test_before_read(self):
        model = Net()
        recorder = UpdateRecorder(model, AdamW(groups(model)))
        with pytest.raises(RuntimeError, match=r"no snapshot of the parameters: call snapshot\(\)"):
            recorder.step_with({})
        recorder.snapshot(moments=True)
        with pytest.raises(RuntimeError, match=r"no step has been read yet"):
            recorder.step_with({})

    def test_without_moments(self):
        recorded = Recorded("adamw", 1)
        recorded.recorder.snapshot()
        recorded.optimizer.step()
        recorded.recorder.read()
        with pytest.raises(RuntimeError, match=r"not kept: call snapshot\(moments=True\)"):
            recorded.recorder.step_with({})

    def test_forgotten(self):
        recorded = Recorded("adamw", 1)
        recorded.recorder.forget()
        with pytest.raises(RuntimeError, match=r"no snapshot of the parameters"):
            recorded.recorder.step_with({})

    @pytest.mark.parametrize("name", ["frozen.weight", "third.weight"])
    def test_a_parameter_that_is_not_trained(self, name):
        recorded = Recorded("sgd", 1)
        with pytest.raises(ValueError, match=rf"that the optimizer trains, got \['{name}'\] \(1 unknown\)"):
            recorded.recorder.step_with({name: torch.zeros(5, 5)})

    def test_another_shape(self):
        recorded = Recorded("sgd", 1)
        with pytest.raises(ValueError, match=r"gradient of first\.bias of shape \[5\], got \[1\]: take it from this"):
            recorded.recorder.step_with({"first.bias": torch.zeros(1)})

    def test_not_finite(self):
        recorded = Recorded("sgd", 1)
        with pytest.raises(ValueError, match=r"expected a finite gradient, got 5 numbers in first\.bias"):
            recorded.recorder.step_with({"first.bias": torch.full((5,), math.inf)})

    @pytest.mark.parametrize("steps", [0, 2])
    def test_an_optimizer_without_split(self, steps):
        recorded = Recorded("rmsprop", steps, make=RMSprop)
        with pytest.raises(ValueError, match=r"can be taken apart, got another: RMSprop is not of Adam's family") as e:
            recorded.recorder.step_with(recorded.gradients)
        assert recorded.update.split_absent in str(e.value)

    def test_a_learning_rate_of_zero(self):
        model = Net()
        optimizer = AdamW(model.parameters(), lr=0.0)
        put(model, gradients_of(model, 0))
        with record_update(model, optimizer, moments=True) as recorder:
            optimizer.step()
        with pytest.raises(ValueError, match=r"at a learning rate > 0, got 0\.0"):
            recorder.step_with(gradients_of(model, 1))
