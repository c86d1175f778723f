"""Prepares the built-in task: its corpus, the SFT model, and preference pairs sampled from that
model.

Each is made once and kept in the cache under a hash of all that it depends on. What comes out is a
config whose sources are files and folders like anybody's, so that nothing after this module knows
of the task.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax

from dpo_jax import (
    config,
    flags,
    generate,
    initial,
    origins,
    paths,
    processes,
    reference,
    sharding,
    train,
)
from dpo_jax.data import builtin, tokenizer
from dpo_jax.model import config as model_config
from dpo_jax.model import presets

SOURCE = "builtin"
SFT_FILE = Path(__file__).parent.parent / "experiments" / "sft.py"
SAMPLE_FIELDS = ("prefixes", "held_out_prefixes", "completions")
PAIRED_KINDS = ("pairs", "unpaired")
HELD_OUT_REVIEWS = 256
# tokens that a review may have; the longest of the grammar has fewer
MAX_TOKENS = 80
# completions sampled at once
SAMPLED_TOGETHER = 256


def run(experiment: config.Experiment, experiment_file: str | Path) -> None:
    """Prepares whatever is built in, and trains."""
    train.train(prepare_run(experiment), experiment_file)


def prepare_run(experiment: config.Experiment) -> config.Experiment:
    """The same as `prepare`, of an experiment that is run here: ValueError, before minutes go into
    what is built in, where the devices are too few or too many for it.
    """
    train.check_devices(experiment)
    return prepare(experiment)


def prepare(experiment: config.Experiment) -> config.Experiment:
    """The experiment with files and folders in the place of the source `builtin`.

    ValueError for a number of task.* that this experiment does not read.
    """
    check_read(experiment)
    if SOURCE not in (experiment.data.source, experiment.model.source):
        return experiment
    if not paths.is_local(paths.cache_folder()):
        raise ValueError(
            "the built-in task needs a cache on local disk, and DPO_JAX_CACHE is "
            f"{paths.cache_folder()}"
        )
    task, source, data = experiment.task, experiment.model.source, experiment.data
    if source == SOURCE:
        is_sft = data.examples == "sft"
        source = task.model if is_sft else str(make_sft(task, experiment.log))
    if data.tokenizer is None and origins.tokenizer_of(source) is None:
        data = dataclasses.replace(data, tokenizer=str(make_corpus(task) / "tokenizer"))
    if data.source == SOURCE:
        is_sft = data.examples == "sft"
        rows = make_corpus(task) if is_sft else make_preferences(task, source, data)
        data = dataclasses.replace(
            data,
            source=str(rows / "train.jsonl"),
            evaluation_source=data.evaluation_source or str(rows / "held_out.jsonl"),
        )
    model = dataclasses.replace(experiment.model, source=source)
    return experiment.replace(model=model, data=data)


def check_read(experiment: config.Experiment) -> None:
    """Raises ValueError for a number of task.* that is set and that nothing reads."""
    samples = experiment.data.source == SOURCE and experiment.data.examples != "sft"
    makes_corpus = experiment.model.source == SOURCE or (
        experiment.data.source == SOURCE and experiment.data.examples == "sft"
    )
    unread = {
        **dict.fromkeys(("model",), experiment.model.source != SOURCE),
        **dict.fromkeys(("reviews",), not makes_corpus),
        **dict.fromkeys(SAMPLE_FIELDS, not samples),
        "pairs_per_prefix": not samples or experiment.data.examples not in PAIRED_KINDS,
        "seed": not makes_corpus and not samples,
    }
    for name, is_unread in unread.items():
        value = getattr(experiment.task, name)
        if is_unread and value != getattr(config.Task(), name):
            raise ValueError(
                f"task.{name} is {value}, and nothing reads it where data.source is "
                f"{experiment.data.source}, data.examples {experiment.data.examples} and "
                f"model.source {experiment.model.source}: leave it out"
            )


def make_corpus(task: config.Task) -> Path:
    """Folder of the reviews and the tokenizer trained on them."""
    vocabulary = preset(task.model).vocabulary_size
    folder = cached("corpus", [task.reviews, HELD_OUT_REVIEWS, task.seed, vocabulary])

    def make() -> None:
        reviews = builtin.corpus(task.reviews + HELD_OUT_REVIEWS, task.seed)
        train_on, held_out = reviews[: task.reviews], reviews[task.reviews :]
        if processes.is_first():
            builtin.write_tokenizer(folder / "tokenizer", train_on, vocabulary)
        write_rows(folder / "held_out.jsonl", [{"text": review} for review in held_out])
        write_rows(folder / "train.jsonl", [{"text": review} for review in train_on])

    processes.make_once(folder, "train.jsonl", make)
    return folder


def make_sft(task: config.Task, log: config.Log) -> Path:
    """Run folder of the SFT model, which experiments/sft.py describes, trained now if it is new."""
    read = {name: getattr(task, name) for name in ("model", "reviews", "seed")}
    run = flags.load(SFT_FILE).replace(task=config.Task(**read), seed=task.seed, log=log)
    record = flags.to_json(run, SFT_FILE)
    identity = {name: value for name, value in record.items() if name not in ("workdir", "log")}
    folder = cached("sft", [identity, dataclasses.asdict(preset(task.model))])

    def make() -> None:
        print(f"training the built-in task's SFT model, {run.steps} steps, once: {folder}")
        train.train(prepare(run.replace(workdir=str(folder))), SFT_FILE)

    processes.make_once(folder, train.DONE, make)
    return folder


def make_preferences(task: config.Task, source: str, data: config.Data) -> Path:
    """Folder of preference rows for training and evaluation: completions sampled from a model and
    ranked by the ground-truth reward.
    """
    samples = make_samples(task, source, data)
    as_pairs = data.examples in PAIRED_KINDS
    kind = "pairs" if as_pairs else data.examples
    folder = cached(kind, [samples.name, task.pairs_per_prefix if as_pairs else None])

    def make() -> None:
        for name in ("held_out", "train"):
            sampled = (samples / f"{name}.jsonl").read_text().splitlines()
            rows = [row for line in sampled for row in rank(json.loads(line), kind, task)]
            if not rows:
                raise ValueError(
                    f"the {name} completions that {source} writes have too few different "
                    f"rewards for {kind} to learn from: train it longer, or take more "
                    "--task.prefixes or --task.completions"
                )
            write_rows(folder / f"{name}.jsonl", rows)

    processes.make_once(folder, "train.jsonl", make)
    return folder


def rank(sampled: dict, kind: str, task: config.Task) -> list:
    """The preference rows of a kind that a prompt's completions give."""
    prompt, completions = sampled["prompt"], sampled["completions"]
    if kind == "pairs":
        return builtin.rank_pairs(prompt, completions, task.pairs_per_prefix)
    three = builtin.rank_three(prompt, completions)
    if not three:
        return []
    if kind == "ranked":
        return [{"prompt": prompt, "completions": three}]
    return [{"prompt": prompt, **dict(zip(("gold", "chosen", "rejected"), three, strict=True))}]


