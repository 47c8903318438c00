"""Parameters as one vector and back, bit for bit and in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trpo_optim import TrustRegionError
from trpo_optim.closure.parameters import ParameterVector

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def channels_last() -> nn.Parameter:
    return nn.Parameter(normal(2, 3, 4, 5).to(memory_format=torch.channels_last))


def transposed() -> nn.Parameter:
    return nn.Parameter(normal(3, 4).T)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([F32], F32),
        ([F64, F64], F64),
        ([BF16], F32),
        ([F16, BF16], F32),
        ([BF16, F32], F32),
        ([F32, F64, BF16], F64),
    ],
)
def test_gathering_and_scattering_gives_every_dtype_back_bit_for_bit(
    dtypes: list[torch.dtype], expected: torch.dtype
) -> None:
    parameters = [normal(3, 2 + i, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    vector = ParameterVector(parameters)
    flat = vector.gather(parameters)
    assert flat.dtype is vector.dtype is expected
    assert flat.shape == (sum(each.numel() for each in parameters),)
    for piece, parameter in zip(vector.scatter(flat), parameters, strict=True):
        assert piece.dtype is parameter.dtype
        assert torch.equal(piece, parameter)


@pytest.mark.parametrize("make", [channels_last, transposed])
def test_parameters_that_are_not_contiguous_keep_their_logical_order(
    make: type[nn.Parameter],
) -> None:
    parameter, scalar = make(), nn.Parameter(torch.tensor(7.0))
    assert not parameter.is_contiguous()
    vector = ParameterVector([parameter, scalar])
    flat = vector.gather([parameter, scalar]).detach()
    assert flat.tolist() == [*parameter.contiguous().view(-1).tolist(), 7.0]
    strides = parameter.stride()
    with torch.no_grad():
        vector.write(vector.scatter(flat + 1))
    assert parameter.stride() == strides
    assert torch.equal(vector.gather([parameter, scalar]), flat + 1)


def test_none_counts_as_zeros_in_its_place() -> None:
    parameters = [normal(2), normal(2, 2, dtype=F64), normal(1)]
    flat = ParameterVector(parameters).gather([torch.ones(2), None, torch.ones(1)])
    assert flat.tolist() == [1, 1, 0, 0, 0, 0, 1]
    assert flat.dtype is F64


def test_a_parameter_that_occurs_twice_is_taken_once_where_it_came_first() -> None:
    tied, other = normal(2), normal(3)
    twin = tied.clone()  # equal, but another parameter
    vector = ParameterVector([tied, other, tied, twin])
    assert list(map(id, vector.parameters)) == [id(tied), id(other), id(twin)]
    assert len(vector.gather(vector.parameters)) == 7


def test_writing_keeps_identity_storage_and_graph_state() -> None:
    parameters = [nn.Parameter(normal(3, 4)), channels_last(), nn.Parameter(normal(2, dtype=BF16))]
    vector = ParameterVector(parameters)
    storages = [parameter.data_ptr() for parameter in parameters]
    versions = [parameter._version for parameter in parameters]
    values = [torch.full_like(parameter, 2.5) for parameter in parameters]
    with torch.no_grad():
        vector.write(values)
    assert [parameter.data_ptr() for parameter in parameters] == storages
    # A write that autograd cannot see, as .data makes, would leave the version where it was.
    assert all(each._version > old for each, old in zip(parameters, versions, strict=True))
    for parameter, value in zip(parameters, values, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter, value)


def test_a_write_does_not_tie_the_parameters_to_the_vector() -> None:
    parameter = normal(3)
    vector = ParameterVector([parameter])
    flat = torch.ones(3)
    vector.write(vector.scatter(flat))
    flat.zero_()
    assert parameter.tolist() == [1, 1, 1]


def test_a_parameter_without_elements_keeps_its_place_among_others() -> None:
    parameters = [torch.zeros(0), normal(3), torch.zeros(2, 0)]
    vector = ParameterVector(parameters)
    flat = vector.gather(parameters)
    assert torch.equal(flat, parameters[1])
    assert [piece.shape for piece in vector.scatter(flat)] == [each.shape for each in parameters]


@pytest.mark.parametrize("shapes", [[], [(0,)], [(0,), (2, 0)]])
def test_no_parameters_and_none_with_elements_are_refused_with_the_remedy(
    shapes: list[tuple[int, ...]],
) -> None:
    with pytest.raises(TrustRegionError, match=r"No parameter .*requires_grad_\(True\)"):
        ParameterVector([torch.zeros(shape) for shape in shapes])


def test_parameters_on_several_devices_are_refused_by_the_devices() -> None:
    with pytest.raises(TrustRegionError, match=r"several devices \(cpu, meta\).*\.to\(device\)"):
        ParameterVector([torch.zeros(1), torch.zeros(1, device="meta")])
