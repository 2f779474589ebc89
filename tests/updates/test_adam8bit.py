"""The components of bitsandbytes' Adam family against its step written out for one number at a time.

The loop takes the moments from the optimizer's 8-bit state of before the step, code by code, and knows nothing of how
they got there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropy_pl.updates import UpdateRecorder, record_update
from entropy_pl.updates.adam8bit import split_bitsandbytes_step
from entropy_pl.updates.adamw import AdamMoments, AdamSettings

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra 'gpu')")
PARTS = ("momentum", "gradient", "weight_decay")
BLOCK = 256
BIG = 17 * BLOCK + 5  # above min_8bit_size = 4096, and with a last block that is not full


@dataclass
class Number:
    """One number of one parameter, before a step."""

    theta: float
    gradient: float
    m: float
    v: float

    def step(self, t: int, group: dict[str, Any]) -> tuple[float, dict[str, float], float]:
        """Δθ/lr, its parts and P, as bitsandbytes/backends/cpu/ops.py has them."""
        (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        m = self.m * beta1 + (1 - beta1) * self.gradient
        v = self.v * beta2 + (1 - beta2) * self.gradient**2
        correction1, correction2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
        denominator = math.sqrt(v) / correction2 + eps
        theta = self.theta * (1 - lr * decay) - lr / correction1 * m / denominator
        parts = {
            "momentum": -self.m * beta1 / correction1 / denominator,
            "gradient": -(1 - beta1) * self.gradient / correction1 / denominator,
            "weight_decay": -decay * self.theta,
        }
        return (theta - self.theta) / lr, parts, (1 - beta1) / correction1 / denominator


def model_of(dtype: torch.dtype = torch.float32) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    shapes = {"big": (BIG,), "matrix": (64, 96), "small": (40,)}
    return nn.ParameterDict(
        {n: nn.Parameter((torch.randn(s, generator=generator) * 0.3).to(dtype)) for n, s in shapes.items()}
    )


def groups(model: nn.ParameterDict) -> list[dict[str, Any]]:
    return [
        {"params": [model["big"], model["small"]], "lr": 0.1, "weight_decay": 0.2},
        {"params": [model["matrix"]], "lr": 0.03, "weight_decay": 0.0, "betas": (0.7, 0.99), "eps": 1e-3},
    ]


def set_gradients(model: nn.ParameterDict, seed: int) -> None:
    """Of very different sizes within a block, so that quantization loses much."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.values():
        sizes = torch.exp(2 * torch.randn(parameter.shape, generator=generator))
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * sizes).to(parameter.dtype)


