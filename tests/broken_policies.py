"""What is meant to find each broken policy, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from broken import (
    OBSERVATIONS,
    SAMPLES,
    Centred,
    ClampingItself,
    Clipped,
    Counting,
    DensityNotLog,
    DetachedBody,
    DetachedScale,
    Discrete,
    EntropyOverDimensions,
    EpsilonGreedy,
    GradMode,
    Hotter,
    LayersInAList,
    Noisy,
    NoisyTogether,
    Normalised,
    OneNumber,
    Policy,
    Rounded,
    ScaleAsNumber,
    SoftmaxOverTheBatch,
    Squashed,
    Squeezed,
    WithoutConstant,
    WithoutGraph,
    WritingObservations,
    policy_of,
)
from broken_arguments import (
    CachedByObservation,
    CachedFeatures,
    ClampedAway,
    ClampedOutput,
    CumulativeStatistics,
    RawConcentrations,
    RawOutput,
    RawScale,
    ShareAsLogits,
    SigmoidAsLogits,
    SoftmaxAsLogits,
    StatisticsAsAttribute,
    StatisticsWithin,
    Unvalidated,
)
from broken_kls import (
    HandmadeLaplace,
    OnceInHalf,
    clamped,
    custom_kl,
    handmade_laplace_kl,
    kl_with_wrong_second,
    mean_over_dimensions,
    negative,
    rooted,
    unjoint,
    unweighted,
    with_entropy,
)
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    Normal,
    kl_divergence,
)


@dataclass(frozen=True)
class Broken:
    """A fault: what makes it, the check that is meant for it, and part of what that says."""

    make: Callable[[], Any]
    check: str
    says: str
    observations: Callable[[], Tensor] = lambda: torch.randn(SAMPLES, OBSERVATIONS)
    options: dict[str, Any] = field(default_factory=dict)


BROKEN_POLICIES: dict[str, Broken] = {
    "one action dimension, not joint": Broken(
        lambda: OneNumber(1),
        "one action per row",
        r"batch shape \(128, 1\)",
        options={"kl": unjoint},
    ),
    "action dimensions not joint": Broken(
        OneNumber, "one action per row", "gives 3 numbers per observation.*Independent"
    ),
    "dropout": Broken(lambda: Policy(middle=nn.Dropout(0.2)), "deterministic", "dropout.*eval"),
    "noise in forward": Broken(Noisy, "deterministic", "draws random numbers"),
    "one random number for all rows": Broken(
        NoisyTogether, "deterministic", "draws random numbers"
    ),
    "a counter in forward": Broken(Counting, "state", "changes count"),
    "observations clamped in place": Broken(
        WritingObservations, "state", "changes observations.*write to no tensor in place"
    ),
    "a parameter clamped in forward": Broken(ClampingItself, "state", "changes log_std"),
    "a squeeze() without a dimension": Broken(Squeezed, "rows", "changes by inf nats"),
    "batch normalisation": Broken(
        lambda: Policy(middle=nn.BatchNorm1d(8)), "rows", "batch normalisation in training mode"
    ),
    "the batch's mean subtracted": Broken(Centred, "rows", "a mean or softmax over the wrong dim"),
    "softmax over the batch": Broken(SoftmaxOverTheBatch, "rows", "across the batch"),
    "a detached body": Broken(DetachedBody, "parameters", r"depends on body\.0\.weight.*detached"),
    "a scale made a number": Broken(ScaleAsNumber, "parameters", "depends on log_std"),
    "layers in a list": Broken(
        LayersInAList, "parameters", r"depends on 4 tensors that .*nn\.ModuleList"
    ),
    "no graph": Broken(WithoutGraph, "parameters", "detached on the way"),
    "a raw parameter for a scale": Broken(
        RawScale, "arguments", r"scale of Independent\(Normal\) above 0.*exp\(\) of a log_std"
    ),
    "a raw output for a scale": Broken(
        RawOutput, "arguments", r"scale of Independent\(Normal\) above 0"
    ),
    "raw outputs for concentrations": Broken(
        RawConcentrations, "arguments", r"concentration of Independent\(Beta\) above 0.*softplus"
    ),
    "a negative scale that is not validated": Broken(
        Unvalidated, "state", "Normal has scale outside GreaterThan"
    ),
    "probabilities for logits": Broken(
        SoftmaxAsLogits, "arguments", "given probabilities as logits.*before softmax"
    ),
    "a softmax by hand for logits": Broken(
        ShareAsLogits, "arguments", "given probabilities as logits.*sum to one"
    ),
    "sigmoids for logits": Broken(
        SigmoidAsLogits, "arguments", r"Independent\(Bernoulli\) was given probabilities as logits"
    ),
    "a scale outside its clamp": Broken(
        ClampedAway, "arguments", "log_std lies outside the clamp.* in 2 of 3 dimensions"
    ),
    "an output outside its clamp": Broken(
        ClampedOutput, "arguments", "what gives scale lies outside the clamp"
    ),
    "features cached for good": Broken(
        CachedFeatures, "state", "changes features.*cached features.*in every forward"
    ),
    "features cached by observation": Broken(
        CachedByObservation, "state", "changes known.*cached features of older parameters"
    ),
    "statistics in a plain attribute": Broken(
        StatisticsAsAttribute, "state", "changes seen_mean.*statistics.*register_buffer"
    ),
    "statistics in an object": Broken(StatisticsWithin, "state", "changes statistics"),
    "cumulative statistics": Broken(
        CumulativeStatistics, "state", "changes seen_mean, count.*statistics"
    ),
    "division by the observation's norm": Broken(Normalised, "finite", "observations of zeros"),
    "squashing without its log-determinant": Broken(
        policy_of(lambda mean, std: Squashed(Independent(Normal(mean, std), 1))),
        "density",
        "log-determinant",
        options={"kl": lambda old, new: kl_divergence(old.base, new.base).mean()},
    ),
    "log_prob without its constant": Broken(
        policy_of(WithoutConstant), "density", "integrates to 15", options={"kl": custom_kl}
    ),
    "a density for log_prob": Broken(
        policy_of(DensityNotLog), "density", "integrates to", options={"kl": custom_kl}
    ),
    "a hotter sampler": Broken(
        policy_of(Hotter),
        "sampler",
        "differ from those that its log_prob",
        options={"kl": custom_kl},
    ),
    "a sampler that clips": Broken(
        policy_of(Clipped), "sampler", "clip, round or mask.*outside", options={"kl": custom_kl}
    ),
    "an epsilon-greedy sampler": Broken(
        policy_of(lambda mean, std: EpsilonGreedy(logits=mean)), "sampler", "EpsilonGreedy"
    ),
    "entropy averaged over dimensions": Broken(
        policy_of(EntropyOverDimensions), "entropy", r"mean of -log_prob", options={"kl": custom_kl}
    ),
    "a scale detached in log_prob": Broken(
        policy_of(DetachedScale), "score", "part of log_prob is detached", options={"kl": custom_kl}
    ),
    "rounding, straight through": Broken(Rounded, "score", "not its slope"),
    "entropy in the KL": Broken(
        Policy, "zero kl", r"KL\(old \|\| old\) is .* not zero", options={"kl": with_entropy}
    ),
    "the root of the KL": Broken(Policy, "zero kl", "not zero", options={"kl": rooted}),
    "the KL's negative": Broken(Policy, "zero kl", "does not rise", options={"kl": negative}),
    "KL averaged over dimensions": Broken(
        Policy,
        "kl",
        "averaged over the action's 3 dimensions",
        options={"kl": mean_over_dimensions},
    ),
    "a clamped KL": Broken(Policy, "kl", "not the KL of these", options={"kl": clamped}),
    "a KL not weighted by probabilities": Broken(
        Discrete, "kl", "not the KL of these|sign", options={"kl": unweighted}
    ),
    "a backward that forbids a second, in half precision": Broken(
        lambda: Policy(middle=OnceInHalf()).bfloat16(),
        "second order",
        "computes in half precision",
        observations=lambda: torch.randn(SAMPLES, OBSERVATIONS).bfloat16(),
    ),
    "a KL with a wrong second derivative": Broken(
        Policy,
        "fisher",
        "by differences of the KL's gradient it is",
        options={"kl": kl_with_wrong_second},
    ),
    "a KL with a kink": Broken(
        policy_of(HandmadeLaplace),
        "fisher",
        "by torch.func, and by differences",
        options={"kl": handmade_laplace_kl},
    ),
    "another policy without gradients": Broken(GradMode, "step", "is_grad_enabled"),
}
