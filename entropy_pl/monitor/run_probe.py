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

from entropy_pl.attribution import UpdateBatch, counterfactual_update
from entropy_pl.monitor.prompts import Prompt, fingerprint
from entropy_pl.monitor.sources import RunSources
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.generated import GeneratedLogProbs
from entropy_pl.policy.measured_adapter import MeasuredAdapter
from entropy_pl.policy.micro_batches import model_device
from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.policy.sample import check_prompts, default_rows, sample_completions
from entropy_pl.probe import (
    AttributionSettings,
    EntropyProbe,
    ProbeMemory,
    SamplerGate,
    StepMeasurement,
    peak_memory,
    probe_memory,
    take_dry_run,
    timed,
    what_happened,
)
from entropy_pl.records import SCHEMA, Json
from entropy_pl.reporting import AttributedTokens
from entropy_pl.reporting.attributing import measured_record
from entropy_pl.rollout import Rollout
from entropy_pl.updates.in_backward import Mark, may_move_in_backward
from entropy_pl.updates.left_out import LeftOut
from entropy_pl.updates.record import UpdateRecorder
from entropy_pl.updates.steps import Stepping, holders, parameters_of
from entropy_pl.updates.vector import UpdateVector

NOT_ALL = "expected all processes to take this step, got some that did not: their policies are no longer one"
WHOLE_TRAINING_STEP = (
    "the parameters moved before the optimizer's step, in the backward pass: the update is their change over the whole "
    "training step, which has no momentum, gradient and weight-decay parts here"
)
MOVED_UNSEEN = (
    "expected the parameters to move in the optimizer's step, but it moved nothing and they moved before it in this "
    "training step, as optimizers do that update in the backward pass, and nothing was kept to compare them with. From "
    "now on they are kept from the beginning of a training step, and the next one that is probed will be measured"
)
SAME_STEP = 1e-6  # relative to the norms: rounding of float32 is 1e-7, another gradient gives 1e-3 and more


