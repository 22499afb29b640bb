"""The kernels' structures and functions as Python sees them: `kernels/types.h`, field by field."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_double, c_int64, c_void_p

from engine.backends.native import build


class CMatrix(ctypes.Structure):
    _fields_ = (
        ("kind", c_int64),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("blocks", c_void_p),
        ("bias", c_void_p),
    )


class CLayer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", CMatrix),
        ("o", CMatrix),
        ("gate_up", CMatrix),
        ("down", CMatrix),
    )


class CDecoder(ctypes.Structure):
    _fields_ = (
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("norm_eps", c_double),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layers", POINTER(CLayer)),
    )


class CPaging(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("num_requests", c_int64),
        ("num_threads", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("num_slots", c_int64),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("slots", c_void_p),
        ("prefix_len", c_void_p),
        ("ancestors", c_void_p),
        ("starts", c_void_p),
        ("block_tables", c_void_p),
    )


_FUNCTIONS = {
    "gorgon_pass_bytes": (c_int64, (POINTER(CDecoder), c_int64, c_int64)),
    "gorgon_pass": (
        None,
        (POINTER(CDecoder), POINTER(CPaging), c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "gorgon_linear_bytes": (c_int64, (c_int64, c_int64, c_int64)),
    "gorgon_linear": (None, (POINTER(CMatrix), c_void_p, c_int64, c_void_p, c_int64, c_void_p)),
    "gorgon_prefix_bytes": (c_int64, (POINTER(CDecoder), c_int64, c_int64)),
    "gorgon_prefix": (
        None,
        (POINTER(CDecoder), POINTER(CPaging), c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "gorgon_hydra_bytes": (c_int64, (c_int64, c_int64, c_int64, c_int64)),
    "gorgon_hydra": (
        None,
        (
            *(POINTER(CMatrix), POINTER(CMatrix), c_void_p, c_double, c_void_p, c_void_p, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
        ),
    ),
    "gorgon_grow_bytes": (c_int64, (c_int64, c_int64, c_int64, c_int64, c_int64, c_int64)),
    "gorgon_grow": (
        None,
        (
            *(POINTER(CMatrix), c_int64, POINTER(CMatrix), c_void_p, c_double, c_void_p, c_int64, c_void_p),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
        ),
    ),
    "gorgon_noise": (None, (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64)),
    "gorgon_draw_bytes": (c_int64, (c_int64, c_int64)),
    "gorgon_draw": (
        None,
        (c_void_p, c_int64, c_int64, *(c_void_p,) * 5, c_void_p, c_int64, c_void_p),
    ),
    "gorgon_argmax": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "gorgon_attend": (None, (POINTER(CPaging), c_int64, c_void_p, c_void_p)),
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels with their signatures, or None where this machine cannot have them."""
    library = build.load()
    if library is not None:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    return library
