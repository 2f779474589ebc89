"""Gradients of weighted statistics against autograd through a loop over tokens, its log-softmax written by hand."""

from __future__ import annotations

import pytest
import torch
from test_precision import TestQuantized, needs_bitsandbytes, quantized  # noqa: F401  (a fixture)
from test_score import VOCABULARY, build_family, build_rollout
from torch import Tensor, nn

from entropy_pl.policy.gradients import sequence_gradients, weighted_gradient
from entropy_pl.policy.head import output_head
from entropy_pl.policy.precision import evaluation, float64_evaluation
from entropy_pl.rollout import Rollout, TokenStats

ROLLOUT = build_rollout(extra=2)
FORBIDDEN = torch.tensor([2, 7])  # tokens of probability zero; no completion below has them
EXACT = 1e-10  # float64 sums of some hundred terms, relative to the largest entry


def random_coefficients(rollout: Rollout = ROLLOUT, scale: float = 1.0) -> TokenStats:
    generator = torch.Generator().manual_seed(5)
    mask = rollout.completion_mask
    a, b = scale * torch.randn((2, *mask.shape), generator=generator, dtype=torch.float64) * mask
    return TokenStats(a, b, mask)


def loop(
    model: nn.Module, rollout: Rollout, coefficients: TokenStats, temperature: float, allowed: Tensor | None = None
) -> Tensor:
    """Σ a log π + b h, token by token, each sequence alone and without padding."""
    allowed = torch.arange(VOCABULARY) if allowed is None else allowed
    place = {int(token): i for i, token in enumerate(allowed)}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        completion = rollout.completion_ids[i][rollout.completion_mask[i]].tolist()
        if not completion:
            continue
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        for k, token in enumerate(completion):
            z = logits[len(prompt) - 1 + k][allowed].double() / temperature
            log_p = z - (z - z.max()).exp().sum().log() - z.max()
            h = -(log_p.exp() * log_p).sum()
            total = total + coefficients.logp[i, k] * log_p[place[token]] + coefficients.entropy[i, k] * h
    return total


def autograd(model: nn.Module, names: list[str], value: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(parameters[name]) if gradient is None else gradient
        for name, gradient in zip(names, gradients, strict=True)
    }


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to ``tolerance`` × the largest entry of all."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 0.01  # or there is nothing to agree on
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("budget", "temperature"), [(None, 1.0), (1, 0.7), (12, 0.7)])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "gemma2", "gpt2"])
def test_against_autograd(family, lora, budget, temperature):
    """With prompts and completions of all lengths, one of them empty; base weights frozen under an adapter."""
    model, coefficients = build_family(family, lora), random_coefficients()
    names = trainable(model)
    with float64_evaluation(model):
        rollout = ROLLOUT.at_temperature(temperature)
        found = weighted_gradient(model, rollout, coefficients, names, max_batch_tokens=budget)
        expected = autograd(model, names, loop(model, ROLLOUT, coefficients, temperature))
    assert_gradients(found, expected, EXACT)


