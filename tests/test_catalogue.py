"""The page of the losses: current, complete, and loud about docstrings that lack something."""

import inspect
import re
from pathlib import Path
from typing import Annotated, Any

import annotated_types
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import catalogue, config, contract, loss_curves, loss_figures, losses

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = [loss.__name__ for loss in catalogue.losses_of(losses)]


@pytest.fixture(scope="module")
def page() -> str:
    return catalogue.page(losses)


def loss_with(docstring: str | None):
    """A loss of this docstring."""

    def made(policy, reference, batch, *, beta: losses.Positive = 0.1):
        return -beta * losses.log_ratio(policy, reference, "chosen"), {}

    made.__doc__ = docstring
    return made


def test_the_page_of_the_losses_is_current(page):
    message = f"docs/losses.md is not what the docstrings say: run {catalogue.COMMAND}"
    assert (DOCS / "losses.md").read_text() == page, message


def test_every_public_loss_has_one_row_and_nothing_else_has(page):
    rows = re.findall(r"^\| \*\*`(\w+)`\*\*<br>.*https://", page, re.MULTILINE)
    public = [
        name
        for name, function in vars(losses).items()
        if inspect.isfunction(function)
        and list(inspect.signature(function).parameters)[:3] == ["policy", "reference", "batch"]
    ]
    assert sorted(rows) == sorted(public)
    assert {"dpo", "ipo", "kto", "orpo"} < set(rows)


def test_rows_have_as_many_cells_as_their_tables_head(page):
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in page.splitlines() if line[:1] == "|"]
    assert {7, 4, 3} == set(cells)


def test_losses_stand_under_the_comments_of_their_module():
    groups = catalogue.sections(inspect.getsource(losses))
    assert "dpo" in groups["Losses of pairs with a reference"]
    assert "kto" in groups["Losses of single, labelled completions with a reference"]
    assert not any("a log-ratio" in title for title in groups)  # a comment of the line below it


@pytest.mark.parametrize("name", NAMES)
def test_ranges_and_defaults_shown_are_those_of_the_signature(name, page):
    row = next(line for line in page.splitlines() if line.startswith(f"| **`{name}`**"))
    cell = re.split(r"(?<!\\)\|", row)[3]
    found = re.findall(r"`(\w+)` (\S+) \((.*?)\)(?:<br>| $)", cell)
    fields = config.loss_fields(getattr(losses, name))
    assert [name for name, _, _ in found] == list(fields)
    for (_, default, words), (annotation, value) in zip(found, fields.values(), strict=True):
        assert limits_in_words(words.replace("\\", "")) == limits_of(annotation)
        if value is inspect.Parameter.empty:
            assert default == "required"
        else:
            assert default == "`reverse_kl`" if callable(value) else float(default) == value


