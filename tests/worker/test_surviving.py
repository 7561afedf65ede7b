"""A real worker process whose sessions survive it: checkpoints, imports, and a broker that comes back (S3, F10)."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_contract.errors import SessionLost, from_wire
from forge_contract.messages import BEGIN, BYE, DROPPED, FAILED, FORGET, OK, RAISED, READY, REPLIES, STATES, UNTOUCHED
from tests.worker.fake_broker import BOUND_S, Child, FakeBroker, goodbye, start

ENDPOINTS = ("add", "add_slowly", "add_at_the_gate", "open_gate", "fail", "read_log", "at_most")
ADD, SLOWLY, GATE, OPEN, FAIL, LOG, MOST = range(len(ENDPOINTS))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path}/b.sock") as broker:
        yield broker


def ledger(broker: FakeBroker, actor: str = "Ledger", **fields: Any) -> None:
    target = {"ref": f"surviving_actors:{actor}"}
    start(broker, target, *ENDPOINTS, **{"checkpoint_every": 1, **fields})


def kinds(broker: FakeBroker) -> list[int]:
    return [message[0] for message, _ in broker.said]


def test_a_checkpoint_is_in_the_envelope_of_the_reply_it_includes(broker: FakeBroker) -> None:
    """S3: after a call that raised too, and none for calls without a session."""
    with Child(broker):
        ledger(broker)
        for sequence, method in ((1, ADD), (2, FAIL)):
            before = broker.envelopes
            broker.call(method, (sequence, (sequence,)), session="s")
            broker.until(lambda: STATES in kinds(broker), "checkpoint")
            assert kinds(broker) == [REPLIES, STATES]
            assert broker.envelopes == before + 1
            assert broker.state() == ("s", list(range(1, sequence + 1)))
            assert broker.replies(1)[sequence][0] == (OK if method == ADD else RAISED)
        broker.call(LOG, (3, ()))
        assert broker.replies(1)[3] == (OK, ["add s 1", "export s", "add s 2", "export s"])
        assert kinds(broker) == []


def test_hooks_may_be_plain_and_run_on_the_loop_s_thread(broker: FakeBroker) -> None:
    """S3"""
    with Child(broker):
        ledger(broker, "PlainLedger")
        broker.import_state("s", ([1], True))
        broker.call(ADD, (1, (2,)), session="s")
        assert broker.replies(1) == {1: (OK, [1, 2])}
        assert broker.state() == ("s", ([1, 2], True))


def test_fewer_checkpoints_are_taken_when_fewer_are_asked_for(broker: FakeBroker) -> None:
    """S3: session_checkpoint_every; what came since the last one is told when the worker leaves."""
    with Child(broker) as process:
        ledger(broker, checkpoint_every=3)
        for sequence in range(1, 5):
            broker.call(ADD, (sequence, (sequence,)), session="s")
            broker.replies(1)
        assert broker.state() == ("s", [1, 2, 3])
        assert kinds(broker) == []
        broker.stop()
        goodbye(broker, process)
        assert broker.state() == ("s", [1, 2, 3, 4])


def test_a_worker_that_leaves_tells_the_last_states_before_its_goodbye(broker: FakeBroker) -> None:
    """S3, F9: SIGTERM too. What waits behind the running call of its session is given back."""
    with Child(broker) as process:
        ledger(broker, checkpoint_every=100)
        broker.call(ADD, (1, (1,)), session="a")
        broker.replies(1)
        broker.call(GATE, (2, (2,)), (3, (3,)), session="b")
        broker.call(LOG, (4, ()))
        broker.replies(1)
        process.send_signal(signal.SIGTERM)
        assert broker.replies(1) == {3: (UNTOUCHED, None)}
        broker.drop(2)
        assert broker.replies(1) == {2: (DROPPED, None)}
        broker.until(lambda: BYE in kinds(broker), "goodbye")
        assert kinds(broker) == [STATES, BYE]
        (_, sessions, _), _ = broker.expect(STATES)
        assert "a" in sessions
        assert goodbye(broker, process) == "terminated"


def test_a_call_that_outlasts_the_stop_leaves_its_session_as_it_was(broker: FakeBroker) -> None:
    """S3, F9: it runs again elsewhere, so its half of the work must not come along; other sessions are told all the same."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        ledger(broker, checkpoint_every=100)
        broker.call(ADD, (1, (1,)), (2, (1,)), session=["torn", "whole"])
        broker.replies(2)
        broker.call(GATE, (3, (2,)), session="torn")
        broker.stop(grace_s=0.1)
        goodbye(broker, process)
        assert broker.state() == ("whole", [1])
        assert kinds(broker) == []


def test_calls_of_a_session_run_one_at_a_time_in_order_and_others_beside_them(broker: FakeBroker) -> None:
    """S3"""
    with Child(broker):
        ledger(broker, concurrency=8)
        for sequence in range(1, 13):
            broker.call(ADD if sequence % 3 == 0 else SLOWLY, (sequence, (sequence,)), session="s")
        replies = broker.replies(12)
        assert replies == {sequence: (OK, list(range(1, sequence + 1))) for sequence in range(1, 13)}
        broker.call(MOST, (20, ()))
        assert broker.replies(1) == {20: (OK, 1)}
        broker.call(SLOWLY, *((30 + n, (n,)) for n in range(4)), session=[f"s{n}" for n in range(4)])
        broker.replies(4)
        broker.call(MOST, (21, ()))
        assert broker.replies(1)[21][1] > 1


