"""Every tracer gets the operator in its graph, and what it made computes; dual tensors raise; the import registers."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cute_attn import by_operator, device, flash_fwd, flash_fwd_varlen, request
from cute_attn import call as calls
from tests.support.attention import inputs

Q, K, V = inputs(2, 4, 2, 20, 24, 16, device="cpu")
VARLEN = [x[0].transpose(0, 1) for x in (Q, K, V)]
CU_Q, CU_K = (torch.tensor([0, n], dtype=torch.int32) for n in (20, 24))
NAMES = "attention", "attention_out"
ALIASES = "flash_fwd", "flash_fwd_row_max", "flash_fwd_out", "flash_fwd_varlen", "flash_fwd_varlen_out"
pytestmark = pytest.mark.usefixtures("one_thread")


def dense(q, k, v):
    o, lse = flash_fwd(q * 2, k, v, causal=True, scale=0.3, return_lse=True)
    return o + 1, lse


def maxima(q, k, v):
    return flash_fwd(q, k, v, window=(5, 0), return_row_max=True, return_max_logit=True)


def into(q, k, v):
    out = torch.zeros_like(q)
    return flash_fwd(q, k, v, out=out) + out


def packed(q, k, v, cu_q, cu_k):
    return flash_fwd_varlen(q * 2, k, v, cu_q, cu_k, causal=True, return_lse=True)


FUNCTIONS = {
    "dense": (dense, (Q, K, V), "attention"),
    "maxima": (maxima, (Q, K, V), "attention"),
    "into": (into, (Q, K, V), "attention_out"),
    "packed": (packed, [*VARLEN, CU_Q, CU_K], "attention"),
}
EACH = pytest.mark.parametrize(("function", "tensors", "name"), FUNCTIONS.values(), ids=FUNCTIONS)


def holds(traced, function, tensors):
    """With other values than those it was traced with."""
    torch.manual_seed(1)
    others = [torch.randn_like(x) if x.is_floating_point() else x for x in tensors]
    got, want = traced(*others), function(*others)
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (got, want)), strict=True):
        assert torch.equal(x, y)


def operators(graph):
    """Ours, of a graph of torch.fx."""
    names = (str(node.target).removeprefix("cute_attn.").split(".")[0] for node in graph.nodes)
    return [name for name in names if name in NAMES]


@EACH
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode, pre_dispatch, function, tensors, name):
    graph = make_fx(function, tracing_mode=mode, pre_dispatch=pre_dispatch)(*tensors)
    assert operators(graph.graph) == [name]
    holds(graph, function, tensors)


@EACH
def test_make_fx_of_functionalize(function, tensors, name):
    if name == "attention_out":
        with pytest.raises(RuntimeError, match=r"custom .* operator whose output has alias annotations"):
            make_fx(torch.func.functionalize(function))(*tensors)
        return
    graph = make_fx(torch.func.functionalize(function))(*tensors)
    assert name in str(graph.code)
    holds(graph, function, tensors)


@EACH
def test_jit_trace(function, tensors, name):
    traced = torch.jit.trace(function, tuple(tensors), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes() if "cute_attn" in node.kind()] == [f"cute_attn::{name}"]
    holds(traced, function, tensors)


@EACH
def test_fx(function, tensors, name):
    graph = torch.fx.symbolic_trace(function)
    assert operators(graph.graph) == [name]
    holds(graph, function, tensors)


@EACH
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, function, tensors, name):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, *lengths):
            return function(q, k, v, *lengths)

    program = torch.export.export(Model(), tuple(tensors), strict=strict)
    assert name in str(program.graph)
    holds(program.module(), function, tensors)


def test_aot_function():
    graphs = []

    def seen(graph, _):
        graphs.append(graph)
        return graph

    step = aot_function(dense, fw_compiler=seen, bw_compiler=seen)
    learns = [x.clone().requires_grad_() for x in (Q, K, V)]
    got = torch.autograd.grad(step(*learns)[0].float().sum(), learns)
    want = torch.autograd.grad(dense(*learns)[0].float().sum(), learns)
    assert "cute_attn.attention.default" in graphs[0].code and "cute_attn.flash_bwd.default" in graphs[1].code
    for dx, other in zip(got, want, strict=True):
        torch.testing.assert_close(dx, other, atol=1e-3, rtol=0.02)


@EACH
def test_fake_tensors(function, tensors, name):
    want = function(*tensors)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in tensors]
    with mode:
        inside = function(*fakes)
    for found in (inside, function(*fakes)):
        for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (found, want)), strict=True):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
            assert type(x).__name__ == "FakeTensor"


def test_a_mode_sees_the_operator():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        o = flash_fwd(Q, K, V)
    assert seen == ["cute_attn.attention.default"]
    assert torch.equal(o, flash_fwd(Q, K, V))


def test_jit_trace_of_a_call_whose_kernel_is_known(monkeypatch):
    """Its sizes are tensors: no key has them."""
    found = request.Request.made

    def made(asked):
        gpu = SimpleNamespace(index=0, num_sms=132, counters=lambda each: 7 * each)
        return found(asked)._replace(gpu=gpu, kernel=lambda *_: None)

    monkeypatch.setattr(request.Request, "made", made)
    monkeypatch.setattr(calls, "known", {})
    monkeypatch.setattr(device, "current", lambda: 0)
    for _ in range(2):
        flash_fwd(Q, K, V)
    assert len(calls.known) == 1
    traced = torch.jit.trace(lambda q, k, v: flash_fwd(q, k, v), (Q, K, V), check_trace=False)
    assert "cute_attn::attention" in str(traced.graph) and len(calls.known) == 1


def test_a_mode_of_functions_alone_traces_nothing(monkeypatch):
    monkeypatch.setattr(by_operator, "attention", None)
    with torch.device("cpu"):
        flash_fwd(Q, K, V)
        flash_fwd_varlen(*VARLEN, CU_Q, CU_K)


MODS = {
    "score_mod": dict(score_mod=lambda s, b, h, i, j: s * 2),
    "mask_mod": dict(mask_mod=lambda b, h, i, j: i >= j),
    "generator": dict(dropout_p=0.5, generator=torch.Generator()),
}
TRACERS = {
    "make_fx": lambda f: make_fx(f)(Q),
    "pre_dispatch": lambda f: make_fx(f, pre_dispatch=True)(Q),
    "jit.trace": lambda f: torch.jit.trace(f, Q, check_trace=False),
    "fx": lambda f: torch.fx.symbolic_trace(f),
}


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
@pytest.mark.parametrize("given", MODS)
def test_what_cannot_pass_the_operator_raises(given, tracer):
    with pytest.raises(TypeError, match=f"{given}: given in a call that is traced"):
        tracer(lambda q: flash_fwd(q, K, V, **MODS[given]))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_inside_a_trace_raise(transform):
    functions = dict(
        vmap=lambda q: torch.vmap(lambda x: flash_fwd(x, K, V))(q[None]),
        grad=torch.func.grad(lambda q: flash_fwd(q, K, V).float().sum()),
        jvp=lambda q: torch.func.jvp(lambda x: flash_fwd(x, K, V), (q,), (q,)),
    )
    for call in (functions[transform], make_fx(functions[transform])):  # nothing is traced before the call
        with pytest.raises(TypeError, match=r"q: a tensor inside a transform of torch.func came"):
            call(Q)


CALLS = {
    "q": lambda x: flash_fwd(x, K, V),
    "v": lambda x: flash_fwd(Q, K, x),
    "sinks": lambda x: flash_fwd(Q, K, V, sinks=x),
    "packed k": lambda x: flash_fwd_varlen(VARLEN[0], x, VARLEN[2], CU_Q, CU_K, max_seqlen_q=20, max_seqlen_k=24),
    "operator": lambda x: torch.ops.cute_attn.flash_fwd(x, K, V, False, None, "bhsd", True),
}
GIVEN = {"q": Q, "v": V, "sinks": torch.zeros(4), "packed k": VARLEN[1], "operator": Q}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("where", CALLS)
def test_dual_tensors_raise(where, learns):
    x = GIVEN[where].clone().requires_grad_(learns and where != "sinks")
    with forward_ad.dual_level():
        CALLS[where](x.detach())  # no tangent, no error
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        name = where.split()[-1].replace("operator", "q")
        with pytest.raises(NotImplementedError, match=f"{name}: a dual tensor .* backward-mode|jvp function"):
            CALLS[where](dual)
    CALLS[where](x)


def test_an_exported_program_finds_its_operators(tmp_path):
    """After the import alone, in a fresh process; and so does a traced one."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_fwd(q, k, v, causal=True)

    torch.export.save(torch.export.export(Model(), (Q, K, V)), tmp_path / "program.pt2")
    torch.jit.trace(Model(), (Q, K, V), check_trace=False).save(tmp_path / "traced.pt")
    torch.save((Q, K, V, flash_fwd(Q, K, V, causal=True)), tmp_path / "tensors.pt")
    code = (
        "import torch, cute_attn, sys\n"
        "*qkv, want = torch.load(sys.argv[1] + '/tensors.pt')\n"
        "assert torch.equal(torch.export.load(sys.argv[1] + '/program.pt2').module()(*qkv), want)\n"
        "assert torch.equal(torch.jit.load(sys.argv[1] + '/traced.pt')(*qkv), want)\n"
        "print(torch.cuda.is_initialized(), 'torch._dynamo.symbolic_convert' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "False"


def test_the_import_registers_every_operator_and_stays_light():
    code = (
        "import torch, sys; before = set(sys.modules)\n"
        "import cute_attn\n"
        f"for name in {(*NAMES, *ALIASES, 'flash_bwd', 'cudnn_bwd', 'flash_bwd_varlen')}:\n"
        "    getattr(torch.ops.cute_attn, name).default\n"
        "new = set(sys.modules) - before\n"
        "heavy = 'torch._dynamo', 'torch._inductor', 'torch._refs', 'rich', 'matplotlib', 'transformers', 'sympy'\n"
        "print([name for name in heavy if name in new], torch.cuda.is_initialized())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_a_plain_call_asks_no_tracer(monkeypatch):
    """What is asked of every call are three flags; the rest is asked where one is set."""
    assert not request._dispatch_modes() and not request._function_modes()
    monkeypatch.setattr(request, "traced", None)
    flash_fwd(Q, K, V)
    flash_fwd_varlen(*VARLEN, CU_Q, CU_K)


def test_a_program_exported_before_runs():
    """It names the operators of before, which are aliases now."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 4, 20, 32).bfloat16() for _ in range(3))
    packed, cu = torch.randn(50, 2, 32).bfloat16(), torch.tensor([0, 20, 50], dtype=torch.int32)
    program = torch.export.load(Path(__file__).parent / "program_0_1.pt2")
    targets = [str(node.target) for node in program.graph.nodes if "cute_attn" in str(node.target)]
    names = "flash_fwd", "flash_fwd_row_max", "flash_fwd_out", "flash_fwd_varlen"
    assert targets == [f"cute_attn.{name}.default" for name in names]
    how = dict(softcap=5.0, window=(9, 3), return_lse=True, return_row_max=True)
    want = flash_fwd(q, k, v, causal=True), *flash_fwd(q, k, v, **how), flash_fwd(q, k, v)
    want = *want, *flash_fwd_varlen(packed, packed, packed, cu, cu, causal=True, return_lse=True)
    with pytest.warns(DeprecationWarning, match="for programs of version 0.1"):
        found = program.module()(q, k, v, packed, cu)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("name", ALIASES)
def test_a_pickle_that_names_an_operator_of_before_runs(name):
    """With its gradients, as a compiled graph's."""
    q = Q.clone().requires_grad_(not name.endswith("_out"))
    dense, packed = (q, K, V), (*[x.clone() for x in VARLEN], CU_Q, CU_K, None, None, 9, 9)
    how = (True, None, None, None, True) if "varlen" in name else (True, None, "bhsd", True)
    tensors = packed if "varlen" in name else dense
    tensors = (*tensors[:3], torch.empty_like(tensors[0]), *tensors[3:]) if name.endswith("_out") else tensors
    graph = torch.fx.Graph()
    places = [graph.placeholder(f"x{i}") for i in range(len(tensors))]
    graph.output(graph.call_function(getattr(torch.ops.cute_attn, name).default, (*places, *how)))
    module = pickle.loads(pickle.dumps(torch.fx.GraphModule(torch.nn.Module(), graph)))
    with pytest.warns(DeprecationWarning, match=f"torch.ops.cute_attn.{name} is for programs of version 0.1; use"):
        found = module(*tensors)
    if "varlen" in name:
        o, lse = flash_fwd_varlen(*VARLEN, CU_Q, CU_K, causal=True, return_lse=True)
    else:
        o, lse = flash_fwd(Q, K, V, causal=True, return_lse=True)
    got = (tensors[3], found) if name.endswith("_out") else found[:2]
    assert torch.equal(got[0], o) and torch.equal(got[1], lse)
    if got[0].requires_grad:
        (dq,) = torch.autograd.grad(got[0].float().sum(), q)
        (want,) = torch.autograd.grad(flash_fwd(q, K, V, causal=True).float().sum(), q)
        assert torch.equal(dq, want)


def test_fx_of_packed_maxima():
    traced = torch.fx.symbolic_trace(lambda q, k, v, a, b: flash_fwd_varlen(q, k, v, a, b, return_max_logit=True))
    found, want = traced(*VARLEN, CU_Q, CU_K), flash_fwd_varlen(*VARLEN, CU_Q, CU_K, return_max_logit=True)
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


SOME = (True, None, True)
OPERATOR_MISUSE = {
    "constant time": ((*VARLEN, *SOME, "thd", CU_Q, CU_K), dict(constant_time=True), "constant_time: given"),
    "dropout": (
        (*VARLEN, *SOME, "thd", CU_Q, CU_K),
        dict(dropout_p=0.5),
        "dropout_p: given with cu_seqlens",
    ),
    "a dense layout": ((*VARLEN, *SOME, "bhsd", CU_Q, CU_K), {}, "cu_seqlens_q, cu_seqlens_k: given with"),
    "lengths alone": ((Q, K, V, *SOME, "bhsd"), dict(seqused_q=CU_Q[1:]), "seqused_q: given with layout"),
    "no lengths": ((*VARLEN, *SOME, "thd"), {}, "cu_seqlens_q: a torch.Tensor is needed"),
    "no such layout": ((Q, K, V, *SOME, "nonsense"), {}, "layout: 'nonsense' is not known"),
}


@pytest.mark.parametrize(("arguments", "how", "words"), OPERATOR_MISUSE.values(), ids=OPERATOR_MISUSE)
def test_the_operator_drops_nothing(arguments, how, words):
    """It has the arguments of both functions, and no call has all of them."""
    if how.get("dropout_p"):
        how = how | dict(rng_state=torch.zeros(2, dtype=torch.int64))
    with pytest.raises((TypeError, ValueError), match=words):
        torch.ops.cute_attn.attention(*arguments, **how)


def test_flags_are_asked_before_anything_else():
    for name in ("return_row_max", "return_max_logit", "causal", "constant_time"):
        with pytest.raises(TypeError, match=f"{name}: a bool is needed"):
            flash_fwd(Q, K, V, **{name: torch.ones(2)}, softcap=3.0)
    with pytest.raises(Exception, match="causal: a bool is needed"):
        torch.compile(lambda: flash_fwd(Q, K, V, causal=1, softcap=5.0), backend="eager", fullgraph=True)()
