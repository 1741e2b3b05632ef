"""Progressive multi-level denoising: from a tracker's tracklets to identities across videos (paper, section 3.2).

An identity is noise-free if all its images lie within a sphere (radius <= sigma, in cosine distance to the centroid) and no
two identities compared are closer than tau. Level 1 cleans each tracklet, level 2 joins the tracklets of one video, level 3
links people across a sliding range of videos. The algorithm works on arrays; reading and pictures come after it.

    python denoise.py --weights runs/walkers-r10ibn/last.pt

Read first: `denoise`, `merge`, `noise`.
"""
import argparse
import heapq
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.utils import make_grid, save_image

from data import Images, Tracklets, find_splits, read_labels, read_tracklets, refuse_unreadable, write_labels
from evaluate import extract, framed, load_backbone

# ---------------------------------------------------------------- feature space


def unit(features) -> np.ndarray:
    """Rows (N, d) of any float type at unit length, float32. Raises ValueError for rows that are not finite or zero."""
    features = np.asarray(features, dtype=np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] == 0))
    if len(bad):
        raise ValueError(f"features: {len(bad)} of {len(features)} rows are zero or not finite, the first: row {bad[0]}")
    return features / length


def dense(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered 0..n-1 in their order; -1 stays -1."""
    out = np.full(len(labels), -1, np.int64)
    kept = labels >= 0
    out[kept] = np.unique(labels[kept], return_inverse=True)[1]
    return out


def group_rows(labels: np.ndarray) -> list[np.ndarray]:
    """Rows of every label >= 0, in ascending order of labels."""
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(order) else []


def group_sums(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Sum of the features of each label 0..n-1, (n, d)."""
    rows = np.flatnonzero(labels >= 0)
    n = int(labels.max(initial=-1)) + 1
    return coo_array((np.ones(len(rows), np.float32), (labels[rows], rows)), shape=(n, len(labels))).tocsr() @ features


def centroids_of(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Centroid c(S) of each label 0..n-1: the mean of its unit features, at unit length again. (n, d)."""
    sums = group_sums(features, labels)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def whiten(features: np.ndarray, video: np.ndarray, prior: float = 16) -> np.ndarray:
    """Features in a space where what all images share, or all images of a video, says nothing. (N, d) -> unit rows (N, d).

    Each video's mean is subtracted (a camera makes its images alike), the overall mean counting as `prior` images more, so that
    a video of few images keeps them. Then the covariance is divided out, shrunk towards a sphere by the oracle approximating
    coefficient (Chen et al., 2010), so that few images or many dimensions do no harm.
    """
    features = unit(features)
    N, d = features.shape
    overall = features.sum(0) / (N + prior)
    mean = (group_sums(features, video) + prior * overall) / (np.bincount(video)[:, None] + prior)
    centred = features - mean[video]
    covariance = (centred.T @ centred / N).astype(np.float64)
    trace, trace2 = np.trace(covariance), (covariance**2).sum()
    shrink = min(1.0, ((1 - 2 / d) * trace2 + trace**2) / ((N + 1 - 2 / d) * (trace2 - trace**2 / d) + 1e-30))
    values, vectors = np.linalg.eigh((1 - shrink) * covariance + shrink * trace / d * np.eye(d))
    return unit(centred @ (vectors / np.sqrt(values.clip(1e-12 * values[-1]))).astype(np.float32))


# ---------------------------------------------------------------- noise


def noise(features, labels: np.ndarray, sigma: float, tau: float, block: int = 1024) -> tuple[float, float]:
    """What of a labelling is noise (paper, section 3.1): share of images outside their identity's sphere of radius sigma, and
    share of identities with another identity's centroid closer than tau. features (N, d), labels (N,), -1 left out."""
    features, labels = unit(features), dense(labels)
    kept = labels >= 0
    if not kept.any():
        return 0.0, 0.0
    centroids = centroids_of(features, labels)
    outside = 1 - np.einsum("nd,nd->n", features[kept], centroids[labels[kept]]) > sigma + 1e-6
    close = np.zeros(len(centroids), bool)
    for start in range(0, len(centroids), block):
        distance = 1 - centroids[start : start + block] @ centroids.T
        distance[np.arange(len(distance)), start + np.arange(len(distance))] = np.inf
        close[start : start + block] = (distance < tau).any(1)
    return float(outside.mean()), float(close.mean())


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
        worst = np.where(kept, towards, np.inf).argmin()
        if towards[worst] >= (1 - sigma) * np.linalg.norm(total):
            break
        kept[worst] = False
        total -= features[worst]
        towards -= features @ features[worst].astype(np.float64)
    return kept


def split_switches(features: np.ndarray, track: np.ndarray, frame: np.ndarray, tau: float, shortest: int = 2) -> np.ndarray:
    """Cut tracklets where the tracker went over to somebody else: two parts as far apart as two people are two people.

    Each tracklet is cut in time where that explains most of its variance, if the parts' centroids are at least tau apart, and
    so on within the parts, which keep `shortest` images or more. A needless cut costs little: level 2 merges the parts again.
    Not in the paper; without it half a tracklet pulls the other half's centroid along, and level 1 finds nobody to drop.
    features: unit rows (N, d). Returns track numbers (N,), 0..n-1.
    """
    order = np.lexsort((frame, track))
    waiting, parts = [order[rows] for rows in group_rows(track[order])], []
    while waiting:
        rows = waiting.pop()
        sizes = np.arange(shortest, len(rows) - shortest + 1)  # of the first part
        if len(sizes):
            sums = features[rows].cumsum(0)
            first, second = sums[sizes - 1], sums[-1] - sums[sizes - 1]
            a, b = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
            best = (a**2 / sizes + b**2 / (len(rows) - sizes)).argmax()
            if first[best] @ second[best] <= (1 - tau) * a[best] * b[best]:
                waiting += [rows[: sizes[best]], rows[sizes[best] :]]
                continue
        parts.append(rows)
    out = np.empty(len(track), np.int64)
    for n, rows in enumerate(sorted(parts, key=lambda rows: (track[rows[0]], frame[rows[0]]))):
        out[rows] = n
    return out


def single_tracklet(features: np.ndarray, track: np.ndarray, moment: np.ndarray, sigma: float, min_images: int = 2,
                    cannot_link: bool = True) -> np.ndarray:  # fmt: skip
    """Level 1: what is consistent in each tracklet. Labels (N,), the tracklet's number, or -1 for anomalies.

    features: unit rows (N, d). track: (N,), -1 to leave an image out. moment: (N,), the same where video and frame are.
    """
    labels = np.full(len(track), -1, np.int64)
    for rows in group_rows(track):
        if cannot_link:  # two boxes of one frame in one tracklet: only the one nearest the centroid can be the person
            near = rows[np.argsort(-(features[rows] @ features[rows].sum(0)), kind="stable")]
            rows = near[np.unique(moment[near], return_index=True)[1]]
        rows = rows[trim(features[rows], sigma)]
        if len(rows) >= min_images:
            labels[rows] = track[rows]
    return labels


class Rule:
    """When a set of images can be one identity: radius <= sigma and, with `cannot_link`, no two of them in one frame."""

    def __init__(self, features: np.ndarray, moment: np.ndarray, sigma: float, tau: float, cannot_link: bool = True):
        self.features, self.moment, self.sigma, self.tau, self.cannot_link = features, moment, sigma, tau, cannot_link

    def allows(self, rows: np.ndarray) -> bool:
        if self.cannot_link and len(np.unique(self.moment[rows])) < len(rows):
            return False
        members = self.features[rows]
        total = members.sum(0)
        return bool((members @ total).min() >= (1 - self.sigma) * np.linalg.norm(total) - 1e-6)


def merge(identities: list[np.ndarray], rule: Rule) -> list[list[int]]:
    """Join identities, closest first: while two centroids are closer than tau and the union is allowed, the union replaces both.

    identities: rows of each. Returns the groups, lists of positions in `identities`. Exact: all pairs closer than tau wait in
    a heap; a refused pair comes back only as part of a larger union.
    """
    groups = [[n] for n in range(len(identities))]
    members = list(identities)
    centroid = lambda rows: unit(rule.features[rows].sum(0, keepdims=True))[0]
    n, d = len(members), rule.features.shape[1]
    centroids = np.empty((2 * n, d), np.float32)  # room for every union
    centroids[:n] = np.reshape([centroid(rows) for rows in members], (n, d))
    alive = np.arange(2 * n) < n
    distance = 1 - centroids[:n] @ centroids[:n].T
    heap = [(distance[i, j], i, j) for i, j in zip(*np.nonzero(np.triu(distance < rule.tau, 1)))]
    heapq.heapify(heap)
    while heap:
        _, i, j = heapq.heappop(heap)
        if not (alive[i] and alive[j]):
            continue
        union = np.concatenate([members[i], members[j]])
        if not rule.allows(union):
            continue
        new = len(members)
        members.append(union)
        groups.append(groups[i] + groups[j])
        alive[[i, j]] = False
        centroids[new] = centroid(union)
        others = np.flatnonzero(alive)
        distance = 1 - centroids[others] @ centroids[new]
        for k in np.flatnonzero(distance < rule.tau):
            heapq.heappush(heap, (distance[k], others[k], new))
        alive[new] = True
    return [groups[n] for n in np.flatnonzero(alive[: len(groups)])]


def single_video(features: np.ndarray, labels: np.ndarray, video: np.ndarray, track: np.ndarray, moment: np.ndarray,
                 sigma: float, tau: float, min_images: int = 2, cannot_link: bool = True, recover: bool = True) -> np.ndarray:  # fmt: skip
    """Level 2: identities within each video, out of level 1's labels. Labels (N,), -1 for what fits nowhere.

    (a) merge fragments, (b) give each anomaly to the nearest identity that it fits, (c) take what is left of a tracklet's
    anomalies, the other half of an identity switch, as a tracklet of its own and merge once more.
    """
    rule = Rule(features, moment, sigma, tau, cannot_link)
    labels = merge_labels(labels, video, rule)
    for rows in group_rows(video):
        identities, anomalies = [rows[members] for members in group_rows(labels[rows])], rows[labels[rows] < 0]
        if not identities or not len(anomalies):
            continue
        distance = 1 - features[anomalies] @ centroids_of(features[rows], dense(labels[rows])).T
        nearest = distance.argmin(1)
        for n in np.argsort(distance.min(1), kind="stable"):
            home, wider = nearest[n], np.append(identities[nearest[n]], anomalies[n])
            if distance[n, home] <= sigma and rule.allows(wider):
                identities[home] = wider
                labels[anomalies[n]] = labels[wider[0]]
    if recover:
        left = single_tracklet(features, np.where(labels < 0, track, -1), moment, sigma, min_images, cannot_link)
        labels = np.where(left >= 0, left + labels.max(initial=0) + 1, labels)
        labels = merge_labels(labels, video, rule)
    return dense(labels)


def merge_labels(labels: np.ndarray, video: np.ndarray, rule: Rule) -> np.ndarray:
    """Merge identities (N,) within each video. Labels (N,)."""
    labels = labels.copy()
    for rows in group_rows(video):
        identities = [rows[members] for members in group_rows(labels[rows])]
        for group in merge(identities, rule):
            for n in group:
                labels[identities[n]] = labels[identities[group[0]][0]]
    return labels


def cross_video(features: np.ndarray, labels: np.ndarray, video: np.ndarray, moment: np.ndarray, sigma: float, tau: float,
                window: int = 32, stride: int = 16, cannot_link: bool = True) -> np.ndarray:  # fmt: skip
    """Level 3: people across videos, out of level 2's labels. Labels (N,).

    A range of `window` consecutive videos moves over all of them in steps of `stride`. A merge within a range links its
    identities; what is linked through overlapping ranges becomes one. Where that union is not allowed, it is merged anew by
    itself, closest first, as far as the rule goes.
    """
    rule, labels = Rule(features, moment, sigma, tau, cannot_link), dense(labels)
    while labels.max(initial=-1) > 0:
        identities = group_rows(labels)
        first = np.array([video[rows].min() for rows in identities])
        last = np.array([video[rows].max() for rows in identities])
        links = [(n, n) for n in range(len(identities))]
        for start in range(0, max(1, int(video.max()) + 1 - window + stride), stride):
            here = np.flatnonzero((first < start + window) & (last >= start))
            links += [(here[group[0]], here[n]) for group in merge([identities[n] for n in here], rule) for n in group]
        a, b = np.array(links).T
        component = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(len(identities),) * 2), directed=False)[1]
        merged = np.full_like(labels, -1)
        count = 0
        for linked in group_rows(component):
            parts = [identities[n] for n in linked]
            whole = np.concatenate(parts)
            groups = [range(len(parts))] if len(parts) == 1 or rule.allows(whole) else merge(parts, rule)
            for group in groups:
                for n in group:
                    merged[parts[n]] = count
                count += 1
        if count == len(identities):  # nothing was merged
            break
        labels = merged
    return labels


