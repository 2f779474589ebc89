"""What the documents name is there, and what they print runs."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from printed import PAGES, ROOT, commands

from entropy_pl.cli import COMMANDS, main
from entropy_pl.config import SettingsParser, keys_of
from entropy_pl.measurements import MeasurementSettings
from entropy_pl.studies import STUDIES

DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
ANCHOR = re.compile(r"[^\w\- ]")


def names_in(module: Path) -> set[str]:
    """Functions, classes, methods as ``Class.method``, and constants of a module."""
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)]
            names |= {*methods, *(f"{node.name}.{method}" for method in methods)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def anchors_in(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {ANCHOR.sub("", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Every relative link is a file, and a link whose text is a name leads to the module that defines it."""
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if file.suffix == ".py" and text.startswith("`"):
            assert text.strip("`") in names_in(file), f"{document.name} says that {text} is in {target}"
        if anchor:
            assert anchor in anchors_in(file), f"{document.name} links to {target}, a heading that is not there"


def test_every_page_is_reached_from_the_first():
    """The site's contents list every page, and README names every one."""
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    contents = (ROOT / "docs/index.md").read_text()
    assert pages == set(re.findall(r"^([a-z][\w-]*)$", contents, re.MULTILINE))
    named = set(re.findall(r"\(docs/([\w-]+)\.md", (ROOT / "README.md").read_text()))
    assert pages == named


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(entropy_pl(?:\.\w+)+)`", (ROOT / "docs/glossary.md").read_text())))
)
def test_a_name_in_the_glossary_is_in_the_code(name):
    """The glossary says where a term is in the code by names that can be imported, which survive a moved file."""
    path = name
    while True:
        try:
            found = importlib.import_module(path)
            break
        except ModuleNotFoundError:
            path = path.rpartition(".")[0]
            assert path, f"expected {name} to be importable"
    for attribute in filter(None, name.removeprefix(path).split(".")):
        declared = getattr(found, "__dataclass_fields__", {})
        assert hasattr(found, attribute) or attribute in declared, f"{name}: no {attribute} in {path}"
        found = getattr(found, attribute, None)


def test_every_key_of_a_measurement_is_explained():
    text = (ROOT / "docs/offline.md").read_text()
    named = set(re.findall(r"`(\w+)", text))
    missing = {key for key in keys_of(MeasurementSettings) if key.rpartition(".")[2] not in named}
    assert not missing


def test_every_command_and_config_has_its_row():
    text = (ROOT / "docs/cli.md").read_text()
    assert set(COMMANDS) == set(re.findall(r"^\| `entropy-pl (\w+)", text, re.MULTILINE))
    configs = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert configs == set(re.findall(r"\(\.\./configs/([\w.]+)\)", text))


def test_every_make_target_is_explained():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"help", "clean"}
    rows = [row for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if row.startswith("| `make ")]
    assert targets == {name for row in rows for name in re.findall(r"`make ([a-z-]+)", row.split("|")[1])}


def printed_commands() -> list[tuple[str, list[str]]]:
    """Every `entropy-pl` command of the documents' shell blocks, whatever starts it, without the program's name."""
    found = []
    for page in PAGES:
        for words in commands(page):
            for program in ("entropy-pl", "entropy_pl.cli"):
                if program in words:
                    found.append((page, words[words.index(program) + 1 :]))
    return found


COMMANDS_PRINTED = printed_commands()


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS_PRINTED, ids=[" ".join(words)[:80] for _, words in COMMANDS_PRINTED]
)
def test_a_printed_command_is_understood(page, words, capsys, monkeypatch, tmp_path):
    """By the real parser, which then prints the config instead of running."""
    monkeypatch.chdir(ROOT)
    if words[0] in ("measure", "study"):
        command, *rest = words
        settings = MeasurementSettings if command == "measure" else STUDIES[rest.pop(0)].settings
        SettingsParser(settings).parse([word for word in rest if word != "--print_config"])
    elif words[0] == "fit":
        with pytest.raises(SystemExit) as done:
            main([*(word for word in words if word != "--print_config"), "--print_config"])
        assert done.value.code == 0, capsys.readouterr().err
        capsys.readouterr()
    else:
        assert words[0] == "report"
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            main(words)
        assert "there is no such folder" in capsys.readouterr().err  # the words it has understood
