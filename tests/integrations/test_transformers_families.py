"""Every family of transformers with a small configuration: our attention gives what eager gives, or raises by name."""

from functools import partial

import pytest
import torch

from cute_attn import api, reference, varlen
from cute_attn.integrations import transformers as room

transformers = pytest.importorskip("transformers", reason='transformers is missing: pip install "cute_attn[test]"')
from transformers import CONFIG_MAPPING  # noqa: E402

from tests.support import zoo  # noqa: E402
from tests.support.models import by_definition  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
BY_NAME = 'attn_implementation="eager"'
SAMPLE = {  # families, and where they raise by name: when they are made, when they are asked, or nowhere
    "afmoe": None,  # views attention's output
    "bart": None,
    "bert": None,
    "big_bird": "made",
    "bigbird_pegasus": "made",  # an encoder's attention of its own beside a decoder's that asks
    "bloom": "made",
    "clip_vision_model": None,
    "falcon": "made",  # a table of classes by attn_implementation
    "gemma3_text": None,
    "minimax": None,  # linear attention beside full
    "modernbert": None,  # windows on both sides
    "mpt": "made",
    "nllb-moe": None,  # a decoder that does not call itself causal
    "paligemma": None,  # prompts that see both sides
    "splinter": None,  # an encoder that does not say that it is none
    "squeezebert": "made",
    "t5": None,
    "trocr": "made",
}


@pytest.fixture(params=["ours", "torch's"])
def kernel(request, monkeypatch):
    """float32 by definition in our kernels' place; and by transformers' attention, as our kernels do not take it."""
    if request.param == "torch's":
        return

    def flash_fwd_varlen(q, k, v, cu_q, cu_k, *, out=None, max_seqlen_q=None, max_seqlen_k=None, **how):
        o = q.new_zeros(*q.shape[:2], v.shape[2]) if out is None else out
        for rows, part, _ in reference.varlen(q, k, v, cu_q, cu_k, dtype=torch.float32, **how):
            o[rows] = part
        return o

    monkeypatch.setattr(api, "flash_fwd", by_definition)
    monkeypatch.setattr(varlen, "flash_fwd_varlen", flash_fwd_varlen)
    monkeypatch.setitem(room.DTYPES, torch.float32, "fp32")


def eager(model, config):
    try:
        theirs = zoo.build(model, config, "eager")
        return theirs, zoo.inputs(theirs)
    except Exception as error:
        raise zoo.NotHere(f"eager: {type(error).__name__}: {str(error).strip()[:80]}") from error


def eagers(question, theirs, given) -> torch.Tensor | None:
    """None where it cannot be asked, or has no answer of its own to be held to."""
    try:
        want, again = (zoo.ask(question, theirs, given) for _ in range(2))
    except Exception:  # whatever a family does not do, or not so small
        return None
    return want if want.isfinite().all() and torch.equal(want, again) else None


def held(family: str) -> str | None:
    """Whether it raised by name when it was made, or when it was asked; where it did not, its answers are eager's."""
    model, config = zoo.small(CONFIG_MAPPING[family])
    theirs, given = eager(model, config)
    try:
        ours = zoo.build(model, config, room.register())
    except ValueError as error:
        by_name(error)
        return "made"
    ours.load_state_dict(theirs.state_dict())
    raised, answered = set(), set()
    for question in zoo.QUESTIONS:
        want = eagers(question, theirs, given)
        if want is None:
            continue
        try:
            got = zoo.ask(question, ours, given)
        except NotImplementedError as error:
            by_name(error)
            raised.add(question)
            continue
        torch.testing.assert_close(
            got, want, atol=2e-4 * float(want.abs().max()) + 1e-6, rtol=0, msg=partial(said, question)
        )
        answered.add(question)
    if not raised | answered:
        raise zoo.NotHere("eager has no answer to any question")
    return "asked" if raised else None


def by_name(error: Exception) -> None:
    if BY_NAME not in str(error):
        raise error


def said(question: str, message: str) -> str:
    return f"{question}: {message}"


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_eagers_or_raises(family, kernel):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    assert held(family) == SAMPLE[family] or transformers.__version__ < "5"  # when models made their masks themselves


done = set()


@pytest.mark.nightly
@pytest.mark.parametrize("family", CONFIG_MAPPING)
def test_every_family_is_eagers_or_raises(family, kernel):
    try:
        held(family)
    except zoo.NotHere as why:
        pytest.skip(f"{family}: {why}")
    done.add(family)


@pytest.mark.nightly
def test_most_families_were_held():
    assert len(done) > 370
