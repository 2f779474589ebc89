"""``fit``: LightningCLI over the GRPO module, the prompts and the probe."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.config import UsageError, explained
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.grpo import GRPOModule
from entropy_pl.version import __version__

DESCRIPTION = "Train a language model with GRPO and measure what its optimizer steps do to the policy's entropy."


class EntropyCLI(LightningCLI):
    """LightningCLI with a section ``probe`` of its own: ``--probe.every_n_steps 5``.

    Args:
        started: gets an element once training has begun.
        arguments: LightningCLI's.
    """

    def __init__(self, started: list[bool], **arguments: Any) -> None:
        self.started = started
        super().__init__(**arguments)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training alone: there is no validation loop to run."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Say what the program is for."""
        return super().init_parser(**{**kwargs, "description": DESCRIPTION, "version": __version__})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the probe's section."""
        parser.add_lightning_class_args(EntropyProbeCallback, "probe")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and answer an unknown key with the nearest one there is.

        Raises:
            ValueError: for words or a config file that cannot be understood.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ValueError(explained(str(error), self._known_keys())) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A bar of tqdm's, below which the probe's own fits, unless another was asked for or none."""
        given = self._get(self.config_init, "trainer.callbacks", default=None) or []
        callbacks = list(given) if isinstance(given, list) else [given]
        callbacks.append(LambdaCallback(on_train_start=lambda *_: self.started.append(True)))
        if self._get(self.config_init, "trainer.enable_progress_bar") is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(TQDMProgressBar())
        return super().instantiate_trainer(**kwargs, callbacks=callbacks)

    def _known_keys(self) -> list[str]:
        fit = self._subcommand_parsers["fit"]
        return [action.dest for action in fit._actions if action.dest not in ("help", "config", "print_config")]


def run_fit(args: Sequence[str] | None) -> None:
    """Parse the words and run what they say.

    Args:
        args: command-line words, `fit` first; None takes the process's own.

    Raises:
        UsageError: for what is wrong before training begins. Later errors come as they are, traceback and all.
    """
    started: list[bool] = []
    try:
        _run(args, started)
    except (ValueError, MisconfigurationException, OSError, ImportError) as error:
        if started:
            raise
        raise UsageError(str(error)) from error


def _run(args: Sequence[str] | None, started: list[bool]) -> None:
    EntropyCLI(
        started,
        model_class=GRPOModule,
        datamodule_class=PromptDataModule,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the module takes its own, over the trainable parameters
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_epochs": -1},  # max_steps decides; prompts come round as often as it takes
        parser_kwargs={
            "prog": "entropy-pl",
            "exit_on_error": False,
            "allow_abbrev": False,
            "fit": {"exit_on_error": False},
        },
        args=None if args is None else list(args),
    )