@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_each_statistic_by_itself(which):
    model, both = build_family("qwen2"), random_coefficients()
    zero = torch.zeros_like(both.logp)
    coefficients = TokenStats(*((both.logp, zero) if which == "logp" else (zero, both.entropy)), both.mask)
    names = trainable(model)
    with float64_evaluation(model):
        found = weighted_gradient(model, ROLLOUT, coefficients, names)
        expected = autograd(model, names, loop(model, ROLLOUT, coefficients, 1.0))
    assert_gradients(found, expected, EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_tokens_of_probability_zero(scale, dtype):
    """Logits of −inf: 0 log 0 is 0, and no coefficient makes it anything else."""
    rollout = build_rollout()
    for token in FORBIDDEN:
        rollout.completion_ids[rollout.completion_ids == token] = 11
    model, coefficients = build_family("qwen2"), random_coefficients(rollout, scale)
    output_head(model).register_forward_hook(lambda *io: io[2].index_fill(-1, FORBIDDEN, -torch.inf))
    allowed = torch.tensor([token for token in range(VOCABULARY) if token not in FORBIDDEN])
    names = trainable(model)
    with float64_evaluation(model):
        found = weighted_gradient(model, rollout.at_temperature(0.7), coefficients, names, entropy_dtype=dtype)
        expected = autograd(model, names, loop(model, rollout, coefficients, 0.7, allowed))
    # A softmax in float32 has 1e-7 of its own.
    assert_gradients(found, expected, EXACT if dtype is torch.float64 else 1e-5)


def test_in_float32():
    model, coefficients = build_family("qwen2", lora=True), random_coefficients()
    names = trainable(model)
    with evaluation(model):
        found = weighted_gradient(model, ROLLOUT, coefficients, names)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    with float64_evaluation(model):
        expected = autograd(model, names, loop(model, ROLLOUT, coefficients, 1.0))
    # Float32's 6e-8 through two layers.
    assert_gradients({name: gradient.double() for name, gradient in found.items()}, expected, 1e-5)


def test_in_bfloat16_weights_it_computes_in_float32():
    model, coefficients = build_family("qwen2").bfloat16(), random_coefficients()
    names = trainable(model)
    found = weighted_gradient(model, ROLLOUT, coefficients, names)
    with float64_evaluation(model):
        expected = autograd(model, names, loop(model, ROLLOUT, coefficients, 1.0))
    # As above; bfloat16 products would be off by 1e-2.
    assert_gradients({name: gradient.double() for name, gradient in found.items()}, expected, 1e-5)


def test_parameters_that_are_not_reached():
    """A parameter no logit depends on has a gradient of zero, as have all without a coefficient."""
    model, coefficients = build_family("qwen2"), random_coefficients()
    model.register_parameter("beside", nn.Parameter(torch.ones(3)))
    found = weighted_gradient(model, ROLLOUT, coefficients, ["beside", "lm_head.weight"])
    assert torch.equal(found["beside"], torch.zeros(3))
    assert found["lm_head.weight"].any()
    nothing = TokenStats(*(torch.zeros_like(coefficients.logp) for _ in range(2)), coefficients.mask)
    assert not any(g.any() for g in weighted_gradient(model, ROLLOUT, nothing, trainable(model)).values())
    empty = Rollout.empty()
    none = TokenStats(torch.zeros(0, 1), torch.zeros(0, 1), empty.completion_mask)
    assert not any(g.any() for g in weighted_gradient(model, empty, none, trainable(model)).values())


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_sequence_by_sequence(lora):
    """One flat vector each, in order, the empty completion's being zero; their sum is the whole."""
    model, coefficients = build_family("qwen2-tied", lora), random_coefficients()
    names = trainable(model)
    with float64_evaluation(model):
        found = list(sequence_gradients(model, ROLLOUT.at_temperature(0.7), coefficients, names))
        whole = weighted_gradient(model, ROLLOUT.at_temperature(0.7), coefficients, names)
        for i, gradient in enumerate(found):
            row = torch.tensor([i])
            if not ROLLOUT.completion_mask[i].any():
                assert not gradient.any()
                continue
            expected = autograd(model, names, loop(model, ROLLOUT.select(row), coefficients.select(row), 0.7))
            flat = torch.cat([expected[name].flatten() for name in names])
            torch.testing.assert_close(gradient, flat, rtol=0, atol=EXACT * float(flat.abs().max()))
    flat = torch.cat([whole[name].flatten() for name in names])
    torch.testing.assert_close(sum(found), flat, rtol=0, atol=EXACT * float(flat.abs().max()))
    assert len(found) == len(ROLLOUT)


@needs_bitsandbytes
def test_through_quantized_layers(quantized):  # noqa: F811
    """nf4 in float32 against the same weights in plain layers."""
    twin = TestQuantized.dequantized(quantized)
    rollout, names = build_rollout(), trainable(quantized)
    coefficients = random_coefficients(rollout)
    found, expected = (weighted_gradient(model, rollout, coefficients, names) for model in (quantized, twin))
    assert_gradients(found, expected, 1e-4)  # float32 against float32, whose products add up in another order
    assert any("lora" in name for name in names)


@pytest.mark.parametrize("gradient_there", [False, True])
def test_the_model_is_left_as_it_was(gradient_there):
    model, coefficients = build_family("qwen2", lora=True), random_coefficients()
    next(model.modules()).eval()  # modes that differ from part to part
    if gradient_there:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    before = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.no_grad():  # a probe's own surroundings
        found = weighted_gradient(model, ROLLOUT, coefficients, trainable(model))
    assert any(gradient.any() for gradient in found.values())
    assert not any(gradient.requires_grad for gradient in found.values())
    for name, parameter in model.named_parameters():
        pointer, value, requires_grad = before[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (pointer, requires_grad)
        assert torch.equal(parameter, value)
        if gradient_there and requires_grad:
            assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))
        else:
            assert parameter.grad is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_errors_are_named():
    model, coefficients = build_family("qwen2"), random_coefficients()
    with pytest.raises(KeyError, match=r"names of the model's parameters, got \['other'\] \(1 unknown\)"):
        weighted_gradient(model, ROLLOUT, coefficients, ["other"])
    with pytest.raises(ValueError, match=r"coefficients of the rollout's shape \[6, 8\], got \[6, 6\]"):
        weighted_gradient(model, ROLLOUT, random_coefficients(build_rollout()), trainable(model))
    with pytest.raises(ValueError, match="max_batch_tokens ≥ 1, got 0"):
        weighted_gradient(model, ROLLOUT, coefficients, trainable(model), max_batch_tokens=0)
