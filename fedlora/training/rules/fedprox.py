"""FedProx: a client is held near the model that it was sent.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. "Federated Optimization in Heterogeneous Networks". MLSys 2020.
https://arxiv.org/abs/1812.06127, equation 2:

    min_w F_k(w) + μ/2 ‖w − w^t‖²

w is all that a client trains: factors, head, and its own parts where it has some, and w^t is where it begins
the round. In the space of the factors the term pulls on A and B. In effective space it pulls on what they do,

    μ/2 Σ_m ‖s B A − s B^t A^t‖²_F    with the gradients    μ s² (B (A Aᵀ) − B^t (A^t Aᵀ))    of B
                                                            μ s² ((Bᵀ B) A − (Bᵀ B^t) A^t)    of A

which cost four r × r products a module and never a (d_out, d_in) matrix. All that is no low-rank term, such
as the head, DoRA's lengths or sparse values, is held by itself in both spaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fedlora.core.adapter import Pair
from fedlora.core.parametrization import Layer, Parametrization
from fedlora.errors import ConfigError
from fedlora.ranges import check_number
from fedlora.training.rules.base import LocalRule, RoundStart, Term


@dataclass(frozen=True)
class FedProx(LocalRule):
    """For clients whose rows differ, or who train many steps.

    Args:
        mu: μ, at least 0. A plain gradient step is stable only while its rate times μ is below 2.
        space: "factors" pulls A and B to where they began, "effective" pulls scale · B · A. With B = 0 at the
            start the first one holds A near its random start, and the second one leaves A free.
    """

    mu: float = 0.01
    space: Literal["factors", "effective"] = "factors"

    independent_of_rows = True

    def __post_init__(self) -> None:
        check_number("FedProx.mu", self.mu, least=0)
        if self.space not in ("factors", "effective"):
            raise ConfigError(f"FedProx.space: expected factors or effective, got '{self.space}'")

    @property
    def of_products(self) -> bool:
        """Whether it holds scale · B · A."""
        return self.space == "effective"

    def gradient(self, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """μ (w − w^t), the term in the space of the factors."""
        return {name: self.mu * (tensor - start[name]) for name, tensor in tensors.items()}

    def term(self, given: RoundStart) -> Term:
        """The term in its space.

        Raises:
            ConfigError: in effective space, an adapter without pairs whose low-rank terms its layers give.
        """
        if self.space == "factors":
            return super().term(given)
        adapter, form = given.adapter, given.adapter.parametrization
        if form.has_low_rank and not form.pairs:
            raise ConfigError(
                f"rule.space=effective: the low-rank terms of {type(form).__name__} follow from the layers, "
                "and not from the adapter alone; use rule.space=factors"
            )
        layers = [
            _Held(module, form, pair, factors, given.start)
            for module, factors in adapter.factors().items()
            if (pair := adapter.pairs.get(module)) and any(f"{module}.{n}" in given.start for n in factors)
        ]
        return partial(self._effective, layers, given.start)

    def _effective(
        self, layers: Sequence["_Held"], start: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """μ times the gradients of half the squared distances."""
        pulled = {name: pull for layer in layers for name, pull in layer.pull(tensors).items()}
        own = {name: tensor - start[name] for name, tensor in tensors.items() if name not in pulled}
        return {name: self.mu * pull for name, pull in {**own, **pulled}.items()}


class _Held:
    """One layer's low-rank term, held to what it was at the start.

    Args:
        module: the layer.
        form: gives the term's A and B.
        pair: the layer's pair, for its shape and scale.
        factors: all factors of the layer, by their words.
        start: those that are trained, by their names, as they begin.
    """

    def __init__(
        self,
        module: str,
        form: Parametrization,
        pair: Pair,
        factors: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
    ) -> None:
        self._form, self._layer, self._scale = form, Layer(module, pair.shape), pair.scale
        self._trained = {word: f"{module}.{word}" for word in factors if f"{module}.{word}" in start}
        begun = {word: start[name] for word, name in self._trained.items()}
        like = next(iter(begun.values()))
        whole = form.with_constants(self._layer, {**{w: t.to(like) for w, t in factors.items()}, **begun})
        self._fixed = {word: tensor for word, tensor in whole.items() if word not in begun}
        self._A, self._B = form.low_rank(self._layer, whole)

    def pull(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients of ½ ‖s B A − s B^t A^t‖² by the tensors that make A and B."""
        with torch.enable_grad():
            own = {word: tensors[name].detach().requires_grad_() for word, name in self._trained.items()}
            A, B = self._form.low_rank(self._layer, {**self._fixed, **own})
            by = self._gradients(A.detach(), B.detach())
            ends = [(end, grad) for end, grad in zip((A, B), by, strict=True) if end.requires_grad]
            if not ends:
                return {}
            made, grads = zip(*ends, strict=True)
            found = torch.autograd.grad(made, list(own.values()), grads, allow_unused=True)
        return {
            name: pull
            for name, pull in zip(self._trained.values(), found, strict=True)
            if pull is not None  # DoRA's lengths, for one, are in no low-rank term
        }

    def _gradients(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """By A and by B, from products of r × r."""
        by_A = (B.T @ B) @ A - (B.T @ self._B) @ self._A
        by_B = B @ (A @ A.T) - self._B @ (self._A @ A.T)
        return self._scale**2 * by_A, self._scale**2 * by_B
