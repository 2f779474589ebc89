"""Precision: what really runs in which dtype, and that everything is put back."""

from __future__ import annotations

import copy
import importlib.util
from types import MethodType
from typing import Any

import pytest
import torch
from test_score import FAMILIES, SMOOTH, build_family, build_rollout, plain_stats
from tiny import build_model
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy_pl.policy.load import load_policy
from entropy_pl.policy.precision import evaluation, evaluation_mode, float64_evaluation, quantized_layers
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.settings import LoraSettings
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.updates import UpdateVector

ROLLOUT = build_rollout()
IDS = torch.tensor([[5, 9, 12, 7]])
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra 'gpu')"
)


class DtypesSeen(TorchDispatchMode):
    """Notes every operation that gives floating numbers narrower than ``dtype``, and counts those that do not."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.narrow, self.wide = dtype, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                if torch.promote_types(leaf.dtype, self.dtype) == leaf.dtype:
                    self.wide += 1
                else:
                    self.narrow.append((str(func), leaf.dtype))
        return out


def random_update(model: nn.Module, seed: int = 0) -> UpdateVector:
    """Of norm 1 over the trainable parameters: log-probs of these models then change by O(1) per unit η."""
    generator = torch.Generator().manual_seed(seed)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    update = UpdateVector(direction, lr=1e-3)
    return update.scaled(1 / update.norm())


def everything(model: nn.Module) -> dict[str, object]:
    """All that a context must put back: which tensors, where they lie, what is in them, every flag."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {n: (id(t), t.data_ptr(), t.dtype, t.requires_grad, id(t.grad)) for n, t in tensors.items()},
        "bits": {n: t.detach().contiguous().view(torch.uint8).tolist() for n, t in tensors.items() if t.ndim},
        "training": [module.training for module in model.modules()],
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default_dtype": torch.get_default_dtype(),
        "function_mode": len(torch.overrides._get_current_function_mode_stack()),
    }


def trained(family: str, dtype: torch.dtype, lora: bool = False) -> nn.Module:
    """A model with gradients, one of its parts held in eval mode."""
    model = build_family(family, lora).to(dtype)
    model(input_ids=IDS, labels=IDS).loss.backward()
    next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0].eval()
    return model


