"""What functions of scores and places read, may hold and may give: the same on the CPU and a GPU."""

import operator
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from cute_attn import flash_fwd, flash_fwd_varlen, mod_trace, reference
from cute_attn.mods import prepare
from tests.support.attention import close_lse, inputs
from tests.support.mod_values import BYTES, FACTOR, OPERATED, TABLES, Config, Layer, readers, settings

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", readers(3))
def test_constants_are_read_anew(name):
    """By value, wherever they are: another is another kernel and another result, and the same is the same kernel."""
    q, k, v = inputs(1, 1, 1, 20, 20, 16, device="cpu")
    i, j = torch.arange(20)[:, None], torch.arange(20)
    kernels = []
    for n in (3, 9, 3):
        mod = readers(n)[name]
        o, lse = flash_fwd(q, k, v, mask_mod=mod, return_lse=True)
        want, want_lse = reference.attention(q, k, v, mask_mod=lambda *_, n=n: (i - j).abs() <= n)
        torch.testing.assert_close(o.double(), want, atol=0.02, rtol=0.02)
        close_lse(lse, want_lse)
        kernels.append(prepare("mask_mod", mod, ()).kernel)
    assert kernels[0] == kernels[2] != kernels[1] and hash(kernels[0]) == hash(kernels[2])


def test_one_object_whose_constant_changes():
    """The function that was given before, not one made anew."""
    found = []
    settings.n = 1
    mod = lambda score, *_: score * settings.n  # noqa: E731
    for settings.n in (1, 2, 1.0, True, -0.0, 0.0, float("nan")):
        found.append(prepare("score_mod", mod, ()).kernel.key)
    assert len(set(found)) == len(found)
    assert prepare("score_mod", mod, ()).kernel.key == found[-1]


def test_the_key_is_that_of_another_process():
    """So the disk's cache serves it, and nothing else, whatever the seed of Python's hashes."""
    keys = {name: prepare("mask_mod", mod, ()).kernel.key for name, mod in readers(9).items()}
    script = (
        "from tests.support import mod_values as t; from cute_attn.mods import prepare\n"
        "print({name: prepare('mask_mod', mod, ()).kernel.key for name, mod in t.readers(9).items()})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert eval(found.stdout) == keys


@DEVICES
def test_tensors_are_arguments_wherever_they_are(device):
    """Of a class, a module, an nn.Module, a dict: other values compile nothing, and are seen."""
    q, k, v = inputs(1, 4, 4, 20, 30, 16, device=device)

    def of_class(score, b, h, i, j):
        return score + Config.table[h] * (i - j)

    def of_module(score, b, h, i, j):
        return score + settings.tables["slopes"].detach()[h] * (i - j)

    layer, kernels = Layer(1).to(device), set()
    for factor in (1.0, -2.0):
        slopes = torch.arange(4, device=device) * 0.1 * factor
        layer.slopes, Config.table = slopes, slopes
        settings.tables = dict(slopes=torch.nn.Parameter(slopes))
        want = reference.attention(q, k, v, score_mod=lambda s, b, h, i, j, t=slopes: s + t[h] * (i - j))[0]
        for mod in (of_class, of_module, layer.bias):
            found = flash_fwd(q, k, v, score_mod=mod)
            torch.testing.assert_close(found.double(), want, atol=0.03, rtol=0.03)
            kernels.add(prepare("score_mod", mod, ()).kernel)
    assert len(kernels) == 1


def numbers(rows=5, columns=7):
    """A score and places as tensors that broadcast."""
    places = torch.tensor(1), torch.tensor(2), torch.arange(rows)[:, None], torch.arange(columns)
    return torch.linspace(-3, 3, rows * columns).view(rows, columns), *places


@pytest.mark.parametrize("name", OPERATED)
def test_nodes_mean_what_torch_does(name):
    """A function's nodes, worked out by torch, beside the function itself."""
    mod, places = OPERATED[name], numbers()
    want = torch.as_tensor(mod(*places), dtype=torch.float32).expand_as(places[0])
    found = torch.as_tensor(prepare("score_mod", mod, ()).function(*places))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.expand_as(want), want)


