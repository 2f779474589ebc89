from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from tiny import build_model
from torch import nn
from torch.autograd.graph import get_gradient_edge

from entropy_pl.updates import UpdateVector, displaced, parameters_set_to


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2).to(dtype)


def direction(model: nn.Module) -> UpdateVector:
    generator = torch.Generator().manual_seed(1)
    return UpdateVector(
        {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}, lr=0.1
    )


def state(model: nn.Module) -> dict[str, object]:
    return {n: (id(p), p.data_ptr(), p.dtype, p.tolist(), id(p.grad)) for n, p in model.named_parameters()}


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eta", [1e-5, -0.3, 7.0])
def test_formed_exactly_and_rounded_once(dtype, eta):
    """Against exact fractions, rounded to float64 and from there to the dtype held."""
    model = linear(dtype)
    update, wide = direction(model), torch.promote_types(dtype, torch.float32)
    expected = {}
    for name, parameter in model.named_parameters():
        numbers = zip(parameter.flatten().tolist(), update.direction[name].flatten().tolist(), strict=True)
        exact = [float(Fraction(theta) + Fraction(eta) * Fraction(v)) for theta, v in numbers]
        expected[name] = torch.tensor(exact, dtype=torch.float64).reshape(parameter.shape)
    with displaced(model, update, eta):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == wide
            if wide is torch.float64:  # a product and a sum, rounded apart
                torch.testing.assert_close(parameter.detach(), expected[name], rtol=3e-16, atol=3e-16 * abs(eta))
            else:
                assert torch.equal(parameter, expected[name].to(wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_very_tensors_are_back(dtype):
    model = linear(dtype)
    model(torch.ones(1, 3, dtype=dtype)).sum().backward()
    before = state(model)
    with displaced(model, direction(model), 0.5):
        assert all(p.data_ptr() != before[n][1] for n, p in model.named_parameters())
        model.weight.data.fill_(7.0)  # what is done inside stays inside
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_an_error_too(dtype):
    model = linear(dtype)
    before = state(model)
    with pytest.raises(RuntimeError, match="inside"), displaced(model, direction(model), 0.5):
        raise RuntimeError("inside")
    assert state(model) == before


def test_nested():
    model = linear()
    update, before = direction(model), state(model)
    with displaced(model, update, 0.25):
        middle = state(model)
        with displaced(model, update, -0.25):
            # There and back in two float32 roundings.
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.detach(), torch.tensor(before[name][3]))
        assert state(model) == middle
    assert state(model) == before


def test_parameters_left_out_do_not_move():
    model = linear()
    before = state(model)
    with displaced(model, UpdateVector({"bias": torch.ones(2)}, lr=1.0), 0.5):
        assert state(model)["weight"] == before["weight"]
        assert model.bias.tolist() == [pytest.approx(b + 0.5) for b in before["bias"][3]]


def test_tied_weights_move_together():
    model = build_model(tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    update = UpdateVector({name: torch.ones_like(model.lm_head.weight)}, lr=1.0)
    before = model.lm_head.weight.detach().clone()
    with displaced(model, update, 1.0):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model.lm_head.weight.detach(), before + 1)
    assert torch.equal(model.lm_head.weight, before)


def test_gradient_accumulators_are_kept():
    """Hooks on them are how DDP reduces gradients; only a change of dtype would lose them."""
    model = linear()
    nodes = {n: get_gradient_edge(p).node for n, p in model.named_parameters()}
    with displaced(model, direction(model), 0.5):
        pass
    assert all(get_gradient_edge(p).node is nodes[n] for n, p in model.named_parameters())


def test_a_gradient_at_the_displaced_point():
    model = linear()
    update = direction(model)
    model.weight.grad = torch.full_like(model.weight, 3.0)
    x = torch.tensor([[1.0, -2.0, 0.5]])
    with displaced(model, update, 0.5):
        (gradient,) = torch.autograd.grad(model(x).square().sum() / 2, [model.weight])
        expected = model(x).detach().T @ x
    torch.testing.assert_close(gradient, expected)
    assert model.weight.grad.eq(3.0).all()


class TestSetTo:
    def test_values(self):
        model = linear()
        before = state(model)
        with parameters_set_to(model, {"bias": torch.tensor([1.0, 2.0])}):
            assert model.bias.tolist() == [1, 2]
        assert state(model) == before

    def test_unknown_names(self):
        model = linear()
        before = state(model)
        values = {"bias": torch.zeros(2), "nope": torch.zeros(1), "gone": torch.zeros(1)}
        with (
            pytest.raises(KeyError, match=r"names of the model's parameters, got \['gone', 'nope'\] \(2 unknown\)"),
            parameters_set_to(model, values),
        ):
            pass
        assert state(model) == before
        with (
            pytest.raises(KeyError, match=r"got \['nope'\]"),
            displaced(model, UpdateVector({"nope": torch.zeros(1)}, lr=1.0), 1.0),
        ):
            pass

    def test_shapes(self):
        model = linear()
        before = state(model)
        values = {"bias": torch.zeros(2), "weight": torch.zeros(3, 2)}
        with (
            pytest.raises(ValueError, match=r"expected weight of shape \[2, 3\], got \[3, 2\]"),
            parameters_set_to(model, values),
        ):
            pass
        assert state(model) == before
