"""Tangents against finite differences of a plain loop and against reverse mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_precision import quantized, random_update  # noqa: F401  (a fixture)
from test_score import SMOOTH, build_family, build_rollout, plain_stats
from torch import Tensor, nn

from entropy_pl.policy.precision import evaluation, float64_evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import resolve_method, tangents, token_stats_jvp
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates import UpdateVector

ROLLOUT = build_rollout()
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra 'gpu')"
)


@contextmanager
def moved(model: nn.Module, update: UpdateVector, eta: float) -> Iterator[None]:
    """θ + ηv by hand, in place."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in update.direction:
                p.add_(update.direction[name], alpha=eta)
        try:
            yield
        finally:
            for name, p in model.named_parameters():
                p.copy_(before[name])


def loop_derivatives(
    model: nn.Module, rollout: Rollout, update: UpdateVector, step: float = 4e-3, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """First and second derivative of (logp, entropy) along v, ``[2, N, T]`` each, by six-point differences in float64.

    v has norm 1, the statistics vary over η ~ 1. First: truncation step⁶/140 ~ 1e-16 × the seventh derivative,
    rounding 1e-15/step ~ 1e-12. Second: step⁶/560, and 1e-15/step² ~ 1e-10.
    """
    with float64_evaluation(model), torch.no_grad():
        values = {}
        for k in range(-3, 4):
            with moved(model, update, k * step):
                values[k] = torch.stack(plain_stats(model, rollout, temperature))
    odd = {k: values[k] - values[-k] for k in (1, 2, 3)}
    even = {k: values[k] + values[-k] for k in (1, 2, 3)}
    first = (45 * odd[1] - 9 * odd[2] + odd[3]) / (60 * step)
    second = (270 * even[1] - 27 * even[2] + 2 * even[3] - 490 * values[0]) / (180 * step**2)
    return first, second


def assert_derivatives(stats, expected: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` × the largest."""
    for found, exact in zip((stats.logp, stats.entropy), expected, strict=True):
        largest = float(exact.abs().max())
        assert largest > 0.01  # or there is nothing to agree on
        torch.testing.assert_close(found, exact, rtol=0, atol=tolerance * largest)


class TestForwardMode:
    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
    @pytest.mark.parametrize("family", SMOOTH)
    def test_against_differences_of_a_loop(self, family, lora):
        model = build_family(family, lora)
        update = random_update(model)
        expected, _ = loop_derivatives(model, ROLLOUT, update)
        with float64_evaluation(model):
            result = tangents(model, ROLLOUT, update, method="forward_mode")
            base = token_stats(model, ROLLOUT)
        assert result.method == "forward_mode"
        assert result.second is None
        assert_derivatives(result.first, expected, 1e-9)  # the oracle's own rounding, 1e-12, with room
        # The two passes differ in their attention kernel only.
        torch.testing.assert_close(result.base.logp, base.logp, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.base.entropy, base.entropy, rtol=1e-12, atol=1e-12)
        assert not result.first.logp[~ROLLOUT.completion_mask].any()

    @pytest.mark.parametrize("family", ["qwen2-tied", "llama", "gemma2", "opt-relu"])
    def test_against_reverse_mode(self, family):
        """⟨u, J v⟩ = ⟨Jᵀu, v⟩ for random u: the right side is a plain backward pass."""
        model = build_family(family, lora=True).requires_grad_(True)
        update = random_update(model)
        u = torch.randn((2, *ROLLOUT.completion_ids.shape), generator=torch.Generator().manual_seed(3)).double()
        with float64_evaluation(model):
            parameters = dict(model.named_parameters())
            loss = (u * torch.stack(plain_stats(model, ROLLOUT, temperature=0.7))).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            _, first = token_stats_jvp(model, ROLLOUT, update, temperature=0.7, method="forward_mode")
        expected = sum(
            float((g * update.direction[n]).sum()) for n, g in zip(parameters, gradients, strict=True) if g is not None
        )
        found = float((u[0] * first.logp + u[1] * first.entropy).sum())
        assert abs(expected) > 0.1
        assert found == pytest.approx(expected, rel=1e-11)  # two float64 sums over some thousand terms

    def test_in_float32(self):
        model = build_family("qwen2", lora=True)
        update = random_update(model)
        expected, _ = loop_derivatives(model, ROLLOUT, update)
        _, first = token_stats_jvp(model, ROLLOUT, update, method="forward_mode")
        assert_derivatives(first, expected, 1e-5)  # float32's 6e-8 through two layers

    @pytest.mark.parametrize("budget", [1, 11, 25])
    def test_budget(self, budget):
        model = build_family("qwen2")
        update = random_update(model)
        with float64_evaluation(model):
            whole = tangents(model, ROLLOUT, update)
            parts = tangents(model, ROLLOUT, update, max_batch_tokens=budget)
        assert_derivatives(parts.first, torch.stack([whole.first.logp, whole.first.entropy]), 1e-12)  # roundings

    @pytest.mark.parametrize("factor", [-2.0, 1e-6, 1e6])
    def test_linear_in_v(self, factor):
        model = build_family("llama")
        update = random_update(model)
        with float64_evaluation(model):
            _, first = token_stats_jvp(model, ROLLOUT, update)
            _, scaled = token_stats_jvp(model, ROLLOUT, update.scaled(factor))
        back = TokenStats(scaled.logp / factor, scaled.entropy / factor, scaled.mask)
        assert_derivatives(back, torch.stack([first.logp, first.entropy]), 1e-12)  # roundings

    def test_additive_in_v(self):
        """Over the parameters one by one, and so for an update of some parameters only."""
        model = build_family("qwen2", lora=True)
        update = random_update(model)
        total = torch.zeros(ROLLOUT.completion_ids.shape, dtype=torch.float64)
        with float64_evaluation(model):
            _, whole = token_stats_jvp(model, ROLLOUT, update)
            for name, direction in list(update.direction.items()):
                total += token_stats_jvp(model, ROLLOUT, UpdateVector({name: direction}, lr=1.0))[1].logp
        torch.testing.assert_close(total, whole.logp, rtol=1e-11, atol=1e-11)  # roundings of 28 terms


class TestCentralDifference:
    @pytest.mark.parametrize("family", SMOOTH)
    def test_float64(self, family):
        model = build_family(family)
        update = random_update(model)
        first, second = loop_derivatives(model, ROLLOUT, update)
        with float64_evaluation(model):
            result = tangents(model, ROLLOUT, update, method="central_difference")
            exact = tangents(model, ROLLOUT, update, method="forward_mode")
        assert result.method == "central_difference"
        # Σr ~ 1e-3, so h ~ 1e-3: truncation h²/6 × the third derivative, which here is up to 30 times the first.
        assert_derivatives(result.first, first, 1e-5)
        assert_derivatives(result.first, torch.stack([exact.first.logp, exact.first.entropy]), 1e-5)
        # Likewise h²/12 × the fourth derivative.
        assert_derivatives(result.second, second, 1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("family", SMOOTH)
    def test_float32(self, family, dtype):
        model = build_family(family).to(dtype)
        update = random_update(model)
        first, second = loop_derivatives(model, ROLLOUT, update)
        result = tangents(model, ROLLOUT, update)
        assert result.method == "central_difference"
        sums = (token_stats(model, ROLLOUT, update=update, eta=result.step).logp - result.base.logp).sum(1)
        assert 0.05 / 4 < sums.abs().max() < 0.05 * 4  # what the step was chosen for
        # h ~ 0.05 to 0.3: truncation h²/6 × the third derivative; rounding, 1e-6/h ~ 1e-5, is far below.
        assert_derivatives(result.first, first, 1e-2)
        # Truncation h²/12 × the fourth derivative; rounding 1e-6/h² ~ 1e-4.
        assert_derivatives(result.second, second, 5e-2)

    @pytest.mark.parametrize("lr", [1e-6, 1.0])
    @pytest.mark.parametrize("norm", [1e6, 1e-6])
    @pytest.mark.parametrize("family", ["qwen2", "gpt2"])
    def test_any_size_of_v(self, family, norm, lr):
        """The step is found wherever it is, and the answer is the one at norm 1, times the norm."""
        model = build_family(family, lora=True)
        update = random_update(model)
        first, second = loop_derivatives(model, ROLLOUT, update)
        sized = UpdateVector(update.scaled(norm).direction, lr=lr)
        result = tangents(model, ROLLOUT, sized, method="central_difference")
        for found, exact, unit, tolerance in (
            (result.first, first, norm, 1e-2),  # as in float32 at norm 1
            (result.second, second, norm**2, 5e-2),
        ):
            assert_derivatives(TokenStats(found.logp / unit, found.entropy / unit, found.mask), exact, tolerance)

    def test_without_a_learning_rate(self):
        """A direction of one's own making need not come from a step."""
        model = build_family("llama")
        update = random_update(model)
        first, _ = loop_derivatives(model, ROLLOUT, update)
        assert_derivatives(tangents(model, ROLLOUT, UpdateVector(update.direction, lr=0.0)).first, first, 1e-2)

    @pytest.mark.parametrize("family", ["qwen2", "gemma2"])
    def test_the_middle_may_stand_for_theta(self, family):
        """Two passes instead of three, off by half of h² times the second derivative."""
        model, passes = build_family(family, lora=True), []
        update = random_update(model)
        with float64_evaluation(model):
            exact = tangents(model, ROLLOUT, update, method="central_difference")
            found = tangents(
                model, ROLLOUT, update, method="central_difference", midpoint_base=True, on_pass=passes.append
            )
        assert passes == ["tangents"] * 2
        assert found.second is None
        assert found.step == exact.step
        assert torch.equal(found.first.logp, exact.first.logp)
        for middle, base, second in (
            (found.base.logp, exact.base.logp, exact.second.logp),
            (found.base.entropy, exact.base.entropy, exact.second.entropy),
        ):
            assert (middle - base).abs().max() > 0
            # By definition of the second difference, up to the rounding of a log-prob.
            torch.testing.assert_close(middle - base, 0.5 * exact.step**2 * second, rtol=0, atol=1e-14)

    def test_the_middle_of_no_movement_is_theta(self):
        model = build_family("qwen2", lora=True)
        still = random_update(model).scaled(0.0)
        middle, first = token_stats_jvp(model, ROLLOUT, still, method="central_difference", midpoint_base=True)
        assert torch.equal(middle.logp, token_stats(model, ROLLOUT).logp)
        assert not first.logp.any()

    def test_base_at_hand_is_used(self):
        model = build_family("qwen2")
        update, passes = random_update(model), []
        base = token_stats(model, ROLLOUT)
        result = tangents(model, ROLLOUT, update, base=base, on_pass=passes.append)
        assert result.base is base
        assert passes == ["tangents"] * 2
        again = tangents(model, ROLLOUT, update, on_pass=passes.append)
        assert len(passes) == 2 + 3
        assert torch.equal(again.first.logp, result.first.logp)

    @pytest.mark.parametrize("budget", [1, 25])
    def test_budget(self, budget):
        model = build_family("qwen2")
        update = random_update(model)
        with float64_evaluation(model):
            whole = tangents(model, ROLLOUT, update, method="central_difference")
            parts = tangents(model, ROLLOUT, update, method="central_difference", max_batch_tokens=budget)
        # 1e-15/h: the step is the same to rounding.
        assert_derivatives(parts.first, torch.stack([whole.first.logp, whole.first.entropy]), 1e-10)


class TestNoMovement:
    @pytest.mark.parametrize("method", ["forward_mode", "central_difference", "auto"])
    def test_zero_update(self, method):
        model = build_family("qwen2")
        update = random_update(model).scaled(0.0)
        base, first = token_stats_jvp(model, ROLLOUT, update, method=method)
        assert not first.logp.any()
        assert not first.entropy.any()
        assert torch.equal(base.mask, first.mask)
        torch.testing.assert_close(base.logp, token_stats(model, ROLLOUT).logp, rtol=1e-5, atol=1e-5)

    def test_a_parameter_that_these_tokens_never_meet(self):
        """The embedding of a token that is nowhere: no step is large enough, and none is looked for forever."""
        model = build_family("qwen2")
        unused = next(
            t for t in range(3, 23) if not any((i == t).any() for i in (ROLLOUT.prompt_ids, ROLLOUT.completion_ids))
        )
        direction = torch.zeros(23, 16)
        direction[unused] = 1.0
        result = tangents(model, ROLLOUT, UpdateVector({"model.embed_tokens.weight": direction}, lr=1e-3))
        assert not result.first.logp.any()
        assert not result.second.entropy.any()


class TestMethod:
    def test_auto(self):
        model = build_family("qwen2")
        assert resolve_method(model, "auto") == "central_difference"
        assert resolve_method(model.to(torch.bfloat16), "auto") == "central_difference"
        with float64_evaluation(model):
            assert resolve_method(model, "auto") == "forward_mode"

    def test_unknown(self):
        with pytest.raises(ValueError, match="'auto', 'forward_mode' or 'central_difference', got 'reverse'"):
            token_stats_jvp(build_family("qwen2"), ROLLOUT, UpdateVector({}, lr=1.0), method="reverse")

    @pytest.mark.parametrize("method", ["forward_mode", "central_difference"])
    def test_an_update_of_another_model(self, method):
        update = UpdateVector({"other": torch.ones(2)}, lr=1.0)
        with pytest.raises(KeyError, match=r"names of the model's parameters, got \['other'\]"):
            token_stats_jvp(build_family("qwen2"), ROLLOUT, update, method=method)

    @needs_bitsandbytes
    def test_quantized(self, quantized):  # noqa: F811
        update = random_update(quantized)
        with pytest.raises(ValueError, match=r"without quantized layers for forward mode, got .*q_proj.*14 in all"):
            tangents(quantized, ROLLOUT, update, method="forward_mode")
        result = tangents(quantized, ROLLOUT, update, method="auto")
        assert result.method == "central_difference"
        # Reverse mode goes through 4-bit layers: ⟨u, J v⟩ = ⟨Jᵀu, v⟩ once more, here in float32.
        u = torch.randn((2, *ROLLOUT.completion_ids.shape), generator=torch.Generator().manual_seed(3)).double()
        with evaluation(quantized):  # or it would compute in bfloat16
            trainable = {n: p for n, p in quantized.named_parameters() if p.requires_grad}
            loss = (u * torch.stack(plain_stats(quantized, ROLLOUT))).sum()
            gradients = torch.autograd.grad(loss, list(trainable.values()))
        expected = sum(float((g * update.direction[n]).sum()) for n, g in zip(trainable, gradients, strict=True))
        found = float((u[0] * result.first.logp + u[1] * result.first.entropy).sum())
        assert found == pytest.approx(expected, rel=1e-2)  # the difference's truncation, as in float32 above

    @needs_bitsandbytes
    def test_auto_never_sends_forward_mode_through_quantized_layers(self, quantized):  # noqa: F811
        """It would crash the process; not even where all else is float64."""
        for parameter in quantized.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.double()
        for parameter in [p for p in quantized.parameters() if not p.is_floating_point()]:
            assert type(parameter).__name__ == "Params4bit"
        assert resolve_method(quantized, "auto") == "central_difference"

    def test_nothing_is_left_behind(self):
        model = build_family("qwen2-tied", lora=True)
        tensors = [*model.parameters(), *model.buffers()]
        before = [(id(t), t.data_ptr(), t.dtype, t.detach().clone()) for t in tensors]
        for method in ("forward_mode", "central_difference"):
            tangents(model, ROLLOUT, random_update(model), method=method)
        assert model.training
        for t, (identity, pointer, dtype, value) in zip([*model.parameters(), *model.buffers()], before, strict=True):
            assert (id(t), t.data_ptr(), t.dtype) == (identity, pointer, dtype)
            assert torch.equal(t, value)
            assert t.grad is None


def test_gradient_checkpointing_is_no_obstacle(tiny_model):
    """Its hook on the embeddings, which forward mode cannot pass, is off for the time, and back after it."""
    update = UpdateVector(
        {n: torch.ones_like(p, dtype=torch.float64) for n, p in tiny_model.named_parameters()}, lr=1e-3
    )
    rollout = Rollout(
        torch.tensor([[4, 5]]), torch.ones(1, 2).bool(), torch.tensor([[6, 7, 1]]), torch.ones(1, 3).bool()
    )
    plain = token_stats_jvp(tiny_model, rollout, update, method="forward_mode")[1]
    tiny_model.gradient_checkpointing_enable()
    tiny_model.enable_input_require_grads()
    hooks = dict(tiny_model.get_input_embeddings()._forward_hooks)
    assert hooks
    assert torch.equal(token_stats_jvp(tiny_model, rollout, update, method="forward_mode")[1].logp, plain.logp)
    assert dict(tiny_model.get_input_embeddings()._forward_hooks) == hooks
