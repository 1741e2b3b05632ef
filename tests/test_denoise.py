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


def test_level_1_dissolves_what_is_too_short_and_leaves_out_what_has_no_track():
    random = np.random.default_rng(0)
    a, b = np.eye(4)[0], np.eye(4)[1]
    features = D.unit(np.stack([a, a, a, b, a, b, a]) + 0.01 * random.standard_normal((7, 4)))
    video, track = np.zeros(7, int), np.array([0, 0, 0, 0, 5, 5, -1])
    assert D.single_tracklet(features, video, track, sigma=0.1, min_images=2).tolist() == [0, 0, 0, -1, -1, -1, -1]
    assert (D.single_tracklet(features, video, track, sigma=0.1, min_images=1) >= 0).sum() == 4
    assert D.single_tracklet(features, video, track, sigma=2, min_images=3).tolist() == [0, 0, 0, 0, -1, -1, -1]


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
    groups = D.merge(features * 3, identities, np.arange(40), sigma=0.25, tau=0.3)  # any length
    got = {frozenset(np.concatenate([identities[n] for n in group]).tolist()) for group in groups}
    assert got == merge_by_definition(features.astype(float), identities, 0.25, 0.3)
    assert 1 < len(got) < len(identities)


def test_merge_looks_only_at_the_pairs_it_is_given_and_what_unions_inherit():
    angle = np.deg2rad([0, 1, 2.5, 4.5, 90])
    features = np.stack([np.cos(angle), np.sin(angle)], 1)
    identities, moment = [np.array([n]) for n in range(5)], np.arange(5)
    merge = lambda **options: sorted(map(sorted, D.merge(features, identities, moment, 0.5, 0.1, **options)))
    assert merge() == [[0, 1, 2, 3], [4]]
    assert merge(pairs=np.array([[0, 2], [3, 4]])) == [[0, 2], [1], [3], [4]]
    assert merge(pairs=np.array([[0, 1], [1, 3]])) == [[0, 1, 3], [2], [4]]  # 1's pair with 3 goes on as the union's
    assert merge(fresh=np.arange(5) == 3) == [[0, 1, 2, 3], [4]]  # 3 meets 2, and the union everybody
    assert merge(fresh=np.arange(5) == 4) == [[0], [1], [2], [3], [4]]


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
    frame, video = np.arange(21), np.zeros(21, int)
    first = D.single_tracklet(features, video, track, sigma=0.1)
    assert first.tolist() == [0] * 5 + [-1] * 4 + [1] * 4 + [2] * 4 + [3] * 3 + [-1]
    labels = D.single_video(features, first, video, track, frame, 0.1, 0.2)
    assert len(set(labels[[0, 4, 9, 12, 20]])) == 1 and len(set(labels[[5, 8, 13, 16]])) == 1 and len(set(labels)) == 3
    without = np.where(track == 2, -1, first), video, np.where(track == 2, -1, track), frame, 0.1, 0.2
    left = D.single_video(features, *without, recover=False)
    assert (left[[5, 8]] == -1).all()
    again = D.single_video(features, *without, recover=True)
    assert again[5] >= 0 and len(set(again[5:9])) == 1


def test_switches_are_cut_where_they_happen_and_nowhere_else():
    random = np.random.default_rng(0)
    who = np.array([0] * 5 + [1] * 6 + [0] * 3 + [2] * 9)
    features = D.unit(np.eye(16)[who] + 0.1 * random.standard_normal((23, 16)))
    track, frame, video = np.repeat([7, 3], [14, 9]), np.arange(23), np.zeros(23, int)
    order = random.permutation(23)
    got = np.empty(23, np.int64)
    got[order] = D.split_switches(features[order], video, track[order], frame[order], tau=0.5)
    # the images on both sides of a cut belong to neither part yet
    assert got.tolist() == [1] * 4 + [-1] + [-1] + [2] * 4 + [-1] + [-1] + [3] * 2 + [0] * 9
    assert D.split_switches(features, video, track, frame, tau=1.5).tolist() == [1] * 14 + [0] * 9
    labels = D.denoise(features, video, track, frame, 0.3, 0.5)
    assert (labels[who == 0] == labels[0]).all() and len(set(labels)) == 3  # level 2 has found their place


