"""Warm spares (X2): processes that have imported a service's class and wait for a replica of it to start.

`seating` takes one for a replica before it looks for any other seat, asks for their room when a replica finds none, and has them made
anew (`fill`) when there is room that nobody else needs. They hold no instance, so they come and go without a word to clients. What
makes one fail is the service's to know, never its end: replicas start without spares as they do where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from forge_broker.core.actions import Kill
from forge_broker.core.actions import Launch as LaunchAction
from forge_broker.core.deadlines import Kind
from forge_broker.core.recovery import backoff_s, is_forgiven
from forge_broker.core.replicas import Replica, ReplicaState
from forge_broker.core.services import Service
from forge_broker.core.state import Launch, Spare, State
from forge_broker.core.workers import MOVES, Worker, WorkerMove, WorkerState
from forge_contract.errors import ProtocolError
from forge_contract.messages import STOP, WARM

KILL_AFTER_S: Final = 3.0  # a spare runs nothing: it leaves at once, or hangs in what its import started

Fits = Callable[[Sequence[str], int], bool]
"""Whether a replica could be placed with so many GPUs and processes more."""


class Spares:
    def __init__(self, state: State) -> None:
        self._state = state

    # One spare's life.

    def take(self, replica: Replica) -> Spare | None:
        """The spare that becomes this replica: a warm one if there is any, else the one that is nearest to it."""
        service: Service = replica.service
        if not service.spares:
            return None
        spare: Spare = min(service.spares.values(), key=lambda one: (one.warm_at is None, one.number))
        del service.spares[spare.number]
        warm = spare.warm_at is not None
        if warm:
            service.spare_deaths = 0
        for rank, launch in enumerate(spare.launches):
            launch.seat(replica)
            for gpu in launch.gpus:
                self._state.slots[gpu] = f"{replica.name}.{rank}"
        self._state.note("info", "spare becomes a replica", replica=replica.name, warm=warm)
        return spare

    def joined(self, worker: Worker, launch: Launch) -> None:
        """A spare's process has said hello, and may import."""
        spare = launch.spare
        assert spare is not None
        worker.move(WorkerMove.WARM)
        worker.post([WARM, {**spare.service.source, "gpus": spare.gpus}])
        self._state.deliver(worker)

    def warmed(self, worker: Worker, now: float) -> None:
        """WARMED: its process has imported the class. Raises ProtocolError from who was not told to."""
        if WorkerMove.WARMED not in MOVES[worker.state]:
            raise ProtocolError(f"WARMED from a worker that is {worker.state.value}")
        worker.move(WorkerMove.WARMED)
        launch = self._state.launches.get(worker.launch)
        spare = launch.spare if launch is not None else None
        if spare is None or spare.warm_at is not None:
            return
        ranks = [self._state.worker_of(one.id) for one in spare.launches]
        if all(rank is not None and rank.state is WorkerState.WARM for rank in ranks):
            spare.warm_at = now
            service = spare.service
            if len(service.spares) == service.config.warm_spares:
                service.spare_why = ""
            self._state.note("info", "spare warm", service=service.name, spare=spare.number)

    def lost(self, launch: Launch, why: str, last_lines: list[str], now: float) -> None:
        """A process of a spare failed or ended: the spare is none any more, and the next one comes after a pause. Nothing to say
        when it had left the spares before."""
        spare = launch.spare
        if spare is None:
            return
        service, state = spare.service, self._state
        rank = f"rank {launch.rank}: " if len(spare.launches) > 1 else ""
        forgiven = spare.warm_at is not None and is_forgiven(now - spare.warm_at, 0)
        service.spare_deaths = 1 if forgiven else service.spare_deaths + 1
        config = service.config
        wait_s = backoff_s(
            service.spare_deaths, config.restart_backoff_s, config.restart_backoff_at_most_s, state.random
        )
        service.spare_at = now + wait_s
        service.spare_why = f"the last one failed: {rank}{why}" + "".join(f"\n  {line}" for line in last_lines)
        state.deadlines.add(service.spare_at, Kind.SPARE, (service.id, 0))
        state.note("warning", "spare lost", service=service.name, why=rank + why, last_lines=last_lines)
        state.story.tell(now, service.spares_name, f"spare {spare.number} lost: {rank}{why}")
        launch.leaving = True
        self._remove(spare, f"another rank of it is lost: {why}", now)

    def is_late(self, service_id: int, number: int, now: float) -> None:
        """A spare has had `start_timeout_s` for its import."""
        service = self._state.services.get(service_id)
        spare: Spare | None = service.spares.get(number) if service is not None else None
        if service is None or spare is None or spare.warm_at is not None:
            return
        for launch in spare.launches:
            self._state.actions.append(Kill(launch.id))
        why = f"its import is not over after start_timeout_s={service.config.start_timeout_s}"
        self.lost(spare.launches[0], why, [], now)

    def dismiss(self, spare: Spare, why: str, now: float) -> None:
        """It is not wanted any more; that is not held against it."""
        self._state.story.tell(now, spare.service.spares_name, f"spare {spare.number} dismissed: {why}")
        self._remove(spare, why, now)

    def dismiss_all(self, service: Service, why: str, now: float) -> None:
        for spare in list(service.spares.values()):
            self._remove(spare, why, now)

    def _remove(self, spare: Spare, why: str, now: float) -> None:
        state = self._state
        spare.service.spares.pop(spare.number, None)
        for launch in spare.launches:
            launch.spare = None
            if launch.leaving:
                continue
            launch.leaving = True
            worker = state.worker_of(launch.id)
            if worker is None or worker.state is not WorkerState.WARM:
                # It imports, and would hear of it only afterwards.
                state.actions.append(Kill(launch.id))
                continue
            worker.move(WorkerMove.STOP)
            worker.post([STOP, why, 0.0, False])
            state.deliver(worker)
            state.deadlines.add(now + KILL_AFTER_S, Kind.KILL, worker)

    # Room.

    def make_room(self, replica: Replica, fits: Fits, now: float) -> str:
        """A replica has no place. Says what it waits for, when that is for processes that are on their way out, or for spares of other
        services, which then are; nothing when all that would not be enough."""
        state = self._state
        # One that drains may take its grace, for which a spare is no reason to wait.
        leaving = [
            launch
            for launch in state.launches.values()
            if launch.leaving and (launch.replica is None or state.worker_of(launch.id) is None)
        ]
        gpus = [gpu for launch in leaving for gpu in launch.gpus]
        processes = len(leaving)
        if leaving and fits(gpus, processes):
            return "what leaves makes room for it"
        others = [
            spare
            for service in state.services.values()
            if service is not replica.service
            for spare in service.spares.values()
        ]
        others.sort(key=lambda spare: -spare.number)  # the newest has imported least
        chosen: list[Spare] = []

        def enough(spares: Sequence[Spare]) -> bool:
            freed = [gpu for spare in spares for gpu in spare.gpus]
            return fits(gpus + freed, processes + sum(len(spare.launches) for spare in spares))

        for spare in others:
            chosen.append(spare)
            if enough(chosen):
                break
        else:
            return ""
        for spare in chosen[:-1]:
            rest = [one for one in chosen if one is not spare]
            if enough(rest):
                chosen = rest
        for spare in chosen:
            self.dismiss(spare, f"it gives way to {replica.name}", now)
            spare.service.spare_why = f"the last one gave way to {replica.name}"
        names = ", ".join(sorted({spare.service.name for spare in chosen}))
        return f"spares of {names} give way to it"

    def fill(self, now: float) -> None:
        """Have as many spares as are wanted, where there is room that no replica needs. Called when somebody had the chance to take it."""
        for service in self._state.services.values():
            if service.config.warm_spares > len(service.spares):
                self._fill(service, now)

    def _fill(self, service: Service, now: float) -> None:
        if not service.started or service.stopping is not None or now < service.spare_at:
            return
        config = service.config
        needed = config.world * config.gpus_per_rank
        while len(service.spares) < config.warm_spares:
            processes, gpus = self._spared()
            if processes < config.world or len(gpus) < needed:
                also = f" and {needed} GPUs ({len(gpus)} to spare)" if needed else ""
                left = f"{max(0, processes)} to spare below max_workers"
                self._wait(service, f"no room: one takes {config.world} processes ({left}){also}")
                return
            self._make(service, gpus, now)
        if not service.spare_deaths:
            service.spare_why = ""

    def _make(self, service: Service, gpus: list[str], now: float) -> None:
        state, each = self._state, service.config.gpus_per_rank
        spare = Spare(service, state.next_id())
        service.spares[spare.number] = spare
        for rank in range(service.config.world):
            launch = Launch(state.next_launch(), tuple(gpus[rank * each : (rank + 1) * each]), service, rank)
            launch.spare = spare
            spare.launches.append(launch)
            state.launches[launch.id] = launch
            for gpu in launch.gpus:
                state.slots[gpu] = f"{service.spares_name}.{rank}"
            label = f"{service.class_name}/spare.{rank}"
            state.actions.append(LaunchAction(launch.id, launch.gpus, label, service.preload))
        state.deadlines.add(now + service.config.start_timeout_s, Kind.SPARE, (service.id, spare.number))

    def _wait(self, service: Service, why: str) -> None:
        if service.spare_why != why:
            service.spare_why = why
            self._state.note("info", "spare pending", service=service.name, why=why)

    def _spared(self) -> tuple[int, list[str]]:
        """Processes and GPUs that are free and not needed by replicas about to be tried again: else a spare would take the place
        of one that waits out its backoff, only to give way to it."""
        state = self._state
        starting = {launch.replica.key for launch in state.launches.values() if launch.replica and not launch.leaving}
        processes = state.config.max_workers - len(state.launches)
        free = [gpu for gpu, holder in state.slots.items() if not holder]
        reserved = 0
        for service in state.services.values():
            for replica in service.replicas.values():
                if (
                    replica.state in (ReplicaState.RECOVERING, ReplicaState.UNHEALTHY)
                    and not any(replica.ranks)
                    and replica.key not in state.pending
                    and replica.key not in starting
                ):
                    processes -= service.config.world
                    reserved += service.config.world * service.config.gpus_per_rank
        return processes, free[: max(0, len(free) - reserved)]
