"""Replicas and the workers that become their ranks: who waits for seats, where they are found, what a worker is told to become.

`placement` decides where; here it is carried out, with the GPUs of this machine counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from forge_broker.core.actions import Label
from forge_broker.core.actions import Launch as LaunchAction
from forge_broker.core.deadlines import Kind
from forge_broker.core.placement import Idle, Need, Pending, Seat, place
from forge_broker.core.replicas import Replica
from forge_broker.core.services import Replay, Service
from forge_broker.core.spares import Spares
from forge_broker.core.state import Launch, Spare, State
from forge_broker.core.telling import Telling
from forge_broker.core.workers import Worker, WorkerMove, WorkerState
from forge_contract.errors import ConfigError
from forge_contract.messages import ASSIGN, BEGIN, REPLAY

KEPT: Final = "kept for the successor of "  # with spaces, which no name of a worker or a replica has
_NO_SEAT: Final = Seat("", (), None)


class Seating:
    def __init__(self, state: State, telling: Telling, spares: Spares) -> None:
        self._state = state
        self._telling = telling
        self._spares = spares

    def add_replica(self, service: Service, now: float) -> Replica:
        replica = self.seatless_replica(service, service.free_idx(), now)
        self.want(replica, now)
        return replica

    def seatless_replica(self, service: Service, idx: int, now: float) -> Replica:
        """One more, that nobody has asked seats for."""
        config = service.config
        replica = Replica(service, self._state.next_id(), idx, config.world, config.concurrency, now)
        replica.seats = [_NO_SEAT] * config.world
        service.replicas[idx] = replica
        return replica

    def want(self, replica: Replica, now: float) -> None:
        """This replica needs seats."""
        replica.started_at = now
        self._state.pending[replica.key] = replica
        timeout = replica.service.config.start_timeout_s
        self._state.deadlines.add(now + timeout, Kind.START, (replica.service.id, replica.idx, replica.epoch))

    def place_pending(self, now: float) -> None:
        """Give seats to whoever waits for them, in order: a spare of its service, else where `placement` says. What is left is for
        spares. Called when a worker, a process or a GPU became free."""
        state = self._state
        if state.terminating or state.window is not None:
            return
        awaited = False
        for replica in list(state.pending.values()):
            spare = self._spares.take(replica)
            if spare is not None:
                del state.pending[replica.key]
                self._seat_spare(replica, spare)
                continue
            config = replica.service.config
            idle = [
                Idle(worker.name, worker.host, worker.gpus)
                for worker in state.workers.values()
                if worker.state is WorkerState.IDLE and not worker.launch
            ]
            free_gpus = [gpu for gpu, holder in state.slots.items() if not holder]
            free_processes = state.config.max_workers - len(state.launches)
            need = Need(config.procs, config.hosts, config.gpus_per_rank)
            seats = place(need, idle, state.host, free_gpus, free_processes)
            if isinstance(seats, Pending):

                def fits(gpus: Sequence[str], processes: int, need: Need = need, idle: Sequence[Idle] = idle) -> bool:
                    free = [gpu for gpu, holder in state.slots.items() if not holder]
                    more = place(
                        need,
                        idle,
                        state.host,
                        [*free, *gpus],
                        state.config.max_workers - len(state.launches) + processes,
                    )
                    return not isinstance(more, Pending)

                made = self._spares.make_room(replica, fits, now)
                awaited |= bool(made)
                self._pending(replica, f"{seats.why}; {made}" if made else seats.why, now)
            else:
                del state.pending[replica.key]
                self._seat(replica, seats, now)
        if not awaited:
            self._spares.fill(now)

    def preloaded(self, service_id: int, why: str, now: float) -> None:
        """Its workers are forked, or, for this reason, cannot be."""
        service = self._state.services.get(service_id)
        if service is None:
            return
        service.preload_ready, service.preload_why = not why, why
        if why:
            self._state.note("warning", "not preloaded", service=service.name, why=why)
            self._state.story.tell(now, f"{service.name}/preload", f"workers are started, not forked: {why}")

    def spare_due(self, which: tuple[int, int], now: float) -> None:
        """A spare has had its time to import, or another may be made. `which`: service id, number."""
        self._spares.is_late(*which, now)
        self.place_pending(now)

    def _pending(self, replica: Replica, why: str, now: float) -> None:
        """Told once per reason: in the log, in the story, and to whoever deployed it (A3)."""
        if replica.pending_why == why:
            return
        replica.pending_why = why
        state = self._state
        state.note("warning", "replica pending", replica=replica.name, why=why)
        state.story.tell(now, replica.name, f"pending, because it {why}")
        self._telling.notice(replica.service, "pending", name=replica.service.name, replica=replica.idx, why=why)

    def _seat(self, replica: Replica, seats: list[Seat], now: float) -> None:
        state = self._state
        replica.pending_why = ""
        replica.seats = seats
        for rank, seat in enumerate(seats):
            if seat.worker is not None:
                self.assign(state.workers[seat.worker], replica, rank)
                continue
            launch = Launch(state.next_launch(), seat.gpus, replica.service, rank)
            launch.seat(replica)
            state.launches[launch.id] = launch
            for gpu in seat.gpus:
                state.slots[gpu] = f"{replica.name}.{rank}"
            state.actions.append(LaunchAction(launch.id, seat.gpus, _label(replica, rank), replica.service.preload))

    def _seat_spare(self, replica: Replica, spare: Spare) -> None:
        """Its processes that have said hello are told at once, the others when they do, as any that are launched."""
        state = self._state
        replica.pending_why = ""
        replica.seats = [Seat(state.host, launch.gpus, None) for launch in spare.launches]
        for rank, launch in enumerate(spare.launches):
            state.actions.append(Label(launch.id, _label(replica, rank)))
            worker = state.worker_of(launch.id)
            if worker is not None:
                self.assign(worker, replica, rank)

    def assign(self, worker: Worker, replica: Replica, rank: int) -> None:
        service: Service = replica.service
        worker.move(WorkerMove.ASSIGN)
        worker.replica = replica
        worker.rank = rank
        replica.ranks[rank] = worker
        here = [one for one, seat in enumerate(replica.seats) if seat.host == replica.seats[rank].host]
        fields = {
            **service.source,
            "service": service.id,
            "replica": replica.idx,
            "epoch": replica.epoch,
            "rank": rank,
            "world": len(replica.ranks),
            "local_rank": here.index(rank),
            "local_world": len(here),
            "gpus": [gpu for one in here for gpu in replica.seats[one].gpus],
            "endpoints": [{"name": endpoint.name, "options": endpoint.options} for endpoint in service.endpoints],
            "concurrency": service.config.concurrency,
            "serial": service.config.concurrency == 1 and len(replica.ranks) > 1,
            "max_payload_bytes": self._state.config.max_payload_bytes,
            "checkpoint_every": service.config.session_checkpoint_every if service.exports else 0,
            "health_poll_rate": service.config.health_poll_rate,
            "fatal_errors": list(service.config.fatal_errors),
            "kept_reply_bytes": self._state.config.kept_reply_bytes,
            "deed": service.deed(),
        }
        worker.post([ASSIGN, fields, worker.outbox.attach(service.init)])
        for method, replay in service.replays.items():
            self.replay(worker, method, replay)
        if replica.master is not None:
            worker.post([BEGIN, *replica.master])
        self._state.deliver(worker)

    def take_seat(self, worker: Worker, replica: Replica, rank: int, seat: Seat) -> None:
        """A worker that holds a rank of this replica and is ready."""
        state = self._state
        if worker.host == state.host:
            self.hold_slots(worker)
        for move in (WorkerMove.HELLO, WorkerMove.ASSIGN, WorkerMove.READY):
            worker.move(move)
        state.workers[worker.name] = worker
        worker.replica = replica
        worker.rank = rank
        replica.ranks[rank] = worker
        replica.seats[rank] = seat

    def hold_slots(self, worker: Worker) -> None:
        slots = self._state.slots
        for gpu in worker.gpus:
            holder = slots.get(gpu, "")
            if holder and not holder.startswith(KEPT):
                raise ConfigError(where=f"worker {worker.name}", message=f"GPU {gpu} is in use by {holder}")
        for gpu in worker.gpus:
            slots[gpu] = worker.name

    def free_slot(self, kept: tuple[str, str], now: float) -> None:
        """Nobody came back for a GPU that was kept."""
        gpu, holder = kept
        if self._state.slots.get(gpu) == holder:
            if gpu in self._state.config.gpus:
                self._state.slots[gpu] = ""
            else:
                del self._state.slots[gpu]
            self.place_pending(now)

    def replay(self, worker: Worker, method: int, replay: Replay) -> None:
        worker.replays += 1
        worker.post([REPLAY, method, replay.trusted, worker.outbox.attach(replay.payload)])
        self._state.deliver(worker)


def _label(replica: Replica, rank: int) -> str:
    """How people see the output of this rank."""
    return f"{replica.service.class_name}/{replica.idx}.{rank}"
