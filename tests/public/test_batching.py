"""Batches through the public door (B1–B3, S4): real broker, real workers. When and why each leaves is proved to the millisecond in
`core/test_batches.py`; here, what a caller sees of it, and what no caller can do to the others in a batch.

Calls made in one turn of the loop travel in one envelope, so what they are batched with is certain. `await service.state()` tells.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch

from forge_client import (
    BadCall,
    BatchError,
    CallTimeout,
    ForgeActor,
    SerializationError,
    Service,
    ServiceConfig,
    get_service,
    service_endpoint,
)
from forge_client.connection import current_client
from tests.public.batching_actors import Batching, Held, Remembers, Sorted, Stacked
from tests.public.test_calls import BOUND_S, until_running

pytestmark = pytest.mark.timeout(30)


async def batches(service: Service, endpoint: str) -> dict[str, Any]:
    told: dict[str, Any] = (await service.state())["batches"][endpoint]
    return told


async def reasons(service: Service, endpoint: str) -> dict[str, int]:
    why: dict[str, int] = (await batches(service, endpoint))["reasons"]
    return why


async def until_waiting(service: Service, count: int) -> None:
    """Until so many calls wait at the broker."""
    async with asyncio.timeout(BOUND_S):
        while sum((await service.state())["queues"].values()) != count:
            continue


async def gathered(*calls: Any) -> list[Any]:
    """What each gave or raised."""
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), BOUND_S)


@pytest.mark.parametrize("name", ["one_by_one", "one_by_one_in_threads"])
async def test_in_route_mode_a_batch_goes_to_one_replica_and_runs_item_by_item(name: str) -> None:
    """B1, B2: 8 calls are two batches of 4, one for each replica; what is over waits for `batch_timeout`."""
    service = await Batching.options(num_replicas=2).as_service()
    endpoint = getattr(service, name)
    answers = await gathered(*(endpoint.route(n) for n in range(8)))
    assert [value for value, _ in answers] == [2 * n for n in range(8)]
    first, second = {pid for _, pid in answers[:4]}, {pid for _, pid in answers[4:]}
    assert (len(first), len(second), first & second) == (1, 1, set())
    assert await gathered(endpoint.route(8), endpoint.route(9)) == [(16, *first), (18, *first)]
    told = await batches(service, name)
    assert told["reasons"] == {"size": 2, "timeout": 1}
    assert (told["batches"], told["items"], told["sizes"]) == (3, 10, {"2": 1, "4": 2})
    assert told["avg_wait_s"] >= 0.02 / 3


@pytest.mark.parametrize("name", ["together", "together_in_a_thread"])
async def test_in_call_mode_a_batch_is_one_run_and_calls_of_other_shapes_another(name: str) -> None:
    """B2, §9-9: no keyword is dropped, nothing ragged is cut off."""
    service = await Batching.as_service()
    endpoint = getattr(service, name)
    calls = [
        endpoint.route(1),
        endpoint.route(2, 20),
        endpoint.route(3, bias=30),
        endpoint.route(4, bias=40, right=4),
        endpoint.route(5),
        endpoint.route(6, right=6, bias=60),
        endpoint.route(7, 70),
        endpoint.route(left=8),
    ]
    assert await gathered(*calls) == [
        (1, None, None, 2),
        (2, 20, None, 2),
        (3, None, 30, 1),
        (4, 4, 40, 2),
        (5, None, None, 2),
        (6, 6, 60, 2),
        (7, 70, None, 2),
        (8, None, None, 1),
    ]
    assert await reasons(service, name) == {"timeout": 5}


async def test_calls_made_before_the_service_has_started_are_batched_as_well() -> None:
    """A2, B1: the long form, started by its first call."""
    async with Service(ServiceConfig(), Batching) as service:
        assert await gathered(*(service.patient_together.route(n) for n in range(4))) == [(n, 4) for n in range(4)]
    late = Service(ServiceConfig(), Sorted)
    calls = [late.by_function.route(text, text[0]) for text in ("a1", "b1", "a2")]
    assert await gathered(*calls) == [["a1", "a2"], ["b1"], ["a1", "a2"]]


async def test_a_batch_size_of_one_is_no_batching() -> None:
    """B1: and no statistics of batches."""

    class Single(ForgeActor):
        @service_endpoint(batch_size=1, batch_timeout=20.0)
        async def one(self, value: int) -> int:
            return value

    service = await Single.as_service()
    assert await gathered(service.one.route(1), service.one.route(2)) == [1, 2]
    assert (await service.state())["batches"] == {}


async def test_a_method_that_does_not_return_a_list_of_that_length_is_an_error_for_all_and_harms_nobody() -> None:
    """B2, A5: each of them says what came instead."""
    service = await Batching.as_service()
    odd = {
        "dict": "a dict",
        "too few": "2 results",
        "too many": "4 results",
        "generator": "a generator",
        "": "a NoneType",
    }
    errors = await gathered(*(service.odd.route(how) for how in odd for _ in range(3)))
    assert {type(error) for error in errors} == {BatchError}
    for at, got in enumerate(odd.values()):
        for error in errors[3 * at : 3 * at + 3]:
            assert f".odd: for 3 calls it returned {got}, not a list of 3" in str(error)
    assert len(set(map(id, errors))) == 15
    (replica,) = (await service.state())["replicas"]
    assert (replica["healthy"], replica["restarts"], replica["active_requests"]) == (True, 0, 0)


async def test_what_a_method_raises_every_caller_of_its_batch_gets_as_an_object_of_its_own_and_it_runs_once() -> None:
    """A5, §9-8, §9-11."""
    service = await Batching.as_service()
    errors = await gathered(*(service.odd.route("raises") for _ in range(3)))
    assert [(type(error), str(error)) for error in errors] == [(LookupError, "raised in run 1")] * 3
    assert len(set(map(id, errors))) == 3
    assert len({id(error.__cause__) for error in errors}) == 3
    assert all("raise LookupError" in str(error.__cause__) for error in errors)
    assert (await batches(service, "odd"))["batches"] == 1


async def test_what_is_wrong_with_one_result_is_its_callers_alone() -> None:
    """B2, §9-11: an exception among the results, one that cannot be rebuilt, and what cannot travel."""
    service = await Batching.as_service()
    endpoint = service.each_its_own
    answers = await gathered(*(endpoint.route(how) for how in ("same", "fine", "lock", "same")))
    same, fine, lock, again = answers
    assert fine == "fine"
    assert isinstance(lock, SerializationError)
    assert "lock" in str(lock)
    assert [(type(one), str(one)) for one in (same, again)] == [(LookupError, "the same")] * 2
    assert same is not again
    returning = await Batching.options(errors="return").as_service()
    values = await asyncio.gather(*(returning.each_its_own.route(how) for how in ("own", "a", "b", "c")))
    assert (type(values[0]), str(values[0]), values[1:]) == (LookupError, "its own", ["a", "b", "c"])


async def test_an_argument_that_cannot_travel_is_refused_at_its_caller_and_in_nobodys_way() -> None:
    """B2."""
    service = await Batching.as_service()
    calls = [service.patient_together.route(n) for n in range(3)]
    with pytest.raises(SerializationError, match=r"Batching.*\.patient_together"):
        service.patient_together.route(threading.Lock())
    with pytest.raises(BadCall):
        service.patient_together.route()
    calls.append(service.patient_together.route(3))
    assert await gathered(*calls) == [(n, 4) for n in range(4)]


async def test_only_calls_with_equal_keys_share_a_batch() -> None:
    """batch_key: a function, which gets what the call gets, or the name of a parameter."""
    service = await Sorted.as_service()
    by_function = await gathered(
        service.by_function.route("a"),
        service.by_function.route("b", "fr"),
        service.by_function.route("c", "fr"),
        service.by_function.route("d"),
    )
    assert by_function == [["a", "d"], ["b", "c"], ["b", "c"], ["a", "d"]]
    by_name = await gathered(*(service.by_name.route(text, language=text[0]) for text in ("a1", "b1", "a2", "b2")))
    assert by_name == [["a1", "a2"], ["b1", "b2"], ["a1", "a2"], ["b1", "b2"]]
    odd = [("lora", 1), ("lora", 1), 2**70, True, None, 1.5, frozenset({3}), "s"]
    assert await gathered(*(service.keyed.route(key) for key in odd)) == odd
    assert (await batches(service, "keyed"))["sizes"] == {"1": 6, "2": 1}


async def test_a_batch_weighs_no_more_than_it_may_and_what_is_too_heavy_goes_alone() -> None:
    """batch_weight, batch_max_weight."""
    service = await Sorted.as_service()
    texts = ["aaaa", "bbbb", "cccc", "x" * 50]
    answers = await gathered(*(service.weighed.route(text) for text in texts))
    assert answers == [["aaaa", "bbbb"], ["aaaa", "bbbb"], ["cccc"], ["x" * 50]]
    assert await reasons(service, "weighed") == {"weight": 3}  # though four wait, and four would be a full batch
    assert await gathered(*(service.weighed_by_name.route(n) for n in (0, 5, 5, 0))) == [0, 5, 5, 0]
    assert await gathered(*(service.weighed_by_name.route(n) for n in (9, 9))) == [9, 9]
    told = await batches(service, "weighed_by_name")
    assert (told["batches"], told["sizes"]) == (3, {"1": 2, "4": 1})


async def test_a_function_that_gives_what_it_must_not_is_a_bad_call_at_once() -> None:
    """Bad input: by the endpoint's name, before anything travels; of a service that has not started, when it has."""
    bad: list[tuple[str, Any, str]] = [
        ("keyed", "raises", r"batch_key raised LookupError: no such adapter"),
        ("keyed", [1, 2], r"batch_key gave \[1, 2\], which is no key: unhashable type"),
        ("keyed", {"k": 1}, r"batch_key gave \{'k': 1\}, which is no key"),
        ("heavy", "raises", r"batch_weight raised LookupError: no such adapter"),
        ("heavy", -1, r"batch_weight gave -1, which is no number from 0 on"),
        ("heavy", math.nan, r"batch_weight gave nan"),
        ("heavy", math.inf, r"batch_weight gave inf"),
        ("heavy", "7", r"batch_weight gave '7'"),
        ("heavy", 10**400, r"batch_weight gave 1000"),
        ("heavy", torch.ones(2), r"batch_weight gave tensor\("),
    ]
    late = Service(ServiceConfig(), Sorted)
    errors = await gathered(*(getattr(late, endpoint).route(value) for endpoint, value, _ in bad))
    service = await Sorted.as_service()
    for (endpoint, value, why), error in zip(bad, errors, strict=True):
        with pytest.raises(BadCall, match=rf"^Sorted.*\.{endpoint}.*{why}"):
            getattr(service, endpoint).route(value)
        assert isinstance(error, BadCall)
        assert re.search(why, str(error))
    weights = (0, 0.5, np.float32(2), None)
    assert await gathered(*(service.heavy.route(one) for one in weights)) == [*weights]


