import math

import pytest
import torch

from entropy_pl.objectives import LossSettings, policy_loss, token_weights
from entropy_pl.objectives.losses import BatchSize

# Two completions of 1 and 3 tokens, padded to 4 positions.
MASK = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo"]

# Ratios π/π_old 1.5, and 0.5, 1, 1.1; advantages 2 and −1; clipped to [0.8, 1.3]:
# −min(1.5·2, 1.3·2) = −2.6, and −min(−0.5, −0.8) = 0.8, −min(−1, −1) = 1, −min(−1.1, −1.1) = 1.1
RATIOS = torch.tensor([[1.5, 7.0, 7.0, 7.0], [0.5, 1.0, 1.1, 7.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
OLD_LOGP = torch.full((2, 4), -3.0, dtype=torch.float64)
LOGP = OLD_LOGP + RATIOS.log()


def settings(loss_type="grpo", **changes):
    return LossSettings(loss_type, clip_low=0.2, clip_high=0.3, max_completion_length=5, **changes)


def weights(loss_type, mask=MASK, **arguments):
    return token_weights(mask, loss_type, 5, dtype=torch.float64, **arguments)


@pytest.mark.parametrize(
    ("loss_type", "first", "second"),
    [("grpo", 1 / 2, 1 / 6), ("dr_grpo", 1 / 10, 1 / 10), ("dapo", 1 / 4, 1 / 4), ("bnpo", 1 / 4, 1 / 4)],
)
def test_token_weights(loss_type, first, second):
    expected = [[first, 0, 0, 0], [second, second, second, 0]]
    torch.testing.assert_close(weights(loss_type), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("loss_type", "divisors"),
    [
        ("grpo", [5 * 1, 5 * 3, 5 * 4]),  # five completions in all
        ("dr_grpo", [5 * 5] * 3),
        ("dapo", [16] * 3),
        ("bnpo", [2 * 4, 2 * 4, 2 * 12]),  # two processes count the same, and within them their 4 and 12 tokens
    ],
)
def test_weights_over_processes(loss_type, divisors):
    """Two processes hold completions of 1 and 3 tokens, and of 4, 4 and 4; a third one has none."""
    other = torch.ones(3, 4, dtype=torch.bool)
    whole = BatchSize(completions=5, tokens=16, processes=2)
    first, second, third = (weights(loss_type, mask, whole=whole) for mask in (MASK, other, other[:0]))
    assert third.shape == (0, 4)
    for row, divisor in zip((first[0], first[1], *second), [*divisors, *divisors[-1:] * 2], strict=True):
        assert row[row > 0].tolist() == pytest.approx([1 / divisor] * int((row > 0).sum()), rel=1e-15)  # a rounding


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", (-2.6 + (0.8 + 1.0 + 1.1) / 3) / 2),
        ("dr_grpo", (-2.6 + 0.8 + 1.0 + 1.1) / 10),
        ("dapo", (-2.6 + 0.8 + 1.0 + 1.1) / 4),
        ("bnpo", (-2.6 + 0.8 + 1.0 + 1.1) / 4),
    ],
)
def test_loss_by_hand(loss_type, expected):
    result = policy_loss(LOGP, OLD_LOGP, ADVANTAGES, weights(loss_type), settings(loss_type))
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert (result.num_tokens.item(), result.clipped_low.item(), result.clipped_high.item()) == (4, 1, 1)
    assert result.kl_sum.item() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, -1.3, 0.0, (0, 1)),  # good and likelier already: clipped from above
        (1.5, -1.0, 1.5, 1.5, (0, 0)),  # bad and likelier: pushed back
        (0.5, 1.0, -0.5, -0.5, (0, 0)),  # good and less likely: pulled up
        (0.5, -1.0, 0.8, 0.0, (1, 0)),  # bad and less likely already: clipped from below
        (1.2, 1.0, -1.2, -1.2, (0, 0)),  # inside, with the high side wider
    ],
)
def test_clip(ratio, advantage, loss, gradient, clipped):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    result = policy_loss(logp, torch.zeros_like(one), advantage * one[0], one, settings())
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss)
    assert logp.grad.item() == pytest.approx(gradient)
    assert (result.clipped_low.item(), result.clipped_high.item()) == clipped


