"""Seconds a step over the length and number of examples."""

import numpy as np
import pytest

from dpo_jax import benchmark_scaling, figures
from tests import tiny


def test_the_slope_is_the_exponent_of_a_power_law():
    points = [{"seconds": 3.0 * tokens**1.5, "tokens": tokens} for tokens in (10.0, 20.0, 70.0)]
    assert benchmark_scaling.slope(points, "tokens") == pytest.approx(1.5)
    assert benchmark_scaling.slope(points[:1], "tokens") is None


def test_a_longer_example_has_the_mean_shares_of_the_others():
    found = benchmark_scaling.share_out(np.array([[4, 1, 1], [6, 3, 1]]), 1001)
    # 10, 4 and 2 of 16; what is left goes to the prompt
    assert found.tolist() == [626, 250, 125]


def test_drawn_lengths_are_a_function_of_the_seed():
    one, same, other = (benchmark_scaling.draw_lengths(50, seed) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert one.shape == (50, 3) and one.min() >= 4


def test_examples_have_the_lengths_that_they_are_made_with():
    lengths = np.array([[3, 1, 2], [5, 4, 6]])
    data = benchmark_scaling.make_examples(lengths, 40, 0)
    np.testing.assert_array_equal(benchmark_scaling.lengths_of(data), lengths)
    assert len(data.tokens) == 21 and data.tokens.max() < 40


@pytest.mark.slow
def test_both_series_are_timed_and_drawn(folder, tmp_path):
    run = tiny.experiment(folder, tmp_path, **{"data.evaluation_source": None})
    run = run.replace(evaluate_every=None)
    sizes = benchmark_scaling.Sizes(lengths=(64, 256), examples=(8, 16), rounds=1, steps=1)
    record = benchmark_scaling.run(sizes, run)
    short, long = record["series"]["length"]
    assert (short["tokens"], long["tokens"]) == (64, 256)
    # four times the tokens, and more than that of pairs of tokens
    assert 4 < long["floor"] / short["floor"] < 16
    assert all(
        point["flops"] > point["floor"] and point["seconds"] > 0
        for points in record["series"].values()
        for point in points
    )
    assert "floor's GFLOP/s" in benchmark_scaling.describe(record)
    assert figures.png(benchmark_scaling.draw(record)).startswith(b"\x89PNG")
