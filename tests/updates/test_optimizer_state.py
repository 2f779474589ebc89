"""Every parameter finds its own moments and hyper-parameters: the live optimizer knows them by identity."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tiny import build_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam
from transformers import Trainer

from entropy_pl.updates import MatchedState, match_optimizer_state


def lora() -> PeftModel:
    return get_peft_model(build_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def stepped(optimizer: Optimizer, without: Sequence[nn.Parameter] = ()) -> Optimizer:
    """After two steps that make the moments of every parameter unlike all others'; some have no gradient."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for group in optimizer.param_groups:
            for p in group["params"]:
                skipped = not p.requires_grad or any(p is other for other in without)
                p.grad = None if skipped else torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return optimizer


def assert_matched(state: MatchedState, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """By identity of the parameters, and moments' numbers."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert state.names() == set(parameters)
    assert sum(len(group.moments) for group in state.groups) == len(parameters)
    for group in state.groups:
        for name, moments in group.moments.items():
            expected = group_of[id(parameters[name])]
            for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"):
                if key in expected:  # torch < 2.7 does not say how it decays
                    assert getattr(group.settings, key) == expected[key]
            entry = optimizer.state.get(parameters[name])
            assert (moments is None) == (not entry)
            if moments is not None:
                assert moments.step == entry["step"].item()
                assert torch.equal(moments.exp_avg, entry["exp_avg"])
                assert torch.equal(moments.exp_avg_sq, entry["exp_avg_sq"])


def layers(*shapes: tuple[int, ...]) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": torch.zeros(shape) for i, shape in enumerate(shapes)})


class TestByPosition:
    @pytest.mark.parametrize("kind", [Adam, AdamW])
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_one_group(self, kind, amsgrad):
        model = lora()
        optimizer = stepped(kind(trainable(model).values(), lr=0.1, amsgrad=amsgrad))
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert state.matched_by == "position"
        assert_matched(state, optimizer, trainable(model))
        if amsgrad:
            for name, moments in state.groups[0].moments.items():
                expected = optimizer.state[trainable(model)[name]]["max_exp_avg_sq"]
                assert torch.equal(moments.max_exp_avg_sq, expected)

    def test_parameters_without_gradient(self):
        model = lora()
        optimizer = stepped(AdamW(trainable(model).values()), without=list(trainable(model).values())[2:4])
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert state.matched_by == "position"
        assert_matched(state, optimizer, trainable(model))

    def test_frozen_parameters_in_the_optimizer(self):
        """As LightningCLI hands them over: all of the model, its frozen base included."""
        model = lora()
        optimizer = stepped(AdamW(model.parameters()))
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert state.matched_by == "position"
        assert_matched(state, optimizer, trainable(model))

    def test_a_group_of_frozen_parameters_is_left_out(self):
        model = lora()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        groups = [{"params": frozen, "lr": 9.0}, {"params": list(trainable(model).values())}]
        state = match_optimizer_state(stepped(AdamW(groups, lr=0.1)).state_dict(), trainable(model))
        assert [group.settings.lr for group in state.groups] == [0.1]

    def test_before_any_step(self):
        model = lora()
        optimizer = AdamW(trainable(model).values())
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert_matched(state, optimizer, trainable(model))
        assert set(state.groups[0].moments.values()) == {None}

    def test_before_any_step_groups_must_be_alike(self):
        """Nothing tells which of them is decayed."""
        model = layers((3,), (3, 3))
        groups = [{"params": [model["p1"]]}, {"params": [model["p0"]], "weight_decay": 0.0}]
        saved = AdamW(groups, weight_decay=0.1).state_dict()
        with pytest.raises(ValueError, match=r"got 2 entries, 0 of them with moments, that do not match\. .*not known"):
            match_optimizer_state(saved, dict(model.items()))
        for group in saved["param_groups"]:
            group["weight_decay"] = 0.0
        assert match_optimizer_state(saved, dict(model.items())).matched_by == "position"


class TestByShape:
    def test_the_groups_of_hugging_face_s_trainer(self):
        model = build_model()
        decayed = Trainer.get_decay_parameter_names(None, model)
        parameters = trainable(model)
        groups = [
            {"params": [p for n, p in parameters.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
        ]
        optimizer = stepped(AdamW(groups, lr=1e-3))
        state = match_optimizer_state(optimizer.state_dict(), parameters)
        assert state.matched_by == "shape"
        assert_matched(state, optimizer, parameters)

    def test_lora_plus(self):
        """A and B in groups of their own, B's learning rate 16-fold."""
        model = lora()
        optimizer = stepped(create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16))
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert state.matched_by == "shape"
        assert_matched(state, optimizer, trainable(model))
        assert {group.settings.lr for group in state.groups} == {1e-3, 16e-3}

    def test_one_shape_in_two_groups(self):
        """The second layer first: weights are told by their shapes, biases are not."""
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        groups = [{"params": list(model[1].parameters())}, {"params": list(model[0].parameters())}]
        saved = stepped(AdamW(groups)).state_dict()
        with pytest.raises(ValueError, match=r"of one shape to lie in one group, got the shapes \[\[3\]\] in several"):
            match_optimizer_state(saved, trainable(model))

    def test_what_has_no_moments_is_of_the_shape_that_is_left(self):
        model = layers((3,), (2, 2), (3,), (2, 2), (3,))
        p = list(model.values())
        optimizer = stepped(AdamW([{"params": p[1::2], "lr": 0.5}, {"params": p[::2]}]), without=[p[0], p[4]])
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert state.matched_by == "shape"
        assert_matched(state, optimizer, trainable(model))

    def test_two_shapes_are_left(self):
        model = layers((3,), (2, 2), (3,), (2, 2))
        p = list(model.values())
        optimizer = stepped(AdamW([{"params": p[1::2], "lr": 0.5}, {"params": p[::2]}]), without=p[2:])
        with pytest.raises(ValueError, match=r"\[2, 2\] × 2 and × 1, \[3\] × 2 and × 1, not known × 0 and × 2"):
            match_optimizer_state(optimizer.state_dict(), trainable(model))

    def test_a_group_without_moments_has_the_shapes_that_are_left(self):
        """A value head that has not been trained yet."""
        model = layers((3,), (2, 2), (3,), (4, 2), (4,))
        p = list(model.values())
        for groups in (p[:3], p[3:]), (p[3:], p[:3]):
            optimizer = stepped(AdamW([{"params": g, "lr": 0.1 * len(g)} for g in groups]), without=p[3:])
            state = match_optimizer_state(optimizer.state_dict(), trainable(model))
            assert state.matched_by == "shape"
            assert_matched(state, optimizer, trainable(model))

    def test_a_shape_that_is_left_lies_in_another_group_too(self):
        model = layers((3,), (2, 2), (4, 2), (3,))
        p = list(model.values())
        optimizer = stepped(AdamW([{"params": p[:2]}, {"params": p[2:]}]), without=p[2:])
        with pytest.raises(ValueError, match=r"got the shapes \[\[3\]\] in several"):
            match_optimizer_state(optimizer.state_dict(), trainable(model))


