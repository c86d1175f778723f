"""The dataclasses of a run: checks, overrides, grids."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt, Interval

from dpo_jax import checks, config


def loss(policy, reference, batch, *, beta: config.Positive = 0.1, tau: config.Fraction):
    return policy, {}


def plain(policy, reference, batch, *, gamma=2.0):
    return policy, {}


def experiment(**changes: Any) -> config.Experiment:
    return config.Experiment(**{"loss": config.Loss(loss, tau=0.5), "steps": 10, **changes})


def wrong(value: Any) -> Any:
    return value


def test_loss_takes_its_fields_from_the_signature_and_fills_in_defaults():
    assert config.Loss(loss, tau=1).hyperparameters == {"beta": 0.1, "tau": 1.0}
    assert isinstance(config.Loss(loss, tau=1).hyperparameters["tau"], float)
    assert config.Loss(plain).hyperparameters == {"gamma": 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tau": 0.5, "betta": 1.0},
            "loss has no hyperparameter 'betta'; did you mean 'beta'",
        ),
        ({"beta": 1.0}, r"loss loss needs a value for 'tau': Loss\(loss, tau=\.\.\.\)"),
        ({"tau": 1.5}, r"loss.tau is 1.5; it must be .*<= 1"),
        ({"tau": 0.5, "beta": 0.0}, r"loss.beta is 0.0; it must be > 0"),
        ({"tau": "x"}, r"loss.tau is 'x'; it must be of type float"),
        ({"tau": True}, r"loss.tau is True; it must be of type float"),
        ({"tau": math.nan}, r"loss.tau is nan; it must be finite"),
    ],
)
def test_loss_refuses_wrong_hyperparameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        config.Loss(loss, **arguments)


def test_loss_refuses_a_function_that_does_not_take_policy_reference_and_batch():
    def other(margin, *, beta=0.1):
        return margin

    with pytest.raises(ValueError, match="must begin with .policy, reference, batch"):
        config.Loss(other)


def test_losses_are_equal_when_function_and_numbers_are():
    assert config.Loss(loss, tau=0.5) == config.Loss(loss, tau=0.5, beta=0.1)
    assert hash(config.Loss(loss, tau=0.5)) == hash(config.Loss(loss, tau=0.5, beta=0.1))
    assert config.Loss(loss, tau=0.5) != config.Loss(loss, tau=0.6)
    assert repr(config.Loss(loss, tau=0.5)) == "Loss(loss, beta=0.1, tau=0.5)"


def test_a_run_and_its_loss_cannot_be_changed_in_place():
    run = experiment()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.loss.function = plain
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(run, wrong("steps"), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be >= 1"),
        ({"steps": 1.0}, "steps is 1.0; it must be of type int"),
        ({"steps": True}, "steps is True; it must be of type int"),
        ({"evaluate_every": 0}, "evaluate_every is 0; it must be >= 1"),
        ({"loss": loss}, "loss is <function loss.*; it must be of type Loss"),
        ({"model": "builtin"}, "model is 'builtin'; it must be of type Model"),
        ({"optimizer": config.Optimizer(learning_rate=0)}, "optimizer.learning_rate is 0.*> 0"),
        (
            {"data": config.Data(label_noise=1.5)},
            "data.label_noise is 1.5; it must be >= 0 and <= 1",
        ),
        (
            {"data": config.Data(over_length=wrong("trim"))},
            "data.over_length is 'trim'; it must be one of 'cut', 'drop', 'error'",
        ),
        (
            {"samples": config.Samples(reward=wrong(3))},
            "samples.reward is 3; it must be of type function",
        ),
    ],
)
def test_experiment_refuses_wrong_values_and_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(**changes)


def test_override_changes_dotted_fields_and_nothing_else():
    before = experiment(optimizer=config.Optimizer(clip=3.0))
    after = config.override(before, {"loss.beta": 0.5, "seed": 1, "optimizer.learning_rate": 1e-3})
    assert after.loss.hyperparameters == {"beta": 0.5, "tau": 0.5}
    assert (after.seed, after.steps) == (1, 10)
    assert after.optimizer == config.Optimizer(clip=3.0, learning_rate=1e-3)
    assert before.loss.hyperparameters["beta"] == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss.betta", "no field 'loss.betta'; did you mean 'loss.beta'"),
        ("optimiser.learning_rate", "did you mean 'optimizer.learning_rate'"),
        ("loss", "there is no field 'loss'"),
    ],
)
def test_override_names_the_nearest_field(name, message):
    with pytest.raises(ValueError, match=message):
        config.override(experiment(), {name: 1.0})


def test_override_checks_ranges():
    with pytest.raises(ValueError, match="loss.beta is -1.0; it must be > 0"):
        config.override(experiment(), {"loss.beta": -1.0})


def test_grid_is_the_product_and_later_names_vary_fastest():
    assert config.grid({"loss.beta": [0.1, 0.5], "seed": [0, 1]}) == [
        {"loss.beta": 0.1, "seed": 0},
        {"loss.beta": 0.1, "seed": 1},
        {"loss.beta": 0.5, "seed": 0},
        {"loss.beta": 0.5, "seed": 1},
    ]


@pytest.mark.parametrize("values", [[], "adamw", 3])
def test_grid_refuses_anything_but_lists_with_values(values):
    with pytest.raises(ValueError, match="grid: 'seed' is"):
        config.grid({"loss.beta": [0.1], "seed": values})


def test_flatten_lists_every_field_once_by_its_dotted_name():
    flat = config.flatten(experiment())
    assert flat["loss.tau"] == 0.5
    assert flat["optimizer.clip"] == 1.0
    assert flat["steps"] == 10
    sections = [config.Model, config.Data, config.Reference, config.Optimizer, config.Mesh]
    sections += [config.Samples, config.Checkpoint, config.Log, config.Profile, config.Task]
    sections += [config.Lora]
    inner = sum(len(dataclasses.fields(section)) for section in sections)
    outer = len(dataclasses.fields(config.Experiment)) - len(sections) - 1
    assert len(flat) == inner + outer + len(["loss.beta", "loss.tau"])


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (float, "float"),
        (Annotated[float, Gt(0)], "float, > 0"),
        (Annotated[float, Interval(ge=0, le=1)], "float, >= 0 and <= 1"),
        (Literal["a", "b"] | None, "one of 'a', 'b' or None"),
        (int | None, "int or None"),
    ],
)
def test_allowed_says_in_words_what_an_annotation_allows(annotation, words):
    assert checks.allowed(annotation) == words


def test_a_union_of_types_takes_any_of_them_and_names_all_in_its_error():
    assert checks.check_value("all", int | str, "x") == "all"
    assert checks.check_value(2, int | str, "x") == 2
    with pytest.raises(ValueError, match=r"x is 1\.5; it must be int or str"):
        checks.check_value(1.5, int | str, "x")


def test_nearest_lists_all_names_when_none_is_near():
    assert checks.nearest("zzz", ["beta", "tau"]) == "; there are: 'beta', 'tau'"
    assert checks.nearest("zzz", []) == "; there are: none"
