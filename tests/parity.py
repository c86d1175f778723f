"""TRL's trainers beside our losses, on the same log-probabilities or logits.

The trainers are real, and so are their tokenisation, collation and metrics. Played are only the
models: by tables of log-probabilities where a trainer reads those, else by a backbone whose hidden
states are the logits. TRL computes in float64 where it can and we in float32, so that the
tolerance is ours alone.

Dimensions: N examples, R rows (chosen, then rejected, then gold), L tokens, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logps, losses
from dpo_jax.model import decoder

RELATIVE = 1e-5
# both in float64, but TRL's exo_pair holds its epsilon in float32
EXACT = 1e-7
# below this TRL's 1 - sigmoid has no digits left, in float64 even
SMALLEST = 1e-14
# float32's derivative of a sigmoid has none left below this share of the largest, in TRL too
RESOLUTION = 1e-6

PAD, EOS, VOCABULARY = 38, 39, 40
MODULES = {
    "DPO": "trl",
    "KTO": "trl",
    "CPO": "trl.experimental.cpo",
    "ORPO": "trl.experimental.orpo",
    "TPO": "trl.experimental.tpo",
    "OnlineDPO": "trl.experimental.online_dpo",
}
PAIR = ("chosen", "rejected")
TRIPLE = (*PAIR, "gold")

Loss = Callable[..., losses.Losses]
Completions = Mapping[str, logps.Logps]
Objective = Callable[[Completions, Completions, Mapping[str, jax.Array]], jax.Array]


def load(module: str) -> Any:
    return pytest.importorskip(module, reason="needs TRL: bash scripts/setup.sh test parity")


# TRL's side


@functools.cache
def tokenizer() -> Any:
    """A tokenizer whose tokens are words w0, w1, ..."""
    words = {f"w{i}": i for i in range(PAD)} | {"<pad>": PAD, "<eos>": EOS}
    tokenizers = load("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return load("transformers").PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )


def make_model() -> Any:
    """A model of transformers as wide as its vocabulary, so that an identity can be its head."""
    transformers = load("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=VOCABULARY,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def make_trainer(folder: Path, kind: str, examples: Sequence[Mapping[str, Any]], **options) -> Any:
    """A trainer of TRL over examples in words."""
    module, datasets = load(MODULES[kind]), load("datasets")
    datasets.disable_progress_bars()
    models = {"model": make_model()}
    if kind in ("DPO", "KTO", "OnlineDPO"):
        models["ref_model"] = make_model()
    if kind == "OnlineDPO":
        models["reward_funcs"] = options.pop("reward")
    return getattr(module, f"{kind}Trainer")(
        **models,
        args=getattr(module, f"{kind}Config")(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            activation_checkpointing=False,
            remove_unused_columns=False,
            per_device_train_batch_size=len(examples),
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(list(examples)),
        processing_class=tokenizer(),
    )


def draw_examples(
    count: int, names: Sequence[str], *, seed: int = 0, tokens: tuple[int, int] = (1, 7)
) -> list[dict[str, str]]:
    """Examples in words; every part but the prompt gets an EOS from TRL."""
    generator = np.random.default_rng(seed)

    def draw() -> str:
        drawn = generator.integers(0, PAD, generator.integers(tokens[0], tokens[1] + 1))
        return "".join(f" w{i}" for i in drawn)

    return [{name: draw() for name in ("prompt", *names)} for _ in range(count)]


class Rows(NamedTuple):
    """A batch as TRL collated it: which of the predicted tokens belong to what."""

    tokens: np.ndarray  # [R, L]
    completion: np.ndarray  # bool [R, L - 1]
    prompt: np.ndarray  # bool [R, L - 1]: the prompt's own, but for its first


def collate(trainer, examples: slice = slice(None)) -> dict[str, Any]:
    return trainer.data_collator([*trainer.train_dataset][examples])


def rows_of(batch: Mapping[str, Any], prefix: str = "") -> Rows:
    """Rows of a batch of DPO, KTO or TPO."""
    completion = batch[f"{prefix}completion_mask"].numpy() > 0
    there = batch[f"{prefix}attention_mask"].numpy() > 0
    tokens = batch[f"{prefix}input_ids"].numpy()
    return Rows(tokens, completion[:, 1:], (there & ~completion)[:, 1:])


def labelled_rows(trainer, batch: Mapping[str, Any]) -> Rows:
    """Rows of a batch of CPO or ORPO."""
    both = trainer.concatenated_inputs(batch, padding_value=PAD)
    completion = both["concatenated_labels"].numpy() != -100
    there = both["concatenated_attention_mask"].numpy() > 0
    tokens = both["concatenated_input_ids"].numpy()
    return Rows(tokens, completion[:, 1:], (there & ~completion)[:, 1:])


def play_tables(*tables: tuple[np.ndarray, Any]) -> Callable[..., Any]:
    """A model with TRL's fused head, by what it returns: each table [R, L - 1] answers tokens."""
    output = load("trl.trainer.utils").FusedCausalLMOutput

    def model(*, input_ids, labels, **_):
        values = next(v for tokens, v in tables if np.array_equal(tokens, input_ids.numpy()))
        values = values.masked_fill(labels[:, 1:] == -100, 0)
        zeros = values.detach() * 0
        return output(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    return model


def play_backbone(model, logits) -> None:
    """Makes the hidden states of a model of transformers the given logits [R, L, V]."""
    torch = load("torch")
    output = load("transformers.modeling_outputs").BaseModelOutputWithPast
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(VOCABULARY))
    model.lm_head.to(logits.dtype)
    model.model.forward = lambda *_, **__: output(last_hidden_state=logits)


