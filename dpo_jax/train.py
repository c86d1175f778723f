"""One run, from its folder to its last step. What it runs on is put together in `assemble`, the
step in `train_step`.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import (
    assemble,
    checkpoint,
    checks,
    config,
    contract,
    evaluate,
    flags,
    inputs,
    kept,
    logps,
    metrics,
    origins,
    paths,
    processes,
    reference,
    sharding,
    train_step,
)
from dpo_jax.data import pack

DONE, INPUTS = "DONE", "inputs.json"
# Largest log-ratio, in nats, over the root of its completion's tokens, between two computations
# with the same weights: each token's error is its own. GPUs round policy and reference in other
# places: first losses of DPO in bfloat16 were up to 0.01 from log 2 there.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
# batches made ahead of the step
AHEAD = 2


def train(
    experiment: config.Experiment, experiment_file: str | Path, keeper: kept.Kept | None = None
) -> None:
    """Trains, or goes on with, the run in experiment.workdir; one that is DONE is left as it is.

    Runs that are given one keeper share what they have in common: compiled programs and rows.

    Raises ValueError for bad input, before the first step where it can be seen, and
    FloatingPointError when the loss stops being finite. SIGTERM saves a checkpoint and exits with
    status 143.
    """
    experiment = origins.with_absolute_sources(experiment)
    folder = find_folder(experiment)
    if is_done(folder):
        print(f"{folder} is done: nothing to do")
        return
    inputs.enable_compile_cache(paths.join(paths.cache_folder(), "compiled"))
    mesh = sharding.make_mesh(experiment.mesh, jax.devices())
    run, state = assemble.assemble(experiment, mesh, keeper)
    check_inputs(folder, run.identities)
    # only now, so that a run whose input is refused leaves no folder behind
    if processes.is_first():
        write_start(folder, run, experiment_file)
    processes.wait("the run's folder is there")
    with checkpoint.make_checkpointer(folder, experiment.checkpoint) as checkpointer:
        run, state = resume(checkpointer, run, state)
        with make_writer(run, folder, int(state.step), experiment_file) as writer:
            with catching_sigterm() as stop, contextlib.ExitStack() as trace:
                loop(run, folder, state, Ends(checkpointer, writer, stop, trace))
    if processes.is_first():
        paths.write_text(paths.join(folder, DONE), "")
    processes.wait("the run is done")


def is_done(folder: str | None) -> bool:
    """Whether the folder holds a finished run."""
    return folder is not None and paths.exists(paths.join(folder, DONE))


def check_devices(experiment: config.Experiment) -> None:
    """Raises ValueError where the devices do not make the mesh, or a batch does not divide over
    it, of a run that is not done.
    """
    if is_done(experiment.workdir):
        return
    inputs.check_batch_size(experiment, sharding.make_mesh(experiment.mesh, jax.devices()))


def write_start(folder: str, run: assemble.Run, experiment_file: str | Path) -> None:
    """Writes what a run's folder has before the first step, but for what is there."""
    if not paths.exists(paths.join(folder, "config.json")):
        flags.write_run(folder, run.experiment, experiment_file)
    if not paths.exists(paths.join(folder, INPUTS)):
        paths.write_text(paths.join(folder, INPUTS), json.dumps(run.identities, indent=1))
    inputs.write_reports(folder, {"train": run.train, "held_out": run.held_out})
    if not paths.exists(paths.join(folder, origins.MODEL)):
        run.tokenizer.save(paths.join(folder, origins.TOKENIZER))
        origins.write(folder, run.initial.model.config, run.initial.adapter)


def make_writer(
    run: assemble.Run, folder: str, first: int, experiment_file: str | Path
) -> metrics.Writer | metrics.Unwritten:
    """Where the lines of the steps after the first one go."""
    if not processes.is_first():
        return metrics.Unwritten()
    # the line of step 0 too is written again where no checkpoint was saved
    metrics.cut(folder, first or -1)
    record = flags.to_json(run.experiment, experiment_file)
    return metrics.Writer(folder, run.experiment.log, run.experiment.steps, first, record)


def find_folder(experiment: config.Experiment) -> str:
    """The run's folder, new or of an equal config; ValueError lists how another config differs."""
    folder = experiment.workdir
    if folder is None:
        raise ValueError("workdir is None: give --workdir, the folder of the run")
    if not paths.exists(paths.join(folder, "config.json")):
        return folder
    differences = flags.compare(flags.load_run(folder), experiment)
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"{folder} holds a run of another config:\n  {listed}\n"
            "give another --workdir, or the same settings to go on with it"
        )
    return folder


def check_inputs(folder: str, identities: dict[str, str]) -> None:
    """Raises ValueError that names the rows and weights whose content hash is not that of the
    run's start.
    """
    path = paths.join(folder, INPUTS)
    if not paths.exists(path):
        return
    before = json.loads(paths.read_text(path))
    changed = [
        name for name in {**before, **identities} if before.get(name) != identities.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was started with other {' and '.join(changed)}: their content has changed "
            "since; put them back, or give another --workdir"
        )


