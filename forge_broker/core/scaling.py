"""Growing and shrinking services: when the policy is asked, and what is done of what it says (X1, X2).

The policy itself is a pure function in `forge_contract.scaling`. It is asked every `evaluate_every_s`, and at once when a call comes to a
service without replicas. Replicas are added and drained by those who do it for anybody (`seating`, `lifecycle`), so calls go on meanwhile;
what has no place yet is pending, and placed when something becomes free. `control` hands in who scales by hand.
"""

from __future__ import annotations

from typing import Any, Final

from forge_broker.core.batcher import Lane
from forge_broker.core.clients import Client
from forge_broker.core.deadlines import Kind
from forge_broker.core.lifecycle import Lifecycle
from forge_broker.core.replicas import Replica, ReplicaState
from forge_broker.core.seating import Seating
from forge_broker.core.services import Service
from forge_broker.core.state import State
from forge_broker.core.telling import Telling
from forge_contract.errors import ConfigError, ForgeError, StartFailed
from forge_contract.scaling import Decision, Observation, evaluate

_FIRST_TO_GO: Final = {
    state: rank
    for rank, state in enumerate(
        (
            ReplicaState.UNHEALTHY,
            ReplicaState.RECOVERING,
            ReplicaState.DRAINING,  # to start anew
            ReplicaState.UNINITIALIZED,
            ReplicaState.HEALTHY,
        )
    )
}
_STARTING: Final = (ReplicaState.UNINITIALIZED, ReplicaState.RECOVERING)


