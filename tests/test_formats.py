import collections
import gzip
import json

import pytest

from dpo_jax import config
from dpo_jax.data import formats, sources, transcripts

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
UNPAIRED = {"prompt": "p", "completion": "c", "label": True}
TRIPLE = {**PAIR, "gold": "g"}
RANKED = {"prompt": "p", "completions": ["a", "b", "c"]}
JUDGED = {"instruction": "i", "output_1": "one", "output_2": "two", "preference": 1.2}


def rows_of(*rows):
    return sources.Rows(list(rows), lambda i: f"rows.jsonl:{i + 1}")


def examples(rows, data, kind):
    """All of them, and the drops."""
    drops = collections.Counter()
    return list(formats.examples(rows, data, kind, drops)), dict(drops)


def one(row, kind="pairs", **fields):
    found, drops = examples(rows_of(row), config.Data(**fields), kind)
    assert not drops and len(found) == 1
    return found[0]


def hh(*turns):
    return "".join(f"\n\n{role}:{text}" for role, text in turns)


def message_of(row, kind="pairs", **fields):
    with pytest.raises(ValueError) as error:
        examples(rows_of(PAIR if "chosen" in row else row, row), config.Data(**fields), kind)
    return str(error.value)


def test_a_pair_of_strings_is_taken_as_it_stands():
    example = one({"prompt": "Q:", "chosen": " yes", "rejected": " no ", "more": 1})
    expected = ("Q:", {"chosen": " yes", "rejected": " no "}, None, "rows.jsonl:1", None)
    assert example == expected


def test_a_pair_of_messages_stays_messages_and_its_strings_become_messages():
    expected = ([USER], {"chosen": [GOOD], "rejected": [BAD]}, None, "rows.jsonl:1", None)
    assert one({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}) == expected
    assert one({"prompt": [USER], "chosen": "good", "rejected": "bad"}) == expected
    assert one({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}) == expected


def test_null_fields_that_a_table_adds_to_messages_are_left_out():
    padded = {**USER, "tool_calls": None}
    assert one({"prompt": [padded], "chosen": [GOOD], "rejected": [BAD]}).prompt == [USER]


def test_the_prompt_of_hh_transcripts_is_the_common_turns_and_the_marker_of_the_next():
    common = [("Human", " a"), ("Assistant", " b"), ("Human", " c")]
    chosen = hh(*common, ("Assistant", " well done"))
    rejected = hh(*common, ("Assistant", " well, no"))
    example = one({"chosen": chosen, "rejected": rejected})
    assert example.prompt == hh(*common) + "\n\nAssistant:"
    assert example.completions == {"chosen": " well done", "rejected": " well, no"}


def test_answers_that_begin_with_the_same_words_keep_them():
    shared_words = " I am sorry, but I cannot"
    chosen = hh(("Human", " q"), ("Assistant", f"{shared_words} help."))
    rejected = hh(("Human", " q"), ("Assistant", f"{shared_words} say."))
    example = one({"chosen": chosen, "rejected": rejected})
    assert example.prompt == "\n\nHuman: q\n\nAssistant:"
    assert example.completions["chosen"] == f"{shared_words} help."
    assert example.completions["rejected"] == f"{shared_words} say."


def test_an_answer_that_is_the_beginning_of_the_other_is_whole():
    chosen = hh(("Human", " q"), ("Assistant", " yes"))
    example = one({"chosen": chosen, "rejected": chosen + " and no"})
    assert example.completions == {"chosen": " yes", "rejected": " yes and no"}


def test_a_second_assistant_turn_after_the_parting_belongs_to_the_completion():
    chosen = hh(("Human", " q"), ("Assistant", " a"), ("Assistant", " b"))
    rejected = hh(("Human", " q"), ("Assistant", " c"))
    example = one({"chosen": chosen, "rejected": rejected})
    assert example.completions == {"chosen": " a\n\nAssistant: b", "rejected": " c"}


def test_transcripts_of_which_one_goes_on_part_at_their_last_common_answer():
    shorter = hh(("Human", " q"), ("Assistant", " a"))
    example = one({"chosen": shorter + "\n\nAssistant: b", "rejected": shorter})
    assert example.prompt == "\n\nHuman: q\n\nAssistant:"
    assert example.completions == {"chosen": " a\n\nAssistant: b", "rejected": " a"}


