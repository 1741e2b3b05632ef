"""denoise.py: the levels against their definitions, invariants on random data, known answers by hand."""
import numpy as np
import pytest

import denoise as D


def radius(features):
    """r(S) as the paper defines it."""
    centroid = features.mean(0)
    return (1 - features @ (centroid / np.linalg.norm(centroid))).max()


def people(random, n=6, videos=3, frames=8, d=48, spread=0.25, switches=0):
    """Tracklets of n people, each in all videos, all seen at the same times. features, video, track, frame, truth."""
    centers = D.unit(random.standard_normal((n, d)))
    rows = [(v, v * n + p, f, p) for v in range(videos) for p in range(n) for f in range(frames)]
    video, track, frame, truth = np.array(rows).T
    for s in range(switches):  # two tracks of video s go on as each other halfway
        late = (video == s) & (frame >= frames // 2)
        a, b = late & (truth == 0), late & (truth == 1)
        track[a], track[b] = s * n + 1, s * n
    features = D.unit(centers[truth] + spread / np.sqrt(d) * random.standard_normal((len(truth), d)))
    return features, video, track, frame, truth


@pytest.mark.parametrize("seed", range(10))
def test_level_1_drops_one_image_at_a_time_as_defined(seed):
    random = np.random.default_rng(seed)
    features = D.unit(random.standard_normal((30, 5)) + 1.2)
    for sigma in (0.05, 0.3, 0.6):
        kept = list(range(30))
        while kept and radius(features[kept]) > sigma:
            centroid = features[kept].mean(0)
            kept.remove(kept[int(np.argmin(features[kept] @ centroid))])
        assert np.flatnonzero(D.trim(features, sigma)).tolist() == kept


def test_level_1_dissolves_what_is_too_short_and_keeps_one_box_a_frame():
    random = np.random.default_rng(0)
    a, b = np.eye(4)[0], np.eye(4)[1]
    features = D.unit(np.stack([a, a, a, b, a, b]) + 0.01 * random.standard_normal((6, 4)))
    track, moment = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 2, 2, 5, 6])
    assert D.single_tracklet(features, track, moment, sigma=0.1, min_images=2).tolist() == [0, 0, 0, -1, -1, -1]
    assert (D.single_tracklet(features, track, moment, sigma=0.1, min_images=1) >= 0).sum() == 4


def merge_by_definition(features, identities, sigma, tau):
    """Closest allowed pair, over and over, everything computed anew."""
    identities = [list(rows) for rows in identities]
    while True:
        pairs = []
        for i in range(len(identities)):
            for j in range(i + 1, len(identities)):
                a, b = features[identities[i]].mean(0), features[identities[j]].mean(0)
                distance = 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                if distance < tau and radius(features[identities[i] + identities[j]]) <= sigma:
                    pairs.append((distance, i, j))
        if not pairs:
            return {frozenset(rows) for rows in identities}
        _, i, j = min(pairs)
        identities[i] += identities.pop(j)


@pytest.mark.parametrize("seed", range(10))
def test_merge_equals_its_definition(seed):
    random = np.random.default_rng(seed)
    features = D.unit(random.standard_normal((40, 3)) * 0.5 + [1, 0, 0])
    identities = [rows for rows in np.split(np.arange(40), range(3, 40, 3))]
    rule = D.Rule(features, np.arange(40), sigma=0.25, tau=0.3)
    groups = D.merge(identities, rule)
    got = {frozenset(np.concatenate([identities[n] for n in group]).tolist()) for group in groups}
    assert got == merge_by_definition(features.astype(float), identities, 0.25, 0.3)
    assert 1 < len(got) < len(identities)


def test_noise_by_hand():
    angle = np.deg2rad([0, 10, 20, 80, 90, 40, 45])
    features = np.stack([np.cos(angle), np.sin(angle)], 1) * 7  # any length
    labels = np.array([5, 5, 5, 9, 9, 2, -1])
    outside = 1 - np.cos(np.deg2rad(10))
    assert D.noise(features, labels, sigma=outside * 0.9, tau=0.0) == (2 / 6, 0.0)  # 0 and 20 degrees, seen from 10
    assert D.noise(features, labels, sigma=outside * 1.1, tau=1 - np.cos(np.deg2rad(31))) == (0.0, 2 / 3)  # 10 and 40
    assert D.noise(features, np.full(7, -1), 0.1, 0.1) == (0.0, 0.0)


def test_pairwise_scores_by_hand():
    scores = D.pairwise_scores(np.array([0, 0, 0, 1, 1, -1]), np.array([0, 0, 1, 1, -1, 0]))
    assert scores["precision"] == 1 / 4 and scores["recall"] == 1 / 4 and scores["f1"] == pytest.approx(1 / 4)
    assert D.pairwise_scores(np.full(3, -1), np.arange(3))["f1"] == 0
    truth = np.random.default_rng(0).integers(0, 4, 50)
    assert D.pairwise_scores(truth, truth)["f1"] == 1
    assert D.pairwise_scores(np.arange(50), truth)["f1"] == 0


