"""Handles on their way through the core, and what becomes of the segments of those who are gone (PROTOCOL.md §9.1)."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.actions import Exit, Sweep, Unlink
from forge_broker.core.events import Terminate
from forge_contract.errors import PoisonedRequest
from forge_contract.framing import encode
from forge_contract.messages import BYE, CALLS, HELLO, OK, REFUSE, REPLIES, WHO
from forge_contract.segments import Handle, Place, Terms, handle
from tests.core.peers import INCARNATION, TRUSTED, UNTRUSTED, Bench, ClientPeer, WorkerPeer
from tests.core.test_rebuild import ENDPOINT, client_back, end_window, id_of, worker_back
from tests.core.test_suspects import revived

DOCUMENT = b"document"


class Segments:
    """Stands for the machine's: what a handle names is its size in xs."""

    id = "22:1000"
    prefix = "forge-0123456789abcdef"

    def read(self, frame: Any) -> bytes:
        return b"x" * frame.size if isinstance(frame, Handle) else b"?"


def bench(**options: Any) -> Bench:
    return Bench(segments=Segments(), shared_memory_from=7, shared_memory_bytes=8, **options)


def a_handle(size: int = 40_000) -> Handle:
    return handle(Place("forge-0123456789abcdef-c-0123456789abcdef-1", 1, 64, size), None)


def call(client: ClientPeer, endpoint: int, *frames: bytes, **columns: Any) -> int:
    client.sequence += 1
    client.say([CALLS, endpoint, [client.sequence], [-len(frames)], columns], large=frames)
    return client.sequence


def reply(worker: WorkerPeer, *frames: bytes) -> None:
    (request, attempt, _) = worker.calls.pop(0)
    worker.say([REPLIES, worker.replica_epoch, [request], attempt, OK, [-len(frames)]], large=frames)


def given(worker: WorkerPeer) -> Any:
    """The frames of the one call it has."""
    ((_, _, payload),) = worker.calls
    return payload


def acknowledge(client: ClientPeer) -> None:
    client.whisper()


def test_only_who_sees_the_same_memory_by_a_trusted_address_is_told_to_use_it() -> None:
    """W6."""
    here = bench()
    terms = Terms(Segments.prefix, 7, 8)
    assert Terms.read(here.client().welcome["segments"]) == terms
    assert Terms.read(here.worker().welcome["segments"]) == terms
    assert here.client(UNTRUSTED).welcome["segments"] is None
    assert here.client(host="another").welcome["segments"] is None
    assert here.client(shared_memory="23:1000").welcome["segments"] is None
    assert here.client(shared_memory="").welcome["segments"] is None
    assert Bench().client().welcome["segments"] is None


def test_a_handle_passes_as_it_is_between_those_who_share() -> None:
    """W2: the broker sees a handle, and looks at nothing."""
    here, client, (worker,), endpoint = bench().serving()
    assert here.state.held_bytes == 0
    one = call(client, endpoint, DOCUMENT, a_handle())
    assert given(worker) == [DOCUMENT, a_handle()]
    assert here.state.held_bytes < 200
    reply(worker, DOCUMENT, a_handle())
    assert client.results == {one: (OK, [DOCUMENT, a_handle()])}


def test_who_does_not_share_is_sent_the_buffers() -> None:
    here, client, _, endpoint = bench().serving()
    stranger = here.client(UNTRUSTED)
    stranger.call(endpoint, b"small")
    (worker,) = here.state.workers.values()
    peer = here.peers[worker.route]
    assert isinstance(peer, WorkerPeer)
    reply(peer, DOCUMENT, a_handle(5))
    assert stranger.results == {1: (OK, [DOCUMENT, b"xxxxx"])}
    assert client.results == {}


def test_a_worker_elsewhere_is_sent_the_buffers() -> None:
    here = bench()
    client = here.client()
    remote = here.worker(UNTRUSTED, host="another")
    client.deploy(num_replicas=1)
    remote.ready()
    call(client, here.service().endpoints[0].id, DOCUMENT, a_handle(3), b"a frame")
    assert given(remote) == [DOCUMENT, b"xxx", b"a frame"]


@pytest.mark.parametrize("where", [{"address": UNTRUSTED}, {"host": "another"}, {"shared_memory": "23:1000"}])
def test_a_handle_of_who_does_not_share_breaks_the_protocol(where: dict[str, Any]) -> None:
    """W6: it would have the broker read files of others for a stranger."""
    here, _, (worker,), endpoint = bench().serving()
    stranger = here.client(where.pop("address", TRUSTED), **where)
    call(stranger, endpoint, DOCUMENT, a_handle())
    assert stranger.of(REFUSE)[0][1] == "ProtocolError"
    assert stranger.name not in here.state.links
    assert worker.seen == []


def test_large_arguments_that_were_for_a_broker_before_this_one_break_nothing() -> None:
    """W4, F10: the socket had them when the broker was killed, and gives them to the next one, which has not been greeted yet."""
    here, _, (worker,), endpoint = bench().serving()
    client = here.client()
    body = [[CALLS, endpoint, [1], [-2], {}]]
    client.send(encode("c-00000000000000ff", 1, INCARNATION - 1, 1, 0, body, b"", (DOCUMENT, a_handle())))
    assert client.of(WHO) == [[WHO]]
    assert client.of(REFUSE) == []
    assert worker.seen == []
    hello = [[HELLO, {**client.fields, "client": 0}, []]]
    client.send(encode("c-00000000000000ff", 1, 0, 0, 0, hello, b"", (a_handle(),)))
    assert client.of(REFUSE)[0][1] == "ProtocolError"  # a hello is read, and no stranger has files opened with it


