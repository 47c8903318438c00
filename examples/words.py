"""Train a small language model by its reward. The model and the loop are in this file: copy it.

    python examples/words.py --task addition --optimizer trpo --seed 0 --picture words.png

The model learns from right answers until a quarter of its own are right. From then on, it sees only
the reward of what it writes: 1 for a right answer, 0 for a wrong one. An update has three parts:
write 8 answers to each of 64 prompts, compare the 8 with each other, improve the model.
"""

from collections.abc import Callable
from itertools import count
from math import inf
from pathlib import Path
from time import process_time
from typing import Any, Literal, NamedTuple

import torch
import tyro
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import scaled_dot_product_attention, silu
from tqdm import tqdm, trange

from trpo_optim import TrustRegionOptimizer, mean_kl

TaskName = Literal["addition", "sorting", "multiplication"]
Batch = tuple[Tensor, Tensor, Tensor]  # tokens, old logits and advantages: see evaluate()
OptimizerName = Literal["trpo", "natural", "vanilla", "adamw", "ppo"]
CHARACTERS = "0123456789+* ="  # a digit's token is the digit
LAYERS, WIDTH, HEADS, HIDDEN = 2, 64, 4, 240  # of the model: 127 000 parameters
ROTARY_BASE = 1000  # Llama has 10 000 or more, for longer texts
PROMPTS, COMPLETIONS = 64, 8  # an update sees 8 answers to each of 64 prompts
MAX_KL = 0.01  # radius in nats per character
LR = {"vanilla": 0.3, "adamw": 3e-4, "ppo": 1e-4}  # trpo and natural have a radius instead
PASSES = {"adamw": 1, "ppo": 4}  # over a batch; also the number of minibatches of a pass
EVERY = 5  # updates between two evaluations on held-out prompts
FIGURES = ("reward", "kl", "entropy", "writing", "improving")  # of an update; the last two: CPU s
CLIP = 0.2  # PPO gains nothing from moving a character's probability further than this


