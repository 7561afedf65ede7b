"""`python -m forge_broker --serve JSON`: how a client starts its embedded broker.

One line of JSON goes to stdout when the broker is bound: `{"addresses": […]}`, or `{"error": [code, fields]}`. stdin is the
owner's pipe: its end is the owner's end, however that came, and the broker then stops all it runs and exits.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from forge_broker.shell.serve import serve
from forge_broker.shell.settings import load
from forge_contract.errors import ForgeError


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "--serve":
        sys.stderr.write("usage: python -m forge_broker --serve JSON   (people use `forge broker start`)\n")
        return 2
    try:
        config = load(json.loads(arguments[1]), os.environ)
        owner = sys.stdin.fileno() if config.embedded else None
        level = os.environ.get("FORGE_LOG_LEVEL", "warning" if config.embedded else "info")
        return serve(config, lambda addresses: _say({"addresses": addresses}), owner=owner, log_level=level)
    except ForgeError as error:
        _say({"error": error.to_wire()})
        return 2


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