@pytest.mark.parametrize("seed", range(5))
def test_people_come_out_whole_and_switches_are_undone(seed):
    features, video, track, frame, truth = people(np.random.default_rng(seed), switches=2)
    before = D.pairwise_scores(track, truth)["f1"]
    labels = D.denoise(features, video, track, frame, sigma=0.2, tau=0.3)
    assert D.pairwise_scores(labels, truth)["f1"] == 1.0 > before


def partition(labels):
    """What belongs together, whatever its number; noise left out."""
    return {frozenset(rows.tolist()) for rows in D.group_rows(labels)}


def random_case(seed):
    """Anything from clean to hopeless: features, video, track, frame and thresholds, window, stride."""
    random = np.random.default_rng(seed)
    spread, n, d = random.uniform(0.3, 3), random.integers(2, 7), random.integers(2, 12)
    features, video, track, frame, _ = people(random, n=n, videos=5, frames=6, d=d, spread=spread, switches=3)
    if seed % 4 == 0:  # adversarial: many images exactly alike, many distances exactly the same
        features = D.unit(np.round(2 * features) + 1.5 * np.eye(d)[0])
    window = int(random.integers(2, 6))
    return features, video, track, frame, *random.uniform(0.02, 0.8, 2), window, int(random.integers(1, window))


@pytest.mark.parametrize("seed", range(40))
def test_invariants_of_the_levels(seed):
    features, video, track, frame, sigma, tau, window, stride = random_case(seed)
    moment = 100 * video + frame
    first = D.single_tracklet(features, video, track, sigma)
    second = D.single_video(features, first, video, track, frame, sigma, tau)
    third = D.cross_video(features, second, video, frame, sigma, tau, window, stride)
    for labels in (first, second, third):
        for rows in D.group_rows(labels):
            assert radius(features[rows].astype(float)) <= sigma + 1e-5  # every identity within its sphere
            assert len(np.unique(moment[rows])) == len(rows)  # nobody twice in one frame
        assert D.noise(features, labels, sigma, tau)[0] == 0  # so no image is noise after level 1, and none again
        assert labels.dtype == np.int64 and labels.min() >= -1
    assert ((third >= 0) == (second >= 0)).all()  # level 3 joins, it removes nothing
    identities = [rows for rows in D.group_rows(third)]
    for start in range(0, max(1, 5 - window + stride), stride):  # what a range compares and the rule allows is joined
        here = [rows for rows in identities if ((video[rows] >= start) & (video[rows] < start + window)).any()]
        assert len(D.merge(features, here, moment, sigma - 2e-6, tau - 2e-6)) == len(here)
    assert partition(D.cross_video(features, third, video, frame, sigma, tau, window, stride)) == partition(third)  # once more: nothing
    inside = {frozenset(rows.tolist()) for v in range(5) for rows in D.group_rows(np.where(video == v, second, -1))}
    assert inside == partition(second)  # level 2 stays within videos


@pytest.mark.parametrize("seed", range(1, 20, 2))
def test_the_result_depends_on_neither_the_order_of_rows_nor_the_window_of_memory(seed, monkeypatch, tmp_path):
    features, video, track, frame, sigma, tau, window, stride = random_case(seed)
    options = dict(window=window, stride=stride)
    labels = D.denoise(features, video, track, frame, sigma, tau, **options)
    order = np.random.default_rng(seed).permutation(len(track))
    again = D.denoise(features[order], video[order], track[order], frame[order], sigma, tau, **options)
    assert (again == labels[order]).all()  # to the number
    assert labels.max() + 1 == len(set(labels) - {-1})
    features = features.astype(np.float16)
    want = D.denoise(features, video, track, frame, sigma, tau, **options)
    np.save(tmp_path / "features.npy", features)
    monkeypatch.setattr(D, "slices", lambda n, d, *_, slices=D.slices: slices(n, d, 50))
    monkeypatch.setattr(D, "video_rows", lambda f, v, video_rows=D.video_rows: video_rows(f, v, 50))
    assert (D.denoise(np.load(tmp_path / "features.npy", mmap_mode="r"), video, track, frame, sigma, tau, **options) == want).all()


