"""The probe in a run of Hugging Face's Trainer or TRL's GRPOTrainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from entropy_pl.attribution import UpdateBatch
from entropy_pl.monitor.discovery import NOT_TRAINING, find_optimizers, find_policy, find_tokenizer, refuse_sharded
from entropy_pl.monitor.loggers import RunLogger, TensorBoardRunLogger
from entropy_pl.monitor.prompts import PromptRows, given_or_kept
from entropy_pl.monitor.rendering import Rendering
from entropy_pl.monitor.sources import RunSources
from entropy_pl.monitor.step_monitor import Attachment, StepMonitor
from entropy_pl.monitor.trl_batch import SCORING, StepCapture
from entropy_pl.monitor.trl_prompts import TrainerPrompts
from entropy_pl.monitor.trl_rewards import TrainerRewards
from entropy_pl.peers import Peers

__all__ = ["EntropyProbeTrainerCallback"]

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
WITH_A_CLOCK = ("DVCLiveCallback",)


class EntropyProbeTrainerCallback(StepMonitor, TrainerCallback):
    """Measures the entropy change of single optimizer steps of a Hugging Face Trainer, TRL's GRPOTrainer above all.

    Everything else is :class:`~entropy_pl.monitor.step_monitor.StepMonitor`'s: the same probe, records and TensorBoard
    tags as in a Lightning run. `temperature` and `max_new_tokens` are by default those of the GRPOConfig, E prompts
    those of the trainer's evaluation dataset.

    With its trainer, a GRPOTrainer, the change is attributed as in a Lightning run: to every token of the U-batch, by
    what the loss's own backward pass hands to its log-probs, whatever the loss; and to the price of reward, by the
    trainer's own reward functions where they are plain Python, called with the rows that the E prompts came from.
    Where a loss is one of this package's, so may `counterfactuals` be. What cannot be had is in the record's `absent`.
    For the time of training the trainer's `compute_loss` and `_get_per_token_logps_and_entropies` and its accelerator's
    `clip_grad_norm_` are wrapped; what they compute stays as it is.

    Args:
        prompts: E prompts: strings, chats, or a dataset with a column of either.
        trainer: the Trainer that this callback is added to. With it the probe's curves go to all that its `report_to`
            names, each probe has its own step's reward beside it, and causes are looked for; without it, to TensorBoard
            alone, in a folder of their own, with the reward that was logged last, and without causes.
        options: as for :class:`~entropy_pl.monitor.step_monitor.StepMonitor`.

    Raises:
        ValueError: at construction for an option out of range; when training begins if no policy, tokenizer or prompts
            can be found, or the run is of a kind that cannot be probed.

    Example:
        trainer = GRPOTrainer(model, reward_funcs, args=args, train_dataset=train, peft_config=LoraConfig())
        trainer.add_callback(EntropyProbeTrainerCallback(evaluation_prompts, trainer=trainer, every_n_steps=10))
        trainer.train()
    """

    def __init__(self, prompts: Any = None, *, trainer: Trainer | None = None, **options: Any) -> None:
        super().__init__(prompts, **options)
        self._trainer = trainer
        self._state: TrainerState | None = None
        self._rewards_before = 0
        self._last_reward: float | None = None
        self._has_warned = False
        self._writer_of_our_own: SummaryWriter | None = None
        self._capture: StepCapture | None = None
        self._rendering: Rendering | None = None

    def directory(self, args: TrainingArguments) -> Path:
        """Where records and figures go."""
        return Path(self._output_directory or Path(args.output_dir or ".") / "entropy_probe")

    # --------------------------------------------------------------------------------------------- the Trainer's events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Find what the probe needs, and refuse now rather than in an hour."""
        self._state, self._step = state, state.global_step
        if self.every_n_steps == 0:
            return

        def find(peers: Peers) -> Attachment:
            assert model is not None
            refuse_sharded(model, _sharding(args))
            policy = find_policy(model, self._policy)
            if state.max_steps == 0:
                raise ValueError(
                    f"expected a run that trains, got trainer.train() without a step to take: {NOT_TRAINING}"
                )
            tokenizer = find_tokenizer(processing_class if self._tokenizer is None else self._tokenizer, [])
            trainer, column = self._trainer, self._prompt_column
            given = given_or_kept(self._prompts, getattr(trainer, "eval_dataset", None))
            rendering = TrainerPrompts(trainer, args, processing_class, tokenizer)
            prompts = rendering.prompts(given, column)
            self._rendering = rendering.rendering
            run_probe = self.run_probe_for(
                policy,
                tokenizer,
                prompts,
                getattr(args, "temperature", None),
                getattr(args, "max_completion_length", None),
                peers,
                self._sources(tokenizer, PromptRows(given, [prompt.text for prompt in prompts], column)),
                [getattr(args, "generation_kwargs", None) or {}, args],
            )
            run_probe.warnings.extend(rendering.warnings)
            watched = find_optimizers([optimizer], policy, self._optimizer, run_probe.adapter.watches())
            run_probe.note_adapters([optimizer])
            return Attachment(
                run_probe, watched, self.directory(args), lambda: self._find_run_loggers(args, state, control)
            )

        self._attach(find)
        self._note_update_prompts(getattr(train_dataloader, "dataset", None), self._rendering)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note which of the rewards that the trainer keeps are of steps before; keep what a step to be probed is of."""
        self._rewards_before = len(self._rewards())
        if self._capture is not None:
            self._capture.begin(self._step is not None and self.is_due(self._step))
        self._begin_training_step()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Note that a step begins."""
        self._attempt()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """A step that has not ended by now was skipped."""
        self._between_steps()
        if self._capture is not None:
            self._capture.begin(False)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step whose probe was interrupted ends here."""
        self._stop_if_interrupted()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Show the probes as a table and a figure, and say where everything lies."""
        self._finish()
        if self._writer_of_our_own is not None:
            self._writer_of_our_own.close()
            self._writer_of_our_own = None

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Where nothing is trained there is nothing to probe; but it may be evaluated before it is trained."""
        if self.every_n_steps and not self._was_open and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"expected a run that trains, got an evaluation: {NOT_TRAINING}", stacklevel=2)

    # -------------------------------------------------------------------------------------------------------- details

    def _close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        super()._close()

    def _sources(self, tokenizer: Any, rows: PromptRows) -> RunSources:
        """What the trainer says of itself, where it is known and of a kind that does."""
        trainer = self._trainer
        if self._attribution.asked and trainer is not None and hasattr(trainer, SCORING):
            self._capture = StepCapture(trainer)
        rewards = TrainerRewards(trainer, tokenizer, rows) if getattr(trainer, "reward_funcs", None) else None
        return RunSources(self._update_batch, rewards, rewards_take_ids=True)

    def _update_batch(self) -> UpdateBatch:
        trainer, run_probe = self._trainer, self._run_probe
        if trainer is None:
            raise ValueError("expected the trainer, got none: EntropyProbeTrainerCallback(..., trainer=trainer)")
        if self._capture is None or run_probe is None:
            raise ValueError(f"expected a trainer with {SCORING}, as TRL's GRPOTrainer, got {type(trainer).__name__}")
        of_the_probe = run_probe.probe.sampling_temperature
        of_the_run = getattr(trainer, "temperature", of_the_probe)
        if of_the_probe != of_the_run:
            raise ValueError(
                f"expected the probe at the run's temperature, {of_the_run}, whose log-probs its loss is made of, got "
                f"temperature={of_the_probe}"
            )
        return self._capture.update_batch()

    def _rewards(self) -> list[float]:
        """Of every generation since the last log, where the trainer is known and keeps them, as TRL's does."""
        kept = getattr(self._trainer, "_metrics", None)
        of_training = kept.get("train") if isinstance(kept, Mapping) else None
        return list(of_training.get(self._reward_key) or ()) if isinstance(of_training, Mapping) else []

    def _reward(self) -> float | None:
        """This step's, or that of the last step which generated anything; else the one that was logged last."""
        new = self._rewards()[self._rewards_before :]
        if new:
            self._last_reward = sum(new) / len(new)
        if self._last_reward is not None:
            return self._last_reward
        logged = () if self._state is None else reversed(self._state.log_history)
        return next((float(entry[self._reward_key]) for entry in logged if self._reward_key in entry), None)

    @property
    def _reward_key(self) -> str:
        return self._reward_metric.removeprefix("train/")

    def _find_run_loggers(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> list[RunLogger]:
        if self._trainer is None:
            return self._run_loggers_without_trainer(args)
        loggers: list[RunLogger] = []
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                if callback.tb_writer is not None:
                    loggers.append(TensorBoardRunLogger(callback.tb_writer, callback.tb_writer.log_dir))
            elif type(callback).__name__ in WITH_A_CLOCK:
                warnings.warn(
                    f"the probe's curves do not go to {type(callback).__name__}: it counts steps by what it is given "
                    "to log, and would count the run's wrong",
                    stacklevel=2,
                )
            elif type(callback) in INTEGRATION_TO_CALLBACK.values():
                loggers.append(ReporterRunLogger(callback, args, state, control))
        return loggers

    def _run_loggers_without_trainer(self, args: TrainingArguments) -> list[RunLogger]:
        others = [name for name in args.report_to or () if name not in ("tensorboard", "none")]
        if others:
            warnings.warn(
                f"the probe's curves do not reach {', '.join(others)}: it was not told its trainer. Add it as "
                "trainer.add_callback(EntropyProbeTrainerCallback(..., trainer=trainer))",
                stacklevel=2,
            )
        if "tensorboard" not in (args.report_to or ()):
            return []
        folder = self.directory(args) / "tensorboard"
        self._writer_of_our_own = SummaryWriter(log_dir=str(folder))
        return [TensorBoardRunLogger(self._writer_of_our_own, str(folder))]


class ReporterRunLogger(RunLogger):
    """One of the Trainer's reporting callbacks, given the probe's numbers as it is given the Trainer's own."""

    def __init__(
        self, callback: TrainerCallback, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        self._callback, self._event = callback, (args, state, control)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers; the integration puts them on its own step axis, which counts as the Trainer does."""
        self._callback.on_log(*self._event, logs=dict(values), model=None)


def _sharding(args: TrainingArguments) -> str | None:
    """What arguments and launcher say of parameters that no process holds whole."""
    named = {"deepspeed": "DeepSpeed", "fsdp": "FSDP"}
    chosen = next((shown for name, shown in named.items() if getattr(args, name, None)), None)
    if chosen is None and AcceleratorState._shared_state:  # by `accelerate config`, the arguments know nothing of it
        kind = AcceleratorState().distributed_type
        chosen = str(kind.value) if kind in SHARDING else None
    return chosen