def test_text_before_the_first_turn_is_part_of_the_prompt():
    chosen = "Be kind." + hh(("Human", " q"), ("Assistant", " a"))
    rejected = "Be kind." + hh(("Human", " q"), ("Assistant", " b"))
    example = one({"chosen": chosen, "rejected": rejected})
    assert example.prompt == "Be kind.\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([("Human", " q"), ("Assistant", "")], [("Human", " q"), ("Assistant", " a")], "empty"),
        ([("Human", " q"), ("Assistant", " \n")], [("Human", " q"), ("Assistant", " a")], "empty"),
        ([("Human", " q"), ("Assistant", " a")], [("Human", " z"), ("Assistant", " a")], "parted"),
        (
            [("Human", " q"), ("Assistant", " a"), ("Human", " more")],
            [("Human", " q"), ("Assistant", " b")],
            "parted",
        ),
        (
            [("Human", " q"), ("Assistant", " a"), ("Human", " z"), ("Assistant", " b")],
            [("Human", " q"), ("Assistant", " a")],
            "parted",
        ),
        ([("Human", " q")], [("Human", " q"), ("Assistant", " a")], "not a transcript"),
        ([("Human", " q"), ("Assistant", " a")], [("Human", " q"), ("Assistant", " a")], "equal"),
    ],
)
def test_odd_transcripts_are_bad_rows_counted_by_reason(chosen, rejected, reason):
    rows = rows_of({"chosen": hh(*chosen), "rejected": hh(*rejected)})
    with pytest.raises(ValueError, match="^rows.jsonl:1: .*--data.bad-rows drop"):
        examples(rows, config.Data(), "pairs")
    found, drops = examples(rows, config.Data(bad_rows="drop"), "pairs")
    assert found == [] and list(drops.values()) == [1] and reason in next(iter(drops))


def test_message_transcripts_part_after_their_common_messages_and_need_no_prompt_field():
    follow_up = {"role": "user", "content": "more"}
    expected = [USER, GOOD, follow_up], {"chosen": [GOOD], "rejected": [BAD]}
    row = {"chosen": [USER, GOOD, follow_up, GOOD], "rejected": [USER, GOOD, follow_up, BAD]}
    assert one(row)[:2] == expected
    assert one({**row, "prompt": "hi"})[:2] == expected


def test_message_transcripts_that_share_no_message_have_no_prompt():
    rows = rows_of({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]})
    with pytest.raises(ValueError, match="no common prompt"):
        examples(rows, config.Data(), "pairs")


def test_transcripts_of_unlike_types_are_refused():
    rows = rows_of({"chosen": [USER, GOOD], "rejected": "\n\nHuman: hi\n\nAssistant: bad"})
    with pytest.raises(ValueError, match="'chosen' is of type list and 'rejected' of type str"):
        examples(rows, config.Data(), "pairs")


@pytest.mark.parametrize(
    ("preference", "chosen"),
    [(1, "one"), (1.0, "one"), (1.4999, "one"), (1.5001, "two"), (2, "two")],
)
def test_a_judged_row_prefers_output_1_below_one_and_a_half_and_output_2_above(preference, chosen):
    example = one({**JUDGED, "preference": preference})
    assert example.prompt == "i\n\n"
    assert example.completions["chosen"] == chosen
    assert set(example.completions.values()) == {"one", "two"}


def test_the_input_of_a_judged_row_follows_its_instruction():
    assert one({**JUDGED, "input": "x"}).prompt == "i\n\nx\n\n"
    assert one({**JUDGED, "input": ""}).prompt == "i\n\n"


def test_ties_are_left_out_and_counted_and_are_no_bad_rows():
    rows = rows_of(JUDGED, *({**JUDGED, "preference": tie} for tie in (1.5, 0, 0.0)))
    found, drops = examples(rows, config.Data(bad_rows="error"), "pairs")
    assert len(found) == 1 and drops == {"tie": 3}


@pytest.mark.parametrize("value", [3, -1, 0.5, "output_1", None, True, float("nan")])
def test_an_unknown_preference_is_refused(value):
    message = message_of({**JUDGED, "preference": value})
    assert "rows.jsonl:1: field 'preference' is " in message and "drop" in message
    assert ("null" if value is None else repr(value)) in message


