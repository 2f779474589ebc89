"""Scoring against a loop: one un-padded sequence at a time through a plain Hugging Face forward pass."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from entropy_pl.policy import head, logits
from entropy_pl.policy.head import completion_logits, output_head
from entropy_pl.policy.logits import NonFiniteError, chunked_stats, compiled_statistics, logits_to_stats
from entropy_pl.policy.micro_batches import compact, micro_batches
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.score import head_inputs, policy_stats, token_stats
from entropy_pl.probe import EntropyProbe
from entropy_pl.rollout import Rollout
from entropy_pl.updates import UpdateVector

VOCABULARY = 23
# (prompt length, completion length): the shortest possible, one without a completion, none as long as another.
LENGTHS = ((1, 1), (4, 6), (6, 3), (2, 0), (3, 5), (5, 2))

_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_ROTARY = _SHARED | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
_GEMMA = _ROTARY | {"head_dim": 8, "rms_norm_eps": 1e-6}

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROTARY, tie_word_embeddings=False)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROTARY, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROTARY, tie_word_embeddings=False)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GEMMA)),
    # Caps small enough to bite, and a window shorter than the sequences.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_GEMMA,
            final_logit_softcapping=1.5,
            attn_logit_softcapping=2.0,
            sliding_window=4,
            query_pre_attn_scalar=8,
            attn_implementation="eager",
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_SHARED, n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    ),
    # OPT's own activation, ReLU, has kinks: a difference across one means nothing, so it has a family of its own.
    "opt": lambda activation="gelu": OPTForCausalLM(
        OPTConfig(
            **_SHARED,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            init_std=0.3,
            activation_function=activation,
        )
    ),
    "opt-relu": lambda: FAMILIES["opt"]("relu"),
}

SMOOTH = [name for name in FAMILIES if name != "opt-relu"]


def build_family(name: str, lora: bool = False, seed: int = 0) -> nn.Module:
    """A tiny random model of the family, in train mode as a training loop has it; adapters that say something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[name]()
        if lora:
            config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    nn.init.normal_(parameter, std=0.3)
    return model.train()


def build_rollout(lengths: tuple[tuple[int, int], ...] = LENGTHS, seed: int = 0, extra: int = 0) -> Rollout:
    """Random tokens of these lengths, −100 at padding (no embedding has it), ``extra`` more columns on either side."""
    generator = torch.Generator().manual_seed(seed)
    prompts, completions = (max(column) + extra for column in zip(*lengths, strict=True))
    ids = [torch.full((len(lengths), width), -100) for width in (prompts, completions)]
    masks = [torch.zeros_like(i, dtype=torch.bool) for i in ids]
    for row, (prompt, completion) in enumerate(lengths):
        ids[0][row, prompts - prompt :] = torch.randint(3, VOCABULARY, (prompt,), generator=generator)
        masks[0][row, prompts - prompt :] = True
        ids[1][row, :completion] = torch.randint(1, VOCABULARY, (completion,), generator=generator)
        masks[1][row, :completion] = True
    return Rollout(ids[0], masks[0], ids[1], masks[1])


