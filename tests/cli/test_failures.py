"""Deaths, drains and restarts seen through the command, against a real broker with real workers."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.running import BOUND_S, Place, Started


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Each look is a command, which is pause enough."""
    deadline = time.monotonic() + BOUND_S
    while not holds():
        assert time.monotonic() < deadline, what


def replicas(place: Place, name: str = "gen") -> dict[str, dict[str, Any]]:
    """Of a service: name → what the broker says of it."""
    (service,) = [service for service in place.status()["services"] if service["name"] == name]
    return {replica["name"]: replica for replica in service["replicas"]}


@contextmanager
def running_call(place: Place, name: str) -> Iterator[tuple[Started, Path]]:
    """`forge call gen.until`, seen to run in a worker; it goes on until somebody makes the file."""
    path = place.directory / name
    with place.start("call", "gen.until", json.dumps([str(path)])) as call:
        wait_until(Path(f"{path}.started").exists, "the call has started")
        yield call, path


def outcome(call: Started) -> tuple[int, str]:
    code = call.process.wait(BOUND_S)
    assert call.process.stdout is not None
    return code, call.process.stdout.read()


def test_a_drained_worker_finishes_its_call_and_its_replica_starts_anew_in_another(served: Place) -> None:
    """F9, X2: nobody's call fails."""
    before = replicas(served)
    with running_call(served, "drained") as (call, path):
        (busy,) = [one for one in replicas(served).values() if one["active_requests"]]
        (worker,) = busy["workers"]
        with served.start("drain", worker[:12]) as draining:
            wait_until(lambda: replicas(served)[busy["name"]]["state"] != "HEALTHY", "it drains")
            path.touch()
            assert outcome(call) == (0, '"finished"\n')
            assert outcome(draining) == (0, f"{worker} is drained and gone\n")
    wait_until(lambda: all(one["healthy"] for one in replicas(served).values()), "it is healthy again")
    after = replicas(served)
    assert after.keys() == before.keys()
    assert worker not in after[busy["name"]]["workers"]
    assert "drained" in served.forge("explain", worker).out


def test_a_restart_replaces_all_replicas_while_calls_are_answered(served: Place) -> None:
    """F9"""
    before = {worker for one in replicas(served).values() for worker in one["workers"]}
    with served.start("restart", "gen") as restarting:
        while restarting.process.poll() is None:
            done = served.forge("call", "gen.predict", "1")
            assert done.code == 0, done
        assert outcome(restarting) == (0, "gen: replicas 0, 1 were replaced\n")
    after = {worker for one in replicas(served).values() for worker in one["workers"]}
    assert len(after) == 2
    assert not before & after


def test_a_drained_replica_is_taken_out_of_its_service_and_the_last_one_is_not(served: Place) -> None:
    """F9"""
    assert served.forge("deploy", "app:Gen", "--name", "two", "--replicas", "2").code == 0
    done = served.forge("drain", "two/1")
    assert (done.code, done.out) == (0, "two/1 is drained and taken out of two\n")
    assert list(replicas(served, "two")) == ["two/0"]
    done = served.forge("drain", "two/0")
    assert done.code == 2, done
    assert "last replica" in done.err
    assert served.forge("call", "two.predict", "1").code == 0
    assert served.forge("stop", "two").code == 0


def test_a_call_that_kills_its_replicas_is_a_dead_letter_until_it_is_mended_and_called_again(served: Place) -> None:
    """F4, F7, C5: from the caller's error over list, show, explain and status to the retry that succeeds."""
    poison = served.directory / "poison"
    poison.touch()
    assert served.forge("deploy", "app:Gen", "--name", "frail").code == 0
    done = served.forge("call", "frail.die_if", json.dumps([str(poison)]))
    assert done.code == 1, done
    assert "PoisonedRequest: frail.die_if" in done.err

    (letter,) = json.loads(served.forge("dead", "list", "--json").out)["dead"]
    assert (letter["service"], letter["endpoint"], letter["attempts"]) == ("frail", "die_if", 3)
    assert letter["id"] in served.forge("dead", "list").out
    shown = served.forge("dead", "show", letter["id"])
    assert f"{letter['id']} called frail.die_if" in shown.out
    assert "exit code 3" in shown.out
    told = served.forge("explain", letter["id"])
    assert "frail/0" in told.out
    told = served.forge("explain", "frail/0")
    assert "exit code 3" in told.out
    assert "restart" in told.out
    page = served.forge("status").out
    assert "1 dead letter: see `forge dead list`" in page
    assert re.search(r"frail/0 last error: .*exit code 3", page)
    assert "    last words" in page
    assert replicas(served, "frail")["frail/0"]["restarts"] >= 3

    poison.unlink()
    done = served.forge("dead", "retry", letter["id"])
    assert (done.code, done.out) == (0, '"alive"\n'), done
    assert served.forge("dead", "list").out == "no dead letters\n"
    done = served.forge("dead", "show", letter["id"])
    assert done.code == 1, done
    assert "forge dead list" in done.err
    done = served.forge("dead", "drop", letter["id"])
    assert done.code == 1
    assert f"no dead letter {letter['id']}" in done.err
    assert served.forge("stop", "frail").code == 0