class TestFloat64:
    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_operation_is_float64(self, family, dtype, lora):
        model = build_family(family, lora).to(dtype)
        with float64_evaluation(model), DtypesSeen(torch.float64) as seen:
            token_stats(model, ROLLOUT, update=random_update(model), eta=1e-3)
        assert not seen.narrow
        assert seen.wide > 50

    def test_autocast_outside_is_ignored(self):
        model = build_family("qwen2", lora=True)
        with torch.autocast("cpu", dtype=torch.bfloat16), float64_evaluation(model), DtypesSeen(torch.float64) as seen:
            token_stats_jvp(model, ROLLOUT, random_update(model))
            model(input_ids=IDS)
        assert not seen.narrow

    def test_double_alone_would_not_do(self):
        """The test above can fail: ``model.double()`` leaves casts to float32 in every model with RMSNorm."""
        model = build_family("qwen2").double().eval()
        with DtypesSeen(torch.float64) as seen, torch.no_grad():
            model(input_ids=IDS)
        assert len(seen.narrow) > 10

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_equals_double_where_double_is_enough(self, family):
        """LayerNorm models without casts inside: a copy made double is an oracle of its own."""
        model = build_family(family)
        twin = copy.deepcopy(model).double().eval()
        with DtypesSeen(torch.float64) as seen, torch.no_grad():
            expected = plain_stats(twin, ROLLOUT)
        assert not [narrow for narrow in seen.narrow if "softmax" in narrow[0] or "mm" in narrow[0]]
        with float64_evaluation(model):
            stats = token_stats(model, ROLLOUT)
        # Float64 sums in another order.
        torch.testing.assert_close(stats.logp, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats.entropy, expected[1], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("family", SMOOTH)
    def test_a_tiny_finite_difference_agrees_with_forward_mode(self, family):
        """At η = 1e-6 a single float32 rounding inside (6e-8) would cost 6 %: float64 leaves 1e-15/η = 1e-9."""
        model, eta = build_family(family), 1e-6
        update = random_update(model)
        with float64_evaluation(model):
            first = token_stats_jvp(model, ROLLOUT, update, method="forward_mode")[1]
            plus, minus = (token_stats(model, ROLLOUT, update=update, eta=e) for e in (eta, -eta))
        assert first.logp.abs().max() > 0.1
        for name in ("logp", "entropy"):
            difference = (getattr(plus, name) - getattr(minus, name)) / (2 * eta)
            exact = getattr(first, name)
            torch.testing.assert_close(difference, exact, rtol=0, atol=1e-8 * max(1.0, float(exact.abs().max())))

    def test_a_gradient_can_be_had_inside(self):
        model = build_family("qwen2", lora=True)
        with float64_evaluation(model):
            parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            logp, _ = plain_stats(model, ROLLOUT)
            gradients = torch.autograd.grad(logp.sum(), list(parameters.values()))
        assert {g.dtype for g in gradients} == {torch.float64}
        assert all(p.grad is None for p in model.parameters())

    @needs_bitsandbytes
    def test_quantized_layers_are_refused(self, quantized):
        with (
            pytest.raises(ValueError, match=r"without quantized layers for float64, got .*q_proj.*\(14 in all\)"),
            float64_evaluation(quantized),
        ):
            pass
        assert len(quantized_layers(quantized)) == 14
        assert quantized_layers(build_family("qwen2")) == []


class TestEvaluation:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_bfloat16_model_computes_in_float32(self, family):
        model = build_family(family, lora=True).to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), evaluation(model), DtypesSeen(torch.float32) as seen:
            token_stats(model, ROLLOUT)
        assert not seen.narrow
        assert seen.wide > 50

    def test_float64_stays_float64(self):
        model = build_family("gpt2").double()
        with evaluation(model):
            assert {p.dtype for p in model.parameters()} == {torch.float64}

    def test_eval_mode_and_no_autocast(self):
        model = build_family("qwen2")
        with torch.autocast("cpu", dtype=torch.bfloat16), evaluation(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_autocast_enabled("cpu")


@pytest.fixture
def matmul_switches():
    """Whatever a test does to the process's precision of products, undone."""
    switches = [b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b, "matmul")]
    kept = [(s, s.fp32_precision) for s in switches if hasattr(s, "fp32_precision")]
    if not kept:
        pytest.skip("this PyTorch has no precision switch per backend")
    yield [switch for switch, _ in kept]
    torch.set_float32_matmul_precision("highest")
    for switch, precision in kept:
        switch.fp32_precision = precision


class TestMatmulPrecision:
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_common_switch(self, precision, matmul_switches):
        torch.set_float32_matmul_precision(precision)
        before = [switch.fp32_precision for switch in matmul_switches]

        def fail():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"), evaluation(build_family("qwen2")):
            fail()
        assert torch.get_float32_matmul_precision() == precision
        assert [switch.fp32_precision for switch in matmul_switches] == before

    def test_allow_tf32(self, matmul_switches):
        """Lightning's and most scripts' way; the CPU's own switch must not follow it."""
        torch.backends.cuda.matmul.allow_tf32 = True
        before = [switch.fp32_precision for switch in matmul_switches]
        with evaluation(build_family("qwen2")):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        assert [switch.fp32_precision for switch in matmul_switches] == before

    def test_switches_of_each_backend(self, matmul_switches):
        """PyTorch ≥ 2.9's own way, after which ``torch.get_float32_matmul_precision()`` raises."""
        cuda, cpu = matmul_switches
        cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        with evaluation(build_family("qwen2")):
            assert [switch.fp32_precision for switch in matmul_switches] == ["ieee", "ieee"]
        assert [switch.fp32_precision for switch in matmul_switches] == ["tf32", "bf16"]


CONTEXTS = [
    pytest.param(context, dtype, id=f"{context.__name__}-{str(dtype).removeprefix('torch.')}")
    for context in (evaluation, float64_evaluation)
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
]


