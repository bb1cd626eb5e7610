"""Everything wrong raises before any launch, naming the argument, what came, what is allowed and the way out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cute_attn import checks, flash_fwd, warmup
from cute_attn.checks import Spec
from cute_attn.modifiers import NONE
from cute_attn.reference import attention

CUDA = torch.device("cuda:0")


def x(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


Q, K = x(2, 4, 10, 64), x(2, 2, 12, 64)

WRONG = {
    "rank": (lambda: flash_fwd(Q[0], K, K), ValueError, r"q: 3 dimensions.*\(B, H, Sq, D\)"),
    "rank of k, bshd": (lambda: flash_fwd(Q, K[0], K, layout="bshd"), ValueError, r"k: 3 dim.*\(B, Sk, Hk, D\)"),
    "list": (lambda: flash_fwd(Q.tolist(), K, K), TypeError, "q: a torch.Tensor is needed, builtins.list came"),
    "none": (lambda: flash_fwd(Q, None, K), TypeError, "k: a torch.Tensor is needed, builtins.NoneType"),
    "numpy": (lambda: flash_fwd(Q, K, np.ones(3)), TypeError, r"v: .*numpy.ndarray came; torch.from_dlpack\(v\)"),
    "sparse": (lambda: flash_fwd(Q.to_sparse(), K, K), TypeError, r"q: a dense tensor.*to_dense"),
    "float32": (lambda: flash_fwd(Q.float(), K, K), TypeError, "q: torch.float32 is not supported; use torch.bf"),
    "dtype mix": (lambda: flash_fwd(Q, K.half(), K), TypeError, "k: torch.float16 does not match q's torch.bfloat16"),
    "v dtype": (lambda: flash_fwd(Q, K, K.half()), TypeError, "v: torch.float16 does not match"),
    "device mix": (lambda: flash_fwd(Q, K.to("meta"), K), ValueError, "k: device meta is not supported"),
    "head_dim 520": (
        lambda: flash_fwd(x(1, 1, 1, 520), K, K),
        ValueError,
        "q: head_dim 520 .* multiple of 8 up to 512",
    ),
    "head_dim 60": (lambda: flash_fwd(x(1, 1, 1, 60), K, K), ValueError, "q: head_dim 60"),
    "head_dim 0": (lambda: flash_fwd(x(1, 1, 1, 0), K, K), ValueError, "q: head_dim 0"),
    "k's D": (
        lambda: flash_fwd(Q, x(2, 2, 12, 32), x(2, 2, 12, 32)),
        ValueError,
        r"k: shape \(2, 2, 12, 32\) does not",
    ),
    "k's B": (lambda: flash_fwd(Q, x(1, 2, 12, 64), x(1, 2, 12, 64)), ValueError, "k: shape .* with q's B and D"),
    "v's shape": (lambda: flash_fwd(Q, K, x(2, 2, 11, 64)), ValueError, r"v: shape \(2, 2, 11, 64\) does not fit k's"),
    "heads": (lambda: flash_fwd(Q, x(2, 3, 12, 64), x(2, 3, 12, 64)), ValueError, "k: 3 heads do not divide q's 4"),
    "no heads": (lambda: flash_fwd(Q, x(2, 0, 12, 64), x(2, 0, 12, 64)), ValueError, "k: 0 heads do not divide"),
    "layout": (lambda: flash_fwd(Q, K, K, layout="sbhd"), ValueError, "layout: 'sbhd' is not known; use \"bhsd\""),
    "layout type": (lambda: flash_fwd(Q, K, K, layout=["bhsd"]), ValueError, "layout: .* is not known"),
    "causal type": (lambda: flash_fwd(Q, K, K, causal=1), TypeError, "causal: a bool is needed, 1 came"),
    "lse type": (lambda: flash_fwd(Q, K, K, return_lse="yes"), TypeError, "return_lse: a bool is needed, 'yes'"),
    "scale nan": (lambda: flash_fwd(Q, K, K, scale=float("nan")), ValueError, "scale: nan is not finite"),
    "scale inf": (lambda: flash_fwd(Q, K, K, scale=-float("inf")), ValueError, "scale: -inf is not finite"),
    "scale 1e300": (lambda: flash_fwd(Q, K, K, scale=1e300), ValueError, "scale: 1e[+]300 is not finite in float32"),
    "scale tensor": (lambda: flash_fwd(Q, K, K, scale=torch.tensor(1.0)), TypeError, "scale: .* Tensor came.*item()"),
    "scale text": (lambda: flash_fwd(Q, K, K, scale="1"), TypeError, "scale: a real number is needed, str came"),
    "out and grad": (
        lambda: flash_fwd(Q, K.clone().requires_grad_(), K, out=torch.empty_like(Q)),
        ValueError,
        r"out: given with inputs that require grad; omit it, or call under torch.no_grad\(\)",
    ),
    "vmap": (
        lambda: torch.vmap(lambda q: flash_fwd(q, K, K))(Q.expand(3, -1, -1, -1, -1)),
        TypeError,
        "q: a tensor inside a transform of torch.func",
    ),
    "torch.func.grad": (
        lambda: torch.func.grad(lambda k: flash_fwd(Q, k, K).sum())(K),
        TypeError,
        "k: a tensor inside a transform of torch.func",
    ),
    "out shape": (lambda: flash_fwd(Q, K, K, out=x(2, 4, 11, 64)), ValueError, r"out: shape .* is not q's"),
    "out dtype": (lambda: flash_fwd(Q, K, K, out=Q.half()), TypeError, "out: torch.float16 came, q's torch.bf"),
    "out list": (lambda: flash_fwd(Q, K, K, out=[]), TypeError, "out: a torch.Tensor is needed"),
    "out is q": (lambda: flash_fwd(Q, K, K, out=Q), ValueError, "out: shares memory with q"),
    "out is v": (lambda: flash_fwd(K, K, Q[:, :2], out=Q[:, :2]), ValueError, "v: shape"),
    "out expanded": (
        lambda: flash_fwd(Q, K, K, out=x(1, 4, 10, 64).expand(2, -1, -1, -1)),
        ValueError,
        "more than once",
    ),
    "out grad": (lambda: flash_fwd(Q, K, K, out=Q.clone().requires_grad_()), ValueError, r"out: .* out.detach\(\)"),
    "warmup D": (lambda: warmup(520), ValueError, "head_dim 520"),
    "warmup dtype": (lambda: warmup(64, dtype="fp8"), TypeError, "fp8 is not supported"),
    "warmup layout": (lambda: warmup(64, layout="bsd"), ValueError, "layout: 'bsd' is not known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_positional_beyond_v_is_refused():
    with pytest.raises(TypeError, match="positional"):
        flash_fwd(Q, K, K, True)


def spec(shape, stride, device=CUDA):
    return Spec(torch.Size(shape), stride, torch.bfloat16, device)


@pytest.mark.parametrize(
    ("shape", "stride", "words"),
    [
        ((2, 4, 10, 64), (2560, 640, 1, 10), "stride 10 in the last dimension.*1 is needed: use q.contiguous"),
        ((2, 4, 10, 64), (2640, 660, 66, 1), "stride 66 in dimension 2.*multiple of 8 elements"),
        ((2, 4, 10, 64), (2564, 640, 64, 1), "stride 2564 in dimension 0"),
    ],
)
def test_strides_that_tma_cannot_take(shape, stride, words):
    q, k = spec(shape, stride), spec((2, 4, 10, 64), (2560, 640, 64, 1))
    with pytest.raises(ValueError, match=f"q: {words}"):
        checks.problem(q, k, k, False, "bhsd")


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2, 4, 10, 64), (0, 0, 64, 1)), ((1, 1, 10, 64), (3, 5, 64, 1)), ((2, 4, 1, 64), (512, 64, 7, 1))],
)
def test_expanded_and_single_dimensions_may_have_any_stride(shape, stride):
    k = spec((shape[0], 1, 10, 64), (640, 640, 64, 1))
    checks.problem(spec(shape, stride), k, k, True, "bhsd")
    with pytest.raises(ValueError, match=r"k: on cuda:1, but q is on cuda:0"):
        checks.problem(spec(shape, stride), spec(k.shape, k.stride, torch.device("cuda:1")), k, True, "bhsd")


def test_too_many_tiles_and_rows():
    k = spec((2**24, 64, 0, 64), (0, 0, 64, 1))
    with pytest.raises(ValueError, match="q: 1073741824 tiles"):
        checks.problem(spec((2**24, 64, 64, 64), (0, 0, 0, 1)), k, k, False, "bhsd")
    k = spec((1, 1, 2**30 + 1, 64), (0, 0, 0, 1))
    with pytest.raises(ValueError, match="k: 1073741825 rows"):
        checks.problem(spec((1, 1, 64, 64), (0, 0, 0, 1)), k, k, False, "bhsd")


def test_more_than_the_backwards_grid_takes():
    for layout, shape, what in (("bhsd", (1, 65_536, 8, 8), "heads"), ("bshd", (65_536, 8, 1, 8), "batches")):
        with pytest.raises(ValueError, match=f"q: 65536 {what}; with gradients at most 65535"):
            checks.gradients(SimpleNamespace(is_cuda=True, shape=shape), layout, NONE)
        checks.gradients(SimpleNamespace(is_cuda=True, shape=(65_535, 65_535, 65_535, 8)), layout, NONE)
        checks.gradients(SimpleNamespace(is_cuda=False, shape=shape), layout, NONE)


def test_wrong_arguments_are_still_wrong_the_second_time():
    flash_fwd(Q, K, K, causal=True)
    for _ in range(2):
        with pytest.raises(TypeError, match="causal"):
            flash_fwd(Q, K, K, causal=1)
        with pytest.raises(ValueError, match="out: given with"):
            flash_fwd(Q.clone().requires_grad_(), K, K, out=torch.empty_like(Q))


def test_slices_of_a_packed_buffer_do_not_overlap():
    packed = x(2, 10, 4, 2, 64)
    q, k, v, o = packed.unbind(2)
    want = attention(q, k, v, layout="bshd")[0]
    assert flash_fwd(q, k, v, layout="bshd", out=o) is o
    assert (o - want).abs().max() < 0.02
    rows = x(2, 4, 20, 64)
    assert not checks.overlap(rows[:, :, ::2], rows[:, :, 1::2])
    assert checks.overlap(rows[:, :, ::2], rows[:, :, ::2])


@given(data=st.data())
def test_overlap_is_never_missed(data):
    """Against the sets of elements that two random views of one buffer address."""
    buffer = torch.arange(4096)

    def view():
        shape = [data.draw(st.integers(1, 3)) for _ in range(3)] + [data.draw(st.integers(1, 4))]
        stride = [data.draw(st.sampled_from([0, 1, 4, 8, 12, 24, 48, 96])) for _ in range(3)] + [1]
        return buffer.as_strided(shape, stride, data.draw(st.integers(0, 60)))

    a, b = view(), view()
    if set(a.flatten().tolist()) & set(b.flatten().tolist()):
        assert checks.overlap(a, b)


def test_cpu_is_computed_by_torch():
    for causal in (False, True):
        for layout in ("bhsd", "bshd"):
            q, k = (Q, K) if layout == "bhsd" else (Q.transpose(1, 2), K.transpose(1, 2))
            o, lse = flash_fwd(q, k, k, causal=causal, layout=layout, return_lse=True, scale=-0.3)
            want, want_lse = attention(q, k, k, causal=causal, layout=layout, scale=-0.3)
            assert (o.dtype, lse.dtype) == (q.dtype, torch.float32)
            torch.testing.assert_close(o.double(), want, rtol=0.01, atol=0.01)
            torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
