"""Values survive the way to bytes and back; a name in a message makes nobody import or run anything."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.core.method import MethodPart
from fedlora.core.packing import pack, unpack
from fedlora.errors import ConfigError
from fedlora.training.rules import FedProx, RankPruning

PAIR = Pair(torch.ones(2, 3), torch.zeros(4, 2), 1 / 3)


@dataclass(frozen=True)
class Everything(MethodPart):
    """A part of an author's own."""

    whole: int
    real: float
    word: str
    on: bool
    nothing: None
    names: frozenset[str]
    tensor: Tensor
    pair: Pair
    adapter: Adapter
    pairs: dict[str, Pair]
    numbers: tuple[float, ...]
    inner: MethodPart


def everything() -> Everything:
    adapter = Adapter({"m": PAIR}, {"head": torch.arange(3.0)})
    names, numbers = frozenset({"b", "a/c"}), (1.5, math.inf)
    values = (3, 0.1, "w\n", True, None, names, torch.tensor(2), PAIR, adapter, {"n": PAIR}, numbers)
    return Everything(*values, FedProx(7))


def test_every_kind_of_field_survives() -> None:
    tensors, header = pack({"part": everything()})
    bits = save({name: tensor.clone() for name, tensor in tensors.items()})
    back: Everything = unpack(load(bits), header)["part"]
    want = everything()
    assert type(back) is Everything
    for field in ("whole", "real", "word", "on", "nothing", "names", "numbers", "inner"):
        assert getattr(back, field) == getattr(want, field)
        assert type(getattr(back, field)) is type(getattr(want, field))
    assert torch.equal(back.tensor, want.tensor)
    assert Adapter({"": back.pair}).digest() == Adapter({"": want.pair}).digest()
    assert Adapter(back.pairs).digest() == Adapter(want.pairs).digest()
    assert back.adapter.digest() == want.adapter.digest()


def test_a_part_travels_in_a_task_without_a_word_of_the_code_that_carries_it() -> None:
    task = Task(Adapter({"m": PAIR}), method=(RankPruning(0.5, 0.1, 2), everything()))
    back = Task.unpack(*task.pack())
    assert back.part(RankPruning) == RankPruning(0.5, 0.1, 2)
    assert back.part(Everything) is back.method[1]
    assert back.part(FedProx) is None
    assert back.pack()[1] == task.pack()[1]


@pytest.mark.parametrize("value", [object(), [1], {1}, torch.optim.SGD, b"x", 1j])
def test_what_does_not_travel_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'it' is a {type(value).__name__}"):
        pack({"it": value})


HOSTILE = {
    "os.system": ["command"],
    "subprocess.Popen": ["args"],
    "fedlora.core.adapter.Adapter": ["pairs"],
    "fedlora.core.method.MethodPart": [],
    "fedlora.clients.local.LocalTraining": ["lr"],
    "fedlora.training.rules.rank_pruning.RankPruning.start": ["rank"],
    "antigravity.Part": [],
    "fedlora.strategies.hetlora.HetLoRA": [],
}


@pytest.mark.parametrize("path", HOSTILE)
def test_a_name_that_is_no_part_of_ours_is_refused(path: str) -> None:
    header = json.dumps({"method": {"tuple": [{"part": [path, dict.fromkeys(HOSTILE[path], 1)]}]}})
    with pytest.raises(ConfigError, match="not loaded here; if you trust its module, import it"):
        unpack({}, header)


@pytest.mark.slow
def test_reading_a_task_imports_nothing_and_builds_nothing_that_was_not_imported(tmp_path: Any) -> None:
    """In a process of its own, where the module of the part can be found and would leave a trace."""
    (tmp_path / "trap.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlora.core.method import MethodPart\n"
        "open('imported', 'w').close()\n"
        "@dataclass(frozen=True)\n"
        "class Trap(MethodPart):\n"
        "    def __post_init__(self):\n"
        "        open('built', 'w').close()\n"
    )
    header = json.dumps({"method": {"tuple": [{"part": ["trap.Trap", {}]}]}})
    code = (
        "import sys\n"
        "from fedlora.core.packing import unpack\n"
        "from fedlora.errors import ConfigError\n"
        "before = set(sys.modules)\n"
        "try:\n"
        f"    unpack({{}}, {header!r})\n"
        "except ConfigError:\n"
        "    assert set(sys.modules) == before\n"
        "else:\n"
        "    raise SystemExit('it was built')\n"
        "if 'trust' in sys.argv:\n"
        "    import trap\n"
        f"    assert isinstance(unpack({{}}, {header!r})['method'][0], trap.Trap)\n"
    )
    for word, left in (("no", []), ("trust", ["built", "imported"])):
        done = subprocess.run(
            [sys.executable, "-c", code, word], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert sorted(f.name for f in tmp_path.iterdir() if not f.suffix and f.is_file()) == left


def test_a_field_that_the_class_does_not_have_is_an_error() -> None:
    path = f"{Everything.__module__}.{Everything.__qualname__}"
    assert {f.name for f in fields(Everything)} >= {"whole"}
    with pytest.raises(TypeError, match="more"):
        unpack({}, json.dumps({"it": {"part": [path, {"more": 1}]}}))
