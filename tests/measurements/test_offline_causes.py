"""Who moved the entropy, offline: from a little run's checkpoint, against what is computed without attribution."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_measurements import flat, policy_by_hand
from tqdm import tqdm

from entropy_pl import EntropyMeasurements, Rollout, record_update, token_stats, token_stats_jvp
from entropy_pl.cli import main
from entropy_pl.estimators import first_order_delta_entropy, snis_delta_entropy, snis_delta_reward
from entropy_pl.measurements import Drawn
from entropy_pl.measurements.batches import draw_u_batch, prompt_data
from entropy_pl.measurements.update import counterfactual_of, update_from_optimizer
from entropy_pl.objectives import INTERVENTIONS, register_reward
from entropy_pl.policy import decode_completions, trainable_parameters
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.reporting import AttributedTokens
from entropy_pl.updates import UpdateVector

LR = 1e-2
FLOAT64 = {"runtime_dtype": "float64"}
EVERYTHING = {
    "enabled": True,
    "influence_matrix": True,
    "token_error_blocks": 4,
    "counterfactuals": ["unchanged", "entropy_bonus", "no_momentum", "positive_only"],
}
WARNS = "ignore:the step is not the one this run would have taken"


@register_reward("test_fails_on_minus")
def fails_on_minus(completion: str, answer: str) -> float:
    """Of the questions of E alone nothing can be said."""
    raise ValueError(f"no judge for {answer}")


def measured(config: Callable[..., dict[str, Any]], **sections: Any) -> tuple[EntropyMeasurements, dict[str, Any]]:
    measurement = EntropyMeasurements(config(precision=FLOAT64, **sections))
    return measurement, measurement.run_experiments()


def along(measurement: EntropyMeasurements, rollout: Rollout, update: UpdateVector) -> float:
    """⟨∇Ĥ, v⟩ from exact derivatives of the log-probs and entropies of E along v."""
    model = measurement.checkpoint.policy.model
    with float64_evaluation(model):
        base, tangent = token_stats_jvp(model, rollout, update, method="forward_mode")
    return first_order_delta_entropy(base, tangent).value


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize(
    "update",
    [
        {"max_grad_norm": 0.05},
        {"loss_type": "dapo", "kl_coefficient": 0.3, "max_grad_norm": None},
        {"loss_type": "dr_grpo", "advantage_sign": "negative"},
        {"loss_type": "bnpo", "clip_cov_fraction": 0.2, "clip_cov_bounds": [-0.5, 0.5]},
        {"entropy_coefficient": 0.5, "max_grad_norm": 0.05},
    ],
    ids=["clipped", "dapo with KL", "negative", "Clip-Cov", "entropy bonus"],
)
def test_the_parts_add_up_to_the_slope(config, update):
    """1e-6 relative is the promise; float64 and forward mode keep 1e-9 of the largest part, remainders included."""
    measurement, results = measured(config, update=update, attribution={"enabled": True})
    drawn, found = measurement.draw(), results["attribution"]
    expected = LR * along(measurement, drawn.rollout, drawn.update.vector)
    parts = {
        name: LR * along(measurement, drawn.rollout, UpdateVector(direction, LR))
        for name, direction in drawn.update.vector.components.items()
    }
    scale = max(map(abs, parts.values()))
    for name, value in parts.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-9 * scale), name
        assert found[name]["ci_low"] <= found[name]["value"] <= found[name]["ci_high"], name
    remainder = found["remainder"]
    assert found["total"] + remainder["entropy_term"] == pytest.approx(expected, abs=1e-9 * scale)
    assert abs(remainder["gradient"]) < 1e-9 * scale
    assert abs(remainder["update"]) < 1e-9 * scale
    bonus = update.get("entropy_coefficient", 0) > 0
    assert (abs(remainder["entropy_term"]) > 1e-3 * scale) == bonus
    assert results["absent"] == {}
    assert found["first_order"]["stderr"] == pytest.approx(LR * results["first_order"]["stderr"], rel=1e-9)
    by_sign = sum(part["value"] for part in found["by_sign"].values())
    assert by_sign == pytest.approx(found["tokens"]["value"], abs=1e-9 * scale)


@pytest.mark.filterwarnings(WARNS)
def test_a_token_is_what_the_step_lacks_without_it(config):
    """δH_uk against ⟨∇Ĥ, v⟩ of the step rebuilt from the loss without that token, its preconditioner as it was."""
    measurement, results = measured(config, attribution={"enabled": True}, update={"max_grad_norm": None})
    drawn, model = measurement.draw(), measurement.checkpoint.policy.model
    groups = draw_u_batch(measurement.checkpoint.policy, prompt_data(measurement.settings), measurement.settings)
    top = results["attribution"]["top_tokens"][0]
    i, k = top["sequence"], top["position"]
    prompt = groups.rollout.prompt_ids[i][groups.rollout.prompt_mask[i]]
    completion = groups.rollout.completion_ids[i][groups.rollout.completion_mask[i]]
    rewards = groups.rewards.double().view(-1, groups.size)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()[i]
    with float64_evaluation(model):
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 + k]
        term = -advantage * logits.log_softmax(-1)[completion[k]] / (len(completion) * len(groups.rollout))
        parameters = trainable_parameters(model)
        gradient = dict(zip(parameters, torch.autograd.grad(term, list(parameters.values())), strict=True))
    share = {name: -p * gradient[name] for name, p in drawn.update.vector.preconditioner.items()}
    expected = LR * along(measurement, drawn.rollout, UpdateVector(share, LR))
    assert top["value"] == pytest.approx(expected, rel=1e-8)  # float64 on both sides, the advantage of float32 rewards
    assert top["advantage"] == pytest.approx(float(advantage), rel=1e-8)


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_autocast_did_to_the_gradient_is_named(config, dtype):
    """Parts and remainder still are the slope; the remainder is autocast's: 8 or 11 bits in U's gradient."""

    def shares(**precision: Any) -> tuple[float, float]:
        measurement = EntropyMeasurements(config(precision=precision, attribution={"enabled": True}))
        found = measurement.run_experiments()["attribution"]
        total = found["total"] + sum(found["remainder"].values())
        assert total == pytest.approx(found["first_order"]["value"], rel=1e-12)
        return abs(found["remainder"]["gradient"]), abs(found["gradient"]["value"])

    plain, part = shares()
    assert plain < 2e-3 * part  # float32, and U's tangents by central differences
    autocast, part = shares(update_vector={"use_amp": True, "amp_dtype": dtype})
    assert 2 * plain < autocast < 0.5 * part


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize(
    ("precision", "update", "tolerance"),
    [
        # the same passes; sums in another order
        (FLOAT64, {"max_grad_norm": 0.05}, 1e-12),
        (FLOAT64, {"clip_cov_fraction": 0.2, "clip_cov_bounds": [-0.5, 0.5], "entropy_coefficient": 0.1}, 1e-12),
        ({}, {"loss_type": "dapo", "kl_coefficient": 0.2}, 1e-4),  # float32, and the square root of small v_t
        ({"update_vector": {"use_amp": True}}, {}, 1e-4),  # under the same autocast
    ],
    ids=["clipped", "Clip-Cov and a bonus", "float32", "autocast"],
)
def test_unchanged_is_the_step_itself(config, precision, update, tolerance):
    sections = {"attribution": {"counterfactuals": ["unchanged"]}, "estimator": {"eta_multipliers": [1.0]}}
    results = EntropyMeasurements(config(precision=precision, update=update, **sections)).run_experiments()
    found, [taken] = results["counterfactuals"]["unchanged"], results["sweep"]
    assert found["cosine"] == pytest.approx(1, abs=tolerance**2 + 1e-14)
    assert found["update_norm"] == pytest.approx(results["update_norm"], rel=tolerance)
    assert found["true"]["value"] == pytest.approx(taken["true"]["value"], rel=10 * tolerance)
    assert abs(found["difference"]["value"]) <= 10 * tolerance * abs(taken["true"]["value"])
    assert results["attribution"] is None, "nobody asked for it"


def test_unchanged_of_a_float16_run_is_float32s(config):
    """Its loss is not scaled, so that float16 would lose the small of its gradient."""
    sections = {"attribution": {"counterfactuals": ["unchanged"]}, "estimator": {"eta_multipliers": [1.0]}}
    float16 = {"update_vector": {"use_amp": True, "amp_dtype": "float16"}}
    results = EntropyMeasurements(config(precision=float16, **sections)).run_experiments()
    plain = EntropyMeasurements(config(**sections)).run_experiments()
    unchanged, [taken] = results["counterfactuals"]["unchanged"], plain["sweep"]
    assert unchanged["true"]["value"] == pytest.approx(taken["true"]["value"], rel=1e-5)  # float32 both
    assert results["sweep"][0]["true"]["value"] != pytest.approx(taken["true"]["value"], rel=1e-5)


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_luck_of_the_batch(config, tmp_path, loss_type):
    """The jackknife over U's eight prompts as a loop: without one, the loss is divided by what the others have."""
    _, results = measured(
        config,
        batch_config={"B_U": 8},
        attribution={"enabled": True},
        update={"loss_type": loss_type},
        output_directory=str(tmp_path),
    )
    found, tokens = results["attribution"], AttributedTokens.load(tmp_path / "attribution.npz")
    parts = {"tokens": found["tokens"], **found["by_sign"]}
    signs = {"positive_advantage": [1], "negative_advantage": [-1], "zero_advantage": [0], "tokens": [-1, 0, 1]}
    for name, part in parts.items():
        values, sizes = np.zeros(8), np.zeros(8)
        for u in range(32):
            own = tokens.sequence == u
            if np.sign(tokens.advantages[own])[0] in signs[name]:
                values[u // 4] += tokens.values[own].sum()
            sizes[u // 4] += own.sum() if loss_type == "dapo" else 1
        without = np.array([(values.sum() - values[p]) * sizes.sum() / (sizes.sum() - sizes[p]) for p in range(8)])
        expected = np.sqrt(7 / 8 * ((without - without.mean()) ** 2).sum())
        assert part["value"] == pytest.approx(values.sum(), rel=1e-9, abs=1e-18)
        assert part["stderr_u_jackknife"] == pytest.approx(expected, rel=1e-9)
    assert found["over_u"] == {"prompts": 8, "absent": None}


@pytest.mark.filterwarnings(WARNS)
def test_too_few_prompts_say_nothing_of_the_luck_of_the_batch(config):
    _, results = measured(config, attribution={"enabled": True})
    found = results["attribution"]
    assert "at least 8 prompts in the U-batch for an error bar over them, got 4" in found["over_u"]["absent"]
    assert {part["stderr_u"] for part in (found["tokens"], *found["by_sign"].values())} == {None}


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("entropy_bonus", {"entropy_coefficient": 0.01}),
        ("positive_only", {"advantage_sign": "positive"}),
        ("negative_only", {"advantage_sign": "negative"}),
        ("clip_cov", {"clip_cov_fraction": 2e-4, "clip_cov_bounds": [1.0, 5.0]}),
        ("clip_higher", {"clip_high": 0.28}),
        ("kl_cov", {"kl_cov_fraction": 2e-3}),
    ],
)
def test_another_loss_is_the_measurement_of_that_loss(config, name, same_as):
    """Its ΔH and ΔJ are those measured by a config with that loss, from the same checkpoint, E and U."""
    assert set(INTERVENTIONS[name].changes) >= set(same_as)
    sweep = {"eta_multipliers": [1.0]}
    _, results = measured(config, attribution={"counterfactuals": [name]}, estimator=sweep)
    _, other = measured(config, update=same_as, estimator=sweep)
    found, [taken], [own] = results["counterfactuals"][name], other["sweep"], results["sweep"]
    assert found["true"]["value"] == pytest.approx(taken["true"]["value"], rel=1e-10)
    assert found["reward_true"]["value"] == pytest.approx(taken["reward_true"]["value"], rel=1e-10)
    assert found["update_norm"] == pytest.approx(other["update_norm"], rel=1e-10)
    moved = abs(found["difference"]["value"]) > 1e-6 * abs(own["true"]["value"])
    # at U's ratio of 1 neither clipping nor KL-Cov's price has a part
    assert moved == (name not in ("clip_higher", "kl_cov"))


