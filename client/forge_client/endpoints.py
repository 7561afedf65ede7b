"""What `service.predict` and `actor.step` are: the ways of calling an endpoint (A4, A6, A7).

The first steps of a call's life are here: judge the arguments, encode them at once (what the caller changes later does not
travel), and give them to the client's link. `route` and its like are plain functions that return the future:
no coroutine, no task in between. A handle that is not bound yet keeps the encoded call until it is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from forge_client.batching import NOTHING_SAID, Batching, Said
from forge_client.call import Call, Waiter
from forge_client.outgoing import Extras
from forge_client.replies import FanoutReader, MeshReader, Reader
from forge_client.session import active_sessions, session_of
from forge_contract.config import field_names
from forge_contract.errors import BadCall, ConfigError, SerializationError, did_you_mean
from forge_contract.framing import Payload
from forge_contract.payload import encode_call, encode_plain_call

if TYPE_CHECKING:
    from forge_client.binding import Binding, Target
    from forge_client.handle import Handle

_log = logging.getLogger("forge_client")
_now = time.monotonic

Answer = asyncio.Future[Any]


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What `endpoint.options(…)` takes."""

    timeout: float | None = None  # seconds for the whole call, waiting included; None: the endpoint's own
    priority: int = 0  # −100 … 100, higher first
    hints: dict[str, Any] | None = None  # for the router
    return_exceptions: bool = False  # of a fan-out: errors stand in the list

    def __post_init__(self) -> None:
        problems = []
        timeout: object = self.timeout
        hints: object = self.hints
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            problems.append(f"timeout must be above 0 seconds, not {timeout!r}")
        if type(self.priority) is not int or not -100 <= self.priority <= 100:
            problems.append(f"priority must be a whole number from -100 to 100, not {self.priority!r}")
        if hints is not None and not isinstance(hints, dict):
            problems.append(f"hints must be a dict, not {hints!r:.80}")
        if problems:
            raise ConfigError(where="options()", problems=problems)

    def replace(self, **options: Any) -> Self:
        known = field_names(type(self))
        unknown = [f"unknown option {name!r}{did_you_mean(name, known, '; ')}" for name in options if name not in known]
        if unknown:
            raise ConfigError(where="options()", problems=[*unknown, "the known ones are " + ", ".join(sorted(known))])
        return replace(self, **options)


