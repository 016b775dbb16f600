"""The pages of results, from their templates and CSVs: every figure of ours in them is computed here.

    python benchmarks/results_pages.py            # writes docs/results/*.md
    python benchmarks/results_pages.py --check    # fails if a page is not what its template and the CSVs give

The second is `make results-check`. A template is docs/results/pages/NAME.md.jinja. A decimal number that stands in its text must
be a setting or be quoted from elsewhere; its line then ends with {# quoted: SOURCE #}, which is not part of the page.
"""

import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from math import log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy.special import stdtrit

from fedexperts.report import stats

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"
PAGES = RESULTS / "pages"
LINES = ("constant answer", "copy of the input")
SETTINGS = ("standard-t", "standard-td", "enforced-t", "enforced-td")  # of FedMoE's experiment
MEASURES = ("bytes_sent", "flops_estimated")
DECIMAL = re.compile(r"\d\.\d")
QUOTED = re.compile(r"\{#-? quoted: [^#]+ #\}\s*$")


@dataclass(frozen=True)
class Row:
    """A line of a CSV: the mean over seeds with the bounds of its 95 % interval, and the same of the paired difference."""

    setting: str
    method: str
    measure: str
    task: str
    seeds: int
    mean: float
    low: float  # of the interval; NaN of one seed
    high: float
    half: float
    paired: float
    paired_half: float


def number(text: str) -> float:
    return float(text) if text else float("nan")


