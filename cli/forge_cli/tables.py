"""The broker's answers as text for people: plain dicts in (`forge_broker.core.status` makes them), rich renderables out.

No broker and no terminal in here. A page has to be readable at 80 columns, so what is zero everywhere is left out, and what is
long (why a replica waits, its last error) stands in lines of its own below the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

STYLES: Final = {
    "HEALTHY": "green",
    "READY": "green",
    "IDLE": "cyan",
    "WARM": "cyan",
    "UNINITIALIZED": "yellow",
    "STARTING": "yellow",
    "LOADING": "yellow",
    "WARMING": "yellow",
    "DRAINING": "yellow",
    "RECOVERING": "yellow",
    "UNHEALTHY": "bold red",
    "LOST": "bold red",
}
LAG_SHOWN_FROM_S: Final = 0.1
MISSING_SHOWN: Final = 5
ERROR_LINES_SHOWN: Final = 5  # of a replica's stderr; `--verbose` shows all that the broker kept
SESSIONS_SHOWN: Final = 10  # there may be thousands; `forge status --json` has more, `forge explain` any of them


def status_page(status: Mapping[str, Any], address: str, note: str = "", *, verbose: bool = False) -> RenderableType:
    """All of `forge status`. `note`: what is wrong with the page itself, such as its age. `verbose`: last errors in full."""
    services = status["services"]
    parts: list[RenderableType] = [_head(status, address, note, verbose)]
    if services:
        parts += [
            _services(services),
            _replicas(services),
            _queues(services),
            *_batches(services),
            *_sessions(services),
        ]
    else:
        parts.append(Text("no services; `forge deploy module:Class --name gen` starts one", "dim"))
    parts.append(worker_table(status["workers"]))
    trouble = [*troubles(services, verbose), *_lost(status["workers"])]
    if trouble:
        parts.append(Group(*trouble))
    # An empty line between two parts.
    return Group(*(one for at, part in enumerate(parts) for one in ((Text(), part) if at else (part,))))


def _head(status: Mapping[str, Any], address: str, note: str, verbose: bool) -> Text:
    gpus = status["gpus"]
    free = sum(not holder for holder in gpus.values())
    facts = [
        f"up {duration(status['uptime_s'])}",
        _count(status["clients"], "client"),
        _count(len(status["workers"]), "worker"),
        f"{status['launches']} of {status['max_workers']} processes launched",
        f"{free} of {_count(len(gpus), 'GPU')} free" if gpus else "no GPUs",
    ]
    facts += [f"{size(status['queued_bytes'])} of arguments held"] if status["queued_bytes"] >= 1 << 20 else []
    facts += _shared(status.get("shared_memory") or {})
    facts += (
        [f"{_count(status['fenced_replies'], 'late reply', 'late replies')} refused"]
        if status["fenced_replies"]
        else []
    )
    facts += (
        [f"its loop stood still for {status['loop_lag_s']:.1f} s within a minute"]
        if status.get("loop_lag_s", 0.0) >= LAG_SHOWN_FROM_S
        else []
    )
    head = Text.assemble((f"broker at {address}", "bold"), "\n", " · ".join(facts))
    dead = status.get("dead_letters") or 0
    for style, said in (
        ("bold yellow", _recovering(status.get("recovering"), verbose)),
        ("bold yellow", status["terminating"] and f"ending: {status['terminating']}"),
        ("yellow", dead and f"{_count(dead, 'dead letter')}: see `forge dead list`"),
        ("bold red", note),
    ):
        if said:
            head.append(f"\n{said}", style)
    return head


def _recovering(window: Mapping[str, Any] | None, verbose: bool) -> str:
    """What the recovery window waits for (F10); empty when there is none."""
    if not window:
        return ""
    missing = list(window["missing"])
    shown = missing if verbose else missing[:MISSING_SHOWN]
    more = f"; and {len(missing) - len(shown):,} more" if len(missing) > len(shown) else ""
    awaited = f"still missing: {'; '.join(shown)}{more}" if missing else "nothing that is known of is missing"
    return f"recovering for another {duration(window['until_s'])}, {awaited}"


def _services(services: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("SERVICE", "~CLASS", "#HEALTHY", "#WAITING", "#SESSIONS", "#CALLS/S", "~")
    for service in services:
        replicas = service["replicas"]
        healthy = sum(replica["healthy"] for replica in replicas)
        wanted = service.get("scaling", {}).get("wanted", len(replicas))
        draining = sum(replica["state"] == "DRAINING" for replica in replicas)
        waiting = sum(service["queues"].values()) + sum(replica["queue_size"] for replica in replicas)
        remarks = [
            "stopping" if service["stopping"] else f"{draining} draining" if draining else "",
            "actor" if service["kind"] == "actor" else "",
            _spares(service.get("spares") or {}),
            "preloaded" if (service.get("preload") or {}).get("ready") else "",
            "" if service["detached"] else "ends with its client",
        ]
        table.add_row(
            service["name"],
            service["class_name"],
            Text(f"{healthy} of {wanted}", "green" if healthy == wanted else "yellow"),
            _number(waiting),
            _number(service["sessions"]),
            f"{service['request_rate']:.1f}",
            Text(", ".join(remark for remark in remarks if remark), "dim"),
        )
    return table


def _spares(spares: Mapping[str, Any]) -> str:
    wanted = spares.get("wanted", 0)
    return f"{spares['ready']} of {_count(wanted, 'spare')} ready" if wanted else ""


def _replicas(services: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("REPLICA", "STATE", "#IN FLIGHT", "#PARKED", "#SESSIONS", "#CALLS", "#RESTARTS")
    for replica in (replica for service in services for replica in service["replicas"]):
        table.add_row(
            replica["name"],
            state(replica["state"]),
            f"{replica['active_requests']} of {replica['max_concurrent_requests']}",
            _number(replica["queue_size"]),
            _number(replica["sessions"]),
            _number(replica["total_requests"]),
            _number(replica["restarts"]),
        )
    return table


def _queues(services: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Those in which something waits."""
    waiting = [(name, length) for service in services for name, length in service["queues"].items() if length]
    if not waiting:
        return Text("queues: all empty", "dim")
    table = _table("QUEUE", "#WAITING")
    for name, length in waiting:
        table.add_row(name, _number(length))
    return table


