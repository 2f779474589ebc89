"""Checkpoints of every kind, against the policy that was saved: its token statistics to the bit."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import CHARACTERS, SPECIAL_TOKENS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.grpo import GRPOModule
from entropy_pl.objectives import register_reward
from entropy_pl.policy import (
    LoraSettings,
    Policy,
    PolicySettings,
    checkpoint_weights,
    load_checkpoint,
    load_policy,
    match_weights,
)
from entropy_pl.policy.score import token_stats
from entropy_pl.rollout import Rollout

LORA = LoraSettings(rank=4, alpha=12, target_modules=["q_proj", "down_proj"])
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
VOCABULARY = len(SPECIAL_TOKENS) + len(CHARACTERS)


@register_reward("test_checkpoint_digits")
def digits_reward(completion: str, answer: str) -> float:
    """Differs almost surely within a group."""
    return sum(c.isdigit() for c in completion) / max(1, len(completion))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


ROLLOUT = Rollout(tokens(3, 5), torch.ones(3, 5), tokens(3, 7, seed=1), torch.ones(3, 7))


def train(model: nn.Module, steps: int = 3, seed: int = 0) -> torch.optim.Optimizer:
    """A few steps of AdamW on random text."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        if p.dtype == torch.bfloat16:
            p.data = p.data.float()  # as every trainer does
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for step in range(steps):
        ids = tokens(2, 9, seed=seed + step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def edit_json(file: Path, **changes: Any) -> None:
    """Other values in a JSON file; one of None is left out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_same_policy(loaded: Policy, saved: nn.Module) -> None:
    ours, theirs = (token_stats(model, ROLLOUT) for model in (loaded.model, saved))
    assert torch.equal(ours.logp, theirs.logp)
    assert torch.equal(ours.entropy, theirs.entropy)
    assert named(loaded.model).keys() == named(saved).keys()
    assert loaded.tokenizer.padding_side == "left"


def assert_same_optimizer(loaded: dict[str, Any] | None, saved: dict[str, Any]) -> None:
    assert loaded is not None
    assert loaded["param_groups"] == saved["param_groups"]
    assert loaded["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        assert all(torch.equal(loaded["state"][index][name], value) for name, value in state.items())


def lora_run(tiny_policy_dir: Path, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = load_policy(str(tiny_policy_dir), **({"lora": LORA} | options)).model
    return model, train(model)


@pytest.fixture
def run(tiny_policy_dir):
    """A LoRA policy in the middle of training, and its optimizer."""
    return lora_run(tiny_policy_dir)


@pytest.fixture
def full_run(tiny_policy_dir):
    """The same without LoRA."""
    return lora_run(tiny_policy_dir, lora=None)


@pytest.fixture
def adapter(run, tmp_path):
    """A PEFT adapter as TRL leaves it: beside it optimizer, scheduler and a pickle that nobody may open."""
    model, optimizer = run
    model.save_pretrained(tmp_path / "checkpoint-3")
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-3" / "optimizer.pt")
    (tmp_path / "checkpoint-3" / "training_args.bin").write_bytes(payload(tmp_path))
    return tmp_path / "checkpoint-3"


@pytest.fixture
def trainer_folder(full_run, tmp_path, tiny_policy_dir):
    """A whole model as Hugging Face's Trainer leaves it."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_policy_dir, folder)
    full_run[0].save_pretrained(folder)
    torch.save(full_run[1].state_dict(), folder / "optimizer.pt")
    (folder / "training_args.bin").write_bytes(payload(tmp_path))
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture
def whole_model(tiny_policy_dir, tmp_path):
    return shutil.copytree(tiny_policy_dir, tmp_path / "whole")


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def payload(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder / "executed"), protocol=2)


class TestAdapterFolder:
    def test_round_trip(self, run, adapter, recwarn):
        checkpoint = load_checkpoint(adapter)
        assert_same_policy(checkpoint.policy, run[0])
        assert_same_optimizer(checkpoint.optimizer, run[1].state_dict())
        assert checkpoint.path == adapter
        assert not (adapter.parent / "executed").exists()
        assert not [str(w.message) for w in recwarn if "adapter" in str(w.message)]

    def test_without_an_optimizer(self, adapter):
        (adapter / "optimizer.pt").unlink()
        assert load_checkpoint(str(adapter)).optimizer is None

    def test_an_optimizer_beside_the_folder(self, run, adapter):
        shutil.move(adapter / "optimizer.pt", adapter.parent / "optimizer.pt")
        assert_same_optimizer(load_checkpoint(adapter).optimizer, run[1].state_dict())

    def test_a_pickled_adapter(self, run, adapter):
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
        assert_same_policy(load_checkpoint(adapter).policy, run[0])

    def test_a_base_that_is_gone(self, adapter, tiny_policy_dir, run):
        config = json.loads((adapter / "adapter_config.json").read_text())
        for name in ("/gone/base", None):
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
            with pytest.raises(ValueError, match=r"expected the base model that .* names .*Give it as backbone="):
                load_checkpoint(adapter)
        assert_same_policy(load_checkpoint(adapter, backbone=str(tiny_policy_dir)).policy, run[0])

    def test_weights_that_are_gone(self, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"expected weights in .* \(adapter_model\.safetensors\), found no"):
            load_checkpoint(adapter)

    def test_weights_cut_short(self, adapter):
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:700])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors, which is damaged or of another format"):
            load_checkpoint(adapter)

    def test_the_base_in_bfloat16(self, tiny_policy_dir, tmp_path):
        model, _ = lora_run(tiny_policy_dir, dtype="bfloat16")
        model.save_pretrained(tmp_path / "a")
        assert_same_policy(load_checkpoint(tmp_path / "a", dtype="bfloat16").policy, model)


