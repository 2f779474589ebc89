"""A GRPO run that looks for the causes of its entropy change: what is in the record, against the run itself."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import PROMPTS, ForeignModule
from foreign import fit as fit_foreign
from foreign import probe as foreign_probe
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_model, build_tokenizer
from torch import nn

from entropy_pl.attribution import UpdateBatch, counterfactual_update
from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.estimators import snis_delta_entropy, snis_delta_reward
from entropy_pl.grpo import GRPOModule
from entropy_pl.objectives import INTERVENTIONS, intervened, register_reward
from entropy_pl.policy import Policy, evaluation
from entropy_pl.probe import EntropyProbe
from entropy_pl.probe.memory import LESS_MEMORY
from entropy_pl.reporting import AttributedTokens
from entropy_pl.rollout import Rollout
from entropy_pl.updates import UpdateRecorder, UpdateVector

LR = 5e-3
CHOICE = 5  # a seed with which Clip-Cov takes a token that the ratio's clipping has left a gradient
NAMES = [*INTERVENTIONS, "no_momentum", "unchanged"]


@register_reward("test_causes_digits")
def digits(completion: str, answer: str) -> float:
    """Differs almost surely within a group."""
    return 0.9 * sum(c.isdigit() for c in completion) / max(1, len(completion)) + 0.01 * len(answer)


def policy() -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            build_model(max_position_embeddings=128, logit_scale=4),
            LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return Policy(model, build_tokenizer())


def grpo(**options: Any) -> GRPOModule:
    defaults = {
        "num_generations": 4,
        "max_new_tokens": 6,
        "rewards": ["test_causes_digits"],
        "optimizer": partial(torch.optim.AdamW, lr=LR, weight_decay=0.1),
        "max_grad_norm": 0.05,
        "clip_high": 0.02,
        "kl_coefficient": 0.1,
        "updates_per_rollout": 2,
    }
    return GRPOModule(policy(), **(defaults | options))


def data() -> PromptDataModule:
    return PromptDataModule(prompt_template="{question}", e_size=12, u_size=8, batch_size=4)


def fit(module: GRPOModule, folder: Path, *callbacks: Callback, steps: int = 4) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(str(folder), name="run"),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data())
    return trainer


def probe(**options: Any) -> EntropyProbeCallback:
    return EntropyProbeCallback(**({"num_sequences": 12, "every_n_steps": 3, "eta_multipliers": ()} | options))


class AtStep(Callback):
    """Watches one optimizer step as a probe does, and calls ``look`` while it is under way."""

    def __init__(self, step: int, look: Any) -> None:
        self.step, self.look, self.taken = step, look, 0

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        optimizer = trainer.optimizers[0]
        self.recorder = UpdateRecorder(pl_module.model, optimizer)

        def before(*_: Any) -> None:
            if self.taken == self.step:
                self.recorder.snapshot(moments=True)

        def after(*_: Any) -> None:
            if self.taken == self.step:
                self.recorder.read()
                self.look(pl_module, self.recorder)
            self.taken += 1

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


class Intervening(Callback):
    """Trains under another loss, or without momentum, from one optimizer step on."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, *_: Any) -> None:
        if trainer.global_step != self.step - 1:  # the rollout whose second update is the one
            return
        taught = pl_module._update

        def second_update_differs(batch: Any, old_logp: Any) -> Any:
            if old_logp is not None:
                gradient = pl_module.policy_gradient
                loss = intervened(gradient.loss, self.name)
                pl_module.policy_gradient = type(gradient)(
                    loss, gradient.advantage, gradient.temperature, gradient.max_batch_tokens, gradient.dtype
                )
                with torch.random.fork_rng():
                    torch.manual_seed(CHOICE)
                    batch = pl_module.policy_gradient.prepared(
                        pl_module.model,
                        batch.rollout,
                        batch.advantages,
                        batch.weights,
                        ref_logp=batch.ref_logp,
                        old_logp=old_logp,
                    )
                if self.name == "no_momentum":
                    for group in trainer.optimizers[0].param_groups:
                        group["betas"] = (0.0, group["betas"][1])
            return taught(batch, old_logp)

        pl_module._update = second_update_differs


