"""How good fitted score distributions are, on prompts they were not fitted to.

The prompt is the unit throughout: folds, bootstrap draws and tests take whole prompts, since the seeds and the
step counts of one prompt are not independent of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgesched.data.bootstrap import prompt_counts
from edgesched.data.table import ScoreTable
from edgesched.errors import ScoreTableError
from edgesched.quality.model import QualityModel, observations
from edgesched.quality.offsets import cell_means

if TYPE_CHECKING:
    import pandas as pd

COVERAGES = (50, 80, 95)
_EDGE = 1e-9
Fit = Callable[[ScoreTable], QualityModel]


def score_rows(model: QualityModel, table: ScoreTable) -> pd.DataFrame:
    """Judge every row of a table by fitted distributions.

    Args:
        model: Fitted distributions.
        table: Rows of held-out prompts; categories, models and step counts must be known to the model.

    Returns:
        The columns ``prompt_id category model steps seed score`` with, for every row, ``nll`` (nats), ``crps``
        (score points) and ``pit``, the probability integral transform P(S ≤ score).

    Raises:
        ScoreTableError: If the model knows nothing of a row's category, model or step count.
    """
    data = observations(table, model.models, model.categories, model.step_counts)
    unknown = ~model.measured.cpu()[data.model, data.step]
    if bool(unknown.any()):
        row = table.frame.iloc[int(unknown.int().argmax())]
        raise ScoreTableError(f"{row['model']!r} at {row['steps']} steps: the model was not fitted there")
    index = (data.score, data.category, data.model, data.step)
    frame = table.frame[["prompt_id", "category", "model", "steps", "seed"]].copy()
    with torch.no_grad():
        frame["score"] = data.score.numpy()
        frame["nll"] = -model.log_density(*index).numpy()
        frame["crps"] = model.crps(*index).numpy()
        frame["pit"] = model.cdf(*index).numpy()
    return frame


def out_of_fold(table: ScoreTable, fit: Fit, folds: int = 5) -> pd.DataFrame:
    """Judge every row by a fit to the other folds; no prompt is in two folds.

    Args:
        table: Rows.
        fit: Makes fitted distributions of a table, e.g. ``functools.partial(fit_quality, family="student_t")``.
        folds: Folds; prompts go to them by a hash of their id, in turn within each category.

    Returns:
        As :func:`score_rows`, for all rows in the table's order.

    Raises:
        ScoreTableError: If there are fewer than two folds, or more folds than prompts in a category.
    """
    import pandas as pd

    home = table.frame.drop_duplicates("prompt_id").set_index("prompt_id")["category"]
    least = int(home.value_counts().min())
    if not 2 <= folds <= least:
        raise ScoreTableError(f"folds: expected 2 to {least}, the prompts of the smallest category, got {folds}")
    fold_of: dict[str, int] = {}
    for category in table.categories:
        ids = sorted(home.index[home == category], key=lambda pid: hashlib.sha256(str(pid).encode()).digest())
        fold_of |= {pid: i % folds for i, pid in enumerate(ids)}
    fold = table.frame["prompt_id"].map(fold_of)
    parts = []
    for f in range(folds):
        model = fit(table.replaced(table.frame[fold != f]))
        held = table.frame[fold == f]
        part = score_rows(model, table.replaced(held))
        parts.append(part.set_index(held.index))
    return pd.concat(parts).sort_index()


def prompt_draws(rows: pd.DataFrame, draws: int = 1000, seed: int = 0) -> tuple[pd.Index, np.ndarray]:
    """Bootstrap draws over prompts within categories: ids (prompts,), and weights (draws, prompts) of mean 1.

    Args:
        rows: From :func:`score_rows` or :func:`out_of_fold`.
        draws: Bootstrap draws.
        seed: Seed of the draws.
    """
    home = rows.drop_duplicates("prompt_id").set_index("prompt_id")["category"].sort_index()
    generator = np.random.default_rng(seed)
    weights = np.empty((draws, len(home)))
    for category in home.unique():
        mine = (home == category).to_numpy()
        count = int(mine.sum())
        weights[:, mine] = prompt_counts(generator, count, draws)
    return home.index, weights


def summarise(rows: pd.DataFrame, draws: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Means over held-out prompts, with bootstrap intervals over prompts.

    Args:
        rows: From :func:`score_rows` or :func:`out_of_fold`.
        draws: Bootstrap draws.
        seed: Seed of the draws.
        level: Level of the intervals.

    Returns:
        ``nll``, ``crps``, ``coverage_50``, ``coverage_80`` and ``coverage_95`` (shares of scores inside the
        central intervals of that nominal level), and ``intervals``, each by the same keys as (low, high).
    """
    values = _values(rows)
    per_prompt = values.groupby(rows["prompt_id"]).mean().sort_index()
    ids, weights = prompt_draws(rows, draws, seed)
    drawn = weights @ per_prompt.loc[ids].to_numpy() / len(ids)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    means = per_prompt.mean()
    summary: dict[str, Any] = {str(k): float(v) for k, v in means.items()}
    summary["intervals"] = {str(k): (float(a), float(b)) for k, a, b in zip(per_prompt.columns, low, high, strict=True)}
    return summary


