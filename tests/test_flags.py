"""Experiment files, the command line, JSON, run folders."""

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import config, flags

EXPERIMENT = '''
"""Hinge."""
from dpo_jax import config

def hinge(policy, reference, batch, *, beta: config.Positive, lam=1.0, sure: bool = False):
    """Hinge.

    beta: inverse temperature
        of the reward.
    """

def reward(prompt, completion):
    return 1.0

def experiment():
    samples = config.Samples(reward=reward)
    return config.Experiment(loss=config.Loss(hinge, beta=0.1), steps=10, samples=samples)

def sweep():
    return config.grid({"seed": [0, 1]})
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_hinge.py"
    path.write_text(EXPERIMENT)
    return path


def parse(file: Path, *arguments: str) -> config.Experiment:
    return flags.parse(flags.load(file), arguments, "train")


def refused(file: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What is printed when the flags are refused, without the box around it."""
    with pytest.raises(SystemExit) as stopped:
        parse(file, *arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return unboxed(printed.err)


def unboxed(text: str) -> str:
    return " ".join(re.sub(r"[^\x00-\x7f]", " ", text).split())


def test_load_returns_the_run_of_a_file_outside_the_project(file):
    run = flags.load(file)
    assert (run.steps, run.loss.function.__name__) == (10, "hinge")
    assert run.loss.hyperparameters == {"beta": 0.1, "lam": 1.0, "sure": False}


def test_a_file_outside_the_project_can_import_its_experiments(tmp_path):
    path = tmp_path / "variant.py"
    path.write_text("import experiments\n" + EXPERIMENT)
    assert flags.load(path).steps == 10


def test_a_file_in_the_projects_folder_is_imported_as_part_of_the_package(file, monkeypatch):
    monkeypatch.setattr(flags, "ROOT", file.parent)
    folder = file.parent / "experiments"
    folder.mkdir()
    (folder / "own_hinge.py").write_text(EXPERIMENT)
    import experiments

    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = flags.load_module(folder / "own_hinge.py")
    monkeypatch.delitem(sys.modules, "experiments.own_hinge")
    assert module.__name__ == "experiments.own_hinge"


def test_a_file_named_as_a_library_does_not_take_its_place(tmp_path):
    path = tmp_path / "json.py"
    path.write_text(EXPERIMENT)
    assert flags.load(path).steps == 10
    assert sys.modules["json"] is json


def test_a_missing_file_names_the_nearest(file):
    message = r"no experiment file .*my_hing\.py'; did you mean .*my_hinge"
    with pytest.raises(ValueError, match=message):
        flags.load(file.with_name("my_hing.py"))


def test_a_missing_file_that_is_near_none_lists_the_projects(file):
    with pytest.raises(ValueError, match="; the project has: "):
        flags.load(file.with_name("zzzzzzzz.py"))


@pytest.mark.parametrize(
    ("source", "message", "cause"),
    [
        ("def experimnt(): ...", r"has no function experiment\(\).*did you mean 'experimnt'", None),
        ("def experiment(): return {}", r"returns \{\}; it must return config.Experiment", None),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError", ModuleNotFoundError),
        ("def experiment(:", "cannot be imported: SyntaxError", SyntaxError),
        ("def experiment(): 1 / 0", r"experiment\(\) of .* fails: ZeroDivision", ZeroDivisionError),
    ],
)
def test_a_file_that_gives_no_run_says_why_and_keeps_the_cause(tmp_path, source, message, cause):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message) as error:
        flags.load(path)
    assert type(error.value.__cause__) is (cause or type(None))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (["--loss.beta", "0.5"], {"loss.beta": 0.5}),
        (["--loss.sure"], {"loss.sure": True}),
        (["--batch-size", "8"], {"batch_size": 8}),
        (["--batch_size=8"], {"batch_size": 8}),
        (["--data.label-noise", "0.25"], {"data.label_noise": 0.25}),
        (["--evaluate-every", "5"], {"evaluate_every": 5}),
        (["--reference.source", "None"], {"reference.source": None}),
        (["--optimizer.clip", "None"], {"optimizer.clip": None}),
        (["--optimizer.learning-rate", "1e-3"], {"optimizer.learning_rate": 1e-3}),
        (["--model.dtype", "bfloat16"], {"model.dtype": "bfloat16"}),
        (["--log.no-progress"], {"log.progress": False}),
        (["--workdir", "gs://bucket/run"], {"workdir": "gs://bucket/run"}),
    ],
)
def test_a_flag_changes_its_field_and_nothing_else(file, arguments, changes):
    run = flags.load(file)
    assert flags.parse(run, arguments, "train") == config.override(run, changes)


def test_no_flags_leave_the_run_as_the_file_has_it(file):
    run = flags.load(file)
    assert flags.parse(run, [], "train") == run


def test_help_shows_every_field_with_its_comment(file, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(file, "--help")
    assert stopped.value.code == 0
    text = unboxed(capsys.readouterr().out)
    for name in config.flatten(flags.load(file)):
        flag = "--" + name.replace("_", "-")
        if name == "samples.reward":
            assert flag not in text
            continue
        # the flag, its metavar or its negation, and a comment before the default
        metavar = r"( \S+|, --\S+| \{None\}\|\{\[.+?\]\})"
        line = rf"{re.escape(flag)}{metavar} (?!\(default)\w.{{3,}}?\(default: "
        assert re.search(line, text), f"no comment for {flag}"
    assert "--steps INT optimizer steps (default: 10)" in text
    assert "--loss.beta FLOAT inverse temperature of the reward; float, > 0 (default" in text
    assert "--loss.lam FLOAT of hinge; float (default: 1.0)" in text
    assert "loss hinge: Hinge." in text


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--loss.betta", "1"], ["Unrecognized options: --loss.betta", "--loss.beta FLOAT"]),
        (["--stepz", "1"], ["Unrecognized options: --stepz", "--steps INT"]),
        (["--data.soucre", "x"], ["--data.soucre", "--data.source STR"]),
        (["--samples.reward", "x"], ["Unrecognized options: --samples.reward"]),
        (["--loss.beta", "x"], ["--loss.beta: 'x' was given; it must be float"]),
        (["--steps", "1.5"], ["--steps: '1.5' was given; it must be int"]),
        (["--mesh.fsdp", "two"], ["--mesh.fsdp: 'two' was given; it must be int, >= 1 or None"]),
        (["--optimizer.kind", "adam"], ["'--optimizer.kind'", "'adam'", "'adamw', 'rmsprop'"]),
        (["--loss.beta", "-1"], ["loss.beta is -1.0; it must be > 0"]),
        (["--steps", "0"], ["steps is 0; it must be >= 1"]),
        (["--data.label-noise", "2"], ["data.label_noise is 2.0; it must be >= 0 and <= 1"]),
        (["--steps"], ["Missing value for argument '--steps'"]),
        (["stray"], ["Unrecognized options: stray"]),
    ],
)
def test_a_wrong_flag_is_refused_with_what_was_expected(file, capsys, arguments, messages):
    printed = refused(file, capsys, *arguments)
    for message in messages:
        assert message in printed


def test_the_command_line_begins_with_the_experiment_file(file):
    run, path = flags.from_command_line([str(file), "--seed", "3"], "train")
    assert (run.seed, path) == (3, file)


def test_help_without_a_file_gives_the_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.from_command_line(["--help"], "train")
    assert stopped.value.code == 0
    assert "usage: train EXPERIMENT.py [flags]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument must be an experiment file, and there is none"),
        (["--steps", "3"], "the first argument must be an experiment file, and it is '--steps'"),
        (["no_such_experiment.py"], "error: there is no experiment file 'no_such_experiment.py'"),
    ],
)
def test_a_command_line_without_experiment_file_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        flags.from_command_line(arguments, "train")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_experiment_file_that_fails_shows_the_line_that_failed(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("def experiment():\n    return 1 / 0  # here\n")
    with pytest.raises(SystemExit) as stopped:
        flags.from_command_line([str(path)], "train")
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "return 1 / 0  # here" in printed
    assert printed.splitlines()[-1].startswith(f"error: experiment() of {path} fails: ZeroDiv")


def test_json_has_functions_by_name_and_values_as_they_are(file):
    record = flags.to_json(flags.load(file), file)
    assert record["loss"] == {
        "function": "experiment.py:hinge",
        "beta": 0.1,
        "lam": 1.0,
        "sure": False,
    }
    assert record["samples"]["reward"] == "experiment.py:reward"
    assert record["evaluate_every"] is None
    assert json.loads(json.dumps(record)) == record


def test_a_function_of_a_module_goes_by_the_modules_name():
    run = config.Experiment(loss=config.Loss(library_loss), steps=1)
    record = flags.to_json(run)
    assert record["loss"]["function"] == f"{__name__}:library_loss"
    assert flags.from_json(record) == run


def library_loss(policy, reference, batch, *, beta=0.1):
    return policy, {}


def test_a_function_within_a_function_is_refused():
    def inner(policy, reference, batch):
        return policy, {}

    run = config.Experiment(loss=config.Loss(inner), steps=1)
    with pytest.raises(ValueError, match="inner cannot be found again by its name; define it at"):
        flags.to_json(run)


def without(record: dict, *names: str) -> dict:
    return {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: without(r, "steps", "seed"), "missing fields: steps, seed"),
        (lambda r: r | {"stepz": 1}, "unknown field stepz; did you mean 'steps'"),
        (lambda r: r | {"mesh": without(r["mesh"], "fsdp")}, "missing fields: mesh.fsdp"),
        (lambda r: r | {"mesh": r["mesh"] | {"fdsp": 1}}, "unknown field mesh.fdsp; did you mean"),
        (lambda r: r | {"mesh": 3}, "mesh is 3; it must be an object"),
        (lambda r: r | {"loss": without(r["loss"], "beta")}, "missing fields: loss.beta"),
        (lambda r: r | {"loss": without(r["loss"], "function")}, "loss.function is missing"),
        (lambda r: r | {"loss": r["loss"] | {"tau": 1.0}}, "no hyperparameter 'tau'"),
        (lambda r: r | {"loss": {"function": "no_such:dpo"}}, "'no_such:dpo' cannot be imported"),
        (lambda r: r | {"loss": {"function": f"{__name__}:los"}}, "there is no function"),
        (lambda r: r | {"loss": {"function": "experiment.py:f"}}, "needs the run's copy"),
        (lambda r: r | {"steps": 0}, "steps is 0; it must be >= 1"),
    ],
)
def test_json_with_wrong_fields_names_them(change, message):
    record = flags.to_json(config.Experiment(loss=config.Loss(library_loss), steps=1))
    with pytest.raises(ValueError, match=message):
        flags.from_json(change(record))


def test_a_run_folder_gives_the_run_back_after_its_experiment_file_is_gone(file, tmp_path):
    folder = str(tmp_path / "run")
    run = config.override(flags.load(file), {"loss.beta": 0.7, "evaluate_every": 5})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    flags.write_run(folder, run, file)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["experiment_file"] == {"path": str(file), "sha256": digest}
    file.unlink()
    again = flags.load_run(folder)
    assert config.flatten(again)["loss.beta"] == 0.7
    assert again.samples.reward is not None and again.samples.reward("", "") == 1.0
    assert flags.to_json(again, tmp_path / "run" / "experiment.py") == written["experiment"]


def test_a_run_in_memory_is_loaded_as_one_on_disk(file):
    run = flags.load(file)
    flags.write_run("memory://flags_test/run", run, file)
    assert flags.compare(flags.load_run("memory://flags_test/run"), run) == []


def test_the_environment_has_versions_commit_and_command(file, tmp_path):
    flags.write_run(str(tmp_path / "run"), flags.load(file), file)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.match(r"\d+\.\d+", record["versions"]["jax"])
    assert record["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}", record["git_commit"])
    assert record["command"] == shlex.join(sys.orig_argv)
    assert record["started"].endswith("+00:00")


def test_a_folder_without_config_is_no_run_folder(tmp_path):
    with pytest.raises(ValueError, match="is no run folder: it has no config.json"):
        flags.load_run(str(tmp_path))


def test_a_config_that_is_not_a_runs_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"config\.json is not the config\.json of a run: it has no field exp"
    ):
        flags.load_run(str(tmp_path))


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON: Expecting"):
        flags.load_run(str(tmp_path))


def test_a_run_folder_that_cannot_be_loaded_names_itself_and_the_field(file, tmp_path):
    flags.write_run(str(tmp_path / "run"), flags.load(file), file)
    config_file = tmp_path / "run" / "config.json"
    config_file.write_text(config_file.read_text().replace('"steps": 10', '"stepz": 10'))
    with pytest.raises(ValueError, match="run cannot be loaded: unknown field stepz"):
        flags.load_run(str(tmp_path / "run"))


def test_compare_lists_the_fields_that_differ(file):
    old = flags.load(file)
    new = config.override(old, {"optimizer.learning_rate": 5e-6, "data.form": "pairs"})
    assert flags.compare(old, new) == [
        "data.form: None in the folder, pairs now",
        "optimizer.learning_rate: 1e-06 in the folder, 5e-06 now",
    ]


def test_compare_leaves_out_where_a_run_lies_and_what_it_logs(file):
    old = flags.load(file)
    changes: dict[str, Any] = {"workdir": "elsewhere", "log.progress": False}
    assert flags.compare(old, config.override(old, changes)) == []


def test_compare_names_both_losses_and_the_hyperparameters_that_one_lacks(file):
    old = flags.load(file)
    new = old.replace(loss=config.Loss(library_loss, beta=0.1))
    assert flags.compare(old, new) == [
        "loss: hinge in the folder, library_loss now",
        "loss.lam: 1.0 in the folder, None now",
        "loss.sure: False in the folder, None now",
    ]


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("return 1.0", "return 2.0", 2),
        ("return 1.0", "return  1.0  # the same", 0),
        ("steps=10", "steps=5 + 5", 0),
        ('"seed": [0, 1]', '"seed": [0, 1, 2]', 0),
    ],
)
def test_compare_sees_that_the_code_of_the_file_has_changed(file, tmp_path, old, new, lines):
    flags.write_run(str(tmp_path / "run"), flags.load(file), file)
    changed = EXPERIMENT.replace(old, new)
    assert changed != EXPERIMENT
    file.write_text(changed)
    found = flags.compare(flags.load_run(str(tmp_path / "run")), flags.load(file))
    changes = [
        "loss: the code of hinge has changed since the folder was written",
        "samples.reward: the code of reward has changed since the folder was written",
    ]
    assert found == changes[:lines]
