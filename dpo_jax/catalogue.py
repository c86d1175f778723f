"""Docstrings and signatures of losses -> docs/losses.md and its pictures.

A loss's docstring is: its formula, a sentence; where it is from, with a link; a paragraph of notes,
of which those that begin with a word of AGREEMENT say whose defaults it has and with whom it
agrees; and a line `name: meaning` for each hyperparameter. Raises ValueError where one is missing.
"""

import ast
import functools
import inspect
import re
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax import checks, config, contract, loss_curves, loss_figures
from dpo_jax.loss_curves import Reads

COMMAND = "python -m scripts.losses"
PAGE = "losses.md"
PICTURES = "losses"
FIRST = ["policy", "reference", "batch"]
AGREEMENT = ("Agrees", "Default", "TRL", "No trainer")
LINK = re.compile(r"https://\S*[^\s.,;:)]")
NAMES = re.compile(r"(`[^`]*`)")
# what scores with a parameter are shown at
SCORES = {"alpha_divergence": {"alpha": 0.5}}


class Hyperparameter(NamedTuple):
    """One keyword of a loss: its default and its range as Markdown and words, its meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


class Entry(NamedTuple):
    """What the docstring and the signature of a loss say."""

    name: str
    formula: str
    source: str
    notes: str
    agreement: str
    hyperparameters: tuple[Hyperparameter, ...]


def losses_of(module: types.ModuleType) -> list[Callable]:
    """The public losses that a module defines, in its order."""
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction)]
    own = [f for f in functions if f.__module__ == module.__name__ and is_loss(f)]
    return sorted(own, key=lambda function: function.__code__.co_firstlineno)


def is_loss(function: Callable) -> bool:
    """Whether a function takes policy, reference and batch, and has a public name."""
    names = list(inspect.signature(function).parameters)
    return names[:3] == FIRST and not function.__name__.startswith("_")


def sections(source: str) -> dict[str, list[str]]:
    """The functions of a source under the comments that stand alone above them, by their text."""
    titles = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(iter(source.splitlines(True)).__next__):
        line, column = token.start
        alone = token.type == tokenize.COMMENT and column == 0
        if alone and not "".join(lines[line : line + 1]).strip():
            titles[line] = token.string.lstrip("# ")
    found: dict[str, list[str]] = {title: [] for title in titles.values()}
    for node in ast.parse(source).body:
        above = [line for line in titles if line < node.lineno]
        if isinstance(node, ast.FunctionDef) and above:
            found[titles[max(above)]].append(node.name)
    return found


def describe(loss: Callable) -> Entry:
    """Reads the docstring and the signature of a loss; ValueError names it and what is missing."""
    name = loss.__name__
    paragraphs = [
        " ".join(p.split()) if i == 0 else p
        for i, p in enumerate(re.split(r"\n\s*\n", inspect.getdoc(loss) or ""))
    ]
    formula, *rest = sentences(paragraphs[0])
    if LINK.search(formula) or not re.search(r"[=()+*/^`-]", formula):
        raise ValueError(
            f"loss {name} has no formula: its docstring must begin with one, as a sentence, and "
            f"it begins with {formula!r}"
        )
    source = " ".join(rest)
    if not LINK.search(source):
        raise ValueError(
            f"loss {name} has no link to its paper: give it after the formula, before the first "
            "blank line of the docstring"
        )
    body = paragraphs[1:]
    meanings = {}
    if body and re.match(r"[a-z]\w*: ", body[-1]):
        meanings = meanings_of(body.pop(), name)
    notes = [s for paragraph in body for s in sentences(paragraph)]
    return Entry(
        name,
        formula.removesuffix("."),
        source.removesuffix("."),
        " ".join(s for s in notes if not s.startswith(AGREEMENT)),
        " ".join(s for s in notes if s.startswith(AGREEMENT)),
        hyperparameters(loss, meanings),
    )


def sentences(text: str) -> list[str]:
    """Splits at full stops; not after 'Eq.', which a number follows."""
    return re.split(r"(?<=\.)\s+(?!\d)", " ".join(text.split()))


def meanings_of(paragraph: str, loss: str) -> dict[str, str]:
    """The lines `name: meaning` of a paragraph; other lines go on with the one above."""
    found: dict[str, str] = {}
    for line in paragraph.splitlines():
        name, colon, meaning = line.partition(": ")
        if colon and name.isidentifier():
            if name in found:
                raise ValueError(f"loss {loss} describes {name!r} twice")
            found[name] = meaning.strip()
        else:
            last = list(found)[-1]
            found[last] += f" {line.strip()}"
    return found


def hyperparameters(loss: Callable, meanings: Mapping[str, str]) -> tuple[Hyperparameter, ...]:
    """The keywords of a loss with their meanings, which must be those and no others."""
    fields = config.loss_fields(loss)
    for name in fields:
        if not meanings.get(name):
            raise ValueError(
                f"loss {loss.__name__} does not describe its hyperparameter {name!r}: end the "
                f"docstring with a line '{name}: meaning'"
            )
    for name in meanings:
        if name not in fields:
            near = checks.nearest(name, fields)
            raise ValueError(f"loss {loss.__name__} describes {name!r}, which it lacks{near}")
    return tuple(
        Hyperparameter(name, shown(default), range_of(annotation), meanings[name])
        for name, (annotation, default) in fields.items()
    )


def shown(default: Any) -> str:
    """A default as Markdown: a number, a function's name, 'required' where there is none."""
    if default is inspect.Parameter.empty:
        return "required"
    return code(default.__name__) if callable(default) else f"{default:g}"


