"""How a model must be fed: which rows may share a batch, on which side to pad, how many threads feed it."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedlora.data.examples import Side


@dataclass(frozen=True)
class Traits:
    """How a model must be fed.

    Args:
        side: where to pad.
        limit: rows of at most so many tokens may be padded to a common length; a longer row shares a batch
            only with rows of its own length. None for no limit, 0 where no row may be padded.
        alone: whether a row may share a batch with no other at all.
        stateful: whether a pass writes into the model's modules; then one thread feeds it, and what a pass
            wrote is put back after it.
        prompts: whether a decoder may be padded on the left too, so that answers begin side by side.
        by_row: the modules whose input has the rows of the batch as its first dimension; None if not known.
        by_token: those whose input is (tokens, d), the tokens of one row after those of another, as routers
            and experts are fed.
        chosen: those that see only the tokens which a router sends there, as experts that are modules do.
    """

    side: Side = "right"
    limit: int | None = None
    alone: bool = False
    stateful: bool = False
    prompts: bool = True
    by_row: frozenset[str] | None = None
    by_token: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()

    def together(self, longer: int, shorter: int) -> bool:
        """Whether rows of so many tokens may share a batch."""
        return not self.alone and (longer == shorter or self.limit is None or longer <= self.limit)

    def notices(self, path: str) -> Iterator[str]:
        """A line for everything that makes training slower."""
        if self.alone:
            yield f"'{path}' computes a row from the others of its batch: every row is fed alone"
        elif self.limit == 0:
            yield f"'{path}' reads padding: rows share a batch only with rows of their own length"
        elif self.limit is not None:
            yield (
                f"'{path}' may compute rows of more than {self.limit} tokens differently beside longer ones: "
                "they share a batch only with rows of their own length"
            )
        if self.stateful:
            yield f"'{path}' writes into its own modules while it computes: one thread trains it"
