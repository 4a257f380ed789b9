from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import small_models
from harmony_core.errors import HarmonyError, ModelRefused, NotFoundError, UsageError, VerificationError
from harmony_core.registry import Registry


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", sorted(small_models.ARCHITECTURES))
def test_a_directory_is_imported_and_loads_in_transformers(
    registry: Registry, tmp_path: Path, family: str, shards: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = small_models.write_model(tmp_path / "source", family, shards=shards)
    version = registry.add("m", str(source))
    assert (version.ref, version.format, version.kind, version.source) == ("m@1", "hf", "lm", str(source))
    ids = torch.tensor([[1, 5, 3]])
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, version.path)]
    assert torch.equal(*logits)
    assert logits[0].std() > 0.01


def test_a_scalar_head_makes_another_kind_of_model(registry: Registry, source: Path) -> None:
    version = registry.add("reward", str(small_models.make_scalar(source)))
    assert version.kind == "scalar" and version.scalar and registry.resolve("reward").spec.scalar


def test_weights_are_shared_and_the_rest_is_copied(registry: Registry, source: Path) -> None:
    version = registry.add("m", str(source))
    assert (version.path / "config.json").stat().st_nlink == 1
    state, original = (version.path / "model.safetensors").stat(), (source / "model.safetensors").stat()
    # A reflink has an inode of its own; where there is none, it is a hard link.
    assert state.st_ino == original.st_ino or state.st_nlink == 1
    (source / "config.json").write_text("{}")
    registry.verify("m")


def test_a_reference_leaves_the_files_where_they_are(registry: Registry, source: Path) -> None:
    version = registry.add("m", str(source), reference=True)
    assert version.path == source
    assert [path.name for path in registry.directory("m", 1).iterdir()] == ["manifest.json"]
    assert registry.verify("m").weights_dir == source
    (source / "config.json").write_text(json.dumps(small_models.config() | {"rms_norm_eps": 1e-6}))
    with pytest.raises(VerificationError, match=r"config\.json: .* bytes, and|differs from what was recorded"):
        registry.resolve("m")
    registry.remove("m")
    assert (source / "model.safetensors").is_file()


def test_a_reference_to_what_is_gone_names_the_file(registry: Registry, source: Path, tmp_path: Path) -> None:
    registry.add("m", str(source), reference=True)
    source.rename(tmp_path / "moved")
    with pytest.raises(VerificationError, match=r"source/config\.json: No such file"):
        registry.resolve("m")


def test_only_the_models_own_files_are_taken(registry: Registry, source: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "modeling.py", "README.md", "events.tfevents"):
        (source / name).write_bytes(b"x")
    (source / "checkpoint-5").mkdir()
    version = registry.add("m", str(source))
    assert sorted(path.name for path in version.path.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert version.notes == ("left out: modeling.py, pytorch_model.bin, training_args.bin",)


def test_a_model_without_tokenizer_or_template_says_so(registry: Registry, tmp_path: Path) -> None:
    bare = small_models.write_model(tmp_path / "bare", with_tokenizer=False)
    version = registry.add("bare", str(bare))
    assert version.tokenizer_dir is None
    assert version.notes == ("no tokenizer: it serves calls with raw tokens only",)
    small_models.write_json(bare / "tokenizer.json", small_models.tokenizer())
    assert registry.add("bare", str(bare)).notes == ("no chat template: it serves calls with raw tokens only",)


def test_a_chat_template_can_be_given_and_is_brought_to_its_place(registry: Registry, tmp_path: Path) -> None:
    source = small_models.write_model(tmp_path / "source")
    (tmp_path / "mine.jinja").write_text("mine {{ messages }}")
    version = registry.add("m", str(source), chat_template=tmp_path / "mine.jinja")
    assert (version.path / "chat_template.jinja").read_text() == "mine {{ messages }}"
    (source / "tokenizer_config.json").unlink()
    small_models.write_json(source / "chat_template.json", {"chat_template": "from a processor"})
    version = registry.add("m", str(source))
    assert (version.path / "chat_template.jinja").read_text() == "from a processor"
    assert version.notes == ()
    for content, error in ((b"\xff", ModelRefused), (b" \n", ModelRefused), (b"x" * 2**21, ModelRefused)):
        (tmp_path / "bad.jinja").write_bytes(content)
        with pytest.raises(error, match="chat template"):
            registry.add("m", str(source), chat_template=tmp_path / "bad.jinja")
    (tmp_path / "loop.jinja").symlink_to("loop.jinja")
    for name in ("none.jinja", "loop.jinja"):
        with pytest.raises(NotFoundError, match="chat template"):
            registry.add("m", str(source), chat_template=tmp_path / name)
    with pytest.raises(UsageError):
        registry.add("m", str(source), chat_template=tmp_path / "mine.jinja", reference=True)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


REFUSED: list[tuple[Any, type[HarmonyError], str]] = [
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), VerificationError, "never read"),
    (lambda d: truncate(d / "model.safetensors", 4000), VerificationError, "truncated"),
    (lambda d: truncate(d / "model.safetensors", 50), VerificationError, "truncated"),
    (lambda d: (d / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(99)), VerificationError, "pickled"),
    (lambda d: (d / "config.json").write_text("{"), VerificationError, r"config\.json: not valid JSON"),
    (lambda d: (d / "config.json").unlink(), VerificationError, "neither config"),
    (lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"), ModelRefused, "pip install sentencepiece"),
    (lambda d: (d / "tokenizer.json").rename(d / "vocab.json"), ModelRefused, "without tokenizer.json"),
    (lambda d: (d / "tokenizer.json").write_text('{"version": "1.0"}'), VerificationError, "not a tokenizer"),
    (
        lambda d: small_models.write_json(d / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.T", None]}}),
        VerificationError,
        r"tokenizer_config\.json: asks for code",
    ),
    (
        lambda d: small_models.write_json(d / "generation_config.json", {"a": [{"trust_remote_code": True}]}),
        VerificationError,
        r"generation_config\.json: asks for 'trust_remote_code'",
    ),
]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("spoil", "error", "words"), REFUSED)
def test_what_must_not_be_taken_is_refused(
    registry: Registry, source: Path, spoil: Any, error: type[HarmonyError], words: str, reference: bool
) -> None:
    spoil(source)
    with pytest.raises(error, match=words) as caught:
        registry.add("m", str(source), reference=reference)
    assert str(source) in caught.value.message
    assert registry.list() == []
    assert not list(registry.home.staging.iterdir())


