"""The handle of a model that generates and scores. No tensors: requests to the ranks, and their answers as threads."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

from harmony_core.client.live import LiveModel
from harmony_core.errors import DataError, PromptTooLong, UsageError
from harmony_core.rpc.protocol import (
    Generate,
    Generated,
    Inspect,
    Inspected,
    Sampling,
    Score,
    Scored,
    pack_ints,
    unpack_floats,
    unpack_ints,
)
from harmony_core.threads import StringThread, TokenizedThread

SKIPPED = -1
"""A target that is not asked for."""


@dataclass(frozen=True)
class Timings:
    """How long one generation took, on the rank. `ttft`: until the first token; `tbt`: between tokens, on average."""

    ttft_from_creation_sec: float
    tbt_sec: float
    num_tokens: int

    @property
    def ttft_from_creation_ms(self) -> float:
        """Milliseconds until the first token."""
        return self.ttft_from_creation_sec * 1000

    @property
    def tbt_ms(self) -> float:
        """Milliseconds between tokens."""
        return self.tbt_sec * 1000


@dataclass(frozen=True)
class SamplingSettings:
    """What a handle adds to each of its requests."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_gen_len: int | None = None
    min_gen_len: int = 0


class InferenceModel:
    """A live model. Setters return a copy of the handle that shares the model."""

    def __init__(self, live: LiveModel, settings: SamplingSettings | None = None) -> None:
        self._live = live
        self._settings = settings or SamplingSettings()

    def __repr__(self) -> str:
        live = self._live
        return f"{type(self).__name__}({live.name!r}, model={live.version.ref!r}, tp={live.placement.tp})"

    def _with(self, **changes: Any) -> Self:
        other = copy.copy(self)
        other._settings = SamplingSettings(**{**vars(self._settings), **changes})
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
        """A copy that generates at most so many tokens (never more than `tokens_to_generate`)."""
        if max_num_tokens < 1:
            raise UsageError(f"max_gen_len must be at least 1, not {max_num_tokens}")
        return self._with(max_gen_len=int(max_num_tokens))

    def min_gen_len(self, min_num_tokens: int) -> Self:
        """A copy that does not stop before so many tokens."""
        if min_num_tokens < 0:
            raise UsageError(f"min_gen_len must be 0 or more, not {min_num_tokens}")
        return self._with(min_gen_len=int(min_num_tokens))

    def is_scalar(self) -> bool:
        """Whether the model has a scalar head in place of its language-model head."""
        return self._live.placement.scalar

    def get_builder_args(self) -> dict[str, Any]:
        """The settings that this model was spawned with; "path" is its exact registry reference."""
        live = self._live
        return {
            "path": f"model_registry://{live.version.ref}",
            "tp": live.placement.tp,
            "kv_cache_len": live.placement.kv_tokens,
            "tokens_to_generate": live.placement.tokens_to_generate,
            "use_adapter": live.placement.lora,
            "max_batch_size": live.placement.max_batch_tokens,
            "scalar": live.placement.scalar,
        }

    @overload
    def generate(
        self, thread: StringThread, response_model: None = None, return_timings: Literal[False] = False
    ) -> Coroutine[Any, Any, StringThread]: ...
    @overload
    def generate(
        self, thread: StringThread, response_model: None = None, *, return_timings: Literal[True]
    ) -> Coroutine[Any, Any, tuple[StringThread, Timings]]: ...
    def generate(
        self, thread: StringThread, response_model: None = None, return_timings: bool = False
    ) -> Coroutine[Any, Any, Any]:
        """A new thread: the input and one assistant turn.

        The request takes its number, and with it its random seed, when this is called, not when it is awaited.
        Raises PromptTooLong when no room is left to generate.
        """
        if response_model is not None:
            raise UsageError("structured output (response_model) is not supported", hint="parse the completion instead")
        return self._generate(thread, self._live.next_request_seed(), return_timings)

    async def _generate(self, thread: StringThread, seed: int, return_timings: bool) -> Any:
        tokenized, timings = await self._complete(thread, seed)
        generated = self._live.tokenizer.detokenize(tokenized)
        return (generated, timings) if return_timings else generated

    def generate_tokens(self, thread: StringThread) -> Coroutine[Any, Any, TokenizedThread]:
        """As `generate`, with the tokens as they were drawn, their log-probs and policy versions."""
        return self._generate_tokens(thread, self._live.next_request_seed())

    async def _generate_tokens(self, thread: StringThread, seed: int) -> TokenizedThread:
        return (await self._complete(thread, seed))[0]

    async def _complete(self, thread: StringThread, seed: int) -> tuple[TokenizedThread, Timings]:
        live = self._live
        prompt = live.tokenizer.prompt_ids(thread)
        self._check_ids(prompt)
        answer = await self._request_generation(prompt, seed)
        completion = unpack_ints(answer.tokens)
        tokenized = live.tokenizer.with_completion(
            thread,
            prompt,
            completion,
            logprobs=unpack_floats(answer.logprobs),
            sampled_logprobs=unpack_floats(answer.sampled_logprobs),
            versions=unpack_ints(answer.versions),
            finished=answer.finish_reason == "stop",
            model=live.name,
        )
        rest = max(len(completion) - 1, 1)
        timings = Timings(answer.seconds_to_first, (answer.seconds - answer.seconds_to_first) / rest, len(completion))
        return tokenized, timings

    async def _request_generation(self, prompt: list[int], seed: int) -> Generated:
        live = self._live
        if self.is_scalar():
            raise UsageError(
                f"{live.name!r} has a scalar head: it scores and cannot generate",
                hint="spawn a model with a vocabulary head to generate with",
            )
        live.require_ranks()
        room = live.placement.context_tokens - len(prompt)
        if room < 1 or not prompt:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and {live.name!r} holds {live.placement.context_tokens} in all: "
                "no room to generate",
                hint="shorten the prompt, or spawn with a larger max_seqlen where the model allows it",
                tokens=len(prompt),
                limit=live.placement.context_tokens,
            )
        settings = self._settings
        cap = live.placement.tokens_to_generate
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=min(settings.max_gen_len or cap, cap, room),
            min_tokens=settings.min_gen_len,
            seed=seed,
            stop_ids=tuple(sorted(live.tokenizer.stop_ids)),
        )
        async with live.generating:
            live.require_live()
            replica = live.least_busy()
            message = Generate(model=live.name, replica=replica, tokens=pack_ints(prompt), sampling=sampling)
            request = live.post(replica, message, len(prompt) + sampling.max_tokens)
            try:
                answer = await asyncio.shield(request.future)
            except asyncio.CancelledError:
                request.cancel()
                raise
        assert isinstance(answer, Generated)
        return answer

    async def logprobs(self, thread: StringThread) -> float:
        """Sum of the log-probs of the thread's weighted tokens, under the raw distribution."""
        return sum(await self.logprobs_per_token(self._live.tokenizer.tokenize(thread)))

    async def logprobs_per_token(self, thread: TokenizedThread) -> list[float]:
        """One log-prob for each weighted token, in order, under the raw distribution."""
        self._require_head(scalar=False, method="logprobs")
        tokens, weights = thread.token_ids, thread.token_weights
        if len(tokens) < 2:
            return []
        targets = [t if w > 0 else SKIPPED for t, w in zip(tokens[1:], weights[1:], strict=True)]
        values = await self._score(tokens[:-1], targets)
        return [v for v, t in zip(values, targets, strict=True) if t != SKIPPED]

    async def raw_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """The log-prob of each token given those before it; the first is 0."""
        self._require_head(scalar=False, method="raw_logprobs")
        if not tokens:
            return []
        return [0.0, *(await self._score(list(tokens[:-1]), list(tokens[1:])))]

    async def score(self, thread: TokenizedThread) -> list[float]:
        """One value for each weighted token, in order: that of the state in which the token was chosen.

        So it is read from the hidden state of the token before: what comes after, the token itself included, does not
        enter, as a baseline must not (Sutton and Barto, 2018, section 13.4). Raises UsageError without a scalar head.
        """
        self._require_head(scalar=True, method="score")
        tokens, weights = thread.token_ids, thread.token_weights
        asked = [0 if weight > 0 else SKIPPED for weight in weights[1:]]
        values = await self._score(tokens[:-1], asked)
        return [value for value, target in zip(values, asked, strict=True) if target != SKIPPED]

    async def score_last_token(self, thread: StringThread | TokenizedThread) -> float:
        """The value of the whole thread, read from the hidden state of its last token: what a reward model says.

        The same as transformers' *ForSequenceClassification gives for the thread's tokens. Raises UsageError without a
        scalar head, DataError for a thread without tokens.
        """
        self._require_head(scalar=True, method="score_last_token")
        tokenized = thread if isinstance(thread, TokenizedThread) else self._live.tokenizer.tokenize(thread)
        tokens = tokenized.token_ids
        if not tokens:
            raise DataError("the thread has no tokens: there is nothing to score")
        return (await self._score(tokens, [SKIPPED] * (len(tokens) - 1) + [0]))[-1]

    def _require_head(self, *, scalar: bool, method: str) -> None:
        if self.is_scalar() and not scalar:
            raise UsageError(f"{method} needs a vocabulary head, and {self._live.name!r} has a scalar head")
        if scalar and not self.is_scalar():
            raise UsageError(
                f"{method} needs a scalar head, and {self._live.name!r} is a policy: it has a vocabulary head",
                hint="into_scoring_model() before the spawn",
            )

    async def _score(self, tokens: list[int], targets: list[int]) -> list[float]:
        live = self._live
        live.require_ranks()
        if not tokens:
            return []
        limit = min(live.placement.max_batch_tokens, live.placement.context_tokens)
        if len(tokens) > limit:
            raise PromptTooLong(
                f"{len(tokens) + 1} tokens to score, {live.name!r} takes {limit} at once",
                hint="shorten the thread, or spawn with a larger max_batch_size",
                tokens=len(tokens) + 1,
                limit=limit,
            )
        self._check_ids(tokens)
        self._check_ids([t for t in targets if t != SKIPPED])
        replica = live.least_busy()
        message = Score(model=live.name, replica=replica, tokens=pack_ints(tokens), targets=pack_ints(targets))
        answer = await asyncio.shield(live.post(replica, message, len(tokens)).future)
        assert isinstance(answer, Scored)
        return unpack_floats(answer.logprobs)

    def _check_ids(self, tokens: Sequence[int]) -> None:
        size = self._live.version.spec.vocab_size
        if not tokens or (min(tokens) >= 0 and max(tokens) < size):
            return
        position = next(i for i, token in enumerate(tokens) if not 0 <= token < size)
        raise DataError(f"token {tokens[position]} at position {position} is outside the vocabulary of {size}")

    async def tokenize_thread(self, thread: StringThread) -> TokenizedThread:
        """The thread's tokens under the model's chat template, with a weight for each."""
        return self._live.tokenizer.tokenize(thread)

    async def detokenize_thread(self, thread: TokenizedThread) -> StringThread:
        """The thread's text; turns, weights and metadata survive."""
        return self._live.tokenizer.detokenize(thread)

    async def serialize_thread(self, thread: StringThread) -> tuple[list[int], list[tuple[int, bytes]], list[float]]:
        """Token ids, image patches (none: text models only), and a weight for each token."""
        return await self.serialize_tokenized_thread(self._live.tokenizer.tokenize(thread))

    async def serialize_tokenized_thread(
        self, thread: TokenizedThread
    ) -> tuple[list[int], list[tuple[int, bytes]], list[float]]:
        """As `serialize_thread`, from tokens."""
        return list(thread.token_ids), [], list(thread.token_weights)

    async def tokenize(self, data: str) -> list[int]:
        """Token ids of plain text; no template, no special tokens added."""
        return self._live.tokenizer.encode(data)

    async def detokenize(self, data: Sequence[int]) -> str:
        """Text of token ids."""
        return self._live.tokenizer.decode(list(data))

    async def raw_string_create(self, prompt: str) -> str:
        """Continue plain text, without a chat template."""
        return self._live.tokenizer.decode(await self.raw_token_create(prompt))

    async def raw_token_create(self, prompt: str) -> list[int]:
        """As `raw_string_create`, as token ids; a stop token at the end is left out."""
        tokenizer = self._live.tokenizer
        answer = await self._request_generation(tokenizer.encode(prompt), self._live.next_request_seed())
        tokens = unpack_ints(answer.tokens)
        return tokens[:-1] if answer.finish_reason == "stop" else tokens

    async def load(self, path: str) -> None:
        """Put stored weights (`model_registry://key`) into this model, in place."""
        from harmony_core.client.storage import load_into

        await load_into(self._live, path)

    async def statistics(self) -> list[dict[str, float]]:
        """What the model has done since it was spawned and what memory it is on: one dict for each leader of ranks.

        Totals: prefill_seconds and decode_seconds (of the device's steps), prefill_tokens, decode_tokens,
        prefill_steps, decode_steps, requests, prompt_tokens, prefix_hit_tokens, forked_requests, preemptions. On CUDA
        also bytes of the device: memory_allocated, memory_reserved, and their peaks since the previous call.
        """
        live = self._live
        live.require_ranks()
        return [answer.values for answer in await live.engine.run_global(Inspect(model=live.name), Inspected)]

    async def dealloc(self) -> None:
        """Free the model's memory on every rank; its handles cannot be used afterwards."""
        freed = self._live.free()
        if freed is not None:
            await asyncio.shield(freed)
