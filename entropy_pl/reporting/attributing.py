"""Attribution as people see it: with the tokens' texts, in nats of the step really taken."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_pl.attribution import Attribution, InfluenceMatrix, UpdateBatch
from entropy_pl.estimators.snis import Normalize
from entropy_pl.reporting.attributed import AttributedTokens


def attributed_tokens(
    attribution: Attribution,
    batch: UpdateBatch,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    lr: float,
    unit: Normalize,
    matrix: InfluenceMatrix | None = None,
    stderr: Tensor | None = None,
) -> AttributedTokens:
    """Every token of the U-batch with what it did.

    Args:
        attribution: per unit η.
        batch: the whole U-batch.
        tokenizer: of the policy.
        step: the optimizer step.
        lr: η.
        unit: of the entropy.
        matrix: per unit η.
        stderr: of every token, per unit η, ``[N_U, T_U]``.
    """
    mask = attribution.stats.mask.cpu()
    rows, columns = (index.numpy() for index in mask.nonzero(as_tuple=True))
    ids = batch.rollout.completion_ids.cpu()[mask].tolist()
    texts = {token: str(tokenizer.decode([token])) for token in set(ids)}
    prompts = [
        str(tokenizer.decode(row[of_prompt], skip_special_tokens=True))
        for row, of_prompt in zip(batch.rollout.prompt_ids.cpu(), batch.rollout.prompt_mask.cpu(), strict=True)
    ]
    advantages = None if batch.advantages is None else batch.advantages.double().cpu().numpy()[rows]
    return AttributedTokens(
        step=step,
        eta=lr,
        unit=unit,
        values=lr * attribution.per_token.cpu()[mask].numpy(),
        logp=attribution.stats.logp.cpu()[mask].numpy(),
        entropy=attribution.stats.entropy.cpu()[mask].numpy(),
        advantages=advantages,
        sequence=rows,
        position=columns,
        text=[texts[token] for token in ids],
        prompts=prompts,
        sequence_values=lr * attribution.per_sequence.cpu().numpy(),
        sequence_stderr=None if matrix is None else abs(lr) * matrix.stderr.numpy(),
        matrix=None if matrix is None else np.asarray(lr * matrix.values),
        stderr=None if stderr is None else abs(lr) * stderr.cpu()[mask].numpy(),
        totals={
            "momentum": lr * attribution.momentum,
            "weight_decay": lr * attribution.weight_decay,
            "tokens": lr * attribution.tokens,
            "remainder": lr * sum(attribution.remainder.values()),
            "first_order": lr * attribution.first_order,
        },
    )