def test_kl():
    # π_ref/π = 2 at the first token and 1/2, 1, 4 at the others: k3 = 2 − ln 2 − 1, 1/2 + ln 2 − 1, 0, 4 − ln 4 − 1
    ref_logp = LOGP + torch.tensor([[2.0, 7.0, 7.0, 7.0], [0.5, 1.0, 4.0, 7.0]], dtype=torch.float64).log()
    k3 = [0.30685281944, 0.19314718056, 0.0, 1.61370563888]
    arguments = (LOGP, OLD_LOGP, ADVANTAGES, weights("bnpo"))
    result = policy_loss(*arguments, settings("bnpo", kl_coefficient=0.1), ref_logp)
    assert result.kl_sum.item() == pytest.approx(sum(k3), abs=1e-9)
    assert result.loss.item() == pytest.approx((-2.6 + 0.8 + 1.0 + 1.1 + 0.1 * sum(k3)) / 4, abs=1e-9)
    measured_only = policy_loss(*arguments, settings("bnpo"), ref_logp)
    assert measured_only.kl_sum.item() == pytest.approx(sum(k3), abs=1e-9)
    assert measured_only.loss.item() == pytest.approx((-2.6 + 0.8 + 1.0 + 1.1) / 4, abs=1e-9)


# The tokens' losses −2.6, and 0.8, 1, 1.1; the second token of the second completion is chosen; |log ρ| of it is ln 2
CHOSEN = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
ENTROPY = torch.tensor([[0.3, 7.0, 7.0, 7.0], [1.5, 0.25, 2.0, 7.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected", "clipped"),
    [
        ({"entropy_coefficient": 0.1}, -2.6 + 0.8 + 1.0 + 1.1 - 0.1 * (0.3 + 1.5 + 0.25 + 2.0), (1, 1)),
        ({"advantage_sign": "positive"}, -2.6, (0, 1)),
        ({"advantage_sign": "negative"}, 0.8 + 1.0 + 1.1, (1, 0)),
        ({"clip_cov_fraction": 0.1}, -2.6 + 1.0 + 1.1, (0, 1)),
        ({"kl_cov_fraction": 0.1, "kl_cov_coefficient": 3.0}, -2.6 + 0.5 + 3 * math.log(2) + 1.0 + 1.1, (0, 1)),
        # a token that is not taught pays its price all the same
        ({"kl_cov_fraction": 0.1, "advantage_sign": "positive"}, -2.6 + math.log(2), (0, 1)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_by_hand(options, expected, clipped):
    """Divided by four tokens, whichever of them are taught."""
    logp, entropy = LOGP.clone().requires_grad_(), ENTROPY.masked_fill(~MASK, float("nan")).requires_grad_()
    result = policy_loss(
        logp, OLD_LOGP, ADVANTAGES, weights("bnpo"), settings("bnpo", **options), entropy=entropy, selected=CHOSEN
    )
    assert result.loss.item() == pytest.approx(expected / 4, abs=1e-12)
    assert (result.clipped_low.item(), result.clipped_high.item()) == clipped
    assert result.num_tokens.item() == 4
    result.loss.backward()
    assert logp.grad.isfinite().all()
    slope = options.get("entropy_coefficient", 0.0) / 4
    wanted = [0.0] * 8 if not slope else [-slope if m else 0.0 for m in MASK.flatten().tolist()]
    gradient = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    assert gradient.flatten().tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("options", [{"advantage_sign": "positive"}, {"clip_cov_fraction": 0.1}], ids=["sign", "cov"])
def test_a_token_that_is_not_taught_may_have_left_any_distance(options):
    """Its ratio overflows, and its gradient is zero all the same."""
    logp = torch.where(CHOSEN, LOGP + 1e4, LOGP).requires_grad_()
    policy_loss(logp, OLD_LOGP, ADVANTAGES, weights("bnpo"), settings(**options), selected=CHOSEN).loss.backward()
    assert logp.grad.isfinite().all()
    assert logp.grad[1, 0] == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_at_the_sampling_policy(loss_type):
    logp = OLD_LOGP.clone().requires_grad_()
    w = weights(loss_type)
    policy_loss(logp, OLD_LOGP, ADVANTAGES, w, settings(loss_type)).loss.backward()
    for i in range(2):
        for k in range(4):
            assert logp.grad[i, k].item() == pytest.approx(-ADVANTAGES[i].item() * w[i, k].item())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_against_a_loop_and_micro_batches_add_up(loss_type):
    n, length = 7, 5
    generator = torch.Generator().manual_seed(0)
    logp, old, ref = (torch.randn(n, length, generator=generator).double() / 2 - 2 for _ in range(3))
    advantages = torch.randn(n, generator=generator).double()
    lengths = torch.tensor([5, 1, 3, 0, 2, 5, 4])
    mask = torch.arange(length) < lengths[:, None]
    chosen = settings(loss_type, kl_coefficient=0.05)
    w = weights(loss_type, mask)

    expected = {"loss": 0.0, "num_tokens": 0, "clipped_low": 0, "clipped_high": 0, "kl_sum": 0.0}
    for i in range(n):
        divisor = {"grpo": n * int(lengths[i]), "dr_grpo": n * 5}.get(loss_type, 20)
        for k in range(int(lengths[i])):
            a, ratio = advantages[i].item(), math.exp(logp[i, k] - old[i, k])
            gap = ref[i, k].item() - logp[i, k].item()
            k3 = math.exp(gap) - gap - 1
            expected["loss"] += (-min(ratio * a, min(max(ratio, 0.8), 1.3) * a) + 0.05 * k3) / divisor
            expected["num_tokens"] += 1
            expected["clipped_low"] += ratio < 0.8 and a < 0
            expected["clipped_high"] += ratio > 1.3 and a > 0
            expected["kl_sum"] += k3

    for sizes in ([7], [1] * 7, [4, 3]):
        leaf = logp.clone().requires_grad_()
        parts = [torch.split(x, sizes) for x in (leaf, old, advantages, w, ref)]
        results = [policy_loss(*rows[:4], chosen, rows[4]) for rows in zip(*parts, strict=True)]
        for name, value in expected.items():
            assert sum(getattr(result, name).item() for result in results) == pytest.approx(value, rel=1e-12)
        (gradient,) = torch.autograd.grad(sum(result.loss for result in results), leaf)
        whole_leaf = logp.clone().requires_grad_()
        (whole,) = torch.autograd.grad(policy_loss(whole_leaf, old, advantages, w, chosen, ref).loss, whole_leaf)
        torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf")])
def test_padding_may_hold_anything(filler):
    logp = LOGP.masked_fill(~MASK, filler).requires_grad_()
    result = policy_loss(logp, OLD_LOGP, ADVANTAGES, weights("grpo"), settings(kl_coefficient=0.1), OLD_LOGP)
    result.loss.backward()
    assert result.loss.isfinite()
    assert result.kl_sum.isfinite()
    assert logp.grad.isfinite().all()


def test_metrics_carry_no_graph():
    result = policy_loss(
        LOGP.clone().requires_grad_(), OLD_LOGP, ADVANTAGES, weights("grpo"), settings(kl_coefficient=1.0), OLD_LOGP
    )
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in (result.num_tokens, result.clipped_low, result.clipped_high, result.kl_sum))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "ppo"}, r"\['grpo', 'dr_grpo', 'dapo', 'bnpo'\], got 'ppo'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length of at least 1 for loss type 'dr_grpo', got None"),
        ({"clip_low": 1.5}, "clip_low between 0 and 1, got 1.5"),
        ({"clip_high": -0.1}, "clip_high to be finite and not negative, got -0.1"),
        ({"kl_coefficient": float("nan")}, "kl_coefficient to be finite and not negative, got nan"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient to be finite and not negative, got -0.1"),
        ({"advantage_sign": "plus"}, r"advantage_sign out of \['both', 'positive', 'negative'\], got 'plus'"),
        ({"clip_cov_fraction": 1.5}, "clip_cov_fraction between 0 and 1, got 1.5"),
        ({"clip_cov_bounds": (5.0, 1.0)}, r"two numbers, the smaller one first, got \[5.0, 1.0\]"),
        ({"clip_cov_bounds": (1.0,)}, r"two numbers, the smaller one first, got \[1.0\]"),
        ({"kl_cov_fraction": -1.0}, "kl_cov_fraction between 0 and 1, got -1.0"),
        ({"kl_cov_coefficient": float("inf")}, "kl_cov_coefficient to be finite and not negative, got inf"),
        (
            {"clip_cov_fraction": 0.1, "kl_cov_fraction": 0.2},
            r"Clip-Cov or KL-Cov, got both \(clip_cov_fraction=0.1, kl_cov_fraction=0.2\): set one of them to 0",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**arguments)


def test_bad_arrays():
    w = weights("grpo")
    with pytest.raises(ValueError, match=r"got \[\[2, 4\], \[2, 3\], \[2, 4\]\] and \[2\]"):
        policy_loss(LOGP, OLD_LOGP[:, :3], ADVANTAGES, w, settings())
    with pytest.raises(ValueError, match=r"and \[1\]"):
        policy_loss(LOGP, OLD_LOGP, ADVANTAGES[:1], w, settings())
    with pytest.raises(ValueError, match=r"expected ref_logp with kl_coefficient=.*, got None"):
        policy_loss(LOGP, OLD_LOGP, ADVANTAGES, w, settings(kl_coefficient=0.1))
    with pytest.raises(ValueError, match=r"mask \[n, T\], got shape \[4\]"):
        token_weights(MASK[0], "grpo")
    with pytest.raises(ValueError, match=r"expected logp, old_logp, weights, selected of one shape .*\[2, 3\]\] and"):
        policy_loss(LOGP, OLD_LOGP, ADVANTAGES, w, settings(), selected=MASK[:, :3])
    for option, name in (
        ("entropy_coefficient", "entropy"),
        *((f"{x}_cov_fraction", "selected") for x in ("clip", "kl")),
    ):
        with pytest.raises(ValueError, match=f"expected {name} with {option}=0.1, got None"):
            policy_loss(LOGP, OLD_LOGP, ADVANTAGES, w, settings(**{option: 0.1}))
