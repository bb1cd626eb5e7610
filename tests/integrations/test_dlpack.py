"""Arrays of other libraries: NumPy and JAX on the CPU, where both are; what is shared is the same memory."""

import sys

import numpy as np
import pytest
import torch

from cute_attn import flash_fwd

try:
    import jax
except ImportError:
    jax = None

needs_jax = pytest.mark.skipif(jax is None, reason='jax is not installed: pip install "cute_attn[test]"')
SHAPES = (2, 4, 33, 16), (2, 2, 50, 16), (2, 2, 50, 16)


def arrays(dtype=np.float16, layout="bhsd"):
    random = np.random.default_rng(1)
    made = [random.standard_normal(shape).astype(dtype) for shape in SHAPES]
    return [x.transpose(0, 2, 1, 3) for x in made] if layout == "bshd" else made


def of_torch(qkv, **options):
    return flash_fwd(*(torch.from_numpy(x) for x in qkv), **options)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("causal", [False, True])
def test_numpy(causal, layout):
    qkv = arrays(layout=layout)
    o, lse = flash_fwd(*qkv, causal=causal, layout=layout, scale=0.3, return_lse=True)
    want, want_lse = of_torch(qkv, causal=causal, layout=layout, scale=0.3, return_lse=True)
    assert type(o) is type(lse) is np.ndarray and o.flags.writeable
    assert (o.dtype, lse.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(o, want.numpy())
    np.testing.assert_array_equal(lse, want_lse.numpy())
    assert type(flash_fwd(*qkv, layout=layout)) is np.ndarray


def test_out_is_written_in_place():
    qkv = arrays()
    room = np.full((2, 4, 33, 20), np.nan, np.float16)
    out = room[..., :16]
    o, _ = flash_fwd(*qkv, out=out, return_lse=True)
    assert o is out and flash_fwd(*qkv, out=out) is out
    np.testing.assert_array_equal(room[..., :16], of_torch(qkv).numpy())
    assert np.isnan(room[..., 16:]).all()


def test_read_only_arrays_are_read():
    qkv = arrays()
    want = of_torch(qkv).numpy()
    for x in qkv:
        x.flags.writeable = False
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":  # its DLPack cannot say that an array is read-only
        with pytest.raises(TypeError, match=r"q: numpy.ndarray does not share its memory"):
            flash_fwd(*qkv)
    else:
        np.testing.assert_array_equal(flash_fwd(*qkv), want)


class Stranger:
    def __dlpack__(self, **options):
        raise BufferError


class OfNoLibrary:
    """Shares its memory, and its module has no from_dlpack."""

    def __init__(self, x):
        self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__


Q, K, V = arrays()
FROZEN = np.zeros_like(Q)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: flash_fwd(Q, torch.from_numpy(K), V), TypeError, r"k: torch.Tensor came with q of numpy.ndarray; .*"),
        (lambda: flash_fwd(torch.from_numpy(Q), K, V), TypeError, r"k: .*numpy.ndarray came; torch.from_dlpack\(k\)"),
        (lambda: flash_fwd(Q, K, V, out=torch.from_numpy(Q)), TypeError, "out: torch.Tensor came with q of numpy"),
        (lambda: flash_fwd(Q, K, V, out=FROZEN), ValueError, "out: it is read-only"),
        (lambda: flash_fwd(Q, K, V, out=Q), ValueError, "out: shares memory with q"),
        (lambda: flash_fwd(*(x.astype(np.float32) for x in (Q, K, V))), (TypeError, ValueError), "q: .*float32"),
        (lambda: flash_fwd(Q.astype(object), K, V), TypeError, "q: numpy.ndarray does not share its memory"),
        (lambda: flash_fwd(Stranger(), Stranger(), Stranger()), TypeError, "q: .*Stranger does not share its memory"),
        (lambda: flash_fwd(*map(OfNoLibrary, (Q, K, V))), TypeError, r"q: .*no from_dlpack.*torch.from_dlpack\(q\)"),
        (lambda: flash_fwd([1.0], K, V), TypeError, "q: a torch.Tensor is needed, builtins.list came"),
        (lambda: flash_fwd(Q, K, V, layout="sbhd"), ValueError, "layout"),
        (lambda: flash_fwd(Q[:, :, ::-1], K, V), ValueError, r"q: strides \(.*-32.*\) bytes came, .* use q.copy\(\)"),
        (lambda: flash_fwd(Q, K, V[..., ::-1]), ValueError, r"v: strides .* run backwards"),
        (lambda: flash_fwd(Q, K, V, out=Q[::-1]), ValueError, r"out: strides .* run backwards"),
        (lambda: flash_fwd(torch.from_numpy(Q), K[::-1], V), TypeError, r"k: .*torch.from_dlpack\(k.copy\(\)\)"),
    ],
)
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()


class Array(OfNoLibrary):
    """Of a library whose from_dlpack is that of this module."""

    def __init__(self, x):
        super().__init__(x)
        self.x = x


def test_a_module_within_a_package(monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "from_dlpack", lambda x: Array(torch.from_dlpack(x)), raising=False)
    qkv = [torch.from_numpy(x) for x in arrays()]
    o = flash_fwd(*map(Array, qkv), causal=True)
    assert type(o) is Array
    assert torch.equal(o.x, flash_fwd(*qkv, causal=True))


@needs_jax
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_jax(dtype):
    qkv = [jax.numpy.asarray(x, dtype) for x in arrays(np.float32)]
    o, lse = flash_fwd(*qkv, causal=True, return_lse=True)
    want, want_lse = flash_fwd(*(torch.from_dlpack(x) for x in qkv), causal=True, return_lse=True)
    assert isinstance(o, jax.Array) and isinstance(lse, jax.Array) and o.dtype == dtype
    np.testing.assert_array_equal(np.asarray(o, np.float32), want.float().numpy())
    np.testing.assert_array_equal(np.asarray(lse), want_lse.numpy())


@needs_jax
def test_jax_is_eager_and_immutable():
    qkv = [jax.numpy.asarray(x) for x in arrays()]
    with pytest.raises(TypeError, match=r"q: .*Tracer does not share its memory .* outside of jax.jit"):
        jax.jit(flash_fwd)(*qkv)
    with pytest.raises(TypeError, match=r"out: .* arrays are immutable; omit it"):
        flash_fwd(*qkv, out=qkv[0])
    with pytest.raises(TypeError, match=r"k: numpy.ndarray came with q of jaxlib"):
        flash_fwd(qkv[0], np.asarray(qkv[1]), qkv[2])
