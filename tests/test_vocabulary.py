"""Stripes of the vocabulary against an oracle in float64, and what the compiled programs hold.

Dimensions: B rows, S scored tokens, D width, V vocabulary.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import config, sharding, vocabulary
from dpo_jax.hlo import costs, text
from dpo_jax.model import decoder


class Case(NamedTuple):
    """What `token_logps` takes, on the host, and weights of its results."""

    hidden: np.ndarray  # [B, S, D]
    matrix: np.ndarray  # [D, V]
    bias: np.ndarray | None  # [V]
    target: np.ndarray  # [B, S]
    cotangent: np.ndarray  # [B, S]
    cap: float | None = None
    tied: bool = False


class Found(NamedTuple):
    """Log-probabilities, and the gradients of their weighted sum."""

    logps: np.ndarray
    hidden: np.ndarray
    matrix: np.ndarray
    bias: np.ndarray | None


def draw(vocabulary: int, *, biased: bool = False, seed: int = 0) -> Case:
    """Two rows of 12 tokens of width 16; the first tokens scored are at borders of stripes. Logits
    are of deviation 1.
    """
    generator = np.random.default_rng(seed)
    target = generator.integers(0, vocabulary, (2, 12)).astype(np.int32)
    borders = [0, 127, 128, 129, 255, 256, 383, 384, vocabulary - 2, vocabulary - 1]
    borders = [one for one in borders if one < vocabulary]
    target.ravel()[: len(borders)] = borders
    return Case(
        hidden=generator.normal(size=(2, 12, 16)).astype(np.float32),
        matrix=(generator.normal(size=(16, vocabulary)) / 4).astype(np.float32),
        bias=generator.normal(size=vocabulary).astype(np.float32) if biased else None,
        target=target,
        cotangent=generator.normal(size=(2, 12)).astype(np.float32),
    )


def oracle(case: Case) -> Found:
    """Everything in float64 from all logits."""
    hidden, matrix = case.hidden.astype(np.float64), case.matrix.astype(np.float64)
    logits, inner = hidden @ matrix, 1.0
    if case.bias is not None:
        logits = logits + case.bias
    if case.cap is not None:
        logits = case.cap * np.tanh(logits / case.cap)
        inner = 1 - (logits / case.cap) ** 2
    picked = np.take_along_axis(logits, case.target[..., None], -1)
    # the others' sum apart from the token's own: nothing is lost where that is all but certain
    is_own = np.eye(matrix.shape[1], dtype=bool)[case.target]
    masked = np.where(is_own, -np.inf, logits)
    largest = masked.max(-1, keepdims=True)
    others = largest + np.log(np.exp(masked - largest).sum(-1, keepdims=True))
    logp = -np.logaddexp(0.0, others - picked)
    slope = np.where(is_own, -np.expm1(logp), -np.exp(logits - picked + logp))
    slope = slope * inner * case.cotangent[..., None]
    return Found(
        logp[..., 0],
        slope @ matrix.T,
        np.einsum("bsd,bsv->dv", hidden, slope),
        None if case.bias is None else slope.sum((0, 1)),
    )


def weighted(cap, tied, hidden, matrix, bias, target, cotangent):
    """The sum that is differentiated, and the log-probabilities."""
    found = vocabulary.token_logps(hidden, decoder.Head(matrix, bias, cap, tied), target)
    return jnp.sum(found * cotangent), found


def make_gradient(case: Case, *, frozen: bool = False):
    """The jitted program and its arguments."""
    wanted = (0,) if frozen else (0, 1) if case.bias is None else (0, 1, 2)
    function = functools.partial(weighted, case.cap, case.tied)
    matrix = np.ascontiguousarray(case.matrix.T) if case.tied else case.matrix
    arguments = case.hidden, matrix, case.bias, case.target, case.cotangent
    return jax.jit(jax.value_and_grad(function, wanted, has_aux=True)), arguments


def find(case: Case, dtype=jnp.float32) -> Found:
    program, (hidden, *rest) = make_gradient(case)
    (_, logps), slopes = program(jnp.asarray(hidden, dtype), *rest)
    assert logps.dtype == jnp.float32
    assert slopes[0].dtype == dtype and all(one.dtype == jnp.float32 for one in slopes[1:])
    hidden, matrix, *bias = (np.asarray(slope, np.float64) for slope in slopes)
    return Found(logps, hidden, matrix.T if case.tied else matrix, bias[0] if bias else None)


def compare(found: Found, expected: Found, tolerance: float) -> None:
    """Log-probabilities each relative to itself, gradients to their largest element."""
    np.testing.assert_allclose(found.logps, expected.logps, rtol=tolerance)
    for name in ("hidden", "matrix", "bias"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(
                one, other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=name
            )


@pytest.fixture(autouse=True)
def stripes(monkeypatch) -> None:
    """Stripes of 128 tokens."""
    monkeypatch.setattr(vocabulary, "STRIPE", 128)


# one stripe, stripes that end where the vocabulary does, and last ones that overlap
@pytest.mark.parametrize(
    ("size", "tied", "cap", "biased"),
    [
        (2, False, None, False),
        (40, True, 2.0, True),
        (128, False, 2.0, True),
        (384, True, None, False),
        (385, False, 2.0, False),
        (385, True, None, True),
        (500, True, 2.0, True),
        (500, False, None, False),
    ],
)
def test_values_and_gradients_are_those_of_all_logits(size, tied, cap, biased):
    case = draw(size, biased=biased)._replace(tied=tied, cap=cap)
    compare(find(case), oracle(case), 1e-6)


@pytest.mark.parametrize(
    ("tied", "cap", "biased"), [(False, 2.0, True), (True, None, True), (True, 2.0, False)]
)
@pytest.mark.parametrize("filled", [0, 5, 8, 9, 12])
def test_blocks_that_no_row_has_filled_are_left_out(filled, tied, cap, biased, monkeypatch):
    # two blocks of 8 tokens of each row, the second of which is longer than the rows
    monkeypatch.setattr(vocabulary, "BLOCK", 12)
    case = draw(385, biased=biased)._replace(tied=tied, cap=cap)
    case.cotangent[:, filled:] = 0
    expected = oracle(case)

    def run(matrix, hidden, bias, target, cotangent, filled):
        def total(hidden, matrix, bias):
            head = decoder.Head(matrix, bias, cap, tied)
            found = vocabulary.token_logps(hidden, head, target, filled)
            return jnp.sum(found * cotangent), found

        wanted = (0, 1, 2) if biased else (0, 1)
        return jax.value_and_grad(total, wanted, has_aux=True)(hidden, matrix, bias)

    matrix = np.ascontiguousarray(case.matrix.T) if tied else case.matrix
    arguments = matrix, case.hidden, case.bias, case.target, case.cotangent, np.int32(filled)
    jitted: Any = jax.jit(run)
    (_, logps), (hidden, found, *bias) = jitted(*arguments)
    known = Found(logps[:, :filled], hidden, found.T if tied else found, bias[0] if bias else None)
    compare(known, expected._replace(logps=expected.logps[:, :filled]), 1e-6)
    assert np.isfinite(logps).all()
    # four products of each block with each stripe, of which the last overlaps
    program = text.parse(jitted.lower(*arguments).compile().as_text())
    count = -(-filled // 8)
    each = 2 * (2 * 8) * 16 * 4 * 128
    lengths = {f"/{vocabulary.SCORED}/": count, f"/{vocabulary.TRAINED}/": count}
    assert costs.flops(program, lengths) == 4 * count * each
    assert costs.uncounted(program, lengths) == []


def test_no_gradient_is_computed_of_blocks_behind_the_last_one_that_has_a_cotangent(monkeypatch):
    monkeypatch.setattr(vocabulary, "BLOCK", 12)
    case = draw(384)
    target = jnp.asarray(case.target)

    def run(hidden, matrix):
        found = vocabulary.token_logps(hidden, decoder.Head(matrix), target)
        # as a loss that stops the gradient of some of them
        return jnp.sum(found[:, :3] ** 2) + jnp.sum(jax.lax.stop_gradient(found[:, 3:]))

    jitted: Any = jax.jit(jax.grad(run, (0, 1)))
    hidden, matrix = jitted(case.hidden, case.matrix)
    logps = oracle(case).logps
    case.cotangent[:] = 0
    case.cotangent[:, :3] = 2 * logps[:, :3]
    expected = oracle(case)
    np.testing.assert_allclose(hidden, expected.hidden, atol=1e-5)
    np.testing.assert_allclose(matrix, expected.matrix, atol=1e-5)
    assert not np.asarray(hidden)[:, 3:].any()
    # the matrix's gradient is of one block of two, though both are scored
    program = text.parse(jitted.lower(case.hidden, case.matrix).compile().as_text())
    each = 2 * (2 * 8) * 16 * 3 * 128
    assert costs.flops(program, {f"/{vocabulary.SCORED}/": 2}) == (2 * 2 + 2 * 1) * each
    assert costs.uncounted(program, {f"/{vocabulary.SCORED}/": 2}) != []


def rounded(array: np.ndarray) -> np.ndarray:
    """To bfloat16 and back."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))