def moments(state: dict[str, Any], number: int, n: int) -> list[float]:
    """Of a state, one after another: a code, looked up, times its block's absmax; zeros before the first step."""
    if not state:
        return [0.0] * n
    values = state[f"state{number}"].flatten().tolist()
    if state[f"state{number}"].dtype != torch.uint8:
        return values
    table, absmax = state[f"qmap{number}"].tolist(), state[f"absmax{number}"].tolist()
    return [table[code] * absmax[i // BLOCK] for i, code in enumerate(values)]


def numbers(parameter: Tensor, state: dict[str, Any]) -> list[Number]:
    n = parameter.numel()
    thetas, gradients = parameter.flatten().tolist(), parameter.grad.flatten().tolist()
    return [Number(*row) for row in zip(thetas, gradients, moments(state, 1, n), moments(state, 2, n), strict=True)]


OPTIMIZERS = {
    "AdamW8bit": lambda p: bnb.optim.AdamW8bit(p),
    "Adam8bit": lambda p: bnb.optim.Adam8bit(p),
    "AdamW": lambda p: bnb.optim.AdamW(p),
    "Adam": lambda p: bnb.optim.Adam(p),
    "AdamW32bit": lambda p: bnb.optim.AdamW32bit(p),
    "AdamW, optim_bits=8": lambda p: bnb.optim.AdamW(p, optim_bits=8),
    "PagedAdamW8bit": lambda p: bnb.optim.PagedAdamW8bit(p),
}
# On CPU paged ones say that they are not.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_part_over_several_steps(name, keep):
    model = model_of()
    optimizer = OPTIMIZERS[name](groups(model))
    for step in range(1, 5):
        set_gradients(model, step)
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        before = {n: numbers(p, optimizer.state.get(p, {})) for n, p in model.items()}
        recorder = UpdateRecorder(model, optimizer)
        recorder.snapshot()
        optimizer.step()
        update = recorder.read() if keep else recorder.read_lazily()
        assert update.lr == 0.1
        assert update.split_absent is None
        for parameter_name, parameter in model.items():
            group = group_of[id(parameter)]
            expected = [number.step(step, group) for number in before[parameter_name]]
            ratio = group["lr"] / 0.1

            def close(found: Tensor, values: list[float], rtol: float, atol: float, ratio: float = ratio) -> None:
                wanted = ratio * torch.tensor(values, dtype=torch.float64)
                torch.testing.assert_close(found.flatten(), wanted, rtol=rtol, atol=atol)

            # θ ~ 1 is rounded at 6e-8, and the kernel's own arithmetic at 1e-7 of v ~ 1; over lr ≥ 0.03.
            close(update.direction[parameter_name], [change for change, _, _ in expected], 1e-5, 2e-6)
            for part in PARTS:
                # 8-bit moments: the float32 product code·absmax, 6e-8. 32-bit ones: those after the step, where the
                # momentum is m_t − (1−β₁) g, which cancels: 6e-8 of the gradient part, at most 3.
                values = [parts[part] for _, parts, _ in expected]
                close(update.components[part][parameter_name], values, 2e-6, 2e-6)
            close(update.preconditioner[parameter_name], [P for _, _, P in expected], 1e-6, 0)
        # θ's own rounding, as for torch's AdamW in float32: 3e-8 of 0.3 over lr·v.
        assert update.gap() < 1e-6
    is_quantized = {n: optimizer.state[p]["state1"].dtype == torch.uint8 for n, p in model.items()}
    eight = "8" in name
    assert is_quantized == {"big": eight, "matrix": eight, "small": False}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_with_another_gradient(name):
    """With the actual one it is the step recorded; with others, with and without momentum, the loop's."""
    model = model_of()
    optimizer = OPTIMIZERS[name](groups(model))
    for step in range(1, 4):
        set_gradients(model, 10 + step)
        others = {n: p.grad.double() for n, p in model.items()}
        other_numbers = {n: numbers(p, optimizer.state.get(p, {})) for n, p in model.items()}
        set_gradients(model, step)
        group_of = {id(p): dict(group) for group in optimizer.param_groups for p in group["params"]}
        recorder = UpdateRecorder(model, optimizer)
        recorder.snapshot(moments=True)
        optimizer.step()
        update = recorder.read()
        again = recorder.step_with({n: p.grad for n, p in model.items()})
        assert again.lr == update.lr
        for n in model:
            # θ ~ 1 rounded at 6e-8, and the kernel's own arithmetic, over lr ≥ 0.03: as for the split recorded.
            torch.testing.assert_close(again.direction[n], update.direction[n], rtol=1e-5, atol=2e-6)
            for part in PARTS:  # 32-bit moments: 6e-8 of the gradient part, lost in those of after the step
                torch.testing.assert_close(again.components[part][n], update.components[part][n], rtol=2e-6, atol=2e-6)
        for momentum in (True, False):
            found = recorder.step_with(others, momentum=momentum)
            for n, parameter in model.items():
                group = group_of[id(parameter)]
                if not momentum:
                    group = group | {"betas": (0.0, group["betas"][1])}
                expected = [number.step(step, group)[1] for number in other_numbers[n]]
                for part in PARTS:
                    wanted = torch.tensor([parts[part] for parts in expected], dtype=torch.float64)
                    # The float32 product code·absmax, 6e-8 of m and v.
                    torch.testing.assert_close(
                        found.components[part][n].flatten(), group["lr"] / 0.1 * wanted, rtol=1e-6, atol=1e-6
                    )


def test_the_moments_after_the_step_would_not_do():
    """What is kept from before the step is needed: the state afterwards is not what moved θ."""
    model = model_of()
    optimizer = bnb.optim.AdamW8bit(groups(model))
    for step in range(3):
        set_gradients(model, step)
        old = moments(optimizer.state.get(model["big"], {}), 1, BIG)
        optimizer.step()
    new = moments(optimizer.state[model["big"]], 1, BIG)
    exact = [0.9 * m + 0.1 * g for m, g in zip(old, model["big"].grad.tolist(), strict=True)]
    lost = math.sqrt(sum((a - b) ** 2 for a, b in zip(new, exact, strict=True)) / sum(b**2 for b in exact))
    assert lost > 1e-3


def test_no_less_exact_than_torchs_own():
    """The gap is the rounding of θ: as that of torch's AdamW from the same start."""
    gaps = []
    for kind in (torch.optim.AdamW, bnb.optim.AdamW8bit, bnb.optim.AdamW):
        model = model_of()
        optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.1)
        for step in range(4):
            set_gradients(model, step)
            with record_update(model, optimizer) as recorder:
                optimizer.step()
        gaps.append(recorder.update.gap())
    # The same roundings of θ over ‖v‖, which quantized moments change by some percent.
    assert gaps[1:] == pytest.approx([gaps[0]] * 2, rel=0.3)
    assert 1e-6 < gaps[0] < 3e-5  # 3e-8 of θ ~ 0.3, over lr·v ~ 1e-3


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW"])
def test_a_parameter_without_gradient_has_no_part_in_it(kind):
    model = model_of()
    optimizer = getattr(bnb.optim, kind)(model.parameters(), lr=0.1, weight_decay=0.1)
    set_gradients(model, 0)
    optimizer.step()
    model["big"].grad = None
    with record_update(model, optimizer) as recorder:
        optimizer.step()
    update = recorder.update
    assert not any(update.components[part]["big"].any() for part in PARTS)
    assert not update.preconditioner["big"].any()
    assert update.gap() < 1e-6  # as above


def test_overrides_of_single_parameters():
    """GlobalOptimManager may give a parameter its own width and hyper-parameters."""
    model = model_of()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    try:
        manager.register_parameters(model.parameters())
        manager.override_config(model["big"], key_value_dict={"optim_bits": 32, "lr": 0.05, "weight_decay": 0.5})
        optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=0.1)
        for step in range(3):
            set_gradients(model, step)
            with record_update(model, optimizer) as recorder:
                optimizer.step()
    finally:
        manager.initialize()
    assert optimizer.state[model["big"]]["state1"].dtype == torch.float32
    assert recorder.update.gap() < 1e-6  # as above


