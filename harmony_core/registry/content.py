"""Deciding whether a directory is a model that may be published, and which of its files belong to it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harmony_core.errors import ModelRefused
from harmony_core.model_spec import ModelSpec, refuse_code
from harmony_core.registry.adapters import check_adapter, find_base
from harmony_core.registry.manifest import list_files
from harmony_core.registry.versions import ModelVersion
from harmony_core.weight_files import ADAPTER, INDEX, damaged, read_json, weight_names

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What goes with a model besides its config and its weights."""

SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
"""Files of tokenizers from which a tokenizer.json has to be made first."""


@dataclass(frozen=True)
class Content:
    """A directory that was found good."""

    directory: Path
    format: str
    files: list[Path]
    base: ModelVersion | None
    notes: tuple[str, ...]
    scalar: bool = False
    """Whether it has a scalar head: of its own, or its base has."""


def inspect(directory: Path, registry: Registry, base: ModelVersion | str | None, in_place: bool) -> Content:
    """Check a whole directory: format, shapes, tokenizer; no code, no pickle, no link.

    `in_place`: it is somebody else's directory, of which only a model's own files count.
    """
    adapter = (directory / "adapter_config.json").is_file()
    belongs: ModelVersion | None = None
    own_head = False
    if adapter:
        belongs = find_base(registry, directory, base)
        own_head = check_adapter(directory, belongs)
        spec = belongs.spec
    elif (directory / "config.json").is_file():
        spec = ModelSpec.read(directory)
    else:
        raise damaged(directory, "holds neither config.json nor adapter_config.json")
    files = model_files(directory) if in_place else list_files(directory)
    for path in files:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            refuse_code(path, read_json(path))
    notes = () if adapter and not _has_tokenizer(directory) else check_tokenizer(directory, spec.vocab_size)
    return Content(directory, "peft" if adapter else "hf", files, belongs, notes, spec.scalar or own_head)


def model_files(directory: Path) -> list[Path]:
    """The files of somebody's directory that make up the model; everything else in it is left alone."""
    if (directory / "adapter_config.json").is_file():
        names = ["adapter_config.json", ADAPTER]
    else:
        names = ["config.json", *weight_names(directory), *([INDEX] if (directory / INDEX).exists() else [])]
    return [directory / name for name in (*names, *TOKENIZER_FILES) if (directory / name).exists()]


def _has_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file()


def check_tokenizer(directory: Path, vocab_size: int) -> tuple[str, ...]:
    """What the tokenizer lacks, in words. Raises for one that cannot be used, or does not belong to the model."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        slow = next((name for name in SLOW_TOKENIZERS if (directory / name).is_file()), None)
        if slow:
            raise ModelRefused(
                f"{directory / slow}: a tokenizer without tokenizer.json",
                hint=f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r}) makes one",
            )
        return ("no tokenizer: it serves calls with raw tokens only",)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise damaged(path, f"not a tokenizer ({error})") from error
    beyond = {name: number for name, number in vocabulary.items() if number >= vocab_size}
    added = tokenizer.get_added_tokens_decoder()
    if any(number not in added for number in beyond.values()):
        highest = max(beyond.values())
        raise ModelRefused(f"{path}: token {highest} does not fit a model with {vocab_size} tokens")
    notes = []
    if beyond:
        # Fine-tunes often come with a padding token that the weights have no row for.
        notes.append(f"the model does not know the added tokens {', '.join(sorted(beyond)[:5])}")
    if not has_template(directory):
        notes.append("no chat template: it serves calls with raw tokens only")
    return tuple(notes)


def has_template(directory: Path) -> bool:
    """Whether the directory holds a chat template."""
    if (directory / "chat_template.jinja").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def take_tokenizer(parent: ModelVersion, directory: Path) -> None:
    """Give a directory of full weights its parent's tokenizer and generation config, where it has none of its own."""
    if (directory / "adapter_config.json").exists():
        return
    source = parent.tokenizer_dir
    own = _has_tokenizer(directory)
    for name in TOKENIZER_FILES:
        generation = name == "generation_config.json"
        origin = (parent.weights_dir if generation else source) if generation or not own else None
        if origin and (origin / name).is_file() and not (directory / name).exists():
            shutil.copyfile(origin / name, directory / name)
