"""Taking replicas and workers out of service without a failed call (F9, X2): drains, and the rolling restart made of them.

`control` hands in who asked; the answer is due when what was drained is gone, which `check` finds out after every event while
anybody waits.
"""

from __future__ import annotations

from typing import Any

from forge_broker.core.clients import Client
from forge_broker.core.lifecycle import Lifecycle
from forge_broker.core.replicas import Replica, ReplicaState
from forge_broker.core.services import Service
from forge_broker.core.state import State
from forge_broker.core.telling import Telling
from forge_broker.core.workers import Worker, WorkerState
from forge_contract.errors import ConfigError, ForgeError, ServiceStopped, StartFailed


class Rolling:
    """A restart under way: replicas are drained one by one, the next when the last is HEALTHY again."""

    __slots__ = ("client", "done", "left", "number", "replica", "service")

    def __init__(self, service: Service, client: Client, number: int) -> None:
        self.service = service
        self.client = client
        self.number = number
        self.left = sorted(service.replicas)
        self.replica: Replica | None = None  # the one that is on its way
        self.done: list[int] = []


class Drains:
    def __init__(self, state: State, lifecycle: Lifecycle, telling: Telling) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._telling = telling
        self._leaving: list[tuple[Worker | Replica, Client, int]] = []
        self._rolling: list[Rolling] = []

    def drain(self, target: str, client: Client, number: int, now: float) -> None:
        """A worker by its name, or a replica as `service/idx`. Raises ConfigError for what is neither, or cannot be spared."""
        state = self._state
        worker = state.workers.get(target)
        if worker is not None:
            self._drain_worker(worker, now)
            self._leaving.append((worker, client, number))
            return
        name, _, idx = target.rpartition("/")
        service = state.names.get(name)
        replica = service.replicas.get(int(idx)) if service is not None and idx.isdecimal() else None
        if service is None or replica is None:
            raise ConfigError(where="drain", message=f"{target!r:.100} is neither a worker nor a replica (service/0)")
        if all(other is replica or other.leaving for other in service.replicas.values()):
            raise ConfigError(
                where="drain", message=f"{target} is the last replica of {name}; to end it, stop the service"
            )
        if not replica.leaving:
            service.resize(service.wanted - 1)
            self._telling.resized(service)
        replica.comes_back = False  # it may be on its way out to start anew, which is not wanted any more
        if replica.state is not ReplicaState.DRAINING:
            state.story.tell(now, replica.name, f"drained, asked by {client.name}")
            self._lifecycle.stop_replica(replica, "its replica is drained", state.config.drain_grace_s, now)
        self._leaving.append((replica, client, number))

    def _drain_worker(self, worker: Worker, now: float) -> None:
        """Its replica starts anew elsewhere, where there is a place; until then it is pending, visibly."""
        replica: Replica | None = worker.replica
        self._state.story.tell(now, worker.name, "drained")
        if worker.state in (WorkerState.DRAINING, WorkerState.LOST):
            return
        if replica is None:
            self._lifecycle.dismiss(worker, "it is drained", now)
            return
        self._recycle(replica, f"worker {worker.name} is drained", now, keep=worker)

    def _recycle(self, replica: Replica, reason: str, now: float, *, keep: Worker | None = None) -> None:
        replica.comes_back = True
        self._state.story.tell(now, replica.name, f"drained, to start anew: {reason}")
        self._lifecycle.stop_replica(replica, reason, self._state.config.drain_grace_s, now, keep=keep)

    def restart(self, service: Service, client: Client, number: int, now: float) -> None:
        """Replace its replicas one by one. Raises ConfigError while another restart of it is under way."""
        if service.stopping is not None:
            raise service.stopping
        if any(one.service is service for one in self._rolling):
            raise ConfigError(where="restart", message=f"{service.name} is being restarted already")
        self._rolling.append(Rolling(service, client, number))
        self.check(now)

    @property
    def waiting(self) -> bool:
        return bool(self._leaving or self._rolling)

    def check(self, now: float) -> None:
        """Who has left, and which restart can go on."""
        for one in list(self._leaving):
            target, client, number = one
            gone = (
                self._state.workers.get(target.name) is not target
                if isinstance(target, Worker)
                else target.state is ReplicaState.STOPPED
            )
            if gone:
                self._leaving.remove(one)
                self._answer(client, number, {})
        for rolling in list(self._rolling):
            self._roll(rolling, now)

    def _roll(self, rolling: Rolling, now: float) -> None:
        service, replica = rolling.service, rolling.replica
        if service.stopping is not None:
            self._end(rolling, ServiceStopped(service=service.name, why=": it was stopped while it was restarted"))
            return
        if replica is not None:
            if replica.state is ReplicaState.UNHEALTHY or replica.deaths:
                why = f"{replica.name} does not come back, so the others were left as they are: {replica.last_error}"
                self._end(rolling, StartFailed(service=service.name, why=why))
                return
            if replica.state not in (ReplicaState.HEALTHY, ReplicaState.STOPPED):
                return
            rolling.done.append(replica.idx)
            rolling.replica = None
        while rolling.left:
            following = service.replicas.get(rolling.left.pop(0))
            if following is not None and following.healthy:
                following.deaths = 0
                rolling.replica = following
                self._recycle(following, "its service is restarted", now)
                return
        self._end(rolling, None)

    def _end(self, rolling: Rolling, error: ForgeError | None) -> None:
        self._rolling.remove(rolling)
        self._answer(rolling.client, rolling.number, {"restarted": rolling.done}, error)

    def _answer(self, client: Client, number: int, fields: dict[str, Any], error: ForgeError | None = None) -> None:
        if not client.gone:
            told = fields if error is None else {"error": error.to_wire()}
            self._telling.answer(client, number, error is None, told, None)
