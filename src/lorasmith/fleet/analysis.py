"""What a fleet is made of: groups, outliers, duplicates, a map; and one adapter against another.

All of it rests on inner products of ΔW (``similarity``), so that none of it depends on how an
adapter factored its ΔW.

* :func:`clusters`: agglomerative clustering over 1 − cosine (``scipy.cluster.hierarchy``,
  average linkage), cut at a number of groups, at a height, or, by default, in the widest gap
  between heights at which groups are joined, and never above 1 − cosine = 0.95.
* :func:`outliers`: the one-sided generalised extreme studentised deviate test (Rosner 1983,
  "Percentage points for a generalized ESD many-outlier procedure", Technometrics 25) on two
  scores of each adapter. With x the scores, in round i the largest x is taken out of the n that
  are left, and

      R_i = (max x − x̄) / sd(x)        λ_i = t (n − 1) / √((n − 2 + t²) n)

      t: the 1 − α / n quantile of Student's t with n − 2 degrees of freedom

  The outliers are all that were taken out up to the last i with R_i > λ_i. Student's t is what
  makes it work for small fleets: it is the exact null distribution of one deviate, so that five
  adapters can yield one (R must exceed 1.67 of at most 1.79 then), where "beyond two
  standard deviations" never can, since no R of five values exceeds 1.79. Several rounds, so that
  two outliers do not hide each other. Scores: *direction*, the mean of 1 − cosine to the others
  (an outlier moves everybody else's score alike, which the test does not see; the median of so
  few raised up to 11 % false alarms), and *size*, ln ‖ΔW‖ to either side. α is shared among
  the three tests (Bonferroni). A statistical difference that is practically none is not
  reported: at least ``min_gap`` of cosine, or a factor of 1.25 in size. An adapter that does
  nothing (ΔW = 0) is always ``"small"`` where most others do something; it has no direction,
  and so no part in the first score.
* :func:`diff`: two adapters layer by layer, exactly: differences through QR of both factors
  side by side in float64, and principal angles of column and row spaces.
* :func:`coverage`: the share of ‖ΔW‖² inside given subspaces, ‖U Uᵀ ΔW Vᵀ V‖² / ‖ΔW‖².
* :func:`redundancy`: pairs of which one can stand in for the other (relative distance at most
  the threshold), or that both are near enough to their mean (at most twice that: the mean is
  half their distance away from either).
* :func:`embedding`: classical multidimensional scaling (Torgerson 1952) of the unit vectors
  ΔW / ‖ΔW‖, from the eigenvectors of the centred cosines.

ΔW = 0 has the cosine 0 with everything, itself included: in clusters it is a group by itself, on
the map it is the origin of the unit vectors, and two such adapters stand in for each other.
There is nothing of it to cover, so that all of it is covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lorasmith.errors import ConfigError, MissingDependencyError
from lorasmith.fleet.members import Member, Source, default_ids, open_members
from lorasmith.fleet.similarity import SimilarityMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Clusters",
    "Coverage",
    "Diff",
    "Embedding",
    "LayerCoverage",
    "LayerDiff",
    "Outlier",
    "Outliers",
    "Redundancy",
    "clusters",
    "coverage",
    "diff",
    "embedding",
    "outliers",
    "redundancy",
]

_Array: TypeAlias = "NDArray[np.float64]"
_Progress: TypeAlias = Callable[[str, int, int], None] | None

#: Fewest adapters among which an outlier can be told: of three, any one is far from the others.
FEWEST = 4
#: Parts into which α is divided: three tests, and one that small fleets overdraw. Scores that
#: share pairs are not quite normal: at a nominal 1.7 % the direction test alone raised 2 to 3 %
#: false alarms in simulated fleets of 4 to 30.
_TESTS = 4
#: Directions below this share of a layer's largest singular value are rounding.
_NOISE = 1e-6
#: 1 − cosine from which adapters have nothing to do with each other. Of adapters trained on
#: different tasks it is 0.94 and more, on one task with different seeds and ranks 0.5 to 0.8.
_UNRELATED = 0.95
_LINKAGES = ("average", "complete", "single")


def _scipy(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"scipy.{name}")
    except ImportError as error:
        raise MissingDependencyError(
            "The analysis of fleets needs SciPy, which is not installed.",
            fix='pip install "lorasmith[fleet]"',
        ) from error


# Clusters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clusters:
    """Groups of similar adapters.

    Attributes:
        ids: The adapters, in the order of the matrix.
        labels: Number of each adapter's group, from 0, in the order in which they appear.
        groups: Names of the members of each group.
        merges: SciPy's linkage matrix [N − 1, 4] over 1 − cosine.
        order: Rows in the order of the dendrogram's leaves, similar ones side by side.
        height: 1 − cosine at which the dendrogram is cut; groups joined below are one.
        method: Linkage.
    """

    ids: tuple[str, ...]
    labels: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]
    merges: _Array
    order: tuple[int, ...]
    height: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {
            "groups": [list(g) for g in self.groups],
            "labels": dict(zip(self.ids, self.labels, strict=True)),
            "height": self.height,
            "method": self.method,
            "merges": self.merges.tolist(),
            "order": [self.ids[i] for i in self.order],
        }


def clusters(
    similar: SimilarityMatrix,
    *,
    count: int | None = None,
    threshold: float | None = None,
    method: Literal["average", "complete", "single"] = "average",
) -> Clusters:
    """Groups of adapters with similar directions.

    Args:
        similar: The inner products.
        count: Number of groups (fewer where several are equally far apart).
        threshold: 1 − cosine up to which groups are joined, in [0, 2]. Without it and
            ``count`` the cut is in the widest gap between two heights of the dendrogram, or
            above all of them, and at most at 0.95.
        method: How far groups are apart: by the mean, the largest, or the least of 1 − cosine.

    Raises:
        ConfigError: If both are given or one is out of range.
        MissingDependencyError: SciPy is not installed.
    """
    n = len(similar)
    if count is not None and threshold is not None:
        raise ConfigError(
            "Give the number of groups or the height of the cut, not both.", key="threshold"
        )
    if count is not None and not (type(count) is int and 1 <= count <= n):
        raise ConfigError(
            "That many groups are not possible.",
            expected=f"1 to {n}",
            got=repr(count),
            key="clusters",
        )
    if threshold is not None and not 0 <= threshold <= 2:
        raise ConfigError(
            "The height of the cut is not a distance 1 − cosine.",
            expected="0 to 2",
            got=repr(threshold),
            key="threshold",
        )
    if method not in _LINKAGES:
        raise ConfigError(
            "There is no such linkage.",
            expected=", ".join(_LINKAGES),
            got=repr(method),
            key="method",
        )
    if n == 1:
        height = 0.0 if threshold is None else float(threshold)
        return Clusters(similar.ids, (0,), (similar.ids,), np.zeros((0, 4)), (0,), height, method)
    hierarchy, spatial = _scipy("cluster.hierarchy"), _scipy("spatial.distance")
    gaps = 1.0 - similar.cosine
    np.fill_diagonal(gaps, 0.0)
    gaps = np.clip((gaps + gaps.T) / 2, 0.0, 2.0)
    condensed = spatial.squareform(gaps, checks=False)
    merges = hierarchy.linkage(condensed, method=method, optimal_ordering=n <= 500)
    if threshold is not None:
        height = float(threshold)
    elif count is not None:
        height = _height_of(merges[:, 2], count)
    else:
        height = _widest_gap(merges[:, 2])
    found = hierarchy.fcluster(merges, t=height, criterion="distance")
    numbers: dict[int, int] = {}
    labels = tuple(numbers.setdefault(int(k), len(numbers)) for k in found)
    groups = tuple(
        tuple(name for name, label in zip(similar.ids, labels, strict=True) if label == k)
        for k in range(len(numbers))
    )
    order = tuple(int(i) for i in hierarchy.leaves_list(merges))
    return Clusters(similar.ids, labels, groups, merges, order, height, method)


def _height_of(heights: _Array, count: int) -> float:
    """Between the merge that leaves ``count`` groups and the next one."""
    n = len(heights) + 1
    below = heights[n - count - 1] if count < n else 0.0
    above = heights[n - count] if count > 1 else below + 1.0
    return float((below + above) / 2) if above > below else float(below)


def _widest_gap(heights: _Array) -> float:
    """The middle of the widest gap between two heights, or between the last and ``_UNRELATED``.

    What is joined above that is no group, so that a fleet of unrelated adapters has none, and
    one of nearly equal ones is a single group.
    """
    edges = np.minimum(np.append(heights, _UNRELATED), _UNRELATED)
    gaps = np.diff(edges)
    place = int(np.argmax(gaps))
    return float((edges[place] + edges[place + 1]) / 2)


# Outliers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlier:
    """An adapter unlike the rest of the fleet.

    Attributes:
        id: Its name.
        kind: ``"direction"``, ``"large"`` or ``"small"``.
        score: Mean of 1 − cosine to the others, or ‖ΔW‖.
        typical: Median of that over the others.
        deviate: R of the test when it was taken out; infinite if it does nothing at all.
        critical: λ, which R had to exceed.
    """

    id: str
    kind: str
    score: float
    typical: float
    deviate: float
    critical: float


@dataclass(frozen=True)
class Outliers:
    """Result of :func:`outliers`.

    Attributes:
        found: The outliers, of each kind the most extreme one first.
        scores: Adapter → mean of 1 − cosine to the others that do something; 1 if it does
            nothing itself, 0 if there are no others.
        norms: Adapter → ‖ΔW‖.
        alpha: Chance of any false alarm in a fleet without outliers.
        reason: Why nothing could be tested, or ``None``.
    """

    found: tuple[Outlier, ...]
    scores: Mapping[str, float]
    norms: Mapping[str, float]
    alpha: float
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {
            "outliers": [
                {**asdict(o), "deviate": o.deviate if math.isfinite(o.deviate) else None}
                for o in self.found
            ],
            "scores": dict(self.scores),
            "norms": dict(self.norms),
            "alpha": self.alpha,
            "reason": self.reason,
        }


def outliers(
    similar: SimilarityMatrix,
    *,
    alpha: float = 0.05,
    min_gap: float = 0.05,
    most: int | None = None,
) -> Outliers:
    """Adapters that are unlike the rest of the fleet, in direction or in size.

    Args:
        similar: The inner products.
        alpha: Chance of any false alarm where there is no outlier.
        min_gap: Least difference of 1 − cosine from the typical adapter that is reported.
        most: Largest number of outliers of a kind that is looked for; a quarter of the fleet
            by default, at least 1.

    Raises:
        ConfigError: If ``alpha``, ``min_gap`` or ``most`` is out of range.
        MissingDependencyError: SciPy is not installed.
    """
    n = len(similar)
    if not 0 < alpha < 1:
        raise ConfigError(
            "alpha is not a chance.", expected="0 < alpha < 1", got=alpha, key="alpha"
        )
    if not min_gap >= 0:
        raise ConfigError("min_gap is negative.", got=min_gap, key="min_gap")
    if most is not None and not (type(most) is int and most >= 1):
        raise ConfigError("most is not a number of adapters.", got=repr(most), key="most")
    moving = similar.norms > 0
    gaps = 1.0 - similar.cosine[:, moving]
    # To itself 1 − cosine is 0, or it is not among them.
    scores = gaps.sum(axis=1) / np.maximum(moving.sum() - moving, 1)
    known = dict(zip(similar.ids, scores.tolist(), strict=True))
    norms = dict(zip(similar.ids, similar.norms.tolist(), strict=True))
    if n < FEWEST:
        return Outliers(
            (), known, norms, alpha, f"an outlier cannot be told among fewer than {FEWEST} adapters"
        )
    if not moving.any():
        return Outliers((), known, norms, alpha, "no adapter does anything")
    rounds = max(1, n // 4) if most is None else most
    sized = np.flatnonzero(moving).tolist()
    found: list[Outlier] = []
    if len(sized) >= FEWEST:
        for at, deviate, critical in _extreme(
            scores[sized], min(rounds, len(sized) - 3), alpha / _TESTS
        ):
            place, rest = sized[at], np.delete(scores[sized], at)
            score, typical = float(scores[place]), float(np.median(rest))
            if score - typical >= min_gap:
                found.append(
                    Outlier(similar.ids[place], "direction", score, typical, deviate, critical)
                )
    typical = float(np.median(similar.norms))
    found.extend(
        Outlier(similar.ids[place], "small", 0.0, typical, math.inf, 0.0)
        for place in np.flatnonzero(~moving).tolist()
        if typical
    )
    if len(sized) >= FEWEST:
        logs = np.log(similar.norms[sized])
        for kind, sign in (("large", 1.0), ("small", -1.0)):
            for at, deviate, critical in _extreme(
                sign * logs, min(rounds, len(sized) - 3), alpha / _TESTS
            ):
                typical = float(np.median(np.delete(logs, at)))
                if abs(float(logs[at]) - typical) >= math.log(1.25):
                    norm = float(similar.norms[sized[at]])
                    found.append(
                        Outlier(
                            similar.ids[sized[at]], kind, norm, math.exp(typical), deviate, critical
                        )
                    )
    return Outliers(tuple(found), known, norms, alpha)


def _extreme(values: _Array, rounds: int, alpha: float) -> list[tuple[int, float, float]]:
    """(place, R, λ) of the values that are too large, by Rosner's test to one side."""
    student = _scipy("stats").t
    left = list(range(len(values)))
    taken: list[tuple[int, float, float]] = []
    last = 0
    for number in range(1, rounds + 1):
        here = values[left]
        spread = float(here.std(ddof=1))
        n = len(left)
        # Equal up to rounding: nothing stands out.
        if spread <= 1e-12 * max(1.0, float(np.abs(here).max())):
            break
        place = left[int(np.argmax(here))]
        deviate = float((values[place] - here.mean()) / spread)
        t = float(student.ppf(1 - alpha / n, n - 2))
        critical = t * (n - 1) / math.sqrt((n - 2 + t * t) * n)
        taken.append((place, deviate, critical))
        if deviate > critical:
            last = number
        left.remove(place)
    return taken[:last]


