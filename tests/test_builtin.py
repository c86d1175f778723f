"""The built-in task: rewards, corpus, prefixes, tokenizer and pairs."""

import collections
import itertools
import statistics

import pytest
import transformers

from dpo_jax.data import builtin, builtin_grammar


@pytest.fixture(scope="module")
def reviews():
    return builtin.corpus(4_000, 0)


@pytest.fixture(scope="module")
def rewards(reviews):
    return [builtin.reward("", review) for review in reviews]


@pytest.fixture(scope="module")
def tokenizer(reviews):
    return builtin.train_tokenizer(reviews, 1024)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was good .", 0.5),
        ("the plot was bad .", -0.75),
        ("the plot was very good .", 0.5 * 1.3),
        ("the plot was rather good .", 0.5 * 0.5),
        ("the plot was a bit bad .", -0.75 * 0.5),
        ("the plot was truly superb .", 1.0),
        ("the plot was utterly terrible .", -1.0),
        ("i loved the plot .", 1.0),
    ],
)
def test_strength_is_scaled_by_hedges_and_intensifiers_and_clipped(text, expected):
    assert builtin.reward("", text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was not bad .", 0.75 * 0.6),
        ("the plot was not very good .", -0.5 * 1.3 * 0.6),
        ("the jokes never made me laugh .", -0.75 * 0.6),
        ("i did not dislike the jokes .", 0.5 * 0.6),
        ("do not miss this film .", 0.75 * 0.6),
        ("this film is hardly worth the ticket .", -0.5 * 0.6),
    ],
)
def test_negation_flips_and_weakens_what_follows_it_in_the_clause(text, expected):
    assert builtin.reward("", text) == pytest.approx(expected, rel=1e-12)


def test_negation_ends_with_its_clause():
    text = "the plot was not good but the jokes were funny ."
    assert builtin.reward("", text) == pytest.approx((-0.3 + 0.5) / 2, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "the plot was superb but the jokes were bad .",
        "the plot was superb , but the jokes were bad .",
        "although the plot was superb , the jokes were bad .",
        "the plot was superb . although the jokes were bad .",
        "the plot was superb . the jokes were bad .",
    ],
)
def test_clauses_are_averaged_whatever_separates_them(text):
    assert builtin.reward("", text) == pytest.approx((1.0 - 0.75) / 2, rel=1e-12)


def test_polar_words_of_one_clause_add_up():
    text = "the plot was fine and good ."
    assert builtin.reward("", text) == pytest.approx(0.75, rel=1e-12)


def test_neutral_clauses_are_left_out_of_the_mean():
    text = "last night i watched this film with anna . for me , the plot was good ."
    assert builtin.reward("", text) == pytest.approx(0.5, rel=1e-12)


def test_prompt_and_completion_are_read_as_one_text():
    assert builtin.reward("the plot was not", " bad . i loved it .") == pytest.approx(
        0.725, rel=1e-12
    )


def test_order_of_the_clauses_makes_no_difference():
    parts = [
        "the plot was not very good .",
        "the songs never bored me .",
        "the acting was very good .",
    ]
    texts = [" ".join(order) for order in itertools.permutations(parts)]
    assert len({builtin.reward("", text) for text in texts}) == 1


def test_repeated_clause_counts_zero():
    assert builtin.reward("", "the plot was good . the plot was good .") == pytest.approx(0.25)
    once = "i loved the songs . my uncle told me about this film ."
    assert builtin.reward("", once) == 1.0
    assert builtin.reward("", f"{once} my uncle told me about this film .") == 0.5


@pytest.mark.parametrize(
    "gibberish",
    [
        "superb superb superb superb .",
        "the superb was plot .",
        "the plot was marvellous .",
        "superb .",
        ".",
        "the plot was superb and .",
        "it is an great film .",
        "I LOVED IT .",
        "it was a gem of the",
        "but",
    ],
)
def test_clause_that_the_grammar_cannot_write_draws_the_reward_to_zero(gibberish):
    assert builtin.reward("", gibberish) == 0.0
    assert builtin.reward("i loved the songs .", f" {gibberish}") == pytest.approx(0.5)
    assert builtin.reward("i loathed the songs .", f" {gibberish}") == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("", ""), ("the plot was", ""), ("the plot", " was superb"), ("", " "), ("", "\n\n")],
)
def test_empty_and_unfinished_texts_have_reward_zero(prompt, completion):
    assert builtin.reward(prompt, completion) == 0.0


