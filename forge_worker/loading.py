"""From an assignment to a class: the import path, the working directory, a reference or code (design W6, A9).

Called by `runtime` once in a worker's life, when the environment is pinned: in a spare long before it has anything to make.
Trust decides how far the client is obeyed: with it, everything; without, a class must be importable as this worker was started,
and be an actor. Without that last condition anybody who reaches a TCP port could deploy `subprocess:Popen`.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import sys
from typing import Any

from forge_contract.errors import ConfigError, ProtocolError, TrustRequired, UnknownEndpoint
from forge_contract.framing import Payload
from forge_contract.payload import decode_call
from forge_worker.assignment import Assignment, Source

log = logging.getLogger("forge_worker")


def enter(source: Source) -> None:
    """Take over the client's import path and working directory, as far as it is trusted."""
    if not source.trusted:
        return
    # The client's order first: it is what the user tested. Ours after it, for what only this machine has.
    sys.path[:] = dict.fromkeys((*source.path, *sys.path))
    if source.cwd is not None:
        try:
            os.chdir(source.cwd)
        except OSError as error:
            # Another machine may not have it, and most actors do not care; those that do will see this line.
            log.warning("the client's working directory cannot be entered, staying in %s: %s", os.getcwd(), error)


def load_class(source: Source) -> type:
    """The class to make instances of, as its client would find it. Raises what its import raises; ImportError names the paths
    searched."""
    enter(source)
    target = source.target
    if "code" in target:
        if not source.trusted:
            raise TrustRequired(what=f"class {source.class_name}, sent by value,")
        loaded = pickle.loads(target["code"])  # noqa: S301 -- behind the check of trust; cloudpickle's are plain pickles
    else:
        loaded = _resolve(str(target.get("ref")), source)
    if not isinstance(loaded, type):
        raise ConfigError(where=source.class_name, message=f"{loaded!r:.200} is no class")
    if not source.trusted and not _is_actor(loaded):
        raise TrustRequired(what=f"class {source.class_name}, which is no ForgeActor,")
    return loaded


def make_instance(cls: type, assignment: Assignment, arguments: Payload) -> Any:
    """The actor, as its client would make it. Raises what its `__init__` raises."""
    args, kwargs = decode_call(arguments, trusted=assignment.trusted)
    return cls(*args, **kwargs)


def find_methods(instance: object, assignment: Assignment) -> list[Any]:
    """The endpoints' methods, in the assignment's order. Raises UnknownEndpoint for one that the class has not."""
    methods = []
    for endpoint in assignment.endpoints:
        method = getattr(instance, endpoint.name, None)
        # Without trust the list of endpoints is somebody's claim, and only what the author marked may be called.
        if not callable(method) or not (assignment.trusted or hasattr(method, "__forge_endpoint__")):
            known = [name for name in dir(type(instance)) if not name.startswith("_")]
            raise UnknownEndpoint(owner=assignment.class_name, name=endpoint.name, known=known)
        methods.append(method)
    return methods


def _resolve(ref: str, source: Source) -> Any:
    module_name, colon, qualname = ref.partition(":")
    if not (module_name and colon and qualname):
        raise ProtocolError(f"a class reference is module:qualname, not {ref!r:.200}")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        kind = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else ImportError
        raise kind(_not_imported(module_name, error, source), name=error.name, path=error.path) from error
    for name in qualname.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise ImportError(f"module {module_name} ({getattr(found, '__file__', '?')}) has no {qualname}") from error
    return found


def _not_imported(module: str, error: ImportError, source: Source) -> str:
    whose = "the client's, then the worker's" if source.trusted else "the worker's own, as its client is not trusted"
    searched = "\n".join(f"  {entry or os.getcwd()}" for entry in sys.path)
    return (
        f"{error} (importing {module} for {source.label} in the worker, in {os.getcwd()}); "
        f"paths searched, {whose}:\n{searched}"
    )


def _is_actor(cls: type) -> bool:
    from forge_client.actor import ForgeActor

    return issubclass(cls, ForgeActor)
