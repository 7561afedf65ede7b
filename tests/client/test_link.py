"""The client's conversation under a virtual clock: columns, order, credit, cancellation, loss (W1, W4, A6)."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from forge_client.link import CALLS_A_MESSAGE, ClientLink, Declared
from forge_client.outgoing import Extras
from forge_contract.errors import Overloaded, VersionMismatch
from forge_contract.framing import MAX_MESSAGES, Outbox, decode, encode
from forge_contract.messages import BROKER_NAME, CALLS, CANCEL, CONTROL, FANOUT, PARTS, REFUSE, RESULTS, WELCOME


class Heard:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.results_of: dict[Any, tuple[int, Any, bool]] = {}
        self.lost_ones: list[Any] = []
        self.answers: list[Any] = []
        self.notices: list[Any] = []
        self.refusals: list[Any] = []
        self.unsure_ones: list[Any] = []
        self.declared: Declared | None = None

    def welcomed(self, fields: dict[str, Any]) -> None:
        self.welcome = fields

    def refused(self, error: Any) -> None:
        self.refusals.append(error)

    def lost(self, waiters: list[Any], controls: list[Any]) -> None:
        self.lost_ones += waiters + controls

    def unsure(self, waiters: list[Any]) -> None:
        self.unsure_ones += waiters

    def declares(self) -> Declared | None:
        return self.declared

    def results(self, trusted: bool, waiters: list[Any], statuses: list[int], payloads: list[Any]) -> None:
        for waiter, status, payload in zip(waiters, statuses, payloads, strict=True):
            self.results_of[waiter] = (status, payload, trusted)

    def parts(self, trusted: bool, waiter: Any, points: Any, statuses: list[int], payloads: list[Any]) -> None:
        self.results_of[waiter] = (points, payloads, trusted)

    def answer(self, waiter: Any, ok: bool, fields: dict[str, Any], payload: Any) -> None:
        self.answers.append((waiter, ok, fields, payload))

    def notice(self, topic: str, fields: dict[str, Any]) -> None:
        self.notices.append((topic, fields))


def broker_says(
    link: ClientLink, number: int, body: list[Any], packed: bytes = b"", version_of: int | None = None
) -> None:
    link.receive(encode(BROKER_NAME, link.channel.epoch, 77, number, link.channel.sent, body, packed), 1.0)


def opened(**welcome: Any) -> tuple[ClientLink, Heard]:
    heard = Heard()
    link = ClientLink("c-0000000000000000", 0.0, hello={"pid": 1}, listener=heard)
    ((hello, *_),) = link.flush(0.0)
    assert decode([hello, b""]).body[0][1]["role"] == "client"
    broker_says(link, 0, [[WELCOME, {"client": 5, "trusted": True, **welcome}]])
    return link, heard


def said(link: ClientLink, now: float = 1.0) -> list[list[Any]]:
    return [message for frames in link.flush(now) for message in decode(frames).body]


def test_calls_of_one_turn_are_columns_of_one_message() -> None:
    """W1"""
    link, _ = opened()
    for number in range(3):
        link.submit(7, b"abc", f"waiter {number}")
    (frames,) = link.flush(1.0)
    envelope = decode(frames)
    assert envelope.body == [[CALLS, 7, [1, 2, 3], [3, 3, 3], {}]]
    assert envelope.payloads.take_all([3, 3, 3]) == [b"abc"] * 3


def test_columns_that_are_default_are_left_out_and_deadlines_travel_as_time_remaining() -> None:
    """W9"""
    link, _ = opened()
    link.submit(7, b"a", 1)
    link.submit(7, b"b", 2, Extras(deadline=3.5), session="s")
    link.submit(7, b"c", 3, Extras(rank=0))
    ((_, _, seqs, _, columns),) = said(link, 1.0)
    assert seqs == [1, 2, 3]
    assert columns == {"timeout": [None, 2.5, None], "session": [None, "s", None], "rank": [None, None, 0]}


def test_ordered_calls_do_not_overtake_each_other_between_endpoints() -> None:
    """A6"""
    link, _ = opened()
    link.submit(1, b"", "a", session="s")
    link.submit(2, b"", "b", session="s")
    link.submit(1, b"", "c", session="s")
    link.submit(2, b"", "free")  # belongs to no order, so it may join an earlier message
    assert [(message[1], message[2]) for message in said(link)] == [(1, [1]), (2, [2, 4]), (1, [3])]


def test_nothing_overtakes_a_fan_out_or_a_control() -> None:
    """S1: a session's first call never arrives before its opening."""
    link, _ = opened()
    link.submit(1, b"", "a")
    link.control("open_session", {"session": "s"}, b"", "opening")
    link.submit(1, b"", "b", session="s")
    link.fanout(2, b"", "weights")
    link.submit(1, b"", "c")
    assert [message[0] for message in said(link)] == [CALLS, CONTROL, CALLS, FANOUT, CALLS]


