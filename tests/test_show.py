"""Examples as the model sees them: what is prompt, what is scored, where BOS and EOS stand."""

from pathlib import Path

import pytest

from dpo_jax import config, losses
from dpo_jax.data import show, tokenise, tokenizer


@pytest.fixture
def data(folder: Path) -> config.Data:
    source, words = str(folder / "train.jsonl"), str(folder / "tokenizer")
    return config.Data(source=source, tokenizer=words, max_length=128)


def shown(data: config.Data, count: int = 1) -> str:
    return show.examples(data, tokenizer.load_tokenizer(data, None), count)


def test_bos_stands_first_in_the_prompt_and_eos_last_in_each_completion(data: config.Data):
    lines = shown(data).splitlines()
    assert lines[0].endswith("train.jsonl:1")
    assert "none scored, BOS first" in lines[1] and lines[2].startswith("    |<s>|")
    assert "chosen:" in lines[3] and "all scored, EOS last" in lines[3]
    assert lines[4].endswith("|</s>|")
    assert "rejected:" in lines[5] and lines[6].endswith("|</s>|")


def test_what_is_cut_says_so_and_has_lost_its_eos(data: config.Data):
    cut = config.Data(**{**vars(data), "max_length": 12, "max_prompt_length": 3})
    lines = shown(cut).splitlines()
    assert lines[1].endswith("prompt: 3 tokens, none scored, BOS first, cut at its start".strip())
    assert "chosen: 9 tokens, all scored, EOS nowhere, cut at its end" in lines[3]


def test_unpaired_examples_show_their_label(data: config.Data):
    unpaired = config.Data(**{**vars(data), "examples": "unpaired"})
    found = shown(unpaired, 2)
    assert "desirable: True" in found and "desirable: False" in found


def test_as_many_examples_as_asked_for_are_shown(data: config.Data):
    assert len(shown(data, 3).split("\n\n")) == 3


def test_the_fill_of_the_rows_is_that_of_the_first_batch(data: config.Data):
    words = tokenizer.load_tokenizer(data, None)
    train, _ = tokenise.load(data, words, "pairs")
    run = config.Experiment(config.Loss(losses.dpo), steps=25, batch_size=8, data=data)
    text = show.rows(train, run)
    assert text.startswith("50 rows gave 50 examples")
    assert "25 steps of 8 examples: 4 epochs" in text and "step 0 fills" in text
    assert " of 8 examples" not in show.rows(train, run.replace(batch_tokens=512))
