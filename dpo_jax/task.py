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

import filelock
import jax

from dpo_jax import config, generate, initial, losses, paths, reference, sharding, train
from dpo_jax.data import builtin, tokenizer
from dpo_jax.model import config as model_config

SOURCE = "builtin"
SFT_FILE = Path(__file__).parent.parent / "experiments" / "sft.py"
# tokens that a review may have; the longest of the grammar has fewer
MAX_TOKENS = 80
# completions sampled at once
SAMPLED_TOGETHER = 256


def run(experiment: config.Experiment, experiment_file: str | Path) -> None:
    """Prepares whatever is built in, and trains."""
    train.train(prepare(experiment), experiment_file)


def sft(task: config.Task) -> config.Experiment:
    """The SFT run that the task's pairs are sampled from and that its other runs start at."""
    return config.Experiment(
        loss=config.Loss(losses.sft),
        steps=task.sft_steps,
        batch_size=task.sft_batch_size,
        seed=task.seed,
        data=config.Data(examples="sft", max_length=128),
        reference=config.Reference(source=None),
        optimizer=config.Optimizer(
            learning_rate=task.sft_learning_rate,
            schedule="cosine",
            warmup_steps=min(100, task.sft_steps // 10),
            b2=0.95,
            weight_decay=0.01,
        ),
        samples=config.Samples(count=64, max_tokens=MAX_TOKENS, reward=builtin.reward),
        task=task,
    )


def prepare(experiment: config.Experiment) -> config.Experiment:
    """The experiment with files and folders in the place of the source `builtin`."""
    if SOURCE not in (experiment.data.source, experiment.model.source):
        if experiment.task != config.Task():
            raise ValueError(
                f"task.* is set, and neither data.source {experiment.data.source} nor model.source "
                f"{experiment.model.source} is builtin: leave it out"
            )
        return experiment
    if not paths.is_local(paths.cache_folder()):
        raise ValueError(
            "the built-in task needs a cache on local disk, and DPO_JAX_CACHE is "
            f"{paths.cache_folder()}"
        )
    task = experiment.task
    corpus = make_corpus(task)
    words = {"tokenizer": experiment.data.tokenizer or str(corpus / "tokenizer")}
    if experiment.data.examples == "sft":
        source = task.model if experiment.model.source == SOURCE else experiment.model.source
        rows = corpus
    else:
        source = experiment.model.source
        if source == SOURCE:
            source = str(make_sft(task, experiment.log))
        rows = make_pairs(task, source) if experiment.data.source == SOURCE else corpus
    if experiment.data.source == SOURCE:
        words |= {
            "source": str(rows / "train.jsonl"),
            "evaluation_source": str(rows / "held_out.jsonl"),
        }
    return experiment.replace(
        model=dataclasses.replace(experiment.model, source=source),
        data=dataclasses.replace(experiment.data, **words),
    )


def make_corpus(task: config.Task) -> Path:
    """Folder of the reviews and the tokenizer trained on them."""
    vocabulary = preset(task.model).vocabulary_size
    folder = cached("corpus", [task.reviews, task.seed, vocabulary])
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "train.jsonl").exists():
            reviews = builtin.corpus(task.reviews + task.held_out_prefixes, task.seed)
            builtin.write_tokenizer(folder / "tokenizer", reviews[: task.reviews], vocabulary)
            held_out = [{"text": review} for review in reviews[task.reviews :]]
            write_rows(folder / "held_out.jsonl", held_out)
            write_rows(
                folder / "train.jsonl", [{"text": review} for review in reviews[: task.reviews]]
            )
    return folder


def make_sft(task: config.Task, log: config.Log) -> Path:
    """Run folder of the SFT model, trained now where it is not there yet."""
    folder = cached(
        "sft",
        [
            task.model,
            task.reviews,
            task.sft_steps,
            task.sft_batch_size,
            task.sft_learning_rate,
            task.seed,
        ],
    )
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / train.DONE).exists():
            print(f"training the built-in task's SFT model, {task.sft_steps} steps, once: {folder}")
            run = sft(task).replace(workdir=str(folder), log=log)
            train.train(prepare(run), SFT_FILE)
    return folder


def make_pairs(task: config.Task, source: str) -> Path:
    """Folder of pairs for training and evaluation, sampled from a model and ranked by the
    ground-truth reward.
    """
    devices = sharding.make_mesh(config.Mesh(), jax.devices())
    model = initial.load(source, config.Model(dtype="float32"), task.seed, devices)
    sizes = [
        task.prefixes,
        task.held_out_prefixes,
        task.completions,
        task.pairs_per_prefix,
        task.seed,
    ]
    folder = cached("pairs", [reference.fingerprint(model.params), *sizes])
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "train.jsonl").exists():
            print(
                f"sampling {task.completions} completions of {task.prefixes} prefixes, once: "
                f"{folder}"
            )
            prefixes = builtin.prefixes(task.prefixes + task.held_out_prefixes, task.seed)
            rows = sample_pairs(task, model, prefixes, devices)
            if not rows:
                raise ValueError(
                    f"the completions that {source} writes all have one reward, so there is no "
                    "pair to learn from: train the SFT model longer (--task.sft-steps), or take "
                    "more --task.prefixes or --task.completions"
                )
            held_out = set(prefixes[task.prefixes :])
            write_rows(
                folder / "held_out.jsonl", [row for row in rows if row["prompt"] in held_out]
            )
            write_rows(
                folder / "train.jsonl", [row for row in rows if row["prompt"] not in held_out]
            )
    return folder


def sample_pairs(
    task: config.Task, model: initial.Initial, prefixes: list[str], mesh
) -> list[builtin.Pair]:
    """Ranked pairs of every prefix's completions; those that did not end are left out."""
    words = tokenizer.load_tokenizer(config.Data(), model.tokenizer)
    bos = [] if words.bos_id is None else [words.bos_id]
    prompts = [bos + words.encode(prefix) for prefix in prefixes for _ in range(task.completions)]
    sampled = generate.complete(
        model.model,
        model.params,
        prompts,
        jax.random.key(task.seed),
        select=generate.make_sampler(),
        max_tokens=MAX_TOKENS,
        eos_id=words.eos_id,
        batch_size=SAMPLED_TOGETHER,
        mesh=mesh,
    )
    rows = []
    for number, prefix in enumerate(prefixes):
        own = sampled[number * task.completions : (number + 1) * task.completions]
        texts = [
            words.decode_plain(tokens[:-1])
            for tokens in own
            if tokens and tokens[-1] == words.eos_id
        ]
        rows += builtin.rank_pairs(prefix, texts, task.pairs_per_prefix)
    return rows


def preset(name: str) -> model_config.DecoderConfig:
    """The shape of a preset; ValueError lists them."""
    if name not in model_config.PRESETS:
        raise ValueError(
            f"task.model is {name!r}; the presets are {', '.join(model_config.PRESETS)}"
        )
    return model_config.PRESETS[name]


def cached(kind: str, content: list) -> Path:
    """The cache's folder for a thing that depends on `content`, its parent made."""
    name = hashlib.blake2b(
        json.dumps([builtin.VERSION, *content]).encode(), digest_size=8
    ).hexdigest()
    folder = Path(paths.cache_folder()) / "builtin" / f"{kind}-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def write_rows(file: Path, rows: list) -> None:
    """Rows as JSON lines, all or none."""
    paths.write_text(str(file), "".join(json.dumps(row) + "\n" for row in rows))
