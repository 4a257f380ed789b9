"""Rows as public post-training datasets have them, shortened: each with the columns and the nesting of the original."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Row = dict[str, Any]


class Example(NamedTuple):
    """A dataset's name, a row of it, and what becomes of it.

    `turns`: (role, text, weight) of the thread; `refused`: what the error says in place of it. `kind`: what a recipe
    asks for; `columns`, `roles`: how the row is mapped.
    """

    name: str
    row: Row
    turns: list[tuple[str, str, float]] = []  # noqa: RUF012
    shape: str = ""
    metadata: Row | None = None
    refused: str = ""
    kind: str | None = None
    columns: dict[str, str | None] = {}  # noqa: RUF012
    roles: dict[str, str] = {}  # noqa: RUF012


def said(*turns: tuple[str, str]) -> list[Row]:
    return [{"role": role, "content": content} for role, content in turns]


def shared(*turns: tuple[str, str]) -> list[Row]:
    return [{"from": who, "value": value} for who, value in turns]


def parts(*turns: tuple[str, str]) -> list[Row]:
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]


Q, A = ("user", "2+2?"), ("assistant", "4")
ASKED, ANSWERED = [("user", "2+2?", 0.0)], [("user", "2+2?", 0.0), ("assistant", "4", 1.0)]
BRIEF = [("system", "Be brief.", 0.0), *ANSWERED]
PAIR = {"preferred_completion": "4", "other_completion": "5"}
TOOL = {
    "type": "function",
    "function": {"name": "rain", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"name": "rain", "arguments": {"city": "Oslo"}}

EXAMPLES = [
    # conversations
    Example(
        "Tulu 3 SFT",
        {"id": "a", "messages": said(Q, A), "source": "x"},
        ANSWERED,
        "messages",
        {"id": "a", "source": "x"},
    ),
    Example(
        "UltraChat 200k",
        {"prompt": "2+2?", "prompt_id": "a", "messages": said(Q, A)},
        ANSWERED,
        "messages",
        {"prompt": "2+2?", "prompt_id": "a"},
    ),
    Example(
        "No Robots",
        {"prompt": "2+2?", "prompt_id": "a", "messages": said(("system", "Be brief."), Q, A), "category": "QA"},
        BRIEF,
        "messages",
        {"prompt": "2+2?", "prompt_id": "a", "category": "QA"},
    ),
    Example("UltraChat (raw)", {"id": "0", "data": ["2+2?", "4"]}, refused="no shape that is read"),
    Example(
        "UltraChat (raw), mapped",
        {"id": "0", "data": ["2+2?", "4"]},
        ANSWERED,
        "messages",
        columns={"messages": "data"},
    ),
    Example(
        "LIMA",
        {"conversations": ["2+2?", "4"], "source": "stackexchange"},
        ANSWERED,
        "messages",
        {"source": "stackexchange"},
    ),
    Example(
        "Capybara",
        {"source": "x", "conversation": [{"input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}]},
        [("user", "2+2?", 0), ("assistant", "4", 0), ("user", "3+3?", 0), ("assistant", "6", 1)],
        "messages",
        {"source": "x"},
    ),
    Example(
        "OpenHermes 2.5",
        {
            "conversations": [
                {"from": "human", "value": "2+2?", "weight": None},
                {"from": "gpt", "value": "4", "weight": None},
            ],
            "source": "x",
            "system_prompt": None,
            "skip_prompt_formatting": False,
        },
        ANSWERED,
        "ShareGPT",
        {"source": "x", "system_prompt": None, "skip_prompt_formatting": False},
    ),
    Example(
        "SlimOrca",
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": "2+2?", "weight": 0.0},
                {"from": "gpt", "value": "4", "weight": 1.0},
            ]
        },
        BRIEF,
        "ShareGPT",
        {},
    ),
    Example(
        "ShareGPT",
        {"id": "a_0", "conversations": shared(("human", "2+2?"), ("gpt", "4"))},
        ANSWERED,
        "ShareGPT",
        {"id": "a_0"},
    ),
    Example(
        "OpenThoughts",
        {"system": "Be brief.", "conversations": shared(("user", "2+2?"), ("assistant", "4"))},
        BRIEF,
        "ShareGPT",
        {},
    ),
    Example(
        "Magpie",
        {
            "uuid": "u",
            "model": "m",
            "gen_input_configs": {"temperature": 1.0},
            "instruction": "2+2?",
            "response": "4",
            "conversations": shared(("human", "2+2?"), ("gpt", "4")),
            "difficulty": "easy",
        },
        ANSWERED,
        "ShareGPT",
    ),
    Example(
        "WildChat",
        {
            "conversation_hash": "h",
            "model": "gpt-4",
            "conversation": [
                {"content": "2+2?", "role": "user", "language": "English", "redacted": False, "toxic": False},
                {"content": "4", "role": "assistant", "language": "English", "redacted": False, "toxic": False},
            ],
            "turn": 1,
        },
        ANSWERED,
        "messages",
        {
            "conversation_hash": "h",
            "model": "gpt-4",
            "turn": 1,
            "message_fields": [{"language": "English", "redacted": False, "toxic": False}] * 2,
        },
    ),
    Example(
        "LMSYS Chat 1M",
        {"conversation_id": "c", "model": "vicuna", "conversation": said(Q, A), "turn": 1, "language": "English"},
        ANSWERED,
    ),
    Example(
        "smoltalk2",
        {"messages": said(Q, A), "chat_template_kwargs": {"enable_thinking": False, "python_tools": []}, "source": "x"},
        ANSWERED,
        "messages",
    ),
    Example(
        "NuminaMath CoT",
        {"source": "amc", "problem": "2+2?", "solution": "4", "messages": said(Q, A)},
        ANSWERED,
        "messages",
        {"source": "amc", "problem": "2+2?", "solution": "4"},
    ),
    Example(
        "Nemotron post-training",
        {"input": said(Q), "output": "4", "category": "math", "reasoning": "off", "system_prompt": "Be brief."},
        BRIEF,
        "messages",
        {"category": "math", "reasoning": "off"},
    ),
    Example("DailyDialog", {"dialog": ["2+2?", "4"], "act": [1, 2]}, ANSWERED, "messages", {"act": [1, 2]}),
    Example(
        "OpenAI fine-tuning",
        {"messages": [*said(Q), {"role": "assistant", "content": "5", "weight": 0}, *said(("user", "No."), A)]},
        [*ASKED, ("assistant", "5", 0), ("user", "No.", 0), ("assistant", "4", 1)],
        "messages",
    ),
    Example(
        "axolotl, train: false",
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "train": False}]},
        [*ASKED, ("assistant", "4", 0)],
        "ShareGPT",
    ),
    Example("developer role", {"messages": said(("developer", "Be brief."), Q, A)}, BRIEF, "messages"),
    Example(
        "a role of its own", {"messages": said(("narrator", "2+2?"), A)}, refused="the role 'narrator' is not known"
    ),
    Example(
        "a role of its own, mapped",
        {"messages": said(("narrator", "2+2?"), A)},
        ANSWERED,
        "messages",
        roles={"narrator": "user"},
    ),
    # tools
    Example(
        "OpenAI tools",
        {
            "messages": [
                *said(Q),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
                *said(A),
            ],
            "tools": [TOOL],
        },
        [*ASKED, ("assistant", "", 0), ("tool", "", 0), ("assistant", "4", 1)],
        "messages",
    ),
    Example(
        "xLAM (APIGen)",
        {
            "id": 0,
            "query": "2+2?",
            "answers": json.dumps([CALL]),
            "tools": json.dumps([{"name": "rain", "description": "d", "parameters": {}}]),
        },
        [*ASKED, ("assistant", "", 1)],
        "question/answer",
    ),
    Example(
        "ToolACE",
        {
            "system": "Be brief.",
            "conversations": shared(("user", "2+2?"), ("assistant", "[add(2, 2)]"), ("tool", "4"), ("assistant", "4")),
        },
        [("system", "Be brief.", 0), *ASKED, ("assistant", "[add(2, 2)]", 0), ("tool", "", 0), ("assistant", "4", 1)],
        "ShareGPT",
    ),
    Example(
        "Glaive, ShareGPT form",
        {
            "conversations": shared(
                ("human", "2+2?"), ("function_call", json.dumps(CALL)), ("observation", "4"), ("gpt", "4")
            ),
            "tools": json.dumps([TOOL]),
        },
        [*ASKED, ("assistant", "", 0), ("tool", "", 0), ("assistant", "4", 1)],
        "ShareGPT",
    ),
    Example(
        "Glaive v2",
        {"system": "SYSTEM: Be brief.", "chat": "USER: 2+2?\n\n\nASSISTANT: 4 <|endoftext|>"},
        refused="a transcript in one text (Glaive)",
    ),
    Example(
        "Hermes function calling",
        {
            "id": "a",
            "conversations": shared(("system", "Be brief."), ("human", "2+2?"), ("gpt", "4")),
            "tools": json.dumps([TOOL]),
            "category": "x",
        },
        BRIEF,
        "ShareGPT",
    ),
    Example(
        "names of tools",
        {"messages": said(Q, A), "tools": ["bash"]},
        refused="'tools' must be a list of function definitions",
    ),
    Example(
        "names of tools, as metadata",
        {"messages": said(Q, A), "tools": ["bash"]},
        ANSWERED,
        "messages",
        {"tools": ["bash"]},
        columns={"tools": None},
    ),
    Example(
        "Anthropic tool use",
        {
            "messages": [
                *parts(Q),
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "t", "name": "rain", "input": {"city": "Oslo"}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "4"}]},
                *parts(A),
            ]
        },
        [*ASKED, ("assistant", "", 0), ("tool", "", 0), ("assistant", "4", 1)],
        "messages",
    ),
    # instructions, questions, plain text
    Example(
        "Alpaca",
        {"instruction": "2+2?", "input": "", "output": "4", "text": "Below is an instruction that ..."},
        ANSWERED,
        "Alpaca",
    ),
    Example(
        "Alpaca with input",
        {"instruction": "Add", "input": "2+2", "output": "4"},
        [("user", "Add\n\n2+2", 0), ("assistant", "4", 1)],
        "Alpaca",
        {},
    ),
    Example(
        "Alpaca with history",
        {"instruction": "2+2?", "input": "", "output": "4", "system": "Be brief.", "history": [["1+1?", "2"]]},
        [("system", "Be brief.", 0), ("user", "1+1?", 0), ("assistant", "2", 0), *ANSWERED],
        "Alpaca",
        {},
    ),
    Example(
        "Dolly",
        {"instruction": "Add", "context": "2+2", "response": "4", "category": "qa"},
        [("user", "Add\n\n2+2", 0), ("assistant", "4", 1)],
        "Alpaca",
        {"category": "qa"},
    ),
    Example(
        "OpenOrca",
        {"id": "a", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        BRIEF,
        "question/answer",
        {"id": "a"},
    ),
    Example("GSM8K", {"question": "2+2?", "answer": "4"}, ANSWERED, "question/answer", {}),
    Example(
        "GSM8K as prompts",
        {"question": "2+2?", "answer": "4"},
        ASKED,
        "question/answer",
        {"answer": "4"},
        kind="prompts",
    ),
    Example(
        "MetaMathQA",
        {"type": "GSM", "query": "2+2?", "original_question": "2+2?", "response": "4"},
        ANSWERED,
        "question/answer",
        {"type": "GSM", "original_question": "2+2?"},
    ),
    Example(
        "NuminaMath 1.5",
        {"problem": "2+2?", "solution": "4", "answer": "four", "problem_type": "Algebra"},
        ANSWERED,
        "question/answer",
        {"answer": "four", "problem_type": "Algebra"},
    ),
    Example(
        "AIME",
        {"ID": "I", "Problem": "2+2?", "Solution": "4", "Answer": 4},
        ANSWERED,
        "question/answer",
        {"ID": "I", "Answer": 4},
    ),
    Example(
        "s1K",
        {
            "question": "2+2?",
            "solution": "4",
            "cot_type": "math",
            "metadata": "{'a': 1}",
            "thinking_trajectories": ["two and two"],
        },
        ANSWERED,
        "question/answer",
        {"cot_type": "math", "metadata": "{'a': 1}", "thinking_trajectories": ["two and two"]},
    ),
    Example(
        "CoT collection",
        {"source": "2+2?", "target": "4", "rationale": "two and two", "task": "add"},
        refused="columns: {user: source, assistant: target}",
    ),
    Example(
        "CoT collection, mapped",
        {"source": "2+2?", "target": "4", "rationale": "two and two", "task": "add"},
        ANSWERED,
        "question/answer",
        {"task": "add"},
        columns={"user": "source", "assistant": "target", "reasoning": "rationale"},
    ),
    Example(
        "HelpSteer2",
        {"prompt": "2+2?", "response": "4", "helpfulness": 4, "verbosity": 1},
        ANSWERED,
        "prompt/completion",
        {"helpfulness": 4, "verbosity": 1},
    ),
    Example("TRL prompt/completion", {"prompt": "2+2?", "completion": "4"}, ANSWERED, "prompt/completion", {}),
    Example(
        "TRL conversational prompt/completion", {"prompt": said(Q), "completion": said(A)}, ANSWERED, "messages", {}
    ),
    Example("TRL prompts", {"prompt": said(Q), "answer": "4"}, ASKED, "messages", {"answer": "4"}),
    Example(
        "a prompt and its answer",
        {"prompt": "2+2?", "ground_truth": "4"},
        ASKED,
        "prompt/completion",
        {"ground_truth": "4"},
    ),
    Example(
        "verl",
        {
            "data_source": "gsm8k",
            "prompt": said(Q),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0},
        },
        ASKED,
        "messages",
        {
            "data_source": "gsm8k",
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0},
        },
    ),
    Example("own names", {"ask": "2+2?", "reply": "4"}, refused="columns: {user: ask, assistant: reply}"),
    Example(
        "own names, mapped",
        {"ask": "2+2?", "reply": "4"},
        ANSWERED,
        "question/answer",
        {},
        columns={"user": "ask", "assistant": "reply"},
    ),
    Example("plain text", {"text": "Once upon a time"}, [("assistant", "Once upon a time", 1)], "plain text", {}),
    Example("Guanaco", {"text": "### Human: 2+2?### Assistant: 4"}, refused="a chat template's markers"),
    Example(
        "SQuAD",
        {"id": "a", "context": "2+2=4", "question": "2+2?", "answers": {"text": ["4"], "answer_start": [4]}},
        refused="several answers, or places of an answer",
    ),
    Example(
        "MMLU", {"question": "2+2?", "subject": "math", "choices": ["4", "5"], "answer": 0}, refused="multiple choice"
    ),
    Example(
        "ARC",
        {"id": "a", "question": "2+2?", "choices": {"text": ["4"], "label": ["A"]}, "answerKey": "A"},
        refused="multiple choice",
    ),
    Example(
        "OpenAssistant",
        {"message_id": "m", "parent_id": None, "text": "2+2?", "role": "prompter", "message_tree_id": "m"},
        refused="messages of a tree (OpenAssistant)",
    ),
    Example("token ids", {"input_ids": [1, 2], "labels": [1, 2]}, refused="token ids"),
    # preferences
    Example(
        "UltraFeedback binarized",
        {
            "prompt": "2+2?",
            "prompt_id": "a",
            "chosen": said(Q, A),
            "rejected": said(Q, ("assistant", "5")),
            "messages": said(Q, A),
            "score_chosen": 8.0,
        },
        ASKED,
        "preference",
        {"prompt": "2+2?", "prompt_id": "a", "messages": said(Q, A), "score_chosen": 8.0, **PAIR},
    ),
    Example(
        "UltraFeedback binarized as completions",
        {"prompt": "2+2?", "chosen": said(Q, A), "rejected": said(Q, ("assistant", "5")), "messages": said(Q, A)},
        ANSWERED,
        "messages",
        kind="completions",
    ),
    Example(
        "HH-RLHF",
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ASKED,
        "preference",
        PAIR,
    ),
    Example(
        "Skywork preference",
        {"chosen": said(Q, A), "rejected": said(Q, ("assistant", "5")), "source": "x"},
        ASKED,
        "preference",
        {"source": "x", **PAIR},
    ),
    Example(
        "Orca DPO pairs",
        {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
        [("system", "Be brief.", 0), *ASKED],
        "preference",
        PAIR,
    ),
    Example(
        "TRL preference, explicit prompt",
        {"prompt": said(Q), "chosen": said(A), "rejected": said(("assistant", "5"))},
        ASKED,
        "preference",
        PAIR,
    ),
    Example("TRL preference, text", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}, ASKED, "preference", PAIR),
    Example(
        "LLaMA-Factory preference",
        {
            "conversations": shared(("human", "2+2?")),
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        ASKED,
        "preference",
        PAIR,
    ),
    Example(
        "pairs for a supervised recipe",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        refused="only Dataset[dataset_kinds.Preference] reads",
        kind="completions",
    ),
    Example(
        "whole conversations for a supervised recipe",
        {"chosen": said(Q, A), "rejected": said(Q, ("assistant", "5"))},
        refused="{messages: chosen} where it is a whole conversation",
        kind="completions",
    ),
    Example(
        "pairs, the chosen one learnt",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        ANSWERED,
        "prompt/completion",
        kind="completions",
        columns={"assistant": "chosen"},
    ),
    Example("texts without a prompt", {"chosen": "4", "rejected": "5"}, refused="no prompt"),
    Example(
        "Stack Exchange paired",
        {"qid": 1, "question": "2+2?", "response_j": "4", "response_k": "5"},
        refused="columns: {chosen: response_j, rejected: response_k}",
    ),
    Example(
        "Stack Exchange paired, mapped",
        {"qid": 1, "question": "2+2?", "response_j": "4", "response_k": "5"},
        ASKED,
        "preference",
        {"qid": 1, **PAIR},
        columns={"chosen": "response_j", "rejected": "response_k"},
    ),
    Example(
        "UltraFeedback",
        {"source": "x", "instruction": "2+2?", "models": ["a"], "completions": [{"response": "4"}]},
        refused="several completions of a prompt",
    ),
    Example(
        "Nectar",
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant: ", "answers": [{"answer": "4", "rank": 1.0}], "turns": 1},
        refused="several answers",
    ),
    Example(
        "HelpSteer3",
        {"domain": "general", "context": said(Q), "response1": "4", "response2": "5", "overall_preference": -2},
        refused="two responses and a verdict",
    ),
    Example(
        "PKU-SafeRLHF",
        {"prompt": "2+2?", "response_0": "4", "response_1": "5", "better_response_id": 0},
        refused="two responses and a verdict",
    ),
    Example(
        "Chatbot Arena",
        {"question_id": "q", "conversation_a": said(Q, A), "conversation_b": said(Q, A), "winner": "model_a"},
        refused="two conversations and a verdict",
    ),
    Example(
        "SHP",
        {"post_id": "p", "history": "2+2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1},
        refused="two answers and their votes",
    ),
    # unpaired
    Example(
        "KTO mix, wanted",
        {"prompt": said(Q), "completion": said(A), "label": True},
        ANSWERED,
        "messages",
        {"label": True},
    ),
    Example(
        "KTO mix, unwanted",
        {"prompt": said(Q), "completion": said(A), "label": False},
        [*ASKED, ("assistant", "4", 0)],
        "messages",
        {"label": False},
    ),
    Example(
        "TRL unpaired, text",
        {"prompt": "2+2?", "completion": "4", "label": False},
        [*ASKED, ("assistant", "4", 0)],
        "prompt/completion",
        {"label": False},
    ),
    Example(
        "LLaMA-Factory KTO",
        {"conversations": shared(("human", "2+2?"), ("gpt", "4")), "kto_tag": False},
        [*ASKED, ("assistant", "4", 0)],
        "ShareGPT",
    ),
    Example(
        "a weight of the row", {"messages": said(Q, A), "loss_weight": 0}, [*ASKED, ("assistant", "4", 0)], "messages"
    ),
    # images
    Example(
        "LLaVA",
        {"id": "a", "image": "a.png", "conversations": shared(("human", "<image>\n2+2?"), ("gpt", "4"))},
        refused="models here read text only",
    ),
    Example(
        "an image marker alone", {"messages": said(("user", "<image>2+2?"), A)}, refused="models here read text only"
    ),
    Example(
        "image parts",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, *parts(A)]},
        refused="models here read text only",
    ),
]
