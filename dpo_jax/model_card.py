"""The README.md of an exported model: what it is, how it was made, how it is loaded."""

import json
from typing import Any, NamedTuple

from dpo_jax import flags, origins, paths, runs
from dpo_jax.data import hub
from dpo_jax.model import presets

# fields of a run that its model's card lists, by how their names begin
SHOWN = (
    *("steps", "batch_", "seed", "model.source", "loss.", "reference.", "optimizer."),
    *("data.", "lora."),
)
HELD_OUT = ("eval/", "samples/")

LOADING = """\
## Loading it

```python
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
model = transformers.AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
{prompt}
tokens = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

```
vllm serve {folder}
lm_eval --model hf --model_args pretrained={folder} --tasks hellaswag
```
"""
LOADING_ADAPTER = """\
## Loading it

It is an adapter of [{base}]({base}), which is loaded with it.

```python
import peft
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
model = peft.AutoPeftModelForCausalLM.from_pretrained("{folder}", dtype="auto")
{prompt}
tokens = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

```
vllm serve {base} --enable-lora --lora-modules {folder}={folder}
lm_eval --model hf --model_args pretrained={base},peft={folder} --tasks hellaswag
```
"""
TEXT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
CHAT = """\
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)"""


class Facts(NamedTuple):
    """What is known of where a model comes from."""

    source: str
    # of the checkpoint, and where the run was to end; None where the source is no run
    step: int | None
    # the run's config.json, its fields by dotted name, and its environment.json
    record: dict[str, Any]
    fields: dict[str, Any]
    environment: dict[str, Any]
    # the last metrics of held-out data that the checkpoint's run has up to its step
    held_out: dict[str, Any]
    # folder or hub name of the HF model that it started from; None where it was another
    base: str | None


def read(source: str, step: int | None) -> Facts:
    """The facts of a source; step is that of the checkpoint where it is a run folder."""
    base = find_base(source)
    if step is None:
        return Facts(source, None, {}, {}, {}, {}, base)
    record = flags.read_config(source)
    fields = dict(runs.flatten(record["experiment"]))
    environment = json.loads(paths.read_text(paths.join(source, "environment.json")))
    lines = runs.read_lines(paths.join(source, "metrics.jsonl"))
    return Facts(source, step, record, fields, environment, held_out(lines, step), base)


def find_base(source: str) -> str | None:
    """The HF model that a source is or started from; None where that is a preset, or gone."""
    origin = origins.origin(source)
    if origin in presets.PRESETS:
        return None
    return origin if paths.is_folder(origin) or hub.NAME.fullmatch(origin) else None


def held_out(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The last line up to a step that has held-out metrics: these, and its step."""
    for line in reversed(lines):
        found = {name: value for name, value in line.items() if name.startswith(HELD_OUT)}
        if found and line["step"] <= step:
            return {"step": line["step"], **found}
    return {}


def write(
    facts: Facts, folder: str, dtype: str, has_chat: bool, base_model: str | None = None
) -> str:
    """The text of the card of a model, or of an adapter of base_model, in a folder of this name."""
    if base_model is not None:
        facts = facts._replace(base=base_model)
    form = LOADING if base_model is None else LOADING_ADAPTER
    loading = form.format(folder=folder, prompt=CHAT if has_chat else TEXT, base=base_model)
    if facts.step is None:
        kind = "Random weights of the preset" if facts.base is None else "The weights of"
        parts = [f"{kind} `{facts.source}`, not trained further, in {dtype}."]
    else:
        parts = [about(facts, dtype), training(facts), measured(facts), making(facts)]
    texts = [front_matter(facts, base_model is not None), f"# {folder}", *parts, loading]
    return "\n\n".join(text for text in texts if text)


def front_matter(facts: Facts, is_adapter: bool) -> str:
    """The card's YAML, whose strings are quoted as JSON's are."""
    library = "peft" if is_adapter else "transformers"
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if facts.base is not None:
        lines.append(f"base_model: {json.dumps(facts.base)}")
    dataset = facts.fields.get("data.source", "")
    if dataset.startswith("hf:"):
        lines += ["datasets:", f"- {json.dumps(dataset.removeprefix('hf:'))}"]
    loss = [f"- {json.dumps(loss_name(facts))}"] if facts.fields else []
    return "\n".join(["---", *lines, "tags:", "- dpo_jax", *loss, "---"])


def loss_name(facts: Facts) -> str:
    """The name of the run's loss function."""
    return str(facts.fields["loss.function"]).rpartition(":")[2]


def about(facts: Facts, dtype: str) -> str:
    """One sentence of what the model is."""
    origin = origins.origin(facts.source)
    is_preset = origin in presets.PRESETS
    start = facts.base or (f"random weights of the preset {origin}" if is_preset else origin)
    return (
        f"A language model that started from {start} and was trained with the loss "
        f"{loss_name(facts)} by dpo_jax, after step {facts.step} of {facts.fields['steps']}, "
        f"in {dtype}."
    )


def training(facts: Facts) -> str:
    """The settings that decide what was learned."""
    shown = {
        name: value
        for name, value in facts.fields.items()
        if name.startswith(SHOWN)
        and value is not None
        and not (name.startswith("lora.") and facts.fields.get("lora.rank") is None)
    }
    return "## Training\n\n" + "\n".join(f"- {name}: `{value}`" for name, value in shown.items())


def measured(facts: Facts) -> str:
    """The held-out metrics; '' where there are none."""
    if not facts.held_out:
        return ""
    values = {name: value for name, value in facts.held_out.items() if name != "step"}
    lines = [f"- {name}: {value:.4g}" for name, value in values.items()]
    return f"## Held-out metrics at step {facts.held_out['step']}\n\n" + "\n".join(lines)


def making(facts: Facts) -> str:
    """The code that made it."""
    file, environment = facts.record.get("experiment_file", {}), facts.environment
    commit = environment.get("git_commit") or "not known"
    changed = ", with changes that are not committed" if environment.get("git_dirty") else ""
    versions = ", ".join(f"{name} {one}" for name, one in environment["versions"].items())
    return "\n".join(
        [
            "## How it was made\n",
            f"- experiment file: `{file.get('path')}` (SHA-256 {file.get('sha256')})",
            f"- commit of dpo_jax: {commit}{changed}",
            f"- started: {environment['started']}",
            f"- versions: {versions}",
        ]
    )
