"""One run's worth of probing, whatever trainer drives it: snapshot, read the step off, draw E at θ, measure."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.probe import EntropyProbe
from entropy_pl.reporting.records import SCHEMA, Record
from entropy_pl.rollout import Rollout
from entropy_pl.updates.record import UpdateRecorder


@dataclass
class ProbeSession:
    """Probes single optimizer steps of a run and leaves no trace in it.

    The E-batch is drawn from the parameters of before the step, put back for the time of the probe. Random streams,
    modes and parameters are as they were when it is over. A probe that fails is recorded as failed, and training
    goes on.

    Args:
        model: the policy.
        tokenizer: of the policy.
        prompts: the pool of E prompts.
        probe: what to measure.
        num_sequences: N, completions in the E-batch.
        completions_per_prompt: how many of them share a prompt.
        max_new_tokens: longest completion.
        seed: of the choice of prompts and of their completions.
        resample_prompts: other prompts at every probe, instead of one set for the run.

    Raises:
        ValueError: if the numbers do not fit each other or the pool.
    """

    model: nn.Module
    tokenizer: Any
    prompts: list[str]
    probe: EntropyProbe
    num_sequences: int = 256
    completions_per_prompt: int = 1
    max_new_tokens: int = 256
    seed: int = 0
    resample_prompts: bool = False
    _recorder: UpdateRecorder | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.completions_per_prompt < 1 or self.num_sequences % self.completions_per_prompt:
            raise ValueError(
                f"expected num_sequences as a multiple of completions_per_prompt, got {self.num_sequences} and "
                f"{self.completions_per_prompt}"
            )
        needed = self.num_sequences // self.completions_per_prompt
        if needed < 2:
            raise ValueError(f"expected at least 2 E prompts, for an error bar, got {needed}")
        if len(self.prompts) < needed:
            raise ValueError(
                f"expected at least {needed} E prompts (num_sequences={self.num_sequences}, completions_per_prompt="
                f"{self.completions_per_prompt}), got {len(self.prompts)}: give more prompts or lower num_sequences"
            )

    @property
    def armed(self) -> bool:
        """Whether a step is being watched."""
        return self._recorder is not None

    def arm(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the step: keep θ."""
        self._recorder = UpdateRecorder(self.model, optimizer)
        self._recorder.snapshot()

    def disarm(self) -> None:
        """Let go of θ; a step that was watched and never came is forgotten."""
        self._recorder = None

    def measure(self, step: int, on_pass: Callable[[str], None] = lambda phase: None) -> Record:
        """After the step: read it off, measure it and disarm.

        Args:
            step: the optimizer step's number, counted from 0.
            on_pass: called with a phase's name after every pass over E.

        Returns:
            A record (see :mod:`entropy_pl.reporting.records`) of status ``ok``, ``no_movement`` or ``failed``.
        """
        record: Record = {"schema": SCHEMA, "kind": "probe", "step": step, "status": "ok", "message": None}
        start = time.perf_counter()
        try:
            record |= self._measured(step, on_pass)
        except Exception as error:  # whatever goes wrong here must not end a training run
            record |= {"status": "failed", "message": f"{type(error).__name__}: {error}"}
            warnings.warn(f"entropy probe at step {step} failed, training goes on. {record['message']}", stacklevel=2)
        finally:
            self.disarm()
        record.setdefault("seconds", {})["total"] = time.perf_counter() - start
        return record

    def e_prompts(self, step: int) -> list[str]:
        """The E prompts of a step: one seeded choice for the run, or one per step."""
        stream = random.Random(f"{self.seed}, step {step}" if self.resample_prompts else f"{self.seed}")
        return stream.sample(self.prompts, self.num_sequences // self.completions_per_prompt)

    def _measured(self, step: int, on_pass: Callable[[str], None]) -> Record:
        if self._recorder is None:
            raise RuntimeError("no step is being watched: call arm() before the optimizer's step")
        update = self._recorder.read()
        if not any(bool(direction.any()) for direction in update.direction.values()):
            message = "the step did not move the policy (a learning rate of zero, or no gradient)"
            return {"status": "no_movement", "message": message, "lr": update.lr}
        with self._recorder.at_theta_before():
            start = time.perf_counter()
            rollout = self._draw(step)
            sampling = time.perf_counter() - start
            on_pass("sampling")
            result = self.probe.measure(self.model, rollout, update, on_pass=on_pass).to_dict()
        result["seconds"] = {"sampling": sampling, **result["seconds"]}
        lengths = rollout.completion_lengths.double()
        return result | {"mean_completion_length": float(lengths.mean())}

    def _draw(self, step: int) -> Rollout:
        with isolated_rng(seed_of_step(self.seed, step)), self.probe.evaluation(self.model):
            return sample_completions(
                self.model,
                self.tokenizer,
                self.e_prompts(step),
                num_completions=self.completions_per_prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.probe.temperature,
            )


def seed_of_step(seed: int, step: int) -> int:
    """The seed of the completions of one probe."""
    return random.Random(f"{seed}, completions of step {step}").getrandbits(63)
