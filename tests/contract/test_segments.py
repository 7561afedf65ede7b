"""Handles: told from documents and buffers at sight, believed only with trust (PROTOCOL.md §9.1)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from forge_contract import segments
from forge_contract.errors import ProtocolError, SegmentLost
from forge_contract.payload import LARGE, decode, encode
from forge_contract.segments import VANISHED, Place, Terms, handle, is_handle, lay_out, opened, read_handle

PLACE = Place("forge-0123456789abcdef-w-0123456789abcdef-7", 3, 64, 40_000)


@pytest.fixture
def asked() -> Iterator[list[Place]]:
    """What was opened; the memory is of fours."""
    before, places = list(segments._openers), []

    def opener(wanted: Any) -> list[Any]:
        places.extend(wanted)
        return [bytearray(b"\4" * place.size) for place in wanted]

    segments.can_open(opener)
    yield places
    segments._openers[:] = before


def test_a_handle_says_where_a_buffer_lies_and_holds_its_lease() -> None:
    lease = object()
    made = handle(PLACE, lease)
    assert read_handle(made) == PLACE
    assert (made.lease, made.size) == (lease, 40_000)
    assert is_handle(memoryview(bytes(made)))


@pytest.mark.parametrize("value", [None, b"", b"\xc1forge", "x", [1], {"a": 1}, 2**70, -1, 1.5, b"\xc1" * 40])
def test_no_document_is_taken_for_a_handle(value: Any) -> None:
    document = encode(value, trusted=True)
    assert not is_handle(document)


def test_no_buffer_is_taken_for_a_handle() -> None:
    """Whatever bytes a user sends: what is set aside is never so small."""
    for size in (LARGE - 1, LARGE, LARGE + 1):
        payload = encode(b"\xc1forge" + bytes(size), trusted=True)
        assert not any(map(is_handle, payload if isinstance(payload, list) else [payload]))


@pytest.mark.parametrize(
    "fields",
    [
        ["../etc/passwd", 1, 64, 1],
        ["forge-0123456789abcdef-w-0123456789abcdef-7/../../x", 1, 64, 1],
        ["forge-0123456789abcdef", 1, 64, 1],
        [PLACE.name, 1, 0, 8],  # the generation itself
        [PLACE.name, 1, 64, -1],
        [PLACE.name, -1, 64, 1],
        [PLACE.name, 1, 64],
        [PLACE.name, 1.0, 64, 1],
        "nonsense",
    ],
)
def test_a_handle_to_anything_but_a_segment_is_a_protocol_error(fields: Any) -> None:
    with pytest.raises(ProtocolError):
        read_handle(b"\xc1forge" + msgpack.packb(fields))


def test_a_handle_that_is_cut_off_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        read_handle(bytes(handle(PLACE, None))[:-3])


def test_a_handle_is_followed_with_trust_only(asked: list[Place]) -> None:
    """W6: it names a file of ours, and a stranger has no business with those."""
    with pytest.raises(ProtocolError, match="shared memory"):
        opened([handle(PLACE, None)], trusted=False)
    assert not asked


def test_buffers_and_handles_of_one_payload_keep_their_places(asked: list[Place]) -> None:
    found = opened([b"first", handle(PLACE, None), b"third"], trusted=True)
    assert [bytes(found[0]), len(found[1]), bytes(found[2])] == [b"first", 40_000, b"third"]
    assert asked == [PLACE]


def test_a_segment_that_was_gone_before_it_was_sent_on_is_lost(asked: list[Place]) -> None:
    with pytest.raises(SegmentLost):
        decode([encode(None, trusted=True), VANISHED], trusted=True)


def test_arrays_come_out_of_a_segment_as_out_of_a_frame(asked: list[Place]) -> None:
    """W5: types and shapes are the document's business, wherever the memory lies."""
    np = pytest.importorskip("numpy")
    document = encode(np.zeros((100, 100), "f4"), trusted=True)[0]
    array = decode([document, handle(PLACE, None)], trusted=True)
    assert array.shape == (100, 100)
    assert array.flags.writeable
    assert array.tobytes() == b"\4" * 40_000


def test_buffers_are_laid_out_aligned_and_apart() -> None:
    starts, size = lay_out([1, 64, 65, 0, 8])
    assert starts == [64, 128, 192, 320, 320]
    assert size == 384


@pytest.mark.parametrize("fields", [None, [], ["p", 0, 1], ["p", "1", 1], {"prefix": "p"}, 7])
def test_terms_that_are_none_switch_it_off(fields: Any) -> None:
    assert Terms.read(fields) is None
    assert Terms.read(["p", 1, 2]) == Terms("p", 1, 2)


def test_a_payloads_memory_is_freed_with_the_last_who_looks_at_it() -> None:
    """At once and not by the collector, for which nobody waits with 16 MiB in hand."""
    np = pytest.importorskip("numpy")
    frame = bytearray(LARGE)
    document = encode(np.zeros(LARGE, "u1"), trusted=True)[0]
    gc.disable()
    try:
        before = sys.getrefcount(frame)
        array = decode([document, frame], trusted=True)
        assert sys.getrefcount(frame) > before
        del array
        assert sys.getrefcount(frame) == before
        source = np.zeros(LARGE, "u1")
        before = sys.getrefcount(source)
        payload = encode([source, "x" * 300_000], trusted=True)  # with a document so large that its encoder is let go
        assert sys.getrefcount(source) > before
        del payload
        assert sys.getrefcount(source) == before
    finally:
        gc.enable()
