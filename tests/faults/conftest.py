from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from six_steps import Steps, records, run


class Uninterrupted(NamedTuple):
    """Of the run that nothing happens to: its records, and the training state after every step."""

    records: list[dict[str, Any]]
    states: list[dict[str, Any]]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    folder, steps = tmp_path_factory.mktemp("uninterrupted"), Steps()
    run(folder, steps)
    return Uninterrupted(records(folder), steps.states)
