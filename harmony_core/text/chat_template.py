"""Chat templates: jinja2 with transformers' settings, in a sandbox with limits on time, memory and output.

A template comes with the weights and is not trusted. It cannot reach Python's internals (jinja2's immutable sandbox).
Everything that grows or repeats (loops, macros, strings, containers, output) is charged to one budget per rendering; a
template that exceeds it fails with a TokenizationError that names the file. This module does not handle tokens.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateError, meta, nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import do_format, do_join, do_replace
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from harmony_core.errors import TokenizationError

MAX_SOURCE = 512 * 1024
MAX_OUTPUT = 32 * 1024 * 1024
MAX_SECONDS = 5.0
MAX_SPENT = 256 * 1024 * 1024
# The cost of one loop iteration, one call of a macro or one element of a container; a character costs 1.
STEP = 256

_MAX_INTEGER_BITS = 512
_WIDE_FORMAT = re.compile(r"[1-9]\d{3}|\*|:[^}]*\{")
_REFUSED_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "encode"})
_GROWING_FILTERS = (
    *("batch", "center", "forceescape", "format", "indent", "pprint", "slice", "urlize", "wordwrap", "xmlattr"),
)


@dataclass
class _Budget:
    """The cost of a rendering so far, and the positions of the generation blocks in its output."""

    deadline: float
    spent: int = 0
    written: int = 0
    generations: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation and the character spans of its `{% generation %}` blocks."""

    text: str
    generations: tuple[tuple[int, int], ...]


