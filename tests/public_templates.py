"""Chat templates as models are published with them, and an oracle for what a conversation trains under each.

The templates are those in llama.cpp's tree, which the source distribution of `llama-cpp-python` carries. It is fetched
once, through pip, into a cache; nothing of it is built. The oracle knows nothing of our code: it compares transformers'
own renderings.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

import tokenizer_directories as directories

VERSION = "0.3.36"
COUNT = 70
_INSIDE = re.compile(rf"llama_cpp_python-{re.escape(VERSION)}/vendor/llama\.cpp/models/templates/([^/]+\.jinja)")
_TAGS = re.compile(r"<[|｜][^<>|｜'\"{}\s]{1,40}[|｜]>|</?[a-z_]+>")

Message = dict[str, Any]


def _thought(text: str) -> Message:
    return {"reasoning_content": text, "thinking": text}


def _call(number: int, arguments: dict[str, Any]) -> Message:
    function = {"name": "rainfall", "arguments": arguments}
    return {"tool_calls": [{"id": f"callno00{number}", "type": "function", "function": function}]}


USER = {"role": "user", "content": "How wet is Oslo?"}
AGAIN = {"role": "user", "content": "And Bergen?"}
OSLO = {"place": "Oslo harbour", "days": 7, "hourly": True}
RESPONSE = {"role": "tool", "tool_call_id": "callno001", "name": "rainfall", "content": "twelve millimetres"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rainfall",
            "description": "Measured rain.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Where."},
                    "days": {"type": "integer", "description": "How many."},
                    "hourly": {"type": "boolean", "description": "By hour."},
                },
                "required": ["place"],
            },
        },
    }
]

CONVERSATIONS: dict[str, list[Message]] = {
    "an answer": [USER, {"role": "assistant", "content": "Rather wet."}],
    "a system message": [
        {"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Rather wet."},
    ],
    "two answers": [
        USER, {"role": "assistant", "content": "Rather wet."}, AGAIN, {"role": "assistant", "content": "Wetter."},
    ],
    "blanks and tags": [
        USER, {"role": "assistant", "content": " \n\nFirst  <b>harbour</b>,\n\n    - then [HILLS] & 1 < 2\n\n"},
    ],
    "a thought": [USER, {"role": "assistant", "content": "Rather wet.", **_thought("Recall the\nclimate table.")}],
    "two thoughts": [
        USER, {"role": "assistant", "content": "Rather wet.", **_thought("Recall the\nclimate table.")},
        AGAIN, {"role": "assistant", "content": "Wetter.", **_thought("Coast beats fjord.")},
    ],
    "a thought in the text": [
        USER, {"role": "assistant", "content": "<think>\nRecall the\nclimate table.\n</think>\n\nRather wet."},
    ],
    "a call": [USER, {"role": "assistant", "content": "", **_call(1, OSLO)}],
    "a call and what follows": [
        USER, {"role": "assistant", "content": "", **_call(1, OSLO)}, RESPONSE,
        {"role": "assistant", "content": "Rather wet."},
    ],
    "thoughts and a call": [
        USER, {"role": "assistant", "content": "Let me measure.", **_thought("A gauge knows."), **_call(1, OSLO)},
        RESPONSE, {"role": "assistant", "content": "Rather wet.", **_thought("Twelve is much.")},
    ],
}  # fmt: skip

ENDS = {
    "ByteDance-Seed-OSS": ("<seed:eos>",),
    "Cohere2MoE": ("<|END_OF_TURN_TOKEN|>",),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|END_OF_TURN_TOKEN|>",),
    "Kimi-K3": ("<|end_of_msg|>",),
    "MiniMax-M2": ("[e~[",),
    "MiniMax-M3": ("[e~[",),
    "NVIDIA-Nemotron-Nano-v2": ("<SPECIAL_12>",),
    "meetkai-functionary-medium-v3.1": ("<|eot_id|>", "<|eom_id|>"),
    "muse-glimmer": ("<|eot|>",),
    "openai-gpt-oss-120b": ("<|return|>", "<|call|>"),
    "tencent-Hy3": ("<｜hy_eos｜>",),
    "upstage-Solar-Open-100B": ("<|end|>", "<|calls|>"),
}
"""The ends of a turn that the models' own configurations name, where it is not the tag that follows a plain answer."""

