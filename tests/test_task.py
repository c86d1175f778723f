"""The built-in task: made once, kept under content hashes, and read like anybody's files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_jax import config, flags, sweep_process, task
from dpo_jax.data import builtin
from tests import tiny

CORPUS = config.Task(model="reviews-500k", reviews=1500)
PAIRS = config.Task(prefixes=24, held_out_prefixes=16)


def experiment(name: str, **changes) -> config.Experiment:
    base = flags.load(tiny.ROOT / "experiments" / f"{name}.py")
    task_of = CORPUS if name == "sft" else PAIRS
    quiet = config.Log(progress=False, tensorboard=False)
    return base.replace(**{"task": task_of, "log": quiet, **changes})


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_sft_gets_the_corpus_its_tokenizer_and_the_preset():
    prepared = task.prepare(experiment("sft"))
    assert prepared.model.source == "reviews-500k"
    assert len(rows(prepared.data.source)) == 1500
    assert prepared.data.evaluation_source is not None
    assert len(rows(prepared.data.evaluation_source)) == task.HELD_OUT_REVIEWS
    assert rows(prepared.data.source)[0] == {"text": builtin.corpus(1, 0)[0]}
    assert task.prepare(experiment("sft")) == prepared


def test_files_of_ones_own_are_left_as_they_are():
    own = dataclasses.replace(experiment("dpo").data, source="mine.jsonl")
    run = experiment("dpo", data=own, model=config.Model(source="tiny"), task=config.Task())
    assert task.prepare(run) == run


def test_held_out_rows_and_a_tokenizer_of_ones_own_stay():
    own = dataclasses.replace(
        experiment("sft").data, evaluation_source="mine.jsonl", tokenizer="mine"
    )
    prepared = task.prepare(experiment("sft", data=own)).data
    assert (prepared.evaluation_source, prepared.tokenizer) == ("mine.jsonl", "mine")


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("sft", "builtin", {"prefixes": 3}),
        ("dpo", "runs/sft", {"model": "reviews-500k"}),
        ("dpo", "runs/sft", {"reviews": 3}),
        ("sft", "tiny", {"model": "reviews-500k"}),
    ],
)
def test_a_number_of_the_task_that_nothing_reads_is_refused(name, source, wrong):
    run = experiment(name, model=config.Model(source=source), task=config.Task(**wrong))
    with pytest.raises(ValueError, match=rf"task\.{next(iter(wrong))} is .*nothing reads it"):
        task.prepare(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, "= 3 devices, and there are 8: change --mesh.data"),
        ({"mesh.fsdp": 8, "batch_size": 12}, "batch_size 12 does not divide over 8 batch shards"),
    ],
)
@pytest.mark.parametrize("program", [task.run, sweep_process.make_training().train])
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_made(
    program: Callable, changes: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    run = config.override(experiment("dpo", workdir=str(tmp_path / "run")), changes)
    with pytest.raises(ValueError, match=message):
        program(run, tiny.FILE)
    assert not list(tmp_path.iterdir())


def test_every_number_of_the_corpus_has_a_folder_of_its_own():
    changed = [{}, {"reviews": 1400}, {"seed": 1}, {"model": "tiny"}]
    made = [task.make_corpus(dataclasses.replace(CORPUS, **change)) for change in changed]
    assert len(set(made)) == len(made)


def test_an_unknown_preset_is_refused_with_the_list():
    wrong = config.Task(model="reviews-5")
    message = r"task\.model is 'reviews-5'; the presets are .*reviews-5m"
    with pytest.raises(ValueError, match=message):
        task.prepare(experiment("sft", task=wrong))


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run folder of a model that writes reviews, more or less."""
    workdir = str(tmp_path_factory.mktemp("sft") / "run")
    run = config.override(
        experiment("sft", workdir=workdir),
        {
            "steps": 140,
            "batch_size": 32,
            "optimizer.learning_rate": 8e-3,
            "optimizer.warmup_steps": 14,
            "samples.count": 4,
        },
    )
    task.run(run, task.SFT_FILE)
    return workdir


def from_sft(name: str, sft: str, workdir: Path) -> config.Experiment:
    samples = config.Samples(count=8, max_tokens=40, reward=builtin.reward)
    changes = {"steps": 2, "batch_size": 8, "evaluate_every": None, "samples": samples}
    run = experiment(name, **changes, workdir=str(workdir), model=config.Model(source=sft))
    return config.override(run, {"optimizer.warmup_steps": 1})


@pytest.mark.slow
def test_sft_samples_have_a_reward_and_no_kl_to_random_weights(sft: str):
    last = tiny.metrics(sft)[-1]
    assert "samples/reward" in last and "samples/kl" not in last


@pytest.mark.slow
def test_pairs_are_sampled_from_the_model_once_with_its_tokenizer_and_ranked(
    sft: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = from_sft("dpo", sft, tmp_path)
    prepared = task.prepare(run)
    # None: the one that lies beside the model
    assert prepared.data.tokenizer is None
    pairs = rows(prepared.data.source)
    assert pairs
    for pair in pairs:
        assert pair["reward_chosen"] == builtin.reward(pair["prompt"], pair["chosen"])
        assert pair["reward_chosen"] > pair["reward_rejected"]
    assert prepared.data.evaluation_source is not None
    held_out = {pair["prompt"] for pair in rows(prepared.data.evaluation_source)}
    assert not held_out & {pair["prompt"] for pair in pairs}
    # everything is there already: nothing is sampled again, for other rows of the same either
    monkeypatch.setattr("dpo_jax.generate.complete", None)
    assert task.prepare(run) == prepared
    ranked = dataclasses.replace(run.data, examples="ranked")
    for row in rows(task.prepare(run.replace(data=ranked)).data.source):
        found = [builtin.reward(row["prompt"], one) for one in row["completions"]]
        assert len(found) == 3 and found[0] > found[1] > found[2]
    triples = dataclasses.replace(run.data, examples="triples")
    for row in rows(task.prepare(run.replace(data=triples)).data.source):
        found = [builtin.reward(row["prompt"], row[n]) for n in ("gold", "chosen", "rejected")]
        assert found[0] > found[1] > found[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo", "plackett_luce", "tpo"])
def test_each_method_trains_on_the_task_and_samples(name: str, sft: str, tmp_path: Path):
    task.run(from_sft(name, sft, tmp_path), tiny.ROOT / "experiments" / f"{name}.py")
    last = tiny.metrics(tmp_path)[-1]
    assert {"eval/loss", "eval/rewards/accuracies", "samples/reward", "samples/kl"} <= set(last)
    assert 0 <= last["eval/rewards/accuracies"] <= 1
