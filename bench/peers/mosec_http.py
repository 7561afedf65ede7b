"""mosec: its HTTP server in Rust before two Python workers for each route, bodies as raw bytes (no JSON on either side)."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from mosec import Server, Worker

from bench.peers.http_client import serving
from bench.peers.load import BATCH, BATCH_NOOP, BATCH_WAIT_S, REPLICAS, TENSOR_MIB, run, size_told

NAME = "bench.peers.mosec_http"


class Bytes(Worker):
    def deserialize(self, data: bytes) -> Any:
        return data

    def serialize(self, data: Any) -> bytes:
        return bytes(data)


class Echo(Bytes):
    def forward(self, data: Any) -> Any:
        return data


class Batch(Bytes):
    def forward(self, data: Any) -> Any:
        return [size_told(len(data))] * len(data)


def serve(kind: str, port: str) -> None:
    # mosec reads its settings from the command line.
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--log-level", "warning", "--timeout", "30000"]
    sys.argv += ["--max-request-size", str((TENSOR_MIB + 1) * 2**20)]
    server = Server()
    if kind == BATCH_NOOP:
        wait_ms = int(BATCH_WAIT_S * 1e3)
        server.append_worker(Batch, REPLICAS, max_batch_size=BATCH, max_wait_time=wait_ms, route=f"/{kind}")
    else:
        server.append_worker(Echo, REPLICAS, route=f"/{kind}")
    server.run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        run(partial(serving, NAME), "mosec", "httptools", "uvloop")
