"""Do two runs say the same to the last digit? ``python -m tests.compare_runs FOLDER_A FOLDER_B`` lists what differs.

For a change that must change no number: make one run with the code of before and one with the code of after, with the
same config and seed, and compare their records. Each folder holds ``entropy_probe/records.jsonl``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = ("seconds", "overhead", "memory")  # of the machine and the moment, never equal


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, text and null of a record, with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}" if path else str(key))
        if not value:
            yield path, type(value).__name__
    elif path.split(".")[0] not in TIMES:
        yield path, value


def differences(first: Path, second: Path) -> list[str]:
    """One line for each field that is not the same in both, and for each that only one of them has."""
    found = []
    texts = [(folder / "entropy_probe/records.jsonl").read_text().splitlines() for folder in (first, second)]
    if len(texts[0]) != len(texts[1]):
        found.append(f"{len(texts[0])} and {len(texts[1])} records")
    for lines in zip(*texts, strict=False):
        one, other = (dict(leaves(json.loads(line))) for line in lines)
        step = one.get("step")
        for path in sorted(one.keys() | other.keys()):
            if path not in one or path not in other:
                found.append(f"step {step}, {path}: only in the {'first' if path in one else 'second'}")
            elif one[path] != other[path]:
                found.append(f"step {step}, {path}: {one[path]!r} and {other[path]!r}")
    return found


if __name__ == "__main__":
    said = differences(*map(Path, sys.argv[1:3]))
    print("\n".join(said) or "no difference")
    sys.exit(bool(said))
