"""What is read from a model directory, and what is refused, by name and reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.models.weights import load_into, save_model
from harmony_core.errors import HarmonyError, ModelRefused, VerificationError

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32, tp: TensorParallel | None = None) -> CausalLM:
    return load_model(directory, tp or TensorParallel.single(), CPU, dtype)


def logits(model: CausalLM) -> torch.Tensor:
    with forward_context(ForwardContext(PackedAttention((9,)))), torch.no_grad():
        return model.logits(model.hidden_states(torch.arange(3, 12), torch.arange(9)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_models.build(tmp_path / "model", "qwen3", tied=True, layers=2)


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_layers(directory: Path, count: int) -> None:
    edit_config(directory, num_hidden_layers=count, layer_types=["full_attention"] * count)


def edit_weights(directory: Path, **values: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | values
    path.unlink()
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def test_bfloat16_weights_are_widened_as_they_are_read(tmp_path: Path) -> None:
    path = tiny_models.build(tmp_path / "model", dtype=torch.bfloat16)
    model = load(path)
    assert {p.dtype for p in model.base_parameters.values()} == {torch.float32}
    with torch.no_grad():
        expected = tiny_models.reference(path)(torch.arange(3, 12)[None]).logits[0]
    assert (logits(model) - expected).abs().max() < 1e-5


def test_facts_about_the_model(directory: Path) -> None:
    model = load(directory)
    assert (model.vocab_size, model.num_layers, model.num_kv_heads_local, model.head_dim) == (67, 2, 2, 16)
    assert model.head_weight is model.module.get_input_embeddings().weight and model.vocab_shard.start == 0
    stored = sum(tensor.numel() for tensor in load_file(directory / "model.safetensors").values())
    assert model.num_parameters() == stored
    assert model.parameter_bytes() == 4 * stored
    assert not any(p.requires_grad or p.is_meta for p in model.module.parameters())
    assert not any(b.is_meta for b in model.module.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_no_file_stores_is_as_in_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tiny_models.build(tmp_path / "model", "gemma3_text", tied=True, hidden=48)
    expected = tiny_models.reference(path, dtype)
    found = dict(load(path, dtype).module.named_buffers())
    assert found.keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        # transformers makes the scale in whatever type the model is made in, and casts it when it is used.
        assert torch.equal(found[name].to(dtype), buffer.to(dtype)), name
    tokens = torch.arange(3, 60)
    for rank, count in enumerate((31, 26)):
        tp = TensorParallel(2, rank, None)
        with tp.without_collectives(), torch.no_grad():
            part = load(path, dtype, tp).module.get_input_embeddings()(tokens)  # type: ignore[operator]
            whole = expected.get_input_embeddings()(tokens)
        mine = part.any(-1)
        assert mine.sum() == count and torch.equal(part[mine], whole[mine])


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capped_logits_are_refused(tmp_path: Path, name: str) -> None:
    path = tiny_models.build(tmp_path / "model", "gemma3_text", **{name: 30.0})
    with pytest.raises(ModelRefused, match="soft-capping"):
        load(path)


def test_weights_in_several_files(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harmony_core.engine.models import weights

    monkeypatch.setattr(weights, "FILE_BYTES", 30_000)
    model = load(directory)
    target = tmp_path / "several"
    target.mkdir()
    save_model(model, target, write=True)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(target)), logits(model))
    with torch.no_grad():
        expected = tiny_models.reference(target)(torch.arange(3, 12)[None]).logits[0]
    assert (logits(model) - expected).abs().max() < 1e-5


def test_rank_without_write_writes_nothing(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    save_model(load(directory), target, write=False)
    assert list(target.iterdir()) == []


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def escaping_index(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED: list[tuple[Any, type[HarmonyError], str]] = [
    (truncate, VerificationError, "truncated"),
    (only_pickle, VerificationError, r"never read \(pytorch_model\.bin\)"),
    (escaping_index, VerificationError, "not to a safetensors file here"),
    (lambda d: (d / "config.json").unlink(), VerificationError, "config.json: No such file"),
    (lambda d: (d / "config.json").write_text("[" * 100_000), VerificationError, "config.json: not valid JSON"),
    (lambda d: edit_config(d, auto_map={"AutoModel": "x.Y"}), VerificationError, "never run"),
    (lambda d: edit_config(d, inner={"auto_map": {"AutoModel": "x.Y"}}), VerificationError, "never run"),
    (lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), ModelRefused, "quantised"),
    (lambda d: edit_config(d, model_type="made-up"), ModelRefused, "made-up"),
    (lambda d: edit_config(d, vocab_size=68), VerificationError, r"embed_tokens.weight has shape \[67, 32\]"),
    (lambda d: edit_config(d, num_hidden_layers=3), ModelRefused, "num_hidden_layers"),
    (lambda d: with_layers(d, 3), VerificationError, r"11 tensors are missing, the first is model\.layers\.2\."),
    (lambda d: with_layers(d, 1), VerificationError, r"11 tensors are not part .* first is model\.layers\.1\."),
    (
        lambda d: edit_weights(d, **{"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
        VerificationError,
        "'model.norm.weight' has type I8",
    ),
    (lambda d: edit_weights(d, **{"model.norm.weight": None}), VerificationError, "the first is model.norm.weight"),
]


@pytest.mark.parametrize(("damage", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_directory_that_cannot_be_trusted_is_refused(
    directory: Path, damage: Any, error: type[HarmonyError], message: str
) -> None:
    damage(directory)
    with pytest.raises(error, match=message):
        load(directory)


def test_a_link_out_of_the_directory_is_not_followed(directory: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        outside = tmp_path / name
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)
        with pytest.raises(VerificationError, match=f"{name}: a link that leads out of its directory"):
            load(directory)
        (directory / name).unlink()
        outside.rename(directory / name)
    load(directory)


def test_a_config_is_read_alone(directory: Path) -> None:
    """transformers would look for code, and for an adapter, beside it."""
    (directory / "configuration_x.py").write_text("raise SystemExit")
    (directory / "generation_config.json").write_text("{")
    assert load(directory).num_layers == 2


def test_a_second_copy_of_a_tied_head_is_accepted(directory: Path) -> None:
    expected = logits(load(directory))
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(directory, **{"lm_head.weight": embedding.clone()})
    assert torch.equal(logits(load(directory)), expected)


def test_loading_in_place_changes_nothing_when_a_shape_is_wrong(directory: Path, tmp_path: Path) -> None:
    model = load(directory)
    before = logits(model)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    edit_weights(other, **{"model.norm.weight": torch.zeros(31)})
    with pytest.raises(VerificationError, match=r"model\.norm\.weight has shape"):
        load_into(model, other)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("tp", "works"), [(3, "1, 2, 4"), (8, "1, 2, 4")])
def test_tp_that_does_not_divide_the_heads_is_refused_with_those_that_do(directory: Path, tp: int, works: str) -> None:
    with pytest.raises(ModelRefused, match=f"tp={tp} does not divide.*\n.*work: {works}$"):
        load(directory, tp=TensorParallel(tp, 0, None))


def test_a_layer_style_that_we_do_not_know_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

    plan = {**Qwen3Config.base_model_tp_plan, "layers.*.mlp.up_proj": "diagonal"}
    monkeypatch.setattr(Qwen3Config, "base_model_tp_plan", plan)
    with pytest.raises((ModelRefused, ValueError), match="diagonal"):
        load(directory, tp=TensorParallel(2, 0, None))
