"""A checkpoint measured offline, against the step really taken from it by hand."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from broken_policies import Stale
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_pl import EntropyMeasurements, EntropyProbe, record_update, token_stats
from entropy_pl.measurements.batches import draw_u_batch, prompt_data
from entropy_pl.measurements.update import u_gradient
from entropy_pl.policy import trainable_parameters
from entropy_pl.policy.logits import NonFiniteError
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.probe import SamplerMismatchError
from entropy_pl.reporting import read_records

LR = 1e-2


def policy_by_hand(run_dir, tiny_policy_dir, step=5):
    """The policy of a checkpoint and its optimizer, put together with PEFT and torch alone."""
    saved = torch.load(run_dir / f"step-{step}.ckpt", weights_only=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    weights = {key.removeprefix("model."): value for key, value in saved["state_dict"].items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    return model, optimizer


def loss_by_hand(model, groups):
    """GRPO's loss at the sampling policy, sequence by sequence: −Σ_i A_i / (N T_i) Σ_k log π(t_ik) up to a constant."""
    total = 0.0
    rollout, size = groups.rollout, groups.size
    for i in range(len(rollout)):
        rewards = groups.rewards[i // size * size : (i // size + 1) * size].double()
        advantage = (groups.rewards[i].double() - rewards.mean()) / (rewards.std() + 1e-4)
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        completion = rollout.completion_ids[i][rollout.completion_mask[i]]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        logp = torch.log_softmax(logits, -1).gather(1, completion[:, None]).sum()
        total = total - advantage * logp / (len(completion) * len(rollout))
    return total


def test_sampler_and_scorer_are_compared_and_two_policies_refused(config, monkeypatch):
    measurements = EntropyMeasurements(config())
    assert 0 < measurements.draw().sampler_gap < 1e-5  # float32's rounding

    measurements = EntropyMeasurements(config())
    measurements.checkpoint.policy.model.get_base_model().__class__ = Stale
    with pytest.raises(SamplerMismatchError, match="cache") as first:
        measurements.draw()
    monkeypatch.setattr("entropy_pl.measurements.engine.draw_e_batch", None)  # not drawn again
    with pytest.raises(SamplerMismatchError) as second:
        measurements.draw()
    assert str(second.value) == str(first.value)


def flat(direction, names):
    return torch.cat([direction[name].flatten().double() for name in names])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_rebuilt_step_is_the_step_torch_takes(config, run_dir, tiny_policy_dir, dtype):
    """v of the measurement against Δθ/lr of AdamW.step() on a loss written as a loop, clipped by torch."""
    measurement = EntropyMeasurements(config(precision={"runtime_dtype": dtype}, update={"max_grad_norm": 0.05}))
    settings = measurement.settings
    drawn = measurement.draw()
    groups = draw_u_batch(measurement.checkpoint.policy, prompt_data(settings), settings)  # the same seed: the same U

    model, optimizer = policy_by_hand(run_dir, tiny_policy_dir)
    if dtype == "float64":
        for group in optimizer.param_groups:  # torch's step in float64, from the saved float32 moments
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].double(), state["exp_avg_sq"].double()
                parameter.data = parameter.data.double()
        with float64_evaluation(model):
            loss = loss_by_hand(model, groups)
            loss.backward()
            gradients = [p.grad for p in trainable_parameters(model).values()]
        for parameter, gradient in zip(trainable_parameters(model).values(), gradients, strict=True):
            parameter.grad = gradient.clone()
    else:
        loss_by_hand(model, groups).backward()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
    with record_update(model, optimizer) as recorder:
        optimizer.step()

    rebuilt, taken = drawn.update.vector, recorder.update
    names = sorted(taken.direction)
    assert rebuilt.direction.keys() == taken.direction.keys()
    ours, theirs = flat(rebuilt.direction, names), flat(taken.direction, names)
    cosine = float(ours @ theirs / (ours.norm() * theirs.norm()))
    # float64: two roundings of θ in Δθ, relative to |Δθ|. float32: gradients summed in another order, 1e-6 of each.
    assert cosine >= 1 - (1e-12 if dtype == "float64" else 1e-6)
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1, rel=1e-9 if dtype == "float64" else 1e-4)
    assert rebuilt.lr == LR
    assert drawn.update.facts["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert drawn.update.facts["gradient_scale"] == pytest.approx(0.05 / float(norm), rel=1e-4)
    assert drawn.update.facts["step"] == 5
    if dtype == "float64":
        for part, direction in taken.components.items():
            assert torch.allclose(
                flat(rebuilt.components[part], names), flat(direction, names), rtol=1e-9, atol=1e-9 * rebuilt.norm()
            ), part


def test_what_is_reported_is_the_probe_of_that_step(config, run_dir, tiny_policy_dir):
    """Every number of the sweep against EntropyProbe on a policy put together by hand, along the same v."""
    measurement = EntropyMeasurements(
        config(estimator={"eta_list": [LR, 3e-3]}, precision={"runtime_dtype": "float64"})
    )
    results = measurement.run_experiments()
    drawn = measurement.draw()
    model, _ = policy_by_hand(run_dir, tiny_policy_dir)
    probe = EntropyProbe(etas=[3e-3, LR], eta_multipliers=(), precision="float64")
    expected = probe.measure(model, drawn.rollout, drawn.update.vector)
    assert [point["eta"] for point in results["sweep"]] == [3e-3, LR]
    for point, other in zip(results["sweep"], expected.sweep, strict=True):
        assert point["deltaH_true"] == pytest.approx(other.true.value, rel=1e-9)
        assert point["deltaH_approx"] == pytest.approx(other.first_order.value, rel=1e-9)
        assert point["true"]["stderr"] == pytest.approx(other.true.stderr, rel=1e-9)
        assert point["true"]["ci_low"] < point["deltaH_true"] < point["true"]["ci_high"]
        assert 0 < point["true"]["ess"] <= 16
    assert results["eta_star"] == pytest.approx(expected.eta_star, rel=1e-6)
    assert results["second_order"]["value"] == pytest.approx(expected.second_order.value, rel=1e-6)
    assert results["sweep"][1]["taken"]
    assert results["sweep"][0]["eta"] == 3e-3


def test_a_pair_of_checkpoints(config, run_dir):
    """θ′ − θ from two files; η = 1 is the whole way, and neither optimizer nor U-batch has a part in it."""
    after = {"after_checkpoint_path": str(run_dir / "step-6.ckpt")}
    results = EntropyMeasurements(config(checkpoint=after)).run_experiments()
    one, two = (torch.load(run_dir / f"step-{i}.ckpt", weights_only=True)["state_dict"] for i in (5, 6))
    assert results["update_norm"] == pytest.approx(
        math.sqrt(sum(float((two[key].double() - one[key].double()).square().sum()) for key in one)), rel=1e-12
    )
    assert [point["eta"] for point in results["sweep"]] == [0.5, 1.0, 2.0]
    assert results["sweep"][1]["taken"]
    assert results["update"] == {"source": "pair"}
    assert "sampling_u" not in results["timing"]


def test_a_pair_of_whole_models(config, tiny_policy_dir, tmp_path):
    """Two model folders, as full fine-tuning or a merged FSDP run leaves them, with nothing else known."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    generator = torch.Generator().manual_seed(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    pair = {"checkpoint_path": str(tmp_path / "before"), "after_checkpoint_path": str(tmp_path / "after")}
    measurement = EntropyMeasurements(config(checkpoint=pair, precision={"runtime_dtype": "float64"}))
    drawn = measurement.draw()
    difference = {name: p.detach().double() - before[name].double() for name, p in moved.named_parameters()}
    assert drawn.update.vector.direction.keys() == difference.keys()
    for name, expected in difference.items():
        assert torch.equal(drawn.update.vector.direction[name], expected)
    # at η = 1 the policy scored is the other folder's
    scores = measurement.score(drawn)
    theirs = token_stats(moved, drawn.rollout)
    assert torch.allclose(scores.shifted[1.0].logp, theirs.logp, atol=1e-4)  # float32 against float64
    assert not torch.allclose(scores.base.logp, theirs.logp, atol=1e-3)


def test_an_adapter_folder_with_the_optimizer_beside_it(config, run_dir, tiny_policy_dir, tmp_path):
    """The same state as a PEFT folder with optimizer.pt, as TRL leaves it, measures the same."""
    model, optimizer = policy_by_hand(run_dir, tiny_policy_dir)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    folder = {"checkpoint_path": str(tmp_path), "backbone": str(tiny_policy_dir)}
    expected = EntropyMeasurements(config()).run_experiments()
    assert EntropyMeasurements(config(checkpoint=folder)).run_experiments()["sweep"] == expected["sweep"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_kl_term_has_its_part_in_the_gradient(config, dtype):
    updates = [
        EntropyMeasurements(config(update={"kl_coefficient": beta}, precision={"runtime_dtype": dtype})).draw().update
        for beta in (0.0, 0.5)
    ]
    assert updates[0].facts["gradient_norm"] != pytest.approx(updates[1].facts["gradient_norm"], rel=1e-3)


def test_the_same_checkpoint_twice_is_refused(config, run_dir):
    same = {"after_checkpoint_path": str(run_dir / "step-5.ckpt")}
    with pytest.raises(ValueError, match="the two checkpoints are the same"):
        EntropyMeasurements(config(checkpoint=same)).run_experiments()


def test_results_hold_what_is_needed_to_trust_them(config):
    results = EntropyMeasurements(
        config(estimator={"symmetric": True, "eta_multipliers": [0.01, 0.1, 1]})
    ).run_experiments()
    assert (results["B_E"], results["B_U"], results["G"]) == (16, 4, 4)
    assert results["timing"]["total"] >= sum(results["timing"][key] for key in ("sampling_e", "update", "sweep"))
    assert results["tokens_per_second"]["sampling"] > 0
    assert results["versions"].keys() >= {"entropy_pl", "torch", "transformers", "peft", "python"}
    assert len(results["config_hash"]) == 16
    assert results["power_law"]["n_points"] == 3
    assert [pair["eta"] for pair in results["symmetric"]] == pytest.approx([1e-4, 1e-3, 1e-2])
    # the odd part is the slope up to η² and the even part the curvature: at η = 1e-4 both to the digits of float32
    assert results["symmetric"][0]["first"]["value"] == pytest.approx(results["first_order"]["value"], rel=1e-3)
    json.dumps(results, allow_nan=False)


def test_completions_that_share_a_prompt_are_clustered(config):
    measurement = EntropyMeasurements(config(batch_config={"B_E": 24, "completions_per_prompt": 3}))
    drawn = measurement.draw()
    scores = measurement.score(drawn)
    assert len(drawn.rollout) == 24
    assert len(set(drawn.prompts)) == 8
    assert len(scores.clusters.unique()) == 8


def test_one_step_size(config):
    [point] = EntropyMeasurements(config(estimator={"eta_sweep": False, "single_eta": 2e-3})).run_experiments()["sweep"]
    assert point["eta"] == 2e-3


def test_the_same_config_gives_the_same_numbers(config, tmp_path):
    folder = {"output_directory": str(tmp_path / "results")}
    first, second = (EntropyMeasurements(config(**folder)).run_experiments()["sweep"] for _ in range(2))
    assert first == second
    kept = json.loads((tmp_path / "results/results.json").read_text())
    assert kept["sweep"] == first
    assert (tmp_path / "results/eta_sweep.png").stat().st_size > 1000
    # the folder's config measures the same again
    again = yaml.safe_load((tmp_path / "results/config.yaml").read_text())
    assert EntropyMeasurements(again).run_experiments()["sweep"] == first


def test_a_folder_with_results_of_another_config_is_refused(config, tmp_path):
    EntropyMeasurements(config(output_directory=str(tmp_path))).run_experiments()
    other = EntropyMeasurements(config(output_directory=str(tmp_path), seed=1))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="without results of another config"):
        other.run_experiments()
    assert (tmp_path / "results.json").read_bytes() == before
    assert "checkpoint" not in vars(other), "refused before anything was loaded"


def test_detailed_log(config, tmp_path):
    logging = {"enabled": True, "level": "debug", "output_directory": str(tmp_path), "compress": True}
    results = EntropyMeasurements(config(detailed_logging=logging)).run_experiments()
    [path] = tmp_path.glob("*.jsonl.gz")
    records = read_records(path)
    kinds = [record["kind"] for record in records]
    assert kinds.count("sequence") == kinds.count("tokens") == 16
    [measurement] = [record for record in records if record["kind"] == "measurement"]
    assert measurement["sweep"] == results["sweep"]
    tokens = sum(record["n_tokens"] for record in records if record["kind"] == "sequence")
    assert tokens == results["entropy"]["n_tokens"]


def test_no_optimizer_no_step(config, run_dir, tmp_path):
    saved = torch.load(run_dir / "step-5.ckpt", weights_only=True)
    del saved["optimizer_states"]
    torch.save(saved, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="expected an optimizer's state in or beside"):
        EntropyMeasurements(config(checkpoint={"checkpoint_path": str(tmp_path / "weights.ckpt")})).run_experiments()


def test_rewards_that_teach_nothing(config):
    with pytest.raises(ValueError, match="expected groups with different rewards in the U-batch, got none out of 4"):
        EntropyMeasurements(config(update={"rewards": ["format"]})).run_experiments()


class TestPrecisionOfTheGradient:
    def gradient(self, config, **precision):
        measurement = EntropyMeasurements(config(precision=precision))
        settings = measurement.settings
        policy = measurement.checkpoint.policy
        reference = replace(settings, precision=replace(settings.precision, runtime_dtype="float32"))
        groups = draw_u_batch(policy, prompt_data(settings), reference)
        gradient = u_gradient(policy.model, groups, settings).gradients
        assert all(p.grad is None for p in policy.model.parameters()), "nothing is left behind"
        return gradient

    def error(self, config, reference, **precision):
        gradient = self.gradient(config, **precision)
        names = sorted(reference)
        one, other = flat(gradient, names), flat(reference, names)
        return float((one - other).norm() / other.norm())

    def test_each_format_has_its_rounding(self, config):
        """Relative to float64: float32 near 1e-6, bfloat16 (8 bits) near 1e-2, float16 (11 bits), scaled, between."""
        reference = self.gradient(config, runtime_dtype="float64")
        assert next(iter(reference.values())).dtype == torch.float64
        assert self.error(config, reference) < 1e-5
        bfloat16 = self.error(config, reference, update_vector={"use_amp": True})
        float16 = self.error(config, reference, update_vector={"use_amp": True, "amp_dtype": "float16"})
        assert 1e-5 < float16 < bfloat16 / 2 < 0.1

    def test_the_loss_is_scaled_for_float16(self, config, monkeypatch):
        """Without a scale the small of the gradient is lost; one too large overflows, and is halved until it fits."""
        reference = self.gradient(config, runtime_dtype="float64")
        amp = {"use_amp": True, "amp_dtype": "float16"}
        scaled = self.error(config, reference, update_vector=amp)
        monkeypatch.setattr("entropy_pl.measurements.update.LOSS_SCALE", 2.0**60)
        assert self.error(config, reference, update_vector=amp) < 2 * scaled
        monkeypatch.setattr("entropy_pl.measurements.update.LOSS_SCALE", 2.0**-14)
        assert self.error(config, reference, update_vector=amp) > 2 * scaled

    def test_parameters_in_their_own_dtype(self, config, tiny_policy_dir, tmp_path):
        """A bfloat16 model's gradient is bfloat16's, unless it is to be float32."""
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_policy_dir).save_pretrained(tmp_path)
        whole = {"checkpoint_path": str(tmp_path), "after_checkpoint_path": "unused", "dtype": "bfloat16"}
        seen = set()
        for grads_fp32 in (True, False):
            sections = config(checkpoint=whole, precision={"update_vector": {"grads_fp32": grads_fp32}})
            measurement = EntropyMeasurements(sections)
            policy, settings = measurement.checkpoint.policy, measurement.settings
            training = replace(settings, checkpoint=replace(settings.checkpoint, after_checkpoint_path=None))
            groups = draw_u_batch(policy, prompt_data(training), training)
            gradient = u_gradient(policy.model, groups, settings).gradients
            seen.add((grads_fp32, *{g.dtype for g in gradient.values() if g is not None}))
        assert seen == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("grads_fp32", [True, False])
@pytest.mark.parametrize(("allow_tf32", "products"), [(True, "high"), (False, "highest")])
def test_matmul_precision_is_set_and_put_back(config, allow_tf32, products, grads_fp32):
    """In every forward pass, U's included; false wins, with a warning, whatever the process had set."""
    seen, before = set(), torch.get_float32_matmul_precision()
    precision = {"allow_tf32": allow_tf32, "matmul_precision": "high", "update_vector": {"grads_fp32": grads_fp32}}
    with contextlib.nullcontext() if allow_tf32 else pytest.warns(UserWarning, match="allow_tf32: false forbids it"):
        measurement = EntropyMeasurements(config(precision=precision))
    measurement.checkpoint.policy.model.register_forward_pre_hook(
        lambda *_: seen.add(torch.get_float32_matmul_precision())
    )
    torch.set_float32_matmul_precision("medium")
    try:
        measurement.run_experiments()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {products}


SETTINGS = {
    "generation": {"temperature": 0.7, "max_batch_tokens": 40},
    "update": {
        "rewards": ["test_letters", "test_short"],
        "reward_weights": [0.3, 2.0],
        "advantage": "leave_one_out",
        "loss_type": "dapo",
        "kl_coefficient": 0.3,
        "max_grad_norm": None,
        "lr": 3e-3,
        "top_k": 20,
    },
}


def test_every_setting_of_the_update_has_its_part(config, run_dir, tiny_policy_dir):
    """Temperature, rewards and their weights, advantage, loss type, KL, micro-batches and lr, against a loop."""
    measurement = EntropyMeasurements(config(**SETTINGS, precision={"runtime_dtype": "float64"}))
    drawn, settings = measurement.draw(), measurement.settings
    groups = draw_u_batch(measurement.checkpoint.policy, prompt_data(settings), settings)
    expected_rewards = 0.3 * groups.reward_parts["test_letters"] + 2.0 * groups.reward_parts["test_short"]
    assert torch.allclose(groups.rewards, expected_rewards)

    model, _ = policy_by_hand(run_dir, tiny_policy_dir)
    tokens = int(groups.rollout.completion_mask.sum())
    with float64_evaluation(model):
        loss = 0.0
        for i in range(len(groups.rollout)):
            others = [groups.rewards[j].double() for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
            advantage = groups.rewards[i].double() - sum(others) / 3
            prompt = groups.rollout.prompt_ids[i][groups.rollout.prompt_mask[i]]
            completion = groups.rollout.completion_ids[i][groups.rollout.completion_mask[i]]
            ids = torch.cat([prompt, completion])[None]

            def logp():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7  # noqa: B023
                return torch.log_softmax(logits, -1).gather(1, completion[:, None])[:, 0]  # noqa: B023

            with model.disable_adapter(), torch.no_grad():
                reference = logp()
            log_ratio = reference - logp()
            k3 = log_ratio.exp() - log_ratio - 1
            loss = loss + (-advantage * logp() + 0.3 * k3).sum() / tokens
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    ours = u_gradient(measurement.checkpoint.policy.model, groups, settings).gradients
    names = sorted(ours)
    assert torch.allclose(flat(ours, names), flat(gradients, names), rtol=1e-9, atol=1e-12)
    assert drawn.update.vector.lr == 3e-3
    assert drawn.update.facts["gradient_scale"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {
            "normalize": "per_sequence",
            "weighting": "sequence",
            "use_simple_entropy_for_x": True,
            "clip_log_weight": 0.01,
        },
        {"baseline": "gae", "gae_lambda": 0.5, "confidence": 0.5},
        {"baseline": "position", "method": "forward_mode", "symmetric": True},
    ],
)
def test_every_setting_of_the_estimator_has_its_part(config, options):
    """YAML's words against an EntropyProbe put together by hand, at another temperature."""
    sections = {"estimator": {"eta_list": [0.01], **options}, "generation": {"temperature": 0.7}}
    measurement = EntropyMeasurements(config(**sections))
    results, drawn = measurement.run_experiments(), measurement.draw()
    by_hand = {key: value for key, value in options.items() if key != "use_simple_entropy_for_x"}
    if "use_simple_entropy_for_x" in options:
        by_hand["integrand"] = "surprisal"
    probe = EntropyProbe(etas=[0.01], eta_multipliers=(), at_lr=False, temperature=0.7, **by_hand)
    expected = probe.measure(measurement.checkpoint.policy.model, drawn.rollout, drawn.update.vector)
    plain = EntropyProbe(etas=[0.01], eta_multipliers=(), at_lr=False)
    other = plain.measure(measurement.checkpoint.policy.model, drawn.rollout, drawn.update.vector)
    for point, true in zip(results["sweep"], expected.sweep, strict=True):
        assert point["true"] == true.true.to_dict()
        assert point["first_order"] == true.first_order.to_dict()
    assert results["sweep"][-1]["deltaH_true"] != pytest.approx(other.sweep[-1].true.value, rel=1e-6)
    assert results["method"] == ("forward_mode" if "method" in options else "central_difference")


class TestNothingIsLost:
    def test_a_folder_that_cannot_be_made(self, config, tmp_path):
        (tmp_path / "file").write_text("mine")
        for sections in (
            {"output_directory": str(tmp_path / "file")},
            {"detailed_logging": {"enabled": True, "output_directory": str(tmp_path / "file")}},
        ):
            measurement = EntropyMeasurements(config(**sections))
            with pytest.raises(OSError, match="expected a folder that can be written to"):
                measurement.run_experiments()
            assert "checkpoint" not in vars(measurement), "refused before anything was loaded"

    def test_somebody_elses_config(self, config, tmp_path):
        (tmp_path / "config.yaml").write_text("# mine")
        with pytest.raises(ValueError, match=r"whose config\.yaml is a measurement's"):
            EntropyMeasurements(config(output_directory=str(tmp_path))).run_experiments()
        assert (tmp_path / "config.yaml").read_text() == "# mine"

    def test_results_that_came_in_the_meantime(self, config, tmp_path, monkeypatch):
        late = EntropyMeasurements(config(output_directory=str(tmp_path)))
        draw = late.draw

        def meanwhile(**options):
            EntropyMeasurements(config(output_directory=str(tmp_path), seed=1)).run_experiments()
            return draw(**options)

        monkeypatch.setattr(late, "draw", meanwhile)
        with pytest.raises(ValueError, match="without results of another config"):
            late.run_experiments()
        assert json.loads((tmp_path / "results.json").read_text())["seed"] == 1


def test_a_pair_needs_nothing_of_an_optimizer(config, run_dir, tmp_path):
    """Neither U's split nor a readable optimizer: runs of long ago have lost both."""
    for name in ("step-5.ckpt", "step-6.ckpt"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    (tmp_path / "optimizer.pt").write_text("garbage")
    pair = {"checkpoint_path": str(tmp_path / "step-5.ckpt"), "after_checkpoint_path": str(tmp_path / "step-6.ckpt")}
    bars = []
    measurement = EntropyMeasurements(config(checkpoint=pair, batch_config={"U_split": "nowhere"}))
    measurement.draw(on_pass=bars.append)
    assert bars == ["loading", "update", "sampling E"]
    assert measurement.draw_passes == len(bars)


def test_the_bar_ends_where_the_measurement_does(config):
    phases = []
    measurement = EntropyMeasurements(config(estimator={"baseline": "critic", "symmetric": True}))
    drawn = measurement.draw(on_pass=phases.append)
    assert measurement.draw_passes == len(phases)
    measurement.score(drawn, on_pass=phases.append)
    assert measurement.passes == len(phases)


def test_a_step_of_other_settings_than_the_runs_is_said_so(config, recwarn):
    """A GRPO checkpoint tells how it was trained: silence where the config agrees, a warning and a record where not."""
    EntropyMeasurements(config()).draw()
    assert not [warning for warning in recwarn if "not the one this run" in str(warning.message)]
    sections = config(batch_config={"G": 3}, update={"loss_type": "bnpo"})
    with pytest.warns(UserWarning, match=r"batch_config\.G 3 \(run: 4\), update\.loss_type bnpo \(run: grpo\)"):
        drawn = EntropyMeasurements(sections).draw()
    assert drawn.update.facts["differs_from_training"] == {
        "batch_config.G": {"here": 3, "training": 4},
        "update.loss_type": {"here": "bnpo", "training": "grpo"},
    }


def test_a_step_too_long_is_said_so(config):
    with pytest.raises(NonFiniteError, match="this step was too long"):
        EntropyMeasurements(config(estimator={"eta_list": [1e300]})).run_experiments()
