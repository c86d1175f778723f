"""The frozen dataclasses of a run. Everything that a run does is one of these fields.

This module imports no jax, so that `--help`, dry runs and launchers start at once. The command line
and JSON are in `flags.py`, which reads these definitions.
"""

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from dpo_jax import checks

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]


class Loss:
    """A loss function and its hyperparameters, whose fields come from the function's signature.

    `Loss(losses.dpo, beta=0.1)`. Raises ValueError for a name that the function does not take, a
    missing one, a wrong type, or a value outside the range that the signature's annotation states.
    """

    __slots__ = ("function", "hyperparameters")
    function: Callable
    hyperparameters: Mapping[str, float | int | bool | str | Callable | None]

    def __init__(self, function: Callable, /, **hyperparameters: Any):
        declared = loss_fields(function)
        where = f"loss {function.__name__}"
        for name in hyperparameters:
            if name not in declared:
                near = checks.nearest(name, declared)
                raise ValueError(f"{where} has no hyperparameter {name!r}{near}")
        resolved = {}
        for name, (annotation, default) in declared.items():
            value = hyperparameters.get(name, default)
            if value is inspect.Parameter.empty:
                call = f"Loss({function.__name__}, {name}=...)"
                raise ValueError(f"{where} needs a value for {name!r}: {call}")
            resolved[name] = checks.check_value(value, annotation, f"loss.{name}")
            if callable(value) and not hasattr(value, "__qualname__"):
                raise ValueError(
                    f"loss.{name} is {value!r}, which has no name to find it again by: define a "
                    "function"
                )
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "hyperparameters", resolved)

    def __setattr__(self, name: str, value: Any):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Loss)
            and other.function is self.function
            and other.hyperparameters == self.hyperparameters
        )

    def __hash__(self) -> int:
        return hash((self.function, tuple(self.hyperparameters.items())))

    def __repr__(self) -> str:
        numbers = "".join(f", {name}={value!r}" for name, value in self.hyperparameters.items())
        return f"Loss({self.function.__name__}{numbers})"


@dataclasses.dataclass(frozen=True)
class Model:
    """Which weights the policy starts from, and how they are computed with."""

    # a preset's name (random weights), a folder in HF format, a run folder, or builtin (the SFT
    # model of the built-in task)
    source: str = "builtin"
    # compute type; None: bfloat16 on TPU and GPU, float32 on CPU. Parameters are float32
    dtype: Literal["float32", "bfloat16"] | None = None
    # what the backward pass computes again: none, single elements only and no product; dots,
    # attention too; full, each whole layer but its input
    remat: Literal["none", "dots", "full"] = "none"
    # how attention is computed: plain, all pairs of a row's tokens at once, or blocks, which leaves
    # out pairs of blocks that do not see each other, or kernel, which does so in Pallas kernels of
    # the platform, TPU or GPU; None: blocks on CPU, kernel on TPU, and on NVIDIA's GPUs where
    # heads have at most 128 dimensions and the compute type is bfloat16, else plain
    attention: Literal["plain", "blocks", "kernel"] | None = None
    # how matrices that are not trained are held (an adapter's base, a reference's); None: in the
    # compute type, which changes nothing; int8: with a scale an output, for an adapter's base
    frozen: Literal["float32", "bfloat16", "int8"] | None = None


@dataclasses.dataclass(frozen=True)
class Lora:
    """A low-rank adapter (https://arxiv.org/abs/2106.09685), which alone is then trained."""

    # rank of the adapter; None: no adapter, all parameters are trained
    rank: Count | None = None
    # what it adds is multiplied by alpha / rank
    alpha: Positive = 16.0
    # multiply by alpha / sqrt(rank) instead (rsLoRA, https://arxiv.org/abs/2312.03732)
    rank_stabilised: bool = False
    # linear maps that get one; None: all of attention and MLP, in a mixture of experts those of
    # attention
    targets: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] | None = (
        None
    )
    # share of an adapter's inputs that is dropped, drawn at each step by row, and so another draw
    # where a mesh or accumulation packs examples into other rows
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    # of a model.source that is a run with an adapter: train this adapter on, or merge it into the
    # weights and train a new one
    start: Literal["continue", "new"] = "continue"


