"""GRPO in two processes: one launch for what two processes do, and one that Lightning makes itself."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from processes import run_processes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader
from written import written_rollout

import entropy_pl.groups
from entropy_pl.data.batch import PromptBatch
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.grpo import GRPOModule, _check_strategy
from entropy_pl.objectives import LossSettings, LossType, register_reward, select_tokens, token_covariance
from entropy_pl.policy import LoraSettings, Policy, PolicySettings, load_policy, load_policy_from
from entropy_pl.policy_gradient import sum_gradients
from entropy_pl.rollout import Rollout

SGD = partial(torch.optim.SGD, lr=0.5)  # unlike Adam's, its first step shows the gradient's size
ADAM = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01)
G, TEMPERATURE, BETA = 2, 0.7, 0.3

Group = tuple[str, tuple[str, str], str]  # prompt, completions (`$` is EOS), answer; the answer `none` earns nothing

BUSY: list[Group] = [
    ("1 + 2 =", ("12 a$", "b 3.14 c d"), "3"),
    ("17 - 9 = ", ("2$", "cc 7 d"), "8"),
]
SHORT: list[Group] = [("5", ("1$", "y"), "6"), ("2 + 2 = ", ("4 4$", "xyz$"), "none")]  # the second teaches nothing
IDLE: list[Group] = [("8 +", ("4 abcde", "xyz$"), "none")]

# What the two processes sample, and the settings it is for.
SCENARIOS: dict[str, tuple[list[Group], list[Group], dict[str, Any]]] = {
    "unequal": (BUSY, SHORT, {"zero_advantage": "filter", "kl_coefficient": BETA}),
    "nothing left": (BUSY, IDLE, {"zero_advantage": "filter", "kl_coefficient": BETA}),
    "nothing left in the first": (IDLE, SHORT, {"zero_advantage": "filter"}),
    "no advantage": (BUSY, IDLE, {"zero_advantage": "keep"}),
}
CASES = [(loss_type, name) for loss_type in get_args(LossType) for name in SCENARIOS]


@register_reward("test_ddp_digits")
def digits_reward(completion: str, answer: str) -> float:
    return 0.0 if answer == "none" else sum(c.isdigit() for c in completion) / max(1, len(completion))


def policy_at(folder: str, dropout: float = 0.0) -> Policy:
    """With an adapter that is not zero: otherwise A would have no gradient, and the KL would be zero."""
    torch.manual_seed(3)
    policy = load_policy_from(PolicySettings(folder, lora=LoraSettings(rank=4, dropout=dropout)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def make(folder: str, policy: Policy | None = None, **options: Any) -> GRPOModule:
    defaults = {
        "policy": policy or policy_at(folder),
        "num_generations": G,
        "max_new_tokens": 10,
        "temperature": TEMPERATURE,
        "rewards": ["test_ddp_digits"],
        "optimizer": SGD,
        "max_grad_norm": None,
        "max_batch_tokens": 40,  # several micro-batches, not equally many in both processes
    }
    return GRPOModule(**(defaults | options))


def fit(module: GRPOModule, data: Any, path: str | None = None, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", **(quiet | {"enable_checkpointing": False, "max_epochs": 1, "devices": 1} | options)
    )
    trainer.fit(module, data, ckpt_path=path)
    return trainer


def loader(batches: list[PromptBatch]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


def trained(module: GRPOModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad}


def logged(trainer: Trainer) -> dict[str, float]:
    return {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}


def prompts_of(groups: list[Group]) -> PromptBatch:
    return PromptBatch([prompt for prompt, _, _ in groups], [answer for _, _, answer in groups])


def rollout_of(tokenizer: Any, groups: list[Group]) -> Rollout:
    prompts = [prompt for prompt, _, _ in groups for _ in range(G)]
    return written_rollout(tokenizer, prompts, [text for _, completions, _ in groups for text in completions])


def sampling(groups: list[Group]) -> pytest.MonkeyPatch:
    """Every prompt is answered as written, until undone."""
    known = {prompt: (prompt, completions, answer) for prompt, completions, answer in groups}
    patch = pytest.MonkeyPatch()
    patch.setattr(
        entropy_pl.groups,
        "sample_completions",
        lambda model, tokenizer, prompts, **_: rollout_of(tokenizer, [known[prompt] for prompt in prompts]),
    )
    return patch


# -------------------------------------------------------------------------------------------- what two processes do


def scripted(rank: int, groups: list[list[Group]], module: GRPOModule, times: int = 1, **options: Any) -> Trainer:
    """Train on written answers, this process's own."""
    patch = sampling(groups[rank])
    try:
        return fit(
            module,
            loader([prompts_of(groups[rank])] * times),
            **({"strategy": "ddp", "devices": 2, "use_distributed_sampler": False} | options),
        )
    finally:
        patch.undo()


