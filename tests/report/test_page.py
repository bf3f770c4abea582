import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from fedlora.errors import ConfigError
from fedlora.report import read_run, write_report


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page(tmp_path, *folders):
    return Page(
        write_report([read_run(folder) for folder in folders], tmp_path / "report.html").read_text("utf-8")
    )


def test_one_run_is_told_in_one_sentence(make_run, tmp_path):
    shown = page(tmp_path, make_run())
    assert (
        "FlexLoRA reached 0.900 accuracy on trec after 2 rounds (0.200 before training), 4.00 MB sent."
        in shown.text
    )
    assert "ab12" * 16 in shown.text
    assert "torch 2.9.1" in shown.text


def test_the_page_is_whole_and_fetches_nothing(make_run, tmp_path):
    shown = page(tmp_path, make_run())
    assert shown.open == []
    pictures = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert len(pictures) == 6
    for picture in pictures:
        assert picture["src"].startswith("data:image/svg+xml;base64,")
        assert picture["alt"]
    assert sum("in round 2" in picture["alt"] for picture in pictures) == 3
    assert [attributes for tag, attributes in shown.tags if tag == "script"] == [{}]
    assert not {"link", "iframe"} & {tag for tag, _ in shown.tags}
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_the_best_of_several_runs_is_named(make_run, tmp_path):
    worse = make_run("b", target="fedlora.strategies.FedIT", accuracy=0.8)
    shown = page(tmp_path, worse, make_run("a"))
    assert "Best of 2: FlexLoRA reached 0.900 accuracy" in shown.text


def test_level_runs_are_called_level(make_run, tmp_path):
    shown = page(tmp_path, make_run("a"), make_run("b", target="fedlora.strategies.FedIT"))
    assert "4.00 MB sent (level with FedIT)." in shown.text


def test_the_best_perplexity_is_the_lowest(make_run, tmp_path):
    facts = {"metric": "perplexity", "initial": {"perplexity": 81.5}}
    rounds = [{"round": 1, "perplexity": 12.0}]
    low = make_run("a", metrics=rounds, perplexity=12.0, rounds=1, **facts)
    high = make_run("b", target="fedlora.strategies.FedIT", metrics=rounds, perplexity=30.0, **facts)
    shown = page(tmp_path, high, low)
    assert "Best of 2: FlexLoRA reached perplexity 12.00 on trec after 1 round (81.50 before" in shown.text


@pytest.mark.parametrize(
    "other", [{"data": "sst2"}, {"model": "tiny"}, {"metric": "perplexity"}, {"accuracy": None}]
)
def test_runs_that_cannot_be_compared_have_no_best(make_run, tmp_path, other):
    shown = page(tmp_path, make_run("a"), make_run("b", **other))
    assert "none is called the best" in shown.text


def test_a_run_without_evaluations_says_so(make_run, tmp_path):
    folder = make_run(accuracy=None, loss=None, initial=None, metrics=[{"round": 1}], clients=[])
    shown = page(tmp_path, folder)
    assert "FlexLoRA finished 2 rounds on trec without a measured accuracy, 4.00 MB sent." in shown.text
    assert "img" not in [tag for tag, _ in shown.tags]


def test_dropped_clients_stand_out(make_run, tmp_path):
    rows = [{"round": 2, "client": 0, "name": "a", "status": "dropped", "reason": "late"}]
    shown = page(tmp_path, make_run(clients=rows))
    assert "dropped: late" in shown.text
    assert ("tr", {"class": "marked"}) in shown.tags


def test_names_cannot_become_markup(make_run, tmp_path):
    evil = '"><script>alert(1)</script>$x'
    rows = [{"round": 2, "client": 0, "name": evil, "status": "dropped", "reason": evil}]
    settings = {"a": evil, evil: 1}
    folders = [
        make_run(
            f"{at}-<script>", f"x.{evil}", config=settings | {"b": at}, clients=rows, data=evil, model=evil
        )
        for at in range(2)
    ]
    shown = page(tmp_path, *folders)
    assert [tag for tag, _ in shown.tags].count("script") == 1  # ours
    assert shown.open == []
    assert evil in shown.text


def test_names_in_any_script_are_kept(make_run, tmp_path):
    shown = page(tmp_path, make_run("a", data="臨床メモ"), make_run("b-ü", data="臨床メモ"))
    assert "2 runs on 臨床メモ" in shown.text
    assert "b-ü" in shown.text


