"""The truth from outside, on a real policy: what the probe says of a step, against fresh samples after it.

The probe never sees the policy after the step; these tests sample it.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from entropy_pl import EntropyProbe, PromptDataModule, Rollout, load_policy, token_stats
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
    return PromptDataModule("gsm8k_r1_template", dataset_path=str(shared_dir / "data/gsm8k"), e_size=512, seed=0)


def fresh_entropy(policy: Policy, prompts: list[str], seed: int) -> EntropyChange:
    """Ĥ of the policy as it stands, from completions of its own."""
    with isolated_rng(seed):
        rollout = sample_completions(policy.model, policy.tokenizer, prompts, max_new_tokens=TOKENS)
    return entropy_estimate(token_stats(policy.model, rollout, entropy_dtype=torch.float32))


def test_one_step_against_fresh_samples(policy, prompts):
    """ΔH of a step is Ĥ(θ_after) − Ĥ(θ_before) on fresh samples of both: z < 4, N = 256 for ΔH, 512 for each Ĥ.

    The step is one of AdamW's on the mean entropy of a batch, so that there is a change to see.
    """
    optimizer = torch.optim.AdamW(trainable_parameters(policy.model).values(), lr=5e-3, weight_decay=0.0)
    with isolated_rng(1):
        update_batch = sample_completions(
            policy.model, policy.tokenizer, prompts.e_prompts[-16:], max_new_tokens=TOKENS
        )
        e_batch = sample_completions(policy.model, policy.tokenizer, prompts.e_prompts[:256], max_new_tokens=TOKENS)
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
    assert abs(measured.value) > 4 * error, "the change must stand out, or agreement says nothing"
    assert abs(difference) < 4 * error


class Sharpen(LightningModule):
    """A run of somebody's own that lowers the entropy on purpose, so that there is a drop to measure."""

    def __init__(self, policy: Policy, batch: Rollout) -> None:
        super().__init__()
        self.policy, self.tokenizer, self.max_new_tokens = policy.model, policy.tokenizer, TOKENS
        self._batch = batch

    def training_step(self, batch: object, batch_idx: int) -> torch.Tensor:
        stats = policy_stats(self.policy, self._batch, entropy_gradient=True)
        return stats.entropy.sum() / stats.mask.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(trainable_parameters(self.policy).values(), lr=1e-3, weight_decay=0.0)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(20))  # type: ignore[arg-type]


def test_changes_of_consecutive_steps_add_up_to_the_drop(policy, prompts, tmp_path):
    """ΣΔH over 20 probed steps is the drop measured from fresh samples at both ends: z < 4, N = 40 and 256."""
    probe = EntropyProbeCallback(
        prompts=prompts.e_prompts[256:],
        num_sequences=40,
        every_n_steps=1,
        eta_multipliers=(),
        resample_prompts=True,  # independent E-batches, so that errors add in squares
    )
    with isolated_rng(4):
        batch = sample_completions(policy.model, policy.tokenizer, prompts.e_prompts[-16:], max_new_tokens=TOKENS)
    before = fresh_entropy(policy, prompts.e_prompts[:256], seed=1)
    Trainer(
        max_steps=20,
        accelerator="cpu",
        logger=False,
        callbacks=[probe],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(Sharpen(policy, batch))
    after = fresh_entropy(policy, prompts.e_prompts[:256], seed=2)

    changes = [r["sweep"][0]["true"] for r in probe.records if r["status"] == "ok"]
    assert len(changes) == 20
    total = sum(change["value"] for change in changes)
    drop = after.value - before.value
    error = math.hypot(before.stderr, after.stderr, *(change["stderr"] for change in changes))
    print(f"\nΣΔH = {total:.4g}; fresh: {after} − {before} = {drop:.4g}; error {error:.2g}")
    assert abs(drop) > 5 * error, "the drop must stand out, or agreement says nothing"
    assert abs(total - drop) < 4 * error
