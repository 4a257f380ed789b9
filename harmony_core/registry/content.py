"""Check a directory before it becomes a model or an adapter, and edit it so that other libraries can read it.

A peft adapter must be a plain LoRA whose tensors fit a registered base.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony_core.errors import ModelRefused, NotFoundError, TokenizationError
from harmony_core.model.spec import ModelSpec
from harmony_core.model.weight_files import (
    ADAPTER,
    TOKENIZER_FILES,
    Tensor,
    adapter_targets,
    check_adapter_config,
    model_names,
    read_headers,
    same_values,
    weight_names,
)
from harmony_core.plain_files import damaged, exists, place_file, read_json, refuse_code, write_json
from harmony_core.registry.records import MANIFEST, ModelVersion, first_reason, list_files, slugify
from harmony_core.rpc.protocol import LoraSettings

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry
    from harmony_core.text.chat_template import ChatTemplate

_HEAD = "base_model.model.score.weight"
"""A scalar head in peft's files."""
_HEAD_MODULES = frozenset({"score", "classifier"})
"""Modules that peft saves whole for sequence classification; a model has one of these names."""
_NAME = re.compile(
    r"base_model\.model\.(model\.layers\.(\d{1,5})\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight",
    re.ASCII,
)

SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
"""Files of tokenizers from which a tokenizer.json has to be made first."""
SLOW_NEEDS = "; for that transformers needs: pip install sentencepiece protobuf tiktoken"
"""Added to errors about files named *.model."""
_QUESTION = {"role": "user", "content": "Hello"}
_TRIALS = (([_QUESTION], True), ([_QUESTION, {"role": "assistant", "content": "Hi"}], False))
_ANOTHER = "take another template: --chat-template FILE"
_PLAIN = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is, under a name that every version of transformers knows."""
_KNOWN = frozenset(
    f"{name}Tokenizer{fast}"
    for name in ("CodeLlama", "Cohere", "GPT2", "GPTNeoX", "Gemma", "Llama", "Qwen2", "T5")
    for fast in ("", "Fast")
) | {_PLAIN}


def find_base(registry: Registry, directory: Path, base: ModelVersion | str | None) -> ModelVersion:
    """The version that an adapter belongs to: `base` if given, otherwise the one named in its config.

    A name is a reference, or the source of a registered model.
    """
    if base:
        return _whole(registry.resolve(base) if isinstance(base, str) else base)
    path = directory / "adapter_config.json"
    config = read_json(path)
    name, commit = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelRefused(f"{path}: names no base model", hint="say which one with --base KEY")
    with contextlib.suppress(NotFoundError):
        return _whole(registry.resolve(name))
    imported = _recorded(registry, directory)
    if imported is None:
        imported = registry.imported_from(name)
        if isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit):
            name = f"{name}@{commit}"
            # Another commit's weights may have the same shapes.
            imported = imported if imported and imported.source == f"hf:{name}" else None
    if imported is None:
        origin = name if name.startswith(("/", ".")) else f"hf:{name}"
        line = f"adaptive models add {slugify(name.rpartition('/')[2])} {origin}"
        raise NotFoundError(
            f"{path}: its base model {name[:200]!r} is not in the registry",
            hint=f"add it ({line}), or say which one with --base KEY",
        )
    return _whole(imported)


def _recorded(registry: Registry, directory: Path) -> ModelVersion | None:
    """The base named in another home's record beside the adapter, if this home has it with the same bytes."""
    path = directory / MANIFEST
    record = read_json(path).get("base") if exists(path) else None
    if isinstance(record, dict):
        with contextlib.suppress(NotFoundError):
            found = registry.resolve(str(record.get("ref")))
            return found if found.digest == record.get("digest") else None
    return None


def _whole(base: ModelVersion) -> ModelVersion:
    if base.base is not None:
        raise ModelRefused(f"{base.ref} is an adapter itself", hint=f"its base is {base.base.ref}")
    return base


def check_adapter(directory: Path, base: ModelVersion) -> bool:
    """Raise ModelRefused or VerificationError unless the adapter is a plain LoRA whose tensors fit the base.

    Returns true if the adapter has a scalar head in peft's form: the module "score", saved whole.
    """
    path = directory / "adapter_config.json"
    config = read_json(path)
    refuse_code(path, config)
    check_adapter_config(path, config)
    if type(rank := config.get("r")) is not int or not 0 < rank <= 65536:
        raise damaged(path, f"r is {str(rank)[:40]!r}, not a positive whole number")
    if weight_names(directory, "adapter_model") != [ADAPTER]:
        raise damaged(directory, f"an adapter in several files, and not in {ADAPTER}")
    tensors = read_headers(directory, "adapter_model")
    head, size = tensors.pop(_HEAD, None), base.spec.hidden_size
    reason = first_reason(
        (not tensors, "holds no tensor"),
        (head and head.shape != (1, size), f"{_HEAD!r} has shape {list(head.shape) if head else ''}, not [1, {size}]"),
        (not head and _saves_head(path, config), f"{_HEAD!r} is missing, and {path.name} says it is there"),
    )
    if reason:
        raise damaged(directory / ADAPTER, reason)
    for tensor in tensors.values():
        _check_tensor(directory / ADAPTER, tensor, config, base)
    halves = Counter(re.sub(r"lora_[AB]", "lora_?", name) for name in tensors)
    if lonely := next((name for name, count in halves.items() if count != 2), ""):
        raise damaged(directory / ADAPTER, f"{lonely!r} has one of its two halves only")
    return head is not None