@pytest.mark.parametrize("seed", range(1, 20, 2))
def test_a_range_over_all_videos_is_the_global_merge_whatever_their_order(seed):
    features, video, track, frame, sigma, tau, _, _ = random_case(seed)
    second = D.single_video(features, D.single_tracklet(features, video, track, sigma), video, track, frame, sigma, tau)
    third = D.cross_video(features, second, video, frame, sigma, tau, window=5, stride=1, cannot_link=False)
    assert partition(third) == merge_by_definition(features.astype(float), D.group_rows(second), sigma, tau)
    other = np.random.default_rng(seed).permutation(5)[video]
    assert partition(D.cross_video(features, second, other, frame, sigma, tau, window=9, stride=1, cannot_link=False)) == partition(third)


def test_noise_can_rise_among_identities_and_why():
    """The share of identities too close to another may rise by a merge that the rule demands: the union's centroid lies between
    those of its parts, and so nearer to a third that was far enough from both. What holds: no image outside its sphere after
    level 1, and after level 3 no two identities of a range closer than tau whose union would be consistent."""
    vector = lambda aside, up: [np.cos(up) * np.cos(aside), np.cos(up) * np.sin(aside), np.sin(up)]
    features = np.array([vector(np.deg2rad(a), np.deg2rad(b)) for a, b in ((10, 0), (-10, 0), (0, 30))])
    angle = lambda degrees: 1 - np.cos(np.deg2rad(degrees))
    sigma, tau, labels = angle(12), angle(31), np.arange(3)
    assert D.noise(features, labels, sigma, tau) == (0.0, 2 / 3)  # the first two
    merged = D.cross_video(features, labels, np.arange(3), np.arange(3), sigma, tau, window=3, stride=1)
    assert merged.tolist() == [0, 0, 1]
    assert D.noise(features, merged, sigma, tau) == (0.0, 1.0)  # their union and the third


def test_level_1_can_raise_the_noise_of_identities_too():
    angle = np.deg2rad([0, 0, 0, 60, -40, -40])  # one outlier holds a tracklet's centroid away from another's
    features = np.stack([np.cos(angle), np.sin(angle)], 1)
    sigma, tau, track = 0.1, 1 - np.cos(np.deg2rad(45)), np.array([0, 0, 0, 0, 1, 1])
    first = D.single_tracklet(features, np.zeros(6, int), track, sigma)
    assert first.tolist() == [0, 0, 0, -1, 1, 1]
    assert D.noise(features, track, sigma, tau)[1] == 0 and D.noise(features, first, sigma, tau)[1] == 1


def test_noise_compares_within_ranges():
    features = np.eye(3)[[0, 1, 0, 2]]
    labels = np.arange(4)
    assert D.noise(features, labels, 0.1, 0.1) == (0.0, 0.5)
    assert D.noise(features, labels, 0.1, 0.1, video=np.array([0, 1, 2, 2]), window=2, stride=1) == (0.0, 0.0)
    assert D.noise(features, labels, 0.1, 0.1, video=np.array([0, 1, 2, 2]), window=3, stride=1) == (0.0, 0.5)


def test_sliding_range_links_through_overlaps_and_misses_who_stays_away_longer():
    here, far = D.unit(np.eye(6)[:1]), D.unit(np.eye(6)[1:2])
    video = np.array([0, 2, 4, 6, 0, 9])  # one person every second video, another only in the first and the last
    features = np.concatenate([np.repeat(here, 4, 0), np.repeat(far, 2, 0)])
    labels, frame = np.arange(6), np.arange(6)
    got = D.cross_video(features, labels, video, frame, 0.1, 0.1, window=4, stride=2)
    assert len(set(got[:4])) == 1 and got[4] != got[5]
    whole = D.cross_video(features, labels, video, frame, 0.1, 0.1, window=10, stride=5)
    assert whole[4] == whole[5] and len(set(whole)) == 2