def test_the_page_replaces_the_old_one_at_once(make_run, tmp_path):
    target = tmp_path / "new" / "report.html"
    run = read_run(make_run())
    assert write_report([run], target) == target
    target.write_text("old")
    write_report([run], target)
    assert [file.name for file in target.parent.iterdir()] == ["report.html"]
    assert re.match("<!DOCTYPE html>", target.read_text())


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected one run folder or more, got none"):
        write_report([], tmp_path / "report.html")


def test_the_best_of_several_seeds_is_a_mean_and_not_the_luckiest_of_them(make_run, tmp_path):
    scores = [("x.FedIT", 0, 0.5), ("x.FedIT", 1, 0.9), ("x.SLoRA", 0, 0.75), ("x.SLoRA", 1, 0.75)]
    folders = [make_run(f"{t}-{s}", t, {"seed": s}, accuracy=value) for t, s, value in scores]
    assert (
        "Best mean of 2: SLoRA reached accuracy 0.750 ± 0.000 on trec over 2 seeds."
        in page(tmp_path, *folders).text
    )


def test_a_single_run_shows_what_is_not_the_default(make_run, tmp_path):
    run = read_run(make_run(config={"rounds": 9, "seed": 0, "own": 1}))
    usual = {"rounds": 5, "seed": 0, "only": "default", "strategy": {"_target_": "x.FedIT"}}
    shown = Page(write_report([run], tmp_path / "page.html", usual).read_text("utf-8"))
    table = shown.text[shown.text.index("What differs from the defaults") :]
    for cells in ("rounds59", "own–1", "strategyFedITFlexLoRA"):
        assert cells in table
    assert "only" not in table
    assert "from the defaults" not in page(tmp_path, run.path).text


def test_a_collapse_stands_above_everything(make_run, tmp_path):
    rounds = [{"round": at, "tail_kept": 0.5} for at in (2, 3)]
    shown = page(tmp_path, make_run(metrics=rounds, ranks=[2, 8]))
    alarm = "Rank collapse in FlexLoRA: a round keeps 50% of what the update holds beyond rank 2"
    assert shown.text.index(alarm) < shown.text.index("The run")
    assert ("p", {"class": "alarm"}) in shown.tags


SECTIONS = {
    "Over seeds": "scroll note details scroll note",
    "Answers": "scroll note",
    "Privacy": "scroll note",
    "Fairness": "scroll note pictures",
    "Aggregation": "pictures note",
    "Clients": "details h3 scroll h3 scroll details pictures h3 scroll h3 scroll",
    "Left out": "scroll",
    "What differs": "scroll",
    "Adapters and versions": "scroll note",
}


def test_the_parts_of_the_page_come_in_their_order(make_run, tmp_path):
    # Repetitions over seeds, a private run, answers, a collapse and a dropped client: every part at once.
    rounds = [{"round": at, "accuracy": at / 9, "tail_kept": 0.5} for at in (1, 2)]
    dropped = [{"round": 2, "client": 0, "name": "a", "rank": 4, "loss": 1.0, "status": "dropped"}]
    ledger = {"unit": "record", "budget": 8.0, "clip": 1.0, "valid": True}
    private = {"ledger": ledger, "epsilon": 7.5, "delta": 1e-5, "exact_match": 0.5, "ranks": [8]}
    write_report(
        [
            read_run(make_run("a", metrics=rounds, clients=dropped, ranks=[2, 8])),
            read_run(make_run("b", config={"seed": 1}, metrics=rounds, ranks=[2, 8])),
            read_run(make_run("c", "x.FedIT", {"own": 1}, **private)),
        ],
        tmp_path / "report.html",
    )
    before, *sections = re.split("<h2>", (tmp_path / "report.html").read_text("utf-8"))
    assert " ".join(re.findall(r'class="(result|alarm|pictures)"', before)) == "result alarm pictures"
    part = re.compile(r'<(?:p|div) class="(pictures|scroll|note)"|<(details|h3)>')
    found = {text.partition("</h2>")[0]: part.findall(text) for text in sections}
    assert {name: " ".join(map("".join, parts)) for name, parts in found.items()} == SECTIONS
    assert [*found] == [*SECTIONS]


def test_the_policy_allows_the_page_s_script_and_no_other(make_run, tmp_path):
    write_report([read_run(make_run())], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in text
    assert "default-src 'none'" in text
