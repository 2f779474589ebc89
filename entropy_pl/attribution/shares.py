"""Two batches spread over the processes of a run: whose rows are whose, and how results come together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropy_pl.peers import Peers
from entropy_pl.rollout import Rollout, TokenStats, prompt_clusters


@dataclass(frozen=True)
class Shares:
    """Every method is an exchange that all processes make; one process alone has everything already."""

    peers: Peers

    def stats(self, own: TokenStats) -> TokenStats:
        """Of all rows."""
        if self.peers.size == 1:
            return own
        return TokenStats.concatenate(self.peers.exchange(own.to("cpu")))

    def rows(self, own: Tensor) -> Tensor:
        """Of all rows, ``[N, T]``, padded with zeros."""
        if self.peers.size == 1:
            return own
        parts = self.peers.exchange(own.cpu())
        width = max(part.shape[1] for part in parts)
        return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])

    def own(self, whole: TokenStats, rollout: Rollout) -> TokenStats:
        """Of this process's rows, as wide as its rollout."""
        if self.peers.size == 1:
            return whole
        counts = self.peers.exchange(len(rollout))
        start, width = sum(counts[: self.peers.rank]), rollout.completion_mask.shape[1]
        mine = slice(start, start + len(rollout))
        return TokenStats(*(x[mine, :width] for x in (whole.logp, whole.entropy, whole.mask)))

    def clusters(self, rollout: Rollout) -> Tensor | None:
        """Which of all rows share a prompt, ``[N]``; None where none do."""
        if self.peers.size == 1:
            return prompt_clusters(rollout)
        return prompt_clusters(Rollout.concatenate(self.peers.exchange(rollout.to("cpu"))))

    def sum(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of every tensor over the processes, in float64; on the CPU where there are several."""
        total = {name: value.double() for name, value in own.items()}
        if self.peers.size == 1:
            return total
        for rank, part in enumerate(self.peers.exchange({name: value.cpu() for name, value in own.items()})):
            for name, value in part.items():
                total[name] = value.double() if rank == 0 else total[name] + value.double()
        return total
