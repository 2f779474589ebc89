"""Attribution as people see it: with the tokens' texts, in nats of the step really taken."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entropy_pl.attribution import Attribution, InfluenceMatrix, UpdateBatch, compare_predictors
from entropy_pl.estimators import EntropyChange, interval
from entropy_pl.estimators.snis import Normalize
from entropy_pl.probe import MeasuredStep, StepMeasurement
from entropy_pl.probe.step import noted
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


def measured_record(
    measured: MeasuredStep, measurement: StepMeasurement, tokenizer: PreTrainedTokenizerBase, *, step: int, lr: float
) -> tuple[Json, AttributedTokens | None]:
    """Return what a record holds of a measured step, and every token of its U-batch where it was attributed.

    Args:
        measured: what was found.
        measurement: that found it; what cannot be attributed is noted in its ``absent``.
        tokenizer: of the policy.
        step: the optimizer step.
        lr: η.

    Returns:
        The keys of :meth:`.ProbeResult.to_dict`, and ``attribution`` and ``predictors`` where they are there. All but
        the predictors' ``step`` are of the step taken.
    """
    record, attributed = measured.result.to_dict(), measured.attributed
    tokens = None
    if attributed is not None:
        attribution, batch, first_order = attributed.attribution, attributed.batch, measured.result.first_order
        with noted(measurement.absent, "attribution"):
            tokens = attributed_tokens(
                attribution,
                batch,
                tokenizer,
                step=step,
                lr=lr,
                unit=measurement.probe.normalize,
                first_order=first_order,
                matrix=attributed.matrix,
                stderr=attributed.token_stderr,
            )
            explained: Json = {"attribution": attribution.to_dict(lr, first_order) | tokens.summary()}
            if batch.advantages is None:
                measurement.absent["predictors"] = "the U-batch has no advantages"
            else:
                predictors = compare_predictors(attribution, batch, clusters=prompt_clusters(batch.rollout))
                explained["predictors"] = {name: predictor.to_dict() for name, predictor in predictors.items()}
            record |= explained
    return record | {
        "absent": measurement.absent,
        "warnings": list(dict.fromkeys([*record["warnings"], *measurement.warnings])),
    }, tokens
