"""data.py: the index, labels, pixels, the sampler, and the drawn set."""
import json

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg

import data


def make_tree(root, files):
    jpeg = encode_jpeg(torch.full((3, 16, 8), 100, dtype=torch.uint8)).numpy().tobytes()
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    return root


FILES = ["b/000002_0000010_00.jpg", "a/000001_0000005_00.jpg", "a/000001_0000001_01.jpg", "a/000002_0000001_00.jpg", "x/y/000001_0000003_00.jpeg"]


def test_index_is_sorted_and_tracks_are_unique_over_videos(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, FILES))
    assert [t.path(i) for i in range(len(t))] == [FILES[2], FILES[1], FILES[3], FILES[0], FILES[4]]
    assert [p.decode() for p in t.paths()] == [t.path(i) for i in range(len(t))]
    assert t.video.tolist() == [0, 0, 0, 1, 2] and t.track.tolist() == [0, 0, 1, 2, 3] and t.frame.tolist() == [1, 5, 1, 10, 3]
    assert t.video.dtype == t.track.dtype == t.frame.dtype == np.int64


def test_numbers_order_tracks_and_frames_even_where_names_are_not_padded(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, ["v/10_2_0.jpg", "v/9_100_0.jpg", "v/9_20_0.jpg"]))
    assert [t.path(i) for i in range(3)] == ["v/9_20_0.jpg", "v/9_100_0.jpg", "v/10_2_0.jpg"]


def test_images_in_the_root_itself_are_one_video(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, ["000001_0000001_00.jpg"]))
    assert t.path(0) == "000001_0000001_00.jpg" and t.paths()[0] == b"000001_0000001_00.jpg"


def test_wrong_names_are_counted_and_shown(tmp_path):
    make_tree(tmp_path, FILES + ["a/portrait.jpg", "b/1_2.jpg"])
    with pytest.raises(ValueError, match=r"2 JPEG names.*portrait\.jpg"):
        data.read_tracklets(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data.read_tracklets(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(ValueError, match="no JPEG files"):
        data.read_tracklets(tmp_path)


def same(a, b):
    return a.folders == b.folders and all((getattr(a, key) == getattr(b, key)).all() for key in ("name", "video", "track", "frame"))


def test_a_kept_index_is_read_until_a_folder_changes(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "set", FILES)
    scanned = data.read_tracklets(root, keep=5)
    assert (tmp_path / "set.index.npz").is_file() and not list(tmp_path.glob(".*"))
    walk = data.os.walk
    monkeypatch.setattr(data.os, "walk", lambda *args, **kwargs: pytest.fail("scanned again"))
    assert same(data.read_tracklets(f"{root}/"), scanned)
    monkeypatch.setattr(data.os, "walk", walk)
    for change in (lambda: make_tree(root, ["x/z/000001_0000003_00.jpg"]), lambda: (root / FILES[0]).unlink()):
        before = len(data.read_tracklets(root, keep=5))
        change()
        assert len(data.read_tracklets(root, keep=5)) != before
        assert same(data.read_tracklets(root, keep=5), data.read_tracklets(root, keep=10**9))


def test_a_file_that_comes_during_the_scan_is_found_the_next_time(tmp_path, monkeypatch):
    root, walk = make_tree(tmp_path / "set", FILES), data.os.walk

    def slow(*args, **kwargs):
        for entry in walk(*args, **kwargs):
            yield entry
            if entry[0].endswith("a"):  # listed already
                make_tree(root, ["a/000009_0000001_00.jpg"])

    monkeypatch.setattr(data.os, "walk", slow)
    assert len(data.read_tracklets(root, keep=1)) == 5
    monkeypatch.setattr(data.os, "walk", walk)
    assert len(data.read_tracklets(root, keep=1)) == 6


def test_names_that_are_no_text_are_read_too(tmp_path):
    make_tree(tmp_path / "set", FILES)
    data.os.rename(data.os.fsencode(tmp_path / "set" / "b"), data.os.fsencode(tmp_path / "set") + b"/\xff")
    t = data.read_tracklets(tmp_path / "set", keep=1)
    assert all(data.Images(t, (16, 8))[i][1] for i in range(5))
    assert same(data.read_tracklets(tmp_path / "set"), t)
    data.write_labels(tmp_path / "labels.json", t, np.arange(5))
    np.testing.assert_array_equal(data.read_labels(tmp_path / "labels.json", t), np.arange(5))


def test_a_small_index_is_not_kept_and_a_wrong_one_not_believed(tmp_path):
    root, kept = make_tree(tmp_path / "set", FILES), tmp_path / "set.index.npz"
    scanned = data.read_tracklets(root)
    assert not kept.exists()
    data.read_tracklets(root, keep=1)
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"no index"):
        kept.write_bytes(damaged)
        assert same(data.read_tracklets(root), scanned)
    for key, value in (("folders", ["a", "b", "../.."]), ("folders", ["a", "b", "/etc"]), ("name", np.array([b"../1_1_1.jpg"] * 5))):
        kept.write_bytes(whole)
        np.savez(kept, **{**np.load(kept), key: value})  # paths that leave the root
        assert same(data.read_tracklets(root), scanned)


def test_labels_make_the_round_trip_in_the_published_format(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path / "set", FILES))
    labels = np.array([1, -1, 0, 1, 2])
    data.write_labels(tmp_path / "labels.json", t, labels)
    entries = json.loads((tmp_path / "labels.json").read_text())
    assert [e["id"] for e in entries] == [1, 2, 2, 3] and entries[0]["file_path"] == FILES[3 - 0]
    np.testing.assert_array_equal(data.read_labels(tmp_path / "labels.json", t), labels)


