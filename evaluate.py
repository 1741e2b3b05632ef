"""Retrieval: how well features find the same person under another camera, by each benchmark's protocol.

mAP and CMC (Zheng et al., ICCV 2015), mINP (Ye et al., TPAMI 2021), re-ranking (Zhong et al., CVPR 2017), and the benchmarks' readers.

    python evaluate.py --data Market-1501-v15.09.15 --weights FILE --arch r50ibn --rerank

Read first: `score`, `rerank`, `read_benchmark`.
"""
import argparse
import os
import re
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from scipy.sparse import csr_array
from torch import Tensor, distributed as dist
from torchvision.utils import make_grid, save_image

from data import Images, Tracklets, framed, read_labels, read_tracklets, refuse_unreadable, replacing, require
from model import extract, load_backbone


def evaluate(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams) -> dict:
    """`score` by cosine similarity of features of any length, (Q, d) and (G, d). Raises ValueError where they are not finite."""
    return score(similarities(query, gallery), query_ids, gallery_ids, query_cams, gallery_cams)


def score(blocks, query_ids, gallery_ids, query_cams, gallery_cams) -> dict:
    """mAP, mINP and CMC of similarities in blocks of queries: pairs of the first row and an array (b, G), which is written to.

    ids, cams: integers (Q,), (G,). Left out are gallery images of the query's identity under its own camera, and junk, ids below 0.
    A match's rank is the number of images at least as similar: ties share the last rank, and nothing is sorted. Returns fractions
    mAP, mINP, cmc (G,) from rank 1 on, ap (Q,), nan without a match; and queries, those counted, and left_out, those without a match.
    Raises ValueError where lengths do not agree, or no query has a match."""
    query_ids, gallery_ids, query_cams, gallery_cams = map(np.asarray, (query_ids, gallery_ids, query_cams, gallery_cams))
    for name, ids, cams in (("query", query_ids, query_cams), ("gallery", gallery_ids, gallery_cams)):
        require(ids.shape == cams.shape == (ids.size,), f"{name}: expected one id and one camera for each image: {ids.shape}, {cams.shape}")
    Q, G, scored = len(query_ids), len(gallery_ids), 0
    by_id = np.argsort(gallery_ids, kind="stable")
    start, end = (np.searchsorted(gallery_ids, query_ids, side, sorter=by_id) for side in ("left", "right"))
    ap, inp, cmc = np.full(Q, np.nan), np.full(Q, np.nan), np.zeros(G)
    for first, block in blocks:
        require(block.shape[1] == G, f"{G} gallery ids for {block.shape[1]} gallery features")
        require(first == scored <= Q - len(block), f"{len(block)} queries from {first} after {scored} of {Q}; expected all, in order")
        scored += len(block)
        block[:, gallery_ids < 0] = -np.inf  # junk is less similar than anything valid
        for q, similarity in enumerate(block, first):
            same = by_id[start[q] : end[q]]
            own_camera = gallery_cams[same] == query_cams[q]
            similarity[same[own_camera]] = -np.inf
            matches = np.sort(similarity[same[~own_camera]])[::-1]
            if not len(matches) or query_ids[q] < 0:
                continue
            require(np.isfinite(matches).all(), f"similarities of query {q} are not finite")
            rank = np.array([np.count_nonzero(similarity >= match) for match in matches])
            hits = np.searchsorted(-matches, -matches, side="right")  # matches at least as similar
            ap[q], inp[q] = (hits / rank).mean(), len(matches) / rank[-1]
            cmc[rank[0] - 1] += 1
    require(scored == Q, f"similarities of {scored} queries for {Q} ids")
    counted = int(np.isfinite(ap).sum())
    known = (start < end)[query_ids >= 0].any()
    why = "all images of their identities are under the query's own camera" if known else "no image of their identities is in the gallery"
    require(counted, f"none of the {Q} queries can be counted: {why}")
    return {"mAP": float(np.nanmean(ap)), "mINP": float(np.nanmean(inp)), "cmc": cmc.cumsum() / counted,
            "queries": counted, "left_out": Q - counted, "ap": ap}


