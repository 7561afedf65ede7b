"""Four ranks that act as one: data-parallel least squares over gloo, on scikit-learn's handwritten digits.

One actor of `procs=4` is four processes. Forge sets RANK, WORLD_SIZE and a rendezvous (MASTER_ADDR, MASTER_PORT), so
`torch.distributed.init_process_group` works in `setup` as it does under torchrun. A call reaches every rank, in the same order
on all, and its answers come back as a ValueMesh.

Each rank keeps its quarter of the images. The least-squares fit needs only two sums over all images, AᵀA and AᵀY, so
each rank adds up its own and one all-reduce gives everybody the whole; then all solve the same small system.

    python examples/mesh.py
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor

from forge_client import ForgeActor, ValueMesh, endpoint, shutdown

RIDGE = 1e-2  # some pixels are black in every image; without it AᵀA would have no inverse


class LeastSquares(ForgeActor):
    """One rank. `images`: (n, 64), `labels`: (n,), the same on every rank; each keeps every world-th row from its own on."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        torch.set_num_threads(1)
        self.images, self.labels = images, labels

    async def setup(self) -> None:
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        mine = slice(self.rank, None, self.world)
        ones = torch.ones(len(self.labels), 1, dtype=torch.float64)
        self.inputs = torch.cat([self.images.double(), ones], dim=1)[mine]
        self.labels = self.labels[mine]

    async def teardown(self) -> None:
        dist.destroy_process_group()

    @endpoint
    def fit(self) -> dict[str, Any]:
        """Solve for the weights of all ranks' images together. Every rank arrives at the same ones."""
        targets = torch.nn.functional.one_hot(self.labels, 10).double()
        gram, moments = self.inputs.T @ self.inputs, self.inputs.T @ targets
        dist.all_reduce(gram)
        dist.all_reduce(moments)
        self.weights = torch.linalg.solve(gram + RIDGE * torch.eye(len(gram), dtype=torch.float64), moments)
        return {"images": len(self.labels), "norm": round(float(self.weights.norm()), 6)}

    @endpoint
    def accuracy(self) -> float:
        """Of this rank's images, the share that is read rightly."""
        return float(((self.inputs @ self.weights).argmax(dim=1) == self.labels).double().mean())

    @endpoint
    def mean_image(self) -> Tensor:
        """The mean image over all ranks: (64,). An all-reduce of the sums, and of how many there are."""
        total = torch.cat([self.inputs[:, :64].sum(dim=0), torch.tensor([len(self.inputs)], dtype=torch.float64)])
        dist.all_reduce(total)
        return total[:64] / total[64]


async def main(procs: int) -> None:
    data = load_digits()
    images, labels = torch.from_numpy(data.data).float() / 16.0, torch.from_numpy(data.target)
    actor = await LeastSquares.options(procs=procs).as_actor(images, labels)

    fits: ValueMesh[dict[str, Any]] = await actor.fit.call()
    accuracies: ValueMesh[float] = await actor.accuracy.call()
    print(f"sizes {fits.sizes}")
    for point, fitted in fits.items():
        print(
            f"rank {point.rank}: {fitted['images']} images, |weights| {fitted['norm']}, "
            f"accuracy on its own {accuracies.item(procs=point['procs']):.1%}"
        )
    same = len({fitted["norm"] for fitted in fits.values()}) == 1
    shares = [fitted["images"] / len(labels) for fitted in fits.values()]
    whole = sum(share * value for share, value in zip(shares, accuracies.values(), strict=True))
    print(f"accuracy on all {len(labels)} images {whole:.1%}; every rank has the same weights: {same}")
    print(accuracies)

    means: ValueMesh[Tensor] = await actor.mean_image.call()
    off = max(float((mean - images.double().mean(dim=0)).abs().max()) for mean in means.values())
    print(f"mean image by all-reduce against the mean taken here: largest difference {off:.1e}")

    await actor.shutdown()
    await shutdown()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Data-parallel least squares over the ranks of one actor.")
    options.add_argument("--procs", type=int, default=4)
    asyncio.run(main(options.parse_args().procs))
