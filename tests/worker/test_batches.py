"""One run of a method for many calls (B2): what goes in, what comes out, and what is wrong with one of them alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from forge_client.context import current_request, current_session
from forge_contract.errors import BatchError, from_wire
from forge_contract.messages import DROPPED, FAILED, OK, RAISED, UNTOUCHED
from tests.worker.in_process import InProcess

CALL = {"batch_mode": "call"}
STACK = {**CALL, "collate": "stack"}


class Sample:
    """Notes every run of a method with what it got."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.gate = asyncio.Event()
        self.thread_gate = threading.Event()
        self.most = self.running = 0
        self.result: Any = None

    async def double(self, values: list[Any]) -> list[Any]:
        self.runs.append(values)
        return [2 * value for value in values]

    def double_in_thread(self, values: list[Any]) -> tuple[Any, ...]:
        assert threading.current_thread() is not threading.main_thread()
        self.runs.append(values)
        return tuple(2 * value for value in values)

    async def add(self, left: list[Any], *, right: list[Any]) -> list[Any]:
        self.runs.append((left, right))
        return [a + b for a, b in zip(left, right, strict=True)]

    async def give(self, values: list[Any]) -> Any:
        self.runs.append(values)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def generate(self, values: list[Any]) -> Any:
        yield from values

    async def wait(self, values: list[Any]) -> list[Any]:
        self.runs.append(values)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        return values

    def wait_in_thread(self, values: list[Any]) -> list[Any]:
        self.runs.append(values)
        self.thread_gate.wait(10.0)
        return values

    async def where(self, values: list[Any]) -> list[Any]:
        await asyncio.sleep(0)
        return [(current_request(), current_session())] * len(values)

    async def one(self, value: int) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        return 2 * value

    async def total(self, array: Any, scale: list[Any]) -> Any:
        self.runs.append((array, scale))
        return array.sum(1)


class Unreadable:
    """Says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return explode, ()


def explode() -> None:
    raise ValueError("an argument's own code")


def numbered(*values: Any) -> list[tuple[int, tuple[Any, ...]]]:
    return [(sequence, (value,)) for sequence, value in enumerate(values, 1)]


def idle(worker: InProcess) -> bool:
    return " 0 of 10 running, 0 held" in repr(worker.host) and not worker.link.running


def why(reply: tuple[int, Any]) -> str:
    status, value = reply
    assert status == FAILED
    error = from_wire(value)
    assert isinstance(error, BatchError)
    return str(error)


@pytest.mark.parametrize("method", ["double", "double_in_thread"])
async def test_a_batch_is_one_run_of_the_method_with_a_list_per_argument(method: str) -> None:
    """B2: two batches in one message, one of one item."""
    sample = Sample()
    worker = InProcess(sample, (method, CALL))
    worker.dispatch(0, *numbered(1, 2, 3, 4), batches=[3, 1])
    await worker.turn()
    assert await worker.replies(4) == {1: (OK, 2), 2: (OK, 4), 3: (OK, 6), 4: (OK, 8)}
    assert sample.runs == [[1, 2, 3], [4]]
    assert idle(worker)


async def test_without_batches_each_item_is_a_batch_of_one() -> None:
    """B2: as an actor's are."""
    sample = Sample()
    worker = InProcess(sample, ("double", CALL))
    worker.dispatch(0, *numbered(1, 2))
    await worker.turn()
    assert await worker.replies(2) == {1: (OK, 2), 2: (OK, 4)}
    assert sample.runs == [[1], [2]]


async def test_calls_of_sessions_in_a_batch_run_with_it_and_in_none_of_them() -> None:
    """batch_sessions: which calls share a batch is the broker's to say."""
    sample = Sample()
    worker = InProcess(sample, ("double", CALL))
    worker.dispatch(0, *numbered(1, 2, 3), batches=[3], session=["s", "s", None])
    await worker.turn()
    assert await worker.replies(3) == {1: (OK, 2), 2: (OK, 4), 3: (OK, 6)}
    assert sample.runs == [[1, 2, 3]]


