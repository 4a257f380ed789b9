"""The same numbers as TRL: its trainers and our handles on one model directory, in float32 on CPU."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import LiveEngine, pair
from harmony_core.client import TrainingModel
from harmony_core.text.threads import StringThread, TokenizedThread
from installed import needs
from tiny_models import build

# TRL and what it brings warn of their own futures.
pytestmark = [pytest.mark.slow, needs("trl"), pytest.mark.filterwarnings("ignore")]

# Marks the trained tokens for TRL; nothing follows the end of a turn, which TRL's DPO would count as completion.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALKS = [
    [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "It is 6.")],
    [("user", "sort: c a b"), ("assistant", "a b c")],
    [("user", "hello"), ("assistant", "Good morning, what can I do for you today?")],
    [("user", "x"), ("assistant", "y")],
]
PAIRS = [
    ("2+2?", "4", "It is 5, or so I was told."),
    ("sort: c a b", "a b c", "c b a"),
    ("hello", "Good morning to you!", "no"),
    ("a long question, is it not?", "Yes.", "Yes and no, as it may be."),
]
STEPS, LR, DECAY, NORM, BETA, KL_BETA = 5, 3e-3, 0.1, 0.5, 0.1, 0.04
CLOSE = {"rel": 1e-5, "abs": 1e-6}


@pytest.fixture(scope="module")
def keys(one_rank: LiveEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random policy and another model to be its reference, known to the registry: directory by key."""
    tokenizer = one_rank.registry.resolve("builtin:tiny-lm").path
    found = {}
    for seed, key in enumerate(("trl-policy", "trl-reference")):
        directory = build(
            tmp_path_factory.mktemp(key), vocab=100, seed=seed, pad_token_id=0, bos_token_id=None, eos_token_id=3
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, directory / name)
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        one_rank.registry.add(key, str(directory))
        found[key] = directory
    return found


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of TRL's trainers: `STEPS` steps, each over all of the data, with our AdamW's settings."""
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "max_grad_norm": NORM,
        **more,
    }


def trained(trainer: Any, folder: Path) -> list[dict[str, float]]:
    """Train to the end, save the model; the log of each step."""
    trainer.train()
    trainer.model.save_pretrained(folder)
    return [line for line in trainer.state.log_history if "grad_norm" in line]


def compare(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], names: dict[str, str]) -> None:
    """`names`: theirs by ours. The logs' numbers are whole floats."""
    assert len(ours) == len(theirs) == STEPS
    for name, other in names.items():
        assert [step[name] for step in ours] == pytest.approx([step[other] for step in theirs], **CLOSE), name


def same_weights(saved: Path, trained: Any, began: Path) -> None:
    """Adam turns the rounding of a gradient near 0 into a step, so what is compared is how far tensors went."""
    ours, theirs, before = (load_file(p / "model.safetensors") for p in (saved, trained, began))
    assert ours.keys() == theirs.keys() == before.keys()
    for name, values in ours.items():
        apart, moved = (values - theirs[name]).norm(), (theirs[name] - before[name]).norm()
        assert moved > 0 and apart <= 1e-4 * moved, name


async def stepped(model: TrainingModel, calls: list[Coroutine[Any, Any, None]]) -> dict[str, float]:
    await asyncio.gather(*calls)
    return await model.optim_step(LR, DECAY, NORM)


