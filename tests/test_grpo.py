from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from written import written_rollout

import entropy_pl.groups
from entropy_pl.attribution import UpdateBatch
from entropy_pl.cli import main
from entropy_pl.data.batch import PromptBatch
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.grpo import GRPOModule
from entropy_pl.objectives import INTERVENTIONS, AdvantageKind, LossSettings, LossType, intervened, register_reward
from entropy_pl.policy import LoraSettings, PolicySettings, load_policy, load_policy_from, sample_completions
from entropy_pl.rollout import Rollout

BATCHES = [
    PromptBatch(["1 + 2 =", "17 - 9 = "], ["3", "8"]),
    PromptBatch(["4 * 5 =", "2 +"], ["20", "2"]),
]
SGD = partial(torch.optim.SGD, lr=0.5)  # unlike Adam's, its first step shows the gradient's size
ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01)


@register_reward("test_digits")
def digits_reward(completion: str, answer: str) -> float:
    """Differs almost surely within a group, except for the answer `none`, which earns nothing at all."""
    return 0.0 if answer == "none" else sum(c.isdigit() for c in completion) / max(1, len(completion))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a policy this small, threads that wait for each other cost ten times what they save on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tiny_policy_dir: Path) -> Callable[..., GRPOModule]:
    def make_module(dropout: float = 0.0, dtype: Any = "float32", **options: Any) -> GRPOModule:
        lora = LoraSettings(rank=4, dropout=dropout)
        defaults = {
            "policy": PolicySettings(str(tiny_policy_dir), lora=lora, dtype=dtype),
            "num_generations": 4,
            "max_new_tokens": 10,
            "rewards": ["test_digits"],
            "optimizer": ADAM,
        }
        return GRPOModule(**(defaults | options))

    return make_module