async def test_a_handle_found_by_name_asks_a_parameter_and_says_what_to_do_about_a_function() -> None:
    """A10: a function is known only where the class is."""
    service = await Sorted.options(name="sorted").as_service()
    found = await get_service("sorted")
    assert isinstance(found, Service)
    with pytest.raises(BadCall, match=r"batch_key is a function, which only a handle.*batch_key=\"…\""):
        found.by_function.route("a")
    with pytest.raises(BadCall, match=r"batch_weight is a function"):
        found.weighed.route("a")
    calls = [found.by_name.route("a1", language="a"), service.by_name.route("b", language="b")]
    calls.append(service.by_name.route("a2", language="a"))
    assert await gathered(*calls) == [["a1", "a2"], ["b"], ["a1", "a2"]]


async def test_with_batch_eager_a_call_waits_for_room_and_for_nothing_else() -> None:
    """batch_eager: what comes while all are busy is one batch of each shape, and so is what comes together."""
    service = await Batching.options(replica_max_concurrent_requests=1).as_service()
    assert await asyncio.wait_for(service.eager.route(1), BOUND_S) == 1
    held = service.rest.route()
    await until_running(service, 1)
    calls: list[tuple[list[int], dict[str, int]]] = [([1], {}), ([], {"values": 2}), ([3], {}), ([], {"values": 4})]
    waiting = [service.eager.route(*args, **kwargs) for args, kwargs in calls]
    await until_waiting(service, 4)
    held.cancel()
    assert await gathered(*waiting) == [2, 2, 2, 2]
    at_once = [service.eager.route(*args, **kwargs) for args, kwargs in calls]
    assert await gathered(*at_once) == [2, 2, 2, 2]
    assert await reasons(service, "eager") == {"eager": 5}


