"""A source of rows -> token ids, computed once and kept under a hash of all that they depend on.

Rows are read, tokenised and written one after the other, so that they may be more than memory
holds; what is kept of each until the end are its lengths and labels.

Dimensions: T tokens, N examples, C completions of each.
"""

import array
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax import config, paths, tables
from dpo_jax.data import encode, formats, growing, labels, sides, sources
from dpo_jax.data.tokenizer import Tokenizer

# of the files' layout and of the rules by which a row gets its ids: raise it when one changes
VERSION = 3

# the fields of config.Data that decide, beside source and tokenizer, what is written
FIELDS = (
    "form",
    "held_out",
    "max_length",
    "max_prompt_length",
    "over_length",
    "bad_rows",
    "label_noise",
    "seed",
)


# the completion of an unpaired example that another example's prompt got, of which no loss has a
# gradient
MISMATCHED = "mismatched"
# the arrays beside the columns
MAIN = ("tokens", "prompts", "completions")


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """Examples as token ids. Completions are numbered in the sorted order of their names."""

    names: tuple[str, ...]
    # int32 [T], every prompt and completion once, end to end
    tokens: np.ndarray
    # int64 [N, 2], start and stop in tokens
    prompts: np.ndarray
    # int64 [N, C, 2]; a mismatched completion is a span within another example's
    completions: np.ndarray
    # float32 [N] each: desirable, 1 or 0, and density_ratio where the rows have it (kind unpaired)
    columns: dict[str, np.ndarray]
    # content hash of all of the above
    fingerprint: str
    # rows, examples, drops and truncations by reason. Drops for a row's form count rows, those for
    # length count examples, of which kind unpaired makes two from a pair
    report: dict[str, int]


class Beside(NamedTuple):
    """What is kept of the examples beside their token ids."""

    names: list[str]
    # tokens of the prompt and of each completion: int32, 1 + C an example
    lengths: array.array
    # float32 each, none where the rows have no such number
    desirable: array.array
    density_ratios: array.array


def load(
    data: config.Data, tokenizer: Tokenizer, kind: str, *, mismatched: bool = True
) -> tuple[Tokenised, Tokenised | None]:
    """The training and the held-out examples (None where none are asked for), tokenised once.

    kind is pairs (completions chosen, rejected), triples (these and gold), ranked (completion_0,
    the best, and on), unpaired (completion, mismatched unless that is False, and column desirable)
    or sft (completion). ValueError for data that cannot be used, naming file and line, field, value
    and cure.
    """
    if data.label_noise and kind == "sft":
        raise ValueError(
            f"data.label_noise is {data.label_noise}, and examples of kind sft have no label to "
            "flip; set it to 0"
        )
    names = ["train", "held_out"] if sides.wants_held_out(data) else ["train"]
    make = functools.partial(tokenise, data=data, words=tokenizer, kind=kind, mismatched=mismatched)

    def make_all(files: Sequence[str]) -> None:
        for file, one in zip(files, sides.sides(data, kind).values(), strict=True):
            make(file, one)

    stored = kind if mismatched else f"{kind} alone"
    train, *held_out = through_cache(data, tokenizer, stored, names, make_all)
    return train, held_out[0] if held_out else None


def load_pairs_for_evaluation(data: config.Data, tokenizer: Tokenizer) -> Tokenised | None:
    """The held-out rows of load as pairs, whatever its kind; None where there are none.

    A run on unpaired examples measures preference accuracy on them.
    """
    if not sides.wants_held_out(data):
        return None
    source, split = (data.evaluation_source, data.evaluation_split)
    if source is None:
        source, split = data.source, data.split
    if formats.form_of(sources.read(source, split), data) not in formats.PAIRED:
        return None

    def make(files: Sequence[str]) -> None:
        tokenise(files[0], sides.evaluation_side(data, "pairs"), data, tokenizer, "pairs")

    return through_cache(data, tokenizer, "pairs", ["pairs"], make)[0]


