"""A class and its configuration as the broker gets them (PROTOCOL.md §7.1), by reference where that is possible.

By reference is the rule: the worker imports `module:qualname` with the client's import path and working directory.
What only exists in this process (`__main__`, notebooks, `<locals>`) goes by value, with trust (A9, W6). Custom routers and scaling
policies always go by value, so that the broker never imports the user's module and torch with it (R4); but of a policy a name may be given
instead, which is the broker's to import.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from forge_client.actor import ForgeActor, endpoints_of, exports_sessions, origin_of
from forge_client.signature import Matcher
from forge_contract.config import ServiceConfig
from forge_contract.errors import SerializationError, TrustRequired
from forge_contract.routing import Router, describe_router, make_router
from forge_contract.scaling import ScalingPolicy, ThresholdPolicy, make_policy


def describe(cls: type[ForgeActor], config: ServiceConfig, kind: str, *, trusted: bool) -> dict[str, Any]:
    """The spec of a service or actor. `trusted`: whether the broker trusts our address.

    Raises TrustRequired when code would have to go by value without trust, SerializationError when it cannot.
    """
    origin = origin_of(cls)
    return {
        "name": config.name,
        "kind": kind,
        "detached": config.detached,
        "class_name": origin.__name__,
        "target": _target(origin, trusted),
        "path": [os.path.abspath(entry) for entry in sys.path],  # "" is the working directory
        "cwd": os.getcwd(),
        "config": config.to_wire(),
        "endpoints": [
            {
                "name": name,
                "router": _router(options.router, f"{origin.__name__}.{name}", trusted),
                "options": options.to_wire(),
                "signature": Matcher.of(method).to_wire(),
            }
            for name, (method, options) in endpoints_of(cls).items()
        ],
        "exports": exports_sessions(cls),
        "policy": _policy(config, origin.__name__, trusted),
    }


def _target(origin: type, trusted: bool) -> dict[str, Any]:
    module = sys.modules.get(origin.__module__)
    if module is not None and _reachable(origin, module) and is_importable(module):
        return {"ref": f"{origin.__module__}:{origin.__qualname__}"}
    what = f"class {origin.__qualname__}, which no other process can import from {origin.__module__!r},"
    if not trusted:
        raise TrustRequired(what=what)
    with _by_value([module] if module is not None and module.__name__ != "__main__" else []):
        return {"code": _dumps(origin, what)}


def _reachable(cls: type, module: ModuleType) -> bool:
    found: Any = module
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def is_importable(module: ModuleType) -> bool:
    """Whether another process with our import path finds this very file under this name. That it is in sys.modules
    says nothing: programs and test runners put modules there that nobody else can import."""
    name = module.__name__
    if name in ("__main__", "__mp_main__"):
        return False
    path: Any = None
    spec: importlib.machinery.ModuleSpec | None = None
    at = ""
    for part in name.split("."):
        at = f"{at}.{part}" if at else part
        spec = _find(at, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    file = getattr(module, "__file__", None)
    return spec is not None and (
        file is None or spec.origin is None or os.path.realpath(spec.origin) == os.path.realpath(file)
    )


def _find(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    for finder in sys.meta_path:
        find: Callable[..., Any] | None = getattr(finder, "find_spec", None)
        spec = find(name, path) if find is not None else None
        if spec is not None:
            return spec if isinstance(spec, importlib.machinery.ModuleSpec) else None
    return None


def _router(given: object, endpoint: str, trusted: bool) -> dict[str, Any]:
    router = make_router(given)
    described = describe_router(router)
    if described is not None:
        return described
    return _code(router, Router, f"the router {type(router).__qualname__} of {endpoint}", trusted)


def _policy(config: ServiceConfig, owner: str, trusted: bool) -> dict[str, Any] | None:
    given = None if config.autoscaling is None else config.autoscaling.policy
    if given is None or isinstance(given, str):
        return None  # the configuration says it all
    policy = make_policy(given)
    if type(policy) is ThresholdPolicy:
        return None
    return _code(policy, ScalingPolicy, f"the scaling policy {type(policy).__qualname__} of {owner}", trusted)


def _code(value: object, base: type, what: str, trusted: bool) -> dict[str, Any]:
    """An object of a user's subclass of `base`, with the modules of its classes."""
    if not trusted:
        raise TrustRequired(what=what)
    modules = {sys.modules.get(one.__module__) for one in type(value).__mro__ if one not in (base, object)}
    theirs = [
        module for module in modules if module is not None and module.__name__ not in ("__main__", base.__module__)
    ]
    with _by_value(theirs):
        return {"code": _dumps(value, what)}


def _dumps(value: object, what: str) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise SerializationError(
            where=what, type_name=type(value).__qualname__, why=f"it cannot be pickled: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _by_value(modules: list[ModuleType]) -> Iterator[None]:
    """What is pickled inside takes the classes of these modules along instead of naming them."""
    import cloudpickle

    known = set(cloudpickle.list_registry_pickle_by_value())
    added = [module for module in modules if module.__name__ not in known]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)