class TestEverythingIsPutBack:
    @pytest.mark.parametrize(("context", "dtype"), CONTEXTS)
    @pytest.mark.parametrize("family", ["qwen2-tied", "gemma2"])
    def test_after_use(self, context, dtype, family):
        model = trained(family, dtype)
        before = everything(model)
        with context(model):
            token_stats(model, ROLLOUT, update=random_update(model), eta=0.1)
        assert everything(model) == before

    @pytest.mark.parametrize(("context", "dtype"), CONTEXTS)
    def test_after_an_error(self, context, dtype):
        model = trained("qwen2", dtype, lora=True)
        before = everything(model)
        with pytest.raises(RuntimeError, match="inside"), context(model):
            raise RuntimeError("inside")
        assert everything(model) == before

    @pytest.mark.parametrize("outer", [evaluation, float64_evaluation])
    @pytest.mark.parametrize("inner", [evaluation, float64_evaluation])
    def test_nested(self, outer, inner):
        model = trained("qwen2", torch.bfloat16)
        before = everything(model)
        with outer(model):
            middle = everything(model)
            with inner(model):
                wide = torch.float64 if float64_evaluation in (outer, inner) else torch.float32
                assert {p.dtype for p in model.parameters()} == {wide}
            assert everything(model) == middle
        assert everything(model) == before

    def test_tied_weights_stay_tied(self):
        model = build_family("qwen2-tied").to(torch.bfloat16)
        with float64_evaluation(model):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize(("context", "dtype"), CONTEXTS)
    def test_gradients_go_on_where_they_were(self, context, dtype):
        """Accumulation across a probe: the same as without it."""
        model, twin = trained("qwen2", dtype), trained("qwen2", dtype)
        with context(model):
            token_stats(model, ROLLOUT)
        for each in (model, twin):
            each(input_ids=IDS, labels=IDS).loss.backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad.dtype == dtype
            assert torch.equal(p.grad, q.grad)

    @pytest.mark.parametrize(("context", "dtype"), CONTEXTS)
    def test_hooks_on_gradient_accumulators_still_fire(self, context, dtype):
        """DDP reduces gradients from such hooks, registered once: lose one and ranks drift apart without a word."""
        model, fired = build_family("qwen2").to(dtype), []
        nodes = {n: get_gradient_edge(p).node for n, p in model.named_parameters()}
        for name, node in nodes.items():
            node.register_hook(lambda *_, name=name: fired.append(name))
        with context(model):
            token_stats(model, ROLLOUT)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert sorted(fired) == sorted(nodes)

    def test_a_graph_made_before_can_be_walked_after(self):
        model, twin = build_family("llama"), build_family("llama")
        torch.manual_seed(0)
        loss = model(input_ids=IDS, labels=IDS).loss
        with float64_evaluation(model):
            token_stats(model, ROLLOUT)
        loss.backward()
        twin(input_ids=IDS, labels=IDS).loss.backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


