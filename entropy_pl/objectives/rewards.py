"""Rewards of a completion, in [0, 1], by name; and their weighted sum.

A completion goes on from a prompt that ends in ``<think>``, so a good one reads
``… </think> <answer> 42 </answer>`` and stops there. A reward of one's own is one decorated function::

    @register_reward("short")
    def short_reward(completion: str, answer: str) -> float:
        return float(len(completion) < 200)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from entropy_pl.data.numbers import parse_number
from entropy_pl.registry import Registry

Reward = Callable[[str, str], float]
"""From a completion and the reference answer, as text, to a reward in [0, 1]."""

_TAG = r"</?(?:think|answer)>"
_WELL_FORMED = re.compile(rf"(?:(?!{_TAG}).)*</think>\s*<answer>((?:(?!{_TAG}).)*)</answer>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

_REWARDS: Registry[Reward] = Registry("reward")


def register_reward(name: str) -> Callable[[Reward], Reward]:
    """Make a reward available under a name.

    Args:
        name: what configs call the reward.

    Returns:
        A decorator that returns the reward unchanged.

    Raises:
        ValueError: if the name is taken by another reward.
    """

    def register(reward: Reward) -> Reward:
        _REWARDS.add(name, reward)
        return reward

    return register


def available_rewards() -> list[str]:
    """Registered names, sorted.

    Returns:
        What `get_reward` and a config's `model.rewards` understand.
    """
    return _REWARDS.names()


def get_reward(name: str) -> Reward:
    """Look a reward up.

    Args:
        name: as registered.

    Returns:
        The function ``(completion, answer) -> float`` in [0, 1].

    Raises:
        ValueError: if the name is not registered; the message names the nearest one and all there are.
    """
    return _REWARDS.get(name)


@register_reward("format")
def format_reward(completion: str, answer: str) -> float:
    """1 where the completion is ``… </think> <answer> N </answer>`` with a number N, each tag once, then nothing."""
    match = _WELL_FORMED.fullmatch(completion)
    return float(match is not None and parse_number(match[1]) is not None)


@register_reward("numeric_answer")
def numeric_answer_reward(completion: str, answer: str) -> float:
    """1 where the number inside ``<answer>`` is exactly the reference: ``$1,200.0`` is ``1200``.

    A completion with several ``<answer>`` blocks earns nothing, lest guessing pay.

    Raises:
        ValueError: if the reference answer is not a number.
    """
    expected = parse_number(answer)
    if expected is None:
        raise ValueError(f"expected a number as reference answer for the reward 'numeric_answer', got {answer!r}")
    found = _ANSWER.findall(completion)
    return float(len(found) == 1 and parse_number(found[0]) == expected)


class RewardSum:
    """Plain weighted sum of rewards, Σ_j w_j r_j; the weights are not normalized.

    Args:
        rewards: names of registered rewards, or functions ``(completion, answer) -> float`` in [0, 1].
        weights: one per reward; None: 1 each.

    Raises:
        ValueError: for no rewards, an unknown or repeated name, or weights that do not pair up with the rewards.
    """

    def __init__(self, rewards: Sequence[str | Reward], weights: Sequence[float] | None = None) -> None:
        named = [
            (reward, get_reward(reward)) if isinstance(reward, str) else (_name(reward), reward) for reward in rewards
        ]
        names = [name for name, _ in named]
        if not named or len(set(names)) < len(names):
            raise ValueError(f"expected at least one reward, each once, got {names}")
        if weights is not None and len(weights) != len(named):
            raise ValueError(f"expected one weight per reward {names}, got {list(weights)}")
        self.rewards: dict[str, Reward] = dict(named)
        self.weights: dict[str, float] = dict(zip(names, weights or [1.0] * len(names), strict=True))

    def __call__(self, completions: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Score N completions.

        Args:
            completions: decoded completions, N of them, without special tokens.
            answers: the reference answer of each.

        Returns:
            The weighted sum ``[N]`` and each reward by name, unweighted, ``[N]``; float32.

        Raises:
            ValueError: if the lengths differ, or a reward leaves [0, 1].
        """
        if len(completions) != len(answers):
            raise ValueError(
                f"expected one answer per completion, got {len(completions)} completions and {len(answers)} answers"
            )
        parts: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            values = [
                float(reward(completion, answer)) for completion, answer in zip(completions, answers, strict=True)
            ]
            outside = [value for value in values if not 0 <= value <= 1]
            if outside:
                raise ValueError(f"expected the reward {name!r} in [0, 1], got {outside[0]}")
            parts[name] = torch.tensor(values, dtype=torch.float32)
        total = torch.zeros(len(completions))
        for name, part in parts.items():
            total = total + self.weights[name] * part
        return total, parts


def _name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
