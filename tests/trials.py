"""What every loss is tried with: its completions, its defaults, settings, and examples.

Dimensions: N = COUNT examples.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dpo_jax import contract, losses
from dpo_jax.logps import Logps
from tests import oracles

PAIR = ("chosen", "rejected")
UNPAIRED = ("completion", "mismatched")
RANKING = ("completion_0", "completion_1", "completion_2", "completion_3")
# examples of all tests, so that a loss is compiled once
COUNT = 36
# stands for the default of a hyperparameter that has none
REQUIRED = inspect.Parameter.empty


class Spec(NamedTuple):
    """A loss's completions, the defaults that its paper gives, and what it is tried with."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    settings: tuple[dict[str, Any], ...] = ()
    has_reference: bool = True


SMOOTH = {"beta": 0.1, "label_smoothing": 0.0}
SCORED = {"beta": 0.1, "score": "reverse_kl"}
SCORES = (
    {"beta": 0.25, "score": "forward_kl"},
    {"beta": 0.25, "score": "jensen_shannon"},
    {"beta": 0.25, "score": "alpha_divergence"},
)
LABELLED = {"beta": 0.1, "lambda_desirable": 1.0, "lambda_undesirable": 1.0}
WEIGHTED = {"beta": 0.5, "lambda_desirable": 1.5, "lambda_undesirable": 0.5}
SPECS: dict[str, Spec] = {
    "dpo": Spec(
        PAIR, SMOOTH | SCORED, ({"beta": 1.0}, {"beta": 0.5, "label_smoothing": 0.25}, *SCORES)
    ),
    "alpha_dpo": Spec(
        PAIR,
        {"beta": 0.1, "alpha": 0.5, "label_smoothing": 0.0},
        ({"beta": 0.5, "alpha": 0.25, "label_smoothing": 0.125}, {"alpha": 0.0}, {"alpha": 1.0}),
    ),
    "robust": Spec(
        PAIR,
        {**SCORED, "label_smoothing": 0.1},
        ({"beta": 0.5, "label_smoothing": 0.25}, {"label_smoothing": 0.0}, *SCORES),
    ),
    "ipo": Spec(PAIR, SCORED, ({"beta": 0.5}, *SCORES)),
    "ipo_sum": Spec(PAIR, SCORED, ({"beta": 0.125}, *SCORES)),
    "hinge": Spec(PAIR, SCORED, ({"beta": 0.5}, *SCORES)),
    "exo_pair": Spec(
        PAIR,
        {**SCORED, "label_smoothing": 1e-3},
        ({"beta": 0.5}, {"label_smoothing": 0.25}, *SCORES),
    ),
    "nca_pair": Spec(PAIR, SCORED, ({"beta": 1.0}, *SCORES)),
    "bco_pair": Spec(
        PAIR, {**SCORED, "delta": 0.0}, ({"beta": 0.5}, {"delta": 0.5}, {"delta": -1.0}, *SCORES)
    ),
    "sppo_hard": Spec(PAIR, SCORED, ({"beta": 0.5}, *SCORES)),
    "aot": Spec(PAIR, SMOOTH, ({"beta": 0.5, "label_smoothing": 0.25},)),
    "aot_unpaired": Spec(PAIR, SMOOTH, ({"beta": 0.5, "label_smoothing": 0.25},)),
    "apo_zero": Spec(PAIR, {"beta": 0.1}, ({"beta": 1.0},)),
    "apo_down": Spec(PAIR, {"beta": 0.1}, ({"beta": 1.0},)),
    "discopop": Spec(PAIR, {"beta": 0.1, "tau": 0.05}, ({"beta": 0.5}, {"tau": 0.5})),
    "dpo_norm": Spec(PAIR, {**SCORED, "beta": 5.0}, ({"beta": 1.0}, *SCORES)),
    "dpop": Spec(PAIR, {"beta": 0.1, "lam": 50.0}, ({"beta": 0.5, "lam": 2.0}, {"lam": 0.0})),
    "r_dpo": Spec(
        PAIR,
        {"beta": 0.1, "alpha": REQUIRED},
        ({"alpha": 0.05}, {"beta": 0.5, "alpha": 0.25}, {"alpha": 0.0}),
    ),
    "ld_dpo": Spec(
        PAIR, {"beta": 0.1, "alpha": 0.5}, ({"beta": 0.5, "alpha": 0.25}, {"alpha": 1.0})
    ),
    "ld_dpo_policy": Spec(
        PAIR, {"beta": 0.1, "alpha": 0.5}, ({"beta": 0.5, "alpha": 0.25}, {"alpha": 1.0})
    ),
    "wpo": Spec(PAIR, SMOOTH, ({"beta": 0.5, "label_smoothing": 0.25},)),
    "mpo": Spec(
        PAIR,
        {"beta": 0.1, "preference": 0.8, "quality": 0.2, "generation": 1.0},
        ({"beta": 0.5, "preference": 0.5, "quality": 2.0, "generation": 0.25},),
    ),
    "rpo": Spec(PAIR, {"beta": 0.1, "alpha": 0.005}, ({"beta": 0.5, "alpha": 0.5},)),
    "kto": Spec(UNPAIRED, LABELLED, (WEIGHTED,)),
    "apo_zero_unpaired": Spec(("completion",), LABELLED, (WEIGHTED,)),
    "bco": Spec(("completion",), {"beta": 0.1}, ({"beta": 0.5},)),
    "bco_joint": Spec(("completion",), {"beta": 0.1}, ({"beta": 0.5},)),
    "bco_weighted": Spec(
        ("completion",),
        {"beta": 0.1, "smallest": 0.5, "largest": 10.0},
        ({"beta": 0.5, "smallest": 0.25, "largest": 4.0},),
    ),
    "orpo": Spec(PAIR, {"lam": 0.1}, ({"lam": 1.0}, {"lam": 0.0}), has_reference=False),
    "orpo_prompt": Spec(
        (*PAIR, "prompt"), {"lam": 0.1}, ({"lam": 1.0}, {"lam": 0.0}), has_reference=False
    ),
    "simpo": Spec(
        PAIR, {"beta": 2.0, "gamma": 1.6}, ({"beta": 0.5, "gamma": 0.0},), has_reference=False
    ),
    "alphapo": Spec(
        PAIR,
        {"beta": 2.5, "gamma": 0.25, "alpha": 0.25},
        ({"beta": 1.0, "gamma": 0.5, "alpha": -0.5}, {"alpha": 0.0}),
        has_reference=False,
    ),
    "cpo": Spec(
        PAIR,
        {**SMOOTH, "alpha": 1.0},
        ({"beta": 0.25, "label_smoothing": 0.25, "alpha": 0.5}, {"alpha": 0.0}),
        has_reference=False,
    ),
    "tpo": Spec(
        (*PAIR, "gold"),
        {"beta": 0.01, "alpha": 1.0},
        ({"beta": 0.25, "alpha": 0.5},),
        has_reference=False,
    ),
    "sft": Spec(("completion",), {}, (), has_reference=False),
    "preferred_ft": Spec(PAIR, {}, (), has_reference=False),
    "unlikelihood": Spec(
        PAIR,
        {"alpha": REQUIRED},
        ({"alpha": 0.5}, {"alpha": 0.0}, {"alpha": 1.0}),
        has_reference=False,
    ),
    "plackett_luce": Spec(RANKING, {"beta": 0.1}, ({"beta": 0.5},)),
}
STATEFUL = ("bco", "bco_joint", "bco_weighted")