def select(data: Tokenised, names: set[str]) -> Tokenised:
    """The data with these of its completions alone."""
    kept = [place for place, name in enumerate(data.names) if name in names]
    if len(kept) == len(data.names):
        return data
    own = tuple(data.names[place] for place in kept)
    return dataclasses.replace(
        data,
        names=own,
        completions=data.completions[:, kept],
        fingerprint=f"{data.fingerprint} {' '.join(own)}",
    )


def tokenise(
    path: str,
    side: sides.Side,
    data: config.Data,
    words: Tokenizer,
    kind: str,
    mismatched: bool = True,
) -> None:
    """Writes the token ids of one side, with mismatched completions and label noise, as `store`
    does.
    """
    drops, counts = collections.Counter(), collections.Counter()
    found = side.read(drops)
    first = next(found, None)
    if first is None:
        raise sides.nothing_left(side.source, sides.report(side, drops))
    kept = encode.encode(itertools.chain([first], found), words, data, counts)
    with (
        paths.replacing(f"{path}.tokens.npy") as file,
        growing.Texts(os.path.dirname(file)) as prompts,
    ):
        takes_others = kind == "unpaired" and mismatched
        beside = write_tokens(file, kept, kind, prompts if takes_others else None)
        report = sides.report(side, drops)
        # not update(), which would leave out the names of what is 0 at once
        for name, count in counts.items():
            report[name] += count
        if not beside.lengths:
            raise sides.nothing_left(f"{first.where} and after", report)
        made = lay_out(np.load(file, mmap_mode="r"), beside, report)
        if takes_others:
            made = with_mismatched(made, prompts, data)
        if side.label_noise:
            made = with_noise(made, side.label_noise, data.seed)
        fingerprint = content_hash(made.names, arrays_of(made))
    store(path, dataclasses.replace(made, fingerprint=fingerprint))


def write_tokens(
    file: str, kept: Iterable[encode.Encoded], kind: str, prompts: growing.Texts | None
) -> Beside:
    """Writes the tokens of all examples, end to end, and adds the prompts to those texts. Only
    unpaired examples keep their numbers: rows of that form may be trained on in another way.
    """
    beside = Beside([], *map(array.array, "iff"))
    with growing.column(file, np.int32) as append:
        for one in kept:
            beside.names[:] = beside.names or sorted(one.completions)
            parts = [one.prompt, *(one.completions[name] for name in beside.names)]
            append(np.concatenate(parts))
            beside.lengths.extend(map(len, parts))
            if kind == "unpaired" and one.example.desirable is not None:
                beside.desirable.append(one.example.desirable)
            if kind == "unpaired" and one.example.density_ratio is not None:
                beside.density_ratios.append(one.example.density_ratio)
            if prompts is not None:
                prompts.append(json.dumps(one.example.prompt))
    return beside


def lay_out(tokens: np.ndarray, beside: Beside, report: dict[str, int]) -> Tokenised:
    """The examples of tokens [T] that lie end to end; without a fingerprint yet."""
    lengths = np.asarray(beside.lengths).reshape(-1, 1 + len(beside.names))
    stops = lengths.cumsum(dtype=np.int64).reshape(lengths.shape)
    spans = np.stack([stops - lengths, stops], axis=-1)  # [N, 1 + C, 2]
    columns = {"desirable": beside.desirable, "density_ratio": beside.density_ratios}
    return Tokenised(
        names=tuple(beside.names),
        tokens=tokens,
        prompts=spans[:, 0],
        completions=spans[:, 1:],
        columns={name: np.asarray(values) for name, values in columns.items() if values},
        fingerprint="",
        report={**report, "examples": len(lengths)},
    )


def with_mismatched(made: Tokenised, prompts: Sequence[str], data: config.Data) -> Tokenised:
    """The examples with a completion of another prompt each, cut where it is too long for this."""
    others = made.completions[labels.mismatch(prompts, data.seed), 0]
    room = data.max_length - (made.prompts[:, 1] - made.prompts[:, 0])
    stops = np.minimum(others[:, 1], others[:, 0] + room)
    cut = int((stops < others[:, 1]).sum())
    others = np.stack([others[:, 0], stops], axis=1)
    return dataclasses.replace(
        made,
        names=("completion", MISMATCHED),
        completions=np.stack([made.completions[:, 0], others], axis=1),
        report={**made.report, "cut mismatched": cut},
    )


