"""Every error Forge broker raises, in one tree.

    ForgeError
    ├── ConfigError (ValueError)         options or settings that cannot hold; lists every problem
    ├── UnknownEndpoint (AttributeError) no such endpoint; names the closest ones
    ├── BadCall (TypeError)              arguments that do not fit the endpoint's signature
    ├── SerializationError (TypeError)   a value that cannot travel
    ├── TrustRequired (PermissionError)  code by value over an address that is not trusted
    ├── PayloadTooLarge (ValueError)     arguments or a result over `max_payload_bytes`
    ├── ProtocolError                    a peer's bytes that are no envelope
    │   └── VersionMismatch              … because it speaks another version
    ├── AddressInUse (OSError)           another broker holds this address
    ├── BrokerUnreachable (ConnectionError)  nobody answers at the address
    ├── BrokerLost (ConnectionError)     the broker went away while we were waiting
    ├── UnknownService (LookupError)     no service, actor or id of that name
    ├── ServiceStopped                   the service was shut down
    ├── StartFailed                      a replica could not be started, and not by the user's exception
    ├── CallTimeout (TimeoutError)       the caller's own deadline passed
    ├── CallCancelled                    cancelled by somebody other than the awaiting task
    ├── Overloaded                       a limit is reached; carries `retry_after_s`
    ├── NoHealthyReplicas                nobody could serve the call in time; says what each replica is doing
    ├── ReplicaLost                      the one replica this call was meant for died
    ├── SegmentLost                      shared memory that held a call's arguments or result is gone
    ├── OutcomeUnknown                   an at-most-once call may or may not have run
    ├── PoisonedRequest                  a call that keeps killing its replicas
    ├── RouterError                      the endpoint's router raised or chose what is no candidate
    ├── BatchError                       a batch method returned something that is not one result per item
    ├── SessionError
    │   ├── UnknownSession (LookupError)
    │   ├── SessionClosed
    │   └── SessionLost
    ├── FanoutError                      a fan-out in which some replicas failed; holds results and errors
    └── RemoteError                      a user's exception whose type cannot be rebuilt here

An error that the broker or a worker reports travels as `[code, fields]`: the class name and its fields, never
its text, which is composed from the fields here, so that both ends say the same. Which peer does what about an
error is in PROTOCOL.md.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar


class ForgeError(Exception):
    """Base of all errors of Forge broker. Keyword fields are kept as attributes; the text is composed from them."""

    text: ClassVar[str] = "{message}"

    def __init__(self, message: str = "", **fields: Any) -> None:
        if message:
            fields["message"] = message
        self.fields: dict[str, Any] = fields
        super().__init__(self._compose(fields))

    def _compose(self, fields: Mapping[str, Any]) -> str:
        """The text for people. Fields come from the wire too, so a missing one must not raise."""
        return self.text.format_map(_Blank(fields))

    def __getattr__(self, name: str) -> Any:
        fields: dict[str, Any] = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(fields) or 'none'}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, self.fields)

    def to_wire(self) -> list[Any]:
        return [type(self).__name__, self.fields]


class _Blank(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


class ConfigError(ForgeError, ValueError):
    """Options or settings that cannot hold. `problems`: one line each, every one of them."""

    def _compose(self, fields: Mapping[str, Any]) -> str:
        problems: Sequence[str] = fields.get("problems") or [fields.get("message", "?")]
        head = f"{fields.get('where', 'configuration')}: "
        if len(problems) == 1:
            return head + problems[0]
        return head + f"{len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)


class UnknownEndpoint(ForgeError, AttributeError):
    """`name`, `owner`, `known`: the endpoint asked for, whose it should be, and those there are."""

    def __init__(self, message: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        # AttributeError has a `name` of its own, which hides the field.
        self.name = fields.get("name", "")

    def _compose(self, fields: Mapping[str, Any]) -> str:
        head = f"{fields.get('owner', '?')} has no endpoint {fields.get('name', '?')!r}; "
        return head + _closest_or_all(fields.get("name", ""), fields.get("known") or [])


class BadCall(ForgeError, TypeError):
    """`endpoint`, `why`: arguments that do not fit the endpoint's signature, found before the call travels."""

    text = "{endpoint}: {why}"


