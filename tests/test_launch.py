"""Sweeps on TPU VMs, through `python -m scripts.launch` and a gcloud that plays Google."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_jax import config, finished, flags, launch, sweep

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["seed=0", "seed=1", "seed=2"]
# imports no jax, as an experiment with a loss of its own need not
EXPERIMENT = '''"""Three points of a loss that is never computed."""
from dpo_jax import config


def hinge(policy, reference, batch, *, beta: config.Positive = 0.1):
    """Never computed."""
    return policy, {}


def experiment():
    """The run."""
    return config.Experiment(loss=config.Loss(hinge), steps=10)


def sweep():
    """Seeds."""
    return config.grid({"seed": [0, 1, 2]})
'''
SLOW = pytest.mark.slow
WORKDIR = "gs://bucket/runs"
WHERE = ("--workdir", WORKDIR, "--tpu", "v5p-8", "--zone", "us-east5-a")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a small experiment, tracked by a git repository of its own."""
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("dpo_jax", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "experiments").mkdir()
    (folder / "experiments" / "__init__.py").touch()
    (folder / "experiments" / "tiny.py").write_text(EXPERIMENT)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm all"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def configs(project: Path) -> list[dict]:
    """What the runs of the points have in config.json."""
    file = project / "experiments" / "tiny.py"
    changes = flags.load_module(file).sweep()
    points = sweep.points(flags.load(file), changes, file, WORKDIR)
    return [{"experiment": flags.to_json(point.experiment, file)} for point in points]


