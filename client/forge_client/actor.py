"""What a user writes: a class below `ForgeActor` with methods marked `@endpoint` or `@service_endpoint`.

A marked method stays a plain method, so inside the worker `self.other(x)` works; the marks are read by `spec` when the
class is deployed. `options()` makes a configured subclass (A2); what runs in the worker is always the class as written.
Handles to what was started are in `service` and `actor_handle`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from forge_contract.config import EndpointOptions, ServiceConfig
from forge_contract.errors import ConfigError

if TYPE_CHECKING:
    from forge_client.actor_handle import ActorHandle
    from forge_client.service import Service

Method = TypeVar("Method", bound=Callable[..., Any])

_MARK = "__forge_endpoint__"
# Of a configured subclass, in its own __dict__: the options given, and the class they configure.
_OPTIONS = "_forge_options"
_ORIGIN = "_forge_origin"


def _mark(method: Any, decorator: str, options: Mapping[str, Any]) -> Any:
    where = f"@{decorator} on {getattr(method, '__qualname__', method)!s}"
    if not inspect.isfunction(method):
        raise ConfigError(where=where, message="an endpoint is a plain method: def or async def in the class")
    if inspect.isasyncgenfunction(method) or inspect.isgeneratorfunction(method):
        raise ConfigError(where=where, message="an endpoint returns one value; generators cannot be endpoints")
    if "sess_id" in inspect.signature(method).parameters:
        raise ConfigError(
            where=where, message="sess_id is the caller's word for the session; read it with current_session()"
        )
    checked = EndpointOptions.checked(where, options)
    parameters = list(inspect.signature(method).parameters.values())[1:]  # without the instance
    named = {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    wrong = [
        f"{name} names {given!r}, which is none of its parameters"
        for name in ("batch_key", "batch_weight")
        if isinstance(given := getattr(checked, name), str) and given not in named
    ]
    if wrong:
        raise ConfigError(where=where, problems=wrong)
    setattr(method, _MARK, checked)
    return method


@overload
def endpoint(method: Method, /) -> Method: ...
@overload
def endpoint(**options: Any) -> Callable[[Method], Method]: ...
def endpoint(method: Any = None, /, **options: Any) -> Any:
    """Mark a method as callable from outside. Options: those of `service_endpoint`, and replay_last: the last `fanout`
    that succeeded everywhere is played to replicas that start later, before they are HEALTHY (A11; new weights, say).

    Raises ConfigError at once for an unknown option, one that cannot hold, or what is no plain method.
    """
    if method is not None:
        return _mark(method, "endpoint", {})
    return lambda marked: _mark(marked, "endpoint", options)


@overload
def service_endpoint(method: Method, /) -> Method: ...
@overload
def service_endpoint(**options: Any) -> Callable[[Method], Method]: ...
def service_endpoint(method: Any = None, /, **options: Any) -> Any:
    """Mark a method and say how a service routes its calls.

    Options: router (instance, class or factory), batch_size, batch_timeout (seconds), batch_mode ("route" or "call"),
    batch_key and batch_weight (functions of the arguments, or the name of one), batch_max_weight, batch_eager,
    batch_sessions, collate ("stack"), threads (of a plain def), timeout (seconds), delivery ("at_least_once" or
    "at_most_once"), hang_timeout_s (seconds: a call that runs longer restarts its replica), replay_last. Raises ConfigError
    as `endpoint` does.
    """
    if method is not None:
        return _mark(method, "service_endpoint", {})
    return lambda marked: _mark(marked, "service_endpoint", options)


class ForgeActor:
    """Base of all actor classes. Class attributes named like options of `ServiceConfig` are the class's defaults."""

    async def setup(self) -> None:
        """Heavy work after `__init__`, before the first call. What it raises reaches whoever started the actor."""

    async def teardown(self) -> None:
        """Called when the actor is stopped on purpose."""

    @classmethod
    def options(cls, **options: Any) -> type[Self]:
        """A subclass with these options of `ServiceConfig`; what is not given is inherited (A2).

        `fatal_errors` takes exception classes and their names. Raises ConfigError, there and then, for an unknown option
        or options that cannot hold together.
        """
        options = _named(options)
        ServiceConfig().replace(**options)
        configured = type(
            cls.__name__,
            (cls,),
            {
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
                _OPTIONS: options,
                _ORIGIN: origin_of(cls),
            },
        )
        service_config(configured)
        return configured

    @classmethod
    async def as_service(cls, *args: Any, **kwargs: Any) -> Service:
        """Start replicas of this class with these constructor arguments; returns when all are HEALTHY.

        Raises what the user's `__init__` or `setup` raised, with the remote traceback; ConfigError, StartFailed,
        TrustRequired, BrokerUnreachable.
        """
        from forge_client.service import Service

        return await Service(service_config(cls), cls, *args, **kwargs).started()

    @classmethod
    async def as_actor(cls, *args: Any, **kwargs: Any) -> ActorHandle:
        """Start one actor, of `procs` ranks (on each of `hosts`), addressed directly. Raises as `as_service` does."""
        from forge_client.actor_handle import ActorHandle

        return await ActorHandle(service_config(cls), cls, *args, **kwargs).started()

    @classmethod
    async def shutdown(cls, actor: ActorHandle | Service) -> None:
        """Stop an actor that `as_actor` started. The same as `await actor.shutdown()`."""
        await actor.shutdown()


