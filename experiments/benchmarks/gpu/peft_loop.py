"""A good sequential loop of transformers and PEFT, the peer that fedlora's clients are measured against.

One client trains after the other on one base in memory. What was chosen in its favour: the base in bfloat16
and the factors too, so that no layer casts; the whole step in one pass where that fits, and otherwise as few
passes as memory allows; response logits only; torch's fused AdamW; losses that stay on the device until the
round ends, so that the loop itself never waits. Of the ways to attend that are there (`WAYS`) it takes the
one in which a step was fastest: rows packed without padding, by torch's attention for rows of any length or
by flash-attention where that is installed, or rows of like length padded on the right to a common one, by
torch's causal attention without a mask. The loss is fedlora's: the mean over rows of a row's mean.
"""

import copy
import inspect
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.data import Example

VARLEN = "packed_varlen"
TIGHT = 0.8  # in a padded pass the shortest row has at least this share of the longest one's tokens
PADDED = "padded, sdpa"
WAYS = {  # transformers' name of each
    "packed, varlen_attn": VARLEN,
    "packed, flash-attention": "flash_attention_2",
    PADDED: "sdpa",
}
IGNORED = -100


@dataclass(frozen=True)
class Work:
    """One client's round.

    Args:
        adapter: where it starts, float32 on the CPU, as a message brings it.
        batches: in order, a step each.
    """

    adapter: Adapter
    batches: Sequence[Sequence[Example]]


