"""Runs and other models as folders that transformers loads."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from dpo_jax import config, export, initial, model_card, sharding, train
from dpo_jax.data import tokenizer
from dpo_jax.model import attention, presets, weights
from scripts import export as scripts_export
from tests import tiny

MODEL_FILES = {"config.json", "model.safetensors", "generation_config.json", "README.md"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the plot"}]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.train(tiny.experiment(folder, workdir, steps=2, evaluate_every=1), tiny.FILE)
    return str(workdir)


@pytest.fixture(scope="module")
def out(run: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "new" / "model"
    export.export(run, str(out), export.Options())
    return out


def load(source: str) -> initial.Initial:
    mesh = sharding.make_mesh(config.Mesh(), jax.devices())
    return initial.load(source, config.Model(), 0, mesh)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def make_model(path: Path, folder: Path, **choices: Any) -> str:
    """A model in HF format with the data's tokenizer, which puts <s> before a text."""
    weights.save(path, presets.PRESETS["tiny"], tiny.draw_params(presets.PRESETS["tiny"]))
    fast = tokenizer.load_fast(str(folder / "tokenizer"))
    tokenizer.Tokenizer(fast, **choices).save(str(path))
    return str(path)


def test_an_exported_run_loads_back_bit_equal(run: str, out: Path):
    trained, (shape, params) = load(run), weights.load(out)
    assert trained.step == 2
    assert shape == trained.model.config
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)
    again = load(str(out))
    assert again.model == trained.model and again.tokenizer == str(out)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    start = load("tiny").params["embedding"]
    assert np.abs(np.asarray(start) - params["embedding"]).max() > 0


def test_the_folder_has_the_files_and_says_so(run: str, out: Path, tmp_path: Path):
    assert {file.name for file in out.iterdir()} == MODEL_FILES | TOKENIZER_FILES
    written = export.export(run, str(tmp_path), export.Options())
    assert written.files == {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    sizes = [leaf.size for leaf in jax.tree.leaves(load(run).params)]
    lines = export.describe(written).splitlines()
    assert lines[0] == f"{tmp_path}: {sum(sizes):,} parameters in float32, step 2"
    size = (tmp_path / "model.safetensors").stat().st_size
    assert f"  model.safetensors  {size:,} bytes" in lines
    assert lines[-1] == f"  {sum(written.files.values()):,} bytes in all"


def test_special_tokens_stand_where_transformers_looks(out: Path):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = read(out / "config.json")
    assert {name: values[name] for name in ids} == ids
    assert values["torch_dtype"] == "float32"
    assert values["vocab_size"] == 512
    expected = {**ids, "eos_token_id": [2], "do_sample": True}
    assert read(out / "generation_config.json") == expected


def test_auto_tokenizer_gives_the_prompts_that_were_trained_on(run: str, out: Path):
    words = tokenizer.load_tokenizer(config.Data(), f"{run}/tokenizer")
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert auto("the plot was").input_ids == words.encode_prompt("the plot was")
    settings = read(out / "tokenizer_config.json")
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert auto("</s>", add_special_tokens=False).input_ids == [auto.eos_token_id] == [2]
    assert tokenizer.load_tokenizer(config.Data(), str(out)).fingerprint == words.fingerprint


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_a_chat_template_comes_through_and_writes_bos_once(
    folder: Path, tmp_path: Path, template: str
):
    model = make_model(tmp_path / "model", folder, chat_template=template)
    words = tokenizer.load_tokenizer(config.Data(), model)
    assert words.chat_template == template
    export.export(model, str(tmp_path / "out"), export.Options())
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = auto.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert found == words.encode_prompt(MESSAGES)
    assert found[:1] == [1] and found.count(1) == 1
    again = tokenizer.load_tokenizer(config.Data(), str(tmp_path / "out"))
    assert again.encode_prompt(MESSAGES) == found
    text = (tmp_path / "out" / "README.md").read_text()
    assert "apply_chat_template" in text and "not trained further" in text


def test_the_ends_of_the_model_it_started_from_are_kept(folder: Path, tmp_path: Path):
    model = make_model(tmp_path / "model", folder)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    export.export(model, str(tmp_path / "out"), export.Options())
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [2, 7]
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == 2
    other = export.Options(tokenizer=str(folder / "tokenizer"))
    export.export(model, str(tmp_path / "other"), other)
    assert read(tmp_path / "other" / "generation_config.json")["eos_token_id"] == [2]


def test_bfloat16_in_several_files_is_the_rounded_model(run: str, tmp_path: Path):
    written = export.export(run, str(tmp_path), export.Options("bfloat16", 1e-4))
    files = [name for name in written.files if name.endswith(".safetensors")]
    assert len(files) > 1 and "model.safetensors.index.json" in written.files
    assert read(tmp_path / "config.json")["torch_dtype"] == "bfloat16"
    stored = safetensors.numpy.load_file(tmp_path / files[0])
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}

    def compare(found, trained):
        rounded = np.asarray(trained).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found, rounded)

    jax.tree.map(compare, weights.load(tmp_path)[1], load(run).params)


