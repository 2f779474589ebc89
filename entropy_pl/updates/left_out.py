"""The trainable parameters that an update leaves out, and how far they moved meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from entropy_pl.updates.shared import aliases_of

WORTH_SAYING = 0.01


class LeftOut:
    """What a recorder does not watch of a policy's trainable parameters, as it is now, copied into the host's memory.

    Args:
        model: the policy.
        watched: names of the parameters that the update is of.
        counts: which parameters are the policy's trainable ones.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: set[str],
        counts: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
    ) -> None:
        trainable = {name: p for name, p in model.named_parameters() if counts(p)}
        # Of memory that is shared the owner counts; first in the order are those watched.
        order = sorted(trainable, key=lambda name: name not in watched)
        aliases = aliases_of(trainable, order)
        owners = {name: p for name, p in trainable.items() if name not in aliases}
        taken_in = watched | {aliases[name].owner for name in watched if name in aliases}
        self._parameters = [p for name, p in owners.items() if name not in taken_in]
        self._before: list[Tensor] = [p.detach().to("cpu", copy=True) for p in self._parameters]
        counted = sum(p.numel() for p in owners.values())
        self.parameters = sum(p.numel() for p in self._parameters) / max(counted, 1)
        """Their share of the policy's trainable parameters."""

    def bytes(self) -> int:
        """Bytes of the copies that lie where the parameters do."""
        return sum(b.nbytes for b, p in zip(self._before, self._parameters, strict=True) if b.device == p.device)

    @torch.no_grad()
    def change(self) -> float:
        """‖Δθ‖ of them since they were copied."""
        squares = [
            float((parameter.detach().cpu().double() - before.double()).square().sum())
            for parameter, before in zip(self._parameters, self._before, strict=True)
        ]
        return math.sqrt(sum(squares))

    def said(self, taken_in: float) -> tuple[dict[str, float], str | None]:
        """What a record says of them.

        Args:
            taken_in: ‖Δθ‖ of the parameters that the update is of.

        Returns:
            ``{"parameters": share of the count, "change": ‖Δθ‖ of them by that of all}``, and a sentence where one of
            the two is worth it.
        """
        change = self.change()
        whole = math.hypot(change, taken_in)
        share = {"parameters": self.parameters, "change": change / whole if whole else 0.0}
        if max(share.values()) <= WORTH_SAYING:
            return share, None
        moved = f"whose change is {share['change']:.0%} of the training step's" if change else "which did not move"
        return share, (
            f"the update leaves out {share['parameters']:.0%} of the policy's trainable parameters, {moved}: what is "
            'measured is the step of the others. With optimizer="all" it is the step of all optimizers together'
        )
