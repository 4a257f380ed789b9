"""Reads models as somebody else would, with whatever transformers and peft are on the path: jobs in, numbers out.

A program of its own, so that a test can run it with an older transformers: JSON on stdin and on stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probs of `ids` after the first; and, of a job with `text`, what its tokenizer makes of it."""
    kind: Any = AutoPeftModelForCausalLM if job.get("adapter") else AutoModelForCausalLM
    model = kind.from_pretrained(job["directory"], dtype=torch.float32).eval()
    ids = torch.tensor([job["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    found = {"logprobs": logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()}
    if "text" not in job:
        return found
    tokenizer: Any = AutoTokenizer.from_pretrained(job["directory"])
    talk = [{"role": "user", "content": job["text"]}]
    generation = transformers.GenerationConfig.from_pretrained(job["directory"])
    return found | {
        "tokens": tokenizer(job["text"], add_special_tokens=False)["input_ids"],
        "prompt": tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True),
        "ends": generation.eos_token_id,
        "special": sorted(tokenizer.all_special_tokens),
    }


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answers = [read(job) for job in json.load(sys.stdin)]
    print(json.dumps({"version": transformers.__version__, "answers": answers}))


if __name__ == "__main__":
    main()