def _batches(services: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Of endpoints that batch, what has left."""
    rows = [(service["name"], name, one) for service in services for name, one in service["batches"].items()]
    if not any(one["batches"] for _, _, one in rows):
        return []
    table = _table("BATCHES OF", "#BATCHES", "#CALLS EACH", "#WAITED", "LEFT FOR")
    for service_name, name, one in rows:
        reasons = sorted(one["reasons"].items(), key=lambda pair: -pair[1])
        table.add_row(
            f"{service_name}.{name}",
            _number(one["batches"]),
            f"{one['avg_size']:.1f}",
            f"{one['avg_wait_s'] * 1000:.1f} ms",
            ", ".join(f"{reason} {count:,}" for reason, count in reasons),
        )
    return [table]


def _sessions(services: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    total = sum(service["sessions"] for service in services)
    if not total:
        return []
    table = _table("SESSION", "REPLICA")
    shown = [(service, session) for service in services for session in service["active_sessions"]][:SESSIONS_SHOWN]
    for service, session in shown:
        idx = service["session_replica_map"].get(session)
        table.add_row(session, f"{service['name']}/{idx}" if idx is not None else Text("not called yet", "dim"))
    if total > len(shown):
        table.add_row(Text(f"… and {total - len(shown):,} more", "dim"), "")
    return [table]


def worker_table(workers: Sequence[Mapping[str, Any]], *, wide: bool = False) -> RenderableType:
    """`forge workers`, and the end of `forge status`. `wide`: how busy its GPUs are, for which 80 columns have no room."""
    if not workers:
        return Text("no workers", "dim")
    with_gpus = any(worker["gpus"] for worker in workers)
    labelled = any(worker["labels"] for worker in workers)
    busy = wide and any({"gpu_busy", "gpu_bytes"} & worker["vitals"].keys() for worker in workers)
    columns = [
        "WORKER",
        "STATE",
        "RUNS",
        "GPUS" if with_gpus else "",
        "#GPU" if busy else "",
        "#GPU MEMORY" if busy else "",
    ]
    columns += ["~HOST", "#PID", "#CPU", "#MEMORY", "#OLDEST"]
    table = _table(*(column for column in columns if column), *(["~LABELS"] if labelled else []))
    for worker in workers:
        vitals = worker["vitals"]
        oldest_s = vitals.get("oldest_s") or 0.0
        cells: list[str | Text] = [
            worker["name"],
            state(worker["state"]),
            _runs(worker),
        ]
        cells += [",".join(worker["gpus"]) or Text("–", "dim")] if with_gpus else []
        cells += (
            [_share(vitals.get("gpu_busy")), size(vitals["gpu_bytes"]) if "gpu_bytes" in vitals else ""] if busy else []
        )
        cells += [
            worker["hostname"],
            str(worker["pid"]),
            _share(vitals.get("cpu_share")),
            size(vitals["rss"]) if vitals.get("rss") else "",
            duration(oldest_s) if oldest_s else Text("–", "dim"),
        ]
        cells += [" ".join(f"{key}={value}" for key, value in worker["labels"].items())] if labelled else []
        table.add_row(*cells)
    return table


def _runs(worker: Mapping[str, Any]) -> str | Text:
    if worker["replica"] is not None:
        return f"{worker['replica']}.{worker['rank']}"
    return f"spare of {worker['spare_of']}" if worker.get("spare_of") else Text("–", "dim")


def _share(share: float | None) -> str:
    """`140%`: of one core, or of all a worker's GPUs."""
    return "" if share is None else f"{share:.0%}"


def troubles(services: Sequence[Mapping[str, Any]], verbose: bool = False) -> list[Text]:
    """Why replicas and spares wait, and what last went wrong with them: a paragraph each, the lines of its stderr indented below."""
    told: list[Text] = []
    for service in services:
        if why := (service.get("spares") or {}).get("why"):
            head, *lines = why.splitlines()
            told.append(Text(f"{service['name']} has fewer spares than wanted: {_printable(head)}", "yellow"))
            told += _stderr(lines, verbose)
        if why := (service.get("preload") or {}).get("why"):
            told.append(Text(f"{service['name']} is not preloaded: {_printable(why)}", "yellow"))
    for replica in (replica for service in services for replica in service["replicas"]):
        if replica["pending"]:
            told.append(Text(f"{replica['name']} is pending, because it {_printable(replica['pending'])}", "yellow"))
        if replica["last_error"]:
            head, *lines = replica["last_error"].splitlines()
            told.append(Text(f"{replica['name']} last error: {_printable(head)}", "yellow"))
            told += _stderr(lines, verbose)
    return told


def _stderr(lines: Sequence[str], verbose: bool) -> list[Text]:
    """The last of them, as the last say what it died of, each cut at the edge of the screen."""
    shown = lines if verbose else lines[-ERROR_LINES_SHOWN:]
    told = []
    if len(shown) < len(lines):
        told.append(Text(f"    … {_count(len(lines) - len(shown), 'line')} before: forge status --verbose", "dim"))
    for line in shown:
        text = f"    {_printable(line.removeprefix('  '))}"
        told.append(Text(text, "dim") if verbose else Text(text, "dim", no_wrap=True, overflow="ellipsis"))
    return told


def _lost(workers: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Silent on another host: what they hold stays taken until they are heard from (F1)."""
    told = []
    for worker in (worker for worker in workers if worker["state"] == "LOST"):
        gpus = f"; GPU {', '.join(worker['gpus'])} there stays taken until it is heard from" if worker["gpus"] else ""
        silent = f"nothing was heard of it for {duration(worker['silent_s'])}"
        told.append(Text(f"{worker['name']} on {worker['hostname']} is lost: {silent}{gpus}", "yellow"))
    return told


def decisions_page(answer: Mapping[str, Any]) -> RenderableType:
    """`forge why-scale`."""
    least, most = answer["limits"]
    by = f"scales by itself ({answer['policy']})" if answer["policy"] else "scales by hand alone"
    wanted = _count(answer["wanted"], "replica")
    head = Text(f"{answer['name']} wants {wanted}, {least} to {most} are allowed, and {_printable(by)}", "bold")
    if not answer["decisions"]:
        return Group(head, Text("nothing was decided yet", "dim"))
    table = _table("AGO", "#CHANGE", "#WANTED", "RULE", "WHY")
    for one in answer["decisions"]:
        ago = duration(one["last_s"])
        times = f" ({one['count']:,} times in {duration(one['first_s'] - one['last_s'])})" if one["count"] > 1 else ""
        change = (
            Text(f"{one['delta']:+d}", "green" if one["delta"] > 0 else "yellow") if one["delta"] else Text("0", "dim")
        )
        reason = Text(_printable(one["reason"]) + times, "" if one["delta"] else "dim")
        table.add_row(ago, change, _number(one["wanted"]), _printable(one["rule"]), reason)
    table.columns[-1].no_wrap = False
    return Group(head, Text(), table)


def dead_table(letters: Sequence[Mapping[str, Any]]) -> RenderableType:
    """`forge dead list`."""
    if not letters:
        return Text("no dead letters", "dim")
    table = _table("DEAD LETTER", "ENDPOINT", "#ATTEMPTS", "#DIED", "#ARGUMENTS", "~WHY")
    for letter in letters:
        table.add_row(
            letter["id"],
            _called(letter),
            _number(letter["attempts"]),
            f"{duration(letter['died'])} ago",
            size(letter["bytes"]),
            _printable(letter["why"].partition("\n")[0]),
        )
    return table


def dead_page(letter: Mapping[str, Any]) -> RenderableType:
    """`forge dead show`."""
    died = f"{duration(letter['died'])} ago, after {_count(letter['attempts'], 'attempt')}"
    why, *lines = letter["why"].splitlines() or [""]
    return Group(
        Text(f"{letter['id']} called {_called(letter)} and died {died}", "bold"),
        Text(f"the last time: {_printable(why)}", "yellow"),
        *_stderr(lines, verbose=True),
        Text(f"{size(letter['bytes'])} of arguments are kept for `forge dead retry {letter['id']}`"),
        Text(),
        *(Text(_printable(line)) for line in letter["story"]),
    )


def _called(letter: Mapping[str, Any]) -> str:
    return f"{letter['service']}.{letter['endpoint']}"


def _printable(text: str) -> str:
    """Without what would move the cursor or recolour the screen: the text was written by a process that died."""
    return "".join(one if one.isprintable() else " " if one == "\t" else "\ufffd" for one in text)


def state(name: str) -> Text:
    return Text(name, STYLES.get(name, ""))


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `5 h 10 min`, `2 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _shared(memory: Mapping[str, Any]) -> list[str]:
    facts = [f"{size(memory['bytes'])} of shared memory"] if memory.get("bytes", 0) >= 1 << 20 else []
    if refused := memory.get("refused", 0):
        facts.append(f"no room in it for {_count(refused, 'payload')}, which travelled")
    return facts


def size(count: float) -> str:
    """Bytes as people say them: `812 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _table(*columns: str) -> Table:
    """`#` marks a column of numbers, `~` one that is cut where there is no room. No boxes: a pipe wants columns, and 80 columns
    have no room for lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # What is not marked is whole: a name that is cut could not be pasted into `forge explain`.
        table.add_column(
            column.lstrip("#~"),
            justify="right" if column.startswith("#") else "left",
            no_wrap=not column.startswith("~"),
            overflow="ellipsis",
        )
    return table


plain_table = _table  # what other pages are made of, too


def _number(value: int) -> str | Text:
    return f"{value:,}" if value else Text("0", "dim")


def _count(number: int, word: str, words: str = "") -> str:
    return f"{number:,} {word if number == 1 else words or word + 's'}"
