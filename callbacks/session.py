"""One run's worth of probing, whatever trainer drives it: snapshot, read the step off, draw E at θ, measure."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.callbacks.causes import Causes, CausesOfStep, RunSources
from entropy_pl.callbacks.prompts import fingerprint
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.micro_batches import model_device
from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.policy.sample import check_prompts, default_rows, sample_completions
from entropy_pl.probe import (
    ATTRIBUTION_PASSES,
    EntropyProbe,
    ProbeMemory,
    peak_memory,
    probe_memory,
    take_dry_run,
    timed,
    what_happened,
)
from entropy_pl.reporting import AttributedTokens
from entropy_pl.reporting.records import SCHEMA, Record
from entropy_pl.rollout import Rollout
from entropy_pl.updates.record import UpdateRecorder
from entropy_pl.updates.vector import UpdateVector

NOT_ALL = "expected all processes to take this step, got some that did not: their policies are no longer one"
SAME_STEP = 1e-6  # relative to the norms: rounding of float32 is 1e-7, another gradient gives 1e-3 and more


@dataclass
class ProbeSession:
    """Probes single optimizer steps of a run and leaves no trace in it.

    The E-batch is drawn from the parameters of before the step, put back for the time of the probe. Random streams,
    modes and parameters are as they were when it is over. A probe that fails is recorded as failed, and training
    goes on. Of several processes each draws and scores a share of the E-batch, all have the same record, and if one
    fails, all record the failure.

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
        peers: the run's processes.
        causes: what of the step's causes is looked for.
        sources: what the run says of its U-batch and of rewards.
        prompts_in_u: how many of ``prompts`` the run trains on too, for the record; None where that is not known.

    Raises:
        ValueError: if the numbers do not fit each other or the pool, a prompt does not fit the model's context, the
            policy has no derivative or precision of the kind asked for or fails in a dry run, or processes have other
            prompts than their peers.
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
    peers: Peers = ALONE
    causes: Causes = field(default_factory=Causes)
    sources: RunSources = field(default_factory=RunSources)
    prompts_in_u: int | None = None
    _prompt_tokens: int = field(default=0, init=False, repr=False)
    _recorder: UpdateRecorder | None = field(default=None, init=False, repr=False)
    _failure: Exception | None = field(default=None, init=False, repr=False)
    _begun: float | None = field(default=None, init=False, repr=False)  # when a step was first watched
    _probing: float = field(default=0.0, init=False, repr=False)  # seconds of all probes together
    attributed: AttributedTokens | None = field(default=None, init=False, repr=False)
    """Of the step measured last, where it was attributed."""
    warnings: list[str] = field(default_factory=list, init=False)
    """Sentences about the run itself that a reader of any of its records must know; every record repeats them."""

    def __post_init__(self) -> None:
        self.peers.agree("the E prompts", fingerprint(self.prompts))  # first: what follows is then the same for all
        check_numbers(self.num_sequences, self.completions_per_prompt)
        needed = self._prompts_needed
        if len(self.prompts) < needed:
            raise ValueError(
                f"expected at least {needed} E prompts (num_sequences={self.num_sequences}, completions_per_prompt="
                f"{self.completions_per_prompt}), got {len(self.prompts)}: give more prompts, lower num_sequences, or "
                "raise completions_per_prompt"
            )
        if len(set(self.prompts)) < 2:
            raise ValueError(
                f"expected at least 2 different E prompts, got {len(self.prompts)} times the same: completions of one "
                "prompt are one cluster, which has no error bar. Give other prompts too"
            )
        self.probe.check(self.model)
        self._prompt_tokens = check_prompts(self.model, self.tokenizer, self.prompts, self.max_new_tokens)
        self.warnings += take_dry_run(
            self.probe,
            self.model,
            self.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            attribution=self.causes.attribution and self.sources.update_batch is not None,
            peers=self.peers,
        )

    @property
    def armed(self) -> bool:
        """Whether a step is being watched."""
        return self._recorder is not None or self._failure is not None

    @property
    def passes(self) -> int:
        """Passes over E that a probe takes, sampling counted as one."""
        attribution = ATTRIBUTION_PASSES if self.causes.attribution and self.sources.update_batch else 0
        return self.probe.passes(lr=1.0) + 1 + attribution + len(self.causes.counterfactuals)

    def memory(self) -> ProbeMemory:
        """What a probe will need in this process, beside what the run holds."""
        share = -(-self._prompts_needed // self.peers.size) * self.completions_per_prompt
        return probe_memory(
            self.model,
            self.probe,
            rows=min(share, self.sample_batch_size or default_rows(model_device(self.model))),
            prompt_tokens=self._prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            attribution=self.causes.attribution and self.sources.update_batch is not None,
            moments=bool(self.causes.counterfactuals),
        )

    def arm(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the step: keep θ. What goes wrong here is recorded after the step, as a failed probe."""
        self.disarm()
        start = time.perf_counter()
        if self._begun is None:
            self._begun = start
        try:
            self._recorder = UpdateRecorder(self.model, optimizer)
            self._recorder.snapshot(moments=bool(self.causes.counterfactuals))
        except Exception as error:
            self._recorder, self._failure = None, error
        self._probing += time.perf_counter() - start

    def disarm(self) -> None:
        """Let go of θ; a step that was watched and never came is forgotten."""
        self._recorder = self._failure = None

    def skipped(self, step: int) -> Record:
        """The record of a step that was due and did not happen, and disarm."""
        self.disarm()
        try:
            if any(other is not None for other in self.peers.exchange(None)):
                raise ValueError(NOT_ALL)
        except Exception as error:
            return self._record(step, "failed") | _failure(error)
        return self._record(step, "skipped") | {
            "message": "the optimizer's step did not take place, or did not end: a gradient scaler skips one whose "
            "gradients are not finite"
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
        self.attributed = None
        start = time.perf_counter()
        memory = None
        kept = 0 if self._recorder is None else self._recorder.bytes()  # in use before the block below begins
        try:
            with peak_memory(model_device(self.model)) as memory:
                record |= self._measured(record, step, on_pass)
        except Exception as error:  # whatever goes wrong here must not end a training run
            record |= _failure(error)
            warnings.warn(f"entropy probe at step {step} failed, training goes on. {record['message']}", stacklevel=2)
        finally:
            self.disarm()
        record["memory"] = None if memory is None else {"kind": memory.kind, "added_bytes": kept + memory.added}
        now = time.perf_counter()
        record.setdefault("seconds", {})["total"] = now - start
        self._probing += now - start
        if self._begun is not None:
            record["overhead"] = self._probing / max(now - self._begun - self._probing, 1e-9)
        return record

    def e_prompts(self, step: int) -> list[str]:
        """The E prompts of a step: one seeded choice for the run, or one per step."""
        stream = random.Random(f"{self.seed}, step {step}" if self.resample_prompts else f"{self.seed}")
        return stream.sample(self.prompts, self._prompts_needed)

    def _record(self, step: int, status: str) -> Record:
        prompts = {
            "count": self._prompts_needed,
            "sha256": fingerprint(self.e_prompts(step)),
            "in_u": self.prompts_in_u,
        }
        return {
            "schema": SCHEMA,
            "kind": "probe",
            "step": step,
            "status": status,
            "message": None,
            "warnings": list(self.warnings),
            "e_prompts": prompts,
            "processes": self.peers.size,
        }

    def _measured(self, record: Record, step: int, on_pass: Callable[[str], None]) -> Record:
        update, norm = self._read(record)
        if norm == 0:
            message = (
                "the step did not move the policy (a learning rate of zero, or no gradient): nothing to do where a "
                "warm-up begins at zero, else look at the schedule and at what is trained"
            )
            return {"status": "no_movement", "message": message}
        assert self._recorder is not None
        seconds: dict[str, float] = {}
        causes = CausesOfStep(
            self.model, self.tokenizer, self.probe, self.causes, self.sources, self.peers, self.seed, step
        )
        batch = causes.update_batch()
        with ExitStack() as theta_before:
            with self.peers.together():
                theta_before.enter_context(self._recorder.at_theta_before())
                with timed(seconds, "sampling", self.model):
                    rollout = self._draw(step)
                rewards = causes.rewards(self._own_prompts(step), rollout)
                on_pass("sampling")
                self.peers.exchange(None)
            counterfactuals = causes.counterfactuals(batch, self._recorder)
            scores = self.probe.collect(
                self.model,
                rollout,
                update,
                rewards=rewards,
                counterfactuals=counterfactuals,
                peers=self.peers,
                on_pass=on_pass,
            )
            causes.absent.update({f"counterfactuals/{name}": why for name, why in scores.failed.items()})
            found = self.probe.reduce(scores, update).to_dict()
            with timed(seconds, "attribution", self.model):
                explained, self.attributed = causes.attribute(rollout, update, batch, scores, on_pass)
        return (
            found
            | explained
            | {
                "seconds": seconds | found["seconds"],
                "mean_completion_length": float(scores.base.mask.sum(1).double().mean()),
                "absent": causes.absent,
                "warnings": record["warnings"] + found["warnings"],
            }
        )

    def _read(self, record: Record) -> tuple[UpdateVector, float]:
        """The step and its norm, if it is finite and all processes have taken the same one."""
        with self.peers.together():
            if self._failure is not None:
                raise self._failure
            if self._recorder is None:
                raise RuntimeError("no step is being watched: call arm() before the optimizer's step")
            update = self._recorder.read(keep=False)  # what it refers to stays as it is until the probe is over
            record["lr"] = update.lr
            norm = update.checked_norm()
            if self.peers.size == 1:
                return update, norm
            said = self.peers.exchange((_sketch(update.direction), _sketch(self._recorder.theta_before)))
        if None in said:
            raise ValueError(NOT_ALL)
        steps, policies = zip(*said, strict=True)
        for what, sketches in (("take the same step", steps), ("hold the same policy", policies)):
            if not _are_one(sketches):
                raise ValueError(
                    f"expected all {self.peers.size} processes to {what}, got (norm, projection) {list(sketches)}: "
                    "they train policies of their own, whose gradients are not reduced; probe each in a run of its own"
                )
        return update, norm

    @property
    def _prompts_needed(self) -> int:
        return self.num_sequences // self.completions_per_prompt

    def _own_prompts(self, step: int) -> list[str]:
        """Of every completion of this process's share."""
        return [p for p in self.peers.share(self.e_prompts(step)) for _ in range(self.completions_per_prompt)]

    def _draw(self, step: int) -> Rollout:
        """This process's share of the E-batch."""
        prompts = self.peers.share(self.e_prompts(step))
        if not prompts:
            return Rollout.empty(model_device(self.model))
        purpose = f"completions of step {step}" + (f", process {self.peers.rank}" if self.peers.rank else "")
        with isolated_rng(derived_seed(self.seed, purpose)), self.probe.evaluation(self.model):
            return sample_completions(
                self.model,
                self.tokenizer,
                prompts,
                num_completions=self.completions_per_prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.probe.temperature,
                batch_size=self.sample_batch_size,
            )


def _failure(error: Exception) -> Record:
    return {"status": "failed", "message": what_happened(error)}


def check_numbers(num_sequences: int, completions_per_prompt: int) -> None:
    """Refuse an E-batch that cannot be.

    Raises:
        ValueError: if completions do not go evenly into prompts, or the prompts are fewer than 2.
    """
    if completions_per_prompt < 1 or num_sequences % completions_per_prompt:
        raise ValueError(
            f"expected num_sequences as a multiple of completions_per_prompt, got {num_sequences} and "
            f"{completions_per_prompt}"
        )
    if num_sequences // completions_per_prompt < 2:
        raise ValueError(
            "expected num_sequences for at least 2 E prompts, since an error bar needs two, got "
            f"num_sequences={num_sequences} with completions_per_prompt={completions_per_prompt}"
        )


def _sketch(tensors: Mapping[str, Tensor]) -> tuple[float, float]:
    """Norm, and projection onto a fixed direction that no training would follow: what tells two vectors apart."""
    squares = projection = 0.0
    for tensor in tensors.values():
        flat = tensor.detach().flatten().double()
        squares += float(flat @ flat)
        projection += float(flat @ torch.arange(len(flat), device=flat.device, dtype=flat.dtype).cos())
    return math.sqrt(squares), projection


def _are_one(sketches: Sequence[tuple[float, float]]) -> bool:
    norm, projection = sketches[0]
    tolerance = SAME_STEP * norm
    return all(abs(n - norm) <= tolerance and abs(p - projection) <= tolerance for n, p in sketches)
