"""Retrieval: how well features find the same person under another camera.

In this order: features of images; mAP and CMC (Zheng et al., ICCV 2015) and mINP (Ye et al., TPAMI
2021); k-reciprocal re-ranking (Zhong et al., CVPR 2017); the benchmarks, each by its own protocol;
figures and pictures. Read first: `score`, `reranked`, `read_benchmark`.

    python evaluate.py --data Market-1501-v15.09.15 --weights FILE --arch r50ibn --rerank
"""
import argparse
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import loadmat
from scipy.sparse import csr_array
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torchvision.utils import draw_bounding_boxes

from data import (
    LARGEST,
    Images,
    Tracklets,
    load_batches,
    read_labels,
    read_tracklets,
    write_pictures,
)
from model import load_backbone, normalize


# ---------------------------------------------------------------- features
def join_processes():
    """Join the processes that torchrun started, or be the only one; this one's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        # where torchrun restarts processes, the store still has the addresses of those that died
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return device


@torch.no_grad()
def extract(backbone, tracklets, size, device, workers=0, batch=256, out=None):
    """Features of all images, resized to `size` (height, width), of unit length: (N, embed_dim),
    written into `out`, an array or a memory map, or into a new float32 array. Leaves the backbone
    in eval mode.

    Under torch.distributed the processes share the images: the first one gathers the features and
    returns them, the others return None."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    N = len(tracklets)
    if out is None and rank == 0:
        out = np.empty((N, backbone.embed_dim), np.float32)

    # All processes take the same number of equal batches, so the last image may be repeated.
    steps = math.ceil(N / (world * batch))
    batch = math.ceil(N / (world * steps))
    rows = np.arange(steps * world * batch).clip(max=N - 1).reshape(steps, world, batch)
    backbone.eval()
    start = 0
    for images in load_batches(tracklets, list(rows[:, rank]), size, workers):
        images = normalize(images.to(device, non_blocking=True).float() / 255)
        features = F.normalize(backbone(images), dim=1)
        if world > 1:
            shares = [torch.empty_like(features) for _ in range(world)]
            dist.all_gather(shares, features)
            features = torch.cat(shares)  # (world * batch, embed_dim), in the images' order
        if rank == 0:
            out[start : start + len(features)] = features[: N - start].cpu().numpy()
        start += len(features)
    return out


# ---------------------------------------------------------------- ranking
def evaluate(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams):
    """`score` of the cosine similarities of features of any length, (Q, d) and (G, d)."""
    rows = similarities(query, gallery)
    return score(rows, query_ids, gallery_ids, query_cams, gallery_cams)


def unit(features):
    """Features (n, d), an array or a tensor -> a float32 tensor with rows of unit length."""
    return F.normalize(torch.as_tensor(features).float(), dim=1)


def similarities(query, gallery, block=1024):
    """Yield each query's cosine similarities (G,), made for a block of queries at once."""
    gallery = unit(gallery)
    for part in unit(query).split(block):
        yield from (part @ gallery.T).cpu().numpy()


def score(rows, query_ids, gallery_ids, query_cams, gallery_cams):
    """mAP, CMC and mINP from each query's row of similarities (G,), numbers of any type.

    Gallery images of the query's identity are right under other cameras, and left out under its
    own. Junk, ids below 0, is left out. The n-th nearest right image has rank n + the number of
    wrong images that are at least as similar: as if wrong ones came first among equals, so that
    ties count against the features. Counting is faster than sorting the gallery.

    Returns fractions mAP, mINP, cmc (G,) from rank 1 on; ap (Q,), nan for queries without a right
    image; queries, the number of the others. Raises ValueError if there are none, and for
    similarities that are not finite."""
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    query_cams, gallery_cams = np.asarray(query_cams), np.asarray(gallery_cams)
    ap = np.full(len(query_ids), np.nan)
    inp = []
    first_ranks = []
    queries = zip(rows, query_ids, query_cams, strict=True)
    for q, (similarity, person, camera) in enumerate(queries):
        similarity = np.asarray(similarity)
        if not np.isfinite(similarity).all():
            raise ValueError(f"similarities of query {q} are not finite")
        same = gallery_ids == person
        matches = same & (gallery_cams != camera)
        right = np.sort(similarity[matches])[::-1]
        if person < 0 or len(right) == 0:
            continue
        wrong = similarity[~same & (gallery_ids >= 0)]
        hits = np.arange(1, len(right) + 1)
        ranks = hits + [np.count_nonzero(wrong >= s) for s in right]
        ap[q] = np.mean(hits / ranks)
        inp.append(len(right) / ranks[-1])
        first_ranks.append(ranks[0])
    if not first_ranks:
        raise ValueError(f"none of {len(ap)} queries has a match under another camera than its own")
    found = np.bincount(first_ranks, minlength=len(gallery_ids) + 1)[1:]
    return {
        "mAP": float(np.nanmean(ap)),
        "mINP": float(np.mean(inp)),
        "cmc": found.cumsum() / len(first_ranks),
        "queries": len(first_ranks),
        "ap": ap,
    }


