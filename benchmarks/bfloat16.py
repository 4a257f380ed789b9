"""How far plain transformers in bfloat16 is from itself in float32, on a trained model: what rounding alone does.

    python benchmarks/bfloat16.py MODEL_DIRECTORY [--tokens N] [--json FILE]

Log-probs of the next token of a text (this repository's own) and of tokens drawn at temperature 1, head in float32 on
both sides. Sampler and trainer of any engine that rounds activations to bfloat16, and does not round them alike, are
about as far apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from report import ROOT, machine
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def logprobs(directory: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """`[1, T]` -> `[T, V]`."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        return (hidden.float() @ model.get_output_embeddings().weight.float().t()).log_softmax(-1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks/bfloat16.py")
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = "\n\n".join((ROOT / name).read_text() for name in ("README.md", "docs/numerics.md"))
    ids = AutoTokenizer.from_pretrained(options.directory)(text, return_tensors="pt").input_ids[:, : options.tokens]
    exact, rounded = (logprobs(options.directory, ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    entropy = -(exact.exp() * exact).sum(-1)[:-1]
    usual = (entropy > 1) & (entropy < 3)
    drawn = torch.multinomial(exact[:-1].exp(), 1, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, targets in (("text", ids[0, 1:, None]), ("drawn", drawn)):
        apart = (exact[:-1].gather(1, targets) - rounded[:-1].gather(1, targets)).abs()[:, 0]
        row = {"tokens": name, "mean": apart.mean().item(), "largest": apart.max().item()}
        row["mean where the entropy is 1 to 3 nats"] = apart[usual].mean().item()
        rows.append(row)
        print(", ".join(f"{k} {v if isinstance(v, str) else round(v, 4)}" for k, v in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