def range_of(annotation: Any) -> str:
    """What an annotation allows, in words; 'any' for a number without bounds."""
    words = checks.allowed(annotation)
    return "any" if words == "float" else words.removeprefix("float, ")


def page(module: types.ModuleType) -> str:
    """docs/losses.md: the losses of a module by its sections, and what they share."""
    losses = {loss.__name__: loss for loss in losses_of(module)}
    entries = {name: describe(loss) for name, loss in losses.items()}
    seen = {name: loss_curves.reads(loss) for name, loss in losses.items()}
    introduction, shared, notation = conventions(module)
    source = f"{module.__name__.replace('.', '/')}.py"
    parts = [
        "# The losses",
        f"Written by `{COMMAND}` from the docstrings and signatures of `{source}`: change those, "
        "not this page.",
        introduction.removeprefix("The losses. "),
        f"**In the formulas** {prose(notation.removeprefix('In the formulas '))}",
        READING,
    ]
    groups = sections(inspect.getsource(module))
    grouped = {title: [n for n in names if n in losses] for title, names in groups.items()}
    for name in set(losses) - {n for names in grouped.values() for n in names}:
        raise ValueError(f"loss {name} stands under no comment that says which losses these are")
    for title, names in grouped.items():
        if names:
            rows = [row(entries[n], seen[n], contract.needs(losses[n])) for n in names]
            parts += [f"## {title}", table(COLUMNS, rows)]
    parts += ["## Hyperparameters", hyperparameter_table(list(entries.values()))]
    parts += ["## Statistics of tokens", statistics_table(list(losses.values()))]
    parts += ["## Shared conventions", prose(shared)]
    parts += score_parts(module, groups)
    parts += curve_parts(losses, seen)
    return "\n\n".join(parts) + "\n"


READING = """\
**In the tables** a hyperparameter has its default and, in brackets, its range; its meaning is in
[Hyperparameters](#hyperparameters). *Reads* lists the completions, the columns of the data, and
whether log-probabilities are summed over tokens or averaged, which was found by changing lengths.
*Declares* is what a loss asks for beyond totals and lengths, and is computed for no other:
statistics of tokens, the prompt's own log-probability, a state that is kept in the checkpoint,
advice that is printed before the first step.
Where it says *batch*, an example's loss depends on other examples: those of the global batch, or of
a microbatch, as `Experiment.statistics` says. Everywhere else an example stands alone."""
COLUMNS = ["loss", "formula", "hyperparameters", "reads", "declares", "defaults and agreement"]


def conventions(module: types.ModuleType) -> tuple[str, str, str]:
    """A module's docstring: its first paragraph, what is shared, and the notation of formulas."""
    paragraphs = (inspect.getdoc(module) or "").split("\n\n")
    notation = [p for p in paragraphs if p.startswith("In the formulas ")]
    if len(notation) != 1 or len(paragraphs) < 3:
        raise ValueError(
            f"the docstring of {module.__name__} must have a first paragraph, what losses share, "
            "and one paragraph that begins with 'In the formulas '"
        )
    shared = [p for p in paragraphs[1:] if p is not notation[0]]
    return paragraphs[0], "\n\n".join(shared), notation[0]


