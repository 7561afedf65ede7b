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
        "batches": {},
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
        "vitals": {"rss": 350 << 20, "oldest_s": 0.4, "cpu_share": 1.25, "gpu_busy": 0.37, "gpu_bytes": 3 << 30},
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


def test_shared_memory_is_told_of_where_there_is_some_or_too_little() -> None:
    none = {"on": True, "bytes": 0, "refused": 0}
    assert "shared memory" not in shown(status_page(status(service(), shared_memory=none), "ipc:///b"))
    some = {"on": True, "bytes": 3 << 20, "refused": 12}
    text = shown(status_page(status(service(), shared_memory=some), "ipc:///b"), width=200)
    assert "3.0 MiB of shared memory · no room in it for 12 payloads, which travelled" in text


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


LINES = [f"line {number}" for number in range(1, 8)]


def told_of(last_error: str, width: int = 80, **options: Any) -> list[str]:
    """The lines from a replica's last error on."""
    died = replica("gen/1", state="UNHEALTHY", healthy=False, restarts=4, last_error=last_error)
    lines = shown(status_page(status(service(replicas=[died])), "ipc:///b", **options), width).splitlines()
    return lines[next(at for at, line in enumerate(lines) if "last error" in line) :]


def test_of_the_stderr_of_what_died_the_last_five_lines_are_shown_and_the_rest_counted() -> None:
    """F7: the last ones say what it died of."""
    error = "\n  ".join(["rank 0: exited with 3", *LINES])
    assert told_of(error) == [
        "gen/1 last error: rank 0: exited with 3",
        "    … 2 lines before: forge status --verbose",
        *(f"    {line}" for line in LINES[2:]),
    ]
    assert told_of(error, verbose=True)[1:] == [f"    {line}" for line in LINES]


def test_a_long_line_of_stderr_is_cut_at_the_edge_of_the_screen_unless_all_is_wanted() -> None:
    """F7"""
    error = f"rank 0: died of SIGSEGV\n  {'x' * 200}"
    (_, line) = told_of(error)
    assert (len(line), line[-1]) == (80, "…")
    assert sum(line.count("x") for line in told_of(error, verbose=True)) == 200


def test_what_a_process_wrote_before_it_died_cannot_steer_the_terminal() -> None:
    (_, line) = told_of("rank 0: exited with 1\n  \x1b[2J\ttab")
    assert line == "    \ufffd[2J tab"


def test_a_lost_worker_says_for_how_long_and_what_it_keeps() -> None:
    """F1: the slot of a silent worker on another host stays taken until it is heard from."""
    lost = worker(state="LOST", hostname="far", silent_s=42.0, gpus=["0", "1"], replica=None, rank=None)
    text = shown(status_page(status(service(), workers=(lost,)), "ipc:///b"), width=200)
    assert "LOST" in text
    assert "w-0123456789abcdef on far is lost: nothing was heard of it for 42 s; GPU 0, 1 there stays taken" in text


def test_a_recovering_broker_says_for_how_long_and_what_it_misses() -> None:
    """F10"""
    missing = ["the client that started gen", *(f"rank 0, 1 of gen/{idx}" for idx in range(9))]
    some = shown(status_page(status(recovering={"until_s": 2.5, "missing": missing}), "ipc:///b"), width=200)
    assert "recovering for another 2.5 s, still missing: the client that started gen; rank 0, 1 of gen/0; rank" in some
    assert "rank 0, 1 of gen/3; and 5 more" in some
    page = status_page(status(recovering={"until_s": 2.5, "missing": missing}), "ipc:///b", verbose=True)
    assert "gen/8" in shown(page, width=200)
    nothing = status_page(status(recovering={"until_s": 2.5, "missing": []}), "ipc:///b")
    assert "nothing that is known of is missing" in shown(nothing)
    assert "recovering" not in shown(status_page(status(recovering=None), "ipc:///b"))


def test_dead_letters_are_counted_with_where_to_look() -> None:
    """F4"""
    assert "2 dead letters: see `forge dead list`" in shown(status_page(status(dead_letters=2), "ipc:///b"))
    assert "dead letter" not in shown(status_page(status(dead_letters=0), "ipc:///b"))


def test_a_service_says_how_many_of_its_replicas_are_draining() -> None:
    """F9"""
    leaving = [replica("gen/0"), replica("gen/1", state="DRAINING", healthy=False)]
    text = shown(status_page(status(service(replicas=leaving)), "ipc:///b"))
    assert "1 of 2" in text
    assert "1 draining" in text


def test_queues_in_which_something_waits_are_named() -> None:
    text = shown(status_page(status(service(queues={"gen.predict": 10_000, "gen.version": 0})), "ipc:///b"))
    (line,) = (line.split() for line in text.splitlines() if line.startswith("gen.predict"))
    assert line == ["gen.predict", "10,000"]
    assert "gen.version" not in text


def test_batches_that_have_left_are_shown_with_why() -> None:
    """B3."""
    figures = {"batches": 1200, "avg_size": 31.52, "avg_wait_s": 0.0042, "reasons": {"timeout": 20, "size": 1180}}
    text = shown(status_page(status(service(batches={"embed": figures})), "ipc:///b"))
    (line,) = (line.split() for line in text.splitlines() if line.startswith("gen.embed"))
    assert line == ["gen.embed", "1,200", "31.5", "4.2", "ms", "size", "1,180,", "timeout", "20"]
    none_left = {"batches": 0, "avg_size": 0.0, "avg_wait_s": 0.0, "reasons": {}}
    assert "BATCHES" not in shown(status_page(status(service(batches={"embed": none_left})), "ipc:///b"))


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


def test_workers_say_how_busy_they_and_their_gpus_are_where_there_is_room_for_it() -> None:
    wide = shown(worker_table([worker(), worker(vitals={})], wide=True), width=200)
    assert "125%" in wide
    assert "37%     3.0 GiB" in wide
    assert "37%" not in shown(worker_table([worker()]), width=200)


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


def test_spares_are_told_with_their_service_and_their_processes_and_why_there_are_not_more() -> None:
    """X2."""
    one = service(spares={"wanted": 2, "ready": 1, "starting": 0, "why": "the last one failed: no torch\n  Traceback"})
    spare = worker(state="WARM", replica=None, rank=None, spare_of="gen")
    text = shown(status_page(status(one, workers=(spare,)), "ipc:///b.sock"), 120)
    assert "1 of 2 spares ready" in text
    assert "spare of gen" in text
    assert "gen has fewer spares than wanted: the last one failed: no torch\n    Traceback" in text


def test_a_service_says_whether_its_workers_are_forked_and_why_not() -> None:
    """X2."""
    forked = service(preload={"wanted": True, "ready": True, "why": ""})
    started = service(preload={"wanted": True, "ready": False, "why": "its import started threads: pool"})
    assert "preloaded" in shown(status_page(status(forked), "ipc:///b.sock"), 120)
    text = shown(status_page(status(started), "ipc:///b.sock"), 120)
    assert "gen is not preloaded: its import started threads: pool" in text


def test_healthy_is_told_of_those_that_are_wanted() -> None:
    """X2: one that leaves is not missed, and one that has no replica yet is."""
    leaving = [replica("gen/0"), replica("gen/1", state="DRAINING", healthy=False)]
    text = shown(status_page(status(service(replicas=leaving, scaling={"wanted": 1})), "ipc:///b"))
    assert "1 of 1" in text
    assert "1 draining" in text
