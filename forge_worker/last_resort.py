"""How a worker ends that cannot go on: at once, and by itself (design §7, F1).

A process that lives but answers nothing is worse than a dead one: its heartbeat, from a thread of its own, would go on
saying that it is merely busy, and its callers would wait for ever. A death the kernel reports within milliseconds, and
the calls run elsewhere.
"""

from __future__ import annotations

import os
import traceback
from typing import Final, NoReturn

EXIT_INTERNAL: Final = 70  # EX_SOFTWARE


def give_up(error: BaseException) -> NoReturn:
    """End the process with exit code 70, saying why on stderr as far as there is memory and a descriptor left to say it."""
    try:
        text = "".join(traceback.format_exception(error))
        os.write(2, f"forge_worker: the worker cannot go on and ends now\n{text}".encode(errors="backslashreplace"))
    finally:
        os._exit(EXIT_INTERNAL)
