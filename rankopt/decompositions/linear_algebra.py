"""Linear algebra of all fits: roots of a metric, leading singular vectors, and factors that are balanced."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from rankopt.decompositions.types import Factors


def roots(metric: Tensor, least: float = 1e-4) -> tuple[Tensor, Tensor]:
    """H^½ and its inverse, (g, t, t) each.

    Small eigenvalues are raised, so that the inverse exists and full rank stays exact.

    Args:
        metric: H (g, t, t), symmetric positive semidefinite.
        least: The least eigenvalue, as a share of the largest.
    """
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(least * values.amax(-1, keepdim=True).clamp_min(1e-30)).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Fill a tensor (g, ...) up with zeros to (g, *shape).

    Args:
        tensor: The tensor.
        shape: The shape of each group.
    """
    missing = [(0, size - have) for size, have in zip(shape, tensor.shape[1:], strict=True)]
    return torch.nn.functional.pad(tensor, [n for pair in reversed(missing) for n in pair])


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale two factors so that the singular values of their product are split evenly; the product stays.

    Fits in a metric leave factors badly scaled, from which training makes no progress.

    Args:
        left: Tensor (g, a, r).
        right: Tensor (g, r, b).
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    root = s.sqrt()
    new_left = (q_left @ u) * root.unsqueeze(-2)
    new_right = root.unsqueeze(-1) * (vh @ q_right.mT)
    short = right.shape[-2] - new_right.shape[-2]  # pad with zeros if r exceeds the rank of the product
    if short > 0:
        new_left = torch.nn.functional.pad(new_left, (0, short))
        new_right = torch.nn.functional.pad(new_right, (0, 0, 0, short))
    return new_left, new_right


def cut(left: Tensor, right: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Factors:
    """The balanced factors of one rank (`types.Nested`).

    Args:
        left: Tensor (g, T, R).
        right: Tensor (g, R, n).
        shapes: The shapes of the two factors, input first: (g r, ...) and (T, r, ...).
        dtype: Their precision.
    """
    rank = shapes[1][1]
    second, first = balanced(left[..., :rank], right[..., :rank, :])
    return tuple(f.reshape(*s).to(dtype).contiguous() for f, s in zip((first, second), shapes, strict=True))


def balanced_bond(left: Tensor, left_dim: int, right: Tensor, right_dim: int) -> tuple[Tensor, Tensor]:
    """Balance two cores along the bond between them.

    Args:
        left: Core (g, ...).
        left_dim: Dimension of `left` that is the bond.
        right: Core (g, ...).
        right_dim: Dimension of `right` that is the bond.
    """
    before, after = left.movedim(left_dim, -1), right.movedim(right_dim, 1)
    new_left, new_right = balanced(before.flatten(1, -2), after.flatten(2))
    return new_left.view(before.shape).movedim(-1, left_dim), new_right.view(after.shape).movedim(1, right_dim)


def equal_norms(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Scale the vectors of each component to the same norm; their product stays.

    Args:
        vectors: One tensor (g, r, size) per mode.
    """
    norms = [v.norm(dim=-1, keepdim=True) for v in vectors]
    mean = reduce(torch.mul, norms) ** (1 / len(vectors))
    return [v * (mean / n.clamp_min(1e-300)) for v, n in zip(vectors, norms, strict=True)]


def leading_rows(matrix: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of a matrix as rows of unit norm, (g, rank, b).

    Args:
        matrix: Tensor (g, a, b).
        rank: Number of rows; beyond min(a, b) they are unit vectors.
    """
    return first_rows(singular_rows(matrix), rank)


def singular_rows(matrix: Tensor) -> Tensor:
    """The right singular vectors of a matrix as rows, the leading ones first, scaled by their singular values.

    Args:
        matrix: Tensor (g, a, b).

    Returns:
        Tensor (g, min(a, b), b).
    """
    if matrix.shape[-2] <= matrix.shape[-1]:
        return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1).mT @ matrix
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).flip(-1).mT.contiguous()


def first_rows(rows: Tensor, rank: int) -> Tensor:
    """The first of some rows, scaled to unit norm, (g, rank, b).

    Args:
        rows: Tensor (g, m, b).
        rank: Number of rows; beyond m they are unit vectors.
    """
    rows = rows[:, :rank]
    if rows.shape[-2] < rank:
        extra = torch.eye(rank, rows.shape[-1], dtype=rows.dtype, device=rows.device)
        rows = torch.cat([rows, extra[: rank - rows.shape[-2]].expand(len(rows), -1, -1)], -2)
    return torch.nn.functional.normalize(rows, dim=-1)


def leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a matrix, (a, rank).

    Args:
        matrix: Tensor (a, b).
        rank: Number of vectors, at most a.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1)[:, :rank]
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