class TestLayerwiseLearningRates:
    """Layers of the same shapes, the top one fastest."""

    @pytest.fixture
    def model(self) -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))

    @pytest.mark.parametrize("decay", [0.5, 1.0])
    @pytest.mark.parametrize("downwards", [True, False])
    def test_without_names_their_order_is_not_known(self, model, downwards, decay):
        groups = [{"params": list(model[k].parameters()), "lr": 1e-3 * decay ** (2 - k)} for k in range(3)]
        saved = stepped(AdamW(groups[::-1] if downwards else groups)).state_dict()
        with pytest.raises(
            ValueError, match=r"got the shapes \[\[3, 3\], \[3\]\] in several, .*group\['param_names'\]"
        ):
            match_optimizer_state(saved, trainable(model))

    def test_with_the_names_that_the_message_asks_for(self, model):
        name_of = {id(p): name for name, p in model.named_parameters()}
        groups = [{"params": list(model[k].parameters()), "lr": 1e-3 * 0.5 ** (2 - k)} for k in (2, 1, 0)]
        optimizer = stepped(AdamW(groups))
        saved = optimizer.state_dict()
        for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group["param_names"] = [name_of[id(p)] for p in live["params"]]
        state = match_optimizer_state(saved, trainable(model))
        assert state.matched_by == "name"
        assert_matched(state, optimizer, trainable(model))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_never_wrong(data):
    """Any partition into groups in any order, any of it without gradient: right, or refused where there is doubt.

    Within a group, parameters of one shape are in the model's order, and all are where some have no gradient: nothing
    in the file would tell.
    """
    shapes = data.draw(st.lists(st.sampled_from([(), (3,), (2, 2), (3, 2)]), min_size=1, max_size=7))
    places = range(len(shapes))
    model, number = layers(*shapes), st.integers(0, 2)
    if data.draw(st.booleans()):
        of_shape = {shape: data.draw(number) for shape in shapes}
        group_of = [of_shape[shape] for shape in shapes]
    else:
        group_of = [data.draw(number) for _ in shapes]
    without = [k for k in places if data.draw(st.sampled_from([False, False, False, True]))]
    order = list(places)
    if not without:
        queues = {shape: iter([k for k in places if shapes[k] == shape]) for shape in shapes}
        order = [next(queues[shapes[k]]) for k in data.draw(st.permutations(places))]
    lrs = data.draw(st.sampled_from([(0.1, 0.2, 0.3), (0.1, 0.1, 0.1)]))
    members = [[model[f"p{k}"] for k in order if group_of[k] == g] for g in range(3)]
    groups = [{"params": m, "lr": lr} for m, lr in zip(members, lrs, strict=True) if m]
    optimizer = stepped(AdamW(groups), [model[f"p{k}"] for k in without])
    try:
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
    except ValueError:
        in_two_groups = len(set(zip(shapes, group_of, strict=True))) > len(set(shapes))
        assert in_two_groups or len({group_of[k] for k in without}) > 1
    else:
        assert_matched(state, optimizer, trainable(model))


