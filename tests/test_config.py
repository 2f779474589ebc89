"""One walk for dicts, files and words: nothing in them is imported, nothing unknown is let through."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from jsonargparse import ArgumentParser

from entropy_pl.cli import main
from entropy_pl.config import SettingsParser, keys_of
from entropy_pl.config_messages import unknown_key
from entropy_pl.measurements import MeasurementSettings
from entropy_pl.studies import STUDIES

EVIL = "evil_sentinel_module"
SPEC = {"class_path": f"{EVIL}.X", "init_args": {}}
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Inner:
    """An optional section.

    Args:
        rank: a number.
        modules: a name or several.
    """

    rank: int = 1
    modules: list[str] | str = "all"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"expected rank of at least 1, got {self.rank}")


@dataclass(frozen=True)
class Section:
    """A section.

    Args:
        path: required.
        rate: a number or null.
        inner: another section or null.
    """

    path: str
    rate: float | None = 1.0
    inner: Inner | None = None


@dataclass(frozen=True)
class Element:
    """Of a list.

    Args:
        name: required.
        kind: one of two.
        rate: a number.
    """

    name: str
    kind: Literal["a", "b"] = "a"
    rate: float = 1.0


@dataclass(frozen=True)
class Settings:
    """All there is.

    Args:
        section: with a required key.
        elements: sections in a list.
        maybe: such a list or null.
        sizes: numbers.
        seed: a number.
        flag: true or false.
        kind: one of two.
        folder: text or null.
    """

    section: Section
    elements: list[Element] = field(default_factory=list)
    maybe: list[Element] | None = None
    sizes: list[float] = field(default_factory=list)
    seed: int = 0
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    folder: str | None = None


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that is there once EVIL has been imported."""
    modules = tmp_path / "modules"
    modules.mkdir()
    made = tmp_path / "made"
    (modules / f"{EVIL}.py").write_text(f"open({str(made)!r}, 'w').close()\nclass X: pass\n")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.delitem(sys.modules, EVIL, raising=False)
    return made


@pytest.fixture
def parser() -> SettingsParser[Settings]:
    return SettingsParser(Settings)


