import csv

import pytest

from fedlora.report import read_run, write_files


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_pictures_and_numbers_lie_beside_the_page(make_run, tmp_path):
    runs = [read_run(make_run(str(s), config={"seed": s}, seed=s, accuracy=0.5 + s / 4)) for s in (0, 1)]
    to = write_files(runs, tmp_path / "report")
    assert {file.name for file in to.glob("*.png")} == {
        "accuracy-over-rounds.png",
        "accuracy-over-traffic.png",
        "aggregation-error-over-rounds.png",
        "clients-1.png",
        "clients-loss.png",
        "loss-over-rounds.png",
    }
    assert [row["seed"] for row in table(to / "runs.csv")] == ["0", "1"]
    assert len(table(to / "rounds.csv")) == 4
    assert table(to / "clients.csv")[0]["examples"] == "240"
    over = table(to / "over-seeds.csv")
    assert [(row["seeds"], row["accuracy"], float(row["accuracy ±"])) for row in over] == [
        ("2", "0.625", pytest.approx(1.588276))
    ]


def test_hidden_counts_and_formulas_do_not_get_out(make_run, tmp_path):
    people = [{"round": 1, "client": 0, "name": "=1+1", "examples": 1, "loss": -0.5, "status": "ok"}]
    run = read_run(make_run(config={"secure_sum": True}, clients=people))
    (row,) = table(write_files([run], tmp_path / "to") / "clients.csv")
    assert (row["name"], row["loss"]) == ("'=1+1", "-0.5")
    assert "examples" not in row
