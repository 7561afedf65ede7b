"""The recovery window (F10): a broker without memory has everything again from what its peers hold (PROTOCOL.md §8).

While it is open nothing is dispatched, launched or answered; hellos are taken in, and what clients ask is laid aside. When it ends,
replicas with all their ranks are HEALTHY, calls that somebody ran or runs are matched with those who wait for them, and all
that was laid aside is done as if it came now.
"""

from __future__ import annotations

from typing import Any, Final

from forge_broker.core.answers import Answers
from forge_broker.core.catalogue import Catalogue
from forge_broker.core.claims import Asked, Declared, Window
from forge_broker.core.clients import Client
from forge_broker.core.columns import read_calls, read_fanout, read_replies, read_states
from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.lifecycle import Lifecycle
from forge_broker.core.links import Link
from forge_broker.core.placement import Seat
from forge_broker.core.replicas import Replica, ReplicaState
from forge_broker.core.requests import Batch
from forge_broker.core.seating import Seating
from forge_broker.core.services import Replay, Service, read_spec
from forge_broker.core.sessions import Sessions
from forge_broker.core.state import State
from forge_broker.core.status import missing
from forge_broker.core.telling import Telling
from forge_broker.core.workers import Worker
from forge_contract.config import MOST_REPLICAS
from forge_contract.errors import ForgeError, OutcomeUnknown, Overloaded, ProtocolError, ServiceStopped
from forge_contract.framing import Payload, Payloads, weigh
from forge_contract.messages import CALLS, CONTROL, FANOUT, Message, client_of, spread

_SIZES: Final = {CALLS: 3, FANOUT: 3, CONTROL: 4}  # where a message of a client names its payloads
_SIZE_OF_DEED: Final = ("wanted", "resizes")  # what changes in a service's life: the latest counts
_AT_ONCE: Final = frozenset({"status", "workers", "explain", "dead_list"})


def is_of_the_past(message: Message) -> bool:
    """Whether it only repeats what was said to our predecessor, and has to be done before anything new."""
    if message[0] == CALLS:
        return len(message) > 4 and isinstance(message[4], dict) and "again" in message[4]
    return message[0] == CONTROL and len(message) > 2 and message[2] == "open_session"


def is_answered_at_once(message: Message) -> bool:
    """Whether it can be, while the window is open: it only looks."""
    return message[0] == CONTROL and len(message) > 2 and message[2] in _AT_ONCE


