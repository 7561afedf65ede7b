"""Where a broker is looked for, and which addresses are beyond this machine. Pure: the environment comes as a mapping;
whether a directory is private is for the shell that is about to use it to check."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from forge_contract.errors import ConfigError

# What may be under way in a unix socket, from its writer; both ends ask for it. The kernel wakes a writer that had to wait once three
# quarters of that are read. With Linux's 208 KiB the reader is through with the rest before the writer has begun, and the two copy in
# turns; from twice that on they copy at the same time (16 MiB there and back: 12 % less time). 8 MiB are slower again: they do not fit
# into the caches. Where the kernel allows less (net.core.wmem_max, 208 KiB unless set) it gives twice that.
SEND_BUFFER_BYTES: Final = 512 << 10


def private_directory(environ: Mapping[str, str], uid: int) -> PurePosixPath:
    """The user's own directory for sockets and logs: mode 0700, under XDG_RUNTIME_DIR, or /tmp where there is none."""
    runtime = environ.get("XDG_RUNTIME_DIR")
    return PurePosixPath(runtime) / "forge" if runtime else PurePosixPath(f"/tmp/forge-{uid}")  # noqa: S108  # made 0700 and checked before it is trusted


def default_address(environ: Mapping[str, str], uid: int) -> str:
    """The user's own broker: FORGE_BROKER if set, else the socket in the private directory."""
    return environ.get("FORGE_BROKER") or f"ipc://{private_directory(environ, uid)}/broker.sock"


def ipc_path(address: str) -> PurePosixPath | None:
    """The path of an ipc address, None for others."""
    return PurePosixPath(address.removeprefix("ipc://")) if address.startswith("ipc://") else None


def check_address(address: str, field: str = "address") -> None:
    """Raises ConfigError when this is no address of ours."""
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        # sun_path is 108 bytes; a longer one fails inside libzmq with a message about nothing in particular.
        if len(address) - len("ipc://") > 107:
            raise ConfigError(where=field, message=f"{address!r} is over 107 bytes long, the limit of a socket's path")
        return
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if (
        address.startswith("tcp://")
        and colon
        and host
        and (port == "*" or (port.isdecimal() and port.isascii() and int(port[:6]) < 65536))
    ):
        return
    raise ConfigError(where=field, message=f"{address!r} is neither tcp://host:port nor ipc:///path")


def read_http(address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8266`, `localhost:8266`, `[::1]:8266`. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if (
        colon
        and host.strip("[]")
        and (":" not in host or bracketed)
        and "/" not in host
        and port.isdecimal()
        and port.isascii()
        and int(port[:6]) < 65536
    ):
        return host.strip("[]"), int(port)
    raise ConfigError(where="http", message=f"{address!r} is not host:port, such as 127.0.0.1:8266")


def is_loopback(address: str) -> bool:
    """True when a bind of this address cannot be reached from another machine."""
    if address.startswith("ipc://"):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name or an interface: who can tell
