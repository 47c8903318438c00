"""Checks of the distribution itself: shapes, density, sampler, entropy, KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from trpo_optim.distributions.parts import leaves
from trpo_optim.testing.averages import average, sigmas
from trpo_optim.testing.directions import direction
from trpo_optim.testing.findings import Finding, Verdict, failed, undecided
from trpo_optim.testing.reference import Reference, rows_of
from trpo_optim.testing.subject import Subject

__all__ = ["check_density", "check_entropy", "check_kl", "check_sampler", "check_shapes", "on_edge"]

_SLACK = 0.002
"""What rounding and proposals may put between two averages beyond noise, relative."""

_LOST = 1e-4
"""Share of actions on the support's edge that averages do not miss."""

_UNSEEN = 5.0
"""How many times that share of the density an integral may miss there."""

_LOOKED_AT = 16
"""Actions per row that are looked at for NaN."""

_NO_PROPOSAL = "No proposal fits the density well enough to integrate by it."


def check_shapes(subject: Subject) -> Finding:
    """There is one log-probability per observation."""
    name = "one action per row"
    found_in = subject.dist()
    found = leaves(found_in)
    shapes = [tuple(leaf.batch_shape) for leaf in found]
    figures = {"rows": float(subject.rows)}
    for leaf, shape in zip(found, shapes, strict=True):
        family = type(leaf).__name__
        if not shape or shape[0] != subject.rows:
            return failed(
                name,
                figures,
                f"{family} has batch shape {shape}, and there are {subject.rows} observations.",
                "Return one distribution per observation, the batch first.",
            )
        if not leaf.event_shape and len(shape) > 1 and not _is_joint(leaf, found_in):
            return failed(
                name,
                figures,
                f"{family} has batch shape {shape} and no event shape, so that log_prob gives "
                f"{math.prod(shape[1:])} numbers per observation, which broadcast against "
                "advantages, and a KL averaged over them is too small.",
                "Wrap it in Independent(dist, 1)."
                + (" Or squeeze its last dimension." if shape[1:] == (1,) else ""),
            )
    value = subject.log_prob(subject.old)
    if value.shape != (subject.rows,):
        return failed(
            name,
            figures,
            f"log_prob of one action per observation has shape {tuple(value.shape)}.",
            f"It must be ({subject.rows},).",
        )
    sequences = [shape for leaf, shape in zip(found, shapes, strict=True) if not leaf.event_shape]
    told = "".join(
        f"A row of {shape[1:]} actions, such as tokens, is checked as one. Give the closure's "
        "mean_kl a mask of the shape of the batch, or wrap the policy's distribution in "
        "Independent."
        for shape in sequences[:1]
        if len(shape) > 1
    )
    return Finding(name, Verdict.PASSED, figures, told)


def _is_joint(leaf: Distribution, policy: Any) -> bool:
    """Return whether dimensions beyond the first are known to belong to a row."""
    of_named = isinstance(policy, Distribution) and isinstance(policy, Mapping)
    return of_named or isinstance(leaf, Categorical)  # of tokens; other numbers are dimensions


def check_density(subject: Subject) -> Finding:
    """exp(log_prob) integrates, or sums, to one."""
    name = "density"
    figures = dict[str, float]()
    for leaf, each in zip(subject.joint_leaves(subject.old), subject.references, strict=True):
        lost = each.lost if each.lost > _LOST else 0.0
        if not each.decided:
            told = f"{type(leaf).__name__} has no density on all of its support."
            return undecided(name, on_edge(lost) if lost else told)
        core, core_noise = _mass(each.weights * each.inside)
        total, noise = _mass(each.weights)
        figures = {"integral": total, "noise": noise}
        if core > 1 + sigmas(2) * core_noise + _SLACK:
            figures["integral"], noise = core, core_noise  # of a part already
        elif not (noise <= 0.05 and each.serves):
            return undecided(name, on_edge(lost) if lost else _NO_PROPOSAL)
        if abs(figures["integral"] - 1) > sigmas(2) * noise + _SLACK + _UNSEEN * lost:
            return failed(
                name,
                figures,
                f"exp(log_prob) of {type(leaf).__name__} integrates to {figures['integral']:.4g}, "
                "not to 1: a term is missing or wrong, such as a normaliser or a transform's "
                "log-determinant.",
                "Compute log_prob by torch.distributions (TransformedDistribution for squashed "
                "actions), or correct it.",
            )
        if lost:
            return undecided(name, on_edge(lost))
    return Finding(name, Verdict.PASSED, figures)


def _mass(weights: Tensor) -> tuple[float, float]:
    """Return the mean of weights, and its standard error."""
    spread = weights.var(0).mean().sqrt() if len(weights) > 1 else weights.new_zeros(())
    return float(weights.mean()), float(spread) / math.sqrt(weights.numel())


