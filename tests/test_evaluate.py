"""evaluate.py: the protocol against a sorting definition, known answers, re-ranking against its dense definition, the benchmarks'
readers on tiny trees of the published layouts, pictures and exported features."""
import os

import numpy as np
import pytest
import scipy.io
import torch
from torchvision.io import encode_jpeg, read_image

import data
import evaluate
import model


def by_sorting(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams):
    """The metrics as a reader would define them: sort, walk down the list; tied images share the last rank among them."""
    ap, inp, first = [], [], []
    for q, i, c in zip(query, query_ids, query_cams):
        valid = ~((gallery_ids == i) & (gallery_cams == c)) & (gallery_ids >= 0)
        similarity, match = (gallery @ q)[valid], (gallery_ids == i)[valid]
        if not match.any():
            continue
        order = np.argsort(-similarity, kind="stable")
        similarity, match = similarity[order], match[order]
        last = np.array([np.flatnonzero(similarity == s)[-1] for s in similarity])  # of its ties
        hits = np.cumsum(match)
        ap.append(np.mean([hits[last[k]] / (last[k] + 1) for k in np.flatnonzero(match)]))
        ranks = last[match] + 1
        inp.append(match.sum() / ranks.max())
        first.append(ranks.min())
    cmc = np.array([np.mean(np.array(first) <= k + 1) for k in range(len(gallery))])
    return np.mean(ap), np.mean(inp), cmc, len(ap)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("levels", [2, 1000])
def test_equals_the_sorting_definition_with_ties(seed, levels):
    random = np.random.default_rng(seed)
    basis = np.eye(16, dtype=np.float32)[:, :8] if levels == 2 else random.standard_normal((60, 8), np.float32)
    rows = lambda n: (lambda f: f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-9))(basis[random.integers(0, 8 if levels == 2 else 60, n)])
    query, gallery = rows(12), rows(80)
    arrays = random.integers(0, 9, 12), random.integers(-1, 9, 80), random.integers(0, 3, 12), random.integers(0, 3, 80)
    got = evaluate.score(evaluate.similarities(query, gallery, most=5 * 80), *arrays)
    mAP, mINP, cmc, queries = by_sorting(query, gallery, *arrays)
    assert got["queries"] == queries
    np.testing.assert_allclose([got["mAP"], got["mINP"]], [mAP, mINP], atol=1e-6)
    np.testing.assert_allclose(got["cmc"], cmc, atol=1e-6)
    assert got["left_out"] == 12 - queries == np.isnan(got["ap"]).sum() and np.nanmean(got["ap"]) == got["mAP"]


def test_ties_share_the_last_rank_in_any_order_of_the_gallery():
    """Three images alike, one of them right: rank 3, wherever it stands."""
    for right in range(3):
        ids = [7 if i == right else 1 for i in range(3)]
        got = evaluate.evaluate(np.ones((1, 2)), np.ones((3, 2)), [7], ids, [0], [1, 1, 1])
        assert got["mAP"] == got["mINP"] == pytest.approx(1 / 3) and got["cmc"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("most", [1, 30, 77, 10**6])
def test_blocks_of_any_size_give_the_same(most):
    random = np.random.default_rng(0)
    query, gallery = random.standard_normal((12, 5)), random.standard_normal((30, 5))
    blocks = [(first, block.copy()) for first, block in evaluate.similarities(query, gallery, most)]
    assert max(block.size for _, block in blocks) <= max(most, 30)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    assert [first for first, _ in blocks] == list(np.cumsum([0] + [len(block) for _, block in blocks])[:-1])
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), unit(query) @ unit(gallery).T, atol=1e-6)


