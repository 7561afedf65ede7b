"""Transcripts of a WorkerLink under virtual time: envelopes in, instructions out, replies gathered by turn."""

from __future__ import annotations

from typing import Any

import pytest

from forge_contract.framing import Envelope, Outbox, decode, encode
from forge_contract.messages import (
    ASSIGN,
    BEGIN,
    BROKER_NAME,
    BYE,
    DISPATCH,
    DROP,
    FORGET,
    HEARTBEAT,
    HELLO,
    IMPORT,
    MASTER,
    PROBE,
    READY,
    REPLAY,
    REPLIES,
    RESIZED,
    SETTLED,
    STATES,
    STOP,
    UNREADY,
    WELCOME,
    WHO,
)
from forge_contract.peer_link import LinkState
from forge_worker.link import (
    Assign,
    Begin,
    Drop,
    Forget,
    Import,
    Refused,
    Replay,
    Run,
    Stop,
    Welcomed,
    WorkerLink,
)
from forge_worker.served import LAID_BY, Served
from tests.worker.fake_broker import assignment_fields

INCARNATION = 5


class Talk:
    """A link and what a broker would have to know to speak with it."""

    def __init__(self) -> None:
        self.link = WorkerLink(
            "w-0123", 0.0, identity={"host": "h", "pid": 7}, gpus=("0",), labels={"zone": "a"}, launch=3
        )
        self.number = 0
        self.epoch = 1

    def unnumbered(self, *body: list[Any], now: float = 0.0) -> None:
        self.link.receive(encode(BROKER_NAME, self.epoch, INCARNATION, 0, 0, list(body)), now)

    def say(self, *body: list[Any], payloads: tuple[bytes, ...] = (), now: float = 0.0) -> None:
        self.number += 1
        outbox = Outbox()
        outbox.body.extend(body)
        for payload in payloads:
            outbox.attach(payload)
        self.link.receive(outbox.seal(BROKER_NAME, self.epoch, INCARNATION, self.number, 0), now)

    def sent(self, now: float = 0.0) -> list[Envelope]:
        return [decode(frames) for frames in self.link.flush(now)]

    def lost_and_welcomed(self, *, recovering: bool, now: float = 0.0) -> Envelope:
        """Another broker asks who we are, hears our hello, and welcomes us; returns the hello."""
        self.unnumbered([WHO], now=now)
        (hello,) = self.sent(now)
        self.epoch, self.number = self.epoch + 1, 0
        self.unnumbered([WELCOME, {"trusted": True, "recovering": recovering}], now=now)
        return hello

    def assigned(self, **fields: Any) -> Talk:
        self.sent()
        self.unnumbered([WELCOME, {"trusted": True}])
        self.say([ASSIGN, {**assignment_fields({"ref": "m:C"}, ("f", "g")), **fields}, 2], payloads=(b"aa",))
        self.link.take()
        return self


def test_a_hello_says_who_and_what_it_may_use() -> None:
    """W3"""
    talk = Talk()
    (hello,) = talk.sent()
    assert hello.number == 0
    assert hello.body == [
        [
            HELLO,
            {
                "role": "worker",
                "host": "h",
                "pid": 7,
                "gpus": ["0"],
                "labels": {"zone": "a"},
                "launch": 3,
                "holds": None,
            },
            [],
        ]
    ]


def test_an_assignment_becomes_one_instruction_and_the_life_is_answered_in_order() -> None:
    """W7: the start of two ranks in PROTOCOL.md §6."""
    talk = Talk()
    talk.sent()
    talk.unnumbered([WELCOME, {"trusted": True}])
    fields = assignment_fields({"ref": "m:C"}, ("f",)) | {"world": 2, "local_world": 2}
    talk.say([ASSIGN, fields, 2], payloads=(b"aa",))
    welcomed, assign = talk.link.take()
    assert isinstance(welcomed, Welcomed)
    assert isinstance(assign, Assign)
    assert assign.arguments == b"aa"
    assert assign.assignment.world == 2
    talk.link.master("10.0.0.5", 40111)
    talk.say([BEGIN, "10.0.0.5", 40111])
    assert talk.link.take() == [Begin("10.0.0.5", 40111)]
    talk.link.ready()
    (envelope,) = talk.sent()
    assert envelope.number == 1
    assert envelope.ack == 2
    assert envelope.body == [[MASTER, "10.0.0.5", 40111], [READY, 0]]