VARIABLES: dict[str, dict[str, Any]] = {
    "fireworks-ai-llama-3-firefunction-v2": {"functions": json.dumps(TOOLS), "datetime": "2026-11-29"}
}
"""What a template needs beside `tools`."""


def fetch() -> dict[str, str]:
    """Template text by name, from the cache or, the first time, through pip. Fails where one is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "harmony-core-tests"
    archive = cache / f"llama_cpp_python-{VERSION}.tar.gz"
    if not archive.is_file():
        wanted = ["--no-binary", ":all:", "--no-deps", "--dest", str(cache), f"llama-cpp-python=={VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *wanted], check=True, timeout=1800)
    with tarfile.open(archive) as files:
        found = {
            match[1].removesuffix(".jinja"): files.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in files
            if (match := _INSIDE.fullmatch(member.name))
        }
    assert len(found) == COUNT, f"{archive} has {len(found)} templates, not {COUNT}"
    return found


@dataclass(frozen=True)
class Proof:
    """What the oracle found of one assistant message: the prompt for it and what follows, or why there is none."""

    prompt: list[int]
    emitted: list[int]
    problem: str = ""


class Oracle:
    """Transformers' tokenizer with a template, in a directory of its own."""

    def __init__(self, directory: Path, name: str, source: str, inner: str) -> None:
        from transformers import AutoTokenizer

        tokenizer = Tokenizer.from_str(inner)
        self.variables = {"tools": TOOLS, **VARIABLES.get(name, {})}
        tags = {
            *ENDS.get(name, ()),
            *re.findall(r"<[|｜][^<>|｜'\"{}\s]{1,40}[|｜]>|</?[a-z_]+>|<end_of_turn>|<start_of_turn>", source),
        }
        tokenizer.add_tokens(
            [AddedToken(tag, special="|" in tag or "｜" in tag, normalized=False) for tag in sorted(tags)]
        )
        specials = {"bos_token": "<s>", "eos_token": "</s>"}
        directories.write(directory, source, specials, tokenizer)
        self.theirs = AutoTokenizer.from_pretrained(directory)
        after = self.render(CONVERSATIONS["an answer"]).partition("Rather wet.")[2].lstrip()
        end = next((tag for tag in sorted(tags, key=len, reverse=True) if after.startswith(tag)), "</s>")
        self.ends = {tokenizer.token_to_id(tag) for tag in ENDS.get(name, (end,))}
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(self.ends)}))

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        """The conversation as text."""
        return str(
            self.theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **self.variables)
        )

    def ids(self, text: str) -> list[int]:
        """Tokens of rendered text."""
        return list(self.theirs.encode(text, add_special_tokens=False))

    def prove(self, messages: list[Message]) -> Proof:
        """What the last message, an assistant's, trains: the difference of two renderings, all of it in there."""
        whole, prompt = self.render(messages), self.render(messages[:-1], prompt=True)
        if not whole.startswith(prompt):
            return Proof([], [], "prompt")
        ids, first = self.ids(whole), self.ids(prompt)
        if ids[: len(first)] != first:
            return Proof([], [], "tokens")
        emitted = ids[len(first) :]
        stop = next((at for at, token in enumerate(emitted) if token in self.ends), None)
        if stop is None:
            return Proof([], [], "end")
        text = str(self.theirs.decode(emitted[: stop + 1], skip_special_tokens=False))
        missing = [leaf for leaf in leaves(messages[-1]) if not is_in(leaf, text, prompt)]
        return Proof([], [], f"lost {missing[0]!r}") if missing else Proof(first, emitted[: stop + 1])


def leaves(message: Message) -> list[str]:
    """Every string and number of an assistant's message that a model has to write."""
    found = [message["content"], message.get("reasoning_content", "")]
    for call in message.get("tool_calls", ()):
        found.append(call["function"]["name"])
        for key, value in call["function"]["arguments"].items():
            found += [key, value if isinstance(value, str) else json.dumps(value)]
    return [leaf.strip() for leaf in found if leaf.strip()]


def is_in(leaf: str, text: str, prompt: str) -> bool:
    """Whether the text holds it; a thought's opening tag may be in the prompt, and blanks about its tags may differ."""
    if leaf in text or leaf.capitalize() in text:
        return True
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    pieces = [piece.strip() for piece in re.split(r"(</?think>)", leaf) if piece.strip()]
    return len(pieces) > 1 and "".join(pieces) in re.sub(r"\s*(</?think>)\s*", r"\1", opened + text)
