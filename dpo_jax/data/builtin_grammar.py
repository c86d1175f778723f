"""The words and clause forms of the built-in task's film reviews.

`write` walks the forms at random and writes a clause; `parses` asks whether a clause could have
been written so; `polarities` reads its sentiment. All three read the tables of this file.
"""

import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

INTENSIFIERS = dict.fromkeys(("very", "really", "truly", "utterly", "true", "complete"), 1.3)
HEDGES = dict.fromkeys(("rather", "somewhat", "fairly", "quite", "bit"), 0.5)
FACTORS = INTENSIFIERS | HEDGES
NEGATIONS = ("not", "never", "hardly")
NEGATION = -0.6

# Polar words by the slot of a clause that they fill, and by strength. "any" fits every topic.
ADJECTIVES = {
    "any": {
        0.25: "fine decent agreeable",
        0.5: "good solid charming pleasant",
        0.75: "great excellent lovely splendid impressive",
        -0.25: "thin ordinary uneven",
        -0.5: "weak poor flat clumsy dull",
        -0.75: "bad boring tedious annoying",
    },
    "acting": {
        0.5: "convincing natural memorable",
        0.75: "heartfelt",
        -0.5: "wooden stiff forgettable",
        -0.75: "lifeless",
    },
    "story": {
        0.5: "clever original intelligent",
        0.75: "gripping touching",
        -0.5: "predictable confusing silly",
        -0.75: "pointless absurd",
    },
    "humour": {0.5: "funny witty", 0.75: "hilarious", -0.5: "crude unfunny", -0.75: "childish"},
    "sound": {
        0.5: "haunting catchy",
        0.75: "beautiful",
        -0.25: "loud",
        -0.5: "repetitive",
        -0.75: "grating",
    },
    "image": {
        0.5: "stylish elegant",
        0.75: "gorgeous",
        -0.25: "murky",
        -0.5: "careless",
        -0.75: "ugly",
    },
    "talk": {0.5: "sincere lively", 0.75: "sparkling", -0.5: "clunky forced", -0.75: "hollow"},
    "pace": {
        0.25: "brisk",
        0.5: "tense energetic",
        0.75: "exciting",
        -0.25: "slow",
        -0.5: "rushed sluggish",
        -0.75: "endless",
    },
}
POLAR = {
    "extreme": {
        1.0: "superb brilliant wonderful flawless magnificent outstanding",
        -1.0: "terrible awful dreadful horrible unbearable atrocious",
    },
    "liked": {
        0.5: "liked",
        0.75: "enjoyed admired",
        1.0: "loved adored",
        -0.5: "disliked",
        -0.75: "hated",
        -1.0: "loathed despised",
    },
    "like": {0.5: "like", 0.75: "enjoy admire", 1.0: "love adore", -0.5: "dislike", -0.75: "hate"},
    "smile": {0.5: "smile", 0.75: "laugh cheer", -0.5: "sigh yawn", -0.75: "cringe groan"},
    "smiled": {
        0.5: "smiled",
        0.75: "laughed cheered",
        -0.5: "sighed yawned",
        -0.75: "cringed groaned",
    },
    "moved": {
        0.5: "amused charmed surprised",
        0.75: "moved fascinated delighted",
        -0.5: "bored confused annoyed",
        -0.75: "exhausted disappointed irritated",
    },
    "noun": {
        0.5: "treat success",
        0.75: "delight gem joy",
        1.0: "triumph masterpiece",
        -0.5: "bore chore letdown",
        -0.75: "mess failure disappointment",
        -1.0: "disaster catastrophe",
    },
    "gladly": {0.75: "gladly happily"},
    "recommend": {0.75: "recommend"},
    "worth": {0.5: "worth"},
    "asleep": {-0.75: "asleep"},
    "miss": {-0.75: "miss"},
    "skip": {-0.75: "skip", -1.0: "avoid"},
}