class TestModelFolder:
    def test_round_trip(self, full_run, trainer_folder):
        checkpoint = load_checkpoint(trainer_folder)
        assert_same_policy(checkpoint.policy, full_run[0])
        assert_same_optimizer(checkpoint.optimizer, full_run[1].state_dict())
        assert not (trainer_folder.parent / "executed").exists()

    def test_in_shards(self, full_run, trainer_folder):
        (trainer_folder / "model.safetensors").unlink()
        full_run[0].save_pretrained(trainer_folder, max_shard_size="20KB")
        assert len(list(trainer_folder.glob("model-*.safetensors"))) > 2
        checkpoint = load_checkpoint(trainer_folder)
        assert_same_policy(checkpoint.policy, full_run[0])
        assert_weights(checkpoint_weights(trainer_folder, checkpoint.policy.model), full_run[0])
        next(trainer_folder.glob("model-00002*.safetensors")).unlink()
        with pytest.raises(FileNotFoundError, match=r"model-00002-of-.*there is no such file"):
            load_checkpoint(trainer_folder)

    def test_a_tokenizer_from_the_backbone(self, full_run, trainer_folder, tiny_policy_dir):
        for file in trainer_folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ValueError, match=r"expected a tokenizer in .* found none: give the model .* as backbone="):
            load_checkpoint(trainer_folder)
        checkpoint = load_checkpoint(trainer_folder, backbone=str(tiny_policy_dir))
        assert_same_policy(checkpoint.policy, full_run[0])
        config = json.loads((trainer_folder / "config.json").read_text())
        (trainer_folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
        with pytest.raises(ValueError, match=r"backbone of the same configuration .* differs in rms_norm_eps"):
            load_checkpoint(trainer_folder, backbone=str(tiny_policy_dir))

    def test_what_is_trained_stays_float32(self, full_run, trainer_folder, tiny_policy_dir):
        assert_same_policy(load_checkpoint(trainer_folder, dtype="bfloat16").policy, full_run[0])
        for file in trainer_folder.glob("tokenizer*"):
            file.unlink()
        of_backbone = load_checkpoint(trainer_folder, dtype="bfloat16", backbone=str(tiny_policy_dir))
        assert_same_policy(of_backbone.policy, full_run[0])

    def test_what_was_saved_in_bfloat16_may_stay_so(self, full_run, trainer_folder):
        full_run[0].bfloat16().save_pretrained(trainer_folder)
        loaded = load_checkpoint(trainer_folder, dtype="bfloat16").policy.model
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}

    def test_modules_trained_beside_lora_stay_float32(self, tiny_policy_dir, tmp_path, tiny_model_factory):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model_factory(), config)
        train(model)
        model.save_pretrained(tmp_path / "a")
        loaded = load_checkpoint(tmp_path / "a", backbone=str(tiny_policy_dir), dtype="bfloat16")
        assert_same_policy(loaded.policy, model)
        assert_weights(named(loaded.policy.model), model)

    def test_lora_settings_make_no_sense(self, trainer_folder):
        with pytest.raises(
            ValueError, match=r"expected lora=None with .* holds a whole model, got LoraSettings\(rank="
        ):
            load_checkpoint(trainer_folder, lora=LORA)


class Foreign(LightningModule):
    """Somebody else's module: a policy deep inside, and a value head of its own."""

    def __init__(self, model: nn.Module, optimizers: int = 1, **hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.actor = nn.ModuleDict({"lm": model})
        self.value_head = nn.Linear(32, 1)
        self.automatic_optimization = False
        self.optimizers_wanted = optimizers

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.actor.parameters() if p.requires_grad]
        return [torch.optim.AdamW(trainable, lr=1e-2) for _ in range(self.optimizers_wanted)]

    def training_step(self, ids: Tensor, index: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
            self.manual_backward(self.actor["lm"](input_ids=ids, labels=ids).loss)
            optimizer.step()


def fit_foreign(model: nn.Module, path: Path, **options: Any) -> Foreign:
    module = Foreign(model, **options)
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(tokens(3, 2, 9), batch_size=None))
    trainer.save_checkpoint(path)
    return module


