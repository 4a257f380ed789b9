from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import (
    ConflictError,
    HarmonyError,
    ModelRefused,
    NotFoundError,
    ResourceError,
    UsageError,
    VerificationError,
)
from harmony_core.home import Home
from harmony_core.registry import ModelVersion, Registry
from harmony_core.registry.records import SMALL_BYTES


def publish(registry: Registry, key: str, seed: int = 0, **options: Any) -> ModelVersion:
    with registry.stage() as staging:
        small_models.write_model(staging.directory, seed=seed)
        return staging.publish(key, **options)


def test_a_saved_version_is_whole_and_named_exactly(registry: Registry) -> None:
    first = publish(registry, "team/tiny", run_id="run-1", step=40, parent=registry.resolve("builtin:tiny-lm"))
    second = publish(registry, "team/tiny", seed=1)
    assert (first.ref, second.ref) == ("team/tiny@1", "team/tiny@2")
    assert first.digest != second.digest
    assert (first.run_id, first.step, first.parent, first.format) == ("run-1", 40, "builtin:tiny-lm", "hf")
    assert first.path == registry.home.models / "team" / "tiny" / "v000001"
    assert (first.path / "config.json").is_file()
    assert registry.resolve("team/tiny") == second
    assert registry.resolve("model_registry://team/tiny@1").digest == first.digest
    assert registry.verify("team/tiny@1").digest == first.digest
    assert not list(registry.home.staging.iterdir())


def test_equal_bytes_have_equal_digests(registry: Registry) -> None:
    assert publish(registry, "a").digest == publish(registry, "b").digest


def test_a_save_without_tokenizer_takes_its_parents(registry: Registry) -> None:
    publish(registry, "parent")
    parent = registry.set_defaults("parent", {"tokens_to_generate": 33, "tp": 2})
    with registry.stage() as staging:
        small_models.write_model(staging.directory, with_tokenizer=False)
        child = staging.publish("child", parent=parent)
    assert child.tokenizer_dir == child.path
    assert (child.path / "tokenizer.json").read_bytes() == (parent.path / "tokenizer.json").read_bytes()
    assert (child.path / "tokenizer_config.json").is_file()
    assert (child.defaults.tokens_to_generate, child.defaults.tp) == (33, 2)
    assert child.notes == ()


def test_a_later_save_leaves_the_settings_alone(registry: Registry) -> None:
    publish(registry, "a")
    registry.set_defaults("a", {"tp": 4})
    assert publish(registry, "a", parent=registry.resolve("builtin:tiny-lm")).defaults.effective() == {
        "tp": (4, "stored with a"),
        "kv_cache_len": (None, "library default"),
        "tokens_to_generate": (2048, "library default"),
    }


def test_leaving_without_publishing_leaves_nothing(registry: Registry) -> None:
    with pytest.raises(RuntimeError), registry.stage() as staging:
        small_models.write_model(staging.directory)
        raise RuntimeError
    assert registry.list() == []
    assert not list(registry.home.staging.iterdir())


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda d: (d / "model.safetensors").unlink(), VerificationError),
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), VerificationError),
        (lambda d: (d / "optimizer.pt").write_bytes(b"x"), VerificationError),
        (lambda d: (d / "link.json").symlink_to("/etc/passwd"), VerificationError),
        (lambda d: (d / "sub").symlink_to("/etc"), VerificationError),
        (lambda d: os.mkfifo(d / "pipe"), VerificationError),
        (lambda d: (d / "config.json").unlink(), VerificationError),
        (lambda d: (d / "tokenizer.json").write_text("{}"), VerificationError),
        (lambda d: small_models.write_json(d / "extra.json", {"auto_map": {"A": "b"}}), VerificationError),
        (lambda d: os.truncate(d / "model.safetensors", 2000), VerificationError),
        (lambda d: small_models.write_json(d / "config.json", {"model_type": "gpt2"}), ModelRefused),
    ],
)
def test_what_would_be_damaged_is_not_published(registry: Registry, spoil: Any, error: type[HarmonyError]) -> None:
    with registry.stage() as staging:
        spoil(small_models.write_model(staging.directory))
        with pytest.raises(error):
            staging.publish("a")
    assert registry.versions("a") == []
    assert not list(registry.home.staging.iterdir())


def test_other_files_and_folders_travel_with_a_version(registry: Registry) -> None:
    with registry.stage() as staging:
        small_models.write_model(staging.directory)
        (staging.directory / "optimizer").mkdir()
        small_models.write_safetensors(staging.directory / "optimizer" / "state.safetensors", {"m": (3,)})
        version = staging.publish("a")
    os.truncate(version.path / "optimizer" / "state.safetensors", 10)
    with pytest.raises(VerificationError, match=r"state\.safetensors"):
        registry.resolve("a")


