"""Adapters in PEFT's form: its own library loads them and computes what we compute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dpo_jax.model import lora, peft
from dpo_jax.model.attention import Ids
from tests import test_families, test_lora, tiny

# every way in which HF's linear maps lie: apart, fused, by head, [inputs, outputs], a remainder
FAMILIES = (
    *("llama tied, biases", "gemma3", "olmo2", "phi3", "gpt2", "gpt_neox", "opt", "phi"),
    *("mixtral", "qwen3"),
)
SETTINGS = peft.Settings(3, 6.0, rank_stabilised=False, dropout=0.1, base_model="owner/base")
TARGETS = ("query", "value", "output", "up", "down")

pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def save(folder: Path, model, targets=None, **changes: Any) -> tuple[dict, dict]:
    """An adapter of a decoder, and the content of its adapter_config.json."""
    adapter = test_lora.draw_adapter(model, targets)
    peft.save(folder, model, adapter, SETTINGS._replace(**changes), np.float32)
    return adapter, json.loads((folder / peft.CONFIG).read_text())


def test_files_of_linear_maps_that_are_apart_hold_the_matrices_transposed(tmp_path):
    adapter, config = save(tmp_path, tiny.DECODER, ("query", "output"))
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    layer = "base_model.model.model.layers.1.self_attn."
    query, output = (adapter["layers"]["attention"][name] for name in ("query", "output"))
    down, up = (tensors[f"{layer}q_proj.lora_{side}.weight"] for side in "AB")
    assert (down.shape, up.shape) == ((3, 24), (24, 3))
    assert down[2, 5] == query["lora_a"][1, 5, 2]
    assert up[6 * 3 + 4, 2] == query["lora_b"][1, 2, 3, 4]
    down, up = (tensors[f"{layer}o_proj.lora_{side}.weight"] for side in "AB")
    assert down[2, 6 * 3 + 4] == output["lora_a"][1, 3, 4, 2]
    assert up[7, 1] == output["lora_b"][1, 1, 7]
    assert len(tensors) == 8
    assert config["target_modules"] == ["q_proj", "o_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6.0, 0.1)
    assert config["base_model_name_or_path"] == "owner/base"
    assert not config["rank_pattern"] and not config["fan_in_fan_out"]


def test_adapters_of_a_fused_linear_map_become_one_of_their_ranks_together(tmp_path):
    adapter, config = save(tmp_path, test_lora.GPT_2, ("query", "value"))
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    down, up = (
        tensors[f"base_model.model.transformer.h.1.attn.c_attn.lora_{side}.weight"] for side in "AB"
    )
    assert (down.shape, up.shape) == ((6, 24), (72, 6))
    # keys have none, and each keeps to its own outputs
    assert not up[24:48].any() and not up[:24, 3:].any() and not up[48:, :3].any()
    value = adapter["layers"]["attention"]["value"]
    assert up[48 + 6 * 3 + 2, 3 + 1] == value["lora_b"][1, 1, 3, 2]
    assert config["rank_pattern"] == {"c_attn": 6} and config["alpha_pattern"] == {"c_attn": 12.0}
    assert config["fan_in_fan_out"]


def test_names_are_as_short_as_no_other_linear_map_has_them(tmp_path):
    _, config = save(tmp_path, test_lora.GPT_2)
    assert config["target_modules"] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


@pytest.mark.parity
@pytest.mark.parametrize("tried", FAMILIES, indirect=True)
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_logits_with_an_adapter_are_those_of_peft(tried, rank_stabilised, tmp_path):
    library = pytest.importorskip("peft", reason="parity needs peft")
    import transformers

    model = tried.config
    there = lora.find_targets(model, None)
    targets = tuple(name for name in TARGETS if name in there)
    adapter, _ = save(tmp_path, model, targets, rank_stabilised=rank_stabilised)
    base = transformers.AutoModelForCausalLM.from_pretrained(tried.folder)
    adapted = library.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    loaded = library.get_peft_model_state_dict(adapted)
    assert len(loaded) == len(safetensors.numpy.load_file(tmp_path / peft.WEIGHTS))
    tokens = test_families.draw_tokens(1, 24)
    expected = test_families.torch_logits(adapted, tokens)
    plain = test_families.torch_logits(tried.model, tokens)
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
    scale = lora.scale(SETTINGS.alpha, SETTINGS.rank, rank_stabilised=rank_stabilised)
    joined = lora.join(tried.params, adapter, scale)
    ids = Ids(np.ones_like(tokens), np.zeros_like(tokens), np.arange(24, dtype=np.int32)[None])
    test_families.assert_near(test_families.our_logits(model, joined, tokens, ids), expected)
    merged = adapted.merge_and_unload()
    again = test_families.our_logits(model, lora.merge(joined), tokens, ids)
    test_families.assert_near(again, test_families.torch_logits(merged, tokens))


# the models of every family, which PEFT's are made of
tried = test_families.tried
