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
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from scipy.sparse import csr_array, triu
from scipy.sparse.csgraph import connected_components

from data import Images, find_splits, read_labels, read_tracklets, write_labels, write_pictures
from evaluate import extract, join_processes
from model import load_backbone

TIE = 1e-6  # distances that differ by less are equal, for the rounding of float32
BLOCK = 512  # tracklets whose distances to their ranges are in memory at a time


# ---------------------------------------------------------------- definitions


def unit(features):
    """Features (n, d) at unit length, float32."""
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(length, 1e-12)


def distances(a, b):
    """Cosine distances (n,), in [0, 2], of unit vectors a and b (n, d), row by row."""
    return 1 - np.einsum("nd,nd->n", a, b)


class Noise(NamedTuple):
    """n_S and its two parts."""

    total: float
    consistency: float  # share of identities that are too wide
    discrimination: float  # ordered pairs that are too close, for each identity


def noise(features, labels, sigma_cst, sigma_drm, r_s=None):
    """n_S = (1 / M) (sum_k n_k^cst + sum_i sum_{j != i} n_ij^drm) of M identities (eq. 3).

    n_k^cst is 1 where r_k > sigma_cst (eq. 1; what differs by TIE is equal), n_ij^drm where
    dist(c_i, c_j) < sigma_drm (eq. 2).
    features (N, d) of any length; labels (N,), -1 for images in no identity. All pairs are compared
    or, given r_s, identities at most r_s apart in the order of their numbers, as level 3 does."""
    labels = dense(labels)
    centroids = centroids_of(features, labels)
    M = len(centroids)
    radii = np.zeros(M)
    for k, x in labelled_parts(features, labels):
        np.maximum.at(radii, k, distances(x, centroids[k]))
    consistency = float((radii > sigma_cst + TIE).mean())
    close = sum(len(i) for i, _, _ in links(centroids, sigma_drm, r_s or M))
    discrimination = close / M
    return Noise(consistency + discrimination, consistency, discrimination)


def dense(labels):
    """Numbers from 0 renumbered 0..n-1 in their order; -1 stays -1."""
    names = np.unique(labels[labels >= 0])
    return np.where(labels >= 0, np.searchsorted(names, labels), -1)


def number_pairs(first, second):
    """Numbers 0..n-1 (N,) of the pairs of first and second (N,), in their order."""
    second = dense(second)
    return dense(dense(first) * (second.max(initial=0) + 1) + second)


def rows_of(labels):
    """Rows of every label >= 0, in ascending order of labels."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def parts(n):
    """Slices over n rows, 16,384 each: what is in memory of features that are a file."""
    for start in range(0, n, 2**14):
        yield slice(start, start + 2**14)


def labelled_parts(features, labels):
    """Yields labels that are not -1 and their features (N, d) at unit length, a part at a time."""
    for part in parts(len(labels)):
        kept = labels[part] >= 0
        if kept.any():
            yield labels[part][kept], unit(features[part])[kept]


def sums_by_label(features, labels):
    """Sums (n, d) of the unit features of labels 0..n-1, by one pass over features (N, d)."""
    sums = np.zeros((labels.max() + 1, features.shape[1]), np.float32)
    for k, x in labelled_parts(features, labels):
        for name, rows in zip(np.unique(k), rows_of(k)):
            sums[name] += x[rows].sum(0)
    return sums


def centroids_of(features, labels):
    """Centroids c_k (n, d) of labels 0..n-1 of features (N, d): means, at unit length, which no
    cosine sees. -1 is left out."""
    return unit(sums_by_label(features, labels))


# ---------------------------------------------------------------- level 1: single tracklet (eq. 4)


def trim(features, sigma_cst):
    """Which of a tracklet's features (n, d), in order of time, are consistent: indices, ascending.

    Repeat: the sample farthest from the centroid of the remaining ones is excluded, if it is at
    least sigma_cst away. Of samples equally far the latest goes; the last one always stays."""
    kept = np.arange(len(features))
    while len(kept) > 1:
        x = features[kept]
        distance = distances(x, unit(x.sum(0) - x))
        worst = np.flatnonzero(distance >= distance.max() - TIE)[-1]
        if distance[worst] < sigma_cst:
            break
        kept = np.delete(kept, worst)
    return kept


def single_tracklet(features, track, sigma_cst):
    """Level 1: labels (n,), the number of an image's tracklet, or -1 where it was excluded.
    features (n, d), unit length; track (n,), the images of each tracklet in order of time."""
    labels = np.full(len(track), -1)
    for rows in rows_of(track):
        kept = rows[trim(features[rows], sigma_cst)]
        labels[kept] = track[kept]
    return labels


# ---------------------------------------------------------------- level 2: single video (eq. 5, 6)


def reallocate(features, labels, track, sigma_cst, frame):
    """Excluded samples of a video, each moved to the nearest *other* tracklet if that is closer
    than sigma_cst, else discarded (eq. 5). Centroids are those that level 1 left. Labels (n,).

    features (n, d), unit length; labels (n,), level 1's; track (n,), where a sample came from.
    frame (n,): a sample joins nobody who is in its frame too. That is cannot-link, ours; for the
    paper's equation give every sample a frame of its own."""
    tracklets = np.unique(labels[labels >= 0])
    centroids = centroids_of(features, dense(labels))
    labels = labels.copy()
    for i in np.flatnonzero(labels < 0):
        barred = np.append(labels[frame == frame[i]], track[i])
        distance = 1 - centroids @ features[i]
        distance[(tracklets[:, None] == barred).any(1)] = np.inf
        nearest = distance.argmin()
        if distance[nearest] < sigma_cst:
            labels[i] = tracklets[nearest]
    return labels