@pytest.mark.parametrize("name", NAMES)
def test_a_counterfactual_is_the_step_that_such_a_run_takes(tmp_path, name):
    """The same run, but with the other loss (or β₁ = 0) at its fourth step, really takes the update computed here."""
    found: dict[str, UpdateVector] = {}

    def imagine(module: GRPOModule, recorder: UpdateRecorder) -> None:
        batch = module.update_batch()
        assert batch is not None
        with recorder.at_theta_before(), evaluation(module.model), torch.random.fork_rng():
            torch.manual_seed(CHOICE)
            found["imagined"] = counterfactual_update(
                module.model, batch, name, recorder.step_with, dtype=torch.float32
            )
        found["taken"] = recorder.update

    def see(module: GRPOModule, recorder: UpdateRecorder) -> None:
        found["real"] = recorder.update

    fit(grpo(), tmp_path / "a", AtStep(3, imagine))
    fit(grpo(), tmp_path / "b", AtStep(3, see), Intervening(3, name))
    difference = {k: v - found["real"].direction[k] for k, v in found["imagined"].direction.items()}
    # v is Δθ/lr read off float32 weights near 0.1: rounding of 1e-8/lr against elements of size 1
    assert UpdateVector(difference, LR).norm() < 1e-4 * found["real"].norm()
    moved = {k: v - found["taken"].direction[k] for k, v in found["imagined"].direction.items()}
    changes = UpdateVector(moved, LR).norm() > 1e-3 * found["taken"].norm()
    assert changes == (name != "unchanged")


def test_the_record_of_a_grpo_run(tmp_path):
    callback = probe(counterfactuals=["unchanged", "negative_only"], influence_matrix=True, token_error_blocks=4)
    trainer = fit(grpo(), tmp_path, callback)
    record = callback.records[1]
    assert record["absent"] == {}
    found = record["attribution"]
    parts = found["momentum"]["value"] + found["weight_decay"]["value"] + found["tokens"]["value"]
    assert found["total"] == pytest.approx(parts)
    assert found["first_order"]["value"] == pytest.approx(found["total"] + sum(found["remainder"].values()))
    # float32 gradients, and tangents by central differences: some 1e-4 of either
    scale = max(abs(found[name]["value"]) for name in ("momentum", "gradient"))
    assert abs(found["remainder"]["gradient"]) < 2e-3 * scale
    taken = next(point for point in record["sweep"] if point["taken"])
    for name in ("value", "stderr", "ci_low", "ci_high"):
        assert found["first_order"][name] == taken["first_order"][name], "one δH₁ in one record"
    assert abs(found["remainder"]["differences"]) < 2e-3 * scale
    by_sign = sum(part["value"] for part in found["by_sign"].values())
    assert by_sign == pytest.approx(found["tokens"]["value"], rel=1e-6)
    for part in (found["momentum"], found["tokens"], found["remainder_sum"], *found["by_sign"].values()):
        assert part["ci_low"] <= part["value"] <= part["ci_high"]
        assert (part["stderr"] > 0) == (part["value"] != 0)
    unchanged = record["counterfactuals"]["unchanged"]
    assert unchanged["true"]["value"] == pytest.approx(taken["true"]["value"], rel=1e-3)
    assert abs(unchanged["difference"]["value"]) < 1e-3 * abs(taken["true"]["value"])
    assert unchanged["cosine"] == pytest.approx(1, abs=1e-6)
    assert abs(record["counterfactuals"]["negative_only"]["difference"]["value"]) > 1e-2 * abs(taken["true"]["value"])
    assert record["exchange_rate"]["value"] == pytest.approx(taken["true"]["value"] / taken["reward_true"]["value"])
    assert set(record["predictors"]) == {"cui", "steer"}
    assert record["predictors"]["cui"]["n_steps"] == 2

    folder = Path(trainer.log_dir) / "entropy_probe"
    tokens = AttributedTokens.load(folder / "attribution" / "step_000003.npz")
    assert tokens.values.sum() == pytest.approx(found["tokens"]["value"])
    assert tokens.errors["momentum"]["stderr"] == pytest.approx(found["momentum"]["stderr"])
    assert tokens.matrix.mean(0) == pytest.approx(tokens.sequence_values, rel=1e-2, abs=1e-6)
    assert (tokens.sequence_stderr > 0).all()
    assert (tokens.stderr[tokens.values != 0] > 0).all()
    page = (folder / "attribution" / "step_000003.html").read_text()
    assert "optimizer step 3" in page
    assert {"components.png", "exchange_rate.png", "delta_entropy.png"} <= {p.name for p in folder.iterdir()}
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    tags = {*events.Tags()["scalars"], *events.Tags()["images"]}
    wanted = [f"attribution/{name}" for name in ("tokens", "momentum", "top_tokens", "influence", "share", "matrix")]
    wanted += [f"attribution/{sign}_advantage_ci_low" for sign in ("positive", "negative")]
    wanted += ["delta_j_true", "exchange_rate", "predictors/cui/pearson", "counterfactuals/negative_only/delta_h"]
    assert {f"entropy_probe/{name}" for name in wanted} <= tags
    assert json.loads((folder / "records.jsonl").read_text().splitlines()[1])["attribution"] == found


