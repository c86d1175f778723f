import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.model import attention
from dpo_jax.model.attention import Ids

# [P P a a b | P a | pad]: one example with two completions, one with one
ROW = Ids(
    example=np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32),
    branch=np.array([[0, 0, 1, 1, 2, 0, 1, 0]], np.int32),
    position=np.array([[0, 1, 2, 3, 2, 0, 1, 0]], np.int32),
)
SEEN = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)


def draw(*, heads: int, key_value_heads: int, head_dim: int = 8) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    length = SEEN.shape[0]
    shapes = [(1, length, count, head_dim) for count in (heads, key_value_heads, key_value_heads)]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def attend_by_loops(query, key, value, seen, scale):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    out = np.zeros_like(query)
    groups = query.shape[2] // key.shape[2]
    for i in range(query.shape[1]):
        for h in range(query.shape[2]):
            allowed = [j for j in range(key.shape[1]) if seen[i, j]]
            if allowed:
                logits = np.array(
                    [scale * query[0, i, h] @ key[0, j, h // groups] for j in allowed]
                )
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                out[0, i, h] = sum(
                    w * value[0, j, h // groups] for w, j in zip(weights, allowed, strict=True)
                )
    return out


def test_a_token_sees_its_prompt_and_its_own_branch_up_to_itself():
    np.testing.assert_array_equal(attention.visible(ROW, ROW, None)[0], SEEN)


def test_a_window_counts_positions_and_not_indices():
    # Branch b follows the prompt at position 2, though two slots of branch a lie between.
    expected = SEEN.copy()
    expected[2, 0] = expected[3, 0] = expected[3, 1] = expected[4, 0] = False
    np.testing.assert_array_equal(attention.visible(ROW, ROW, 2)[0], expected)


def test_queries_and_keys_may_be_of_different_lengths():
    last = Ids(*(array[:, 4:5] for array in ROW))
    np.testing.assert_array_equal(attention.visible(last, ROW, None)[0], SEEN[4:5])


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_attend_equals_loops_in_float64_for_grouped_heads(key_value_heads):
    query, key, value = draw(heads=4, key_value_heads=key_value_heads)
    mixed = attention.attend(query, key, value, ROW, ROW, scale=0.3)
    expected = attend_by_loops(query, key, value, SEEN, 0.3)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def test_attend_with_a_window_equals_loops_in_float64():
    query, key, value = draw(heads=4, key_value_heads=2)
    mixed = attention.attend(query, key, value, ROW, ROW, scale=0.3, window=2)
    seen = np.asarray(attention.visible(ROW, ROW, 2)[0])
    expected = attend_by_loops(query, key, value, seen, 0.3)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)


def self_attend(arrays: tuple[jax.Array, ...]) -> jax.Array:
    query, key, value = arrays
    return attention.attend(query, key, value, ROW, ROW, scale=1.0)


def test_padding_gives_zeros_and_zero_gradients():
    query, key, value = draw(heads=4, key_value_heads=2)

    def padding_sum(arrays):
        return jnp.sum(self_attend(arrays)[:, -1])

    total, gradients = jax.value_and_grad(padding_sum)((query, key, value))
    assert total == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_gradients_are_finite_and_pass_by_padding():
    query, key, value = draw(heads=4, key_value_heads=2)

    def square_sum(arrays):
        return jnp.sum(jnp.square(self_attend(arrays)))

    with jax.debug_nans(True):
        gradients = jax.grad(square_sum)((query, key, value))
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[:, 1:5]).max() > 0
        np.testing.assert_array_equal(gradient[:, -1], 0)


def test_bfloat16_stays_bfloat16_and_its_softmax_is_float32():
    query, key, value = (a.astype(jnp.bfloat16) for a in draw(heads=4, key_value_heads=2))
    mixed = attention.attend(query, key, value, ROW, ROW, scale=0.3)
    assert mixed.dtype == jnp.bfloat16
    expected = attend_by_loops(query, key, value, SEEN, 0.3)
    np.testing.assert_allclose(np.asarray(mixed, np.float64), expected, rtol=2e-2, atol=1e-2)
