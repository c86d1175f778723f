"""The experiment files: each is a run, its sweep fits it, and a new one needs no other edit."""

import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dpo_jax import config, contract, flags, inputs, losses, sweep, task, train
from tests import tiny

FILES = sorted(file for file in (tiny.ROOT / "experiments").glob("[a-z]*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

# completions and columns of each kind of example
GIVEN = {
    "pairs": (("chosen", "rejected"), ()),
    "triples": (("chosen", "rejected", "gold"), ()),
    "ranked": (("completion_0", "completion_1", "completion_2"), ()),
    "unpaired": (("completion", "mismatched"), ("desirable",)),
    "sft": (("completion",), ()),
}
# losses that no experiment file has, and why
UNUSED = {
    "bco_pair": "bco's paper has bco.py",
    "bco_joint": "bco's paper has bco.py",
    "bco_weighted": "needs rows with a density_ratio, which the built-in task does not make",
    "aot_unpaired": "aot's paper has aot.py",
    "ld_dpo_policy": "ld_dpo's paper has ld_dpo.py, in the reading of most",
}
# the loss at the first step, where policy and reference have the same weights
LN2 = math.log(2)
START = {
    **dict.fromkeys(("dpo", "hh", "tr_dpo", "dpo_norm", "dpop", "aot", "ld_dpo"), LN2),
    **dict.fromkeys(("f_dpo", "alpha_dpo", "bco"), LN2),
    # ((1-e) ln 2 - e ln 2) / (1-2e)
    "robust": LN2,
    # 1 / (2b), squared: b 1 and b 0.1
    "ipo": 0.25,
    "ipo_sum": 25.0,
    "hinge": 1.0,
    # ln (1/2) / 2 - ln (1-e) / 2, and the same with e, of e 1e-3
    "exo_pair": -LN2 - 0.5 * math.log(0.999 * 0.001),
    # ln 2 (1 + 1/2 + 1/2)
    "nca_pair": 2 * LN2,
    # twice the square of 1 / (2b), b 1e-3
    "sppo_hard": 500_000.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "apo_zero_unpaired": 0.5,
    "kto": 0.5,
    # half of each branch at z 0
    "discopop": 0.5 * LN2 + 0.5,
    # ln 3!
    "plackett_luce": math.log(6),
}


def test_there_are_experiments():
    assert len(FILES) > 30 and set(START) <= {file.stem for file in FILES}


@each_file
def test_an_experiment_is_a_run_and_every_point_of_its_sweep_too(file: Path):
    module = flags.load_module(file)
    experiment = flags.built(module, file)
    points = [p.experiment for p in sweep.points(experiment, module.sweep(), file, "runs")]
    assert len(set(points)) == len(points) >= 3
    assert {point.seed for point in points} == {0, 1, 2}
    for point in (experiment, *points):
        inputs.check_switches(point)
        task.check_read(point)
        assert flags.from_json(json.loads(json.dumps(flags.to_json(point, file))), file) == point


@each_file
def test_the_loss_of_an_experiment_keeps_its_contract(file: Path):
    experiment = flags.load(file)
    loss, has_reference = experiment.loss, experiment.reference.source is not None
    names, columns = GIVEN[experiment.data.examples]
    contract.check(loss.function, loss.hyperparameters, names, columns, has_reference)
    with pytest.raises(ValueError, match=r"reference\.source"):
        contract.check(loss.function, loss.hyperparameters, names, columns, not has_reference)


@each_file
def test_an_experiment_names_its_paper_command_hardware_and_what_to_expect(file: Path):
    header = file.read_text().split('"""')[1]
    assert "https://arxiv.org/abs/" in header
    assert f"python -m scripts.train experiments/{file.name} " in header
    assert "Hardware: " in header
    assert re.search(r"Expected: \S", header)


@each_file
def test_the_command_of_a_header_trains_that_file(file: Path):
    command = re.search(r"^python -m scripts\.train (.*)$", file.read_text(), re.MULTILINE)
    assert command is not None
    run, found = flags.from_command_line(command[1].split(), "python -m scripts.train")
    assert (found.name, run.workdir) == (file.name, f"runs/{file.stem}")
    assert run == flags.load(file).replace(workdir=run.workdir)


def all_losses() -> set[str]:
    """The names of the functions of losses.py that begin as a loss does."""
    functions = inspect.getmembers(losses, inspect.isfunction)
    begins = ["policy", "reference", "batch"]
    return {
        name
        for name, function in functions
        if function.__module__ == losses.__name__
        and list(inspect.signature(function).parameters)[:3] == begins
    }


def test_every_loss_has_an_experiment_or_a_reason():
    used = {flags.load(file).loss.function for file in FILES}
    named = {loss.__name__ for loss in used if loss.__module__ == losses.__name__}
    assert named | set(UNUSED) == all_losses()
    assert not named & set(UNUSED)


def test_the_four_methods_start_alike_and_differ_in_the_loss():
    runs = {
        name: flags.load(tiny.ROOT / "experiments" / f"{name}.py") for name in ("dpo", "ipo", "kto")
    }
    assert runs["ipo"].replace(loss=runs["dpo"].loss) == runs["dpo"]
    assert runs["kto"].data.examples == "unpaired"
    assert flags.load(tiny.ROOT / "experiments" / "orpo.py").reference.source is None


def rows_of(kind: str, folder: Path, into: Path) -> Path:
    """A folder of rows that give examples of a kind, made of the folder's pairs."""
    if kind not in ("triples", "ranked"):
        return folder
    for name in ("train.jsonl", "held_out.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        golds = [row["chosen"] for row in (*rows[1:], rows[0])]
        rows = [{"gold": gold, **row} for gold, row in zip(golds, rows, strict=True)]
        if kind == "ranked":
            parts = ("gold", "chosen", "rejected")
            rows = [{"prompt": r["prompt"], "completions": [r[p] for p in parts]} for r in rows]
        (into / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return into


@pytest.mark.slow
@each_file
def test_every_experiment_trains_two_steps_and_evaluates(file: Path, folder: Path, tmp_path: Path):
    experiment = flags.load(file)
    rows = rows_of(experiment.data.examples, folder, tmp_path)
    small = tiny.experiment(folder, tmp_path / "run")
    changes = {
        **{"steps": 2, "batch_size": 8, "evaluate_every": None, "samples.count": 0},
        **{"data.source": str(rows / "train.jsonl"), "data.form": None, "data.eos_token": None},
        **{"data.evaluation_source": str(rows / "held_out.jsonl"), "data.max_prompt_length": None},
        **{"data.tokenizer": small.data.tokenizer, "data.max_length": 256, "data.label_noise": 0.0},
        **{"model.source": "tiny", "mesh.fsdp": 8, "optimizer.warmup_steps": 0},
    }
    if experiment.reference.update_every is not None:
        changes["reference.update_every"] = 1
    run = config.override(experiment, changes)
    run = run.replace(workdir=small.workdir, log=small.log)
    task.run(run, file)
    before, first, last = tiny.metrics(tmp_path / "run")
    assert first["grad_norm"] > 0
    assert all(math.isfinite(line["eval/loss"]) for line in (before, last))
    assert last["eval/loss"] != before["eval/loss"]
    if file.stem in START:
        assert first["loss"] == pytest.approx(START[file.stem], rel=1e-4)
    assert flags.compare(flags.load_run(str(tmp_path / "run")), run) == []


def readme_loss() -> str:
    """The experiment file that the README shows."""
    found = re.search(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readmes_new_loss_runs_untouched_from_a_folder_of_its_own(folder: Path, tmp_path: Path):
    file = tmp_path / "squared_hinge.py"
    file.write_text(readme_loss())
    assert not (tiny.ROOT / "experiments" / file.name).exists()
    assert f"experiments/{file.name}" in readme_loss()
    experiment = flags.parse(flags.load(file), ["--loss.beta", "0.3"], "train")
    assert experiment.loss.hyperparameters == {"beta": 0.3}
    base = tiny.experiment(folder, tmp_path / "run", steps=2, evaluate_every=None)
    train.train(base.replace(loss=experiment.loss), file)
    # policy equals reference, but for the order in which two programs add up: relu(1 - 0)^2
    assert tiny.metrics(tmp_path / "run")[1]["loss"] == pytest.approx(1.0, rel=1e-4)
    loaded = flags.load_run(str(tmp_path / "run"))
    assert loaded.loss.function.__name__ == "squared_hinge"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["experiment"]["loss"] == {"function": "experiment.py:squared_hinge", "beta": 0.3}


# A user's file with a new loss, which begins as EXPERIMENT does.
EXPERIMENT = '''
"""A loss of my own."""

import jax
import jax.numpy as jnp

from dpo_jax import config, contract, losses
from experiments import dpo


def experiment():
    return dpo.experiment().replace(loss=config.Loss(mine))


def sweep():
    return config.grid({"loss.beta": [0.1, 0.2]})


def margin(policy, reference, beta):
    chosen, rejected = losses.log_ratios(policy, reference)
    return beta * (chosen - rejected)

'''

PLAIN = """
def mine(policy, reference, batch, *, beta: losses.Positive = 0.1):
    values = margin(policy, reference, beta)
    return jnp.exp(-values), {"mine/margin": values}
"""

# A baseline that follows the margin, and a reward that is measured from the likeliest tokens.
STATEFUL = """
def greedy(tokens):
    return tokens.logp - jnp.max(jax.nn.log_softmax(tokens.logits, axis=-1), axis=-1)


def no_margin():
    return {"baseline": jnp.zeros(()), "steps": jnp.zeros((), jnp.int32)}


@contract.declare(
    batch_statistics=True, policy={"greedy": greedy}, reference={"greedy": greedy}, state=no_margin
)
def mine(policy, reference, batch, state, *, beta: float = 0.1, decay: losses.Fraction = 0.5):
    def regret(name):
        return policy[name].statistics["greedy"] - reference[name].statistics["greedy"]

    values = beta * (regret("chosen") - regret("rejected"))
    steps = state["steps"] + 1
    mean = jax.lax.stop_gradient(losses.batch_mean(values, batch))
    baseline = decay * state["baseline"] + (1 - decay) * mean
    shown = {"mine/baseline": baseline, "mine/steps": steps, "mine/margin": mean}
    metrics = {name: jnp.full_like(values, value) for name, value in shown.items()}
    return losses.logistic(values - baseline), metrics, {"baseline": baseline, "steps": steps}
"""

# scripts.train, killed once step 5 is written
KILLED = """
import os, runpy, signal, sys
from dpo_jax import metrics
write = metrics.Writer.write
def dying(self, step, values):
    write(self, step, values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
metrics.Writer.write = dying
runpy.run_module("scripts.train", run_name="__main__", alter_sys=True)
"""


def write_file(tmp_path: Path, loss: str) -> Path:
    file = tmp_path / "my_loss.py"
    file.write_text(EXPERIMENT + loss)
    return file


def run_train(
    file: Path,
    folder: Path,
    workdir: Path,
    *more: str,
    program: Sequence[str] = ("-m", "scripts.train"),
) -> subprocess.CompletedProcess[str]:
    """What scripts.train does with a file, in a process of its own, with tiny model and data."""
    settings = {
        **{"steps": 8, "batch-size": 8, "evaluate-every": None, "checkpoint-every": 2},
        **{"samples.count": 0, "model.source": "tiny", "data.tokenizer": folder / "tokenizer"},
        **{"data.source": folder / "train.jsonl", "data.max-length": 256, "workdir": workdir},
        **{"data.evaluation-source": folder / "held_out.jsonl", "optimizer.warmup-steps": 0},
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.run(
        [sys.executable, *program, str(file), *arguments, *more],
        env=environment,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )


def without_clock(workdir: Path) -> list[Mapping]:
    lines = tiny.metrics(workdir)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.slow
def test_a_file_with_a_new_loss_trains_with_no_other_edit(folder: Path, tmp_path: Path):
    file, workdir = write_file(tmp_path, PLAIN), tmp_path / "run"
    done = run_train(file, folder, workdir, "--loss.beta", "0.3", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert (workdir / "DONE").exists()
    assert tiny.metrics(workdir)[1]["loss"] == pytest.approx(1.0, rel=1e-4)
    assert {"mine/margin", "eval/mine/margin"} <= set(tiny.metrics(workdir)[2])
    # from the run's own copy, whatever becomes of the file
    file.unlink()
    loaded = flags.load_run(str(workdir))
    assert (loaded.loss.function.__name__, loaded.loss.hyperparameters) == ("mine", {"beta": 0.3})


@pytest.mark.slow
def test_a_new_loss_with_a_statistic_and_a_state_goes_on_bit_for_bit(folder: Path, tmp_path: Path):
    file, killed, whole = write_file(tmp_path, STATEFUL), tmp_path / "killed", tmp_path / "whole"
    stopped = run_train(file, folder, killed, program=("-c", KILLED))
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    assert [line["step"] for line in tiny.metrics(killed)] == list(range(6))
    resumed, uninterrupted = run_train(file, folder, killed), run_train(file, folder, whole)
    assert (resumed.returncode, uninterrupted.returncode) == (0, 0), resumed.stderr
    assert re.search(r"going on from step [24]\b", resumed.stdout), resumed.stdout
    assert without_clock(killed) == without_clock(whole)
    lines = tiny.metrics(whole)[1:]
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert [line["mine/steps"] for line in lines] == list(range(1, 9))
    baseline = 0.0
    for line in lines:
        baseline = 0.5 * baseline + 0.5 * line["mine/margin"]
        assert line["mine/baseline"] == pytest.approx(baseline, rel=1e-4, abs=1e-6)
    assert abs(baseline) > 1e-3


BROKEN = {
    "an undeclared batch statistic": (
        """
def mine(policy, reference, batch, *, beta: float = 0.1):
    values = margin(policy, reference, beta)
    return values - losses.batch_mean(values, batch), {}
""",
        "in loss mine an example's loss changes with other examples: decorate it with "
        "@contract.declare(batch_statistics=True)",
    ),
    "a completion that pairs lack": (
        """
def mine(policy, reference, batch, *, beta: float = 0.1):
    return -policy["completion"].total, {}
""",
        "loss mine reads the completion 'completion', and the data give chosen, rejected: set "
        "--data.examples",
    ),
    "a mean": (
        """
def mine(policy, reference, batch, *, beta: float = 0.1):
    return jnp.mean(margin(policy, reference, beta)), {}
""",
        "loss mine returned losses of shape (); one number an example: [N]",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_new_loss_that_breaks_its_contract_is_refused(what: str, folder: Path, tmp_path: Path):
    source, message = BROKEN[what]
    refused = run_train(write_file(tmp_path, source), folder, tmp_path / "run")
    assert refused.returncode == 2
    assert f"error: {message}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()
