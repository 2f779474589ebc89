from __future__ import annotations

import math

import pytest
import torch

from entropy_pl.updates import UpdateVector


def vector(*numbers: float, **options) -> UpdateVector:
    a, b, c = numbers
    return UpdateVector({"w": torch.tensor([a, b]), "b": torch.tensor([[c]])}, lr=0.1, **options)


def test_norm_and_dot():
    assert vector(2.0, 3.0, 6.0).norm() == 7.0
    assert vector(1.0, 2.0, 3.0).dot(vector(4.0, -5.0, 6.0)) == 4 - 10 + 18
    assert vector(0.0, 0.0, 0.0).norm() == 0
    assert UpdateVector({}, lr=1.0).norm() == 0
    assert isinstance(vector(1.0, 2.0, 3.0).dot(vector(1.0, 0.0, 0.0)), float)


def test_sums_are_taken_in_float64():
    """A float32 sum of 1 and a million times 1e-8 stays at 1."""
    numbers = torch.full((1_000_001,), 1e-4)
    numbers[0] = 1.0
    # 1e-4 is a float32 here: its square is off by 1e-7 of 1e-8.
    assert UpdateVector({"w": numbers}, lr=1.0).norm() == pytest.approx(math.sqrt(1.01), rel=1e-8)


def test_dot_in_any_order_of_names():
    v = vector(1.0, 2.0, 3.0)
    turned = UpdateVector(dict(reversed(v.direction.items())), lr=0.1)
    assert v.dot(turned) == v.dot(v) == 14


def test_dot_of_other_parameters():
    with pytest.raises(
        ValueError, match=r"two updates of the same parameters, got \['b', 'other'\] in one of them only"
    ):
        vector(1.0, 2.0, 3.0).dot(UpdateVector({"w": torch.zeros(2), "other": torch.zeros(1)}, lr=0.1))


def test_scaled():
    parts = {"momentum": vector(1.0, 0.0, 0.0).direction, "gradient": vector(0.0, 2.0, 3.0).direction}
    preconditioner = vector(0.5, 0.5, 0.5).direction
    v = vector(1.0, 2.0, 3.0, components=parts, preconditioner=preconditioner)
    scaled = v.scaled(-2.0)
    assert scaled.lr == 0.1
    assert scaled.direction["w"].tolist() == [-2, -4]
    assert scaled.components["gradient"]["b"].tolist() == [[-6]]
    assert scaled.preconditioner["w"].tolist() == [-1, -1]
    assert scaled.gap() == v.gap() == 0
    assert v.direction["w"].tolist() == [1, 2]
    assert vector(1.0, 2.0, 3.0).scaled(2.0).components is None


def test_along_a_gradient_by_hand():
    parts = {"momentum": {"w": torch.tensor([1.0, 0.0])}, "gradient": vector(0.0, 2.0, 3.0).direction}
    gradient = {"w": torch.tensor([5.0, -7.0]), "b": torch.tensor([[11.0]]), "of another": torch.ones(3)}
    whole, by_part = vector(1.0, 2.0, 3.0, components=parts).along(gradient)
    assert whole == 5 - 14 + 33
    assert by_part == {"momentum": 5, "gradient": -14 + 33}
    assert vector(1.0, 2.0, 3.0).along(gradient) == (whole, {})


def test_gap_is_what_the_parts_leave():
    parts = {"gradient": vector(2.0, 3.0, 0.0).direction}
    assert vector(2.0, 3.0, 6.0, components=parts).gap() == pytest.approx(6 / 7)
    # A part that says nothing of a parameter leaves all of it.
    assert vector(2.0, 3.0, 6.0, components={"gradient": {"w": torch.tensor([2.0, 3.0])}}).gap() == pytest.approx(6 / 7)
    assert vector(0.0, 0.0, 0.0, components={}).gap() == 0
    assert vector(1.0, 1.0, 1.0).gap() is None
