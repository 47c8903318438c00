"""The trainable parameters as one flat vector, and the vector as parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from trpo_optim.closure.dtensor import local, part_like, require_differentiable, whole
from trpo_optim.closure.fsdp import FsdpParameters, require_sharded
from trpo_optim.closure.shared_memory import is_plain, repeats, share_memory, span
from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import copy_each, norm_of_each

__all__ = ["ParameterVector", "require_real", "trainable"]


class ParameterVector:
    """Trainable parameters in a fixed order, gathered into and scattered from one vector.

    Vectors are at least float32, so that the solve does not lose the precision that half-precision
    parameters lack. Of parameters that several ranks hold in parts (``DTensor``) every one of these
    ranks has the whole vector. Of parameters that FSDP has sharded, every rank has its own part.

    Args:
        parameters: The parameters, all on one device; those that occur twice are taken once. Or
            what each is called, by parameter.

    Attributes:
        names: What each is called in messages: its name in quotes, or its place.
        fsdp: The parameters, if FSDP has sharded them; else None.

    Raises:
        TrustRegionError: If there are none, they lie on several devices or on "meta", torch is too
            old for those that are in parts, or FSDP has sharded some and not others.
    """

    def __init__(self, parameters: Iterable[Tensor] | Mapping[Tensor, str]) -> None:
        self.parameters = tuple(dict.fromkeys(parameters))
        places = map(str, range(len(self.parameters)))
        names = parameters.values() if isinstance(parameters, Mapping) else places
        self.names = tuple(names)
        if not any(parameter.numel() for parameter in self.parameters):
            raise TrustRegionError(
                "No parameter requires a gradient, so a step has nothing to move. Call "
                "requires_grad_(True) on the parameters to train."
            )
        require_differentiable(self.parameters)
        devices = sorted({str(parameter.device) for parameter in self.parameters})
        if len(devices) > 1:
            raise TrustRegionError(
                f"The parameters lie on several devices ({', '.join(devices)}); they must lie on "
                "one device. Move the policy with .to(device)."
            )
        self.device = self.parameters[0].device
        if self.device.type == "meta":
            raise TrustRegionError(
                "The parameters lie on the device 'meta', which holds shapes and no values; a step "
                "needs values. Call policy.to_empty(device=...), load or initialise the values, "
                "and then make the optimizer from policy.parameters()."
            )
        self.dtype = functools.reduce(
            torch.promote_types, (parameter.dtype for parameter in self.parameters), torch.float32
        )
        self.precision = max(torch.finfo(each.dtype).eps for each in self.parameters)
        self.fsdp, plain = FsdpParameters.among(self.parameters)
        if self.fsdp and plain:
            raise TrustRegionError(
                f"FSDP has sharded {len(self.parameters) - len(plain)} of the parameters, and not "
                f"{len(plain)} others, such as one of shape {tuple(plain[0].shape)}. Call "
                "fully_shard on the module that holds all of them, without ignored_params, and "
                "make the optimizer afterwards."
            )
        self._sizes = [self._held(parameter).numel() for parameter in self.parameters]
        self._begins_oddly = any(size % 2 for size in self._sizes[:-1])

    def __len__(self) -> int:
        """Return the vectors' length."""
        return sum(self._sizes)

    @property
    def whole_length(self) -> int:
        """The length of whole vectors. This rank may hold only a part of each."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def counting(self) -> str:
        """How the places are counted, for a message; empty if the parameters have names."""
        return ", counted from 0" if self.names[0][0].isdigit() else ""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that a graph shows in the place of the parameters."""
        return self.parameters if self.fsdp is None else self.fsdp.leaves

    def shapes(self) -> str:
        """Return the parameters' shapes and types as a text."""
        shapes = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in self.parameters)
        return f"sharded by FSDP: {shapes}" if self.fsdp else shapes

    def current(self) -> Tensor:
        """Return the parameters as they are now, shape (n,)."""
        return self.gather([parameter.detach() for parameter in self.parameters])

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return tensors shaped like the parameters as one vector; None counts as zeros."""
        return torch.cat(self.flat(tensors))

    def flat(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return tensors shaped like the parameters as the pieces of a vector."""
        pieces = [
            self._held(torch.zeros_like(parameter) if tensor is None else tensor)
            for tensor, parameter in zip(tensors, self.parameters, strict=True)
        ]
        dense = [each.to_dense() if each.is_sparse else each for each in pieces]
        return [_of_dtype(each.reshape(-1), self.dtype) for each in dense]

    def joined(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Return tensors shaped like the parameters in as few pieces of a vector as may be.

        One piece is fastest. Its derivative's pieces may begin at an odd place in memory, where
        complex numbers cannot begin. So there are as many pieces as parameters if one could.
        """
        flat = self.flat(tensors)
        return flat if self._begins_oddly else [torch.cat(flat)]

    def split_as_joined(self, vector: Tensor) -> list[Tensor]:
        """Return a vector in the pieces that ``joined`` returns."""
        return self.split(vector) if self._begins_oddly else [vector]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's pieces, one for each parameter; none begins at an odd place."""
        return [
            piece.clone() if piece.storage_offset() % 2 else piece
            for piece in torch.split(vector, self._sizes)
        ]

    def scatter(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's pieces in the parameters' shapes and dtypes."""
        held = map(local, self.parameters) if self.fsdp else self.parameters
        return [
            part_like(_of_dtype(piece.view(each.shape), each.dtype), each)
            for piece, each in zip(self.split(vector), held, strict=True)
        ]

    def waves(self) -> Tensor:
        """Return a fixed vector along no axis, in every parameter of length 1."""
        waves = torch.arange(1.0, len(self) + 1, device=self.device).sin()
        return self.gather([each / each.norm() for each in self.scatter(waves)])

    def _held(self, tensor: Tensor) -> Tensor:
        """Return what vectors hold of a tensor."""
        return local(tensor) if self.fsdp else whole(tensor)

    def reached(self, vector: Tensor) -> list[bool]:
        """Return of every parameter whether a vector is anything but zero there."""
        norms = norm_of_each(torch.split(vector, self._sizes), 1)
        return torch.stack(norms).ne(0).tolist()

    def write(self, values: Sequence[Tensor], chosen: Iterable[bool] = repeat(True)) -> None:
        """Copy values into chosen parameters, in place and in one call that nothing interrupts."""
        pairs = list(compress(zip(self.parameters, values, strict=True), chosen))
        targets, sources = ([local(pair[side]) for pair in pairs] for side in (0, 1))
        if targets:
            with torch.no_grad():
                copy_each(targets, sources)


def _of_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what ``to`` does, without a call of torch where it would do nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def require_real(group: dict[str, Any]) -> None:
    """Check that the parameters of a group are real floating point, and can be written.

    Args:
        group: One of ``param_groups``.

    Raises:
        TrustRegionError: If one is not, or cannot; it is named.
    """
    for name, parameter in _named(group):
        if not parameter.is_floating_point():
            raise TrustRegionError(
                f"Parameter {name!r} is {parameter.dtype}; every parameter must be real floating "
                "point. Keep integers in buffers, and view complex parameters as real "
                "(torch.view_as_real)."
            )
        trained = parameter.requires_grad and not is_lazy(parameter)
        if trained and parameter.is_inference():
            raise TrustRegionError(
                f"Parameter {name!r} was made in inference mode, where nothing can be trained. "
                "Make it outside of torch.inference_mode(), or clone() it there."
            )


def trainable(groups: Sequence[dict[str, Any]]) -> dict[Tensor, str]:
    """Return the parameters that require a gradient, each of which has memory of its own.

    Args:
        groups: ``param_groups``.

    Returns:
        What each is called in messages, by parameter.

    Raises:
        TrustRegionError: If an element in memory belongs to two parameters, or stands for several
            elements of one: a step would move it more than once. They are named. Or if FSDP drops
            a parameter again.
    """
    names: dict[Tensor, str] = {}
    for index, group in enumerate(groups):
        place = f" of param_groups[{index}]" if index and "param_names" not in group else ""
        for name, parameter in _named(group):
            if parameter.requires_grad:
                names.setdefault(parameter, f"{name!r}{place}")
    require_sharded(names)
    held = {each: local(each) for each in names if each.device.type != "meta"}
    lying = ((each, mine) for each, mine in held.items() if is_plain(mine) and mine.numel())
    spans = [(each, span(mine)) for each, mine in lying]
    order = {each: index for index, each in enumerate(names)}
    before: list[tuple[Tensor, tuple[str, int, int]]] = []
    for parameter, (device, start, end) in sorted(spans, key=lambda pair: pair[1]):
        if repeats(held[parameter]):
            raise TrustRegionError(
                f"Parameter {names[parameter]} has {parameter.numel()} elements, and several of "
                "them are one number in memory, as after expand(); every element must have its "
                "own. Optimize the tensor before expand(), and expand it in forward()."
            )
        before = [pair for pair in before if pair[1][0] == device and pair[1][2] > start]
        for other, _ in before:
            if share_memory(held[other], held[parameter]):
                first, second = sorted((other, parameter), key=order.__getitem__)
                raise TrustRegionError(
                    f"Parameters {names[first]} and {names[second]} are two tensors that share "
                    "memory; every parameter must have its own. Tie them as one parameter "
                    "(b.weight = a.weight, not b.weight.data = a.weight.data), or clone() one."
                )
        before.append((parameter, (device, start, end)))
    return names


def _named(group: dict[str, Any]) -> Iterator[tuple[str | int, Tensor]]:
    """Return the parameters of a group with their names, or with their places."""
    names = group.get("param_names", range(len(group["params"])))
    return zip(names, group["params"], strict=True)
