"""Links over connections that break, swallow, delay and repeat (W4): nothing is lost, run twice or answered twice.

One fault each, so that a failure names it; `test_conversations` mixes them, and `storm` adds everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.face_to_face.network import Connection
from tests.face_to_face.world import OK, Reply, SimClient, SimWorker, World

ONCE_EACH = [(1, b"%d" % n) for n in range(50)]
"""(how often it was answered, with what) of each call, when nothing was lost and nothing given twice."""


def answers_with(world: World, fault: Callable[[SimClient, SimWorker], None]) -> list[tuple[int, object]]:
    """Fifty calls in five seconds, and the fault in the third: how each was answered, as in ONCE_EACH. Nobody dies of it, so each
    starts exactly once, which is looked at here."""
    world.actor = lambda worker, method, payload: (0.3, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=1, replica_max_concurrent_requests=100)
    worker = world.workers_of("Sim/0")[0]
    calls: list[Reply] = []

    def call(n: int) -> None:
        calls.append(client.call(service, payload=b"%d" % n))

    began = world.clock.now
    for n in range(50):
        world.clock.at(began + n * 0.1, partial(call, n))
    world.clock.at(began + 2.05, partial(fault, client, worker))
    world.run_until(lambda: len(calls) == 50 and all(call.done for call in calls))
    world.run_for(10.0)  # what comes twice comes late
    starts = world.starts()
    assert [attempt for _, attempt in starts] == [1] * 50
    assert len(set(starts)) == 50
    assert client.ask("state", service=service["service"])["replicas"][0]["restarts"] == 0
    return [(call.replies, call.payload) for call in calls]


def broken(connection: Connection) -> None:
    connection.reconnect(after=0.3)


def deaf(connection: Connection) -> None:
    connection.half_open(to_broker=False, seconds=2.5)


def mute(connection: Connection) -> None:
    connection.half_open(to_broker=True, seconds=2.5)


@pytest.mark.parametrize("fault", [broken, deaf, mute])
def test_a_clients_connection_may_break_or_swallow_one_direction(fault: Callable[[Connection], None]) -> None:
    """W4: ZMTP's heartbeats end the half-open one; then what was not acknowledged is sent again."""
    world = World()
    assert answers_with(world, lambda client, worker: fault(client.connection)) == ONCE_EACH
    assert world.faults["reconnect"] == 1


@pytest.mark.parametrize("fault", [broken, deaf, mute])
def test_a_workers_connection_may_break_or_swallow_one_direction(fault: Callable[[Connection], None]) -> None:
    """W4: a dispatch that is sent again is not run again, and a reply that is sent again not given again."""
    world = World()
    assert answers_with(world, lambda client, worker: fault(worker.connection)) == ONCE_EACH
    assert world.faults["reconnect"] == 1


def test_a_slow_network_has_everything_sent_again_and_nothing_done_again() -> None:
    """W4: a round trip takes longer than the patience of a probe."""
    world = World()
    assert answers_with(world, lambda client, worker: setattr(world, "delay_s", 1.6)) == ONCE_EACH
    assert world.broker.state.counters["out_of_order"] > 0


def test_what_comes_after_something_lost_waits_until_it_was_sent_again() -> None:
    """W4: go back n. Replies are a quarter of a second on their way: those behind the break arrive before the probe is answered."""
    world = World()

    def break_slowly(client: SimClient, worker: SimWorker) -> None:
        world.delay_s = 0.25
        world.clock.at(world.clock.now + 1.0, worker.connection.reconnect)

    assert answers_with(world, break_slowly) == ONCE_EACH
    assert world.broker.state.counters["out_of_order"] > 0


def test_what_arrives_twice_is_taken_once() -> None:
    """W4."""
    world = World()
    assert answers_with(world, lambda client, worker: setattr(world, "duplicates", 1.0)) == ONCE_EACH
    assert world.faults["duplicate"] > 100


def test_a_reply_lost_on_its_way_is_sent_again_under_the_new_routing_id() -> None:
    """W4: the connection breaks as the reply is in its pipe. The worker probes by the new one, which tells the broker where it is."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1)
    worker = world.workers_of("Sim/0")[0]
    before = worker.connection.routing_id
    call = client.call(service, payload=b"once")
    world.run_until(lambda: bool(world.history) and not worker.link.running)
    worker.connection.reconnect(after=0.2)
    world.run_until(lambda: call.done)
    assert (call.replies, call.payload, len(world.history)) == (1, b"once", 1)
    assert worker.connection.routing_id != before
    assert world.broker.state.links[worker.link.name].route[1] == worker.connection.routing_id


def test_a_peer_that_was_taken_for_dead_asks_and_does_not_wait_for_ever() -> None:
    """W4, F5: a client on another host slept for too long; its broker has forgotten it, and it has nothing to send."""
    world = World()
    world.actor = lambda worker, method, payload: (30.0, OK, payload)
    owner, sleeper = world.client(), world.client(host="another-host")
    service = owner.deploy(num_replicas=1)
    call = sleeper.call(service)
    world.run_for(0.5)
    sleeper.pause()
    world.run_for(8.0)
    sleeper.resume()
    assert not sleeper.was_lost  # nobody has told it yet
    world.run_until(lambda: sleeper.was_lost, 10.0)
    assert sleeper.lost_waiters == [call]
    assert call.replies == 0