def test_cannot_link_keeps_lookalikes_of_one_frame_apart():
    features = np.repeat(np.eye(4)[:1], 8, 0)  # two tracklets that look the same, seen together
    video, track, frame = np.zeros(8, int), np.repeat([0, 1], 4), np.tile(np.arange(4), 2)
    assert len(set(D.denoise(features, video, track, frame, 0.1, 0.1))) == 2
    assert len(set(D.denoise(features, video, track, frame, 0.1, 0.1, cannot_link=False))) == 1
    assert len(set(D.denoise(features, video, track, frame + 10 * track, 0.1, 0.1))) == 1


def test_level_2_merges_fragments_takes_in_anomalies_and_recovers_the_other_half_of_a_switch():
    random = np.random.default_rng(0)
    a, b, junk = np.eye(8)[0], np.eye(8)[1], np.eye(8)[2]
    # tracklet 0: a then b (switched); tracklet 1: more of a, later; tracklet 2: b, later; tracklet 3: junk with one a
    who = [a] * 5 + [b] * 4 + [a] * 4 + [b] * 4 + [junk] * 3 + [a]
    track = np.repeat([0, 1, 2, 3], [9, 4, 4, 4])
    features = D.unit(np.stack(who) + 0.01 * random.standard_normal((21, 8)))
    moment, video = np.arange(21), np.zeros(21, int)
    first = D.single_tracklet(features, track, moment, sigma=0.1)
    assert first.tolist() == [0] * 5 + [-1] * 4 + [1] * 4 + [2] * 4 + [3] * 3 + [-1]
    labels = D.single_video(features, first, video, track, moment, 0.1, 0.2)
    assert len(set(labels[[0, 4, 9, 12, 20]])) == 1 and len(set(labels[[5, 8, 13, 16]])) == 1 and len(set(labels)) == 3
    left = D.single_video(features, np.where(track == 2, -1, first), video, np.where(track == 2, -1, track), moment, 0.1, 0.2, recover=False)
    assert (left[[5, 8]] == -1).all()
    again = D.single_video(features, np.where(track == 2, -1, first), video, np.where(track == 2, -1, track), moment, 0.1, 0.2, recover=True)
    assert again[5] >= 0 and len(set(again[5:9])) == 1


def test_switches_are_split_where_they_happen_and_nowhere_else():
    random = np.random.default_rng(0)
    who = np.array([0] * 5 + [1] * 6 + [0] * 3 + [2] * 9)
    features = D.unit(np.eye(16)[who] + 0.1 * random.standard_normal((23, 16)))
    track, frame = np.repeat([7, 3], [14, 9]), np.arange(23)
    order = random.permutation(23)
    got = np.empty(23, np.int64)
    got[order] = D.split_switches(features[order], track[order], frame[order], tau=0.5)
    assert got.tolist() == [1] * 5 + [2] * 6 + [3] * 3 + [0] * 9
    assert D.split_switches(features, track, frame, tau=1.5).tolist() == [1] * 14 + [0] * 9


@pytest.mark.parametrize("seed", range(5))
def test_people_come_out_whole_and_switches_are_undone(seed):
    features, video, track, frame, truth = people(np.random.default_rng(seed), switches=2)
    before = D.pairwise_scores(track, truth)["f1"]
    labels = D.denoise(features, video, track, frame, sigma=0.2, tau=0.3)
    assert D.pairwise_scores(labels, truth)["f1"] == 1.0 > before


@pytest.mark.parametrize("seed", range(20))
def test_invariants_on_random_data(seed):
    random = np.random.default_rng(seed)
    spread = random.uniform(0.3, 3)
    features, video, track, frame, truth = people(random, n=5, videos=4, frames=6, d=8, spread=spread, switches=3)
    sigma, tau = random.uniform(0.05, 0.6, 2)
    moment = D.moments(video, frame)
    first = D.single_tracklet(features, track, moment, sigma)
    second = D.single_video(features, first, video, track, moment, sigma, tau)
    third = D.cross_video(features, second, video, moment, sigma, tau, window=99)
    for labels in (first, second, third):
        for rows in D.group_rows(labels):
            assert radius(features[rows].astype(float)) <= sigma + 1e-5  # every identity within its sphere
            assert len(np.unique(moment[rows])) == len(rows)  # nobody twice in one frame
        assert D.noise(features, labels, sigma, tau)[0] == 0
    rule, identities = D.Rule(features, moment, sigma, tau), D.group_rows(third)
    assert len(D.merge(identities, rule)) == len(identities)  # nothing is left to merge
    assert ((third >= 0) == (second >= 0)).all()  # level 3 joins, it removes nothing
    order = random.permutation(len(track))  # rows in another order: the same identities
    again = D.denoise(features[order], video[order], track[order], frame[order], sigma, tau, window=99)
    same = lambda labels: {frozenset(np.flatnonzero(labels == n).tolist()) for n in set(labels.tolist()) - {-1}}
    back = np.empty_like(again)
    back[order] = again
    assert same(back) == same(D.denoise(features, video, track, frame, sigma, tau, window=99))


