"""Retrieval: how well features find the same person under another camera (protocol of Market-1501, Zheng et al., ICCV 2015).

Ranking without sorting, mAP, CMC and mINP, the split of held-out walkers, and the ranked-list picture.

    python evaluate.py --weights runs/walkers-r10ibn/last.pt

Read first: `evaluate`, `retrieval_split`, `show_retrieval`.
"""
import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import pad
from torchvision.utils import make_grid, save_image

from data import Images, Tracklets, find_splits, load_batches, read_labels, read_tracklets, replacing
from model import build, load_weights, normalize, read_checkpoint


def evaluate(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, block: int = 1024) -> dict:
    """mAP, mINP and CMC of ranking the gallery by cosine similarity, by Market-1501's protocol.

    query (Q, d), gallery (G, d): features of any length, normalised here; ids and cams: integers (Q,), (G,). For each query,
    gallery images of its identity under its own camera are left out; a query without any match left is not counted.
    Gallery ids below 0 are distractors: they match nobody. Tied images share the last rank among them.
    Returns {"mAP", "mINP", "cmc": (G,) with rank 1 at index 0, "queries": counted}; fractions. Raises ValueError where
    features are not finite or no query has a match.
    """
    query, gallery = (torch.as_tensor(np.asarray(f), dtype=torch.float32) for f in (query, gallery))
    ids_and_cams = (query_ids, gallery_ids, query_cams, gallery_cams)
    query_ids, gallery_ids, query_cams, gallery_cams = (torch.as_tensor(np.asarray(a)) for a in ids_and_cams)
    for name, features in (("query", query), ("gallery", gallery)):
        bad = (~torch.isfinite(features)).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"{name} features: {len(bad)} of {len(features)} rows are not finite, the first: {bad[0]}")
    query, gallery = F.normalize(query, dim=1), F.normalize(gallery, dim=1)
    precision, inverse_penalty, cmc = [], [], torch.zeros(len(gallery))
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        similarity = query[rows] @ gallery.T
        same = (query_ids[rows, None] == gallery_ids) & (query_ids[rows, None] >= 0)
        seen = same & (query_cams[rows, None] == gallery_cams)
        similarity[seen] = -torch.inf  # further than anything valid
        for s, match in zip(similarity, same & ~seen):
            positive = s[match].sort(descending=True).values
            if not len(positive):
                continue
            # a match's rank is the number of valid images at least as similar: nothing else need be sorted
            rank = (s >= positive[:, None]).sum(1)
            hits = (positive >= positive[:, None]).sum(1)
            precision.append((hits / rank).mean().item())
            inverse_penalty.append((len(positive) / rank[-1]).item())
            cmc[rank[0] - 1] += 1
    if not precision:
        raise ValueError(f"none of the {len(query)} queries has an image of its identity under another camera in the gallery")
    return {
        "mAP": float(np.mean(precision)), "mINP": float(np.mean(inverse_penalty)),
        "cmc": (cmc.cumsum(0) / len(precision)).numpy(), "queries": len(precision),
    }  # fmt: skip


