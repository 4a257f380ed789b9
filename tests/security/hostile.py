"""Hostile input of each kind, made from a seed: valid input into which faults, lies and traps are put.

A maker fills a working directory and returns the words of a command. A trap that is sprung leaves a file `canary`.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from faults import NUMBERS, TEXTS, as_json, damaged, listed, odd, put, spoil_file, spoilt
from jinja2.filters import FILTERS
from jinja2.tests import TESTS

import small_models
from harmony_core.errors import HarmonyError, SampleTooLong
from harmony_core.rpc.protocol import Beat, Cancel, Dealloc, Hello, Nothing, Score
from harmony_core.rpc.wire import Failure, FrameDecoder, WireError, encode, error_of, failure_of

RECIPES = Path(__file__).resolve().parent.parent.parent / "recipes"
CODE = "open('canary', 'w')"
YAML = [
    *(
        "a: &a [*a]",
        "<<: *b",
        "<<: 5",
        "? [lr]\n: 1",
        "lr: 1\nlr: 2",
        "---\nlr: 1",
        "%YAML 9.9\n---",
        "lr: 'open",
        "lr: {",
    ),
    *("lr: !!python/object/apply:os.system ['touch canary']", "!!python/object/new:os.system [touch canary]: 1"),
    *("lr: !!python/name:os.system", "%TAG ! tag:yaml.org,2002:python/\n---", "!!set {a}", "lr: |9\n  x", "\tlr: 1"),
    *("lr: !!float .nan", "model: " + "[" * 50_000, "- " * 20_000, "? " * 20_000, "&a " * 2000, "lr: !<x> 1"),
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)),
]


def yaml(rng: random.Random, at: Path) -> list[str]:
    recipe = rng.choice(("sft", "grpo", "dpo", "ppo", "generate"))
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    names = [line.partition(":")[0] for line in lines if line[:1].isalpha()]
    for _ in range(rng.randrange(4)):
        piece = rng.choice(YAML) if rng.random() < 0.5 else f"{rng.choice(names)}: {odd(rng)}"
        lines.insert(rng.randint(0, len(lines)), " " * rng.choice((0, 0, 0, 2)) + piece)
    put(rng, at / "c.yaml", "\n".join(lines).encode("utf-8", "surrogateescape"))
    if (at / "c.yaml").is_fifo():
        (at / "c.yaml").unlink()  # a pipe is read for as long as somebody may write
    return ["config", "show", recipe, "--config", "c.yaml", *rng.choice(([], ["--json"], ["--sources"]))]


TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba", "weight": 1}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}]}
ROWS: list[dict[str, Any]] = [
    {"messages": TALK},
    {"messages": TALK[:1], "completion": "ba", "metadata": {"answer": 3}},
    {"messages": TALK[:1], "preferred_completion": "a", "other_completion": "b"},
    {"messages": [*TALK, CALL, {"role": "tool", "content": "1"}], "tools": [{"type": "function", "function": {}}]},
    {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "ba"}]},
    {"question": "ab", "answer": "ba"},
    {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]},
]


def jsonl(rng: random.Random, at: Path) -> list[str]:
    row = rng.choice(ROWS)
    rows = [spoilt(rng, copy.deepcopy(row)) if rng.random() < 0.3 else row for _ in range(rng.randrange(1, 5))]
    name = rng.choice((*["rows.jsonl"] * 6, "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet", "rows.arrow"))
    lines = [as_json(row) for row in rows]
    data = b"[" + b",".join(lines) + b"]" if name.endswith(".json") else b"\n".join(lines) + b"\n"
    if (valid := at.parents[2] / name).exists():
        data = valid.read_bytes()
    put(rng, at / name, gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return ["datasets", "inspect", name, "--model", "builtin:tiny-lm", *rng.choice(([], ["--json"]))]


BESIDE: list[tuple[str, bytes]] = [
    *((f"{name}.py", CODE.encode()) for name in ("evil", "torch", "json", "sitecustomize", "tokenizers/__init__")),
    ("pytorch_model.bin", b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R."),
    ("generation_config.json", as_json({"eos_token_id": 3, "custom_generate": "evil"})),
    ("extra.safetensors", struct.pack("<Q", 2) + b"{}"),
    ("adapter_config.json", as_json({"peft_type": "LORA", "r": 2, "base_model_name_or_path": "builtin:tiny-lm"})),
    ("chat_template.jinja", b"{{ cycler.__init__.__globals__.os.system('touch canary') }}"),
]


def model_directory(rng: random.Random, at: Path) -> list[str]:
    model, family = at / "m", rng.choice(sorted(small_models.ARCHITECTURES))
    if rng.random() < 0.15:
        small_models.write_adapter(model, "builtin:tiny-lm", layers=rng.choice((1, 2)))
    else:
        shards, tokenizer = rng.choice((1, 1, 3)), rng.random() < 0.1
        small_models.write_model(model, family, tied=rng.random() < 0.3, shards=shards, with_tokenizer=tokenizer)
    for path in sorted(model.iterdir()):
        if rng.random() < 0.35:
            spoil_file(rng, path)
    for name, data in rng.sample(BESIDE, rng.choice((0, 0, 1, 2))):
        for folder in (model, at):
            (folder / name).parent.mkdir(exist_ok=True)
            if not os.path.lexists(folder / name):
                put(rng, folder / name, data, 0.1)
    return ["models", "add", "m", "m", *rng.choice(([], [], ["--reference"], ["--base", "builtin:tiny-lm"]))]


LETTERS = {letter: n for n, letter in enumerate("abcdefghijkl")}
CORES: list[dict[str, Any]] = [
    {"type": "BPE", "vocab": LETTERS, "merges": [], "unk_token": "a", "byte_fallback": False, "dropout": None},
    {"type": "WordPiece", "vocab": LETTERS, "unk_token": "a", "max_input_chars_per_word": 100},
    {"type": "WordLevel", "vocab": LETTERS, "unk_token": "a"},
    {"type": "Unigram", "vocab": [[letter, -1.0] for letter in LETTERS], "unk_id": 0, "byte_fallback": False},
]
FLAGS_OF_A_TOKEN = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True}
PARTS: dict[str, list[dict[str, Any]]] = {
    "normalizer": [
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": "a"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 12},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ],
    "pre_tokenizer": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": "(a|a)*b|."}, "behavior": "Isolated", "invert": False},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}]},
    ],
    "decoder": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}],
    "truncation": [{"direction": "Right", "max_length": 10**18, "strategy": "LongestFirst", "stride": 10**18}],
    "padding": [{"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}],
    "post_processor": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}],
    "added_tokens": [[{"id": n, "content": f"<{n}>", **FLAGS_OF_A_TOKEN}] for n in (0, 12, 2**31)],
}


def tokenizer(rng: random.Random, at: Path) -> list[str]:
    model = small_models.write_model(at / "m")
    made: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": copy.deepcopy(rng.choice(CORES))}
    for name in rng.sample(sorted(PARTS), rng.randrange(4)):
        made[name] = copy.deepcopy(rng.choice(PARTS[name]))
    settings = {"chat_template": "{{ messages }}", "eos_token": "b", "added_tokens_decoder": {"12": {"content": "x"}}}
    small_models.write_json(model / "tokenizer_config.json", settings)
    for name, value in (("tokenizer.json", made), ("special_tokens_map.json", {"eos_token": {"content": "b"}})):
        put(rng, model / name, as_json(spoilt(rng, value) if rng.random() < 0.5 else value), 0.15)
    if rng.random() < 0.3:
        spoil_file(rng, model / "tokenizer_config.json")
    return ["models", "add", "m", "m"]


ATOMS = listed(
    "messages messages[0] messages[0].content 'a' 'ab'*9 9 10**9 -1 1.5 none true loop namespace dict range cycler "
    "joiner self tools bos_token raise_exception '' range(99999) namespace(a=1) strftime_now x [] {} "
    "'{:>99999999}' '%999999999d'"
)
NAMES = sorted({*dir(str), *dir(list), *dir(dict), "__globals__", "__code__", "gi_frame", "os", "system", "mro"})
SHAPES = listed(
    "({} + {});({} ~ {});({} * {});({} ** {});({} % {});({} // {});({} in {});[{}, {}];{}[{}];{}({});{}(a={});"
    "{}({}, {});({} if {} else {});{}[{}:{}];{} | NAMED;{} | NAMED({});{} is TESTED;{}.CALLED;{}.CALLED({});"
    "{}.CALLED({}, {});{} | attr('CALLED');{} | map('NAMED') | list;{}['CALLED']",
    ";",
)


def expression(rng: random.Random, depth: int = 4) -> str:
    if not depth or rng.random() < 0.2:
        return rng.choice(ATOMS)
    shape = (
        rng.choice(SHAPES).replace("NAMED", rng.choice(sorted(FILTERS))).replace("TESTED", rng.choice(sorted(TESTS)))
    )
    parts = shape.replace("CALLED", rng.choice(NAMES)).split("{}")
    return "".join(part + (expression(rng, depth - 1) if n < len(parts) - 1 else "") for n, part in enumerate(parts))


BLOCKS = (
    *(
        "{% for x in EXPR %}BODY{% endfor %}",
        "{% for m in messages if EXPR %}BODY{% endfor %}",
        "{{ EXPR }}BODY",
        "text",
    ),
    *("{% if EXPR %}BODY{% else %}BODY{% endif %}", "{% set x = EXPR %}BODY", "{% set x %}BODY{% endset %}{{ x }}"),
    *("{% macro f(x) %}BODY{{ f(EXPR) }}{% endmacro %}{{ f(EXPR) }}", "{% generation %}BODY{% endgeneration %}"),
    *("{% filter upper %}BODY{% endfilter %}", "{% include EXPR %}", "{% import EXPR as x %}", "{% extends EXPR %}"),
    *("{% call f() %}BODY{% endcall %}", "{% block x %}BODY{% endblock %}", "{% with x = EXPR %}BODY{% endwith %}"),
    "{% set n = namespace(s=EXPR) %}{% for x in range(99999) %}{% set n.s = EXPR %}BODY{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
)


def block(rng: random.Random, depth: int = 3) -> str:
    made = rng.choice(BLOCKS) if depth else "{{ EXPR }}"
    return re.sub("EXPR|BODY", lambda m: expression(rng) if m[0] == "EXPR" else block(rng, depth - 1), made)


def template(rng: random.Random, at: Path) -> list[str]:
    text = "".join(block(rng) for _ in range(rng.choice((1, 1, 2))))
    put(rng, at / "t.jinja", text.encode("utf-8", "surrogateescape"), 0.1)
    return ["models", "add", "m", "builtin:tiny-lm", "--chat-template", "t.jinja"]


def gguf(rng: random.Random, at: Path) -> list[str]:
    data = (at.parents[2] / "small.gguf").read_bytes()
    put(rng, at / "m.gguf", damaged(rng, data, first=1500) if rng.random() < 0.8 else data, 0.05)
    small_models.write_json(at / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}})
    (at / "evil.py").write_text(CODE)
    return ["models", "add", "m", "m.gguf"]


PIECES = (
    *listed("a a b 7 .. ../ . / \\ ~ %2e%2e %2f v000001 @ @1 @best etc/passwd model_registry:// builtin: tiny-lm hf:"),
    *listed("gguf: model.json .tmp A é \u2024\u2024 \udcff \x1b[31m - --all $HOME * canaries \uff0f \u202e _"),
    *("\n", " ", "a" * 64, "a" * 5000),
)


def key(rng: random.Random, at: Path) -> list[str]:
    made = "".join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 6))))
    commands = (["add", made, "builtin:tiny-lm"], ["show", made], ["path", made], ["rm", made], ["verify", made])
    return ["models", *rng.choice((*commands, ["alias", made, "best"], ["set", made, "tp=1"], ["list", made]))]


FLAGS = listed(
    "timeout hang-timeout silence-timeout fault-grace save-wait memory assume seed num-processes keep-checkpoints "
    "device resume set config accelerate-config prompt model max-tokens temperature"
)
UNITS = ("", "s", "h", "d", "GB", "GiB", "%", "x80GiB", ",", "e9", ".")


def value(rng: random.Random, at: Path) -> list[str]:
    text = f"{rng.choice([*NUMBERS, *TEXTS])}".replace("\0", "") + rng.choice(UNITS)
    name = rng.choice(listed("tp kv_cache_len tokens_to_generate chat_template_kwargs description trainable x"))
    lines = (
        *[["run", "generate", "--dry-run", f"--{rng.choice(FLAGS)}={text}"]] * 6,
        ["config", "show", "sft", f"--{rng.choice(('lr', 'epochs', 'seed', 'tp', 'save-as', 'adapter'))}={text}"],
        ["models", "add", "m", "builtin:tiny-lm", "--set", f"{name}={text}"],
        ["datasets", "inspect", "sort-letters", "--model", "builtin:tiny-lm", f"--limit={text}"],
        ["datasets", "inspect", text, "--model", "builtin:tiny-lm", f"--chat-template-kwargs={text}"],
        ["runs", "gc", "--dry-run", f"{rng.choice(('--older-than', '--keep'))}={text}"],
        [rng.choice(("runs", "recipes", "models")), "show", text],
        ["run", text, "--dry-run"],
    )
    return rng.choice(lines)


def checkpoint(rng: random.Random, at: Path) -> list[str]:
    (run,) = (at.parent / "home" / "runs").iterdir()
    newest = max((run / "checkpoints").iterdir())
    files = sorted(path for path in newest.rglob("*") if path.is_file()) + sorted(run.glob("*.json*"))
    chosen = rng.choices([*[newest / "state.json"] * 6, *files], k=rng.choice((0, 1, 1, 2)))
    for path in dict.fromkeys(chosen):
        spoil_file(rng, path)
    if rng.random() < 0.6:
        recorded_anew(newest)
    resume = ["run", "--resume", run.name, "--dry-run"]
    looks = (["list"], ["list", "--json"], ["show", run.name], ["report", run.name], ["gc", "--keep", "0"])
    return rng.choice((resume, resume, resume, *(["runs", *words] for words in looks)))


def recorded_anew(directory: Path) -> None:
    """Let the manifest tell the bytes that are there: a lie that no hash gives away."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        for entry in manifest["files"]:
            data = (directory / entry["path"]).read_bytes()
            entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        small_models.write_json(directory / "manifest.json", manifest)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return  # the manifest itself is hostile, or what it names


