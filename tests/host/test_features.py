"""The list of features, and what is held to it: signatures, the operator's schema, the kernels' arguments, the plan."""

import ast
import inspect
import pickle
from pathlib import Path

import pytest
import torch

from cute_attn import api, features, flash_fwd, flash_fwd_kvcache, flash_fwd_varlen, ops, plan
from cute_attn.features import FEATURES, NONE, collect
from cute_attn.kernels.state import Arguments
from cute_attn.plan import FeatureKey
from cute_attn.problem import PLAIN

OTHERS = {"q", "k", "v", "causal", "scale", "layout", "return_lse", "out", "constant_time", "return_rng_state"}
OF_VARLEN = {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"}
OF_KVCACHE = {"k_cache", "v_cache", "cache_seqlens", "page_table", "cache_batch_idx", "cache_leftpad"}
OF_KVCACHE |= {"cu_seqlens_q", "max_seqlen_q", "cu_seqlens_k_new"}
OF_KVCACHE |= {"rotary_cos", "rotary_sin", "rotary_interleaved", "rotary_seqlens"}
NAMES = {feature.name for feature in FEATURES}


def test_signatures_are_written_out_as_the_features_are():
    keywords = {name for feature in FEATURES for name in feature.keywords}
    parameters = inspect.signature(flash_fwd).parameters
    assert set(parameters) == keywords | OTHERS
    assert {name: parameters[name].default for name in features.DEFAULTS} == features.DEFAULTS
    assert set(api.Options.__annotations__) == set(parameters) - {"q", "k", "v"} - {
        name for name in parameters if name.startswith("return_")
    }
    for function, own in ((flash_fwd_varlen, OF_VARLEN), (flash_fwd_kvcache, OF_KVCACHE)):
        taken = inspect.signature(function).parameters
        assert own <= set(taken) and set(taken) - own <= set(parameters)
        assert all(taken[name].default == parameters[name].default for name in set(taken) & keywords)


def test_every_feature_says_where_its_arguments_go():
    assert len(NAMES) == len(FEATURES)
    assert all(feature.part in Arguments._fields for feature in FEATURES)


def test_the_operators_have_each_argument_of_a_feature():
    """In one place; behind them is what was added later, for the sake of the programs before."""
    names = [x.name for x in torch.ops.cute_attn.attention.default._schema.arguments]
    every = *features.SCHEMA, *ops.BEHIND, *features.SCHEMA_LATER
    words = [text.partition("=")[0].split()[-1] for text in every]
    assert words == names[-len(words) :]
    out = [x.name for x in torch.ops.cute_attn.attention_out.default._schema.arguments]
    assert out == [*names[:3], "out", *names[3:]] and ops.Arguments._fields == tuple(names)


def test_a_call_without_features_is_one_object():
    assert collect(True, dict(features.DEFAULTS)) == (True, NONE) and collect(True, {})[1] is NONE
    assert features.key(NONE) == PLAIN and features.arguments(NONE) == () and features.by_name(NONE) == {}


def test_what_is_given_is_not_changed():
    given = dict(features.DEFAULTS, window=(3, 0), aux=())
    before = dict(given)
    assert collect(True, given)[0] is False and given == before


def test_keys():
    """Which features there are; equal and hashed as that, whatever the order, and after a pickle."""
    key = FeatureKey(window=True, softcap=True)
    assert key == FeatureKey(softcap=True, window=True, sinks=False) and key != FeatureKey(window=True)
    assert hash(key) == hash(pickle.loads(pickle.dumps(key))) and pickle.loads(pickle.dumps(key)) == key
    assert key.window and not key.sinks and FeatureKey(window=False) == PLAIN
    with pytest.raises(AttributeError):
        key.__array__  # noqa: B018  names of protocols are no features


def test_the_plan_asks_for_features_that_there_are():
    """A FeatureKey has no other names to hold it to: it says False to a word that is none."""
    asked = set()
    for path in Path(plan.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("key", "problem.features"):
                asked.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "FeatureKey":
                asked |= {word.arg for word in node.keywords}
    assert len(asked) >= 9 and asked <= NAMES
