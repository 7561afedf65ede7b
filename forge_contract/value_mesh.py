"""The results of one call over the ranks of a mesh, as values with coordinates (A7).

A replica of `procs=4, hosts=2` answers with `ValueMesh({"hosts": 2, "procs": 4}, [v0, …, v7])`: row-major, so the last
dimension runs fastest and the position in `values` is the rank. The shape of the interface (`items()` yields points,
`item(procs=1)`, `get(rank)`) is that of Monarch's ValueMesh, so programs written for it read on. `payload` carries it
between processes; `forge_client` makes it out of the replies of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Point(Mapping[str, int]):
    """Where a rank stands: `{dimension: coordinate}`, with its `rank`. Equal to any mapping of the same."""

    __slots__ = ("_coords", "_rank")

    def __init__(self, rank: int, sizes: Mapping[str, int]) -> None:
        coords: dict[str, int] = {}
        rest = rank
        for dim in reversed(list(sizes)):
            rest, coords[dim] = divmod(rest, sizes[dim])
        self._rank = rank
        self._coords = {dim: coords[dim] for dim in sizes}

    @property
    def rank(self) -> int:
        return self._rank

    def __getitem__(self, dim: str) -> int:
        return self._coords[dim]

    def __iter__(self) -> Iterator[str]:
        return iter(self._coords)

    def __len__(self) -> int:
        return len(self._coords)

    def __hash__(self) -> int:
        return hash(frozenset(self._coords.items()))

    def __repr__(self) -> str:
        return f"<Point rank {self._rank} {_coordinates(self._coords)}>"


class ValueMesh(Generic[T]):
    """Values of type T, one for each rank. Immutable; equal when sizes (with their order) and values are.

    `sizes`: dimension name to its length (≥ 0), outermost first. `values`: one for each rank, in rank order.
    Raises ValueError when their numbers differ, TypeError for sizes that are no whole numbers.
    """

    __slots__ = ("_sizes", "_values")

    def __init__(self, sizes: Mapping[str, int], values: Sequence[T]) -> None:
        for dim, size in sizes.items():
            if type(dim) is not str or type(size) is not int:
                raise TypeError(f"sizes maps names to whole numbers, not {dim!r} to {size!r}")
            if size < 0:
                raise ValueError(f"dimension {dim!r} has size {size}; sizes are 0 or more")
        ranks = math.prod(sizes.values())
        if ranks != len(values):
            raise ValueError(f"a mesh of {_coordinates(sizes) or 'one rank'} takes {ranks} values, not {len(values)}")
        self._sizes = dict(sizes)
        self._values = tuple(values)

    @property
    def sizes(self) -> dict[str, int]:
        """Dimension name to length, outermost first (a copy)."""
        return dict(self._sizes)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[tuple[Point, T]]:
        return self.items()

    def items(self) -> Iterator[tuple[Point, T]]:
        """(point, value) in rank order; iterating the mesh is the same thing."""
        for rank, value in enumerate(self._values):
            yield Point(rank, self._sizes), value

    def values(self) -> Iterator[T]:
        """The values alone, in rank order."""
        return iter(self._values)

    def get(self, rank: int) -> T:
        """The value of one rank, 0 ≤ rank < len. Raises IndexError beyond; negative ranks are no ranks."""
        if not 0 <= rank < len(self._values):
            raise IndexError(f"rank {rank} is not in this mesh of {len(self._values)} ranks")
        return self._values[rank]

    def item(self, **coords: int) -> T:
        """The value at these coordinates, e.g. `item(hosts=0, procs=1)`. A dimension of size 1 may be left out.

        Raises KeyError for an unknown or missing dimension, IndexError for a coordinate outside its dimension.
        """
        unknown = [dim for dim in coords if dim not in self._sizes]
        if unknown:
            raise KeyError(f"no dimension {', '.join(map(repr, unknown))} here; there is {self._dims()}")
        rank = 0
        for dim, size in self._sizes.items():
            if dim not in coords and size != 1:
                raise KeyError(f"item() needs a coordinate for {dim!r} (0 to {size - 1})")
            coord = coords.get(dim, 0)
            if not 0 <= coord < size:
                raise IndexError(f"{dim}={coord} is outside this mesh: {dim} has size {size}")
            rank = rank * size + coord
        return self._values[rank]

    def _dims(self) -> str:
        return ", ".join(map(repr, self._sizes)) or "none"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ValueMesh):
            return NotImplemented
        return list(self._sizes.items()) == list(other._sizes.items()) and self._values == other._values

    def __hash__(self) -> int:
        return hash((tuple(self._sizes.items()), self._values))

    def __reduce__(self) -> tuple[Any, ...]:
        return ValueMesh, (self._sizes, self._values)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{value!r:.40}" if isinstance(value, str) else repr(value)[:40] for value in self._values[:4]
        )
        more = ", …" if len(self._values) > 4 else ""
        return f"<ValueMesh {_coordinates(self._sizes) or 'one rank'} [{shown}{more}]>"


def _coordinates(coords: Mapping[str, int]) -> str:
    return " ".join(f"{dim}={number}" for dim, number in coords.items())