class Drawn(NamedTuple):
    """Log-probabilities of tokens, float64 [R, L - 1]."""

    policy: np.ndarray
    reference: np.ndarray


def draw_tables(rows: Rows, ratios: np.ndarray, seed: int) -> Drawn:
    """Log-probabilities whose sums differ by about the ratios [R].

    Multiples of 2^-10, so that float32 sums them exactly in every order.
    """
    generator = np.random.default_rng(seed)
    shape = rows.completion.shape
    lengths = rows.completion.sum(1, keepdims=True)
    ratio = ratios[:, None] / lengths + generator.normal(size=shape, scale=0.3)
    base = -generator.uniform(0.05, 4.0, shape)

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.where(rows.completion, np.round(values * 1024) / 1024, 0.0)

    return Drawn(rounded(base + np.minimum(ratio, 0)), rounded(base - np.maximum(ratio, 0)))


def draw_logits(rows: Rows, seed: int, scale: float = 3.0, likely: float = 0.0) -> np.ndarray:
    """Logits [R, L, V] that float32 holds; `likely` is added to those of the tokens that follow."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(*rows.tokens.shape, VOCABULARY), scale=scale)
    logits[:, :-1] += likely * np.eye(VOCABULARY)[rows.tokens[:, 1:]]
    return logits.astype(np.float32).astype(np.float64)


class Found(NamedTuple):
    """A loss and its gradient."""

    loss: float
    gradient: np.ndarray


def leaf(values: np.ndarray, dtype: str = "float64") -> Any:
    torch = load("torch")
    return torch.tensor(values, dtype=getattr(torch, dtype), requires_grad=True)


def compute(trainer, model, batch, at) -> Found:
    """What TRL finds for a batch, and its gradient at the leaf."""
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradient, at.grad = at.grad.numpy(), None
    return Found(loss.item(), gradient)


def compute_pairs(trainer, batch, drawn: Drawn, dtype: str = "float64") -> Found:
    """What a DPO trainer finds for these tables, and its gradient in the policy's."""
    tokens = batch["input_ids"].numpy()
    policy = leaf(drawn.policy, dtype)
    trainer.ref_model = play_tables((tokens, leaf(drawn.reference, dtype).detach()))
    return compute(trainer, play_tables((tokens, policy)), batch, policy)


# Our side


