"""tunix's DPO trainer as a contender of scripts/benchmark.py; runs in tunix's own environment and
imports nothing of this project.

PYTHON scripts/benchmark_tunix.py FOLDER tunix|tunix-fast, for tunix 0.1.7: its own `DPOTrainer`,
fed token ids, on its own Llama with the benchmark's weights in float32, with AdamW and a live
reference. tunix pads prompts on the left and completions on the right, each to a length that is
fixed for the run:
    tunix       to the longest of all steps, one compiled step
    tunix-fast  to the longest of the step, rounded up to `MULTIPLE`
Its Llama rotates positions by wavelengths of 1,000,000 whatever the model's config says, which
changes log-probabilities and no cost; its ORPO takes the odds of whole completions and not of their
mean token, so that its loss is another number. Its train loop is called once: it asks for a batch
when the step before is under way, and orders are obeyed there.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

MULTIPLE = 128
LEARNING_RATE = 1e-6


def main() -> None:
    """Trains on the examples of a folder, obeying orders between its steps."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    # not installed where the rest of the project is checked
    jax, dpo_trainer = (
        importlib.import_module(module) for module in ("jax", "tunix.sft.dpo.dpo_trainer")
    )
    run = json.loads((folder / "examples.json").read_text())
    batches = pad(run["steps"], name)
    trainer = make_trainer(dpo_trainer, folder / "model", run)

    def finish_step() -> float:
        """When everything that is under way has been computed."""
        jax.block_until_ready(importlib.import_module("flax.nnx").state(trainer.model))
        return time.perf_counter()

    def first_loss() -> float:
        return float(trainer._prev_buffered_train_metrics.loss)

    trainer.train(obey(batches, finish_step, first_loss))
    peak = peak_memory(jax)
    positions = [2 * batch["prompt_ids"].shape[0] * padded_length(batch) for batch in batches]
    programs = write_programs(dpo_trainer, trainer, batches, folder / name)
    products = {"float32": matmul_rate(jax)}
    say({"peak": peak, "computed": sum(positions), "products": products, "programs": programs})


def say(message: dict[str, Any]) -> None:
    """An answer, told by its first word from what the trainer prints."""
    print(f"benchmark: {json.dumps(message)}", flush=True)


def make_trainer(dpo_trainer, model: Path, run: dict[str, Any]) -> Any:
    """The trainer of the loss, with a reference where the loss has one."""
    llama, params, optax = (
        importlib.import_module(module)
        for module in ("tunix.models.llama3.model", "tunix.models.llama3.params", "optax")
    )
    jax = importlib.import_module("jax")
    shape = json.loads((model / "config.json").read_text())
    if shape["model_type"] != "llama":
        raise ValueError(f"the model is a {shape['model_type']}, and this peer has Llamas only")
    config = llama.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=1_000_000,
        norm_eps=shape["rms_norm_eps"],
        weight_tying=shape["tie_word_embeddings"],
    )

    def load() -> Any:
        dtype = jax.numpy.float32
        return params.create_model_from_safe_tensors(str(model), config, dtype=dtype)

    numbers, is_dpo = run["hyperparameters"], run["loss"] == "dpo"
    named = {"beta": numbers["beta"]} if is_dpo else {"lambda_orpo": numbers["lam"]}
    options = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=1_000_000, algorithm="dpo" if is_dpo else "orpo", **named
    )
    reference = load() if is_dpo else None
    return dpo_trainer.DPOTrainer(load(), reference, optax.adamw(LEARNING_RATE), options)


