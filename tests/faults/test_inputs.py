"""E-batches and steps at the edge of what can be measured: measured where they can be, refused in words where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foreign import PROMPTS, Deterministic, ForeignModule, fit, probe
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from six_steps import records, run, weights
from tiny import build_model, build_tokenizer
from torch import Tensor, nn

from entropy_pl import EntropyProbe, Rollout, UpdateVector, float64_evaluation
from entropy_pl.probe import ProbeResult

ETA = 1e-2


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_model()


def update_of(model: nn.Module, size: float = 1.0) -> UpdateVector:
    generator = torch.Generator().manual_seed(1)
    direction = {
        name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }
    return UpdateVector(direction, lr=ETA)


def batch(mask: Tensor, prompts: Tensor | None = None) -> Rollout:
    """Random completions of this mask, after prompts of three tokens, all different."""
    n, length = mask.shape
    generator = torch.Generator().manual_seed(0)
    if prompts is None:
        prompts = torch.randint(4, 40, (n, 3), generator=generator)
    tokens = torch.randint(4, 40, (n, length), generator=generator)
    return Rollout(prompts, torch.ones_like(prompts, dtype=torch.bool), tokens, mask)


def measured(model: nn.Module, rollout: Rollout, **options: Any) -> ProbeResult:
    options = {"precision": "float64", "eta_multipliers": ()} | options
    return EntropyProbe(**options).measure(model, rollout, update_of(model))


def entropies_after_prompts(model: nn.Module, rollout: Rollout, eta: float) -> Tensor:
    """Of the first completion token, ``[N]``, by a plain forward pass of a copy moved by hand."""
    moved, v = build_model(), update_of(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.data = model.get_parameter(name).double() + eta * v.direction[name]
        with float64_evaluation(moved):
            logits = moved(input_ids=rollout.prompt_ids).logits[:, -1].double()
    return torch.distributions.Categorical(logits=logits).entropy()


class TestCompletions:
    def test_of_one_token(self, model):
        """Prefix weights are all one, and ΔH is a plain mean of differences."""
        rollout = batch(torch.ones(12, 1, dtype=torch.bool))
        result = measured(model, rollout)
        before, after = (entropies_after_prompts(model, rollout, eta) for eta in (0.0, ETA))
        # two float64 forward passes that sum in another order
        assert result.entropy.value == pytest.approx(float(before.mean()), rel=1e-9)
        assert result.taken.true.value == pytest.approx(float((after - before).mean()), rel=1e-7)
        assert result.taken.true.stderr == pytest.approx(float((after - before).std() / 12**0.5), rel=1e-7)

    @pytest.mark.parametrize("length", [0, 4])
    def test_all_empty(self, model, length):
        before = weights(model)
        with pytest.raises(ValueError, match=r"at least one completion token, got an empty mask.* a mask is True wh"):
            measured(model, batch(torch.zeros(8, length, dtype=torch.bool)))
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())

    def test_some_empty(self, model):
        """They are completions of no tokens: they count among the N, and add nothing to sums."""
        mask = (torch.arange(8)[:, None] % 2 == 0).expand(8, 3)
        rollout = batch(mask)
        result = measured(model, rollout, normalize="per_sequence")
        full = measured(model, rollout.select(torch.arange(0, 8, 2)), normalize="per_sequence")
        assert result.entropy.value == pytest.approx(full.entropy.value / 2, rel=1e-9)
        assert (result.entropy.n_sequences, result.entropy.n_tokens) == (8, 12)

    def test_a_single_one(self, model):
        with pytest.raises(ValueError, match="at least 2 sequences, for an error bar, got 1: draw more completions"):
            measured(model, batch(torch.ones(1, 4, dtype=torch.bool)))

    def test_a_run_refuses_a_single_one_at_once(self):
        with pytest.raises(MisconfigurationException, match="at least 2 E prompts, since an error bar needs two, got"):
            probe(num_sequences=1)

    def test_of_one_prompt_only(self, model, tmp_path):
        one = torch.tensor([[4, 5, 6]]).expand(8, 3)
        with pytest.raises(ValueError, match=r"at least 2 clusters .*got 1: completions of one prompt are one cluster"):
            measured(model, batch(torch.ones(8, 4, dtype=torch.bool), one))
        with pytest.raises(
            MisconfigurationException, match=r"at least 2 different E prompts, got 16 .* Give other pro"
        ):
            fit(ForeignModule(), tmp_path, probe(prompts=["1+1="] * 16), logger=False)

    def test_all_cut_short_by_a_tokenizer_without_pad_or_eos(self, tmp_path):
        """Nothing ends a completion then: measured is the process that is cut at max_new_tokens."""

        class Endless(Deterministic):
            def __init__(self) -> None:
                super().__init__()
                self.tokenizer = build_tokenizer(pad_token=None, eos_token=None)
                self.policy.get_base_model().generation_config.eos_token_id = None

        module = run(tmp_path / "probed", module=Endless())
        moved = records(tmp_path / "probed")[1]
        assert (moved["status"], moved["mean_completion_length"]) == ("ok", 4.0)
        assert moved["entropy"]["n_tokens"] == 4 * moved["entropy"]["n_sequences"]
        plain = run(tmp_path / "plain", module=Endless(), probe={"every_n_steps": 0})
        assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(module).items())


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            (
                "1+" * 40,
                r"context of 64 tokens, got 80 prompt tokens \+ 5 new tokens = 85 for prompt 3: shorten the pr",
            ),
            ("", "at least one token in every prompt, got none from prompt 3, '': leave it out"),
        ],
        ids=["too_long", "empty"],
    )
    def test_that_cannot_be_answered_are_refused_before_the_first_step(self, tmp_path, prompt, message):
        module = ForeignModule()
        with pytest.raises(MisconfigurationException, match=message):
            fit(module, tmp_path, probe(prompts=[*PROMPTS[:3], prompt, *PROMPTS[3:]]), logger=False)
        assert not module.seen, "no step was taken"


class NoRate(Deterministic):
    """A learning rate of zero, throughout."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad], lr=0.0)