class Table:
    """The lines of one CSV, of one setting, and the reference lines of the same examples."""

    def __init__(self, name: str) -> None:
        path, setting = name, ""
        if not (RESULTS / f"{path}.csv").exists():
            folder, setting = name.rsplit("/", 1)
            path = f"{folder}/all"
        self.name, self.rows = name, {}
        self.pairs: dict[tuple[str, str], tuple[float, float, float]] = {}  # → difference in quality, half-width, corrected p
        with (RESULTS / f"{path}.csv").open(newline="") as file:
            for line in csv.DictReader(file):
                if line["setting"] == setting:
                    low, high = number(line["low"]), number(line["high"])
                    paired_low, paired_high = number(line["difference_low"]), number(line["difference_high"])
                    row = Row(
                        setting, line["method"], line["measure"], line["task"], int(line["seeds"] or 0), number(line["mean"]),
                        low, high, (high - low) / 2, number(line["difference"]), (paired_high - paired_low) / 2,
                    )  # fmt: skip
                    self.rows[row.method, row.measure, row.task] = row
                    if row.measure == "difference in quality" and not row.task:
                        corrected = number(line.get("p_value_corrected", ""))
                        self.pairs[row.method, line["baseline"]] = row.paired, row.paired_half, corrected

    @property
    def methods(self) -> list[str]:
        """By quality, best first; equal ones by name."""
        return sorted(
            {method for method, _, _ in self.rows} - {*LINES}, key=lambda method: (-round(self.row(method).mean, 9), method)
        )

    @property
    def tasks(self) -> list[str]:
        return sorted({task for _, measure, task in self.rows if measure == "quality" and task})

    def row(self, method: str, measure: str = "quality", task: str = "") -> Row:
        return self.rows[method, measure, task]

    def value(self, method: str, measure: str = "quality", task: str = "", digits: int = 1) -> str:
        """The mean over seeds with the half-width of its interval."""
        row = self.row(method, measure, task)
        return f"{row.mean:.{digits}f} ± {row.half:.{digits}f}"

    def mean(self, method: str, measure: str = "quality", task: str = "", digits: int = 1) -> str:
        return f"{self.row(method, measure, task).mean:.{digits}f}"

    def paired(self, method: str, measure: str = "quality", task: str = "", digits: int = 1) -> str:
        """The paired difference from the table's baseline with the half-width of its interval; "–" for the baseline."""
        row = self.row(method, measure, task)
        return "–" if row.paired != row.paired else f"{signed(row.paired, digits)} ± {row.paired_half:.{digits}f}"

    def against(self, method: str, line: str) -> str:
        """The paired difference in quality from a reference line."""
        mean, half, _ = self.pairs[method, line]
        return f"{signed(mean, 1)} ± {half:.1f}"

    def corrected(self, method: str, other: str) -> str:
        """The p value of the difference of two methods, corrected for all pairs of the CSV."""
        return f"{(self.pairs.get((method, other)) or self.pairs[other, method])[2]:.3f}"

    def unpaired(self, method: str, other: str) -> str:
        """The difference of two methods' means with the half-width of Welch's interval, where the CSV has no paired one."""
        rows = self.row(method), self.row(other)
        errors = [(row.half / float(stdtrit(row.seeds - 1, 0.975))) ** 2 for row in rows]
        freedom = sum(errors) ** 2 / sum(error**2 / (row.seeds - 1) for error, row in zip(errors, rows, strict=True))
        return f"{signed(rows[0].mean - rows[1].mean, 1)} ± {float(stdtrit(freedom, 0.975)) * sum(errors) ** 0.5:.1f}"

    def base(self, task: str) -> float:
        """What the base scored of what is retained, in per cent: the same for all methods."""
        method = self.methods[0]
        return self.row(method, "retained", task).mean - self.row(method, "retained − base", task).mean

    def times(self, method: str, measure: str, digits: int = 2) -> str:
        """A ratio to the baseline with its interval, which is not symmetric; "–" where no seed has it."""
        row = self.row(method, f"{measure}, ratio")
        return "–" if row.mean != row.mean else f"{row.mean:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]"

    def differences(self) -> dict[str, stats.Difference]:
        """Method → its paired difference from the baseline, over seeds; without methods whose seeds all differ by the same."""
        found = {}
        for method in self.methods:
            row = self.row(method)
            if row.paired == row.paired and row.paired_half > 0:
                error = row.paired_half / float(stdtrit(row.seeds - 1, 0.975))
                found[method] = stats.Difference(row.paired, error, row.seeds - 1, row.seeds)
        return found

    def told_apart(self, corrected: bool = True) -> list[str]:
        """Methods whose difference from the baseline is told apart at 5 %; corrected: by Holm, for all methods of the table."""
        return names_told_apart(self.differences(), corrected)

    def could_see(self) -> str:
        """Points that these runs could have told from 0, from the least to the most of the methods, in words."""
        found = [each.detectable or 0.0 for each in self.differences().values()]
        return f"{min(found):.1f} to {max(found):.1f} points, depending on the method (80 % power, before correction)"

    def slower(self, measure: str, corrected: bool = True) -> list[str]:
        """Methods whose ratio to the baseline is told from 1 at 5 %, by logarithms; corrected: by Holm, for all of the table."""
        found = {}
        for method in self.methods:
            row = self.rows.get((method, f"{measure}, ratio", ""))
            if row and row.low > 0:
                error = log(row.high / row.low) / 2 / float(stdtrit(row.seeds - 1, 0.975))
                found[method] = stats.Difference(log(row.mean), error, row.seeds - 1, row.seeds)
        return names_told_apart(found, corrected)

    def line(self, name: str, task: str = "", metric_digits: int = 1) -> str:
        """A reference line, mean over the same seeds, in per cent."""
        value = self.reference(name, task)
        return "–" if value is None else f"{value:.{metric_digits}f}"

    def reference(self, name: str, task: str = "") -> float | None:
        """A reference line in per cent: of the table's own CSV, or else of reference_lines.csv; None: in neither."""
        if (name, "quality", task) in self.rows:
            return self.row(name, task=task).mean
        found = [100 * value for table, line, of, value in reference_lines() if (table, line, of) == (self.name, name, task)]
        return fmean(found) if found else None

    def better_line(self, tasks: Iterable[str]) -> str:
        """The better of both reference lines of each task, and the mean of these: what can be had without training."""
        return f"{fmean(max(float(self.line(name, task, 9)) for name in LINES) for task in tasks):.1f}"

    def quality_table(self, tasks: dict[str, str], measures: dict[str, tuple[str, int]], against: str = "") -> str:
        """Markdown: quality overall (paired), by task, and other measures; reference lines among the methods, by their score.

        tasks: heading → task. measures: heading → measure and digits. against: heading of the paired differences; "": none.
        """
        head = ["method", "mean", *([against] if against else []), *tasks, *measures]
        lines = []
        for method in self.methods:
            cells = [method, self.value(method), *([self.paired(method)] if against else [])]
            cells += [self.mean(method, task=task) for task in tasks.values()]
            cells += [self.mean(method, measure, digits=digits) for measure, digits in measures.values()]
            lines.append((self.row(method).mean, cells))
        known = [name for name in LINES if self.reference(name) is not None]
        for name in known:
            cells = [
                f"*{name}*",
                self.line(name),
                *([""] if against else []),
                *(self.line(name, task) for task in tasks.values()),
            ]
            lines.append((float(self.line(name)), cells + [""] * len(measures)))
        if known and len(tasks) > 1:
            whole, *each = [self.better_line(of) for of in (tasks.values(), *([task] for task in tasks.values()))]
            cells = ["*better of the two, task by task*", whole, *([""] if against else []), *each]
            lines.append((float(whole), cells + [""] * len(measures)))
        rows = [cells for _, cells in sorted(lines, key=lambda each: -each[0])]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


