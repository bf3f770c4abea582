"""pFedLoRA at the server: federated averaging of the shared adapter, whatever the clients' models are."""

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, Update
from fedlora.strategies import PFedLoRA


def adapter(make, rng, rank=3, scale=2.0, dtype=torch.float64):
    return Adapter({"shared": make.pair(rng, 4, 9, rank, scale, dtype)})


@pytest.mark.parametrize("rank", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_shared_adapter_is_averaged_factor_by_factor(make, np64, rng, rank, dtype):
    state = PFedLoRA().init(adapter(make, rng, rank, dtype=dtype))
    sent = [
        Update(adapter(make, rng, rank, dtype=dtype), w, Peer(k, rank)) for k, w in enumerate([3.0, 0, 1])
    ]
    after = PFedLoRA().aggregate(state, sent, rng)
    for factor in "AB":
        own = [getattr(u.adapter.pairs["shared"], factor).double().numpy() for u in sent]
        got = getattr(after.adapter.pairs["shared"], factor)
        want = np.tensordot([0.75, 0, 0.25], np.stack(own), 1)
        assert np64.close(got.double().numpy(), want, 1e-12 if dtype == torch.float64 else 1e-2)
    assert after.adapter.pairs["shared"].scale == 2.0
    assert after.round == 1


def test_clients_who_agree_change_nothing_but_to_what_they_agree_on(make, np64, rng):
    state, one = PFedLoRA().init(adapter(make, rng)), adapter(make, rng)
    after = PFedLoRA().aggregate(state, [Update(one, w, Peer(k, 3)) for k, w in enumerate([1.0, 5.0])], rng)
    for (_, got), (_, want) in zip(after.adapter.tensors(), one.tensors(), strict=True):
        assert np64.close(got.numpy(), want.numpy())


def test_a_client_gets_the_adapter_alone_in_its_own_scale(make, np64, rng):
    state = PFedLoRA().init(adapter(make, rng))
    task = PFedLoRA().task(state, Peer(4, 3, {}, {"shared": 0.5}))
    assert task.shared() == ["shared.A", "shared.B"]
    assert task.own() == []
    assert task.method == ()
    pair = task.adapter.pairs["shared"]
    assert pair.scale == 0.5
    assert np64.close(np64.delta(pair), np64.delta(state.adapter.pairs["shared"]))


def test_another_scale_is_no_other_adapter(make, np64, rng):
    state, pair = PFedLoRA().init(adapter(make, rng)), make.pair(rng, 4, 9, 3, 0.5)
    after = PFedLoRA().aggregate(state, [Update(Adapter({"shared": pair}))], rng)
    assert np64.close(np64.delta(after.adapter.pairs["shared"]), np64.delta(pair))
    assert after.adapter.pairs["shared"].scale == 2.0
