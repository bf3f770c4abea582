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
