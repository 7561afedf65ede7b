"""Services, replicas and workers: how they start, get ready, are lost and stop.

`broker` tells what workers, clients and the kernel say. `catalogue` makes services, `seating` finds places for their replicas, `telling`
lets clients know, `recovery` says when to try again; `dispatch` takes calls back from what is lost and serves what became
healthy. The lives themselves are tables in `workers` and `replicas`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from forge_broker.core.actions import Exit, Kill, KillPeer, Unload
from forge_broker.core.catalogue import Catalogue
from forge_broker.core.clients import Client
from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.leftovers import Leftovers
from forge_broker.core.recovery import UNHEALTHY_AFTER, backoff_s, is_forgiven
from forge_broker.core.replicas import Replica, ReplicaMove, ReplicaState
from forge_broker.core.requests import Request
from forge_broker.core.seating import KEPT, Seating
from forge_broker.core.services import Endpoint, Service, read_spec
from forge_broker.core.sessions import Sessions
from forge_broker.core.spares import Spares
from forge_broker.core.state import State
from forge_broker.core.telling import Telling
from forge_broker.core.workers import Worker, WorkerMove, WorkerState
from forge_contract.errors import ConfigError, ForgeError, ProtocolError, ServiceStopped, StartFailed
from forge_contract.framing import Payload
from forge_contract.messages import BEGIN, STOP

KILL_AFTER_GRACE_S: Final = 3.0  # for teardown, beyond the grace for running calls
LOST_KEPT_S: Final = 3600.0  # a silent worker of another host is remembered so long
SLOT_KEPT_S: Final = 10.0  # a hand-started worker's GPU is kept for the child its supervisor starts next

_ENDING = frozenset({ReplicaState.DRAINING, ReplicaState.STOPPED})


class Lifecycle:
    def __init__(
        self,
        state: State,
        dispatch: Dispatch,
        sessions: Sessions,
        catalogue: Catalogue,
        seating: Seating,
        telling: Telling,
        leftovers: Leftovers,
        spares: Spares,
    ) -> None:
        self._state = state
        self._dispatch = dispatch
        self._sessions = sessions
        self._catalogue = catalogue
        self._seating = seating
        self._telling = telling
        self._leftovers = leftovers
        self._spares = spares

    # Services.

    def deploy(self, client: Client, number: int, spec: Any, init: Payload, now: float) -> None:
        """Start a service; the answer is due when all its replicas are HEALTHY. Raises ForgeError for a spec that cannot hold."""
        state = self._state
        if state.terminating:
            raise ServiceStopped(service="the broker", why=f": {state.terminating}")
        config = read_spec(spec, client.trusted)
        name = self._catalogue.name_of(config, spec["class_name"])
        owner = None if config.detached or client.detached else client
        ids = [state.next_id() for _ in range(1 + len(spec["endpoints"]))]
        service = self._catalogue.make(ids, name, spec, config, init, client.trusted, now)
        service.owner = owner
        service.waiting_start.append((client, number))
        service.watchers.add(client.name)
        if owner is not None:
            client.services.add(service.id)
        state.note("info", "service deployed", service=name, replicas=config.initial_replicas, kind=service.kind)
        for _ in range(service.wanted):
            self._seating.add_replica(service, now)
        if not service.replicas:
            self._started(service, now)
        self._seating.place_pending(now)

    def turn_away(self, worker: Worker, now: float) -> None:
        """It holds what nobody wants from it."""
        if worker.state is WorkerState.STARTING:
            worker.move(WorkerMove.HELLO)
            self._state.workers[worker.name] = worker
        worker.replica = None
        self._tell_to_stop(worker, "what it holds is not wanted any more", 0.0, now)

    def resume(self, service: Service, now: float) -> None:
        """The recovery window is over: who has all ranks is HEALTHY, the others start anew, and so do those nobody spoke for."""
        service.started = True
        for replica in list(service.replicas.values()):
            if replica.state is not ReplicaState.UNINITIALIZED:
                continue
            self._admit(replica, now)
            if not replica.healthy:
                self.replica_lost(replica, "not all of its ranks came back to the broker", [], now, blame=False)
        if len(service.replicas) > service.wanted:
            service.resize(len(service.replicas))  # nobody told us of these: whoever knew is gone
        while len(service.replicas) < service.wanted:
            self._seating.add_replica(service, now).restarts = 1  # it is known to have been there before

    # Workers.

    def worker_joined(self, worker: Worker, now: float) -> None:
        """A hello: a launched worker takes the seat it was launched for, any other becomes idle. Raises ForgeError: not welcome."""
        state = self._state
        if worker.host == state.host and not worker.launch:
            self._seating.hold_slots(worker)
        if worker.launch and any(other.launch == worker.launch for other in state.workers.values()):
            raise ConfigError(where=f"worker {worker.name}", message=f"launch {worker.launch} has a worker already")
        worker.move(WorkerMove.HELLO)
        state.workers[worker.name] = worker
        launch = state.launches.get(worker.launch)
        if launch is None and worker.launch:
            self._tell_to_stop(worker, "its launch is not known", 0.0, now)
        elif launch is not None and launch.spare is not None:
            self._spares.joined(worker, launch)
        elif launch is not None:
            replica = launch.replica
            if replica is None or replica.epoch != launch.epoch or replica.state in _ENDING:
                self._tell_to_stop(worker, "nobody wants it any more", 0.0, now)
            else:
                self._seating.assign(worker, replica, launch.rank)
        elif worker.hello.get("holds"):
            self._tell_to_stop(worker, "it holds a replica that this broker does not know", 0.0, now)
        else:
            state.note("info", "worker joined", worker=worker.name, hostname=worker.hello["hostname"], gpus=worker.gpus)
            self._seating.place_pending(now)

    def master(self, worker: Worker, address: str, port: int) -> None:
        """MASTER: rank 0 chose the rendezvous of this epoch; tell every rank."""
        replica: Replica | None = worker.replica
        if replica is None or worker.rank != 0 or replica.ranks[0] is not worker:
            return
        replica.master = (address, port)
        for rank in replica.ranks:
            if rank is not None:
                rank.post([BEGIN, address, port])
                self._state.deliver(rank)

    def ready(self, worker: Worker, played: int, now: float) -> None:
        """READY: a rank has run its setup and so many replays; the replica is HEALTHY when all have. Raises ProtocolError when it makes
        no sense."""
        was = worker.state
        if was not in (WorkerState.LOADING, WorkerState.READY, WorkerState.DRAINING):
            raise ProtocolError(f"READY from a worker that is {was.value}")
        if played > worker.replays or (was is WorkerState.READY and played <= worker.played):
            raise ProtocolError(
                f"READY after {played} replays, of {worker.replays} that were sent and {worker.played} told of"
            )
        worker.move(WorkerMove.READY)
        worker.played = played
        replica: Replica = worker.replica
        if was is not WorkerState.DRAINING and replica.ranks[worker.rank] is worker:
            self._admit(replica, now)

    def replayed(self, service: Service, now: float) -> None:
        """A fan-out with `replay_last` is over: who started meanwhile has not had it (A11)."""
        if service.open_replays:
            return
        for replica in service.replicas.values():
            if replica.healthy:
                continue
            for worker in replica.ranks:
                if worker is not None and worker.state in (WorkerState.LOADING, WorkerState.READY):
                    for method, replay in service.replays.items():
                        self._seating.replay(worker, method, replay)
            self._admit(replica, now)

    def _admit(self, replica: Replica, now: float) -> None:
        """HEALTHY, once all its ranks are ready and have been told what the others know."""
        service: Service = replica.service
        if replica.healthy or replica.state in _ENDING or service.open_replays:
            return
        if not all(
            rank is not None and rank.state is WorkerState.READY and rank.played >= rank.replays
            for rank in replica.ranks
        ):
            return
        replica.move(ReplicaMove.READY)
        replica.healthy_at = now
        replica.answered_before = replica.stats.total
        service.pool.admit(replica)
        service.unhealthy_since = None
        self._state.note(
            "info",
            "replica healthy",
            replica=replica.name,
            epoch=replica.epoch,
            after_s=round(now - replica.started_at, 3),
        )
        if replica.restarts:
            self._state.story.tell(now, replica.name, f"HEALTHY again, epoch {replica.epoch}")
            self._telling.notice(service, "restarted", replica=replica.idx, epoch=replica.epoch)
        if not service.started and all(other.healthy for other in service.replicas.values()):
            self._started(service, now)
            self._seating.place_pending(now)  # it may have spares from now on
        for queue in [*service.rotation, replica.parked]:
            service.wake(queue)
        self._dispatch.pump(service, now)

    def unready(self, worker: Worker, error: Any, payload: Payload | None, now: float) -> None:
        """UNREADY: the import, `__init__` or `setup` raised, which during the first start is the deployer's error (A2); or a worker that
        was READY cannot serve any more: it is ill, or its process broken (F1, F6)."""
        replica: Replica | None = worker.replica
        told = ""
        if isinstance(error, list) and len(error) == 2 and isinstance(error[1], dict):
            told = f": {error[1].get('message') or error[1].get('why') or error[1].get('type_name') or error[0]}"
        launch = self._state.launches.get(worker.launch)
        if launch is not None and launch.spare is not None:
            self._spares.lost(launch, f"could not import{told}", [], now)
            self._tell_to_stop(worker, "its import failed", 0.0, now)
        if replica is None or replica.ranks[worker.rank] is not worker:
            return
        service: Service = replica.service
        why = f"rank {worker.rank} " + ("cannot go on" if worker.state is WorkerState.READY else "could not start")
        why += told
        if service.started or service.stopping is not None:
            # Nobody is convicted: what made it ill has had its answer, and the others only were there.
            self.replica_lost(replica, why, [], now, convicted=())
            return
        fields = (
            {"error": error}
            if isinstance(error, list)
            else {"error": StartFailed(service=service.name, why=why).to_wire()}
        )
        service.start_failure = ({**fields, "trusted": worker.trusted}, payload)
        replica.last_error = why
        self.stop_service(service, ServiceStopped(service=service.name, why=f": {why}"), now)

    def worker_silent(self, worker: Worker, why: str, now: float) -> None:
        """On another host silence is death, as far as its calls go. What the worker holds stays taken until it is heard from (F1)."""
        state = self._state
        worker.move(WorkerMove.SILENT)
        state.note("warning", "worker lost", worker=worker.name, why=why)
        state.deadlines.add(now + LOST_KEPT_S, Kind.SILENCE, worker.name)
        self._leave_seat(worker, why, [], now, blame=True)

    def heard_again(self, worker: Worker, now: float) -> None:
        """A worker that was taken for dead lives: what it ran has gone to others, and its replies are fenced."""
        self._state.story.tell(now, worker.name, "heard from again")
        self._tell_to_stop(worker, "it was silent for too long, and its replica is elsewhere", 0.0, now)

    def stopped(self, worker: Worker, now: float) -> None:
        """Its process is stopped (state T), for so long that nobody means to let it go on (F1)."""
        self._state.note("warning", "worker killed", worker=worker.name, why="its process was stopped")
        self._state.story.tell(now, worker.name, "killed, because its process was stopped")
        self._kill(worker, "its process was stopped", now)

    def hung(self, watch: tuple[Replica, Endpoint], now: float) -> None:
        """A call may have run for `hang_timeout_s`: its replica is lost by it, and of all it ran such calls alone are suspects (F4)."""
        replica, endpoint = watch
        replica.hang_watches.discard(endpoint.id)
        running = [one for one in self._state.ledger.of(replica) if one.endpoint is endpoint]
        if not running:
            return
        limit_s: float = endpoint.hang_timeout_s or 0.0
        hanging = [one for one in running if now - one.started_at >= limit_s - 1e-6]
        if not hanging:
            self._dispatch.watch(replica, endpoint, min(one.started_at for one in running))
            return
        why = f"{endpoint.full_name} ran longer than hang_timeout_s={limit_s}"
        workers = [worker for worker in replica.ranks if worker is not None]
        if replica.state is not ReplicaState.DRAINING:
            self.replica_lost(replica, why, [], now, convicted=hanging)
        for worker in workers:
            self._kill(worker, why, now)

    def _kill(self, worker: Worker, why: str, now: float) -> None:
        """Now. What it held is freed when the kernel says that it is gone; of one on another host we can only stop speaking to it."""
        state = self._state
        if worker.launch in state.launches:
            state.actions.append(Kill(worker.launch))
        elif worker.watched:
            state.actions.append(KillPeer(worker.name))
        else:
            self.worker_gone(worker, why, [], now)

    def worker_gone(self, worker: Worker, why: str, last_lines: list[str], now: float, *, blame: bool = True) -> None:
        """Its process has ended, or it said bye: whatever it held is taken back. `blame`: it did not mean to."""
        state = self._state
        state.links.pop(worker.name, None)
        if state.workers.pop(worker.name, None) is None:
            return
        worker.move(WorkerMove.END)
        self._leftovers.of(worker, now)
        launch = state.launches.get(worker.launch)
        if launch is not None:
            self._spares.lost(launch, why, last_lines, now)
            launch.leaving = True
        if not worker.launch and worker.host == state.host:
            for gpu in worker.gpus:
                state.slots[gpu] = f"{KEPT}{worker.name}"
                state.deadlines.add(now + SLOT_KEPT_S, Kind.SLOT, (gpu, state.slots[gpu]))
        state.note("info", "worker gone", worker=worker.name, why=why)
        self._leave_seat(worker, why, last_lines, now, blame=blame)

    def _leave_seat(self, worker: Worker, why: str, last_lines: list[str], now: float, *, blame: bool) -> None:
        """A rank is empty: its replica is lost by that, unless it was on its way out."""
        replica: Replica | None = worker.replica
        worker.replica = None
        if replica is None or replica.ranks[worker.rank] is not worker:
            return
        replica.ranks[worker.rank] = None
        if replica.state is ReplicaState.DRAINING:
            self._check_stopped(replica, now)
        else:
            convicted = None if blame else ()
            self.replica_lost(replica, f"rank {worker.rank}: {why}", last_lines, now, blame=blame, convicted=convicted)

    def launch_ended(self, launch_id: int, why: str, last_lines: list[str], now: float) -> None:
        """The kernel says a launched process is gone: only now are its GPUs free."""
        state = self._state
        launch = state.launches.pop(launch_id, None)
        if launch is None:
            return
        for gpu in launch.gpus:
            state.slots[gpu] = ""
        self._spares.lost(launch, why, last_lines, now)
        worker = state.worker_of(launch_id)
        replica = launch.replica
        if worker is not None:
            self.worker_gone(worker, why, last_lines, now)
        elif replica is None:
            pass  # of a spare, which holds nothing
        elif replica.state is ReplicaState.DRAINING:
            self._check_stopped(replica, now)
        elif replica.epoch == launch.epoch and replica.state not in _ENDING:
            self.replica_lost(replica, f"rank {launch.rank}: {why}", last_lines, now)
        self._check_service(launch.service, now)
        self._seating.place_pending(now)

    # Replicas.

    def replica_lost(
        self,
        replica: Replica,
        why: str,
        last_lines: list[str],
        now: float,
        *,
        blame: bool = True,
        convicted: Collection[Request] | None = None,
    ) -> None:
        """One rank is enough to lose it. Its calls go back to their queues, its other ranks stop, and it is tried again. `convicted`: the
        calls that may have been its death, None for all in flight."""
        state = self._state
        service: Service = replica.service
        service.pool.remove(replica)
        was_healthy = replica.state is ReplicaState.HEALTHY
        replica.move(ReplicaMove.LOST)
        if replica.state is ReplicaState.DRAINING:
            return
        replica.last_error = why + ("".join(f"\n  {line}" for line in last_lines))
        if was_healthy and is_forgiven(now - replica.healthy_at, replica.stats.total - replica.answered_before):
            replica.deaths = 0
        replica.deaths += blame
        replica.restarts += 1
        service.stats.restarts += 1
        state.note("warning", "replica lost", replica=replica.name, epoch=replica.epoch, why=why, last_lines=last_lines)
        state.story.tell(now, replica.name, f"lost in epoch {replica.epoch}: {why}")
        old = replica.ranks
        self._next_epoch(replica)
        if service.kind == "actor" and was_healthy:
            service.state_epoch += 1
        for worker in old:
            if worker is not None:
                worker.replica = None
                self._tell_to_stop(worker, "another rank of its replica is lost", 0.0, now)
        self._kill_unheard(replica)
        self._dispatch.release(replica, why, now, convicted)
        if not service.started and replica.deaths >= UNHEALTHY_AFTER:
            error = StartFailed(
                service=service.name, why=f"{replica.name} died {replica.deaths} times: {why}", last_lines=last_lines
            )
            service.start_failure = ({"error": error.to_wire()}, None)
            self.stop_service(
                service, ServiceStopped(service=service.name, why=f": {replica.name} could not start"), now
            )
            return
        if replica.deaths >= UNHEALTHY_AFTER:
            replica.move(ReplicaMove.GIVE_UP)
        config = service.config
        wait_s = backoff_s(replica.deaths, config.restart_backoff_s, config.restart_backoff_at_most_s, state.random)
        state.deadlines.add(now + wait_s, Kind.RESTART, (service.id, replica.idx, replica.epoch))

    def _kill_unheard(self, replica: Replica) -> None:
        """Its processes that have not said hello yet, and those that have said bye."""
        for launch in self._state.launches.values():
            if launch.replica is replica and self._state.worker_of(launch.id) is None:
                launch.leaving = True
                self._state.actions.append(Kill(launch.id))

    def _next_epoch(self, replica: Replica) -> None:
        replica.ranks = [None] * len(replica.ranks)
        replica.epoch += 1
        replica.master = None
        replica.closed = ""

    def restart(self, start: tuple[int, int, int], now: float) -> None:
        """The wait before another try is over. `start`: service id, replica idx, epoch."""
        service_id, idx, epoch = start
        service = self._state.services.get(service_id)
        replica = service.replicas.get(idx) if service is not None else None
        if replica is None or replica.epoch != epoch or replica.state in _ENDING:
            return
        if replica.state is ReplicaState.UNHEALTHY:
            replica.move(ReplicaMove.TRY_AGAIN)
        self._seating.want(replica, now)
        self._seating.place_pending(now)

    def start_overdue(self, start: tuple[int, int, int], now: float) -> None:
        """A replica has been starting for `start_timeout_s`: the first start fails, a later one is tried anew."""
        service_id, idx, epoch = start
        service = self._state.services.get(service_id)
        replica = service.replicas.get(idx) if service is not None else None
        if service is None or replica is None or replica.epoch != epoch or replica.healthy:
            return
        if replica.state in _ENDING:
            return
        waited = service.config.start_timeout_s
        why = f"{replica.name} is not ready after start_timeout_s={waited}"
        why += f": pending, because it {replica.pending_why}" if replica.pending_why else ", its setup takes longer"
        if not service.started:
            service.start_failure = ({"error": StartFailed(service=service.name, why=why).to_wire()}, None)
            self.stop_service(service, ServiceStopped(service=service.name, why=f": {why}"), now)
        elif replica.key in self._state.pending:
            self._state.deadlines.add(now + waited, Kind.START, (service_id, idx, epoch))
        else:
            self.replica_lost(replica, why, [], now)

    # Stopping.

    def stop_service(self, service: Service, error: ForgeError, now: float) -> None:
        """Queued calls fail with `error`, running ones finish within the grace, then every worker is gone and so is the service."""
        if service.stopping is not None:
            return
        state = self._state
        service.stopping = error
        state.note("info", "service stopping", service=service.name)
        if service.start_failure is None:
            service.start_failure = ({"error": error.to_wire()}, None)
        self._dispatch.fail_queued(service, error)
        self._spares.dismiss_all(service, "its service is stopped", now)
        for replica in list(service.replicas.values()):
            self.stop_replica(replica, "its service is stopped", service.config.stop_grace_s, now)
        self._check_service(service, now)

    def stop_replica(
        self, replica: Replica, reason: str, grace_s: float, now: float, *, keep: Worker | None = None
    ) -> None:
        """Its running calls finish within the grace, the others go elsewhere, its sessions move when it is gone (F9). `keep`: the worker
        whose supervisor shall not replace it."""
        state = self._state
        service: Service = replica.service
        service.pool.remove(replica)
        replica.move(ReplicaMove.STOP)
        if service.cell is replica:
            service.cell = None
        replica.closed = ""
        state.pending.pop(replica.key, None)
        self._dispatch.evict(replica, now)
        for worker in replica.ranks:
            if worker is not None:
                # One that is still loading runs no calls that a grace could be for.
                within_s = grace_s if worker.state is WorkerState.READY else 0.0
                replace = not state.terminating and worker is not keep
                self._tell_to_stop(worker, reason, within_s, now, replace=replace)
        self._kill_unheard(replica)
        self._check_stopped(replica, now)

    def dismiss(self, worker: Worker, reason: str, now: float) -> None:
        """A worker that runs nothing leaves for good."""
        self._tell_to_stop(worker, reason, 0.0, now, replace=False)

    def _tell_to_stop(self, worker: Worker, reason: str, grace_s: float, now: float, *, replace: bool = True) -> None:
        launch = self._state.launches.get(worker.launch)
        if launch is not None:
            launch.leaving = True
            if launch.spare is not None:
                self._spares.dismiss(launch.spare, reason, now)
        worker.move(WorkerMove.STOP)
        worker.post([STOP, reason, grace_s, replace])
        self._state.deliver(worker)
        self._state.deadlines.add(now + grace_s + KILL_AFTER_GRACE_S, Kind.KILL, worker)

    def kill_overdue(self, worker: Worker, now: float) -> None:
        """A worker told to stop is still there, or has said bye and its process does not end. Of one on another host we can only stop
        speaking to it."""
        state = self._state
        here = state.workers.get(worker.name) is worker
        why = "it did not stop in time"
        if worker.launch in state.launches or here:
            # Having said bye it has nothing left to lose: no reason to alarm anybody.
            state.note("warning" if here else "info", "worker killed", worker=worker.name, why=why)
            self._kill(worker, why, now)

    def _check_stopped(self, replica: Replica, now: float) -> None:
        if any(replica.ranks) or replica.state is not ReplicaState.DRAINING:
            return
        # That it ended was our wish: what it did not finish within the grace is no suspect.
        self._dispatch.release(replica, "it was stopped", now, convicted=())
        service: Service = replica.service
        if replica.comes_back and service.stopping is None:
            replica.comes_back = False
            replica.move(ReplicaMove.RETURN)
            replica.restarts += 1
            service.stats.restarts += 1
            self._next_epoch(replica)
            if service.kind == "actor":
                service.state_epoch += 1
            self._seating.want(replica, now)
            self._seating.place_pending(now)
            return
        replica.move(ReplicaMove.STOPPED)
        if service.stopping is None:
            del service.replicas[replica.idx]
        self._check_service(service, now)

    def _check_service(self, service: Service, now: float) -> None:
        """Gone when the last of its workers and processes is."""
        state = self._state
        if service.stopping is None or service.id not in state.services:
            return
        if any(replica.state is not ReplicaState.STOPPED for replica in service.replicas.values()):
            return
        if any(launch.service is service for launch in state.launches.values()):
            return
        self._sessions.close_all(list(service.sessions.values()), "its service is stopped", now)
        del state.services[service.id]
        del state.names[service.name]
        for endpoint in service.endpoints:
            del state.endpoints[endpoint.id]
        if service.owner is not None:
            service.owner.services.discard(service.id)
        if service.config.preload:
            state.actions.append(Unload(service.id))
        state.note("info", "service stopped", service=service.name)
        self._telling.notice(service, "stopped", error=service.stopping.to_wire())
        # Whoever deployed it hears of a failed start now that nothing of it is left: it may be tried again at once.
        self._telling.answer_start(service, False, *service.start_failure)
        for client, number in service.waiting_stop:
            self._telling.answer(client, number, True, {}, None)

    # Ending.

    def terminate(self, why: str, now: float) -> None:
        """Stop everything we started; `finished` tells when it is gone."""
        state = self._state
        if state.terminating:
            return
        state.terminating = why
        state.note("info", "broker stopping", why=why)
        for service in list(state.services.values()):
            self.stop_service(service, ServiceStopped(service=service.name, why=": the broker is stopping"), now)
        for launch in state.launches.values():
            if state.worker_of(launch.id) is None:
                state.actions.append(Kill(launch.id))
        for worker in state.workers.values():
            if worker.state is WorkerState.IDLE:
                self.dismiss(worker, "the broker ends", now)
        self.check_finished()

    def check_finished(self) -> None:
        state = self._state
        if state.terminating and not state.launches and not state.services and not state.unread:
            state.actions.append(Exit())

    # Telling.

    def _started(self, service: Service, now: float) -> None:
        service.started = True
        self._telling.answer_start(service, True, self._telling.describe(service, now), None)