def test_decay_last_as_on_cuda():
    """kernels.cu, kOptimizerStatic8bit2StateBlockwise: θ + u first, and all of that times 1 − lr·wd; βs in float32."""
    beta1, beta2 = (torch.tensor(b, dtype=torch.float32).item() for b in (0.9, 0.999))
    lr, eps, decay, t = 0.1, 1e-3, 0.5, 7
    rows = [(0.5, 2.0, 0.3, 1.5), (-1.2, -1e-3, 1e-3, 1e-5), (3.0, 0.0, -0.4, 0.2)]
    theta, gradient, m, v = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    config = {"lr": lr, "betas": (0.9, 0.999), "eps": eps, "weight_decay": decay}
    after = AdamMoments(t, beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2)
    parts, P = split_bitsandbytes_step(
        AdamSettings.of(config, decoupled=True), None, after, gradient, theta, scale=1.0, decay_last=True
    )
    for i, (theta_i, g, m_i, v_i) in enumerate(rows):
        new_m, new_v = beta1 * m_i + (1 - beta1) * g, beta2 * v_i + (1 - beta2) * g**2
        correction1, correction2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
        moved = theta_i - lr * correction2 / correction1 * new_m / (math.sqrt(new_v) + eps * correction2)
        moved = moved * (1 - lr * decay)
        # Differences of float64 numbers of size 1, over lr.
        assert sum(part[i].item() for part in parts) == pytest.approx((moved - theta_i) / lr, rel=1e-12, abs=1e-14)
        assert parts[1][i].item() == pytest.approx(-P[i].item() * g, rel=1e-14)