class _Endpoint:
    """An endpoint of a handle, with options. Bound to its target at first use."""

    def __init__(self, handle: Handle, name: str, options: CallOptions) -> None:
        self._handle = handle
        self._name = name
        self._options = options
        self._target: Target | None = None
        self._timeout: float | None = None
        self._plain = False
        self._batching: Batching | None = None  # of one that batches

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._label}>"

    @property
    def _label(self) -> str:
        return f"{self._handle.name}.{self._name}"

    def options(self, **options: Any) -> Self:
        """The same endpoint with options for its calls: timeout (seconds), priority, hints, return_exceptions.

        Raises ConfigError for an unknown one. A batch method's or router's options belong to the class.
        """
        return type(self)(self._handle, self._name, self._options.replace(**options))

    def _take(self, binding: Binding) -> Target:
        """Everything a call needs, worked out once."""
        options = self._options
        target = binding.targets[self._name]
        self._timeout = target.timeout if options.timeout is None else options.timeout
        self._plain = self._timeout is None and not options.priority and options.hints is None
        self._batching = self._handle.batching(target)
        self._learn(binding, target)
        self._target = target
        return target

    def _learn(self, binding: Binding, target: Target) -> None:
        raise NotImplementedError

    def _bound(self) -> Target | None:
        """None while the handle is not bound. Raises when its service is over."""
        binding = self._handle.binding_or_none()
        return self._take(binding) if binding is not None else None

    def _encode(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Payload:
        """Raises BadCall, SerializationError, PayloadTooLarge; or why the service is over."""
        if target.binding.over is not None:
            raise target.binding.over()
        if kwargs or not target.least <= len(args) <= target.most:
            target.matcher.check(target.label, args, kwargs)
        link = target.client.link
        payload = encode_call(args, kwargs, trusted=link.trusted, where=target.label)
        if type(payload) is list or len(payload) > link.max_payload_bytes:
            return target.client.own(payload, target.label, share=not target.replay_last)
        return payload

    def _extras(self, rank: int | None, said: Said = NOTHING_SAID) -> Extras | None:
        if self._plain and rank is None and said.key is None and said.weight is None:
            return None
        deadline = None if self._timeout is None else _now() + self._timeout
        return Extras(deadline, self._options.priority, self._options.hints, rank, said.key, said.weight)

    def _say(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Said:
        """What the broker has to know to batch this call. Raises BadCall. Needs a bound endpoint."""
        return NOTHING_SAID if self._batching is None else self._batching.said(args, kwargs)

    def _submit(
        self,
        target: Target,
        waiter: Waiter,
        payload: Payload,
        session: str | None,
        order: Any,
        rank: int | None = None,
        said: Said = NOTHING_SAID,
    ) -> None:
        client = target.client
        extras = self._extras(rank, said)
        seq = client.link.submit(target.id, payload, waiter, extras, order, said.shape, session)
        if extras is not None and extras.deadline is not None and self._timeout is not None:
            client.guard(seq, extras.deadline, self._timeout)
        if session is not None:
            target.binding.unused.discard(session)
        client.touch()

    def _later(
        self,
        send: Callable[[Target, Call, Payload], None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call:
        """A call of a handle that is not bound yet: judged and encoded now, sent when it is."""
        label = self._label
        matcher = self._handle.matcher(self._name)
        if matcher is not None:
            matcher.check(label, args, kwargs)
        refusal: SerializationError | None = None
        try:
            payload = encode_call(args, kwargs, trusted=False, where=label)
        except SerializationError as error:
            # Whether we are trusted is not known before we are connected. Values that travel in any case were
            # encoded without; the others are pickled now, and sent if it turns out that they may be.
            refusal = error
            payload = encode_call(args, kwargs, trusted=True, where=label)

        def submit(call: Call, binding: Binding) -> None:
            target = self._take(binding)
            if refusal is not None and not target.client.trusted:
                raise refusal
            target.client.watch(call)
            send(target, call, target.client.own(payload, label, share=not target.replay_last))

        return self._handle.later(submit)


def _quick_route(
    target: Target, reader: Reader, in_calls: bool
) -> Callable[[tuple[Any, ...], str | None], Call | None]:
    """`route` for most calls: by position, with plain arguments that fit, no options. Any other gives None, with nothing done, and goes
    the long way, where everything is asked. A function with all it needs at hand, because half of what a call costs the client is
    Python's steps from here to the columns. `in_calls`: the shapes of calls matter (B2).
    """
    client, binding, endpoint = target.client, target.binding, target.id
    least, most = target.least, target.most
    link, submit, new_future = client.link, client.link.submit, client.loop.create_future
    when_done, context, unused = client.when_done, client.context, binding.unused

    def route(args: tuple[Any, ...], session: str | None) -> Call | None:
        if binding.over is not None or not least <= len(args) <= most:
            return None
        payload = encode_plain_call(args)
        if payload is None or len(payload) > link.max_payload_bytes:
            return None
        call: Call = new_future()
        call.add_done_callback(when_done, context=context)  # as `Client.new_call`
        if session is not None:
            submit(endpoint, payload, (call, reader), None, None, len(args) if in_calls else 0, session)
            if unused:
                unused.discard(session)
        elif in_calls:
            submit(endpoint, payload, (call, reader), None, None, len(args))
        else:
            submit(endpoint, payload, (call, reader))
        if not client.flush_due:
            client.touch()
        return call

    return route


class ServiceEndpoint(_Endpoint):
    """An endpoint of a service: `route` and `fanout`."""

    _reader: Reader
    _fan_reader: FanoutReader
    _quick: Callable[[tuple[Any, ...], str | None], Call | None] | None = (
        None  # `route` of what is quickly said, once bound
    )

    def _learn(self, binding: Binding, target: Target) -> None:
        how: dict[str, Any] = {
            "errors_return": binding.errors_return,
            "return_first": binding.return_first,
            "sizes": binding.sizes,
        }
        self._reader = Reader(target.label, **how)
        self._fan_reader = FanoutReader(target.label, **how)
        self._fan_reader.return_exceptions = self._options.return_exceptions
        batching = self._batching
        if self._plain and not (batching is not None and batching.asks):
            self._quick = _quick_route(target, self._reader, batching is not None and batching.in_calls)

    def route(self, *args: Any, sess_id: str | None = None, **kwargs: Any) -> Answer:
        """Call one replica, chosen by the endpoint's router; `sess_id` wins over the session of the block around it.

        Awaiting it gives the value (of rank 0, or a ValueMesh, see `return_first_rank_result`), or raises what the
        endpoint raised. BadCall, SerializationError, PayloadTooLarge, Overloaded and SessionClosed are raised at once.
        """
        if sess_id is not None and type(sess_id) is not str:
            why = f"sess_id is the id of a session, a str, and not {sess_id!r:.80}"
            raise BadCall(endpoint=self._label, why=why)
        target = self._target or self._bound()
        if target is None:

            def send(at: Target, call: Call, payload: Payload) -> None:
                self._route(at, call, payload, sess_id, self._say(args, kwargs))

            return self._later(send, args, kwargs)
        if sess_id is None and active_sessions.get():
            sess_id = session_of(target.binding)
        if self._quick is not None and not kwargs and (quick := self._quick(args, sess_id)) is not None:
            return quick
        payload = self._encode(target, args, kwargs)
        said = self._say(args, kwargs)
        call = target.client.new_call()
        self._route(target, call, payload, sess_id, said)
        return call

    def _route(self, target: Target, call: Call, payload: Payload, session: str | None, said: Said) -> None:
        self._submit(target, (call, self._reader), payload, session, None, None, said)

    def fanout(self, *args: Any, **kwargs: Any) -> Answer:
        """Call every healthy replica; awaiting it gives their values in replica order. Sessions play no part.

        Raises FanoutError, holding results and errors by replica, when some failed, unless
        `options(return_exceptions=True)`.
        """
        if "sess_id" in kwargs:
            raise BadCall(endpoint=self._label, why="fanout goes to every replica and takes no sess_id; use route()")
        target = self._target or self._bound()
        if target is None:
            return self._later(self._fanout, args, kwargs)
        payload = self._encode(target, args, kwargs)
        call = target.client.new_call()
        self._fanout(target, call, payload)
        return call

    def _fanout(self, target: Target, call: Call, payload: Payload) -> None:
        client = target.client
        reader = self._fan_reader
        if target.replay_last:
            reader = reader.replaying(partial(target.binding.keep_replay, target.id, payload))
        extras = self._extras(None)
        seq = client.link.fanout(target.id, payload, (call, reader), extras)
        if extras is not None and extras.deadline is not None and self._timeout is not None:
            client.guard(seq, extras.deadline, self._timeout)
        client.touch()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not on services (A4)."""
        raise NotImplementedError(
            f"Services only support route() and fanout(). Write `await {self._label}.route(…)` for one replica, "
            f"`await {self._label}.fanout(…)` for all; start the class with as_actor() to address ranks"
        )

    call = call_one = choose = broadcast = generate = stream = __call__


class ActorEndpoint(_Endpoint):
    """An endpoint of an actor: `call`, `call_one`, `choose`, `broadcast`, `stream`. One client's calls start in order."""

    _one: Reader
    _mesh: Reader

    def _learn(self, binding: Binding, target: Target) -> None:
        self._one, self._mesh = (
            kind(target.label, errors_return=binding.errors_return, sizes=binding.sizes)
            for kind in (Reader, MeshReader)
        )

    def _call(self, mesh: bool, rank: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        target = self._target or self._bound()
        if target is None:
            return self._later(lambda at, call, payload: self._send(at, call, payload, mesh, rank), args, kwargs)
        payload = self._encode(target, args, kwargs)
        call = target.client.new_call()
        self._send(target, call, payload, mesh, rank)
        return call

    def _send(self, target: Target, call: Call, payload: Payload, mesh: bool, rank: int | None) -> None:
        reader = self._mesh if mesh else self._one
        self._submit(target, (call, reader), payload, None, target.binding.service, rank)

    def call(self, *args: Any, **kwargs: Any) -> Answer:
        """Call every rank; awaiting it gives a ValueMesh over the ranks. Raises the first rank's exception."""
        return self._call(True, None, args, kwargs)

    def call_one(self, *args: Any, **kwargs: Any) -> Answer:
        """Call the actor's only rank. Raises ValueError when it has several."""
        world = self._handle.world
        if world != 1:
            raise ValueError(
                f"call_one() needs exactly one rank, and {self._handle.name} has {world}; use call() or choose()"
            )
        return self._call(False, None, args, kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> Answer:
        """Call one rank drawn at random."""
        world = self._handle.world
        return self._call(False, random.randrange(world) if world > 1 else None, args, kwargs)

    def broadcast(self, *args: Any, **kwargs: Any) -> None:
        """Call every rank and wait for nothing; what goes wrong is logged."""
        self._call(True, None, args, kwargs).add_done_callback(self._log_failure)

    def stream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Call every rank; `async for` over it gives their values as they finish. The calls go out at once."""
        return _as_they_finish([self._call(False, rank, args, kwargs) for rank in range(self._handle.world)])

    def _log_failure(self, call: asyncio.Future[Any]) -> None:
        if not call.cancelled() and call.exception() is not None:
            error = call.exception()
            _log.warning("%s.broadcast: %s: %s", self._label, type(error).__name__, error)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not on a handle: which ranks it means would be a guess."""
        raise NotImplementedError(f"use `await {self._label}.call_one(…)`, or call, choose, broadcast or stream")


async def _as_they_finish(calls: list[Call]) -> AsyncIterator[Any]:
    waiting: set[asyncio.Future[Any]] = set(calls)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                yield call.result()
    finally:
        for call in waiting:
            call.cancel()
