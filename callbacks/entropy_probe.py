"""The probe in a Lightning run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure

from entropy_pl.callbacks.attach import NOT_TRAINING, find_optimizer, find_policy, find_tokenizer, refuse_sharded
from entropy_pl.callbacks.door import ProbeDoor
from entropy_pl.callbacks.prompts import find_prompts
from entropy_pl.callbacks.sinks import Sink, TensorBoardSink
from entropy_pl.updates.steps import inner_optimizer


class EntropyProbeCallback(ProbeDoor, Callback):
    """The probe as a callback of Lightning's Trainer; every option is :class:`~entropy_pl.callbacks.door.ProbeDoor`'s.

    The policy, its tokenizer and its optimizer are found in any LightningModule, E prompts in a datamodule with an
    `e_prompts`; `temperature` and `max_new_tokens` are by default the module's own attributes of these names.

    Raises:
        MisconfigurationException: at construction for an option out of range; at the start of fit if no policy,
            tokenizer or prompts can be found, or the run is of a kind that cannot be probed.
    """

    refusal = MisconfigurationException

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

    def directory(self, trainer: Trainer) -> Path:
        """Where records and figures go."""
        if self._output_directory is not None:
            return Path(self._output_directory)
        return Path(trainer.log_dir or trainer.default_root_dir) / "entropy_probe"

    # -------------------------------------------------------------------------------------------- Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new run counts anew; one that does not train is refused."""
        if stage == "fit":
            self._step = None
        elif self.every_n_steps and not self._was_open:
            raise MisconfigurationException(
                f"expected a run that trains, got trainer.{TrainerFn(stage).value}(): {NOT_TRAINING}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the probe needs, and refuse now rather than in an hour."""
        if self.every_n_steps == 0:
            return
        self._refuse_other_probes(trainer)
        datamodule = getattr(trainer, "datamodule", None)
        with self._refusing():
            policy = find_policy(pl_module, self._policy)
            refuse_sharded(policy, _sharding(trainer))
            owners = [owner for owner in (pl_module, datamodule) if owner is not None]
            tokenizer = find_tokenizer(self._tokenizer, owners)
            session = self.session_for(
                policy,
                tokenizer,
                find_prompts(self._prompts, getattr(datamodule, "e_prompts", None), tokenizer, self._prompt_column),
                getattr(pl_module, "temperature", 1.0),
                getattr(pl_module, "max_new_tokens", None),
            )
            optimizer = find_optimizer(trainer.optimizers, policy, self._optimizer)
            self._trainer = trainer
            self._open(session, optimizer, self.directory(trainer), _sinks(trainer.loggers))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a count from a checkpoint, take the Trainer's, which counts the steps of all optimizers together."""
        if self._step is None:
            self._step = trainer.global_step if len(trainer.optimizers) == 1 else 0
        self._note_update_prompts(_update_prompts(trainer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note that a step begins."""
        if self._watched is not None and inner_optimizer(optimizer) is inner_optimizer(self._watched):
            self._attempt()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """A step that has not ended by now was skipped."""
        self._close_skipped()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the probes as a table and a figure, and say where everything lies."""
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer and of θ."""
        self._close()

    # -------------------------------------------------------------------------------------------------------- details

    def _reward(self) -> float | None:
        reward = self._trainer.callback_metrics.get(self._reward_metric)
        return None if reward is None else float(reward)

    def _refuse_other_probes(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, EntropyProbeCallback) and other is not self and other.every_n_steps:
                raise MisconfigurationException(
                    "expected one EntropyProbeCallback in a run, got two, whose tags would be the same: keep one, or "
                    "turn the other off with every_n_steps=0"
                )


class LoggerSink:
    """A Lightning logger that is not TensorBoard's; pictures go to those with a ``log_image`` like W&B's."""

    tensorboard: str | None = None

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def prepare(self) -> None:
        """Nothing to lay out."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag."""
        self._logger.log_metrics(values, step=step)

    def figure(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture, if the logger can."""
        if hasattr(self._logger, "log_image"):
            self._logger.log_image(key=tag, images=[draw()], step=step)


def _sinks(loggers: Sequence[Logger]) -> list[Sink]:
    return [
        TensorBoardSink(logger.experiment, logger.root_dir)
        if isinstance(logger, TensorBoardLogger)
        else LoggerSink(logger)
        for logger in loggers
    ]


def _sharding(trainer: Trainer) -> str | None:
    """The strategy, unless it is known to leave the policy whole in every process."""
    strategy = trainer.strategy
    whole = isinstance(strategy, DDPStrategy | SingleDeviceStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    return None if whole else type(strategy).__name__


def _update_prompts(trainer: Trainer) -> Any:
    """What the run trains on: the datamodule's U prompts, or the dataset behind its one dataloader."""
    datamodule = getattr(trainer, "datamodule", None)
    known = getattr(datamodule, "u_prompts", None)
    return known if known is not None else getattr(trainer.train_dataloader, "dataset", None)
