import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import config as dpo_jax_config
from dpo_jax import initial, sharding
from dpo_jax.model import decoder, families, hf_config, hf_files, weights
from dpo_jax.model.config import DecoderConfig, Experts, Kind, Rope
from dpo_jax.model.presets import PRESETS
from tests import tiny

UNTIED = tiny.DECODER
TIED = dataclasses.replace(UNTIED, tied_head=True)


def rewrite(folder: Path, change) -> None:
    """Saves the tensors of a folder again after `change(tensors)`."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def rewrite_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def assert_equal(params: dict, again: dict) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights.save(tmp_path, UNTIED, tiny.draw_params(UNTIED))
    return tmp_path


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_saved_parameters_load_bit_equal(tmp_path, config):
    params = tiny.draw_params(config)
    weights.save(tmp_path / "new" / "folder", config, jax.tree.map(jax.numpy.asarray, params))
    loaded_config, loaded = weights.load(tmp_path / "new" / "folder")
    assert loaded_config == config
    assert_equal(params, loaded)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_files_hold_matrices_as_outputs_by_inputs_with_heads_end_to_end(folder):
    params = tiny.draw_params(UNTIED)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    attention = params["layers"]["attention"]
    layer = "model.layers.1.self_attn."
    for h, i in ((0, 0), (1, 2), (3, 5)):
        row = tensors[layer + "q_proj.weight"][h * UNTIED.head_dim + i]
        np.testing.assert_array_equal(row, attention["query"]["kernel"][1, :, h, i])
        column = tensors[layer + "o_proj.weight"][:, h * UNTIED.head_dim + i]
        np.testing.assert_array_equal(column, attention["output"]["kernel"][1, h, i])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embedding"])


def test_bfloat16_and_float16_tensors_become_the_float32_of_the_same_value(folder):
    expected = {}

    def round_down(tensors):
        for number, (name, tensor) in enumerate(tensors.items()):
            tensors[name] = tensor.astype([ml_dtypes.bfloat16, np.float16][number % 2])
            expected[name] = tensors[name].astype(np.float32)

    rewrite(folder, round_down)
    _, params = weights.load(folder)
    weights.save(folder, UNTIED, params)
    for name, tensor in safetensors.numpy.load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_several_files_load_by_their_index(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / hf_files.INDEX).write_text(json.dumps(index))
    assert_equal(weights.load(folder)[1], tiny.draw_params(UNTIED))
    (folder / "b.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"b\.safetensors is missing, and model\.safetensors\.index"
    ):
        weights.load(folder)


def test_missing_and_unexpected_tensors_are_named(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        weights.load(folder)
    assert "lacks model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "beyond what config.json asks for, model.layers.0.self_attn.q_proj.bias" in str(
        error.value
    )


def test_a_wrong_shape_names_the_tensor_and_both_shapes(folder):
    rewrite_config(folder, intermediate_size=33)
    with pytest.raises(ValueError) as error:
        weights.load(folder)
    assert "model.layers.0.mlp." in str(error.value)
    assert "(32, 24)" in str(error.value) and "(33, 24)" in str(error.value)


def test_quantised_tensors_are_refused(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .* is I8; supported: BF16"):
        weights.load(folder)


def test_old_rotary_buffers_are_passed_over(folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    rewrite(folder, lambda tensors: tensors.update(buffer))
    assert_equal(weights.load(folder)[1], tiny.draw_params(UNTIED))


def test_a_stored_tied_head_must_be_the_embedding(tmp_path):
    weights.save(tmp_path, TIED, tiny.draw_params(TIED))
    embedding = tiny.draw_params(TIED)["embedding"]
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert_equal(weights.load(tmp_path)[1], tiny.draw_params(TIED))
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="lm_head.weight that differs from the embedding"):
        weights.load(tmp_path)


def test_a_missing_folder_is_named_along_with_the_presets(tmp_path):
    with pytest.raises(ValueError) as error:
        weights.load(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)
    assert ", ".join(PRESETS) in str(error.value)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="has neither model.safetensors nor model.safetensors.index"
    ):
        weights.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        weights.load(folder)


def test_a_hub_name_without_network_is_an_error_at_once(monkeypatch):
    from huggingface_hub import constants

    def refuse(*arguments, **keywords):
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_files.urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*cannot be reached \(no route\)"):
        weights.load("nobody/nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids"):
        weights.load("nobody/nothing")


def test_a_hub_name_in_the_local_cache_needs_no_network(folder, monkeypatch):
    import huggingface_hub

    def from_cache(name, *, local_files_only=False, **keywords):
        assert (name, local_files_only) == ("owner/model", True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    assert weights.load("owner/model")[0] == UNTIED


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_gives_back_the_config_it_was_written_from(name):
    text = json.dumps(hf_config.to_hf(PRESETS[name]))
    assert hf_config.from_hf(json.loads(text)) == PRESETS[name]


OLD = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}
MISTRAL = {
    **{name: value for name, value in OLD.items() if not name.startswith("rope")},
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
}


def test_both_forms_of_rope_in_config_json_are_read():
    assert hf_config.from_hf(OLD) == PRESETS["llama-3.1-8b"]
    new = {name: value for name, value in OLD.items() if not name.startswith("rope")}
    new["rope_parameters"] = {**OLD["rope_scaling"], "rope_theta": OLD["rope_theta"]}
    assert hf_config.from_hf(new) == PRESETS["llama-3.1-8b"]
    default = {"rope_type": "default", "rope_theta": 7.0}
    config = hf_config.from_hf({**new, "rope_parameters": default})
    assert config.block == (Kind(rope=Rope(7.0)),)


def test_absent_keys_mean_what_hf_means_by_them():
    assert hf_config.from_hf(MISTRAL) == PRESETS["mistral-7b"]
    assert hf_config.from_hf({**MISTRAL, "sliding_window": None}).block == (Kind(),)
    llama = {n: v for n, v in OLD.items() if n != "num_key_value_heads"}
    assert hf_config.from_hf(llama).key_value_heads == 32


REFUSED = {
    "architectures": ["MambaForCausalLM"],
    "hidden_act": "quick_gelu",
    "pretraining_tp": 2,
    "attention_dropout": 0.1,
    "sliding_window": 128,
    "quantization_config": {"bits": 4},
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_decoder_does_not_compute_is_refused_by_name(name):
    told = "rope_type" if name.startswith("rope") else name
    with pytest.raises(ValueError, match=f"^{told} is .* in "):
        hf_config.from_hf({**OLD, name: REFUSED[name]})


def test_unknown_rope_keys_and_missing_keys_are_refused_by_name():
    rope = {**OLD["rope_scaling"], "attention_factor": 2.0}
    with pytest.raises(ValueError, match="rope_scaling of config.json has 'attention_factor'"):
        hf_config.from_hf({**OLD, "rope_scaling": rope})
    without = {name: value for name, value in OLD.items() if name != "rms_norm_eps"}
    with pytest.raises(ValueError, match="config.json has no 'rms_norm_eps'"):
        hf_config.from_hf(without)


def test_files_of_a_model_without_its_head_lack_the_prefix_and_may_hold_masks(tmp_path):
    params = tiny.draw_params(GPT_2)
    weights.save(tmp_path, GPT_2, params)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)

    rewrite(tmp_path, strip)
    assert_equal(weights.load(tmp_path)[1], params)


def test_fused_tensors_hold_queries_keys_and_values_end_to_end_or_head_by_head(tmp_path):
    params = tiny.draw_params(GPT_2)
    weights.save(tmp_path, GPT_2, params)
    fused = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    queries, values = (params["layers"]["attention"][name] for name in ("query", "value"))
    matrix, bias = (fused[f"transformer.h.1.attn.c_attn.{name}"] for name in ("weight", "bias"))
    np.testing.assert_array_equal(matrix[:, 6 * 3 + 2], queries["kernel"][1, :, 3, 2])
    np.testing.assert_array_equal(matrix[:, 48 + 6 * 3 + 2], values["kernel"][1, :, 3, 2])
    np.testing.assert_array_equal(bias[48 + 6 * 3 + 2], values["bias"][1, 3, 2])

    params = tiny.draw_params(GPT_NEOX)
    weights.save(tmp_path, GPT_NEOX, params)
    fused = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    row = fused["gpt_neox.layers.1.attention.query_key_value.weight"][3 * 18 + 12 + 2]
    expected = params["layers"]["attention"]["value"]["kernel"][1, :, 3, 2]
    np.testing.assert_array_equal(row, expected)


GPT_2 = dataclasses.replace(
    UNTIED,
    **families.FAMILIES["gpt2"].fixed,
    family="gpt2",
    key_value_heads=4,
    block=(Kind(rope=None),),
    tied_head=True,
)
GPT_NEOX = dataclasses.replace(
    GPT_2, family="gpt_neox", position_offset=None, block=(Kind(),), tied_head=False
)
GEMMA_3 = dataclasses.replace(
    TIED,
    **families.FAMILIES["gemma3"].fixed,
    family="gemma3",
    key_value_heads=1,
    layers=8,
    block=(*(Kind(window=5),) * 5, Kind()),
    query_scalar=6,
)
SHAPES = {
    "llama": UNTIED,
    "gpt2": GPT_2,
    "gpt_neox": GPT_NEOX,
    "phi3": dataclasses.replace(UNTIED, family="phi3"),
    "mixtral": dataclasses.replace(UNTIED, family="mixtral", experts=Experts(4, 2)),
    "gemma3, two layers beyond its blocks": GEMMA_3,
}
MESHES = {
    "fsdp 8": dpo_jax_config.Mesh(fsdp=8),
    "data 2 x fsdp 2 x tensor 2": dpo_jax_config.Mesh(data=2, fsdp=2, tensor=2),
}
LIMIT = 8_000


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return sharding.make_mesh(MESHES[request.param], jax.devices())


@pytest.fixture(scope="module", params=SHAPES)
def model(request) -> DecoderConfig:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """The folder of a model of each family, its tensors in several files."""
    folder = tmp_path_factory.mktemp("saved")
    weights.save(folder, model, tiny.draw_params(model), max_file_bytes=LIMIT)
    return folder


class Counted:
    """An open file of safetensors, or a tensor of it, that notes the bytes of what is read."""

    def __init__(self, wrapped: Any, reads: list[tuple[str, int]], name: str = ""):
        self.wrapped, self.reads, self.name = wrapped, reads, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __enter__(self) -> "Counted":
        return Counted(self.wrapped.__enter__(), self.reads)

    def __exit__(self, *error) -> None:
        self.wrapped.__exit__(*error)

    def note(self, name: str, value: np.ndarray) -> np.ndarray:
        self.reads.append((name, value.nbytes))
        return value

    def get_slice(self, name: str) -> "Counted":
        return Counted(self.wrapped.get_slice(name), self.reads, name)

    def get_tensor(self, name: str) -> np.ndarray:
        return self.note(name, self.wrapped.get_tensor(name))

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.note(self.name, self.wrapped[index])


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """The tensor and the bytes of each read that follows."""
    found: list[tuple[str, int]] = []
    real = safetensors.safe_open

    def counted(*arguments, **keywords):
        return Counted(real(*arguments, **keywords), found)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    return found


def test_parameters_on_a_mesh_are_those_on_the_host_and_lie_as_the_table_says(model, saved, mesh):
    params = tiny.draw_params(model)
    assert_equal(weights.load(saved)[1], params)
    loaded_config, loaded = weights.load(saved, mesh)
    assert loaded_config == model
    assert_equal(params, loaded)
    expected = sharding.parameters(params, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == expected


def test_every_byte_is_read_once_and_no_more_at_a_time_than_a_device_holds(
    model, saved, mesh, reads
):
    weights.load(saved, mesh)
    shapes = {path: leaf.shape for path, leaf in weights.leaves(decoder.shapes(model)).items()}
    placed = weights.leaves(sharding.parameters(decoder.shapes(model), mesh))
    rows = weights.find_rows(model, shapes)
    assert rows.keys() == {name for name, _ in reads}
    for name, row in rows.items():
        sizes = [size for read, size in reads if read == name]
        # of a layer; none of a tensor's parameters is read in larger pieces than its own
        wholes = [shapes[path][len(row.index) :] for path in row.paths]
        shards = [placed[path].shard_shape(shapes[path])[len(row.index) :] for path in row.paths]
        assert sum(sizes) == sum(4 * math.prod(whole) for whole in wholes), name
        assert max(sizes) <= max(4 * math.prod(shard) for shard in shards), name


def test_any_slice_of_a_parameter_is_that_of_the_whole(model, saved):
    generator = np.random.default_rng(0)
    source = weights.find_source(saved)
    for path, whole in weights.leaves(tiny.draw_params(model)).items():
        for _ in range(8):
            ends = [np.sort(generator.choice(n + 1, 2, replace=False)) for n in whole.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            found = weights.read_slice(source, path, index, np.float32)
            np.testing.assert_array_equal(found, whole[index], err_msg=f"{path} {index}")


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_matrices_become_bfloat16_from_any_type_and_vectors_float32(folder, mesh, stored):
    rewrite(
        folder, lambda tensors: tensors.update({n: t.astype(stored) for n, t in tensors.items()})
    )

    def convert(path: tuple, leaf: np.ndarray) -> np.ndarray:
        # norms have the only vectors of this model
        is_vector = path[-1].key == "scale"
        return leaf.astype(stored).astype(np.float32 if is_vector else ml_dtypes.bfloat16)

    expected = jax.tree_util.tree_map_with_path(convert, tiny.draw_params(UNTIED))
    for place in (None, mesh):
        loaded = weights.load(folder, place, ml_dtypes.bfloat16)[1]
        assert_equal(expected, loaded)
        jax.tree.map(
            lambda mine, its: np.testing.assert_equal(mine.dtype, its.dtype), loaded, expected
        )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_type_that_parameters_cannot_have_is_refused(folder, tmp_path, dtype):
    told = f"dtype is {np.dtype(dtype)}; it must be float32 or bfloat16"
    with pytest.raises(ValueError, match=told):
        weights.load(folder, dtype=dtype)
    with pytest.raises(ValueError, match=told):
        weights.save(tmp_path / "new", UNTIED, tiny.draw_params(UNTIED), dtype)
    assert not (tmp_path / "new").exists()


def test_a_run_starts_from_a_folder_as_it_is_placed_on_the_mesh(folder, mesh):
    settings = dpo_jax_config.Model(source=str(folder))
    started = initial.load(str(folder), settings, 0, mesh)
    assert_equal(tiny.draw_params(UNTIED), started.params)
    expected = sharding.parameters(started.params, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, started.params) == expected
    assert started.tokenizer == str(folder)


def test_nothing_is_read_of_a_folder_with_a_tensor_of_another_shape_or_type(folder, reads):
    rewrite_config(folder, intermediate_size=33)
    with pytest.raises(ValueError, match=r"\(32, 24\)"):
        weights.load(folder)
    rewrite_config(folder, intermediate_size=32)
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}))
    reads.clear()
    with pytest.raises(ValueError, match="is I8"):
        weights.load(folder)
    assert not reads


def test_a_stored_tied_head_is_compared_with_the_embedding_some_rows_at_a_time(
    tmp_path, reads, monkeypatch
):
    monkeypatch.setattr(weights, "COMPARED_ROWS", 7)
    weights.save(tmp_path, TIED, tiny.draw_params(TIED))
    head = tiny.draw_params(TIED)["embedding"]
    for row in (39, 0):
        head[row, -1] += 1
        rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
        reads.clear()
        with pytest.raises(ValueError, match="lm_head.weight that differs from the embedding"):
            weights.load(tmp_path)
        # 40 rows in steps of 7, of two tensors
        assert len(reads) == (12 if row else 2)
        assert max(size for _, size in reads) == 4 * 7 * 24


def test_a_file_that_was_cut_off_or_lacks_a_listed_tensor_is_named(folder):
    file = folder / "model.safetensors"
    names = list(safetensors.numpy.load_file(file))
    weight_map = {name: file.name for name in names}
    (folder / hf_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight cannot be read from .*model\.safe"):
        weights.load(folder)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read from .*model\.safetensors .*again"):
        weights.load(folder)


def test_parameters_saved_from_a_mesh_in_several_files_load_bit_equal(model, mesh, tmp_path):
    params = tiny.draw_params(model)
    weights.save(tmp_path, model, sharding.place(params, mesh), max_file_bytes=LIMIT)
    assert_equal(weights.load(tmp_path)[1], params)


def test_files_obey_the_limit_and_the_index_lists_them_as_transformers_does(saved, model):
    files = sorted(saved.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    contents = {file.name: safetensors.numpy.load_file(file) for file in files}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in contents.values()]
    assert all(
        size <= LIMIT or len(tensors) == 1
        for size, tensors in zip(sizes, contents.values(), strict=True)
    )
    # no file would have fitted onto the one before it
    whole = [sum(pair) > LIMIT for pair in itertools.pairwise(sizes)]
    assert whole.count(False) <= 1
    index = json.loads((saved / hf_files.INDEX).read_text())
    leaves = jax.tree.leaves(tiny.draw_params(model))
    assert index == {
        "metadata": {
            "total_parameters": sum(leaf.size for leaf in leaves),
            "total_size": sum(leaf.nbytes for leaf in leaves),
        },
        "weight_map": {name: file for file, tensors in contents.items() for name in tensors},
    }
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_model_saved_in_bfloat16_says_so_and_takes_half_the_bytes(tmp_path, model):
    params = tiny.draw_params(model)
    weights.save(tmp_path, model, params, ml_dtypes.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert sum(t.nbytes for t in tensors.values()) == 2 * sum(map(np.size, jax.tree.leaves(params)))
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    assert_equal(weights.load(tmp_path)[1], rounded)


def test_a_folder_that_was_not_written_to_its_end_is_not_taken_for_a_model(folder, mesh):
    params = sharding.place(tiny.draw_params(UNTIED), mesh)
    lost = params["layers"]["mlp"]["down"]["kernel"]
    whole = np.asarray(lost)
    lost.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        weights.save(folder, UNTIED, params, max_file_bytes=LIMIT)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        weights.load(folder)
    params["layers"]["mlp"]["down"]["kernel"] = whole
    weights.save(folder, UNTIED, params, max_file_bytes=LIMIT)
    assert_equal(weights.load(folder)[1], tiny.draw_params(UNTIED))


def test_saving_again_leaves_nothing_of_the_model_before_and_all_other_files(folder):
    (folder / "tokenizer.json").write_text("{}")
    other = tiny.draw_params(UNTIED, seed=1)
    weights.save(folder, UNTIED, tiny.draw_params(UNTIED), max_file_bytes=LIMIT)
    assert not (folder / "model.safetensors").exists()
    weights.save(folder, UNTIED, other)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert_equal(weights.load(folder)[1], other)