def check_actor_class(cls: object) -> type[ForgeActor]:
    """Raises ConfigError when this is no class that can be deployed."""
    if isinstance(cls, type) and issubclass(cls, ForgeActor) and cls is not ForgeActor:
        return cls
    what = f"class {cls.__qualname__}" if isinstance(cls, type) else f"{cls!r:.80}"
    raise ConfigError(
        where="actor class", message=f"{what} is no subclass of ForgeActor; write `class {_word(cls)}(ForgeActor):`"
    )


def _word(cls: object) -> str:
    return cls.__name__ if isinstance(cls, type) and cls is not ForgeActor else "MyActor"


def origin_of(cls: type) -> type:
    """The class as written, behind what `options()` made of it."""
    origin: type = cls.__dict__.get(_ORIGIN, cls)
    return origin


def service_config(cls: type[ForgeActor]) -> ServiceConfig:
    """The class's configuration: attributes and options from the base downwards, the nearer ones win."""
    known = ServiceConfig.known_options()
    found: dict[str, Any] = {}
    for one in reversed(cls.__mro__):
        if not issubclass(one, ForgeActor) or one is ForgeActor:
            continue
        namespace = one.__dict__
        own = {name: namespace[name] for name in known & namespace.keys() if _is_plain(namespace[name])}
        for given in (own, namespace.get(_OPTIONS, {})):
            layer = _named(given)
            # Two names of one setting: inherited under one and given under the other, they would contradict each other.
            if "default_replicas" in layer and "num_replicas" not in layer:
                layer["num_replicas"] = layer.pop("default_replicas")
            found |= layer
    return ServiceConfig().replace(**found)


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with exceptions by name: the broker and the worker compare names, and import nothing for it."""
    fatal = options.get("fatal_errors")
    if fatal is None:
        return dict(options)
    several = fatal if isinstance(fatal, (tuple, list, set, frozenset)) else (fatal,)
    return {**options, "fatal_errors": tuple(_error_name(one) for one in several)}


def _error_name(error: Any) -> Any:
    """`package.module.Error`, or `ValueError` for a builtin one. What is no exception is left for the config to refuse."""
    if isinstance(error, type) and issubclass(error, BaseException):
        error = f"{error.__module__}.{error.__qualname__}"
    return error.removeprefix("builtins.") if isinstance(error, str) else error


def exports_sessions(cls: type) -> bool:
    """Whether the class can hand over the state of a session (S3). Raises ConfigError when it has half of what it takes."""
    has = {name: callable(getattr(cls, name, None)) for name in ("export_session", "import_session")}
    if any(has.values()) and not all(has.values()):
        there, missing = sorted(has, key=has.__getitem__, reverse=True)
        raise ConfigError(
            where=origin_of(cls).__qualname__,
            message=f"it defines {there} and no {missing}; a session's state moves only with both",
        )
    return all(has.values())


def _is_plain(value: object) -> bool:
    """A setting, not a method or property that happens to have the name of one."""
    return not callable(value) and not hasattr(type(value), "__get__")


def endpoints_of(cls: type) -> dict[str, tuple[Callable[..., Any], EndpointOptions]]:
    """Name to method and options, in the order of definition, those of base classes first. A method that overrides an
    endpoint is one, with its options, also without a mark of its own."""
    found: dict[str, tuple[Callable[..., Any], EndpointOptions]] = {}
    for one in reversed(cls.__mro__):
        for name, value in one.__dict__.items():
            options = getattr(value, _MARK, None) if inspect.isfunction(value) else None
            if options is not None:
                found[name] = (value, options)
            elif name in found:
                if inspect.isfunction(value):
                    found[name] = (value, found[name][1])
                else:
                    del found[name]
    return found
