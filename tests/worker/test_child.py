"""A real worker process and a broker of a few lines: from hello to exit. Every wait is for an event, with a bound."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from forge_contract.errors import BatchError, PayloadTooLarge, RemoteError, SerializationError, TrustRequired, from_wire
from forge_contract.messages import (
    BEGIN,
    DROPPED,
    FAILED,
    MASTER,
    OK,
    RAISED,
    READY,
    REPLIES,
    STOP,
    UNREADY,
    UNTOUCHED,
)
from forge_contract.payload import decode_exception
from tests.worker.fake_broker import BOUND_S, Child, FakeBroker, goodbye, start

ECHO = ("echo", "plain", "where", "fail", "leave", "leave_in_thread")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path}/b.sock") as broker:
        yield broker


def failure(reply: tuple[int, Any]) -> Exception:
    status, error = reply
    assert status == FAILED
    return from_wire(error)


def test_a_worker_is_assigned_runs_calls_and_leaves_when_told(broker: FakeBroker) -> None:
    """A6: async endpoints on the loop, plain ones off it; F9: it ends with 0."""
    with Child(broker, "--gpu", "none", "--label", "zone=a", "--launch", "4") as process:
        start(broker, "Echo", *ECHO, args=("<",))
        (hello,) = broker.hellos
        assert (hello["role"], hello["pid"], hello["labels"], hello["launch"]) == (
            "worker",
            process.pid,
            {"zone": "a"},
            4,
        )
        broker.call(0, (1, ("a",)), (2, ("b",)))
        broker.call(1, (3, (5,)))
        assert broker.replies(3) == {1: (OK, "<a"), 2: (OK, "<b"), 3: (OK, (5, False))}
        broker.stop()
        assert goodbye(broker, process) == "stopped by the test"


def test_calls_that_end_in_the_same_turn_leave_in_one_envelope(broker: FakeBroker) -> None:
    """W1"""
    with Child(broker):
        start(broker, "Echo", *ECHO, concurrency=100)
        before = broker.envelopes
        broker.call(0, *((sequence, (sequence,)) for sequence in range(1, 65)))
        assert broker.replies(64) == {sequence: (OK, sequence) for sequence in range(1, 65)}
        assert broker.envelopes - before == 1


def test_an_exception_travels_and_the_worker_goes_on(broker: FakeBroker) -> None:
    """A5: with the remote traceback, which begins in the user's code; not even SystemExit ends the worker."""
    with Child(broker):
        start(broker, "Echo", *ECHO)
        broker.call(3, (1, ("wrong",)))
        broker.call(4, (2, ()))
        broker.call(5, (3, ()))
        replies = broker.replies(3)
        status, error = replies[1]
        assert status == RAISED
        assert type(error) is ValueError
        assert str(error) == "wrong"
        trace = str(error.__cause__)
        assert "sample_actors.py" in trace
        assert "forge_worker" not in trace
        for sequence, name in ((2, "SystemExit"), (3, "KeyboardInterrupt")):
            status, error = replies[sequence]
            assert (status, type(error)) == (RAISED, RemoteError)
            assert name in str(error)
        broker.call(0, (4, ("still here",)))
        assert broker.replies(1) == {4: (OK, "still here")}


def test_results_that_cannot_travel_fail_alone(broker: FakeBroker) -> None:
    """W5, W8"""
    with Child(broker):
        start(broker, "Echo", "locked", "large", "echo", max_payload_bytes=1000)
        broker.call(0, (1, ()))
        broker.call(1, (2, (2000,)))
        broker.call(2, (3, ("fine",)))
        replies = broker.replies(3)
        assert isinstance(failure(replies[1]), SerializationError)
        too_large = failure(replies[2])
        assert isinstance(too_large, PayloadTooLarge)
        assert "Echo.large" in str(too_large)
        assert replies[3] == (OK, "fine")


def test_a_method_that_takes_lists_is_called_with_a_batch_of_one(broker: FakeBroker) -> None:
    """B2"""
    in_lists = {"batch_mode": "call"}
    with Child(broker):
        start(broker, "Echo", ("doubled", in_lists), ("not_a_list", in_lists))
        broker.call(0, (1, (21,)))
        broker.call(1, (2, (21,)))
        replies = broker.replies(2)
        assert replies[1] == (OK, 42)
        assert isinstance(failure(replies[2]), BatchError)


def test_an_async_endpoint_behind_a_decorator_runs_on_the_loop(broker: FakeBroker) -> None:
    """A6: once each, also the call that showed it."""
    with Child(broker):
        start(broker, "Echo", "hidden", "read_log", concurrency=8)
        broker.call(0, *((sequence, (str(sequence),)) for sequence in (1, 2, 3)), session="s")
        assert broker.replies(3) == {sequence: (OK, (str(sequence), True, "s")) for sequence in (1, 2, 3)}
        broker.call(1, (4, ()))
        assert broker.replies(1) == {4: (OK, ["1", "2", "3"])}


