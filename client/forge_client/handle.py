"""What services' and actors' handles share: starting, binding to a client, travelling, ending (A2, A8, A10).

A handle is made either of a plan (a class, its configuration and constructor arguments: awaiting it, or its first
call, deploys it) or of a description (found by name, or arrived from another process: it binds to the client of the loop
it is first used in). Bound is bound; a handle belongs to one loop from then on.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from forge_client.actor import ForgeActor, check_actor_class, endpoints_of, exports_sessions, origin_of
from forge_client.batching import Batching
from forge_client.binding import Binding, Target
from forge_client.call import Call
from forge_client.connection import current_client
from forge_client.signature import Matcher
from forge_client.spec import describe
from forge_contract.config import ServiceConfig
from forge_contract.errors import (
    ConfigError,
    ProtocolError,
    SerializationError,
    ServiceStopped,
    UnknownEndpoint,
)
from forge_contract.payload import decode_exception, encode_call, encode_exception

if TYPE_CHECKING:
    from forge_client.client import Client


class Plan(NamedTuple):
    """What is to be deployed."""

    config: ServiceConfig
    cls: type[ForgeActor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Found(NamedTuple):
    """What is running already, under which incarnation of which broker."""

    description: dict[str, Any]
    incarnation: int


class Handle:
    """Base of `Service` and `ActorHandle`."""

    kind: ClassVar[str]
    _endpoint_type: ClassVar[Callable[[Handle, str], Any]]

    def __init__(self, config: ServiceConfig, cls: type[ForgeActor], /, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, ServiceConfig):
            raise ConfigError(
                where=type(self).__name__, message=f"the first argument is a ServiceConfig, not {config!r:.80}"
            )
        check_actor_class(cls)
        self._check_names(endpoints_of(cls))
        exports_sessions(cls)
        init = Matcher(inspect.Signature()) if cls.__init__ is object.__init__ else Matcher.of(cls.__init__)
        init.check(f"{origin_of(cls).__name__}()", args, kwargs)
        self._begin(Plan(config, cls, args, kwargs))

    def _begin(self, origin: Plan | Found) -> None:
        self._origin = origin
        self._binding: Binding | None = None
        self._starting: asyncio.Task[Callable[[], Exception] | None] | None = None
        self._waiting = 0  # who awaits the start
        self._late: list[tuple[Call, Callable[[Call, Binding], None]]] = []
        self._over: Callable[[], Exception] | None = None

    @classmethod
    def of_description(cls, description: dict[str, Any], incarnation: int) -> Self:
        """A handle of what runs already. Raises ProtocolError when it is not described in a known form."""
        sizes, endpoints = description.get("sizes"), description.get("endpoints")
        if not (
            description.get("kind") == cls.kind
            and isinstance(description.get("name"), str)
            and isinstance(endpoints, dict)
            and isinstance(sizes, dict)
            and all(type(size) is int for size in sizes.values())
        ):
            raise ProtocolError(f"a {cls.__name__} was described in no known form")
        handle = cls.__new__(cls)
        handle._begin(Found(description, incarnation))
        return handle

    def __repr__(self) -> str:
        if self._over is not None or (self._binding is not None and self._binding.over is not None):
            state = "stopped"
        elif self._binding is not None:
            state = "bound"
        else:
            state = "starting" if self._starting is not None else "not started"
        return f"<{type(self).__name__} {self.name} {state}>"

    # What it is.

    @property
    def name(self) -> str:
        """Its name at the broker; before it is started, what it will be called after."""
        if self._binding is not None:
            return self._binding.name
        if isinstance(self._origin, Found):
            return str(self._origin.description["name"])
        config = self._origin.config
        return config.name or config.mesh_name or origin_of(self._origin.cls).__name__

    @property
    def world(self) -> int:
        """Ranks of one replica."""
        if isinstance(self._origin, Plan):
            return self._origin.config.world
        return math.prod(self._origin.description["sizes"].values())

    def _known_endpoints(self) -> list[str]:
        if isinstance(self._origin, Plan):
            return list(endpoints_of(self._origin.cls))
        return list(self._origin.description["endpoints"])

    def matcher(self, endpoint: str) -> Matcher | None:
        """Judges calls of an endpoint before the handle is bound."""
        if isinstance(self._origin, Plan):
            return Matcher.of(endpoints_of(self._origin.cls)[endpoint][0])
        return Matcher.from_wire((self._origin.description.get("signatures") or {}).get(endpoint))

    def batching(self, target: Target) -> Batching | None:
        """What calls of an endpoint say to be batched; None where nothing is."""
        options = target.options
        if self.kind != "service" or options.get("batch_size", 1) <= 1:
            return None
        known = endpoints_of(self._origin.cls)[target.name][1] if isinstance(self._origin, Plan) else None
        return Batching(target.label, options, known, target.matcher)

    def _check_names(self, names: Any) -> None:
        taken = [name for name in names if hasattr(type(self), name) or name.startswith("_")]
        if taken:
            raise ConfigError(
                where=type(self).__name__,
                message=f"endpoints cannot be called {', '.join(taken)}: the handle's own methods are, or the name is private",
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        known = self._known_endpoints()
        if name not in known:
            raise UnknownEndpoint(name=name, owner=self.name, known=known)
        endpoint = self.__dict__[name] = type(self)._endpoint_type(self, name)
        return endpoint

    # Starting.

    def __await__(self) -> Generator[Any, None, Self]:
        return self._awaited().__await__()

    async def _awaited(self) -> Self:
        await self.bound()
        return self

    async def bound(self) -> Binding:
        """The binding, started if need be: for a service, all its replicas are HEALTHY then.

        Raises what the user's `__init__` or `setup` raised, ConfigError, StartFailed, TrustRequired, BrokerUnreachable.
        """
        binding = self.binding_or_none()
        if binding is not None:
            return binding
        starting = self._start()
        self._waiting += 1
        try:
            why_not = await asyncio.shield(starting)
        except asyncio.CancelledError:
            if self._over is not None and starting.cancelled():
                raise self._over() from None
            if self._waiting == 1 and not self._late:
                starting.cancel()  # nobody wants it any more: what was deployed meanwhile is stopped
            raise
        finally:
            self._waiting -= 1
        if why_not is not None:
            raise why_not()
        assert self._binding is not None
        return self._binding

    async def started(self) -> Self:
        """The handle, started, for somebody who has nothing until we return: cancelled, it leaves nothing running."""
        try:
            return await self
        except asyncio.CancelledError:
            if self._binding is not None:
                self._binding.client.stop_unwanted(self._binding.service)
            raise

    def binding_or_none(self) -> Binding | None:
        """The binding if there is one. Raises why the service is over."""
        if self._over is not None:
            raise self._over()
        if self._binding is not None and self._binding.over is not None:
            raise self._binding.over()
        return self._binding

    def later(self, submit: Callable[[Call, Binding], None]) -> Call:
        """A call to be submitted as soon as the handle is bound, which begins now at the latest."""
        call: Call = asyncio.get_running_loop().create_future()
        self._late.append((call, submit))
        self._start()
        return call

    def _start(self) -> asyncio.Task[Callable[[], Exception] | None]:
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._bind())
            # A loop that is closed in the middle of it (no asyncio.run) takes the calls that wait along in silence;
            # this task is no user's business. asyncio.gather does the same with its own.
            self._starting._log_destroy_pending = False  # type: ignore[attr-defined]
        return self._starting

    async def _bind(self) -> Callable[[], Exception] | None:
        """Bind, then submit what waited; or tell all who wait why not. Returns why not."""
        try:
            client = await current_client()
            self._binding = await (self._deploy(client) if isinstance(self._origin, Plan) else self._rejoin(client))
        except asyncio.CancelledError:
            self._starting = None
            over = self._over
            self._fail_late(over or (lambda: ServiceStopped(service=self.name, why=": its start was cancelled")))
            raise
        except Exception as error:
            # The next use starts anew; these get an error each, for one object cannot be raised in several places.
            self._starting = None
            why_not = _each_anew(error)
            self._fail_late(why_not)
            return why_not
        late, self._late = self._late, []
        for call, submit in late:
            if not call.done():
                try:
                    submit(call, self._binding)
                except Exception as error:
                    call.set_exception(error)
        return None

    def _fail_late(self, why: Callable[[], Exception]) -> None:
        late, self._late = self._late, []
        for call, _ in late:
            if not call.done():
                call.set_exception(why())

    async def _deploy(self, client: Client) -> Binding:
        assert isinstance(self._origin, Plan)
        config, cls, args, kwargs = self._origin
        label = f"{origin_of(cls).__name__}()"
        spec = describe(cls, config, self.kind, trusted=client.trusted)
        payload = client.own(encode_call(args, kwargs, trusted=client.trusted, where=label), label, share=False)
        return await client.deploy(spec, payload)

    async def _rejoin(self, client: Client) -> Binding:
        assert isinstance(self._origin, Found)
        description, incarnation = self._origin
        if not client.continues(incarnation):
            why = f": it ran under another broker than the one at {client.address}, to which this process is connected"
            raise ServiceStopped(service=self.name, why=why)
        return client.bind(description)

    # Ending.

    async def shutdown(self) -> None:
        """Stop it, for everybody, and wait until its last worker is gone. A second time does nothing."""
        if self._binding is None and isinstance(self._origin, Found) and self._over is None:
            await self.bound()
        if self._binding is None:
            self._over = self._over or (lambda: ServiceStopped(service=self.name, why=""))
            if self._starting is not None:
                self._starting.cancel()
            return
        await self._binding.stop()

    # Travelling.

    def to_fields(self) -> dict[str, Any]:
        """The handle as a value for other processes (A8). Raises SerializationError when it is not started yet."""
        if self._binding is not None:
            description, incarnation = self._binding.description, self._binding.incarnation
        elif isinstance(self._origin, Found):
            description, incarnation = self._origin
        else:
            raise SerializationError(
                where=f"the handle of {self.name}",
                type_name=type(self).__name__,
                why="it is not started yet; await it first",
            )
        told = {name: value for name, value in description.items() if name != "metrics"}
        return {"description": told, "incarnation": incarnation}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """The handle again. Raises ProtocolError for what no handle would have sent."""
        description, incarnation = fields.get("description"), fields.get("incarnation")
        if not isinstance(description, dict) or type(incarnation) is not int:
            raise ProtocolError(f"a {cls.__name__} arrived without its description")
        return cls.of_description(description, incarnation)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_fields, (self.to_fields(),)


def _each_anew(error: Exception) -> Callable[[], Exception]:
    """The error for the first, and one like it for each further one."""
    payload = encode_exception(error, trusted=True)  # it does not leave this process
    first: list[Exception] = [error]

    def make() -> Exception:
        if first:
            return first.pop()
        again = decode_exception(payload, trusted=True)
        assert isinstance(again, Exception)
        return again

    return make