def calibrate(features, video: np.ndarray, track: np.ndarray, frame: np.ndarray, high: float = 0.98,
              low: float = 0.05) -> tuple[float, float]:  # fmt: skip
    """sigma and tau from the data, without a label: images of one tracklet are mostly one person, two tracklets seen in one
    frame are two people.

    sigma: the `high` quantile of an image's distance to the centroid of the rest of its tracklet (itself in the centroid, an
    image of a short tracklet would look closer than it can be to a large identity). tau: the `low` quantile of the distance
    between centroids of tracklets that share a frame, or of any two tracklets' where none do. features (N, d), the rest (N,).
    """
    features, tracks = unit(features), dense(track)
    sums = group_sums(features, tracks)
    several = np.bincount(tracks)[tracks] > 1
    rest = sums[tracks[several]] - features[several]
    away = 1 - np.einsum("nd,nd->n", features[several], rest) / np.maximum(np.linalg.norm(rest, axis=1), 1e-12)
    centroids = centroids_of(features, tracks)
    seen = coo_array((np.ones(len(tracks)), (tracks, moments(video, frame)))).tocsr()
    a, b = (seen @ seen.T).nonzero()
    a, b = (a[a < b], b[a < b]) if (a < b).any() else np.triu_indices(min(len(centroids), 400), 1)
    some = np.linspace(0, len(a) - 1, min(len(a), 100_000)).astype(np.int64)  # enough for a quantile
    a, b = a[some], b[some]
    between = 1 - np.einsum("nd,nd->n", centroids[a], centroids[b])
    sigma = float(np.quantile(away, high)) if len(away) else 0.5  # nothing to measure: a cautious guess
    return sigma, float(np.quantile(between, low)) if len(between) else sigma


