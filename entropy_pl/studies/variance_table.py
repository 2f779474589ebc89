"""From estimates on subsets of a pool to variances, ratios and coverage: arithmetic on tables alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

QUANTITY = ["quantity", "eta"]
VARIANCES = ("influence", "jackknife", "empirical")


def variance_table(
    subsets: pd.DataFrame, on_pool: pd.DataFrame, *, size: int, reference: str, compared_to: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of the variance study.

    Args:
        subsets: one row per option, quantity, η, N and subset: ``value``, ``stderr``, ``ci_low``, ``ci_high``,
            ``stderr_jackknife``.
        on_pool: one row per option, quantity and η, of the whole pool.
        size: N of the pool.
        reference: option whose estimate on the whole pool stands for the truth.
        compared_to: option whose variances are the unit of the ratios.

    Returns:
        One row per option, quantity, η and N; and ``on_pool`` with the whole pool's jackknife.
    """
    subsets = subsets.merge(_references(on_pool, reference), on=["option", *QUANTITY], how="left")
    groups = subsets.assign(**_covered(subsets, size)).groupby(["option", *QUANTITY, "n"], sort=False, dropna=False)
    table = pd.DataFrame([_summary(*group) for group in groups])
    for kind in VARIANCES:
        table[f"ratio_{kind}"] = _ratio(table, f"variance_{kind}", compared_to, [*QUANTITY, "n"])

    jackknifed = subsets.loc[subsets["n"] == size, ["option", *QUANTITY, "stderr_jackknife"]]
    on_pool = on_pool.merge(jackknifed, on=["option", *QUANTITY], how="left")
    squared = on_pool.assign(square=on_pool["stderr_jackknife"] ** 2)
    on_pool["variance_ratio_jackknife"] = _ratio(squared, "square", compared_to, QUANTITY)
    return table, on_pool


def _references(on_pool: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Of every option and quantity: the reference's value, and the noise of the option's difference from it."""
    values = on_pool.loc[on_pool["option"] == reference, [*QUANTITY, "value"]].rename(columns={"value": "reference"})
    return on_pool[["option", *QUANTITY, "difference_stderr"]].merge(values, on=QUANTITY, how="left")


def _covered(subsets: pd.DataFrame, size: int) -> dict[str, pd.Series]:
    """Whether every subset's interval holds the reference; NaN for more than half the pool.

    Of a subset's distance to the reference, the part between subset and pool has the variance SE²(1 − N/pool), and the
    part between option and reference on the pool ``difference_stderr``²; the two do not correlate.
    """
    distance = (subsets["value"] - subsets["reference"]).abs()
    margin = (subsets["ci_high"] - subsets["ci_low"]) / 2
    share = 1 - subsets["n"] / size + (subsets["difference_stderr"] / subsets["stderr"]) ** 2
    small = subsets["n"] <= size / 2
    return {
        "coverage": (distance <= margin * np.sqrt(share)).where(small).astype(float),
        "coverage_uncorrected": (distance <= margin).where(small).astype(float),
    }


def _summary(key: tuple[object, ...], group: pd.DataFrame) -> dict[str, object]:
    n, count = int(group["n"].iloc[0]), len(group)
    influence, jackknife = group["stderr"] ** 2, group["stderr_jackknife"] ** 2
    return {
        **dict(zip(["option", *QUANTITY], key, strict=False)),
        "n": n,
        "n_subsets": count,
        "mean": group["value"].mean(),
        "variance_influence": n * influence.mean(),
        "variance_jackknife": n * jackknife.mean(),
        "n_jackknife": int(jackknife.count()),
        "jackknife_to_influence": jackknife.mean() / influence[jackknife.notna()].mean(),
        "variance_empirical": n * group["value"].var(),  # NaN of one subset
        "variance_empirical_relative_sd": np.sqrt(2 / (count - 1)) if count > 1 else np.nan,
        "coverage": group["coverage"].mean(),
        "coverage_uncorrected": group["coverage_uncorrected"].mean(),
    }


def _ratio(table: pd.DataFrame, column: str, compared_to: str, keys: list[str]) -> pd.Series:
    """A column over the compared option's, row by row."""
    of_other = table.loc[table["option"] == compared_to, [*keys, column]]
    return table[column] / table[keys].merge(of_other, on=keys, how="left")[column].to_numpy()
