"""The interface that all handles of live models share: the settings of requests, and the tokenizer. Asks no rank."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, cast, get_args

from harmony_core.client.live import Limit, LiveModel
from harmony_core.config.argument_kinds import checked_class
from harmony_core.errors import DataError, UsageError, did_you_mean
from harmony_core.grammar import Constraint, Kind
from harmony_core.request_seeds import apart
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.tool_calls import Tool

NO_TOOL_URIS = "tool URIs are those of a platform's tools, which are not supported"
TOOLS_INSTEAD = "model.tools([Tool(name, description, parameters)]) shows tools; an environment answers the calls"


class SerializedThread(NamedTuple):
    """A thread as numbers: token ids, image patches (none here), and a weight for each token."""

    token_ids: list[int]
    image_patches: list[tuple[int, bytes]]
    weights: list[float]


@dataclass(frozen=True)
class SamplingSettings:
    """The settings that a handle adds to each of its requests."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_gen_len: int | None = None
    min_gen_len: int = 0
    limits: tuple[Limit, ...] = ()
    constraint: Constraint | None = None
    tools: tuple[dict[str, Any], ...] = ()


@checked_class
class Handle:
    """What all handles of live models have: settings, of which setters return a copy, and the tokenizer."""

    def __init__(self, live: LiveModel, settings: SamplingSettings | None = None) -> None:
        self._live = live
        self._settings = settings or SamplingSettings()

    def __repr__(self) -> str:
        live = self._live
        return f"{type(self).__name__}({live.name!r}, model={live.version.ref!r}, tp={live.spawn.tp})"

    def _with(self, **changes: Any) -> Self:
        other = copy.copy(self)
        other._settings = replace(self._settings, **changes)
        return other

    def temperature(self, temperature: float) -> Self:
        """A copy that samples at this temperature; 0 is greedy."""
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, not {temperature}")
        return self._with(temperature=float(temperature))

    def top_p(self, top_p: float) -> Self:
        """A copy that samples from the smallest set of tokens with this probability."""
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {top_p}")
        return self._with(top_p=float(top_p))

    def max_gen_len(self, max_num_tokens: int) -> Self:
        """A copy that generates at most this many tokens (never more than `tokens_to_generate`)."""
        if max_num_tokens < 1:
            raise UsageError(f"max_gen_len must be at least 1, not {max_num_tokens}")
        return self._with(max_gen_len=int(max_num_tokens))

    def min_gen_len(self, min_num_tokens: int) -> Self:
        """A copy that generates at least this many tokens before it stops."""
        if min_num_tokens < 0:
            raise UsageError(f"min_gen_len must be 0 or more, not {min_num_tokens}")
        return self._with(min_gen_len=int(min_num_tokens))

    def constrained_decoding(self, schema_json: str, format: str = "json") -> Self:
        """A copy whose completions match a grammar: at each position only the tokens that it allows are sampled.

        `format` says what `schema_json` is: "json" a JSON schema, "regex" a regular expression that the whole
        completion matches, "choice" a JSON list of texts of which the completion is one, "lark" a grammar in
        llguidance's dialect of Lark. A completion ends where nothing but its end is allowed, even before `min_gen_len`;
        one that is cut at its limit (`finish_reason` "length") only begins as the grammar demands. Its record keeps the
        log-probs over the allowed tokens as `masked_logprobs`. With `continue_final` the new tokens alone match.

        Raises UsageError for a text that is not of this format, and for a schema with what the grammar cannot express;
        ModelRefused for a model without a tokenizer.
        """
        if format not in get_args(Kind):
            raise UsageError(
                f"there is no format {format!r} of a constraint", hint=did_you_mean(format, get_args(Kind))
            )
        if not self._live.tokenizer.stop_ids:
            raise UsageError(
                f"{self._live.name!r} has no stop token, with which a constrained completion ends",
                hint="name an eos_token in its tokenizer_config.json and import it again",
            )
        (constraint := Constraint(cast(Kind, format), schema_json)).compiled()
        return self._with(constraint=constraint)

    def max_seqlen(self, max_seqlen: int, setting: str = "max_seqlen") -> Self:
        """A copy that generates up to this many tokens, prompt included; `setting` names the limit in errors."""
        if max_seqlen < 2:
            raise UsageError(f"max_seqlen must be at least 2, not {max_seqlen}")
        return self._with(limits=(*self._settings.limits, Limit(max_seqlen, setting, setting)))

    def tools(self, tools: Sequence[Tool]) -> Self:
        """A copy that shows these tools to the model, through the chat template, in `generate` and `generate_tokens`.

        A thread with tools of its own keeps them. A call in a reply becomes function_call fragments of its turn;
        `tool_calls` reads one that stays text. Raises UsageError if the template cannot show tools.
        """
        template = self._live.tokenizer.template
        if tools and (template is None or "tools" not in template.choices[1].reads):
            raise UsageError(
                f"the chat template of {self._live.version.ref} cannot show tools: it does not read 'tools'",
                hint="add the model with a template that does (models add --chat-template FILE), or describe the "
                "tools in a system turn and read the calls in the environment",
            )
        return self._with(tools=tuple(tool.definition() for tool in tools))

    async def thread_with_tools(self, thread: StringThread, tool_uris: Sequence[str]) -> StringThread:
        """The thread itself without URIs. Tool URIs are not supported. Raises UsageError."""
        if tool_uris:
            raise UsageError(NO_TOOL_URIS, hint=TOOLS_INSTEAD)
        return thread

    def own_seeds(self) -> AbstractContextManager[None]:
        """Give separate random seeds to the requests inside the block.

        They depend on the place of this call among the model's requests, and not on how blocks that run at the same
        time share the model.
        """
        return apart(f"{self._live.name}/{self._live.next_request_seed()}")

    @property
    def longest_completion(self) -> int:
        """The maximum number of new tokens requested; the prompt may leave room for fewer."""
        cap = self._live.spawn.tokens_to_generate
        return min(self._settings.max_gen_len or cap, cap)

    def is_scalar(self) -> bool:
        """Whether the model has a scalar head in place of its language-model head."""
        return self._live.spawn.scalar

    def get_builder_args(self) -> dict[str, Any]:
        """The settings that this model was spawned with; "path" is its exact registry reference."""
        live = self._live
        return {
            "path": f"model_registry://{live.version.ref}",
            "tp": live.spawn.tp,
            "kv_cache_len": live.spawn.kv_tokens,
            "tokens_to_generate": live.spawn.tokens_to_generate,
            "use_adapter": live.spawn.lora is not None,
            "max_batch_size": live.spawn.max_batch_tokens,
            "max_seqlen": live.spawn.max_seqlen or live.spawn.spec.max_positions,
            "scalar": live.spawn.scalar,
        }

    async def tokenize_thread(self, thread: StringThread) -> TokenizedThread:
        """The thread's tokens under the model's chat template, with a weight for each."""
        return self._live.tokenizer.tokenize(thread)

    async def tokenize_parts(self, thread: StringThread) -> list[TokenizedThread]:
        """As `tokenize_thread`, but in several parts if one thread cannot show each weighted turn after its prompt.

        The weights are final: an assistant turn without weight cannot be given one in a part.
        """
        return self._live.tokenizer.parts(thread)

    async def detokenize_thread(self, thread: TokenizedThread) -> StringThread:
        """The thread's text; turns, weights and metadata survive."""
        return self._live.tokenizer.detokenize(thread)

    async def serialize_thread(self, thread: StringThread) -> SerializedThread:
        """Token ids, image patches (always empty: text models only), and a weight for each token."""
        return await self.serialize_tokenized_thread(self._live.tokenizer.tokenize(thread))

    async def serialize_tokenized_thread(self, thread: TokenizedThread) -> SerializedThread:
        """As `serialize_thread`, from tokens."""
        return SerializedThread(list(thread.token_ids), [], list(thread.token_weights))

    async def tokenize(self, data: str) -> list[int]:
        """Token ids of plain text; no template, no special tokens added."""
        return self._live.tokenizer.encode(data)

    async def detokenize(self, data: Sequence[int]) -> str:
        """Text of token ids."""
        return self._live.tokenizer.decode(list(data))

    async def char_to_token_rewards(self, text: str, char_rewards: Sequence[float]) -> list[float]:
        """The reward of each token of `tokenize(text)`: the sum of those of the characters that end in it.

        A character of several tokens counts for its last one, a character of no token for the next token, or the last
        one: the sum stays the same. Raises DataError unless there is one number for each character.
        """
        if len(char_rewards) != len(text):
            raise DataError(f"{len(char_rewards)} rewards for {len(text)} characters", hint="give one for each")
        offsets = self._live.tokenizer.encoding(text).offsets
        if not offsets:
            return []
        starts, rewards = [start for start, _ in offsets], [0.0] * len(offsets)
        for place, reward in enumerate(char_rewards):
            token = bisect_right(starts, place) - 1
            inside = token >= 0 and place < offsets[token][1]
            rewards[token if inside else min(token + 1, len(offsets) - 1)] += float(reward)
        return rewards
