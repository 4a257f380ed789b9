"""Pydantic models as JSON schemas, as text for prompts, and read from the text of a completion."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from inspect import isclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import json_repair
from pydantic import BaseModel, ValidationError

from harmony_core.errors import JsonParseError, OutputParserException, UndescribedField, UsageError
from harmony_core.text.threads import StringThread

T = TypeVar("T", bound=BaseModel)

FIX_OUTPUT_FORMAT = """This text should be one JSON object of the schema below, but it cannot be read: {error}
<text>
{completion}
</text>
<schema>
{schema}
</schema>
Write the JSON object that the text means, with the values that stand in it. Answer with the JSON object alone."""
"""The prompt that asks for a completion again; its fields are `schema`, `completion` and `error`."""

_MARKED = re.compile(r"(?:```(?:json)?|<json>)\s*(.*?)(?:```|</json>|\Z)", re.DOTALL | re.IGNORECASE)


def get_pydantic_schema(base_model: type[BaseModel]) -> str:
    """The model's JSON schema as JSON text. Its objects take no other fields; its own fields have no titles."""
    if not (isclass(base_model) and issubclass(base_model, BaseModel)):
        raise UsageError(f"a pydantic model is needed, not {base_model!r}", hint="class Answer(BaseModel): ...")
    schema = base_model.model_json_schema()
    for field in schema.get("properties", {}).values():
        field.pop("title", None)
    _close(schema)
    return json.dumps(schema, ensure_ascii=False)


def get_simple_pydantic_schema(model: type[BaseModel]) -> str:
    """The model's JSON schema as JSON text, without its title and type: as short as a prompt wants it."""
    schema = json.loads(get_pydantic_schema(model))
    return json.dumps({key: value for key, value in schema.items() if key not in ("title", "type")}, ensure_ascii=False)


def _close(node: Any) -> None:
    if isinstance(node, dict):
        if node.get("type") == "object":
            node.setdefault("additionalProperties", False)
        node = list(node.values())
    for inner in node if isinstance(node, list) else ():
        _close(inner)


def render_schema(pydantic_model: type[BaseModel], with_field_descriptions: bool = True) -> str:
    """The fields and their types in the form of a JSON object, then a line `field: description` for each.

    A nested field is written `a.b`, one of a list's items `a[].b`. Raises UndescribedField, which is a ValueError, for
    a field without a description.
    """
    described = ("", *_descriptions(pydantic_model, "", ())) if with_field_descriptions else ()
    return "\n".join([_spelled(pydantic_model, "", ()), *described])


def render_pydantic_model(pydantic_model: BaseModel) -> str:
    """The instance as JSON text, indented."""
    return pydantic_model.model_dump_json(indent=2)


def _spelled(hint: Any, indent: str, inside: tuple[Any, ...]) -> str:
    """A type as text; a model that contains itself appears there by its name."""
    origin, args = get_origin(hint), get_args(hint)
    if isclass(hint) and origin is None and issubclass(hint, BaseModel) and hint not in inside:
        deeper, within = indent + "  ", (*inside, hint)
        fields = hint.model_fields.items()
        lines = [f'{deeper}"{name}": {_spelled(field.annotation, deeper, within)}' for name, field in fields]
        return "\n".join(["{", ",\n".join(lines), indent + "}"])
    if isclass(hint) and origin is None and issubclass(hint, Enum):
        return f"Enum[{', '.join(json.dumps(member.value) for member in hint)}]"
    if origin is Literal:
        return f"Literal[{', '.join(map(json.dumps, args))}]"
    if origin is Annotated:
        return _spelled(args[0], indent, inside)
    inner = [_spelled(arg, indent, inside) for arg in args if arg not in (types.NoneType, ...)]
    if origin in (Union, types.UnionType):
        union = inner[0] if len(inner) == 1 else f"Union[{', '.join(inner)}]"
        return f"Optional[{union}]" if types.NoneType in args else union
    if isclass(origin) and issubclass(origin, Mapping):
        return f"Dict[{', '.join(inner)}]"
    if isclass(origin) and issubclass(origin, Collection):
        return f"[{', '.join(inner)}]"
    return str(getattr(hint, "__name__", hint))


