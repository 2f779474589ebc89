"""What the adapters of all trainers have in common: the probe's options, the count of steps, and where records go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm import tqdm

from entropy_pl.estimators import Baseline
from entropy_pl.estimators.snis import Integrand, Normalize, Weighting
from entropy_pl.monitor.discovery import check_which, truncated_sampling
from entropy_pl.monitor.loggers import RunLogger, publish, summarize, without_ending_the_run
from entropy_pl.monitor.prompts import DEFAULT_COLUMN, count_common
from entropy_pl.monitor.rendering import Prompt, Rendering
from entropy_pl.monitor.run_probe import RunProbe, check_numbers
from entropy_pl.monitor.sources import RunSources
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.tangents import Method
from entropy_pl.policy.vocabulary import foreign_tokenizer
from entropy_pl.probe import AttributionSettings, EntropyProbe, Precision
from entropy_pl.progress import progress
from entropy_pl.records import Json, Record, RecordWriter, latest_per_step, plain, read_records
from entropy_pl.reporting import add_step_agreement, step_evidence
from entropy_pl.updates.together import StepsTogether

DEFAULT_MAX_NEW_TOKENS = 256
KEPT_BACK = "it is kept, and written with the next one as soon as there is room"
KEPT = 100  # records in memory: a run may be long, and all of them are in the file
# Of two records of one step: how the machine was, and what an earlier probe compared; not what was found.
NOT_COMPARED = ("seconds", "memory", "overhead", "sampler_gap")


@dataclass(frozen=True)
class Attachment:
    """What an adapter has found in its run.

    Args:
        run_probe: the probing of it.
        optimizers: to be watched; their steps, one after another, are one step.
        directory: for records and figures.
        loggers: makes the run's loggers; called in the first process alone.
    """

    run_probe: RunProbe
    optimizers: Sequence[Any]
    directory: Path
    loggers: Callable[[], Sequence[RunLogger]]


class StepMonitor:
    """Measures the entropy change of single optimizer steps, beside its first-order prediction.

    Probed are optimizer steps n with n % every_n_steps == 0, counting from 0. The run is not changed by a bit: the
    probe has its own random streams, works on the parameters of before the step, and puts everything back.

    Records go to ``records.jsonl`` in the output directory, the last hundred are at hand in ``records``. One that
    cannot be written is kept, and written before the next one. Ctrl-C ends a probe at once, and the run at the end of
    the step, in the state that the step left; a run of several processes at once, since they wait for each other.

    Args:
        prompts: E prompts: strings ready for the tokenizer, chats (lists of messages, which go through its chat
            template), a dataset with a column of either, or the path of a JSON-lines, CSV or Parquet file with one.
            None takes the run's own E split, where it has one. They become tokens as the run's do, where it can be
            asked; else strings get the tokenizer's special tokens, and chats those that the template writes.
        num_sequences: N, completions in the E-batch. The error bars shrink as 1/sqrt(N), the cost grows as N.
        completions_per_prompt: how many of them share a prompt; error bars are then clustered by prompt.
        every_n_steps: distance between probed steps; 0 turns the probe off.
        etas: absolute step sizes to measure at, besides the multiples.
        eta_multipliers: step sizes as multiples of that step's learning rate. The step really taken is always measured.
        policy: attribute path of the Hugging Face or PEFT model. None finds it where there is one.
        adapter: of a policy with several adapters, the name of the one that is measured. None takes what is active when
            the run begins.
        tokenizer: of the policy. None takes `tokenizer` or `processing_class` of the run.
        optimizer: which of the run's optimizers is watched, by its number. Several numbers, or `all` of those with the
            policy in them, are measured as the one step that they take together: each of them once, one after another.
            None takes the only one with the policy in it.
        max_new_tokens: longest completion. None takes the run's, else 256.
        temperature: E is drawn at it, with top_p = 1 and no top-k. None takes the run's, else 1.
        normalize: `per_token` or `per_sequence`.
        weighting: `prefix` (per-decision importance weights, less variance) or `sequence` (classical).
        integrand: `rao_blackwell` (entropy at every prefix) or `surprisal` (-log-prob).
        baseline: subtracted from the score term, in δH₁ and ΔH alike: `none`, `position`, `critic` (one more pass), or
            `gae` (least variance, biased by its critic's error).
        gae_lambda: λ of `gae`; 1 is the critic.
        clip_log_weight: bound on the absolute log weight. None leaves the estimate unbiased to O(1/N).
        confidence: of every interval.
        method: how derivatives are made: `auto`, `forward_mode` or `central_difference`.
        precision: `float32`, or `float64` for the whole forward pass of the probe.
        max_batch_tokens: padded tokens per micro-batch of the probe. None takes what the free memory and the device
            suggest.
        compile_statistics: make one kernel of softmax, log-prob and entropy by `torch.compile`: seconds at the first
            probe, less time and memory traffic at all.
        sample_batch_size: completions of the E-batch sampled at once. None takes up to 256.
        attribution: attribute the change to the step's momentum, weight decay and every token of the U-batch, where the
            run supplies its U-batch (GRPOModule and TRL's GRPOTrainer do; another module by a method `update_batch()`):
            about as many passes again.
        influence_matrix: measure the influence of each U-completion on each E-completion too, with error bars: a
            forward and a backward pass of every completion by itself.
        token_error_blocks: give every token an error bar over E, from the attribution by each of so many blocks of it
            (8, say: two passes over U each); 0 gives none.
        counterfactuals: other losses whose step from the same point is measured beside the one taken: `entropy_bonus`,
            `clip_higher`, `clip_cov`, `kl_cov`, `positive_only`, `negative_only`, `no_momentum`, or `unchanged` as a
            control. Each takes a backward pass over U and a pass over E; together a copy of the optimizer's moments.
        reward: from prompts and completions, lists of texts, to a reward each, for ΔJ and the exchange rate ΔH/ΔJ. None
            takes the run's own, where it has one.
        resample_prompts: draw other E prompts, seeded, at every probe.
        prompt_column: where a dataset, or a row, keeps its prompt.
        seed: of the E prompts and their completions.
        reward_metric: logged metric that stands beside each probe as its reward.
        output_directory: where records and figures go. None takes `entropy_probe` in the run's own folder.
        progress_bar: show one while the probe works; never without a terminal.
    """

    refusal: type[Exception] = ValueError
    """What a bad option or attachment raises."""

    def __init__(
        self,
        prompts: Any = None,
        num_sequences: int = 256,
        completions_per_prompt: int = 1,
        every_n_steps: int = 10,
        etas: Sequence[float] | None = None,
        eta_multipliers: Sequence[float] = (0.5, 1.0, 2.0),
        policy: str | None = None,
        adapter: str | None = None,
        tokenizer: Any = None,
        optimizer: int | list[int] | Literal["all"] | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        normalize: Normalize = "per_token",
        weighting: Weighting = "prefix",
        integrand: Integrand = "rao_blackwell",
        baseline: Baseline = "none",
        gae_lambda: float = 0.95,
        clip_log_weight: float | None = None,
        confidence: float = 0.95,
        method: Method = "auto",
        precision: Precision = "float32",
        max_batch_tokens: int | None = None,
        compile_statistics: bool = False,
        sample_batch_size: int | None = None,
        attribution: bool = True,
        influence_matrix: bool = False,
        token_error_blocks: int = 0,
        counterfactuals: Sequence[str] = (),
        reward: Any = None,
        resample_prompts: bool = False,
        prompt_column: str = DEFAULT_COLUMN,
        seed: int = 0,
        reward_metric: str = "train/reward",
        output_directory: str | None = None,
        progress_bar: bool = True,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.records: list[Json] = []
        self._prompts, self._prompt_column = prompts, prompt_column
        self._policy, self._tokenizer = policy, tokenizer
        self._optimizer = list(optimizer) if isinstance(optimizer, tuple) else optimizer
        self._sampling: dict[str, Any] = {
            "num_sequences": num_sequences,
            "completions_per_prompt": completions_per_prompt,
            "adapter_name": adapter,
            "seed": seed,
            "resample_prompts": resample_prompts,
            "sample_batch_size": sample_batch_size,
        }
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self._options: dict[str, Any] = {
            "etas": tuple(etas or ()),
            "eta_multipliers": tuple(eta_multipliers),
            "normalize": normalize,
            "weighting": weighting,
            "integrand": integrand,
            "baseline": baseline,
            "gae_lambda": gae_lambda,
            "clip_log_weight": clip_log_weight,
            "confidence": confidence,
            "method": method,
            "precision": precision,
            "max_batch_tokens": max_batch_tokens,
            "compile_statistics": compile_statistics,
        }
        with self._refusing():
            if every_n_steps < 0:
                raise ValueError(f"expected every_n_steps ≥ 0 (0 is off), got {every_n_steps}")
            if max_new_tokens is not None and max_new_tokens < 1:
                raise ValueError(f"expected max_new_tokens of at least 1, or None for the run's, got {max_new_tokens}")
            check_which(self._optimizer)
            if every_n_steps:
                check_numbers(num_sequences, completions_per_prompt)
            EntropyProbe(**self._options, temperature=1.0 if temperature is None else temperature)
            self._attribution = AttributionSettings(
                attribution, influence_matrix, token_error_blocks, list(counterfactuals)
            )
            if reward is not None and not callable(reward):
                raise ValueError(
                    f"expected reward as a function of prompts and completions, got {type(reward).__name__}"
                )
        self._reward_of = reward
        self._reward_metric = reward_metric
        self._output_directory = output_directory
        self._progress_bar = progress_bar
        self._run_probe: RunProbe | None = None
        self._watched: Sequence[Any] = ()  # the optimizers, and the handle by which their steps are seen
        self._handle: StepsTogether | None = None
        self._writer: RecordWriter | None = None  # of the one process that writes
        self._written: dict[int, Json] = {}  # step → record already on disk, not rewritten on resume
        self._unwritten: list[Json] = []
        self._history: list[Record] = []  # of every probe of the run what theories are compared by
        self._interruption: BaseException | None = None
        self._run_loggers: list[RunLogger] = []
        self._step: int | None = None  # of the watched optimizers, the next one, counted from 0
        self._attempted: set[int] = set()  # whose step has begun, of the step that has not ended
        self._unsettled: Json | None = None  # of a step measured, while its training step goes on
        self._has_counted = False  # a step, in this training step
        self._unstepped = False  # a training step without a step of the optimizer has moved the policy
        self._was_open = False

    def is_due(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 0, is probed; override for another schedule."""
        return self.every_n_steps > 0 and step % self.every_n_steps == 0

    def run_probe_for(
        self,
        policy: nn.Module,
        tokenizer: Any,
        prompts: Sequence[str | Prompt],
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        peers: Peers = ALONE,
        sources: RunSources | None = None,
        sampling: Sequence[Any] = (),
    ) -> RunProbe:
        """The probing of one run; ``temperature`` and ``max_new_tokens`` are the run's, used where none was given.

        So are the ``sources``' rewards. ``sampling`` may have options by which the run samples from a truncated
        distribution (:func:`entropy_pl.monitor.discovery.truncated_sampling`).

        Raises:
            ValueError: if the options do not fit the prompts, or the prompts the policy (Lightning's
                MisconfigurationException in a Lightning run).
        """
        temperatures = (self._temperature, temperature, 1.0)
        sources = RunSources() if sources is None else sources
        with self._refusing():
            probe = EntropyProbe(**self._options, temperature=next(t for t in temperatures if t is not None))
            run_probe = RunProbe(
                policy,
                tokenizer,
                Rendering(tokenizer).encoded(prompts),
                probe,
                max_new_tokens=self._max_new_tokens or max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
                peers=peers,
                attribution=self._attribution,
                sources=sources
                if self._reward_of is None
                else replace(sources, rewards=self._reward_of, rewards_take_ids=False),
                **self._sampling,
            )
            doubts = (foreign_tokenizer(policy, tokenizer), truncated_sampling(sampling, probe.sampling_temperature))
            run_probe.warnings.extend(doubt for doubt in doubts if doubt is not None)
            return run_probe

    @property
    def records_path(self) -> Path | None:
        """File of the run's records; None before the run, with the probe off, and in all processes but the first."""
        return None if self._writer is None else self._writer.path

    # --------------------------------------------------------------------------------------- for the adapters to call

    def _attach(self, find: Callable[[Peers], Attachment]) -> None:
        """A run begins: find what the probe needs in it and watch its steps, in all processes or in none."""
        self._close()
        peers = Peers.of_this_run()
        try:
            with self._refusing(), peers.together():
                self._open(find(peers))
                peers.exchange(None)
        except BaseException:
            self._close()
            peers.close()
            raise

    def _open(self, found: Attachment) -> None:
        """Watch the optimizer's steps, and make ready what the first process writes to."""
        run_probe = found.run_probe
        self.records, self._history, self._unwritten = [], [], []
        self._attempted, self._was_open, self._interruption = set(), True, None
        self._unsettled, self._unstepped = None, False
        self._run_probe, self._watched = run_probe, found.optimizers
        if run_probe.peers.rank == 0:
            self._writer = _writer_in(found.directory)
            earlier = _records_in(self._writer.path)
            self._history = [step_evidence(record) for record in earlier]
            self._written = {r["step"]: r for r in latest_per_step(earlier) if r["step"] >= (self._step or 0)}
            if earlier and not self._step:
                warnings.warn(
                    f"{self._writer.path} holds records of an earlier run, and this one begins anew: its records are "
                    "appended, and tables and figures show the later ones. To keep them apart give output_directory=",
                    stacklevel=2,
                )
            self._run_loggers = list(found.loggers())
            for logger in self._run_loggers:
                logger.prepare(run_probe.sources.rewards is not None, run_probe.attribution.counterfactuals)
            for sentence in run_probe.warnings:
                warnings.warn(sentence, stacklevel=2)
            with without_ending_the_run("say what a probe will take"):
                tqdm.write(self._announcement(run_probe))  # on a line of its own, whatever bars there are
        self._handle = StepsTogether(
            found.optimizers, self._before_step, run_probe.took_step, self._after_step, run_probe.disarm
        )

    def _note_update_prompts(self, update_prompts: Any, rendering: Rendering | None = None) -> None:
        """Count the E prompts that the run trains on, warn of them, and say so in every record."""
        run_probe = self._run_probe
        if run_probe is None:
            return
        run_probe.prompts_in_u = count_common(
            [prompt.text for prompt in run_probe.prompts],
            update_prompts,
            Rendering(run_probe.tokenizer) if rendering is None else rendering,
            self._prompt_column,
        )
        if run_probe.prompts_in_u and run_probe.peers.rank == 0:
            warnings.warn(
                f"{run_probe.prompts_in_u} of {len(run_probe.prompts)} E prompts are prompts that this run trains on: "
                "the entropy measured is that of prompts learnt, not of the task; give others as prompts",
                stacklevel=2,
            )

    def _begin_training_step(self) -> None:
        """Before the forward and backward passes that a step is made of, of which an accumulated one has several."""
        self._settle()
        self._has_counted = False
        if self._run_probe is not None and self._step is not None and self.is_due(self._step):
            self._run_probe.begin(self._step, self._watched)

    def _attempt(self, which: int = 0) -> None:
        """A step of one of the optimizers begins: a gradient scaler may skip it, and then its own hooks say nothing."""
        handle = self._handle
        if handle is None:
            return
        # Else a closure is called once more, or it is the turn of the next one.
        if not handle.under_way and which in self._attempted and not handle.has_stepped(which):
            self._close_open()
        self._attempted.add(which)

    def _between_steps(self, *, counts: bool = False) -> None:
        """No step is under way: one that has begun and not ended was skipped, or raised and was caught.

        Args:
            counts: whether a training step ends here: then it is a step even where no optimizer was asked to take one,
                if it moved the policy.
        """
        if self._handle is not None:
            self._handle.reset()
        self._close_open(counts=counts)
        self._settle()

    def _close_open(self, *, counts: bool = False) -> None:
        """End a step that has begun and not ended."""
        run_probe, handle = self._run_probe, self._handle
        if run_probe is None or handle is None:
            return
        if handle.is_open:
            self._take(partial(run_probe.not_one_step, handle.close()))
        elif self._attempted:
            self._take(self._unstepped_record)
        elif counts and not self._has_counted and (self._unstepped or run_probe.has_moved()):
            self._unstepped = True
            self._take(self._unstepped_record)

    def _unstepped_record(self, step: int) -> Json:
        """Of a step of which the optimizer says nothing: it was skipped, or taken in the backward pass."""
        assert self._run_probe is not None
        return self._measure(step) if self._run_probe.holds_moved else self._run_probe.skipped(step)

    def _finish(self) -> None:
        """The run is over: show the probes as a table and a figure, and say where everything lies."""
        self._close()
        if self._writer is not None and self.records:
            with without_ending_the_run("summarize the probes"):
                summarize(self._writer.path, self._run_loggers)
        self._stop_if_interrupted()

    def _stop_if_interrupted(self) -> None:
        """The step is done and counted: what interrupted its probe may end the run."""
        interruption, self._interruption = self._interruption, None
        if interruption is not None:
            self._close()  # not every trainer says that a run has ended so
            raise interruption

    def _close(self) -> None:
        """Let go of the optimizer and of θ, and write what could not be written before."""
        self._settle()
        if self._unwritten:
            with without_ending_the_run("write the last records", self._lost):
                self._write()
            self._unwritten = []
        if self._handle is not None:
            self._handle.remove()
        if self._run_probe is not None:
            self._run_probe.disarm()
            self._run_probe.peers.close()
        self._handle = self._run_probe = None
        self._watched = ()

    def _reward(self) -> float | None:
        """The reward that stands beside a probe, where the run keeps one."""
        return None

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if self.refusal is ValueError:
                raise
            raise self.refusal(str(error)) from None  # the same sentence; one traceback says it

    # -------------------------------------------------------------------------------------------------- around a step

    def _before_step(self) -> None:
        self._stop_if_interrupted()
        self._settle()
        if self._run_probe is not None and self._step is not None and self.is_due(self._step):
            self._run_probe.arm(self._watched)

    def _after_step(self, taken: bool) -> None:
        if self._run_probe is not None and self._step is not None:
            # a fused optimizer under a gradient scaler skips inside its own step
            self._take(self._measure if taken else self._run_probe.skipped)

    def _take(self, record_of: Callable[[int], Json]) -> None:
        """Count a step, and keep its record, where it is due."""
        run_probe, step = self._run_probe, self._step
        try:
            self._end_step(record_of)
        except Exception:
            raise
        except BaseException as interruption:  # the step is taken, and the trainer has yet to count it
            if (
                run_probe is None or run_probe.peers.size > 1
            ):  # they wait for this process in the probe, and it behind it
                raise
            self._interruption = interruption
            warnings.warn(
                f"{type(interruption).__name__} during the entropy probe of step {step}: the run stops at the end "
                "of the step, in the state that the step left; a run resumed from before it probes it again",
                stacklevel=2,
            )

    def _end_step(self, record_of: Callable[[int], Json]) -> None:
        if self._step is None:
            return
        self._settle()
        step, self._step, self._has_counted = self._step, self._step + 1, True
        self._attempted.clear()
        if self.is_due(step):
            record = record_of(step)
            if self._run_probe is not None and self._run_probe.left_out is not None:
                self._unsettled = record  # what the update leaves out may move until the training step ends
            else:
                self._keep(record)

    def _settle(self) -> None:
        """The training step is over: say of its record what the update left out, and keep it."""
        record, self._unsettled = self._unsettled, None
        if record is not None:
            if self._run_probe is not None:
                with without_ending_the_run("say what the update leaves out"):
                    record |= self._run_probe.what_is_left_out(record)
            self._keep(record)

    def _measure(self, step: int) -> Json:
        assert self._run_probe is not None
        shown = self._progress_bar and self._run_probe.peers.rank == 0
        # position 1 leaves the trainer's own bar alone
        with progress(f"entropy probe, step {step}", self._run_probe.passes, "pass", shown=shown, position=1) as bar:

            def advance(phase: str) -> None:
                with suppress(OSError, ValueError):  # a terminal that is gone
                    bar.set_postfix_str(phase, refresh=False)
                    bar.update()

            return self._run_probe.measure(step, advance)

    def _keep(self, record: Json) -> None:
        """Write the record at once, so that nothing measured is lost with the run; then show it."""
        record["reward"] = None
        with without_ending_the_run("read the run's reward"):
            record["reward"] = self._reward()
        with without_ending_the_run("compare theories over the run's steps"):
            add_step_agreement(record, self._history)
            self._history.append(step_evidence(record))
        tokens = None
        if self._run_probe is not None:  # taken, so that a step without any does not show those of another
            tokens, self._run_probe.attributed = self._run_probe.attributed, None
        self.records.append(record)
        del self.records[: -max(KEPT, len(self._unwritten) + 1)]
        if self._writer is None:
            return
        with without_ending_the_run(
            f"write the record of step {record['step']}", lambda: KEPT_BACK * bool(self._unwritten)
        ):
            if not _is_same(record, self._written.pop(record["step"], None)):  # a resumed run takes steps again
                self._written = {}  # whose later records in the file are, for readers, given up with this one
                self._unwritten.append(record)
            self._write()
        with without_ending_the_run(f"show the probe of step {record['step']}"):
            publish(Record.from_json(record), self._run_loggers, tokens, self._writer.path.parent)

    def _write(self) -> None:
        """Write the records that are not written yet, in their order."""
        assert self._writer is not None
        while self._unwritten:
            try:
                self._writer.write(self._unwritten[0])
            except OSError:  # there may be room again
                raise
            except Exception:
                del self._unwritten[0]  # it will never be written
                raise
            del self._unwritten[0]

    def _lost(self) -> str:
        steps = ", ".join(str(record["step"]) for record in self._unwritten)
        return f"the records of steps {steps} are not in the file, but in the callback's `records` while it lives"

    def _announcement(self, run_probe: RunProbe) -> str:
        shared = f" shared by {run_probe.peers.size} processes" if run_probe.peers.size > 1 else ""
        return (
            f"entropy probe: every {self.every_n_steps} optimizer steps, {run_probe.num_sequences} completions of up "
            f"to {run_probe.max_new_tokens} tokens{shared}, {run_probe.passes} passes over them, sampling included; "
            f"memory beside the run's: {run_probe.memory()}"
        )


def _writer_in(directory: Path) -> RecordWriter:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"expected a folder for the probe's records that can be written to, got {directory}: {error}"
        ) from error
    return RecordWriter(directory / "records.jsonl")


def _records_in(path: Path) -> list[Json]:
    """What an earlier part of the run has written of its probes."""
    return [r for r in (read_records(path) if path.is_file() else []) if isinstance(r.get("step"), int)]


def _is_same(record: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    def found(of: Mapping[str, Any]) -> Json:
        return {key: value for key, value in of.items() if key not in NOT_COMPARED}

    return other is not None and found(plain(record)) == found(other)
