import math
import re
from dataclasses import replace

import numpy as np
import pytest
from pages import HOSTILE, Reader

from entropy_pl.reporting import AttributedTokens, attribution_page
from entropy_pl.reporting.visible_text import visible

TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "div",
    "table",
    "tr",
    "th",
    "td",
    "span",
    "i",
}
TAGS |= {"br", "section", "details", "summary"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "dir", "open", "title", "tabindex"}


def minus(text):
    return text.replace("-", "−")


def test_hostile_texts_come_out_inert_and_whole(tokens):
    batch = tokens(prompts=3, completions=3)
    batch.text[:] = [HOSTILE[i % len(HOSTILE)] for i in range(len(batch))]
    batch.prompts[:] = [HOSTILE[i % len(HOSTILE)] for i in range(9)]
    page = attribution_page(batch, title="".join(HOSTILE))
    assert "\x00" not in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page)
    page.encode()  # no half of a surrogate pair
    reader = Reader(page)
    assert reader.tags <= TAGS
    assert reader.attributes <= ATTRIBUTES
    shown = {text for completion in reader.token_lists for text, _ in completion}
    assert shown == {visible(text, break_lines=True) for text in batch.text}
    assert visible("".join(HOSTILE)) in "".join(reader.texts)


def test_nothing_comes_from_elsewhere(tokens):
    page = attribution_page(tokens(), title="t")
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<img", page)
    assert "default-src 'none'" in page


def test_completions_are_sorted_and_grouped_and_every_token_is_there(tokens):
    batch = tokens(prompts=3, completions=4)
    reader = Reader(attribution_page(batch, title="t"))
    by_size = sorted(range(12), key=lambda row: -abs(batch.sequence_values[row]))
    groups = list(dict.fromkeys(batch.prompts[row] for row in by_size))
    order = [row for prompt in groups for row in by_size if batch.prompts[row] == prompt]
    expected = [
        [visible(text, break_lines=True) for text, own in zip(batch.text, batch.sequence, strict=True) if own == row]
        for row in order
    ]
    assert [[text for text, _ in completion] for completion in reader.token_lists] == expected
    numbers = [int(number) for number in re.findall(r"· completion (\d+) ·", reader.text)]
    assert numbers == [row + 1 for row in order]
    assert sum(reader.opened) == 3  # the three most influential


def test_colour_and_tooltip_are_the_tokens_own(tokens):
    batch = tokens(prompts=1, completions=2, length=200)
    batch = replace(batch, sequence=np.zeros(len(batch)), position=np.arange(len(batch)))
    scale = np.quantile(np.abs(batch.values), 0.99)
    (completion,) = Reader(attribution_page(batch, title="t")).token_lists
    for index, (_, attrs) in enumerate(completion):
        value = batch.values[index]
        level = int(8 * math.sqrt(min(abs(value) / scale, 1)))
        assert attrs.get("class") == (("l" if value < 0 else "r") + str(level) if level else None)
        assert attrs["title"] == (
            minus(f"{value:+.2e}")
            + f" nats, log π {batch.logp[index]:.3g}, H {batch.entropy[index]:.3g}, A "
            + minus(f"{batch.advantages[index]:+.2f}")
        )


def test_every_colour_has_its_rule(tokens):
    page = attribution_page(tokens(4, 8, 100), title="t")
    assert set(re.findall(r'class="([lr]\d)"', page)) <= set(re.findall(r"\.([lr]\d) {", page))


def test_legend_states_the_scale(tokens):
    batch = tokens(4, 8, 30)
    scale = np.quantile(np.abs(batch.values), 0.99)
    reader = Reader(attribution_page(batch, title="t"))
    values = [scale * (level / 8) ** 2 for level in (8, 6, 4, 2)]
    legend = "".join(minus(f"{-value:+.0e}") for value in values)
    legend += "".join(minus(f"{value:+.0e}") for value in reversed(values))
    assert legend in reader.text


def test_only_the_most_influential_are_shown_and_the_rest_is_counted(tokens):
    batch = tokens(prompts=3, completions=4)
    reader = Reader(attribution_page(batch, title="t", max_sequences=5))
    assert len(reader.token_lists) == 5
    rest = sorted(batch.sequence_values, key=abs)[:7]
    assert f"5 of 12 completions, the most influential first, by prompt. 7 were left out; together they changed the entropy by {minus(f'{sum(rest):+.2e}')} nats" in reader.text  # fmt: skip  # noqa: E501
    assert "left out" not in Reader(attribution_page(batch, title="t")).text


def test_totals_and_signs(tokens):
    batch = tokens()
    rows = Reader(attribution_page(batch, title="t")).rows
    whole = batch.totals["first_order"]
    positive = math.fsum(batch.values[batch.advantages > 0])
    for words, value, over_e, over_u in (
        ("momentum", batch.totals["momentum"], " ± 3.0e-05", "–"),
        (f"– with A > 0 ({(batch.advantages > 0).sum()})", positive, " ± 1.5e-06", "2.5e-06"),
        ("whole step, δH₁", whole, "", "–"),
    ):
        assert [words, minus(f"{value:+.2e}") + over_e, over_u, minus(f"{100 * value / whole:.1f} %")] in rows


def test_what_has_no_error_bar_is_said(tokens):
    batch = tokens()
    said = "Single tokens have no error bar unless token_error_blocks is set."
    assert said in Reader(attribution_page(batch, title="t")).text
    assert said not in Reader(attribution_page(replace(batch, stderr=np.abs(batch.values)), title="t")).text


def test_top_tokens_are_a_table(tokens):
    batch = tokens()
    [row] = [row for row in Reader(attribution_page(batch, title="t")).rows if len(row) == 6][:1]
    index = int(np.abs(batch.values).argmax())
    assert row == [
        visible(batch.context(index) + batch.text[index]),
        minus(f"{batch.values[index]:+.2e}"),
        f"{math.exp(batch.logp[index]):.3g}",
        f"{batch.entropy[index]:.3g}",
        minus(f"{batch.advantages[index]:+.2f}"),
        f"{batch.sequence[index] + 1}, token {batch.position[index] + 1}",
    ]


def test_what_may_be_missing_may_be_missing(tokens):
    batch = tokens(advantages=None, sequence_stderr=None, matrix=None, totals={})
    assert "A –" in Reader(attribution_page(batch, title="t")).text


def test_values_that_are_no_numbers(tokens):
    batch = tokens()
    batch.values[:3] = math.nan, math.inf, -math.inf
    page = attribution_page(batch, title="t")
    classes = [attrs.get("class") for completion in Reader(page).token_lists for _, attrs in completion]
    assert {"r8", "l8"} <= set(classes)


@pytest.mark.parametrize("length", [0, 3])
def test_no_tokens_or_tokens_that_did_nothing(length):
    zeros = np.zeros(length)
    batch = AttributedTokens(
        0, 1e-5, "per_token", zeros, zeros, zeros, None, zeros, np.arange(length), ["a"] * length, ["p"], [0.0]
    )
    reader = Reader(attribution_page(batch, title="t"))
    assert "1 of 1 completions" in reader.text
    assert sum(map(len, reader.token_lists)) == length


def test_a_negative_number_of_sequences_is_refused(tokens):
    with pytest.raises(ValueError, match="expected max_sequences to be 0 or more, got -1"):
        attribution_page(tokens(), title="t", max_sequences=-1)
