"""One client moves a round's release by the clip over a fixed number, through the real server and masks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora import strategies
from fedlora.core.messages import Peer
from fedlora.core.vectors import factor_change, flat
from fedlora.privacy import ClientLevel, Entry, Plan, epsilon
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.privacy.ledger_files import read_ledger

pytestmark = pytest.mark.slow  # whole runs

CLIP = 0.5
SILENT = 1e-12  # σ, in the place of zero, which no ledger takes
# name: (clients, how many of them fail, how many a round asks for)
ROUNDS = {
    "3 of 3": (3, 0, None),
    "7, 2 fail": (7, 2, None),
    "10, 3 fail": (10, 3, None),
    "3 of 10": (10, 0, 3),
}
TOO_FEW = {"2 of 2": (2, 0, None), "6, 2 fail": (6, 2, None), "9, 3 fail": (9, 3, None)}


@pytest.fixture
def push(noise: Any) -> Any:
    """Clients that all move in one direction, farther than the clip; those in `idle` do not move."""

    class Push(noise):  # type: ignore[misc]
        def _moved(self, a: Any) -> Any:
            got = a.start
            step = 0.0 if a.client in self.idle else 3.0
            pairs = {m: type(p)(p.A, p.B + step, p.scale) for m, p in got.pairs.items()}
            return type(got)(pairs, dict(got.extra))

    def make(idle: int | None = None, failing: int = 0, clients: int = 0) -> Any:
        made = Push(failing=frozenset(range(clients - failing, clients)))
        object.__setattr__(made, "idle", {idle})
        return made

    return make


@pytest.fixture
def total(lab: Any, push: Any, tmp_path: Path) -> Any:
    """A run of one round: the sum that was released, recovered from the state, and the run."""

    def go(
        clients: int, failing: int, asked: int | None, secure: bool, idle: int | None = None, q: float = 1.0
    ) -> tuple[Tensor, Any]:
        strategy, number = strategies.FFALoRA(), asked or clients
        plan = Plan(ClientLevel(clip=CLIP, accountant="rdp", epsilon=900.0), number, 1, 1e-5, SILENT, q)
        path = tmp_path / f"ledger-{len(list(tmp_path.iterdir()))}.json"
        central = ClientLevelMechanism(ClientLevel(clip=CLIP), plan, path)
        central.refusal = lambda: None  # type: ignore[method-assign]  # such a σ has no budget
        ran = lab.run(
            strategy,
            (4,) * clients,
            rounds=1,
            client=push(idle, failing, clients),
            secure_sum=secure,
            central=central,
            clients_per_round=asked,
            clients=clients,
        )
        ran.paid = read_ledger(path)
        wide = strategy.task(strategy.init(lab.adapter(4)), Peer(0, 4))
        return number * flat(factor_change(wide.adapter, ran.federation.state.adapter, wide)), ran

    return go


@pytest.mark.parametrize("setting", ROUNDS)
def test_under_masks_the_updates_of_one_client_move_the_sum_by_the_clip(total: Any, setting: str) -> None:
    """Against the same client with zeros in the place of its updates, whichever client it is."""
    clients, failing, asked = ROUNDS[setting]
    with_all, ran = total(clients, failing, asked, secure=True)
    delivered = (asked or clients) - failing
    assert float(with_all.norm()) == pytest.approx(delivered * CLIP, rel=1e-5), ran.text
    moved = []
    for idle in range(clients):
        without, again = total(clients, failing, asked, secure=True, idle=idle)
        assert again.lines("metrics.jsonl")[0]["clients"] == delivered
        moved.append(float((with_all - without).norm()))
    assert max(moved) <= CLIP * (1 + 1e-5)
    assert sum(gap > 0.99 * CLIP for gap in moved) == delivered


@pytest.mark.parametrize("setting", TOO_FEW)
def test_under_masks_a_sum_that_is_not_known_releases_nothing_whatever_the_clients_hold(
    total: Any, setting: str
) -> None:
    """Who is there and who fails decides, and no update: with one client's at zero the end is the same."""
    clients, failing, asked = TOO_FEW[setting]
    for idle in (None, 0):
        released, ran = total(clients, failing, asked, secure=True, idle=idle)
        assert not released.any()
        assert ran.paid is None
        assert "the state stays as it was" in ran.text
        assert "delta_norm" not in ran.lines("metrics.jsonl")[0]


