"""What callers and workers know: every call with whoever it was given to, judged at each dispatch by what was promised.

`test_machine` asks, kills and replies; `peers` has the wire. The promises: one attempt of an at-most-once call (F3), no more than
`MAX_ATTEMPTS` deaths (F4), the order and the state of a session (A6, S3), the last weights (A11).
"""

from __future__ import annotations

from typing import Any

from forge_contract.messages import (
    ASSIGN,
    DISPATCH,
    DROP,
    DROPPED,
    IMPORT,
    OK,
    REPLAY,
    REPLIES,
    STOP,
    UNTOUCHED,
    WARM,
)
from tests.core.peers import TRUSTED, Bench, ClientPeer, WorkerPeer

ELSEWHERE = "another-host"
MAX_ATTEMPTS = 3
BATCH_SIZE = 3


class Asked:
    """One call, as the model knows it. Its payload is its name."""

    def __init__(
        self, payload: bytes, client: ClientPeer, key: int, *, once: bool, hangs: bool, session: str | None
    ) -> None:
        self.payload = payload
        self.client = client
        self.key = key
        self.once = once  # at most once
        self.suspect = hangs  # its deaths are not all the model's doing
        self.session = session
        self.deaths = 0  # of replicas that died by themselves while they ran it
        self.copies: dict[tuple[str, int], bool] = {}  # (worker, attempt) → it gave it back untouched
        self.attempt = 0

    def __repr__(self) -> str:
        return f"<Asked {self.payload.decode()} of {self.session or 'no session'}>"


class Rank(WorkerPeer):
    """A worker process that tells the model what it is given."""

    def __init__(self, model: Model, hello: dict[str, Any]) -> None:
        self.model = model
        self.assigned = False
        self.warming = False  # a spare that has not said that it has imported
        self.told_ready = -1  # how many replays it has told of; -1: not READY yet
        self.replays: list[bytes] = []
        self.had: set[bytes] = set()  # weights it has run
        self.stopping = False
        self.dropped: set[int] = set()
        self.knows: set[str] = set()  # sessions whose last state it has
        super().__init__(model.bench, TRUSTED, {"role": "worker", "gpus": [], "launch": 0, **hello})
        self.hello()

    def took(self, message: list[Any], payloads: list[Any]) -> None:
        super().took(message, payloads)
        if message[0] == ASSIGN:
            self.assigned = True
        elif message[0] == WARM:
            self.warming = True
        elif message[0] == REPLAY:
            self.replays.append(payloads[0])
        elif message[0] == STOP:
            self.stopping = True
        elif message[0] == DROP:
            self.dropped |= set(message[1])
        elif message[0] == IMPORT:
            self.knows.add(message[1])
        elif message[0] == DISPATCH:
            attempts = message[5] if isinstance(message[5], list) else [message[5]] * len(message[4])
            for key, attempt, payload in zip(message[4], attempts, payloads, strict=True):
                self.model.dispatched(self, key, attempt, payload)
            if (batches := message[7].get("batches")) is not None:
                assert sum(batches) == len(message[4]), f"{batches} are no batches of {len(message[4])} calls (B2)"
                assert all(0 < size <= BATCH_SIZE for size in batches), (
                    f"batches of {batches}, and {BATCH_SIZE} may be (B1)"
                )

    @property
    def here(self) -> bool:
        return bool(self.fields["host"] != ELSEWHERE)

    def end(self, at: int, status: int) -> None:
        """Answer one of its calls; one that was dropped may say so."""
        key, attempt, payload = self.calls.pop(at)
        if status == DROPPED and key not in self.dropped:
            status = OK
        if status == OK:
            self.had.add(payload)
        if status == UNTOUCHED and (asked := self.model.asked.get(payload)) is not None:
            asked.copies[self.name, attempt] = True
        self.say([REPLIES, self.replica_epoch, [key], [attempt], [status], [len(payload)]], packed=payload)
        self.model.weigh()


class Model:
    """What was asked and who was given what."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.asked: dict[bytes, Asked] = {}
        self.of_session: dict[str, list[Asked]] = {}  # in the order sent
        self.fanouts: dict[tuple[ClientPeer, int], bytes] = {}  # of `load`, open: (client, sequence) → weights
        self.weights: bytes | None = None  # of the last such fan-out that succeeded

    def weigh(self) -> None:
        """Which fan-outs are over. Of two the one that ended last counts, so this is looked at after each reply."""
        for (client, sequence), payload in list(self.fanouts.items()):
            parts = client.parts.get(sequence)
            if parts and all(status == OK for status, _ in parts.values()):
                self.weights = payload
            if parts is not None or sequence in client.results or client.name not in self.bench.state.links:
                del self.fanouts[client, sequence]

    def is_open(self, asked: Asked) -> bool:
        client = self.bench.state.clients.get(asked.key >> 40)
        return client is not None and asked.key in client.calls

    def dispatched(self, worker: Rank, key: int, attempt: int, payload: bytes) -> None:
        asked = self.asked.get(payload)
        if asked is None:
            assert payload in self.fanouts.values() or payload.startswith(b"fan"), f"nobody asked {payload!r}"
            return
        assert asked.key == key, f"{asked!r} came under another id"
        assert self.is_open(asked), f"{asked!r} has its answer and is dispatched"
        assert asked.deaths < MAX_ATTEMPTS, f"{asked!r} has killed {asked.deaths} replicas and is tried again (F4)"
        assert (worker.name, attempt) not in asked.copies, f"{asked!r} came twice in one attempt"
        if asked.once:
            earlier = [back for (_, number), back in asked.copies.items() if number != attempt]
            assert all(earlier), f"{asked!r} may have started, and is tried again (F3)"
        asked.copies[worker.name, attempt] = False
        asked.attempt = attempt
        if asked.session is not None:
            self.in_order(asked, worker)

    def in_order(self, asked: Asked, worker: Rank) -> None:
        """A session's calls start in the order sent, and where its state is (A6, S3)."""
        session = asked.session or ""
        for earlier in self.of_session[session]:
            if earlier is asked:
                break
            if self.is_open(earlier):
                back = earlier.copies.get((worker.name, earlier.attempt), True)
                assert not back, f"{asked!r} overtakes {earlier!r}"
        service = self.bench.service()
        kept = service.sessions[session].state if session in service.sessions else None
        assert kept is None or session in worker.knows, f"{asked!r} runs without the state of its session (S3)"
