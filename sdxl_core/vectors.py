"""The state that ISA-L leaves a thread's vector registers in."""

from __future__ import annotations

import numpy as np

_ONES = np.ones(256, np.float32)


def clear_vector_state() -> None:
    """Call after ISA-L, on the same thread.

    It leaves the upper halves of the vector registers in use; SSE code (OpenCV's, libspng's) then runs at a quarter of
    its speed until AVX code cleans up behind itself, which NumPy's addition does.
    """
    np.add(_ONES, _ONES, out=np.empty_like(_ONES))
