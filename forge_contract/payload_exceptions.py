"""How exceptions travel (A5). Part of the payload codec: see `payload` for the table.

An exception goes as its class by reference, what its built-in base needs to make it, and its attributes; beside these,
readable without any of them, its name, text and traceback. Who cannot or may not rebuild the type (module not imported
and no trust, arguments that do not travel) raises a RemoteError made of the latter. Rebuilding calls the `__new__` and
`__init__` of the built-in base alone, never those of the user's class: a custom `__init__` seldom fits `args`, and
untrusted bytes must not choose what runs. The `__cause__` of what was rebuilt is the RemoteTraceback.

Some never travel as themselves, since raising them at the caller would mean something else there: what is no
`Exception` (KeyboardInterrupt, SystemExit, CancelledError), StopIteration and StopAsyncIteration.
"""

from __future__ import annotations

import builtins
import traceback
from types import MemberDescriptorType
from typing import Any

from msgpack import ExtType

from forge_contract import payload_core as core
from forge_contract.errors import FanoutError, ForgeError, ProtocolError, RemoteError, RemoteTraceback, from_wire
from forge_contract.payload_classes import encode_pickle, look_up, reference, type_name
from forge_contract.payload_core import DECODERS, Decoder, EncodeOne, Encoder

_NEVER = (StopIteration, StopAsyncIteration)
# Of a longer text the beginning and the end travel; a RecursionError's traceback is cut by `traceback` itself.
_MAX_TEXT = 64 * 1024


