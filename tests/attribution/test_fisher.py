"""The Fisher kernel against autograd in loops, and its summary against means written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from steps import Passes, log_probs, random_rollout
from tiny import build_model

from entropy_pl.attribution import fisher_kernel, fisher_kernel_cost, kernel_summary
from entropy_pl.policy.adapter import attach_lora
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.settings import LoraSettings
from entropy_pl.rollout import Rollout

A, B = random_rollout(5, 1, seed=1), random_rollout(6, 2, seed=2)
EXACT = 1e-11  # float64 sums over some ten thousand parameters, of the largest entry


def build(lora: bool = False):
    model = build_model(seed=1, vocab_size=20)
    if lora:
        with isolated_rng(0):
            model = attach_lora(model, LoraSettings(rank=2))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def metric_of(model) -> dict[str, torch.Tensor]:
    """Some P, as an optimizer's: positive, another number for every parameter."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def score_gradients(model, rollout: Rollout, names: list[str]) -> list[list[torch.Tensor]]:
    parameters = dict(model.named_parameters())
    found = []
    for i in range(len(rollout)):
        logp = log_probs(model, rollout.select(torch.tensor([i])))[0]
        total = sum(logp[k] for k in range(int(rollout.completion_mask[i].sum())))
        found.append(torch.autograd.grad(total, [parameters[name] for name in names]))
    return found