class Module(nn.Module):
    """As a LightningModule holds its policy."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy


class TestByName:
    @pytest.fixture
    def shuffled(self) -> tuple[PeftModel, AdamW]:
        """An order that only names can tell."""
        model = lora()
        named = list(reversed(trainable(model).items()))
        groups = [{"params": named[::2], "lr": 0.1}, {"params": named[1::2], "lr": 0.2}]
        return model, stepped(AdamW(groups))

    def test_names_in_the_groups(self, shuffled):
        model, optimizer = shuffled
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert state.matched_by == "name"
        assert_matched(state, optimizer, trainable(model))

    def test_a_state_keyed_by_name(self, shuffled):
        """Torch's own, from torch.distributed.checkpoint: FSDP's full states have this form."""
        model, optimizer = shuffled
        saved = get_optimizer_state_dict(model, optimizer)
        assert all(isinstance(key, str) for key in saved["state"])
        state = match_optimizer_state(saved, trainable(model))
        assert state.matched_by == "name"
        assert_matched(state, optimizer, trainable(model))

    @pytest.mark.parametrize(
        "wrapped",
        [
            Module,
            torch.compile,
            checkpoint_wrapper,
            lambda model: Module(torch.compile(model)),
            lambda model: nn.Sequential(Module(model)),
            lambda model: model.base_model,
            lambda model: model.base_model.model.model,
        ],
    )
    @pytest.mark.parametrize("saved_wrapped", [True, False])
    def test_wrapped_when_saved_or_now(self, wrapped, saved_wrapped):
        model = lora()
        outer = wrapped(model)
        then, now = (outer, model) if saved_wrapped else (model, outer)
        optimizer = stepped(AdamW(list(reversed(trainable(then).items()))))
        state = match_optimizer_state(optimizer.state_dict(), trainable(now))
        assert state.matched_by == "name"
        assert_matched(state, optimizer, trainable(now))

    @settings(deadline=None, max_examples=50)
    @given(st.data())
    def test_infixes_anywhere(self, data):
        parts = st.sampled_from(["a", "b", "weight", "layers", "0", "1", "11"])
        names = data.draw(st.lists(st.lists(parts, min_size=1, max_size=3).map(tuple), min_size=1, unique=True))
        infix = st.sampled_from([(), (), ("module",), ("_orig_mod",), ("_fsdp_wrapped_module", "model"), ("default",)])
        prefix = data.draw(st.sampled_from(["", "policy.", "policy.actor."]))
        written = [prefix + ".".join(p for part in name for p in (*data.draw(infix), part)) for name in names]
        shuffled = data.draw(st.permutations(range(len(names))))
        parameters = {".".join(name): nn.Parameter(torch.zeros(2)) for name in names}
        values = list(parameters.values())
        optimizer = stepped(AdamW([(written[i], values[i]) for i in shuffled]))
        for saved in (optimizer.state_dict(), keyed_by_name(optimizer)):
            state = match_optimizer_state(saved, parameters)
            assert state.matched_by == "name"
            assert_matched(state, optimizer, parameters)

    def test_frozen_parameters_with_names(self):
        model = lora()
        optimizer = stepped(AdamW(model.named_parameters()))
        state = match_optimizer_state(optimizer.state_dict(), trainable(model))
        assert_matched(state, optimizer, trainable(model))

    def test_two_that_wrappers_alone_tell_apart(self):
        parameters = {"model.w": nn.Parameter(torch.zeros(2)), "w": nn.Parameter(torch.zeros(2))}
        optimizer = stepped(AdamW(list(reversed(parameters.items()))))
        assert_matched(match_optimizer_state(optimizer.state_dict(), parameters), optimizer, parameters)
        moved = {"model._orig_mod.w": parameters["model.w"], "w": parameters["w"]}
        with pytest.raises(ValueError, match="that do not match"):
            match_optimizer_state(stepped(AdamW(moved.items())).state_dict(), parameters)

    def test_names_decide(self):
        """Positions would agree."""
        model = layers((2,), (2,))
        saved = stepped(AdamW([("p0", model["p0"]), ("q1", model["p1"])])).state_dict()
        with pytest.raises(
            ValueError,
            match=r"Shapes in the model and in the file: the same\. Names: only in the model \['p1'\], "
            r"only in the file \['q1'\]\. .*remove 'param_names' from its groups",
        ):
            match_optimizer_state(saved, trainable(model))
        del saved["param_groups"][0]["param_names"]
        assert match_optimizer_state(saved, trainable(model)).matched_by == "position"


def keyed_by_name(optimizer: Optimizer) -> dict[str, Any]:
    saved = optimizer.state_dict()
    groups = [group | {"params": group.pop("param_names")} for group in copy.deepcopy(saved["param_groups"])]
    name_of = {i: n for g in saved["param_groups"] for i, n in zip(g["params"], g["param_names"], strict=True)}
    return {"state": {name_of[i]: entry for i, entry in saved["state"].items()}, "param_groups": groups}


class TestMismatch:
    def test_an_adapter_of_another_rank(self):
        saved = stepped(AdamW(trainable(lora()).values())).state_dict()
        model = get_peft_model(build_model(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        with pytest.raises(
            ValueError,
            match=r"of the model's 8 trainable parameters, got 8 entries, 8 of them with moments, that do not match\. "
            r"Shapes in the model and in the file: \[16, 4\] × 0 and × 2, \[16, 8\] × 2 and × 0, .*"
            r"in the model \['base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight', .*"
            r"Give the model as it was trained, the same adapter .*group\['param_names'\]",
        ):
            match_optimizer_state(saved, trainable(model))

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("extra", [True, False])
    def test_one_more_or_less(self, named, extra):
        big, small = layers((2,), (3,), (4,)), layers((2,), (3,))
        then, now = (big, small) if extra else (small, big)
        optimizer = stepped(AdamW(then.named_parameters() if named else then.parameters()))
        ours, theirs = (0, 1) if extra else (1, 0)
        where = rf"only in the {'file' if extra else 'model'} \['p2'\]" if named else r"in the model \['p0', 'p1'"
        with pytest.raises(ValueError, match=rf"\[4\] × {ours} and × {theirs}\. Names: .*{where}"):
            match_optimizer_state(optimizer.state_dict(), trainable(now))

    def test_a_named_moment_of_another_shape(self):
        saved = stepped(AdamW(layers((2, 3), (4,)).named_parameters())).state_dict()
        with pytest.raises(ValueError, match=r"exp_avg of p0 of the parameter's shape \[6\], got \[2, 3\]: .*gathered"):
            match_optimizer_state(saved, trainable(layers((6,), (4,))))

    @pytest.mark.parametrize("saved", [{}, {"optimizer_states": [], "state_dict": {}}, []])
    def test_not_an_optimizer_s_state(self, saved):
        with pytest.raises(
            ValueError, match=r"'state' and 'param_groups', got .*checkpoint\['optimizer_states'\]\[0\]"
        ):
            match_optimizer_state(saved, trainable(layers((2,))))


class TestNotAdam:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: SGD(p, momentum=0.9), r"entries with \['momentum_buffer'\] \(SGD's or Muon's\)"),
            (torch.optim.RMSprop, r"entries with .* \(RMSprop's or Adadelta's\)"),
            (torch.optim.Adagrad, r"entries with .* \(Adagrad's\)"),
            (torch.optim.Adamax, r"entries with .* \(Adamax's\)"),
            (NAdam, r"a group without \['amsgrad'\]"),  # their entries could be Adam's
            (RAdam, r"a group without \['amsgrad'\]"),
        ],
    )
    def test_torch_s_others(self, make, message):
        model = layers((2,), (3,))
        saved = stepped(make(list(model.parameters()))).state_dict()
        with pytest.raises(ValueError, match=rf"expected the state of torch's Adam or AdamW, .*got {message}"):
            match_optimizer_state(saved, trainable(model))

    def test_quantized_moments(self):
        """As bitsandbytes' AdamW8bit saves them."""
        model = layers((2,))
        saved = stepped(AdamW(model.parameters())).state_dict()
        saved["state"][0] = {"step": 2, "state1": torch.zeros(2, dtype=torch.uint8), "qmap1": torch.zeros(256)}
        with pytest.raises(ValueError, match=r"\(bitsandbytes', whose moments are quantized\): .* record it in train"):
            match_optimizer_state(saved, trainable(model))

    def test_half_an_entry(self):
        model = layers((2,))
        saved = stepped(AdamW(model.parameters(), amsgrad=True)).state_dict()
        del saved["state"][0]["max_exp_avg_sq"]
        with pytest.raises(
            ValueError, match=r"with \['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step'\], got entries"
        ):
            match_optimizer_state(saved, trainable(model))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_not_finite(key):
    model = layers((2,), (3,))
    saved = stepped(AdamW(model.parameters())).state_dict()
    saved["state"][1][key][1:] = math.inf
    with pytest.raises(
        ValueError, match=rf"finite moments, got 2 numbers in {key} of p1 that are not: .*earlier check"
    ):
        match_optimizer_state(saved, trainable(model))


