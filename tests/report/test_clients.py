import json

import pytest

from fedlora.report import read_run
from fedlora.report.alarms import collapses
from fedlora.report.clients import clients_table, fairness_table, left_out_table, ranks_table, thinned


def rows(*each):
    return [{"round": 1, "status": "ok", "rank": 4, **row, "client": at} for at, row in enumerate(each)]


def column(table, name):
    return [row[table.header.index(name)] for row in table.rows]


@pytest.mark.parametrize("hidden", [{"secure_sum": True}, {"privacy": {"public_counts": False}}])
def test_a_number_of_rows_that_is_hidden_is_not_shown_as_one(make_run, hidden):
    people = rows({"examples": 1, "steps": 6.0, "loss": 1.0})
    run = read_run(make_run("a", config=hidden, clients=people))
    assert "examples" not in clients_table(run).header
    assert ranks_table(run).header == ["rank", "clients"]
    assert "examples" in clients_table(read_run(make_run("b", clients=people))).header


def test_steps_are_whole(make_run):
    table = clients_table(read_run(make_run(clients=rows({"steps": 6.0}, {"steps": 1234.0}))))
    assert column(table, "steps") == ["6", "1,234"]


def test_those_that_did_not_count_are_listed_with_the_last_reason(make_run):
    def line(at, **more):
        return {"round": at, "client": 3, "rank": 4, **more}

    log = [
        line(1, status="ok", rejected="score 7"),
        line(2, status="ok"),
        line(3, status="ok", rejected="score 9"),
        line(4, status="dropped", reason="late"),
    ]
    run = read_run(make_run(clients=log))
    assert left_out_table([run]).rows == [
        ["3", "rejected", "2", "1–3", "score 9"],
        ["3", "dropped", "1", "4", "late"],
    ]
    assert clients_table(run).marked == {0}
    assert left_out_table([read_run(make_run("b"))]) is None


def test_ranks_and_rows_are_counted_from_what_the_run_knew_of_its_clients(make_run):
    folder = make_run()
    held = [
        {"client": k, "rank": r, "rows": n, "labels": []} for k, (r, n) in enumerate([(2, 5), (8, 9), (2, 7)])
    ]
    (folder / "data.json").write_text(json.dumps({"labels": [], "clients": held}))
    assert ranks_table(read_run(folder)).rows == [["2", "2", "12", "5–7"], ["8", "1", "9", "9"]]


def test_fairness_is_spread_and_worst_decile_of_what_clients_reached_at_the_end(make_run):
    people = rows(*({"local_accuracy": 0.0, "loss": 1.0} for _ in range(20)))
    own = {str(at): {"local_accuracy": at / 20} for at in range(20)}
    table = fairness_table([read_run(make_run(clients=people, own=own))])
    assert table.rows == [["local accuracy", "20", "0.475", "0.288", "0.025", "0 (0.000)"]]


def test_without_own_metrics_the_training_loss_tells_and_its_worst_is_the_highest(make_run):
    runs = [
        read_run(make_run(str(s), config={"seed": s}, clients=rows({"loss": 1.0}, {"loss": 3.0 + s})))
        for s in (0, 2)
    ]
    table = fairness_table(runs)
    assert column(table, "worst decile") == ["4.000 ± 12.706"]
    assert column(table, "worst client") == ["1 (3.000)"]
    assert fairness_table([read_run(make_run("none", clients=rows({})))]) is None


@pytest.mark.parametrize(
    ("kept", "called"), [([0.5, 0.89, 1.5], True), ([0.5, 0.91, 1.5], False), ([], False)]
)
def test_collapse_is_called_by_the_median_round(make_run, kept, called):
    rounds = [{"round": at, "tail_kept": value} for at, value in enumerate(kept, start=2)]
    assert bool(collapses([read_run(make_run(metrics=rounds, ranks=[2, 8]))])) is called


def test_few_clients_are_all_drawn_and_of_many_an_even_sample_by_their_rows() -> None:
    few = {at: {"rows": 7 - at % 3} for at in range(200)}
    assert thinned(few) == (few, "")
    many = {at: {"rows": (37 * at) % 1000} for at in range(1000)}
    drawn, said = thinned(many)
    assert [row["rows"] for row in drawn.values()] == list(range(0, 1000, 5))
    assert "One in 5 of 1000" in said
