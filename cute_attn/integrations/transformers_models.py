"""Which of transformers' models compute their attention themselves, and do not ask for that of attn_implementation.

transformers asks a model's class whether it can do with sdpa attention, but takes a registered name for every class.
What a class does is told by the names that its functions use, and those of the modules that it is made of.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn

ASKS = "ALL_ATTENTION_FUNCTIONS"
ATTENDS = {"softmax", "Softmax", "scaled_dot_product_attention"}
MASKS = {"attention_mask", "attn_mask", "causal_mask", "mask", "masks"}
HINT = (
    'use attn_implementation="eager", or for the parts of a composite model a dict such as '
    'attn_implementation={"text_config": "cute_attn", "vision_config": "eager"}'
)


class Attention(NamedTuple):
    """Of a model's class: its attention modules by what they do, and whether transformers' functions make its masks."""

    ask: tuple[str, ...]  # for the function of attn_implementation
    own: tuple[str, ...]  # compute it themselves, with a mask
    choose: tuple[str, ...]  # tables of classes or functions by attn_implementation, which have no other
    masked: bool


def watch(name: str) -> None:
    """Models that never ask for attn_implementation raise when they are made with `name`, as with sdpa's."""
    from transformers import PreTrainedModel

    asked = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if asked is None or getattr(asked, "watched", None) == name:
        return

    @wraps(asked)
    def get_correct_attn_implementation(self, requested_attention: str | None, *how, **more):
        if requested_attention == name:
            refuse(type(self), name)
        return asked(self, requested_attention, *how, **more)

    get_correct_attn_implementation.watched = name  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


def refuse(model: type, name: str) -> None:
    """Raises ValueError for a model whose attention would not be `name`'s."""
    found = attention_of(model)
    if found.choose:
        raise ValueError(f"{model.__name__}: {found.choose[0]} has nothing for {name}; {HINT}")
    if found.own and found.masked and not found.ask:
        raise ValueError(f"{model.__name__}: {found.own[0]} computes its attention itself, not by {name}; {HINT}")


@torch.compiler.assume_constant_result
def asks(config: type) -> bool:
    """Whether all attention of all models of a configuration's class asks for the function of attn_implementation."""
    return _asks(config)


@lru_cache
def _asks(config: type) -> bool:
    from transformers import PreTrainedModel

    models = [x for x in _subclasses(PreTrainedModel) if getattr(x, "config_class", None) is config]
    return not any(found.own or found.choose for found in map(attention_of, models))


@lru_cache
def attention_of(model: type) -> Attention:
    from transformers import PreTrainedModel

    ask: list[str] = []
    own: list[str] = []
    choose: list[str] = []
    masked = False
    for part in _parts(model):
        names, of_module = _names(part), not issubclass(part, PreTrainedModel)
        masked |= any(getattr(x, "__module__", "") == "transformers.masking_utils" for x in names.values())
        choose += [key for key, x in names.items() if _is_table(x)]
        if ASKS in names:
            ask.append(part.__name__)
        elif of_module and ATTENDS & names.keys() and _takes_a_mask(part):
            own.append(part.__name__)
    return Attention(tuple(ask), tuple(own), tuple(choose), masked)


def _subclasses(kind: type) -> Iterator[type]:
    subs: list[type] = kind.__subclasses__()
    for sub in subs:
        yield sub
        yield from _subclasses(sub)


def _parts(model: type) -> list[type]:
    """The class itself, and the classes of modules that its functions name, and those of these."""
    found = [model]
    for part in found:
        for x in _names(part).values():
            for kind in x.values() if _is_table(x) else [x]:
                if isinstance(kind, type) and issubclass(kind, nn.Module) and _is_a_models(kind):
                    found += [kind] if kind not in found else []
    return found


def _is_table(x: Any) -> bool:
    return isinstance(x, dict) and "eager" in x and all(map(callable, x.values()))


def _is_a_models(kind: type) -> bool:
    """Of its file, and neither of torch nor of what all models share."""
    package, _, rest = kind.__module__.partition(".")
    return package != "torch" and (package != "transformers" or rest.startswith("models."))


@lru_cache
def _names(part: type) -> dict[str, Any]:
    """That a class's functions use, with what is known by them in the functions' own files."""
    found: dict[str, Any] = {}
    for function in _functions(part):
        for code in _codes(function.__code__):
            found |= {name: function.__globals__.get(name) for name in code.co_names}
    return found


def _takes_a_mask(part: type) -> bool:
    codes = [function.__code__ for function in _functions(part)]
    return any(MASKS & {*code.co_varnames[: code.co_argcount]} for code in codes)


def _functions(part: type) -> Iterator[Callable]:
    for base in filter(_is_a_models, part.__mro__):
        for name, x in vars(base).items():
            x = inspect.unwrap(getattr(x, "__func__", x))
            if inspect.isfunction(x) and name != "_init_weights":  # which names a whole file's classes
                yield x


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for x in code.co_consts:
        if isinstance(x, CodeType):
            yield from _codes(x)