def test_by_hand():
    """One query; gallery by similarity: wrong, right, its own camera (left out), right, wrong."""
    angle = np.deg2rad([10, 20, 25, 30, 40])
    gallery = np.stack([np.cos(angle), np.sin(angle)], 1)
    got = evaluate.evaluate([[1.0, 0.0]], gallery, [1], [2, 1, 1, 1, 3], [0], [1, 1, 0, 2, 1])
    assert got["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2) and got["mINP"] == pytest.approx(2 / 3)
    assert got["cmc"].tolist() == [0, 1, 1, 1, 1] and got["queries"] == 1


def test_length_of_features_does_not_matter():
    random = np.random.default_rng(0)
    query, gallery = random.standard_normal((5, 4)), random.standard_normal((30, 4))
    arrays = np.arange(5), np.arange(30) % 5, np.zeros(5, int), np.ones(30, int)
    a, b = evaluate.evaluate(query, gallery, *arrays), evaluate.evaluate(3 * query, gallery * random.uniform(1, 9, (30, 1)), *arrays)
    assert a["mAP"] == pytest.approx(b["mAP"], abs=1e-6)


def test_lonely_queries_are_left_out_and_junk_is_never_there():
    got = evaluate.evaluate(np.eye(3), np.eye(3), [0, 1, -1], [0, -1, -1], [0, 0, 0], [1, 1, 1])
    assert got["queries"] == 1 and got["left_out"] == 2 and got["mAP"] == 1
    query, gallery = [[1.0, 0]], [[1.0, 0], [1.0, 0.1], [1.0, 0.2]]  # nearest first
    ranked = lambda first: evaluate.evaluate(query, gallery, [5], [first, 0, 5], [0], [1, 1, 1])["mAP"]
    assert ranked(-1) == 1 / 2 and ranked(0) == pytest.approx(1 / 3)  # junk is as if it were not there, a distractor counts


def test_errors():
    with pytest.raises(ValueError, match="none of the 1 queries can be counted: all images of their identities are under the query's own camera"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0]], [0], [0], [0], [0])
    with pytest.raises(ValueError, match="none of the 1 queries can be counted: no image of their identities is in the gallery"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0]], [0], [1], [0], [1])
    block = lambda *rows: [(0, np.array(rows, np.float32))]
    with pytest.raises(ValueError, match="similarities of 1 queries for 2 ids"):
        evaluate.score(block([1.0, 0.5]), [0, 1], [0, 1], [0, 0], [1, 1])
    with pytest.raises(ValueError, match="2 queries from 0 after 0 of 1; expected all, in order"):
        evaluate.score(block([1.0], [0.5]), [0], [0], [0], [1])
    with pytest.raises(ValueError, match="similarities of query 0 are not finite"):
        evaluate.score(block([np.nan, 0.5]), [0], [0, 1], [0], [1, 1])
    assert evaluate.evaluate(torch.eye(2, requires_grad=True), torch.eye(2), [0, 1], [0, 1], [0, 0], [1, 1])["mAP"] == 1
    with pytest.raises(ValueError, match=r"query features: expected \(n, d\) with n of 1 or more"):
        evaluate.evaluate(np.zeros((0, 2)), [[1.0, 0]], [], [0], [], [0])
    with pytest.raises(ValueError, match="query features have 3 dimensions, gallery features 2"):
        evaluate.evaluate([[1.0, 0, 0]], [[1.0, 0]], [0], [0], [0], [1])
    with pytest.raises(ValueError, match="2 gallery ids for 1 gallery features"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0]], [0], [0, 0], [0], [1, 1])
    with pytest.raises(ValueError, match="gallery: expected one id and one camera for each image"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0]], [0], [0], [0], [1, 1])
    with pytest.raises(ValueError, match=r"gallery features: 1 of 2 rows are not finite: \[1\]"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0], [np.nan, 0]], [0], [0, 0], [0], [1, 1])


def test_split_takes_two_queries_of_each_person_and_video(walkers):
    t = data.read_tracklets(walkers / "test")
    ids = data.read_labels(walkers / "test.json", t)
    benchmark = evaluate.label_tracklets(t, ids)
    queries = benchmark.query
    assert (ids[queries] >= 0).all() and len(benchmark.gallery) == len(t)
    _, counts = np.unique(np.stack([ids[queries], t.video[queries]]), axis=1, return_counts=True)
    assert set(counts) <= {1, 2} and (counts == 2).mean() > 0.9
    perfect = np.eye(ids.max() + 2, dtype=np.float32)[ids]  # -1 takes the last row
    assert evaluate.evaluate_features(torch.from_numpy(perfect), benchmark)["mAP"] == pytest.approx(1)
    everything_alike = torch.ones(len(t), 2)  # images of nobody take part, as distractors
    ap = evaluate.evaluate_features(everything_alike, benchmark)["ap"]
    q = queries[0]
    own = (ids == ids[q]) & (t.video == t.video[q])
    assert (ids < 0).any() and ap[0] == pytest.approx(((ids == ids[q]) & ~own).sum() / (~own).sum())


