"""Who moved the entropy in a run of TRL's GRPOTrainer: the U-batch against the run's own gradient, rewards by hand."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import build_model, build_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl_runs import EVALUATED, LEARNT, grpo_trainer, probe

from entropy_pl.attribution import UpdateBatch
from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback
from entropy_pl.monitor.prompts import PromptRows, prompt_texts
from entropy_pl.monitor.trl_batch import StepCapture
from entropy_pl.monitor.trl_rewards import TrainerRewards
from entropy_pl.policy_gradient import TrainingBatch

LIMIT = 0.05  # of the gradient's norm; without it, the steps below have 0.1 to 1
PLAIN = {"bf16": False, "gradient_checkpointing": False, "report_to": []}  # both are on by default
UNEQUAL = {"prompt": [f"{a}+{b}=" for a in (1, 23, 456) for b in range(12)]}  # so that prompts are padded
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


class Observer(TrainerCallback):
    """Captures every step, and keeps what the oracle is made of: weights, and the gradient the optimizer is given."""

    def __init__(self, trainer: Any) -> None:
        self.capture = StepCapture(trainer)
        self.batches: list[UpdateBatch] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.capture.begin(True)

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.batches.append(self.capture.update_batch())
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:  # by now a scaler has unscaled them
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.capture.close()


def distributions(model: nn.Module, batch: UpdateBatch, temperature: float) -> Tensor:
    """log π of every token of the vocabulary at every completion position, [N, T, V], in one plain forward pass."""
    rollout = batch.rollout
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1).long()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, rollout.prompt_ids.shape[1] - 1 : -1]
    return (logits / temperature).log_softmax(-1)


CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "temperature": 0.7},
    "grpo with KL": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "grpo with TRL's KL": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo, a generation for two steps": {"loss_type": "dapo", "steps_per_generation": 4},
    "dapo, two generations a step": {"loss_type": "dapo", "steps_per_generation": 1, "num_iterations": 1},
    "dr_grpo": {"loss_type": "dr_grpo", "mask_truncated_completions": True, "max_completion_length": 40},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False},
    "cispo": {"loss_type": "cispo", "beta": 0.1},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.1},
    "what tools wrote": {"loss_type": "bnpo", "tools": True},
    "high entropy alone": {"loss_type": "bnpo", "top_entropy_quantile": 0.5},
}
OURS = {
    "grpo",
    "grpo with KL",
    "dapo",
    "dapo, a generation for two steps",
    "dapo, two generations a step",
    "dr_grpo",
    "bnpo",
    "what tools wrote",
}


def observed(folder: Path, tools: bool = False, **options: Any) -> tuple[Any, Observer]:
    shape = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3, "max_grad_norm": LIMIT}
    trainer = grpo_trainer(
        folder, lora={"init_lora_weights": False}, data=UNEQUAL, **(PLAIN | {"learning_rate": 0.1} | shape | options)
    )
    prepare = trainer._prepare_inputs

    def prepare_with_tools(batch: Any) -> Any:
        inputs = prepare(batch)
        mask = torch.ones_like(inputs["completion_mask"])
        mask[:, 2:4] = 0
        return {**inputs, "tool_mask": mask}

    if tools:
        trainer._prepare_inputs = prepare_with_tools
    observer = Observer(trainer)
    trainer.add_callback(observer)
    trainer.train()
    assert len(observer.batches) == len(observer.gradients) == trainer.args.max_steps
    return trainer, observer


def check_gradients(trainer: Any, observer: Observer) -> None:
    """Σ coefficient · log π, differentiated at the weights of before the step: the gradient that the optimizer got."""
    model = trainer.model.eval()
    for batch, weights, gradient in zip(observer.batches, observer.weights, observer.gradients, strict=True):
        model.load_state_dict(weights)
        model.zero_grad()
        log_pi = distributions(model, batch, trainer.temperature)
        logp = log_pi.gather(2, batch.rollout.completion_ids[..., None])[..., 0]
        loss = (batch.token_coefficients * logp).sum()
        if batch.entropy_coefficients is not None:
            loss = loss - (batch.entropy_coefficients * (log_pi.exp() * log_pi).sum(-1)).sum()
        (batch.gradient_scale * loss).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == gradient.keys()
        size = torch.stack([g.norm() for g in gradient.values()]).norm()
        apart = torch.stack([(found[name] - g).norm() for name, g in gradient.items()]).norm()
        assert size > 1e-3
        assert apart < 2e-6 * size  # both in float32, in another order of sums: 4e-7 is common


@pytest.mark.parametrize("name", CASES)
def test_the_coefficients_are_those_of_the_gradient_that_was_taken(tmp_path, name):
    """Two micro-batches, two steps of a generation, clipping by norm active; LoRA whose gradients are all there."""
    trainer, observer = observed(tmp_path, **CASES[name])
    check_gradients(trainer, observer)
    for batch, gradient in zip(observer.batches, observer.gradients, strict=True):
        assert len(batch.rollout) == 16
        assert len(batch.rollout.prompt_lengths.unique()) > 1  # there is padding
        assert batch.gradient_scale < 0.9
        assert torch.stack([g.norm() for g in gradient.values()]).norm() == pytest.approx(LIMIT, rel=1e-3)
        assert not batch.token_coefficients[~batch.rollout.completion_mask].any()
        assert (batch.entropy_coefficients is not None) == (name == "entropy bonus")
        tokens = trainer.args.loss_type in ("dapo", "bnpo", "cispo")
        assert batch.divided_by == ("tokens" if tokens else "completions")
        assert (batch.policy_gradient is not None) == (name in OURS)


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_loss_of_ours_is_the_trainers(tmp_path, name):
    """At log-probs of the test's own: the settings and weights say the same coefficients as TRL's backward pass."""
    trainer, observer = observed(tmp_path, **CASES[name])
    moved = 0
    for batch, weights in zip(observer.batches, observer.weights, strict=True):
        trainer.model.eval().load_state_dict(weights)
        with torch.no_grad():
            log_pi = distributions(trainer.model, batch, trainer.temperature)
        logp = log_pi.gather(2, batch.rollout.completion_ids[..., None])[..., 0]
        at = TrainingBatch(batch.rollout, batch.advantages, batch.weights, batch.ref_logp)
        expected, _ = batch.policy_gradient.coefficients(at, logp, batch.old_logp)
        assert expected.abs().max() > 0
        # log-probs of float32: 1e-6 nats, and 1e-5 in ratios that lie far from 1
        torch.testing.assert_close(batch.token_coefficients.double(), expected, rtol=1e-4, atol=1e-6)
        assert batch.max_grad_norm == LIMIT
        if batch.old_logp is not None:
            moved += int(((batch.old_logp - logp).abs() > 0.01).sum())
    assert (moved > 0) == (name != "dapo, two generations a step")  # there are ratios to be clipped


def test_without_clipping(tmp_path):
    trainer, observer = observed(tmp_path, max_grad_norm=0.0, loss_type="dapo")
    check_gradients(trainer, observer)
    assert [(b.gradient_scale, b.max_grad_norm) for b in observer.batches] == [(1.0, None)] * 3


def test_a_scaled_loss(tmp_path):
    """As under fp16, which Accelerate has on no CPU: the scale is in what autograd hands back, and is taken out."""
    shape = {"gradient_accumulation_steps": 2, "max_steps": 2, "optim": "adamw_torch"}
    clip = {"max_grad_norm": 0.0}  # without its own mixed precision, Accelerate would clip what is scaled
    trainer = grpo_trainer(tmp_path, lora={"init_lora_weights": False}, **(PLAIN | shape | clip))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    observer = Observer(trainer)
    trainer.add_callback(observer)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**10
    check_gradients(trainer, observer)


def test_the_record_attributes_the_step(tmp_path):
    """All that a Lightning run's record says. Step 2: two micro-batches, old log-probs, momentum, clipping."""
    trainer = grpo_trainer(
        tmp_path,
        lora={"init_lora_weights": False},
        **(PLAIN | {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_grad_norm": LIMIT}),
    )
    callback = probe(trainer, precision="float64", eta_multipliers=(), counterfactuals=["unchanged", "positive_only"])
    trainer.train()
    record = callback.records[1]
    assert (record["step"], record["status"], record["absent"]) == (2, "ok", {})
    found = record["attribution"]
    assert abs(found["tokens"]["value"]) > 1e-3 * record["lr"]
    # the run's gradient is of float32, and Adam divides by that of every coordinate
    assert abs(found["remainder"]["gradient"]) < 1e-4 * abs(found["tokens"]["value"])
    assert found["total"] == pytest.approx(record["lr"] * record["first_order"]["value"], rel=1e-4)
    assert found["momentum"]["value"] != 0
    assert record["counterfactuals"]["unchanged"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert record["counterfactuals"]["positive_only"]["cosine"] < 0.999
    assert record["predictors"].keys() == {"cui", "steer"}
    assert record["expected_reward"]["value"] > 0


def test_bfloat16_is_left_in_the_remainder(tmp_path):
    """TRL's own default is bf16: its rounding of the gradient is not the tokens', and is not fitted away."""
    trainer = grpo_trainer(tmp_path, report_to=[], lora={"init_lora_weights": False})
    callback = probe(trainer, eta_multipliers=())
    trainer.train()
    found = callback.records[1]["attribution"]
    share = abs(found["remainder"]["gradient"] / found["gradient"]["value"])
    assert 1e-4 < share < 0.3  # bfloat16 rounds to 4e-3


def test_only_what_is_due_is_kept_and_the_trainer_is_its_own_again(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[])
    hooked: list[bool] = []
    kept: list[int] = []
    score = trainer._get_per_token_logps_and_entropies

    def of_the_users_own(*args: Any, **kwargs: Any) -> Any:
        found = score(*args, **kwargs)
        scored.append(found[0])
        return found

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            hooked.append(any(bool(logp._backward_hooks) for logp in scored))
            kept.append(len(callback._capture._parts))
            scored.clear()

    scored: list[Tensor] = []
    trainer._get_per_token_logps_and_entropies = of_the_users_own
    callback = probe(trainer, eta_multipliers=())
    trainer.add_callback(Look())
    trainer.train()
    assert hooked == [True, False, True, False]
    assert kept == [0, 0, 0, 0]  # nor anything from one step to the next
    assert [record["attribution"]["gradient"]["value"] != 0 for record in callback.records] == [True, True]
    assert vars(trainer)["_get_per_token_logps_and_entropies"] is of_the_users_own
    assert "compute_loss" not in vars(trainer)
    assert "clip_grad_norm_" not in vars(trainer.accelerator)


def test_the_wrapped_methods_are_put_back_where_attaching_fails(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[])
    probe(trainer, num_sequences=99)
    with pytest.raises(ValueError, match="at least 99 E prompts"):
        trainer.train()
    assert "compute_loss" not in vars(trainer)


def random_reward(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
    """Draws from every stream, logs, and spoils what it is given."""
    log_metric("length", float(np.mean([len(text) for text in completions])))
    rewards = [
        sum(c.isdigit() for c in t) + random.random() + np.random.rand() + float(torch.rand(1)) for t in completions
    ]
    completions.clear()
    columns["trainer_state"].log_history.append({"mine": 1.0})
    columns["trainer_state"].log_history.pop()
    return rewards


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_run_is_the_same_with_and_without(tmp_path, loss_type):
    """In TRL's own default precision; every step probed, tokens, rewards and counterfactuals with it."""

    def run(probed: bool) -> tuple[Any, Any]:
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1)
        options = {"gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1, "max_grad_norm": LIMIT}
        trainer = grpo_trainer(
            tmp_path / f"{probed}",
            report_to=[],
            loss_type=loss_type,
            reward=spoiling if loss_type == "dapo" else random_reward,
            lora={"lora_dropout": 0.1},
            use_bias_correction_kl=False,
            **options,
        )
        callback = None
        if probed:
            callback = probe(trainer, every_n_steps=1, eta_multipliers=(), counterfactuals=["clip_higher"])
        trainer.train()
        streams = (torch.rand(3), random.random(), np.random.rand(3).tolist())
        timed = ("time", "runtime", "per_second")
        logs = [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in trainer.state.log_history]
        moments = [s for state in trainer.optimizer.optimizer.state.values() for s in state.values()]
        tensors = [p.detach() for p in trainer.model.parameters()] + moments + [streams[0]]
        return (tensors, (streams[1:], logs, sorted(vars(trainer)), sorted(vars(trainer.accelerator)))), callback

    def spoiling(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        prompts[0] = "?"
        return random_reward(completions, **columns)

    (tensors, facts), _ = run(False)
    (others, other_facts), callback = run(True)
    for record in callback.records:
        assert (record["status"], record["absent"]) == ("ok", {})
    assert len(callback.records) == 4
    assert facts == other_facts
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


# -------------------------------------------------------------------------------------------------------- rewards of E


def answered(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [text.count(right) - len(text) / 10 for text, right in zip(completions, answer, strict=True)]


def of_digits(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """Says nothing of every other prompt."""
    return [
        sum(c.isdigit() for c in text) / 8 if "1" in prompt else None
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def rows() -> list[dict[str, str]]:
    return [{"question": f"{a}*{b}=", "answer": str(a * b)[-1]} for a in range(4) for b in range(4)]


def test_rewards_of_e_are_the_trainers_functions_by_hand(tmp_path):
    asked: list[tuple[str, str, str]] = []

    def noted(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        asked.extend(zip(prompts, completions, answer, strict=True))
        return answered(completions, answer)

    trainer = grpo_trainer(
        tmp_path,
        reward=[noted, of_digits],
        reward_weights=[2.0, 0.5],
        data={"prompt": LEARNT, "answer": ["1"] * len(LEARNT)},
        max_steps=1,
        **PLAIN,
    )
    trainer.eval_dataset = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in rows()])
    callback = EntropyProbeTrainerCallback(trainer=trainer, num_sequences=16, eta_multipliers=())
    trainer.add_callback(callback)
    trainer.train()
    of_e = [(prompt, text, answer) for prompt, text, answer in asked if "*" in prompt]
    assert len(of_e) == 16
    assert all(answer == str(int(prompt[0]) * int(prompt[2]))[-1] for prompt, _, answer in of_e)
    by_hand = [
        2.0 * (text.count(answer) - len(text) / 10) + 0.5 * (sum(map(str.isdigit, text)) / 8 if "1" in prompt else 0)
        for prompt, text, answer in of_e
    ]
    assert callback.records[0]["expected_reward"]["value"] == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert callback.records[0]["absent"] == {}


def trainer_of(*functions: Any, weights: Any = None, **options: Any) -> Any:
    weights = torch.ones(len(functions)) if weights is None else torch.tensor(weights)
    return SimpleNamespace(reward_funcs=list(functions), reward_weights=weights, state="state", **options)


def rewards_of(prompts: Any, *functions: Any, column: str = "prompt", weights: Any = None, **options: Any) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    texts = prompt_texts(prompts, tokenizer, column)
    return TrainerRewards(
        trainer_of(*functions, weights=weights, **options), tokenizer, PromptRows(prompts, texts, column)
    )


@pytest.mark.parametrize("kind", ["rows", "dataset"])
def test_a_column_of_another_name(kind):
    prompts = rows() if kind == "rows" else Dataset.from_list(rows())
    found = rewards_of(prompts, answered, column="question")(["3*3=", "2*1="], ["199", "1"])
    assert found.tolist() == pytest.approx([1.7, -0.1])


def test_chats_and_tokens_as_trl_gives_them():
    chats = [{"prompt": [{"role": "user", "content": f"{a}+1"}], "answer": str(a + 1)} for a in range(3)]
    given: list[Any] = []

    def note(**columns: Any) -> list[float]:
        given.append(columns)
        return [1.0, 2.0]

    assert rewards_of(chats, note)(["0+1=", "2+1="], ["1", "no"], [[5], [30, 31]]).tolist() == [1, 2]
    [columns] = given
    assert columns == {
        "prompts": [chats[0]["prompt"], chats[2]["prompt"]],
        "completions": [[{"role": "assistant", "content": "1"}], [{"role": "assistant", "content": "no"}]],
        "answer": ["1", "3"],
        "completion_ids": [[5], [30, 31]],
        "trainer_state": "state",
    }


async def later(completions: list[str], **_: Any) -> list[float]:
    return [0.0 for _ in completions]


def too_few(**_: Any) -> list[float]:
    return [1.0]


def silent(completions: list[str], **_: Any) -> list[None]:
    return [None for _ in completions]


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ([answered], {}, r"missing 1 required positional argument: 'answer'"),
        ([nn.Linear(1, 1)], {}, "expected reward functions in Python, got the model Linear"),
        ([later], {}, "got later, a coroutine: give reward="),
        ([too_few], {}, "expected a reward for each of 2 completions of too_few, got 1"),
        ([silent, silent], {}, "expected a reward for every completion, got none by any function for 2 of 2"),
        ([of_digits], {"tools": [len]}, "got a run with tools: give reward="),
    ],
    ids=["column", "model", "coroutine", "length", "none", "tools"],
)
def test_what_cannot_be_called_says_why(functions, options, message):
    rewards = rewards_of(EVALUATED, *functions, **options)
    with pytest.raises((ValueError, TypeError), match=message):
        rewards(EVALUATED[:2], ["1", "2"])


def test_rows_that_contradict_each_other():
    twice = [*rows(), {"question": "3*3=", "answer": "8"}, rows()[1]]
    rewards = rewards_of(twice, answered, column="question")
    assert rewards(["0*1="], ["0"]).tolist() == [0.9]  # the same row twice
    with pytest.raises(ValueError, match=r"expected one row for each E prompt, got 2 that differ for '3\*3='"):
        rewards(["3*3="], ["9"])


# ------------------------------------------------------------------------------------------------------ what is absent


def test_a_reward_that_needs_more_than_bare_strings(tmp_path):
    data = {"prompt": LEARNT, "answer": ["1"] * len(LEARNT)}
    trainer = grpo_trainer(tmp_path, reward=answered, data=data, report_to=[], max_steps=1)
    callback = probe(trainer, eta_multipliers=())
    trainer.train()
    [record] = callback.records
    assert record["status"] == "ok"
    assert record["absent"].keys() == {"reward"}
    assert "missing 1 required positional argument: 'answer'" in record["absent"]["reward"]
    assert trainer.state.global_step == 1


def test_another_temperature_than_the_runs(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[], max_steps=1)
    callback = probe(trainer, eta_multipliers=(), temperature=0.5)
    trainer.train()
    assert "expected the probe at the run's temperature, 1.0" in callback.records[0]["absent"]["attribution"]


def test_without_its_trainer(tmp_path):
    trainer = grpo_trainer(tmp_path, report_to=[], max_steps=1)
    callback = EntropyProbeTrainerCallback(EVALUATED, num_sequences=16, eta_multipliers=())
    trainer.add_callback(callback)
    trainer.train()
    absent = callback.records[0]["absent"]
    assert "EntropyProbeTrainerCallback(..., trainer=trainer)" in absent["attribution"]
    assert absent.keys() == {"attribution", "reward"}


def test_a_trainer_of_another_kind(tmp_path):
    trainer = Trainer(
        model=build_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 36, "labels": [[5, 6, 7, 8]] * 36}),
        processing_class=build_tokenizer(),
    )
    callback = probe(trainer, eta_multipliers=(), max_new_tokens=6)
    trainer.train()
    why = callback.records[0]["absent"]["attribution"]
    assert "as TRL's GRPOTrainer, got Trainer" in why
    assert callback.records[0]["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("images", "expected U-prompts of text alone"),
        ("scoring", "expected a loss made of the log-probs of GRPOTrainer._get_per_token_logps_and_entropies"),
        ("clipping", "expected GRPOTrainer to clip by its accelerator's clip_grad_norm_"),
    ],
)
def test_trainers_that_do_something_else(tmp_path, change, message):
    """Training goes on, with its own results; the record says what is missing."""
    trainer = grpo_trainer(tmp_path, report_to=[], max_steps=1)
    if change == "images":
        prepare = trainer._prepare_inputs
        trainer._prepare_inputs = lambda batch: {**prepare(batch), "pixel_values": torch.zeros(1)}
        score = trainer._get_per_token_logps_and_entropies
        trainer._get_per_token_logps_and_entropies = lambda *a, pixel_values=None, **kw: score(*a, **kw)
    elif change == "scoring":
        trainer.compute_loss = lambda model, inputs, **_: model(input_ids=inputs["prompt_ids"]).logits.mean()
    else:
        trainer._clip_grad_norm = lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    callback = probe(trainer, eta_multipliers=())
    trainer.train()
    assert callback.records[0]["status"] == "ok"
    assert message in callback.records[0]["absent"]["attribution"]
