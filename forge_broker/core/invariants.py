"""What must hold after every event (C6). Tests call `check`; it walks everything, so production does not.

Each violation is a sentence; all of them are raised together.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from forge_broker.core.batcher import Lane
from forge_broker.core.broker import Broker
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import Replica, ReplicaState
from forge_broker.core.requests import Gather, Request, Slice
from forge_broker.core.workers import WorkerState
from forge_contract.messages import show_request


class InvariantBroken(AssertionError):
    pass


def check(broker: Broker) -> None:
    """Raises InvariantBroken naming everything that does not hold."""
    wrong = [*_calls(broker), *_replicas(broker), *_sessions(broker), *_processes(broker)]
    if wrong:
        raise InvariantBroken(f"{broker!r}:\n" + "\n".join(f"  - {line}" for line in wrong))


def _calls(broker: Broker) -> list[str]:
    """Accepted = answered + queued + in flight; every unanswered request has exactly one holder."""
    wrong: list[str] = []
    state = broker.state
    holders: dict[int, list[str]] = {}
    waiting: set[int] = set()  # slices
    for service in state.services.values():
        for queue in (*service.queues, *(replica.parked for replica in service.replicas.values())):
            counted = queue.counted()
            if queue.length != counted:
                wrong.append(f"{queue!r} has {counted}")
            if isinstance(queue, Lane) and queue.length and not queue.waiting and queue.timer_at > queue.flush_at:
                wrong.append(f"{queue!r} is to be flushed at {queue.flush_at}, and looked at at {queue.timer_at}")
            for one in queue.held() if counted else ():
                if one.holder is not queue:
                    wrong.append(f"{one!r} is in {queue.name} but thinks it is in {one.holder!r}")
                if isinstance(one, Slice):
                    waiting.add(id(one))
                    if not one.left:
                        wrong.append(f"a slice without a call is in {queue.name}")
                else:
                    holders.setdefault(id(one), []).append(queue.name)
    for key, request_id, one in state.ledger:
        if isinstance(one, Slice):
            if request_id not in one.left or one.client.calls.get(request_id) is not one:
                wrong.append(
                    f"{show_request(request_id)} is in the ledger under {key}, but not in its slice, or not open"
                )
            continue
        holders.setdefault(id(one), []).append(f"ledger of {key}")
        if not isinstance(one.holder, Replica):
            wrong.append(f"{show_request(request_id)} is in the ledger but thinks it is in {one.holder!r}")
    held_bytes = 0
    for client in state.clients.values():
        if client.accepted != client.answered + len(client.calls):
            wrong.append(
                f"{client!r}: accepted {client.accepted}, answered {client.answered}, open {len(client.calls)}"
            )
        for key, call in client.calls.items():
            if isinstance(call, Slice):
                held_bytes += call.left.get(key, 0)
                if isinstance(call.holder, Queue):
                    held = id(call) in waiting
                else:
                    held = state.ledger.held[call.holder.key].get(key) is call
                if key not in call.left or not held:
                    wrong.append(f"{show_request(key)} is open, but not in its slice, which is in {call.holder!r}")
                continue
            parts: list[Request] = list(call.children.values()) if isinstance(call, Gather) else [call]
            held_bytes += call.size
            if not parts:
                wrong.append(f"fan-out {show_request(call.id)} waits for nobody")
            for part in parts:
                where = holders.get(id(part), [])
                if len(where) != 1:
                    wrong.append(f"{show_request(part.id)} of {part.endpoint!r} has {len(where)} holders: {where}")
                if part.answered:
                    wrong.append(f"{show_request(part.id)} is answered and still open")
    if held_bytes != state.held_bytes:
        wrong.append(f"held_bytes is {state.held_bytes}, the open calls hold {held_bytes}")
    return wrong


def _replicas(broker: Broker) -> list[str]:
    """In flight ≤ capacity; the pool has exactly the healthy ones; a draining replica gets nothing new."""
    wrong: list[str] = []
    state = broker.state
    for service in state.services.values():
        current = sum(not replica.leaving for replica in service.replicas.values())
        if current != service.wanted and service.stopping is None and state.window is None:
            wrong.append(f"{service!r} wants {service.wanted} replicas and has {current}")
        healthy = tuple(sorted(idx for idx, replica in service.replicas.items() if replica.healthy))
        if service.pool.members != healthy:
            wrong.append(f"{service!r}: the pool has {service.pool.members}, healthy are {healthy}")
        roomy = sum(1 << replica.idx for replica in service.replicas.values() if replica.has_room)
        if service.pool.roomy != roomy:
            wrong.append(f"{service!r}: room {service.pool.roomy:b}, should be {roomy:b}")
        for replica in service.replicas.values():
            held = _units(state.ledger.held[replica.key].values())
            if not held == replica.active <= replica.most:
                wrong.append(f"{replica!r} holds {held} in the ledger, active is {replica.active}")
            if replica.state is ReplicaState.HEALTHY and not all(
                rank is not None and rank.state is WorkerState.READY for rank in replica.ranks
            ):
                wrong.append(f"{replica!r} is HEALTHY with ranks {replica.ranks}")
            if replica.parked.length and not replica.healthy and replica.state is not ReplicaState.DRAINING:
                wrong.append(f"{replica!r} has {replica.parked.length} parked")
            if replica.parked.length and replica.has_room and replica.parked.timer_at == inf:
                wrong.append(f"{replica!r} has room and {replica.parked.length} parked")
        if service.cell is not None and service.cell.state is not ReplicaState.HEALTHY:
            wrong.append(f"{service!r}: suspects are to run on {service.cell!r}")
        if (
            service.cell is not None
            and service.cell.active > 1
            and any(
                isinstance(request, Request) and request.deaths == service.config.max_attempts - 1
                for request in state.ledger.held[service.cell.key].values()
            )
        ):
            wrong.append(f"{service!r}: a suspect does not run alone on {service.cell!r}")
        # In a lane calls may wait for their batch to be full; one that is full waits for room alone.
        waiting: list[Queue] = [
            queue
            for queue in (service.rotation if service.pool.roomy else ())
            if queue.length >= (queue.batcher.size if isinstance(queue, Lane) else 1)
        ]
        if waiting:
            wrong.append(f"{service!r}: somebody has room, and {waiting} wait")
    return wrong


def _units(held: Iterable[Request | Slice]) -> int:
    """The room these take: one each, one together for those of a batch."""
    batches = {id(one.batch) for one in held if one.batch is not None}
    return len(batches) + sum(1 for one in held if one.batch is None)


def _sessions(broker: Broker) -> list[str]:
    """A session has at most one pin, to a healthy replica, and only while it is open."""
    wrong: list[str] = []
    for service in broker.state.services.values():
        for sid, idx in service.pins.items():
            if sid not in service.sessions:
                wrong.append(f"{sid} of {service!r} is pinned and not open")
            replica = service.replicas.get(idx)
            if replica is None or replica.state not in (ReplicaState.HEALTHY, ReplicaState.DRAINING):
                wrong.append(f"{sid} of {service!r} is pinned to {replica!r}")
        wrong += [f"{sid} of {service!r} is fresh and not open" for sid in service.fresh - service.sessions.keys()]
        for replica in service.replicas.values():
            pinned = sum(1 for idx in service.pins.values() if idx == replica.idx)
            if pinned != replica.sessions:
                wrong.append(f"{replica!r} counts {replica.sessions} sessions, {pinned} are pinned")
        for sid, session in service.sessions.items():
            if session.lost and sid in service.pins:
                wrong.append(f"{sid} is lost, and pinned")
            waiting = service.unpinned.length and sum(1 for request in service.unpinned if request.session == sid)
            if waiting != session.unpinned:
                wrong.append(f"{sid} counts {session.unpinned} waiting calls, {waiting} wait")
            suspects = service.suspects.length and sum(1 for request in service.suspects if request.session == sid)
            if suspects != session.suspects:
                wrong.append(f"{sid} counts {session.suspects} calls among the suspects, there are {suspects}")
            if suspects and waiting:
                wrong.append(f"{sid} has calls among the suspects and elsewhere: they would overtake each other")
    kept = sum(
        session.state.size
        for service in broker.state.services.values()
        for session in service.sessions.values()
        if session.state is not None
    )
    if kept != broker.state.checkpoint_bytes:
        wrong.append(f"checkpoint_bytes is {broker.state.checkpoint_bytes}, the sessions have {kept}")
    return wrong


def _processes(broker: Broker) -> list[str]:
    """No GPU has two holders; a worker is one rank of one replica at most, or of a spare that waits."""
    wrong: list[str] = []
    state = broker.state
    holders: dict[str, list[object]] = {}
    for launch in state.launches.values():
        for gpu in launch.gpus:
            holders.setdefault(gpu, []).append(launch.id)
    for worker in state.workers.values():
        if not worker.launch and worker.host == state.host:
            for gpu in worker.gpus:
                holders.setdefault(gpu, []).append(worker.name)
    wrong += [f"GPU {gpu} is held by {found}" for gpu, found in holders.items() if len(found) > 1]
    seats: dict[str, int] = {}
    for service in state.services.values():
        for replica in service.replicas.values():
            for worker in replica.ranks:
                if worker is not None:
                    seats[worker.name] = seats.get(worker.name, 0) + 1
        for spare in service.spares.values():
            if [launch for launch in spare.launches if launch.spare is not spare or launch.leaving]:
                wrong.append(f"{spare!r} has processes that are on their way out, or a replica's")
        if len(service.spares) > service.config.warm_spares or (service.spares and service.stopping is not None):
            wrong.append(f"{service!r} has {len(service.spares)} spares")
    wrong += [f"worker {name} has {count} seats" for name, count in seats.items() if count > 1]
    for worker in state.workers.values():
        found = state.launches.get(worker.launch)
        if worker.state in (WorkerState.WARMING, WorkerState.WARM) and (
            found is None or (found.spare is None and not found.leaving)
        ):
            wrong.append(f"{worker!r} is nobody's spare, and not on its way out")
    return wrong
