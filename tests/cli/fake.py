"""A broker that answers what a test tells it, for commands that run in this process: the client's fake, on a loop in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from click.testing import CliRunner, Result

from forge_cli.main import main
from forge_contract.framing import Envelope, Outbox
from tests.client.fake_broker import FakeBroker, Served

BOUND_S: Final = 10.0


class Told(FakeBroker):
    """`controls` answer as the fake's do; what they name `payload` becomes the payload of the answer."""

    address = ""

    def _control(self, outbox: Outbox, message: list[Any], envelope: Envelope) -> None:
        super()._control(outbox, message, envelope)
        answer = outbox.body[-1]
        if "payload" in answer[3]:
            answer[4] = outbox.attach(answer[3].pop("payload"))

    def asked(self, op: str) -> list[dict[str, Any]]:
        """The fields of each control of this kind."""
        return [one[1] for one in self.seen if one[0] == op]

    def forge(self, *line: str) -> Result:
        """Run a command against this broker."""
        return CliRunner().invoke(main, [*line, "--broker", self.address])

    def serves(self, name: str, *endpoints: str, kind: str = "service", procs: int = 1) -> None:
        """A service that clients find by its name, with endpoints 100, 101 …"""
        self._endpoints.update({100 + at: endpoint for at, endpoint in enumerate(endpoints)})
        self.named[name] = {
            "service": 1,
            "name": name,
            "kind": kind,
            "class_name": "Gen",
            "endpoints": {endpoint: 100 + at for at, endpoint in enumerate(endpoints)},
            "signatures": {},
            "options": {},
            "replicas": [0],
            "sizes": {"procs": procs},
            "return_first": True,
            "errors": "raise",
            "detached": True,
            "state_epoch": 1,
            "metrics": {"service": {}, "replicas": {}},
        }


@contextmanager
def told(folder: Path, **options: Any) -> Iterator[Told]:
    broker = Told(**options)
    broker.address = f"ipc://{folder}/told.sock"
    up = threading.Event()
    ends: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        served = Served(broker, broker.address)
        done = asyncio.Event()
        ends.append((asyncio.get_running_loop(), done))
        up.set()
        try:
            await done.wait()
        finally:
            served.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert up.wait(BOUND_S)
    try:
        yield broker
    finally:
        loop, done = ends[0]
        loop.call_soon_threadsafe(done.set)
        thread.join(BOUND_S)
