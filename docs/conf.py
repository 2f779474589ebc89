"""How the pages and the docstrings become one site: ``make docs``. Nothing is fetched.

A page of ``docs/api`` is a heading, the name of a package, and an introduction; the package's public
names, its ``__all__``, are added here, so that the reference cannot forget one.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

from entropy_pl import __version__

project = "entropy_pl"
version = release = __version__
copyright = "the authors of entropy_pl; Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"entropy_pl {__version__}"
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in docstrings
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Source"]

PACKAGES = sorted(path.stem for path in Path(__file__).parent.glob("api/entropy_pl*.md"))


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _stay_within_the_site)
    app.connect("source-read", _add_public_names)
    app.connect("include-read", lambda app, path, parent, content: _stay_within_the_site(app, "", content))
    app.connect("autodoc-process-docstring", _write_as_rst, priority=400)  # before napoleon, at 500


def _add_public_names(app: Sphinx, page: str, source: list[str]) -> None:
    package = page.removeprefix("api/")
    if package in PACKAGES:
        entries = "\n".join(_entry(package, name) for name in import_module(package).__all__)
        source[0] += f"\n```{{eval-rst}}\n.. py:currentmodule:: {package}\n\n{entries}\n```\n"


def _entry(package: str, name: str) -> str:
    """The directive for one name; a link where the name is another package's, whose page shows it."""
    value = getattr(import_module(package), name)
    others = [
        other for other in PACKAGES if other not in (package, "entropy_pl") and name in import_module(other).__all__
    ]
    if package != "entropy_pl":  # which defines nothing of its own
        others = [other for other in others if getattr(value, "__module__", "").startswith(f"{other}.")]
    if others:
        return f".. py:data:: {name}\n\n   :py:obj:`{others[0]}.{name}`\n"
    if inspect.isclass(value):
        return f".. autoclass:: {package}.{name}\n"
    if inspect.isfunction(value):
        return f".. autofunction:: {package}.{name}\n"
    said = "".join(f"   {line}\n" for line in _said_of(name, value))
    return f".. py:data:: {name}\n\n{said}\n"


def _said_of(name: str, value: Any) -> list[str]:
    """The text below the assignment of a constant or a type, where it is assigned."""
    for module in [module for key, module in sorted(sys.modules.items()) if key.startswith("entropy_pl")]:
        if getattr(module, name, None) is value:
            said = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", name))
            if said:
                return said
    return []


def _stay_within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to what is no page of the site are none here; README, its first page, links from the folder above."""
    text = re.sub(r"\[([^\]]+)\]\((?:\.\./)?[A-Z]+\.md\)", r"`\1`", source[0])
    source[0] = text.replace("](notebooks/", "](../notebooks/")


def _write_as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An example without prompts is code all the same, ``count: N.`` begins no list, and pages are linked."""
    lines[:] = [re.sub(r"^( +\w+: )(?=\w\.$)", r"\1\\", line) for line in lines]
    lines[:] = [re.sub(r"\bdocs/([\w-]+)\.md", r":doc:`docs/\1.md </\1>`", line) for line in lines]
    if "Example:" in lines:
        start = lines.index("Example:") + 1
        if lines[start : start + 1] and not lines[start].lstrip().startswith(">>>"):
            code = ["    " + line for line in lines[start:]]
            lines[start:] = ["    .. code-block:: python", "", *code]
