"""``fit``: LightningCLI over the GRPO module, the prompts and the probe."""

from __future__ import annotations

import errno
import re
import shlex
import signal
import sys
import threading
import traceback
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, get_args

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console

from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.config import UsageError, load_file
from entropy_pl.config_messages import explained
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.failures import RunError, RunState, RunStopError, named_files
from entropy_pl.grpo import GRPOModule
from entropy_pl.policy.stored import read_checkpoint
from entropy_pl.progress import is_watched
from entropy_pl.version import __version__

DESCRIPTION = "Train a language model with GRPO and measure what its optimizer steps do to the policy's entropy."
CONFIG = "config.yaml"  # as LightningCLI names what it saves
SECTIONS: dict[str, type] = {
    "model": GRPOModule,
    "data": PromptDataModule,
    "probe": EntropyProbeCallback,
    "trainer": Trainer,
}
LESS_MEMORY = (
    "model.max_batch_tokens (of training's passes), model.sample_batch_size (of sampling), data.batch_size (of "
    "everything)"
)
NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
NO_CHECKPOINT = (
    "from the start: no checkpoint was saved. With --trainer.callbacks+=ModelCheckpoint "
    "--trainer.callbacks.every_n_train_steps=20 one is, every 20 steps"
)


class RunWatch(Callback):
    """Knows where the run is, whatever becomes of it."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.folder: Path | None = None
        self.begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the folder while all processes are there to answer."""
        self.trainer, self.folder = trainer, Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What goes wrong from now on is no longer a matter of words and settings."""
        self.begun = True

    def state(self) -> RunState:
        """What to say of the run if it ends now."""
        if self.trainer is None:
            return RunState("preparing the run", less_memory=LESS_MEMORY)
        config, checkpoint = self.file(CONFIG), next(iter(self.checkpoints()), None)
        resume = ["entropy-pl", "fit", "--config", str(config), "--ckpt_path", str(checkpoint)]
        return RunState(
            f"training at optimizer step {self.trainer.global_step}" if self.begun else "preparing the training",
            self.folder,
            ({"records": records} if (records := self.records()) else {}) | self.files(),
            resume=shlex.join(resume) if config and checkpoint else None,
            without=NO_CHECKPOINT if self.begun and not checkpoint else None,
            less_memory=LESS_MEMORY,
        )

    def files(self) -> dict[str, object]:
        """What the run has written, but for what its loggers and its probe tell themselves."""
        found: dict[str, object] = {"config": self.file(CONFIG)}
        checkpoints = self.checkpoints()
        if checkpoints:
            found["saved"] = f"{checkpoints[0]}" + (f" and {len(checkpoints) - 1} more" if len(checkpoints) > 1 else "")
        return {kind: path for kind, path in found.items() if path}

    def file(self, name: str) -> Path | None:
        """A file of the run's folder, if it is there."""
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.is_file() else None

    def records(self) -> Path | None:
        """The probe's, if there are any."""
        assert self.trainer is not None
        callbacks: Sequence[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        probes = [callback.records_path for callback in callbacks if isinstance(callback, EntropyProbeCallback)]
        return next((path for path in probes if path is not None and path.is_file()), None)

    def checkpoints(self) -> list[Path]:
        """All that are there, the newest first."""
        assert self.trainer is not None
        callbacks = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]
        folders = {Path(folder) for callback in callbacks if (folder := getattr(callback, "dirpath", None))}
        files = [file for folder in folders for file in folder.glob("*.ckpt")]
        return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