def test_no_momentum_is_torchs_step_with_beta1_zero(config, run_dir, tiny_policy_dir):
    """Against torch's AdamW, its β₁ set to 0, on the gradient of a loss written as a loop."""
    sections = {"attribution": {"counterfactuals": ["no_momentum"]}, "update": {"max_grad_norm": None}}
    with pytest.warns(UserWarning, match=r"max_grad_norm None \(run: 1\.0\)"):
        measurement, drawn = drawn_by(config(precision=FLOAT64, **sections))
    policy = measurement.checkpoint.policy
    update = counterfactual_of(policy.model, drawn.update, measurement.settings, {})("no_momentum")
    taken = step_of_torch(config, run_dir / "step-5.ckpt", tiny_policy_dir, no_momentum=True)
    names = sorted(taken.direction)
    ours, theirs = flat(update.direction, names), flat(taken.direction, names)
    # Δθ of float64 weights; every element of the gradient the same sum in another order
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-8
    assert UpdateVector(update.components["momentum"], LR).norm() == 0
    own = flat(drawn.update.vector.direction, names)
    assert float((own - theirs).norm() / theirs.norm()) > 0.1


def drawn_by(config: dict[str, Any]) -> tuple[EntropyMeasurements, Drawn]:
    measurement = EntropyMeasurements(config)
    return measurement, measurement.draw()


