"""The link while its broker dies and comes back, under a virtual clock: what is said again, and what is not (F10, F5).

`test_returns` shows the same through the whole client, with sockets and futures.
"""

from __future__ import annotations

from typing import Any

import pytest

from forge_client.link import ClientLink, Declared
from forge_client.outgoing import SURPLUS_BYTES, SURPLUS_CALLS, Extras
from forge_contract.channel import PROBE_AFTER_S
from forge_contract.framing import decode, encode
from forge_contract.messages import (
    ANSWER,
    BROKER_NAME,
    BYE,
    CALLS,
    CANCEL,
    CONTROL,
    FANOUT,
    HELLO,
    PROBE,
    RESULTS,
    WELCOME,
    WHO,
)
from forge_contract.peer_link import ASK_AFTER_S, LinkState
from tests.client.test_link import Heard, broker_says, opened, said

SUCCESSOR = 78


def who(link: ClientLink, now: float = 2.0) -> list[Any]:
    """The broker's successor does not know us; returns the envelope of our hello to it."""
    link.receive(encode(BROKER_NAME, link.channel.epoch, SUCCESSOR, 0, 0, [[WHO]]), now)
    (frames,) = link.flush(now)
    return frames


def welcomed_again(link: ClientLink, *, now: float = 2.1, client: int = 5, recovering: bool = True) -> None:
    fields = {"client": client, "trusted": True, "recovering": recovering}
    link.receive(encode(BROKER_NAME, link.channel.epoch, SUCCESSOR, 0, 0, [[WELCOME, fields]]), now)


def recovered(link: ClientLink) -> list[list[Any]]:
    """What the link says first to a successor that recovers."""
    who(link)
    welcomed_again(link)
    return said(link, 2.1)


def test_unanswered_calls_are_sent_again_under_their_numbers_and_say_so() -> None:
    """F10"""
    link, heard = opened()
    for waiter in "abc":
        link.submit(7, waiter.encode(), waiter)
    link.flush(1.0)
    broker_says(link, 1, [[RESULTS, True, [2], 0, [1]]], b"B")
    who(link)
    assert heard.lost_ones == []
    welcomed_again(link)
    (frames,) = link.flush(2.1)
    envelope = decode(frames)
    assert (envelope.epoch, envelope.incarnation, envelope.number) == (2, SUCCESSOR, 1)
    assert envelope.body == [[CALLS, 7, [1, 3], [1, 1], {"again": True}]]
    assert envelope.payloads.take_all([1, 1]) == [b"a", b"c"]
    assert heard.lost_ones == []
    link.receive(encode(BROKER_NAME, 2, SUCCESSOR, 1, 1, [[RESULTS, True, [1, 3], 0, [1, 1]]], b"AC"), 3.0)
    assert {waiter: payload for waiter, (_, payload, _) in heard.results_of.items()} == {
        "a": b"A",
        "b": b"B",
        "c": b"C",
    }
    assert not link.unanswered


def test_a_call_sent_again_keeps_its_extras_and_the_rest_of_its_timeout() -> None:
    """F10, F5"""
    link, _ = opened()
    link.submit(7, b"a", "a", Extras(priority=3), session="s")
    link.submit(7, b"b", "b", Extras(deadline=9.0, hints={"k": 1}, rank=2))
    link.submit(7, b"c", "c")
    link.flush(1.0)
    ((_, _, seqs, _, columns),) = recovered(link)
    assert seqs == [1, 2, 3]
    assert columns == {
        "again": True,
        "timeout": [None, pytest.approx(6.9), None],
        "session": ["s", None, None],
        "priority": [3, 0, 0],
        "hints": [None, {"k": 1}, None],
        "rank": [None, 2, None],
    }


def test_controls_and_calls_are_said_again_in_their_order_and_controls_under_their_numbers() -> None:
    """F10, S1: a session's calls come after its opening, its closing after its calls."""
    link, _ = opened()
    link.control("find", {"name": "x"}, b"", "answered")
    link.control("open_session", {"session": "s"}, b"", "opening")
    link.submit(7, b"a", "a", session="s")
    link.flush(1.0)
    link.control("close_session", {"session": "s"}, b"", "closing")
    link.control("deploy", {"spec": {}}, b"arguments", "deploying")
    link.flush(1.1)
    broker_says(link, 1, [[ANSWER, 1, True, {}, 0]])
    who(link)
    welcomed_again(link)
    (frames,) = link.flush(2.1)
    envelope = decode(frames)
    assert envelope.body == [
        [CONTROL, 2, "open_session", {"session": "s"}, 0],
        [CALLS, 7, [1], [1], {"session": "s", "again": True}],
        [CONTROL, 3, "close_session", {"session": "s"}, 0],
        [CONTROL, 4, "deploy", {"spec": {}}, 9],
    ]
    assert envelope.payloads.take_all([0, 1, 0, 9]) == [b"", b"a", b"", b"arguments"]


