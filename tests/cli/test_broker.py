"""`forge broker start` and `forge worker` as processes: what they refuse, and that they leave nothing behind."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cli.running import BOUND_S, Place, Started, command


@pytest.fixture(scope="module", autouse=True)
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A worker of a broker that nobody starts. It gives up after ten seconds, in which the other tests here are run."""
    place = Place(tmp_path_factory.mktemp("lonely"))
    with place.start("worker", "--broker", f"ipc://{place.directory}/none.sock") as worker:
        yield worker


def test_ctrl_c_ends_the_broker_and_all_it_runs(place: Place) -> None:
    """No orphan: the kernel is asked about every process that the broker had started."""
    with place.start_broker() as broker:
        assert place.forge("deploy", "app:Gen", "--name", "gen", "--replicas", "2").code == 0
        below = broker.descendants()
        assert len(below) == 2
        assert broker.interrupt() == 0
        _, alive = psutil.wait_procs(below, timeout=BOUND_S)
        assert not alive
    assert place.forge("status").code == 69


def scraped(url: str, wanted: str) -> str:
    """The page as soon as it has this, as what a worker takes is known from its first heartbeat on; or as it is at the bound."""
    until = time.monotonic() + BOUND_S
    while True:
        with urllib.request.urlopen(url, timeout=BOUND_S) as answer:
            page: str = answer.read().decode()
        if wanted in page or time.monotonic() > until:
            return page


def test_what_prometheus_is_told_comes_from_real_workers(place: Place) -> None:
    """X3, F1: the variable is obeyed, and calls, replicas and the processes' own figures are on the page."""
    with place.start_broker(FORGE_HTTP="127.0.0.1:0") as broker:
        url = json.loads(broker.wait_for(lambda line: "serving http" in line))["url"]
        assert place.forge("deploy", "app:Gen", "--name", "gen").code == 0
        for argument in ("1", '"x"'):
            place.forge("call", "gen.predict", argument)
        page = scraped(f"{url}/metrics", "forge_worker_memory_bytes{")
        series = {sample.name: sample for one in text_string_to_metric_families(page) for sample in one.samples}
        found = {
            (sample.labels["outcome"], sample.value)
            for one in text_string_to_metric_families(page)
            for sample in one.samples
            if sample.name == "forge_calls_total" and sample.labels["endpoint"] == "predict" and sample.value
        }
        assert found == {("ok", 1.0), ("raised", 1.0)}
        assert series["forge_worker_memory_bytes"].labels["replica"] == "gen/0"
        assert series["forge_worker_memory_bytes"].value > 1 << 20
        assert series["forge_worker_cpu_seconds_total"].value > 0.0
        assert broker.interrupt() == 0


def test_a_second_broker_on_the_same_address_is_refused(place: Place) -> None:
    """W9: in one clear message that names the holder; the first one goes on."""
    with place.start_broker() as broker:
        done = place.forge("broker", "start")
        assert done.code == 2, done
        assert f"{place.address} is held by another broker (pid {broker.process.pid})" in done.err
        assert "Traceback" not in done.err
        assert place.status()["services"] == []


def test_a_bind_beyond_this_machine_is_refused_with_the_reason(place: Place) -> None:
    """W6"""
    done = place.forge("broker", "start", "--bind", "tcp://0.0.0.0:0")
    assert done.code == 2, done
    assert "can be reached from other machines" in done.err
    assert "--insecure" in done.err
    assert "Traceback" not in done.err


def test_a_bad_configuration_is_told_whole_without_a_traceback(place: Place) -> None:
    done = place.forge("broker", "start", "--heartbeat-s", "-1", "--max-workers", "-2", "--bind", "udp://x")
    assert done.code == 2, done
    assert "3 problems" in done.err
    assert "Traceback" not in done.err


def test_bind_adds_tcp_to_the_private_address_which_alone_is_trusted(place: Place) -> None:
    """W6"""
    with place.start_broker("--bind", "tcp://127.0.0.1:*", listening=2) as broker:
        own, tcp = (json.loads(line) for line in broker.lines if '"listening"' in line)
        assert (own["address"], own["trust"]) == (place.address, "trusted")
        assert tcp["address"].startswith("tcp://127.0.0.1:")
        assert tcp["trust"] == "not trusted"
        for address in (own["address"], tcp["address"]):
            assert place.forge("status", "--broker", address).code == 0
            assert place.forge("status", FORGE_BROKER=address).code == 0
        # Read twice: the option wins over a variable that leads nowhere.
        done = place.forge("status", "--broker", tcp["address"], FORGE_BROKER=f"ipc://{place.directory}/none.sock")
        assert done.code == 0, done


def test_on_a_terminal_the_broker_says_what_to_type_next(place: Place) -> None:
    reading, terminal = pty.openpty()
    broker = subprocess.Popen(
        command("broker", "start"),
        cwd=place.directory,
        env=place.environ(TERM="xterm"),
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
    )
    os.close(terminal)
    try:
        shown = b""
        deadline = time.monotonic() + BOUND_S
        while b"Ctrl-C ends the broker" not in shown:
            ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, shown
            shown += os.read(reading, 4096)
        assert place.address.encode() in shown
        assert b"forge deploy module:Class --name gen" in shown
    finally:
        broker.send_signal(signal.SIGINT)
        assert broker.wait(BOUND_S) == 0
        os.close(reading)


def test_a_worker_started_by_hand_joins_and_ends_cleanly_by_ctrl_c(place: Place) -> None:
    """F7: the supervisor passes it on to its child, and both are gone."""
    with place.start_broker() as broker, place.start("worker", "--gpu", "none", "--label", "zone=a") as worker:
        broker.wait_for(lambda line: '"worker joined"' in line)
        below = worker.descendants()
        assert len(below) == 1
        done = place.forge("workers", "--json")
        (only,) = json.loads(done.out)["workers"]
        assert (only["state"], only["labels"], only["pid"]) == ("IDLE", {"zone": "a"}, below[0].pid)
        assert "zone=a" in place.forge("workers").out
        assert worker.interrupt() == 0
        _, alive = psutil.wait_procs(below, timeout=BOUND_S)
        assert not alive
        broker.wait_for(lambda line: '"worker gone"' in line)


@pytest.mark.parametrize("gpu", ["7", "0,0"])
def test_a_worker_with_a_gpu_that_is_not_there_is_refused(place: Place, gpu: str) -> None:
    done = place.forge("worker", "--gpu", gpu, FORGE_GPUS="2")
    assert done.code == 2, done
    assert "GPU" in done.err
    assert "Traceback" not in done.err


def test_a_worker_without_a_broker_says_so_and_exits_69(lonely: Started) -> None:
    lonely.wait_for(lambda line: "no broker answered" in line)
    assert lonely.process.wait(BOUND_S) == 69
    assert not any("Traceback" in line for line in [*lonely.lines, *lonely.rest()])
