"""Actors that workers import by reference; a module of its own, so that they import no test tools with it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import threading
from typing import Any

from forge_client import ForgeActor, current_session, endpoint, service_endpoint


class MyForgeActor(ForgeActor):
    """Takes one argument, whatever it is: the specification's examples give it `...`."""

    def __init__(self, argument: Any = None) -> None:
        self.argument = argument

    @endpoint
    async def given(self) -> Any:
        return self.argument


class Predictor(ForgeActor):
    """The endpoints that the specification's examples call, and how to see where a call went."""

    @endpoint
    async def predict(self, x: int) -> tuple[int, int]:
        return x + 1, os.getpid()

    @endpoint
    async def my_endpoint(self, first: int, second: int) -> tuple[int, str | None, int]:
        return first + second, current_session(), os.getpid()

    @endpoint
    async def another_endpoint(self, value: int) -> tuple[int, str | None]:
        return value, current_session()


class Counter(ForgeActor):
    """Counts for each session, and takes its count along."""

    def __init__(self) -> None:
        self.counts: dict[str | None, int] = {}

    @endpoint
    async def add(self, n: int) -> int:
        self.counts[current_session()] = self.counts.get(current_session(), 0) + n
        return self.counts[current_session()]

    async def export_session(self, sess_id: str) -> int:
        return self.counts[sess_id]

    async def import_session(self, sess_id: str, state: int) -> None:
        self.counts[sess_id] = state


class _OnGpus(ForgeActor):
    @endpoint
    async def gpus(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


class ModelInferenceActor(_OnGpus):
    def __init__(self, model_path: str) -> None:
        self.model_path = model_path


class BatchProcessorActor(_OnGpus):
    def __init__(self, batch_size: int) -> None:
        self.size = batch_size


class StreamProcessorActor(_OnGpus):
    def __init__(self, window_size: int) -> None:
        self.window_size = window_size


class Echo(ForgeActor):
    """Gives back, fails to, or holds a call until it is let go."""

    def __init__(self, fail_in: str = "") -> None:
        self.fail_in = fail_in
        self._let_go = threading.Event()
        if fail_in == "init":
            raise LookupError("no weights at /nowhere")

    async def setup(self) -> None:
        if self.fail_in == "setup":
            raise LookupError("no tokenizer at /nowhere")

    @endpoint
    async def echo(self, value: Any) -> Any:
        return value

    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def where(self) -> tuple[str | None, int]:
        return current_session(), os.getpid()

    @endpoint
    async def fail(self, text: str) -> None:
        raise LookupError(text)

    @endpoint
    async def rest_unless(self, pid: int) -> int:
        """At once in the process of this pid, else until it is cancelled."""
        if os.getpid() != pid:
            await asyncio.Event().wait()
        return pid

    @endpoint
    async def rank(self) -> tuple[int, int]:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    @endpoint
    async def zeros(self, count: int) -> bytes:
        return bytes(count)

    @endpoint
    async def lock(self) -> Any:
        return threading.Lock()

    @endpoint(threads=8)
    def thread(self) -> int:
        return threading.get_ident()

    @endpoint(threads=16)
    def hold(self) -> bool:
        """Until `let_go`, at most 20 s."""
        return self._let_go.wait(20)

    @endpoint
    async def let_go(self) -> None:
        self._let_go.set()

    @endpoint
    async def rest(self) -> None:
        """Until it is cancelled."""
        await asyncio.Event().wait()

    @service_endpoint(batch_size=8, batch_timeout=20.0)
    async def batched(self, value: int) -> tuple[int, str | None]:
        return value, current_session()

    @endpoint
    async def loop_thread(self) -> int:
        return threading.get_ident()


class Host(ForgeActor):
    """Holds handles, and starts a service of its own."""

    def __init__(self, handles: list[Any] | None = None) -> None:
        self._handles = handles or []

    @endpoint
    async def ask_both(self, value: Any) -> list[Any]:
        service, actor = self._handles
        return [await service.echo.route(value), await actor.echo.call_one(value)]

    @endpoint
    async def handles(self) -> list[Any]:
        return self._handles

    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def start_inner(self, name: str) -> int:
        """The pid of its replica."""
        self._inner = await Echo.options(name=name).as_service()
        pid: int = await self._inner.pid.route()
        return pid


class Grenade(ForgeActor):
    """Calls that end the process that runs them, and one that does not."""

    @endpoint
    async def fine(self, value: int) -> int:
        await asyncio.sleep(0.01)
        return value

    @endpoint
    async def go_off(self, how: str) -> None:
        if how == "segfault":
            ctypes.string_at(0)
        elif how == "exit":
            os._exit(3)
        elif how == "memory":
            resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
            bytearray(1 << 30)