def cases() -> list[Any]:
    """(name, all hyperparameters) of every setting of every loss."""
    found = []
    for name, spec in SPECS.items():
        plain = [] if REQUIRED in spec.defaults.values() else [{}]
        for setting in (*plain, *spec.settings):
            label = ", ".join([name, *(f"{k} {v}" for k, v in setting.items())])
            found.append(pytest.param(name, spec.defaults | setting, id=label))
    return found


CASES = cases()
every_case = pytest.mark.parametrize(("name", "numbers"), CASES)


def first_setting(name: str) -> dict[str, Any]:
    return next(case.values[1] for case in CASES if case.values[0] == name)


def score_of(module: types.ModuleType, name: str) -> Callable:
    """A score by its name; the alpha-divergence at its paper's alpha."""
    return half_way(module) if name == "alpha_divergence" else getattr(module, name)


@functools.cache
def half_way(module: Any) -> Callable:
    """One function however often it is asked for, so that it is compiled once."""
    return functools.partial(module.alpha_divergence, alpha=0.5)


class Found(NamedTuple):
    """Losses and metrics [N], their sums, the gradient of the loss's sum, and the next state."""

    losses: Any
    metrics: dict[str, Any]
    sums: dict[str, Any]
    gradient: dict[tuple[str, str], Any]
    state: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(loss, score, policy, reference, batch, state, numbers) -> tuple:
    """Compiled as in the train step: every number traced."""

    def objective(policy):
        statics = {} if score is None else {"score": score}
        loss_of = contract.with_state(loss, **statics)
        values, metrics, after = loss_of(policy, reference, batch, state, **numbers)
        sums = contract.weighted_sums(values, metrics, batch["weight"])
        return sums["loss"][0], (values, metrics, sums, after)

    gradient, rest = jax.grad(objective, has_aux=True, allow_int=True)(policy)
    slopes = {n: {"total": g.total, **g.statistics} for n, g in gradient.items()}
    return slopes, rest