def test_a_linked_chain_that_breaks_the_rule_is_split():
    angle = np.deg2rad([0, 20, 40, 60])  # neighbours are close, the ends are not
    features = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    sigma = 1 - np.cos(np.deg2rad(12))
    labels = D.cross_video(features, np.arange(4), np.arange(4), np.arange(4), sigma, tau=0.1, window=2, stride=1)
    for rows in D.group_rows(labels):
        assert radius(features[rows]) <= sigma + 1e-6
    assert len(set(labels)) == 2


def test_calibration_by_hand():
    angle = np.deg2rad([0, 0, 10, 10, 100, 100, 110, 110])  # two tracklets seen together, each turning by 10 degrees halfway
    features = np.stack([np.cos(angle), np.sin(angle)], 1) * 5
    video, track, frame = np.zeros(8, int), np.repeat([4, 9], 4), np.tile(np.arange(4), 2)
    distance = lambda degrees: 1 - np.cos(np.deg2rad(degrees))
    rest = np.rad2deg(np.arctan2(2 * np.sin(np.deg2rad(10)), 1 + 2 * np.cos(np.deg2rad(10))))  # of 0, 10 and 10 degrees
    said = []
    sigma, tau = D.calibrate(features, video, track, frame, said.append)
    assert sigma == pytest.approx((distance(rest) + distance(100)) / 2, abs=1e-5)
    assert tau == pytest.approx((distance(10) + distance(100)) / 2, abs=1e-5)
    assert "85% of tracklets seen together" in said[0]


def test_calibration_separates_well_separated_people():
    features, video, track, frame, truth = people(np.random.default_rng(0), n=8, frames=12, spread=0.3)
    sigma, tau = D.calibrate(features * 3, video, track, frame)
    assert max(radius(features[truth == p]) for p in range(8)) < sigma < 0.7 and 0.3 < tau < 0.7
    assert D.pairwise_scores(D.denoise(features, video, track, frame), truth)["f1"] > 0.95


def literal_space(features, video, track, dull=0.9):
    """The space by its definition, everything in memory: (its unit rows, the prior)."""
    x, N, d = features / np.linalg.norm(features, axis=1, keepdims=True), *features.shape
    V, T = video.max() + 1, track.max() + 1
    tracklets = np.stack([x[track == t].mean(0) for t in range(T)])
    home = np.array([video[track == t][0] for t in range(T)])
    videos, count = np.stack([tracklets[home == v].mean(0) for v in range(V)]), np.bincount(home)
    within = ((tracklets - videos[home]) ** 2).sum() / (T - V)
    over = ((videos - videos.mean(0)) ** 2).sum() / (V - 1) - within * (1 / count).mean()
    prior, mean = within / over, tracklets.mean(0)
    centred = x - ((videos * count[:, None] + prior * mean) / (count[:, None] + prior))[video]
    total = centred.T @ centred / N
    trace, trace2 = np.trace(total), (total**2).sum()
    shrink = min(1, ((1 - 2 / d) * trace2 + trace**2) / ((N + 1 - 2 / d) * (trace2 - trace**2 / d)))
    values, vectors = np.linalg.eigh((1 - shrink) * total + shrink * trace / d * np.eye(d))
    white = centred @ vectors / np.sqrt(values)
    residual = white - np.stack([white[track == t].mean(0) for t in range(T)])[track]
    share, directions = np.linalg.eigh(residual.T @ residual / (N - T))
    return D.unit(white @ directions[:, share < dull]), prior


