"""The rules of imports: downwards only, absolute, modules not names, no jax where it costs."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dpo_jax", "experiments", "scripts", "tests")

# modules that know nothing of training
LOWER = (
    *("dpo_jax.checks", "dpo_jax.config", "dpo_jax.environment", "dpo_jax.flags"),
    *("dpo_jax.functions", "dpo_jax.paths", "dpo_jax.metrics", "dpo_jax.sharding"),
    *("dpo_jax.addresses", "dpo_jax.processes"),
    *("dpo_jax.logps", "dpo_jax.losses", "dpo_jax.tables", "dpo_jax.data", "dpo_jax.model"),
    "dpo_jax.hlo",
    *("dpo_jax.catalogue", "dpo_jax.loss_curves", "dpo_jax.loss_figures"),
)
UPPER = (
    *("dpo_jax.train", "dpo_jax.train_step", "dpo_jax.run", "dpo_jax.task", "dpo_jax.evaluate"),
    *("dpo_jax.checkpoint", "dpo_jax.sweep", "dpo_jax.report", "experiments", "scripts"),
    *("dpo_jax.export", "dpo_jax.initial", "dpo_jax.sample", "dpo_jax.stops"),
    "dpo_jax.origins",
)
# modules that are used where jax would cost a second, or is not installed
WITHOUT_JAX = (
    *("dpo_jax.checks", "dpo_jax.config", "dpo_jax.environment", "dpo_jax.flags"),
    *("dpo_jax.functions", "dpo_jax.paths", "dpo_jax.data", "dpo_jax.sweep", "dpo_jax.report"),
    *("dpo_jax.hlo", "dpo_jax.addresses", "dpo_jax.chips"),
)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
# the last two as their own documentation has them
ALIASES = {"jnp", "np", "nn", "P", "ocp", "tfds"}
VAGUE = {"utils", "util", "helpers", "common", "core", "base", "misc"}


class Import(NamedTuple):
    """One imported thing: `import module` has no name."""

    line: int
    module: str
    name: str | None
    alias: str | None
    level: int


def imports(source: str) -> list[Import]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, a.name, None, a.asname, 0) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [Import(node.lineno, module, a.name, a.asname, node.level) for a in node.names]
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield module_name(path), path


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = dict(modules())


def imported_modules(source: str) -> set[str]:
    """The modules that a source imports, by full name."""
    found = set()
    for entry in imports(source):
        inner = f"{entry.module}.{entry.name}"
        found.add(inner if inner in MODULES else entry.module)
    return found


GRAPH = {name: imported_modules(path.read_text()) for name, path in MODULES.items()}


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def reachable(start: str) -> dict[str, list[str]]:
    """Every module that start imports, directly or not, with the way to it."""
    ways = {start: [start]}
    queue = [start]
    while queue:
        module = queue.pop()
        for other in sorted(GRAPH.get(module, ())):
            if other not in ways:
                ways[other] = [*ways[module], other]
                queue.append(other)
    return ways


def offences(source: str) -> list[str]:
    """What a source's imports do against the style, a line each."""
    found = []
    for entry in imports(source):
        what = f"line {entry.line}: {entry.module}.{entry.name or ''}".rstrip(".")
        if entry.level:
            found.append(f"{what} is a relative import")
        elif entry.name is not None and not importable_name(entry.module, entry.name):
            found.append(f"{what} is a name; import its module")
        if entry.alias is not None and not usual_alias(entry):
            found.append(f"{what} has the alias {entry.alias}")
    return found


def usual_alias(entry: Import) -> bool:
    """Whether an alias is a usual one, or names a module together with its package."""
    parts = [*entry.module.split("."), *([entry.name] if entry.name else [])]
    return entry.alias in (*ALIASES, "_".join(parts[-2:]))


def importable_name(module: str, name: str) -> bool:
    """Whether `from module import name` imports a module, a type, or functools.partial."""
    if f"{module}.{name}" in MODULES or (module, name) == ("functools", "partial"):
        return True
    if module in ("typing", "__future__") or name.lstrip("_")[:1].isupper():
        return True
    if module.partition(".")[0] in FOLDERS:
        return False
    return is_package(module) and importlib.util.find_spec(f"{module}.{name}") is not None


def is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_absolute_and_of_modules(name):
    found = offences(MODULES[name].read_text())
    assert not found, f"{MODULES[name].relative_to(ROOT)}: " + "; ".join(found)


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, LOWER)])
def test_lower_modules_know_nothing_of_training(name):
    ways = [" -> ".join(way) for module, way in reachable(name).items() if within(module, UPPER)]
    assert not ways, f"{name} must not import upwards: {ways}"