# ---------------------------------------------------------------- re-ranking


def dense_rerank(query, gallery, k1, k2, lambda_value):
    """Re-ranking as the paper defines it, set by set, on dense matrices (Zhong et al., CVPR 2017, sections 3.2 to 3.4)."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = ((x[:, None] - x) ** 2).sum(-1)
    distance /= distance.max(1, keepdims=True)
    order = np.argsort(distance, axis=1, kind="stable")
    reciprocal = lambda i, k: {j for j in order[i, : k + 1] if i in order[j, : k + 1]}
    sets = np.zeros_like(distance)
    for i in range(len(x)):
        wide = reciprocal(i, k1)
        members = set(wide)
        for j in wide:
            narrow = reciprocal(j, int(np.around(k1 / 2)))
            if len(wide & narrow) > 2 / 3 * len(narrow):
                members |= narrow
        members = sorted(members)
        weight = np.exp(-distance[i, members])
        sets[i, members] = weight / weight.sum()
    sets = np.stack([sets[order[i, :k2]].mean(0) for i in range(len(x))])
    shared = np.minimum(sets[: len(query), None], sets[None]).sum(-1)
    jaccard = 1 - shared / np.maximum(sets[: len(query), None], sets[None]).sum(-1)
    return ((1 - lambda_value) * jaccard + lambda_value * distance[: len(query)])[:, len(query) :]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k1, k2, lambda_value", [(20, 6, 0.3), (7, 1, 0.5), (3, 9, 0.0), (200, 6, 0.3)])
def test_reranking_equals_the_dense_definition(seed, k1, k2, lambda_value):
    random = np.random.default_rng(seed)
    centers = random.standard_normal((9, 12))
    draw = lambda n: (centers[random.integers(0, 9, n)] + 0.7 * random.standard_normal((n, 12))).astype(np.float32)
    query, gallery = draw(15), 3 * draw(90)
    got = evaluate.rerank(query, gallery, k1, k2, lambda_value)
    assert got.shape == (15, 90)
    np.testing.assert_allclose(got, dense_rerank(query, gallery, k1, k2, lambda_value), atol=1e-6)
    blocks = list(evaluate.reranked(query, gallery, k1, k2, lambda_value, most=4 * 90))
    assert [first for first, _ in blocks] == [0, 4, 8, 12]
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), got, atol=1e-6)


def test_reranking_pulls_in_what_neighbours_agree_on():
    """An image as far from the query as a wrong one, but among the query's crowd, comes first after re-ranking."""
    angle = np.deg2rad([0, 3, 6, 9, 12, 15, -15, -16, -17, -18, -19, -20, -21])
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    right, wrong = 4, 5  # 15 degrees to both sides; the wrong one has a crowd of its own
    plain = points[:1] @ points[1:].T
    assert plain[0, right] == pytest.approx(plain[0, wrong])
    got = evaluate.rerank(points[:1], points[1:], k1=6, k2=1)
    assert got[0, right] < got[0, wrong] - 0.1


@pytest.mark.parametrize("n, k, block", [(50, 7, 16), (50, 50, 16), (33, 5, 32), (40, 3, 1024), (5, 2, 1)])
def test_nearest_neighbours_are_those_of_all_similarities(n, k, block):
    x = torch.nn.functional.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(n)), dim=1)
    index, largest = evaluate.nearest_neighbours(x, k, block)
    similarity = x @ x.T
    torch.testing.assert_close(torch.from_numpy(largest), 1 - similarity.amin(1))
    similarity.fill_diagonal_(2)
    assert (index == similarity.topk(k, 1).indices.numpy()).all() and (index[:, 0] == np.arange(n)).all()


def test_an_image_is_its_own_nearest_among_duplicates():
    index, _ = evaluate.nearest_neighbours(torch.ones(30, 3) / 3**0.5, 4, block=8)
    assert (index[:, 0] == np.arange(30)).all() and all(len(set(row)) == 4 for row in index.tolist())


def test_reranking_of_images_that_are_all_alike():
    got = evaluate.rerank(np.tile([[0.3, 0.4, 0.5]], (3, 1)), np.tile([[0.3, 0.4, 0.5]], (40, 1)), k1=5)
    assert np.isfinite(got).all()


