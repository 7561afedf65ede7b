"""`forge worker`: keeps one clean worker process ready, for as long as it is wanted (design F7).

A child serves one replica in its life and leaves; another takes its place, so capacity that somebody started by hand does
not melt away. The supervisor imports neither torch nor the user's code and holds nothing that could break. Its children
hold the end of a pipe from it: however it ends, they notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Final

from forge_client.gpus import check_gpus
from forge_contract.exit_status import how_it_ended

log = logging.getLogger("forge_worker")

EXIT_DRAINED: Final = 64
EXIT_NO_BROKER: Final = 69
FIRST_BACKOFF_S: Final = 0.2
LONGEST_BACKOFF_S: Final = 10.0
SETTLED_S: Final = 5.0  # a child that lived for so long did not die of what killed the one before it


def supervise(broker: str, gpus: tuple[str, ...], labels: Mapping[str, str]) -> int:
    """Run workers for `broker`, one after another, until SIGTERM or SIGINT; a second signal ends the child at once.

    Returns the exit code: 0 when stopped, here or by a broker that wants no worker in its place any more; 69 when no
    broker answers or it refuses us (the child has said so on stderr). Raises ConfigError when this machine has not the
    GPUs named. Call it in the main thread.
    """
    check_gpus(gpus, os.environ)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("forge_worker %(levelname)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    command = [sys.executable, "-m", "forge_worker", "--child", "--owned", "--broker", broker]
    command += ["--gpu", ",".join(gpus) or "none"]
    for key, value in labels.items():
        command += ["--label", f"{key}={value}"]
    return asyncio.run(_Supervisor(command).run())


class _Supervisor:
    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._child: asyncio.subprocess.Process | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        backoff_s = FIRST_BACKOFF_S
        while not self._stopped.is_set():
            born = time.monotonic()
            code = await self._one_child()
            lived_s = time.monotonic() - born
            if code == EXIT_DRAINED:
                return 0  # another one would be sent away again, or find no broker
            if code == EXIT_NO_BROKER and not self._stopped.is_set():
                return EXIT_NO_BROKER
            # A normal end is a replica's stop. Even after that a moment, lest a broker that sends everybody away at once
            # makes us start processes in a circle.
            wait_s = 0.0 if lived_s >= SETTLED_S else FIRST_BACKOFF_S if code == 0 else backoff_s
            backoff_s = FIRST_BACKOFF_S if code == 0 or lived_s >= SETTLED_S else min(2 * backoff_s, LONGEST_BACKOFF_S)
            if code != 0 and not self._stopped.is_set():
                how = how_it_ended(code)
                log.warning("the worker ended (%s) after %.1f s; a new one in %.1f s", how, lived_s, wait_s)
            try:
                async with asyncio.timeout(wait_s):
                    await self._stopped.wait()
            except TimeoutError:
                continue
        return 0

    async def _one_child(self) -> int:
        # In a session of its own: a Ctrl-C in the terminal is for us to pass on, or the child would count it twice.
        self._child = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        if self._stopped.is_set():
            self._child.terminate()
        return await self._child.wait()

    def _stop(self) -> None:
        again = self._stopped.is_set()
        self._stopped.set()
        if self._child is None or self._child.returncode is not None:
            return
        if again:
            self._child.kill()
        else:
            log.info("draining; once more to end now")
            self._child.terminate()
