"""Show the spectra of a model: tables, and what they say in words. Pure rendering."""

import math
import statistics
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from .render import table
from .spectra import ENERGIES, SHARES, TOP, counts, resolution
from .survey import ENOUGH, Matrix, MetricName, Spectrum, Survey, held

LIMIT = 20
_RANKS = f"{'/'.join(f'{100 * share:g}' for share in ENERGIES)} %"
_ENOUGH = f"{ENOUGH:.0%}".replace("%", " %")

Rows = list[tuple[str, ...]]


def percent(share: float) -> str:
    """Return `share` in percent, never rounded up to all of it."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _condition(found: Spectrum) -> str:
    value = found.measures["plain"].condition
    return f"{value:.2g}" if math.isfinite(value) else f"> {1 / resolution(found.shape):.2g}"


MATRICES = ("matrix", "m x n", _RANKS, "rel.", "stable", "effective", "> noise", "condition")


def matrix_rows(matrices: Sequence[Matrix], metric: MetricName) -> Rows:
    """Return a row for each of `matrices`, measured in `metric` but for noise and condition."""
    rows: Rows = []
    for one in matrices:
        found = one.whole.measures[metric]
        rows.append((
            one.name, _by(one.whole.shape), "/".join(map(str, found.ranks)),
            f"{one.whole.share(metric):.2f}", f"{found.stable_rank:.1f}", f"{found.effective_rank:.0f}",
            str(one.whole.noise.above), _condition(one.whole),
        ))  # fmt: skip
    return rows


KINDS = (
    "matrices", "m x n", "metric", *(f"top {100 * share:g} %" for share in SHARES), f"top {TOP}",
    f"rank at {_ENOUGH} / break-even",
)  # fmt: skip


def kind_rows(survey: Survey) -> Rows:
    """Return a row for each kind and metric: the share of the energy that the largest values hold."""
    rows: Rows = []
    for kind, own in survey.kinds().items():
        shapes = sorted({one.whole.shape for one in own})
        for metric in survey.metrics:
            found = held(own, metric)
            rows.append((
                f"{kind} ({found.count})", ", ".join(map(_by, shapes)), metric,
                *(f"{100 * mean:.1f} ({100 * low:.0f} to {100 * high:.0f}) %"
                  for mean, low, high in found.shares),
                "" if found.top is None else percent(found.top), f"{found.rank:.2f}",
            ))  # fmt: skip
    return rows


HEADS = ("heads of", "how many", "m x n", "metric", f"rank at {_ENOUGH}: least, median, most", "stable")


def head_rows(survey: Survey) -> Rows:
    """Return a row for each kind of matrix with heads, and metric."""
    rows: Rows = []
    place = ENERGIES.index(ENOUGH)
    for kind, own in survey.kinds().items():
        heads = [head for one in own for head in one.heads]
        if not heads:
            continue
        shapes = ", ".join(_by(shape) for shape in sorted({head.shape for head in heads}))
        for metric in survey.metrics:
            measured = [head.measures[metric] for head in heads]
            ranks = [one.ranks[place] for one in measured]
            stable = statistics.median(one.stable_rank for one in measured)
            rows.append((
                kind, f"{len(heads)}", shapes, metric,
                f"{min(ranks)}, {statistics.median(ranks):g}, {max(ranks)}", f"{stable:.1f}",
            ))  # fmt: skip
    return rows


def answers(survey: Survey) -> list[str]:
    """Return, in words, what share of the energy the largest singular values hold, of all and by kind."""
    return [*_overall(survey), *(_of_kind(survey, kind, own) for kind, own in survey.kinds().items())]


def _overall(survey: Survey) -> list[str]:
    said = []
    low, high = (f"{100 * share:g}" for share in SHARES)
    for metric in survey.metrics:
        found = held(survey.matrices, metric)
        few, more = found.enough
        means = " and ".join(f"{100 * mean:.1f} %" for mean, _, _ in found.shares)
        line = (
            f"{metric}: the top {low} % of the singular values hold {_ENOUGH} of the energy in {few} of "
            f"{found.count} matrices, the top {high} % in {more} (on average they hold {means})"
        )
        if found.top is not None:
            line += (
                f"; the top {TOP} do in {found.enough_top} of the {found.with_top} that have so many "
                f"(on average {percent(found.top)})"
            )
        said.append(f"{line}.")
    last = held(survey.matrices, survey.strongest)
    verdict = _verdict(last.enough[-1], last.count)
    said.append(
        f'So "{low} to {high} % of the singular values hold {_ENOUGH}" is {verdict} of this model in the '
        f"{survey.strongest} metric: {last.enough[-1]} of {last.count} matrices."
    )
    return said


def _verdict(true: int, of: int) -> str:
    if true in (0, of):
        return "true" if true else "false"
    return "half true" if 2 * true == of else "mostly true" if 2 * true > of else "mostly false"


def _of_kind(survey: Survey, kind: str, own: Sequence[Matrix]) -> str:
    sizes = sorted({min(one.whole.shape) for one in own})
    parts = []
    for metric in survey.metrics:
        found = held(own, metric)
        shares = " and ".join(f"{100 * mean:.1f} %" for mean, _, _ in found.shares)
        top = "" if found.top is None else f", the top {TOP} {percent(found.top)}"
        parts.append(f"{shares}{top} ({metric})")
    how_many = " or ".join(" and ".join(map(str, counts(size))) for size in sizes)
    of = " or ".join(map(str, sizes))
    return f"{kind}: the top {how_many} of {of} singular values hold {'; '.join(parts)}."


def _notes(survey: Survey, limit: int) -> list[str]:
    notes = [
        f"{_RANKS}: the ranks that hold so much of the energy (the squared norm), {survey.strongest} metric",
        f"sorted by rel., the rank at {_ENOUGH} over the break-even rank mn / (m + n): below 1, two factors "
        "are smaller than the matrix",
        "> noise: plain singular values beyond the edge of Marchenko and Pastur, of white noise with the "
        "same median singular value; condition: of the plain matrix",
        "float64, from Gram matrices: values below "
        f"{max(resolution(one.whole.shape) for one in survey.matrices):.0e} of the largest are rounding",
    ]
    if limit < len(survey.matrices):
        notes.insert(0, f"{limit} of {len(survey.matrices)} are shown; --limit shows more, --json has all")
    if survey.tokens:
        notes.append(
            f"second moments on {survey.tokens:,} tokens, of gradients on {survey.gradient_tokens:,}, damped "
            f"by {survey.damp:g} of their mean"
        )
    return [*notes, *survey.warnings]


def tables(survey: Survey, limit: int = LIMIT) -> RenderableType:
    """Return what is printed: the `limit` matrices that compress best, kinds, heads, and what it all says."""
    shown = survey.best()[:limit]
    parts: list[RenderableType] = []
    if shown:
        title = f"{survey.source}: what compresses best, {survey.strongest} metric"
        parts.append(table(title, MATRICES, matrix_rows(shown, survey.strongest)))
    parts.extend(Text(f"note: {line}") for line in _notes(survey, len(shown)))
    title = "Share of the energy in the largest singular values: mean (least to most); median rank"
    parts.append(table(title, KINDS, kind_rows(survey)))
    heads = head_rows(survey)
    if heads:
        parts.append(table("Heads of attention, each alone; medians", HEADS, heads))
    return Group(*parts, *map(Text, answers(survey)))
