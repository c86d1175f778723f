"""A gcloud that plays Google: states of queued resources, ssh that runs here, a bucket's folder.

Everything lies in the folder $FAKE_GCLOUD. scenario.json says what goes wrong; state.json is what
is there; calls.jsonl has every call. A node's VM is a folder, which goes with it; of a node of
several, that is number 0, 1, ... of its resource.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(os.environ["FAKE_GCLOUD"])
SCENARIO = json.loads((ROOT / "scenario.json").read_text())
USUAL = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


class State:
    """state.json, which one call at a time reads and writes."""

    def __enter__(self) -> dict:
        self.lock = open(ROOT / "lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        file = ROOT / "state.json"
        self.state = json.loads(file.read_text()) if file.exists() else {}
        self.state = {"resources": {}, "created": {}, "counts": {}, "nodes": {}} | self.state
        return self.state

    def __exit__(self, *_) -> None:
        # a test reads it without the lock
        (ROOT / "state.json.new").write_text(json.dumps(self.state))
        (ROOT / "state.json.new").replace(ROOT / "state.json")
        self.lock.close()


def stop(text: str, code: int = 1) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(code)


def flag(arguments: list[str], name: str) -> str | None:
    found = [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]
    return found[0] if found else None


def still_planned(name: str) -> bool:
    """Whether the scenario lets a thing go wrong once more."""
    with State() as state:
        state["counts"][name] = state["counts"].get(name, 0) + 1
        return state["counts"][name] <= SCENARIO.get(name, 0)


def create(name: str, arguments: list[str]) -> None:
    if "create_error" in SCENARIO:
        stop(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {SCENARIO['create_error']}")
    count = int(flag(arguments, "node-count") or 1)
    assert flag(arguments, "node-id" if count == 1 else "node-prefix") == name
    nodes = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
    with State() as state:
        if name in state["resources"]:
            stop(
                "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource "
                f"'projects/p/locations/z/queuedResources/{name}' already exists"
            )
        number = state["created"].get(name, 0)
        state["created"][name] = number + 1
        plans = SCENARIO.get("states", [])
        state["resources"][name] = list(plans[number] if number < len(plans) else USUAL)
        state["nodes"][name] = nodes
    for node in nodes:
        (ROOT / "vm" / node).mkdir(parents=True)


def nodes_of(name: str) -> list[str]:
    with State() as state:
        return state["nodes"][name]


def describe_node(name: str, arguments: list[str]) -> None:
    if "node_error" in SCENARIO:
        stop(f"ERROR: (gcloud.compute.tpus.tpu-vm.describe) {SCENARIO['node_error']}")
    if not (ROOT / "vm" / name).exists():
        stop("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: not found")
    is_gone = (ROOT / "vm" / name / "preempted").exists()
    print(json.dumps({"name": name, "state": "PREEMPTED" if is_gone else "READY"}))


def describe(name: str, arguments: list[str]) -> None:
    with State() as state:
        states = state["resources"].get(name)
        if states is None:
            stop("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: not found")
        now = states.pop(0) if len(states) > 1 else states[0]
    record: dict = {"state": now}
    if now == "FAILED":
        record["failedData"] = {"error": {"message": SCENARIO.get("message", "no reason")}}
    print(json.dumps({"name": name, "state": record}))


def delete(name: str, arguments: list[str]) -> None:
    assert "--force" in arguments and "--quiet" in arguments
    time.sleep(SCENARIO.get("delete_seconds", 0))
    if still_planned("delete_failures"):
        stop("ERROR: (gcloud.compute.tpus.queued-resources.delete) UNAVAILABLE: try again")
    with State() as state:
        if state["resources"].pop(name, None) is None:
            stop("ERROR: (gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: not found")
    for node in nodes_of(name):
        lose_vm(node)


def lose_vm(name: str) -> None:
    """Ends what runs on a VM and takes its disk away."""
    end_jobs(name)
    shutil.rmtree(ROOT / "vm" / name, ignore_errors=True)


def end_jobs(name: str) -> None:
    for file in (ROOT / "vm" / name).glob("dpo_jax_jobs/*/pid"):
        try:
            os.killpg(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def is_active(name: str) -> bool:
    with State() as state:
        return state["resources"].get(name) == ["ACTIVE"]


def are_all(nodes: list[str], arguments: list[str]) -> bool:
    """Whether a command goes to all workers of all nodes."""
    return "--worker=all" in arguments and ("--node=all" in arguments) == (len(nodes) > 1)


def scp(arguments: list[str]) -> None:
    source, target = [a for a in arguments if not a.startswith("--")]
    name, file = target.split(":")
    if not is_active(name) or not are_all(nodes_of(name), arguments):
        stop("ERROR: (gcloud.compute.tpus.tpu-vm.scp) the TPU is not READY")
    for node in nodes_of(name):
        shutil.copy(source, ROOT / "vm" / node / file)


def ssh(name: str, arguments: list[str]) -> None:
    command = flag(arguments, "command") or ""
    if still_planned("ssh_failures"):
        stop(
            "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].",
            255,
        )
    if not is_active(name) or not are_all(nodes_of(name), arguments):
        stop("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the TPU is not READY")
    assert "--batch-size=all" in arguments or len(nodes_of(name)) == 1
    processes = [start(node, number, command) for number, node in enumerate(nodes_of(name))]
    for job, what in SCENARIO.get("during", {}).items():
        if f"attach.sh {job} " in command and not (ROOT / "reconnected").exists():
            wait_for(ROOT / "begun" / job)
            happen(what, name, processes)
    sys.exit(next(filter(None, [process.wait() for process in processes]), 0))


def start(node: str, number: int, command: str) -> subprocess.Popen:
    """Runs a command on a node."""
    home = ROOT / "vm" / node
    environment = os.environ | {"HOME": str(home), "HOSTNAME": "t1v-n-0-w-0", "NODE": str(number)}
    return subprocess.Popen(["bash", "-c", command], cwd=home, env=environment)


def happen(what: str, name: str, processes: list[subprocess.Popen]) -> None:
    """What goes wrong while a job runs."""
    if what == "disconnected":
        for process in processes:
            process.kill()
        (ROOT / "reconnected").touch()
        stop("##### Command execution on worker 0 failed with exit status 255. Continuing.", 255)
    if what == "last node":
        # the others' processes end with it, and the resource is as before
        nodes = nodes_of(name)
        for node in nodes:
            end_jobs(node)
        (ROOT / "vm" / nodes[-1] / "preempted").touch()
        stop("ERROR: a process has died", 1)
    with State() as state:
        if what == "missing":
            del state["resources"][name]
        else:
            state["resources"][name] = what.split()
    for node, process in zip(nodes_of(name), processes, strict=True):
        lose_vm(node)
        process.kill()
    stop("", 1)


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


def storage(verb: str, arguments: list[str]) -> None:
    path = next(a for a in arguments if a.startswith("gs://"))
    local = ROOT / "bucket" / path.removeprefix("gs://")
    if verb == "ls":
        found = sorted((ROOT / "bucket").glob(path.removeprefix("gs://")))
        if not found:
            stop("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
        print("\n".join(f"gs://{file.relative_to(ROOT / 'bucket')}" for file in found))
    elif verb == "cp":
        assert "--if-generation-match=0" in arguments and arguments[0] == "-"
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(local, "x") as file:
                file.write(sys.stdin.read())
        except FileExistsError:
            stop("ERROR: HTTPError 412: At least one of the pre-conditions did not hold.")
    elif not local.exists():
        stop(f"ERROR: (gcloud.storage.{verb}) The following URLs matched no objects or files")
    elif verb == "cat":
        print(local.read_text(), end="")
    elif verb == "rm":
        local.unlink()


def sweep(arguments: list[str]) -> None:
    """What `python -m scripts.sweep` does, as far as a launcher sees it: three steps, resumed."""
    if os.environ["NODE"] != "0":
        # the first process of a run is the one that writes
        return
    after = dict(zip(arguments, arguments[1:], strict=False))
    stem = Path(arguments[2]).stem
    assert Path(arguments[2]).exists(), "the code is not here"
    root = ROOT / "bucket" / after["--workdir"].removeprefix("gs://") / stem
    names = SCENARIO["names"]
    chosen = [int(after["--index"])] if "--index" in after else list(range(len(names)))
    if "--shard" in after:
        first, count = map(int, after["--shard"].split("/"))
        chosen = chosen[first::count]
    for index in chosen:
        folder = root / names[index]
        folder.mkdir(parents=True, exist_ok=True)
        if SCENARIO.get("errors", {}).get(str(index)):
            stop(f"ValueError: {SCENARIO['errors'][str(index)]}")
        steps = folder / "steps"
        for step in range(len(steps.read_text().split()) if steps.exists() else 0, 3):
            if step == 1:
                pause(index)
            with open(steps, "a") as file:
                file.write(f"{step}\n")
            print(f"point {index} step {step} by {Path.cwd().parent.name}", flush=True)
        shutil.copy(arguments[2], folder / "experiment.py")
        (folder / "config.json").write_text(json.dumps(SCENARIO["configs"][index]))
        (folder / "DONE").touch()


def pause(index: int) -> None:
    """Lets what the scenario has planned for this time happen to the job that runs the point."""
    for job in SCENARIO.get("during", {}):
        file = ROOT / "begun" / job
        if re.match(rf"point-{index}-", job) and not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.touch()
            wait_for(ROOT / "reconnected")
    if index in SCENARIO.get("endless", []):
        (ROOT / "running").touch()
        time.sleep(60)


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:2] == ["-m", "scripts.sweep"]:
        return sweep(arguments)
    with State(), open(ROOT / "calls.jsonl", "a") as file:
        file.write(json.dumps(arguments) + "\n")
    if arguments[:2] == ["auth", "list"]:
        return print(SCENARIO.get("account", "somebody@example.com"))
    if arguments[0] == "storage":
        return storage(arguments[1], arguments[2:])
    assert arguments[:2] == ["compute", "tpus"], shlex.join(arguments)
    kind, verb, rest = arguments[2], arguments[3], arguments[4:]
    assert flag(rest, "zone") == "us-east5-a"
    if verb == "scp":
        return scp(rest)
    if (kind, verb) == ("tpu-vm", "describe"):
        return describe_node(rest[0], rest[1:])
    verbs = {"create": create, "describe": describe, "delete": delete, "ssh": ssh}
    verbs[verb](rest[0], rest[1:])


if __name__ == "__main__":
    main()
