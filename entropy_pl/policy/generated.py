"""The log-probs of a few sequences as they were when their tokens were drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class GeneratedLogProbs:
    """Keeps what the sampler said of the tokens it drew, for a few of the sequences.

    Given to :func:`~entropy_pl.policy.sample.sample_completions`, which fills it; what is drawn does not change by it.
    The sequences are spread over the lengths of the prompts, so that there is padding among them.

    Args:
        rows: how many sequences are kept, at most.

    Afterwards ``index`` holds which rows of the rollout they are, ``[k]``, empty as long as nothing was drawn; ``logp``
    the log-probs at the sampling temperature, before top-p and top-k, in nats, ``[k, T]``, float64 (what stands behind
    the end of a completion means nothing); ``padded`` whether the prompt was padded when it was sampled, ``[k]``, bool;
    and ``half`` whether the policy, or autocast, computed in less than float32.
    """

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows
        self.index = torch.zeros(0, dtype=torch.long)
        self.logp = torch.zeros(0, 0, dtype=torch.float64)
        self.padded = torch.zeros(0, dtype=torch.bool)
        self.half = False

    def begin(self, order: list[int], width: int, device: torch.device, half: bool) -> None:
        """Choose the sequences.

        Args:
            order: rows of the rollout by the length of their prompts.
            width: largest number of tokens in a completion.
            device: of the policy.
            half: whether it computes in less than float32.
        """
        places = torch.linspace(0, len(order) - 1, min(self.rows, len(order))).round().long()
        self.index = torch.tensor(order)[places]
        self.logp = torch.zeros(len(places), width, dtype=torch.float64, device=device)
        self.padded = torch.zeros(len(places), dtype=torch.bool)
        self.half = half

    def watch(self, batch: list[int], mask: Tensor, temperature: float) -> Watch:
        """What listens while a batch is sampled.

        Args:
            batch: its rows of the rollout.
            mask: of its prompts, ``[B, P]``.
            temperature: that logits are divided by.
        """
        place = {row: number for number, row in enumerate(batch)}
        kept = [number for number, row in enumerate(self.index.tolist()) if row in place]
        at = torch.tensor([place[int(self.index[number])] for number in kept], dtype=torch.long, device=mask.device)
        self.padded[kept] = ~mask[at, 0].bool().cpu()
        return Watch(
            self.logp, torch.tensor(kept, dtype=torch.long, device=mask.device), at, mask.shape[1], temperature
        )


class Watch(LogitsProcessor):
    """Notes the chosen tokens' log-probs of some rows of a batch and leaves the logits alone.

    Which token was chosen is known at the next call, or when a segment of sampling has ended.

    Args:
        logp: to be written to, ``[k, T]``.
        kept: which rows of it are watched here.
        at: where in the batch these are.
        prompt_width: columns of the prompts.
        temperature: that logits are divided by.
    """

    def __init__(self, logp: Tensor, kept: Tensor, at: Tensor, prompt_width: int, temperature: float) -> None:
        self._logp, self._kept, self._at = logp, kept, at
        self._prompt_width, self._temperature = prompt_width, temperature
        self._said: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the tokens chosen since, and what is said of the next ones."""
        self._note(input_ids)
        if len(self._at):
            self._said = torch.log_softmax(scores[self._at.to(scores.device)].double() / self._temperature, -1)
        return scores

    def segment_ended(self, ids: Tensor, left: Tensor) -> None:
        """Some rows leave the batch.

        Args:
            ids: all tokens of the batch so far.
            left: the rows that stay, in order.
        """
        self._note(ids)
        stays = torch.isin(self._at, left)
        self._kept, self._at = self._kept[stays], torch.searchsorted(left, self._at[stays])

    def _note(self, ids: Tensor) -> None:
        if self._said is not None:
            said = self._said.to(self._logp.device)
            chosen = ids[self._at, -1].to(said.device)
            self._logp[self._kept, ids.shape[1] - 1 - self._prompt_width] = said.gather(1, chosen[:, None]).squeeze(1)
            self._said = None
