"""evaluate.py: ranking and re-ranking against their literal definitions, the benchmarks' readers on
tiny trees of the published layouts, features on one process and two, pictures, the program."""
import shutil
import sys

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from conftest import full_disk
from torchvision.io import encode_jpeg

import data
import evaluate
import model


def draw(seed, n):
    """Features (n, 8) around the centers of nine people."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(0).standard_normal((9, 8))
    features = centers[random.integers(0, 9, n)] + 0.7 * random.standard_normal((n, 8))
    return features.astype(np.float32)


# ---------------------------------------------------------------- ranking
def literal_score(rows, query_ids, gallery_ids, query_cams, gallery_cams):
    """The books' definition: sort the gallery, wrong images first among equals, and walk down."""
    ap = []
    inp = []
    first_ranks = []
    for row, person, camera in zip(rows, query_ids, query_cams):
        valid = (gallery_ids >= 0) & ((gallery_ids != person) | (gallery_cams != camera))
        right = gallery_ids == person
        order = sorted(np.flatnonzero(valid), key=lambda g: (-row[g], right[g]))
        ranks = [rank for rank, g in enumerate(order, start=1) if right[g]]
        if not ranks or person < 0:
            continue
        ap.append(np.mean([hit / rank for hit, rank in enumerate(ranks, start=1)]))
        inp.append(len(ranks) / ranks[-1])
        # the first rank in words: images strictly nearer than the best match, wrong ones as near, 1
        best = row[valid & right].max()
        nearer = np.sum(row[valid] > best)
        first_ranks.append(nearer + np.sum(row[valid & ~right] == best) + 1)
        assert ranks[0] == first_ranks[-1]
    cmc = [np.mean(np.array(first_ranks) <= k) for k in range(1, len(gallery_ids) + 1)]
    return {"mAP": np.mean(ap), "mINP": np.mean(inp), "cmc": cmc, "queries": len(ap)}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("levels", [2, 6, 10**9])
def test_score_equals_the_literal_definition_with_many_ties_and_none(seed, levels):
    random = np.random.default_rng(seed)
    query_ids = random.integers(-1, 9, 12)
    gallery_ids = random.integers(-1, 9, 80)
    protocol = query_ids, gallery_ids, random.integers(0, 3, 12), random.integers(0, 3, 80)
    rows = random.integers(0, levels, (12, 80))
    want = literal_score(rows, *protocol)
    for numbers in (rows, rows / 7, rows.astype(np.uint32)):
        got = evaluate.score(numbers, *protocol)
        for key in want:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_of_right_images_do_not_change_the_first_rank(seed):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 9, 80)
    row = random.integers(0, 5, (1, 80))
    one = evaluate.score(row, [0], ids, [0], np.ones(80))
    twice = np.concatenate([np.arange(80), np.flatnonzero(ids == 0)])
    two = evaluate.score(row[:, twice], [0], ids[twice], [0], np.ones(len(twice)))
    np.testing.assert_array_equal(two["cmc"][:80], one["cmc"])


def test_two_right_images_equally_near_are_a_perfect_answer():
    got = evaluate.score([np.array([5, 5, 1, 1])], [7], [7, 7, 1, 2], [0], [1, 1, 1, 1])
    assert got["mAP"] == got["mINP"] == 1 and got["cmc"].tolist() == [1, 1, 1, 1]


