"""Batches and their scores as safetensors files: what a killed study does not draw or score again.

A file is written under another name and renamed when it is on the disk: whoever finds it finds all of it. Nothing in
it is executed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from entropy_pl.files import written_whole
from entropy_pl.measurements import Drawn, EntropyMeasurements, MeasurementSettings
from entropy_pl.measurements.update import MeasuredUpdate
from entropy_pl.probe import ProbeScores
from entropy_pl.records import to_json
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates import UpdateVector


def drawn_once(
    path: Path, measurements: EntropyMeasurements, settings: MeasurementSettings, *, on_pass: Callable[[str], None]
) -> Drawn:
    """The batches and v of a file, drawn and kept there when first asked for.

    Of v the direction and its lr are kept, not its components.

    Args:
        path: the file; its folders are made.
        measurements: draws.
        settings: as :meth:`EntropyMeasurements.draw` takes them.
        on_pass: likewise.
    """
    if not path.exists():
        drawn = measurements.draw(settings, on_pass=on_pass)
        vector = drawn.update.vector
        tensors = {f"rollout/{name}": tensor for name, tensor in drawn.rollout.tensors.items()}
        tensors |= {f"direction/{name}": tensor for name, tensor in vector.direction.items()}
        facts: dict[str, Any] = {
            "lr": vector.lr,
            "update": drawn.update.facts,
            "prompts": drawn.prompts,
            "seconds": drawn.seconds,
        }
        write_tensors(path, tensors, facts)
    tensors, facts = read_tensors(path)  # what was drawn just now, too: one way, whoever comes
    update = MeasuredUpdate(UpdateVector(_under(tensors, "direction/"), facts["lr"]), facts["update"])
    rollout = Rollout(**_under(tensors, "rollout/"), temperature=settings.generation.temperature)
    return Drawn(rollout, facts["prompts"], update, facts["seconds"])


def scored_once(path: Path, score: Callable[[], ProbeScores]) -> ProbeScores:
    """The scores of a file, collected and kept there when first asked for.

    Args:
        path: the file; its folders are made.
        score: collects them.
    """
    if not path.exists():
        scores = score()
        stats = {"base": scores.base, "tangent": scores.tangent, "curvature": scores.curvature}
        stats |= {f"shifted/{number}": shifted for number, shifted in enumerate(scores.shifted.values())}
        tensors = {
            f"{name}/{kind}": getattr(stat, kind) for name, stat in stats.items() for kind in ("logp", "entropy")
        }
        tensors["mask"] = scores.base.mask
        for name in ("clusters", "features"):
            if getattr(scores, name) is not None:
                tensors[name] = getattr(scores, name)
        facts = {name: getattr(scores, name) for name in ("method", "difference_step", "seconds", "temperature")}
        write_tensors(path, tensors, facts | {"etas": list(scores.shifted)})
    tensors, facts = read_tensors(path)

    def stats_of(name: str) -> TokenStats:
        return TokenStats(tensors[f"{name}/logp"], tensors[f"{name}/entropy"], tensors["mask"])

    return ProbeScores(
        base=stats_of("base"),
        tangent=stats_of("tangent"),
        curvature=stats_of("curvature"),
        shifted={eta: stats_of(f"shifted/{number}") for number, eta in enumerate(facts["etas"])},
        clusters=tensors.get("clusters"),
        features=tensors.get("features"),
        method=facts["method"],
        difference_step=facts["difference_step"],
        seconds=facts["seconds"],
        temperature=facts.get("temperature", 1.0),  # files of older versions do not say
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file at once, JSON-able facts in its header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as unfinished:
        save_file(plain, unfinished, metadata={"facts": to_json(facts)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that :func:`write_tensors` wrote, on the CPU, and the facts."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
