"""A worker that is no good any more says so and leaves; one that cannot even say so dies at once (F1, F6, F7, A11)."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_contract.errors import ReplicaLost, from_wire
from forge_contract.messages import ASSIGN, BYE, OK, RAISED, READY, REPLAY, REPLIES, UNREADY, sequence_of
from forge_contract.payload import decode_exception, encode_call
from forge_worker.fatal import breaks_process
from forge_worker.runtime import EXIT_DRAINED
from tests.worker.fake_broker import BOUND_S, Child, FakeBroker, assignment_fields, goodbye, start

FAIL, IN_THREAD, ECHO, FOREVER, CLOSE = range(5)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path}/b.sock") as broker:
        yield broker


def ready(broker: FakeBroker, actor: str, *endpoints: Any, **fields: Any) -> None:
    start(broker, {"ref": f"surviving_actors:{actor}"}, *endpoints, **fields)


def breakable(broker: FakeBroker, **fields: Any) -> None:
    ready(broker, "Breakable", "fail", "fail_in_thread", "echo", "forever", "close_descriptors", **fields)


def unready(broker: FakeBroker) -> BaseException:
    """Why the worker gives in."""
    (_, error, _), payloads = broker.expect(UNREADY)
    assert error is not None  # a line for people, whatever it is
    return decode_exception(payloads[0], trusted=True) if payloads else from_wire(error)


# health()


def test_health_that_raises_three_times_in_a_row_ends_the_worker(broker: FakeBroker) -> None:
    """F1: with what it raised; False twice and raising once are three failures."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        ready(broker, "Feverish", args=(True, False, False, "the device is gone"))
        error = unready(broker)
        assert isinstance(error, RuntimeError)
        assert str(error) == "the device is gone"
        assert goodbye(broker, process) == "health() failed"


def test_health_that_returns_false_three_times_in_a_row_ends_the_worker(broker: FakeBroker) -> None:
    """F1: there is no exception of the user's to show."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        ready(broker, "Feverish", args=(False,))
        error = unready(broker)
        assert isinstance(error, ReplicaLost)
        assert "Feverish/0.0" in str(error)
        assert "health() returned False 3 times in a row" in str(error)
        goodbye(broker, process)


def test_two_failures_of_health_are_a_hiccup_and_none_is_healthy(broker: FakeBroker) -> None:
    """F1"""
    with Child(broker, stderr=subprocess.DEVNULL):
        ready(broker, "Feverish", "asked_at_least", args=(False, "ill", None, "ill", False, True, "ill", "ill", None))
        broker.call(0, (1, (12,)))
        status, asked = broker.replies(1)[1]
        assert status == OK
        assert asked >= 12


# Errors that break the process.


@pytest.mark.parametrize(
    ("method", "arguments", "fatal"),
    [
        (FAIL, ("ValueError", "the handle is gone"), ["ValueError"]),
        (FAIL, ("ZeroDivisionError", "by base class"), ["builtins.ArithmeticError"]),
        (FAIL, ("RuntimeError", "CUDA error: an illegal memory access was encountered"), []),
        (IN_THREAD, ("CUDA error: device-side assert triggered",), []),
    ],
)
def test_an_error_that_breaks_the_process_is_raised_and_the_worker_leaves(
    broker: FakeBroker, method: int, arguments: tuple[Any, ...], fatal: list[str]
) -> None:
    """F6: the caller's reply first; what else runs is left to the broker to run elsewhere."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        breakable(broker, fatal_errors=fatal)
        broker.call(FOREVER, (1, ()))
        broker.call(method, (2, arguments))
        broker.until(lambda: any(message[0] == BYE for message, _ in broker.said), "goodbye")
        assert [message[0] for message, _ in broker.said] == [REPLIES, UNREADY, BYE]
        status, error = broker.replies(1)[2]
        assert (status, str(error)) == (RAISED, arguments[-1])
        assert str(unready(broker)) == arguments[-1]
        goodbye(broker, process)


def test_other_errors_leave_the_worker_as_it_is(broker: FakeBroker) -> None:
    """A5, F6: running out of GPU memory is not fatal."""
    with Child(broker):
        breakable(broker, fatal_errors=["KeyError"])
        broker.call(FAIL, (1, ("ValueError", "CUDA error: in words only")))
        broker.call(FAIL, (2, ("RuntimeError", "CUDA out of memory. Tried to allocate 2.00 GiB")))
        broker.call(FAIL, (3, ("RuntimeError", "CUDA error: out of memory")))
        assert {status for status, _ in broker.replies(3).values()} == {RAISED}
        broker.call(ECHO, (4, ("still here",)))
        assert broker.replies(1) == {4: (OK, "still here")}


class OutOfMemoryError(RuntimeError):
    """As torch.cuda has one."""


