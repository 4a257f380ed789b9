"""`python -m harmony_core.engine.convert_gguf FILE DIRECTORY`: a GGUF file becomes a Hugging Face directory.

transformers reads the file; we see to it that the weights come out as numbers (by default they stay quantised), in
bfloat16 where that loses nothing and in float32 else. Prints one line of JSON: {"ok": true}, or {"error": ...}.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.errors import HarmonyError, ModelRefused, VerificationError

if TYPE_CHECKING:
    import torch

ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""What is converted: of other families transformers does not read all that such a file says (scaled rotation)."""


def convert(source: Path, directory: Path) -> None:
    """Write config, weights, tokenizer and chat template of `source` into `directory`."""
    architecture = _architecture(source)
    if architecture not in ARCHITECTURES:
        raise ModelRefused(
            f"{source}: model type {architecture[:60]!r} is not supported in GGUF files",
            hint=f"supported there: {', '.join(sorted(ARCHITECTURES))}; others come from a Hugging Face directory",
        )
    _remember_name_maps()
    _write_tokenizer(source, directory)
    _write_model(source, directory)


def _architecture(source: Path) -> str:
    """`general.architecture` of the file's own metadata; a file that is no GGUF, or truncated, is refused here."""
    import gguf

    size = source.stat().st_size
    try:
        reader = gguf.GGUFReader(source)
        field = reader.fields["general.architecture"]
        end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=size + 1)
        name = bytes(field.parts[field.data[0]]).decode("utf-8", "replace")
    except Exception as error:  # the reader checks little: a broken file fails in whatever line comes first
        raise VerificationError(f"{source}: not a GGUF file, or damaged ({type(error).__name__}: {error})") from error
    if end > size:
        raise VerificationError(f"{source}: truncated ({size} bytes, {end} are needed)")
    return name


def _remember_name_maps() -> None:
    """transformers asks for the same table of tensor names once a tensor; building it is most of the time it takes."""
    import gguf

    gguf.get_tensor_name_map = functools.lru_cache(maxsize=8)(gguf.get_tensor_name_map)


def _write_tokenizer(source: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ModelRefused(f"{source}: its tokenizer cannot be written as tokenizer.json")
    template = directory / "chat_template.jinja"
    if tokenizer.chat_template and not template.is_file():
        template.write_text(tokenizer.chat_template, encoding="utf-8")


def _write_model(source: Path, directory: Path) -> None:
    import torch
    import transformers

    settings: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32}
    # Versions that know the class keep the weights quantised unless told; older ones cannot.
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **settings)
    if all(_exact_in_bfloat16(parameter) for parameter in model.parameters()):
        model = model.to(torch.bfloat16)
    # What remains of the quantiser would make a plain directory look quantised.
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(name, None)
    model.save_pretrained(directory)


def _exact_in_bfloat16(parameter: torch.Tensor) -> bool:
    import torch

    return all(torch.equal(part, part.bfloat16().float()) for part in torch.split(parameter.detach(), 4096))


def main(arguments: list[str]) -> int:
    """The process: two paths in, one line of JSON out."""
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except HarmonyError as error:
        answer = {"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}}
    except Exception as error:  # the process edge: whatever the libraries raise is about this file
        message = f"{arguments[0]}: cannot be converted ({type(error).__name__}: {str(error)[:500]})"
        answer = {"error": {"type": "ModelRefused", "message": message, "hint": ""}}
    else:
        sys.stdout.write(json.dumps({"ok": True}) + "\n")
        return 0
    sys.stdout.write(json.dumps(answer) + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
