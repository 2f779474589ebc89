"""Broken copies of good things: of nested values, of text, of bytes. The same seed gives the same copy."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

SENTINEL = "fuzz_sentinel_module"  # no such module: whoever looks for it has been told to by the file
Path = tuple[Any, ...]

HUGE, DEEP = 10**400, 3_000
WORDS = [
    *(
        "",
        " ",
        "nan",
        "inf",
        "1e-5",
        "null",
        "true",
        "[",
        "{",
        "a: b",
        "{question}",
        "{",
        "%s",
        "\x00",
        "\u202e",
        "é\n",
    ),
    *("\ud800", "../../outside", "/", "~", ".", "x" * 5_000, "9" * 5_000, "gsm8k_r1_template", "owner/repository"),
    *(SENTINEL, f"{SENTINEL}.X", "os.system", "torch.optim.AdamW", "builtins.exec", "2024-01-01", "0x10", "1_000"),
]
NUMBERS = [0, -1, 1, 2, 3, 0.5, -0.0, 1e308, 5e-324, -1e308, 2**31, 2**63, 2**70, HUGE, math.nan, math.inf, -math.inf]


class Mutator:
    """What is wrong with one case.

    Args:
        seed: any text; every case has its own.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def hostile(self) -> Any:
        """A value that is probably not what is expected, wherever it is put."""
        pick = self.random.random()
        if pick < 0.3:
            return self.random.choice(WORDS)
        if pick < 0.6:
            return self.random.choice(NUMBERS)
        if pick < 0.7:
            return self.random.choice([None, True, False])
        if pick < 0.8:
            return {"class_path": f"{SENTINEL}.X", "init_args": {"x": 1}}
        return self.random.choice([[], {}, [[]], [None], {"": None}, {SENTINEL: 1}, [1, "a", {}], {1: 2}, _nested(50)])

    def broken(self, value: Any, times: int = 0) -> tuple[Any, list[Path]]:
        """A copy of nested dicts and lists with a few changes, and the paths of what was changed."""
        value, touched = copy.deepcopy(value), []
        for _ in range(times or self.random.choice([1, 1, 1, 2, 3])):
            paths = [path for path in _paths(value) if path]
            if not paths:
                return self.hostile(), [*touched, ()]
            path = self.random.choice(paths)
            touched.append(path)
            self._change(_at(value, path[:-1]), path[-1])
        return value, touched

    def _change(self, parent: Any, key: Any) -> None:
        kind = self.random.choice(["drop", "rename", "replace", "replace", "replace", "wrap", "copy", "grow"])
        old = parent[key]
        if kind == "drop":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            del parent[key]
            parent[
                self.random.choice([f"{key}s", str(key)[:-1], str(key).upper(), "", SENTINEL, f"{key}.{key}", 5])
            ] = old
        elif kind == "wrap":
            parent[key] = self.random.choice([[old], {"value": old}, str(old), [old, old]])
        elif kind == "copy":
            others = list(parent.values()) if isinstance(parent, dict) else list(parent)
            parent[key] = copy.deepcopy(self.random.choice(others))
        elif kind == "grow" and isinstance(old, (dict, list)):
            self._grow(old)
        else:
            parent[key] = self.hostile()

    def _grow(self, container: Any) -> None:
        if isinstance(container, dict):
            container[self.random.choice([*filter(None, WORDS[:20]), SENTINEL, "class_path", "__class__"])] = (
                self.hostile()
            )
        else:
            container.insert(self.random.randint(0, len(container)), self.hostile())

    def text(self, text: str) -> bytes:
        """The bytes of a text file with something wrong in its lines or its encoding."""
        lines = text.split("\n")
        at = self.random.randrange(len(lines))
        kind = self.random.randrange(9)
        if kind == 0:
            lines.insert(at, lines[self.random.randrange(len(lines))])  # a key twice, most often
        elif kind == 1:
            lines[at] = self.random.choice(["\t", "  ", "- ", "? ", "<<: ", "&a ", "*a", "%", "@"]) + lines[at]
        elif kind == 2:
            del lines[at]
        elif kind == 3:
            lines[at] = f"{lines[at].partition(':')[0]}: {self.random.choice(TAGGED)}"
        elif kind == 4:
            return "\n".join(lines).encode(
                self.random.choice(["utf-16", "utf-32-be", "utf-8-sig", "cp037"]), errors="replace"
            )
        elif kind == 5:
            lines[at] = f"{lines[at]} {chr(self.random.choice([0, 7, 0x85, 0x2028, 0xFEFF, 0x1F600]))}"
        elif kind == 6:
            lines[at] = f"{lines[at].partition(':')[0]}: {self.random.choice('[{')}" * self.random.choice([1, DEEP])
        elif kind == 7:
            at = next((i for i in range(at, len(lines)) if lines[i].rstrip().endswith(":")), at)
            lines[at] = f"{lines[at].partition(':')[0]}: {LAUGHS}"
        return self.bytes("\n".join(lines).encode()) if kind == 8 else "\n".join(lines).encode()

    def bytes(self, data: bytes) -> bytes:
        """Some bytes flipped, cut, put in, or written over."""
        data, kind = bytearray(data), self.random.randrange(6)
        at = self.random.randrange(len(data) + 1)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = self.random.randbytes(self.random.choice([1, 8, 300]))
        elif kind == 2:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif kind == 3:
            del data[at : at + self.random.choice([1, 16, 500])]
        else:
            for _ in range(self.random.choice([1, 1, 3, 20])):
                if data:
                    data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)


# YAML that means more than text: objects, dates, references to itself, a billion of something
TAGGED = [
    "!!python/object/apply:os.system ['true']",
    f"!!python/name:{SENTINEL}.X",
    f"!!python/module:{SENTINEL}",
    f"!!python/object/new:{SENTINEL}.X []",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2024-01-01",
    "2024-01-01",
    "&a [*a]",
    "&a {a: *a}",
    "{? [a, b] : c}",
    "!unknown x",
    "!!int x",
    "!!bool x",
    "!!float x",
    "!!timestamp x",
    "!!omap x",
    "0o17",
    "190:20:30",
    "1e400",
    "~",
]
LAUGHS = "&a [x, x, x, x, x, x, x, x]"  # in itself again and again, 8 to the power of 9 times
for _inner, _outer in zip("abcdefgh", "bcdefghi", strict=True):
    LAUGHS = f"&{_outer} [{LAUGHS}, {', '.join([f'*{_inner}'] * 7)}]"


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _paths(value: Any, before: Path = ()) -> Iterator[Path]:
    yield before
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*before, key))


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value
