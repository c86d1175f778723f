"""Experiment files, the command line, and the record of a run: config <-> flags and JSON.

Imports no jax; an experiment file that is loaded may.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import tempfile
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tyro import constructors

from dpo_jax import checks, config, environment, functions, paths

ROOT = Path(__file__).resolve().parent.parent


class BrokenFile(ValueError):
    """An experiment file's own code raised the exception that is the cause of this one."""


def load_module(path: str | Path) -> types.ModuleType:
    """The module of an experiment file, which may lie anywhere on this machine's disk.

    One in the project's experiments/ is imported as `experiments.<name>`, any other under its stem.
    Raises ValueError for a missing file, one without `experiment()`, and one that fails to import
    (the reason is the cause of the error).
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no experiment file {str(path)!r}{near_file(file)}")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # so that a file elsewhere can import experiments
    try:
        if file.resolve().parent == ROOT / "experiments":
            module = importlib.import_module(f"experiments.{file.stem}")
        else:
            module = import_file(file)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BrokenFile(f"{path} cannot be imported: {reason}") from error
    if not callable(getattr(module, "experiment", None)):
        near = checks.nearest("experiment", [n for n in vars(module) if not n.startswith("_")])
        raise ValueError(f"{path} has no function experiment() that returns the run{near}")
    return module


def load(path: str | Path) -> config.Experiment:
    """The run that an experiment file returns; ValueError if it is no config.Experiment."""
    return built(load_module(path), path)


def built(module: types.ModuleType, path: str | Path) -> config.Experiment:
    """What `experiment()` of a loaded experiment file returns."""
    try:
        experiment = module.experiment()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BrokenFile(f"experiment() of {path} fails: {reason}") from error
    if not isinstance(experiment, config.Experiment):
        raise ValueError(
            f"experiment() of {path} returns {experiment!r:.100}; it must return config.Experiment"
        )
    return experiment


def import_file(file: Path) -> types.ModuleType:
    """Imports a file that lies outside of the project, anew each time."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError("the name of an experiment file must end in .py")
    module = importlib.util.module_from_spec(spec)
    ours = sys.modules.setdefault(file.stem, module) is module  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if ours:
            del sys.modules[file.stem]
        raise
    return module


def near_file(file: Path) -> str:
    """'; did you mean X?' for a file that does not exist, or the project's experiments."""
    own = experiment_files()
    there = {path.stem: path for path in [*own, *sorted(file.parent.glob("*.py"))]}
    close = difflib.get_close_matches(file.stem, there, n=1)
    if close:
        return f"; did you mean {str(there[close[0]])!r}?"
    return f"; the project has: {', '.join(path.stem for path in own) or 'none'}"


def experiment_files() -> list[Path]:
    """The project's own experiment files."""
    files = (ROOT / "experiments").glob("*.py")
    return sorted(file for file in files if file.name != "__init__.py")


def parse(
    experiment: config.Experiment, arguments: Sequence[str], program: str
) -> config.Experiment:
    """The experiment with the fields that the flags name changed.

    `--help` and wrong flags print and end the process (SystemExit 0 and 2).
    """
    loss = experiment.loss.function
    about = (inspect.getdoc(loss) or "").partition("\n")[0]
    registry = constructors.ConstructorRegistry()
    registry.struct_rule(loss_flags)
    registry.primitive_rule(scalar_flag)
    return tyro.cli(
        config.Experiment,
        prog=program,
        description=f"One run with the loss {loss.__name__}: {about}",
        args=list(arguments),
        default=experiment,
        registry=registry,
        config=(tyro.conf.SuppressFixed,),
    )


def from_command_line(arguments: Sequence[str], program: str) -> tuple[config.Experiment, Path]:
    """The run and its experiment file, from arguments whose first is that file.

    What is wrong is printed and ends the process (SystemExit 2), as does `--help` (0).
    """
    file = experiment_argument(arguments, program)
    try:
        experiment = load(file)
    except ValueError as error:
        stop(error)
    return parse(experiment, arguments[1:], f"{program} {arguments[0]}"), file


