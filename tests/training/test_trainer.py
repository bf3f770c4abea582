import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example, collate
from fedlora.models import Base, MultiAdapterModel, Traits, load, targets
from fedlora.models.packaged import tiny
from fedlora.training import evaluation
from fedlora.training import passes as training_passes
from fedlora.training.batches import count, groups, micro_batches
from fedlora.training.evaluation import evaluate
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        loaded = load(tiny(), "classification", ("x", "y", "z"))
    loaded.model.double()
    return loaded


def adapter(base: Base, rank: int, seed: int) -> Adapter:
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    pairs = {n: Pair(random(rank, i), random(o, rank), 0.5) for n, (o, i) in targets(base, "query").items()}
    return Adapter(pairs, {n: p + random(*p.shape) for n, p in base.head_state().items()})


def rows(number: int, seed: int = 0) -> list[Example]:
    made = torch.Generator().manual_seed(seed)
    return [
        Example(torch.randint(2, 200, (1 + (7 * i + seed) % 11,), generator=made).tolist(), (i + seed) % 3)
        for i in range(number)
    ]


lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), max_size=40)


@given(lengths=lengths, tokens=st.integers(1, 200), padded=st.booleans())
def test_micro_batches_hold_every_row_once_slot_by_slot_within_the_budget(
    lengths: list[tuple[int, int]], tokens: int, padded: bool
) -> None:
    pool = [(slot, Example([number] * length, 0)) for number, (slot, length) in enumerate(lengths)]
    found = list(micro_batches(pool, tokens, Traits(), padded))
    assert sorted((item for micro in found for item in micro), key=repr) == sorted(pool, key=repr)
    longest = math.inf
    for micro in found:
        slots = [slot for slot, _ in micro]
        assert slots == sorted(slots)
        size = [len(row.input_ids) for _, row in micro]
        assert len(micro) == 1 or (len(micro) * max(size) if padded else sum(size)) <= tokens
        assert max(size) <= longest  # like lengths are together
        longest = min(size)
    greedy, room = 0, 0  # as few lists as filling each to the brim gives
    for length in sorted((length for _, length in lengths), reverse=True):
        need = 1 if padded else length  # of a room that is counted in rows, or in tokens
        if room < need:
            greedy, room = greedy + 1, max(need, tokens // length if padded else tokens)
        room -= need
    assert len(found) == greedy


work = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 30)), max_size=12
)  # a client's steps, its row's length


@given(work=work, tokens=st.integers(1, 90))
def test_groups_hold_every_client_once_within_their_tokens(work: list[tuple[int, int]], tokens: int) -> None:
    batches = [[[Example([1] * length, 0)] * 2] * steps for steps, length in work]
    found = groups(batches, tokens)
    assert sorted(slot for group in found for slot in group) == list(range(len(work)))
    fewest = math.inf
    for group in found:
        assert group == sorted(group)
        assert len(group) == 1 or sum(2 * work[slot][1] for slot in group if work[slot][0]) <= tokens
        assert max(work[slot][0] for slot in group) <= fewest  # the longest work first, like with like
        fewest = min(work[slot][0] for slot in group)


def test_clients_who_fill_a_step_are_alone_and_small_ones_are_not() -> None:
    batches = [[[Example([1] * length, 0)]] * 3 for length in (40, 8, 8, 8, 50)]
    assert groups(batches, 30) == [[0], [1, 2, 3], [4]]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_and_of_groups_trains_the_same_to_the_bit(base: Base, threads: int) -> None:
    jobs = [
        FitJob(Task(adapter(base, 2, k)), [rows(4, s + k) for s in range(n)])
        for k, n in enumerate((3, 1, 2, 2))
    ]
    before = torch.get_num_threads()
    try:
        found = []
        for now in (1, threads):
            torch.set_num_threads(now)
            found.append([one.adapter.digest() for one in fit(base, jobs, sgd, tokens=30)])
            assert torch.get_num_threads() == now
    finally:
        torch.set_num_threads(before)
    assert len(groups([job.batches for job in jobs], 30)) > 2
    assert found[0] == found[1]


