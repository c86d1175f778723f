"""What a decoder on a mesh computes, holds and sends, read from its compiled program.

Those marked tpu need no TPU: libtpu compiles for one (pip install --no-deps "libtpu==0.0.42.*").

Dimensions: B rows, L tokens, S scored tokens, D width.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import (
    config,
    contract,
    initial,
    logps,
    losses,
    reference,
    sharding,
    targets,
    train_step,
    vocabulary,
)
from dpo_jax.hlo import collectives, costs, text
from dpo_jax.model import attention, decoder, shards
from dpo_jax.model.config import DecoderConfig

# a rectangle of attention is computed whole, masked or not
SHAPE = DecoderConfig(
    vocabulary_size=96,
    width=64,
    layers=3,
    heads=4,
    key_value_heads=2,
    head_dim=16,
    hidden=80,
    max_positions=64,
)
# no two of these, of the products of two, or of the numbers above are the same
ROWS, LENGTH, SCORED = 24, 56, 20
# of the examples of a row
EXAMPLES = 2


@pytest.fixture
def tpus(libtpu: None) -> Sequence[Any]:
    """Eight TPUs that can be compiled for."""
    return targets.find("v5e:2x4").devices


def forward_flops(shape: DecoderConfig) -> int:
    """Of the products of a decoder's forward pass, written down."""
    heads = shape.heads + shape.key_value_heads
    matrices = 2 * shape.width * shape.head_dim * heads + 3 * shape.width * shape.hidden
    of_tokens = 2 * shape.layers * matrices * ROWS * LENGTH
    of_pairs = 2 * 2 * shape.layers * shape.heads * shape.head_dim * ROWS * LENGTH**2
    return of_tokens + of_pairs + 2 * shape.width * shape.vocabulary_size * ROWS * SCORED


def compile_gradient(mesh: Any, remat: Any = "none", dtype: Any = "float32") -> text.Program:
    """The gradient of a decoder's parameters, on a mesh."""
    settings = config.Model("tiny", dtype=dtype, remat=remat, attention="plain")
    model = initial.make_decoder(SHAPE, settings, mesh)

    def objective(params, tokens, ids):
        hidden: Any = model.apply({"params": params}, tokens, ids)
        logits = decoder.logits(hidden[:, :SCORED], decoder.head(params, SHAPE))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    integers: Any = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=sharding.rows(mesh))
    params = sharding.with_shardings(decoder.shapes(SHAPE), mesh)
    gradient: Any = jax.jit(jax.grad(objective), out_shardings=sharding.parameters(params, mesh))
    ids = attention.Ids(integers, integers, integers)
    return text.parse(gradient.lower(params, integers, ids).compile().as_text())


@pytest.mark.parametrize(
    ("axes", "remat"),
    [
        (config.Mesh(1, 1, 1), "none"),
        (config.Mesh(1, 1, 1), "full"),
        pytest.param(config.Mesh(2, 2, 2), "none", marks=pytest.mark.slow),
    ],
)
def test_flops_of_a_decoder_are_those_that_are_written_down(axes, remat):
    devices = jax.devices()[: axes.data * (axes.fsdp or 1) * axes.tensor]
    found = compile_gradient(sharding.make_mesh(axes, devices), remat)
    assert costs.uncounted(found) == []
    forward = forward_flops(SHAPE)
    # what backpropagation does not read is not computed again: logits, and what ends a layer
    left_out = 2 * SHAPE.width * SHAPE.vocabulary_size * ROWS * SCORED
    left_out += 2 * SHAPE.layers * SHAPE.width * SHAPE.hidden * ROWS * LENGTH
    # a backward pass is two forward ones
    expected = 3 * forward + (forward - left_out if remat == "full" else 0)
    assert costs.flops(found) * found.devices == pytest.approx(expected, rel=0.01)


@pytest.mark.tpu
@pytest.mark.parametrize("axes", [config.Mesh(fsdp=8), config.Mesh(2, 2, 2)])
def test_flops_on_tpus_are_those_that_are_written_down(tpus, axes):
    found = compile_gradient(sharding.make_mesh(axes, tpus), dtype="bfloat16")
    assert costs.uncounted(found) == []
    assert costs.flops(found) * found.devices == pytest.approx(3 * forward_flops(SHAPE), rel=0.01)


