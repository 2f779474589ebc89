"""The ridge from Gram matrices against normal equations in loops over rows and folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entropy_pl.estimators import ridge
from entropy_pl.estimators.ridge import STRENGTHS, RidgeFolds

ROWS, FOLDS = 120, 4


def data(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two blocks of predictors of very different size, one far from zero and one constant; y with noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, 7)) * [1, 1e-3, 1e3, 1, 1, 1, 0] + [0, 0, 0, 50, 0, 0, 3]
    y = x @ [0.5, 300, 1e-3, -0.3, 0, 0, 1] + rng.normal(size=ROWS)
    fold = torch.from_numpy(rng.integers(0, FOLDS, ROWS))
    return [torch.from_numpy(x[:, :4]).float(), torch.from_numpy(x[:, 4:])], torch.from_numpy(y), fold


def normal_equations(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Intercept and β of standardized predictors, penalty n·α·β²; a constant predictor takes no part."""
    scale = x.std(0)
    scale[scale < 1e-9 * (1 + np.abs(x).max(0))] = np.inf
    z, centred = (x - x.mean(0)) / scale, y - y.mean()
    beta = np.linalg.solve(z.T @ z + len(x) * strength * np.eye(x.shape[1]), z.T @ centred) / scale
    return np.array([y.mean() - x.mean(0) @ beta, *beta])


def best_strength(x: np.ndarray, y: np.ndarray, fold: np.ndarray) -> float:
    """By the summed squared error on every fold of a fit to the others."""
    losses = []
    for strength in STRENGTHS.tolist():
        loss = 0.0
        for f in np.unique(fold):
            line = normal_equations(x[fold != f], y[fold != f], strength)
            loss += np.square(y[fold == f] - line[0] - x[fold == f] @ line[1:]).sum()
        losses.append(loss)
    return STRENGTHS.tolist()[int(np.argmin(losses))]


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns, y, fold = data(seed)
    return torch.cat([c.double() for c in columns], 1).numpy(), y.numpy(), fold.numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fit_solves_the_normal_equations(seed):
    x, y, fold = arrays(seed)
    columns, target, labels = data(seed)
    fit = RidgeFolds(columns, target, labels, FOLDS).fit()
    assert fit.strength == pytest.approx(best_strength(x, y, fold))
    line = normal_equations(x, y, fit.strength)
    np.testing.assert_allclose(fit.coefficients.numpy(), line[1:], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(fit.predict(columns).numpy(), line[0] + x @ line[1:], rtol=1e-9)


def test_cross_fitting_is_a_loop_over_folds():
    x, y, fold = arrays()
    expected = np.zeros(ROWS)
    for f in range(FOLDS):
        kept = fold != f
        line = normal_equations(x[kept], y[kept], best_strength(x[kept], y[kept], fold[kept]))
        expected[~kept] = line[0] + x[~kept] @ line[1:]
    np.testing.assert_allclose(RidgeFolds(*data(), FOLDS).predict().numpy(), expected, rtol=1e-9)


def test_a_fold_is_predicted_by_a_fit_that_never_saw_it():
    columns, target, fold = data()
    changed = torch.where(fold == 2, target + 100 * torch.randn(ROWS, dtype=torch.float64), target)
    before = RidgeFolds(columns, target, fold, FOLDS).predict()
    after = RidgeFolds(columns, changed, fold, FOLDS).predict()
    assert torch.equal(before[fold == 2], after[fold == 2])
    assert not torch.isclose(before[fold != 2], after[fold != 2]).any()


def test_chunks_change_nothing(monkeypatch):
    whole = RidgeFolds(*data(), FOLDS).predict()
    monkeypatch.setattr(ridge, "CHUNK_ROWS", 7)
    torch.testing.assert_close(RidgeFolds(*data(), FOLDS).predict(), whole, rtol=1e-9, atol=1e-9)


def test_more_predictors_than_rows():
    """Nothing to divide by but the penalty: pure noise is answered with little but the mean."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 200, generator=rng), 5 + torch.randn(60, generator=rng, dtype=torch.float64)
    prediction = RidgeFolds([x], y, torch.arange(60) % 5, 5).predict()
    assert float((prediction - 5).square().mean()) < 0.3


@pytest.mark.parametrize("empty", [False, True])
def test_two_folds_take_the_strongest_penalty(empty):
    """One training fold leaves nothing to choose by; with no row in it, the prediction is zero."""
    columns, target, _ = data()
    fold = torch.zeros(ROWS, dtype=torch.long) if empty else torch.arange(ROWS) % 2
    folds = RidgeFolds(columns, target, fold, 2)
    assert folds.fit(0).strength == float(STRENGTHS[-1])
    expected = torch.zeros(()) if empty else target[fold == 1].mean()
    torch.testing.assert_close(folds.predict()[fold == 0].mean(), expected.double(), rtol=1e-2, atol=1e-12)