def single_video(features, labels, track, frame, sigma_cst, sigma_drm, closest_first=False):
    """Level 2 for the images of one video, in order of time: reallocate, then merge tracklets whose
    centroids, now with what was reallocated, are closer than sigma_drm, all that are linked
    becoming one (eq. 6). Labels (n,), 0.. or -1. frame and closest_first: see `cross_video`."""
    labels = reallocate(features, labels, track, sigma_cst, frame)
    # dense first: in_sequence keeps a place for every number up to the largest
    labels = in_sequence(dense(labels), np.arange(len(labels)))
    # every tracklet is in the range of every other
    r_s = max(1, labels.max())
    return cross_video(features, labels, frame, sigma_drm, r_s, closest_first)


# ---------------------------------------------------------------- level 3: across videos (eq. 6, 7)


def links(centroids, sigma_drm, r_s):
    """Linking relations (eq. 7) of every c in turn to those of its sliding range, the tracklets at
    most r_s places before or after it, whose centroids are closer than sigma_drm (eq. 6).

    centroids (T, d), unit length, in the order of the ultra-long video. Yields, a block of c at a
    time, arrays c, t and their distance; each link comes twice, once from either end."""
    for start in range(0, len(centroids), BLOCK):
        first = max(0, start - r_s)
        block = centroids[start : start + BLOCK]
        distance = 1 - block @ centroids[first : start + BLOCK + r_s].T
        i, j = np.nonzero(distance < sigma_drm)
        gap = np.abs(start + i - first - j)
        in_range = (0 < gap) & (gap <= r_s)
        i = i[in_range]
        j = j[in_range]
        yield start + i, first + j, distance[i, j]


def closure(centroids, sigma_drm, r_s):
    """The closure of all linking relations of centroids (T, d): everybody who is linked, through
    others too, is one identity. Their numbers (T,). Links cost O(T r_s), joining a block's O(T),
    milliseconds; one block's are in memory at a time."""
    identity = np.arange(len(centroids), dtype=np.int32)  # SciPy 1.11 takes no others
    for c, t, _ in links(centroids, sigma_drm, r_s):
        # who is one identity already is one node of the graph of this block's links
        n = identity.max() + 1
        graph = csr_array((np.ones_like(c), (identity[c], identity[t])), shape=(n, n))
        identity = connected_components(graph, directed=False)[1][identity]
    return identity