def _descriptions(hint: Any, place: str, inside: tuple[Any, ...]) -> Iterator[str]:
    """Lines for the fields of the models in a type, below `place`, which ends with a dot."""
    origin = get_origin(hint)
    if isclass(hint) and origin is None and issubclass(hint, BaseModel) and hint not in inside:
        for name, field in hint.model_fields.items():
            if not field.description:
                what = f"the field {place}{name} of {hint.__name__} has no description"
                raise UndescribedField(what, hint="Field(description=...), or with_field_descriptions=False")
            yield f"{place}{name}: {field.description}"
            yield from _descriptions(field.annotation, f"{place}{name}.", (*inside, hint))
    below = f"{place[:-1]}[]." if isclass(origin) and issubclass(origin, Collection) else place
    for arg in get_args(hint) if origin is not Literal else ():
        yield from _descriptions(arg, below, inside)


def pydantic_parse(text: str, pydantic_object: type[T]) -> T:
    """Read an instance from the text of a completion: its JSON, alone, in a fence, or in `<json>` tags.

    Reasoning (`<think>`) is left out. JSON that is cut off or slightly wrong is repaired, if nothing can be read as it
    is. Raises OutputParserException with the text in `llm_output`.
    """
    answer = remove_reasoning(text)
    parts = [answer.strip("` \n\t"), *_MARKED.findall(answer)]
    problem = "it is not JSON"
    for part in (*parts, *map(_repaired, parts)):
        try:
            return pydantic_object.model_validate_json(part)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                problem = first_problem(error)
    raise OutputParserException(f"the completion is no {pydantic_object.__name__}: {problem}", llm_output=text)


def first_problem(error: ValidationError) -> str:
    """The first problem, with its place."""
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc'])) or 'the value'}: {found['msg']}"


def parse_constrained(text: str, pydantic_object: type[T], cut_after: int | None) -> T:
    """Read a completion that was drawn under the model's schema. Raises JsonParseError.

    `cut_after`: the number of its tokens if it was cut for its length. It is not repaired: what is missing is unknown.
    """
    try:
        return pydantic_object.model_validate_json(text)
    except ValidationError as error:
        why = f"is no {pydantic_object.__name__}: {first_problem(error)}"
        if cut_after is not None:
            why = f"was cut after {cut_after} tokens (max_gen_len), before its end"
        hint = "a larger max_gen_len, or limits in the schema"
        raise JsonParseError(f"the completion {why}", text, hint=hint) from None


def _repaired(text: str) -> str:
    """The JSON object or list in the text, with its strings and brackets closed; "" if there is none."""
    try:
        found = json_repair.repair_json(text, ensure_ascii=False)
    except (ValueError, RecursionError):  # more brackets than it can follow
        return ""
    return found if found.startswith(("{", "[")) else ""


def remove_reasoning(completion: str) -> str:
    """The completion without its first `<think>...</think>`, or without all before a `</think>` that none opens.

    Some templates open the reasoning in the prompt. Reasoning that never ends is the rest of the completion.
    """
    before, opened, rest = completion.partition("<think>")
    if "</think>" in before or not opened:
        return completion.partition("</think>")[2] if "</think>" in completion else completion
    return before + rest.partition("</think>")[2]


async def generate_and_validate(
    model: Any, thread: StringThread, pydantic_model: type[T], max_parsing_retries: int = 1
) -> tuple[str, T]:
    """Answer a thread that asks for JSON; returns the text of the completion and the instance read from it.

    A model with `constrained_decoding` is constrained to the schema, if the grammar can express it. A completion that
    cannot be read is given to the model again with the schema (`FIX_OUTPUT_FORMAT`), up to `max_parsing_retries` times.
    Raises JsonParseError with the last completion, and the errors of `model.generate`.
    """
    schema = get_pydantic_schema(pydantic_model)
    with suppress(UsageError, AttributeError):  # it draws freely, or the grammar cannot express the schema
        model = model.constrained_decoding(schema, "json")
    for tries in range(max_parsing_retries + 1):
        text = (await model.generate(thread)).last_content()
        try:
            return text, pydantic_parse(text, pydantic_model)
        except OutputParserException as error:
            if tries == max_parsing_retries:
                raise JsonParseError(f"{error.message} (asked {tries + 1} times)", text) from error
            prompt = FIX_OUTPUT_FORMAT.format(schema=schema, completion=text, error=error.message)
            thread = StringThread([("user", prompt)])
    raise JsonParseError(f"max_parsing_retries must be 0 or more, not {max_parsing_retries}", "")
