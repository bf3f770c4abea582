"""Two clients of rank 1 in numbers that can be checked by hand, and the wrong numbers known from other code.

The script that made them:

    import numpy as np

    w, s, S = [1 / 4, 3 / 4], [2.0, 0.5], 2.0        # weights 1 : 3, the clients' scales, the global scale
    A1, B1 = np.array([[1.0, 0, 2]]), np.array([[2.0], [0]])
    A2, B2 = np.array([[0.0, 4, 0]]), np.array([[2.0], [6]])
    D = w[0] * s[0] * B1 @ A1 + w[1] * s[1] * B2 @ A2
    U, E, V = np.linalg.svd(D, full_matrices=False)
    # A client's scale over the global one goes on its B, so that (A, B / c, c * s) counts like (A, B, s).
    fedit = S * (w[0] * B1 + w[1] * s[1] / S * B2) @ (w[0] * A1 + w[1] * A2)
    root = np.sqrt(s[1] / S)
    ffa = S * (w[0] * B1 + w[1] * s[1] / S * B2) @ A1               # A1 is the A_0 of both
    flex_rank_1 = E[0] * np.outer(U[:, 0], V[0])
    wrong = {
        "√S on B only": (U * np.sqrt(E)) @ V,
        "√S on B only, rank 1": np.sqrt(E[0]) * np.outer(U[:, 0], V[0]),
        "weight on both factors": w[0] ** 2 * s[0] * B1 @ A1 + w[1] ** 2 * s[1] * B2 @ A2,
        "one scale for all": S * (w[0] * B1 @ A1 + w[1] * B2 @ A2),
        "no scale": w[0] * B1 @ A1 + w[1] * B2 @ A2,
        "factors not balanced": S * (w[0] * B1 + w[1] * B2) @ (w[0] * A1 + w[1] * A2),
        "first client alone": S * w[0] ** 2 * B1 @ A1,
        "root on both": S * (w[0] * B1 + w[1] * root * B2) @ (w[0] * A1 + w[1] * root * A2),
        "equal weights": 0.5 * s[0] * B1 @ A1 + 0.5 * s[1] * B2 @ A2,
    }
    np.set_printoptions(precision=17)
    print(D, E, fedit, ffa, flex_rank_1, wrong)

The square layer "q" is "m" without its third input, so that a transposed result has the right shape.
"""

import numpy as np
import pytest
import torch

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import compress, error_and_norm, singular_values, stack
from fedlora.core.messages import Peer, State, Update
from fedlora.strategies import FedIT, FFALoRA, FlexLoRA

IDEAL = [[1.0, 3.0, 2.0], [0.0, 9.0, 0.0]]
SIGMA = [9.514523363591673, 2.1151466057151165]
FEDIT = [[0.4375, 5.25, 0.875], [0.5625, 6.75, 1.125]]
FFA = [[1.75, 0.0, 3.5], [2.25, 0.0, 4.5]]
FLEX_RANK_1 = [
    [0.11070190762535685, 3.155969497414526, 0.22140381525071365],
    [0.31376264161538375, 8.944970756217938, 0.6275252832307673],
]

WRONG = {
    "√S on B only": [
        [0.6473617909999835, 0.9159068106621145, 1.2947235819999676],
        [-0.11401984025975956, 2.9377534990859435, -0.2280396805195194],
    ],
    "√S on B only, rank 1": [
        [0.03588901891099951, 1.0231499294353956, 0.071778037821999],
        [0.10172031918915518, 2.8999159229909286, 0.20344063837831028],
    ],
    "weight on both factors": [[0.25, 2.25, 0.5], [0.0, 6.75, 0.0]],
    "one scale for all": [[1.0, 12.0, 2.0], [0.0, 36.0, 0.0]],
    "no scale": [[0.5, 6.0, 1.0], [0.0, 18.0, 0.0]],
    "factors not balanced": [[1.0, 12.0, 2.0], [2.25, 27.0, 4.5]],
    "first client alone": [[0.25, 0.0, 0.5], [0.0, 0.0, 0.0]],
    "root on both": [[0.625, 3.75, 1.25], [1.125, 6.75, 2.25]],
    "equal weights": [[2.0, 2.0, 4.0], [0.0, 6.0, 0.0]],
}


def pair(A, B, scale, inputs=3):
    """A rank-1 pair from the row A, cut to some inputs, and the column B."""
    tensors = torch.tensor([A[:inputs]], dtype=torch.float64), torch.tensor(B, dtype=torch.float64)[:, None]
    return Pair(*tensors, scale)


def client(id, weight, A, B, scale):
    adapter = Adapter(
        {"m": pair(A, B, scale), "q": pair(A, B, scale, inputs=2)}, {"bias": torch.tensor([4.0 * id])}
    )
    return Update(adapter, weight, Peer(id, 1, {}, {"m": scale, "q": scale}))


