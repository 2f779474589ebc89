"""Which adapter is measured, what a step of it is read from, and which others an optimizer trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build_model

from entropy_pl.policy.measured_adapter import MeasuredAdapter

IDS = torch.tensor([[5, 6, 7, 8]])


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**(settings | options))


def build(*names: str, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(build_model(), lora(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(**options))
    return model.eval()


def of(model: PeftModel, *names: str) -> list[torch.nn.Parameter]:
    return [p for n, p in model.named_parameters() if any(f".{name}." in n or n.endswith(f".{name}") for name in names)]


def watched(measured: MeasuredAdapter, model: PeftModel) -> set[str]:
    watches = measured.watches()
    return {name for name, parameter in model.named_parameters() if watches(parameter)}


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_what_was_active_at_the_start_acts_whatever_was_active_last():
    """One adapter, a combination of two, and all of them off; against the very logits of the start."""
    model = build("a", "b", "c")
    for begin in (
        lambda: model.set_adapter("a"),
        lambda: model.base_model.set_adapter(["a", "c"]),
        lambda: model.base_model.disable_adapter_layers(),
    ):
        begin()
        measured, expected = MeasuredAdapter(model), logits(model)
        model.base_model.enable_adapter_layers()
        model.set_adapter("b")
        other = logits(model)
        assert not torch.equal(other, expected)
        with measured.active():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), other)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}])
def test_the_step_is_read_from_the_measured_adapter(options):
    model = build("a", "b", **options)
    measured = MeasuredAdapter(model)
    mine = watched(measured, model)
    assert mine == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.set_adapter("b")
    assert watched(measured, model) == mine
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with measured.active():  # a gradient with respect to it can be had
        assert {
            name for name, parameter in model.named_parameters() if name in mine and parameter.requires_grad
        } == mine
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    named = MeasuredAdapter(model, "a")
    assert named.names == ["a"]
    assert watched(named, model) == mine
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_of_a_combination_each_is_read_and_a_frozen_one_is_not():
    model = build("a", "b", "c")
    model.base_model.set_adapter(["a", "c"])
    for parameter in of(model, "c"):
        parameter.requires_grad_(False)
    measured = MeasuredAdapter(model)
    assert measured.names == ["a", "c"]
    assert watched(measured, model) == {n for n, _ in model.named_parameters() if ".a." in n}


def test_a_policy_without_adapters_is_left_alone():
    model = build_model()
    measured = MeasuredAdapter(model)
    assert measured.names == []
    with measured.active():
        assert watched(measured, model) == {name for name, _ in model.named_parameters()}
    assert measured.others_in([torch.optim.SGD(model.parameters(), lr=1.0)]) == []


def test_other_adapters_that_are_trained_are_named_and_frozen_ones_are_not():
    model = build("a", "b", "ref")
    measured = MeasuredAdapter(model)

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(parameters), lr=1e-3)

    turns, everything = sgd(of(model, "a", "b", "ref")), sgd(model.parameters())
    assert measured.others_in([turns]) == []  # nothing tells yet that b, which is off, is not frozen
    model.set_adapter("b")
    assert measured.others_in([sgd(of(model, "a"))]) == []  # TRL's reference is in no optimizer
    assert measured.others_in([turns]) == measured.others_in([sgd(of(model, "a")), sgd(of(model, "b"))]) == ["b"]
    model(input_ids=IDS, labels=IDS).loss.backward()
    everything.step()
    model.set_adapter("a")
    assert measured.others_in([turns]) == ["b"]  # it has a gradient
    everything.zero_grad()
    assert measured.others_in([turns]) == []
    assert measured.others_in([everything]) == ["b"]  # it has been stepped


def test_a_merged_adapter_is_refused_and_left_merged():
    model = build("a", "b")
    measured = MeasuredAdapter(model)
    model.merge_adapter()
    before = logits(model)
    with pytest.raises(ValueError, match=r"'a' merged into them.*unmerge_adapter"), measured.active():
        pass
    assert torch.equal(logits(model), before)
    for parameter in of(model, "a"):  # the base weights are trained, and the adapter is a part of them
        parameter.requires_grad_(False)
    with measured.active():
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="merged"):
        MeasuredAdapter(model, "b")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'a', 'b'"):
        MeasuredAdapter(build("a", "b"), "c")
    with pytest.raises(ValueError, match="no adapters"):
        MeasuredAdapter(build_model(), "c")