REFUSED = {
    "an int mask": ("mask_mod", lambda b, h, i, j: (j < 3).int(), "its result is int32, and a truth is needed"),
    "a float mask": ("mask_mod", lambda b, h, i, j: (j < 3) * 1.0, "its result is float32, and a truth"),
    "1.0 for a mask": ("mask_mod", lambda *_: 1.0, "its result is float32"),
    "1 for a mask": ("mask_mod", lambda *_: 1, "its result is int32"),
    "None for a mask": ("mask_mod", lambda *_: None, "of its result: builtins.NoneType came where a number is needed"),
    "None for a score": ("score_mod", lambda *_: None, "of its result: builtins.NoneType came"),
    "a pair": ("score_mod", lambda s, *_: (s, s), "of its result: builtins.tuple came"),
    "a table": ("score_mod", lambda *_: TABLES, r"a tensor of shape \(2, 3, 8\) came where a number is needed; index"),
    "half a row": ("score_mod", lambda s, b, h, i, j: s + TABLES[h, i], "a tensor with 2 of its 3 indices came"),
    "too many": ("score_mod", lambda s, b, h, i, j: s + BYTES[h, i], "2 indices came for a tensor of 1"),
    "a slice": ("score_mod", lambda s, b, h, i, j: s + TABLES[0, :, j][h], "slice.* came as an index beside"),
    "a gather": ("score_mod", lambda s, *_: s + BYTES[[1, 2]][0], r"\[1, 2\] came as an index, which copies"),
    "a float index": ("score_mod", lambda s, b, h, i, j: s + BYTES[s], "a float32 came as an index"),
    "a truth as index": ("score_mod", lambda s, b, h, i, j: s + BYTES[i > j], "a bool came as an index"),
    "a whole tensor": ("score_mod", lambda s, *_: s * TABLES, "came where a number is needed; index it"),
    "work on a tensor": ("score_mod", lambda s, *_: s + (BYTES * 2)[0], "came where a number is needed; index it"),
    "a value read": ("score_mod", lambda s, *_: s * FACTOR.item(), "item would read a tensor's value back"),
    "a value as float": ("score_mod", lambda s, *_: s * float(FACTOR), "float would read a tensor's value back"),
    "a new tensor": ("score_mod", lambda s, *_: s * torch.tensor(2.0), "torch.tensor is not known to a kernel"),
    "bfloat16": ("score_mod", lambda s, *_: s.to(torch.bfloat16), "torch.bfloat16 came as a type, and a kernel's"),
    "half": ("score_mod", lambda s, *_: s.half(), "half is not known to a kernel"),
    "in place": ("score_mod", lambda s, *_: operator.iadd(FACTOR, s), "torch.add_ is not known to a kernel"),
    "rounding": ("score_mod", lambda s, *_: torch.div(s, 2, rounding_mode="floor"), "the argument rounding_mode"),
    "if": ("mask_mod", lambda b, h, i, j: (i > j) and (j > 3), "use torch.where for `if`, & and |"),
    "int()": ("score_mod", lambda s, b, h, i, j: s + int(i), "a kernel's number has no value yet"),
    "range()": ("score_mod", lambda s, b, h, i, j: s + sum(range(i)), "a kernel's number has no value yet"),
    "bits of floats": ("score_mod", lambda s, b, h, i, j: s & i, "bitwise_and of a float32 is not known"),
    "truths less truths": ("score_mod", lambda s, b, h, i, j: s + ((i > j) - (j > 1)), "sub of truths is not known"),
    "by zero": ("score_mod", lambda s, b, h, i, j: s + i // 0, "floor_divide of a whole number by 0"),
    "beyond 64 bits": (
        "score_mod",
        lambda s, b, h, i, j: s + (i + 2**64) % 3,
        r"the number 1.845e\+19 came, and whole",
    ),
    "its own error": ("score_mod", lambda s, *_: {}["x"], "called once with .score, b.* raised KeyError: 'x'"),
    "its arguments": ("score_mod", lambda s: s, "called once with .* raised TypeError: .*takes 1 positional"),
}


@DEVICES
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, device):
    """Before anything is launched, with the same words everywhere."""
    name, mod, words = REFUSED[case]
    q, k, v = inputs(1, 2, 2, 8, 8, 16, device=device)
    with pytest.raises(TypeError, match=f"{name}: .*{words}"):
        flash_fwd(q, k, v, **{name: mod})


def test_a_kept_number_is_refused():
    kept = []
    prepare("score_mod", lambda s, *_: kept.append(s) or s, ())
    with pytest.raises(TypeError, match="a number of an earlier call was kept"):
        prepare("score_mod", lambda s, *_: s + kept[0], ())


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(8)


CAPTURED = {
    "a FakeTensor": (fake, "a torch._subclasses.fake_tensor.FakeTensor came, which has no memory of its own"),
    "sparse": (lambda: torch.eye(8).to_sparse(), "captures a tensor of torch.sparse_coo; a dense one is needed"),
    "negative": (lambda: torch.ones(8, dtype=torch.complex64).conj().imag, "whose sign is kept beside"),
    "complex": (lambda: torch.ones(8, dtype=torch.complex64), "captures a tensor of torch.complex64"),
}


@pytest.mark.parametrize("case", CAPTURED)
def test_tensors_without_memory_of_their_own(case):
    x, words = CAPTURED[case][0](), CAPTURED[case][1]
    with pytest.raises(TypeError, match=words):
        flash_fwd(
            *inputs(1, 1, 1, 8, 8, 16, device="cpu"), score_mod=lambda s, b, h, i, j, x: s + x[(j,) * x.dim()], aux=(x,)
        )