class TestLightning:
    @pytest.fixture
    def fit(self, tiny_policy_dir, tmp_path) -> Callable[..., GRPOModule]:
        """GRPO for three steps, with everything that Lightning puts into a checkpoint."""

        def fit_module(policy: PolicySettings | None = None) -> GRPOModule:
            module = GRPOModule(
                policy=policy or PolicySettings(str(tiny_policy_dir), lora=LORA),
                num_generations=4,
                max_new_tokens=8,
                rewards=["test_checkpoint_digits"],
                optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
                scheduler=functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
            )
            saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
            trainer = Trainer(max_steps=3, callbacks=[saver], **QUIET)
            trainer.fit(module, PromptDataModule("arithmetic_r1_template", e_size=2, u_size=8, batch_size=2))
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            assert all(weight.any() for name, weight in named(module.model).items() if "lora_B" in name)
            return module

        return fit_module

    def test_round_trip(self, fit, tmp_path):
        module = fit()
        checkpoint = load_checkpoint(tmp_path / "last.ckpt")
        assert_same_policy(checkpoint.policy, module.model)
        assert_same_optimizer(checkpoint.optimizer, module.trainer.optimizers[0].state_dict())
        assert len(list(tmp_path.glob("step=*.ckpt"))) == 3

    @pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
    def test_in_bfloat16(self, fit, tmp_path, tiny_policy_dir, lora):
        """The base is rounded as it was in training, what is trained is not."""
        module = fit(PolicySettings(str(tiny_policy_dir), lora=lora, dtype="bfloat16"))
        assert_same_policy(load_checkpoint(tmp_path / "last.ckpt").policy, module.model)

    def test_gone_on_from_an_adapter(self, fit, tmp_path, adapter, tiny_policy_dir):
        module = fit(PolicySettings(str(tiny_policy_dir), adapter=str(adapter)))
        assert_same_policy(load_checkpoint(tmp_path / "last.ckpt").policy, module.model)
        shutil.rmtree(adapter)
        with pytest.raises(ValueError, match="expected a folder with a PEFT adapter"):
            load_checkpoint(tmp_path / "last.ckpt")
        assert_same_policy(load_checkpoint(tmp_path / "last.ckpt", lora=LORA).policy, module.model)

    def test_the_base_has_moved(self, fit, tmp_path, tiny_policy_dir):
        shutil.copytree(tiny_policy_dir, tmp_path / "base")
        module = fit(PolicySettings(str(tmp_path / "base"), lora=LORA))
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(ValueError, match=r"base model that .*last\.ckpt names .*/base'.* Give it as backbone="):
            load_checkpoint(tmp_path / "last.ckpt")
        assert_same_policy(load_checkpoint(tmp_path / "last.ckpt", backbone=str(tiny_policy_dir)).policy, module.model)

    def test_another_base(self, fit, tmp_path, tiny_model_factory, tiny_tokenizer):
        fit()
        for folder, config in (("wide", {"hidden_size": 64}), ("shallow", {"num_hidden_layers": 1})):
            tiny_model_factory(**config).save_pretrained(tmp_path / folder)
            tiny_tokenizer.save_pretrained(tmp_path / folder)
        with pytest.raises(ValueError, match=r"6 \(e\.g\. .*: \[4, 32\], here \[4, 64\]\) of another shape and 0 that"):
            load_checkpoint(tmp_path / "last.ckpt", backbone=str(tmp_path / "wide"))
        with pytest.raises(ValueError, match=r"0 of another shape and 4 \(e\.g\. .*layers\.1.*no place for"):
            load_checkpoint(tmp_path / "last.ckpt", backbone=str(tmp_path / "shallow"))

    def test_other_lora_settings(self, fit, tmp_path):
        fit()
        with pytest.raises(
            ValueError,
            match=r"expected LoRA weights of rank 8, .*got LoRA weights of rank 4 on down_proj, q_proj: load the model "
            r"with lora=LoraSettings\(rank=4, alpha=",
        ):
            load_checkpoint(tmp_path / "last.ckpt", lora=LoraSettings(rank=8))
        with pytest.raises(ValueError, match=r"lacks 20 \(e\.g\. .*\), has 0 of another shape and 0 that"):
            load_checkpoint(tmp_path / "last.ckpt", lora=LoraSettings(rank=4))

    def test_a_foreign_module(self, tiny_policy_dir, tmp_path):
        path, backbone = tmp_path / "run.ckpt", str(tiny_policy_dir)
        model = load_policy(backbone, lora=LORA).model
        fit_foreign(model, path)
        checkpoint = load_checkpoint(path, backbone=backbone, lora=LORA)
        assert_same_policy(checkpoint.policy, model)
        assert len(checkpoint.optimizer["state"]) == len(named(model))

        with pytest.raises(ValueError, match=r"expected the base model of .*run\.ckpt, which does not name it"):
            load_checkpoint(path)
        with pytest.raises(ValueError, match=r"expected the weights of a whole model, .* rank 4 on down_proj, q_proj"):
            load_checkpoint(path, backbone=backbone)

    def test_a_foreign_modules_frozen_base_takes_precedence(self, tiny_policy_dir, tmp_path, tiny_model_factory):
        """Its own base was another one: what was saved is what is loaded."""
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=LORA.target_modules, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model_factory(seed=5), config)
        fit_foreign(model, tmp_path / "run.ckpt")
        checkpoint = load_checkpoint(tmp_path / "run.ckpt", backbone=str(tiny_policy_dir), lora=LORA)
        assert_same_policy(checkpoint.policy, model)
        weights = checkpoint_weights(tmp_path / "run.ckpt", checkpoint.policy.model)
        assert_weights(weights, model)
        other = load_policy(str(tiny_policy_dir), lora=LORA).model
        with pytest.raises(
            ValueError, match=r"expected the model's frozen parameters .* got another .* not of one run"
        ):
            checkpoint_weights(tmp_path / "run.ckpt", other)

    def test_several_optimizers(self, tiny_policy_dir, tmp_path):
        path, backbone = tmp_path / "run.ckpt", str(tiny_policy_dir)
        model = load_policy(backbone, lora=LORA).model
        fit_foreign(model, path, optimizers=2)
        with pytest.raises(ValueError, match=r"expected one optimizer in .*run\.ckpt, got 2: save"):
            load_checkpoint(path, backbone=backbone, lora=LORA)
        torch.save(torch.load(path, weights_only=True)["optimizer_states"][1], tmp_path / "mine.pt")
        checkpoint = load_checkpoint(path, backbone=backbone, lora=LORA, optimizer_path=tmp_path / "mine.pt")
        assert len(checkpoint.optimizer["state"]) == len(named(model))

    def test_a_kernel_named_in_a_file_is_not_fetched(self, fit, tmp_path):
        module, path = fit(), tmp_path / "last.ckpt"
        content = torch.load(path, weights_only=True)
        content["policy"]["attn_implementation"] = "somebody/kernel"
        torch.save(content, path)
        with pytest.raises(ValueError, match="got 'somebody/kernel', which would be fetched and executed"):
            load_checkpoint(path)
        assert_same_policy(load_checkpoint(path, attn_implementation="sdpa").policy, module.model)

    def test_settings_of_another_version(self, fit, tmp_path):
        fit()
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        content["policy"]["flavour"] = "sweet"
        torch.save(content, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match=r"expected policy settings \(name, .*\) .* got others: .*flavour"):
            load_checkpoint(tmp_path / "last.ckpt")


