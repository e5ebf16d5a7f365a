"""Standard distributions as pure functions: what a family of score distributions is made of.

Each law describes a standardised score z through static methods that take z, or a level u, and the law's shape
parameters, broadcast against each other, differentiable in all of them: ``log_density``, ``cdf``, ``quantile``,
``crps``, ``moments`` (mean and standard deviation) and ``draw`` (from two uniform numbers).

The continuous ranked probability score is CRPS(F, z) = E|S − z| − ½ E|S − S′|; lower is better. Source:
Gneiting and Raftery, JASA 102 (2007), with the closed forms of Jordan, Krüger and Lerch, J. Stat. Softw. 90 (2019).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


class Law(Protocol):
    """A standard distribution with any number of shape parameters; everything is elementwise."""

    @staticmethod
    def log_density(z: Tensor, *shape: Any) -> Tensor:
        """Log density.

        Args:
            z: Standardised score.
            *shape: Shape parameters, broadcast against it.
        """
        ...

    @staticmethod
    def cdf(z: Tensor, *shape: Any) -> Tensor:
        """P(S ≤ z).

        Args:
            z: Standardised score.
            *shape: Shape parameters, broadcast against it.
        """
        ...

    @staticmethod
    def quantile(u: Tensor, *shape: Any) -> Tensor:
        """The z with P(S ≤ z) = u, for 0 < u < 1.

        Args:
            u: Level in (0, 1).
            *shape: Shape parameters, broadcast against it.
        """
        ...

    @staticmethod
    def crps(z: Tensor, *shape: Any) -> Tensor:
        """CRPS of an observed z.

        Args:
            z: Standardised score.
            *shape: Shape parameters, broadcast against it.
        """
        ...

    @staticmethod
    def moments(*shape: Any) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation."""
        ...

    @staticmethod
    def draw(u: Tensor, v: Tensor, *shape: Any) -> Tensor:
        """A draw from two independent uniform numbers.

        Args:
            u: Uniform number in [0, 1).
            v: Another.
            *shape: Shape parameters, broadcast against them.
        """
        ...


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _nodes(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights on (0, 1), each of shape (count,)."""
    x, w = np.polynomial.legendre.leggauss(count)
    return torch.as_tensor((x + 1) / 2).to(like), torch.as_tensor(w / 2).to(like)


def _invert(law: type[Law], u: Tensor, *shape: Tensor) -> Tensor:
    """Quantiles by bisection of the cdf, to the last bits; not differentiable."""
    with torch.no_grad():
        u = torch.broadcast_tensors(u, *shape)[0]
        low, high = torch.full_like(u, -1.0), torch.full_like(u, 1.0)
        for _ in range(40):
            low = torch.where(law.cdf(low, *shape) > u, 2 * low, low)
            high = torch.where(law.cdf(high, *shape) < u, 2 * high, high)
        for _ in range(60):
            middle = (low + high) / 2
            below = law.cdf(middle, *shape) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class Normal:
    """N(0, 1); no shape parameter."""

    @staticmethod
    def log_density(z: Tensor) -> Tensor:
        """Log density."""
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)

    @staticmethod
    def cdf(z: Tensor) -> Tensor:
        """Φ(z)."""
        return torch.special.ndtr(z)

    @staticmethod
    def quantile(u: Tensor) -> Tensor:
        """Φ⁻¹(u)."""
        return torch.special.ndtri(u)

    @staticmethod
    def crps(z: Tensor) -> Tensor:
        """z (2Φ(z) − 1) + 2φ(z) − 1/√π."""
        return z * (2 * torch.special.ndtr(z) - 1) + 2 * _density(z) - 1 / math.sqrt(math.pi)

    @staticmethod
    def moments() -> tuple[float, float]:
        """0 and 1."""
        return 0.0, 1.0

    @staticmethod
    def draw(u: Tensor, v: Tensor) -> Tensor:
        """Box and Muller's transform.

        Args:
            u: Uniform number in [0, 1).
            v: Another.
        """
        return torch.sqrt(-2 * torch.log1p(-u)) * torch.cos(2 * math.pi * v)


class StudentT:
    """Student's t with ν > 2 degrees of freedom."""

    @staticmethod
    def log_density(z: Tensor, df: Tensor) -> Tensor:
        """Log density.

        Args:
            z: Standardised score.
            df: Degrees of freedom ν.
        """
        scale = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * torch.log(math.pi * df)
        return scale - (df + 1) / 2 * torch.log1p(z.square() / df)

    @staticmethod
    def cdf(z: Tensor, df: Tensor) -> Tensor:
        """½ + Γ((ν+1)/2) / (√π Γ(ν/2)) ∫ cos^{ν−1}θ dθ up to arctan(z/√ν), by 96-point quadrature.

        Args:
            z: Standardised score.
            df: Degrees of freedom ν.
        """
        x, w = _nodes(96, df)
        top = torch.atan(z / df.sqrt())
        area = ((top[..., None] * x).cos() ** (df[..., None] - 1) * w).sum(-1) * top
        scale = torch.exp(torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2)) / math.sqrt(math.pi)
        return (0.5 + scale * area).clamp(0, 1)

    @staticmethod
    def quantile(u: Tensor, df: Tensor) -> Tensor:
        """By bisection of the cdf; not differentiable.

        Args:
            u: Level in (0, 1).
            df: Degrees of freedom ν.
        """
        return _invert(StudentT, u, df)

    @staticmethod
    def crps(z: Tensor, df: Tensor) -> Tensor:
        """z (2F − 1) + 2f (ν + z²)/(ν − 1) − 2√ν/(ν − 1) · B(½, ν − ½)/B(½, ν/2)².

        Args:
            z: Standardised score.
            df: Degrees of freedom ν.
        """

        def log_beta(a: Tensor) -> Tensor:
            return math.lgamma(0.5) + torch.lgamma(a) - torch.lgamma(a + 0.5)

        spread = 2 * df.sqrt() / (df - 1) * torch.exp(log_beta(df - 0.5) - 2 * log_beta(df / 2))
        density = torch.exp(StudentT.log_density(z, df))
        return z * (2 * StudentT.cdf(z, df) - 1) + 2 * density * (df + z.square()) / (df - 1) - spread

    @staticmethod
    def moments(df: Tensor) -> tuple[float, Tensor]:
        """0 and √(ν/(ν − 2))."""
        return 0.0, torch.sqrt(df / (df - 2))

    @staticmethod
    def draw(u: Tensor, v: Tensor, df: Tensor) -> Tensor:
        """Bailey's polar method, Mathematics of Computation 62 (1994).

        Args:
            u: Uniform number in [0, 1).
            v: Another.
            df: Degrees of freedom ν.
        """
        return torch.sqrt(df * torch.expm1(-2 / df * torch.log1p(-u))) * torch.cos(2 * math.pi * v)


