"""Progressive multi-level denoising: from a tracker's tracklets to identities across videos.

First the paper (sections 3.1 and 3.2), equation by equation, in its own symbols: what noise is,
and the three levels that remove it. `denoise(..., paper=True)` is exactly that. Then, under a
banner, what we add so that it works with an encoder that has never seen an identity. The program
comes last.

    python denoise.py --weights runs/walkers-r10ibn/last.pt

Features are arrays or memory-mapped files of any size: one video is in memory at a time, and a
centroid for each tracklet. Read first: `noise`, `trim`, `reallocate`, `links`, `denoise`.
"""
import argparse
import json
import os
import signal
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

from data import (
    Images,
    find_splits,
    framed,
    read_labels,
    read_tracklets,
    refuse_unreadable,
    replacing,
    write_labels,
)
from model import extract_to_file, load_backbone

TIE = 1e-6  # distances that differ by less are equal, for the rounding of float32
BLOCK = 512  # tracklets whose distances to their ranges are in memory at a time


# ---------------------------------------------------------------- definitions


def unit(features):
    """Features (n, d) at unit length, float32."""
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(length, 1e-12)


def centroid(features):
    """c_k (d,): the mean of an identity's features (n, d), at unit length, which no cosine sees."""
    return unit(features.mean(0))


def radius(features) -> float:
    """r_k: the largest distance of an identity's features (n, d) from its centroid (eq. 1)."""
    return float((1 - features @ centroid(features)).max())


class Noise(NamedTuple):
    """n_S and its two parts."""

    total: float
    consistency: float  # share of identities that are too wide
    discrimination: float  # ordered pairs that are too close, for each identity


def noise(features, labels, sigma_cst, sigma_drm, r_s=None) -> Noise:
    """n_S = (1 / M) (sum_k n_k^cst + sum_i sum_{j != i} n_ij^drm) of M identities (eq. 3).

    n_k^cst is 1 where r_k > sigma_cst (eq. 1), n_ij^drm where dist(c_i, c_j) < sigma_drm (eq. 2).
    features (N, d) of any length; labels (N,), -1 for images in no identity. All pairs are compared
    or, given r_s, identities at most r_s apart in the order of their numbers, as level 3 does."""
    labels = dense(np.asarray(labels))
    M = labels.max(initial=-1) + 1
    if M == 0:
        return Noise(0.0, 0.0, 0.0)
    centroids = centroids_of(features, labels)
    too_wide = np.zeros(M, bool)
    for part in parts(features):
        kept = labels[part] >= 0
        mine = labels[part][kept]
        distance = 1 - np.einsum("nd,nd->n", unit(features[part])[kept], centroids[mine])
        too_wide[mine[distance > sigma_cst + TIE]] = True
    close = 0
    for i, _, _ in links(centroids, sigma_drm, r_s or M):
        close += len(i)
    consistency = float(too_wide.mean())
    discrimination = close / M
    return Noise(consistency + discrimination, consistency, discrimination)


def dense(labels):
    """Numbers from 0 renumbered 0..n-1 in their order; -1 stays -1."""
    names = np.unique(labels[labels >= 0])
    return np.where(labels >= 0, np.searchsorted(names, labels), -1)


def parts(features):
    """Slices over the rows of features (N, d), of about 32 MB each."""
    rows = max(1, 2**23 // features.shape[1])
    for start in range(0, len(features), rows):
        yield slice(start, start + rows)


def sums_of(features, group, groups: int):
    """Sum of the features (n, d) of each group 0..groups-1: (groups, d)."""
    n = len(features)
    members = coo_array((np.ones(n, np.float32), (group, np.arange(n))), shape=(groups, n))
    return members.tocsr() @ features


def sums_by_label(features, labels):
    """Sums (n, d) of the unit features of labels 0..n-1, by one pass over features (N, d)."""
    sums = np.zeros((labels.max(initial=-1) + 1, features.shape[1]), np.float32)
    for part in parts(features):
        kept = labels[part] >= 0
        names, group = np.unique(labels[part][kept], return_inverse=True)
        sums[names] += sums_of(unit(features[part])[kept], group, len(names))
    return sums


def centroids_of(features, labels):
    """Centroids (n, d) of labels 0..n-1 of features (N, d); -1 is left out."""
    return unit(sums_by_label(features, labels))


# ---------------------------------------------------------------- level 1: single tracklet (eq. 4)


def trim(features, sigma_cst):
    """Which of a tracklet's features (n, d), in order of time, are consistent: indices, ascending.

    Repeat: the sample farthest from the centroid of the remaining ones is excluded, if it is at
    least sigma_cst away. Of samples equally far the latest goes; the last one always stays."""
    kept = np.arange(len(features))
    while len(kept) > 1:
        x = features[kept]
        remaining = unit(x.sum(0) - x)
        distance = 1 - np.einsum("nd,nd->n", x, remaining)
        worst = np.flatnonzero(distance >= distance.max() - TIE)[-1]
        if distance[worst] < sigma_cst:
            break
        kept = np.delete(kept, worst)
    return kept


def single_tracklet(features, track, sigma_cst):
    """Level 1: labels (n,), the number of an image's tracklet, or -1 where it was excluded.
    features (n, d), unit length; track (n,), the images of each tracklet in order of time."""
    labels = np.full(len(track), -1, np.int64)
    for rows in rows_of(track):
        kept = rows[trim(features[rows], sigma_cst)]
        labels[kept] = track[kept]
    return labels


def rows_of(labels):
    """Rows of every label >= 0, in ascending order of labels."""
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels, 0, sorter=order) :]
    if len(order) == 0:
        return []
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