class TestStateDictFile:
    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: name,
            lambda name: f"module.{name}",
            lambda name: f"_orig_mod.module.{name}",
            lambda name: f"trainer.policy.{name.replace('layers.1.', 'layers.1._fsdp_wrapped_module._orig_mod.')}",
            lambda name: name.replace("base_model.model.", ""),
            lambda name: name.replace(".default", ""),
        ],
        ids=["plain", "ddp", "compiled", "fsdp", "unwrapped", "peft"],
    )
    @pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
    def test_round_trip_under_other_names(self, run, full_run, tiny_policy_dir, tmp_path, rename, full):
        model = full_run[0] if full else run[0]
        weights = {rename(name): weight for name, weight in named(model).items()}
        arguments = {"backbone": str(tiny_policy_dir), "lora": None if full else LORA}
        torch.save(weights, tmp_path / "weights.pt")
        torch.save({"model": weights, "step": 3}, tmp_path / "nested.pth")
        torch.save(weights, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        save_file(weights, tmp_path / "weights.safetensors")
        for name in ("weights.pt", "nested.pth", "old.bin", "weights.safetensors"):
            checkpoint = load_checkpoint(tmp_path / name, **arguments)
            assert_same_policy(checkpoint.policy, model)
            assert checkpoint.optimizer is None

    def test_an_optimizer_in_the_same_file(self, run, tiny_policy_dir, tmp_path):
        state = run[1].state_dict()
        for key in ("optimizer", "optimizer_state_dict"):
            torch.save({"model_state_dict": run[0].state_dict(), key: state}, tmp_path / "all.pt")
            checkpoint = load_checkpoint(tmp_path / "all.pt", backbone=str(tiny_policy_dir), lora=LORA)
            assert_same_optimizer(checkpoint.optimizer, state)
            assert_same_policy(checkpoint.policy, run[0])

    def test_an_optimizer_beside_the_file(self, run, tiny_policy_dir, tmp_path):
        torch.save(run[0].state_dict(), tmp_path / "weights.pt")
        torch.save(run[1].state_dict(), tmp_path / "optimizer.pt")
        checkpoint = load_checkpoint(tmp_path / "weights.pt", backbone=str(tiny_policy_dir), lora=LORA)
        assert_same_optimizer(checkpoint.optimizer, run[1].state_dict())

    def test_nothing_in_it(self, tmp_path):
        torch.save({"step": 3, "note": "x"}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"expected a state dict in .*a\.pt .*got keys step, note and no tensor"):
            load_checkpoint(tmp_path / "a.pt")
        torch.save([1, 2], tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"expected a state dict in .*a\.pt .*got a list"):
            load_checkpoint(tmp_path / "a.pt")


class TestQuantized:
    def test_what_is_quantized_comes_from_the_base_model(self, tmp_path, tiny_model_factory, tiny_tokenizer):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra 'gpu')")
        tiny_model_factory(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        model, _ = lora_run(tmp_path / "base", quantization="nf4")
        torch.save(model.state_dict(), tmp_path / "all.pt")
        torch.save(named(model), tmp_path / "trained.pt")
        for name in ("all.pt", "trained.pt"):
            checkpoint = load_checkpoint(
                tmp_path / name, backbone=str(tmp_path / "base"), lora=LORA, quantization="nf4"
            )
            assert_same_policy(checkpoint.policy, model)
            assert_weights(checkpoint_weights(tmp_path / name, checkpoint.policy.model), model)


class TestOptimizerFile:
    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"optimizer": s}, lambda s: {"optimizer_states": [s]}])
    def test_takes_precedence(self, run, adapter, tmp_path, wrap):
        other = torch.optim.AdamW([p for p in run[0].parameters() if p.requires_grad], lr=0.7).state_dict()
        torch.save(wrap(other), tmp_path / "other.pt")
        assert_same_optimizer(load_checkpoint(adapter, optimizer_path=tmp_path / "other.pt").optimizer, other)

    def test_in_another_trainers_folder(self, run, adapter, tmp_path):
        (tmp_path / "there").mkdir()
        shutil.move(adapter / "optimizer.pt", tmp_path / "there" / "optimizer.pt")
        checkpoint = load_checkpoint(adapter, optimizer_path=tmp_path / "there")
        assert_same_optimizer(checkpoint.optimizer, run[1].state_dict())

    def test_none_is_read_where_none_is_asked_for(self, run, adapter, tiny_policy_dir, tmp_path):
        (adapter / "optimizer.pt").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"optimizer\.pt, which is damaged"):
            load_checkpoint(adapter)
        checkpoint = load_checkpoint(adapter, optimizer=False)
        assert checkpoint.optimizer is None
        assert_same_policy(checkpoint.policy, run[0])
        assert load_checkpoint(adapter, optimizer=False, optimizer_path=tmp_path / "nowhere.pt").optimizer is None

        model = load_policy(str(tiny_policy_dir), lora=LORA).model
        fit_foreign(model, tmp_path / "two.ckpt", optimizers=2)
        arguments = {"backbone": str(tiny_policy_dir), "lora": LORA}
        assert load_checkpoint(tmp_path / "two.ckpt", optimizer=False, **arguments).optimizer is None

    def test_missing_or_something_else(self, adapter, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a checkpoint at .*nowhere\.pt, and there is no such"):
            load_checkpoint(adapter, optimizer_path=tmp_path / "nowhere.pt")
        torch.save({"lr": 0.1}, tmp_path / "lr.pt")
        with pytest.raises(ValueError, match=r"expected an optimizer's state dict in .*lr\.pt .*got keys lr"):
            load_checkpoint(adapter, optimizer_path=tmp_path / "lr.pt")


class TestNothingIsExecuted:
    @pytest.mark.parametrize("name", ["run.ckpt", "weights.pt", "adapter", "model", "optimizer.pt"])
    def test_a_pickle_that_would(self, name, adapter, whole_model, tmp_path):
        target, optimizer = tmp_path / "executed", None
        content = {"state_dict": {"w": torch.ones(2)}, "callbacks": Payload(target)}
        path = tmp_path / name
        if name == "adapter":
            path = adapter
            (adapter / "adapter_model.safetensors").unlink()
            torch.save(content, adapter / "adapter_model.bin")
        elif name == "model":
            path = whole_model
            (path / "model.safetensors").unlink()
            torch.save(content, path / "pytorch_model.bin")
        elif name == "optimizer.pt":
            path, optimizer = adapter, path
            torch.save(content, optimizer)
        else:
            torch.save(content, path)
        with pytest.raises(
            ValueError, match=r"got a pickled \w+\.mkdir, which is not loaded, since that would execute"
        ):
            load_checkpoint(path, optimizer_path=optimizer)
        assert not target.exists()
        file = optimizer or next(f for f in [path, *path.glob("*_model.bin")] if f.is_file())
        torch.load(file, weights_only=False)
        assert target.exists()  # the payload is one

    def test_a_pickle_in_the_old_format(self, tmp_path):
        (tmp_path / "weights.pt").write_bytes(payload(tmp_path))
        with pytest.raises(ValueError, match=r"weights\.pt"):
            load_checkpoint(tmp_path / "weights.pt")
        torch.save({"w": Payload(tmp_path / "executed")}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"got a pickled \w+\.mkdir"):
            load_checkpoint(tmp_path / "a.pt")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
    def test_a_kernel_named_by_a_model(self, key, adapter, whole_model, tmp_path):
        """Whether the checkpoint is that model, is an adapter on it, or takes its tokenizer."""
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(whole_model))
        edit_json(whole_model / "config.json", **{key: "evil/kernel"})
        bare = shutil.copytree(whole_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
        for path, backbone in ((whole_model, None), (adapter, None), (bare, str(whole_model))):
            with pytest.raises(ValueError, match=r"built-in attention kernel in .*, got 'evil/kernel', which would"):
                load_checkpoint(path, backbone=backbone)
            model = load_checkpoint(path, backbone=backbone, attn_implementation="sdpa").policy.model
            assert model.config._attn_implementation == "sdpa"

    def test_code_that_comes_with_a_model(self, adapter, whole_model):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(whole_model))
        edit_json(whole_model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
        for path in (whole_model, adapter):
            with pytest.raises(
                ValueError, match=r"'evil' with code of its own \(auto_map: .*\), which is not executed"
            ):
                load_checkpoint(path)

    def test_hyper_parameters_of_a_foreign_module(self, tiny_policy_dir, tmp_path):
        model = load_policy(str(tiny_policy_dir), lora=LORA).model
        fit_foreign(model, tmp_path / "run.ckpt", options=argparse.Namespace(lr=0.1))
        arguments = {"backbone": str(tiny_policy_dir), "lora": LORA}
        with pytest.raises(ValueError, match=r"got a pickled argparse\.Namespace.*save_hyperparameters.*by hand"):
            load_checkpoint(tmp_path / "run.ckpt", **arguments)
        # What the message says to do:
        trusted = torch.load(tmp_path / "run.ckpt", weights_only=False)
        torch.save({key: trusted[key] for key in ("state_dict", "optimizer_states")}, tmp_path / "clean.ckpt")
        checkpoint = load_checkpoint(tmp_path / "clean.ckpt", **arguments)
        assert_same_policy(checkpoint.policy, model)
        assert checkpoint.optimizer is not None


class TestUnreadable:
    @pytest.mark.parametrize("name", ["run.ckpt", "weights.safetensors", "folder"])
    def test_not_there(self, name, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"expected a checkpoint at .*{name}, and there is no such file"):
            load_checkpoint(tmp_path / name)

    @pytest.mark.parametrize("damage", [lambda b: b[:300], lambda b: b"", lambda b: b"version https://git-lfs"])
    def test_damaged(self, damage, run, tmp_path):
        torch.save(run[0].state_dict(), tmp_path / "a.pt")
        (tmp_path / "a.pt").write_bytes(damage((tmp_path / "a.pt").read_bytes()))
        with pytest.raises(ValueError, match=r"^expected a readable checkpoint, got .*a\.pt, which is damaged[^\n]*$"):
            load_checkpoint(tmp_path / "a.pt")

    def test_a_folder_of_another_kind(self, tmp_path):
        with pytest.raises(ValueError, match=r"neither of the two: it is empty"):
            load_checkpoint(tmp_path)
        (tmp_path / "model_world_size_2_rank_0.pt").touch()
        with pytest.raises(ValueError, match=r"neither of the two: it has model_world_size_2_rank_0\.pt"):
            load_checkpoint(tmp_path)

    def test_a_distributed_checkpoint(self, tmp_path):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "sharded")
        with pytest.raises(ValueError, match=r"1 shards of a torch distributed .*format_utils\.dcp_to_torch_save\('"):
            load_checkpoint(tmp_path / "sharded")
        dcp_to_torch_save(str(tmp_path / "sharded"), tmp_path / "gathered.pt")
        with pytest.raises(ValueError, match="does not name it"):  # it is read
            load_checkpoint(tmp_path / "gathered.pt")

    def test_a_damaged_adapter_config(self, adapter):
        (adapter / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"adapter_config\.json, which is damaged"):
            load_checkpoint(adapter)

    @pytest.mark.parametrize("content", ["[]", "5", '"x"', "null", "[" * 100_000])
    def test_a_config_that_is_no_object(self, content, adapter, whole_model):
        for file in (adapter / "adapter_config.json", whole_model / "config.json"):
            file.write_text(content)
            with pytest.raises(ValueError, match=rf"{file.name}, which is damaged or of another format"):
                load_checkpoint(file.parent)

    def test_a_base_model_that_is_no_name(self, adapter):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=[5])
        with pytest.raises(ValueError, match=r"expected the base model that .* names .* got \[5\]: no name at all"):
            load_checkpoint(adapter)

    @pytest.mark.parametrize(
        "content", [{}, [1], {"a": 5}, {"weight_map": [1]}, {"weight_map": None}, {"weight_map": {"w": 5}}]
    )
    def test_an_index_of_another_format(self, content, whole_model):
        (whole_model / "model.safetensors").unlink()
        (whole_model / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"index\.json, which is damaged or of another format"):
            load_checkpoint(whole_model)

    @pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors", "a\\b.bin", "..", ".", ""])
    def test_an_index_that_leads_elsewhere(self, name, whole_model, tmp_path):
        name = name.format(tmp_path)
        shutil.move(whole_model / "model.safetensors", tmp_path / "outside.safetensors")
        weight_map = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name)
        (whole_model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"expected the names of files beside it in .*index\.json, got"):
            load_checkpoint(whole_model)