def cross_video(features, labels, frame, sigma_drm, r_s, closest_first=False):
    """Level 3: what is linked within the sliding range is one identity, through others too (eq. 7).
    features (N, d); labels (N,), level 2's, as `in_sequence` numbers them. Labels (N,), or -1.

    Ours: closest_first, instead of the closure, and for that the number of each image's frame (N,),
    of which those that are seen together are never joined."""
    centroids = centroids_of(features, labels)
    if closest_first:
        apart = seen_together(labels, frame)
        identity = merge_closest_first(centroids, sigma_drm, r_s, apart)
    else:
        identity = closure(centroids, sigma_drm, r_s)
    return np.where(labels >= 0, identity[labels], -1)


def in_sequence(labels, place):
    """Labels (N,) renumbered in the order of the ultra-long video, in which images have places
    (N,), by video, frame and track: an identity is where its first image is."""
    first = np.full(labels.max() + 2, len(labels))  # the last of these is that of label -1
    np.minimum.at(first, labels, place)
    return dense(np.where(labels >= 0, first[labels], -1))


# ---------------------------------------------------------------- all of it

PAPER = (0.2, 0.18)  # sigma_cst and sigma_drm
OPTIONS = ("sigma_cst", "sigma_drm", "r_s", "paper", "levels", "without")  # flags of the same names
ADDITIONS = ("center", "whiten", "cut", "cannot_link", "closest_first")  # ours, two in the space


def denoise(
    features,
    video,
    track,
    frame,
    sigma_cst=None,
    sigma_drm=None,
    r_s=1000,
    paper=False,
    levels=3,
    without=(),
):
    """Identities from tracklets, by three levels: labels int64 (N,), 0..n-1, -1 for noise.

    features (N, d): array or memory map, any float type and length. video, track, frame: integers
    (N,); videos follow each other by number, a tracklet is (video, track). Thresholds are cosine
    distances, r_s is in tracklets. paper: eq. 4 to 7 to the letter, thresholds 0.2 and 0.18 unless
    given; else with our ADDITIONS but those in `without`, and thresholds from `calibrate`. Raises
    ValueError for what is no index, and features that are zero or not finite."""
    check_options(sigma_cst, sigma_drm, r_s, levels, without)
    index = check_arrays(features, video, track, frame)
    sigmas = thresholds(features, index, sigma_cst, sigma_drm, r_s, paper)
    for _, labels in level_by_level(features, index, sigmas, r_s, paper, levels, without):
        pass
    return labels


def level_by_level(features, index, sigmas, r_s, paper=False, levels=3, without=()):
    """Yields what there is before level 1 and after each: a name and labels (N,), in sequence.
    index (3, N): video, track and frame; sigmas: sigma_cst and sigma_drm; the rest as above."""
    video, track, frame = index
    sigma_cst, sigma_drm = sigmas
    additions = () if paper else set(ADDITIONS) - set(without)
    closest_first = "closest_first" in additions
    track = number_pairs(video, track)
    sequence = np.lexsort((track, frame, video))
    order = sequence.argsort()
    yield "tracklets", in_sequence(track, order)
    frame = number_pairs(video, frame)
    if "cannot_link" not in additions:
        # everybody is alone in a frame
        frame = np.arange(len(frame))
    level1 = np.empty_like(track)
    level2 = np.empty_like(track)
    # One video is in memory at a time. Its identities are numbered by places that its images have
    # in the sequence: no other video has these.
    for places in rows_of(video[sequence]):
        rows = sequence[places]
        x = unit(features[rows])
        pieces = track[rows]
        if "cut" in additions:
            pieces = places[cut_tracklets(x, pieces, sigma_drm)]
        labels = single_tracklet(x, pieces, sigma_cst)
        level1[rows] = labels
        labels = single_video(x, labels, pieces, frame[rows], sigma_cst, sigma_drm, closest_first)
        level2[rows] = np.where(labels >= 0, places[labels], -1)
    yield "single tracklet", in_sequence(level1, order)
    labels = in_sequence(level2, order)
    if levels >= 2:
        yield "single video", labels
    if levels >= 3:
        labels = cross_video(features, labels, frame, sigma_drm, r_s, closest_first)
        yield "cross video", in_sequence(labels, order)