def retrieval_split(tracklets: Tracklets, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and gallery of a labelled set of tracklets, whose videos count as cameras: rows of queries, rows of the gallery.

    Two queries for each person and video, evenly spaced in time; all images are gallery (the protocol leaves out a query's
    own video), those of no identity as distractors.
    """
    rows = np.flatnonzero(ids >= 0)
    rows = rows[np.lexsort((tracklets.frame[rows], tracklets.video[rows], ids[rows]))]
    _, start, count = np.unique(np.stack([ids[rows], tracklets.video[rows]]), axis=1, return_index=True, return_counts=True)
    queries = np.unique(np.concatenate([rows[start + count // 3], rows[start + 2 * count // 3]]))
    return queries, np.arange(len(tracklets))


def evaluate_features(features: Tensor, tracklets: Tracklets, ids: np.ndarray) -> dict:
    """The figures of a log line or a table row, fractions: mAP, R1, R5, R10, mINP, and queries, on a labelled set of tracklets.

    features (N, d): a zero row is an image that could not be read, left out here. ids (N,): -1 for distractors.
    """
    rows = features.any(1).numpy().nonzero()[0]
    queries, gallery = retrieval_split(tracklets, ids)
    queries, gallery = np.intersect1d(queries, rows), np.intersect1d(gallery, rows)
    video = tracklets.video
    result = evaluate(features[queries], features[gallery], ids[queries], ids[gallery], video[queries], video[gallery])
    ranks = {f"R{k}": float(result["cmc"][min(k, len(result["cmc"])) - 1]) for k in (1, 5, 10)}
    return {"mAP": result["mAP"], **ranks, "mINP": result["mINP"], "queries": result["queries"]}


@torch.no_grad()
def embed(backbone: nn.Module, tracklets: Tracklets, batches: list[np.ndarray], canvas: tuple[int, int], device, workers: int = 0):
    """Features of batches of images: yields (rows, float32 (B, embed_dim) of unit length on the CPU), zero where unreadable."""
    backbone.eval()
    for rows, (images, readable) in zip(batches, load_batches(tracklets, batches, canvas, workers)):
        out = backbone(normalize(images.to(device, non_blocking=True).float() / 255))
        yield rows, F.normalize(out.float(), dim=1).cpu() * readable[:, None]


def extract(backbone: nn.Module, tracklets: Tracklets, canvas: tuple[int, int], device, workers: int = 0, batch: int = 256) -> Tensor:
    """Features of all images, float32 (N, embed_dim) of unit length on the CPU; an image that cannot be read has a zero row.

    Where several processes run, each takes its share of the images and all end with all features.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = np.arange(rank, len(tracklets), world_size)
    features = torch.zeros(len(tracklets), backbone.embed_dim)
    for rows, out in embed(backbone, tracklets, [mine[i : i + batch] for i in range(0, len(mine), batch)], canvas, device, workers):
        features[rows] = out
    if world_size > 1:
        features = features.to(device)
        dist.all_reduce(features)
    return features.cpu()


def extract_to_file(folder, backbone: nn.Module, tracklets: Tracklets, canvas: tuple[int, int], device, workers: int = 0,
                    batch: int = 256, save_every: float = 30) -> np.ndarray:  # fmt: skip
    """Features as `extract`'s, float16 (N, embed_dim), memory-mapped from folder/features-<key>.npy; the key stands for weights
    and names of images (after changing images under their names, delete it). What is there is not computed again, and a run that
    was killed goes on where it was, on any number of processes (which share the folder): blocks of `batch` images are ticked off
    in features-<key>.done, every `save_every` seconds.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    key = hashlib.sha256(repr((str(tracklets.root.resolve()), tracklets.folders, canvas, batch)).encode())
    for array in (tracklets.name, tracklets.video, *(tensor.cpu().float().numpy() for tensor in backbone.state_dict().values())):
        key.update(np.ascontiguousarray(array))
    file = Path(folder) / f"features-{key.hexdigest()[:12]}.npy"
    part, done = file.with_suffix(".part"), file.with_suffix(".done")
    blocks = -(-len(tracklets) // batch)
    wait = dist.barrier if world_size > 1 else lambda: None
    if rank == 0:
        print(f"features: {f'found in {file}' if file.exists() else f'going on with {part}' if done.exists() else f'into {file}'}", flush=True)
    wait()
    if not file.exists():
        if rank == 0 and not (part.exists() and done.exists()):
            with replacing(part) as temporary:
                np.lib.format.open_memmap(temporary, "w+", np.float16, (len(tracklets), backbone.embed_dim))
            with replacing(done) as temporary:
                np.zeros(blocks, bool).tofile(temporary)
        wait()
        features, ticks = np.lib.format.open_memmap(part, "r+"), np.memmap(done, bool, "r+")
        mine = np.flatnonzero(~ticks)[rank::world_size]
        wait()  # nobody ticks before all have looked
        batches, finished, clock = [np.arange(b * batch, min((b + 1) * batch, len(tracklets))) for b in mine], [], time.time()
        for block, (rows, out) in zip(mine, embed(backbone, tracklets, batches, canvas, device, workers)):
            features[rows] = out.numpy()
            finished.append(block)
            if time.time() >= clock + save_every or block == mine[-1]:
                features.flush()  # to the disk before it is said to be there
                ticks[finished] = True
                finished, clock = [], time.time()
                if rank == 0 and block != mine[-1]:
                    print(f"features of {ticks.mean():.1%} of {len(tracklets):,} images", flush=True)
        del features
        wait()
        if rank == 0:
            done.unlink()
            os.replace(part, file)
        wait()
    return np.load(file, mmap_mode="r")


def framed(image: Tensor, colour: tuple[float, float, float], width: int = 3) -> Tensor:
    """A picture (3, H, W) in [0, 1] with a coloured frame of `width` pixels inside its edge."""
    inner = image[:, width:-width, width:-width]
    return torch.stack([pad(channel[None], width, fill=c)[0] for channel, c in zip(inner, colour)])


def show_retrieval(file, tracklets: Tracklets, ids: np.ndarray, features: Tensor, canvas: tuple[int, int], people: int = 12) -> None:
    """Write a picture: a query a row, spread over people, and the ten nearest images of other videos, right ones framed green."""
    queries, _ = retrieval_split(tracklets, ids)
    images, sheet = Images(tracklets, canvas), []
    for q in queries[np.linspace(0, len(queries) - 1, min(people, len(queries))).astype(int)]:
        similarity = (features @ features[q]).numpy()
        similarity[(ids == ids[q]) & (tracklets.video == tracklets.video[q])] = -np.inf
        sheet.append(framed(images[q][0] / 255, (1, 1, 1)))
        for i in np.argsort(-similarity, kind="stable")[:10]:
            sheet.append(framed(images[i][0] / 255, (0.1, 0.8, 0.1) if ids[i] == ids[q] else (0.9, 0.1, 0.1)))
    save_image(make_grid(torch.stack(sheet), nrow=11, padding=2), file)


def load_backbone(weights, arch: str | None = None, size: tuple[int, int] | None = None) -> tuple[nn.Module, tuple[int, int], dict]:
    """A backbone with weights, its input size and the settings of the run they come from (empty for other people's files)."""
    settings = read_checkpoint(weights).get("settings", {})
    arch = arch or settings.get("arch")
    if not arch:
        raise ValueError(f"{weights}: does not say which architecture it is for; add --arch")
    backbone = build(arch)
    load_weights(backbone, weights)
    return backbone, tuple(size or settings.get("size", (256, 128))), settings


def print_table(rows: dict[str, dict]) -> None:
    """One aligned row of percentages for each named result."""
    print(f"{'':<22}{'mAP':>7}{'R1':>7}{'R5':>7}{'R10':>7}{'mINP':>7}{'queries':>9}")
    for name, row in rows.items():
        print(f"{name:<22}" + "".join(f"{row[k]:>7.1%}" for k in ("mAP", "R1", "R5", "R10", "mINP")) + f"{row['queries']:>9,}")


def main() -> None:
    """Evaluate weights on the held-out split of a set of tracklets."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--weights", required=True, help="checkpoint of a run, or weights of the same names")
    parser.add_argument("--data", default="data/walkers", help="folder with test/ and test.json, or tracklets and their annotation")
    parser.add_argument("--labels", help="annotation JSON of the identities (default: test.json in the data folder)")
    parser.add_argument("--arch", help="architecture (default: what the checkpoint says)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="input size (default: what the checkpoint says)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode images")
    args = parser.parse_args()
    backbone, size, _ = load_backbone(args.weights, args.arch, args.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tracklets = read_tracklets(find_splits(args.data)[1] or args.data)
    ids = read_labels(args.labels or Path(args.data) / "test.json", tracklets)
    features = extract(backbone.to(device), tracklets, size, device, args.workers)
    print_table({Path(args.weights).stem: evaluate_features(features, tracklets, ids)})


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"evaluate.py: {error}")
