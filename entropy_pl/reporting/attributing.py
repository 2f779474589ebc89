"""Attribution as people see it: with the tokens' texts, in nats of the step really taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_pl.attribution import Attribution, InfluenceMatrix, UpdateBatch, compare_predictors
from entropy_pl.estimators import EntropyChange, interval
from entropy_pl.estimators.snis import Normalize
from entropy_pl.probe import what_happened
from entropy_pl.records import Json
from entropy_pl.reporting.attributed import ERRORS, TOTALS, AttributedTokens
from entropy_pl.rollout import prompt_clusters


def attributed_tokens(
    attribution: Attribution,
    batch: UpdateBatch,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    lr: float,
    unit: Normalize,
    first_order: EntropyChange | None = None,
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
        first_order: the probe's own δH₁, per unit η; see :meth:`.Attribution.to_dict`.
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
    found = attribution.to_dict(lr, first_order)
    parts = {name: found["remainder_sum" if name == "remainder" else name] for name in TOTALS} | found["by_sign"]
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
        totals={name: parts[name]["value"] for name in TOTALS},
        errors={name: {key: part.get(key) for key in ERRORS} for name, part in parts.items()},
        reach=interval(0.0, 1.0, attribution.prompts_of_e, attribution.confidence)[1],
    )


@contextmanager
def noted(absent: dict[str, str], what: str) -> Iterator[None]:
    """What fails inside costs nothing else: ``absent[what]`` says why."""
    try:
        yield
    except Exception as error:
        absent[what] = what_happened(error)


def attribution_record(
    attribution: Attribution, batch: UpdateBatch, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> tuple[Json, AttributedTokens]:
    """What a record keeps of an attribution, and all of it.

    Args:
        attribution: per unit η.
        batch: the whole U-batch.
        tokenizer: of the policy.
        options: of :func:`attributed_tokens`.

    Returns:
        The keys ``attribution`` and, where the batch has advantages, ``predictors``; and every token. All but the
        predictors' ``step`` are of the step taken.
    """
    tokens = attributed_tokens(attribution, batch, tokenizer, **options)
    found = attribution.to_dict(options["lr"], options.get("first_order"))
    record: Json = {"attribution": found | tokens.summary()}
    if batch.advantages is not None:
        predictors = compare_predictors(attribution, batch, clusters=prompt_clusters(batch.rollout))
        record["predictors"] = {name: predictor.to_dict() for name, predictor in predictors.items()}
    return record, tokens