def test_a_replica_that_was_killed_shows_the_signal_and_how_often_it_came_back(served: Place) -> None:
    """F7"""
    assert served.forge("deploy", "app:Gen", "--name", "hit").code == 0
    os.kill(json.loads(served.forge("call", "hit.pid").out), signal.SIGKILL)
    assert served.forge("call", "hit.predict", "1").code == 0
    done = served.forge("status")
    assert re.search(r"^hit/0 +HEALTHY .* 1$", done.out.replace(" \n", "\n"), re.MULTILINE), done
    assert re.search(r"hit/0 last error: .*SIGKILL", done.out), done
    assert "SIGKILL" in served.forge("explain", "hit/0").out
    assert served.forge("stop", "hit").code == 0


def test_a_stopped_broker_has_finished_what_ran_and_another_can_be_started_at_once(place: Place) -> None:
    """F9"""
    with place.start_broker() as broker:
        assert place.forge("deploy", "app:Gen", "--name", "gen").code == 0
        below = broker.descendants()
        with running_call(place, "stopped") as (call, path), place.start("broker", "stop") as stopping:
            wait_until(lambda: place.status()["terminating"], "it drains")
            assert "ending" in place.forge("status").out
            path.touch()
            assert outcome(call) == (0, '"finished"\n')
            assert outcome(stopping) == (0, f"the broker at {place.address} is gone\n")
        assert broker.process.wait(BOUND_S) == 0
        assert not [one for one in below if one.is_running()]
    with place.start_broker():
        assert place.status()["services"] == []
    done = place.forge("broker", "stop")
    assert done.code == 69, done


def test_a_broker_reached_by_tcp_is_stopped_too(place: Place) -> None:
    """F9: there no kernel tells when it is gone, but its port does."""
    with place.start_broker("--bind", "tcp://127.0.0.1:*", listening=2) as broker:
        (address,) = [json.loads(line)["address"] for line in broker.lines if "tcp://" in line]
        done = place.forge("broker", "stop", "--broker", address)
        assert (done.code, done.out) == (0, f"the broker at {address} is gone\n"), done
        assert broker.process.wait(BOUND_S) == 0


def test_the_first_signal_drains_the_broker_and_says_so(place: Place) -> None:
    """F9"""
    with place.start_broker() as broker:
        assert place.forge("deploy", "app:Gen", "--name", "gen").code == 0
        with running_call(place, "draining") as (call, path):
            broker.process.send_signal(signal.SIGTERM)
            broker.wait_for(lambda line: "draining; once more to end now" in line)
            path.touch()
            assert outcome(call) == (0, '"finished"\n')
        assert broker.process.wait(BOUND_S) == 0


def test_the_second_signal_ends_the_broker_at_once(place: Place) -> None:
    """F9: the call that still runs is not waited for, and nothing is left behind."""
    with place.start_broker() as broker:
        assert place.forge("deploy", "app:Gen", "--name", "gen").code == 0
        below = broker.descendants()
        with running_call(place, "ended") as (call, _):
            broker.process.send_signal(signal.SIGINT)
            broker.wait_for(lambda line: "draining; once more to end now" in line)
            assert broker.interrupt() == 0
            _, alive = psutil.wait_procs(below, timeout=BOUND_S)
            assert not alive
            call.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_drains_at_the_first_signal_and_ends_at_the_second(place: Place, number: signal.Signals) -> None:
    """F9"""
    with place.start_broker("--max-workers", "0") as broker, place.start("worker", "--gpu", "none") as worker:
        broker.wait_for(lambda line: '"worker joined"' in line)
        assert place.forge("deploy", "app:Gen", "--name", "gen").code == 0
        below = worker.descendants()
        with running_call(place, "worker") as (call, _):
            worker.process.send_signal(number)
            worker.wait_for(lambda line: "draining; once more to end now" in line)
            assert worker.process.poll() is None
            worker.process.send_signal(number)
            assert worker.process.wait(BOUND_S) == 0
            _, alive = psutil.wait_procs(below, timeout=BOUND_S)
            assert not alive
            call.kill()


def test_a_worker_that_is_drained_finishes_and_does_not_come_back(place: Place) -> None:
    """F9, F7: capacity that an operator takes away stays away; the supervisor exits 0."""
    with place.start_broker("--max-workers", "0") as broker, place.start("worker", "--gpu", "none") as worker:
        broker.wait_for(lambda line: '"worker joined"' in line)
        assert place.forge("drain", "w-").code == 0
        assert worker.process.wait(BOUND_S) == 0
        assert place.status()["workers"] == []


def test_a_broker_that_was_killed_says_that_it_recovers_and_what_it_misses(place: Place) -> None:
    """F10: with nothing on disk, its services come back from those who live."""
    with place.start_broker("--max-workers", "0") as broker, place.start("worker", "--gpu", "none") as worker:
        broker.wait_for(lambda line: '"worker joined"' in line)
        assert place.forge("deploy", "app:Gen", "--name", "gen").code == 0
        pid = json.loads(place.forge("call", "gen.pid").out)
        broker.kill()
        with place.start_broker("--max-workers", "0", "--recovery-s", "3"):
            wait_until(lambda: place.status()["recovering"], "the window opens")
            assert "recovering for another" in place.forge("status").out
            wait_until(lambda: not place.status()["recovering"], "the window closes")
            assert json.loads(place.forge("call", "gen.pid").out) == pid
            assert worker.interrupt() == 0
