"""Parameters that share memory are one, in the update, where the model is put at θ+ηv, and in derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.sample import sample_completions
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.rollout import TokenStats
from entropy_pl.updates import UpdateRecorder, displaced, record_update


class Turned(nn.Module):
    """A matrix and its transpose as parameters of their own, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        self.back = nn.Parameter(self.weight.detach().t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight + self.bias) @ self.back


STEPS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.2, foreach=False),
    "sgd-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2, foreach=False),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.2, foreach=False),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.2, foreach=False),
    "adamw, all at once": lambda p: AdamW(p, lr=1e-3, weight_decay=0.2, foreach=True),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_both_are_stepped_and_the_memory_counts_once(name, keep):
    model = Turned()
    optimizer = STEPS[name](model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((2, 4), 0.3 * (step + 1), dtype=torch.float64)).square().sum().backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        recorder = UpdateRecorder(model, optimizer)
        recorder.snapshot()
        optimizer.step()
        update = recorder.read() if keep else recorder.read_lazily()
        assert list(update.direction) == ["bias", "weight"]
        moved = {n: (p.detach() - before[n]) / update.lr for n, p in model.named_parameters()}
        assert all(torch.equal(update.direction[n], moved[n]) for n in update.direction)
        assert update.norm() == pytest.approx((moved["bias"].square().sum() + moved["weight"].square().sum()).sqrt())
        # One after another to rounding; all decayed first and stepped then, to lr·wd of the step.
        assert update.gap() < (1e-3 if "at once" in name else 1e-12)
        squares = {part: sum(float(v.square().sum()) for v in of.values()) for part, of in update.components.items()}
        assert update.component_norms() == pytest.approx({part: square**0.5 for part, square in squares.items()})
        assert update.preconditioner is None
        assert "share memory were each stepped" in update.preconditioner_absent
        with recorder.at_theta_before():
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
            with displaced(model, update, update.lr):
                for n, p in model.named_parameters():
                    torch.testing.assert_close(p.detach(), before[n] + update.lr * moved[n], rtol=1e-15, atol=1e-16)
            assert torch.equal(model.back, before["back"])
        assert model.back.data_ptr() == model.weight.data_ptr()


def test_one_of_them_is_stepped():
    """Then the other one moves too, and there is nothing to be said against P."""
    model = Turned()
    optimizer = AdamW([model.back, model.bias], lr=0.01)
    model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    update = recorder.update
    assert list(update.direction) == ["bias", "back"]
    assert update.gap() < 1e-12
    torch.testing.assert_close(update.components["gradient"]["back"], -update.preconditioner["back"] * model.back.grad)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    with recorder.at_theta_before(), displaced(model, update, update.lr):
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), after[n], rtol=1e-15, atol=1e-16)


def test_the_step_with_other_gradients():
    model = Turned()
    optimizer = AdamW(model.parameters(), lr=0.01, foreach=False)
    model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    with record_update(model, optimizer, moments=True) as recorder:
        optimizer.step()
    again = recorder.step_with({n: p.grad for n, p in model.named_parameters()})
    for name, value in recorder.update.direction.items():
        torch.testing.assert_close(again.direction[name], value, rtol=1e-11, atol=1e-13)


class TestViewsOfABuffer:
    """As trainers lay parameters out; they have storage in common, and perhaps numbers."""

    @staticmethod
    def recorded(**views: torch.Tensor) -> tuple[nn.ParameterDict, UpdateRecorder]:
        model = nn.ParameterDict({name: nn.Parameter(view) for name, view in views.items()})
        optimizer = SGD(model.parameters(), lr=0.5, foreach=False)
        for k, parameter in enumerate(model.values()):
            parameter.grad = torch.full_like(parameter, float(k + 1))
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        return model, recorder

    def test_one_behind_another(self):
        flat = torch.zeros(12, dtype=torch.float64)
        _, recorder = self.recorded(a=flat[:4].view(2, 2), b=flat[4:])
        assert {n: v.unique().tolist() for n, v in recorder.update.direction.items()} == {"a": [-1.0], "b": [-2.0]}
        assert recorder.update.gap() == 0

    def test_columns_in_turn(self):
        table = torch.zeros(5, 4, dtype=torch.float64)
        _, recorder = self.recorded(even=table[:, ::2], odd=table[:, 1::2])
        assert {n: v.unique().tolist() for n, v in recorder.update.direction.items()} == {"even": [-1.0], "odd": [-2.0]}
        assert recorder.update.preconditioner is not None

    def test_a_part_and_the_whole(self):
        flat = torch.zeros(6, dtype=torch.float64)
        model, recorder = self.recorded(part=flat[2:4], whole=flat)
        update = recorder.update
        assert {n: v.tolist() for n, v in update.direction.items()} == {"whole": [-2, -2, -3, -3, -2, -2]}
        assert update.components["gradient"]["whole"].tolist() == [-2, -2, -3, -3, -2, -2]
        with displaced(model, update, 1.0):
            assert model["part"].tolist() == [-4.5, -4.5]  # −1.5 by the step taken, −3 by this one


def test_lora_on_tied_embeddings():
    """Two usages of the same matrices: ⟨∇f, v⟩, the tangents and a finite difference are one, in float64."""
    torch.manual_seed(0)
    base = build_model(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    model = get_peft_model(base, config).double().eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if len({p.untyped_storage().data_ptr() for p in named.values()}) != 2:
        # .double() gave each memory of its own; put back what PEFT had made
        model = get_peft_model(build_model(tie_word_embeddings=True).double(), config).eval()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(named) == 4
    rollout = sample_completions(model, build_tokenizer(), ["1+2=", "3*4="], max_new_tokens=5)
    optimizer = AdamW(named.values(), lr=1e-3, foreach=False)
    model(input_ids=rollout.prompt_ids, labels=rollout.prompt_ids).loss.backward()
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    update = recorder.update
    assert len(update.direction) == 2
    assert update.gap() < 1e-9
    with recorder.at_theta_before():
        base_stats, exact = token_stats_jvp(model, rollout, update, method="forward_mode")
        _, differences = token_stats_jvp(model, rollout, update, method="central_difference")
        # h is such that log-ratios are about 1e-3: h² of them.
        torch.testing.assert_close(exact.logp, differences.logp, rtol=1e-4, atol=1e-4)
        ones = TokenStats(base_stats.mask.double(), torch.zeros_like(base_stats.entropy), base_stats.mask)
        gradient = weighted_gradient(model, rollout, ones, update.direction)
    whole, parts = update.along(gradient)
    assert whole == pytest.approx(float(exact.logp.sum()), rel=1e-9)
    assert sum(parts.values()) == pytest.approx(whole, rel=1e-6)
