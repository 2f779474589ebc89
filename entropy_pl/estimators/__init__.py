"""Arrays in, estimates out: the reducer, its derivatives, and the error bars they share."""

from entropy_pl.estimators.derivatives import first_order_delta_entropy, second_order_delta_entropy
from entropy_pl.estimators.estimate import EntropyChange
from entropy_pl.estimators.snis import Measure, entropy_estimate, snis_delta_entropy

__all__ = [
    "EntropyChange",
    "Measure",
    "entropy_estimate",
    "first_order_delta_entropy",
    "second_order_delta_entropy",
    "snis_delta_entropy",
]
