"""How numpy arrays and torch tensors travel: dtype, shape and memory, uncopied out and in. Part of the payload codec.

Neither library is imported here before a value needs it (L2): arrays are known by the name of their class, decoding
one imports its library.

Going out, a contiguous array of 32 KiB or more (C or Fortran order) is its own frame, a view of the caller's memory:
who changes the array before the call is answered may change what is sent. Others are copied once.

Coming in, an array is a view of the received frame and no copy. That memory belongs to this process alone (ZeroMQ
received it over ipc or tcp, and the frame is kept alive by the array), so writing into it harms nobody. Whether numpy
and torch allow it follows from the frame: `zmq.Frame.buffer` (received with `copy=False`) is writable, so arrays are
writable, and `torch.frombuffer` has nothing to warn about. Bytes (`copy=True`, or both ends in one process) are not,
and other code may hold the same bytes: numpy then gives a read-only view; torch knows no read-only tensors, so a
tensor copies (about 0.8 ms for 16 MiB). Transports should therefore receive large frames with `copy=False`. Arrays
below 32 KiB lie in the document and always come out as writable copies. Whoever decodes a payload with frames twice
gets two views of one memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from msgpack import ExtType

from forge_contract import payload_core as core
from forge_contract.errors import ProtocolError, SerializationError
from forge_contract.payload_core import DECODERS, Decoder, EncodeOne, Encoder
from forge_contract.payload_walk import Cannot

if TYPE_CHECKING:
    import numpy as np
    import torch


def _numpy() -> Any:
    try:
        import numpy as np
    except ImportError as error:
        raise _missing("numpy.ndarray", "numpy") from error
    return np


def _missing(type_name: str, module: str) -> SerializationError:
    return SerializationError(
        where="a received value",
        type_name=type_name,
        why=f"{module} is not installed here; install forge-broker[torch]",
    )


def _describe(dtype: Any) -> Any:
    """A dtype as plain data, or None when bytes alone do not make it (objects, variable strings, user dtypes)."""
    if dtype.hasobject or dtype.num >= 256 or dtype.kind not in "biufcmMSUV":
        return None
    if dtype.fields is None and dtype.subdtype is None:
        return dtype.str
    return _numpy().lib.format.dtype_to_descr(dtype)


def _dtype(description: Any) -> Any:
    np = _numpy()
    if type(description) is not str:
        dtype = np.lib.format.descr_to_dtype(description)
    else:
        dtype = np.dtype(description)
    if dtype.hasobject:
        raise ProtocolError("a payload has an array of objects")
    return dtype


def _encode_ndarray(encoder: Encoder, value: np.ndarray[Any, Any]) -> ExtType:
    description = _describe(value.dtype)
    if description is None:
        from forge_contract.payload_classes import encode_pickle

        return encode_pickle(encoder, value, f"an array of dtype {value.dtype} is more than its bytes")
    order = "C"
    array = value
    if not array.flags.c_contiguous:
        if array.flags.f_contiguous:
            order = "F"
            array = array.T
        else:
            array = array.copy(order="C")
    if not array.nbytes:
        return encoder.ext(core.EXT_NDARRAY, [description, list(value.shape), order, b""])
    # As bytes: the buffer protocol has no word for dates, and msgpack none for a view with a format.
    flat = array.reshape(-1)
    if flat.strides[0] != flat.itemsize:  # of a single element, where every stride is contiguous
        flat = flat.copy()
    memory = flat.view("u1").data
    return encoder.ext(core.EXT_NDARRAY, [description, list(value.shape), order, encoder.aside(memory)])


def _decode_ndarray(decoder: Decoder, data: bytes) -> np.ndarray[Any, Any]:
    description, shape, order, aside = decoder.fields(data, 4)
    numpy = _numpy()
    dtype = _dtype(description)
    memory = _memory(decoder, aside, shape, dtype.itemsize)
    if not len(memory):
        array: np.ndarray[Any, Any] = numpy.empty(shape, dtype, order)
    else:
        array = numpy.ndarray(shape, dtype, memory, order=order)
    return array if array.flags.aligned else array.copy(order)


def _memory(decoder: Decoder, aside: Any, shape: Any, itemsize: int) -> Any:
    """The memory of an array of this shape: the frame, or a writable copy of what was in the document."""
    if type(shape) is not list or not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError(f"a payload has an array of shape {shape!r:.80}")
    memory = decoder.buffer(aside)
    expected = math.prod(shape) * itemsize
    if len(memory) != expected:
        raise ProtocolError(f"a payload has an array of shape {shape!r:.80} in {len(memory)} bytes, not {expected}")
    return bytearray(memory) if type(aside) is bytes else memory


def _encode_scalar(encoder: Encoder, value: np.generic) -> ExtType:
    description = _describe(value.dtype)
    if description is None:
        from forge_contract.payload_classes import encode_pickle

        return encode_pickle(encoder, value)
    return encoder.ext(core.EXT_SCALAR, [description, value.tobytes()[: value.dtype.itemsize]])


def _decode_scalar(decoder: Decoder, data: bytes) -> np.generic:
    description, memory = decoder.fields(data, 2)
    dtype = _dtype(description)
    if type(memory) is not bytes or len(memory) != dtype.itemsize:
        raise ProtocolError(f"a payload has a scalar of dtype {dtype} in other than {dtype.itemsize} bytes")
    scalar: np.generic = _numpy().ndarray((), dtype, bytearray(memory))[()] if memory else dtype.type()
    return scalar


def _encode_tensor(encoder: Encoder, value: torch.Tensor) -> ExtType:
    """Gradients stay at home: the tensor arrives detached, `requires_grad` False, a Parameter as a Tensor.

    A tensor of a GPU is copied to the CPU here and arrives there; its device goes along for the curious. The receiver
    knows which of its own GPUs it wants.
    """
    import torch

    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        from forge_contract.payload_classes import encode_pickle

        return encode_pickle(encoder, value, "only dense tensors with memory travel as such")
    name = str(value.dtype).removeprefix("torch.")
    plain = value.detach().resolve_conj().resolve_neg()
    meta = [name, list(value.shape), str(value.device)]
    if not plain.numel():
        return encoder.ext(core.EXT_TENSOR, [*meta, b""])
    try:
        flat = plain.cpu().contiguous().reshape(-1)
        if flat.stride(0) != 1:  # of a single element, and contiguous in the eyes of torch
            flat = flat.clone(memory_format=torch.contiguous_format)
        memory = flat.view(torch.uint8).numpy()
    except (RuntimeError, TypeError) as error:
        raise Cannot(value, f"its memory cannot be read as bytes: {error}") from error
    return encoder.ext(core.EXT_TENSOR, [*meta, encoder.aside(memory.data)])


def _decode_tensor(decoder: Decoder, data: bytes) -> torch.Tensor:
    name, shape, _device, aside = decoder.fields(data, 4)
    try:
        import torch
    except ImportError as error:
        raise _missing("torch.Tensor", "torch") from error
    dtype = vars(torch).get(name) if type(name) is str else None
    if not isinstance(dtype, torch.dtype) or name.startswith("q"):  # quantized ones need more than their bytes
        raise ProtocolError(f"a payload has a tensor of the unknown dtype {name!r:.40}")
    memory = _memory(decoder, aside, shape, dtype.itemsize)
    if not len(memory):
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(core.writable(memory), dtype=torch.uint8)
    # ZeroMQ gives large messages memory of their own, aligned to 8 bytes; kernels may rely on an element's alignment.
    if tensor.data_ptr() % min(dtype.itemsize, 8):
        tensor = tensor.clone()
    return tensor.view(dtype).reshape(shape)


# By name, so that a library which another thread is just importing is not looked into.
_CLASSES: dict[tuple[str, str], EncodeOne] = {
    ("numpy", "ndarray"): _encode_ndarray,
    ("numpy", "memmap"): _encode_ndarray,
    ("torch", "Tensor"): _encode_tensor,
    ("torch.nn.parameter", "Parameter"): _encode_tensor,
}


def classify(cls: type) -> EncodeOne | None:
    if any((base.__module__, base.__qualname__) == ("numpy", "generic") for base in cls.__mro__):
        return _encode_scalar
    return _CLASSES.get((cls.__module__, cls.__qualname__))


DECODERS.update({core.EXT_NDARRAY: _decode_ndarray, core.EXT_SCALAR: _decode_scalar, core.EXT_TENSOR: _decode_tensor})
