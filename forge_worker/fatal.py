"""Which of a user's exceptions mean that the process itself is broken (design F6). Pure; torch is not imported for it.

After an error inside a CUDA kernel every further call of the context fails, whatever it computes: only a new process
helps. What else breaks a process its author knows, and names in `fatal_errors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

# As torch words them. Its type for them is of late torch.AcceleratorError, a RuntimeError as all were before.
_POISONED: Final = ("CUDA error:", "CUBLAS_STATUS_", "device-side assert")
# The context survives these: memory comes free again. cuBLAS says so too when it finds none for its workspace.
_ONLY_MEMORY: Final = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_CHAIN_AT_MOST: Final = 16  # exceptions looked at behind one another; a chain may be a circle


def breaks_process(error: BaseException, named: Iterable[str]) -> bool:
    """Whether the replica has to start anew after `error`. `named`: fatal_errors, "ValueError" or "package.module.Error";
    a base class stands for all below it. A poisoned context shows through the exceptions that wrap it."""
    named = frozenset(named)
    if named and any(
        cls.__name__ in named or f"{cls.__module__}.{cls.__qualname__}" in named for cls in type(error).__mro__
    ):
        return True
    return any(_poisons(one) for one in _chain(error))


def _poisons(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError":
        return False
    try:
        text = str(error)
    except Exception:  # a __str__ of the user's; torch's own has none
        return False
    return any(mark in text for mark in _POISONED) and not any(mark in text for mark in _ONLY_MEMORY)


def _chain(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    for _ in range(_CHAIN_AT_MOST):
        if following is None:
            return
        yield following
        following = following.__cause__ or following.__context__
