"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with a number as the answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_pl.data.numbers import parse_number
from entropy_pl.data.registry import R1_TEMPLATE, PromptExample, register_dataset

HUB_NAME, HUB_CONFIG = "openai/gsm8k", "main"
COLUMNS = ("question", "answer")


@register_dataset("gsm8k_r1_template", template=R1_TEMPLATE)
def load_gsm8k(split: str, *, path: str | None, size: int | None, seed: int) -> list[PromptExample]:
    """Read GSM8K, or any dataset of its form, from the hub or from a local folder.

    Args:
        split: ``train`` or ``test``.
        path: folder with ``{split}.jsonl``, one ``{"question": …, "answer": "… #### 42"}`` per line; None: the hub.
        size: keep the first so many rows; None: all.
        seed: unused, rows keep their order.

    Returns:
        Questions with the number after ``####`` (or the whole answer, where it is a number), commas removed.

    Raises:
        FileNotFoundError: if the folder or its ``{split}.jsonl`` is missing.
        ConnectionError: if the hub cannot be reached.
        ValueError: if a file is empty or not JSON lines, a row has no ``question`` and ``answer``, or an answer is
            not a number.
    """
    rows = _hub_rows(split) if path is None else _folder_rows(Path(path).expanduser(), split)
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        source = path or HUB_NAME
        raise ValueError(f"expected rows with {list(COLUMNS)} in {source}, got columns {sorted(rows.column_names)}")
    rows = rows if size is None else rows.select(range(min(size, len(rows))))
    return [_example(row, index) for index, row in enumerate(rows)]


def _hub_rows(split: str) -> Any:
    from datasets import load_dataset  # pandas and pyarrow come with it: seconds that other datasets need not pay

    try:
        return load_dataset(HUB_NAME, HUB_CONFIG, split=split)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"expected {HUB_NAME} from the Hugging Face hub, got {type(error).__name__}; "
            "set dataset_path to a folder with train.jsonl and test.jsonl to read it from disk"
        ) from error


def _folder_rows(folder: Path, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    file = folder / f"{split}.jsonl"
    if not folder.is_dir():
        raise FileNotFoundError(f"expected dataset_path to be a folder with {file.name}, got {folder}, no such folder")
    if not file.is_file():
        there = sorted(other.name for other in folder.iterdir())
        raise FileNotFoundError(f"expected {file.name} in {folder}, found {there}")
    if not file.stat().st_size:
        raise ValueError(f"expected a question and an answer per line in {file}, got an empty file")
    try:
        return load_dataset("json", data_files={split: str(file)}, split=split)
    except (DatasetGenerationError, ValueError) as error:  # by the version of datasets
        raise ValueError(
            f"expected JSON lines with a question and an answer in {file}, got {error.__cause__ or error}"
        ) from error


def _example(row: Mapping[str, Any], index: int) -> PromptExample:
    text = str(row["answer"]).rpartition("####")[2]
    number = parse_number(text)
    if row["question"] is None or number is None:
        raise ValueError(
            f"expected a question, and an answer that ends in '#### <number>', got question {row['question']!r} "
            f"and answer {row['answer']!r} in row {index}"
        )
    return PromptExample(question=row["question"], answer=f"{number:f}")