class StepRecorder(Callback):
    """What a hook on the optimizer's step sees."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self.trainer = trainer
        trainer.optimizers[0].register_step_post_hook(self.after_step)

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        self.steps.append(
            {
                "reward": float(self.trainer.callback_metrics["train/reward"]),
                "grad_norm": float(torch.cat(gradients).norm()),
                "lr": optimizer.param_groups[0]["lr"],
                "autocast": torch.is_autocast_enabled("cpu"),
                "default_dtype": torch.get_default_dtype(),
            }
        )


def fit(
    module: GRPOModule,
    batches: list[PromptBatch] = BATCHES,
    *,
    epochs: int = 1,
    path: str | None = None,
    **options: Any,
) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, **({"enable_checkpointing": False} | quiet | options))
    trainer.fit(module, DataLoader(batches, batch_size=None, generator=torch.Generator()), ckpt_path=path)
    return trainer


def trained(module: GRPOModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}


def initial(module: GRPOModule) -> dict[str, torch.Tensor]:
    module.configure_model()
    return trained(module)


def distance(one: dict[str, Any], other: dict[str, Any], start: dict[str, Any]) -> float:
    """How far apart two runs ended, relative to how far the other one went."""
    apart = sum(((one[name] - other[name]).detach().double() ** 2).sum() for name in one)
    went = sum(((other[name] - start[name]).detach().double() ** 2).sum() for name in one)
    return float((apart / went) ** 0.5)


def logged(trainer: Trainer, name: str) -> float:
    return float(trainer.callback_metrics[f"train/{name}"])


# ----------------------------------------------------------------------------------------------------- one step


def fixed_rollout(tokenizer: Any) -> Rollout:
    """Two prompts with two completions each, of unequal lengths; `$` stands for EOS."""
    prompts = [prompt for prompt in BATCHES[0].prompts for _ in range(2)]
    return written_rollout(tokenizer, prompts, ["12 a$", "b 3.14", "2$", "cc 7 d"])


def plain_loss(model: Any, base: Any, rollout: Rollout, rewards: list[float], temperature: float, beta: float) -> Any:
    """GRPO's loss, sequence by sequence and token by token, for groups of two."""
    total = 0.0
    for i, reward in enumerate(rewards):
        group = rewards[i // 2 * 2 : i // 2 * 2 + 2]
        advantage = (reward - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        completion = rollout.completion_ids[i][rollout.completion_mask[i]].tolist()
        logits, base_logits = (m(torch.tensor([prompt + completion])).logits[0] / temperature for m in (model, base))
        for k, token in enumerate(completion):
            position = len(prompt) + k - 1
            logp = logits[position].log_softmax(0)[token]
            base_logp = base_logits[position].log_softmax(0)[token].detach()
            ratio = torch.exp(logp - logp.detach())
            kl = torch.exp(base_logp - logp) - (base_logp - logp) - 1
            total = total + (-ratio * advantage + beta * kl) / len(completion) / len(rewards)
    return total


def test_a_step_is_that_of_a_plain_loop(
    make: Callable[..., GRPOModule], tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PolicySettings(str(tiny_policy_dir), lora=LoraSettings(rank=4))
    policies = []
    for _ in range(2):
        torch.manual_seed(3)
        policy = load_policy_from(settings)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # zero at first: A would have no gradient, and the KL would be zero
                torch.nn.init.normal_(parameter, std=0.05)
        policies.append(policy)
    start = {name: p.detach().clone() for name, p in policies[0].model.named_parameters()}
    base = load_policy(str(tiny_policy_dir), lora=None).model
    rollout = fixed_rollout(policies[0].tokenizer)
    monkeypatch.setattr(entropy_pl.groups, "sample_completions", lambda *_, **__: rollout)

    module = make(
        policy=policies[0], num_generations=2, temperature=0.7, kl_coefficient=0.3, max_grad_norm=None, optimizer=SGD
    )
    trainer = fit(module, BATCHES[:1])

    model = policies[1].model.train()
    rewards = [2 / 4, 3 / 6, 1 / 1, 1 / 6]  # the first group teaches nothing but the KL term
    loss = plain_loss(model, base, rollout, rewards, temperature=0.7, beta=0.3)
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    SGD(parameters).step()

    # Rows in one padded batch or one by one, float32 sums in another order: 1e-5 of the update, as a whole.
    assert distance(trained(module), dict(model.named_parameters()), start) < 1e-5
    assert logged(trainer, "grad_norm") == pytest.approx(float(norm), rel=1e-4)
    assert logged(trainer, "reward") == pytest.approx(statistics.mean(rewards))
    assert logged(trainer, "zero_advantage_fraction") == 0.5
    assert logged(trainer, "truncated_fraction") == 0.5
    assert logged(trainer, "completion_length") == pytest.approx(statistics.mean([5, 6, 2, 6]))
    assert trainer.global_step == 1


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_micro_batches_do_not_change_the_result(make: Callable[..., GRPOModule], loss_type: str) -> None:
    options = {"loss_type": loss_type, "kl_coefficient": 0.1, "updates_per_rollout": 2, "optimizer": SGD}
    modules = [make(max_batch_tokens=budget, **options) for budget in (10_000, 40, 1)]
    for module in modules:
        fit(module, BATCHES[:1])
    start = initial(make())
    for other in modules[1:]:
        # the same sum over rows in another order, in float32; the second update starts from that difference
        assert distance(trained(other), trained(modules[0]), start) < 1e-4


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("advantage", get_args(AdvantageKind))
def test_every_loss_and_advantage_moves_the_adapter_and_nothing_else(
    make: Callable[..., GRPOModule], loss_type: str, advantage: str
) -> None:
    module = make(loss_type=loss_type, advantage=advantage)
    start = initial(module)
    frozen = {n: p.detach().clone() for n, p in module.model.named_parameters() if not p.requires_grad}
    trainer = fit(module)
    assert trainer.global_step == 2
    assert all(not torch.equal(value, start[name]) for name, value in trained(module).items() if "lora_B" in name)
    assert all(torch.equal(p, frozen[n]) for n, p in module.model.named_parameters() if n in frozen)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.model.parameters() if p.requires_grad}


def test_several_updates_per_rollout(make: Callable[..., GRPOModule]) -> None:
    # clip range 0: every token whose ratio is not 1 and that moved the way of its advantage is clipped
    options = {"clip_low": 0.0, "clip_high": 0.0}
    once, twice = (make(updates_per_rollout=n, **options) for n in (1, 2))
    first, second = fit(once, BATCHES[:1]), fit(twice, BATCHES[:1])
    assert (first.global_step, second.global_step) == (1, 2)
    assert logged(first, "clip_fraction") == 0
    assert logged(second, "clip_fraction") > 0.1  # mean of none at the first update and many at the second
    assert logged(first, "entropy") == logged(second, "entropy")  # of the sampling θ


def test_a_run_that_learns_nothing_ends_and_says_why(make: Callable[..., GRPOModule]) -> None:
    """Every reward is equal, so that no optimizer step is ever taken and max_steps never comes."""
    module = make(rewards=["numeric_answer"], max_idle_rollouts=4)
    with pytest.warns(UserWarning, match="training stops at optimizer step 0: 4 rollouts in a row had no group"):
        trainer = fit(module, BATCHES[:1] * 50, max_steps=10)
    assert (trainer.global_step, module.rollouts_done) == (0, 4)


def test_max_steps_is_not_overshot(make: Callable[..., GRPOModule]) -> None:
    assert fit(make(updates_per_rollout=2), BATCHES, max_steps=3).global_step == 3


def test_entropy_is_that_of_the_policy(make: Callable[..., GRPOModule], tiny_model: Any) -> None:
    # the tiny policy is close to uniform over its vocabulary of V tokens
    V = tiny_model.config.vocab_size
    trainer = fit(make(), BATCHES[:1])
    assert 0.5 < logged(trainer, "entropy") < torch.tensor(V).log()


# ---------------------------------------------------------------------------------------- groups without advantage

MIXED = PromptBatch(["1 + 2 =", "17 - 9 = ", "5"], ["3", "none", "none"])


@pytest.mark.parametrize("zero_advantage", ["keep", "filter"])
def test_filtering_drops_groups_from_the_average(make: Callable[..., GRPOModule], zero_advantage: str) -> None:
    module = make(zero_advantage=zero_advantage, max_grad_norm=None, optimizer=SGD)
    module.configure_model()
    groups = module.sampler.draw(module.model, module.tokenizer, MIXED)
    assert groups.zero_advantage.tolist() == [False, True, True]
    kept = module.sampler.informative(module.model, module.tokenizer, MIXED, groups)
    rows = slice(0, 4) if zero_advantage == "filter" else slice(0, 12)
    assert torch.equal(kept.rollout.completion_ids, groups.rollout.completion_ids[rows])
    assert torch.equal(kept.rewards, groups.rewards[rows])


def test_filtered_gradient_is_the_kept_one_over_fewer_rows(make: Callable[..., GRPOModule]) -> None:
    options = {"max_grad_norm": None, "optimizer": SGD}
    norms = {z: logged(fit(make(zero_advantage=z, **options), [MIXED]), "grad_norm") for z in ("keep", "filter")}
    assert norms["filter"] == pytest.approx(3 * norms["keep"], rel=1e-4)  # 4 rows of 12 are left


def test_resampling_asks_again_for_the_groups_that_teach_nothing(
    make: Callable[..., GRPOModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def spy(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> Rollout:
        asked.append(prompts)
        return sample_completions(model, tokenizer, prompts, **options)

    lucky = iter([False] * 4 + [True] * 100)  # the second prompt's first draw earns nothing, the next ones do
    original = digits_reward
    monkeypatch.setitem(
        entropy_pl.objectives.rewards._REWARDS._things,
        "test_digits",
        lambda completion, answer: 0.0 if answer == "8" and not next(lucky) else original(completion, answer),
    )
    monkeypatch.setattr(entropy_pl.groups, "sample_completions", spy)
    module = make(zero_advantage="resample", max_resamples=3)
    trainer = fit(module, BATCHES[:1])
    assert asked == [["1 + 2 =", "17 - 9 = "], ["17 - 9 = "]]
    assert logged(trainer, "zero_advantage_fraction") == 0.5  # of the first draw
    assert trainer.global_step == 1


@pytest.mark.parametrize(
    ("zero_advantage", "draws", "kl_coefficient", "steps"),
    [("keep", 1, 0.0, 0), ("filter", 1, 0.0, 0), ("resample", 3, 0.0, 0), ("keep", 1, 0.1, 1), ("filter", 1, 0.1, 0)],
)
def test_nothing_to_learn(
    make: Callable[..., GRPOModule],
    monkeypatch: pytest.MonkeyPatch,
    zero_advantage: str,
    draws: int,
    kl_coefficient: float,
    steps: int,
) -> None:
    drawn = 0

    def spy(*args: Any, **options: Any) -> Rollout:
        nonlocal drawn
        drawn += 1
        return sample_completions(*args, **options)

    monkeypatch.setattr(entropy_pl.groups, "sample_completions", spy)
    module = make(zero_advantage=zero_advantage, kl_coefficient=kl_coefficient)
    start = initial(module)
    trainer = fit(module, [PromptBatch(["1", "2 +"], ["none", "none"])])
    assert (drawn, trainer.global_step) == (draws, steps)
    assert logged(trainer, "zero_advantage_fraction") == 1
    if not steps:
        assert all(torch.equal(value, start[name]) for name, value in trained(module).items())
        assert "train/grad_norm" not in trainer.callback_metrics


# ------------------------------------------------------------------------------------------------ the optimizer step


def test_kl_is_zero_at_the_start_and_not_later(make: Callable[..., GRPOModule]) -> None:
    options = {"kl_coefficient": 0.1, "max_batch_tokens": 40}
    assert logged(fit(make(**options), BATCHES[:1]), "kl") == 0
    assert logged(fit(make(**options), BATCHES), "kl") > 0
    assert "train/kl" not in fit(make(), BATCHES[:1]).callback_metrics


def test_hooks_on_the_step_see_clipped_gradients_and_the_reward(make: Callable[..., GRPOModule]) -> None:
    recorder = StepRecorder()
    trainer = fit(make(max_grad_norm=1e-3), precision="bf16-mixed", callbacks=[recorder])
    assert logged(trainer, "grad_norm") > 2e-3  # logged as it was
    assert [step["grad_norm"] for step in recorder.steps] == [pytest.approx(1e-3, rel=1e-2)] * 2
    assert recorder.steps[-1]["reward"] == logged(trainer, "reward")
    assert recorder.steps[0]["reward"] != recorder.steps[1]["reward"]
    assert not any(step["autocast"] for step in recorder.steps)


def test_scheduler_steps_with_the_optimizer(make: Callable[..., GRPOModule]) -> None:
    recorder = StepRecorder()
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = make(updates_per_rollout=2, scheduler=scheduler)
    trainer = fit(module, callbacks=[recorder])
    assert [step["lr"] for step in recorder.steps] == [1e-2, 5e-3, 2.5e-3, 1.25e-3]
    assert logged(trainer, "lr") == pytest.approx((2.5e-3 + 1.25e-3) / 2)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", "float32"), ("bf16-true", "bfloat16")])
def test_half_precision_keeps_the_adapter_in_float32(
    make: Callable[..., GRPOModule], precision: Any, dtype: str
) -> None:
    module, recorder = make(dtype=dtype, kl_coefficient=0.1), StepRecorder()
    trainer = fit(module, precision=precision, callbacks=[recorder])
    assert all(value.dtype == torch.float32 for value in trained(module).values())
    assert {p.dtype for p in module.model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert trainer.global_step == 2
    assert all(step["default_dtype"] == torch.float32 for step in recorder.steps)
    assert all(metric.isfinite() for metric in trainer.callback_metrics.values())
    assert all(metric.dtype == torch.float32 for metric in trainer.callback_metrics.values())


# ---------------------------------------------------------------------------------- interventions against collapse


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_intervention_trains(make: Callable[..., GRPOModule], name: str) -> None:
    """And ends elsewhere than the run without: two updates of one rollout, of which the first is at ratio 1."""
    plain = make(updates_per_rollout=2, clip_high=0.001)
    # of the tiny policy's 80 tokens at least one, and the largest covariance is above 0.1
    options = {"clip_cov_bounds": (0.1, 5.0)} if name == "clip_cov" else {}
    changed = make(updates_per_rollout=2, **({"clip_high": 0.001} | dict(INTERVENTIONS[name].changes) | options))
    fit(plain, BATCHES[:1])
    trainer = fit(changed, BATCHES[:1])
    assert trainer.global_step == 2
    assert any(not torch.equal(value, trained(changed)[key]) for key, value in trained(plain).items())
    assert all(value.isfinite().all() for value in trained(changed).values())


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_intervention_is_reached_by_a_setting(make: Callable[..., GRPOModule], name: str) -> None:
    loss = LossSettings(max_completion_length=10)
    assert make().policy_gradient.loss == loss
    assert make(**INTERVENTIONS[name].changes).policy_gradient.loss == intervened(loss, name) != loss


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_intervention_trains_from_the_command_line(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's log handler outlives a test's captured stderr
    fitted: list[GRPOModule] = []
    monkeypatch.setattr(GRPOModule, "on_train_end", lambda self: fitted.append(self))
    words = [
        f"--model.{key}={list(value) if isinstance(value, tuple) else value}"
        for key, value in INTERVENTIONS[name].changes.items()
    ]
    main(
        [
            "fit",
            f"--model.policy.name={tiny_policy_dir}",
            "--model.num_generations=2",
            "--model.max_new_tokens=6",
            "--model.rewards=[test_digits]",
            "--model.updates_per_rollout=2",
            *words,
            "--data.batch_size=2",
            "--data.u_size=8",
            "--data.e_size=2",
            "--probe.num_sequences=2",
            "--trainer.max_steps=2",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
        ]
    )
    [module] = fitted
    assert module.trainer.global_step == 2
    assert module.policy_gradient.loss == intervened(LossSettings(max_completion_length=6), name)


# --------------------------------------------------------------------------------------------- what probes are told


class UpdateWatch(Callback):
    """What the module tells of its batch during the step, with the gradient that the optimizer was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[UpdateBatch, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self.module = pl_module
        self.before = trained(pl_module)
        trainer.optimizers[0].register_step_post_hook(self.after_step)

    def after_step(self, *_: Any) -> None:
        batch = self.module.update_batch()
        assert batch is not None
        gradients = {n: p.grad.clone() for n, p in self.module.model.named_parameters() if p.grad is not None}
        self.seen.append((batch, gradients, self.before))
        self.before = trained(self.module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: GRPOModule, *_: Any) -> None:
        assert pl_module.update_batch() is None


@pytest.mark.parametrize("max_grad_norm", [None, 0.02])
def test_the_update_batch_is_of_the_gradient_that_made_the_step(
    make: Callable[..., GRPOModule], max_grad_norm: float | None
) -> None:
    """Its coefficients and scale, by the chain rule through log-probs taken one by one, give that gradient back."""
    watch = UpdateWatch()
    module = make(
        updates_per_rollout=2,
        temperature=0.7,
        kl_coefficient=0.1,
        entropy_coefficient=0.3,
        kl_cov_fraction=0.1,
        max_batch_tokens=40,
        max_grad_norm=max_grad_norm,
    )
    fit(module, BATCHES[:1], callbacks=[watch])
    assert module.update_batch() is None
    assert [batch.old_logp is None for batch, *_ in watch.seen] == [True, False]
    assert all((batch.gradient_scale < 0.9) == (max_grad_norm is not None) for batch, *_ in watch.seen)
    for batch, gradients, theta in watch.seen:
        assert batch.policy_gradient is module.policy_gradient
        assert batch.max_grad_norm == max_grad_norm
        model = module.model.train()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for name, value in theta.items():
            parameters[name].data.copy_(value)
        a, b = batch.token_coefficients, batch.entropy_coefficients
        assert b is not None
        total: Any = 0.0
        for i in range(len(batch.rollout)):
            prompt = batch.rollout.prompt_ids[i][batch.rollout.prompt_mask[i]].tolist()
            completion = batch.rollout.completion_ids[i][batch.rollout.completion_mask[i]].tolist()
            logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
            for k, token in enumerate(completion):
                log_p = logits[len(prompt) + k - 1].log_softmax(0)
                total = total + a[i, k] * log_p[token] - b[i, k] * (log_p.exp() * log_p).sum()
        expected = torch.autograd.grad(batch.gradient_scale * total, list(parameters.values()))
        wanted = dict(zip(parameters, expected, strict=True))
        start = {name: torch.zeros_like(value) for name, value in wanted.items()}
        # float32 forward passes, padded or not: 1e-5 of the gradient, as a whole
        assert distance({name: gradients[name] for name in wanted}, wanted, start) < 1e-5


def test_no_step_has_no_update_batch(make: Callable[..., GRPOModule]) -> None:
    assert make().update_batch() is None


def test_rewards_of_e_prompts(make: Callable[..., GRPOModule]) -> None:
    data = PromptDataModule(e_size=3, u_size=2, batch_size=2)
    module = make(rewards=["numeric_answer", "test_digits"], reward_weights=[2.0, 0.5], max_idle_rollouts=1000)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(module, data)
    first, _, third = data.e_prompts
    right, wrong = f"1</think><answer>{data.e_examples[2].answer}</answer>", "abc"
    rewards = module.rewards_of([third, first, third], [right, right, wrong])
    assert rewards is not None
    digits = digits_reward(right, "1") / 2
    other = 2.0 * (data.e_examples[0].answer == data.e_examples[2].answer)
    assert rewards.tolist() == pytest.approx([2 + digits, other + digits, 0.0])
    assert module.rewards_of([first, "1 + 1 ="], ["2", "2"]) is None
    with pytest.raises(ValueError, match="one answer per completion, got 1 completions and 2 answers"):
        module.rewards_of([first, third], ["2"])
    without = make()
    fit(without, BATCHES[:1])
    assert without.rewards_of([first], ["2"]) is None


# ------------------------------------------------------------------------------------------ reproduce, save, resume


def test_dropout_is_active_in_the_loss_alone(make: Callable[..., GRPOModule]) -> None:
    plain, dropped = make(), make(dropout=0.5)
    rewards = [logged(fit(module, BATCHES[:1]), "reward") for module in (plain, dropped)]
    assert rewards[0] == rewards[1]  # sampled alike
    assert any(not torch.equal(value, trained(dropped)[name]) for name, value in trained(plain).items())


def test_random_numbers_come_from_the_seed_alone(make: Callable[..., GRPOModule]) -> None:
    ends = []
    for disturbance, seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        module = make(dropout=0.1, seed=seed)
        fit(module)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(trained(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not all(torch.equal(value, ends[2][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_run_is_the_uninterrupted_one(
    make: Callable[..., GRPOModule], tmp_path: Path, precision: Any
) -> None:
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.7)
    build = partial(make, dropout=0.1, scheduler=scheduler, updates_per_rollout=2)
    whole, half, resumed = build(), build(), build()
    fit(whole, epochs=2, precision=precision)
    fit(half, precision=precision).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(resumed, epochs=2, precision=precision, path=str(tmp_path / "half.ckpt"))
    assert trainer.global_step == 8
    assert resumed.rollouts_done == 4
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value), name


def test_a_checkpoint_holds_the_trainable_parameters(
    make: Callable[..., GRPOModule], tiny_policy_dir: Path, tmp_path: Path
) -> None:
    module, path = make(temperature=0.5), tmp_path / "run.ckpt"
    fit(module).save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == {f"model.{name}" for name in trained(module)}

    settings = PolicySettings(str(tiny_policy_dir), lora=LoraSettings(rank=4))
    loaded = GRPOModule.load_from_checkpoint(path, policy=settings)
    assert loaded.temperature == 0.5
    assert all(torch.equal(trained(loaded)[name], value) for name, value in trained(module).items())

    other = PolicySettings(str(tiny_policy_dir), lora=LoraSettings(rank=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"expected a checkpoint with the policy's 4 trainable .* others, e\.g\."):
        GRPOModule.load_from_checkpoint(path, policy=other)


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "foo"}, "loss type out of .*'foo'"),
        ({"advantage": "foo"}, "advantage kind out of .*'foo'"),
        ({"zero_advantage": "foo"}, "zero_advantage out of .*'foo'"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient to be finite and not negative, got -1.0"),
        ({"clip_cov_fraction": 0.1, "kl_cov_fraction": 0.1}, "expected Clip-Cov or KL-Cov, got both"),
        ({"num_generations": 1}, "num_generations of at least 2, got 1"),
        ({"reward_weights": [1.0, 2.0]}, "one weight per reward"),
        ({"rewards": ["test_digit"]}, "did you mean 'test_digits'"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1, got 0"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"updates_per_rollout": 0}, "updates_per_rollout of at least 1, got 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens of at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm above 0, or None"),
        ({"seed": -1}, "seed of at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused_at_construction(
    make: Callable[..., GRPOModule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_reference_needs_an_adapter(make: Callable[..., GRPOModule], tiny_policy_dir: Path) -> None:
    module = make(policy=PolicySettings(str(tiny_policy_dir), lora=None), kl_coefficient=0.1)
    with pytest.raises(ValueError, match="expected a model with a LoRA adapter"):
        module.configure_model()


def test_a_scheduler_that_wants_a_metric_is_refused(make: Callable[..., GRPOModule]) -> None:
    with pytest.raises(MisconfigurationException, match="without a metric, got ReduceLROnPlateau"):
        fit(make(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau))


def test_every_parameter_is_trained_without_an_adapter(make: Callable[..., GRPOModule], tiny_policy_dir: Path) -> None:
    module = make(policy=PolicySettings(str(tiny_policy_dir), lora=None))
    start = initial(module)
    assert fit(module).global_step == 2
    assert all(not torch.equal(value, start[name]) for name, value in trained(module).items())
