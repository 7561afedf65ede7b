"""What the payload codec does with trust, without it, with garbage, and with exceptions."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_contract import errors
from forge_contract.errors import (
    FanoutError,
    ForgeError,
    Overloaded,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    TrustRequired,
)
from forge_contract.payload import (
    LARGE,
    decode,
    decode_call,
    decode_exception,
    encode,
    encode_call,
    encode_exception,
)
from tests.contract import payload_samples
from tests.contract.payload_samples import (
    Area,
    Color,
    HostileError,
    Key,
    OddError,
    Pair,
    Plain,
    Prompt,
    SlottedError,
)

HERE = payload_samples.__name__


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def over(error: BaseException, *, sent_trusted: bool = False, trusted: bool = False) -> BaseException:
    return decode_exception(encode_exception(raised(error), trusted=sent_trusted), trusted=trusted)


# ---- trust


def test_what_needs_a_pickle_needs_trust_on_both_sides() -> None:
    """W6."""
    with pytest.raises(SerializationError, match="Plain cannot travel"):
        encode(Plain(), trusted=False)
    payload = encode([Plain(3)], trusted=True)
    with pytest.raises(TrustRequired, match="Plain"):
        decode(payload, trusted=False)
    assert decode(payload, trusted=True)[0].value == 3


def test_a_class_of_a_function_goes_by_value_with_trust_alone() -> None:
    """W6, A9."""
    import dataclasses

    @dataclasses.dataclass
    class Local:
        number: int

    with pytest.raises(SerializationError, match="cannot be imported by another process"):
        encode(Local(1), trusted=False)
    assert decode(encode(Local(1), trusted=True), trusted=True).number == 1


def test_large_arrays_inside_a_pickle_are_not_copied() -> None:
    """W5."""
    array = np.zeros(LARGE)
    payload = encode(Plain(array), trusted=True)  # type: ignore[arg-type]
    assert isinstance(payload, list)
    assert np.shares_memory(np.frombuffer(payload[1], "u1"), array)
    assert np.array_equal(decode(payload, trusted=True).value, array)
    small = decode(encode(Plain(np.zeros(3)), trusted=True), trusted=True)  # type: ignore[arg-type]
    assert small.value.flags.writeable


def test_a_dataclass_with_attributes_that_are_no_fields_is_no_plain_value() -> None:
    """W5: rebuilt from its fields it would be half an object."""
    with pytest.raises(SerializationError, match="square"):
        encode(Area(3), trusted=False)
    assert decode(encode(Area(3), trusted=True), trusted=True).square == 9


@pytest.mark.parametrize("value", [Prompt("a", []), Color.RED, Pair(1, 2), Key("a", ())])
def test_a_class_is_looked_up_among_imported_modules_and_imported_only_with_trust(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W5, W6."""
    payload = encode(value, trusted=False)
    monkeypatch.delitem(sys.modules, HERE)
    with pytest.raises(
        SerializationError, match="not imported here; import it on the receiving side, or use a trusted"
    ):
        decode(payload, trusted=False)
    assert HERE not in sys.modules
    assert type(decode(payload, trusted=True)).__name__ == type(value).__name__
    monkeypatch.undo()
    assert decode(payload, trusted=False) == value


def ext(code: int, value: Any) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(value))


@pytest.mark.parametrize(
    "hostile",
    [
        ext(18, ["subprocess:Popen", {"args": "true"}]),
        ext(18, [f"{HERE}:Plain", {"value": 1}]),
        ext(18, [f"{HERE}:Prompt", {"__class__": 1}]),
        ext(18, [f"{HERE}:Area", {"square": 1}]),
        ext(17, ["builtins:int", None, 3]),
        ext(17, [f"{HERE}:Color", "nothing", None]),
        ext(17, [f"{HERE}:Color", None, 1]),
        ext(19, ["builtins:tuple", [1]]),
        ext(19, [f"{HERE}:Pair", [1]]),
        ext(18, [f"{HERE}:no.such", {}]),
        ext(18, ["no colon", {}]),
        ext(24, ["unknown", {}]),
        ext(20, ["|O", [1], "C", b"12345678"]),
        ext(20, ["<f4", [2**60, 2**60], "C", b"1234"]),
        ext(20, ["<f4", [-1], "C", b"1234"]),
        ext(20, ["<f4", [1], "C", 0]),
        ext(22, ["load", [1], "cpu", b"1"]),
        ext(22, ["qint8", [1], "cpu", b"1"]),
        ext(23, [{"procs": 2**60}, []]),
        ext(26, [["ConfigError", {"problems": 3}], ""]),
        ext(26, [["Overloaded", {"self": 3}], ""]),
        msgpack.ExtType(0, b"\0\0\0\7"),
        ext(99, []),
    ],
    ids=repr,
)
def test_hostile_extensions_are_refused(hostile: msgpack.ExtType) -> None:
    """W6, W8."""
    with pytest.raises(ForgeError):
        decode(msgpack.packb([hostile]), trusted=False)


