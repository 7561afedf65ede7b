"""The broker over HTTP, for monitoring: /metrics, /healthz, /readyz, /api/status. Looks, and changes nothing.

It has threads of its own, which know the broker by what the loop answers (`inquiries`): a scrape costs the loop a walk over endpoints
and workers, and a slow reader costs it nothing. Everything is bounded: connections, time, the length of a request. Nothing is
encrypted and nobody is asked who he is, so it listens on this machine alone unless told `--insecure`; and there it answers nobody who
came by another name, or any web page could read it through the user's browser.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from socketserver import TCPServer
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from forge_broker.core.actions import Note
from forge_broker.core.families import families
from forge_broker.core.state import State
from forge_broker.core.status import broker_life, broker_status
from forge_broker.shell.exposition import Exposition
from forge_broker.shell.inquiries import Inquiries, LoopSilent
from forge_contract.addresses import is_loopback, read_http
from forge_contract.config import BrokerConfig
from forge_contract.errors import AddressInUse, ConfigError

ANSWER_S: Final = 2.0  # the loop's time to answer; past it the broker counts as ill
SILENT_S: Final = 5.0  # a connection's, between two pieces of a request or an answer
WHOLE_S: Final = 20.0  # a connection's: who says a byte now and then must not hold its place for ever
AT_ONCE: Final = 16  # connections; each has a thread
TARGET_AT_MOST: Final = 2048  # bytes of path and query
# Writing a page of 500 endpoints takes 0.2 s, in which the loop wants the interpreter back after each poll. With Python's own interval
# (5 ms) a turn took 7 ms then, with this one 0.3 ms.
SWITCH_S: Final = 0.0005

PATHS: Final = ("/metrics", "/healthz", "/readyz", "/api/status")


class HttpDoor:
    """Bound when made, serving from `open` to `close`. `wake`: a socket whose other end the loop watches; non-blocking. Raises ConfigError
    or AddressInUse."""

    def __init__(self, config: BrokerConfig, wake: socket.socket, note: Callable[[Note], None]) -> None:
        assert config.http is not None
        host, port = read_http(config.http)
        local = is_loopback(f"tcp://{config.http}")
        if not local and not config.insecure:
            raise ConfigError(
                where="http",
                message=f"{config.http} can be reached from other machines, and what the broker tells there is neither encrypted nor "
                "guarded. Say 127.0.0.1, or --insecure if the network is yours alone",
            )
        try:
            exposition = Exposition(version("forge-broker"))
        except ImportError as error:
            raise ConfigError(
                where="http", message="prometheus-client is not installed: pip install 'forge-broker[http]'"
            ) from error
        self.inquiries = Inquiries(wake)
        try:
            self._server = _Server((host, port), self.inquiries, exposition, note, local=local)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(address=f"http://{config.http}", holder="") from error
            raise ConfigError(where="http", message=f"{config.http}: {error.strerror or error}") from error
        self._switch_s = sys.getswitchinterval()
        self._ending, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="forge-http", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        shown = host.decode() if isinstance(host, bytes) else host
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    def open(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._thread.start()

    def answer(self, state: State, now: float) -> None:
        """The loop, when it was woken: what was asked for meanwhile."""
        self.inquiries.answer(
            {
                "families": lambda: families(state, now),
                "life": lambda: broker_life(state, now),
                "status": lambda: broker_status(state, now),
            }
        )

    def close(self) -> None:
        """Takes nothing new; threads that still write to a slow reader end with the process."""
        self.inquiries.close()
        sys.setswitchinterval(self._switch_s)
        self._end.close()
        if self._thread.is_alive():
            self._thread.join()
        self._ending.close()
        self._server.server_close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._server, selectors.EVENT_READ)
            waiting.register(self._ending, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in waiting.select(self._server.patience())]
                if self._ending in ready:
                    return
                if ready:
                    self._server.handle_request()
                self._server.end_overdue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True  # after a broker that had it a minute ago; a port that is listened on stays taken
    request_queue_size = AT_ONCE
    timeout = 0  # of `handle_request`: called when somebody is there; who is gone again is not waited for

    def __init__(
        self,
        address: tuple[str, int],
        inquiries: Inquiries,
        exposition: Exposition,
        note: Callable[[Note], None],
        *,
        local: bool,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.inquiries = inquiries
        self.exposition = exposition
        self.writing = threading.Lock()  # one page at a time
        self.note = note
        self.local = local
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self._until: dict[socket.socket, float] = {}  # monotonic; in the order of their coming
        super().__init__(address, _Handler)
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for our name.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._until[request] = time.monotonic() + WHOLE_S
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._left(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._left(request)

    def _left(self, request: socket.socket) -> None:
        self._until.pop(request, None)
        self._room.release()

    def patience(self) -> float | None:
        """Seconds until a connection may be overdue; None while there is none."""
        first = next(iter(list(self._until.values())), None)
        return None if first is None else max(0.0, first - time.monotonic())

    def end_overdue(self) -> None:
        """Their threads find the connection at its end, and leave."""
        now = time.monotonic()
        for request, until in list(self._until.items()):
            if until <= now:
                self._until.pop(request, None)
                with suppress(OSError):  # it has ended meanwhile
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a connection's thread ended by. That it was closed, or too slow, is its peer's affair."""
        error = sys.exception()
        if not isinstance(error, OSError):
            self.note(Note("error", "a connection over HTTP failed", {"why": f"{type(error).__name__}: {error}"}))


