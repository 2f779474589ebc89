"""One self-contained HTML page of a run: what it was, what its steps did to the entropy, and what went wrong."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from entropy_pl.progress import part
from entropy_pl.reporting.page import render
from entropy_pl.reporting.run_folder import RunFolder
from entropy_pl.reporting.run_sections import paragraph, sections_of
from entropy_pl.reporting.visible_text import visible

TEMPLATE = """\
{% extends "page" %}
{% block sources %}; img-src data:{% endblock %}
{% block style %}
nav { font-size: .875rem; line-height: 2; } nav a { margin-right: .9rem; white-space: nowrap; }
a { color: rgb(var(--raises)); }
section { border-top: 1px solid var(--line); margin-top: 2rem; } h2 { margin-top: 1rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
figure { margin: .8rem 0; } figcaption { color: var(--faint); font-size: .875rem; }
picture { display: block; } img { display: block; width: 100%; height: auto; }
th.value, td.value { white-space: normal; text-align: left; overflow-wrap: anywhere; }
td.name { white-space: normal; color: var(--faint); text-align: left; vertical-align: top; min-width: 6rem; }
pre { font: .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-x: auto; }
td i { font-style: normal; background: color-mix(in srgb, currentcolor 12%, transparent); border-radius: 2px; }
.wide img { min-width: 52rem; }
@media (max-width: 47.99rem) { picture img { max-width: 30rem; } .wide picture img { max-width: none; } }
@media (prefers-color-scheme: dark) { img { filter: invert(.91) hue-rotate(180deg); } }
{% endblock %}
{% macro drawn(image) %}
<figure>
<div class="scroll{% if image.scrolls %} wide{% endif %}"{% if image.scrolls %} tabindex="0"{% endif %}><picture>
{%- if image.narrow -%}
<source media="(max-width: 47.99rem)" srcset="{{ image.narrow.source }}" width="{{ image.narrow.width }}" {# -#}
 height="{{ image.narrow.height }}">
{%- endif -%}
<img src="{{ image.wide.source }}" width="{{ image.wide.width }}" height="{{ image.wide.height }}" {# -#}
 alt="{{ image.words }}"></picture></div>
</figure>
{% endmacro %}
{% macro cells(table) %}
{% if table.heading %}<h3>{{ table.heading }}</h3>
{% endif %}
<div class="scroll" tabindex="0"><table>
{% if table.columns -%}
<tr>{% for column in table.columns %}<th class="{{ table.kinds[loop.index0] }}">{{ column }}</th>{% endfor %}</tr>
{% endif -%}
{% for row in table.rows -%}
<tr>{% for cell in row %}<td class="{{ table.kinds[loop.index0] }}">
{%- if cell is mapping %}{{ cell.before }}<i>{{ cell.marked }}</i>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor -%}
</table></div>
{% if table.below %}<p class="faint">{{ table.below }}</p>
{% endif %}
{% endmacro %}
{% macro part(item) %}
{% if item.text is defined %}<p{% if item.faint %} class="faint"{% endif %}>{{ item.text }}</p>
{% elif item.points is defined %}<ul>{% for point in item.points %}<li>{{ point }}</li>{% endfor %}</ul>
{% elif item.wide is defined %}{{ drawn(item) }}
{% elif item.rows is defined %}{{ cells(item) }}
{% elif item.links is defined %}<p>{{ item.before }}
{%- for link in item.links %} <a href="{{ link.address }}">{{ link.words }}</a>{% endfor %}{{ item.after }}</p>
{% elif item.verbatim is defined %}<pre tabindex="0">{{ item.verbatim }}</pre>
{% elif item.folded is defined %}<details{% if item.open %} open{% endif %}><summary>{{ item.folded }}</summary>
{% for inner in item.parts %}{{ part(inner) }}{% endfor %}</details>
{% endif %}
{% endmacro %}
{% block body %}
<nav>{% for section in sections %}<a href="#{{ section.name }}">{{ section.heading }}</a> {% endfor %}</nav>
{% for section in sections %}
<section id="{{ section.name }}">
<h2>{{ section.heading }}</h2>
{% for item in section.parts %}{{ part(item) }}{% endfor %}
</section>
{% endfor %}
{% endblock %}
"""


def run_page(run: RunFolder, *, folder: str | os.PathLike[str] | None = None) -> str:
    """One HTML page of a run, without scripts and without anything from elsewhere.

    Figures are those of TensorBoard and of the run's folder, drawn twice, for a screen and for a phone. Texts of the
    run's files are escaped, and characters that cannot be seen become visible signs (see :func:`.visible`). A section
    that cannot be made of what the records hold says so, and the others are there.

    Args:
        run: as :func:`.read_run` found it.
        folder: where the page will lie, for its links to pages of attributed tokens; by default beside the records.

    Returns:
        The page's text, of characters that UTF-8 can hold.
    """
    home = run.probe if folder is None else Path(folder)
    sections = []
    makers = sections_of(run, home)
    with part("page", len(makers), "section") as bar:
        for position, (heading, make) in enumerate(makers.items()):
            try:
                parts = make()
            except Exception as error:  # a record of the right keys with something else in them
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"{run.path}: the section {heading!r} could not be drawn: {reason}", stacklevel=2)
                parts = [paragraph(f"This could not be drawn from what the records hold: {reason}", faint=False)]
            sections.append({"name": f"section-{position}", "heading": heading, "parts": parts})
            bar.update()
    name = "/".join(run.path.absolute().parts[-2:])
    return render(TEMPLATE, title=visible(f"What the optimizer steps of {name} did to the entropy"), sections=sections)
