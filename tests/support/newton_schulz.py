"""Muon's update of a gradient, and the effect of rounding on it."""

import math

import torch

NORM_EPS = 1e-7  # DeepSpeed adds it to a matrix's norm; a gate's gradient has a small norm
ROOM = 4
"""Factor on :func:`rounding_of` that errors may reach: optimizers multiply in other orders."""


def orthogonalized(gradient: torch.Tensor) -> torch.Tensor:
    """Each matrix after five Newton-Schulz steps: a polynomial of its singular values."""
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
    """Norm of the difference from :func:`orthogonalized` if the steps run in ``dtype``.

    A singular value near zero grows 3.4445**5 = 485 times, and so does a rounding error beside
    it, so the result depends on the gradient. The steps run in double precision; each product
    gets an error as in ``dtype``: half its eps times the sum of the terms' sizes.
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
