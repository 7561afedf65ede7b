"""What a client says, on its way into messages, and what of it may have to be said again (PROTOCOL.md §7, §8). Pure.

`link` gathers calls of one endpoint in a `Run` and everything else in a `Plain`; a turn of them is flushed in one
envelope. `Sent` keeps what was flushed until it is answered, for a broker that forgets everything when it dies
(F10). Nothing is done for a single call to have it kept: whole runs are, and swept when too much in them is answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from forge_contract.framing import Outbox, Payload
from forge_contract.messages import CALLS, CONTROL, FANOUT, Message, column
from forge_contract.segments import Handle

# Answered calls and bytes that may stay among the unanswered ones: a sweep then pays for at least as many new calls as it
# looks at old ones, so its share of a call is a few dozen nanoseconds, whatever is under way.
SURPLUS_CALLS: Final = 1024
SURPLUS_BYTES: Final = 16 << 20


class Extras(NamedTuple):
    """What a call may say beside its arguments; None instead of it when everything is default."""

    deadline: float | None = None  # of the link's clock; travels as seconds remaining
    priority: int = 0
    hints: dict[str, Any] | None = None
    rank: int | None = None
    key: str | int | bytes | None = None  # see `batching`
    weight: float | None = None


class Run:
    """Consecutive calls of one endpoint, and one shape, on their way into one message; or one fan-out."""

    __slots__ = ("again", "endpoint", "extras", "kind", "payloads", "place", "seqs", "sessions", "shape")

    def __init__(self, kind: int, endpoint: int, place: int, shape: int = 0) -> None:
        self.kind = kind
        self.endpoint = endpoint
        self.place = place
        self.shape = shape
        self.again = False  # said before, to the broker's predecessor
        self.seqs: list[int] = []
        self.payloads: list[Payload] = []
        self.sessions: list[str | None] | None = None  # None: no call is of one
        self.extras: list[Extras | None] | None = None

    def begin_sessions(self, session: str) -> None:
        """The call that is added next is the first that is of one."""
        self.sessions = [None] * len(self.seqs)
        self.sessions.append(session)

    def add_extras(self, extras: Extras | None) -> None:
        """What the call says that is added next; of those before, which said nothing, that they did."""
        if self.extras is None:
            self.extras = [None] * len(self.seqs)
        self.extras.append(extras)

    def message(self, outbox: Outbox, now: float) -> Message:
        sizes = list(outbox.attach_all(self.payloads))
        columns = _columns(self.extras, now) if self.extras is not None else {}
        if self.kind == FANOUT:
            return [FANOUT, self.endpoint, self.seqs[0], sizes[0], columns]
        if self.again:
            columns["again"] = True
        if self.shape:
            columns["shape"] = self.shape
        if self.sessions is not None:
            columns["session"] = column(self.sessions)
        return [CALLS, self.endpoint, self.seqs, sizes, columns]

    def left(self, unanswered: Mapping[int, Any]) -> Run | None:
        """The calls that somebody still waits for: itself if all are, None if none is."""
        if unanswered.keys().isdisjoint(self.seqs):
            return None
        wanted = [at for at, seq in enumerate(self.seqs) if unanswered.get(seq) is not None]
        if len(wanted) == len(self.seqs):
            return self
        if not wanted:
            return None
        rest = Run(self.kind, self.endpoint, self.place, self.shape)
        rest.again = self.again
        rest.seqs = [self.seqs[at] for at in wanted]
        rest.payloads = [self.payloads[at] for at in wanted]
        if self.sessions is not None:
            rest.sessions = [self.sessions[at] for at in wanted]
        if self.extras is not None:
            rest.extras = [self.extras[at] for at in wanted]
        return rest

    @property
    def size(self) -> int:
        return sum(map(payload_bytes, self.payloads))


class Plain:
    """A message with at most one payload."""

    __slots__ = ("body", "payload")

    def __init__(self, body: Message, payload: Payload | None = None) -> None:
        self.body = body
        self.payload = payload

    def message(self, outbox: Outbox, now: float) -> Message:
        return self.body if self.payload is None else [*self.body, outbox.attach(self.payload)]

    def left(self, controls: Mapping[int, Any]) -> Plain | None:
        """Itself if it is a control without an answer. A goodbye, or a cancellation, is said to one broker only."""
        return self if self.body[0] == CONTROL and self.body[1] in controls else None


Item = Run | Plain

_NOTHING_EXTRA: Final = Extras()


def payload_bytes(payload: Payload) -> int:
    """With the memory that its handles lease, so that what is answered does not hold much of it."""
    if isinstance(payload, bytes):
        return len(payload)
    return sum(part.size if isinstance(part, Handle) else len(part) for part in payload)


def _columns(extras: list[Extras | None], now: float) -> dict[str, Any]:
    rows = [extra or _NOTHING_EXTRA for extra in extras]
    wanted: dict[str, list[Any]] = {
        "timeout": [None if row.deadline is None else max(0.0, row.deadline - now) for row in rows],
        "priority": [row.priority for row in rows],
        "hints": [row.hints for row in rows],
        "rank": [row.rank for row in rows],
        "key": [row.key for row in rows],
        "weight": [row.weight for row in rows],
    }
    # An item that says nothing is nil, and a column of such items is left out; 0 is the default of priority alone.
    return {
        name: column(values)
        for name, values in wanted.items()
        if any(value is not None if name != "priority" else value for value in values)
    }


class Sent:
    """What was said to a broker, in order, at least as long as it is unanswered.

    `unanswered` (sequence to waiter, None when cancelled) and `controls` (number to waiter) are the link's, and stay
    the only books of what is answered; this looks them up when it sweeps, and when everything is lost.
    """

    def __init__(self, unanswered: Mapping[int, Any], controls: Mapping[int, Any]) -> None:
        self._unanswered = unanswered
        self._controls = controls
        self._items: list[Item] = []
        self.kept_bytes = 0
        self._bytes_needed = 0  # of them, after the last sweep
        self._settled = 0  # calls and controls that are in no item of ours any more
        self._before = 0  # calls and controls of all turns up to the last

    def __repr__(self) -> str:
        return f"<Sent {len(self)} calls and controls kept, {self.kept_bytes} B>"

    def __len__(self) -> int:
        """Calls and controls kept, those among them that have been answered since the last sweep."""
        return sum(len(item.seqs) if isinstance(item, Run) else 1 for item in self._items)

    def keep(self, turn: list[Item], size: int, said: int) -> None:
        """Take in what is flushed now. `size`: bytes of its payloads; `said`: calls and controls of the link so far."""
        open_ones = len(self._unanswered) + len(self._controls)
        before, self._before = self._before, said
        if open_ones == said - before:
            # All that is unanswered is of this turn, as with a caller who awaits each call: nothing else is needed.
            self._items, self.kept_bytes, self._bytes_needed, self._settled = turn, size, 0, before
            return
        self._items += turn
        self.kept_bytes += size
        if (
            said - self._settled > SURPLUS_CALLS + 2 * open_ones
            or self.kept_bytes > SURPLUS_BYTES + 2 * self._bytes_needed
        ):
            self._sweep(said)

    def _sweep(self, said: int) -> None:
        self._items = self._left()
        self._settled = said - len(self)
        self.kept_bytes = self._bytes_needed = _size(self._items)

    def _left(self) -> list[Item]:
        left: list[Item] = []
        for item in self._items:
            rest = item.left(self._unanswered) if isinstance(item, Run) else item.left(self._controls)
            if rest is not None:
                left.append(rest)
        return left

    def take(self, said: int) -> tuple[list[Item], list[int], int]:
        """What is to be said again, in its old order; the sequences of fan-outs, which are not; and the bytes of the former.

        A fan-out's targets were those healthy at the time: said again it could reach others, and some of them twice.
        """
        left = self._left()
        self.forget(said)
        again: list[Item] = []
        fanouts: list[int] = []
        for item in left:
            if isinstance(item, Run):
                if item.kind == FANOUT:
                    fanouts += item.seqs
                    continue
                item.again = True
            again.append(item)
        return again, fanouts, _size(again)

    def forget(self, said: int) -> None:
        self._items = []
        self.kept_bytes = self._bytes_needed = 0
        self._settled = self._before = said

    def never_said(self, calls: int) -> None:
        """So many of the calls counted so far were given up before they were flushed."""
        self._before += calls


def _size(items: list[Item]) -> int:
    return sum(item.size if isinstance(item, Run) else payload_bytes(item.payload or b"") for item in items)