def with_noise(made: Tokenised, share: float, seed: int) -> Tokenised:
    """The examples with this share of their labels flipped."""
    flipped = labels.flips(len(made.prompts), share, seed)
    report = {**made.report, "flipped labels": int(flipped.sum())}
    if "desirable" in made.columns:
        desirable = made.columns["desirable"]
        columns = {**made.columns, "desirable": np.where(flipped, 1 - desirable, desirable)}
        return dataclasses.replace(made, columns=columns, report=report)
    # in the order of their names: chosen [, gold], rejected; the best to the worst
    own = made.completions
    turned = np.where(flipped[:, None, None], own[:, ::-1], own)
    return dataclasses.replace(made, completions=turned, report=report)


def content_hash(names: tuple[str, ...], arrays: dict[str, np.ndarray]) -> str:
    """A hash of names and arrays."""
    digest = hashlib.sha256(json.dumps(names).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        # not tobytes(): what is mapped from disk is read and not copied
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def through_cache(
    data: config.Data,
    words: Tokenizer,
    kind: str,
    names: list[str],
    make: Callable[[Sequence[str]], None],
) -> list[Tokenised]:
    """What the cache holds under these names, or else what is made there now, a file each.

    On this machine's disk it is mapped into memory: pages that are read can be dropped again, so
    that the rows may be more than memory holds.
    """
    folder = paths.join(paths.cache_folder(), "tokenised", cache_key(data, words, kind))
    files = [paths.join(folder, name) for name in names]
    found = [one for one in map(stored, files) if one is not None]
    if len(found) == len(files):
        return found
    paths.remove_abandoned(paths.join(paths.cache_folder(), "tokenised"))
    make(files)
    found = [one for one in map(stored, files) if one is not None]
    if len(found) < len(files):
        raise ValueError(f"{folder}: what was written there just now is not what can be read there")
    return found


def cache_key(data: config.Data, words: Tokenizer, kind: str) -> str:
    """A hash of all that the token ids depend on."""
    content = {
        "version": VERSION,
        "kind": kind,
        "tokenizer": words.fingerprint,
        "source": sources.fingerprint(data.source, data.split),
        **{name: getattr(data, name) for name in FIELDS},
    }
    if data.evaluation_source is not None:
        content["held out"] = sources.fingerprint(data.evaluation_source, data.evaluation_split)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def arrays_of(one: Tokenised) -> dict[str, np.ndarray]:
    """All arrays by the names of their files."""
    return {name: getattr(one, name) for name in MAIN} | one.columns


def store(path: str, one: Tokenised) -> None:
    """Writes path.<array>.npy for each array but the tokens, which are there, then path.json."""
    arrays = arrays_of(one)
    for name, values in arrays.items():
        if name != "tokens":
            with paths.replacing(f"{path}.{name}.npy") as file, open(file, "wb") as out:
                np.save(out, values)
    header = {"names": one.names, "fingerprint": one.fingerprint, "report": one.report}
    paths.write_text(f"{path}.json", json.dumps({**header, "arrays": list(arrays)}))


def stored(path: str) -> Tokenised | None:
    """What `store` wrote; None where there is nothing, or it is not what was written."""
    try:
        header = json.loads(paths.read_text(f"{path}.json"))
        arrays = {
            name: np.asarray(tables.read_column(f"{path}.{name}.npy")) for name in header["arrays"]
        }
        names, fingerprint = tuple(header["names"]), header["fingerprint"]
        if content_hash(names, arrays) != fingerprint:
            return None
        main = {name: arrays.pop(name) for name in MAIN}
        rest = {"fingerprint": fingerprint, "report": header["report"]}
        return Tokenised(names, **main, columns=arrays, **rest)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