class Inputs:
    """Scored completions and the batch of N examples, float32, lengths int32."""

    def __init__(self, policy: dict[str, oracles.Scored], reference: dict, batch: dict):
        self.policy, self.reference = policy, reference
        count = len(next(iter(policy.values())).total)
        plain = {"weight": np.ones(count), "desirable": np.arange(count) % 2 == 0}
        self.batch = {k: np.asarray(v, np.float32) for k, v in {**plain, **batch}.items()}

    def apply(self, name: str, numbers: dict[str, Any], state: Any = None) -> Found:
        """What a loss makes of these examples."""
        loss = getattr(losses, name)
        score = score_of(losses, numbers["score"]) if "score" in numbers else None
        floats = {k: jnp.float32(v) for k, v in numbers.items() if k != "score"}
        slopes, rest = evaluate(
            loss,
            score,
            compact(self.policy),
            compact(self.reference) if SPECS[name].has_reference else None,
            self.batch,
            contract.needs(loss).state() if state is None else state,
            floats,
        )
        values, metrics, sums, after = jax.tree.map(np.asarray, rest)
        gradient = {(n, leaf): np.asarray(s) for n, by in slopes.items() for leaf, s in by.items()}
        return Found(values, metrics, sums, gradient, after)

    def given(self, earlier: tuple[oracles.Given, ...] = ()) -> oracles.Given:
        """The same for an oracle, in float64."""
        policy, reference = widen(self.policy), widen(self.reference)
        batch = {name: values.astype(float) for name, values in self.batch.items()}
        return oracles.Given(policy, reference, batch, policy, earlier)


def compact(side: dict[str, oracles.Scored]) -> dict[str, Logps]:
    return {
        name: Logps(
            jnp.asarray(one.total, jnp.float32),
            jnp.asarray(one.length, jnp.int32),
            {k: jnp.asarray(v, jnp.float32) for k, v in one.statistics.items()},
        )
        for name, one in side.items()
    }


def widen(side: dict[str, oracles.Scored]) -> dict[str, oracles.Scored]:
    """Each number as float32 has it, in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32).astype(float), side)


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as an oracle takes them: floats as float32 has them, scores as functions."""
    return {
        k: score_of(oracles, v) if k == "score" else float(np.float32(v))
        for k, v in numbers.items()
    }


def scored(name: str, total: dict, ratio: dict, length: dict, batch: dict | None = None) -> Inputs:
    """Examples of these totals under the policy, log-ratios and lengths, with the loss's further
    sums: head is half the total beyond the shortest completion, excess alternates in sign.
    """
    needs = contract.needs(getattr(losses, name))
    shortest = np.minimum.reduce([length[n] for n in total if n != "prompt"])

    def statistics(names, n, total):
        sign = np.where(np.arange(len(total)) % 3 == 0, 1, -1)
        made = {
            "head": np.where(length[n] > shortest, total / 2, total),
            "excess": sign * np.minimum(length[n] / 4, 64),
        }
        return {k: made[k] for k in names}

    policy = {
        n: oracles.Scored(t, length[n], statistics(needs.policy, n, t)) for n, t in total.items()
    }
    anchor = {n: t - ratio[n] for n, t in total.items()}
    reference = {
        n: oracles.Scored(t, length[n], statistics(needs.reference, n, t))
        for n, t in anchor.items()
    }
    ratios = np.geomspace(0.125, 32, len(shortest))
    return Inputs(policy, reference, {"density_ratio": ratios, **(batch or {})})


def sixteenths(values: np.ndarray, *, odd: bool) -> np.ndarray:
    """Nearby odd multiples of 1/16, or even ones that are not 0, so that no kink is met."""
    whole = 2 * np.floor(8 * values) + odd
    return np.where(whole == 0, 2, whole) / 16