class Attacks:
    """The lines of a CSV of robust.py: honest clients' quality, in per cent, by method, attack, number of attackers and rule."""

    def __init__(self, name: str = "robustness") -> None:
        with (RESULTS / f"{name}.csv").open(newline="") as file:
            self.rows = {
                (row["method"], row["attack"], int(row["attackers"]), row["rule"], int(row["seed"])): row
                for row in csv.DictReader(file)
            }

    def of(self, method: str, attack: str, rule: str, attackers: int = 2) -> dict[int, float]:
        """Seed → quality."""
        wanted = (method, attack, attackers, rule)
        return {seed: float(row["honest_quality"]) for (*key, seed), row in self.rows.items() if tuple(key) == wanted}

    def value(self, method: str, attack: str, rule: str, attackers: int = 2) -> str:
        return interval([*self.of(method, attack, rule, attackers).values()])

    def triggered(self, method: str, rule: str, attackers: int) -> str:
        """How many triggered prompts get the backdoor's response, in per cent, seed by seed."""
        found = sorted((key[-1], row) for key, row in self.rows.items() if key[:4] == (method, "backdoor", attackers, rule))
        return ", ".join(f"{float(row['triggered']):.1f}" for _, row in found)

    def lost(self, method: str, attack: str, rule: str, attackers: int = 2, first: int | None = None) -> str:
        """The paired difference from the plain mean without attackers, seed by seed; of the `first` seeds, or all."""
        return interval([*self.losses(method, attack, rule, attackers).values()][:first], sign=True)

    def losses(self, method: str, attack: str, rule: str, attackers: int) -> dict[int, float]:
        """Seed → the difference from the plain mean without attackers, by seed."""
        plain, own = self.of(method, "nobody", "none", attackers), self.of(method, attack, rule, attackers)
        return {seed: own[seed] - plain[seed] for seed in sorted(own) if seed in plain}

    def more_lost(self, method: str, attack: str, rule: str, attackers: int, than: "Attacks") -> str:
        """The paired difference of losses from those with two attackers in another CSV."""
        own, other = self.losses(method, attack, rule, attackers), than.losses(method, attack, rule, 2)
        return interval([own[seed] - other[seed] for seed in own if seed in other], sign=True)


class Clients:
    """The lines of CSVs with each client's quality, in per cent: of few seeds, differences are paired by client and seed."""

    def __init__(self, *names: str) -> None:
        self.values: dict[tuple[str, int], dict[tuple[int, str], float]] = {}
        self.tasks: dict[str, str] = {}
        for name in names:
            with (RESULTS / f"{name}.csv").open(newline="") as file:
                for row in csv.DictReader(file):
                    of_clients = self.values.setdefault((row["method"], int(row["round"])), {})
                    of_clients[int(row["seed"]), row["client"]] = 100 * float(row["value"])
                    self.tasks[row["client"]] = row.get("task", "")

    def seeds(self, method: str) -> int:
        return len({seed for (name, _), values in self.values.items() if name == method for seed, _ in values})

    def last(self, method: str) -> int:
        """The last round that was scored."""
        return max(scored for name, scored in self.values if name == method)

    @property
    def methods(self) -> list[str]:
        """By their mean in the last round, best first."""
        found = {method: fmean(self.values[method, self.last(method)].values()) for method, _ in self.values}
        return sorted(found, key=lambda method: (-found[method], method))

    def mean(self, method: str, round: int, task: str = "") -> str:
        values = self.values[method, round].items()
        return f"{fmean(value for (_, client), value in values if task in ('', self.tasks[client])):.1f}"

    def of_seed(self, method: str, round: int, seed: int) -> float:
        return fmean(value for (of, _), value in self.values[method, round].items() if of == seed)

    def paired(self, method: str, against: str, round: int, round_against: int = 0) -> str:
        """The mean of the difference over clients and the seeds that both have, with a t interval over these pairs.

        round_against: of the other method, where it is not the same.
        """
        own, other = self.values[method, round], self.values[against, round_against or round]
        return interval([own[key] - other[key] for key in own if key in other], sign=True)

    def by_seed(self, method: str, against: str, round: int, round_against: int = 0) -> str:
        """The difference over the seeds that both have, each the mean over its clients, with a t interval over seeds."""
        return interval(self.differences(method, against, round, round_against), sign=True)

    def over_rounds(self, method: str, against: str) -> list[float]:
        """Of each seed that both have, the mean difference over its clients and all rounds that were scored."""
        rounds = sorted(scored for name, scored in self.values if name == method)
        return [fmean(each) for each in zip(*(self.differences(method, against, scored) for scored in rounds), strict=True)]

    def interpolated(self, method: str, at: float) -> dict[int, float]:
        """Seed → mean over clients at `at` rounds: linear between rounds that were scored and from 0 before training (ours)."""
        scored = sorted(round for name, round in self.values if name == method)
        seeds = {seed for seed, _ in self.values[method, scored[0]]}
        curves = {seed: [self.of_seed(method, round, seed) for round in scored] for seed in sorted(seeds)}
        return {seed: float(np.interp(at, [0, *scored], [0.0, *curve])) for seed, curve in curves.items()}

    def pooled(self, pairs: list[tuple[str, str]], round: int) -> list[float]:
        """Of each seed that all have, the mean difference over `pairs` of methods."""
        return [fmean(each) for each in zip(*(self.differences(*pair, round) for pair in pairs), strict=True)]

    def differences(self, method: str, against: str, round: int, round_against: int = 0) -> list[float]:
        """Of each seed that both have, the mean difference over its clients."""
        own, other = self.values[method, round], self.values[against, round_against or round]
        seeds = sorted({seed for seed, _ in own} & {seed for seed, _ in other})
        return [fmean(own[key] - other[key] for key in own if key[0] == seed) for seed in seeds]