def test_replies_of_one_turn_are_one_message_of_short_columns() -> None:
    """W1"""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2, 3], 1, [1, 1, 1], {"session": ["s", None, None]}], payloads=(b"abc",))
    (run,) = talk.link.take()
    assert run == Run(0, True, [1, 2, 3], [1, 1, 1], [b"a", b"b", b"c"], ["s", None, None], [False] * 3)
    assert talk.link.running == {1: 1, 2: 1, 3: 1}
    for request, payload in ((2, b"B"), (1, b"A"), (3, b"C")):
        talk.link.reply(request, 1, 0, payload)
    (envelope,) = talk.sent()
    assert envelope.body == [[REPLIES, 1, [2, 1, 3], 1, 0, [1, 1, 1]]]
    assert envelope.payloads.take_all([1, 1, 1]) == [b"B", b"A", b"C"]
    assert talk.link.running == {}


def test_statuses_that_differ_are_a_column() -> None:
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2], [1, 2], [1, 1], {}], payloads=(b"ab",))
    talk.link.reply(1, 1, 0, b"")
    talk.link.reply(2, 2, 3, b"")
    (envelope,) = talk.sent()
    assert envelope.body == [[REPLIES, 1, [1, 2], [1, 2], [0, 3], [0, 0]]]


@pytest.mark.parametrize("batches", [[], [2], [2, 2], [0, 3], [-1, 4], [1.5, 1.5], ["3"], 3, [True, 2], [[3]]])
def test_batches_that_do_not_add_up_are_not_run(batches: Any) -> None:
    """B2"""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2, 3], 1, [0, 0, 0], {"batches": batches}])
    assert talk.link.take() == []
    assert talk.link.refused_messages == 1
    assert talk.link.running == {}
    talk.say([DISPATCH, 1, 0, True, [1, 2, 3], 1, [0, 0, 0], {"batches": [1, 2]}])
    (run,) = talk.link.take()
    assert isinstance(run, Run)
    assert run.batches == [1, 2]


def test_a_reply_to_what_does_not_run_is_a_fault_of_ours() -> None:
    talk = Talk().assigned()
    with pytest.raises(KeyError, match="some do not run here"):
        talk.link.reply_all([8, 9], [1, 1], [0, 0], [b"", b""])
    with pytest.raises(KeyError, match="attempt 1 of request 9"):
        talk.link.reply(9, 1, 0, b"")


def test_a_dispatch_for_another_epoch_of_the_replica_is_not_run() -> None:
    """W3: fencing works in this direction too."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 2, 0, True, [1], 1, [1], {}], payloads=(b"a",))
    assert talk.link.take() == []
    assert talk.link.refused_messages == 1


def test_a_drop_names_only_what_still_runs() -> None:
    """F5"""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2], 1, [0, 0], {}])
    talk.link.reply(1, 1, 0, b"")
    talk.link.take()
    talk.say([DROP, [1, 2, 3]])
    assert talk.link.take() == [Drop([2])]


def test_a_dispatch_that_comes_twice_runs_once() -> None:
    """W4"""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {}])
    talk.number -= 1
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {}])
    assert [type(one) for one in talk.link.take()] == [Run]


def test_a_reply_not_yet_sent_outlives_a_new_epoch() -> None:
    """W4: what the turn had gathered is not lost with the old channel."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {}])
    talk.link.reply(1, 1, 0, b"value")
    talk.unnumbered([WHO])
    talk.sent()
    talk.epoch, talk.number = 2, 0
    talk.unnumbered([WELCOME, {}])
    (envelope,) = talk.sent()
    assert envelope.number == 1
    assert envelope.body == [[REPLIES, 1, [1], 1, 0, [5]]]


def test_what_a_new_connection_lost_is_sent_again() -> None:
    """W4: reconnected, a probe, an ack that is too low, everything after it once more."""
    talk = Talk().assigned()
    talk.link.ready()
    (first,) = talk.sent(1.0)
    talk.link.reconnected(1.1)
    assert [envelope.body for envelope in talk.sent(1.1)] == [[[PROBE]]]
    talk.unnumbered(now=1.2)
    (again,) = talk.sent(1.2)
    assert (again.number, again.body) == (first.number, first.body)


def test_a_malformed_message_is_counted_and_nothing_else_happens() -> None:
    """W8"""
    talk = Talk().assigned()
    malformed: list[list[Any]] = [
        [DISPATCH, 1],
        [DISPATCH, 1, 44, True, [1], 1, [0], {}],
        [DISPATCH, 1, 0, True, [1], 1, [0], []],
        [DROP],
        [DROP, 5],
        [BEGIN, "h", float("inf")],
        [STOP, "x", "soon", True],
        [STOP, "x", 1.0],
        [SETTLED],
        [REPLAY, 44, True, 0],
        [IMPORT, "s", True],
        [FORGET, 5],
        [99],
    ]
    for body in malformed:
        talk.say(body)
    talk.say([BEGIN, "h", 1], payloads=(b"nobody names these",))
    assert talk.link.refused_messages == len(malformed) + 1
    assert talk.link.running == {}
    talk.say([STOP, "the link still works", 1.0, False])
    assert talk.link.take()[-1] == Stop("the link still works", 1.0, replace=False)


