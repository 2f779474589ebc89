"""One self-contained HTML page of who moved the entropy: completions, every token coloured by what it did."""

from __future__ import annotations

import math

import numpy as np

from entropy_pl.attribution.signs import NEGATIVE, POSITIVE, ZERO
from entropy_pl.records import Json, number
from entropy_pl.reporting.attributed import NO_TOKEN_ERRORS, TOTALS, AttributedTokens
from entropy_pl.reporting.page import minus, render, signed
from entropy_pl.reporting.visible_text import shortened, visible

LEVELS = 8  # steps of colour intensity, either way
FULL = 0.99  # quantile of |value| at which the colours end
OPEN = 3  # completions that are unfolded when the page opens
TOP = 20  # tokens in the table
SIGN_NAMES = {POSITIVE: "A > 0", NEGATIVE: "A < 0", ZERO: "A = 0"}
TEMPLATE = """\
{% extends "page" %}
{% block style %}
.text { font: .875rem/1.7 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
        margin: .3rem 0 .6rem; }
.text i, .legend i, td i { font-style: normal; border-radius: 2px; box-decoration-break: clone;
        -webkit-box-decoration-break: clone; }
.text i:focus { outline: 2px solid var(--text); }
.text i:focus::after { content: attr(title); position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1rem;
        background: var(--text); color: var(--back); font: .875rem/1.4 system-ui, sans-serif; text-align: center; }
.legend i { display: inline-block; min-width: 3.6rem; text-align: center; font-size: .75rem; padding: .1rem 0; }
{% for level in levels -%}
.l{{ loop.index }} { background: rgb(var(--lowers) / {{ level }}); } {#- #}
.r{{ loop.index }} { background: rgb(var(--raises) / {{ level }}); }
{% endfor -%}
{% endblock %}
{% block body %}
<p class="faint">Optimizer step {{ step }}, η = {{ eta }}. Values are changes of the entropy by the step really taken,
to first order, in {{ units }}.</p>

<h2>What moved the entropy</h2>
<div class="scroll"><table>
<tr><th class="words">part of the step</th><th>nats ± SE over E</th><th>SE over U</th><th>of the whole</th></tr>
{% for row in totals -%}
<tr><td class="words">{{ row.name }}</td><td>{{ row.value }}</td><td>{{ row.over_u }}</td><td>{{ row.share }}</td></tr>
{% endfor -%}
</table></div>

<h2>The {{ top | length }} most influential of {{ n_tokens }} tokens</h2>
<div class="scroll"><table>
<tr><th class="words">before it, and the token</th><th>nats</th><th>π</th><th>H</th><th>A</th><th>completion</th></tr>
{% for row in top -%}
<tr><td class="words" dir="auto"><span class="faint">{{ row.context }}</span><i class="{{ row.colour }}">{{ row.text -}}
</i></td><td>{{ row.value }}</td><td>{{ row.probability }}</td><td>{{ row.entropy }}</td><td>{{ row.advantage }}</td>
<td>{{ row.sequence }}, token {{ row.position }}</td></tr>
{% endfor -%}
</table></div>

<p class="faint">{{ without_errors }}</p>

<h2>Completions</h2>
<p>{{ n_shown }} of {{ n_sequences }} completions, the most influential first, by prompt.
{%- if left_out %} {{ left_out }} were left out; together they changed the entropy by {{ left_out_value }} nats.
{%- endif %}</p>
<p class="legend">{% for swatch in legend %}<i class="{{ swatch.colour }}">{{ swatch.value }}</i>{% endfor %}<br>
<span class="faint">Red tokens lower the entropy, blue ones raise it; the stronger the colour, the more, up to the value
(nats) that 99 % of the batch's tokens stay within; the steps are as wide as the value's square root says. Point at a
token, or tap it, for its value, log π, entropy H before it and advantage A.</span></p>
{% for group in groups %}
<section>
<h2>Prompt {{ group.number }}: {{ group.value }} nats by {{ group.size }} completions</h2>
<details><summary class="faint" dir="auto">{{ group.start }}</summary>
<div class="text" dir="auto">{{ group.prompt }}</div></details>
{% for completion in group.completions -%}
<details{% if completion.open %} open{% endif %}><summary>{{ completion.value }} nats {#- #}
<span class="faint"> · completion {{ completion.number }} · A {{ completion.advantage }} · {{ completion.length -}}
&nbsp;tokens</span></summary>
<div class="text" dir="auto">
{%- for token in completion.tokens -%}
<i{% if token.colour %} class="{{ token.colour }}"{% endif %} tabindex="-1" title="{{ token.title }}">
{{- token.text }}</i>
{%- endfor -%}
</div></details>
{% endfor -%}
</section>
{% endfor %}
{% endblock %}
"""


