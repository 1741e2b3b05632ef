"""Progressive multi-level denoising: from a tracker's tracklets to identities across videos (paper, section 3.2).

An identity is noise-free if all its images lie within a sphere (radius <= sigma, in cosine distance to the centroid) and no
two identities compared are closer than tau. Level 1 cleans each tracklet, level 2 joins the tracklets of one video, level 3
links people across a sliding range of videos. The algorithm works on arrays, or on memory-mapped files of any size, of which
it holds a few videos at a time, and a sum for each identity; reading and pictures come after it.

    python denoise.py --weights runs/walkers-r10ibn/last.pt

Read first: `denoise`, `merge`, `noise`.
"""
import argparse
import heapq
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.utils import make_grid, save_image

from data import Images, Tracklets, find_splits, framed, read_labels, read_tracklets, refuse_unreadable, replacing, write_labels
from model import extract_to_file, load_backbone

TOLERANCE = 1e-6  # of float32 arithmetic, in cosine distance

# ---------------------------------------------------------------- arrays


def unit(features, rows=None) -> np.ndarray:
    """Features (n, d) of any float type at unit length, float32. Raises ValueError for those that are not finite or zero; `rows`
    are their numbers (n,), or the first one's."""
    features = np.asarray(features, dtype=np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", features, features))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        row = bad[0] + (rows or 0) if np.ndim(rows) == 0 else rows[bad[0]]
        raise ValueError(f"features: {len(bad)} of {len(features)} rows are zero or not finite, the first: row {row}")
    return features / length[:, None]


def dense(labels: np.ndarray) -> np.ndarray:
    """Numbers from 0 renumbered 0..n-1 in their order; -1 stays -1."""
    top = int(labels.max(initial=-1))
    if top > 4 * len(labels) + 1000:  # a table of all numbers would be larger than the labels
        return np.where(labels < 0, -1, np.unique(np.append(labels, -1), return_inverse=True)[1][:-1] - 1)
    number = np.zeros(top + 2, np.int64)
    number[labels] = 1
    np.cumsum(number, out=number)
    number -= 1
    number[-1] = -1  # where -1 finds it
    return number[labels]


def group_rows(labels: np.ndarray) -> list[np.ndarray]:
    """Rows of every label >= 0, in ascending order of labels."""
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels, 0, sorter=order) :]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def slices(features, floats: int = 2**23):
    """Consecutive slices over the rows of (N, d), of about `floats` numbers each: what is in memory at a time."""
    step = max(1, floats // features.shape[1])
    return (slice(start, min(start + step, len(features))) for start in range(0, len(features), step))


def video_rows(features, video: np.ndarray, floats: int = 2**23):
    """Rows of whole videos in their order, as many videos at a time as fit `floats` numbers."""
    videos = group_rows(video)
    before = np.cumsum([0] + [len(rows) for rows in videos]) * features.shape[1]  # numbers before each video
    first = 0
    while first < len(videos):
        stop = max(first + 1, int(np.searchsorted(before, before[first] + floats, "right")) - 1)
        yield np.concatenate(videos[first:stop])
        first = stop


class Rows:
    """Some rows of an array, read when they are asked for."""

    def __init__(self, array, rows: np.ndarray):
        self.array, self.rows, self.shape = array, rows, (len(rows), array.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which) -> np.ndarray:
        return self.array[self.rows[which]]


def group_sums(features, labels: np.ndarray) -> np.ndarray:
    """Sum of the unit features of each label 0..n-1, float32 (n, d); -1 left out. One pass."""
    sums = np.zeros((int(labels.max(initial=-1)) + 1, features.shape[1]), np.float32)
    for part in slices(features):
        rows = np.flatnonzero(labels[part] >= 0)
        names, place = np.unique(labels[part][rows], return_inverse=True)
        member = coo_array((np.ones(len(rows), np.float32), (place, rows)), shape=(len(names), part.stop - part.start))
        sums[names] += member.tocsr() @ unit(features[part], part.start)
    return sums


def centroids_of(features, labels: np.ndarray) -> np.ndarray:
    """Centroid c(S) of each label 0..n-1: the mean of its unit features, at unit length again. (n, d)."""
    sums = group_sums(features, labels)
    sums /= np.maximum(np.sqrt(np.einsum("nd,nd->n", sums, sums)), 1e-12)[:, None]
    return sums


def moments(video: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """A number for every (video, frame): int64 (N,)."""
    frame = dense(frame)
    return video * (frame.max(initial=0) + 1) + frame


def check_index(video, track, frame, features=None, name=lambda i: f"row {i}") -> tuple:
    """video, track, frame as int64 (N,), and the order that sorts them, None if they are sorted.

    Raises ValueError, with the `name` of the image, for arrays of other lengths than the features (N, d), for what are not whole
    numbers from 0 (videos must have an order for the range to slide over), a track in two videos, and two images of one track in
    one frame."""
    out = []
    if features is not None and (len(features.shape) != 2 or not len(features)):
        raise ValueError(f"features: expected (N, d) with N of 1 or more, got {features.shape}")
    for kind, array in (("video", video), ("track", track), ("frame", frame)):
        array = np.asarray(array)
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise ValueError(f"{kind}: expected whole numbers (N,), got {array.dtype} {array.shape}")
        if features is not None and len(array) != len(features):
            raise ValueError(f"{kind} has {len(array)} rows, features have {len(features)}")
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64, copy=False)
        bad = np.flatnonzero((whole != array) | (whole < 0))
        if len(bad):
            raise ValueError(f"{kind} of {name(bad[0])} is {array[bad[0]]}: expected whole numbers from 0, which have an order")
        out.append(whole)
    same = [array[1:] == array[:-1] for array in out]
    more = [array[1:] > array[:-1] for array in out]
    if not (more[0] | same[0] & (more[1] | same[1] & (more[2] | same[2]))).all():
        order = np.lexsort(out[::-1])
        check_index(*(array[order] for array in out), name=lambda i: name(order[i]))
        return *out, order
    bad = np.flatnonzero(same[0] & same[1] & same[2])
    if len(bad):
        raise ValueError(f"{name(bad[0])} and {name(bad[0] + 1)} are of one track in one frame, where a tracker has one box; leave one out "
                         f"(such pairs: {len(bad):,})")  # fmt: skip
    start = np.flatnonzero(np.append(True, ~(same[0] & same[1])))  # of each track in each video
    start = start[np.argsort(out[1][start], kind="stable")]
    bad = np.flatnonzero(np.diff(out[1][start]) == 0)
    if len(bad):
        first, second = sorted(start[bad[0] : bad[0] + 2])
        raise ValueError(f"{name(first)} and {name(second)} are both of track {out[1][first]}, but of two videos: numbers of tracks must be "
                         f"unique over all videos (such tracks: {len(bad):,})")  # fmt: skip
    return *out, None


# ---------------------------------------------------------------- feature space


class Space(NamedTuple):
    """Where features are compared: x -> unit((x - shrunk mean of its video) @ matrix), found without a label."""

    mean: np.ndarray  # (d,) of all tracklets' means
    prior: np.ndarray  # (), a video's mean counts the overall mean as this many tracklets more; infinite: no video's own mean
    matrix: np.ndarray  # (d, k)


def fit_space(features, video: np.ndarray, track: np.ndarray, center: bool = True, whiten: bool = True, dull: float = 0.9,
              most: int = 512) -> Space:  # fmt: skip
    """The space in which what all images share, what a video shares, and what changes within a tracklet says little.

    features (N, d), any float type; video, track (N,). One pass, O(N d^2); memory is d x d, two rows for each video, and a few videos.
    center: subtract each video's mean (a camera makes its images alike), that of its T_v tracklets' means, drawn to the overall
    mean with a weight of prior / (T_v + prior), so that a video of few tracklets keeps what they show. prior is the variance of
    tracklets within videos over that of videos (empirical Bayes); with one tracklet a video, the two cannot be told apart.
    whiten: divide out the covariance, shrunk towards a sphere by the oracle approximating coefficient (Chen et al., 2010), so
    that few images or many dimensions do no harm; then leave out directions of which a share of `dull` or more varies within
    tracklets, since they say little about who it is, and all but the `most` telling ones. With more dimensions than
    tracklets, T, they are sought among the T/2 principal directions: among all, some would tell each tracklet from every other.
    """
    features = features if hasattr(features, "shape") else np.asarray(features)
    video, track = map(dense, check_index(video, track, np.arange(len(video)), features)[:2])
    N, d = features.shape
    V, T = video.max() + 1, track.max() + 1
    if not center and not whiten:
        return Space(np.zeros(d, np.float32), np.float32(np.inf), np.eye(d, dtype=np.float32))
    sums, means = np.zeros((V, d), np.float32), np.zeros((V, d), np.float32)  # by video: sum of its images, mean of its tracklets' means
    tracks, squares = np.zeros(V), 0.0  # by video: number of tracklets; overall: sum of squared lengths of tracklets' means
    second, between = np.zeros((d, d)), np.zeros((d, d))  # sum of x x' over images, of n c c' over tracklets (c their means)
    for rows in video_rows(features, video):
        x = unit(features[rows], rows)
        here, local = np.unique(video[rows], return_inverse=True)
        first, mine, size = np.unique(track[rows], return_index=True, return_inverse=True, return_counts=True)[1:]
        c, home = means_of(x, mine), local[first]
        sums[here], means[here], tracks[here] = group_sums(x, local), means_of(c, home), np.bincount(home)
        squares += float((c**2).sum())
        second += x.T @ x
        between += (c * size[:, None]).T @ c
    count, mean, prior = np.bincount(video), tracks @ means / T, np.inf
    if center and 1 < V < T:  # with a tracklet a video, the video's mean is the person
        length = np.einsum("vd,vd->v", means, means)
        within = max(0.0, squares - (tracks * length).sum()) / max(1, T - V)  # variance of a tracklet around its video
        over = (length.sum() - V * (means.mean(0) ** 2).sum()) / (V - 1) - within * (1 / tracks).mean()  # of a video around all
        prior = within / over if over > 0 else np.inf
    matrix = np.eye(d)
    if whiten:
        total = second / N
        for part in slices(sums):
            s, shrunk = sums[part].astype(float), shrink(means[part], tracks[part], mean, prior)
            cross = s.T @ shrunk
            total -= (cross + cross.T - (shrunk * count[part, None]).T @ shrunk) / N
        trace, trace2 = max(np.trace(total), 1e-9), (total**2).sum()
        towards = np.clip(((1 - 2 / d) * trace2 + trace**2) / ((N + 1 - 2 / d) * max(trace2 - trace**2 / d, 1e-30) + 1e-30), 0, 1)
        values, vectors = np.linalg.eigh((1 - towards) * total + towards * trace / d * np.eye(d))
        matrix = vectors / np.sqrt(values.clip(1e-9 * trace / d))
        if d > T:
            matrix = matrix[:, -max(2, T // 2) :]  # eigh's order is ascending: the directions of largest variance
        share, directions = np.linalg.eigh(matrix.T @ (second - between) @ matrix / max(1, N - T))  # of the variance within tracklets
        telling = np.flatnonzero(share < dull)[:most]
        matrix = matrix @ directions[:, telling if len(telling) > 1 else slice(most)]
    return Space(mean.astype(np.float32), np.float32(prior), matrix.astype(np.float32))


def means_of(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Mean of the rows (n, d) of each group 0..g-1: (g, d)."""
    return coo_array((1 / np.bincount(group)[group], (group, np.arange(len(x))))).tocsr() @ x


def shrink(means: np.ndarray, count: np.ndarray, mean: np.ndarray, prior: float) -> np.ndarray:
    """Means (n, d) of so many members (n,), drawn to `mean` with a weight of prior / (count + prior)."""
    weight = (1 / (1 + prior / count))[:, None] if np.isfinite(prior) else np.zeros((len(count), 1))
    return weight * means + (1 - weight) * mean


def place(features, video: np.ndarray, track: np.ndarray, frame: np.ndarray, space: Space, smooth: int = 1, out=None):
    """Features in a space, unit rows (N, k) float32, or written to `out`, an array or a memory-mapped file of any float type.

    smooth: an image counts together with so many images before and after it in its tracklet, 0 for itself alone: one blurred
    or hidden moment says little about who it is. Works for later images too: their videos' means are their own.
    """
    features = features if hasattr(features, "shape") else np.asarray(features)
    video, track, frame, _ = check_index(video, track, frame, features)
    out = np.empty((len(video), space.matrix.shape[1]), np.float32) if out is None else out
    for rows in video_rows(features, video):
        rows = rows[np.lexsort((frame[rows], track[rows]))]
        x, local = unit(features[rows], rows), np.unique(video[rows], return_inverse=True)[1]
        first, mine = np.unique(track[rows], return_index=True, return_inverse=True)[1:]
        home = local[first]
        x -= shrink(means_of(means_of(x, mine), home), np.bincount(home), space.mean, float(space.prior))[local].astype(np.float32)
        x = x @ space.matrix
        length = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.where(length > 1e-6, x, 0) / np.maximum(length, 1e-6)
        around = x.copy()
        for k in range(1, smooth + 1):
            same = (track[rows[k:]] == track[rows[:-k]])[:, None]
            around[k:] += same * x[:-k]
            around[:-k] += same * x[k:]
        around = np.where(np.linalg.norm(around, axis=1, keepdims=True) > 1e-3, around, x)  # neighbours may cancel out
        around[~around.any(1)] = 1  # an image that is nothing but mean: one direction for all such
        out[rows] = around / np.linalg.norm(around, axis=1, keepdims=True)
    return out


# ---------------------------------------------------------------- noise


def noise(features, labels: np.ndarray, sigma: float, tau: float, video: np.ndarray | None = None, window: int = 16,
          stride: int = 8) -> tuple[float, float]:  # fmt: skip
    """What of a labelling is noise (paper, section 3.1): share of images outside their identity's sphere of radius sigma, and
    share of identities with another identity's centroid closer than tau.

    features (N, d), labels (N,), -1 left out. All identities are compared; given `video` (N,), those within a sliding range of
    it, as in level 3. Two passes, and a centroid for each identity in memory.
    """
    labels = dense(labels)
    if not len(labels) or labels.max() < 0:
        return 0.0, 0.0
    centroids = centroids_of(features, labels)
    outside, kept = 0, labels >= 0
    for part in slices(features):
        distance = 1 - np.einsum("nd,nd->n", unit(features[part], part.start), centroids[labels[part]])
        outside += int((distance[kept[part]] > sigma + TOLERANCE).sum())
    close = np.zeros(len(centroids), bool)
    everyone = [np.arange(len(centroids))] if video is None else ranges(labels, dense(video), window, stride)
    for here in everyone:
        c = centroids[here]
        block = max(1, 2**24 // max(1, len(here)))
        for start in range(0, len(here), block):
            distance = 1 - c[start : start + block] @ c.T
            distance[np.arange(len(distance)), start + np.arange(len(distance))] = np.inf
            close[here[start : start + block]] |= (distance < tau - TOLERANCE).any(1)
    return outside / int(kept.sum()), float(close.mean())


def pairwise_scores(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 over pairs of images: is a pair together in labels, and is it truly one person?
    An image labelled -1 is in no pair of its side: one without a true identity makes every pair found with it a wrong one."""
    pairs = lambda counts: float((counts * (counts - 1.0) / 2).sum())
    both = (labels >= 0) & (truth >= 0)
    shape = (labels.max(initial=-1) + 2, truth.max(initial=-1) + 2)
    table = coo_array((np.ones(both.sum()), (labels[both], truth[both])), shape=shape).tocsr()
    hit, found, true = pairs(table.data), pairs(np.bincount(labels[labels >= 0])), pairs(np.bincount(truth[truth >= 0]))
    precision, recall = hit / max(found, 1), hit / max(true, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-12)}


# ---------------------------------------------------------------- the three levels


def trim(features: np.ndarray, sigma: float) -> np.ndarray:
    """Level 1 for one tracklet (n, d): while the radius is above sigma, drop the image farthest from the centroid. bool (n,).

    The centroid's direction is the sum s of what is kept, so dropping f changes f_i . s by f_i . f: one product, O(n d).
    """
    kept = np.ones(len(features), bool)
    total = features.sum(0, dtype=np.float64)
    towards = features @ total
    while kept.any():
        worst, length = np.where(kept, towards, np.inf).argmin(), np.linalg.norm(total)
        if length > TOLERANCE * len(kept) and towards[worst] >= (1 - sigma - TOLERANCE) * length:
            break
        kept[worst] = False
        total -= features[worst]
        towards -= features @ features[worst].astype(np.float64)
    return kept


def split_switches(features, video: np.ndarray, track: np.ndarray, frame: np.ndarray, tau: float, shortest: int = 2) -> np.ndarray:
    """Cut tracklets where the tracker went over to somebody else: two parts as far apart as two people are two people.

    Each tracklet is cut in time where that explains most of its variance, if the parts' centroids are at least tau apart, and
    so on within the parts, which have `shortest` images or more. A needless cut costs little: level 2 merges the parts again.
    (Somebody else in the middle of a tracklet may hide: neither cut alone is far enough. Level 1 has to drop them.)
    Not in the paper; without it half a tracklet pulls the other half's centroid along, and level 1 finds nobody to drop.
    features (N, d), the rest (N,). Returns track numbers (N,), 0..n-1; -1 for the last image before a cut and the first after
    it, which may be either's: level 2 finds their place.
    """
    out, count = np.full(len(track), -1, np.int64), 0
    for rows in video_rows(features, video):
        rows = rows[np.lexsort((frame[rows], track[rows], video[rows]))]
        x = unit(features[rows])
        for of_track in group_rows(np.unique(track[rows], return_inverse=True)[1]):
            waiting = [(of_track[0], of_track[-1] + 1)]
            while waiting:
                start, stop = waiting.pop()
                sizes = np.arange(shortest, stop - start - shortest + 1)  # of the first part
                if len(sizes):
                    sums = x[start:stop].cumsum(0)
                    first, second = sums[sizes - 1], sums[-1] - sums[sizes - 1]
                    a, b = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
                    best = (a**2 / sizes + b**2 / (stop - start - sizes)).argmax()
                    if first[best] @ second[best] <= (1 - tau) * a[best] * b[best]:
                        cut = start + sizes[best]
                        waiting += [(cut, stop), (start, cut)]
                        continue
                inner = rows[start + (start > of_track[0]) : stop - (stop <= of_track[-1])]
                out[inner] = count
                count += len(inner) > 0
    return out


def single_tracklet(features, video: np.ndarray, track: np.ndarray, sigma: float, min_images: int = 2) -> np.ndarray:
    """Level 1: what is consistent in each tracklet. Labels (N,), the tracklet's number, or -1 for anomalies.

    features (N, d); video, track (N,), track -1 to leave an image out. A tracklet that keeps fewer than min_images dissolves.
    """
    labels = np.full(len(track), -1, np.int64)
    for rows in video_rows(features, video):
        rows = rows[track[rows] >= 0]
        x, local = unit(features[rows]), np.unique(track[rows], return_inverse=True)[1]
        outside = 1 - np.einsum("nd,nd->n", x, centroids_of(x, local)[local]) > sigma
        kept, tracks = np.ones(len(rows), bool), group_rows(local)
        for n in np.unique(local[outside]):  # the others are spheres already
            kept[tracks[n]] = trim(x[tracks[n]], sigma)
        kept &= np.bincount(local, weights=kept, minlength=1)[local] >= min_images
        labels[rows[kept]] = track[rows[kept]]
    return labels


def consistent(features, rows: np.ndarray, moment: np.ndarray, sigma: float, cannot_link: bool = True) -> bool:
    """Can these rows be one identity: radius <= sigma and, with `cannot_link`, no two of them in one frame.

    The frames are those of the images, not of whole tracklets: what level 1 took out of a tracklet may be somebody else."""
    if cannot_link and len(np.unique(moment[rows])) < len(rows):
        return False
    members = unit(features[rows])
    total = members.sum(0)
    length = np.linalg.norm(total)  # none: opposite images, which have no centroid
    return bool(length > TOLERANCE * len(rows) and (members @ total).min() >= (1 - sigma - TOLERANCE) * length)


def merge(features, identities: list[np.ndarray], moment: np.ndarray, sigma: float, tau: float, cannot_link: bool = True,
          sums: np.ndarray | None = None, fresh: np.ndarray | None = None, pairs: np.ndarray | None = None) -> list[list[int]]:  # fmt: skip
    """Join identities, closest first: while two centroids are closer than tau and their union is consistent, it replaces both.

    features (N, d); identities: n arrays of rows; moment (N,), see `moments`. Returns the groups, lists of positions in
    `identities`. Exact: every pair closer than tau waits in a heap, and a refused pair can only come back in a larger union.
    Of each identity its sum is kept, which rules most unions out: the mean distance of a part's members to the new centroid is
    at most their largest. Members are read for the few pairs that pass.

    sums (n, d): of their unit features, if known; overwritten. fresh: bool (n,), pairs of two that are not fresh have been refused before.
    pairs: integers (m, 2), the only ones to consider, inherited by unions; all if None.
    """
    n, groups = len(identities), [[k] for k in range(len(identities))]
    if n < 2:
        return groups
    sums = np.stack([unit(features[rows]).sum(0) for rows in identities]) if sums is None else sums
    fresh = np.ones(n, bool) if fresh is None else fresh
    size = np.array([len(rows) for rows in identities])
    square = np.einsum("nd,nd->n", sums, sums)
    alive, age, heap, identities, known = np.ones(n, bool), [0] * n, [], list(identities), {}
    near = None if pairs is None else [set() for _ in range(n)]

    def members(k: int) -> tuple[np.ndarray, set]:
        """Unit features and moments of an identity, read when they are first asked for."""
        if k not in known:
            if len(known) >= 4096:
                known.clear()  # so that memory stays a window
            known[k] = unit(features[identities[k]]), set(moment[identities[k]].tolist())
        return known[k]

    def offer(a: np.ndarray, b: np.ndarray) -> None:
        """Pairs a[k], b[k] onto the heap if they are close and may be consistent."""
        dot, lengths = np.einsum("nd,nd->n", sums[a], sums[b]), np.sqrt(square[a] * square[b])
        union = np.sqrt(np.maximum(square[a] + square[b] + 2 * dot, 0))
        mean = np.minimum((square[a] + dot) / size[a], (square[b] + dot) / size[b])  # product of a part's members with the union's sum
        keep = (dot > (1 - tau) * lengths) & (mean >= (1 - sigma - TOLERANCE) * union)
        for distance, i, j in zip((1 - dot[keep] / lengths[keep]).tolist(), a[keep].tolist(), b[keep].tolist()):
            heapq.heappush(heap, (distance, i, j, age[i], age[j]))

    block = max(1, 2**24 // n)
    if near is None:
        for start in range(0, n, block):
            dot = sums[start : start + block] @ sums.T  # finds the pairs; `offer` decides, with the same products for all callers
            a, b = np.nonzero(dot > (1 - tau - 1e-4) * np.sqrt(square[start : start + block, None] * square))
            first = (a + start < b) & (fresh[a + start] | fresh[b])
            offer(a[first] + start, b[first])
    else:
        for start in range(0, len(pairs), 2**16):
            offer(*pairs[start : start + 2**16].T)
            for a, b in pairs[start : start + 2**16].tolist():
                near[a].add(b)
                near[b].add(a)

    while heap:
        _, i, j, age_i, age_j = heapq.heappop(heap)
        if age[i] != age_i or age[j] != age_j or not (alive[i] and alive[j]):
            continue
        (x, seen), (y, others) = members(i), members(j)
        if cannot_link and not seen.isdisjoint(others):
            continue
        total = sums[i] + sums[j]
        length = np.linalg.norm(total)
        if length <= TOLERANCE * (len(x) + len(y)) or min((x @ total).min(), (y @ total).min()) < (1 - sigma - TOLERANCE) * length:
            continue
        known[i], identities[i] = (np.concatenate([x, y]), seen | others), np.concatenate([identities[i], identities[j]])
        known.pop(j, None)
        groups[i] += groups[j]
        sums[i], size[i], square[i], age[i] = total, size[i] + size[j], total @ total, age[i] + 1
        alive[j], groups[j], identities[j] = False, None, None
        if near is None:
            others = np.flatnonzero(alive)
        else:
            near[i] |= near[j]
            for k in near[j]:
                near[k].discard(j)
                near[k].add(i)
            near[i] -= {i, j}
            near[j] = None
            others = np.array(sorted(near[i]), np.int64)
        others = others[others != i]
        offer(np.full(len(others), i), others)
    return [group for group in groups if group]


def merge_labels(features, labels: np.ndarray, moment: np.ndarray, *rule) -> np.ndarray:
    """Labels (N,) after `merge` of all their identities."""
    identities, labels = group_rows(labels), labels.copy()
    for group in merge(features, identities, moment, *rule):
        for n in group[1:]:
            labels[identities[n]] = labels[identities[group[0]][0]]
    return labels


def single_video(features, labels: np.ndarray, video: np.ndarray, track: np.ndarray, frame: np.ndarray, sigma: float, tau: float,
                 min_images: int = 2, cannot_link: bool = True, recover: bool = True) -> np.ndarray:  # fmt: skip
    """Level 2: identities within each video, out of level 1's labels. Labels (N,), -1 for what fits nowhere.

    (a) merge fragments, (b) give each anomaly to the nearest identity if it is within sigma of it and fits, (c) take what is
    left of a tracklet's anomalies, the other half of an identity switch, as a tracklet of its own and merge once more.
    """
    out, count = np.full(len(labels), -1, np.int64), 0
    for rows in group_rows(video):
        x, moment, own = unit(features[rows]), frame[rows], dense(labels[rows])
        own = merge_labels(x, own, moment, sigma, tau, cannot_link)
        own = reallocate(x, own, moment, sigma, cannot_link)
        if recover:
            left = single_tracklet(x, video[rows], np.where(own < 0, track[rows], -1), sigma, min_images)
            own = np.where(left >= 0, own.max() + 1 + left, own)
            own = merge_labels(x, own, moment, sigma, tau, cannot_link)
        own = dense(own)
        out[rows] = np.where(own >= 0, own + count, -1)
        count += own.max() + 1
    return out


def reallocate(features: np.ndarray, labels: np.ndarray, moment: np.ndarray, sigma: float, cannot_link: bool = True) -> np.ndarray:
    """Level 2 (b) for the unit features (n, d) of one video: labels (n,) in which anomalies have joined the nearest identity,
    those nearest to one first, if they are within sigma of its centroid (that of before) and it stays consistent."""
    identities, anomalies, labels = group_rows(labels), np.flatnonzero(labels < 0), labels.copy()
    if not identities or not len(anomalies):
        return labels
    distance = 1 - features[anomalies] @ centroids_of(features, dense(labels)).T
    nearest, distance = distance.argmin(1), distance.min(1)
    for n in np.argsort(distance, kind="stable")[: (distance <= sigma).sum()]:
        wider = np.append(identities[nearest[n]], anomalies[n])
        if consistent(features, wider, moment, sigma, cannot_link):
            identities[nearest[n]] = wider
            labels[anomalies[n]] = labels[wider[0]]
    return labels


def ranges(labels: np.ndarray, video: np.ndarray, window: int, stride: int):
    """Labels that have an image in each range of `window` consecutive videos, which moves by `stride`: arrays, one a range."""
    labels = labels[np.argsort(video, kind="stable")]
    first = np.append(0, np.cumsum(np.bincount(video)))  # place of each video's first image
    for start in range(0, max(1, len(first) - 1 - window + stride), stride):
        here = np.unique(labels[first[start] : first[min(start + window, len(first) - 1)]])
        yield here[here >= 0]


def cross_video(features, labels: np.ndarray, video: np.ndarray, frame: np.ndarray, sigma: float, tau: float, window: int = 16,
                stride: int = 8, cannot_link: bool = True) -> np.ndarray:  # fmt: skip
    """Level 3: people across videos, out of level 2's labels. Labels (N,).

    A range of `window` consecutive videos moves over all of them in steps of `stride`. A merge within a range links its
    identities; what is linked through overlapping ranges becomes one. Where that union is not consistent, the identities that
    a range linked are merged anew, closest first, as far as the rule goes. Repeated with what was linked until nothing more can
    be merged within any range. A round is linear in videos, and features are read only for what may be merged. Walkers and
    100,000 synthetic images took three to five rounds; a chain can be built that needs as many as there are videos.
    """
    labels, video, moment = dense(labels), dense(video), moments(video, frame)
    rule = moment, sigma, tau, cannot_link
    fresh, sums = np.ones(labels.max(initial=-1) + 1, bool), group_sums(features, labels)
    while True:
        identities, links = group_rows(labels), []
        for here in ranges(labels, video, window, stride) if fresh.any() else ():
            if fresh[here].any():
                groups = merge(features, [identities[n] for n in here], *rule, sums[here], fresh[here])
                # a chain links each group; the first two that merged are neighbours in it
                links += [np.stack([here[group[:-1]], here[group[1:]]], 1) for group in groups if len(group) > 1]
        if not links:
            return labels
        labels, fresh, sums = follow(features, labels, identities, sums, np.unique(np.concatenate(links), axis=0), *rule)


def follow(features, labels: np.ndarray, identities: list[np.ndarray], sums: np.ndarray, links: np.ndarray, *rule) -> tuple:
    """Make one identity of those that are linked, or as few as are consistent. links (m, 2): numbers of identities.
    Returns labels (N,), and of the new identities: whether they come from linked ones, bool, and their sums."""
    n, moment, sigma, cannot_link = len(identities), rule[0], rule[1], rule[3]
    component = connected_components(coo_array((np.ones(len(links)), links.T), shape=(n, n)), directed=False)[1]
    linked = np.bincount(component)[component] > 1
    links = links[np.argsort(component[links[:, 0]], kind="stable")]
    start = np.searchsorted(component[links[:, 0]], np.arange(n + 1))  # row of each component's first link
    new = component.copy()
    for parts in group_rows(np.where(linked, component, -1)):
        total, size = sums[parts].sum(0), np.array([len(identities[k]) for k in parts])
        inside = (sums[parts] @ total / size).min() >= (1 - sigma - 1e-5) * np.linalg.norm(total)  # of each part on average
        if not inside or not consistent(features, np.concatenate([identities[k] for k in parts]), moment, sigma, cannot_link):
            c = component[parts[0]]
            pairs = np.searchsorted(parts, links[start[c] : start[c + 1]])
            for group in merge(features, [identities[k] for k in parts], *rule, sums[parts], pairs=pairs)[1:]:
                new[parts[group]] = n + parts[group[0]]
    number = np.unique(new, return_inverse=True)[1]
    fresh = np.zeros(number.max() + 1, bool)
    fresh[number[linked]] = True
    sums = coo_array((np.ones(n, np.float32), (number, np.arange(n)))).tocsr() @ sums
    return np.where(labels >= 0, number[labels], -1), fresh, sums


def reunite(features, labels: np.ndarray, video: np.ndarray, frame: np.ndarray, sigma: float, tau: float, nearest: int = 8,
            cannot_link: bool = True, floats: int = 2**25) -> np.ndarray:  # fmt: skip
    """Beyond the paper: people who return after more videos than a range holds. Labels (N,), out of level 3's.

    One more merge, over all identities, of which each offers its `nearest` others closer than tau. Quadratic in identities:
    blocks of one matrix product over their centroids, never held whole.
    """
    labels, moment = dense(labels), moments(dense(video), frame)
    identities, centroids, pairs = group_rows(labels), centroids_of(features, labels), [np.empty((0, 2), np.int64)]
    if len(identities) < 2:
        return labels
    block = max(1, floats // len(centroids))
    for start in range(0, len(centroids), block):
        similarity = torch.from_numpy(centroids[start : start + block]) @ torch.from_numpy(centroids).T
        similarity[torch.arange(len(similarity)), start + torch.arange(len(similarity))] = -2
        top = similarity.topk(min(nearest, len(centroids)))
        a, k = np.nonzero(top.values.numpy() > 1 - tau)
        pairs.append(np.sort(np.stack([a + start, top.indices.numpy()[a, k]], 1)))
    pairs = np.unique(np.concatenate(pairs), axis=0)
    del centroids
    number = np.arange(len(identities))
    for group in merge(features, identities, moment, sigma, tau, cannot_link, group_sums(features, labels), pairs=pairs):
        number[group] = group[0]
    return np.where(labels >= 0, dense(number)[labels], -1)


# ---------------------------------------------------------------- chained


def calibrate(features, video: np.ndarray, track: np.ndarray, frame: np.ndarray, say=None) -> tuple[float, float]:
    """sigma and tau from the data, without a label: images of one tracklet are mostly one person, two tracklets seen in one
    frame are two people. features (N, d), in the space they will be compared in; the rest (N,).

    far: the distance that 85% of the centroids of tracklets seen together exceed (trackers mix people up: the closest pairs
    are often one person). sigma lies halfway from the distance that 95% of images keep to the centroid of the rest of their
    tracklet to far; tau halfway from the median distance between a tracklet's first and second half to far. Halfway, since a
    quantile of either kind alone moves with the tracker's faults. Measured on whole videos, evenly spread, of some 2^25
    numbers. say, if given, is called with a sentence.
    """
    video, track, frame = dense(np.asarray(video)), np.asarray(track), np.asarray(frame)
    step = -(-features.shape[0] * features.shape[1] // 2**25)
    rows = np.flatnonzero(video % step == 0)
    rows = rows[np.lexsort((frame[rows], track[rows]))]
    x, track, moment = unit(features[rows]), dense(track[rows]), moments(video[rows], frame[rows])
    size = np.bincount(track)
    several = size[track] > 1
    rest = group_sums(x, track)[track[several]] - x[several]
    own = 1 - np.einsum("nd,nd->n", x[several], rest) / np.maximum(np.linalg.norm(rest, axis=1), 1e-12)
    nth = np.arange(len(rows)) - (np.cumsum(size) - size)[track]  # an image's place in its tracklet
    halves = centroids_of(x, 2 * track + (nth >= size[track] // 2))
    halves = 1 - np.einsum("nd,nd->n", halves[::2], halves[1::2])[size >= 4]
    seen = coo_array((np.ones(len(rows)), (track, np.unique(moment, return_inverse=True)[1]))).tocsr()
    a, b = (seen @ seen.T).nonzero()
    together, centroids = bool((a < b).any()), centroids_of(x, track)
    if not together:  # of any two tracklets most are two people as well
        some = np.linspace(0, len(size) - 1, min(len(size), 400)).astype(np.int64)
        a, b = (some[k] for k in np.triu_indices(len(some), 1))
    strangers = 1 - np.einsum("nd,nd->n", centroids[a[a < b]], centroids[b[a < b]])
    far = float(np.quantile(strangers, 0.15 if together else 0.5)) if len(strangers) else 1.0  # nothing to measure: at right angles
    near = float(np.quantile(own, 0.95)) if len(own) else 0.0
    half = float(np.median(halves)) if len(halves) else near
    if say:
        pairs = "85% of tracklets seen together" if together else "no tracklets seen together; half of all pairs"
        say(f"95% of images lie within {near:.3f} of the rest of their tracklet, halves of a tracklet {half:.3f} apart (median), "
            f"{pairs} {far:.3f} or more")  # fmt: skip
    return tuple(float(np.clip((distance + far) / 2, TOLERANCE, 2)) for distance in (near, half))


def denoise(features, video, track, frame, sigma=None, tau=None, min_images: int = 2, window: int = 16, stride: int = 8,
            split: bool = True, cannot_link: bool = True, returning: bool = False, cut_by=None, levels: int = 3,
            report=None) -> np.ndarray:  # fmt: skip
    """Identities from tracklets: calibration and the three levels. Labels int64 (N,), 0..n-1, -1 for noise.

    features: (N, d), array or memory-mapped, any float type, normalised here; those of a network are worth far more after
    `place`. video, track, frame: integers (N,); the range slides over videos in the order of their numbers; a track number
    belongs to one video. sigma, tau: thresholds in [0, 2]; calibrated where None. split: cut identity switches before level 1,
    found in the features `cut_by` (N, any) if given: such as are not smoothed over time, which blurs a switch; without, level 2
    recovers what it can of the other halves. returning: look for people who stay away for longer than a range, see `reunite`.
    report, if given, is called with (level, labels, noise) before the first level and after each. The order of rows does not
    matter; sorted by video, track and frame they are read fastest. Raises ValueError for arrays of different lengths, features
    that are zero or not finite, thresholds out of range, and what `check_index` refuses.
    """
    features = features if hasattr(features, "shape") else np.asarray(features)
    for name, value in (("sigma", sigma), ("tau", tau)):
        if value is not None and not 0 <= value <= 2:  # nan too
            raise ValueError(f"{name}={value}: a cosine distance lies in [0, 2]")
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride}, window={window}: ranges must overlap, so 1 <= stride < window")
    video, track, frame, order = check_index(video, track, frame, features)
    for part in slices(features):
        unit(features[part], part.start)  # raises for rows that are zero or not finite
    if order is not None:
        labels = np.empty(len(order), np.int64)
        cut_by = None if cut_by is None else Rows(cut_by, order)
        back = (lambda level, found, share: report(level, found[np.argsort(order)], share)) if report else None
        labels[order] = denoise(
            Rows(features, order), video[order], track[order], frame[order], sigma, tau, min_images, window, stride,
            split, cannot_link, returning, cut_by, levels, back,
        )  # fmt: skip
        return labels
    video, track = dense(video), dense(track)
    if sigma is None or tau is None:
        chosen = calibrate(features, video, track, frame)
        sigma, tau = chosen[0] if sigma is None else sigma, chosen[1] if tau is None else tau
    tell = lambda level, labels: report and report(level, labels, noise(features, labels, sigma, tau, video, window, stride))
    tell("tracklets", track)
    if split:
        track = split_switches(features if cut_by is None else cut_by, video, track, frame, tau)
    labels = single_tracklet(features, video, track, sigma, min_images)
    tell("single tracklet", labels)
    if levels == 1:
        return labels
    # a cut has found the other half of a switch already
    labels = single_video(features, labels, video, track, frame, sigma, tau, min_images, cannot_link, recover=not split)
    tell("single video", labels)
    if levels == 2:
        return labels
    labels = cross_video(features, labels, video, frame, sigma, tau, window, stride, cannot_link)
    if returning:
        tell("cross video", labels)
        labels = reunite(features, labels, video, frame, sigma, tau, cannot_link=cannot_link)
        labels = cross_video(features, labels, video, frame, sigma, tau, window, stride, cannot_link)  # unions may be near to others now
    tell("returning" if returning else "cross video", labels)
    return labels


def denoise_tracklets(tracklets: Tracklets, features, scratch, truth: np.ndarray | None = None, sigma: float | None = None,
                      tau: float | None = None, center: bool = True, whiten: bool = True, smooth: int = 1, print_line=print,
                      **options) -> tuple[np.ndarray, dict, Space]:  # fmt: skip
    """Fit the space, calibrate and denoise an index of tracklets, printing a line for each level.

    features (N, d), array or memory-mapped: a zero row is an unreadable image, and gets -1. scratch: name of files for the
    features in their space, removed at the end. truth (N,), where it is known, is only measured against. options: `denoise`'s.
    Returns the labels (N,), the figures for log.jsonl (identities, images kept, noise, thresholds, F1) and the space.
    """
    if len(features) != len(tracklets) or features.ndim != 2:
        raise ValueError(f"features are {features.shape}, the index has {len(tracklets):,} images: expected a row for each")
    clock, levels, full = time.time(), [], np.full(len(tracklets), -1)
    rows = []
    for part in slices(features):
        x = np.asarray(features[part], np.float32)
        bad = np.flatnonzero(~np.isfinite(x).all(1)) + part.start
        if len(bad):
            raise ValueError(f"features: row {bad[0]} is not finite, that of {tracklets.path(bad[0])}")
        rows.append(part.start + np.flatnonzero(x.any(1)))
    rows = np.concatenate(rows)
    unreadable = np.setdiff1d(np.arange(len(tracklets)), rows)
    refuse_unreadable(tracklets, unreadable, len(tracklets))
    if len(unreadable):
        print_line(f"{len(unreadable):,} unreadable images are left out, the first: {tracklets.path(unreadable[0])}")
    features = features if len(rows) == len(features) else Rows(features, rows)
    video, track, frame = tracklets.video[rows], tracklets.track[rows], tracklets.frame[rows]
    space = fit_space(features, video, track, center, whiten)
    with replacing(scratch, keep=False) as first, replacing(Path(scratch).with_suffix(".smooth"), keep=False) as second:
        sharp, placed = (np.lib.format.open_memmap(file, "w+", np.float16, (len(rows), space.matrix.shape[1])) for file in (first, second))
        place(features, video, track, frame, space, 0, sharp)
        place(features, video, track, frame, space, smooth, placed)
        chosen = calibrate(placed, video, track, frame, print_line)
        sigma, tau = chosen[0] if sigma is None else sigma, chosen[1] if tau is None else tau
        print_line(f"sigma {sigma:.3f}, tau {tau:.3f} (calibrated: {chosen[0]:.3f}, {chosen[1]:.3f}) in "
                   f"{placed.shape[1]} dimensions of {space.matrix.shape[0]}")  # fmt: skip
        header = f"{'level':<16} identities  images kept   noise: images  identities"
        print_line(header + ("   precision  recall     F1" if truth is not None else ""))

        def tell(level, labels, share):
            full[rows] = labels
            figures = {"level": level, "identities": int(labels.max() + 1), "images_kept": int((labels >= 0).sum()),
                       "noise_images": share[0], "noise_identities": share[1]}  # fmt: skip
            line = "{level:<16} {identities:>10,}  {images_kept:>11,}  {noise_images:>14.1%}  {noise_identities:>10.1%}"
            if truth is not None:
                figures |= pairwise_scores(full, truth)
                line += "   {precision:>9.3f}  {recall:>6.3f}  {f1:>5.3f}"
            levels.append(figures)
            print_line(line.format(**figures))

        denoise(placed, video, track, frame, sigma, tau, cut_by=sharp, report=tell, **options)
    noise_of = lambda figures: (figures["noise_images"], figures["noise_identities"])
    report = levels[-1] | {"noise_before": noise_of(levels[0]), "noise_after": noise_of(levels[-1]), "levels": levels}
    if truth is not None:
        report["f1_tracklets"] = levels[0]["f1"]
    for name, values in (("tracklets", tracklets.track), ("videos", tracklets.video)):
        both = np.unique(np.stack([full[full >= 0], values[full >= 0]]), axis=1)
        report[f"{name}_per_identity"] = both.shape[1] / max(1, report["identities"])
    print_line("an identity spans {tracklets_per_identity:.1f} tracklets, {videos_per_identity:.1f} videos".format(**report))
    return full, report | {"sigma": sigma, "tau": tau, "seconds": time.time() - clock, "unreadable": unreadable.tolist()}, space


def show_identities(file, tracklets: Tracklets, labels: np.ndarray, people: int = 12, columns: int = 14) -> None:
    """Write a picture: an identity a row, the ones of most videos first, its images spread over them; framed red, at the
    row's end, images of its tracklets that were removed as noise."""
    images, sheet, rows_of = Images(tracklets, (128, 64)), [], []
    identities = sorted(group_rows(labels), key=lambda rows: -min(len(np.unique(tracklets.video[rows])), 3))[: 10 * people]
    for rows in identities:
        rows_of.append((rows, np.flatnonzero((labels < 0) & np.isin(tracklets.track, tracklets.track[rows]))[:3]))
    for rows, gone in sorted(rows_of, key=lambda pair: -len(pair[1]))[:people]:
        shown = rows[np.linspace(0, len(rows) - 1, columns - len(gone)).astype(int)]
        sheet += [images[i][0] / 255 for i in shown] + [framed(images[i][0] / 255, (0.9, 0.1, 0.1)) for i in gone]
    if sheet:
        save_image(make_grid(torch.stack(sheet), nrow=columns), file)


def main() -> None:
    """Find the identities of a folder of tracklets with a network's features, and write them as an annotation JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", help="checkpoint of a run, or backbone weights; runs/walkers-r10ibn/last.pt if neither is given")
    parser.add_argument("--features", help="features of any other encoder instead: a .npy file (N, d), a row for each line of --index")
    parser.add_argument("--data", default="data/walkers", help="folder of tracklets; its train/ where there is a test.json too")
    parser.add_argument("--index", action="store_true", help="print the images in the order of their rows, and stop")
    parser.add_argument("--out", default="identities.json", help="annotation to write; pictures and figures go beside it")
    parser.add_argument("--arch", help="architecture, if the checkpoint does not say")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="input size, if the checkpoint does not say")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    parser.add_argument("--sigma", type=float, help="intra-identity consistency, cosine distance in [0, 2]; calibrated if not given")
    parser.add_argument("--tau", type=float, help="inter-identity discrimination, likewise")
    parser.add_argument("--min_images", type=int, default=2, help="a tracklet that keeps fewer dissolves")
    parser.add_argument("--window", type=int, default=16, help="videos in the sliding range")
    parser.add_argument("--stride", type=int, default=8, help="videos by which it moves")
    parser.add_argument("--smooth", type=int, default=1, help="images before and after that an image is averaged with")
    flags = {"center": "subtract each video's mean", "whiten": "divide out the covariance", "split": "cut identity switches",
             "cannot_link": "images of one frame are two people"}  # fmt: skip
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--returning", action="store_true", help="look for people who stay away for longer than a range")
    args = parser.parse_args()
    out = Path(args.out)
    written = [out] + [out.with_suffix(suffix) for suffix in (".summary.json", ".space.npz", ".png")]
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: expected a name that ends in .json")
    for file in written:
        if file.exists() and not args.index:
            raise ValueError(f"{file}: exists already; give another --out")
    if args.features and args.weights:
        raise ValueError("--features and --weights: give one of them")
    for flag in ("sigma", "tau"):
        if getattr(args, flag) is not None and not 0 <= getattr(args, flag) <= 2:
            raise ValueError(f"--{flag} {getattr(args, flag)}: a cosine distance lies in [0, 2]")
    for flag, least in (("min_images", 1), ("smooth", 0), ("workers", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} or more")
    if not 1 <= args.stride < args.window:
        raise ValueError(f"--stride {args.stride} --window {args.window}: ranges must overlap, so 1 <= stride < window")
    train_folder, test_folder = find_splits(args.data)
    tracklets = read_tracklets(train_folder)
    if args.index:
        return print("\n".join(map(tracklets.path, range(len(tracklets)))))
    check_index(tracklets.video, tracklets.track, tracklets.frame, name=tracklets.path)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{train_folder}: {tracklets}", flush=True)
    truth = Path(args.data) / "train.json" if test_folder else None
    truth = read_labels(truth, tracklets) if truth and truth.exists() else None
    if args.features:
        try:
            features = np.load(args.features, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "expected one array in NumPy's .npy format"
            raise ValueError(f"--features {args.features}: {why}") from None
        if getattr(features, "ndim", 0) != 2 or len(features) != len(tracklets) or features.dtype.kind != "f":
            found = f"{getattr(features, 'dtype', 'an archive')} {getattr(features, 'shape', '')}"
            raise ValueError(f"--features {args.features}: {found}; expected float16 or float32 ({len(tracklets)}, d), "
                             f"a row for each image of {train_folder} in the order of --index")  # fmt: skip
        for part in slices(features):
            unit(features[part], part.start)  # here a zero row is no unreadable image, but a mistake
    else:
        if "RANK" in os.environ:
            dist.init_process_group("gloo")  # processes only wait for each other
        say = print if int(os.environ.get("RANK", 0)) == 0 else lambda text: None
        backbone, size, _ = load_backbone(args.weights or "runs/walkers-r10ibn/last.pt", args.arch, args.size, say)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
        features = extract_to_file(out.parent, backbone.to(device), tracklets, size, device, args.workers)
        if dist.is_initialized():
            rank = dist.get_rank()
            dist.destroy_process_group()
            if rank > 0:
                return
    names = ("sigma", "tau", "min_images", "window", "stride", "smooth", "returning", *flags)
    options = {name: getattr(args, name) for name in names}
    labels, report, space = denoise_tracklets(tracklets, features, out.with_suffix(".scratch"), truth, **options)
    write_labels(out, tracklets, labels)
    with replacing(written[1]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(written[2]) as temporary, open(temporary, "wb") as file:
        np.savez(file, **space._asdict())
    show_identities(written[3], tracklets, labels)
    print(f"written: {', '.join(str(file) for file in written if file.exists())}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"denoise.py: {error}")
    except KeyboardInterrupt:
        sys.exit("denoise.py: stopped; the same command goes on with the features that are there")
