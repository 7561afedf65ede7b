"""The numbers and names on the wire. PROTOCOL.md says what each message means; this page is its table in Python.

Nothing here encodes or decodes: `framing` turns envelopes into frames, `broker`, `forge_client.link` and
`forge_worker.link` hold the conversations. Messages are plain lists, `[type, …]`, because they are made and read on
the hot path; a class per message would cost more than the rest of the work on it.
"""

from __future__ import annotations

from typing import Any, Final

VERSION: Final = 1
BROKER_NAME: Final = "broker"

# Links and hello: unnumbered but BYE.
HELLO: Final = 1
WELCOME: Final = 2
WHO: Final = 3
REFUSE: Final = 4
HEARTBEAT: Final = 5
PROBE: Final = 6
BYE: Final = 7

# Client to broker.
CALLS: Final = 16
FANOUT: Final = 17
CANCEL: Final = 18
CONTROL: Final = 19

# Broker to client.
RESULTS: Final = 24
PARTS: Final = 25
ANSWER: Final = 26
NOTICE: Final = 27

# Broker to worker.
ASSIGN: Final = 32
BEGIN: Final = 33
DISPATCH: Final = 34
DROP: Final = 35
STOP: Final = 36
SETTLED: Final = 37
REPLAY: Final = 38
IMPORT: Final = 39
FORGET: Final = 40
RESIZED: Final = 41
WARM: Final = 42
RECALL: Final = 43

# Worker to broker.
MASTER: Final = 48
READY: Final = 49
UNREADY: Final = 50
REPLIES: Final = 51
STATES: Final = 52
WARMED: Final = 53

# How a call ended.
OK: Final = 0  # the payload is the value
RAISED: Final = 1  # the payload is a user's exception
FAILED: Final = 2  # the payload is msgpack [code, fields] of one of our errors
DROPPED: Final = 3  # worker to broker: it was cancelled and has ended
UNTOUCHED: Final = 4  # worker to broker: not started, given back by one that leaves
RETURNED: Final = 5  # worker to broker: not started, given back because it was called back

NAMES: Final[dict[int, str]] = {
    number: name
    for name, number in sorted(globals().items())
    if name.isupper()
    and isinstance(number, int)
    and name not in {"VERSION", "OK", "RAISED", "FAILED", "DROPPED", "UNTOUCHED", "RETURNED"}
}

SEQUENCE_BITS: Final = 40
CLIENT_BITS: Final = 24
SEQUENCE_MASK: Final = (1 << SEQUENCE_BITS) - 1

Message = list[Any]


def request_id(client: int, sequence: int) -> int:
    return client << SEQUENCE_BITS | sequence


def client_of(request: int) -> int:
    return request >> SEQUENCE_BITS


def sequence_of(request: int) -> int:
    return request & SEQUENCE_MASK


def show_request(request: int) -> str:
    """A request id as people see it: `1a2b3c-17`."""
    return f"{request >> SEQUENCE_BITS:06x}-{request & SEQUENCE_MASK}"


def read_request(text: str) -> int | None:
    """The request id behind what `show_request` wrote; None when the text is no request id."""
    client, dash, sequence = text.partition("-")
    try:
        return request_id(int(client, 16), int(sequence)) if dash else None
    except ValueError:
        return None


def column(values: list[Any]) -> Any:
    """A column in its shortest form: one value when all are equal, the list otherwise (PROTOCOL.md §2)."""
    first = values[0]
    # Where some differ, first and last nearly always do.
    alike = first == values[-1] and values.count(first) == len(values)
    return first if alike and not isinstance(first, list) else values


def spread(values: Any, count: int) -> list[Any]:
    """The items of a column, `count` of them."""
    return values if isinstance(values, list) else [values] * count
