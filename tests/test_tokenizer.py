import json
from typing import Any

import pytest
import tokenizers
import transformers

from dpo_jax import config, paths
from dpo_jax.data import hub, tokenizer
from dpo_jax.data.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bytes_backend(*, adds_bos=False, specials=("<s>", "</s>")):
    """A tokenizer with a token for each byte, so that lengths can be counted by hand."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return backend


def wrap(backend, **options):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def make(*, adds_bos=False, **options):
    return Tokenizer(wrap(bytes_backend(adds_bos=adds_bos), eos_token="</s>"), **options)


def encode_completion(words: Tokenizer, text: str) -> list[int]:
    """A completion's ids, as data.encode puts them together."""
    return words.finish(words.encode(words.trim(text)))


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but tokenizer.json, so that EOS is unknown."""
    bytes_backend().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_encode_adds_nothing_and_decode_gives_the_text_back():
    words = make(adds_bos=True)
    ids = words.encode("aé\n b")
    assert len(ids) == 6
    assert words.decode(ids) == "aé\n b"
    assert words.encode_batch(["a", "", "aé\n b"]) == [words.encode("a"), [], ids]


def test_special_tokens_stay_in_decode_and_bos_and_eos_leave_decode_plain():
    words = make(adds_bos=True)
    ids = words.begin(words.finish(words.encode("a")))
    assert words.decode(ids) == "<s>a</s>"
    assert words.decode_plain(ids) == "a"


def test_decode_plain_keeps_special_tokens_that_are_words():
    backend = bytes_backend(specials=("<s>", "</s>", "assistant"))
    words = Tokenizer(wrap(backend, eos_token="</s>"))
    assert words.decode_plain(words.encode("an assistant</s>")) == "an assistant"


def test_a_part_of_a_character_is_shown_by_its_name():
    words = make()
    first, second = words.encode("é")
    assert words.token_text(words.encode("a")[0]) == "a"
    assert words.token_text(first) == words.backend.id_to_token(first) != words.token_text(second)


def test_the_vocabulary_size_counts_added_tokens():
    words = make()
    assert words.vocabulary_size == 258
    assert words.eos_id == 257


def test_truncation_and_padding_of_the_file_are_switched_off():
    backend = bytes_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=10)
    words = Tokenizer(wrap(backend, eos_token="</s>"), bos_token="<s>")
    assert [len(ids) for ids in words.encode_batch(["abcd", "a"])] == [4, 1]


def test_bos_is_the_tokens_that_the_tokenizer_itself_adds_or_none():
    assert make(adds_bos=True).bos_id == 256
    assert make().bos_id is None
    assert make(bos_token="<s>").bos_id == 256


def test_a_token_that_the_tokenizer_adds_at_the_end_only_is_no_bos():
    backend = bytes_backend()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 257)]
    )
    words = Tokenizer(wrap(backend, eos_token="</s>"))
    assert words.bos_id is None
    assert encode_completion(words, "a") == [*words.encode("a"), 257]


@pytest.mark.parametrize("text", ["a", "<s>a", "<s><s>a"])
def test_a_prompt_begins_with_bos_exactly_once(text):
    words = make(adds_bos=True)
    assert words.encode_prompt(text) == [256, *words.encode("a")]


def test_an_empty_prompt_is_bos_alone():
    assert make(bos_token="<s>").encode_prompt("") == [256]
    assert make().encode_prompt("") == []


@pytest.mark.parametrize("text", ["a", "a</s>", "a</s></s>", "a</s>\n", "<s>a"])
def test_a_completion_has_no_bos_and_ends_with_eos_exactly_once(text):
    words = make(adds_bos=True)
    assert encode_completion(words, text) == [*words.encode("a"), 257]


def test_eos_is_kept_where_pad_and_bos_are_the_same_token():
    fast = wrap(bytes_backend(), eos_token="</s>", pad_token="</s>")
    words = Tokenizer(fast, bos_token="</s>")
    assert words.pad_id == words.eos_id == words.bos_id
    assert encode_completion(words, "a") == [*words.encode("a"), words.eos_id]
    assert words.encode_prompt("a") == [words.eos_id, *words.encode("a")]


def test_blanks_before_eos_are_kept_and_without_eos_too():
    words = make()
    assert encode_completion(words, "a \n") == [*words.encode("a \n"), words.eos_id]
    assert encode_completion(words, "a </s>\n") == [*words.encode("a "), words.eos_id]


def test_a_folder_with_tokenizer_json_alone_needs_eos_token_to_be_named(folder):
    with pytest.raises(ValueError) as error:
        tokenizer.load_tokenizer(config.Data(tokenizer=folder), None)
    for part in ("data.eos_token", "--data.eos-token", "'<s>', '</s>'"):
        assert part in str(error.value)
    words = tokenizer.load_tokenizer(config.Data(tokenizer=folder, eos_token="</s>"), None)
    assert words.eos_id == 257 and words.bos_id is None and words.pad_id == 0


def test_a_tokenizer_json_file_and_the_fallback_folder_load_alike(folder):
    data = config.Data(eos_token="</s>")
    file = config.Data(tokenizer=f"{folder}/tokenizer.json", eos_token="</s>")
    assert (
        tokenizer.load_tokenizer(data, folder).fingerprint
        == tokenizer.load_tokenizer(file, "absent").fingerprint
    )


def test_a_saved_transformers_tokenizer_brings_its_special_tokens_and_template(tmp_path):
    fast = wrap(bytes_backend(adds_bos=True), eos_token="</s>", chat_template=CHATML)
    fast.save_pretrained(str(tmp_path))
    words = tokenizer.load_tokenizer(config.Data(), str(tmp_path))
    assert (words.bos_id, words.eos_id, words.chat_template) == (256, 257, CHATML)


def test_a_folder_of_another_file_system_is_read_through_paths(folder):
    paths.write_text(
        "memory://tokenizer/tokenizer.json", paths.read_text(f"{folder}/tokenizer.json")
    )
    data = config.Data(tokenizer="memory://tokenizer", eos_token="</s>")
    assert tokenizer.load_tokenizer(data, None).encode("ab") == make().encode("ab")


def test_a_saved_tokenizer_needs_no_choices_to_be_loaded_as_it_was(tmp_path):
    words = make(bos_token="<s>", chat_template=CHATML)
    words.save(str(tmp_path))
    loaded = tokenizer.load_tokenizer(config.Data(), str(tmp_path))
    assert (loaded.bos_id, loaded.eos_id) == (256, 257)
    assert loaded.encode_prompt("ab") == words.encode_prompt("ab")
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.encode_prompt(messages) == words.encode_prompt(messages)


@pytest.mark.parametrize("field", ["eos_token", "bos_token"])
def test_a_special_token_outside_the_vocabulary_is_named_with_the_likely_ones(folder, field):
    choices: dict[str, Any] = {"eos_token": "</s>", field: "<end>"}
    with pytest.raises(ValueError) as error:
        tokenizer.load_tokenizer(config.Data(tokenizer=folder, **choices), None)
    for part in (f"data.{field}", "'<end>' is not in", f"--data.{field[:3]}-token", "'</s>'"):
        assert part in str(error.value)


def test_no_tokenizer_and_one_that_is_not_there_say_what_to_give(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--data.tokenizer"):
        tokenizer.load_tokenizer(config.Data(), None)
    with pytest.raises(ValueError, match=f"no such folder: {tmp_path}/absent"):
        tokenizer.load_tokenizer(config.Data(tokenizer=f"{tmp_path}/absent"), None)
    with pytest.raises(ValueError, match="no such file: .*absent.json"):
        tokenizer.load_tokenizer(config.Data(tokenizer=f"{tmp_path}/absent.json"), None)
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        tokenizer.load_tokenizer(config.Data(tokenizer=str(tmp_path)), None)


def test_a_hub_name_offline_fails_at_once_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(hub, "why_unreachable", lambda: "the cable is cut")
    with pytest.raises(ValueError) as error:
        tokenizer.load_tokenizer(config.Data(tokenizer="nobody/nothing-of-this-name"), None)
    for part in ("'nobody/nothing-of-this-name'", "the cable is cut", "--data.tokenizer"):
        assert part in str(error.value)


def test_a_template_file_takes_the_place_of_the_tokenizers_own(folder, tmp_path):
    template = str(tmp_path / "template.jinja")
    paths.write_text(template, CHATML)
    data = config.Data(tokenizer=folder, eos_token="</s>", chat_template=template)
    words = tokenizer.load_tokenizer(data, None)
    messages = [{"role": "user", "content": "hi"}]
    assert words.apply_chat_template(messages) == "<|user|>hi</s>\n<|assistant|>"
    assert words.apply_chat_template(messages, add_generation_prompt=False) == "<|user|>hi</s>\n"
    with pytest.raises(ValueError, match="data.chat_template: no such file"):
        tokenizer.load_tokenizer(config.Data(tokenizer=folder, chat_template="absent.jinja"), None)


def test_a_template_that_writes_bos_does_not_double_it():
    words = make(adds_bos=True, chat_template="<s>" + CHATML)
    ids = words.encode_prompt([{"role": "user", "content": "hi"}])
    assert ids[0] == 256 and ids.count(256) == 1


def test_messages_without_a_template_or_refused_by_it_are_errors():
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="--data.chat-template"):
        make().apply_chat_template(messages)
    strict = make(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        strict.apply_chat_template(messages)


def test_the_fingerprint_changes_with_all_that_decides_ids():
    changed = [
        make(),
        make(adds_bos=True),
        make(bos_token="<s>"),
        make(eos_token="<s>"),
        make(chat_template=CHATML),
        Tokenizer(wrap(bytes_backend(specials=("<s>", "</s>", "<x>")), eos_token="</s>")),
    ]
    assert len({words.fingerprint for words in changed}) == len(changed)
    assert make().fingerprint == make().fingerprint


def test_the_published_tokenizer_loads_with_its_eos_named(shared):
    data = config.Data(tokenizer=str(shared / "tokenizers/neox-20b"), eos_token="<|endoftext|>")
    words = tokenizer.load_tokenizer(data, None)
    content = json.loads((shared / "tokenizers/neox-20b/tokenizer.json").read_text("utf-8"))
    ids = [*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])]
    assert words.eos_id == 0 and words.bos_id is None
    assert words.vocabulary_size == max(ids) + 1
    with pytest.raises(ValueError, match=r"data.eos_token.*<\|endoftext\|>"):
        tokenizer.load_tokenizer(config.Data(tokenizer=str(shared / "tokenizers/neox-20b")), None)