def test_files_are_readable_as_the_umask_says(registry: Registry) -> None:
    before = os.umask(0o027)
    try:
        with registry.stage() as staging:
            small_models.write_model(staging.directory)
            (staging.directory / "model.safetensors").chmod(0o600)
            version = staging.publish("a")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in version.path.iterdir()} == {0o640}


def test_unknown_names_get_the_nearest(registry: Registry) -> None:
    publish(registry, "smollm2")
    for ref, hint in (
        ("smolm2", "did you mean smollm2?"),
        ("smollm2@3", "versions: 1"),
        ("org/name", "adaptive models add name hf:org/name"),
        ("Org/Some-Name", "adaptive models add some-name hf:Org/Some-Name"),
        ("./dir", "a path is added first"),
        ("smollm2@best", ""),
    ):
        with pytest.raises(NotFoundError) as caught:
            registry.resolve(ref)
        assert hint in caught.value.hint


def test_keys_below_keys_are_keys_of_their_own(registry: Registry) -> None:
    publish(registry, "a")
    publish(registry, "a/b")
    publish(registry, "a/b/c/d")
    assert [entry.key for entry in registry.list()] == ["a", "a/b", "a/b/c/d"]
    assert registry.remove("a/b") == ["a/b@1"]
    assert [entry.key for entry in registry.list()] == ["a", "a/b/c/d"]
    registry.remove("a/b/c/d")
    assert sorted(path.name for path in (registry.home.models / "a").iterdir()) == ["model.json", "v000001"]
    registry.remove("a")
    assert list(registry.home.models.iterdir()) == []


def test_a_home_can_be_moved(registry: Registry, tmp_path: Path) -> None:
    digest = publish(registry, "a").digest
    os.rename(registry.home.path, tmp_path / "elsewhere")
    assert Registry(Home.open(tmp_path / "elsewhere")).verify("a").digest == digest


# --- damage


