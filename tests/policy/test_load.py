import importlib.util
import json
import shutil
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from entropy_pl.policy import backbones
from entropy_pl.policy.adapter import reference_policy, trainable_parameters
from entropy_pl.policy.backbones import available_backbones, locate_backbone, register_backbone
from entropy_pl.policy.load import load_policy, load_policy_from
from entropy_pl.policy.settings import LoraSettings, PolicySettings

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra 'gpu')"
)
IDS = torch.tensor([[5, 9, 12, 7]])


@pytest.fixture
def registry(monkeypatch):
    """Registrations made by a test are forgotten after it."""
    monkeypatch.setattr(backbones, "_REGISTRY", dict(backbones._REGISTRY))


@pytest.fixture
def policy_copy(tiny_policy_dir, tmp_path):
    """The tiny policy's folder, for a test to damage."""
    return shutil.copytree(tiny_policy_dir, tmp_path / "policy")


def logits(model: nn.Module) -> torch.Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=IDS).logits
    model.train(training)
    return out


def move_adapter(model: nn.Module) -> None:
    """Make the adapter say something: B starts at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


class TestBackbones:
    def test_a_folder_a_key_and_a_hub_name_are_told_apart(self, registry, tiny_policy_dir):
        register_backbone("mine", str(tiny_policy_dir))
        assert locate_backbone(str(tiny_policy_dir)).is_local
        assert locate_backbone("mine") == locate_backbone(str(tiny_policy_dir))
        assert locate_backbone("Qwen/Qwen2.5-1.5B").source == locate_backbone("qwen2_5_15").source
        assert not locate_backbone("qwen2_5_15").is_local

    def test_a_callable_source_runs_only_when_asked_for(self, registry, tiny_policy_dir):
        calls = []
        register_backbone("lazy", lambda: calls.append(1) or tiny_policy_dir)
        assert "lazy" in available_backbones()
        assert not calls
        policy = load_policy("lazy")
        assert calls == [1]
        assert policy.model.peft_config["default"].base_model_name_or_path == str(tiny_policy_dir)

    def test_a_folder_called_like_a_key_is_reached_as_a_path(self, registry, tiny_policy_dir, tmp_path, monkeypatch):
        shutil.copytree(tiny_policy_dir, tmp_path / "qwen2_5_15")
        monkeypatch.chdir(tmp_path)
        assert not locate_backbone("qwen2_5_15").is_local
        assert locate_backbone("./qwen2_5_15").is_local

    @pytest.mark.parametrize("name", ["qwen2_5_51", "qwen25_15"])
    def test_unknown_key_names_the_nearest(self, name):
        with pytest.raises(ValueError, match=rf"got '{name}'.*did you mean 'qwen2_5.*Available keys: .*qwen2_5_15"):
            load_policy(name)

    @pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "zzz"])
    def test_what_is_none_of_the_three(self, name):
        with pytest.raises(ValueError, match=r"expected a model folder, a hub name .* or a backbone key"):
            load_policy(name)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"found no config\.json"):
            load_policy(str(tmp_path))
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="found a PEFT adapter: give the base model as the name"):
            load_policy(str(tmp_path))

    def test_unreachable_hub_says_to_give_a_folder(self):
        with pytest.raises(OSError, match=r"no-such-owner/nothing.*could not be fetched.*Give a local model folder"):
            load_policy("no-such-owner/nothing")

    @pytest.mark.parametrize("key", ["", "a/b", "a b", "./x"])
    def test_bad_key(self, registry, key):
        with pytest.raises(ValueError, match="letters, digits and underscores"):
            register_backbone(key, "a/b")

    def test_bad_source(self, registry):
        with pytest.raises(TypeError, match="hub name, a folder path or a callable"):
            register_backbone("key", 3)


class TestSettings:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rank": 0}, "rank of at least 1, got 0"),
            ({"alpha": 0}, "alpha above 0, got 0"),
            ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
            ({"target_modules": []}, "at least one layer"),
        ],
    )
    def test_bad_lora(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LoraSettings(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": ""}, "policy name"),
            ({"dtype": "float8"}, "float32, bfloat16, float16, got 'float8'"),
            ({"quantization": "int3"}, "'nf4' or None, got 'int3'"),
            ({"quantization": "nf4", "lora": None}, "4-bit weights cannot be trained"),
        ],
    )
    def test_bad_policy(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PolicySettings(**({"name": "x"} | arguments))
        with pytest.raises(ValueError, match=message):
            load_policy(**({"name": "x"} | arguments))

    def test_settings_and_function_take_the_same_arguments_with_the_same_defaults(self):
        import inspect

        function = {p.name: p.default for p in inspect.signature(load_policy).parameters.values()}
        settings = PolicySettings("x")
        assert set(function) == set(vars(settings))
        assert all(getattr(settings, name) == default for name, default in function.items() if name != "name")

    def test_config_file_round_trip(self, tiny_policy_dir):
        jsonargparse = pytest.importorskip("jsonargparse")
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--policy", type=PolicySettings)
        arguments = [
            f"--policy.name={tiny_policy_dir}",
            "--policy.lora.rank=3",
            "--policy.lora.target_modules=[q_proj]",
        ]
        settings = parser.instantiate_classes(parser.parse_args(arguments)).policy
        assert settings == PolicySettings(str(tiny_policy_dir), lora=LoraSettings(rank=3, target_modules=["q_proj"]))
        names = set(trainable_parameters(load_policy_from(settings).model))
        assert len(names) == 2 * 2
        assert all("q_proj.lora_" in name for name in names)


class TestLoading:
    def test_lora_starts_as_the_base_model_and_trains_only_the_adapter(self, tiny_policy_dir, tiny_model):
        model, tokenizer = load_policy(str(tiny_policy_dir), lora=LoraSettings(rank=4))
        trainable = trainable_parameters(model)
        assert trainable
        assert all("lora_" in name for name in trainable)
        assert not any("lm_head" in name for name in trainable)
        assert all(dict(model.named_parameters())[name] is parameter for name, parameter in trainable.items())
        assert torch.equal(logits(model), logits(tiny_model))
        assert model.training
        assert tokenizer.padding_side == "left"

    def test_without_lora_every_parameter_is_trained(self, tiny_policy_dir, tiny_model):
        model, _ = load_policy(str(tiny_policy_dir), lora=None)
        assert type(model) is type(tiny_model)
        assert set(trainable_parameters(model)) == {name for name, _ in tiny_model.named_parameters()}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_dtype_is_the_bases_and_the_adapter_is_float32(self, tiny_policy_dir, dtype):
        model, _ = load_policy(str(tiny_policy_dir), dtype=dtype)
        trainable = trainable_parameters(model)
        frozen = {name: p for name, p in model.named_parameters() if name not in trainable}
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        assert {p.dtype for p in frozen.values()} == {getattr(torch, dtype)}

    def test_gradient_checkpointing_gives_the_same_gradients(self, tiny_policy_dir):
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model, _ = load_policy(str(tiny_policy_dir), gradient_checkpointing=checkpointing)
            assert model.is_gradient_checkpointing == checkpointing
            model(input_ids=IDS, labels=IDS).loss.backward()
            gradients.append([p.grad for p in trainable_parameters(model).values()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert any(g.abs().sum() > 0 for g in gradients[1])

    def test_target_modules_that_match_nothing(self, tiny_policy_dir):
        with pytest.raises(ValueError, match=r"got \['nope'\]: none matches. Its linear layers: .*q_proj"):
            load_policy(str(tiny_policy_dir), lora=LoraSettings(target_modules=["nope"]))

    def test_a_checkpoint_that_lacks_weights(self, policy_copy):
        from safetensors.torch import load_file, save_file

        file = policy_copy / "model.safetensors"
        weights = {k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 3 of them, e\.g\. model\.layers\.1\.mlp"):
            load_policy(str(policy_copy))


class TestNothingIsExecuted:
    """Of what stands in a model's config.json."""

    @staticmethod
    def edit(folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    @pytest.mark.parametrize(
        "changes",
        [
            {"attn_implementation": "evil/kernel"},
            {"_attn_implementation": "evil/kernel"},
            {"_attn_implementation": "paged|evil/kernel@v1:f"},
            {"attn_implementation": {"": "evil/kernel"}},
        ],
    )
    def test_a_kernel_of_the_hub(self, policy_copy, tiny_model, changes):
        self.edit(policy_copy, **changes)
        with pytest.raises(
            ValueError, match=r"expected the name of a built-in .*policy \(config\.json\), got '.*evil/kernel.*', which"
        ):
            load_policy(str(policy_copy))
        model, _ = load_policy(str(policy_copy), attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(logits(model), logits(tiny_model))

    def test_a_kernel_of_a_part(self, policy_copy):
        self.edit(policy_copy, text_config={"_attn_implementation": "evil/kernel"})
        with pytest.raises(ValueError, match="got 'evil/kernel', which would be fetched and executed"):
            load_policy(str(policy_copy))

    def test_a_kernel_in_the_config_that_the_config_points_to(self, policy_copy):
        shutil.copy(policy_copy / "config.json", policy_copy / "config.4.0.0.json")
        config = json.loads((policy_copy / "config.json").read_text())
        other = json.dumps(config | {"_attn_implementation": "evil/kernel"})
        (policy_copy / "config.4.0.0.json").write_text(other)
        self.edit(policy_copy, configuration_files=["config.4.0.0.json"])
        with pytest.raises(ValueError, match="got 'evil/kernel', which would be fetched and executed"):
            load_policy(str(policy_copy))

    def test_a_built_in_kernel(self, policy_copy):
        self.edit(policy_copy, attn_implementation="eager")
        # which older versions do not heed
        expected = AutoModelForCausalLM.from_pretrained(policy_copy).config._attn_implementation
        assert load_policy(str(policy_copy)).model.config._attn_implementation == expected

    @pytest.fixture
    def evil_code(self, policy_copy, monkeypatch):
        """Code beside the model that says when it runs, and nobody who could be asked."""
        (policy_copy / "evil.py").write_text(
            f"open({str(policy_copy / 'executed')!r}, 'w')\nConfig = Model = Tokenizer = 1"
        )
        monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
        return {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}

    def test_code_that_the_model_needs(self, policy_copy, evil_code):
        self.edit(policy_copy, auto_map=evil_code, model_type="evil")
        with pytest.raises(
            ValueError, match=r"policy, got 'evil' with code of its own .*not executed: give a model of"
        ):
            load_policy(str(policy_copy))
        assert not (policy_copy / "executed").exists()

    def test_code_that_a_model_of_transformers_own_names(self, policy_copy, evil_code, tiny_model):
        """As that of Phi-3: there is no need of it, and it is left alone."""
        self.edit(policy_copy, auto_map=evil_code)
        file = policy_copy / "tokenizer_config.json"
        tokenizer = json.loads(file.read_text())
        file.write_text(
            json.dumps(tokenizer | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}})
        )
        assert torch.equal(logits(load_policy(str(policy_copy)).model), logits(tiny_model))
        assert not (policy_copy / "executed").exists()