def test_reranking_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="k1 0, k2 6: expected 1 or more"):
        evaluate.rerank(np.ones((2, 3)), np.ones((4, 3)), k1=0)
    with pytest.raises(ValueError, match=r"query features: 1 of 2 rows are not finite: \[1\]"):
        evaluate.rerank([[1.0, 0], [np.inf, 0]], np.ones((4, 2)))


# ---------------------------------------------------------------- benchmarks


def write_image(file, colour=(128, 128, 128)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 16, 8).contiguous()
    file.write_bytes(encode_jpeg(image, quality=95).numpy().tobytes())


MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000301_01.jpg", "0007_c3s3_077419_03.jpg"],
    "query": ["0001_c1s1_001051_00.jpg", "0001_c2s1_000301_00.jpg", "0003_c1s6_015971_00.jpg"],
    "bounding_box_test": ["-1_c1s1_000401_03.jpg", "-1_c6s4_002202_06.jpg", "0000_c1s1_000151_01.jpg", "0001_c1s1_001051_03.jpg",
                          "0001_c2s1_000301_02.jpg", "0003_c3s3_064744_04.jpg", "0003_c4s6_015641_01.jpg.jpg"],
}


@pytest.fixture
def market(tmp_path):
    root = tmp_path / "Market-1501-v15.09.15"
    for folder, names in MARKET.items():
        for name in names:
            write_image(root / folder / name)
        (root / folder / "Thumbs.db").write_bytes(b"windows was here")
    (root / "gt_query").mkdir()
    (root / "readme.txt").write_text("")
    return root


def test_market_1501(market, capsys):
    benchmark = evaluate.read_benchmark(market)
    assert capsys.readouterr().out.splitlines() == [
        "train:         3 images of     2 identities, 3 cameras",
        "query:         3 images of     2 identities, 2 cameras",
        "gallery:       5 images of     2 identities, 4 cameras; 1 of them distractors; 2 junk left out",
        f"Market-1501, {market}: 3 queries and a gallery of 5, where the whole has 3,368 and 15,913: half a download, or a part of it?",
    ]
    assert benchmark.ids.tolist() == [1, 1, 3, 0, 1, 1, 3, 3] and benchmark.cams.tolist() == [1, 2, 1, 1, 1, 2, 3, 4]
    assert benchmark.query.tolist() == [0, 1, 2] and benchmark.gallery.tolist() == [3, 4, 5, 6, 7]
    assert [benchmark.images.path(i) for i in (0, 7)] == ["query/0001_c1s1_001051_00.jpg", "bounding_box_test/0003_c4s6_015641_01.jpg.jpg"]
    assert evaluate.read_benchmark(market.parent).ids.tolist() == benchmark.ids.tolist()  # the folder above will do


def test_dukes_names(tmp_path, capsys):
    for folder, names in {"bounding_box_train": ["0001_c2_f0046182.jpg"], "query": ["0005_c2_f0046985.jpg"],
                          "bounding_box_test": ["0002_c1_f0044158.jpg", "0005_c8_f0079932.jpg"]}.items():
        for name in names:
            write_image(tmp_path / "DukeMTMC-reID" / folder / name)
    benchmark = evaluate.read_benchmark(tmp_path / "DukeMTMC-reID")
    assert benchmark.ids.tolist() == [5, 2, 5] and benchmark.cams.tolist() == [2, 1, 8]
    assert "gallery:       2 images of     2 identities, 2 cameras\n" in capsys.readouterr().out


def test_several_benchmarks_or_junk_alone_are_refused(market):
    (market.parent / "MSMT17_V1").mkdir()
    with pytest.raises(ValueError, match="holds Market-1501-v15.09.15, MSMT17_V1; give one of them"):
        evaluate.read_benchmark(market.parent)
    for file in (market / "bounding_box_test").iterdir():
        if not file.name.startswith("-1"):
            file.unlink()
    with pytest.raises(ValueError, match=f"{market}: no images but junk in the gallery"):
        evaluate.read_benchmark(market)


def test_files_of_other_kinds_are_passed_over(market):
    before = evaluate.read_benchmark(market, say=lambda text: None)
    (market / "query" / "._0001_c1s1_001051_00.jpg").write_bytes(b"macOS was here")
    assert evaluate.read_benchmark(market, say=lambda text: None).query.tolist() == before.query.tolist()


