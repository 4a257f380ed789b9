"""A causal language model on one rank: the transformers module, this rank's weights, and the engine's calls to it.

Batching, sampling and optimizers are outside of it. torch.compile traces a decoder layer once for any number of tokens,
and layers of one shape share the compiled code; the attention function, the collectives and an adapter's dropout are
not compiled. Weights may change in place, and adapters may be added and removed. Shapes: T tokens of one packed row, d
hidden, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harmony_core.engine.models.context import current_context
from harmony_core.engine.models.layers import Product, set_product
from harmony_core.engine.models.matmul import wide, wide_matmul
from harmony_core.engine.models.parallel import Shard, TensorParallel, full_shape, gather_full, shard_of, sum_gradient
from harmony_core.errors import DataError
from harmony_core.rpc.rank_channel import progress

if TYPE_CHECKING:
    from harmony_core.engine.models.adapters import AdapterInfo

RECOMPILE_LIMIT = 4096
"""Variants of one function that are compiled; further ones run uncompiled, without a warning. Each layer is four
functions; variants differ in training or not, the adapter, the type, and one token or many."""


COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException,)
"""Errors that the first call of a compiled layer raises if it cannot be compiled."""


class LayerCall:
    """Replaces `forward` of one module. Positional arguments are tensors; keyword arguments may be anything."""

    def __init__(self, module: nn.Module) -> None:
        # The module refers to this object. A weak reference avoids a cycle, so a dropped model is freed at once.
        self._module = weakref.ref(module)
        self._run: Callable[..., Any] = type(module).forward
        self.recomputed = False
        """Whether the backward pass recomputes the activations instead of keeping them."""
        module.forward = self

    def compile(self, backend: str) -> None:
        """Use torch.compile from now on. Checkpointing stays outside, so changing `recomputed` recompiles nothing."""
        self._run = torch.compile(self._run, dynamic=True, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        module = self._module()
        if self.recomputed and torch.is_grad_enabled():
            # No layer uses torch's random state: dropout draws from the context's seed.
            made = checkpoint(self._run, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        else:
            made = self._run(module, *args, **kwargs)
        progress.made()
        if isinstance(made, torch.Tensor) and made.requires_grad:
            # Report progress when the backward pass reaches this layer.
            made.register_hook(progress.made)  # type: ignore[no-untyped-call]
        return made


class CausalLM:
    """This rank's share of a model: base weights and any number of adapters on them.

    Create it with `load_model`. Spawns may share base weights; `forward_context` selects the adapter.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        tp: TensorParallel,
        device: torch.device,
        dtype: torch.dtype,
        summed_gradients: frozenset[str],
        stored_config: dict[str, Any] | None = None,
    ) -> None:
        self.module, self.config, self.tp, self.device, self.dtype = module, config, tp, device, dtype
        self.stored_config: dict[str, Any] = config.to_dict() if stored_config is None else stored_config
        """config.json as it was read; a saved model keeps its entries."""
        self.adapters: dict[str, AdapterInfo] = {}
        self.matmul: Product = F.linear
        """Function that applies every weight matrix: (rows, weight, bias) -> rows."""
        self.deterministic = False
        """Whether a token's numbers have the same bits in any batch (`make_deterministic`)."""
        self.row_multiple = 1
        """The head scores multiples of this many rows; above 1 in the deterministic mode."""
        # Read before an adapter wraps a layer, so the names are those of the stored tensors. A tied head is absent.
        self.base_parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self._summed_gradients = summed_gradients
        self._decoder: nn.Module = module.base_model  # type: ignore[assignment]
        self._head: nn.Module | None = module.get_output_embeddings()  # type: ignore[operator]
        self._layers = [LayerCall(layer) for layer in self._decoder.layers]  # type: ignore[union-attr]
        self._final_norm = LayerCall(self._decoder.norm)  # type: ignore[arg-type]
        self._backend: str | None = None
        text = config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.num_layers: int = text.num_hidden_layers
        self.num_kv_heads_local: int = max(1, text.num_key_value_heads // tp.size)
        self.hidden_size: int = text.hidden_size
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.max_positions: int = text.max_position_embeddings

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token ids `[T]` at `positions` `[T]` -> `[T, d]` after the final norm. Call inside `forward_context`."""
        adapter = current_context().adapter
        assert adapter is None or adapter in self.adapters, f"no adapter {adapter!r} on this model"
        if tokens.device.type == "cpu" and tokens.numel():
            # With a split embedding, an unknown token would silently become a row of zeros.
            low, high = torch.aminmax(tokens)
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"token id {int(low if low < 0 else high)} is outside the vocabulary of {self.vocab_size}"
                )
        output = self._decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def use_product(self, product: Product) -> None:
        """Apply every weight matrix with `product` from now on, also those of adapters added later."""
        self.matmul = product
        for layer in self.module.modules():
            if isinstance(layer, nn.Linear):
                set_product(layer, product)

    @property
    def has_vocabulary_head(self) -> bool:
        """False for weights with a scalar head instead: they give scores but no log-probs."""
        return self._head is not None

    @property
    def head_weight(self) -> nn.Parameter:
        """`[V_local, d]`: this rank's rows of the output matrix, given by `vocab_shard`."""
        assert self._head is not None, "these weights have no vocabulary head"
        weight = self._head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def vocab_shard(self) -> Shard:
        """The token ids that this rank's head scores."""
        return shard_of(self.head_weight) or Shard(0, 0, self.vocab_size, self.vocab_size)

    @torch.no_grad()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """`[N, d]` -> `[N, V]`, the full vocabulary, the same on every tensor-parallel rank, without gradient.

        float32, or float64 in a float64 model; never rounded to half precision on CUDA. `out`: tensor for the result.
        """
        if hidden.is_cuda and hidden.dtype != wide(hidden.dtype):
            local = wide_matmul(hidden, self.head_weight.t(), out if self.tp.size == 1 else None)
        else:
            local = self.matmul(hidden, self.head_weight)
            local = local.to(wide(local.dtype))
        if self.tp.size > 1:
            shard = self.vocab_shard
            local = gather_full(local, Shard(1, shard.start, shard.stop, shard.full), self.tp)
        return local if out is None or local is out else out.copy_(local)

    def trainable_parameters(self, adapter: str | None) -> dict[str, nn.Parameter]:
        """The parameters that a trainer of `adapter` (None: of the base weights) updates, by stored name.

        They require gradients from now on. Each is this rank's slice, described by `shard_of`.
        """
        chosen = self.base_parameters if adapter is None else self.adapters[adapter].parameters
        for name, parameter in chosen.items():
            if not parameter.requires_grad:
                parameter.requires_grad_(True)
                if name in self._summed_gradients:
                    sum_gradient(parameter, self.tp)
        return dict(chosen)

    def parameter_bytes(self, adapter: str | None = None) -> int:
        """Bytes of the base weights on this rank, plus those of `adapter` if given."""
        held = list(self.base_parameters.values())
        if adapter is not None:
            held += self.adapters[adapter].parameters.values()
        return sum(parameter.numel() * parameter.element_size() for parameter in held)

    def num_parameters(self) -> int:
        """Elements of the full base model over all ranks."""
        return sum(math.prod(full_shape(parameter)) for parameter in self.base_parameters.values())

    def copy_weights(self) -> CausalLM:
        """A private copy of the base weights, for full training or for a frozen clone. Adapters are not copied."""
        from harmony_core.engine.models.loading import copy_model

        copied = copy_model(self)
        if self._backend is not None:
            copied.compile(self._backend)
        return copied

    @property
    def compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._backend is not None

    def compile(self, backend: str = "inductor") -> None:
        """Run each decoder layer and the final norm through torch.compile from now on. Repeated calls have no effect.

        The first pass of each kind (with gradients, without, an adapter's first) takes as long as compiling one layer:
        the code is shared by all layers and all numbers of tokens above one. Needs a compiler: see `rpc.platform`.
        """
        if self._backend is None:
            # Above the limit, dynamo runs the function uncompiled. Older versions of torch use the older name.
            for limit in ("recompile_limit", "cache_size_limit"):
                for name in (limit, f"accumulated_{limit}"):
                    if hasattr(torch._dynamo.config, name):
                        setattr(torch._dynamo.config, name, RECOMPILE_LIMIT)
            for call in (*self._layers, self._final_norm):
                call.compile(backend)
            self._backend = backend

    def set_checkpointed_layers(self, count: int) -> None:
        """Let the first `count` layers recompute their activations in the backward pass.

        The backward pass must then run inside the same `forward_context`.
        """
        for index, call in enumerate(self._layers):
            call.recomputed = index < count