def test_the_card_tells_the_run(run: str, out: Path):
    text = (out / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert huggingface_hub.metadata_load(out / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo_jax", "dpo"],
    }
    assert "random weights of the preset tiny" in body and "after step 2 of 2" in body
    for line in ("- loss.beta: `0.1`", "- optimizer.learning_rate: `0.001`", "- seed: `0`"):
        assert line in body
    source = read(Path(run) / "config.json")["experiment"]["data"]["source"]
    assert f"- data.source: `{source}`" in body
    last = tiny.metrics(run)[-1]
    assert "## Held-out metrics at step 2\n\n" in body
    for name in ("eval/loss", "eval/rewards/accuracies"):
        assert f"- {name}: {last[name]:.4g}\n" in body
    environment = read(Path(run) / "environment.json")
    assert f"- commit of dpo_jax: {environment['git_commit']}" in body
    assert "experiment file: `" in body and tiny.FILE.name in body
    assert f'from_pretrained("{out.name}"' in body and f"vllm serve {out.name}" in body


def test_the_command_prints_what_it_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    bare = str(folder / "tokenizer" / "tokenizer.json")
    command = ["export", "tiny", str(tmp_path / "out"), "--tokenizer", bare]
    monkeypatch.setattr(sys, "argv", [*command, "--eos-token", "<pad>", "--dtype", "bfloat16"])
    scripts_export.main()
    assert "parameters in bfloat16\n" in capsys.readouterr().out
    assert read(tmp_path / "out" / "config.json")["eos_token_id"] == 0
    assert "Random weights of the preset `tiny`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        scripts_export.main()
    assert f"{tmp_path / 'out'} is not empty (README.md, config.json" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    run: str, folder: Path, tmp_path: Path
):
    out = tmp_path / "out"

    def refuse(source: str, message: str, **options: Any):
        with pytest.raises(ValueError, match=message):
            export.export(source, str(out), export.Options(**options))
        assert not out.exists()

    refuse("tiny", "tiny is a preset, which has no tokenizer: give --tokenizer")
    refuse(run, "dtype is 'float16'; it must be", dtype="float16")
    refuse(run, "max_file_gigabytes is 0; it must be over 0", max_file_gigabytes=0)
    small = tmp_path / "small"
    weights.save(small, tiny.DECODER, tiny.draw_params(tiny.DECODER))
    message = "has 400 tokens and the model .*small a vocabulary of 40: give --tokenizer another"
    refuse(str(small), message, tokenizer=str(folder / "tokenizer"))
    bare = str(folder / "tokenizer" / "tokenizer.json")
    refuse("tiny", "data.eos_token: .* give --eos-token one of its special", tokenizer=bare)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.json", "model.json"):
        (unfinished / name).write_text((Path(run) / name).read_text())
    refuse(str(unfinished), "unfinished has no finished checkpoint: let the run save one first")


def test_only_a_new_or_empty_local_folder_is_written(run: str, tmp_path: Path):
    with pytest.raises(ValueError, match="gs://bucket/out is not on this machine's disk"):
        export.export(run, "gs://bucket/out", export.Options())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give the name of a new folder"):
        export.export(run, str(tmp_path / "file"), export.Options())
    with pytest.raises(ValueError, match=r"is not empty \(file\): give a new folder"):
        export.export(run, str(tmp_path), export.Options())


def test_held_out_metrics_are_the_last_up_to_the_checkpoint():
    lines = [
        {"step": 0, "eval/loss": 3.0},
        {"step": 1, "loss": 5.0, "eval/loss": 2.0, "samples/kl": 1.0},
        {"step": 2, "loss": 4.0},
        {"step": 3, "loss": 4.0, "eval/loss": 1.0},
    ]
    assert model_card.held_out(lines, 2) == {"step": 1, "eval/loss": 2.0, "samples/kl": 1.0}
    assert model_card.held_out(lines[2:3], 2) == {}