class Scaling:
    def __init__(self, state: State, lifecycle: Lifecycle, seating: Seating, telling: Telling) -> None:
        self._state = state
        self._lifecycle = lifecycle
        self._seating = seating
        self._telling = telling
        self._waiting: list[tuple[Service, Client, int]] = []  # for a scaling by hand to be over

    # By itself.

    def due(self, service_id: int, now: float) -> None:
        """`evaluate_every_s` has passed."""
        service = self._state.services.get(service_id)
        if service is None or service.stopping is not None or service.config.autoscaling is None:
            return
        self._state.deadlines.add(now + service.config.autoscaling.evaluate_every_s, Kind.SCALE, service_id)
        self.evaluate(service, now)

    def evaluate(self, service: Service, now: float) -> None:
        """Ask the policy, remember what it says, and do it. Not before the first start is over: that has its own error."""
        state, config, sizing = self._state, service.config, service.sizing
        if state.window is not None or state.terminating or service.stopping is not None or not service.started:
            sizing.state = sizing.state._replace(seen_at=now)  # nothing is smoothed over a time in which nobody looked
            return
        if sizing.policy is None or config.autoscaling is None:
            return
        seen = observe(service, now)
        before = sizing.state
        decision, sizing.state, flaw = evaluate(sizing.policy, seen, config.autoscaling, config.limits, before, now)
        if flaw is not None:
            state.counters[f"scaling_policy_{flaw}"] += 1
        placeless = next((replica for replica in service.current if replica.pending_why), None)
        if decision.delta > 0 and placeless is not None:
            # One that waits for a place shows what is missing; more of them would only say it again.
            why = f"{decision.reason}, but {placeless.name} is pending, because it {placeless.pending_why}"
            decision = Decision(0, "pending", why, decision.figures)
            sizing.state = before.seen(seen, config.autoscaling, now)
        self._decided(service, decision, now)

    def _decided(self, service: Service, decision: Decision, now: float) -> None:
        wanted = service.wanted + decision.delta
        service.sizing.remember(decision, wanted, now)
        if not decision.delta:
            return
        service.stats.scaled(decision.delta, decision.rule)
        why = f"{decision.rule}: {decision.reason}"
        self._state.note("info", "service scaled", service=service.name, replicas=wanted, was=service.wanted, why=why)
        service.resize(wanted)
        for _ in range(decision.delta):
            added = self._seating.add_replica(service, now)
            self._state.story.tell(now, added.name, f"added, {why}")
        for replica in first_to_go(service, -decision.delta):
            self._state.story.tell(now, replica.name, f"drained, {why}")
            replica.comes_back = False
            if replica.state is not ReplicaState.DRAINING:
                grace_s = self._state.config.drain_grace_s
                self._lifecycle.stop_replica(replica, "its service is scaled down", grace_s, now)
        self._telling.resized(service)
        self._seating.place_pending(now)

    # By hand.

    def by_hand(self, service: Service, replicas: Any, client: Client, now: float) -> dict[str, Any]:
        """So many from now on; a policy goes on from there. Raises ConfigError for a number that cannot be."""
        if service.stopping is not None:
            error: ForgeError = service.stopping
            raise error
        least, most = service.config.limits
        problem = ""
        if type(replicas) is not int or replicas < 0:
            problem = f"replicas must be a number from 0 on, not {replicas!r:.60}"
        elif service.kind == "actor":
            problem = f"{service.name} is an actor, which is one replica; deploy a service to have several"
        elif not service.started:
            problem = f"{service.name} is still starting; try again when it is healthy"
        elif not replicas and service.sizing.policy is None:
            problem = f"0 replicas of {service.name} need autoscaling, which brings one back for the next call; to end it, stop it"
        elif not least <= replicas <= most:
            problem = f"{service.name} has {least} to {most} replicas (min_replicas, max_replicas), and cannot have {replicas}"
        if problem:
            raise ConfigError(where="scale", message=problem)
        was = service.wanted
        if replicas != was:
            decision = Decision(replicas - was, "by hand", f"{client.name} asked for {replicas}")
            service.sizing.state = service.sizing.state.after(decision.delta, now)
            self._decided(service, decision, now)
        return {"wanted": replicas, "was": was}

    def answer_when_done(self, service: Service, client: Client, number: int) -> None:
        """The answer is due when all replicas are HEALTHY, and those that were drained are gone."""
        self._waiting.append((service, client, number))

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def check(self, now: float) -> None:
        """Who waits for a scaling that is over. Called after every event while anybody waits."""
        for one in list(self._waiting):
            service, client, number = one
            answer = self._outcome(service)
            if answer is not None:
                self._waiting.remove(one)
                if not client.gone:
                    fields = answer if isinstance(answer, dict) else {"error": answer.to_wire()}
                    self._telling.answer(client, number, isinstance(answer, dict), fields, None)

    def _outcome(self, service: Service) -> dict[str, Any] | ForgeError | None:
        if service.stopping is not None:
            error: ForgeError = service.stopping
            return error
        for replica in service.current:
            if replica.state is ReplicaState.UNHEALTHY:
                why = f"{replica.name} does not get healthy, and is tried again: {replica.last_error}"
                return StartFailed(service=service.name, why=why)
        if all(replica.healthy for replica in service.replicas.values()):
            return {"wanted": service.wanted, "healthy": len(service.pool)}
        return None


def observe(service: Service, now: float) -> Observation:
    """The service as its policy sees it. Walks over replicas, never over calls."""
    replicas = service.replicas.values()
    pool = service.pool
    fresh = [replica.state for replica in service.current if not (replica.healthy or replica.healthy_at)]
    # In a lane calls wait for company as long as somebody has room: no more replicas would help them.
    waiting = [queue for queue in service.queues if not (pool.roomy and isinstance(queue, Lane))]
    return Observation(
        replicas=service.wanted,
        healthy=len(pool),
        starting=sum(state in _STARTING for state in fresh),
        never_healthy=len(fresh),
        queued=sum(queue.length for queue in waiting) + sum(replica.queue_depth for replica in replicas),
        in_flight=sum(replica.active_requests for replica in replicas),
        capacity_utilization=sum(replica.capacity_utilization for replica in pool) / max(1, len(pool)),
        request_rate=service.sizing.rate({replica.key: replica.stats.total for replica in replicas}, now),
        sessions=len(service.sessions),
    )


def first_to_go(service: Service, count: int) -> list[Replica]:
    """Which replicas a service gives up: those that are not healthy, then the least loaded with the fewest sessions, then the newest."""
    return sorted(
        service.current,
        key=lambda replica: (_FIRST_TO_GO[replica.state], replica.current_load, replica.sessions, -replica.idx),
    )[: max(0, count)]