def test_a_timeout_inside_an_endpoint_works(broker: FakeBroker) -> None:
    """A6: there is a current task, whatever runs it."""
    with Child(broker):
        start(broker, "Echo", "with_timeout")
        broker.call(0, (1, ()), (2, ()))
        assert broker.replies(2) == {1: (OK, "in time"), 2: (OK, "in time")}


def test_inside_an_endpoint_session_and_request_are_known(broker: FakeBroker) -> None:
    """A6"""
    with Child(broker):
        start(broker, "Echo", *ECHO)
        broker.call(2, (1, ()), (2, ()), session=["s-1", None])
        assert broker.replies(2) == {1: (OK, ("s-1", "000001-1")), 2: (OK, (None, "000001-2"))}


@pytest.mark.parametrize("order", [{"session": "s"}, {"client": True}])
def test_calls_of_one_key_start_in_order_across_kinds(broker: FakeBroker, order: dict[str, Any]) -> None:
    """A6: plain and async endpoints mixed, many threads."""
    endpoints = (("note_in_thread", {"threads": 4}), "note", "read_log")
    with Child(broker):
        start(broker, "Echo", *endpoints, concurrency=64)
        names = []
        for sequence in range(1, 49):
            names.append(str(sequence))
            broker.call(0 if sequence % 3 else 1, (sequence, (str(sequence),)), **order)
        broker.replies(48)
        broker.call(2, (99, ()), **order)
        assert broker.replies(1) == {99: (OK, names)}


def test_a_call_behind_one_of_its_session_waits_for_its_start_not_its_end(broker: FakeBroker) -> None:
    """A6: or the call that would end the first could never come."""
    with Child(broker):
        start(broker, "Echo", "block", "open_gate", "read_log")
        broker.call(0, (1, ("first",)), session="s")
        broker.call(1, (2, ()), session="s")
        assert broker.replies(2) == {1: (OK, "first"), 2: (OK, None)}


def test_a_slow_plain_endpoint_has_its_threads_and_starves_no_other(broker: FakeBroker) -> None:
    """A6, R1: one thread unless `threads=` says more."""
    with Child(broker):
        start(broker, "Echo", "block", "read_log", "open_gate")
        broker.call(0, (1, ("first",)), (2, ("second",)))
        broker.call(1, (3, (1,)))
        assert broker.replies(1) == {3: (OK, ["first"])}
        broker.call(2, (4, ()))
        assert broker.replies(3).keys() == {1, 2, 4}


def test_never_more_calls_run_than_the_replica_s_room(broker: FakeBroker) -> None:
    """A6"""
    with Child(broker):
        start(broker, "Echo", "slow", "read_log", concurrency=2)
        broker.call(0, (1, (60.0,)))
        broker.call(1, (2, (1,)))
        assert broker.replies(1) == {2: (OK, ["slow began"])}
        broker.call(0, (3, (60.0,)), (4, (60.0,)))
        broker.call(1, (5, ()))
        broker.drop(1, 4)
        replies = broker.replies(3)
        assert replies[1] == replies[4] == (DROPPED, None)
        assert replies[5][1][-1] == "slow ended"


def test_a_mesh_runs_one_call_at_a_time_in_order(broker: FakeBroker) -> None:
    """A7: collectives must not cross."""
    with Child(broker):
        start(broker, "Echo", "mesh_step", "read_log", serial=True, concurrency=8)
        broker.call(0, (1, ("a",)), (2, ("b",)))
        broker.call(1, (3, ()))
        replies = broker.replies(3)
        assert replies[3] == (OK, ["a began", "a ended", "b began", "b ended"])


def test_a_dropped_call_is_answered_when_it_has_ended(broker: FakeBroker) -> None:
    """F5: async is cancelled; a thread goes on, and its room returns only then."""
    with Child(broker):
        start(broker, "Echo", "slow", "block", "read_log", "open_gate")
        broker.call(0, (1, (60.0,)))
        broker.call(1, (2, ("stays",)))
        broker.call(2, (3, (2,)))
        broker.replies(1)
        broker.drop(1, 2)
        assert broker.replies(1) == {1: (DROPPED, None)}
        broker.call(2, (4, ()))
        _, log = broker.replies(1)[4]
        assert (sorted(log[:2]), log[2:]) == (["slow began", "stays"], ["slow ended"])
        broker.call(3, (5, ()))
        replies = broker.replies(2)
        assert replies[2] == (DROPPED, None)


