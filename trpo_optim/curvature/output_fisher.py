"""How the KL curves in the outputs of the network: M of the Gauss–Newton product Jᵀ M J."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from trpo_optim.curvature.graph_cut import Crossing

__all__ = ["OutputFisher", "output_fisher"]

_STATIONARY = 1e-4
"""The KL, in nats, that a change of z may still take away for z to count as stationary."""

_Product = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class OutputFisher:
    """The Fisher matrix in tensors z through which alone the KL depends on the parameters.

    Attributes:
        edges: z, as edges of the graph.
        templates: Tensors shaped like z.
        product: u ↦ Mu for tensors shaped like z; M weights samples as the closure's KL does.
    """

    edges: tuple[GradientEdge, ...]
    templates: tuple[Tensor, ...]
    product: _Product


def output_fisher(kl: Tensor, crossings: Sequence[Crossing]) -> OutputFisher | str:
    """Return the Fisher matrix at a cut, or why the KL's Hessian there is not all of it.

    Args:
        kl: The closure's KL, with its graph.
        crossings: Where that is cut.

    Returns:
        The matrix as a product, everything that does not depend on the vector done once.

    Source:
        Schraudolph, "Fast Curvature Matrix-Vector Products" (2002); Martens, "New Insights and
        Perspectives on the Natural Gradient Method" (2020), for when it is the Fisher matrix.
    """
    softmaxes = [each for each in crossings if each.log_probabilities is not None]
    smooth = [each for each in crossings if each.log_probabilities is None]
    terms = [_log_softmax_term(kl, each) for each in softmaxes]
    if smooth:
        terms.append(_smooth_term(kl, smooth))
    sound = []
    for term in terms:
        if isinstance(term, str):
            return term
        sound.append(term)
    return _sum(sound)


def _log_softmax_term(kl: Tensor, crossing: Crossing) -> OutputFisher | str:
    """Return M = w (diag(p) − ppᵀ), the weights w read off the KL's slope −wp in log p.

    The same M serves log-probabilities, whose changes have no mean under p.
    """
    log_probabilities, dim = crossing.log_probabilities, crossing.dim
    assert log_probabilities is not None
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(kl, [GradientEdge(*crossing.outer)], create_graph=True)
    if slope.requires_grad:
        return (
            "the KL is not linear in the log-probabilities that the third value holds; return what "
            "it was computed from"
        )
    mass = slope.neg()
    weight = mass.sum(dim, keepdim=True)
    error = (weight * log_probabilities.exp()).sub_(mass).abs_().max()
    largest, smallest, error = torch.stack([weight.max(), weight.min(), error]).tolist()
    tolerance = max(1e-3, 10 * torch.finfo(mass.dtype).eps) * largest
    if not (largest > 0 and smallest >= -tolerance and error <= tolerance):
        return "the KL is not that of the probabilities which the third value holds"
    normal = weight.clamp_min(torch.finfo(weight.dtype).tiny)

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        (u,) = vectors
        mean = (mass * u).sum(dim, keepdim=True).div_(normal)
        return [(u - mean).mul_(mass)]

    return OutputFisher((GradientEdge(*crossing.inner),), (mass,), product)


def _smooth_term(kl: Tensor, crossings: Sequence[Crossing]) -> OutputFisher | str:
    """Return M as the KL's own Hessian, where the KL is stationary; often that is diagonal."""
    outer = [GradientEdge(*each.outer) for each in crossings]
    with torch.enable_grad():
        slopes = torch.autograd.grad(kl, outer, create_graph=True)
    if any(each.is_complex() for each in slopes):
        return "the third value is complex; return the distribution itself"
    signs = [each.sign for each in crossings]
    curved = [index for index, slope in enumerate(slopes) if slope.requires_grad]
    if not curved:
        return "the KL does not curve in the third value"

    def hessian(vectors: Sequence[Tensor]) -> list[Tensor]:
        products = torch.autograd.grad(
            [slopes[index] for index in curved],
            outer,
            [vectors[index] for index in curved],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(slope) if each is None else each
            for each, slope in zip(products, slopes, strict=True)
        ]

    templates = tuple(slope.detach() for slope in slopes)
    probes = [each.mul_(0.5).add_(1) for each in _waves(templates)]
    diagonal = [image.div_(probe) for image, probe in zip(hessian(probes), probes, strict=True)]

    def written_out(vectors: Sequence[Tensor]) -> list[Tensor]:
        return [entry * vector for entry, vector in zip(diagonal, vectors, strict=True)]

    is_diagonal = _is_of_gaussians(diagonal) or _is_diagonal(diagonal, hessian)
    product: _Product = written_out if is_diagonal else hessian
    if not _decrement(templates, product) <= _STATIONARY:
        return "the KL is not stationary in the third value; return the distribution itself"

    def signed(vectors: Sequence[Tensor]) -> list[Tensor]:
        return _times(signs, product(_times(signs, vectors)))

    kinked = any(sign is not None for sign in signs)
    edges = tuple(GradientEdge(*each.inner) for each in crossings)
    return OutputFisher(edges, templates, signed if kinked else product)