def test_sft(one_rank: LiveEngine, keys: dict[str, Path], tmp_path: Path) -> None:
    import datasets
    import trl

    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
    trainer = trl.SFTTrainer(
        loaded(keys["trl-policy"]),
        args=trl.SFTConfig(
            **settings(tmp_path), assistant_only_loss=True, max_length=None, per_device_train_batch_size=len(rows)
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(keys["trl-policy"]),
    )

    async def ours() -> tuple[list[TokenizedThread], list[dict[str, float]], str]:
        model = await one_rank.client.model("trl-policy", kv_cache_len=1024).spawn_train("sft", 512)
        threads = [StringThread(talk).with_weight_all_assistant_turns() for talk in TALKS]
        tokens = [await model.tokenize_thread(thread) for thread in threads]
        steps = [await stepped(model, [model.train_language_modelling(t) for t in threads]) for _ in range(STEPS)]
        saved = await model.save("trl-sft")
        await model.dealloc()
        return tokens, steps, saved

    tokens, steps, saved = one_rank.run(ours())
    for thread, row in zip(tokens, trainer.train_dataset, strict=True):
        weighted = zip(thread.token_ids, thread.token_weights, strict=True)
        assert thread.token_ids == row["input_ids"]
        assert [token if weight else -100 for token, weight in weighted] == row["labels"]
    compare(steps, trained(trainer, tmp_path), {"loss": "loss", "grad_norm": "grad_norm"})
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    same_weights(one_rank.registry.resolve(saved).path, tmp_path, keys["trl-policy"])


def test_dpo(one_rank: LiveEngine, keys: dict[str, Path], tmp_path: Path) -> None:
    import datasets
    import trl

    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for question, better, worse in PAIRS
    ]
    trainer = trl.DPOTrainer(
        loaded(keys["trl-policy"]),
        loaded(keys["trl-reference"]),
        args=trl.DPOConfig(**settings(tmp_path), beta=BETA, max_length=None, per_device_train_batch_size=len(rows)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(keys["trl-policy"]),
    )

    async def ours() -> tuple[list[dict[str, float]], str]:
        reference = await one_rank.client.model("trl-reference", kv_cache_len=1024).spawn_inference("reference")
        model = await one_rank.client.model("trl-policy", kv_cache_len=1024).spawn_train("dpo", 512)
        pairs = [(pair(question, better), pair(question, worse)) for question, better, worse in PAIRS]
        scores = [[await reference.logprobs(thread) for thread in both] for both in pairs]
        ready = list(zip(pairs, scores, strict=True))
        steps = [
            await stepped(model, [model.train_dpo(*both, *known, BETA) for both, known in ready]) for _ in range(STEPS)
        ]
        saved = await model.save("trl-dpo")
        await model.dealloc()
        await reference.dealloc()
        return steps, saved

    steps, saved = one_rank.run(ours())
    same = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "chosen_rewards": "rewards/chosen",
        "rejected_rewards": "rewards/rejected",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
    }
    compare(steps, trained(trainer, tmp_path), same)
    assert 0 < steps[0]["reward_accuracy"] < steps[-1]["reward_accuracy"] <= 1
    same_weights(one_rank.registry.resolve(saved).path, tmp_path, keys["trl-policy"])


@dataclass(frozen=True)
class Variant:
    """One algorithm: the arguments of TRL's configuration, and ours."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    low: float = 0.1
    sequence: bool = False


VARIANTS = {
    "grpo": Variant({"loss_type": "grpo"}, {"normalise": "sequence"}),
    "dapo": Variant({"loss_type": "dapo", "epsilon_high": 0.2}, {"normalise": "token", "clip_range_high": 0.2}),
    "dr_grpo": Variant({"loss_type": "dr_grpo"}, {"normalise": 64}),
    "dual clip": Variant({"loss_type": "dapo", "delta": 1.3}, {"dual_clip": 1.3}),
    # TRL's bound is that of the ratio itself, and it has none below.
    "cispo": Variant({"loss_type": "cispo", "epsilon_high": 1.2}, {"clipping": "cispo", "clip_range_high": 0.2}, low=1),
    "entropy bonus": Variant({"loss_type": "dapo", "entropy_coef": 0.3}, {"entropy_bonus": 0.3}),
    "gspo": Variant(
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"normalise": "sequence"},
        low=0.01,
        sequence=True,
    ),
}


@dataclass(frozen=True)
class Sampled:
    """A completion with numbers that are made up from the model's own log-probs."""

    thread: TokenizedThread
    trajectory: list[float]
    reference: list[float]
    advantage: float

    def taken(self, model: TrainingModel, variant: Variant) -> Coroutine[Any, Any, None]:
        known = self.thread, self.trajectory, self.reference
        if variant.sequence:
            return model.train_gspo(*known, [self.advantage], variant.low, variant.low, KL_BETA, **variant.ours)
        advantages = [self.advantage] * len(self.trajectory)
        return model.train_grpo(*known, advantages, variant.low, KL_BETA, **variant.ours)