def test_what_is_said_before_the_welcome_waits_for_it() -> None:
    heard = Heard()
    link = ClientLink("c-0000000000000000", 0.0, hello={}, listener=heard)
    link.flush(0.0)
    link.submit(7, b"x", "early")
    assert link.flush(0.5) == []
    broker_says(link, 0, [[WELCOME, {"client": 5}]])
    assert [message[0] for message in said(link)] == [CALLS]


def test_results_reach_their_waiters_with_the_stamp_of_trust() -> None:
    """W6"""
    link, heard = opened()
    link.submit(7, b"x", "a")
    link.submit(7, b"y", "b")
    link.flush(1.0)
    broker_says(link, 1, [[RESULTS, False, [2, 1], 0, [1, 2]]], b"BAA")
    assert heard.results_of == {"b": (0, b"B", False), "a": (0, b"AA", False)}
    assert not link.unanswered


def test_a_second_reply_and_one_nobody_asked_for_are_counted_and_dropped() -> None:
    link, heard = opened()
    link.submit(7, b"x", "a")
    link.flush(1.0)
    broker_says(link, 1, [[RESULTS, True, [1], 0, [1]]], b"A")
    broker_says(link, 2, [[RESULTS, True, [1, 99], 0, [1, 1]]], b"BC")
    assert heard.results_of["a"] == (0, b"A", True)
    assert link.refused_replies == 2


def test_a_cancelled_call_says_so_after_the_call_and_its_reply_is_dropped() -> None:
    """F5"""
    link, heard = opened()
    seq = link.submit(7, b"x", "a")
    link.cancel(seq)
    link.cancel(seq)
    assert [message[0:2] for message in said(link)] == [[CALLS, 7], [CANCEL, [1]]]
    broker_says(link, 1, [[RESULTS, True, [1], 2, [1]]], b"A")
    assert heard.results_of == {None: (2, b"A", True)}
    assert link.refused_replies == 0


def test_at_the_links_limit_calls_are_refused_and_then_flow_again() -> None:
    """W8"""
    link, _ = opened(link_bytes=1000)
    link.submit(7, b"x" * 900, "a")
    with pytest.raises(Overloaded, match="link_bytes=1000"):
        link.submit(7, b"x" * 200, "b")
    link.flush(1.0)
    with pytest.raises(Overloaded):
        link.submit(7, b"x" * 900, "b")
    broker_says(link, 0, [])  # its ack
    link.submit(7, b"x" * 900, "b")


def test_a_turn_of_more_calls_than_a_message_may_hold_is_split_in_order() -> None:
    """W8"""
    link, _ = opened()
    for number in range(CALLS_A_MESSAGE + 1):
        link.submit(7, b"", number)
    assert [len(message[2]) for message in said(link)] == [CALLS_A_MESSAGE, 1]


def test_a_turn_of_more_messages_than_an_envelope_may_hold_becomes_several() -> None:
    """W8"""
    link, _ = opened()
    for number in range(MAX_MESSAGES + 5):
        link.submit(number % 2, b"p", number, None, "actor")
    envelopes = [decode(frames) for frames in link.flush(1.0)]
    assert [len(envelope.body) for envelope in envelopes] == [MAX_MESSAGES, 5]
    assert [message[2][0] for envelope in envelopes for message in envelope.body] == list(range(1, MAX_MESSAGES + 6))


def test_lost_envelopes_are_sent_again_once_and_in_order() -> None:
    """W4"""
    link, _ = opened()
    link.submit(7, b"1", "a")
    first = link.flush(1.0)
    link.submit(7, b"2", "b")
    second = link.flush(1.1)
    link.reconnected(2.0)
    link.flush(2.0)
    link.receive(encode(BROKER_NAME, 1, 77, 0, 0, []), 2.1)  # the answer to the probe: it has nothing
    assert link.flush(2.1) == first + second