@pytest.mark.parametrize(("clients", "failing"), [(2, 0), (6, 2), (9, 3), (1, 1)])
def test_in_the_clear_one_client_more_moves_the_sum_by_the_clip(
    total: Any, clients: int, failing: int
) -> None:
    """The denominator is the plan's in both runs, and the one client more is the first or the last."""
    fewer, _ = total(clients, failing, None, secure=False)
    more, ran = total(clients + 1, failing, None, secure=False)
    assert float((more - fewer).norm()) == pytest.approx(CLIP, rel=1e-5)
    assert float(more.norm()) == pytest.approx((clients + 1 - failing) * CLIP, rel=1e-5)
    assert ran.paid.entries[0].steps == 1


def test_a_draw_in_the_clear_is_by_no_seed_and_under_masks_by_the_run_s(total: Any) -> None:
    drawn = [
        [total(10, 0, 3, secure, q=q)[1].sampled() for _ in range(6)]
        for secure, q in ((True, 1.0), (False, 0.3))
    ]
    assert len({str(found) for found in drawn[0]}) == 1
    assert len(drawn[0][0][0]) == 3
    assert len({str(found) for found in drawn[1]}) > 1


@pytest.mark.parametrize("rounds", [1, 10])
@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_under_masks_the_noise_is_enough_for_known_members(target: float, rounds: int) -> None:
    """T Gaussian rounds are one of σ/√T, whose exact δ is Balle and Wang's (ICML 2018, theorem 8)."""
    plan = ClientLevel(epsilon=target, rounds=rounds).plan(10, 3, masked=True)
    assert (plan.q, plan.batch_size, plan.unit) == (1.0, 3, "contribution")
    reported = epsilon((Entry(plan.sigma, plan.q, rounds),), plan.delta)
    assert 0.9 * target < reported <= target
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    shift = math.sqrt(rounds) / plan.sigma

    def cdf(x: float) -> float:
        return float(normal.cdf(torch.tensor(x, dtype=torch.float64)))

    exact = cdf(shift / 2 - reported / shift) - math.exp(reported) * cdf(-shift / 2 - reported / shift)
    assert exact <= plan.delta
    ledger = plan.after(None)
    assert ledger.unit == "contribution"
    assert "replacing all updates of one client by zeros" in ledger.record()["adjacency"]


def test_the_client_of_the_largest_rank_may_be_away(lab: Any, tmp_path: Path) -> None:
    """The sum has the form of the largest rank that the run serves, not of the largest that is there."""
    for secure in (True, False):
        path = tmp_path / f"away-{secure}.json"
        plan = Plan(ClientLevel(clip=CLIP, accountant="rdp"), 3, 1, 1e-5, 5.0, 1.0)
        central = ClientLevelMechanism(ClientLevel(clip=CLIP), plan, path)
        ran = lab.run(
            strategies.FFALoRA(), (2, 1, 2), most=8, rounds=1, secure_sum=secure, central=central, clients=3
        )
        assert "delta_norm" in ran.lines("metrics.jsonl")[0], ran.text
        assert read_ledger(path).entries[0].steps == 1  # type: ignore[union-attr]


def test_the_sum_of_plain_masks_is_that_of_plain_rounds_where_the_largest_rank_is_away(lab: Any) -> None:
    plain, masked = (
        lab.run(strategies.FFALoRA(), (2, 1, 2), most=8, rounds=2, secure_sum=secure)
        for secure in (False, True)
    )
    for (name, a), (_, b) in zip(
        *[ran.federation.state.adapter.tensors() for ran in (plain, masked)], strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, msg=name)


def test_nothing_is_paid_for_a_sum_of_another_length(lab: Any, tmp_path: Path) -> None:
    from fedlora.errors import IncompatibleUpdates

    strategy, path = strategies.FFALoRA(), tmp_path / "ledger.json"
    central = ClientLevelMechanism(
        ClientLevel(rounds=1), Plan(ClientLevel(rounds=1), 3, 1, 1e-5, 5.0, 1.0), path
    )
    wide = strategy.task(strategy.init(lab.adapter(4)), Peer(0, 4))
    central.sample([1, 2, 3], 1)
    with pytest.raises(IncompatibleUpdates, match="expected a sum of"):
        central.release(strategy, wide, torch.zeros(7, dtype=torch.float64))
    assert not path.exists()


def test_a_site_of_another_rank_is_refused_where_all_have_one_and_the_others_train(lab: Any) -> None:
    ran = lab.run(strategies.FedIT(), (4, 2, 4), rounds=1, clients=2)
    assert "client 1 is of rank 2" in ran.text
    assert ran.sampled() == [[0, 2]]
    want = lab.run(strategies.FedIT(), (4, 4, 4), rounds=1, change=lab.keep(0, 2))
    assert ran.digest == want.digest
    mixed = lab.run(strategies.FlexLoRA(), (4, 2, 4), rounds=1, clients=3)
    assert mixed.sampled() == [[0, 1, 2]]