class RoundCosts:
    """The lines of a CSV of round_costs.py: what runs have cost up to each round."""

    def __init__(self, name: str) -> None:
        self.values: dict[str, dict[int, dict[str, float]]] = {}
        with (RESULTS / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                self.values.setdefault(row["method"], {})[int(row["round"])] = {key: float(row[key]) for key in MEASURES}

    def total(self, method: str, measure: str) -> float:
        return max(each[measure] for each in self.values[method].values())

    def least(self, methods: list[str], measure: str) -> float:
        """The lowest total of `methods`."""
        return min(self.total(method, measure) for method in methods)

    def share_before(self, method: str, measure: str) -> float:
        """The share of the total that is spent before the first round."""
        return self.values[method][0][measure] / self.total(method, measure)

    def round(self, method: str, measure: str, budget: float) -> float:
        """The number of rounds after which `budget` is spent, with fractions; the last round, where it is never spent."""
        rounds = sorted(self.values[method])
        return float(np.interp(budget, [self.values[method][round][measure] for round in rounds], rounds))


def told_apart(differences: Mapping[str, list[float]], corrected: bool = True) -> list[str]:
    """The names of those whose mean over seeds is told from 0 at 5 %; corrected: by Holm, for all of them."""
    return names_told_apart({name: difference(of) for name, of in differences.items()}, corrected)


def difference(values: list[float]) -> stats.Difference:
    """Their mean over seeds."""
    return stats.Difference(fmean(values), stdev(values) / len(values) ** 0.5, len(values) - 1, len(values))


def names_told_apart(differences: Mapping[str, stats.Difference], corrected: bool) -> list[str]:
    p = [each.p for each in differences.values()]
    found = zip(differences, stats.holm(p) if corrected else p, strict=True)
    return [name for name, value in found if value is not None and value < 0.05]


def interval(values: list[float], sign: bool = False, digits: int = 1) -> str:
    """The mean and the half-width of a 95 % t interval; without it for a single value; "–" for none."""
    if not values:
        return "–"
    mean = signed(fmean(values), digits) if sign else f"{fmean(values):.{digits}f}"
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


def signed(value: float, digits: int) -> str:
    return f"{'−' if round(value, digits) < 0 else '+' if round(value, digits) > 0 else ''}{abs(value):.{digits}f}"


@cache
def reference_lines() -> tuple[tuple[str, str, str, float], ...]:
    """Table, line, task ("" for all) and value, of each seed."""
    with (RESULTS / "reference_lines.csv").open(newline="") as file:
        return tuple((row["table"], row["line"], row["task"], float(row["value"])) for row in csv.DictReader(file))


@cache
def lost() -> dict[tuple[str, str], dict[str, str]]:
    """Run file and task → what a run of it loses, in per cent."""
    with (RESULTS / "lost.csv").open(newline="") as file:
        return {(row["run_file"], row["task"]): row for row in csv.DictReader(file)}


def ability(model: str, task: str) -> str:
    """Bits per byte of a model, or its right answers to a task in %, their interval and number of items: smol/abilities.csv."""
    with (RESULTS / "smol/abilities.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if (row["model"], row["task"]) == (model, task))
    if task == "bits_per_byte":
        return f"{float(row['value']):.3f}"
    value, low, high = (f"{100 * float(row[name]):.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}], n = {row['items']}"


@cache
def training(build: str) -> dict[str, Any]:
    """The training.json of a build of smol, with what is computed from it, before and after healing."""
    report: dict[str, Any] = json.loads((RESULTS / f"smol/{build}-training.json").read_text())
    for point in (report["before"], report["after"]):
        own, control = point["bits_per_byte"], point["control_bits_per_byte"]
        others = own.keys() - {"mean", "wikitext2_valid"}
        point["over"] = {text: own[text] - control[text] for text in sorted(others)}
        point["over_others"] = fmean(point["over"].values())
        point["wikitext"], point["control_wikitext"] = own["wikitext2_valid"], control["wikitext2_valid"]
        for name, key in (("way_in_error", "error_of_a_layer"), ("way_in_bits", "bits_by_choice")):
            by = point[key]
            point[name] = 100 * (by["random"] - by["routed"]) / (by["random"] - by["oracle"])
    return report


def text_differences(when: str) -> str:
    """smol-384's bits per byte over its control minus smol's, with a t interval over the texts but wikitext2_valid."""
    smol, other = (training(build)[when]["over"] for build in ("smol", "smol-384"))
    return interval([other[text] - smol[text] for text in smol], sign=True, digits=3)


def cut(run_file: str, *tasks: str, share: str = "prompt_tokens_lost") -> str:
    """Per cent of the prompts' tokens that a run file cuts off, from the least to the most of `tasks`."""
    found = sorted(float(lost()[run_file, task][share]) for task in tasks)
    return f"{found[0]:.0f}" if len(found) == 1 or round(found[0]) == round(found[-1]) else f"{found[0]:.0f} to {found[-1]:.0f}"


def ratio(a: float, b: float, digits: int = 2) -> str:
    return f"{a / b:.{digits}f}"


def evenness(method: str, task: str = "") -> str:
    """The coefficient of variation of a method's mean quality over FedMoE's four settings."""
    means = [Table(f"fedmoe/{name}").row(method, task=task).mean for name in SETTINGS]
    return f"{stdev(means) / fmean(means):.3f}"


def reaching(method: str) -> str:
    """How many seeds of three reach 99 % of the target, in each of FedMoE's four settings."""
    return ", ".join(str(Table(f"fedmoe/{name}").row(method, "rounds to 99 % of target").seeds) for name in SETTINGS)


def listed(names: list[str]) -> str:
    """ "a, b and c"; "none" of no names."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "none"


def rendered(template: Path) -> str:
    environment = Environment(loader=FileSystemLoader(PAGES), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.globals |= {"table": cache(Table), "cut": cut, "ratio": ratio, "listed": listed, "evenness": evenness}
    environment.globals |= {"reaching": reaching, "ability": ability, "attacks": Attacks, "clients": Clients}
    environment.globals["round_costs"] = RoundCosts
    environment.globals |= {
        "told_apart": told_apart,
        "difference": difference,
        "interval": interval,
        "training": training,
        "text_differences": text_differences,
    }
    return "".join(f"{line.rstrip()}\n" for line in environment.get_template(template.name).render().splitlines())


def unsourced(template: Path) -> list[str]:
    """Lines of `template` with a decimal number in the text that no comment gives a source for."""
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template.read_text(), flags=re.DOTALL)
    return [line for line in text.splitlines() if DECIMAL.search(line) and not QUOTED.search(line)]


def main() -> int:
    check, failed = "--check" in sys.argv[1:], 0
    for template in sorted(PAGES.glob("*.md.jinja")):
        page, text = RESULTS / template.name.removesuffix(".jinja"), rendered(template)
        computed = len(re.findall(r"\{\{", template.read_text()))
        for line in unsourced(template):
            failed += 1
            print(f"{template.name}: a figure without a source: {line}")
        if not check:
            page.write_text(text)
        elif page.read_text() != text:
            failed += 1
            lines = zip_longest(page.read_text().splitlines(), text.splitlines(), fillvalue="(nothing)")
            wrong = next(pair for pair in lines if pair[0] != pair[1])
            print(f"{page.name}: says\n  {wrong[0]}\nand its CSVs give\n  {wrong[1]}")
        print(f"{page.name}: {computed} expressions computed from CSVs")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