class SkewNormal:
    """Azzalini's skew-normal 2 φ(z) Φ(αz), with α = δ/√(1 − δ²) and −1 < δ < 1."""

    @staticmethod
    def log_density(z: Tensor, delta: Tensor) -> Tensor:
        """Log density.

        Args:
            z: Standardised score.
            delta: δ in (−1, 1).
        """
        alpha = delta / torch.sqrt(1 - delta.square())
        return math.log(2) + Normal.log_density(z) + torch.special.log_ndtr(alpha * z)

    @staticmethod
    def cdf(z: Tensor, delta: Tensor) -> Tensor:
        """Φ(z) − 2T(z, α), Owen's T as ∫ exp(−z² / (2cos²θ)) dθ / 2π up to arcsin δ, by 64-point quadrature.

        Args:
            z: Standardised score.
            delta: δ in (−1, 1).
        """
        x, w = _nodes(64, delta)
        angle = torch.asin(delta)
        ratio = (z[..., None] / torch.cos(angle[..., None] * x)).square()
        owen = (torch.exp(-0.5 * ratio) * w).sum(-1) * angle / (2 * math.pi)
        return (torch.special.ndtr(z) - 2 * owen).clamp(0, 1)

    @staticmethod
    def quantile(u: Tensor, delta: Tensor) -> Tensor:
        """By bisection of the cdf; not differentiable.

        Args:
            u: Level in (0, 1).
            delta: δ in (−1, 1).
        """
        return _invert(SkewNormal, u, delta)

    @staticmethod
    def crps(z: Tensor, delta: Tensor) -> Tensor:
        """E|S − z| in closed form; ½ E|S − S′| = ∫ F (1 − F) by quadrature, once for every distinct δ.

        Args:
            z: Standardised score.
            delta: δ in (−1, 1).
        """
        z, delta = torch.broadcast_tensors(z, delta)
        root = torch.sqrt(1 - delta.square())
        below = delta * _SQRT_2_OVER_PI * torch.special.ndtr(z / root)
        below = below - 2 * _density(z) * torch.special.ndtr(delta / root * z)
        distance = z * (2 * SkewNormal.cdf(z, delta) - 1) + delta * _SQRT_2_OVER_PI - 2 * below
        each, place = delta.unique(return_inverse=True)
        x, w = _nodes(80, delta)
        half = torch.zeros_like(each)
        for side in (-10.0, 10.0):
            f = SkewNormal.cdf(side * x, each[:, None])
            half = half + 10.0 * (f * (1 - f) * w).sum(-1)
        return distance - half[place]

    @staticmethod
    def moments(delta: Tensor) -> tuple[Tensor, Tensor]:
        """δ √(2/π) and √(1 − 2δ²/π)."""
        return delta * _SQRT_2_OVER_PI, torch.sqrt(1 - 2 * delta.square() / math.pi)

    @staticmethod
    def draw(u: Tensor, v: Tensor, delta: Tensor) -> Tensor:
        """δ |N| + √(1 − δ²) N′ from two independent normal numbers.

        Args:
            u: Uniform number in [0, 1).
            v: Another.
            delta: δ in (−1, 1).
        """
        radius = torch.sqrt(-2 * torch.log1p(-u))
        first, second = radius * torch.cos(2 * math.pi * v), radius * torch.sin(2 * math.pi * v)
        return delta * first.abs() + torch.sqrt(1 - delta.square()) * second