def test_the_run_does_not_notice(tmp_path):
    """Weights, optimizer, gradients and random streams of a run that looks for everything, to the bit."""

    class Ends(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
            named = dict(pl_module.model.named_parameters())
            self.state = {f"weights {n}": p.detach().clone() for n, p in named.items()}
            self.state |= {f"gradients {n}": p.grad.clone() for n, p in named.items() if p.grad is not None}
            for i, state in enumerate(trainer.optimizers[0].state_dict()["state"].values()):
                self.state |= {f"optimizer {i} {k}": v.clone() for k, v in state.items()}
            self.state["torch"] = torch.get_rng_state()
            self.metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}

    ends = []
    for name, everything in (("with", {"counterfactuals": NAMES, "token_error_blocks": 3}), ("without", None)):
        torch.manual_seed(1)
        end = Ends()
        attached = [probe(every_n_steps=1, influence_matrix=True, **everything)] if everything else []
        fit(grpo(), tmp_path / name, *attached, end)
        ends.append(end)
        if attached:
            assert [r["status"] for r in attached[0].records] == ["ok"] * 4
            assert all(not r["absent"] for r in attached[0].records)
    probed, plain = ends
    assert probed.state.keys() == plain.state.keys()
    for name, value in plain.state.items():
        assert torch.equal(value, probed.state[name]), name
    assert probed.metrics == plain.metrics


def test_rewards_are_those_of_the_completions(tmp_path, monkeypatch):
    """J of the record is the mean reward of the very completions E was drawn as, rewarded by hand."""
    drawn: dict[str, Any] = {}
    original = EntropyProbeCallback.run_probe_for

    def run_probe_for(self: Any, *args: Any, **options: Any) -> Any:
        session = original(self, *args, **options)
        collect = type(session.probe).collect

        def collected(probe: Any, model: Any, rollout: Rollout, update: Any, **rest: Any) -> Any:
            scores = collect(probe, model, rollout, update, **rest)
            drawn["rollout"], drawn["scores"] = rollout, scores
            return scores

        monkeypatch.setattr(type(session.probe), "collect", collected)
        return session

    monkeypatch.setattr(EntropyProbeCallback, "run_probe_for", run_probe_for)
    callback = probe(every_n_steps=10)
    fit(grpo(), tmp_path, callback, steps=1)
    tokenizer = build_tokenizer()
    rewards = []
    datamodule = data()
    answers = {e.question: e.answer for e in datamodule.e_examples}
    for i in range(12):
        prompt = tokenizer.decode(drawn["rollout"].prompt_ids[i][drawn["rollout"].prompt_mask[i]])
        ids = drawn["rollout"].completion_ids[i][drawn["rollout"].completion_mask[i]]
        answer = next(a for q, a in answers.items() if tokenizer.decode(tokenizer(q)["input_ids"]) == prompt)
        rewards.append(digits(tokenizer.decode(ids, skip_special_tokens=True), answer))
    record, scores = callback.records[0], drawn["scores"]
    assert record["expected_reward"]["value"] == pytest.approx(sum(rewards) / 12)
    change = snis_delta_reward(scores.base, scores.shifted[LR], torch.tensor(rewards))
    assert record["sweep"][0]["reward_true"]["value"] == pytest.approx(change.value, rel=1e-6)
    assert record["sweep"][0]["true"]["value"] == snis_delta_entropy(scores.base, scores.shifted[LR]).value


