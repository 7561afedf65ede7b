"""What a call says of itself to a broker that sees no arguments (B2): its shape, its key, its weight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forge_client import ConfigError, ForgeActor, service_endpoint
from forge_client.batching import NOTHING_SAID, Batching, Said
from forge_client.signature import Matcher
from forge_contract.errors import BadCall

CALL = {"batch_size": 8, "batch_mode": "call"}


def generate(self: Any, prompt: str, adapter: str = "base", *more: int, seed: int = 0, **rest: Any) -> None: ...


def batching(function: Callable[..., Any] | None = None, **options: Any) -> Batching:
    """Of an endpoint with the signature of `generate`; `function` is what its batch_key and batch_weight are, where they are any."""
    known = SimpleNamespace(batch_key=function, batch_weight=function)
    return Batching("gen.generate", {**CALL, **options}, known, Matcher.of(generate))


def key_of(value: Any) -> Any:
    return batching(lambda: value, batch_key=True).key((), {})


def weight_of(value: Any) -> Any:
    return batching(lambda: value, batch_weight=True).weight((), {})


def test_a_shape_is_the_same_in_every_process_and_on_every_machine() -> None:
    """PROTOCOL.md §7: what clients of two programs call alike shares a batch, so these numbers are part of the wire."""
    of = batching().shape
    assert [of(args, {}) for args in ((), (1,), (1, 2))] == [0, 1, 2]
    assert of((1,), {"seed": 1, "adapter": "a"}) == 4931093516182392369
    assert of((), {"prompt": "x"}) == 5533751812236007250


def test_a_shape_is_of_the_names_whatever_their_order_and_values() -> None:
    """B2."""
    of = batching().shape
    assert of((1,), {"seed": 1, "adapter": "a"}) == of(("x",), {"adapter": None, "seed": []})
    others = {of((1,), {"seed": 1}), of((1, 2), {"seed": 1}), of((1,), {"adapter": 1}), of((), {"seed": 1, "a": 1})}
    assert len(others) == 4
    assert all(1 << 62 <= one < 1 << 63 for one in others)  # no number of positionals, and an int on the wire


def test_where_a_method_runs_for_each_item_shapes_do_not_matter() -> None:
    """B2: batch_mode="route"."""
    assert batching(batch_mode="route").said((1,), {"seed": 1}) == NOTHING_SAID


def test_keys_of_types_that_a_header_holds_travel_as_they_are() -> None:
    for key in (None, "fr", b"fr", 0, -1, 2**63 - 1, 1 - 2**63):
        assert key_of(key) == key
        assert type(key_of(key)) is type(key)


def test_any_other_hashable_key_travels_as_bytes_that_are_equal_when_it_is() -> None:
    for key, equal, other in (
        (("a", 1), ("a", 1), ("a", 2)),
        (True, True, False),
        (1.5, 3 / 2, 2.5),
        (2**70, 2**70, 2**70 + 1),
        (frozenset({1}), frozenset({1}), frozenset({2})),
        (np.int64(7), np.int64(7), np.int64(8)),
    ):
        assert type(key_of(key)) is bytes
        assert key_of(key) == key_of(equal) != key_of(other)


class Angry:
    def __hash__(self) -> int:
        raise RuntimeError("do not ask")

    def __float__(self) -> float:
        raise RuntimeError("do not ask")


@pytest.mark.parametrize("key", [[], {}, {1}, bytearray(b"x"), np.zeros(2), Angry(), object(), ([],)])
def test_what_cannot_be_a_key_is_a_bad_call(key: Any) -> None:
    """Unhashable, or of a type that no stranger could send."""
    with pytest.raises(BadCall, match=r"gen\.generate.*batch_key gave .*, which is no key"):
        key_of(key)


@pytest.mark.parametrize("weight", [0, 1, 0.5, 10**9, True, np.float32(2), np.int64(3), np.array(4.0)])
def test_weights_are_numbers_from_0_on(weight: Any) -> None:
    assert weight_of(weight) == float(weight)
    assert type(weight_of(weight)) is float
    assert weight_of(None) is None


@pytest.mark.parametrize(
    "weight", [-1, -0.1, math.nan, math.inf, -math.inf, 10**400, "7", b"7", [1], np.ones(2), 1j, Angry(), object()]
)
def test_what_cannot_be_a_weight_is_a_bad_call(weight: Any) -> None:
    with pytest.raises(BadCall, match=r"gen\.generate.*batch_weight gave .*, which is no number from 0 on"):
        weight_of(weight)


def test_an_exception_of_a_function_is_a_bad_call_with_its_words_and_its_cause() -> None:
    def tokens(prompt: str) -> int:
        raise KeyError(prompt)

    of = batching(tokens, batch_weight=True)
    with pytest.raises(BadCall, match=r"batch_weight raised KeyError: 'x'") as caught:
        of.weight(("x",), {})
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(BadCall, match=r"batch_weight raised TypeError"):
        of.weight(("x",), {"adapter": "a"})  # the function takes less than the call has


def test_an_argument_is_found_by_its_name_wherever_it_stands() -> None:
    """By position, by keyword, left to its default; also in a signature that came over the wire."""
    known = Matcher.of(generate)
    for matcher in (known, Matcher.from_wire(known.to_wire())):
        of = Batching("gen.generate", {**CALL, "batch_key": "adapter", "batch_weight": "seed"}, None, matcher)
        assert of.key(("x", "fr"), {}) == of.key(("x",), {"adapter": "fr"}) == of.key((), {"adapter": "fr"}) == "fr"
        assert of.key(("x",), {}) is None
        assert of.weight(("x", "fr", 3), {"seed": 7}) == 7.0
        assert of.weight(("x",), {}) is None
        assert of.asks


def test_a_function_sees_the_call_as_it_was_made() -> None:
    seen: list[Any] = []
    of = batching(lambda *args, **kwargs: seen.append((args, kwargs)), batch_key=True)
    assert of.said(("x",), {"seed": 1}) == Said(of.shape(("x",), {"seed": 1}), None, None)
    assert seen == [(("x",), {"seed": 1})]


def test_a_function_that_is_not_at_hand_is_a_bad_call_that_says_what_to_do() -> None:
    """A10: of a handle found by name, or one that came from elsewhere."""
    of = Batching("gen.generate", {**CALL, "batch_key": True}, None, Matcher.of(generate))
    with pytest.raises(BadCall, match=r"its batch_key is a function, .*a parameter's name \(batch_key=\"…\"\)"):
        of.key(("x",), {})


@pytest.mark.parametrize("name", ["adaptor", "self", "more", "rest"])
@pytest.mark.parametrize("option", ["batch_key", "batch_weight"])
def test_a_name_that_no_argument_has_fails_at_decoration(option: str, name: str) -> None:
    """A2: the instance and what gathers the rest are no arguments: every call would have the same key."""
    assert name == "adaptor" or name in inspect.signature(generate).parameters
    with pytest.raises(ConfigError, match=rf"{option} names '{name}', which is none of its parameters"):

        class Generator(ForgeActor):
            generate_text = service_endpoint(batch_size=8, **{option: name})(generate)
