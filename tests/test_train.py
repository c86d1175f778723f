"""Whole runs: what a folder holds, exact resume, and errors before the first step."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import assemble, checkpoint, config, flags, initial, losses, sharding, train
from dpo_jax.data import balance, builtin, pack
from tests import tiny

# without evaluations, whose programs take longer to compile than a few steps to run
ALONE = {"evaluate_every": None, "checkpoint_every": None, "data.evaluation_source": None}


def lines(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    found = tiny.metrics(workdir)
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def params_of(workdir: Path) -> dict:
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    return initial.load(str(workdir), config.Model(), 0, mesh).params


def test_a_run_leaves_its_config_metrics_checkpoint_and_done(folder: Path, tmp_path: Path):
    run = tiny.experiment(folder, tmp_path / "run")
    train.train(run, tiny.FILE)
    assert flags.load_run(str(tmp_path / "run")) == run
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "DONE").exists()
    np.testing.assert_allclose(found[1]["loss"], np.log(2), rtol=1e-5)
    evaluated = [line["step"] for line in found if "eval/rewards/accuracies" in line]
    assert evaluated == [0, 3, 6]
    assert found[0]["eval/rewards/accuracies"] == pytest.approx(0.5)
    assert all(line["time/data_wait"] >= 0 for line in tiny.metrics(tmp_path / "run")[1:])


def test_a_run_prints_its_shapes_and_what_they_fill(
    folder: Path, tmp_path: Path, capsys, all_shapes: None
):
    run = tiny.experiment(folder, tmp_path / "run", steps=1, **ALONE)
    train.train(run, tiny.FILE)
    printed = capsys.readouterr().out
    assert "1 steps of 8 examples: 0.16 epochs" in printed
    assert "over 8 batch shards x microbatches: 8 x " in printed
    assert re.search(r"filled with 1 shape [\d.]+% \([\d.]+%\), .*4 shapes", printed)


def test_steps_counted_in_tokens_are_means_over_their_examples(folder: Path, tmp_path: Path):
    kind = {"batch_tokens": 2048, "batch_size": 4, "steps": 2, **ALONE}
    train.train(tiny.experiment(folder, tmp_path / "whole", **kind), tiny.FILE)
    halves = {**kind, "microbatches": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    train.train(tiny.experiment(folder, tmp_path / "halves", **halves), tiny.FILE)
    # with as many parts the steps take the same examples
    whole, halved = lines(tmp_path / "whole"), lines(tmp_path / "halves")
    assert len(whole) == len(halved) == 3
    for one, other in zip(whole[1:], halved[1:], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert one["fill/tokens"] > 0.8


def test_steps_counted_in_tokens_do_not_go_on_with_other_shards(folder: Path, tmp_path: Path):
    kind = {"batch_tokens": 2048, "steps": 1, "mesh.fsdp": None, **ALONE}
    run = tiny.experiment(folder, tmp_path / "run", **kind)
    train.train(run, tiny.FILE)
    (tmp_path / "run" / "DONE").unlink()
    with pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: one)
        with pytest.raises(ValueError, match="started with other batch shards, by which batch_tok"):
            train.train(run, tiny.FILE)


def test_what_goes_wrong_while_a_batch_is_made_is_raised_with_its_own_traceback(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(data, plan, step, held):
        asked.append(step)
        if step == 2:
            raise OverflowError("from the thread")
        return whole(data, plan, step, held)

    asked, whole = [], pack.batch
    monkeypatch.setattr(pack, "batch", broken)
    run = tiny.experiment(folder, tmp_path / "run", **ALONE)
    with pytest.raises(OverflowError, match="from the thread") as raised:
        train.train(run, tiny.FILE)
    assert [entry.name for entry in raised.traceback][-2:] == ["make", "broken"]
    # the two steps before it were taken; the thread has ended
    assert [line["step"] for line in lines(tmp_path / "run")][:2] == [0, 1]
    assert not [one for one in threading.enumerate() if one.name.startswith("batches")]


def test_batches_are_made_ahead_and_no_further_once_the_run_stops(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def counted(data, plan, step, held):
        asked.append(step)
        return whole(data, plan, step, held)

    asked, whole = [], pack.batch
    monkeypatch.setattr(pack, "batch", counted)
    run, _ = assemble.assemble(
        tiny.experiment(folder, tmp_path), sharding.make_mesh(config.Mesh(), jax.devices())
    )
    made = train.batches(run, 1)
    step, _, facts = next(made)
    assert step == 1 and {"fill/tokens", "fill/scored", "time/data_wait"} <= set(facts)
    made.close()
    assert asked[0] == 1 and len(asked) <= 1 + train.AHEAD
    assert not [one for one in threading.enumerate() if one.name.startswith("batches")]


def test_a_finished_run_is_left_alone(folder: Path, tmp_path: Path, capsys):
    run = tiny.experiment(folder, tmp_path / "run", steps=1, **ALONE)
    train.train(run, tiny.FILE)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train.train(run, tiny.FILE)
    assert "is done" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_folder_of_another_config_is_refused_with_the_difference(folder: Path, tmp_path: Path):
    train.train(tiny.experiment(folder, tmp_path / "run", steps=1, **ALONE), tiny.FILE)
    other = tiny.experiment(folder, tmp_path / "run", steps=1, **ALONE, **{"loss.beta": 0.5})
    with pytest.raises(ValueError, match=r"loss\.beta: 0\.1 in the folder, 0\.5 now"):
        train.train(other, tiny.FILE)


KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from dpo_jax import flags, metrics, train
from tests import test_train, tiny
from pathlib import Path
write = metrics.Writer.write
def dying(self, step, values):
    write(self, step, values)
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
metrics.Writer.write = dying
run = tiny.experiment(Path(sys.argv[1]), Path(sys.argv[2]), **test_train.KINDS[sys.argv[5]]())
train.train(run, tiny.FILE)
"""

