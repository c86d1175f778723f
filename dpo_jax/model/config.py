"""The shape of a decoder: presets, and HF's config.json read and written. Imports no jax."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths ('llama3' in HF)."""

    # by how much wavelengths beyond the original context are stretched
    factor: float
    # wavelengths over original_max_positions / this are stretched in full
    low_frequency_factor: float
    # wavelengths under original_max_positions / this are left alone
    high_frequency_factor: float
    # positions that the model was pretrained on
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the parameters' shapes and the function that they compute."""

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    # heads of keys and values, each shared by heads / key_value_heads query heads
    key_value_heads: int
    head_dim: int
    # units of the MLP
    hidden: int
    # longest sequence that the model is meant for; nothing is allocated from it
    max_positions: int
    # base of the rotary wavelengths
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    # whether the output matrix is the embedding
    tied_head: bool = False
    # positions that a token sees, itself included; None: all before it
    sliding_window: int | None = None

    def __post_init__(self):
        """Raises ValueError where the numbers do not fit together."""
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of key_value_heads, "
                f"{self.key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")


LLAMA_3_1 = RopeScaling(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=8192
)

PRESETS: dict[str, DecoderConfig] = {
    # For tests.
    "tiny": DecoderConfig(
        vocabulary_size=512,
        width=64,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=16,
        hidden=128,
        max_positions=1024,
        tied_head=True,
    ),
    # To try a real tokenizer of 50 thousand tokens on a CPU: 3,293,504 parameters.
    "tiny-50k": DecoderConfig(
        vocabulary_size=50_304,
        width=64,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=16,
        hidden=128,
        max_positions=2048,
        tied_head=True,
    ),
    # For the built-in task: 541,536, 1,082,496 and 5,082,368 parameters.
    "reviews-500k": DecoderConfig(
        vocabulary_size=1024,
        width=96,
        layers=4,
        heads=3,
        key_value_heads=3,
        head_dim=32,
        hidden=256,
        max_positions=1024,
        tied_head=True,
    ),
    "reviews-1m": DecoderConfig(
        vocabulary_size=1024,
        width=128,
        layers=4,
        heads=4,
        key_value_heads=4,
        head_dim=32,
        hidden=448,
        max_positions=1024,
        tied_head=True,
    ),
    "reviews-5m": DecoderConfig(
        vocabulary_size=1024,
        width=256,
        layers=6,
        heads=4,
        key_value_heads=4,
        head_dim=64,
        hidden=704,
        max_positions=1024,
        tied_head=True,
    ),
    # The stories models' shapes with a vocabulary that GPT-NeoX's tokenizer fits in: 20,463,264 and
    # 123,587,328 parameters, of which 5,975,712 and 84,953,856 are not the embedding.
    "llama-15m": DecoderConfig(
        vocabulary_size=50_304,
        width=288,
        layers=6,
        heads=6,
        key_value_heads=6,
        head_dim=48,
        hidden=768,
        max_positions=2048,
        tied_head=True,
    ),
    "llama-110m": DecoderConfig(
        vocabulary_size=50_304,
        width=768,
        layers=12,
        heads=12,
        key_value_heads=12,
        head_dim=64,
        hidden=2048,
        max_positions=2048,
        tied_head=True,
    ),
    # Published shapes.
    "llama-3.2-1b": DecoderConfig(
        vocabulary_size=128_256,
        width=2048,
        layers=16,
        heads=32,
        key_value_heads=8,
        head_dim=64,
        hidden=8192,
        max_positions=131_072,
        rope_theta=500_000.0,
        rope_scaling=dataclasses.replace(LLAMA_3_1, factor=32.0),
        tied_head=True,
    ),
    "llama-3.1-8b": DecoderConfig(
        vocabulary_size=128_256,
        width=4096,
        layers=32,
        heads=32,
        key_value_heads=8,
        head_dim=128,
        hidden=14_336,
        max_positions=131_072,
        rope_theta=500_000.0,
        rope_scaling=LLAMA_3_1,
    ),
    "mistral-7b": DecoderConfig(
        vocabulary_size=32_000,
        width=4096,
        layers=32,
        heads=32,
        key_value_heads=8,
        head_dim=128,
        hidden=14_336,
        max_positions=32_768,
        sliding_window=4096,
    ),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What one HF architecture's config.json means where it differs from the others'."""

    model_type: str
    # values of keys that the file may lack
    defaults: dict[str, Any]
    # the only values that these keys may have; others are refused, since nothing here computes them
    only: dict[str, tuple]


# HF's classes of these architectures read no other key that changes what they compute.
COMMON = {
    "hidden_act": ("silu",),
    "attention_dropout": (None, 0),
    "quantization_config": (None,),
    "auto_map": (None,),
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults={"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False},
        only={
            **COMMON,
            "attention_bias": (None, False),
            "mlp_bias": (None, False),
            "pretraining_tp": (None, 1),
            "sliding_window": (None,),
        },
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults={"head_dim": None, "tie_word_embeddings": False, "sliding_window": 4096},
        only=COMMON,
    ),
}


def from_hf(config_json: dict) -> DecoderConfig:
    """The config of an HF config.json, in the form of transformers 4 or 5.

    Raises ValueError naming the key for whatever the decoder would not compute as HF does.
    """
    architectures = config_json.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise ValueError(
            f"architectures is {architectures} in config.json; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architectures[0]]
    for name, allowed in family.only.items():
        value = config_json.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name} is {value!r} in config.json; for {architectures[0]} only "
                f"{' or '.join(map(repr, allowed))} is supported"
            )
    values = {**family.defaults, **config_json}
    heads = require(values, "num_attention_heads")
    width = require(values, "hidden_size")
    theta, scaling = read_rope(config_json)
    return DecoderConfig(
        vocabulary_size=require(values, "vocab_size"),
        width=width,
        layers=require(values, "num_hidden_layers"),
        heads=heads,
        key_value_heads=require(values, "num_key_value_heads") or heads,
        head_dim=values["head_dim"] or width // heads,
        hidden=require(values, "intermediate_size"),
        max_positions=require(values, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=require(values, "rms_norm_eps"),
        tied_head=values["tie_word_embeddings"],
        sliding_window=values.get("sliding_window"),
    )


def require(values: dict, name: str) -> Any:
    """The value of a key that config.json must have."""
    if name not in values:
        raise ValueError(f"config.json has no {name!r}")
    return values[name]


ROPE_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def read_rope(config_json: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, of `rope_parameters` or (transformers 4) `rope_theta`, `rope_scaling`."""
    if config_json.get("rope_parameters") is not None:
        where, rope = "rope_parameters", dict(config_json["rope_parameters"])
        theta = require(rope, "rope_theta")
    else:
        where, rope = "rope_scaling", dict(config_json.get("rope_scaling") or {})
        # Files older than the key mean Llama's original base.
        theta = config_json.get("rope_theta", 10_000.0)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type is {kind!r} in {where} of config.json; supported: 'default', 'llama3'"
        )
    known = {"rope_theta", "type", *(ROPE_KEYS if kind == "llama3" else ())}
    for name in rope:
        if name not in known:
            raise ValueError(f"{where} of config.json has {name!r}, which rope_type {kind!r} lacks")
    if kind == "default":
        return float(theta), None
    return float(theta), RopeScaling(**{ours: require(rope, hf) for hf, ours in ROPE_KEYS.items()})


def to_hf(config: DecoderConfig) -> dict:
    """The config.json of a config, in the form of transformers 4, which 5 reads too."""
    architecture = "LlamaForCausalLM" if config.sliding_window is None else "MistralForCausalLM"
    scaling = config.rope_scaling
    rope_scaling = scaling and {
        "rope_type": "llama3",
        **{hf: getattr(scaling, ours) for hf, ours in ROPE_KEYS.items()},
    }
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "sliding_window": config.sliding_window,
        "hidden_act": "silu",
        # HF's defaults for absent ones are Llama 2's, wrong for any other tokenizer.
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }


def parameter_count(config: DecoderConfig) -> int:
    """How many numbers the parameters are, a tied head counted once."""
    embedding = config.vocabulary_size * config.width
    attention = 2 * config.width * config.head_dim * (config.heads + config.key_value_heads)
    mlp = 3 * config.width * config.hidden
    layer = attention + mlp + 2 * config.width
    return embedding * (1 if config.tied_head else 2) + config.layers * layer + config.width