def resume(
    checkpointer, run: assemble.Run, state: train_step.TrainState
) -> tuple[assemble.Run, train_step.TrainState]:
    """Run and state as the newest checkpoint has them, or those given where there is none."""
    step = checkpoint.latest_step(checkpointer)
    if step is None:
        return run, state
    items = checkpoint.abstract(saved_items(run, state))
    restored = checkpoint.restore(checkpointer, step, items)
    print(f"going on from step {step}")
    placed = sharding.replicate(np.int32(step), run.mesh)
    reference = restored.pop("reference", run.held.reference)
    run = run._replace(held=run.held._replace(reference=reference))
    return run, train_step.TrainState(placed, **restored)


def saved_items(run: assemble.Run, state: train_step.TrainState) -> dict[str, Any]:
    """What a checkpoint holds by name: what the run changes."""
    items = {"params": state.params, "opt_state": state.opt_state}
    if contract.has_state(run.experiment.loss.function):
        items["loss_state"] = state.loss_state
    if run.follow is not None:
        items["reference"] = run.held.reference
    return items


class Ends(NamedTuple):
    """Where a run's effects go."""

    checkpointer: Any
    writer: metrics.Writer | metrics.Unwritten
    # set by SIGTERM
    stop: threading.Event
    # the profiler, while it runs
    trace: contextlib.ExitStack


def loop(run: assemble.Run, folder: str, state: train_step.TrainState, ends: Ends) -> None:
    """Runs the steps that are left, with evaluations, checkpoints and the profiler's window."""
    experiment, first = run.experiment, int(state.step)
    if first == 0:
        found = evaluation(run, folder, state, 0)
        check_metric(experiment, found)
        ends.writer.write(0, found)
    pending, clock = None, time.perf_counter()
    agree = processes.make_agreement(run.mesh)
    with contextlib.closing(batches(run, first)) as made:
        for step, batch, facts in made:
            profile(experiment.profile, folder, step, state, ends.trace)
            state, values = run.step(state, run.held, batch, run.numbers)
            # the device works on this step while the numbers of the last are fetched and written
            if pending is not None:
                ends.writer.write(*fetch(pending, clock))
                clock = time.perf_counter()
            pending, done = (step + 1, values, facts), step + 1
            if step == 0:
                check_identity(run, float(values["deviation"]))
            if run.follow is not None and divides(experiment.reference.update_every, done):
                followed = run.follow(run.held.reference, state.params)
                run = run._replace(held=run.held._replace(reference=followed))
            stops = agree(ends.stop.is_set(), state.step)
            if stops or done == experiment.steps or due(experiment, done):
                pause(run, folder, state, fetch(pending, clock), ends, stops=stops)
                pending, clock = None, time.perf_counter()


def due(experiment: config.Experiment, done: int) -> bool:
    """Whether an evaluation or a checkpoint comes after this many steps."""
    return divides(experiment.evaluate_every, done) or divides(experiment.checkpoint_every, done)


def divides(every: int | None, done: int) -> bool:
    """Whether something that comes every so many steps comes now; None: never."""
    return every is not None and done % every == 0


def fetch(pending: tuple, clock: float) -> tuple[int, dict[str, float]]:
    """A step's number and its metrics as floats, with the time since `clock`.

    A metric that applied to no example of the step is left out.
    """
    step, values, facts = pending
    floats = {name: float(value) for name, value in jax.device_get(values).items()}
    del floats["deviation"]
    shown = {
        name: value
        for name, value in floats.items()
        if name in metrics.CHECKED or not math.isnan(value)
    }
    seconds = time.perf_counter() - clock
    timed = {"time/step": seconds, "time/tokens_per_second": facts["tokens"] / seconds}
    return step, {**shown, **{name: facts[name] for name in facts if name != "tokens"}, **timed}


def pause(run: assemble.Run, folder: str, state, line: tuple, ends: Ends, *, stops: bool) -> None:
    """Evaluates and saves as is due after a step; its line is on disk before its checkpoint is."""
    (step, values), experiment = line, run.experiment
    last = step == experiment.steps
    saves = last or stops or divides(experiment.checkpoint_every, step)
    # the best checkpoints are told apart by an evaluation of each
    ranks = saves and experiment.checkpoint.keep_best > 0
    if last or ranks or divides(experiment.evaluate_every, step):
        values.update(evaluation(run, folder, state, step))
    ends.writer.write(step, values)
    if saves:
        ends.writer.flush()
        ranked = {name: values[name] for name in (experiment.checkpoint.metric,) if ranks}
        checkpoint.save(ends.checkpointer, step, saved_items(run, state), ranked)
    if stops and not last:
        print(f"SIGTERM: saved step {step}; the same command goes on from there")
        raise SystemExit(143)