def test_half_of_market_is_refused(market):
    (market / "query" / "0001_c1s1_001051_00.jpg").rename(market / "query" / "stranger.jpg")
    with pytest.raises(ValueError, match="query: expected names with identity and camera .*, got stranger.jpg"):
        evaluate.read_benchmark(market)
    for file in (market / "query").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=f"{market}: no images but junk in the query"):
        evaluate.read_benchmark(market)
    (market / "query").rmdir()
    with pytest.raises(ValueError, match="has bounding_box_test but no query: half a download"):
        evaluate.read_benchmark(market)
    with pytest.raises(ValueError, match="no such folder"):
        evaluate.read_benchmark(market / "nothing")
    with pytest.raises(ValueError, match="expected Market-1501 or DukeMTMC-reID"):
        evaluate.read_benchmark(market / "gt_query")


MSMT17 = {
    "train": ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_004_14_0302noon_0002_2.jpg 1"],
    "val": ["0000/0000_007_03_0303morning_0020_1.jpg 0"],
    "query": ["0000/0000_013_01_0303morning_0020_1_ex.jpg 0", "0001/0001_004_15_0302noon_0002_2.jpg 1"],
    "gallery": ["0000/0000_000_05_0303morning_0008_0.jpg 0", "0000/0000_001_01_0303morning_0010_0.jpg 0", "0001/0001_022_09_0302noon_1042_1.jpg 1"],
}


def write_msmt17(root, train, test, end="\n"):
    for split, lines in MSMT17.items():
        for line in lines:
            write_image(root / (train if split in ("train", "val") else test) / line.split()[0])
        root.joinpath(f"list_{split}.txt").write_text(end.join(lines) + end)


@pytest.mark.parametrize("train, test, end", [("train", "test", "\n"), ("mask_train_v2", "mask_test_v2", "\r\n")])
def test_msmt17_in_both_layouts(tmp_path, capsys, train, test, end):
    root = tmp_path / ("MSMT17_V1" if test == "test" else "MSMT17_V2")
    root.mkdir()
    write_msmt17(root, train, test, end)
    benchmark = evaluate.read_benchmark(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "train:         2 images of     2 identities, 2 cameras",
        "val:           1 images of     1 identities, 1 cameras",
        "query:         2 images of     2 identities, 2 cameras",
        "gallery:       3 images of     2 identities, 3 cameras",
        f"MSMT17, {root}: 2 queries and a gallery of 3, where the whole has 11,659 and 82,161: half a download, or a part of it?",
    ]
    assert benchmark.ids.tolist() == [0, 1, 0, 0, 1] and benchmark.cams.tolist() == [1, 15, 5, 1, 9]
    assert (root / benchmark.images.path(4)).is_file() and benchmark.images.path(4) == f"{test}/0001/0001_022_09_0302noon_1042_1.jpg"
    os.unlink(root / benchmark.images.path(4))
    with pytest.raises(ValueError, match=f"1 of 5 files are missing .*{test}/0001/0001_022_09_0302noon_1042_1.jpg"):
        evaluate.read_benchmark(root)


def test_lists_of_msmt17_that_are_none(tmp_path):
    write_msmt17(tmp_path, "train", "test")
    with open(tmp_path / "list_query.txt", "a") as file:
        file.write("0001/0001_0\n")
    with pytest.raises(ValueError, match=r"list_query.txt: expected a path such as 0000/0000_000_01_0303morning_0015_0.jpg, a space, .* got 0001/0001_0$"):
        evaluate.read_benchmark(tmp_path)
    (tmp_path / "list_query.txt").write_text("../../etc/0001_004_15_0302noon_0002_2.jpg 1\n")
    with pytest.raises(ValueError, match="1 of 4 files are missing or leave it: .*/etc/0001_004_15"):
        evaluate.read_benchmark(tmp_path)
    (tmp_path / "list_query.txt").unlink()
    with pytest.raises(ValueError, match="has list_gallery.txt but no list_query.txt: half"):
        evaluate.read_benchmark(tmp_path)