# ---------------------------------------------------------------- re-ranking
def rerank(query, gallery, k1=20, k2=6, lambda_value=0.3):
    """Distances (Q, G) after k-reciprocal re-ranking, see `reranked`."""
    rows = reranked(query, gallery, k1, k2, lambda_value)
    return np.fromiter(rows, (np.float32, len(gallery)), len(query))


def reranked(query, gallery, k1=20, k2=6, lambda_value=0.3):
    """Yield each query's distances (G,), from features of any length, (Q, d) and (G, d).

    They are the Jaccard distance between weighted sets of neighbours and, with the weight
    lambda_value, the distance 1 - cosine as a share of the query's largest (section 3.5)."""
    sets, largest = neighbour_sets(torch.cat([unit(query), unit(gallery)]), k1, k2)
    holders = sets[len(query) :].T.tocsr()  # (n, G): of each image, the gallery's sets with it
    for q, similarity in enumerate(similarities(query, gallery)):
        plain = (1 - similarity) / largest[q]
        yield (1 - lambda_value) * jaccard(sets[[q]], holders) + lambda_value * plain


def neighbour_sets(x, k1, k2):
    """The set of neighbours of each of n = Q + G unit vectors, a row of a sparse matrix (n, n) of
    weights that sum to 1; and each one's largest distance, (n,)."""
    nearest, largest = nearest_neighbours(x, max(k1 + 1, k2))
    wide = k_reciprocal(nearest, k1)
    narrow = k_reciprocal(nearest, round(k1 / 2))
    sets = weigh(expand(wide, narrow), x.cpu().numpy(), largest)
    return expand_queries(sets, nearest[:, :k2]), largest


def nearest_neighbours(x, k, block=1024):
    """The k nearest of each of n unit vectors, itself the first, (n, k); and each one's largest
    distance 1 - cosine, (n,)."""
    nearest = []
    largest = []
    for start in range(0, len(x), block):
        similarity = x[start : start + block] @ x.T
        largest.append(1 - similarity.amin(1))
        # Above 1, so that an image comes before its duplicates.
        similarity.diagonal(start).fill_(2)
        nearest.append(similarity.topk(min(k, len(x))).indices.int())
    # Where all vectors are alike the largest distance is 0, or what rounding makes of it.
    largest = torch.cat(largest).clamp(min=1e-6)
    nearest = torch.cat(nearest)
    return nearest.cpu().numpy(), largest.cpu().numpy()


def k_reciprocal(nearest, k):
    """R(p, k) of each image p, section 3.2: those of its k nearest, and itself, that have p among
    their k nearest. A list of n sets."""
    near = [set(row) for row in nearest[:, : k + 1].tolist()]
    return [{q for q in near[p] if p in near[q]} for p in range(len(near))]


def expand(wide, narrow):
    """R*(p, k1), section 3.2: R(p, k1) takes in each R(q, k1 / 2) of its members q of which more
    than two thirds are in R(p, k1). A list of n sets."""
    expanded = []
    for members in wide:
        union = set(members)
        for q in members:
            if len(members & narrow[q]) > 2 / 3 * len(narrow[q]):
                union |= narrow[q]
        expanded.append(union)
    return expanded


