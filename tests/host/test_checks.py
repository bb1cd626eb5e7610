"""Everything wrong raises before any launch, naming the argument, what came, what is allowed, with a hint."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from cute_attn import BlockLists, checks, flash_fwd, flash_fwd_varlen, warmup
from cute_attn.checks import Spec
from cute_attn.features.window import window as bounded
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
            checks.grid(SimpleNamespace(is_cuda=True, shape=shape), layout)
        checks.grid(SimpleNamespace(is_cuda=True, shape=(65_535, 65_535, 65_535, 8)), layout)
        checks.grid(SimpleNamespace(is_cuda=False, shape=shape), layout)


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


class Wrapped(torch.Tensor):
    """Has another tensor in place of memory."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(x.inner if isinstance(x, Wrapped) else x for x in args), **(kwargs or {}))


class Named(torch.Tensor):
    """Has memory, and dispatches as torch does."""


ONE = torch.ones(4)
VARLEN = x(22, 4, 64), x(22, 2, 64), x(22, 2, 64)
CU = torch.tensor([0, 10, 22], dtype=torch.int32)
LISTS = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
WRAPPED = {
    "q": lambda: flash_fwd(Wrapped(Q), K, K),
    "k": lambda: flash_fwd(Q, Wrapped(K), K),
    "v": lambda: flash_fwd(Q, K, Wrapped(K), return_lse=True),
    "out": lambda: flash_fwd(Q, K, K, out=Wrapped(Q)),
    "alibi_slopes": lambda: flash_fwd(Q, K, K, alibi_slopes=Wrapped(ONE)),
    "sinks": lambda: flash_fwd(Q, K, K, sinks=Wrapped(ONE)),
    "rng_state": lambda: flash_fwd(Q, K, K, dropout_p=0.5, rng_state=Wrapped(torch.ones(2, dtype=torch.int64))),
    "score_mod": lambda: flash_fwd(Q, K, K, score_mod=lambda s, b, h, i, j, t: s + t[h], aux=(Wrapped(ONE),)),
    "block_mask: kv_num_blocks": lambda: flash_fwd(Q, K, K, block_mask=BlockLists(Wrapped(LISTS[0]), LISTS[1])),
    "cu_seqlens_q": lambda: flash_fwd_varlen(*VARLEN, Wrapped(CU), CU),
    "seqused_k": lambda: flash_fwd_varlen(*VARLEN, CU, CU, seqused_k=Wrapped(CU[1:] - CU[:-1])),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_tensors_without_memory_are_refused(name):
    """Also where the like, with memory, has come before."""
    flash_fwd(Q, K, K)
    for _ in range(2):
        with pytest.raises(
            TypeError, match=f"^{name}: a .*Wrapped came, which has no memory of its own; pass the tensor"
        ):
            WRAPPED[name]()
    with torch.no_grad(), pytest.raises(TypeError, match="no memory of its own"):
        WRAPPED[name]()


def test_a_dtensor_is_told_to_local():
    code = (
        "import torch, torch.distributed as dist, cute_attn\n"
        "from torch.distributed.tensor import Shard, distribute_tensor\n"
        "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\n"
        "mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))\n"
        "q = distribute_tensor(torch.randn(1, 2, 8, 16).bfloat16(), mesh, [Shard(1)])\n"
        "assert cute_attn.flash_fwd(q.to_local(), q.to_local(), q.to_local()).shape == q.shape\n"
        "for call in (lambda: cute_attn.flash_fwd(q, q, q), lambda: cute_attn.flash_fwd(q.to_local(), q, q)):\n"
        "    try: call()\n"
        "    except TypeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2 and "DTensor came" in said[0], done.stderr
    assert [line.partition("pass ")[2] for line in said] == [
        f"{name}.to_local(), sharded along the batch or the heads" for name in "qk"
    ]


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.as_subclass(Named)], ids=["Parameter", "a subclass"])
def test_subclasses_with_memory_run(kind):
    want = flash_fwd(Q, K, K)
    with torch.no_grad():
        assert torch.equal(flash_fwd(kind(Q), kind(K), kind(K)), want)
        packed = flash_fwd_varlen(*map(kind, VARLEN), CU.as_subclass(Named), CU)
    assert torch.equal(packed, flash_fwd_varlen(*VARLEN, CU, CU))


def test_stand_ins_of_tracers_get_the_operator():
    with FakeTensorMode():
        fake = torch.empty(2, 4, 10, 64, dtype=torch.bfloat16)
        o, lse = flash_fwd(fake, fake[:, :2], fake[:, :2], causal=True, return_lse=True)
    assert isinstance(o, FakeTensor) and (o.shape, lse.shape, lse.dtype) == (fake.shape, (2, 4, 10), torch.float32)


def test_nested_tensors_are_told_what_runs():
    jagged = torch.nested.nested_tensor([x(10, 4, 64), x(12, 4, 64)], layout=torch.jagged)
    with pytest.raises(
        TypeError, match=r"q: a nested tensor came.*pass q.values\(\), .*q.offsets\(\).to\(torch.int32\)"
    ):
        flash_fwd(jagged, jagged, jagged, layout="bshd")
    q = jagged.transpose(1, 2)
    with pytest.raises(TypeError, match=r"q: .*pass q.transpose\(1, 2\).values\(\)"):
        flash_fwd(q, q, q)
    rows, cu_seqlens = q.transpose(1, 2).values(), q.offsets().to(torch.int32)
    found = flash_fwd_varlen(rows, rows, rows, cu_seqlens, cu_seqlens)
    for part, sequence in zip(found.split([10, 12]), jagged.unbind(), strict=True):
        assert torch.equal(part, flash_fwd(*[sequence[None]] * 3, layout="bshd")[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_torchs_first_kind_too():
    strided = torch.nested.nested_tensor([x(4, 10, 64), x(4, 12, 64)])
    with pytest.raises(
        TypeError, match=r"k: a nested tensor came.*make it jagged, torch.nested.nested_tensor\(k.unbind"
    ):
        flash_fwd(Q, strided, strided)


def test_numpys_integers_are_integers():
    for sides in ((np.int64(3), np.int32(1)), (np.uint8(3), None)):
        plain = tuple(None if side is None else int(side) for side in sides)
        assert torch.equal(flash_fwd(Q, K, K, window=sides), flash_fwd(Q, K, K, window=plain))
        assert all(type(side) is int for side in bounded(sides, False)[1])
    learns = [y.clone().requires_grad_() for y in VARLEN]
    for qkv in (VARLEN, learns):
        o = flash_fwd_varlen(*qkv, CU, CU, max_seqlen_q=np.int64(12), max_seqlen_k=np.int32(12))
        assert torch.equal(o, flash_fwd_varlen(*VARLEN, CU, CU))
    o.sum().backward()
    assert warmup(64, dtype="bf16", layout="bhsd", causal=True, ratio=np.int64(1))
    lists = BlockLists(*LISTS, block_size=(np.int64(64), np.int32(64)))
    assert torch.equal(flash_fwd(Q, K, K, block_mask=lists), flash_fwd(Q, K, K))


@pytest.mark.parametrize("wrong", [np.float64(3), np.bool_(True), True, "3", torch.tensor(3)], ids=str)
def test_what_is_no_integer(wrong):
    with pytest.raises(TypeError, match=r"window: left .* came; an int of at least 0 is needed"):
        flash_fwd(Q, K, K, window=(wrong, None))
    with pytest.raises(TypeError, match=r"max_seqlen_q: an int or None is needed"):
        flash_fwd_varlen(*VARLEN, CU, CU, max_seqlen_q=wrong)
