"""The process that holds torch beside the engine: random weights, the device's ceilings, and the peers.

It reads a line of JSON naming a task from the standard input and answers with a line; everything that libraries print
goes to the standard error. torch and transformers are imported at once, so that this takes no time later.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from report import installed
from safetensors.torch import save_file
from torch.nn import functional as F

SPECIAL_ROWS = 3
SHARD_LAYERS = 2
STD = 0.02


class Tasks:
    """What can be asked for. `model`: the peer's, once loaded."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.model: Any = None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any], repeats: int, warm: int = 2) -> float:
        """Median of single calls, by the device's clock where there is one."""
        for _ in range(warm):
            action()
        found = []
        for _ in range(repeats):
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                action()
                end.record()
                torch.cuda.synchronize()
                found.append(float(begin.elapsed_time(end)) / 1000)
            else:
                started = time.perf_counter()
                action()
                found.append(time.perf_counter() - started)
        return statistics.median(found)

    def write_weights(self, directory: str, shape: dict[str, Any]) -> dict[str, Any]:
        """Normal weights of deviation 0.02 and norms of 1, drawn on the device, in shards written side by side."""
        folder = Path(directory)
        names = tensor_shapes(shape)
        groups: dict[str, list[str]] = {}
        for name in names:
            layer = name.split(".")[2] if name.startswith("model.layers.") else ""
            groups.setdefault(f"layers-{int(layer) // SHARD_LAYERS:03d}" if layer else name, []).append(name)
        files = {group: f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i, group in enumerate(groups)}
        index = {name: files[group] for group, members in groups.items() for name in members}
        generator = torch.Generator(self.device).manual_seed(1)

        def tensor(name: str) -> torch.Tensor:
            size = names[name]
            if len(size) == 1:
                return torch.ones(size, dtype=torch.bfloat16)
            made = torch.empty(size, dtype=self.dtype, device=self.device).normal_(0.0, STD, generator=generator)
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                # Not zero: behind a row of zeros every norm multiplies gradients by 300, and deep models overflow.
                made[:SPECIAL_ROWS] *= 0.01
            return made.to(torch.bfloat16).cpu()

        total = 0
        with ThreadPoolExecutor(8) as pool:
            writing = []
            for group, members in groups.items():
                tensors = {name: tensor(name) for name in members}
                total += sum(t.numel() * 2 for t in tensors.values())
                writing.append(pool.submit(save_file, tensors, folder / files[group], {"format": "pt"}))
                if len(writing) > 8:
                    writing[-8].result()
            for future in writing:
                future.result()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8"
        )
        self.empty()
        return {"bytes": total}

    def ceilings(self) -> dict[str, Any]:
        """Bytes read and written per second by a large copy, and FLOP/s of a large product of random matrices."""
        copy, rate = (
            self.copy_rate((4 << 30) if self.cuda else (64 << 20)),
            self.product_rate(8192 if self.cuda else 512),
        )
        self.empty()
        return {
            "ceilings": {"copy_bytes_per_second": copy, "matmul_flop_per_second": rate},
            "device": torch.cuda.get_device_name() if self.cuda else "CPU",
            "versions": {
                "torch": str(torch.__version__),
                "cuda": str(torch.version.cuda),
                **{name: installed(name) for name in ("transformers", "triton", "peft", "trl")},
            },
        }

    def copy_rate(self, count: int) -> float:
        """Of `count` bytes copied within the device."""
        source = torch.empty(count // 2, dtype=torch.bfloat16, device=self.device).normal_()
        target = torch.empty_like(source)
        return 2 * count / self.seconds(lambda: target.copy_(source), 10, 3)

    def product_rate(self, n: int) -> float:
        """Of n×n matrices."""
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b, 10, 3)

    def load(self, directory: str, attention: str = "sdpa") -> dict[str, Any]:
        """The same weights as a plain transformers model."""
        from transformers import AutoModelForCausalLM

        started = time.perf_counter()
        self.unload()
        place = {"device_map": {"": 0}} if self.cuda else {}
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=self.dtype, attn_implementation=attention, **place
        )
        self.model.generation_config.eos_token_id = None
        self.synchronize()
        return {"seconds": time.perf_counter() - started}

    def unload(self) -> dict[str, Any]:
        """Give the peer's memory back."""
        self.model = None
        self.empty()
        return {}

    def empty(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def generate(self, prompts: list[list[int]], new: list[int], cache: str = "dynamic") -> dict[str, Any]:
        """`generate` on one batch of equal prompts, greedy, once for each number of new tokens.

        With a static cache it compiles the model for a CUDA device by itself; that is not counted.
        """
        assert len({len(prompt) for prompt in prompts}) == 1
        self.model.eval()
        ids = torch.tensor(prompts, device=self.device)
        mask = torch.ones_like(ids)
        extra = {"cache_implementation": "static"} if cache == "static" else {}

        def once(count: int) -> float:
            self.synchronize()
            started = time.perf_counter()
            made = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                **extra,
            )
            self.synchronize()
            assert made.shape[1] == ids.shape[1] + count
            return time.perf_counter() - started

        if cache == "static":
            found = [(once(count), once(count))[1] for count in new]
        else:
            once(4)
            found = [once(count) for count in new]
        self.empty()
        return {"seconds": found, "attention": self.model.config._attn_implementation}

    def continuous(self, prompts: list[list[int]], new: list[int]) -> dict[str, Any]:
        """Continuous batching, greedy, once for each number of new tokens, warmed up first."""
        from transformers import GenerationConfig

        self.model.eval()
        known = inspect.signature(self.model.generate_batch).parameters
        extra: dict[str, Any] = {"persistent_manager": True} if "persistent_manager" in known else {}
        if not self.cuda:
            # Unasked, it takes most of the machine's memory.
            from transformers.generation.configuration_utils import ContinuousBatchingConfig

            extra["continuous_batching_config"] = ContinuousBatchingConfig(
                page_size=16, num_blocks=64, max_batch_tokens=128
            )

        def once(count: int) -> float:
            settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
            self.synchronize()
            started = time.perf_counter()
            made = self.model.generate_batch(
                inputs=prompts, generation_config=settings, progress_bar=False, max_new_tokens=count, **extra
            )
            self.synchronize()
            seconds = time.perf_counter() - started
            counts = {len(output.generated_tokens) for output in made.values()}
            if counts != {count} or len(made) != len(prompts):
                raise RuntimeError(f"{len(made)} completions of {sorted(counts)} tokens")
            return seconds

        try:
            once(max(new))
            found = [once(count) for count in new]
        finally:
            destroy = getattr(self.model, "destroy_cached_continuous_batching_manager", None)
            if destroy is not None:
                destroy()
        return {"seconds": found, "attention": self.model.config._attn_implementation}

    def train(
        self, samples: list[list[int]], batch: int, steps: int, checkpointing: bool, lora: int = 0, warm: int = 1
    ) -> dict[str, Any]:
        """Optimizer steps over padded batches: forward with labels, torch's fused AdamW, weights in half precision."""
        model = self.model
        model.train()
        model.config.use_cache = False
        if lora:
            from peft import LoraConfig, get_peft_model

            model.requires_grad_(False)
            model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            if lora:
                self.model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=self.cuda)
        batches = [padded(samples[i : i + batch], self.device) for i in range(0, len(samples), batch)]
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

        def step() -> float:
            self.synchronize()
            started = time.perf_counter()
            for ids, mask, labels in batches:
                model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.synchronize()
            return time.perf_counter() - started

        for _ in range(warm):
            step()
        found = [step() for _ in range(steps)]
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        return {"seconds": found, "peak_bytes": peak}

    def train_trl(self, directory: str, samples: list[list[int]], batch: int, steps: int) -> dict[str, Any]:
        """Steps of TRL's SFT trainer over padded batches, with its own defaults, checkpointing among them.

        It packs with a flash-attention package only. A step takes as many samples as make whole batches.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from transformers import AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        samples = samples[: len(samples) // batch * batch]
        ends: list[float] = []
        tasks = self

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                tasks.synchronize()
                ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder,
                max_steps=steps + 1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=len(samples) // batch,
                learning_rate=1e-6,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                bf16=self.cuda,
                use_cpu=not self.cuda,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = SFTTrainer(
                model=self.model,
                args=config,
                train_dataset=Dataset(
                    InMemoryTable(pa.table({"input_ids": samples * (steps + 1)})), fingerprint="samples"
                ),
                processing_class=AutoTokenizer.from_pretrained(directory),
                callbacks=[Clock()],
            )
            trainer.train()
        seconds = [end - start for start, end in itertools.pairwise(ends)]
        # One pass over as many copies of the samples as there are steps: shuffled, but on average a step is one copy.
        return {"seconds": seconds, "tokens": sum(map(len, samples)) - len(samples), "batch": batch}

    def loss_head(self, directory: str, rows: int, repeats: int) -> dict[str, Any]:
        """The engine's head and a dense one on the same hidden states: seconds, extra bytes, and their difference."""
        from harmony_core.engine.models.heads import linear_logprob_loss
        from harmony_core.engine.models.loading import load_model
        from harmony_core.engine.models.parallel import TensorParallel

        model = load_model(Path(directory), TensorParallel.single(), self.device, self.dtype)
        weight = model.head_weight.detach().requires_grad_(True)
        parameter = next(p for p in model.module.parameters() if p.data_ptr() == weight.data_ptr())
        parameter.requires_grad_(True)
        hidden = torch.randn(rows, weight.shape[1], device=self.device, dtype=self.dtype).requires_grad_(True)
        targets = torch.randint(0, weight.shape[0], (rows,), device=self.device)
        coefficients = torch.full((rows,), 1.0 / rows, device=self.device, dtype=torch.float32)
        # Where training adds gradients up, which is there anyhow.
        sums = torch.zeros_like(weight, dtype=torch.float32)

        def own() -> Any:
            loss, _ = linear_logprob_loss(model, hidden, targets, coefficients, into=sums)
            loss.backward()
            return loss.detach(), hidden.grad, sums

        def dense() -> Any:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach(), hidden.grad, weight.grad

        def clear() -> None:
            hidden.grad = weight.grad = parameter.grad = None

        answer: dict[str, Any] = {}
        results = {}
        for name, action in (("own", own), ("dense", dense)):
            clear()
            results[name] = tuple(t.detach().float().clone() for t in action())
            clear()
            self.empty()
            answer[f"{name}_bytes"] = self._extra_bytes(action)

            def timed(action: Callable[[], Any] = action) -> None:
                clear()
                action()

            answer[f"{name}_seconds"] = self.seconds(timed, repeats)
            clear()
            self.empty()
        answer["differences"] = [
            float((a - b).norm() / b.norm().clamp(min=1e-30))
            for a, b in zip(results["own"], results["dense"], strict=True)
        ]
        answer["gradient_bytes"] = weight.numel() * 4 + hidden.numel() * hidden.element_size()
        return answer

    def _extra_bytes(self, action: Callable[[], Any]) -> int:
        """The most that is allocated during an action beyond what it leaves behind."""
        if not self.cuda:
            action()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        kept = action()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del kept
        return int(extra)


