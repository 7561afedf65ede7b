"""What a broker that comes back learns in its recovery window (F10): who says to run or to have run what, and what it was asked meanwhile.

`rebuild` fills it and carries it out when the window ends; `dispatch` asks it what became of a call that is sent again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from forge_broker.core.clients import Client
from forge_broker.core.replicas import Replica
from forge_broker.core.requests import Batch
from forge_broker.core.services import Replay
from forge_broker.core.workers import Worker
from forge_contract.framing import Payload
from forge_contract.messages import Message

Part = tuple[int, Payload, bool]
"""Status, payload, trusted."""


class Claim:
    """One attempt of a request, as the ranks of one replica tell of it."""

    __slots__ = ("attempt", "batch", "parts", "replica", "reserved", "running", "told")

    def __init__(self, replica: Replica, attempt: int) -> None:
        self.replica = replica
        self.attempt = attempt
        self.running: dict[int, Worker] = {}  # by rank
        self.parts: dict[int, Part] = {}  # of ranks that have ended it
        self.told: dict[int, Worker] = {}  # whose words these are; some may be gone since
        self.batch: Batch | None = None  # that it runs in; `open` counts those with room reserved
        self.reserved = False  # its room is taken already

    def reserve(self) -> bool:
        """Take its room, if there is: one unit, or a share in its batch's. Some may have been sent ahead."""
        replica, batch = self.replica, self.batch
        pool = replica.pool
        shares = batch is not None and batch.open > 0
        if pool is None or not (shares or replica.active < replica.most):
            return False
        if not shares:
            if replica.active >= replica.room:
                pool.resize(replica, replica.active + 1)
            pool.took(replica)
        if batch is not None:
            batch.open += 1
        self.reserved = True
        return True

    def give_up(self) -> None:
        """Nobody waits for it: what room was reserved for it is free."""
        room = 1 if self.batch is None else self.batch.ended(1)
        if room and self.replica.pool is not None:
            self.replica.pool.gave(self.replica, room)
        self.reserved = False


class Asked:
    """A message that came in the window, to be answered after it."""

    __slots__ = ("arrived", "client", "message", "payloads")

    def __init__(self, client: Client, message: Message, payloads: list[Payload], arrived: float) -> None:
        self.client = client
        self.message = message
        self.payloads = payloads
        self.arrived = arrived  # seconds on the broker's clock


class Declared(NamedTuple):
    """A session, as its client says."""

    client: Client
    service: int
    session: str
    hints: dict[str, Any]
    used: bool  # a call was made in it


class Window:
    """`until`: seconds on the broker's clock."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.claims: dict[int, Claim] = {}  # by request
        # (service, session) → who says to hold it, and when it was used there last, on the broker's clock.
        self.homes: dict[tuple[int, str], dict[Replica, float]] = {}
        self.states: dict[tuple[int, str, int], tuple[Payload, bool]] = {}  # checkpoints by replica idx, with the stamp
        self.sessions: list[Declared] = []
        self.replays: list[tuple[int, Replay]] = []  # by endpoint, of clients that sent the last fan-out
        self.owners: dict[int, int] = {}  # service → the client id it ends with, 0: none
        self.declared: dict[int, Client] = {}  # service → its owner, come back
        self.asked: list[Asked] = []
        self.asked_bytes = 0

    def leaves(self, client: Client) -> None:
        """It is gone again, or was refused: what it declared has nobody."""
        self.declared = {service: owner for service, owner in self.declared.items() if owner is not client}
        self.sessions = [one for one in self.sessions if one.client is not client]

    def settles(self, service: int, session: str, replica: Replica, used_at: float) -> None:
        """A replica holds this session. A zombie may, too."""
        self.homes.setdefault((service, session), {})[replica] = used_at

    def home(self, service: int, session: str) -> Replica | None:
        """Where a session lives: of those that hold it, who was used last."""
        held = self.homes.get((service, session))
        return max(held, key=held.__getitem__) if held else None

    def outdates(self, replica: Replica) -> None:
        """A newer epoch of it is there. Who spoke for the older one was lost to our predecessor, which moved its sessions; that a stopped
        process took up its last calls when it was let go on is no use that counts."""
        for held in self.homes.values():
            held.pop(replica, None)
        lost = (replica.service.id, replica.idx)
        self.states = {key: state for key, state in self.states.items() if (key[0], key[2]) != lost}

    def claim(self, request: int, replica: Replica, attempt: int) -> Claim | None:
        """The claim of this attempt; None when a later attempt is known."""
        found = self.claims.get(request)
        if found is None or found.attempt < attempt:
            found = self.claims[request] = Claim(replica, attempt)
        return found if found.attempt == attempt and found.replica is replica else None