def attribution_page(tokens: AttributedTokens, *, title: str, max_sequences: int = 64) -> str:
    """One HTML page, without scripts and without anything from elsewhere.

    Completions are grouped by prompt and sorted by how much they changed the entropy, groups by their first; every
    token has a colour, by the square root of what it did, and its numbers as a tooltip. Texts are escaped; characters
    that cannot be seen, or would turn the direction of writing, become visible signs (see :func:`.visible`).

    Args:
        tokens: of one step.
        title: of the page.
        max_sequences: how many completions it shows, the most influential; the page says how many it leaves out.

    Returns:
        The page's text, of characters that UTF-8 can hold.

    Raises:
        ValueError: if ``max_sequences`` is negative.
    """
    if max_sequences < 0:
        raise ValueError(f"expected max_sequences to be 0 or more, got {max_sequences}")
    N = len(tokens.prompts)
    order = np.argsort(-np.abs(tokens.sequence_values), kind="stable")
    shown, left_out = order[:max_sequences].tolist(), order[max_sequences:]
    return render(
        TEMPLATE,
        title=visible(title),
        step=tokens.step,
        eta=f"{tokens.eta:.3g}",
        units=tokens.units,
        levels=[f"{0.08 + 0.57 * level / LEVELS:.2f}" for level in range(1, LEVELS + 1)],
        totals=_totals(tokens),
        top=_top(tokens),
        without_errors=_without_errors(tokens),
        n_tokens=len(tokens),
        n_sequences=N,
        n_shown=len(shown),
        left_out=len(left_out),
        left_out_value=signed(float(tokens.sequence_values[left_out].sum())),
        legend=_legend(tokens),
        groups=_groups(tokens, shown),
    )


def _without_errors(tokens: AttributedTokens) -> str:
    """What on the page has no error bar, and what would give it one."""
    said = [NO_TOKEN_ERRORS] if tokens.stderr is None else []
    said += ["Completions have none unless influence_matrix is set."] if tokens.sequence_stderr is None else []
    return " ".join([*said, "Sums over prompts have none."])


def _totals(tokens: AttributedTokens) -> list[Json]:
    whole = tokens.totals.get("first_order", math.nan)
    rows: list[tuple[str, str, float]] = []
    for name in TOTALS:
        if name in tokens.totals:
            words = "whole step, δH₁" if name == "first_order" else name.replace("_", " ")
            rows.append((name, words, tokens.totals[name]))
        if name == "tokens":
            for sign, chosen in tokens.by_sign().items():
                words = f"– with {SIGN_NAMES[sign]} ({int(chosen.sum())})"
                rows.append((sign, words, float(tokens.values[chosen].sum())))
    over_e, over_u = (
        {name: number(tokens.errors.get(name, {}).get(key)) for name, _, _ in rows} for key in ("stderr", "stderr_u")
    )
    return [
        {
            "name": words,
            "value": signed(value) + ("" if math.isnan(over_e[name]) else f" ± {over_e[name]:.1e}"),
            "over_u": "–" if math.isnan(over_u[name]) else f"{over_u[name]:.1e}",
            "share": minus(f"{100 * value / whole:.1f} %") if whole and math.isfinite(value / whole) else "–",
        }
        for name, words, value in rows
    ]


