from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harmony_core.errors import NotFoundError
from harmony_core.home import Home
from harmony_core.registry import Registry

TEXTS = ["hello world\n  x", "<|im_start|>user\nAb?<|im_end|>\n", "  a <|im_end|>b", "~!@#$%^&*()_+", "x" * 300, ""]

DIGEST = "94d4bc084aa789f5abccd26836434b1a01de552ccb4f3966a5d51868a1613df3"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.open(tmp_path))


def test_it_is_there_in_an_empty_home(registry: Registry) -> None:
    version = registry.resolve("builtin:tiny-lm")
    assert version.ref == version.key == "builtin:tiny-lm"
    assert registry.resolve("model_registry://builtin:tiny-lm") == version
    assert (version.spec.num_heads, version.spec.num_kv_heads, version.spec.max_positions) == (4, 2, 512)
    assert version.spec.vocab_size % 2 == 0
    assert version.defaults.effective()["tokens_to_generate"] == (64, "builtin:tiny-lm")
    assert version.tokenizer_dir == version.path == version.weights_dir
    assert version.trainable
    assert registry.list() == []


def test_its_bytes_are_the_same_everywhere(registry: Registry) -> None:
    assert registry.resolve("builtin:tiny-lm").digest == DIGEST


def test_another_name_is_not_found(registry: Registry) -> None:
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("builtin:tiny")
    assert caught.value.hint == "there is: builtin:tiny-lm"
    with pytest.raises(NotFoundError):
        registry.resolve("builtin:../tiny-lm")


def test_it_loads_in_plain_transformers(registry: Registry) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    version = registry.resolve("builtin:tiny-lm")
    model = AutoModelForCausalLM.from_pretrained(version.path)
    assert sum(parameter.numel() for parameter in model.parameters()) == version.spec.num_parameters
    tokenizer = AutoTokenizer.from_pretrained(version.path)
    ids = torch.tensor([tokenizer.encode("<|im_start|>user\nabc<|im_end|>\n")])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert 4.0 < loss < 5.5  # near ln(100): it knows nothing yet, and says so
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 3


def test_its_tokenizer_agrees_with_transformers(registry: Registry) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    path = registry.resolve("builtin:tiny-lm").path
    theirs, ours = AutoTokenizer.from_pretrained(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
    assert ours.encode("<|im_start|><|im_end|>").ids == [2, 3]
    assert ours.encode("é\t").ids == [1, 1]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    whole = theirs.apply_chat_template(messages, tokenize=False)
    assert whole == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    prompt = theirs.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_damage_is_repaired(registry: Registry) -> None:
    path = registry.resolve("builtin:tiny-lm").path
    (path / "config.json").write_text("{}")
    assert registry.resolve("builtin:tiny-lm").digest == DIGEST
    (path / "model.safetensors").write_bytes(b"short")
    assert registry.verify("builtin:tiny-lm").digest == DIGEST
    shutil.rmtree(path)
    path.mkdir()
    assert registry.resolve("builtin:tiny-lm").digest == DIGEST


def test_several_processes_may_be_first(tmp_path: Path) -> None:
    code = (
        "import sys; from harmony_core.home import Home; from harmony_core.registry import Registry\n"
        "sys.stdin.readline(); print(Registry(Home.open(sys.argv[1])).verify('builtin:tiny-lm').digest)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [writer.communicate("go\n", timeout=60)[0].strip() for writer in writers] == [DIGEST] * 4
    assert [child.name for child in (tmp_path / "cache" / "builtin").iterdir()] == ["tiny-lm-1"]
