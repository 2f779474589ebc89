"""Steps watched on whatever has ``step()``: the oracle is a plain list of what happened, in order."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from entropy_pl.updates import UpdateRecorder, inner_optimizer, record_update, was_skipped, watch_steps


class OwnSGD:
    """A class of the user's: no hooks, no parent."""

    def __init__(self, parameters, lr: float = 0.1) -> None:
        self.param_groups = [{"params": list(parameters), "lr": lr}]

    @torch.no_grad()
    def step(self, fail: bool = False) -> str:
        if fail:
            raise ZeroDivisionError
        for parameter in self.param_groups[0]["params"]:
            parameter -= self.param_groups[0]["lr"] * parameter.grad
        return "stepped"


class Subclass(AdamW):
    """Torch runs the hooks of its ``step`` and those of the parent's."""

    def step(self, closure=None):
        return super().step(closure)


class Lookahead:
    """A wrapper that moves the parameters itself, after the optimizer inside: halfway back."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.lerp_(old, 0.5)


def model_with_gradient() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).square().sum().backward()
    return model


MAKERS = {
    "torch": lambda p: SGD(p, lr=0.1),
    "fused": lambda p: AdamW(p, lr=0.1, fused=True),
    "subclass": lambda p: Subclass(p, lr=0.1),
    "own": OwnSGD,
    "accelerate": lambda p: Accelerator(cpu=True).prepare_optimizer(AdamW(p, lr=0.1)),
    "accelerated own": lambda p: Accelerator(cpu=True).prepare_optimizer(Stated(p)),
    "lightning": lambda p: LightningOptimizer(AdamW(p, lr=0.1)),
    "own wrapper": lambda p: Lookahead(SGD(p, lr=0.1)),
}


class Stated(OwnSGD):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def step_of(optimizer: object) -> None:
    """``step()``, of the optimizer inside where Lightning's wrapper would want a trainer."""
    (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).step()


@pytest.mark.parametrize("name", MAKERS)
def test_before_and_after_each_step(name):
    model = model_with_gradient()
    optimizer = MAKERS[name](model.parameters())
    held = dict(vars(inner_optimizer(optimizer))), dict(vars(optimizer))
    seen: list[tuple[str, Tensor]] = []
    watch = watch_steps(
        optimizer,
        lambda: seen.append(("before", model.weight.detach().clone())),
        lambda: seen.append(("after", model.weight.detach().clone())),
    )
    thetas = [model.weight.detach().clone()]
    for _ in range(2):
        step_of(optimizer)
        thetas.append(model.weight.detach().clone())
    watch.remove()
    watch.remove()
    step_of(optimizer)
    assert [what for what, _ in seen] == ["before", "after"] * 2
    for (_, found), expected in zip(seen, (thetas[0], thetas[1], thetas[1], thetas[2]), strict=True):
        assert torch.equal(found, expected)
    assert (dict(vars(inner_optimizer(optimizer))), dict(vars(optimizer))) == held


class TestAnAttributeOfTheInstance:
    def test_is_put_back(self):
        optimizer = OwnSGD(model_with_gradient().parameters())
        own = optimizer.step = lambda: "own"
        watch = watch_steps(optimizer, lambda: None, lambda: None)
        assert optimizer.step is not own
        assert optimizer.step() == "own"
        watch.remove()
        assert optimizer.step is own

    def test_arguments_and_result_pass(self):
        optimizer = OwnSGD(model_with_gradient().parameters())
        seen: list[str] = []
        watch = watch_steps(optimizer, lambda: seen.append("before"), lambda: seen.append("after"))
        with pytest.raises(ZeroDivisionError):
            optimizer.step(fail=True)
        assert optimizer.step() == "stepped"
        watch.remove()
        assert seen == ["before", "before", "after"]

    def test_wrapped_by_another_meanwhile(self):
        """Theirs stays, and ours calls nothing any more."""
        optimizer = OwnSGD(model_with_gradient().parameters())
        seen: list[str] = []
        watch = watch_steps(optimizer, lambda: seen.append("before"), lambda: seen.append("after"))
        ours = optimizer.step
        theirs = optimizer.step = lambda: ours()
        watch.remove()
        assert optimizer.step is theirs
        assert optimizer.step() == "stepped"
        assert not seen

    def test_two_watches(self):
        optimizer = OwnSGD(model_with_gradient().parameters())
        seen: list[str] = []
        outer = watch_steps(optimizer, lambda: seen.append("a"), lambda: seen.append("b"))
        inner = watch_steps(optimizer, lambda: seen.append("c"), lambda: seen.append("d"))
        optimizer.step()
        inner.remove()
        outer.remove()
        assert seen == ["c", "a", "b", "d"]
        assert "step" not in vars(optimizer)