@pytest.fixture
def passes(monkeypatch: Any) -> list[int]:
    """The tokens of every micro-batch that goes through a model, from here on."""
    seen: list[int] = []
    spied = evaluation.losses_of

    def losses_of(base: Base, bank: MultiAdapterModel, micro: Any, slots: int) -> Any:
        seen.append(sum(len(row.input_ids) for _, row in micro))
        return spied(base, bank, micro, slots)

    for module in (training_passes, evaluation):
        monkeypatch.setattr(module, "losses_of", losses_of)
    return seen


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("clients", [1, 2])
def test_a_number_of_tokens_is_what_every_pass_holds_whatever_the_clients_and_cores(
    base: Base, passes: list[int], clients: int, threads: int
) -> None:
    many = [Example([5] * 10, 0)] * 60  # 600 tokens a step
    job = FitJob(Task(adapter(base, 1, 0)), [many])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens, each in ((100, 100), (300, 300), (599, 300), (600, 600), (10**6, 600 * clients)):
            passes.clear()
            fit(base, [job] * clients, sgd, tokens=tokens)
            assert passes == [each] * (600 * clients // each)
            passes.clear()
            evaluate(base, [job.task] * clients, [many] * clients, tokens=tokens)
            assert sum(passes) == 600 * clients
            assert max(passes) <= tokens
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_without_a_number_the_passes_follow_from_the_rows_alone(
    base: Base, passes: list[int], threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, length, number in (
            (1, 40, 1),
            (6, 10, 1),
            (8, 10, 2),
            (32, 13, 2),
            (60, 10, 2),
            (8, 128, 4),
        ):
            job = FitJob(Task(adapter(base, 1, 0)), [[Example([5] * length, 0)] * rows] * 2)
            passes.clear()
            fit(base, [job], sgd)
            assert len(passes) == 2 * number
            assert max(passes) - min(passes) <= length  # as even as whole rows allow
    finally:
        torch.set_num_threads(before)


def test_many_groups_are_not_cut_further(base: Base, passes: list[int]) -> None:
    for clients, each in ((3, 400 // 2), (8, 400)):
        job = FitJob(Task(adapter(base, 1, 0)), [[Example([5] * 10, 0)] * 40])
        passes.clear()
        fit(base, [job] * clients, sgd)
        assert passes == [each] * (clients * 400 // each)


@given(lengths=lengths, padded=st.booleans())
def test_micro_batches_without_a_budget_hold_every_row_in_as_many_lists_as_the_count(
    lengths: list[tuple[int, int]], padded: bool
) -> None:
    pool = [(slot, Example([number] * length, 0)) for number, (slot, length) in enumerate(lengths)]
    found = micro_batches(pool, None, Traits(), padded)
    assert sorted((item for micro in found for item in micro), key=repr) == sorted(pool, key=repr)
    wanted = count(sum(length for _, length in lengths))
    assert len(found) <= wanted
    if pool:  # and no budget that allows so many lists makes the largest one smaller
        size = max(sum(len(row.input_ids) for _, row in micro) for micro in found)
        most = max(len(micro) * max(len(row.input_ids) for _, row in micro) for micro in found)
        tighter = (most if padded else size) - 1
        if tighter >= max(len(row.input_ids) for _, row in pool):  # a longer row is a list of its own
            assert len(micro_batches(pool, tighter, Traits(), padded)) > wanted or len(found) == len(pool)


@given(tokens=st.integers(1, 10**6))
def test_the_number_of_micro_batches_is_even_and_their_size_has_bounds(tokens: int) -> None:
    number = count(tokens)
    assert number == 1 if tokens < 64 else number >= 2
    assert tokens / number <= 1024
    assert tokens < 1024 or tokens / number >= 256
    assert tokens > 8192 or number & (number - 1) == 0


def test_micro_batches_are_of_even_size() -> None:
    found = micro_batches([(0, Example([1] * 10, 0)) for _ in range(10)], 60, Traits())
    assert [len(micro) for micro in found] == [5, 5]


def test_evaluation_is_a_loop_over_adapters_and_their_rows(base: Base) -> None:
    adapters = [adapter(base, rank, rank) for rank in (1, 3, 2, 5)]
    own = [rows(7, 1), rows(1, 2), [], rows(13, 3)]
    for tokens in (1, 25, 10**6):
        found = evaluate(base, [Task(one) for one in adapters], own, tokens)
        for one, mine, (loss, right) in zip(adapters, own, found, strict=True):
            if not mine:
                assert math.isnan(loss)
                assert math.isnan(right)
                continue
            losses, hits = [], []
            for row in mine:
                with torch.no_grad(), MultiAdapterModel(base, [Task(one)]):
                    logits = base.logits(collate([row], 0))[0]
                losses.append(-logits.log_softmax(-1)[row.target].item())
                hits.append(logits.argmax().item() == row.target)
            assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
            assert right == pytest.approx(sum(hits) / len(hits))


def test_evaluation_needs_no_head_of_the_adapter_and_no_rows_at_all(base: Base) -> None:
    bare = Adapter(adapter(base, 2, 1).pairs)
    full = Adapter(bare.pairs, base.head_state())
    [one], [other] = (evaluate(base, [Task(a)], [rows(9)]) for a in (bare, full))
    assert one == pytest.approx(other)
    head = Adapter({}, adapter(base, 1, 4).extra)
    two = evaluate(base, [Task(head)] * 2, [rows(5), rows(6)])
    assert two[0] == pytest.approx(evaluate(base, [Task(head)], [rows(5)])[0])
    assert all(math.isnan(x) for pair in evaluate(base, [Task(bare)] * 2, [[], []]) for x in pair)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for found in groups.values() for p in found], lr=0.1)


def test_a_head_alone_can_be_trained(base: Base) -> None:
    heads = [Adapter({}, adapter(base, 1, seed).extra) for seed in (1, 2)]
    jobs = [FitJob(Task(head), [rows(4, seed)]) for seed, head in enumerate(heads)]
    for job, one in zip(jobs, fit(base, jobs, sgd), strict=True):
        [alone] = fit(base, [job], sgd)
        for name, value in one.adapter.extra.items():
            torch.testing.assert_close(value, alone.adapter.extra[name], rtol=1e-9, atol=1e-12)
            assert not torch.equal(value, job.task.adapter.extra[name])


def test_the_loss_is_the_mean_over_steps_of_each_batch_s_mean(base: Base) -> None:
    start, batches = adapter(base, 2, 1), [rows(5, 1), rows(2, 2)]
    still = torch.optim.SGD
    [one] = fit(
        base,
        [FitJob(Task(start), batches)],
        lambda g: still([p for found in g.values() for p in found], lr=0.0),
    )
    parts = [evaluate(base, [Task(start)], [batch])[0][0] for batch in batches]
    assert one.loss == pytest.approx(sum(parts) / 2, rel=1e-9)
    assert one.adapter.digest() == start.digest()


def test_a_schedule_and_a_clip_are_those_of_the_step(base: Base) -> None:
    steps_seen: list[tuple[int, int]] = []
    jobs = [FitJob(Task(adapter(base, 1, k)), [rows(3, s) for s in range(n)]) for k, n in enumerate((3, 1))]

    def schedule(step: int, steps: int) -> float:
        steps_seen.append((step, steps))
        return 1.0 if step == 0 else 0.0

    fitted = fit(base, jobs, sgd, schedule)
    assert sorted(steps_seen) == [(0, 1), (0, 3), (1, 3), (2, 3)]
    for job, one in zip(jobs, fitted, strict=True):
        [first] = fit(base, [FitJob(job.task, job.batches[:1])], sgd)
        for name, value in one.adapter.tensors():
            torch.testing.assert_close(value, dict(first.adapter.tensors())[name], rtol=1e-9, atol=1e-12)