def rotated(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of features by the angle of its position: (B, H, T, D) and (T, D / 2)."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Block(nn.Module):
    """A layer of Llama: causal attention with rotary positions, then a gated network (SwiGLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.gated_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key, self.value, self.output = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """Return the features of the next layer, (B, T, WIDTH)."""
        seen = self.attention_norm(x)
        query, key, value = (
            linear(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        query, key = rotated(query, angles), rotated(key, angles)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        seen = self.gated_norm(x)
        result: Tensor = x + self.down(silu(self.gate(seen)) * self.up(seen))
        return result


class Llama(nn.Module):
    """Logits of the next character, (B, T, V), for tokens of shape (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        half = WIDTH // HEADS // 2
        speeds = ROTARY_BASE ** (-torch.arange(half) / half)  # radians per position
        angles = torch.arange(tokens.shape[1])[:, None] * speeds
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles)
        logits: Tensor = self.head(self.norm(x))
        return logits


def number(digits: Tensor) -> Tensor:
    """Return the numbers, (N,), that rows of digits spell, (N, D)."""
    return (digits * 10 ** torch.arange(digits.shape[1]).flip(0)).sum(1)


def spelled(numbers: Tensor, length: int) -> Tensor:
    """Return the last digits of numbers: (N,) to (N, length)."""
    return numbers[:, None] // 10 ** torch.arange(length).flip(0) % 10


class Task(NamedTuple):
    """What to do with random digits. A prompt has a sign after three digits and ends with "="."""

    digits: int
    sign: str
    answer: Callable[[Tensor], Tensor]  # digits, (N, D), to the characters of the answer, (N, T)
    updates: int  # by reward

    def draw(self, count: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return prompts, (count, P), and answers, (count, T); training sees no held-out ones."""
        generator = torch.Generator().manual_seed(2**31)
        digits = torch.randint(10, (512, self.digits), generator=generator)
        if not held_out:
            drawn = torch.randint(10, (2 * count, self.digits))
            digits = drawn[~torch.isin(number(drawn), number(digits))]
        digits = digits[:count]
        sign, equals = (torch.full((count, 1), CHARACTERS.index(each)) for each in (self.sign, "="))
        return torch.cat([digits[:, :3], sign, digits[:, 3:], equals], 1), self.answer(digits)


TASKS: dict[TaskName, Task] = {
    "addition": Task(6, "+", lambda x: spelled(number(x[:, :3]) + number(x[:, 3:]), 4), 30),
    "sorting": Task(6, " ", lambda x: x.sort(1).values, 30),
    "multiplication": Task(4, "*", lambda x: spelled(number(x[:, :3]) * x[:, 3], 4), 30),
}


def policy(model: nn.Module, tokens: Tensor, length: int) -> Categorical:
    """Return the distributions of the last characters: (B, P + T) to (B, T, V)."""
    return Categorical(logits=model(tokens[:, :-1])[:, -length:])


@torch.no_grad()
def complete(model: nn.Module, tokens: Tensor, length: int, *, greedy: bool = False) -> Tensor:
    """Return the prompts with the characters that the model adds: (B, P) to (B, P + T)."""
    for _ in range(length):
        following = Categorical(logits=model(tokens)[:, -1])
        chosen = following.mode if greedy else following.sample()
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    return tokens


def right(tokens: Tensor, answers: Tensor) -> Tensor:
    """Return 1 for each right answer and 0 for each wrong one, (B,)."""
    return (tokens[:, -answers.shape[1] :] == answers).all(1).float()


def pretrained(task: TaskName, seed: int, goal: float, folder: Path) -> Llama:
    """Return a model that learned from examples until it got the share ``goal`` right; cached."""
    torch.manual_seed(seed)
    model, path = Llama(), folder / f"{task}-{goal}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    for batch in (progress := tqdm(count(), f"pretraining on {task}", unit="batch")):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (batch + 1) / 50)  # warm-up
        prompts, answers = TASKS[task].draw(128)
        length = answers.shape[1]
        loss = -policy(model, torch.cat([prompts, answers], 1), length).log_prob(answers).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if batch % 10 == 9:
            prompts, answers = TASKS[task].draw(512)
            share = right(complete(model, prompts, length), answers).mean().item()
            progress.set_postfix_str(f"loss {loss.item():.2f}, right {share:.2f}")
            if share >= goal:
                break
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def evaluate(
    model: nn.Module, tokens: Tensor, logits: Tensor, advantages: Tensor, clip: float = inf
) -> tuple[Tensor, Tensor, Categorical]:
    """Return the loss (with a clip: PPO's), the KL per character, and the new distributions.

    A batch is the prompts with the sampled answers, (B, P + T), the logits of the model that
    sampled them, (B, T, V), and the answers' advantages, (B, 1).
    """
    chosen = tokens[:, -logits.shape[1] :]
    old, new = Categorical(logits=logits), policy(model, tokens, logits.shape[1])
    ratio = (new.log_prob(chosen) - old.log_prob(chosen)).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    mask = torch.ones_like(chosen, dtype=torch.bool)  # False would be padding
    return -gain.mean(), mean_kl(old, new, mask), new


def improve(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, passes: int) -> None:
    """Take one trust-region step, or some passes of AdamW with as many minibatches each."""
    if isinstance(optimizer, TrustRegionOptimizer):
        optimizer.step(lambda: evaluate(model, *batch))  # no zero_grad() and no backward()
        return
    rows = torch.cat([torch.randperm(len(batch[0])) for _ in range(passes)])
    for part in rows.split(len(batch[0]) // passes):
        tokens, logits, advantages = (each[part] for each in batch)
        optimizer.zero_grad()
        evaluate(model, tokens, logits, advantages, CLIP)[0].backward()
        optimizer.step()


def train(
    task: TaskName = "addition",
    optimizer: OptimizerName = "trpo",
    seed: int = 0,
    updates: int | None = None,
    lr: float | None = None,
    max_kl: float = MAX_KL,
    goal: float = 0.25,
    folder: Path = Path("runs/words"),
    **options: Any,  # of the optimizer's class
) -> dict[str, list[float]]:
    """Pretrain one model, train it by reward, return a list per figure: one number per update."""
    model = pretrained(task, seed, goal, folder)
    torch.manual_seed(seed)
    rate = LR.get(optimizer, 1.0) if lr is None else lr  # with a radius, a rate of 1 is right
    stepper: torch.optim.Optimizer
    if optimizer == "adamw" or optimizer == "ppo":
        stepper = torch.optim.AdamW(model.parameters(), rate, weight_decay=0, **options)
    else:
        stepper = TrustRegionOptimizer(
            model.parameters(), mode=optimizer, max_kl=max_kl, lr=rate, **options
        )
    held_out, solutions = TASKS[task].draw(512, held_out=True)
    length, rows, greedy = solutions.shape[1], [], []
    for update in (progress := trange(updates or TASKS[task].updates, desc=f"{task}, {optimizer}")):
        seconds = [process_time()]
        prompts, answers = (x.repeat_interleave(COMPLETIONS, 0) for x in TASKS[task].draw(PROMPTS))
        tokens = complete(model, prompts, length)
        rewards = right(tokens, answers)
        groups = rewards.view(PROMPTS, COMPLETIONS)  # compare an answer with its prompt's others
        advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)
        with torch.no_grad():
            old = policy(model, tokens, length)
        seconds.append(process_time())
        batch = tokens, old.logits, advantages
        improve(model, stepper, batch, PASSES.get(optimizer, 0))
        seconds.append(process_time())
        with torch.no_grad():
            _, kl, _ = evaluate(model, *batch)
        means = rewards.mean().item(), kl.item(), old.entropy().mean().item()
        rows.append([*means, seconds[1] - seconds[0], seconds[2] - seconds[1]])
        if update % EVERY == EVERY - 1:
            guesses = complete(model, held_out, length, greedy=True)
            greedy.append(right(guesses, solutions).mean().item())
        progress.set_postfix_str("reward {:.2f}, KL {:.4f}, entropy {:.2f}".format(*means))
    columns = map(list, zip(*rows, strict=True))
    return dict(zip(FIGURES, columns, strict=True)) | {"greedy": greedy}


def draw(run: dict[str, list[float]], radius: float | None, title: str) -> None:
    """Draw success, KL and entropy against updates."""
    plt.rcParams["font.size"] = 15  # readable on a phone
    _, (top, middle, bottom) = plt.subplots(3, 1, figsize=(6, 9), layout="constrained", sharex=True)
    greedy = range(EVERY, len(run["reward"]) + 1, EVERY)
    top.plot(run["reward"], color="#0072B2", linewidth=2.5, label="mean reward of an update")
    top.plot(greedy, run["greedy"], "o", color="#009E73", label="held-out prompts, greedy")
    middle.plot(run["kl"], "o", color="#0072B2", markersize=4, label="update")
    if radius is not None:
        middle.axhline(radius, color="#D55E00", linestyle="--", label="radius (max_kl)")
    bottom.plot(run["entropy"], color="#0072B2", linewidth=2.5)
    top.set(title=title, ylabel="right answers", ylim=(0, 1))
    middle.set(ylabel="KL per\ncharacter (nats)")
    bottom.set(xlabel="updates", ylabel="entropy per\ncharacter (nats)")
    for axes in (top, middle):
        axes.legend()


def main(
    task: TaskName = "addition",
    optimizer: OptimizerName = "trpo",
    seed: int = 0,
    updates: int | None = None,
    lr: float | None = None,
    max_kl: float = MAX_KL,
    picture: str = "words.png",
) -> None:
    """Train one model and draw the picture."""
    run = train(task, optimizer, seed, updates, lr, max_kl)
    radius = max_kl if optimizer in ("trpo", "natural") else None
    draw(run, radius, f"{task}, {optimizer}, seed {seed}")
    plt.savefig(picture, dpi=120)
    print(f"mean reward over all updates: {sum(run['reward']) / len(run['reward']):.3f}")


if __name__ == "__main__":
    tyro.cli(main)
