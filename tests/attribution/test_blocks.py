"""Tokens' error bars from blocks of E, against those that every token's own tangents give."""

from __future__ import annotations

import pytest
import torch
from steps import log_probs, random_rollout, take_steps

from entropy_pl import token_stats_jvp
from entropy_pl.attribution import influence_matrix, token_standard_errors
from entropy_pl.estimators import first_order_delta_entropy
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.updates import UpdateVector


@pytest.fixture(scope="module")
def step():
    step = take_steps()
    step.e = random_rollout(24, 2, seed=7)  # two completions of each prompt: they share a block
    return step


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence"])
def test_one_block_per_prompt_is_the_clustered_influence(step, normalize):
    """Blocks of one prompt each give the estimate's own error bar, but for the noise of the per-position means."""
    clusters = torch.arange(24) // 2
    with float64_evaluation(step.model):
        found = token_standard_errors(
            step.model,
            step.e,
            step.u,
            step.update,
            token_coefficients=step.coefficients,
            blocks=100,
            normalize=normalize,
        )
        logp = log_probs(step.model, step.u)
        names = list(step.update.direction)
        parameters = [dict(step.model.named_parameters())[name] for name in names]
        checked = 0
        for u, k in [(0, 0), (2, 0), (5, 0), (1, 1)]:
            if not step.u.completion_mask[u, k]:
                continue
            gradient = torch.autograd.grad(logp[u, k], parameters, retain_graph=True, allow_unused=True)
            direction = {
                name: -step.update.preconditioner[name] * step.coefficients[u, k] * (0 if g is None else g)
                for name, g in zip(names, gradient, strict=True)
            }
            base, tangent = token_stats_jvp(step.model, step.e, UpdateVector(direction, lr=1.0))
            exact = first_order_delta_entropy(base, tangent, normalize=normalize, clusters=clusters)
            # what is neglected is of the order of 1/√N of it, N = 24 sequences
            assert float(found[u, k]) == pytest.approx(exact.stderr, rel=0.2)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence"])
def test_of_a_single_token_it_is_the_matrix_s(step, normalize):
    """With one block per prompt, and a loss of every completion's first token alone: the same in another way."""
    first = step.coefficients.clone()
    first[:, 1:] = 0
    options = {"token_coefficients": first, "normalize": normalize}
    with float64_evaluation(step.model):
        found = token_standard_errors(step.model, step.e, step.u, step.update, blocks=100, **options)
        matrix = influence_matrix(step.model, step.e, step.u, step.update, **options)
    assert (matrix.stderr > 0).all()
    torch.testing.assert_close(found[:, 0], matrix.stderr, rtol=1e-8, atol=0)  # float64, forward against reverse mode


def test_few_blocks_scatter_about_it(step):
    """Eight blocks know the standard error to a quarter: over all tokens together to less than half."""
    with float64_evaluation(step.model):
        options = {"token_coefficients": step.coefficients}
        every = token_standard_errors(step.model, step.e, step.u, step.update, blocks=12, **options)
        few = token_standard_errors(step.model, step.e, step.u, step.update, blocks=4, **options)
    mask = step.u.completion_mask
    ratio = few[mask].square().mean().sqrt() / every[mask].square().mean().sqrt()
    assert 0.5 < ratio < 2
    assert (every[~mask] == 0).all()


def test_a_wrong_gradient_scale_scales_it(step):
    with float64_evaluation(step.model):
        options = {"token_coefficients": step.coefficients, "blocks": 3}
        whole = token_standard_errors(step.model, step.e, step.u, step.update, **options)
        half = token_standard_errors(step.model, step.e, step.u, step.update, gradient_scale=0.5, **options)
    assert torch.allclose(half, 0.5 * whole, rtol=1e-9)


def test_one_prompt_has_no_blocks(step):
    with pytest.raises(ValueError, match="at least 2 blocks of E's prompts, got 1"):
        token_standard_errors(
            step.model, step.e.select(torch.arange(2)), step.u, step.update, token_coefficients=step.coefficients
        )
