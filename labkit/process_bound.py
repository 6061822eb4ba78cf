"""What is bound to its process, as a swarm, a server's handle and a run are: it has threads, and no copies.

A model may keep such an object as an attribute. Then all copies of the model, such as the replicas of trainers, share
it.
"""

from __future__ import annotations

from typing import NoReturn, TypeVar

T = TypeVar("T", bound="ProcessBound")


class ProcessBound:
    """Copies are the object itself, and it is not pickled."""

    def __copy__(self: T) -> T:
        return self

    def __deepcopy__(self: T, memo: object) -> T:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} belongs to this process and cannot be pickled. Of a model that keeps one, save "
            "model.state_dict(), or take the attribute out before; a layer needs only the name of its swarm, and "
            "swarm.attach(model) connects it again"
        )
