import json
from xml.etree import ElementTree

import pytest

from fedlora.report import draw, plots, read_run, write_report


def words(picture):
    """Every text of a picture; parsing shows that it is well-formed."""
    parts = ElementTree.fromstring(draw.svg(picture.figure)).iter()
    return [text for part in parts if (text := (part.text or "").strip())]


@pytest.fixture
def drawn(monkeypatch):
    """The lines of the pictures that a test has drawn."""
    found, draw_lines = [], plots.lines
    monkeypatch.setattr(plots, "lines", lambda lines, *how: (found.append(lines), draw_lines(lines, *how))[1])
    return found


def test_validation_rows_are_called_so_on_the_whole_page(make_run, tmp_path):
    pages = {}
    for rows in ("test", "validation"):
        run = make_run(rows, config={"evaluate": {"rows": rows}})
        pages[rows] = write_report([read_run(run)], tmp_path / f"{rows}.html").read_text()
    assert "on the validation rows" in pages["validation"]
    assert "test rows" not in pages["validation"]
    assert "on the test rows" in pages["test"]


def test_every_picture_names_its_axes(make_run):
    runs = [read_run(make_run())]
    for picture, axes in [
        (plots.over_rounds(runs, "accuracy"), {"round", "accuracy"}),
        (plots.over_traffic(runs, "accuracy"), {"MB sent, down and up", "accuracy"}),
        (plots.losses(runs), {"round", "loss", "on test rows", "in training"}),
        (plots.aggregation(runs)[0], {"round", "aggregation error"}),
    ]:
        assert axes <= set(words(picture))
        assert "0.2 in round 0" in picture.description or picture.name != "accuracy-over-rounds"


def test_several_runs_are_named_and_one_is_not(make_run):
    one, other = read_run(make_run("a")), read_run(make_run("b", target="fedlora.strategies.FedIT"))
    assert {"FlexLoRA", "FedIT"} <= set(words(plots.over_rounds([one, other], "accuracy")))
    assert "FlexLoRA" not in words(plots.over_rounds([one], "accuracy"))


def test_nothing_measured_is_no_picture(make_run):
    runs = [read_run(make_run(initial={}, metrics=[{"round": 1}], clients=[]))]
    assert plots.results(runs) == plots.aggregation(runs) == plots.by_client(runs) == []
    assert plots.data(runs[0]) is None


def test_one_run_without_evaluations_leaves_the_other_drawn(make_run):
    quiet = read_run(make_run("a", initial=None, metrics=[{"round": 1, "train_loss": 1.0}]))
    assert plots.over_rounds([quiet, read_run(make_run("b", config={"x": 1}))], "accuracy") is not None


@pytest.mark.parametrize(("rounds", "dashed"), [([{"loss": 1.0}], False), ([{"train_loss": 1.0}], False)])
def test_a_dashed_line_is_told_only_where_there_is_one(make_run, rounds, dashed):
    metrics = [{"round": 1, **row} for row in rounds]
    quiet = plots.losses([read_run(make_run("a", initial=None, metrics=metrics))])
    assert "dashed" not in quiet.caption
    assert "dashed" in plots.losses([read_run(make_run("b"))]).caption


def test_traffic_adds_up_over_rounds_that_were_not_evaluated(make_run, drawn):
    rounds = [
        {"round": 1, "bytes_down": 2_000_000, "bytes_up": 1_000_000},
        {"round": 2, "bytes_down": 2_000_000, "bytes_up": 0, "accuracy": 0.8},
    ]
    plots.over_traffic([read_run(make_run(metrics=rounds))], "accuracy")
    assert drawn[0][0].points == [(0.0, 0.2), (5.0, 0.8)]


def test_seeds_are_one_line_in_a_band(make_run, drawn):
    runs = [
        read_run(
            make_run(str(s), config={"seed": s}, initial=None, metrics=[{"round": 1, "accuracy": value}])
        )
        for s, value in enumerate((0.25, 0.5))
    ]
    picture = plots.over_rounds(runs, "accuracy")
    assert [(line.points, line.band) for line in drawn[0]] == [([(1, 0.375)], [(0.25, 0.5)])]
    assert "band" in picture.caption