async def test_keywords_are_lists_by_name() -> None:
    """Known mistake 9: none dropped, none cut short."""
    sample = Sample()
    worker = InProcess(sample, ("add", CALL))
    worker.dispatch(0, *numbered(1, 2, 3), batches=[3], kwargs={at: {"right": 10 * at} for at in (1, 2, 3)})
    await worker.turn()
    assert await worker.replies(3) == {1: (OK, 11), 2: (OK, 22), 3: (OK, 33)}
    assert sample.runs == [([1, 2, 3], [10, 20, 30])]


async def test_an_item_of_another_call_shape_is_refused_alone() -> None:
    """B2: the broker believes what clients say of their calls' shapes; we look."""
    sample = Sample()
    worker = InProcess(sample, ("add", CALL))
    keywords = {at: {"right": 1} for at in (1, 3, 4)}
    worker.dispatch(0, *numbered(1, 2, 3, 4), batches=[4], kwargs=keywords)
    await worker.turn()
    replies = await worker.replies(4)
    assert "other arguments than the rest of its batch" in why(replies.pop(2))
    assert replies == {1: (OK, 2), 3: (OK, 4), 4: (OK, 5)}
    assert sample.runs == [([1, 3, 4], [1, 1, 1])]


@pytest.mark.parametrize(
    ("result", "got"),
    [
        ([1, 2], "for 3 calls it returned 2 results, not a list of 3"),
        ((1, 2, 3, 4), "4 results"),
        ({1: 1, 2: 2, 3: 3}, "a dict"),
        ("abc", "a str"),
        (None, "a NoneType"),
        (np.zeros((3, 2)), 'an array of shape (3, 2) (collate="stack" takes one array for all of them, and splits'),
    ],
)
async def test_anything_but_a_list_of_that_length_is_an_error_for_all(result: Any, got: str) -> None:
    """B2"""
    sample = Sample()
    sample.result = result
    worker = InProcess(sample, ("give", CALL))
    worker.dispatch(0, *numbered(1, 2, 3), batches=[3])
    await worker.turn()
    replies = await worker.replies(3)
    assert all(got in why(reply) for reply in replies.values())
    assert idle(worker)


async def test_a_generator_is_no_list() -> None:
    """B2"""
    worker = InProcess(Sample(), ("generate", CALL))
    worker.dispatch(0, *numbered(1, 2), batches=[2])
    await worker.turn()
    assert all("a generator" in why(reply) for reply in (await worker.replies(2)).values())


async def test_what_the_method_raises_everybody_gets_a_copy_of() -> None:
    """Known mistake 11."""
    sample = Sample()
    sample.result = KeyError("the whole")
    worker = InProcess(sample, ("give", CALL))
    worker.dispatch(0, *numbered(1, 2, 3), batches=[3])
    await worker.turn()
    errors = [value for status, value in (await worker.replies(3)).values() if status == RAISED]
    assert [type(error) for error in errors] == [KeyError] * 3
    assert len({id(error) for error in errors}) == 3
    assert len(sample.runs) == 1
    assert idle(worker)


async def test_an_exception_among_the_results_is_raised_for_its_caller_alone() -> None:
    """B2; and a result that cannot travel fails alone."""
    sample = Sample()
    sample.result = ["a", ValueError("b"), threading.Lock(), bytes(2 << 20), "e"]
    worker = InProcess(sample, ("give", CALL))
    worker.dispatch(0, *numbered(*range(5)), batches=[5])
    await worker.turn()
    replies = await worker.replies(5)
    assert (replies[1], replies[5]) == ((OK, "a"), (OK, "e"))
    assert replies[2][0] == RAISED
    assert str(replies[2][1]) == "b"
    assert (replies[3][0], replies[3][1][0]) == (FAILED, "SerializationError")
    assert (replies[4][0], replies[4][1][0]) == (FAILED, "PayloadTooLarge")


