"""The invariants find what is broken (C6): each kind of damage, done by hand to a living broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from forge_broker.core.invariants import InvariantBroken, check
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import ReplicaState
from tests.core.peers import Bench


def lose_an_answer(state: Any, service: Any) -> None:
    next(iter(state.clients.values())).answered += 1


def hold_twice(state: Any, service: Any) -> None:
    (request, *_) = state.ledger.held[service.replicas[0].key].values()
    service.endpoints[0].queue.push(request)


def hold_nowhere(state: Any, service: Any) -> None:
    state.ledger.held[service.replicas[0].key].popitem()


def miscount_bytes(state: Any, service: Any) -> None:
    state.held_bytes += 1


def overfill(state: Any, service: Any) -> None:
    service.ahead_s = 0.0
    service.replicas[0].limit = 0


def misplace_room(state: Any, service: Any) -> None:
    service.pool.roomy ^= 1


def serve_unhealthy(state: Any, service: Any) -> None:
    service.replicas[0].state = ReplicaState.RECOVERING


def pin_unopened(state: Any, service: Any) -> None:
    service.pins["ghost"] = 0


def pin_nowhere(state: Any, service: Any) -> None:
    service.pins["s"] = 99


def miscount_waiting(state: Any, service: Any) -> None:
    service.sessions["s"].unpinned = 3


def share_a_gpu(state: Any, service: Any) -> None:
    for launch in state.launches.values():
        launch.gpus = ("0",)


def seat_twice(state: Any, service: Any) -> None:
    service.replicas[1].ranks = service.replicas[0].ranks


def hoard(state: Any, service: Any) -> None:
    service.endpoints[0].queue.length += 1


def answer_and_keep(state: Any, service: Any) -> None:
    state.ledger.of(service.replicas[0])[0].answered = True


def think_elsewhere(state: Any, service: Any) -> None:
    state.ledger.of(service.replicas[0])[0].holder = Queue("elsewhere")


@pytest.mark.parametrize(
    "damage",
    [
        lose_an_answer,
        hold_twice,
        hold_nowhere,
        miscount_bytes,
        overfill,
        misplace_room,
        serve_unhealthy,
        pin_unopened,
        pin_nowhere,
        miscount_waiting,
        share_a_gpu,
        seat_twice,
        hoard,
        answer_and_keep,
        think_elsewhere,
    ],
)
def test_broken_books_are_found(damage: Callable[[Any, Any], None]) -> None:
    """C6."""
    bench, client, _, endpoint = Bench().serving(2)
    client.ask("open_session", service="Echo", session="s")
    client.call(endpoint, b"a", b"b", session=["s", None])
    check(bench.broker)
    damage(bench.state, bench.service())
    with pytest.raises(InvariantBroken, match="<Broker 1 services, 2 workers, 1 clients>"):
        check(bench.broker)
