"""What the tests share: random pairs, adapters and trained updates, and dense sums to compare them with."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import settings

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.models.parametrizations import Sparse
from fedlora.models.parametrizations.sparse import places
from fedlora.training.expert import GlobalExpert

settings.register_profile("fedlora", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fedlora")


class Make:
    """Random values of a shape, from a generator of the test's."""

    def tensor(
        self, rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    def pair(
        self,
        rng: np.random.Generator,
        d_out: int,
        d_in: int,
        rank: int,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> Pair:
        return Pair(
            self.tensor(rng, rank, d_in, dtype=dtype), self.tensor(rng, d_out, rank, dtype=dtype), scale
        )

    def spectrum(self, rng: np.random.Generator, d_out: int, d_in: int, sigma: Sequence[float]) -> Pair:
        """A pair of scale 1 whose product has the given singular values."""
        B = torch.linalg.qr(self.tensor(rng, d_out, len(sigma))).Q * torch.tensor(sigma, dtype=torch.float64)
        return Pair(torch.linalg.qr(self.tensor(rng, d_in, len(sigma))).Q.T, B)

    def adapter(
        self,
        rng: np.random.Generator,
        layers: Mapping[str, tuple[int, int]],
        rank: int,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> Adapter:
        """A pair a layer and two extras, one of them without dimensions."""
        pairs = {name: self.pair(rng, *shape, rank, scale, dtype) for name, shape in layers.items()}
        extra = {
            "head.weight": self.tensor(rng, 2, 3, dtype=dtype),
            "head.bias": torch.tensor(0.5, dtype=dtype),
        }
        return Adapter(pairs, extra)

    def trained(self, rng: np.random.Generator, task: Task, step: float = 1.0) -> Adapter:
        """What the server sees of a client that trained: what it shares has moved, nothing else has."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor + step * torch.from_numpy(rng.standard_normal(tensor.shape))).to(tensor.dtype)

        shared = set(task.shared())
        return task.adapter.with_tensors(
            {n: moved(t) if n in shared else t.clone() for n, t in task.adapter.tensors()}
        )

    def round(
        self,
        rng: np.random.Generator,
        strategy: Strategy,
        state: State,
        peers: Sequence[Peer],
        weights: Sequence[float],
        step: float = 1.0,
    ) -> list[Update]:
        """Each peer's update, trained from its own task."""
        return [
            Update(self.trained(rng, strategy.task(state, peer), step), weight, peer)
            for peer, weight in zip(peers, weights, strict=True)
        ]


class Dense:
    """The same quantities by plain numpy in float64, with none of fedlora's algebra."""

    def delta(self, pair: Pair) -> np.ndarray:
        B, A = pair.B.detach().to(torch.float64).numpy(), pair.A.detach().to(torch.float64).numpy()
        return pair.scale * (B @ A)

    def change(self, adapter: Adapter, module: str) -> np.ndarray:
        """What a pair adds to a weight, with the core between its factors where there is one."""
        pair, core = adapter.pairs[module], adapter.extra.get(f"{module}.core")
        if core is None:
            return self.delta(pair)
        B, C, A = (t.detach().to(torch.float64).numpy() for t in (pair.B, core, pair.A))
        return pair.scale * (B @ C @ A)

    def effective(self, task: Task, adapter: Adapter, module: str, shape: tuple[int, int]) -> np.ndarray:
        """All that a client's model adds to one weight: base delta, pair, sparse values."""
        total = self.delta(task.base_delta[module]) if module in task.base_delta else np.zeros(shape)
        if module in adapter.pairs:
            total = total + self.change(adapter, module)
        values, form = adapter.extra.get(f"{module}.sparse"), adapter.parametrization
        if isinstance(form, Sparse) and values is not None:
            flat = total.reshape(-1)
            flat[places(form.seed, module, shape, len(values)).numpy()] += values.double().numpy()
        return total

    def working(self, task: Task) -> Adapter:
        """The adapter that a client starts from: the task's, or the global expert of a mixture."""
        expert = task.part(GlobalExpert)
        return task.adapter if expert is None else expert.adapter

    def sum(self, pairs: Sequence[Pair], weights: Sequence[float]) -> np.ndarray:
        return sum(w * self.delta(pair) for pair, w in zip(pairs, weights, strict=True))

    def mean(self, updates: Sequence[Update], module: str) -> np.ndarray:
        """The ideal D* = Σ w_k s_k B_k A_k of one module."""
        total = sum(update.weight for update in updates)
        return sum(u.weight / total * self.change(u.adapter, module) for u in updates)

    def best(self, matrix: np.ndarray, rank: int) -> np.ndarray:
        """The best approximation of a rank, by the full SVD."""
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]

    def close(self, got: object, want: object, tol: float = 1e-10) -> bool:
        """Equal within `tol` of the larger one's norm (and of 1)."""
        a, b = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
        assert a.shape == b.shape, f"shape {a.shape} against {b.shape}"
        return bool(np.linalg.norm(a - b) <= tol * max(1.0, np.linalg.norm(a), np.linalg.norm(b)))

    def orthonormal_rows(self, A: torch.Tensor, tol: float = 1e-12) -> bool:
        eye = torch.eye(len(A), dtype=torch.float64)
        return bool((A.double() @ A.double().T - eye).abs().max() < tol)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()


@pytest.fixture(scope="session")
def np64() -> Dense:
    return Dense()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
