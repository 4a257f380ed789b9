"""Tools on the handles of a live model: what the model is shown, and what becomes of its calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines import LiveEngine
from harmony_core.client import InferenceModel
from harmony_core.errors import UsageError
from harmony_core.registry import builtin
from harmony_core.rpc.protocol import Generated
from harmony_core.rpc.wire import pack_floats, pack_ints
from harmony_core.text.threads import StringThread
from harmony_core.text.tool_calls import Tool, tool_calls
from harmony_core.text.turns import FunctionCall

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOW = Tool("now", "The time.", None)
QUESTION = StringThread([("user", "When?")])
CALL = '<tool_call>{"name":"now","arguments":{}}</tool_call>'


def test_a_model_calls_a_tool(one_rank: LiveEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    builtin._write_model(source)
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    one_rank.registry.add("with-tools", str(source))

    async def run() -> None:
        builder = one_rank.client.model("with-tools", kv_cache_len=2048, tokens_to_generate=4)
        model = await builder.spawn_inference("with-tools")
        prompts: list[str] = []
        for reply in (CALL, CALL[:-16]):

            async def answer(self: Any, prompt: list[int], seed: int, reply: str = reply) -> Generated:
                prompts.append(await model.detokenize(prompt))
                ids = await model.tokenize(f"{reply}<|im_end|>")
                numbers = pack_floats([-1.0] * len(ids))
                return Generated(
                    tokens=pack_ints(ids),
                    logprobs=numbers,
                    sampled_logprobs=numbers,
                    versions=pack_ints([0] * len(ids)),
                    finish_reason="stop",
                    seconds_to_first=0.1,
                    seconds=0.2,
                )

            monkeypatch.setattr(InferenceModel, "_request_generation", answer)
            drawn = await model.tools([NOW]).generate_tokens(QUESTION)
            said = await model.tools([NOW]).generate(QUESTION)
            assert await model.detokenize(drawn.last_content() or []) == f"{reply}<|im_end|>"
            if reply == CALL:
                assert said.last_turn_fragments() == drawn.get_fragments()[-1][1]
                assert tool_calls(said) == [FunctionCall("", "now", "{}")] == tool_calls(drawn)
                again = await model.generate_tokens(said.tool("noon"))
                assert again.token_ids[: len(drawn.token_ids)] == drawn.token_ids
            else:
                assert said.completion() == reply
                with pytest.raises(UsageError, match="cannot be read"):
                    tool_calls(said)
        assert all('"name": "now"' in prompt for prompt in prompts), "the thread keeps the tools"
        monkeypatch.undo()
        assert '"now"' not in await model.detokenize((await model.generate_tokens(QUESTION)).token_ids)
        await model.dealloc()

    one_rank.run(run())


def test_what_cannot_be_is_refused(one_rank: LiveEngine) -> None:
    async def run() -> None:
        builder = one_rank.client.model("builtin:tiny-lm", kv_cache_len=512, tokens_to_generate=4)
        with pytest.raises(UsageError, match="platform's tools") as refused:
            builder.tools(["tool://search"])
        assert "model.tools" in refused.value.hint
        model = await builder.spawn_inference("without-tools")
        with pytest.raises(UsageError, match=r"builtin:tiny-lm.* cannot show tools"):
            model.tools([NOW])
        assert await model.thread_with_tools(QUESTION, []) is QUESTION
        with pytest.raises(UsageError, match="platform's tools"):
            await model.thread_with_tools(QUESTION, ["tool://search"])
        await model.tools([]).generate(QUESTION)
        await model.dealloc()

    one_rank.run(run())
