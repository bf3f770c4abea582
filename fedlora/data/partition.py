"""How one set of rows becomes many clients.

iid        a random deal in equal parts.
dirichlet  label skew: each label's rows are split by proportions drawn from Dirichlet(alpha) (T.-M. H. Hsu,
           H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
           Classification", 2019, https://arxiv.org/abs/1909.06335; label by label as in M. Yurochkin et al.,
           ICML 2019, https://arxiv.org/abs/1905.12022).
shards     label skew: rows sorted by label, cut into equal shards, a few shards a client (B. McMahan et al.,
           "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
           https://arxiv.org/abs/1602.05629).
natural    the clients that the data names.

The same seed gives the same parts in every process and for every PYTHONHASHSEED.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from fedlora.core.natural_order import in_order
from fedlora.data.dataset import Row
from fedlora.errors import ConfigError, DataError
from fedlora.seeds import generator

Indices = NDArray[np.int64]
REDRAWS = 100


@dataclass(frozen=True, eq=False)
class Part:
    """One client's share: its name and the positions of its rows."""

    name: str
    rows: Indices


def partition(
    rows: Sequence[Row],
    how: str,
    clients: int | None,
    alpha: float = 0.5,
    shards: int = 2,
    min_rows: int = 1,
    max_rows: int | None = None,
    seed: int = 0,
    group: Callable[[Row], str | None] = attrgetter("target"),
) -> list[Part]:
    """Deal the rows to clients: disjoint parts, each in a seeded random order.

    Args:
        rows: the training rows.
        how: "iid", "dirichlet", "shards" or "natural".
        clients: how many; None means all natural clients, a smaller number those with the most rows.
        alpha: of the Dirichlet proportions; small is more skewed.
        shards: how many shards a client gets.
        min_rows: the least a client may have.
        max_rows: the most a client keeps, a random subset of its rows.
        seed: of every draw.
        group: the label of a row, by which "dirichlet" and "shards" deal it (`LearningTask.group`); its
            target by default.
    """
    _check(len(rows), how, clients, alpha, shards, min_rows, max_rows)
    rng = generator(seed, "partition")
    if how == "natural":
        named = _natural(_groups(rows, attrgetter("client"), how), clients)
    else:
        count = clients or 1
        if how == "iid":
            parts = np.array_split(rng.permutation(len(rows)), count)
        else:
            groups = _groups(rows, group, how)
            labels = [groups[label] for label in in_order(groups)]
            if how == "dirichlet":
                parts = _dirichlet(labels, count, alpha, min_rows, rng)
            else:
                parts = _shards(labels, count, shards, rng)
        width = len(str(count - 1))
        named = {f"client-{i:0{width}}": part for i, part in enumerate(parts)}
    enough = sum(len(part) >= min_rows for part in named.values())
    if enough < len(named):
        raise DataError(
            f"partition {how}: expected at least {min_rows} rows (min_rows) for each of {len(named)} "
            f"clients, got {enough} clients with so many; lower min_rows or clients"
        )
    return [Part(name, rng.permutation(part)[:max_rows]) for name, part in named.items()]


def _check(
    rows: int, how: str, clients: int | None, alpha: float, shards: int, min_rows: int, max_rows: int | None
) -> None:
    if how not in ("iid", "dirichlet", "shards", "natural"):
        raise ConfigError(f"partition: expected iid, dirichlet, shards or natural, got {how!r}")
    if clients is None and how != "natural":
        raise ConfigError(f"partition {how}: expected a number of clients, got none; set clients")
    if clients is not None and clients < 1:
        raise ConfigError(f"partition {how}: expected at least 1 client, got clients={clients}")
    if how == "dirichlet" and not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"partition {how}: expected alpha above 0, got {alpha}")
    if how == "shards" and shards < 1:
        raise ConfigError(f"partition {how}: expected at least 1 shard a client, got shards={shards}")
    if min_rows < 1:
        raise ConfigError(f"partition {how}: expected min_rows of at least 1, got {min_rows}")
    if max_rows is not None and max_rows < min_rows:
        raise ConfigError(
            f"partition {how}: expected max_rows of min_rows={min_rows} or more, got {max_rows}"
        )
    needed = (clients or 1) * (shards if how == "shards" else 1)
    if rows < needed:
        pieces = "shards" if how == "shards" else "clients"
        raise DataError(
            f"partition {how}: expected a row for each of {needed} {pieces}, got {rows} rows; lower {pieces}"
        )


def _groups(rows: Sequence[Row], group: Callable[[Row], str | None], how: str) -> dict[str, Indices]:
    members: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        key = group(row)
        if key is None:
            raise DataError(
                f"partition {how}: expected a client field in every row, got none in row {index}; "
                "name its column with data.client=, give a folder of files, a client each, or use iid"
            )
        members.setdefault(key, []).append(index)
    return {key: np.array(indices, dtype=np.int64) for key, indices in members.items()}


def _natural(groups: dict[str, Indices], clients: int | None) -> dict[str, Indices]:
    if clients is not None and clients > len(groups):
        raise DataError(
            f"partition natural: expected at most {len(groups)} clients, as many as the data has, "
            f"got clients={clients}; lower clients"
        )
    largest = sorted(in_order(groups), key=lambda name: -len(groups[name]))[:clients]  # stable
    return {name: groups[name] for name in in_order(largest)}


def _dirichlet(
    labels: list[Indices], clients: int, alpha: float, min_rows: int, rng: np.random.Generator
) -> list[Indices]:
    best = 0
    for _ in range(REDRAWS):
        pieces: list[list[Indices]] = []
        for members in labels:
            shares = rng.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            pieces.append(np.split(rng.permutation(members), cuts))
        parts = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        smallest = min(map(len, parts))
        if smallest >= min_rows:
            return parts
        best = max(best, smallest)
    raise DataError(
        f"partition dirichlet: expected at least {min_rows} rows for each of {clients} clients, got a "
        f"smallest client of {best} rows at best in {REDRAWS} draws; raise alpha={alpha}, "
        f"lower clients or min_rows"
    )


def _shards(labels: list[Indices], clients: int, shards: int, rng: np.random.Generator) -> list[Indices]:
    by_label = np.concatenate([rng.permutation(members) for members in labels])
    pieces = np.array_split(by_label, clients * shards)
    hands = rng.permutation(len(pieces)).reshape(clients, shards)
    return [np.concatenate([pieces[i] for i in hand]) for hand in hands]