def with_norms(query, gallery) -> list[Tensor]:
    """Query (Q, d), norms (Q, 1), gallery (G, d), norms (G, 1), float32, on the device they are on. Raises ValueError."""
    found = []
    for name, x in (("query", query), ("gallery", gallery)):
        x = x.detach().float() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x, dtype=np.float32))
        require(x.ndim == 2 and len(x), f"{name} features: expected (n, d) with n of 1 or more, got {tuple(x.shape)}")
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        bad = (~torch.isfinite(norms[:, 0])).nonzero()[:, 0].tolist()
        require(not bad, f"{name} features: {len(bad)} of {len(x)} rows are not finite: {bad[:3]}")
        found += [x, norms.clamp_min_(1e-12)]
    d, gallery_d = found[0].shape[1], found[2].shape[1]
    require(d == gallery_d, f"query features have {d} dimensions, gallery features {gallery_d}")
    return found


def similarities(query, gallery, most: int = 2**26):
    """Cosine similarities in blocks of queries: yields (first row, float32 (b, G)) of `most` numbers, all in the same memory."""
    query, norms, gallery, gallery_norms = with_norms(query, gallery)
    rows = min(max(1, most // len(gallery)), len(query))
    block, inverse = query.new_empty(rows, len(gallery)), 1 / gallery_norms.T
    for first in range(0, len(query), rows):
        part = query[first : first + rows] / norms[first : first + rows]
        yield first, torch.mm(part, gallery.T, out=block[: len(part)]).mul_(inverse).cpu().numpy()


def rerank(query, gallery, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> np.ndarray:
    """Distances float32 (Q, G) of k-reciprocal re-ranking (Zhong et al., CVPR 2017) of features of any length, (Q, d) and (G, d): the
    Jaccard distance between sets of neighbours that have each other among their k1 nearest, and lambda_value of the plain squared
    distance as a share of the query's largest."""
    return np.concatenate([block for _, block in reranked(query, gallery, k1, k2, lambda_value)])


def reranked(query, gallery, k1: int = 20, k2: int = 6, lambda_value: float = 0.3, most: int = 2**24):
    """`rerank` in blocks of queries: yields (first row, float32 (b, G)). Neighbourhoods are sparse (n, n) matrices, n = Q + G."""
    require(k1 >= 1 and k2 >= 1, f"k1 {k1}, k2 {k2}: expected 1 or more")
    query, norms, gallery, gallery_norms = with_norms(query, gallery)
    x = torch.cat([query, gallery]).div_(torch.cat([norms, gallery_norms]))
    Q, G, n = len(query), len(gallery), len(x)
    nearest, largest = nearest_neighbours(x, min(max(k1 + 1, k2), n))

    def neighbours(k: int) -> csr_array:
        """(n, n), 1 at the k nearest of each row's image, of which itself is one."""
        columns = nearest[:, :k]
        return csr_array((np.ones(columns.size, np.float32), columns.ravel(), np.arange(n + 1) * columns.shape[1]), shape=(n, n))

    # reciprocal: among the nearest of each other. A neighbour's own, narrower set joins where over two thirds of it are in the wide one
    wide, narrow = (neighbours(k).multiply(neighbours(k).T).tocsr() for k in (k1 + 1, int(np.around(k1 / 2)) + 1))
    joins = wide.multiply(wide @ narrow).tocsr()  # how many images of the column's narrow set are in the row's wide one
    joins.data = (3 * joins.data > 2 * np.diff(narrow.indptr)[joins.indices]).astype(np.float32)
    joins.eliminate_zeros()
    sets = (wide + joins @ narrow).tocsr()
    rows = np.repeat(np.arange(n, dtype=np.int32), np.diff(sets.indptr))
    for part in np.array_split(np.arange(len(rows)), len(rows) // 8192 + 1):  # weights exp(-distance), which sum to 1 in a row
        a, b = rows[part], sets.indices[part]
        sets.data[part] = np.exp(np.minimum(torch.einsum("nd,nd->n", x[a], x[b]).cpu().numpy() - 1, 0) / largest[a])
    sets.data /= np.bincount(rows, sets.data, n)[rows]
    sets = (neighbours(k2) @ sets).tocsr() / np.float32(min(k2, n))  # each image's set becomes the mean of its k2 nearest's
    holders = sets[Q:].T.tocsr()  # (n, G): for each image, the gallery sets that it is in
    step = max(1, min(most // G, Q))
    for first in range(0, Q, step):
        mine = sets[first : min(first + step, Q)]  # (b, n)
        met = holders[mine.indices]  # for each image of each of these sets, the gallery sets that it is in too
        count, b = np.diff(met.indptr), mine.shape[0]
        row = np.repeat(np.repeat(np.arange(b), np.diff(mine.indptr)), count)
        both = np.minimum(np.repeat(mine.data, count), met.data)
        shared = np.bincount(row * G + met.indices, both, b * G).astype(np.float32).reshape(b, G)
        plain = (1 - x[first : first + b] @ x[Q:].T).cpu().numpy() / largest[first : first + b, None]
        yield first, (1 - shared / (2 - shared)) * np.float32(1 - lambda_value) + plain * np.float32(lambda_value)


def nearest_neighbours(x: Tensor, k: int, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each unit vector (n, d) by cosine, itself first: int32 (n, k); and its largest distance 1 - cosine, (n,)."""
    n = len(x)
    best, index, least = x.new_full((n, k), -torch.inf), x.new_zeros((n, k), dtype=torch.int32), x.new_full((n,), torch.inf)
    for a in range(0, n, block):
        similarity = x[a : a + block] @ x[a:].T  # serves its rows and, transposed, those after them: half of all (n, n), none kept
        similarity.diagonal().fill_(2)  # itself first, its duplicates after it
        for rows, found in ((slice(a, a + block), similarity), (slice(a + block, n), similarity[:, block:].T)):
            if not len(found):  # nothing is after the last block
                break
            least[rows] = torch.minimum(least[rows], found.amin(1))
            values, where = found.topk(min(k, found.shape[1]), 1)
            values, candidates = torch.cat([best[rows], values], 1), torch.cat([index[rows], where.int() + a], 1)
            best[rows], where = values.topk(k, 1)
            index[rows] = candidates.gather(1, where)
    return index.cpu().numpy(), (1 - least).clamp_min_(1e-6).cpu().numpy()  # more than rounding, where all are alike


class Benchmark(namedtuple("Benchmark", "images item ids cams query gallery")):
    """What is ranked: items, which are images, or tracklets of images whose features are averaged (MARS).
    images: index of the files (N,). item: the item of each image, (N,), ascending. ids, cams: of the items. query, gallery: items."""

    def first_images(self) -> np.ndarray:
        """The first image of each item, by which a tracklet is shown and named."""
        return np.searchsorted(self.item, np.arange(len(self.ids)))


def label_tracklets(tracklets: Tracklets, ids: np.ndarray) -> Benchmark:
    """Labelled images (ids (N,), -1 for none) as a benchmark, videos counting as cameras: two queries for each person and video, evenly
    spaced in time; all images are gallery (the protocol leaves out a query's own video), those of no identity as distractors."""
    rows = np.flatnonzero(ids >= 0)
    rows = rows[np.lexsort((tracklets.frame[rows], tracklets.video[rows], ids[rows]))]
    _, start, count = np.unique(np.stack([ids[rows], tracklets.video[rows]]), axis=1, return_index=True, return_counts=True)
    query, everything = np.unique([rows[start + count // 3], rows[start + 2 * count // 3]]), np.arange(len(tracklets))
    return Benchmark(tracklets, everything, np.where(ids < 0, ids.max() + 1, ids), tracklets.video, query, everything)


def read_benchmark(root, labels=None, say=print) -> Benchmark:
    """The test split of whatever lies in a folder, known by its files: Market-1501 and others of its layout, MSMT17, MARS, or tracklets
    with an annotation (`labels`, or test.json). Says what is there. Raises ValueError for none of these, or half of one."""
    root = Path(root)
    if not labels:
        inner = [name for name in ("Market-1501-v15.09.15", "DukeMTMC-reID", "MSMT17_V1", "MSMT17_V2", "MARS") if (root / name).is_dir()]
        require(len(inner) <= 1, f"{root}: holds {', '.join(inner)}; give one of them")
        root = root.joinpath(*inner)
        for read, parts in ((read_market, ["query", "bounding_box_test"]), (read_msmt17, ["list_query.txt", "list_gallery.txt"]),
                            (read_mars, ["bbox_test", "info/test_name.txt", "info/tracks_test_info.mat", "info/query_IDX.mat"])):
            there, missing = ([part for part in parts if (root / part).exists() == wanted] for wanted in (True, False))
            require(not (there and missing), f"{root}: has {', '.join(there)} but no {', no '.join(missing)}: half a download?")
            if there:
                return build_benchmark(root, *read(root), say)
        why = "no benchmark" if root.is_dir() else "no such folder"
        require((root / "test.json").is_file(), f"{root}: {why}; expected Market-1501 or DukeMTMC-reID (query/), "
                "MSMT17 (list_query.txt), MARS (info/query_IDX.mat), or tracklets in test/ with identities in test.json (or --labels)")
    tracklets = read_tracklets(root / "test" if (root / "test.json").exists() and (root / "test").exists() else root)
    ids = read_labels(labels or root / "test.json", tracklets)
    benchmark = label_tracklets(tracklets, ids)
    say(f"labelled tracklets, {tracklets.root}")
    for split, items in (("query", benchmark.query), ("gallery", benchmark.gallery)):
        say_split(say, split, benchmark.ids[items], benchmark.cams[items], np.ones(len(items)), nobody=ids.max() + 1)
    return benchmark


# A reader returns the benchmark's name, rows (split, [files], id, camera), one an item, and the identity that distractors have.


def read_market(root: Path) -> tuple:
    """Market-1501 (Zheng et al., ICCV 2015), DukeMTMC-reID and others of its layout: identity (-1 is junk, 0 are distractors) and
    camera are in the names. Files that are no JPEG or PNG (Thumbs.db) are passed over; the training images may be left out."""
    rows, name = [], "Market-1501's layout"
    for split, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
        for file in sorted(os.listdir(root / folder)) if (root / folder).is_dir() else ():
            if file.lower().endswith((".jpg", ".jpeg", ".png")) and not file.startswith("."):
                match = re.match(r"(-1|\d+)_c(\d+)(s\d+_|_f\d+)?", file)  # Duke: 0001_c2_f0046182.jpg
                require(match, f"{root / folder}: expected names with identity and camera (0002_c1s1_000451_03.jpg), got {file}")
                rows.append((split, [f"{folder}/{file}"], match[1], match[2]))
                name = name if not match[3] else "Market-1501" if match[3][0] == "s" else "DukeMTMC-reID"
    return name, rows, 0


def read_msmt17(root: Path) -> tuple:
    """MSMT17 (Wei et al., CVPR 2018): train/ and test/ of the first release, mask_train_v2/ and mask_test_v2/ of the second, with
    lists of `0000/0000_000_01_0303morning_0015_0.jpg 0`, path and identity: the third number of the name is the camera."""
    rows, release = [], "mask_{}_v2" if (root / "mask_test_v2").is_dir() else "{}"
    for split, folder in (("train", "train"), ("val", "train"), ("query", "test"), ("gallery", "test")):
        listed = root / f"list_{split}.txt"
        for line in filter(str.strip, listed.read_text().split("\n") if listed.exists() else ()):  # train and val may be left out
            match = re.fullmatch(r"(\S*?\d+_\d+_(\d+)_\S+)\s+(\d+)\s*", line)
            require(match, f"{listed}: expected a path such as 0000/0000_000_01_0303morning_0015_0.jpg, a space, and a number, got {line}")
            rows.append((split, [f"{release.format(folder)}/{match[1]}"], match[3], match[2]))
    return "MSMT17", rows, None


def read_mars(root: Path) -> tuple:
    """MARS (Zheng et al., ECCV 2016), by tracklet: info/tracks_test_info.mat holds first and last line in test_name.txt (from 1),
    identity (-1 is junk, 0 are distractors) and camera of each; query_IDX.mat numbers the queries. As in the authors' evaluation
    a query is in the gallery too, under its own camera. (Some codes leave queries out, and count 9,330.)"""

    def table(name: str, columns: int) -> np.ndarray:
        """The one table (n, columns) of a .mat file."""
        try:
            (array,) = (value for key, value in loadmat(root / "info" / name).items() if not key.startswith("__"))
            return array.astype(np.int64).reshape(-1 if columns == 1 else len(array), columns)
        except Exception as error:  # whatever a damaged file makes scipy raise
            raise ValueError(f"{root}/info/{name}: expected a .mat file with one table of numbers in {columns} columns; {error}") from None

    names = (root / "info/test_name.txt").read_text().split()
    tracks, query = table("tracks_test_info.mat", 4), table("query_IDX.mat", 1)
    for file, numbers, most in (("tracks_test_info.mat", tracks[:, :2], len(names)), ("query_IDX.mat", query, len(tracks))):
        orderly = (1 <= numbers).all() and (numbers <= most).all() and (np.diff(numbers) >= 0).all()  # no tracklet ends before it starts
        require(orderly, f"{root}/info/{file}: expected numbers from 1 to {most}")
    train = table("tracks_train_info.mat", 4) if (root / "info/tracks_train_info.mat").exists() else ()
    rows = [("train", range(first, last + 1), person, camera) for first, last, person, camera in train]  # their files are not needed
    for number, (first, last, person, camera) in enumerate(tracks, start=1):
        files = [f"bbox_test/{name[:4]}/{name}" for name in names[first - 1 : last]]  # 0001C1T0001F001.jpg is in 0001/
        rows.append(("query, gallery" if number in query else "gallery", files, person, camera))
    return "MARS", rows, 0


PUBLISHED = {"Market-1501": (3368, 15913), "DukeMTMC-reID": (2228, 17661), "MSMT17": (11659, 82161), "MARS": (1980, 11310)}  # without junk


def build_benchmark(root: Path, name: str, rows: list, nobody: int | None, say) -> Benchmark:
    """The benchmark of a reader's rows, without junk (ids below 0). Says its numbers, and whether query and gallery are as large as
    published: nothing else tells half a download. Raises ValueError where files are missing, or query or gallery are empty."""
    for split in ("query", "gallery"):
        require(any(split in row[0] and int(row[2]) >= 0 for row in rows), f"{root}: no images but junk in the {split}")
    splits, files, ids, cams = zip(*rows)
    ids, cams, count = np.array(ids).astype(np.int64), np.array(cams).astype(np.int64), np.array([len(f) for f in files])
    members = {split: np.array([split in s for s in splits]) for split in ("train", "val", "query", "gallery")}  # each (items,), bool
    for split, mine in members.items():
        if mine.any():
            say_split(say, split, ids[mine], cams[mine], count[mine], nobody)
    kept = (members["query"] | members["gallery"]) & (ids >= 0)
    paths = [path for i in np.flatnonzero(kept) for path in files[i]]
    there = {folder: set(os.listdir(root / folder)) if (root / folder).is_dir() else () for folder in {os.path.dirname(p) for p in paths}}
    missing = [path for path in paths if ".." in path.split("/") or os.path.basename(path) not in there[os.path.dirname(path)]]
    require(not missing, f"{root}: {len(missing):,} of {len(paths):,} files are missing or leave it: {missing[:3]}: half a download?")
    images = Tracklets(root, [""], np.array([os.fsencode(path) for path in paths]), *np.zeros((3, len(paths)), np.int64))
    query, gallery = ((np.cumsum(kept) - 1)[members[split] & kept] for split in ("query", "gallery"))
    found, published = (len(query), len(gallery)), PUBLISHED.get(name)
    half = ": {:,} queries and a gallery of {:,}, where the whole has {:,} and {:,}: half a download, or a part of it?"
    say(f"{name}, {root}" + (half.format(*found, *published) if published and published != found else ""))
    return Benchmark(images, np.repeat(np.arange(kept.sum()), count[kept]), ids[kept], cams[kept], query, gallery)


def say_split(say, split: str, ids: np.ndarray, cams: np.ndarray, images: np.ndarray, nobody: int | None) -> None:
    """One line on a split of items, which have so many images each: identities but `nobody`, that of distractors, cameras, junk."""
    valid = ids >= 0
    items, people = valid.sum(), ids[valid & (ids != nobody)]
    total = images[valid].sum() if images.max() > 1 else 0  # of tracklets
    notes = (items - len(people), "of them distractors"), (total, "images"), (len(ids) - items, "junk left out")
    say(f"{split + ':':<8} {items:>7,} {'tracklets' if total else 'images'} of {len(np.unique(people)):>5,} identities, "
        f"{len(np.unique(cams[valid]))} cameras" + "".join(f"; {n:,} {note}" for n, note in notes if n))


def evaluate_features(features: Tensor, benchmark: Benchmark, reranking: bool = False, device="cpu") -> dict:
    """mAP, R1, R5, R10, mINP, queries, left_out, and ap of each query (Q,), nan where not counted. features (items, d): a zero row could
    not be read, is left out of the gallery and not counted as a query. device: where the products are made. Raises ValueError."""
    readable, ids, cams = features.any(1).numpy(), benchmark.ids, benchmark.cams
    query, gallery = (items[readable[items]] for items in (benchmark.query, benchmark.gallery))
    for name, items in (("query", query), ("gallery", gallery)):
        require(len(items), f"the {name} holds no image that can be read")
    rows = features[query].to(device), features[gallery].to(device)
    blocks = ((first, -distances) for first, distances in reranked(*rows)) if reranking else similarities(*rows)
    result = score(blocks, ids[query], ids[gallery], cams[query], cams[gallery])
    cmc, ap = result.pop("cmc"), np.full(len(benchmark.query), np.nan)
    ap[readable[benchmark.query]] = result["ap"]
    result |= {f"R{k}": float(cmc[min(k, len(cmc)) - 1]) for k in (1, 5, 10)}
    return result | {"left_out": len(ap) - result["queries"], "ap": ap}


def show_retrieval(file, benchmark: Benchmark, features: Tensor, queries: np.ndarray, canvas: tuple[int, int] = (128, 64)) -> None:
    """Write a PNG: a query (item) a row, framed white, and the ten nearest of the gallery that the protocol leaves in, right ones
    framed green, wrong ones red. A tracklet is shown by its first image."""
    images, first, sheet = Images(benchmark.images, canvas), benchmark.first_images(), []
    ids, cams = benchmark.ids, benchmark.cams
    gallery = benchmark.gallery[features[benchmark.gallery].any(1).numpy()]
    for q, similarity in zip(queries, (features[gallery] @ features[queries].T).T.numpy()):
        valid = (ids[gallery] != ids[q]) | (cams[gallery] != cams[q])
        nearest = gallery[valid][np.argsort(-similarity[valid], kind="stable")[:10]]
        colours = [(1, 1, 1), *((0.1, 0.8, 0.1) if ids[i] == ids[q] else (0.9, 0.1, 0.1) for i in nearest)]
        row = [framed(images[first[i]][0] / 255, colour) for i, colour in zip([q, *nearest], colours)]
        sheet += row + [torch.zeros_like(row[0])] * (11 - len(row))
    with replacing(file) as temporary:
        save_image(make_grid(torch.stack(sheet), nrow=11, padding=2), temporary, format="png")


def export(file, features: Tensor, benchmark: Benchmark) -> None:
    """Write an .npz: features, ids, cameras, paths (the first image's), a row an item; and query and gallery, the items of each."""
    paths = np.array([benchmark.images.path(i) for i in benchmark.first_images()])
    with replacing(file) as temporary, open(temporary, "wb") as out:
        np.savez(out, features=features.numpy(), ids=benchmark.ids, cameras=benchmark.cams, paths=paths,
                 query=benchmark.query, gallery=benchmark.gallery)


def main() -> None:
    """Rank a benchmark's gallery for its queries with the features of a network, and print one table."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint of a run, or backbone weights")
    parser.add_argument("--data", default="data/walkers", help="Market-1501, DukeMTMC-reID, MSMT17, MARS, or tracklets (test/, test.json)")
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
        require(getattr(args, flag) >= least, f"--{flag} {getattr(args, flag)}: expected {least} or more")
    if args.export:
        require(args.export.endswith(".npz"), f"--export {args.export}: expected a name that ends in .npz")
        require(not Path(args.export).exists(), f"{args.export}: exists already; give another --export")
    rank, weights = int(os.environ.get("RANK", 0)), Path(args.weights)
    say = lambda text: print(text, flush=True) if rank == 0 else None
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
    seconds, bad = time.time() - clock, np.flatnonzero(~readable)
    say(f"{len(readable):,} images in {seconds:.0f} s, {len(readable) / seconds:,.0f} images/s")
    require(torch.isfinite(features).all(), f"{weights}: gives features that are not finite")
    refuse_unreadable(benchmark.images, bad, len(readable))
    if len(bad):
        say(f"{len(bad):,} images cannot be read and are left out, the first: {benchmark.images.path(bad[0])}")
    name = f"{weights.stem}{' + flip' if args.flip else ''}"
    table = {name: evaluate_features(features, benchmark, device=device)}
    if args.rerank:
        table[f"{name}, re-ranked"] = evaluate_features(features, benchmark, reranking=True, device=device)
    width = max(22, *(len(title) + 2 for title in table))
    say(f"{'':<{width}}{'mAP':>7}{'R1':>7}{'R5':>7}{'R10':>7}{'mINP':>7}{'queries':>9}{'left out':>10}")
    for title, row in table.items():
        shares = "".join(f"{row[key]:>7.1%}" for key in ("mAP", "R1", "R5", "R10", "mINP"))
        say(f"{title:<{width}}{shares}{row['queries']:>9,}{row['left_out']:>10,}")
    if args.export:
        export(args.export, features, benchmark)
        say(f"features: {args.export}")
    worst = benchmark.query[np.argsort(table[name]["ap"], kind="stable")[: min(args.show, table[name]["queries"])]]  # nan comes last
    for sheet, start in enumerate(range(0, len(worst), 12), start=1):
        file = Path(args.out or weights.parent) / f"{weights.stem}-{Path(args.data).resolve().name}-ranked-{sheet:02d}.png"
        show_retrieval(file, benchmark, features, worst[start : start + 12])
        say(f"ranked lists, worst first: {file}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"evaluate.py: {str(error) or 'stopped'}")
