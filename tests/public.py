"""The public names: what each package's ``__all__`` promises."""

from __future__ import annotations

from importlib import import_module

PACKAGES = (
    "entropy_pl",
    "entropy_pl.attribution",
    "entropy_pl.callbacks",
    "entropy_pl.callbacks.trl",
    "entropy_pl.data",
    "entropy_pl.estimators",
    "entropy_pl.measurements",
    "entropy_pl.objectives",
    "entropy_pl.policy",
    "entropy_pl.probe",
    "entropy_pl.records",
    "entropy_pl.reporting",
    "entropy_pl.runs",
    "entropy_pl.studies",
    "entropy_pl.updates",
)


def public_names() -> list[str]:
    """Every public name, with its package before it; TRL's only where TRL's own dependencies are installed."""
    return [f"{package}.{name}" for package in PACKAGES for name in import_module(package).__all__]
