"""The E×U matrix against the closed form of docs/theory.md, §11, and its error bars against exact ones."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from steps import N, Passes, T, direction_of_sequence, take_steps
from tiny import build_tokenizer

from entropy_pl import Rollout, sample_completions, token_stats, token_stats_jvp
from entropy_pl.attribution import attribute_update, influence_matrix, influence_matrix_cost
from entropy_pl.estimators import first_order_delta_entropy
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.updates import UpdateVector

ROWS = 40  # of E, of ten prompts: the error bars leave out terms smaller by 1/√40
OPTIONS = [
    {"normalize": n, "weighting": w}
    for n, w in itertools.product(("per_token", "per_sequence"), ("prefix", "sequence"))
]
IDS = ["-".join(options.values()) for options in OPTIONS]


@pytest.fixture(scope="module")
def step():
    made = take_steps(loss_type="dapo", max_norm=0.05, beta=0.1, steps=3, updates_per_rollout=3)
    return replace(made, e=sampled(made.model))


def sampled(model) -> Rollout:
    """E drawn from the policy, so that the means of its scores are noise about zero; six of 20 tokens end it."""
    tokenizer = build_tokenizer("0123456789+-=*()")
    prompts = [f"{i // 4 // 4}+{i // 4 % 4}=" for i in range(ROWS)]
    model.generation_config.eos_token_id = [1, *range(4, 9)]
    with isolated_rng(3):
        return sample_completions(model, tokenizer, prompts, max_new_tokens=T)


@pytest.fixture(scope="module")
def along(step):
    """E's statistics, and their exact derivatives along every v_u, by forward mode."""
    with float64_evaluation(step.model):
        found = [token_stats_jvp(step.model, step.e, direction_of_sequence(step, u)) for u in range(N)]
    return found[0][0], [tangent for _, tangent in found]


def matrix(step, **options):
    told = {"token_coefficients": step.coefficients, "gradient_scale": step.scale}
    with float64_evaluation(step.model):
        return influence_matrix(step.model, step.e, step.u, step.update, **told, **options)


@pytest.mark.parametrize("with_baseline", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_entries_are_the_closed_form(step, along, options, with_baseline):
    """M_iu = D_i along v_u, written in loops."""
    base, tangents = along
    baseline = 0.3 * base.logp if with_baseline else None
    found = matrix(step, baseline=baseline, **options)
    per_token, prefix = options["normalize"] == "per_token", options["weighting"] == "prefix"
    h, m = base.entropy.tolist(), base.mask.double().tolist()
    rows, width = range(ROWS), range(base.mask.shape[1])
    tokens = sum(map(sum, m))
    centre = sum(map(sum, h)) / tokens if per_token else 0.0
    mean_length = tokens / ROWS if per_token else 1.0
    c = [[m[i][k] * (h[i][k] - centre) for k in width] for i in rows]
    expected = torch.zeros(ROWS, N, dtype=torch.float64)
    for u, tangent in enumerate(tangents):
        sdot, hdot = tangent.logp.tolist(), tangent.entropy.tolist()
        for i in rows:
            d = sum(hdot[i])
            for k in width:
                first = k + 1 if prefix else 0
                mean = sum(sum(c[j][first:]) for j in rows) / ROWS
                subtracted = mean if baseline is None else float(baseline[i, k])
                d += sdot[i][k] * (sum(c[i][first:]) - subtracted)
            expected[i, u] = d / mean_length
    # float64 sums of some thousand terms, of the largest
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("integrand", ["rao_blackwell", "surprisal"])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_columns_add_up_to_the_attribution(step, options, integrand):
    found = matrix(step, integrand=integrand, **options)
    with float64_evaluation(step.model):
        expected = attribute_update(
            step.model,
            step.e,
            step.u,
            step.update,
            token_coefficients=step.coefficients,
            gradient_scale=step.scale,
            integrand=integrand,
            **options,
        ).per_sequence
    assert found.values.shape == (ROWS, N)
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.per_sequence, expected, rtol=0, atol=1e-9 * largest)
    torch.testing.assert_close(found.values.mean(0), found.per_sequence)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_error_bars(step, along, options, clustered):
    """They differ from the exact ones by no more than the error bar of the term that is left out.

    That is Σ_k λ̄_k (c_ik − c̄_k)/T̄, the noise of the means λ̄ of the tangents of the log weights. Two standard deviations
    differ by no more than that of the difference, so the bound holds to rounding.
    """
    base, tangents = along
    clusters = torch.arange(ROWS) // 4 if clustered else list(range(ROWS))
    found = matrix(step, clusters=clusters, **options)
    per_token = options["normalize"] == "per_token"
    mask = base.mask.double()
    centre = base.entropy.sum() / mask.sum() if per_token else 0.0
    c = base.entropy - centre * mask
    for u, tangent in enumerate(tangents):
        exact = first_order_delta_entropy(base, tangent, clusters=clusters, **options).stderr
        weight = tangent.logp.cumsum(1)
        weight = weight - tangent.logp if options["weighting"] == "prefix" else weight[:, -1:].expand_as(weight)
        left_out = (weight.mean(0) * (c - c.mean(0))).sum(1) / (mask.sum(1).mean() if per_token else 1.0)
        groups = left_out.view(-1, 4).sum(1) if clustered else left_out
        count = len(groups)
        size = math.sqrt(count / (count - 1) * float(groups.square().sum())) / ROWS
        assert exact > 0
        assert abs(float(found.stderr[u]) - exact) <= size * (1 + 1e-9)
        # A term of lower order: λ̄ is the mean of as many numbers of mean zero, within 2/√count of their own size.
        assert float(found.stderr[u]) == pytest.approx(exact, rel=2 / math.sqrt(count))


