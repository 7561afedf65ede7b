"""Envelopes to frames and back (W1, W8), and the columns and ids of `messages`."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_contract import messages
from forge_contract.errors import ProtocolError, VersionMismatch
from forge_contract.framing import MAX_MESSAGES, Outbox, decode, encode
from forge_contract.messages import (
    CONTROL,
    client_of,
    column,
    read_request,
    request_id,
    sequence_of,
    show_request,
    spread,
)

payloads = st.lists(st.binary(max_size=9) | st.lists(st.binary(max_size=9), min_size=1, max_size=3), max_size=6)


@given(payloads, payloads)
def test_what_is_attached_comes_out_in_order(first: list[Any], second: list[Any]) -> None:
    """W1: small payloads packed, large ones in frames of their own, by whole columns or one by one."""
    outbox = Outbox()
    outbox.body.append([99, [outbox.attach(payload) for payload in first]])
    outbox.body.append([98, [outbox.attach(payload) for payload in second]])
    envelope = decode(outbox.seal("c-1", 2, 3, 4, 5))
    assert (envelope.sender, envelope.epoch, envelope.incarnation, envelope.number, envelope.ack) == ("c-1", 2, 3, 4, 5)
    assert envelope.payloads.take_all(envelope.body[0][1]) == first
    assert [envelope.payloads.take(size) for size in envelope.body[1][1]] == second
    envelope.payloads.close()
    assert len(outbox) == 0


def test_small_payloads_of_one_size_are_cut_alike() -> None:
    taken = decode(encode("c-1", 1, 1, 1, 1, [], b"zaabbcc")).payloads
    assert taken.take(1) == b"z"
    assert taken.take_all([2, 2, 2]) == [b"aa", b"bb", b"cc"]
    assert taken.take_all([0, 0]) == [b"", b""]
    taken.close()


@pytest.mark.parametrize("sizes", [[3], [-1], [2, 1], [1], [2, 2]])
def test_sizes_that_do_not_add_up_are_nonsense(sizes: list[int]) -> None:
    """W8: too much, too many, or something left over."""
    taken = decode(encode("c-1", 1, 1, 1, 1, [], b"ab")).payloads

    def read() -> None:
        taken.take_all(sizes)
        taken.close()

    with pytest.raises(ProtocolError):
        read()


@pytest.mark.parametrize(
    "header",
    [
        [1],
        [1, "c", 1, 1, 1, 1, []],
        [1, "", 1, 1, 1, 1, [], b""],
        [1, "x" * 65, 1, 1, 1, 1, [], b""],
        [1, 5, 1, 1, 1, 1, [], b""],
        [1, "c", 1 << 32, 1, 1, 1, [], b""],
        [1, "c", -1, 1, 1, 1, [], b""],
        [1, "c", 1, 1, 1 << 63, 1, [], b""],
        [1, "c", 1, 1, 1, True, [], b""],
        [1, "c", 1, 1, 1, 1, {}, b""],
        [1, "c", 1, 1, 1, 1, [[]], b""],
        [1, "c", 1, 1, 1, 1, [["x"]], b""],
        [1, "c", 1, 1, 1, 1, [[1]] * (MAX_MESSAGES + 1), b""],
        [1, "c", 1, 1, 1, 1, [], "ab"],
        [1, "c", 1, 1, 1, 1, [], None],
        {},
        5,
    ],
    ids=lambda one: repr(one)[:40],
)
def test_a_header_that_is_none_is_nonsense(header: Any) -> None:
    """W8, PROTOCOL.md §2."""
    with pytest.raises(ProtocolError):
        decode([msgpack.packb(header)])


def test_a_message_nested_too_deep_is_nonsense() -> None:
    """W8."""
    deep: Any = 1
    for _ in range(100):
        deep = {"x": deep}
    with pytest.raises(ProtocolError, match="nested deeper"):
        decode(encode("c", 1, 1, 1, 1, [[CONTROL, deep]]))


def test_another_version_is_told_from_nonsense() -> None:
    """W7: the version is first, so that any version can read it."""
    with pytest.raises(VersionMismatch, match="this side speaks protocol 1, the other 2"):
        decode([msgpack.packb([2, "whatever"])])


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_random_frames_are_an_envelope_or_nonsense(frames: list[bytes]) -> None:
    """W8."""
    try:
        envelope = decode(frames)
    except ProtocolError:
        return
    assert msgpack.unpackb(frames[0])[:2] == [messages.VERSION, envelope.sender]


@given(st.lists(st.integers(0, 2) | st.none() | st.text(max_size=1), min_size=1))
def test_a_column_of_equals_is_one_value(values: list[Any]) -> None:
    """W1, PROTOCOL.md §2."""
    short = column(values)
    assert spread(short, len(values)) == values
    assert isinstance(short, list) == (len(set(values)) > 1)


@given(st.integers(0, (1 << 24) - 1), st.integers(1, (1 << 40) - 1))
def test_a_request_id_can_be_shown_and_read(client: int, sequence: int) -> None:
    """W3, PROTOCOL.md §3."""
    key = request_id(client, sequence)
    assert (client_of(key), sequence_of(key)) == (client, sequence)
    assert read_request(show_request(key)) == key


@pytest.mark.parametrize("text", ["", "gen/0", "-", "1a2b3c", "1a-", "xyz-5", "w-00ff"])
def test_what_is_no_request_id_is_none(text: str) -> None:
    """C5: `forge explain` takes anything."""
    assert read_request(text) is None