def test_a_fan_out_that_was_sent_is_not_sent_again_and_one_that_waits_is_sent() -> None:
    """F10: its targets were those healthy then; said again it could reach some twice."""
    link, heard = opened()
    link.fanout(8, b"weights", "under way")
    link.flush(1.0)
    who(link)
    link.fanout(8, b"weights", "waiting")
    welcomed_again(link)
    assert heard.unsure_ones == ["under way"]
    assert said(link, 2.1) == [[FANOUT, 8, 2, 7, {}]]
    assert list(link.unanswered.values()) == ["waiting"]


def test_what_was_cancelled_is_not_sent_again_and_nothing_waits_for_its_reply() -> None:
    """F5, F10"""
    link, _ = opened()
    first, second = link.submit(7, b"a", "a"), link.submit(7, b"b", "b")
    link.flush(1.0)
    link.cancel(first)
    link.flush(1.1)
    link.cancel(second)  # said to nobody any more
    who(link)
    third = link.submit(7, b"c", "c")  # given up before it was ever sent
    link.cancel(third)
    link.submit(7, b"d", "d")
    welcomed_again(link)
    assert said(link, 2.1) == [[CALLS, 7, [4], [1], {}]]
    assert list(link.unanswered) == [4]


def test_calls_made_while_the_broker_is_away_follow_and_are_new() -> None:
    """F10"""
    link, _ = opened()
    link.submit(7, b"a", "a")
    link.flush(1.0)
    who(link)
    link.submit(7, b"b", "b")
    assert link.flush(2.05) == []
    welcomed_again(link)
    assert said(link, 2.1) == [[CALLS, 7, [1], [1], {"again": True}], [CALLS, 7, [2], [1], {}]]


def test_a_second_death_finds_everything_kept_once_more() -> None:
    """F10"""
    link, _ = opened()
    link.submit(7, b"a", "a")
    link.flush(1.0)
    who(link)
    welcomed_again(link)  # and it dies before a word was said to it
    link.receive(encode(BROKER_NAME, 2, SUCCESSOR, 0, 0, [[WHO]]), 2.2)
    link.flush(2.2)
    welcomed_again(link, now=2.3)
    assert said(link, 2.3) == [[CALLS, 7, [1], [1], {"again": True}]]
    link.receive(encode(BROKER_NAME, 3, SUCCESSOR, 0, 0, [[WHO]]), 3.0)
    link.flush(3.0)
    welcomed_again(link, now=3.1)
    assert said(link, 3.1) == [[CALLS, 7, [1], [1], {"again": True}]]


@pytest.mark.parametrize("welcome", [{"recovering": False}, {"client": 6}], ids=["no recovery", "another client id"])
def test_a_successor_that_does_not_recover_us_has_lost_everything(welcome: dict[str, Any]) -> None:
    """F10"""
    link, heard = opened()
    link.submit(7, b"x", "call")
    link.control("status", {}, b"", "control")
    link.flush(1.0)
    who(link)
    link.submit(7, b"y", "made meanwhile")
    assert heard.lost_ones == []
    welcomed_again(link, **welcome)
    assert heard.lost_ones == ["call", "made meanwhile", "control"]
    assert link.flush(2.1) == []
    link.submit(7, b"z", "to the new one")
    assert said(link, 2.2) == [[CALLS, 7, [3], [1], {}]]


def test_the_first_welcome_loses_nothing_whatever_it_says() -> None:
    heard = Heard()
    link = ClientLink("c-0000000000000000", 0.0, hello={}, listener=heard)
    link.flush(0.0)
    link.submit(7, b"x", "early")
    broker_says(link, 0, [[WELCOME, {"client": 5, "recovering": True}]])
    assert said(link) == [[CALLS, 7, [1], [1], {}]]
    assert heard.lost_ones == heard.unsure_ones == []


def test_the_first_hello_declares_nothing_and_a_later_one_what_hangs_on_the_broker() -> None:
    """F10"""
    heard = Heard()
    heard.declared = Declared([{"service": 1}, {"service": 2}], [[1, "s", {"k": "v"}]], [b"one", [b"doc", b"buffer"]])
    link = ClientLink("c-0000000000000000", 0.0, hello={"pid": 1}, listener=heard)
    (frames,) = link.flush(0.0)
    assert decode(frames).body[0][0::2] == [HELLO, []]
    assert decode(frames).body[0][1]["declares"] is None
    broker_says(link, 0, [[WELCOME, {"client": 5, "trusted": True}]])
    envelope = decode(who(link))
    ((_, fields, sizes),) = envelope.body
    assert (envelope.epoch, fields["client"]) == (2, 5)
    assert fields["declares"] == {
        "services": [{"service": 1}, {"service": 2}],
        "sessions": [[1, "s", {"k": "v"}]],
        "replays": [],
        "waiting": False,
    }
    assert envelope.payloads.take_all(sizes) == [b"one", [b"doc", b"buffer"]]


