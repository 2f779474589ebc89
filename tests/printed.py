"""What the documents print, taken out of them: blocks of code, and commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str = "python") -> list[str]:
    """The page's blocks of code in a language, in their order."""
    return [code for found, code in BLOCK.findall((ROOT / page).read_text()) if found == language]


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's shell blocks, comments left out."""
    lines = [line for code in blocks(page, "sh") for line in code.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def lines_of(code: str) -> list[str]:
    """The lines of code, without empty ones."""
    return [line for line in code.splitlines() if line.strip()]


def run_blocks(page: str, scope: dict[str, Any], only: slice = slice(None)) -> dict[str, Any]:
    """Run the page's Python, block after block, with these names at hand, and return all names."""
    for number, code in list(enumerate(blocks(page)))[only]:
        exec(compile(code, f"{page}, block {number + 1}", "exec"), scope)
    return scope
