"""Whole federations whose messages are in code, under every strategy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedlora import strategies
from fedlora.compression import BF16, NF4, Int8, MessageKey, RandK, Segments, TopK
from fedlora.compression.randk import common_places
from fedlora.compression.update import code_update, vector
from fedlora.core.messages import Peer, Update
from fedlora.core.vectors import flat
from fedlora.privacy import ClientLevel, Plan
from fedlora.privacy.client_level import ClientLevelMechanism

pytestmark = pytest.mark.slow  # whole runs

EVERY = sorted(strategies.__all__)
CODES = [BF16(), Int8(), TopK(density=0.2, values="int8", download="nf4"), Segments(), RandK(density=0.2)]


def totals(ran: Any) -> tuple[int, int]:
    lines = ran.lines("clients.jsonl")
    return sum(line["bytes_up"] for line in lines), sum(line["bytes_down"] for line in lines)


@pytest.fixture(params=EVERY)
def strategy(request: Any) -> Any:
    return getattr(strategies, request.param)()


def test_every_strategy_learns_from_updates_in_every_code(strategy: Any, messages: Any) -> None:
    plain, (up, _) = messages.run(strategy, None)
    for code in CODES:
        state, (less, _) = messages.run(strategy, code)
        assert less < up, code
        assert state.digest() != plain.digest()


def test_clients_that_learn_nothing_move_nothing_however_downloads_are_coded(
    strategy: Any, messages: Any
) -> None:
    want = messages.run(strategy, None, still=True)[0].digest()
    for code in (NF4(), TopK(density=0.1, download="int8")):
        assert messages.run(strategy, code, still=True)[0].digest() == want


def test_at_density_1_and_32_bits_a_run_is_the_same_to_the_bit_and_to_the_byte(
    strategy: Any, messages: Any
) -> None:
    (plain, bytes), (state, same) = (messages.run(strategy, code) for code in (None, TopK(density=1)))
    assert state.digest() == plain.digest()
    assert same == bytes
    (exact, _), (near, fewer) = (messages.run(strategy, c) for c in (None, RandK(density=1, download="bf16")))
    assert fewer[1] < bytes[1]
    if not strategy.personal:  # exact updates of starts that are not: near, and no more
        for module in exact.adapter.pairs:
            torch.testing.assert_close(near.delta(module), exact.delta(module), rtol=0.1, atol=0.1)


def test_error_feedback_goes_on_from_what_a_strategy_of_a_fixed_basis_has_lost(
    strategy: Any, messages: Any
) -> None:
    if not strategy.fixed_basis:
        pytest.skip("its factors get new directions")
    kept, lost = (
        messages.run(strategy, TopK(density=0.2, error_feedback=on), rounds=3) for on in (True, False)
    )
    assert kept[0].digest() != lost[0].digest()
    assert kept[1] == lost[1]


def test_a_fixed_basis_is_one_that_stays_where_nobody_learns(strategy: Any, make: Any) -> None:
    """No claim is made of the others, some of which stay, too."""
    if not strategy.fixed_basis:
        pytest.skip("its factors get new directions")
    state = strategy.init(make.adapter(np.random.default_rng(5), {"a": (7, 6), "b": (5, 9)}, 3))
    for round in range(2):  # a strategy may take turns
        before = strategy.task(state, Peer(0, 3))
        updates = [Update(before.adapter, 1.0 + k, Peer(k, 3)) for k in range(3)]
        state = strategy.aggregate(state, updates, np.random.default_rng(round))
        after = dict(strategy.task(state, Peer(0, 3)).adapter.tensors())
        for name in before.shared():
            torch.testing.assert_close(after[name], dict(before.adapter.tensors())[name])


def test_a_whole_run_is_the_same_twice_and_warns_of_nothing(lab: Any) -> None:
    for code in CODES:
        one, two = (lab.run(strategies.FlexLoRA(), (4, 1, 3), compression=code) for _ in range(2))
        assert one.digest == two.digest
        assert "warning" not in one.text


@pytest.mark.parametrize("code", [TopK(density=0.1), RandK(density=0.1), Int8(), NF4(), BF16()], ids=repr)
def test_what_was_sent_and_what_is_kept_are_all_changes(code: Any) -> None:
    """Σ sent + memory = Σ δ, with a client that is in every round."""
    codec = type(code)(**{**vars(code), "error_feedback": True})
    rng, kept, sent, changed = np.random.default_rng(3), {}, 0.0, 0.0
    for round in range(1, 9):
        change = {"a": torch.from_numpy(rng.standard_normal((6, 8))), "b": torch.ones(()).double() / round}
        made = code_update(codec, change, kept, MessageKey(0, 2, round))
        kept = made.memory
        sent, changed = sent + flat(made.change).double(), changed + flat(change)
    left = flat({name: kept[name] for name in change}).double()
    torch.testing.assert_close(sent + left, changed, atol=2e-6, rtol=0)
    assert left.norm() < changed.norm() * 3  # and what is kept does not grow without bound


@pytest.mark.parametrize("gap", [1, 2, 10])
@pytest.mark.parametrize("kind", [RandK, TopK])
def test_a_client_that_is_seldom_there_sends_all_of_its_change_in_the_end(kind: Any, gap: int) -> None:
    code = kind(density=0.1, error_feedback=True)
    change, kept, sent = {"a": torch.ones(20)}, {}, torch.zeros(20)
    for time in range(300):
        made = code_update(code, change, kept, MessageKey(0, 0, 1 + gap * time))
        kept, sent = made.memory, sent + made.change["a"]
    torch.testing.assert_close(sent + kept["a"], torch.full((20,), 300.0))
    assert sent.mean() > 270


def test_a_training_that_diverged_leaves_what_was_kept_as_it_was() -> None:
    codec, change = TopK(density=0.5, error_feedback=True), {"a": torch.tensor([math.nan, 1.0])}
    made = code_update(codec, change, {}, MessageKey(0, 0, 1))
    assert made.memory == {}
    assert not flat(made.change).isfinite().all()
    kept = code_update(codec, {"a": torch.tensor([2.0, 1.0])}, {}, MessageKey(0, 0, 1)).memory
    assert code_update(codec, change, kept, MessageKey(0, 0, 2)).memory == kept


@pytest.mark.parametrize("code", [Int8(), TopK(density=0.1), TopK(density=0.1, values="bf16")], ids=repr)
def test_bytes_up_are_those_of_the_arrays_that_travel(lab: Any, code: Any) -> None:
    seen: list[Message] = []
    form = code.form(SHARED, MessageKey(0, 0, 1))

    def watch(replies: list[Message]) -> list[Message]:
        seen.extend(replies)
        for reply in replies:
            arrays = {n: a.numpy() for n, a in reply.content.array_records["arrays"].items()}
            assert {n: (str(a.dtype), a.shape) for n, a in arrays.items()} == form
        return replies

    ran = lab.run(strategies.FedIT(), rounds=1, compression=code, change=watch)
    sizes = [line["bytes_up"] for line in ran.lines("clients.jsonl")]
    assert len(seen) == len(sizes) == 3
    payload = sum(math.prod(s) * np.dtype(k).itemsize for k, s in form.values())
    assert all(payload < count < payload + 900 for count in sizes)


SHARED = [32, 24, 32, 32, 2, 6]  # of the lab's adapter at rank 4: A and B of two layers, the head


def test_masked_sums_of_common_places_are_the_means_of_the_clients_updates(lab: Any) -> None:
    for code in (RandK(density=0.3), RandK(density=1, download="bf16")):
        plain, masked = (
            lab.run(strategies.FFALoRA(), (4,) * 4, secure_sum=on, compression=code) for on in (False, True)
        )
        assert all(line["clients"] == 4 for line in masked.lines("metrics.jsonl")), masked.text
        ends = [[t for _, t in ran.federation.state.adapter.tensors()] for ran in (plain, masked)]
        for one, two in zip(*ends, strict=True):
            torch.testing.assert_close(one, two, atol=5e-6, rtol=5e-6)
    whole = lab.run(strategies.FFALoRA(), (4,) * 4, secure_sum=True)
    few = lab.run(strategies.FFALoRA(), (4,) * 4, secure_sum=True, compression=RandK(density=0.1))
    saved = totals(whole)[0] - totals(few)[0]
    rounds, clients, word = 2, 4, 8
    assert saved == pytest.approx(rounds * clients * word * 0.9 * (24 + 32 + 8), rel=0.1)


def test_a_clipped_and_masked_sum_of_common_places_moves_them_alone(lab: Any, tmp_path: Path) -> None:
    plan = Plan(ClientLevel(clip=0.5, accountant="rdp", epsilon=900.0), 4, 1, 1e-5, 1e-12, 1.0)
    central = ClientLevelMechanism(ClientLevel(clip=0.5), plan, tmp_path / "ledger.json")
    central.refusal = lambda: None  # type: ignore[method-assign]  # such a σ has no budget
    code = RandK(density=0.2)
    ran = lab.run(
        strategies.FFALoRA(), (4,) * 4, rounds=1, secure_sum=True, central=central, compression=code
    )
    start, end = lab.adapter(), ran.federation.state.adapter
    names = ["a.q.B", "b.v.B", "head.bias", "head.weight"]
    moved = vector({n: dict(end.tensors())[n].double() - dict(start.tensors())[n].double() for n in names})
    at = common_places(round(0.2 * len(moved)), len(moved), MessageKey(0, 0, 1))
    assert np.abs(np.delete(moved, at)).max() < 1e-6  # the noise of so small a σ
    assert 0.1 < np.linalg.norm(moved[at]) <= 0.5 + 1e-4


def test_a_repeated_round_starts_from_what_the_round_before_it_has_kept() -> None:
    """The client store keeps a version a round; the code depends on no other."""
    codec, change = TopK(density=0.5, error_feedback=True), {"a": torch.tensor([3.0, 1.0])}
    kept = code_update(codec, change, {}, MessageKey(0, 0, 1)).memory
    first, again = (code_update(codec, change, kept, MessageKey(0, 0, 2)) for _ in range(2))
    assert torch.equal(first.change["a"], again.change["a"])
    assert kept["a"].tolist() == [0, 1]
