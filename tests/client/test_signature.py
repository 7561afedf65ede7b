"""The matcher agrees with Python about which calls fit, and survives the wire."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forge_client.signature import Matcher
from forge_contract.errors import BadCall


class Shapes:
    def none(self) -> None: ...
    def two(self, x: int, y: int) -> None: ...
    def default(self, x: int, y: int = 1) -> None: ...
    def keyword(self, x: int, *, loud: bool) -> None: ...
    def quiet(self, x: int, *, loud: bool = False) -> None: ...
    def anything(self, *args: int, **kwargs: int) -> None: ...
    def rest(self, x: int, /, *more: int) -> None: ...
    def named(self, **kwargs: int) -> None: ...


METHODS = [name for name in vars(Shapes) if not name.startswith("__")]
CALLS = st.tuples(
    st.lists(st.integers(0, 1), max_size=3).map(tuple),
    st.dictionaries(st.sampled_from(["x", "y", "loud", "z"]), st.integers(0, 1), max_size=3),
)


def fits(matcher: Matcher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        matcher.check("shapes", args, kwargs)
    except BadCall:
        return False
    return True


@given(st.sampled_from(METHODS), CALLS)
def test_the_matcher_accepts_what_python_accepts_before_and_after_the_wire(
    name: str, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> None:
    args, kwargs = call
    try:
        getattr(Shapes(), name)(*args, **kwargs)
        expected = True
    except TypeError:
        expected = False
    matcher = Matcher.of(getattr(Shapes, name))
    assert fits(matcher, args, kwargs) == expected
    assert fits(Matcher.from_wire(matcher.to_wire()), args, kwargs) == expected


def test_a_bad_call_says_what_is_wrong_and_which_keywords_there_are() -> None:
    with pytest.raises(BadCall, match=r"gen\.two: .*'z'.*it takes x, y"):
        Matcher.of(Shapes.two).check("gen.two", (1, 2), {"z": 2})


@pytest.mark.parametrize("described", [None, 7, "abc", [["x"]], [["x", 99, False]], [[1, 1, False]]])
def test_a_description_that_makes_no_sense_lets_every_call_through(described: Any) -> None:
    Matcher.from_wire(described).check("gen.x", (1, 2, 3), {"k": 4})