KINDS = {
    "dpo": lambda: {},
    "kto": lambda: {"loss": config.Loss(losses.kto), "data.examples": "unpaired"},
    # a state of the loss, and a reference that follows the policy
    "bco": lambda: {
        "loss": config.Loss(losses.bco),
        "data.examples": "unpaired",
        "reference.update_every": 2,
        "reference.update_weight": 0.5,
    },
    "narrow": lambda: {"optimizer.moments_dtype": "bfloat16"},
    # steps of as many examples as fill them, in two microbatches of which KTO's KL is global
    "kto by tokens": lambda: {
        "loss": config.Loss(losses.kto),
        "data.examples": "unpaired",
        "microbatches": 2,
        "batch_tokens": 4096,
        # parameters whole on each device: XLA's CPU devices can wait for each other for ever in
        # gathers that do not depend on each other, of which two passes have many
        "mesh.data": 8,
        "mesh.fsdp": 1,
    },
    # statistics of tokens, from a table
    "ld_dpo": lambda: {"loss": config.Loss(losses.ld_dpo), "reference.cached": True},
}


def run_killed(folder: Path, workdir: Path, step: int, sent: str, kind: str) -> int:
    arguments = [sys.executable, "-c", KILLED, folder, workdir, str(step), sent, kind]
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.run(list(map(str, arguments)), env=environment, cwd=tiny.ROOT).returncode


