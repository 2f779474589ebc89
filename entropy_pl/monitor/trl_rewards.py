"""What a TRL trainer's own reward functions say of E's completions."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.monitor.prompts import PromptRows, is_chat
from entropy_pl.policy.rng import isolated_rng


class TrainerRewards:
    """The run's reward, the weighted sum, of E's completions, by functions called as TRL's GRPOTrainer calls them.

    The run's random streams, logs and rows are kept from them. What a function remembers by itself, from one call to
    the next, is not.

    Args:
        trainer: with ``reward_funcs`` and ``reward_weights``.
        tokenizer: of the policy.
        rows: of the E prompts, whose columns the functions may ask for.
    """

    def __init__(self, trainer: Any, tokenizer: Any, rows: PromptRows) -> None:
        self._trainer, self._tokenizer, self._rows = trainer, tokenizer, rows

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Rewards, ``[n]``, float64; a function's None counts as nothing, as it does for TRL.

        Args:
            prompts: texts, one per completion.
            completions: texts.
            completion_ids: their tokens, for functions that ask for them.

        Raises:
            ValueError: if one of the functions is not a plain function, or does not give each completion a number or
                None, or none of them gives a number.
        """
        self._refuse_more_than_functions()
        with isolated_rng():
            inputs = [self._rows[prompt] for prompt in prompts]
            chats = is_chat(inputs[0]["prompt"])
            answers = [[{"role": "assistant", "content": text}] for text in completions] if chats else completions
            columns: dict[str, Any] = {
                name: [row[name] for row in inputs]
                for name in inputs[0]
                if name not in ("prompt", "completion", "completion_ids")
            }
            if completion_ids is not None:
                columns["completion_ids"] = [list(ids) for ids in completion_ids]
            columns["trainer_state"] = self._trainer.state
            for name, method in (("log_extra", "_log_completion_extra"), ("log_metric", "_log_metric")):
                if hasattr(self._trainer, method):  # TRL of this version offers it; E's are not for the run's logs
                    columns[name] = _log_nothing
            found = [
                _called(function, [row["prompt"] for row in inputs], answers, columns)
                for function in self._trainer.reward_funcs
            ]
        each = torch.tensor(found, dtype=torch.float64)  # [functions, n]
        unrewarded = int(each.isnan().all(0).sum())
        if unrewarded:
            raise ValueError(
                f"expected a reward for every completion, got none by any function for {unrewarded} of {each.shape[1]}"
            )
        return (each * self._trainer.reward_weights.to(each)[:, None]).nansum(0)

    def _refuse_more_than_functions(self) -> None:
        trainer = self._trainer
        for function in trainer.reward_funcs:
            if isinstance(function, nn.Module):
                raise ValueError(f"expected reward functions in Python, got the model {type(function).__name__}")
        for name in ("tools", "environments", "rollout_func"):
            if getattr(trainer, name, None):
                raise ValueError(f"expected completions by the policy alone, got a run with {name}: give reward=")
        for name in ("response_schema", "response_template"):
            if getattr(self._tokenizer, name, None) is not None:
                raise ValueError(f"expected completions as texts, got a tokenizer with {name}: give reward=")


def _called(
    function: Callable[..., Any], prompts: list[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> list[float]:
    # copies: what one function does to its arguments is neither the run's business nor the next one's
    found = function(prompts=copy.deepcopy(prompts), completions=copy.deepcopy(completions), **copy.deepcopy(columns))
    name = getattr(function, "__name__", type(function).__name__)
    if inspect.isawaitable(found):
        if inspect.iscoroutine(found):
            found.close()
        raise ValueError(f"expected reward functions that return a list, got {name}, a coroutine: give reward=")
    rewards = [nan if reward is None else float(reward) for reward in found]
    if len(rewards) != len(prompts):
        raise ValueError(f"expected a reward for each of {len(prompts)} completions of {name}, got {len(rewards)}")
    return rewards


def _log_nothing(*_: Any, **__: Any) -> None:
    """In place of TRL's ``log_extra`` and ``log_metric``."""