def thresholds(features, index, sigma_cst, sigma_drm, r_s, paper):
    """sigma_cst and sigma_drm as given, or the paper's, or else calibrated."""
    sigmas = [sigma_cst, sigma_drm]
    if None in sigmas:
        found = PAPER if paper else calibrate(features, *index, r_s)
        sigmas = [other if sigma is None else sigma for sigma, other in zip(sigmas, found)]
    return sigmas


def check_options(sigma_cst, sigma_drm, r_s, levels, without):
    """Raises ValueError for what are no cosine distances, no range, no levels or additions."""
    for name, sigma in (("sigma_cst", sigma_cst), ("sigma_drm", sigma_drm)):
        if sigma is not None and not 0 <= sigma <= 2:
            raise ValueError(f"{name} {sigma}: expected a distance from 0 to 2")
    if not 1 <= r_s < 2**31:
        raise ValueError(f"r_s {r_s}: expected 1 to 2147483647 tracklets")
    if levels not in (1, 2, 3) or not set(without) <= set(ADDITIONS):
        raise ValueError(f"levels {levels}, without {without}: expected 1 to 3, and of {ADDITIONS}")


def check_arrays(features, video, track, frame):
    """video, track and frame as int64 (3, N). Raises ValueError or TypeError unless these are whole
    numbers from 0, one for each of features (N, d), and no feature is zero or not finite."""
    index = np.stack([video, track, frame], dtype=np.int64, casting="same_kind")
    if np.shape(features)[:-1] != index.shape[1:] or index.min() < 0:
        given = f"{np.shape(features)}, {index.shape}"
        raise ValueError(f"expected a row of features and index for each image: got {given}")
    for part in parts(len(features)):
        length = np.linalg.norm(unit(features[part]), axis=1)
        bad = np.flatnonzero(~(abs(length - 1) < 0.01))
        if len(bad):
            row = part.start + bad[0]
            raise ValueError(f"features: row {row} is zero, too small or large, or not finite")
    return index


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


