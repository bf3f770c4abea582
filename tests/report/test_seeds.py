import pytest

from fedlora.cli.main import main
from fedlora.report import read_run, read_runs, seeds_table
from fedlora.report.page import write_report
from fedlora.report.seeds import groups


@pytest.fixture
def six(make_run):
    """Three seeds of one setting, two of another, one alone; a group's seed is a key of its own too."""
    return [
        read_run(
            make_run(f"out-{at}", target, {"seed": seed, "data": {"source": {"seed": seed}}}, accuracy=right)
        )
        for at, (target, seed, right) in enumerate(
            [
                ("x.FedIT", 0, 0.5),
                ("x.FlexLoRA", 0, 0.2),
                ("x.FedIT", 1, 0.6),
                ("x.FedIT", 2, 0.7),
                ("x.FlexLoRA", 1, 0.4),
                ("x.SLoRA", 0, 0.9),
            ]
        )
    ]


def cells(table, row):
    return dict(zip(table.header, table.rows[row], strict=True))


def test_runs_that_differ_in_their_seed_alone_are_one_group(six):
    assert [[run.path.name for run in group] for group in groups(six)] == [
        ["out-0", "out-2", "out-3"],
        ["out-1", "out-4"],
        ["out-5"],
    ]


def test_a_repetition_with_the_same_seed_is_no_other_seed(make_run):
    runs = [read_run(make_run(f"out-{at}")) for at in (1, 2)]
    assert groups(runs) == [[runs[0]], [runs[1]]]
    assert seeds_table(runs) is None


def test_another_setting_is_another_group(make_run):
    runs = [read_run(make_run(f"out-{r}", config={"seed": r, "rounds": r})) for r in (1, 2)]
    assert len(groups(runs)) == 2


def test_a_row_has_the_mean_and_its_interval(six):
    table = seeds_table(six)
    assert cells(table, 0)["accuracy"] == "0.600 ± 0.248"
    assert cells(table, 1)["accuracy"] == "0.300 ± 1.271"
    assert cells(table, 2)["accuracy"] == "0.900"
    assert [cells(table, at)["seeds"] for at in range(3)] == ["3", "2", "1"]


def test_the_effective_rank_is_shown_from_the_first_round_to_the_last(make_run):
    rounds = [
        {"round": r, "effective_rank": rank, "aggregation_error": rank / 100} for r, rank in ((1, 3), (2, 5))
    ]
    runs = [read_run(make_run(f"out-{s}", config={"seed": s}, metrics=rounds)) for s in (0, 1)]
    row = cells(seeds_table(runs), 0)
    assert row["effective rank"] == "3.00 → 5.00"
    assert row["aggregation error"] == "0.050"


def test_there_is_no_table_where_no_setting_has_two_seeds(make_run):
    assert seeds_table([read_run(make_run("a")), read_run(make_run("b", config={"rounds": 9}))]) is None


def test_a_folder_of_runs_is_all_of_them(six):
    above = six[0].path.parent
    assert [run.path.name for run in read_runs(above)] == [f"out-{at}" for at in range(6)]
    assert [run.path for run in read_runs(six[3].path)] == [six[3].path]


def test_the_command_shows_it(six, capsys):
    main(["report", str(six[0].path.parent), "--to", str(six[0].path.parent / "report.html")])
    assert "Over seeds" in capsys.readouterr().out


def test_the_page_has_it(six, tmp_path):
    assert "0.600 ± 0.248" in write_report(six, tmp_path / "page.html").read_text()


def test_no_folder_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "none")])
    assert len(capsys.readouterr().err.splitlines()) == 1
