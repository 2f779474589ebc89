"""Baselines of the score term: predictions, from the prefix alone, of what ṡ_ik is multiplied by.

E[ṡ_ik | prefix] = 0, so a function of the prefix moves no expectation, whatever it predicts, and takes away the
variance that it does predict. Cross-fitting keeps that true of a prediction learnt from the batch itself: no sequence
is predicted by a fit that saw it, or another completion of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from entropy_pl.estimators.derivatives import score_return
from entropy_pl.estimators.estimate import cluster_index
from entropy_pl.estimators.ridge import RidgeFolds
from entropy_pl.estimators.snis import Clusters, Integrand, Normalize, Weighting
from entropy_pl.rollout import TokenStats

Baseline = Literal["none", "position", "critic", "gae"]
"""What is subtracted from the score term: see :func:`score_baseline`."""


def score_baseline(
    kind: Baseline,
    base: TokenStats,
    *,
    features: Tensor | None = None,
    gae_lambda: float = 0.95,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    folds: int = 5,
) -> Tensor | None:
    """A baseline for :func:`entropy_pl.estimators.first_order_delta_entropy`, cross-fitted by prompt.

    * ``none``: none; self-normalization's own batch mean stays.
    * ``position``: the mean of the return (:func:`entropy_pl.estimators.score_return`) over the other folds' sequences
      still alive at k; where none is, their mean at the last position that has one.
    * ``critic``: a ridge regression of the return on ``features`` and :func:`prefix_columns`. Under ``sequence``
      weighting the return holds the past Σ_{j≤k} of the centred entropies, which the prefix fixes: it is known, not
      predicted, so that ``sequence`` with a critic is ``prefix`` with that critic.
    * ``gae``: :func:`gae_baseline` with that critic, biased by the critic's error unless λ = 1.

    For ``surprisal`` every baseline is 1 less: its pathwise term −ṡ_ik is a multiple of the score as well, so that what
    ṡ_ik is multiplied by in all is the return − 1.

    ``none``, ``position`` and ``critic`` are unbiased to O(1/N), and their standard errors hold: noise in a fit moves
    the estimate by O(1/N) only. ``gae`` leans on the fit at first order, (1−λ) Σ_l λ^{l−1} ṡ_k W_{k+l}: besides its
    bias, its influences leave out the fit's own noise, so that its interval is too short (a 4M GSM8K policy, N = 768:
    0.77 of the jackknife's standard error at λ = 0.95, 0.71 at 0.8; ``critic`` 0.97). For ``gae`` take
    :func:`entropy_pl.estimators.jackknife_standard_error` of the whole calculation, fit included.

    Args:
        kind: ``none``, ``position``, ``critic`` or ``gae``.
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        features: for ``critic`` and ``gae``: one row per completion token in the order of ``base.mask``, ``[number of
            completion tokens, d]``, a function of the prefix before the token alone, such as the policy's last hidden
            state that emits it. float32 will do; they are read chunk by chunk.
        gae_lambda: λ between 0 and 1; 1 is ``critic`` exactly.
        normalize: ``per_token`` or ``per_sequence``, as the estimate it is for.
        weighting: ``prefix`` or ``sequence``, likewise.
        integrand: ``rao_blackwell`` or ``surprisal``, likewise.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat. Cluster number c, in the order of the labels,
            is in fold c modulo ``folds``.
        folds: of the cross-fitting; at most one per cluster is used. 3 or more let the critic choose its strength.

    Returns:
        ``[N, T]`` in nats, float64, zero where the mask is False; None for ``none``.

    Source:
        docs/theory.md, §9; `gae` after Schulman et al. 2016 (arXiv 1506.02438).

    Raises:
        ValueError: for an unknown kind or option, features that are missing, not finite or of another number of rows,
            λ outside [0, 1], fewer than 2 folds or clusters, or statistics no estimate can be made of.
    """
    fitted = fit_baseline(
        kind,
        base,
        score_return(base, normalize=normalize, weighting=weighting, integrand=integrand),
        score_return(base, normalize=normalize, weighting="prefix", integrand=integrand),
        features=features,
        gae_lambda=gae_lambda,
        clusters=clusters,
        folds=folds,
    )
    return fitted - base.mask.to(fitted) if fitted is not None and integrand == "surprisal" else fitted


def fit_baseline(
    kind: Baseline,
    base: TokenStats,
    returns: Tensor,
    to_go: Tensor,
    *,
    features: Tensor | None,
    gae_lambda: float,
    clusters: Clusters,
    folds: int,
) -> Tensor | None:
    """A cross-fitted baseline of any return: what :func:`score_baseline` does once it knows what is predicted.

    Args:
        kind: ``none``, ``position``, ``critic`` or ``gae``.
        base: statistics at θ, ``[N, T]``.
        returns: what ṡ_ik is multiplied by, ``[N, T]``, float64, zero where the mask is False.
        to_go: the part of it that the prefix has not settled yet and the critic predicts, likewise.
        features: as for :func:`score_baseline`.
        gae_lambda: λ.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        folds: of the cross-fitting.

    Returns:
        ``[N, T]`` in the unit of the return, float64, zero where the mask is False; None for ``none``.

    Raises:
        ValueError: as :func:`score_baseline`.
    """
    if kind not in get_args(Baseline):
        raise ValueError(f"expected a baseline among {get_args(Baseline)}, got {kind!r}")
    if kind == "none":
        return None
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"expected gae_lambda between 0 and 1, got {gae_lambda}")
    fold, folds = _sequence_folds(clusters, len(base), folds)
    fold = fold.to(returns.device)
    if kind == "position":
        return _position_mean(returns, base.mask, fold, folds)
    features = _checked_features(features, base.mask, kind)
    token_fold = fold[:, None].expand_as(base.mask)[base.mask]
    ridge = RidgeFolds([features, prefix_columns(base)], to_go[base.mask].cpu(), token_fold.cpu(), folds)
    values = torch.zeros_like(to_go)
    values[base.mask] = ridge.predict().to(values)
    if kind == "gae":
        values = gae_baseline(to_go, values, base.mask, gae_lambda)
    return values + (returns - to_go)  # returns − to_go: the past under `sequence`, nothing under `prefix`


def prefix_columns(base: TokenStats) -> Tensor:
    """What the statistics themselves say of the prefix: k, k², h_ik and Σ_{j<k} h_ij.

    Args:
        base: statistics at θ, ``[N, T]``.

    Returns:
        One row per completion token in the order of ``base.mask``, ``[number of completion tokens, 4]``, float64.
    """
    entropy = torch.where(base.mask, base.entropy.detach().double(), 0.0)
    position = torch.arange(entropy.shape[1], device=entropy.device).expand_as(entropy).double()
    columns = (position, position.square(), entropy, entropy.cumsum(1) - entropy)
    return torch.stack([column[base.mask] for column in columns], 1)


def gae_baseline(returns: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """The baseline that leaves the generalized advantage A_k = Σ_l λ^l δ_{k+l} (arXiv 1506.02438) of the returns.

    With G the return to go, r_k = G_k − G_{k+1} what token k adds to it (``rao_blackwell``: c_{k+1}; ``surprisal``:
    −s_k − ĥ m_{k+1}), W the critic and δ_k = r_k + W_{k+1} − W_k, the errors e = G − W telescope:

        A_k = Σ_l λ^l (e_{k+l} − e_{k+l+1}) = e_k − (1−λ) Σ_{l≥1} λ^{l−1} e_{k+l}.

    λ = 1 gives back W. For λ < 1 it looks behind token k, and the first order is off by
    −(1−λ) Σ_k Σ_{l≥1} λ^{l−1} E[ṡ_k (E[G_{k+l} | prefix] − W_{k+l})] / T̄: nothing for a perfect critic only.

    Args:
        returns: G of ``prefix`` weighting, ``[N, T]``, zero where the mask is False.
        values: W, ``[N, T]``.
        mask: m_ik, ``[N, T]``.
        gae_lambda: λ.

    Returns:
        G − A, ``[N, T]``, zero where the mask is False.
    """
    error = torch.where(mask, returns - values, 0.0)
    later, ahead = torch.zeros_like(error), torch.zeros_like(error[:, 0])
    for k in reversed(range(error.shape[1] - 1)):
        ahead = error[:, k + 1] + gae_lambda * ahead
        later[:, k] = ahead
    return torch.where(mask, values + (1 - gae_lambda) * later, 0.0)


def _sequence_folds(clusters: Clusters | Sequence[int], count: int, folds: int) -> tuple[Tensor, int]:
    """The fold of every sequence, ``[N]``, whole clusters together, and how many folds there are."""
    index = torch.from_numpy(cluster_index(clusters, count))
    n_clusters = int(index.max()) + 1
    if folds < 2 or n_clusters < 2:
        raise ValueError(
            f"expected at least 2 folds and 2 clusters, got {folds} and {n_clusters}: a baseline is learnt from "
            "other prompts than the one it serves"
        )
    folds = min(folds, n_clusters)
    return index % folds, folds


def _position_mean(returns: Tensor, mask: Tensor, fold: Tensor, folds: int) -> Tensor:
    """Mean of the returns alive at k outside each sequence's own fold, ``[N, T]``."""
    member = torch.nn.functional.one_hot(fold, folds).T.to(returns)
    total, alive = member @ returns, member @ mask.to(returns)
    total, alive = total.sum(0) - total, alive.sum(0) - alive
    position = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(alive > 0, position, 0).cummax(1).values  # k itself, or the last position with somebody alive
    mean = (total / alive.clamp(min=1)).gather(1, last)
    return torch.where(mask, mean[fold], 0.0)


def _checked_features(features: Tensor | None, mask: Tensor, kind: str) -> Tensor:
    count = int(mask.sum())
    if features is None:
        raise ValueError(f"expected features [{count}, d] for the baseline {kind!r}, got none: the last hidden states")
    if features.ndim != 2 or len(features) != count:
        raise ValueError(
            f"expected features of shape [{count}, d], one row per completion token, got {list(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise ValueError("expected finite features, got NaN or infinity among them")
    return features.detach()