def test_the_base_model_is_that_of_the_first_run(tmp_path: Path):
    def make_run(name: str, source: str) -> str:
        (tmp_path / name).mkdir()
        record = {"experiment": {"model": {"source": source}}}
        (tmp_path / name / "config.json").write_text(json.dumps(record))
        (tmp_path / name / "model.json").write_text("{}")
        return str(tmp_path / name)

    first = make_run("sft", "owner/name")
    assert model_card.find_base(make_run("dpo", first)) == "owner/name"
    assert model_card.find_base(make_run("other", "tiny")) is None
    assert model_card.find_base(make_run("moved", str(tmp_path / "no" / "model"))) is None
    assert model_card.find_base(str(tmp_path)) == str(tmp_path)


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of an adapter on a model in HF format."""
    model = make_model(tmp_path_factory.mktemp("base") / "base", folder)
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    fields = {"model.source": model, "lora.rank": 4, "lora.alpha": 8.0}
    fields |= {"data.tokenizer": None, "optimizer.learning_rate": 1e-2}
    train.train(tiny.experiment(folder, workdir, steps=3, **fields), tiny.FILE)
    return str(workdir)


def test_an_adapter_is_exported_merged_unless_it_is_asked_for_alone(adapted, tmp_path):
    export.export(adapted, str(tmp_path / "merged"), export.Options())
    found = load(adapted)
    merged = weights.load(tmp_path / "merged")[1]
    assert np.abs(merged["layers"]["mlp"]["up"]["kernel"] - load_base(found)).max() > 1e-4
    tokens = np.random.default_rng(0).integers(3, 400, (2, 24)).astype(np.int32)
    ids = attention.Ids(
        np.ones_like(tokens), np.zeros_like(tokens), np.broadcast_to(np.arange(24), tokens.shape)
    )

    @jax.jit
    def hidden(params: dict) -> Any:
        return found.model.apply({"params": params}, tokens, ids)

    with_adapter, off = hidden(initial.policy(found)), hidden(found.base)
    assert np.abs(with_adapter - off).max() > 1e-2
    np.testing.assert_allclose(hidden(merged), with_adapter, rtol=1e-4, atol=1e-5)


def load_base(found: initial.Initial) -> np.ndarray:
    return np.asarray(found.base["layers"]["mlp"]["up"]["kernel"])


def test_an_adapter_alone_is_in_pefts_form_with_its_base_and_a_card(adapted, tmp_path):
    written = export.export(adapted, str(tmp_path / "adapter"), export.Options(adapter=True))
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files | TOKENIZER_FILES | {"generation_config.json"} == set(written.files)
    found = load(adapted)
    assert found.adapter is not None
    assert written.parameters == sum(leaf.size for leaf in jax.tree.leaves(found.params))
    config_json = read(tmp_path / "adapter" / "adapter_config.json")
    assert config_json["base_model_name_or_path"] == found.adapter.source
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and f'base_model: "{found.adapter.source}"' in card
    assert "AutoPeftModelForCausalLM" in card and "- lora.rank: `4`" in card


def test_the_base_of_an_adapter_is_found_through_the_runs_that_it_went_on_from(
    adapted, folder, tmp_path
):
    fields = {"model.source": adapted, "lora.rank": 4, "lora.alpha": 8.0, "data.tokenizer": None}
    run = tiny.experiment(folder, tmp_path / "run", steps=1, evaluate_every=None, **fields)
    train.train(run, tiny.FILE)
    found = load(str(tmp_path / "run"))
    assert found.adapter is not None and found.adapter.source == adapted
    export.export(str(tmp_path / "run"), str(tmp_path / "out"), export.Options(adapter=True))
    named = read(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"]
    first = load(adapted).adapter
    assert first is not None and named == first.source


def test_what_is_no_adapter_or_has_no_base_in_hf_format_is_refused(run, folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter: leave --adapter out"):
        export.export(run, str(tmp_path / "out"), export.Options(adapter=True))
    fields = {"model.source": run, "lora.rank": 4, "data.tokenizer": None, "steps": 1}
    train.train(tiny.experiment(folder, tmp_path / "on", evaluate_every=None, **fields), tiny.FILE)
    with pytest.raises(ValueError, match=r"no model in HF format: export that first .*BASE"):
        export.export(str(tmp_path / "on"), str(tmp_path / "out"), export.Options(adapter=True))
    named = export.Options(adapter=True, base_model="owner/base")
    export.export(str(tmp_path / "on"), str(tmp_path / "out"), named)
    config_json = read(tmp_path / "out" / "adapter_config.json")
    assert config_json["base_model_name_or_path"] == "owner/base"