class Mute(RuntimeError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_which_errors_break_a_process() -> None:
    """F6: by name, plain or full, of the type or a base; CUDA's also through what wraps it."""

    def wrapped(inner: BaseException) -> BaseException:
        outer = KeyError("outer")
        outer.__cause__ = inner
        return outer

    assert breaks_process(ZeroDivisionError(), ["ArithmeticError"])
    assert breaks_process(OutOfMemoryError(), [f"{__name__}.OutOfMemoryError"])
    assert not breaks_process(OutOfMemoryError(), ["elsewhere.OutOfMemoryError"])
    assert not breaks_process(wrapped(ValueError()), ["ValueError"])
    assert breaks_process(wrapped(RuntimeError("CUDA error: unspecified launch failure")), [])
    assert breaks_process(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), [])
    assert not breaks_process(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), [])
    assert not breaks_process(OutOfMemoryError("CUDA error: whatever"), [])
    assert not breaks_process(Mute(), [])
    circle = RuntimeError("round and round")
    circle.__context__ = wrapped(circle)
    assert not breaks_process(circle, [])


# What ends without a word.


@pytest.mark.parametrize("kind", ["socket", "eventfd", "anon_inode", ""])
def test_a_call_that_closes_our_descriptors_ends_the_worker_at_once(broker: FakeBroker, kind: str) -> None:
    """F1: a process that lives and cannot be reached would be taken for a busy one."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        breakable(broker)
        broker.call(CLOSE, (1, (kind,)))
        assert process.wait(timeout=BOUND_S) != 0


def test_a_call_that_asks_for_too_much_memory_raises_and_the_worker_goes_on(broker: FakeBroker) -> None:
    """A5"""
    with Child(broker):
        ready(broker, "Greedy", "ask_for_too_much", "echo")
        broker.call(0, (1, ()))
        status, error = broker.replies(1)[1]
        assert (status, type(error)) == (RAISED, MemoryError)
        broker.call(1, (2, ("fine",)))
        assert broker.replies(1) == {2: (OK, "fine")}


def test_a_worker_without_any_memory_left_answers_or_dies(broker: FakeBroker) -> None:
    """F1: it does not stay and say nothing."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        ready(broker, "Greedy", "take_all", "echo")
        broker.call(0, (1, ()))
        broker.call(1, (2, (bytes(1 << 16),)))

        def answered() -> set[int]:
            return {sequence_of(one) for message, _ in broker.said if message[0] == REPLIES for one in message[2]}

        broker.until(lambda: process.poll() is not None or len(answered()) == 2, "replies or end")
        assert answered() == {1, 2} or process.returncode != 0


# Being stopped, and by whom.


def test_a_stop_for_good_has_its_own_exit_code(broker: FakeBroker) -> None:
    """F7, F9: also when it comes while the worker is leaving."""
    with Child(broker) as process:
        breakable(broker)
        broker.stop(replace=False)
        assert goodbye(broker, process, code=EXIT_DRAINED) == "stopped by the test"
    with Child(broker) as process:
        broker.until(lambda: len(broker.hellos) == 2, "second hello")
        breakable(broker)
        broker.call(FOREVER, (1, ()))
        broker.stop(0.3)
        broker.stop(0.3, replace=False)
        assert goodbye(broker, process, code=EXIT_DRAINED) == "stopped by the test"


def test_a_signal_lets_running_calls_finish_and_takes_nothing_new(broker: FakeBroker) -> None:
    """F9"""
    with Child(broker) as process:
        start(broker, "Echo", "slow", "echo")
        broker.call(0, (1, (0.3,)))
        broker.until(lambda: any(beat["oldest_s"] > 0.0 for beat in broker.beats), "running call")
        process.send_signal(signal.SIGTERM)
        assert broker.replies(1) == {1: (OK, "slow")}
        assert goodbye(broker, process) == "terminated"


# Replays.


def test_replays_run_after_setup_in_order_and_before_ready(broker: FakeBroker) -> None:
    """A11: and later ones are counted in another READY."""
    with Child(broker) as process:
        broker.until(lambda: bool(broker.hellos), "hello")
        fields = assignment_fields({"ref": "surviving_actors:Weights"}, ("load", "load_in_thread", "read"))
        payloads = [encode_call(args, {}, trusted=True, where="test") for args in ((), ("one",), ("two",))]
        sizes = [len(payload) for payload in payloads]
        broker.send(
            [ASSIGN, fields, sizes[0]],
            [REPLAY, 0, True, sizes[1]],
            [REPLAY, 1, True, sizes[2]],
            payloads=tuple(payloads),
        )
        assert broker.expect(READY)[0] == [READY, 2]
        broker.replay(1, "three")
        broker.replay(0, "four")
        while broker.expect(READY)[0] != [READY, 4]:
            pass
        broker.call(2, (1, ()))
        assert broker.replies(1) == {1: (OK, ["initial", "one", "two", "three", "four"])}
        broker.stop()
        goodbye(broker, process)


@pytest.mark.parametrize("later", [False, True])
def test_a_replay_that_raises_is_a_start_that_failed(broker: FakeBroker, later: bool) -> None:
    """A11: a replica with yesterday's weights would be worse than none."""
    with Child(broker, stderr=subprocess.DEVNULL) as process:
        if later:
            ready(broker, "Weights", "load")
            broker.replay(0, "torn")
        else:
            broker.until(lambda: bool(broker.hellos), "hello")
            broker.assign({"ref": "surviving_actors:Weights"}, "load")
            broker.replay(0, "torn")
        error = unready(broker)
        assert isinstance(error, ValueError)
        assert str(error) == "torn weights"
        goodbye(broker, process)