# ---------------------------------------------------------------- level 2: single video (eq. 5, 6)


def reallocate(features, labels, track, sigma_cst, frame=None):
    """Excluded samples of a video, each moved to the nearest *other* tracklet if that is closer
    than sigma_cst, else discarded (eq. 5). Centroids are those that level 1 left. Labels (n,).

    features (n, d), unit length; labels (n,), level 1's; track (n,), where a sample came from.
    frame (n,): if given, a sample joins nobody who is in its frame too (cannot-link, ours)."""
    tracklets = np.unique(labels[labels >= 0])
    if len(tracklets) == 0:
        return labels
    centroids = np.stack([centroid(features[labels == k]) for k in tracklets])
    labels = labels.copy()
    for i in np.flatnonzero(labels < 0):
        distance = 1 - centroids @ features[i]
        distance[tracklets == track[i]] = np.inf
        if frame is not None:
            seen = labels[frame == frame[i]]
            distance[np.isin(tracklets, seen)] = np.inf
        nearest = distance.argmin()
        if distance[nearest] < sigma_cst:
            labels[i] = tracklets[nearest]
    return labels


def single_video(
    features,
    labels,
    track,
    frame,
    sigma_cst,
    sigma_drm,
    cannot_link=False,
    closest_first=False,
    nearness=0.0,
):
    """Level 2 for the images of one video: reallocate, then merge tracklets whose centroids, now
    with what was reallocated, are closer than sigma_drm, all that are linked becoming one (eq. 6).
    Labels (n,), 0.. or -1. The last three are ours."""
    labels = reallocate(features, labels, track, sigma_cst, frame if cannot_link else None)
    video = np.zeros_like(frame)
    labels = in_sequence(labels, video, frame)
    all_of_it = max(1, labels.max())  # every tracklet is in the range of every other
    return cross_video(
        features, labels, video, frame, sigma_drm, all_of_it, cannot_link, closest_first, nearness
    )


# ---------------------------------------------------------------- level 3: across videos (eq. 6, 7)


def links(centroids, sigma_drm, r_s):
    """Linking relations (eq. 7) of every c in turn to those of its sliding range, the tracklets at
    most r_s places before or after it, whose centroids are closer than sigma_drm (eq. 6).

    centroids (T, d), unit length, in the order of the ultra-long video. Yields, a block of c at a
    time, arrays c, t and their distance; each link comes twice, once from either end."""
    T = len(centroids)
    for start in range(0, T, BLOCK):
        first = max(0, start - r_s)
        c = np.arange(start, min(start + BLOCK, T))
        t = np.arange(first, min(start + BLOCK + r_s, T))
        distance = 1 - centroids[c] @ centroids[t].T
        i, j = np.nonzero(distance < sigma_drm)
        gap = np.abs(c[i] - t[j])
        in_range = (0 < gap) & (gap <= r_s)
        i = i[in_range]
        j = j[in_range]
        yield c[i], t[j], distance[i, j]


def closure(centroids, sigma_drm, r_s):
    """The closure of all linking relations of centroids (T, d): everybody who is linked, through
    others too, is one identity. Their numbers (T,). O(T r_s), however long links chain."""
    heads = [np.zeros(0, np.int64)]
    members = [np.zeros(0, np.int64)]
    for c, t, _ in links(centroids, sigma_drm, r_s):
        # of a block's links only those are kept that make the same closure: to the first of each
        names, ends = np.unique(np.concatenate([c, t]), return_inverse=True)
        part = connected(ends[: len(c)], ends[len(c) :], len(names))
        first = names[np.unique(part, return_index=True)[1]]
        heads.append(first[part])
        members.append(names)
    return connected(np.concatenate(heads), np.concatenate(members), len(centroids))


def connected(i, j, n: int):
    """Numbers (n,) of the connected components of links i, j between 0..n-1."""
    linked = coo_array((np.ones(len(i), bool), (i, j)), shape=(n, n))
    return connected_components(linked, directed=False)[1]


