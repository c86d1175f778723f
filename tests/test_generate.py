import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import config, generate, sharding
from dpo_jax.model import decoder
from dpo_jax.model.attention import Ids
from dpo_jax.model.config import Kind
from tests import tiny

SMALL = dataclasses.replace(tiny.DECODER, tied_head=True)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2, 3]]
NO_EOS = SMALL.vocabulary_size

draw_params = functools.partial(tiny.draw_params, scale=0.3)


def complete(prompts, key=0, *, model=SMALL, select=generate.greedy, **options):
    arguments = {"max_tokens": 8, "stop_ids": [NO_EOS], "batch_size": 3, **options}
    return generate.complete(
        decoder.Decoder(model),
        draw_params(model),
        prompts,
        jax.random.key(key),
        select=select,
        **arguments,
    )


@functools.partial(jax.jit, static_argnums=0)
def last_logits(config, params, tokens, length):
    """Logits after the first `length` of tokens [1, T], by a forward over all of them."""
    position = jnp.arange(tokens.shape[1])[None]
    example = (position < length).astype(jnp.int32)
    ids = Ids(example, jnp.zeros_like(position), position)
    hidden = jnp.asarray(decoder.Decoder(config).apply({"params": params}, tokens, ids))
    return decoder.logits(hidden[0, length - 1], decoder.head(params, config))


@pytest.mark.parametrize("window", [None, 4])
def test_greedy_equals_the_argmax_of_full_forwards_for_uneven_prompts(window):
    model = dataclasses.replace(SMALL, block=(Kind(window=window),))
    params = draw_params(model)
    expected = []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(8):
            tokens = np.zeros((1, 16), np.int32)
            tokens[0, : len(row)] = row
            row.append(int(jnp.argmax(last_logits(model, params, tokens, len(row)))))
        expected.append(row[len(prompt) :])
    assert complete(PROMPTS, model=model) == expected
    assert len({tuple(row) for row in expected}) > 2


def test_tokens_are_chosen_by_biased_and_capped_logits():
    model = dataclasses.replace(SMALL, head_bias=True, logit_cap=2.0)
    seen = []

    def select(logits, keys, temperature):
        jax.debug.callback(lambda found: seen.append(np.asarray(found)), logits, ordered=True)
        return generate.greedy(logits, keys, temperature)

    complete([PROMPTS[2]], model=model, select=select, max_tokens=1, batch_size=1)
    tokens = np.array([PROMPTS[2]], np.int32)
    expected = last_logits(model, draw_params(model), tokens, len(PROMPTS[2]))
    np.testing.assert_allclose(seen[0][0], expected, rtol=1e-4, atol=1e-5)
    plain = dataclasses.replace(model, head_bias=False, logit_cap=None)
    assert np.abs(seen[0][0] - last_logits(plain, draw_params(plain), tokens, 7)).max() > 0.1


def test_a_row_ends_with_eos_and_its_batch_goes_on():
    free = complete(PROMPTS)
    eos_id = free[2][3]
    expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert {len(row) for row in expected} > {8} and len(expected[2]) <= 4
    assert complete(PROMPTS, stop_ids=[eos_id]) == expected


def run_generate(prompts, lengths, stop_ids, max_tokens=5):
    keys = jax.random.split(jax.random.key(0), len(lengths))
    run = jax.jit(generate.generate, static_argnames=("decoder", "select", "max_tokens"))
    return run(
        decoder.Decoder(SMALL),
        draw_params(SMALL),
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        keys,
        select=generate.greedy,
        max_tokens=max_tokens,
        temperature=1.0,
        stop_ids=jnp.asarray(stop_ids, jnp.int32),
    )


def test_after_eos_a_row_is_filled_and_an_empty_row_is_not_continued():
    prompts = [[1, 2, 0], [5, 6, 7], [0, 0, 0]]
    free, lengths = run_generate(prompts, [2, 3, 0], [NO_EOS])
    np.testing.assert_array_equal(lengths, [5, 5, 0])
    np.testing.assert_array_equal(free[2], NO_EOS)
    eos_id = int(free[0, 1])
    first = [int(np.argmax(np.asarray(row) == eos_id)) if eos_id in row else 4 for row in free[:2]]
    tokens, lengths = run_generate(prompts, [2, 3, 0], [eos_id, NO_EOS])
    np.testing.assert_array_equal(lengths, [first[0] + 1, first[1] + 1, 0])
    assert lengths[0] < 5
    for row in range(2):
        np.testing.assert_array_equal(tokens[row, : lengths[row]], free[row, : lengths[row]])
        np.testing.assert_array_equal(tokens[row, lengths[row] :], eos_id)


def test_sampling_stops_when_all_rows_have_ended():
    steps = []

    def end_at_once(logits, keys, temperature):
        jax.debug.callback(lambda: steps.append(1))
        return jnp.full(logits.shape[:1], 0, jnp.int32)

    assert complete([[1], [2]], select=end_at_once, stop_ids=[0], batch_size=4) == [[0], [0]]
    jax.effects_barrier()
    assert len(steps) == 1


LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05], np.float32))