class Rebuild:
    def __init__(
        self,
        state: State,
        catalogue: Catalogue,
        seating: Seating,
        lifecycle: Lifecycle,
        sessions: Sessions,
        dispatch: Dispatch,
        answers: Answers,
        telling: Telling,
    ) -> None:
        self._state = state
        self._catalogue = catalogue
        self._seating = seating
        self._dispatch = dispatch
        self._lifecycle = lifecycle
        self._sessions = sessions
        self._answers = answers
        self._telling = telling

    def open(self, now: float) -> None:
        state = self._state
        state.window = Window(now + state.config.recovery_s)
        state.deadlines.add(state.window.until, Kind.RECOVERED, None)
        state.note("warning", "recovering", seconds=state.config.recovery_s)

    def opens_for(self, hello: dict[str, Any], now: float) -> bool:
        """Somebody knows our predecessor, and we know nothing yet: it is not too late to ask the others."""
        state = self._state
        past = hello.get("holds") or hello.get("declares")
        return (
            bool(past)
            and not state.services
            and not state.terminating
            and now - state.started_at <= state.config.recovery_s
        )

    # Hellos.

    def worker(self, worker: Worker, payloads: list[Payload], now: float) -> None:
        """A worker that holds a rank of something. Raises ForgeError for what cannot be."""
        held = worker.hello["holds"]
        wanted = {
            "deed": dict,
            "replica": int,
            "epoch": int,
            "rank": int,
            "ready": bool,
            "running": list,
            "sessions": list,
        }
        if not isinstance(held, dict) or len(payloads) != 1:
            raise ProtocolError("HELLO: holds is a map, with the constructor's arguments as payload")
        wrong = [name for name, kind in wanted.items() if type(held.get(name)) is not kind]
        running, sessions = held.get("running") or [], held.get("sessions") or []
        batches = held.get("batches") or []
        if (
            wrong
            or not all(map(_is_running, running))
            or not all(map(_is_session, sessions))
            or type(batches) is not list
            or not all(map(_is_batch, batches))
        ):
            raise ProtocolError(f"HELLO: holds with a wrong {', '.join(wrong) or 'running, batches or sessions'}")
        service = self._service(held["deed"], payloads[0], worker.trusted, now)
        replica = self._replica(service, held["replica"], held["epoch"], now)
        worker.launch = 0  # its number was our predecessor's; to us it is one that somebody else started
        seated = held["ready"] and replica.epoch == held["epoch"] and 0 <= held["rank"] < len(replica.ranks)
        if not seated or replica.ranks[held["rank"]] is not None or service.stopping is not None:
            self._lifecycle.turn_away(worker, now)
            return
        self._seating.take_seat(worker, replica, held["rank"], Seat(worker.host, worker.gpus, worker.name))
        window = self._window()
        for request, attempt in running:
            claim = window.claim(request, replica, attempt)
            if claim is not None:
                claim.running[worker.rank] = worker
        for ids in batches:
            claims = [
                claim for one in ids if (claim := window.claims.get(one)) is not None and claim.replica is replica
            ]
            known = next((claim.batch for claim in claims if claim.batch is not None), None)  # as another rank told
            batch = known or Batch(0)
            for claim in claims:
                claim.batch = batch
        for sid, age_s in sessions:
            window.settles(service.id, sid, replica, now - age_s)

    def client(self, client: Client, payloads: list[Payload], now: float) -> None:
        """A client that waits for something, or started it. Raises ForgeError for what cannot be."""
        declared = client.hello["declares"]
        deeds = declared.get("services") if isinstance(declared, dict) else None
        sessions = declared.get("sessions") if isinstance(declared, dict) else None
        replays = declared.get("replays", []) if isinstance(declared, dict) else None
        if not (isinstance(deeds, list) and isinstance(sessions, list) and isinstance(replays, list)):
            raise ProtocolError("HELLO: declares has services, sessions and replays")
        if len(deeds) + len(replays) != len(payloads) or set(map(type, replays)) - {int}:
            raise ProtocolError("HELLO: declares has a payload for each service and each replay")
        window = self._window()
        for endpoint, payload in zip(replays, payloads[len(deeds) :], strict=True):
            window.replays.append((endpoint, Replay(payload, client.trusted)))
        for deed, init in zip(deeds, payloads, strict=False):
            service = self._service(deed, init, client.trusted, now)
            if window.owners[service.id] == client.id:
                window.declared[service.id] = client
        for one in sessions:
            kinds = [type(field) for field in one] if isinstance(one, list) else []
            if kinds != [int, str, dict, bool]:
                raise ProtocolError("HELLO: a session is [service, session, hints, used]")
            window.sessions.append(Declared(client, *one))

    def _service(self, deed: Any, init: Payload, trusted: bool, now: float) -> Service:
        """The service of this deed: known already, or made anew under its old ids."""
        names = {"service": int, "name": str, "spec": dict, "endpoints": list, "owner": int, "trusted": bool}
        if not isinstance(deed, dict) or any(type(deed.get(name)) is not kind for name, kind in names.items()):
            raise ProtocolError("a deed that is none (PROTOCOL.md §7.2)")
        ids = [deed["service"], *deed["endpoints"]]
        if not all(type(one) is int and 0 < one < 1 << 62 for one in ids) or len(set(ids)) != len(ids):
            raise ProtocolError("a deed with ids that are none")
        sizes = [deed.get(name, 0) for name in _SIZE_OF_DEED]
        if not all(type(one) is int and one >= 0 for one in sizes) or sizes[0] > MOST_REPLICAS:
            raise ProtocolError(f"a deed that wants {sizes[0]!r:.60} replicas, changed {sizes[1]!r:.60} times")
        service = self._of_deed(deed, init, trusted, now)
        if deed.get("resizes", 0) > service.resizes:
            service.wanted, service.resizes = sizes
        return service

    def _of_deed(self, deed: dict[str, Any], init: Payload, trusted: bool, now: float) -> Service:
        known = self._state.services.get(deed["service"])
        if known is not None:
            same = {name: one for name, one in deed.items() if name not in _SIZE_OF_DEED}
            ours = {name: one for name, one in known.deed().items() if name not in _SIZE_OF_DEED}
            if ours | {"owner": deed["owner"], "trusted": deed["trusted"]} != same:
                raise ProtocolError(f"a deed of another service {deed['service']} than {known.name}")
            return known
        trusted = trusted and deed["trusted"]  # a stamp is believed only of who has that trust
        service = self._catalogue.revive(deed, read_spec(deed["spec"], trusted), init, trusted, now)
        self._window().owners[service.id] = deed["owner"]
        return service

    def _replica(self, service: Service, idx: int, epoch: int, now: float) -> Replica:
        """The newest epoch counts: a worker of an older one was lost to our predecessor already."""
        replica = service.replicas.get(idx)
        if replica is None:
            if not 0 <= idx < 4096:
                raise ProtocolError(f"a replica numbered {idx}")
            replica = self._seating.seatless_replica(service, idx, now)
            replica.epoch = epoch
        elif replica.epoch < epoch and replica.state is ReplicaState.UNINITIALIZED:
            for worker in replica.ranks:
                if worker is not None:
                    self._lifecycle.turn_away(worker, now)
            self._window().outdates(replica)
            replica.ranks = [None] * len(replica.ranks)
            replica.epoch = epoch
        return replica

    # What is said while the window is open.

    def replies(self, worker: Worker, message: Message, payloads: Payloads) -> None:
        """REPLIES: kept ones, and those of calls that ended meanwhile."""
        epoch, ids, attempts, statuses, sizes, _ = read_replies(message)
        columns = ids, spread(attempts, len(ids)), spread(statuses, len(ids))
        replica: Replica | None = worker.replica
        for request, attempt, status, payload in zip(*columns, payloads.take_all(sizes), strict=True):
            claim = (
                None if replica is None or epoch != replica.epoch else self._window().claim(request, replica, attempt)
            )
            if claim is None:
                self._state.ledger.fenced += 1
                continue
            claim.running.pop(worker.rank, None)
            claim.parts[worker.rank] = (status, payload, worker.trusted)
            claim.told[worker.rank] = worker

    def lay_aside(self, client: Client, message: Message, payloads: Payloads, now: float) -> None:
        """Something a client wants; more than can be kept is refused. Raises ProtocolError."""
        window = self._window()
        named = message[_SIZES[message[0]]] if len(message) > _SIZES.get(message[0], len(message)) else []
        sizes = named if isinstance(named, list) else [named]
        if set(map(type, sizes)) - {int}:
            raise ProtocolError("sizes that are no int")
        taken = payloads.take_all(sizes)
        weight = sum(len(one) if type(one) is bytes else weigh(one) for one in taken)
        if weight and window.asked_bytes + weight > self._state.config.max_queue_bytes:
            self._refuse(client, message, now)
            return
        window.asked_bytes += weight
        window.asked.append(Asked(client, message, taken, now))

    def _refuse(self, client: Client, message: Message, now: float) -> None:
        """It cannot be kept until the window ends. Raises ProtocolError for what could not have been answered then either."""
        state = self._state
        state.counters["overloaded"] += 1
        limit = state.config.max_queue_bytes
        wait_s = max(0.5, self._window().until - now)
        error: ForgeError = Overloaded(
            what="the broker, which is recovering,", limit_name="max_queue_bytes", limit=limit, retry_after_s=wait_s
        )
        if message[0] == CONTROL:
            if len(message) != 5 or type(message[1]) is not int:
                raise ProtocolError("CONTROL is [19, number, op, fields, size]")
            self._telling.answer(client, message[1], False, {"error": error.to_wire()}, None)
            return
        endpoint_id, sequences, _, columns = read_calls(message) if message[0] == CALLS else read_fanout(message)
        endpoint = state.endpoints.get(endpoint_id)
        if "again" in columns and (endpoint is None or endpoint.at_most_once):
            # Our predecessor had it. Who is told Overloaded takes it for not run, and tries again.
            name = f"endpoint {endpoint_id}" if endpoint is None else endpoint.full_name
            error = OutcomeUnknown(
                endpoint=name, why=f"the broker died, and its successor had no room for it ({error})"
            )
        for sequence in sequences:
            self._answers.reject(client, sequence, error)

    def states(self, worker: Worker, message: Message, payloads: Payloads) -> None:
        """STATES: checkpoints of sessions whose clients may not be back yet."""
        ids, taken = read_states(message, payloads)
        replica: Replica | None = worker.replica
        for sid, payload in zip(ids, taken, strict=True):
            if replica is not None:
                self._window().states[replica.service.id, sid, replica.idx] = (payload, worker.trusted)

    # The end of the window.

    def is_awaited(self, now: float) -> bool:
        """Whether somebody has been welcomed and has not sent yet what its hello announced; for a bounded time."""
        window = self._window()
        if now >= window.until + self._state.config.recovery_s:
            return False
        return any(map(self._owes, self._state.links.values()))

    def end(self, now: float) -> list[Asked]:
        """Take stock; returns what was laid aside, for `broker` to do now. Claims stay known until it is done."""
        state, window = self._state, self._window()
        state.note("info", "recovered", services=len(state.services), missing=missing(state))
        state.counters["recovery_unheard"] += len(self._unheard())
        state.window = None
        state.claims = window.claims
        for service_id, owner in window.owners.items():
            service = state.services[service_id]
            service.owner = window.declared.get(service_id)
            if service.owner is not None:
                service.owner.services.add(service_id)
                service.watchers.add(service.owner.name)
            elif owner:
                gone = ServiceStopped(service=service.name, why=": the client that started it did not come back")
                self._lifecycle.stop_service(service, gone, now)
        for endpoint_id, replay in window.replays:
            endpoint = state.endpoints.get(endpoint_id)
            if endpoint is not None and endpoint.replay_last:
                endpoint.service.replays[endpoint.method] = replay
        for service in list(state.services.values()):
            if service.stopping is None:
                self._lifecycle.resume(service, now)
        for claim in window.claims.values():
            # Before anything new is dispatched: what runs has its room already. Whoever was sent away since runs nothing for us.
            claim.running = {
                rank: worker for rank, worker in claim.running.items() if claim.replica.ranks[rank] is worker
            }
            if claim.running:
                claim.reserve()
        for declared in window.sessions:
            self._reopen(declared, window, now)
        for (_, sid), held in window.homes.items():
            for replica in held:
                if replica.service.pins.get(sid) != replica.idx:
                    self._forget(sid, replica)
        self._seating.place_pending(now)
        return window.asked

    def _reopen(self, declared: Declared, window: Window, now: float) -> None:
        """A session, where it lives. One that was used and that no worker speaks for has lost its state (S3)."""
        service = self._state.services.get(declared.service)
        if service is None or service.stopping is not None:
            return
        self._sessions.open(service, declared.client, declared.session, declared.hints, now)
        session = service.sessions[declared.session]
        if declared.used:
            service.fresh.discard(session.id)
        home = window.home(service.id, session.id)
        kept = None if home is None else window.states.get((service.id, session.id, home.idx))
        if kept is not None:
            self._sessions.keep(session, *kept, now)
        if home is not None and home.healthy:
            service.pin(session.id, home)
        elif declared.used and session.state is None:
            self._state.story.tell(now, session.id, "its state is lost: its worker died while the broker was away")
            service.fresh.add(session.id)
            if service.config.on_session_loss == "raise":
                session.lost = "its worker died while the broker was away"

    def _forget(self, sid: str, home: Replica) -> None:
        """Its client has closed it, or is gone, or it lives elsewhere: what the worker knows of it must not come up under its id again."""
        for worker in home.ranks:
            if worker is not None:
                worker.add_forget(sid)
                self._state.deliver(worker)

    def _owes(self, link: Link | None) -> bool:
        """Whether this peer announced something in its hello and has not said a word since."""
        if link is None or link.channel.received:
            return False
        announced = link.hello.get("holds") or link.hello.get("declares") or {}
        return bool(announced.get("replies") is True or announced.get("waiting"))

    def _unheard(self) -> set[str]:
        """Who has something to say that bears on what ran, and has not said it: the links that still owe, and the clients that others
        tell of and that did not come. What they hold or wait for may run a second time."""
        state, window = self._state, self._window()
        told_of = {client_of(request) for request in window.claims}
        told_of |= {owner for service, owner in window.owners.items() if owner and service not in window.declared}
        absent = {f"client {one}" for one in told_of - set(state.clients)}
        return absent | {link.name for link in state.links.values() if self._owes(link)}

    def settle(self, now: float) -> None:
        """All that was asked has been done: what is still claimed, nobody waits for."""
        for request, claim in self._state.claims.items():
            if claim.reserved:
                claim.give_up()
                claim.replica.service.wake(claim.replica.parked)
            for worker in claim.running.values():
                if self._state.workers.get(worker.name) is worker:
                    worker.add_drop(request)
                    self._state.deliver(worker)
        # Who announced calls and still has not sent them will find what was answered; what runs was dropped above.
        self._state.claims = {
            request: claim
            for request, claim in self._state.claims.items()
            if claim.parts and not claim.running and self._owes(self._state.clients.get(client_of(request)))
        }
        for service in self._state.services.values():
            self._dispatch.pump(service, now)
            self._dispatch.look_soon(service, now)  # what runs may be more than may run at once

    def _window(self) -> Window:
        assert self._state.window is not None
        return self._state.window


def _is_session(one: Any) -> bool:
    return isinstance(one, list) and [type(field) for field in one] == [str, float] and one[1] >= 0.0


def _is_batch(one: Any) -> bool:
    return isinstance(one, list) and set(map(type, one)) <= {int}


def _is_running(one: Any) -> bool:
    return isinstance(one, list) and len(one) == 2 and all(type(number) is int and number > 0 for number in one)