def cross_video(
    features,
    labels,
    video,
    frame,
    sigma_drm,
    r_s,
    cannot_link=False,
    closest_first=False,
    nearness=0.0,
):
    """Level 3: what is linked within the sliding range is one identity, through others too (eq. 7).
    features (N, d); labels (N,), level 2's, as `in_sequence` numbers them. Labels (N,), or -1."""
    centroids = centroids_of(features, labels)
    if closest_first:
        apart = seen_together(labels, video, frame) if cannot_link else None
        identity = merge_closest_first(centroids, sigma_drm, r_s, apart, nearness)
    else:
        identity = closure(centroids, sigma_drm, r_s)
    return np.where(labels >= 0, identity[labels], -1)


def in_sequence(labels, video, frame):
    """Labels renumbered in the order of the ultra-long video: by video, then first frame."""
    kept = np.flatnonzero(labels >= 0)
    kept = kept[np.lexsort((frame[kept], video[kept]))]
    names, first = np.unique(labels[kept], return_index=True)
    number = np.full(labels.max(initial=-1) + 2, -1)  # number[-1], the last, is that of -1
    number[names[np.argsort(first)]] = np.arange(len(names))
    return number[labels]


# ---------------------------------------------------------------- all of it

PAPER = (0.2, 0.18)  # sigma_cst and sigma_drm
# settings here and in train.py, by these names
OPTIONS = (
    "sigma_cst",
    "sigma_drm",
    "r_s",
    "levels",
    "nearness",
    "center",
    "whiten",
    "cut",
    "cannot_link",
    "closest_first",
)


def denoise(
    features,
    video,
    track,
    frame,
    sigma_cst=None,
    sigma_drm=None,
    r_s=1000,
    paper=False,
    cut=True,
    cannot_link=True,
    closest_first=True,
    nearness=0.1,
    levels=3,
    report=None,
):
    """Identities from tracklets, by three levels: labels int64 (N,), 0..n-1, -1 for noise.

    features (N, d): array or memory map, any float type and length. video, track, frame: integers
    (N,); videos follow each other by number, a tracklet is (video, track). Thresholds are cosine
    distances, r_s is in tracklets. paper: eq. 4 to 7 to the letter, thresholds 0.2 and 0.18 unless
    given; else with our additions, each of which can be left out, and thresholds from `calibrate`.
    report: called with (level, labels, noise) before level 1 and after each. Raises ValueError for
    what is no index, features that are zero or not finite, and settings out of range."""
    features = features if hasattr(features, "shape") else np.asarray(features)
    check_settings(sigma_cst, sigma_drm, r_s, nearness, levels)
    video, track, frame = check_index(video, track, frame, features)
    check_features(features)
    track = number_tracklets(video, track)
    order = np.lexsort((frame, track))  # tracklets are numbered by video
    back = np.argsort(order)
    features = Rows(features, order)
    video = video[order]
    track = track[order]
    frame = frame[order]
    given = (sigma_cst, sigma_drm, r_s, paper)
    sigma_cst, sigma_drm = thresholds(features, video, track, frame, *given)
    if paper:
        cut = cannot_link = closest_first = False
        nearness = 0.0
    additions = (cannot_link, closest_first, nearness)

    def done(level, labels):
        """Labels in the order of the ultra-long video, reported in the order of the rows given."""
        labels = in_sequence(labels, video, frame)
        if report is not None:
            n_S = noise(features, labels, sigma_cst, sigma_drm, r_s)
            report(level, labels[back], n_S)
        return labels

    done("tracklets", track)
    within = within_videos(features, video, track, frame, sigma_cst, sigma_drm, cut, additions)
    level1, level2 = within
    labels = done("single tracklet", level1)
    if levels >= 2:
        labels = done("single video", level2)
    if levels == 3:
        level3 = cross_video(features, labels, video, frame, sigma_drm, r_s, *additions)
        labels = done("cross video", level3)
    return labels[back]


def within_videos(features, video, track, frame, sigma_cst, sigma_drm, cut, additions):
    """Levels 1 and 2, one video in memory at a time: the labels (N,) of each, numbers of one video
    being of no other."""
    level1 = np.empty(len(track), np.int64)
    level2 = np.empty(len(track), np.int64)
    for rows in rows_of(video):
        x = unit(features[rows])
        pieces = cut_tracklets(x, track[rows], sigma_drm) if cut else track[rows]
        first = single_tracklet(x, pieces, sigma_cst)
        level1[rows] = np.where(first >= 0, rows[0] + dense(first), -1)
        second = single_video(x, first, pieces, frame[rows], sigma_cst, sigma_drm, *additions)
        level2[rows] = np.where(second >= 0, rows[0] + second, -1)
    return level1, level2


def number_tracklets(video, track):
    """Numbers 0..T-1 (N,) of tracklets (video, track), by video."""
    track = dense(track)
    return dense(dense(video) * (track.max() + 1) + track)


