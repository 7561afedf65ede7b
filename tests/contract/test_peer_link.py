"""The peer's half of a link: the table of PROTOCOL.md §4, row by row (W4)."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from forge_contract.errors import ForgeError, Overloaded, VersionMismatch
from forge_contract.framing import Envelope, Payload, decode, encode
from forge_contract.messages import BROKER_NAME, BYE, HELLO, PROBE, REFUSE, WELCOME, WHO
from forge_contract.peer_link import HELLO_AGAIN_S, LinkState, PeerLink


class Diary(PeerLink):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__("c-1", 0.0)
        self.told: list[Any] = []

    def hello_fields(self) -> dict[str, Any]:
        return {"role": "client"}

    def on_welcome(self, fields: dict[str, Any], now: float) -> None:
        self.told.append(("welcome", fields))

    def on_lost(self, now: float) -> None:
        self.told.append("lost")

    def on_refused(self, error: ForgeError, now: float) -> None:
        self.told.append(error)

    def on_envelope(self, envelope: Envelope, now: float) -> None:
        self.told += envelope.body

    def hear(self, *body: list[Any], number: int = 0, ack: int = 0, epoch: int = 1, incarnation: int = 7) -> None:
        self.receive(encode(BROKER_NAME, epoch, incarnation, number, ack, list(body)), 0.0)

    def sends(self, now: float = 0.0) -> list[Envelope]:
        return [decode(frames) for frames in self.flush(now)]


def opened() -> Diary:
    link = Diary()
    link.flush(0.0)
    link.hear([WELCOME, {"x": 1}])
    link.told.clear()
    return link


def test_it_says_hello_until_it_is_welcomed_and_keeps_what_it_has_to_say() -> None:
    """GREETING."""
    link = Diary()
    link.outbox.body.append([99])
    for now in (0.0, HELLO_AGAIN_S, 2 * HELLO_AGAIN_S):
        assert link.next_deadline() == now
        (hello,) = link.sends(now)
        assert (hello.number, hello.incarnation, hello.body) == (0, 0, [[HELLO, {"role": "client"}, []]])
        assert link.sends(now + 0.5) == []
    link.hear([WELCOME, {"x": 1}])
    assert link.told == [("welcome", {"x": 1})]
    (first,) = link.sends()
    assert (first.number, first.incarnation, first.body) == (1, 7, [[99]])
    link.hear([WELCOME, {"x": 1}])
    assert len(link.told) == 1


def test_a_hello_carries_the_payloads_that_its_fields_name_anew_each_time() -> None:
    """F10: small ones packed, large ones as frames of their own; what is held may have changed since the last hello."""

    class Holder(Diary):
        def hello_payloads(self) -> list[Payload]:
            return [b"small", [b"document", b"buffer"], str(len(self.told)).encode()]

    link = Holder()
    for held in (b"0", b"1"):
        (hello,) = link.sends(link.next_deadline() or 0.0)
        assert hello.body == [[HELLO, {"role": "client"}, [5, -2, 1]]]
        assert hello.payloads.take_all([5, -2, 1]) == [b"small", [b"document", b"buffer"], held]
        link.told.append("something")


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_refusal_closes_the_link_and_is_told(epoch: int) -> None:
    """GREETING and OPEN → CLOSED; by one that could not read our epoch, too."""
    for link in (Diary(), opened()):
        link.hear([REFUSE, "Overloaded", {"what": "x"}], epoch=epoch)
        assert link.state is LinkState.CLOSED
        assert isinstance(link.told[-1], Overloaded)
        assert link.flush(9.0) == []
        assert link.next_deadline() is None


def test_a_broker_of_another_version_is_a_refusal_in_itself() -> None:
    """PROTOCOL.md §5."""
    link = Diary()
    link.receive([msgpack.packb([2, "broker"]), b""], 0.0)
    assert link.state is LinkState.CLOSED
    assert isinstance(link.told[-1], VersionMismatch)


def test_who_begins_a_new_epoch_and_forgets_what_was_under_way() -> None:
    """OPEN → GREETING, also when a successor of another incarnation asks."""
    link = opened()
    link.outbox.body.append([99])
    link.flush(0.0)
    link.outbox.body.append([98])
    link.hear([WHO], incarnation=8)
    assert link.told == ["lost"]
    (hello,) = link.sends()
    assert (hello.epoch, hello.body[0][0]) == (2, HELLO)
    link.hear([WHO], incarnation=8)
    assert link.told == ["lost"]
    link.hear([WELCOME, {}], epoch=2, incarnation=8)
    assert link.channel.kept_bytes == 0
    assert link.sends() == []


def test_envelopes_are_told_once_and_in_order_and_strangers_not_at_all() -> None:
    """§4.1, §4.7: another epoch, another incarnation, another sender."""
    link = opened()
    link.hear([99], number=1)
    link.hear([99], number=1)
    link.hear([98], number=3)
    link.hear([97], number=2, epoch=5)
    link.hear([97], number=2, incarnation=9)
    link.receive(encode("w-evil", 1, 7, 2, 0, [[97]]), 0.0)
    link.receive([b"\xc1", b""], 0.0)
    link.hear([96], number=2)
    assert link.told == [[99], [96]]
    assert link.refused_envelopes == 4


def test_a_new_connection_is_probed_and_what_the_answer_lacks_is_sent_again() -> None:
    """§4.3: even if that answer acknowledges something new."""
    link = opened()
    for number in (1, 2, 3):
        link.outbox.body.append([90 + number])
        link.flush(0.0)
    link.reconnected(0.5)
    (probe,) = link.sends(0.5)
    assert probe.body == [[PROBE]]
    link.hear(ack=1)
    assert [(one.number, one.body) for one in link.sends(0.6)] == [(2, [[92]]), (3, [[93]])]
    link.hear(ack=1)
    assert link.sends(0.7) == []


def test_a_probe_is_answered_with_an_ack() -> None:
    """§4.3."""
    link = opened()
    link.hear([99], number=1)
    link.hear([PROBE])
    (ack,) = link.sends()
    assert (ack.number, ack.ack, ack.body) == (0, 1, [])


def test_bye_is_the_last_thing_said() -> None:
    """§4: OPEN → CLOSED."""
    link = opened()
    link.bye("done")
    (bye,) = link.sends()
    assert bye.body == [[BYE, "done"]]
    assert bye.number == 1
    link.close()
    link.hear([99], number=1)
    assert link.told == []


def test_who_after_a_goodbye_means_that_it_has_arrived_and_nobody_comes_back() -> None:
    """W4: a second hello would make the broker hold a worker whose process is about to end, and kill one that ends slowly."""
    link = opened()
    link.bye("its replica is stopped")
    assert link.sends()[-1].body[-1][0] == BYE
    link.hear([WHO])
    assert link.state is LinkState.CLOSED
    assert (link.channel.kept_bytes, link.told, link.sends()) == (0, [], [])
