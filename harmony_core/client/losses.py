"""The table of losses, and the conversion of a call's arguments into the samples that the ranks get.

A row of the table is the signature of a `TrainingModel.train_<name>`, decorated with a `Row`. The annotation of each
argument gives its kind of value. The argument is checked against it and sent to the ranks under its own name, where the
formula in `engine/training/losses.py` reads it. The table in the documentation is generated from the rows.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

from harmony_core.client.allowed_tokens import allowed_tokens
from harmony_core.client.batching import Accepted, Loss, TrainSample, require_weight
from harmony_core.errors import DataError, UsageError
from harmony_core.recipe_file import RecipeFile
from harmony_core.rpc.protocol import CustomLoss
from harmony_core.text.threads import StringThread, TokenizedThread

if TYPE_CHECKING:
    from harmony_core.client.live import LiveModel

M = TypeVar("M", bound=Callable[..., Any])
AnyThread = StringThread | TokenizedThread
Fields = dict[str, list[float]]
Settings = dict[str, float]


@dataclass(frozen=True)
class Numbers:
    """One number for each weighted token, or for each `of`. `single`: a plain number, not a sequence."""

    of: str = "weighted token"
    single: bool = False

    @property
    def words(self) -> str:
        """The kind of value, in the documentation."""
        return f"one for each {self.of}"

    def of_tokens(self, name: str, value: Any, count: int) -> list[float]:
        """A number for each of the sample's `count` tokens. Raises DataError naming the argument."""
        if self.single:
            return [per_sample(name, value)] * count
        return (
            per_token(name, value, count) if self.of == "weighted token" else per_token(name, value, 1, self.of) * count
        )


@dataclass(frozen=True)
class Setting:
    """A number greater than `least`, or equal to it if `included`."""

    least: float = 0.0
    included: bool = True

    @property
    def words(self) -> str:
        """The kind of value, in the documentation."""
        return f"{self.least:g} or more" if self.included else f"above {self.least:g}"

    def checked(self, name: str, value: float) -> float:
        """`value` as a float. Raises UsageError naming the argument unless it is finite and in the bounds."""
        if not math.isfinite(value) or value < self.least or (value == self.least and not self.included):
            comma = ", " if self.included else " "
            raise UsageError(f"{name} must be a finite number{comma}{self.words}, not {value}")
        return float(value)

    def enter(self, settings: Settings, name: str, value: Any) -> None:
        """Add the value to the settings of a loss."""
        settings[name] = self.checked(name, value)


@dataclass(frozen=True)
class Choice:
    """One of some names. The ranks get it as a setting; the first name means the plain loss and is not sent."""

    names: tuple[str, ...]

    @property
    def words(self) -> str:
        """The kind of value, in the documentation."""
        return " or ".join(f'"{name}"' for name in self.names)

    def enter(self, settings: Settings, name: str, value: Any) -> None:
        """Add the value to the settings of a loss. Raises UsageError naming the argument."""
        if value not in self.names:
            raise UsageError(f"{name} must be {self.words}, not {value!r}")
        settings |= {value: 1.0} if value != self.names[0] else {}


class Average:
    """How a loss on tokens is averaged. The ranks see only the resulting weights."""

    words = '"token", "sequence" or a number above 0'


Kind = Numbers | Setting | Choice | Average
PerToken = Annotated[Sequence[float], Numbers()]
PerSequence = Annotated[Sequence[float], Numbers("sequence")]
PerThread = Annotated[float, Numbers("thread", single=True)]
NotNegative = Annotated[float, Setting()]
AboveZero = Annotated[float, Setting(0.0, included=False)]
AboveOne = Annotated[float, Setting(1.0, included=False)]
Clipping = Annotated[str, Choice(("ppo", "cispo"))]
Normalise = Annotated[str | float, Average()]