@pytest.fixture
def mars(tmp_path):
    """Seven tracklets of one to three images: junk, a distractor, and two people under two cameras each, one of them twice."""
    root, names, tracks = tmp_path / "MARS", [], []
    for person, camera, number, images in (("00-1", 1, 1, 2), ("0000", 3, 1, 1), ("0002", 1, 1, 3), ("0002", 1, 2, 1), ("0002", 2, 1, 2), ("0004", 5, 1, 2), ("0004", 6, 1, 1)):
        tracks.append((len(names) + 1, len(names) + images, int(person) if person != "00-1" else -1, camera))
        names += [f"{person}C{camera}T{number:04d}F{frame:03d}.jpg" for frame in range(1, images + 1)]
    for i, name in enumerate(names):
        write_image(root / "bbox_test" / name[:4] / name, (20 * i, 255 - 20 * i, 100))
    (root / "info").mkdir()
    (root / "info" / "test_name.txt").write_text("\n".join(names) + "\n")
    scipy.io.savemat(root / "info" / "tracks_test_info.mat", {"track_test_info": np.array(tracks, np.int32)})
    scipy.io.savemat(root / "info" / "tracks_train_info.mat", {"track_train_info": np.array([[1, 16, 1, 1], [17, 20, 1, 2]], np.int32)})
    scipy.io.savemat(root / "info" / "query_IDX.mat", {"query_IDX": np.array([[3, 6]], np.int32)})
    return root


def test_mars_by_tracklet(mars, capsys):
    benchmark = evaluate.read_benchmark(mars)
    assert capsys.readouterr().out.splitlines() == [
        "train:         2 tracklets of     1 identities, 2 cameras; 20 images",
        "query:         2 tracklets of     2 identities, 2 cameras; 5 images",
        "gallery:       6 tracklets of     2 identities, 5 cameras; 1 of them distractors; 10 images; 1 junk left out",
        f"MARS, {mars}: 2 queries and a gallery of 6, where the whole has 1,980 and 11,310: half a download, or a part of it?",
    ]
    assert benchmark.ids.tolist() == [0, 2, 2, 2, 4, 4] and benchmark.cams.tolist() == [3, 1, 1, 2, 5, 6]
    assert benchmark.query.tolist() == [1, 4] and benchmark.gallery.tolist() == [0, 1, 2, 3, 4, 5]
    assert benchmark.item.tolist() == [0, 1, 1, 1, 2, 3, 3, 4, 4, 5]
    assert benchmark.images.path(1) == "bbox_test/0002/0002C1T0001F001.jpg"
    network = Colours()
    features, _ = model.extract(network, benchmark.images, (16, 8), torch.device("cpu"), batch=4, item=benchmark.item)
    single, _ = model.extract(network, benchmark.images, (16, 8), torch.device("cpu"), batch=4)
    mean = torch.nn.functional.normalize(single[1:4].mean(0), dim=0)
    torch.testing.assert_close(features[1], mean)
    assert features.shape == (6, 3) and evaluate.evaluate_features(features, benchmark)["queries"] == 2


def test_junk_queries_of_mars_are_left_out_and_broken_images_counted(mars):
    scipy.io.savemat(mars / "info" / "query_IDX.mat", {"query_IDX": np.array([[1, 3]])})
    (mars / "bbox_test" / "0002" / "0002C1T0001F002.jpg").write_bytes(b"")
    benchmark = evaluate.read_benchmark(mars, say=lambda text: None)
    assert benchmark.query.tolist() == [1]
    features, readable = model.extract(Colours(), benchmark.images, (16, 8), torch.device("cpu"), item=benchmark.item)
    assert readable.tolist() == [True] * 2 + [False] + [True] * 7 and features.any(1).all()


def test_half_of_mars_is_refused(mars):
    next((mars / "bbox_test" / "0004").iterdir()).unlink()
    with pytest.raises(ValueError, match="1 of 10 files are missing .*bbox_test/0004/0004C"):
        evaluate.read_benchmark(mars)
    scipy.io.savemat(mars / "info" / "tracks_test_info.mat", {"track_test_info": np.ones((4, 3))})
    with pytest.raises(ValueError, match=r"tracks_test_info.mat: expected a .mat file with one table of numbers in 4 columns; .*size 12"):
        evaluate.read_benchmark(mars)
    scipy.io.savemat(mars / "info" / "tracks_test_info.mat", {"track_test_info": np.array([[1, 1, 2, 1]] * 7)})
    scipy.io.savemat(mars / "info" / "query_IDX.mat", {"query_IDX": np.array([[3, 8]])})
    with pytest.raises(ValueError, match="query_IDX.mat: expected numbers from 1 to 7"):
        evaluate.read_benchmark(mars)
    (mars / "info" / "query_IDX.mat").write_bytes(b"MATLAB 5.0 MAT-file, but not really")
    with pytest.raises(ValueError, match="query_IDX.mat: expected a .mat file with one table"):
        evaluate.read_benchmark(mars)
    (mars / "info" / "test_name.txt").write_text("0002C1T0001F001.jpg\n")
    (mars / "info" / "query_IDX.mat").unlink()
    with pytest.raises(ValueError, match="but no info/query_IDX.mat: half"):
        evaluate.read_benchmark(mars)