def test_of_bfloat16_hidden_states_only_the_products_of_gradients_are_rounded_again():
    case = draw(385, biased=True)
    case = case._replace(hidden=rounded(case.hidden))
    found, expected = find(case, jnp.bfloat16), oracle(case._replace(matrix=rounded(case.matrix)))
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-6)
    # softmax is rounded to 8 bits where it is multiplied, and the hidden states' gradient at last
    compare(found._replace(logps=expected.logps), expected, 2.0**-7)
    # sums over tokens stay in float32
    assert (rounded(found.matrix) != np.float32(found.matrix)).mean() > 0.9
    # no product
    assert found.bias is not None and expected.bias is not None
    np.testing.assert_allclose(found.bias, expected.bias, rtol=0, atol=1e-6)


def test_of_a_token_all_but_certain_what_is_left_of_the_gradient_is_as_exact():
    case = draw(385)
    # each token's own column is its hidden state, so that its logit is 13 or more above the rest
    case = case._replace(
        hidden=rounded(case.hidden * 2), target=np.arange(24, dtype=np.int32).reshape(2, 12)
    )
    case.matrix[:, :24] = case.hidden.reshape(24, 16).T
    case = case._replace(matrix=rounded(case.matrix))
    expected = oracle(case)
    assert (np.abs(expected.logps) < 1e-4).sum() > 10
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 2.0**-7)):
        found = find(case, dtype)
        np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-4)
        scale = np.abs(expected.hidden).max(-1, keepdims=True)
        np.testing.assert_allclose(
            found.hidden / scale, expected.hidden / scale, rtol=0, atol=tolerance
        )


