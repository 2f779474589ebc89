"""Every completion token of a U-batch with what it did to the entropy: what figures, page and record are made of."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from entropy_pl.attribution.signs import NEGATIVE, POSITIVE, ZERO, by_sign
from entropy_pl.files import written_whole
from entropy_pl.records import Json, plain
from entropy_pl.reporting.visible_text import shortened

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Unit = Literal["per_token", "per_sequence"]

FORMAT = "entropy_pl.attributed_tokens.2"  # written into every file, and asked of every file that is read
OLDER_FORMATS = ("entropy_pl.attributed_tokens.1",)  # without errors and reach, and with ⟨∇Ĥ, v⟩ as the whole
DECILES = 10
NO_TOKEN_ERRORS = "Single tokens have no error bar unless token_error_blocks is set."
CONTEXT = 40  # characters before a token that go with it into the record
TOTALS = ("momentum", "weight_decay", "tokens", "remainder", "first_order")
ERRORS = ("stderr", "stderr_u")
SIGNS = (POSITIVE, NEGATIVE, ZERO)
OF_TOKENS = ("values", "logp", "entropy", "advantages", "sequence", "position", "stderr")
OF_SEQUENCES = ("sequence_values", "sequence_stderr", "matrix")
ARRAYS = (*OF_TOKENS, *OF_SEQUENCES)
MAY_BE_NONE = ("advantages", "stderr", "sequence_stderr", "matrix")


@dataclass(frozen=True, eq=False)
class AttributedTokens:
    """All n completion tokens of a U-batch of N completions, each with its share of one step's entropy change.

    Entropy changes are in nats (per token or per sequence of the E-batch, see ``unit``) of the step really taken: η is
    multiplied in.

    Args:
        step: the optimizer step, from 0.
        eta: the learning rate of the step.
        unit: ``per_token`` or ``per_sequence``, as a record's ``normalize``.
        values: entropy change by each token, ``[n]``, nats.
        logp: log π of each token before the step, ``[n]``, nats.
        entropy: entropy of the distribution each token was drawn from, ``[n]``, nats.
        advantages: advantage of each token's completion, ``[n]``; None: the loss had none.
        sequence: row of each token's completion in the U-batch, ``[n]``, in [0, N).
        position: place of each token in its completion, ``[n]``, from 0.
        text: text of each token, n of them.
        prompts: text of each completion's prompt, N of them.
        sequence_values: entropy change by each completion, ``[N]``, nats.
        sequence_stderr: its standard error over the E-batch, ``[N]``, nats; None: not computed.
        matrix: influence of each U-completion on each E-completion, ``[N_E, N]``, nats, whose mean over E is
            ``sequence_values``; None: not computed.
        stderr: standard error of each token's value over the E-batch, ``[n]``, nats; None: not computed.
        totals: nats of the step by component: ``momentum``, ``weight_decay``, ``tokens``, ``remainder`` and their sum
            ``first_order``, as many of them as are known.
        errors: standard errors of the totals, and of the tokens by sign of the advantage, by the same names: ``stderr``
            over the E-batch and ``stderr_u`` over the prompts of the U-batch, nats; None or not there: not known.
        reach: standard errors that a figure's error bars reach to either side: Student's t of the probe's confidence,
            or 1.

    Raises:
        ValueError: if lengths disagree, a row is none of the N completions, or a name or unit is unknown.
    """

    step: int
    eta: float
    unit: Unit
    values: Floats = field(repr=False)
    logp: Floats = field(repr=False)
    entropy: Floats = field(repr=False)
    advantages: Floats | None = field(repr=False)
    sequence: Integers = field(repr=False)
    position: Integers = field(repr=False)
    text: Sequence[str] = field(repr=False)
    prompts: Sequence[str] = field(repr=False)
    sequence_values: Floats = field(repr=False)
    sequence_stderr: Floats | None = field(default=None, repr=False)
    matrix: Floats | None = field(default=None, repr=False)
    stderr: Floats | None = field(default=None, repr=False)
    totals: dict[str, float] = field(default_factory=dict)
    errors: dict[str, Json] = field(default_factory=dict, repr=False)
    reach: float = 1.0

    def __post_init__(self) -> None:
        for name in ARRAYS:
            if (value := getattr(self, name)) is not None:
                whole = name in ("sequence", "position")
                object.__setattr__(self, name, np.asarray(value, dtype=np.int64 if whole else np.float64))
        n, N = len(self.text), len(self.prompts)
        shapes = {**dict.fromkeys(OF_TOKENS, (n,)), "sequence_values": (N,), "sequence_stderr": (N,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                of = f"{n} token texts" if name in OF_TOKENS else f"{N} prompts"
                raise ValueError(f"expected {name} of shape {list(shape)} for {of}, got {list(value.shape)}")
        if self.matrix is not None and (self.matrix.ndim != 2 or self.matrix.shape[1] != N):
            raise ValueError(f"expected matrix of shape [N_E, {N}] for {N} prompts, got {list(self.matrix.shape)}")
        if n and not (self.sequence.min() >= 0 and self.sequence.max() < N):
            raise ValueError(
                f"expected every sequence to be a row of the {N} completions, from 0, got "
                f"{self.sequence.min()} to {self.sequence.max()}"
            )
        if self.unit not in get_args(Unit):
            raise ValueError(f"expected unit to be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        for name, given, known in (("totals", self.totals, TOTALS), ("errors", self.errors, (*TOTALS, *SIGNS))):
            if unknown := set(given) - set(known):
                raise ValueError(f"expected {name} among {', '.join(known)}, got {', '.join(sorted(unknown))}")

    def __len__(self) -> int:
        return len(self.text)

    @property
    def units(self) -> str:
        """``nats per token`` or ``nats per sequence``."""
        return f"nats {self.unit.replace('_', ' ')}"

    def by_sign(self) -> dict[str, NDArray[np.bool_]]:
        """Which tokens have an advantage above, below and of zero, ``[n]`` each, by name.

        ``positive_advantage``, ``negative_advantage``, ``zero_advantage`` (NaN included); empty without advantages.
        """
        return {} if self.advantages is None else by_sign(self.advantages)

    def deciles(self) -> Integers:
        """Decile of each token's probability, ``[n]``, 0 (least probable) to 9.

        Their counts differ by one at most; tokens of equal probability go by their order.
        """
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[np.argsort(self.logp, kind="stable")] = np.arange(len(self))
        return ranks * DECILES // max(len(self), 1)

    def by_sign_and_decile(self) -> dict[str, dict[str, list[float]]]:
        """The entropy change by sign of the advantage and decile of the token's probability.

        Returns:
            For each of ``positive_advantage``, ``negative_advantage`` and ``zero_advantage`` (without advantages for
            ``all`` instead): ``values``, the sums of ten deciles in nats, and ``tokens``, how many there are.
        """
        deciles = self.deciles()
        signs = self.by_sign() or {"all": np.ones(len(self), dtype=bool)}
        return {
            name: {
                "values": np.bincount(deciles[chosen], weights=self.values[chosen], minlength=DECILES).tolist(),
                "tokens": np.bincount(deciles[chosen], minlength=DECILES).tolist(),
            }
            for name, chosen in signs.items()
        }

    def top(self, count: int) -> Integers:
        """The tokens that changed the entropy most, either way, at most ``count``: the largest first, NaN last."""
        return np.argsort(-np.abs(self.values), kind="stable")[:count]

    def context(self, index: int, length: int = CONTEXT) -> str:
        """The text before token ``index`` in its completion, its last ``length`` characters."""
        before = np.flatnonzero((self.sequence == self.sequence[index]) & (self.position < self.position[index]))
        before = before[np.argsort(self.position[before], kind="stable")]
        # a token has a character or more, but for bytes of one that is not whole: some to spare
        return shortened("".join(self.text[i] for i in before[-2 * length :]), length, keep_end=True)

    def prompt_numbers(self) -> Integers:
        """Number of each completion's prompt, ``[N]``, from 0 in the order of the batch."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in self.prompts], dtype=np.int64)

    def summary(self, count: int = 20) -> Json:
        """What a record keeps of the tokens, JSON-able.

        Args:
            count: how many of the most influential tokens it names.

        Returns:
            ``tokens_by_sign``: how many tokens by name of :meth:`by_sign`; ``by_decile``: ten dicts of ``logp_low`` and
            ``logp_high`` (the least and the largest log π, None for an empty one), ``tokens``, the sum of values by the
            same names (``all`` without advantages), in nats, and ``stderr``, None: these shares have no error bar;
            ``top_tokens``: dicts of ``text``, ``context`` (what stands before it), ``sequence``, ``position``,
            ``value``, ``stderr`` (None: not asked for, see ``token_error_blocks``), ``logp``, ``entropy`` and
            ``advantage`` (None: not known).
        """
        deciles, sums = self.deciles(), self.by_sign_and_decile()
        by_decile: list[Json] = []
        for decile in range(DECILES):
            logp = self.logp[deciles == decile]
            by_decile.append(
                {
                    "logp_low": float(logp.min()) if len(logp) else None,
                    "logp_high": float(logp.max()) if len(logp) else None,
                    "tokens": len(logp),
                    **{name: columns["values"][decile] for name, columns in sums.items()},
                    "stderr": None,
                }
            )
        top_tokens = [
            {
                "text": self.text[i],
                "context": self.context(i),
                "sequence": int(self.sequence[i]),
                "position": int(self.position[i]),
                "value": float(self.values[i]),
                "stderr": None if self.stderr is None else float(self.stderr[i]),
                "logp": float(self.logp[i]),
                "entropy": float(self.entropy[i]),
                "advantage": None if self.advantages is None else float(self.advantages[i]),
            }
            for i in self.top(count).tolist()
        ]
        return {
            "tokens_by_sign": {name: int(chosen.sum()) for name, chosen in self.by_sign().items()},
            "by_decile": by_decile,
            "top_tokens": top_tokens,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one compressed ``.npz`` file, of plain numbers and one line of JSON.

        The file appears once it is whole.

        Args:
            path: the file, under exactly this name; its folders are made.
        """
        header = {
            "format": FORMAT,
            "step": int(self.step),
            "eta": float(self.eta),
            "unit": self.unit,
            "totals": {name: float(value) for name, value in self.totals.items()},
            "errors": plain(self.errors),
            "reach": float(self.reach),
            # as JSON: arrays of strings lose a NUL at a string's end, and take the longest one's room for each
            "text": list(self.text),
            "prompts": list(self.prompts),
        }
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        with written_whole(Path(path)) as unfinished, open(unfinished, "wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributedTokens:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is another kind of file, cut short, or of a format this version does not know.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected a file of attributed tokens (.npz), got {path}, which is not a file")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop("header")))
            found = header.pop("format")
            if found not in (FORMAT, *OLDER_FORMATS):
                raise ValueError(f"its format is {found!r}")
            if not all(isinstance(text, str) for text in [*header["text"], *header["prompts"]]):
                raise ValueError("its texts are no strings")
            if not all(isinstance(error, dict) for error in header.get("errors", {}).values()):
                raise ValueError("its errors are no objects")
            columns: dict[str, Any] = {
                name: arrays.get(name) if name in MAY_BE_NONE else arrays[name] for name in ARRAYS
            }
            return cls(**header, **columns)
        except OSError:  # the disk's, not the file's content
            raise
        except Exception as error:  # each of NumPy, zip, zlib and JSON fails in its own way on what it does not know
            raise ValueError(
                f"expected {path} to be attributed tokens ({FORMAT}), written by AttributedTokens.save, got something "
                f"else, or a part of it ({type(error).__name__}: {error}): write it again"
            ) from error
