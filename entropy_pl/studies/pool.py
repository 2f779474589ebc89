"""One large E-batch, scored once, that a study takes apart in many ways."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_pl.estimators import EntropyChange
from entropy_pl.measurements import EntropyMeasurements
from entropy_pl.policy import derived_seed
from entropy_pl.probe import EntropyProbe, ProbeScores
from entropy_pl.progress import progress
from entropy_pl.studies.folder import StudyFolder
from entropy_pl.studies.stored import drawn_once, scored_once
from entropy_pl.studies.study import StudySettings, advance_by_phase
from entropy_pl.updates import UpdateVector

DRAWN, SCORES = "pool_drawn.safetensors", "pool_scores.safetensors"
SMALLEST = 64  # sequences, of sizes nobody chose
Quantity = tuple[str, float | None]
"""``("entropy", None)``, H at θ; ``("delta_h1", None)``, δH₁ per unit η; ``("delta_h", η)``, ΔH(η)."""


@dataclass(frozen=True, eq=False)
class Pool:
    """A scored E-batch, in an order of its own.

    Args:
        scores: of all its sequences.
        update: v.
        order: row numbers in a seeded order, ``[B_E]``, the sequences of a prompt side by side: its beginning is a
            smaller E-batch, and so is any stretch of it.
    """

    scores: ProbeScores
    update: UpdateVector
    order: Tensor

    @property
    def eta_shown(self) -> float:
        """The η that figures show where there is room for one: the one closest to the learning rate, as a ratio."""
        return min(self.scores.shifted, key=lambda eta: (eta < 0, abs(math.log(abs(eta) / self.update.lr))))

    def estimates(self, probe: EntropyProbe, rows: Tensor) -> dict[Quantity, EntropyChange]:
        """What a probe makes of some sequences, ``[n]`` row numbers, as if there were no others."""
        result = probe.reduce(self.scores.select(rows), self.update)
        found: dict[Quantity, EntropyChange] = {
            ("entropy", None): result.entropy,
            ("delta_h1", None): result.first_order,
        }
        return found | {("delta_h", point.eta): point.true for point in result.sweep}

    def subsets(self, count: int, at_most: int | None = None) -> list[Tensor]:
        """Row numbers of E-batches of this size that share no sequence and no prompt, ascending, ``[count]`` each.

        The first one of every size is a beginning of the first one of any larger size.
        """
        stretches = self.order[: len(self.order) // count * count].view(-1, count)[:at_most]
        return [stretch.sort().values for stretch in stretches]


def pool_of(settings: StudySettings, folder: StudyFolder, *, features: bool, progress_bar: bool) -> Pool:
    """The study's pool, from its folder or drawn and scored now.

    Args:
        settings: of the study.
        folder: keeps the pool.
        features: of the sequences are needed, for critics.
        progress_bar: show one.
    """
    if features:
        settings = replace(settings, estimator=replace(settings.estimator, baseline="critic"))
    measurements = EntropyMeasurements(settings)
    with progress("pool", measurements.passes, "pass", shown=progress_bar) as bar:
        advance = advance_by_phase(bar)
        drawn = drawn_once(folder.path / DRAWN, measurements, settings, on_pass=advance)
        scores = scored_once(folder.path / SCORES, lambda: measurements.score(drawn, on_pass=advance))
    return Pool(scores, drawn.update.vector, pool_order(settings))


def pool_order(settings: StudySettings) -> Tensor:
    """Row numbers of the E-batch in a seeded order, ``[B_E]``, the sequences of a prompt side by side."""
    batch = settings.batch_config
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "order of the pool"))
    prompts = torch.randperm(batch.e_prompts, generator=generator)
    each = batch.completions_per_prompt
    return (prompts[:, None] * each + torch.arange(each)).flatten()  # the E-batch is prompt-major


def pool_sizes(settings: StudySettings, chosen: list[int] | None) -> list[int]:
    """Sizes of the smaller E-batches, ascending, the whole pool last.

    Args:
        settings: of the study.
        chosen: by its config; None: powers of two times a prompt's sequences, from 64 sequences on.
    """
    pool, each = settings.batch_config.B_E, settings.batch_config.completions_per_prompt
    if chosen is None:
        chosen, size = [], 2 * each
        while size < pool:
            chosen += [size] if size >= min(SMALLEST, pool // 2) else []
            size *= 2
    return sorted({*chosen, pool})


def check_sizes(settings: StudySettings, chosen: list[int] | None) -> None:
    """Refuse sizes that cannot be cut from the pool.

    Raises:
        ValueError: if a size is not a multiple of ``completions_per_prompt``, of at least two prompts, or exceeds B_E.
    """
    pool, each = settings.batch_config.B_E, settings.batch_config.completions_per_prompt
    for size in chosen or ():
        if size % each or not 2 * each <= size <= pool:
            raise ValueError(
                f"expected study.sizes between {2 * each} and B_E = {pool}, in multiples of completions_per_prompt = "
                f"{each}, got {size}"
            )
