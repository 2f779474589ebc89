"""Who moved the entropy: components of a step, sequences, tokens."""

from entropy_pl.attribution.batch import UpdateBatch
from entropy_pl.attribution.blocks import token_standard_errors
from entropy_pl.attribution.counterfactual import counterfactual_update
from entropy_pl.attribution.errors import ErrorBar
from entropy_pl.attribution.fisher import KernelSummary, fisher_kernel, fisher_kernel_cost, kernel_summary
from entropy_pl.attribution.influence import attribute_update
from entropy_pl.attribution.kernel import KernelCost
from entropy_pl.attribution.matrix import InfluenceMatrix, influence_matrix, influence_matrix_cost
from entropy_pl.attribution.parts import Attribution
from entropy_pl.attribution.predictors import Predictor, compare_predictors

__all__ = [
    "Attribution",
    "ErrorBar",
    "InfluenceMatrix",
    "KernelCost",
    "KernelSummary",
    "Predictor",
    "UpdateBatch",
    "attribute_update",
    "compare_predictors",
    "counterfactual_update",
    "fisher_kernel",
    "fisher_kernel_cost",
    "influence_matrix",
    "influence_matrix_cost",
    "kernel_summary",
    "token_standard_errors",
]