def test_the_same_runs_give_the_same_bytes(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", config={"x": 1}))]
    assert len({draw.svg(plots.losses(runs).figure) for _ in range(2)}) == 1
    assert draw.png(plots.losses(runs).figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["_hidden", "cost $\\frac{$", "臨床-データ", "<script>--&", "\x07bell"])
def test_any_name_is_drawn_as_it_is(make_run, name):
    runs = [read_run(make_run(str(at), f"x.{name}{at}")) for at in (1, 2)]
    assert f"{name}2".replace("\x07", "\ufffd") in words(plots.over_rounds(runs, "accuracy"))


def test_exact_and_inexact_aggregation_share_a_picture_and_exact_alone_is_a_sentence(make_run):
    rounds = [{"round": at, "aggregation_error": error} for at, error in [(1, 0.0), (2, 1e-16), (3, 0.5)]]
    assert plots.aggregation([read_run(make_run("a", metrics=rounds))])
    exact = [read_run(make_run("b", metrics=rounds[:2]))]
    assert plots.aggregation(exact) == []
    assert plots.exact(exact) == 1e-16


def private(epsilon, seed=0, accuracy=0.5, target="fedlora.strategies.FlexLoRA"):
    """The settings, rounds and summary of a run under privacy."""
    rounds = [
        {"round": 1, "accuracy": 0.3, "epsilon": epsilon / 2},
        {"round": 2, "accuracy": accuracy, "epsilon": epsilon},
    ]
    config = {"strategy": {"_target_": target}, "privacy": {"epsilon": epsilon}, "seed": seed}
    ledger = {"budget": epsilon, "unit": "record", "valid": True, "not_covered": ["tuning"], "adjacency": "x"}
    return {"metrics": rounds, "config": config, "epsilon": epsilon, "accuracy": accuracy, "ledger": ledger}


def test_one_private_run_is_drawn_round_by_round_over_what_is_spent(make_run, drawn):
    run = read_run(make_run(**private(8.0)))
    assert {"ε spent so far", "accuracy"} <= set(words(plots.over_epsilon([run], "accuracy")))
    assert drawn[0][0].points == [(4.0, 0.3), (8.0, 0.5)]


def test_runs_of_several_epsilons_are_a_line_over_epsilon_with_means_over_seeds(make_run, drawn):
    runs = [
        read_run(make_run(f"{t}-{e}-{s}", t, **private(e, s, e / 10 + s / 50, f"fedlora.strategies.{t}")))
        for t in ("FlexLoRA", "FedIT")
        for e in (8.0, 1.0)
        for s in (0, 1)
    ]
    shown = set(words(plots.over_epsilon([*runs, read_run(make_run("open"))], "accuracy")))
    assert {"ε of the whole run, at most", "FlexLoRA", "FedIT"} <= shown
    want = [(1.0, pytest.approx(0.11)), (8.0, pytest.approx(0.81))]
    assert [line.points for line in drawn[0]] == [want, want, [(1.0, 0.9), (8.0, 0.9)]]
    assert [(line.label, line.style, line.at) for line in drawn[0]] == [
        ("FlexLoRA", "-", 0),
        ("FedIT", "-", 1),
        ("", "--", 0),
    ]
    assert "without privacy" in shown


def test_runs_without_privacy_that_differ_in_more_than_their_seed_are_no_line_over_epsilon(make_run, drawn):
    runs = [read_run(make_run(f"e{e}", "F", **private(e, 0, e / 10, "F"))) for e in (8.0, 1.0)]
    free = [read_run(make_run(f"lr{lr}", "F", {"client": {"lr": lr}})) for lr in (0.1, 0.2)]
    plots.over_epsilon([*runs, *free], "accuracy")
    assert len(drawn[0]) == 1


def test_without_privacy_there_is_nothing_to_draw_over_epsilon(make_run):
    assert plots.over_epsilon([read_run(make_run())], "accuracy") is None


def ranked(make_run, ranks, accuracy, target="x.FlexLoRA"):
    people = [{"round": 1, "client": k, "rank": r, "loss": 1.0, "status": "ok"} for k, r in enumerate(ranks)]
    name, held = f"{target}-{ranks}", sorted(set(ranks))
    config = {"ranks": ranks}
    return read_run(make_run(name, target, config, clients=people, ranks=held, accuracy=accuracy))


def test_runs_of_several_ranks_are_a_line_over_rank_and_mixed_ones_a_hollow_point(make_run, drawn):
    runs = [
        ranked(make_run, [8, 8], 0.5),
        ranked(make_run, [2, 2], 0.25),
        ranked(make_run, [2, 8], 0.75),
        ranked(make_run, [2, 8], 0.125, "x.HetLoRA"),
    ]
    picture = plots.over_rank(runs, "accuracy")
    assert [(line.label, line.points, line.style) for line in drawn[0]] == [
        ("FlexLoRA", [(2, 0.25), (8, 0.5)], "-"),
        ("HetLoRA", [(5, 0.125)], ""),
        ("", [(5, 0.75)], ""),
    ]
    assert {"mixed ranks", "2", "8"} <= set(words(picture))
    assert plots.over_rank(runs[:1], "accuracy") is None


def test_the_clients_are_drawn_from_the_worst_on_with_the_same_marker_everywhere(make_run, drawn):
    def people(key, values):
        return [{"round": 2, "client": k, key: value, "status": "ok"} for k, value in enumerate(values)]

    values_of = [("A", "loss", [0.5, 2.0]), ("B", "local_accuracy", [0.75, 0.25]), ("C", "loss", [1.0, 3.0])]
    runs = [read_run(make_run(n, f"x.{n}", clients=people(key, values))) for n, key, values in values_of]
    assert [picture.name for picture in plots.by_client(runs)] == ["clients-local-accuracy", "clients-loss"]
    assert [[(line.label, line.points, line.at) for line in lines] for lines in drawn] == [
        [("B", [(1, 0.25), (2, 0.75)], 1)],
        [("A", [(1, 2.0), (2, 0.5)], 0), ("C", [(1, 3.0), (2, 1.0)], 2)],
    ]


def test_rows_are_drawn_by_label_the_rarest_together(make_run):
    folder = make_run()
    labels = [f"label {at}" for at in range(9)]
    held = [
        {"client": k, "name": f"client-{k}", "rank": 4 + k, "rows": 45, "labels": [9, *range(1, 9)]}
        for k in (0, 1)
    ]
    (folder / "data.json").write_text(json.dumps({"labels": labels, "clients": held}))
    shown = words(plots.data(read_run(folder)))
    assert {"label 0", "label 8", "3 more", "client and its rank"} <= set(shown)
    assert "label 1" not in shown
    hidden = read_run(make_run("b", config={"secure_sum": True}))
    assert plots.data(hidden) is None


@pytest.mark.parametrize("ranks", [[4], [2, 16]])
def test_long_names_of_clients_leave_room_for_the_bars(make_run, ranks):
    folder = make_run()
    named = ["social_i_qa_Show_choices_and_generate_answer", *(f"task number {k}" for k in range(16))]
    held = [
        {"client": k, "name": name, "rank": ranks[k % len(ranks)], "rows": 9, "labels": []}
        for k, name in enumerate(named)
    ]
    (folder / "data.json").write_text(json.dumps({"labels": [], "clients": held}))
    figure = plots.data(read_run(folder)).figure
    assert draw.png(figure)  # matplotlib warns, an error here, where nothing is left for the bars
    assert figure.axes[0].get_position().height > 0.5
    said = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert said[:2] == (
        ["social_i_qa_Show_ch… r2", "task number 0 r16"]
        if ranks[1:]
        else ["social_i_qa_Show_ch…", "task number 0"]
    )


@pytest.mark.parametrize("x", ["round", "client, by place"])
@pytest.mark.parametrize("count", [3, 8, 20, 57])
def test_what_is_counted_has_whole_numbers_on_its_axis(x, count):
    figure = draw.lines([draw.Line("a", [(n, 0.1 * n) for n in range(1, count + 1)])], x, "loss")
    ticks = figure.axes[0].get_xticks()
    assert len(ticks) >= 2
    assert [*ticks] == [round(tick) for tick in ticks]