def fit_space(features, video, track, center=True, whiten=True):
    """A space found without a label, in two passes: features (N, d); video, track (N,).

    center: a camera makes its images alike, so a video's mean is taken off, drawn to the overall
    mean as if 8 tracklets more had that; without it, the overall mean is taken off. whiten: the
    covariance is divided out, shrunk towards a sphere by the oracle approximating coefficient (Chen
    et al., 2010), in the 512 principal directions at most, and half as many as there are tracklets:
    among more, some would tell every tracklet from every other."""
    track = number_pairs(video, track)
    N, d = features.shape
    mean = sum(unit(features[part]).sum(0) for part in parts(N)) / N
    space = Space(mean, 8.0 if center else np.inf, np.eye(d, dtype=np.float32))
    if not whiten:
        return space
    covariance = np.zeros((d, d))
    for rows in rows_of(video):
        x = centred(unit(features[rows]), track[rows], space)
        covariance += x.T @ x / N
    values, vectors = np.linalg.eigh(covariance)  # ascending
    spread = values - values.mean()
    above = (1 - 2 / d) * (values**2).sum() + values.sum() ** 2
    below = (N + 1 - 2 / d) * (spread**2).sum()
    rho = min(1.0, above / max(below, 1e-30))
    values -= rho * spread
    matrix = vectors / np.sqrt(np.maximum(values, 1e-9))
    kept = min(512, max(2, len(np.unique(track)) // 2))
    return space._replace(matrix=matrix[:, -kept:].astype(np.float32))


def centred(x, track, space):
    """A video's images x (n, d) without its mean, which is that of its tracklets' means."""
    means = np.stack([x[rows].mean(0, dtype=float) for rows in rows_of(track)])
    weight = 1 / (1 + space.prior / len(means))
    return x - (weight * means.mean(0) + (1 - weight) * space.mean)


def place(features, video, track, frame, space, out=None):
    """Features (N, d) in a space: unit rows (N, k) float32, or written to `out`, an array or memory
    map of any float type. Works for later images too: their videos' means are their own."""
    if out is None:
        out = np.empty((len(features), space.matrix.shape[1]), np.float32)
    for rows in rows_of(video):
        x = centred(unit(features[rows]), track[rows], space) @ space.matrix
        # an image that is nothing but its video's mean: one direction for all such
        x[np.linalg.norm(x, axis=1) < 1e-6] = 1
        out[rows] = unit(x)
    return out


# ---------------------------------------------------------------- cuts


def cut_tracklets(features, track, sigma_drm):
    """Tracklets cut, and their parts again, where the tracker went over to somebody else: where two
    parts, of one image or more, are at least sigma_drm apart. The first row of each part (n,).
    features (n, d), unit length; track (n,), the images of each tracklet in order of time."""
    part = np.empty(len(track), np.int64)
    waiting = rows_of(track)
    while waiting:
        rows = waiting.pop()
        at = find_cut(features[rows], sigma_drm)
        if at > 0:
            waiting += [rows[:at], rows[at:]]
        else:
            part[rows] = rows[0]
    return part


def find_cut(x, sigma_drm):
    """How many of a tracklet's features (n, d) come before the cut that leaves the least variance
    within its two parts; 0 where their centroids are closer than sigma_drm."""
    if len(x) == 1:
        return 0
    size = np.arange(1, len(x))  # of the first part
    before = x.cumsum(0)[:-1]
    after = x.sum(0) - before
    explained = (before**2).sum(1) / size + (after**2).sum(1) / size[::-1]
    best = explained.argmax()
    distance = 1 - unit(before[best]) @ unit(after[best])
    return size[best] if distance >= sigma_drm else 0


# ---------------------------------------------------------------- cannot-link


def seen_together(labels, frame):
    """Two boxes in one frame are two people: pairs of labels (n,) that are seen in the same frame
    (n,), as (2, pairs), the smaller first."""
    kept = labels >= 0
    frame = dense(frame[kept])
    seen = csr_array((np.ones_like(frame), (labels[kept], frame)))
    return np.array(triu(seen @ seen.T, 1).nonzero(), np.int64)


# ---------------------------------------------------------------- closest first, not the closure


def merge_closest_first(centroids, sigma_drm, r_s, apart, nearness=0.2):
    """Join linked tracklets, the closest first, while closer than sigma_drm: numbers (T,).

    How far two identities are is the mean over the pairs of their tracklets, which the sums of
    centroids (T, d) give, plus nearness times the places between them, as a share of r_s. A union
    has the links of its parts. Those `apart` (2, pairs), and unions with them, never join. All who
    are each other's closest join at once, which takes some twenty rounds as a rule. With everybody
    in range and no nearness that is the same as one pair after the other (Bruynooghe, 1977)."""
    T = len(centroids)
    identity = np.arange(T)
    sums = centroids.copy()
    size = np.ones(T, np.float32)
    position = np.arange(T, dtype=float)  # like sums: of all its tracklets
    never = apart[0] * T + apart[1]
    pairs = np.setdiff1d(nearest_links(centroids, sigma_drm, r_s), never)
    while len(pairs):
        i, j = np.divmod(pairs, T)
        dots = [np.einsum("nd,nd->n", sums[i[p]], sums[j[p]]) for p in parts(len(i))]
        distance = 1 - np.concatenate(dots) / (size[i] * size[j])
        gap = np.abs(position[i] / size[i] - position[j] / size[j])
        distance += nearness * np.minimum(gap / r_s, 1)
        near = distance < sigma_drm
        i, j = mutually_closest(i[near], j[near], distance[near])
        sums[i] += sums[j]
        size[i] += size[j]
        position[i] += position[j]
        # j becomes i; a pair that is too far now comes back only as a link that i inherits
        union = np.arange(T)
        union[j] = i
        identity = union[identity]
        never = rename(never, union)
        pairs = np.setdiff1d(rename(pairs[near], union), never)
    return dense(identity)


def nearest_links(centroids, sigma_drm, r_s, most=10):
    """The links of each tracklet to its `most` nearest, which bounds memory and time where links
    chain half of all people. Numbers i T + j of pairs i < j, ascending."""
    found = []
    for c, t, distance in links(centroids, sigma_drm, r_s):
        t = t[np.lexsort((distance, c))]  # c ascends
        rank = np.arange(len(c)) - np.searchsorted(c, c)  # of t among the links of c
        i, j = np.sort(np.stack([c, t])[:, rank < most], axis=0)
        found.append(i * len(centroids) + j)
    return np.unique(np.concatenate(found))


def mutually_closest(i, j, distance):
    """Of pairs (i, j), those in which each is the other's closest; of equals the first counts."""
    i, j = np.stack([i, j])[:, np.argsort(distance, kind="stable")]
    pair = np.arange(len(i))
    # of all pairs that somebody is in the first is the closest
    closest = np.full(j.max(initial=0) + 1, len(i))
    np.minimum.at(closest, i, pair)
    np.minimum.at(closest, j, pair)
    mutual = (closest[i] == pair) & (closest[j] == pair)
    return i[mutual], j[mutual]


def rename(pairs, union):
    """Pairs i T + j after each i has become union[i], without those that are one now."""
    T = len(union)
    i, j = np.sort(union[np.stack(np.divmod(pairs, T))], axis=0)
    return np.unique((i * T + j)[i < j])


# ---------------------------------------------------------------- calibration


def calibrate(features, video, track, frame, r_s=1000):
    """sigma_cst and sigma_drm, from tracklets alone: features (N, d), the rest (N,).

    `near` and `wide` are the median and the 95% quantile of how far an image is from the rest of
    its tracklet; `far` is the median between tracklets of different videos in a range, who are
    strangers. sigma_cst is halfway between wide and far. sigma_drm is halfway between near and far
    or, where people change more from video to video, the distance within which half of all links
    lie."""
    track = number_pairs(video, track)
    track = in_sequence(track, np.lexsort((track, frame, video)).argsort())
    sums = sums_by_label(features, track)
    own = [distances(x, unit(sums[k] - x)) for k, x in labelled_parts(features, track)]
    several = np.bincount(track)[track] > 1
    own = np.concatenate(own)[several]
    between = distances_between_videos(unit(sums), video, track, r_s)
    near, wide = np.quantile(own, (0.5, 0.95)) if len(own) else (0.0, 0.0)
    far = np.median(between) if len(between) else 1.0
    sigma_cst = (wide + far) / 2
    sigma_drm = max((near + far) / 2, half_of_links(np.sort(between), far))
    # where all features are alike, rounding must not exclude or cut anything
    return max(sigma_cst, 2 * TIE), max(sigma_drm, 2 * TIE)


def distances_between_videos(centroids, video, track, r_s):
    """Distances of tracklets, 1,000 at most and evenly spread, to all of other videos in range."""
    T = len(centroids)
    home = video[np.unique(track, return_index=True)[1]]
    found = []
    for c in np.linspace(0, T - 1, min(T, 1000)).astype(int):
        near = slice(max(0, c - r_s), c + r_s + 1)
        elsewhere = home[near] != home[c]
        found.append(1 - centroids[near][elsewhere] @ centroids[c])
    return np.concatenate(found, dtype=float)


def half_of_links(between, median):
    """The distance within which half of all links lie. `between`: sorted distances of tracklets,
    most of whom are strangers, whose distances lie symmetrically around the median m. So there are
    as many strangers within m - x as pairs beyond m + x; what is more within m - x are links. Only
    distances within which a quarter at most are strangers are trusted; 0 if there are none."""
    nearer = np.arange(1, len(between) // 2 + 1)
    mirrored = 2 * median - between[: len(nearer)]
    strangers = len(between) - np.searchsorted(between, mirrored)
    linked = nearer - strangers
    trusted = np.flatnonzero(strangers <= nearer / 4)
    if len(trusted) == 0:
        return 0.0
    half = np.argmax(linked >= linked.max() / 2)
    return between[min(half, trusted[-1])]


# ================================================================ the program


def pairwise_scores(labels, truth):
    """Precision, recall and F1 over pairs of images: is a pair together in labels, and is it truly
    one person? An image labelled -1 is in no pair of its side: one without a true identity makes
    every pair found with it a wrong one."""
    both = (labels >= 0) & (truth >= 0)
    hit = pairs_in(number_pairs(labels[both], truth[both]))
    precision = hit / max(1, pairs_in(labels))
    recall = hit / max(1, pairs_in(truth))
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "f1": f1}


def pairs_in(labels):
    """How many pairs of images have the same label."""
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1]
    return float((sizes * (sizes - 1.0) / 2).sum())


HEADER = "level            identities    images  noise n_S =  too wide + too close"
HEADER += "   precision  recall     F1, where the truth is known"
LINE = "{level:<16}{identities:>11,}{images_kept:>10,}"
LINE += "{noise[0]:>11.2f}{noise[1]:>12.2f}{noise[2]:>12.2f}"
SCORES = "{precision:>12.3f}{recall:>8.3f}{f1:>7.3f}"


def denoise_tracklets(
    tracklets,
    features,
    scratch,
    truth=None,
    sigma_cst=None,
    sigma_drm=None,
    r_s=1000,
    paper=False,
    levels=3,
    without=(),
):
    """`denoise` an index of tracklets in the space of its features (N, d); prints a line a level.

    scratch: a file for the placed features, gone at the end. truth (N,) is only measured against.
    Returns labels (N,) and figures for log.jsonl."""
    index = check_arrays(features, tracklets.video, tracklets.track, tracklets.frame)
    if not paper:
        space = fit_space(features, *index[:2], "center" not in without, "whiten" not in without)
        shape = (len(tracklets), space.matrix.shape[1])
        placed = new_map(scratch, shape)
        # what is mapped stays, and goes with the program, however that ends
        os.unlink(scratch)
        features = place(features, *index, space, placed)
    sigmas = thresholds(features, index, sigma_cst, sigma_drm, r_s, paper)
    print(f"sigma_cst {sigmas[0]:.3f}, sigma_drm {sigmas[1]:.3f}, r_s {r_s:,}")
    print(HEADER)
    table = []
    for level, labels in level_by_level(features, index, sigmas, r_s, paper, levels, without):
        found = {"level": level, "identities": int(labels.max()) + 1}
        found["images_kept"] = int((labels >= 0).sum())
        found["noise"] = noise(features, labels, *sigmas, r_s)
        line = LINE
        if truth is not None:
            found |= pairwise_scores(labels, truth)
            line += SCORES
        table.append(found)
        print(line.format(**found), flush=True)
    figures = found | {"sigma_cst": sigmas[0], "sigma_drm": sigmas[1], "levels": table}
    figures |= {"noise_before": table[0]["noise"], "noise_after": found["noise"]}
    if truth is not None:
        figures["f1_tracklets"] = table[0]["f1"]
    return labels, figures


def show_identities(file, tracklets, labels, people=12, columns=14):
    """Write a picture: an identity a row, those of most videos first, its images spread over it."""
    images = Images(tracklets, (128, 64))
    identities = rows_of(labels)
    identities.sort(key=lambda rows: -len(np.unique(tracklets.video[rows])))
    cells = []
    for rows in identities[:people]:
        shown = np.linspace(0, len(rows) - 1, columns).astype(int)
        cells += [images[i][0] / 255 for i in rows[shown]]
    write_pictures(file, cells, columns)


def parse_flags():
    """Flags of the program."""
    parser = argparse.ArgumentParser(
        description="Find the identities in a folder of tracklets and write them as an annotation."
    )
    flag = parser.add_argument
    flag("--data", default="data/walkers", help="folder of tracklets [%(default)s]")
    flag("--weights", default="runs/walkers-r10ibn/last.pt", help="of the encoder [%(default)s]")
    flag("--features", help="another encoder's instead: a .npy file (N, d), rows as --index says")
    flag("--index", action="store_true", help="print the images in the order of rows, and stop")
    flag("--out", default="identities.json", help="annotation to write [%(default)s]")
    flag("--arch", help="architecture, if the checkpoint does not say")
    flag("--size", type=int, nargs=2, help="height and width of the input, likewise")
    flag("--workers", type=int, default=1, help="processes that decode images")
    flag("--paper", action="store_true", help="the paper's equations alone, without our additions")
    flag("--sigma_cst", type=float, help="intra-identity consistency; none: calibrated")
    flag("--sigma_drm", type=float, help="inter-identity discrimination; none: calibrated")
    flag("--r_s", type=int, default=1000, help="half-width of the range [%(default)s]")
    flag("--levels", type=int, default=3, choices=(1, 2, 3), help="within tracklets, videos, all")
    flag("--without", nargs="+", default=(), choices=ADDITIONS, help="additions to leave out")
    return parser.parse_args()


def new_map(file, shape):
    """A new .npy file as an array of float16. Its space on the disk is taken at once: a map that
    finds none later ends the program with a bus error. Raises OSError."""
    size = 2 * math.prod(shape)
    try:
        features = np.lib.format.open_memmap(file, "w+", np.float16, shape)
        # macOS has no such function
        with suppress(AttributeError), open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, os.path.getsize(file))
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot take {size / 1e6:,.0f} MB: {error.strerror}") from None
    return features