class NoGradient(Deterministic):
    """A loss that teaches nothing, and an optimizer without memory."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.policy.parameters() if p.requires_grad], lr=0.1)


class TestSteps:
    @pytest.mark.parametrize("module", [NoRate, NoGradient], ids=lambda m: m.__name__)
    def test_that_move_nothing(self, module, tmp_path):
        run(tmp_path, module=module())
        assert [(r["step"], r["status"]) for r in records(tmp_path)] == [(n, "no_movement") for n in (0, 2, 4)]
        for record in records(tmp_path):
            assert "(a learning rate of zero, or no gradient): nothing to do where a warm-up" in record["message"]
            assert "sweep" not in record

    def test_an_update_of_zeros_changes_nothing_for_sure(self, model):
        rollout = batch(torch.ones(8, 4, dtype=torch.bool))
        result = EntropyProbe().measure(model, rollout, update_of(model, size=0.0))
        for estimate in (result.first_order, *(point.true for point in result.sweep)):
            assert (estimate.value, estimate.stderr) == (0.0, 0.0)
        assert not any(point.true.collapsed or point.true.off_balance for point in result.sweep)
        assert result.eta_star is None

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("lm_head.weight", ValueError, r"v of lm_head\.weight of shape \[55, 32\], got \[3\]: take the update of"),
            (
                "nobody",
                KeyError,
                r"names of the model's parameters, got \['nobody'\] \(1 unknown\): take the update of",
            ),
        ],
        ids=["shape", "name"],
    )
    def test_of_another_model(self, model, name, error, message):
        update = update_of(model)
        direction = {**update.direction, name: torch.zeros(3, dtype=torch.float64)}
        before = weights(model)
        with pytest.raises(error, match=message):
            EntropyProbe().measure(model, batch(torch.ones(8, 4, dtype=torch.bool)), UpdateVector(direction, lr=ETA))
        assert all(torch.equal(value, before[n]) for n, value in weights(model).items())
