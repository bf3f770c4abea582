"""What is peculiar to a model, tried when it is loaded.

It is tried, not believed: a row in a padded batch must get the logits that it gets alone. What a trial would
take too long for is read from the configuration.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.data.examples import Side
from fedlora.errors import ModelError
from fedlora.models.state import put_back
from fedlora.models.traits import Traits
from fedlora.tasks import LearningTask

SHORT = (
    17,
    7,
    3,
)  # tokens of the rows of a trial, at least; or of a large model, for which it takes too long:
LEAST = (9, 5, 3)
MOST = 256  # tokens of the longest row of a trial: attention grows with its square
WORK = 3e8  # parameters times tokens of the longest row: about a tenth of a second for all passes
ROWS, TOKENS, PART = "rows", "tokens", "part"  # what a module's input has as its first dimension
# Numbers of a configuration beyond which a model may treat a row in another way.
BREAKS = re.compile(r"window|top_?k|block|chunk|local|landmark|segment_means|stride|original_max")


class Trial:
    """Made-up rows of several lengths, and what a model says to them.

    Args:
        model: a transformers model, frozen.
        tokenizer: its tokenizer.
        task: what the model is to be trained for, which says whether there are logits of every token, and
            whether tokens must not see those that follow.
        pad: what to pad with.
        room: how many tokens a row may have; None for any number.
        path: where the model came from, for messages.
    """

    def __init__(
        self, model: Any, tokenizer: Any, task: LearningTask, pad: int, room: int | None, path: str
    ) -> None:
        self.model, self.task, self.pad, self._path = model, task, pad, path
        self.stateful = False
        self._coarse = any(not p.is_floating_point() for p in model.parameters())
        self._seen: list[dict[str, set[str]]] = []
        self._inputs: dict[str, Tensor] = {}  # of the latest pass, those that hold tokens row after row
        self._single: dict[str, Tensor] = {}  # of the first row by itself
        self._in_order: set[str] = set()
        self.rows = made_up(model, tokenizer, pad, lengths(model, room))

    def traits(self) -> Traits:
        """What these rows show.

        Raises:
            ModelError: the model takes none of them; or it is to generate and sees later tokens.
        """
        modules = dict(self.model.named_modules())
        handles = [m.register_forward_pre_hook(self._note(n), with_kwargs=True) for n, m in modules.items()]
        try:
            alone = self._alone()
            mixes = self._twins(alone[0])
            side, limit = ("right", 0) if mixes else self._padding(alone)
            prompts = not self.task.generates or self._prompts(alone)
        finally:
            for handle in handles:
                handle.remove()
        tried = [len(row) for row in self.rows]
        beyond = scaled_beyond(self.model)
        if beyond is not None and (limit is None or limit >= max(n for n in (0, *tried) if n <= beyond)):
            limit = beyond
        elif self.stateful and limit is None:
            limit = tried[0]  # what it does with longer rows is not known
        by_row = frozenset(n for n in modules if all(seen.get(n) == {ROWS} for seen in self._seen))
        by_token = frozenset(n for n in self._in_order if all(seen.get(n) == {TOKENS} for seen in self._seen))
        self._inputs, self._single = {}, {}
        stateful, lists = self.stateful or beyond is not None, self._chosen(modules)
        chosen = frozenset(name for name in modules if name.startswith(lists)) if lists else frozenset()
        return Traits(side, limit, mixes, stateful, prompts, by_row, by_token, chosen)

    def answers(self) -> list[Tensor]:
        """The logits of a batch padded on both sides, and a gradient by its embedded tokens.

        Where there are logits for each token, they are those of real tokens alone, (tokens, outputs).
        """
        sides: list[Side] = [("right", "left")[i % 2] for i in range(len(self.rows))]
        ids, mask = padded(self.rows, sides, self.pad, self.model.device)
        leaves: list[Tensor] = []

        def leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        size = self.model.get_input_embeddings().num_embeddings
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size]
        handles = [table.register_forward_hook(leaf) for table in tables]
        try:
            with put_back(self.model), torch.enable_grad():
                logits = self.model(input_ids=ids, attention_mask=mask).logits
                logits = logits[mask.bool()] if self.task.per_token else logits
                weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits)
                grads = torch.autograd.grad((logits * weights).sum(), leaves, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return [logits.detach(), *(grad for grad in grads if grad is not None)]

    def same(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
        """Whether two `answers` are alike."""
        return len(one) == len(other) and all(self._near(a, b) for a, b in zip(one, other, strict=True))

    def _near(self, found: Tensor, whole: Tensor) -> bool:
        return near(found, whole, self._coarse)

    def _alone(self) -> list[Tensor]:
        """What the model says to each row by itself; rows that it does not take are left out."""
        found, taken, why = [], [], ""
        for row in self.rows:
            try:
                found.append(self._say([row], ["right"])[0])
                self._single = self._single or self._inputs
                taken.append(row)
            except (RuntimeError, ValueError, IndexError) as error:
                self._seen.pop()
                why = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        if not taken:
            tried = ", ".join(str(len(row)) for row in self.rows)
            raise ModelError(
                f"model.path: '{self._path}' takes no row of {tried} tokens ({why:.200}); a model "
                "for rows of one length only cannot be trained"
            )
        self.rows = taken
        return found

    def _twins(self, alone: Tensor) -> bool:
        """Whether a row's logits depend on another row of its length; a decoder must not see what follows."""
        row = self.rows[0]
        cut = max(1, len(row) - 5)
        other = row[:cut] + row[cut : len(row) - 1][::-1] + row[-1:]
        one, two = self._say([row, other], ["right", "right"])
        for name, x in self._inputs.items():
            single = self._single.get(name)
            if single is not None and len(x) == 2 * len(single) and self._near(x[: len(single)], single):
                self._in_order.add(name)
        if self.task.generates and not self._near(two[:cut], one[:cut]):
            raise ModelError(
                f"model: {self.task.needs}; '{self._path}' sees the tokens that follow, so that it would be "
                "trained on what it reads"
            )
        return not self._near(one, alone)

    def _padding(self, alone: list[Tensor]) -> tuple[Side, int | None]:
        """The side on which padding changes nothing, and up to which length; None for all that was tried."""
        for first in range(len(self.rows) - 1):
            rows, wanted = self.rows[first:], alone[first:]
            for side in ("right", "left"):
                said = self._say(rows, [side] * len(rows))
                join = torch.cat if self.task.per_token else torch.stack
                if self._near(join(said), join(wanted)):
                    return side, None if first == 0 else len(rows[0])
        return "right", 0

    def _prompts(self, alone: list[Tensor]) -> bool:
        """Whether rows of this decoder may be padded on the left, with positions as `generate` gives them."""
        few = slice(-2, None)
        return self._near(torch.cat(self._say(self.rows[few], ["left"] * 2, True)), torch.cat(alone[few]))

    def _chosen(self, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
        """Lists of modules, of a row's tokens each fed those that a router sends there, as experts are."""
        found = []
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                inside = [f"{name}.{key}" for key, _ in module.named_children()]
                if any(seen.get(n) == {PART} for seen in self._seen for n in inside):
                    found.append(f"{name}.")
        return tuple(found)

    @torch.no_grad()
    def _say(
        self, rows: Sequence[Sequence[int]], sides: Sequence[Side], positions: bool = False
    ) -> list[Tensor]:
        """The logits of each row: of its tokens, of the whole row where the model classifies."""
        ids, mask = padded(rows, sides, self.pad, self.model.device)
        named = {"input_ids": ids, "attention_mask": mask}
        if positions and "position_ids" in inspect.signature(self.model.forward).parameters:
            named["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        self._shape, self._inputs = ids.shape, {}
        self._seen.append({})
        with put_back(self.model) as kept:
            logits = self.model(**named).logits
            self.stateful |= kept.changed
        if not self.task.per_token:
            return [*logits]
        return [one[real.bool()] for one, real in zip(logits, mask, strict=True)]

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            x, (rows, longest) = args[0] if args else next(iter(named.values()), None), self._shape
            how = ""
            if isinstance(x, Tensor) and x.ndim > 1:
                flat = TOKENS if len(x) == rows * longest else PART
                how = ROWS if len(x) == rows else flat if x.ndim == 2 else ""
                if how == TOKENS:
                    self._inputs[name] = x.detach()
            self._seen[-1].setdefault(name, set()).add(how)

        return note


def made_up(model: Any, tokenizer: Any, pad: int, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of these lengths of ordinary tokens, with the end token that some models look for.

    Args:
        model: with a table of embeddings.
        tokenizer: whose special tokens are left out.
        pad: the padding's id, which no row holds.
        lengths: each at least 2.
    """
    size = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    special, end = {pad, *tokenizer.all_special_ids}, tokenizer.eos_token_id
    ordinary = [i for i in range(min(size, 5 * MOST)) if i not in special] or [0]
    tail = [] if end is None or end == pad else [end]
    rows, at = [], 0
    for length in lengths:
        ids = [ordinary[(at + 7 * i) % len(ordinary)] for i in range(length - len(tail))]
        rows.append([*ids, *tail])
        at += 3 * length
    return rows


def padded(
    rows: Sequence[Sequence[int]], sides: Sequence[Side], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows, (rows, longest) both, each padded on its own side."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(ids)
    for i, (row, side) in enumerate(zip(rows, sides, strict=True)):
        place = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def near(found: Tensor, whole: Tensor, coarse: bool = False) -> bool:
    """Whether logits are the same up to rounding.

    In float32 all must be, to a thousandth of the largest. In a shorter dtype, or with quantised weights
    (`coarse`), it is three hundredths of half of the tokens, since rounding alone may send one to another
    expert.
    """
    gap, size = (found - whole).abs(), whole.abs().max()
    if coarse or found.dtype in (torch.bfloat16, torch.float16):
        return bool(gap.reshape(-1, gap.shape[-1]).amax(-1).median() <= 0.03 * size)
    return bool(gap.max() <= 1e-3 * size)


def scaled_beyond(model: Any) -> int | None:
    """The tokens of a row beyond which RoPE scales by the longest row of a batch; None for other models."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in kinds):
            found += _numbers(module.config, re.compile(r"original_max_position_embeddings")) or _numbers(
                module.config, re.compile(r"max_position_embeddings")
            )
    return min(found, default=None)


def lengths(model: Any, room: int | None) -> list[int]:
    """Tokens of the rows of a trial, longest first: beyond the configuration's numbers if that is quick."""
    most = int(min(MOST, WORK / max(1, sum(p.numel() for p in model.parameters())), room or MOST))
    if most < max(SHORT):
        return [n for n in LEAST if n <= (room or MOST)] or [room or MOST]
    breaks = {*_numbers(model.config, BREAKS), scaled_beyond(model) or 0}
    wanted = {times * n + 1 for n in breaks if n > 1 for times in (1, 2, 4, 8)}
    return sorted({*SHORT, *sorted(n for n in wanted if n <= most)[-4:]}, reverse=True)


def _numbers(config: Any, names: re.Pattern[str]) -> list[int]:
    """The whole numbers of a configuration, and of those within it, whose name fits."""
    found: list[int] = []
    stack: list[tuple[str, Any]] = [("", config.to_dict())]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += value.items()
        elif isinstance(value, list):
            stack += [(name, inner) for inner in value]
        elif isinstance(value, int) and not isinstance(value, bool) and names.search(str(name)):
            found.append(value)
    return found