def limits_of(annotation: Any) -> dict[str, float]:
    """The bounds in an annotation's metadata, by their signs."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = {}
    for part in getattr(annotation, "__metadata__", ()):
        for field, sign in signs.items():
            bound = getattr(part, field, None)
            if bound is not None:
                found[sign] = float(bound)
    return found


def limits_in_words(words: str) -> dict[str, float]:
    """The bounds in '>= 0 and < 0.5'."""
    if words in ("any", "function"):
        return {}
    return {sign: float(bound) for sign, bound in (part.split() for part in words.split(" and "))}


def test_ranges_read_as_words():
    assert catalogue.range_of(float) == "any"
    assert catalogue.range_of(losses.Score) == "function"
    both = Annotated[float, annotated_types.Interval(gt=0, le=0.25)]
    assert catalogue.range_of(both) == "> 0 and <= 0.25"


def test_a_docstring_is_taken_apart():
    entry = catalogue.describe(
        loss_with(
            """-b r_w. Eq. 3 of https://arxiv.org/abs/2305.18290,
            b its tau.

            Small. d is not Eq. 4 of anything. Default: the
            paper's. Agrees with TRL (x.y). TRL 9 differs.

            beta: its scale, in
                1 / nats
            """
        )
    )
    assert entry.formula == "-b r_w"
    assert entry.source == "Eq. 3 of https://arxiv.org/abs/2305.18290, b its tau"
    assert entry.notes == "Small. d is not Eq. 4 of anything."
    assert entry.agreement == "Default: the paper's. Agrees with TRL (x.y). TRL 9 differs."
    assert entry.hyperparameters == (
        catalogue.Hyperparameter("beta", "0.1", "> 0", "its scale, in 1 / nats"),
    )


WHOLE = "-b r_w. https://arxiv.org/abs/2305.18290.\n\nbeta: its scale."


@pytest.mark.parametrize(
    ("docstring", "missing"),
    [
        ("-b r_w. By X.\n\nSee https://arxiv.org/abs/1.\n\nbeta: its scale.", "made has no link"),
        ("https://arxiv.org/abs/2305.18290.\n\nbeta: its scale.", "made has no formula"),
        ("The best. https://arxiv.org/abs/2305.18290.\n\nbeta: its scale.", "made has no formula"),
        (None, "made has no formula"),
        (WHOLE.partition("\n")[0], "made does not describe its hyperparameter 'beta'"),
        (WHOLE.removesuffix("its scale."), "made does not describe its hyperparameter 'beta'"),
        (WHOLE + "\ngamma: nothing.", "made describes 'gamma', which it lacks"),
        (WHOLE + "\nbeta: its scale.", "made describes 'beta' twice"),
    ],
)
def test_a_loss_that_lacks_something_is_named_with_what_it_lacks(docstring, missing):
    with pytest.raises(ValueError, match=re.escape(missing)):
        catalogue.describe(loss_with(docstring))
    catalogue.describe(loss_with(WHOLE))


def test_a_loss_without_a_shown_value_is_named():
    def made(policy, reference, batch, *, alpha: float):
        return alpha * policy["chosen"].total, {}

    with pytest.raises(ValueError, match="made has no default for alpha"):
        loss_curves.reads(made)


def test_a_loss_that_reads_something_unknown_is_named():
    def made(policy, reference, batch):
        return policy["fourth"].total, {}

    with pytest.raises(ValueError, match="loss made reads 'fourth'"):
        loss_curves.reads(made)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *(("dpo", "sum"), ("ipo_sum", "sum"), ("ld_dpo", "sum"), ("kto", "sum")),
        *(("ipo", "mean"), ("simpo", "mean"), ("orpo_prompt", "mean"), ("sft", "mean")),
        *(("cpo", "sum and mean"), ("r_dpo", "sum, and lengths")),
    ],
)
def test_sums_and_means_are_told_apart(name, tokens):
    assert loss_curves.reads(getattr(losses, name)).tokens == tokens


def test_what_a_loss_reads_is_seen():
    read = loss_curves.reads(losses.bco_weighted)
    assert read[:3] == (("completion",), True, ("density_ratio", "desirable"))
    assert loss_curves.reads(losses.tpo)[:3] == (("chosen", "rejected", "gold"), False, ())


def test_declarations_are_shown():
    assert list(catalogue.declared(contract.needs(losses.dpo))) == []
    assert list(catalogue.declared(contract.needs(losses.bco))) == ["batch", "state"]
    assert list(catalogue.declared(contract.needs(losses.kto))) == ["batch", "advice"]
    assert list(catalogue.declared(contract.needs(losses.orpo_prompt))) == ["prompt"]
    both = ["`head` of policy and reference"]
    assert list(catalogue.declared(contract.needs(losses.ld_dpo))) == both
    assert list(catalogue.declared(contract.needs(losses.ld_dpo_policy))) == ["`head` of policy"]


def central(values: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Central differences at all but the first and the last margin."""
    return (values[2:].astype(np.float64) - values[:-2]) / (margin[2:] - margin[:-2])


@pytest.mark.parametrize("name", ["dpo", "orpo", "sppo_hard", "apo_down"])
def test_the_slope_of_a_curve_is_that_of_central_differences(name):
    curve = loss_curves.pair_curve(getattr(losses, name), loss_curves.margins())
    expected = central(curve.loss, curve.margin)
    np.testing.assert_allclose(
        curve.slope[1:-1], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
    )


def test_the_slopes_of_labelled_completions_are_those_of_central_differences():
    for curve in loss_curves.unpaired_curves(losses.kto, loss_curves.margins()):
        expected = central(curve.loss, curve.margin)
        np.testing.assert_allclose(curve.slope[1:-1], expected, rtol=1e-3, atol=2e-5)


