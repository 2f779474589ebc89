"""``fit``: LightningCLI over the GRPO module, the prompts and the probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.grpo import GRPOModule
from entropy_pl.version import __version__

DESCRIPTION = "Train a language model with GRPO and measure what its optimizer steps do to the policy's entropy."


class EntropyCLI(LightningCLI):
    """LightningCLI with a section ``probe`` of its own: ``--probe.every_n_steps 5``."""

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


def run_cli(args: Sequence[str] | None) -> None:
    """Parse the words and run what they say.

    Args:
        args: command-line words; None takes the process's own.
    """
    EntropyCLI(
        GRPOModule,
        PromptDataModule,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the module takes its own, over the trainable parameters
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "callbacks": [TQDMProgressBar()],  # the probe's own bar fits below this one
            "max_epochs": -1,  # max_steps decides; prompts come round as often as it takes
        },
        args=None if args is None else list(args),
    )
