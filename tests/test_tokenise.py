import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers

from dpo_jax import config, paths
from dpo_jax.data import encode, labels, sides, sources, tokenise, tokenizer
from dpo_jax.data.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS = 256, 257


def make(**options):
    """A tokenizer with a token for each byte, so that lengths can be counted by hand."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return Tokenizer(fast, **options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    """Writes rows to a file and gives its path."""

    def write(rows, name="rows.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def pairs(count):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(count)]


def texts(data, words):
    """The examples as text: (prompt, {name: completion})."""

    def text(span):
        return words.decode(data.tokens[slice(*span)])

    return [
        (text(p), {name: text(span) for name, span in zip(data.names, c, strict=True)})
        for p, c in zip(data.prompts, data.completions, strict=True)
    ]


def train(source, kind="pairs", words=None, **fields):
    words = words or make()
    data = tokenise.load(config.Data(source=source, **fields), words, kind)[0]
    return data, texts(data, words)


def test_pairs_are_laid_out_once_end_to_end_in_the_sorted_order_of_names(source):
    data, found = train(source(pairs(2)))
    assert data.names == ("chosen", "rejected")
    assert found == [
        ("p0", {"chosen": "c0</s>", "rejected": "r0</s>"}),
        ("p1", {"chosen": "c1</s>", "rejected": "r1</s>"}),
    ]
    assert data.prompts.tolist() == [[0, 2], [8, 10]]
    assert data.completions.tolist() == [[[2, 5], [5, 8]], [[10, 13], [13, 16]]]
    assert (data.tokens.dtype, data.prompts.dtype, data.completions.dtype) == (
        np.int32,
        np.int64,
        np.int64,
    )
    assert data.report["rows"] == data.report["examples"] == 2 and data.columns == {}


def test_bos_stands_once_before_each_prompt_and_in_no_completion(source):
    rows = [*pairs(1), {"prompt": "<s>q", "chosen": "<s>c</s>", "rejected": "r"}]
    data, found = train(source(rows), words=make(bos_token="<s>"))
    assert [prompt for prompt, _ in found] == ["<s>p0", "<s>q"]
    assert found[1][1] == {"chosen": "c</s>", "rejected": "r</s>"}
    assert (data.tokens == BOS).sum() == 2 and (data.tokens == EOS).sum() == 4


def test_an_empty_prompt_is_bos_alone_or_else_a_bad_row(source):
    path = source([{"text": "t"}])
    assert train(path, "sft", make(bos_token="<s>"))[1] == [("<s>", {"completion": "t</s>"})]
    with pytest.raises(ValueError, match="rows.jsonl:1: the prompt is empty.*--data.bos-token"):
        train(path, "sft")
    with pytest.raises(ValueError, match="no example is left.*1 empty prompt"):
        train(path, "sft", bad_rows="drop")


def test_messages_are_the_templates_text_and_its_trailing_newline_follows_no_eos(source):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    row = {"prompt": [user], "chosen": [answer], "rejected": "b"}
    _, found = train(source([row]), words=make(chat_template=CHATML))
    expected = {"chosen": "a</s>", "rejected": "b</s>"}
    assert found == [("<|user|>q</s>\n<|assistant|>", expected)]


def test_messages_need_a_template(source):
    row = {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    with pytest.raises(ValueError, match="rows.jsonl:1: .*no chat template.*--data.chat-template"):
        train(source([row]), bad_rows="drop")


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{{ messages | length }}" + CHATML, "does not begin with its text of the prompt"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_hides_where_the_completion_begins_is_an_error(source, template, part):
    row = {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{part}"):
        train(source([row]), words=make(chat_template=template))


def test_texts_that_differ_and_have_the_same_ids_are_a_bad_row(source):
    rows = [*pairs(1), {"prompt": "p", "chosen": "a", "rejected": "a</s>"}]
    with pytest.raises(ValueError, match="rows.jsonl:2: .*same token ids.*--data.bad-rows drop"):
        train(source(rows))
    data, _ = train(source(rows), bad_rows="drop")
    assert data.report["dropped chosen equal to rejected"] == 1 and data.report["examples"] == 1


def test_a_completion_of_nothing_but_eos_is_empty(source):
    with pytest.raises(ValueError, match="rows.jsonl:1: chosen has no token before EOS"):
        train(source([{"prompt": "p", "chosen": "</s>", "rejected": "r"}]))


def test_a_long_prompt_keeps_its_end_and_then_both_completions_their_start(source):
    row = {"prompt": "abcdefgh", "chosen": "uvwxyz", "rejected": "st"}
    data, found = train(source([row]), max_length=8)
    # the prompt is cut to 8 // 2 tokens, which leaves 4 for each completion
    assert found == [("efgh", {"chosen": "uvwx", "rejected": "st</s>"})]
    assert data.report["cut prompts"] == 1 and data.report["cut completions"] == 1


def test_bos_counts_as_one_of_a_cut_prompts_tokens_and_stays_in_front(source):
    row = {"prompt": "abcdefgh", "chosen": "uvwxyz", "rejected": "st"}
    words = make(bos_token="<s>")
    _, found = train(source([row]), words=words, max_length=8, max_prompt_length=3)
    assert found == [("<s>gh", {"chosen": "uvwxy", "rejected": "st</s>"})]
    _, found = train(source([row]), words=words, max_length=8, max_prompt_length=1)
    assert found[0][0] == "<s>"


def test_a_prompt_within_its_limit_is_not_cut_and_an_example_that_fits_is_not_either(source):
    rows = [
        {"prompt": "abc", "chosen": "uvwxyz", "rejected": "st"},
        {"prompt": "abcdef", "chosen": "u", "rejected": "s"},
    ]
    data, found = train(source(rows), max_length=8)
    assert found[0] == ("abc", {"chosen": "uvwxy", "rejected": "st</s>"})
    assert found[1] == ("abcdef", {"chosen": "u</s>", "rejected": "s</s>"})
    assert data.report["cut prompts"] == 0 and data.report["cut completions"] == 1


def test_completions_that_truncation_makes_equal_are_dropped_and_counted(source):
    rows = [*pairs(1), {"prompt": "p", "chosen": "same-A", "rejected": "same-B"}]
    data, _ = train(source(rows), max_length=6)
    assert data.report["dropped equal after truncation"] == 1 and data.report["examples"] == 1
    assert data.report["cut completions"] == 0


def test_over_length_drop_counts_and_error_names_row_and_lengths(source):
    path = source([*pairs(1), {"prompt": "abcdef", "chosen": "uv", "rejected": "st"}])
    data, found = train(path, max_length=8, over_length="drop")
    assert len(found) == 1 and data.report["dropped over max_length"] == 1
    with pytest.raises(ValueError) as error:
        train(path, max_length=8, over_length="error")
    for part in ("rows.jsonl:2", "6 tokens", "completion of 3", "(8)", "--data.over-length cut"):
        assert part in str(error.value)
    # nine tokens are what it needs
    assert train(path, max_length=9, over_length="error")[0].report["examples"] == 2


def test_a_prompt_limit_that_leaves_no_room_is_refused(source):
    with pytest.raises(ValueError, match="max_prompt_length is 8.*below data.max_length"):
        train(source(pairs(1)), max_length=8, max_prompt_length=8)


def test_dropping_every_row_is_an_error_that_says_why(source):
    with pytest.raises(ValueError, match="no example is left; 3 rows gave 0.*3 over max_length"):
        train(source(pairs(3)), max_length=4, over_length="drop")
    with pytest.raises(ValueError, match="no example is left.*1 empty completion"):
        train(source([{**pairs(1)[0], "chosen": ""}]), bad_rows="drop")


def test_each_mismatched_completion_is_another_prompts_and_each_is_taken_once(source):
    data, found = train(source(pairs(20)), "unpaired")
    assert data.names == ("completion", "mismatched")
    assert data.columns["desirable"].tolist() == [1.0, 0.0] * 20
    assert data.columns["desirable"].dtype == np.float32
    for prompt, completions in found:
        assert completions["mismatched"][1:] != prompt[1:] + "</s>"
    taken = sorted(completions["mismatched"] for _, completions in found)
    assert taken == sorted(completions["completion"] for _, completions in found)
    # tokens hold each completion once: 40 examples of 2 prompt and 3 or 4 completion tokens
    assert len(data.tokens) == 20 * (2 + 3) + 20 * (3 + 4)


def test_a_mismatched_completion_is_cut_to_fit_its_new_prompt(source):
    rows = [
        {"prompt": "abcdef", "completion": "x", "label": True},
        {"prompt": "b", "completion": "uvwxy", "label": False},
    ]
    data, found = train(source(rows), "unpaired", max_length=8)
    assert [completions["mismatched"] for _, completions in found] == ["uv", "x</s>"]
    assert data.report["cut mismatched"] == 1


@pytest.mark.parametrize("sizes", [[1, 1], [3, 2, 1], [4, 1, 1, 1, 1], [5, 5], [1] * 50, [9, 4, 7]])
def test_mismatch_is_a_permutation_that_leaves_every_group(sizes):
    prompts = [str(group) for group, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        taken = labels.mismatch(prompts, seed)
        assert sorted(taken) == list(range(len(prompts)))
        assert all(prompts[i] != prompts[j] for i, j in enumerate(taken))


def test_mismatch_is_a_function_of_the_seed():
    prompts = [str(i) for i in range(50)]
    assert labels.mismatch(prompts, 1).tolist() == labels.mismatch(prompts, 1).tolist()
    assert labels.mismatch(prompts, 1).tolist() != labels.mismatch(prompts, 2).tolist()


def test_mismatch_goes_by_the_sorted_texts_and_not_by_where_they_stand():
    texts = ["b", "a", "b", "c", "aa", "a"]
    firsts, groups = labels.sorted_groups(texts)
    assert firsts.tolist() == [1, 4, 0, 3] and groups.tolist() == [2, 0, 2, 3, 1, 0]
    names, expected = np.unique(np.array(texts, object), return_inverse=True)
    assert groups.tolist() == expected.tolist() and [texts[i] for i in firsts] == names.tolist()


def test_a_prompt_of_more_than_half_of_the_examples_makes_mismatching_impossible(source):
    with pytest.raises(ValueError, match="2 of the 2 examples share the prompt.*p0"):
        train(source(pairs(1)), "unpaired")
    with pytest.raises(ValueError, match="3 of the 5 examples"):
        labels.mismatch(["a", "a", "a", "b", "c"], 0)


def test_label_noise_swaps_its_share_of_the_pairs(source):
    path = source(pairs(10))
    plain, before = train(path)
    data, found = train(path, label_noise=0.3)
    swapped = [
        a[1]["chosen"] == b[1]["rejected"] and a[1]["rejected"] == b[1]["chosen"]
        for a, b in zip(before, found, strict=True)
    ]
    same = [a == b for a, b in zip(before, found, strict=True)]
    assert sum(swapped) == 3 and sum(same) == 7 and data.report["flipped labels"] == 3
    assert data.fingerprint != plain.fingerprint
    again = train(path, label_noise=0.6)[1]
    assert all(again[i] == found[i] for i in range(10) if swapped[i])


def test_label_noise_is_drawn_by_seed(source):
    path = source(pairs(40))
    drawn = [train(path, label_noise=0.5, seed=seed)[1] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_label_noise_flips_desirable_and_leaves_the_completions(source):
    path = source(pairs(10))
    plain, before = train(path, "unpaired")
    data, found = train(path, "unpaired", label_noise=0.25)
    assert (data.columns["desirable"] != plain.columns["desirable"]).sum() == 5
    assert before == found


def test_label_noise_leaves_held_out_rows_alone(source):
    path, other, words = source(pairs(10)), source(pairs(5), "held_out.jsonl"), make()
    for data in (
        config.Data(source=path, label_noise=1.0, held_out=5),
        config.Data(source=path, label_noise=1.0, evaluation_source=other),
    ):
        flipped, held_out = tokenise.load(data, words, "pairs")
        assert held_out is not None and len(held_out.prompts) == 5
        assert all(c["chosen"].startswith("r") for _, c in texts(flipped, words))
        assert all(c["chosen"].startswith("c") for _, c in texts(held_out, words))
        assert "flipped labels" not in held_out.report


def test_label_noise_means_nothing_for_sft_and_is_refused(source):
    with pytest.raises(ValueError, match="data.label_noise is 0.5.*sft"):
        train(source(pairs(2)), "sft", label_noise=0.5)


def test_unpaired_rows_that_are_trained_on_as_sft_give_their_texts_alone(source):
    unpaired = [
        {"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0, "density_ratio": 0.5}
        for i in range(6)
    ]
    data, _ = train(source(unpaired), "sft")
    assert (data.names, data.columns) == (("completion",), {})
    alone = [{name: row[name] for name in ("prompt", "completion")} for row in unpaired[::2]]
    assert train(source(alone, "alone.jsonl"), "sft")[0].fingerprint == data.fingerprint


def test_held_out_rows_are_drawn_by_seed_and_kept_from_training(source):
    path, words = source(pairs(20)), make()
    drawn = {}
    for seed in (0, 0, 1):
        data = config.Data(source=path, held_out=5, seed=seed)
        kept, held_out = tokenise.load(data, words, "pairs")
        assert held_out is not None
        held = [prompt for prompt, _ in texts(held_out, words)]
        rest = [prompt for prompt, _ in texts(kept, words)]
        assert len(held) == 5 and sorted(held + rest) == sorted(f"p{i}" for i in range(20))
        assert drawn.setdefault(seed, held) == held
        assert kept.report["rows"] == 15 and held_out.report["rows"] == 5
    assert drawn[0] != drawn[1]


def test_both_halves_of_a_pair_go_to_one_side_and_the_sides_are_mismatched_apart(source):
    words = make()
    data = config.Data(source=source(pairs(20)), held_out=6)
    kept, held_out = tokenise.load(data, words, "unpaired")
    assert held_out is not None
    held, rest = texts(held_out, words), texts(kept, words)
    assert len(held) == 12 and len(rest) == 28
    prompts = {prompt for prompt, _ in held}
    assert len(prompts) == 6 and not prompts & {prompt for prompt, _ in rest}
    for side in (held, rest):
        own = {completions["completion"] for _, completions in side}
        assert {completions["mismatched"] for _, completions in side} == own


def test_the_pairs_for_evaluation_are_those_of_the_same_held_out_rows(source):
    words = make()
    data = config.Data(source=source(pairs(20)), held_out=6, label_noise=0.5)
    held_out = tokenise.load(data, words, "unpaired")[1]
    found = tokenise.load_pairs_for_evaluation(data, words)
    assert held_out is not None and found is not None
    assert found.names == ("chosen", "rejected") and len(found.prompts) == 6
    assert {p for p, _ in texts(found, words)} == {p for p, _ in texts(held_out, words)}
    assert all(c["chosen"] == f"c{p[1:]}</s>" for p, c in texts(found, words))
    again = tokenise.load(data, words, "pairs")[1]
    assert again is not None and again.fingerprint == found.fingerprint


def test_rows_that_are_no_pairs_and_no_held_out_rows_give_no_pairs_for_evaluation(source):
    words = make()
    rows = [{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(4)]
    data = config.Data(source=source(rows), held_out=2)
    assert tokenise.load_pairs_for_evaluation(data, words) is None
    data = config.Data(source=source(pairs(4)))
    assert tokenise.load_pairs_for_evaluation(data, words) is None


def test_an_evaluation_source_of_pairs_serves_unpaired_training_rows(source):
    words = make()
    rows = [{"prompt": f"p{i}", "completion": "c", "label": True} for i in range(4)]
    held = source(pairs(3), "held_out.jsonl")
    data = config.Data(source=source(rows), evaluation_source=held)
    found = tokenise.load_pairs_for_evaluation(data, words)
    assert found is not None and len(found.prompts) == 3


def test_too_many_held_out_rows_and_two_sources_of_them_are_errors(source):
    path = source(pairs(3))
    with pytest.raises(ValueError, match="data.held_out is 3 and only 3 rows"):
        train(path, held_out=3)
    with pytest.raises(ValueError, match="data.held_out is 1 and data.evaluation_source is"):
        train(path, held_out=1, evaluation_source=path)


class Refuses(Tokenizer):
    def encode_batch(self, texts):
        raise AssertionError("tokenised again")


def refusing():
    return Refuses(make().fast)


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
def test_the_second_load_comes_from_the_cache_and_is_the_same(source, kind):
    data = config.Data(source=source(pairs(9)), held_out=3, label_noise=0.2)
    first = tokenise.load(data, make(), kind)
    second = tokenise.load(data, refusing(), kind)
    for a, b in zip(first, second, strict=True):
        assert a is not None and b is not None
        assert (a.names, a.fingerprint, a.report) == (b.names, b.fingerprint, b.report)
        for x, y in ((a.tokens, b.tokens), (a.prompts, b.prompts), (a.completions, b.completions)):
            assert x.dtype == y.dtype and np.array_equal(x, y)
        assert a.columns.keys() == b.columns.keys()
        assert all(np.array_equal(a.columns[name], b.columns[name]) for name in a.columns)


def test_whatever_the_ids_depend_on_is_part_of_the_cache_key(source):
    path = source(pairs(9))
    base = {"source": path, "held_out": 2}
    tokenise.load(config.Data(**base), make(), "pairs")
    changes = [
        {"source": source(pairs(8), "other.jsonl")},
        {"held_out": 0},
        {"held_out": 0, "evaluation_source": source(pairs(2), "held_out.jsonl")},
        {"form": "pairs"},
        {"max_length": 100},
        {"max_prompt_length": 10},
        {"over_length": "drop"},
        {"bad_rows": "drop"},
        {"label_noise": 0.5},
        {"seed": 1},
    ]
    for change in changes:
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenise.load(config.Data(**{**base, **change}), refusing(), "pairs")
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenise.load(config.Data(**base), refusing(), "sft")
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenise.load(config.Data(**base), Refuses(make().fast, bos_token="<s>"), "pairs")
    # a copy of the file under another name is the same data
    copy = source(pairs(9), "copy.jsonl")
    tokenise.load(config.Data(**{**base, "source": copy}), refusing(), "pairs")


@pytest.mark.parametrize("damaged", ["json", "tokens.npy"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text", "removed"])
def test_a_damaged_cache_file_is_made_again(source, own_cache, damage, damaged):
    data = config.Data(source=source(pairs(9)))
    first = tokenise.load(data, make(), "pairs")[0]
    (file,) = own_cache.rglob(f"train.{damaged}")
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"x"}[damage])
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenise.load(data, refusing(), "pairs")
    assert tokenise.load(data, make(), "pairs")[0].fingerprint == first.fingerprint
    assert tokenise.load(data, refusing(), "pairs")[0].fingerprint == first.fingerprint


def test_tokens_are_mapped_from_the_cache_and_not_held_in_memory(source):
    data = config.Data(source=source(pairs(9)))
    for words in (make(), refusing()):
        found = tokenise.load(data, words, "pairs")[0]
        # a view of a file is what NumPy holds no memory of its own for
        assert not found.tokens.flags.owndata
        assert isinstance(found.tokens.base, np.memmap)


def long_rows(count):
    return [
        {"prompt": f"{i} " + "p" * 1800, "chosen": f"c{i} " + "c" * 300, "rejected": "r" * 300}
        for i in range(count)
    ]


@pytest.mark.parametrize(("kind", "held_out"), [("unpaired", 0), ("pairs", 10)])
def test_making_rows_holds_a_small_part_of_them(source, monkeypatch, kind, held_out):
    monkeypatch.setattr(encode, "CHUNK", 16)
    words, peaks, sizes = make(), [], []
    # what is imported and compiled the first time does not count
    for count in (40, 40, 400):
        path = source(long_rows(count), f"{count}.jsonl")
        monkeypatch.setenv("DPO_JAX_CACHE", f"{path}-{len(peaks)}")
        data = config.Data(source=path, held_out=held_out, max_length=4096)
        tracemalloc.start()
        found, _ = tokenise.load(data, words, kind)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(found.tokens.nbytes)
    grown = peaks[2] - peaks[1]
    assert sizes[2] - sizes[1] > 3_000_000 and grown < 0.1 * (sizes[2] - sizes[1])


def test_a_run_that_is_stopped_while_it_makes_rows_leaves_nothing_behind(source, own_cache):
    rows = [*pairs(3), {"prompt": "p"}]
    with pytest.raises(ValueError, match="rows.jsonl:4"):
        train(source(rows))
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_the_same_rows_give_the_same_ids_whatever_file_they_lie_in(source, tmp_path, suffix):
    plain = source(pairs(600))
    path = tmp_path / f"copy.{suffix}"
    if suffix == "parquet":
        table = pyarrow.Table.from_pylist(pairs(600))
        pyarrow.parquet.write_table(table, path, row_group_size=250)
    else:
        content = Path(plain).read_bytes()
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    found, expected = (train(str(one), "unpaired", held_out=20)[0] for one in (path, plain))
    assert found.fingerprint == expected.fingerprint and found.report == expected.report


def test_the_cache_may_lie_on_another_file_system(source, monkeypatch):
    monkeypatch.setenv("DPO_JAX_CACHE", "memory://tokenised-cache")
    data = config.Data(source=source(pairs(3)))
    first = tokenise.load(data, make(), "pairs")[0]
    assert tokenise.load(data, refusing(), "pairs")[0].fingerprint == first.fingerprint
    assert paths.listing("memory://tokenised-cache/tokenised/*/train.json")


def test_a_report_is_described_in_one_line():
    report = {
        "rows": 10,
        "dropped tie": 2,
        "cut prompts": 3,
        "cut completions": 0,
        "flipped labels": 1,
        "examples": 8,
    }
    expected = "10 rows gave 8 examples; dropped 2 tie; cut 3 prompts; flipped 1 labels"
    assert sides.describe(report) == expected


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "sft"])
def test_hh_adds_up_and_what_is_not_cut_decodes_to_its_transcripts(shared, kind):
    data = config.Data(
        source=str(shared / "data/hh_harmless_test.jsonl.gz"),
        tokenizer=str(shared / "tokenizers/neox-20b"),
        eos_token="<|endoftext|>",
        bad_rows="drop",
        max_length=4096,
    )
    words = tokenizer.load_tokenizer(data, None)
    found, _ = tokenise.load(data, words, kind)
    report = found.report
    drops = sum(count for name, count in report.items() if name.startswith("dropped"))
    assert report["rows"] == 300 and drops == report["dropped empty completion"] == 1
    assert report["examples"] == (598 if kind == "unpaired" else 299) == len(found.prompts)
    originals = set()
    for row in sources.read(data.source, data.split).items:
        originals |= {row["chosen"], row["rejected"]}
    for prompt, completions in texts(found, words):
        for name, completion in completions.items():
            assert completion.endswith("<|endoftext|>")
            if name != "mismatched":
                assert prompt + completion.removesuffix("<|endoftext|>") in originals


def test_judged_rows_add_up_and_fit_into_max_length(shared):
    data = config.Data(
        source=str(shared / "data/alpaca_eval_judged.jsonl.gz"),
        tokenizer=str(shared / "tokenizers/neox-20b"),
        eos_token="<|endoftext|>",
        max_length=256,
    )
    words = tokenizer.load_tokenizer(data, None)
    found, _ = tokenise.load(data, words, "pairs")
    drops = sum(count for name, count in found.report.items() if name.startswith("dropped"))
    assert found.report["dropped tie"] == 3 and found.report["examples"] + drops == 1610
    prompts = found.prompts[:, 1] - found.prompts[:, 0]
    completions = found.completions[:, :, 1] - found.completions[:, :, 0]
    assert (prompts[:, None] + completions).max() == 256 and completions.min() > 0
    ends = found.tokens[found.completions[:, :, 1] - 1]
    assert (ends != words.eos_id).sum() == found.report["cut completions"]