def test_what_has_no_part_in_the_loss_stays_where_it_is(config):
    """As in torch, where a parameter without a gradient is left alone, momentum and decay too: also under others."""
    measurement = EntropyMeasurements(config())
    policy, settings = measurement.checkpoint.policy, measurement.settings
    groups = draw_u_batch(policy, prompt_data(settings), settings)
    policy.model.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    parameters = trainable_parameters(policy.model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    update = update_from_optimizer(policy.model, optimizer.state_dict(), groups, settings)
    assert update.step_with is not None
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for vector in (update.vector, update.step_with(zeros)):
        assert not vector.direction["idle"].any()
        assert all(v.any() for name, v in vector.direction.items() if name != "idle")


def step_of_torch(config, checkpoint, tiny_policy_dir, *, entropy_coefficient=0.0, no_momentum=False):
    """The step of torch's own AdamW in float64 from the checkpoint's moments, on a loop over sequences and tokens."""
    measurement = EntropyMeasurements(config(checkpoint={"checkpoint_path": str(checkpoint)}, precision=FLOAT64))
    settings = measurement.settings
    groups = draw_u_batch(measurement.checkpoint.policy, prompt_data(settings), settings)
    step = int(checkpoint.stem.removeprefix("step-"))
    model, optimizer = policy_by_hand(checkpoint.parent, tiny_policy_dir, step)
    for group in optimizer.param_groups:
        if no_momentum:
            # m_t = g, and its bias correction 1: what Adam with β₁ = 0 makes of any moments
            group["betas"] = (0.0, group["betas"][1])
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].double(), state["exp_avg_sq"].double()
            parameter.data = parameter.data.double()
    rollout, size = groups.rollout, groups.size
    with float64_evaluation(model):
        loss = 0.0
        for i in range(len(rollout)):
            rewards = groups.rewards[i // size * size : (i // size + 1) * size].double()
            advantage = (groups.rewards[i].double() - rewards.mean()) / (rewards.std() + 1e-4)
            prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
            completion = rollout.completion_ids[i][rollout.completion_mask[i]]
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            for k, token in enumerate(completion):
                distribution = torch.distributions.Categorical(logits=logits[k])
                term = -advantage * distribution.log_prob(token) - entropy_coefficient * distribution.entropy()
                loss = loss + term / (len(completion) * len(rollout))
        loss.backward()
        gradients = [p.grad.clone() for p in trainable_parameters(model).values()]
    for parameter, gradient in zip(trainable_parameters(model).values(), gradients, strict=True):
        parameter.grad = gradient
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    return recorder.update


def test_the_step_of_a_run_with_an_entropy_bonus(config, tiny_policy_dir, another_run):
    """Trained with a bonus, rebuilt with it: torch's own step on a loop's loss. Without it: said so, another step."""
    path = another_run(2, entropy_coefficient=0.3, clip_cov_bounds=(0.5, 4.0))
    checkpoint = {"checkpoint_path": str(path)}
    update = {"entropy_coefficient": 0.3, "max_grad_norm": None, "clip_cov_bounds": [0.5, 4.0]}
    drawn = EntropyMeasurements(config(checkpoint=checkpoint, update=update, precision=FLOAT64)).draw()
    assert drawn.update.facts["differs_from_training"].keys() == {"update.max_grad_norm"}
    taken = step_of_torch(config, path, tiny_policy_dir, entropy_coefficient=0.3)
    names = sorted(taken.direction)
    ours, theirs = flat(drawn.update.vector.direction, names), flat(taken.direction, names)
    # Δθ of float64 weights; every element of the gradient the same sum in another order
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-8

    with pytest.warns(UserWarning, match=r"update\.entropy_coefficient 0\.0 \(run: 0\.3\)"):
        other = EntropyMeasurements(config(checkpoint=checkpoint, precision=FLOAT64)).draw()
    assert other.update.facts["differs_from_training"] == {
        "update.entropy_coefficient": {"here": 0.0, "training": 0.3},
        "update.clip_cov_bounds": {"here": [1.0, 5.0], "training": [0.5, 4.0]},
    }
    assert float((flat(other.update.vector.direction, names) - theirs).norm() / theirs.norm()) > 1e-2


def test_the_price_of_reward(config):
    """J, ΔJ and δJ₁ of E by the estimators themselves, on completions that are rewarded here."""
    sections = {"batch_config": {"B_E": 24, "completions_per_prompt": 3}, "estimator": {"eta_multipliers": [0.5, 1]}}
    measurement, results = measured(config, **sections)
    drawn, policy = measurement.draw(), measurement.checkpoint.policy
    texts = decode_completions(policy.tokenizer, drawn.rollout)
    rewards = torch.tensor([sum(c.isalpha() for c in t) / max(1, len(t)) for t in texts], dtype=torch.float32).double()
    assert results["expected_reward"]["value"] == pytest.approx(float(rewards.mean()), rel=1e-12)
    clusters = torch.arange(24) // 3
    for point in results["sweep"]:
        with float64_evaluation(policy.model):
            base = token_stats(policy.model, drawn.rollout)
            shifted = token_stats(policy.model, drawn.rollout, update=drawn.update.vector, eta=point["eta"])
        change = snis_delta_reward(base, shifted, rewards, clusters=clusters)
        assert point["reward_true"]["value"] == pytest.approx(change.value, rel=1e-9)
        assert point["reward_true"]["stderr"] == pytest.approx(change.stderr, rel=1e-9)
        assert point["deltaH_true"] == pytest.approx(snis_delta_entropy(base, shifted).value, rel=1e-9)
    # at a step so small that curvature has no part, ΔJ is δJ₁: 1e-3 of η*
    small = measured(config, **(sections | {"estimator": {"eta_list": [1e-7]}}))[1]["sweep"][0]
    assert small["reward_true"]["value"] == pytest.approx(small["reward_first_order"]["value"], rel=1e-4)
    taken = results["sweep"][-1]
    assert results["exchange_rate"]["value"] == pytest.approx(taken["deltaH_true"] / taken["reward_true"]["value"])


def test_answers_stand_beside_their_prompts(config):
    drawn = EntropyMeasurements(config(batch_config={"B_E": 24, "completions_per_prompt": 3})).draw()
    for prompt, answer in zip(drawn.prompts, drawn.answers, strict=True):
        square = int(answer) ** 2
        assert prompt == f"what is {square} - {answer}?"


@pytest.mark.filterwarnings(WARNS)
def test_a_reward_that_fails_costs_nothing_else(config, run_dir):
    """Of a pair, whose rewards nobody needed: everything but J is there."""
    pair = {"after_checkpoint_path": str(run_dir / "step-6.ckpt")}
    results = EntropyMeasurements(
        config(checkpoint=pair, update={"rewards": ["test_fails_on_minus"]})
    ).run_experiments()
    assert results["absent"]["reward"].startswith("ValueError: no judge for ")
    assert results["expected_reward"] is None
    plain = EntropyMeasurements(config(checkpoint=pair)).run_experiments()
    for point, other in zip(results["sweep"], plain["sweep"], strict=True):
        assert "reward_true" not in point
        assert point["true"] == other["true"]


def test_a_pair_of_checkpoints_has_no_u_batch(config, run_dir):
    pair = {"after_checkpoint_path": str(run_dir / "step-6.ckpt")}
    results = EntropyMeasurements(config(checkpoint=pair, attribution=EVERYTHING)).run_experiments()
    why = "the difference of two checkpoints has no U-batch: measure one checkpoint with its optimizer's state"
    assert results["absent"] == {"attribution": why, "counterfactuals": why}
    assert results["attribution"] is None
    assert results["counterfactuals"] == {}
    assert results["expected_reward"] is not None


def test_what_is_asked_changes_nothing_else(config):
    """Every number of a measurement is the same with attribution and counterfactuals as without."""
    plain = EntropyMeasurements(config()).run_experiments()
    full = EntropyMeasurements(config(attribution=EVERYTHING)).run_experiments()
    for key in ("entropy", "first_order", "second_order", "sweep", "eta_star", "update_norm", "update_components"):
        assert full[key] == plain[key], key
    assert plain["attribution"] is None
    assert plain["counterfactuals"] == plain["absent"] == {}
    assert "predictors" not in plain


def test_a_measurement_that_asks_for_everything(config, tmp_path, capsys):
    """The command from end to end: the table, the page, the file of tokens and the results' keys."""
    file, folder = tmp_path / "measure.yaml", tmp_path / "results"
    file.write_text(yaml.safe_dump(config(attribution=EVERYTHING, output_directory=str(folder))))
    main(["measure", f"--config={file}"])
    out = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    found = results["attribution"]
    for words in (
        "Who moved the entropy of optimizer step 5",
        "momentum",
        "of A > 0",
        "Under another loss",
        "no_momentum",
    ):
        assert words in out
    assert f"{folder / 'attribution.html'} and {folder / 'attribution.npz'}" in out
    assert "absent" not in out
    assert set(results["predictors"]) == {"cui", "steer"}
    assert list(results["counterfactuals"]) == EVERYTHING["counterfactuals"]
    assert results["timing"].keys() >= {"rewards", "attribution", "counterfactuals"}
    tokens = AttributedTokens.load(folder / "attribution.npz")
    assert len(tokens) == results["update"]["n_tokens"]
    assert tokens.step == 5
    assert tokens.values.sum() == pytest.approx(found["tokens"]["value"])
    assert tokens.totals["first_order"] == pytest.approx(found["first_order"]["value"])
    # float32: the matrix is of gradients, the tokens of central differences
    assert tokens.matrix.mean(0) == pytest.approx(tokens.sequence_values, rel=1e-2, abs=1e-6)
    assert (tokens.stderr[np.abs(tokens.values) > 0] > 0).all()
    assert tokens.prompts[0].startswith("what is ")
    assert "optimizer step 5" in (folder / "attribution.html").read_text()
    # the folder's config measures the same again, in its own folder
    again = yaml.safe_load((folder / "config.yaml").read_text())
    assert EntropyMeasurements(again).run_experiments()["attribution"] == found


def test_what_is_absent_is_printed(config, run_dir, tmp_path, capsys):
    file = tmp_path / "measure.yaml"
    pair = {"after_checkpoint_path": str(run_dir / "step-6.ckpt")}
    file.write_text(yaml.safe_dump(config(checkpoint=pair, attribution={"enabled": True})))
    main(["measure", f"--config={file}"])
    out = capsys.readouterr().out
    assert "absent   attribution: the difference of two checkpoints has no U-batch" in out
    assert "Who moved" not in out


def test_the_bar_ends_where_everything_does(config, monkeypatch):
    shown = []

    @contextmanager
    def kept(*args: Any, **options: Any) -> Iterator[Any]:
        with tqdm(total=args[1], file=io.StringIO()) as bar:
            shown.append(bar)
            yield bar

    monkeypatch.setattr("entropy_pl.measurements.engine.progress", kept)
    EntropyMeasurements(config(attribution=EVERYTHING)).run_experiments()
    [bar] = shown
    assert bar.n == bar.total


def test_somebody_elses_attribution_is_not_written_over(config, tmp_path):
    (tmp_path / "attribution.html").write_text("mine")
    with pytest.raises(ValueError, match=r"whose attribution\.html is a measurement's"):
        EntropyMeasurements(config(attribution={"enabled": True}, output_directory=str(tmp_path))).run_experiments()
    assert (tmp_path / "attribution.html").read_text() == "mine"


def test_an_attribution_that_fails_costs_nothing_else(config):
    """The sweep is there, and the reason."""
    measurement = EntropyMeasurements(config(attribution={"enabled": True}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entropy_pl.reporting.attributing.attributed_tokens", broken)
        results = measurement.run_experiments()
    assert list(results["absent"]) == ["attribution"]
    assert results["absent"]["attribution"].startswith("RuntimeError: out of memory")
    assert results["attribution"] is None
    assert len(results["sweep"]) == 3


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("out of memory")


def test_matmul_precision_holds_for_all_of_it(config):
    seen: set[str] = set()
    precision = {"allow_tf32": True, "matmul_precision": "high"}
    measurement = EntropyMeasurements(config(precision=precision, attribution=EVERYTHING))
    measurement.checkpoint.policy.model.register_forward_pre_hook(
        lambda *_: seen.add(torch.get_float32_matmul_precision())
    )
    measurement.run_experiments()
    assert seen == {"high"}