def test_an_assignment_that_cannot_be_read_is_answered_and_the_worker_leaves() -> None:
    talk = Talk()
    talk.sent()
    talk.unnumbered([WELCOME, {}])
    talk.link.take()
    talk.say([ASSIGN, {"service": "one"}, 0])
    (stop,) = talk.link.take()
    assert isinstance(stop, Stop)
    (envelope,) = talk.sent()
    kind, error, size = envelope.body[0]
    assert (kind, error[0], size) == (UNREADY, "ProtocolError", 0)
    assert "service" in error[1]["message"]


def test_a_failed_start_carries_the_user_s_exception() -> None:
    talk = Talk().assigned()
    talk.link.unready(None, b"exception")
    talk.link.bye("could not be started")
    (envelope,) = talk.sent()
    assert envelope.body == [[UNREADY, None, 9], [BYE, "could not be started"]]


def test_replies_leave_before_the_goodbye() -> None:
    """F9"""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {}])
    talk.link.reply(1, 1, 4, b"")
    talk.link.bye("stopped")
    (envelope,) = talk.sent()
    assert [message[0] for message in envelope.body] == [REPLIES, BYE]


def test_a_broker_that_does_not_know_us_is_told_what_we_hold() -> None:
    """F10: the deed as it is by now, where we are in our life, what runs, whose sessions are here; and the constructor's arguments."""
    talk = Talk().assigned()
    talk.link.ready()
    talk.say([DISPATCH, 1, 0, True, [1, 2], 1, [0, 0], {"session": ["s", None]}])
    talk.say([IMPORT, "t", True, 0])
    talk.say([RESIZED, 3, 2])
    talk.link.reply(1, 1, 0, b"")
    talk.sent()
    hello = talk.lost_and_welcomed(recovering=False)
    assert (hello.number, hello.epoch) == (0, 2)
    _, fields, sizes = hello.body[0]
    assert fields["holds"] == {
        "deed": {"service": 1, "name": "sample", "wanted": 3, "resizes": 2},
        "replica": 0,
        "epoch": 1,
        "rank": 0,
        "ready": True,
        "running": [[2, 1]],
        "batches": [],
        "replies": True,
        "sessions": [["s", 0.0], ["t", 0.0]],
    }
    assert hello.payloads.take_all(sizes) == [b"aa"]
    talk.say([STOP, "unknown replica", 0.5, True])
    assert talk.link.take()[-1] == Stop("unknown replica", 0.5, replace=True)


def test_kept_replies_are_sent_again_in_the_recovery_window_before_anything_new() -> None:
    """F10: also those the dead broker had acknowledged; as one message, since they are one epoch's."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2, 3, 4], [1, 1, 2, 1], [0, 0, 0, 0], {}])
    talk.link.reply(1, 1, 0, b"one")
    talk.link.reply(2, 1, 1, [b"document", b"buffer"])
    talk.sent()
    talk.link.reply(3, 2, 0, b"three")
    talk.sent()
    talk.unnumbered()  # an ack of nothing new; what follows is one of all
    talk.link.receive(encode(BROKER_NAME, 1, INCARNATION, 0, 2, []), 0.0)
    talk.link.reply(4, 1, 0, b"four")
    talk.link.states("s", b"state")
    talk.lost_and_welcomed(recovering=True)
    assert talk.link.running == {}
    again, new = talk.sent()
    assert (again.number, new.number) == (1, 2)
    assert again.body == [[REPLIES, 1, [1, 2, 3], [1, 1, 2], [0, 1, 0], [3, -2, 5]]]
    assert again.payloads.take_all([3, -2, 5]) == [b"one", [b"document", b"buffer"], b"three"]
    assert new.body == [[REPLIES, 1, [4], 1, 0, [4]], [STATES, ["s"], [5]]]
    assert new.payloads.take_all([4, 5]) == [b"four", b"state"]
    (welcomed,) = [one for one in talk.link.take() if isinstance(one, Welcomed)]
    assert welcomed.recovering


def test_settled_replies_are_kept_no_longer() -> None:
    """F10: up to the envelope named, and those sent again under the number that they have now."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2, 3], 1, [0, 0, 0], {}])
    for request in (1, 2, 3):
        talk.link.reply(request, 1, 0, b"x")
        talk.sent()
    talk.say([SETTLED, 2])
    talk.lost_and_welcomed(recovering=True)
    (again,) = talk.sent()
    assert again.body == [[REPLIES, 1, [3], 1, 0, [1]]]
    assert talk.link.kept.bytes > 0
    talk.say([SETTLED, 1])
    assert talk.link.kept.bytes == 0
    talk.lost_and_welcomed(recovering=True)
    assert talk.sent() == []


