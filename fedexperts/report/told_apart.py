"""Which differences in quality are more than chance: of each two methods, of methods and reference lines, and of single tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from fedexperts.report import measures, paired, reference_lines, scores, stats
from fedexperts.report.measures import Measure
from fedexperts.report.read import Groups, RunResults, all_runs
from fedexperts.report.stats import Difference
from fedexperts.report.table_format import NONE, Table, number, plus_minus

NAMED = 6  # pairs that a sentence lists; it counts the others
CHANCE = 1 - stats.LEVEL
OVER = {
    "seeds": 'seeds (it says nothing of other test examples; evaluation.predictions = "all" would)',
    "clients": "the clients of a single seed (it says nothing of other seeds)",
    "seeds and examples": "seeds and test examples",
}

Compared = tuple[str, str, Measure, Sequence[RunResults], Sequence[RunResults]]  # one, other, and the runs of both


@dataclass(frozen=True)
class Pair:
    """`one` minus `other`: two methods, or a method and a reference line."""

    one: str
    other: str
    measure: Measure
    difference: Difference
    p: float | None  # corrected for the number of pairs of its table

    @property
    def told_apart(self) -> bool:
        """Whether chance alone would give such a difference in fewer than 5 % of comparisons."""
        return self.p is not None and self.p < CHANCE

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.p is None:
            return "not tested" if self.difference.error is None else "no spread"
        better = (self.difference.mean > 0) == (self.measure.unit == "%")
        return ("better" if better else "worse") if self.told_apart else "not told apart"


def overall(groups: Groups) -> list[Pair]:
    """Each two methods on the overall quality, and each method with each reference line."""
    measure = measures.quality(all_runs(groups), None)
    methods = ((one, other, measure, groups[one], groups[other]) for other, one in combinations(groups, 2))
    lines = (
        (one, line, measure, runs, against)
        for one, runs in groups.items()
        for line, against in reference_lines.of_groups({one: runs}).items()
    )
    return _corrected([*methods, *lines])


def by_task(groups: Groups, baseline: str) -> list[Pair]:
    """Each method with the baseline on each task; none if there is a single task."""
    tasks = scores.tasks(all_runs(groups))
    others = [label for label in groups if label != baseline] if baseline in groups and len(tasks) > 1 else []
    qualities = [measures.quality(all_runs(groups), task) for task in tasks]
    return _corrected([(one, baseline, each, groups[one], groups[baseline]) for each in qualities for one in others])


def tables(groups: Groups, baseline: str) -> list[Table]:
    """The tables of both that have rows."""
    every = [
        _table(
            "Overall quality: told apart or not", overall(groups), groups, "each two methods, and methods and reference lines"
        ),
        _table(f"Quality of each task against {baseline}: told apart or not", by_task(groups, baseline), groups, "all rows"),
    ]
    return [table for table in every if table.rows]


def brief(groups: Groups) -> Table:
    """The first of `tables` for a terminal: methods alone, in fewer columns; without rows for a single method."""
    pairs = [pair for pair in overall(groups) if pair.other in groups]
    if not pairs:
        return Table("", (), ())
    full, shown = _table("Overall quality: told apart or not", pairs, groups, ""), (0, 1, 2, 5, 6, 7)
    return Table(
        full.title,
        tuple(full.columns[index] for index in shown),
        tuple(tuple(row[index] for index in shown) for row in full.rows),
        note=f"± 95 % interval over {_over(pairs)}. p value: corrected by Holm's method for all comparisons, also with reference "
        "lines.",
        text_columns=(0, 1, 5),
    )


def words(groups: Groups) -> str:
    """Which methods are told apart in overall quality and which are not, in sentences; empty for a single method."""
    pairs = [pair for pair in overall(groups) if pair.other in groups]
    if not pairs:
        return ""
    tested = [pair for pair in pairs if pair.p is not None]
    if all(pair.difference.error is None for pair in pairs):
        return "No two methods can be told apart: a test needs two seeds of both, or two clients of each task."
    unit = " points" if pairs[0].measure.unit else ""
    apart = [_in_words(pair) for pair in tested if pair.told_apart]
    alike = [f"{pair.one} and {pair.other}" for pair in pairs if not pair.told_apart]
    seen = [pair.difference.detectable for pair in tested if pair.difference.detectable is not None]
    return " ".join(
        filter(
            None,
            [
                f"Told apart in overall quality (p < 0.05, corrected for their number): {_listed(apart)}." if apart else "",
                f"Not told apart: {_listed(alike)}." if alike else "",
                f"These runs could have seen a difference of {_range(seen)}{unit} (with 80 % power, before correction)."
                if seen
                else "",
            ],
        )
    )


def _table(title: str, pairs: Sequence[Pair], groups: Groups, family: str) -> Table:
    unit = pairs[0].measure.unit if len({pair.measure.unit for pair in pairs}) == 1 else ""
    several = len({pair.measure.name for pair in pairs}) > 1
    rows = tuple(
        (
            pair.one,
            pair.other,
            *([pair.measure.name] if several else []),
            plus_minus(pair.difference.interval, pair.measure.unit, sign="+"),
            f"{pair.difference.n}",
            p_value(pair.difference.p),
            p_value(pair.p),
            number(pair.difference.detectable),
            pair.verdict,
        )
        for pair in pairs
    )
    points = " (points)" if unit == "%" else ""
    return Table(
        title,
        (
            "method",
            "than",
            *(["task"] if several else []),
            f"difference{points}",
            "seeds",
            "p value",
            "p value, corrected",
            f"could have seen{points}",
            "verdict",
        ),
        rows,
        note=f"Paired: both in the same seed on the same examples; ± 95 % interval over {_over(pairs)}. p value: "
        f"two-sided Student t test; corrected for the number of tests by Holm's method ({family}). Could have seen: "
        "the true difference that one such test would find in 80 % of repetitions, at the spread of these runs. Not told apart "
        f"does not mean equal. {scores.scored_note(all_runs(groups))}",
        text_columns=(0, 1, 2, 8) if several else (0, 1, 7),
    )


def _over(pairs: Sequence[Pair]) -> str:
    """What the intervals of `pairs` are over, in words."""
    return (
        " or ".join(dict.fromkeys(OVER[each.difference.over] for each in pairs if each.difference.error is not None)) or "seeds"
    )


def p_value(value: float | None) -> str:
    """Three decimals, or that it is smaller."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _corrected(compared: Sequence[Compared]) -> list[Pair]:
    """The pairs that share a seed, with p values corrected for their number."""
    found = [
        (one, other, measure, difference)
        for one, other, measure, runs, against in compared
        if (difference := paired.difference(measure, runs, against))
    ]
    corrected = stats.holm([difference.p for *_, difference in found])
    return [Pair(*each, p) for each, p in zip(found, corrected, strict=True)]


def _in_words(pair: Pair) -> str:
    return f"{pair.one} is {pair.verdict} than {pair.other} ({plus_minus(pair.difference.interval, pair.measure.unit, sign='+')})"


def _listed(sentences: Sequence[str]) -> str:
    more = f"; and {len(sentences) - NAMED} more" if len(sentences) > NAMED else ""
    return "; ".join(sentences[:NAMED]) + more


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"