def test_a_dropped_call_does_not_keep_its_session(broker: FakeBroker) -> None:
    """F5, S3: neither one that waits behind nor one that runs."""
    with Child(broker):
        ledger(broker)
        broker.call(GATE, (1, (1,)), session="s")
        broker.call(ADD, (2, (2,)), (3, (3,)), session="s")
        broker.drop(2)
        assert broker.replies(1) == {2: (DROPPED, None)}
        broker.drop(1)
        replies = broker.replies(2)
        assert replies == {1: (DROPPED, None), 3: (OK, [3])}


def test_a_state_is_imported_before_the_session_s_next_call(broker: FakeBroker) -> None:
    """S3: and not before it is needed."""
    with Child(broker):
        ledger(broker)
        broker.import_state("s", [1, 2])
        broker.call(LOG, (1, ()))
        assert broker.replies(1) == {1: (OK, [])}
        broker.call(ADD, (2, (3,)), (3, (4,)), session="s")
        assert broker.replies(2) == {2: (OK, [1, 2, 3]), 3: (OK, [1, 2, 3, 4])}
        broker.call(LOG, (4, ()))
        assert broker.replies(1)[4][1] == ["import s", "add s 3", "export s", "add s 4", "export s"]


def test_a_state_that_cannot_be_imported_fails_its_session_and_no_other(broker: FakeBroker) -> None:
    """S3: until the session is forgotten."""
    with Child(broker, stderr=subprocess.DEVNULL):
        ledger(broker)
        broker.import_state("s", ["torn"])
        broker.call(ADD, (1, (1,)), (2, (1,)), (3, (1,)), session=["s", "s", "other"])
        replies = broker.replies(3)
        for sequence in (1, 2):
            status, error = replies[sequence]
            assert status == FAILED
            lost = from_wire(error)
            assert isinstance(lost, SessionLost)
            assert "session 's' of sample" in str(lost)
            assert "a torn state" in str(lost)
        assert replies[3] == (OK, [1])
        broker.send([FORGET, ["s"]])
        broker.call(ADD, (4, (1,)), session="s")
        assert broker.replies(1) == {4: (OK, [1])}


def test_an_export_that_raises_lets_the_reply_go_without_it(broker: FakeBroker) -> None:
    """S3: and the log says why."""
    with Child(broker, stderr=subprocess.PIPE) as process:
        ledger(broker)
        broker.call(ADD, (1, ("secret",)), session="s")
        assert broker.replies(1) == {1: (OK, ["secret"])}
        broker.call(ADD, (2, (bytes(2 << 20),)), session="large")
        assert broker.replies(1)[2][0] == FAILED  # the result is as large
        assert kinds(broker) == []
        process.kill()
        stderr = process.communicate(timeout=BOUND_S)[1].decode()
    assert "no checkpoint of session 's' of sample" in stderr
    assert "not to be told" in stderr
    assert "PayloadTooLarge: the state of session 'large' would take" in stderr


def test_every_rank_imports_and_only_rank_0_exports(broker: FakeBroker) -> None:
    """S3, A7: one call at a time, in the same order on all."""
    with Child(broker):
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.assign({"ref": "surviving_actors:Ledger"}, *ENDPOINTS, checkpoint_every=1, rank=1, world=2, serial=True)
        broker.send([BEGIN, "127.0.0.1", 1])
        broker.expect(READY)
        broker.import_state("s", [1])
        broker.call(SLOWLY, (1, (2,)), (2, (3,)), (3, (4,)), session=["s", "t", "s"])
        broker.call(LOG, (4, ()))
        replies = broker.replies(4)
        assert replies[4][1] == ["import s", "add s 2", "add t 3", "add s 4"]
        assert replies[3] == (OK, [1, 2, 4])
        assert kinds(broker) == []


def test_a_mesh_keeps_its_order_across_checkpoints(broker: FakeBroker) -> None:
    """S3, A7: rank 0 holds its room until the checkpoint is there, or its ranks would run other orders."""
    with Child(broker):
        ledger(broker, serial=True)
        broker.import_state("s", [1])
        broker.call(SLOWLY, (1, (2,)), (2, (3,)), (3, (4,)), session=["s", "s", "t"])
        broker.call(LOG, (4, ()))
        replies = broker.replies(4)
        assert replies[4][1] == ["import s", "add s 2", "export s", "add s 3", "export s", "add t 4", "export t"]


def test_a_broker_that_recovers_is_told_replies_and_states(tmp_path: Path) -> None:
    """F10: the kept replies first, a state of every session; of one that runs a call, with its reply."""
    address = f"ipc://{tmp_path}/b.sock"
    first = FakeBroker(address, orphan_grace_s=BOUND_S)
    with Child(first):
        ledger(first, checkpoint_every=100)
        first.call(ADD, (1, (1,)), session="idle")
        first.call(GATE, (2, (2,)), session="busy")
        first.import_state("arrived", [7])
        first.replies(1)
        first.close()
        with FakeBroker(address, incarnation=78, recovering=True) as second:
            second.until(lambda: STATES in kinds(second), "states")
            holds = second.hellos[0]["holds"]
            assert holds["ready"] is True
            assert [one for one, age_s in holds["sessions"] if age_s >= 0.0] == ["arrived", "busy", "idle"]
            assert holds["running"] == [[(1 << 40) + 2, 1]]
            assert second.held[0]
            assert second.replies(1) == {1: (OK, [1])}
            (_, sessions, _), payloads = second.expect(STATES)
            told = dict(zip(sessions, payloads, strict=True))
            while len(told) < 2:
                (_, sessions, _), payloads = second.expect(STATES)
                told |= dict(zip(sessions, payloads, strict=True))
            assert told.keys() == {"idle", "arrived"}
            second.call(OPEN, (3, ()))
            assert second.replies(2) == {2: (OK, [2]), 3: (OK, None)}
            assert second.state() == ("busy", [2])
            second.call(ADD, (4, (8,)), session="arrived")
            assert second.replies(1) == {4: (OK, [7, 8])}
