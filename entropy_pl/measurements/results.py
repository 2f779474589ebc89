"""What a measurement returns, and the folder it is kept in."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from entropy_pl.files import written_whole
from entropy_pl.records import Json, plain
from entropy_pl.reporting import AttributedTokens, attribution_page, eta_sweep_figure
from entropy_pl.version import __version__

RESULTS, CONFIG, FIGURE = "results.json", "config.yaml", "eta_sweep.png"
TOKENS, PAGE = "attribution.npz", "attribution.html"  # where the step was attributed
LIBRARIES = ("torch", "transformers", "peft", "lightning")


def versions() -> dict[str, str]:
    """Of everything a number may depend on."""
    return {
        "entropy_pl": __version__,
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def sweep_with_seed_keys(sweep: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a probe's sweep, with the two values under the names that offline results give them."""
    return [
        {
            "eta": point["eta"],
            "deltaH_true": point["true"]["value"],
            "deltaH_approx": point["first_order"]["value"],
            **point,
        }
        for point in sweep
    ]


class ResultsFolder:
    """Results of one config: ``results.json``, ``config.yaml``, ``eta_sweep.png``.

    Of a step that was attributed, ``attribution.npz`` and ``attribution.html`` too.

    Args:
        path: the folder; it is made if it is not there.
        config_hash: of the config that is about to be measured.

    Raises:
        ValueError: if the folder holds results of another config, or somebody's files under the names of ours.
        OSError: if it cannot be made or written to.
    """

    def __init__(self, path: str | os.PathLike[str], config_hash: str) -> None:
        self.path, self._hash = Path(path), config_hash
        self._refuse_others()
        make_writable(self.path)

    def write(self, results: Json, tokens: AttributedTokens | None = None) -> None:
        """Replace the folder's results.

        Args:
            results: of the measurement.
            tokens: of the U-batch, where the step was attributed.

        Raises:
            ValueError: if another config's have come in the meantime.
        """
        self._refuse_others()
        write_whole(self.path / RESULTS, results)  # first: the rest can be made of it
        (self.path / CONFIG).write_text(as_yaml(results["config"]))
        eta_sweep_figure(results).savefig(self.path / FIGURE)
        if tokens is not None:
            tokens.save(self.path / TOKENS)
            page = attribution_page(tokens, title=f"Who moved the entropy: optimizer step {tokens.step}")
            (self.path / PAGE).write_text(page, encoding="utf-8")

    def _refuse_others(self) -> None:
        refuse_another_config(self.path / RESULTS, self._hash)
        foreign = [name for name in (CONFIG, FIGURE, TOKENS, PAGE) if (self.path / name).exists()]
        if foreign and not (self.path / RESULTS).exists():
            raise ValueError(
                f"expected an output_directory whose {foreign[0]} is a measurement's, got {self.path}, which has one "
                f"and no {RESULTS}: give another folder"
            )


def make_writable(folder: Path) -> None:
    """Make a folder and see that it can be written to, before there is something to lose.

    Raises:
        OSError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"expected a folder that can be written to, got {folder}: {error}") from error


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as a file that can be read again."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def write_whole(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once: whoever finds it finds all of it."""
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def refuse_another_config(file: Path, config_hash: str) -> None:
    """Refuse a folder that another config was measured into.

    Args:
        file: the folder's JSON file with its ``config_hash``; it need not exist.
        config_hash: of the config that is about to be measured.

    Raises:
        ValueError: if the file has another hash, or cannot be read.
    """
    if not file.exists():
        return
    try:
        content: Mapping[str, Any] = json.loads(file.read_text())
        found = content["config_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected {file} to hold results of this package, got {type(error).__name__}: {error}. Give another "
            "output_directory"
        ) from error
    if found != config_hash:
        raise ValueError(
            f"expected an output_directory without results of another config, got {file.parent}, whose results have "
            f"the config hash {found} instead of {config_hash}: give another folder, or remove that one"
        )