async def test_an_exception_among_the_results_that_breaks_the_process_does() -> None:
    """F6: its caller has it, the others their results, and the replica starts anew."""
    sample = Sample()
    sample.result = ["a", KeyError("fatal"), "c"]
    worker = InProcess(sample, ("give", CALL), fatal_errors=["KeyError"])
    worker.dispatch(0, *numbered(*range(3)), batches=[3])
    await worker.turn()
    replies = await worker.replies(3)
    assert (replies[1], replies[2][0], replies[3]) == ((OK, "a"), RAISED, (OK, "c"))
    assert len(worker.broken) == 1


async def test_arguments_that_cannot_be_read_fail_alone() -> None:
    """B2: the others run without it; with none left, nothing runs."""
    sample = Sample()
    worker = InProcess(sample, ("double", CALL))
    worker.dispatch(0, *numbered(1, 2, Unreadable(), 4), batches=[4], raw={2: b"\xc1"})
    worker.dispatch(0, (5, (5,)), batches=[1], raw={5: b"\xc1"})
    await worker.turn()
    replies = await worker.replies(5)
    assert (replies[1], replies[4]) == ((OK, 2), (OK, 8))
    assert replies[2][0] == replies[5][0] == FAILED
    assert replies[3][0] != OK
    assert sample.runs == [[1, 4]]
    assert idle(worker)


async def test_a_batch_takes_one_place() -> None:
    """B2: the limit counts runs of the method."""
    sample = Sample()
    worker = InProcess(sample, ("wait", CALL), concurrency=2)
    worker.dispatch(0, *numbered(*range(12)), batches=[4, 4, 4])
    await worker.turn()
    assert "2 of 2 running, 12 held" in repr(worker.host)
    sample.gate.set()
    await worker.replies(12)
    assert sample.most == 2
    assert sample.runs == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert " 0 of 2 running, 0 held" in repr(worker.host)


async def test_in_route_mode_the_items_run_one_by_one_within_the_limit() -> None:
    """B2: a batch takes one unit of room at the broker; here never more run than there is room for."""
    sample = Sample()
    worker = InProcess(sample, "one", concurrency=3)
    worker.dispatch(0, *numbered(*range(8)), batches=[8])
    await worker.turn()
    assert await worker.replies(8) == {at + 1: (OK, 2 * at) for at in range(8)}
    assert sample.most == 3


async def test_an_item_cancelled_before_its_batch_starts_leaves_it() -> None:
    """B2, F5: its reply comes at once, the others run without it; who is left last takes the batch along."""
    sample = Sample()
    worker = InProcess(sample, ("wait_in_thread", CALL), ("where", CALL))
    worker.dispatch(0, *numbered("first"), batches=[1])
    worker.dispatch(0, (2, ("a",)), (3, ("b",)), (4, ("c",)), (5, ("d",)), batches=[3, 1])
    await worker.turn()
    worker.drop(2, 5)
    await worker.turn()
    assert worker.replied == {2: (DROPPED, None), 5: (DROPPED, None)}
    sample.thread_gate.set()
    assert await worker.replies(5) == {
        1: (OK, "first"),
        2: (DROPPED, None),
        3: (OK, "b"),
        4: (OK, "c"),
        5: (DROPPED, None),
    }
    assert sample.runs == [["first"], ["b", "c"]]
    assert idle(worker)


async def test_an_item_cancelled_while_its_batch_runs_is_answered_at_its_end() -> None:
    """B2, F5: the others notice nothing; when nobody waits for any, the method is cancelled."""
    sample = Sample()
    worker = InProcess(sample, ("wait", CALL))
    worker.dispatch(0, *numbered("a", "b", "c", "d"), batches=[2, 2])
    await worker.turn()
    worker.drop(1, 3)
    await worker.turn()
    assert worker.replied == {}
    worker.drop(4)
    await worker.turn()
    assert await worker.replies(2) == {3: (DROPPED, None), 4: (DROPPED, None)}
    sample.gate.set()
    assert await worker.replies(4) == {1: (DROPPED, None), 2: (OK, "b"), 3: (DROPPED, None), 4: (DROPPED, None)}
    assert idle(worker)


