"""The broker as a pure state machine: events in, actions out (C1). Here the parts are wired; nothing is decided here (C7).

    actions = broker.handle(event, now)        # for every envelope, dead process, …
    actions = broker.tick(now)                 # when next_deadline() has come
    frames = broker.pack(name, now)            # for every Deliver, once the sockets are empty

Peers speak through links (hello, numbering: `links`); what they say goes to `dispatch` (calls), `lifecycle` (workers, services) and
`control` (everything else a client asks for). All data is in `state`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, Final

from forge_broker.core.actions import Action, Look, Send, Sweep, Unwatch, Watch, send
from forge_broker.core.ahead import Ahead
from forge_broker.core.answers import Answers
from forge_broker.core.catalogue import Catalogue
from forge_broker.core.claims import Asked
from forge_broker.core.clients import Client
from forge_broker.core.control import Control
from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import Dispatch
from forge_broker.core.drains import Drains
from forge_broker.core.endings import Endings
from forge_broker.core.events import (
    Event,
    LaunchEnded,
    Preloaded,
    ProcessGone,
    Received,
    Route,
    Stalled,
    Stopped,
    Terminate,
    Unroutable,
    Watched,
)
from forge_broker.core.intake import Intake
from forge_broker.core.leftovers import Leftovers
from forge_broker.core.lifecycle import Lifecycle
from forge_broker.core.links import Link
from forge_broker.core.rebuild import Rebuild, is_answered_at_once, is_of_the_past
from forge_broker.core.replies import Replies
from forge_broker.core.returns import Returns
from forge_broker.core.scaling import Scaling
from forge_broker.core.seating import Seating
from forge_broker.core.sessions import Sessions
from forge_broker.core.slices import Slices
from forge_broker.core.spares import Spares
from forge_broker.core.state import State
from forge_broker.core.telling import Telling
from forge_broker.core.workers import Worker, WorkerState
from forge_contract import messages
from forge_contract.channel import ACK_AFTER_S, Due, Verdict
from forge_contract.errors import ForgeError, ProtocolError, ServiceStopped
from forge_contract.framing import Envelope, Payloads, Taken, decode, encode
from forge_contract.messages import BROKER_NAME
from forge_contract.segments import is_handle

ASK_AGAIN_S: Final = 0.02  # whether the recovery window may end now, while somebody is awaited


class Broker:
    """One broker, over its data."""

    def __init__(self, state: State) -> None:
        self.state = state
        answers = Answers(self.state)
        self.sessions = Sessions(self.state, answers)
        returns = Returns(self.state, answers)
        self.dispatch = Dispatch(self.state, answers, returns)
        self.replies = Replies(self.state, answers, returns, self.dispatch)
        slices = Slices(self.state, self.dispatch)
        self.intake = Intake(self.state, answers, returns, self.dispatch, slices, self.replies)
        self.endings = Endings(self.state, answers, self.sessions)
        self.leftovers = Leftovers(state)
        catalogue, telling = Catalogue(state), Telling(state)
        self.spares = Spares(state)
        self.seating = Seating(state, telling, self.spares)
        self.lifecycle = Lifecycle(
            state, self.dispatch, self.sessions, catalogue, self.seating, telling, self.leftovers, self.spares
        )
        self.drains = Drains(self.state, self.lifecycle, telling)
        self.rebuild = Rebuild(
            state, catalogue, self.seating, self.lifecycle, self.sessions, self.dispatch, answers, telling
        )
        self.ahead = Ahead(state, self.dispatch)
        self.scaling = Scaling(state, self.lifecycle, self.seating, telling)
        self.control = Control(self.state, self.sessions, self.lifecycle, self.drains, self.scaling, telling)
        # Who looks when a time has come. Each is given the entry's key, and looks at what is there now.
        self._due: dict[Kind, Callable[[Any, float], None]] = {
            Kind.AHEAD: self.ahead.look,
            Kind.BATCH: self.dispatch.batch_due,
            Kind.CALL: self.endings.expire,
            Kind.HANG: self.lifecycle.hung,
            Kind.KILL: self.lifecycle.kill_overdue,
            Kind.LINK: self._link_due,
            Kind.METRICS: telling.news,
            Kind.NO_REPLICA: self.dispatch.give_up_waiting,
            Kind.RECOVERED: self._recovered,
            Kind.RESTART: self.lifecycle.restart,
            Kind.SCALE: self.scaling.due,
            Kind.SESSION: self.sessions.idle,
            Kind.SILENCE: self._silence,
            Kind.SLOT: self.seating.free_slot,
            Kind.SPARE: self.seating.spare_due,
            Kind.START: self.lifecycle.start_overdue,
            Kind.UNREAD: self.leftovers.look,
        }
        if state.recovering:
            self.rebuild.open(state.started_at)

    def __repr__(self) -> str:
        state = self.state
        return f"<Broker {len(state.services)} services, {len(state.workers)} workers, {len(state.clients)} clients>"

    # The three doors.

    def handle(self, event: Event, now: float) -> list[Action]:
        state = self.state
        if type(event) is Received:
            self._received(event.route, event.frames, now)
        elif isinstance(event, Unroutable):
            state.counters["unroutable"] += 1  # the peer reconnects and probes, or is found dead
        elif isinstance(event, Watched):
            if event.name in state.links:
                state.links[event.name].watched = True
        elif isinstance(event, ProcessGone):
            self._gone(event.name, "its process has ended", now)
        elif isinstance(event, Stopped):
            worker = state.workers.get(event.name)
            if worker is not None:
                self.lifecycle.stopped(worker, now)
        elif isinstance(event, LaunchEnded):
            self.lifecycle.launch_ended(event.launch, event.why, event.last_lines, now)
        elif isinstance(event, Preloaded):
            self.seating.preloaded(event.service, event.why, now)
        elif isinstance(event, Stalled):
            state.stalled(event.seconds, now)
        elif isinstance(event, Terminate):
            self.lifecycle.terminate(event.why, now)
        return self._settled(now)

    def tick(self, now: float) -> list[Action]:
        """Look at everything that is due."""
        due = self.state.deadlines.next()
        if due is None or due > now:
            return []
        for kind, key in self.state.deadlines.due(now):
            self._due[kind](key, now)
        return self._settled(now)

    def next_deadline(self) -> float | None:
        return self.state.deadlines.next()

    def pack(self, name: str, now: float) -> Send | None:
        """The envelope for a peer that a Deliver action named; None when it is gone meanwhile."""
        link = self.state.links.get(name)
        if link is None:
            return None
        link.delivering = False
        if not len(link.outbox):
            return None
        if type(link) is Worker:
            link.settle()
        frames = link.pack(now)
        if link.timer_at > now + ACK_AFTER_S:
            self._set_timer(link)
        return send((link.route, frames))

    def _settled(self, now: float) -> list[Action]:
        """The event is over: look after those who wait for what it may have brought about."""
        state = self.state
        while state.replayed:
            self.lifecycle.replayed(state.replayed.pop(), now)
        while state.woken:
            self.scaling.evaluate(state.woken.pop(), now)
        if self.drains.waiting:
            self.drains.check(now)
        if self.scaling.waiting:
            self.scaling.check(now)
        if state.terminating:
            self.lifecycle.check_finished()
        actions = state.actions
        state.actions = []
        return actions

    # Deadlines.

    def _silence(self, name: str, now: float) -> None:
        """On another host, silence is death; here the kernel tells, and silence is *busy* (F1)."""
        link = self.state.links.get(name)
        if link is None:
            return
        limit = self.state.config.heartbeat_s * self.state.config.liveness
        silent_s = now - link.heard_at
        if link.watched:
            if silent_s >= limit - 1e-6 and isinstance(link, Worker):
                self.state.actions.append(Look(name, link.hello["pid"]))
            self.state.deadlines.add(now + limit, Kind.SILENCE, name)
        elif silent_s >= limit - 1e-6:
            why = f"silent for {silent_s:.1f} s"
            if isinstance(link, Worker) and link.state is not WorkerState.LOST:
                self.lifecycle.worker_silent(link, why, now)
                self.seating.place_pending(now)
            else:
                self._gone(name, why, now)
        else:
            self.state.deadlines.add(link.heard_at + limit, Kind.SILENCE, name)

    def _gone(self, name: str, why: str, now: float) -> None:
        link = self.state.links.get(name)
        if isinstance(link, Worker):
            self.lifecycle.worker_gone(link, why, [], now)
            self.seating.place_pending(now)
        elif isinstance(link, Client):
            self._client_gone(link, why, now)

    def _client_gone(self, client: Client, why: str, now: float) -> None:
        """Nobody waits for its calls any more, and what it started ends with it (A10)."""
        state = self.state
        # A tool that only looks comes and goes with every `forge status`.
        state.note("debug" if client.detached else "info", "client gone", client=client.name, why=why)
        self._left(client)
        state.actions.append(Unwatch(client.name))
        self.leftovers.of(client, now)
        if state.claims:
            state.claims = {one: claim for one, claim in state.claims.items() if messages.client_of(one) != client.id}
        del state.links[client.name]
        self.endings.drop_client(client, now)
        del state.clients[client.id]
        for service_id in list(client.services):
            service = state.services.get(service_id)
            if service is not None:
                service.owner = None
                stopped = ServiceStopped(service=service.name, why=": the client that started it is gone")
                self.lifecycle.stop_service(service, stopped, now)

    def _left(self, client: Client) -> None:
        client.gone = True
        if self.state.window is not None:
            self.state.window.leaves(client)

    # Links.

    def _received(self, route: Route, frames: list[Any], now: float) -> None:
        """One envelope: who is it from, is it in order, and what does it say."""
        state = self.state
        try:
            envelope = decode(frames)
        except ProtocolError as error:
            state.counters[type(error).__name__] += 1
            self._refuse(route, 0, error)
            return
        link = state.links.get(envelope.sender)
        if link is not None and state.trusted[route[0]] is not link.trusted:
            state.counters["wrong_trust"] += 1
            return
        try:
            # Of who is unknown nothing is read but its hello. What it numbers was for a predecessor of ours, with whom it may well have
            # shared memory: it is asked who it is, as it would be with small arguments.
            barred = not envelope.number if link is None else link.unshared is not None
            if len(frames) > 1 and barred and any(map(is_handle, frames[1:])):
                raise ProtocolError("a handle to shared memory from a peer that has none with us")
            if envelope.number:
                self._numbered(route, link, envelope, now)
            else:
                self._unnumbered(route, link, envelope, now)
        except ForgeError as error:
            # A peer's nonsense is data: counted, answered, and what it said before it stands.
            state.counters[type(error).__name__] += 1
            state.note("warning", "envelope refused", sender=envelope.sender, why=str(error))
            self._refuse(route, envelope.epoch, error)
            self._gone(envelope.sender, f"it broke the protocol: {error}", now)

    def _numbered(self, route: Route, link: Link | None, envelope: Envelope, now: float) -> None:
        if link is None or envelope.epoch != link.channel.epoch or envelope.incarnation != self.state.incarnation:
            self._send_unnumbered(route, envelope.epoch, [[messages.WHO]])
            return
        link.heard_at = now
        link.route = route
        channel = link.channel
        channel.acknowledged(envelope.ack, now)
        if channel.accept(envelope.number, now) is not Verdict.DELIVER:
            self.state.counters["out_of_order"] += 1
            self._set_timer(link)
            return
        if type(link) is Client:
            self._from_client(link, envelope, now)
        elif type(link) is Worker:
            if link.state is WorkerState.LOST:
                self._heard_again(link, now)
            self._from_worker(link, envelope, now)
        if link.timer_at > now + ACK_AFTER_S:  # nothing of this envelope's is due earlier
            self._set_timer(link)

    def _heard_again(self, worker: Worker, now: float) -> None:
        limit = self.state.config.heartbeat_s * self.state.config.liveness
        self.state.deadlines.add(now + limit, Kind.SILENCE, worker.name)
        self.lifecycle.heard_again(worker, now)

    def _current(self, link: Link, envelope: Envelope) -> bool:
        return envelope.epoch == link.channel.epoch and envelope.incarnation == self.state.incarnation

    def _unnumbered(self, route: Route, link: Link | None, envelope: Envelope, now: float) -> None:
        """HELLO, HEARTBEAT, PROBE, and bare acks."""
        if link is not None and self._current(link, envelope):
            link.heard_at = now
            if isinstance(link, Worker) and link.state is WorkerState.LOST:
                self._heard_again(link, now)
            asked = link.channel.probing
            link.channel.acknowledged(envelope.ack, now)
            if not envelope.body and asked:
                link.channel.probing = False
                self._resend(link, envelope.ack)
        for message in envelope.body:
            if message[0] == messages.HELLO:
                self._hello(route, link, envelope, message, now)
            elif message[0] == messages.HEARTBEAT and len(message) == 2 and isinstance(message[1], dict):
                if link is not None:
                    link.vitals = {
                        name: one for name, one in message[1].items() if isinstance(one, (int, float)) and isfinite(one)
                    }
            elif message[0] == messages.PROBE:
                self._probed(route, link, envelope, now)
            else:
                raise ProtocolError(f"{messages.NAMES.get(message[0], message[0])} in an unnumbered envelope")

    def _probed(self, route: Route, link: Link | None, envelope: Envelope, now: float) -> None:
        if link is None or not self._current(link, envelope):
            self._send_unnumbered(route, envelope.epoch, [[messages.WHO]])
            return
        moved = route != link.route
        link.route = route
        self._send_link(link, [])
        if moved:
            # A new connection: what was in the old one's pipes is lost, so all it has not acknowledged goes again.
            self._resend(link, envelope.ack)

    def _resend(self, link: Link, ack: int) -> None:
        self.state.actions.extend(Send(link.route, frames) for frames in link.channel.kept_after(ack))

    def _hello(self, route: Route, link: Link | None, envelope: Envelope, message: list[Any], now: float) -> None:
        state = self.state
        if link is not None:
            if link.channel.epoch == envelope.epoch:
                link.route = route
                self._welcome(link)  # the first welcome was lost
                return
            if envelope.epoch < link.channel.epoch:
                state.counters["old_hello"] += 1  # late, by a connection that is no more
                return
            self._gone(link.name, "it began anew", now)
        hello = read_hello(message)
        payloads = envelope.payloads.take_all(message[2])
        if state.window is None and self.rebuild.opens_for(hello, now):
            self.rebuild.open(now)
        if state.window is not None and envelope.incarnation:
            state.predecessors.add(envelope.incarnation)
        new = (envelope.sender, route, state.trusted[route[0]], envelope.epoch, hello, state.incarnation, now)
        try:
            if hello["role"] == "worker":
                link = Worker(*new)
                self._share(link)
                state.links[link.name] = link
                # Welcomed first: what joining has to say to it must find an open link.
                self._welcome(link)
                if hello.get("holds") and state.window is not None:
                    self.rebuild.worker(link, payloads, now)
                else:
                    self.lifecycle.worker_joined(link, now)
            else:
                link = Client(*new, id=self._client_id(hello), detached=bool(hello.get("detached")))
                if link.id == hello.get("client"):
                    self.intake.came_back(link)
                self._share(link)
                state.links[link.name] = link
                state.clients[link.id] = link
                self._welcome(link)
                if hello.get("declares") and state.window is not None:
                    self.rebuild.client(link, payloads, now)
        except ForgeError as error:
            state.links.pop(envelope.sender, None)
            if isinstance(link, Client):
                del state.clients[link.id]
                self._left(link)
            state.note("warning", "hello refused", sender=envelope.sender, why=str(error))
            self._refuse(route, envelope.epoch, error)
            return
        state.note("debug", "hello", peer=link.name, role=link.role, trusted=link.trusted)
        if isinstance(link, Worker) and link.launch in state.launches:
            link.watched = True  # our own child: the scaler tells of its end, with the exit code
        else:
            state.actions.append(
                Watch(link.name, hello["host"], hello["pid"], hello["pid_namespace"], hello["started"])
            )
        limit = state.config.heartbeat_s * state.config.liveness
        state.deadlines.add(now + limit, Kind.SILENCE, link.name)

    def _share(self, link: Link) -> None:
        """Whether it may send us handles, and be sent them: it sees the same shared memory, as the same user."""
        segments, hello = self.state.segments, link.hello
        if segments is not None:
            here = hello["host"] == self.state.host and hello.get("shared_memory") == segments.id
            link.unshared = None if link.trusted and here else segments.read

    def _client_id(self, hello: dict[str, Any]) -> int:
        """The one it had, if nobody else has it; else one drawn among the free ones."""
        clients = self.state.clients
        wanted = hello.get("client")
        if type(wanted) is int and 0 < wanted < 1 << messages.CLIENT_BITS and wanted not in clients:
            return wanted
        while (drawn := self.state.random.randrange(1, 1 << messages.CLIENT_BITS)) in clients:
            pass
        return drawn

    def _welcome(self, link: Link) -> None:
        config = self.state.config
        fields = {
            "incarnation": self.state.incarnation,
            "client": link.id if isinstance(link, Client) else 0,
            "trusted": link.trusted,
            "heartbeat_s": config.heartbeat_s,
            "liveness": config.liveness,
            "max_payload_bytes": config.max_payload_bytes,
            "link_bytes": config.link_bytes,
            "orphan_grace_s": config.orphan_grace_s,
            "recovering": self.state.window is not None,
            "predecessors": list(self.state.predecessors),
            "segments": None,
        }
        if self.state.segments is not None and link.unshared is None:
            fields["segments"] = [self.state.segments.prefix, config.shared_memory_from, config.shared_memory_bytes]
        self._send_link(link, [[messages.WELCOME, fields]])

    def _link_due(self, name: str, now: float) -> None:
        link = self.state.links.get(name)
        if link is None:
            return
        link.timer_at = float("inf")
        due = link.channel.due(now)
        if due is Due.PROBE:
            self._send_link(link, [[messages.PROBE]])
        elif due is Due.ACK:
            self._send_link(link, [])
        self._set_timer(link)

    def _set_timer(self, link: Link) -> None:
        """One entry per link in the heap at a time, as early as its channel needs; a later need finds it when it fires."""
        due = link.channel.next_deadline()
        if due is not None and due < link.timer_at:
            link.timer_at = due
            self.state.deadlines.add(due, Kind.LINK, link.name)

    def _send_link(self, link: Link, body: list[list[Any]]) -> None:
        self.state.actions.append(Send(link.route, link.unnumbered(body)))

    def _send_unnumbered(self, route: Route, epoch: int, body: list[list[Any]]) -> None:
        frames = encode(BROKER_NAME, epoch, self.state.incarnation, 0, 0, body)
        self.state.actions.append(Send(route, frames))

    def _refuse(self, route: Route, epoch: int, error: ForgeError) -> None:
        self._send_unnumbered(route, epoch, [[messages.REFUSE, *error.to_wire()]])

    # What peers say.

    def _from_client(self, client: Client, envelope: Envelope, now: float) -> None:
        payloads = envelope.payloads
        for message in envelope.body:
            if message[0] == messages.CALLS and self.state.window is None:
                self.intake.calls(client, message, payloads, now)
            elif message[0] == messages.BYE:
                self._client_gone(client, "it said bye", now)
                return
            elif self.state.window is None or is_answered_at_once(message):
                self._client_wants(client, message, payloads, now)
            else:
                self.rebuild.lay_aside(client, message, payloads, now)
        payloads.close()

    def _client_wants(self, client: Client, message: messages.Message, payloads: Payloads, now: float) -> None:
        kind = message[0]
        if kind == messages.CALLS:
            self.intake.calls(client, message, payloads, now)
        elif kind == messages.CONTROL:
            self.control.handle(client, message, payloads, now)
        elif kind == messages.CANCEL:
            self.endings.cancel(client, message, now)
        elif kind == messages.FANOUT:
            self.intake.fanout(client, message, payloads, now)
        else:
            raise ProtocolError(f"{messages.NAMES.get(kind, kind)} from a client")

    def _recovered(self, _: None, now: float) -> None:
        """The window is over: what was asked in it is done as if it came now, the past before the new."""
        if self.rebuild.is_awaited(now):
            self.state.deadlines.add(now + ASK_AGAIN_S, Kind.RECOVERED, None)
            return
        everything = self.rebuild.end(now)
        self._do_asked([asked for asked in everything if is_of_the_past(asked.message)], now)
        self.rebuild.settle(now)
        self.state.actions.append(Sweep(frozenset({*self.state.links, *self.state.unread})))
        self._do_asked([asked for asked in everything if not is_of_the_past(asked.message)], now)

    def _do_asked(self, everything: list[Asked], now: float) -> None:
        for asked in everything:
            client = asked.client
            if client.gone:
                continue
            try:
                self._client_wants(client, asked.message, Taken(asked.payloads), asked.arrived)
            except ForgeError as error:
                self._refuse(client.route, client.channel.epoch, error)
                self._gone(client.name, f"it broke the protocol: {error}", now)

    def _from_worker(self, worker: Worker, envelope: Envelope, now: float) -> None:
        payloads = envelope.payloads
        for message in envelope.body:
            kind = message[0]
            if kind == messages.REPLIES and self.state.window is None:
                self.replies.take(worker, message, payloads, now)
            elif kind == messages.REPLIES:
                self.rebuild.replies(worker, message, payloads)
            elif kind == messages.STATES and self.state.window is None:
                self.sessions.checkpoints(worker, message, payloads, now)
            elif kind == messages.STATES:
                self.rebuild.states(worker, message, payloads)
            elif kind == messages.READY and len(message) == 2 and type(message[1]) is int:
                self.lifecycle.ready(worker, message[1], now)
            elif kind == messages.WARMED and len(message) == 1:
                self.spares.warmed(worker, now)
            elif (
                kind == messages.MASTER
                and len(message) == 3
                and isinstance(message[1], str)
                and type(message[2]) is int
            ):
                self.lifecycle.master(worker, message[1], message[2])
            elif kind == messages.UNREADY and len(message) == 3 and type(message[2]) is int:
                payload = payloads.take(message[2]) if message[2] else None
                self.lifecycle.unready(worker, message[1], payload, now)
            elif kind == messages.BYE:
                why = f"it left: {message[1]}" if len(message) == 2 else "it left"
                # To leave when it was READY is its right; to leave before that is how a start fails, and counts against it.
                self.lifecycle.worker_gone(worker, why, [], now, blame=worker.state is WorkerState.LOADING)
                self.seating.place_pending(now)
                return
            else:
                raise ProtocolError(f"{messages.NAMES.get(kind, kind)} from a worker")
        payloads.close()


def read_hello(message: list[Any]) -> dict[str, Any]:
    """The fields of HELLO, checked (PROTOCOL.md §5). Raises ProtocolError naming all that is wrong."""
    hello, sizes = message[1:] if len(message) == 3 else (None, None)
    if not isinstance(hello, dict) or not isinstance(sizes, list) or set(map(type, sizes)) - {int}:
        raise ProtocolError("HELLO is [1, fields, sizes]")
    wanted: dict[str, type] = {
        "role": str,
        "host": str,
        "hostname": str,
        "pid": int,
        "pid_namespace": int,
        "started": int,
    }
    if hello.get("role") == "worker":
        wanted |= {"gpus": list, "launch": int}
    wrong = [f"{name} is no {kind.__name__}" for name, kind in wanted.items() if not isinstance(hello.get(name), kind)]
    if hello.get("role") not in ("client", "worker"):
        wrong.append("role is neither client nor worker")
    elif hello["role"] == "worker" and not wrong:
        gpus, labels = hello["gpus"], hello.get("labels") or {}
        if not all(isinstance(gpu, str) for gpu in gpus) or len(set(gpus)) != len(gpus):
            wrong.append("gpus is no array of distinct str")
        if not (isinstance(labels, dict) and all(isinstance(one, str) for pair in labels.items() for one in pair)):
            wrong.append("labels is no map of str to str")
    if not wrong and not (0 <= hello["pid"] < 1 << 31 and hello["pid_namespace"] >= 0 and hello["started"] >= 0):
        wrong.append("pid, pid_namespace or started is out of range")
    if wrong:
        raise ProtocolError("HELLO: " + ", ".join(wrong))
    return hello
