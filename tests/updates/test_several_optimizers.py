"""One update of several optimizers' steps, against θ of a plain loop and each optimizer's own numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from entropy_pl.updates import UpdateRecorder, record_update


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def adamw_and_sgd(model: nn.Module) -> list[Optimizer]:
    """Biases by SGD, at another learning rate."""
    return [
        AdamW([p for p in model.parameters() if p.ndim == 2], lr=2e-3, weight_decay=0.3),
        SGD([p for p in model.parameters() if p.ndim == 1], lr=1e-2, momentum=0.9),
    ]


def backward(model: nn.Module, seed: int) -> None:
    batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model(batch).square().mean().backward()


def test_parts_add_up_over_both_in_units_of_the_larger_rate():
    """Each with its own gradients cleared and its own scheduler moved before the other steps."""
    model, twin = net(), net()
    optimizers, others = adamw_and_sgd(model), adamw_and_sgd(twin)
    alone = [UpdateRecorder(twin, other) for other in others]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (*optimizers, *others)]
    for step in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        backward(model, step)
        with record_update(model, optimizers) as recorder:
            for optimizer, schedule in zip(optimizers, schedules[:2], strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        update = recorder.update
        assert update.lr == 1e-2 * 0.5**step
        assert update.gap() < 1e-11  # θ ~ 0.3 rounded at 5e-17, over lr·v ~ 1e-4
        backward(twin, step)
        for one in alone:
            one.snapshot()
        for other in others:
            other.step()
        for one, ratio in zip(alone, (0.2, 1.0), strict=True):
            own = one.read()
            for name, value in own.direction.items():
                change = dict(model.named_parameters())[name].detach() - before[name]
                torch.testing.assert_close(update.direction[name] * update.lr, change, rtol=1e-15, atol=0)
                torch.testing.assert_close(update.direction[name], ratio * value, rtol=1e-9, atol=1e-12)
                for part, direction in own.components.items():
                    torch.testing.assert_close(
                        update.components[part][name], ratio * direction[name], rtol=1e-13, atol=0
                    )
                torch.testing.assert_close(
                    update.preconditioner[name], ratio * own.preconditioner[name], rtol=1e-13, atol=0
                )
        for other, schedule in zip(others, schedules[2:], strict=True):
            other.zero_grad()
            schedule.step()


def test_the_step_with_other_gradients_is_that_of_both():
    model = net()
    optimizers = adamw_and_sgd(model)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, step)
        twin, states = copy.deepcopy(model), [copy.deepcopy(o.state_dict()) for o in optimizers]
        with record_update(model, optimizers, moments=True) as recorder:
            for optimizer in optimizers:
                optimizer.step()
    others = adamw_and_sgd(twin)
    for other, state in zip(others, states, strict=True):
        other.load_state_dict(state)
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    twin.zero_grad()
    backward(twin, 100)
    for other in others:
        other.step()
    found = recorder.step_with({n: p.grad for n, p in twin.named_parameters()})
    for name, parameter in twin.named_parameters():
        # θ ~ 0.3 rounded at 5e-17, over lr·v ~ 1e-4.
        torch.testing.assert_close(
            found.direction[name] * found.lr, parameter.detach() - before[name], rtol=1e-10, atol=1e-15
        )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")
def test_muon_has_no_split_and_so_there_is_none_of_both():
    model = net()
    kinds = [torch.optim.Muon, AdamW]
    optimizers = [k([p for p in model.parameters() if (p.ndim == 2) == (k is not AdamW)], lr=1e-2) for k in kinds]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    backward(model, 0)
    with record_update(model, optimizers) as recorder:
        for optimizer in optimizers:
            optimizer.step()
    assert recorder.update.components is recorder.update.preconditioner is None
    assert recorder.update.split_absent.startswith("Muon is not of Adam's family")
    for name, parameter in model.named_parameters():
        assert torch.equal(recorder.update.direction[name], (parameter.detach() - before[name]) / 1e-2)


def test_a_parameter_that_both_step():
    """The second step begins where the first one ended: its decay is of that θ."""
    model = nn.Linear(3, 2).double()
    optimizers = [
        SGD(model.parameters(), lr=0.1, weight_decay=0.5),
        AdamW(model.parameters(), lr=0.05, weight_decay=0.3),
    ]
    before = model.weight.detach().clone()
    model(torch.ones(1, 3).double()).sum().backward()
    with record_update(model, optimizers) as recorder:
        for optimizer in optimizers:
            optimizer.step()
    update = recorder.update
    middle = before - 0.1 * (model.weight.grad + 0.5 * before)
    decay = -0.1 * 0.5 * before - 0.05 * 0.3 * middle
    torch.testing.assert_close(update.lr * update.components["weight_decay"]["weight"], decay, rtol=1e-13, atol=1e-16)
    assert update.gap() < 1e-13
    assert update.preconditioner is None
    assert "stepped, with a gradient and moments of their own (weight, bias)" in update.preconditioner_absent


class TestWhatIsNoStepOfBoth:
    def test_only_one_of_them(self):
        model = net()
        optimizers = adamw_and_sgd(model)
        backward(model, 0)
        with (
            pytest.raises(
                RuntimeError, match="every optimizer to step inside record_update, got none of SGD: leave it"
            ),
            record_update(model, optimizers),
        ):
            optimizers[0].step()

    def test_none_of_them(self):
        model = net()
        with record_update(model, adamw_and_sgd(model)) as recorder:
            pass
        assert recorder.update.norm() == 0

    def test_one_of_them_twice(self):
        model = net()
        optimizers = adamw_and_sgd(model)
        backward(model, 0)
        with record_update(model, optimizers):
            optimizers[0].step()
            with pytest.raises(RuntimeError, match="got a second: record each apart"):
                optimizers[0].step()
            optimizers[1].step()

    def test_one_that_holds_nothing_of_the_model(self):
        model = net()
        stray = RMSprop([nn.Parameter(torch.ones(1))])
        with pytest.raises(ValueError, match=r"expected RMSprop to hold trainable parameters of Sequential, got none"):
            UpdateRecorder(model, [*adamw_and_sgd(model), stray])
