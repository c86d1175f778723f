"""Several processes make one run: on this machine, with CPU devices and collectives over loopback.

What they are held against is one process whose mesh is the same.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dpo_jax import addresses, flags, train
from tests import tiny

# an experiment file, with what a test lets happen to one process as it comes to a step
FILE = """
import os, signal, time
from pathlib import Path
import jax
from dpo_jax import metrics
from dpo_jax.data import ladder
from tests import tiny

ladder.MOST_SHAPES = 1
happens, process, step = os.environ.get("HAPPENS", "nothing 0 0").split()


def watched(write):
    def watching(self, at, values):
        write(self, at, values)
        if at == int(step) and jax.process_index() == int(process):
            if happens == "raises":
                raise OSError("the disk is full")
            if happens != "nothing":
                os.kill(os.getpid(), getattr(signal, happens))
    return watching


for kind in (metrics.Writer, metrics.Unwritten):
    kind.write = watched(kind.write)


def experiment():
    changes = {{
        "mesh.data": 2, "mesh.fsdp": 2, "steps": 4, "evaluate_every": None,
        "checkpoint_every": 2, "checkpoint.keep": 4, **{changes},
    }}
    return tiny.experiment(Path("{folder}"), Path("unset"), **changes)


def sweep():
    # what the second one gives is above the length of the run
    return [{{"optimizer.learning_rate": 0.01}}, {{"optimizer.warmup_steps": 2}}]
"""


@dataclasses.dataclass
class Started:
    """Processes of one run, the first one first."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, seconds: float = 600) -> list[int]:
        """Their exit codes."""
        until = time.monotonic() + seconds
        try:
            return [one.wait(until - time.monotonic()) for one in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for one in self.processes:
            one.kill()
            one.wait()

    def log(self, number: int) -> str:
        return self.logs[number].read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    file: Path, workdir: Path, count: int, happens: str = "nothing 0 0", program: str = "train"
) -> Started:
    """Starts `count` processes of a program, with four CPU devices together."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // count),
        "HAPPENS": happens,
        "DPO_JAX_CACHE": str(workdir.parent / f"cache-{workdir.name}"),
    }
    base = [sys.executable, "-m", f"scripts.{program}", str(file), "--workdir", str(workdir)]
    coordinator = f"127.0.0.1:{free_port()}"
    started = Started([], [])
    for number in range(count):
        own = ["--processes.coordinator", coordinator, "--processes.count", str(count)]
        own += ["--processes.id", str(number)]
        started.logs.append(workdir.parent / f"{workdir.name}-{number}.log")
        with started.logs[-1].open("w") as log:
            one = subprocess.Popen(
                [*base, *(own if count > 1 else [])],
                cwd=tiny.ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.processes.append(one)
    return started


def run(file: Path, workdir: Path, count: int, **options: str) -> Started:
    """The same, ended well."""
    started = start(file, workdir, count, **options)
    codes = started.wait()
    assert codes == [0] * count, "\n".join(started.log(number)[-3000:] for number in range(count))
    return started


def lines(workdir: Path) -> list[dict]:
    found = tiny.metrics(workdir)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def check_equal(one: Path, other: Path) -> None:
    """Checks that two runs have the same lines, and samples of the same text.

    Processes add up numbers of theirs in another order than one does.
    """
    for a, b in zip(lines(one), lines(other), strict=True):
        if b["step"] < 2:
            # of a policy that is its reference still rounding alone decides which reward is higher
            a, b = ({k: v for k, v in c.items() if "accuracies" not in k} for c in (a, b))
        assert a == pytest.approx(b, rel=1e-5, abs=2e-5)
    for file in (one / "samples").glob("*"):
        texts = [
            [json.loads(line)["completion"] for line in path.read_text().splitlines()]
            for path in (file, other / "samples" / file.name)
        ]
        assert texts[0] == texts[1] and len(texts[0]) == 4


def write(folder: Path, file: Path, changes: dict) -> Path:
    file.write_text(FILE.format(folder=folder, changes=changes))
    return file


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has as many devices as those that a test starts have together."""
    monkeypatch.setenv("HAPPENS", "nothing 0 0")
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: devices)


def test_two_processes_stopped_by_sigterm_and_gone_on_with_by_one_make_the_run_of_one(
    folder: Path, tmp_path: Path, four_devices: None
):
    file = write(folder, tmp_path / "plain.py", {"data.evaluation_source": None})
    two = start(file, tmp_path / "two", 2, happens="SIGTERM 1 1")
    train.train(flags.load(file).replace(workdir=str(tmp_path / "one")), file)
    assert two.wait() == [143, 143], two.log(0)[-3000:] + two.log(1)[-3000:]
    assert "SIGTERM: saved step 3" in two.log(0) and "SIGTERM: saved" not in two.log(1)
    assert [line["step"] for line in lines(tmp_path / "two")] == [0, 1, 2, 3]
    saved = {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()}
    assert saved == {"2", "3"}
    train.train(flags.load(file).replace(workdir=str(tmp_path / "two")), file)
    check_equal(tmp_path / "two", tmp_path / "one")