def test_dangling_contrast_and_stray_marks_count_zero():
    assert builtin.reward("", "i loved the songs . the plot was superb but") == pytest.approx(2 / 3)
    assert builtin.reward("", "i loved the songs ,") == pytest.approx(0.5)
    assert builtin.reward("", ". i loved the songs .") == pytest.approx(0.5)


def test_rewards_stay_within_bounds(rewards):
    assert min(rewards) == -1.0
    assert max(rewards) == 1.0
    assert builtin.reward("", "the plot was superb and brilliant .") == 1.0


def test_every_clause_of_the_corpus_parses_and_comes_once(reviews):
    for review in reviews:
        clauses = [clause.strip() for clause in builtin.CLAUSE_END.split(review)]
        assert clauses[-1] == ""
        first = 1 if review.startswith("although") else 0
        assert len(set(clauses[first:-1])) == len(clauses[first:-1]), review
        for clause in clauses[first:-1]:
            assert builtin_grammar.parses(clause), clause


def test_corpus_is_a_function_of_its_seed(reviews):
    assert builtin.corpus(50, 0) == reviews[:50]
    assert not set(builtin.corpus(50, 1)) & set(reviews[:50])


def test_corpus_is_balanced_and_widely_spread(rewards):
    assert abs(statistics.mean(rewards)) < 0.03
    assert statistics.pstdev(rewards) > 0.4
    assert 0.4 < sum(reward > 0 for reward in rewards) / len(rewards) < 0.6
    assert sum(reward == 0 for reward in rewards) / len(rewards) < 0.05


def test_corpus_rarely_repeats_and_varies_in_length(reviews):
    assert len(set(reviews)) / len(reviews) > 0.98
    lengths = [len(review.split(" ")) for review in reviews]
    assert min(lengths) == 8
    assert max(lengths) == 45
    assert statistics.pstdev(lengths) > 7
    assert len(set(" ".join(reviews).split())) > 400


def test_reviews_are_lower_case_words_with_single_spaces(reviews):
    for review in reviews:
        assert review == " ".join(review.lower().split())
        assert review[-2:] in (" .", " !")


def test_prefixes_are_short_distinct_and_a_function_of_the_seed():
    found = builtin.prefixes(2_000, 0)
    assert len(set(found)) == 2_000
    assert {len(prefix.split()) for prefix in found} == set(range(2, 9))
    assert builtin.prefixes(100, 0) == found[:100]
    assert builtin.prefixes(100, 1) != found[:100]


def test_prefixes_come_from_other_reviews_than_the_corpus():
    same = [
        builtin.corpus(1, seed)[0].startswith(builtin.prefixes(1, seed)[0]) for seed in range(10)
    ]
    assert sum(same) < 3


def test_excluded_prefixes_do_not_come_back():
    first = builtin.prefixes(300, 0)
    assert not set(first) & set(builtin.prefixes(300, 0, exclude=first))


def test_more_prefixes_than_the_grammar_has_are_refused(monkeypatch):
    monkeypatch.setattr(builtin, "PREFIX_WORDS", (1, 1))
    with pytest.raises(ValueError, match="of 200; ask for fewer"):
        builtin.prefixes(200, 0)


def test_prefixes_hold_no_polar_word():
    words = {word for prefix in builtin.prefixes(1_000, 3) for word in prefix.split()}
    assert not words & set(builtin_grammar.STRENGTHS)


def test_both_sentiments_follow_a_prefix():
    rewards = collections.defaultdict(list)
    found = [prefix for prefix in builtin.prefixes(3_000, 0) if len(prefix.split()) == 3]
    starts = set(found)
    for review in builtin.corpus(12_000, 5):
        start = " ".join(review.split()[:3])
        if start in starts:
            rewards[start].append(builtin.reward("", review))
    common = [values for values in rewards.values() if len(values) >= 15]
    assert len(common) > 50
    open_ones = [
        values
        for values in common
        if statistics.pstdev(values) > 0.15 and min(values) < 0 < max(values)
    ]
    assert len(open_ones) / len(common) > 0.95


