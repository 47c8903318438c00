"""Every public name has a docstring with an example, and every example runs."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import itertools
from pathlib import Path

import pytest

import trpo_optim

MODULES = ("", ".rollouts", ".snapshots", ".testing", ".theory", ".tokens")

PUBLIC = {
    name: getattr(module, name)
    for module in (importlib.import_module(f"trpo_optim{suffix}") for suffix in MODULES)
    for name in module.__all__
}
"""Every public name and what it names. Re-exported names appear once."""

each_name = pytest.mark.parametrize("name", PUBLIC)


@functools.cache
def under_assignments() -> dict[str, str]:
    """The strings under the package's module-level assignments, by the assigned name."""
    found = {}
    for file in Path(trpo_optim.__file__).parent.rglob("*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for statement, following in itertools.pairwise(body):
            match statement, following:
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(ast.Constant(str(text))),
                ):
                    found[name] = inspect.cleandoc(text)
    return found


def documented(name: str) -> dict[str, str]:
    """The docstrings of a public name: its own, and those of its public members."""
    value = PUBLIC[name]
    is_class = issubclass(type(value), type)  # Python 3.10 takes an alias of types for a class, too
    if not (is_class or inspect.isfunction(value)):
        return {name: under_assignments().get(name, "")}
    members = vars(value).items() if is_class else ()
    return {name: value.__doc__ or ""} | {
        f"{name}.{each}": member.__doc__ or ""
        for each, member in members
        if not each.startswith("_") and each not in inspect.get_annotations(value)
        if inspect.isroutine(member) or isinstance(member, property)
    }


@each_name
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    texts = documented(name)
    assert all(texts.values()), [each for each, text in texts.items() if not text]
    assert "\nExample:\n" in inspect.cleandoc(texts[name])
    assert doctest.DocTestParser().get_examples(texts[name])


@each_name
def test_the_examples_of_a_public_name_run(name: str) -> None:
    runner = doctest.DocTestRunner()
    output: list[str] = []
    for each, text in documented(name).items():
        test = doctest.DocTestParser().get_doctest(text, {}, each, None, None)
        runner.run(test, out=output.append)
    assert not output, "".join(output)
