"""Arrays in, estimates out: the reducer, its derivatives, and the error bars they share."""

from entropy_pl.estimators.critic import Baseline, score_baseline
from entropy_pl.estimators.derivatives import (
    first_order_coefficients,
    first_order_delta_entropy,
    score_return,
    second_order_delta_entropy,
)
from entropy_pl.estimators.differences import low_variance_delta_entropy, symmetric_difference
from entropy_pl.estimators.estimate import EntropyChange, interval, linear_combination, make_estimate
from entropy_pl.estimators.fits import PowerLaw, fit_power_law, linear_coefficient
from entropy_pl.estimators.jackknife import jackknife_standard_error
from entropy_pl.estimators.predictors import Agreement, agreement, covariance_prediction, steer_prediction
from entropy_pl.estimators.ratio import Ratio, ratio
from entropy_pl.estimators.reward import (
    first_order_delta_reward,
    reward_baseline,
    reward_estimate,
    snis_delta_reward,
)
from entropy_pl.estimators.snis import Measure, entropy_estimate, snis_delta_entropy

__all__ = [
    "Agreement",
    "Baseline",
    "EntropyChange",
    "Measure",
    "PowerLaw",
    "Ratio",
    "agreement",
    "covariance_prediction",
    "entropy_estimate",
    "first_order_coefficients",
    "first_order_delta_entropy",
    "first_order_delta_reward",
    "fit_power_law",
    "interval",
    "jackknife_standard_error",
    "linear_coefficient",
    "linear_combination",
    "low_variance_delta_entropy",
    "make_estimate",
    "ratio",
    "reward_baseline",
    "reward_estimate",
    "score_baseline",
    "score_return",
    "second_order_delta_entropy",
    "snis_delta_entropy",
    "snis_delta_reward",
    "steer_prediction",
    "symmetric_difference",
]
