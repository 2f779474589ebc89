"""What every HTML page shares: one file without scripts, which loads nothing from anywhere."""

from __future__ import annotations

from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

BASE = "page"
TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'
{%- block sources %}{% endblock %}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --back: #fff; --text: #1a1a1a; --faint: #666; --line: #ddd; --lowers: 213 60 20; --raises: 0 114 190; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181b; --text: #e8e8e8; --faint: #a0a0a0; --line: #3a3d42; --lowers: 225 85 50;
          --raises: 50 135 215; }
}
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h1, h2, summary, p, li, td { overflow-wrap: anywhere; }
.faint { color: var(--faint); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--faint); }
th.words, td.words { text-align: left; } td.words { white-space: pre-wrap; min-width: 10rem; }
details { border-top: 1px solid var(--line); padding: .3rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
@media (max-width: 30rem) { th, td { padding-right: .5rem; font-size: .8rem; } td.words { min-width: 7rem; } }
{% block style %}{% endblock %}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body>
</html>
"""


def render(template: str, **values: Any) -> str:
    """A page from a template that extends ``page``, whose blocks are ``sources``, ``style`` and ``body``.

    Args:
        template: of jinja2's. What it shows is escaped; a name it is not given is an error.
        values: by name, a ``title`` among them.

    Returns:
        The page's text. The browser is told to load nothing but what ``sources`` adds, and to run no script.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=DictLoader({BASE: TEMPLATE}))
    return environment.from_string(template).render(**values)


def signed(value: float, digits: int = 2) -> str:
    """``+1.25e−03``, with its sign."""
    return minus(f"{value:+.{digits}e}")


def minus(number: str) -> str:
    """Hyphens as minus signs."""
    return number.replace("-", "−")