def test_a_tokenizer_of_another_model_is_refused(registry: Registry, source: Path) -> None:
    tokenizer = small_models.tokenizer()
    tokenizer["model"]["vocab"]["m"] = 12
    small_models.write_json(source / "tokenizer.json", tokenizer)
    with pytest.raises(ModelRefused, match="token 12 does not fit a model with 12 tokens"):
        registry.add("m", str(source))


def test_an_added_token_without_a_row_in_the_weights_is_noted(registry: Registry, source: Path) -> None:
    pad = {"id": 12, "content": "<pad>", "special": True, "normalized": False}
    pad |= {"single_word": False, "lstrip": False, "rstrip": False}
    small_models.write_json(source / "tokenizer.json", small_models.tokenizer() | {"added_tokens": [pad]})
    assert registry.add("m", str(source)).notes == ("the model does not know the added tokens <pad>",)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere/at/all", "does not exist"),
        ("Org/Model", "adaptive models add model hf:Org/Model"),
        ("", "does not exist"),
        ("gguf:/nowhere.gguf", "there is no file"),
        ("nowhere.gguf", "there is no file"),
        ("package:no_such_package_here", "no installed Python package"),
        ("package:../../etc", "no installed Python package"),
        ("package:json", "should carry one .gguf file: none"),
        ("builtin:other", "builtin:tiny-lm"),
    ],
)
def test_a_source_that_is_not_there_is_not_found(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        registry.add("m", source)
    assert words in str(caught.value)


def test_a_builtin_model_can_be_stored_with_its_settings(registry: Registry) -> None:
    version = registry.add("mine", "builtin:tiny-lm")
    assert version.digest == registry.resolve("builtin:tiny-lm").digest
    assert version.defaults.tokens_to_generate == 64
    assert version.source == "builtin:tiny-lm"


def test_links_within_the_source_are_copied_as_files(registry: Registry, source: Path) -> None:
    (source / "files").mkdir()
    for path in [path for path in source.iterdir() if path.is_file()]:
        path.rename(source / "files" / path.name)
        path.symlink_to(f"files/{path.name}")
    version = registry.add("m", str(source))
    assert not any(path.is_symlink() for path in version.path.iterdir())
    assert version.digest == registry.add("n", str(source), reference=True).digest
    registry.verify("m"), registry.verify("n")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["added_tokens.json", "chat_template.jinja", "config.json", "model.safetensors"])
def test_nothing_outside_the_source_is_read(
    registry: Registry, source: Path, tmp_path: Path, name: str, reference: bool
) -> None:
    outside = tmp_path / "outside"
    if (source / name).exists():
        (source / name).rename(outside)
    else:
        outside.write_text("{}")
    (source / name).symlink_to(outside)
    with pytest.raises(HarmonyError, match=f"{name}: a link that leads out of its directory") as caught:
        registry.add("m", str(source), reference=reference)
    assert caught.value.exit_code in (2, 7)
    assert registry.list() == [] and not list(registry.home.staging.iterdir())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_pipe_among_the_files_is_refused_and_not_waited_for(
    registry: Registry, source: Path, name: str, reference: bool
) -> None:
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(HarmonyError, match=f"{name}: neither a plain file") as caught:
        registry.add("m", str(source), reference=reference)
    assert caught.value.exit_code in (2, 7)


def test_importing_loads_neither_torch_nor_transformers(tmp_path: Path, source: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from harmony_core.home import Home; from harmony_core.registry import Registry\n"
        "registry = Registry(Home.open(sys.argv[1]))\n"
        "registry.add('m', sys.argv[2]); registry.add('t', 'builtin:tiny-lm'); registry.verify('m'); registry.list()\n"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'peft', 'rich') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "home"), str(source)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second filesystem")
def test_across_filesystems_it_is_a_copy(registry: Registry) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        source = small_models.write_model(Path(directory) / "source")
        if os.stat(source).st_dev == registry.home.path.stat().st_dev:
            pytest.skip("one filesystem only")
        version = registry.add("m", str(source))
    assert registry.verify("m").ref == version.ref


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_model_with_another_head_in_its_file_is_refused(registry: Registry, tmp_path: Path, shards: int) -> None:
    source = small_models.write_model(tmp_path / "source", tied=False, shards=shards)
    settings = json.loads((source / "config.json").read_text())
    registry.add("untied", str(source))
    small_models.write_json(source / "config.json", settings | {"tie_word_embeddings": True})
    with pytest.raises(ModelRefused, match=r"'lm_head\.weight' is not the embedding.*tie_word_embeddings"):
        registry.add("tied", str(source))
    files = {path: load_file(path) for path in source.glob("*.safetensors")}
    embedding = next(t["model.embed_tokens.weight"] for t in files.values() if "model.embed_tokens.weight" in t)
    for path, tensors in files.items():
        if "lm_head.weight" in tensors:
            save_file(tensors | {"lm_head.weight": embedding}, path)
    assert registry.add("tied", str(source)).spec.tied
