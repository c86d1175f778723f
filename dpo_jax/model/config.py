"""The shape of a decoder: what fixes its parameters and the function that they compute.

Imports no jax.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

# root mean square; the same with 1 + scale (Gemma); mean and deviation, with a bias
NormKind = Literal["rms", "rms_plus_one", "layer"]
# norms of what attention and MLP read, of what they give, or of both
NormPlacement = Literal["pre", "post", "sandwich"]
# MLP after attention; both on the stream as it came, each with its norm, or with one norm for both
Residual = Literal["serial", "parallel", "parallel_one_norm"]
# of each head apart, or of all heads end to end
QueryKeyNorm = Literal["head", "width"]
# gelu by the error function or by its approximation with tanh
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary wavelengths stretched alike."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary wavelengths."""

    # by how much wavelengths beyond the original context are stretched
    factor: float
    # wavelengths over original_max_positions / this are stretched in full
    low_frequency_factor: float
    # wavelengths under original_max_positions / this are left alone
    high_frequency_factor: float
    # positions that the model was pretrained on
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretch of the rotary wavelengths, https://arxiv.org/abs/2309.00071."""

    # by how much wavelengths of few turns are stretched
    factor: float
    # positions that the model was pretrained on
    original_max_positions: int
    # cosines and sines are multiplied by this
    attention_factor: float
    # wavelengths of more turns than this in the original context are left alone
    fast_turns: float = 32.0
    # wavelengths of fewer turns than this are stretched in full
    slow_turns: float = 1.0
    # whether the ramp between them begins and ends at whole dimensions
    whole_dimensions: bool = True


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    # base of the wavelengths
    theta: float = 10_000.0
    scaling: Scaling | None = None
    # how much of each head is turned, from its first dimension on
    fraction: float = 1.0

    def dimensions(self, head_dim: int) -> int:
        """How many dimensions of a head are turned."""
        return int(head_dim * self.fraction)


@dataclasses.dataclass(frozen=True)
class Kind:
    """In what layers of one model differ."""

    # positions that a token sees, itself included; None: all before it
    window: int | None = None
    rope: Rope | None = Rope()


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of MLPs, of which each token goes through those of the highest probability."""

    count: int
    # experts of each token
    chosen: int
    # whether the chosen ones' probabilities are divided by their sum
    normalised: bool = True


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
    # units of the MLP, or of each expert
    hidden: int
    # longest sequence that the model is meant for; rows of a table of learned positions
    max_positions: int
    # the row of families.FAMILIES in whose form the model is saved
    family: str = "llama"
    # layer i is of kind block[i % len(block)]
    block: tuple[Kind, ...] = (Kind(),)
    norm: NormKind = "rms"
    norm_epsilon: float = 1e-5
    norm_placement: NormPlacement = "pre"
    residual: Residual = "serial"
    # norms of queries and keys before they are turned
    query_key_norm: QueryKeyNorm | None = None
    # biases of queries, keys and values
    attention_bias: bool = False
    # bias of what attention gives
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    # whether the activation multiplies a second linear map
    gated: bool = True
    experts: Experts | None = None
    # attention's logits are divided by the root of this; None: of head_dim
    query_scalar: float | None = None
    # attention's logits x become cap tanh(x / cap)
    attention_cap: float | None = None
    # the same of the logits of tokens
    logit_cap: float | None = None
    # whether embeddings are multiplied by the root of width
    scaled_embedding: bool = False
    # rows that the table of learned positions has before position 0; None: there is no table
    position_offset: int | None = None
    # whether the output matrix is the embedding
    tied_head: bool = False
    # bias of the logits of tokens
    head_bias: bool = False

    def __post_init__(self):
        """Raises ValueError where the values do not fit together."""
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of key_value_heads, "
                f"{self.key_value_heads}"
            )
        for kind in self.block:
            if kind.rope is not None and kind.rope.dimensions(self.head_dim) % 2:
                raise ValueError(
                    f"head_dim is {self.head_dim}; rotary embeddings need an even one, or an even "
                    f"part of it (rope.fraction is {kind.rope.fraction})"
                )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(map(repr, allowed))}"
                )
        if self.residual != "serial" and self.norm_placement != "pre":
            raise ValueError(
                f"norm_placement is {self.norm_placement!r}; with residual {self.residual!r} it "
                "must be 'pre'"
            )
        if not 0 < len(self.block) <= self.layers:
            raise ValueError(f"block has {len(self.block)} kinds for {self.layers} layers")
        if self.experts is not None and not 0 < self.experts.chosen <= self.experts.count:
            raise ValueError(
                f"experts.chosen is {self.experts.chosen}; it must be 1 to {self.experts.count}"
            )

    @property
    def scanned(self) -> int:
        """Layers in whole blocks; those after them are too few for one more."""
        return self.layers - self.layers % len(self.block)


CHOICES: dict[str, tuple] = {
    "norm": get_args(NormKind),
    "norm_placement": get_args(NormPlacement),
    "residual": get_args(Residual),
    "query_key_norm": (None, *get_args(QueryKeyNorm)),
    "activation": get_args(Activation),
}


def smallest_block(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """The fewest first kinds whose repetition is the whole sequence."""
    sizes = range(1, len(kinds) + 1)
    fits = (n for n in sizes if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[: next(fits)])


def from_json(fields: dict[str, Any]) -> DecoderConfig:
    """The config that `dataclasses.asdict` gave these fields of, by way of JSON."""
    if "block" not in fields:
        fields = from_uniform_json(fields)
    block = tuple(Kind(kind["window"], read_rope(kind["rope"])) for kind in fields["block"])
    experts = fields.get("experts")
    return DecoderConfig(**{**fields, "block": block, "experts": experts and Experts(**experts)})


def from_uniform_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a file in which no layer could differ, in today's form."""
    fields = dict(fields)
    window = fields.pop("sliding_window")
    rope = {"theta": fields.pop("rope_theta"), "scaling": fields.pop("rope_scaling")}
    family = "llama" if window is None else "mistral"
    return {**fields, "family": family, "block": [{"window": window, "rope": rope}]}


