"""Arithmetic of LoRA updates, in factor space.

A weighted sum of updates is a stack of factors; its best approximation of rank r needs two thin QRs and the
SVD of a small core, never the dense d_out × d_in matrix (unless that is cheaper, which a count of operations
decides). Every function computes in float64, whatever comes in, and returns the dtype and device of its
input. Nothing is mutated.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.threads import one_thread
from fedlora.errors import IncompatibleUpdates


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        IncompatibleUpdates: a weight is negative or not finite, or all are zero.
    """
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise IncompatibleUpdates(f"expected finite weights >= 0, one of them above 0, got {list(weights)}")
    total = math.fsum(weights)
    return [w / total for w in weights]


def mean_tensors(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k w_k T_k, summed in the given order; the weights are taken as they are.

    Raises:
        IncompatibleUpdates: the tensors are of different shapes, which torch would broadcast.
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for weight, tensor in zip(weights, tensors, strict=True):
        if tensor.shape != total.shape:
            raise IncompatibleUpdates(
                f"expected tensors of one shape, got {tuple(total.shape)} and {tuple(tensor.shape)}"
            )
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total.to(tensors[0].dtype)


def mean_extras(extras: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of every named tensor, such as those of a classification head."""
    return {name: mean_tensors([extra[name] for extra in extras], weights) for name in extras[0]}


def mean_factors(pairs: Sequence[Pair], weights: Sequence[float], scale: float | None = None) -> Pair:
    """A and B averaged each by itself, (Σ w_k A_k, Σ w_k (s_k / s) B_k), for a product with `scale` s.

    s is the first pair's scale if none is given. The ratio goes on B alone, as in `rescale`, by which the
    clients' pairs were made: in a round without learning the mean is what was sent, whatever the scales, and
    an update given as (A, B / c, c · s_k) counts alike. The product of the means is not the mean of the
    products; it depends on how each is split: (c · A, B / c, s_k) gives another, with any rule for scales.
    """
    scale = pairs[0].scale if scale is None else scale
    if scale == 0:
        raise IncompatibleUpdates("a pair cannot be expressed with scale 0")
    ratios = [w * (pair.scale / scale) for w, pair in zip(weights, pairs, strict=True)]
    return Pair(
        mean_tensors([pair.A for pair in pairs], weights),
        mean_tensors([pair.B for pair in pairs], ratios),
        scale,
    )


def rescale(pair: Pair, scale: float) -> Pair:
    """The same ΔW with another scale, the ratio put on B; A is untouched."""
    if pair.scale == scale:
        return pair
    if scale == 0:
        raise IncompatibleUpdates("a pair cannot be expressed with scale 0")
    return Pair(pair.A, (pair.B.double() * (pair.scale / scale)).to(pair.B.dtype), scale)


def held(ranks: Sequence[int], weights: Sequence[float], rank: int) -> Tensor:
    """p_i = Σ_{k: r_k ≥ i} w_k, the weight of those who hold direction i; float64, (rank,), never rising."""
    reach = torch.tensor(ranks)[:, None] > torch.arange(rank)
    return torch.tensor(weights, dtype=torch.float64) @ reach.to(torch.float64)


def mean_rows(tensors: Sequence[Tensor], weights: Sequence[float], old: Tensor) -> Tensor:
    """Row i averaged over the tensors that have it, Σ_k w_k T_k[i] / p_i; the old one where none has."""
    p = held([len(tensor) for tensor in tensors], weights, max(map(len, tensors))).to(old.device)
    total = torch.zeros(len(p), *old.shape[1:], dtype=torch.float64, device=old.device)
    for weight, tensor in zip(weights, tensors, strict=True):
        total[: len(tensor)].add_(tensor.to(torch.float64), alpha=weight)
    top = int((p > 0).sum())
    return torch.cat([total[:top] / p[:top, None], old[top:].to(torch.float64)]).to(tensors[0].dtype)


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Σ_k w_k s_k B_k A_k as one pair of rank Σ_k r_k and scale 1, exactly.

    Weight and scale go on B alone: on both factors they would count twice.
    """
    wide = _wide(pairs, weights)
    return Pair(wide.A.to(pairs[0].A.dtype), wide.B.to(pairs[0].B.dtype), 1.0)


def _wide(pairs: Sequence[Pair], weights: Sequence[float | Tensor]) -> Pair:
    """`stack` in float64; a weight may be one a direction."""
    columns = [
        pair.B.double() * (torch.as_tensor(w, dtype=torch.float64, device=pair.B.device) * pair.scale)
        for pair, w in zip(pairs, weights, strict=True)
    ]
    return Pair(torch.cat([pair.A.double() for pair in pairs]), torch.cat(columns, dim=1), 1.0)


def accumulate(total: Pair | None, gain: Pair) -> Pair:
    """The sum of both as one pair of scale 1 and of rank min(d_out, d_in) at most, without an SVD.

    Factors are stacked while that is smaller than the dense sum; beyond, the sum itself is one of the factors
    and the identity the other. A function of its bits alone: server and clients that add up the same gains
    hold the same total.
    """
    pairs = [gain] if total is None else [total, gain]
    if sum(pair.rank for pair in pairs) < min(gain.shape):
        return stack(pairs, [1.0] * len(pairs))
    summed = torch.stack([pair.scale * (pair.B.double() @ pair.A.double()) for pair in pairs]).sum(0)
    return of_dense(summed.to(gain.A.dtype))


def of_dense(matrix: Tensor) -> Pair:
    """A dense (d_out, d_in) matrix as a pair of scale 1, bit for bit: itself and an identity."""
    d_out, d_in = matrix.shape
    eye = torch.eye(min(d_out, d_in), dtype=matrix.dtype, device=matrix.device)
    return Pair(matrix, eye) if d_out <= d_in else Pair(eye, matrix)


def negative(pair: Pair) -> Pair:
    """−ΔW, with scale 1."""
    return Pair(pair.A.clone(), (pair.B.double() * -pair.scale).to(pair.B.dtype), 1.0)


def residual(pairs: Sequence[Pair], weights: Sequence[float], approximation: Pair) -> Pair:
    """What `approximation` lacks of Σ_k w_k s_k B_k A_k, as one pair."""
    return stack([*pairs, approximation], [*weights, -1.0])


def dense(pair: Pair) -> Tensor:
    """ΔW = scale · B @ A itself, (d_out, d_in)."""
    return (pair.scale * (pair.B.double() @ pair.A.double())).to(pair.A.dtype)


def pad(pair: Pair, rank: int) -> Pair:
    """The same ΔW with zero rows of A and zero columns of B up to `rank`."""
    more = rank - pair.rank
    if more < 0:
        raise IncompatibleUpdates(f"cannot pad a pair of rank {pair.rank} to the smaller rank {rank}")
    A = torch.nn.functional.pad(pair.A, (0, 0, 0, more))
    return Pair(A, torch.nn.functional.pad(pair.B, (0, more)), pair.scale)


def truncate(pair: Pair, rank: int) -> Pair:
    """The first `rank` rows of A and columns of B; the whole pair if it has no more."""
    if rank >= pair.rank:
        return Pair(pair.A.clone(), pair.B.clone(), pair.scale)
    return Pair(pair.A[:rank].clone(), pair.B[:, :rank].clone().contiguous(), pair.scale)


def beyond(pair: Pair, rank: int) -> Pair:
    """What `truncate` leaves out, the other rows of A and columns of B; of rank 0 if there are none."""
    return Pair(pair.A[rank:].clone(), pair.B[:, rank:].clone().contiguous(), pair.scale)


def norm(pair: Pair) -> float:
    """‖ΔW‖_F from the factors: ‖R_b R_aᵀ‖_F of their thin QRs.

    Unlike √Σ(BᵀB ∘ AAᵀ) this stays accurate where the columns cancel, as in a residual that is almost zero.
    """
    return float(torch.linalg.matrix_norm(_core(pair)[2]))


def error_and_norm(pairs: Sequence[Pair], weights: Sequence[float], result: Pair) -> tuple[float, float]:
    """(‖Σ_k w_k s_k B_k A_k − result‖_F, ‖Σ_k w_k s_k B_k A_k‖_F), computed in float64."""
    wide = _wide(pairs, weights)
    return norm(_wide([wide, result], [1.0, -1.0])), norm(wide)


@one_thread()
def singular_values(pair: Pair) -> Tensor:
    """The singular values of ΔW, largest first, float64, at most min(rank, d_out, d_in) of them."""
    sigma: Tensor = torch.linalg.svdvals(_core(pair)[2])
    return sigma[: pair.rank]


def effective_rank(pair: Pair) -> float:
    """How many directions carry ΔW: exp of the entropy of σ / Σσ (Roy & Vetterli, 2007); 0 for ΔW = 0."""
    sigma = singular_values(pair)
    share = sigma[sigma > 0] / sigma.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0


def compress(pair: Pair, rank: int | None = None, scale: float | None = None) -> Pair:
    """The best approximation of ΔW of at most `rank` (Eckart–Young), split as U·S | Vᵀ.

    Rows of A are orthonormal, so that every direction has a gradient, those with σ = 0 too; the balanced
    split √S | √S would leave them dead. Directions below float32's rounding of ΔW (float64's, for factors in
    float64) are dropped, but one is always kept. A coarser dtype drops no more: each column of B has
    exponents of its own, so that bfloat16 holds a small direction as well as the largest.

    Args:
        pair: any pair, most often a stack.
        rank: at most so many directions; None keeps all there are.
        scale: the scale to express the result with; None keeps the pair's.
    """
    return _compress(pair, rank, pair.scale if scale is None else scale, pair.A.dtype)


def weighted_sum(
    pairs: Sequence[Pair], weights: Sequence[float | Tensor], scale: float | None = None
) -> Pair:
    """Σ_k w_k s_k B_k A_k in the fewest directions: `compress` of the stack, without rounding in between.

    Args:
        pairs: updates of one module, of any ranks and scales.
        weights: one a pair, or one a direction of it, (r_k,); taken as they are.
        scale: the scale to express the result with; None takes the first pair's.
    """
    scale = pairs[0].scale if scale is None else scale
    return _compress(_wide(pairs, weights), None, scale, pairs[0].A.dtype)


def _compress(pair: Pair, rank: int | None, scale: float, dtype: torch.dtype) -> Pair:
    """`compress` of a float64 pair, into the given scale and dtype."""
    if scale == 0:
        raise IncompatibleUpdates("a pair cannot be expressed with scale 0")
    left, right, core = _core(pair)
    U, sigma, Vh = _svd(core)
    # What is dropped stays below the rounding all together, not only one by one.
    tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
    finest = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    rounding = max(finest, max(core.shape) * torch.finfo(torch.float64).eps)
    keep = min(max(1, int((tail > rounding * tail[0]).sum())), pair.rank if rank is None else rank)
    U, Vh = U[:, :keep] * (sigma[:keep] / scale), Vh[:keep]
    B = U if left is None else left @ U
    A = Vh if right is None else Vh @ right.T
    return Pair(A.to(dtype).contiguous(), B.to(dtype).contiguous(), scale)


@one_thread()
def pad_orthonormal(pair: Pair, rank: int, rng: np.random.Generator) -> Pair:
    """The same ΔW padded to `rank`: new rows of A are orthonormal to all others, and B is zero there.

    Beyond d_in rows no more orthonormal ones exist; the rest are random rows of length 1.
    """
    more = rank - pair.rank
    if more <= 0:
        return pair
    fresh = torch.from_numpy(rng.standard_normal((more, pair.shape[1]))).to(pair.A.device)
    room = max(0, min(more, pair.shape[1] - pair.rank))
    rows = torch.linalg.qr(torch.cat([pair.A.double(), fresh[:room]]).T).Q.T[pair.rank :]
    fresh = torch.cat([rows, fresh[room:] / fresh[room:].norm(dim=1, keepdim=True)])
    padded = pad(pair, rank)
    return Pair(torch.cat([pair.A, fresh.to(pair.A.dtype)]), padded.B, pair.scale)


@one_thread()
def _core(pair: Pair) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(Q_b, Q_a, core) in float64 with scale·B·A = Q_b · core · Q_aᵀ; (None, None, dense) where cheaper."""
    # Operations by Golub & Van Loan, §5.2 and §8.6: two QRs with their Qs and the SVD of an r × r core,
    # against the product and the SVD of the whole matrix.
    d_out, d_in = pair.shape
    r, small = pair.rank, min(pair.shape)
    B, A = pair.B.double() * pair.scale, pair.A.double()
    thin = 4 * r * r * (d_out + d_in) + 22 * r**3
    full = 2 * r * d_out * d_in + 22 * small**3 + 4 * small**2 * (max(d_out, d_in) - small)
    if r >= small or thin >= full:
        return None, None, B @ A
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
    return left.Q, right.Q, left.R @ right.R.T


@one_thread()
def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD (U, S, Vᵀ), with a second try where LAPACK's divide and conquer does not converge."""
    try:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # A shift far below float32's rounding separates the clustered singular values that stop it.
        shift = torch.linspace(-1, 1, matrix.numel(), dtype=matrix.dtype, device=matrix.device)
        shift = shift.reshape(matrix.shape) * 1e-12 * matrix.norm()
        U, S, Vh = torch.linalg.svd(matrix + shift, full_matrices=False)
    return U, S, Vh
