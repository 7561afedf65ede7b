"""What a scrape is told: every family of metrics with its samples, as plain values. `shell/http_door.py` asks for them through the loop and
writes them down in Prometheus's format; docs/observability.md lists them.

Reads `state`, changes nothing. Costs a walk over endpoints, replicas and workers, never over calls or sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from forge_broker.core.latency import BOUNDS, TOLD, Histogram
from forge_broker.core.replicas import ReplicaState
from forge_broker.core.services import Endpoint, Service
from forge_broker.core.state import State
from forge_broker.core.workers import Worker, WorkerState
from forge_contract.config import MOST_REPLICAS

Value = tuple[float, ...]
"""One number; of a histogram, how many did not exceed each bound, how many there are, and their sum."""
Sample = tuple[tuple[str, ...], Value]
"""The labels' values, and what was counted or measured."""


class Family(NamedTuple):
    """`names`: which of the labels name things, of which there may be any number; the others have few values. `folds`: how those are told
    as one that are too many, "sum" or "max"."""

    name: str
    kind: str  # "counter", "gauge", "histogram"
    help: str
    samples: Sequence[Sample]
    labels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    folds: str = "sum"
    bounds: tuple[float, ...] = ()  # of a histogram, without the last, which is infinite


SECONDS: Final = tuple(BOUNDS[at] for at in TOLD)
SIZES: Final = tuple(float(1 << power) for power in range(11))  # calls in a batch
OF_ENDPOINT: Final = ("service", "endpoint")


def families(state: State, now: float) -> list[Family]:
    return [*_of_broker(state, now), *_of_calls(state), *_of_services(state), *_of_workers(state)]


def _of_broker(state: State, now: float) -> Iterator[Family]:
    def gauge(name: str, help: str, value: float) -> Family:
        return Family(name, "gauge", help, [((), (value,))])

    taken = sum(bool(holder) for holder in state.slots.values())
    yield gauge("forge_uptime_seconds", "Since the broker started.", now - state.started_at)
    yield gauge(
        "forge_recovering",
        "1 while the broker waits for what its predecessor's peers hold, and dispatches nothing.",
        state.window is not None,
    )
    yield gauge("forge_draining", "1 while the broker ends.", bool(state.terminating))
    yield gauge(
        "forge_loop_lag_seconds",
        "The longest turn of the broker's loop within a minute, 0 if none took 50 ms: so long nobody was spoken to.",
        state.loop_lag_s(now),
    )
    yield gauge("forge_clients", "Clients that are connected, commands that look included.", len(state.clients))
    yield gauge("forge_queued_bytes", "Arguments of calls that have no answer yet.", state.held_bytes)
    yield gauge(
        "forge_shared_memory_bytes",
        "Segments of clients and workers on this machine.",
        sum(link.vitals.get("segment_bytes", 0) for link in state.links.values()),
    )
    yield gauge("forge_dead_letters", "Calls that nobody will try again, kept for `forge dead`.", len(state.dead))
    yield Family(
        "forge_gpus",
        "gauge",
        "GPUs that this broker hands out.",
        [(("taken",), (taken,)), (("free",), (len(state.slots) - taken,))],
        ("use",),
    )
    yield Family(
        "forge_fenced_replies_total",
        "counter",
        "Late replies that were refused, because somebody else had the call, or nobody any more.",
        [((), (state.ledger.fenced,))],
    )
    yield Family(
        "forge_events_total",
        "counter",
        "What the protocol counts: garbage, refusals, reconnections.",
        [((event,), (count,)) for event, count in sorted(state.counters.items())],
        ("event",),
    )


def _of_calls(state: State) -> Iterator[Family]:
    """By endpoint."""
    ours = [(service, one) for service in state.services.values() for one in service.endpoints]
    yield Family(
        "forge_calls_total",
        "counter",
        "Calls by how they ended for their caller; a fan-out is one.",
        [
            ((service.name, one.name, outcome), (count,))
            for service, one in ours
            for outcome, count in one.stats.outcomes.items()
        ],
        (*OF_ENDPOINT, "outcome"),
        OF_ENDPOINT,
    )
    for name, which, text in (
        ("forge_call_wait_seconds", 0, "From acceptance to the dispatch of the attempt that was answered."),
        ("forge_call_run_seconds", 1, "From dispatch to the answer; a fan-out counts on each of its replicas."),
    ):
        samples = [((service.name, one.name), _seconds(one.stats.latency.total()[which])) for service, one in ours]
        yield Family(name, "histogram", text, samples, OF_ENDPOINT, OF_ENDPOINT, bounds=SECONDS)
    yield Family(
        "forge_retries_total",
        "counter",
        "Calls that went back to their queue after an attempt that brought no answer.",
        [((service.name, one.name), (one.stats.retries,)) for service, one in ours],
        OF_ENDPOINT,
        OF_ENDPOINT,
    )
    batching = [(service, one, one.batcher.stats) for service, one in ours if one.batcher is not None]
    yield Family(
        "forge_batches_total",
        "counter",
        "Batches that have left, by what made them leave.",
        [
            ((service.name, one.name, reason), (count,))
            for service, one, stats in batching
            for reason, count in sorted(stats.reasons.items())
        ],
        (*OF_ENDPOINT, "reason"),
        OF_ENDPOINT,
    )
    yield Family(
        "forge_batch_size",
        "histogram",
        "Calls in a batch.",
        [((service.name, one.name), _sizes(stats.sizes, stats.items)) for service, one, stats in batching],
        OF_ENDPOINT,
        OF_ENDPOINT,
        bounds=SIZES,
    )
    yield Family(
        "forge_batch_wait_seconds_total",
        "counter",
        "Seconds that the first calls of batches have waited, all together.",
        [((service.name, one.name), (stats.waited_s,)) for service, one, stats in batching],
        OF_ENDPOINT,
        OF_ENDPOINT,
    )