def _saves_head(path: Path, config: dict[str, Any]) -> bool:
    """Whether an adapter's config says that a scalar head is saved whole. Raises ModelRefused for other modules."""
    if not (named := config.get("modules_to_save")):
        return False
    if not isinstance(named, list) or not set(named) <= _HEAD_MODULES or "score" not in named:
        raise ModelRefused(
            f"{path}: modules_to_save={str(named)[:80]} is not supported",
            hint="plain LoRA on a layer's linear modules is, and a scalar head named score",
        )
    return True


def module_shape(spec: ModelSpec, module: str) -> tuple[int, int]:
    """(output, input) features of a layer's linear module."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    d, i = spec.hidden_size, spec.intermediate_size
    shapes = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q), "down_proj": (d, i)}
    return shapes.get(module, (i, d))


def _check_tensor(path: Path, tensor: Tensor, config: dict[str, Any], base: ModelVersion) -> None:
    match = _NAME.fullmatch(tensor.name)
    if not match or match[3] not in LoraSettings().targets:
        raise ModelRefused(f"{path}: tensor {tensor.name[:120]!r} is not a LoRA half of a layer's linear module")
    if int(match[2]) >= base.spec.num_layers:
        raise ModelRefused(
            f"{path}: tensor {tensor.name!r} is for layer {match[2]}; {base.ref} has {base.spec.num_layers}"
        )
    if not adapter_targets(config, match[1]):
        raise ModelRefused(
            f"{path}: tensor {tensor.name!r} is for a module that target_modules and layers_to_transform in "
            "adapter_config.json leave out, so peft would read over it"
        )
    rank = config["r"]
    out_features, in_features = module_shape(base.spec, match[3])
    expected = (rank, in_features) if match[4] == "A" else (out_features, rank)
    if tensor.shape != expected:
        raise ModelRefused(
            f"{path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, and {base.ref} with rank {rank} needs "
            f"{list(expected)}",
            hint="is it another model's adapter?",
        )


@dataclass(frozen=True)
class Content:
    """A directory that passed the checks."""

    directory: Path
    format: str
    files: list[Path]
    base: ModelVersion | None
    notes: tuple[str, ...]
    scalar: bool = False
    """Whether it or its base has a scalar head."""


def inspect(directory: Path, registry: Registry, base: ModelVersion | str | None, in_place: bool) -> Content:
    """Check a whole directory: format, shapes, tokenizer; code, pickled files and links are refused.

    `in_place`: the directory is not the registry's own, and only the files of the model are checked.
    """
    if adapter := exists(directory / "adapter_config.json"):
        belongs: ModelVersion | None = (found := find_base(registry, directory, base))
        own_head, spec = check_adapter(directory, found), found.spec
    elif exists(directory / "config.json"):
        belongs, own_head, spec = None, False, ModelSpec.read(directory)
        _refuse_two_heads(directory, spec)
    else:
        raise damaged(directory, "holds neither config.json nor adapter_config.json")
    files = [directory / name for name in model_names(directory)] if in_place else list_files(directory)
    for path in files:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            refuse_code(path, read_json(path))
    raw = adapter and not exists(directory / "tokenizer.json")
    notes = () if raw else _check_tokenizer(directory, spec.vocab_size)
    return Content(directory, "peft" if adapter else "hf", files, belongs, notes, spec.scalar or own_head)


def _refuse_two_heads(directory: Path, spec: ModelSpec) -> None:
    """Raise ModelRefused for tied embeddings whose file has another head beside them."""
    tensors = read_headers(directory) if spec.tied and not spec.scalar else {}
    head = tensors.get("lm_head.weight")
    if head and not same_values(directory, head, tensors["model.embed_tokens.weight"]):
        raise ModelRefused(
            f"{directory / head.file}: 'lm_head.weight' is not the embedding, and by tie_word_embeddings in "
            "config.json it is; transformers 5 takes the one, others the other",
            hint='put "tie_word_embeddings": false there if this head is the trained one, else remove it from the file',
        )


def _check_tokenizer(directory: Path, vocab_size: int) -> tuple[str, ...]:
    """Notes on missing parts of the tokenizer. Raises an error if it is unusable or does not fit the model."""
    path = directory / "tokenizer.json"
    if not exists(path):
        if slow := next((name for name in SLOW_TOKENIZERS if (directory / name).is_file()), None):
            raise ModelRefused(
                f"{directory / slow}: a tokenizer without tokenizer.json",
                hint=f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r}) makes one"
                + SLOW_NEEDS * slow.endswith(".model"),
            )
        return ("no tokenizer: it serves calls with raw tokens only",)
    from harmony_core.text.tokenizer_files import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except TokenizationError as error:
        raise damaged(path, error.message) from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    beyond = {name: number for name, number in vocabulary.items() if number >= vocab_size}
    added = tokenizer.get_added_tokens_decoder()
    if any(number not in added for number in beyond.values()):
        highest = max(beyond.values())
        raise ModelRefused(f"{path}: token {highest} does not fit a model with {vocab_size} tokens")
    notes = (
        # Fine-tunes often come with a padding token that the weights have no row for.
        (beyond, f"the model does not know the added tokens {', '.join(sorted(beyond)[:5])}"),
        (not has_template(directory), "no chat template: it serves calls with raw tokens only"),
    )
    return tuple(note for applies, note in notes if applies)


def has_template(directory: Path) -> bool:
    """Whether the directory holds a chat template."""
    config = directory / "tokenizer_config.json"
    stored = exists(config) and read_json(config).get("chat_template")
    return bool(stored) or exists(directory / "chat_template.jinja")


def take_tokenizer(parent: ModelVersion, directory: Path) -> None:
    """Copy the parent's tokenizer and generation config into a directory that lacks them."""
    from harmony_core.text.tokenizer_files import load_tokenizer

    source = None if exists(directory / "tokenizer.json") else parent.tokenizer_dir
    if source and (directory / "adapter_config.json").exists():
        vocabulary = load_tokenizer(source / "tokenizer.json").get_vocab(with_added_tokens=True)
        # If there are further tokens beside an adapter, peft adds made-up rows for them.
        source = source if max(vocabulary.values(), default=0) < parent.spec.vocab_size else None
    for name in TOKENIZER_FILES:
        origins = (parent.path, parent.weights_dir) if name == "generation_config.json" else (source,)
        origin = next((folder / name for folder in origins if folder and exists(folder / name)), None)
        if origin and not (directory / name).exists():
            (directory / name).parent.mkdir(exist_ok=True)
            place_file(origin, directory / name, share=False)


