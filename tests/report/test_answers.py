from fedlora.report import read_run
from fedlora.report.answers import answers_table
from fedlora.report.page import write_report

BASE = {"answered": 4, "exact_match": 0.25, "rouge_l": 0.3, "answers": {}}
OWN = {
    "sums": {"answered": 1, "exact_match": 1.0, "rouge_l": 1.0},
    "<b>news": {"answered": 3, "exact_match": 0.5, "rouge_l": 0.6},
}
BEFORE = {"sums": {"answered": 1, "exact_match": 0.0, "rouge_l": 0.125}, "<b>news": {"answered": 3}}


def test_one_run_shows_base_and_final_for_all_and_by_client(make_run):
    initial = {**BASE, "answers": BEFORE}
    run = read_run(
        make_run(
            answered=4, exact_match=0.625, rouge_l=0.7, answers=OWN, initial=initial, metric="perplexity"
        )
    )
    table = answers_table([run])
    assert table.header == ["of", "answers", "exact match, base", "exact match", "ROUGE-L, base", "ROUGE-L"]
    assert table.rows == [
        ["all", "4", "0.250", "0.625", "0.300", "0.700"],
        ["sums", "1", "0.000", "1.000", "0.125", "1.000"],
        ["<b>news", "3", "–", "0.500", "–", "0.600"],
    ]
    page = write_report([run], run.path / "page.html").read_text()
    assert "<h2>Answers</h2>" in page
    assert "&lt;b&gt;news" in page
    assert "<b>news" not in page


def test_several_runs_are_a_row_each_and_those_without_answers_none(make_run):
    one = read_run(make_run("one", answered=2, exact_match=0.5, rouge_l=0.5, initial=BASE))
    two = read_run(make_run("two", target="fedlora.strategies.FedIT", exact_match=0.0, rouge_l=0.1))
    silent = read_run(make_run("three", target="fedlora.strategies.FLoRA"))
    table = answers_table([one, two, silent])
    assert [row[0] for row in table.rows] == ["FlexLoRA", "FedIT"]
    assert table.rows[0][1:] == ["2", "0.250", "0.500", "0.300", "0.500"]
    assert answers_table([silent]) is None