def test_every_change_is_found(registry: Registry) -> None:
    version = publish(registry, "a")
    weights = version.path / "model.safetensors"
    whole = weights.read_bytes()
    for position in (0, 8, 300, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(VerificationError, match=r"model.safetensors"):
            registry.verify("a")
    weights.write_bytes(whole)
    registry.verify("a")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        path = version.path / name
        content = path.read_bytes()
        for spoiled in (content[:-1], content + b" ", b"", content[:1] + b" " + content[2:]):
            path.write_bytes(spoiled)
            with pytest.raises(VerificationError, match=name):
                registry.resolve("a")
        path.unlink()
        with pytest.raises(VerificationError, match=name):
            registry.resolve("a")
        path.write_bytes(content)
    registry.verify("a")


def test_a_spoiled_manifest_is_found(registry: Registry) -> None:
    version = publish(registry, "a")
    path = version.path / "manifest.json"
    good = json.loads(path.read_text())

    def refuse(text: str, reason: str) -> None:
        path.write_text(text)
        with pytest.raises(VerificationError, match=reason):
            registry.resolve("a")

    refuse("", "not a manifest")
    refuse("[" * 10**5, "not a manifest")
    refuse(json.dumps(good | {"manifest": 2}), "newer version")
    refuse(json.dumps(good | {"key": "b"}), "was published as 'b'")
    refuse(json.dumps(good | {"digest": "0" * 64}), "digest does not belong")
    refuse(json.dumps(good | {"format": "gguf"}), "unknown format")
    refuse(json.dumps(good | {"files": []}), "no files")
    outside = [{"path": "../../x", "size": 1, "sha256": ""}]
    refuse(json.dumps(good | {"files": good["files"] + outside}), "leads elsewhere")
    path.unlink()
    with pytest.raises(VerificationError, match=r"manifest\.json"):
        registry.resolve("a")


def test_swapped_versions_are_found(registry: Registry) -> None:
    one, two = publish(registry, "a").path, publish(registry, "b", seed=1).path
    os.rename(one, one.with_name("x"))
    os.rename(two, one)
    os.rename(one.with_name("x"), two)
    for key in "ab":
        with pytest.raises(VerificationError, match="was published as"):
            registry.resolve(key)


def test_a_damaged_newest_version_is_said_with_the_others(registry: Registry) -> None:
    publish(registry, "a")
    (publish(registry, "a").path / "config.json").write_text("{}")
    with pytest.raises(VerificationError) as caught:
        registry.resolve("a")
    assert "other versions: a@1" in caught.value.hint
    entry = registry.list()[0]
    assert entry.newest is None
    assert "config.json" in entry.problem
    assert registry.remove("a@2") == ["a@2"]
    assert registry.resolve("a").ref == "a@1"


def test_a_damaged_model_json_costs_no_save(registry: Registry) -> None:
    publish(registry, "a")
    (registry.home.models / "a" / "model.json").write_text("garbage")
    with pytest.raises(VerificationError, match=r"model\.json"):
        publish(registry, "a", seed=1)
    assert registry.versions("a") == [1, 2]
    (registry.home.models / "a" / "model.json").unlink()
    assert registry.verify("a").ref == "a@2"


def test_links_are_neither_read_nor_deleted(registry: Registry, tmp_path: Path) -> None:
    version = publish(registry, "a")
    outside = tmp_path / "outside"
    shutil.move(version.path, outside)
    version.path.symlink_to(outside)
    (registry.home.models / "b").symlink_to(registry.home.models / "a")
    for action in (lambda: registry.resolve("a"), lambda: registry.remove("a@1"), lambda: registry.remove("b@1")):
        with pytest.raises(VerificationError, match="symbolic link"):
            action()
    with pytest.raises(VerificationError, match="symbolic link"):
        publish(registry, "b")
    assert (outside / "config.json").is_file()
    assert [entry.key for entry in registry.list()] == ["a"]


def test_quick_trusts_large_files_unchanged_since_they_were_added(registry: Registry) -> None:
    path = registry.add("m", "builtin:tiny-lm").path / "model.safetensors"
    assert path.stat().st_size > SMALL_BYTES
    written = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(path, ns=(written, written))
    assert registry.verify("m", quick=True).ref == "m@1"  # what times cannot show
    with pytest.raises(VerificationError, match="content differs"):
        registry.verify("m")
    os.utime(path)
    with pytest.raises(VerificationError, match="content differs"):
        registry.verify("m", quick=True)


# --- settings and aliases


def test_settings_are_typed(registry: Registry) -> None:
    publish(registry, "a")
    version = registry.set_defaults("a", {"tp": 2, "kv_cache_len": 4096, "description": "x", "trainable": False})
    assert (version.defaults.tp, version.defaults.kv_cache_len, version.trainable) == (2, 4096, False)
    assert registry.list()[0].description == "x"
    refused: list[tuple[dict[str, object], str]] = [
        ({"kv_cache_length": 1}, "did you mean kv_cache_len?"),
        ({"tp": 3}, "tp may be 1, 2, 4"),
        ({"tp": 0}, "whole number"),
        ({"tp": True}, "whole number"),
        ({"tokens_to_generate": "64"}, "whole number"),
        ({"tokens_to_generate": 2**31}, "whole number"),
        ({"trainable": "no"}, "true or false"),
        ({"description": 3}, "description"),
        ({"kv_cache_len": 1, "nonsense": 2}, "there is"),
    ]
    for values, words in refused:
        with pytest.raises(UsageError) as caught:
            registry.set_defaults("a", values)
        assert words in str(caught.value)
    assert registry.resolve("a").defaults.kv_cache_len == 4096
    assert registry.set_defaults("a", {"tp": None, "kv_cache_len": None}).defaults.effective()["tp"][0] == 1
    with pytest.raises(UsageError, match="generated"):
        registry.set_defaults("builtin:tiny-lm", {"tp": 2})


def test_aliases_move_and_protect(registry: Registry) -> None:
    publish(registry, "a")
    publish(registry, "a")
    registry.set_alias("a", "best", 1)
    assert registry.resolve("a@best").ref == "a@1"
    with pytest.raises(ConflictError, match="has the alias 'best'"):
        registry.remove("a@1")
    registry.set_alias("a", "best", 2)
    assert registry.resolve("a@best").ref == "a@2"
    assert registry.remove("a@1") == ["a@1"]
    with pytest.raises(NotFoundError, match="no version 7"):
        registry.set_alias("a", "best", 7)
    registry.set_alias("a", "best", None)
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("a@best")
    assert "no alias" in caught.value.message


# --- removal


def test_a_number_is_never_given_twice(registry: Registry) -> None:
    publish(registry, "a")
    publish(registry, "a")
    registry.remove("a@2")
    assert publish(registry, "a").ref == "a@3"


def test_several_versions_go_only_when_asked(registry: Registry) -> None:
    publish(registry, "a")
    publish(registry, "a")
    with pytest.raises(ConflictError, match="2 versions") as caught:
        registry.remove("a")
    assert "--all" in caught.value.hint
    assert registry.remove("a", every=True) == ["a@1", "a@2"]
    with pytest.raises(NotFoundError):
        registry.resolve("a")
    assert not list(registry.home.trash.iterdir())


def test_a_base_stays_while_an_adapter_needs_it(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "a")
    registry.add("lora", str(small_models.write_adapter(tmp_path / "adapter")), base="a")
    with pytest.raises(ConflictError, match="still the base of lora@1"):
        registry.remove("a")
    registry.remove("lora")
    registry.remove("a")


def test_a_version_in_use_stays(registry: Registry, tmp_path: Path) -> None:
    publish(registry, "a")
    lora = registry.add("lora", str(small_models.write_adapter(tmp_path / "adapter")), base="a")
    other = Registry(Home.open(registry.home.path))
    held = registry.hold(lora)
    with held, pytest.raises(ConflictError, match=rf"used by a running process \(pid {os.getpid()}\)"):
        other.remove("lora")
    other.remove("lora")
    with registry.hold(registry.resolve("a")), pytest.raises(ConflictError, match="used by"):
        other.remove("a")
    other.remove("a")


def test_a_full_disk_is_said_before_writing(registry: Registry) -> None:
    reason = r"a model needs .* GiB, and the disk of .* has .* GiB free"
    with pytest.raises(ResourceError, match=reason), registry.stage(expected_bytes=2**60):
        pass
    assert not list(registry.home.staging.iterdir())


PLANTED: list[tuple[Any, bool]] = [
    (lambda d: (d / "notes.txt").write_text("x"), False),
    (lambda d: (d / "added_tokens.json").write_text("{}"), True),
    (lambda d: (d / "chat_template.jinja").write_text("other"), True),
    (lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(b"x"), True),
    (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'), True),
    (lambda d: (d / "adapter_config.json").write_text("{}"), True),
    (lambda d: (d / "notes.txt").symlink_to("/etc/passwd"), True),
    (lambda d: (d / "special_tokens_map.json").symlink_to("tokenizer_config.json"), True),
]


@pytest.mark.parametrize(("plant", "is_read"), PLANTED, ids=range(len(PLANTED)))
def test_a_file_that_was_not_recorded_is_found(registry: Registry, source: Path, plant: Any, is_read: bool) -> None:
    """`verify` names every one; one that would be read, or a link, is refused wherever the version is used."""
    version = registry.add("m", str(source))
    plant(version.path)
    with pytest.raises(VerificationError) as caught:
        registry.verify("m")
    assert str(version.path) in caught.value.message
    if is_read:
        with pytest.raises(VerificationError):
            registry.resolve("m")
    else:
        assert registry.resolve("m").digest == version.digest


def test_a_file_that_was_not_recorded_is_found_where_a_version_was_left(registry: Registry, source: Path) -> None:
    registry.add("m", str(source), reference=True)
    (source / "notes.txt").write_text("their own")
    registry.verify("m")
    for name in ("added_tokens.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    with pytest.raises(VerificationError, match=r"added_tokens\.json: is not in manifest\.json \(chat_template\.jinja"):
        registry.resolve("m")


def test_the_location_is_what_was_added(registry: Registry, source: Path, tmp_path: Path) -> None:
    registry.add("m", str(source), reference=True)
    record = registry.directory("m", 1) / "manifest.json"
    written = json.loads(record.read_text())
    twin = tmp_path / "twin"
    shutil.copytree(source, twin)
    (tmp_path / "link").symlink_to(source)
    for elsewhere in (twin, tmp_path / "link", Path("../source"), source / ".." / "source"):
        record.write_text(json.dumps(written | {"location": str(elsewhere)}))
        with pytest.raises(VerificationError, match="is not what was added"):
            registry.resolve("m")
    record.write_text(json.dumps(written))
    source.rename(tmp_path / "moved")
    source.symlink_to(tmp_path / "moved")
    with pytest.raises(VerificationError, match="is not what was added"):
        registry.resolve("m")


def test_the_digest_is_of_all_weights_whatever_their_names(registry: Registry, tmp_path: Path) -> None:
    digests = set()
    for seed in (1, 2):
        source = small_models.write_model(tmp_path / str(seed), seed=seed)
        (source / "model.safetensors").rename(source / "other.safetensors")
        places = dict.fromkeys(small_models.shapes(), "other.safetensors")
        small_models.write_json(source / "model.safetensors.index.json", {"weight_map": places})
        digests.add(registry.add("m", str(source)).digest)
    assert len(digests) == 2