# ---------------------------------------------------------------- pictures, files


def test_tracklets_with_a_test_folder_alone(walkers, tmp_path, capsys):
    import shutil

    shutil.copytree(walkers / "test", tmp_path / "test")
    shutil.copy(walkers / "test.json", tmp_path)
    benchmark = evaluate.read_benchmark(tmp_path)
    people = len(np.unique(benchmark.ids[benchmark.query]))
    assert f"images of {people:>5,} identities, " in capsys.readouterr().out.splitlines()[2]  # the gallery: nobody is no identity
    assert benchmark.ids.tolist() == evaluate.read_benchmark(walkers, say=lambda text: None).ids.tolist()


class Colours(torch.nn.Module):
    """A network that answers the mean colour."""

    embed_dim = 3

    def forward(self, x):
        return x.mean((2, 3)) + 5


def test_ranked_lists_leave_out_what_the_protocol_leaves_out(market, tmp_path):
    """Colours tell the images apart in the picture: query 0, and the order in which the gallery is shown."""
    for i, (folder, names) in enumerate(MARKET.items()):
        for j, name in enumerate(names):
            write_image(market / folder / name, (30 * j, 60 * i, 200))
    benchmark = evaluate.read_benchmark(market, say=lambda text: None)
    features = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0.3], [1, 0], [1, 0.2], [1, 0.1], [1, 0.4]]), dim=1)
    evaluate.show_retrieval(tmp_path / "sheet.png", benchmark, features, np.array([0]), canvas=(16, 8))
    sheet = read_image(str(tmp_path / "sheet.png"))
    cells = [sheet[:, 2 : 2 + 16, 2 + 10 * i : 10 + 10 * i] for i in range(11)]
    reds = [int(cell[0, 8, 4]) for cell in cells]
    # gallery items 4 (own camera, left out), then 6, 5, 3, 7 by similarity
    assert np.allclose(reds[:5], [0, 30 * 5, 30 * 4, 30 * 2, 30 * 6], atol=3) and max(reds[5:]) <= 3
    frame = lambda cell: cell[:, 0, 4].tolist()
    assert frame(cells[0]) == [255, 255, 255] and frame(cells[2])[1] > 150 > frame(cells[1])[1]  # item 5 is the right one
    assert [file.name for file in tmp_path.glob("*sheet*")] == ["sheet.png"]


def test_exported_features_are_what_was_ranked(mars, tmp_path):
    benchmark = evaluate.read_benchmark(mars, say=lambda text: None)
    features = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    evaluate.export(tmp_path / "out.npz", features, benchmark)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as f:
        q, g = f["query"], f["gallery"]
        again = evaluate.evaluate(f["features"][q], f["features"][g], f["ids"][q], f["ids"][g], f["cameras"][q], f["cameras"][g])
        assert again["mAP"] == evaluate.evaluate_features(features, benchmark)["mAP"]
        assert f["paths"][1] == "bbox_test/0002/0002C1T0001F001.jpg" and len(f["paths"]) == 6


def test_unreadable_items_are_left_out_and_counted(market):
    benchmark = evaluate.read_benchmark(market, say=lambda text: None)
    features = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    features[1] = features[5] = 0  # a query, and the only match of query 0
    result = evaluate.evaluate_features(features, benchmark)
    assert result["queries"] == 1 and result["left_out"] == 2 and np.isnan(result["ap"][:2]).all()
    features[:3] = 0
    with pytest.raises(ValueError, match="the query holds no image that can be read"):
        evaluate.evaluate_features(features, benchmark)