def test_kept_replies_are_bounded_and_the_oldest_go_first() -> None:
    """F10, W8"""
    talk = Talk().assigned(kept_reply_bytes=1000)
    talk.say([DISPATCH, 1, 0, True, [1, 2, 3], 1, [0, 0, 0], {}])
    for request in (1, 2, 3):
        talk.link.reply(request, 1, 0, bytes(400))
        talk.sent()
        assert talk.link.kept.bytes <= 1000
    talk.lost_and_welcomed(recovering=True)
    (again,) = talk.sent()
    assert again.body[0][2] == [2, 3]


def test_a_broker_that_does_not_recover_hears_none_of_it() -> None:
    """F10: it says STOP by itself."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {}])
    talk.link.reply(1, 1, 0, b"x")
    talk.sent()
    talk.lost_and_welcomed(recovering=False)
    assert talk.sent() == []
    assert talk.link.kept.bytes == 0


def test_checkpoints_leave_behind_the_replies_they_include() -> None:
    """S3: in one envelope, and of two states of a session the later."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2], 1, [0, 0], {"session": "s"}])
    talk.link.states("s", b"after one")
    talk.link.reply(1, 1, 0, b"x")
    talk.link.reply(2, 1, 0, b"y")
    talk.link.states("s", b"after two")
    (envelope,) = talk.sent()
    assert envelope.body == [[REPLIES, 1, [1, 2], 1, 0, [1, 1]], [STATES, ["s"], [9]]]
    assert envelope.payloads.take_all([1, 1, 9]) == [b"x", b"y", b"after two"]


def test_what_breaks_a_worker_leaves_behind_its_replies() -> None:
    """F6: whoever raised it has it, before the replica is lost with all it runs."""
    talk = Talk().assigned()
    talk.link.ready()
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {}])
    talk.link.unready(None, b"exception")
    talk.link.reply(1, 1, 1, b"exc")
    (envelope,) = talk.sent()
    assert envelope.body == [[READY, 0], [REPLIES, 1, [1], 1, 1, [3]], [UNREADY, None, 9]]
    assert envelope.payloads.take_all([3, 9]) == [b"exc", b"exception"]


def test_replays_states_and_ends_of_sessions_are_instructions() -> None:
    """A11, S3"""
    talk = Talk().assigned()
    talk.say([REPLAY, 1, True, 2], [IMPORT, "s", False, 3], [FORGET, ["t"]], payloads=(b"rr", b"sss"))
    assert talk.link.take() == [Replay(1, True, b"rr"), Import("s", False, b"sss"), Forget(["t"])]
    talk.link.ready(1)
    (envelope,) = talk.sent()
    assert envelope.body == [[READY, 1]]


def test_sessions_are_remembered_until_they_are_forgotten() -> None:
    """F10: with hooks or without."""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1], 1, [0], {"session": "a"}])
    talk.say([DISPATCH, 1, 0, True, [2, 3], 1, [0, 0], {"session": ["b", None]}])
    talk.say([FORGET, ["a", "never seen"]])
    assert [sid for sid, _ in talk.link.served.ages(0.0)] == ["b"]


@pytest.mark.parametrize("calls", [1, LAID_BY])
def test_sessions_are_told_with_the_time_since_their_last_use(calls: int) -> None:
    """F10: the later of two workers that hold one is right."""
    served = Served()
    served.used(["a", "b", None], 1.0)
    served.used(["b"] * calls, 3.0)
    assert served.ages(5.0) == [["a", 4.0], ["b", 2.0]]
    served.forget(["a"])
    served.used(["c"], 5.0)
    assert served.ages(5.0) == [["b", 2.0], ["c", 0.0]]


@pytest.mark.parametrize("session", [5, ["a", ["b"]], {"a": 1}])
def test_a_dispatch_whose_sessions_are_none_is_refused(session: Any) -> None:
    """W8"""
    talk = Talk().assigned()
    talk.say([DISPATCH, 1, 0, True, [1, 2], 1, [0, 0], {"session": session}])
    assert talk.link.refused_messages == 1
    assert talk.link.take() == []
    assert talk.link.served.ages(0.0) == []


def test_a_refusal_is_an_instruction_and_the_link_is_closed() -> None:
    talk = Talk()
    talk.sent()
    talk.unnumbered([4, "VersionMismatch", {"ours": 2, "theirs": 1}])
    (refused,) = talk.link.take()
    assert isinstance(refused, Refused)
    assert "protocol 2" in str(refused.error)
    assert talk.link.state is LinkState.CLOSED


def test_no_heartbeat_before_the_welcome_and_an_unnumbered_one_after() -> None:
    """F1"""
    talk = Talk()
    assert talk.link.heartbeat({"rss": 1}) is None
    talk.assigned()
    beat = decode(talk.link.heartbeat({"rss": 1}) or [])
    assert (beat.number, beat.incarnation, beat.body) == (0, INCARNATION, [[HEARTBEAT, {"rss": 1}]])