def read_rope(fields: dict[str, Any] | None) -> Rope | None:
    """The rotary positions that these fields describe; scalings differ by their fields' names."""
    if fields is None:
        return None
    if fields["scaling"] is None:
        return Rope(**fields)
    for scaling in get_args(Scaling):
        if {field.name for field in dataclasses.fields(scaling)} == set(fields["scaling"]):
            return Rope(**{**fields, "scaling": scaling(**fields["scaling"])})
    raise ValueError(f"no rotary scaling has the fields {', '.join(fields['scaling'])}")


def parameter_count(config: DecoderConfig) -> int:
    """How many numbers the parameters are, a tied head counted once."""
    width, vocabulary = config.width, config.vocabulary_size
    norm = width * (2 if config.norm == "layer" else 1)
    layer = attention_count(config) + mlp_count(config)
    layer += norm * {"pre": 2, "post": 2, "sandwich": 4}[config.norm_placement]
    layer -= norm if config.residual == "parallel_one_norm" else 0
    total = vocabulary * width + config.layers * layer + norm
    total += 0 if config.tied_head else vocabulary * width
    total += vocabulary if config.head_bias else 0
    if config.position_offset is not None:
        total += (config.max_positions + config.position_offset) * width
    return total


def attention_count(config: DecoderConfig) -> int:
    """Parameters of one layer's attention."""
    both = config.heads + config.key_value_heads
    count = 2 * config.width * config.head_dim * both
    count += config.head_dim * (both + config.key_value_heads) if config.attention_bias else 0
    count += config.width if config.output_bias else 0
    return count + config.head_dim * {None: 0, "head": 2, "width": both}[config.query_key_norm]


def mlp_count(config: DecoderConfig) -> int:
    """Parameters of one layer's MLP, or of its experts and their router."""
    into = 2 if config.gated else 1
    count = (into + 1) * config.width * config.hidden
    if config.experts is not None:
        return config.experts.count * (count + config.width)
    return count + (into * config.hidden + config.width if config.mlp_bias else 0)