def test_the_space_equals_its_definition_and_takes_out_what_a_video_shares(monkeypatch):
    random = np.random.default_rng(0)
    features, video, track, frame, truth = people(random, n=12, videos=6, frames=10, d=20, spread=0.7)
    stained = (features + 1.5 * D.unit(random.standard_normal((6, 20)))[video]).astype(np.float32)  # each video has a background
    keep = (track % 5 > 0) | (frame > 5)  # tracklets of 4 and of 10 images
    stained, video, track, frame, truth = stained[keep], video[keep], track[keep], frame[keep], truth[keep]
    space = D.fit_space(stained, video, track)
    want, prior = literal_space(stained.astype(float), video, track)
    assert space.prior == pytest.approx(prior, rel=1e-4)
    placed = D.place(stained, video, track, frame, space, smooth=0)
    assert placed.shape == want.shape and 2 <= placed.shape[1] < 20
    assert D.fit_space(stained, video, track, most=3).matrix.shape == (20, 3)
    assert np.abs(placed @ placed.T - want @ want.T).max() < 1e-3
    gap = lambda f: (f @ f.T)[truth[:, None] == truth].mean() - (f @ f.T)[(truth[:, None] != truth)].mean()
    assert gap(placed) > 2 * gap(D.unit(stained))
    monkeypatch.setattr(D, "video_rows", lambda f, v, video_rows=D.video_rows: video_rows(f, v, 50))  # streamed
    again = D.place(stained, video, track, frame, D.fit_space(stained, video, track), smooth=0)
    assert np.abs(again @ again.T - placed @ placed.T).max() < 1e-3
    late = video == 5  # a video that comes later gets the same place in the stored space
    assert np.abs(D.place(stained[late], video[late], track[late], frame[late], space, smooth=0) - placed[late]).max() < 1e-5


def test_more_dimensions_than_tracklets_do_not_tell_apart_what_belongs_together():
    """With as many directions as tracklets there are some in which every tracklet is alone; they must not be chosen."""
    random = np.random.default_rng(0)
    features, video, track, frame, truth = people(random, n=12, videos=12, frames=10, d=300, spread=1.0)
    features = D.unit(features + 0.3 / np.sqrt(300) * random.standard_normal((144, 300))[track])  # each tracklet has a way of its own
    placed = D.place(features, video, track, frame, D.fit_space(features, video, track))
    assert D.pairwise_scores(D.denoise(placed, video, track, frame, window=12, stride=1), truth)["f1"] > 0.9


def test_the_video_prior_follows_the_data():
    random = np.random.default_rng(0)
    features, video, track, frame, _ = people(random, n=12, videos=30, frames=4, d=20)
    strong = D.fit_space(features + 3 * random.standard_normal((30, 20))[video], video, track).prior
    weak = D.fit_space(features + 0.03 * random.standard_normal((30, 20))[video], video, track).prior
    assert strong < 4 < weak  # images of the overall mean, against 48 of a video


