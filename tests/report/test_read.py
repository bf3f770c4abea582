import re

import pytest

from fedlora.errors import CheckpointError
from fedlora.report import read_run


def test_a_run_is_read_whole(make_run):
    folder = make_run()
    run = read_run(folder)
    assert run.path == folder
    assert (run.strategy, run.metric, len(run.metrics), len(run.clients)) == ("FlexLoRA", "accuracy", 2, 4)
    assert run.config["client"] == {"lr": 0.001}


def test_a_series_starts_before_training_and_skips_what_was_not_measured(make_run):
    rounds = [
        {"round": 1},
        {"round": 2, "accuracy": None},
        {"round": 3, "accuracy": float("nan")},
        {"round": 4, "accuracy": 0.8},
    ]
    run = read_run(make_run(metrics=rounds))
    assert run.series("accuracy") == [(0, 0.2), (4, 0.8)]
    assert run.series("train_loss") == []


def test_a_torn_last_line_is_skipped(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"round": 3, "note": "é'.encode()[:-1])  # cut inside a character
    assert [row["round"] for row in read_run(folder).metrics] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(make_run):
    folder = make_run()
    file = folder / "clients.jsonl"
    file.write_text(file.read_text().replace("{", "", 1))
    with pytest.raises(CheckpointError, match=re.escape(f"{file}:1: expected one JSON object")):
        read_run(folder)


def test_a_line_that_is_no_object_is_named(make_run):
    folder = make_run()
    file = folder / "metrics.jsonl"
    file.write_text("[1]\n" + file.read_text())
    with pytest.raises(
        CheckpointError, match=re.escape("metrics.jsonl:1: expected one JSON object, found list")
    ):
        read_run(folder)


def test_an_unfinished_run_says_how_to_continue_it(make_run):
    folder = make_run()
    (folder / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"`fedlora run resume={folder}`")):
        read_run(folder)


def test_a_path_that_is_no_folder_is_refused(make_run):
    folder = make_run()
    with pytest.raises(CheckpointError, match="expected the folder of a run, found nothing there"):
        read_run(folder / "nowhere")
    with pytest.raises(CheckpointError, match="expected the folder of a run, found a file"):
        read_run(folder / "summary.json")


@pytest.mark.parametrize("name", ["metrics.jsonl", "clients.jsonl", "config.yaml"])
def test_a_missing_file_is_named(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: a run's folder must hold this file"):
        read_run(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "config.yaml:1: not YAML"),
        ("- 1", "found list"),
        (b"\xff\xff\xff", "config.yaml: not YAML"),
    ],
)
def test_a_broken_config_is_named(make_run, text, message):
    folder = make_run()
    (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        read_run(folder)


def test_every_message_is_one_line(make_run):
    folder = make_run()
    (folder / "summary.json").write_text('{"a":\n\n')
    with pytest.raises(CheckpointError) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
