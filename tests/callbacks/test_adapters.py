"""Runs that train several adapters: the one that was active at the start is measured; nothing is switched for good."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import fit
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from tiny import build_model, build_tokenizer
from torch import nn

from entropy_pl.callbacks import EntropyProbeCallback
from entropy_pl.monitor import run_probe

PROMPTS = [f"{a}*{b}=" for a in range(4) for b in range(4)]
ACTOR, CRITIC = "default", "critic"


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**(settings | options))


class ActorCritic(LightningModule):
    """Two adapters on one base, each with a part in every step; the critic's forward comes last."""

    automatic_optimization = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.policy = get_peft_model(build_model(), lora(**options))
        self.policy.add_adapter(CRITIC, lora(**options))
        self.tokenizer = build_tokenizer()
        self.states: list[Any] = []

    def configure_optimizers(self) -> Any:
        held = [p for n, p in self.policy.named_parameters() if f".{ACTOR}" in n or f".{CRITIC}" in n]
        return torch.optim.AdamW(held, lr=1e-3)

    def training_step(self, ids: torch.Tensor, _: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for name in (ACTOR, CRITIC):
            self.policy.set_adapter(name)
            loss = self.policy(input_ids=ids, labels=ids).loss
            self.manual_backward(loss if name == ACTOR else -loss)
        optimizer.step()
        self.states.append(switches(self.policy))

    def train_dataloader(self) -> Any:
        texts = [self.tokenizer(f"{a}+1={a + 1}")["input_ids"] for a in range(8)]
        return torch.utils.data.DataLoader([torch.tensor(ids) for ids in texts], batch_size=8)


def switches(policy: nn.Module) -> Any:
    """Everything by which PEFT says what is on, and what requires a gradient."""
    keys = ("_active_adapter", "active_adapter", "_disable_adapters", "_adapters_disabled", "merged_adapters")
    modules = {n: {k: repr(vars(m)[k]) for k in keys if k in vars(m)} for n, m in policy.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    return modules, flags, {name: sorted(vars(m)) for name, m in policy.named_modules()}


def probe(**options: Any) -> EntropyProbeCallback:
    settings = {"prompts": PROMPTS, "num_sequences": 8, "max_new_tokens": 4, "every_n_steps": 1}
    return EntropyProbeCallback(**(settings | {"eta_multipliers": (), "progress_bar": False} | options))


def run(module: ActorCritic, folder: Path, callback: EntropyProbeCallback | None, steps: int = 2) -> None:
    options = {"default_root_dir": folder, "logger": False, "gradient_clip_val": None}
    fit(module, folder, *[callback] * bool(callback), steps=steps, **options)


def seen(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What is active when E is drawn, and the updates that are measured."""
    active: list[Any] = []
    updates: list[Any] = []
    draw, collect = run_probe.sample_completions, run_probe.EntropyProbe.collect

    def drawing(model: Any, *args: Any, **options: Any) -> Any:
        active.append((model.active_adapter, model.base_model.active_adapters))
        return draw(model, *args, **options)

    def collecting(self: Any, model: Any, rollout: Any, update: Any, **options: Any) -> Any:
        updates.append({name: value.clone() for name, value in update.direction.items()})
        active.append((model.active_adapter, model.base_model.active_adapters))
        return collect(self, model, rollout, update, **options)

    monkeypatch.setattr(run_probe, "sample_completions", drawing)
    monkeypatch.setattr(run_probe.EntropyProbe, "collect", collecting)
    return active, updates


@pytest.mark.parametrize("measured", [None, CRITIC])
def test_one_adapter_is_sampled_scored_and_in_the_update(tmp_path, monkeypatch, measured):
    active, updates = seen(monkeypatch)
    module, callback = ActorCritic(), probe(adapter=measured)
    name, other = (CRITIC, ACTOR) if measured else (ACTOR, CRITIC)
    start = {n: p.detach().clone() for n, p in module.policy.named_parameters()}
    with pytest.warns(UserWarning, match=f"'{name}' on") as caught:
        run(module, tmp_path, callback, steps=1)
    [sentence] = [str(w.message) for w in caught if "adapters of the policy" in str(w.message)]
    [record] = callback.records
    assert (record["status"], record["message"]) == ("ok", None)
    assert record["warnings"].count(sentence) == 1
    assert record["sampler_gap"] < 1e-5  # float32's rounding
    assert len(active) > 1  # drawn and scored, whichever was active last
    assert all(found == (name, [name]) for found in active)
    _, direction = updates  # of the dry run, and of the step
    assert direction.keys() == {n for n in start if f".{name}." in n}
    for parameter, value in direction.items():  # Δθ/lr, as the optimizer moved it
        moved = (dict(module.policy.named_parameters())[parameter] - start[parameter]).double() / 1e-3
        torch.testing.assert_close(value, moved.detach(), atol=1e-4, rtol=0)  # float32's rounding of θ over 1e-3
    assert not any(f".{other}." in n for n in direction)


def test_the_run_is_the_same_with_and_without(tmp_path):
    options = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 9]}
    plain, probed = ActorCritic(**options), ActorCritic(**options)
    before = switches(probed.policy)
    callback = probe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(plain, tmp_path, None)
        run(probed, tmp_path, callback)
    assert [(r["status"], r["message"]) for r in callback.records] == [("ok", None)] * 2
    assert plain.states == probed.states
    assert before != probed.states[-1]  # the run itself has switched
    for name, parameter in plain.policy.named_parameters():
        assert torch.equal(parameter, dict(probed.policy.named_parameters())[name]), name
    for a, b in zip(plain.trainer.optimizers, probed.trainer.optimizers, strict=True):
        for state, other in zip(a.state.values(), b.state.values(), strict=True):
            assert all(torch.equal(state[key], other[key]) for key in state)
