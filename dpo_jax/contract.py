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

from dpo_jax import kept, logps
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


def accumulates_apart(loss: Callable) -> bool:
    """Whether it matters to the loss which examples it is given at once."""
    return needs(loss).batch_statistics or has_state(loss)


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


def split(hyperparameters: Mapping[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The hyperparameters that a step takes as traced numbers, and those that are fixed in it."""
    floats = {name: jnp.float32(v) for name, v in hyperparameters.items() if isinstance(v, float)}
    return floats, {name: v for name, v in hyperparameters.items() if name not in floats}


class _Completions(dict):
    """Completions by name, which notes what is read, with the cure for a name that the data do not
    give.
    """

    def __init__(self, values: Mapping, loss: str):
        super().__init__(values)
        self.loss = loss
        self.read: set[str] = set()

    def __getitem__(self, name: str):
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None):
        """As a dict's."""
        return self[name] if name in self else default

    def items(self):
        """As a dict's."""
        self.read.update(self)
        return super().items()

    def values(self):
        """As a dict's."""
        self.read.update(self)
        return super().values()

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
        cures = {
            "desirable": ": --data.examples unpaired gives it",
            "density_ratio": ": unpaired rows can have it as a field of that name",
        }
        raise ValueError(
            f"loss {self.loss} reads batch[{name!r}], and the batch has {', '.join(sorted(self))}"
            + cures.get(name, "")
        )


class _Found(NamedTuple):
    """What a loss makes of a trial."""

    # losses, metrics and the next state
    returned: tuple
    # of the summed losses in what was scored under the policy
    gradient: list[jax.Array]


class _Trial(NamedTuple):
    """Made-up inputs of a loss: four examples."""

    policy: dict[str, logps.Logps]
    reference: dict[str, logps.Logps]
    batch: dict[str, jax.Array]

    def moved(self, example: int, shift: float) -> "_Trial":
        """With all that is known of an example changed, but for its weight."""

        # on the host, where so little takes least time
        def add(values: jax.Array, amount: float) -> Any:
            found = np.array(values)
            found[example] += amount
            return found

        def move(one: logps.Logps, shift: float) -> logps.Logps:
            statistics = {name: add(sums, shift) for name, sums in one.statistics.items()}
            return logps.Logps(add(one.total, shift), add(one.length, 7), statistics)

        columns = {
            name: values if name == "weight" else add(values, 1.0 - 2.0 * float(values[example]))
            for name, values in self.batch.items()
        }
        return _Trial(
            {name: move(one, shift) for name, one in self.policy.items()},
            {name: move(one, -shift) for name, one in self.reference.items()},
            columns,
        )

    def without_last(self) -> "_Trial":
        """With the last slot empty."""
        weight = jnp.array([1.0, 1.0, 1.0, 0.0])
        return self._replace(batch={**self.batch, "weight": weight})


def reads(
    loss: Callable,
    hyperparameters: Mapping[str, Any],
    names: Sequence[str],
    columns: Sequence[str],
) -> set[str]:
    """Which of these completions the loss reads, of policy or reference; ValueError where it reads
    another.
    """
    declared, title = needs(loss), loss.__name__
    trial = _draw(declared, names, columns, 1.0, 0)
    policy, reference = (_Completions(side, title) for side in (trial.policy, trial.reference))
    loss_of = functools.partial(with_state(loss), **hyperparameters)
    jax.eval_shape(
        lambda batch: loss_of(policy, reference, _Batch(batch, title), declared.state())[0],
        trial.batch,
    )
    return (policy.read | reference.read) & set(names)


def check(
    loss: Callable,
    hyperparameters: Mapping[str, Any],
    names: Sequence[str],
    columns: Sequence[str],
    has_reference: bool,
    keeper: kept.Kept | None = None,
) -> None:
    """Runs the loss on four made-up examples; ValueError says which part of the contract it breaks.
    With a keeper, a loss that was checked with other numbers does not compile again.

    The parts: it runs under jit with its floats traced; it reads only completions and columns that
    the data give; it reads a reference if and only if there is one; it returns losses [N], finite
    and with finite gradients, metrics [N], and a state like the one it was given; empty slots
    change nothing; and examples do not meet unless `declare` said so.
    """
    declared, title = needs(loss), loss.__name__
    _check_declared(declared, names, title)
    floats, statics = split(hyperparameters)
    make = _jitted if keeper is None else functools.partial(keeper.all, _jitted)
    jitted, find, reference_read = make(loss, tuple(sorted(statics.items())))
    run = functools.partial(jitted, floats=floats)
    trials = [_draw(declared, names, columns, scale, seed) for seed, scale in enumerate(SCALES)]
    losses, metrics, _ = jax.eval_shape(find, trials[0], floats)
    _check_reference(bool(reference_read), has_reference, title)
    for what, value in {"losses": losses, **{f"metric {k}": v for k, v in metrics.items()}}.items():
        if getattr(value, "shape", None) != (4,):
            raise ValueError(
                f"loss {title} returned {what} of shape {getattr(value, 'shape', value)}; one "
                "number an example: [N]"
            )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"loss {title} returned losses of {losses.dtype}: they must be float32")
    for trial in (*trials[:2], _at_reference(trials[0], declared)):
        (found, *_), gradient = run(trial)
        if not np.all(np.isfinite(found)) or not all(map(np.all, map(np.isfinite, gradient))):
            raise ValueError(
                f"loss {title} is {found} on log-probabilities near -5, with gradients "
                f"{[np.asarray(one).tolist() for one in gradient]}: they must be finite"
            )
    if _examples_meet(run, trials, declared.batch_statistics):
        raise ValueError(
            f"in loss {title} an empty slot (weight 0) changes the loss of an example: leave it "
            "out of every sum over the batch, as losses.batch_mean does"
            if declared.batch_statistics
            else f"in loss {title} an example's loss changes with other examples: decorate it with "
            "@contract.declare(batch_statistics=True), so that accumulation treats it right"
        )


# spread of the made-up log-probabilities, in nats
SCALES = (1.0, *[5.0] * 7)


def _jitted(
    loss: Callable, statics: Sequence[tuple[str, Any]]
) -> tuple[Callable, Callable, set[str]]:
    """What a loss makes of a _Trial: _Found under jit, its floats traced as in the train step, and
    what it returns, to be traced; and the completions of the reference that it has read, once it
    has been.
    """
    title, reference_read = loss.__name__, set()
    loss_of = with_state(loss, **dict(statics))

    def find(trial: _Trial, floats: dict):
        policy, reference = (_Completions(side, title) for side in trial[:2])
        state = needs(loss).state()
        returned = loss_of(policy, reference, _Batch(trial.batch, title), state, **floats)
        reference_read.update(reference.read)
        expected = 3
        if not isinstance(returned, tuple) or len(returned) != expected:
            raise ValueError(
                f"loss {title} must return losses and metrics, and with a declared state the next "
                "state too"
            )
        _check_state(state, returned[2], title)
        return returned

    # one program of everything, which is small, and takes longest to compile
    @jax.jit
    def run(trial: _Trial, floats: dict) -> _Found:
        def objective(scored):
            policy = {name: trial.policy[name]._replace(**sums) for name, sums in scored.items()}
            return jnp.sum(find(trial._replace(policy=policy), floats)[0])

        gradient = jax.grad(objective)(logps.differentiable(trial.policy))
        # apart, since a rule of the loss's own may give other values where it is differentiated
        return _Found(find(trial, floats), jax.tree.leaves(gradient))

    return run, find, reference_read


def _check_state(given: Any, returned: Any, title: str) -> None:
    """Raises ValueError unless the next state is like the one before."""
    shapes = [
        (jax.tree.structure(state), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves])
        for state in (given, returned)
        for leaves in [jax.tree.leaves(state)]
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"loss {title} was given a state of {shapes[0]} and returned one of {shapes[1]}: they "
            "must be alike"
        )