def loop_kernel(model, a: Rollout, b: Rollout, metric: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    of_a, of_b = (score_gradients(model, rollout, names) for rollout in (a, b))
    kernel = torch.zeros(len(a), len(b), dtype=torch.float64)
    for i, g in enumerate(of_a):
        for j, other in enumerate(of_b):
            for name, x, y in zip(names, g, other, strict=True):
                kernel[i, j] += float((x * y * (1 if metric is None else metric[name])).sum())
    return kernel


def assert_kernel(found: torch.Tensor, expected: torch.Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("with_metric", [False, True])
def test_against_autograd(with_metric, lora):
    model = build(lora)
    metric = metric_of(model) if with_metric else None
    with float64_evaluation(model):
        found = fisher_kernel(model, A, B, preconditioner=metric)
        expected = loop_kernel(model, A, B, metric)
    assert found.dtype == torch.float64
    assert_kernel(found, expected)


@pytest.mark.parametrize("with_metric", [False, True])
def test_of_a_batch_with_itself(with_metric):
    """Symmetric, positive semi-definite, and for half the passes what two equal batches give."""
    model = build()
    metric = metric_of(model) if with_metric else None
    with float64_evaluation(model):
        twice = fisher_kernel(model, B, B.to("cpu"), preconditioner=metric)
        passes = Passes(model)
        found = fisher_kernel(model, B, B, preconditioner=metric)
        cost = fisher_kernel_cost(model, B, B, preconditioner=metric)
    assert passes.rows == [1] * cost.passes == [1] * len(B)
    assert_kernel(found, twice)
    assert_kernel(found, found.T)
    eigenvalues = torch.linalg.eigvalsh((found + found.T) / 2)
    assert float(eigenvalues[0]) > -EXACT * float(eigenvalues[-1])


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("block", [1, 4, 6])
def test_blocks(block, same):
    model = build()
    a = B if same else A
    with float64_evaluation(model):
        whole = fisher_kernel(model, a, B, preconditioner=metric_of(model))
        size = 8 * sum(p.numel() for p in model.parameters())
        cost = fisher_kernel_cost(model, a, B, max_bytes=block * size)
        passes = Passes(model)
        found = fisher_kernel(model, a, B, preconditioner=metric_of(model), max_bytes=block * size)
    blocks = math.ceil(len(B) / block)
    assert passes.rows == [1] * cost.passes
    assert cost.passes == len(B) + (0 if same and blocks == 1 else blocks * len(a))
    assert (cost.blocks, cost.bytes) == (blocks, (min(block, len(B)) + 1) * size)
    assert_kernel(found, whole)


def test_temperature():
    """At temperature τ scores are those of a policy whose logits are divided by it."""
    model, cooler = build(), build()
    with float64_evaluation(model):
        found = fisher_kernel(model, A, B, preconditioner={"lm_head.weight": torch.ones(20, 32)}, temperature=0.5)
    with torch.no_grad():
        cooler.lm_head.weight.mul_(2)
    with float64_evaluation(cooler):
        # ∂/∂W at W = 2W₀ is half of ∂/∂W₀
        expected = 4 * fisher_kernel(cooler, A, B, preconditioner={"lm_head.weight": torch.ones(20, 32)})
    assert_kernel(found, expected)


def test_in_float32():
    model = build(lora=True)
    found = fisher_kernel(model, A, B)
    with float64_evaluation(model):
        assert_kernel(found, fisher_kernel(model, A, B), 1e-4)  # float32's 6e-8 through two layers, twice


def test_a_completion_without_tokens_has_no_score():
    model = build()
    empty = Rollout(A.prompt_ids, A.prompt_mask, A.completion_ids, A.completion_mask & (torch.arange(5) > 1)[:, None])
    kernel = fisher_kernel(model, empty, B)
    assert not kernel[:2].any()
    assert kernel[2:].all()


def test_errors_are_named():
    model = build()
    with pytest.raises(ValueError, match=r"max_bytes of at least \d+, one gradient of \d+ parameters, got 100"):
        fisher_kernel(model, A, B, max_bytes=100)
    with pytest.raises(ValueError, match=r"kernel of a batch with itself, \[N, N\], got \[5, 6\]"):
        kernel_summary(torch.ones(5, 6), None)
    with pytest.raises(ValueError, match=r"clusters of shape \[5\]"):
        kernel_summary(torch.ones(5, 5), [0, 1])


class TestSummary:
    KERNEL = (lambda g: g @ g.T)(torch.randn(7, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
    PROMPTS = (0, 0, 1, 1, 1, 2, 3)

    @classmethod
    def mean(cls, kernel: torch.Tensor, within: bool, without: int | None = None) -> float:
        values = []
        for i, j in itertools.permutations(range(7), 2):
            pair = (cls.PROMPTS[i], cls.PROMPTS[j])
            if without not in pair and (pair[0] == pair[1]) == within:
                values.append(float(kernel[i, j]))
        return sum(values) / len(values)

    def test_in_loops(self):
        found = kernel_summary(self.KERNEL, torch.tensor(self.PROMPTS))
        cosine = torch.tensor(
            [
                [float(self.KERNEL[i, j]) / math.sqrt(self.KERNEL[i, i] * self.KERNEL[j, j]) for j in range(7)]
                for i in range(7)
            ]
        )
        assert found.within_prompt == pytest.approx(self.mean(self.KERNEL, True))
        assert found.between_prompts == pytest.approx(self.mean(self.KERNEL, False))
        assert found.within_cosine == pytest.approx(self.mean(cosine, True), rel=1e-6)  # the oracle is in float32
        assert found.between_cosine == pytest.approx(self.mean(cosine, False), rel=1e-6)
        for within, stderr in ((True, found.within_stderr), (False, found.between_stderr)):
            without = [self.mean(self.KERNEL, within, prompt) for prompt in range(4)]
            centre = sum(without) / 4
            assert stderr == pytest.approx(math.sqrt(3 / 4 * sum((x - centre) ** 2 for x in without)))
        assert found.to_dict()["within_prompt"] == found.within_prompt

    def test_where_there_are_no_pairs(self):
        each_its_own = kernel_summary(self.KERNEL, None)
        assert each_its_own.within_prompt is each_its_own.within_cosine is each_its_own.within_stderr is None
        assert each_its_own.between_prompts is not None
        assert each_its_own.between_stderr is not None
        one = kernel_summary(self.KERNEL, [0] * 7)
        assert one.between_prompts is one.between_cosine is one.between_stderr is one.within_stderr is None
        assert one.within_prompt is not None
        two = kernel_summary(self.KERNEL, [0, 0, 0, 0, 1, 1, 1])
        assert two.between_stderr is None  # without either prompt there is no pair of two
        assert two.within_stderr is not None

    def test_of_an_ascent(self):
        """P is negative under ``maximize``, and so is the kernel: a cosine of −1 with itself, and none beyond."""
        found, turned = (kernel_summary(kernel, self.PROMPTS) for kernel in (self.KERNEL, -self.KERNEL))
        assert turned.within_prompt == pytest.approx(-found.within_prompt)
        assert turned.within_cosine == pytest.approx(-found.within_cosine)

    def test_a_sequence_without_a_score(self):
        kernel = self.KERNEL.clone()
        kernel[3] = kernel[:, 3] = 0
        found = kernel_summary(kernel, self.PROMPTS)
        assert math.isfinite(found.within_cosine)
        assert math.isfinite(found.between_cosine)
