"""The check of a closure's loss against the gradient that its log-probabilities give."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided

__all__ = ["check_loss"]

_ALONE = 0.95
"""The least cosine of a surrogate's gradient with the right one, beside a light entropy bonus."""

_MORE = (
    "The gradient of the loss is not along that of -mean(advantages * log_prob). If the loss has "
    "no heavy bonus or penalty, its ratio is not 1 here: the old log-probabilities are stale, or "
    "another policy drew the actions."
)


def check_loss(subject: ClosureSubject) -> Finding:
    """The loss falls when good actions become more likely, and those alone that count."""
    name = "loss"
    if subject.log_prob is None or subject.advantages is None:
        return undecided(name, "Pass log_prob and advantages to check it.")
    with torch.enable_grad():
        logs, advantages, mask = _checked(subject, subject.log_prob(), subject.advantages)
        sign = 1.0 if subject.maximize else -1.0
        terms = sign * logs * advantages
        values = {
            "right": terms[mask].mean(),
            "of sequences": _mean_of_sequences(terms, mask),
            "broadcast": logs[mask].mean(),  # of a loss whose every ratio meets every advantage
        }
        if not mask.all():
            values["outside"] = terms[~mask].mean()
            values["sequences outside"] = _mean_of_sequences(terms, ~mask)
        slopes = {label: _slope(subject, value) for label, value in values.items()}
        slopes["loss"] = subject.loss_gradient()
    if not (slopes["right"].any() or slopes["of sequences"].any()):
        return undecided(
            name,
            "The advantages give no direction: they are 0, or the same for all actions.",
            "Pass advantages that differ.",
        )
    right = max(
        (slopes["right"], slopes["of sequences"]), key=lambda each: _cosine(slopes["loss"], each)
    )
    cosine, other = (_cosine(slopes["loss"], each) for each in (right, slopes["broadcast"]))
    figures = {"cosine": cosine}
    if "outside" in slopes:
        share = _share(slopes["loss"], right, slopes["outside"], mask)
        figures["weight outside the mask"] = share
        if _is_inverted(slopes):
            return _outside_mask(name, figures, mask)
        diluted = _is_diluted(slopes["loss"], slopes["right"], mask)
        if share > 0.3 or diluted:
            return _beyond_mask(name, figures, mask, diluted=diluted)
    least = max(0.5, abs(other) - 1e-6)
    if cosine > max(least, _ALONE):
        return Finding(name, Verdict.PASSED, figures)
    if cosine > least:
        return Finding(name, Verdict.UNDECIDED, figures, _MORE)
    return _wrong(name, figures, subject, turned=cosine < -least)


def _checked(
    subject: ClosureSubject, logs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, advantages and mask of one shape."""
    every = torch.ones_like(logs, dtype=torch.bool)
    mask = every if subject.mask is None else subject.mask.to(logs.device)
    if mask.shape != logs.shape:
        raise TrustRegionError(
            f"log_prob has shape {tuple(logs.shape)} and the mask {tuple(mask.shape)}. Give the "
            "mask the shape of log_prob."
        )
    if subject.mask is not None and advantages.shape == logs.shape[:1]:
        advantages = advantages.reshape(-1, *[1] * (logs.dim() - 1)).expand(logs.shape)
    if logs.shape != advantages.shape:
        raise TrustRegionError(
            f"log_prob has shape {tuple(logs.shape)} and advantages {tuple(advantages.shape)}: "
            "they broadcast. Make both (N,)."
        )
    return torch.where(mask, logs, logs.nan_to_num(0.0, 0.0, 0.0)), advantages, mask


def _mean_of_sequences(terms: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over sequences of their own means, which weighs tokens by the length."""
    lengths = mask.reshape(len(mask), -1).sum(1)
    sums = terms.masked_fill(~mask, 0).reshape(len(mask), -1).sum(1)
    return (sums / lengths.clamp_min(1))[lengths > 0].mean()


def _slope(subject: ClosureSubject, value: Tensor) -> Tensor:
    return subject.vector.gather(
        torch.autograd.grad(value, subject.vector.parameters, allow_unused=True, retain_graph=True)
    )


def _cosine(left: Tensor, right: Tensor) -> float:
    return float(cosine_similarity(left, right, dim=0))


def _share(loss: Tensor, right: Tensor, outside: Tensor, mask: Tensor) -> float:
    """Return the weight of an element outside the mask, over that of one inside."""
    if abs(_cosine(right, outside)) > 0.999 or not outside.any():
        return 0.0  # they cannot be told apart
    sides = torch.stack([right, outside], 1).double()
    inner, outer = torch.linalg.lstsq(sides, loss.double()[:, None]).solution[:, 0].tolist()
    kept = float(mask.sum())
    return (outer / (mask.numel() - kept)) / (inner / kept) if inner else float("inf")


def _is_inverted(slopes: Mapping[str, Tensor]) -> bool:
    """Return whether the loss is what it should be of the elements that the mask leaves out."""
    same, others = ("outside", "sequences outside"), ("right", "of sequences")
    outside = max(_cosine(slopes["loss"], slopes[each]) for each in same)
    return outside > 0.999 > 0.9 > max(_cosine(slopes["loss"], slopes[each]) for each in others)


def _is_diluted(loss: Tensor, right: Tensor, mask: Tensor) -> bool:
    """Return whether the loss is the right sum, divided by the number of all elements."""
    kept = float(mask.sum()) / mask.numel()
    size = float(loss.norm()) / max(float(right.norm()), 1e-300)
    return _cosine(loss, right) > 0.9999 and abs(size / kept - 1) < min(0.01, (1 - kept) / 2)


def _beyond_mask(name: str, figures: dict[str, float], mask: Tensor, *, diluted: bool) -> Finding:
    left_out = int((~mask).sum())
    return failed(
        name,
        figures,
        f"The loss is averaged over prompt or padding: {left_out} of {mask.numel()} elements that "
        "the mask leaves out "
        + ("are zero, and count in the mean." if diluted else "move its gradient."),
        "Select before the mean and before the exponential: ratio = (new - old)[mask].exp(), then "
        "(ratio * advantages[mask]).mean().",
    )


def _outside_mask(name: str, figures: dict[str, float], mask: Tensor) -> Finding:
    return failed(
        name,
        figures,
        f"The loss is averaged over the {int((~mask).sum())} of {mask.numel()} elements that the "
        "mask leaves out, and over none that count: one of the two masks is inverted.",
        "Let the mask be true for what the policy drew, and false for prompt and padding.",
    )


def _wrong(
    name: str, figures: dict[str, float], subject: ClosureSubject, *, turned: bool
) -> Finding:
    surrogate = "(ratio * advantages).mean()"
    return failed(
        name,
        figures,
        "The loss falls when bad actions become more likely: its sign is wrong."
        if turned
        else "The gradient of the loss has little to do with -mean(advantages * log_prob): shapes "
        "broadcast, or another term outweighs the surrogate.",
        (
            f"Return {surrogate}."
            if subject.maximize
            else f"Return -{surrogate}, or set maximize=True."
        )
        if turned
        else "Give ratio and advantages the shape (N,), and weigh entropy and penalties lightly.",
    )
