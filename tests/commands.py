"""Command lines that take seconds, and what a person sees of them."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS, COLUMNS = 24, 100  # of the smallest screen that a message has to fit on


def short_fit(policy: Path, runs: Path) -> list[str]:
    """The quickstart, cut down to two steps of a tiny policy; with a KL term, so that a step is taken at any reward."""
    return [
        "fit",
        f"--config={CONFIGS / 'quickstart.yaml'}",
        f"--model.policy.name={policy}",
        "--model.kl_coefficient=0.1",
        "--model.num_generations=2",
        "--model.max_new_tokens=6",
        "--data.batch_size=2",
        "--probe.every_n_steps=1",
        "--probe.num_sequences=8",
        "--trainer.max_steps=2",
        f"--trainer.logger.init_args.save_dir={runs}",
    ]


def screen_rows(text: str) -> int:
    """Lines of a terminal of 100 columns that a text takes."""
    return sum(max(1, -(-len(line) // COLUMNS)) for line in text.splitlines())