def saying(*said: bool | None) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
    """A saved state whose groups say how they decay, or, as before torch 2.7, do not."""
    parameters = trainable(layers(*((n,) for n in range(1, 1 + len(said)))))
    saved = stepped(AdamW([{"params": [p]} for p in parameters.values()])).state_dict()
    for group, decoupled in zip(saved["param_groups"], said, strict=True):
        group.pop("decoupled_weight_decay", None)
        if decoupled is not None:
            group["decoupled_weight_decay"] = decoupled
    return saved, parameters


class TestDecoupled:
    @pytest.mark.parametrize(("decoupled", "expected"), [(None, True), (True, True), (False, False)])
    def test_where_the_file_does_not_say(self, decoupled, expected):
        state = match_optimizer_state(*saying(None), decoupled=decoupled)
        assert state.groups[0].settings.decoupled_weight_decay is expected

    @pytest.mark.parametrize("said", [True, False])
    def test_as_the_file_says(self, said):
        for decoupled in (None, said):
            state = match_optimizer_state(*saying(said), decoupled=decoupled)
            assert state.groups[0].settings.decoupled_weight_decay is said

    @pytest.mark.parametrize("said", [True, False])
    def test_against_what_the_file_says(self, said):
        message = rf"file's groups, decoupled_weight_decay={said}, got decoupled={not said}: leave it out \(None\)"
        for groups in ((said,), (None, said), (not said, said)):
            with pytest.raises(ValueError, match=message):
                match_optimizer_state(*saying(*groups), decoupled=not said)


def test_numbers_in_tensors():
    """``step`` as an int, ``lr`` and betas as tensors."""
    model = layers((2,))
    saved = stepped(AdamW(model.parameters())).state_dict()
    saved["state"][0]["step"] = 7
    saved["param_groups"][0] |= {"lr": torch.tensor(0.25), "betas": (torch.tensor(0.5), 0.75)}
    group = match_optimizer_state(saved, trainable(model)).groups[0]
    assert group.moments["p0"].step == 7
    assert (group.settings.lr, group.settings.betas) == (0.25, (0.5, 0.75))
