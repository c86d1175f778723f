"""The built-in task: film reviews from a grammar, their tokenizer, and the ground-truth reward.

The controlled-sentiment experiment of the DPO paper (https://arxiv.org/abs/2305.18290, Fig. 2
left), with a corpus whose sentiment is computed instead of judged. A review is lower-case, its
words and marks are separated by single spaces. A prompt is a review's first words, a completion the
rest of the text with the space before it, so that `prompt + completion` is the text.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Collection, Iterable
from typing import TypedDict

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dpo_jax.data import builtin_grammar

# Part of content hashes: goes up with every change of the grammar, the reward or the tokenizer.
VERSION = 3
# Fewest and most words and marks of a review, and of a prefix.
REVIEW_WORDS = (8, 45)
PREFIX_WORDS = (2, 8)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# What parts clauses: a contrast word with the mark before it, or a mark.
CLAUSE_END = re.compile(r"(?:^|(?<= ))(?:(?:[.,!] )?(?:but|although)|[.,!])(?= |$)")
SAME_TWICE = re.compile(r"\b(\w+) and (?:an? )?\1\b")
CORPUS_STREAM, PREFIX_STREAM = 0, 1


class Pair(TypedDict):
    """A preference row, with the ground-truth rewards that ranked it."""

    prompt: str
    chosen: str
    rejected: str
    reward_chosen: float
    reward_rejected: float


def reward(prompt: str, completion: str) -> float:
    """Ground-truth sentiment of the whole text `prompt + completion`, in [-1, 1].

    The text is cut into clauses at marks and at "but" and "although". A polar word counts its
    strength (0.25 to 1, with its sign), times 1.3 for an intensifier and 0.5 for a hedge directly
    before it, times -0.6 for each "not", "never" or "hardly" earlier in its clause. A clause is the
    sum of its polar words, clipped to [-1, 1]. The reward is the mean over the clauses that have a
    polar word.

    A clause that the grammar cannot write, one that was said before, an empty one and an unfinished
    last one count 0 in that mean, so that gibberish and repetition draw the reward to 0. A text
    without any such clause has reward 0.
    """
    text = " ".join((prompt + completion).split())
    *clauses, _ = (part.strip() for part in CLAUSE_END.split(text))
    if text.startswith("although "):
        clauses = clauses[1:]
    scores, said = [], set()
    for clause in clauses:
        polarities = builtin_grammar.polarities(clause.split())
        if clause in said or not builtin_grammar.parses(clause):
            scores.append(0.0)
        elif polarities:
            scores.append(min(1.0, max(-1.0, sum(polarities))))
        said.add(clause)
    if not text.endswith((" .", " !")):
        scores.append(0.0)
    # Rounded, so that the order of the clauses makes no difference that would rank a pair.
    return round(sum(scores) / len(scores), 9) if scores else 0.0


def write_judged(slot: str, topic: str, sign: int, rng: np.random.Generator) -> str:
    """A random clause whose polar words all say the sign, none of them twice."""
    while True:
        words = builtin_grammar.write(slot, topic, rng)
        polar = [word for word in words if word in builtin_grammar.STRENGTHS]
        if len(set(polar)) == len(polar) and all(
            value * sign > 0 for value in builtin_grammar.polarities(words)
        ):
            return " ".join(words)


def write_neutral(slot: str, rng: np.random.Generator) -> str:
    """A sentence without sentiment, in which nobody comes twice."""
    while True:
        text = " ".join(builtin_grammar.write(slot, "story", rng))
        if not SAME_TWICE.search(text):
            return f"{text} ."


def write_sentence(
    topics: list[str], leaning: float, *, last: bool, rng: np.random.Generator
) -> str:
    """One or two judged clauses; takes their topics off the list. A last one may be a verdict."""

    def clause(sign: int, *, last: bool) -> str:
        topic = topics.pop()
        draw = rng.random()
        slot = "verdict" if last and draw < 0.5 else "judgement"
        if topic == "acting" and draw > 0.7:
            slot = "portrait"
        return write_judged(slot, topic, sign, rng)

    draw = rng.random()
    if draw < 0.25 and len(topics) > 1:
        sign = 1 if rng.random() < 0.5 else -1
        first, second = clause(sign, last=False), clause(-sign, last=last)
        if draw < 0.1:
            text = f"although {first} , {second}"
        else:
            text = f"{first} {', but' if draw < 0.17 else 'but'} {second}"
    else:
        text = clause(1 if rng.random() < leaning else -1, last=last)
        if draw > 0.88:
            text = f"{' '.join(builtin_grammar.write('remark', 'story', rng))} , {text}"
    return f"{text} {'!' if 'what a' in text else '.'}"


def write_review(rng: np.random.Generator) -> str:
    """A random review of one to four sentences, without a repeated clause.

    Its clauses follow the review's leaning by chance.
    """
    names = list(builtin_grammar.TOPICS)
    while True:
        leaning = rng.beta(0.5, 0.5)
        count = 1 + int(np.searchsorted([0.1, 0.4, 0.75], rng.random()))
        topics = [names[number] for number in rng.permutation(len(names))]
        sentences, described = [], False
        for number in range(count):
            opens, last = number == 0 and count > 1, number == count - 1
            draw = rng.random()
            if opens and draw < 0.4:
                sentences.append(write_neutral("visit", rng))
            elif opens and draw < 0.6 or not opens and not last and not described and draw < 0.25:
                sentences.append(write_neutral("introduction" if opens else "fact", rng))
                described = True
            else:
                sentences.append(write_sentence(topics, leaning, last=last, rng=rng))
        text = " ".join(sentences)
        clauses = [part for part in map(str.strip, CLAUSE_END.split(text)) if part]
        fits = REVIEW_WORDS[0] <= text.count(" ") + 1 <= REVIEW_WORDS[1]
        if fits and len(set(clauses)) == len(clauses):
            return text


def corpus(count: int, seed: int) -> list[str]:
    """The first `count` reviews of the seed's corpus."""
    rng = np.random.default_rng((seed, CORPUS_STREAM))
    return [write_review(rng) for _ in range(count)]