def row(entry: Entry, read: Reads, needs: contract.Needs) -> list[str]:
    """The cells of a loss, of COLUMNS."""
    formula = mathematics(entry.formula)
    if entry.notes:
        formula += f"<br>{prose(entry.notes)}"
    numbers = [
        f"{code(h.name)} {prose(h.default)} ({prose(h.allowed)})" for h in entry.hyperparameters
    ]
    what = [", ".join(read.completions), "with reference" if read.has_reference else ""]
    columns = ", ".join(map(code, read.columns))
    return [
        f"**`{entry.name}`**<br>{prose(entry.source)}",
        formula,
        "<br>".join(numbers) or "none",
        "<br>".join(filter(None, [*what, columns, f"**{read.tokens}**"])),
        "<br>".join(declared(needs)) or "",
        prose(entry.agreement),
    ]


def declared(needs: contract.Needs) -> Iterator[str]:
    """What a loss declared, a line each."""
    if needs.batch_statistics:
        yield "batch"
    for name in sorted({**needs.policy, **needs.reference}):
        of = [
            which
            for which, statistics in (("policy", needs.policy), ("reference", needs.reference))
            if name in statistics
        ]
        yield f"`{name}` of {' and '.join(of)}"
    if needs.prompt:
        yield "prompt"
    if needs.state is not tuple:
        yield "state"
    if needs.advice is not None:
        yield "advice"


def hyperparameter_table(entries: Sequence[Entry]) -> str:
    """A row for each meaning of each hyperparameter, with the losses where it is meant."""
    users: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        for parameter in entry.hyperparameters:
            users.setdefault((parameter.name, parameter.meaning), []).append(code(entry.name))
    order = list(dict.fromkeys(name for name, _ in users))
    rows = [
        [code(name), prose(meaning), ", ".join(names)]
        for (name, meaning), names in sorted(users.items(), key=lambda u: order.index(u[0][0]))
    ]
    return table(["name", "meaning", "losses"], rows)


def statistics_table(losses: Sequence[Callable]) -> str:
    """A row for each statistic that some loss declares."""
    found: dict[str, Callable] = {}
    for loss in losses:
        needs = contract.needs(loss)
        for name, statistic in {**needs.policy, **needs.reference}.items():
            if not inspect.getdoc(statistic):
                raise ValueError(f"loss {loss.__name__}: statistic {name!r} has no docstring")
            found[name] = statistic
    rows = [
        [code(name), prose((inspect.getdoc(statistic) or "").removeprefix("Statistic: "))]
        for name, statistic in found.items()
    ]
    return table(["statistic", "of a token, summed over the completion"], rows)


def scores_of(module: types.ModuleType, groups: Mapping[str, Sequence[str]]) -> dict[str, Callable]:
    """The functions of a log-ratio in the section that begins with 'Scores'."""
    names = [n for title, names in groups.items() if title.startswith("Scores") for n in names]
    found = {name: getattr(module, name) for name in names}
    return {
        n: f for n, f in found.items() if next(iter(inspect.signature(f).parameters)) == "ratio"
    }