def check_metric(experiment: config.Experiment, found: Mapping[str, float]) -> None:
    """Raises ValueError where the best checkpoints go by a metric that evaluations do not have."""
    metric = experiment.checkpoint.metric
    if experiment.checkpoint.keep_best and metric not in found:
        there = checks.nearest(metric, list(found)) if found else "; nothing is evaluated"
        raise ValueError(
            f"checkpoint.metric is {metric!r}, which the evaluations do not have{there}: give "
            "--checkpoint.metric one of theirs, or --checkpoint.keep-best 0"
        )


def evaluation(
    run: assemble.Run, folder: str, state: train_step.TrainState, step: int
) -> dict[str, float]:
    """Held-out metrics under eval/, those of sampled text under samples/."""
    found: dict[str, float] = {}
    numbers = run.numbers["loss"]
    if run.held_out is not None:
        loss_of = functools.partial(
            run.evaluate_loss, state.params, state.loss_state, run.held, numbers
        )
        found |= evaluate.preferences(loss_of, run.held_out, run.mesh)
    if run.held_out_pairs is not None:
        beta = {name: number for name, number in numbers.items() if name == "beta"}
        rewards_of = functools.partial(run.evaluate_pairs, state.params, (), run.held, beta)
        pairs = evaluate.preferences(rewards_of, run.held_out_pairs, run.mesh)
        found |= {name: value for name, value in pairs.items() if name.startswith("rewards/")}
    found = {f"eval/{name}": value for name, value in found.items()}
    if run.sampler is not None:
        # the same noise at every evaluation, so that what changes is the policy
        key = jax.random.fold_in(jax.random.key(run.experiment.seed), 1)
        sampled, rows = evaluate.sample(
            run.sampler,
            assemble.joined(run.initial, state.params),
            assemble.compared(run),
            key,
        )
        if processes.is_first():
            evaluate.write_rows(folder, step, rows)
        found |= {f"samples/{name}": value for name, value in sampled.items()}
    return found


def batches(
    run: assemble.Run, first: int
) -> Generator[tuple[int, dict, dict[str, float]], None, None]:
    """Step, batch on the mesh and facts about it, for the steps that are left, made AHEAD by a
    thread.
    """
    data, plan, table = run.train
    seed, dropout = run.experiment.seed, run.experiment.lora.dropout
    held = sharding.held_rows(run.mesh)

    def make(step: int) -> tuple[dict, dict[str, float]]:
        batch = pack.batch(data, plan, step, held)
        if dropout:
            draws = np.random.default_rng([seed, step]).integers(2**32, size=len(batch["tokens"]))
            batch[logps.NOISE] = draws.astype(np.uint32)
        facts = pack.fill(data, plan, batch)
        facts["tokens"] = facts["fill/tokens"] * batch["tokens"].size
        return sharding.put_batch(reference.with_table(batch, table), run.mesh), facts

    pool = concurrent.futures.ThreadPoolExecutor(1, "batches")
    try:
        left = iter(range(first, run.experiment.steps))
        made = collections.deque(
            (step, pool.submit(make, step)) for step in itertools.islice(left, AHEAD)
        )
        while made:
            step, future = made.popleft()
            started = time.perf_counter()
            # what went wrong in the thread is raised here, with its own traceback
            batch, facts = future.result()
            waited = time.perf_counter() - started
            following = next(left, None)
            if following is not None:
                made.append((following, pool.submit(make, following)))
            yield step, batch, {**facts, "time/data_wait": waited}
    finally:
        # a run that stops early wants none of the batches that are not begun
        pool.shutdown(cancel_futures=True)


def check_identity(run: assemble.Run, deviation: float) -> None:
    """Raises ValueError where policy and reference start with the same weights and score
    differently.
    """
    tolerance = TOLERANCE[np.dtype(run.initial.model.dtype).name]
    # what is dropped makes an adapter differ from itself, unless it is new and adds nothing
    is_noisy = run.experiment.lora.dropout > 0 and not run.initial.is_new
    if not assemble.is_initial(run.experiment) or is_noisy:
        return
    if math.isnan(deviation) or deviation <= tolerance:
        return
    cause = (
        "the cached log-probabilities are of other weights or rows: remove the cache's folder "
        "reference/"
        if run.experiment.reference.cached
        else "policy and reference are not computed alike"
    )
    raise ValueError(
        "at step 0 policy and reference have the same weights, and their log-probabilities differ "
        f"by up to {deviation:.3g} nats times the root of a completion's tokens (at most "
        f"{tolerance:g} is expected): {cause}"
    )


@contextlib.contextmanager
def catching_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, which a preempted machine gets, until the run ends.

    Only the main thread can catch signals; elsewhere the event stays unset.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def profile(
    window: config.Profile, folder: str, step: int, state, running: contextlib.ExitStack
) -> None:
    """Starts the profiler before the window's first step and stops it after its last."""
    if window.start is None or not processes.is_first():
        return
    if step == window.start:
        running.enter_context(jax.profiler.trace(paths.join(folder, "profile")))
    elif step == window.start + window.steps:
        jax.block_until_ready(state.params)
        running.close()