# Names of one thing and of several things, by topic.
TOPICS = {
    "acting": (
        "acting, cast, lead actor, lead actress, villain",
        "actors, performances, side characters",
    ),
    "story": (
        "plot, story, script, ending, premise, final twist",
        "twists, side plots, characters",
    ),
    "humour": ("humour, comic timing, slapstick", "jokes, gags, comic sketches"),
    "sound": ("music, score, soundtrack, sound design", "songs, sound effects, ballads"),
    "image": ("camera work, lighting, scenery, editing", "costumes, visual effects, sets, colours"),
    "talk": ("dialogue, narration, banter", "lines, conversations, speeches"),
    "pace": ("pacing, first half, second half, middle part", "action scenes, chases, dream scenes"),
}
NEUTRAL = {
    "be": "is, was",
    "is": "is, was, felt, seemed",
    "are": "are, were, felt, seemed",
    "no": "not, hardly",
    "seldom": "never, hardly",
    "degree": "very, really, rather, somewhat, fairly, quite",
    "utterly": "truly, utterly",
    "true": "true, complete",
    "film": "film, movie, picture",
    "it": "it, this film, this movie, this one",
    "kind": "comedy, drama, thriller, western, romance, mystery, musical, war film, crime film, "
    "horror film, family film, road movie, heist movie, space adventure",
    "decade": "thirties, forties, fifties, sixties, seventies, eighties, nineties",
    "time": "last night, yesterday, last week, two days ago, on sunday, on friday, on monday, "
    "this morning, last summer, last winter, on a rainy evening, a month ago, over the holidays",
    "saw": "saw, watched, finally saw, finally watched, went to see",
    "relative": "brother, sister, mother, father, uncle, aunt, cousin, wife, husband, son, "
    "daughter, neighbour, teacher, room mate",
    "company": "with my {relative}, with {name}, with {name} and {name}, with two friends, "
    "alone, at home, at the cinema, at a festival, on my laptop, in a full theatre",
    "name": "anna, ben, clara, david, ella, frank, grace, henry, iris, jack, kate, leo, maria, "
    "nina, oscar, paul, rosa, sam, tess, victor",
    "surname": "marlow, quinn, barlow, hartley, novak, lindgren, moreau, rossi, tanaka, okafor, "
    "ferreira, walsh, keller, santos",
    "role": "detective, doctor, farmer, painter, soldier, sailor, singer, thief, lawyer, teacher, "
    "pilot, widow, priest, waiter, journalist, gambler, dancer, butcher",
    "place": "paris, london, berlin, naples, lisbon, tokyo, chicago, dublin, a small village, "
    "a fishing town, a mountain hotel, the desert, the countryside, a haunted house, "
    "a military camp",
    "length": "ninety minutes, two hours, almost three hours, just over an hour",
    "audience": "anyone, everyone, my friends, my parents, fans of the genre, young children, "
    "families",
    "viewers": "most people, fans of the genre, young children, families, older viewers, "
    "my friends",
    "price": "your time, the ticket, the wait, every minute, the long drive",
    "part": "from start to finish, during the first half, during the second half, "
    "before the ending, more than once, all evening",
}
# Clauses and phrases. A form that is named twice is drawn twice as often.
FORMS = {
    "visit": """
        {time} i {saw} this {film} {company}
        {time} i {saw} this {kind} {company}
        i {saw} this {kind} {company}
        i {saw} this {film} {time}
        my {relative} picked this {kind} {time}
        my {relative} told me about this {film}""",
    "introduction": """
        this is {a} {kind} from the {decade}
        this {kind} is set in {place}
        this {kind} is about {a} {role} and {a} {role}
        {name} {surname} plays {a} {role} in this {kind}""",
    "fact": """
        the story follows {a} {role} and {a} {role} in {place}
        the {film} is set in {place}
        it was directed by {name} {surname}
        {name} {surname} plays the {role}
        the {film} runs for {length}
        it was shot in {place}""",
    "remark": """
        overall
        in the end
        on the whole
        in short
        to be fair
        for me""",
    "judgement": """
        the {one} {is} {quality}
        the {one} {is} {quality}
        the {one} {is} {quality} and {quality}
        the {one} {be} {denied}
        the {many} {are} {quality}
        the {many} {are} {quality}
        the {many} {are} {quality} and {quality}
        the {many} were {denied}
        i {liked} the {one}
        i {liked} the {many}
        i really {liked} the {many}
        i {seldom} {liked} the {one}
        i did not {like} the {many}
        the {one} {moved} me
        the {many} {seldom} {moved} me
        the {many} made me {smile}
        the {one} made me {smile}
        the {many} {seldom} made me {smile}
        it has {epithet} {many}""",
    "portrait": "{name} {surname} {be} {quality} as the {role}",
    "verdict": """
        {it} is {a} {epithet} {film}
        {it} is {a} {epithet} {film}
        what {a} {epithet} {film}
        {it} is {a} {noun}
        {it} was {a} {true} {noun}
        {it} is {no} {a} {noun}
        {it} {moved} me
        i {liked} {it}
        i did not {like} {it}
        i {smiled} {part}
        i fell {asleep} {part}
        i would {recommend} {it} to {audience}
        i would not {recommend} {it} to {audience}
        i would {gladly} watch {it} again
        {it} is {worth} {price}
        {it} is {no} {worth} {price}
        do not {miss} {it}
        i would not {miss} {it} for the world
        {skip} {it}
        {viewers} should {skip} {it}
        {viewers} will {like} {it}
        {viewers} will not {like} {it}""",
    "quality": """
        {good}
        {good}
        {bad}
        {bad}
        {degree} {good}
        {degree} {bad}
        a bit {bad}
        {extreme}
        {utterly} {extreme}""",
    "epithet": """
        {good}
        {bad}
        {degree} {good}
        {degree} {bad}
        {extreme}
        {utterly} {extreme}""",
    "denied": """
        {no} {good}
        {no} {bad}
        never {good}
        never {bad}
        not very {good}
        not very {bad}
        {no} {extreme}""",
}
CLAUSES = ("visit", "introduction", "fact", "remark", "judgement", "portrait", "verdict")

