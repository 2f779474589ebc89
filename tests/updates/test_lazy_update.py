"""read_lazily(): the numbers of read(), and nothing held. Bytes are counted by whoever allocates them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entropy_pl.updates import UpdateRecorder, UpdateVector, displaced

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

WIDTH, LAYERS = 96, 6  # a weight has 9216 numbers: more than min_8bit_size = 4096


class Counted(TorchDispatchMode):
    """Bytes of the storages that were made inside and live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def live(self) -> int:
        return sum(self.sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, self.live)
        return out


def test_the_counter_counts():
    with Counted() as counted:
        kept = torch.zeros(1000, dtype=torch.float64)
        (kept + 1).sum()
        assert counted.live == 8000
        assert counted.peak == 16008  # the sum is taken while what it is of still lives
        view = kept[:10]
        del kept
        assert counted.live == 8000
        del view
        assert counted.live == 0


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).to(dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Not in the order of the names."""
    first, *others = list(model)
    return [
        {"params": [p for layer in others for p in layer.parameters()], "lr": 3e-3},
        {"params": list(first.parameters()), "lr": 1e-2, "weight_decay": 0.3},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "rmsprop": lambda m: RMSprop(groups(m)),
    "sgd": lambda m: SGD(groups(m), momentum=0.9, dampening=0.5),
    "sgd-nesterov": lambda m: SGD([g | {"weight_decay": 0.0} for g in groups(m)], momentum=0.9, nesterov=True),
    "adam": lambda m: Adam(groups(m), weight_decay=0.1),
    "adamw": lambda m: AdamW(groups(m)),
    "adamw-amsgrad": lambda m: AdamW(groups(m), amsgrad=True, maximize=True),
    "adamw-foreach": lambda m: AdamW(groups(m), foreach=True),
    "adamw-fused": lambda m: AdamW(groups(m), fused=True),
}
if bnb is not None:
    OPTIMIZERS |= {
        "adamw8bit": lambda m: bnb.optim.AdamW8bit(groups(m)),
        "adamw32bit": lambda m: bnb.optim.AdamW(groups(m)),
    }


def step(model: nn.Module, optimizer: Any, seed: int) -> UpdateRecorder:
    """One step, after a snapshot; the last layer's bias has no gradient every other time."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != f"{LAYERS - 1}.bias" or seed % 2:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    recorder = UpdateRecorder(model, optimizer)
    recorder.snapshot()
    optimizer.step()
    return recorder


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert len(a) == len(b)
    for name, value in b.items():
        assert name in a
        assert a[name].dtype == torch.float64
        assert torch.equal(a[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_are_one(name, dtype):
    """To the bit, after some steps, and while the parameters hold something else."""
    model = model_of(dtype)
    optimizer = OPTIMIZERS[name](model)
    for seed in range(4):
        recorder = step(model, optimizer, seed)
        kept, lazy = recorder.read(), recorder.read_lazily()
        assert recorder.update is lazy
        optimizer.zero_grad()  # to None
        with recorder.at_theta_before(), displaced(model, kept, 0.1):
            for parameter in model.parameters():
                parameter.data.fill_(7.0)
            assert_equal(lazy.direction, kept.direction)
            assert lazy.lr == kept.lr
            assert lazy.split_absent == kept.split_absent
            assert (kept.components is None) == (name == "rmsprop")
            assert lazy.norm() == kept.norm() > 0
            assert lazy.dot(kept) == kept.dot(lazy) == kept.dot(kept)
            assert lazy.gap() == kept.gap()
            assert lazy.component_norms() == kept.component_norms()
            twice = lazy.scaled(2.0)
            assert twice.norm() == kept.scaled(2.0).norm()
            assert_equal(twice.direction, kept.scaled(2.0).direction)
            if kept.components is None:
                continue
            assert list(lazy.components) == list(kept.components)
            for part, direction in kept.components.items():
                assert_equal(lazy.components[part], direction)
                assert_equal(twice.components[part], kept.scaled(2.0).components[part])
            assert_equal(lazy.preconditioner, kept.preconditioner)
            assert_equal(twice.preconditioner, kept.scaled(2.0).preconditioner)
            assert twice.component_norms() == kept.scaled(2.0).component_norms()
            assert twice.gap() == kept.scaled(2.0).gap()


def test_displaced_by_either():
    model = model_of()
    optimizer = AdamW(groups(model))
    recorder = step(model, optimizer, 1)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    lazy = recorder.read_lazily()
    with recorder.at_theta_before(), displaced(model, lazy, lazy.lr):
        assert all(torch.equal(p, after[n]) for n, p in model.named_parameters())


def test_component_norms_of_what_is_held():
    parts = {"a": {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}, "c": {"b": torch.tensor([[2.0]])}}
    v = UpdateVector({"w": torch.ones(2), "b": torch.ones(1)}, 0.1, components=parts)
    assert v.component_norms() == {"a": 13.0, "c": 2.0}
    assert UpdateVector({"w": torch.ones(2)}, 0.1).component_norms() is None
    assert UpdateVector({}, 0.1, components={}).component_norms() == {}


def test_names_that_are_not_there():
    model = model_of()
    lazy = step(model, AdamW(groups(model)), 1).read_lazily()
    for mapping in (lazy.direction, lazy.components, lazy.components["momentum"], lazy.preconditioner):
        assert "nope" not in mapping
        with pytest.raises(KeyError, match="nope"):
            mapping["nope"]


class TestMemory:
    """θ has n numbers, the largest parameter 9216, one in 6 of n."""

    largest = WIDTH * WIDTH
    n = LAYERS * (WIDTH * WIDTH + WIDTH)

    @contextmanager
    def counted(self) -> Iterator[Counted]:
        with Counted() as counted:
            yield counted

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_nothing_is_held(self, name):
        model = model_of()
        optimizer = OPTIMIZERS[name](model)
        for seed in range(2):
            recorder = step(model, optimizer, seed)
        with self.counted() as counted:
            lazy = recorder.read_lazily()
            assert counted.live == 0  # of the check that the split adds up, one parameter at a time
            lazy.norm()
            lazy.gap()
            lazy.component_norms()
            lazy.dot(lazy.scaled(2.0))
            assert counted.live == 0
            # One parameter in float64, its split, and what lies between: 9 at once where moments must be rebuilt.
            assert counted.peak <= 9.1 * 8 * self.largest
        with self.counted() as counted:
            kept = recorder.read()
            float64s = 1 if kept.components is None else 5
            assert counted.live == pytest.approx(float64s * 8 * self.n, rel=1e-3)

    def test_displaced_holds_the_moved_parameters_only(self):
        model = model_of()
        lazy = step(model, AdamW(groups(model)), 1).read_lazily()
        with self.counted() as counted:
            with displaced(model, lazy, 0.1):
                assert counted.live == 4 * self.n  # float32
            assert counted.live == 0
            assert counted.peak <= 4 * self.n + 5 * 8 * self.largest  # v, η v, θ, their sum and Δθ of one

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    def test_bytes_are_those_that_the_snapshot_takes(self, dtype):
        model = model_of(dtype)
        recorder = UpdateRecorder(model, SGD(model.parameters(), lr=0.1))
        with self.counted() as counted:
            recorder.snapshot()
            assert recorder.bytes() == counted.live == dtype.itemsize * self.n
            recorder.forget()
            assert recorder.bytes() == counted.live == 0

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_bytes_are_those_of_the_moments_too(self, name):
        model = model_of()
        optimizer = OPTIMIZERS[name](model)
        step(model, optimizer, 1)
        recorder = UpdateRecorder(model, optimizer)
        with self.counted() as counted:
            recorder.snapshot(moments=True)
            assert recorder.bytes() == counted.live
            # Bytes a number: θ and what the optimizer has of it. An absmax is 4 bytes for 256, and biases have 32 bits.
            moments = {"rmsprop": 0, "adamw-amsgrad": 12, "adamw8bit": 2.1}.get(name, 4 if "sgd" in name else 8)
            assert recorder.bytes() == pytest.approx((4 + moments) * self.n, rel=0 if moments != 2.1 else 0.01)
            recorder.forget()
            assert recorder.bytes() == counted.live == 0


class TestValidity:
    def test_until_the_parameters_change(self):
        model = model_of()
        optimizer = AdamW(groups(model))
        lazy = step(model, optimizer, 1).read_lazily()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"parameters as the step left them, got 0\.weight changed since"):
            lazy.norm()

    def test_after_the_recorder_forgot(self):
        model = model_of()
        recorder = step(model, AdamW(groups(model)), 1)
        norm = recorder.read().norm()
        lazy = recorder.read_lazily()
        recorder.forget()
        assert lazy.norm() == norm
        assert lazy.gap() < 1e-5  # 3e-8 of θ ~ 0.06 over lr·v ~ 3e-3

    def test_no_movement(self):
        model = model_of()
        recorder = UpdateRecorder(model, AdamW(groups(model)))
        recorder.snapshot()
        lazy = recorder.read_lazily()
        assert lazy.norm() == 0
        assert lazy.components is lazy.preconditioner is lazy.gap() is lazy.component_norms() is None
        assert lazy.split_absent == "the step moved no parameter"
        assert lazy.direction["0.weight"].shape == (WIDTH, WIDTH)

    def test_a_change_without_a_learning_rate(self):
        model = model_of()
        recorder = UpdateRecorder(model, SGD(model.parameters(), lr=0.0))
        recorder.snapshot()
        with torch.no_grad():
            model[3].bias.add_(1.0)
        with pytest.raises(ValueError, match=r"learning rate > 0 behind a step that moved the parameters, got 0\.0"):
            recorder.read_lazily()


def test_why_there_is_no_split():
    model = model_of()
    rmsprop = step(model, RMSprop(model.parameters(), lr=0.1), 1).read()
    assert rmsprop.split_absent == (
        "RMSprop is not of Adam's family and not torch's SGD: its step has no momentum, gradient and weight-decay "
        "parts here"
    )
    assert step(model, SGD(model.parameters(), lr=0.1), 1).read().split_absent is None
    assert step(model, AdamW(model.parameters(), lr=0.1), 1).read().split_absent is None
