"""HF's config.json read and written. Imports no jax."""

import dataclasses
from typing import Any

from dpo_jax.model import config as model_config
from dpo_jax.model import families, hf_rope
from dpo_jax.model.config import DecoderConfig, Experts, Kind
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
        ours: decode(ours, key, hf_rope.require(values, key))
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


def read_kinds(values: dict, layers: int, family: Family) -> list[Kind]:
    """The kind of each layer."""
    given = values.get("layer_types") if family.typed else None
    types = given or family.layer_types(values, layers)
    ropes = hf_rope.read_ropes(values, family)
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
        Kind(
            window if kind == SLIDING else None, hf_rope.require(ropes, kind) if turned[i] else None
        )
        for i, kind in enumerate(types)
    ]


def to_hf(config: DecoderConfig) -> dict:
    """The config.json of a config, in the form of transformers 4, which 5 reads too.

    Raises ValueError for a config that its family's files cannot describe.
    """
    if config.family not in FAMILIES:
        raise ValueError(
            f"family is {config.family!r}; it must be one of {', '.join(map(repr, FAMILIES))}"
        )
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
    return {**values, **hf_rope.write_ropes(kinds, family)}