async def test_calls_of_sessions_go_by_themselves_unless_the_endpoint_says_otherwise() -> None:
    """S4."""
    service = await Batching.as_service()
    async with service.session() as session:
        answer = await asyncio.wait_for(service.patient.route("alone"), BOUND_S)
    assert answer == ("alone", session.session_id)
    assert (await batches(service, "patient"))["batches"] == 0
    assert await asyncio.wait_for(service.patient_together.fanout(7), BOUND_S) == [(7, 1)]
    assert (await batches(service, "patient_together"))["batches"] == 0


async def test_calls_of_sessions_that_share_batches_keep_each_sessions_order() -> None:
    """batch_sessions, A6: inside, the method is in none of the sessions."""
    service = await Batching.as_service()
    s, t = await service.start_session(), await service.start_session()
    route = service.in_sessions.route
    calls = [route(1, sess_id=s), route(1, sess_id=t), route(2, sess_id=s), route(2, sess_id=t)]
    answers = await gathered(*calls)
    assert {(size, session) for _, size, session in answers} == {(4, None)}
    assert answers[0] < answers[2]
    assert answers[1] < answers[3]
    assert await reasons(service, "in_sessions") == {"size": 1}


async def test_sessions_whose_state_is_exported_share_no_batch() -> None:
    """S3: their calls run one at a time."""
    service = await Remembers.as_service()
    async with service.session():
        turns = await gathered(*(service.say.route(n) for n in range(3)))
    assert turns == [[0], [0, 1], [0, 1, 2]]
    assert (await batches(service, "say"))["batches"] == 0