def test_dpo_s_curve_is_the_logistic_one():
    margin = np.array([-40.0, 0.0, 10.0])
    curve = loss_curves.pair_curve(losses.dpo, margin)
    np.testing.assert_allclose(curve.loss, np.log1p(np.exp(-0.1 * margin)), rtol=1e-6)
    np.testing.assert_allclose(curve.slope, -0.1 / (1 + np.exp(0.1 * margin)), rtol=1e-6)


def test_running_baselines_are_nought_in_the_curves():
    good, bad = loss_curves.unpaired_curves(losses.bco, loss_curves.margins())
    np.testing.assert_allclose(good.loss, np.log1p(np.exp(-0.1 * good.margin)), rtol=1e-5)
    np.testing.assert_allclose(bad.loss, good.loss[::-1], rtol=1e-5)


def test_every_loss_is_in_a_picture_or_said_not_to_be(page):
    absent = page.rpartition("Not drawn")[2]
    for loss in catalogue.losses_of(losses):
        place = catalogue.drawn_in(loss, loss_curves.reads(loss))
        assert (place is None) == (f"`{loss.__name__}`" in absent)
        assert place is None or (DOCS / f"losses/{place}.png").is_file()
    for name in re.findall(r"\]\((losses/\w+\.png)\)", page):
        assert (DOCS / name).read_bytes()[:4] == b"\x89PNG"


def test_the_pictures_are_small():
    assert sum(path.stat().st_size for path in DOCS.glob("losses/*.png")) < 400_000


def test_losses_with_the_same_curve_share_a_panel():
    panels = loss_figures.pair_panels([losses.dpo, losses.ipo, losses.ld_dpo])
    assert [panel.names for panel in panels] == [("dpo", "ld_dpo"), ("ipo",)]
    assert loss_figures.title(("dpo", "r_dpo", "a_loss_of_a_long_name")) == (
        "dpo, r_dpo (alpha 0.05),\na_loss_of_a_long_name"
    )


def test_a_panel_leaves_out_what_is_far_off():
    margin = np.linspace(-4, 4, 5)
    assert loss_figures.limits(np.array([[1000.0, 2, 1, 0, 0]]), margin) == (-0.12, 2.12)
    assert loss_figures.limits(np.array([[10.0, 5, 1, 0, 0]]), margin) == pytest.approx(
        (-0.6, 10.6)
    )


def test_markdown_reads_as_the_docstring_does():
    assert catalogue.prose("a*b < `c*d`") == r"a\*b \< `c*d`"
    assert catalogue.mathematics("p | x") == "`p | x`"
    assert catalogue.table(["a"], [["`p | x`"]]).endswith("\n| `p \\| x` |")
    assert catalogue.prose("see https://arxiv.org/abs/2305.18290, too") == (
        "see [arXiv 2305.18290](https://arxiv.org/abs/2305.18290), too"
    )


def test_what_is_written_is_current_until_it_is_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "page", lambda module: "# A page\n")
    monkeypatch.setattr(catalogue, "pictures", lambda module: {"pairs": b"a picture"})
    assert not catalogue.is_current(losses, tmp_path)
    written = catalogue.write(losses, tmp_path)
    assert written == [tmp_path / "losses.md", tmp_path / "losses" / "pairs.png"]
    assert catalogue.is_current(losses, tmp_path)
    (tmp_path / "losses.md").write_text("# Another page\n")
    assert not catalogue.is_current(losses, tmp_path)


def test_the_pictures_can_be_drawn():
    drawn = loss_figures.without_reference([losses.simpo, losses.orpo])
    legend = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert legend == ["loss", "slope: d loss / d margin"]
    assert [axis.get_title() for axis in drawn.axes] == ["simpo", "", "orpo", ""]
    assert all("nats" in axis.get_xlabel() for axis in drawn.axes[1::2])
    assert loss_figures.png(drawn)[:4] == b"\x89PNG"


def test_scores_are_functions_of_a_log_ratio():
    groups = catalogue.sections(inspect.getsource(losses))
    scores = catalogue.scores_of(losses, groups)
    assert list(scores) == ["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence"]
    assert all(scores[n](jnp.zeros(1), **catalogue.SCORES.get(n, {})) == 0 for n in scores)