def plain_stats(model: nn.Module, rollout: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """``logp`` and ``entropy`` by definition, in the precision of the model: row after row, token after token."""
    rows_logp, rows_entropy, T = [], [], rollout.completion_ids.shape[1]
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        completion = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
        zero = torch.zeros((), dtype=torch.float64)
        logp, entropy = [zero] * T, [zero] * T
        if completion:
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
            for k, token in enumerate(completion):
                p = torch.softmax(logits[len(prompt) - 1 + k] / temperature, 0)
                logp[k], entropy[k] = p[token].log(), torch.special.entr(p).sum()
        rows_logp.append(torch.stack(logp))
        rows_entropy.append(torch.stack(entropy))
    return torch.stack(rows_logp), torch.stack(rows_entropy)


def assert_stats(stats, logp: Tensor, entropy: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(stats.logp, logp, **tolerance)
    torch.testing.assert_close(stats.entropy, entropy, **tolerance)


# Both sides sum the same few dozen float64 products, in another order.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# float32's 6e-8, grown by two layers and logits of size 5.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return build_rollout()


class TestAgainstALoop:
    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family(self, family, lora, rollout):
        model = build_family(family, lora)
        with float64_evaluation(model), torch.no_grad():
            expected = plain_stats(model, rollout)
            stats = token_stats(model, rollout)
        assert_stats(stats, *expected, **FLOAT64)
        assert stats.logp.dtype == stats.entropy.dtype == torch.float64
        assert torch.equal(stats.mask, rollout.completion_mask)
        assert not stats.logp[~stats.mask].any()
        assert not stats.entropy[~stats.mask].any()
        assert_stats(token_stats(model, rollout), *expected, **FLOAT32)
        assert expected[1][rollout.completion_mask].std() > 0.01  # a uniform policy would hide most mistakes

    def test_the_final_cap_is_respected(self, rollout):
        """The loop goes through the cap as well, so that it must be seen to do something."""
        model = build_family("gemma2").eval()
        with torch.no_grad():
            assert completion_logits(model, rollout).abs().max() <= 1.5
            capped = token_stats(model, rollout)
            model.config.final_logit_softcapping = None
            assert (capped.logp - token_stats(model, rollout).logp).abs().max() > 0.1

    @pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0])
    def test_temperature(self, temperature, rollout):
        model = build_family("qwen2")
        with float64_evaluation(model), torch.no_grad():
            expected = plain_stats(model, rollout, temperature)
            assert_stats(token_stats(model, rollout, temperature=temperature), *expected, **FLOAT64)

    def test_at_a_point_along_the_update(self, rollout):
        model = build_family("llama", lora=True)
        generator = torch.Generator().manual_seed(1)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        direction = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in trainable.items()}
        moved = copy.deepcopy(model)
        with float64_evaluation(moved), torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=0.05)
            expected = plain_stats(moved, rollout)
        update = UpdateVector(direction, lr=1.0)
        with float64_evaluation(model):
            assert_stats(token_stats(model, rollout, update=update, eta=0.05), *expected, **FLOAT64)
        assert_stats(token_stats(model, rollout, update=update, eta=0.05), *expected, **FLOAT32)
        assert torch.equal(token_stats(model, rollout, update=update).logp, token_stats(model, rollout).logp)

    def test_an_adapter_on_the_head_takes_part(self, rollout):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(build_family("qwen2"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        with float64_evaluation(model), torch.no_grad():
            expected = plain_stats(model, rollout)
            assert_stats(token_stats(model, rollout), *expected, **FLOAT64)
            with model.disable_adapter():
                assert_stats(token_stats(model, rollout), *plain_stats(model, rollout), **FLOAT64)
                assert not torch.allclose(plain_stats(model, rollout)[0], expected[0], atol=1e-2)

    def test_a_head_that_is_trained_in_full(self, rollout):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(build_family("qwen2"), config)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "modules_to_save" in n).mul_(2)
        with float64_evaluation(model), torch.no_grad():
            assert_stats(token_stats(model, rollout), *plain_stats(model, rollout), **FLOAT64)


class TestBatchesDoNotMatter:
    @pytest.fixture(scope="class")
    def model(self):
        return build_family("gemma2", lora=True)

    @pytest.fixture(scope="class")
    def reference(self, model, rollout):
        with float64_evaluation(model):
            return token_stats(model, rollout)

    @pytest.mark.parametrize("budget", [1, 7, 10, 16, 1000])
    def test_budget(self, model, rollout, reference, budget):
        with float64_evaluation(model):
            stats = token_stats(model, rollout, max_batch_tokens=budget)
        assert_stats(stats, reference.logp, reference.entropy, **FLOAT64)

    def test_order_of_rows(self, model, rollout, reference):
        order = torch.tensor([4, 0, 5, 2, 1, 3, 4])
        with float64_evaluation(model):
            stats = token_stats(model, rollout.select(order), max_batch_tokens=20)
        assert_stats(stats, reference.logp[order], reference.entropy[order], **FLOAT64)

    def test_more_padding(self, model, rollout, reference):
        with float64_evaluation(model):
            stats = token_stats(model, build_rollout(extra=3))
        T = reference.logp.shape[1]
        assert_stats(
            stats.select(torch.arange(6)),
            *(torch.nn.functional.pad(x, (0, 3)) for x in (reference.logp, reference.entropy)),
            **FLOAT64,
        )
        assert not stats.mask[:, T:].any()

    def test_completions_of_no_tokens_at_all(self, model):
        stats = token_stats(model, build_rollout(((3, 0), (2, 0)), extra=2))
        assert stats.logp.shape == (2, 2)
        assert not stats.logp.any()

    def test_the_head_sees_completion_positions_only(self, rollout):
        """The vocabulary head is where the memory goes: of 21 + 17 tokens it may see 17."""
        model, seen = build_family("llama"), []
        output_head(model).register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
        token_stats(model, rollout)
        tokens = int(rollout.completion_mask.sum())
        assert seen == [((1, tokens, 16), (1, tokens, VOCABULARY))]
        seen.clear()
        token_stats(model, rollout, max_batch_tokens=12)
        assert len(seen) > 2
        assert sum(shape[1] for shape, _ in seen) == tokens
        model(input_ids=torch.tensor([[3, 4, 5]]))
        assert seen[-1][1] == (1, 3, VOCABULARY)  # and afterwards it reads everything again


@pytest.fixture
def three_rows_at_a_time(monkeypatch):
    """The head makes logits of three tokens at a time, and two of them at a time become statistics."""
    monkeypatch.setattr("entropy_pl.policy.head.MIN_HEAD_ROWS", 3)
    monkeypatch.setitem(head.HEAD_CHUNK_BYTES, "cpu", 1)
    monkeypatch.setitem(logits.STATS_CHUNK_BYTES, "cpu", 8 * VOCABULARY * 2)


class TestLogitsInChunks:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
    def test_every_family(self, family, lora, rollout, three_rows_at_a_time):
        """Gemma 2 caps its logits after the head: a chunk that left the model's own forward method would not."""
        model = build_family(family, lora)
        with float64_evaluation(model), torch.no_grad():
            assert_stats(token_stats(model, rollout), *plain_stats(model, rollout), **FLOAT64)

    @pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt"])
    def test_the_body_runs_once_and_is_left_as_it_was(self, family, rollout, three_rows_at_a_time):
        model, at_head, layers = build_family(family), [], []
        output_head(model).register_forward_hook(lambda _, args, out: at_head.append(out.shape[1]))
        body = model.get_decoder()
        stack = body.layers if hasattr(body, "layers") else body.h
        stack[0].register_forward_hook(lambda *_: layers.append(1))
        before = dict(vars(body))
        token_stats(model, rollout)
        tokens = int(rollout.completion_mask.sum())
        assert len(layers) == 1
        assert sum(at_head) == tokens
        assert max(at_head) == 3
        assert vars(body).keys() == before.keys()

    def test_an_error_leaves_the_body_as_it_was(self, rollout, three_rows_at_a_time):
        model = build_family("llama")
        handle = output_head(model).register_forward_hook(lambda _, args, out: out * math.nan)
        with pytest.raises(NonFiniteError, match="17 of 17"):
            token_stats(model, rollout)
        handle.remove()
        with float64_evaluation(model), torch.no_grad():
            assert_stats(token_stats(model, rollout), *plain_stats(model, rollout), **FLOAT64)

    def test_a_model_that_does_not_name_its_body(self, rollout, three_rows_at_a_time, monkeypatch):
        model = build_family("llama")
        monkeypatch.setattr(model, "get_decoder", lambda: model)
        with float64_evaluation(model), torch.no_grad():
            assert_stats(token_stats(model, rollout), *plain_stats(model, rollout), **FLOAT64)


class TestLogitsToStats:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    @pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
    def test_against_torch_distributions(self, temperature, scale):
        generator = torch.Generator().manual_seed(0)
        logits = scale * torch.randn(50, 40, generator=generator, dtype=torch.float64)
        targets = torch.randint(40, (50,), generator=generator)
        expected = torch.distributions.Categorical(logits=logits / temperature)
        logp, entropy = logits_to_stats(logits, targets, temperature, torch.float64)
        # Logits of size `scale` are themselves known to 1e-16 of it.
        torch.testing.assert_close(logp, expected.log_prob(targets), rtol=1e-12, atol=1e-14 * scale)
        torch.testing.assert_close(entropy, expected.entropy(), rtol=1e-12, atol=1e-14 * scale)

    def test_uniform_and_certain(self):
        logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -900.0, -900.0, -900.0]])
        logp, entropy = logits_to_stats(logits, torch.tensor([2, 0]), 1.0, torch.float64)
        assert logp.tolist() == pytest.approx([-math.log(4), 0], abs=1e-15)
        assert entropy.tolist() == pytest.approx([math.log(4), 0], abs=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_minus_infinity_is_probability_zero(self, dtype):
        logits = torch.tensor([[1.0, -math.inf, 2.0, -math.inf, 0.5]], requires_grad=True)
        logp, entropy = logits_to_stats(logits, torch.tensor([2]), 1.0, dtype)
        expected = torch.distributions.Categorical(logits=torch.tensor([1.0, 2.0, 0.5], dtype=dtype))
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0}  # a handful of roundings
        torch.testing.assert_close(logp[0], expected.log_prob(torch.tensor(1)), **tolerance)
        torch.testing.assert_close(entropy[0], expected.entropy(), **tolerance)
        (logp + entropy).sum().backward()
        assert logits.grad.isfinite().all()
        assert not logits.grad[0, [1, 3]].any()
        assert logits_to_stats(logits, torch.tensor([3]), 1.0, dtype)[0].item() == -math.inf