# the newest checkpoint is of step 4; of none; of step 4
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("dpo", 5),
        pytest.param("dpo", 1, marks=pytest.mark.slow),
        pytest.param("bco", 5, marks=pytest.mark.slow),
        pytest.param("kto by tokens", 5, marks=pytest.mark.slow),
        pytest.param("kto", 5, marks=pytest.mark.slow),
        pytest.param("narrow", 5, marks=pytest.mark.slow),
        pytest.param("ld_dpo", 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(
    kind: str, step: int, folder: Path, tmp_path: Path, all_shapes: None
):
    whole = tiny.experiment(folder, tmp_path / "whole", **KINDS[kind]())
    train.train(whole, tiny.FILE)
    assert run_killed(folder, tmp_path / "killed", step, "SIGKILL", kind) == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path / "killed")] == list(range(step + 1))
    train.train(tiny.experiment(folder, tmp_path / "killed", **KINDS[kind]()), tiny.FILE)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    resumed, uninterrupted = params_of(tmp_path / "killed"), params_of(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


ONE_DEVICE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from dpo_jax import train
from dpo_jax.data import ladder
from tests import tiny
from pathlib import Path
ladder.MOST_SHAPES = 1
run = tiny.experiment(Path(sys.argv[1]), Path(sys.argv[2]), **{"mesh.fsdp": 1})
train.train(run, tiny.FILE)
"""


def test_one_device_and_eight_give_the_same_losses(folder: Path, tmp_path: Path):
    """Eight with all axes but data; from step 4 on with other axes."""
    arguments = [sys.executable, "-c", ONE_DEVICE, str(folder), str(tmp_path / "one")]
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    subprocess.run(arguments, env=environment, cwd=tiny.ROOT, check=True)
    changes = {"mesh.fsdp": 2, "mesh.sequence": 2, "mesh.tensor": 2}
    train.train(tiny.experiment(folder, tmp_path / "eight", **changes), tiny.FILE)
    one, eight = lines(tmp_path / "one"), lines(tmp_path / "eight")
    assert len(one) == len(eight) == 7
    for a, b in zip(one, eight, strict=True):
        names = [name for name in a if not name.startswith("fill/")]
        np.testing.assert_allclose(
            [a[name] for name in names], [b[name] for name in names], rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_a_run_with_tokens_over_two_devices_goes_on_on_fewer_shards_of_parameters(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny.experiment(folder, tmp_path, **{"mesh.fsdp": None, "mesh.sequence": 2})
    train.train(run, tiny.FILE)
    whole = lines(tmp_path)
    (tmp_path / "DONE").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    train.train(run, tiny.FILE)
    for one, other in zip(lines(tmp_path), whole, strict=True):
        names = [name for name in one if not name.startswith("fill/")]
        found, expected = ([line[name] for name in names] for line in (one, other))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert lines(tmp_path)[-1] != whole[-1]


def test_a_run_whose_inputs_have_changed_is_not_gone_on_with(folder, tmp_path, monkeypatch):
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    start = tiny.experiment(folder, tmp_path / "start", steps=1, **ALONE)
    train.train(start, tiny.FILE)
    sources = {"data.source": str(tmp_path / "rows.jsonl"), "model.source": str(tmp_path / "start")}
    run = tiny.experiment(folder, tmp_path / "run", steps=1, **ALONE, **sources)
    train.train(run, tiny.FILE)
    (tmp_path / "run" / "DONE").unlink()
    (tmp_path / "rows.jsonl").write_text("".join(rows[::-1]))
    with pytest.raises(ValueError, match="was started with other training rows: "):
        train.train(run, tiny.FILE)
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    with monkeypatch.context() as patch:
        patch.setattr(balance, "ROUNDS", 1)
        with pytest.raises(ValueError, match="with other rules by which steps get their examples"):
            train.train(run, tiny.FILE)
    shutil.rmtree(tmp_path / "start")
    train.train(start.replace(seed=1), tiny.FILE)
    with pytest.raises(ValueError, match="was started with other initial policy and reference: "):
        train.train(run, tiny.FILE)


def test_a_runs_folder_says_what_was_dropped_and_cut_of_each_side(folder: Path, tmp_path: Path):
    for name, bad in {"train": 3, "held_out": 1}.items():
        rows = (folder / f"{name}.jsonl").read_text() + '{"prompt": "no completions"}\n' * bad
        long = {"prompt": "the plot", "chosen": " is slow" * 200, "rejected": " is odd"}
        (tmp_path / f"{name}.jsonl").write_text(rows + json.dumps(long) + "\n")
    changes = {
        "data.source": str(tmp_path / "train.jsonl"),
        "data.evaluation_source": str(tmp_path / "held_out.jsonl"),
        "data.bad_rows": "drop",
    }
    run = tiny.experiment(folder, tmp_path / "run", steps=1, evaluate_every=None, **changes)
    train.train(run, tiny.FILE)
    file = tmp_path / "run" / "data.json"
    cut = {"cut prompts": 0, "cut completions": 1}
    expected = {
        "train": {"rows": 54, "examples": 51, "dropped missing field": 3, **cut},
        "held_out": {"rows": 12, "examples": 11, "dropped missing field": 1, **cut},
    }
    assert json.loads(file.read_text()) == expected
    # a run that was started before there was this file goes on and gets it
    file.unlink()
    (tmp_path / "run" / "DONE").unlink()
    train.train(run, tiny.FILE)
    assert json.loads(file.read_text()) == expected


def test_sigterm_saves_the_step_that_it_meets_and_exits_143(folder: Path, tmp_path: Path):
    assert run_killed(folder, tmp_path / "run", 1, "SIGTERM", "dpo") == 143
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert steps[-1] not in (0, 6) and steps == list(range(len(steps)))
    with checkpoint.make_checkpointer(str(tmp_path / "run"), config.Checkpoint()) as checkpointer:
        assert checkpoint.latest_step(checkpointer) == steps[-1]


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_the_handler_of_sigterm_from_before_a_run_is_put_back(
    fails: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def own(*_):
        raise AssertionError("no signal was sent")

    def loop(*_):
        during.append(signal.getsignal(signal.SIGTERM))
        if fails:
            raise FloatingPointError("loss is nan")

    during = []
    monkeypatch.setattr(train, "loop", loop)
    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(FloatingPointError) if fails else contextlib.nullcontext():
            train.train(tiny.experiment(folder, tmp_path / "run"), tiny.FILE)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(during) == 1 and during[0] is not own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "{folder}/trian.jsonl"}, r"trian\.jsonl.*train\.jsonl"),
        ({"batch_size": 12}, r"batch_size 12 does not divide over 8 batch shards.*8 or 16"),
        ({"batch_tokens": 300}, r"batch_tokens is 300, .* 8 rows .* take \d+: raise"),
        (
            {"batch_tokens": 4096, "balance_steps": False},
            r"balance_steps.*4096.*leave one",
        ),
        ({"mesh.tensor": 3}, r"mesh\.tensor 3 = 24 devices, and there are 8"),
        ({"model.source": "tinny"}, r"tinny"),
        ({"data.max_length": 8, "data.over_length": "error"}, r"train\.jsonl:1"),
        ({"reference.source": None}, r"loss dpo reads the reference.*--reference\.source"),
        ({"data.examples": "sft"}, r"loss dpo reads the completion 'chosen'.*--data\.examples"),
        ({"samples.count": 2, "data.evaluation_source": None}, r"samples\.count.*held-out"),
        ({"optimizer.warmup_steps": 6}, r"warmup_steps is 6, and the run has 6 steps"),
        ({"reference.cached": True, "reference.source": None}, r"reference\.cached is set"),
        (
            {"reference.update_every": 2, "reference.cached": True},
            r"is 2, .*the reference is cached",
        ),
        (
            {"reference.update_every": 2, "reference.source": None},
            r"update_every is 2, .*the reference is None",
        ),
        ({"reference.update_every": 6}, r"update_every is 6, and the run has 6 steps"),
        ({"reference.update_weight": 0.5}, r"update_weight is 0\.5, .*--reference\.update-every"),
        ({"profile.start": 6}, r"profile\.start is 6, and the run has 6 steps"),
        ({"optimizer.kind": "rmsprop", "optimizer.b1": 0.9}, r"optimizer\.b1.*rmsprop"),
    ],
)
def test_bad_input_stops_before_a_folder_is_made(changes, message, folder: Path, tmp_path: Path):
    filled = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        train.train(tiny.experiment(folder, tmp_path / "run", **filled), tiny.FILE)
    assert not (tmp_path / "run").exists()


def test_best_checkpoints_by_a_metric_that_no_evaluation_has_are_refused(
    folder: Path, tmp_path: Path
):
    changes = {"checkpoint.keep_best": 1, "checkpoint.metric": "eval/los"}
    with pytest.raises(ValueError, match=r"checkpoint\.metric is 'eval/los'.*'eval/loss'"):
        train.train(tiny.experiment(folder, tmp_path / "run", **changes), tiny.FILE)


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path, tmp_path: Path):
    builtin.write_tokenizer(tmp_path / "large", builtin.corpus(2000, 0), 600)
    run = tiny.experiment(folder, tmp_path / "run", **{"data.tokenizer": str(tmp_path / "large")})
    with pytest.raises(
        ValueError, match=r"large has \d+ tokens and the model tiny a vocabulary of 512"
    ):
        train.train(run, tiny.FILE)


def test_a_reference_that_is_not_the_policy_at_step_0_stops_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def shifted(score, held, batch):
        found = score(held.reference, held, batch)
        return {name: one._replace(total=one.total + one.length) for name, one in found.items()}

    monkeypatch.setattr("dpo_jax.reference.live", shifted)
    # a nat a token is as many as the root of the longest completion's 100
    with pytest.raises(ValueError, match=r"at step 0 .* differ by up to 10 nats times the"):
        train.train(tiny.experiment(folder, tmp_path / "run", **ALONE), tiny.FILE)


def test_what_rounding_makes_of_each_token_does_not_stop_a_run_in_bfloat16(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def rounded(score, held, batch):
        found = score(held.reference, held, batch)
        noise = {name: 0.2 * jnp.sqrt(one.length) for name, one in found.items()}
        return {name: one._replace(total=one.total + noise[name]) for name, one in found.items()}

    monkeypatch.setattr("dpo_jax.reference.live", rounded)
    run = tiny.experiment(folder, tmp_path / "run", steps=1, **ALONE, **{"model.dtype": "bfloat16"})
    train.train(run, tiny.FILE)
    run = tiny.experiment(folder, tmp_path / "other", steps=1, **ALONE)
    with pytest.raises(
        ValueError, match=r"differ by up to 0\.2 nats times the root .*at most 0.001"
    ):
        train.train(run, tiny.FILE)


def test_a_run_starts_from_another_run_and_has_it_as_reference(folder: Path, tmp_path: Path):
    train.train(tiny.experiment(folder, tmp_path / "first", steps=1, **ALONE), tiny.FILE)
    sources = {"model.source": str(tmp_path / "first"), "data.tokenizer": None}
    second = tiny.experiment(folder, tmp_path / "second", steps=1, **ALONE, **sources)
    train.train(second, tiny.FILE)
    np.testing.assert_allclose(lines(tmp_path / "second")[1]["loss"], np.log(2), rtol=1e-5)


def test_a_reference_that_becomes_the_policy_at_each_step_is_never_left(
    folder: Path, tmp_path: Path
):
    moving = {"reference.update_every": 1, "reference.update_weight": 1.0}
    train.train(tiny.experiment(folder, tmp_path, steps=3, **ALONE, **moving), tiny.FILE)
    found = lines(tmp_path)
    np.testing.assert_allclose([line["loss"] for line in found[1:]], np.log(2), rtol=1e-5)
    assert found[-1]["logps/chosen"] != found[1]["logps/chosen"]


def test_a_reference_moves_by_its_share_at_its_steps(folder: Path, tmp_path: Path):
    moving = {"reference.update_every": 2, "reference.update_weight": 0.25}
    changes = {**ALONE, "steps": 3, "checkpoint_every": 1, "checkpoint.keep": 3}
    run = tiny.experiment(folder, tmp_path, **changes, **moving)
    train.train(run, tiny.FILE)
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    start = initial.load("tiny", config.Model(), 0, mesh).params
    kept = {}
    with checkpoint.make_checkpointer(str(tmp_path), run.checkpoint) as checkpointer:
        for step in (1, 2, 3):
            items = checkpoint.abstract({"params": start, "reference": start})
            kept[step] = checkpoint.restore(checkpointer, step, items)
    moved = jax.tree.map(lambda policy, old: 0.25 * policy + 0.75 * old, kept[2]["params"], start)
    for step, expected in {1: start, 2: moved, 3: moved}.items():
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
            kept[step]["reference"],
            expected,
        )
    differences = jax.tree.map(lambda one, other: np.abs(one - other).max(), moved, start)
    assert max(jax.tree.leaves(differences)) > 1e-5


def test_samples_are_written_with_their_metrics(folder: Path, tmp_path: Path):
    run = tiny.experiment(
        folder, tmp_path / "run", steps=1, **{"samples.count": 4, "samples.max_tokens": 8}
    )
    train.train(
        run.replace(samples=config.Samples(count=4, max_tokens=8, reward=builtin.reward)), tiny.FILE
    )
    found = lines(tmp_path / "run")
    # the reference is held, and at step 0 it is the policy
    assert found[0]["samples/kl"] == pytest.approx(0.0, abs=1e-4)
    assert found[-1]["samples/kl"] != 0
    rows = (tmp_path / "run" / "samples" / "00000001.jsonl").read_text().splitlines()
    assert len(rows) == 4 and set(json.loads(rows[0])) >= {"prompt", "completion", "reward", "kl"}


def test_the_profiler_traces_its_window(folder: Path, tmp_path: Path):
    changes = {**ALONE, "profile.start": 1, "profile.steps": 2, "steps": 4}
    train.train(tiny.experiment(folder, tmp_path / "run", **changes), tiny.FILE)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