def test_a_stop_finishes_what_runs_and_gives_back_what_has_not_started(broker: FakeBroker) -> None:
    """F9"""
    with Child(broker) as process:
        start(broker, "Echo", "slow", concurrency=1)
        broker.call(0, (1, (0.2,)), (2, (60.0,)))
        broker.stop(grace_s=10.0)
        replies = broker.replies(2)
        assert replies == {1: (OK, "slow"), 2: (UNTOUCHED, None)}
        goodbye(broker, process)


def test_a_call_that_outlasts_the_grace_does_not_keep_the_worker(broker: FakeBroker) -> None:
    """F9: neither one that sleeps nor one that sits in a thread."""
    with Child(broker) as process:
        start(broker, "Echo", "slow", "block")
        broker.call(0, (1, (60.0,)))
        broker.call(1, (2, ("stuck",)))
        broker.stop(grace_s=0.1)
        assert goodbye(broker, process, bound_s=10.0) == "stopped by the test"
        assert not [message for message, _ in broker.said if message[0] == REPLIES]  # neither had ended


def test_teardown_runs_and_its_failure_is_told(broker: FakeBroker, tmp_path: Path) -> None:
    with Child(broker) as process:
        start(broker, "TearsDown", args=(str(tmp_path / "proof"),))
        broker.stop()
        assert "teardown raised RuntimeError: teardown is broken" in goodbye(broker, process)
    assert (tmp_path / "proof").read_text("utf-8") == "torn down"


@pytest.mark.parametrize(
    ("actor", "kind", "text"),
    [
        ("BrokenInit", ValueError, "no weights here"),
        ("BrokenSetup", OSError, "no space"),
        ("Absent", ImportError, "has no Absent"),
        ({"ref": "no_such_module:Echo"}, ModuleNotFoundError, "paths searched"),
    ],
)
def test_a_start_that_fails_says_why_and_the_worker_leaves(
    broker: FakeBroker, actor: Any, kind: type[Exception], text: str
) -> None:
    """A2"""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.assign(actor)
        (_, error, _), (payload,) = broker.expect(UNREADY)
        raised = decode_exception(payload, trusted=True)
        assert text in error[1]["why"]  # what `forge status` shows, for the broker does not look into the payload
        assert isinstance(raised, kind)
        assert text in str(raised)
        goodbye(broker, process)


def test_code_by_value_runs_with_trust(broker: FakeBroker) -> None:
    """A9"""

    class Local:
        async def answer(self) -> int:
            return 42

    with Child(broker):
        start(broker, {"code": cloudpickle.dumps(Local)}, "answer")
        broker.call(0, (1, ()))
        assert broker.replies(1) == {1: (OK, 42)}


@pytest.mark.parametrize("target", [{"code": cloudpickle.dumps(int)}, {"ref": "subprocess:Popen"}])
def test_without_trust_only_an_importable_actor_is_loaded(tmp_path: Path, target: dict[str, Any]) -> None:
    """W6: neither code nor just any class that happens to be importable."""
    broker = FakeBroker(f"ipc://{tmp_path}/b.sock", trusted=False)
    with broker, Child(broker, stderr=subprocess.DEVNULL) as process:
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.assign(target, args=(["true"],), trusted=False)
        _, (payload,) = broker.expect(UNREADY)
        assert isinstance(decode_exception(payload, trusted=False), TrustRequired)
        goodbye(broker, process)


def test_the_client_s_path_is_obeyed_only_with_trust(tmp_path: Path) -> None:
    """W6"""
    broker = FakeBroker(f"ipc://{tmp_path}/b.sock", trusted=False)
    with broker, Child(broker, stderr=subprocess.DEVNULL, cwd=tmp_path) as process:
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.assign("Echo", trusted=False)
        _, (payload,) = broker.expect(UNREADY)
        assert isinstance(decode_exception(payload, trusted=False), ModuleNotFoundError)
        goodbye(broker, process)


