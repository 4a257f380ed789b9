"""The kinds of objects that public calls take, read from their annotations; other kinds are refused by name.

Only the outermost kind is checked, and the members of a sequence of threads, pairs or callbacks. Numbers of other
libraries (numpy, torch) are accepted; their values are checked on use. A model is recognised by its methods.
"""

from __future__ import annotations

import inspect
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from itertools import islice
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, TypeVar, Union, cast, get_args, get_origin, runtime_checkable

from harmony_core.errors import UsageError

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


@runtime_checkable
class InferenceModel(Protocol):
    """A handle of a live model, recognised by this method."""

    def get_builder_args(self) -> dict[str, Any]:
        """Its settings."""


@runtime_checkable
class TrainingModel(InferenceModel, Protocol):
    """A handle of a model that trains, recognised by this method."""

    def get_optim_step(self) -> int:
        """Its steps."""


_KNOWN_ONLY_TO_TYPE_CHECKERS = {
    "InferenceModel": InferenceModel,
    "TrainingModel": TrainingModel,
    "RecipeContext": Any,
    "ModelBuilder": Any,
}
_NUMBERS = {int: "a whole number", float: "a number", bool: "True or False"}
_MANY = {int: "whole numbers", float: "numbers"}
_HINTS = {
    "StringThread": 'StringThread([("user", text)]) makes one of text; `await dataset.load(ctx)` loads a dataset\'s',
    "TokenizedThread": "`await model.tokenize_thread(thread)` makes one of a StringThread",
    "InferenceModel": "`await builder.spawn_inference(name)` gives one",
    "TrainingModel": "`await builder.spawn_train(name, max_batch_size)` gives one",
    "BaseGrader": 'BaseGrader.from_function("name", function) makes one of a function',
    "Logger": "get_prod_logger(ctx) gives one; your own is a subclass of Logger",
    "StageNotifier": "ctx.job.stage_notifier(name) gives one",
    "RecipeCallback": "your own is a subclass of RecipeCallback",
}


def checked_class(cls: C) -> C:
    """Check the arguments of the class's own public methods."""
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(cls, name, checked(method))
    return cls


def checked(function: F) -> F:
    """Raise UsageError for arguments of another kind than annotated, for missing ones and for unknown ones.

    A coroutine function raises when it is awaited, anything else when it is called.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function, args, kwargs)
        return function(*args, **kwargs)

    @wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        check_arguments(function, args, kwargs)
        return await function(*args, **kwargs)

    return cast("F", run if inspect.iscoroutinefunction(function) else call)


def check_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise UsageError for arguments that do not fit the annotations; see `checked`."""
    signature, kinds = _described(function)
    name = function.__qualname__.removesuffix(".__init__").rpartition(".<locals>.")[2]
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"{name}: {error}", hint="it takes " + ", ".join(n for n in signature.parameters if n != "self")
        ) from None
    for argument, value in bound.arguments.items():
        if not is_of(value, kinds.get(argument, Any)):
            wanted, shown = _in_words(kinds[argument]), f"{' '.join(repr(value).split()):.80} ({type(value).__name__})"
            hint = "; ".join(hint for known, hint in _HINTS.items() if known in wanted)
            raise UsageError(f"{name}: {argument} must be {wanted}, not {shown}", hint=hint)


@cache
def _described(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    signature = inspect.signature(function)
    kinds = typing.get_type_hints(function, localns=_KNOWN_ONLY_TO_TYPE_CHECKERS)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return signature, {n: kinds[n] for n, p in signature.parameters.items() if n in kinds and p.kind not in variadic}


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of the annotated kind, as far as a quick check can decide."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if kind in _NUMBERS:
        return hasattr(type(value), "__index__" if kind is int else "__float__")
    if origin is Sequence:
        if isinstance(value, str | bytes | Mapping) or not (hasattr(value, "__len__") and hasattr(value, "__iter__")):
            return False
        # Only the first few are checked: a dataset's rows may be in a file.
        return inner[0] in _NUMBERS or all(is_of(member, inner[0]) for member in islice(value, 8))
    if origin is tuple:
        pair = isinstance(value, tuple | list)
        return pair and (inner[0] in _NUMBERS or (len(value) == len(inner) and all(map(is_of, value, inner))))
    if origin is Callable:
        return callable(value)
    return isinstance(value, origin or (NoneType if kind is None else kind))


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one) for one in inner if one is not NoneType)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is Sequence:
        return f"a sequence of {_MANY.get(inner[0]) or _in_words(inner[0])}"
    if origin is tuple:
        return f"a tuple ({', '.join(_in_words(one) for one in inner)})"
    if origin is Callable:
        return "a function"
    return _NUMBERS.get(kind) or str(getattr(origin or kind, "__name__", kind))


def whole(name: str, value: int, least: int) -> int:
    """`value` as an int, because the ranks cannot read a float here and the run would end.

    Raises UsageError naming the argument unless it is whole and at least `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise UsageError(f"{name} must be at least {least}, not {value}")
    return number