class TestCompiledStatistics:
    @pytest.fixture(autouse=True)
    def compiler(self):
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            pytest.skip("no C++ compiler, which torch.compile wants")

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_same_numbers(self, temperature, dtype):
        """Of chunks of several sizes, the last one short, and of tokens without probability."""
        generator = torch.Generator().manual_seed(0)
        made = 3 * torch.randn(301, 1000, generator=generator)
        made[5, 10:20] = -math.inf
        targets = torch.randint(1000, (301,), generator=generator)
        expected = torch.distributions.Categorical(logits=made.double() / temperature)
        with compiled_statistics(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            logp, entropy = chunked_stats(made, targets, temperature, dtype)
        # A sum of a thousand terms, and log-probs of up to 20 nats.
        tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps}
        torch.testing.assert_close(logp.double(), expected.log_prob(targets), **tolerance)
        exact = torch.stack([torch.special.entr(row.softmax(0)).sum() for row in made.double() / temperature])
        torch.testing.assert_close(entropy.double(), exact, **tolerance)
        assert logits._kernel.cache_info().currsize == 1  # it was made, and did not fall back

    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_in_a_probe(self, precision, rollout):
        model = build_family("gemma2", lora=True)
        generator = torch.Generator().manual_seed(1)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        direction = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in trainable.items()}
        update = UpdateVector(direction, lr=1e-3)
        plain, compiled = (
            EntropyProbe(precision=precision, compile_statistics=on).measure(model, rollout, update)
            for on in (False, True)
        )
        tolerance = 1e-10 if precision == "float64" else 1e-2  # of a difference between numbers of that precision
        assert compiled.taken.true.value == pytest.approx(plain.taken.true.value, rel=tolerance)
        assert compiled.first_order.value == pytest.approx(plain.first_order.value, rel=tolerance)

    def test_without_a_compiler(self, monkeypatch):
        """A warning that says what to do, and the same statistics."""

        def fails() -> None:
            raise RuntimeError("no working C++ compiler")

        fails.cache_clear = lambda: None
        monkeypatch.setattr(logits, "_kernel", fails)
        made, targets = torch.randn(4, VOCABULARY), torch.arange(4)
        with compiled_statistics(), pytest.warns(UserWarning, match=r"no working C\+\+ compiler; .* install a C\+\+"):
            logp, entropy = chunked_stats(made, targets, 1.0, torch.float64)
        expected = torch.distributions.Categorical(logits=made.double())
        torch.testing.assert_close(logp, expected.log_prob(targets))
        torch.testing.assert_close(entropy, expected.entropy())


