"""TRL's DPO trainer as a contender of scripts/benchmark.py; runs in TRL's own environment.

PYTHON scripts/benchmark_trl.py FOLDER trl|trl-fast: as it comes, or in float32 without activation
checkpointing. It imports nothing of this project.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Trains on the examples of a folder, obeying orders between its steps."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    # not installed where the rest of the project is checked
    torch, trl, transformers, datasets = (
        importlib.import_module(module) for module in ("torch", "trl", "transformers", "datasets")
    )
    torch.set_num_threads(os.cpu_count() or 1)
    steps = json.loads((folder / "examples.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = make_trainer(trl, transformers, datasets, folder, tokenizer, steps, name)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    say({"peak": peak})


def say(message: dict[str, Any]) -> None:
    """An answer, told by its first word from what the trainer prints."""
    print(f"benchmark: {json.dumps(message)}", flush=True)


def make_trainer(trl, transformers, datasets, folder, tokenizer, steps, name) -> Any:
    """The trainer, in the order of the examples, with two more steps before the first."""
    fast = {"bf16": False, "activation_checkpointing": False} if name == "trl-fast" else {}
    options = trl.DPOConfig(
        output_dir=str(folder / name),
        per_device_train_batch_size=len(steps[0]),
        max_steps=len(steps) + 2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        max_length=None,
        learning_rate=1e-6,
        **fast,
    )
    texts = {"prompt": "a", "chosen": " b", "rejected": " c"}
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2)]
    trainer = trl.DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=options,
        train_dataset=datasets.Dataset.from_list([texts]),
        processing_class=tokenizer,
        callbacks=[make_callback(transformers)],
    )
    # the first step twice more, before what is timed
    ordered = [example for step in (steps[0], steps[0], *steps) for example in step]
    trainer.train_dataset = datasets.Dataset.from_list(
        [{f"{part}_ids": ids for part, ids in example.items()} for example in ordered]
    )
    sampler = importlib.import_module("torch.utils.data").SequentialSampler
    trainer._get_train_sampler = lambda *_: sampler(trainer.train_dataset)
    return trainer


def make_callback(transformers) -> Any:
    """Waits before a step for an order to run some, and times them."""

    class Orders(transformers.TrainerCallback):
        left, seconds, begun, warm = 0, [], 0.0, 0

        def on_step_begin(self, args, state, control, **unused):
            if self.warm == 1:
                started = float(os.environ.get("BENCHMARK_STARTED", time.time()))
                self.first_step = time.time() - started
            self.warm += 1
            if self.warm == 3:
                say({"ready": True, "first_step": self.first_step})
            if self.warm >= 3 and self.left == 0:
                self.left, self.seconds = json.loads(sys.stdin.readline())["steps"], []
                self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **unused):
            if self.left == 0:
                return
            now = time.perf_counter()
            self.seconds.append(now - self.begun)
            self.begun, self.left = now, self.left - 1
            if self.left == 0:
                say({"seconds": self.seconds})

    return Orders()


if __name__ == "__main__":
    sys.exit(main())
