"""Which tokens end a completion."""

import json
from pathlib import Path

import pytest

from dpo_jax import config, stops
from dpo_jax.data import hub, tokenizer
from dpo_jax.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return tokenizer.load_tokenizer(config.Data(), str(folder / "tokenizer"))


def make_model(folder: Path, eos_token_id) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return str(folder)


def make_run(folder: Path, source: str, tokenizer: str | None = None) -> str:
    """What of a run folder says where its model is from."""
    folder.mkdir()
    experiment = {"model": {"source": source}, "data": {"tokenizer": tokenizer}}
    (folder / "config.json").write_text(json.dumps({"experiment": experiment}))
    (folder / "model.json").write_text("{}")
    return str(folder)


@pytest.mark.parametrize(("found", "ids"), [(7, [7]), ([9, 2, 7], [9, 2, 7]), (None, [])])
def test_a_models_ends_are_one_id_or_a_list(tmp_path: Path, found, ids):
    assert stops.end_ids(make_model(tmp_path, found)) == ids


def test_eos_comes_first_then_the_models_ends_and_texts_each_once(words: Tokenizer, tmp_path: Path):
    source = make_model(tmp_path, [9, words.eos_id])
    the = words.encode("the")
    assert len(the) == 1
    assert stops.find(source, words, ["the", "</s>"]) == [words.eos_id, 9, *the]


def test_without_generation_config_eos_alone_ends(words: Tokenizer, tmp_path: Path):
    assert stops.find(str(tmp_path), words) == stops.find("tiny", words) == [words.eos_id]


def test_a_run_ends_as_the_model_that_its_first_run_started_from(words: Tokenizer, tmp_path: Path):
    sft = make_run(tmp_path / "sft", make_model(tmp_path / "model", [9]))
    assert stops.find(make_run(tmp_path / "dpo", sft), words) == [words.eos_id, 9]
    other = make_run(tmp_path / "other", sft, tokenizer="another")
    assert stops.find(other, words) == [words.eos_id]
    assert stops.find(make_run(tmp_path / "gone", str(tmp_path / "no/model")), words) == [
        words.eos_id
    ]


def test_a_hub_models_ends_are_read_from_its_file(
    words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_model(tmp_path, 9)
    files = {("owner/name", "generation_config.json"): str(tmp_path / "generation_config.json")}
    monkeypatch.setattr(hub, "find_file", lambda *asked: files.get(asked))
    assert stops.find("owner/name", words) == [words.eos_id, 9]
    assert stops.find("owner/other", words) == [words.eos_id]


def test_what_is_no_token_is_refused_with_its_tokens(words: Tokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"'the zq' is 4 tokens .*\('the', ' ', 'z', 'q'\)"):
        stops.find("tiny", words, ["the zq"])
    with pytest.raises(ValueError, match=r"'' is 0 tokens .*\(none\)"):
        stops.find("tiny", words, [""])
    with pytest.raises(ValueError, match="eos_token_id is 'x' .*must be an id, a list"):
        stops.end_ids(make_model(tmp_path, "x"))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not JSON"):
        stops.end_ids(str(tmp_path))


def test_a_hub_file_that_is_not_cached_is_none_offline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "why_unreachable", lambda: "no network")
    assert hub.find_file("owner/no-such-name", "generation_config.json") is None
    monkeypatch.setattr(hub, "why_unreachable", None)
    assert hub.find_file("/a/folder", "generation_config.json") is None