def locate(rows: Rows, names: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Place of each token in its completion, and the tokens of the example's shortest one."""
    index = np.cumsum(rows.completion, axis=1) - 1
    lengths = rows.completion.sum(1).reshape(len(names), -1)
    shortest = np.tile(lengths.min(0), len(names))[:, None]
    return jnp.asarray(index), jnp.asarray(np.broadcast_to(shortest, index.shape))


def gather(
    names: Sequence[str], rows: Rows, values: Mapping[str, jax.Array]
) -> dict[str, logps.Logps]:
    """Completions by name from values of tokens [R, L - 1], of which logps.TOTAL is one."""
    by_row = {
        name: jnp.sum(jnp.where(rows.completion, tokens, 0.0), axis=1).reshape(len(names), -1)
        for name, tokens in values.items()
    }
    length = jnp.asarray(rows.completion.sum(1), jnp.int32).reshape(len(names), -1)
    totals = by_row.pop(logps.TOTAL)
    completions = {
        name: logps.Logps(totals[i], length[i], {key: sums[i] for key, sums in by_row.items()})
        for i, name in enumerate(names)
    }
    count = length.shape[1]
    completions["prompt"] = logps.Logps(
        jnp.sum(jnp.where(rows.prompt, values[logps.TOTAL], 0.0), axis=1)[:count],
        jnp.asarray(rows.prompt.sum(1), jnp.int32)[:count],
    )
    return completions


def gather_tables(names: Sequence[str], rows: Rows, tokens) -> dict[str, logps.Logps]:
    """Completions whose tokens have these log-probabilities [R, L - 1]; they have a head each."""
    tokens = jnp.asarray(tokens, float)  # float64 where that is enabled
    of_chunk = logps.Tokens(jnp.zeros((*tokens.shape, 1)), tokens, *locate(rows, names))
    return gather(names, rows, {logps.TOTAL: tokens, "head": losses.head(of_chunk)})


def gather_logits(names: Sequence[str], rows: Rows, logits: jax.Array) -> dict[str, logps.Logps]:
    """Completions of a model that has these logits [R, L, V]."""
    values = logps.token_values(
        logits[:, :-1],
        decoder.Head(jnp.eye(VOCABULARY)),
        jnp.asarray(rows.tokens[:, 1:]),
        locate(rows, names),
        {"excess": losses.excess},
    )
    return gather(names, rows, values)


def single(values: np.ndarray | jax.Array, length: int = 1) -> logps.Logps:
    return logps.Logps(jnp.asarray(values, jnp.float32), jnp.full(len(values), length))


def batch_of(count: int, **columns) -> dict[str, jax.Array]:
    return {"weight": jnp.ones(count), **columns}


def mean_of(loss: Loss) -> Objective:
    return lambda policy, reference, batch: jnp.mean(loss(policy, reference, batch)[0])


def find_tables(
    objective: Objective, rows: Rows, drawn: Drawn, names: Sequence[str] = PAIR
) -> Found:
    """Our objective, and its gradient in the policy's table."""

    def of(table: jax.Array) -> jax.Array:
        reference = gather_tables(names, rows, drawn.reference)
        batch = batch_of(len(rows.tokens) // len(names))
        return objective(gather_tables(names, rows, table), reference, batch)

    return differentiate(of, drawn.policy)


def differentiate(function: Callable[[jax.Array], jax.Array], at: np.ndarray) -> Found:
    value, gradient = jax.value_and_grad(function)(jnp.asarray(at, float))
    return Found(float(value), np.asarray(gradient))


def find_logits(
    objective: Objective,
    rows: Rows,
    logits: np.ndarray,
    names: Sequence[str] = PAIR,
    reference: np.ndarray | None = None,
) -> Found:
    """Our objective, and its gradient in the policy's logits; no reference: log-probability 0."""
    batch = batch_of(len(rows.tokens) // len(names))
    if reference is None:
        of_reference = gather(names, rows, {logps.TOTAL: jnp.zeros(rows.completion.shape)})
    else:
        of_reference = gather_logits(names, rows, jnp.asarray(reference, jnp.float32))

    def of(logits: jax.Array) -> jax.Array:
        return objective(gather_logits(names, rows, logits), of_reference, batch)

    return differentiate(of, logits)


def assert_equal(find: Callable[[], Found], trls: Found) -> None:
    """Ours is TRL's: in float32, and closer in float64 where TRL computed in that."""
    assert np.isfinite(trls.loss) and np.all(np.isfinite(trls.gradient))
    ours, largest = find(), np.abs(trls.gradient).max()
    np.testing.assert_allclose(ours.loss, trls.loss, rtol=RELATIVE)
    np.testing.assert_allclose(
        ours.gradient, trls.gradient, rtol=RELATIVE, atol=RESOLUTION * largest
    )
    if trls.gradient.dtype == np.float64:
        with jax.enable_x64(True):
            ours = find()
        np.testing.assert_allclose(ours.loss, trls.loss, rtol=EXACT)
        np.testing.assert_allclose(ours.gradient, trls.gradient, rtol=EXACT, atol=SMALLEST)


def assert_pairs_equal(
    loss: Loss, trainer, batch: Mapping[str, Any], drawn: Drawn, dtype: str = "float64"
) -> None:
    """A loss of pairs is what a DPO trainer finds for the same tables."""
    trls = compute_pairs(trainer, batch, drawn, dtype)
    assert_equal(lambda: find_tables(mean_of(loss), rows_of(batch), drawn), trls)


def assert_equal_in_logits(ours: Found, trls: Found) -> None:
    """A softmax's gradient loses digits where entries cancel: relative to the largest of them."""
    np.testing.assert_allclose(ours.loss, trls.loss, rtol=RELATIVE)
    largest = np.abs(trls.gradient).max()
    np.testing.assert_allclose(
        ours.gradient / largest, trls.gradient / largest, rtol=RELATIVE, atol=RELATIVE
    )


def assert_differ(ours: Found, trls: Found) -> None:
    assert abs(ours.loss - trls.loss) > 10 * RELATIVE * abs(trls.loss)
