"""All the broker's data on one page. Each fact has one home, named here; what changes it is said beside it.

`dispatch`, `lifecycle` and `control` work on it, `broker` wires them, `status` and `invariants` read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from forge_broker.core.actions import Action, Note, deliver
from forge_broker.core.claims import Claim, Window
from forge_broker.core.clients import Client
from forge_broker.core.dead_letters import DeadLetters
from forge_broker.core.deadlines import Deadlines
from forge_broker.core.ledger import Ledger
from forge_broker.core.links import Link, Segments
from forge_broker.core.replicas import Replica
from forge_broker.core.services import Endpoint, Service
from forge_broker.core.story import Story
from forge_broker.core.workers import Worker
from forge_contract.config import BrokerConfig
from forge_contract.errors import ConfigError

if TYPE_CHECKING:
    from random import Random


class Launch:
    """A worker process that the scaler started for one rank of a replica or of a spare, until the kernel says that it is gone."""

    __slots__ = ("epoch", "gpus", "id", "leaving", "rank", "replica", "service", "spare")

    def __init__(self, id: int, gpus: tuple[str, ...], service: Service, rank: int) -> None:
        self.id = id
        self.gpus = gpus
        self.service = service
        self.rank = rank
        self.spare: Spare | None = None  # while it waits for a replica
        self.replica: Replica | None = None  # never again None
        self.epoch = 0  # the replica's
        self.leaving = False  # told to stop, to be killed, or it has said bye: what it holds will be free soon

    def seat(self, replica: Replica) -> None:
        """It is this replica's now."""
        self.spare = None
        self.replica = replica
        self.epoch = replica.epoch


class Spare:
    """A replica's worth of processes that have imported a service's class, or are about to (X2): one for each rank."""

    __slots__ = ("launches", "number", "service", "warm_at")

    def __init__(self, service: Service, number: int) -> None:
        self.service = service
        self.number = number  # unique in the broker
        self.launches: list[Launch] = []  # by rank
        self.warm_at: float | None = None  # when the last of its processes had imported

    def __repr__(self) -> str:
        return f"<Spare {self.number} of {self.service.name} {'WARM' if self.warm_at is not None else 'STARTING'}>"

    @property
    def gpus(self) -> list[str]:
        """Of all its ranks, in order."""
        return [gpu for launch in self.launches for gpu in launch.gpus]


LAG_WINDOW_S = 60.0  # long enough to be seen by who comes to look after calls had been slow


def _load_nothing(name: str, path: list[str]) -> Any:
    raise ConfigError(where=name, message="this broker loads nothing by name")


class State:
    """`trusted`: for each of the broker's addresses, whether who comes in by it may send code; `unpickle`, and `load` (what
    "module:qualname" names, given an import path), are called for nobody else.
    `host`: this machine, as hellos name it. `random`: the only chance there is."""

    def __init__(
        self,
        config: BrokerConfig,
        *,
        incarnation: int,
        host: str,
        trusted: Sequence[bool],
        random: Random,
        unpickle: Callable[[bytes], Any],
        now: float,
        load: Callable[[str, list[str]], Any] = _load_nothing,
        segments: Segments | None = None,
        recovering: bool = False,
    ) -> None:
        self.config = config
        self.incarnation = incarnation
        self.host = host  # this machine, as hellos name it
        self.trusted = tuple(trusted)  # by address, as routes count them
        self.random = random
        self.unpickle = unpickle
        self.load = load
        self.segments = segments  # None: nobody shares memory
        self.started_at = now
        self.recovering = recovering  # we were started where another broker ended without a word

        # Peers. Made by a hello, removed when they are gone.
        self.links: dict[str, Link] = {}
        self.clients: dict[int, Client] = {}
        self.workers: dict[str, Worker] = {}

        self.unread: dict[
            str, tuple[Worker, float]
        ] = {}  # gone since then, with results in shared memory that may be unread

        # What is served. Made by deploy, removed when the last worker is gone.
        self.services: dict[int, Service] = {}
        self.names: dict[str, Service] = {}
        self.endpoints: dict[int, Endpoint] = {}
        self.last_id = 0  # services, endpoints and replicas count together

        # Processes and GPUs of this machine.
        self.launches: dict[int, Launch] = {}  # until the process is gone
        self.slots: dict[str, str] = dict.fromkeys(config.gpus, "")  # GPU → who has it, "" if nobody
        self.pending: dict[int, Replica] = {}  # replicas without seats, in the order of their asking
        self.window: Window | None = None  # while we recover (F10)
        self.predecessors: set[int] = set()  # incarnations that we go on for: what they gave handles to, we know
        self.claims: dict[int, Claim] = {}  # while what was asked in the window is done: who ran or runs what
        self.woken: set[Service] = set()  # a call waits, and no replica is wanted: ask the policy now (X1)
        self.replayed: set[Service] = set()  # a fan-out that newcomers had to wait for is over (A11): look at them

        self.ledger = Ledger()
        self.dead = DeadLetters(config.dead_letters, config.dead_letter_bytes)
        self.checkpoint_bytes = 0  # of all sessions' states
        self.deadlines = Deadlines()
        self.story = Story(config.story_entries)
        self.held_bytes = 0  # arguments of all unanswered calls
        self.counters: Counter[str] = Counter()  # what the protocol counts: refused, fenced, garbage, …
        self.stalled_s = 0.0  # the longest turn of the last minute, as far as turns are worth telling
        self.stalled_at = now
        self.terminating = ""

        self.actions: list[Action] = []  # of the event being handled

    def next_id(self) -> int:
        self.last_id += 1
        return self.last_id

    def next_launch(self) -> int:
        """Drawn, because processes that our predecessor launched come to us with its numbers (F10)."""
        while (drawn := self.random.randrange(1, 1 << 31)) in self.launches:
            pass
        return drawn

    def worker_of(self, launch: int) -> Worker | None:
        """The process of this launch, once it has said hello and until it has said bye."""
        return next((worker for worker in self.workers.values() if worker.launch == launch), None)

    def stalled(self, seconds: float, now: float) -> None:
        if seconds >= self.loop_lag_s(now):
            self.stalled_s, self.stalled_at = seconds, now

    def loop_lag_s(self, now: float) -> float:
        """How long the loop stood still at worst in the last minute (R4)."""
        return self.stalled_s if now - self.stalled_at <= LAG_WINDOW_S else 0.0

    def deliver(self, link: Link) -> None:
        """Something was put into this peer's outbox."""
        if not link.delivering:
            link.delivering = True
            self.actions.append(deliver((link.name,)))

    def note(self, level: str, event: str, **fields: Any) -> None:
        self.actions.append(Note(level, event, fields))