def _values(rows: pd.DataFrame) -> pd.DataFrame:
    values = rows[["nll", "crps"]].copy()
    for level in COVERAGES:
        values[f"coverage_{level}"] = ((rows["pit"] - 0.5).abs() <= level / 200).astype(float)
    return values


def coverage_by(rows: pd.DataFrame, column: str) -> dict[str, dict[str, float]]:
    """Coverage of the 50, 80 and 95 % intervals by a column: group → ``coverage_50`` and so on.

    Args:
        rows: From :func:`score_rows` or :func:`out_of_fold`.
        column: Name of the column that groups them.
    """
    values = _values(rows).drop(columns=["nll", "crps"])
    means = values.groupby(rows[column], sort=False).mean()
    return {str(name): {k: float(v) for k, v in row.items()} for name, row in means.to_dict("index").items()}


def compare_crps(
    ours: pd.DataFrame, other: pd.DataFrame, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean CRPS of one family less that of another on the same prompts: value, and its 95 % paired interval.

    Args:
        ours: Rows of one family, from :func:`score_rows` or :func:`out_of_fold`.
        other: Rows of the other.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        ScoreTableError: If the prompts differ.
    """
    a, b = (rows.groupby("prompt_id")["crps"].mean().sort_index() for rows in (ours, other))
    if not a.index.equals(b.index):
        raise ScoreTableError("the two families were judged on different prompts")
    ids, weights = prompt_draws(ours, draws, seed)
    difference = (a - b).loc[ids].to_numpy()
    low, high = np.quantile(weights @ difference / len(ids), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def in_order(rows: pd.DataFrame, table: ScoreTable) -> pd.DataFrame:
    """Rows by the table's order of categories, then of models, so that what is told of them follows it.

    Args:
        rows: With columns ``category`` and ``model``.
        table: Says the orders.
    """
    places = {name: i for names in (table.categories, table.models or ()) for i, name in enumerate(names)}
    return rows.sort_values(["category", "model"], key=lambda names: names.map(places), kind="stable")


def pit_tests(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Tests that the PIT is uniform, two for every category and model, on one row of every prompt.

    The row is the prompt's first seed at the model's largest step count. Kolmogorov–Smirnov looks at everything at
    once, with little power against a skewed shape; Shapiro–Wilk on the normal scores Φ⁻¹(PIT) looks at the shape alone,
    whatever the fitted location and scale. P-values are corrected by Holm's method for the number of all of them.

    Args:
        rows: From :func:`score_rows` or :func:`out_of_fold`, on held-out prompts.

    Returns:
        Dictionaries with ``category model prompts steps statistic p p_holm p_shape p_shape_holm p_least``, the last
        the smaller of the two corrected ones, in the order of the rows.
    """
    from scipy.stats import kstest, norm, shapiro

    tests: list[dict[str, Any]] = []
    for (category, model), mine in rows.groupby(["category", "model"], sort=False):
        steps = int(mine["steps"].max())
        one = mine[mine["steps"] == steps].sort_values("seed").drop_duplicates("prompt_id")
        pit = one["pit"].to_numpy()
        found = kstest(pit, "uniform")
        scores = norm.ppf(pit.clip(_EDGE, 1 - _EDGE))
        shape = shapiro(scores).pvalue if len(pit) >= 3 and np.ptp(scores) > 0 else 1.0
        tests.append(
            {"category": str(category), "model": str(model), "prompts": len(one), "steps": steps,
             "statistic": float(found.statistic), "p": float(found.pvalue), "p_shape": float(shape)}
        )  # fmt: skip
    corrected = holm([t["p"] for t in tests] + [t["p_shape"] for t in tests])
    for i, test in enumerate(tests):
        test["p_holm"], test["p_shape_holm"] = corrected[i], corrected[len(tests) + i]
        test["p_least"] = min(test["p_holm"], test["p_shape_holm"])
    return tests


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method (Scand. J. Statistics 6, 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    corrected = np.maximum.accumulate([(len(p) - i) * p[j] for i, j in enumerate(order)]).clip(max=1.0)
    result = np.empty(len(p))
    result[order] = corrected
    return [float(v) for v in result]


def non_gaussian_words(tests: Sequence[Mapping[str, Any]], level: float = 0.05) -> str:
    """Which categories are not Gaussian, as a sentence or two, from the tests of the Gaussian family.

    Args:
        tests: From :func:`pit_tests`.
        level: A corrected p-value below this tells a category from a Gaussian.
    """
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for test in tests:
        by_category.setdefault(test["category"], []).append(test)
    rejected, kept = [], []
    for category, mine in by_category.items():
        bad = [t for t in mine if t["p_least"] < level]
        if not bad:
            kept.append(category)
            continue
        models = "every model" if len(bad) == len(mine) else _listed([t["model"] for t in bad])
        worst = max(t["p_least"] for t in bad)
        rejected.append(f"{category} under {models} (p {'≤' if len(bad) > 1 else '='} {worst:.2g})")
    words = f"Not Gaussian: {'; '.join(rejected)}." if rejected else "The tests tell no category from a Gaussian."
    if kept and rejected:
        words += f" The test does not tell {_listed(kept)} from a Gaussian."
    count = int(np.median([t["prompts"] for t in tests]))
    return (
        f"{words} Kolmogorov–Smirnov and Shapiro–Wilk tests on {count} held-out prompts per category (median), "
        f"Holm-corrected over both and {len(tests)} pairs."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def standard_errors(model: QualityModel, table: ScoreTable, of: str = "mean") -> Tensor:
    r"""Standard errors of fitted means or deviations, robust to dependence within a prompt.

    Each category and model has parameters θ of its own; with per-prompt gradients g_p and Hessian H of the
    weighted loss, Cov θ = n/(n − 1) · H⁻¹ (Σ_p g_p g_pᵀ) H⁻¹, and the delta method carries it to the mean
    or deviation at every step count. Source: White, Econometrica 50 (1982).

    Args:
        model: Distributions fitted to ``table``.
        table: The rows they were fitted to.
        of: ``"mean"`` or ``"std"``.

    Returns:
        Standard errors in score points, shape (C, M, K).

    Raises:
        ScoreTableError: If ``of`` is neither, or rows are unknown to the model.
    """
    if of not in ("mean", "std"):
        raise ScoreTableError(f"of: {of!r} is not one of mean, std")
    own = observations(table, model.models, model.categories, model.step_counts)
    data = own.shrunk(model.strength)
    blocks = [value.detach().reshape(*model.top.shape, -1) for _, value in model.named_parameters()]
    sizes = [block.shape[-1] for block in blocks]
    theta = torch.cat(blocks, -1)

    def unpack(packed: Tensor) -> dict[str, Tensor]:
        parts = packed.split(sizes, -1)
        free = {
            n: part if value.ndim == 3 else part[..., 0]
            for (n, value), part in zip(model.named_parameters(), parts, strict=True)
        }
        by_row = packed.ndim == 2
        return free | {n: value[data.category, data.model] if by_row else value for n, value in model.fixed.items()}

    def losses(packed: Tensor) -> Tensor:
        cells = model.cells(unpack(packed), data.model, data.step)
        return model.row_loss(data.score, cells[1:]) * data.weight

    per_row = theta[data.category, data.model].requires_grad_()
    (row_gradient,) = torch.autograd.grad(losses(per_row).sum(), per_row)
    c, m, size = theta.shape
    prompts = int(own.prompt.max()) + 1
    place = (data.prompt * c + data.category) * m + data.model
    gradient = theta.new_zeros(prompts * c * m, size).index_add_(0, place, row_gradient).view(prompts, c, m, size)
    outer = torch.einsum("pcmd,pcme->cmde", gradient, gradient) * prompts / (prompts - 1)
    whole = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses(whole[data.category, data.model]).sum(), whole, create_graph=True)
    hessian = torch.stack(
        [torch.autograd.grad(slope[..., d].sum(), whole, retain_graph=True)[0] for d in range(size)], -2
    )
    inverse = torch.linalg.pinv(hessian, rtol=1e-9, hermitian=True)
    covariance = inverse @ outer @ inverse
    by_model = torch.arange(m).expand(c, m)
    errors = []
    for k in range(len(model.step_counts)):
        mean, _, scale, *shape = model.cells(unpack(whole), by_model, torch.full((c, m), k))
        value = mean if of == "mean" else scale * model.law.moments(*shape)[1]
        (jacobian,) = torch.autograd.grad(value.sum(), whole)
        errors.append(torch.einsum("cmd,cmde,cme->cm", jacobian, covariance, jacobian).clamp(min=0).sqrt())
    found = torch.stack(errors, -1)
    # Offsets are contrasts of step counts, whose noise is apart from that of the curve's level.
    return (found.square() + (model.unit * model.offset_error).square()).sqrt() if of == "mean" else found


def cell_misfit(model: QualityModel, table: ScoreTable) -> list[dict[str, Any]]:
    """How far fitted means are from measured ones, cell by cell.

    Args:
        model: Fitted distributions.
        table: Rows; categories, models and step counts must be known to the model.

    Returns:
        Dictionaries with ``category model steps measured fitted misfit error offset``, in points, worst first: the
        misfit is measured less fitted, ``error`` the standard error of the measured mean over prompts, and ``offset``
        what the model keeps of the distance from its saturating curve.

    Raises:
        ScoreTableError: If the model knows nothing of a row's category, model or step count.
    """
    data = observations(table, model.models, model.categories, model.step_counts)
    measured, covariance = cell_means(data, (len(model.categories), len(model.models), len(model.step_counts)))
    error = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    with torch.no_grad():
        fitted, offset = model.mean(), model.unit * model.offset
    seen = torch.zeros(measured.shape, dtype=torch.bool)
    seen[data.category, data.model, data.step] = True
    cells = [
        {"category": model.categories[c], "model": model.models[m], "steps": model.step_counts[k],
         "measured": float(measured[c, m, k]), "fitted": float(fitted[c, m, k]),
         "misfit": float(measured[c, m, k] - fitted[c, m, k]), "error": float(error[c, m, k]),
         "offset": float(offset[c, m, k])}
        for c, m, k in seen.nonzero().tolist()
    ]  # fmt: skip
    return sorted(cells, key=lambda cell: -abs(cell["misfit"]))