def make_samples(task: config.Task, source: str, data: config.Data) -> Path:
    """Folder of prefixes and the completions that a model writes to them, for training and
    evaluation.
    """
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    model = initial.load(source, config.Model(dtype="float32"), task.seed, mesh)
    words = tokenizer.load_tokenizer(data, model.tokenizer)
    sizes = [getattr(task, name) for name in (*SAMPLE_FIELDS, "seed")]
    weights = reference.fingerprint(initial.policy(model))
    folder = cached("samples", [weights, words.fingerprint, *sizes])

    def make() -> None:
        print(
            f"sampling {task.completions} completions of {task.prefixes} prefixes, once: {folder}"
        )
        prefixes = builtin.prefixes(task.prefixes + task.held_out_prefixes, task.seed)
        rows = sample(task, model, words, prefixes, mesh)
        write_rows(folder / "held_out.jsonl", rows[task.prefixes :])
        write_rows(folder / "train.jsonl", rows[: task.prefixes])

    processes.make_once(folder, "train.jsonl", make)
    return folder


def sample(
    task: config.Task,
    model: initial.Initial,
    words: tokenizer.Tokenizer,
    prefixes: list[str],
    mesh,
) -> list[dict]:
    """The completions of every prefix; those that did not end are left out."""
    bos = [] if words.bos_id is None else [words.bos_id]
    prompts = [bos + words.encode(prefix) for prefix in prefixes for _ in range(task.completions)]
    sampled = generate.complete(
        model.model,
        initial.policy(model),
        prompts,
        jax.random.key(task.seed),
        select=generate.make_sampler(),
        max_tokens=MAX_TOKENS,
        stop_ids=[words.eos_id],
        batch_size=SAMPLED_TOGETHER,
        mesh=mesh,
    )
    rows = []
    for number, prefix in enumerate(prefixes):
        own = sampled[number * task.completions : (number + 1) * task.completions]
        ended = [tokens for tokens in own if tokens and tokens[-1] == words.eos_id]
        texts = [words.decode_plain(tokens[:-1]) for tokens in ended]
        rows.append({"prompt": prefix, "completions": texts})
    return rows


def preset(name: str) -> model_config.DecoderConfig:
    """The shape of a preset; ValueError lists them."""
    if name not in presets.PRESETS:
        raise ValueError(f"task.model is {name!r}; the presets are {', '.join(presets.PRESETS)}")
    return presets.PRESETS[name]


def cached(kind: str, content: list) -> Path:
    """The cache's folder for a thing that depends on `content`, its parent made."""
    name = hashlib.blake2b(
        json.dumps([builtin.VERSION, *content]).encode(), digest_size=8
    ).hexdigest()
    folder = Path(paths.cache_folder()) / "builtin" / f"{kind}-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def write_rows(file: Path, rows: list) -> None:
    """Rows as JSON lines, all or none; the first process writes them."""
    if processes.is_first():
        paths.write_text(str(file), "".join(json.dumps(row) + "\n" for row in rows))