class TestNotFinite:
    @staticmethod
    def with_logit(value: float, token: int) -> nn.Module:
        model = build_family("qwen2")

        def write(_, args, out):
            out = out.clone()
            out[..., token] = value
            return out

        output_head(model).register_forward_hook(write)
        return model

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_and_infinity_are_refused(self, value, rollout):
        with pytest.raises(NonFiniteError, match=r"NaN or infinity at 17 of 17 completion tokens"):
            token_stats(self.with_logit(value, 5), rollout)

    def test_a_token_that_can_never_be_is_no_harm(self, rollout):
        unused = next(t for t in range(3, VOCABULARY) if not (rollout.completion_ids == t).any())
        model = self.with_logit(-math.inf, unused)
        assert torch.isfinite(token_stats(model, rollout).entropy).all()
        with float64_evaluation(model), torch.no_grad():
            assert_stats(token_stats(model, rollout), *plain_stats(model, rollout), **FLOAT64)

    def test_a_token_that_can_never_be_but_was_drawn(self, rollout):
        token = int(rollout.completion_ids[1, 0])
        count = int((rollout.completion_ids == token).sum())
        with pytest.raises(NonFiniteError, match=f"at {count} of 17"):
            token_stats(self.with_logit(-math.inf, token), rollout)

    def test_nothing_stays_on_the_model_after_an_error(self, rollout):
        model = self.with_logit(math.nan, 5)
        flags = [module.training for module in model.modules()]
        with pytest.raises(NonFiniteError):
            token_stats(model, rollout)
        assert [module.training for module in model.modules()] == flags
        assert not output_head(model)._forward_pre_hooks


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"temperature": 0.0}, r"temperature above 0, got 0\.0"),
            ({"temperature": math.nan}, "temperature above 0, got nan"),
            ({"max_batch_tokens": 0}, "max_batch_tokens ≥ 1, got 0"),
        ],
    )
    def test_out_of_range(self, arguments, message, rollout):
        with pytest.raises(ValueError, match=message):
            token_stats(build_family("qwen2"), rollout, **arguments)

    def test_not_a_language_model(self, rollout):
        with pytest.raises(ValueError, match="Hugging Face causal language model, got Linear"):
            token_stats(nn.Linear(2, 2), rollout)

    def test_an_update_of_another_model(self, rollout):
        update = UpdateVector({"lm_head.weight": torch.zeros(VOCABULARY, 16), "other": torch.zeros(1)}, lr=1.0)
        with pytest.raises(KeyError, match=r"names of the model's parameters, got \['other'\]"):
            token_stats(build_family("qwen2"), rollout, update=update, eta=1.0)


