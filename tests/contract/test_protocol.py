"""PROTOCOL.md against the code: the same numbers, names and operations, and examples that encode and decode (W7)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from forge_broker.core.control import _OPERATIONS  # the table of operations is the code's own list
from forge_contract import messages
from forge_contract.framing import MAX_DEPTH, MAX_MESSAGES, decode, encode

PAGE = (Path(messages.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\n((?:(?:[0-9a-f]+|-)\n)+)(\[.*\])\n```$", re.MULTILINE)
EXAMPLES = BLOCK.findall(PAGE[PAGE.index("## Examples") :])


def test_every_message_has_the_same_number_and_name_in_page_and_code() -> None:
    """W7."""
    told = {int(number): name for number, name in re.findall(r"`\[(\d+) ([A-Z]+)[,\]]", PAGE)}
    assert told == messages.NAMES


def test_every_status_is_told() -> None:
    """W7."""
    told = {name: int(number) for number, name in re.findall(r"(\d) `([A-Z]+)`", PAGE)}
    assert told == {"OK": 0, "RAISED": 1, "FAILED": 2, "DROPPED": 3, "UNTOUCHED": 4, "RETURNED": 5}
    assert all(getattr(messages, name) == number for name, number in told.items())


def test_the_operations_of_control_are_those_of_the_broker() -> None:
    """W7."""
    table = PAGE[PAGE.index("Operations of `CONTROL`") : PAGE.index("### 7.1")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")][2:]
    assert {name.strip() for row in rows for name in row.split(",")} == {"deploy", *_OPERATIONS}


def test_the_limits_of_an_envelope_are_told() -> None:
    """W7, W8."""
    assert f"more than {MAX_MESSAGES:,} messages" in PAGE
    assert f"nested deeper than {MAX_DEPTH}" in PAGE


def test_there_are_examples() -> None:
    """W7."""
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize(("hexes", "literal"), EXAMPLES)
def test_an_example_encodes_and_decodes(hexes: str, literal: str) -> None:
    """W7."""
    frames = [bytes.fromhex(line) for line in hexes.split()]
    fields = ast.literal_eval(literal)
    sender, epoch, incarnation, number, ack, body, packed = fields
    assert encode(sender, epoch, incarnation, number, ack, body, packed, frames[1:]) == frames
    envelope = decode(frames)
    assert [*envelope[:6], packed] == fields
    for message in envelope.body:
        sizes = {messages.CALLS: 3, messages.DISPATCH: 6, messages.REPLIES: 5}.get(message[0])
        if sizes is not None:
            envelope.payloads.take_all(message[sizes])
    envelope.payloads.close()