def score_parts(module: types.ModuleType, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The section of the scores: what they are, their formulas and their picture."""
    titles = [title for title in groups if title.startswith("Scores")]
    rows = []
    for name, score in scores_of(module, groups).items():
        if not inspect.getdoc(score):
            raise ValueError(f"score {name} has no formula: its docstring must begin with one")
        rows.append([code(name), mathematics(sentences(inspect.getdoc(score) or "")[0][:-1])])
    heading, _, what = "".join(titles).partition(": ")
    values = ", ".join(f"`{p}` {v:g}" for given in SCORES.values() for p, v in given.items())
    return [
        f"## {heading}",
        f"Losses with a hyperparameter `score` take one of {prose(what)}. All are 0 "
        "where policy equals reference. Logged rewards stay those of the log-ratio itself. One "
        "with a parameter needs a function that sets it, as `alpha_dpo` has for `dpo`.",
        table(["score", "s(r)"], rows),
        picture("scores", "the scores and their slopes against the log-ratio"),
        f"Where a score has a parameter, it is drawn with {values}.",
    ]


def curve_parts(losses: Mapping[str, Callable], seen: Mapping[str, Reads]) -> list[str]:
    """The section of the pictures, with what they take for granted."""
    absent = [n for n, loss in losses.items() if drawn_in(loss, seen[n]) is None]
    kept = ", ".join(
        f"`{loss}` with `{name}` {value:g}"
        for loss, given in loss_curves.VALUES.items()
        for name, value in given.items()
    )
    length, mean, extent = loss_curves.LENGTH, loss_curves.MEAN, loss_curves.EXTENT
    return [
        "## Curves",
        filled(
            f"Each loss at its defaults ({kept}) over margins from {-extent:g} to {extent:g} nats, "
            "and below it its slope, by automatic differentiation. Every completion has "
            f"{length} tokens; at margin 0 each has {mean:g} nats a token, under the policy and "
            "under the reference. The chosen completion carries half of the margin, the rejected "
            "one the other half. Scales differ from panel to panel; a curve that leaves its panel "
            "goes on. Losses that are alike under these conditions share a panel, and differ where "
            "lengths do or, for `wpo`, where the policy would hardly write the pair."
        ),
        filled(
            "A negative slope pushes the margin up, and its size is how hard an example pulls: "
            "`dpo` lets go of pairs that it has right, `ipo_sum` pushes back beyond its target, "
            "`hinge` stops dead."
        ),
        "### Pairs with a reference",
        picture("pairs", "losses of pairs with a reference against the log-ratio margin"),
        filled(
            "`plackett_luce` has three completions, the middle one at 0. In `dpop`, `rpo` and "
            "`mpo` it matters that the chosen completion has half of the margin: they read its "
            "log-probability alone, too."
        ),
        "### Pairs without a reference",
        picture("without_reference", "losses of pairs without a reference against p_w - p_l"),
        filled(
            "The NLL beside the preference is part of the loss. A prompt (`orpo_prompt`) and a "
            f"gold completion (`tpo`) stay at {mean:g} nats a token."
        ),
        "### Labelled completions",
        picture("unpaired", "losses of labelled completions against their log-ratio"),
        filled(
            "The batch's baseline (z of `kto`, d of `bco`) is 0 here: another one moves the curves "
            "to the right by it. "
            + ", ".join(f"`{n}` is {v:g}" for n, v in loss_curves.COLUMNS.items())
            + "."
        ),
        f"Not drawn, as their values are not of one margin: {', '.join(map(code, absent))}.",
    ]


def drawn_in(loss: Callable, read: Reads) -> str | None:
    """The picture that has a loss; None: none has it."""
    return loss_figures.is_drawn(read, contract.needs(loss).batch_statistics)


def pictures(module: types.ModuleType) -> dict[str, bytes]:
    """The PNG files of a module's losses by name, without '.png'."""
    losses = losses_of(module)
    places: dict[str | None, list[Callable]] = {}
    for loss in losses:
        places.setdefault(drawn_in(loss, loss_curves.reads(loss)), []).append(loss)
    draw = (loss_figures.pairs, loss_figures.without_reference, loss_figures.unpaired)
    drawn = {make.__name__: loss_figures.png(make(places.get(make.__name__, []))) for make in draw}
    curves = {
        name: functools.partial(loss_curves.score_curve, score, **SCORES.get(name, {}))
        for name, score in scores_of(module, sections(inspect.getsource(module))).items()
    }
    return {**drawn, "scores": loss_figures.png(loss_figures.scores(curves))}


def write(module: types.ModuleType, folder: str | Path) -> list[Path]:
    """Writes the page and its pictures into a folder; the paths that were written."""
    folder = Path(folder)
    contents = {PAGE: page(module).encode()}
    contents |= {f"{PICTURES}/{name}.png": image for name, image in pictures(module).items()}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def is_current(module: types.ModuleType, folder: str | Path) -> bool:
    """Whether a folder's page is the one that would be written; pictures are not compared."""
    path = Path(folder) / PAGE
    return path.is_file() and path.read_bytes() == page(module).encode()


def picture(name: str, what: str) -> str:
    """A picture in Markdown."""
    return f"![{what[0].upper()}{what[1:]}]({PICTURES}/{name}.png)"


def filled(text: str) -> str:
    """A paragraph in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def mathematics(formula: str) -> str:
    """A formula as code; one with names in backticks is a sentence and stays text."""
    return prose(formula) if "`" in formula else code(formula)


def code(text: str) -> str:
    """Text as a code span."""
    return f"`{text}`"


def prose(text: str) -> str:
    """Text of a docstring as Markdown that reads the same: signs escaped, links made."""
    parts = NAMES.split(text)
    return "".join(p if i % 2 else LINK.sub(link, escaped(p)) for i, p in enumerate(parts))


def escaped(text: str) -> str:
    """Text with the signs that mean something in Markdown taken literally."""
    return re.sub(r"([*<\\])", r"\\\1", text)


def link(match: re.Match) -> str:
    """A link in Markdown; to arXiv by the paper's number."""
    address = match[0]
    return f"[{address.replace('https://arxiv.org/abs/', 'arXiv ')}]({address})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; '|' in cells is escaped."""
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
