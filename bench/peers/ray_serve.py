"""Ray Serve through its handle, the way one deployment calls another, with the settings its guide gives for throughput.

RAY_SERVE_THROUGHPUT_OPTIMIZED=1: user code on the replica's own loop, fewer log records, direct gRPC to replicas. No HTTP:
the handle is the faster of its two doors. Tensors go by reference, through the object store in shared memory: over gRPC
they fail at this size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

# Read when Ray is imported, here and in its processes.
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = (
    "0"  # part of it: each replica would listen for HTTP, beyond this machine
)

from ray import serve

from bench.peers.load import BATCH, BATCH_WAIT_S, REPLICAS, TENSOR, Call, run, size_told
from bench.peers.ray_core import start


class Echo:
    async def noop(self, value: Any) -> Any:
        return value

    async def tensor(self, value: Any) -> Any:
        return value

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def batch(self, payloads: list[bytes]) -> list[bytes]:
        return [size_told(len(payloads))] * len(payloads)


Deployment: Any = serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=1024,
    ray_actor_options={"num_cpus": 0.2},
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=0.1,
)(Echo)


@contextlib.asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Call]:
    start()
    handle = serve.run(Deployment.bind(), name=kind, route_prefix=None)
    try:
        yield getattr(handle.options(_by_reference=kind == TENSOR), kind).remote
    finally:
        serve.delete(kind, _blocking=False)


if __name__ == "__main__":
    run(serving, "ray")