class _Handler(BaseHTTPRequestHandler):
    timeout = SILENT_S
    server: _Server
    server_version = "forge"
    sys_version = ""

    def __getattr__(self, name: str) -> Any:
        # `do_POST` and the like: the method is known, and is not for here.
        if name.startswith("do_"):
            return self._not_allowed
        raise AttributeError(name)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _not_allowed(self) -> None:
        self._json(
            HTTPStatus.METHOD_NOT_ALLOWED, {"error": f"{self.command} is not for here; GET is"}, Allow="GET, HEAD"
        )

    def _answer(self) -> None:
        if len(self.path) > TARGET_AT_MOST:
            self._json(HTTPStatus.REQUEST_URI_TOO_LONG, {"error": f"a path of over {TARGET_AT_MOST} bytes"})
            return
        if self.server.local and not _names_this_machine(self.headers.get("Host", "localhost")):
            self._json(
                HTTPStatus.MISDIRECTED_REQUEST,
                {"error": "the Host is not this machine: localhost, or its loopback address"},
            )
            return
        target = urlsplit(self.path)
        try:
            query = parse_qsl(target.query, keep_blank_values=True, strict_parsing=bool(target.query), errors="strict")
        except ValueError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"the query cannot be read: {error}"})
            return
        known = {"service"} if target.path == "/api/status" else set()
        if len(query) > 1 or any(name not in known for name, _ in query):
            takes = "one `service`" if known else "no query"
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"{target.path} takes {takes}"})
            return
        try:
            self._look(target.path, query[0][1] if query else None)
        except LoopSilent as error:
            self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(error)})
        except OSError:
            raise  # of the connection
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.server.note(Note("error", "an answer over HTTP failed", {"path": target.path, "why": why}))
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": why})

    def _look(self, path: str, service: str | None) -> None:
        ask = self.server.inquiries.ask
        if path == "/metrics":
            families = ask("families", ANSWER_S)
            with self.server.writing:
                page, content_type = self.server.exposition.write(families, self.headers.get("Accept", ""))
            self._send(HTTPStatus.OK, page, content_type)
        elif path == "/healthz":
            self._json(HTTPStatus.OK, {"healthy": True, **ask("life", ANSWER_S)})
        elif path == "/readyz":
            life = ask("life", ANSWER_S)
            ready = not life["recovering"] and not life["draining"]
            self._json(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"ready": ready, **life})
        elif path == "/api/status":
            status = ask("status", ANSWER_S)
            if service is None:
                self._json(HTTPStatus.OK, status)
                return
            found = {one["name"]: one for one in status["services"]}
            if service in found:
                self._json(HTTPStatus.OK, found[service])
            else:
                self._json(HTTPStatus.NOT_FOUND, {"error": f"no service {service!r:.200}", "services": sorted(found)})
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": f"nothing is at {path!r:.200}", "paths": list(PATHS)})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself: a request line it cannot read, too many headers."""
        self._json(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def _json(self, status: HTTPStatus, answer: dict[str, Any], **headers: str) -> None:
        page = json.dumps(answer, default=repr).encode() + b"\n"
        self._send(status, page, "application/json", **headers)

    def _send(self, status: HTTPStatus, page: bytes, content_type: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(page))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *headers.items(),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each scrape would hide those that matter."""


def _names_this_machine(host: str) -> bool:
    """Whether a Host header is one that a local caller uses. A page elsewhere whose name leads here has its own."""
    name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
    return is_loopback(f"tcp://{name}:0")
