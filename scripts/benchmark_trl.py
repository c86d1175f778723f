"""TRL's DPO, KTO and ORPO trainers as contenders of scripts/benchmark.py; runs in TRL's own
environment and imports nothing of this project.

PYTHON scripts/benchmark_trl.py FOLDER trl|trl-fast|trl-bf16|trl-liger, for TRL 1.16:
    trl       as it comes: bfloat16 where a product is, activation checkpointing
    trl-fast  float32, no activation checkpointing, and logits of completions' tokens only
    trl-bf16  the same in bfloat16, but for parameters, those of the reference too; on a GPU
              products in float32 are of TF32's
    trl-liger the same with Liger's kernels for norms, rotations and MLPs, for GPUs
An adapter's base is bfloat16 where a product is, and the reference is the base without it. A folder
without weights has every trainer draw its own.
Logits of completions' tokens only are what TRL computes on GPUs; on CPUs its head computes those of
every position, for compilers that want one shape. `make_compact` asks for the former, which changes
no result. ORPO's trainer has one head, of all positions. Padding-free batches do not exist in 1.16,
log-probabilities of the reference are not computed before (it is live), and nothing is compiled.
Metrics that the trainers keep for their log are computed as ever.

Dimensions: N examples of a step, R rows and L tokens of a padded batch.
"""

import functools
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMPUTE = {
    "trl": "bfloat16",
    "trl-fast": "float32",
    "trl-bf16": "bfloat16",
    "trl-liger": "bfloat16",
}
# model types whose layers have the products that `count_flops` counts
COUNTED = ("llama", "mistral")