def take_steps(rank: int, folder: str) -> dict[str, Any]:
    """Parameters and metrics after one step of each case; after two rollouts of two clipped updates."""
    results: dict[str, Any] = {}
    for loss_type, name in CASES:
        *groups, options = SCENARIOS[name]
        module = make(folder, loss_type=loss_type, **options)
        trainer = scripted(rank, groups, module)
        results[f"{loss_type}, {name}"] = trained(module), logged(trainer)
    runs = {"run": "ddp", "run, unused": "ddp_find_unused_parameters_true"} | dict.fromkeys(INTERVENED, "ddp")
    for name, strategy in runs.items():
        module = make(folder, **RUN, **INTERVENED.get(name, {}))
        trainer = scripted(rank, [BUSY, SHORT], module, times=2, strategy=strategy)
        results[name] = trained(module), logged(trainer)
    return results


RUN = {
    "updates_per_rollout": 2,
    "max_grad_norm": 0.1,  # the gradient's is about one
    "optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
}

# Clip-Cov's are all the tokens inside its bounds, so that chance has no part in them.
INTERVENED: dict[str, dict[str, Any]] = {
    "run, entropy": {"entropy_coefficient": 0.2, "advantage_sign": "negative"},
    "run, Clip-Cov": {"clip_cov_fraction": 1.0, "clip_cov_bounds": (0.2, 2.0)},
    "run, KL-Cov": {"kl_cov_fraction": 0.2, "kl_cov_coefficient": 0.5},
}


def learn_nothing(rank: int, folder: str) -> tuple[int, int, bool]:
    module = make(folder, max_idle_rollouts=3)
    trainer = scripted(rank, [IDLE, IDLE], module, times=10)
    return trainer.global_step, module.rollouts_done, trainer.should_stop


