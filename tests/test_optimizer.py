"""First and second steps against NumPy in float64, written from the papers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dpo_jax import checkpoint, config, optimizer

# optax takes 1 - 0.999^t in float32, whose rounding is up to 3e-5 of it, and half that of its root
NEAR_ONE = 2e-5
PARAMS = {
    "mlp": {"kernel": np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)},
    "norm": {"scale": np.array([1.5, -0.5], np.float32)},
}
GRADIENTS = [
    {
        "mlp": {"kernel": np.array([[0.3, -0.1], [2.0, 0.0]], np.float32)},
        "norm": {"scale": np.array([-1.0, 0.2], np.float32)},
    },
    {
        "mlp": {"kernel": np.array([[-0.2, 0.4], [1.0, 0.5]], np.float32)},
        "norm": {"scale": np.array([0.6, 0.1], np.float32)},
    },
]


def directions(settings: config.Optimizer, gradients=GRADIENTS, params=PARAMS) -> list[Any]:
    """What is added to the parameters, before the learning rate, at each of the steps."""
    tx = optimizer.make(settings)
    params = jax.tree.map(jnp.asarray, params)
    state, found = tx.init(params), []
    for gradient in gradients:
        updates, state = tx.update(jax.tree.map(jnp.asarray, gradient), state, params)
        found.append(updates)
    return found


def assert_equal(found: list, expected: list, relative: float = 2e-6) -> None:
    """Equality relative to the largest number of each parameter's update."""

    def check(one, other):
        np.testing.assert_allclose(one, other, rtol=0, atol=relative * np.abs(other).max())

    for one, other in zip(found, expected, strict=True):
        jax.tree.map(check, one, other)


def adamw(b1=0.9, b2=0.999, eps=1e-8, decay=0.0, stored: Any = float) -> list:
    """2412.6980's algorithm 1 with 1711.05101's decay of the matrices; the first moment is rounded
    to a type between steps.
    """

    def leaf(values, gradients, decay):
        first = second = np.zeros_like(gradients[0], float)
        for step, gradient in enumerate(np.asarray(gradients, np.float64), 1):
            first = b1 * first.astype(stored).astype(float) + (1 - b1) * gradient
            second = b2 * second + (1 - b2) * gradient**2
            root = np.sqrt(second / (1 - b2**step)) + eps
            yield -(first / (1 - b1**step) / root + decay * np.asarray(values, np.float64))

    return by_leaf(leaf, decay)


def rmsprop(b2=0.99, eps=1e-8) -> list:
    """PyTorch's: v starts at 0, no bias correction, eps outside of the root."""

    def leaf(values, gradients, decay):
        second = np.zeros_like(gradients[0], float)
        for gradient in np.asarray(gradients, np.float64):
            second = b2 * second + (1 - b2) * gradient**2
            yield -gradient / (np.sqrt(second) + eps)

    return by_leaf(leaf, 0.0)


def adafactor(decay=0.0) -> list:
    """1804.04235's algorithm 5 for small parameters: no factors, no scale of the parameter."""

    def leaf(values, gradients, decay):
        second = np.zeros_like(gradients[0], float)
        for step, gradient in enumerate(np.asarray(gradients, np.float64), 1):
            rate = 1 - step**-0.8
            second = rate * second + (1 - rate) * (gradient**2 + 1e-30)
            update = gradient / np.sqrt(second)
            update /= max(1.0, np.sqrt((update**2).mean()))
            yield -(update + decay * np.asarray(values, np.float64))

    return by_leaf(leaf, decay)


def by_leaf(leaf, decay: float) -> list:
    """The updates of both steps; norms do not decay."""
    paths = (("mlp", "kernel"), ("norm", "scale"))
    steps = [{}, {}]
    for module, name in paths:
        gradients = [gradient[module][name] for gradient in GRADIENTS]
        kept = leaf(PARAMS[module][name], gradients, 0.0 if module == "norm" else decay)
        for step, update in enumerate(kept):
            steps[step][module] = {name: update}
    return steps


def make(kind: Any, **fields: Any) -> config.Optimizer:
    return config.Optimizer(kind=kind, **{"clip": None, **fields})


def test_adamw_takes_the_papers_first_two_steps():
    assert_equal(directions(make("adamw")), adamw(), NEAR_ONE)
    assert_equal(directions(make("adamw", b1=0.5, b2=0.9, eps=0.1)), adamw(0.5, 0.9, 0.1))


def test_adamw_decays_matrices_and_not_norms():
    found = directions(make("adamw", weight_decay=0.25))
    assert_equal(found, adamw(decay=0.25), NEAR_ONE)
    plain = directions(make("adamw"))
    np.testing.assert_array_equal(found[0]["norm"]["scale"], plain[0]["norm"]["scale"])


