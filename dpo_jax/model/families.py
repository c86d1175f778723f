"""The families of models: what an HF architecture's config.json means, and its tensors' names.

Dropout is no part of a model here: files of GPT-2, OPT and Phi name one, which is not applied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from dpo_jax.model import tensors

FULL, SLIDING = "full_attention", "sliding_attention"


def all_full(values: dict, layers: int) -> list[str]:
    """Every layer sees all tokens before."""
    return [FULL] * layers


def all_sliding(values: dict, layers: int) -> list[str]:
    """Every layer has the window, if there is one."""
    return [SLIDING if values.get("sliding_window") else FULL] * layers


def sliding_late(values: dict, layers: int) -> list[str]:
    """Layers from max_window_layers on have the window, if there is one."""
    if not values.get("sliding_window"):
        return [FULL] * layers
    first = values.get("max_window_layers", 28)
    return [FULL if i < first else SLIDING for i in range(layers)]


def sliding_but_every(name: str | None, default: int) -> Callable[[dict, int], list[str]]:
    """Every n-th layer sees all, n of the key `name`, if any; the others have the window."""

    def types(values: dict, layers: int) -> list[str]:
        n = values.get(name, default)
        return [SLIDING if (i + 1) % n else FULL for i in range(layers)]

    return types


def sliding_without_rope(values: dict, layers: int) -> list[str]:
    """Layers without rotary positions have the window, if there is one."""
    turned = rope_layers(values, layers)
    there = bool(values.get("sliding_window"))
    return [SLIDING if there and not turned[i] else FULL for i in range(layers)]


def rope_layers(values: dict, layers: int) -> list[int]:
    """Whether each layer has rotary positions; all, where the file does not speak of it."""
    given = values.get("no_rope_layers")
    if given is not None or "no_rope_layer_interval" not in values:
        return given or [1] * layers
    return [int((i + 1) % values["no_rope_layer_interval"] != 0) for i in range(layers)]


@dataclasses.dataclass(frozen=True)
class Family:
    """One HF architecture, where it differs from the others."""

    architecture: str
    model_type: str
    names: tensors.Table
    # what files of the model without its head leave out of the names
    prefix: str = "model."
    # keys of config.json by our fields, where they are not as in KEYS; None: there is no key
    keys: dict[str, str | None] = dataclasses.field(default_factory=dict)
    # values of keys that the file may lack
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    # the only values that these keys may have; others are refused, since nothing here computes
    # them. The first is what an absent key means, and what is written.
    only: dict[str, tuple] = dataclasses.field(default_factory=dict)
    # keys that must have the value of another one
    equal: dict[str, str] = dataclasses.field(default_factory=dict)
    # our fields that are the same in all of the family's models
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    # each layer's type where the file has no layer_types
    layer_types: Callable[[dict, int], list[str]] = all_full
    # whether the file may have layer_types
    typed: bool = False
    # whether a window counts only under use_sliding_window
    window_switch: bool = False
    # key and default of the base of the rotary wavelengths; None: there are no rotary positions
    theta: tuple[str, float] | None = ("rope_theta", 10_000.0)
    # the same of layers with a window, where they have one of their own
    local_theta: tuple[str, float] | None = None
    # the same of the part of a head that is turned; None: all of it
    fraction: tuple[str, float] | None = None


# HF's classes of these architectures read no other key that changes what they compute.
COMMON = {"attention_dropout": (None, 0), "quantization_config": (None,), "auto_map": (None,)}

KEYS: dict[str, str | None] = {
    "vocabulary_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
    "tied_head": "tie_word_embeddings",
}
BIAS: dict[str, str | None] = {
    "attention_bias": "attention_bias",
    "output_bias": "attention_bias",
}
ALL_HEADS: dict[str, str | None] = {"key_value_heads": None, "head_dim": None}

UNTIED = {"head_dim": None, "tie_word_embeddings": False}
TIED = {"head_dim": None, "tie_word_embeddings": True}
NO_BIAS = {"attention_bias": False}
LAYER_NORM = {"norm": "layer", "gated": False}
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
NO_WINDOW = {"sliding_window": (None,)}

QWEN = {"typed": True, "window_switch": True, "layer_types": sliding_late}

GEMMA_FIXED = {"norm": "rms_plus_one", "activation": "gelu_tanh", "scaled_embedding": True}
GEMMA_ONLY = {
    **COMMON,
    "use_bidirectional_attention": (None, False),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, **NO_BIAS}
GEMMA_KEYS: dict[str, str | None] = {
    **BIAS,
    "activation": None,
    "query_scalar": "query_pre_attn_scalar",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        tensors.PLAIN,
        keys={**BIAS, "mlp_bias": "mlp_bias"},
        defaults={**UNTIED, **NO_BIAS, "num_key_value_heads": None, "mlp_bias": False},
        only={**COMMON, **NO_WINDOW, "pretraining_tp": (None, 1)},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        tensors.PLAIN,
        defaults={**UNTIED, "sliding_window": 4096},
        only=COMMON,
        layer_types=all_sliding,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        tensors.PLAIN,
        defaults={**UNTIED, "sliding_window": 4096},
        only=COMMON,
        fixed={"attention_bias": True},
        **QWEN,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        tensors.PLAIN,
        keys=BIAS,
        defaults={**UNTIED, **NO_BIAS, "head_dim": 128, "sliding_window": 4096},
        only=COMMON,
        fixed={"query_key_norm": "head"},
        **QWEN,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        "gemma",
        tensors.PLAIN,
        keys={**BIAS, "activation": None},
        defaults=GEMMA_DEFAULTS,
        # Files name the error function and mean its approximation.
        only={**GEMMA_ONLY, **NO_WINDOW, "hidden_act": ("gelu_pytorch_tanh", "gelu")},
        fixed=GEMMA_FIXED,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        tensors.SANDWICH,
        keys=GEMMA_KEYS,
        defaults={
            **GEMMA_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        only=GEMMA_ONLY,
        fixed={**GEMMA_FIXED, "norm_placement": "sandwich"},
        layer_types=sliding_but_every(None, 2),
        typed=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        tensors.SANDWICH,
        keys=GEMMA_KEYS,
        defaults={
            **GEMMA_DEFAULTS,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 4096,
        },
        only=GEMMA_ONLY,
        fixed={**GEMMA_FIXED, "norm_placement": "sandwich", "query_key_norm": "head"},
        layer_types=sliding_but_every("sliding_window_pattern", 6),
        typed=True,
        theta=("rope_theta", 1_000_000.0),
        local_theta=("rope_local_base_freq", 10_000.0),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        tensors.PHI3,
        defaults={**UNTIED, "num_key_value_heads": None, "sliding_window": None},
        # Files point to code from before HF had these models (auto_map).
        only={name: values for name, values in COMMON.items() if name != "auto_map"},
        layer_types=all_sliding,
        fraction=("partial_rotary_factor", 1.0),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "olmo2",
        tensors.OLMO2,
        keys=BIAS,
        defaults={**UNTIED, **NO_BIAS, "num_key_value_heads": None},
        only={**COMMON, **NO_WINDOW},
        fixed={"norm_placement": "post", "query_key_norm": "width"},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        tensors.PLAIN,
        keys={**BIAS, "mlp_bias": "mlp_bias"},
        defaults={
            **TIED,
            **NO_BIAS,
            "mlp_bias": False,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
        },
        only=COMMON,
        layer_types=sliding_without_rope,
        typed=True,
        window_switch=True,
        theta=("rope_theta", 2_000_000.0),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "gpt2",
        tensors.GPT2,
        prefix="transformer.",
        keys={
            **ALL_HEADS,
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "hidden": "n_inner",
            "max_positions": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        defaults={"n_inner": None, "tie_word_embeddings": True},
        only={
            "quantization_config": (None,),
            "auto_map": (None,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
        fixed={**LAYER_NORM, **BIASES, "position_offset": 0},
        theta=None,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        tensors.GPT_NEOX,
        prefix="gpt_neox.",
        keys={
            **ALL_HEADS,
            **BIAS,
            "norm_epsilon": "layer_norm_eps",
            "residual": "use_parallel_residual",
        },
        defaults={
            "tie_word_embeddings": False,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        only={**COMMON, "hidden_dropout": (None, 0)},
        fixed={**LAYER_NORM, "mlp_bias": True},
        theta=("rotary_emb_base", 10_000.0),
        fraction=("rotary_pct", 0.25),
    ),
    "opt": Family(
        "OPTForCausalLM",
        "opt",
        tensors.OPT,
        keys={
            **ALL_HEADS,
            "hidden": "ffn_dim",
            "norm_epsilon": None,
            "activation": "activation_function",
        },
        defaults={"tie_word_embeddings": True, "activation_function": "relu"},
        only={
            **COMMON,
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
        },
        equal={"word_embed_proj_dim": "hidden_size"},
        fixed={**LAYER_NORM, **BIASES, "norm_epsilon": 1e-5, "position_offset": 2},
        theta=None,
    ),
    "phi": Family(
        "PhiForCausalLM",
        "phi",
        tensors.PHI,
        keys={"head_dim": None, "norm_epsilon": "layer_norm_eps"},
        defaults={"num_key_value_heads": None, "tie_word_embeddings": False},
        only={**COMMON, "qk_layernorm": (False,)},
        fixed={**LAYER_NORM, **BIASES, "residual": "parallel_one_norm", "head_bias": True},
        fraction=("partial_rotary_factor", 0.5),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "mixtral",
        tensors.MIXTRAL,
        keys={"experts.count": "num_local_experts", "experts.chosen": "num_experts_per_tok"},
        defaults={**UNTIED, "sliding_window": None},
        only={**COMMON, "router_jitter_noise": (0.0,)},
        layer_types=all_sliding,
        theta=("rope_theta", 1_000_000.0),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        tensors.QWEN3_MOE,
        keys={
            **BIAS,
            "hidden": "moe_intermediate_size",
            "experts.count": "num_experts",
            "experts.chosen": "num_experts_per_tok",
            "experts.normalised": "norm_topk_prob",
        },
        defaults={**UNTIED, **NO_BIAS, "norm_topk_prob": False, "sliding_window": 4096},
        only={**COMMON, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
        fixed={"query_key_norm": "head"},
        layer_types=all_sliding,
        window_switch=True,
    ),
}