class PeftLoop:
    """The loop, over a decoder's twin that shares its weights.

    Args:
        model: a decoder of transformers, frozen; it is not changed.
        adapter: which layers, what rank and what scale.
        rate: the learning rate.
        clip: the largest norm of a gradient.

    Attributes:
        way: the way to attend that was chosen.
        room: tokens of a pass at most, padding included; None for a whole step.
        refused: the ways that were tried in vain, and why.
    """

    def __init__(self, model: Any, adapter: Adapter, rate: float = 1e-4, clip: float = 1.0) -> None:
        from peft import LoraConfig, get_peft_model

        first = next(iter(adapter.pairs.values()))
        twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
        config = LoraConfig(
            r=first.rank,
            lora_alpha=first.scale * first.rank,
            target_modules=list(adapter.pairs),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of peft about transformers
            self.model = get_peft_model(twin, config, autocast_adapter_dtype=False).get_base_model()
        found = dict(self.model.named_parameters())
        self._factors: dict[str, nn.Parameter] = {
            f"{name}.{factor}": found[f"{name}.lora_{factor}.default.weight"]
            for name, factor in itertools.product(adapter.pairs, "AB")
        }
        self._rate, self._clip = rate, clip
        self.way, self.refused = PADDED, dict[str, str]()
        self.room: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def choose(self, work: Work) -> None:
        """Take the way to attend in which a step of this client is fastest."""
        once = Work(work.adapter, work.batches[:1])
        took: dict[str, float] = {}
        rooms: dict[str, int | None] = {}
        for way in WAYS:
            self.room = None
            try:
                self._attend(way)
                self.round([once])  # warms up
                self._wait()
                began = time.perf_counter()
                self.round([once])
                self._wait()
            except (RuntimeError, ImportError, ValueError, TypeError) as error:
                self.refused[way] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                continue
            took[way], rooms[way] = time.perf_counter() - began, self.room
        if not took:
            raise RuntimeError(f"the PEFT loop can attend in no way: {self.refused}")
        fastest = min(took, key=lambda way: took[way])
        self._attend(fastest)
        self.room = rooms[fastest]

    def round(self, work: Sequence[Work]) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Train the clients one after the other: their factors, and their mean losses, (clients,).

        Where memory does not suffice, a pass holds half as much from then on, and the round begins anew.
        """
        while True:
            try:
                each = [self._train(own) for own in work]
                return [factors for factors, _ in each], torch.stack([loss for _, loss in each])
            except torch.OutOfMemoryError:
                largest = max(sum(row.size for row in batch) for own in work for batch in own.batches)
                self.room = min(self.room or largest, largest) // 2
                if self.room < 256:
                    raise
            for parameter in self._factors.values():
                parameter.grad = None
            torch.cuda.empty_cache()

    def _train(self, work: Work) -> tuple[dict[str, Tensor], Tensor]:
        parameters = list(self._factors.values())
        with torch.no_grad():
            for name, tensor in work.adapter.tensors():
                self._factors[name].copy_(tensor, non_blocking=True)
        optimizer = torch.optim.AdamW(
            parameters, self._rate, weight_decay=0.0, fused=self.device.type == "cuda"
        )
        total = torch.zeros((), device=self.device)
        for batch in work.batches:
            for rows in self._passes(batch):
                loss = self._loss(rows, len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            nn.utils.clip_grad_norm_(parameters, self._clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ended = {name: parameter.detach().clone() for name, parameter in self._factors.items()}
        return ended, total / len(work.batches)

    def _passes(self, batch: Sequence[Example]) -> Iterator[list[Example]]:
        """The rows of a step, cut into as few passes as room and padding allow."""
        packed, held = self.way != PADDED, list[Example]()
        for row in sorted(batch, key=lambda row: -row.size):
            longest = held[0].size if held else row.size
            size = sum(one.size for one in held) + row.size if packed else (len(held) + 1) * longest
            full = self.room is not None and size > self.room
            if held and (full or not (packed or row.size >= TIGHT * longest)):
                yield held
                held = []
            held.append(row)
        yield held

    def _loss(self, rows: Sequence[Example], count: int) -> Tensor:
        """The sum of the rows' mean losses, divided by the rows of the step."""
        packed, width = self.way != PADDED, max(row.size for row in rows)
        sizes = [row.size for row in rows]
        starts = [0, *itertools.accumulate(sizes)] if packed else range(0, len(rows) * width, width)
        places, wanted, weights = [], [], []
        for begin, row in zip(starts, rows, strict=False):
            answer = [(at, token) for at, token in enumerate(row.target) if at and token != IGNORED]
            places += [begin + at - 1 for at, _ in answer]
            wanted += [token for _, token in answer]
            weights += [1 / (len(answer) * count)] * len(answer)
        filled = [row.input_ids + [0] * (0 if packed else width - row.size) for row in rows]
        ids = self._there([token for one in filled for token in one]).view(1 if packed else len(rows), -1)
        named = self._packing(sizes) if packed else {}
        states = self.model.get_decoder()(input_ids=ids, use_cache=False, **named).last_hidden_state
        states = states.flatten(0, 1)[self._there(places)]
        logits = self.model.get_output_embeddings()(states).float()
        each = F.cross_entropy(logits, self._there(wanted), reduction="none")
        return (each * self._there(weights)).sum()

    def _packing(self, sizes: Sequence[int]) -> dict[str, Any]:
        """How rows lie end to end, under the names by which transformers hands it to attention."""
        ends = self._there([0, *itertools.accumulate(sizes)]).int()
        positions = self._there([at for size in sizes for at in range(size)])[None]
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        return {"position_ids": positions, **lengths, "max_length_q": max(sizes), "max_length_k": max(sizes)}

    def _there(self, values: Sequence[float]) -> Tensor:
        """Numbers on the device, without waiting for it."""
        made = torch.tensor(values)
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made

    def _attend(self, way: str) -> None:
        if WAYS[way] == VARLEN:
            register()
        elif WAYS[way] == "flash_attention_2" and find_spec("flash_attn") is None:
            raise ImportError("flash-attn is not installed")  # transformers would look for it on the hub
        self.model.set_attn_implementation(WAYS[way])
        self.way = way

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def register() -> None:
    """Teach transformers torch's attention over rows that lie end to end."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    known = inspect.signature(varlen_attn).parameters

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        # The arguments have changed from release to release.
        more: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if q.shape[1] != k.shape[1] and "enable_gqa" in known:
            more["enable_gqa"] = True
        elif q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if "scale" in known:
            more["scale"] = named["scaling"]
        ends, most = named["cu_seq_lens_q"], named["max_length_q"]
        found: Any = varlen_attn(q, k, v, ends, ends, most, most, **more)
        return found[None], None

    def no_mask(*args: Any, **named: Any) -> None:
        return None

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, no_mask)
