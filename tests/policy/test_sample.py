import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import stats
from tiny import with_special_tokens
from transformers import GenerationConfig

from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import CPU_ROWS, MAX_ROWS, decode_completions, end_token_ids, sample_completions
from entropy_pl.rollout import Rollout

PROMPTS = ["1+2=", "a", "what is 17 - 5?", "1+2=", "((3)*(4))"]
EOS, END, BOS = 1, 2, 3


def hostile_config() -> GenerationConfig:
    """Every habit a checkpoint could bring that would bend the sampling distribution or the lengths."""
    return GenerationConfig(
        do_sample=False,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        typical_p=0.1,
        temperature=0.1,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        min_new_tokens=2,
        suppress_tokens=[5, 6],
        begin_suppress_tokens=[EOS, 7],
        forced_eos_token_id=EOS,
        exponential_decay_length_penalty=(0, 3.0),
        num_return_sequences=3,
        num_beams=3,
        max_length=3,
        eos_token_id=EOS,
    )


@torch.no_grad()
def next_distribution(model, ids: list[int], temperature: float) -> torch.Tensor:
    return torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature, -1)


def z_of_counts(counts: torch.Tensor, probabilities: torch.Tensor, N: int) -> tuple[float, float]:
    """Largest |z| of a cell expected at least 10 times, and the z of chi-square over those cells and the rest."""
    keep = probabilities * N >= 10
    cells = torch.cat([counts[keep], counts[~keep].sum()[None]]).double()
    expected = torch.cat([probabilities[keep], probabilities[~keep].sum()[None]]) * N
    cells, expected = cells[expected > 0], expected[expected > 0]
    z = ((cells - expected) / (expected * (1 - expected / N)).sqrt()).abs().max()
    p = stats.chi2.sf(float(((cells - expected) ** 2 / expected).sum()), len(cells) - 1)
    return float(z), float(stats.norm.isf(p))