def test_ids_are_written_contiguous_from_one(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path / "set", FILES))
    data.write_labels(tmp_path / "labels.json", t, np.array([70, -1, 5, 70, 9]))
    assert [e["id"] for e in json.loads((tmp_path / "labels.json").read_text())] == [1, 2, 3, 3]


@pytest.mark.parametrize("entries, message", [
    ([{"file_path": "../secret.jpg", "id": 1}], "leave the root"),
    ([{"file_path": "/etc/1_1_1.jpg", "id": 1}], "leave the root"),
    ([{"file_path": "a/000009_0000001_00.jpg", "id": 1}], "not among the images"),
    ([{"file_path": FILES[0], "id": 0}], "whole numbers from 1"),
    ([{"file_path": FILES[0], "id": "1"}], "whole numbers from 1"),
    ([{"file_path": FILES[0], "id": 1}, {"file_path": FILES[0], "id": 2}], "more than once"),
    ([{"path": FILES[0], "id": 1}], "expected a JSON list"),
    ({"file_path": FILES[0]}, "expected a JSON list"),
    ({"file_path": FILES[0], "id": 1}, "expected a JSON list"),
    ([[{"file_path": FILES[0], "id": 1}]], "expected a JSON list"),
    ([{"file_path": FILES[0], "id": 1}, 3], "expected a JSON list"),
    ([{"file_path": 7, "id": 1}], "expected a JSON list"),
    (7, "expected a JSON list"),
    ([], "at least one entry"),
])  # fmt: skip
def test_broken_annotations_are_refused(tmp_path, entries, message):
    t = data.read_tracklets(make_tree(tmp_path / "set", FILES))
    (tmp_path / "labels.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        data.read_labels(tmp_path / "labels.json", t)


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(KeyboardInterrupt), data.replacing(tmp_path / "kept") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "kept").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_broken_jpeg_is_black_counted_and_replaced_by_its_own_identity(tmp_path):
    t = data.read_tracklets(make_tree(tmp_path, FILES))
    (tmp_path / t.path(1)).write_bytes(b"not a jpeg")
    (tmp_path / t.path(4)).unlink()
    images, readable = next(iter(data.load_batches(t, [[0, 1, 2, 3, 4, 0]], (32, 16))))
    assert images.shape == (6, 3, 32, 16) and images.dtype == torch.uint8
    assert readable.tolist() == [True, False, True, True, False, True] and images[1].max() == 0
    images[0], images[5] = 50, 60
    fixed = data.replace_unreadable(images, readable, K=2)
    assert (fixed[1] == 50).all() and (fixed[4] == 60).all()
    with pytest.raises(ValueError, match="2 of 5 images cannot be read"):
        data.check_readable(t)