def experiment_argument(arguments: Sequence[str], program: str) -> Path:
    """The experiment file that the first argument names; prints the usage where there is none."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0])
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    lines = [f"usage: {program} EXPERIMENT.py [flags]", ""]
    lines += [f"{program} EXPERIMENT.py --help lists the flags. Experiments of this project:", ""]
    for file in experiment_files():
        about = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]
        lines.append(f"experiments/{file.name}")
        lines.append(textwrap.fill(about, 90, initial_indent="    ", subsequent_indent="    "))
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    if not asked:
        got = f"and it is {arguments[0]!r}" if arguments else "and there is none"
        print(f"\nerror: the first argument must be an experiment file, {got}", file=sys.stderr)
    raise SystemExit(0 if asked else 2)


def stop(error: Exception) -> NoReturn:
    """Prints an error, below the traceback where it is an experiment file's, and exits with 2."""
    if isinstance(error, BrokenFile):
        traceback.print_exception(error.__cause__)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def loss_flags(info: constructors.StructTypeInfo) -> constructors.StructConstructorSpec | None:
    """tyro's rule for config.Loss: one flag for each hyperparameter of the function."""
    if info.type is not config.Loss:
        return None
    loss: config.Loss = info.default
    fields = []
    for name, (annotation, _) in config.loss_fields(loss.function).items():
        help_text = hyperparameter_help(loss.function, name, annotation)
        value = loss.hyperparameters[name]
        fields.append(constructors.StructFieldSpec(name, annotation, value, help_text))

    def instantiate(**hyperparameters: Any) -> config.Loss:
        return config.Loss(loss.function, **hyperparameters)

    return constructors.StructConstructorSpec(instantiate, tuple(fields))


def hyperparameter_help(function: Callable, name: str, annotation: Any) -> str:
    """The part `name: ...` of the loss's docstring, if it has one, and the allowed range."""
    part = rf"^([ \t]*)`?{re.escape(name)}`?(?: \([^)]*\))?: *(.+(?:\n\1[ \t]+\S.*)*)"
    found = re.search(part, inspect.getdoc(function) or "", re.MULTILINE)
    about = " ".join(found[2].split()).removesuffix(".") if found else f"of {function.__name__}"
    return f"{about}; {checks.allowed(annotation)}"


def scalar_flag(
    info: constructors.PrimitiveTypeInfo,
) -> constructors.PrimitiveConstructorSpec | None:
    """tyro's rule for int, float and those or str with None, and errors that say so."""
    optional = info.type_origin in (typing.Union, types.UnionType)
    members = [bare(a) for a in typing.get_args(info.type)] if optional else [info.type]
    member = members[0]
    if members[1:] not in ([], [types.NoneType]) or member not in (int, float, str):
        return None

    def from_text(texts: list[str]) -> int | float | str | None:
        if optional and texts[0] == "None":
            return None
        try:
            return member(texts[0])
        except ValueError:
            expected = checks.allowed(info.type)
            raise ValueError(f"{texts[0]!r} was given; it must be {expected}") from None

    return constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{member.__name__.upper()}{'|None' if optional else ''}",
        instance_from_str=from_text,
        is_instance=lambda value: isinstance(value, (member, types.NoneType)),
        str_from_instance=lambda value: [str(value)],
    )