class SerializationError(ForgeError, TypeError):
    """`type_name`, `where`: a value of this type cannot travel, and the ways out."""

    text = "{where}: a value of type {type_name} cannot travel: {why}"


class TrustRequired(ForgeError, PermissionError):
    """`what`: code by value (or a pickle) came or should go over an address that is not trusted."""

    text = (
        "{what} needs trust, and this address has none; use the broker's private ipc address, "
        "or send a class that workers can import as module:qualname"
    )


class PayloadTooLarge(ForgeError, ValueError):
    text = "{what} would take {size} bytes, over max_payload_bytes={limit}; send less, or raise the limit on the broker"


class ProtocolError(ForgeError):
    """A peer's bytes that are no envelope of this protocol. Counted and answered, never fatal."""


class VersionMismatch(ProtocolError):
    text = "this side speaks protocol {ours}, the other {theirs}; install the same forge-broker on both"


class AddressInUse(ForgeError, OSError):
    text = "{address} is held by another broker{holder}; stop it, or bind another address"

    # OSError's own __str__ looks at errno and strerror; ours is composed.
    def __str__(self) -> str:
        return self._compose(self.fields)


class BrokerUnreachable(ForgeError, ConnectionError):
    text = "no broker answered at {address} within {waited_s} s; is it running? (`forge broker start`, `forge doctor`)"

    def __str__(self) -> str:
        return self._compose(self.fields)


class BrokerLost(ForgeError, ConnectionError):
    text = "the broker at {address} went away: {why}"

    def __str__(self) -> str:
        return self._compose(self.fields)


class UnknownService(ForgeError, LookupError):
    """`name`, `known`: no service or actor of this name or id."""

    def _compose(self, fields: Mapping[str, Any]) -> str:
        head = f"no service {fields.get('name', '?')!r}; "
        return head + _closest_or_all(fields.get("name", ""), fields.get("known") or [])


class ServiceStopped(ForgeError):
    text = "{service} is stopped{why}"


class StartFailed(ForgeError):
    """`service`, `why`, `last_lines`: a replica could not be started, and it was not the user's exception."""

    def _compose(self, fields: Mapping[str, Any]) -> str:
        text = f"{fields.get('service', '?')} could not be started: {fields.get('why', '?')}"
        lines = fields.get("last_lines") or []
        return text + ("\nits last output:\n" + "\n".join(f"  {line}" for line in lines) if lines else "")


class CallTimeout(ForgeError, TimeoutError):
    text = "{endpoint} did not answer within {timeout_s} s ({state} when the time was up)"

    def __str__(self) -> str:
        return self._compose(self.fields)


class CallCancelled(ForgeError):
    text = "{endpoint} was cancelled: {why}"


class Overloaded(ForgeError):
    """`what`, `limit_name`, `limit`, `retry_after_s`: a limit is reached; nothing was accepted."""

    text = "{what} has reached {limit_name}={limit}; retry in {retry_after_s} s, or raise the limit"


class NoHealthyReplicas(ForgeError):
    """`service`, `waited_s`, `replicas`: nobody could serve the call; `replicas` says what each is doing."""

    def _compose(self, fields: Mapping[str, Any]) -> str:
        doing = "; ".join(fields.get("replicas") or ["it has no replicas"])
        return f"{fields.get('service', '?')} had no healthy replica for {fields.get('waited_s', '?')} s: {doing}"


class ReplicaLost(ForgeError):
    text = "{replica} was lost while it held this call: {why}"


class OutcomeUnknown(ForgeError):
    text = "{endpoint} may or may not have run: {why}; it was not tried again"