def _check_reference(read: bool, has_reference: bool, title: str) -> None:
    """Raises ValueError unless a reference is read if and only if there is one."""
    if read and not has_reference:
        raise ValueError(
            f"loss {title} reads the reference, and reference.source is None: give "
            "--reference.source"
        )
    if not read and has_reference:
        raise ValueError(
            f"loss {title} reads no reference: set --reference.source None, so that none is held"
        )


def _check_declared(declared: Needs, names: Sequence[str], title: str) -> None:
    for name, statistic in {**declared.policy, **declared.reference}.items():
        if name == logps.TOTAL:
            raise ValueError(
                f"loss {title} declares a statistic {name!r}, which is the name of the summed "
                "log-probability: give it another"
            )
        if not hasattr(statistic, "__qualname__"):
            raise ValueError(
                f"loss {title} declares {statistic!r} as the statistic {name!r}: define a function "
                "with a name, by which a cached reference finds it again"
            )
    if declared.prompt and pack.PROMPT in names:
        raise ValueError(
            f"loss {title} has the prompt scored as {pack.PROMPT!r}, and the data give a "
            "completion of that name"
        )


def _draw(
    declared: Needs, names: Sequence[str], columns: Sequence[str], scale: float, seed: int
) -> _Trial:
    """Made-up inputs: log-probabilities from -5 nats downwards, the prompt's too where that is
    declared.
    """
    names = [*names, pack.PROMPT] if declared.prompt else names
    generator = np.random.default_rng(seed)
    length = jnp.asarray(np.array([3, 4, 5, 6], np.int32))

    def completions(statistics: Mapping[str, Any]) -> dict[str, logps.Logps]:
        def draw() -> jax.Array:
            return jnp.asarray(-5.0 - np.float32(scale) * generator.random(4, np.float32))

        return {n: logps.Logps(draw(), length, {s: draw() for s in statistics}) for n in names}

    # arrays of NumPy that become JAX's compile nothing
    extras = {name: jnp.asarray(np.array([1, 0, 1, 0], np.float32)) for name in columns}
    batch = {"weight": jnp.asarray(np.ones(4, np.float32)), **extras}
    return _Trial(completions(declared.policy), completions(declared.reference), batch)


def _at_reference(trial: _Trial, declared: Needs) -> _Trial:
    """The trial with a reference that equals the policy bit for bit."""

    def anchor(name: str, one: logps.Logps) -> logps.Logps:
        own = trial.reference[name].statistics
        return one._replace(statistics={k: one.statistics.get(k, own[k]) for k in own})

    equal = {name: anchor(name, one) for name, one in trial.policy.items()}
    return trial._replace(reference=equal)


def _examples_meet(run: Callable, trials: Sequence[_Trial], declared: bool) -> bool:
    """Whether an example's loss changes with another one, or where it is declared that it does,
    with an empty slot.
    """
    for number, trial in enumerate(trials):
        # up and down, since a statistic may be held on one side
        shift = 10.0 * (-1) ** number
        emptied = trial.without_last()
        pairs = [(emptied, emptied.moved(3, shift), 3)]
        if not declared:
            pairs += [(trial, emptied, 3)]
            pairs += [(trial, trial.moved(example, shift), example) for example in range(4)]
        for one, other, example in pairs:
            before, after = (
                np.delete(np.asarray(run(t).returned[0]), example) for t in (one, other)
            )
            if not np.array_equal(before, after):
                return True
    return False


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
