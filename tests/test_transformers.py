"""From a folder of transformers through a DPO run to an exported one, and back in transformers.

transformers tokenises, scores and generates by itself; nothing of ours is in its half.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tokenizers

from dpo_jax import config, export, generate, initial, logps, sharding, stops, train
from dpo_jax.data import builtin, pack, tokenise, tokenizer
from tests import tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# plain text with BOS, and chat messages without
KINDS = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
}
SIZES: dict[str, Any] = {
    # more than the tokenizer has, as where a model's vocabulary is padded
    "vocab_size": 416,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
MOST = 24

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


class Exported(NamedTuple):
    """A run, and its exported model in transformers."""

    kind: str
    run: str
    out: Path
    model: Any
    words: Any
    info: dict[str, Any]


def write_tokenizer(folder: Path, kind: str, texts: list[str]) -> None:
    import transformers

    names = KINDS[kind]
    own = ["<|im_start|>"] if kind == "qwen2" else []
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*names.values(), *own],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if "bos_token" in names:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if kind == "qwen2":
        fast.chat_template = CHATML
    fast.save_pretrained(folder)


def write_model(folder: Path, kind: str) -> None:
    """A random model that often ends a text, and sometimes with a token that is not EOS."""
    torch = pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model_config = transformers.AutoConfig.for_model(kind, **SIZES, **ids)
    model = transformers.AutoModelForCausalLM.from_config(model_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
        model.get_output_embeddings().weight[[words.eos_token_id, 300]] *= 2.5
    model.generation_config.eos_token_id = [words.eos_token_id, 300]
    model.save_pretrained(folder)


def write_rows(folder: Path, kind: str, texts: list[str]) -> None:
    rows = []
    for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
        prompt = " ".join(chosen.split()[:3])
        parts = {"prompt": prompt, "chosen": chosen[len(prompt) :][:60], "rejected": rejected[:40]}
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        if kind == "qwen2":
            parts = {k: [{"role": roles[k], "content": v.strip()}] for k, v in parts.items()}
        rows.append(parts)
    for name, part in {"train": rows[:24], "held_out": rows[24:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    texts = builtin.corpus(60, 0)
    write_tokenizer(folder / "start", kind, texts)
    write_model(folder / "start", kind)
    write_rows(folder, kind, texts)
    changes = {"model.source": str(folder / "start"), "data.tokenizer": None}
    changes |= {"data.over_length": "error", "data.max_length": 256, "evaluate_every": None}
    run, out = folder / "run", folder / "out"
    train.train(tiny.experiment(folder, run, **changes), tiny.FILE)
    export.export(str(run), str(out), export.Options(max_file_gigabytes=1e-4))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    words = transformers.AutoTokenizer.from_pretrained(out)
    return Exported(kind, str(run), out, model.eval(), words, info)


def rows_of(exported: Exported) -> list[dict]:
    lines = (exported.out.parent / "held_out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def tokens_of(exported: Exported, row: dict, name: str) -> tuple[list[int], list[int]]:
    """Prompt and completion with EOS as transformers' tokenizer makes them."""
    words, eos = exported.words, exported.words.eos_token_id
    if exported.kind == "llama":
        completion = words(row[name], add_special_tokens=False).input_ids
        return words(row["prompt"]).input_ids, [*completion, eos]
    options = {"tokenize": True, "return_dict": False}
    prompt = words.apply_chat_template(row["prompt"], add_generation_prompt=True, **options)
    whole = words.apply_chat_template([*row["prompt"], *row[name]], **options)
    assert whole[: len(prompt)] == prompt
    completion = whole[len(prompt) :]
    return prompt, completion[: completion.index(eos) + 1]


def torch_logps(model: Any, prompt: list[int], completion: list[int]) -> float:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    each = logits.double().log_softmax(-1)
    return float(each.gather(1, torch.tensor(completion)[:, None]).sum())


def our_logps(exported: Exported) -> dict[str, np.ndarray]:
    """Of the held-out completions by name, from the run's folder."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    model = initial.load(exported.run, config.Model(), 0, mesh)
    folder = exported.out.parent
    data = config.Data(
        source=str(folder / "train.jsonl"),
        evaluation_source=str(folder / "held_out.jsonl"),
        max_length=256,
    )
    words = tokenizer.load_tokenizer(data, model.tokenizer)
    _, held_out = tokenise.load(data, words, "pairs")
    assert held_out is not None and len(held_out.prompts) == len(rows_of(exported))
    plan = pack.plan(held_out, 8, sharding.batch_shards(mesh), 0)
    found = {name: np.zeros(len(held_out.prompts)) for name in held_out.names}
    score = jax.jit(logps.score, static_argnums=0)
    for batch in pack.evaluation_batches(held_out, plan):
        filled = batch["weight"] > 0
        scored = score(model.model, model.params, sharding.put_batch(batch, mesh))
        for name, one in scored.items():
            found[name][batch["index"][filled]] = np.asarray(one.total)[filled]
    return found


@pytest.mark.parity
def test_an_exported_folder_loads_with_no_key_missing_or_unexpected(exported):
    assert not any(exported.info.values()), exported.info
    assert (exported.out / "model.safetensors.index.json").exists()
    assert type(exported.model).__name__.lower() == f"{exported.kind}forcausallm"
    assert exported.model.config.vocab_size == 416 > len(exported.words)
    for name in ("bos", "eos", "pad"):
        expected = getattr(exported.words, f"{name}_token_id")
        assert getattr(exported.model.config, f"{name}_token_id") == expected


@pytest.mark.parity
def test_logps_of_held_out_completions_are_those_of_transformers(exported):
    import transformers

    found = our_logps(exported)
    start = transformers.AutoModelForCausalLM.from_pretrained(exported.out.parent / "start").eval()
    for name in ("chosen", "rejected"):
        pairs = [tokens_of(exported, row, name) for row in rows_of(exported)]
        expected = [torch_logps(exported.model, *pair) for pair in pairs]
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)
        before = np.array([torch_logps(start, *pair) for pair in pairs])
        assert np.abs(before - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parity
def test_greedy_texts_and_their_ends_are_those_of_transformers(exported):
    torch = pytest.importorskip("torch")
    prompts = [tokens_of(exported, row, "chosen")[0] for row in rows_of(exported)]
    model = initial.load(
        str(exported.out), config.Model(), 0, sharding.make_mesh(config.Mesh(), jax.devices())
    )
    words = tokenizer.load_tokenizer(config.Data(), model.tokenizer)
    ends = stops.find(str(exported.out), words)
    assert ends == [exported.words.eos_token_id, 300] == stops.find(exported.run, words)
    found = generate.complete(
        model.model,
        model.params,
        prompts,
        jax.random.key(0),
        select=generate.greedy,
        max_tokens=MOST,
        stop_ids=ends,
        batch_size=8,
    )
    for prompt, ours in zip(prompts, found, strict=True):
        tokens = exported.model.generate(
            torch.tensor([prompt]), max_new_tokens=MOST, do_sample=False
        )
        assert ours == tokens[0, len(prompt) :].tolist()
    assert {row[-1] for row in found} >= set(ends)
    assert len({len(row) for row in found}) > 2


@pytest.mark.parity
def test_the_cards_code_runs(exported, monkeypatch):
    monkeypatch.chdir(exported.out.parent)
    code = (exported.out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("apply_chat_template" in code) == (exported.kind == "qwen2")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue()
