import json
from pathlib import Path

import pytest

from fedexperts.report import comparison_figures, experts_map, figure_numbers, measures, resources, retention, run_figures, scores
from fedexperts.report.read import grouped, read, read_all
from fedexperts.report.traces import MANY_CLIENTS

from .fake import TASKS, write_comparison, write_run


def held_at(client: dict, round: int) -> list[str] | None:
    """What page.js does."""
    until = [masks for since, masks in client["holds"] if since <= round]
    return until[-1] if until else None


def test_the_map_gives_back_what_each_client_held_in_each_round(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=6))
    data = experts_map.experts_map("fedmoe", run)
    clients = {client["name"]: client for client in data["clients"]}
    checked = 0
    for row in (row for row in run.rounds if row.task == "train"):
        for name, holds in row.holds.items():
            masks = held_at(clients[name], row.round)
            assert masks is not None
            for mask, experts in zip(masks, holds.values(), strict=True):
                assert [expert for expert in range(16) if int(mask, 16) >> expert & 1] == list(experts)
                checked += 1
    assert checked == 6 * 4 * 4  # rounds, clients in each, layers
    assert data["rounds"] == [1, 2, 3, 4, 5, 6]


def test_the_map_repeats_nothing_that_did_not_change(tmp_path: Path):
    run = read(write_run(tmp_path, method="fedavg", rounds=6))
    assert [len(client["holds"]) for client in experts_map.experts_map("fedavg", run)["clients"]] == [1] * 8


def test_layers_are_numbered_only_where_the_numbers_tell_them_apart():
    assert retention.block_labels(["model.layers.1.mlp", "model.layers.3.mlp"]) == {
        "model.layers.1.mlp": "layer 1",
        "model.layers.3.mlp": "layer 3",
    }
    both = ["encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp"]
    assert retention.block_labels(both) == {name: name for name in both}


def test_curves_show_each_task_each_client_and_the_mean(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=4))
    names = [trace.name for trace in run_figures.curves(run, "rounds", "%").drawing.data]
    assert names == [
        *(f"{client}: {task}" for task in TASKS for client in scores.clients_of(run, task)),
        *(f"{task} ({metric})" for task, metric in TASKS.items()),
        "mean over tasks",
    ]
    assert len(names) == 8 + 4 + 1


def test_over_bytes_a_curve_lies_where_the_ledger_says(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=4))
    mean = run_figures.curves(run, "bytes", "%").drawing.data[-1]
    counted = [
        sum(row.bytes_down + row.bytes_up for row in resources.cost_rows(run) if row.round <= number) / 1e6
        for number in (0, 2, 4)
    ]
    assert list(mean.x) == pytest.approx(counted)


def test_over_virtual_time_a_curve_lies_where_the_rounds_end(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=4, clock=True))
    mean = run_figures.curves(run, "virtual time", "%").drawing.data[-1]
    assert list(mean.x) == [20, 20 + 21 + 22, 20 + 21 + 22 + 23 + 24]  # stage 0, rounds 1 to 4


def test_a_run_without_a_clock_has_no_curve_over_virtual_time(tmp_path: Path):
    timed, other = (read(write_run(tmp_path / name, rounds=4, clock=name == "a")) for name in ("a", "b"))
    assert not run_figures.curves(other, "virtual time", "%").drawing.data
    assert [len(group) for group in (run_figures.one_run(timed)["quality"], run_figures.one_run(other)["quality"])] == [3, 2]
    drawn = comparison_figures.compared({"fedmoe": [timed], "centralized": [other]}, None, "virtual time").drawing.data
    assert [trace.name for trace in drawn] == ["fedmoe"]


def test_a_band_is_drawn_only_where_there_are_seeds_for_it(tmp_path: Path):
    several = grouped(read_all([write_comparison(tmp_path / "three", methods=("fedmoe",), seeds=3)]))
    single = grouped(read_all([write_comparison(tmp_path / "one", methods=("fedmoe",), seeds=1)]))
    assert [trace.fill for trace in comparison_figures.compared(several, None, "rounds").drawing.data] == ["toself", None]
    assert [trace.fill for trace in comparison_figures.compared(single, None, "rounds").drawing.data] == [None]


def test_the_front_leaves_out_what_costs_more_and_is_not_better():
    points = [(5.0, 80.0), (1.0, 40.0), (3.0, 70.0), (4.0, 60.0), (3.0, 65.0)]
    assert comparison_figures.front(points) == [(1.0, 40.0), (3.0, 70.0), (5.0, 80.0)]
    assert comparison_figures.front([(1.0, 9.0), (2.0, 3.0), (3.0, 5.0)], higher_is_better=False) == [(1.0, 9.0), (2.0, 3.0)]


def test_names_are_no_markup_for_plotly(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=2, clients=["<b>a</b>", "b"]))
    bars = run_figures.bytes_by_client(run).drawing.data[0]
    assert list(bars.y) == ["&lt;b&gt;a&lt;/b&gt;", "b"]


