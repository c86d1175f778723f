"""What a loss declares, and the check that it keeps its contract before a step is compiled.

Dimensions: N examples.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import logps
from dpo_jax.data import pack


class Facts(NamedTuple):
    """What is known of a run before its first step, for a loss's advice."""

    hyperparameters: Mapping[str, Any]
    # float32 [N] each: the training data's numbers
    columns: Mapping[str, np.ndarray]
    # examples over which batch statistics are taken
    examples: int


class Needs(NamedTuple):
    """What a loss asks for beyond summed log-probabilities of completions."""

    # an example's loss depends on other examples of the batch (KTO's KL)
    batch_statistics: bool = False
    # further sums over each completion's tokens, under the policy and under the reference
    policy: Mapping[str, logps.Statistic] = {}
    reference: Mapping[str, logps.Statistic] = {}
    # the prompts' own tokens are scored too, as the completion "prompt"
    prompt: bool = False
    # () -> the state that the loss is first given, a pytree of arrays
    state: Callable[[], Any] = tuple
    # what a user should be warned of
    advice: Callable[[Facts], list[str]] | None = None


def declare(
    *,
    batch_statistics: bool = False,
    policy: Mapping[str, logps.Statistic] | None = None,
    reference: Mapping[str, logps.Statistic] | None = None,
    prompt: bool = False,
    state: Callable[[], Any] = tuple,
    advice: Callable[[Facts], list[str]] | None = None,
) -> Callable[[Callable], Callable]:
    """Marks a loss with what it needs, which is then computed, and only then.

    A loss with a state is called (policy, reference, batch, state, ...) and returns the next state
    as a third value; it is part of the train state and of the checkpoint.
    """
    declared = Needs(batch_statistics, policy or {}, reference or {}, prompt, state, advice)

    def mark(loss: Callable) -> Callable:
        vars(loss)["needs"] = declared
        return loss

    return mark


def needs(loss: Callable) -> Needs:
    """What the loss declared; nothing where it declared nothing."""
    return getattr(loss, "needs", Needs())


def advise(loss: Callable, facts: Facts) -> None:
    """Warns of what the loss advises against."""
    advice = needs(loss).advice
    for line in [] if advice is None else advice(facts):
        warnings.warn(f"loss {loss.__name__}: {line}", stacklevel=2)


def has_state(loss: Callable) -> bool:
    """Whether the loss takes a state and returns the next."""
    return needs(loss).state is not tuple


def with_state(loss: Callable, **statics: Any) -> Callable:
    """The loss as (policy, reference, batch, state, **numbers) -> losses, metrics, state, whether
    it has a state or not.
    """
    if has_state(loss):
        return functools.partial(loss, **statics)

    def stateless(policy, reference, batch, state, **numbers):
        return *loss(policy, reference, batch, **statics, **numbers), state

    return stateless


class _Completions(dict):
    """Completions by name, with the cure where a loss asks for one that the data do not give."""

    def __init__(self, values: Mapping, loss: str):
        super().__init__(values)
        self.loss = loss

    def __missing__(self, name: str):
        raise ValueError(
            f"loss {self.loss} reads the completion {name!r}, and the data give "
            f"{', '.join(sorted(self))}: set --data.examples to pairs (chosen, rejected), triples "
            "(these and gold), ranked (completion_0 and on), unpaired (completion, mismatched) or "
            "sft (completion)"
        )


class _Batch(dict):
    def __init__(self, values: Mapping, loss: str):
        super().__init__(values)
        self.loss = loss

    def __missing__(self, name: str):
        raise ValueError(
            f"loss {self.loss} reads batch[{name!r}], and the batch has {', '.join(sorted(self))}"
            + (": --data.examples unpaired gives 'desirable'" if name == "desirable" else "")
        )


class _NoReference(_Completions):
    """Stands for the reference while it is found out whether a loss reads it."""

    read = False

    def __getitem__(self, name: str):
        self.read = True
        return super().__getitem__(name)