def tensor_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a shape's tensors."""
    d, i, size = shape["hidden"], shape["intermediate"], shape["head_dim"]
    q, kv = shape["heads"] * size, shape["kv_heads"] * size
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab"], d)}
    for layer in range(shape["layers"]):
        at = f"model.layers.{layer}."
        names |= {
            at + "input_layernorm.weight": (d,),
            at + "post_attention_layernorm.weight": (d,),
            at + "self_attn.q_proj.weight": (q, d),
            at + "self_attn.k_proj.weight": (kv, d),
            at + "self_attn.v_proj.weight": (kv, d),
            at + "self_attn.o_proj.weight": (d, q),
            at + "mlp.gate_proj.weight": (i, d),
            at + "mlp.up_proj.weight": (i, d),
            at + "mlp.down_proj.weight": (d, i),
        }
        if shape["model_type"] == "qwen3":
            names |= {at + "self_attn.q_norm.weight": (size,), at + "self_attn.k_norm.weight": (size,)}
    names["model.norm.weight"] = (d,)
    if not shape["tied"]:
        names["lm_head.weight"] = (shape["vocab"], d)
    return names


def padded(samples: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of a batch, padded to its longest sample."""
    width = max(map(len, samples))
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return ids.to(device), mask.to(device), labels.to(device)


def serve(device: str, kind: type[Tasks] = Tasks) -> None:
    """Answer one line after the other until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import transformers

    transformers.logging.set_verbosity_error()
    tasks = kind(device)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(tasks, request["task"])(**request["arguments"])
            text = json.dumps(answer, allow_nan=False)
        except Exception as error:
            traceback.print_exc()
            tasks.empty()
            text = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
        answers.write(text + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
