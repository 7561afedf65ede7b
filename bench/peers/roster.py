"""Who is compared: each peer's file, what it needs installed, and what its calls go through."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Peer:
    name: str  # in the table
    module: str  # its file, which its environment's interpreter runs
    requires: tuple[str, ...]  # for pip
    through: str  # what a call goes through, for the notes below the table
    constraints: Path | None = None

    @property
    def short(self) -> str:
        """What it is called on the command line; the folder of its environment, too."""
        return self.module.rpartition(".")[2]


PEERS: Final = (
    Peer(
        "Forge broker",
        "bench.peers.forge",
        ("-e", f"{ROOT}[uvloop]", "numpy"),
        "a broker process, ipc; `replica_max_concurrent_requests=1024`",
        ROOT / "constraints.txt",
    ),
    Peer(
        "pyzmq, Majordomo style",
        "bench.peers.majordomo",
        ("pyzmq>=27", "uvloop", "numpy"),
        "a broker process in Python, ipc, one message per call; credit 64, no ledger, no recovery",
    ),
    Peer(
        "Ray Serve, handle",
        "bench.peers.ray_serve",
        ("ray[serve]>=2.60", "uvloop", "numpy"),
        "Ray's router in the caller; `RAY_SERVE_THROUGHPUT_OPTIMIZED=1`, `max_ongoing_requests=1024`",
    ),
    Peer(
        "Ray core, actors",
        "bench.peers.ray_core",
        ("ray>=2.60", "uvloop", "numpy"),
        "nothing: the caller takes the actors in turn; plain methods, each reference awaited",
    ),
    Peer(
        "mosec",
        "bench.peers.mosec_http",
        ("mosec>=0.9.8", "httptools", "uvloop", "numpy"),
        "HTTP on loopback, a server in Rust; raw bytes, kept-alive connections, a client of asyncio and httptools",
    ),
    Peer(
        "LitServe",
        "bench.peers.litserve_http",
        ("litserve>=0.2.19", "httptools", "uvloop", "numpy"),
        "HTTP on loopback, uvicorn with uvloop and httptools; raw bytes, the same client",
    ),
    Peer(
        "ipyparallel",
        "bench.peers.ipyparallel_view",
        ("ipyparallel>=9.2", "uvloop", "numpy"),
        "a controller; direct views, the engines in turn",
    ),
)
