"""What the broker looks like from outside: plain dicts for `forge status`, `state()` and `forge explain`.

Reads `state`, changes nothing. Costs a walk over replicas and workers, never over calls or sessions one by one (except where one is
asked for), so that a broker with a million queued calls, or of idle sessions, answers at once.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any, Final

from forge_broker.core.dead_letters import DeadLetter
from forge_broker.core.metrics import batches
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import Replica
from forge_broker.core.requests import Gather
from forge_broker.core.services import Service
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_contract.messages import read_request, show_request

SESSIONS_SHOWN: Final = 1000  # of each service, those that were opened first


def broker_status(state: State, now: float) -> dict[str, Any]:
    return {
        "incarnation": state.incarnation,
        "uptime_s": round(now - state.started_at, 3),
        "loop_lag_s": round(state.loop_lag_s(now), 3),
        "recovering": None
        if state.window is None
        else {"until_s": round(state.window.until - now, 3), "missing": missing(state)},
        "terminating": state.terminating,
        "clients": len(state.clients),
        "services": [service_state(service, now) for service in state.services.values()],
        "workers": workers(state, now),
        "gpus": dict(state.slots),
        "launches": len(state.launches),
        "max_workers": state.config.max_workers,
        "queued_bytes": state.held_bytes,
        "shared_memory": {
            "on": state.segments is not None and state.config.shared_memory_from > 0,
            "bytes": sum(link.vitals.get("segment_bytes", 0) for link in state.links.values()),
            "refused": sum(link.vitals.get("segments_refused", 0) for link in state.links.values()),
        },
        "dead_letters": len(state.dead),
        "checkpoint_bytes": state.checkpoint_bytes,
        "fenced_replies": state.ledger.fenced,
        "counters": dict(state.counters),
    }


def broker_life(state: State, now: float) -> dict[str, Any]:
    """What whoever runs the broker looks at most often: is it well, is it at work."""
    return {
        "uptime_s": round(now - state.started_at, 3),
        "loop_lag_s": round(state.loop_lag_s(now), 3),
        "recovering": state.window is not None,
        "draining": bool(state.terminating),
    }


def missing(state: State) -> list[str]:
    """What a broker that recovers still waits for, for people."""
    window = state.window
    if window is None:
        return []
    found = [
        f"the client that started {state.services[service].name}"
        for service, owner in window.owners.items()
        if owner and service not in window.declared
    ]
    for service in state.services.values():
        for replica in service.replicas.values():
            absent = [str(rank) for rank, worker in enumerate(replica.ranks) if worker is None]
            if absent:
                found.append(f"rank {', '.join(absent)} of {replica.name}")
        absent_replicas = service.wanted - len(service.replicas)
        if absent_replicas > 0:
            found.append(f"{absent_replicas} replicas of {service.name}")
    return found


def service_state(service: Service, now: float) -> dict[str, Any]:
    """X5: what `await service.state()` is."""
    queues: Counter[str] = Counter()
    shown = list(islice(service.sessions, SESSIONS_SHOWN))
    for queue in service.queues:  # the lanes of a batcher share a name
        queues[queue.name] += queue.length
    return {
        "service": service.id,
        "name": service.name,
        "kind": service.kind,
        "class_name": service.class_name,
        "detached": service.owner is None,
        "stopping": service.stopping is not None,
        "replicas": [_replica_state(replica) for replica in service.replicas.values()],
        "spares": spares(service),
        "preload": {
            "wanted": service.config.preload,
            "ready": service.preload_ready,
            "why": service.preload_why,
        },
        "queues": dict(queues),
        "batches": batches(service),
        "active_sessions": sorted(shown),
        "sessions": len(service.sessions),
        "session_replica_map": {sid: service.pins[sid] for sid in shown if sid in service.pins},
        "state_epoch": service.state_epoch,
        "scaling": _scaling(service, now),
        "request_rate": round(sum(replica.stats.window.rate(now) for replica in service.replicas.values()), 3),
    }


def spares(service: Service) -> dict[str, Any]:
    """X2: how fast its next replica can start. `why`: there are fewer than wanted, or the last one failed."""
    ready = sum(spare.warm_at is not None for spare in service.spares.values())
    return {
        "wanted": service.config.warm_spares,
        "ready": ready,
        "starting": len(service.spares) - ready,
        "why": service.spare_why,
    }


def _scaling(service: Service, now: float) -> dict[str, Any]:
    decided = service.sizing.decided
    acted = [one for one in decided if one.decision.delta]
    return {
        "wanted": service.wanted,
        "limits": list(service.config.limits),
        "policy": None if service.sizing.policy is None else type(service.sizing.policy).__name__[:100],
        "last_decision": decided[-1].shown(now) if decided else None,
        "last_change": acted[-1].shown(now) if acted else None,
    }


def decisions(service: Service, now: float) -> dict[str, Any]:
    """`forge why-scale`: the last decisions, the newest first."""
    return {
        "name": service.name,
        **_scaling(service, now),
        "decisions": [one.shown(now) for one in reversed(service.sizing.decided)],
    }


def _replica_state(replica: Replica) -> dict[str, Any]:
    return {
        "idx": replica.idx,
        "name": replica.name,
        "state": replica.state.value,
        "healthy": replica.healthy,
        "failed": replica.state.value in ("RECOVERING", "UNHEALTHY"),
        "epoch": replica.epoch,
        "active_requests": replica.active_requests,
        "max_concurrent_requests": replica.limit,
        "queue_size": replica.queue_depth,
        "capacity_utilization": replica.capacity_utilization,
        "sessions": replica.sessions,
        "restarts": replica.restarts,
        "last_error": replica.last_error,
        "pending": replica.pending_why,
        "workers": [worker.name for worker in replica.ranks if worker is not None],
        "total_requests": replica.stats.total,
    }


def workers(state: State, now: float) -> list[dict[str, Any]]:
    return [
        {
            "name": worker.name,
            "state": worker.state.value,
            "hostname": worker.hello["hostname"],
            "pid": worker.hello["pid"],
            "gpus": list(worker.gpus),
            "labels": worker.hello.get("labels") or {},
            "launched": bool(worker.launch),
            "watched": worker.watched,
            "replica": worker.replica.name if worker.replica is not None else None,
            "rank": worker.rank if worker.replica is not None else None,
            "spare_of": _spare_of(state, worker),
            "silent_s": round(now - worker.heard_at, 3),
            "vitals": worker.vitals,
        }
        for worker in state.workers.values()
    ]


def _spare_of(state: State, worker: Worker) -> str | None:
    launch = state.launches.get(worker.launch)
    return launch.spare.service.name if launch is not None and launch.spare is not None else None


def dead_letter(letter: DeadLetter, now: float) -> dict[str, Any]:
    return {
        "id": letter.id,
        "service": letter.service,
        "endpoint": letter.endpoint,
        "attempts": letter.attempts,
        "died": round(now - letter.died_at, 3),  # seconds ago
        "why": letter.why,
        "bytes": letter.size,
    }


def story(state: State, subject: str, now: float) -> list[str]:
    """C5: what happened to a request, a session, a replica or a worker, and how it is now."""
    lines = [f"{entry.when - now:+.3f} s  {entry.text}" for entry in state.story.of(subject)]
    for service in state.services.values():
        if subject == service.spares_name:
            found = spares(service)
            why = f"; {found['why']}" if found["why"] else ""
            return [*lines, f"{found['wanted']} wanted, {found['ready']} ready, {found['starting']} starting{why}"]
        if subject in service.sessions:
            idx = service.pins.get(subject)
            session = service.sessions[subject]
            pinned = f"pinned to {service.name}/{idx}" if idx is not None else "not pinned yet"
            ttl_s = service.config.session_ttl_s
            used = "" if ttl_s is None else f", last used {now - session.used_at:.3f} s ago"
            return [*lines, f"session of {service.name}, {pinned}{used}"]
        for replica in service.replicas.values():
            if replica.name == subject:
                return [*lines, *_replica_now(replica)]
    worker = state.workers.get(subject)
    if worker is not None:
        return [
            *lines,
            f"{worker!r} on {worker.hello['hostname']}, pid {worker.hello['pid']}, heard {now - worker.heard_at:.3f} s ago",
        ]
    letter = state.dead.get(subject)
    if letter is not None:
        return [*lines, f"a dead letter of {letter.service}.{letter.endpoint}; see `forge dead show {letter.id}`"]
    key = read_request(subject)
    if key is not None:
        return lines + _request_now(state, key, now)
    if lines:
        return [*lines, "it is over"]
    return [
        f"nothing is known of {subject!r}: it is no replica (name/0), session, worker or request (1a2b3c-17) of this broker, "
        "or it was an ordinary call that is over"
    ]


def _request_now(state: State, key: int, now: float) -> list[str]:
    client = state.clients.get(key >> 40)
    call = client.call(key) if client is not None else None
    if call is None:
        return ["it is over, or was never accepted: of an ordinary call that is over nothing is kept"]
    head = f"{show_request(key)} calls {call.endpoint.full_name}, accepted {now - call.queued_at:.3f} s ago"
    if isinstance(call, Gather):
        return [head, f"a fan-out; {len(call.children)} replicas have not answered yet: {sorted(call.children)}"]
    if isinstance(call.holder, Queue):
        return [head, f"waits in {call.holder.name}, {call.holder.length} long"]
    if call.holder is not None:
        return [head, f"runs on {call.holder.name} for {now - call.started_at:.3f} s, attempt {call.attempt}"]
    return [head]


def _replica_now(replica: Replica) -> list[str]:
    lines = [
        f"{replica!r}, epoch {replica.epoch}, {replica.restarts} restarts, {replica.sessions} sessions, {replica.parked!r}"
    ]
    lines += [f"rank {rank}: {worker!r}" for rank, worker in enumerate(replica.ranks) if worker is not None]
    if replica.pending_why:
        lines.append(f"pending, because it {replica.pending_why}")
    if replica.last_error:
        lines.append(f"last error: {replica.last_error}")
    return lines