def test_an_unpaired_row_keeps_its_label():
    example = one({**UNPAIRED, "label": False}, "unpaired")
    assert example == ("p", {"completion": "c"}, False, "rows.jsonl:1", None)


def test_a_pair_gives_a_desirable_and_an_undesirable_example_of_the_same_row():
    found, _ = examples(rows_of(PAIR), config.Data(), "unpaired")
    assert found == [
        ("p", {"completion": "c"}, True, "rows.jsonl:1", None),
        ("p", {"completion": "r"}, False, "rows.jsonl:1", None),
    ]


def test_sft_takes_text_and_chosen_sides_and_desirable_rows():
    assert one({"text": "t"}, "sft")[:3] == ("", {"completion": "t"}, None)
    assert one({"prompt": "p", "completion": "c"}, "sft")[:3] == ("p", {"completion": "c"}, None)
    assert one(PAIR, "sft")[:3] == ("p", {"completion": "c"}, None)
    rows = rows_of(UNPAIRED, {**UNPAIRED, "label": False})
    found, drops = examples(rows, config.Data(), "sft")
    assert [example.where for example in found] == ["rows.jsonl:1"] and drops == {"undesirable": 1}


def test_sft_of_messages_takes_the_assistants_answer():
    example = one({"prompt": [USER], "completion": [GOOD]}, "sft")
    assert example[:2] == ([USER], {"completion": [GOOD]})


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (UNPAIRED, "pairs"),
        ({"text": "t"}, "pairs"),
        ({"text": "t"}, "unpaired"),
        ({"prompt": "p", "completion": "c"}, "unpaired"),
    ],
)
def test_a_kind_that_a_form_cannot_give_is_refused(row, kind):
    with pytest.raises(ValueError) as error:
        examples(rows_of(row), config.Data(), kind)
    for part in ("rows.jsonl:1", f"kind {kind!r}", "data.examples", "rows of form pairs"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (PAIR, "pairs"),
        ({"chosen": "x", "rejected": "y"}, "transcripts"),
        ({"prompt": "p", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "transcripts"),
        ({"prompt": "p", "chosen": [GOOD], "rejected": [BAD]}, "pairs"),
        (UNPAIRED, "unpaired"),
        (JUDGED, "judged"),
        (TRIPLE, "triples"),
        (RANKED, "ranked"),
        ({"text": "t"}, "text"),
        ({"prompt": "p", "completion": "c"}, "text"),
    ],
)
def test_the_form_is_recognised_from_the_first_row(row, form):
    assert formats.form_of(rows_of(row, {"unlike": 1}), config.Data()) == form


@pytest.mark.parametrize(
    ("row", "forms"),
    [
        ({**PAIR, "chosen": "\n\nHuman: a\n\nAssistant: b"}, ("pairs", "transcripts")),
        ({**PAIR, **JUDGED}, ("pairs", "judged")),
        ({"text": "t", **UNPAIRED}, ("unpaired", "text")),
    ],
)
def test_two_forms_that_fit_have_to_be_chosen_from(row, forms):
    with pytest.raises(ValueError) as error:
        formats.form_of(rows_of(row), config.Data())
    for form in forms:
        assert f"--data.form {form}" in str(error.value)
    assert formats.form_of(rows_of(row), config.Data(form="pairs")) == "pairs"


def test_no_form_that_fits_lists_the_fields_and_the_forms():
    with pytest.raises(ValueError) as error:
        formats.form_of(rows_of({"question": "q", "best": "b"}), config.Data())
    for part in ("question, best", *formats.PARSERS):
        assert part in str(error.value)


