"""Runs the host code that the DSL has compiled, on CPU tensors that say they are a GPU's, up to its launch.

So the grid, the strides and the TMA descriptors of the real call are those that the interpreter gets.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from .elf import Object

NONE, INT, FLOAT, DL_TENSOR = 0, 1, 3, 7  # TVMFFITypeIndex
CUDA = 2  # kDLCUDA
DL_CODES = {torch.bfloat16: 4, torch.float16: 2, torch.float32: 2, torch.float64: 2, torch.bool: 6, torch.uint8: 1}


class Any(ctypes.Structure):  # TVMFFIAny
    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint64))


class Dl(ctypes.Structure):  # DLTensor
    _fields_ = (
        *(("data", ctypes.c_uint64), ("device", ctypes.c_int32), ("index", ctypes.c_int32), ("ndim", ctypes.c_int32)),
        *(("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *(("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64))),
        ("offset", ctypes.c_uint64),
    )


class Config(ctypes.Structure):  # cudaLaunchConfig_t
    _fields_ = (
        *(("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("smem", ctypes.c_size_t)),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint32)),
    )


class Attribute(ctypes.Structure):  # cudaLaunchAttribute
    _fields_ = (("kind", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


NOTHING_TO_DO = (
    *("_cuKernelGetAttribute", "_cudaDeviceGetAttribute", "_cudaFuncSetAttribute", "_cudaKernelSetAttributeForDevice"),
    *("_cudaLibraryLoadData", "_cudaSetDevice", "cuda_dialect_init_library_once", "cuda_dialect_unload_library_once"),
    "TVMFFIEnvGetStream",
)
CLUSTER_DIMENSION = 4  # cudaLaunchAttributeClusterDimension


class Launch(NamedTuple):
    grid: int  # CTAs, along x
    block: int  # threads, along x
    cluster: int  # CTAs
    smem_bytes: int
    parameters: tuple[bytes, ...]
    kernel: str


class Host:
    """A compiled object's host function. parameter_bytes: the sizes of each kernel's parameters."""

    def __init__(self, image: bytes, symbol: str, parameter_bytes: Mapping[str, Sequence[int]]):
        self._bytes, self._kernels, self._launches, self._errors = parameter_bytes, [], [], []
        self._object = Object(image, self._functions())
        load = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        load(self._object.address(f"__cute_internal_{symbol}_cuda_load"))(ctypes.addressof(ctypes.c_void_p(1)))
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Any), ctypes.c_int32, ctypes.POINTER(Any))
        self._call = call(self._object.address(f"__tvm_ffi_{symbol}"))

    def __call__(self, *arguments) -> list[Launch]:
        """What it launches, of tensors and numbers as the compiled function takes them."""
        kept: list = []
        values = (Any * len(arguments))(*(_any(x, kept) for x in arguments))
        self._launches.clear()
        self._errors.clear()
        if self._call(None, values, len(arguments), ctypes.byref(Any())) or self._errors:
            raise RuntimeError(f"the compiled call refuses its arguments: {' '.join(self._errors)}")
        return list(self._launches)

    def _functions(self) -> dict[str, Callable]:
        """Stand-ins of everything that the host code calls. 0: done; there is one device, 0, and one stream."""
        p, i, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        done = ctypes.CFUNCTYPE(i)(lambda: 0)
        return dict.fromkeys(NOTHING_TO_DO, done) | {
            "_cudaGetDevice": ctypes.CFUNCTYPE(i, ctypes.POINTER(i))(_first_device),
            "_cudaLibraryGetKernel": ctypes.CFUNCTYPE(i, ctypes.POINTER(p), p, text)(self._get_kernel),
            "_cudaLaunchKernelEx": ctypes.CFUNCTYPE(i, ctypes.POINTER(Config), p, ctypes.POINTER(p))(self._launch),
            "TVMFFIErrorSetRaisedFromCStr": ctypes.CFUNCTYPE(None, text, text)(self._raised),
            "TVMFFIErrorSetRaisedFromCStrParts": ctypes.CFUNCTYPE(None, text, ctypes.POINTER(text), i)(
                self._raised_parts
            ),
            "CuteDSLRT_TVMFFISetRaisedCudaError": ctypes.CFUNCTYPE(None, p, i)(
                lambda _, code: self._errors.append(f"CUDA error {code}")
            ),
        }

    def _get_kernel(self, to, library, name: bytes) -> int:
        self._kernels.append(name.decode())
        to[0] = len(self._kernels)
        return 0

    def _launch(self, config, function, parameters) -> int:
        c = config.contents
        attributes = (Attribute * c.count).from_address(c.attributes)
        clusters = [a.value[0] for a in attributes if a.kind == CLUSTER_DIMENSION]
        kernel = self._kernels[function - 1]
        values = tuple(ctypes.string_at(parameters[i], n) for i, n in enumerate(self._bytes[kernel]))
        assert list(c.grid)[1:] == list(c.block)[1:] == [1, 1]
        self._launches.append(Launch(c.grid[0], c.block[0], *(clusters or [1]), c.smem, values, kernel))
        return 0

    def _raised(self, kind: bytes, message: bytes):
        self._errors.append(f"{kind.decode()}: {message.decode()}")

    def _raised_parts(self, kind: bytes, parts, count: int):
        self._raised(kind, b"".join(parts[i] or b"" for i in range(count)))


def _first_device(index) -> int:
    index[0] = 0
    return 0


def _any(x, kept: list) -> Any:
    if x is None:
        return Any(NONE, 0, 0)
    if isinstance(x, torch.Tensor):
        kept.append(_dl(x, kept))
        return Any(DL_TENSOR, 0, ctypes.addressof(kept[-1]))
    if isinstance(x, float):
        return Any(FLOAT, 0, int.from_bytes(ctypes.c_double(x), "little"))
    return Any(INT, 0, int(x) % (1 << 64))


def _dl(x: torch.Tensor, kept: list) -> Dl:
    shape, strides = ((ctypes.c_int64 * max(x.dim(), 1))(*values) for values in (x.shape, x.stride()))
    kept += [shape, strides]
    return Dl(x.data_ptr(), CUDA, 0, x.dim(), DL_CODES.get(x.dtype, 0), 8 * x.itemsize, 1, shape, strides, 0)
