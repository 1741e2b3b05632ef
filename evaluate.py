"""Retrieval: how well features find the same person under another camera, by each benchmark's protocol.

The benchmarks' readers (Market-1501, DukeMTMC-reID, MSMT17, MARS, and any labelled tracklets), feature extraction, ranking without
sorting, mAP, CMC and mINP (Zheng et al., ICCV 2015; Ye et al., TPAMI 2021), k-reciprocal re-ranking (Zhong et al., CVPR 2017), and
pictures of ranked lists.

    python evaluate.py --data Market-1501-v15.09.15 --weights FILE --arch r50ibn --rerank

Read first: `score`, `rerank`, `read_benchmark`.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.io import loadmat
from scipy.sparse import csr_array
from torch import Tensor
from torchvision.utils import make_grid, save_image

from data import Images, Tracklets, framed, read_labels, read_tracklets, refuse_unreadable, replacing
from model import extract, load_backbone

# ---------------------------------------------------------------- ranking


def evaluate(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams) -> dict:
    """mAP, mINP and CMC of ranking the gallery by cosine similarity to each query; see `score` for the protocol and the result.

    query (Q, d), gallery (G, d): features of any length; ids and cams: integers (Q,), (G,). Raises ValueError where features are
    not finite, lengths do not agree, or no query has a match.
    """
    return score(similarities(query, gallery), query_ids, gallery_ids, query_cams, gallery_cams)


def score(blocks, query_ids, gallery_ids, query_cams, gallery_cams) -> dict:
    """mAP, mINP and CMC of similarities that come as blocks of queries: pairs of the first row and an array (b, G), which is
    written to.

    For each query, gallery images of its identity under its own camera are left out, and junk, which are ids below 0; a query
    without a match left is not counted. Identities that no query has are distractors.
    A match's rank is the number of valid gallery images at least as similar, so tied images share the last rank among them, and
    one pass of comparisons for each match takes the place of a sort.
    Returns {"mAP", "mINP", "cmc": (G,) with rank 1 at index 0, "queries": counted, "left_out": not counted, "ap": (Q,), nan where
    not counted}; fractions.
    """
    query_ids, gallery_ids, query_cams, gallery_cams = map(np.asarray, (query_ids, gallery_ids, query_cams, gallery_cams))
    for name, ids, cams in (("query", query_ids, query_cams), ("gallery", gallery_ids, gallery_cams)):
        if ids.ndim != 1 or ids.shape != cams.shape:
            raise ValueError(f"{name}: expected one id and one camera for each image, got {ids.shape} and {cams.shape}")
    junk = np.flatnonzero(gallery_ids < 0)
    by_id = np.argsort(gallery_ids, kind="stable")
    start, end = (np.searchsorted(gallery_ids, query_ids, side, sorter=by_id) for side in ("left", "right"))
    ap, inp, cmc = np.full(len(query_ids), np.nan), np.full(len(query_ids), np.nan), np.zeros(len(gallery_ids))
    scored = 0
    for first, block in blocks:
        if block.shape[1:] != gallery_ids.shape:
            raise ValueError(f"{len(gallery_ids)} gallery ids for {block.shape[1]} gallery features")
        if first != scored or first + len(block) > len(query_ids):
            raise ValueError(f"a block of queries {first} to {first + len(block) - 1} after {scored} of {len(query_ids)}; expected all, in order")
        scored += len(block)
        block[:, junk] = -np.inf
        for q, similarity in enumerate(block, first):
            same = by_id[start[q] : end[q]]
            own_camera = gallery_cams[same] == query_cams[q]
            similarity[same[own_camera]] = -np.inf  # less similar than anything valid
            matches = np.sort(similarity[same[~own_camera]])[::-1]
            if not len(matches) or query_ids[q] < 0:
                continue
            if not np.isfinite(matches).all():
                raise ValueError(f"similarities of query {q} are not finite")
            rank = np.array([np.count_nonzero(similarity >= match) for match in matches])
            hits = np.searchsorted(-matches, -matches, side="right")  # matches at least as similar
            ap[q], inp[q] = (hits / rank).mean(), len(matches) / rank[-1]
            cmc[rank[0] - 1] += 1
    if scored < len(query_ids):
        raise ValueError(f"similarities of {scored} queries for {len(query_ids)} ids")
    counted = int(np.isfinite(ap).sum())
    if not counted:
        known = np.isin(query_ids, gallery_ids[gallery_ids >= 0]).any()
        raise ValueError(f"none of the {len(query_ids)} queries can be counted: " + (
            "all images of their identities are under the query's own camera" if known else "no image of their identities is in the gallery"))  # fmt: skip
    return {
        "mAP": float(np.nanmean(ap)), "mINP": float(np.nanmean(inp)), "cmc": cmc.cumsum() / counted,
        "queries": counted, "left_out": len(ap) - counted, "ap": ap,
    }  # fmt: skip


def finite_norms(features, name: str) -> tuple[Tensor, Tensor]:
    """Features float32 (n, d) as a tensor, on whatever device they are, and their lengths (n, 1). Raises ValueError."""
    features = features.detach().float() if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features, dtype=np.float32))
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{name} features: expected (n, d) with n of 1 or more, got {tuple(features.shape)}")
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    bad = (~torch.isfinite(norms[:, 0])).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"{name} features: {len(bad)} of {len(features)} rows are not finite, the first: {bad[0]}")
    return features, norms.clamp_min_(1e-12)


def similarities(query, gallery, most: int = 2**26):
    """Cosine similarities in blocks of queries: yields (first row, float32 array (b, G)), with at most `most` numbers in a block.
    The array is used again for the next block. Raises ValueError where features are not finite."""
    (query, length), (gallery, gallery_length) = finite_norms(query, "query"), finite_norms(gallery, "gallery")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query features have {query.shape[1]} dimensions, gallery features {gallery.shape[1]}")
    rows = min(max(1, most // len(gallery)), len(query))
    block, inverse = query.new_empty(rows, len(gallery)), 1 / gallery_length.T
    for first in range(0, len(query), rows):
        part = query[first : first + rows] / length[first : first + rows]
        yield first, torch.mm(part, gallery.T, out=block[: len(part)]).mul_(inverse).cpu().numpy()


# ---------------------------------------------------------------- re-ranking


def rerank(query, gallery, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> np.ndarray:
    """Distances float32 (Q, G) of k-reciprocal re-ranking (Zhong et al., CVPR 2017); query (Q, d), gallery (G, d) of any length.

    The Jaccard distance between sets of neighbours that have each other among their k1 nearest, and lambda_value of the plain
    squared distance as a share of the query's largest. All (Q, G) at once: `reranked` gives them in blocks.
    """
    blocks = [block.copy() for _, block in reranked(query, gallery, k1, k2, lambda_value)]
    return np.concatenate(blocks)


def reranked(query, gallery, k1: int = 20, k2: int = 6, lambda_value: float = 0.3, most: int = 2**24):
    """`rerank` in blocks of queries: yields (first row, float32 array (b, G)). Neighbourhoods are sparse (n, n) matrices, n = Q + G;
    nothing dense is larger than a block. Raises ValueError for features that are not finite."""
    (query, length), (gallery, gallery_length) = finite_norms(query, "query"), finite_norms(gallery, "gallery")
    x = torch.cat([query, gallery]).div_(torch.cat([length, gallery_length]))
    Q, n = len(query), len(x)
    if k1 < 1 or k2 < 1:
        raise ValueError(f"k1 {k1}, k2 {k2}: expected 1 or more")
    nearest, largest = nearest_neighbours(x, min(max(k1 + 1, k2), n))

    def neighbours(k: int) -> csr_array:
        """(n, n), 1 at the k nearest of each row's image, of which itself is one."""
        columns = nearest[:, :k]
        return csr_array((np.ones(columns.size, np.float32), columns.ravel(), np.arange(n + 1) * columns.shape[1]), shape=(n, n))

    def reciprocal(k: int) -> csr_array:
        """(n, n), 1 where two images are among the k nearest of each other."""
        return neighbours(k).multiply(neighbours(k).T).tocsr()

    # a neighbour's own, narrower neighbourhood joins where more than two thirds of it are in the set already
    wide, narrow = reciprocal(k1 + 1), reciprocal(int(np.around(k1 / 2)) + 1)
    joins = wide.multiply(wide @ narrow).tocsr()  # images of c's neighbourhood in i's
    size = np.diff(narrow.indptr)
    joins.data = (3 * joins.data > 2 * size[joins.indices]).astype(np.float32)
    joins.eliminate_zeros()
    sets = (wide + joins @ narrow).tocsr()
    rows = np.repeat(np.arange(n, dtype=np.int32), np.diff(sets.indptr))
    for part in np.array_split(np.arange(len(rows)), len(rows) // 8192 + 1):  # weights exp(-distance), which sum to 1 in a row
        a, b = rows[part], sets.indices[part]
        sets.data[part] = np.exp(np.minimum(torch.einsum("nd,nd->n", x[a], x[b]).cpu().numpy() - 1, 0) / largest[a])
    sets.data /= np.bincount(rows, sets.data, n)[rows]
    sets = (neighbours(k2) @ sets).tocsr() / np.float32(min(k2, n))  # each image's set becomes the mean of its k2 nearest's
    theirs, holders = sets[:Q], sets[Q:].T.tocsr()  # holders: for each image, whose sets it is in

    G = n - Q
    step = max(1, min(most // G, Q))
    for first in range(0, Q, step):
        mine = theirs[first : first + step]
        b = mine.shape[0]
        count = np.diff(holders.indptr)[mine.indices]  # gallery sets that meet the query's in this image
        where = np.repeat(holders.indptr[mine.indices] - np.cumsum(count) + count, count) + np.arange(count.sum())
        both = np.minimum(np.repeat(mine.data, count), holders.data[where])
        row = np.repeat(np.repeat(np.arange(b), np.diff(mine.indptr)), count)
        shared = np.bincount(row * G + holders.indices[where], both, b * G).astype(np.float32).reshape(b, G)
        plain = (1 - x[first : first + b] @ x[Q:].T).cpu().numpy() / largest[first : first + b, None]
        yield first, (1 - shared / (2 - shared)) * np.float32(1 - lambda_value) + plain * np.float32(lambda_value)


def nearest_neighbours(x: Tensor, k: int, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each unit vector (n, d) by cosine, itself first: int32 (n, k); and its largest distance 1 - cosine, (n,).

    Exact. A product of two blocks serves the rows of both, so half of the n x n similarities are computed, and none kept."""
    n = len(x)
    best, index = x.new_full((n, k), -torch.inf), torch.zeros((n, k), dtype=torch.int32, device=x.device)
    least = x.new_full((n,), torch.inf)

    def keep(rows: slice, found: Tensor, offset: int) -> None:
        """Take similarities (rows, m) to images offset..offset + m into account."""
        least[rows] = torch.minimum(least[rows], found.amin(1))
        values, where = found.topk(min(k, found.shape[1]), 1)
        values, candidates = torch.cat([best[rows], values], 1), torch.cat([index[rows], where.int() + offset], 1)
        best[rows], where = values.topk(k, 1)
        index[rows] = candidates.gather(1, where)

    for a in range(0, n, block):
        e = min(a + block, n)
        similarity = x[a:e] @ x[a:].T  # (rows a to e, all from a on)
        similarity.diagonal().fill_(2)  # itself first, its duplicates after it
        keep(slice(a, e), similarity, a)
        if e < n:
            keep(slice(e, n), similarity[:, e - a :].T, a)
    return index.cpu().numpy(), (1 - least).clamp_min_(1e-6).cpu().numpy()  # more than rounding, where all are alike


# ---------------------------------------------------------------- benchmarks


class Benchmark(NamedTuple):
    """What is ranked: items, which are images, or tracklets of images whose features are averaged (MARS).

    images: index of the files (N,). item: the item of each image, (N,), ascending. ids, cams: of the items. query, gallery: items.
    """

    images: Tracklets
    item: np.ndarray
    ids: np.ndarray
    cams: np.ndarray
    query: np.ndarray
    gallery: np.ndarray

    def first_images(self) -> np.ndarray:
        """The first image of each item, by which a tracklet is shown and named."""
        return np.searchsorted(self.item, np.arange(len(self.ids)))


def read_benchmark(root, labels=None, say=print) -> Benchmark:
    """The test split of whatever lies in a folder, known by its files; what was found is said in the numbers that papers print.

    Market-1501 and DukeMTMC-reID (query/, bounding_box_test/), MSMT17 in both layouts (list_query.txt), MARS (info/query_IDX.mat),
    or tracklets with an annotation (`labels`, or test.json): see `read_labelled`. Raises ValueError for a folder that is none
    of these, or half of one.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    there = lambda *names: any((root / name).exists() for name in names)
    if not labels:
        inner = [name for name in ("Market-1501-v15.09.15", "DukeMTMC-reID", "MSMT17_V1", "MSMT17_V2", "MARS") if (root / name).is_dir()]
        if len(inner) > 1:
            raise ValueError(f"{root}: holds {', '.join(inner)}; give one of them")
        root = root.joinpath(*inner)
        if there("query", "bounding_box_test", "bounding_box_train"):
            return read_market(root, say)
        if there("list_query.txt", "list_gallery.txt", "list_train.txt", "mask_test_v2"):
            return read_msmt17(root, say)
        if there("info/query_IDX.mat", "info/tracks_test_info.mat", "info/test_name.txt", "bbox_test"):
            return read_mars(root, say)
        if not (root / "test.json").is_file():
            raise ValueError(f"{root}: expected Market-1501 or DukeMTMC-reID (query/, bounding_box_test/), MSMT17 (list_query.txt), "
                             "MARS (info/query_IDX.mat), or tracklets in test/ with their identities in test.json (or --labels)")  # fmt: skip
    return read_labelled(read_tracklets(root / "test" if there("test.json") and there("test") else root), labels or root / "test.json", say)


def read_labelled(tracklets: Tracklets, labels, say=print) -> Benchmark:
    """Labelled tracklets as a benchmark whose cameras are the videos: see `label_tracklets`."""
    labels = read_labels(labels, tracklets)
    benchmark = label_tracklets(tracklets, labels)
    say(f"labelled tracklets, {tracklets.root}")
    for name, items in (("query", benchmark.query), ("gallery", benchmark.gallery)):
        say_split(say, name, benchmark.ids[items], benchmark.cams[items], nobody=labels.max() + 1)
    return benchmark


def label_tracklets(tracklets: Tracklets, ids: np.ndarray) -> Benchmark:
    """Labelled images (ids (N,), -1 for none) as a benchmark, videos counting as cameras.

    Two queries for each person and video, evenly spaced in time; all images are gallery (the protocol leaves out a query's
    own video), those of no identity as distractors.
    """
    rows = np.flatnonzero(ids >= 0)
    rows = rows[np.lexsort((tracklets.frame[rows], tracklets.video[rows], ids[rows]))]
    _, start, count = np.unique(np.stack([ids[rows], tracklets.video[rows]]), axis=1, return_index=True, return_counts=True)
    queries = np.unique(np.concatenate([rows[start + count // 3], rows[start + 2 * count // 3]]))
    everything = np.arange(len(tracklets))
    return Benchmark(tracklets, everything, np.where(ids < 0, ids.max() + 1, ids), tracklets.video, queries, everything)


def index_files(root: Path, folders: list[str], names: list[list[str]]) -> Tracklets:
    """An index of files named by hand: a list of names for each folder."""
    name = np.array([os.fsencode(file) for files in names for file in files])
    video = np.repeat(np.arange(len(folders)), [len(files) for files in names])
    return Tracklets(root, folders, name, video, np.arange(len(name)), np.zeros(len(name), np.int64))


def join_images(root: Path, folders: tuple, query: tuple, gallery: tuple) -> Benchmark:
    """A benchmark of images from query and gallery: names, ids and cams of each, below the folder of each."""
    (names, *query), (gallery_names, *gallery) = query, gallery
    ids, cams = (np.concatenate(pair) for pair in zip(query, gallery))
    item = np.arange(len(ids))
    return Benchmark(index_files(root, list(folders), [names, gallery_names]), item, ids, cams, item[: len(names)], item[len(names) :])


def say_split(say, name: str, ids: np.ndarray, cams: np.ndarray, what: str = "images", more: str = "", nobody: int | None = None) -> None:
    """One line on a split: how many images (or tracklets), identities and cameras. nobody: the identity that distractors have."""
    people = ids[ids != nobody]
    notes = [f"{len(ids) - len(people):,} of them distractors"] * (len(people) < len(ids)) + [more] * bool(more)
    counts = f"{len(ids):>7,} {what} of {len(np.unique(people)):>5,} identities, {len(np.unique(cams))} cameras"
    say(f"{name + ':':<8} " + "; ".join([counts, *notes]))


PUBLISHED = {"Market-1501": (3368, 15913), "DukeMTMC-reID": (2228, 17661), "MSMT17": (11659, 82161), "MARS": (1980, 11310)}  # without junk


def compare(say, name: str, benchmark: Benchmark) -> Benchmark:
    """Say which benchmark it is, and whether query and gallery are as large as published; nothing else tells half a download."""
    found, published = (len(benchmark.query), len(benchmark.gallery)), PUBLISHED.get(name)
    say(f"{name}, {benchmark.images.root}" + (
        "" if not published or found == published else ": {:,} queries and a gallery of {:,}, where the whole has {:,} and {:,}: half a download, "
        "or a part of it?".format(*found, *published)))  # fmt: skip
    return benchmark


def need(root: Path, *names: str) -> None:
    """Raise ValueError where a folder lacks one of the files or folders that its benchmark consists of."""
    missing = [name for name in names if not (root / name).exists()]
    if missing:
        there = [name for name in names if name not in missing]
        raise ValueError(f"{root}: has {', '.join(there) or 'a part'} but no {', no '.join(missing)}: half a download?")


def need_files(folder: Path, names: list[str], listed_in: str) -> None:
    """Raise ValueError where files that a list names are not in the folder, or leave it."""
    present = {}
    for name in names:
        parent = os.path.dirname(name)
        if parent not in present:
            outside = os.path.isabs(name) or ".." in name.split("/")
            if outside:
                raise ValueError(f"{listed_in}: {name} leaves the folder {folder}")
            present[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
    missing = [name for name in names if os.path.basename(name) not in present[os.path.dirname(name)]]
    if missing:
        raise ValueError(f"{folder}: {len(missing):,} of the {len(names):,} files that {listed_in} names are missing, the first: {missing[0]}: "
                         "half a download?")  # fmt: skip


MARKET_NAME = re.compile(r"(-1|\d+)_c(\d+).*\.(?:jpe?g|png)", re.IGNORECASE)  # 0002_c1s1_000451_03.jpg; Duke: 0001_c2_f0046182.jpg


def read_market(root: Path, say=print) -> Benchmark:
    """Market-1501 (Zheng et al., ICCV 2015), and DukeMTMC-reID and others that took its layout: identity and camera are in the
    names. Junk, -1, is left out; identity 0 are distractors. Files that are no JPEG or PNG (Thumbs.db) are passed over."""
    need(root, "query", "bounding_box_test")
    splits = {}
    for title, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
        if not (root / folder).is_dir():  # the training images may be left out
            continue
        names = sorted(name for name in os.listdir(root / folder) if name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith("."))
        wrong = [name for name in names if not MARKET_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"{root / folder}: {len(wrong):,} names without identity and camera (0002_c1s1_000451_03.jpg), the first: {wrong[0]}")
        if all(name.startswith("-1") for name in names):
            raise ValueError(f"{root / folder}: no images but junk; expected names such as 0002_c1s1_000451_03.jpg")
        numbers = np.array([MARKET_NAME.fullmatch(name).groups() for name in names]).astype(np.int64)  # (n, 2)
        valid = np.flatnonzero(numbers[:, 0] >= 0)
        ids, cams = numbers[valid].T
        junk = len(names) - len(valid)
        say_split(say, title, ids, cams, more=f"{junk:,} junk left out" * bool(junk), nobody=0)
        splits[title] = [names[i] for i in valid], ids, cams
    one = splits["gallery"][0][0]
    name = "Market-1501" if re.search(r"_c\d+s\d+_", one) else "DukeMTMC-reID" if re.search(r"_c\d+_f\d+", one) else "Market-1501's layout"
    return compare(say, name, join_images(root, ("query", "bounding_box_test"), splits["query"], splits["gallery"]))


def read_msmt17(root: Path, say=print) -> Benchmark:
    """MSMT17 (Wei et al., CVPR 2018): train/ and test/ of the first release, mask_train_v2/ and mask_test_v2/ of the second, with
    lists of `0000/0000_000_01_0303morning_0015_0.jpg 0`: the camera is the third number of the name."""
    test = "mask_test_v2" if (root / "mask_test_v2").is_dir() else "test"
    need(root, test, "list_query.txt", "list_gallery.txt")
    splits = {}
    for split in ("train", "val", "query", "gallery"):
        listed = root / f"list_{split}.txt"
        if split in ("train", "val") and not listed.exists():
            continue
        lines = listed.read_text().split("\n")
        rows = [re.fullmatch(r"(\S*?\d+_\d+_(\d+)_\S+)\s+(\d+)\s*", line) for line in lines if line.strip()]
        if not rows or not all(rows):
            line = rows.index(None) + 1 if rows else 1
            raise ValueError(f"{listed}, line {line}: expected a path such as 0000/0000_000_01_0303morning_0015_0.jpg, a space, and a number")
        files = [row[1] for row in rows]
        cams, ids = (np.array([row[i] for row in rows]).astype(np.int64) for i in (2, 3))
        if split in ("query", "gallery"):
            need_files(root / test, files, listed.name)
        say_split(say, split, ids, cams)
        splits[split] = files, ids, cams
    return compare(say, "MSMT17", join_images(root, (test, test), splits["query"], splits["gallery"]))


def read_mars(root: Path, say=print) -> Benchmark:
    """MARS (Zheng et al., ECCV 2016), by tracklet: info/tracks_test_info.mat holds first and last line in test_name.txt (from 1),
    identity and camera of each; query_IDX.mat numbers the queries. As in the authors' evaluation the gallery are all without junk
    (-1), 0 being distractors: a query is among them, under its own camera. (Some codes leave queries out, and count 9,330.)"""
    need(root, "bbox_test", "info/test_name.txt", "info/tracks_test_info.mat", "info/query_IDX.mat")

    def table(name: str, columns: int) -> np.ndarray:
        """The one table (n, columns) of a .mat file."""
        file = root / "info" / name
        try:
            arrays = [value for key, value in loadmat(file).items() if not key.startswith("__")]
        except Exception as error:  # whatever a damaged file makes scipy raise
            raise ValueError(f"{file}: cannot be read as a .mat file ({error})") from None
        if len(arrays) != 1 or arrays[0].dtype.kind not in "iuf" or arrays[0].size % columns or columns > 1 and arrays[0].shape[1] != columns:
            raise ValueError(f"{file}: expected one table of {columns} columns of numbers, got {[array.shape for array in arrays]}")
        return arrays[0].astype(np.int64).reshape(-1, columns)

    if (root / "info/tracks_train_info.mat").exists():
        first, last, ids, cams = table("tracks_train_info.mat", 4).T
        say_split(say, "train", ids, cams, "tracklets", f"{np.sum(last - first + 1):,} images")
    rows, query = table("tracks_test_info.mat", 4), table("query_IDX.mat", 1)[:, 0] - 1
    names = (root / "info/test_name.txt").read_text().split()
    first, last, ids, cams = rows.T
    if first.min() < 1 or last.max() > len(names) or (last < first).any():
        raise ValueError(f"{root}/info/tracks_test_info.mat: lines {first.min()} to {last.max()} of test_name.txt, which has {len(names)}")
    if not len(query) or query.min() < 0 or query.max() >= len(rows):
        raise ValueError(f"{root}/info/query_IDX.mat: expected numbers from 1 to {len(rows)}, the tracklets of tracks_test_info.mat")
    kept = np.flatnonzero(ids >= 0)
    number = np.full(len(rows), -1)
    number[kept] = np.arange(len(kept))
    query = query[ids[query] >= 0]
    count = (last - first + 1)[kept]
    lines = np.repeat(first[kept] - 1 - np.cumsum(count) + count, count) + np.arange(count.sum())
    paths = [f"{names[i][:4]}/{names[i]}" for i in lines]  # 0001C1T0001F001.jpg is in 0001/
    need_files(root / "bbox_test", paths, "info/test_name.txt")
    for name, split in (("query", query), ("gallery", kept)):
        junk = f"; {len(rows) - len(kept):,} junk left out" * (name == "gallery")
        say_split(say, name, ids[split], cams[split], "tracklets", f"{count[number[split]].sum():,} images{junk}", nobody=0)
    item = np.repeat(np.arange(len(kept)), count)
    index = index_files(root, ["bbox_test"], [paths])
    return compare(say, "MARS", Benchmark(index, item, ids[kept], cams[kept], number[query], np.arange(len(kept))))


# ---------------------------------------------------------------- pictures and tables


def show_retrieval(file, benchmark: Benchmark, features: Tensor, queries: np.ndarray, canvas: tuple[int, int] = (128, 64)) -> None:
    """Write a PNG: a query (item) a row, framed white, and the ten nearest of the gallery that the protocol leaves in, right ones
    framed green, wrong ones red. A tracklet is shown by its first image."""
    images, sheet = Images(benchmark.images, canvas), []
    first = benchmark.first_images()
    show = lambda item, colour: framed(images[first[item]][0] / 255, colour)
    ids, cams = benchmark.ids, benchmark.cams
    gallery = benchmark.gallery[features[benchmark.gallery].any(1).numpy()]
    for q, similarity in zip(queries, (features[gallery] @ features[queries].T).T.numpy()):
        valid = (ids[gallery] != ids[q]) | (cams[gallery] != cams[q])
        nearest = gallery[valid][np.argsort(-similarity[valid], kind="stable")[:10]]
        row = [show(q, (1, 1, 1)), *(show(i, (0.1, 0.8, 0.1) if ids[i] == ids[q] else (0.9, 0.1, 0.1)) for i in nearest)]
        sheet += row + [torch.zeros_like(row[0])] * (11 - len(row))
    with replacing(file) as temporary:
        save_image(make_grid(torch.stack(sheet), nrow=11, padding=2), temporary, format="png")


def evaluate_features(features: Tensor, benchmark: Benchmark, reranking: bool = False, device="cpu") -> dict:
    """The figures of a log line or a table row, fractions: mAP, R1, R5, R10, mINP, queries, left_out; and ap of each query, (Q,).

    features (items, d): a zero row is an item that could not be read, left out of the gallery and not counted as a query.
    device: where the products are made.
    """
    readable = features.any(1).numpy()
    query, gallery = benchmark.query[readable[benchmark.query]], benchmark.gallery[readable[benchmark.gallery]]
    for name, items in (("query", query), ("gallery", gallery)):
        if not len(items):
            raise ValueError(f"the {name} holds no image that can be read")
    ids, cams = benchmark.ids, benchmark.cams
    rows = features[query].to(device), features[gallery].to(device)
    blocks = ((first, -distances) for first, distances in reranked(*rows)) if reranking else similarities(*rows)
    result = score(blocks, ids[query], ids[gallery], cams[query], cams[gallery])
    cmc = result.pop("cmc")
    ap = np.full(len(benchmark.query), np.nan)
    ap[readable[benchmark.query]] = result["ap"]
    left_out = len(ap) - result["queries"]
    return result | {f"R{k}": float(cmc[min(k, len(cmc)) - 1]) for k in (1, 5, 10)} | {"left_out": left_out, "ap": ap}


def print_table(rows: dict[str, dict]) -> None:
    """One aligned row of percentages for each named result."""
    width = max(22, *(len(name) + 2 for name in rows))
    print(f"{'':<{width}}{'mAP':>7}{'R1':>7}{'R5':>7}{'R10':>7}{'mINP':>7}{'queries':>9}{'left out':>10}")
    for name, row in rows.items():
        print(f"{name:<{width}}" + "".join(f"{row[k]:>7.1%}" for k in ("mAP", "R1", "R5", "R10", "mINP"))
              + f"{row['queries']:>9,}{row['left_out']:>10,}")  # fmt: skip


def export(file, features: Tensor, benchmark: Benchmark) -> None:
    """Write features (items, d), ids, cameras (items,), paths (items,) of the image or a tracklet's first, and query and gallery,
    the items of each, as arrays of an .npz file."""
    paths = np.array([benchmark.images.path(i) for i in benchmark.first_images()])
    with replacing(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, features=features.numpy(), ids=benchmark.ids, cameras=benchmark.cams, paths=paths,
                 query=benchmark.query, gallery=benchmark.gallery)  # fmt: skip


def main() -> None:
    """Rank a benchmark's gallery for its queries with the features of a network, and print one table."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint of a run, or backbone weights")
    parser.add_argument("--data", default="data/walkers", help="folder of Market-1501, DukeMTMC-reID, MSMT17, MARS, or of tracklets (test/, test.json)")
    parser.add_argument("--labels", help="annotation JSON of the identities, for tracklets without a test.json")
    parser.add_argument("--arch", help="architecture, if the checkpoint does not say; python model.py lists them")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="input size, if the checkpoint does not say (then 256 128)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    parser.add_argument("--batch", type=int, default=256, help="images in a forward pass (a tracklet of MARS is not split)")
    parser.add_argument("--flip", action="store_true", help="add the features of the mirror image")
    parser.add_argument("--rerank", action="store_true", help="a second row, re-ranked by k-reciprocal neighbours")
    parser.add_argument("--export", metavar="FILE.npz", help="write features, ids, cameras and paths")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="write the ranked lists of the N worst queries, twelve a sheet")
    parser.add_argument("--out", help="folder of the sheets (default: that of the weights)")
    args = parser.parse_args()
    for flag, least in (("workers", 0), ("batch", 1), ("show", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} or more")
    if args.export and not args.export.endswith(".npz"):
        raise ValueError(f"--export {args.export}: expected a name that ends in .npz")
    if args.export and Path(args.export).exists():
        raise ValueError(f"{args.export}: exists already; give another --export")
    rank = int(os.environ.get("RANK", 0))
    say = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    benchmark = read_benchmark(args.data, args.labels, say)
    backbone, size, _ = load_backbone(args.weights, args.arch, args.size, say)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    clock = time.time()
    features, readable = extract(backbone.to(device), benchmark.images, size, device, args.workers, args.batch, benchmark.item, args.flip)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    seconds = time.time() - clock
    say(f"{len(benchmark.images):,} images in {seconds:.0f} s, {len(benchmark.images) / seconds:,.0f} images/s")
    if not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).any(1).nonzero()[:, 0]
        raise ValueError(f"{args.weights}: the features of {len(bad):,} of {len(features):,} images are not finite, the first: row {bad[0]}")
    unreadable = np.flatnonzero(~readable)
    if len(unreadable):
        refuse_unreadable(benchmark.images, unreadable, len(readable))
        say(f"{len(unreadable):,} images cannot be read and are left out, the first: {benchmark.images.path(unreadable[0])}")
    name = f"{Path(args.weights).stem}{' + flip' if args.flip else ''}"
    rows = {name: evaluate_features(features, benchmark, device=device)}
    if args.rerank:
        rows[f"{name}, re-ranked"] = evaluate_features(features, benchmark, reranking=True, device=device)
    print_table(rows)
    if args.export:
        export(args.export, features, benchmark)
        say(f"features: {args.export}")
    worst = benchmark.query[np.argsort(rows[name]["ap"], kind="stable")][: min(args.show, rows[name]["queries"])]  # nan, not counted, is last
    for sheet, start in enumerate(range(0, len(worst), 12), start=1):
        file = Path(args.out or Path(args.weights).parent) / f"{Path(args.weights).stem}-{Path(args.data).resolve().name}-ranked-{sheet:02d}.png"
        show_retrieval(file, benchmark, features, worst[start : start + 12])
        say(f"ranked lists, worst first: {file}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped")
