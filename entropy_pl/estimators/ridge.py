"""Ridge regression from one Gram matrix per fold: one pass over the tokens, whatever is left out afterwards.

With z = (1, x, y) the Gram matrix Σ z z' is all that a least-squares fit, or its loss on other rows, needs. Folds'
matrices add up to any set of folds, and one eigendecomposition of a sum serves every strength.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = torch.logspace(-5, 4, 19, dtype=torch.float64)  # of the penalty, against predictors of variance 1
CHUNK_ROWS = 4096  # rows made float64 at a time; at 1,536 features 50 MB
CONSTANT = 1e-12  # variance, as a share of the mean square, at which rounding is all that varies


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted line.

    Args:
        coefficients: β, ``[p]``, in the units of the predictors as they came.
        intercept: not penalized.
        strength: α of (1/n) Σ (y − intercept − x'β)² + α Σ_j (sd_j β_j)², sd_j the predictor's standard deviation.
    """

    coefficients: Tensor
    intercept: float
    strength: float

    def predict(self, columns: Sequence[Tensor]) -> Tensor:
        """The line at every row, ``[n]``, float64; columns as for :class:`RidgeFolds`."""
        rows = torch.arange(len(columns[0]))
        return torch.cat([x @ self.coefficients + self.intercept for _, x in _chunks(columns, rows)])


class RidgeFolds:
    """Cross-fitted ridge regression: every fold is predicted by a fit that never saw it.

    The strength is chosen among :data:`STRENGTHS` inside the training folds, by the squared error on each of them
    of a fit to the others. Where only one training fold is left, nothing can be chosen and the strongest is taken.

    Args:
        columns: blocks of predictors of the same rows, ``[n, d_1], [n, d_2], …``, any float dtype; read chunk by chunk.
        target: y, ``[n]``.
        fold: 0 … folds−1 for every row, ``[n]``.
        folds: how many there are.
    """

    def __init__(self, columns: Sequence[Tensor], target: Tensor, fold: Tensor, folds: int) -> None:
        self.columns, self.fold, self.folds = columns, fold, folds
        # A shift changes no fit but for rounding: means far from zero would eat the digits of the variances.
        _, head = next(_chunks(columns, torch.arange(min(CHUNK_ROWS, len(target)))))
        self._shift = head.mean(0)
        self._grams = [self._gram(target, torch.nonzero(fold == f)[:, 0]) for f in range(folds)]
        self._paths: dict[frozenset[int], Tensor] = {}

    def fit(self, left_out: int | None = None) -> Ridge:
        """The fit to all folds but one; None: to all."""
        gone = frozenset() if left_out is None else frozenset({left_out})
        inside = [f for f in range(self.folds) if f not in gone]
        choice = len(STRENGTHS) - 1
        if len(inside) > 1:
            loss = torch.zeros_like(STRENGTHS)
            for f in inside:
                path = self._path(gone | {f})
                loss += (path * (self._grams[f] @ path)).sum(0)
            choice = int(loss.argmin())
        line = self._path(gone)[:, choice]
        beta = line[1:-1]
        return Ridge(beta, float(line[0] - self._shift @ beta), float(STRENGTHS[choice]))

    def predict(self) -> Tensor:
        """The cross-fitted prediction of every row, ``[n]``, float64."""
        prediction = torch.zeros(len(self.fold), dtype=torch.float64)
        for f in range(self.folds):
            rows = torch.nonzero(self.fold == f)[:, 0]
            if len(rows):
                prediction[rows] = self.fit(f).predict([block[rows] for block in self.columns])
        return prediction

    def _gram(self, target: Tensor, rows: Tensor) -> Tensor:
        width = len(self._shift) + 2
        gram = torch.zeros(width, width, dtype=torch.float64)
        for chunk, x in _chunks(self.columns, rows):
            z = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x - self._shift, target[chunk, None].double()], 1)
            gram.addmm_(z.T, z)
        return gram

    def _path(self, gone: frozenset[int]) -> Tensor:
        """(intercept, β, −1) without the folds ``gone``, one column per strength: z' times it is minus the residual."""
        if gone not in self._paths:
            kept = (gram for f, gram in enumerate(self._grams) if f not in gone)
            self._paths[gone] = _ridge_path(sum(kept, torch.zeros_like(self._grams[0])))
        return self._paths[gone]


def _ridge_path(gram: Tensor) -> Tensor:
    mean_square = gram / gram[0, 0].clamp(min=1)
    mean = mean_square[0]
    covariance = mean_square - torch.outer(mean, mean)
    variance = covariance.diagonal()[1:-1]
    constant = variance <= CONSTANT * mean_square.diagonal()[1:-1]
    scale = torch.where(constant, 0.0, variance.where(~constant, torch.ones(())).rsqrt())
    correlation = torch.outer(scale, scale) * covariance[1:-1, 1:-1]
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    against_target = vectors.T @ (scale * covariance[1:-1, -1])
    shrunk = against_target[:, None] / (eigenvalues.clamp(min=0)[:, None] + STRENGTHS)
    beta = scale[:, None] * (vectors @ shrunk)
    intercept = mean[-1] - mean[1:-1] @ beta
    return torch.cat([intercept[None], beta, -torch.ones_like(intercept)[None]])


def _chunks(columns: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers and the predictors of those rows in float64, side by side."""
    for chunk in rows.split(CHUNK_ROWS):
        yield chunk, torch.cat([block[chunk.to(block.device)].cpu().double() for block in columns], 1)
