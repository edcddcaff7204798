"""What was made is kept for whoever asks for it again, as long as there is not too much of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """`make(*arguments)`, of which the `most` last asked for are kept: equal arguments give the same again."""

    def __init__(self, make: Callable[..., T], most: int) -> None:
        self._make, self._most = make, most
        self._found: OrderedDict[tuple[Hashable, ...], T] = OrderedDict()

    def __call__(self, *arguments: Hashable) -> T:
        """What `make` gave, now or before."""
        if arguments in self._found:
            self._found.move_to_end(arguments)
            return self._found[arguments]
        made = self._found[arguments] = self._make(*arguments)
        while len(self._found) > self._most:
            self._found.popitem(last=False)
        return made

    def kept(self) -> list[tuple[tuple[Hashable, ...], T]]:
        """What is kept, by its arguments, that first which nobody has asked for the longest."""
        return list(self._found.items())

    def let_go(self, *arguments: Hashable) -> None:
        """What was made of `arguments` is not kept any more."""
        self._found.pop(arguments, None)

    def cache_clear(self) -> None:
        """Nothing is kept any more."""
        self._found.clear()


def kept(most: int) -> Callable[[Callable[..., T]], Kept[T]]:
    """A function of which the `most` last results are kept."""
    return lambda make: Kept(make, most)