def moments(video: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """A number for every (video, frame): (N,)."""
    return np.unique(np.stack([video, frame]), axis=1, return_inverse=True)[1].reshape(-1)


# ---------------------------------------------------------------- chained


def denoise(features, video, track, frame, sigma=None, tau=None, min_images: int = 2, window: int = 32, stride: int = 16,
            split: bool = True, cannot_link: bool = True, recover: bool = True, report=None) -> np.ndarray:  # fmt: skip
    """Identities from tracklets: calibration and the three levels. Labels int64 (N,), 0..n-1, -1 for noise.

    features: (N, d), any float type, normalised here; those of a network are worth far more after `whiten`. video, track,
    frame: integers (N,); the range slides over videos in the order of their numbers; a track number belongs to one video.
    sigma, tau: thresholds in [0, 2]; calibrated where None. report, if given, is called with (level, labels, noise) before the first level and after each.
    Raises ValueError for arrays of different lengths, features that are zero or not finite, thresholds out of range.
    """
    video, track, frame = (np.asarray(a) for a in (video, track, frame))
    for name, array in (("video", video), ("track", track), ("frame", frame)):
        if len(array) != len(features):
            raise ValueError(f"{name} has {len(array)} rows, features have {len(features)}")
    for name, value in (("sigma", sigma), ("tau", tau)):
        if value is not None and not 0 <= value <= 2:  # nan too
            raise ValueError(f"{name}={value}: a cosine distance lies in [0, 2]")
    if not 1 <= stride < max(window, 2):
        raise ValueError(f"stride={stride}, window={window}: ranges must overlap, so 1 <= stride < window")
    features, video, track, moment = unit(features), dense(video), dense(track), moments(video, frame)
    if sigma is None or tau is None:
        chosen = calibrate(features, video, track, frame)
        sigma, tau = chosen[0] if sigma is None else sigma, chosen[1] if tau is None else tau
    tell = lambda level, labels: report and report(level, labels, noise(features, labels, sigma, tau))
    tell("tracklets", track)
    if split:
        track = split_switches(features, track, frame, tau)
    labels = single_tracklet(features, track, moment, sigma, min_images, cannot_link)
    tell("single tracklet", labels)
    labels = single_video(features, labels, video, track, moment, sigma, tau, min_images, cannot_link, recover)
    tell("single video", labels)
    labels = cross_video(features, labels, video, moment, sigma, tau, window, stride, cannot_link)
    tell("cross video", labels)
    return dense(labels)


def denoise_tracklets(tracklets: Tracklets, features: np.ndarray, truth: np.ndarray | None = None, sigma: float | None = None,
                      tau: float | None = None, print_line=print, **options) -> tuple[np.ndarray, dict]:  # fmt: skip
    """Whiten, calibrate and denoise an index of tracklets, printing a line for each level.

    features (N, d): a zero row is an unreadable image, and gets -1. truth (N,), where it is known, is only measured against.
    Returns the labels (N,) and the figures for log.jsonl: identities, images kept, noise, thresholds, F1. options: `denoise`'s.
    """
    rows = np.flatnonzero(features.any(1))
    clock, report, full = time.time(), {}, np.full(len(tracklets), -1)
    video, track, frame = tracklets.video[rows], tracklets.track[rows], tracklets.frame[rows]
    space = whiten(features[rows], video)
    chosen = calibrate(space, video, track, frame)
    sigma, tau = chosen[0] if sigma is None else sigma, chosen[1] if tau is None else tau
    print_line(f"sigma {sigma:.3f}, tau {tau:.3f} (calibrated from the tracklets: {chosen[0]:.3f}, {chosen[1]:.3f})")
    header = f"{'level':<16} identities  images kept   noise: images  identities"
    print_line(header + ("   precision  recall     F1" if truth is not None else ""))

    def tell(level, labels, share):
        nonlocal full
        full = np.full(len(tracklets), -1)
        full[rows] = labels
        line = f"{level:<16} {len(np.unique(labels[labels >= 0])):>10,}  {(labels >= 0).sum():>11,}  {share[0]:>14.1%}  {share[1]:>10.1%}"
        if truth is not None:
            scores = pairwise_scores(full, truth)
            line += f"   {scores['precision']:>9.3f}  {scores['recall']:>6.3f}  {scores['f1']:>5.3f}"
            report.setdefault("f1_tracklets", scores["f1"])
            report.update(scores)
        report.setdefault("noise_before", share)
        report.update(identities=int(labels.max() + 1), images_kept=int((labels >= 0).sum()), noise_after=share)
        print_line(line)

    denoise(space, video, track, frame, sigma, tau, report=tell, **options)
    for name, values in (("tracklets", tracklets.track), ("videos", tracklets.video)):
        of = [len(np.unique(values[members])) for members in group_rows(full)]
        report[f"{name}_per_identity"] = float(np.mean(of)) if of else 0.0
    print_line("an identity spans {tracklets_per_identity:.1f} tracklets, {videos_per_identity:.1f} videos".format(**report))
    return full, report | {"sigma": sigma, "tau": tau, "seconds": time.time() - clock}


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
    parser = argparse.ArgumentParser(description=main.__doc__)
    default = "runs/walkers-r10ibn/last.pt"
    parser.add_argument("--weights", default=default, help=f"checkpoint of a run, or backbone weights (default: {default})")
    parser.add_argument("--data", default="data/walkers", help="folder of tracklets (default: data/walkers)")
    parser.add_argument("--out", default="identities.json", help="annotation to write; pictures and figures go beside it")
    parser.add_argument("--arch", help="architecture (default: what the checkpoint says)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="input size (default: what the checkpoint says)")
    parser.add_argument("--sigma", type=float, help="intra-identity consistency (default: calibrated)")
    parser.add_argument("--tau", type=float, help="inter-identity discrimination (default: calibrated)")
    parser.add_argument("--min_images", type=int, default=4, help="a tracklet that keeps fewer dissolves")
    parser.add_argument("--window", type=int, default=32, help="videos in the sliding range")
    parser.add_argument("--stride", type=int, default=16, help="videos by which it moves")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    args = parser.parse_args()
    out = Path(args.out)
    summary, picture = out.with_suffix(".summary.json"), out.with_suffix(".png")
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: expected a name that ends in .json")
    for file in (out, summary, picture):
        if file.exists():
            raise ValueError(f"{file}: exists already; give another --out")
    for flag in ("sigma", "tau"):
        if getattr(args, flag) is not None and not 0 <= getattr(args, flag) <= 2:
            raise ValueError(f"--{flag} {getattr(args, flag)}: a cosine distance lies in [0, 2]")
    train_folder, test_folder = find_splits(args.data)
    tracklets = read_tracklets(train_folder)
    truth = Path(args.data) / "train.json" if test_folder else None
    truth = read_labels(truth, tracklets) if truth and truth.exists() else None
    backbone, size, _ = load_backbone(args.weights, args.arch, args.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{train_folder}: {tracklets}")
    features = extract(backbone.to(device), tracklets, size, device, args.workers).numpy()
    unreadable = np.flatnonzero(~features.any(1))
    refuse_unreadable(tracklets, unreadable, len(tracklets))
    if len(unreadable):
        print(f"{len(unreadable):,} unreadable images were skipped, the first: {tracklets.path(unreadable[0])}")
    options = {key: getattr(args, key) for key in ("sigma", "tau", "min_images", "window", "stride")}
    labels, report = denoise_tracklets(tracklets, features, truth, **options)
    write_labels(out, tracklets, labels)
    summary.write_text(json.dumps(report, indent=1) + "\n")
    show_identities(picture, tracklets, labels)
    print(f"written: {out}, {summary}, {picture}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"denoise.py: {error}")