FRAMES = 1000
"""In one case."""
SENT = [
    encode("call", Dealloc(model="policy"), id=7, seq=3),
    encode("call", Score(model="m", replica=0, tokens=b"\1" * 40, targets=b"\2" * 40), id=8),
    encode("ok", Nothing(), id=7, method="Dealloc"),
    encode("event", Beat(phase="idle", seconds=1.5, step=3)),
    encode("event", Hello(token="x", protocol=1, version="", rank=0, world_size=1, pid=1, device="", torch="")),
    encode("err", failure_of(SampleTooLong("12 > 8", hint="cut", tokens=12, limit=8), 1), id=9),
    encode("cast", Cancel(call=7)),
]


def spoilt_frame(rng: random.Random, frame: bytes) -> bytes:
    """Well-formed, with another value in its header or body."""
    size = struct.unpack_from("<I", frame)[0]
    parts = [msgspec.msgpack.decode(part) for part in (frame[12 : 12 + size], frame[12 + size :])]
    try:
        at = rng.randrange(2)
        parts[at] = spoilt(rng, parts[at])
        head, body = map(msgspec.msgpack.encode, parts)
    except (OverflowError, ValueError, UnicodeEncodeError):
        return damaged(rng, frame)
    return struct.pack("<IQ", len(head), len(body)) + head + body


def frames(rng: random.Random, at: Path) -> Callable[[], int]:
    def feed() -> int:
        taken = 0
        for _ in range(FRAMES):
            sent = rng.choice(SENT)
            try:
                for frame in FrameDecoder().feed(rng.choice((damaged, spoilt_frame))(rng, sent)):
                    taken += 1
                    if isinstance(frame.body, Failure):
                        assert isinstance(error_of(frame.body), HarmonyError)
            except WireError:
                continue
        return 0 if taken else 2

    return feed


MAKERS: dict[str, Callable[[random.Random, Path], list[str] | Callable[[], int]]] = {
    "yaml": yaml,
    "jsonl": jsonl,
    "models": model_directory,
    "tokenizers": tokenizer,
    "templates": template,
    "gguf": gguf,
    "keys": key,
    "frames": frames,
    "values": value,
    "checkpoints": checkpoint,
}
