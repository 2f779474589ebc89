"""The truth from outside, on a real policy: what the probe says of a step, against fresh samples after it.

The probe never sees the policy after the step; these tests sample it.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from entropy_pl import EntropyProbe, GRPOModule, PromptDataModule, load_policy, token_stats
from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.estimators import EntropyChange, entropy_estimate
from entropy_pl.policy import LoraSettings, Policy, trainable_parameters
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.policy.score import policy_stats
from entropy_pl.updates import record_update

pytestmark = pytest.mark.slow

TOKENS = 40  # the policy truncated here is as good a policy as any, and a test of minutes becomes one of seconds


@pytest.fixture
def policy(shared_dir: Path) -> Policy:
    with isolated_rng(0):
        return load_policy(str(shared_dir / "models/gsm8k-4m"), lora=LoraSettings(rank=8, alpha=16))


@pytest.fixture
def prompts(shared_dir: Path) -> PromptDataModule:
    return PromptDataModule(
        "gsm8k_r1_template", dataset_path=str(shared_dir / "data/gsm8k"), e_size=768, batch_size=4, seed=0
    )


def fresh_entropy(policy: Policy, prompts: list[str], seed: int) -> EntropyChange:
    """Ĥ of the policy as it stands, from completions of its own."""
    with isolated_rng(seed):
        rollout = sample_completions(policy.model, policy.tokenizer, prompts, max_new_tokens=TOKENS)
    return entropy_estimate(token_stats(policy.model, rollout, entropy_dtype=torch.float32))


def train(policy: Policy, data: PromptDataModule, folder: Path, *callbacks: object, steps: int, lr: float) -> None:
    module = GRPOModule(
        policy,  # type: ignore[arg-type]
        num_generations=4,
        max_new_tokens=TOKENS,
        rewards=["format"],
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    )
    Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    ).fit(module, datamodule=data)


def test_one_step_against_fresh_samples(policy, prompts):
    """ΔH of a step is Ĥ(θ_after) − Ĥ(θ_before) on fresh samples of both: z < 4, N = 384 for ΔH, 768 for each Ĥ.

    The step is one of AdamW's on the mean entropy of a batch, so that there is a change to see.
    """
    optimizer = torch.optim.AdamW(trainable_parameters(policy.model).values(), lr=4e-3, weight_decay=0.0)
    with isolated_rng(1):
        update_batch = sample_completions(
            policy.model, policy.tokenizer, prompts.e_prompts[-16:], max_new_tokens=TOKENS
        )
        e_batch = sample_completions(policy.model, policy.tokenizer, prompts.e_prompts[:384], max_new_tokens=TOKENS)
    stats = policy_stats(policy.model, update_batch, entropy_gradient=True)
    (stats.entropy.sum() / stats.mask.sum()).backward()
    before = fresh_entropy(policy, prompts.e_prompts, seed=2)
    with record_update(policy.model, optimizer) as recorder:
        optimizer.step()
    after = fresh_entropy(policy, prompts.e_prompts, seed=3)
    with recorder.at_theta_before():
        measured = EntropyProbe(eta_multipliers=()).measure(policy.model, e_batch, recorder.update).taken.true

    difference = measured.value - (after.value - before.value)
    error = math.hypot(measured.stderr, before.stderr, after.stderr)
    print(f"\nΔH = {measured}; fresh: {after} − {before} = {after.value - before.value:.4g}; error {error:.2g}")
    assert abs(measured.value) > 5 * error, "the change must stand out, or agreement says nothing"
    assert abs(difference) < 4 * error


def test_changes_of_consecutive_steps_add_up_to_the_drop(policy, prompts, tmp_path):
    """ΣΔH over 20 probed steps is the drop measured from fresh samples at both ends: z < 4."""
    probe = EntropyProbeCallback(
        prompts=prompts.e_prompts[256:],
        num_sequences=64,
        every_n_steps=1,
        eta_multipliers=(),
        resample_prompts=True,  # independent E-batches, so that errors add in squares
    )
    before = fresh_entropy(policy, prompts.e_prompts[:512], seed=1)
    train(policy, prompts, tmp_path, probe, steps=20, lr=1e-3)
    after = fresh_entropy(policy, prompts.e_prompts[:512], seed=2)

    changes = [r["sweep"][0]["true"] for r in probe.records if r["status"] == "ok"]
    assert len(changes) == 20
    total = sum(change["value"] for change in changes)
    drop = after.value - before.value
    error = math.hypot(before.stderr, after.stderr, *(change["stderr"] for change in changes))
    print(f"\nΣΔH = {total:.4g}; fresh: {after} − {before} = {drop:.4g}; error {error:.2g}")
    assert abs(drop) > 3 * error, "the drop must stand out, or agreement says nothing"
    assert abs(total - drop) < 4 * error
