import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import State, Update
from fedlora.rounds.aggregation_error import tail_kept


def pair(*sigma):
    """diag(sigma) in 8 × 9, as scale 2."""
    return Pair(torch.eye(len(sigma), 9), torch.eye(8, len(sigma)) * torch.tensor(sigma) / 2, 2.0)


def state(*sigma, base_delta=None):
    return State(Adapter({"m": pair(*sigma)}), base_delta=base_delta or {})


def updates(*ranks):
    return [Update(Adapter({"m": pair(*[1.0] * rank)}), weight=1.0) for rank in ranks]


def test_a_round_that_changes_nothing_keeps_the_tail_and_one_that_halves_it_half():
    before = state(4.0, 3.0, 2.0, 1.0)
    assert tail_kept(before, before, updates(2, 4)) == {"tail_kept": pytest.approx(1)}
    assert tail_kept(before, state(9.0, 9.0, 1.0, 0.5), updates(4, 2)) == {"tail_kept": pytest.approx(0.5)}
    assert tail_kept(before, state(4.0, 3.0), updates(2, 4)) == {"tail_kept": pytest.approx(0)}


def test_there_is_nothing_to_keep_of_equal_ranks_no_tail_or_what_the_base_holds():
    before = state(4.0, 3.0, 2.0, 1.0)
    assert tail_kept(before, before, updates(4, 4)) == {}
    assert tail_kept(state(4.0, 3.0), before, updates(2, 4)) == {}
    assert tail_kept(state(0.0, 0.0, 0.0), before, updates(2, 3)) == {}
    assert tail_kept(state(4.0, 3.0, 2.0, base_delta={"m": pair(1.0)}), before, updates(2, 4)) == {}