@DEVICES
@pytest.mark.parametrize(("truth", "o"), [(True, 1.0), (False, 0.0)])
def test_a_mask_that_is_a_constant(truth, o, device):
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device=device)
    found, lse = flash_fwd(q, k, torch.ones_like(v), mask_mod=lambda *_: truth, return_lse=True)
    assert (found == o).all() and lse.isfinite().all() == truth


@DEVICES
def test_numbers_in_aux(device):
    """NumPy's too, and whole ones beyond 32 bits; those of one type compile once."""
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device=device)
    half, seen = (lambda s, b, h, i, j, x: s * x), (lambda b, h, i, j, x: j <= x)
    want = flash_fwd(q, k, v, score_mod=half, aux=(0.5,))
    for x in (np.float64(0.5), np.float32(0.5), torch.tensor(0.5, device=device)):
        assert torch.equal(want, flash_fwd(q, k, v, score_mod=half, aux=(x,)))
    for x in (3, np.int64(3), torch.tensor(3, device=device)):
        assert torch.equal(flash_fwd(q, k, v, mask_mod=seen, aux=(x,)), flash_fwd(q, k[:, :, :4], v[:, :, :4]))
    for x in (2**31, 2**40, np.int64(2**62)):
        assert torch.equal(flash_fwd(q, k, v, mask_mod=seen, aux=(x,)), flash_fwd(q, k, v))
        assert not flash_fwd(q, k, v, mask_mod=seen, aux=(-x,)).any()
    keys = [prepare("mask_mod", seen, (x,)).kernel for x in (3, np.int32(7), -(2**24), 2**31, 2**50)]
    assert keys[0] == keys[1] == keys[2] != keys[3] == keys[4]
    with pytest.raises(ValueError, match="aux: 9223372036854775808 came, and whole numbers of 64 bits"):
        prepare("mask_mod", seen, (2**63,))
    with pytest.raises(TypeError, match="aux: bool at 0"):
        prepare("mask_mod", seen, (True,))


def test_aux_without_a_function():
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device="cpu")
    lengths = torch.tensor([0, 8], dtype=torch.int32)
    for how in ({}, dict(softcap=3.0)):
        with pytest.raises(ValueError, match="aux: 1 came without a score_mod or a mask_mod"):
            flash_fwd(q, k, v, aux=(3,), **how)
        with pytest.raises(ValueError, match="aux: 1 came without a score_mod or a mask_mod"):
            flash_fwd_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), lengths, lengths, aux=[3], **how)
    with pytest.raises(TypeError, match=r"aux: torch.Tensor came; a tuple"):
        flash_fwd(q, k, v, aux=torch.ones(3))
    assert torch.equal(flash_fwd(q, k, v, aux=[]), flash_fwd(q, k, v))


def test_places_that_int32_does_not_hold():
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mask_mod: given with 67108864 places in a dimension; up to 67108863"):
        flash_fwd(q, *(q.expand(1, 1, 1 << 26, 8) for _ in range(2)), mask_mod=lambda b, h, i, j: j < 3)


def test_other_libraries_arrays_with_a_function():
    """aux stays aux: another number compiles nothing."""
    q, k, v = (np.random.randn(1, 1, 8, 16).astype(np.float16) for _ in range(3))
    mod = lambda s, b, h, i, j, x: s * x  # noqa: E731
    for x in (0.5, 2.0):
        want = flash_fwd(*map(torch.from_numpy, (q, k, v)), score_mod=mod, aux=(x,))
        assert np.array_equal(flash_fwd(q, k, v, score_mod=mod, aux=(x,)), want.numpy())


def test_an_index_beyond_the_end_is_the_last_on_the_cpu_too():
    table = torch.randn(6)
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device="cpu")
    ours = flash_fwd(q, k, v, score_mod=lambda s, b, h, i, j: s + table[i - j] + table[j + 2**40])
    inside = flash_fwd(q, k, v, score_mod=lambda s, b, h, i, j: s + table[(i - j).clamp(0, 5)] + table[5])
    assert torch.equal(ours, inside)


def test_the_reference_takes_truths_alone():
    q, k, v = inputs(1, 1, 1, 8, 8, 16, device="cpu")
    with pytest.raises(TypeError, match=r"mask_mod: its result is torch.int32; torch.bool is needed"):
        reference.attention(q, k, v, mask_mod=lambda b, h, i, j: (j < 3).int())


def test_each_function_has_a_method_and_a_name_in_torch():
    for name in mod_trace.FUNCTIONS:
        assert hasattr(torch, name) or hasattr(torch.Tensor, name), name
