"""The arguments of many calls, quickly: what `decode_call` would say, for those that are small and plain, as most are.

`bursts` and `batches` read one call after another with it. Half of what decoding such a call costs is the asking of what it
is; here it is asked once, for the common answer, and all others are `decode_call`'s to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgpack

from forge_contract.framing import Payload
from forge_contract.payload import decode_call
from forge_contract.payload_core import CHECK_FROM, Decoder

_HOOKS: Final = {trusted: Decoder(trusted).extension for trusted in (False, True)}
_unpack = msgpack.unpackb


def read_call(document: Payload, trusted: bool) -> tuple[Sequence[Any], dict[str, Any]]:
    """Positional arguments and keywords. Raises as `decode_call` does."""
    if type(document) is bytes and len(document) <= CHECK_FROM:
        try:
            call = _unpack(document, ext_hook=_HOOKS[trusted], strict_map_key=False)
            args, kwargs = call
        except Exception:
            return decode_call(document, trusted=trusted)  # it knows what to call it
        if not kwargs and type(call) is list and type(args) is list and type(kwargs) is dict:
            return args, kwargs
    return decode_call(document, trusted=trusted)