def test_more_clients_than_can_be_seen_are_drawn_in_part_and_said_so(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=1, clients=[f"c{number:03}" for number in range(70)]))
    figure = run_figures.bytes_by_client(run)
    assert len(figure.drawing.data[0].y) == MANY_CLIENTS
    assert "the first 60 of 70 clients" in figure.caption


def test_the_map_says_who_trained_what_and_leaves_out_who_failed(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=6))
    trained = {client["name"]: client["trained"] for client in experts_map.experts_map("fedmoe", run)["clients"]}
    assert sum(map(len, trained.values())) == 6 * 4 - 1  # one client failed, in round 5
    assert {masks for rounds in trained.values() for _, masks in rounds} == {None}  # all that they held


def test_every_figure_has_its_numbers(tmp_path: Path):
    single = run_figures.one_run(read(write_run(tmp_path / "one", rounds=4, clock=True, retained=True)))
    several = comparison_figures.several(grouped(read_all([write_comparison(tmp_path / "several", seeds=2, retained=True)])))
    tables = [figure_numbers.numbers_table(figure) for group in (*single.values(), *several.values()) for figure in group]
    assert len(tables) > 20
    for table in tables:
        assert table.rows, table.title
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title


def test_the_numbers_of_a_figure_are_those_it_is_drawn_from(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=4, clients=["<b>", "c", "d"]))
    by_client = figure_numbers.numbers_table(run_figures.bytes_by_client(run))
    assert by_client.columns == ("client", "down", "up")
    assert [row[0] for row in by_client.rows] == ["<b>", "c", "d"]
    assert float(by_client.rows[0][1]) == pytest.approx(resources.bytes_down(resources.cost_rows(run, "<b>")) / 1e6, rel=1e-5)
    over_rounds = figure_numbers.numbers_table(run_figures.curves(run, "rounds", "%"))
    assert over_rounds.columns == ("round", "0", "2", "4")
    assert over_rounds.rows[-1][0] == "mean over tasks"
    other = read(write_run(tmp_path / "other", method="fedavg", rounds=4))
    tradeoff = figure_numbers.numbers_table(comparison_figures.tradeoff({"fedmoe": [run], "fedavg": [other]}, measures.SENT))
    assert tradeoff.columns == ("of", "sent in total (MB)", "overall (%)")


def test_the_spread_goes_from_the_worst_client_to_the_best(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=4))
    drawn = {trace.name: list(trace.y) for trace in run_figures.spread_over_rounds(run).drawing.data}
    assert list(drawn) == ["best client", "upper quartile", "median client", "lower quartile", "worst client"]
    for ends in zip(*drawn.values(), strict=True):
        assert list(ends) == sorted(ends, reverse=True)
    (box,) = comparison_figures.spread({"fedmoe": [run]}).drawing.data
    assert (box.lowerfence[0], box.upperfence[0]) == (drawn["worst client"][-1], drawn["best client"][-1])


def test_clients_that_hold_the_same_need_no_map_of_their_overlap(tmp_path: Path):
    same, other = (read(write_run(tmp_path / name, method=name, rounds=4)) for name in ("fedavg", "random_moe"))
    assert not run_figures.overlap(same).drawing.data
    (map,) = run_figures.overlap(other).drawing.data
    assert [map.z[number][number] for number in range(len(map.z))] == [1.0] * len(map.z)
    assert map.z[0][1] == map.z[1][0] < 1


def test_the_map_has_what_share_of_its_layers_picks_each_expert_got(tmp_path: Path):
    folder = write_run(tmp_path, rounds=2)
    path = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    training = [line for line in lines if line["task"] == "train"]
    client = training[-1]["clients"][0]
    assigned = training[-1]["holds"][client]
    training[-1]["uses"] = {client: {block: [number + 1 for number in range(len(ids))] for block, ids in assigned.items()}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    uses = {each["name"]: each["uses"] for each in experts_map.experts_map("fedmoe", read(folder))["clients"]}
    ((round_of, shares),) = uses.pop(client)
    assert round_of == 2
    assert all(each == [] for each in uses.values())
    for ids, layer in zip(assigned.values(), shares, strict=True):
        assert sum(layer) == pytest.approx(1000, abs=len(layer))
        assert [expert for expert, share in enumerate(layer) if share] == sorted(ids)
        assert layer[max(ids)] == round(1000 * len(ids) / sum(range(1, len(ids) + 1)))


def test_ten_methods_in_eight_colours_are_told_apart_by_their_marks_and_lines(tmp_path: Path):
    run = read(write_run(tmp_path, rounds=4))
    groups = {f"method {number}": [run] for number in range(10)}
    means = [each for each in comparison_figures.tradeoff(groups, measures.SENT).drawing.data if each.name in groups]
    lines = [each for each in comparison_figures.compared(groups, None, "rounds").drawing.data if each.name in groups]
    assert len(means) == len({(each.marker.color, each.marker.symbol) for each in means}) == 10
    assert len(lines) == len({(each.line.color, each.line.dash) for each in lines}) == 10