class Cloud:
    """The folder of a fake Google, and the launchers that use it."""

    def __init__(self, folder: Path, project: Path, configs: list[dict]):
        self.folder, self.project, self.configs = folder, project, configs
        (folder / "bin").mkdir()
        gcloud = folder / "bin" / "gcloud"
        fake = ROOT / "tests" / "fake_gcloud.py"
        gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake} "$@"\n')
        gcloud.chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"FAKE_GCLOUD": str(folder), "PATH": path}
        self.plan()

    def plan(self, **scenario: Any) -> None:
        """Says what goes wrong."""
        usual = {"names": NAMES, "configs": self.configs}
        (self.folder / "scenario.json").write_text(json.dumps(usual | scenario))

    def start(self, *arguments: str, where: tuple[str, ...] = WHERE) -> subprocess.Popen:
        setup = f"mkdir -p .venv/bin && ln -sf {self.folder}/bin/gcloud .venv/bin/python"
        command = [sys.executable, "-m", "scripts.launch", "experiments/tiny.py", *where]
        command += ["--poll-seconds", "0.05", "--logs", str(self.folder / "logs")]
        return subprocess.Popen(
            [*command, "--setup", setup, *arguments],
            cwd=self.project,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def launch(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and what was printed."""
        process = self.start(*arguments)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def calls(self, *words: str) -> list[list[str]]:
        """The calls that have these words among their first five."""
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if set(words) <= set(call[:5])]

    def steps(self) -> list[str]:
        """By point, which steps were computed, in order; a finished one ends in '.'."""
        found = []
        for name in NAMES:
            folder = self.folder / "bucket" / "bucket" / "runs" / "tiny" / name
            file = folder / "steps"
            steps = "".join(file.read_text().split()) if file.exists() else ""
            found.append(steps + "." * (folder / "DONE").exists())
        return found

    def left(self) -> list[str]:
        """What is left of resources and locks."""
        locks = [str(path) for path in self.folder.glob("bucket/**/LAUNCHER")]
        file = self.folder / "state.json"
        return locks + list(json.loads(file.read_text())["resources"] if file.exists() else ())


@pytest.fixture
def cloud(tmp_path: Path, project: Path, configs: list[dict]) -> Cloud:
    return Cloud(tmp_path, project, configs)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(600):
        if happened():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("it has not happened within 30 s")


def test_three_points_run_on_two_resources_which_are_gone_in_the_end(cloud):
    code, printed = cloud.launch("--resources", "2")
    assert code == 0, printed
    assert cloud.steps() == ["012.", "012.", "012."]
    assert len({call[4] for call in cloud.calls("create")}) == len(cloud.calls("create")) == 2
    assert {call[4] for call in cloud.calls("delete")} == {c[4] for c in cloud.calls("create")}
    assert cloud.left() == []
    assert printed.splitlines()[-1] == "3 of 3 done"
    log = (cloud.folder / "logs" / "point-2-try-1.log").read_text()
    assert "[0-w-0] point 2 step 2 by dpo-jax-tiny-" in log

    code, printed = cloud.launch("--resources", "2")
    assert (code, len(cloud.calls("create"))) == (0, 2)
    assert "points: 3, of which 0 are to be run: all have finished" in printed


def test_a_finished_point_of_another_config_is_refused_before_anything_is_asked_for(cloud):
    assert cloud.launch("--index", "1")[0] == 0
    calls = len(cloud.calls("compute"))
    code, printed = cloud.launch("--steps", "20")
    folder = f"{WORKDIR}/tiny/seed=1"
    assert code == 2
    assert (
        f"{folder} holds a finished run of another config: steps: 10 in the folder, 20" in printed
    )
    assert "seed=0" not in printed and "give another --workdir, or remove" in printed
    (cloud.folder / "bucket" / "bucket" / "runs" / "tiny" / "seed=1" / "config.json").unlink()
    code, printed = cloud.launch()
    assert code == 2 and f"{folder} is no run folder: it has no config.json" in printed
    assert len(cloud.calls("compute")) == calls and cloud.left() == []


def test_a_finished_run_of_other_code_of_the_loss_is_another_run(project, configs, tmp_path):
    file = project / "experiments" / "tiny.py"
    point = sweep.points(flags.load(file), [{"seed": 0}], file, WORKDIR)[0]
    (tmp_path / "config.json").write_text(json.dumps(configs[0]))
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    assert finished.another_run(point, tmp_path) is None
    (tmp_path / "experiment.py").write_text(
        EXPERIMENT.replace("return policy", "return 2 * policy")
    )
    reason = finished.another_run(point, tmp_path)
    assert reason is not None and "the code of hinge has changed" in reason


def test_folders_that_are_sent_are_the_same_on_a_worker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "a").mkdir(parents=True)
    given = config.override(
        flags.load(ROOT / "experiments" / "dpo.py"),
        {"model.source": "models/a", "reference.source": "models/a"},
    )
    there = config.override(
        given,
        {"model.source": "/w/dpo_jax/models/a", "reference.source": "/w/dpo_jax/x/models/a"},
    )
    found = finished.as_here(there, given)
    assert found.model.source == str(tmp_path / "models" / "a")
    assert found.reference.source == "/w/dpo_jax/x/models/a"
    in_a_bucket = config.override(given, {"model.source": "gs://b/dpo_jax/models/a"})
    assert finished.as_here(in_a_bucket, given).model.source == "gs://b/dpo_jax/models/a"


def test_preempted_points_go_on_in_their_folders_on_a_new_resource(cloud):
    during = {"point-0-try-1": "SUSPENDING SUSPENDED", "point-1-try-1": "missing"}
    cloud.plan(during=during)
    code, printed = cloud.launch("--resources", "2", "--spot")
    assert code == 0, printed
    assert cloud.steps() == ["012.", "012.", "012."]
    assert len(cloud.calls("create")) == 4 and cloud.left() == []
    assert all("--spot" in call for call in cloud.calls("create"))
    assert (cloud.folder / "logs" / "point-0-try-2.log").exists()
    assert not (cloud.folder / "logs" / "point-2-try-2.log").exists()


def test_a_point_runs_on_several_slices_together_and_goes_on_after_one_is_preempted(cloud):
    cloud.plan(during={"point-0-try-1": "last node"})
    code, printed = cloud.launch("--slices", "2", "--index", "0")
    assert code == 0, printed
    assert cloud.steps()[0] == "012." and cloud.left() == []
    created = cloud.calls("create")
    assert len(created) == 2
    name = created[0][4]
    assert all({"--node-count=2", f"--node-prefix={name}"} <= {*call} for call in created)
    assert not any("--node-id" in word for call in created for word in call)
    assert f"lost (1 of at most 4): {name}-1 is PREEMPTED" in printed
    reached = cloud.calls("queued-resources", "ssh") + cloud.calls("queued-resources", "scp")
    assert all({"--worker=all", "--node=all"} <= {*call} for call in reached)
    # the code and the first try, and both again
    assert len(reached) == 6 and cloud.calls("tpu-vm", "ssh") == []
    assert (cloud.folder / "logs" / "point-0-try-2.log").exists()


@pytest.mark.slow
def test_a_point_waits_where_gcloud_does_not_tell_what_has_become_of_its_slices(cloud):
    cloud.plan(errors={"0": "row 7 has no chosen"}, node_error="PERMISSION_DENIED: ask for a role")
    code, printed = cloud.launch("--slices", "2", "--index", "0")
    assert code == 1 and cloud.left() == []
    assert "given up: " in printed
    assert "not finished: 0 seed=0\n      ERROR: (gcloud.compute.tpus.tpu-vm.describe)" in printed


@pytest.mark.slow
def test_a_users_error_on_several_slices_is_not_tried_again(cloud):
    cloud.plan(errors={"0": "row 7 has no chosen"})
    code, printed = cloud.launch("--slices", "2", "--index", "0")
    assert code == 1 and "row 7 has no chosen" in printed
    assert len(cloud.calls("create")) == 1 and cloud.left() == []
    # asked twice, since a preemption may be told of a moment later
    assert len(cloud.calls("tpu-vm", "describe")) == 4


@pytest.mark.slow
def test_a_point_that_is_preempted_too_often_is_given_up_and_others_run(cloud):
    cloud.plan(during={"point-0-try-1": "SUSPENDED", "point-0-try-2": "FAILED"})
    code, printed = cloud.launch("--retries", "1", "--resources", "2")
    assert code == 1
    assert cloud.steps() == ["0", "012.", "012."] and cloud.left() == []
    assert "failed: 0 seed=0\n      given up after 2 tries: FAILED" in printed


def test_capacity_that_is_never_granted_is_waited_for_no_longer_than_said(cloud):
    cloud.plan(states=[["WAITING_FOR_RESOURCES"]] * 9)
    code, printed = cloud.launch("--wait-hours", "0.0001")
    assert code == 1
    assert "no capacity within 0.0001 hours" in printed and "0 of 3 done" in printed
    assert len(cloud.calls("create")) == 1 and cloud.calls("ssh") == [] and cloud.left() == []


@pytest.mark.parametrize(("failures", "done"), [(2, True), pytest.param(99, False, marks=SLOW)])
def test_ssh_that_fails_is_tried_again_a_number_of_times(cloud, failures, done):
    cloud.plan(ssh_failures=failures)
    code, printed = cloud.launch("--ssh-retries", "2", "--index", "1")
    assert code == (0 if done else 1), printed
    assert cloud.steps() == ["", "012." if done else "", ""]
    assert len(cloud.calls("ssh")) == (4 if done else 3)
    assert ("ssh has failed 3 times" in printed) is not done
    assert len(cloud.calls("create")) == 1 and cloud.left() == []


@pytest.mark.slow
def test_a_lost_connection_is_taken_up_again_and_the_point_is_run_once(cloud):
    cloud.plan(during={"point-0-try-1": "disconnected"})
    code, printed = cloud.launch("--index", "0")
    assert code == 0, printed
    assert cloud.steps()[0] == "012." and len(cloud.calls("create")) == 1
    assert "ssh fails (1 of at most 6)" in printed


def test_a_users_error_is_not_tried_again_and_its_reason_is_shown(cloud):
    cloud.plan(errors={"1": "row 7 has no chosen"})
    code, printed = cloud.launch()
    assert code == 1
    assert cloud.steps() == ["012.", "", "012."] and cloud.left() == []
    assert len(cloud.calls("create")) == 1
    assert len([c for c in cloud.calls("ssh") if "point-1-" in str(c)]) == 1
    table = printed[printed.rindex("2 of 3 done") :]
    assert "failed: 1 seed=1\n      exit code 1: [0-w-0] ValueError: row 7 has no chosen" in table


def test_a_signal_while_a_resource_is_being_deleted_lets_that_come_to_its_end(cloud):
    cloud.plan(errors={"0": "no"}, delete_seconds=1)
    first = cloud.start("--index", "0")
    wait_until(lambda: bool(cloud.calls("delete")), first)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=30)
    assert first.returncode == 128 + signal.SIGINT, printed
    assert cloud.left() == [] and len(cloud.calls("delete")) == 1, printed


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_a_second_launcher_is_refused_and_a_signal_deletes_the_resources(cloud, number):
    cloud.plan(endless=[0])
    first = cloud.start("--resources", "2")
    wait_until((cloud.folder / "running").exists, first)
    assert len(cloud.left()) == 3
    code, printed = cloud.launch()
    assert code == 2
    assert "another launcher runs this sweep" in printed
    assert f'"process": {first.pid}' in printed and "somebody@example.com" in printed
    first.send_signal(number)
    printed, _ = first.communicate(timeout=30)
    assert first.returncode == 128 + number, printed
    assert cloud.left() == []
    assert "not finished: 0 seed=0" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_what_a_dead_launcher_has_left_is_refused_and_then_taken_over(cloud):
    cloud.plan(endless=[0])
    dead = cloud.start("--index", "0")
    wait_until((cloud.folder / "running").exists, dead)
    dead.kill()
    dead.communicate()
    assert len(cloud.left()) == 2
    cloud.plan()
    assert cloud.launch("--index", "0")[0] == 2
    code, printed = cloud.launch("--index", "0", "--take-over")
    assert code == 0, printed
    assert cloud.left() == [] and cloud.steps()[0] == "012."


@pytest.mark.slow
def test_a_resource_of_another_program_is_left_alone(cloud):
    code, printed = cloud.launch("--dry-run")
    name = re.findall(r"create (\S+)", printed)[0]
    (cloud.folder / "state.json").write_text(json.dumps({"resources": {name: ["ACTIVE"]}}))
    code, printed = cloud.launch()
    assert code == 1 and "exists in us-east5-a already" in printed
    assert cloud.left() == [name] and cloud.calls("delete") == []


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ({"account": ""}, "gcloud is not logged in: run 'gcloud auth login'"),
        ({"create_error": "RESOURCE_EXHAUSTED: Quota limit exceeded"}, "Quota limit exceeded (a"),
        pytest.param(
            {"create_error": "PERMISSION_DENIED: no"}, "PERMISSION_DENIED: no", marks=SLOW
        ),
        pytest.param(
            {"states": [["FAILED"]], "message": "Quota exceeded"},
            "Quota exceeded (a project's",
            marks=SLOW,
        ),
    ],
)
def test_what_no_retry_helps_with_is_not_tried_again(cloud, scenario, message):
    cloud.plan(**scenario)
    code, printed = cloud.launch("--index", "0")
    assert code == (2 if "account" in scenario else 1)
    assert message in printed and "Traceback" not in printed
    assert len(cloud.calls("create")) == (0 if "account" in scenario else 1)
    assert cloud.left() == [] and cloud.steps()[0] == ""


def test_a_machine_without_gcloud_is_told_what_to_install(cloud):
    (cloud.folder / "bin" / "gcloud").unlink()
    git = shutil.which("git")
    assert git is not None
    (cloud.folder / "bin" / "git").symlink_to(git)
    cloud.environment["PATH"] = str(cloud.folder / "bin")
    code, printed = cloud.launch()
    assert code == 2 and "error: there is no gcloud on PATH: install it" in printed


@pytest.mark.slow
@pytest.mark.parametrize("failures", [2, 99])
def test_a_resource_that_cannot_be_deleted_is_tried_again_and_named(cloud, failures):
    cloud.plan(delete_failures=failures)
    code, printed = cloud.launch("--index", "0")
    assert cloud.steps()[0] == "012."
    if failures == 2:
        assert (code, cloud.left()) == (0, [])
        return
    assert code == 1
    name = cloud.left()[0]
    command = f"gcloud compute tpus queued-resources delete {name} --force --zone=us-east5-a"
    assert f"NOT DELETED, and it costs: {command}" in printed


@pytest.mark.slow
def test_shards_run_their_points_in_one_process_each(cloud):
    code, printed = cloud.launch("--resources", "2", "--by-shard")
    assert code == 0, printed
    assert cloud.steps() == ["012."] * 3
    jobs = re.findall(r"attach.sh (\S+) \.venv", str(cloud.calls("ssh")))
    assert sorted(jobs) == ["shard-0-of-2-try-1", "shard-1-of-2-try-1"]


@pytest.mark.slow
def test_a_dry_run_prints_what_a_launch_runs_and_runs_nothing(cloud):
    code, printed = cloud.launch("--dry-run", "--steps", "7", "--env", "NOTE=it's 1")
    assert code == 0 and cloud.calls() == []
    dry = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud compute")]
    assert cloud.launch("--steps", "7", "--env", "NOTE=it's 1")[0] == 0
    real = [["gcloud", *call] for call in cloud.calls("compute")]
    # a resource is asked for its state until it is active
    assert dry == [call for n, call in enumerate(real) if call not in real[:n]]
    point = shlex.split(next(str(c[7]) for c in dry if "ssh" in c and "point-2" in str(c)))
    assert point[point.index("env") + 1] == "NOTE=it's 1"
    ran = sweep.from_command_line(
        [str(cloud.project / "experiments" / "tiny.py"), *point[point.index("--workdir") :]], ""
    )
    assert [(p.name, p.experiment.steps) for p in ran.points] == [("seed=2", 7)]


def test_a_dry_run_and_its_plan_import_no_jax(project):
    arguments = ["experiments/tiny.py", *WHERE, "--dry-run", "--price-per-chip-hour", "4.2"]
    arguments += ["--hours-per-point", "1.5", "--resources", "2"]
    program = (
        "import runpy, sys\n"
        "try: runpy.run_module('scripts.launch', run_name='__main__')\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = done.stdout.partition("#")[0]
    assert "resources: 2 x v5p:2x2x1 (4 chips, accelerator type v5p-8), on demand" in plan
    assert "/tiny/POINT/config.json" in done.stdout
    assert "3 points x 1.5 hours x 4 chips = 18 chip-hours = 75.60 USD, in 3 hours" in plan


def test_the_cost_of_several_slices_is_that_of_all_their_chips(capsys):
    experiment = str(ROOT / "experiments" / "dpo.py")
    arguments = [*WHERE, "--slices", "2", "--dry-run", "--hours-per-point", "2", "--index", "0"]
    assert launch.main([experiment, *arguments, "--price-per-chip-hour", "4.2"], "launch") == 0
    printed = capsys.readouterr().out
    assert (
        "resources: 1 x 2 slices of v5p:2x2x1 (4 chips, accelerator type v5p-8 each), 8 chips in "
        "all, on demand"
    ) in printed
    assert "1 points x 2 hours x 8 chips = 16 chip-hours = 67.20 USD" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tpu", "v5p-8", "--zone", "z", "--workdir", "runs"], "it must be on gs://"),
        (["--tpu", "v5p-8", "--workdir", WORKDIR], "--zone is missing"),
        (["--workdir", WORKDIR], "say where: --tpu TYPE --zone ZONE, or --slurm"),
        ([*WHERE, "--tpu", "v5p-7"], "no slice has 7"),
        ([*WHERE, "--tpu", "tpu7x-8"], "only through Google Kubernetes Engine"),
        ([*WHERE, "--resources", "0"], "'0' was given; it must be a whole number > 0"),
        ([*WHERE, "--slices", "0"], "'0' was given; it must be a whole number > 0"),
        (["--workdir", WORKDIR, "--slurm", "f", "--slices", "2"], "--slices is read by --tpu only"),
        ([*WHERE, "--retries", "-1"], "'-1' was given; it must be a whole number >= 0"),
        ([*WHERE, "--wait-hours", "nan"], "'nan' was given; it must be a number > 0"),
        ([*WHERE, "--env", "A"], "'A' was given; it must be NAME=VALUE"),
        ([*WHERE, "--index", "0", "--by-shard", "--dry-run"], "leave out --index and --shard"),
        ([*WHERE, "--ref", "no-such-ref", "--dry-run"], "the code is taken from git"),
        ([*WHERE, "--data.source", "/etc/hostname"], "not in what is sent: copy it to gs://"),
        ([*WHERE, "--gpus", "4"], "--gpus is read by --slurm and --kubernetes only, and --tpu"),
        (["--workdir", WORKDIR, "--slurm", "f", "--zone", "z"], "--zone is read by --tpu only"),
        ([*WHERE[2:]], "--workdir ROOT is missing"),
        ([*WHERE, "--list"], "--list is a flag of scripts.sweep"),
        ([*WHERE, "--seed", "1"], "--seed is set for all points, and sweep()"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_asked_for(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        launch.main([str(ROOT / "experiments" / "dpo.py"), *arguments], "launch")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_experiment_that_git_does_not_track_is_refused(tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(EXPERIMENT)
    with pytest.raises(SystemExit):
        launch.main([str(file), *WHERE, "--dry-run"], "launch")
    assert "tiny.py is not in what is sent, the files that git tracks" in capsys.readouterr().err


def readme_commands() -> list[str]:
    """The launches of the README's section on TPU pods, a line each."""
    section = (ROOT / "README.md").read_text().partition("## On a TPU pod")[2].partition("\n## ")[0]
    text = section.replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if "scripts.launch " in line]


@pytest.mark.parametrize("command", readme_commands())
def test_every_launch_in_the_readme_is_one(command, capsys):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "scripts.launch"]
    again = [] if "--dry-run" in words else ["--dry-run"]
    assert launch.main([str(ROOT / words[3]), *words[4:], *again], "launch") == 0
    assert capsys.readouterr().out.count("scripts.sweep") >= 1