class Quantiles:
    """Quantiles q_1 < … < q_J at the levels (j − ½)/J, linear in between, with exponential tails.

    The density is constant between neighbours and continuous where the tails begin. Shape parameters: the
    quantiles in the last dimension.
    """

    @staticmethod
    def levels(knots: Tensor) -> Tensor:
        """Levels of the quantiles, shape (J,)."""
        count = knots.shape[-1]
        return (torch.arange(count, device=knots.device, dtype=knots.dtype) + 0.5) / count

    @staticmethod
    def _place(z: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Quantile below z and width of its piece, level below, tail widths; everything broadcast to z."""
        lead = torch.broadcast_shapes(z.shape, knots.shape[:-1])
        knots = knots.expand(*lead, knots.shape[-1])
        count = knots.shape[-1]
        at = torch.searchsorted(knots.detach().contiguous(), z.expand(lead)[..., None].contiguous())
        at = (at - 1).clamp(0, count - 2)
        low, high = knots.gather(-1, at)[..., 0], knots.gather(-1, at + 1)[..., 0]
        first, last = (knots[..., 1] - knots[..., 0]) / 2, (knots[..., -1] - knots[..., -2]) / 2
        return low, high - low, (at[..., 0] + 0.5) / count, first, last, knots[..., 0], knots[..., -1]

    @staticmethod
    def log_density(z: Tensor, knots: Tensor) -> Tensor:
        """Log density.

        Args:
            z: Standardised score.
            knots: Quantiles, increasing in the last dimension, shape (..., J).
        """
        _, width, _, first, last, start, end = Quantiles._place(z, knots)
        beyond = (start - z).clamp(min=0) / first + (z - end).clamp(min=0) / last
        return -math.log(knots.shape[-1]) - width.log() - beyond

    @staticmethod
    def cdf(z: Tensor, knots: Tensor) -> Tensor:
        """P(S ≤ z).

        Args:
            z: Standardised score.
            knots: Quantiles, increasing in the last dimension, shape (..., J).
        """
        low, width, level, first, last, start, end = Quantiles._place(z, knots)
        tail = 0.5 / knots.shape[-1]
        inside = level + ((z - low) / width).clamp(0, 1) / knots.shape[-1]
        left = tail * torch.exp((z - start).clamp(max=0) / first)
        right = 1 - tail * torch.exp((end - z).clamp(max=0) / last)
        return torch.where(z < start, left, torch.where(z > end, right, inside))

    @staticmethod
    def quantile(u: Tensor, knots: Tensor) -> Tensor:
        """Linear between the levels, logarithmic in the tails.

        Args:
            u: Level in (0, 1).
            knots: Quantiles, increasing in the last dimension, shape (..., J).
        """
        count = knots.shape[-1]
        lead = torch.broadcast_shapes(u.shape, knots.shape[:-1])
        u, knots = u.expand(lead), knots.expand(*lead, count)
        at = (u * count - 0.5).floor().clamp(0, count - 2).long()[..., None]
        low, high = knots.gather(-1, at)[..., 0], knots.gather(-1, at + 1)[..., 0]
        inside = low + (high - low) * (u * count - 0.5 - at[..., 0])
        first, last = (knots[..., 1] - knots[..., 0]) / 2, (knots[..., -1] - knots[..., -2]) / 2
        left = knots[..., 0] + first * torch.log(2 * count * u)
        right = knots[..., -1] - last * torch.log(2 * count * (1 - u))
        return torch.where(u < 0.5 / count, left, torch.where(u > 1 - 0.5 / count, right, inside))

    @staticmethod
    def mean(knots: Tensor) -> Tensor:
        """Mean: linear in the quantiles, as the tails are half as wide as the piece beside them."""
        tails = (knots[..., -1] - knots[..., -2] - knots[..., 1] + knots[..., 0]) / 2
        return knots.mean(-1) + (tails / 2) / knots.shape[-1]

    @staticmethod
    def moments(knots: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        count, mean = knots.shape[-1], Quantiles.mean(knots)
        q = knots - mean[..., None]
        first, last = (q[..., 1] - q[..., 0]) / 2, (q[..., -1] - q[..., -2]) / 2
        low, high = q[..., :-1], q[..., 1:]
        inside = (low.square() + low * high + high.square()).sum(-1) / 3
        left = (q[..., 0] - first).square() + first.square()
        right = (q[..., -1] + last).square() + last.square()
        return mean, torch.sqrt((inside + (left + right) / 2) / count)

    @staticmethod
    def crps(z: Tensor, knots: Tensor) -> Tensor:
        """In closed form: z (2F − 1) + mean − 2∫_0^F Q du − ∫ F (1 − F).

        Args:
            z: Standardised score.
            knots: Quantiles, increasing in the last dimension, shape (..., J).
        """
        count = knots.shape[-1]
        low, _, level, first, last, start, end = Quantiles._place(z, knots)
        mean, u = Quantiles.mean(knots), Quantiles.cdf(z, knots)
        pieces = (knots[..., :-1] + knots[..., 1:]) / (2 * count)
        tail = (knots[..., 0] - (knots[..., 1] - knots[..., 0]) / 2) / (2 * count)
        area = torch.cat([tail[..., None], pieces], -1).cumsum(-1).expand(*low.shape, count)
        at = (level * count - 0.5).round().long().clamp(0, count - 2)
        inside = area.gather(-1, at[..., None])[..., 0] + (u - level) * (low + z) / 2
        below = torch.where(z < start, u * (z - first), torch.where(z > end, mean - (1 - u) * (z + last), inside))
        a = Quantiles.levels(knots)
        a, b = a[:-1], a[1:]
        spread = (knots.diff(dim=-1) * ((a + b) / 2 - (a.square() + a * b + b.square()) / 3)).sum(-1)
        edge = 0.5 / count
        tails = (knots[..., 1] - knots[..., 0] + knots[..., -1] - knots[..., -2]) / 2 * (edge - edge**2 / 2)
        return z * (2 * u - 1) + mean - 2 * below - spread - tails

    @staticmethod
    def draw(u: Tensor, v: Tensor, knots: Tensor) -> Tensor:
        """The quantile at one uniform number; the second is not used.

        Args:
            u: Uniform number in [0, 1).
            v: Not looked at.
            knots: Quantiles, increasing in the last dimension, shape (..., J).
        """
        return Quantiles.quantile(u.clamp(1e-12, 1 - 1e-12), knots)
