"""Services, replicas and workers: how they start, are placed, get ready, are lost and stop.

`broker` tells what workers, clients and the kernel say; `placement` decides where ranks go and `recovery` when to try again; `dispatch`
takes calls back from what is lost and serves what became healthy. The lives themselves are tables in `workers` and `replicas`.
"""

from __future__ import annotations

from typing import Any, Final, cast

from forge_broker.core.actions import Exit, Kill, KillPeer
from forge_broker.core.actions import Launch as LaunchAction
from forge_broker.core.clients import Client
from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.placement import Idle, Need, Pending, Seat, place
from forge_broker.core.queues import Queue
from forge_broker.core.recovery import STEADY_S, UNHEALTHY_AFTER, backoff_s
from forge_broker.core.replicas import Replica, ReplicaMove, ReplicaState
from forge_broker.core.services import Endpoint, Service, read_router, read_spec
from forge_broker.core.sessions import Sessions
from forge_broker.core.state import Launch, State
from forge_broker.core.status import metrics
from forge_broker.core.workers import Worker, WorkerMove, WorkerState
from forge_contract.config import ServiceConfig
from forge_contract.errors import ConfigError, ForgeError, ProtocolError, ServiceStopped, StartFailed
from forge_contract.framing import Payload
from forge_contract.messages import ANSWER, ASSIGN, BEGIN, NOTICE, STOP
from forge_contract.routing import RoundRobinRouter

KILL_AFTER_GRACE_S: Final = 3.0  # for teardown, beyond the grace for running calls
_KEPT: Final = "kept for the successor of "  # with spaces, which no name of a worker or a replica has
SLOT_KEPT_S: Final = 10.0  # a hand-started worker's GPU is kept for the child its supervisor starts next

_ENDING = frozenset({ReplicaState.DRAINING, ReplicaState.STOPPED})


