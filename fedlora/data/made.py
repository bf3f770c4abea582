"""Made sentences, for trying a setup out in seconds; no result on them means anything."""

from fedlora.data.dataset import Dataset, Row
from fedlora.seeds import generator
from fedlora.tasks import Classification

_WORDS = {
    "animal": ("cat", "dog", "horse", "goose", "wolf", "mouse"),
    "tool": ("hammer", "saw", "drill", "wrench", "chisel", "file"),
}
_FRAMES = ("a {} is here", "i saw the {}", "where is my {} now", "that {} is old", "the {} and another {}")


def tiny(rows: int = 240, test_rows: int = 60, seed: int = 0) -> Dataset:
    """Short sentences about an animal or a tool; the label says which."""
    rng = generator(seed, "made")
    made = []
    for _ in range(rows + test_rows):
        label = str(rng.choice(list(_WORDS)))
        frame = str(rng.choice(_FRAMES))
        words = rng.choice(_WORDS[label], frame.count("{}"))
        made.append(Row(frame.format(*words), label))
    train, test = made[:-test_rows], made[-test_rows:]
    return Dataset.build("tiny", Classification(), train, test, published=True)
