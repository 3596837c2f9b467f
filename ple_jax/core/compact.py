"""Many values in little memory: kept as bytes, and made anew where they are asked for."""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar, cast, overload

T = TypeVar("T")


class Compact(Sequence[T]):
    """A sequence whose items are bytes until they are asked for, each time a value of its own.

    As Python objects, 161,000 dialogues take several times the bytes of their texts: a transcript and its turns are two
    copies, a character beside ASCII doubles all others, tokens are 36 bytes each. Here they take what pickling takes.

    `take` and slices are views: they share the bytes. What is appended to one is not in the others.
    """

    def __init__(self, items: Iterable[T] = ()):
        self._bytes, self._ends = bytearray(), array("Q")  # of all items that were ever appended, and where each ends
        self._numbers = array("L")  # which of them are here
        self._each: dict[str, list[Any]] = {}
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Puts one more at the end of this view."""
        self._bytes += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._bytes))
        self._numbers.append(len(self._ends) - 1)
        self._each.clear()

    def take(self, places: Iterable[int]) -> Self:
        """The items at these places, as a view; what a view of some has at a place is that of the view."""
        view = type(self)()
        view._bytes, view._ends = self._bytes, self._ends
        view._numbers = array("L", (self._numbers[place] for place in places))
        return view

    def again(self, other: "Compact[T]", place: int) -> None:
        """Puts what a view that shares these bytes has at a place to the end of this one, without copying it."""
        assert other._bytes is self._bytes
        self._numbers.append(other._numbers[place])
        self._each.clear()

    def each(self, name: str) -> list[Any]:
        """An attribute of every item, which are all made for it once."""
        if name not in self._each:
            self._each[name] = [getattr(item, name) for item in self]
        return self._each[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all items that share them, whether they are in this view or not."""
        return len(self._bytes)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> T | Self:
        if isinstance(place, slice):
            return self.take(range(*place.indices(len(self))))
        return self._made(self._numbers[place])

    def _made(self, number: int) -> T:
        begin = self._ends[number - 1] if number else 0
        return cast(T, pickle.loads(self._bytes[begin : self._ends[number]]))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[T]:
        return map(self._made, self._numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __repr__(self) -> str:
        return f"Compact({list(self)!r})"


def compact(items: Iterable[T]) -> Compact[T]:
    """These items as bytes; what is that already, as it is."""
    return items if isinstance(items, Compact) else Compact(items)