def check(
    loss: Callable,
    hyperparameters: Mapping[str, Any],
    names: Sequence[str],
    columns: Sequence[str],
    has_reference: bool,
) -> None:
    """Runs the loss on four made-up examples; ValueError says which part of the contract it breaks.

    The parts: it reads only completions and columns that the data give; it reads a reference if and
    only if there is one; it returns losses [N], finite, and metrics [N]; examples do not meet
    unless `declare` said so.
    """
    title = loss.__name__
    declared = needs(loss)
    _check_declared(declared, names, title)
    loss_of = functools.partial(with_state(loss), **hyperparameters)
    names = [*names, *([pack.PROMPT] if declared.prompt else [])]
    policy, reference, batch = _examples(declared, names, columns, title, scale=1.0)
    losses, metrics, _ = loss_of(policy, reference, batch, declared.state())
    if reference.read and not has_reference:
        raise ValueError(
            f"loss {title} reads the reference, and reference.source is None: give "
            "--reference.source"
        )
    if not reference.read and has_reference:
        raise ValueError(
            f"loss {title} reads no reference: set --reference.source None, so that none is held"
        )
    for what, value in {"losses": losses, **{f"metric {k}": v for k, v in metrics.items()}}.items():
        if jnp.shape(value) != (4,):
            raise ValueError(
                f"loss {title} returned {what} of shape {jnp.shape(value)}; one number an example: "
                "[N]"
            )
    if not np.all(np.isfinite(losses)):
        raise ValueError(
            f"loss {title} is {losses} on log-probabilities near -5: it must be finite"
        )
    if not declared.batch_statistics and _examples_meet(loss_of, declared, names, columns, title):
        raise ValueError(
            f"in loss {title} an example's loss changes with other examples: decorate it with "
            "@contract.declare(batch_statistics=True), so that accumulation treats it right"
        )


def _check_declared(declared: Needs, names: Sequence[str], title: str) -> None:
    for name in {**declared.policy, **declared.reference}:
        if name == logps.TOTAL:
            raise ValueError(
                f"loss {title} declares a statistic {name!r}, which is the name of the summed "
                "log-probability: give it another"
            )
    if declared.prompt and pack.PROMPT in names:
        raise ValueError(
            f"loss {title} has the prompt scored as {pack.PROMPT!r}, and the data give a "
            "completion of that name"
        )


def _examples(
    declared: Needs,
    names: Sequence[str],
    columns: Sequence[str],
    title: str,
    scale: float,
    seed: int = 0,
):
    generator = np.random.default_rng(seed)
    length = jnp.array([3, 4, 5, 6], jnp.int32)

    def completions(statistics: Mapping[str, Any]):
        def draw():
            return jnp.asarray(-5.0 - scale * generator.random(4, np.float32))

        return {n: logps.Logps(draw(), length, {s: draw() for s in statistics}) for n in names}

    extras = {name: jnp.array([1.0, 0.0, 1.0, 0.0]) for name in columns}
    batch = _Batch({"weight": jnp.ones(4), **extras}, title)
    policy = _Completions(completions(declared.policy), title)
    return policy, _NoReference(completions(declared.reference), title), batch


def _examples_meet(
    loss_of: Callable, declared: Needs, names: Sequence[str], columns: Sequence[str], title: str
) -> bool:
    """Whether changing all that is known of the last example changes the loss of another."""
    state = declared.state()
    for seed in range(8):
        policy, reference, batch = _examples(declared, names, columns, title, 5.0, seed)
        before, *_ = loss_of(policy, reference, batch, state)
        # up and down, since a statistic may be held on one side
        shift = 10.0 * (-1) ** seed
        columns_moved = {n: batch[n].at[3].set(1.0 - batch[n][3]) for n in columns}
        after, *_ = loss_of(
            _Completions(_move_last(policy, shift), title),
            _Completions(_move_last(reference, -shift), title),
            _Batch({**batch, **columns_moved}, title),
            state,
        )
        if not np.array_equal(np.asarray(before)[:3], np.asarray(after)[:3]):
            return True
    return False


def _move_last(completions: Mapping[str, logps.Logps], shift: float) -> dict[str, logps.Logps]:
    def move(one: logps.Logps) -> logps.Logps:
        statistics = {name: sums.at[3].add(shift) for name, sums in one.statistics.items()}
        return logps.Logps(one.total.at[3].add(shift), one.length.at[3].add(7), statistics)

    return {name: move(one) for name, one in completions.items()}


def weighted_sums(
    losses: jax.Array, metrics: Mapping[str, jax.Array], weight: jax.Array
) -> dict[str, jax.Array]:
    """Sum and weight [2] of the loss and of each metric over the examples; nan in a metric: does
    not apply.
    """

    def one(values: jax.Array) -> jax.Array:
        applies = jnp.where(jnp.isnan(values), 0.0, weight)
        return jnp.stack([jnp.sum(jnp.where(applies > 0, values, 0.0) * applies), jnp.sum(applies)])

    loss = jnp.stack([jnp.sum(jnp.where(weight > 0, losses, 0.0) * weight), jnp.sum(weight)])
    return {"loss": loss, **{name: one(values) for name, values in metrics.items()}}