def test_accelerate_accumulates():
    """Gradients over two batches: every other ``step()`` is none."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    seen: list[int] = []
    batches: list[int] = []
    watch = watch_steps(optimizer, lambda: None, lambda: seen.append(batches[-1]))
    for batch in range(4):
        batches.append(batch)
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            optimizer.zero_grad()
    watch.remove()
    assert seen == [1, 3]


def test_lightning_trains():
    """Watched through what ``self.optimizers()`` gives, in a real run with accumulation."""
    seen: list[tuple[str, int]] = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def configure_optimizers(self):
            return AdamW(self.parameters(), lr=0.1)

        def on_train_start(self):
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            watch_steps(
                optimizer,
                lambda: seen.append(("before", self.global_step)),
                lambda: seen.append(("after", self.global_step)),
            )

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(max_steps=2, accelerator="cpu", accumulate_grad_batches=2, enable_model_summary=False, **options)
    trainer.fit(Module(), DataLoader(torch.ones(4, 1)))
    assert seen == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "lightning"])
def test_recorded(name):
    """Δθ/lr, whatever steps: 6e-8 of θ ~ 0.5, rounded and over lr = 0.1."""
    model = model_with_gradient()
    optimizer = MAKERS[name](model.parameters())
    before = copy.deepcopy(model)
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    for (parameter_name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = (new.detach().double() - old.detach().double()) / 0.1
        torch.testing.assert_close(recorder.update.direction[parameter_name], expected, rtol=3e-16, atol=0)
    assert recorder.update.norm() > 0
    assert (recorder.update.components is None) == (name in ("own", "accelerated own", "own wrapper"))


def test_what_a_wrapper_does_besides_is_in_the_update_and_then_there_is_no_split():
    model = model_with_gradient()
    optimizer = Lookahead(AdamW(model.parameters(), lr=0.1, weight_decay=0.0))
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    # AdamW's first step is of length 1 in every coordinate; half of it is taken back.
    assert recorder.update.direction["bias"].abs().tolist() == pytest.approx([0.5, 0.5], rel=1e-5)
    # The parts are those of the whole step: of what is left, they miss as much again.
    assert recorder.update.components is recorder.update.preconditioner is None
    assert "leave 100% of the step unexplained" in recorder.update.split_absent


class TestInnerOptimizer:
    def test_unwraps(self):
        inner = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        assert inner_optimizer(inner) is inner
        assert inner_optimizer(LightningOptimizer(inner)) is inner
        assert inner_optimizer(Accelerator(cpu=True).prepare_optimizer(inner)) is inner
        assert inner_optimizer(Lookahead(Lookahead(inner))) is inner

    @pytest.mark.parametrize(
        ("lacking", "message"),
        [
            ({}, "without step() and param_groups"),
            ({"step": lambda: None}, "without param_groups"),
            ({"param_groups": [], "step": 3}, "without step()"),
        ],
        ids=["nothing", "no groups", "no step"],
    )
    def test_no_optimizer(self, lacking, message):
        thing = type("Thing", (), lacking)()
        expected = f"expected an optimizer with step() and param_groups, got Thing {message}: pass the optimizer itself"
        for call in (inner_optimizer, was_skipped, lambda o: watch_steps(o, print, print)):
            with pytest.raises(TypeError, match=re.escape(expected)):
                call(thing)
        with pytest.raises(TypeError, match=re.escape(expected)):
            UpdateRecorder(nn.Linear(1, 1), thing)


class TestGradScaler:
    """Fused optimizers see gradients times the scale, and unscale them inside their kernel."""

    @staticmethod
    def stepped(optimizer: Optimizer, loss: Tensor, unscale_first: bool = False) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)

    @pytest.mark.parametrize("unscale_first", [False, True])
    @pytest.mark.parametrize("fused", [False, True])
    def test_components_are_those_of_the_unscaled_gradient(self, fused, unscale_first):
        models = [nn.Linear(3, 2, dtype=torch.float32) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        scaled, plain = (AdamW(m.parameters(), lr=0.1, weight_decay=0.1, fused=fused) for m in models)
        updates = []
        for seed in range(3):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            with record_update(models[0], scaled) as recorder:
                self.stepped(scaled, models[0](x).square().mean(), unscale_first)
            updates.append(recorder.update)
            plain.zero_grad()
            models[1](x).square().mean().backward()
            with record_update(models[1], plain) as recorder:
                plain.step()
            updates.append(recorder.update)
        for found, expected in zip(updates[::2], updates[1::2], strict=True):
            assert found.gap() < 3e-6  # θ ~ 1 is rounded at 6e-8, over lr·v ~ 0.1
            for part in ("momentum", "gradient", "weight_decay"):
                for name, value in expected.components[part].items():
                    # The scale is a power of two: float32 roundings alike, θ's of the steps before at most.
                    torch.testing.assert_close(found.components[part][name], value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_skipped_step(self, fused):
        model = nn.Linear(3, 2)
        optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
        asked: list[bool] = []
        watch = watch_steps(optimizer, lambda: None, lambda: asked.append(was_skipped(optimizer)))
        before = copy.deepcopy(model)
        with record_update(model, optimizer) as recorder:
            self.stepped(optimizer, model(torch.full((1, 3), torch.inf)).sum())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
        assert recorder.update.norm() == 0
        assert recorder.update.components is None
        assert recorder.update.split_absent == "the step moved no parameter"
        assert asked == [True] * fused  # an unfused one is not called at all
        with record_update(model, optimizer) as recorder:  # of two in one block, only the one that moved counts
            self.stepped(optimizer, model(torch.full((1, 3), torch.inf)).sum())
            self.stepped(optimizer, model(torch.ones(1, 3)).sum())
        assert recorder.update.norm() > 0
        assert asked == [True] * 2 * fused + [False]
        assert not was_skipped(optimizer)
        watch.remove()