def check_chat(directory: Path, vocab_size: int) -> None:
    """Raise TokenizationError for a template that cannot be compiled or that lacks a filter, a test or a name, and for
    an end token that the tokenizer lacks. A directory without tokenizer passes.
    """
    if not exists(directory / "tokenizer.json"):
        return
    from harmony_core.text import tokenizer_files

    try:
        files = tokenizer_files.read(directory)
        if files.template is not None:
            for template in files.template.choices:
                _check_template(template)
    except TokenizationError as error:
        error.hint = error.hint or _ANOTHER
        raise
    for token in sorted(files.stop_ids):
        if token >= vocab_size or files.tokenizer.id_to_token(token) is None:
            raise TokenizationError(
                f"{directory}: eos_token_id {token} is no token: the tokenizer has {files.tokenizer.get_vocab_size()} "
                f"and the model {vocab_size}",
                hint="correct eos_token_id in generation_config.json or config.json",
            )


def _check_template(template: ChatTemplate) -> None:
    if missing := template.missing():
        raise TokenizationError(f"{template.origin}: chat template: it uses {', '.join(missing)}, which does not exist")
    for messages, add_generation_prompt in _TRIALS:
        try:
            template.render(messages, add_generation_prompt)
        except TokenizationError as error:
            if not error.details["refused"]:  # a template may refuse a conversation, but must not fail on a plain one
                raise


def complete(directory: Path, config: Path, stop_ids: AbstractSet[int]) -> None:
    """Edit the tokenizer's and the generation's settings in `directory`; `config`: the model's directory.

    Raises VerificationError for a file that is not a JSON object.
    """
    if exists(directory / "tokenizer.json"):
        path = directory / "tokenizer_config.json"
        settings = read_json(path) if exists(path) else {}
        if (known := _readable_tokenizer(settings)) != settings:
            write_json(path, known)
    path = directory / "generation_config.json"
    if exists(path):
        settings = read_json(path)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        stored = read_json(config / "config.json")
        settings = {name: stored[name] for name in names if stored.get(name) is not None}
    ends = settings.get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if missing := sorted(stop_ids - set(ids)):
        ids = [*ids, *missing]
        settings["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        # With this mark libraries generate the file again from config.json, which names one token.
        settings.pop("_from_model_config", None)
    if missing or not exists(path):
        write_json(path, settings)


def _readable_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    known = dict(settings)
    if known.get("tokenizer_class") not in _KNOWN:
        known["tokenizer_class"] = _PLAIN
    if isinstance(known.get("extra_special_tokens"), list):
        # transformers 4 expects named tokens under this key, and a list under the other.
        extra = known.pop("extra_special_tokens")
        known["additional_special_tokens"] = [*known.get("additional_special_tokens", ()), *extra]
    return known
