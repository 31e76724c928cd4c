"""What Muon makes of a gradient, and how far rounding takes it from there."""

import math

import torch

NORM_EPS = 1e-7  # which DeepSpeed adds to a matrix's norm; that of a gate's gradient is small
ROOM = 4
"""An error may be so many times :func:`rounding_of`: optimizers multiply in another order."""


def orthogonalized(gradient: torch.Tensor) -> torch.Tensor:
    """What five Newton-Schulz steps make of each matrix: a polynomial of its singular values."""
    u, s, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + NORM_EPS)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    result: torch.Tensor = (u * s[..., None, :]) @ vh * _tallness(gradient)
    return result


def _tallness(gradient: torch.Tensor) -> float:
    rows, columns = gradient.shape[-2:]
    return math.sqrt(max(1, rows / columns))


def rounding_of(gradient: torch.Tensor, dtype: torch.dtype) -> float:
    """How far from :func:`orthogonalized` the steps end in ``dtype``, as a norm.

    A singular value near zero grows 3.4445**5 = 485 times, and a rounding error beside it as
    much, so that this depends on the gradient. The steps run in double precision, with an error
    in each product as ``dtype`` makes it: half its eps of the sum of the terms' sizes.
    """
    exact, unit = orthogonalized(gradient), torch.finfo(dtype).eps / 2
    random = torch.Generator().manual_seed(0)

    def off(value: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        noise = 2 * torch.rand(value.shape, dtype=value.dtype, generator=random) - 1
        return value + unit * noise * terms

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return off(a @ b, a.abs() @ b.abs())

    errors = []
    for _ in range(4):
        x = gradient.double() / (gradient.double().norm(dim=(-2, -1), keepdim=True) + NORM_EPS)
        x = off(x, x)
        for _ in range(5):
            a = product(x, x.mT)
            b = -4.7750 * a + 2.0315 * product(a, a)
            x = 3.4445 * x + product(off(b, b), x)
            x = off(x, x)
        errors.append(float((x * _tallness(gradient) - exact).norm()))
    return max(errors)
