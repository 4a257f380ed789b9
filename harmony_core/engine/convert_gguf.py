"""`python -m harmony_core.engine.convert_gguf FILE DIRECTORY NAME`: a GGUF file becomes a Hugging Face directory.

FILE must be alone in its folder, since transformers also reads other files there. Errors call it NAME.

transformers reads the file; we dequantise the weights (by default they stay quantised), to bfloat16 if that is exact,
else to float32. Prints one line of JSON: {"ok": true}, or {"error": ...}.
"""

from __future__ import annotations

import functools
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harmony_core import confined
from harmony_core.errors import HarmonyError, ModelRefused, VerificationError
from harmony_core.plain_files import damaged, open_plain, read_json

if TYPE_CHECKING:
    import torch

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""The families that are converted. For others, transformers does not read all settings of a file (scaled rotation)."""

_READ = ("blk.", "token_embd.", "output_norm.", "output.")
_TOKENS = "tokenizer.ggml."
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def convert(source: Path, directory: Path) -> None:
    """Write config, weights, tokenizer and chat template of `source` into `directory`."""
    check_header(source.resolve())
    described = _describe(source)
    architecture = described.architecture
    if architecture not in ARCHITECTURES:
        raise ModelRefused(
            f"{source}: model type {architecture[:60]!r} is not supported in GGUF files",
            hint=f"supported there: {', '.join(sorted(ARCHITECTURES))}; others come from a Hugging Face directory",
        )
    _remember_name_maps()
    if not described.tokens:
        raise ModelRefused(f"{source}: has no vocabulary (tokenizer.ggml.tokens)")
    _write_tokenizer(source, directory, described)
    _write_model(source, directory, described)


@dataclass(frozen=True)
class _Described:
    """The file's own metadata."""

    architecture: str
    tokens: list[str]
    control: list[int]
    """Ids of control tokens, which have no text."""
    ids: dict[str, int | None]
    """Ids of the special tokens, by the names in config.json."""
    tensors: int
    unread: list[str]
    """Entries that transformers ignores although they change the results."""


def _describe(source: Path) -> _Described:
    """Read the file's metadata. Refuses a file that is not GGUF, is truncated, or has no weights."""
    import gguf

    size = source.stat().st_size
    try:
        reader = gguf.GGUFReader(source)
        name = reader.fields["general.architecture"].contents()
        end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
        told = {key: field.contents() for key, field in reader.fields.items() if key.startswith(_TOKENS)}
        kinds = told.get(f"{_TOKENS}token_type", ())
        described = _Described(
            architecture=str(name),
            tokens=list(told.get(f"{_TOKENS}tokens", ())),
            control=[id for id, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL],
            ids={ours: told.get(_TOKENS + theirs) for ours, theirs in _SPECIAL.items()},
            tensors=len(reader.tensors),
            unread=[tensor.name for tensor in reader.tensors if not tensor.name.startswith(_READ)],
        )
        scaling = reader.fields.get(f"{name}.rope.scaling.type")
        if scaling and scaling.contents() != "none":
            described.unread.append(f"{scaling.name}={scaling.contents()}")
    except Exception as error:  # the reader checks little: a broken file may fail in any line
        raise VerificationError(f"{source}: not a GGUF file, or damaged ({type(error).__name__}: {error})") from error
    if end > size:
        raise VerificationError(f"{source}: truncated ({size} bytes, {end} are needed)")
    if not reader.tensors:
        raise ModelRefused(f"{source}: holds a vocabulary only, no weights", hint="the model's own .gguf file has both")
    if described.unread:
        raise ModelRefused(
            f"{source}: {', '.join(described.unread[:5])}: neither scaled rotation nor tensors beside the usual ones "
            "are converted",
            hint="add the model from a Hugging Face directory",
        )
    return described


def _remember_name_maps() -> None:
    """Cache the table of tensor names: transformers builds it anew for each tensor, which is most of its time."""
    import gguf

    gguf.get_tensor_name_map = functools.lru_cache(maxsize=8)(gguf.get_tensor_name_map)