def test_no_module_imports_itself_by_way_of_others():
    for name in MODULES:
        for module, way in reachable(name).items():
            back = name in GRAPH.get(module, ()) and name != module
            assert not back, f"imports run in a circle: {' -> '.join([*way, name])}"


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, WITHOUT_JAX)])
def test_modules_that_start_at_once_import_no_jax(name):
    ways = [" -> ".join(way) for module, way in reachable(name).items() if within(module, JAX)]
    assert not ways, f"{name} must not import jax: {ways}"


def test_losses_know_only_log_probabilities_and_their_contract():
    known = {module for module in GRAPH["dpo_jax.losses"] if module.startswith("dpo_jax")}
    assert known <= {"dpo_jax.contract", "dpo_jax.logps"}


def test_training_does_not_import_losses():
    names = [name for name in MODULES if name.startswith("dpo_jax.train")]
    assert names
    assert not [name for name in names if "dpo_jax.losses" in GRAPH[name]]


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("experiments",))])
def test_experiments_import_config_losses_and_other_experiments(name):
    allowed = ("dpo_jax.config", "dpo_jax.losses", "dpo_jax.contract", "dpo_jax.data.builtin")
    allowed += ("dpo_jax.task", "experiments", "jax")
    wrong = [
        module
        for module in GRAPH[name]
        if not within(module, allowed) and module.partition(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong, f"{name} imports {wrong}"


def test_nothing_but_scripts_and_tests_imports_scripts_or_tests():
    for name in MODULES:
        if not within(name, ("scripts", "tests")):
            wrong = [module for module in GRAPH[name] if within(module, ("scripts", "tests"))]
            assert not wrong, f"{name} imports {wrong}"


def test_every_package_that_is_imported_is_required():
    listed = (ROOT / "requirements.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    names = {re.split(r"[\[>=]", word)[0].lower() for word in re.findall(r'[^\s",]+', listed)}
    used = {module.partition(".")[0] for name in MODULES for module in GRAPH[name]}
    used -= {*FOLDERS, *sys.stdlib_module_names}
    distributions = {"orbax": "orbax-checkpoint", "google": "protobuf"}
    packages = {distributions.get(name, name.replace("_", "-")).lower() for name in used}
    missing = packages - {name.replace("_", "-") for name in names}
    assert not missing, f"neither requirements.txt nor pyproject.toml names {sorted(missing)}"


def test_no_module_has_a_name_that_says_nothing():
    assert not [name for name in MODULES if name.rpartition(".")[2] in VAGUE]


@pytest.mark.parametrize("module", ["dpo_jax.flags", "dpo_jax.report", "dpo_jax.launch"])
def test_importing_it_for_real_pulls_no_jax(module):
    program = f"import sys, {module}; print([m for m in {JAX} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_training_imports_nothing_for_int8_or_text_before_it_needs_it():
    names = "qwix", "transformers", "datasets"
    program = f"import sys, dpo_jax.train; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ("from . import config", "line 1: .config is a relative import"),
        ("from dpo_jax.config import grid", "dpo_jax.config.grid is a name; import its module"),
        ("from os.path import join", "os.path.join is a name"),
        ("import dpo_jax.config as c", "dpo_jax.config has the alias c"),
        ("def f():\n    from dpo_jax.flags import load", "line 2: dpo_jax.flags.load is a name"),
    ],
)
def test_the_rules_above_see_an_offence(source, offence):
    assert len(offences(source)) == 1
    assert offence in offences(source)[0]


def test_the_rules_above_allow_modules_types_partial_and_the_usual_aliases():
    lines = ["import jax.numpy as jnp", "import numpy as np", "from flax import linen as nn"]
    lines += ["from dpo_jax import config", "from dpo_jax.config import Experiment"]
    lines += ["from functools import partial", "from jax.sharding import PartitionSpec as P"]
    lines += ["from typing import cast", "from collections.abc import Callable"]
    lines += ["from dpo_jax.model import config as model_config"]
    assert offences("\n".join(lines)) == []


def test_the_graph_above_has_lazy_imports_and_submodules():
    source = "def f():\n    from dpo_jax import config\n    import jax.numpy as jnp"
    assert imported_modules(source) == {"dpo_jax.config", "jax.numpy"}
    assert "annotated_types" in reachable("dpo_jax.flags")