def test_by_hand():
    """Gallery by similarity: wrong, right, the query's own camera (left out), right, wrong."""
    angle = np.deg2rad([10, 20, 25, 30, 40])
    gallery = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    got = evaluate.evaluate([[0.5, 0]], gallery, [1], [2, 1, 1, 1, 3], [0], [1, 1, 0, 2, 1])
    assert got["mAP"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert got["mINP"] == pytest.approx(2 / 3)
    assert got["cmc"].tolist() == [0, 1, 1, 1, 1] and got["queries"] == 1


def test_similarities_are_cosines_in_blocks_of_any_size():
    query = draw(1, 12)
    gallery = draw(2, 30)
    want = F.cosine_similarity(torch.tensor(query)[:, None], torch.tensor(gallery), dim=2)
    for block in (1, 5, 12, 100):
        got = np.stack(list(evaluate.similarities(query, torch.tensor(gallery), block)))
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_lonely_queries_are_not_counted_and_junk_is_as_if_not_there():
    got = evaluate.evaluate(np.eye(3), np.eye(3), [0, 1, -1], [0, 2, -1], [0, 0, 0], [1, 1, 1])
    assert got["queries"] == 1 and got["mAP"] == 1
    assert np.isnan(got["ap"]).tolist() == [False, True, True]
    nearest_first = np.array([[0.9, 0.8, 0.7]])
    for first, want in ((-1, 1 / 2), (0, 1 / 3)):  # junk, then a distractor
        assert evaluate.score(nearest_first, [5], [first, 4, 5], [0], [1, 1, 1])["mAP"] == want


def test_identities_may_be_tensors():
    x, ids = torch.eye(3), torch.arange(3)
    assert evaluate.evaluate(x, x, ids, ids, torch.zeros(3), torch.ones(3))["mAP"] == 1


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="none of 1 queries has a match"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0]], [0], [0], [0], [0])
    for place in range(4):  # right, wrong, the query's own camera, junk
        rows = np.full((2, 4), 0.5)
        rows[1, place] = np.nan
        with pytest.raises(ValueError, match="similarities of query 1 are not finite"):
            evaluate.score(rows, [0, 0], [0, 1, 0, -1], [0, 0], [1, 1, 0, 1])