def file_of(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message_of(read: Any, *arguments: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read(*arguments)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert "jsonargparse" not in message
    return message


# Nothing is imported


def test_the_sentinel_tells(marker):
    """By import, and by the parser that SettingsParser keeps such words from."""
    importlib.import_module(EVIL)
    assert marker.exists()
    marker.unlink()
    del sys.modules[EVIL]
    bare = ArgumentParser(exit_on_error=False)
    bare.add_class_arguments(Section)
    with pytest.raises(Exception, match=r"class_path|subclass"):
        bare.parse_object({"path": "x", "inner": SPEC})
    assert marker.exists()


SOURCES = {
    "lora": {"checkpoint": {"lora": SPEC}},
    "lora as text": {"checkpoint": {"lora": f"{EVIL}.X"}},
    "lora as yaml in text": {"checkpoint": {"lora": json.dumps(SPEC)}},
    "lora, dotted": {"checkpoint": {"lora.class_path": f"{EVIL}.X"}},
    "checkpoint": {"checkpoint": SPEC},
    "estimator": {"estimator": SPEC},
    "estimator as text": {"estimator": f"{EVIL}.X"},
    "estimator with init_args": {"estimator": {"init_args": {}, "class_path": f"{EVIL}.X"}},
    "a section in a section": {"precision": {"update_vector": SPEC}},
    "elements": {"study": {"options": [SPEC]}},
    "elements among others": {"study": {"options": [{"name": "sequence"}, {"name": "a", **SPEC}]}},
    "elements as text": {"study": {"options": [f"{EVIL}.X"]}},
    "a list as text": {"study": {"options": json.dumps([SPEC])}},
    "no list": {"study": {"options": SPEC}},
    "an element of an element": {"study": {"options": [{"name": SPEC}]}},
    "a number": {"seed": SPEC},
    "the top": SPEC,
    "a config in a config": {"config": f"{EVIL}.X"},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_config_imports_nothing(source, marker, tmp_path):
    parser = SettingsParser(STUDIES["variance"].settings)
    given = {"checkpoint": {"checkpoint_path": "x"}, "output_directory": "y"}
    for name, values in source.items():
        given[name] = {**given.get(name, {}), **values} if isinstance(values, dict) else values
    file = file_of(tmp_path, yaml.safe_dump(given))
    for read, argument in ((parser.read, given), (parser.read, file), (parser.parse, [f"--config={file}"])):
        message_of(read, argument)
    with pytest.raises(SystemExit, match="2"):
        main(["study", "variance", "--config", str(file)])
    assert not marker.exists()
    assert EVIL not in sys.modules


@pytest.mark.parametrize(
    "words",
    [
        [f"--checkpoint.lora={EVIL}.X"],
        ["--checkpoint.lora", f"{EVIL}.X"],
        [f"--checkpoint.lora={json.dumps(SPEC)}"],
        [f"--checkpoint.lora.class_path={EVIL}.X"],
        [f"--checkpoint.lora.class_path={EVIL}.X", "--checkpoint.lora.init_args.rank=1"],
        [f"--checkpoint.lora.help={EVIL}.X"],
        ["--checkpoint.lora.help", f"{EVIL}.X"],
        [f"--checkpoint.lora.class_path.help={EVIL}.X"],
        [f"--estimator={EVIL}.X"],
        [f"--estimator={json.dumps(SPEC)}"],
        [f"--estimator.class_path={EVIL}.X"],
        [f"--study.options={json.dumps([SPEC])}"],
        [f"--study.options+={json.dumps(SPEC)}"],
        [f"--study.options.class_path={EVIL}.X"],
        [f"--study.options+={EVIL}.X"],
        [f"--config={json.dumps({'checkpoint': {'lora': SPEC}})}"],
        [f"--config={EVIL}.X"],
        [f"--class_path={EVIL}.X"],
        [f"{EVIL}.X"],
        [f"--print_config={EVIL}.X"],
    ],
)
def test_words_import_nothing(words, marker):
    read = SettingsParser(STUDIES["variance"].settings).parse
    message_of(read, ["--checkpoint.checkpoint_path=x", "--output_directory=y", *words])
    assert not marker.exists()


@pytest.mark.parametrize("name", [None, *STUDIES])
def test_no_key_at_all_imports_anything(name, marker):
    """Whatever fields settings come to have; a key of text takes `module.X` as the text it is."""
    settings = STUDIES[name].settings if name else MeasurementSettings
    parser = SettingsParser(settings)
    for key in keys_of(settings):
        if name is None or key.startswith("study"):
            for value in (SPEC, f"{EVIL}.X", [SPEC], [f"{EVIL}.X"], json.dumps(SPEC), json.dumps([SPEC])):
                with suppress(ValueError):
                    parser.read({"checkpoint": {"checkpoint_path": "x"}, "output_directory": "y", key: value})
            for words in ([f"--{key}={json.dumps(SPEC)}"], [f"--{key}", f"{EVIL}.X"], [f"--{key}.class_path={EVIL}.X"]):
                with suppress(ValueError):
                    parser.parse(["--checkpoint.checkpoint_path=x", "--output_directory=y", *words])
    assert not marker.exists()


# The same settings from everywhere


def test_a_dict_a_file_and_words_mean_the_same(parser, tmp_path):
    expected = Settings(
        section=Section("x/y", rate=1e-5, inner=Inner(rank=4, modules=["q", "v"])),
        elements=[Element("one", kind="b"), Element("two", rate=2e-3)],
        sizes=[1e-5, 2.0],
        seed=3,
        flag=True,
        folder="2026-01-31",
    )
    given = {
        "section": {"path": "x/y", "rate": 1e-5, "inner": {"rank": 4, "modules": ["q", "v"]}},
        "elements": [{"name": "one", "kind": "b"}, {"name": "two", "rate": 2e-3}],
        "sizes": [1e-5, 2],
        "seed": 3,
        "flag": True,
        "folder": "2026-01-31",
    }
    text = """
        section: {path: x/y, rate: 1e-5, inner: {rank: 4, modules: [q, v]}}
        elements:
        - {name: one, kind: b}
        - {name: two, rate: 2e-3}
        sizes: [1e-5, 2]
        seed: 3
        flag: true
        folder: 2026-01-31
    """
    words = ["--section.path=x/y", "--section.rate", "1e-5", "--section.inner.rank=4", "--section.inner.modules=[q, v]"]
    words += ["--elements=[{name: one, kind: b}, {name: two, rate: 2e-3}]", "--sizes=[1e-5, 2]", "--seed", "3"]
    words += ["--flag=true", "--folder=2026-01-31"]
    assert parser.read(given) == expected
    assert parser.read(yaml.safe_load(text) | {"folder": "2026-01-31"}) == expected  # where 1e-5 is text
    assert parser.read(file_of(tmp_path, text)) == expected
    assert parser.parse(words) == expected
    assert parser.parse(["--config", str(tmp_path / "config.yaml")]) == expected
    assert (
        parser.parse(["--section={path: x/y, rate: 1e-5, inner: {rank: 4, modules: [q, v]}}", *words[5:]]) == expected
    )


@pytest.mark.parametrize("name", ["measure", *(f"study_{study.replace('-', '_')}" for study in STUDIES)])
def test_shipped_configs_read_alike_as_dict_file_and_words(name):
    file = CONFIGS / f"{name}.yaml"
    study = name.removeprefix("study_").replace("_", "-")
    parser = SettingsParser(STUDIES[study].settings if study in STUDIES else MeasurementSettings)
    given = yaml.safe_load(file.read_text())
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    assert parser.read(given) == parser.read(file) == parser.parse([f"--config={file}"]) == parser.parse(words)


def test_the_later_word_counts_and_sections_are_merged(parser, tmp_path):
    first = file_of(tmp_path, "section: {path: x, inner: {rank: 2, modules: q}}\nsizes: [1]\nseed: 1\n", "first.yaml")
    second = file_of(tmp_path, "section: {inner: {rank: 3}}\nsizes: [2, 3]\n", "second.yaml")
    settings = parser.parse([f"--config={first}", "--seed=2", "--seed", "5", "--config", str(second)])
    assert settings == Settings(Section("x", inner=Inner(3, "q")), sizes=[2, 3], seed=5)
    assert parser.parse(["--seed=2", f"--config={first}"]).seed == 1
    assert parser.parse([f"--config={first}", "--section.inner=null"]).section.inner is None
    assert parser.parse([f"--config={first}", "--section.inner={}"]).section.inner == Inner(2, "q")
    assert parser.parse([f"--config={first}", "--section.rate", "-1"]).section.rate == -1


def test_sections_can_be_written_with_dots(parser):
    settings = parser.read({"section.path": "x", "section": {"inner.rank": 3}, "section.inner.modules": "q"})
    assert settings.section == Section("x", inner=Inner(3, "q"))


def test_null_where_it_has_a_meaning(parser):
    settings = parser.read({"section": {"path": "x", "rate": None, "inner": None}, "maybe": None, "folder": None})
    assert settings == Settings(Section("x", rate=None))
    assert parser.read({"section": {"path": "x"}, "maybe": [{"name": "a"}]}).maybe == [Element("a")]


def test_a_path_is_its_text(parser):
    settings = parser.read({"section": {"path": Path("a/b")}, "folder": Path("c"), "elements": [{"name": Path("d")}]})
    assert settings == Settings(Section("a/b"), elements=[Element("d")], folder="c")


def test_what_was_given_is_left_as_it_was(parser):
    given = {"section": {"path": "x", "inner": {"rank": 3}}, "elements": [{"name": "a"}]}
    before = json.dumps(given)
    parser.read(given)
    assert json.dumps(given) == before


def test_yaml_of_every_day(parser, tmp_path):
    text = "section: &s {path: x, rate: 2}\nelements:\n- &a {name: a, kind: b}\n- {<<: *a, name: c}\nfolder: '5'\n"
    settings = parser.read(file_of(tmp_path, text))
    assert settings == Settings(Section("x", rate=2.0), [Element("a", "b"), Element("c", "b")], folder="5")
    assert parser.read(str(file_of(tmp_path, '{"section": {"path": "x"}, "seed": 4}', "config.json"))).seed == 4


def test_a_config_of_its_own_working_folder_is_found(parser, tmp_path, monkeypatch):
    file_of(tmp_path, "section: {path: x}")
    monkeypatch.chdir(tmp_path)
    assert parser.parse(["--config", "config.yaml"]).section.path == "x"


def test_the_process_own_words(parser, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--section.path=x", "--seed=4"])
    assert parser.parse(None) == Settings(Section("x"), seed=4)


# What is said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": "/nonexist.yaml"}, "unknown key 'config': expected one of elements, flag, folder, kind, maybe, "),
        ({"section": {"config": "other.yaml"}}, "unknown key 'section.config': expected one of section.path, section."),
        ({"sead": 3}, "unknown key 'sead'; did you mean 'seed'?"),
        ({"se-ed": 3}, "unknown key 'se-ed'; did you mean 'seed'?"),
        ({"seed ": 3}, "unknown key 'seed '; did you mean 'seed'?"),
        ({"se\ned": 3}, "unknown key 'se\\ned'; did you mean 'seed'?"),
        ({5: 3}, "unknown key '5': expected one of elements,"),
        ({None: 3}, "unknown key 'None': expected"),
        ({"": 3}, "unknown key '': expected"),
        ({"seed.x": 3}, "unknown key 'seed.x'; did you mean 'seed'?"),
        ({"section": {5: 3}}, "unknown key 'section.5': expected one of section.path,"),
        ({"section": {"pa th": 3}}, "unknown key 'section.pa th'; did you mean 'section.path'?"),
        ({"section": {"inner": {"rnk": 3}}}, "unknown key 'section.inner.rnk'; did you mean 'section.inner.rank'?"),
        ({"elements": [{"name": "a"}, {"nam": "b"}]}, "unknown key 'elements[1].nam'; did you mean 'elements.name'?"),
        ({"elements": [{"x": 1}]}, "unknown key 'elements[0].x': expected one of elements.name, elements.kind, elem"),
        ({"elements": [{}]}, "expected a value for elements[0].name, got none"),
        ({"elements": [{"name": "a"}, None]}, "elements[1]: expected Element, got null"),
        ({"elements": {"name": "a"}}, "elements: expected a list of sections, got {'name': 'a'}"),
        ({"elements": None}, "elements: expected list, got null"),
        ({"elements": [{"name": "a", "kind": "c"}]}, "elements.kind: expected one of a, b, got c"),
        ({"elements": [3]}, "elements[0]: expected a section with keys of its own, got 3"),
        ({"maybe": [3]}, "maybe[0]: expected a section with keys of its own, got 3"),
        ({"section": "x.yaml"}, "section: expected a section with keys of its own, got 'x.yaml'"),
        ({"section": None}, "section: expected Section, got null"),
        ({"section": {"inner": {"rank": 0}}}, "expected rank of at least 1, got 0"),
        ({"section": {"inner": {"rank": "a"}}}, "section.inner.rank: expected int, got a"),
        ({"section": {"inner": {"rank": "a\nb"}}}, "section.inner.rank: expected int, got a"),
        ({"section": {"inner": {"modules": 3}}}, "section.inner.modules: expected list[str] or str, got 3"),
        ({"elements": [{"name": "a", "rate": "z"}]}, "elements.rate: expected float, got z"),
        ({"maybe": [{"name": "a", "rate": "z"}]}, "maybe.rate: expected float, got z"),
        ({"section": {"path": None}}, "section.path: expected str, got null"),
        ({"seed": {"x": 3}}, "seed: expected int, got {'x': 3}"),
        ({"seed": "null"}, "seed: expected int, got None"),
        ({"seed": "a\nb"}, "seed: expected int, got a b"),
        ({"seed": Path("x")}, "seed: expected int, got x"),
        ({"flag": "perhaps"}, "flag: expected bool, got perhaps"),
        ({}, "expected a value for section.path, got none"),
    ],
)
def test_wrong_mappings_are_answered_alike_as_dict_and_file(parser, given, message, tmp_path):
    if given:
        given = {"section": {"path": "x"}} | given
    if isinstance(given.get("section"), dict):
        given["section"] = ({"path": "x"} if given["section"] else {}) | given["section"]
    assert message in message_of(parser.read, given)
    if "Path" not in repr(given):  # which no YAML is
        file = file_of(tmp_path, yaml.safe_dump(given))
        assert message in message_of(parser.read, file)
        assert message in message_of(parser.parse, ["--config", str(file)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--see=1"], "unknown key 'see'; did you mean 'seed'?"),
        (["--see"], "unknown key 'see'; did you mean 'seed'?"),
        (["--section.ra=1"], "unknown key 'section.ra'; did you mean 'section.rate'?"),
        (["--sec-tion.path=1"], "unknown key 'sec-tion.path'; did you mean 'section.path'?"),
        (["--section.path.x=1"], "unknown key 'section.path.x'; did you mean 'section.path'?"),
        (["--sizes+=1"], "unknown key 'sizes+'; did you mean 'sizes'?"),
        (["--"], "unknown key '': expected"),
        (["--seed"], "expected a value for seed, got none"),
        (["--seed", "--flag=true"], "expected a value for seed, got none"),
        (["--seed=null"], "seed: expected int, got None"),
        (["--seed=x"], "seed: expected int, got x"),
        (["seed=1"], "expected --KEY VALUE, got 'seed=1'"),
        (["-s", "1"], "expected --KEY VALUE, got '-s'"),
        (["--sizes", "1", "2"], "expected --KEY VALUE, got '2'"),
        (["--section=x.yaml"], "section: expected a section with keys of its own, got 'x.yaml'"),
        (["--section={"], "expected YAML from --section: "),
        (["--section.inner=[1]"], "section.inner: expected a section with keys of its own, got [1]"),
        (["--elements={name: a}"], "elements: expected a list of sections, got {'name': 'a'}"),
        (["--config"], "expected a value for config, got none"),
        (["--config=nowhere.yaml"], "expected a config file, got nowhere.yaml, no such file"),
        (["--config.x=nowhere.yaml"], "unknown key 'config.x'"),
        (["--section.help"], "unknown key 'section.help'"),
        (["--print_config", "--seed=x"], "seed: expected int, got x"),
        (["--print_config=everything"], 'Invalid option "everything" for --print_config'),
    ],
)
def test_wrong_words_are_answered(parser, words, message):
    assert message in message_of(parser.parse, ["--section.path=x", *words])


def test_abbreviations_are_no_keys():
    words = ["--checkpoint.checkpoint_path=x", "--update.max=64"]
    message = message_of(SettingsParser(MeasurementSettings).parse, words)
    assert message.startswith("unknown key 'update.max': expected one of update.loss_type, ")
    words = ["--checkpoint.checkpoint_path=x", "--batch-config.B_E=4"]
    assert "'batch-config.B_E'; did you mean 'batch_config.B_E'?" in message_of(
        SettingsParser(MeasurementSettings).parse, words
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of settings in {file}, got nothing"),
        ("# nothing yet\n", "expected a mapping of settings in {file}, got nothing"),
        ("- a\n", "expected a mapping of settings in {file}, got a list"),
        ("other.yaml", "expected a mapping of settings in {file}, got a str"),
        ("seed: 1\nflag: true\nseed: 2\n", "expected YAML from {file}: expected every key once, got 'seed' again"),
        ("section: {path: x, path: y}\n", "expected every key once, got 'path' again"),
        ("elements: [{name: a, name: b}]\n", "expected every key once, got 'name' again"),
        ("seed: [", "expected YAML from {file}: "),
        ("seed: 1\n---\nseed: 2\n", "expected YAML from {file}: expected a single document"),
        ("? [a]\n: 1\n", "expected YAML from {file}: "),
        ("? {a: 1}\n: 1\n", "expected YAML from {file}: "),
        ("section: &s {path: x, inner: *s}\n", "unknown key 'section.inner.path'"),
        ("seed: &s [*s]\n", "seed: expected int"),
        ("seed: !!set {a, b}\n", "seed: expected int"),
        ("seed: !!python/name:os.system\n", "could not determine a constructor"),
    ],
)
def test_wrong_files_are_answered(parser, text, message, tmp_path):
    file = file_of(tmp_path, text)
    for read, argument in ((parser.read, file), (parser.parse, ["--section.path=x", f"--config={file}"])):
        assert message.format(file=file) in message_of(read, argument)


def test_a_file_that_is_no_text(parser, tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\x00\x80seed")
    assert "expected YAML from" in message_of(parser.read, tmp_path / "config.yaml")
    assert "no such file" in message_of(parser.read, tmp_path)


@pytest.mark.parametrize(
    ("unknown", "answer"),
    [
        ("x", "unknown key 'x': expected one of a, b"),
        ("b.x", "unknown key 'b.x': expected one of b.first, b.second"),
        ("b.frist", "unknown key 'b.frist'; did you mean 'b.first'?"),
        ("b[12].frist", "unknown key 'b[12].frist'; did you mean 'b.first'?"),
    ],
)
def test_an_unknown_key_and_its_nearest(unknown, answer):
    assert unknown_key(unknown, ["a", "b", "b.first", "b.second"]) == answer


# What is printed


def printed_by(capsys, parser: SettingsParser[Any], *words: str) -> str:
    with pytest.raises(SystemExit) as raised:
        parser.parse(list(words))
    assert raised.value.code == 0
    return capsys.readouterr().out


def test_print_config_is_a_config(parser, capsys, tmp_path):
    words = ["--section.path=x", "--section.inner.rank=3", "--sizes=[1e-5]", "--elements=[{name: a}]", "--folder=1e5"]
    out = printed_by(capsys, parser, *words, "--print_config")
    assert parser.read(file_of(tmp_path, out)) == parser.parse(words)
    short = yaml.safe_load(printed_by(capsys, parser, "--print_config=skip_default", "--seed=3"))
    assert short == {"seed": 3}


def test_help(parser, capsys):
    out = printed_by(capsys, parser, "--help")
    assert "--section.rate" in out
    assert "--section {KEY: VALUE, ...}" in out
    assert "a number or null" in out
    assert out == printed_by(capsys, parser, "-h")
    assert "--section.inner.rank" in printed_by(capsys, parser, "--section.path=x", "--section.inner.help")
    assert "--elements.kind" in printed_by(capsys, parser, "--elements.help")
