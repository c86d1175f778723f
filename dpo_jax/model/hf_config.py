"""HF's config.json read and written. Imports no jax."""

import dataclasses
import math
from typing import Any

from dpo_jax.model import config as model_config
from dpo_jax.model import families
from dpo_jax.model.config import (
    DecoderConfig,
    Experts,
    Kind,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
)
from dpo_jax.model.families import FAMILIES, FULL, KEYS, SLIDING, Family

# our values of HF's, the first of equal ones written
CODES: dict[str, dict[Any, Any]] = {
    "activation": {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
    },
    "residual": {True: "parallel", False: "serial"},
}

# keys of a rotary scaling by our fields
SCALING_KEYS: dict[str, tuple[type, dict[str, str]]] = {
    "linear": (LinearScaling, {"factor": "factor"}),
    "llama3": (
        Llama3Scaling,
        {
            "factor": "factor",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
            "original_max_positions": "original_max_position_embeddings",
        },
    ),
    "yarn": (
        YarnScaling,
        {
            "factor": "factor",
            "original_max_positions": "original_max_position_embeddings",
            "attention_factor": "attention_factor",
            "fast_turns": "beta_fast",
            "slow_turns": "beta_slow",
            "whole_dimensions": "truncate",
        },
    ),
}


def from_hf(config_json: dict) -> DecoderConfig:
    """The config of an HF config.json, in the form of transformers 4 or 5.

    Raises ValueError naming the key for whatever the decoder would not compute as HF does.
    """
    name = find_family(config_json)
    family = FAMILIES[name]
    check_values(config_json, family)
    values = {**family.defaults, **config_json}
    if "num_local_experts" in values:
        # transformers 5 writes the number under this name for every family.
        values.setdefault("num_experts", values["num_local_experts"])
    if family.window_switch and not values.get("use_sliding_window", False):
        values["sliding_window"] = None
    fields = {
        ours: decode(ours, key, require(values, key))
        for ours, key in {**KEYS, **family.keys}.items()
        if key is not None
    }
    heads, width = fields["heads"], fields["width"]
    fields["key_value_heads"] = fields.get("key_value_heads") or heads
    fields["head_dim"] = fields.get("head_dim") or width // heads
    fields["hidden"] = fields["hidden"] or 4 * width
    experts = {
        part: fields.pop(f"experts.{part}") for part in EXPERTS if f"experts.{part}" in fields
    }
    block = model_config.smallest_block(read_kinds(values, fields["layers"], family))
    return DecoderConfig(
        **fields,
        **family.fixed,
        family=name,
        block=block,
        experts=Experts(**experts) if experts else None,
    )


EXPERTS = ("count", "chosen", "normalised")


def find_family(config_json: dict) -> str:
    """The family of config.json's architecture."""
    architectures = config_json.get("architectures") or []
    names = {family.architecture: name for name, family in FAMILIES.items()}
    if len(architectures) != 1 or architectures[0] not in names:
        raise ValueError(
            f"architectures is {architectures} in config.json; supported: {', '.join(names)}"
        )
    return names[architectures[0]]


def check_values(config_json: dict, family: Family) -> None:
    """Raises ValueError for a key whose value this family's models may not have."""
    for name, allowed in family.only.items():
        value = config_json.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{name} is {value!r} in config.json; for {family.architecture} only "
                f"{' or '.join(map(repr, allowed))} is supported"
            )
    for name, other in family.equal.items():
        value = config_json.get(name)
        if value is not None and value != config_json.get(other):
            raise ValueError(
                f"{name} is {value!r} in config.json; for {family.architecture} only that of "
                f"{other}, {config_json.get(other)!r}, is supported"
            )


def decode(ours: str, key: str, value: Any) -> Any:
    """Our value of a field for HF's value of its key."""
    codes = CODES.get(ours)
    if codes is None:
        return value
    if value not in codes:
        raise ValueError(
            f"{key} is {value!r} in config.json; supported: {', '.join(map(repr, codes))}"
        )
    return codes[value]


def encode(ours: str, value: Any) -> Any:
    """HF's value of a field's key for our value."""
    codes = CODES.get(ours)
    return value if codes is None else next(hf for hf, own in codes.items() if own == value)


def require(values: dict, name: str) -> Any:
    """The value of a key that config.json must have."""
    if name not in values:
        raise ValueError(f"config.json has no {name!r}")
    return values[name]


def read_kinds(values: dict, layers: int, family: Family) -> list[Kind]:
    """The kind of each layer."""
    given = values.get("layer_types") if family.typed else None
    types = given or family.layer_types(values, layers)
    ropes = read_ropes(values, family)
    turned = families.rope_layers(values, layers)
    for name, found in {"layer_types": types, "no_rope_layers": turned}.items():
        if len(found) != layers:
            raise ValueError(f"{name} is {found} in config.json; there are {layers} layers")
    if not set(types) <= {FULL, SLIDING}:
        raise ValueError(f"layer_types is {types} in config.json; supported: {FULL}, {SLIDING}")
    window = values.get("sliding_window")
    if SLIDING in types and not window:
        raise ValueError(
            f"sliding_window is {window!r} in config.json; a layer of layer_types has the type "
            f"{SLIDING}, which needs one"
        )
    return [
        Kind(window if kind == SLIDING else None, require(ropes, kind) if turned[i] else None)
        for i, kind in enumerate(types)
    ]