def main() -> None:
    """Trains on the examples of a folder, obeying orders between its steps."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    # not installed where the rest of the project is checked
    torch, transformers, datasets = (
        importlib.import_module(module) for module in ("torch", "transformers", "datasets")
    )
    torch.set_num_threads(os.cpu_count() or 1)
    if name != "trl" and COMPUTE[name] == "bfloat16":
        torch.set_float32_matmul_precision("high")
    run = json.loads((folder / "examples.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"use_cpu": not torch.cuda.is_available()}
    load = functools.partial(load_model, torch, transformers, folder, run, name)
    trainer = make_trainer(transformers, datasets, folder, tokenizer, run, name, options, load)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    shape = json.loads((folder / "model" / "config.json").read_text())
    products = {kind: matmul_rate(torch, getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    counted = count(shape, run, name, on_gpu=torch.cuda.is_available())
    say({"peak": peak, "products": products, **counted})


def say(message: dict[str, Any]) -> None:
    """An answer, told by its first word from what the trainer prints."""
    print(f"benchmark: {json.dumps(message)}", flush=True)


def load_model(torch, transformers, folder: Path, run: dict[str, Any], name: str) -> Any:
    """The initial model; of random weights where the folder has none."""
    is_narrow = run["lora"] is not None and COMPUTE[name] == "bfloat16"
    dtype = torch.bfloat16 if is_narrow else torch.float32
    if any((folder / "model").glob("*.safetensors")):
        return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    settings = transformers.AutoConfig.from_pretrained(folder / "model")
    # policy and reference alike
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)


def make_models(run: dict[str, Any], load, *, has_reference: bool) -> dict[str, Any]:
    """What a trainer is given to train: the model, and the reference or, if the run has one, an
    adapter of all linear maps, under which the model is the reference.
    """
    if run["lora"] is None:
        return {"model": load(), **({"ref_model": load()} if has_reference else {})}
    peft = importlib.import_module("peft")
    adapter = peft.LoraConfig(target_modules="all-linear", **run["lora"])
    return {"model": load(), "peft_config": adapter}


def make_trainer(
    transformers, datasets, folder, tokenizer, run, name, options: dict[str, Any], load
) -> Any:
    """The trainer, in the order of the examples, with more steps before the first: that one twice,
    or on a GPU, where each new shape costs kernels and memory, all of them.
    """
    steps = run["steps"]
    before = (steps[0], steps[0]) if options["use_cpu"] else (steps[0], *steps)
    make, rows, text = {"dpo": make_dpo, "kto": make_kto}.get(run["loss"], make_orpo)(run)
    options |= {
        "output_dir": str(folder / name),
        "per_device_train_batch_size": len(steps[0]),
        "max_steps": len(steps) + len(before),
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 1e-6,
    }
    if name != "trl":
        options |= {"bf16": COMPUTE[name] == "bfloat16", "gradient_checkpointing": False}
        make_compact()
    if name == "trl-liger":
        options["use_liger_kernel"] = True
    trainer = make(
        load,
        options,
        train_dataset=datasets.Dataset.from_list([text] * 2),
        processing_class=tokenizer,
        callbacks=[make_callback(transformers, len(before))],
    )
    ordered = [example for step in (*before, *steps) for example in step]
    trainer.train_dataset = datasets.Dataset.from_list([rows(example) for example in ordered])
    sampler = importlib.import_module("torch.utils.data").SequentialSampler
    trainer._get_train_sampler = lambda *_: sampler(trainer.train_dataset)
    trainer.compute_loss = noting_the_first(trainer.compute_loss)
    return trainer


def make_dpo(run: dict[str, Any]) -> tuple:
    """(a function that makes the trainer, an example as the trainer's row, a row of text)."""
    trl = importlib.import_module("trl")

    def make(load, options, **rest) -> Any:
        args = trl.DPOConfig(max_length=None, beta=run["hyperparameters"]["beta"], **options)
        models = make_models(run, load, has_reference=True)
        return trl.DPOTrainer(args=args, **models, **rest)

    def row(example: dict[str, Any]) -> dict[str, Any]:
        return {f"{part}_ids": example[part] for part in ("prompt", "chosen", "rejected")}

    return make, row, {"prompt": "a", "chosen": " b", "rejected": " c"}


def make_kto(run: dict[str, Any]) -> tuple:
    """The same; the mismatched completions are the benchmark's own, and not the batch's, rotated by
    one.
    """
    trl = importlib.import_module("trl")

    def make(load, options, **rest) -> Any:
        numbers = run["hyperparameters"]
        args = trl.KTOConfig(
            max_length=None,
            beta=numbers["beta"],
            desirable_weight=numbers["lambda_desirable"],
            undesirable_weight=numbers["lambda_undesirable"],
            **options,
        )
        models = make_models(run, load, has_reference=True)
        return trl.KTOTrainer(args=args, **models, **rest)

    def row(example: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt_ids": example["prompt"],
            "completion_ids": example["completion"],
            "KL_completion_ids": example["mismatched"],
            "label": example["desirable"] > 0,
        }

    return make, row, {"prompt": "a", "completion": " b", "label": True}


def make_orpo(run: dict[str, Any]) -> tuple:
    """The same, without a reference."""
    orpo = importlib.import_module("trl.experimental.orpo")
    longest = max(length for step in run["steps"] for length, _ in lengths(step, PAIR))

    def make(load, options, **rest) -> Any:
        args = orpo.ORPOConfig(max_length=longest, beta=run["hyperparameters"]["lam"], **options)
        models = make_models(run, load, has_reference=False)
        return orpo.ORPOTrainer(args=args, **models, **rest)

    def row(example: dict[str, Any]) -> dict[str, Any]:
        found = {"prompt_input_ids": example["prompt"]}
        for part in PAIR:
            ids = example["prompt"] + example[part]
            found[f"{part}_input_ids"] = ids
            found[f"{part}_attention_mask"] = [1] * len(ids)
            found[f"{part}_labels"] = [-100] * len(example["prompt"]) + example[part]
        return found

    return make, row, {"prompt": "a", "chosen": " b", "rejected": " c"}


PAIR = ("chosen", "rejected")


def make_compact() -> None:
    """Lets the head of DPO's and KTO's trainers compute logits of completions' tokens only."""
    heads: Any = importlib.import_module("trl.trainer.utils")
    heads._use_triton = lambda device: True


FIRST: list[float] = []


def noting_the_first(compute_loss) -> Any:
    """The trainer's loss; the first one is kept in FIRST."""

    @functools.wraps(compute_loss)
    def noting(*arguments, **named):
        found = compute_loss(*arguments, **named)
        if not FIRST:
            FIRST.append(float(found.detach() if hasattr(found, "detach") else found[0].detach()))
        return found

    return noting


def make_callback(transformers, before: int) -> Any:
    """Waits before a step for an order to run some, and times them, after so many others."""
    cuda = importlib.import_module("torch").cuda
    wait = cuda.synchronize if cuda.is_available() else lambda: None

    class Orders(transformers.TrainerCallback):
        left, seconds, begun, warm = 0, [], 0.0, 0

        def on_step_begin(self, args, state, control, **unused):
            wait()
            if self.warm == 1:
                started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
                self.first_step = time.time() - started
            self.warm += 1
            if self.warm == before + 1:
                say({"ready": True, "first_step": self.first_step, "loss": FIRST[0]})
            if self.warm > before and self.left == 0:
                self.left, self.seconds = json.loads(sys.stdin.readline())["steps"], []
                self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **unused):
            if self.left == 0:
                return
            wait()
            now = time.perf_counter()
            self.seconds.append(now - self.begun)
            self.begun, self.left = now, self.left - 1
            if self.left == 0:
                say({"seconds": self.seconds})

    return Orders()


