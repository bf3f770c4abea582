"""The server's aggregation: thin QRs and the SVD of a small core, against the SVD of the dense mean.

    python experiments/benchmarks/compress.py [--clients 16] [--rank 16] [--repeats 3]

Both give the same singular directions; the table shows seconds, the ratio, and the largest difference of the
two products.
"""

import argparse
import statistics
import time

import torch

from fedlora.core.adapter import Pair
from fedlora.core.algebra import dense, weighted_sum


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.manual_seed(0)
    weights = [1 / given.clients] * given.clients
    print(f"{given.clients} clients of rank {given.rank}, {torch.get_num_threads()} threads")
    for d in (384, 768, 1024, 1536):
        pairs = [Pair(torch.randn(given.rank, d), torch.randn(d, given.rank), 2.0) for _ in weights]
        thin, full = [], []
        for _ in range(given.repeats):
            began = time.perf_counter()
            fast = weighted_sum(pairs, weights)
            thin.append(time.perf_counter() - began)
            began = time.perf_counter()
            mean = sum(
                w * p.scale * (p.B.double() @ p.A.double()) for w, p in zip(weights, pairs, strict=True)
            )
            U, S, Vh = torch.linalg.svd(mean)
            full.append(time.perf_counter() - began)
        keep = fast.rank
        best = (U[:, :keep] * S[:keep]) @ Vh[:keep]
        apart = float((dense(Pair(fast.A.double(), fast.B.double(), fast.scale)) - best).abs().max())
        a, b = statistics.median(thin), statistics.median(full)
        print(
            f"d={d:5}  factors {a:7.3f} s  dense {b:7.3f} s  {b / a:6.1f} x  largest difference {apart:.1e}"
        )


if __name__ == "__main__":
    main()