START = State(
    Adapter(
        {"m": pair([1, 0, 2], [0, 0], 2.0), "q": pair([1, 0, 2], [0, 0], 2.0, 2)}, {"bias": torch.zeros(1)}
    )
)
ONE = client(1, 10, [1, 0, 2], [2, 0], 2.0)
TWO = client(2, 30, [0, 4, 0], [2, 6], 0.5)
TWO_SHARED_A = client(2, 30, [1, 0, 2], [2, 6], 0.5)


def run(strategy, *updates) -> State:
    return strategy.aggregate(START, updates, np.random.default_rng(0))


def down(state: State, module: str = "m", scale: float = 0.25) -> np.ndarray:
    """The effective update that a FlexLoRA client of rank 1 and another scale gets."""
    got = FlexLoRA().task(state, Peer(3, 1, {}, {module: scale})).adapter.pairs[module]
    return got.scale * (got.B @ got.A).numpy()


def is_(got, want) -> bool:
    got, want = np.asarray(got), np.asarray(want)
    return got.shape == want.shape and np.allclose(got, want, rtol=1e-13, atol=1e-13)


def test_fedit():
    state = run(FedIT(), TWO, ONE)
    assert is_(state.delta("m"), FEDIT)
    assert is_(state.delta("q"), np.array(FEDIT)[:, :2])
    assert is_(state.adapter.pairs["m"].A, [[0.25, 3.0, 0.5]])
    assert is_(state.adapter.pairs["m"].B, [[0.875], [1.125]])


def test_ffalora():
    state = run(FFALoRA(), TWO_SHARED_A, ONE)
    assert is_(state.delta("m"), FFA)
    assert is_(state.delta("q"), np.array(FFA)[:, :2])
    assert is_(state.adapter.pairs["m"].A, [[1, 0, 2]])
    assert is_(state.adapter.pairs["m"].B, [[0.875], [1.125]])


def test_flexlora():
    state = run(FlexLoRA(), TWO, ONE)
    assert is_(state.delta("m"), IDEAL)
    assert is_(state.delta("q"), np.array(IDEAL)[:, :2])
    assert is_(singular_values(state.adapter.pairs["m"]), SIGMA)
    assert is_(down(state), FLEX_RANK_1)


@pytest.mark.parametrize("strategy", [FedIT(), FFALoRA(), FlexLoRA()], ids=lambda s: type(s).__name__)
def test_the_extra_and_the_round(strategy):
    state = run(strategy, ONE, TWO_SHARED_A)
    assert state.adapter.extra["bias"].tolist() == [7.0]
    assert state.round == 1


def test_the_error_of_fedit_that_a_run_reports():
    pairs = [ONE.adapter.pairs["m"], TWO.adapter.pairs["m"]]
    error, size = error_and_norm(pairs, [0.25, 0.75], run(FedIT(), ONE, TWO).adapter.pairs["m"])
    assert error == pytest.approx(np.linalg.norm(np.subtract(IDEAL, FEDIT)), rel=1e-13)
    assert size == pytest.approx(95**0.5, rel=1e-13)


@pytest.mark.parametrize("name", WRONG)
def test_no_result_is_the_known_wrong(name):
    wrong = np.array(WRONG[name])
    pairs = [ONE.adapter.pairs["m"], TWO.adapter.pairs["m"]]
    flex = run(FlexLoRA(), ONE, TWO)
    results = {
        "stack": (stack(pairs, [0.25, 0.75]), IDEAL),
        "compress": (compress(stack(pairs, [0.25, 0.75]), 1), FLEX_RANK_1),
        "fedit": (run(FedIT(), ONE, TWO).adapter.pairs["m"], FEDIT),
        "flexlora": (flex.adapter.pairs["m"], IDEAL),
        "flexlora down": (Pair(torch.eye(3, dtype=torch.float64), torch.tensor(down(flex))), FLEX_RANK_1),
    }
    for who, (got, right) in results.items():
        delta = got.scale * (got.B @ got.A).numpy()
        assert is_(delta, right), who
        assert np.linalg.norm(delta - wrong) > 0.1 * np.linalg.norm(right), who


def test_a_square_layer_is_not_transposed():
    # APPFL #398 sends ΔWᵀ, FedEx-LoRA adds it: square layers hide both (peers.md, 2 and 7).
    flex = run(FlexLoRA(), ONE, TWO)
    want = [[0.10202694030903439, 3.0302344407835715], [0.3026837355396076, 8.989808743837512]]
    assert is_(down(flex, "q"), want)
    for got in (flex.delta("q").numpy(), run(FedIT(), ONE, TWO).delta("q").numpy(), down(flex, "q")):
        assert np.linalg.norm(got - got.T) > 0.3 * np.linalg.norm(got)
        assert got[0, 1] > 2 * got[1, 0]