@dataclasses.dataclass(frozen=True)
class Data:
    """Which rows are read, and how they become token ids."""

    # builtin, a .jsonl, .jsonl.gz or .parquet file, a folder of a saved HF dataset, hf:NAME, or
    # tfds:DIR
    source: str = "builtin"
    # split of an HF or TFDS source
    split: str = "train"
    # held-out rows, named as source is; None: held_out rows of the source, if any
    evaluation_source: str | None = None
    # split of an HF or TFDS evaluation source
    evaluation_split: str = "test"
    # examples set apart from the source for evaluation, where evaluation_source is None
    held_out: CountOrZero = 0
    # the rows' form; None: recognised from the fields of the first row, an error where two fit
    form: (
        Literal["pairs", "triples", "ranked", "transcripts", "unpaired", "judged", "text"] | None
    ) = None
    # what one training example is: chosen and rejected, these and a gold completion (TPO), k
    # completions ranked best first, one labelled completion (KTO), or one completion (SFT)
    examples: Literal["pairs", "triples", "ranked", "unpaired", "sft"] = "pairs"
    # a folder, a tokenizer.json or a hub name; None: the one that lies beside the model
    tokenizer: str | None = None
    # a Jinja file with the chat template; None: the tokenizer's own
    chat_template: str | None = None
    # token that ends each completion; None: the tokenizer's own
    eos_token: str | None = None
    # token that starts each prompt; None: the one that the tokenizer itself adds, if any
    bos_token: str | None = None
    # most tokens of a prompt and one completion together, BOS and EOS included
    max_length: Annotated[int, Ge(2)] = 512
    # most tokens of a prompt when it has to be cut; None: half of max_length
    max_prompt_length: Count | None = None
    # a prompt and completion over max_length: keep the prompt's end and then the completion's
    # start, drop the example and count it, or stop
    over_length: Literal["cut", "drop", "error"] = "cut"
    # a row that cannot be used (missing field, empty completion, chosen equal to rejected): stop,
    # or drop the row and count it
    bad_rows: Literal["error", "drop"] = "error"
    # share of the training labels that is flipped, drawn with seed (chosen and rejected swapped, a
    # ranking reversed)
    label_noise: Fraction = 0.0
    # seed of label noise, of the held-out choice and of KTO's mismatched completions
    seed: CountOrZero = 0


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference model of the log-ratios."""

    # initial (the policy as it starts), base (what lies under an adapter, with the adapter off), a
    # preset, folder or run folder; None: a loss that has none
    source: str | None = "initial"
    # compute its log-probabilities once, keep them on disk, and hold no second set of parameters
    cached: bool = False
    # steps between updates by which it follows the policy (TR-DPO); None: it stays as it is
    update_every: Count | None = None
    # share of the policy in an update, 1 being a copy
    update_weight: Annotated[float, Interval(gt=0, le=1)] = 0.6


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What optax applies to the gradient."""

    # which of optax's optimizers
    kind: Literal["adamw", "rmsprop", "adafactor"] = "adamw"
    # peak learning rate
    learning_rate: Positive = 1e-6
    # its course after warm-up
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    # steps over which it rises linearly from 0
    warmup_steps: CountOrZero = 0
    # largest global norm of the gradient; None: no clipping
    clip: Positive | None = 1.0
    # decoupled weight decay (adamw and adafactor)
    weight_decay: NonNegative = 0.0
    # decay of the first moment (adamw); None: 0.9
    b1: Fraction | None = None
    # decay of the second moment (adamw, rmsprop); None: 0.999 and 0.99
    b2: Fraction | None = None
    # added to the root of the second moment (adamw, rmsprop); None: 1e-8
    eps: Positive | None = None
    # how the first moment is kept between steps (adamw); second moments are float32 always, since
    # their steps of 1 - b2 are too small for bfloat16
    moments_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are laid out. The product of the axes is the number of devices."""

    # copies of the parameters
    data: Count = 1
    # shards of parameters, moments and rows; None: all devices that the other axes leave
    fsdp: Count | None = None
    # shards of heads, hidden units and vocabulary
    tensor: Count = 1
    # shards of each row's tokens, and beside those of fsdp of parameters and moments
    sequence: Count = 1


@dataclasses.dataclass(frozen=True)
class Samples:
    """Text sampled from the policy at each evaluation."""

    # held-out prompts that are continued; 0: none
    count: CountOrZero = 0
    # most tokens of a sample
    max_tokens: Count = 64
    # of the softmax; sequence-level KL is that of this distribution at 1 without top_k and top_p
    temperature: Positive = 1.0
    # only the k likeliest tokens; None: all
    top_k: Count | None = None
    # only the likeliest tokens that reach this probability together; None: all
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    # ground-truth reward of (prompt, completion), a function of the experiment file; None: not
    # computed
    reward: Callable[[str, str], float] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Which checkpoints are kept. The newest always is."""

    # the newest ones
    keep: Count = 1
    # the best ones by metric; 0: none
    keep_best: CountOrZero = 0
    # held-out metric that best means
    metric: str = "eval/loss"
    # whether the best is its smallest or its largest value
    best: Literal["smallest", "largest"] = "smallest"