async def sampled(model: TrainingModel) -> list[Sampled]:
    found = []
    for number, thread in enumerate([pair(question, answer) for question, *both in PAIRS for answer in both]):
        tokens = await model.tokenize_thread(thread)
        known = await model.logprobs_per_token(tokens)
        trajectory = [x + 0.3 * math.sin(7 * number + t) for t, x in enumerate(known)]
        reference = [x + 0.2 * math.cos(5 * number + t) for t, x in enumerate(known)]
        found.append(Sampled(tokens, trajectory, reference, (-1) ** number * (0.5 + 0.1 * number)))
    return found


def as_batch(data: Sequence[Sampled]) -> dict[str, torch.Tensor]:
    """What TRL's `compute_loss` reads: prompts padded on the left, completions and their numbers on the right."""
    cut = [len(one.thread.token_ids) - len(one.trajectory) for one in data]
    prompts = [torch.tensor(one.thread.token_ids[:at]) for one, at in zip(data, cut, strict=True)]
    answers = [torch.tensor(one.thread.token_ids[at:]) for one, at in zip(data, cut, strict=True)]

    def padded(rows: list[torch.Tensor], side: str = "right") -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_side=side)

    mask = padded([torch.ones_like(row) for row in answers])
    return {
        "prompt_ids": padded(prompts, "left"),
        "prompt_mask": padded([torch.ones_like(row) for row in prompts], "left"),
        "completion_ids": padded(answers),
        "completion_mask": mask,
        "advantages": torch.tensor([one.advantage for one in data]),
        "old_per_token_logps": padded([torch.tensor(one.trajectory) for one in data]),
        "ref_per_token_logps": padded([torch.tensor(one.reference) for one in data]),
        "num_items_in_batch": mask.sum(),
    }


@pytest.fixture(scope="module")
def policy_steps(one_rank: LiveEngine, keys: dict[str, Path]) -> tuple[list[Sampled], dict[str, dict[str, float]]]:
    """The data, and one step of each variant that changes no weight."""

    async def ours() -> tuple[list[Sampled], dict[str, dict[str, float]]]:
        model = await one_rank.client.model("trl-policy", kv_cache_len=1024).spawn_train("policy", 512)
        data, found = await sampled(model), {}
        for name, variant in VARIANTS.items():
            await asyncio.gather(*(one.taken(model, variant) for one in data))
            found[name] = await model.optim_step(0.0, 0.0, 1e9)
        await model.dealloc()
        return data, found

    return one_rank.run(ours())


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_losses(
    name: str,
    policy_steps: tuple[list[Sampled], dict[str, dict[str, float]]],
    keys: dict[str, Path],
    tmp_path: Path,
) -> None:
    import datasets
    import trl

    data, found = policy_steps
    variant = VARIANTS[name]
    # By default TRL multiplies the KL term by the ratio (DeepSeek-V3.2); as published for GRPO, it is left alone.
    kl = {"beta": KL_BETA, "use_bias_correction_kl": False}
    more: dict[str, Any] = {"epsilon": variant.low, **kl, "max_completion_length": 64, **variant.theirs}
    trainer = trl.GRPOTrainer(
        loaded(keys["trl-policy"]),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(**settings(tmp_path, per_device_train_batch_size=8, num_generations=8, **more)),
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}]),
        processing_class=AutoTokenizer.from_pretrained(keys["trl-policy"]),
    )
    trainer.model.eval()  # its losses are then not divided among the micro-batches of a step
    loss = trainer.compute_loss(trainer.model, as_batch(data))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    ours = found[name]
    assert (ours["loss"], ours["grad_norm"]) == pytest.approx((loss.item(), norm.item()), **CLOSE)
    assert 0 < ours["pg_clipfrac"] < 1