def weigh(sets, x, largest):
    """Section 3.3: the members of an image's set weigh exp(-distance), divided by their sum. Row p
    of a sparse matrix (n, n) has the weights of p's set."""
    columns = [sorted(members) for members in sets]
    weights = []
    for p, members in enumerate(columns):
        distance = (1 - x[members] @ x[p]) / largest[p]
        weight = np.exp(-distance)
        weights.append(weight / weight.sum())
    starts = np.cumsum([0] + [len(members) for members in columns], dtype=np.int32)
    columns = np.concatenate(columns).astype(np.int32)
    return csr_array((np.concatenate(weights), columns, starts))


def expand_queries(sets, nearest):
    """Section 3.4: an image's set becomes the mean of those of its k2 nearest, itself included."""
    return sum(sets[column] for column in nearest.T) * np.float32(1 / nearest.shape[1])


def jaccard(mine, holders):
    """Section 3.3: distances (G,) of a set (1, n) to the gallery's, 1 - sum of minima / sum of
    maxima. Both sets sum to 1, so that the maxima sum to 2 - the minima."""
    theirs = holders[mine.indices]  # (members of mine, G)
    weights = np.repeat(mine.data, np.diff(theirs.indptr))
    minima = np.minimum(weights, theirs.data)
    shared = np.bincount(theirs.indices, minima, minlength=holders.shape[1])
    return 1 - shared / (2 - shared)


# ---------------------------------------------------------------- benchmarks
class Benchmark(NamedTuple):
    """What is ranked: items, which are images, or tracklets whose images' features are averaged."""

    images: Tracklets  # N images, those of an item in a row
    first: np.ndarray  # each item's first image, (items,)
    ids: np.ndarray  # (items,), not below 0
    cams: np.ndarray  # (items,)
    query: np.ndarray  # items
    gallery: np.ndarray  # items

    def __str__(self):
        kind = "images" if len(self.first) == len(self.images) else "tracklets"
        lines = []
        for name, items in (("query", self.query), ("gallery", self.gallery)):
            people = len(np.unique(self.ids[items]))
            cameras = len(np.unique(self.cams[items]))
            lines.append(f"{name}: {len(items)} {kind}, {people} identities, {cameras} cameras")
        return "\n".join(lines)


def read_benchmark(root, labels=None):
    """The test split in a folder, known by its files: Market-1501, MSMT17 or MARS; or tracklets
    with identities, root/test and root/test.json, or the root and `labels`, an annotation. Raises
    ValueError for anything else, and where a file is missing."""
    root = Path(root)
    try:
        if labels:
            tracklets = read_tracklets(root)
            return label_tracklets(tracklets, read_labels(labels, tracklets))
        if (root / "test.json").exists():
            return read_benchmark(root / "test", root / "test.json")
        if (root / "query").exists():
            return read_market(root)
        if (root / "list_query.txt").exists():
            return read_msmt17(root)
        if (root / "info").exists():
            return read_mars(root)
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: is missing") from None
    layouts = "query/ (Market-1501), list_query.txt (MSMT17), info/ (MARS) or test.json and test/"
    raise ValueError(f"{root}: expected a folder with {layouts}")