@pytest.mark.parametrize(
    "ref", ["builtins:SystemExit", "builtins:KeyboardInterrupt", "builtins:StopIteration", "os:_exit"]
)
def test_an_exception_that_would_mean_something_else_here_is_a_remote_error(ref: str) -> None:
    """A5."""
    form = msgpack.packb([ref, [0], {}])
    error = decode_exception(msgpack.packb(ext(25, ["x", "text", "trace", form])), trusted=False)
    assert type(error) is RemoteError


def test_a_claimed_size_costs_nothing() -> None:
    """W8: nested headers that claim a million elements each."""
    for head in (b"\xdd", b"\xdf"):
        bomb = (head + (100_000).to_bytes(4, "big")) * 1000 + b"\1" * 100_000
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(ProtocolError):
            decode(bomb, trusted=False)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
        assert time.monotonic() - began < 5
        tracemalloc.stop()


def test_depth_bombs_are_refused() -> None:
    """W8."""
    tuples: Any = 1
    for _ in range(500):
        tuples = ext(1, [tuples])
    mixed: Any = 1
    for level in range(30_000):
        mixed = ext(1, mixed) if level % 400 == 399 else [mixed]
    for bomb in (b"\x91" * 5000 + b"\1", b"\x81\1" * 5000 + b"\1", msgpack.packb(tuples), msgpack.packb(mixed)):
        with pytest.raises(ProtocolError):
            decode(bomb, trusted=False)


VALID = [
    encode_call((1, [(2, {3})]), {"a": Prompt("x", [1]), "b": Color.RED}, trusted=False, where="x"),
    encode([np.arange(3), np.float32(1), Pair(1, 2**70)], trusted=False),
    encode_exception(raised(OddError(1, detail="x")), trusted=False),
    encode_exception(Overloaded(what="x", limit_name="y", limit=1, retry_after_s=1), trusted=False),
]


def only_forge_errors(payload: bytes) -> None:
    for function in (decode, decode_call, decode_exception):
        try:
            function(payload, trusted=False)
        except ForgeError:
            continue


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_errors_of_ours(garbage: bytes) -> None:
    """W8."""
    only_forge_errors(garbage)


