"""A source of rows -> token ids, computed once and kept under a hash of all that they depend on.

Dimensions: T tokens, N examples, C completions of each.
"""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_jax import config, paths, tables
from dpo_jax.data import encode, formats, labels, sources
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


@dataclasses.dataclass(frozen=True)
class Side:
    """The examples of one side, training or held out, and what is known of them so far."""

    examples: list[formats.Example]
    report: dict[str, int]
    label_noise: float = 0.0


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
    names = ["train", "held_out"] if wants_held_out(data) else ["train"]
    make = functools.partial(tokenise, data=data, words=tokenizer, kind=kind, mismatched=mismatched)
    stored = kind if mismatched else f"{kind} alone"
    train, *held_out = through_cache(
        data, tokenizer, stored, names, lambda: [make(one) for one in sides(data, kind).values()]
    )
    return train, held_out[0] if held_out else None


def load_pairs_for_evaluation(data: config.Data, tokenizer: Tokenizer) -> Tokenised | None:
    """The held-out rows of load as pairs, whatever its kind; None where there are none.

    A run on unpaired examples measures preference accuracy on them.
    """
    if not wants_held_out(data):
        return None
    source, split = (data.evaluation_source, data.evaluation_split)
    if source is None:
        source, split = data.source, data.split
    if formats.form_of(sources.read(source, split), data) not in formats.PAIRED:
        return None

    def make() -> list[Tokenised]:
        return [tokenise(evaluation_side(data, "pairs"), data, tokenizer, "pairs")]

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


def describe(report: dict[str, int]) -> str:
    """A report in one line."""
    parts = [f"{report['rows']} rows gave {report['examples']} examples"]
    for verb in ("dropped", "cut", "flipped"):
        counts = [
            f"{count} {name.removeprefix(verb).strip()}"
            for name, count in report.items()
            if name.startswith(verb) and count
        ]
        if counts:
            parts.append(f"{verb} {', '.join(counts)}")
    return "; ".join(parts)


def wants_held_out(data: config.Data) -> bool:
    """Whether the config asks for held-out examples; ValueError where it asks for them twice."""
    if data.evaluation_source is not None and data.held_out:
        raise ValueError(
            f"data.held_out is {data.held_out} and data.evaluation_source is "
            f"{data.evaluation_source!r}; held-out examples come from one of them: set "
            "data.held_out to 0 or leave out the other"
        )
    return data.evaluation_source is not None or data.held_out > 0


def sides(data: config.Data, kind: str) -> dict[str, Side]:
    """The examples of each side that the config asks for, not yet tokenised."""
    train = read_side(data.source, data.split, data, kind)
    train = dataclasses.replace(train, label_noise=data.label_noise)
    if data.evaluation_source is not None:
        return {"train": train, "held_out": evaluation_side(data, kind)}
    if not data.held_out:
        return {"train": train}
    kept, held = labels.split(train.examples, data.held_out, data.seed)
    report = {**train.report, "rows": train.report["rows"] - data.held_out}
    return {
        "train": Side(kept, report, data.label_noise),
        "held_out": Side(held, {"rows": data.held_out}),
    }


def evaluation_side(data: config.Data, kind: str) -> Side:
    """The held-out examples, not yet tokenised; the source is read only where they lie in it."""
    if data.evaluation_source is None:
        return sides(data, kind)["held_out"]
    return read_side(data.evaluation_source, data.evaluation_split, data, kind)


def read_side(source: str, split: str, data: config.Data, kind: str) -> Side:
    """All examples of a source."""
    rows = sources.read(source, split)
    found, drops = formats.examples(rows, data, kind)
    report = {"rows": len(rows), **{f"dropped {name}": count for name, count in drops.items()}}
    check_some(found, report, source)
    return Side(found, report)


def tokenise(
    side: Side, data: config.Data, words: Tokenizer, kind: str, mismatched: bool = True
) -> Tokenised:
    """The token ids of one side, with mismatched completions and label noise."""
    counts = collections.Counter(side.report)
    kept = encode.encode(side.examples, words, data, counts)
    where = side.examples[0].where
    check_some(kept, counts, f"{where} and after")
    counts["examples"] = len(kept)
    names = tuple(sorted(kept[0].completions))
    tokens, prompts, completions = lay_out(kept, names)
    columns = {}
    if kind == "unpaired":
        columns["desirable"] = np.array([one.example.desirable for one in kept], np.float32)
        if kept[0].example.density_ratio is not None:
            ratios = [one.example.density_ratio for one in kept]
            columns["density_ratio"] = np.array(ratios, np.float32)
    if kind == "unpaired" and mismatched:
        texts = [json.dumps(one.example.prompt) for one in kept]
        others = completions[labels.mismatch(texts, data.seed), 0]
        room = data.max_length - (prompts[:, 1] - prompts[:, 0])
        stops = np.minimum(others[:, 1], others[:, 0] + room)
        counts["cut mismatched"] = int((stops < others[:, 1]).sum())
        others = np.stack([others[:, 0], stops], axis=1)
        completions = np.stack([completions[:, 0], others], axis=1)
        names = ("completion", MISMATCHED)
    if side.label_noise:
        flipped = labels.flips(len(kept), side.label_noise, data.seed)
        counts["flipped labels"] = int(flipped.sum())
        if kind == "unpaired":
            columns["desirable"] = np.where(flipped, 1 - columns["desirable"], columns["desirable"])
        else:
            # in the order of their names: chosen [, gold], rejected; the best to the worst
            completions = np.where(flipped[:, None, None], completions[:, ::-1], completions)
    spans = {"prompts": prompts, "completions": completions}
    fingerprint = content_hash(names, {"tokens": tokens, **spans, **columns})
    return Tokenised(
        names, tokens, **spans, columns=columns, fingerprint=fingerprint, report=dict(counts)
    )


def lay_out(
    kept: list[encode.Encoded], names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [T] end to end, and the spans of prompts [N, 2] and completions [N, C, 2] in them."""
    parts = [part for one in kept for part in (one.prompt, *(one.completions[n] for n in names))]
    stops = np.cumsum([len(part) for part in parts], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    spans = np.stack([starts, stops], axis=1).reshape(len(kept), 1 + len(names), 2)
    return np.concatenate(parts), spans[:, 0].copy(), spans[:, 1:].copy()


def check_some(found: list[Any], report: dict[str, int], source: str) -> None:
    """Raises ValueError where no example is left."""
    if not found:
        raise ValueError(f"{source}: no example is left; {describe({**report, 'examples': 0})}")


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
    make: Callable[[], list[Tokenised]],
) -> list[Tokenised]:
    """What the cache holds under these names, or else what is made now, which is then kept.

    Either way it is what the cache holds, which on this machine's disk is mapped into memory: pages
    that are read can be dropped again, so that the rows may be more than memory holds.
    """
    folder = paths.join(paths.cache_folder(), "tokenised", cache_key(data, words, kind))
    files = [paths.join(folder, name) for name in names]
    found = [one for one in map(stored, files) if one is not None]
    if len(found) == len(files):
        return found
    made = make()
    for file, one in zip(files, made, strict=True):
        store(file, one)
    return [stored(file) or one for file, one in zip(files, made, strict=True)]


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


def store(path: str, one: Tokenised) -> None:
    """Writes path.<array>.npy for each array, then path.json."""
    arrays = {name: getattr(one, name) for name in MAIN} | one.columns
    for name, array in arrays.items():
        paths.write_bytes(f"{path}.{name}.npy", tables.as_bytes(array))
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
