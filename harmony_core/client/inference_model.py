"""The handle of a model that generates and scores. No tensors: requests to the ranks, and their answers as threads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

from pydantic import BaseModel, ValidationError

from harmony_core.client.allowed_tokens import AllowedTokens, allowed_tokens, packed
from harmony_core.client.handle import Handle
from harmony_core.client.live import check_length, of_batch, of_context, of_pool
from harmony_core.client.losses import AnyThread
from harmony_core.config.argument_kinds import checked_class
from harmony_core.errors import DataError, JsonParseError, PromptTooLong, UsageError
from harmony_core.rpc.protocol import Generate, Generated, Inspect, Inspected, Sampling, Score, Scored
from harmony_core.rpc.wire import pack_ints, unpack_floats, unpack_ints
from harmony_core.structured_output import (
    first_problem,
    generate_and_validate,
    get_pydantic_schema,
    render_pydantic_model,
    render_schema,
)
from harmony_core.text.threads import StringThread, TokenizedThread
from harmony_core.text.turns import StructuredOutput

T = TypeVar("T", bound=BaseModel)
SKIPPED = -1
"""A target that is not scored."""


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


@checked_class
class InferenceModel(Handle):
    """A live model. Setters return a copy of the handle that shares the model."""

    @overload
    def generate(
        self,
        thread: AnyThread,
        response_model: None = None,
        return_timings: Literal[False] = False,
        *,
        continue_final: bool = False,
    ) -> Coroutine[Any, Any, StringThread]: ...
    @overload
    def generate(
        self,
        thread: AnyThread,
        response_model: None = None,
        *,
        return_timings: Literal[True],
        continue_final: bool = False,
    ) -> Coroutine[Any, Any, tuple[StringThread, Timings]]: ...
    @overload
    def generate(
        self, thread: AnyThread, response_model: type[T], return_timings: bool = False
    ) -> Coroutine[Any, Any, tuple[StringThread, T]]: ...
    def generate(
        self,
        thread: AnyThread,
        response_model: type[BaseModel] | None = None,
        return_timings: bool = False,
        *,
        continue_final: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """A new thread: the input and one assistant turn.

        Tokens that a model with this tokenizer drew before are continued as they were drawn. With `continue_final` the
        thread's last turn, an unfinished assistant turn, is continued; without it such a thread raises DataError. The
        request gets its number, and with it its random seed, when this is called, not when it is awaited.

        With a `response_model`, a pydantic model, the completion is constrained to its JSON schema, the last turn holds
        a structured-output fragment, and the result is the thread and the instance; there are no timings.

        Raises PromptTooLong when no room is left to generate, TokenizationError for tokens that cannot be continued,
        JsonParseError for JSON that is cut off, UsageError for a schema that the grammar cannot express.
        """
        seed = self._live.next_request_seed()
        if response_model is not None:
            return self._respond(thread, seed, response_model, continue_final, text=True)
        return self._generate(thread, seed, return_timings, continue_final)

    async def _generate(self, thread: AnyThread, seed: int, return_timings: bool, continue_final: bool) -> Any:
        tokenized, timings = await self._complete(thread, seed, continue_final)
        generated = self._live.tokenizer.detokenize(tokenized)
        return (generated, timings) if return_timings else generated

    @overload
    def generate_tokens(
        self, thread: AnyThread, response_model: None = None, *, continue_final: bool = False
    ) -> Coroutine[Any, Any, TokenizedThread]: ...
    @overload
    def generate_tokens(
        self, thread: AnyThread, response_model: type[T]
    ) -> Coroutine[Any, Any, tuple[TokenizedThread, T]]: ...
    def generate_tokens(
        self, thread: AnyThread, response_model: type[BaseModel] | None = None, *, continue_final: bool = False
    ) -> Coroutine[Any, Any, Any]:
        """As `generate`, with the tokens as they were drawn, their log-probs and policy versions."""
        seed = self._live.next_request_seed()
        if response_model is not None:
            return self._respond(thread, seed, response_model, continue_final, text=False)
        return self._generate_tokens(thread, seed, continue_final)

    async def _generate_tokens(self, thread: AnyThread, seed: int, continue_final: bool) -> TokenizedThread:
        return (await self._complete(thread, seed, continue_final))[0]

    async def _respond(
        self, thread: AnyThread, seed: int, wanted: type[BaseModel], continue_final: bool, text: bool
    ) -> tuple[AnyThread, BaseModel]:
        """The thread, as text or tokens, with an instance of the wanted model as its last turn, and the instance."""
        if continue_final:
            raise UsageError("continue_final with a response_model: its grammar begins with the turn")
        schema = get_pydantic_schema(wanted)
        drawn = await self.constrained_decoding(schema, "json")._generate_tokens(thread, seed, False)
        *before, last = drawn.token_turns
        try:
            instance = wanted.model_validate_json(last.text)
        except ValidationError as error:
            why, record = f"is no {wanted.__name__}: {first_problem(error)}", last.generation
            if record is not None and record.finish_reason == "length":
                why = f"was cut after {drawn.len_last_turn()} tokens (max_gen_len), before its end"
            hint = "a larger max_gen_len, or limits in the schema"
            raise JsonParseError(f"the completion {why}", last.text, hint=hint) from None
        fragment = StructuredOutput(last.text, instance.model_dump_json(), schema)
        answer = TokenizedThread.of(drawn, drawn.token_ids, [*before, replace(last, fragments=(fragment,))])
        return self._live.tokenizer.detokenize(answer) if text else answer, instance

    async def generate_and_validate(
        self, thread: StringThread, pydantic_model: type[T], max_parsing_retries: int = 1
    ) -> tuple[str, T]:
        """See `harmony_core.structured_output.generate_and_validate`."""
        return await generate_and_validate(self, thread, pydantic_model, max_parsing_retries)

    render_schema = staticmethod(render_schema)
    render_pydantic_model = staticmethod(render_pydantic_model)

    async def _complete(self, thread: AnyThread, seed: int, continue_final: bool) -> tuple[TokenizedThread, Timings]:
        live = self._live
        if not self.is_scalar():  # else it cannot generate at all
            _check_last_turn(thread, continue_final)
        prompt = live.tokenizer.unfinished_ids(thread) if continue_final else live.tokenizer.prompt_ids(thread)
        live.check_ids(prompt)
        answer = await self._request_generation(prompt, seed)
        completion = unpack_ints(answer.tokens)
        tokenized = live.tokenizer.with_completion(
            thread,
            prompt,
            completion,
            logprobs=unpack_floats(answer.logprobs),
            sampled_logprobs=unpack_floats(answer.sampled_logprobs),
            versions=unpack_ints(answer.versions),
            masked_logprobs=unpack_floats(answer.masked_logprobs),
            constraint=self._settings.constraint,
            finished=answer.finish_reason == "stop",
            model=live.name,
            continued=continue_final,
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
        if not live.spawn.kv_tokens:
            from harmony_core.client.spawning import make_pool

            await make_pool(live)
        live.require_ranks()
        settings = self._settings
        limits = [*of_context(live.spawn), of_pool(live.spawn), *settings.limits]
        check_length(live, PromptTooLong, len(prompt), "the prompt has {} tokens and needs room for more", limits, 1)
        if not prompt:
            raise DataError("an empty prompt cannot be continued", hint="give at least one token")
        room = min(limits).tokens - len(prompt)
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=min(self.longest_completion, room),
            min_tokens=settings.min_gen_len,
            seed=seed,
            stop_ids=tuple(sorted(live.tokenizer.stop_ids)),
            constraint=settings.constraint,
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
        """Sum of the log-probs of the thread's weighted tokens; see `logprobs_per_token`.

        Each weighted turn is scored after the prompt that the model would have been given for it, as
        `train_language_modelling` trains it.
        """
        parts = await self.tokenize_parts(thread)
        return sum(sum(found) for found in await asyncio.gather(*map(self.logprobs_per_token, parts)))

    async def logprobs_per_token(self, thread: TokenizedThread) -> list[float]:
        """One log-prob for each weighted token, in order, under the raw distribution.

        Those of a turn that was generated under a constraint are renormalised over the tokens that it allowed.
        """
        self._require_head(scalar=False, method="logprobs")
        return await self._score_weighted(thread, thread.token_ids[1:], allowed_tokens(self._live, thread, "logprobs"))

    async def raw_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """The log-prob of each token given those before it; the first is 0."""
        self._require_head(scalar=False, method="raw_logprobs")
        if not tokens:
            return []
        return [0.0, *(await self._score(tokens, tokens[1:]))]

    async def score(self, thread: TokenizedThread) -> list[float]:
        """One value for each weighted token, in order: the value of the state in which the token was chosen.

        It is read from the hidden state of the previous token, so that neither the token itself nor later ones enter,
        as a baseline requires (Sutton and Barto, 2018, section 13.4). Raises UsageError without a scalar head.
        """
        self._require_head(scalar=True, method="score")
        return await self._score_weighted(thread, [0] * (len(thread.token_ids) - 1))

    async def score_last_token(self, thread: AnyThread) -> float:
        """The value of the whole thread, read from the hidden state of its last token: the score of a reward model.

        It equals the output of transformers' *ForSequenceClassification for the thread's tokens. These end with the
        tokens that the template adds after the last turn, also for a thread of drawn tokens. Raises UsageError without
        a scalar head, DataError for a thread without tokens.
        """
        self._require_head(scalar=True, method="score_last_token")
        tokens = self._live.whole(thread).token_ids
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

    async def _score_weighted(
        self, thread: TokenizedThread, targets: Sequence[int], allowed: AllowedTokens | None = None
    ) -> list[float]:
        """`_score` of the targets that have a weight."""
        asked = [t if w > 0 else SKIPPED for t, w in zip(targets, thread.token_weights[1:], strict=True)]
        values = await self._score(thread.token_ids, asked, allowed)
        return [v for v, t in zip(values, asked, strict=True) if t != SKIPPED]

    async def _score(
        self, ids: Sequence[int], targets: Sequence[int], allowed: AllowedTokens | None = None
    ) -> list[float]:
        """The log-prob or value of each target, given the ids up to its position, from the ranks."""
        live, tokens = self._live, ids[: len(targets)]
        live.require_ranks()
        if not tokens:
            return []
        limits = [of_batch(live.spawn), *of_context(live.spawn)]
        if len(tokens) > min(limits).tokens:
            # The last token of a thread is only a target.
            thread = len(tokens) + (not self.is_scalar())
            check_length(live, PromptTooLong, thread, "the thread to score has {} tokens", limits)
        live.check_ids(ids)
        replica = live.least_busy()
        data = pack_ints(tokens), pack_ints(targets), *packed([(len(tokens), allowed)])
        fields = dict(zip(("tokens", "targets", "allowed", "masks"), data, strict=True))
        message = Score(model=live.name, replica=replica, **fields)
        answer = await asyncio.shield(live.post(replica, message, len(tokens)).future)
        assert isinstance(answer, Scored)
        return unpack_floats(answer.logprobs)

    async def raw_string_create(self, prompt: str) -> str:
        """Continue plain text, without a chat template."""
        tokenizer = self._live.tokenizer
        return tokenizer.decode_behind(tokenizer.encode(prompt), await self.raw_token_create(prompt))

    async def raw_token_create(self, prompt: str) -> list[int]:
        """As `raw_string_create`, as token ids; a final stop token is left out."""
        tokenizer = self._live.tokenizer
        answer = await self._request_generation(tokenizer.encode(prompt), self._live.next_request_seed())
        tokens = unpack_ints(answer.tokens)
        return tokens[:-1] if answer.finish_reason == "stop" else tokens

    async def load(self, path: str) -> None:
        """Load stored weights (`model_registry://key`) into this model, in place."""
        from harmony_core.client.storage import load_into

        await load_into(self._live, path)

    async def statistics(self) -> list[dict[str, float]]:
        """Counters of the model since it was spawned, and the memory of its ranks: one dict for each leader of ranks.

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


def _check_last_turn(thread: AnyThread, continue_final: bool) -> None:
    """Raise DataError if the last turn cannot be continued with `continue_final`, or is unfinished without it."""
    ends_with_assistant = [turn.role for turn in thread.text_turns[-1:]] == ["assistant"]
    finished = thread.generation is not None and thread.generation.finish_reason == "stop"
    if continue_final and (finished or not ends_with_assistant):
        reason = "is finished" if finished else "is not the assistant's"
        raise DataError(f"continue_final=True: the last turn {reason}, so there is nothing to continue")
    if ends_with_assistant and not finished and not continue_final:
        cut = " that was cut for its length" if thread.generation is not None else ""
        hint = "continue_final=True continues it; else append a user turn, or take StringThread(thread.messages())"
        raise DataError(f"the thread ends with an assistant turn{cut}", hint=hint)