@pytest.fixture
def quantized(tmp_path, tiny_model_factory, tiny_tokenizer):
    """A tiny nf4 policy that computes in bfloat16, with an adapter that says something."""
    tiny_model_factory(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with isolated_rng(0):  # a new adapter is drawn at random
        model, _ = load_policy(str(tmp_path), quantization="nf4", dtype="bfloat16", lora=LoraSettings(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@needs_bitsandbytes
class TestQuantized:
    @staticmethod
    def layers(model):
        import bitsandbytes

        return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]

    @pytest.mark.parametrize("context", [evaluation, evaluation_mode])
    def test_weights_stay_as_they_were(self, quantized, context):
        """In eval mode on a CPU with bfloat16 these layers would repack themselves for good, and train no more.

        Other CPUs are made to believe that they have it: what repacks is plain Python.
        """
        layers = self.layers(quantized)
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
        before = [(m.weight.data.clone(), m.weight.quant_state.absmax.clone(), m.compute_dtype) for m in layers]
        with context(quantized), torch.no_grad():
            quantized(input_ids=IDS)
        for layer, (data, absmax, compute_dtype) in zip(layers, before, strict=True):
            assert torch.equal(layer.weight.data, data)
            assert torch.equal(layer.weight.quant_state.absmax, absmax)
            assert layer.weight.quant_state.nested
            assert layer.compute_dtype == compute_dtype
            assert layer.support_avx512bf16_for_cpu
        quantized(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad.abs().sum() > 0 for n, p in quantized.named_parameters() if "lora_B" in n)

    @staticmethod
    def dequantized(model):
        """The same policy with its weights in ordinary float32 layers."""
        import bitsandbytes

        twin = copy.deepcopy(model)
        for name, layer in list(twin.named_modules()):
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                state = copy.copy(layer.weight.quant_state)
                state.dtype = torch.float32  # or the weights would be rounded to bfloat16
                plain.weight.data = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
                if layer.bias is not None:
                    plain.bias.data = layer.bias.data.float()
                parent, _, child = name.rpartition(".")
                setattr(twin.get_submodule(parent), child, plain)
        assert not quantized_layers(twin)
        return twin

    def test_scored_in_float32(self, quantized):
        stats, expected = token_stats(quantized, ROLLOUT), token_stats(self.dequantized(quantized), ROLLOUT)
        # Float32 against float32; bfloat16 products would be off by 1e-2.
        torch.testing.assert_close(stats.logp, expected.logp, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats.entropy, expected.entropy, rtol=1e-4, atol=1e-4)

    def test_gradients_are_those_of_float32(self, quantized):
        """Backwards these layers have a precision of their own: with bfloat16's, gradients are off by percents."""
        gradients = []
        for model in (quantized, self.dequantized(quantized)):
            with evaluation(model):
                parameters = [p for n, p in model.named_parameters() if "lora" in n]
                gradients.append(torch.autograd.grad(plain_stats(model, ROLLOUT)[0].sum(), parameters))
        for found, expected in zip(*gradients, strict=True):
            # Float32 through two layers, relative to the largest.
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        states = [layer.weight.quant_state for layer in self.layers(quantized)]
        assert {state.dtype for state in states} == {torch.bfloat16}


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


class TestWhatTrainersWrapAround:
    """`torch.compile` and Accelerate's autocast do not reach into a probe, and are back after it."""

    def test_a_forward_of_the_authors_own_survives_compilation(self):
        torch._dynamo.reset()
        model = Doubled()
        inputs = torch.ones(2, 3)

        def tripled(self: Any, x: torch.Tensor) -> torch.Tensor:
            return 3 * self.layer(x)

        model.forward = MethodType(tripled, model)
        expected = model(inputs)
        model.forward = torch.compile(model.forward, backend="eager")
        with evaluation(model):
            assert torch.equal(model(inputs), expected)

    def test_attention_that_knows_half_precision_only_gives_way(self):
        """A kernel like FlashAttention's, which refuses float32; the config has it back afterwards."""

        def flash(module: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if query.dtype == torch.float32:
                raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *arguments, **options)

        ALL_ATTENTION_FUNCTIONS.register("half_only", flash)
        model, plain = build_model(), build_model()
        model.config._attn_implementation_internal = "half_only"
        with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
            model(input_ids=IDS)
        for context in (evaluation, float64_evaluation):
            with context(model), context(plain), torch.no_grad():
                assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        assert model.config._attn_implementation == "half_only"

    @pytest.mark.parametrize("how", ["in place", "a part", "a method"])
    def test_compiled_code_is_set_aside(self, how):
        runs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            def run(*arguments: Any) -> Any:
                runs.append(1)
                return graph(*arguments)

            return run

        torch._dynamo.reset()
        model = Doubled()
        inputs = torch.ones(2, 3)
        plain = model(inputs)
        if how == "in place":
            model.compile(backend=backend)
        elif how == "a part":
            model.layer = torch.compile(model.layer, backend=backend)
        else:
            model.forward = torch.compile(model.forward, backend=backend)
        with evaluation(model):
            assert torch.equal(model(inputs), plain)
        assert not runs
        model(inputs)
        assert runs

    def test_accelerates_autocast_is_set_aside(self):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # one of the process, whatever precision ran before
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        plain = build_model()
        tokens = torch.arange(4, 10)[None]
        expected = plain(input_ids=tokens).logits
        model = accelerator.prepare(build_model())
        wrapped = model(input_ids=tokens).logits
        assert not torch.equal(wrapped, expected)  # bfloat16 inside
        before = vars(model)["forward"]
        with evaluation(model), torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, expected)
        assert vars(model)["forward"] is before
        assert torch.equal(model(input_ids=tokens).logits, wrapped)
        AcceleratorState._reset_state(reset_partial_state=True)
