from fedlora.report import read_run
from fedlora.report.compare import clean, differences, labels


def runs(make_run, *settings):
    return [read_run(make_run(f"out-{at}", **setting)) for at, setting in enumerate(settings)]


def test_different_strategies_need_no_more_than_their_names(make_run):
    group = runs(make_run, {"config": {"seed": 1}}, {"target": "fedlora.strategies.fedit.FedIT"})
    assert labels(group) == ["FlexLoRA", "FedIT"]


def test_runs_of_one_strategy_are_told_apart_by_what_differs(make_run):
    group = runs(
        make_run,
        {"config": {"seed": 0}},
        {"config": {"seed": 1, "client": {"lr": 1e-5}}},
        {"target": "fedlora.strategies.FedIT"},
    )
    assert labels(group) == ["FlexLoRA, lr 0.001, seed 0", "FlexLoRA, lr 1e-05, seed 1", "FedIT"]


def test_a_seed_that_a_group_takes_over_is_told_once(make_run):
    group = runs(make_run, *({"config": {"seed": s, "data": {"source": {"seed": s}}}} for s in (0, 1)))
    assert labels(group) == ["FlexLoRA, seed 0", "FlexLoRA, seed 1"]


def test_repetitions_are_told_apart_by_their_folders(make_run):
    assert labels(runs(make_run, {}, {})) == ["FlexLoRA (out-0)", "FlexLoRA (out-1)"]


def test_folders_of_one_name_are_told_apart_by_their_paths(make_run):
    names = labels([read_run(make_run("a/0")), read_run(make_run("b/0"))])
    assert len(set(names)) == 2


def test_many_differences_give_way_to_folder_names(make_run):
    group = runs(make_run, {"config": dict.fromkeys("abcd", 1)}, {"config": dict.fromkeys("abcd", 2)})
    assert labels(group) == ["FlexLoRA (out-0)", "FlexLoRA (out-1)"]


def test_one_setting_that_tells_all_runs_apart_is_enough(make_run):
    private = {"_target_": "fedlora.privacy.DPSGD", "clip": 1.0, "delta": 1e-5, "accountant": "prv"}
    group = runs(
        make_run,
        *({"config": {"privacy": {**private, "epsilon": e}}} for e in (1.0, 8.0)),
        {"config": {"privacy": {"name": "none"}}},
    )
    assert labels(group) == ["FlexLoRA, epsilon 1.0", "FlexLoRA, epsilon 8.0", "FlexLoRA, epsilon –"]


def test_only_settings_that_differ_are_told(make_run):
    group = runs(
        make_run,
        {"config": {"ranks": [2, 4], "privacy": {"epsilon": None}}},
        {"config": {"ranks": {8: 0.5, 2: 0.5}, "privacy": {"epsilon": 4.0}}},
        {"config": {"ranks": [2, 4], "client": {"_target_": "fedlora.clients.Prox", "lr": 0.001}}},
    )
    assert differences(group) == {
        "client": ["–", "–", "Prox"],
        "privacy.epsilon": ["none", "4.0", "–"],
        "ranks": ["2, 4", "8: 0.5, 2: 0.5", "2, 4"],
    }


def test_text_is_made_safe_to_print():
    assert clean("a\x1b[31m\n b\udcff  臨床") == "a\ufffd[31m b\ufffd 臨床"
