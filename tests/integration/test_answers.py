import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.training.generation import exact, rouge_l

pytestmark = [
    pytest.mark.slow,  # whole runs
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft and transformers about each other
]
TASKS = {"upper": "OK", "lower": "no"}  # and what is always answered


@pytest.fixture(scope="module")
def words(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job of two tasks, a file each."""
    at = tmp_path_factory.mktemp("tasks")
    for part, numbers in (("train", range(40)), ("test", range(40, 46))):
        (at / part).mkdir()
        for task, said in TASKS.items():
            rows = [{"q": f"{task} {i}", "a": said} for i in numbers]
            (at / part / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "model=hub",
        f"model.path='{llama}'",
        "data=files",
        f"data.train='{at / 'train'}'",
        f"data.test='{at / 'test'}'",
        "data.partition=natural",
        "data.prompt=q",
        "data.response=a",
        "clients=2",
        "ranks=4",
        "rounds=2",
        "client.steps=30",
        "client.lr=1e-2",
        "evaluate.answers=8",
    ]


@pytest.fixture(scope="module")
def asked(run: Callable[..., Any], words: list[str]) -> Any:
    return run(*words, base=())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "answers.jsonl").read_text("utf-8").splitlines()]


def test_training_makes_answers_right_and_the_summary_says_so(asked: Any) -> None:
    summary, written = asked.summary, lines(asked.path)
    assert (summary["answered"], summary["initial"]["answered"], len(written)) == (8, 8, 8)
    assert summary["initial"]["exact_match"] == 0
    assert summary["exact_match"] > 0.4
    assert summary["exact_match"] == pytest.approx(sum(line["exact"] for line in written) / 8)
    assert summary["rouge_l"] == pytest.approx(sum(line["rouge_l"] for line in written) / 8)
    assert summary["answers"].keys() == summary["initial"]["answers"].keys() == TASKS.keys()
    assert all(found["answered"] == 4 for found in summary["answers"].values())


def test_a_line_says_what_was_asked_expected_and_answered(asked: Any) -> None:
    for line in lines(asked.path):
        own = line["row"] - 6 * (line["client"] == "upper")  # files in the order of their names
        assert (line["prompt"], line["expected"]) == (f"{line['client']} {40 + own}", TASKS[line["client"]])
        assert line["exact"] == exact(line["answer"], line["expected"])
        assert line["rouge_l"] == rouge_l(line["answer"], line["expected"])


def test_the_answers_are_those_of_plain_peft_with_the_runs_adapter(asked: Any, llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(plain, str(asked.path / "adapter")).eval()
    for line in lines(asked.path):
        prompt = tokenizer(line["prompt"] + "\n", return_tensors="pt")
        with torch.no_grad():
            said = model.generate(
                input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=3
            )
        text = tokenizer.decode(said[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert text.strip() == line["answer"]


def test_the_closing_words_name_both_scores_and_the_file(asked: Any) -> None:
    from fedlora.runner.results import closing

    said = closing(asked.path)
    assert f"exact match {asked.summary['exact_match']:.3f} (base 0.000), ROUGE-L" in said
    assert str(asked.path / "answers.jsonl") in said


def test_a_deployment_brings_home_all_of_the_result(asked: Any) -> None:
    from fedlora.deploy.server import BROUGHT

    ours = {"config.yaml", "data.json", "checkpoint"}  # the user's own, what sites know, and brought apart
    assert {path.name for path in asked.path.iterdir()} - ours <= {*BROUGHT}


def test_a_run_that_goes_on_answers_anew(asked: Any, result: Any, tmp_path: Path, capsys: Any) -> None:
    from fedlora.cli.main import main

    copy = shutil.copytree(asked.path, tmp_path / "copy")
    (copy / "answers.jsonl").write_text("stale")
    main(["run", f"resume={copy}", "rounds=3"])
    assert len(lines(copy)) == 8
    assert result(copy).summary["initial"] == asked.summary["initial"]
    assert "exact match" in capsys.readouterr().out


def test_without_answers_nothing_is_said(run: Callable[..., Any], words: list[str]) -> None:
    found = run(*words, "evaluate.answers=0", "rounds=1", "client.steps=1", base=())
    assert not (found.path / "answers.jsonl").exists()
    assert not {"exact_match", "rouge_l", "answers", "answered"} & {*found.summary, *found.summary["initial"]}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("data=tiny", "model=tiny"), "evaluate.answers: a text classifier writes no text, its accuracy"),
        (("strategy=fedsalora",), "evaluate.answers: the result of FedSALoRA is a model for each client"),
        (("evaluate.answers=-1",), "evaluate.answers: expected a number of test rows.*got -1"),
    ],
)
def test_answers_that_nobody_could_give_are_refused(
    words: list[str], more: tuple[str, ...], why: str, tmp_path: Path, capsys: Any
) -> None:
    from fedlora.cli.main import main

    given = [word for word in words if not (more[0] == "data=tiny" and word.startswith(("data", "model")))]
    with pytest.raises(SystemExit) as caught:
        main(["run", *given, *more, f"out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(said.splitlines()) == 1
    assert re.search(why, said)
    assert not (tmp_path / "out").exists()
