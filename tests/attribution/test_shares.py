"""Two processes attribute together what one attributes alone, and neither waits for one that failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_processes
from steps import N, take_steps

from entropy_pl import Rollout, token_stats_jvp
from entropy_pl.attribution import Attribution, attribute_update
from entropy_pl.peers import Peers
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.score import compact

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
        **{name: (bar.influence, bar.jackknife) for name, bar in found.over_e.items()},
        "over_u": found.over_u and (found.over_u.influence, found.over_u.jackknife),
    }


def work(rank: int, u_rows: tuple[list[int], list[int]], given: bool, options: dict[str, Any]) -> dict[str, Any]:
    return numbers(attribute(rank, u_rows, given, **options))


@pytest.mark.parametrize(
    ("u_rows", "given", "options"),
    [
        (([0, 1], [2, 3, 4, 5]), False, {}),
        (([], list(range(N))), True, {"method": "central_difference", "weighting": "sequence"}),
        ((list(range(N)), []), False, {"method": "central_difference", "normalize": "per_sequence"}),
    ],
    ids=["uneven", "the first without U", "the second without U"],
)
def test_together_is_as_alone(tmp_path, u_rows, given, options):
    """Both processes have the same result, that of one on the whole batches, to 1e-9 (float64: 1e-13 a sum)."""
    expected = numbers(attribute(None, u_rows, given, **options))
    first, second = run_processes(work, 2, tmp_path, u_rows, given, options)
    assert first == second
    # What is nearly zero beside the whole, and differences, which divide rounding by 1e-3.
    small = 1e-9 * abs(expected["first_order"])
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.tensor(first[name]), torch.tensor(value), rtol=1e-9, atol=small, msg=lambda m, n=name: f"{n}: {m}"
        )


def broken(rank: int, how: str, at: int) -> str:
    """What rank 1 fails of, or that it fails after so many passes; what each of them says."""
    passes = []

    def interrupt(phase: str) -> None:
        passes.append(phase)
        if rank == 1 and len(passes) == at:
            raise MemoryError(f"no room after {phase}")

    try:
        attribute(
            rank,
            ([0, 1], [2, 3, 4, 5]),
            False,
            how if rank == 1 else None,
            on_pass=interrupt,
            method="central_difference",
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "attributed"


@pytest.mark.parametrize(
    ("how", "at", "said"),
    [
        ("nan", 0, "NonFiniteError: expected finite logits"),
        ("shape", 0, "ValueError: expected token_coefficients of the U-batch's shape"),
        ("interrupted", 1, "MemoryError: no room after scoring E"),
        ("interrupted", 2, "MemoryError: no room after gradient of H"),
        ("interrupted", 5, "MemoryError: no room after tangents"),
        ("interrupted", 8, "MemoryError: no room after tangents"),  # the very last
    ],
    ids=["nan", "shape", "scoring", "gradient", "tangents of U", "last tangents of E"],
)
def test_a_failure_reaches_the_other(tmp_path, how, at, said):
    first, second = run_processes(broken, 2, tmp_path, how, at)
    assert second.startswith(said)
    assert first.startswith(f"PeerError: process 1 failed: {said}")


def test_an_error_that_all_make_is_everyones(tmp_path):
    """E's completions are all of one prompt, which says nothing of others: no error bar, and nobody waits."""
    first, second = run_processes(one_prompt, 2, tmp_path)
    assert first == second
    assert first.startswith("ValueError: expected at least 2 clusters for an error bar, got 1")


def one_prompt(rank: int) -> str:
    try:
        attribute(rank, ([0, 1], [2, 3, 4, 5]), False, clusters=torch.zeros(8, dtype=torch.long))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "attributed"