def label_tracklets(tracklets, ids):
    """Labelled images (ids (N,), -1 for nobody) as a benchmark whose cameras are the videos. Two
    queries for each person and video, evenly spaced in time; the gallery is all images, those of
    nobody as distractors."""
    order = np.lexsort((tracklets.frame, tracklets.video, ids))
    order = order[ids[order] >= 0]
    pairs = np.stack([ids, tracklets.video])[:, order]
    starts = np.unique(pairs, axis=1, return_index=True)[1]
    query = []
    for seen in np.split(order, starts[1:]):  # one person in one video
        query.append(seen[len(seen) // 3])
        query.append(seen[2 * len(seen) // 3])
    images = np.arange(len(tracklets))
    ids = np.where(ids < 0, ids.max() + 1, ids)
    return Benchmark(tracklets, images, ids, tracklets.video, np.unique(query), images)


def read_market(root):
    """Market-1501 (Zheng et al., ICCV 2015) and others of its layout. Names tell identity (0 for
    distractors, -1 for junk, which is left out) and camera: 0002_c1s1_000451_03.jpg."""
    splits = {"query": [], "bounding_box_test": []}
    for folder, items in splits.items():
        for name in sorted(os.listdir(root / folder)):
            if name.startswith(("-1", ".")) or not name.lower().endswith(".jpg"):
                continue
            match = re.match(r"(\d+)_c(\d+)", name)
            if not match:
                raise ValueError(f"{root / folder / name}: expected <identity>_c<camera>...jpg")
            person, camera = match.groups()
            items.append(([f"{folder}/{name}"], int(person), int(camera)))
    return build_benchmark(root, *splits.values())


def read_msmt17(root):
    """MSMT17 (Wei et al., CVPR 2018), V1 and V2. Lines of its lists are a path, whose third number
    is the camera, and an identity: 0000/0000_000_01_0303morning_0015_0.jpg 0."""
    folder = "mask_test_v2" if (root / "mask_test_v2").exists() else "test"
    splits = {"list_query.txt": [], "list_gallery.txt": []}
    for file, items in splits.items():
        lines = (root / file).read_text("utf-8-sig", errors="replace").splitlines()
        for n, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            match = re.fullmatch(r"(\d+/\d+_\d+_(\d+)_\S+) (\d+)", line.strip())
            if not match:
                wanted = "expected a path and an identity"
                raise ValueError(f"{root / file}, line {n}: {wanted}, got '{line}'")
            path, camera, person = match.groups()
            items.append(([f"{folder}/{path}"], int(person), int(camera)))
    return build_benchmark(root, *splits.values())


def read_mars(root):
    """MARS (Zheng et al., ECCV 2016). Items are tracklets: first and last line in test_name.txt,
    from 1, identity (0 for distractors, -1 for junk, which is left out) and camera. query_IDX has
    the queries' numbers, from 1. As in the authors' evaluation they are in the gallery too."""
    names = (root / "info/test_name.txt").read_text("utf-8-sig", errors="replace").split()
    table = read_matrix(root / "info/tracks_test_info.mat", "track_test_info")
    query_numbers = read_matrix(root / "info/query_IDX.mat", "query_IDX")
    if table.shape[1] != 4:
        raise ValueError(f"{root}/info/tracks_test_info.mat: has {table.shape[1]} columns, not 4")
    query = []
    others = []
    for number, row in enumerate(table.tolist(), start=1):
        first, last, person, camera = row
        if person < 0:
            continue
        # 0001C1T0001F001.jpg is in the folder 0001
        paths = [f"bbox_test/{name[:4]}/{name}" for name in names[first - 1 : last]]
        if not 1 <= len(paths) == last - first + 1:
            raise ValueError(f"{root}/info/test_name.txt: has no lines {first} to {last}")
        split = query if number in query_numbers else others
        split.append((paths, person, camera))
    benchmark = build_benchmark(root, query, others)
    return benchmark._replace(gallery=np.arange(len(benchmark.ids)))


def read_matrix(file, key):
    """A matrix of whole numbers in a file of MATLAB. Raises ValueError for anything else."""
    try:
        table = loadmat(str(file))[key]
        whole = table.astype(np.int64)
        if (whole != table).any():
            raise ValueError("it has numbers that are not whole")
        return whole
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever another format makes it raise
        raise ValueError(f"{file}: expected whole numbers as {key}: {error!r}") from None


def build_benchmark(root, query, gallery):
    """The benchmark of two lists of items (paths below the root, identity, camera)."""
    if not query or not gallery:
        raise ValueError(f"{root}: has {len(query)} queries and {len(gallery)} others to find")
    files, ids, cams = zip(*query, *gallery)
    if max(ids + cams) > LARGEST:
        raise ValueError(f"{root}: expected identities and cameras below 2**63: {max(ids + cams)}")
    paths = np.concatenate(files)
    for path in paths:
        os.stat(root / path)  # raises FileNotFoundError
    items = np.arange(len(ids))
    counts = [len(item) for item in files]
    # As a video of its own: no other item's image may take the place of one that cannot be read.
    item = np.repeat(items, counts)
    frame = np.zeros_like(item)
    names = np.array([os.fsencode(path) for path in paths])
    images = Tracklets(root, [""] * len(items), names, item, item, frame)
    first = np.cumsum(counts) - counts
    query, gallery = np.split(items, [len(query)])
    ids = np.array(ids)
    cams = np.array(cams)
    return Benchmark(images, first, ids, cams, query, gallery)


# ---------------------------------------------------------------- figures and pictures
def average(features, benchmark):
    """Features of images (N, d) -> the mean over each item's images, (items, d), of unit length."""
    return unit(np.add.reduceat(features, benchmark.first, axis=0, dtype=np.float32))


def evaluate_features(features, benchmark, reranking=False, device="cpu"):
    """mAP, R1, R5, R10, mINP, queries and ap of features of images (N, d), see `score`."""
    features = average(features, benchmark).to(device)
    ids = benchmark.ids
    cams = benchmark.cams
    q = benchmark.query
    g = benchmark.gallery
    rows = similarities(features[q], features[g])
    if reranking:
        rows = (-distances for distances in reranked(features[q], features[g]))
    result = score(rows, ids[q], ids[g], cams[q], cams[g])
    cmc = result.pop("cmc")
    for rank in (1, 5, 10):
        result[f"R{rank}"] = float(cmc[:rank][-1])
    return result


def show_retrieval(file, benchmark, features, queries, size=(128, 64)):
    """Write a picture: a row for each query (item), framed white, and the ten nearest of the
    gallery but for its own camera, right ones framed green, wrong ones red. features: of images
    (N, d). A tracklet is shown by its first image."""
    images = Images(benchmark.images, size)
    features = average(features, benchmark)
    ids = benchmark.ids
    cams = benchmark.cams
    gallery = benchmark.gallery
    edge = torch.tensor([[0, 0, size[1] - 1, size[0] - 1]])
    cells = []
    for q in queries:
        own = (ids[gallery] == ids[q]) & (cams[gallery] == cams[q])
        allowed = gallery[~own]
        order = torch.argsort(features[allowed] @ features[q], descending=True)
        row = [q, *allowed[order[:10]]]
        for item in row:
            colour = "lime" if ids[item] == ids[q] else "red"
            if item == q:
                colour = "white"
            image, _ = images[benchmark.first[item]]
            cells.append(draw_bounding_boxes(image, edge, colors=colour, width=3) / 255)
    write_pictures(file, cells, len(row))


def parse_flags():
    """Flags of the program."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--data", required=True, help="Market-1501, MSMT17, MARS, or test/ with test.json")
    add("--weights", required=True, help="checkpoint of a run, or weights of a backbone")
    add("--labels", help="annotation of the images below --data, instead of test.json")
    add("--arch", help="architecture, if the weights don't say")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="of images, if the weights don't say")
    add("--workers", type=int, default=1, help="processes that decode images")
    add("--rerank", action="store_true", help="also after re-ranking")
    add("--show", type=int, default=0, help="draw so many of the worst queries, beside the weights")
    return parser.parse_args()


def main():
    """Rank a benchmark's gallery for each query with the features of a network."""
    args = parse_flags()
    device = join_processes()
    benchmark = read_benchmark(args.data, args.labels)
    backbone, size = load_backbone(args.weights, args.arch, args.size)
    features = extract(backbone.to(device), benchmark.images, size, device, args.workers)
    dist.destroy_process_group()
    if features is None:
        return

    print(benchmark)
    results = {"plain": evaluate_features(features, benchmark, device=device)}
    if args.rerank:
        results["re-ranked"] = evaluate_features(features, benchmark, True, device)
    for name, result in results.items():
        figures = [f"{key} {result[key]:.1%}" for key in ("mAP", "R1", "R5", "R10", "mINP")]
        print(f"{name}: {', '.join(figures)}, {result['queries']:,} queries")
    if args.show > 0:
        order = np.argsort(results["plain"]["ap"])
        worst = benchmark.query[order[: args.show]]
        picture = Path(args.weights).with_suffix(f".{Path(args.data).resolve().name}.jpg")
        show_retrieval(picture, benchmark, features, worst)
        print(f"the worst queries: {picture}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}")
