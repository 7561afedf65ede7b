"""ipyparallel: a controller and two engines, direct views of the engines called in turn.

Direct views are its fastest way for single calls: a load-balanced view sends every task through one more scheduler.
Arrays travel as buffers of their own, without pickling.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

import ipyparallel

from bench.peers.load import NOOP, REPLICAS, TENSOR, Call, run


def echo(value: Any) -> Any:
    return value


@contextlib.asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Call]:
    cluster = ipyparallel.Cluster(n=REPLICAS, log_level=logging.ERROR)
    client = await cluster.start_and_connect(n=REPLICAS)
    try:
        turns = itertools.cycle([client[engine] for engine in client.ids])

        async def call(value: Any) -> Any:
            return await asyncio.wrap_future(next(turns).apply_async(echo, value))

        yield call
    finally:
        client.close()
        await cluster.stop_cluster()


if __name__ == "__main__":
    run(serving, "ipyparallel", "pyzmq", "uvloop", kinds=(NOOP, TENSOR))