class TestDistribution:
    """The samples against the enumerated distribution; fixed seeds, N = 20,000, z < 4."""

    N = 20_000

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
    def test_one_token_is_softmax_of_logits_over_temperature(self, tiny_model_factory, tiny_tokenizer, temperature):
        model = tiny_model_factory(logit_scale=0.3)
        model.generation_config = hostile_config()
        with isolated_rng(1):
            rollout = sample_completions(
                model,
                tiny_tokenizer,
                ["1+1="],
                num_completions=self.N,
                max_new_tokens=1,
                temperature=temperature,
                batch_size=self.N,
            )
        expected = next_distribution(model, tiny_tokenizer("1+1=").input_ids, temperature)
        assert ((expected * self.N) > 10).sum() > 40  # the test sees most of the vocabulary
        counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(expected))
        z_cell, z_chi2 = z_of_counts(counts, expected, self.N)
        assert z_cell < 4
        assert z_chi2 < 4

    def test_two_tokens_with_cache_and_padding_follow_the_joint_distribution(
        self, tiny_model_factory, tiny_tokenizer_factory
    ):
        """Two prompts of different length share a batch; EOS may come first, after which there is no second token."""
        tokenizer = tiny_tokenizer_factory(characters="abcd")
        model = tiny_model_factory(vocab_size=8, logit_scale=1.5)
        model.generation_config = hostile_config()
        prompts, V = ["a", "dcbabc"], 8
        with isolated_rng(2):
            rollout = sample_completions(
                model, tokenizer, prompts, num_completions=self.N, max_new_tokens=2, batch_size=2 * self.N
            )
        for p, prompt in enumerate(prompts):
            ids = tokenizer(prompt).input_ids
            first = next_distribution(model, ids, 1.0)
            joint = torch.zeros(V, V + 1, dtype=torch.float64)  # last column: the completion ended
            for token in range(V):
                if token == EOS:
                    joint[token, V] = first[token]
                else:
                    joint[token, :V] = first[token] * next_distribution(model, [*ids, token], 1.0)
            assert joint.sum() == pytest.approx(1)
            rows = slice(p * self.N, (p + 1) * self.N)
            drawn, mask = rollout.completion_ids[rows], rollout.completion_mask[rows]
            second = torch.where(mask[:, 1], drawn[:, 1], V)
            counts = torch.bincount(drawn[:, 0] * (V + 1) + second, minlength=V * (V + 1))
            z_cell, z_chi2 = z_of_counts(counts, joint.flatten(), self.N)
            assert z_cell < 4
            assert z_chi2 < 4

    def test_three_tokens_of_rows_that_leave_the_batch_follow_the_joint_distribution(
        self, tiny_model_factory, tiny_tokenizer_factory
    ):
        """Two end tokens of six: rows leave after the first and the second token, the others' caches move up."""
        tokenizer = tiny_tokenizer_factory(characters="ab")
        model = tiny_model_factory(vocab_size=6)
        model.generation_config.eos_token_id = END
        batches = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kw: batches.append(tuple(kw["input_ids"].shape)), with_kwargs=True
        )
        prompts, V = ["b", "abbab"], 6
        with isolated_rng(5):
            rollout = sample_completions(
                model, tokenizer, prompts, num_completions=self.N, max_new_tokens=3, batch_size=2 * self.N
            )
        hook.remove()
        rows = [rows for rows, _ in batches]
        assert rows[0] == 2 * self.N > rows[1] > rows[2]
        for p, prompt in enumerate(prompts):
            ids = tokenizer(prompt).input_ids
            joint = torch.zeros((V + 1,) * 3, dtype=torch.float64)  # index V: the completion had ended

            def enumerate_from(tokens: list[int], probability: torch.Tensor, ids=ids, joint=joint) -> None:
                if len(tokens) == 3 or (tokens and tokens[-1] in (EOS, END)):
                    joint[tuple([*tokens, V, V][:3])] = probability
                    return
                following = next_distribution(model, ids + tokens, 1.0)
                for token in range(V):
                    enumerate_from([*tokens, token], probability * following[token])

            enumerate_from([], torch.ones((), dtype=torch.float64))
            assert joint.sum() == pytest.approx(1)
            of_prompt = slice(p * self.N, (p + 1) * self.N)
            drawn = torch.where(rollout.completion_mask[of_prompt], rollout.completion_ids[of_prompt], V)
            cells = (drawn * torch.tensor([(V + 1) ** 2, V + 1, 1])).sum(1)
            counts = torch.bincount(cells, minlength=(V + 1) ** 3)
            z_cell, z_chi2 = z_of_counts(counts, joint.flatten(), self.N)
            assert z_cell < 4
            assert z_chi2 < 4

    def test_top_k_and_top_p_cut_when_asked_to(self, tiny_model, tiny_tokenizer):
        expected = next_distribution(tiny_model, tiny_tokenizer("1+1=").input_ids, 1.0)
        order = expected.argsort(descending=True)
        nucleus = order[: int((expected[order].cumsum(0) < 0.5).sum()) + 1]
        with isolated_rng(3):
            options = {"num_completions": 500, "max_new_tokens": 1, "batch_size": 500}
            top_k = sample_completions(tiny_model, tiny_tokenizer, ["1+1="], top_k=3, **options)
            top_p = sample_completions(tiny_model, tiny_tokenizer, ["1+1="], top_p=0.5, **options)
        assert set(top_k.completion_ids.flatten().tolist()) == set(order[:3].tolist())
        assert set(top_p.completion_ids.flatten().tolist()) <= set(nucleus.tolist())


