import io

from rich.console import Console

from fedlora.report import read_run, runs_table
from fedlora.report.clients import clients_table
from fedlora.report.tables import (
    Table,
    amounts,
    differences_table,
    megabytes,
    privacy_table,
    provenance_table,
)


def column(table, name):
    return [row[table.header.index(name)] for row in table.rows]


def test_a_single_run_is_a_list_of_facts(make_run):
    facts = dict(runs_table([read_run(make_run(ranks=list(range(1, 101))))]).rows)
    assert facts == {
        "run": "FlexLoRA",
        "model": "minilm",
        "data": "trec",
        "clients": "2",
        "ranks": "1–100",
        "rounds": "2",
        "seed": "0",
        "accuracy": "0.900",
        "best (round)": "0.900 (2)",
        "loss": "0.500",
        "dropped": "1",
        "MB down": "3.00",
        "MB up": "1.00",
        "seconds": "70.0",
        "MB RAM": "900",
        "adapter": "ab12ab12",
    }


def test_what_all_runs_share_is_said_once(make_run):
    table = runs_table([read_run(make_run("a", seed=1)), read_run(make_run("b", seed=2))])
    assert table.note == "In all runs: model minilm; data trec; clients 2; ranks 4; rounds 2; dropped 1."
    assert column(table, "seed") == ["1", "2"]
    assert "model" not in table.header


def test_the_best_perplexity_is_the_lowest(make_run):
    rounds = [{"round": at, "perplexity": value} for at, value in [(1, 20.0), (2, 1012.5), (3, 30.0)]]
    run = read_run(make_run(metric="perplexity", perplexity=30.0, token_accuracy=0.4, metrics=rounds))
    facts = dict(runs_table([run]).rows)
    assert (facts["perplexity"], facts["best (round)"], facts["token accuracy"]) == (
        "30.00",
        "20.00 (1)",
        "0.400",
    )


def test_what_was_not_measured_is_a_dash(make_run):
    quiet = make_run("b", accuracy=None, loss=None, initial=None, metrics=[{"round": 1}], adapter_sha256=None)
    table = runs_table([read_run(make_run("a")), read_run(quiet)])
    for name in ("accuracy", "best (round)", "loss", "adapter"):
        assert column(table, name)[1] == "–"


def test_spent_privacy_is_shown(make_run):
    rounds = [{"round": 1, "epsilon": 1.5}, {"round": 2, "epsilon": 2.25}, {"round": 3, "epsilon": None}]
    assert dict(runs_table([read_run(make_run(metrics=rounds))]).rows)["ε"] == "2.25"


def test_only_differing_settings_have_a_column(make_run):
    table = differences_table([read_run(make_run("a")), read_run(make_run("b", config={"seed": 7}))])
    assert table.header == ["run", "seed"]
    assert table.rows == [["FlexLoRA, seed 0", "0"], ["FlexLoRA, seed 7", "7"]]


def test_clients_of_the_last_round_come_in_order_and_dropped_ones_are_marked(make_run):
    rows = [
        {"round": 1, "client": 5, "name": "early", "status": "ok"},
        {
            "round": 2,
            "client": 10,
            "name": "ten",
            "rank": 8,
            "loss": 0.25,
            "bytes_up": 40_000,
            "status": "ok",
        },
        {"round": 2, "client": 3, "name": "", "rank": 4, "status": "dropped", "reason": "layer 0:\nNaN"},
    ]
    table = clients_table(read_run(make_run(clients=rows)))
    assert table.title == "Clients in round 2"
    assert table.header == ["client", "rank", "training loss", "MB up", "status"]
    assert table.rows == [
        ["3", "4", "–", "–", "dropped: layer 0: NaN"],
        ["ten", "8", "0.250", "0.0400", "ok"],
    ]
    assert table.marked == {0}


def test_versions_are_a_column_only_when_they_differ(make_run):
    old, new = make_run("a"), make_run("b", versions={"fedlora": "0.2.0"})
    same = provenance_table([read_run(old)])
    assert same.rows == [["FlexLoRA", "a", "ab12" * 16]]
    assert same.note == "Made with fedlora 0.1.0, torch 2.9.1."
    assert column(provenance_table([read_run(old), read_run(new)]), "versions")[1] == "fedlora 0.2.0"


def test_a_column_of_amounts_has_equal_decimals():
    assert amounts([71.26, 5.0, None]) == ["71.3", "5.0", "–"]
    assert amounts([1234567.8, float("inf")]) == ["1,234,568", "–"]
    assert amounts([120.0, 0.04, 0.0]) == ["120.00", "0.04", "0.00"]
    assert amounts([0, None]) == ["0", "–"]
    assert megabytes([74_000, 592_000]) == ["0.074", "0.592"]


def test_the_terminal_shows_names_as_they_are(make_run):
    table = runs_table(
        [read_run(make_run("a", model="[red]x[/nope]")), read_run(make_run("b", model="\x1b[31m"))]
    )
    shown = io.StringIO()
    Console(file=shown, width=200).print(table)
    assert "[red]x[/nope]" in shown.getvalue()
    assert "\x1b" not in shown.getvalue()


def test_private_runs_say_what_they_protect_at_what_price_and_what_they_do_not(make_run):
    ledger = {"budget": 8.0, "clip": 0.5, "unit": "record", "valid": True, "adjacency": "one record more"}
    rounds = [{"round": 1, "epsilon": 7.9, "sigma": 1.25, "clipped": 0.75}]
    good = make_run(
        "a", metrics=rounds, epsilon=7.9, delta=1e-5, ledger={**ledger, "not_covered": ["tuning"]}
    )
    bad = make_run("b", metrics=rounds, epsilon=7.9, delta=1e-5, ledger={**ledger, "valid": False})
    table = privacy_table([read_run(good), read_run(make_run("open")), read_run(bad)])
    assert [row[1:] for row in table.rows] == [
        ["record", "7.90", "8.00", "1e-05", "0.5", "1.25", "0.750", noise]
        for noise in ("random", "NOT VALID, from a test seed")
    ]
    assert table.marked == {1}
    assert "one record more" in table.note
    assert "tuning" in table.note
    assert privacy_table([read_run(make_run("c"))]) is None


def test_a_table_in_a_pipe_has_its_columns_whole(capsys):
    Table("t", [f"a rather long heading {n}" for n in range(6)], [["1"] * 6]).show()
    said = capsys.readouterr().out
    assert all(f"a rather long heading {n}" in said for n in range(6))
