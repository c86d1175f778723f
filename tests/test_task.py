"""The built-in task: made once, kept under content hashes, and read like anybody's files."""

import dataclasses
import json
from pathlib import Path

import pytest

from dpo_jax import config, flags, metrics, task
from dpo_jax.data import builtin
from tests import tiny

SMALL = config.Task(
    model="reviews-500k",
    reviews=1500,
    sft_steps=80,
    sft_batch_size=32,
    sft_learning_rate=8e-3,
    prefixes=24,
    held_out_prefixes=8,
)


def experiment(name: str, **changes) -> config.Experiment:
    base = flags.load(tiny.ROOT / "experiments" / f"{name}.py")
    quiet = config.Log(progress=False, tensorboard=False)
    return base.replace(task=SMALL, log=quiet, **changes)


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_sft_gets_the_corpus_its_tokenizer_and_the_preset():
    prepared = task.prepare(experiment("sft"))
    assert prepared.model.source == "reviews-500k"
    assert len(rows(prepared.data.source)) == 1500
    assert prepared.data.evaluation_source is not None
    assert len(rows(prepared.data.evaluation_source)) == 8
    assert rows(prepared.data.source)[0] == {"text": builtin.corpus(1, 0)[0]}
    assert task.prepare(experiment("sft")) == prepared


def test_files_of_ones_own_are_left_as_they_are_and_task_flags_then_refused():
    own = dataclasses.replace(experiment("dpo").data, source="mine.jsonl")
    run = experiment("dpo", data=own, model=config.Model(source="tiny"))
    assert task.prepare(run.replace(task=config.Task())) == run.replace(task=config.Task())
    with pytest.raises(ValueError, match=r"task\.\* is set, and neither data\.source mine\.jsonl"):
        task.prepare(run)


def test_an_unknown_preset_is_refused_with_the_list():
    wrong = dataclasses.replace(SMALL, model="reviews-5")
    with pytest.raises(
        ValueError, match=r"task\.model is 'reviews-5'; the presets are .*reviews-5m"
    ):
        task.prepare(experiment("sft").replace(task=wrong))


@pytest.mark.slow
def test_pairs_are_sampled_from_the_sft_model_once_and_ranked_by_the_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = experiment("dpo", steps=2, workdir=str(tmp_path / "run"))
    prepared = task.prepare(run)
    pairs = rows(prepared.data.source)
    assert pairs
    for pair in pairs:
        assert pair["reward_chosen"] == builtin.reward(pair["prompt"], pair["chosen"])
        assert pair["reward_chosen"] > pair["reward_rejected"]
    assert prepared.data.evaluation_source is not None
    held_out = {pair["prompt"] for pair in rows(prepared.data.evaluation_source)}
    assert not held_out & {pair["prompt"] for pair in pairs}
    # everything is there already: neither SFT nor sampling runs again
    monkeypatch.setattr("dpo_jax.train.train", None)
    monkeypatch.setattr("dpo_jax.generate.complete", None)
    assert task.prepare(run) == prepared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "orpo"])
def test_each_method_trains_on_the_task_and_samples(name: str, tmp_path: Path):
    samples = config.Samples(count=8, max_tokens=40, reward=builtin.reward)
    run = experiment(
        name, steps=2, batch_size=8, evaluate_every=None, samples=samples, workdir=str(tmp_path)
    )
    task.run(run, tiny.ROOT / "experiments" / f"{name}.py")
    last = metrics.read(str(tmp_path))[-1]
    assert {"eval/loss", "eval/rewards/accuracies", "samples/reward", "samples/kl"} <= set(last)
    assert 0 <= last["eval/rewards/accuracies"] <= 1