def compile_step(mesh: Any, dtype: Any = "float32") -> text.Program:
    """The gradient of DPO with a live reference, on a mesh."""
    settings = config.Model("tiny", dtype=dtype, attention="plain")
    model = initial.make_decoder(SHAPE, settings, mesh)

    def score(params, held: train_step.Held, batch: dict):
        return logps.score(model, params, batch)

    live = functools.partial(reference.live, score)
    scoring = train_step.Scoring(score, live, contract.with_state(losses.dpo))
    everywhere = sharding.replicated(mesh)

    def shape(*dims: int, dtype: Any = jnp.int32, where: Any = None) -> Any:
        where = where or sharding.of_batch(dims, mesh)
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    batch: dict[str, Any] = {
        **{name: shape(ROWS, LENGTH) for name in ("tokens", "example", "branch", "position")},
        **{name: shape(ROWS, SCORED) for name in ("source", "target", "slot")},
        "length": {name: shape(ROWS * EXAMPLES) for name in ("chosen", "rejected")},
        "weight": shape(ROWS * EXAMPLES, dtype=jnp.float32),
    }
    params = sharding.with_shardings(decoder.shapes(SHAPE), mesh)
    state = train_step.TrainState(shape(where=everywhere), params, None)
    beta = {"beta": shape(dtype=jnp.float32, where=everywhere)}
    run: Any = jax.jit(
        functools.partial(train_step.whole, scoring),
        out_shardings=(sharding.parameters(params, mesh), None),
    )
    held = train_step.Held({}, params)
    return text.parse(run.lower(state, held, batch, beta).compile().as_text())


