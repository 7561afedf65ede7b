"""`forge deploy`, `forge call`, `forge stop`: services by name, without a program around them."""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from forge_cli.conversation import converse
from forge_cli.exits import Misused
from forge_cli.options import broker_option, read_value, service_options, split_pairs
from forge_cli.terminal import write_json

if TYPE_CHECKING:
    from forge_client.actor import ForgeActor
    from forge_client.client import Client


@click.command()
@click.argument("target", metavar="MODULE:CLASS")
@click.option("--name", metavar="NAME", help="What it is called and found by. [default: the class's name]")
@click.option("--replicas", type=int, metavar="N", help="How many replicas. [default: the class's own, or 1]")
@click.option(
    "--procs", type=int, metavar="N", help="Worker processes (ranks) of a replica. [default: the class's own, or 1]"
)
@click.option("--with-gpus", is_flag=True, help="A GPU for each rank.")
@service_options
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="KEY=VALUE",
    help="A keyword of the class's constructor. May be repeated.",
)
@broker_option
def deploy(
    target: str,
    name: str | None,
    replicas: int | None,
    procs: int | None,
    with_gpus: bool,
    options: tuple[str, ...],
    arguments: tuple[str, ...],
    broker: str,
) -> None:
    """Start a service from a class, and leave it running.

    The class is imported here, from the current directory, and in the workers, likewise. VALUES are JSON where they are JSON, else
    text. Returns when all replicas are healthy; Ctrl-C meanwhile stops what was started.

    \b
    Examples:
      forge deploy digits:Classifier --name digits --replicas 2
      forge deploy app.models:Generator --name gen --with-gpus --arg path=weights.pt --arg layers=12
      forge deploy app.models:Trainer --procs 4 --option stop_grace_s=30
    """
    keywords = {key: read_value(value) for key, value in split_pairs(arguments, "--arg").items()}
    chosen = read_options(options, name=name, num_replicas=replicas, procs=procs, with_gpus=with_gpus or None)
    cls = load_class(target).options(**chosen, detached=True)
    began = time.monotonic()
    service, told = converse(
        broker, lambda client: _deploy(client, cls, keywords), waiting=f"starting {target}", patient=True
    )
    click.echo(f"{service}: {told['replicas']} healthy after {time.monotonic() - began:.1f} s; it has")
    for endpoint in told["endpoints"]:
        click.echo(f"  {service}.{endpoint}")


@click.command()
@click.argument("endpoint", metavar="SERVICE.ENDPOINT")
@click.argument("arguments", metavar="[JSON]", required=False)
@click.option(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help="For the whole call, waiting included. [default: the endpoint's own]",
)
@broker_option
def call(endpoint: str, arguments: str | None, timeout: float | None, broker: str) -> None:
    """Call an endpoint once and print what it returns, as JSON.

    A JSON object gives keyword arguments, an array positional ones, any other JSON is the one argument; `-` reads it from stdin. What
    JSON cannot say of the result is shown as Python's repr, in a string.

    \b
    Examples:
      forge call gen.predict '{"x": 1}'       predict(x=1)
      forge call gen.predict '[1, "two"]'     predict(1, "two")
      forge call gen.predict '"hello"'        predict("hello")
      forge call gen.predict '[{"a": 1}]'     predict({"a": 1})
      forge call gen.version --timeout 5      version()
      cat image.json | forge call digits.classify -
    """
    service, method = split_endpoint(endpoint)
    positional, keywords = read_arguments(arguments)
    import_from_here()  # a result may be of a class that is defined here
    result = converse(
        broker,
        lambda client: _call(service, method, positional, keywords, timeout),
        waiting=f"waiting for {endpoint}",
        patient=True,
    )
    write_json(plain(result))


@click.command(short_help="Stop a service, for everybody.")
@click.argument("service")
@broker_option
def stop(service: str, broker: str) -> None:
    """Stop a service, for everybody, and wait until its last worker is gone.

    \b
    Example:
      forge stop gen
    """
    converse(broker, lambda client: client.control("stop", {"service": service}), waiting=f"stopping {service}")
    click.echo(f"{service} is stopped")


def split_endpoint(text: str) -> tuple[str, str]:
    """`gen.predict` as service and endpoint. Raises click.BadParameter."""
    service, dot, method = text.rpartition(".")
    if not (dot and service and method):
        raise click.BadParameter(f"{text!r} is no SERVICE.ENDPOINT, such as gen.predict", param_hint="SERVICE.ENDPOINT")
    return service, method


def read_options(pairs: tuple[str, ...], **flags: Any) -> dict[str, Any]:
    """The options of ServiceConfig that a command line gives: those of --option, and flags that are not None. Raises
    click.BadParameter and ConfigError."""
    chosen = {key: read_value(value) for key, value in split_pairs(pairs, "--option").items()}
    chosen |= {key: value for key, value in flags.items() if value is not None}
    if isinstance(chosen.get("autoscaling"), dict):
        from forge_contract.config import ServiceConfig

        # All of them, so that what is wrong with limits is told with what is wrong with thresholds. The class may have more to say.
        chosen["autoscaling"] = ServiceConfig.from_wire(chosen).autoscaling
    return chosen