async def test_numpy_arrays_are_stacked_and_an_odd_shape_or_dtype_fails_alone() -> None:
    """collate="stack": and a result that is one array is split."""
    service = await Stacked.as_service()
    rows = [np.full(3, n, dtype=np.float32) for n in range(2)]
    odd = [np.zeros(4, dtype=np.float32), np.zeros(3, dtype=np.float64)]
    first, longer, second, wider = await gathered(
        *(service.numpy.route(row, scale=10) for row in (rows[0], odd[0], rows[1], odd[1]))
    )
    assert (first, second) == (((2, 3), 0.0), ((2, 3), 30.0))
    for error, found in ((longer, "float32, shape (4,)"), (wider, "float64, shape (3,)")):
        assert isinstance(error, BatchError)
        assert f"a numpy array of {found}, and those of its batch are a numpy array of float32, shape (3,)" in str(
            error
        )
    halves = await gathered(*(service.halved.route(row) for row in (*rows, *rows)))
    for half, row in zip(halves, (*rows, *rows), strict=True):
        assert (half.dtype, half.shape) == (np.float32, (3,))
        assert np.array_equal(half, row / 2)


async def test_tensors_are_stacked_and_the_result_is_split() -> None:
    """collate="stack" with torch."""
    service = await Stacked.as_service()
    rows = [torch.full((2, 2), float(n), dtype=torch.bfloat16) for n in range(3)]
    *halves, odd = await gathered(*(service.halved.route(one) for one in (*rows, torch.zeros(5))))
    for half, row in zip(halves, rows, strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, row / 2)
    assert isinstance(odd, BatchError)
    assert await reasons(service, "halved") == {"size": 1}


async def test_batches_of_one_endpoint_run_at_once_on_replicas_and_on_one() -> None:
    """B3, §9-7."""
    service = await Held.options(num_replicas=2).as_service()
    calls = [service.hold.route(n) for n in range(16)]
    await until_running(service, 2, 2)
    await service.let_go.fanout()
    answers = await gathered(*calls)
    assert [value for value, _ in answers] == list(range(16))
    assert [len({pid for _, pid in answers[at : at + 4]}) for at in (0, 4, 8, 12)] == [1, 1, 1, 1]
    assert sorted(len(runs) for runs in await service.runs.fanout()) == [2, 2]


async def test_a_callers_timeout_or_cancellation_in_a_batch_is_nobody_elses() -> None:
    """F5: before it has left, a call leaves its batch; afterwards the rest of the batch goes on, and the room is kept until its end."""
    service = await Held.as_service()
    leaves = service.hold.route("leaves")
    await until_waiting(service, 1)
    leaves.cancel()
    await until_waiting(service, 0)
    calls = [service.hold.route(n) for n in range(2)]
    late = service.hold.options(timeout=1.0).route("late")
    gone = service.hold.route("gone")
    async with asyncio.timeout(BOUND_S):
        while not await service.runs.route():  # until then, an item could still leave it at the worker
            continue
    gone.cancel()
    with pytest.raises(CallTimeout, match=r"Held.*\.hold did not answer within 1\.0 s"):
        await late
    await until_running(service, 1)
    await service.let_go.route()
    assert [value for value, _ in await gathered(*calls)] == [0, 1]
    await until_running(service, 0)
    assert await service.runs.route() == [[0, 1, "late", "gone"]]
    (replica,) = (await service.state())["replicas"]
    assert (replica["state"], replica["restarts"]) == ("HEALTHY", 0)


