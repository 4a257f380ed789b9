"""The process that holds torch beside `parity.py`: a model with a scaled head, and what plain transformers makes of it.

Log-probs are computed in float64 from the same weights, one sequence after the other, without a cache.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from beside import Tasks, serve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

HEAD = "lm_head.weight"


class Reference(Tasks):
    """`Tasks`, and two more."""

    def write_with_entropy(
        self, directory: str, shape: dict[str, Any], sequences: list[list[int]], entropy: float
    ) -> dict[str, Any]:
        """Random weights, the head scaled so that the next token has this entropy on average, in nats."""
        self.write_weights(directory, shape)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype).to(self.device)
        with torch.inference_mode():
            logits = torch.cat([model(torch.tensor([ids], device=self.device)).logits[0].float() for ids in sequences])
        low, high = 0.0, 64.0
        while high - low > 1e-3:
            scale = (low + high) / 2
            low, high = (scale, high) if mean_entropy(logits * scale) > entropy else (low, scale)
        index = Path(directory) / next(
            path.name for path in sorted(Path(directory).glob("*.safetensors")) if HEAD in load_file(path)
        )
        tensors = load_file(index)
        tensors[HEAD] = (tensors[HEAD].float() * scale).to(torch.bfloat16)
        save_file(tensors, index, {"format": "pt"})
        del model, logits
        self.empty()
        return {"scale": scale}

    def logprobs(self, directory: str, sequences: list[list[int]]) -> dict[str, Any]:
        """Of every token but the first of each sequence."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).to(self.device)
        found = []
        with torch.inference_mode():
            for ids in sequences:
                row = torch.tensor([ids], device=self.device)
                logprobs = model(row).logits[0, :-1].log_softmax(-1)
                found.append(logprobs.gather(1, row[0, 1:, None])[:, 0].tolist())
        del model
        self.empty()
        return {"logprobs": found}


def mean_entropy(logits: torch.Tensor) -> float:
    """In nats, over rows."""
    logprobs = logits.log_softmax(-1)
    return float(-(logprobs.exp() * logprobs).sum(-1).mean())


if __name__ == "__main__":
    serve(sys.argv[1], Reference)