def test_bytes_of_the_snapshot():
    model = model_of()
    optimizer = bnb.optim.AdamW8bit(groups(model))
    recorder = UpdateRecorder(model, optimizer)
    assert recorder.bytes() == 0
    recorder.snapshot()
    n = BIG + 64 * 96 + 40
    assert recorder.bytes() == 4 * n  # θ: there are no moments yet
    set_gradients(model, 0)
    optimizer.step()
    recorder.snapshot()
    codes, blocks = BIG + 64 * 96, 18 + 24
    assert recorder.bytes() == 4 * n + 2 * codes + 2 * 4 * blocks
    recorder.snapshot(moments=True)
    assert recorder.bytes() == 4 * n + 2 * codes + 2 * 4 * blocks + 2 * 4 * 40  # and the 32-bit ones of ``small``
    recorder.forget()
    assert recorder.bytes() == 0


class TestNoSplit:
    @staticmethod
    def why(optimizer: Any, model: nn.ParameterDict) -> str:
        set_gradients(model, 0)
        with record_update(model, optimizer) as recorder:
            optimizer.step()
        update = recorder.update
        assert update.components is update.preconditioner is None
        assert update.norm() > 0
        return update.split_absent

    @pytest.mark.parametrize("kind", ["Lion8bit", "LAMB", "SGD8bit", "AdEMAMix8bit", "RMSprop"])
    def test_other_families(self, kind):
        model = model_of()
        options = {"momentum": 0.9} if kind == "SGD8bit" else {}
        optimizer = getattr(bnb.optim, kind)(model.parameters(), lr=0.01, **options)
        assert self.why(optimizer, model) == (
            f"{kind} is not of Adam's family and not torch's SGD: its step has no momentum, gradient and weight-decay "
            "parts here"
        )

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"max_unorm": 1.0}, "Adam8bit with max_unorm does not step as Adam does"),
            ({"skip_zeros": True}, "Adam8bit with skip_zeros does not step as Adam does"),
            # of versions before 0.50
            ({"percentile_clipping": 5}, "Adam8bit with percentile_clipping does not step as Adam does"),
            (
                {"block_wise": False, "max_unorm": 0.1},
                "Adam8bit with max_unorm and block_wise=False does not step as Adam does",
            ),
        ],
        ids=str,
    )
    def test_options_that_change_the_step(self, options, reason, monkeypatch):
        model = model_of()
        optimizer = bnb.optim.Adam8bit(model.parameters(), lr=0.01)
        get_config = optimizer.get_config
        monkeypatch.setattr(optimizer, "get_config", lambda *arguments: get_config(*arguments) | options)
        assert self.why(optimizer, model) == reason

    def test_a_parameter_whose_memory_is_in_another_order(self):
        """Its state keeps the order of the first step, and codes have no strides of their own."""
        model = nn.ParameterDict({"turned": nn.Parameter(torch.randn(64, 96).t())})
        model["turned"].grad = torch.randn(96, 64)
        optimizer = bnb.optim.Adam8bit(model.parameters(), lr=0.01)
        assert self.why(optimizer, model) == "Adam8bit holds moments of turned in an unknown layout"