def test_a_run_that_says_nothing_of_itself(tmp_path):
    callback = foreign_probe(counterfactuals=["unchanged"])
    fit_foreign(ForeignModule(), tmp_path, callback, steps=3)
    record = callback.records[1]
    assert record["status"] == "ok"
    assert record["attribution"] is None
    assert record["expected_reward"] is None
    assert record["absent"]["attribution"].endswith("give its module a method update_batch()")
    assert record["absent"]["counterfactuals"] == "there is no U-batch to make them of"
    assert record["absent"]["reward"].endswith("give reward=")


def test_a_source_that_fails_costs_nothing_else(tmp_path):
    class Broken(ForeignModule):
        def update_batch(self) -> UpdateBatch:
            raise KeyError("gone")

        def rewards_of(self, prompts: list[str], completions: list[str]) -> list[float]:
            raise RuntimeError("no judge")

    callback = foreign_probe()
    fit_foreign(Broken(), tmp_path, callback, steps=3)
    record = callback.records[1]
    assert record["status"] == "ok"
    assert record["absent"]["attribution"] == "the run could not supply its U-batch. KeyError: 'gone'"
    assert record["absent"]["reward"] == "the run could not reward E's completions. RuntimeError: no judge"


class ForeignPolicyGradient(ForeignModule):
    """Somebody's REINFORCE under automatic optimization, clipped by the Trainer, that supplies its U-batch."""

    scale: float | None = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        mask = torch.ones(len(batch), 5, dtype=torch.bool)
        self.rollout = Rollout(batch[:, :3], mask[:, :3], batch[:, 3:], mask)
        logits = self.policy(input_ids=batch).logits[:, 2:-1]
        logp = logits.log_softmax(-1).gather(2, batch[:, 3:, None])[..., 0]
        advantages = torch.linspace(-1, 1, len(batch))
        self.coefficients = (-advantages[:, None] / mask.sum()).expand_as(logp)
        return (logp * self.coefficients).sum()

    def update_batch(self) -> UpdateBatch:
        return UpdateBatch(self.rollout, self.coefficients, gradient_scale=self.scale)


def foreign_remainder(tmp_path: Path, scale: float | None, **options: Any) -> tuple[float, float]:
    """What is left unexplained of the gradient's part, and that part."""
    module, callback = ForeignPolicyGradient(), foreign_probe()
    module.scale = scale
    fit_foreign(module, tmp_path, callback, steps=3, **options)
    record = callback.records[1]
    assert record["absent"].keys() == {"reward", "predictors"}, record["absent"]
    return record["attribution"]["remainder"]["gradient"], record["attribution"]["gradient"]["value"]


def test_the_factor_of_clipping_is_taken_from_the_step(tmp_path):
    """None: ‖g‖ after clipping over ‖g‖ before. 2e-3: float32 gradients, and U's tangents by central differences."""
    left, part = foreign_remainder(tmp_path / "measured", None, gradient_clip_val=1e-3)
    assert abs(left) < 2e-3 * abs(part)
    left, part = foreign_remainder(tmp_path / "wrong", 1.0, gradient_clip_val=1e-3)
    assert abs(left) > 2 * abs(part)  # not absorbed: it shows
    left, part = foreign_remainder(tmp_path / "unclipped", None, gradient_clip_val=None)
    assert abs(left) < 2e-3 * abs(part)
    value = {"gradient_clip_val": 1e-5, "gradient_clip_algorithm": "value"}
    left, part = foreign_remainder(tmp_path / "by value", None, **value)
    assert abs(left) > 2e-2 * abs(part)


def test_something_else_than_a_u_batch(tmp_path):
    class Mistaken(ForeignModule):
        def update_batch(self) -> dict[str, int]:
            return {"rows": 3}

    callback = foreign_probe()
    fit_foreign(Mistaken(), tmp_path, callback, steps=3)
    assert callback.records[1]["absent"]["attribution"] == (
        "the run could not supply its U-batch. TypeError: expected Mistaken.update_batch() to return an "
        "entropy_pl.attribution.UpdateBatch or None, got dict"
    )


def test_a_reward_of_ones_own(tmp_path):
    asked: list[str] = []

    def length(prompts: list[str], completions: list[str]) -> list[float]:
        asked.extend(prompts)
        return [float(len(completion)) for completion in completions]

    callback = foreign_probe(reward=length)
    fit_foreign(ForeignModule(), tmp_path, callback, steps=3)
    assert set(asked) <= set(PROMPTS)
    assert callback.records[1]["expected_reward"]["value"] > 0
    assert "reward" not in callback.records[1]["absent"]