def matmul_rate(torch, kind, repeats: int = 9) -> float:
    """FLOPs per second of products of square matrices of a type: the median."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    left = torch.randn((size, size), dtype=kind, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (left @ left).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / sorted(seconds[1:])[repeats // 2]


def lengths(step: Sequence[dict[str, Any]], parts: Sequence[str]) -> list[tuple[int, int]]:
    """Tokens of each row of a batch, and of its completion."""
    return [
        (len(example["prompt"]) + len(example[part]), len(example[part]))
        for part in parts
        for example in step
    ]


def count(shape: dict[str, Any], run: dict[str, Any], name: str, *, on_gpu: bool) -> dict[str, Any]:
    """Positions of all steps ("computed"), and, of models whose layers are known, FLOPs of their
    matrix products by type ("flops").
    """
    computed, flops = 0, {"float32": 0.0, "bfloat16": 0.0}
    is_adapter = run["lora"] is not None
    for step in run["steps"]:
        for part in [PAIR] if run["loss"] != "kto" else [("completion",), ("mismatched",)]:
            batch = lengths(step, part)
            computed += len(batch) * max(length for length, _ in batch)
            found = count_flops(shape, batch, run["loss"], part[0], name, is_adapter, on_gpu)
            for kind, number in found.items():
                flops[kind] += number
    counted = shape["model_type"] in COUNTED
    return {"computed": computed, **({"flops": flops} if counted else {})}


def count_flops(
    shape: dict[str, Any],
    batch: Sequence[tuple[int, int]],
    loss: str,
    part: str,
    name: str,
    is_adapter: bool = False,
    on_gpu: bool = False,
) -> dict[str, float]:
    """FLOPs of a padded batch [R, L] through policy and reference, by type.

    A gradient costs two forward passes; checkpointed layers run forward once more, but for their
    last product; the head of DPO and KTO computes its logits twice, and on CPUs its gradients in
    float32 whatever the type. Of an adapter, whose own products are not counted, the base's weights
    have no gradient.
    """
    rows, tokens = len(batch), max(length for length, _ in batch)
    width, heads, layers = (
        shape[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    head_dim = shape.get("head_dim") or width // heads
    attention = 2 * width * head_dim * (heads + shape["num_key_value_heads"])
    body = 2 * layers * (attention + 3 * width * shape["intermediate_size"]) * rows * tokens
    body += 4 * layers * heads * head_dim * rows * tokens**2
    is_compact = (on_gpu or name != "trl") and loss in ("dpo", "kto")
    scored = sum(answer for _, answer in batch) if is_compact else rows * (tokens - 1)
    head = 2 * width * shape["vocab_size"] * scored
    again = 0
    if name == "trl":
        again = body - 2 * layers * width * shape["intermediate_size"] * rows * tokens
    found = {"float32": 0.0, "bfloat16": 0.0}
    trained = body if is_adapter else 2 * body
    of_head = head if is_adapter else 2 * head
    if part == "mismatched":
        found[COMPUTE[name]] += 2 * (body + head)
    elif loss in ("dpo", "kto"):
        found[COMPUTE[name]] += 2 * body + trained + again + 3 * head
        found[COMPUTE[name] if on_gpu else "float32"] += of_head
    else:
        found[COMPUTE[name]] += body + trained + again + head + of_head
    return found


if __name__ == "__main__":
    sys.exit(main())
