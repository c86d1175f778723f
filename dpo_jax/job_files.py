"""Job files that run a sweep's points on a cluster: Slurm, Kubernetes, SkyPilot. Imports no jax.

Each runs `scripts.sweep --index i` of every point, which skips a finished one and resumes a started
one, so that the cluster may run a preempted job again.
"""

import argparse
import json
import math
import shlex
from collections.abc import Sequence

from dpo_jax import shipment

KINDS = {
    "slurm": "a batch file of Slurm",
    "kubernetes": "a job of Kubernetes",
    "skypilot": "a task of SkyPilot",
}
# seconds before the end of its time at which a job is told to save a checkpoint
NOTICE = 120
# stands for the point's index until it is replaced by the cluster's variable
INDEX = "POINT_INDEX"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of job files, which --tpu does not read."""
    add = parser.add_argument
    add("--gpus", type=int, default=8, metavar="N", help="of a node, in job files")
    add("--nodes", type=int, default=1, metavar="N", help="of a point, in Slurm's")
    add("--hours-limit", type=float, default=24, metavar="H", help="of a job, in Slurm's")
    add("--image", help="in Kubernetes's: a container with the code and .venv")
    add("--image-folder", default="/dpo_jax", metavar="FOLDER", help="of the code in the image")
    add("--accelerators", metavar="TYPE:N", help="in SkyPilot's, such as H100:8 or tpu-v5p-128")


def make(
    kind: str,
    own: argparse.Namespace,
    load: shipment.Shipment,
    name: str,
    indices: Sequence[int],
) -> str:
    """The text of a job file; ValueError where a flag is missing that it needs."""
    makers = {"slurm": slurm, "kubernetes": kubernetes, "skypilot": skypilot}
    return makers[kind](own, load, name, indices)


def next_command(kind: str, file: str) -> str:
    """What the reader runs next."""
    quoted = shlex.quote(file)
    commands = {
        "slurm": f"bash scripts/setup.sh cuda13 && sbatch {quoted}",
        "kubernetes": f"kubectl apply -f {quoted}",
        "skypilot": f"the command in the first lines of {quoted}",
    }
    return commands[kind]


def sweep_command(load: shipment.Shipment, variable: str) -> str:
    """The shell command that runs the point of an index that a shell variable holds."""
    command = shlex.join(shipment.sweep_command(load, ("--index", INDEX)))
    return command.replace(INDEX, f'"${variable}"')


def slurm(
    own: argparse.Namespace, load: shipment.Shipment, name: str, indices: Sequence[int]
) -> str:
    """An array of jobs, a point each, one task a node, run again after a preemption."""
    minutes = max(1, math.ceil(60 * own.hours_limit))
    return f"""#!/usr/bin/env bash
# {len(indices)} points of {load.experiment}, {own.resources} at once; sbatch it from the project's
# folder, which all nodes have to see.
#SBATCH --job-name={name}
#SBATCH --array={",".join(map(str, indices))}%{own.resources}
#SBATCH --nodes={own.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={own.gpus}
#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@{NOTICE}
#SBATCH --output={name}-%a.log
# TERM lets a run save a checkpoint and end with 143, and is then queued again; another error is not
srun --kill-on-bad-exit=1 {sweep_command(load, "SLURM_ARRAY_TASK_ID")} && code=0 || code=$?
if [ "$code" = 143 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit "$code"
"""


def kubernetes(
    own: argparse.Namespace, load: shipment.Shipment, name: str, indices: Sequence[int]
) -> str:
    """An indexed job, a pod a point; a pod that was disrupted is made again, without a limit."""
    if own.image is None:
        raise ValueError("--image is missing: a container image with the code and its .venv")
    if "://" not in load.workdir:
        raise ValueError(
            f"--workdir is {load.workdir!r}; a pod's disk goes with it, so that it must be a URL "
            "such as gs://bucket/runs"
        )
    # pods are numbered from 0, and the points that are chosen perhaps not
    listed = " ".join(map(str, indices))
    script = (
        f"points=({listed}); point=${{points[$JOB_COMPLETION_INDEX]}}; "
        f"exec {sweep_command(load, 'point')}"
    )
    return f"""# {len(indices)} points of {load.experiment}, {own.resources} at once
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completions: {len(indices)}
  parallelism: {own.resources}
  completionMode: Indexed
  backoffLimitPerIndex: {own.retries}
  podFailurePolicy:
    rules:
      # a preempted node or an evicted pod is no failure of the point's
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
      # 1 and 2: what the user can only change
      - action: FailIndex
        onExitCodes:
          operator: In
          values: [1, 2]
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: {NOTICE}
      containers:
        - name: sweep
          image: {json.dumps(own.image)}
          workingDir: {json.dumps(own.image_folder)}
          command: ["bash", "-c", {json.dumps(script)}]
          resources:
            limits:
              nvidia.com/gpu: {own.gpus}
"""


def skypilot(
    own: argparse.Namespace, load: shipment.Shipment, name: str, indices: Sequence[int]
) -> str:
    """A task that runs one point, and the loop that launches it for each as a managed job."""
    if own.accelerators is None:
        raise ValueError("--accelerators is missing: what SkyPilot is to find, such as H100:8")
    if "://" not in load.workdir:
        raise ValueError(
            f"--workdir is {load.workdir!r}; it must be a URL such as gs://bucket/runs"
        )
    is_tpu = own.accelerators.startswith("tpu")
    setup = "bash scripts/setup_tpu_vm.sh" if is_tpu else "bash scripts/setup.sh cuda13 gcs"
    launch = f"sky jobs launch -y -d -n {name}-$i --env POINT=$i {shlex.quote(own.skypilot)}"
    loop = f"for i in {' '.join(map(str, indices))}; do {launch}; done"
    return f"""# {len(indices)} points of {load.experiment}, a managed job each, started by:
# {loop}
name: {name}
resources:
  accelerators: {json.dumps(own.accelerators)}
  use_spot: {json.dumps(own.spot)}
workdir: .
envs:
  POINT: "{indices[0]}"
setup: {json.dumps(setup)}
run: {json.dumps(sweep_command(load, "POINT"))}
"""
