"""The broker over HTTP as those who watch it meet it: real sockets, a real broker."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from forge_broker.core.actions import Note
from forge_broker.shell import http_door
from forge_broker.shell.http_door import AT_ONCE, HttpDoor
from forge_contract.config import BrokerConfig
from forge_contract.errors import ConfigError, from_wire
from forge_contract.messages import ANSWER, CONTROL
from tests.shell.running import BOUND_S, BrokerProcess, RawPeer, private_address


class Watched:
    """A broker with HTTP on a port that is free."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        bind = [private_address(directory)]
        os.environ.pop("FORGE_LOG_LEVEL", None)
        self.broker = BrokerProcess(bind=bind, log_dir=str(directory / "logs"), http="127.0.0.1:0", **settings)
        assert self.broker.process.stderr is not None
        lines = iter(self.broker.process.stderr.readline, b"")
        self.url = next(json.loads(line)["url"] for line in lines if b"serving http" in line)
        self.port = int(self.url.rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=BOUND_S)

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = self.connect()
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def json(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, Any]]:
        status, page, _ = self.get(path, method, **headers)
        return status, json.loads(page)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    made = Watched(tmp_path_factory.mktemp("watched"))
    yield made
    made.broker.close()


def test_a_scrape_is_what_prometheus_reads(watched: Watched) -> None:
    """X3: prometheus_client's own parser, and promtool's opinion where there is one."""
    status, page, headers = watched.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    found = {
        sample.name: sample.value for one in text_string_to_metric_families(page.decode()) for sample in one.samples
    }
    assert found["forge_uptime_seconds"] > 0.0
    assert found["forge_recovering"] == 0.0
    assert found["process_open_fds"] > 3


def test_promtool_finds_nothing_wrong_with_a_scrape(watched: Watched) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    _, page, _ = watched.get("/metrics")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, timeout=BOUND_S, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_broker_is_well_and_at_work(watched: Watched) -> None:
    assert watched.json("/healthz")[0] == 200
    status, life = watched.json("/readyz")
    assert (status, life["ready"], life["recovering"], life["draining"]) == (200, True, False, False)


def test_status_is_what_the_command_shows_and_of_one_service_or_of_none(watched: Watched) -> None:
    status, shown = watched.json("/api/status")
    assert status == 200
    with RawPeer(watched.broker.address) as peer:
        peer.greet()
        peer.send(1, [[CONTROL, 1, "status", {}, 0]], incarnation=shown["incarnation"])
        while (message := peer.receive().body[0])[0] != ANSWER:
            continue
    assert message[3].keys() == shown.keys()
    status, answer = watched.json("/api/status?service=gen%20x")
    assert (status, answer) == (404, {"error": "no service 'gen x'", "services": []})


