"""What a client is told of its service's figures (X4): the original's names and keys, and what we know beyond them.

Rates, latencies and quantiles are over the last minute, counts since the service began. Replicas are columns, as all on the wire that
there may be a thousand of. `telling` pushes this, `control` answers with it; a scrape is told by `families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forge_broker.core.latency import Histogram, merged
from forge_broker.core.replicas import Replica
from forge_broker.core.services import Endpoint, Service
from forge_contract.messages import column


def metrics(service: Service, now: float) -> dict[str, Any]:
    """Queue depth counts endpoint queues and parked calls, over healthy replicas."""
    replicas = list(service.replicas.values())
    healthy = len(service.pool.members)
    queued = sum(queue.length for queue in service.queues) + sum(replica.queue_depth for replica in replicas)
    recent = [endpoint.stats.latency.recent(now) for endpoint in service.endpoints]
    rows = [_replica(replica, now) for replica in replicas]
    return {
        "service": {
            "total_sessions": len(service.sessions),
            "healthy_replicas": healthy,
            "total_replicas": len(replicas),
            "total_request_rate": sum(row["request_rate"] for row in rows),
            "avg_queue_depth": queued / max(1, healthy),
            "avg_capacity_utilization": sum(replica.capacity_utilization for replica in service.pool) / max(1, healthy),
            "sessions_per_replica": {replica.idx: replica.sessions for replica in replicas if replica.sessions},
            # From here on not the original's.
            "latency": _latency(merged(wait for wait, _ in recent), merged(run for _, run in recent)),
            "retries": sum(endpoint.stats.retries for endpoint in service.endpoints),
            "restarts": service.stats.restarts,
            "wanted_replicas": service.wanted,
            "scalings": {
                direction: sum(n for (to, _), n in service.stats.scalings.items() if to == direction)
                for direction in ("up", "down")
            },
            "endpoints": {
                endpoint.name: _endpoint(endpoint, *latency)
                for endpoint, latency in zip(service.endpoints, recent, strict=True)
            },
            **({"batches": batches(service)} if service.batches else {}),
        },
        "replicas": columns(rows),
    }


def batches(service: Service) -> dict[str, Any]:
    """By endpoint that batches, `BatchStats.snapshot`."""
    return {one.name: one.batcher.stats.snapshot() for one in service.endpoints if one.batcher is not None}


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: column([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _replica(replica: Replica, now: float) -> dict[str, Any]:
    stats = replica.stats
    wait, run = stats.latency.recent(now)
    return {
        "idx": replica.idx,
        "total_requests": stats.total,
        "successful_requests": stats.succeeded,
        "failed_requests": stats.failed,
        "request_rate": stats.window.rate(now),
        "avg_latency": stats.window.mean_latency_s(now),
        "active_requests": replica.active_requests,
        "queue_depth": replica.queue_depth,
        "assigned_sessions": replica.sessions,
        "capacity_utilization": replica.capacity_utilization,
        "restarts": replica.restarts,
        "wait_p50": wait.quantile(0.5),
        "wait_p90": wait.quantile(0.9),
        "wait_p99": wait.quantile(0.99),
        "run_p50": run.quantile(0.5),
        "run_p90": run.quantile(0.9),
        "run_p99": run.quantile(0.99),
    }


def _endpoint(endpoint: Endpoint, wait: Histogram, run: Histogram) -> dict[str, Any]:
    return {
        "outcomes": {outcome: count for outcome, count in endpoint.stats.outcomes.items() if count},
        "retries": endpoint.stats.retries,
        "latency": _latency(wait, run),
    }


def _latency(wait: Histogram, run: Histogram) -> dict[str, Any]:
    return {"wait": wait.snapshot(), "run": run.snapshot()}