# Redundancy and the map --------------------------------------------------------------------------


@dataclass(frozen=True)
class Redundancy:
    """Two adapters of which one is enough.

    Attributes:
        keep: The one to keep: that which is nearer to the rest of its kind.
        other: The other one.
        action: ``"drop"``: ``keep`` stands in for ``other``, with ``error``. ``"merge"``: the
            mean of both stands in for either, with ``error``.
        distance: ‖ΔW − ΔW'‖ / max(‖ΔW‖, ‖ΔW'‖).
        cosine: Of the two.
        error: Relative error that follows for the adapter that is replaced.
    """

    keep: str
    other: str
    action: str
    distance: float
    cosine: float
    error: float


def redundancy(similar: SimilarityMatrix, *, threshold: float = 0.1) -> tuple[Redundancy, ...]:
    """Pairs of adapters of which one is enough, the nearest pair first.

    Each adapter is given up at most once, and none that another one is given up for.

    Args:
        similar: The inner products.
        threshold: Relative error of an adapter that would be acceptable.

    Raises:
        ConfigError: If the threshold is not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(
            "The threshold is not a relative error.",
            expected="0 to 1",
            got=repr(threshold),
            key="threshold",
        )
    gaps, cosine = similar.relative_distances, similar.cosine
    pairs = [
        (float(gaps[i, j]), i, j)
        for i in range(len(similar))
        for j in range(i + 1, len(similar))
        if gaps[i, j] <= 2 * threshold
    ]
    found: list[Redundancy] = []
    gone: set[int] = set()
    kept: set[int] = set()
    merged: set[int] = set()
    for gap, i, j in sorted(pairs):
        if {i, j} & (gone | merged):
            continue
        # The more central of the two stays, unless something rests on the other one.
        keep, other = (i, j) if gaps[i].sum() <= gaps[j].sum() else (j, i)
        if other in kept:
            keep, other = other, keep
        if gap <= threshold and other not in kept:
            action, error = "drop", gap
            gone.add(other)
            kept.add(keep)
        elif not {i, j} & kept:
            action, error = "merge", gap / 2
            merged |= {i, j}
        else:
            continue
        found.append(
            Redundancy(
                similar.ids[keep], similar.ids[other], action, gap, float(cosine[i, j]), error
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Embedding:
    """Adapters as points of a plane.

    Attributes:
        ids: The adapters.
        points: [N, 2]; distances approximate √(2 − 2 cosine).
        share: Share of the variance that the plane shows, in [0, 1].
    """

    ids: tuple[str, ...]
    points: _Array
    share: float

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return {
            "points": dict(zip(self.ids, self.points.tolist(), strict=True)),
            "share": self.share,
        }


def embedding(similar: SimilarityMatrix) -> Embedding:
    """The plane in which the directions of the adapters differ most.

    Args:
        similar: The inner products.
    """
    n = len(similar)
    centre = np.eye(n) - 1.0 / n
    values, vectors = np.linalg.eigh(centre @ similar.cosine @ centre)
    values, vectors = np.clip(values[::-1], 0.0, None), vectors[:, ::-1]
    points = np.zeros((n, 2))
    count = min(2, n)
    points[:, :count] = vectors[:, :count] * np.sqrt(values[:count])
    # The sign of an eigenvector is arbitrary: the largest entry is made positive.
    for k in range(count):
        points[:, k] *= 1.0 if points[np.argmax(np.abs(points[:, k])), k] >= 0 else -1.0
    total = float(values.sum())
    return Embedding(similar.ids, points, float(values[:2].sum()) / total if total > 0 else 1.0)


# Two adapters ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDiff:
    """Two adapters on one layer.

    Attributes:
        module: Name of the layer.
        norm_a, norm_b: ‖ΔW‖ of each; 0 where it does not adapt the layer.
        difference: ‖ΔW_a − ΔW_b‖.
        relative: The same over max(‖ΔW_a‖, ‖ΔW_b‖); 0 where both are 0.
        cosine: Of the two; ``None`` where one is 0.
        rank_a, rank_b: Numerical ranks.
        output_angles: Principal angles of the column spaces in degrees, the smallest one first.
        input_angles: Those of the row spaces.
    """

    module: str
    norm_a: float
    norm_b: float
    difference: float
    relative: float
    cosine: float | None
    rank_a: int
    rank_b: int
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]


@dataclass(frozen=True)
class Diff:
    """Two adapters, layer by layer.

    Attributes:
        a, b: Their names.
        layers: One record for each layer that at least one of them adapts.
        norm_a, norm_b, difference, relative, cosine: As in :class:`LayerDiff`, of all layers.
        only_a, only_b: Layers that only one of them adapts.
        rest: Tensor beside the factors (DoRA's magnitudes, modules_to_save) → relative
            difference; ``None`` where only one has it or the shapes differ.
        notes: What the figures leave out.
    """

    a: str
    b: str
    layers: tuple[LayerDiff, ...]
    norm_a: float
    norm_b: float
    difference: float
    relative: float
    cosine: float | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    rest: Mapping[str, float | None]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return asdict(self)


def diff(
    a: Source,
    b: Source,
    *,
    allow_base_mismatch: bool = False,
    progress: _Progress = None,
) -> Diff:
    """Compares two adapters layer by layer, exactly.

    Args:
        a: The one.
        b: The other.
        allow_base_mismatch: Whether they may be of different base models.
        progress: Called with ("diff", layers done, layers).

    Raises:
        AdapterFileError: If one cannot be read.
        BaseMismatchError: If they are of different base models.
        UnsupportedFeatureError: If one has no low-rank factors.
        MissingDependencyError: SciPy is not installed.
    """
    angles = _scipy("linalg").subspace_angles
    # A mapping: each is one adapter, and a directory of several is refused with their names.
    first, second = open_members(
        dict(zip(default_ids([a, b]), [a, b], strict=True)),
        allow_base_mismatch=allow_base_mismatch,
    )
    modules = list(dict.fromkeys((*first.modules, *second.modules)))
    records = []
    inner = 0.0
    for done, module in enumerate(modules):
        left, right = (_wide(m, module) for m in (first, second))
        norm_a, norm_b = (_norm(p) for p in (left, right))
        difference = _norm(_minus(left, right))
        product = _inner(left, right)
        inner += product
        (U_a, V_a), (U_b, V_b) = (_spaces(p) for p in (left, right))
        shared = bool(U_a.shape[1] and U_b.shape[1])
        largest = max(norm_a, norm_b)
        records.append(
            LayerDiff(
                module=module,
                norm_a=norm_a,
                norm_b=norm_b,
                difference=difference,
                relative=difference / largest if largest else 0.0,
                cosine=_cosine(product, norm_a, norm_b),
                rank_a=U_a.shape[1],
                rank_b=U_b.shape[1],
                output_angles=_degrees(angles(U_a, U_b)) if shared else (),
                input_angles=_degrees(angles(V_a, V_b)) if shared else (),
            )
        )
        if progress is not None:
            progress("diff", done + 1, len(modules))
    norm_a, norm_b, difference = (
        math.sqrt(math.fsum(getattr(r, key) ** 2 for r in records))
        for key in ("norm_a", "norm_b", "difference")
    )
    notes = []
    if first.dora or second.dora:
        notes.append(
            "DoRA is compared by its low-rank part; its magnitudes stand under the other tensors"
        )
    return Diff(
        a=first.id,
        b=second.id,
        layers=tuple(records),
        norm_a=norm_a,
        norm_b=norm_b,
        difference=difference,
        relative=difference / max(norm_a, norm_b) if max(norm_a, norm_b) else 0.0,
        cosine=_cosine(inner, norm_a, norm_b),
        only_a=tuple(m for m in first.modules if m not in second.modules),
        only_b=tuple(m for m in second.modules if m not in first.modules),
        rest=_rest(first, second),
        notes=tuple(notes),
    )


_Product: TypeAlias = tuple[Tensor, Tensor]  # (A [r, d_in], B [d_out, r]), float64


def _wide(member: Member, module: str) -> _Product | None:
    if module not in member.modules:
        return None
    found = member.factors(module)
    return found.A.double(), found.B.double()


def _minus(left: _Product | None, right: _Product | None) -> _Product | None:
    if left is None or right is None:
        return left if right is None else right
    return torch.cat((left[0], right[0])), torch.cat((left[1], -right[1]), dim=1)


def _norm(product: _Product | None) -> float:
    """‖B A‖ without cancellation: of a product of two triangles."""
    if product is None:
        return 0.0
    A, B = product
    small = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T
    return float(torch.linalg.vector_norm(small))


def _inner(left: _Product | None, right: _Product | None) -> float:
    if left is None or right is None:
        return 0.0
    return float(((left[1].T @ right[1]) * (left[0] @ right[0].T)).sum())


def _cosine(inner: float, a: float, b: float) -> float | None:
    return max(-1.0, min(1.0, inner / (a * b))) if a and b else None


def _spaces(product: _Product | None) -> tuple[_Array, _Array]:
    """Orthonormal bases of column and row space [d_out, k], [d_in, k]; of numerical rank k."""
    if product is None:
        return np.zeros((0, 0)), np.zeros((0, 0))
    A, B = product
    q_out, r_out = torch.linalg.qr(B)
    q_in, r_in = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    k = int((_NOISE * S[0] < S).sum()) if S.numel() and float(S[0]) > 0 else 0
    return (q_out @ U[:, :k]).numpy(force=True), (q_in @ Vh[:k].T).numpy(force=True)


def _degrees(angles: _Array) -> tuple[float, ...]:
    return tuple(float(x) for x in np.sort(np.degrees(angles)))


def _rest(first: Member, second: Member) -> dict[str, float | None]:
    mine, theirs = first.rest, second.rest
    found: dict[str, float | None] = {}
    for key in dict.fromkeys((*mine, *theirs)):
        if key not in mine or key not in theirs:
            found[key] = None
            continue
        a, b = mine[key].double(), theirs[key].double()
        if a.shape != b.shape:
            found[key] = None
            continue
        largest = max(float(a.norm()), float(b.norm()))
        found[key] = float((a - b).norm()) / largest if largest else 0.0
    return found


# Coverage ----------------------------------------------------------------------------------------


class Subspace(Protocol):
    """What :func:`coverage` needs of a subspace, e.g. a ``SharedSubspace``."""

    @property
    def modules(self) -> Sequence[str]:
        """The layers that it has."""

    def up(self, module: str) -> Tensor:
        """U [d_out, k]."""

    def down(self, module: str) -> Tensor:
        """V [k, d_in]."""


@dataclass(frozen=True)
class LayerCoverage:
    """Shares of ‖ΔW‖² of one layer.

    Attributes:
        module: Name of the layer.
        norm: ‖ΔW‖.
        both: Share inside both spaces.
        output: Share of it whose columns are inside the column space.
        input: Share of it whose rows are inside the row space.
    """

    module: str
    norm: float
    both: float
    output: float
    input: float


@dataclass(frozen=True)
class Coverage:
    """How much of an adapter lies in a subspace.

    Attributes:
        id: The adapter.
        share: Of ‖ΔW‖² over all layers, in [0, 1]; 1 of an adapter that does nothing.
        error: √(1 − share), the relative error of its best approximation in the subspace.
        layers: The same for each layer.
        missing: Layers that the subspace does not have; nothing of them is covered.
    """

    id: str
    share: float
    error: float
    layers: tuple[LayerCoverage, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON can hold."""
        return asdict(self)


def coverage(
    source: Source, subspace: Subspace | Mapping[str, tuple[Tensor | None, Tensor | None]]
) -> Coverage:
    """The share of an adapter's ‖ΔW‖² that lies in given spaces of columns and rows.

    Args:
        source: The adapter.
        subspace: A ``SharedSubspace``; or module name → (U [d_out, k], V [l, d_in]), where
            ``None`` stands for the whole space. They need not be orthonormal.

    Raises:
        AdapterFileError: If the adapter cannot be read.
        ConfigError: If a basis does not fit its layer.
        UnsupportedFeatureError: If it has no low-rank factors.
    """
    (member,) = open_members({default_ids([source])[0]: source})
    given = (
        subspace
        if isinstance(subspace, Mapping)
        else {
            m: (subspace.up(m), subspace.down(m)) for m in subspace.modules if m in member.modules
        }
    )
    layers: list[LayerCoverage] = []
    missing: list[str] = []
    for module in member.modules:
        found = member.factors(module)
        product = found.A.double(), found.B.double()
        norm = _norm(product)
        if module not in given:
            missing.append(module)
            layers.append(LayerCoverage(module, norm, 0.0, 0.0, 0.0))
            continue
        up, down = given[module]
        d_in, d_out = found.A.shape[1], found.B.shape[0]
        for basis, size, name in ((up, (d_out, None), "U"), (down, (None, d_in), "V")):
            fits = basis is None or (
                basis.dim() == 2
                and all(w in (None, s) for w, s in zip(size, basis.shape, strict=True))
            )
            if not fits:
                assert basis is not None
                raise ConfigError(
                    f"The basis {name} does not fit the layer.",
                    expected=[s if s is not None else "any" for s in size],
                    got=list(basis.shape),
                    key=module,
                )
        A, B = product
        inside_B = B if up is None else _orthonormal(up).T @ B
        inside_A = A if down is None else A @ _orthonormal(down.T)

        def share(A: Tensor, B: Tensor, norm: float = norm) -> float:
            return min(1.0, (_norm((A, B)) / norm) ** 2) if norm else 1.0

        layers.append(
            LayerCoverage(
                module, norm, share(inside_A, inside_B), share(A, inside_B), share(inside_A, B)
            )
        )
    total = math.fsum(layer.norm**2 for layer in layers)
    inside = math.fsum(layer.norm**2 * layer.both for layer in layers)
    share_of_all = inside / total if total else 1.0
    return Coverage(
        member.id,
        share_of_all,
        math.sqrt(max(0.0, 1.0 - share_of_all)),
        tuple(layers),
        tuple(missing),
    )


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis [d, k] of the space of the columns, whatever their rank."""
    U, S, _ = torch.linalg.svd(columns.detach().double(), full_matrices=False)
    noise = torch.finfo(torch.float32).eps * max(columns.shape)
    found: Tensor = U[:, noise * S[:1] < S]
    return found