def bare(annotation: Any) -> Any:
    """An annotation without its Annotated."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def to_json(experiment: config.Experiment, experiment_file: str | Path | None = None) -> dict:
    """The experiment as JSON values.

    Functions become "module:name", those that the experiment file itself defines
    "experiment.py:name". Raises ValueError for a function that cannot be found again by its name.
    """
    record: dict[str, Any] = {}
    for name, value in config.flatten(experiment).items():
        section, _, field = name.rpartition(".")
        if callable(value):
            value = functions.to_name(value, experiment_file)
        (record.setdefault(section, {}) if section else record)[field] = value
    loss = {"function": functions.to_name(experiment.loss.function, experiment_file)}
    return {"loss": loss | record.pop("loss", {}), **record}


def from_json(record: Mapping, module_path: str | Path | None = None) -> config.Experiment:
    """The experiment that to_json wrote; "experiment.py:name" is looked up in module_path.

    Raises ValueError that names the unknown and missing fields.
    """
    module = None if module_path is None else load_module(module_path)
    fields: dict[str, Any] = dict(record)
    check_keys(fields, dataclasses.fields(config.Experiment), "")
    for field, section in sections():
        values = record[field]
        if not isinstance(values, Mapping):
            raise ValueError(f"{field} is {values!r}; it must be an object of fields")
        check_keys(values, dataclasses.fields(section), f"{field}.")
        hints = typing.get_type_hints(section, include_extras=True)
        fields[field] = section(
            **{name: from_json_value(values[name], hints[name], module) for name in values}
        )
    loss = dict(record["loss"])
    if not isinstance(loss.get("function"), str):
        raise ValueError("loss.function is missing: the name of the loss, module:name")
    function = functions.from_name(loss.pop("function"), module)
    missing = [name for name in config.loss_fields(function) if name not in loss]
    if missing:
        raise ValueError(f"missing fields: {', '.join(f'loss.{name}' for name in missing)}")
    for name, (annotation, _) in config.loss_fields(function).items():
        if isinstance(loss[name], str) and is_function_type(annotation):
            loss[name] = functions.from_name(loss[name], module)
    fields["loss"] = config.Loss(function, **loss)
    return config.Experiment(**fields)


def from_json_value(value: Any, annotation: Any, module: types.ModuleType | None) -> Any:
    """A field's value: a function of its name, a tuple of JSON's list, anything else as it is."""
    if isinstance(value, str) and is_function_type(annotation):
        return functions.from_name(value, module)
    return tuple(value) if isinstance(value, list) else value


def sections() -> Iterator[tuple[str, type]]:
    """The fields of config.Experiment that are dataclasses, with their types."""
    for name, hint in typing.get_type_hints(config.Experiment).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield name, hint


def is_function_type(annotation: Any) -> bool:
    """Whether an annotation is Callable or Callable | None."""
    options = [annotation, *typing.get_args(annotation)]
    return any(Callable in (option, typing.get_origin(option)) for option in options)


def check_keys(record: Mapping, fields: Sequence[dataclasses.Field], prefix: str) -> None:
    """Raises ValueError that names the keys which are no fields, and the fields without a key."""
    names = [field.name for field in fields]
    for name in record:
        if name not in names:
            raise ValueError(f"unknown field {prefix}{name}{checks.nearest(name, names)}")
    missing = [f"{prefix}{name}" for name in names if name not in record]
    if missing:
        raise ValueError(f"missing fields: {', '.join(missing)}")


def write_run(folder: str, experiment: config.Experiment, experiment_file: str | Path) -> None:
    """Writes config.json, environment.json and a copy of the experiment file into a folder."""
    source = Path(experiment_file).read_bytes()
    origin = {"path": str(experiment_file), "sha256": hashlib.sha256(source).hexdigest()}
    record = {"experiment": to_json(experiment, experiment_file), "experiment_file": origin}
    paths.write_text(paths.join(folder, functions.COPY), source.decode())
    paths.write_text(
        paths.join(folder, "environment.json"), json.dumps(environment.environment(ROOT), indent=1)
    )
    # last: a folder with a config.json is a complete one
    paths.write_text(paths.join(folder, "config.json"), json.dumps(record, indent=1))


def load_run(folder: str) -> config.Experiment:
    """The experiment of a run folder, from its config.json and its copy of the experiment file."""
    record = read_config(folder)["experiment"]
    copy = paths.join(folder, functions.COPY)
    try:
        if not names_copy(record):
            return from_json(record)
        if paths.is_local(folder):
            return from_json(record, copy)
        local = Path(tempfile.mkdtemp(prefix="dpo_jax_")) / functions.COPY
        local.write_text(paths.read_text(copy))
        return from_json(record, local)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from (error.__cause__ or error)


def read_config(folder: str) -> dict:
    """A run folder's config.json: experiment (what to_json gave) and experiment_file."""
    file = paths.join(folder, "config.json")
    if not paths.exists(file):
        raise ValueError(f"{folder} is no run folder: it has no config.json")
    try:
        record = json.loads(paths.read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), dict):
        raise ValueError(f"{file} is not the config.json of a run: it has no field experiment")
    return record


def names_copy(record: Mapping) -> bool:
    """Whether a function of the record is in the run's copy of the experiment file."""
    for section in record.values():
        for value in section.values() if isinstance(section, Mapping) else ():
            if isinstance(value, str) and value.startswith(f"{functions.COPY}:"):
                return True
    return False


def compare(old: config.Experiment, new: config.Experiment) -> list[str]:
    """What differs between a folder's experiment and this one, a line a field.

    Where a run lies and what it logs (workdir, log) make no difference.
    """
    before, after = config.flatten(old), config.flatten(new)
    lines = []
    if functions.described(old.loss.function) != functions.described(new.loss.function):
        pair = (old.loss.function.__name__, new.loss.function.__name__)
        lines.append(difference("loss", *pair))
    for name in [*before, *(n for n in after if n not in before)]:
        if name == "workdir" or name.startswith("log."):
            continue
        a, b = before.get(name), after.get(name)
        if callable(a) and callable(b):
            if functions.described(a) != functions.described(b):
                lines.append(difference(name, a.__name__, b.__name__))
        elif a != b:
            lines.append(difference(name, a, b))
    return lines


def difference(name: str, old: Any, new: Any) -> str:
    """One line of compare."""
    if old == new:
        return f"{name}: the code of {new} has changed since the folder was written"
    return f"{name}: {old} in the folder, {new} now"