def test_smoothing_averages_neighbours_in_time_of_the_same_tracklet():
    features = np.eye(6)
    space = D.Space(np.zeros(6, np.float32), np.float32(np.inf), np.eye(6, dtype=np.float32))
    video, track, frame = np.zeros(6, int), np.array([0, 0, 0, 1, 1, 2]), np.array([2, 0, 1, 5, 6, 0])
    placed = D.place(features, video, track, frame, space, smooth=1)
    assert (placed > 0).tolist() == (np.array([[1, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0],
                                              [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]) > 0).tolist()
    assert np.allclose(np.linalg.norm(placed, axis=1), 1)


@pytest.mark.parametrize("N, d", [(1, 4), (2, 3), (6, 300), (40, 5)])
def test_the_space_is_safe_for_few_images_and_for_images_all_alike(N, d):
    random = np.random.default_rng(0)
    video, track, frame = np.arange(N) // 4, np.arange(N) // 2, np.arange(N)
    for features in (random.standard_normal((N, d)), np.ones((N, d))):
        for center in (True, False):
            for whiten in (True, False):
                placed = D.place(features, video, track, frame, D.fit_space(features, video, track, center, whiten))
                assert np.isfinite(placed).all() and np.allclose(np.linalg.norm(placed, axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(video=np.zeros(3)), "video has 3 rows, features have 144"),
    (dict(features=np.ones(144)), r"expected \(N, d\)"),
    (dict(sigma=2.5), r"sigma=2.5: a cosine distance lies in \[0, 2\]"),
    (dict(tau=-0.1), "tau=-0.1"),
    (dict(sigma=np.nan), "sigma=nan"),
    (dict(window=8, stride=8), "ranges must overlap"),
    (dict(window=1, stride=1), "ranges must overlap"),
    (dict(window=0, stride=1), "ranges must overlap"),
    (dict(features=(7, np.nan)), "1 of 144 rows are zero or not finite, the first: row 7"),
    (dict(features=(7, 0.0)), "the first: row 7"),
    (dict(video=(5, np.nan)), "video of row 5 is nan: expected whole numbers from 0, which have an order"),
    (dict(video=(5, 0.5)), "video of row 5 is 0.5"),
    (dict(frame=(9, 0)), r"row 8 and row 9 are both of track 1, in one frame.* \(such pairs: 1\)"),
    (dict(video=(9, 2)), r"row 15 and row 9 are both of track 1, but of two videos.* \(such pairs: 1\)"),
    (dict(min_images=0), "min_images=0"),
    (dict(levels=1.5), "levels=1.5: expected 1, 2 or 3"),
    (dict(levels=4), "levels=4: expected 1, 2 or 3"),
    (dict(track=(9, -1)), "track of row 9 is -1.0: expected whole numbers from 0"),
    (dict(track=np.array(["a"] * 144)), "track: expected whole numbers"),
])
def test_wrong_input_is_named(change, message):
    features, video, track, frame, _ = people(np.random.default_rng(0))
    arguments = dict(features=features, video=video, track=track, frame=frame, sigma=0.2, tau=0.2)
    for name, value in change.items():
        if isinstance(value, tuple):
            row, value = value
            arguments[name] = arguments[name].astype(float)
            arguments[name][row] = value
        else:
            arguments[name] = value
    with pytest.raises(ValueError, match=message):
        D.denoise(**arguments)
    if not {"sigma", "tau", "window", "min_images", "levels"} & set(change) and not (isinstance(change.get("frame"), tuple)):
        arrays = [arguments[name] for name in ("features", "video", "track")]
        with pytest.raises(ValueError, match=message):
            D.fit_space(*arrays)
        with pytest.raises(ValueError, match=message):
            D.place(*arrays, arguments["frame"], D.Space(np.zeros(48, np.float32), np.float32(1), np.eye(48, dtype=np.float32)))


def test_tiny_inputs_work():
    one = np.ones((1, 4))
    zero = np.zeros(1, int)
    assert D.denoise(one, zero, zero, zero, 0.2, 0.2, min_images=1).tolist() == [0]
    assert D.denoise(one, zero, zero, zero).tolist() == [-1]  # one image is no tracklet
    pair = np.array([[1.0, 0], [1.0, 0.1]])
    assert D.denoise(pair, [0, 0], [0, 0], [0, 1], 0.2, 0.2).tolist() == [0, 0]
    assert D.denoise(pair.tolist(), [0, 0], [0, 0], [0, 1]).tolist() == [0, 0]  # one tracklet, calibrated
    opposite = np.array([[1.0, 0], [-1.0, 0.1]])
    levels = []
    assert D.denoise(opposite, [0, 0], [0, 0], [0, 1], 0.1, 0.2, report=lambda *line: levels.append(line)).tolist() == [-1, -1]
    assert levels[-1][0] == "cross video" and levels[-1][2] == (0.0, 0.0)  # nothing left after level 1


