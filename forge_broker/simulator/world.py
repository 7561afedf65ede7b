"""A virtual world around a real core: time jumps from one thing that happens to the next, and every decision is the broker's own.

The core routes, batches, queues, scales, drains and recovers as it does behind its sockets; here it is driven as the shell drives it
(events in, actions out, `tick` when it asks for it). What is a model: the callers (`traces`), and what a call and the start of a process
take (`model`). The same seed gives the same run.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import takewhile
from random import Random
from typing import Any, Final

import msgpack

from forge_broker.core.actions import Action, Deliver, Kill, Launch, Send, Watch
from forge_broker.core.clients import Client
from forge_broker.core.events import LaunchEnded, Received, Route, Watched
from forge_broker.core.services import Endpoint, Service
from forge_broker.core.sizing import Decided
from forge_broker.core.state import State
from forge_broker.core.workers import Worker
from forge_broker.simulator.figures import Figures, Sample, ScaleEvent, quantile
from forge_broker.simulator.model import Drawer
from forge_broker.simulator.parties import Core, ModelWorker, Run
from forge_broker.simulator.setup import Setup, as_simulated
from forge_contract.config import BrokerConfig
from forge_contract.errors import ConfigError, from_wire
from forge_contract.framing import Payloads, decode, encode
from forge_contract.messages import (
    ANSWER,
    ASSIGN,
    BYE,
    CALLS,
    CONTROL,
    DISPATCH,
    DROP,
    HELLO,
    OK,
    READY,
    RECALL,
    RESULTS,
    SEQUENCE_MASK,
    STOP,
    WELCOME,
    Message,
    spread,
)

HERE: Final = "here"
INCARNATION: Final = 1
EPOCH_S: Final = 1000.0  # when the world begins: the core takes a time of 0 for none
CLIENT: Final = "c-0000000000000000"
SAMPLES: Final = 240  # of a run, where nothing else is said
STARTS_WITHIN_S: Final = 86_400.0


def simulate(setup: Setup) -> Figures:
    """Run a trace against a service. Raises ConfigError for a service that cannot be deployed, or the broker's own error."""
    world = World(setup)
    world.deploy()
    return world.run()