def _top(tokens: AttributedTokens) -> list[Json]:
    colours = _colours(tokens)
    return [
        {
            "context": visible(tokens.context(i)),
            "text": visible(shortened(tokens.text[i], 40)),
            "colour": colours[i],
            "value": _of_token(tokens, i),
            "probability": f"{math.exp(tokens.logp[i]):.3g}",
            "entropy": f"{tokens.entropy[i]:.3g}",
            "advantage": _advantage(tokens, i),
            "sequence": tokens.sequence[i] + 1,
            "position": tokens.position[i] + 1,
        }
        for i in tokens.top(TOP).tolist()
    ]


def _groups(tokens: AttributedTokens, shown: list[int]) -> list[Json]:
    """The completions to show, by prompt, in the order of the first one of each."""
    numbers, colours = tokens.prompt_numbers(), _colours(tokens)
    order = np.lexsort((tokens.position, tokens.sequence))
    ends = np.searchsorted(tokens.sequence[order], np.arange(len(tokens.prompts) + 1))
    groups: dict[int, Json] = {}
    for place, row in enumerate(shown):
        prompt = visible(tokens.prompts[row], break_lines=True)
        same = numbers == numbers[row]
        group = groups.setdefault(
            int(numbers[row]),
            {
                "number": int(numbers[row]) + 1,
                "prompt": prompt,
                "start": shortened(visible(tokens.prompts[row]), 80),
                "value": signed(float(tokens.sequence_values[same].sum())),
                "size": int(same.sum()),
                "completions": [],
            },
        )
        inside = order[ends[row] : ends[row + 1]].tolist()
        group["completions"].append(
            {
                "number": row + 1,
                "open": place < OPEN,
                "value": _with_error(tokens, row),
                "advantage": _advantage(tokens, inside[0]) if inside else "–",
                "length": len(inside),
                "tokens": [_token(tokens, i, colours[i]) for i in inside],
            }
        )
    return list(groups.values())


def _token(tokens: AttributedTokens, index: int, colour: str) -> Json:
    numbers = [
        f"{_of_token(tokens, index)} nats",
        f"log π {tokens.logp[index]:.3g}",
        f"H {tokens.entropy[index]:.3g}",
        f"A {_advantage(tokens, index)}",
    ]
    return {"text": visible(tokens.text[index], break_lines=True), "colour": colour, "title": ", ".join(numbers)}


def _scale(tokens: AttributedTokens) -> float:
    """What a token must have done, either way, for the full colour; 0 where no token did anything."""
    sizes = np.abs(tokens.values[np.isfinite(tokens.values)])
    return (float(np.quantile(sizes, FULL)) or float(sizes.max())) if len(sizes) else 0.0


def _colours(tokens: AttributedTokens) -> list[str]:
    """The class of every token: ``l1`` to ``l8`` lowers, ``r1`` to ``r8`` raises, none near zero."""
    scale = _scale(tokens)
    if not scale:
        return [""] * len(tokens)
    values = np.nan_to_num(tokens.values / scale, posinf=1, neginf=-1)
    levels = np.floor(LEVELS * np.sqrt(np.minimum(np.abs(values), 1))).astype(int)
    return [f"{'l' if value < 0 else 'r'}{level}" if level else "" for value, level in zip(values, levels, strict=True)]


def _legend(tokens: AttributedTokens) -> list[Json]:
    """Every second level with the value it begins at."""
    scale = _scale(tokens)
    levels = range(LEVELS, 0, -2) if scale else ()
    sides = [("l", levels, -1.0), ("r", reversed(levels), 1.0)] if levels else []
    return [
        {"colour": f"{side}{level}", "value": signed(sign * scale * (level / LEVELS) ** 2, digits=0)}
        for side, ordered, sign in sides
        for level in ordered
    ]


def _advantage(tokens: AttributedTokens, index: int) -> str:
    return "–" if tokens.advantages is None else minus(f"{tokens.advantages[index]:+.2f}")


def _of_token(tokens: AttributedTokens, index: int) -> str:
    value = signed(tokens.values[index])
    return value if tokens.stderr is None else f"{value} ± {tokens.stderr[index]:.1e}"


def _with_error(tokens: AttributedTokens, row: int) -> str:
    value = signed(tokens.sequence_values[row])
    return value if tokens.sequence_stderr is None else f"{value} ± {tokens.sequence_stderr[row]:.0e}"