@dataclass
class RunProbe:
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
        attribution: whether the change is attributed to tokens, and which other losses are measured.
        sources: what the run says of its U-batch and of rewards.
        prompts_in_u: how many of ``prompts`` the run trains on too, for the record; None where that is not known.
        adapter_name: which of the policy's adapters is measured; None takes what is active now.

    Raises:
        ValueError: if the numbers do not fit each other or the pool, a prompt does not fit the model's context, the
            policy has no derivative or precision of the kind asked for or fails in a dry run, or processes have other
            prompts than their peers.
    """

    model: nn.Module
    tokenizer: Any
    prompts: list[Prompt]
    probe: EntropyProbe
    num_sequences: int = 256
    completions_per_prompt: int = 1
    max_new_tokens: int = 256
    seed: int = 0
    resample_prompts: bool = False
    sample_batch_size: int | None = None
    peers: Peers = ALONE
    attribution: AttributionSettings = field(default_factory=AttributionSettings)
    sources: RunSources = field(default_factory=RunSources)
    prompts_in_u: int | None = None
    adapter_name: str | None = None
    adapter: MeasuredAdapter = field(init=False, repr=False)
    """What is on while the policy is measured, whatever the run's last forward pass used."""
    _gate: SamplerGate = field(default_factory=SamplerGate, init=False, repr=False)
    _prompt_tokens: int = field(default=0, init=False, repr=False)
    _optimizers: Sequence[Any] = field(default=(), init=False, repr=False)  # of the run, the one watched among them
    _told_of_adapters: bool = field(default=False, init=False, repr=False)
    _recorder: UpdateRecorder | None = field(default=None, init=False, repr=False)
    _failure: Exception | None = field(default=None, init=False, repr=False)
    _begun: float | None = field(default=None, init=False, repr=False)  # when a step was first watched
    _probing: float = field(default=0.0, init=False, repr=False)  # seconds of all probes together
    attributed: AttributedTokens | None = field(default=None, init=False, repr=False)
    """Of the step measured last, where it was attributed."""
    left_out: LeftOut | None = field(default=None, init=False, repr=False)
    """What the update of the step under way is not of, until its training step ends."""
    _in_backward: bool = field(default=False, init=False, repr=False)  # θ moves there, or may
    _from_beginning: bool = field(default=False, init=False, repr=False)  # θ is kept from before the passes
    _begun_step: int | None = field(default=None, init=False, repr=False)
    _mark: Mark | None = field(default=None, init=False, repr=False)  # of θ before the passes
    warnings: list[str] = field(default_factory=list, init=False)
    """Sentences about the run itself that a reader of any of its records must know; every record repeats them."""

    def __post_init__(self) -> None:
        # first: what follows is then the same for all
        self.peers.agree("the E prompts", fingerprint(prompt.text for prompt in self.prompts))
        check_numbers(self.num_sequences, self.completions_per_prompt)
        needed = self._prompts_needed
        if len(self.prompts) < needed:
            raise ValueError(
                f"expected at least {needed} E prompts (num_sequences={self.num_sequences}, completions_per_prompt="
                f"{self.completions_per_prompt}), got {len(self.prompts)}: give more prompts, lower num_sequences, or "
                "raise completions_per_prompt"
            )
        if len({prompt.ids for prompt in self.prompts}) < 2:
            raise ValueError(
                f"expected at least 2 different E prompts, got {len(self.prompts)} times the same: completions of one "
                "prompt are one cluster, which has no error bar. Give other prompts too"
            )
        self.adapter = MeasuredAdapter(self.model, self.adapter_name)
        self.probe.check(self.model)
        begun = [prompt.ids for prompt in self.prompts]
        self._prompt_tokens = check_prompts(self.model, self.tokenizer, begun, self.max_new_tokens)
        with self.adapter.active():
            self.warnings += take_dry_run(
                self.probe,
                self.model,
                self.tokenizer,
                begun,
                max_new_tokens=self.max_new_tokens,
                attribution=self.attribution.enabled and self.sources.update_batch is not None,
                peers=self.peers,
            )

    @property
    def armed(self) -> bool:
        """Whether a step is being watched."""
        return self._recorder is not None or self._failure is not None

    @property
    def passes(self) -> int:
        """Passes over E that a probe takes, sampling counted as one."""
        attribution = self.attribution.passes if self.sources.update_batch else 0
        return self.probe.passes(lr=1.0) + 1 + attribution

    def memory(self) -> ProbeMemory:
        """What a probe will need in this process, beside what the run holds."""
        share = -(-self._prompts_needed // self.peers.size) * self.completions_per_prompt
        return probe_memory(
            self.model,
            self.probe,
            rows=min(share, self.sample_batch_size or default_rows(model_device(self.model))),
            prompt_tokens=self._prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            attribution=self.attribution.enabled and self.sources.update_batch is not None,
            moments=bool(self.attribution.counterfactuals),
        )

    def begin(self, step: int, optimizers: Sequence[Stepping]) -> None:
        """Before the passes that a step is made of: mark θ, or keep it, where it moves in the backward pass.

        Args:
            step: the optimizer step's number, counted from 0; of an accumulated one the first call counts.
            optimizers: those whose step it will be.
        """
        if self._begun_step == step:
            return
        self._begun_step = step
        start = time.perf_counter()
        try:
            parameters = [p for one in optimizers for inner in holders(one) for p in parameters_of(inner)]
            self._in_backward = self._in_backward or may_move_in_backward(parameters)
            if not self._in_backward:
                owned = {id(parameter) for parameter in self.model.parameters()}
                self._mark = Mark(p for p in parameters if id(p) in owned)
                self.left_out = self._not_of(self._recorder_of(optimizers))
        except Exception as error:  # nothing here is worth a training run; arm() will say what it is
            self._mark = self.left_out = None
            warnings.warn(f"entropy probe: θ could not be marked before step {step}. {error}", stacklevel=2)
        self._probing += time.perf_counter() - start
        if self._in_backward:
            self.arm(optimizers)
            self._from_beginning = self._recorder is not None

    def arm(self, optimizers: Sequence[Stepping]) -> None:
        """Before the step: keep θ, if it is not kept already and has moved since the passes began.

        What goes wrong here is recorded after the step, as a failed probe.
        """
        if self.holds_moved:
            return
        left_out = self.left_out  # from before the passes, or the step of another optimizer
        self.disarm()
        start = time.perf_counter()
        if self._begun is None:
            self._begun = start
        try:
            self._optimizers = self._optimizers or optimizers
            self._recorder = self._recorder_of(optimizers)
            self._recorder.snapshot(moments=bool(self.attribution.counterfactuals))
            self.left_out = left_out or self._not_of(self._recorder)
        except Exception as error:
            self._recorder, self._failure = None, error
        self._probing += time.perf_counter() - start

    def note_adapters(self, optimizers: Sequence[Any]) -> None:
        """Say which adapter is measured, where the run trains others too: once, as a warning and in every record.

        Args:
            optimizers: of the run.
        """
        self._optimizers = optimizers
        others = [] if self._told_of_adapters else self.adapter.others_in(optimizers)
        if not others:
            return
        self._told_of_adapters = True
        measured, beside = (", ".join(map(repr, names)) for names in (self.adapter.names, others))
        chosen = "as asked for" if self.adapter_name else "as it was when the run began"
        sentence = (
            f"the run trains several adapters of the policy, {measured} and {beside}: what is measured is "
            f"the policy with {measured} on, {chosen}, and what each step does to that; adapter='...' measures another"
        )
        self.warnings.append(sentence)
        if self.peers.rank == 0 and self._begun is not None:  # those of the start are warned of together
            warnings.warn(sentence, stacklevel=2)

    def disarm(self) -> None:
        """Let go of θ; a step that was watched and never came is forgotten."""
        self._recorder = self._failure = self.left_out = None
        self._from_beginning = False

    def took_step(self, optimizer: Stepping) -> None:
        """One of the optimizers has just stepped."""
        if self._recorder is not None:
            try:
                self._recorder.took_step(optimizer)
            except Exception as error:
                self._recorder, self._failure = None, error

    def _recorder_of(self, optimizers: Sequence[Stepping]) -> UpdateRecorder:
        return UpdateRecorder(self.model, optimizers, self.adapter.watches())

    def _not_of(self, recorder: UpdateRecorder) -> LeftOut | None:
        left_out = LeftOut(self.model, recorder.names, self.adapter.watches())
        return left_out if left_out.parameters else None

    @property
    def holds_moved(self) -> bool:
        """Whether θ is kept from before the passes of this step, and they have moved it."""
        return self._from_beginning and self._recorder is not None and self._recorder.moved()

    def has_moved(self) -> bool:
        """Whether θ has moved since the passes of this step began; False where that is not known."""
        return self.holds_moved or (self._mark is not None and self._mark.moved())

    def skipped(self, step: int) -> Json:
        """The record of a step that was due and that the optimizer did not take, and disarm."""
        moved = self.has_moved()
        record = self._untaken(step)
        if record["status"] == "failed":
            return record
        if moved:
            return record | self._moved_unseen()
        return record | {
            "status": "skipped",
            "message": "the optimizer's step did not take place, or did not end: a gradient scaler skips one whose "
            "gradients are not finite",
        }

    def not_one_step(self, said: str, step: int) -> Json:
        """The record of a step that was due and that not all of the optimizers took once, and disarm.

        Args:
            said: who took how many.
            step: the step's number, counted from 0.
        """
        return self._untaken(step) | {
            "status": "failed",
            "message": f"expected each of the optimizers watched to step once in a training step, got {said}: their "
            "steps are not one step. Watch one of them by its number (optimizer=0), or those that step together",
        }

    def what_is_left_out(self, record: Json) -> Json:
        """What a record says of the trainable parameters that its update is not of, and disarm."""
        left_out, self.left_out = self.left_out, None
        if left_out is None or record["status"] != "ok":
            return {}
        share, sentence = left_out.said(record["lr"] * record["update_norm"])
        return {"update_left_out": share, "warnings": [*record["warnings"], *([sentence] if sentence else [])]}

    def _untaken(self, step: int) -> Json:
        self.disarm()
        self._mark = None
        try:
            if any(other is not None for other in self.peers.exchange(None)):
                raise ValueError(NOT_ALL)
        except Exception as error:
            return self._record(step, "failed") | _failure(error)
        return self._record(step, "skipped")

    def _moved_unseen(self) -> Json:
        """The parameters moved, but not in the optimizer's step; from now on θ is kept from before the passes."""
        self._in_backward = True
        warnings.warn(f"entropy probe: {MOVED_UNSEEN}", stacklevel=2)
        return {"status": "failed", "message": MOVED_UNSEEN}

    def measure(self, step: int, on_pass: Callable[[str], None] = lambda phase: None) -> Json:
        """After the step: read it off, measure it and disarm.

        Args:
            step: the optimizer step's number, counted from 0.
            on_pass: called with a phase's name after every pass over E.

        Returns:
            A record as JSON has it (see :class:`entropy_pl.records.Record`), of status ``ok``, ``no_movement`` or
            ``failed``.
        """
        self.note_adapters(self._optimizers)  # an adapter may show only by its step that it is trained
        record = self._record(step, "ok")
        self.attributed = None
        start = time.perf_counter()
        memory = None
        kept = 0 if self._recorder is None else self._recorder.bytes()  # in use before the block below begins
        kept += 0 if self.left_out is None else self.left_out.bytes()
        try:
            with peak_memory(model_device(self.model)) as memory:
                record |= self._measured(record, step, on_pass)
        except Exception as error:  # whatever goes wrong here must not end a training run
            record |= _failure(error)
            warnings.warn(f"entropy probe at step {step} failed, training goes on. {record['message']}", stacklevel=2)
        finally:
            left_out = self.left_out  # it may move until the training step ends
            self.disarm()
            self.left_out, self._mark = left_out, None
        record["sampler_gap"] = self._gate.gap  # of a refused probe too
        record["memory"] = None if memory is None else {"kind": memory.kind, "added_bytes": kept + memory.added}
        now = time.perf_counter()
        record.setdefault("seconds", {})["total"] = now - start
        self._probing += now - start
        if self._begun is not None:
            record["overhead"] = self._probing / max(now - self._begun - self._probing, 1e-9)
        return record

    def e_prompts(self, step: int) -> list[Prompt]:
        """The E prompts of a step: one seeded choice for the run, or one per step."""
        stream = random.Random(f"{self.seed}, step {step}" if self.resample_prompts else f"{self.seed}")
        return stream.sample(self.prompts, self._prompts_needed)

    def _record(self, step: int, status: str) -> Json:
        prompts = {
            "count": self._prompts_needed,
            "sha256": fingerprint(prompt.text for prompt in self.e_prompts(step)),
            "in_u": self.prompts_in_u,
        }
        return {
            "schema": SCHEMA,
            "kind": "probe",
            "step": step,
            "status": status,
            "message": None,
            "warnings": list(self.warnings),
            "sampler_gap": self._gate.gap,
            "e_prompts": prompts,
            "processes": self.peers.size,
        }

    def _measured(self, record: Json, step: int, on_pass: Callable[[str], None]) -> Json:
        with ExitStack() as measured:
            with self.peers.together():
                measured.enter_context(self.adapter.active())
                update, norm = self._read(record)
            return self._measured_along(update, norm, record, step, on_pass)

    def _measured_along(
        self, update: UpdateVector, norm: float, record: Json, step: int, on_pass: Callable[[str], None]
    ) -> Json:
        if norm == 0 and self.has_moved():
            return self._moved_unseen()
        if norm == 0:
            message = (
                "the step did not move the policy (a learning rate of zero, or no gradient): nothing to do where a "
                "warm-up begins at zero, else look at the schedule and at what is trained"
            )
            return {"status": "no_movement", "message": message}
        assert self._recorder is not None
        measurement = StepMeasurement(self.model, self.probe, self.attribution, self.peers)
        absent = measurement.absent
        batch = self.sources.batch_of_step(self.peers, absent) if self.attribution.asked else None
        with ExitStack() as theta_before:
            with self.peers.together():
                self._gate.refuse_again()
                theta_before.enter_context(self._recorder.at_theta_before())
                with timed(measurement.seconds, "sampling", self.model):
                    rollout = measurement.draw(self._gate, lambda generated: self._draw(step, generated))
                seed = derived_seed(self.seed, f"rewards of step {step}")
                rewards = self.sources.rewards_of(
                    self._own_prompts(step), rollout, self.tokenizer, seed, self.peers, absent
                )
                on_pass("sampling")
                self.peers.exchange(None)
            counterfactual = self._counterfactual(batch, step, absent)
            measured = measurement.measure(
                rollout, update, rewards=rewards, update_batch=batch, counterfactual=counterfactual, on_pass=on_pass
            )
            found, self.attributed = measured_record(measured, measurement, self.tokenizer, step=step, lr=update.lr)
        return found | {
            "seconds": measurement.seconds | found["seconds"],
            "mean_completion_length": float(measured.scores.base.mask.sum(1).double().mean()),
            "warnings": list(dict.fromkeys([*record["warnings"], *found["warnings"]])),
        }

    def _counterfactual(
        self, batch: UpdateBatch | None, step: int, absent: dict[str, str]
    ) -> Callable[[str], UpdateVector] | None:
        """What makes the update of another loss from the same U-batch and optimizer state; None where nothing can."""
        if not self.attribution.counterfactuals:
            return None
        if batch is None or self.peers.size > 1:
            why = "there is no U-batch to make them of" if batch is None else "they need a run of one process"
            absent["counterfactuals"] = why
            return None
        assert self._recorder is not None
        u_batch, step_with, dtype = batch, self._recorder.step_with, getattr(torch, self.probe.precision)

        def make(name: str) -> UpdateVector:
            seed = derived_seed(self.seed, f"counterfactual {name} of step {step}")
            with isolated_rng(seed), self.probe.evaluation(self.model):
                return counterfactual_update(self.model, u_batch, name, step_with, dtype=dtype)

        return make

    def _read(self, record: Json) -> tuple[UpdateVector, float]:
        """The step and its norm, if it is finite and all processes have taken the same one."""
        with self.peers.together():
            if self._failure is not None:
                raise self._failure
            if self._recorder is None:
                raise RuntimeError("no step is being watched: call arm() before the optimizer's step")
            apart = WHOLE_TRAINING_STEP if self.holds_moved else None
            # What a lazy one refers to stays as it is until the probe is over.
            update = self._recorder.read_lazily(no_split=apart)
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
        """Their texts, of every completion of this process's share."""
        return [p.text for p in self.peers.share(self.e_prompts(step)) for _ in range(self.completions_per_prompt)]

    def _draw(self, step: int, generated: GeneratedLogProbs) -> Rollout:
        """This process's share of the E-batch; ``generated`` keeps a few of its log-probs."""
        prompts = self.peers.share(self.e_prompts(step))
        if not prompts:
            return Rollout.empty(model_device(self.model))
        purpose = f"completions of step {step}" + (f", process {self.peers.rank}" if self.peers.rank else "")
        with isolated_rng(derived_seed(self.seed, purpose)):
            return sample_completions(
                self.model,
                self.tokenizer,
                [prompt.ids for prompt in prompts],
                num_completions=self.completions_per_prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=self.probe.sampling_temperature,
                batch_size=self.sample_batch_size,
                generated=generated,
            )


def _failure(error: Exception) -> Json:
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