@dataclasses.dataclass(frozen=True)
class Log:
    """Where metrics go beside metrics.jsonl, and a bar on the terminal."""

    # TensorBoard files in the run folder
    tensorboard: bool = True
    # wandb project; None: no wandb
    wandb_project: str | None = None
    # a progress bar on the terminal
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Profile:
    """A window of steps that the profiler traces into the run folder's profile/."""

    # first step that is traced; None: no trace
    start: CountOrZero | None = None
    # how many steps are traced
    steps: Count = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """The size of the built-in task; read where data.source or model.source is builtin."""

    # preset of the model that experiments/sft.py trains from scratch
    model: str = "reviews-1m"
    # reviews of the corpus
    reviews: Count = 30_000
    # prefixes from which preference pairs are made
    prefixes: Count = 5_000
    # prefixes kept apart for evaluation
    held_out_prefixes: Count = 256
    # completions sampled from the SFT model for each prefix
    completions: Annotated[int, Ge(2)] = 4
    # pairs taken of each prefix's completions, the widest gaps in reward first; None: all
    pairs_per_prefix: Count | None = 2
    # of the corpus, the SFT model and the sampled pairs
    seed: CountOrZero = 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run."""

    # the loss's hyperparameters
    loss: Loss
    # optimizer steps
    steps: Count
    # examples a step, over all devices and microbatches
    batch_size: Count = 64
    # positions a step instead, filled with as many examples as they hold; batch_size is then that
    # of evaluations and samples alone; None: batch_size examples a step
    batch_tokens: Count | None = None
    # examples are exchanged among the next few hundred steps until all have about equally many
    # tokens, so that shapes are full; False: a plain shuffle, which batch_tokens has anyway.
    # Evaluations are always balanced
    balance_steps: bool = True
    # parts of a step whose gradients are accumulated
    microbatches: Count = 1
    # over what a loss's batch statistics (KTO's KL) are taken when there are several microbatches
    statistics: Literal["global", "microbatch"] = "global"
    # of parameters, data order and sampling
    seed: CountOrZero = 0
    # folder of the run; None: runs/ and the experiment file's name
    workdir: str | None = None
    # steps between held-out evaluations, which also come at the end; None: at the end only
    evaluate_every: Count | None = None
    # steps between checkpoints; None: at the end only
    checkpoint_every: Count | None = None
    # which weights the policy starts from, and how they are computed with
    model: Model = Model()
    # a low-rank adapter, which alone is then trained
    lora: Lora = Lora()
    # which rows are read, and how they become token ids
    data: Data = Data()
    # the reference model of the log-ratios
    reference: Reference = Reference()
    # what optax applies to the gradient
    optimizer: Optimizer = Optimizer()
    # how the devices are laid out; the product of the axes is the number of devices
    mesh: Mesh = Mesh()
    # text sampled from the policy at each evaluation
    samples: Samples = Samples()
    # which checkpoints are kept; the newest always is
    checkpoint: Checkpoint = Checkpoint()
    # where metrics go beside metrics.jsonl, and a bar on the terminal
    log: Log = Log()
    # a window of steps that the profiler traces into the run folder's profile/
    profile: Profile = Profile()
    # the size of the built-in task; read where data.source or model.source is builtin
    task: Task = Task()

    def __post_init__(self):
        check_fields(self, "")

    def replace(self, **changes: Any) -> "Experiment":
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)


def loss_fields(function: Callable) -> dict[str, tuple[Any, Any]]:
    """Keyword-only parameters of a loss: name -> (annotation, default or Parameter.empty).

    An unannotated parameter is a float.
    """
    if not hasattr(function, "__name__"):
        raise ValueError(f"a loss must be a function with a name, and this is {function!r}")
    parameters = inspect.signature(function).parameters.values()
    if [p.kind for p in parameters][:3] != [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3:
        raise ValueError(
            f"loss {function.__name__} must begin with (policy, reference, batch, *, ...), "
            f"and it is {function.__name__}{inspect.signature(function)}"
        )
    hints = typing.get_type_hints(function, include_extras=True)
    keyword = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return {p.name: (hints.get(p.name, float), p.default) for p in keyword}


def check_fields(instance: Any, prefix: str = "") -> None:
    """Checks type and range of every field of a dataclass and those within; ValueError names it."""
    hints = typing.get_type_hints(type(instance), include_extras=True)
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        checks.check_value(value, hints[field.name], f"{prefix}{field.name}")
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{field.name}.")


def override(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """A copy with dotted fields changed: `override(experiment, {"loss.beta": 0.5, "seed": 1})`.

    Raises ValueError for an unknown name (with the nearest), a wrong type or a value out of range.
    """
    known = flatten(experiment)
    for name in changes:
        if name not in known:
            raise ValueError(f"there is no field {name!r}{checks.nearest(name, known)}")
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        (sections.setdefault(section, {}) if section else top)[field] = value
    if "loss" in sections:
        numbers = {**experiment.loss.hyperparameters, **sections.pop("loss")}
        top["loss"] = Loss(experiment.loss.function, **numbers)
    for section, fields in sections.items():
        top[section] = dataclasses.replace(getattr(experiment, section), **fields)
    return dataclasses.replace(experiment, **top)


def flatten(experiment: Experiment) -> dict[str, Any]:
    """Every field by its dotted name; the loss's function is not among them."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        if isinstance(value, Loss):
            flat |= {f"loss.{name}": number for name, number in value.hyperparameters.items()}
        elif dataclasses.is_dataclass(value):
            for part in dataclasses.fields(value):
                flat[f"{field.name}.{part.name}"] = getattr(value, part.name)
        else:
            flat[field.name] = value
    return flat


def grid(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of the values: `grid({"loss.beta": [0.1, 0.5], "seed": [0, 1]})` has four.

    Later names vary fastest. Raises ValueError where a name has no values.
    """
    for name, values in choices.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid: {name!r} is {values!r}; it must be a list, not empty")
    points = itertools.product(*choices.values())
    return [dict(zip(choices, point, strict=True)) for point in points]
