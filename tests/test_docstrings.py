"""Every public name says what it is, takes, returns and raises; every estimator its units and its formula's source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from docstring_parser import Docstring, DocstringStyle, parse
from public import public_names

THEORY = (Path(__file__).parents[1] / "docs/theory.md").read_text()
BY_PARAMETER = re.compile(r"(dict|Mapping)\[str, .*?\]")  # tensors by parameter name have no shape of their own
OF_SEQUENCES = re.compile(r"\b(Tensor|TokenStats)\b")
SHAPE = re.compile(r"\[(n|[A-Z]\w*)(, [\w.+]+)*\]|\bscalars?\b")  # [N], [n, T], [N_U, T_U], [N, T, V]
UNIT = re.compile(r"\bnats?\b|\bno unit\b|\bunit of\b|\bestimate's unit\b")
SOURCE = re.compile(r"^ *Source:\n((?: {8}.*\n)+)", re.MULTILINE)


def public_things() -> dict[str, Any]:
    """Every public object by its name, once, however many packages show it."""
    things: dict[str, Any] = {}
    for name in public_names():
        package, _, short = name.rpartition(".")
        thing = getattr(import_module(package), short)
        if name != "entropy_pl.__version__" and not any(thing is other for other in things.values()):
            things[name] = thing
    return things


THINGS = public_things()
FUNCTIONS = {name: thing for name, thing in THINGS.items() if inspect.isfunction(thing)}
CLASSES = {  # exceptions have the signature of a built-in type
    name: thing
    for name, thing in THINGS.items()
    if inspect.isclass(thing) and not hasattr(thing, "__origin__") and not issubclass(thing, Exception)
}
CALLED = FUNCTIONS | CLASSES
OTHERS = {
    name: thing
    for name, thing in THINGS.items()
    if name not in CALLED and not (inspect.isclass(thing) and issubclass(thing, Exception))
}
ESTIMATORS = {name: thing for name, thing in FUNCTIONS.items() if thing.__module__.startswith("entropy_pl.estimators")}


def own_doc(thing: Any) -> str:
    """A class's own docstring, not that of a class it derives from."""
    return (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""


def parsed(thing: Any) -> Docstring:
    return parse(own_doc(thing), DocstringStyle.GOOGLE)


def sources_of(thing: Any) -> list[Any]:
    """Where parameters may be documented: a class takes those of the classes of ours that it derives from."""
    return (
        [parent for parent in thing.__mro__ if parent.__module__.startswith("entropy_pl")]
        if inspect.isclass(thing)
        else [thing]
    )


def annotations_of(thing: Any) -> dict[str, Any]:
    """By parameter; of a function also that of what it returns."""
    signature = inspect.signature(thing)
    found = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return found if inspect.isclass(thing) else found | {"return": signature.return_annotation}


def raised_in(function: Callable[..., Any]) -> set[str]:
    """Names of the exceptions that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def bodies_of(thing: Any) -> list[Callable[..., Any]]:
    """A function itself; what a class of ours does when it is made."""
    if not inspect.isclass(thing):
        return [thing]
    made_by = "__post_init__" if dataclasses.is_dataclass(thing) else "__init__"
    return [vars(thing)[made_by]] if made_by in vars(thing) else []


@cache
def said_below_assignments(file: str) -> set[str]:
    """The names of a module that are assigned, with a string right below."""
    body = ast.parse(Path(file).read_text()).body
    return {
        target.id
        for node, below in pairwise(body)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def says_nothing(thing: Any) -> bool:
    """No docstring, or the signature that a dataclass without one is given."""
    return not own_doc(thing) or own_doc(thing).startswith(f"{thing.__name__}(")


def undocumented(thing: Any) -> set[str]:
    documented = {parameter.arg_name.lstrip("*") for source in sources_of(thing) for parameter in parsed(source).params}
    return set(inspect.signature(thing).parameters) - documented


def documented_in_vain(thing: Any) -> set[str]:
    taken = set(inspect.signature(thing).parameters)
    if inspect.isclass(thing):  # a callback takes `options`, which its base class spells out
        taken |= {"options"} if issubclass(thing, sources_of(thing)[-1]) else set()
    return {parameter.arg_name.lstrip("*") for parameter in parsed(thing).params} - taken


def keeps_its_return_to_itself(function: Callable[..., Any]) -> bool:
    """It returns, or yields, something that is no dataclass of ours, which would be documented by itself."""
    returned = str(inspect.signature(function).return_annotation)
    known = getattr(sys.modules[function.__module__], returned, None)
    if returned in ("None", "Iterator[None]") or (dataclasses.is_dataclass(known) and known.__doc__):
        return False
    return parsed(function).returns is None


def untyped(thing: Any) -> set[str]:
    return {name for name, annotation in annotations_of(thing).items() if annotation is inspect.Parameter.empty}


def lacks_a_shape(thing: Any) -> bool:
    annotations = [BY_PARAMETER.sub("", str(annotation)) for annotation in annotations_of(thing).values()]
    doc = "".join(own_doc(source) for source in sources_of(thing))
    return any(map(OF_SEQUENCES.search, annotations)) and not SHAPE.search(doc)


def raised_without_a_word(thing: Any) -> set[str]:
    documented = {str(error.type_name) for error in parsed(thing).raises}
    return {error for body in bodies_of(thing) for error in raised_in(body)} - documented


def without_source(estimator: Callable[..., Any]) -> str | None:
    """What is wrong with the section `Source`, if anything is."""
    source = SOURCE.search(own_doc(estimator))
    if source is None:
        return "no section 'Source'"
    sections = re.findall(r"§(\d+)", source[1])
    if not sections and "arXiv" not in source[1]:
        return "neither a section (§) of docs/theory.md nor a paper (arXiv)"
    missing = [number for number in sections if f"\n## {number}. " not in THEORY]
    return f"no such section of docs/theory.md: {missing}" if missing else None


CHECKS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "says what it is": (CALLED, says_nothing),
    "documents every parameter": (CALLED, undocumented),
    "documents no parameter that is not there": (CALLED, documented_in_vain),
    "says what it returns": (FUNCTIONS, keeps_its_return_to_itself),
    "has types": (CALLED, untyped),
    "states shapes": (CALLED, lacks_a_shape),
    "names the errors of its own": (CALLED, raised_without_a_word),
    "states its units": (ESTIMATORS, lambda estimator: not UNIT.search(own_doc(estimator))),
    "names its source": (ESTIMATORS, without_source),
    "says when it refuses": (ESTIMATORS, lambda estimator: not parsed(estimator).raises),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_public_name(check):
    things, wrong_with = CHECKS[check]
    found = {name: wrong_with(thing) for name, thing in things.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_a_constant_or_a_type_says_what_it_is():
    """In a string below its assignment, wherever that stands."""
    silent = []
    for name, thing in OTHERS.items():
        short = name.rpartition(".")[2]
        modules = [module for key, module in sys.modules.items() if key.startswith("entropy_pl.")]
        homes = [module for module in modules if getattr(module, short, None) is thing]
        if not any(short in said_below_assignments(str(home.__file__)) for home in homes):
            silent.append(name)
    assert silent == []


def test_each_check_sees_what_it_looks_for():
    def wanting(base: "TokenStats", shifted) -> "TokenStats":  # type: ignore[no-untyped-def]  # noqa: F821, UP037
        """Something of numbers in [0, 1].

        Args:
            base: statistics.
            gone: what is no longer taken.

        Source:
            docs/theory.md, §99.
        """
        raise ValueError("expected")

    found = {check: wrong_with(wanting) for check, (_, wrong_with) in CHECKS.items()}
    assert found == {
        "says what it is": False,
        "documents every parameter": {"shifted"},
        "documents no parameter that is not there": {"gone"},
        "says what it returns": True,
        "has types": {"shifted"},
        "states shapes": True,
        "names the errors of its own": {"ValueError"},
        "states its units": True,
        "names its source": "no such section of docs/theory.md: ['99']",
        "says when it refuses": True,
    }
    assert says_nothing(dataclasses.make_dataclass("Unsaid", ["field"]))