def load_class(target: str) -> type[ForgeActor]:
    """The class behind `module:Class`, imported from the current directory. Raises Misused, with the user's own traceback when it
    is the user's module that raised."""
    from forge_client.actor import check_actor_class
    from forge_contract.errors import did_you_mean

    module_name, colon, qualname = target.partition(":")
    if not (colon and module_name and qualname) or module_name.endswith(".py") or "/" in module_name:
        hint = module_name.removesuffix(".py").removeprefix("./").replace("/", ".") or "module"
        raise Misused(f"{target!r} is no MODULE:CLASS, such as {hint}:{qualname or 'Generator'}")
    import_from_here()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise _broken(module_name, error) from error
        raise Misused(
            f"there is no module {error.name!r} in {os.getcwd()} or on Python's path; run this where `import "
            f"{module_name}` works",
        ) from error
    except Exception as error:
        raise _broken(module_name, error) from error
    classes = [name for name, value in vars(found).items() if isinstance(value, type)]
    for part in qualname.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, classes, "; ")
            raise Misused(f"module {module_name!r} has no {qualname!r}{hint}")
        found = getattr(found, part)
    return check_actor_class(found)


def import_from_here() -> None:
    """Classes of the current directory can be found, as `python -m` would find them."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


def _broken(module: str, error: Exception) -> Misused:
    """The module was found and raised: its author wants to see where. Our own frames and the import system's are left out."""
    import traceback

    steps = error.__traceback__
    while steps is not None and (
        steps.tb_frame.f_code.co_filename in (__file__, importlib.__file__)
        or steps.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        steps = steps.tb_next
    told = "".join(traceback.format_exception(type(error), error, steps, chain=False))
    return Misused(f"{module} cannot be imported: {type(error).__name__}: {error}", told)


async def _deploy(client: Client, cls: type[ForgeActor], keywords: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The service's name, and what of it is worth telling."""
    import asyncio

    from forge_client.actor import endpoints_of, service_config

    before = {service["service"] for service in (await client.control("status", {}))["services"]}
    config = service_config(cls)
    try:
        service = await cls.as_service(**keywords)
    except asyncio.CancelledError:
        # Ctrl-C: a service that nobody asked for any more must not come up later. Only ours: one that was there before stays.
        for one in (await client.control("status", {}))["services"]:
            if (
                one["name"] == (config.name or one["name"])
                and one["service"] not in before
                and one["class_name"] == cls.__name__
            ):
                await client.control("stop", {"service": one["service"]})
        raise
    binding = await service.bound()
    count = len(binding.description["replicas"])
    endpoints = [name + signature(method) for name, (method, _) in endpoints_of(cls).items()]
    return service.name, {
        "replicas": f"{count} replica{'s' if count != 1 else ''} of {cls.__name__}",
        "endpoints": endpoints,
    }


def signature(method: Any) -> str:
    """`(x, k=1)`, as the caller sees it."""
    import inspect

    whole = inspect.signature(method)
    return str(whole.replace(parameters=list(whole.parameters.values())[1:]))


async def _call(
    service: str, method: str, positional: list[Any], keywords: dict[str, Any], timeout: float | None
) -> Any:
    from forge_client import ActorHandle

    handle, endpoint = await find_endpoint(service, method, timeout)
    if isinstance(handle, ActorHandle):
        return await endpoint.call(*positional, **keywords)
    return await endpoint.route(*positional, **keywords)


async def find_endpoint(service: str, method: str, timeout: float | None) -> tuple[Any, Any]:
    """The handle that runs under this name, and its endpoint. Raises UnknownService and UnknownEndpoint, with the closest names."""
    from forge_client import UnknownEndpoint, get_service

    handle = await get_service(service)
    known = (await handle.bound()).targets
    if method not in known:
        raise UnknownEndpoint(name=method, owner=service, known=list(known))
    endpoint = getattr(handle, method)
    return handle, endpoint if timeout is None else endpoint.options(timeout=timeout)


def read_arguments(text: str | None) -> tuple[list[Any], dict[str, Any]]:
    """What `forge call` passes on. Raises click.BadParameter for what is no JSON."""
    import json

    if text is None:
        return [], {}
    if text == "-":
        text = sys.stdin.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(
            f"{text:.200} is no JSON ({error}); text needs its own quotes: '\"hello\"'", param_hint="JSON"
        ) from error
    if isinstance(value, dict):
        return [], value
    return (value, {}) if isinstance(value, list) else ([value], {})


def plain(value: Any) -> Any:
    """The value as JSON can say it: what it cannot say becomes its repr."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return repr(value)