def test_a_triple_has_a_gold_completion_and_gives_a_pair_too():
    assert one(TRIPLE, "triples").completions == {"gold": "g", "chosen": "c", "rejected": "r"}
    assert one(TRIPLE, "pairs").completions == {"chosen": "c", "rejected": "r"}
    messages = {**TRIPLE, "prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "gold": [GOOD]}
    assert one(messages, "triples").completions["gold"] == [GOOD]
    assert one({**messages, "gold": "good"}, "triples").completions["gold"] == [GOOD]
    assert one({**TRIPLE, "gold": [GOOD]}, "triples").completions["chosen"] == [
        {"role": "assistant", "content": "c"}
    ]
    # a field of another meaning
    assert formats.form_of(rows_of({**PAIR, "gold": 0.3}), config.Data()) == "pairs"


def test_ranked_completions_are_best_first_or_in_the_order_of_their_scores():
    named = {"completion_0": "a", "completion_1": "b", "completion_2": "c"}
    assert one(RANKED, "ranked").completions == named
    scored = {**RANKED, "completions": ["b", "c", "a"], "scores": [0.5, -1, 2]}
    assert one(scored, "ranked").completions == named
    chat = one({**RANKED, "completions": ["a", [GOOD]]}, "ranked")
    assert chat.prompt == [{"role": "user", "content": "p"}]
    assert chat.completions == {
        "completion_0": [{"role": "assistant", "content": "a"}],
        "completion_1": [GOOD],
    }


@pytest.mark.parametrize(
    ("kind", "row", "reason", "parts"),
    [
        ("triples", {**TRIPLE, "gold": " "}, "empty completion", ["'gold'", "' '"]),
        ("triples", {**TRIPLE, "gold": "r"}, "gold equal to rejected", ["'r'"]),
        ("triples", {**TRIPLE, "gold": [USER]}, "completion not the assistant's", ["'gold'"]),
        ("ranked", {**RANKED, "completions": ["a"]}, "number of completions", ["1 of them"]),
        ("ranked", {**RANKED, "completions": list("abcdefghijk")}, "number of completions", ["11"]),
        ("ranked", {**RANKED, "completions": "abc"}, "wrong type", ["'completions' is 'abc'"]),
        (
            "ranked",
            {**RANKED, "completions": ["a", "b"]},
            "another number of completions",
            ["2 of them", "first row 3"],
        ),
        (
            "ranked",
            {**RANKED, "completions": ["a", "b", "a"]},
            "equal completions",
            ["completions[0] and completions[2]", "'a'"],
        ),
        (
            "ranked",
            {**RANKED, "completions": ["a", "", "c"]},
            "empty completion",
            ["'completions[1]'"],
        ),
        ("ranked", {**RANKED, "scores": [1, 2, 2]}, "scores that do not rank", ["[1, 2, 2]"]),
        ("ranked", {**RANKED, "scores": [1, 2]}, "scores that do not rank", ["3 completions"]),
        ("ranked", {**RANKED, "scores": [1, 2, "x"]}, "wrong type", ["'scores[2]' is 'x'"]),
        (
            "unpaired",
            {**UNPAIRED, "density_ratio": 2.0},
            "density_ratio in some rows",
            ["'density_ratio' is 2.0", "first row None"],
        ),
        (
            "unpaired",
            {**UNPAIRED, "density_ratio": -1},
            "density_ratio not positive",
            ["'density_ratio' is -1"],
        ),
    ],
)
def test_a_row_of_a_further_form_that_cannot_be_used_is_an_error_or_counted(
    kind, row, reason, parts
):
    good = {"triples": TRIPLE, "ranked": RANKED, "unpaired": UNPAIRED}[kind]
    with pytest.raises(ValueError) as error:
        examples(rows_of(good, row), config.Data(), kind)
    for part in ("rows.jsonl:2: ", "--data.bad-rows drop", *parts):
        assert part in str(error.value)
    found, drops = examples(rows_of(good, row), config.Data(bad_rows="drop"), kind)
    assert len(found) == 1 and drops == {reason: 1}


def test_a_density_ratio_is_kept():
    assert one({**UNPAIRED, "density_ratio": 3}, "unpaired").density_ratio == 3


@pytest.mark.parametrize(
    ("row", "reason", "parts"),
    [
        ({"prompt": "p", "chosen": "c"}, "missing field", ["'rejected' is missing"]),
        ({**PAIR, "chosen": None}, "missing field", ["'chosen' is null"]),
        ({**PAIR, "chosen": 7}, "wrong type", ["'chosen' is 7", "type int", "a string"]),
        ({**PAIR, "chosen": ["x"]}, "wrong type", ["chosen[0]", "type str", "an object"]),
        (
            {**PAIR, "chosen": [{"role": "assistant"}]},
            "missing field",
            ["message chosen[0]", "'content' is missing"],
        ),
        (
            {**PAIR, "chosen": [{"role": "assistant", "content": 3}]},
            "wrong type",
            ["message chosen[0]", "'content' is 3", "type int"],
        ),
        (
            {**PAIR, "chosen": [USER, GOOD]},
            "completion not the assistant's",
            ["'chosen'", "user, assistant", "--data.form transcripts"],
        ),
        ({**PAIR, "chosen": "r"}, "chosen equal to rejected", ["equal", "'r'"]),
        ({**PAIR, "rejected": " \n"}, "empty completion", ["'rejected'", "' \\n'"]),
        ({**PAIR, "rejected": []}, "empty completion", ["'rejected'", "[]"]),
    ],
)
def test_a_pair_that_cannot_be_used_is_an_error_or_counted(row, reason, parts):
    message = message_of(row, form="pairs")
    for part in ("rows.jsonl:2: ", "--data.bad-rows drop", *parts):
        assert part in message
    data = config.Data(form="pairs", bad_rows="drop")
    found, drops = examples(rows_of(PAIR, row), data, "pairs")
    assert len(found) == 1 and drops == {reason: 1}


@pytest.mark.parametrize(("label", "kind"), [(1, "int"), ("true", "str"), (0.0, "float")])
def test_a_label_that_is_no_bool_is_refused(label, kind):
    message = message_of({**UNPAIRED, "label": label}, "unpaired")
    for part in ("rows.jsonl:1", f"'label' is {label!r}", f"type {kind}", "true or false", "drop"):
        assert part in message
    rows = rows_of(UNPAIRED, {**UNPAIRED, "label": label})
    _, drops = examples(rows, config.Data(bad_rows="drop"), "unpaired")
    assert drops == {"label not a bool": 1}


def test_a_long_value_is_shortened_in_errors():
    message = message_of({**PAIR, "chosen": "x" * 999, "rejected": "x" * 999})
    assert "xxx...xxx" in message and len(message) < 300


def test_every_pair_of_hh_is_counted_and_gives_its_transcripts_back(shared):
    path = str(shared / "data" / "hh_harmless_train.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rows = sources.read(path, "train")
    found, drops = examples(rows, config.Data(bad_rows="drop"), "pairs")
    assert len(found) + sum(drops.values()) == len(lines) == 1500
    assert drops == {"empty completion": 2}
    for example in found:
        line = lines[int(example.where.rpartition(":")[2]) - 1]
        assert str(example.prompt).endswith("\n\nAssistant:")
        for name in ("chosen", "rejected"):
            completion = str(example.completions[name])
            assert str(example.prompt) + completion == line[name]
            assert "\n\nHuman:" not in completion


def test_hh_prompts_end_at_the_last_assistant_marker_and_answers_keep_common_first_words(shared):
    rows = sources.read(str(shared / "data" / "hh_harmless_train.jsonl.gz"), "train")
    found, _ = examples(rows, config.Data(bad_rows="drop"), "pairs")
    by_line = {example.where: example for example in found}
    seen = collections.Counter()
    for i in range(len(rows)):
        ends = {name: text.rfind("\n\nAssistant:") + 12 for name, text in rows[i].items()}
        if ends["chosen"] != ends["rejected"] or rows.where(i) not in by_line:
            seen["apart"] += 1
            continue
        example = by_line[rows.where(i)]
        assert example.prompt == rows[i]["chosen"][: ends["chosen"]]
        firsts = {str(text).split()[0] for text in example.completions.values()}
        seen["alike"] += len(firsts) == 1
    # 4 rows with repeated Assistant turns and 2 with an empty answer
    assert seen["apart"] == 6 and seen["alike"] > 0


def test_every_judged_row_is_counted_and_prefers_what_the_judge_does(shared):
    path = str(shared / "data" / "alpaca_eval_judged.jsonl.gz")
    rows = sources.read(path, "train")
    found, drops = examples(rows, config.Data(), "pairs")
    assert drops == {"tie": 3} and len(found) == 1607
    for example in found:
        row = rows[int(example.where.rpartition(":")[2]) - 1]
        better = "output_1" if row["preference"] - 1 < 2 - row["preference"] else "output_2"
        assert example.completions["chosen"] == row[better]


def test_turns_give_their_text_back():
    text = "before" + hh(("Human", " a\n\nb"), ("Assistant", ""), ("Assistant", " c "))
    turns = transcripts.turns_of(text, "chosen")
    assert [turn.role for turn in turns] == ["", "Human", "Assistant", "Assistant"]
    assert transcripts.render(turns) == text