class TestRows:
    @pytest.mark.parametrize("batch_size", [1, 2, None])
    def test_greedy_batches_equal_one_prompt_at_a_time(self, tiny_model, tiny_tokenizer, batch_size):
        """Without padding, cache or ``generate``: a loop over full forward passes."""
        rollout = sample_completions(
            tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, top_k=1, batch_size=batch_size
        )
        for row, prompt in enumerate(PROMPTS):
            ids = tiny_tokenizer(prompt).input_ids
            expected: list[int] = []
            while len(expected) < 12 and EOS not in expected:
                expected.append(int(next_distribution(tiny_model, ids + expected, 1.0).argmax()))
            assert rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist() == ids
            assert rollout.completion_ids[row][rollout.completion_mask[row]].tolist() == expected

    def test_rows_are_prompt_major_in_the_order_given(self, tiny_model, tiny_tokenizer):
        rollout = sample_completions(
            tiny_model, tiny_tokenizer, PROMPTS, num_completions=3, max_new_tokens=4, batch_size=4
        )
        assert len(rollout) == 15
        texts = [tiny_tokenizer.decode(i[m]) for i, m in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        assert texts == [prompt for prompt in PROMPTS for _ in range(3)]
        assert rollout.prompt_ids.shape[1] == max(len(prompt) for prompt in PROMPTS)
        assert (rollout.prompt_ids[~rollout.prompt_mask] == tiny_tokenizer.pad_token_id).all()

    def test_rows_sampled_at_once_by_default(self, tiny_model, tiny_tokenizer):
        batches = []
        tiny_model.register_forward_pre_hook(lambda _, args, kw: batches.append(len(kw["input_ids"])), with_kwargs=True)
        sample_completions(tiny_model, tiny_tokenizer, ["1"], num_completions=CPU_ROWS + 3, max_new_tokens=1)
        assert batches == [CPU_ROWS, 3]
        assert CPU_ROWS <= MAX_ROWS

    def test_seeded_by_the_global_stream(self, tiny_model, tiny_tokenizer):
        rollouts = []
        for seed in (1, 1, 2):
            with isolated_rng(seed):
                rollouts.append(
                    sample_completions(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=6).completion_ids
                )
        assert torch.equal(rollouts[0], rollouts[1])
        assert not torch.equal(rollouts[0], rollouts[2])

    def test_an_adapter_takes_part_and_can_be_off(self, tiny_model, tiny_tokenizer):
        plain = sample_completions(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=6, top_k=1)
        model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted = sample_completions(model, tiny_tokenizer, PROMPTS, max_new_tokens=6, top_k=1)
        with model.disable_adapter():
            off = sample_completions(model, tiny_tokenizer, PROMPTS, max_new_tokens=6, top_k=1)
        assert torch.equal(off.completion_ids, plain.completion_ids)
        assert not torch.equal(adapted.completion_ids, plain.completion_ids)


class TestEnd:
    @pytest.fixture
    def scripted(self, tiny_model_factory, tiny_tokenizer):
        """A model that writes what it is told to after a prompt of one token, whatever it has read."""

        def build(*tokens: int):
            model = tiny_model_factory()

            def write(module, inputs, keywords, output):
                position = keywords["position_ids"][:, -1]
                script = torch.tensor([*tokens, *[9] * 20])
                output.logits[:, -1] = -50.0
                output.logits[torch.arange(len(position)), -1, script[position]] = 50.0
                return output

            model.register_forward_hook(write, with_kwargs=True)
            return model

        return build

    def test_mask_counts_the_first_eos_and_nothing_after(self, scripted, tiny_tokenizer):
        rollout = sample_completions(scripted(8, 9, EOS, 7, EOS), tiny_tokenizer, ["a"], max_new_tokens=6)
        assert rollout.completion_ids.tolist() == [[8, 9, EOS]]
        assert rollout.completion_mask.all()

    @pytest.mark.parametrize(("tokens", "length"), [((8, END, 9, EOS), 2), ((8, 9, EOS), 3), ((EOS,), 1)])
    def test_any_of_several_eos_tokens_ends(self, scripted, tiny_tokenizer, tokens, length):
        model = scripted(*tokens)
        model.generation_config.eos_token_id = [END, BOS]  # and EOS is the tokenizer's own
        assert end_token_ids(model, tiny_tokenizer) == [EOS, END, BOS]
        rollout = sample_completions(model, tiny_tokenizer, ["a"], max_new_tokens=6)
        assert rollout.completion_ids.tolist() == [list(tokens[:length])]

    def test_a_sampled_pad_token_is_a_token(self, scripted, tiny_tokenizer):
        rollout = sample_completions(scripted(8, 0, 9, EOS), tiny_tokenizer, ["a"], max_new_tokens=6)
        assert rollout.completion_ids.tolist() == [[8, 0, 9, EOS]]
        assert rollout.completion_mask.all()

    def test_pad_being_eos_still_counts_the_first_eos(self, scripted, tiny_tokenizer_factory):
        tokenizer = tiny_tokenizer_factory(pad_token="<eos>")
        rollout = sample_completions(scripted(8, EOS), tokenizer, ["a"], max_new_tokens=6)
        assert rollout.completion_ids.tolist() == [[8, EOS]]
        assert rollout.completion_mask.all()

    def test_without_any_eos_completions_run_to_the_limit(self, scripted, tiny_tokenizer_factory):
        model = scripted(8, EOS, END)
        model.generation_config.eos_token_id = None
        rollout = sample_completions(model, tiny_tokenizer_factory(eos_token=None), ["a"], max_new_tokens=5)
        assert rollout.completion_ids.tolist() == [[8, EOS, END, 9, 9]]
        assert rollout.completion_mask.all()


class TestDecode:
    def test_special_tokens_and_masked_positions_are_left_out(self, tiny_tokenizer):
        ids = torch.tensor([[*tiny_tokenizer("1 + 2").input_ids, EOS], [*tiny_tokenizer("ab").input_ids, EOS, 9, 9, 9]])
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
        rollout = Rollout(torch.full((2, 1), 5), torch.ones(2, 1), ids, mask)
        assert decode_completions(tiny_tokenizer, rollout) == ["1 + 2", "ab"]


class TestNothingIsLeftBehind:
    @staticmethod
    def state(model):
        return (
            [module.training for module in model.modules()],
            id(model.generation_config),
            model.generation_config.to_dict(),
            model.config.to_dict(),
            [parameter.requires_grad for parameter in model.parameters()],
        )

    @pytest.fixture
    def model(self, tiny_model_factory):
        """A model in the middle of training: dropout, checkpointing, no cache, one part held in eval mode."""
        model = tiny_model_factory(attention_dropout=0.5)
        model.generation_config = hostile_config()
        model.config.use_cache = False
        model.train()
        model.model.layers[0].eval()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    def test_flags_configs_and_gradients(self, model, tiny_model, tiny_tokenizer):
        before = self.state(model)
        rollout = sample_completions(model, tiny_tokenizer, PROMPTS, max_new_tokens=6, top_k=1)
        assert self.state(model) == before
        plain = sample_completions(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=6, top_k=1)
        assert torch.equal(rollout.completion_ids, plain.completion_ids)
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_after_an_error_too(self, model, tiny_tokenizer):
        before = self.state(model)

        def fail(*_):
            raise RuntimeError("inside")

        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            sample_completions(model, tiny_tokenizer, PROMPTS, max_new_tokens=6)
        handle.remove()
        assert self.state(model) == before

    def test_the_cache_is_used_whatever_the_config_says(self, model, tiny_tokenizer):
        lengths = []
        model.model.register_forward_pre_hook(
            lambda _, args, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True
        )
        sample_completions(model, tiny_tokenizer, ["abc"], max_new_tokens=4, num_completions=8)
        assert lengths == [3, 1, 1, 1]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompts": []}, "at least one prompt .* empty list"),
            ({"prompts": "1+1="}, "a list of prompts, got one string"),
            ({"max_new_tokens": 0}, "max_new_tokens of at least 1, got 0"),
            ({"num_completions": 0}, "num_completions of at least 1, got 0"),
            ({"batch_size": 0}, "batch_size of at least 1, got 0"),
            ({"top_k": 0}, "top_k of at least 1, got 0"),
            ({"temperature": 0.0}, r"temperature above 0, got 0\.0 .*top_k=1"),
            ({"temperature": math.nan}, "temperature above 0, got nan"),
            ({"top_p": 0.0}, r"top_p in \(0, 1\], got 0\.0"),
            ({"prompts": ["1", "", "2"]}, "none from prompt 1, ''"),
            ({"prompts": ["1", "2", "ÄÖ"]}, "none from prompt 2, 'ÄÖ'"),
            (
                {"prompts": ["1", "2" * 60]},
                r"context of 64 tokens, got 60 prompt tokens \+ 8 new tokens = 68 for prompt 1",
            ),
        ],
    )
    def test_bad_arguments(self, tiny_model, tiny_tokenizer, arguments, message):
        with pytest.raises(ValueError, match=message):
            sample_completions(tiny_model, tiny_tokenizer, **({"prompts": ["1"], "max_new_tokens": 8} | arguments))

    def test_prompt_and_completion_that_just_fit(self, tiny_model, tiny_tokenizer):
        rollout = sample_completions(tiny_model, tiny_tokenizer, ["2" * 56], max_new_tokens=8, num_completions=4)
        assert rollout.prompt_ids.shape == (4, 56)

    def test_a_token_the_model_does_not_embed(self, tiny_model_factory, tiny_tokenizer):
        with pytest.raises(ValueError, match=r"token ids below 10, .* got 13 in prompt 1"):
            sample_completions(tiny_model_factory(vocab_size=10), tiny_tokenizer, ["1", "9"], max_new_tokens=2)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_that_are_not_finite(self, tiny_model, tiny_tokenizer, value):
        with torch.no_grad():
            tiny_model.lm_head.weight[5] = value
        with pytest.raises(FloatingPointError, match="expected finite logits"):
            sample_completions(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=4)

    def test_prompt_learning_is_refused(self, tiny_model, tiny_tokenizer):
        model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(ValueError, match="learns prompts"):
            sample_completions(model, tiny_tokenizer, ["1"], max_new_tokens=2)

    def test_a_second_bos_is_dropped(self, tiny_model, tiny_tokenizer_factory):
        tokenizer = with_special_tokens(tiny_tokenizer_factory(bos_token="<bos>"), "<bos> $A")
        rollout = sample_completions(tiny_model, tokenizer, ["12", "<bos>12"], max_new_tokens=2)
        assert rollout.prompt_ids.tolist() == [[BOS, 5, 6]] * 2

    def test_token_ids_are_begun_with_as_they_are(self, tiny_model, tiny_tokenizer_factory):
        tokenizer = with_special_tokens(tiny_tokenizer_factory(bos_token="<bos>"), "<bos> $A")
        rollout = sample_completions(tiny_model, tokenizer, [[BOS, BOS, 5], "1", (6,)], max_new_tokens=2)
        begun = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        assert begun == [[BOS, BOS, 5], [BOS, 5], [6]]
        with pytest.raises(ValueError, match="token ids below 55, as many as the model embeds, got -1 in prompt 1"):
            sample_completions(tiny_model, tokenizer, ["1", [4, -1]], max_new_tokens=2)


def test_the_real_policy_writes_answers(shared_dir):
    from entropy_pl.policy.load import load_policy

    model, tokenizer = load_policy(str(shared_dir / "models" / "gsm8k-4m"))
    prompts = [
        f"Question: Tom has {n} apples and buys {n + 3} more. How many now?\nResponse: <think>" for n in range(4)
    ]
    with isolated_rng(0):
        rollout = sample_completions(model, tokenizer, prompts, num_completions=4, max_new_tokens=150)
    texts = decode_completions(tokenizer, rollout)
    assert sum("</answer>" in text for text in texts) >= 6  # of 16; 88 % are well-formed, says its README
    assert 30 < rollout.completion_lengths.float().mean() < 150