def thresholds(
    features, video, track, frame, sigma_cst=None, sigma_drm=None, r_s=1000, paper=False
):
    """sigma_cst and sigma_drm as given, or the paper's, or else calibrated."""
    chosen = PAPER
    if not paper and (sigma_cst is None or sigma_drm is None):
        chosen = calibrate(features, video, track, frame, r_s)
    if sigma_cst is None:
        sigma_cst = chosen[0]
    if sigma_drm is None:
        sigma_drm = chosen[1]
    return sigma_cst, sigma_drm


class Rows:
    """Some rows of features (N, d), read when they are asked for."""

    def __init__(self, features, rows):
        self.features = features
        self.rows = rows
        self.shape = (len(rows), features.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which):
        return np.asarray(self.features[self.rows[which]])


def check_settings(sigma_cst, sigma_drm, r_s, nearness=0.0, levels=3) -> None:
    """Raise ValueError for a setting out of its range, before an hour goes into features."""
    for name, value in (("sigma_cst", sigma_cst), ("sigma_drm", sigma_drm)):
        if value is not None and not 0 <= value <= 2:
            raise ValueError(f"{name}={value}: a cosine distance lies in [0, 2]")
    if r_s < 1:
        raise ValueError(f"r_s={r_s}: the sliding range needs 1 tracklet or more on each side")
    if not 0 <= nearness <= 2:
        raise ValueError(f"nearness={nearness}: expected a cosine distance in [0, 2]")
    if levels not in (1, 2, 3):
        raise ValueError(f"levels={levels}: expected 1, 2 or 3")


def check_index(video, track, frame, features):
    """video, track, frame as int64 (N,). Raises ValueError for another length than that of the
    features (N, d), and for what are not whole numbers from 0."""
    if len(features.shape) != 2 or len(features) == 0:
        raise ValueError(f"features: expected (N, d), N of 1 or more, got {features.shape}")
    index = []
    for name, given in (("video", video), ("track", track), ("frame", frame)):
        given = np.asarray(given)
        if given.shape != (len(features),):
            raise ValueError(f"{name} has shape {given.shape}, features have {len(features)} rows")
        bad = np.flatnonzero(~(given >= 0) | (given % 1 != 0))
        if len(bad):
            raise ValueError(
                f"{name} of row {bad[0]} is {given[bad[0]]}: expected whole numbers from 0"
            )
        index.append(given.astype(np.int64))
    return index


def check_features(features) -> None:
    """Raise ValueError for rows of features (N, d) that are zero or not finite."""
    for part in parts(features):
        length = np.linalg.norm(np.asarray(features[part], np.float32), axis=1)
        bad = np.flatnonzero(~(length > 1e-12) | ~np.isfinite(length))
        if len(bad):
            raise ValueError(f"features: row {part.start + bad[0]} is zero or not finite")


# ================================================================ what we add
#
# The paper's thresholds belong to its extractor, which was trained with identities, and its closure
# chains whoever looks like somebody who looks like somebody. With an encoder that has seen no
# identity, these additions make the three levels work. docs/denoising.md has what each is worth.

# ---------------------------------------------------------------- the space


class Space(NamedTuple):
    """Where features are compared: x -> unit((x - its video's mean) @ matrix)."""

    mean: np.ndarray  # (d,) of all images
    prior: float  # as how many tracklets `mean` counts in a video's own mean; inf: only it counts
    matrix: np.ndarray  # (d, k)


