"""A reinforcement-learning loop: a small policy learns to add two digits from rewards alone.

    Policy        service, 2 replicas    answers a sum, several times (a group), and tells how likely each answer was
    Reference     service                how likely the untrained policy was to say the same: keeps the policy near it (KL)
    Reward        service                1.0 for the right answer, 0.0 for any other
    ReplayBuffer  actor                  episodes waiting to be trained on; hands none out that is too old
    Trainer       actor                  holds the handles of the buffer and of the policy: takes a batch, makes a step,
                                         and pushes the new weights to every replica by `fanout`

Rollouts and training run at the same time: while the trainer makes a step, the replicas answer with the weights they have,
and the buffer's `MAX_AGE` says how far these may lag. The step is GRPO's: an answer's advantage is how much better it did than
its group, the ratio to the policy that gave the answer is clipped, and the KL to the reference is a penalty.

    python examples/rl.py            # about a minute on two cores
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forge_client import ActorHandle, ForgeActor, LeastLoadedRouter, Service, endpoint, service_endpoint, shutdown

SUMS = 19  # 0 … 18
GROUP = 16  # answers to one question: a beginner's chance that at least one of them is right is above one half
BATCH = 32  # episodes per training step
ROLLOUTS = 32  # questions under way at once
MAX_AGE = 2  # versions an episode's weights may be behind those that are trained
CAPACITY = 2 * BATCH  # episodes; who would add more waits, which keeps rollouts in step with training
LEARNING_RATE = 1e-2
CLIP = 0.2
KL_WEIGHT = 0.01


def make_policy() -> nn.Sequential:
    """Two digits, one-hot, in; the logits of the sums out."""
    return nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, SUMS))


def logprobs_of(model: nn.Module, questions: Tensor) -> Tensor:
    """questions: (n, 2), digits. The log-probability of each sum: (n, SUMS)."""
    inputs = nn.functional.one_hot(questions, 10).flatten(start_dim=1).float()
    logits: Tensor = model(inputs)
    return logits.log_softmax(dim=1)


ALL_QUESTIONS = torch.cartesian_prod(torch.arange(10), torch.arange(10))


@dataclass
class Episode:
    """One question and a group of answers to it. All but the question: one value for each answer."""

    question: tuple[int, int]
    answers: Tensor
    logprobs: Tensor  # under the weights that gave the answers
    reference: Tensor  # under the reference's
    rewards: list[float]
    version: int  # of the weights that gave the answers


class Policy(ForgeActor):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        torch.set_num_threads(1)
        torch.seed()  # or all replicas would roll the same dice
        self.model = make_policy()
        self.model.load_state_dict(weights)
        self.version = 0

    @service_endpoint(router=LeastLoadedRouter())
    async def answer(self, question: tuple[int, int], times: int) -> tuple[Tensor, Tensor, int]:
        """Sampled answers (times,), their log-probabilities (times,), and the version of the weights."""
        with torch.inference_mode():
            logprobs = logprobs_of(self.model, torch.tensor([question]))[0]
            answers = torch.multinomial(logprobs.exp(), times, replacement=True)
        return answers, logprobs[answers], self.version

    @endpoint
    async def update(self, version: int, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)
        self.version = version

    @endpoint
    async def at_version(self) -> int:
        return self.version

    @endpoint
    async def accuracy(self) -> float:
        """Of all 100 questions, the share whose likeliest answer is right."""
        with torch.inference_mode():
            best = logprobs_of(self.model, ALL_QUESTIONS).argmax(dim=1)
        return float((best == ALL_QUESTIONS.sum(dim=1)).float().mean())


class Reference(ForgeActor):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        torch.set_num_threads(1)
        self.model = make_policy()
        self.model.load_state_dict(weights)

    @endpoint
    async def logprobs(self, question: tuple[int, int], answers: Tensor) -> Tensor:
        with torch.inference_mode():
            return logprobs_of(self.model, torch.tensor([question]))[0][answers]


class Reward(ForgeActor):
    @endpoint
    async def judge(self, question: tuple[int, int], answers: list[int]) -> list[float]:
        return [float(answer == sum(question)) for answer in answers]


class ReplayBuffer(ForgeActor):
    # Calls that wait for room take a place each. With as many places as rollouts they could keep `sample` out for ever.
    replica_max_concurrent_requests = ROLLOUTS + 8

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.episodes: deque[Episode] = deque()
        self.changed = asyncio.Condition()
        self.too_old = 0

    @endpoint
    async def add(self, episode: Episode) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.episodes) < self.capacity)
            self.episodes.append(episode)
            self.changed.notify_all()

    @endpoint
    async def sample(self, count: int, version: int, max_age: int) -> list[Episode]:
        """`count` episodes that are at most `max_age` versions old; waits until there are as many."""
        async with self.changed:
            while True:
                fresh = [one for one in self.episodes if version - one.version <= max_age]
                self.too_old += len(self.episodes) - len(fresh)
                taken, left = fresh[:count], fresh[count:]
                enough = len(taken) == count
                self.episodes = deque(left if enough else fresh)
                self.changed.notify_all()
                if enough:
                    return taken
                await self.changed.wait()

    @endpoint
    async def dropped(self) -> int:
        return self.too_old


class Trainer(ForgeActor):
    """Handles are values: this actor calls the buffer and the policy itself, wherever they run."""

    def __init__(self, weights: dict[str, Tensor], buffer: ActorHandle, policy: Service) -> None:
        torch.set_num_threads(1)
        self.model = make_policy()
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.buffer, self.policy = buffer, policy
        self.version = 0

    @endpoint
    async def step(self) -> dict[str, float]:
        """One batch, one step, the new weights to every replica. What came of it, for the table."""
        episodes = await self.buffer.sample.call_one(BATCH, self.version, MAX_AGE)
        age = sum(self.version - episode.version for episode in episodes) / len(episodes)
        loss, kl, reward = self.learn(episodes)
        self.version += 1
        await self.policy.update.fanout(self.version, self.model.state_dict())
        return {"loss": loss, "kl": kl, "reward": reward, "age": age}

    def learn(self, episodes: list[Episode]) -> tuple[float, float, float]:
        answers = torch.stack([episode.answers for episode in episodes])
        then = torch.stack([episode.logprobs for episode in episodes])
        reference = torch.stack([episode.reference for episode in episodes])
        rewards = torch.tensor([episode.rewards for episode in episodes])
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)

        now = logprobs_of(self.model, torch.tensor([episode.question for episode in episodes])).gather(1, answers)
        ratio = (now - then).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        kl = ((reference - now).exp() - (reference - now) - 1).mean()
        loss = KL_WEIGHT * kl - gain
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item(), kl.item(), rewards.mean().item()


async def roll_out(
    policy: Service, reference: Service, reward: Service, buffer: ActorHandle, chance: random.Random
) -> None:
    """Ask, judge, store, for as long as we are let."""
    while True:
        question = (chance.randrange(10), chance.randrange(10))
        answers, logprobs, version = await policy.answer.route(question, GROUP)
        likely, rewards = await asyncio.gather(
            reference.logprobs.route(question, answers), reward.judge.route(question, answers.tolist())
        )
        await buffer.add.call_one(Episode(question, answers, logprobs, likely, rewards, version))


async def train(trainer: ActorHandle, policy: Service, steps: int, every: int) -> None:
    """Make the steps and print the table: means over the steps since the line before."""
    print(" step   reward  accuracy     loss      kl   age   seconds")
    print(f"{0:5}        –  {await policy.accuracy.route():8.0%}        –       –     –         –")
    began = time.perf_counter()
    reports: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        reports.append(await trainer.step.call_one())
        if step % every == 0 or step == steps:
            mean = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
            print(
                f"{step:5}  {mean['reward']:7.3f}  {await policy.accuracy.route():8.0%}  {mean['loss']:+7.3f}  "
                f"{mean['kl']:6.3f}  {mean['age']:4.1f}  {time.perf_counter() - began:8.1f}",
                flush=True,
            )
            reports.clear()


async def main(steps: int, every: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weights = make_policy().state_dict()
    policy, reference, reward, buffer = await asyncio.gather(
        Policy.options(num_replicas=2).as_service(weights),
        Reference.as_service(weights),
        Reward.as_service(),
        ReplayBuffer.as_actor(CAPACITY),
    )
    trainer = await Trainer.as_actor(weights, buffer, policy)

    async with asyncio.TaskGroup() as tasks:
        rollouts = [
            tasks.create_task(roll_out(policy, reference, reward, buffer, random.Random(seed)))
            for seed in range(ROLLOUTS)
        ]
        await train(trainer, policy, steps, every)
        for rollout in rollouts:
            rollout.cancel()

    summary = await policy.get_metrics_summary()
    answered = {idx: figures["successful_requests"] for idx, figures in summary["replicas"].items()}
    print(f"weights on the replicas: versions {await policy.at_version.fanout()}; calls answered by each: {answered}")
    print(f"episodes dropped as too old: {await buffer.dropped.call_one()}")
    a, b = 7, 8
    answers, _, _ = await policy.answer.route((a, b), 5)
    print(f"{a} + {b} = {', '.join(str(int(answer)) for answer in answers)}")
    await shutdown()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="A policy learns to add digits by reinforcement.")
    options.add_argument("--steps", type=int, default=240)
    options.add_argument("--every", type=int, default=20, help="steps between two lines of the table")
    options.add_argument("--quick", action="store_true", help="6 steps, a line for every second")
    chosen = options.parse_args()
    asyncio.run(main(6, 2) if chosen.quick else main(chosen.steps, chosen.every))
