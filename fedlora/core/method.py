"""What a method needs of a client beyond the triple: typed values that travel as parts of a task."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fedlora.core.adapter import Adapter
    from fedlora.core.messages import Task


class MethodPart:
    """The base class of what one method adds to a task: a frozen dataclass of its own, in the method's file.

    A strategy puts parts into `Task.method`, and the code that knows their class takes them out by
    `Task.part`. They travel by the name of their class. A receiver builds only classes that it has imported
    itself, so import the module of a part wherever its clients are made.

    Fields may hold: None, bool, int, float, str, a frozenset of str, a tensor, a Pair, an Adapter, another
    part, and tuples and mappings (with str as keys) of these.
    """

    def replies(self, adapter: "Adapter") -> tuple["Adapter", ...]:
        """Adapters in whose shapes a client may reply beside the task's own; none unless a subclass says so.

        Args:
            adapter: the task's.
        """
        return ()

    def sends(self, task: "Task") -> Mapping[str, Tensor]:
        """What a client replies with beside the tensors that the task shares; nothing unless a subclass says.

        A reply needs every one of these tensors, in its shape and dtype, finite and of no absurd length; the
        server drops every other reply. They arrive in `Update.sent`.

        Args:
            task: that the part travels with.

        Returns:
            Name -> a tensor of that shape and dtype, whose numbers are not looked at.
        """
        return {}