async def test_a_batch_that_nobody_waits_for_any_more_is_cancelled() -> None:
    """F5: an async method's."""
    service = await Held.as_service()
    calls = [asyncio.ensure_future(service.rest_unless.route(0)) for _ in range(4)]
    await until_running(service, 1)
    for call in calls:
        call.cancel()
    await until_running(service, 0)
    assert all(call.cancelled() for call in calls)
    (replica,) = (await service.state())["replicas"]
    assert (replica["state"], replica["active_requests"], replica["restarts"]) == ("HEALTHY", 0, 0)


async def test_a_call_that_cannot_wait_takes_its_batch_along() -> None:
    """B1, B3: half of its time is left to run in, though the batch might have waited for 20 s."""
    service = await Batching.as_service()
    calls = [service.patient_together.route(1), service.patient_together.options(timeout=1.0).route(2)]
    assert await gathered(*calls) == [(1, 2), (2, 2)]
    assert await reasons(service, "patient_together") == {"deadline": 1}


async def test_a_worker_that_is_killed_in_mid_batch_costs_no_caller_its_answer() -> None:
    """F2, F3."""
    service = await Held.options(num_replicas=2).as_service()
    survivor, victim = await service.pid.fanout()
    calls = [service.rest_unless.route(survivor) for _ in range(8)]
    await asyncio.wait_for(asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED), BOUND_S)
    await until_running(service, 0, 1)
    os.kill(victim, signal.SIGKILL)
    assert await gathered(*calls) == [survivor] * 8
    assert await reasons(service, "rest_unless") == {"size": 3}  # four of the lost are a full batch again


async def test_batches_wait_for_a_replica_when_there_is_none_and_leave_when_it_is_back() -> None:
    """§9-10, F7."""
    service = await Held.as_service()
    pid = await service.pid.route()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(BOUND_S):
        while not (await service.state())["replicas"][0]["restarts"]:
            continue
    calls = [service.rest_unless.route(pid) for _ in range(6)]
    await until_running(service, 1)
    for call in calls[4:]:
        call.cancel()
    await until_waiting(service, 0)
    assert await reasons(service, "rest_unless") == {"size": 1}
    for call in calls:
        call.cancel()  # or the end of the service waits for what runs, as long as it may


async def test_a_batch_that_runs_when_the_broker_is_killed_is_not_run_again() -> None:
    """F10, §9-8: its callers get what it returned, from the same worker."""
    service = await Held.as_service()
    client = await current_client()
    assert client.embedded is not None
    calls = [service.hold.route(n) for n in range(4)]
    await until_running(service, 1)
    client.embedded.process.kill()
    await asyncio.wait_for(service.let_go.route(), BOUND_S)
    answers = await gathered(*calls)
    assert [value for value, _ in answers] == [0, 1, 2, 3]
    assert await service.runs.route() == [[0, 1, 2, 3]]
    assert (await batches(service, "hold"))["batches"] == 0


async def test_an_actors_calls_are_batches_of_one() -> None:
    """B2: the same class, and the method still takes lists."""
    actor = await Batching.as_actor()
    assert await gathered(actor.patient_together.call_one("x"), actor.patient_together.call_one("y")) == [
        ("x", 1),
        ("y", 1),
    ]
    assert await actor.together.call_one(1, bias=2) == (1, None, 2, 1)
    stacked = await Stacked.as_actor()
    assert await stacked.numpy.call_one(np.ones(3), scale=2) == ((1, 3), 6.0)


async def test_every_rank_of_a_mesh_runs_the_batch() -> None:
    """A7, B2."""
    service = await Batching.options(procs=2, return_first_rank_result=False).as_service()
    meshes = await gathered(*(service.together.route(n) for n in range(4)))
    assert [list(mesh.values()) for mesh in meshes] == [[(n, None, None, 4)] * 2 for n in range(4)]