def extract_features(backbone, tracklets, size, device, workers, file):
    """Features (N, d) of all images, float16, memory-mapped from a file that appears when it is
    whole: those of ten million images are 40 GB. Processes share the work; None on all but the
    first."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return extract(backbone, tracklets, size, device, workers)
    hidden = file.with_name("." + file.name)
    features = new_map(hidden, (len(tracklets), backbone.embed_dim))
    try:
        extract(backbone, tracklets, size, device, workers, out=features)
        os.replace(hidden, file)
    finally:
        hidden.unlink(missing_ok=True)
    return features


def read_features(args, tracklets, out):
    """Features (N, d) as the flags say, from a file or of an encoder; None on all processes but the
    first."""
    if args.features is None:
        device = join_processes()
        backbone, size = load_backbone(args.weights, args.arch, args.size)
        backbone.to(device)
        file = out.with_suffix(".features.npy")
        features = extract_features(backbone, tracklets, size, device, args.workers, file)
        dist.destroy_process_group()
        return features
    try:
        features = np.lib.format.open_memmap(args.features, mode="r")
        if features.ndim != 2 or len(features) != len(tracklets) or features.dtype.kind != "f":
            raise ValueError(f"it has the shape {features.shape}, the type {features.dtype}")
    except ValueError as error:
        expected = f"a .npy file of floats, a row for each of {len(tracklets):,} images"
        raise ValueError(f"{args.features}: expected {expected} of --index; {error}") from None
    return features if int(os.environ.get("RANK", 0)) == 0 else None


def main():
    """Features in, labels out."""
    args = parse_flags()
    check_options(args.sigma_cst, args.sigma_drm, args.r_s, args.levels, args.without)
    train_folder, test_folder = find_splits(args.data)
    tracklets = read_tracklets(train_folder)
    if args.index:
        for i in range(len(tracklets)):
            print(tracklets.path(i))
        return
    out = Path(args.out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: expected a name that ends in .json")
    file = out.with_suffix(".features.npy")
    if file.exists() and args.features is None:
        hint = f"give another --out or, if they are of these weights, --features {file}"
        raise ValueError(f"{file}: features of an earlier call; {hint}")
    for suffix in (".json", ".summary.json", ".jpg"):
        file = out.with_suffix(suffix)
        if file.exists():
            raise ValueError(f"{file}: exists already; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    features = read_features(args, tracklets, out)
    if features is None:
        return
    truth = None
    labelled = Path(args.data) / "train.json"
    if test_folder and labelled.exists():
        truth = read_labels(labelled, tracklets)
    print(f"{train_folder}: {tracklets}", flush=True)
    options = {name: getattr(args, name) for name in OPTIONS}
    scratch = out.with_name(f".{out.stem}.placed.npy")
    labels, figures = denoise_tracklets(tracklets, features, scratch, truth, **options)
    write_labels(out, tracklets, labels)
    out.with_suffix(".summary.json").write_text(json.dumps(figures, indent=1))
    show_identities(out.with_suffix(".jpg"), tracklets, labels)
    print(f"written: {out}, its summary and its pictures beside it")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"denoise.py: {error}")