Adjust = Callable[[TokenizedThread, Fields, Settings], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One loss, as the decorator of its `train_<name>`; the method's signature gives the other facts.

    `unit`: the step is divided by the number of these, unless `normalise` is given. `of_values`: needs a scalar head.
    `on_last`: scored at the thread's last token, not at its weighted ones. `of_sampled`: an adapter's dropout is off,
    since the sampler uses none. `adjust` makes final changes to fields and settings. `threads`: the arguments that are
    threads, which form one group; `kinds`: the kind of value of each other argument.
    """

    unit: str
    of_values: bool = False
    on_last: bool = False
    of_sampled: bool = False
    adjust: Adjust | None = None
    name: str = ""
    threads: tuple[str, ...] = ()
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def __call__(self, method: M) -> M:
        """Enter the method's signature into the table."""
        hints, name = get_type_hints(method, include_extras=True), method.__name__.removeprefix("train_")
        threads = tuple(argument for argument, hint in hints.items() if hint == AnyThread)
        kinds = {argument: kind for argument, hint in hints.items() if (kind := _kind(hint)) is not None}
        ROWS[name] = replace(self, name=name, threads=threads, kinds=kinds)
        return method

    def place(self, argument: str) -> tuple[int, str]:
        """The index of the argument's thread, and its field name (in a pair, without the thread's suffix)."""
        if len(self.threads) == 1:
            return 0, argument
        return int(argument.endswith("_neg")), argument.removesuffix("_pos").removesuffix("_neg")


ROWS: dict[str, Row] = {}
"""The table of losses, by name."""


def _kind(hint: Any) -> Kind | None:
    """The kind of value in an annotation, which may be optional."""
    notes = (note for part in (hint, *get_args(hint)) for note in getattr(part, "__metadata__", ()))
    return next((note for note in notes if isinstance(note, Kind)), None)


def samples_of(live: LiveModel, row: Row, given: Mapping[str, Any]) -> Accepted:
    """The samples of one call, with arguments by name."""
    threads = [live.tokenized(live.whole(given[name]) if row.on_last else given[name]) for name in row.threads]
    masks = [_last(thread) if row.on_last else scored_tokens(thread) for thread in threads]
    counts = [int(sum(mask)) for mask in masks]
    fields, settings = [Fields() for _ in threads], Settings()
    unit, amount = row.unit, float(counts[0]) if row.unit == "weighted tokens" else 1.0
    for name, kind in row.kinds.items():
        value = given[name]
        if value is None:
            continue
        if isinstance(kind, Numbers):
            thread, field_name = row.place(name)
            fields[thread][field_name] = kind.of_tokens(name, value, counts[thread])
        elif isinstance(kind, Average):
            masks[0], unit, amount = averaged(masks[0], value)
        else:
            kind.enter(settings, name, value)
    if row.adjust is not None:
        row.adjust(threads[0], fields[0], settings)
    kept = Loss(row.name, tuple(settings.items()), len(threads), dropout=not row.of_sampled)
    parts = zip(threads, masks, fields, strict=True)
    if row.on_last:
        # No token is predicted, so the targets can be any tokens.
        samples = [TrainSample(t.token_ids, t.token_ids, w, loss=kept, fields=f, on_last=True) for t, w, f in parts]
    else:
        samples = [live.sample(t, w, kept, f) for t, w, f in parts]
    return Accepted(samples, unit, amount)


def scored_tokens(thread: TokenizedThread) -> list[float]:
    """1 for each target that is a weighted token, else 0. Raises NothingToTrain if no target is weighted."""
    mask = [1.0 if weight > 0 else 0.0 for weight in thread.token_weights[1:]]
    require_weight(mask)
    return mask


def _last(thread: TokenizedThread) -> list[float]:
    """1 for the thread's last token."""
    if not thread.token_ids:
        raise DataError("the thread has no tokens: there is nothing to score")
    return [0.0] * (len(thread.token_ids) - 1) + [1.0]


def per_token(name: str, values: Sequence[float], count: int, of: str = "weighted tokens") -> list[float]:
    """`values` as floats. Raises DataError naming the argument unless there are `count`, all of them finite."""
    if len(values) != count:
        hint = f"{name} takes one for each of them, in order"
        raise DataError(f"{name}: {len(values)} values for {count} {of}", hint=hint)
    floats = list(map(float, values))
    if not all(map(math.isfinite, floats)):
        place = next(place for place, value in enumerate(floats) if not math.isfinite(value))
        raise DataError(f"{name}[{place}] is {floats[place]}", hint="drop the sample, or mend what computed it")
    return floats


def per_sample(name: str, value: float) -> float:
    """`value` as a float. Raises DataError naming the argument unless it is finite."""
    if not math.isfinite(value):
        raise DataError(f"{name} is {value}", hint="drop the sample, or mend what computed it")
    return float(value)


def averaged(mask: list[float], normalise: str | float) -> tuple[list[float], str, float]:
    """Each token's weight in the loss, the unit of the step's denominator, and the sample's share of it.

    "token": the mean over all tokens of the step (DAPO; Yu et al. 2025). "sequence": the mean over samples of each
    sample's mean (GRPO as published; Shao et al. 2024). A number: the sum over tokens, by that number for each sample
    (Dr. GRPO; Liu et al. 2025).
    """
    count = sum(mask)
    if normalise == "token":
        return mask, "weighted tokens", count
    if normalise == "sequence":
        return [weight / count for weight in mask], "samples", 1.0
    if isinstance(normalise, str) or not (math.isfinite(normalise) and normalise > 0):
        raise UsageError(f"normalise must be {Average.words}, not {normalise!r}")
    return mask, "given lengths", float(normalise)


def importance(thread: TokenizedThread, fields: Fields, settings: Settings) -> None:
    """With `importance_cap`, multiply each advantage by min(old / sampler, cap), which corrects for a stale sampler.

    The ratio is one of probabilities (exp of old log-prob - sampler's); Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training" (2025).
    """
    if "cispo" in settings and "dual_clip" in settings:
        raise UsageError('dual_clip has no meaning with clipping="cispo"', hint="leave it out")
    cap, sampler = settings.pop("importance_cap", None), fields.pop("sampler_logprobs", None)
    if cap is None:
        if sampler is not None:
            raise UsageError("sampler_logprobs has no meaning without importance_cap", hint="give importance_cap=2.0")
        return
    trajectory = fields["trajectory_logprobs"]
    if sampler is None:
        if thread.policy_logprobs is None:
            raise UsageError(
                "importance_cap needs the sampler's log-probs, and the thread's weighted tokens have no record of them",
                hint="give sampler_logprobs=, or train the thread that generate_tokens returned",
            )
        sampler = per_token("sampler_logprobs", thread.policy_logprobs, len(trajectory))
    steps = zip(fields["advantages"], trajectory, sampler, strict=True)
    fields["advantages"] = [a * math.exp(min(t - s, math.log(cap))) for a, t, s in steps]


def check_head(name: str, scalar: bool, loss: str) -> None:
    """Raise UsageError for a loss on values without a scalar head, or a loss on log-probs with one."""
    of_values = loss in ROWS and ROWS[loss].of_values
    if of_values and not scalar:
        raise UsageError(
            f"train_{loss} needs a scalar head, and {name!r} is a policy: it has a vocabulary head",
            hint="into_scoring_model() before spawn_train",
        )
    if scalar and not of_values:
        what = "train_language_modelling and train_tangents need" if loss == "linear" else f"train_{loss} needs"
        known = ", ".join(sorted(f"train_{row.name}" for row in ROWS.values() if row.of_values))
        raise UsageError(
            f"{what} log-probs, and {name!r} has a scalar head: it gives none", hint=f"it is trained with {known}"
        )


Values = Sequence[float | Sequence[float]]
"""For each thread, one number or one number for each weighted token."""

SHAPE = "def loss(logprobs, samples, *, <fields>): ... at the top level of the recipe's file"


def named(loss: Callable[..., Any], recipe: RecipeFile | None) -> CustomLoss:
    """The place of a loss function. Raises UsageError unless it is a top-level function of the recipe's file."""
    if not inspect.isfunction(loss) or inspect.iscoroutinefunction(loss) or inspect.isgeneratorfunction(loss):
        raise UsageError(f"a custom loss must be a plain function, not {loss!r}", hint=SHAPE)
    name, module = loss.__name__, sys.modules.get(loss.__module__)
    if name == "<lambda>":
        raise UsageError("a custom loss cannot be a lambda: ranks import it by its name", hint=SHAPE)
    if loss.__qualname__ != name:
        raise UsageError(f"{loss.__qualname__} is not at the top level: ranks cannot import it", hint=SHAPE)
    if recipe is None:
        raise UsageError(
            f"this client was started without a recipe, so ranks cannot import {name}",
            hint="use `adaptive run recipe.py`, get_client(recipe=FILE), or train_tangents",
        )
    file = getattr(module, "__file__", None)
    if file is None or Path(file).resolve() != recipe.path:
        raise UsageError(
            f"{name} is of {file or loss.__module__}; ranks import losses from the recipe's file, {recipe.path}",
            hint=f"define it there: {SHAPE}",
        )
    if vars(module).get(name) is not loss:
        raise UsageError(f"{name} in {recipe.path} is another object than this function", hint="leave decorators away")
    return CustomLoss(path=str(recipe.path), sha256=recipe.sha256, function=name)


def check_fields(loss: Callable[..., Any], fields: Mapping[str, Any]) -> None:
    """Raise UsageError unless the function can be called with these fields."""
    try:
        more = {"entropies": None} if takes_entropies(loss) else {}
        inspect.signature(loss).bind(None, None, **more, **dict.fromkeys(fields))
    except TypeError as error:
        given = ", ".join(fields) or "no fields"
        raise UsageError(f"{loss.__name__} cannot be called with {given}: {error}", hint=SHAPE) from error


def takes_entropies(loss: Callable[..., Any]) -> bool:
    """Whether the function has a parameter `entropies`."""
    return "entropies" in inspect.signature(loss).parameters


def groups(
    live: LiveModel,
    threads: Sequence[AnyThread],
    function: Callable[..., Any],
    fields: Mapping[str, Values],
    group: int,
    denominator: float | None,
) -> list[Accepted]:
    """The samples of `TrainingModel.train_custom`."""
    source = named(function, live.engine.options.recipe)
    check_fields(function, fields)
    if group < 1 or not threads or len(threads) % group:
        raise UsageError(f"{len(threads)} threads do not make groups of {group}")
    if denominator is not None and not (math.isfinite(denominator) and denominator >= 0):
        raise UsageError(f"denominator must be a finite number, 0 or more, not {denominator}")
    for name, values in fields.items():
        if isinstance(values, int | float) or len(values) != len(threads):
            found = "one number" if isinstance(values, int | float) else f"{len(values)} entries"
            raise DataError(f"{name}: {found} for {len(threads)} threads", hint=f"{name} takes one for each thread")
    loss = Loss("custom", (("entropies", 1.0),) if takes_entropies(function) else (), group, source)
    samples, counts = [], []
    for place, given in enumerate(threads):
        thread = live.tokenized(given)
        mask = scored_tokens(thread)
        counts.append(sum(mask))
        own = {name: of_sample(f"{name}[{place}]", values[place], int(counts[-1])) for name, values in fields.items()}
        samples.append(live.sample(thread, mask, loss, own))
    accepted = []
    for first in range(0, len(samples), group):
        members = samples[first : first + group]
        unit = "weighted tokens" if denominator is None else "given denominators"
        amount = sum(counts[first : first + group]) if denominator is None else float(denominator)
        accepted.append(Accepted(members, unit, amount))
    return accepted


def linear(
    live: LiveModel,
    inp_tokens: Sequence[int],
    image_patches: Sequence[tuple[int, bytes]],
    tangents: Sequence[float],
    tgt_tokens: Sequence[int],
    denominator: float | None,
    sampler_logprobs: Sequence[float] | None,
    thread: TokenizedThread | None,
) -> Accepted:
    """The sample of `TrainingModel.train_tangents`."""
    if image_patches:
        raise DataError("image patches given to a text model")
    if not len(inp_tokens) == len(tangents) == len(tgt_tokens):
        found = f"{len(inp_tokens)}, {len(tangents)} and {len(tgt_tokens)}"
        raise DataError(f"inp_tokens, tangents and tgt_tokens must be of one length, not {found}")
    tokens, targets = [int(t) for t in inp_tokens], [int(t) for t in tgt_tokens]
    live.check_ids(tokens)
    live.check_ids(targets)
    if denominator is not None and not 0 <= denominator < math.inf:
        raise DataError(f"denominator must be a finite number, 0 or more, not {denominator}")
    recorded = None if sampler_logprobs is None else [float(x) for x in sampler_logprobs]
    if recorded is not None and len(recorded) != len(tgt_tokens):
        raise DataError(f"{len(recorded)} sampler_logprobs for {len(tgt_tokens)} tgt_tokens")
    if thread is not None and thread.token_ids != [*tokens, *targets[-1:]]:
        raise DataError(f"the thread's {len(thread.token_ids)} tokens are not inp_tokens and the last of tgt_tokens")
    allowed = None if thread is None else allowed_tokens(live, thread, "train_tangents")
    sample = TrainSample(tokens, targets, [float(t) for t in tangents], recorded, allowed=allowed)
    if denominator is None:
        return Accepted([sample], "tangents", float(sum(t != 0 for t in tangents)))
    return Accepted([sample], "given denominators", float(denominator))


def of_sample(name: str, value: float | Sequence[float], count: int) -> list[float]:
    """One number for each weighted token of a sample. Raises DataError naming them."""
    if isinstance(value, int | float):
        return [per_sample(name, value)] * count
    return per_token(name, value, count)
