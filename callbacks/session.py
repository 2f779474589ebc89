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

from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.policy.sample import check_prompts, sample_completions
from entropy_pl.probe import EntropyProbe, timed
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
        sample_batch_size: completions sampled at once; None takes up to 256.

    Raises:
        ValueError: if the numbers do not fit each other or the pool, or a prompt does not fit the model's context.
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
    sample_batch_size: int | None = None
    _recorder: UpdateRecorder | None = field(default=None, init=False, repr=False)
    _failure: Exception | None = field(default=None, init=False, repr=False)

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
        check_prompts(self.model, self.tokenizer, self.prompts, self.max_new_tokens)

    @property
    def armed(self) -> bool:
        """Whether a step is being watched."""
        return self._recorder is not None or self._failure is not None

    @property
    def passes(self) -> int:
        """Passes over E that a probe takes, sampling counted as one."""
        return self.probe.passes(lr=1.0) + 1

    def arm(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the step: keep θ. What goes wrong here is recorded after the step, as a failed probe."""
        self.disarm()
        try:
            self._recorder = UpdateRecorder(self.model, optimizer)
            self._recorder.snapshot()
        except Exception as error:
            self._recorder, self._failure = None, error

    def disarm(self) -> None:
        """Let go of θ; a step that was watched and never came is forgotten."""
        self._recorder = self._failure = None

    def skipped(self, step: int) -> Record:
        """The record of a step that was due and did not happen, and disarm."""
        self.disarm()
        return self._record(step, "skipped") | {
            "message": "the optimizer's step was skipped (gradients that were not finite, under a gradient scaler)"
        }

    def measure(self, step: int, on_pass: Callable[[str], None] = lambda phase: None) -> Record:
        """After the step: read it off, measure it and disarm.

        Args:
            step: the optimizer step's number, counted from 0.
            on_pass: called with a phase's name after every pass over E.

        Returns:
            A record (see :mod:`entropy_pl.reporting.records`) of status ``ok``, ``no_movement`` or ``failed``.
        """
        record = self._record(step, "ok")
        start = time.perf_counter()
        try:
            if self._failure is not None:
                raise self._failure
            if self._recorder is None:
                raise RuntimeError("no step is being watched: call arm() before the optimizer's step")
            record["lr"] = self._recorder.read().lr
            record |= self._measured(self._recorder, step, on_pass)
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

    @staticmethod
    def _record(step: int, status: str) -> Record:
        return {"schema": SCHEMA, "kind": "probe", "step": step, "status": status, "message": None}

    def _measured(self, recorder: UpdateRecorder, step: int, on_pass: Callable[[str], None]) -> Record:
        update = recorder.update
        if update.norm() == 0:
            message = "the step did not move the policy (a learning rate of zero, or no gradient)"
            return {"status": "no_movement", "message": message}
        seconds: dict[str, float] = {}
        with recorder.at_theta_before():
            with timed(seconds, "sampling", self.model):
                rollout = self._draw(step)
            on_pass("sampling")
            result = self.probe.measure(self.model, rollout, update, on_pass=on_pass).to_dict()
        result["seconds"] = seconds | result["seconds"]
        lengths = rollout.completion_lengths.double()
        return result | {"mean_completion_length": float(lengths.mean())}

    def _draw(self, step: int) -> Rollout:
        with isolated_rng(derived_seed(self.seed, f"completions of step {step}")), self.probe.evaluation(self.model):
            return sample_completions(
                self.model,
                self.tokenizer,
                self.e_prompts(step),
                num_completions=self.completions_per_prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.probe.temperature,
                batch_size=self.sample_batch_size,
            )