def test_what_the_quotient_adds_is_needed(step, along):
    """Without the noise of ĥ and of the mean length the error bars are further off."""
    base, tangents = along
    found = matrix(step, clusters=list(range(ROWS)))
    exact = torch.tensor([first_order_delta_entropy(base, tangent).stderr for tangent in tangents])
    naive = found.values.std(0) / math.sqrt(ROWS)
    with_it, without = (float(((bars - exact) / exact).abs().mean()) for bars in (found.stderr, naive))
    assert with_it < 0.6 * without


@pytest.mark.parametrize("block", [1, 3, N])
def test_blocks(block):
    """One gradient of U held at a time, three, or all: the same matrix for the passes that were announced."""
    step = take_steps()
    whole = matrix(step)
    size = 8 * sum(p.numel() for p in step.model.parameters())
    with float64_evaluation(step.model):
        base = token_stats(step.model, step.e)
        cost = influence_matrix_cost(step.model, len(step.e), N, step.update, max_bytes=block * size)
    passes = Passes(step.model)
    found = matrix(step, base=base, max_bytes=block * size)
    assert [rows for rows in passes.rows if rows > 1] == [len(step.e)]  # the mean length's gradient, all of E at once
    assert passes.rows.count(1) == cost.passes == N + len(step.e) * -(-N // block)
    assert cost.blocks == -(-N // block)
    assert cost.bytes == (block + 1) * size
    assert str(cost.passes) in str(cost)
    # roundings: products of other shapes add up in another order
    largest = float(whole.values.abs().max())
    torch.testing.assert_close(found.values, whole.values, rtol=0, atol=1e-12 * largest)
    torch.testing.assert_close(found.stderr, whole.stderr, rtol=1e-9, atol=0)


def test_per_sequence_needs_no_mean_length():
    step = take_steps()
    with float64_evaluation(step.model):
        base = token_stats(step.model, step.e)
    passes = Passes(step.model)
    matrix(step, base=base, normalize="per_sequence")
    assert set(passes.rows) == {1}


def test_in_float32(step):
    """The gradients of the model's own precision; 1e-5 of the largest entry: float32 through two layers."""
    exact = matrix(step).values
    values = {name: p.data for name, p in step.model.named_parameters()}
    step.model.float()
    found = influence_matrix(
        step.model,
        step.e,
        step.u,
        step.update,
        token_coefficients=step.coefficients,
        gradient_scale=step.scale,
    ).values
    for name, parameter in step.model.named_parameters():
        parameter.data = values[name]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_errors_are_named(step):
    bare = UpdateVector(step.update.direction, lr=1e-3, split_absent="Lion is not of Adam's family")
    with pytest.raises(ValueError, match="update with a preconditioner, got none: Lion is not of"):
        matrix(replace(step, update=bare))
    with pytest.raises(ValueError, match=r"max_bytes of at least \d+, one gradient of \d+ parameters, got 8"):
        influence_matrix_cost(step.model, 4, 4, step.update, max_bytes=8)
    with pytest.raises(ValueError, match=r"max_bytes of at least \d+, one gradient of \d+ parameters, got 8"):
        matrix(step, max_bytes=8)
