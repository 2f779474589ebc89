"""Two processes attribute together what one attributes alone, and neither waits for one that failed."""

from __future__ import annotations

from typing import Any

import torch
from processes import run_processes
from steps import N, take_steps

from entropy_pl import Rollout, token_stats_jvp
from entropy_pl.attribution import Attribution, attribute_update
from entropy_pl.peers import Peers
from entropy_pl.policy.micro_batches import compact
from entropy_pl.policy.precision import float64_evaluation

E_ROWS = ([0, 1, 2], [3, 4, 5, 6, 7])  # of 8


def share(rollout: Rollout, rows: list[int]) -> Rollout:
    """A process's rows, as narrow as they are; none is an empty rollout."""
    return compact(rollout, torch.tensor(rows)) if rows else Rollout.empty()


def attribute(
    rank: int | None, u_rows: tuple[list[int], list[int]], given: bool, breaks: str | None = None, **options: Any
) -> Attribution:
    """With ``rank`` None, all rows in one process."""
    step = take_steps(loss_type="dapo", max_norm=0.05, beta=0.1, entropy_bonus=0.05)
    entropy_coefficients = -0.05 * step.u.completion_mask / step.u.completion_mask.sum()
    e, u, peers = step.e, step.u, Peers()
    coefficients = [step.coefficients, entropy_coefficients]
    with float64_evaluation(step.model):
        if given:
            base, tangent = token_stats_jvp(step.model, step.e, step.update)
            options |= {"base": base, "tangent": tangent, "baseline": 0.1 * base.entropy}
        if rank is not None:
            e, u, peers = share(e, E_ROWS[rank]), share(u, u_rows[rank]), Peers.of_this_run()
            width = u.completion_mask.shape[1]
            coefficients = [x[torch.tensor(u_rows[rank], dtype=torch.long), :width] for x in coefficients]
        if breaks == "shape":
            coefficients[0] = coefficients[0][:, :1]
        if breaks == "nan":
            step.model.lm_head.weight.data[0, 0] = torch.nan
        return attribute_update(
            step.model,
            e,
            u,
            step.update,
            token_coefficients=coefficients[0],
            gradient_scale=step.scale,
            entropy_coefficients=coefficients[1],
            divided_by="tokens",
            peers=peers,
            **options,
        )


def numbers(found: Attribution) -> dict[str, Any]:
    """Everything an attribution says, as lists and floats."""
    return {
        "per_token": found.per_token.tolist(),
        "logp": found.stats.logp.tolist(),
        "mask": found.stats.mask.tolist(),
        **{name: getattr(found, name) for name in ("momentum", "weight_decay", "gradient", "first_order")},
        **found.remainder,
        **{f"over E of {name}": (bar.influence, bar.jackknife) for name, bar in found.over_e.items()},
        **{f"over U of {name}": (bar.influence, bar.jackknife) for name, bar in found.over_u.items()},
    }


CASES = {
    "uneven": (([0, 1], [2, 3, 4, 5]), False, {}),
    "the first without U": (([], list(range(N))), True, {"method": "central_difference", "weighting": "sequence"}),
    "the second without U": (
        (list(range(N)), []),
        False,
        {"method": "central_difference", "normalize": "per_sequence"},
    ),
}


def work(rank: int) -> dict[str, dict[str, Any]]:
    return {case: numbers(attribute(rank, u_rows, given, **more)) for case, (u_rows, given, more) in CASES.items()}


def test_together_is_as_alone(tmp_path):
    """Both processes have the same result, that of one on the whole batches, to 1e-9 (float64: 1e-13 a sum)."""
    first, second = run_processes(work, 2, tmp_path)
    assert first == second
    for case, (u_rows, given, more) in CASES.items():
        expected = numbers(attribute(None, u_rows, given, **more))
        assert first[case].keys() == expected.keys()
        # What is nearly zero beside the whole, and differences, which divide rounding by 1e-3.
        small = 1e-9 * abs(expected["first_order"])
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.tensor(first[case][name]),
                torch.tensor(value),
                rtol=1e-9,
                atol=small,
                msg=lambda m, where=(case, name): f"{where}: {m}",
            )


# What rank 1 fails of, or after how many passes; what it then says.
FAILURES = {
    "nan": "NonFiniteError: expected finite logits",
    "shape": "ValueError: expected token_coefficients of the U-batch's shape",
    1: "MemoryError: no room after scoring E",
    2: "MemoryError: no room after gradient of H",
    5: "MemoryError: no room after tangents",
    8: "MemoryError: no room after tangents",  # the last pass of all
}


def fail(rank: int) -> list[str]:
    """What a process says of each failure, one after another: they stay in step."""
    said = []
    for failure in FAILURES:
        passes = []

        def interrupt(phase: str, failure=failure, passes=passes) -> None:
            passes.append(phase)
            if rank == 1 and len(passes) == failure:
                raise MemoryError(f"no room after {phase}")

        breaks = failure if rank == 1 and isinstance(failure, str) else None
        options = {"on_pass": interrupt, "method": "central_difference"}
        said.append(outcome(rank, breaks=breaks, **options))
    # Of one prompt nothing can be said of others: no error bar over E, anywhere.
    return [*said, outcome(rank, clusters=torch.zeros(8, dtype=torch.long))]


def outcome(rank: int, **options: Any) -> str:
    try:
        attribute(rank, ([0, 1], [2, 3, 4, 5]), False, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "attributed"


def test_a_failure_reaches_the_other(tmp_path):
    first, second = run_processes(fail, 2, tmp_path)
    for mine, theirs, said in zip(second, first, FAILURES.values(), strict=False):
        assert mine.startswith(said)
        assert theirs.startswith(f"PeerError: process 1 failed: {said}")
    assert first[-1] == second[-1]
    assert first[-1].startswith("ValueError: expected at least 2 clusters for an error bar, got 1")