def test_rmsprop_takes_pytorchs_first_two_steps():
    assert_equal(directions(make("rmsprop")), rmsprop())
    assert_equal(directions(make("rmsprop", b2=0.5, eps=0.1)), rmsprop(0.5, 0.1))
    # the first by hand: g / sqrt(0.01 g^2) is 10 wherever g is not 0
    first = directions(make("rmsprop"))[0]["norm"]["scale"]
    np.testing.assert_allclose(first, [10, -10], rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_adafactor_takes_the_papers_first_two_steps(decay):
    assert_equal(directions(make("adafactor", weight_decay=decay)), adafactor(decay))


def test_adafactor_factors_the_second_moment_of_a_large_matrix():
    gradient = np.random.default_rng(0).normal(size=(128, 130)).astype(np.float32)
    params = {"kernel": np.zeros_like(gradient)}
    square = np.asarray(gradient, np.float64) ** 2 + 1e-30
    rows, columns = square.mean(1, keepdims=True), square.mean(0, keepdims=True)
    update = gradient / np.sqrt(rows * columns / rows.mean())
    update /= max(1.0, np.sqrt((update**2).mean()))
    found = directions(make("adafactor"), [{"kernel": gradient}], params)
    assert_equal(found, [{"kernel": -update}], relative=2e-5)
    state = optimizer.make(make("adafactor")).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 1000


def test_clipping_is_by_the_global_norm_and_leaves_a_small_gradient_alone():
    gradients = [jax.tree.map(np.float64, gradient) for gradient in GRADIENTS]
    norm = math.sqrt(0.09 + 0.01 + 4 + 1 + 0.04)
    # with so large an eps rmsprop is linear in the gradient but for 1 %
    settings = {"b2": 0.0, "eps": 1e6}
    clipped = directions(make("rmsprop", clip=1.0, **settings), gradients[:1])
    expected = jax.tree.map(lambda leaf: -leaf / norm / 1e6, gradients[0])
    assert_equal(clipped, [expected], relative=1e-5)
    small = [jax.tree.map(lambda leaf: leaf / 10, gradients[0])]
    expected = jax.tree.map(lambda leaf: -leaf / 1e6, small[0])
    assert_equal(
        directions(make("rmsprop", clip=1.0, **settings), small), [expected], relative=1e-5
    )


def test_clipping_comes_before_the_moments():
    norm = math.sqrt(0.09 + 0.01 + 4 + 1 + 0.04)
    found = directions(make("rmsprop", clip=1.0, eps=1.0), GRADIENTS[:1])
    gradient = np.asarray(GRADIENTS[0]["norm"]["scale"], np.float64) / norm
    expected = -gradient / (0.1 * np.abs(gradient) + 1.0)
    np.testing.assert_allclose(found[0]["norm"]["scale"], expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("rmsprop", "b1", 0.5),
        ("rmsprop", "b1", 0.0),
        ("rmsprop", "weight_decay", 0.1),
        ("adafactor", "b1", 0.5),
        ("adafactor", "b2", 0.0),
        ("adafactor", "eps", 1e-6),
    ],
)
def test_a_number_that_is_not_read_is_refused(kind, field, value):
    with pytest.raises(
        ValueError, match=f"optimizer.{field} is {value}, and {kind} does not read it"
    ):
        optimizer.make(make(kind, **{field: value}))


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "adafactor"])
def test_the_defaults_fit_every_kind(kind):
    optimizer.make(config.Optimizer(kind=kind))


NARROW = {"moments_dtype": "bfloat16"}


def adam_state(state: Any) -> Any:
    (found,) = [part for part in state if isinstance(part, optax.ScaleByAdamState)]
    return found


@pytest.mark.parametrize(("fields", "first"), [({}, "float32"), (NARROW, "bfloat16")])
def test_only_the_first_moment_has_the_type_that_is_asked_for(fields, first):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = optimizer.make(make("adamw", **fields))
    state = tx.init(params)
    for _ in range(2):
        adam = adam_state(state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.mu)} == {first}
        assert {leaf.dtype.name for leaf in jax.tree.leaves(adam.nu)} == {"float32"}
        updates, state = tx.update(params, state, params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}
    assert jax.tree.structure(state) == jax.tree.structure(
        optimizer.make(make("adamw")).init(params)
    )


def test_a_first_moment_in_bfloat16_is_rounded_once_a_step():
    rounded = adamw(stored=ml_dtypes.bfloat16)
    assert_equal(directions(make("adamw", **NARROW)), rounded, NEAR_ONE)
    with pytest.raises(AssertionError):
        assert_equal(adamw(), rounded, NEAR_ONE)


