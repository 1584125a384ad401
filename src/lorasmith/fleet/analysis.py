"""What a fleet is made of: groups, outliers, duplicates, a map.

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
* :func:`redundancy`: pairs of which one can stand in for the other (relative distance at most
  the threshold), or that both are near enough to their mean (at most twice that: the mean is
  half their distance away from either).
* :func:`embedding`: classical multidimensional scaling (Torgerson 1952) of the unit vectors
  ΔW / ‖ΔW‖, from the eigenvectors of the centred cosines.

ΔW = 0 has the cosine 0 with everything, itself included: in clusters it is a group by itself, on
the map it is the origin of the unit vectors, and two such adapters stand in for each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from lorasmith.errors import ConfigError, MissingDependencyError
from lorasmith.fleet.similarity import SimilarityMatrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Clusters",
    "Embedding",
    "Outlier",
    "Outliers",
    "Redundancy",
    "clusters",
    "embedding",
    "outliers",
    "redundancy",
]

_Array: TypeAlias = "NDArray[np.float64]"

#: Fewest adapters among which an outlier can be told: of three, any one is far from the others.
FEWEST = 4
#: Parts into which α is divided: three tests, and one that small fleets overdraw. Scores that
#: share pairs are not quite normal: at a nominal 1.7 % the direction test alone raised 2 to 3 %
#: false alarms in simulated fleets of 4 to 30.
_TESTS = 4
#: 1 − cosine from which adapters have nothing to do with each other. Of adapters trained on
#: different tasks it is 0.94 and more, on one task with different seeds and ranks 0.5 to 0.8.
_UNRELATED = 0.95
_LINKAGES = ("average", "complete", "single")


def scipy_part(name: str) -> Any:
    """A module of SciPy, which is imported on first use.

    Raises:
        MissingDependencyError: It is not installed.
    """
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
    hierarchy, spatial = scipy_part("cluster.hierarchy"), scipy_part("spatial.distance")
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
    student = scipy_part("stats").t
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
