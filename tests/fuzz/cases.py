"""Many broken things, one after another: each is taken or refused in the documented way, and executes nothing."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterable

from mutate import Mutator
from watch import watched

CASES = int(os.environ.get("ENTROPY_PL_FUZZ_CASES", "1000"))
"""Of all targets together; `make fuzz` sets it."""


SHARES = {
    **{"measure": 65, "study_linear_regime": 65, "study_variance": 65, "study_convergence": 65, "words": 80},
    **{"fit quickstart": 10, "fit grpo_gsm8k": 10},
    **{"records.jsonl": 130, "records.jsonl.gz": 130, "page": 2},
    **{"lightning": 130, "optimizer": 130, "adapter": 40, "model": 40, "shards": 38},
}
"""What is broken, and how often out of a thousand: what takes long less often."""


def check(
    target: str,
    case: Callable[[Mutator], tuple[Callable[[], object], list[str]]],
    refusals: tuple[type[Exception], ...] = (ValueError, FileNotFoundError),
    *,
    imports: bool = False,
) -> None:
    """Run the cases.

    Args:
        target: one of ``SHARES``; with a case's number, its seed.
        case: from a mutator to what is to be done, and the names of which an error has to have one.
        refusals: errors that may come of it.
        imports: whether the file may name modules to import.
    """
    wrong: list[str] = []
    for number in range(max(1, CASES * SHARES[target] // 1000)):
        work, names = case(Mutator(f"{target} {number}"))
        try:
            with warnings.catch_warnings(), watched() as seen:
                warnings.simplefilter("ignore")
                work()
        except refusals as error:
            said = str(error)
            if isinstance(error, UnicodeError):  # a ValueError, too, but nobody's answer
                wrong.append(f"{number}: {type(error).__name__}: {said[:300]}")
            elif not any(name in said for name in names if name.strip()):
                wrong.append(f"{number}: names none of {names}: {type(error).__name__}: {said[:300]}")
            if len(said) > 20_000:
                wrong.append(f"{number}: a message of {len(said)} characters")
        except Exception:
            wrong.append(f"{number}: " + "".join(traceback.format_exc(limit=-4))[-1500:])
        wrong += [f"{number}: {event}" for event in seen if not (imports and event.startswith("import of"))]
    assert not wrong, f"{len(wrong)} of {target}, the first ones:\n" + "\n".join(wrong[:12])


def names_in(value: object) -> Iterable[str]:
    """Every key in nested dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from [key] if isinstance(key, str) else []
        yield from names_in(inner)