class Overflow(Callback):
    """One process's gradient overflows at the second step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_after_backward(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if self.rank == 1 and trainer.global_step == 1:
            parameter = next(p for p in pl_module.model.parameters() if p.requires_grad)
            parameter.grad = torch.full_like(parameter, torch.inf)


def overflow(rank: int, folder: str) -> Any:
    """Under 16-mixed: a first step where process 1 has nothing to learn; with a second one where it alone overflows."""
    ends = []
    for updates, callbacks in ((1, []), (2, [Overflow(rank)])):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        module = make(folder, zero_advantage="filter", updates_per_rollout=updates)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        trainer = scripted(rank, [BUSY, IDLE], module, plugins=plugins, callbacks=callbacks)
        ends.append((trained(module), scaler.get_scale(), trainer.global_step))
    return ends


class Watch(Callback):
    """The prompts, rewards and metrics of every rollout, and the completions."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.rewards: list[list[float]] = []
        self.metrics: list[dict[str, float]] = []
        self.completions: list[torch.Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        draw = pl_module.sampler.draw

        def watched(model: Any, tokenizer: Any, batch: PromptBatch) -> Any:
            groups = draw(model, tokenizer, batch)
            self.prompts.append(batch.prompts)
            self.rewards.append(groups.rewards.tolist())
            self.completions.append(groups.rollout.completion_ids)
            return groups

        object.__setattr__(pl_module.sampler, "draw", watched)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.metrics.append(logged(trainer))


def train(rank: int, folder: str, where: str) -> dict[str, Any]:
    """A run as one would have it, interrupted and resumed; and the same prompts in both processes."""
    results: dict[str, Any] = {}
    ddp = {"strategy": "ddp", "devices": 2}

    def build() -> tuple[GRPOModule, PromptDataModule]:
        module = make(folder, policy_at(folder, dropout=0.1), optimizer=ADAM, max_grad_norm=1.0)
        return module, PromptDataModule(u_size=26, e_size=1, batch_size=6, seed=1)

    whole, half, resumed = build(), build(), build()
    watch = Watch()
    fit(*whole, **ddp, precision="bf16-mixed", max_epochs=2, callbacks=[watch])
    fit(*half, **ddp, precision="bf16-mixed").save_checkpoint(f"{where}/half.ckpt")
    fit(*resumed, f"{where}/half.ckpt", **ddp, precision="bf16-mixed", max_epochs=2)
    results["watch"] = {name: getattr(watch, name) for name in ("prompts", "rewards", "metrics")}
    results["ends"] = trained(whole[0]), trained(resumed[0]), whole[0].rollouts_done

    watch = Watch()
    fit(make(folder), loader(SAME), **ddp, use_distributed_sampler=False, callbacks=[watch])
    results["drawn"] = watch.completions
    return results


SAME = [PromptBatch(["1 + 2 =", "4 * 5 ="], ["3", "20"])]


def sum_unused(rank: int, _: str) -> list[Any]:
    """Gradients of a parameter that both processes have used, that one has, and that neither has; in two dtypes."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 3, dtype=d)) for d in (torch.float32, torch.float64) * 3]
    for place, parameter in enumerate(parameters):
        if place < 2 or (place < 4 and rank == 1):
            parameter.grad = torch.full_like(parameter, 10.0**rank * (place + 1))

    def total(values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    sum_gradients(parameters, total)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


# Of the two processes' completions: unequally many, of unequal lengths, and padded apart.
COVARIANCE_LENGTHS = ([3, 1, 4], [6, 0, 2, 5, 6, 1, 3])
COVARIANCE_SETTINGS = {
    "kl": LossSettings(kl_cov_fraction=0.3),
    "kl, one": LossSettings(kl_cov_fraction=1e-6),
    "clip, all": LossSettings(clip_cov_fraction=1.0, clip_cov_bounds=(0.1, 1.0)),
    "clip, some": LossSettings(clip_cov_fraction=0.1, clip_cov_bounds=(0.1, 1.0)),
}


def covariance_share(rows: slice, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, advantages and mask of some rows of one batch of ten."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(10, 6, generator=generator) - 2
    advantages = torch.randn(10, generator=generator)
    mask = torch.arange(6) < torch.tensor([*chain(*COVARIANCE_LENGTHS)])[:, None]
    return logp[rows, :width], advantages[rows], mask[rows, :width]


def choose_by_covariance(rank: int) -> dict[str, torch.Tensor]:
    logp, advantages, mask = covariance_share(slice(0, 3) if rank == 0 else slice(3, 10), 4 if rank == 0 else 6)

    def total(values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    torch.manual_seed(rank)
    covariance = token_covariance(logp, advantages, mask, total)
    chosen = {name: select_tokens(covariance, mask, of, total) for name, of in COVARIANCE_SETTINGS.items()}
    return {name: torch.nn.functional.pad(x, (0, 6 - x.shape[1])) for name, x in ({"": covariance} | chosen).items()}


def work(rank: int, folder: str, where: str) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")  # as a launcher does: Lightning then launches nothing
    return {
        "steps": take_steps(rank, folder),
        "nothing": learn_nothing(rank, folder),
        "overflow": overflow(rank, folder),
        "train": train(rank, folder, where),
        "unused": sum_unused(rank, folder),
        "covariance": choose_by_covariance(rank),
    }


@pytest.fixture(scope="module")
def ranks(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    return run_processes(work, 2, folder, str(tiny_policy_dir), str(folder))


# ------------------------------------------------------------------------------------------ what it should have been


def token_weight(loss_type: str, length: int, own: list[int], lengths: list[int], processes: int) -> float:
    """By definition: weight of a token of a completion, given its own length, its process's lengths, and all."""
    return {
        "grpo": 1 / (len(lengths) * length),
        "dr_grpo": 1 / (len(lengths) * 10),
        "dapo": 1 / sum(lengths),
        "bnpo": 1 / (processes * sum(own)),
    }[loss_type]


def plain_loss(policy: Policy, base: Any, processes: list[list[Group]], loss_type: str, beta: float) -> Any:
    """The loss of all processes' groups, completion by completion and token by token."""
    ids = [
        [[policy.tokenizer(t.rstrip("$"))["input_ids"] + [1] * t.count("$") for t in texts] for _, texts, _ in groups]
        for groups in processes
    ]
    own = [[len(completion) for group in process for completion in group] for process in ids]
    total: Any = 0.0
    for r, groups in enumerate(processes):
        for (prompt, texts, answer), completions in zip(groups, ids[r], strict=True):
            rewards = [digits_reward(text.rstrip("$"), answer) for text in texts]
            prompt_ids = policy.tokenizer(prompt)["input_ids"]
            for reward, completion in zip(rewards, completions, strict=True):
                advantage = (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4)
                weight = token_weight(loss_type, len(completion), own[r], [*chain(*own)], sum(map(bool, processes)))
                tokens = torch.tensor([prompt_ids + completion])
                logp, base_logp = ((m(tokens).logits[0] / TEMPERATURE).log_softmax(-1) for m in (policy.model, base))
                for k, token in enumerate(completion):
                    place = len(prompt_ids) + k - 1
                    log_ratio = base_logp[place, token].detach() - logp[place, token]
                    ratio = torch.exp(logp[place, token] - logp[place, token].detach())
                    kl = log_ratio.exp() - log_ratio - 1
                    total = total + weight * (-ratio * advantage + beta * kl)
    return total


def distance(one: dict[str, Any], other: dict[str, Any], start: dict[str, Any]) -> float:
    """How far apart two ends are, relative to how far the other one is from the start."""
    apart = sum(((one[name] - other[name]).detach().double() ** 2).sum() for name in one)
    went = sum(((other[name] - start[name]).detach().double() ** 2).sum() for name in one)
    return float((apart / went) ** 0.5)


def adapter(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("loss_type", "name"), CASES)
def test_a_step_is_that_of_one_process(
    ranks: list[dict[str, Any]], tiny_policy_dir: Path, loss_type: str, name: str
) -> None:
    *processes, options = SCENARIOS[name]
    if options["zero_advantage"] == "filter":
        processes = [[group for group in groups if group[2] != "none"] for groups in processes]
    policy, base = policy_at(str(tiny_policy_dir)), load_policy(str(tiny_policy_dir), lora=None).model
    start = adapter(policy)
    plain_loss(policy, base, processes, loss_type, options.get("kl_coefficient", 0.0)).backward()
    gradients = [p.grad for p in policy.model.parameters() if p.requires_grad]
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    SGD([p for p in policy.model.parameters() if p.requires_grad]).step()

    (first, metrics), (second, others) = (rank["steps"][f"{loss_type}, {name}"] for rank in ranks)
    # rows in padded batches or one by one, float32 sums in another order: 1e-5 of the update, as a whole
    assert distance(first, adapter(policy), start) < 1e-5
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert metrics == others
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_metrics_are_over_all_completions(ranks: list[dict[str, Any]]) -> None:
    _, metrics = ranks[0]["steps"]["grpo, nothing left in the first"]
    drawn = [(text, answer) for groups in (IDLE, SHORT) for _, texts, answer in groups for text in texts]
    rewards = [digits_reward(text.rstrip("$"), answer) for text, answer in drawn]
    assert metrics["reward"] == metrics["reward_test_ddp_digits"] == pytest.approx(statistics.mean(rewards))
    assert metrics["completion_length"] == pytest.approx(statistics.mean(len(text) for text, _ in drawn))
    assert metrics["truncated_fraction"] == pytest.approx(statistics.mean("$" not in text for text, _ in drawn))
    assert metrics["zero_advantage_fraction"] == pytest.approx(2 / 3)
    assert metrics["lr"] == 0.5
    assert {"entropy", "clip_fraction", "grad_norm"} <= set(metrics)  # seen by the other process alone


@pytest.mark.parametrize("name", ["run", "run, unused", *INTERVENED])
def test_a_run_is_that_of_one_process(ranks: list[dict[str, Any]], tiny_policy_dir: Path, name: str) -> None:
    """Of one process that is given all prompts; that its steps are right, `test_grpo` shows."""
    module = make(str(tiny_policy_dir), **RUN, **INTERVENED.get(name, {}))
    start = trained(module)
    patch = sampling(BUSY + SHORT)
    trainer = fit(module, loader([prompts_of(BUSY + SHORT)] * 2))
    patch.undo()
    (first, metrics), (second, others) = (rank["steps"][name] for rank in ranks)
    assert distance(first, trained(module), start) < 1e-4  # later updates start from the first one's rounding
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert metrics == others == pytest.approx(logged(trainer), rel=1e-4)  # likewise
    assert metrics["grad_norm"] > 0.2  # so that clipping did something
    if name in INTERVENED:  # and so did the intervention
        assert distance(first, ranks[0]["steps"]["run"][0], start) > 1e-2


def test_processes_that_learn_nothing_end_together(ranks: list[dict[str, Any]]) -> None:
    assert [rank["nothing"] for rank in ranks] == [(0, 3, True)] * 2


def test_an_overflow_in_one_process_skips_the_step_in_all(ranks: list[dict[str, Any]], tiny_policy_dir: Path) -> None:
    start = adapter(policy_at(str(tiny_policy_dir)))
    for (once, *facts), (twice, *others) in (rank["overflow"] for rank in ranks):
        assert facts == [8.0, 1]
        assert others == [4.0, 2]  # the scale is halved; Lightning counts the step it skips
        for name, value in once.items():
            assert not torch.equal(value, start[name])
            assert torch.equal(value, twice[name])
            assert torch.equal(value, ranks[0]["overflow"][0][0][name])


def test_training(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["train"]["watch"] for rank in ranks)
    order = PromptDataModule(u_size=26, e_size=1, batch_size=12, seed=1).train_dataloader()
    wanted = [batch.prompts for _ in range(2) for batch in order]
    assert len(wanted) == len(first["prompts"]) == 4
    for step, prompts in enumerate(wanted):
        assert sorted(first["prompts"][step] + second["prompts"][step]) == sorted(prompts)
        rewards = first["rewards"][step] + second["rewards"][step]
        for metrics in (first["metrics"][step], second["metrics"][step]):
            assert metrics["reward"] == pytest.approx(statistics.mean(rewards), rel=1e-5)  # a float32 sum of 24
    assert first["metrics"] == second["metrics"]


def test_a_resumed_run_is_the_uninterrupted_one(ranks: list[dict[str, Any]]) -> None:
    (whole, resumed, rollouts), (other, *_) = (rank["train"]["ends"] for rank in ranks)
    assert rollouts == 4
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
        assert torch.equal(value, other[name]), name


def test_processes_draw_their_own_random_numbers(ranks: list[dict[str, Any]], tiny_policy_dir: Path) -> None:
    watch = Watch()
    fit(make(str(tiny_policy_dir)), loader(SAME), callbacks=[watch])
    [alone], [first], [second] = (watch.completions, *(rank["train"]["drawn"] for rank in ranks))
    assert torch.equal(first, alone)
    assert second.shape != first.shape or not torch.equal(second, first)


def test_tokens_are_chosen_over_all_processes(ranks: list[dict[str, Any]]) -> None:
    together = {name: torch.cat([rank["covariance"][name] for rank in ranks]) for name in ranks[0]["covariance"]}
    logp, advantages, mask = covariance_share(slice(0, 10), 6)
    places = [(i, k) for i in range(10) for k in range(6) if mask[i, k]]
    assert len(places) == 31
    means = [
        statistics.mean(values)
        for values in ([float(logp[p]) for p in places], [float(advantages[i]) for i, _ in places])
    ]
    covariance = {(i, k): (float(logp[i, k]) - means[0]) * (float(advantages[i]) - means[1]) for i, k in places}
    for place, value in covariance.items():
        assert together[""][place].item() == pytest.approx(value, rel=1e-12)  # float64, sums in another order
    ranked = sorted(places, key=lambda place: -covariance[place])
    inside = {place for place in places if 0.1 < covariance[place] < 1.0}
    found = {name: {(i, k) for i, k in chosen.nonzero().tolist()} for name, chosen in together.items() if name}
    assert found["kl"] == set(ranked[:9])
    assert found["kl, one"] == set(ranked[:1])
    assert found["clip, all"] == inside
    assert found["clip, some"] < inside
    assert len(found["clip, some"]) == 3


def test_a_gradient_that_no_process_has_stays_none(ranks: list[dict[str, Any]]) -> None:
    sums = [11.0, 22.0, 30.0, 40.0]
    for rank in ranks:
        assert rank["unused"] == [*([[value] * 3] * 2 for value in sums), None, None]


# ------------------------------------------------------------------------------------------- Lightning's own launch

SCRIPT = """
import sys
import torch
from lightning import Trainer
from test_grpo_ddp import make
from entropy_pl.data.datamodule import PromptDataModule

torch.set_num_threads(1)
folder, out = sys.argv[1:]
module = make(folder, zero_advantage="resample")
data = PromptDataModule(u_size=40, e_size=1, batch_size=2)
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=3, logger=False, default_root_dir=out,
                  enable_progress_bar=False, enable_model_summary=False)
trainer.fit(module, data)
weights = {name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad}
torch.save((weights, trainer.global_step, trainer.world_size), f"{out}/{trainer.global_rank}.pt")
"""


def test_lightning_launches_the_processes(tiny_policy_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tiny_policy_dir), str(tmp_path)]
    # A deadlock is a failure and not a wait. The second process is the first one's child, and dies when it does.
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (first, *facts), (second, *others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert facts == others == [3, 2]
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_other_strategies_are_refused(strategy: Callable[[], Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"or DDP on several, got \w+: .*set Trainer\(strategy='ddp'\)"):
        _check_strategy(strategy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"static_graph": True}, r"DDP without static_graph, got one with it: .*leave it out"),
        ({"ddp_comm_hook": fp16_compress_hook}, "DDP without ddp_comm_hook"),
    ],
)
def test_what_is_for_ddps_own_averaging_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        _check_strategy(DDPStrategy(**options))


@pytest.mark.parametrize("strategy", [DDPStrategy(find_unused_parameters=True), SingleDeviceStrategy("cpu")])
def test_these_are_not(strategy: Any) -> None:
    _check_strategy(strategy)
