"""Adapters: low-rank additions to the linear layers of a shared base model (Hu et al., LoRA, 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from harmony_core.rpc.protocol import LoraSettings


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model: its settings, and this rank's parameters by stored name."""

    settings: LoraSettings
    parameters: dict[str, nn.Parameter]
