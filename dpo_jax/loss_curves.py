"""The losses on made-up log-probabilities: what they read, and their curves against a margin.

Dimensions: N examples, which are the points of a curve.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import config, contract
from dpo_jax.logps import Logps

# of every completion, in tokens, and its mean log-probability where no margin is added, in nats
LENGTH, MEAN = 20, -2.0
# the margin goes from -EXTENT to EXTENT, in nats
EXTENT, POINTS = 40.0, 321
# shown for hyperparameters without a default
VALUES: dict[str, dict[str, float]] = {"r_dpo": {"alpha": 0.05}, "unlikelihood": {"alpha": 0.5}}
# a completion's part of the margin
PAIR = {"chosen": 0.5, "rejected": -0.5, "gold": 0.0, "prompt": 0.0}
RANKED = {"completion_0": 0.5, "completion_1": 0.0, "completion_2": -0.5}
UNPAIRED = {"completion": 1.0, "mismatched": 0.0}
# sums of statistics from a completion's total [N]: no token lies beyond the shorter completion, and
# the policy finds its tokens as likely as its own samples
STATISTICS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "head": lambda total: total,
    "excess": jnp.zeros_like,
}
# columns of unpaired data beside desirable
COLUMNS = {"density_ratio": 2.0}


class Reads(NamedTuple):
    """What a loss was seen to read."""

    completions: tuple[str, ...]
    has_reference: bool
    columns: tuple[str, ...]
    tokens: str


class Curve(NamedTuple):
    """A loss and its derivative by the margin, in 1 / nats, at margins in nats: [N] each."""

    margin: np.ndarray
    loss: np.ndarray
    slope: np.ndarray


class Recorded(dict):
    """A mapping that keeps the names which are read from it."""

    def __init__(self, values: Mapping[str, Any], of: str):
        super().__init__(values)
        self.of, self.names = of, set()

    def __getitem__(self, name: str):
        self.names.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str):
        raise ValueError(
            f"loss {self.of} reads {name!r}, which loss_curves does not make: add it to PAIR, "
            "UNPAIRED or COLUMNS"
        )


def numbers(loss: Callable) -> dict[str, Any]:
    """The hyperparameters that a loss is shown with: its defaults, and VALUES for the others."""
    given = VALUES.get(loss.__name__, {})
    found = {name: given.get(name, d) for name, (_, d) in config.loss_fields(loss).items()}
    missing = [name for name, value in found.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(
            f"loss {loss.__name__} has no default for {', '.join(missing)}: say in "
            "loss_curves.VALUES which value is shown"
        )
    return found


def evaluate(loss: Callable, policy: Mapping, reference: Mapping, batch: Mapping) -> jax.Array:
    """The losses [N] of a loss in the state that it is first given."""
    state = contract.needs(loss).state()
    return contract.with_state(loss)(policy, reference, batch, state, **numbers(loss))[0]


def reads(loss: Callable) -> Reads:
    """Finds out what a loss reads by running it; ValueError where it reads what is not made here.

    `tokens` says whether log-probabilities are summed over tokens or averaged: a sum does not
    change with the lengths, a mean does not where totals and lengths are doubled.
    """
    names = [*PAIR, *RANKED, *UNPAIRED]
    generator = np.random.default_rng(0)
    drawn = {name: generator.uniform(-6, 6, (2, 8)) for name in names}
    statistics = contract.needs(loss)

    def run(scale: float, longer: int):
        made = [{}, {}]
        for place, name in enumerate(names):
            for which, declared in enumerate((statistics.policy, statistics.reference)):
                total = jnp.asarray(scale * (LENGTH * MEAN + drawn[name][which]), jnp.float32)
                length = jnp.full(8, longer * (LENGTH + place), jnp.int32)
                made[which][name] = Logps(total, length, {s: total for s in declared})
        columns = {"weight": 1.0, **COLUMNS}
        batch = {name: jnp.full(8, value) for name, value in columns.items()}
        batch["desirable"] = jnp.array([1.0, 0.0] * 4)
        recorded = [Recorded(part, loss.__name__) for part in (*made, batch)]
        return np.asarray(evaluate(loss, *recorded)), [part.names for part in recorded]

    losses, (policy, reference, columns) = run(1.0, 1)

    def same(one: np.ndarray, other: np.ndarray) -> bool:
        return np.allclose(one, other, rtol=1e-4, atol=1e-6)

    if same(losses, run(1.0, 2)[0]):
        tokens = "sum"
    elif same(losses, run(2.0, 2)[0]):
        tokens = "mean"
    elif not same(run(0.0, 1)[0], run(0.0, 2)[0]):
        tokens = "sum, and lengths"
    else:
        tokens = "sum and mean"
    order = [name for name in names if name in policy]
    return Reads(tuple(order), bool(reference), tuple(sorted(columns - {"weight"})), tokens)


def completions(parts: Mapping[str, float], margin: jax.Array, declared: Mapping) -> dict:
    """Completions that differ from LENGTH tokens of MEAN by their part of the margin [N]."""
    for name in set(declared) - set(STATISTICS):
        raise ValueError(f"statistic {name!r} is not among loss_curves.STATISTICS: add it")
    totals = {name: LENGTH * MEAN + part * margin for name, part in parts.items()}
    length = jnp.full(margin.shape, LENGTH, jnp.int32)
    return {
        name: Logps(total, length, {s: STATISTICS[s](total) for s in declared})
        for name, total in totals.items()
    }


def differentiated(losses_at: Callable[[jax.Array], jax.Array], margin: np.ndarray) -> Curve:
    """The curve of a function of margins [N] whose n-th value has a slope by the n-th alone."""
    losses, pullback = jax.vjp(losses_at, jnp.asarray(margin, jnp.float32))
    (slope,) = pullback(jnp.ones_like(losses))
    return Curve(margin, np.asarray(losses), np.asarray(slope))


def margins() -> np.ndarray:
    """The margins of a curve, in nats: float64 [N]."""
    return np.linspace(-EXTENT, EXTENT, POINTS)


def pair_curve(loss: Callable, margin: np.ndarray) -> Curve:
    """A loss of pairs: chosen and rejected have half of the margin each, the reference none."""
    declared = contract.needs(loss)

    def losses_at(margin: jax.Array) -> jax.Array:
        parts = PAIR | RANKED
        policy = completions(parts, margin, declared.policy)
        reference = completions(parts, jnp.zeros_like(margin), declared.reference)
        return evaluate(loss, policy, reference, {"weight": jnp.ones_like(margin)})

    return differentiated(losses_at, margin)


def unpaired_curves(loss: Callable, ratio: np.ndarray) -> tuple[Curve, Curve]:
    """A loss of labelled completions at these log-ratios: desirable ones, undesirable ones.

    All are one batch. Log-ratios that are symmetrical about 0 keep running baselines at 0, and the
    mismatched completions' log-ratios are 0.
    """
    declared = contract.needs(loss)
    both = np.concatenate([ratio, ratio])
    desirable = jnp.repeat(jnp.array([1.0, 0.0]), len(ratio))

    def losses_at(ratio: jax.Array) -> jax.Array:
        policy = completions(UNPAIRED, ratio, declared.policy)
        reference = completions(UNPAIRED, jnp.zeros_like(ratio), declared.reference)
        columns = {name: jnp.full_like(ratio, value) for name, value in COLUMNS.items()}
        batch = {"weight": jnp.ones_like(ratio), "desirable": desirable, **columns}
        return evaluate(loss, policy, reference, batch)

    _, losses, slope = differentiated(losses_at, both)
    one, other = np.split(losses, 2), np.split(slope, 2)
    return Curve(ratio, one[0], other[0]), Curve(ratio, one[1], other[1])


def score_curve(score: Callable, ratio: np.ndarray, **parameters: float) -> Curve:
    """A score s(r) at log-ratios in nats."""
    return differentiated(lambda r: score(r, **parameters), ratio)
