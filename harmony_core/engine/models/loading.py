"""Load a model from a directory: config, an empty model of its shape, then each rank's slices from the files.

If a rank holds a slice of a tensor, the full tensor is never built. `weight_files` determines the weight files, as in
the registry; only safetensors files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from harmony_core.engine.models import attention
from harmony_core.engine.models.deterministic import make_deterministic
from harmony_core.engine.models.heads import SCORE, put_scalar_head
from harmony_core.engine.models.layers import fuse_layers, shard_modules
from harmony_core.engine.models.matmul import onednn_is_faster, onednn_linear
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import Shard, TensorParallel, full_shape, set_shard, shard_of
from harmony_core.errors import ModelRefused, VerificationError
from harmony_core.model.weight_files import read_headers
from harmony_core.plain_files import read_json, real_path, refuse_code
from harmony_core.rpc.rank_channel import progress


class CheckpointReader:
    """Named tensors of one directory, opened lazily; a context manager that closes the files.

    `stem` is the file name without suffix: "model", or "adapter_model".
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        self.directory = directory
        self._handles: dict[Path, Any] = {}
        self._tensors = read_headers(directory, stem)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.clear()

    @property
    def names(self) -> frozenset[str]:
        """Names of all stored tensors."""
        return frozenset(self._tensors)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise an error unless the tensor has this full shape."""
        stored = self._tensors[name]
        if stored.shape != shape:
            found, expected = list(stored.shape), list(shape)
            raise VerificationError(f"{self._path(name)}: {name} has shape {found}, the model needs {expected}")

    def read(self, name: str, shard: Shard | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """This rank's slice of a tensor of full `shape`, converted to `dtype`, on the CPU."""
        self.check(name, shape)
        window = [slice(None)] * len(shape)
        if shard is not None:
            window[shard.dim] = slice(shard.start, shard.stop)
        try:
            file = self._open(self._path(name))
            tensor: Tensor = file.get_slice(name)[tuple(window)] if shape else file.get_tensor(name)
        except SafetensorError as error:
            raise VerificationError(f"{self._path(name)}: {name} cannot be read: {error}") from None
        progress.made()
        # A slice of a mapped file must not outlive the mapping, and the optimizer needs it contiguous.
        return tensor.to(dtype, copy=True).contiguous()

    def _path(self, name: str) -> Path:
        return self.directory / self._tensors[name].file

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(str(real_path(path)), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise VerificationError(f"{path} is damaged: {error}") from None
        return self._handles[path]


HEAD = "lm_head.weight"
"""The stored name of a vocabulary head that is not tied."""

Reader = Callable[[str, Shard | None, tuple[int, ...]], Tensor]
"""(name, slice, full shape) -> this rank's values."""


def load_model(
    directory: Path,
    tp: TensorParallel,
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    scalar: bool = False,
) -> CausalLM:
    """Load this rank's slices of the causal language model in `directory`, in `dtype` on `device`.

    No parameter requires a gradient. `deterministic` is for float32 on CPU (see `make_deterministic`). `scalar`: use a
    scalar head, the stored one or else zeros, in place of the vocabulary's. Raises `ModelRefused` for unsupported
    models (remote code, quantised weights, a `tp` that does not fit), `VerificationError` for missing or damaged files.
    """
    config = read_config(directory)
    if deterministic:
        tp = replace(tp, ordered=True)
    module, summed = empty_module(config, tp, dtype, scalar=scalar)
    with CheckpointReader(directory) as stored:
        needed = dict(module.named_parameters())
        new_head = scalar and SCORE not in stored.names
        if new_head:
            del needed[SCORE]
        check_names(needed, tied_names(module) | ({HEAD} if scalar else frozenset()), stored)

        def read(name: str, shard: Shard | None, shape: tuple[int, ...]) -> Tensor:
            if new_head and name == SCORE:
                return torch.zeros(shape, dtype=dtype)
            return stored.read(name, shard, shape, dtype)

        fill(module, config, device, read)
    model = CausalLM(module, config, tp, device, dtype, summed, read_json(directory / "config.json"))
    _choose_products(model, deterministic)
    return model


def copy_model(model: CausalLM) -> CausalLM:
    """A private copy of a model's base weights; adapters are not copied."""
    module, summed = empty_module(model.config, model.tp, model.dtype, scalar=not model.has_vocabulary_head)
    source = model.base_parameters
    fill(module, model.config, model.device, lambda name, shard, shape: source[name].detach().clone())
    copied = CausalLM(module, model.config, model.tp, model.device, model.dtype, summed, model.stored_config)
    _choose_products(copied, model.deterministic)
    return copied


def _choose_products(model: CausalLM, deterministic: bool) -> None:
    if deterministic:
        make_deterministic(model)
    elif onednn_is_faster(model.device, model.dtype):
        model.use_product(onednn_linear)


def read_config(directory: Path) -> Any:
    """The transformers config of a model directory. Never runs code from it."""
    path = directory / "config.json"
    raw = read_json(path)
    refuse_code(path, raw)
    if raw.get("quantization_config"):
        raise ModelRefused(f"{path}: quantised weights are not supported", hint="store the model unquantised")
    try:
        # Use the content read here, so that no other file of the directory is read.
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelRefused(f"{path}: transformers cannot read it: {error}") from None


def empty_module(
    config: Any, tp: TensorParallel, dtype: torch.dtype, *, scalar: bool = False
) -> tuple[nn.Module, frozenset[str]]:
    """Build the transformers model on the meta device, with split layers. Also returns the names of `shard_modules`.

    Otherwise the model is unmodified, except for a `scalar` head.
    """
    try:
        with torch.device("meta"):
            module: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"{getattr(config, 'model_type', '?')}: transformers cannot build it: {error}") from None
    head = module.get_output_embeddings()  # type: ignore[operator]
    softcapped = any(getattr(config, f"{name}_logit_softcapping", None) for name in ("attn", "final"))
    if head is None or head.bias is not None or softcapped:
        raise ModelRefused(f"{type(module).__name__}: only a plain matrix as head and no soft-capping are supported")
    if scalar:
        put_scalar_head(module, config.get_text_config().hidden_size, dtype)
    summed = shard_modules(module, tp)
    _tie(module, config)
    return module.eval(), summed


