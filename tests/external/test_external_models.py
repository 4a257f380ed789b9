"""External models through the providers' real SDKs, against a server on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from pydantic import BaseModel

from harmony_core.client import DryRunEnded, EngineOptions, HarmonyClient
from harmony_core.client.engine import Engine
from harmony_core.errors import ConflictError, DataError, JsonParseError, ProviderError, ResourceError, UsageError
from harmony_core.home import Home
from harmony_core.registry import Registry
from harmony_core.text.threads import StringThread
from provider_server import KEY, Answer, ProviderServer, provider_server

T = TypeVar("T")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\nxx").decode()
ASKED = StringThread([("system", "Be brief."), ("user", "Capital of France?")], {"id": 7})


class Weather(NamedTuple):
    """A tool, as a recipe defines it."""

    name: str = "weather"
    description: str = "The weather of a city."
    parameters: dict[str, Any] | None = None


@dataclass
class Session:
    """A client without ranks, its events, and the server."""

    client: HarmonyClient
    server: ProviderServer
    loop: asyncio.AbstractEventLoop
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    def spawn(self, key: str, **params: Any) -> Any:
        return self.run(self.client.model(key, tokens_to_generate=50).extra_params(**params).spawn_inference("judge"))


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with provider_server() as server:
        yield server


@pytest.fixture
def session(server: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    for provider, host in (("OPENAI", server.host + "/v1"), ("ANTHROPIC", server.host)):
        monkeypatch.setenv(f"{provider}_API_KEY", KEY)
        monkeypatch.setenv(f"{provider}_BASE_URL", host)
    with opened(server, tmp_path) as session:
        yield session


class opened:
    """A session without ranks, closed with its connections at the end."""

    def __init__(self, server: ProviderServer, home: Path, **options: Any) -> None:
        loop, events = asyncio.new_event_loop(), []
        set_up = EngineOptions(log_dir=home / "logs", run_id="test", device="cpu", **options)

        async def make() -> HarmonyClient:
            return HarmonyClient(Engine(set_up, Registry(Home.open(home)), lambda t, data, _: events.append((t, data))))

        self.session = Session(loop.run_until_complete(make()), server, loop, events)

    def __enter__(self) -> Session:
        return self.session

    def __exit__(self, *_: object) -> None:
        self.session.run(self.session.client.aclose())
        self.session.loop.close()


@pytest.mark.parametrize("key", ["openai://GPT-4o", "anthropic://Claude-X"])
def test_a_thread_is_answered(session: Session, key: str, recwarn: pytest.WarningsRecorder) -> None:
    model = session.spawn(key).temperature(0.5).max_gen_len(20)
    answered, timings = session.run(model.generate(ASKED, return_timings=True))
    assert answered.completion() == "Paris" and answered.metadata == {"id": 7}
    assert answered.get_turn_weights() == [0, 0, 1] and timings.num_tokens == 3
    (request,) = session.server.requests
    assert request["model"] == key.partition("://")[2] and "top_p" not in request
    if key.startswith("openai"):
        assert request["messages"][0] == {"role": "system", "content": "Be brief."} and request["max_tokens"] == 20
        assert request["temperature"] == 0.5 and not recwarn
    else:
        assert request["system"] == "Be brief." and request["max_tokens"] == 20
        assert "temperature" not in request and "takes no temperature" in str(recwarn.pop().message)
        assert request["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Capital of France?"}]}]
    assert KEY not in repr(model) + json.dumps(model.get_builder_args()) + json.dumps(session.events)
    assert model.get_builder_args() == {"path": key, "tokens_to_generate": 50, "extra_params": {}}


@pytest.mark.parametrize("key", ["openai://m", "anthropic://m"])
def test_tools_and_their_answers_go_to_and_fro(session: Session, key: str) -> None:
    called = [("c1", "weather", {"city": "Oslo"}), ("c2", "weather", {"city": "Rome"})]
    session.server.script.append(Answer(text="", calls=called, reasoning="Let me see."))
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    model = session.spawn(key).tools([Weather(parameters=schema)])
    asked = session.run(model.generate(StringThread([("user", "Weather?")])))
    assert asked.last_turn_fragments() == [
        {"type": "reasoning", "text": "Let me see."},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Rome"}'},
    ]
    # The first has no id, so it answers the call that has no answer otherwise.
    session.run(model.generate(asked.tool("sun", "c2").tool("rain")))
    first, second = session.server.requests
    answers = second["messages"][2:]
    if key.startswith("openai"):
        named = {"name": "weather", "description": "The weather of a city.", "parameters": schema}
        assert first["tools"] == [{"type": "function", "function": named}]
        assert [call["id"] for call in second["messages"][1]["tool_calls"]] == ["c1", "c2"]
        assert [(each["tool_call_id"], each["content"]) for each in answers] == [("c2", "sun"), ("c1", "rain")]
    else:
        assert first["tools"][0]["input_schema"] == schema
        assert [block["input"] for block in second["messages"][1]["content"]] == [{"city": "Oslo"}, {"city": "Rome"}]
        (turn,) = answers
        assert [(b["tool_use_id"], b["content"]) for b in turn["content"]] == [("c2", "sun"), ("c1", "rain")]
    with pytest.raises(DataError, match="answers no call"):
        session.run(model.generate(StringThread([("user", "x")]).tool("rain")))


@pytest.mark.parametrize("key", ["openai://m", "anthropic://m"])
def test_images_are_sent_as_they_are(session: Session, key: str) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image", "url": f"data:image/png;base64,{PNG}"}]
    session.run(session.spawn(key).generate(session.run(StringThread.from_fragments([("user", parts)]))))
    text, image = session.server.requests[0]["messages"][0]["content"]
    assert text["text"] == "What is it?"
    if key.startswith("openai"):
        assert image["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    else:
        assert image["source"] == {"type": "base64", "media_type": "image/png", "data": PNG}


class City(BaseModel):
    """What a model is asked for."""

    name: str
    country: str


class Loose(BaseModel):
    """With a field that may be left out, which strict mode does not know."""

    name: str = "?"


@pytest.mark.parametrize("key", ["openai://m", "anthropic://m"])
def test_structured_output_is_asked_for_by_the_provider_s_own_mode(session: Session, key: str) -> None:
    model, found = session.spawn(key), City(name="Lima", country="Peru")
    session.server.script.append(Answer(text=found.model_dump_json()))
    answered, instance = session.run(model.generate(ASKED, City))
    assert instance == found and answered.metadata == {"id": 7}
    (fragment,) = answered.last_turn_fragments()
    assert fragment["type"] == "structured_output" and json.loads(fragment["parsed_json"]) == found.model_dump()
    (request,) = session.server.requests
    if key.startswith("openai"):
        asked = request["response_format"]["json_schema"]
        assert asked["strict"] and asked["schema"]["required"] == ["name", "country"]
    else:
        assert request["output_config"]["format"]["schema"]["required"] == ["name", "country"]
    session.server.script.extend([Answer(text="Lima"), Answer(text=f"```json\n{found.model_dump_json()}\n```")])
    assert session.run(model.generate_and_validate(ASKED, City))[1] == found
    assert len(session.server.requests[2]["messages"]) == 1, "the completion that cannot be read is given again"
    session.server.respond = lambda request: Answer(text="no")
    with pytest.raises(JsonParseError) as caught:
        session.run(model.generate(ASKED, City))
    assert caught.value.completion == "no"
    with pytest.raises(UsageError, match="JSON schemas only"):
        model.constrained_decoding("[ab]", "regex")


def test_optional_fields_and_servers_without_json_mode(session: Session) -> None:
    session.server.respond = lambda request: Answer(text="{}")
    assert session.run(session.spawn("openai://m").generate(ASKED, Loose))[1] == Loose()
    assert session.server.requests[-1]["response_format"]["json_schema"]["strict"] is False
    assert session.run(session.spawn("openai://m", json_mode=False).generate(ASKED, Loose))[1] == Loose()
    assert "response_format" not in session.server.requests[-1]


def test_busy_and_failing_providers_are_tried_again(session: Session) -> None:
    busy = Answer(429, body='{"error": {"message": "slow down"}}', headers={"Retry-After": "0.01"})
    broken = Answer(500, body="{}", headers={"Retry-After": "0.01"})
    session.server.script.extend([busy, broken, busy])
    assert session.run(session.spawn("openai://m").generate(ASKED)).completion() == "Paris"
    assert len(session.server.requests) == 4 and len(session.events) == 1


@pytest.mark.parametrize("key", ["openai://m", "anthropic://m"])
def test_failures_are_typed_and_bounded(session: Session, key: str) -> None:
    model = session.spawn(key, max_retries=0)
    long = json.dumps({"error": {"message": f"no such model {KEY} " + "x" * 5000}})
    for answer, status in (
        (Answer(400, body=long), 400),
        (Answer(429, body="{}"), 429),
        (Answer(body="not JSON"), None),
        (Answer(body="[1]"), None),
        (Answer(body='{"choices": [], "content": 3}'), None),
        (Answer(302, headers={"Location": "http://127.0.0.1:9/"}), 302),
    ):
        session.server.script.append(answer)
        with pytest.raises(ProviderError) as caught:
            session.run(model.generate(ASKED))
        assert caught.value.status == status and caught.value.exit_code == 1
        assert KEY not in str(caught.value) and len(str(caught.value)) < 600
    session.server.key = "another-key-123"
    with pytest.raises(ProviderError, match="API_KEY is not accepted") as caught:
        session.run(model.generate(ASKED))
    assert caught.value.status == 401 and KEY not in str(caught.value)
    failed = [data for kind, data in session.events if kind == "external.request"]
    assert [data["failed"] for data in failed] == [1] * 7


def test_a_slow_reply_and_a_server_that_is_down_have_no_status(session: Session) -> None:
    held = threading.Event()
    session.server.script.append(Answer(held=held))
    with pytest.raises(ProviderError, match="timed out") as caught:
        session.run(session.spawn("openai://m", max_retries=0, timeout=0.1).generate(ASKED))
    held.set()
    assert caught.value.status is None
    with pytest.raises(ProviderError, match="Connection error") as caught:
        session.run(session.spawn("openai://m?base_url=http://127.0.0.1:9/v1", max_retries=0).generate(ASKED))
    assert caught.value.status is None


def test_requests_at_once_are_limited_and_counted(session: Session) -> None:
    session.server.respond = lambda request: Answer(finish="length")
    model = session.spawn("openai://m", max_concurrent=3)

    async def many() -> None:
        await asyncio.gather(*(model.generate(ASKED) for _ in range(12)))

    session.run(many())
    assert 1 <= session.server.most_at_once <= 3
    counted = [data for kind, data in session.events if kind == "external.request"]
    assert len(counted) == 12 and sum(data["prompt_tokens"] for data in counted) == 132
    assert {data["key"] for data in counted} == {"openai://m"} and {data["cut"] for data in counted} == {1}


def test_requests_begin_at_the_rate_that_was_set(session: Session) -> None:
    model = session.spawn("anthropic://m", requests_per_minute=600)

    async def many() -> float:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(model.generate(ASKED) for _ in range(4)))
        return asyncio.get_running_loop().time() - began

    assert session.run(many()) >= 0.3


def test_further_params_are_sent_and_keys_are_not_taken(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.run(session.spawn("openai://m", reasoning_effort="low", seed=3).generate(ASKED))
    assert session.server.requests[0]["reasoning_effort"] == "low" and session.server.requests[0]["seed"] == 3
    builder = session.client.model("openai://m")
    for params in ({"api_key": "x"}, {"model": "other"}, {"timeout": 0}, {"max_concurrent": "many"}):
        with pytest.raises(UsageError, match="extra_params"):
            builder.extra_params(**params)
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        builder.api_key("sk-planted-in-code-1")
    assert builder.api_key(KEY).to_python_dict() == builder.to_python_dict()
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-1234567890")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "sk-token-1234567890")
    with pytest.warns(UserWarning, match="takes no temperature"):
        session.run(session.spawn("openai://gpt-5-mini").temperature(0.0).generate(ASKED))
    assert "temperature" not in session.server.requests[-1]
    session.run(session.spawn("anthropic://m").generate(ASKED))
    assert "sk-admin" not in str(session.server.headers) and "sk-token" not in str(session.server.headers)


def test_what_needs_tokens_or_devices_is_refused(session: Session) -> None:
    builder, model = session.client.model("openai://m", kv_cache_len=1000), session.spawn("openai://m")
    for call in (
        lambda: builder.tp(2),
        lambda: builder.with_adapter(),
        lambda: builder.max_seqlen(100),
        lambda: builder.into_scoring_model(),
        lambda: builder.chat_template_kwargs({"a": 1}),
        lambda: builder.with_draft("x"),
        lambda: session.run(builder.spawn_train("policy", 100)),
    ):
        with pytest.raises(UsageError):
            call()
    verbs: list[Any] = [
        *(model.tokenize("a"), model.detokenize([1]), model.raw_logprobs([1, 2]), model.logprobs(ASKED)),
        *(model.tokenize_thread(ASKED), model.serialize_thread(ASKED), model.score_last_token(ASKED)),
        *(model.raw_string_create("a"), model.raw_token_create("a"), model.load("model_registry://a")),
        *(model.statistics(), model.min_gen_len(3).generate(ASKED), model.generate(ASKED, continue_final=True)),
    ]
    for verb in verbs:
        with pytest.raises(UsageError, match="openai://m"):
            session.run(verb)
    with pytest.raises(UsageError, match="takes and gives text"):
        session.run(model.generate_tokens(ASKED))
    assert session.server.requests == []


def test_a_freed_model_and_an_answered_thread_are_refused(session: Session) -> None:
    model = session.spawn("openai://m")
    with pytest.raises(DataError, match="ends with an assistant turn"):
        session.run(model.generate(session.run(model.generate(ASKED))))
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]
    session.run(model.generate(ASKED.with_template_kwargs(tools=tools)))
    assert session.server.requests[-1]["tools"] == tools
    session.run(model.dealloc())
    with pytest.raises(ConflictError, match="'judge' was deallocated"):
        session.run(model.temperature(0.1).generate(ASKED))


def test_a_dry_run_sends_nothing(server: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with opened(server, tmp_path, dry_run=True) as session:
        model = session.spawn(f"openai://m?base_url={server.host}/v1")
        with pytest.raises(DryRunEnded):
            session.run(model.generate(ASKED))
    assert server.requests == []


def test_a_server_without_keys_needs_none(
    server: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    server.key = None
    with opened(server, tmp_path) as session:
        session.run(session.spawn(f"openai://Org/Model-7B:free?base_url={server.host}/v1").generate(ASKED))
        assert server.requests[0]["model"] == "Org/Model-7B:free"
        with pytest.raises(ResourceError, match="OPENAI_API_KEY is not set"):
            session.spawn("openai://gpt-4o")
