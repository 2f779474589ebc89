"""Text of tokens and prompts as it can be shown: no character is invisible, or steers what shows it."""

from __future__ import annotations

import unicodedata

MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
CONTROL_PICTURES = 0x2400  # Unicode's pictures of the 32 control characters of ASCII, in their order
UNSEEN = frozenset({"Cc", "Cf", "Co", "Cn", "Zl", "Zp"})  # controls, direction marks, private, unassigned, separators


def visible(text: str, *, break_lines: bool = False) -> str:
    r"""The text with a visible sign for every character that has none of its own.

    Line feeds become ``⏎``, tabs ``⇥``, other ASCII controls their pictures (NUL: ``␀``); what turns the direction of
    writing, has no width, is private or unassigned its number (``⟨202E⟩``); half a surrogate pair ``�``.

    Args:
        text: any string.
        break_lines: whether a line feed, beside its sign, still ends the line.

    Example:
        >>> visible("a\n\x00\u202e")
        'a⏎␀⟨202E⟩'
    """
    end = "\n" if break_lines else ""
    return "".join(_visible(character) + (end if character == "\n" else "") for character in text)


def shortened(text: str, length: int, *, keep_end: bool = False) -> str:
    """At most ``length`` characters of a text, an ellipsis where it was cut: at its end, or at its beginning.

    Args:
        text: any string.
        length: at least 1.
        keep_end: whether it is the end that stays.
    """
    if len(text) <= length:
        return text
    return "…" + text[len(text) - length + 1 :] if keep_end else text[: length - 1] + "…"


def _visible(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    if character < " ":
        return chr(CONTROL_PICTURES + ord(character))
    category = unicodedata.category(character)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return f"⟨{ord(character):04X}⟩" if category in UNSEEN else character
