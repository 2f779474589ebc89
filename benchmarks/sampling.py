"""Sampling an E-batch, against ``generate`` on the prompts as they come, in one batch."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.options import Options
from benchmarks.policies import MAX_NEW_TOKENS, build_policy, described
from benchmarks.tables import Table
from benchmarks.timing import interleaved
from entropy_pl import Rollout, sample_completions
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import end_token_ids

PLAIN, OURS = "plain generate, unsorted batch", "sample_completions"


def run(options: Options) -> list[Table]:
    """Both draw from the same prompts; lengths of completions are random, and the same in the mean."""
    with isolated_rng(0):
        model, tokenizer, prompts, what = build_policy(options, options.pick(options.sequences, 4))
    model.to(options.device).eval()
    most = options.pick(MAX_NEW_TOKENS, 4)
    drawn: list[Rollout] = []
    tokens: dict[str, list[int]] = {PLAIN: [], OURS: []}

    def plain() -> None:
        tokens[PLAIN].append(plain_generate(model, tokenizer, prompts, most))

    def ours() -> None:
        drawn.append(sample_completions(model, tokenizer, prompts, max_new_tokens=most))
        tokens[OURS].append(int(drawn[-1].completion_mask.sum()))

    with isolated_rng(0):
        times = interleaved({PLAIN: plain, OURS: ours}, options.rounds, torch.device(options.device))
    rows = [
        (
            name,
            str(times.ratio(name, PLAIN)),
            "0.6" if name == OURS else "",
            f"{times.median(name):.1f}",
            f"{sum(tokens[name][1:]) / options.rounds:.0f}",
        )
        for name in (PLAIN, OURS)
    ]
    title = f"Sampling at most {most} tokens; {what}; {described(drawn[-1])}"
    return [Table("sampling", title, ("work", "of plain generate", "at most", "s", "tokens drawn"), rows)]


@torch.no_grad()
def plain_generate(model: Any, tokenizer: Any, prompts: list[str], most: int) -> int:
    """As the documentation of Transformers shows it; tokens drawn before each end."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    ends = end_token_ids(model, tokenizer)
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=most,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = generated[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(new, torch.tensor(ends, device=new.device))
    return int((is_end.cumsum(1) - is_end.long() == 0).sum())