Rules = Mapping[str, tuple[tuple[str, ...], ...]]


def polar_words(table: Mapping[float, str], sign: int | None = None) -> list[str]:
    """The words of a table of strengths, of one sign or of both."""
    return [
        word
        for strength, words in table.items()
        if sign is None or strength * sign > 0
        for word in words.split()
    ]


STRENGTHS = {
    word: strength
    for table in (*ADJECTIVES.values(), *POLAR.values())
    for strength, words in table.items()
    for word in words.split()
}


def make_rules(topics: Iterable[str]) -> Rules:
    """Slot -> its alternatives, each a tuple of words and {slots}, for clauses about these topics.

    An adjective that fits the topic is drawn more often than one that fits every topic.
    """
    adjectives = [ADJECTIVES["any"], *(ADJECTIVES[topic] for topic in topics for _ in range(3))]
    alternatives = {name: polar_words(table) for name, table in POLAR.items()}
    alternatives["good"] = [word for table in adjectives for word in polar_words(table, 1)]
    alternatives["bad"] = [word for table in adjectives for word in polar_words(table, -1)]
    for number, name in enumerate(("one", "many")):
        alternatives[name] = [
            word for topic in topics for word in TOPICS[topic][number].split(", ")
        ]
    alternatives |= {name: words.split(", ") for name, words in NEUTRAL.items()}
    alternatives |= {name: forms.strip().splitlines() for name, forms in FORMS.items()}
    return {
        name: tuple(tuple(form.split()) for form in forms) for name, forms in alternatives.items()
    }


RULES = {topic: make_rules([topic]) for topic in TOPICS}


def write(slot: str, topic: str, rng: np.random.Generator) -> list[str]:
    """Words of a random filling of the slot, with the topic's words."""
    forms = RULES[topic][slot]
    words = []
    for part in forms[int(rng.random() * len(forms))]:
        if part == "{a}":
            words.append("a")
        elif part[0] == "{":
            filling = write(part[1:-1], topic, rng)
            if words and words[-1] == "a" and filling[0][0] in "aeiou":
                words[-1] = "an"
            words += filling
        else:
            words.append(part)
    return words


@functools.cache
def clause_pattern() -> re.Pattern[str]:
    """A regular expression that matches the clauses of the grammar and nothing else."""
    rules = make_rules(TOPICS)

    @functools.cache
    def fill(part: str) -> str:
        if part == "{a}":
            return "(?:a(?= [^aeiou])|an(?= [aeiou]))"
        return one_of(part[1:-1]) if part[0] == "{" else re.escape(part)

    def one_of(slot: str) -> str:
        forms = dict.fromkeys(" ".join(fill(part) for part in form) for form in rules[slot])
        return f"(?:{'|'.join(forms)})"

    return re.compile("|".join(one_of(slot) for slot in CLAUSES))


@functools.lru_cache(maxsize=100_000)
def parses(clause: str) -> bool:
    """Whether the grammar can write this clause."""
    return clause_pattern().fullmatch(clause) is not None


def polarities(words: Iterable[str]) -> list[float]:
    """What each polar word of a clause says, in order.

    Its strength, times the factors of the intensifiers and hedges directly before it, times
    NEGATION for each negation earlier in the clause.
    """
    found, factor, negation = [], 1.0, 1.0
    for word in words:
        if word in STRENGTHS:
            found.append(STRENGTHS[word] * factor * negation)
        negation *= NEGATION if word in NEGATIONS else 1.0
        factor = factor * FACTORS[word] if word in FACTORS else 1.0
    return found
