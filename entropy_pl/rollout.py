"""The two types that all packages exchange: a sampled batch, and the policy's log-probs and entropies of its tokens.

Notation, here and everywhere: N sequences, P prompt positions, T completion positions, V vocabulary entries;
``m_ik`` is True where completion i has a token at position k (its first EOS counts, nothing after it does).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rollout:
    """Prompts with one sampled completion each, under TRL's key names.

    Args:
        prompt_ids: token ids ``[N, P]``, left-padded.
        prompt_mask: ``[N, P]``, True at real tokens; stored as bool.
        completion_ids: token ids ``[N, T]``, right-padded.
        completion_mask: ``[N, T]``, True up to and including the first EOS; stored as bool.
        temperature: of the distribution that the completions were drawn from, softmax(logits/temperature). Whoever
            scores them takes log-probs and entropies of the same distribution.

    Raises:
        ValueError: if a shape disagrees with the others, a mask is padded on the wrong side, or the temperature is not
            positive and finite.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", checked_temperature(self.temperature))
        for name in ("prompt", "completion"):
            ids, mask = getattr(self, f"{name}_ids"), getattr(self, f"{name}_mask")
            if ids.ndim != 2 or mask.shape != ids.shape:
                raise ValueError(
                    f"expected {name}_ids and {name}_mask of one shape [N, length], "
                    f"got {list(ids.shape)} and {list(mask.shape)}"
                )
            object.__setattr__(self, f"{name}_mask", mask.bool())
        if len(self.prompt_ids) != len(self.completion_ids):
            raise ValueError(
                f"expected one completion per prompt row, got {len(self.prompt_ids)} prompts "
                f"and {len(self.completion_ids)} completions"
            )
        if (self.prompt_mask[:, :-1] & ~self.prompt_mask[:, 1:]).any():
            raise ValueError("expected prompts padded on the left: a prompt_mask has False after True")
        if (~self.completion_mask[:, :-1] & self.completion_mask[:, 1:]).any():
            raise ValueError("expected completions padded on the right: a completion_mask has True after False")
        if not self.prompt_mask.any(1).all():
            raise ValueError("expected at least one token in every prompt, got a prompt that is all padding")

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def prompt_lengths(self) -> Tensor:
        """Tokens per prompt, ``[N]``."""
        return self.prompt_mask.sum(1)

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens per completion, ``[N]``."""
        return self.completion_mask.sum(1)

    def select(self, index: Tensor) -> Rollout:
        """The rows of ``index``, padding kept as it is."""
        return self._mapped(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def at_temperature(self, temperature: float | None) -> Rollout:
        """The same tokens as completions of another temperature; None keeps the rollout's own.

        Raises:
            ValueError: for a temperature that is not positive and finite.
        """
        return self if temperature is None else replace(self, temperature=temperature)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Token ids and masks by the names above."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Rollout:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors.items()}
        return replace(self, **changed)

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> Rollout:
        """No rows, of one column each: what a process holds whose share of a batch is nothing."""
        ids = torch.zeros(0, 1, dtype=torch.long, device=device)
        return Rollout(ids, ids.bool(), ids, ids.bool())

    @staticmethod
    def concatenate(rollouts: list[Rollout]) -> Rollout:
        """One rollout of all rows, padded to the longest prompt and completion (pad id 0, masked).

        Raises:
            ValueError: for no rollout at all, or rollouts of several temperatures; those without rows do not count.
        """
        if not rollouts:
            raise ValueError("expected at least one rollout to concatenate, got none")
        temperatures = {rollout.temperature for rollout in rollouts if len(rollout)} or {rollouts[0].temperature}
        if len(temperatures) > 1:
            raise ValueError(f"expected rollouts of one temperature to concatenate, got {sorted(temperatures)}")

        def rows(name: str) -> Tensor:
            return _stacked([rollout.tensors[name] for rollout in rollouts], pad_left=name.startswith("prompt"))

        return Rollout(**{name: rows(name) for name in rollouts[0].tensors}, temperature=temperatures.pop())


@dataclass(frozen=True, eq=False)
class TokenStats:
    """What a policy says of every completion token of a rollout, or the derivative of that along an update.

    Args:
        logp: ``s_ik = log π(t_ik | prefix)`` in nats, ``[N, T]``.
        entropy: ``h_ik = H(π(· | prefix))`` in nats, ``[N, T]``.
        mask: ``m_ik``, ``[N, T]``, bool.

    Both statistics are of the sampling distribution (temperature applied to logits) and zero where the mask is False.

    Raises:
        ValueError: if the shapes disagree.
    """

    logp: Tensor
    entropy: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.logp.ndim != 2 or not self.logp.shape == self.entropy.shape == self.mask.shape:
            raise ValueError(
                "expected logp, entropy and mask of one shape [N, T], got "
                f"{list(self.logp.shape)}, {list(self.entropy.shape)} and {list(self.mask.shape)}"
            )
        object.__setattr__(self, "mask", self.mask.bool())

    def __len__(self) -> int:
        return len(self.logp)

    def select(self, index: Tensor) -> TokenStats:
        """The rows of ``index``."""
        return TokenStats(self.logp[index], self.entropy[index], self.mask[index])

    def to(self, device: torch.device | str) -> TokenStats:
        """The same numbers on another device."""
        return TokenStats(self.logp.to(device), self.entropy.to(device), self.mask.to(device))

    @staticmethod
    def concatenate(parts: list[TokenStats]) -> TokenStats:
        """All rows, padded to the longest (zero, masked)."""
        if not parts:
            raise ValueError("expected at least one part to concatenate, got none")
        return TokenStats(*(_stacked([getattr(part, field.name) for part in parts]) for field in fields(TokenStats)))

    def detach(self) -> TokenStats:
        """The same numbers, cut from the graph."""
        return replace(self, logp=self.logp.detach(), entropy=self.entropy.detach())


def checked_temperature(temperature: float) -> float:
    """The temperature, if logits can be divided by it.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"expected a finite temperature above 0, got {temperature} (greedy decoding is top_k=1 in sampling)"
        )
    return float(temperature)


def prompt_clusters(rollout: Rollout) -> Tensor | None:
    """Which sequences share a prompt, ``[N]``; None where none do."""
    ids = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)
    _, clusters = ids.unique(dim=0, return_inverse=True)
    return clusters if int(clusters.max()) + 1 < len(rollout) else None


def _stacked(parts: list[Tensor], pad_left: bool = False) -> Tensor:
    """The rows of all parts, padded with zeros to the widest."""
    width = max(part.shape[1] for part in parts)
    missing = [width - part.shape[1] for part in parts]
    pads = [(some, 0) if pad_left else (0, some) for some in missing]
    return torch.cat([torch.nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])