def test_rows_of_later_chunks_are_named_by_their_number(monkeypatch):
    features, video, track, frame, _ = people(np.random.default_rng(0))
    features[100] = np.nan
    monkeypatch.setattr(D, "slices", lambda n, d, *_, slices=D.slices: slices(n, d, 480))
    monkeypatch.setattr(D, "video_rows", lambda f, v, video_rows=D.video_rows: video_rows(f, v, 480))
    for function in (lambda: D.denoise(features, video, track, frame, 0.2, 0.2), lambda: D.fit_space(features, video, track)):
        with pytest.raises(ValueError, match="the first: row 100"):
            function()


@pytest.mark.parametrize("seed", range(30))
def test_level_3_ends_where_distances_are_exactly_tau(seed):
    """Three images in a chain, each pair of neighbours at tau or beyond by the last bit, all three never consistent."""
    random = np.random.default_rng(seed)
    angle = random.uniform(0.6, 0.7)
    turn = np.linalg.qr(random.standard_normal((3, 3)))[0]
    features = (np.stack([np.cos([0, angle, 2 * angle]), np.sin([0, angle, 2 * angle]), np.zeros(3)], 1) @ turn).astype(np.float32)
    tau, sigma = float(1 - features[0] @ features[1]), 1 - np.cos(angle * 0.6)
    labels = D.cross_video(features, np.arange(3), np.arange(3), np.arange(3), sigma, tau, window=2, stride=1)
    assert len(set(labels)) in (2, 3)
    alike = np.repeat(random.standard_normal((1, 5)), 24, 0).astype(np.float16)
    video, track = np.repeat(np.arange(6), 4), np.repeat(np.arange(12), 2)
    assert D.denoise(alike, video, track, np.tile([0, 1], 12), *D.calibrate(alike, video, track, np.tile([0, 1], 12)), window=2, stride=1).min() >= 0


def test_a_set_without_a_centroid_is_no_identity():
    features, zero = np.array([[1.0, 0], [-1, 0]]), np.zeros(2, int)
    assert D.denoise(features, zero, zero, np.arange(2), 0.1, 0.2).tolist() == [-1, -1]
    assert D.denoise(features, zero, np.arange(2), np.arange(2), 0.1, 2.0, min_images=1).tolist() == [0, 1]
    cross = np.concatenate([np.eye(2), -np.eye(2)])
    assert D.trim(cross, 0.1).sum() <= 1 and not D.consistent([(cross, range(4))], 2.0)


def test_one_tracklet_a_video_is_not_taken_for_a_background():
    random = np.random.default_rng(0)
    truth = np.repeat(np.arange(60) % 10, 10)
    features = D.unit(D.unit(random.standard_normal((10, 32)))[truth] + 0.05 * random.standard_normal((600, 32)))
    video, frame = np.repeat(np.arange(60), 10), np.tile(np.arange(10), 60)
    placed = D.place(features, video, video, frame, D.fit_space(features, video, video))
    labels = D.denoise(placed, video, video, frame, window=60, stride=1)
    assert D.pairwise_scores(labels, truth)["f1"] == 1


@pytest.mark.parametrize("together", [True, False])
def test_calibration_equals_its_definition(together):
    features, video, track, frame, _ = people(np.random.default_rng(3), n=5, videos=4, frames=7, d=6, spread=1.0)
    frame = frame if together else frame + 100 * track
    unit = lambda x: x / np.linalg.norm(x)
    own, halves, pairs, centroids = [], [], [], []
    for t in range(20):
        x = features[track == t].astype(float)
        own += [1 - x[i] @ unit(np.delete(x, i, 0).sum(0)) for i in range(7)]
        halves.append(1 - unit(x[:3].sum(0)) @ unit(x[3:].sum(0)))
        centroids.append(unit(x.sum(0)))
    for a in range(20):
        for b in range(a):
            if not together or set(zip(video[track == a], frame[track == a])) & set(zip(video[track == b], frame[track == b])):
                pairs.append(1 - centroids[a] @ centroids[b])
    far = np.quantile(pairs, 0.15 if together else 0.5)
    want = (np.quantile(own, 0.95) + far) / 2, (np.median(halves) + far) / 2
    assert D.calibrate(features, video, track, frame) == pytest.approx(want, abs=1e-5)


