"""The pool: drawn once, kept in a file, taken apart by prompts."""

from __future__ import annotations

import pytest
import torch

from entropy_pl.measurements import EntropyMeasurements
from entropy_pl.probe import ProbeScores
from entropy_pl.rollout import TokenStats
from entropy_pl.studies.pool import Pool, pool_order, pool_sizes
from entropy_pl.studies.stored import drawn_once, read_tensors, scored_once, write_tensors
from entropy_pl.updates import UpdateVector


@pytest.mark.parametrize("each", [1, 4])
def test_the_order_keeps_a_prompts_sequences_together(each, settings_of, tmp_path):
    settings = settings_of("variance", tmp_path, {}, batch_config={"completions_per_prompt": each})
    order = pool_order(settings)
    assert sorted(order.tolist()) == list(range(32))
    assert order.tolist() != list(range(32))
    assert torch.equal(order, pool_order(settings))
    prompts = order // each  # the E-batch is prompt-major
    assert (prompts.view(-1, each) == prompts.view(-1, each)[:, :1]).all()


def test_subsets(settings_of, tmp_path):
    pool = Pool(scores(), UpdateVector({}, 1.0), torch.randperm(10, generator=torch.Generator().manual_seed(0)))
    subsets = pool.subsets(4)
    assert [len(subset) for subset in subsets] == [4, 4]
    assert len({*subsets[0].tolist(), *subsets[1].tolist()}) == 8
    assert len(pool.subsets(4, 1)) == 1
    assert set(pool.subsets(2)[0].tolist()) < set(subsets[0].tolist()) < set(pool.subsets(10)[0].tolist())
    assert pool.subsets(10)[0].tolist() == list(range(10))


def test_sizes(settings_of, tmp_path):
    def sizes(chosen, **batch):
        return pool_sizes(settings_of("variance", tmp_path, {}, batch_config=batch), chosen)

    assert sizes(None, B_E=1000) == [64, 128, 256, 512, 1000]
    assert sizes(None, B_E=960, completions_per_prompt=3) == [96, 192, 384, 768, 960]
    assert sizes(None, B_E=32) == [16, 32]
    assert sizes([20, 10], B_E=32) == [10, 20, 32]


def test_the_eta_that_is_shown_is_next_to_the_learning_rate():
    pool = Pool(scores(etas=(-1e-3, 1e-5, 1e-4, 1e-2)), UpdateVector({}, 9e-4), torch.arange(3))
    assert pool.eta_shown == 1e-4  # 9 times less, where 1e-2 is 11 times more; −1e-3 is another direction


def scores(etas=(0.5, 1e-5), features=True) -> ProbeScores:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)

    def stats() -> TokenStats:
        logp, entropy = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
        return TokenStats(logp, entropy, mask)

    return ProbeScores(
        stats(),
        stats(),
        stats(),
        {eta: stats() for eta in etas},
        torch.tensor([0, 1, 0]) if features else None,
        torch.randn(6, 4, generator=generator) if features else None,
        "central_difference",
        0.1 + 0.2,
        {"sweep": 1.5},
    )


@pytest.mark.parametrize("features", [True, False])
def test_scores_come_back_to_the_bit_and_are_made_once(features, tmp_path):
    made, calls = scores(features=features), []

    def score() -> ProbeScores:
        calls.append(1)
        return made

    for _ in range(2):
        found = scored_once(tmp_path / "folder" / "scores.safetensors", score)
        for name in ("base", "tangent", "curvature"):
            same_stats(getattr(found, name), getattr(made, name))
        assert list(found.shifted) == list(made.shifted)
        for eta, stats in made.shifted.items():
            same_stats(found.shifted[eta], stats)
        for name in ("clusters", "features"):
            one, other = getattr(found, name), getattr(made, name)
            assert (one is None and other is None) or (torch.equal(one, other) and one.dtype == other.dtype)
        for name in ("method", "difference_step", "seconds"):
            assert getattr(found, name) == getattr(made, name)
    assert len(calls) == 1


def same_stats(one: TokenStats, other: TokenStats) -> None:
    assert torch.equal(one.logp, other.logp)
    assert torch.equal(one.entropy, other.entropy)
    assert torch.equal(one.mask, other.mask)


def test_a_half_written_file_is_not_taken_for_one(tmp_path):
    (tmp_path / "x.safetensors.tmp").write_bytes(b"half a file")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(3)}, {"eta": 1e-5})
    tensors, facts = read_tensors(tmp_path / "x.safetensors")
    assert (tensors["a"].tolist(), facts) == ([0, 1, 2], {"eta": 1e-5})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_batches_come_back_to_the_bit_and_are_drawn_once(settings_of, tmp_path, monkeypatch):
    settings = settings_of("variance", tmp_path, {}, batch_config={"completions_per_prompt": 2})
    measurements = EntropyMeasurements(settings)
    made = measurements.draw()
    monkeypatch.setattr(measurements, "draw", lambda settings, on_pass: made)
    found = drawn_once(tmp_path / "drawn.safetensors", measurements, settings, on_pass=print)
    monkeypatch.setattr(measurements, "draw", None)
    again = drawn_once(tmp_path / "drawn.safetensors", measurements, settings, on_pass=print)
    for drawn in (found, again):
        for name, tensor in made.rollout.tensors.items():
            assert torch.equal(getattr(drawn.rollout, name), tensor)
        vector = made.update.vector
        assert drawn.update.vector.lr == vector.lr
        assert drawn.update.vector.direction.keys() == vector.direction.keys()
        assert all(torch.equal(value, vector.direction[name]) for name, value in drawn.update.vector.direction.items())
        assert (drawn.prompts, drawn.update.facts) == (made.prompts, made.update.facts)
