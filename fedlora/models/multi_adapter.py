"""K adapters on one frozen model: each row of a batch goes through the adapter of its client.

A batch holds its rows client by client. At every target layer each client's rows meet that client's own
factors, at that client's own rank, so that one pass over the shared base trains K clients and nothing is
padded. The base is never written to: what each adapter's parametrization makes of a layer is done by
forward hooks, and so are the clients' base deltas, and trained whole modules (the head) stand in for the
base's while the bank is open.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.errors import ModelError
from fedlora.models import adapter_parameters
from fedlora.models.adapted_layers import AdaptedLayers
from fedlora.models.attention import end_to_end, packed
from fedlora.models.base import Base
from fedlora.models.checkpointing import checkpointed
from fedlora.models.experts import place
from fedlora.models.first_token import keep_first
from fedlora.models.per_row import Copies, RowGradients, packs_rows, stand_in
from fedlora.models.routed_experts import RoutedExperts
from fedlora.models.routing import Routing


class MultiAdapterModel:
    """K clients' adapters over one model, for use in a `with` block.

    Args:
        base: the frozen model; identical before, during and after.
        tasks: one a slot, of any ranks, scales and base deltas.
        train: whether gradients reach what the tasks train.
        per_row: whether each row gets its own gradient, by differentiating by `leaves`.
        every_token: whether a classifier's last layer is wanted of every token, whatever its head reads.
        stacked: whether the slots' factors may lie in tensors of all, if the base says so and their tasks are
            alike; `gradients` then puts those of the factors into place, `row_gradients` those of rows.

    Attributes:
        unpadded: whether batches are to be fed by `Base.losses_unpadded`.
        stacks: the factors of all slots, where they lie so; else None.

    Raises:
        ModelError: an adapter names a module that the model lacks, or of another shape; or per row, the
            parametrization has no such gradient.
    """

    def __init__(
        self,
        base: Base,
        tasks: Sequence[Task],
        train: bool = False,
        per_row: bool = False,
        every_token: bool = False,
        stacked: bool = False,
    ) -> None:
        first = tasks[0].adapter
        for task in tasks:
            if (
                task.adapter.pairs.keys() != first.pairs.keys()
                or task.adapter.extra.keys() != first.extra.keys()
                or type(task.adapter.parametrization) is not type(first.parametrization)
            ):
                raise ModelError("the adapters of one pass must have the same modules and the same heads")
        self._model, self._after = base.model, None if every_token else base.after
        self.unpadded = base.packing is not None and not every_token and (not per_row or packs_rows(base))
        self._tasks = tasks
        each = [(task, frozenset(task.trained() if train else ())) for task in tasks]
        self._forms = [task.adapter.parametrization for task in tasks]
        alike, trained = len({trained for _, trained in each}) == 1, each[0][1]
        self.stacks = adapter_parameters.stacks(base, tasks, trained, per_row) if stacked and alike else None
        self._factors = [
            self.stacks.parameters(slot)
            if self.stacks
            else adapter_parameters.leaves(base, task.adapter, trained)
            for slot, (task, trained) in enumerate(each)
        ]
        self._heads = [adapter_parameters.copies(base, task.adapter, trained) for task, trained in each]
        if per_row and self._factors[0] and not self._forms[0].by_row:
            raise ModelError(
                f"the factors of {type(self._forms[0]).__name__} have no gradient for each row; use LoRA"
            )
        routed = {name for name in self._factors[0] if place(name) or name in base.traits.chosen}
        self._experts = {p for own in self._factors for name in routed for p in own[name].values()}
        if self.stacks:
            self.stacks.reached |= routed
        # Read once: a head is lent other parameters while rows are given their own, in any thread.
        self._trained = [self._groups(slot) for slot in range(len(tasks))]
        self._by_autograd = [
            [p for name, found in own.items() for p in found if name == "head" or not self.stacks]
            for own in self._trained
        ]
        self._rows = Copies(self._by_autograd if per_row else (), self._room if per_row else None)
        self._layers = AdaptedLayers(base, tasks, self._factors, self.stacks, self._rows)
        self._routing = Routing(len(tasks), base.traits, base.device, per_row and any(self._trained))
        self._memory, self._checkpointing = base.memory if train else None, ExitStack()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> Self:
        modules = dict(self._model.named_modules())
        named = dict.fromkeys([*adapter_parameters.adapted(self._model, self._tasks), *self._factors[0]])
        of_experts = {name: at[0] for name in named if (at := place(name))}
        vocabulary = getattr(self._model, "get_output_embeddings", lambda: None)()
        if vocabulary is not None and any(modules.get(name) is vocabulary for name in named):
            self.unpadded = False  # it is shown the tokens before a response's alone
        for name in (n for n in named if n not in of_experts):
            self._handles.append(modules[name].register_forward_hook(self._hook(name), with_kwargs=True))
        if self._after is not None:
            self._handles.append(keep_first(self._after))
        stand_ins = dict[str, Any]()
        for name in self._heads[0]:
            heads, told = [own[name] for own in self._heads], partial(self._routing.segments, name=name)
            stand_ins[name] = stand_in(heads, self._rows, told)
        for path in dict.fromkeys(of_experts.values()):
            adapted = {name: self._layers.of(name) for name, at in of_experts.items() if at == path}
            stand_ins[path] = RoutedExperts(modules[path], path, adapted, self._routing)
        for name, forward in stand_ins.items():
            modules[name].forward = forward
            self._replaced.append(modules[name])
        self.checkpoint()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpointing.close()
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles, self._replaced = [], []

    def checkpoint(self) -> None:
        """Checkpoint the layers from now on, if memory asks for it."""
        self._checkpointing.close()
        if self._memory and self._memory.checkpointing:
            self._checkpointing.enter_context(checkpointed(self._model, self._again))

    def _again(self) -> AbstractContextManager[None]:
        """This thread's batch, for a layer that is computed once more, maybe in another thread."""
        pack, mine = packed(), (self._routing.batch, self._rows.batch)

        @contextmanager
        def there() -> Iterator[None]:
            before = self._routing.batch, self._rows.batch
            self._routing.batch, self._rows.batch = mine
            try:
                with end_to_end(pack):
                    yield
            finally:
                self._routing.batch, self._rows.batch = before

        return there()

    def route(self, counts: Sequence[int], sizes: Sequence[int] | None = None) -> None:
        """Say what each slot has in this thread's next batch, which holds the slots one after the other.

        Args:
            counts: rows of each.
            sizes: tokens of each row, where the rows lie end to end.
        """
        self._routing.set(counts, sizes)
        self._rows.make(counts)

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What this thread's batch is differentiated by: parameters, or per row their (rows, *shape)."""
        return [self._rows.of(parameter) for parameter in parameters]

    def gradients(self, loss: Tensor, slots: Sequence[int]) -> list[tuple[nn.Parameter, Tensor | None]]:
        """What these slots train, and its gradients in this thread's batch; per row (rows, *shape) each.

        Without factors that lie in stacks: their gradients are then added to those that they have.
        """
        parameters = [p for slot in slots for p in self._by_autograd[slot]]
        anchor = [] if self.stacks is None else [self.stacks.anchor]
        leaves = self.leaves(parameters)
        found = torch.autograd.grad(loss, [*leaves, *anchor], allow_unused=True)
        # No token may have gone to an expert. In PEFT all experts are one tensor, of which its part is zero.
        return [
            (p, torch.zeros_like(leaf) if grad is None and p in self._experts else grad)
            for p, leaf, grad in zip(parameters, leaves, found[: len(parameters)], strict=True)
        ]

    def row_gradients(self, loss: Tensor, slots: Sequence[int]) -> Tensor:
        """Per row and with stacks: all gradients of this thread's batch, as `RowGradients.complete` says."""
        found, made = iter(self.gradients(loss, slots)), self._rows.gradients
        assert self.stacks is not None
        assert made is not None
        for slot in slots:
            made.put_head(self._routing.batch.rows[slot], [next(found)[1] for _ in self._by_autograd[slot]])
        return made.complete(self.stacks.silent)

    def factors(self, slot: int) -> dict[str, list[nn.Parameter]]:
        """One slot's trainable parameters, in groups: "A", "B", the parametrization's words, and "head"."""
        return self._trained[slot]

    def _groups(self, slot: int) -> dict[str, list[nn.Parameter]]:
        modules = self._factors[slot].values()
        names = ("A", "B", *self._forms[slot].factors)
        groups = {factor: [own[factor] for own in modules if factor in own] for factor in names}
        groups["head"] = [p for head in self._heads[slot].values() for p in head.parameters()]
        trained = {name: [p for p in found if p.requires_grad] for name, found in groups.items()}
        return {name: found for name, found in trained.items() if found}

    def _room(self, rows: int) -> RowGradients | None:
        head = sum(p.numel() for p in self._by_autograd[0])
        return self.stacks.row_gradients(rows, head) if self.stacks else None

    def parameters(self, slot: int) -> dict[str, nn.Parameter]:
        """One slot's parameters, trained or not, under the names of `Adapter.tensors`."""
        found = {f"{m}.{f}": p for m, factors in self._factors[slot].items() for f, p in factors.items()}
        for name, head in self._heads[slot].items():
            found |= {f"{name}.{key}": p for key, p in head.named_parameters()}
        return found

    def adapter(self, slot: int, copy: bool = True) -> Adapter:
        """One slot's adapter as it now is, on the CPU; without `copy` it changes with further training."""
        stacked = self.stacks.tensors(slot) if self.stacks else {}
        left = {n: p.detach() for n, p in self.parameters(slot).items() if n not in stacked}
        own = {n: (p.clone() if copy else p).cpu() for n, p in left.items()}
        return self._tasks[slot].adapter.with_tensors(own | stacked)

    def _hook(self, name: str) -> Any:
        adapted, routing = self._layers.of(name), self._routing

        def add(
            module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> Tensor:
            x = args[0] if args else next(iter(named.values()))
            return adapted(x, output, routing.layout(x, name))

        return add