def offences(found: text.Program, mesh: Any, dtype: str) -> list[str]:
    """What a step does on a mesh that is neither FSDP, nor sequence nor tensor parallelism, a line
    each.
    """
    sizes = mesh.shape
    # of hidden states on a device; a look-up has as much, of more rows and fewer columns
    share = ROWS * LENGTH * SHAPE.width * 4 // (mesh.size // sizes["tensor"])
    whole = {ROWS, ROWS * LENGTH, ROWS * SCORED}
    wrong = [
        f"{made.opcode} {made.array} of {made.op_name or made.name} has rows of other devices"
        for made in costs.largest_arrays(found, 10**6)
        if whole & {*made.array.dims} and made.bytes > share
    ]
    wide = {SHAPE.width, SHAPE.hidden // sizes["tensor"]}
    rows = ROWS // sharding.batch_shards(mesh)
    wrong += [
        f"{made.opcode} {made.array} of {made.op_name or made.name} has tokens of other devices"
        for made in costs.largest_arrays(found, 10**6)
        if sizes["sequence"] > 1
        and {LENGTH, rows * LENGTH} & {*made.array.dims}
        and wide & {*made.array.dims}
    ]
    moved: collections.defaultdict[tuple, float] = collections.defaultdict(float)
    for one in collectives.collectives(found, sizes):
        sums = one.kind in ("all-reduce", "reduce-scatter") and one.axes != ("tensor",)
        moved["sums" if sums else one.kind, () if sums else one.axes] += one.bytes * one.times
    allowed = allowances(sizes, jnp.dtype(dtype).itemsize)
    for (kind, axes), count in moved.items():
        if count > allowed.get((kind, axes), 0) * 1.01:
            wrong.append(f"{kind} over {axes}: {count} bytes, not {allowed.get((kind, axes), 0)}")
    return wrong


def allowances(sizes: Mapping[str, int], item: int) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a step may send, by kind and axes, of numbers of so many bytes."""
    data, fsdp, sequence, tensor = sizes.values()
    matrices = sum(leaf.size for leaf in jax.tree.leaves(decoder.shapes(SHAPE))) // tensor
    rows = ROWS // (data * fsdp)
    keys = 2 * SHAPE.layers * rows * LENGTH * SHAPE.key_value_heads * SHAPE.head_dim // tensor
    scored = rows * SCORED * SHAPE.width
    # what is found of tokens for the policy, its gradient and the reference, and of the head's
    # columns of scored tokens for the policy and the reference
    looked_up = item * rows * SHAPE.width * (3 * LENGTH + 2 * SCORED) / sequence
    shards = tuple(name for name in ("fsdp", "sequence") if sizes[name] > 1)
    allowed: collections.defaultdict[tuple, float] = collections.defaultdict(float)
    # gradients over their shards, and a device's part of them over data
    allowed["sums", ()] = 4 * matrices * (1 + (data > 1) / (fsdp * sequence))
    # parameters to the policy, to its gradient and to the reference
    allowed["all-gather", shards] = 3 * item * matrices
    allowed["all-reduce", ("tensor",)] = float("inf")
    for name in shards:
        allowed["all-to-all", (name,)] = looked_up
    if sequence > 1:
        # keys and values to the policy and the reference, and what they get back; scored tokens of
        # the policy and the reference, and what they get back
        allowed["sums", ()] += item * (keys + 2 * scored)
        allowed["all-gather", ("sequence",)] += item * (2 * keys + scored)
        # ids and sources; tokens and targets
        allowed["all-gather", ("sequence",)] += 4 * rows * (3 * LENGTH + SCORED)
        allowed["all-gather", ("fsdp",)] += 4 * rows * fsdp * (LENGTH + SCORED) * (fsdp > 1)
    return allowed


MESHES = [
    config.Mesh(fsdp=8),
    config.Mesh(2, 2, 2),
    config.Mesh(fsdp=2, sequence=2, tensor=2),
    pytest.param(config.Mesh(2, 2, sequence=2), marks=pytest.mark.slow),
    pytest.param(config.Mesh(fsdp=2, sequence=4), marks=pytest.mark.slow),
    pytest.param(config.Mesh(8, 1, 1), marks=pytest.mark.slow),
    pytest.param(config.Mesh(1, 4, 2), marks=pytest.mark.slow),
]


@functools.cache
def step_alone(device: Any, dtype: str) -> tuple[int, float]:
    """Bytes of the largest array of a step on one device, and its FLOPs."""
    with pytest.MonkeyPatch.context() as patch:
        # all scored tokens at once, as on several devices
        patch.setattr(vocabulary, "BLOCK", ROWS * SCORED)
        alone = compile_step(sharding.make_mesh(config.Mesh(), [device]), dtype)
    return costs.largest_arrays(alone, 1)[0].bytes, costs.flops(alone)


def check_step(axes: config.Mesh, devices: Sequence[Any], dtype: str) -> None:
    mesh = sharding.make_mesh(axes, devices)
    found = compile_step(mesh, dtype)
    wrong = offences(found, mesh, dtype)
    assert not wrong, "\n".join(wrong)
    largest, flops = step_alone(devices[0], dtype)
    # the largest are of attention, whose heads are shared out over tensor, and queries over
    # sequence
    assert 8 * costs.largest_arrays(found, 1)[0].bytes <= largest
    # and so are scored tokens: nothing is computed twice
    assert costs.flops(found) * found.devices == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("axes", MESHES)
def test_devices_hold_their_own_rows_and_parameters_move_to_them(axes):
    check_step(axes, jax.devices(), "float32")


@pytest.mark.tpu
@pytest.mark.parametrize(
    "axes", [config.Mesh(fsdp=8), config.Mesh(2, 2, 2), config.Mesh(fsdp=2, sequence=2, tensor=2)]
)
def test_tpus_hold_their_own_rows_and_parameters_move_to_them(tpus, axes):
    check_step(axes, tpus, "bfloat16")


@pytest.mark.parametrize("axes", [config.Mesh(fsdp=8), config.Mesh(2, 2, 2)])
def test_without_a_placement_activations_move_to_the_parameters(axes, monkeypatch):
    monkeypatch.setattr(sharding, "placement", lambda mesh: None)
    mesh = sharding.make_mesh(axes, jax.devices())
    wrong = offences(compile_step(mesh), mesh, "float32")
    assert any(line.startswith("sums over ()") for line in wrong), wrong
    if mesh.shape["tensor"] == 1:
        assert any("rows of other devices" in line for line in wrong), wrong


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 5, 4), True), ((8, 5, 6), False), ((9, 5, 4), False), ((8, 5), True)],
)
def test_an_array_divides_where_each_axis_does(shape, expected):
    mesh = sharding.make_mesh(config.Mesh(2, 4, 1), jax.devices())
    where = sharding.placement(mesh)
    assert where is not None
    assert shards.divides(shape, where.columns) == expected
    assert shards.divides(shape, where.rows) == (shape[0] == 8)


def test_one_device_has_no_placement():
    assert sharding.placement(sharding.make_mesh(config.Mesh(), jax.devices()[:1])) is None