def test_gpus_and_ranks_are_pinned_before_user_code_is_imported(broker: FakeBroker) -> None:
    """A7, L2: and the rendezvous of a single rank is chosen without asking anybody."""
    with Child(broker, "--gpu", "0,1,2,3"):
        start(broker, "Echo", "environment", gpus=["2", "3"])
        assert broker.hellos[0]["gpus"] == ["0", "1", "2", "3"]
        broker.call(0, (1, ()))
        _, seen = broker.replies(1)[1]
    wanted = {"CUDA_VISIBLE_DEVICES": "2,3", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert wanted.items() <= seen.items()
    assert seen["MASTER_ADDR"] == "127.0.0.1"
    assert int(seen["MASTER_PORT"]) > 0
    assert seen["FORGE_BROKER"] == broker.address


def test_ranks_meet_where_rank_0_said(broker: FakeBroker) -> None:
    """A7: `__init__` waits for BEGIN."""
    with Child(broker):
        broker.until(lambda: bool(broker.hellos), "hello")
        broker.assign("Echo", "environment", world=2, local_world=2)
        (_, addr, port), _ = broker.expect(MASTER)
        assert not [message for message, _ in broker.said if message[0] == READY]
        broker.send([BEGIN, addr, port])
        broker.expect(READY)
        broker.call(0, (1, ()))
        _, seen = broker.replies(1)[1]
        assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == (addr, str(port))
        assert seen["CUDA_VISIBLE_DEVICES"] == ""


def test_the_heart_beats_while_the_loop_stands_still(broker: FakeBroker) -> None:
    """F1: and says how long it has stood."""
    with Child(broker):
        start(broker, "Echo", "block_the_loop")
        broker.call(0, (1, (0.6,)))
        broker.until(lambda: any(beat["lag_s"] > 0.2 and beat["oldest_s"] > 0.2 for beat in broker.beats), "late beat")
        assert broker.beats[-1]["rss"] > 1 << 20
        assert broker.beats[-1]["cpu_s"] > broker.beats[0]["cpu_s"] > 0.0
        broker.replies(1)


def test_output_without_a_reader_raises_nothing(broker: FakeBroker) -> None:
    """The broker that read it may be gone."""
    with Child(broker, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        start(broker, "Echo", "shout")
        broker.call(0, (1, ()))
        broker.call(0, (2, ()))
        assert broker.replies(2) == {1: (OK, None), 2: (OK, None)}


def test_a_signal_is_a_stop_with_little_grace(broker: FakeBroker) -> None:
    """F9"""
    with Child(broker) as process:
        start(broker, "Echo", *ECHO)
        process.send_signal(signal.SIGTERM)
        assert goodbye(broker, process) == "terminated"


def test_a_second_signal_ends_it_now(broker: FakeBroker) -> None:
    """F9: even while user code holds the loop."""
    with Child(broker) as process:
        start(broker, "Echo", "block_the_loop")
        broker.call(0, (1, (30.0,)))
        broker.until(lambda: any(beat["oldest_s"] > 0.0 for beat in broker.beats), "running call")
        process.send_signal(signal.SIGTERM)
        broker.until(lambda: bool(broker.beats), "beat")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)  # the first alone waits for the call
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=BOUND_S) == 128 + signal.SIGTERM


def test_a_worker_whose_owner_is_gone_leaves(broker: FakeBroker) -> None:
    """F7"""
    with Child(broker, "--owned", stdin=subprocess.PIPE) as process:
        start(broker, "Echo", *ECHO)
        assert process.stdin is not None
        process.stdin.close()
        assert goodbye(broker, process) == "its supervisor is gone"


def test_an_orphan_exits_by_itself(tmp_path: Path) -> None:
    """F10: after orphan_grace_s, with its teardown."""
    broker = FakeBroker(f"ipc://{tmp_path}/b.sock", orphan_grace_s=0.3)
    with Child(broker, stderr=subprocess.PIPE) as process:
        start(broker, "TearsDown", args=(str(tmp_path / "proof"),))
        broker.close()
        _, stderr = process.communicate(timeout=BOUND_S)
        assert process.returncode == 69
    assert b"has been gone for" in stderr
    assert (tmp_path / "proof").exists()


def test_a_worker_says_hello_again_to_a_broker_that_came_back(tmp_path: Path) -> None:
    """W4, F10: with what it holds; one that does not recover says STOP."""
    address = f"ipc://{tmp_path}/b.sock"
    first = FakeBroker(address, orphan_grace_s=BOUND_S)
    with Child(first) as process:
        start(first, "Echo", "slow")
        first.call(0, (1, (60.0,)))
        first.until(lambda: any(beat["oldest_s"] > 0.0 for beat in first.beats), "running call")
        first.close()
        with FakeBroker(address, incarnation=78) as second:
            second.until(lambda: bool(second.hellos), "hello")
            assert second.hellos[0]["holds"]["running"] == [[(1 << 40) + 1, 1]]
            second.send([STOP, "unknown", 0.0, True])
            assert goodbye(second, process) == "unknown"


def test_no_broker_is_a_plain_line_and_exit_69(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/nobody.sock"
    program = (
        "from forge_worker import runtime; runtime.WELCOME_WITHIN_S = 0.3; import sys; "
        f"sys.exit(runtime.main(runtime.WorkerOptions({address!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=BOUND_S)
    assert done.returncode == 69
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert address in lines[0]


def test_help_and_import_are_light() -> None:
    """L2"""
    program = "import sys, forge_worker.__main__ as m; m.parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=BOUND_S)
    assert not {"torch", "numpy", "structlog", "click", "zmq"} & set(done.stdout.decode().split())