class PoisonedRequest(ForgeError):
    text = "{endpoint}: this call was running on {attempts} replicas as they died; it is kept as a dead letter"


class RouterError(ForgeError):
    text = "router {router} of {endpoint} {why}"


class BatchError(ForgeError):
    text = "{endpoint}: {why}"


class SegmentLost(ForgeError):
    """`segment`: the file's name; `why`. The call may have run; its arguments or its result cannot be read any more."""

    text = "shared memory that a call's arguments or result lay in is gone ({segment}: {why}); did somebody clear /dev/shm?"


class SessionError(ForgeError):
    """Base of the errors of sessions. `session`, `service`."""


class UnknownSession(SessionError, LookupError):
    text = "{service} has no session {session!r}; it was never started, or it has ended"


class SessionClosed(SessionError):
    text = "session {session!r} of {service} is closed{why}"


class SessionLost(SessionError):
    text = "session {session!r} of {service} lost its state: {why}"


class FanoutError(ForgeError):
    """Some replicas failed. `results` and `errors`: dicts by replica index. Fan-outs are never re-routed."""

    def __init__(self, endpoint: str, results: dict[int, Any], errors: dict[int, BaseException]) -> None:
        self.results = results
        self.errors = errors
        said = "; ".join(f"replica {idx}: {type(error).__name__}: {error}" for idx, error in sorted(errors.items()))
        super().__init__(
            f"{endpoint}.fanout: {len(errors)} of {len(errors) + len(results)} replicas failed: {said}",
            endpoint=endpoint,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return FanoutError, (self.fields["endpoint"], self.results, self.errors)


class RemoteError(ForgeError):
    """A user's exception whose type cannot be rebuilt here. `type_name`, `remote_message`, `remote_traceback`."""

    text = "{type_name}: {remote_message}"


class RemoteTraceback(Exception):
    """The cause of an exception that was raised in another process: its str is the remote traceback."""

    def __init__(self, traceback: str) -> None:
        self.traceback = traceback
        super().__init__(traceback)

    def __str__(self) -> str:
        return f'\n"""\n{self.traceback}"""'


_BY_CODE: dict[str, type[ForgeError]] = {}


def _learn(cls: type[ForgeError]) -> None:
    _BY_CODE[cls.__name__] = cls
    for below in cls.__subclasses__():
        _learn(below)


_learn(ForgeError)


def from_wire(error: Any) -> ForgeError:
    """The error a peer reported as `[code, fields]`; an unknown code (a newer peer's) becomes a ForgeError saying so."""
    if not (isinstance(error, (list, tuple)) and len(error) == 2 and isinstance(error[1], dict)):
        return ProtocolError(f"a peer reported an error in no known form: {reprlib.repr(error)}")
    return _rebuild(str(error[0]), {str(key): value for key, value in error[1].items()})


def _rebuild(code: str, fields: dict[str, Any]) -> ForgeError:
    cls = _BY_CODE.get(code)
    if cls is None or cls is FanoutError:
        return ForgeError(f"{code}: {fields.get('message', fields)}")
    try:
        return cls(**fields)
    except Exception as error:
        # Fields come from a peer: of other types than the text expects, or named `self`. Whatever composing raises, the
        # fault is the peer's, and the call that failed still has to fail.
        return ProtocolError(
            f"a peer reported {code} with fields that do not fit it ({type(error).__name__}): {reprlib.repr(fields)}"
        )


def did_you_mean(name: str, known: Iterable[str], before: str = "") -> str:
    """The tail of a message about an unknown name: the closest known ones, after `before`. Empty when none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return before + "did you mean " + " or ".join(repr(other) for other in close) + "?" if close else ""


def _closest_or_all(name: object, known: Iterable[object]) -> str:
    names = sorted(str(one) for one in known)
    few = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
    return did_you_mean(str(name), names) or (f"there is {few}" if names else "there is none")