# ---------------------------------------------------------------- re-ranking
def literal_rerank(query, gallery, k1, k2, lambda_value):
    """Zhong et al., sections 3.2 to 3.5, set by set on dense matrices."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = ((x[:, None] - x) ** 2).sum(2)
    distance /= distance.max(1, keepdims=True)
    order = np.argsort(distance, axis=1)

    def reciprocal(p, k):
        return {q for q in order[p, : k + 1] if p in order[q, : k + 1]}

    sets = np.zeros_like(distance)
    for p in range(len(x)):
        wide = reciprocal(p, k1)
        members = set(wide)
        for q in wide:
            narrow = reciprocal(q, round(k1 / 2))
            if len(wide & narrow) > 2 / 3 * len(narrow):
                members |= narrow
        for q in members:
            sets[p, q] = np.exp(-distance[p, q])
        sets[p] /= sets[p].sum()
    sets = np.stack([sets[order[p, :k2]].mean(0) for p in range(len(x))])
    Q = len(query)
    minima = np.minimum(sets[:Q, None], sets[Q:]).sum(2)
    maxima = np.maximum(sets[:Q, None], sets[Q:]).sum(2)
    return (1 - lambda_value) * (1 - minima / maxima) + lambda_value * distance[:Q, Q:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k1, k2, share", [(20, 6, 0.3), (7, 1, 0.5), (3, 9, 0.0), (200, 6, 0.3)])
def test_reranking_equals_the_dense_definition(seed, k1, k2, share):
    query = draw(seed, 12)
    gallery = 3 * draw(seed + 10, 50)
    want = literal_rerank(query, gallery, k1, k2, share)
    got = evaluate.rerank(query, gallery, k1, k2, share)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_nearest_neighbours_in_blocks_begin_with_the_image_itself_among_duplicates():
    x = evaluate.unit(draw(0, 50))
    nearest, largest = evaluate.nearest_neighbours(x, 7, block=16)
    np.testing.assert_array_equal(nearest, (x @ x.T).topk(7).indices)
    np.testing.assert_allclose(largest, 1 - (x @ x.T).amin(1), atol=1e-6)
    nearest, _ = evaluate.nearest_neighbours(torch.ones(30, 1), 4, block=8)
    assert nearest[:, 0].tolist() == list(range(30))
    assert np.isfinite(evaluate.rerank(np.ones((3, 1)), np.ones((40, 1)))).all()


# ---------------------------------------------------------------- features
class Colours(torch.nn.Module):
    """A network that answers the mean colour, with a batch norm that shows the training mode."""

    embed_dim = 3

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, images):
        return self.norm(images.mean((2, 3)))


def write_image(file, colour=(128, 128, 128)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, 16, 8)
    file.write_bytes(encode_jpeg(image, quality=95).numpy().tobytes())


@pytest.fixture
def seven(tmp_path):
    """An index of seven images of one tracklet, in seven colours."""
    for i in range(7):
        file = tmp_path / "seven/video" / f"000000_{i:07d}_00.jpg"
        write_image(file, (30 * i, 100, 250 - 30 * i))
    return data.read_tracklets(tmp_path / "seven")


def test_features_do_not_depend_on_batches(seven, tmp_path):
    images = torch.stack([image for image, _ in data.Images(seven, (16, 8))]) / 255
    want = F.normalize(Colours().eval()(model.normalize(images)), dim=1).detach()
    for batch in (1, 2, 7, 100):
        got = evaluate.extract(Colours(), seven, (16, 8), "cpu", batch=batch)
        np.testing.assert_allclose(got, want, atol=1e-6)
    mapped = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float16, (7, 3))
    assert evaluate.extract(Colours(), seven, (16, 8), "cpu", batch=2, out=mapped) is mapped
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), want, atol=1e-3)


def extract_in_a_process(rank, tracklets, folder):
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    features = evaluate.extract(Colours(), tracklets, (16, 8), "cpu", batch=2)
    torch.distributed.destroy_process_group()
    if rank == 0:
        np.save(folder / "features.npy", features)
    else:
        assert features is None


def test_two_processes_extract_what_one_does(seven, tmp_path):
    torch.multiprocessing.spawn(extract_in_a_process, (seven, tmp_path), nprocs=2)
    want = evaluate.extract(Colours(), seven, (16, 8), "cpu", batch=2)
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), want, atol=1e-6)


# ---------------------------------------------------------------- benchmarks
def write_market(root):
    names = """query/0001_c1s1_001051_00 query/0003_c2s1_000301_00
        bounding_box_test/-1_c1s1_000401_03 bounding_box_test/0000_c1s1_000151_01
        bounding_box_test/0001_c1s1_001051_03 bounding_box_test/0001_c2s1_000301_02
        bounding_box_test/0003_c13s3_064744_04"""
    for i, name in enumerate(names.split()):
        write_image(root / f"{name}.jpg", (30 * i, 100, 200))
    for other in "Thumbs.db", "._0001_c1s1_001051_00.jpg":
        (root / "query" / other).write_bytes(b"")


def test_market_1501(tmp_path):
    write_market(tmp_path)
    benchmark = evaluate.read_benchmark(tmp_path)
    assert benchmark.ids.tolist() == [1, 3, 0, 1, 1, 3]  # without junk
    assert benchmark.cams.tolist() == [1, 2, 1, 1, 2, 13]
    assert benchmark.query.tolist() == [0, 1] and benchmark.gallery.tolist() == [2, 3, 4, 5]
    assert benchmark.images.path(5) == "bounding_box_test/0003_c13s3_064744_04.jpg"
    assert str(benchmark).endswith("\ngallery: 4 images, 3 identities, 3 cameras")
    (tmp_path / benchmark.images.path(0)).write_bytes(b"no image")  # nobody's takes its place
    with pytest.raises(ValueError, match="query/0001_c1s1_001051_00.jpg: cannot be read"):
        data.Images(benchmark.images, (16, 8))[0]


@pytest.mark.parametrize("folder", ["test", "mask_test_v2"])
def test_msmt17_in_both_releases(tmp_path, folder):
    query = "0000/0000_013_01_0303morning_0020_1_ex.jpg 0\n"
    gallery = "0000/0000_000_05_0303morning_0008_0.jpg 0\n"
    gallery += "0001/0001_022_09_0302noon_1042_1.jpg 1\r\n"
    for path in (query + gallery).split()[::2]:
        write_image(tmp_path / folder / path)
    (tmp_path / "list_query.txt").write_text(f"\ufeff{query}")
    (tmp_path / "list_gallery.txt").write_text(f"\n{gallery}\n")
    benchmark = evaluate.read_benchmark(tmp_path)
    assert benchmark.ids.tolist() == [0, 0, 1] and benchmark.cams.tolist() == [1, 5, 9]
    assert benchmark.query.tolist() == [0] and benchmark.gallery.tolist() == [1, 2]
    assert benchmark.images.path(2) == f"{folder}/0001/0001_022_09_0302noon_1042_1.jpg"


def write_mars(root):
    """Five tracklets of one to three images: junk, a distractor, and one person thrice."""
    names = """00-1C1T0001F001 00-1C1T0001F002 0000C3T0001F001 0002C1T0001F001 0002C1T0001F002
        0002C1T0001F003 0002C1T0002F001 0002C2T0001F001 0002C2T0001F002"""
    table = [(1, 2, -1, 1), (3, 3, 0, 3), (4, 6, 2, 1), (7, 7, 2, 1), (8, 9, 2, 2)]
    for name in names.split():
        write_image(root / f"bbox_test/{name[:4]}/{name}.jpg")
    (root / "info").mkdir()
    (root / "info/test_name.txt").write_text("".join(f"{name}.jpg\n" for name in names.split()))
    scipy.io.savemat(root / "info/tracks_test_info.mat", {"track_test_info": np.array(table)})
    scipy.io.savemat(root / "info/query_IDX.mat", {"query_IDX": np.array([[3]])})


def test_mars_ranks_tracklets_by_their_mean_feature(tmp_path):
    write_mars(tmp_path)
    benchmark = evaluate.read_benchmark(tmp_path)
    assert benchmark.ids.tolist() == [2, 0, 2, 2] and benchmark.cams.tolist() == [1, 3, 1, 2]
    assert benchmark.query.tolist() == [0] and benchmark.gallery.tolist() == [0, 1, 2, 3]
    assert benchmark.images.path(3) == "bbox_test/0000/0000C3T0001F001.jpg"
    features = np.array([[1, 0], [1, 0], [0, 1], [3, 2], [0, 1], [1, 0], [0, 1]], np.float32)
    # the query's mean is (2, 1); the distractor's (3, 2) is nearer than its match's, (1, 1)
    result = evaluate.evaluate_features(features, benchmark)
    assert (result["mAP"], result["R1"], result["R5"], result["queries"]) == (1 / 2, 0, 1, 1)


def test_a_line_that_is_wrong_is_named(tmp_path):
    write_mars(tmp_path)
    file = tmp_path / "info/test_name.txt"
    file.write_text("".join(f"{line}\n" for line in file.read_text().split()[:8]))
    with pytest.raises(ValueError, match="test_name.txt: has no lines 8 to 9"):
        evaluate.read_benchmark(tmp_path)
    table = tmp_path / "info/tracks_test_info.mat"
    scipy.io.savemat(table, {"track_test_info": np.ones((4, 5))})
    with pytest.raises(ValueError, match="tracks_test_info.mat: has 5 columns, not 4"):
        evaluate.read_benchmark(tmp_path)
    for content in ({"other": [[1]]}, {"track_test_info": [[1, 1, 2.5, 1]]}):
        scipy.io.savemat(table, content)
        with pytest.raises(ValueError, match="info.mat: expected whole numbers as track_test_info"):
            evaluate.read_benchmark(tmp_path)
    table.write_bytes(b"no matrix")
    with pytest.raises(ValueError, match="info.mat: expected whole numbers as track_test_info"):
        evaluate.read_benchmark(tmp_path)
    for name in ("list_query.txt", "list_gallery.txt"):
        (tmp_path / name).write_text("\n0000/0000_013_01_0303morning_0020_1.jpg\n")
    with pytest.raises(ValueError, match="list_query.txt, line 2: expected a path and an identity"):
        evaluate.read_benchmark(tmp_path)


@pytest.mark.parametrize("write, missing", [
    (write_market, "bounding_box_test"),
    (write_mars, "info/query_IDX.mat"),
    (write_mars, "info/test_name.txt"),
    (write_mars, "bbox_test/0002/0002C1T0002F001.jpg"),
])
def test_a_file_that_is_missing_is_named(tmp_path, write, missing):
    write(tmp_path)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"{path}: is missing"):
        evaluate.read_benchmark(tmp_path)


def test_what_is_no_benchmark_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: expected a folder with query/"):
        evaluate.read_benchmark(tmp_path)
    write_image(tmp_path / f"query/{2**63}_c1.jpg")
    write_image(tmp_path / "bounding_box_test/-1_c1.jpg")
    with pytest.raises(ValueError, match="has 1 queries and 0 others to find"):
        evaluate.read_benchmark(tmp_path)
    write_image(tmp_path / "bounding_box_test/1_c2.JPG")
    with pytest.raises(ValueError, match="identities and cameras below 2..63: 9223372036854775808"):
        evaluate.read_benchmark(tmp_path)
    write_image(tmp_path / "query/stranger.jpg")
    with pytest.raises(ValueError, match="query/stranger.jpg: expected <identity>_c<camera>"):
        evaluate.read_benchmark(tmp_path)


def test_labelled_tracklets_have_two_queries_of_each_person_and_video(walkers):
    benchmark = evaluate.read_benchmark(walkers)
    tracklets = data.read_tracklets(walkers / "test")
    labels = data.read_labels(walkers / "test.json", tracklets)
    assert len(benchmark.gallery) == len(tracklets)
    assert set(benchmark.ids[labels < 0]) == {labels.max() + 1}  # distractors, not junk
    for person in range(labels.max() + 1):
        for video in np.unique(tracklets.video[labels == person]):
            seen = np.flatnonzero((labels == person) & (tracklets.video == video))
            seen = seen[np.argsort(tracklets.frame[seen], kind="stable")]
            queries = {seen[len(seen) // 3], seen[2 * len(seen) // 3]}
            assert queries == set(seen) & set(benchmark.query)
    perfect = np.eye(labels.max() + 2)[labels]  # those of nobody have the last feature
    for reranking in (False, True):
        assert evaluate.evaluate_features(perfect, benchmark, reranking)["mAP"] == 1


# ---------------------------------------------------------------- pictures, the program
def test_pictures_leave_out_what_the_protocol_leaves_out(tmp_path):
    """The red of an image tells which one it is, file 0 being the query. By similarity come 3, 4
    (under the query's own camera), 5, which is right, and 6."""
    write_market(tmp_path)
    benchmark = evaluate.read_benchmark(tmp_path)
    features = np.array([[1, 0], [0, 1], [5, 1], [4, 1], [3, 1], [2, 1]])
    evaluate.show_retrieval(tmp_path / "sheet.jpg", benchmark, features, [0], size=(64, 32))
    sheet = data.read_image(tmp_path / "sheet.jpg")
    cells = torch.stack([sheet[:, 2:66, x : x + 32] for x in (2, 36, 70, 104)]).float()
    np.testing.assert_allclose(cells[:, 0, 32, 16], [0, 90, 150, 180], atol=5)
    frames = cells[:, :, 1, 16]  # (4, 3)
    assert frames[0].min() > 200
    assert (frames[1:, 1] > frames[1:, 0]).tolist() == [False, True, False]
    with full_disk(500), pytest.raises(OSError, match="sheet.jpg: cannot be written"):
        evaluate.show_retrieval(tmp_path / "sheet.jpg", benchmark, features, [0], size=(64, 32))


def test_the_program_prints_the_figures_of_the_weights(market, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    backbone = model.build("r10ibn")
    weights = tmp_path / "random.pth"
    torch.save(backbone.state_dict(), weights)
    command = f"evaluate.py --data {market} --weights {weights} --arch r10ibn --size 32 16"
    monkeypatch.setattr(sys, "argv", f"{command} --workers 0 --rerank --show 3".split())
    shown = []
    monkeypatch.setattr(evaluate, "show_retrieval", lambda *arguments: shown.extend(arguments))
    evaluate.main()
    printed = capsys.readouterr().out.splitlines()
    benchmark = evaluate.read_benchmark(market)
    features = evaluate.extract(backbone, benchmark.images, (32, 16), "cpu")
    assert printed[-5:-3] == str(benchmark).splitlines()
    plain = evaluate.evaluate_features(features, benchmark)
    again = evaluate.evaluate_features(features, benchmark, reranking=True)
    for start, result, line in (("plain", plain, -3), ("re-ranked", again, -2)):
        assert printed[line].startswith(f"{start}: mAP {result['mAP']:.1%}, R1 {result['R1']:.1%}")
    file, _, _, queries = shown
    assert file == tmp_path / f"random.{market.name}.jpg" and printed[-1].endswith(str(file))
    worst = np.sort(plain["ap"])[:3]
    np.testing.assert_array_equal(plain["ap"][np.searchsorted(benchmark.query, queries)], worst)
