"""Text from a run folder."""

from pathlib import Path

import pytest

from dpo_jax import config, generate, sample, train
from dpo_jax.data import tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    workdir = tmp_path_factory.mktemp("sampled") / "run"
    train.train(tiny.experiment(folder, workdir, steps=1, evaluate_every=None), tiny.FILE)
    return str(workdir)


def test_samples_come_from_the_seed_and_greedy_ones_are_equal(run: str):
    options = sample.Options(count=3, max_tokens=8)
    texts = sample.sample(run, "the plot", options)
    assert len(texts) == 3 and texts == sample.sample(run, "the plot", options)
    assert texts != sample.sample(run, "the plot", options._replace(seed=1))
    greedy = sample.sample(run, "the plot", options._replace(temperature=0.0))
    assert len(set(greedy)) == 1


def test_a_sample_ends_before_a_stop_token(run: str, monkeypatch: pytest.MonkeyPatch):
    greedy = sample.Options(count=1, max_tokens=8, temperature=0.0)
    words = tokenizer.load_tokenizer(config.Data(), f"{run}/tokenizer")
    complete, ends = generate.complete, []

    def watch(*arguments, **options):
        ends.append(options["stop_ids"])
        return complete(*arguments, **options)

    monkeypatch.setattr(generate, "complete", watch)
    (text,) = sample.sample(run, "the plot", greedy)
    first = words.token_text(words.encode(text)[0])
    assert text and sample.sample(run, "the plot", greedy._replace(stop=(first,))) == [""]
    assert ends == [[words.eos_id], [words.eos_id, words.encode(first)[0]]]
    monkeypatch.setattr(generate, "complete", lambda *_, **__: [[5, 6, 7], [5, 6]])
    both = sample.sample(run, "the plot", greedy._replace(stop=(words.token_text(7),)))
    assert both == [words.decode([5, 6])] * 2


def test_wrong_numbers_and_folders_are_refused(run: str, tmp_path: Path):
    with pytest.raises(ValueError, match="count is 0"):
        sample.sample(run, "the", sample.Options(count=0))
    with pytest.raises(ValueError, match="temperature is -1"):
        sample.sample(run, "the", sample.Options(temperature=-1.0))
    with pytest.raises(ValueError, match="nowhere"):
        sample.sample(str(tmp_path / "nowhere"), "the", sample.Options())
