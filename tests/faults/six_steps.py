"""One Lightning run for many faults: six steps of which steps 0, 2 and 4 are probed, checkpoints where asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from foreign import Deterministic, fit, probe
from lightning.pytorch import Callback, LightningModule, Trainer

from entropy_pl.reporting import read_records

STEPS = 6
OF_THE_MACHINE = ("seconds", "memory", "overhead", "sampler_gap")  # keys of a record that differ from run to run


class Saves(Callback):
    """Saves a checkpoint, always the same file, when so many steps are done."""

    def __init__(self, path: Path, steps: Sequence[int] = (3,)) -> None:
        self.path, self.steps = path, steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.path)


def run(folder: Path, *callbacks: Any, module: LightningModule | None = None, **options: Any) -> LightningModule:
    """The run, or with ``ckpt_path`` its continuation; its records are in ``folder``."""
    settings = {"num_sequences": 8, "output_directory": str(folder), "max_new_tokens": 4}
    settings |= options.pop("probe", {})
    module = Deterministic() if module is None else module
    options = {"logger": False, "default_root_dir": folder, "steps": STEPS} | options
    fit(module, folder, probe(**settings), *callbacks, **options)
    return module


def records(folder: Path) -> list[dict[str, Any]]:
    return [measured(record) for record in read_records(folder / "records.jsonl")]


def measured(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in OF_THE_MACHINE}


def weights(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any], *, streams: bool = False) -> None:
    """Two training states, to the bit; random streams where asked, which Lightning's checkpoints do not keep."""
    assert not streams or torch.equal(one["stream"], other["stream"])
    assert one["step"] == other["step"]
    assert one["training"] == other["training"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, other["tensors"][name]), name


class Steps(Callback):
    """Keeps the training state after every step, and what it is where a run ends by an exception."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.states.append(self._state(trainer, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.path is not None:
            torch.save(self._state(trainer, pl_module), self.path)

    @staticmethod
    def _state(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        moments = trainer.optimizers[0].state_dict()["state"]
        tensors = weights(module)
        tensors |= {f"{n} {key}": value.clone() for n, of in moments.items() for key, value in of.items()}
        stream = torch.get_rng_state().clone()
        return {"tensors": tensors, "stream": stream, "step": trainer.global_step, "training": module.training}