def traceback_text(error: BaseException) -> str:
    """Its traceback as Python prints it, with causes. Does not raise, whatever the exception's own `__str__` does."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as broken:
        text = f"{type_name(type(error))}: <its traceback cannot be printed: {type(broken).__name__}>"
    return _shorten(text)


def _text(error: BaseException) -> str:
    try:
        return _shorten(str(error))
    except Exception as broken:
        return f"<its text cannot be printed: {type(broken).__name__}>"


def _shorten(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[: _MAX_TEXT // 2]}\n… {len(text) - _MAX_TEXT} characters left out …\n{text[-_MAX_TEXT // 2 :]}"


def _is_ours(cls: type) -> bool:
    return issubclass(cls, ForgeError) and cls.__module__ == "forge_contract.errors"


# ---- out


def _encode_exception(encoder: Encoder, error: BaseException) -> ExtType:
    trace = traceback_text(error)
    aside = len(encoder.buffers)
    try:
        if _is_ours(type(error)):
            return encoder.ext(core.EXT_ERROR, [_wire_form(error), trace])
        form = encoder.pack(_whole(encoder, error)) if _may_travel(error) else None
    except Exception:
        # An argument that cannot travel must not hide the error it came with; its text is on the way. Not only
        # `Cannot`: attributes may be properties that raise.
        del encoder.buffers[aside:]
        form = None
    if _is_ours(type(error)):
        return encoder.ext(core.EXT_ERROR, [["ForgeError", {"message": _text(error)}], trace])
    return encoder.ext(core.EXT_EXCEPTION, [type_name(type(error)), _text(error), trace, form])


def _wire_form(error: Any) -> list[Any]:
    if isinstance(error, FanoutError):
        return ["FanoutError", {**error.fields, "results": error.results, "errors": error.errors}]
    return [*error.to_wire()]


def encode_degraded(encoder: Encoder, error: BaseException) -> ExtType:
    """The error as a RemoteError will show it: name, text, traceback."""
    return encoder.ext(core.EXT_EXCEPTION, [type_name(type(error)), _text(error), traceback_text(error), None])


def _may_travel(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, _NEVER)


def _whole(encoder: Encoder, error: BaseException) -> list[Any]:
    cls = type(error)
    ref: Any = reference(cls)
    if ref is None:
        ref = encode_pickle(encoder, cls)  # a class of a notebook, by value; raises `Cannot` without trust
    # The base's own __reduce__ knows what its __new__ wants (OSError: errno, strerror, filename); a __reduce__ of the
    # user's class may name any function, so it is not asked.
    args = _built_in_base(cls).__reduce__(error)[1]
    state = dict(vars(error))
    for owner in cls.__mro__:
        for name, slot in vars(owner).items():
            if isinstance(slot, MemberDescriptorType) and not name.startswith("__"):
                try:
                    value = slot.__get__(error, cls)
                except AttributeError:
                    continue  # a slot that was never filled
                # For C, a member set to None is not the same as one not set: OSError would print its file name.
                if value is not None or not _is_built_in(owner):
                    state.setdefault(name, value)
    for name in _SET_BY_ARGS.get(_built_in_base(cls), ()):
        state.pop(name, None)
    return [ref, list(args), state]


# Members that the base's __new__ and __init__ fill from the arguments again.
_SET_BY_ARGS: dict[Any, tuple[str, ...]] = {
    BaseExceptionGroup: ("message", "exceptions"),
    ExceptionGroup: ("message", "exceptions"),
    UnicodeEncodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeDecodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeTranslateError: ("object", "start", "end", "reason"),
    AttributeError: ("obj",),  # the object may be anything, and large
}


def _is_built_in(cls: type) -> bool:
    return vars(builtins).get(cls.__name__) is cls


def _built_in_base(cls: type) -> Any:
    base = cls
    while not _is_built_in(base):
        assert base.__base__ is not None
        base = base.__base__
    return base


# ---- in


def _decode_exception(decoder: Decoder, data: bytes) -> BaseException:
    name, text, trace, form = decoder.fields(data, 4)
    error: BaseException | None = None
    if form is not None:
        try:
            error = _rebuild(decoder, form)
        except Exception as refused:
            # Whatever stands against rebuilding it here, the caller is to learn of the error itself.
            error = _remote(name, text, trace)
            error.fields["not_rebuilt_because"] = f"{type(refused).__name__}: {refused}"
    if error is None:
        error = _remote(name, text, trace)
    BaseException.__setattr__(error, "__cause__", RemoteTraceback(str(trace)))  # past a __setattr__ of the class
    return error


def _remote(name: Any, text: Any, trace: Any) -> RemoteError:
    return RemoteError(type_name=str(name), remote_message=str(text), remote_traceback=str(trace))


def _rebuild(decoder: Decoder, form: Any) -> BaseException:
    ref, args, state = decoder.fields(form, 3)
    if isinstance(ref, type) and decoder.trusted:
        cls = ref
    else:
        cls = look_up(ref, decoder.trusted)
    if not issubclass(cls, Exception) or issubclass(cls, _NEVER):
        raise ProtocolError(f"{ref!r:.80} is no exception that travels")
    if type(args) is not list or type(state) is not dict:
        raise ProtocolError("an exception has no list of arguments and dict of attributes")
    base = _built_in_base(cls)
    error: BaseException = base.__new__(cls, *args)
    base.__init__(error, *args)
    for name, value in state.items():
        if type(name) is not str or (name.startswith("__") and name != "__notes__"):
            continue
        for owner in cls.__mro__:
            slot = vars(owner).get(name)
            if isinstance(slot, MemberDescriptorType):
                slot.__set__(error, value)
                break
        else:
            vars(error)[name] = value
    return error


def _decode_error(decoder: Decoder, data: bytes) -> ForgeError:
    form, trace = decoder.fields(data, 2)
    error = _fanout_error(form) or from_wire(form)
    if type(error) is ProtocolError and form[0] != ProtocolError.__name__:
        raise error  # the fields do not fit the error they are said to be of
    error.__cause__ = RemoteTraceback(str(trace))
    return error


def _fanout_error(form: Any) -> FanoutError | None:
    """The one error of ours whose fields hold values and exceptions; None if this form is another's."""
    if type(form) is not list or len(form) != 2 or form[0] != "FanoutError" or type(form[1]) is not dict:
        return None
    results, errors = form[1].get("results"), form[1].get("errors")
    if type(results) is not dict or type(errors) is not dict:
        return None
    if not all(isinstance(error, BaseException) for error in errors.values()):
        return None
    return FanoutError(str(form[1].get("endpoint", "?")), results, errors)


def classify(cls: type) -> EncodeOne | None:
    return _encode_exception if issubclass(cls, BaseException) else None


DECODERS.update({core.EXT_EXCEPTION: _decode_exception, core.EXT_ERROR: _decode_error})