class Lifecycle:
    def __init__(self, state: State, dispatch: Dispatch, sessions: Sessions) -> None:
        self._state = state
        self._dispatch = dispatch
        self._sessions = sessions

    # Services.

    def deploy(self, client: Client, number: int, spec: Any, init: Payload, now: float) -> None:
        """Start a service; the answer is due when all its replicas are HEALTHY. Raises ForgeError for a spec that cannot hold."""
        state = self._state
        if state.terminating:
            raise ServiceStopped(service="the broker", why=f": {state.terminating}")
        config = read_spec(spec, client.trusted)
        if state.terminating:
            raise ServiceStopped(service=spec["class_name"], why=": the broker is stopping")
        name = self._name(config, spec["class_name"])
        owner = None if config.detached or client.detached else client
        service = Service(state.next_id(), name, spec, config, init, client, now)
        service.owner = owner
        shared = Queue(f"{name} calls")
        for method, one in enumerate(spec["endpoints"]):
            where = f"{name}.{one['name']}"
            router = read_router(
                one.get("router"), client.trusted, state.unpickle, lambda: state.random.getrandbits(32), where
            )
            # An actor's calls keep their order across its endpoints (A6), so they share a queue.
            queue = shared if service.kind == "actor" else Queue(where)
            service.endpoints.append(Endpoint(service, state.next_id(), method, one, router, queue))
        for endpoint in service.endpoints:
            same = [one.router for one in service.endpoints if one.queue is endpoint.queue]
            if all(type(router) is RoundRobinRouter for router in same):
                endpoint.queue.deal = cast(RoundRobinRouter, same[0]).deal
        state.services[service.id] = service
        state.names[name] = service
        state.endpoints.update({endpoint.id: endpoint for endpoint in service.endpoints})
        service.waiting_start.append((client, number))
        service.watchers.add(client.name)
        if owner is not None:
            client.services.add(service.id)
        state.note("info", "service deployed", service=name, replicas=config.initial_replicas, kind=service.kind)
        for _ in range(config.initial_replicas):
            self._add_replica(service, now)
        if not service.replicas:
            self._started(service, now)
        self.place_pending(now)

    def _name(self, config: ServiceConfig, class_name: str) -> str:
        names = self._state.names
        if config.name is not None:
            if config.name in names:
                raise ConfigError(
                    where="deploy",
                    message=f"a service named {config.name!r} is running; stop it or choose another name",
                )
            return config.name
        base = config.mesh_name or class_name
        return (
            base
            if base not in names
            else next(f"{base}-{n}" for n in range(2, len(names) + 3) if f"{base}-{n}" not in names)
        )

    def _add_replica(self, service: Service, now: float) -> None:
        config = service.config
        replica = Replica(service, self._state.next_id(), service.free_idx(), config.world, config.concurrency, now)
        service.replicas[replica.idx] = replica
        self._want(replica, now)

    def _want(self, replica: Replica, now: float) -> None:
        """This replica needs seats."""
        replica.started_at = now
        self._state.pending[replica.key] = replica
        timeout = replica.service.config.start_timeout_s
        self._state.deadlines.add(now + timeout, Kind.START, (replica.service.id, replica.idx, replica.epoch))

    # Placement.

    def place_pending(self, now: float) -> None:
        """Give seats to whoever waits for them, in order. Called when a worker, a process or a GPU became free."""
        state = self._state
        if state.terminating:
            return
        for replica in list(state.pending.values()):
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
                self._pending(replica, seats.why, now)
            else:
                del state.pending[replica.key]
                self._seat(replica, seats, now)

    def _pending(self, replica: Replica, why: str, now: float) -> None:
        """Told once per reason: in the log, in the story, and to whoever deployed it (A3)."""
        if replica.pending_why == why:
            return
        replica.pending_why = why
        state = self._state
        state.note("warning", "replica pending", replica=replica.name, why=why)
        state.story.tell(now, replica.name, f"pending, because it {why}")
        self._notice(replica.service, "pending", name=replica.service.name, replica=replica.idx, why=why)

    def _seat(self, replica: Replica, seats: list[Seat], now: float) -> None:
        state = self._state
        replica.pending_why = ""
        replica.seats = seats
        for rank, seat in enumerate(seats):
            if seat.worker is not None:
                self._assign(state.workers[seat.worker], replica, rank)
                continue
            launch = Launch(state.next_id(), seat.gpus, replica, rank)
            state.launches[launch.id] = launch
            for gpu in seat.gpus:
                state.slots[gpu] = f"{replica.name}.{rank}"
            label = f"{replica.service.class_name}/{replica.idx}.{rank}"
            state.actions.append(LaunchAction(launch.id, seat.gpus, label))

    def _assign(self, worker: Worker, replica: Replica, rank: int) -> None:
        service: Service = replica.service
        worker.move(WorkerMove.ASSIGN)
        worker.replica = replica
        worker.rank = rank
        replica.ranks[rank] = worker
        here = [one for one, seat in enumerate(replica.seats) if seat.host == replica.seats[rank].host]
        spec = service.spec
        fields = {
            "service": service.id,
            "name": service.name,
            "class_name": service.class_name,
            "replica": replica.idx,
            "epoch": replica.epoch,
            "rank": rank,
            "world": len(replica.ranks),
            "local_rank": here.index(rank),
            "local_world": len(here),
            "gpus": [gpu for one in here for gpu in replica.seats[one].gpus],
            "target": spec["target"],
            "path": spec.get("path") or [],
            "cwd": spec.get("cwd"),
            "trusted": service.init_trusted,
            "endpoints": [{"name": endpoint.name, "options": endpoint.options} for endpoint in service.endpoints],
            "concurrency": service.config.concurrency,
            "serial": service.config.concurrency == 1 and len(replica.ranks) > 1,
            "max_payload_bytes": self._state.config.max_payload_bytes,
        }
        worker.post([ASSIGN, fields, worker.outbox.attach(service.init)])
        if replica.master is not None:
            worker.post([BEGIN, *replica.master])
        self._state.deliver(worker)

    # Workers.

    def worker_joined(self, worker: Worker, now: float) -> None:
        """A hello: a launched worker takes the seat it was launched for, any other becomes idle. Raises ForgeError: not welcome."""
        state = self._state
        if worker.host == state.host and not worker.launch:
            self._hold_slots(worker)
        if worker.launch and any(other.launch == worker.launch for other in state.workers.values()):
            raise ConfigError(where=f"worker {worker.name}", message=f"launch {worker.launch} has a worker already")
        worker.move(WorkerMove.HELLO)
        state.workers[worker.name] = worker
        launch = state.launches.get(worker.launch)
        if launch is None and worker.launch:
            self._tell_to_stop(worker, "its launch is not known", 0.0, now)
        elif launch is not None and (launch.replica.epoch != launch.epoch or launch.replica.state in _ENDING):
            self._tell_to_stop(worker, "its replica no longer wants it", 0.0, now)
        elif launch is not None:
            self._assign(worker, launch.replica, launch.rank)
        elif worker.hello.get("holds"):
            self._tell_to_stop(worker, "it holds a replica that this broker does not know", 0.0, now)
        else:
            state.note("info", "worker joined", worker=worker.name, hostname=worker.hello["hostname"], gpus=worker.gpus)
            self.place_pending(now)

    def _hold_slots(self, worker: Worker) -> None:
        slots = self._state.slots
        for gpu in worker.gpus:
            holder = slots.get(gpu, "")
            if holder and not holder.startswith(_KEPT):
                raise ConfigError(where=f"worker {worker.name}", message=f"GPU {gpu} is in use by {holder}")
        for gpu in worker.gpus:
            slots[gpu] = worker.name

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

    def ready(self, worker: Worker, now: float) -> None:
        """READY: a rank has run its setup; the replica is HEALTHY when all have. Raises ProtocolError when it makes no sense."""
        was = worker.state
        if was not in (WorkerState.LOADING, WorkerState.DRAINING):
            raise ProtocolError(f"READY from a worker that is {was.value}")
        worker.move(WorkerMove.READY)
        replica: Replica = worker.replica
        if was is WorkerState.DRAINING or replica.ranks[worker.rank] is not worker:
            return
        if not all(rank is not None and rank.state is WorkerState.READY for rank in replica.ranks):
            return
        service: Service = replica.service
        replica.move(ReplicaMove.READY)
        replica.healthy_at = now
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
            self._notice(service, "restarted", replica=replica.idx, epoch=replica.epoch)
        if not service.started and all(other.healthy for other in service.replicas.values()):
            self._started(service, now)
        for queue in [*service.queues, replica.parked]:
            self._dispatch.wake(service, queue)
        self._dispatch.pump(service, now)

    def unready(self, worker: Worker, error: Any, payload: Payload | None, now: float) -> None:
        """UNREADY: the import, `__init__` or `setup` raised. During the first start that is the deployer's error (A2)."""
        replica: Replica | None = worker.replica
        if replica is None or replica.ranks[worker.rank] is not worker:
            return
        service: Service = replica.service
        why = f"rank {worker.rank} could not start"
        if isinstance(error, list) and len(error) == 2 and isinstance(error[1], dict):
            why += f": {error[1].get('message') or error[1].get('type_name') or error[0]}"
        if service.started or service.stopping is not None:
            self.replica_lost(replica, why, [], now)
            return
        fields = (
            {"error": error}
            if isinstance(error, list)
            else {"error": StartFailed(service=service.name, why=why).to_wire()}
        )
        service.start_failure = ({**fields, "trusted": worker.trusted}, payload)
        replica.last_error = why
        self.stop_service(service, ServiceStopped(service=service.name, why=f": {why}"), now)

    def worker_gone(self, worker: Worker, why: str, last_lines: list[str], now: float, *, blame: bool = True) -> None:
        """Its process has ended, it said bye, or it is silent: whatever it held is taken back."""
        state = self._state
        state.links.pop(worker.name, None)
        if state.workers.pop(worker.name, None) is None:
            return
        worker.move(WorkerMove.END)
        if not worker.launch and worker.host == state.host:
            for gpu in worker.gpus:
                state.slots[gpu] = f"{_KEPT}{worker.name}"
                state.deadlines.add(now + SLOT_KEPT_S, Kind.SLOT, (gpu, state.slots[gpu]))
        state.note("info", "worker gone", worker=worker.name, why=why)
        replica: Replica | None = worker.replica
        if replica is None or replica.ranks[worker.rank] is not worker:
            return
        replica.ranks[worker.rank] = None
        if replica.state is ReplicaState.DRAINING:
            self._check_stopped(replica, now)
        else:
            self.replica_lost(replica, f"rank {worker.rank}: {why}", last_lines, now, blame=blame)

    def launch_ended(self, launch_id: int, why: str, last_lines: list[str], now: float) -> None:
        """The kernel says a launched process is gone: only now are its GPUs free."""
        state = self._state
        launch = state.launches.pop(launch_id, None)
        if launch is None:
            return
        for gpu in launch.gpus:
            state.slots[gpu] = ""
        worker = next((worker for worker in state.workers.values() if worker.launch == launch_id), None)
        replica = launch.replica
        if worker is not None:
            self.worker_gone(worker, why, last_lines, now)
        elif replica.state is ReplicaState.DRAINING:
            self._check_stopped(replica, now)
        elif replica.epoch == launch.epoch and replica.state not in _ENDING:
            self.replica_lost(replica, f"rank {launch.rank}: {why}", last_lines, now)
        self._check_service(replica.service, now)
        self.place_pending(now)

    def free_slot(self, kept: tuple[str, str], now: float) -> None:
        """Nobody came back for a GPU that was kept."""
        gpu, holder = kept
        if self._state.slots.get(gpu) == holder:
            if gpu in self._state.config.gpus:
                self._state.slots[gpu] = ""
            else:
                del self._state.slots[gpu]
            self.place_pending(now)

    # Replicas.

    def replica_lost(
        self, replica: Replica, why: str, last_lines: list[str], now: float, *, blame: bool = True
    ) -> None:
        """One rank is enough to lose it. Its calls go back to their queues, its other ranks stop, and it is tried again."""
        state = self._state
        service: Service = replica.service
        service.pool.remove(replica)
        was_healthy = replica.state is ReplicaState.HEALTHY
        replica.move(ReplicaMove.LOST)
        if replica.state is ReplicaState.DRAINING:
            return
        replica.last_error = why + ("".join(f"\n  {line}" for line in last_lines))
        if was_healthy and now - replica.healthy_at >= STEADY_S:
            replica.deaths = 0
        replica.deaths += blame
        replica.restarts += 1
        state.note("warning", "replica lost", replica=replica.name, epoch=replica.epoch, why=why, last_lines=last_lines)
        state.story.tell(now, replica.name, f"lost in epoch {replica.epoch}: {why}")
        old = replica.ranks
        replica.ranks = [None] * len(old)
        replica.epoch += 1
        replica.master = None
        if service.kind == "actor" and was_healthy:
            service.state_epoch += 1
        for worker in old:
            if worker is not None:
                worker.replica = None
                self._tell_to_stop(worker, "another rank of its replica is lost", 0.0, now)
        for launch in list(state.launches.values()):
            if launch.replica is replica and not any(worker.launch == launch.id for worker in state.workers.values()):
                state.actions.append(Kill(launch.id))
        self._dispatch.release(replica, why, now)
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

    def restart(self, start: tuple[int, int, int], now: float) -> None:
        """The wait before another try is over. `start`: service id, replica idx, epoch."""
        service_id, idx, epoch = start
        service = self._state.services.get(service_id)
        replica = service.replicas.get(idx) if service is not None else None
        if replica is None or replica.epoch != epoch or replica.state in _ENDING:
            return
        if replica.state is ReplicaState.UNHEALTHY:
            replica.move(ReplicaMove.TRY_AGAIN)
        self._want(replica, now)
        self.place_pending(now)

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
        for replica in list(service.replicas.values()):
            self._stop_replica(replica, now)
        self._check_service(service, now)

    def _stop_replica(self, replica: Replica, now: float) -> None:
        state = self._state
        service: Service = replica.service
        service.pool.remove(replica)
        replica.move(ReplicaMove.STOP)
        state.pending.pop(replica.key, None)
        for worker in replica.ranks:
            if worker is not None:
                # One that is still loading runs no calls that a grace could be for.
                grace_s = service.config.stop_grace_s if worker.state is WorkerState.READY else 0.0
                self._tell_to_stop(worker, "its replica is stopped", grace_s, now)
        for launch in state.launches.values():
            if launch.replica is replica and not any(worker.launch == launch.id for worker in state.workers.values()):
                state.actions.append(Kill(launch.id))
        self._check_stopped(replica, now)

    def _tell_to_stop(self, worker: Worker, reason: str, grace_s: float, now: float) -> None:
        worker.move(WorkerMove.STOP)
        worker.post([STOP, reason, grace_s])
        self._state.deliver(worker)
        self._state.deadlines.add(now + grace_s + KILL_AFTER_GRACE_S, Kind.KILL, worker)

    def kill_overdue(self, worker: Worker, now: float) -> None:
        """A worker told to stop is still there, or has said bye and its process does not end. Of one on another host we can only stop
        speaking to it."""
        state = self._state
        here = state.workers.get(worker.name) is worker
        if worker.launch in state.launches:
            # Having said bye it has nothing left to lose: no reason to alarm anybody.
            state.note(
                "warning" if here else "info", "worker killed", worker=worker.name, why="it did not stop in time"
            )
            state.actions.append(Kill(worker.launch))
        elif here and worker.watched:
            state.note("warning", "worker killed", worker=worker.name, why="it did not stop in time")
            state.actions.append(KillPeer(worker.name))
        elif here:
            self.worker_gone(worker, "it did not stop in time", [], now)

    def _check_stopped(self, replica: Replica, now: float) -> None:
        if any(replica.ranks) or replica.state is not ReplicaState.DRAINING:
            return
        self._dispatch.release(replica, "it was stopped", now)
        replica.move(ReplicaMove.STOPPED)
        self._check_service(replica.service, now)

    def _check_service(self, service: Service, now: float) -> None:
        """Gone when the last of its workers and processes is."""
        state = self._state
        if service.stopping is None or service.id not in state.services:
            return
        if any(replica.state is not ReplicaState.STOPPED for replica in service.replicas.values()):
            return
        if any(launch.replica.service is service for launch in state.launches.values()):
            return
        for sid in list(service.sessions):
            self._sessions.close(service, sid, "its service is stopped", now)
        del state.services[service.id]
        del state.names[service.name]
        for endpoint in service.endpoints:
            del state.endpoints[endpoint.id]
        if service.owner is not None:
            service.owner.services.discard(service.id)
        state.note("info", "service stopped", service=service.name)
        self._notice(service, "stopped", error=service.stopping.to_wire())
        # Whoever deployed it hears of a failed start now that nothing of it is left: it may be tried again at once.
        self._answer_start(service, False, *service.start_failure)
        for client, number in service.waiting_stop:
            self._answer(client, number, True, {}, None)

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
            if not any(worker.launch == launch.id for worker in state.workers.values()):
                state.actions.append(Kill(launch.id))
        self.check_finished()

    def check_finished(self) -> None:
        state = self._state
        if state.terminating and not state.launches and not state.services:
            state.actions.append(Exit())

    # Telling.

    def _started(self, service: Service, now: float) -> None:
        service.started = True
        self._answer_start(service, True, self.describe(service, now), None)

    def _answer_start(self, service: Service, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None:
        for client, number in service.waiting_start:
            self._answer(client, number, ok, fields, payload)
        service.waiting_start = []

    def _answer(self, client: Client, number: int, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None:
        client.post([ANSWER, number, ok, fields, 0 if payload is None else client.outbox.attach(payload)])
        self._state.deliver(client)

    def _notice(self, service: Service, topic: str, **fields: Any) -> None:
        for name in service.watchers:
            link = self._state.links.get(name)
            if link is not None:
                link.post([NOTICE, topic, {"service": service.id, **fields}])
                self._state.deliver(link)

    def describe(self, service: Service, now: float) -> dict[str, Any]:
        """What a handle needs to know (PROTOCOL.md §7)."""
        config = service.config
        return {
            "service": service.id,
            "name": service.name,
            "kind": service.kind,
            "class_name": service.class_name,
            "detached": service.owner is None,
            "endpoints": {endpoint.name: endpoint.id for endpoint in service.endpoints},
            "signatures": {endpoint.name: endpoint.signature for endpoint in service.endpoints},
            "options": {endpoint.name: endpoint.options for endpoint in service.endpoints},
            "replicas": sorted(service.replicas),
            "sizes": config.mesh_sizes,
            "return_first": config.return_first_rank_result,
            "errors": config.errors,
            "state_epoch": service.state_epoch,
            "metrics": metrics(service, now),
        }