def fill(module: nn.Module, config: Any, device: torch.device, read: Reader) -> None:
    """Replace every meta parameter and buffer of `module` by real ones on `device`, without gradients."""
    for name, empty in list(module.named_parameters()):
        shard = shard_of(empty)
        values = read(name, shard, full_shape(empty))
        parameter = nn.Parameter(values.to(device), requires_grad=False)
        set_shard(parameter, shard)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
        if device.type == "cuda":
            # Fuse now, so that the memory of this layer's separate matrices is reused for the next layer.
            fuse_layers(module, name)
    _tie(module, config)
    for name, owner_module in module.named_modules():
        empty_buffers = [key for key, buffer in owner_module.named_buffers(recurse=False) if buffer.is_meta]
        if empty_buffers:
            _rebuild_buffers(owner_module, name, empty_buffers, config, device)


def check_names(needed: Collection[str], aliases: frozenset[str], stored: CheckpointReader) -> None:
    """Refuse files that lack a needed tensor, or hold a tensor that would be silently ignored."""
    missing = sorted(set(needed) - stored.names)
    if missing:
        raise VerificationError(f"{stored.directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
    # Files may hold a tied head again, and old files the rotary frequencies.
    surplus = sorted(n for n in stored.names - set(needed) - aliases if not n.endswith("rotary_emb.inv_freq"))
    if surplus:
        raise VerificationError(
            f"{stored.directory}: {len(surplus)} tensors are not part of the model, the first is {surplus[0]}"
        )


def tied_names(module: nn.Module) -> frozenset[str]:
    """Second names of shared parameters, such as the head of a model with tied embeddings."""
    first = {name for name, _ in module.named_parameters()}
    return frozenset(name for name, _ in module.named_parameters(remove_duplicate=False) if name not in first)


def _tie(module: nn.Module, config: Any) -> None:
    head = module.get_output_embeddings()  # type: ignore[operator]
    if head is not None and config.get_text_config().tie_word_embeddings:
        head.weight = module.get_input_embeddings().weight  # type: ignore[operator]


def _rebuild_buffers(module: nn.Module, name: str, buffers: list[str], config: Any, device: torch.device) -> None:
    """Compute buffers that are not stored (rotary frequencies) by building their module again, off the meta device.

    The scale of an embedding is a number stored in its module.
    """
    scale: float | None = getattr(module, "scalar_embed_scale", None)
    if scale is not None and buffers == ["embed_scale"]:
        module.embed_scale = torch.tensor(scale, device=device, dtype=module.weight.dtype)  # type: ignore[arg-type]
        return
    try:
        fresh = type(module)(config=config)
    except TypeError:
        raise ModelRefused(f"{name}: buffers {', '.join(buffers)} cannot be rebuilt") from None
    for key in buffers:
        setattr(module, key, fresh.get_buffer(key).to(device))