def pad(steps: Sequence[Sequence[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """The steps as the trainer takes them: int32 ids and masks, prompts padded on the left."""
    np = importlib.import_module("numpy")

    def longest(examples: Sequence[dict[str, Any]], *parts: str) -> int:
        found = max(len(example[part]) for example in examples for part in parts)
        return found if name == "tunix" else -(-found // MULTIPLE) * MULTIPLE

    def one(ids: Sequence[Sequence[int]], length: int, on_the_left: bool) -> tuple[Any, Any]:
        tokens, mask = np.zeros((2, len(ids), length), np.int32)
        for number, row in enumerate(ids):
            where = slice(length - len(row), None) if on_the_left else slice(len(row))
            tokens[number, where], mask[number, where] = row, 1
        return tokens, mask

    batches = []
    for step in steps:
        among = [example for other in steps for example in other] if name == "tunix" else step
        batch = {}
        for part in ("prompt", "chosen", "rejected"):
            parts = ("prompt",) if part == "prompt" else ("chosen", "rejected")
            ids = [example[part] for example in step]
            padded = one(ids, longest(among, *parts), part == "prompt")
            batch[f"{part}_ids"], batch[f"{part}_mask"] = padded
        batches.append(batch)
    return batches


def padded_length(batch: dict[str, Any]) -> int:
    """Tokens of a row: prompt and completion."""
    return batch["prompt_ids"].shape[1] + batch["chosen_ids"].shape[1]


def obey(
    batches: Sequence[dict[str, Any]],
    finish_step: Callable[[], float],
    first_loss: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """The batches as they are ordered, after each shape twice; a round's steps may overlap, and end
    with the last one's result.
    """
    begun, compiling, seen, answered = time.perf_counter(), 0.0, set(), {}
    for batch in batches:
        shape = tuple(array.shape for array in batch.values())
        for again in range(0 if shape in seen else 2):
            start = time.perf_counter()
            yield batch
            seconds = finish_step() - start
            compiling += 0.0 if again else seconds
            if not answered:
                started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
                answered = {"first_step": time.time() - started, "loss": first_loss()}
        seen.add(shape)
    say({"ready": True, "compile": compiling, **answered})
    done = 0
    for line in sys.stdin:
        begun, count = time.perf_counter(), json.loads(line)["steps"]
        yield from batches[done : done + count]
        done += count
        say({"seconds": [finish_step() - begun]})


def write_programs(
    dpo_trainer, trainer, batches: Sequence[dict[str, Any]], folder: Path
) -> list[dict[str, Any]]:
    """Texts of the compiled programs in files of a folder, and how often each runs in all steps."""
    nnx = importlib.import_module("flax.nnx")
    folder.mkdir(exist_ok=True)
    counts: dict[Any, int] = {}
    examples: dict[Any, Any] = {}
    for batch in batches:
        shape = tuple(array.shape for array in batch.values())
        counts[shape] = counts.get(shape, 0) + 1
        examples[shape] = batch
    found = []
    for shape, batch in examples.items():
        example = trainer._prepare_inputs(batch)
        step = nnx.jit(trainer.create_train_step_fn())
        lowered = [step.lower(trainer.model, trainer.optimizer, example)]
        if trainer.ref_model is not None:
            arguments = (example.input_ids, example.positions, example.attention_mask)
            rest = (example.logits_to_keep, example.completion_mask)
            lowered.append(dpo_trainer.compute_logps.lower(trainer.ref_model, *arguments, *rest))
        for one in lowered:
            path = folder / f"program_{len(found)}.txt"
            path.write_text(one.compile().as_text())
            found.append({"path": str(path), "runs": counts[shape]})
    return found


def matmul_rate(jax, size: int = 2048, repeats: int = 9) -> float:
    """FLOPs per second of float32 products of square matrices: the median."""
    left = jax.numpy.ones((size, size), jax.numpy.float32)
    multiply = jax.jit(jax.numpy.matmul)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        multiply(left, left).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / sorted(seconds[1:])[repeats // 2]


def peak_memory(jax) -> int:
    """Most bytes that this process has had, of its devices or, where they are CPUs, of the host."""
    devices = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "peak_bytes_in_use" in stats for stats in devices):
        return sum(stats["peak_bytes_in_use"] for stats in devices)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024


if __name__ == "__main__":
    sys.exit(main())
