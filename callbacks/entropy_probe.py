"""The probe in a Lightning run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from entropy_pl.callbacks.attach import find_optimizer, find_policy, find_prompts, find_tokenizer
from entropy_pl.callbacks.publish import prepare, publish, summarize
from entropy_pl.callbacks.session import ProbeSession
from entropy_pl.estimators import Baseline
from entropy_pl.estimators.snis import Integrand, Normalize, Weighting
from entropy_pl.policy.tangents import Method
from entropy_pl.probe import EntropyProbe, Precision
from entropy_pl.reporting import Record, RecordWriter

DEFAULT_MAX_NEW_TOKENS = 256


class EntropyProbeCallback(Callback):
    """Measures the entropy change of single optimizer steps, beside its first-order prediction.

    Probed are optimizer steps n with n % every_n_steps == 0, counting from 0. The run is not changed by a bit: the
    probe has its own random streams, works on the parameters of before the step, and puts everything back.

    Args:
        prompts: E prompts, ready for the tokenizer. None takes the datamodule's E split.
        num_sequences: N, completions in the E-batch. The error bars shrink as 1/sqrt(N), the cost grows as N.
        completions_per_prompt: how many of them share a prompt; error bars are then clustered by prompt.
        every_n_steps: distance between probed steps; 0 turns the probe off.
        etas: absolute step sizes to measure at, besides the multiples.
        eta_multipliers: step sizes as multiples of that step's learning rate. The step really taken is always measured.
        policy: attribute path of the Hugging Face or PEFT model in the module. None finds it where there is one.
        tokenizer: of the policy. None takes `tokenizer` or `processing_class` of the module or datamodule.
        max_new_tokens: longest completion. None takes the module's `max_new_tokens`, else 256.
        temperature: E is drawn at it, with top_p = 1 and no top-k. None takes the module's `temperature`, else 1.
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
        max_batch_tokens: padded tokens per micro-batch of the probe. None bounds the memory of the logits.
        sample_batch_size: completions of the E-batch sampled at once. None takes up to 256.
        resample_prompts: draw other E prompts, seeded, at every probe.
        seed: of the E prompts and their completions.
        reward_metric: logged metric that stands beside each probe as its reward.
        output_directory: where records and figures go. None takes `entropy_probe` in the logger's folder.
        progress_bar: show one while the probe works; never without a terminal.

    Raises:
        MisconfigurationException: at construction for an option out of range; at the start of fit if no policy,
            tokenizer or prompts can be found.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        num_sequences: int = 256,
        completions_per_prompt: int = 1,
        every_n_steps: int = 10,
        etas: Sequence[float] | None = None,
        eta_multipliers: Sequence[float] = (0.5, 1.0, 2.0),
        policy: str | None = None,
        tokenizer: Any = None,
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
        sample_batch_size: int | None = None,
        resample_prompts: bool = False,
        seed: int = 0,
        reward_metric: str = "train/reward",
        output_directory: str | None = None,
        progress_bar: bool = True,
    ) -> None:
        if every_n_steps < 0:
            raise MisconfigurationException(f"expected every_n_steps ≥ 0 (0 is off), got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.records: list[Record] = []
        self._prompts, self._policy, self._tokenizer = prompts, policy, tokenizer
        self._sampling: dict[str, Any] = {
            "num_sequences": num_sequences,
            "completions_per_prompt": completions_per_prompt,
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
        }
        try:
            EntropyProbe(**self._options, temperature=1.0 if temperature is None else temperature)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._reward_metric = reward_metric
        self._output_directory = output_directory
        self._progress_bar = progress_bar
        self._session: ProbeSession | None = None
        self._handles: list[RemovableHandle] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._writer: RecordWriter | None = None
        self._step: int | None = None  # of the watched optimizer, the next one, counted from 0
        self._attempted = False  # a step has begun and has not ended

    @property
    def state_key(self) -> str:
        """Tells two probes of one run apart in a checkpoint."""
        return self._generate_state_key(every_n_steps=self.every_n_steps, policy=self._policy, **self._sampling)

    def state_dict(self) -> dict[str, Any]:
        """How many steps the watched optimizer has taken."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint stopped."""
        self._step = state_dict.get("step")

    def is_due(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 0, is probed; override for another schedule."""
        return self.every_n_steps > 0 and step % self.every_n_steps == 0

    def directory(self, trainer: Trainer) -> Path:
        """Where records and figures go."""
        if self._output_directory is not None:
            return Path(self._output_directory)
        return Path(trainer.log_dir or trainer.default_root_dir) / "entropy_probe"

    def session_for(
        self, policy: nn.Module, tokenizer: Any, prompts: list[str], temperature: float, max_new_tokens: int
    ) -> ProbeSession:
        """The probing of one run; ``temperature`` and ``max_new_tokens`` are the module's, used where none was given.

        Raises:
            MisconfigurationException: if the options do not fit the prompts, or the prompts the policy.
        """
        temperature = temperature if self._temperature is None else self._temperature
        try:
            return ProbeSession(
                policy,
                tokenizer,
                prompts,
                EntropyProbe(**self._options, temperature=temperature),
                max_new_tokens=self._max_new_tokens or max_new_tokens,
                **self._sampling,
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    # -------------------------------------------------------------------------------------------- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new run: nothing recorded, nothing counted."""
        self.records, self._step, self._attempted = [], None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the probe needs, and refuse now rather than in an hour."""
        if self.every_n_steps == 0:
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"expected one process, got {trainer.world_size}: the probe does not share its E-batch out yet; "
                "train with devices=1, or turn it off with every_n_steps=0"
            )
        policy = find_policy(pl_module, self._policy)
        self._session = self.session_for(
            policy,
            find_tokenizer(trainer, pl_module, self._tokenizer),
            find_prompts(trainer, self._prompts),
            getattr(pl_module, "temperature", 1.0),
            getattr(pl_module, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
        )
        self._writer = self._open_records(trainer)
        self._optimizer = find_optimizer(trainer, policy)
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            # the one place that sees the clipped gradients, the new θ and the learning rate that was used
            self._optimizer.register_step_post_hook(lambda *_: self._after_step(trainer)),
        ]
        prepare(trainer.loggers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a count from a checkpoint, take the Trainer's, which counts the steps of all optimizers together."""
        if self._step is None:
            self._step = trainer.global_step if len(trainer.optimizers) == 1 else 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note that a step begins: a gradient scaler may skip it, and then neither of the step's own hooks comes."""
        if optimizer is self._optimizer:
            self._close_skipped(trainer)
            self._attempted = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """A step that has not ended by now was skipped."""
        self._close_skipped(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the probes as a table and a figure, and say where everything lies."""
        self._release()
        if self._writer is not None and self.records:
            with _whatever_happens("summarize the probes"):
                summarize(self._writer.path, trainer.loggers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer and of θ."""
        self._release()

    # ---------------------------------------------------------------------------------------------- around a step

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._session is not None and self._step is not None and self.is_due(self._step):
            self._session.arm(optimizer)

    def _after_step(self, trainer: Trainer) -> None:
        if self._session is None or self._step is None:
            return
        step, self._step, self._attempted = self._step, self._step + 1, False
        if self._session.armed:
            self._keep(trainer, self._measure(step))

    def _close_skipped(self, trainer: Trainer) -> None:
        if not self._attempted or self._session is None or self._step is None:
            return
        step, self._step, self._attempted = self._step, self._step + 1, False
        if self.is_due(step):
            self._keep(trainer, self._session.skipped(step))
        self._session.disarm()

    def _measure(self, step: int) -> Record:
        assert self._session is not None
        # disable=None: quiet without a terminal. Position 1 leaves the Trainer's own bar alone.
        with tqdm(
            desc=f"entropy probe, step {step}",
            total=self._session.passes,
            unit="pass",
            leave=False,
            position=1,
            disable=None if self._progress_bar else True,
        ) as bar:

            def advance(phase: str) -> None:
                bar.set_postfix_str(phase, refresh=False)
                bar.update()

            return self._session.measure(step, advance)

    def _keep(self, trainer: Trainer, record: Record) -> None:
        """Write the record at once, so that nothing measured is lost with the run; then show it."""
        assert self._writer is not None
        reward = trainer.callback_metrics.get(self._reward_metric)
        record["reward"] = None if reward is None else float(reward)
        self.records.append(record)
        with _whatever_happens(f"write the record of step {record['step']}"):
            self._writer.write(record)
        with _whatever_happens(f"log the probe of step {record['step']}"):
            publish(record, trainer.loggers)

    def _open_records(self, trainer: Trainer) -> RecordWriter:
        directory = self.directory(trainer)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, EntropyProbeCallback) and other is not self and other.every_n_steps:
                raise MisconfigurationException(
                    "expected one EntropyProbeCallback in a run, got two, whose tags would be the same: keep one, or "
                    "turn the other off with every_n_steps=0"
                )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(
                f"expected a folder for the probe's records that can be written to, got {directory}: {error}"
            ) from error
        return RecordWriter(directory / "records.jsonl")

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None
        if self._session is not None:
            self._session.disarm()
        self._session = None


@contextmanager
def _whatever_happens(what: str) -> Iterator[None]:
    """A full disk or a logger that is down must not end a training run."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"could not {what}, training goes on. {type(error).__name__}: {error}", stacklevel=3)
