"""Classes of an importable module for the payload tests to send, plain ones and ones that do too much."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Prompt:
    text: str
    tokens: list[int]
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    name: str
    at: tuple[int, ...]


@dataclasses.dataclass
class Area:
    """Sets an attribute that is no field."""

    width: int

    def __post_init__(self) -> None:
        self.square = self.width**2


class Pair(NamedTuple):
    left: Any
    right: Any


class Plain:
    """Neither a dataclass nor anything else that travels without a pickle."""

    def __init__(self, value: int = 0) -> None:
        self.value = value


class OddError(ValueError):
    """Its arguments are not those of its __init__."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class SlottedError(Exception):
    __slots__ = ("hidden",)

    def __init__(self, hidden: int) -> None:
        super().__init__("slotted")
        self.hidden = hidden


class HostileError(Exception):
    """Every function of it that rebuilding could call says so."""

    def __init__(self, *args: Any) -> None:
        raise AssertionError("__init__ was called")

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("__setstate__ was called")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError("__setattr__ was called")


class Handle:
    """Registered with the codec by the tests, as the client registers its handles."""

    def __init__(self, service: str) -> None:
        self.service = service