class TestTokenizer:
    def test_pad_falls_back_to_eos(self, policy_copy, tiny_tokenizer_factory):
        tiny_tokenizer_factory(pad_token=None, padding_side="right").save_pretrained(policy_copy)
        tokenizer = load_policy(str(policy_copy)).tokenizer
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
        assert tokenizer.padding_side == "left"

    def test_a_tokenizer_of_the_models_own_is_taken_as_it_was_saved(self, tiny_policy_dir, tiny_tokenizer):
        tokenizer = load_policy(str(tiny_policy_dir)).tokenizer
        assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
        text = "12 + 3 = ?\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_the_real_policys_tokenizer_is_taken_as_it_was_saved(self, shared_dir):
        from tokenizers import Tokenizer

        folder = shared_dir / "models" / "gsm8k-4m"
        tokenizer = load_policy(str(folder)).tokenizer
        assert len(tokenizer) == 2048
        saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
        rows = (shared_dir / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()[:200]
        assert [tokenizer(row).input_ids for row in rows] == [saved.encode(row).ids for row in rows]

    def test_neither_pad_nor_eos(self, policy_copy, tiny_tokenizer_factory):
        tiny_tokenizer_factory(pad_token=None, eos_token=None).save_pretrained(policy_copy)
        with pytest.raises(ValueError, match="a pad or an EOS token, got neither"):
            load_policy(str(policy_copy))

    def test_no_tokenizer(self, policy_copy):
        for file in policy_copy.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match="expected a tokenizer beside the model"):
            load_policy(str(policy_copy))

    def test_a_tokenizer_of_another_model(self, policy_copy, tiny_tokenizer_factory):
        tiny_tokenizer_factory(characters="".join(map(chr, range(200, 300)))).save_pretrained(policy_copy)
        with pytest.raises(ValueError, match="got 104 tokens and 55 embeddings"):
            load_policy(str(policy_copy))


