"""Repeated measurements with a table, figures and a report: linear regime, variance, convergence.

A study's config is a measurement's with a section ``study`` of its own. It works cell by cell, and what is finished is
on the disk: killed at any moment and started again, it goes on where it was and ends with the same tables.

Example:
    study = STUDIES["convergence"]
    outcome = study.run(SettingsParser(study.settings).read("configs/study_convergence.yaml"))
    print(outcome.text)
"""

from entropy_pl.studies import convergence, linear_regime, variance
from entropy_pl.studies.study import Study, StudyOutcome, StudySettings

STUDIES: dict[str, Study] = {study.name: study for study in (linear_regime.STUDY, variance.STUDY, convergence.STUDY)}
"""The studies by name, as `entropy-pl study` knows them."""

__all__ = ["STUDIES", "Study", "StudyOutcome", "StudySettings"]
