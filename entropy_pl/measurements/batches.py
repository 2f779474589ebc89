"""The two batches of an offline measurement: E to measure entropy on, U to make the update."""

from __future__ import annotations

from torch import Tensor

from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.estimators.reward import checked_rewards
from entropy_pl.groups import Groups
from entropy_pl.measurements.settings import MeasurementSettings
from entropy_pl.objectives import RewardSum
from entropy_pl.policy import (
    GeneratedLogProbs,
    Policy,
    decode_completions,
    derived_seed,
    isolated_rng,
    sample_completions,
)
from entropy_pl.rollout import Rollout


def prompt_data(settings: MeasurementSettings) -> PromptDataModule:
    """The prompts of both batches, disjoint, drawn by the measurement's seed; of a pair, E's alone are read.

    Raises:
        ValueError: for more prompts than their splits hold.
        FileNotFoundError: if the dataset's folder or file is missing.
    """
    batch = settings.batch_config
    data = PromptDataModule(
        batch.dataset_name,
        dataset_path=batch.dataset_path,
        prompt_template=batch.prompt_template,
        u_split=batch.U_split,
        e_split=batch.E_split,
        e_size=batch.e_prompts,
        batch_size=batch.B_U,
        seed=settings.seed,
    )
    try:
        _ = data.e_examples
        if settings.checkpoint.after_checkpoint_path is None:
            _ = data.u_examples
    except ValueError as error:
        if "e_size" not in str(error):
            raise
        raise ValueError(
            f"expected B_E / completions_per_prompt = {batch.e_prompts} distinct prompts in the E split: {error}. "
            "Raise completions_per_prompt for an E-batch larger than its split"
        ) from error
    return data


def draw_e_batch(
    policy: Policy,
    prompts: list[str],
    settings: MeasurementSettings,
    generated: GeneratedLogProbs | None = None,
) -> Rollout:
    """The E-batch ``[B_E, T]``, prompt-major, drawn from the policy in the precision that it is in.

    ``generated`` keeps the log-probs of a few of its sequences.
    """
    with isolated_rng(derived_seed(settings.seed, "E-batch")):
        return sample_completions(
            policy.model,
            policy.tokenizer,
            prompts,
            num_completions=settings.batch_config.completions_per_prompt,
            max_new_tokens=settings.generation.max_new_tokens,
            temperature=settings.generation.temperature,
            batch_size=settings.generation.sample_batch_size,
            generated=generated,
        )


def draw_u_batch(policy: Policy, data: PromptDataModule, settings: MeasurementSettings) -> Groups:
    """The U-batch: one batch of U prompts, in a seeded order, each answered G times and rewarded."""
    sampler = settings.update.sampler(
        num_generations=settings.batch_config.G,
        max_new_tokens=settings.generation.max_new_tokens,
        temperature=settings.generation.temperature,
        batch_size=settings.generation.sample_batch_size,
    )
    batch = next(iter(data.train_dataloader()))
    with isolated_rng(derived_seed(settings.seed, "U-batch")), settings.probe().evaluation(policy.model):
        groups = sampler.draw(policy.model, policy.tokenizer, batch)
        return sampler.informative(policy.model, policy.tokenizer, batch, groups)


def rewards_of_e(policy: Policy, rollout: Rollout, answers: list[str], settings: MeasurementSettings) -> Tensor:
    """Return the rewards of the E-batch's completions, ``[N]``, by the functions that reward U's.

    Raises:
        Exception: whatever a reward raises, which is anybody's function.
        ValueError: for rewards that are no finite numbers.
    """
    reward = RewardSum(settings.update.rewards, settings.update.reward_weights)
    return checked_rewards(reward(decode_completions(policy.tokenizer, rollout), answers)[0], len(rollout))