ALL = {"reference.cached": True, "samples.count": 4, "samples.max_tokens": 4}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["sequence 4", "sequence 2 tensor 2", "data 2 sequence 2"])
def test_rows_and_weights_are_cut_over_processes_and_the_run_is_that_of_one(
    mesh: str, folder: Path, tmp_path: Path, four_devices: None
):
    words = mesh.split()
    axes = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    changes = {"mesh.data": 1, "mesh.fsdp": 1} | {f"mesh.{axis}": n for axis, n in axes.items()}
    file = write(folder, tmp_path / "cut.py", {**changes, **ALL})
    train.train(flags.load(file).replace(workdir=str(tmp_path / "one")), file)
    run(file, tmp_path / "four", 4)
    check_equal(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_two_and_four_processes_evaluate_sample_and_score_the_reference_as_one_does(
    folder: Path, tmp_path: Path, four_devices: None
):
    file = write(folder, tmp_path / "all.py", ALL)
    train.train(flags.load(file).replace(workdir=str(tmp_path / "one")), file)
    for count in (2, 4):
        run(file, tmp_path / str(count), count)
        check_equal(tmp_path / str(count), tmp_path / "one")


@pytest.mark.slow
def test_four_processes_go_on_with_the_run_of_two_and_one_with_that_of_four(
    folder: Path, tmp_path: Path, four_devices: None
):
    file = write(folder, tmp_path / "resumed.py", {"steps": 8, "data.evaluation_source": None})
    train.train(flags.load(file).replace(workdir=str(tmp_path / "whole")), file)
    parts = tmp_path / "parts"
    assert start(file, parts, 2, happens="SIGTERM 0 1").wait() == [143] * 2
    assert start(file, parts, 4, happens="SIGTERM 3 4").wait() == [143] * 4
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == ["2", "3", "4", "6"]
    train.train(flags.load(file).replace(workdir=str(parts)), file)
    check_equal(parts, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "number", "reason"),
    [
        # another process dies, the first one dies, and one ends with an error of its own
        ("SIGKILL 1 1", 0, "another task died"),
        ("SIGKILL 0 1", 1, "another task died"),
        ("raises 1 1", 0, "another task died"),
        # it is there and does nothing, as one whose machine is gone
        ("SIGSTOP 1 1", 0, "heartbeat"),
    ],
)
def test_where_one_process_dies_the_others_end_within_a_minute_with_the_reason(
    happens: str, number: int, reason: str, folder: Path, tmp_path: Path
):
    file = write(folder, tmp_path / "dying.py", {"data.evaluation_source": None, "steps": 50})
    two = start(file, tmp_path / "run", 2, happens=happens)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 200
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert time.monotonic() < until, two.log(0)
            time.sleep(0.5)
        assert two.processes[number].wait(60) != 0
        assert reason in two.log(number)
    finally:
        two.kill()


@pytest.mark.slow
def test_two_processes_run_a_sweep_and_go_on_where_a_point_fails_on_both(
    folder: Path, tmp_path: Path
):
    changes = {"data.evaluation_source": None, "steps": 2}
    file = write(folder, tmp_path / "swept.py", changes)
    two = start(file, tmp_path / "root", 2, program="sweep")
    assert two.wait() == [1, 1]
    assert "1 of 2 points finished" in two.log(0)
    assert (tmp_path / "root" / "swept" / "optimizer.learning_rate=0.01" / "DONE").exists()


def test_an_address_is_taken_from_flags_before_the_environment():
    environment = {"DPO_JAX_COORDINATOR": "a:1", "DPO_JAX_PROCESS_COUNT": "4"}
    arguments = ["file.py", "--processes.id", "2", "--processes.count=3", "--steps", "5"]
    found, rest = addresses.parse(arguments, environment)
    assert found == addresses.Address("a:1", 3, 2)
    assert rest == ["file.py", "--steps", "5"]
    assert addresses.parse(["file.py"], {})[0] == addresses.Address()
    assert addresses.parse(["--processes.count", "1"], {})[0] == addresses.Address(count=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes.count 2", r"give --processes\.coordinator .*COORDINATOR\) and .*id"),
        ("--processes.coordinator a:1 --processes.count 2 --processes.id 2", "id is 2; it must"),
        ("--processes.coordinator a --processes.count 2 --processes.id 1", "'a'; it must be HOST"),
        ("--processes.count two", "invalid int value: 'two'"),
    ],
)
def test_an_address_that_does_not_say_enough_is_refused(arguments: str, message: str):
    with pytest.raises(ValueError, match=message):
        addresses.parse(arguments.split(), {})