def descend(settings: config.Optimizer, steps: int, start: Any = None) -> tuple:
    """Parameters and state after steps of noisy least squares, from a start (step, them)."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(400, 16)).astype(np.float32)
    wanted = inputs @ generator.normal(size=(16, 4)).astype(np.float32)
    wanted += generator.normal(size=wanted.shape).astype(np.float32)
    tx = optimizer.make(settings)

    def loss(params, given, wanted):
        return jnp.mean((given @ params["kernel"] - wanted) ** 2)

    @jax.jit
    def step(params, state, *batch):
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return jax.tree.map(lambda one, update: one + 0.02 * update, params, updates), state

    params = {"kernel": jnp.zeros((16, 4))}
    first, params, state = start or (0, params, tx.init(params))
    for number in range(first, first + steps):
        rows = np.random.default_rng(number + 1).integers(0, len(inputs), 32)
        params, state = step(params, state, inputs[rows], wanted[rows])
    return params, state


def test_with_a_first_moment_in_bfloat16_training_goes_nearly_the_same_way():
    exact, _ = descend(make("adamw"), 200)
    found, _ = descend(make("adamw", **NARROW), 200)
    far = np.linalg.norm(found["kernel"] - exact["kernel"]) / np.linalg.norm(exact["kernel"])
    # parameters have moved by all of their norm
    assert 0 < far < 2e-3


def test_a_first_moment_in_bfloat16_is_resumed_from_a_checkpoint_bit_for_bit(tmp_path):
    settings = make("adamw", **NARROW)
    whole = descend(settings, 6)
    with checkpoint.make_checkpointer(str(tmp_path), config.Checkpoint()) as checkpointer:
        params, state = descend(settings, 3)
        checkpoint.save(checkpointer, 3, {"params": params, "opt_state": state}, {})
        fresh = dict(zip(("params", "opt_state"), descend(settings, 0), strict=True))
        saved = checkpoint.restore(checkpointer, 3, checkpoint.abstract(fresh))
    resumed = descend(settings, 3, (3, saved["params"], saved["opt_state"]))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert adam_state(resumed[1]).mu["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["rmsprop", "adafactor"])
def test_a_type_of_first_moments_is_refused_where_there_are_none(kind):
    with pytest.raises(ValueError, match=f"bfloat16, and {kind} has only second moments"):
        optimizer.make(make(kind, **NARROW))
    optimizer.make(make(kind, moments_dtype="float32"))


def decayed(b1: float) -> np.ndarray:
    """By how much a step without a gradient shrinks each bfloat16 moment of [1, 2)."""
    moments = jnp.asarray(1 + np.arange(128) / 128, jnp.bfloat16)
    tx = optax.scale_by_adam(b1)
    narrow: Any = optimizer.with_narrow_first_moment(tx)
    state: Any = tx.init(jnp.zeros(128))
    state = state._replace(mu=moments)
    _, state = narrow.update(jnp.zeros(128), state)
    assert state.mu.dtype == jnp.bfloat16
    return np.asarray(moments, np.float32) - np.asarray(state.mu, np.float32)


def test_a_first_moment_that_would_stand_still_in_bfloat16_is_refused():
    largest = 1 - 2.0**-8
    assert (decayed(largest) > 0).all()
    assert (decayed(0.998) == 0).any()
    optimizer.make(make("adamw", b1=largest, **NARROW))
    with pytest.raises(ValueError, match="optimizer.b1 is 0.998, .* would stand still"):
        optimizer.make(make("adamw", b1=0.998, **NARROW))
    optimizer.make(make("adamw", b1=0.998))


def shares(schedule: Any, warmup: int, steps: int, at: list[int]) -> list[float]:
    settings = config.Optimizer(schedule=schedule, warmup_steps=warmup)
    share = optimizer.make_schedule(settings, steps)
    return [float(share(jnp.int32(step))) for step in at]


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        ("constant", 0, 10, {0: 1, 9: 1}),
        ("constant", 4, 10, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 1}),
        ("linear", 0, 10, {0: 1, 5: 0.5, 9: 0.1, 10: 0, 11: 0}),
        ("linear", 2, 10, {0: 0.5, 1: 1, 2: 1, 6: 0.5, 9: 0.125, 10: 0}),
        ("cosine", 0, 12, {0: 1, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0}),
        ("cosine", 4, 12, {0: 0.25, 4: 1, 8: 0.5, 12: 0}),
        ("inverse_sqrt", 0, 100, {0: 1, 3: 0.5, 24: 0.2}),
        ("inverse_sqrt", 4, 100, {0: 0.25, 3: 1, 15: 0.5, 63: 0.25}),
    ],
)
def test_the_schedule_by_hand(schedule, warmup, steps, expected):
    found = shares(schedule, warmup, steps, list(expected))
    assert found == pytest.approx(list(expected.values()), abs=1e-6)


@pytest.mark.parametrize("warmup", [10, 11])
def test_warmup_must_be_shorter_than_the_run(warmup):
    with pytest.raises(ValueError, match=f"warmup_steps is {warmup}, and the run has 10 steps"):
        shares("constant", warmup, 10, [0])
    shares("constant", 9, 10, [0])
