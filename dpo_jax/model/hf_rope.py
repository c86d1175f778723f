"""Rotary positions in HF's config.json, read and written. Imports no jax."""

import dataclasses
import math
from typing import Any

from dpo_jax.model.config import (
    Kind,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
)
from dpo_jax.model.families import FULL, SLIDING, Family

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


def require(values: dict, name: str) -> Any:
    """The value of a key that config.json must have."""
    if name not in values:
        raise ValueError(f"config.json has no {name!r}")
    return values[name]


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