class TestPolicyStats:
    def plain_gradient(self, model, rollout, u, c):
        """d/dθ of Σ u·logp + c·entropy through full logits of every row by itself."""
        logp, entropy = plain_stats(model, rollout, temperature=0.8)
        return torch.autograd.grad((u * logp + c * entropy).sum(), list(model.parameters()), allow_unused=True)

    @pytest.mark.parametrize("family", ["qwen2-tied", "gemma2", "gpt2"])
    @pytest.mark.parametrize("entropy_gradient", [False, True])
    def test_values_and_gradient(self, family, entropy_gradient, rollout):
        model = build_family(family)
        u = torch.randn(rollout.completion_ids.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        u *= rollout.completion_mask
        with float64_evaluation(model):
            expected = self.plain_gradient(model, rollout, u, 0.5 if entropy_gradient else 0.0)
            stats = policy_stats(
                model, rollout.at_temperature(0.8), dtype=torch.float64, entropy_gradient=entropy_gradient
            )
            assert_stats(stats.detach(), *(x.detach() for x in plain_stats(model, rollout, 0.8)), **FLOAT64)
            assert stats.entropy.requires_grad == entropy_gradient
            loss = (u * stats.logp + 0.5 * stats.entropy).sum()
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().max() > 0.1 for g in expected)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                # Float64 roundings of a backward pass, relative to gradients of size one.
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_the_callers_mode_and_autocast_hold(self, rollout):
        model = build_family("llama", lora=True)  # in train mode, dropout 0.5
        torch.manual_seed(0)
        drawn = [policy_stats(model, rollout).logp for _ in range(2)]
        assert not torch.equal(*drawn)
        model.eval()
        plain = policy_stats(model, rollout)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = policy_stats(model, rollout)
        assert plain.logp.dtype == rounded.logp.dtype == torch.float32
        assert 1e-4 < (plain.logp - rounded.logp).abs().max() < 0.5
        assert_stats(
            token_stats(model, rollout, entropy_dtype=torch.float32),
            plain.logp.detach().double(),
            plain.entropy.double(),
            **FLOAT32,
        )

    def test_gradient_checkpointing_gives_the_same_gradient(self, rollout):
        gradients = []
        for checkpointing in (False, True):
            model = build_family("qwen2")
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            policy_stats(model, rollout).logp.sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)