def assert_weights(found: dict[str, Tensor], model: nn.Module) -> None:
    expected = named(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class TestPairs:
    def test_of_adapters(self, run, adapter, tmp_path):
        loaded = load_checkpoint(adapter).policy.model
        train(run[0], seed=10)
        run[0].save_pretrained(tmp_path / "later")
        assert_weights(checkpoint_weights(tmp_path / "later", loaded), run[0])
        # Whatever trainer saved the later one.
        torch.save({"state_dict": {f"model.{n}": p for n, p in run[0].state_dict().items()}}, tmp_path / "later.ckpt")
        assert_weights(checkpoint_weights(tmp_path / "later.ckpt", loaded), run[0])

    def test_of_whole_models(self, full_run, trainer_folder, tmp_path):
        loaded = load_checkpoint(trainer_folder).policy.model
        train(full_run[0], seed=10)
        full_run[0].save_pretrained(tmp_path / "later")
        assert_weights(checkpoint_weights(tmp_path / "later", loaded), full_run[0])

    def test_dtype_is_the_files(self, trainer_folder, full_run, tmp_path):
        """Whatever the model's."""
        full_run[0].save_pretrained(tmp_path / "later")
        full_run[0].bfloat16().save_pretrained(trainer_folder)
        for dtype in ("float32", "bfloat16"):
            model = load_checkpoint(trainer_folder, dtype=dtype).policy.model
            saved = load_file(tmp_path / "later" / "model.safetensors")
            for name, weight in checkpoint_weights(tmp_path / "later", model).items():
                assert weight.dtype == torch.float32
                assert torch.equal(weight, saved[name])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_a_step_smaller_than_what_half_precision_rounds_away(self, dtype, whole_model, tmp_path):
        before = load_file(whole_model / "model.safetensors")
        later = {name: weight + 1e-5 * torch.randn_like(weight) for name, weight in before.items()}
        shutil.copytree(whole_model, tmp_path / "later")
        save_file(later, tmp_path / "later" / "model.safetensors", metadata={"format": "pt"})

        model = load_checkpoint(whole_model, dtype=dtype).policy.model
        theta, after = named(model), checkpoint_weights(tmp_path / "later", model)
        assert theta.keys() == after.keys() == before.keys()
        for name, weight in before.items():
            v = after[name].double() - theta[name].double()
            assert torch.equal(v, later[name].double() - weight.double())

    def test_of_two_kinds(self, adapter, whole_model):
        lora, full = (load_checkpoint(path).policy.model for path in (adapter, whole_model))
        with pytest.raises(
            ValueError, match=r"LoRA weights of rank 4, as the model has them, in .*whole, got weights w"
        ):
            checkpoint_weights(whole_model, lora)
        with pytest.raises(
            ValueError, match=r"a whole model, as the model has them, in .*, got LoRA weights of rank 4"
        ):
            checkpoint_weights(adapter, full)

    @pytest.mark.parametrize(
        ("changes", "here", "there"),
        [
            ({"lora_alpha": 24}, "LoRA scaled by 3", "LoRA scaled by 6"),
            ({"r": 8}, "LoRA scaled by 3", "LoRA scaled by 1.5"),
            ({"use_rslora": True}, "LoRA scaled by 3", "LoRA scaled by 6"),
            ({"use_dora": True}, "LoRA scaled by 3", "DoRA scaled by 3"),
            ({"lora_alpha": None}, "LoRA scaled by 3", "LoRA scaled by 2"),  # 8 is PEFT's default
            ({"alpha_pattern": {"layers.1.mlp.down_proj": 4}}, "LoRA scaled by 3", "LoRA scaled by 1"),
            ({"alpha_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 4}}, "LoRA scaled by 3", "LoRA scaled by 1"),
            ({"rank_pattern": {"q_proj": 2}}, "LoRA scaled by 3", "LoRA scaled by 6"),
        ],
    )
    def test_of_another_scale(self, changes, here, there, adapter, tmp_path):
        model = load_checkpoint(adapter).policy.model
        shutil.copytree(adapter, tmp_path / "other")
        edit_json(tmp_path / "other" / "adapter_config.json", **changes)
        with pytest.raises(
            ValueError, match=rf"expected {here} on model\.layers\..* in .*other, got {there}: the same"
        ):
            checkpoint_weights(tmp_path / "other", model)

    def test_of_the_same_scale_in_other_words(self, tmp_path, tiny_model_factory, tiny_policy_dir):
        """Of the model it is the scale that counts, layer by layer: alpha / r = 3 on q_proj, 1.5 on down_proj."""
        options = {"target_modules": LORA.target_modules, "task_type": "CAUSAL_LM"}
        model = get_peft_model(
            tiny_model_factory(), LoraConfig(r=4, lora_alpha=12, alpha_pattern={"down_proj": 6}, **options)
        )
        model.save_pretrained(tmp_path / "same")
        edit_json(
            tmp_path / "same" / "adapter_config.json",
            **{
                "lora_alpha": 6,
                "alpha_pattern": {"q_proj": 6},
                "r": 2,
                "use_rslora": None,
                "rank_pattern": {"down_proj": 4},
            },
        )
        assert_weights(checkpoint_weights(tmp_path / "same", model), model)

    def test_of_another_scale_than_grpo_modules(self, run, adapter, tiny_policy_dir, tmp_path):
        """Its settings stand in the file; beside an adapter that the run was continued from they have no effect."""
        model = load_checkpoint(adapter).policy.model
        lora = {"rank": 4, "alpha": 24.0}
        for policy in ({"lora": lora}, {"lora": lora, "adapter": "/gone"}, {"lora": lora | {"alpha": 12}}):
            saved = {"name": str(tiny_policy_dir), **policy}
            torch.save({"state_dict": named(run[0]), "policy": saved}, tmp_path / "run.ckpt")
            if policy == {"lora": lora}:
                with pytest.raises(ValueError, match=r"expected LoRA scaled by 3 .*run\.ckpt, got LoRA scaled by 6"):
                    checkpoint_weights(tmp_path / "run.ckpt", model)
            else:
                assert_weights(checkpoint_weights(tmp_path / "run.ckpt", model), run[0])

    @pytest.mark.parametrize("changes", [{"r": "x"}, {"r": 0}, {"alpha_pattern": {"(": 1}}, {"rank_pattern": [4]}])
    def test_of_no_scale(self, changes, adapter, tmp_path):
        model = load_checkpoint(adapter).policy.model
        edit_json(adapter / "adapter_config.json", **changes)
        with pytest.raises(ValueError, match=r"expected the settings of a LoRA adapter in .*checkpoint-3, got others"):
            checkpoint_weights(adapter, model)

    def test_on_another_base_model(self, adapter, run, recwarn):
        model = load_checkpoint(adapter).policy.model
        checkpoint_weights(adapter, model)
        assert not [str(w.message) for w in recwarn if "trained on" in str(w.message)]
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="/models/another")
        with pytest.warns(
            UserWarning, match=r"trained on '/models/another', and is compared with one on '.*tiny_policy"
        ):
            assert_weights(checkpoint_weights(adapter, model), run[0])


class TestMatchWeights:
    def test_tied_weights(self, tiny_model_factory):
        model = tiny_model_factory(tie_word_embeddings=True)
        expected = named(model)
        embedding = expected["model.embed_tokens.weight"]
        without = {name: weight for name, weight in expected.items() if "embed_tokens" not in name}
        for weights in (expected, expected | {"lm_head.weight": embedding}, without | {"lm_head.weight": embedding}):
            found = match_weights(model, weights)
            assert found.keys() == expected.keys()
            assert found["model.embed_tokens.weight"] is embedding
        with pytest.raises(ValueError, match=r"expected one value of model\.embed_tokens\.weight .* 2 that differ"):
            match_weights(model, expected | {"lm_head.weight": embedding + 1})
        with pytest.raises(ValueError, match=r"lacks 1 \(e\.g\. model\.embed_tokens\.weight\)"):
            match_weights(model, without)

    def test_peft_files_with_modules_trained_in_full(self, tiny_model_factory):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model_factory(), config)
        found = match_weights(model, get_peft_model_state_dict(model))
        assert found.keys() == named(model).keys()
        assert all(torch.equal(found[name], weight) for name, weight in named(model).items())

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
    def test_peft_files_of_other_adapters(self, tiny_model_factory, options):
        config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options))
        model = get_peft_model(tiny_model_factory(), config)
        found = match_weights(model, get_peft_model_state_dict(model, save_embedding_layers=False))
        assert found.keys() == named(model).keys()
        assert all(torch.equal(found[name], weight) for name, weight in named(model).items())

    def test_what_is_beside_the_policy_is_left_out(self, tiny_model):
        weights = {f"policy.{name}": weight for name, weight in named(tiny_model).items()}
        beside = {"value.weight": torch.ones(3), "policy.v_head.weight": torch.ones(3), "epoch": torch.ones(())}
        old = {"policy.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        assert match_weights(tiny_model, weights | beside | old).keys() == named(tiny_model).keys()

    def test_two_policies(self, tiny_model):
        weights = {f"{p}.{name}": w for p in ("policy", "reference") for name, w in named(tiny_model).items()}
        with pytest.raises(ValueError, match=r"got its weights 2 times, under 'policy\.', 'reference\.': save"):
            match_weights(tiny_model, weights)

    def test_weights_of_nothing_like_it(self, tiny_model):
        with pytest.raises(
            ValueError, match=r"lacks 27 \(e\.g\. model\.embed_tokens\.weight\), has 0 of another shape"
        ):
            match_weights(tiny_model, {"w": torch.ones(2)}, source="it")

    def test_a_deeper_model(self, tiny_model, tiny_model_factory):
        with pytest.raises(ValueError, match=r"lacks 0, .* and 12 \(e\.g\. model\.layers\.2\..*no place for"):
            match_weights(tiny_model, named(tiny_model_factory(num_hidden_layers=3)))
