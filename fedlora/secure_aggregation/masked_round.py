"""A round with secure aggregation: the server learns the weighted sum of the updates only.

It serves strategies that need no more than a mean of the factors. A client sends its shared tensors times its
weight, padded to the largest ranks, and the weight itself, all under masks
(`fedlora.secure_aggregation.protocol`). Under client-level privacy it sends its change instead, which it
clips itself, since nobody else sees it. With `compression=randk` it also sends its change, and of this the
numbers at the places alone that all clients of the round share.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedlora.compression import MessageKey
from fedlora.compression.randk import common_places
from fedlora.core.adapter import Adapter
from fedlora.core.messages import Peer, Task, Update
from fedlora.core.vectors import clipped, embed, flat, form, moved_factors, split, with_shared
from fedlora.errors import IncompatibleUpdates
from fedlora.rounds.aggregation.base import Delivery
from fedlora.rounds.codec import array_of, metrics_of, numbers_of
from fedlora.rounds.exchange import line_of
from fedlora.secure_aggregation.crypto import POINT, Words, decode, encode
from fedlora.secure_aggregation.protocol import RECORD, mask
from fedlora.secure_aggregation.secure_round import Add, SecureRound
from fedlora.training.client import TrainResult

SUM = "sum"  # the name of the record with the `Terms`, beside the record of the masks


@dataclass(frozen=True)
class Terms:
    """What a client has to send, as the server asks for it.

    Args:
        form: name -> shape of each shared tensor at the largest ranks.
        scales: module -> scale in which B is expressed.
        clients: the largest number of clients in the sum.
        uniform: whether all weights are 1; otherwise a weight is the number of examples.
        clip: the largest norm of the change, which is then sent instead of the values; None sends the values.
        cap: with a clip, the number of examples from which on a client has the weight 1; None gives all the
            weight 1.
        places: seed, round and number of the places whose change is sent; None sends all numbers.
    """

    form: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float]
    clients: int
    uniform: bool = False
    clip: float | None = None
    cap: int | None = None
    places: tuple[int, int, int] | None = None

    @property
    def at(self) -> Any:
        """The places in the vector of the form whose numbers are sent, growing."""
        among = sum(math.prod(shape) for shape in self.form.values())
        if self.places is None:
            return np.arange(among)
        seed, round, count = self.places
        return common_places(count, among, MessageKey(seed, 0, round))

    def write(self) -> ConfigRecord:
        """The terms as a record of a message."""
        said = {name: value for name, value in self.__dict__.items() if (name, value) != ("places", None)}
        return ConfigRecord({"terms": json.dumps(said)})

    @classmethod
    def read(cls, record: ConfigRecord) -> "Terms":
        """The terms that `write` wrote."""
        read = json.loads(str(record["terms"]))
        return cls(**(read | {"form": {name: tuple(shape) for name, shape in read["form"].items()}}))

    def vector(self, sent: Adapter, got: Adapter, examples: int) -> Tensor:
        """The summand of one client, float64: its weighted tensors or its change, then its weight.

        With a clip the last number is 0, because the sum of weights would reveal how many clients took part.

        Args:
            sent: the adapter that the client received.
            got: the adapter that it has trained.
            examples: its number of rows.

        Raises:
            IncompatibleUpdates: there are common places, and this client's ranks are others than the form's.
        """
        tensors = dict(sent.tensors())
        if self.places is not None and any(tuple(tensors[n].shape) != s for n, s in self.form.items()):
            raise IncompatibleUpdates("expected the ranks of all clients, in which they share places")
        values = flat(embed(got, self.form, self.scales))
        if self.clip is not None or self.places is not None:
            values = (values - flat(embed(sent, self.form, self.scales)))[self.at]
        if self.clip is None:
            weight = 1.0 if self.uniform else float(examples)
            return torch.cat([values * weight, torch.tensor([weight], dtype=torch.float64)])
        weight = 1.0 if self.cap is None else min(examples / self.cap, 1.0)
        change = clipped(values, self.clip)
        # Truncated to the fixed-point grid: rounding to nearest could increase the norm beyond the clip.
        bounded = (change * weight * POINT).trunc() / POINT
        return torch.cat([bounded, torch.zeros(1, dtype=torch.float64)])


def write_masked(
    message: Message, task: Task, outcome: TrainResult, examples: int, context: Context
) -> RecordDict:
    """A client's reply: its masked vector, the round and its metrics.

    Raises:
        IncompatibleUpdates: the update is not finite, or this client is not at this step of the round.
    """
    records = message.content.config_records
    terms = Terms.read(records[SUM])
    words = encode(terms.vector(task.adapter, outcome.adapter, examples), terms.clients)
    masked = Array(mask(words, records[RECORD], context))
    metrics = {name: float(value) for name, value in outcome.metrics.items()}
    numbers = MetricRecord({"round": records["config"]["round"], **metrics})  # type: ignore[dict-item]
    return RecordDict({"arrays": ArrayRecord({"masked": masked}), "metrics": numbers})


class SecureSum(Delivery):
    """The server's side of a round with secure aggregation. Making one exchanges the keys and shares.

    Args:
        grid: carries messages to the nodes.
        nodes: the sampled nodes.
        round: the round, from 1.
        wide: the task of a client of the largest ranks.
        uniform: as in `Terms`.
        clip: as in `Terms`.
        cap: as in `Terms`.
        places: as in `Terms`.

    Raises:
        ConfigError: there are fewer than 3 nodes.
        IncompatibleUpdates: too few of them answered.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Sequence[int],
        round: int,
        wide: Task,
        uniform: bool = False,
        clip: float | None = None,
        cap: int | None = None,
        places: tuple[int, int, int] | None = None,
    ) -> None:
        self.exchange = SecureRound(grid, nodes, round)
        super().__init__(self.exchange.open())
        scales = {name: pair.scale for name, pair in wide.adapter.pairs.items()}
        self._terms = Terms(form(wide), scales, len(self.nodes), uniform, clip, cap, places)
        self._wide, self._vectors = wide, dict[int, Words]()

    def records(self, node: int) -> dict[str, ConfigRecord]:
        """The records that a node's training message needs: the terms and the encrypted shares."""
        return {SUM: self._terms.write(), RECORD: self.exchange.attachment(node)}

    def read(self, reply: Message, task: Task, peer: Peer, round: int) -> Update:
        """Keep a node's masked vector, and return an update without tensors, which nobody can see.

        Raises:
            IncompatibleUpdates: the client failed, or its reply is of another round or is not one vector.
        """
        metrics = metrics_of(numbers_of(reply, round))
        length = len(self._terms.at) + 1
        arrays = reply.content.array_records.get("arrays") or ArrayRecord()
        if set(arrays) != {"masked"}:
            raise IncompatibleUpdates(f"expected one masked vector, got {sorted(arrays)[:3]}")
        vector = array_of("masked", arrays["masked"], "uint64", (length,))
        self._vectors[reply.metadata.src_node_id] = vector
        return Update(Adapter({}), 1.0, peer, metrics)

    def count(
        self,
        round: int,
        peers: Mapping[int, Peer],
        lines: list[dict[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        """Add the bytes of the key exchange to the clients' lines, and a line for each dropped client.

        Args:
            round: the round, from 1.
            peers: the clients, by node.
            lines: the round's lines of clients.jsonl; changed in place and sorted by client.
            warn: is called with one line of text for each client that was dropped.
        """
        known = {line["client"]: line for line in lines}
        for node, down in self.exchange.bytes_down.items():
            peer, up = peers[node], self.exchange.bytes_up[node]
            if peer.id in known:
                known[peer.id]["bytes_down"] += down
                known[peer.id]["bytes_up"] += up
                continue
            why = self.exchange.dropped.get(node, "no reply")
            lines.append(line_of(round, peer, down, up) | {"status": "dropped", "reason": why})
            warn(f"round {round}: {peer.called} dropped: {why}")
        lines.sort(key=lambda line: int(line["client"]))

    def total(self, add: Add | None = None) -> Tensor:
        """The sum of the clipped changes, float64, for client-level privacy.

        Args:
            add: as for `SecureRound.total`.

        Raises:
            IncompatibleUpdates: too few vectors arrived, or shares are wrong.
        """
        return self._spread(decode(self.exchange.total(self._vectors, add))[:-1])

    def mean(self, add: Add | None = None) -> Update:
        """The weighted mean of the vectors as a single update.

        Args:
            add: as for `SecureRound.total`.

        Raises:
            IncompatibleUpdates: too few vectors arrived, or shares are wrong.
        """
        total = decode(self.exchange.total(self._vectors, add))
        if not total[-1] > 0:
            raise IncompatibleUpdates(
                f"secure sum: expected a sum of weights above 0, got {float(total[-1])}"
            )
        mean = split(self._spread(total[:-1] / total[-1]), self._terms.form)
        changes = self._terms.places is not None
        return Update(moved_factors(self._wide, mean) if changes else with_shared(self._wide, mean))

    def _spread(self, total: Tensor) -> Tensor:
        """Each number of a sum at its place in the vector of the form, and zero at all others."""
        among = sum(math.prod(shape) for shape in self._terms.form.values())
        whole = torch.zeros(among, dtype=torch.float64)
        whole[self._terms.at] = total
        return whole