def fit_space(features, video, track, center=True, whiten=True) -> Space:
    """A space found without a label, in two passes: features (N, d); video, track (N,).

    center: a camera makes its images alike, so a video's mean is taken off, drawn to the overall
    mean as if 8 tracklets more had that; without it, the overall mean is taken off. whiten: the
    covariance is divided out, shrunk towards a sphere by the oracle approximating coefficient (Chen
    et al., 2010), in the 512 principal directions at most, and half as many as there are tracklets:
    among more, some would tell every tracklet from every other."""
    video = dense(np.asarray(video))
    track = number_tracklets(video, np.asarray(track))
    N, d = features.shape
    total = sums_by_label(features, np.zeros(N, np.int64))[0]
    space = Space(total / N, 8.0 if center else np.inf, np.eye(d, dtype=np.float32))
    if not whiten:
        return space
    covariance = np.zeros((d, d))
    for rows in rows_of(video):
        x = centred(unit(features[rows]), track[rows], space)
        covariance += x.T @ x / N
    trace = np.trace(covariance)
    squares = (covariance**2).sum()
    above = (1 - 2 / d) * squares + trace**2
    below = (N + 1 - 2 / d) * (squares - trace**2 / d)
    rho = min(1.0, above / max(below, 1e-30))
    sphere = trace / d * np.eye(d)
    values, vectors = np.linalg.eigh((1 - rho) * covariance + rho * sphere)  # ascending
    matrix = vectors / np.sqrt(np.maximum(values, 1e-9))
    T = track.max() + 1
    kept = min(d, 512, max(2, T // 2))
    return space._replace(matrix=matrix[:, -kept:].astype(np.float32))


def centred(x, track, space: Space):
    """A video's images x (n, d) without its mean, which is that of its tracklets' means."""
    mine, size = np.unique(track, return_inverse=True, return_counts=True)[1:]
    means = sums_of(x, mine, len(size)) / size[:, None]
    weight = 1 / (1 + space.prior / len(means))
    return x - (weight * means.mean(0) + (1 - weight) * space.mean)


def place(features, video, track, frame, space: Space, out=None):
    """Features (N, d) in a space: unit rows (N, k) float32, or written to `out`, an array or memory
    map of any float type. Works for later images too: their videos' means are their own."""
    if out is None:
        out = np.empty((len(features), space.matrix.shape[1]), np.float32)
    track = np.asarray(track)
    for rows in rows_of(dense(np.asarray(video))):
        x = centred(unit(features[rows]), track[rows], space) @ space.matrix
        # an image that is nothing but its video's mean: one direction for all such
        x[np.linalg.norm(x, axis=1) < 1e-6] = 1
        out[rows] = unit(x)
    return out


# ---------------------------------------------------------------- cuts


def cut_tracklets(features, track, sigma_drm):
    """Tracklets cut, and their parts again, where the tracker went over to somebody else: where two
    parts, of one image or more, are at least sigma_drm apart. Numbers (n,) of the parts.
    features (n, d), unit length; track (n,), the images of each tracklet in order of time."""
    numbers = np.empty(len(track), np.int64)
    count = 0
    for tracklet in rows_of(track):
        waiting = [tracklet]
        while waiting:
            rows = waiting.pop()
            at = find_cut(features[rows], sigma_drm)
            if at > 0:
                waiting += [rows[at:], rows[:at]]
            else:
                numbers[rows] = count
                count += 1
    return numbers


def find_cut(x, sigma_drm) -> int:
    """How many of a tracklet's features (n, d) come before the cut that leaves the least variance
    within its two parts; 0 where their centroids are closer than sigma_drm."""
    if len(x) == 1:
        return 0
    size = np.arange(1, len(x))  # of the first part
    before = x.cumsum(0)[:-1]
    after = x.sum(0) - before
    explained = (before**2).sum(1) / size + (after**2).sum(1) / (len(x) - size)
    best = explained.argmax()
    distance = 1 - unit(before[best]) @ unit(after[best])
    return size[best] if distance >= sigma_drm else 0


# ---------------------------------------------------------------- cannot-link


def seen_together(labels, video, frame):
    """Two boxes in one frame are two people: pairs of labels that are seen in the same frame of a
    video, (2, pairs), the smaller first."""
    kept = labels >= 0
    frame = dense(frame[kept])
    moment = dense(video[kept] * (frame.max() + 1) + frame)
    shape = (labels.max() + 1, moment.max() + 1)
    seen = coo_array((np.ones(len(moment)), (labels[kept], moment)), shape=shape).tocsr()
    first, second = (seen @ seen.T).nonzero()
    return np.stack([first, second])[:, first < second].astype(np.int64)


# ---------------------------------------------------------------- closest first, not the closure


def merge_closest_first(centroids, sigma_drm, r_s, apart=None, nearness=0.0):
    """Join linked tracklets, the closest first, while closer than sigma_drm: numbers (T,).

    How far two identities are is the mean over the pairs of their tracklets, which the sums of
    centroids (T, d) give, plus nearness times the places between them, as a share of r_s. A union
    has the links of its parts. Those `apart` (2, pairs), and unions with them, never join. All who
    are each other's closest join at once, which takes a dozen rounds for any T. With everybody in
    range and no nearness that is the same as one pair after the other (Bruynooghe, 1977)."""
    T = len(centroids)
    identity = np.arange(T)
    sums = centroids.copy()
    size = np.ones(T, np.float32)
    position = np.arange(T, dtype=np.float64)  # like sums: of all its tracklets
    pairs = nearest_links(centroids, sigma_drm, r_s)
    never = np.empty(0, np.int64) if apart is None else apart[0] * T + apart[1]
    while True:
        pairs = pairs[~np.isin(pairs, never)]
        i, j = np.divmod(pairs, T)
        gap = np.abs(position[i] / size[i] - position[j] / size[j])
        distance = 1 - dots(sums, i, j) / (size[i] * size[j])
        distance += nearness * np.minimum(gap / r_s, 1)
        near = distance < sigma_drm
        pairs = pairs[near]
        if len(pairs) == 0:
            return dense(identity)
        i, j = mutually_closest(i[near], j[near], distance[near])
        sums[i] += sums[j]
        size[i] += size[j]
        position[i] += position[j]
        union = np.arange(T)
        union[j] = i
        identity = union[identity]
        pairs = rename(pairs, union)
        never = rename(never, union)


def nearest_links(centroids, sigma_drm, r_s, most=10):
    """The links of each tracklet to its `most` nearest, which bounds memory and time where links
    chain half of all people. Numbers i T + j of pairs i < j, ascending."""
    T = len(centroids)
    found = []
    for c, t, distance in links(centroids, sigma_drm, r_s):
        order = np.lexsort((distance, c))
        c = c[order]
        t = t[order]
        rank = np.arange(len(c)) - np.searchsorted(c, c)  # of t among the links of c
        c = c[rank < most]
        t = t[rank < most]
        found.append(np.minimum(c, t) * T + np.maximum(c, t))
    return np.unique(np.concatenate(found))


def dots(x, i, j):
    """Products of the rows i and j of x (T, d): (pairs,), a few at a time."""
    out = np.empty(len(i), np.float32)
    step = max(1, 2**23 // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        out[part] = np.einsum("nd,nd->n", x[i[part]], x[j[part]])
    return out


def mutually_closest(i, j, distance):
    """Of pairs (i, j), those in which each is the other's closest; of equals the first counts."""
    order = np.lexsort((j, i, distance))
    i = i[order]
    j = j[order]
    ends = np.stack([i, j], 1).ravel()
    names, first = np.unique(ends, return_index=True)
    closest = np.empty(ends.max() + 1, np.int64)
    closest[names] = first // 2  # the pair in which each comes first
    mutual = closest[i] == closest[j]
    return i[mutual], j[mutual]


def rename(pairs, union):
    """Pairs i T + j after each i has become union[i], without those that are one now."""
    T = len(union)
    i, j = np.divmod(pairs, T)
    i = union[i]
    j = union[j]
    renamed = np.minimum(i, j) * T + np.maximum(i, j)
    return np.unique(renamed[i != j])


# ---------------------------------------------------------------- calibration


def calibrate(features, video, track, frame, r_s=1000):
    """sigma_cst and sigma_drm, from tracklets alone: features (N, d), the rest (N,).

    `near` and `wide` are the median and the 95% quantile of how far an image is from the rest of
    its tracklet; `far` is the median between tracklets of different videos in a range, who are
    strangers. sigma_cst is halfway between wide and far. sigma_drm is halfway between near and far
    or, where people change more from video to video, the distance within which half of all links
    lie."""
    video = dense(np.asarray(video))
    track = number_tracklets(video, np.asarray(track))
    track = in_sequence(track, video, np.asarray(frame))
    sums = sums_by_label(features, track)
    own = distances_to_the_rest(features, track, sums)
    between = distances_between_videos(unit(sums), video, track, r_s)
    near, wide = np.quantile(own, (0.5, 0.95)) if len(own) else (0.0, 0.0)
    far = np.median(between) if len(between) else 1.0
    sigma_cst = (wide + far) / 2
    sigma_drm = max((near + far) / 2, half_of_links(np.sort(between)))
    # where all features are alike, rounding must not exclude or cut anything
    return float(max(sigma_cst, 2 * TIE)), float(max(sigma_drm, 2 * TIE))


def distances_to_the_rest(features, track, sums):
    """How far each image is from the centroid of the remaining ones of its tracklet, of those with
    several; sums (T, d) of the tracklets' features."""
    several = np.bincount(track) > 1
    found = [np.zeros(0)]
    for part in parts(features):
        kept = several[track[part]]
        x = unit(features[part])[kept]
        remaining = unit(sums[track[part][kept]] - x)
        found.append(1 - np.einsum("nd,nd->n", x, remaining))
    return np.concatenate(found)


def distances_between_videos(centroids, video, track, r_s):
    """Distances of tracklets, 1,000 at most and evenly spread, to all of other videos in range."""
    T = len(centroids)
    home = np.empty(T, np.int64)
    home[track] = video
    found = [np.zeros(0)]
    for c in np.linspace(0, T - 1, min(T, 1000)).astype(int):
        t = np.arange(max(0, c - r_s), min(T, c + r_s + 1))
        t = t[home[t] != home[c]]
        found.append(1 - centroids[t] @ centroids[c])
    return np.concatenate(found)


def half_of_links(between) -> float:
    """The distance within which half of all links lie. `between`: sorted distances of tracklets,
    most of whom are strangers. Strangers are nearer than the median m by x as often as farther by
    x. So within m - x are as many strangers as lie beyond m + x, and the others are links. Only
    distances within which a quarter at most are strangers are trusted; 0 if there are none."""
    median = np.median(between) if len(between) else 0.0
    nearer = np.arange(1, len(between) // 2 + 1)
    mirrored = 2 * median - between[: len(nearer)]
    strangers = len(between) - np.searchsorted(between, mirrored)
    links = nearer - strangers
    trusted = np.flatnonzero(strangers <= nearer / 4)
    if len(trusted) == 0:
        return 0.0
    half = np.argmax(links >= links.max() / 2)
    return float(between[min(half, trusted[-1])])


# ================================================================ the program


def pairwise_scores(labels, truth) -> dict[str, float]:
    """Precision, recall and F1 over pairs of images: is a pair together in labels, and is it truly
    one person? An image labelled -1 is in no pair of its side: one without a true identity makes
    every pair found with it a wrong one."""
    both = (labels >= 0) & (truth >= 0)
    shape = (labels.max(initial=-1) + 2, truth.max(initial=-1) + 2)
    table = coo_array((np.ones(both.sum()), (labels[both], truth[both])), shape=shape).tocsr()
    hit = pairs_in(table.data)
    precision = hit / max(1, pairs_in(np.bincount(labels[labels >= 0])))
    recall = hit / max(1, pairs_in(np.bincount(truth[truth >= 0])))
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}


def pairs_in(sizes) -> float:
    """How many pairs there are within groups of these sizes."""
    return float((sizes * (sizes - 1.0) / 2).sum())


def denoise_tracklets(
    tracklets, features, scratch, truth=None, say=print, center=True, whiten=True, **options
):
    """`denoise` an index of tracklets in the space of its features, and say a line a level.

    features (N, d): a zero row is an image that could not be read, and gets -1. scratch: a file for
    the placed features, gone at the end. truth (N,) is only measured against. options: `denoise`'s.
    Returns labels (N,), figures for log.jsonl, and the space, which the paper does not have."""
    clock = time.time()
    readable = np.empty(len(tracklets), bool)
    for part in parts(features):
        readable[part] = np.asarray(features[part]).any(1)
    rows = np.flatnonzero(readable)
    unreadable = np.flatnonzero(~readable)
    refuse_unreadable(tracklets, unreadable, len(tracklets))
    if len(unreadable):
        first = tracklets.path(unreadable[0])
        say(f"{len(unreadable):,} unreadable images are left out, the first: {first}")
    features = Rows(features, rows)
    check_features(features)
    index = tracklets.video[rows], tracklets.track[rows], tracklets.frame[rows]
    labels = np.full(len(tracklets), -1)
    table = []

    def say_level(level, found, n_S):
        """Log a level of the readable images, and print its line."""
        labels[rows] = found
        table.append(figures_of(level, labels, n_S, truth))
        say(LINE.format(**table[-1]) + (SCORES.format(**table[-1]) if truth is not None else ""))

    space = None
    with replacing(scratch, keep=False) as file:
        if not options["paper"]:
            space = fit_space(features, *index[:2], center, whiten)
            shape = len(rows), space.matrix.shape[1]
            placed = np.lib.format.open_memmap(file, "w+", np.float16, shape)
            features = place(features, *index, space, placed)
        given = [options[name] for name in ("sigma_cst", "sigma_drm", "r_s", "paper")]
        chosen = thresholds(features, *index, *given)
        options |= zip(("sigma_cst", "sigma_drm"), chosen)
        say("sigma_cst {:.3f}, sigma_drm {:.3f}, r_s {:,}".format(*chosen, options["r_s"]))
        say(HEADER)
        denoise(features, *index, report=say_level, **options)

    figures = table[-1] | {"levels": table, "unreadable": unreadable.tolist()}
    figures |= {"noise_before": table[0]["noise"], "noise_after": table[-1]["noise"]}
    figures |= zip(("sigma_cst", "sigma_drm"), chosen)
    if truth is not None:
        figures["f1_tracklets"] = table[0]["f1"]
    spanned = {"tracklets": tracklets.track, "videos": tracklets.video}
    for name, of in spanned.items():
        both = np.unique(labels[labels >= 0] * (of.max() + 1) + of[labels >= 0])
        figures[f"{name}_per_identity"] = len(both) / figures["identities"]
        say(f"an identity spans {figures[f'{name}_per_identity']:.1f} {name}")
    figures["seconds"] = time.time() - clock
    return labels, figures, space


HEADER = "level            identities    images  noise n_S =  too wide + too close"
HEADER += "   precision  recall     F1, where the truth is known"
LINE = "{level:<16}{identities:>11,}{images_kept:>10,}"
LINE += "{noise[0]:>11.2f}{noise[1]:>12.2f}{noise[2]:>12.2f}"
SCORES = "{precision:>12.3f}{recall:>8.3f}{f1:>7.3f}"


def figures_of(level: str, labels, n_S: Noise, truth) -> dict:
    """What is logged of a level."""
    figures = {"level": level, "identities": int(labels.max()) + 1}
    figures["images_kept"] = int((labels >= 0).sum())
    figures["noise"] = n_S
    if truth is not None:
        figures |= pairwise_scores(labels, truth)
    return figures


def show_identities(file, tracklets, labels, people=12, columns=14) -> None:
    """Write a picture: an identity a row, those of most videos first, its images spread over them;
    framed red at its end, images of its tracklets that are in no identity."""
    images = Images(tracklets, (128, 64))
    identities = rows_of(labels)
    identities.sort(key=lambda rows: -len(np.unique(tracklets.video[rows])))
    sheet = []
    for rows in identities[:people]:
        gone = (labels < 0) & np.isin(tracklets.track, tracklets.track[rows])
        gone = np.flatnonzero(gone)[:3]
        shown = np.linspace(0, len(rows) - 1, columns - len(gone)).astype(int)
        sheet += [images[i][0] / 255 for i in rows[shown]]
        sheet += [framed(images[i][0] / 255, (0.9, 0.1, 0.1)) for i in gone]
    save_image(make_grid(torch.stack(sheet), nrow=columns), file)


def parse_flags() -> argparse.Namespace:
    """Flags of the program. Exits where they cannot work."""
    parser = argparse.ArgumentParser(
        description="Find the identities in a folder of tracklets and write them as an annotation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = parser.add_argument
    flag("--data", default="data/walkers", help="folder of tracklets; its train/ beside a test/")
    flag("--weights", default="runs/walkers-r10ibn/last.pt", help="a checkpoint, or a backbone's")
    flag("--features", help="another encoder's instead: a .npy file (N, d), rows as --index says")
    flag("--index", action="store_true", help="print the images in the order of rows, and stop")
    flag("--out", default="identities.json", help="annotation to write; the rest goes beside it")
    flag("--arch", help="architecture, if the checkpoint does not say")
    flag("--size", type=int, nargs=2, metavar=("H", "W"), help="input size, likewise")
    flag("--workers", type=int, default=1, help="processes that decode images")
    flag("--paper", action="store_true", help="the paper's equations alone, without our additions")
    flag("--sigma_cst", type=float, help="intra-identity consistency; none: calibrated")
    flag("--sigma_drm", type=float, help="inter-identity discrimination; none: calibrated")
    flag("--r_s", type=int, default=1000, help="half-width of the sliding range, in tracklets")
    flag("--levels", type=int, default=3, help="1 within tracklets, 2 within videos, 3 across")
    flag("--nearness", type=float, default=0.1, help="how much farther those r_s apart count")
    switch = argparse.BooleanOptionalAction
    flag("--center", action=switch, default=True, help="subtract each video's mean")
    flag("--whiten", action=switch, default=True, help="divide out the covariance")
    flag("--cut", action=switch, default=True, help="cut tracklets where the person changes")
    flag("--cannot_link", action=switch, default=True, help="two boxes in a frame: two people")
    flag("--closest_first", action=switch, default=True, help="instead of the closure of links")
    args = parser.parse_args()
    if Path(args.out).suffix != ".json":
        parser.error(f"--out {args.out}: expected a name that ends in .json")
    return args


def main() -> None:
    """Features in, labels out."""
    args = parse_flags()
    options = {name: getattr(args, name) for name in ("paper", *OPTIONS)}
    check_settings(args.sigma_cst, args.sigma_drm, args.r_s, args.nearness, args.levels)
    train_folder, test_folder = find_splits(args.data)
    tracklets = read_tracklets(train_folder)
    if args.index:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` has read enough
        for i in range(len(tracklets)):
            print(tracklets.path(i))
        return
    out = Path(args.out)
    summary = out.with_suffix(".summary.json")
    for file in (out, summary, out.with_suffix(".space.npz"), out.with_suffix(".png")):
        if file.exists():
            raise ValueError(f"{file}: exists already; give another --out")
    features = np.load(args.features, mmap_mode="r") if args.features else extract(args, tracklets)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    shape = getattr(features, "shape", "an archive")
    if len(shape) != 2 or len(features) != len(tracklets) or features.dtype.kind != "f":
        raise ValueError(
            f"{args.features}: got {shape}, expected floats (N, d), a row for each of the "
            f"{len(tracklets):,} images of {train_folder}, in the order of --index"
        )
    if args.features:
        check_features(features)  # a zero row is an unreadable image in our own features only
    truth = None
    if test_folder and (Path(args.data) / "train.json").exists():
        truth = read_labels(Path(args.data) / "train.json", tracklets)
    print(f"{train_folder}: {tracklets}", flush=True)
    scratch = out.with_suffix(".scratch")
    labels, figures, space = denoise_tracklets(tracklets, features, scratch, truth, **options)
    write_labels(out, tracklets, labels)
    summary.write_text(json.dumps(figures, indent=1) + "\n")
    if space is not None:
        np.savez(out.with_suffix(".space.npz"), **space._asdict())
    show_identities(out.with_suffix(".png"), tracklets, labels)
    print(f"written: {out}, and its summary, space and pictures beside it")


def extract(args, tracklets):
    """Features (N, d) of all images by the encoder that the flags name, on torchrun's processes."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # processes only wait for each other
    backbone, size, _ = load_backbone(args.weights, args.arch, args.size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    backbone.to(device)
    folder = Path(args.out).parent
    features = extract_to_file(folder, backbone, tracklets, size, device, args.workers)
    if dist.is_initialized():
        dist.destroy_process_group()
    return features


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, EOFError) as error:
        sys.exit(f"denoise.py: {error}")
    except KeyboardInterrupt:
        sys.exit("denoise.py: stopped; the same command goes on with the features that are there")