def test_sampler_by_definition():
    random = np.random.default_rng(0)
    labels = random.integers(-1, 30, 500)
    labels[:3] = 30  # an identity of three images: repeats them
    for K in (1, 2, 4):
        batches = data.sample_identities(labels, K, batch=16, seed=1, epoch=0)
        groups = labels[batches].reshape(-1, K)
        assert (groups == groups[:, :1]).all() and (groups >= 0).all()
        assert len(batches) == sum(max(1, n // K) for n in np.bincount(labels[labels >= 0])) * K // 16
        rows = batches.reshape(-1, K)
        for row in rows[np.bincount(labels[labels >= 0])[groups[:, 0]] >= K]:
            assert len(set(row)) == K  # repeats only where there are too few


def test_sampler_is_pure_and_epochs_differ():
    labels = np.repeat(np.arange(20), 10)
    draw = lambda *key: data.sample_identities(labels, 4, 16, *key)
    np.testing.assert_array_equal(draw(3, 1), draw(3, 1))
    assert (draw(3, 1) != draw(3, 2)).any() and (draw(3, 1) != draw(4, 1)).any()


def test_every_image_is_used_evenly_over_epochs():
    labels = np.repeat([0, 1, 2, 3], [6, 10, 8, 12])
    counts = sum(np.bincount(data.sample_identities(labels, 4, 4, 0, epoch).ravel(), minlength=36) for epoch in range(300))
    for identity in range(4):
        own = counts[labels == identity]
        assert own.max() < 1.25 * own.min(), own


def test_sampler_says_what_does_not_fit():
    with pytest.raises(ValueError, match="K must divide"):
        data.sample_identities(np.arange(10), 3, 16, 0, 0)
    with pytest.raises(ValueError, match="fewer than the 4 of one batch"):
        data.sample_identities(np.array([0, 0, 1, 1, -1]), 4, 16, 0, 0)


def test_walkers_are_the_same_every_time_and_their_truth_is_kept_aside(walkers, tmp_path):
    data.draw_walkers(tmp_path / "again", people=10, videos=6, held_out=6)
    first, second = data.read_tracklets(walkers / "train"), data.read_tracklets(tmp_path / "again" / "train")
    assert [first.path(i) for i in range(len(first))] == [second.path(i) for i in range(len(second))]
    for i in range(0, len(first), 7):
        assert (walkers / "train" / first.path(i)).read_bytes() == (tmp_path / "again" / "train" / second.path(i)).read_bytes()
    assert (walkers / "train.json").read_bytes() == (tmp_path / "again" / "train.json").read_bytes()
    data.draw_walkers(tmp_path / "other", seed=1, people=10, videos=6, held_out=6)
    assert (tmp_path / "other" / "train.json").read_bytes() != (walkers / "train.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        data.draw_walkers(walkers)


def test_walkers_have_the_faults_of_a_tracker(tmp_path):
    boxes = data.track_people(np.random.default_rng(0), 200, 80, (14, 24), switches=True)
    key = boxes["video"] * 1000 + boxes["track"]
    people = [set(boxes["person"][key == k]) - {-1} for k in np.unique(key)]
    mixed = np.mean([len(p) > 1 for p in people])
    assert 0.15 < mixed < 0.25  # identity switches
    assert 0.01 < np.mean([not p for p in people]) < 0.15  # tracklets of no person
    assert 0.01 < (boxes["person"] < 0).mean() < 0.1
    for person in range(200):
        mine = boxes["person"] == person
        assert 2 <= len(np.unique(boxes["video"][mine])) <= 4
    fragments = [len(np.unique(key[(boxes["person"] == p) & (boxes["video"] == v)])) for p in range(50) for v in np.unique(boxes["video"][boxes["person"] == p])]
    assert np.mean(np.array(fragments) > 1) > 0.4
    for v in range(80):  # a person is in one place at a time
        mine = (boxes["video"] == v) & (boxes["person"] >= 0)
        seen = np.stack([boxes["person"][mine], boxes["frame"][mine]])
        assert len(np.unique(seen, axis=1).T) == mine.sum()


def test_walkers_noise_is_how_often_the_tracker_fails(tmp_path):
    shares = {}
    for noise in (0, 1):
        root = tmp_path / str(noise)
        data.draw_walkers(root, people=8, videos=4, held_out=2, noise=noise)
        t = data.read_tracklets(root / "train")
        ids = data.read_labels(root / "train.json", t)
        shares[noise] = np.mean([len(np.unique(ids[t.track == n])) > 1 or ids[t.track == n][0] < 0 for n in range(t.track[-1] + 1)])
    assert shares[0] == 0 < shares[1]
