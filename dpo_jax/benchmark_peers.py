"""Other trainers that a benchmark knows, and the folder from which they start."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax import config, flags, initial, inputs
from dpo_jax.data import tokenise
from dpo_jax.model import hf_config, hf_files, weights

SCRIPTS = flags.ROOT / "scripts"


class Peer(NamedTuple):
    """Another trainer."""

    # of scripts/, run by the Python of the trainer's environment: SCRIPT FOLDER NAME
    script: str
    # names of the losses that it has
    losses: tuple[str, ...]
    # whether glibc's allocator is told to keep freed memory
    keeps_memory: bool = False
    # whether it can train an adapter, and start from weights that it draws itself
    has_adapters: bool = False
    draws: bool = False


TRL = Peer("benchmark_trl.py", ("dpo", "kto", "orpo", "orpo_prompt"), has_adapters=True, draws=True)
TUNIX = Peer("benchmark_tunix.py", ("dpo", "orpo", "orpo_prompt"))
PEERS: Mapping[str, Peer] = {
    "trl": TRL,
    "trl-fast": TRL._replace(keeps_memory=True),
    "trl-bf16": TRL._replace(keeps_memory=True),
    "trl-liger": TRL._replace(keeps_memory=True),
    "tunix": TUNIX,
    "tunix-fast": TUNIX._replace(keeps_memory=True),
}


def parse(texts: Sequence[str]) -> dict[str, str]:
    """Python interpreters by the name of a trainer, of NAME=PYTHON each; ValueError for others."""
    for text in texts:
        name, equals, python = text.partition("=")
        if not (name and equals and python):
            raise ValueError(
                f"--peer is {text!r}; it must be NAME=PYTHON, the trainer's name and the Python of "
                f"its environment: {', '.join(PEERS)}"
            )
    return dict(text.split("=", 1) for text in texts)


def commands(
    pythons: Mapping[str, str],
    experiment: config.Experiment,
    folder: str,
    random_weights: bool = False,
) -> tuple[dict[str, list[str]], list[str]]:
    """How the peers that have the loss are started, and a line for each that lacks it; ValueError
    for a peer that is not known, or for a run that peers do something else for.
    """
    found, left_out, name = {}, [], experiment.loss.function.__name__
    if pythons and experiment.lora.targets is not None:
        raise ValueError(
            f"lora.targets is {experiment.lora.targets}, and peers adapt all linear maps: leave it "
            "out"
        )
    for peer, python in pythons.items():
        if peer not in PEERS:
            raise ValueError(f"there is no peer {peer!r}: --peer takes {', '.join(PEERS)}")
        if experiment.lora.rank is not None and not PEERS[peer].has_adapters:
            left_out.append(f"{peer} is left out: it trains all parameters, and no adapter")
        elif random_weights and not PEERS[peer].draws:
            left_out.append(f"{peer} is left out: it draws no weights itself")
        elif name in PEERS[peer].losses:
            found[peer] = [python, str(SCRIPTS / PEERS[peer].script), folder, peer]
        else:
            left_out.append(f"{peer} is left out: it has no loss {name}")
    return found, left_out


def write_model(
    folder: Path, found: inputs.Inputs, mesh: jax.sharding.Mesh, random_weights: bool
) -> None:
    """The initial policy and its tokenizer, which every contender starts from; of the policy only
    its config where each draws the weights itself.
    """
    shape = found.initial.model.config
    if random_weights:
        (folder / "model").mkdir()
        hf_files.write_json(folder / "model" / hf_files.CONFIG, hf_config.to_hf(shape))
    else:
        whole = initial.merged(found.initial, mesh)
        weights.save(folder / "model", shape, whole.params)
    found.tokenizer.save(str(folder / "model"))


def write_examples(
    folder: Path,
    experiment: config.Experiment,
    data: tokenise.Tokenised,
    examples: Sequence[np.ndarray],
) -> None:
    """The loss, its hyperparameters, the adapter or None, and of each step's examples the token ids
    and numbers.
    """
    loss, lora = experiment.loss, experiment.lora
    record = {
        "loss": loss.function.__name__,
        "hyperparameters": {
            name: value
            for name, value in loss.hyperparameters.items()
            if value is None or isinstance(value, int | float | str)
        },
        "lora": None
        if lora.rank is None
        else {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "use_rslora": lora.rank_stabilised,
            "lora_dropout": lora.dropout,
        },
        "steps": [[describe(data, int(one)) for one in chosen] for chosen in examples],
    }
    (folder / "examples.json").write_text(json.dumps(record))


def describe(data: tokenise.Tokenised, example: int) -> dict[str, list[int] | float]:
    """An example: token ids of its parts, and its numbers, by name."""
    parts = zip(data.names, data.completions[example], strict=True)
    return {
        "prompt": data.tokens[slice(*data.prompts[example])].tolist(),
        **{name: data.tokens[slice(*span)].tolist() for name, span in parts},
        **{name: float(values[example]) for name, values in data.columns.items()},
    }
