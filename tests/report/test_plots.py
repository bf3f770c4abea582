from xml.etree import ElementTree

import pytest

from fedlora.report import plots, read_run


def words(svg):
    """Every text of a picture; parsing shows that it is well-formed."""
    return [text for part in ElementTree.fromstring(svg).iter() if (text := (part.text or "").strip())]


def test_every_picture_names_its_axes(make_run):
    runs = [read_run(make_run())]
    for svg, axes in [
        (plots.metric_over_rounds(runs, "accuracy"), {"round", "accuracy"}),
        (plots.metric_over_traffic(runs, "accuracy"), {"MB sent, down and up", "accuracy"}),
        (plots.loss_over_rounds(runs), {"round", "loss", "on test rows", "in training"}),
        (plots.error_over_rounds(runs), {"round", "aggregation error"}),
    ]:
        assert axes <= set(words(svg))


def test_several_runs_are_named_and_one_is_not(make_run):
    one, other = read_run(make_run("a")), read_run(make_run("b", target="fedlora.strategies.FedIT"))
    assert {"FlexLoRA", "FedIT"} <= set(words(plots.metric_over_rounds([one, other], "accuracy")))
    assert "FlexLoRA" not in words(plots.metric_over_rounds([one], "accuracy"))


def test_nothing_measured_is_no_picture(make_run):
    runs = [read_run(make_run(initial={}, metrics=[{"round": 1}]))]
    assert plots.metric_over_rounds(runs, "accuracy") is None
    assert plots.metric_over_traffic(runs, "accuracy") is None
    assert plots.loss_over_rounds(runs) is None
    assert plots.error_over_rounds(runs) is None


def test_one_run_without_evaluations_leaves_the_other_drawn(make_run):
    quiet = read_run(make_run("a", initial=None, metrics=[{"round": 1, "train_loss": 1.0}]))
    runs = [quiet, read_run(make_run("b"))]
    assert plots.metric_over_rounds(runs, "accuracy") is not None
    assert plots.loss_over_rounds([quiet]) is not None


def test_traffic_adds_up_over_rounds_that_were_not_evaluated(make_run, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "_draw", lambda runs, lines, x, y: seen.extend(lines))
    rounds = [
        {"round": 1, "bytes_down": 2_000_000, "bytes_up": 1_000_000},
        {"round": 2, "bytes_down": 2_000_000, "bytes_up": 0, "accuracy": 0.8},
    ]
    plots.metric_over_traffic([read_run(make_run(metrics=rounds))], "accuracy")
    assert seen == [[(0.0, 0.2), (5.0, 0.8)]]


def test_the_same_runs_give_the_same_bytes(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b"))]
    assert plots.loss_over_rounds(runs) == plots.loss_over_rounds(runs)


@pytest.mark.parametrize("name", ["_hidden", "cost $\\frac{$", "臨床-データ", "<script>--&", "\x07bell"])
def test_any_folder_name_is_drawn_as_it_is(make_run, name):
    runs = [read_run(make_run(f"{name}-{at}")) for at in (1, 2)]
    assert f"FlexLoRA ({name}-2)".replace("\x07", "\ufffd") in words(
        plots.metric_over_rounds(runs, "accuracy")
    )


def test_exact_and_inexact_aggregation_share_a_picture(make_run):
    rounds = [{"round": at, "aggregation_error": error} for at, error in [(1, 0.0), (2, 1e-16), (3, 0.5)]]
    assert plots.error_over_rounds([read_run(make_run(metrics=rounds))]) is not None


def private(epsilon, seed=0, accuracy=0.5, target="fedlora.strategies.FlexLoRA"):
    """The settings, rounds and summary of a run under privacy."""
    rounds = [
        {"round": 1, "accuracy": 0.3, "epsilon": epsilon / 2},
        {"round": 2, "accuracy": accuracy, "epsilon": epsilon},
    ]
    config = {"strategy": {"_target_": target}, "privacy": {"epsilon": epsilon}, "seed": seed}
    ledger = {"budget": epsilon, "unit": "record", "valid": True, "not_covered": ["tuning"], "adjacency": "x"}
    return {"metrics": rounds, "config": config, "epsilon": epsilon, "accuracy": accuracy, "ledger": ledger}


def drawn(monkeypatch):
    found = []
    draw = plots._draw
    monkeypatch.setattr(
        plots, "_draw", lambda runs, lines, x, y: (found.append((lines, x)), draw(runs, lines, x, y))[1]
    )
    return found


def test_one_private_run_is_drawn_round_by_round_over_what_is_spent(make_run, monkeypatch):
    found = drawn(monkeypatch)
    run = read_run(make_run(**private(8.0)))
    assert {"ε spent so far", "accuracy"} <= set(words(plots.metric_over_epsilon([run], "accuracy")))
    assert found[0][0] == [[(4.0, 0.3), (8.0, 0.5)]]


def test_runs_of_several_epsilons_are_a_line_over_epsilon_with_means_over_seeds(make_run, monkeypatch):
    found = drawn(monkeypatch)
    runs = [
        read_run(
            make_run(
                f"{t}-{e}-{s}",
                target=f"fedlora.strategies.{t}",
                **private(e, s, e / 10 + s / 50, f"fedlora.strategies.{t}"),
            )
        )
        for t in ("FlexLoRA", "FedIT")
        for e in (8.0, 1.0)
        for s in (0, 1)
    ]
    shown = set(words(plots.metric_over_epsilon([*runs, read_run(make_run("open"))], "accuracy")))
    assert {"ε of the whole run, at most", "FlexLoRA", "FedIT"} <= shown
    want = [(1.0, pytest.approx(0.11)), (8.0, pytest.approx(0.81))]
    assert found[0][0] == [want, want]


def test_without_privacy_there_is_nothing_to_draw_over_epsilon(make_run):
    assert plots.metric_over_epsilon([read_run(make_run())], "accuracy") is None