def prefixes(count: int, seed: int, *, exclude: Collection[str] = ()) -> list[str]:
    """Distinct beginnings of further reviews, 2 to 8 words each, none of them in `exclude`.

    The reviews come from a random stream that is not the corpus's. A prefix ends before the first
    polar word, so that both sentiments remain possible. The first `count` prefixes are the same
    whatever the count is. Raises ValueError when there are too few.
    """
    rng = np.random.default_rng((seed, PREFIX_STREAM))
    excluded, found = set(exclude), {}
    shortest, longest = PREFIX_WORDS
    for _ in range(1_000 + 50 * count):
        if len(found) == count:
            return list(found)
        words = write_review(rng).split()
        words = words[: int(rng.integers(shortest, longest + 1))]
        polar = (number for number, word in enumerate(words) if word in builtin_grammar.STRENGTHS)
        words = words[: next(polar, longest)]
        prefix = " ".join(words)
        if len(words) >= shortest and prefix not in excluded:
            found[prefix] = None
    raise ValueError(
        f"the grammar gave only {len(found)} distinct prefixes of {count}; ask for fewer"
    )


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer trained on the texts.

    <pad> is 0, <s>, which it puts before every text, 1, and </s> 2. It has `vocabulary_size`
    tokens, or fewer if the texts have no more pairs to merge. Raises ValueError when
    the 256 bytes and the special tokens do not fit.
    """
    special, alphabet = [PAD, BOS, EOS], sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(special) + len(alphabet)
    if vocabulary_size < smallest:
        raise ValueError(f"vocabulary_size is {vocabulary_size}; it must be >= {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write_tokenizer(
    folder: str | pathlib.Path, texts: Iterable[str], vocabulary_size: int
) -> tokenizers.Tokenizer:
    """Trains a tokenizer and writes it to a folder that transformers' AutoTokenizer loads."""
    tokenizer = train_tokenizer(texts, vocabulary_size)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


def judge(prompt: str, completions: Iterable[str]) -> dict[str, float]:
    """The rewards of a prompt's completions, repeated ones once and empty ones not at all."""
    return {
        completion: reward(prompt, completion) for completion in completions if completion.strip()
    }


def rank_three(prompt: str, completions: Iterable[str]) -> list[str]:
    """The best, a middle and the worst of a prompt's completions, of different rewards; none where
    there are no three.
    """
    by_reward = {value: text for text, value in judge(prompt, completions).items()}
    order = sorted(by_reward, reverse=True)
    if len(order) < 3:
        return []
    return [by_reward[order[place]] for place in (0, len(order) // 2, -1)]


def rank_pairs(
    prompt: str,
    completions: Iterable[str],
    pairs_per_prefix: int | None,
) -> list[Pair]:
    """Preference rows of a prompt's completions.

    A pair is two completions of different reward, the better one chosen. The `pairs_per_prefix`
    pairs of the widest gap between the two rewards are taken; None, or more than there are: all.
    """
    rewards = judge(prompt, completions)
    pairs = [
        pair for pair in itertools.combinations(rewards, 2) if rewards[pair[0]] != rewards[pair[1]]
    ]
    pairs.sort(key=lambda pair: -abs(rewards[pair[0]] - rewards[pair[1]]))
    rows = []
    for pair in pairs[:pairs_per_prefix]:
        rejected, chosen = sorted(pair, key=rewards.__getitem__)
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "reward_chosen": rewards[chosen],
                "reward_rejected": rewards[rejected],
            }
        )
    return rows
