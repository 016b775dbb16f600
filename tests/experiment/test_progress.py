"""Progress of a run on a wide and a narrow terminal, without a terminal, and under --quiet."""

from io import StringIO

import pytest
from rich.console import Console

from fedexperts.config import RunConfig
from fedexperts.core.ledger import Entry
from fedexperts.experiment import runner
from fedexperts.experiment.progress import Quiet, Shown
from fedexperts.io.toml import checked
from fedexperts.types import Server


def server(round):
    return Server(weights={}, layout={}, anatomy=None, footprint=None, clients={}, round=round, task="train")


ANSWERED = [
    Entry(2, "c01", "train", 4, bytes_down=8, seconds=0.5, tokens=2000, loss=1.25),
    Entry(2, "c02", "train", 4, bytes_down=8, seconds=0.5, tokens=2000, loss=1.25),
    Entry(2, "c03", "train", 4, bytes_down=8, failed="out of memory"),
]


def shown_after(answers, width, label="fedmoe"):
    """The lines that change on a terminal, after one round of twenty and `answers` of the next."""
    console = Console(file=StringIO(), width=width, force_terminal=True)
    with Shown(console) as shown:
        shown.start(label, 3, 1, 20)
        for entry in ANSWERED[:answers]:
            shown.answered(entry)
        plain = Console(file=StringIO(), width=width, color_system=None)
        plain.print(shown.bar.get_renderable())
    return plain.file.getvalue().splitlines()


def test_a_terminal_shows_rounds_time_left_client_loss_and_speed():
    label, bar, now = shown_after(2, width=100)
    assert label.rstrip() == "fedmoe, seed 3"
    assert bar.split()[1:] == ["1/20", "rounds", "-:--:--", "left"]
    assert now.rstrip() == "round 2, train: c02, 2 answered, loss 1.250, 4,000 tokens/s"


def test_a_client_that_fails_is_shown_without_a_loss():
    *_, now = shown_after(3, width=100)
    assert now.rstrip() == "round 2, train: c03, 3 answered, failed"


@pytest.mark.parametrize("width", [60, 40])
def test_a_narrow_terminal_cuts_long_texts_but_never_the_rounds(width):
    label, bar, now = shown_after(2, width, label="four: fedmoe:adjust=false:patience=5:profile_rounds=2:neighbors=3")
    assert all(len(line) <= width for line in (label, bar, now))
    assert label.endswith("…") and label.startswith("four: fedmoe")
    assert bar.split()[1:] == ["1/20", "rounds", "-:--:--", "left"]
    assert now.startswith("round 2, train: c02")


def test_without_a_terminal_only_permanent_unwrapped_lines_are_written():
    console = Console(file=StringIO(), width=40, force_terminal=False)
    with Shown(console) as shown:
        shown.start("fedmoe", 3, 0, 2)
        for entry in ANSWERED:
            shown.answered(entry)
        shown.failed(server(2), {"c03": "out of memory: it needs 12.0 MB and has 10.0 MB"})
        shown.round(server(2))
    assert console.file.getvalue() == (
        "round 2: c03 failed in train and is left out: out of memory: it needs 12.0 MB and has 10.0 MB\n"
    )


def test_setup_tasks_before_the_rounds_are_not_counted_as_rounds(tiny_tree, tmp_path):
    console = Console(file=StringIO(), width=100, force_terminal=True)
    started = []

    class Noted(Quiet):
        def start(self, label, seed, done, total):
            started.append((done, total))

    with Shown(console) as shown:
        shown.start("fedmoe", 3, 0, 5)
        for number in (0, 0, 1):  # two setup tasks and a round
            shown.round(server(number))
        assert [(task.completed, task.total) for task in shown.bar.tasks] == [(1, 5)]
    tree = {**tiny_tree, "method": {"name": "fedmoe"}, "federation": {"rounds": 2, "clients_per_round": 2}}
    for resume in (False, True):
        runner.run(checked(RunConfig, tree), tmp_path / "run", resume=resume, progress=Noted())
    assert started == [(0, 2), (2, 2)]