class ChatTemplate:
    """One compiled template. `origin` names it in errors; it can read `variables` (special tokens and others).

    `choices` are the template itself and the one for conversations with `tools`: the same, or that of `with_tools`.
    Raises TokenizationError for a template that cannot be compiled.
    """

    def __init__(self, source: str, origin: str, variables: Mapping[str, Any]) -> None:
        self.source = source
        self.origin = origin
        self._variables = dict(variables)
        self.choices = (self, self)
        self._sandbox = _Sandbox()
        if len(source) > MAX_SOURCE:
            self._fail(f"it is longer than {MAX_SOURCE} characters")
        try:
            self._template: Template = self._sandbox.from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            self._fail(f"line {line}: {error}" if line else str(error))
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            self._fail(f"it cannot be compiled: {type(error).__name__}")

    @property
    def reads(self) -> frozenset[str]:
        """The names of the variables that the template reads."""
        return self._sandbox.variables_read(self.source)

    def with_tools(self, other: ChatTemplate | None) -> ChatTemplate:
        """This template, with another one for conversations that have tools."""
        self.choices = (self, other or self)
        return self

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The template with more variables, which replace its own; with `tools`, the template for tools."""
        if not variables:
            return self
        given = {**self._variables, **variables}
        other = copy.copy(self.choices[given.get("tools") is not None])
        other._variables, other.choices = given, self.choices
        return other

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> Rendered:
        """Render a conversation in transformers' message form. Raises TokenizationError with the template's reason."""
        given = {"tools": None, "documents": None, **self._variables}
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        chunks: list[str] = []
        with self._sandbox.rendering() as budget:
            try:
                for chunk in self._template.generate(given):
                    chunks.append(chunk)
                    budget.written += len(chunk)
                    if budget.written > MAX_OUTPUT:
                        raise SecurityError(f"it writes more than {MAX_OUTPUT} characters")
            except Exception as error:
                # A template is foreign code: any exception means that it refuses this conversation.
                self._fail(str(error) or type(error).__name__, refused=isinstance(error, _Refusal))
        return Rendered("".join(chunks), tuple(budget.generations))

    def missing(self) -> list[str]:
        """Descriptions of filters, tests and functions that the template uses but that do not exist."""
        tree = self._sandbox.parse(self.source)
        guarded = {node.node.name for node in tree.find_all(nodes.Test) if isinstance(node.node, nodes.Name)}
        called = {node.node.name for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Name)}
        filters = {node.name for node in tree.find_all(nodes.Filter)} - self._sandbox.filters.keys()
        tests = {node.name for node in tree.find_all(nodes.Test)} - self._sandbox.tests.keys()
        functions = (called & self.reads) - guarded
        return [
            f"the {what} {name!r}"
            for what, names in (("filter", filters), ("test", tests), ("function", functions))
            for name in sorted(names)
        ]

    def _fail(self, reason: str, refused: bool = False) -> NoReturn:
        raise TokenizationError(f"{self.origin}: chat template: {reason[:500]}", refused=refused) from None


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks the part of the output that the model generates."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        budget = cast(_Sandbox, self.environment).budget
        budget.generations.append((budget.written, budget.written + len(text)))
        return text


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self._rendering = threading.local()
        # Parsed once for a template and its copies with variables.
        self.variables_read = functools.cache(
            lambda source: frozenset(meta.find_undeclared_variables(self.parse(source)))
        )
        # The optimizer would fold constants while compiling, outside of any budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, LoopControlExtension],
            optimized=False,
            finalize=self._finalize,
        )
        del self.filters["random"], self.globals["lipsum"]  # a prompt must be the same each time
        self.filters |= {name: self._paying(self.filters[name]) for name in _GROWING_FILTERS}
        self.filters |= {"tojson": self._tojson, "join": self._join, "replace": self._replace}
        self.filters["string"] = lambda value: str(self.sized(value))
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # without the attributes of the type
            "namespace": _TemplateNamespace,
        }

    @property
    def budget(self) -> _Budget:
        """The budget of the rendering in progress on this thread."""
        return cast(_Budget, self._rendering.budget)

    @contextmanager
    def rendering(self) -> Iterator[_Budget]:
        """One rendering, with a budget of its own."""
        self._rendering.budget = _Budget(time.monotonic() + MAX_SECONDS)
        try:
            yield self.budget
        finally:
            del self._rendering.budget

    def spend(self, amount: int = 0) -> bool:
        """Charge one step and `amount` characters. Always returns true, for use in a condition."""
        budget = self.budget
        budget.spent += STEP + amount
        if budget.spent > MAX_SPENT:
            raise SecurityError("it repeats or grows without end")
        if time.monotonic() > budget.deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} s")
        return True

    def sized(self, value: Any) -> Any:
        """The value, charged at its expanded size: a shared part counts each time that it is reached."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple):
            self.spend()
            for item in value:
                self.sized(item)
        elif isinstance(value, dict):
            self.sized([*value.items()])
        elif isinstance(value, Namespace):
            self.sized(getattr(value, "_Namespace__attrs"))  # noqa: B009
        return value

    def _size(self, value: Any) -> int:
        before = self.budget.spent
        self.sized(value)
        return self.budget.spent - before

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Paying().visit(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = self._size(left) + self._size(right)
        if operator == "*":
            self.spend(max((n for n in (left, right) if isinstance(n, int)), default=0) * size)
        elif operator == "**":
            self._small(left, 32)
            self._small(right, 8)
        elif operator == "%" and isinstance(left, str):
            self.spend(left.count("%") * size)
            _refuse_wide(left)
        value = super().call_binop(context, operator, left, right)
        return self._small(value, _MAX_INTEGER_BITS)

    def _small(self, value: Any, bits: int) -> Any:
        if isinstance(value, int) and value.bit_length() > bits:
            raise SecurityError("a number grows too large")
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _REFUSED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped by jinja2's sandbox
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            args = __self._pay_method(text, method.__name__, args, kwargs)
        return __self.sized(super().call(__context, __obj, *args, **kwargs))

    def _pay_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if name == "join" and args:
            items = [*args[0]]
            self.spend(self._size(items) + len(text) * len(items))
            return (items, *args[1:])
        if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            self.spend(text.count(args[0]) * len(args[1]))
        elif name in ("format", "format_map"):
            _refuse_wide(text)
            self.spend(text.count("{") * self._size([args, kwargs]))
        return args

    def call_filter(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        return self.sized(super().call_filter(name, value, *args, **kwargs))

    def call_test(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        self.spend()
        return super().call_test(name, value, *args, **kwargs)

    def joined(self, *values: Any) -> str:
        """The `~` operator."""
        return "".join(str(self.sized(value)) for value in values)

    @pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        return self.sized(value)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes HTML.
        self.spend(self._size(value) * (indent or 1))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _paying(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, charged before it runs: the size of its arguments times its numbers and text lengths."""

        @functools.wraps(inner)
        def paid(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            texts = [value for value in given if isinstance(value, str)]
            factor = 8 + sum(map(len, texts[1:])) + sum(abs(value) for value in given if isinstance(value, int))
            if inner is do_format:
                _refuse_wide(str(args[0]))
                factor = str(args[0]).count("%")
            self.spend(self._size(given) * factor)
            return self.sized(inner(*args, **kwargs))

        return paid

    @pass_eval_context
    def _join(self, context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = [*value]
        self.spend(self._size(items) + len(d) * len(items))
        return str(do_join(context, items, d, attribute))

    @pass_eval_context
    def _replace(self, context: nodes.EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
        text = str(self.sized(s))
        self.spend(text.count(old) * len(new))
        return str(do_replace(context, text, old, new, count))


class _Paying(NodeTransformer):
    """Rewrites a template so that its loops, macros, containers and `~` are charged to the budget."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.AssignBlock):
            literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            paid = nodes.ExprStmt(_environment_call("spend", [nodes.Const(literal)]))
            node.body.insert(0, paid.set_lineno(node.lineno, True))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_environment_call("spend", []), node.test).set_lineno(node.lineno)
        if isinstance(node, nodes.Concat):
            return _environment_call("joined", node.nodes).set_lineno(node.lineno, True)
        if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return _environment_call("sized", [node]).set_lineno(node.lineno)
        return node


def _environment_call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _refuse_wide(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise SecurityError("a format that pads")


class _Refusal(TemplateError):
    """The template's own `raise_exception`."""


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


class _TemplateNamespace(Namespace):
    """`namespace(...)` in a template, which cannot set Python's own attributes."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)
