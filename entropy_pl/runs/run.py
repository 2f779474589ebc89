"""A run as it finally went: its probes as records, and as a table."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from entropy_pl.records import Record, latest_per_step
from entropy_pl.runs.folder import find_records, records_in
from entropy_pl.runs.frame import probes_frame


@dataclass(frozen=True)
class Run:
    """The probes of a training run, or one offline measurement.

    Args:
        path: the run's folder.
        records: one record per probed step, by step: those of a run that was resumed as it finally went.
    """

    path: Path
    records: list[Record] = field(repr=False)

    @property
    def probes(self) -> pd.DataFrame:
        """One row per probe. A number that was not measured is NaN, a text that is not there is empty.

        A column marked ± stands for four: the estimate, and the same name with ``_stderr``, ``_ci_low`` and
        ``_ci_high``. Changes are those by the step that the optimizer took.

        * ``step``: the optimizer step, from 0; ``status``: ``ok``, ``no_movement``, ``skipped`` or ``failed``;
          ``message``: what a probe without a result has to say; ``lr``: the step's learning rate.
        * ``normalize``: whether entropies are in nats ``per_token`` or ``per_sequence``.
        * ``entropy`` ±: H before the step, nats. ``delta_h`` ±: ΔH, its true change, nats. ``delta_h1`` ±: δH₁, its
          change to first order, nats.
        * ``first_order`` ±: ⟨∇H, v⟩, nats per unit of learning rate. ``second_order`` ±: v'∇²H v, nats per unit of
          learning rate squared.
        * ``eta_star``: the learning rate at which both orders are equal in size, with ``eta_star_ci_low`` and
          ``eta_star_ci_high``, which is NaN where the interval has no upper end.
        * ``ess``: effective sample size behind ΔH, sequences; ``ess_min``: the smallest over the token positions;
          ``mean_weight``: mean importance weight, 1 but for chance; ``n_sequences`` and ``n_tokens``: of the E-batch.
        * ``trustworthy``: whether ΔH was measured and may be believed; ``warnings``: what a reader must know first, a
          sentence per line.
        * ``update_norm``: norm of the update per unit of learning rate.
        * ``reward``: mean reward of the training batch. ``expected_reward`` ±: J before the step, on the E-batch.
          ``delta_j`` ±: ΔJ, its change by the step. ``delta_j1`` ±: δJ₁, the change to first order. All in the reward's
          unit. ``exchange_rate`` ±: ΔH/ΔJ, nats per unit of reward; its ends are NaN where the interval is unbounded.
        * ``attribution_momentum`` ±, ``attribution_weight_decay`` ±, ``attribution_gradient`` ±,
          ``attribution_tokens`` ±, ``attribution_remainder`` ±: the parts of δH₁, nats, with errors over E. Momentum,
          weight decay, tokens and remainder add up to δH₁; tokens explain the gradient's part.
          ``attribution_positive_advantage`` ±, ``attribution_negative_advantage`` ± and
          ``attribution_zero_advantage`` ±: the tokens' part by the sign of their advantage, nats. Of the tokens and
          these three ``…_stderr_u`` is the standard error over the prompts of the U-batch.
        * ``sampler_gap``: mean difference of log-probs between sampler and scorer, nats per token; ``seconds``: wall
          time of the probe; ``overhead``: seconds of all probes so far over those of the run without them.
        * For each predictor that the records have ``predictor_<name>_pearson``, ``…_spearman`` and
          ``…_sign_agreement``, its agreement with the attributed tokens, and ``…_step``, what it predicts of the step,
          nats per unit of learning rate.
        * For each other loss ``counterfactual_<name>_delta_h`` ±, nats, and ``counterfactual_<name>_delta_j`` ±: ΔH and
          ΔJ had the step been made by it.
        """
        return probes_frame(self.records)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read the probes of a run, finished or not; lines of its records that cannot be read are warned of.

    Args:
        folder: a run's folder (Lightning's ``version_0``, a Trainer's ``output_dir``), one that holds a single such
            folder, a folder with ``records.jsonl`` in it, that file, or the output folder of ``entropy-pl measure``.

    Returns:
        Its records, and a data frame of them.

    Raises:
        ValueError: if there are no records in the folder, or those of several runs.
    """
    path, file = find_records(Path(folder))
    records, left_out = records_in(file)
    for line in left_out:
        warnings.warn(line, stacklevel=2)
    return Run(path, records if any(record.is_measurement for record in records) else latest_per_step(records))