@pytest.mark.parametrize(
    "message",
    [
        [RESULTS, True, [1]],
        [RESULTS, True, 5, 0, [1]],
        [RESULTS, True, [1], 0, [100]],
        [RESULTS, True, [1, 2], 0, [1]],
        [RESULTS, True, [1], [0, 0], [1]],
        [PARTS, True, 1, [[0, 0], [1, 0]], 0, [1]],
        [PARTS, True, 1, [[0, float("inf")]], 0, [1]],
        [26, 1, True, 7, 0],
        [99],
    ],
)
def test_the_brokers_nonsense_is_counted_and_hurts_nobody(message: list[Any]) -> None:
    """W8"""
    link, heard = opened()
    link.submit(7, b"x", "a")
    link.flush(1.0)
    broker_says(link, 1, [message], b"A")
    assert link.refused_envelopes == 1
    assert not heard.results_of
    broker_says(link, 2, [[RESULTS, True, [1], 0, [1]]], b"A")
    assert heard.results_of == {"a": (0, b"A", True)}


def test_a_broker_of_another_version_is_told_apart_from_silence() -> None:
    heard = Heard()
    link = ClientLink("c-0000000000000000", 0.0, hello={}, listener=heard)
    link.flush(0.0)
    header = [9, BROKER_NAME, 1, 77, 0, 0, [[REFUSE, "VersionMismatch", {"ours": 9, "theirs": 1}]]]
    link.receive([msgpack.packb(header), b""], 0.1)
    assert [type(error) for error in heard.refusals] == [VersionMismatch]


def test_calls_of_one_shape_are_one_message_although_shapes_take_turns() -> None:
    """B1, B2: the shape is a column of one value, and left out where it is 0."""
    link, _ = opened()
    for number, shape in enumerate([1, 2, 1, 0, 2, 1, 0]):
        link.submit(7, bytes([number]), number, None, None, shape)
    (frames,) = link.flush(1.0)
    envelope = decode(frames)
    assert envelope.body == [
        [CALLS, 7, [1, 3, 6], [1, 1, 1], {"shape": 1}],
        [CALLS, 7, [2, 5], [1, 1], {"shape": 2}],
        [CALLS, 7, [4, 7], [1, 1], {}],
    ]
    assert envelope.payloads.take_all([1] * 7) == [bytes([number]) for number in (0, 2, 5, 1, 4, 3, 6)]


def test_a_session_never_overtakes_itself_for_the_sake_of_its_calls_shapes() -> None:
    """A6: a run that stands before an earlier call of the session is not gone back to."""
    link, _ = opened()
    for shape, session in ((1, "s"), (2, "s"), (1, "s"), (1, "t"), (2, None)):
        link.submit(7, b"x", None, None, None, shape, session)
    assert [(message[2], message[4]["shape"]) for message in said(link)] == [([1], 1), ([2, 5], 2), ([3, 4], 1)]


def test_a_full_message_is_followed_by_another_of_its_shape() -> None:
    """W1."""
    link, _ = opened()
    for number in range(2 * CALLS_A_MESSAGE + 2):
        link.submit(7, b"", None, None, None, 1 + number % 2)
    assert [(len(message[2]), message[4]["shape"]) for message in said(link)] == [
        (CALLS_A_MESSAGE, 1),
        (CALLS_A_MESSAGE, 2),
        (1, 1),
        (1, 2),
    ]


def test_keys_and_weights_are_columns_and_shapes_are_said_again_to_a_broker_that_comes_back() -> None:
    """B2, F10"""
    link, _ = opened()
    link.submit(7, b"a", "a", Extras(key="fr", weight=2.0), None, 1)
    link.submit(7, b"b", "b", None, None, 1)
    link.submit(7, b"c", "c", None, None, 2)
    columns = {"key": ["fr", None], "weight": [2.0, None], "shape": 1}
    assert said(link) == [[CALLS, 7, [1, 2], [1, 1], columns], [CALLS, 7, [3], [1], {"shape": 2}]]
    again, _, _ = link.sent.take(3)
    outbox = Outbox()
    assert [item.message(outbox, 1.0)[4] for item in again] == [{**columns, "again": True}, {"again": True, "shape": 2}]
