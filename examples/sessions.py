"""Conversations with a bot that remembers: sticky sessions, each living on one of two replicas.

The bot is a trigram model of this repository's own documents: it continues what one says, word by word. What is said in a
conversation is counted too, in tables that belong to that conversation alone and weigh more than the documents. They lie
in the memory of one replica, so every call of a session has to come to the same one; the broker sees to that.

    python examples/sessions.py
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

from forge_client import ForgeActor, Service, current_session, endpoint, shutdown

ROOT = Path(__file__).resolve().parent.parent
WORD = re.compile(r"[A-Za-z0-9'’_-]+|[.,;:?!]")
OWN_WEIGHT = 50  # what was said here against what the documents say: memory wins whenever it has anything to say

CONVERSATIONS = {
    "Ada": [
        "My replica is called Bertha, and my model reads digits.",
        "The broker",
        "My replica is called",
        "My model",
    ],
    "Grace": ["My replica is called Hopper. It never sleeps.", "A worker is", "My replica is called", "It never"],
    "Linus": ["The best queue is an empty one.", "What happens when a replica", "The best queue is"],
    "Edsger": ["Every request has exactly one holder, says the table.", "A session", "Every request has exactly one"],
}


def documents() -> list[str]:
    """The repository's own prose: its Markdown files without code blocks."""
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("forge_contract/*.md")])
    return [re.sub(r"```.*?```|\|.*?\n", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL) for path in paths]


class Trigrams:
    """How often which word followed which two."""

    def __init__(self) -> None:
        self.after: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)

    def learn(self, words: list[str]) -> None:
        for at, word in enumerate(words):
            for length in (1, 2):
                if at >= length:
                    self.after[tuple(one.lower() for one in words[at - length : at])][word] += 1


class Bot(ForgeActor):
    """Continues what one says. A session's memory is a plain dictionary entry under `current_session()`."""

    def __init__(self, texts: list[str] | None = None) -> None:
        self.model = Trigrams()
        for text in documents() if texts is None else texts:
            self.model.learn(WORD.findall(text))
        self.memories: dict[str, Trigrams] = {}  # of the sessions that live here
        self.turns: Counter[str] = Counter()

    @endpoint
    async def say(self, text: str, most_words: int = 12) -> tuple[str, int, int]:
        """What follows after `text`, which turn of the conversation this is, and the bot's process.

        Outside of a session nothing is remembered, and every turn is the first.
        """
        session = current_session()
        memory = self.memories.setdefault(session, Trigrams()) if session else Trigrams()
        said = WORD.findall(text)
        memory.learn(said)
        turn = 1
        if session:
            self.turns[session] += 1
            turn = self.turns[session]
        answer: list[str] = []
        while len(answer) < most_words and (word := self._next([*said, *answer], memory)):
            answer.append(word)
            if word in ".?!":
                break
        return re.sub(r" (?=[.,;:?!])", "", " ".join(answer)), turn, os.getpid()

    def _next(self, words: list[str], memory: Trigrams) -> str | None:
        """The word seen most often after the last two, else after the last one; this conversation before the documents."""
        for length in (2, 1):
            context = tuple(one.lower() for one in words[-length:])
            seen: Counter[str] = Counter(self.model.after.get(context, {}))
            for word, count in memory.after.get(context, {}).items():
                seen[word] += OWN_WEIGHT * count
            # One that repeats the last words would go round in circles.
            fresh = {word: count for word, count in seen.items() if word not in words[-6:]}
            if fresh:
                return min(fresh, key=lambda word: (-fresh[word], word))
        return None


async def converse(bot: Service, name: str, lines: list[str]) -> tuple[str, list[str]]:
    """One client's conversation: its session's id, and what was said."""
    told: list[str] = []
    async with bot.session() as session:
        pids = set()
        for line in lines:
            answer, turn, pid = await bot.say.route(line)
            pids.add(pid)
            told.append(f"  {name + ':':8} {line}\n  {'bot:':8} … {answer}   [turn {turn}]")
        where = (await bot.state())["session_replica_map"][session.session_id]
        told.insert(0, f"{name}, session {session.session_id}, lives on replica {where} (process {pids.pop()})")
        if pids:
            raise RuntimeError(f"the session moved: it was seen in the processes {pids}, too")
        return session.session_id, told


async def main(replicas: int) -> None:
    bot = await Bot.options(num_replicas=replicas).as_service(documents())
    conversations = await asyncio.gather(*(converse(bot, name, lines) for name, lines in CONVERSATIONS.items()))
    for _, told in conversations:
        print("\n".join(told), end="\n\n")

    state = await bot.state()
    print(f"{len(conversations)} conversations on {replicas} replicas; {state['sessions']} sessions open now")
    for replica in state["replicas"]:
        print(f"replica {replica['idx']}: {replica['total_requests']} turns")

    await bot.shutdown()
    await shutdown()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Four people talk to a bot that remembers each of them.")
    options.add_argument("--replicas", type=int, default=2)
    asyncio.run(main(options.parse_args().replicas))
