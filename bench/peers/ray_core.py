"""Ray's actors, called directly and in turn, without Ray Serve; the caller awaits each reference.

All traffic is on loopback. Ray's own processes (raylet, GCS) open their ports on every interface whatever address they are
given; what protects them is a random token, made for this run. The dashboard is off. Tensors go through Ray's object store in
shared memory.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import ray

from bench.peers.load import NOOP, REPLICAS, TENSOR, Call, run

OBJECT_STORE_BYTES = 2**30


def start() -> None:
    """A Ray of our own, on loopback, which ends with this process. Once: starting it takes longer than what is measured."""
    if ray.is_initialized():
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or it would write one into the user's home
    directory = tempfile.mkdtemp(prefix="ray-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    atexit.register(ray.shutdown)
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="warning",
        _node_ip_address="127.0.0.1",
        _temp_dir=directory,
    )


class Echo:
    def echo(self, value: Any) -> Any:  # plain: an async one is a third slower here
        return value


Actor: Any = ray.remote(num_cpus=0.2)(Echo)


@contextlib.asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Call]:
    start()
    actors = [Actor.remote() for _ in range(REPLICAS)]
    turns = itertools.cycle([actor.echo.remote for actor in actors])

    async def call(value: Any) -> Any:
        return await next(turns)(value)

    try:
        for _ in actors:
            await call(kind)
        yield call
    finally:
        for actor in actors:
            ray.kill(actor)


if __name__ == "__main__":
    run(serving, "ray", kinds=(NOOP, TENSOR))