def test_thousands_of_identities_merge_and_are_measured_block_by_block():
    random = np.random.default_rng(0)
    one = D.unit(random.standard_normal((2500, 24)))
    features = np.concatenate([one, D.unit(one + 1e-3 * random.standard_normal(one.shape))])
    groups = D.merge(features, [np.array([n]) for n in range(5000)], np.arange(5000), 0.01, 0.01)
    assert sorted(map(sorted, groups)) == [[n, n + 2500] for n in range(2500)]
    assert D.noise(features, np.arange(5000), 0.01, 0.01) == (0.0, 1.0)
    assert D.noise(features, np.arange(5000) % 2500, 0.01, 0.01) == (0.0, 0.0)


def test_anomalies_join_the_nearest_identity_within_sigma_the_nearest_first():
    angle = np.deg2rad([0, 0, 60, 60, 8, 12, 25, 35])
    features = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    labels, sigma = np.array([0, 0, 1, 1, -1, -1, -1, -1]), 1 - np.cos(np.deg2rad(20))
    got = D.reallocate(features, labels, np.array([0, 1, 2, 3, 4, 4, 5, 6]), sigma)
    assert got.tolist() == [0, 0, 1, 1, 0, -1, -1, -1]  # 8 degrees took the frame of 12; 25 and 35 are too far from both
    assert D.reallocate(features, labels, np.arange(8), sigma).tolist() == [0, 0, 1, 1, 0, 0, -1, -1]
    assert D.reallocate(features, labels, np.arange(8), 1 - np.cos(np.deg2rad(26))).tolist() == [0, 0, 1, 1, 0, 0, 0, 1]


def test_options_of_denoise_reach_the_levels_and_reports_follow_the_rows_given(monkeypatch):
    features, video, track, frame, truth = people(np.random.default_rng(0), switches=3)
    score = lambda **options: D.pairwise_scores(D.denoise(features, video, track, frame, 0.4, 0.5, **options), truth)["f1"]
    assert score() == 1 > score(split=False)
    assert (D.denoise(features, video, track, frame, 0.4, 0.5, min_images=9) == -1).all()  # tracklets have 8 images
    order, levels = np.random.default_rng(1).permutation(len(track)), {}
    D.denoise(features[order], video[order], track[order], frame[order], 0.4, 0.5, report=lambda level, labels, share: levels.update({level: labels}))
    assert list(levels) == ["tracklets", "single tracklet", "single video", "cross video"]
    assert partition(levels["tracklets"]) == partition(track[order])
    assert (levels["cross video"] == D.denoise(features, video, track, frame, 0.4, 0.5)[order]).all()
    for n, level in ((1, "single tracklet"), (2, "single video"), (3, "cross video")):
        seen = {}
        got = D.denoise(features[order], video[order], track[order], frame[order], 0.4, 0.5, levels=n, report=lambda name, labels, _: seen.update({name: labels}))
        assert (got == levels[level]).all() and list(seen) == list(levels)[: n + 1] and all((seen[name] == levels[name]).all() for name in seen)
    far = dict(window=2, stride=1)  # the default window holds all three videos, this one does not; the second is of strangers
    strangers = np.where((video == 1)[:, None], -features, features)
    assert D.denoise(strangers, video, track, frame, 0.4, 0.5).max() < D.denoise(strangers, video, track, frame, 0.4, 0.5, **far).max()
    blurred = D.unit(features + features.mean(0) * 3)
    assert partition(D.split_switches(features, video, track, frame, 0.5)) != partition(D.split_switches(blurred, video, track, frame, 0.5))
    cuts = []
    monkeypatch.setattr(D, "single_tracklet", lambda f, v, t, *rest, level=D.single_tracklet: cuts.append(t) or level(f, v, t, *rest))
    D.denoise(blurred, video, track, frame, 0.4, 0.5, cut_by=features)
    assert (cuts[0] == D.split_switches(features, video, track, frame, 0.5)[np.lexsort((frame, track, video))]).all()