def test_tokenizer_restores_every_text(tokenizer, reviews):
    unseen = ["a quite unknown Word , naïve 😀 text", *builtin.corpus(200, 9)]
    for text in [*reviews[:200], *unseen]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_prefix_and_completion_are_tokenised_as_the_whole_text_is(tokenizer, reviews):
    for review in reviews[:200]:
        words = review.split(" ")
        prompt, completion = " ".join(words[:4]), " " + " ".join(words[4:])
        parts = [
            *tokenizer.encode(prompt).ids,
            *tokenizer.encode(completion, add_special_tokens=False).ids,
        ]
        assert parts == tokenizer.encode(review).ids


def test_tokenizer_has_its_special_tokens_and_adds_bos_once(tokenizer):
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 1024
    ids = tokenizer.encode("the plot was good .").ids
    assert ids[0] == 1
    assert not set(ids[1:]) & {0, 1, 2}


def test_most_reviews_take_little_more_than_a_token_a_word(tokenizer, reviews):
    tokens = sum(len(tokenizer.encode(review).ids) - 1 for review in reviews[:500])
    words = sum(len(review.split()) for review in reviews[:500])
    assert tokens / words < 1.3


def test_same_texts_give_the_same_tokenizer_file(tmp_path, reviews):
    for name in ("one", "two"):
        builtin.write_tokenizer(tmp_path / name, reviews, 512)
    one, two = (tmp_path / name / "tokenizer.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_transformers_loads_the_tokenizer_folder(tmp_path, reviews):
    written = builtin.write_tokenizer(tmp_path, reviews, 512)
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert len(loaded) == 512
    assert loaded.clean_up_tokenization_spaces is False
    ids = loaded(reviews[0])["input_ids"]
    assert ids == written.encode(reviews[0]).ids
    assert loaded.decode(ids, skip_special_tokens=True) == reviews[0]


def test_vocabulary_that_cannot_hold_the_bytes_is_refused(reviews):
    with pytest.raises(ValueError, match="vocabulary_size is 100; it must be >= 259"):
        builtin.train_tokenizer(reviews, 100)


COMPLETIONS = [" was good .", " was bad .", " was superb .", " was fine .", " was bad .", ""]


def test_all_pairs_of_distinct_completions_are_ranked_by_reward():
    rows = builtin.rank_pairs("the plot", COMPLETIONS, None)
    assert len(rows) == 6
    assert {(row["chosen"], row["rejected"]) for row in rows} == {
        (" was superb .", " was good ."),
        (" was superb .", " was fine ."),
        (" was superb .", " was bad ."),
        (" was good .", " was fine ."),
        (" was good .", " was bad ."),
        (" was fine .", " was bad ."),
    }
    for row in rows:
        assert row["prompt"] == "the plot"
        assert row["reward_chosen"] == builtin.reward("the plot", row["chosen"])
        assert row["reward_rejected"] == builtin.reward("the plot", row["rejected"])
        assert row["reward_chosen"] > row["reward_rejected"]


def test_chosen_number_of_pairs_is_drawn_by_the_generator():
    everything = builtin.rank_pairs("the plot", COMPLETIONS, None)
    widest = builtin.rank_pairs("the plot", COMPLETIONS, 2)
    assert [(row["chosen"], row["rejected"]) for row in widest] == [
        (" was superb .", " was bad ."),
        (" was good .", " was bad ."),
    ]
    assert all(row in everything for row in widest)


def test_completions_of_equal_reward_make_no_pair():
    completions = [" was good .", " was solid .", " was pleasant ."]
    assert builtin.rank_pairs("the plot", completions, None) == []


def test_three_of_different_rewards_are_ranked_best_first_or_there_are_none():
    rewards = builtin.judge("the plot", COMPLETIONS)
    three = builtin.rank_three("the plot", COMPLETIONS)
    found = [rewards[completion] for completion in three]
    assert found[0] == max(rewards.values()) and found[2] == min(rewards.values())
    assert found[0] > found[1] > found[2]
    best, worst = three[0], three[2]
    assert builtin.rank_three("the plot", [best, worst, best, " "]) == []
