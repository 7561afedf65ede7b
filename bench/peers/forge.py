"""Forge broker: one service of two replicas behind the embedded broker, the client on uvloop.

`replica_max_concurrent_requests` is raised from its default of 10, as for every peer that has such a limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray

from bench.peers.load import BATCH, BATCH_WAIT_S, REPLICAS, Call, run, size_told
from forge_client import ForgeActor, endpoint, service_endpoint, shutdown


class Echo(ForgeActor):
    @endpoint
    async def noop(self, payload: bytes) -> bytes:
        return payload

    @service_endpoint(batch_size=BATCH, batch_timeout=BATCH_WAIT_S, batch_mode="call")
    async def batch(self, payloads: list[bytes]) -> list[bytes]:
        return [size_told(len(payloads))] * len(payloads)

    @endpoint
    async def tensor(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        return array


@contextlib.asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Call]:
    service = await Echo.options(num_replicas=REPLICAS, replica_max_concurrent_requests=1024).as_service()
    try:
        yield getattr(service, kind).route
    finally:
        await shutdown()


if __name__ == "__main__":
    run(serving, "forge-broker", "pyzmq", "msgpack", "uvloop")
