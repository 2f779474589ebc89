from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"GSM8K is not at {folder}")
    return folder