def test_a_clients_segments_go_with_it() -> None:
    here, client, _, endpoint = bench().serving()
    other = here.client()
    call(other, endpoint, DOCUMENT, a_handle())
    here.handle_gone(other)
    assert here.of(Unlink) == [Unlink(other.name)]
    client.say([BYE, "done"])
    assert here.of(Unlink) == [Unlink(client.name)]


def test_a_workers_segments_stay_until_its_replies_have_reached_their_clients() -> None:
    here, client, (worker,), endpoint = bench().serving()
    call(client, endpoint, DOCUMENT, a_handle())
    reply(worker, DOCUMENT, a_handle())
    worker.die()
    here.advance(20.0)
    assert here.of(Unlink) == []  # the caller's loop stands still, and it has not read its result
    acknowledge(client)
    here.advance(1.0)
    assert here.of(Unlink) == [Unlink(worker.name)]
    assert here.state.unread == {}


def test_the_segments_of_a_rank_go_though_its_client_is_sent_nothing_more() -> None:
    """Whoever is not the last rank to reply owes a call, and not yet an envelope: that one has gone by the time it is asked for."""
    here, client, (zero, one), endpoint = bench().serving(1, procs=2)
    call(client, endpoint, DOCUMENT, a_handle())
    reply(zero, DOCUMENT, a_handle())
    reply(one, DOCUMENT, a_handle())
    acknowledge(client)
    zero.die()
    here.advance(1.0)
    assert Unlink(zero.name) in here.of(Unlink)
    assert here.state.unread == {}


def test_results_that_a_worker_told_a_new_broker_stay_until_their_client_has_them_though_it_dies_meanwhile() -> None:
    """F10: in the window nobody is answered yet."""
    here = bench(recovering=True)
    worker = worker_back(here, 0, running=[], replies=True)
    client = client_back(here)
    worker.say([REPLIES, 3, [id_of(1)], 1, OK, [-2]], large=(DOCUMENT, kept := a_handle()))
    call(client, ENDPOINT, DOCUMENT, a_handle(), again=True)
    here.handle_gone(worker)
    end_window(here)
    assert here.of(Unlink) == []
    assert worker.name in here.of(Sweep)[-1].living
    assert [bytes(frame) for frame in client.results[1][1]] == [DOCUMENT, kept]
    acknowledge(client)
    here.advance(1.0)
    assert here.of(Unlink) == [Unlink(worker.name)]


def test_the_segments_of_a_worker_that_owes_nothing_go_at_once() -> None:
    here, client, (worker,), endpoint = bench().serving()
    call(client, endpoint, DOCUMENT, a_handle())
    worker.die()
    assert here.of(Unlink) == [Unlink(worker.name)]


def test_a_caller_that_is_gone_reads_nothing_any_more() -> None:
    here, _, (worker,), endpoint = bench().serving()
    other = here.client()
    call(other, endpoint, DOCUMENT, a_handle())
    reply(worker, DOCUMENT, a_handle())
    worker.die()
    here.handle_gone(other)
    here.advance(1.0)
    assert here.of(Unlink) == [Unlink(other.name), Unlink(worker.name)]


def test_a_worker_that_says_hello_again_keeps_its_segments() -> None:
    here, client, (worker,), endpoint = bench().serving()
    call(client, endpoint, DOCUMENT, a_handle())
    reply(worker, DOCUMENT, a_handle())
    worker.die()
    worker.epoch, worker.sent, worker.received, worker.fields["launch"] = 2, 0, 0, 0
    worker.hello()
    acknowledge(client)
    here.advance(1.0)
    assert here.of(Unlink) == []


def test_a_retry_is_sent_the_same_handle() -> None:
    """F2: the client's lease holds until the final reply."""
    here, client, (worker,), endpoint = bench().serving()
    call(client, endpoint, DOCUMENT, a_handle())
    worker.die()
    (again,) = revived(here)
    assert given(again) == [DOCUMENT, a_handle()]


def test_a_dead_letter_has_a_copy_of_its_arguments() -> None:
    """F4: it outlives the call, and with it the client's lease."""
    here, client, (worker,), endpoint = bench().serving()
    one = call(client, endpoint, DOCUMENT, a_handle(5))
    for _ in range(3):
        worker.die()
        (worker,) = revived(here)
    assert isinstance(client.error(one), PoisonedRequest)
    (letter,) = here.state.dead.newest_first()
    assert letter.payload == [DOCUMENT, b"xxxxx"]
    assert letter.size == len(DOCUMENT) + 5


def test_when_the_recovery_window_ends_the_segments_of_all_who_did_not_come_back_go() -> None:
    """F10."""
    here = bench(recovering=True)
    client = here.client()
    assert here.of(Sweep) == []
    here.advance(10.0)
    assert here.of(Sweep) == [Sweep(frozenset({client.name}))]


def test_a_broker_that_ends_waits_a_moment_for_results_to_be_read() -> None:
    here, client, (worker,), endpoint = bench().serving()
    call(client, endpoint, DOCUMENT, a_handle())
    reply(worker, DOCUMENT, a_handle())
    here.handle(Terminate("SIGTERM"))
    worker.say([BYE, "told to"])
    worker.die()
    assert not here.of(Exit)
    here.advance(2.0)
    assert here.of(Exit)
