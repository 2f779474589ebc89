r"""A policy made at home: a small Qwen2 with its own tokenizer, half-taught arithmetic, for runs without a model hub.

It is taught by imitation. Of its texts, each of which goes on from ``Question: What is 37 + 45?\nResponse: <think>``,
most work the result out, `` 7 + 5 = 12. 3 + 4 + 1 = 8. </think> <answer> 82 </answer>``; the others guess it, ``
</think> <answer> 79 </answer>``, and a few of either kind slip or miss a tag. So the policy knows more than it says:
sampled at temperature 1 it guesses as often as its teachers did, with entropy to lose, and GRPO has something to raise.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from entropy_pl.data.arithmetic import load_arithmetic
from entropy_pl.data.registry import PromptExample, format_prompt, get_dataset
from entropy_pl.progress import progress

DATASET = "arithmetic_r1_template"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
IGNORED = -100

# A guess lies within this of the result, either way.
GUESS_ERROR = 20

# Enough for the longest text the policy is taught, its EOS included.
MAX_NEW_TOKENS = 24

# Part of the cache key: raise it when a change of this file makes another policy of the same recipe.
VERSION = 1


@dataclass(frozen=True)
class DemoRecipe:
    """How the demo policy is built and taught.

    Args:
        hidden_size: width of the model.
        num_layers: transformer blocks.
        num_heads: attention heads; half as many for keys and values.
        intermediate_size: width of the MLP.
        steps: optimizer steps.
        batch_size: texts per step.
        learning_rate: peak of AdamW's learning rate, after a linear warm-up and before a linear decay to zero.
        warmup_steps: steps of the warm-up.
        guess_share: share of the texts that guess the result instead of working it out.
        wrong_share: share of the worked texts with a slip.
        malformed_share: share of the texts that miss a tag.
        seed: of the weights and of the texts.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    intermediate_size: int = 384
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 4e-3
    warmup_steps: int = 30
    guess_share: float = 0.4
    wrong_share: float = 0.05
    malformed_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("guess_share", "wrong_share", "malformed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}")

    @property
    def key(self) -> str:
        """Name of the policy's folder in the cache: one per recipe and version of this file."""
        text = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        return f"demo-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def demo_policy_path(recipe: DemoRecipe | None = None, *, cache_dir: str | None = None) -> Path:
    """Folder of the demo policy, which is trained first where the cache does not hold it (a minute on two CPU cores).

    The caller's random number generators are left as they were.

    Args:
        recipe: how to make the policy; None: the default recipe.
        cache_dir: folder of the cache; None: ``$ENTROPY_PL_CACHE``, else ``~/.cache/entropy_pl``.

    Returns:
        A folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.
    """
    recipe = recipe or DemoRecipe()
    cache = Path(cache_dir or os.environ.get("ENTROPY_PL_CACHE") or "~/.cache/entropy_pl").expanduser()
    target = cache / recipe.key
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".training-") as scratch:
        folder = Path(scratch) / recipe.key
        model, tokenizer = train_demo_policy(recipe)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same recipe
                raise
    return target


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2's byte-level scheme over the words of the arithmetic dataset: one token per word, digit and tag.

    Nothing is lost between text and tokens; characters outside the dataset cost a token per byte. (Transformers loads
    every ``qwen2`` folder's tokenizer as a `Qwen2Tokenizer`, so another scheme would not survive the way to disk.)
    """
    blank = Qwen2Tokenizer(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left")
    words = [_prompt("What is + -?").replace("<think>", ""), " ="]
    tokenizer = blank.train_new_from_iterator(words, vocab_size=400, show_progress=False, min_frequency=0)
    # Qwen2 never joins a space to what is no letter: as added tokens " 3" and " <answer>" are one token, not two
    pieces = [*TAGS, *(f" {tag}" for tag in TAGS), *(f" {digit}" for digit in range(10))]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer


def train_demo_policy(recipe: DemoRecipe) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Train the policy of a recipe from scratch, on the CPU, showing a progress bar."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(_model_config(recipe, tokenizer))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / max(recipe.warmup_steps, 1),
            (recipe.steps - step) / max(recipe.steps - recipe.warmup_steps, 1),
        ),
    )
    batches = _batches(recipe, tokenizer)
    with progress("teaching the demo policy", recipe.steps, "step") as bar:
        for _ in range(recipe.steps):
            input_ids, attention_mask, labels = next(batches)
            loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return model.eval(), tokenizer


def _model_config(recipe: DemoRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=max(recipe.num_heads // 2, 1),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _prompt(question: str) -> str:
    return format_prompt(get_dataset(DATASET).template, question)


def _batches(recipe: DemoRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Token ids, attention mask and labels ``[batch, length]``, right-padded; the prompt is not imitated."""
    rng = random.Random(recipe.seed)
    examples = load_arithmetic("train", path=None, size=None, seed=recipe.seed)
    while True:
        chosen = rng.choices(examples, k=recipe.batch_size)
        prompts = tokenizer([_prompt(example.question) for example in chosen]).input_ids
        completions = tokenizer([_completion(example, recipe, rng) for example in chosen]).input_ids
        rows = [
            (prompt + completion + [tokenizer.eos_token_id], len(prompt))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        length = max(len(ids) for ids, _ in rows)
        shape = (len(rows), length)
        input_ids = torch.full(shape, tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for row, (ids, start) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            labels[row, start : len(ids)] = torch.tensor(ids[start:])
        yield input_ids, attention_mask, labels


def _completion(example: PromptExample, recipe: DemoRecipe, rng: random.Random) -> str:
    """What a teacher answers: worked out or guessed, usually in form."""
    if rng.random() < recipe.guess_share:
        working, result = "", abs(int(example.answer) + rng.randint(-GUESS_ERROR, GUESS_ERROR))
    else:
        working, result = _working(example, recipe, rng)
    text = f"{working} </think> <answer> {result} </answer>"
    if rng.random() < recipe.malformed_share:
        text = text.replace(rng.choice((" </think>", " <answer>", " </answer>")), "")
    return text


def _working(example: PromptExample, recipe: DemoRecipe, rng: random.Random) -> tuple[str, int]:
    """Digit by digit, with slips that are carried on to the result."""
    left, sign, right = example.question.removeprefix("What is ").removesuffix("?").split()
    (a_tens, a_units), (b_tens, b_units) = divmod(int(left), 10), divmod(int(right), 10)
    slip = rng.choice(("units", "tens")) if rng.random() < recipe.wrong_share else "none"

    def slipped(result: int, place: str) -> int:
        return abs(result + rng.choice((-1, 1))) if place == slip else result

    if sign == "+":
        units = slipped(a_units + b_units, "units")
        carry = units // 10
        tens = slipped(a_tens + b_tens + carry, "tens")
    else:
        carry = int(a_units < b_units)
        a_units += 10 * carry
        units = slipped(a_units - b_units, "units")
        tens = slipped(a_tens - b_tens - carry, "tens")
    carried = f" {sign} 1" if carry else ""
    working = f" {a_units} {sign} {b_units} = {units}. {a_tens} {sign} {b_tens}{carried} = {tens}."
    return working, 10 * tens + units % 10
