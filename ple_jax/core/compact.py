"""A sequence of many values in little memory: they are kept as bytes, and rebuilt when they are asked for."""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar, cast, overload

T = TypeVar("T")


class Compact(Sequence[T]):
    """A sequence that keeps its items as pickled bytes. Every access makes a new object of an item.

    As Python objects, 161,000 dialogues take several times the bytes of their texts: a transcript and its turns are two
    copies, one character outside ASCII doubles all others, and a token is 36 bytes. Here they take what pickling takes.

    `take` and slices return views, which share the bytes and cannot grow.
    """

    def __init__(self, items: Iterable[T] = ()):
        self._bytes, self._ends = bytearray(), array("Q")  # of all items, and where each ends
        self._view: array[int] | None = None  # which of them are here; None: all
        self._places: dict[str, dict[Any, int]] = {}
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        """Appends an item. A view cannot be appended to."""
        assert self._view is None, "a view cannot grow"
        self._bytes += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._bytes))
        self._places.clear()

    def take(self, places: Iterable[int]) -> Self:
        """Returns a view of the items at these places."""
        view, numbers = type(self)(), self._numbers
        view._bytes, view._ends, view._view = self._bytes, self._ends, array("Q", (numbers[place] for place in places))
        return view

    @property
    def _numbers(self) -> Sequence[int]:
        return range(len(self._ends)) if self._view is None else self._view

    def places(self, name: str) -> Mapping[Any, int]:
        """Maps the values of the attribute `name` to the places of their items; no two items may have the same value.

        All items are rebuilt for it, once; the result is kept until an item is appended.
        """
        if name not in self._places:
            self._places[name] = {getattr(item, name): place for place, item in enumerate(self)}
        return self._places[name]

    @property
    def nbytes(self) -> int:
        """The number of bytes that all items take, including those outside this view."""
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
    """Returns these items as a Compact; a Compact is returned as it is."""
    return items if isinstance(items, Compact) else Compact(items)