class TestAdapter:
    @pytest.fixture
    def saved(self, tiny_policy_dir, tmp_path):
        model, _ = load_policy(str(tiny_policy_dir), lora=LoraSettings(rank=4))
        move_adapter(model)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model)

    def test_resumes_where_it_was_and_is_trainable(self, tiny_policy_dir, saved, recwarn):
        folder, expected = saved
        model, _ = load_policy(str(tiny_policy_dir), adapter=str(folder))
        assert torch.equal(logits(model), expected)
        assert all("lora_" in name for name in trainable_parameters(model))
        assert not [str(w.message) for w in recwarn if "adapter" in str(w.message)]

    def test_a_wider_base(self, saved, tmp_path, tiny_model_factory, tiny_tokenizer):
        tiny_model_factory(hidden_size=64).save_pretrained(tmp_path / "wide")
        tiny_tokenizer.save_pretrained(tmp_path / "wide")
        with (
            pytest.warns(UserWarning, match="says it was trained on"),
            pytest.raises(ValueError, match=r"does not fit: .*size mismatch.*Give the base model it was trained on"),
        ):
            load_policy(str(tmp_path / "wide"), adapter=str(saved[0]))

    def test_a_shallower_base(self, saved, tmp_path, tiny_model_factory, tiny_tokenizer):
        tiny_model_factory(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
        tiny_tokenizer.save_pretrained(tmp_path / "shallow")
        with (
            pytest.warns(UserWarning, match="says it was trained on"),
            pytest.raises(ValueError, match="have no place in the model"),
        ):
            load_policy(str(tmp_path / "shallow"), adapter=str(saved[0]))

    def test_a_base_of_the_same_shape_and_another_name_warns(self, saved, policy_copy):
        with pytest.warns(UserWarning, match="if these are not the same weights"):
            load_policy(str(policy_copy), adapter=str(saved[0]))

    def test_lora_settings_that_have_no_effect_warn(self, tiny_policy_dir, saved):
        with pytest.warns(
            UserWarning, match=r"\(4, 32\.0, 0\.0\); those asked for, \(8, 32\.0, 0\.0\), have no effect"
        ):
            load_policy(str(tiny_policy_dir), adapter=str(saved[0]), lora=LoraSettings(rank=8))

    def test_folders_that_hold_no_adapter(self, tiny_policy_dir, tmp_path):
        with pytest.raises(ValueError, match=r"expected a folder with a PEFT adapter .* a whole model"):
            load_policy(str(tiny_policy_dir), adapter=str(tiny_policy_dir))
        with pytest.raises(ValueError, match=r"expected a folder with a PEFT adapter .* no adapter_config\.json"):
            load_policy(str(tiny_policy_dir), adapter=str(tmp_path / "nothing"))

    def test_prompt_learning_is_refused(self, tiny_policy_dir, saved):
        config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
        (saved[0] / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"expected a LoRA adapter .* got PROMPT_TUNING"):
            load_policy(str(tiny_policy_dir), adapter=str(saved[0]))


class TestQuantization:
    @needs_bitsandbytes
    def test_nf4_trains_the_adapter_on_whatever_device_there_is(self, tmp_path, tiny_model_factory, tiny_tokenizer):
        import bitsandbytes

        tiny_model_factory(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        model, _ = load_policy(str(tmp_path), quantization="nf4", lora=LoraSettings(rank=4))
        layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert len(layers) == 2 * 7
        assert {m.weight.quant_type for m in layers} == {"nf4"}
        assert all(m.weight.quant_state.nested for m in layers)
        assert not model.is_gradient_checkpointing
        ids = IDS.to(model.device)
        model(input_ids=ids, labels=ids).loss.backward()
        trainable = trainable_parameters(model)
        assert all("lora_" in name for name in trainable)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())
        assert any(p.grad.abs().sum() > 0 for p in trainable.values())

        move_adapter(model)
        model.save_pretrained(tmp_path / "adapter")
        again, _ = load_policy(str(tmp_path), quantization="nf4", adapter=str(tmp_path / "adapter"))
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    def test_without_bitsandbytes(self, tiny_policy_dir, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match=r"pip install 'entropy_pl\[gpu\]'"):
            load_policy(str(tiny_policy_dir), quantization="nf4")


class TestTrainableParameters:
    def test_none_is_an_error(self, tiny_model):
        with pytest.raises(ValueError, match=r"Qwen2ForCausalLM with \d+ parameters, none of which has requires_grad"):
            trainable_parameters(tiny_model.requires_grad_(False))

    def test_tied_weights_are_named_once(self, tiny_model_factory):
        names = trainable_parameters(tiny_model_factory(tie_word_embeddings=True))
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names


class TestReferencePolicy:
    @pytest.fixture
    def model(self, tiny_policy_dir):
        model, _ = load_policy(str(tiny_policy_dir), lora=LoraSettings(rank=4))
        move_adapter(model)
        # A choice of the user's that PEFT's own context would undo.
        next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
        return model

    @staticmethod
    def state(model):
        flags = {name: m._disable_adapters for name, m in model.named_modules() if hasattr(m, "_disable_adapters")}
        return {name: p.requires_grad for name, p in model.named_parameters()}, flags, model.training

    def test_is_the_base_model_inside_and_nothing_changes_outside(self, model, tiny_model):
        before, policy_logits = self.state(model), logits(model)
        assert not torch.allclose(policy_logits, logits(tiny_model), atol=1e-3)
        with reference_policy(model) as reference:
            assert torch.equal(logits(reference), logits(tiny_model))
            with reference_policy(model):
                assert torch.equal(logits(model), logits(tiny_model))
            assert torch.equal(logits(model), logits(tiny_model))
        assert self.state(model) == before
        assert torch.equal(logits(model), policy_logits)

    def test_restores_after_an_error(self, model):
        before = self.state(model)
        with pytest.raises(RuntimeError, match="inside"), reference_policy(model):
            raise RuntimeError("inside")
        assert self.state(model) == before

    def test_adapters_that_were_partly_off_stay_so(self, model, recwarn):
        model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
        before, policy_logits = self.state(model), logits(model)
        with reference_policy(model):
            pass
        assert self.state(model) == before
        assert torch.equal(logits(model), policy_logits)
        assert not [w for w in recwarn if "adapter layers" in str(w.message)]

    def test_a_graph_made_before_still_reaches_the_adapter(self, model):
        loss = model(input_ids=IDS, labels=IDS).loss
        with reference_policy(model):
            logits(model)
        loss.backward()
        assert all(p.grad is not None for p in trainable_parameters(model).values())

    def test_a_plain_model_has_no_reference(self, tiny_model):
        with pytest.raises(ValueError, match="KL to the reference needs LoRA"), reference_policy(tiny_model):
            pass

    def test_a_merged_adapter_is_refused(self, model):
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"), reference_policy(model):
            pass
