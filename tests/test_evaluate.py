"""evaluate.py: the protocol against a sorting definition, known answers, and the split of labelled tracklets."""
import numpy as np
import pytest
import torch

import data
import evaluate


def by_sorting(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams):
    """The metrics as a reader would define them: sort, walk down the list; tied images share the last rank among them."""
    ap, inp, first = [], [], []
    for q, i, c in zip(query, query_ids, query_cams):
        valid = ~((gallery_ids == i) & (gallery_cams == c) & (i >= 0))
        similarity, match = (gallery @ q)[valid], ((gallery_ids == i) & (i >= 0))[valid]
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
    got = evaluate.evaluate(query, gallery, *arrays, block=5)
    mAP, mINP, cmc, queries = by_sorting(query, gallery, *arrays)
    assert got["queries"] == queries
    np.testing.assert_allclose([got["mAP"], got["mINP"]], [mAP, mINP], atol=1e-6)
    np.testing.assert_allclose(got["cmc"], cmc, atol=1e-6)


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


def test_distractors_match_nobody_and_lonely_queries_are_left_out():
    got = evaluate.evaluate(np.eye(3), np.eye(3), [0, 1, -1], [0, -1, -1], [0, 0, 0], [1, 1, 1])
    assert got["queries"] == 1 and got["mAP"] == 1


def test_errors():
    with pytest.raises(ValueError, match="none of the 1 queries"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0]], [0], [0], [0], [0])
    with pytest.raises(ValueError, match="gallery features: 1 of 2 rows are not finite, the first: 1"):
        evaluate.evaluate([[1.0, 0]], [[1.0, 0], [np.nan, 0]], [0], [0, 0], [0], [1, 1])


def test_split_takes_two_queries_of_each_person_and_video(walkers):
    t = data.read_tracklets(walkers / "test")
    ids = data.read_labels(walkers / "test.json", t)
    queries, gallery = evaluate.retrieval_split(t, ids)
    assert (ids[queries] >= 0).all() and len(gallery) == len(t)
    _, counts = np.unique(np.stack([ids[queries], t.video[queries]]), axis=1, return_counts=True)
    assert set(counts) <= {1, 2} and (counts == 2).mean() > 0.9
    perfect = np.eye(ids.max() + 2, dtype=np.float32)[ids]  # -1 takes the last row
    assert evaluate.evaluate_features(torch.from_numpy(perfect), t, ids)["mAP"] == pytest.approx(1)


def test_frame_keeps_the_picture_inside():
    image = torch.rand(3, 20, 10)
    framed = evaluate.framed(image, (1.0, 0.0, 0.0))
    assert framed.shape == image.shape and torch.equal(framed[:, 3:-3, 3:-3], image[:, 3:-3, 3:-3])
    assert framed[:, 0, 5].tolist() == [1, 0, 0]


class Colours(torch.nn.Module):
    """A network that answers the mean colour; it counts its images, and may break down after some."""

    embed_dim = 3

    def __init__(self, breaks_after=10**9, gain=1.0):
        super().__init__()
        self.gain, self.seen, self.breaks_after = torch.nn.Parameter(torch.tensor(gain)), 0, breaks_after

    def forward(self, x):
        self.seen += len(x)
        if self.seen > self.breaks_after:
            raise KeyboardInterrupt
        return self.gain * x.mean((2, 3)) + 5


def test_features_on_disk_go_on_where_they_were_and_are_not_computed_twice(walkers, tmp_path):
    t = data.read_tracklets(walkers / "test")
    arguments = t, (32, 16), torch.device("cpu")
    want = evaluate.extract(Colours(), *arguments)
    options = dict(batch=16, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        evaluate.extract_to_file(tmp_path, Colours(breaks_after=50), *arguments, **options)
    assert not list(tmp_path.glob("features-*.npy"))  # nothing that looks finished
    network = Colours()
    got = evaluate.extract_to_file(tmp_path, network, *arguments, **options)
    assert network.seen == len(t) - 48  # three blocks were there
    assert got.dtype == np.float16 and np.abs(got - want.numpy()).max() < 1e-3
    again = Colours()
    assert (evaluate.extract_to_file(tmp_path, again, *arguments, **options) == got).all() and again.seen == 0
    other = Colours(gain=2.0)
    evaluate.extract_to_file(tmp_path, other, *arguments, **options)
    assert other.seen == len(t) and len(list(tmp_path.iterdir())) == 2  # other weights, another file
