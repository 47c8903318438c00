"""TRL's GRPOTrainer whose optimizer step is one trust-region step per accumulated batch.

Run `python examples/recipes/trl_trainer.py`. A small Qwen2 learns to repeat the first word of its
prompt. After 20 steps of 128 completions, the mean reward was 0.67, 0.60 and 0.59 with seeds 0, 1
and 2 (completions of the last step), from 0.08 at seed 0's first step.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trpo_optim import Closures, TrustRegionOptimizer
from trpo_optim.tokens import token_closures

ONLY: dict[str, Any] = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "use_bias_correction_kl": True,
    "fp16": False,
}
"""TRL's settings that this trainer takes with one value only."""


class TrustRegionGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with another step: rollouts, rewards, advantages, logs, checkpoints are TRL's.

    One step is taken per accumulated batch. The loss is TRL's default, the mean over all tokens of
    the batch, but without the clip. The trust region limits the step instead.

    ``epsilon``, ``learning_rate``, ``weight_decay`` and ``max_grad_norm`` are not used.
    ``lr_scheduler_type`` scales the step. With "constant", all steps have the same radius.

    Args:
        args: What GRPOTrainer takes.
        max_kl: The radius of the trust region, in nats per token.
        old: What is kept of the old policy for the KL; see ``token_closures``.
        settings: What GRPOTrainer takes.

    Raises:
        ValueError: If a setting of TRL's asks for what this trainer does not do.
    """

    def __init__(
        self, *args: Any, max_kl: float = 0.01, old: Any = "log_prob", **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        for name, only in ONLY.items():
            given = getattr(self.args, name)
            if given != only:
                raise ValueError(f"{name} is {given!r}; this trainer needs {only!r}.")
        self.max_kl, self.old = max_kl, old
        self.micro_batches: list[tuple[Any, dict[str, Any]]] = []

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer. TRL calls ``step()``; hooks add the closures and log the report."""
        parameters = [each for each in (model or self.model).parameters() if each.requires_grad]
        ranks = self.accelerator.num_processes > 1
        self.optimizer = TrustRegionOptimizer(
            parameters,
            max_kl=self.max_kl,
            process_group=torch.distributed.group.WORLD if ranks else None,
        )
        self.optimizer.register_step_pre_hook(self.hand_over_closures)
        self.optimizer.register_step_post_hook(self.log_report)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a micro-batch for the step, and return TRL's loss, which also fills its metrics."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.micro_batches.append((model, inputs))
        self._step += 1
        with torch.no_grad():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss

    def hand_over_closures(self, optimizer: Any, *_: Any) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of ``step``: all micro-batches since the last step."""
        micro_batches, self.micro_batches = self.micro_batches, []
        each = [self.closures(*micro_batch) for micro_batch in micro_batches]
        parts = [part for closures in each for part in closures.parts]
        weights = [weight for closures in each for weight in closures.weights or []]
        return (optimizer, Closures(parts, weights)), {}

    def closures(self, model: Any, inputs: dict[str, Any]) -> Closures:
        """Return the closures of a micro-batch. Its weight is its number of tokens.

        Args:
            model: What computes the logits.
            inputs: The micro-batch, as TRL made it.
        """
        tokens, attended = inputs["completion_ids"], inputs["completion_mask"]
        sequences = torch.cat([inputs["prompt_ids"], tokens], 1)
        attention = torch.cat([inputs["prompt_mask"], attended], 1)
        mask = attended * inputs.get("tool_mask", 1)
        if not mask.any():  # TRL masked all completions, so that there is nothing to learn
            return nothing(self.optimizer)
        advantages = inputs["advantages"][:, None] * inputs.get("importance_sampling_ratio", 1.0)

        def logits(rows: Any) -> Tensor:
            pair = sequences[rows], attention[rows]
            told = model(*pair, use_cache=False, logits_to_keep=tokens.shape[1] + 1)
            result: Tensor = told.logits[:, :-1]
            return result

        return token_closures(
            logits,
            tokens,
            mask,
            advantages.expand(tokens.shape),
            behaviour_log_prob=inputs.get("old_per_token_logps"),
            old=self.old,
            temperature=self.temperature,
            reference_log_prob=inputs.get("ref_per_token_logps"),
            reference_weight=self.beta,
        )

    def log_report(self, optimizer: Any, *_: Any) -> None:
        """Add the report to TRL's metrics."""
        for name, value in optimizer.last_report.as_dict().items():
            self._metrics["train"][f"trust_region/{name}"].append(value)


def nothing(optimizer: Any) -> Closures:
    """Return a closure that leaves every parameter where it is."""

    def closure() -> tuple[Tensor, Tensor]:
        groups = optimizer.param_groups
        zero = sum(each.float().sum() for group in groups for each in group["params"]) * 0.0
        return zero, zero

    return Closures([closure], [1.0])


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return the share of words that are the prompt's first word."""
    return [
        sum(word == prompt.split()[0] for word in completion.split()) / 4
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


WORDS = ["red", "green", "blue", "black", "white"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words."""
    vocabulary = {word: index for index, word in enumerate(["<end>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
    )


def make_model(vocabulary: int) -> Qwen2ForCausalLM:
    """Return a small Qwen2 with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **sizes, **heads))


def main(seed: int = 0, updates: int = 20) -> float:
    """Train a small model to repeat the first word of its prompt.

    Args:
        seed: Of weights, prompts and completions.
        updates: Trust-region steps of 128 completions.

    Returns:
        The mean reward of the last rollout.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    rows = torch.randint(len(WORDS), (1024, 3)).tolist()
    prompts = [" ".join(WORDS[word] for word in row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            seed=seed,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=2,
            max_completion_length=4,
            max_steps=updates,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = TrustRegionGRPOTrainer(
            make_model(len(tokenizer)),
            reward,
            settings,
            Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            max_kl=0.05,
        )
        trainer.train()
    return float([row["reward"] for row in trainer.state.log_history if "reward" in row][-1])


if __name__ == "__main__":
    print(f"Mean reward of the last rollout: {main():.2f}")
