"""Huge pages for large frames. libzmq allocates each frame that it receives, and from 32 MiB on malloc has every piece from the kernel
anew: in pages of 4 KiB the faults of those take twice as long as all that is done with the frame. Pure: it makes an environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# glibc 2.35 and later asks the kernel for huge pages then (madvise), which most kernels give to who asks. Others do not look at it.
# A process costs it 1 to 2 MiB. What a worker's own code starts inherits it.
_TUNABLES: Final = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# The most that glibc keeps to be used again, on machines of 64 bits (M_MMAP_THRESHOLD): what is larger comes from the kernel each time.
NEVER_KEPT_FROM: Final = 32 << 20  # bytes


def with_huge_pages(environ: Mapping[str, str]) -> dict[str, str]:
    """For a process of ours that is about to be started. Whoever tunes glibc does so alone."""
    return {**_TUNABLES, **environ}