class TestNothingIsLeftBehind:
    def test_flags_parameters_gradients_and_random_numbers(self, rollout):
        model = build_family("qwen2", lora=True)
        model.base_model.model.model.layers[0].eval()  # one part held in eval mode on purpose
        policy_stats(model, rollout).logp.sum().backward()

        def state():
            tensors = [*model.parameters(), *model.buffers()]
            return (
                [id(t) for t in tensors],
                [(t.data_ptr(), t.dtype, t.requires_grad) for t in tensors],
                [module.training for module in model.modules()],
                [id(p.grad) for p in model.parameters()],
                torch.get_rng_state().tolist(),
            )

        values = [t.detach().clone() for t in [*model.parameters(), *model.buffers(), *grads(model)]]
        before = state()
        update = UpdateVector({n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}, lr=1.0)
        token_stats(model, rollout)
        token_stats(model, rollout, update=update, eta=1.0)
        assert state() == before
        after = [*model.parameters(), *model.buffers(), *grads(model)]
        assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))

    def test_dropout_is_off_in_train_mode(self, rollout):
        model = build_family("opt", lora=True)  # OPT drops 0.1 of its activations, the adapter 0.5
        assert model.training
        first = token_stats(model, rollout)
        assert torch.equal(first.logp, token_stats(model, rollout).logp)
        assert torch.equal(first.logp, token_stats(model.eval(), rollout).logp)

    def test_autocast_outside_is_ignored(self, rollout):
        model = build_family("qwen2")
        plain = token_stats(model, rollout)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = token_stats(model, rollout)
            assert torch.is_autocast_enabled("cpu")
            assert model(input_ids=torch.tensor([[3]])).logits.dtype == torch.bfloat16
        assert torch.equal(plain.logp, inside.logp)
        assert torch.equal(plain.entropy, inside.entropy)

    @pytest.mark.parametrize("family", ["qwen2", "gpt2"])
    def test_a_bfloat16_model_is_scored_in_float32(self, family, rollout):
        model = build_family(family).to(torch.bfloat16)
        copied = copy.deepcopy(model).float()
        stats, expected = token_stats(model, rollout), token_stats(copied, rollout)
        assert torch.equal(stats.logp, expected.logp)
        assert torch.equal(stats.entropy, expected.entropy)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    def test_entropy_dtype(self, rollout):
        model = build_family("llama")
        wide, narrow = token_stats(model, rollout), token_stats(model, rollout, entropy_dtype=torch.float32)
        assert narrow.logp.dtype == torch.float64
        difference = (wide.logp - narrow.logp).abs().max()
        assert 0 < difference < 1e-5  # float32's 6e-8 on numbers up to 10


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