class World:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = EPOCH_S
        self.began = math.inf  # of the trace
        self.figures = Figures()
        self._random = Random(setup.seed)
        self._spec, self.config, self.figures.notes = as_simulated(setup)
        # Room for whatever is asked for: two generations of processes, one that drains and one that starts.
        most = self.config.limits.most if self.config.autoscaling is not None else self.config.initial_replicas
        self.core = Core(
            State(
                BrokerConfig(max_workers=2 * most + 8, gpus=()),
                incarnation=INCARNATION,
                host=HERE,
                trusted=(True,),
                random=Random(setup.seed + 1),
                unpickle=setup.unpickle or _nobody_unpickles,
                load=setup.load or _nobody_loads,
                now=self.now,
            )
        )
        self._drawer = Drawer(setup.model, Random(setup.seed + 2))
        options = next(one["options"] for one in self._spec["endpoints"] if one["name"] == setup.endpoint)
        self._in_calls: bool = options.get("batch_mode") == "call"
        # (when, tie, whose run is over, the run), or (when, tie, None, what to do)
        self._heap: list[tuple[float, int, ModelWorker | None, Any]] = []
        self._ties = 0
        self._workers: dict[str, ModelWorker] = {}
        self._launched: dict[int, float] = {}  # since when it runs
        self._client: Client
        self._endpoint: Endpoint
        self.service: Service
        self._decided: list[Decided] = []
        self._sent = 0  # envelopes of the client
        self._answer: tuple[bool, Any] | None = None
        self._arrived = array("d")  # of each call, by its sequence − 1
        self._started = array("d")
        self._calls_seen = self._answers_seen = 0  # by the last sample
        self._queued_most = 0  # since then
        self._sessions: list[str] = []
        self._hello(CLIENT, {"role": "client", "client": 0, "detached": False})

    # Before the trace.

    def deploy(self) -> None:
        """The service runs, and its sessions are open; the trace begins now."""
        self._ask("deploy", {"spec": self._spec})
        ok, fields = self._until_answered()
        if not ok:
            raise from_wire(fields["error"])
        self.service = self.core.state.services[fields["service"]]
        self.service.watchers.clear()  # nobody reads its metrics, a snapshot of every replica each second
        self._endpoint = self.core.state.endpoints[fields["endpoints"][self.setup.endpoint]]
        for number in range(self.setup.sessions):
            session = f"{number:016x}"
            self._ask("open_session", {"service": fields["service"], "session": session, "hints": {}})
            self._until_answered()
            self._sessions.append(session)
        self.began = self.now
        self.figures.wanted_at_first = self.service.wanted
        self.figures.fewest_healthy = len(self.service.pool)

    def _until_answered(self) -> tuple[bool, Any]:
        until = self.now + STARTS_WITHIN_S
        while self._answer is None:
            if not self._step(until):
                raise ConfigError(
                    where="simulation", message=f"the service has not started within {STARTS_WITHIN_S:g} s"
                )
        answer, self._answer = self._answer, None
        return answer

    # The trace.

    def run(self) -> Figures:
        """The whole trace. What is not answered when it ends is outstanding."""
        trace, figures, began, step = self.setup.trace, self.figures, self.began, self._step
        end = began + trace.seconds
        arrivals = trace.arrivals(Random(self.setup.seed + 3))
        samples = max(1, round(trace.seconds / self.setup.sample_s)) if self.setup.sample_s else SAMPLES
        coming = began + next(arrivals, math.inf)
        for number in range(1, samples + 1):
            sample_at = end if number == samples else began + number * trace.seconds / samples
            while coming < sample_at:
                while step(coming):
                    pass
                self.now = at = coming
                count = 0
                while coming <= at:
                    count += 1
                    coming = began + next(arrivals, math.inf)
                self._call(count)
            while step(sample_at):
                pass
            self.now = sample_at
            self._sample(trace.seconds / samples)
        figures.calls = len(self._arrived)
        figures.outstanding = figures.calls - len(figures.latencies) - figures.failed.total()
        for since in self._launched.values():
            figures.replica_seconds += end - max(since, began)
        for one in self._decided:
            figures.decisions[one.decision.rule] += one.count
        batcher = self._endpoint.batcher
        if batcher is not None:
            figures.batches = batcher.stats.snapshot()
        return figures

    def _step(self, until: float) -> bool:
        """The next thing that happens by itself, if it does by then: a run is over, a process is there, the core wants to be called."""
        heap = self._heap
        due = self.core.next_deadline()
        if heap and (due is None or heap[0][0] < due):
            if heap[0][0] > until:
                return False
            self.now, _, worker, what = heappop(heap)
            if worker is None:
                what()
                self._see_healthy()
            else:
                self._run_over(worker, what)
            return True
        if due is None or due > until:
            return False
        self.now = max(self.now, due)
        self._carry(self.core.tick(self.now))
        if self.now >= self.began:
            self._see_decisions()
        self._see_healthy()
        return True

    def _see_healthy(self) -> None:
        """After all that takes a replica away: a process that ends, a decision, a deadline. Samples lie too far apart for the fewest."""
        if self.now >= self.began:
            self.figures.fewest_healthy = min(self.figures.fewest_healthy, len(self.service.pool))

    def _see_decisions(self) -> None:
        """What the policy has said since the last look: the service remembers the last hundred, we all."""
        decided = self.service.sizing.decided
        latest = self._decided[-1] if self._decided else None
        if not decided or decided[-1] is latest:
            return
        fresh = [*takewhile(lambda one: one is not latest, reversed(decided))][::-1]
        self._decided += fresh
        self.figures.events += [
            ScaleEvent(one.first - self.began, one.decision.delta, one.decision.rule, one.decision.reason, one.wanted)
            for one in fresh
            if one.decision.delta
        ]

    def _sample(self, seconds: float) -> None:
        """The figures of an interval, at its end."""
        figures, replicas = self.figures, self.service.replicas.values()
        fresh = sorted(figures.latencies[self._answers_seen :])
        queues = [*self.service.queues, *(replica.parked for replica in replicas)]
        queued = sum(queue.length for queue in queues)
        figures.samples.append(
            Sample(
                at=self.now - self.began,
                rate=(len(self._arrived) - self._calls_seen) / seconds,
                wanted=self.service.wanted,
                healthy=len(self.service.pool),
                processes=len(self._launched),
                queued=queued,
                queued_most=max(queued, self._queued_most),
                in_flight=sum(replica.active_requests for replica in replicas),
                p50_s=quantile(fresh, 0.5) if fresh else None,
                p99_s=quantile(fresh, 0.99) if fresh else None,
            )
        )
        self._calls_seen, self._answers_seen, self._queued_most = len(self._arrived), len(figures.latencies), queued

    def _call(self, count: int) -> None:
        """So many calls, now."""
        arrived = self._arrived
        first = len(arrived) + 1
        arrived.extend([self.now] * count)
        self._started.extend([0.0] * count)
        columns: dict[str, Any] = {}
        if self._sessions:
            columns["session"] = [self._random.choice(self._sessions) for _ in range(count)]
        if self.setup.timeout_s is not None:
            columns["timeout"] = self.setup.timeout_s
        message = [CALLS, self._endpoint.id, list(range(first, first + count)), [0] * count, columns]
        self._carry(self.core.heard_calls(self._client, message, self.now))
        # The queue is longest just after a call came.
        endpoint = self._endpoint
        waiting = endpoint.queue.length + (0 if endpoint.batcher is None else endpoint.batcher.length)
        self._queued_most = max(self._queued_most, waiting)

    def _run_over(self, worker: ModelWorker, run: Run) -> None:
        link = self.core.state.links.get(worker.name)
        if not isinstance(link, Worker):
            return  # it was killed
        self._said(worker, link, *worker.ended(run))

    def _said(self, worker: ModelWorker, link: Worker, replies: list[Message], begun: list[tuple[Run, float]]) -> None:
        self._begin(worker, begun)
        for message in replies:
            self._carry(self.core.heard_replies(link, message, self.now))
        if worker.leaving and worker.idle:
            self._leave(worker)

    def _begin(self, worker: ModelWorker, begun: list[tuple[Run, float]]) -> None:
        now, started, heap = self.now, self._started, self._heap
        for run, takes_s in begun:
            for key in run.ids:
                started[(key & SEQUENCE_MASK) - 1] = now
            self.figures.busy_seconds += takes_s * run.places
            self._ties += 1
            heappush(heap, (now + takes_s, self._ties, worker, run))

    # What the core wants done.

    def _carry(self, actions: list[Action]) -> None:
        core = self.core
        for action in actions:
            if type(action) is Deliver:
                link = core.state.links.get(action.name)
                if link is not None:
                    body, payloads = core.taken(link)
                    if action.name == CLIENT:
                        self._client_hears(body, payloads)
                    else:
                        self._worker_hears(self._workers[action.name], body)
            elif isinstance(action, Launch):
                self._launched[action.launch] = self.now
                self.later(self.setup.model.start_s, partial(self._started_process, action.launch))
            elif isinstance(action, Kill):
                self.later(0.0, partial(self.end_process, action.launch, "signal SIGKILL"))
            elif isinstance(action, Send):
                self._hear(action)
            elif isinstance(action, Watch):
                self._carry(core.handle(Watched(action.name), self.now))

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        """Something else that is to happen."""
        self._ties += 1
        heappush(self._heap, (self.now + seconds, self._ties, None, do))

    def _client_hears(self, body: list[Message], payloads: Payloads) -> None:
        figures, now, arrived, started = self.figures, self.now, self._arrived, self._started
        for message in body:
            if message[0] == RESULTS:
                if message[3] == OK:
                    for sequence in message[2]:
                        at = sequence - 1
                        figures.latencies.append(now - arrived[at])
                        figures.waits.append(started[at] - arrived[at])
                    continue
                statuses = spread(message[3], len(message[2]))
                for sequence, status, payload in zip(message[2], statuses, payloads.take_all(message[4]), strict=True):
                    at = sequence - 1
                    if status == OK:
                        figures.latencies.append(now - arrived[at])
                        figures.waits.append(started[at] - arrived[at])
                    else:
                        figures.failed[msgpack.unpackb(bytes(payload))[0]] += 1
            elif message[0] == ANSWER:
                self._answer = (message[2], message[3])

    def _worker_hears(self, worker: ModelWorker, body: list[Message]) -> None:
        link = self.core.state.links.get(worker.name)
        for message in body:
            kind = message[0]
            if kind == DISPATCH:
                self._begin(worker, worker.dispatched(message))
            elif not isinstance(link, Worker):
                return
            elif kind == ASSIGN:
                worker.epoch = message[1]["epoch"]
                self._say(worker.name, worker, [READY, 0])
            elif kind == DROP:
                self._said(worker, link, *worker.drops(message))
            elif kind == RECALL:
                self._said(worker, link, worker.recalls(), [])
            elif kind == STOP:
                self._said(worker, link, worker.stops(), [])

    def _leave(self, worker: ModelWorker) -> None:
        """It says goodbye, once, and its process ends."""
        if self._workers.pop(worker.name, None) is None:
            return
        self._say(worker.name, worker, [BYE, "it was told to stop"])
        self.end_process(worker.launch, "exit code 0")

    def _started_process(self, launch: int) -> None:
        if launch not in self._launched:
            return  # killed while it started
        name = f"w-{launch:016x}"
        self._workers[name] = ModelWorker(
            name,
            launch,
            self.setup.model,
            self._drawer,
            in_calls=self._in_calls,
            limit=self.config.concurrency,
            interruptible=self.setup.interruptible and not self._in_calls,
        )
        self._hello(name, {"role": "worker", "gpus": [], "launch": launch})

    def end_process(self, launch: int, why: str) -> None:
        """Now. `why`: as the kernel would tell it."""
        since = self._launched.pop(launch, None)
        if since is None:
            return
        self.figures.replica_seconds += max(0.0, self.now - max(since, self.began))
        self._workers.pop(f"w-{launch:016x}", None)
        self._carry(self.core.handle(LaunchEnded(launch, why, []), self.now))

    # Envelopes, for what is rare.

    def _hello(self, name: str, fields: dict[str, Any]) -> None:
        own = {"host": HERE, "hostname": HERE, "pid": 1, "pid_namespace": 1, "started": 1}
        frames = encode(name, 1, 0, 0, 0, [[HELLO, own | fields, []]])
        self._carry(self.core.handle(Received(_route(name), frames), self.now))

    def _say(self, name: str, worker: ModelWorker, message: Message) -> None:
        worker.sent += 1
        self._numbered(name, worker.sent, message)

    def _ask(self, op: str, fields: dict[str, Any]) -> None:
        self._sent += 1
        self._numbered(CLIENT, self._sent, [CONTROL, self._sent, op, fields, 0])

    def _numbered(self, name: str, number: int, message: Message) -> None:
        frames = encode(name, 1, INCARNATION, number, 0, [message])
        self._carry(self.core.handle(Received(_route(name), frames), self.now))

    def _hear(self, send: Send) -> None:
        """Unnumbered ones: a welcome, and now and then an acknowledgement."""
        for message in decode(send.frames).body:
            if message[0] == WELCOME and send.route == _route(CLIENT):
                self._client = self.core.state.clients[message[1]["client"]]


def _route(name: str) -> Route:
    return (0, name.encode())


def _nobody_loads(name: str, path: list[str]) -> Any:
    raise ConfigError(where="simulation", message=f"{name} came by name, and nobody said how to load it")


def _nobody_unpickles(code: bytes) -> Any:
    raise ConfigError(where="simulation", message="a router or policy came by value, and nobody said how to load it")