def test_unanswered_calls_alone_are_reason_enough_to_declare() -> None:
    """F10: calls of a service that somebody else started wait for the recovery, too."""
    link, _ = opened()
    link.flush(1.0)
    assert decode(who(link)).body[0][1]["declares"] is None
    link.submit(7, b"a", "a")
    (frames,) = link.flush(3.0)  # the hello is said again
    assert decode(frames).body[0][1]["declares"] == {"services": [], "sessions": [], "replays": [], "waiting": True}
    link.cancel(1)
    (frames,) = link.flush(6.0)  # what was given up is not said again, and nobody shall wait for it
    assert decode(frames).body[0][1]["declares"] is None


def test_what_is_kept_is_bounded_by_what_is_unanswered() -> None:
    """F10, W8: in calls and in bytes, answered one by one or in the middle of their runs."""
    link, _ = opened()
    number = 0

    def answer(seqs: list[int]) -> None:
        nonlocal number
        number += 1
        broker_says(link, number, [[RESULTS, True, seqs, 0, [0] * len(seqs)]])

    kept = link.submit(7, b"kept", "kept")
    for _ in range(3 * SURPLUS_CALLS):
        seq = link.submit(7, b"x", "answered")
        link.flush(1.0)
        answer([seq])
    assert len(link.sent) <= SURPLUS_CALLS + 3
    for _ in range(10):
        seqs = [link.submit(7, b"x", "answered") for _ in range(SURPLUS_CALLS)]
        link.flush(1.0)
        answer(seqs)
    assert len(link.sent) <= 2 * SURPLUS_CALLS + 3
    large = [bytes(SURPLUS_BYTES // 4)]
    for _ in range(20):
        seq = link.submit(7, large, "answered")
        link.flush(1.0)
        answer([seq])
    assert link.sent.kept_bytes <= SURPLUS_BYTES + 2 * SURPLUS_BYTES // 4
    assert recovered(link) == [[CALLS, 7, [kept], [4], {"again": True}]]


def test_controls_that_were_answered_are_not_kept() -> None:
    """W8"""
    link, _ = opened()
    for number in range(1, 3 * SURPLUS_CALLS):
        link.control("status", {}, b"", "status")
        link.flush(1.0)
        broker_says(link, number, [[ANSWER, number, True, {}, 0]])
    assert len(link.sent) <= SURPLUS_CALLS + 1
    assert recovered(link) == []


def test_calls_of_a_broken_connection_wait_until_the_broker_has_shown_that_it_knows_us() -> None:
    """F10, F3: else a successor would find them said already, and an at-most-once call of that moment in doubt."""
    link, _ = opened()
    link.submit(7, b"a", "sent before")
    link.flush(1.0)
    link.disconnected(1.5)
    link.submit(7, b"b", "made meanwhile")
    assert link.flush(1.6) == []
    assert not link.heard
    link.reconnected(1.7)
    assert said(link, 1.7) == [[PROBE]]
    who(link, 1.8)
    welcomed_again(link)
    assert said(link, 2.1) == [[CALLS, 7, [1], [1], {"again": True}], [CALLS, 7, [2], [1], {}]]
    assert link.heard


def test_the_same_broker_behind_a_new_connection_gets_what_waited() -> None:
    """W4"""
    link, _ = opened()
    link.disconnected(1.5)
    link.submit(7, b"a", "a")
    gone = link.submit(7, b"b", "given up meanwhile")
    link.cancel(gone)
    link.reconnected(1.7)
    assert said(link, 1.7) == [[PROBE]]
    broker_says(link, 0, [])  # its answer to the probe
    assert said(link, 1.8) == [[CALLS, 7, [1], [1], {}]]
    assert list(link.unanswered) == [1]


def test_a_probe_that_is_lost_is_said_again() -> None:
    """W4: the hold ends however often the connection swallows its question."""
    link, _ = opened()
    link.disconnected(1.5)
    link.submit(7, b"a", "a")
    assert link.next_deadline() == 1.0 + ASK_AFTER_S  # nothing to do before there is a connection, or a long silence
    link.reconnected(2.0)
    assert said(link, 2.0) == [[PROBE]]
    assert link.next_deadline() == 2.0 + PROBE_AFTER_S
    assert said(link, 1.9 + PROBE_AFTER_S) == []
    assert said(link, 2.0 + PROBE_AFTER_S) == [[PROBE]]
    assert link.next_deadline() == 2.0 + 2 * PROBE_AFTER_S


def test_a_goodbye_does_not_wait_for_a_broken_connection() -> None:
    """A10"""
    link, _ = opened()
    link.disconnected(1.5)
    link.bye("shutdown")
    assert said(link, 1.6) == [[BYE, "shutdown"]]


def test_a_cancellation_is_said_to_the_broker_that_had_the_call_and_to_no_other() -> None:
    """F5"""
    link, _ = opened()
    seq = link.submit(7, b"a", "a")
    link.flush(1.0)
    link.disconnected(1.5)
    link.cancel(seq)
    link.reconnected(1.7)
    link.flush(1.7)
    broker_says(link, 0, [])
    assert said(link, 1.8) == [[CANCEL, [1]]]
    assert link.state is LinkState.OPEN
