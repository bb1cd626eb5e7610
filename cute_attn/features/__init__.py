"""What a call may ask for beside plain attention: one object a feature, and the list of them all."""

from collections import namedtuple
from itertools import chain
from typing import Any

import torch

from ..kernels.state import Arguments
from ..problem import FeatureKey, Problem
from .block_sparse import BlockSparseFeature
from .chunks import ChunksFeature
from .dropout import DropoutFeature
from .feature import Feature as Feature
from .per_head import AlibiFeature, SinksFeature
from .per_query import DraftsFeature
from .row_max import RowMaxFeature
from .softcap import SoftcapFeature
from .spans import SpansFeature
from .user_functions import MaskModFeature, ScoreModFeature
from .window import WindowFeature

# The order of the kernels' arguments within a part, and of the torch operator's.
FEATURES: tuple[Feature, ...] = (
    WindowFeature(),
    ChunksFeature(),
    SpansFeature(),
    DraftsFeature(),
    SoftcapFeature(),
    AlibiFeature(),
    SinksFeature(),
    ScoreModFeature(),
    MaskModFeature(),
    BlockSparseFeature(),
    DropoutFeature(),
    RowMaxFeature(),
)
_named: Any = namedtuple  # whose fields mypy would read here
Features = _named("Features", [feature.name for feature in FEATURES], defaults=[None] * len(FEATURES))
NONE = Features()  # Features are the value of each feature in a call; these of one without any
SCHEMA = tuple(chain.from_iterable(feature.schema for feature in FEATURES if not feature.later))
SCHEMA_LATER = tuple(chain.from_iterable(feature.schema for feature in FEATURES if feature.later))

# Of keywords: their defaults, and whose they are, by place.
DEFAULTS = {name: feature.defaults.get(name) for feature in FEATURES for name in feature.keywords}
_WHOSE = {name: [i for i, feature in enumerate(FEATURES) if name in feature.keywords] for name in DEFAULTS}
_BY_NAME = sorted(range(len(FEATURES)), key=lambda i: FEATURES[i].name)
_LAUNCHED = sorted(range(len(FEATURES)), key=lambda i: Arguments._fields.index(FEATURES[i].part))  # keeps equals' order


def collect(causal: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """(causal, Features) of a call's keywords, checked as far as they can be without q, k and v.

    Raises:
        TypeError, ValueError: a keyword is not as `flash_fwd` says.
    """
    names = [name for name, value in given.items() if value is not DEFAULTS[name]]
    if not names:
        return causal, NONE
    asked, values = dict(given, causal=causal), list(NONE)
    for i in sorted({i for name in names for i in _WHOSE[name]}):
        values[i] = FEATURES[i].given(asked)
    return asked["causal"], Features(*values)


def present(features: Any) -> list[tuple[Feature, Any]]:
    """Each feature that a call has, with its value."""
    return [(feature, value) for feature, value in zip(FEATURES, features, strict=True) if value is not None]


def key(features: Any) -> FeatureKey:
    """Which there are, whatever their values."""
    return FeatureKey.of(
        [(FEATURES[i].name, FEATURES[i].key(features[i])) for i in _BY_NAME if features[i] is not None]
    )


def fitted(features: Any, problem: Problem, device: torch.device) -> Any:
    """Each held against the problem, and some made for it."""
    return _each(features, "fitted", problem, device)


def started(features: Any, q: Any) -> Any:
    """With what each call makes anew: q may be a tracer's."""
    return _each(features, "started", q)


def _each(features: Any, method: str, *arguments: Any) -> Any:
    """With what a method of each makes of its value."""
    found = None
    for i, value in enumerate(features):
        if value is not None:
            made = getattr(FEATURES[i], method)(value, *arguments)
            if made is not value:
                found = list(features) if found is None else found
                found[i] = made
    return features if found is None else Features(*found)


def arguments(features: Any) -> tuple:
    """What the compiled call takes behind the stream, in the order of `kernels.state.Arguments`."""
    found: tuple = ()
    for i in _LAUNCHED:
        if features[i] is not None:
            found += FEATURES[i].arguments(features[i])
    return found


def reference(features: Any) -> dict[str, Any]:
    """As `reference.attention` takes them."""
    how: dict[str, Any] = {}
    for feature, value in present(features):
        feature.reference(value, how)
    return how


def by_name(features: Any) -> dict[str, Any]:
    """As `flash_fwd` takes them."""
    named: dict[str, Any] = {}
    for feature, value in present(features):
        named |= feature.by_name(value)
    return named


def operator_arguments(features: Any) -> list:
    """As torch.ops.cute_attn.attention takes them, in the order of SCHEMA."""
    found: list = []
    for feature, value in zip(FEATURES, features, strict=True):
        if feature.schema and not feature.later:
            found += feature.operator_arguments(value)
    return found


def operator_keywords(features: Any) -> dict[str, Any]:
    """Those of SCHEMA_LATER that are there."""
    found: dict[str, Any] = {}
    for feature, value in present(features):
        if feature.schema and feature.later:
            found |= zip(feature.keywords, feature.operator_arguments(value), strict=True)
    return found


def of_operator(arguments: dict[str, Any]) -> dict[str, Any]:
    """`flash_fwd`'s keywords from the operator's arguments."""
    named: dict[str, Any] = {}
    for feature in FEATURES:
        if feature.schema:
            named |= feature.of_operator(arguments)
    return named


def traceable(features: Any) -> None:
    """No feature that cannot pass an operator: functions, lists of blocks, a generator."""
    found = [feature.untraceable(value) for feature, value in present(features)]
    given = [name for name in found if name is not None]
    if given:
        raise TypeError(
            f"{', '.join(given)}: given in a call that is traced, and it cannot pass the operator that "
            "tracers see; call flash_fwd outside of the trace"
        )


def differentiable(features: Any) -> None:
    """No feature that has no backward.

    Raises:
        ValueError: there is one; the message says what serves.
    """
    for feature, value in present(features):
        if not feature.differentiable:
            raise ValueError(feature.no_gradient(value))
