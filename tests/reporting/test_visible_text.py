import sys
import unicodedata

import pytest

from entropy_pl.reporting.visible_text import shortened, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ß 中 😀 é", "plain ß 中 😀 é"),
        ("a\nb\tc\r", "a⏎b⇥c␍"),
        ("\x00\x1b\x7f", "␀␛␡"),
        ("\u202eabc\u2066", "⟨202E⟩abc⟨2066⟩"),
        ("\u200b\ufeff\u2028\x85", "⟨200B⟩⟨FEFF⟩⟨2028⟩⟨0085⟩"),
        ("\ud800", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_what_has_no_sign_gets_one(text, shown):
    assert visible(text) == shown


def test_nothing_that_steers_is_left_of_all_of_unicode():
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert {unicodedata.category(character) for character in shown} & {
        "Cc",
        "Cf",
        "Cs",
        "Co",
        "Cn",
        "Zl",
        "Zp",
    } == set()


def test_only_line_feeds_break_lines():
    assert visible("a\n⏎\rb", break_lines=True) == "a⏎\n⏎␍b"


def test_shortened():
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
    assert shortened("abcdefg", 6, keep_end=True) == "…cdefg"
    assert shortened("abc", 1) == shortened("abc", 1, keep_end=True) == "…"