class EntropyCLI(LightningCLI):
    """LightningCLI with a section ``probe`` of its own: ``--probe.every_n_steps 5``.

    Args:
        watch: is told where the run is.
        arguments: LightningCLI's.
    """

    def __init__(self, watch: RunWatch, **arguments: Any) -> None:
        self.watch = watch
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
            ValueError: for words or a config file that cannot be understood, or a checkpoint to resume from that
                cannot be read.
        """
        files = _config_files(sys.argv[1:] if args is None else args)
        for file in files:
            load_file(file)  # jsonargparse would not say which file is not YAML
        try:
            super().parse_arguments(parser, args)
        # beside jsonargparse's own: for keys that are no text, text that no path can be, numbers that no float can be
        except (ArgumentError, KeyError, TypeError, ValueError, OverflowError) as error:
            keys = self._known_keys()
            said = explained(str(error), keys)
            where = "" if any(key in said for key in keys) or not files else f" (config: {', '.join(files)})"
            raise ValueError(said + where) from error
        self._refuse_null()
        checkpoint = Path(self.config.get("fit", {}).get("ckpt_path") or "")  # or Lightning's "last", say
        if checkpoint.is_file():
            read_checkpoint(checkpoint)  # a damaged one is torch's internal error otherwise
        elif checkpoint.suffix == ".ckpt" and not (  # some strategies save a folder
            checkpoint.exists() or "://" in str(self.config["fit"]["ckpt_path"])
        ):
            raise FileNotFoundError(
                f"expected a checkpoint at {checkpoint}, and there is no such file: check --ckpt_path"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A bar of tqdm's, below which the probe's own fits, where somebody sees it; or the one asked for, or none."""
        given = self._get(self.config_init, "trainer.callbacks", default=None) or []
        callbacks = list(given) if isinstance(given, list) else [given]
        callbacks.append(self.watch)
        wanted = self._get(self.config_init, "trainer.enable_progress_bar")
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            wanted = is_watched(sys.stdout) if wanted is None else wanted
            callbacks += [TQDMProgressBar()] if wanted else []
            kwargs["enable_progress_bar"] = wanted
        return super().instantiate_trainer(**kwargs, callbacks=callbacks)

    def _refuse_null(self) -> None:
        """Jsonargparse lets null through wherever a section or a value is expected, for the class to stumble over."""
        for name, made in SECTIONS.items():
            section = self.config.get("fit", {}).get(name)
            if not isinstance(section, Mapping | Namespace):
                raise ValueError(f"{name}: expected a section with keys of its own, got {section!r}")
            for key, argument in signature(made, eval_str=True).parameters.items():
                given_null = section.get(key, ...) is None and argument.default is not None
                if given_null and type(None) not in get_args(argument.annotation):
                    expected = getattr(argument.annotation, "__name__", argument.annotation)
                    raise ValueError(f"{name}.{key}: expected {expected}, got null: give one or leave it out")

    def _known_keys(self) -> list[str]:
        fit = self._subcommand_parsers["fit"]
        return [
            action.dest
            for action in fit._actions
            if action.dest not in ("config", "print_config") and action.dest.rpartition(".")[2] != "help"
        ]


def run_fit(args: Sequence[str] | None) -> None:
    """Parse the words and run what they say.

    Args:
        args: command-line words, `fit` first; None takes the process's own.

    Raises:
        UsageError: for what is wrong before training begins.
        RunError: for what goes wrong later, or is no matter of words and settings.
        RunStopError: if Ctrl-C or a signal ended the run.
    """
    watch = RunWatch()
    try:
        _run(args, watch)
    except (ValueError, MisconfigurationException, OSError, ImportError) as error:
        if watch.begun:
            raise RunError(watch.state()) from error
        raise UsageError(f"{_section_of(error)}{_said(error)}") from error
    except Exception as error:
        raise RunError(watch.state()) from error
    except SIGTERMException as stop:
        raise RunStopError(watch.state(), "terminated by a signal", 128 + signal.SIGTERM) from stop
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise  # after --help, say
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which the Trainer has set to ignore
        raise RunStopError(watch.state()) from stop
    if watch.trainer is not None and watch.trainer.is_global_zero:
        Console(soft_wrap=True).print("\n".join(named_files(watch.files())), highlight=False, markup=False)


def _config_files(words: Sequence[str]) -> list[str]:
    """What ``--config`` names, but for settings that are written there themselves."""
    given = [
        after if word == "--config" else word.partition("=")[2]
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == "--config"
    ]
    return [value for value in given if value and not re.search(r"[{\n]|: ", value)]


def _section_of(error: Exception) -> str:
    """``model: `` of what GRPOModule does not take, and so on: its own words name the argument at best."""
    sections = {made: name for name, made in SECTIONS.items()}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made = type(frame.f_locals.get("self"))
        if frame.f_code.co_name == "__init__" and made in sections:
            return f"{sections[made]}: "
    return ""


def _said(error: Exception) -> str:
    """Of an error before training: what it says, or of a class that could not be made from the config, why."""
    said = str(error)
    if "class_path" in said:
        return explained(said, ())
    if isinstance(error, OSError) and error.filename is not None and error.errno in NO_FOLDER:
        return (
            f"expected a folder for the run that can be written to, got {error.filename}: {error.strerror}. Set the "
            "logger's save_dir, or trainer.default_root_dir"
        )
    if "accelerator" in said or "backend found" in said:
        return f"trainer.accelerator: {said} Set it to cpu, or to auto, which takes what there is"
    return said


def _run(args: Sequence[str] | None, watch: RunWatch) -> None:
    EntropyCLI(
        watch,
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
