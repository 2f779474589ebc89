"""The probe in a Lightning run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.figure import Figure
from torch import Tensor

from entropy_pl.attribution import UpdateBatch
from entropy_pl.monitor.discovery import NOT_TRAINING, find_optimizers, find_policy, find_tokenizer, refuse_sharded
from entropy_pl.monitor.loggers import RunLogger, TensorBoardRunLogger
from entropy_pl.monitor.prompts import find_prompts
from entropy_pl.monitor.sources import RunSources
from entropy_pl.monitor.step_monitor import Attachment, StepMonitor
from entropy_pl.peers import Peers
from entropy_pl.strategies import holds_whole_policy
from entropy_pl.updates.clipping import clip_factor
from entropy_pl.updates.steps import inner_optimizer


class EntropyProbeCallback(StepMonitor, Callback):
    """Measure what chosen optimizer steps do to the policy's entropy: a callback for Lightning's Trainer.

    The options are those of :class:`~entropy_pl.monitor.step_monitor.StepMonitor`.

    The policy, its tokenizer and its optimizer are found in any LightningModule, E prompts in a datamodule with an
    `e_prompts`; `temperature` and `max_new_tokens` are by default the module's own attributes of these names. Its
    `update_batch()`, called while a step is under way, gives the U-batch to attribute the change to
    (:class:`entropy_pl.attribution.UpdateBatch`), its `rewards_of(prompts, completions)` the rewards of E.

    Raises:
        MisconfigurationException: at construction for an option out of range; at the start of fit if no policy,
            tokenizer or prompts can be found, or the run is of a kind that cannot be probed.
    """

    refusal = MisconfigurationException
    _trainer: Trainer | None = None
    _unclipped: Tensor | None = None  # norm of the gradient of the step under way

    @property
    def state_key(self) -> str:
        """Tells probes of one Trainer apart in a checkpoint; all but one of them are off."""
        told_apart = {"every_n_steps": self.every_n_steps, "policy": self._policy, "optimizer": self._optimizer}
        return self._generate_state_key(**told_apart, seed=self._sampling["seed"])

    def state_dict(self) -> dict[str, Any]:
        """How many steps the watched optimizers have taken."""
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
        """A new run counts anew, the same Trainer's goes on; where nothing is trained there is nothing to probe."""
        if stage == "fit":
            if trainer is not self._trainer:
                self._step = None
            self._trainer = trainer
        elif self.every_n_steps and not self._was_open:
            # it may be validated before it is trained
            rank_zero_warn(f"expected a run that trains, got trainer.{TrainerFn(stage).value}(): {NOT_TRAINING}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the probe needs, and refuse now rather than in an hour."""
        if self.every_n_steps == 0:
            return
        self._attach(lambda peers: self._found_in(trainer, pl_module, peers))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a count from a checkpoint, take the Trainer's, which counts the steps of all optimizers together."""
        if self._step is None:
            self._step = trainer.global_step if len(trainer.optimizers) == 1 else 0
        self._note_update_prompts(_update_prompts(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Mark where a step to be probed begins."""
        self._begin_training_step()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note that a step begins, and, of one to be probed, the gradient's norm."""
        watched = [inner_optimizer(one) for one in self._watched]
        if inner_optimizer(optimizer) in watched:
            self._attempt(watched.index(inner_optimizer(optimizer)))
            due = pl_module.automatic_optimization and self._step is not None and self.is_due(self._step)
            self._unclipped = _gradient_norm(optimizer) if due else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """A step that has not ended by now was skipped; one whose probe was interrupted ends here."""
        # Under automatic optimization the optimizer is asked at the end of accumulation: nothing else is a step.
        self._between_steps(counts=not pl_module.automatic_optimization)
        self._stop_if_interrupted()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the probes as a table and a figure, and say where everything lies."""
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer and of θ."""
        self._close()

    # -------------------------------------------------------------------------------------------------------- details

    def _found_in(self, trainer: Trainer, pl_module: LightningModule, peers: Peers) -> Attachment:
        self._refuse_other_probes(trainer)
        if 0 in (trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches):
            raise ValueError(f"expected a run that trains, got trainer.fit() without a step to take: {NOT_TRAINING}")
        datamodule = getattr(trainer, "datamodule", None)
        policy = find_policy(pl_module, self._policy)
        refuse_sharded(policy, _sharding(trainer))
        owners = [owner for owner in (pl_module, datamodule) if owner is not None]
        tokenizer = find_tokenizer(self._tokenizer, owners)
        run_probe = self.run_probe_for(
            policy,
            tokenizer,
            find_prompts(self._prompts, getattr(datamodule, "e_prompts", None), tokenizer, self._prompt_column),
            getattr(pl_module, "temperature", None),
            getattr(pl_module, "max_new_tokens", None),
            peers,
            self._sources(trainer, pl_module),
            _sampling_options(pl_module),
        )
        optimizers = find_optimizers(trainer.optimizers, policy, self._optimizer, run_probe.adapter.watches())
        run_probe.note_adapters(trainer.optimizers)
        return Attachment(run_probe, optimizers, self.directory(trainer), lambda: _run_loggers(trainer.loggers))

    def _sources(self, trainer: Trainer, pl_module: LightningModule) -> RunSources:
        """What the module says of itself, where it does."""
        supply: Any = getattr(pl_module, "update_batch", None)
        rewards = getattr(pl_module, "rewards_of", None)
        if supply is None:
            return RunSources(None, rewards)

        def update_batch() -> UpdateBatch | None:
            batch = supply()
            if batch is not None and not isinstance(batch, UpdateBatch):
                raise TypeError(
                    f"expected {type(pl_module).__name__}.update_batch() to return an entropy_pl.attribution."
                    f"UpdateBatch or None, got {type(batch).__name__}"
                )
            loss = None if batch is None else batch.policy_gradient
            own = getattr(pl_module, "temperature", None)
            if batch is not None and loss is not None:
                own = loss.temperature or batch.rollout.temperature
            if own is not None and self._temperature not in (None, own):
                raise ValueError(
                    f"expected the probe at the loss's temperature, {own}, at which its log-probs are, got "
                    f"{self._temperature}: leave temperature out"
                )
            if batch is None or batch.gradient_scale is not None or self._unclipped is None:
                return batch
            if trainer.gradient_clip_val is None or trainer.gradient_clip_algorithm == "value":
                return replace(batch, gradient_scale=1.0)
            # from the norm that was noted: a step may have overwritten the gradients it was given
            scale = clip_factor(float(self._unclipped), float(trainer.gradient_clip_val))
            return replace(batch, gradient_scale=float(scale))

        return RunSources(update_batch, rewards)

    def _reward(self) -> float | None:
        assert self._trainer is not None
        reward = self._trainer.callback_metrics.get(self._reward_metric)
        return None if reward is None else float(reward)

    def _refuse_other_probes(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, EntropyProbeCallback) and other is not self and other.every_n_steps:
                raise MisconfigurationException(
                    "expected one EntropyProbeCallback in a run, got two, whose tags would be the same: keep one, or "
                    "turn the other off with every_n_steps=0"
                )


class LightningRunLogger(RunLogger):
    """A Lightning logger that is not TensorBoard's; pictures go to those with a ``log_image`` like W&B's."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag."""
        self._logger.log_metrics(values, step=step)

    def figure(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture, if the logger can."""
        if hasattr(self._logger, "log_image"):
            self._logger.log_image(key=tag, images=[draw()], step=step)


def _gradient_norm(optimizer: Any) -> Tensor:
    parameters = (p for group in inner_optimizer(optimizer).param_groups for p in group["params"])
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _run_loggers(loggers: Sequence[Logger]) -> list[RunLogger]:
    return [
        TensorBoardRunLogger(logger.experiment, logger.root_dir)
        if isinstance(logger, TensorBoardLogger)
        else LightningRunLogger(logger)
        for logger in loggers
    ]


def _sharding(trainer: Trainer) -> str | None:
    """The strategy, unless it is known to leave the policy whole in every process."""
    return None if holds_whole_policy(trainer.strategy) else type(trainer.strategy).__name__


def _sampling_options(module: LightningModule) -> list[Any]:
    """Where a module may keep how it samples."""
    kept = (getattr(module, name, None) for name in ("generation_kwargs", "generation_config", "hparams"))
    return [module, *(options for options in kept if options is not None)]


def _update_prompts(trainer: Trainer) -> Any:
    """What the run trains on: the datamodule's U prompts, or the dataset behind its one dataloader."""
    datamodule = getattr(trainer, "datamodule", None)
    known = getattr(datamodule, "u_prompts", None)
    return known if known is not None else getattr(trainer.train_dataloader, "dataset", None)