def test_sliding_range_links_through_overlaps_and_misses_who_stays_away_longer():
    here, far = D.unit(np.eye(6)[:1]), D.unit(np.eye(6)[1:2])
    video = np.array([0, 2, 4, 6, 0, 9])  # one person every second video, another only in the first and the last
    features = np.concatenate([np.repeat(here, 4, 0), np.repeat(far, 2, 0)])
    labels, moment = np.arange(6), np.arange(6)
    got = D.cross_video(features, labels, video, moment, 0.1, 0.1, window=4, stride=2)
    assert len(set(got[:4])) == 1 and got[4] != got[5]
    whole = D.cross_video(features, labels, video, moment, 0.1, 0.1, window=10, stride=5)
    assert whole[4] == whole[5] and len(set(whole)) == 2


def test_a_linked_chain_that_breaks_the_rule_is_split():
    angle = np.deg2rad([0, 20, 40, 60])  # neighbours are close, the ends are not
    features = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    sigma = 1 - np.cos(np.deg2rad(12))
    labels = D.cross_video(features, np.arange(4), np.arange(4), np.arange(4), sigma, tau=0.1, window=2, stride=1)
    for rows in D.group_rows(labels):
        assert radius(features[rows]) <= sigma + 1e-6
    assert len(set(labels)) == 2


def test_calibration_separates_well_separated_people():
    features, video, track, frame, truth = people(np.random.default_rng(0), n=8, frames=12, spread=0.3)
    sigma, tau = D.calibrate(features * 3, video, track, frame)
    within = max(radius(features[truth == p]) for p in range(8))
    assert 0.5 * within < sigma < 2 * within and sigma < tau
    assert D.pairwise_scores(D.denoise(features, video, track, frame), truth)["f1"] > 0.95


def test_whitening_removes_what_a_video_shares_and_equals_textbook_whitening():
    random = np.random.default_rng(0)
    features, video, track, frame, truth = people(random, n=12, videos=4, frames=10, spread=0.5)
    stained = features + 3 * D.unit(random.standard_normal((4, 48)))[video]  # a background of its own for every video
    space = D.whiten(stained, video)
    plain = D.unit(stained)
    gap = lambda f: (f @ f.T)[truth[:, None] == truth].mean() - (f @ f.T)[(truth[:, None] != truth)].mean()
    assert gap(space) > 3 * gap(plain)
    centred = plain - np.stack([plain[video == v].mean(0) for v in video])
    values, vectors = np.linalg.eigh(np.cov(centred.T, bias=True) + 1e-9 * np.eye(48))
    want = D.unit(centred @ vectors / np.sqrt(values))
    space = D.whiten(stained, video, prior=0)
    assert (np.abs((space @ space.T) - (want @ want.T))).max() < 0.2  # shrinkage is small with many images
    lonely = D.whiten(np.concatenate([stained, stained[:1]]), np.append(video, 4))  # a video of one image
    assert np.isfinite(lonely).all()
    few = D.whiten(random.standard_normal((6, 64)), np.zeros(6, int))  # fewer images than dimensions
    assert np.isfinite(few).all()


@pytest.mark.parametrize("change, message", [
    (dict(video=np.zeros(3)), "video has 3 rows, features have 144"),
    (dict(sigma=2.5), r"sigma=2.5: a cosine distance lies in \[0, 2\]"),
    (dict(tau=-0.1), "tau=-0.1"),
    (dict(window=8, stride=8), "ranges must overlap"),
    (dict(row=np.nan), "1 of 144 rows are zero or not finite, the first: row 7"),
    (dict(row=0.0), "the first: row 7"),
])  # fmt: skip
def test_wrong_input_is_named(change, message):
    features, video, track, frame, _ = people(np.random.default_rng(0))
    if "row" in change:
        features[7] = change.pop("row")
    arguments = dict(features=features, video=video, track=track, frame=frame, sigma=0.2, tau=0.2) | change
    with pytest.raises(ValueError, match=message):
        D.denoise(**arguments)


def test_tiny_inputs_work():
    one = np.ones((1, 4))
    zero = np.zeros(1, int)
    assert D.denoise(one, zero, zero, zero, 0.2, 0.2, min_images=1).tolist() == [0]
    assert D.denoise(one, zero, zero, zero).tolist() == [-1]  # one image is no tracklet
    pair = np.array([[1.0, 0], [1.0, 0.1]])
    assert D.denoise(pair, [0, 0], [0, 0], [0, 1], 0.2, 0.2).tolist() == [0, 0]
    opposite = np.array([[1.0, 0], [-1.0, 0.1]])
    assert D.denoise(opposite, [0, 0], [0, 0], [0, 1], 0.1, 0.2).tolist() == [-1, -1]  # nothing left after level 1
