import random

import numpy as np
import pytest
import torch

from entropy_pl.policy.rng import isolated_rng


def draw() -> list[float]:
    """One number of every stream, with odd-sized draws that leave cached halves behind (Box-Muller)."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def own_streams():
    with isolated_rng():
        yield


@pytest.mark.parametrize("seed", [None, 0, 7, 2**63])
def test_outer_streams_go_on_as_if_nothing_had_been_drawn(seed):
    seed_all(5)
    draw()
    expected = [draw() for _ in range(3)]
    seed_all(5)
    draw()
    got = []
    for _ in range(3):
        with isolated_rng(seed):
            draw()
            torch.manual_seed(99)
        got.append(draw())
    assert got == expected


def test_streams_come_back_after_an_error():
    seed_all(5)
    expected = draw()
    seed_all(5)
    with pytest.raises(ZeroDivisionError), isolated_rng(1):
        draw()[0] / 0
    assert draw() == expected


def test_same_seed_same_draws_and_another_seed_others():
    draws = []
    for seed in (3, 3, 4):
        with isolated_rng(seed):
            draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_without_a_seed_the_present_streams_continue():
    seed_all(5)
    expected = draw()
    seed_all(5)
    with isolated_rng():
        assert draw() == expected


def test_contexts_nest():
    with isolated_rng(1):
        expected = draw()
    with isolated_rng(1):
        with isolated_rng(2):
            draw()
        assert draw() == expected


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=r"expected a seed from 0 to 2\*\*64 - 1"), isolated_rng(seed):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_stream_is_restored_and_seeded():
    torch.cuda.init()
    torch.cuda.manual_seed_all(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed_all(5)
    inside = []
    for _ in range(2):
        with isolated_rng(1):
            inside.append(torch.rand(3, device="cuda"))
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    assert torch.equal(*inside)
