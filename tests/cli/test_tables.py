"""How the broker's answers look: from plain dicts to text, at the width of a terminal and of a pipe."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from forge_cli.tables import duration, size, status_page, worker_table


def shown(page: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, emoji=False, highlight=False).print(page)
    return stream.getvalue()


def replica(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": "HEALTHY",
        "healthy": True,
        "active_requests": 3,
        "max_concurrent_requests": 10,
        "queue_size": 0,
        "sessions": 0,
        "restarts": 0,
        "last_error": "",
        "pending": "",
        "total_requests": 1234567,
        **fields,
    }


def service(**fields: Any) -> dict[str, Any]:
    return {
        "name": "gen",
        "kind": "service",
        "class_name": "Generator",
        "detached": True,
        "stopping": False,
        "replicas": [replica("gen/0"), replica("gen/1")],
        "queues": {"gen.predict": 0},
        "active_sessions": [],
        "sessions": 0,
        "session_replica_map": {},
        "request_rate": 4.0,
        **fields,
    }


def worker(**fields: Any) -> dict[str, Any]:
    return {
        "name": "w-0123456789abcdef",
        "state": "READY",
        "hostname": "a-machine-with-a-long-name.cluster.example",
        "pid": 4711,
        "gpus": ["0"],
        "labels": {},
        "replica": "gen/0",
        "rank": 0,
        "vitals": {"rss": 350 << 20, "oldest_s": 0.4},
        **fields,
    }


def status(*services: dict[str, Any], workers: tuple[dict[str, Any], ...] = (), **fields: Any) -> dict[str, Any]:
    return {
        "uptime_s": 75.0,
        "terminating": "",
        "clients": 1,
        "services": list(services),
        "workers": list(workers),
        "gpus": {"0": "gen/0.0", "1": ""},
        "launches": 1,
        "max_workers": 64,
        "queued_bytes": 0,
        "fenced_replies": 0,
        **fields,
    }


def test_a_page_fits_into_80_columns_and_cuts_no_workers_name() -> None:
    text = shown(status_page(status(service(), workers=(worker(),)), "ipc:///run/user/7/forge/broker.sock"))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "w-0123456789abcdef" in text
    assert "up 75 s · 1 client · 1 worker · 1 of 64 processes launched · 1 of 2 GPUs free" in text
    assert "1,234,567" in text
    assert "3 of 10" in text


def test_why_a_replica_waits_and_its_last_error_are_told_in_full() -> None:
    """A3, F7"""
    trouble = [
        replica("gen/0", state="UNINITIALIZED", healthy=False, pending="needs 2 GPUs; 1 is free"),
        replica("gen/1", state="RECOVERING", healthy=False, last_error="signal SIGKILL [bold]x[/bold]"),
    ]
    text = shown(status_page(status(service(replicas=trouble)), "ipc:///b"))
    assert "0 of 2" in text
    assert "gen/0 is pending, because it needs 2 GPUs; 1 is free" in text
    assert "gen/1 last error: signal SIGKILL [bold]x[/bold]" in text


def test_queues_in_which_something_waits_are_named() -> None:
    text = shown(status_page(status(service(queues={"gen.predict": 10_000, "gen.version": 0})), "ipc:///b"))
    (line,) = (line.split() for line in text.splitlines() if line.startswith("gen.predict"))
    assert line == ["gen.predict", "10,000"]
    assert "gen.version" not in text


def test_of_many_sessions_a_few_are_shown_and_the_rest_counted() -> None:
    names = [f"s-{number}" for number in range(1000)]
    many = service(sessions=1000, active_sessions=names, session_replica_map={"s-0": 1})
    text = shown(status_page(status(many), "ipc:///b"))
    assert "s-0" in text
    assert "gen/1" in text
    assert "not called yet" in text
    assert "… and 990 more" in text
    assert len(text.splitlines()) < 40


def test_a_broker_without_services_says_how_to_get_one() -> None:
    assert "forge deploy" in shown(status_page(status(), "ipc:///b"))


def test_a_page_says_that_it_is_old_and_that_the_broker_is_ending() -> None:
    text = shown(status_page(status(terminating="a signal"), "ipc:///b", note="no answer from the broker for 3.0 s"))
    assert "ending: a signal" in text
    assert "no answer from the broker for 3.0 s" in text


def test_labels_and_gpus_have_columns_only_where_there_are_some() -> None:
    bare = shown(worker_table([worker(gpus=[])]))
    assert "GPUS" not in bare
    assert "LABELS" not in bare
    assert "zone=a" in shown(worker_table([worker(labels={"zone": "a"})]), width=200)


def test_a_worker_that_has_sent_no_heartbeat_yet_is_shown_too() -> None:
    assert "IDLE" in shown(worker_table([worker(state="IDLE", replica=None, rank=None, vitals={})]))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (61, "61 s"), (200, "3 min"), (7260, "2 h 1 min"), (2e5, "2 d 7 h")],
)
def test_durations_are_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812 B"), (1536, "1.5 KiB"), (350 << 20, "350 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_as_people_say_them(count: int, text: str) -> None:
    assert size(count) == text
