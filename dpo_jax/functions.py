"""Functions by name, for the JSON of a run, and whether their code is still the same."""

import ast
import importlib
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path

from dpo_jax import checks

COPY = "experiment.py"  # a run folder's copy of the experiment file


def to_name(function: Callable, experiment_file: str | Path | None) -> str:
    """The name under which from_name finds the function again."""
    name, module = function.__qualname__, sys.modules.get(function.__module__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    if experiment_file is not None and code is not None and name.isidentifier():
        if Path(code.co_filename).resolve() == Path(experiment_file).resolve():
            return f"{COPY}:{name}"
    if getattr(module, name, None) is not function:
        raise ValueError(
            f"{function.__module__}.{name} cannot be found again by its name; "
            "define it at the top of the experiment file or of a module that it imports"
        )
    return f"{function.__module__}:{name}"


def from_name(name: str, experiment: types.ModuleType | None) -> Callable:
    """The function of to_name's result."""
    module_name, _, function = name.partition(":")
    if module_name == COPY:
        if experiment is None:
            raise ValueError(f"{name} needs the run's copy of its experiment file")
        module = experiment
    else:
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"the module of {name!r} cannot be imported: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"there is no function {name!r}{checks.nearest(function, dir(module))}")
    return found


def described(function: Callable) -> tuple[str, str]:
    """A function's name and, of one that no package holds, its file's code without layout.

    experiment() and sweep() are left out: what they choose is in the config.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    package = function.__module__.partition(".")[0]
    if package == "dpo_jax" or code is None:
        return f"{function.__module__}.{function.__qualname__}", ""
    tree = ast.parse(Path(code.co_filename).read_text())
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name in ("experiment", "sweep"))
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    return function.__qualname__, "\n".join(map(ast.dump, body))
