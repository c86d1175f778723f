"""config.json of published models and of others, read and refused."""

import dataclasses
import json
from typing import Any

import pytest

from dpo_jax.model import config as model_config
from dpo_jax.model import families, hf_config, weights
from dpo_jax.model.config import Kind, Rope, YarnScaling
from dpo_jax.model.presets import PRESETS, PUBLISHED
from tests import tiny

GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
QWEN_2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT_2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 1280,
    "n_head": 20,
    "n_layer": 36,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "vocab_size": 50257,
}
OPT = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "ffn_dim": 8192,
    "hidden_size": 2048,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "vocab_size": 50272,
    "word_embed_proj_dim": 2048,
}
PHI_2 = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 51200,
}
PHI_3 = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
# in the form of transformers 4, as the hub has them
HUB: dict[str, dict[str, Any]] = {
    "gemma-2-9b": GEMMA_2,
    "gemma-3-1b": GEMMA_3,
    "qwen2.5-0.5b": QWEN_2,
    "qwen3-30b-a3b": QWEN_3_MOE,
    "pythia-2.8b": PYTHIA,
    "gpt2-large": GPT_2,
    "opt-1.3b": OPT,
    "phi-2": PHI_2,
    "phi-3-mini": PHI_3,
    "mixtral-8x7b": MIXTRAL,
}


@pytest.mark.parametrize("name", HUB)
def test_the_files_of_published_models_give_their_presets(name):
    assert hf_config.from_hf(HUB[name]) == PRESETS[name]


# a file, a key, a value that nothing here computes, and the key that the error names
REFUSED: list[tuple[dict[str, Any], str, Any, str]] = [
    (GEMMA_2, "use_bidirectional_attention", True, "use_bidirectional_attention"),
    (GEMMA_2, "hidden_activation", "gelu", "hidden_activation"),
    (GEMMA_2, "layer_types", ["chunked_attention"] * 42, "layer_types"),
    (GEMMA_2, "layer_types", ["full_attention"] * 41, "layer_types"),
    (GEMMA_2, "sliding_window", None, "sliding_window"),
    (GEMMA_3, "architectures", ["Gemma3ForConditionalGeneration"], "architectures"),
    (QWEN_2, "hidden_act", "quick_gelu", "hidden_act"),
    (QWEN_2, "partial_rotary_factor", 0.5, "partial_rotary_factor"),
    (QWEN_2, "auto_map", {"AutoConfig": "x.Y"}, "auto_map"),
    (QWEN_3_MOE, "mlp_only_layers", [0], "mlp_only_layers"),
    (QWEN_3_MOE, "decoder_sparse_step", 2, "decoder_sparse_step"),
    (PYTHIA, "hidden_dropout", 0.1, "hidden_dropout"),
    (GPT_2, "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx"),
    (GPT_2, "scale_attn_weights", False, "scale_attn_weights"),
    (GPT_2, "add_cross_attention", True, "add_cross_attention"),
    (OPT, "do_layer_norm_before", False, "do_layer_norm_before"),
    (OPT, "word_embed_proj_dim", 512, "word_embed_proj_dim"),
    (OPT, "enable_bias", False, "enable_bias"),
    (PHI_2, "qk_layernorm", True, "qk_layernorm"),
    (PHI_3, "rope_scaling", {"type": "longrope", "short_factor": [1.0]}, "rope_type"),
    (MIXTRAL, "router_jitter_noise", 0.1, "router_jitter_noise"),
    (MIXTRAL, "quantization_config", {"bits": 4}, "quantization_config"),
]


@pytest.mark.parametrize(
    "case", REFUSED, ids=lambda case: f"{case[0]['architectures'][0]} {case[1]}"
)
def test_what_a_family_does_not_compute_is_refused_by_name_with_what_is_supported(case):
    config_json, key, value, told = case
    with pytest.raises(ValueError, match=rf"^{told} is .* in .*config\.json(;|.*supported)"):
        hf_config.from_hf({**config_json, key: value})


def test_yarn_has_its_defaults_and_what_its_paper_multiplies_by():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (kind,) = hf_config.from_hf({**QWEN_2, "rope_scaling": yarn}).block
    assert kind.rope is not None and isinstance(kind.rope.scaling, YarnScaling)
    assert kind.rope.scaling.attention_factor == pytest.approx(1.13862944)
    assert (kind.rope.scaling.fast_turns, kind.rope.scaling.slow_turns) == (32, 1)
    scales = {"mscale": 2.0, "mscale_all_dim": 1.0}
    (kind,) = hf_config.from_hf({**QWEN_2, "rope_scaling": {**yarn, **scales}}).block
    assert kind.rope is not None and isinstance(kind.rope.scaling, YarnScaling)
    assert kind.rope.scaling.attention_factor == pytest.approx(1.27725887 / 1.13862944)


def test_windows_count_only_under_their_switch():
    late = {**QWEN_2, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 22}
    block = hf_config.from_hf(late).block
    rope = Rope(1_000_000.0)
    assert block == (Kind(rope=rope),) * 22 + (Kind(window=64, rope=rope),) * 2
    assert hf_config.from_hf({**late, "use_sliding_window": False}).block == (Kind(rope=rope),)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block": (Kind(window=5),)}, "LlamaForCausalLM cannot have block"),
        ({"norm": "layer"}, "cannot have norm 'layer'"),
        ({"family": "qwen2"}, "Qwen2ForCausalLM cannot have attention_bias False"),
    ],
)
def test_a_config_that_its_family_cannot_describe_is_not_written(tmp_path, changes, told):
    config = dataclasses.replace(tiny.DECODER, **changes)
    with pytest.raises(ValueError, match=told):
        weights.save(tmp_path / "new", config, tiny.draw_params(config))
    assert not (tmp_path / "new").exists()


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="family is 'lama'; it must be one of 'llama'"):
        hf_config.to_hf(dataclasses.replace(tiny.DECODER, family="lama"))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_makes_the_parameters_of_published_shapes(name):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    values = json.loads(json.dumps(hf_config.to_hf(PRESETS[name])))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == families.FAMILIES[PRESETS[name].family].architecture
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == model_config.parameter_count(PRESETS[name])