def _times(signs: Sequence[Tensor | None], vectors: Sequence[Tensor]) -> list[Tensor]:
    return [
        each if sign is None else sign * each for sign, each in zip(signs, vectors, strict=True)
    ]


def _is_of_gaussians(quotients: Sequence[Tensor]) -> bool:
    """Return whether Mu/u is w/σ² for the means and 2w/σ² for the scales, with u along no axis.

    So it is where M is the diagonal Fisher matrix of Gaussians with weights w. Terms between
    elements would make quotients that do not go together, as u differs for means and scales.
    """
    if len(quotients) != 2 or quotients[0].shape != quotients[1].shape:
        return False
    smaller, larger = sorted(quotients, key=lambda each: float(each.sum()))
    return torch.allclose(2 * smaller, larger, rtol=1e-5, atol=0.0)


def _waves(templates: Sequence[Tensor]) -> list[Tensor]:
    """Return a fixed vector along no axis, in the form of some tensors."""
    sizes = [each.numel() for each in templates]
    wave = torch.arange(sum(sizes), dtype=torch.float32, device=templates[0].device).sin_()
    pieces = torch.split(wave, sizes)
    return [piece.to(each).view_as(each) for piece, each in zip(pieces, templates, strict=True)]


def _is_diagonal(entries: Sequence[Tensor], product: _Product) -> bool:
    """Return whether M has only these entries, by one vector v that lies along no axis.

    Every element is measured by its own entry, because parts of a policy may differ by orders of
    magnitude. The entry beside |Mv| is for what rounding leaves where the vector is near zero.
    """
    waves = _waves(entries)
    near = math.sqrt(torch.finfo(entries[0].dtype).eps)
    same = []
    for entry, wave, image in zip(entries, waves, product(waves), strict=True):
        allowed = near * (image.abs() + entry.abs())
        same.append(((entry * wave - image).abs() <= allowed).all())
    return bool(torch.stack(same).all())


def _decrement(slopes: Sequence[Tensor], product: _Product) -> float:
    """Return how far the KL's quadratic model falls along its own slope, (gᵀg)² / 2gᵀMg, nats."""
    peak = torch.stack([slope.abs().max() for slope in slopes if slope.numel()]).max()
    units = [slope / peak for slope in slopes]
    squares = sum(unit.square().sum() for unit in units)
    bends = sum((unit * bent).sum() for unit, bent in zip(units, product(units), strict=True))
    largest, square, bend = torch.stack([peak, squares, bends]).tolist()  # type: ignore[list-item]  # sums of tensors
    if largest == 0:
        return 0.0
    return 0.5 * (largest * square) ** 2 / bend if bend > 0 else float("inf")


def _sum(terms: Sequence[OutputFisher]) -> OutputFisher:
    """Return the cut of a KL that is the sum of several."""
    if len(terms) == 1:
        return terms[0]
    counts = [len(term.edges) for term in terms]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        parts = [
            term.product(vectors[end - count : end])
            for term, count, end in zip(terms, counts, ends, strict=True)
        ]
        return [each for part in parts for each in part]

    return OutputFisher(
        tuple(edge for term in terms for edge in term.edges),
        tuple(each for term in terms for each in term.templates),
        product,
    )