async def test_a_batch_that_has_not_started_is_given_back_as_a_whole() -> None:
    """F9"""
    sample = Sample()
    worker = InProcess(sample, ("wait", CALL), concurrency=1)
    worker.dispatch(0, *numbered("a", "b", "c", "d"), batches=[2, 2])
    await worker.turn()
    stopping = asyncio.ensure_future(worker.host.finish(5.0, checkpoints=False))
    assert await worker.replies(2) == {3: (UNTOUCHED, None), 4: (UNTOUCHED, None)}
    sample.gate.set()
    await stopping
    assert await worker.replies(4) == {1: (OK, "a"), 2: (OK, "b"), 3: (UNTOUCHED, None), 4: (UNTOUCHED, None)}


async def test_inside_a_batch_the_request_is_that_of_its_first_item() -> None:
    """A6"""
    worker = InProcess(Sample(), ("where", CALL))
    worker.dispatch(0, *numbered("a", "b"), batches=[2])
    await worker.turn()
    assert await worker.replies(2) == {1: (OK, ("000001-1", None)), 2: (OK, ("000001-1", None))}


@pytest.mark.parametrize("kind", ["numpy", "torch"])
async def test_arrays_are_stacked_and_the_result_is_split(kind: str) -> None:
    """B2: what is no array stays a list."""
    sample = Sample()
    worker = InProcess(sample, ("total", STACK))
    rows = [[float(at), 1.0] for at in range(3)]
    make: Any = np.array if kind == "numpy" else torch.tensor
    worker.dispatch(0, *[(at + 1, (make(row), at)) for at, row in enumerate(rows)], batches=[3])
    await worker.turn()
    replies = await worker.replies(3)
    ((array, scale),) = sample.runs
    assert type(array) is (np.ndarray if kind == "numpy" else torch.Tensor)
    assert (array.tolist(), scale) == (rows, [0, 1, 2])
    assert [float(replies[at][1]) for at in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert isinstance(replies[1][1], (np.floating, torch.Tensor))


async def test_an_array_that_does_not_fit_on_the_stack_is_refused_alone() -> None:
    """B2: by shape, by dtype, and what is no array at all, where most are."""
    sample = Sample()
    worker = InProcess(sample, ("total", STACK))
    good = np.ones(2, np.float32)
    odd: list[Any] = [np.ones(3, np.float32), np.ones(2, np.float64), [1.0, 1.0]]
    worker.dispatch(0, *[(at, (one, at)) for at, one in enumerate([*odd, good, good, good, good], 1)], batches=[7])
    await worker.turn()
    replies = await worker.replies(7)
    found = ["a numpy array of float32, shape (3,)", "a numpy array of float64, shape (2,)", "no array"]
    for at, told in enumerate(found, 1):
        assert f"is {told}, and those of its batch are a numpy array of float32, shape (2,)" in why(replies[at])
    assert all(replies[at][0] == OK for at in (4, 5, 6, 7))
    assert sample.runs[0][1] == [4, 5, 6, 7]


async def test_an_array_of_another_length_than_the_stack_is_told_by_its_shape() -> None:
    """B2"""
    sample = Sample()
    sample.result = np.zeros((7, 2))
    worker = InProcess(sample, ("give", STACK))
    worker.dispatch(0, *numbered(np.ones(2), np.ones(2)), batches=[2])
    await worker.turn()
    replies = await worker.replies(2)
    assert all("for 2 calls it returned an array of shape (7, 2), not a list of 2" in why(replies[at]) for at in (1, 2))


async def test_where_no_array_is_in_the_majority_the_first_decides() -> None:
    """B2"""
    sample = Sample()
    worker = InProcess(sample, ("total", STACK))
    worker.dispatch(0, *[(at, (np.ones(at), at)) for at in (1, 2, 3)], batches=[3])
    await worker.turn()
    replies = await worker.replies(3)
    assert [replies[at][0] for at in (1, 2, 3)] == [OK, FAILED, FAILED]
    assert sample.runs[0][1] == [1]


def test_nothing_is_imported_for_stacks() -> None:
    """L2"""
    program = (
        "import sys; from forge_worker.batches import in_lists; "
        "print(in_lists((1,), {'a': 2}, stacks=True), {'numpy', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert found.stdout.strip() == "(([1],), {'a': [2]}) set()"