def draw(name: str, seed: int = 0) -> Inputs:
    """Examples whose totals, log-ratios and means float32 has exactly: what is compared is the
    loss.
    """
    generator = np.random.default_rng(seed)
    names = SPECS[name].names
    total, ratio, length = {}, {}, {}
    for place, n in enumerate(names):
        length[n] = 2.0 ** generator.integers(0, 6, COUNT)
        total[n] = -np.ceil(16 * length[n] * generator.uniform(0.1, 2, COUNT)) / 16
        most = np.minimum(4, length[n] / 2)
        # KTO's mismatched completions need a positive mean log-ratio for its z to be felt
        least = 0 if n == "mismatched" else -most
        # all of them distinct, so that nothing depends on how ties are sorted
        apart = np.arange(COUNT) / 1024
        ratio[n] = sixteenths(generator.uniform(least, most), odd=place == 0) + apart
    return scored(name, total, ratio, length)


def extreme(name: str) -> Inputs:
    """Every combination of log-ratios of 1/4 and +-1e4 and of lengths 1 and 4096, of two
    completions.
    """
    grid = np.array(np.meshgrid([0.25, 1e4, -1e4], [0.25, 1e4, -1e4], [1, 4096], [1, 4096]))
    ratios, sizes = grid.reshape(4, -1)[:2], grid.reshape(4, -1)[2:]
    names = SPECS[name].names
    ratio = {n: ratios[place % 2] for place, n in enumerate(names)}
    length = {n: sizes[place % 2] for place, n in enumerate(names)}
    return scored(name, {n: -5 + np.minimum(ratio[n], 0) for n in names}, ratio, length)


def at_reference(name: str) -> Inputs:
    given = draw(name)
    return scored(
        name,
        {n: one.total for n, one in given.policy.items()},
        {n: np.zeros(COUNT) for n in given.policy},
        {n: one.length for n, one in given.policy.items()},
    )


def uniform(name: str, total: float, ratio: float = 0.0, length: float = 4) -> Inputs:
    names = SPECS[name].names
    totals, ratios, lengths = (
        {n: np.full(COUNT, value) for n in names} for value in (total, ratio, length)
    )
    return scored(name, totals, ratios, lengths)


def certain(name: str) -> Inputs:
    """Completions of probability 1, and next to it."""
    given = uniform(name, 0.0)
    for one in given.policy.values():
        one.total[::2] = -1e-8
    return given


def summed_from_bfloat16(name: str) -> Inputs:
    """Totals as a bfloat16 model gives them: rounded token by token, then summed in float32."""
    generator = np.random.default_rng(0)
    names = SPECS[name].names
    length = {n: generator.integers(1, 60, COUNT) for n in names}

    def total(count: int) -> np.float32:
        tokens = -generator.gamma(1.0, 2.0, count)
        return tokens.astype(ml_dtypes.bfloat16).astype(np.float32).sum(dtype=np.float32)

    policy, reference = (
        {n: np.array([total(count) for count in length[n]]) for n in names} for _ in range(2)
    )
    ratio = {n: policy[n] - reference[n] for n in names}
    return scored(name, policy, ratio, {n: x.astype(float) for n, x in length.items()})


FILLED = np.tile([True, False, True, True, False, True], COUNT // 6)


def with_empty_slots(name: str, garbage: float = 0.0) -> Inputs:
    """A third of the slots empty, and in these garbage of changing sign, no tokens."""
    given = draw(name)
    for side, sign in ((given.policy, 1), (given.reference, -1)):
        for place, one in enumerate(side.values()):
            for leaf in (one.total, *one.statistics.values()):
                leaf[~FILLED] = sign * (-1) ** place * garbage
            one.length[~FILLED] = 0
    given.batch["weight"][~FILLED] = 0
    given.batch["desirable"][~FILLED] = garbage > 0
    given.batch["density_ratio"][~FILLED] = abs(garbage)
    return given


CONDITIONS: dict[str, Callable[[str], Inputs]] = {
    "log-ratios of 1e4, lengths 1 and 4096": extreme,
    "policy equal to reference": at_reference,
    "empty slots": with_empty_slots,
    "garbage in empty slots": functools.partial(with_empty_slots, garbage=-1e30),
    "sums of bfloat16": summed_from_bfloat16,
    "certain completions": certain,
    "hopeless completions": functools.partial(uniform, total=-1e6, ratio=-1e6, length=1),
    "truncated away completions": functools.partial(uniform, total=0.0, length=0),
}
