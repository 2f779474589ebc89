"""What a run has set on its policy, and what layers keep in eval mode: a probe does not meet it and leaves it there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora.dora import DoraLinearLayer
from test_experts import MIXTURES
from test_precision import everything, random_update
from test_score import FAMILIES, build_family, build_rollout, plain_stats
from tiny import build_model
from torch import nn

from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.precision import evaluation, evaluation_mode
from entropy_pl.policy.sample import sample_completions
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.rollout import TokenStats

ROLLOUT = build_rollout()
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "routers": ("mixtral", {"output_router_logits": True}),
    "routers, other class": ("qwen3", {"output_router_logits": True}),
    "hidden states": ("qwen2", {"output_hidden_states": True, "use_cache": False}),
    "attentions": ("gemma2", {"output_attentions": True}),
    "a tuple": ("llama", {"return_dict": False, "use_cache": False}),
}


@pytest.mark.parametrize("name", ASKED)
def test_outputs_that_training_asks_for(name, tiny_tokenizer):
    family, asked = ASKED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (MIXTURES | FAMILIES)[family]().eval()
    model.resize_token_embeddings(len(tiny_tokenizer))
    plain = copy.deepcopy(model)
    for key, value in asked.items():
        setattr(model.config, key, value)
    before = vars(model.config).copy()
    drawn, expected = (
        sample_completions(m, tiny_tokenizer, ["1+2=", "10+20="], max_new_tokens=6, top_k=1) for m in (model, plain)
    )
    assert torch.equal(drawn.completion_ids, expected.completion_ids)
    with torch.no_grad():
        logp, entropy = plain_stats(plain, ROLLOUT)
    stats = token_stats(model, ROLLOUT)
    # Float32 sums in another order.
    torch.testing.assert_close(stats.logp, logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, rtol=0, atol=1e-5)
    assert vars(model.config) == before


@pytest.fixture
def caching() -> Iterator[None]:
    """DoRA keeps norms and products in eval mode, as somebody has enabled it for good."""
    DoraCaching()(enabled=True)
    yield
    DoraCaching()(enabled=False)


def dora() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(
            build_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], use_dora=True, task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model


class Remembering(nn.Linear):
    """Doubles its weight, and in eval mode only when it is first used after training."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 2 * self.weight if self.training else self.kept.setdefault("doubled", 2 * self.weight)
        return nn.functional.linear(x, weight, self.bias)

    def train(self, mode: bool = True) -> Remembering:
        if mode:
            self.kept.clear()
        return super().train(mode)


def remembering() -> nn.Module:
    model = build_family("qwen2")
    for layer in model.model.layers:
        layer.mlp.down_proj = Remembering(layer.mlp.down_proj)
    return model


class Merging(Remembering):
    """Folds a second matrix into its weight in eval mode, as loralib does, and out of it in training."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.second, self.merged = nn.Parameter(0.1 * torch.randn_like(self.weight)), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight if self.merged else self.weight + self.second, self.bias)

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            self.weight.data += -self.second if mode else self.second
            self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("build", [dora, remembering])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_layers_keep_in_eval_mode_is_not_read_at_another_theta(build, training, caching):
    """The oracle is a copy whose parameters are written to, and which has never kept anything."""
    model = build()
    update = random_update(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in update.direction:
                parameter += 0.3 * update.direction[name].float()
        expected = plain_stats(twin.eval(), ROLLOUT)[0]
        model.eval()
        model(input_ids=torch.tensor([[3, 4, 5]]))  # now something is kept, of θ
    model.train(training)
    kept = [dict(m.kept if isinstance(m, Remembering) else m._dora_cache) for m in keepers(model)]
    assert all(map(bool, kept)) != training
    assert len(kept) >= 2
    before = everything(model)
    with evaluation(model):
        token_stats(model, ROLLOUT)
        moved = token_stats(model, ROLLOUT, update=update, eta=0.3)
    torch.testing.assert_close(moved.logp, expected, rtol=0, atol=2e-5)  # θ+ηv rounded once or twice to float32
    assert everything(model) == before
    for module, held in zip(keepers(model), kept, strict=True):
        now = module.kept if isinstance(module, Remembering) else module._dora_cache
        assert now.keys() == held.keys()
        assert all(now[key] is held[key] for key in held)


def keepers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Remembering | DoraLinearLayer)]


def test_derivatives_of_dora_are_not_of_what_was_kept(caching):
    """PEFT takes no gradient through the norm (it is constant by DoRA's own definition): the one without caching."""
    model = dora()
    update, mask = random_update(model), ROLLOUT.completion_mask
    ones = TokenStats(mask.double(), torch.zeros(mask.shape), mask)
    with evaluation(model):
        token_stats(model, ROLLOUT)
        found = (
            weighted_gradient(model, ROLLOUT, ones, update.direction),
            token_stats_jvp(model, ROLLOUT, update, method="forward_mode", max_batch_tokens=20),
        )
    DoraCaching()(enabled=False)
    expected = (
        weighted_gradient(model, ROLLOUT, ones, update.direction),
        token_stats_jvp(model, ROLLOUT, update, method="forward_mode", max_batch_tokens=20),
    )
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    assert torch.equal(found[1][1].logp, expected[1][1].logp)


def test_layers_that_merge_in_eval_mode_keep_their_weights():
    """Merging and taking apart again would round them, and a merged weight does not move with the second matrix."""
    model = remembering()
    for layer in model.model.layers:
        layer.mlp.down_proj = Merging(layer.mlp.down_proj)
    before, update = everything(model), random_update(model)
    base = token_stats(model, ROLLOUT)
    with evaluation_mode(model):
        assert not any(module.merged for module in model.modules() if isinstance(module, Merging))
    moved = token_stats(model, ROLLOUT, update=update, eta=0.3)
    assert (moved.logp - base.logp).abs().max() > 1e-2
    assert everything(model) == before