@settings(max_examples=300)
@given(st.sampled_from(VALID), st.data())
def test_damaged_payloads_raise_nothing_but_errors_of_ours(payload: bytes, data: st.DataObject) -> None:
    """W8."""
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    only_forge_errors(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    only_forge_errors(bytes(damaged))


@pytest.mark.parametrize("payload", [[], b"", [b""], b"\x90", b"\x92\x90\x90", b"\x92\x90\x81\1\1", b"\1\1"], ids=repr)
def test_what_is_no_call_is_refused(payload: Any) -> None:
    """W8."""
    with pytest.raises(ProtocolError):
        decode_call(payload, trusted=False)


# ---- exceptions


def details(error: BaseException) -> Any:
    return (
        type(error),
        error.args,
        {name: value for name, value in vars(error).items() if name != "__notes__"},
        str(error),
    )


def with_note() -> BaseException:
    error = ValueError("a", 1)
    error.add_note("while testing")
    return error


def broken_json() -> BaseException:
    try:
        json.loads("{")
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", (1, {2})),
        with_note(),
        KeyError("k"),
        FileNotFoundError(2, "No such file", "a.txt"),
        OSError("text alone"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ImportError("no", name="x", path="y"),
        AttributeError("no", name="x"),
        SyntaxError("bad", ("f.py", 1, 2, "text", 1, 3)),
        ExceptionGroup("two", [ValueError(1), OddError(2, detail="y")]),
        broken_json(),
        OddError(3, detail="x"),
        RuntimeError(Prompt("x", [1])),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_back_as_its_type_with_the_remote_traceback(error: Exception) -> None:
    """A5."""
    payload = encode_exception(raised(error), trusted=False)
    got, again = decode_exception(payload, trusted=False), decode_exception(payload, trusted=False)
    assert got is not again
    if not isinstance(error, ExceptionGroup):
        assert details(got) == details(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert getattr(got, "__notes__", None) == getattr(error, "__notes__", None)
    for name in ("errno", "filename", "name", "path", "start", "lineno", "end_lineno"):
        assert getattr(got, name, None) == getattr(error, name, None)
    assert isinstance(got.__cause__, RemoteTraceback)
    assert "in raised" in str(got.__cause__)


def test_attributes_in_slots_come_back() -> None:
    """A5."""
    got = over(SlottedError(5))
    assert isinstance(got, SlottedError)
    assert got.hidden == 5


def test_rebuilding_calls_no_function_of_the_exceptions_class() -> None:
    """A5, W6."""
    error = HostileError.__new__(HostileError, 1, 2)
    vars(error)["more"] = (3,)
    got = over(error)
    assert type(got) is HostileError
    assert got.args == (1, 2)
    assert vars(got) == {"more": (3,)}


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        asyncio.CancelledError("x"),
        StopIteration(3),
        StopAsyncIteration(),
        ValueError(threading.Lock()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_must_not_be_raised_here_or_cannot_travel_is_a_remote_error(error: BaseException) -> None:
    """A5."""
    got = over(error, sent_trusted=True, trusted=True)
    assert isinstance(got, RemoteError)
    assert got.type_name.endswith(type(error).__name__)
    assert got.remote_message == str(error)
    assert "in raised" in got.remote_traceback
    assert isinstance(got.__cause__, RemoteTraceback)


def test_an_exception_of_a_module_not_imported_here_is_a_remote_error_without_trust(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A5, W6."""
    payload = encode_exception(raised(OddError(1, detail="x")), trusted=True)
    monkeypatch.delitem(sys.modules, HERE)
    got = decode_exception(payload, trusted=False)
    assert isinstance(got, RemoteError)
    assert str(got) == f"{HERE}.OddError: 1: x"
    assert "not imported here" in got.not_rebuilt_because
    assert HERE not in sys.modules
    assert type(decode_exception(payload, trusted=True)).__name__ == "OddError"


def test_an_exception_class_of_a_function_goes_by_value_with_trust() -> None:
    """A5, A9."""

    class LocalError(ValueError):
        pass

    assert isinstance(over(LocalError(1)), RemoteError)
    got = over(LocalError(1), sent_trusted=True, trusted=True)
    assert isinstance(got, LocalError)
    assert got.args == (1,)
    assert isinstance(over(LocalError(1), sent_trusted=True), RemoteError)


def test_an_exception_that_cannot_even_print_itself_travels() -> None:
    """A5."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    for trusted in (True, False):
        error = decode_exception(encode_exception(raised(Mute()), trusted=trusted), trusted=False)
        assert isinstance(error, RemoteError)
        assert "cannot be printed" in error.remote_message
    endless = ValueError()
    endless.args = (endless,)
    assert isinstance(over(endless), Exception)


def test_errors_of_ours_come_back_as_what_they_were() -> None:
    """A5."""
    error = Overloaded(what="embed", limit_name="max_queued_requests", limit=512, retry_after_s=0.5)
    got = over(error)
    assert type(got) is Overloaded
    assert (got.retry_after_s, str(got)) == (0.5, str(error))
    odd = errors.BadCall(endpoint="x", why=threading.Lock())
    assert str(odd) in str(over(odd))


def test_a_fanout_error_keeps_results_and_errors_where_they_travel() -> None:
    """A5."""
    got = over(FanoutError("Gen.generate", {0: (1,)}, {1: OddError(1, detail="x")}))
    assert isinstance(got, FanoutError)
    assert got.results == {0: (1,)}
    assert type(got.errors[1]) is OddError
    degraded = over(FanoutError("Gen.generate", {0: threading.Lock()}, {1: OddError(1, detail="x")}))
    assert isinstance(degraded, ForgeError)
    assert "Gen.generate.fanout: 1 of 2 replicas failed" in str(degraded)


def test_exceptions_are_values_too() -> None:
    """A5: `errors="return"`."""
    [got] = decode(encode([ValueError(1)], trusted=False), trusted=False)
    assert type(got) is ValueError
    assert isinstance(got.__cause__, RemoteTraceback)
