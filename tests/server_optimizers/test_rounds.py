"""Server optimizers in the server's loop, without a model: whole runs, logs, checkpoints, sums."""

from typing import Any

import pytest
import torch

from fedlora import strategies
from fedlora.core.messages import Peer, State
from fedlora.privacy import ClientLevel
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.server_optimizers import FedAdam, FedAvgM
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA, FLoRA

SOME = ("FedExLoRA", "FedIT", "FedMS", "FedSVD", "FlexLoRA")  # the contract tests have all of them


@pytest.mark.parametrize("name", SOME)
def test_rate_1_without_momentum_is_the_same_run_to_the_bit(name: str, lab: Any) -> None:
    strategy = getattr(strategies, name)()
    plain, stepped = (lab.run(strategy, rounds=3, optimizer=one) for one in (None, FedAvgM(1.0, 0.0)))
    assert stepped.federation.state.digest() == plain.federation.state.digest()
    for name_ in ("metrics.jsonl", "clients.jsonl"):
        one, other = ([{**line, "seconds": 0} for line in ran.lines(name_)] for ran in (plain, stepped))
        assert one == other


@pytest.mark.parametrize(
    ("strategy", "ranks"), [(FlexLoRA(), (4, 2, 3)), (FLoRA(), (4, 2, 3)), (FedIT(), (4, 4, 4))]
)
def test_a_momentum_moves_on_without_warnings_and_the_log_has_the_sizes_of_what_it_makes(
    strategy: Any, ranks: Any, lab: Any
) -> None:
    plain, heavy = (lab.run(strategy, ranks, rounds=4, optimizer=one) for one in (None, FedAvgM()))
    assert heavy.digest != plain.digest
    assert "warning" not in heavy.text
    last, state = heavy.lines("metrics.jsonl")[-1], heavy.federation.state
    whole = sum(float(state.delta(m).double().norm()) ** 2 for m in state.adapter.pairs) ** 0.5
    assert last["delta_norm"] == pytest.approx(whole, rel=1e-5)
    assert heavy.lines("metrics.jsonl")[0]["delta_norm"] == plain.lines("metrics.jsonl")[0]["delta_norm"]
    assert last["dropped"] == 0


def test_what_it_remembers_is_in_the_checkpoint_and_no_strategy_sees_it(lab: Any) -> None:
    class Looking(FedIT):
        def task(self, state: State, peer: Peer) -> Any:
            assert not state.memory
            return super().task(state, peer)

        def aggregate(self, state: State, updates: Any, rng: Any) -> State:
            assert not state.memory
            return super().aggregate(state, updates, rng)

    ran = lab.run(Looking(), rounds=3, optimizer=FedAdam())
    kept = ran.folder.read_state()[1]
    assert kept.digest() == ran.federation.state.digest()
    names = {f"server/{word}/{name}" for word in "mv" for name, _ in kept.adapter.tensors()}
    assert kept.memory.keys() == names


def test_a_round_without_enough_updates_leaves_model_and_momentum_as_they_were(lab: Any) -> None:
    answers = iter([True, False])

    def first_round_alone(replies: list[Any]) -> list[Any]:
        return replies if next(answers) else []

    one = lab.run(FedIT(), rounds=1, optimizer=FedAvgM())
    two = lab.run(FedIT(), rounds=2, optimizer=FedAvgM(), change=first_round_alone)
    assert two.federation.state.digest() == one.federation.state.digest()
    assert any(name.startswith("server/") for name in two.federation.state.memory)


def test_under_masks_the_server_steps_by_the_mean_of_the_sum(lab: Any) -> None:
    for optimizer in (FedAvgM(0.5, 0.9), FedAdam()):
        open_, masked = (
            lab.run(FFALoRA(), rounds=3, optimizer=optimizer, secure_sum=secure) for secure in (False, True)
        )
        one, other = (dict(ran.federation.state.adapter.tensors()) for ran in (open_, masked))
        for name, tensor in one.items():
            assert torch.allclose(other[name], tensor, atol=2e-4), name


def test_client_level_noise_is_stepped_as_any_mean(lab: Any) -> None:
    """Rate 1 and no momentum changes no bit of a private run; momentum spends nothing more."""
    privacy = ClientLevel(epsilon=6.0, rounds=3, accountant="rdp", insecure_test_seed=1)
    plan, found = privacy.plan(3, 3, False), []
    for at, optimizer in enumerate((None, FedAvgM(1.0, 0.0), FedAvgM())):
        central = ClientLevelMechanism(privacy, plan, lab.folder / f"ledger-{at}.json")
        ran = lab.run(FlexLoRA(), rounds=3, optimizer=optimizer, central=central)
        found.append((ran.digest, central.ledger))
    assert found[0][0] == found[1][0] != found[2][0]
    assert found[0][1] == found[1][1] == found[2][1]