def test_options_out_of_range():
    with pytest.raises(
        Exception, match=r"expected counterfactuals out of .*'clip_hihger'; did you mean 'clip_higher'\?"
    ):
        probe(counterfactuals=["clip_hihger"])
    with pytest.raises(Exception, match="expected token_error_blocks of at least 2, or 0 for none, got 1"):
        probe(token_error_blocks=1)
    with pytest.raises(Exception, match="expected attribution turned on with influence_matrix"):
        probe(attribution=False, influence_matrix=True)
    with pytest.raises(Exception, match="expected reward as a function of prompts and completions, got str"):
        probe(reward="accuracy")


@pytest.mark.parametrize(
    ("rewards", "why"),
    [
        (lambda n: [float("nan")] + [0.0] * (n - 1), "expected a finite reward for every completion, got 1 of 16"),
        (lambda n: [[0.0]] * n, r"expected rewards of shape \[16\], one per completion, got \[16, 1\]"),
    ],
    ids=["nan", "shape"],
)
def test_a_bad_reward_costs_nothing_else(tmp_path, rewards, why):
    callback = foreign_probe(reward=lambda prompts, completions: rewards(len(prompts)))
    fit_foreign(ForeignModule(), tmp_path, callback, steps=3)
    record = callback.records[1]
    assert record["status"] == "ok"
    assert re.search(why, record["absent"]["reward"])
    assert record["expected_reward"] is None


@pytest.mark.parametrize("what", ["influence_matrix", "token_standard_errors"])
def test_an_extra_that_fails_leaves_the_attribution(tmp_path, monkeypatch, what):
    def broken(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(EntropyProbe, what, broken)
    callback = probe(every_n_steps=10, influence_matrix=True, token_error_blocks=3)
    fit(grpo(), tmp_path, callback, steps=1)
    record = callback.records[0]
    asked = {"influence_matrix": "influence_matrix", "token_standard_errors": "token_error_blocks"}[what]
    assert record["absent"] == {asked: f"OutOfMemoryError: no room: {LESS_MEMORY}"}
    assert record["attribution"]["tokens"]["value"] != 0
    assert set(record["predictors"]) == {"cui", "steer"}


def test_a_counterfactual_too_long_leaves_the_probe(tmp_path, monkeypatch):
    """E cannot be scored after its step: what was measured of the step taken stays."""
    update = UpdateRecorder.step_with

    def astray(self: Any, gradients: Any, **options: Any) -> UpdateVector:
        return update(self, gradients, **options).scaled(math.nan)

    monkeypatch.setattr(UpdateRecorder, "step_with", astray)
    callback = probe(every_n_steps=10, counterfactuals=["unchanged"])
    with pytest.warns(UserWarning, match="counterfactual 'unchanged' could not be measured"):
        fit(grpo(), tmp_path, callback, steps=1)
    record = callback.records[0]
    assert record["status"] == "ok"
    assert record["counterfactuals"] == {}
    assert record["absent"]["counterfactuals/unchanged"].startswith("NonFiniteError")


def test_a_skipped_step_shows_nothing_of_another(tmp_path):
    session_of: list[Any] = []

    class Skipping(EntropyProbeCallback):
        def _measure(self, step: int) -> Any:
            session_of.append(self._run_probe)
            return super()._measure(step) if step == 0 else self._run_probe.skipped(step)

    callback = Skipping(num_sequences=12, every_n_steps=1, eta_multipliers=())
    trainer = fit(grpo(), tmp_path, callback, steps=2)
    assert [r["status"] for r in callback.records] == ["ok", "skipped"]
    pages = sorted(p.name for p in (Path(trainer.log_dir) / "entropy_probe" / "attribution").glob("*.html"))
    assert pages == ["step_000000.html"]
    assert session_of[0].attributed is None


def test_a_probe_at_another_temperature_than_the_loss(tmp_path):
    callback = probe(every_n_steps=10, temperature=0.5)
    fit(grpo(), tmp_path, callback, steps=1)
    record = callback.records[0]
    assert record["status"] == "ok"
    assert "expected the probe at the loss's temperature, 1.0" in record["absent"]["attribution"]