def read_ropes(values: dict, family: Family) -> dict[str, Rope | None]:
    """Rotary positions of each type of layer, of `rope_parameters` (by type, where types differ) or
    of the keys of transformers 4.
    """
    if family.theta is None:
        return {FULL: None, SLIDING: None}
    new = values.get("rope_parameters")
    if new is not None:
        by_type = new if FULL in new else {FULL: new, SLIDING: new}
        return {
            kind: read_rope(by_type[kind], "rope_parameters", values, family)
            for kind in (FULL, SLIDING)
            if kind in by_type
        }
    old = dict(values.get("rope_scaling") or {})
    key, default = family.theta
    full = read_rope(
        {**old, "rope_theta": values.get(key, default)}, "rope_scaling", values, family
    )
    if family.local_theta is None:
        return {FULL: full, SLIDING: full}
    key, default = family.local_theta
    return {FULL: full, SLIDING: Rope(theta=float(values.get(key, default)))}


def read_rope(rope: dict, where: str, values: dict, family: Family) -> Rope:
    """Rotary positions of a dict of config.json."""
    rope = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = float(require(rope, "rope_theta"))
    del rope["rope_theta"]
    fraction = 1.0
    if family.fraction is not None:
        key, default = family.fraction
        fraction = rope.pop("partial_rotary_factor", values.get(key, default))
    elif values.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor is {values['partial_rotary_factor']} in config.json; for "
            f"{family.architecture} only 1.0 is supported"
        )
    if kind == "default":
        check_rope_keys(rope, {}, kind, where)
        return Rope(theta, None, fraction)
    if kind not in SCALING_KEYS:
        raise ValueError(
            f"rope_type is {kind!r} in {where} of config.json; supported: 'default', "
            f"{', '.join(map(repr, SCALING_KEYS))}"
        )
    return Rope(theta, read_scaling(kind, rope, where, values), fraction)


def read_scaling(kind: str, rope: dict, where: str, values: dict) -> Scaling:
    """A rotary scaling of its own keys."""
    make, keys = SCALING_KEYS[kind]
    if kind == "yarn":
        rope = {"original_max_position_embeddings": values["max_position_embeddings"], **rope}
        rope["attention_factor"] = yarn_attention_factor(rope)
        rope = {name: v for name, v in rope.items() if not name.startswith("mscale")}
    check_rope_keys(rope, keys, kind, where)
    optional = {
        field.name for field in dataclasses.fields(make) if field.default is not dataclasses.MISSING
    }
    return make(
        **{
            ours: require(rope, hf)
            for ours, hf in keys.items()
            if ours not in optional or rope.get(hf) is not None
        }
    )


def yarn_attention_factor(rope: dict) -> float:
    """What YaRN multiplies cosines and sines by, given or of its factor."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(max(require(rope, "factor"), 1.0)) + 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    return magnitude(over) / magnitude(under) if over and under else magnitude(1.0)


def check_rope_keys(rope: dict, keys: dict[str, str], kind: str, where: str) -> None:
    """Raises ValueError for a key that this kind of rotary positions lacks."""
    for name in rope:
        if name not in keys.values():
            raise ValueError(f"{where} of config.json has {name!r}, which rope_type {kind!r} lacks")


def to_hf(config: DecoderConfig) -> dict:
    """The config.json of a config, in the form of transformers 4, which 5 reads too.

    Raises ValueError for a config that its family's files cannot describe.
    """
    family = FAMILIES[config.family]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        # HF's defaults for absent ones are Llama 2's, wrong for any other tokenizer.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": "float32",
        **{name: allowed[0] for name, allowed in family.only.items() if allowed[0] is not None},
        **write_kinds(config, family),
    }
    for ours, key in {**KEYS, **family.keys}.items():
        if key is not None:
            owner, _, part = ours.rpartition(".")
            value = getattr(getattr(config, owner), part) if owner else getattr(config, ours)
            values[key] = encode(ours, value)
    again = from_hf(values)
    if again != config:
        differing = [
            f"{field.name} {getattr(config, field.name)!r}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(again, field.name)
        ]
        raise ValueError(
            f"{family.architecture} cannot have {', '.join(differing)}; choose another family"
        )
    return values


def write_kinds(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys that tell windows and rotary positions."""
    kinds = [config.block[i % len(config.block)] for i in range(config.layers)]
    windows = [kind.window for kind in kinds if kind.window is not None]
    values: dict[str, Any] = {}
    if "sliding_window" in family.defaults:
        values["sliding_window"] = windows[0] if windows else None
    if family.window_switch:
        values["use_sliding_window"] = bool(windows)
    if family.typed:
        values["layer_types"] = [FULL if kind.window is None else SLIDING for kind in kinds]
    if "no_rope_layer_interval" in family.defaults:
        values["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    return {**values, **write_ropes(kinds, family)}


def write_ropes(kinds: list[Kind], family: Family) -> dict[str, Any]:
    """The keys of rotary positions."""
    if family.theta is None:
        return {}
    full = [kind.rope for kind in kinds if kind.rope and kind.window is None]
    sliding = [kind.rope for kind in kinds if kind.rope and kind.window is not None]
    rope = (full or (sliding if family.local_theta is None else []) or [Rope(family.theta[1])])[0]
    values: dict[str, Any] = {
        family.theta[0]: rope.theta,
        "rope_scaling": rope.scaling and write_scaling(rope.scaling),
    }
    if family.local_theta is not None:
        local = (sliding or [Rope(family.local_theta[1])])[0]
        values[family.local_theta[0]] = local.theta
    if family.fraction is not None:
        values[family.fraction[0]] = rope.fraction
    return values


def write_scaling(scaling: Scaling) -> dict[str, Any]:
    """The dict of config.json that describes a rotary scaling."""
    for kind, (make, keys) in SCALING_KEYS.items():
        if isinstance(scaling, make):
            return {
                "rope_type": kind,
                **{hf: getattr(scaling, ours) for ours, hf in keys.items()},
            }
    raise TypeError(f"{type(scaling).__name__} is no rotary scaling")