class TestHeadInputs:
    @staticmethod
    def plain_states(model: nn.Module, rollout: Rollout) -> Tensor:
        """The last hidden states before every completion token, row after row."""
        states = []
        for row in range(len(rollout)):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
            completion = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
            hidden = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[-1]
            states += [hidden[0, len(prompt) - 1 + k] for k in range(len(completion))]
        return torch.stack(states)

    @pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "gemma2", "gpt2"])
    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
    def test_against_a_loop(self, family, lora, rollout):
        model = build_family(family, lora)
        with float64_evaluation(model), torch.no_grad():
            expected = self.plain_states(model, rollout)
            found = head_inputs(model, rollout)
            torch.testing.assert_close(found, expected, **FLOAT64)
            # They are what the logits are made of, after the final norm. (Gemma 2 caps its logits.)
            if family != "gemma2":
                torch.testing.assert_close(output_head(model)(found), completion_logits(model, rollout), **FLOAT64)
        assert expected.shape == (int(rollout.completion_mask.sum()), 16)
        narrow = head_inputs(model, rollout)
        assert narrow.dtype == torch.float32
        assert not narrow.requires_grad
        torch.testing.assert_close(narrow.double(), expected, **FLOAT32)

    @pytest.mark.parametrize("budget", [1, 7, 16])
    def test_order_and_budget(self, budget):
        model, rollout = build_family("qwen2", lora=True), build_rollout(extra=2)
        with float64_evaluation(model), torch.no_grad():
            torch.testing.assert_close(
                head_inputs(model, rollout, max_batch_tokens=budget), self.plain_states(model, rollout), **FLOAT64
            )

    def test_the_head_has_nothing_to_do_and_reads_on_afterwards(self, rollout):
        model, seen = build_family("qwen2", lora=True).bfloat16(), []
        output_head(model).register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
        assert head_inputs(model, rollout).dtype == torch.float32
        assert seen == [0]
        assert model.training
        model(input_ids=torch.tensor([[3, 4, 5]]))
        assert seen == [0, 3]

    def test_a_head_that_is_trained_in_full(self, rollout):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(build_family("qwen2"), config)
        with float64_evaluation(model), torch.no_grad():
            torch.testing.assert_close(head_inputs(model, rollout), self.plain_states(model, rollout), **FLOAT64)

    def test_no_completions(self):
        assert head_inputs(build_family("qwen2"), build_rollout(((3, 0), (2, 0)))).shape == (0, 16)


lengths_and_budgets = st.tuples(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=40), st.integers(1, 400)
)


class TestMicroBatches:
    @settings(deadline=None, max_examples=150)
    @given(lengths_and_budgets)
    def test_every_row_once_and_within_budget(self, drawn):
        lengths, budget = drawn
        rollout = build_rollout(tuple(lengths))
        groups = micro_batches(rollout, budget)
        rows = [int(i) for group in groups for i in group]
        assert sorted(rows) == [i for i, (_, completion) in enumerate(lengths) if completion]
        for group in groups:
            padded = len(group) * max(sum(lengths[i]) for i in group.tolist())
            assert padded <= budget or len(group) == 1
            part = compact(rollout, group)
            assert part.prompt_mask[:, 0].any()
            assert part.completion_mask[:, -1].any()
            for row, i in enumerate(group.tolist()):
                for name in ("prompt", "completion"):
                    kept = getattr(part, f"{name}_ids")[row][getattr(part, f"{name}_mask")[row]]
                    whole = getattr(rollout, f"{name}_ids")[i][getattr(rollout, f"{name}_mask")[i]]
                    assert torch.equal(kept, whole)

    def test_like_lengths_lie_together(self):
        rollout = build_rollout(((1, 1), (10, 10), (1, 2), (10, 9)))
        assert [group.tolist() for group in micro_batches(rollout, 40)] == [[1, 3], [2, 0]]
