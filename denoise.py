"""Progressive multi-level denoising: from a tracker's tracklets to identities across videos (paper, section 3.2).

An identity is noise-free if its images lie in a sphere (cosine distance to their centroid <= sigma) and no two identities compared are
closer than tau. Level 1 cleans each tracklet, level 2 joins the tracklets of a video, level 3 links people over a sliding range of videos.
Features are arrays or memory-mapped files of any size: in memory are a few videos at a time, and a sum for each identity.

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

from data import Images, find_splits, framed, read_labels, read_tracklets, refuse_unreadable, replacing, require, write_labels
from model import extract_to_file, load_backbone

TOLERANCE = 1e-6  # of float32 arithmetic, in cosine distance
OPTIONS = "min_images", "window", "stride", "levels", "smooth", "center", "whiten", "split", "cannot_link"  # flags here and in train.py


def unit(features, rows=0) -> np.ndarray:
    """Features (n, d) at unit length, float32. Raises ValueError for zero or non-finite ones; `rows` are their numbers, or the first's."""
    features = np.asarray(features, np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", features, features))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        row = rows[bad[0]] if np.ndim(rows) else rows + bad[0]
        raise ValueError(f"features: {len(bad)} of {len(features)} rows are zero or not finite, the first: row {row}")
    return features / length[:, None]


def dense(labels: np.ndarray) -> np.ndarray:
    """Numbers from 0 renumbered 0..n-1 in their order; -1 stays -1."""
    if labels.max(initial=0) > 4 * len(labels) + 1000:  # a table of all numbers would be larger than the labels
        return np.unique(np.append(labels, -1), return_inverse=True)[1][:-1] - 1
    seen = np.bincount(labels + 1, minlength=1) > 0  # that of -1 first
    return (np.cumsum(seen) - 1 - seen[0])[labels + 1]


def group_rows(labels: np.ndarray) -> list[np.ndarray]:
    """Rows of every label >= 0, in ascending order of labels."""
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels, 0, sorter=order) :]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def slices(rows: int, width: int, floats: int = 2**23):
    """Consecutive slices over the rows of an array (rows, width), of about `floats` numbers each: what is in memory at a time."""
    step = max(1, floats // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def video_rows(features, video: np.ndarray, floats: int = 2**23):
    """Rows of whole videos in their order, as many videos at a time as fit `floats` numbers."""
    videos, first = group_rows(video), 0
    before = np.cumsum([0] + [len(rows) for rows in videos]) * features.shape[1]  # numbers before each video
    while first < len(videos):
        stop = max(first + 1, np.searchsorted(before, before[first] + floats, "right") - 1)
        yield np.concatenate(videos[first:stop])
        first = stop


def moments(video: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """A number for every (video, frame): int64 (N,)."""
    frame = dense(frame)
    return video * (frame.max(initial=0) + 1) + frame


class Rows:
    """Some rows of an array (N, d), read when they are asked for."""

    def __init__(self, array, rows: np.ndarray):
        self.array, self.rows, self.shape = array, rows, (len(rows), array.shape[1])

    def __getitem__(self, which) -> np.ndarray:
        return self.array[self.rows[which]]


def sums_of(x: np.ndarray, group: np.ndarray, weight=np.float32(1)) -> np.ndarray:
    """Sum of the rows of x (n, d) in each group 0..g-1, each times its weight: (g, d)."""
    weight, shape = np.broadcast_to(weight, len(x)), (group.max(initial=-1) + 1, len(x))
    return coo_array((weight, (group, np.arange(len(x)))), shape=shape).tocsr() @ x


def group_sums(features, labels: np.ndarray) -> np.ndarray:
    """Sum of the unit features of each label 0..n-1, float32 (n, d); -1 left out. One pass."""
    sums = np.zeros((labels.max(initial=-1) + 1, features.shape[1]), np.float32)
    for part in slices(*features.shape):
        kept = labels[part] >= 0
        names, group = np.unique(labels[part][kept], return_inverse=True)
        sums[names] += sums_of(unit(features[part], part.start)[kept], group)
    return sums


def centroids_of(features, labels: np.ndarray) -> np.ndarray:
    """Centroid c(S) of each label 0..n-1: the mean of its unit features, at unit length again. (n, d)."""
    sums = group_sums(features, labels)
    sums /= np.maximum(np.sqrt(np.einsum("nd,nd->n", sums, sums)), 1e-12)[:, None]
    return sums


def check_thresholds(sigma, tau, min_images: int, window: int, stride: int, smooth: int = 0, levels: int = 3) -> None:
    """Raise ValueError for a setting out of its range; to be called before an hour goes into features."""
    for name, value in (("sigma", sigma), ("tau", tau)):
        require(value is None or 0 <= value <= 2, f"{name}={value}: a cosine distance lies in [0, 2]")  # nan does not
    require(1 <= stride < window, f"stride={stride}, window={window}: ranges must overlap, so 1 <= stride < window")
    for name, value, least in (("min_images", min_images, 1), ("smooth", smooth, 0)):
        require(value >= least, f"{name}={value}: expected {least} or more")
    require(levels in (1, 2, 3), f"levels={levels}: expected 1, 2 or 3")


def check_index(video, track, frame, features=None, name=lambda i: f"row {i}") -> tuple:
    """video, track, frame as int64 (N,), and the order that sorts them, None if sorted. Raises ValueError, with the `name` of the image,
    for another length than that of the features (N, d), what are not whole numbers from 0, a track in two videos or twice in one frame."""
    if features is not None:
        require(len(features.shape) == 2 and features.shape[0], f"features: expected (N, d) with N of 1 or more, got {features.shape}")
    index = []
    for kind, array in (("video", video), ("track", track), ("frame", frame)):
        array = np.asarray(array)
        require(array.ndim == 1 and array.dtype.kind in "iuf", f"{kind}: expected whole numbers (N,), got {array.dtype} {array.shape}")
        rows = len(array) if features is None else features.shape[0]
        require(len(array) == rows, f"{kind} has {len(array)} rows, features have {rows}")
        with np.errstate(invalid="ignore"):  # nan
            index.append(array.astype(np.int64, copy=False))
        bad = np.flatnonzero((index[-1] != array) | (index[-1] < 0))
        if len(bad):
            raise ValueError(f"{kind} of {name(bad[0])} is {array[bad[0]]}: expected whole numbers from 0, which have an order")
    video, track, frame = index
    order = np.lexsort((frame, video, track))
    same_track, same_video, same_frame = (np.diff(array[order]) == 0 for array in (track, video, frame))  # as the next image
    for bad, why in ((same_track & ~same_video, "but of two videos: track numbers must be unique over all videos"),
                     (same_track & same_video & same_frame, "in one frame, where a tracker has one box; leave one out")):
        if bad.any():
            first, second = order[bad.argmax() :][:2]
            raise ValueError(f"{name(first)} and {name(second)} are both of track {track[first]}, {why} (such pairs: {bad.sum():,})")
    order = order[np.argsort(video[order], kind="stable")]
    return video, track, frame, None if (np.diff(order) > 0).all() else order


class Space(NamedTuple):
    """Where features are compared: x -> unit((x - shrunk mean of its video) @ matrix), found without a label."""

    mean: np.ndarray  # (d,) of all tracklets' means
    prior: np.ndarray  # (), weight of the overall mean in a video's mean, in tracklets; infinite: no video's own mean
    matrix: np.ndarray  # (d, k)


def fit_space(features, video, track, center: bool = True, whiten: bool = True, dull: float = 0.9, most: int = 512) -> Space:
    """The space of comparison: centred on videos, whitened, without directions that vary within tracklets as much as between people.

    features (N, d); video, track (N,). One pass, O(N d^2); memory is d x d, two rows for each video, and a few videos.
    center: subtract each video's mean (a camera makes its images alike), see `shrink`; the prior is the variance of tracklets within videos
    over that of videos (empirical Bayes), which one tracklet a video cannot tell apart. whiten: see `whitening`."""
    video, track = map(dense, check_index(video, track, np.arange(len(video)), features)[:2])
    (N, d), V, T = features.shape, video.max() + 1, track.max() + 1
    if not center and not whiten:
        return Space(np.zeros(d, np.float32), np.float32(np.inf), np.eye(d, dtype=np.float32))
    sums, means = np.zeros((V, d), np.float32), np.zeros((V, d), np.float32)  # by video: sum of its images, mean of its tracklets' means
    tracks, squares = np.zeros(V), 0.0  # by video: number of tracklets; overall: sum of squared lengths of tracklets' means
    second, between = np.zeros((d, d)), np.zeros((d, d))  # sum of x x' over images, of n c c' over tracklets (c their means)
    for rows in video_rows(features, video):
        x, here = unit(features[rows], rows), np.unique(video[rows])
        local, c, size, means[here], tracks[here] = video_means(x, video[rows], track[rows])
        sums[here] = group_sums(x, local)
        squares += float((c**2).sum())
        second += x.T @ x
        between += (c * size[:, None]).T @ c
    mean, prior, matrix = tracks @ means / T, np.inf, np.eye(d)
    if center and 1 < V < T:
        length = np.einsum("vd,vd->v", means, means)
        within = max(0.0, squares - (tracks * length).sum()) / max(1, T - V)  # variance of a tracklet around its video
        over = (length.sum() - V * (means.mean(0) ** 2).sum()) / (V - 1) - within * (1 / tracks).mean()  # of a video around all
        prior = within / over if over > 0 else np.inf
    if whiten:
        covariance, count = second / N, np.bincount(video)
        for part in slices(V, d):
            s, shrunk = sums[part].astype(float), shrink(means[part], tracks[part], mean, prior)
            cross = s.T @ shrunk
            covariance -= (cross + cross.T - (shrunk * count[part, None]).T @ shrunk) / N
        matrix = whitening(covariance, (second - between) / max(1, N - T), N, T, dull, most)
    return Space(mean.astype(np.float32), np.float32(prior), matrix.astype(np.float32))


def video_means(x: np.ndarray, video: np.ndarray, track: np.ndarray) -> tuple:
    """For images x (n, d) of v whole videos: the video of each, 0..v-1 (n,); means (t, d) and sizes (t,) of tracklets; means (v, d) of
    videos, which are those of their tracklets' means, and their numbers of tracklets (v,)."""
    local = np.unique(video, return_inverse=True)[1]
    first, mine, size = np.unique(track, return_index=True, return_inverse=True, return_counts=True)[1:]
    c, home = sums_of(x, mine, 1 / size[mine]), local[first]
    tracks = np.bincount(home)
    return local, c, size, sums_of(c, home, 1 / tracks[home]), tracks


def shrink(means: np.ndarray, tracks: np.ndarray, mean: np.ndarray, prior: float) -> np.ndarray:
    """Means (v, d) of so many tracklets (v,), drawn to the overall mean (d,) with a weight of prior / (tracks + prior): a video of few
    tracklets keeps what they show."""
    weight = (1 / (1 + prior / tracks))[:, None]
    return weight * means + (1 - weight) * mean


def whitening(covariance: np.ndarray, within: np.ndarray, N: int, T: int, dull: float, most: int) -> np.ndarray:
    """A matrix (d, k) that divides out the covariance (d, d) of N images in T tracklets; within (d, d): that within tracklets.

    It is shrunk towards a sphere by the oracle approximating coefficient (Chen et al., 2010), for few images or many dimensions. Directions
    with a share of `dull` or more within tracklets say little about who it is and are left out, as are all but the `most` telling ones.
    With d > T they are sought among the T/2 principal ones: among all, some would tell each tracklet from every other."""
    d, trace, trace2 = len(covariance), max(np.trace(covariance), 1e-9), (covariance**2).sum()
    towards = np.clip(((1 - 2 / d) * trace2 + trace**2) / ((N + 1 - 2 / d) * max(trace2 - trace**2 / d, 1e-30) + 1e-30), 0, 1)
    values, vectors = np.linalg.eigh((1 - towards) * covariance + towards * trace / d * np.eye(d))  # ascending
    matrix = vectors / np.sqrt(values.clip(1e-9 * trace / d))
    if d > T:
        matrix = matrix[:, -max(2, T // 2) :]
    share, directions = np.linalg.eigh(matrix.T @ within @ matrix)
    telling = np.flatnonzero(share < dull)[:most]
    return matrix @ directions[:, telling if len(telling) > 1 else slice(most)]


def place(features, video, track, frame, space: Space, smooth: int = 1, out=None):
    """Features in a space, unit rows (N, k) float32, or written to `out`, an array or memory-mapped file of any float type. Works for later
    images too: their videos' means are their own. smooth: an image counts together with so many before and after it in its tracklet, since
    one blurred or hidden moment says little about who it is; 0 for itself alone."""
    video, track, frame, _ = check_index(video, track, frame, features)
    out = np.empty((len(video), space.matrix.shape[1]), np.float32) if out is None else out
    for rows in video_rows(features, video):
        rows = rows[np.lexsort((frame[rows], track[rows]))]
        x = unit(features[rows], rows)
        local, _, _, means, tracks = video_means(x, video[rows], track[rows])
        x = (x - shrink(means, tracks, space.mean, space.prior)[local].astype(np.float32)) @ space.matrix
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


def noise(features, labels, sigma: float, tau: float, video=None, window: int = 16, stride: int = 8) -> tuple[float, float]:
    """What of a labelling is noise (paper, section 3.1): share of images outside their identity's sphere of radius sigma, and share of
    identities with another's centroid closer than tau. features (N, d); labels (N,), -1 left out. All identities are compared or, given
    `video` (N,), those within a sliding range of videos, as in level 3."""
    labels = dense(labels)
    kept = labels >= 0
    if not kept.any():
        return 0.0, 0.0
    centroids, outside = centroids_of(features, labels), 0
    for part in slices(*features.shape):
        distance = 1 - np.einsum("nd,nd->n", unit(features[part], part.start), centroids[labels[part]])
        outside += (distance[kept[part]] > sigma + TOLERANCE).sum()
    close = np.zeros(len(centroids), bool)
    for here in [np.arange(len(centroids))] if video is None else ranges(labels, video, window, stride):
        c = centroids[here]
        for part in slices(len(c), len(c), 2**24):
            distance = 1 - c[part] @ c.T
            np.fill_diagonal(distance[:, part.start :], np.inf)
            close[here[part]] |= (distance < tau - TOLERANCE).any(1)
    return float(outside / kept.sum()), float(close.mean())


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


def split_switches(features, video, track, frame, tau: float, shortest: int = 2) -> np.ndarray:
    """Cut tracklets, and again their parts, where the tracker went over to somebody else. Track numbers (N,), 0..n-1; -1 for the last image
    before a cut and the first after it, which may be either's. Level 2 finds their place, and merges what was cut needlessly. Not in the
    paper; without it half a tracklet pulls the other half's centroid along, and level 1 finds nobody to drop."""
    out, count = np.full(len(track), -1, np.int64), 0
    for rows in video_rows(features, video):
        rows = rows[np.lexsort((frame[rows], track[rows]))]
        x, starts = unit(features[rows]), np.flatnonzero(np.diff(track[rows], prepend=-1))
        for first, last in zip(starts, np.append(starts[1:], len(rows))):  # of a tracklet
            waiting = [(first, last)]
            while waiting:
                start, stop = waiting.pop()
                cut = find_cut(x[start:stop], tau, shortest)
                if cut:
                    waiting += [(start + cut, stop), (start, start + cut)]
                else:
                    inner = rows[start + (start > first) : stop - (stop < last)]
                    out[inner] = count
                    count += len(inner) > 0
    return out


def find_cut(x: np.ndarray, tau: float, shortest: int) -> int:
    """How many unit features (n, d), in order of time, come before the cut that explains most of their variance; 0 if they are too few, or
    the centroids of the two parts, of `shortest` images or more, are not at least tau apart."""
    sizes = np.arange(shortest, len(x) - shortest + 1)  # of the first part
    if not len(sizes):
        return 0
    sums = x.cumsum(0)
    first, second = sums[sizes - 1], sums[-1] - sums[sizes - 1]
    a, b = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    best = (a**2 / sizes + b**2 / (len(x) - sizes)).argmax()
    return sizes[best] if first[best] @ second[best] <= (1 - tau) * a[best] * b[best] else 0


def single_tracklet(features, video, track, sigma: float, min_images: int = 2) -> np.ndarray:
    """Level 1: what is consistent in each tracklet. Labels (N,), the tracklet's number, or -1 for anomalies. features (N, d); video, track
    (N,), track -1 to leave an image out. A tracklet that keeps fewer than min_images dissolves."""
    labels = np.full(len(track), -1, np.int64)
    for rows in video_rows(features, video):
        x = unit(features[rows])
        for tracklet in group_rows(track[rows]):
            kept = tracklet[trim(x[tracklet], sigma)]
            if len(kept) >= min_images:
                labels[rows[kept]] = track[rows[kept]]
    return labels


def trim(features: np.ndarray, sigma: float) -> np.ndarray:
    """Level 1 for one tracklet (n, d): while the radius is above sigma, drop the image farthest from the centroid. bool (n,).
    The centroid's direction is the sum s of what is kept, so dropping f changes f_i . s by f_i . f: one product, O(n d)."""
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


def consistent(parts: list[tuple], sigma: float, cannot_link: bool = True, total=None) -> bool:
    """Can these parts, (unit features (n, d), n moments) each, be one identity: radius <= sigma and, with `cannot_link`, no two images of
    one moment? Images, not whole tracklets: what level 1 took out may be somebody else. total (d,): the features' sum, if known."""
    n = sum(len(x) for x, _ in parts)
    total = sum(x.sum(0) for x, _ in parts) if total is None else total
    length = np.linalg.norm(total)  # 0: opposite images, which have no centroid
    if length <= TOLERANCE * n or min((x @ total).min() for x, _ in parts) < (1 - sigma - TOLERANCE) * length:
        return False
    return not cannot_link or len(set().union(*(moments for _, moments in parts))) == n


def merge(features, identities, moment, sigma: float, tau: float, cannot_link=True, sums=None, fresh=None, pairs=None) -> list[list[int]]:
    """Join identities, closest first: while two centroids are closer than tau and their union is consistent, it replaces both.

    features (N, d); identities: n arrays of rows; moment (N,): a number for each (video, frame). Returns groups, lists of positions in
    `identities`. Exact: every pair closer than tau waits in a heap, and a refused pair can only come back in a larger union.
    sums (n, d): of their unit features, if known; overwritten. fresh: bool (n,); pairs without a fresh one have been refused before.
    pairs: integers (m, 2), the only ones to consider, inherited by unions; all if None. `cross_video` gives sums and fresh, `follow` sums
    and pairs."""
    n, groups = len(identities), [[k] for k in range(len(identities))]
    if n < 2:
        return groups
    sums = np.stack([unit(features[rows]).sum(0) for rows in identities]) if sums is None else sums
    square, size = np.einsum("nd,nd->n", sums, sums), np.array([len(rows) for rows in identities])
    age, heap, read = np.zeros(n, np.int64), [], {}  # age: how often an identity has grown; -1 once it is part of another

    def offer(a: np.ndarray, b: np.ndarray) -> None:
        """Put pairs a[k], b[k] closer than tau on the heap, unless the sums alone tell that the union breaks sigma."""
        dot, lengths = np.einsum("nd,nd->n", sums[a], sums[b]), np.sqrt(square[a] * square[b])
        union = np.sqrt(np.maximum(square[a] + square[b] + 2 * dot, 0))
        mean = np.minimum((square[a] + dot) / size[a], (square[b] + dot) / size[b])  # product of a part's members with the union's sum
        keep = (dot > (1 - tau) * lengths) & (mean >= (1 - sigma - TOLERANCE) * union)
        a, b, distance = a[keep], b[keep], 1 - dot[keep] / lengths[keep]
        for pair in zip(distance.tolist(), a.tolist(), b.tolist(), age[a].tolist(), age[b].tolist()):
            heapq.heappush(heap, pair)

    def members(k: int) -> tuple[np.ndarray, set]:
        """Unit features and moments of an identity, read when they are first asked for."""
        if k not in read:
            if len(read) >= 4096:
                read.clear()  # so that memory stays a window
            rows = np.concatenate([identities[part] for part in groups[k]])
            read[k] = unit(features[rows]), set(moment[rows].tolist())
        return read[k]

    if pairs is None:
        fresh = np.ones(n, bool) if fresh is None else fresh
        for part in slices(n, n, 2**24):
            dot = sums[part] @ sums.T  # finds the pairs; `offer` decides, with the same products for all callers
            a, b = np.nonzero(dot > (1 - tau - 1e-4) * np.sqrt(square[part, None] * square))
            a += part.start
            once = (a < b) & (fresh[a] | fresh[b])
            offer(a[once], b[once])
    else:
        near = [set() for _ in range(n)]
        for a, b in pairs.tolist():
            near[a].add(b)
            near[b].add(a)
        for part in slices(len(pairs), 2, 2**17):
            offer(*pairs[part].T)

    while heap:
        _, i, j, *ages = heapq.heappop(heap)
        if ages != [age[i], age[j]]:  # one of them is another by now
            continue
        (x, seen), (y, met), total = members(i), members(j), sums[i] + sums[j]
        if not consistent([(x, seen), (y, met)], sigma, cannot_link, total):
            continue
        groups[i], groups[j] = groups[i] + groups[j], []  # i is the union from here on
        read[i] = np.concatenate([x, y]), seen | met
        read.pop(j, None)
        sums[i], square[i], size[i], age[i], age[j] = total, total @ total, size[i] + size[j], age[i] + 1, -1
        if pairs is None:
            others = np.flatnonzero(age >= 0)
        else:
            for k in near[j] - {i}:  # the union inherits
                near[k].add(i)
            near[i] |= near[j]
            others = np.array(sorted(near[i]), np.int64)
            others = others[age[others] >= 0]
        others = others[others != i]
        offer(np.full(len(others), i), others)
    return [group for group in groups if group]


def merge_labels(features, labels: np.ndarray, *rule) -> np.ndarray:
    """Labels (N,) after `merge` of all their identities."""
    labels = dense(labels)
    number = np.full(labels.max(initial=-1) + 2, -1)  # the last for -1
    for group in merge(features, group_rows(labels), *rule):
        number[group] = group[0]
    return number[labels]


def single_video(features, labels, video, track, frame, sigma, tau, min_images=2, cannot_link=True, recover=True) -> np.ndarray:
    """Level 2: identities within each video, out of level 1's labels. Labels (N,), -1 for what fits nowhere.

    (a) merge fragments, (b) give each anomaly to the nearest identity if it is within sigma of it and fits, (c) take what is left of a
    tracklet's anomalies, the other half of an identity switch, as a tracklet of its own and merge once more."""
    out, count = np.full(len(labels), -1, np.int64), 0
    for rows in group_rows(video):
        x, moment = unit(features[rows]), frame[rows]
        own = merge_labels(x, labels[rows], moment, sigma, tau, cannot_link)
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
    """Level 2 (b) for the unit features (n, d) of one video: labels (n,) in which anomalies have joined the nearest identity, the nearest
    first, if they are within sigma of its centroid (that of before) and it stays consistent."""
    identities, anomalies, labels = group_rows(labels), np.flatnonzero(labels < 0), labels.copy()
    if identities and len(anomalies):
        distance = 1 - features[anomalies] @ centroids_of(features, dense(labels)).T
        nearest, distance = distance.argmin(1), distance.min(1)
        for n in np.argsort(distance, kind="stable")[: (distance <= sigma).sum()]:
            wider = np.append(identities[nearest[n]], anomalies[n])
            if consistent([(unit(features[wider]), moment[wider].tolist())], sigma, cannot_link):
                identities[nearest[n]], labels[anomalies[n]] = wider, labels[wider[0]]
    return labels


def ranges(labels: np.ndarray, video: np.ndarray, window: int, stride: int):
    """Labels that have an image in each range of `window` consecutive videos, which moves by `stride`: arrays, one a range."""
    order = np.argsort(video, kind="stable")
    edges = np.append(np.flatnonzero(np.diff(video[order], prepend=-1)), len(order))  # of videos
    for start in range(0, max(1, len(edges) - 1 - window + stride), stride):
        here = np.unique(labels[order[edges[start] : edges[min(start + window, len(edges) - 1)]]])
        yield here[here >= 0]


def cross_video(features, labels, video, frame, sigma: float, tau: float, window=16, stride=8, cannot_link=True) -> np.ndarray:
    """Level 3: people across videos, out of level 2's labels. Labels (N,).

    A range of `window` consecutive videos moves over all of them by `stride`. A merge within a range links its identities; what is linked
    through overlapping ranges becomes one, see `follow`. Repeated with what was linked until no range can merge more: three to five rounds
    on walkers and 100,000 synthetic images, each linear in videos, though a chain can be built that needs as many as there are videos."""
    labels, rule = dense(labels), (moments(video, frame), sigma, tau, cannot_link)
    fresh, sums = np.ones(labels.max() + 1, bool), group_sums(features, labels)
    while True:
        identities, links = group_rows(labels), []
        for here in ranges(labels, video, window, stride):
            if fresh[here].any():
                for group in merge(features, [identities[n] for n in here], *rule, sums[here], fresh[here]):
                    links += zip(here[group[:-1]], here[group[1:]])  # (a, b), (b, c), ...: enough to make one component of them
        if not links:
            return labels
        labels, fresh, sums = follow(features, labels, identities, sums, np.unique(links, axis=0), *rule)


def follow(features, labels, identities, sums, links, moment, sigma: float, tau: float, cannot_link: bool) -> tuple:
    """Make one identity of all that are linked or, where that is not consistent, merge them anew, closest first, along links (m, 2).
    Returns labels (N,) and, of the new identities, whether they come from linked ones, bool, and their sums."""
    n = len(identities)
    component = connected_components(coo_array((np.ones(len(links)), links.T), shape=(n, n)), directed=False)[1]
    linked, new = np.bincount(component)[component] > 1, component.copy()
    for members, inner in zip(group_rows(np.where(linked, component, -1)), group_rows(component[links[:, 0]])):
        parts, total = [identities[k] for k in members], sums[members].sum(0)
        mean = sums[members] @ total / np.array([len(rows) for rows in parts])  # of each part's images, which are not read for this
        rows, may_fit = np.concatenate(parts), mean.min() >= (1 - sigma - 1e-5) * np.linalg.norm(total)
        if not may_fit or not consistent([(unit(features[rows]), moment[rows].tolist())], sigma, cannot_link):
            pairs = np.searchsorted(members, links[inner])
            for group in merge(features, parts, moment, sigma, tau, cannot_link, sums[members], pairs=pairs)[1:]:
                new[members[group]] = n + members[group[0]]
    number = dense(new)
    return np.where(labels >= 0, number[labels], -1), np.bincount(number, linked) > 0, sums_of(sums, number)


def calibrate(features, video, track, frame, say=lambda text: None) -> tuple[float, float]:
    """sigma and tau from the data, without a label: images of one tracklet are mostly one person, two tracklets seen in one frame are two
    people. features (N, d), in the space they will be compared in; the rest (N,). say is called with a sentence.

    sigma = (near + far) / 2, tau = (half + far) / 2: a quantile of one kind alone would move with the tracker's faults. far: the 15%
    quantile of distances between centroids of tracklets seen together (the closest are often one person, mixed up by the tracker);
    near: the 95% quantile from an image to the centroid of the rest of its tracklet; half: the median between a tracklet's halves.
    Measured on whole videos, evenly spread, of some 2^25 numbers."""
    video, track, frame = dense(np.asarray(video)), np.asarray(track), np.asarray(frame)
    rows = np.flatnonzero(video % -(-features.shape[0] * features.shape[1] // 2**25) == 0)
    rows = rows[np.lexsort((frame[rows], track[rows]))]
    x, track, moment = unit(features[rows]), dense(track[rows]), dense(moments(video[rows], frame[rows]))
    size = np.bincount(track)
    several = size[track] > 1
    rest = group_sums(x, track)[track[several]] - x[several]
    own = 1 - np.einsum("nd,nd->n", x[several], rest) / np.maximum(np.linalg.norm(rest, axis=1), 1e-12)
    nth = np.arange(len(rows)) - (np.cumsum(size) - size)[track]  # an image's place in its tracklet
    halves = centroids_of(x, 2 * track + (nth >= size[track] // 2))
    apart = 1 - np.einsum("nd,nd->n", halves[::2], halves[1::2])[size >= 4]
    seen = coo_array((np.ones(len(rows)), (track, moment))).tocsr()
    a, b = (seen @ seen.T).nonzero()
    together, text = (a < b).any(), "85% of tracklets seen together"
    if not together:  # of any two tracklets most are two people as well
        some = np.linspace(0, len(size) - 1, min(len(size), 400)).astype(np.int64)
        (a, b), text = some[np.array(np.triu_indices(len(some), 1))], "no tracklets seen together; half of all pairs"
    centroids = centroids_of(x, track)
    strangers = 1 - np.einsum("nd,nd->n", centroids[a[a < b]], centroids[b[a < b]])
    far = float(np.quantile(strangers, 0.15 if together else 0.5)) if len(strangers) else 1.0  # nothing to measure: at right angles
    near = np.quantile(own, 0.95) if len(own) else 0.0
    half = np.median(apart) if len(apart) else near
    say(f"95% of images lie within {near:.3f} of the rest of their tracklet, halves of a tracklet {half:.3f} apart (median), "
        f"{text} {far:.3f} or more")
    return tuple(float(np.clip((distance + far) / 2, TOLERANCE, 2)) for distance in (float(near), float(half)))


def denoise(features, video, track, frame, sigma=None, tau=None, min_images=2, window=16, stride=8, split=True, cannot_link=True,
            cut_by=None, levels=3, report=None) -> np.ndarray:
    """Identities from tracklets: calibration and the three levels. Labels int64 (N,), 0..n-1, -1 for noise.

    features: (N, d), array or memory-mapped, any float type; a network's are worth far more after `place`. video, track, frame: integers
    (N,); the range slides over videos in the order of their numbers; a track number belongs to one video. Sorted rows are read fastest.
    sigma, tau: thresholds in [0, 2], calibrated where None. split: cut identity switches before level 1, found in the features `cut_by`
    (N, any) if given, such as are not smoothed over time; without, level 2 recovers what it can of the other halves.
    levels: stop after level 1 (labels then are tracklets or their parts, and may skip numbers), 2 or 3.
    report: called with (level, labels, noise) before the first level and after each.
    Raises ValueError for what `check_thresholds` and `check_index` refuse, and for features that are zero or not finite."""
    features, back = features if hasattr(features, "shape") else np.asarray(features), slice(None)
    check_thresholds(sigma, tau, min_images, window, stride, levels=levels)
    video, track, frame, order = check_index(video, track, frame, features)
    for part in slices(*features.shape):
        unit(features[part], part.start)  # raises
    if order is not None:
        features, cut_by, back = Rows(features, order), None if cut_by is None else Rows(cut_by, order), np.argsort(order)
        video, track, frame = video[order], track[order], frame[order]
    if sigma is None or tau is None:
        chosen = calibrate(features, video, track, frame)
        sigma, tau = chosen[0] if sigma is None else sigma, chosen[1] if tau is None else tau
    report_level = lambda level, labels: report and report(level, labels[back], noise(features, labels, sigma, tau, video, window, stride))
    track = dense(track)
    report_level("tracklets", track)
    if split:
        track = split_switches(features if cut_by is None else cut_by, video, track, frame, tau)
    labels = single_tracklet(features, video, track, sigma, min_images)
    report_level("single tracklet", labels)
    if levels > 1:  # a cut has found the other half of a switch already
        labels = single_video(features, labels, video, track, frame, sigma, tau, min_images, cannot_link, recover=not split)
        report_level("single video", labels)
    if levels > 2:
        labels = cross_video(features, labels, video, frame, sigma, tau, window, stride, cannot_link)
        report_level("cross video", labels)
    return labels[back]


def denoise_tracklets(tracklets, features, scratch, truth=None, sigma=None, tau=None, center=True, whiten=True, smooth=1, print_line=print,
                      zeros=True, **options) -> tuple[np.ndarray, dict, Space]:
    """Fit the space, calibrate and denoise an index of tracklets, printing a line for each level.

    features (N, d), array or memory-mapped; with `zeros`, a zero row is an unreadable image and gets -1, else it is refused. scratch: name
    of files for the features in their space, removed at the end. truth (N,) is only measured against. options: `denoise`'s.
    Returns the labels (N,), the figures for log.jsonl (identities, images kept, noise, thresholds, F1) and the space."""
    clock, levels, full, readable = time.time(), [], np.full(len(tracklets), -1), np.ones(len(tracklets), bool)
    if features.ndim != 2 or len(features) != len(tracklets) or features.dtype.kind != "f":
        raise ValueError(f"{getattr(features, 'filename', 'features')}: {features.dtype} {features.shape}; expected float16 or float32 "
                         f"({len(tracklets)}, d), a row for each image of {tracklets.root} in the order of --index")
    for part in slices(*features.shape):
        x = np.asarray(features[part], np.float32)
        readable[part] = x.any(1) | (not zeros)
        unit(x[readable[part]], part.start + np.flatnonzero(readable[part]))  # raises
    rows, unreadable = np.flatnonzero(readable), np.flatnonzero(~readable)
    refuse_unreadable(tracklets, unreadable, len(tracklets))
    if len(unreadable):
        print_line(f"{len(unreadable):,} unreadable images are left out, the first: {tracklets.path(unreadable[0])}")
        features = Rows(features, rows)
    index = video, track, frame = tracklets.video[rows], tracklets.track[rows], tracklets.frame[rows]
    space = fit_space(features, video, track, center, whiten)
    header = f"{'level':<16} identities  images kept   noise: images  identities"
    line = "{level:<16} {identities:>10,}  {images_kept:>11,}  {noise_images:>14.1%}  {noise_identities:>10.1%}"
    if truth is not None:
        header, line = header + "   precision  recall     F1", line + "   {precision:>9.3f}  {recall:>6.3f}  {f1:>5.3f}"

    def print_level(level, labels, share):
        """One line of the table, and its figures."""
        full[rows], kept = labels, int((labels >= 0).sum())
        identities = int((np.bincount(labels + 1)[1:] > 0).sum())
        figures = dict(level=level, identities=identities, images_kept=kept, noise_images=share[0], noise_identities=share[1])
        levels.append(figures | ({} if truth is None else pairwise_scores(full, truth)))
        print_line(line.format(**levels[-1]))

    with replacing(scratch, keep=False) as sharp_file, replacing(Path(scratch).with_suffix(".smooth"), keep=False) as smooth_file:
        shape = len(rows), space.matrix.shape[1]
        sharp, placed = (np.lib.format.open_memmap(file, "w+", np.float16, shape) for file in (sharp_file, smooth_file))
        place(features, *index, space, 0, sharp)
        place(features, *index, space, smooth, placed)
        chosen = calibrate(placed, *index, print_line)
        sigma, tau = chosen[0] if sigma is None else sigma, chosen[1] if tau is None else tau
        print_line(f"sigma {sigma:.3f}, tau {tau:.3f} (calibrated: {chosen[0]:.3f}, {chosen[1]:.3f}) in "
                   f"{placed.shape[1]} dimensions of {space.matrix.shape[0]}")
        print_line(header)
        denoise(placed, *index, sigma, tau, cut_by=sharp, report=print_level, **options)
    before, after = ((figures["noise_images"], figures["noise_identities"]) for figures in (levels[0], levels[-1]))
    report = levels[-1] | {"noise_before": before, "noise_after": after, "levels": levels}
    report |= {"f1_tracklets": levels[0]["f1"]} if truth is not None else {}
    for name, values in (("tracklets", tracklets.track), ("videos", tracklets.video)):
        both = np.unique(full[full >= 0] * (values.max() + 1) + values[full >= 0])
        report[f"{name}_per_identity"] = len(both) / max(1, report["identities"])
    print_line("an identity spans {tracklets_per_identity:.1f} tracklets, {videos_per_identity:.1f} videos".format(**report)
               + "; there is one video only, so level 3 had nothing to compare" * (len(tracklets.folders) == 1))
    return full, report | {"sigma": sigma, "tau": tau, "seconds": time.time() - clock, "unreadable": unreadable.tolist()}, space


def show_identities(file, tracklets, labels: np.ndarray, people: int = 12, columns: int = 14) -> None:
    """Write a picture: an identity a row, those of most videos first, its images spread over them; framed red, at its end, images of its
    tracklets that were removed as noise."""
    images, sheet, rows_of = Images(tracklets, (128, 64)), [], []
    for rows in sorted(group_rows(labels), key=lambda rows: -min(len(np.unique(tracklets.video[rows])), 3))[: 10 * people]:
        rows_of.append((rows, np.flatnonzero((labels < 0) & np.isin(tracklets.track, tracklets.track[rows]))[:3]))
    for rows, gone in sorted(rows_of, key=lambda pair: -len(pair[1]))[:people]:
        shown = rows[np.linspace(0, len(rows) - 1, columns - len(gone)).astype(int)]
        sheet += [images[i][0] / 255 for i in shown] + [framed(images[i][0] / 255, (0.9, 0.1, 0.1)) for i in gone]
    if sheet:
        save_image(make_grid(torch.stack(sheet), nrow=columns), file)


def main() -> None:
    """Find the identities of a folder of tracklets with a network's features, and write them as an annotation JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, switch = parser.add_argument, dict(action=argparse.BooleanOptionalAction, default=True)
    flag("--weights", help="checkpoint of a run, or backbone weights; runs/walkers-r10ibn/last.pt if neither is given")
    flag("--features", help="features of any other encoder instead: a .npy file (N, d), a row for each line of --index")
    flag("--data", default="data/walkers", help="folder of tracklets; its train/ where there is a test.json too")
    flag("--index", action="store_true", help="print the images in the order of their rows, and stop")
    flag("--out", default="identities.json", help="annotation to write; pictures and figures go beside it")
    flag("--arch", help="architecture, if the checkpoint does not say")
    flag("--size", type=int, nargs=2, metavar=("H", "W"), help="input size, if the checkpoint does not say")
    flag("--workers", type=int, default=1, help="processes that decode images")
    flag("--sigma", type=float, help="intra-identity consistency, cosine distance in [0, 2]; calibrated if not given")
    flag("--tau", type=float, help="inter-identity discrimination, likewise")
    flag("--min_images", type=int, default=2, help="a tracklet that keeps fewer dissolves")
    flag("--window", type=int, default=16, help="videos in the sliding range")
    flag("--stride", type=int, default=8, help="videos by which it moves")
    flag("--levels", type=int, default=3, help="1 within tracklets, 2 within videos, 3 across videos")
    flag("--smooth", type=int, default=1, help="images before and after that an image is averaged with")
    flag("--center", **switch, help="subtract each video's mean")
    flag("--whiten", **switch, help="divide out the covariance")
    flag("--split", **switch, help="cut identity switches")
    flag("--cannot_link", **switch, help="images of one frame are two people")
    args = parser.parse_args()
    out, rank = Path(args.out), int(os.environ.get("RANK", 0))
    written = [out, *(out.with_suffix(suffix) for suffix in (".summary.json", ".space.npz", ".png"))]
    require(out.suffix == ".json", f"--out {out}: expected a name that ends in .json")
    for file in written:
        require(args.index or not file.exists(), f"{file}: exists already; give another --out")
    require(not (args.features and args.weights), "--features and --weights: give one of them")
    require(args.workers >= 0, f"--workers {args.workers}: expected 0 or more")
    check_thresholds(args.sigma, args.tau, args.min_images, args.window, args.stride, args.smooth, args.levels)
    train_folder, test_folder = find_splits(args.data)
    tracklets = read_tracklets(train_folder)
    if args.index:
        try:
            return print("\n".join(map(tracklets.path, range(len(tracklets)))), flush=True)
        except BrokenPipeError:  # `| head` has read enough
            return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    check_index(tracklets.video, tracklets.track, tracklets.frame, name=tracklets.path)
    say = print if rank == 0 else lambda text, **_: None
    say(f"{train_folder}: {tracklets}", flush=True)
    truth = Path(args.data) / "train.json"
    truth = read_labels(truth, tracklets) if test_folder and truth.exists() else None
    if args.features:
        try:
            features = np.load(args.features, mmap_mode="r", allow_pickle=False)
            features.ndim  # an archive has none
        except (OSError, ValueError, EOFError, AttributeError) as error:
            why = getattr(error, "strerror", None) or "expected one array in NumPy's .npy format"
            raise ValueError(f"--features {args.features}: {why}") from None
    else:
        if "RANK" in os.environ:
            dist.init_process_group("gloo")  # processes only wait for each other
        backbone, size, _ = load_backbone(args.weights or "runs/walkers-r10ibn/last.pt", args.arch, args.size, say)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
        features = extract_to_file(out.parent, backbone.to(device), tracklets, size, device, args.workers)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank > 0:
        return
    options = {name: getattr(args, name) for name in ("sigma", "tau", *OPTIONS)}
    scratch = out.with_suffix(".scratch")
    labels, report, space = denoise_tracklets(tracklets, features, scratch, truth, zeros=not args.features, **options)
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