def check_sampler(subject: Subject) -> Finding:
    """sample() draws what log_prob says."""
    name = "sampler"
    worst = 0.0
    for leaf, each in zip(subject.joint_leaves(subject.old), subject.references, strict=True):
        if leaf.sample((_LOOKED_AT,)).isnan().any():
            cause = f"{type(leaf).__name__}.sample() draws NaN."
            return failed(name, {}, cause, "Draw numbers of the support.")
        if each.lost > _LOST:
            return undecided(name, on_edge(each.lost))
        if not each.decided:
            return undecided(name, f"{type(leaf).__name__} has no density on all of its support.")
        if not each.serves:
            return undecided(name, _NO_PROPOSAL)
        worst = max(worst, _distance(each))
        if worst > 1:
            return failed(
                name,
                {"distance over limit": worst},
                f"Averages over actions that {type(leaf).__name__}.sample() draws differ from "
                "those that its log_prob gives: the actions in the batch are not the ones whose "
                "probabilities are raised.",
                "Use one set of parameters for both; clip, round or mask actions only outside the "
                "policy, in the environment.",
            )
    return Finding(name, Verdict.PASSED, {"distance over limit": worst})


def _distance(reference: Reference) -> float:
    """Return the largest difference of an average, over what noise explains."""
    ours, theirs = reference.features
    worst = 0.0
    for index in range(ours.shape[-1]):
        mean, error = average(ours[..., index], reference.weights)
        sampled, other = average(theirs[..., index], torch.ones_like(reference.weights))
        scale = float(theirs[..., index].std()) + 1e-12
        limit = sigmas(ours.shape[-1]) * math.hypot(error, other) + _SLACK * max(1.0, scale)
        worst = max(worst, abs(mean - sampled) / limit)
    return worst if math.isfinite(worst) else math.inf


def check_entropy(subject: Subject) -> Finding:
    """entropy() is the mean of −log_prob."""
    name = "entropy"
    figures = dict[str, float]()
    for leaf, each in zip(subject.joint_leaves(subject.old), subject.references, strict=True):
        try:
            stated = float(leaf.entropy().double().reshape(subject.rows, -1).sum(-1).mean())
        except NotImplementedError:
            continue
        if each.lost > _LOST:
            return undecided(name, on_edge(each.lost))
        if not each.serves:
            return undecided(name, _NO_PROPOSAL)
        mean, error = average(-rows_of(leaf, each.actions), each.weights)
        figures = {"entropy": stated, "mean of -log_prob": mean, "noise": error}
        if not abs(stated - mean) <= sigmas(1) * error + _SLACK * max(1.0, abs(mean)):
            return failed(
                name,
                figures,
                f"entropy() of {type(leaf).__name__} is {stated:.4g}, and the mean of -log_prob "
                f"{mean:.4g}: an entropy bonus would push the wrong way.",
                "Correct entropy(), or leave it out (NotImplementedError).",
            )
    if not figures:
        return undecided(name, "The distribution states no entropy.")
    return Finding(name, Verdict.PASSED, figures)


def check_kl(subject: Subject) -> Finding:
    """The KL of two policies some way apart, either way, is the mean of ln(π_old/π_new)."""
    if subject.lost > 10 * _LOST:
        return undecided("kl", on_edge(subject.lost))
    step = direction(subject, 0, kl=0.05)
    figures = dict[str, float]()
    for way in (step, -step):  # what is wrong by a slope may agree one way, but not the other
        with torch.no_grad(), subject.at(way):
            new = subject.dist()
            stated = float(subject.kl(new))
            ratio = subject.joint_log_prob(new) - subject.old_joint_log_prob
        mean, error = subject.mean(torch.expm1(ratio) - ratio)
        figures = {"kl": stated, "mean of ln(old/new)": mean, "noise": error}
        if error > 0.05 * abs(mean) and math.isfinite(stated):
            return undecided("kl", "Rare actions make up the KL: its average over draws is noise.")
        if not abs(stated - mean) <= sigmas(2) * error + 0.02 * abs(mean) + 1e-6:
            return failed("kl", figures, *_cause_of_wrong_kl(subject, stated, mean))
    return Finding("kl", Verdict.PASSED, figures)


def _cause_of_wrong_kl(subject: Subject, stated: float, mean: float) -> tuple[str, str]:
    """Return the cause and the remedy."""
    dimensions = _dimensions(subject)
    share = mean / stated if stated else math.inf
    cause = f"The KL is {stated:.4g} where the mean of ln(old/new) is {mean:.4g}"
    if dimensions > 1 and abs(share / dimensions - 1) < 0.1:
        return (
            f"{cause}: it is averaged over the action's {dimensions} dimensions.",
            "Sum it over them: Independent(dist, 1), or mean_kl.",
        )
    if stated < 0 < mean:
        return f"{cause}: its sign is wrong.", "Return KL(old || new), not its negative."
    return (
        f"{cause}: it is not the KL of these policies.",
        "Use mean_kl(old, new), or sampled_kl where there is no closed form.",
    )


def on_edge(share: float) -> str:
    """Return what is to be said where rounding does not resolve the sampled actions."""
    return (
        f"Rounding hides log_prob of {share:.2%} of the sampled actions: it is not finite, or it "
        "differs at the next floating-point number. Such actions lie close to the edge of the "
        "support. Clamp actions away from the edge, such as to ±(1 - 1e-6) with tanh, bound "
        "concentrations from below, or use float64."
    )


def _dimensions(subject: Subject) -> int:
    """Return how many numbers make up one action."""
    sizes = [math.prod((*leaf.batch_shape[1:], *leaf.event_shape)) for leaf in leaves(subject.old)]
    return sum(sizes)