def frequencies(select, temperature=1.0, logits=LOGITS, draws=20_000):
    keys = jax.random.split(jax.random.key(5), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (draws, len(logits)))
    tokens = jax.jit(select)(rows, keys, temperature)
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (2, None, [0, 2]),
        (1, None, [0]),
        (99, None, [0, 1, 2, 3, 4]),
        (None, 0.65, [0, 2]),
        (None, 0.75, [0, 2, 3]),
        (None, 0.01, [0]),
        (None, 1.0, [0, 1, 2, 3, 4]),
        # among the best three, 0.4 and 0.3 are 7/9
        (3, 0.75, [0, 2]),
    ],
)
def test_samples_stay_in_the_set_and_have_its_renormalised_probabilities(top_k, top_p, kept):
    expected = np.zeros(5)
    expected[kept] = np.exp(LOGITS[kept])
    expected /= expected.sum()
    observed = frequencies(generate.make_sampler(top_k, top_p))
    assert set(np.flatnonzero(observed)) == set(kept)
    # five deviations of a binomial share
    np.testing.assert_allclose(observed, expected, atol=5 * (0.25 / 20_000) ** 0.5)


def test_ties_let_in_no_more_than_top_k():
    observed = frequencies(generate.make_sampler(2), logits=np.zeros(5, np.float32))
    assert np.count_nonzero(observed) == 2


def test_temperature_divides_the_logits():
    for temperature in (0.5, 2.0):
        expected = np.exp(LOGITS / temperature)
        observed = frequencies(generate.make_sampler(), temperature)
        np.testing.assert_allclose(observed, expected / expected.sum(), atol=0.018)


def test_samples_depend_on_the_key_and_the_prompt_and_not_on_the_batch():
    sampler = generate.make_sampler()
    prompts = PROMPTS[:3] + PROMPTS[:1]
    samples = complete(prompts, select=sampler, batch_size=4)
    assert samples[0] != samples[3]
    assert complete(prompts, select=sampler, batch_size=2) == samples
    assert complete(prompts, 1, select=sampler, batch_size=4) != samples


def test_a_second_call_compiles_nothing_whatever_the_temperature():
    traced = []

    def select(logits, keys, temperature):
        traced.append(1)
        return generate.greedy(logits, keys, temperature)

    complete(PROMPTS, select=select)
    count = len(traced)
    complete(PROMPTS[:2], select=select, temperature=0.3)
    assert len(traced) == count
    assert generate.make_sampler(3, 0.9) is generate.make_sampler(3, 0.9)


def test_a_row_ends_with_whichever_of_several_stop_tokens_comes_first():
    free = complete(PROMPTS)
    stops = [free[2][3], free[0][1]]
    expected = []
    for row in free:
        places = [place for place, token in enumerate(row) if token in stops]
        expected.append(row[: places[0] + 1] if places else row)
    assert {row[-1] for row in expected} >= set(stops)
    assert complete(PROMPTS, stop_ids=stops) == complete(PROMPTS, stop_ids=stops[::-1]) == expected


def test_the_first_stop_token_fills_a_row_that_another_has_ended():
    free, _ = run_generate([[1, 2, 0]], [2], [NO_EOS])
    tokens, lengths = run_generate([[1, 2, 0]], [2], [NO_EOS, int(free[0, 0])])
    assert lengths.tolist() == [1]
    assert tokens.tolist() == [[int(free[0, 0]), *[NO_EOS] * 4]]


def test_other_stop_tokens_as_many_compile_nothing():
    traced = []

    def select(logits, keys, temperature):
        traced.append(1)
        return generate.greedy(logits, keys, temperature)

    free = complete(PROMPTS, select=select, stop_ids=[NO_EOS, NO_EOS])
    count = len(traced)
    stopped = complete(PROMPTS, select=select, stop_ids=[free[0][0], free[1][0]])
    assert [len(row) for row in stopped[:2]] == [1, 1]
    assert len(traced) == count


def test_rows_over_a_mesh_give_the_same_tokens():
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, sequence=2, tensor=2), jax.devices()[:8])
    params = draw_params(SMALL)
    placed = jax.device_put(params, sharding.parameters(params, mesh))
    sampled = generate.complete(
        decoder.Decoder(SMALL),
        placed,
        PROMPTS,
        jax.random.key(0),
        select=generate.greedy,
        max_tokens=8,
        stop_ids=[NO_EOS],
        batch_size=3,
        mesh=mesh,
    )
    assert sampled == complete(PROMPTS)


def test_no_prompts_have_no_completions():
    assert complete([]) == []


def test_what_cannot_be_sampled_is_an_error():
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        complete([[1], []])
    with pytest.raises(ValueError, match="prompt 0 has 57 tokens.*64 positions continues 1 to 56"):
        complete([[1] * 57])
    with pytest.raises(ValueError, match="prompt 0 has token ids 1 to 40.*0 to 39"):
        complete([[1, 40]])
    with pytest.raises(ValueError, match="temperature is 0"):
        complete([[1]], temperature=0)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        complete([[1]], max_tokens=0)
    with pytest.raises(ValueError, match="stop_ids is empty"):
        complete([[1]], stop_ids=[])
    with pytest.raises(ValueError, match="top_k is 0"):
        generate.make_sampler(0)
    with pytest.raises(ValueError, match="top_p is 1.5"):
        generate.make_sampler(None, 1.5)