def _of_services(state: State) -> Iterator[Family]:
    services = list(state.services.values())

    def gauge(name: str, help: str, samples: Iterable[tuple[Service, float]]) -> Family:
        told = [((service.name,), (value,)) for service, value in samples]
        return Family(name, "gauge", help, told, ("service",), ("service",))

    yield Family(
        "forge_queue_length",
        "gauge",
        "Calls that wait: in an endpoint's queue and batches, of sessions without a replica, of suspects, at replicas.",
        [((service.name, queue), (length,)) for service in services for queue, length in _queues(service).items()],
        ("service", "queue"),
        ("service", "queue"),
    )
    yield gauge(
        "forge_in_flight",
        "Room of the replicas that is taken; a batch takes one unit.",
        ((service, sum(replica.active_requests for replica in service.replicas.values())) for service in services),
    )
    yield gauge(
        "forge_room",
        "Room of the healthy replicas, taken or free.",
        ((service, sum(replica.limit for replica in service.pool)) for service in services),
    )
    yield gauge("forge_sessions", "Sessions that are open.", ((service, len(service.sessions)) for service in services))
    yield Family(
        "forge_replicas",
        "gauge",
        "Replicas by state.",
        [
            ((service.name, replica_state.value), (count[replica_state],))
            for service in services
            for count in [Counter(replica.state for replica in service.replicas.values())]
            for replica_state in ReplicaState
        ],
        ("service", "state"),
        ("service",),
    )
    yield gauge(
        "forge_replicas_wanted",
        "Replicas that a service is to have, whatever they do.",
        ((service, service.wanted) for service in services),
    )
    yield gauge(
        "forge_replicas_min",
        "Fewest replicas that scaling may leave.",
        ((service, service.config.limits.least) for service in services),
    )
    # Without autoscaling and without max_replicas there is no limit to come close to.
    most = ((service, service.config.limits.most) for service in services)
    yield gauge(
        "forge_replicas_max",
        "Most replicas that scaling may make.",
        ((service, value) for service, value in most if value < MOST_REPLICAS),
    )
    yield gauge(
        "forge_replicas_pending",
        "Replicas that no worker or GPU can be found for; `forge status` says why.",
        ((service, sum(bool(replica.pending_why) for replica in service.replicas.values())) for service in services),
    )
    yield Family(
        "forge_replica_restarts_total",
        "counter",
        "Replicas that were lost, or told to start anew.",
        [((service.name,), (service.stats.restarts,)) for service in services],
        ("service",),
        ("service",),
    )
    yield Family(
        "forge_scale_events_total",
        "counter",
        "Decisions to add or remove replicas that were carried out, by the rule that fired.",
        [
            ((service.name, direction, rule), (count,))
            for service in services
            for (direction, rule), count in sorted(service.stats.scalings.items())
        ],
        ("service", "direction", "rule"),
        ("service", "rule"),
    )


def _of_workers(state: State) -> Iterator[Family]:
    workers = list(state.workers.values())
    count = Counter(worker.state for worker in workers)
    yield Family(
        "forge_workers",
        "gauge",
        "Worker processes by state.",
        [((one.value,), (count[one],)) for one in WorkerState if one is not WorkerState.GONE],
        ("state",),
    )
    for name, vital, folds, text in (
        ("forge_worker_cpu_seconds_total", "cpu_s", "sum", "CPU time of the process, all its threads."),
        ("forge_worker_memory_bytes", "rss", "sum", "Resident memory."),
        ("forge_worker_gpu_memory_bytes", "gpu_bytes", "sum", "Memory in use on its GPUs, by whomever."),
        ("forge_worker_gpu_utilization_ratio", "gpu_busy", "max", "Share of the time that its GPUs were at work."),
        ("forge_worker_loop_lag_seconds", "lag_s", "max", "How late its loop is."),
        ("forge_worker_oldest_call_seconds", "oldest_s", "max", "Age of the oldest call that runs."),
    ):
        kind = "counter" if name.endswith("_total") else "gauge"
        told = [((worker.name, _runs(worker)), (worker.vitals[vital],)) for worker in workers if vital in worker.vitals]
        yield Family(name, kind, text, told, ("worker", "replica"), ("worker", "replica"), folds)


def _runs(worker: Worker) -> str:
    return worker.replica.name if worker.replica is not None else ""


def _queues(service: Service) -> dict[str, int]:
    found: Counter[str] = Counter(sessions=service.unpinned.length, suspects=service.suspects.length)
    found["parked"] = sum(replica.queue_depth for replica in service.replicas.values())
    shared = service.kind == "actor"  # whose endpoints share a queue
    for endpoint in service.endpoints[:1] if shared else service.endpoints:
        found["calls" if shared else endpoint.name] += _waiting(endpoint)
    return dict(found)


def _waiting(endpoint: Endpoint) -> int:
    return endpoint.queue.length + (0 if endpoint.batcher is None else endpoint.batcher.length)


def _seconds(histogram: Histogram) -> Value:
    seen = list(accumulate(histogram.counts))
    return (*(seen[at] for at in TOLD), seen[-1], histogram.sum_s)


def _sizes(sizes: Counter[int], items: int) -> Value:
    return (*(sum(n for size, n in sizes.items() if size <= bound) for bound in SIZES), sizes.total(), items)
