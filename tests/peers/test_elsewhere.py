"""What we write, read by transformers 4.57 and by the one installed: the same log-probs, tokens and ends of turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import small_gguf
import tiny_models
import tokenizer_directories
from engines import LiveEngine
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.models.weights import save_model
from harmony_core.text.threads import StringThread

pytestmark = pytest.mark.slow

OLD = "4.57.6"
PACKAGES = (f"transformers=={OLD}", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
READER = Path(__file__).parents[1] / "read_elsewhere.py"
IDS = tiny_models.random_tokens([60])[0]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the old libraries, which goes before the installed ones."""
    folder = tmp_path_factory.mktemp("old")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--target", str(folder), *PACKAGES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def read(jobs: Sequence[dict[str, Any]], before: Path | None = None) -> list[dict[str, Any]]:
    """The reader's answers, with what lies in `before` ahead of what is installed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(before)} if before else {})
    command = [sys.executable, str(READER)]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["version"] == OLD) == bool(before)
    return list(found["answers"])


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, **settings}}


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
UPPER = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", rope()),
    "llama tied": ("llama", rope() | {"tied": True}),
    "llama biases": ("llama", rope() | {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", rope() | {"head_dim": 12}),
    "llama linear": ("llama", rope(**LINEAR)),
    "llama llama3": ("llama", rope(**LLAMA3)),
    "llama bfloat16": ("llama", rope() | {"dtype": torch.bfloat16}),
    "mistral": ("mistral", rope()),
    "mistral yarn": ("mistral", rope(**YARN) | {"sliding_window": None}),
    "qwen2": ("qwen2", rope()),
    "qwen2 window": ("qwen2", rope() | UPPER),
    "qwen3 tied": ("qwen3", rope() | {"tied": True}),
    "qwen3 yarn": ("qwen3", rope(**YARN)),
    "gemma3_text": ("gemma3_text", {"rope_parameters": LOCAL, "tied": True}),
}


def older(config: dict[str, Any]) -> dict[str, Any]:
    """A config as the files of 2024 have it."""
    made = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    rope = config["rope_parameters"]
    main = rope.get("full_attention", rope)
    scaling = {k: v for k, v in main.items() if k != "rope_theta"}
    made |= {"rope_theta": main["rope_theta"], "torch_dtype": config["dtype"], "transformers_version": "4.51.0"}
    made["rope_scaling"] = None if main["rope_type"] == "default" else scaling
    if "sliding_attention" in rope:
        made["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return made | {"my_own_key": [1, {"kept": True}]}


def saved(directory: Path, dtype: torch.dtype) -> Path:
    """The model as we read and write it."""
    target = directory.with_name(f"{directory.name}-saved")
    target.mkdir()
    save_model(load_model(directory, TensorParallel.single(), torch.device("cpu"), dtype), target, write=True)
    return target


def test_a_saved_config_means_the_same_to_old_and_new_readers(tmp_path: Path, old: Path) -> None:
    cases = [(name, form) for form in ("new", "old") for name in MODELS]
    jobs = []
    for name, form in cases:
        family, settings = MODELS[name]
        directory = tiny_models.build(tmp_path / f"{name} {form}", family, **settings)
        path = directory / "config.json"
        stored = json.loads(path.read_text())
        if form == "old":
            stored = older(stored)
            path.write_text(json.dumps(stored))
        target = saved(directory, settings.get("dtype", torch.float32))
        made = json.loads((target / "config.json").read_text())
        kept = {key: value for key, value in stored.items() if "rope" not in key and "dtype" not in key}
        assert kept.items() <= made.items(), name
        assert "rope_theta" in made and "rope_parameters" in made and made["dtype"] == made["torch_dtype"]
        jobs += [{"directory": str(directory), "ids": IDS}, {"directory": str(target), "ids": IDS}]
    installed, before = (
        [np.array(answer["logprobs"]).reshape(-1) for answer in read(jobs, folder)] for folder in (None, old)
    )
    wrong = 0
    for index, case in enumerate(cases):
        base, made = 2 * index, 2 * index + 1
        expected = installed[base]
        np.testing.assert_allclose(installed[made], expected, atol=1e-5, err_msg=str(case))
        np.testing.assert_allclose(before[made], expected, atol=1e-4, err_msg=str(case))
        wrong += not np.allclose(before[base], expected, atol=1e-2)
    assert wrong > len(MODELS) // 2, "else this could not tell one form from the other"


def chatml_model(directory: Path, **config: Any) -> Path:
    """A base whose end is another than its template's, as transformers 5 saves one; 20 rows more than tokens."""
    tokenizer = tokenizer_directories.byte_level()
    end = tokenizer.token_to_id("</s>")
    vocab = tokenizer.get_vocab_size() + 20
    tiny_models.build(directory, "qwen3", vocab=vocab, eos_token_id=end, bos_token_id=None, **rope(), **config)
    specials = {"eos_token": "</s>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return tokenizer_directories.write(
        directory, tokenizer_directories.CHATML, specials, tokenizer_class="TokenizersBackend", backend="tokenizers"
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_a_trained_model_reads_and_ends_the_same(
    one_rank: LiveEngine, tmp_path: Path, old: Path, adapter: bool
) -> None:
    key = f"chatml-{int(adapter)}"
    one_rank.registry.add(key, str(chatml_model(tmp_path / "base")))
    if adapter:  # the base was made elsewhere; one that we made can be read by the old library
        key = one_rank.run(resaved(one_rank, key))
    thread = StringThread([("user", "hello"), ("assistant", "good day")])

    async def work() -> tuple[str, list[int], list[float], set[int]]:
        model = await one_rank.client.model(key).with_adapter(adapter).spawn_train("p", 256)
        for _ in range(3):
            await model.train_language_modelling(thread)
            await model.optim_step(1e-2, 0.0, 1.0)
        tokens = (await model.tokenize_thread(thread)).token_ids
        ref, ours = await model.save(f"{key}-sft"), await model.raw_logprobs(tokens)
        ends = set(model._live.stop_ids)
        await model.dealloc()
        return ref, tokens, ours, ends

    ref, tokens, ours, ends = one_rank.run(work())
    assert len(ends) == 2
    version = one_rank.registry.resolve(ref)
    job = {"directory": str(version.path), "adapter": adapter, "ids": tokens, "text": "hello"}
    new, before = (read([job], folder)[0] for folder in (None, old))
    for found in (new, before):
        assert found["logprobs"] == pytest.approx(ours[1:], abs=1e-4)
        assert set(found["ends"]) == ends
        assert found["prompt"].startswith("<|im_start|>user\nhello<|im_end|>")
        assert {"<|im_start|>", "<|im_end|>", "</s>"} <= set(found["special"])
    assert new["tokens"] == before["tokens"]


async def resaved(engine: LiveEngine, key: str) -> str:
    model = await engine.client.model(key).spawn_train("again", 64)
    ref = await model.save(f"{key}-again")
    await model.dealloc()
    return ref


def test_a_converted_model_reads_the_same(one_rank: LiveEngine, tmp_path: Path, old: Path) -> None:
    directory = tiny_models.build(tmp_path / "source", vocab=12, hidden=8, intermediate=16)
    tensors = load_file(directory / "model.safetensors")
    small_gguf.write(tmp_path / "small.gguf", tensors, rope_theta=700000.0)
    version = one_rank.registry.add("converted", str(tmp_path / "small.gguf"))
    ids = [0, 1, 5, 9, 3, 2, 11, 4, 7, 7, 8, 1, 2, 3]

    async def work() -> list[float]:
        model = await one_rank.client.model("converted").spawn_inference("c")
        found = await model.raw_logprobs(ids)
        await model.dealloc()
        return found

    ours = one_rank.run(work())
    settings = json.loads((version.path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    job = {"directory": str(version.path), "ids": ids, "text": "abba"}
    new, before = (read([job], folder)[0] for folder in (None, old))
    for found in (new, before):
        assert found["logprobs"] == pytest.approx(ours[1:], abs=1e-4)
        assert found["tokens"] == new["tokens"] and found["prompt"] == "abba<|endoftext|>" and found["ends"] == 0
