"""NaN and infinity in logits, gradients and updates: that probe fails by name, and training does not notice it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from foreign import Deterministic
from six_steps import records, run, weights
from tiny import build_model
from torch import nn

from entropy_pl import EntropyProbe, Rollout, UpdateVector
from entropy_pl.policy import sample_completions
from entropy_pl.policy.logits import NonFiniteError

SPOILT = "layers.0.self_attn.q_proj.lora_B.default.weight"  # SDPA on a CPU hides a NaN here: logits stay finite


def bits(values: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """To be compared where NaN is equal to itself."""
    return {name: value.flatten().view(torch.int32).tolist() for name, value in values.items()}


def spoil(model: nn.Module, value: float, *, gradient: bool) -> None:
    [parameter] = [p for name, p in model.named_parameters() if name.endswith(SPOILT)]
    with torch.no_grad():
        (parameter.grad if gradient else parameter)[0, 0] = value


class SpoiltGradient(Deterministic):
    """One number of one gradient, at the third step."""

    value = math.nan

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 2:
            spoil(self, self.value, gradient=True)


class InfiniteGradient(SpoiltGradient):
    value = math.inf


class SpoiltWeight(Deterministic):
    """One number of the policy, before the third step."""

    def on_train_batch_start(self, *_: Any) -> None:
        if self.trainer.global_step == 2:
            spoil(self, math.nan, gradient=False)


class Overflowing(Deterministic):
    """An activation that overflows from the third step on; every parameter stays finite."""

    def on_train_batch_start(self, *_: Any) -> None:
        if self.trainer.global_step == 2:
            self.policy.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: output * 1e38)


@pytest.mark.parametrize("module", [SpoiltGradient, InfiniteGradient, SpoiltWeight], ids=lambda m: m.__name__)
@pytest.mark.parametrize("clipped", [True, False])
def test_an_update_that_is_not_finite_fails_by_name(module, clipped, tmp_path):
    """Its logits would be finite, and a change of 0 ± 0 would have been recorded."""
    options = {"gradient_clip_val": 0.5 if clipped else None}
    with pytest.warns(UserWarning, match=r"entropy probe at step 2 failed, training goes on\. ValueError: expected a"):
        probed = run(tmp_path / "probed", module=module(), **options)
    assert [(r["step"], r["status"]) for r in records(tmp_path / "probed")] == [
        (0, "no_movement"),
        (2, "failed"),
        (4, "failed"),
    ]
    message = records(tmp_path / "probed")[1]["message"]
    assert "expected a finite update, got NaN or infinity in " in message
    assert "_proj.lora_" in message
    assert message.endswith("go on from an earlier checkpoint")
    plain = run(tmp_path / "plain", module=module(), probe={"every_n_steps": 0}, **options)
    assert bits(weights(probed)) == bits(weights(plain))


def test_logits_that_overflow_fail_and_all_parameters_are_said_to_be_finite(tmp_path):
    with pytest.warns(UserWarning, match="entropy probe at step 2 failed, training goes on"):
        run(tmp_path / "probed", module=Overflowing())
    failed = records(tmp_path / "probed")[1]
    assert failed["status"] == "failed"
    assert "expected finite logits" in failed["message"]
    assert "all parameters are finite, an activation overflows" in failed["message"]


def engine(value: float, at: str | None = None) -> tuple[nn.Module, Rollout, UpdateVector]:
    """A policy, some E-batch, and an update with one number spoilt; ``at``: a parameter instead."""
    model, generator = build_model(), torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in model.named_parameters()
    }
    whole = torch.ones(8, 4, dtype=torch.bool)
    prompts, completions = (torch.randint(4, 40, (8, 4), generator=generator) for _ in range(2))
    if at is None:
        direction["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    else:
        with torch.no_grad():
            model.get_parameter(at).view(-1)[5] = value
    return model, Rollout(prompts, whole, completions, whole), UpdateVector(direction, lr=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_engine_refuses_such_an_update(value):
    model, rollout, update = engine(value)
    before = weights(model)
    expected = r"got NaN or infinity in 1 of 1536 numbers of model\.layers\.1\.mlp\.up_proj\.weight: .*Look at the loss"
    with pytest.raises(ValueError, match=expected):
        EntropyProbe().measure(model, rollout, update)
    assert bits(weights(model)) == bits(before)


def test_the_engine_names_the_parameter_behind_logits_that_are_not_finite():
    model, rollout, update = engine(0.0)
    with pytest.raises(NonFiniteError, match=r"all parameters are finite.* \(this was at η = 1e\+200\)"):
        EntropyProbe(etas=[1e200], precision="float64").measure(model, rollout, update)
    model, rollout, update = engine(math.nan, at="lm_head.weight")
    with pytest.raises(NonFiniteError, match=r"1 of 1760 numbers of lm_head\.weight are not finite; .*smaller η"):
        EntropyProbe().measure(model, rollout, update)


def test_the_sampler_names_it_too(tiny_tokenizer):
    model, _, _ = engine(math.nan, at="lm_head.weight")
    with pytest.raises(FloatingPointError, match=r"1 of 1760 numbers of lm_head\.weight are not finite; .*earlier"):
        sample_completions(model, tiny_tokenizer, ["1+1="], max_new_tokens=2)


def test_norms_that_overflow_are_no_harm():
    """Squares of finite numbers may be infinite: the update is finite all the same."""
    assert UpdateVector({"w": torch.tensor([1e200], dtype=torch.float64)}, lr=1.0).checked_norm() == math.inf


def test_in_trl(tmp_path):
    from transformers import TrainerCallback
    from trl_runs import Keeper, grpo_trainer, probe

    class Spoils(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                spoil(model, math.nan, gradient=True)

    kept = []
    for folder, probed in (("probed", True), ("plain", False)):
        trainer, keeper = grpo_trainer(tmp_path / folder, report_to=[], max_steps=3), Keeper()
        trainer.add_callback(Spoils())
        if probed:
            callback = probe(trainer, num_sequences=8, attribution=False)
        trainer.add_callback(keeper)
        if probed:
            with pytest.warns(UserWarning, match="entropy probe at step 2 failed, training goes on"):
                trainer.train()
        else:
            trainer.train()
        kept.append(bits(keeper.weights[-1]))
    assert [(r["step"], r["status"]) for r in callback.records] == [(0, "ok"), (2, "failed")]
    assert SPOILT in callback.records[1]["message"]
    assert kept[0] == kept[1]