@pytest.mark.parametrize(
    ("status", "path"),
    [
        (404, "/"),
        (404, "/metrics/"),
        (404, "/api/status/../../etc/passwd"),
        (400, "/metrics?name[]=x"),
        (400, "/healthz?verbose"),
        (400, "/api/status?service=a&service=b"),
        (400, "/api/status?replica=a"),
        (400, "/api/status?service=%ff"),
        (414, "/api/status?service=" + "x" * 3000),
        (414, "/" + "x" * 70_000),
    ],
)
def test_what_nobody_serves_is_refused_in_json_with_what_there_is(watched: Watched, status: int, path: str) -> None:
    found, answer = watched.json(path)
    assert found == status
    assert answer["error"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
def test_nothing_can_be_changed(watched: Watched, method: str) -> None:
    status, page, headers = watched.get("/api/status", method)
    assert status == 405
    assert headers["allow"] == "GET, HEAD"
    assert method in json.loads(page)["error"]


def test_head_has_the_headers_of_get_and_no_page(watched: Watched) -> None:
    status, page, headers = watched.get("/healthz", "HEAD")
    assert (status, page) == (200, b"")
    assert int(headers["content-length"]) > 20


def test_only_who_names_this_machine_is_answered(watched: Watched) -> None:
    """Else a page on the web, whose name leads to 127.0.0.1 for a moment, could read it through the user's browser."""
    assert watched.json("/api/status", Host="evil.example:8266")[0] == 421
    for name in ("localhost", f"localhost:{watched.port}", "127.0.0.1", "[::1]:8266"):
        assert watched.json("/healthz", Host=name)[0] == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_garbage_is_answered_with_an_error_and_the_rest_goes_on(watched: Watched, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", watched.port), BOUND_S) as raw:
        raw.sendall(garbage)
        assert b'"error"' in b"".join(iter(lambda: raw.recv(65536), b""))
    assert watched.json("/healthz")[0] == 200


def test_who_says_nothing_takes_no_place_from_the_others_for_long(watched: Watched) -> None:
    """More connections than are served at once are closed, and the broker's loop knows of none of them."""
    silent = [socket.create_connection(("127.0.0.1", watched.port), BOUND_S) for _ in range(AT_ONCE)]
    try:
        with socket.create_connection(("127.0.0.1", watched.port), BOUND_S) as one_more:
            assert one_more.recv(1) == b""
        with RawPeer(watched.broker.address, "c-00000000000000ee") as peer:
            assert peer.greet()["heartbeat_s"] > 0.0
    finally:
        for one in silent:
            one.close()
    # They leave one by one: an answer comes as soon as one of them has.
    status = 0
    while status != 200:
        try:
            status = watched.json("/healthz")[0]
        except (http.client.RemoteDisconnected, ConnectionResetError):
            continue


class Bare(Watched):
    """The door alone, before a loop that does not answer, or answers with a bug."""

    def __init__(self, notes: list[Note]) -> None:
        self.heard, self.bell = socket.socketpair()
        self.bell.setblocking(False)
        self.door = HttpDoor(BrokerConfig(http="127.0.0.1:0"), self.bell, notes.append)
        self.inquiries = self.door.inquiries
        self.port = int(self.door.url.rpartition(":")[2])
        self.door.open()

    def close(self) -> None:
        self.door.close()
        self.heard.close()
        self.bell.close()


def test_a_loop_that_stands_still_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: a custom router that hangs stops it, and nothing else would say so."""
    monkeypatch.setattr(http_door, "ANSWER_S", 0.05)
    with closing(Bare([])) as bare:
        for path in ("/healthz", "/readyz", "/metrics", "/api/status"):
            assert bare.json(path) == (503, {"error": "the broker's loop has not answered for 0.05 s"})


def test_who_says_a_byte_now_and_then_does_not_hold_its_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_door, "WHOLE_S", 0.1)
    with closing(Bare([])) as bare, socket.create_connection(("127.0.0.1", bare.port), BOUND_S) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert slow.recv(1) == b""  # long before it would have been silent for too long


def test_a_bug_in_an_answer_is_answered_and_noted_and_the_next_asker_is_served() -> None:
    """It must not end the broker, and somebody has to find out."""
    notes: list[Note] = []
    with closing(Bare(notes)) as bare, ThreadPoolExecutor(1) as others:
        asked = others.submit(bare.json, "/metrics")
        assert bare.heard.recv(1)
        bare.inquiries.answer({"families": lambda: os.environ["GONE"]})
        assert asked.result(BOUND_S) == (500, {"error": "KeyError: 'GONE'"})
        assert [(note.level, note.fields["path"]) for note in notes] == [("error", "/metrics")]
        asked = others.submit(bare.json, "/healthz")
        assert bare.heard.recv(1)
        bare.inquiries.answer({"life": lambda: {"uptime_s": 1.0}})
        assert asked.result(BOUND_S) == (200, {"healthy": True, "uptime_s": 1.0})


def test_who_is_asking_while_the_broker_ends_is_told_so() -> None:
    with closing(Bare([])) as bare, ThreadPoolExecutor(1) as others:
        asked = others.submit(bare.json, "/healthz")
        assert bare.heard.recv(1)
        bare.inquiries.close()
        assert asked.result(BOUND_S) == (503, {"error": "the broker has ended"})


def test_a_signal_ends_the_broker_with_its_http_and_the_port_is_free(tmp_path: Path) -> None:
    """F9: also while somebody is connected and says nothing."""
    made = Watched(tmp_path)
    with made.broker, socket.create_connection(("127.0.0.1", made.port), BOUND_S):
        made.broker.process.send_signal(signal.SIGTERM)
        assert made.broker.wait() == 0
    with socket.create_server(("127.0.0.1", made.port)):
        pass


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        with BrokerProcess(bind=[private_address(tmp_path)], log_dir=str(tmp_path / "logs"), http=place) as broker:
            error = from_wire(broker.said["error"])
            assert broker.wait() == 2
    assert type(error).__name__ == "AddressInUse"
    assert f"http://{place}" in str(error)


def refused(http: str) -> str:
    """What who asks for it there is told."""
    with socket.socket() as bell, pytest.raises(ConfigError) as caught:
        HttpDoor(BrokerConfig(http=http), bell, lambda note: None)
    return str(caught.value)


@pytest.mark.parametrize("http", ["0.0.0.0:0", "[::]:8266", "192.0.2.1:8266", "a-name.example:8266"])
def test_beyond_this_machine_it_is_refused_with_the_reason(http: str) -> None:
    """W6: as for --bind."""
    assert re.search(r"can be reached from other machines.*--insecure", refused(http))


def test_without_prometheus_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert "pip install 'forge-broker[http]'" in refused("127.0.0.1:0")
