"""Decoder layers as the engine calls them: compiled or not, recomputed in the backward pass or not.

torch.compile traces a layer once for any number of tokens, and layers of one shape share what it made; the attention
function, the collectives and an adapter's dropout stay outside. Weights may change in place, adapters come and go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from harmony_core.engine.models import attention
from harmony_core.rpc.rank_channel import progress

RECOMPILE_LIMIT = 4096
"""Variants of one function that are compiled before the rest runs uncompiled, without a word. Each layer is four
functions; a variant is what trains or not, has which adapter, which type, one token or many."""


COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException,)
"""What a compiled layer's first call raises when it cannot be compiled."""


class LayerCall:
    """Takes the place of `forward` in one module. Its inputs are positional tensors and anything by keyword."""

    def __init__(self, module: nn.Module) -> None:
        # The module refers to this object: without a circle a model goes, with its memory, when it is given up.
        self._module = weakref.ref(module)
        self._run: Callable[..., Any] = type(module).forward
        self.recomputed = False
        """Whether the backward pass runs the forward pass again, in place of keeping what it made."""
        module.forward = self

    def compile(self, backend: str) -> None:
        """From now on through torch.compile. What is recomputed stays outside, so a change of it compiles nothing."""
        self._run = torch.compile(self._run, dynamic=True, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        module = self._module()
        if self.recomputed and torch.is_grad_enabled():
            # Nothing draws from torch's random state: dropout draws from the context's seed.
            made = checkpoint(self._run, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        else:
            made = self._run(module, *args, **kwargs)
        progress.made()
        if isinstance(made, torch.Tensor) and made.requires_grad:
            # The backward pass has come to this layer.
            made.register_hook(progress.made)  # type: ignore[no-untyped-call]
        return made


def prepare_compiling() -> None:
    """Set this process up for compiled layers; may be called again."""
    # Past its limit dynamo runs the function uncompiled. The older name serves older versions.
    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, RECOMPILE_LIMIT)
    # It looks at the forward context, which differs from pass to pass.
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))  # type: ignore[no-untyped-call]
