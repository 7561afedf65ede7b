"""The figures of a service as its users read them (X4): the latest that the broker pushed, or fresh ones when awaited.

The keys below are the original's and always there; what the broker tells beyond them is there as well, under its names
(docs/observability.md). `service.get_metrics()` gives a `LatestMetrics`: usable at once, or `await service.get_metrics()` for the broker's
answer of now. The names are the original service's, so that dashboards written for it read on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

from forge_contract.messages import spread

SERVICE_KEYS = {
    "total_sessions": 0,
    "healthy_replicas": 0,
    "total_replicas": 0,
    "total_request_rate": 0.0,  # calls/s over a sliding window
    "avg_queue_depth": 0.0,  # calls waiting per healthy replica
    "avg_capacity_utilization": 0.0,  # 0.0 … 1.0
}
REPLICA_KEYS = {
    "total_requests": 0,
    "successful_requests": 0,
    "failed_requests": 0,
    "request_rate": 0.0,  # calls/s over a sliding window
    "avg_latency": 0.0,  # seconds
    "active_requests": 0,
    "queue_depth": 0,
    "assigned_sessions": 0,
    "capacity_utilization": 0.0,  # 0.0 … 1.0
}


class ReplicaMetrics:
    """One replica's figures as attributes (`REPLICA_KEYS`), and its `idx`."""

    def __init__(self, idx: int, figures: dict[str, Any]) -> None:
        self.idx = idx
        self.figures = {**REPLICA_KEYS, **figures}

    def __getattr__(self, name: str) -> Any:
        figures: dict[str, Any] = self.__dict__.get("figures", {})
        if name in figures:
            return figures[name]
        raise AttributeError(f"a replica has no figure {name!r}; it has {', '.join(figures)}")

    def __repr__(self) -> str:
        return f"<ReplicaMetrics {self.idx} {self.active_requests} active, {self.queue_depth} queued>"


def _rows(columns: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Replicas come as columns, with their numbers in `idx` (PROTOCOL.md §7)."""
    # One replica, or many that are alike, which replicas' numbers never are.
    found = columns.get("idx")
    numbers = [] if found is None else found if isinstance(found, list) else [found]
    spreads = {name: spread(values, len(numbers)) for name, values in columns.items() if name != "idx"}
    return {idx: {name: values[at] for name, values in spreads.items()} for at, idx in enumerate(numbers)}


class Metrics:
    """A service's figures as attributes (`SERVICE_KEYS`, `sessions_per_replica`), those of its replicas by index in
    `replica_metrics`, and both as plain dicts in `summary`."""

    def __init__(self, snapshot: Any = None) -> None:
        given = snapshot if isinstance(snapshot, dict) else {}
        rows = _rows(given.get("replicas") or {})
        told: dict[str, Any] = given.get("service") or {}
        # Told are only those that have sessions.
        sessions = {**dict.fromkeys(sorted(rows), 0), **(told.get("sessions_per_replica") or {})}
        self.service: dict[str, Any] = {**SERVICE_KEYS, **told, "sessions_per_replica": sessions}
        self.replica_metrics = {idx: ReplicaMetrics(idx, rows[idx]) for idx in sorted(rows)}

    def __getattr__(self, name: str) -> Any:
        figures: dict[str, Any] = self.__dict__.get("service", {})
        if name in figures:
            return figures[name]
        raise AttributeError(f"a service has no figure {name!r}; it has {', '.join(figures)}")

    def __repr__(self) -> str:
        return f"<Metrics {self.healthy_replicas}/{self.total_replicas} healthy, {self.total_request_rate:.1f} calls/s>"

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "service": dict(self.service),
            "replicas": {idx: dict(one.figures) for idx, one in self.replica_metrics.items()},
        }

    # The original's methods took the list of replicas; the broker knows it.

    def get_total_request_rate(self, replicas: object = None) -> float:
        """Calls/s across all replicas."""
        return float(self.service["total_request_rate"])

    def get_avg_queue_depth(self, replicas: object = None) -> float:
        """Calls waiting per healthy replica."""
        return float(self.service["avg_queue_depth"])

    def get_avg_capacity_utilization(self, replicas: object = None) -> float:
        """0.0 … 1.0 of all room in use."""
        return float(self.service["avg_capacity_utilization"])

    def get_sessions_per_replica(self, replicas: object = None) -> dict[int, int]:
        """Replica index to the sessions pinned there."""
        return dict(self.service["sessions_per_replica"])


class LatestMetrics(Metrics):
    """The latest snapshot; awaited, a fresh one."""

    def __init__(self, latest: Metrics, refresh: Callable[[], Awaitable[Metrics]]) -> None:
        self.service = latest.service
        self.replica_metrics = latest.replica_metrics
        self._refresh = refresh

    def __await__(self) -> Generator[Any, None, Metrics]:
        return self._refresh().__await__()


class LatestSummary(dict[str, Any]):
    """The latest `{"service": …, "replicas": {idx: …}}`; awaited, a fresh one."""

    def __init__(self, latest: Metrics, refresh: Callable[[], Awaitable[Metrics]]) -> None:
        super().__init__(latest.summary)
        self._refresh = refresh

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        return self._fresh().__await__()

    async def _fresh(self) -> dict[str, Any]:
        return (await self._refresh()).summary