def test_the_readme_has_launches_on_tpus_and_clusters():
    flags = " ".join(readme_commands())
    assert all(flag in flags for flag in ("--tpu", "--slurm", "--kubernetes", "--skypilot"))


def attached(home: Path, *arguments: str, timeout: float = 30) -> tuple[int, str]:
    script = ROOT / "scripts" / "attach.sh"
    environment = os.environ | {"HOME": str(home), "HOSTNAME": "t1v-n-1234-w-3"}
    command = ["timeout", str(timeout), "bash", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_an_attached_command_runs_once_and_gives_its_output_and_exit_code_again(tmp_path):
    job = ("job", "bash", "-c", "echo 'a  b' >>ran; cat ran; exit 3")
    for _ in range(2):
        script = ("job", "bash", "-c", f"cd {tmp_path}; {job[3]}")
        assert attached(tmp_path, *script) == (3, "[1234-w-3] a  b\n")
    assert attached(tmp_path, "other", "bash", "-c", "exit 255")[0] == 254


def test_an_attached_command_outlives_its_connection_and_a_killed_one_is_known(tmp_path):
    assert attached(tmp_path, "job", "bash", "-c", "sleep 0.7; echo end", timeout=0.3)[0] == 124
    assert attached(tmp_path, "job", "none") == (0, "[1234-w-3] end\n")
    assert attached(tmp_path, "killed", "bash", "-c", "kill -9 $PPID")[0] == 143


def job_file(tmp_path: Path, *arguments: str) -> str:
    file = tmp_path / "file"
    experiment = str(ROOT / "experiments" / "orpo.py")
    line = [a.replace("FILE", str(file)) for a in arguments]
    assert launch.main([experiment, "--workdir", "gs://b/r", *line], "launch") == 0
    return file.read_text()


def test_a_slurm_file_is_an_array_of_points_that_is_queued_again_after_sigterm(tmp_path):
    text = job_file(tmp_path, "--slurm", "FILE", "--shard", "1/9", "--nodes", "2", "--steps", "5")
    assert "#SBATCH --array=1,10%1\n" in text and "#SBATCH --nodes=2\n" in text
    (tmp_path / "bin").mkdir()
    for name, body in {"srun": 'echo "$@"; exit $CODE', "scontrol": 'echo "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for code in (0, 1, 143):
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CODE": str(code)}
        environment |= {"SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_JOB_ID": "77"}
        done = subprocess.run(
            ["bash", str(tmp_path / "file")], env=environment, capture_output=True, text=True
        )
        run = "-m scripts.sweep experiments/orpo.py --workdir gs://b/r --index 10 --steps 5\n"
        assert done.returncode == code
        assert done.stdout.partition(".venv/bin/python ")[2].startswith(run)
        assert ("requeue 77_10" in done.stdout) is (code == 143)


def test_a_kubernetes_file_is_an_indexed_job_with_a_pod_for_each_point(tmp_path):
    yaml: Any = pytest.importorskip("yaml")
    text = job_file(tmp_path, "--kubernetes", "FILE", "--shard", "1/9", "--image", "g/i:1")
    spec = yaml.safe_load(text)["spec"]
    assert (spec["completions"], spec["completionMode"]) == (2, "Indexed")
    container = spec["template"]["spec"]["containers"][0]
    assert container["image"] == "g/i:1"
    program, flag, script = container["command"]
    shown = script.replace("exec ", "echo ")
    done = subprocess.run(
        [program, flag, shown], env={"JOB_COMPLETION_INDEX": "1"}, capture_output=True, text=True
    )
    assert done.stdout.endswith("experiments/orpo.py --workdir gs://b/r --index 10\n")


def test_a_skypilot_file_runs_the_point_that_its_variable_names(tmp_path):
    yaml: Any = pytest.importorskip("yaml")
    arguments = ("--skypilot", "FILE", "--index", "4", "--accelerators", "tpu-v5p-8", "--spot")
    task = yaml.safe_load(job_file(tmp_path, *arguments))
    assert task["resources"] == {"accelerators": "tpu-v5p-8", "use_spot": True}
    assert task["setup"] == "bash scripts/setup_tpu_vm.sh" and task["envs"] == {"POINT": "4"}
    assert task["run"].endswith('--index "$POINT"')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kubernetes", "f"], "--image is missing"),
        (["--skypilot", "f"], "--accelerators is missing"),
    ],
)
def test_a_job_file_that_lacks_something_is_not_written(capsys, arguments, message):
    with pytest.raises(SystemExit):
        launch.main([str(ROOT / "experiments/orpo.py"), "--workdir", WORKDIR, *arguments], "launch")
    assert message in capsys.readouterr().err