def _write_tokenizer(source: Path, directory: Path, described: _Described) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
    )
    # transformers changes the text of some tokens. Special tokens are then appended after all others, where the weights
    # have no row, or are split into pieces.
    tokens, written = described.tokens, str(tokenizer.chat_template)
    added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    wrong = [f"{name!r} as {id}" for id, name in added.items() if tokens[id : id + 1] != [name]]
    wrong += [f"{tokens[id]!r} in pieces" for id in described.control if id not in added and tokens[id] in written]
    if wrong:
        raise ModelRefused(
            f"{source}: special tokens would get other ids than in its vocabulary of {len(tokens)}: "
            f"{', '.join(wrong[:5])}",
            hint="add the model from a Hugging Face directory",
        )
    tokenizer.save_pretrained(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ModelRefused(f"{source}: its tokenizer cannot be written as tokenizer.json")
    template = directory / "chat_template.jinja"
    if tokenizer.chat_template and not template.is_file():
        template.write_text(tokenizer.chat_template, encoding="utf-8")


def _write_model(source: Path, directory: Path, described: _Described) -> None:
    import torch
    import transformers

    from harmony_core.engine.models.weights import both_forms

    settings: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32, "output_loading_info": True}
    # Versions with this class keep the weights quantised by default; older ones cannot.
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    from_pretrained: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, found = from_pretrained(source.parent, local_files_only=True, trust_remote_code=False, **settings)
    missing, held = sorted(found["missing_keys"]), len(list(model.parameters()))
    if missing or held != described.tensors:
        # transformers initialises missing tensors and ignores unknown ones.
        reason = f"lacks {', '.join(missing[:5])}" if missing else f"holds {described.tensors} tensors, not {held}"
        raise ModelRefused(f"{source}: {reason}, and so is not a whole {described.architecture} model")
    if all(_exact_in_bfloat16(parameter) for parameter in model.parameters()):
        model = model.to(torch.bfloat16)
    for name, value in described.ids.items():
        # Without this, a token that the file does not name gets the default of the class, another token.
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    # Otherwise the saved directory would be marked as quantised.
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(name, None)
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = both_forms(read_json(path), model.config, str(model.dtype).removeprefix("torch."))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _exact_in_bfloat16(parameter: torch.Tensor) -> bool:
    import torch

    return all(torch.equal(part, part.bfloat16().float()) for part in torch.split(parameter.detach(), 4096))


def _with_causes(error: BaseException) -> str:
    """An error with its causes: libraries wrap the reason in errors of their own."""
    found: list[str] = []
    reason: BaseException | None = error
    while reason is not None and len(found) < 4:
        found.append(f"{type(reason).__name__}: {str(reason).strip()[:300]}")
        reason = reason.__cause__ or reason.__context__
    return "; from ".join(found)


def main(arguments: list[str]) -> None:
    """Run the conversion; arguments are two paths and a name. Prints one line of JSON."""
    source, directory, name = arguments
    try:
        convert(Path(source), Path(directory))
    except HarmonyError as error:
        error.message = error.message.replace(str(Path(source).resolve()), name).replace(source, name)
        confined.answer(error)
    except Exception as error:  # the process edge: any error of the libraries concerns this file
        confined.answer(ModelRefused(f"{name}: cannot be converted ({_with_causes(error)})"), logged=True)
    else:
        confined.answer()


_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type code of a plain value -> its size in bytes."""
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 4_000_000
"""Values and tensors in all: a vocabulary of 262,144 with scores, types and merges has under 2 million."""


def check_header(path: Path) -> None:
    """Raise VerificationError for counts or lengths that the file cannot hold."""
    with open_plain(path) as file:
        _Header(path, file).walk()


class _Header:
    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.items = path, file, 0
        self.left = file.seek(0, 2)
        file.seek(0)

    def walk(self) -> None:
        magic, version, tensors, values = struct.unpack("<4sIQQ", self.take(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise damaged(self.path, f"not a GGUF file of version 2 or 3 ({magic!r}, {version})")
        self.count(tensors + values)
        for _ in range(values):
            self.skip(self.number("<Q"))
            self.value(self.number("<I"))
        for _ in range(tensors):
            self.skip(self.number("<Q"))
            dimensions = self.number("<I")
            if dimensions > 4:
                raise damaged(self.path, f"not a GGUF file, or damaged: a tensor of {dimensions} dimensions")
            self.skip(8 * dimensions + 12)

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("<Q"))
        elif kind == _ARRAY:
            kind, length = struct.unpack("<IQ", self.take(12))
            self.count(length)
            if kind in _BYTES:
                self.skip(length * _BYTES[kind])
            elif kind == _STRING:
                for _ in range(length):
                    self.skip(self.number("<Q"))
            else:
                raise damaged(self.path, f"not a GGUF file, or damaged: an array of values of kind {kind}")
        elif kind in _BYTES:
            self.skip(_BYTES[kind])
        else:
            raise damaged(self.path, f"not a GGUF file, or damaged: a value of kind {kind}")

    def number(self, form: str) -> int:
        found: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return found

    def count(self, number: int) -> None:
        self.items += number
        if self.items > min(_MAX_ITEMS, self.left):
            raise damaged(self.path, f"not a GGUF file, or damaged: it says that it holds {self.items} values")

    def take(self, size: int) -> bytes:
        self.left -= size
        data = self.file.read(size) if self.left >= 0 else b""
        if len(data) != size:
            raise damaged(self.path, "not a GGUF file, or damaged: it ends in the middle of its header")
        return data

    def skip(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise damaged(self.path, "not a GGUF file, or damaged: something in its header is longer than the file")
        self.file.seek(size, 1)


if __name__ == "__main__":
    main(sys.argv[1:])