def test_logits_of_ten_thousand_do_no_harm():
    case, generator = draw(385), np.random.default_rng(1)
    # logits are whole numbers, which float32 holds: of each token some near the top, or near the
    # bottom with all others
    matrix = np.where(generator.random((16, 385)) < 0.5, -1e4, 1e4)
    matrix += generator.integers(-2, 3, matrix.shape)
    matrix[:3] = -1e4 + generator.integers(-2, 3, (3, 385))
    hidden = np.eye(16)[generator.integers(0, 16, (2, 12))]
    hidden[0, :3] = np.eye(16)[:3]
    case = case._replace(matrix=matrix.astype(np.float32), hidden=hidden.astype(np.float32))
    found, expected = find(case), oracle(case)
    assert expected.logps.min() < -1e4 and (expected.logps > -20).any()
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-6)
    compare(found, expected, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_an_id_outside_the_vocabulary_gives_nan(tied):
    case = draw(40)._replace(tied=tied)
    case.target[1, 3] = 40
    found = find(case).logps
    assert np.isnan(found[1, 3]) and np.isnan(found).sum() == 1


def test_it_works_under_checkpoint_scan_and_vmap():
    case = draw(385)
    target = jnp.asarray(case.target)

    def plain(hidden, matrix):
        return vocabulary.token_logps(hidden, decoder.Head(matrix), target)

    def scanned(hidden, matrix):
        def one(carry, pair):
            found = vocabulary.token_logps(pair[0][None], decoder.Head(matrix), pair[1][None])
            return carry, found[0]

        return jax.lax.scan(jax.checkpoint(one), None, (hidden, target))[1]

    def mapped(hidden, matrix):
        def one(hidden, target):
            return vocabulary.token_logps(hidden[None], decoder.Head(matrix), target[None])[0]

        return jax.vmap(one)(hidden, target)

    def gradient(function):
        return jax.jit(jax.grad(lambda *inputs: (function(*inputs) * case.cotangent).sum(), (0, 1)))

    expected = gradient(plain)(case.hidden, case.matrix)
    for function in (scanned, mapped):
        found = gradient(function)(case.hidden, case.matrix)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


def sizes(program: str) -> list[int]:
    """Elements of every array of a compiled program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]*)\]", program)
    return [int(np.prod([int(one) for one in shape.split(",") if one])) for shape in shapes]


def compiled(case: Case, **options) -> str:
    function, arguments = make_gradient(case, **options)
    return text_of(function.lower(*arguments).compile())


def text_of(executable: Any) -> str:
    """A compiled program as text."""
    return executable.as_text()


@pytest.mark.parametrize("tied", [False, True])
def test_no_array_but_the_matrix_grows_with_the_vocabulary(tied):
    case = draw(4096)._replace(tied=tied)
    assert max(sizes(compiled(case))) == case.matrix.size < 24 * 4096
    rest = [size for size in sizes(compiled(case)) if size != case.matrix.size]
    assert max(rest) <= max(24 * 128, 16 * 128, 4096)


def test_a_gradient_that_nobody_asks_for_is_not_computed():
    case = draw(385)
    forward = jax.jit(functools.partial(weighted, None, False))
    _, arguments = make_gradient(case)
    programs = {
        "forward": text_of(forward.lower(*arguments).compile()),
        "frozen": compiled(case, frozen=True),
        "trained": compiled(case),
    }
    # logits; their sum with the columns; logits again and their product with the hidden states
    products = {name: program.count(" dot(") for name, program in programs.items()}
    assert products == {"forward": 1, "frozen": 2, "trained": 4}
    loops = {name: program.count(" while(") for name, program in programs.items()}
    assert loops == {"forward": 1, "frozen": 1, "trained": 2}


def on_mesh(case: Case, axes: config.Mesh) -> tuple[Found, str]:
    """The gradient with parameters and rows placed as a run places them, and its program."""
    mesh = sharding.make_mesh(axes, jax.devices())
    function, (hidden, matrix, bias, target, cotangent) = make_gradient(case)
    name = "embedding" if case.tied else "head"
    params = sharding.place({name: matrix, "head_bias": bias}, mesh)
    placed = params[name], params["head_bias"]
    rows = sharding.put_batch({"hidden": hidden, "target": target, "by": cotangent}, mesh)
    where = [NamedSharding(mesh, P()), rows["hidden"].sharding, *(one.sharding for one in placed)]
    outputs = (where[0], rows["hidden"].sharding), tuple(where[1:])
    program = jax.jit(function, out_shardings=outputs).lower(
        rows["hidden"], *placed, rows["target"], rows["by"]
    )
    executable = program.compile()
    (_, logps), slopes = executable(rows["hidden"], *placed, rows["target"], rows["by"])
    hidden, matrix, bias = (np.asarray(slope) for slope in slopes)
    found = Found(np.asarray(logps), hidden, matrix.T if case.tied else matrix, bias)
    return found, text_of(executable)


def moved(program: str, kind: str) -> list[int]:
    """Elements of what each collective of a kind gives."""
    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", program)
    return [size for line in lines for size in sizes(line)]


def spread(vocabulary: int) -> Case:
    """A case of 8 rows, biased."""
    case = draw(vocabulary, biased=True)
    rows = {name: np.tile(getattr(case, name), (4, 1, 1))[:8] for name in ("hidden",)}
    rows |= {name: np.tile(getattr(case, name), (4, 1)) for name in ("target", "cotangent")}
    return case._replace(**rows)


@pytest.mark.parametrize("tied", [False, True])
def test_over_tensor_shards_neither_logits_nor_matrix_are_gathered(tied):
    case = spread(1024)._replace(tied=tied)
    found, program = on_mesh(case, config.Mesh(data=4, fsdp=1, tensor=2))
    compare(found, oracle(case), 1e-6)
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert not moved(program, kind), kind
    # sums over shards: of two rows each token's numbers and width, and a stripe's gradient
    assert max(moved(program, "all-reduce")) == max(2 * 12 * 16, 128 * 16)


def test_over_shards_of_the_width_a_stripe_at_a_time_is_gathered():
    case = spread(1024)._replace(tied=True)
    found, program = on_mesh(case, config.Mesh(data=2, fsdp=2, tensor=2))
    compare(found, oracle(case), 1e-6)
    # once in each pass; the other is of the target ids of 4 rows
    assert sorted(moved(program, "all-gather")) == [4 * 12, 128 * 16, 128 * 16]
    # a device's part of the matrix
    assert max(sizes(program)) == 512 * 8


def test_a_gpu_has_few_wide_products(monkeypatch):
    monkeypatch.setattr(vocabulary, "STRIPE", 2048)
    head = decoder.Head(jnp.zeros((2, 50_304)))
    assert vocabulary.make_cut(head, (8, 748))[1:4] == (50_304, 2048, 25)
    assert vocabulary.make_cut(head, (8, 748)).block == 96
    monkeypatch.setattr(vocabulary, "platform_of", lambda mesh: "gpu")
    # of 5,984 tokens 2^26 logits are 11,214 columns
    cut = vocabulary.make_cut(head, (8, 748))
    assert (cut.width, cut.count, cut.block) == (10_112, 5, 748)
    # of 720 the most that there are, and of a million no fewer than anywhere
    assert vocabulary.make_cut(head, (2, 360))[2:4] == (12_672, 4)
    many = vocabulary.make_cut(head, (256, 4096))
    assert (many.width, many.count, many.block) == (2048, 25, 512)
    # blocks that no gradient reaches have as many tokens as others
    assert vocabulary.make_cut(head, (8, 1024), partly_trained=True).block == 512


@pytest.mark.parametrize("filled", [5, 12])
def test_a_gpus_stripes_and_blocks_give_the_same(filled, monkeypatch):
    monkeypatch.setattr(vocabulary, "platform_of", lambda mesh: "gpu")
    monkeypatch.setattr(vocabulary, "GPU_BLOCK", 12)
    monkeypatch.setattr(vocabulary, "STRIPE_ELEMENTS", 2**12)
    case = draw(500)._replace(tied=True)
    case.cotangent[:, filled:] = 0
    head = decoder.Head(jnp.asarray(case.matrix.T), is_embedding=True)
    cut = vocabulary.make_cut(head, case.target.shape)
    assert (cut.width, cut.count, cut.block) == (256, 2, 8)
    compare(find(case), oracle(case), 1e-6)


def test_the_platform_is_that_of_the_mesh_which_may_not_be_here():
    assert vocabulary.platform_of(jax.sharding.get_abstract_mesh()) == "cpu"
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    assert vocabulary.platform_of(mesh.abstract_mesh) == "cpu"


def test_a_vocabulary_that_the_shards_do_not_divide_stays_whole():
    case = spread(1023)._replace(tied=True)
    found, _ = on_mesh(case, config.Mesh(data=2, fsdp=2, tensor=2))
    compare(found, oracle(case), 1e-6)


def test_the_stripes_of_each_tensor_shard_are_about_equal(monkeypatch):
    monkeypatch.setattr(vocabulary, "STRIPE", 2048)
    mesh = sharding.make_mesh(config.Mesh(fsdp=1, tensor=8), jax.devices())
    cuts = {}
    for size in (40, 2048, 50257, 50304):
        params = sharding.place({"embedding": np.zeros((size, 2), np.float32)}, mesh)
        head = decoder.Head(params["embedding"], is_embedding=True)
        cuts[size] = vocabulary.make_cut(head, (2, 12))[:4]
    expected = {
        40: (8, 5, 5, 1),
        2048: (8, 256, 256, 1),
        50257: (1, 50257, 2048, 25),
        50304: (8, 6288, 1664, 4),
    }
    assert cuts == expected
