"""Fine-tuning: its loss and views against their definitions, and train.py --finetune end to end."""
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, checkpoint, events
from test_end_to_end import DRIVER, PATHS, TWO, WithoutBatchStatistics, run_captured

import data
import train
from distill import Classifier, make_shifted_views, supervised_loss
from model import export, normalize

TINY = "--arch r10ibn --recipe demo --size 64 32 --batch 16 --epochs 4 --workers 0".split()


@pytest.fixture
def finetune(few, in_process, tmp_path, monkeypatch):
    """finetune(*flags) is a tiny run on a few walkers; returns its folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        in_process("train.py", "--finetune", few, *TINY, "--name", "run", *flags)
        return tmp_path / "runs" / "run"

    return call


# ---------------------------------------------------------------- loss, neck, views


def test_loss_and_gradient_are_the_definitions():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2, 3])
    features = torch.randn(9, 5, dtype=torch.double, requires_grad=True)
    weights = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    normal = F.batch_norm(features, None, None, training=True)
    loss = supervised_loss(features, normal @ weights.T, labels)

    want = 0
    for i in range(9):
        distance = [(features[i] - other).square().sum().add(1e-30).sqrt() for other in features]
        farthest = max(distance[j] for j in range(9) if labels[j] == labels[i])
        nearest = min(distance[j] for j in range(9) if labels[j] != labels[i])
        p = torch.softmax(weights @ normal[i], 0)
        want += (torch.log(1 + torch.exp(farthest - nearest)) - torch.log(p[labels[i]])) / 9
    assert loss.item() == pytest.approx(want.item(), abs=1e-9)
    inputs = features, weights
    definition = torch.autograd.grad(want, inputs, retain_graph=True)
    for mine, wanted in zip(torch.autograd.grad(loss, inputs), definition):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=0)


def test_the_classifier_is_a_norm_without_a_bias_and_a_matrix(one_process):
    torch.manual_seed(0)
    network = Classifier(WithoutBatchStatistics(), 3)
    images = torch.randn(8, 3, 8, 8)
    features, logits = network(images)
    assert torch.equal(features, network.backbone(images))
    normal = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(logits, normal @ network.classifier.weight.T)
    assert not network.neck.bias.requires_grad and not network.neck.bias.any()


def test_views_are_moved_mirrored_and_have_a_hole():
    """Each view is one of 25 places x 2, but for the hole."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 3, 50, 25), dtype=torch.uint8, generator=generator)
    views = make_shifted_views(images, generator)
    padded = normalize(F.pad(images, [2] * 4) / 255)
    places = []
    for top in range(5):
        for left in range(5):
            place = padded[:, :, top : top + 50, left : left + 25]
            places += [place, place.flip(3)]
    same = (torch.stack(places) == views).all(2)  # (50, 400, 50, 25)
    found = same.float().mean((2, 3)).max(0)
    assert len(found.indices.unique()) == 50
    assert 0.4 < (found.indices % 2).float().mean() < 0.6
    shares = []
    for i, place in enumerate(found.indices):
        hole = ~same[place, i]
        assert (views[i][:, hole] == 0).all()
        if hole.any():
            rows, columns = hole.any(1).sum(), hole.any(0).sum()
            assert hole.sum() == rows * columns
            shares.append(hole.float().mean())
    assert 160 < len(shares) < 240
    assert 0.015 < min(shares) < 0.05 and 0.3 < max(shares) < 0.42


def test_views_move_by_ten_pixels_of_256():
    images = torch.full((300, 3, 256, 128), 255, dtype=torch.uint8)
    views = make_shifted_views(images, torch.Generator().manual_seed(0))
    black = (views == normalize(torch.zeros(1, 3, 1, 1))).all(1)
    rows = black.all(2).sum(1)
    assert rows.max() == 10 and rows.min() == 0


def test_views_do_not_depend_on_the_number_of_processes():
    images = torch.randint(0, 256, (8, 3, 50, 25), dtype=torch.uint8)
    whole = make_shifted_views(images, torch.Generator().manual_seed(1))
    for rank in range(2):
        half = images[rank * 4 :][:4]
        views = make_shifted_views(half, torch.Generator().manual_seed(1), rank, 2)
        assert torch.equal(views, whole[rank * 4 :][:4])


# ---------------------------------------------------------------- steps and schedules


def test_the_recipes():
    paper = train.parse_settings(["--finetune", "Market-1501"])
    assert (paper.batch, paper.K, paper.epochs, paper.size) == (512, (4,), (120,), (256, 128))
    assert paper.name == "Market-1501-r50ibn-finetuned"
    few = train.parse_settings(["--finetune", "Market-1501", "--labels_share", "0.1"])
    assert few.name == "Market-1501-r50ibn-finetuned-0.1"
    peak = 3.2e-3
    for epoch, lr in ((0, 0.01 * peak), (10, 0.505 * peak), (20, peak), (70, 0.501 * peak)):
        assert train.finetuning_lr(paper, epoch) == pytest.approx(lr)
    assert train.finetuning_lr(paper, 119) == pytest.approx(0.0022 * peak, rel=0.05)


def test_a_step_is_sgds_and_biases_learn_twice_as_fast(finetune, monkeypatch):
    """After one step each parameter has moved by its rate times its gradient, with decay."""
    seen = {}
    optimizers = []
    make_sgd = train.make_sgd

    def noted(network):
        seen["before"] = {name: p.detach().clone() for name, p in network.named_parameters()}
        optimizer = make_sgd(network)
        optimizers.append(optimizer)
        optimizer.register_step_pre_hook(lambda *_: seen.update(
            gradient={name: p.grad for name, p in network.named_parameters()}))
        return optimizer

    monkeypatch.setattr(train, "make_sgd", noted)
    monkeypatch.setattr(train, "finetuning_lr", lambda *_: 0.1)
    after = checkpoint(finetune("--epochs", 1, "--epoch_steps", 1))["student"]
    assert not after["neck.bias"].any()
    assert after["backbone.bn1.num_batches_tracked"] == 1  # in training mode, after a measurement
    for name, gradient in seen["gradient"].items():
        if gradient is not None:
            rate = 0.2 if name.endswith("bias") else 0.1
            before = seen["before"][name]
            want = before - rate * (gradient + 1e-4 * before)
            torch.testing.assert_close(after[name], want, atol=1e-7, rtol=2e-7)
    assert [name for name in seen["before"] if seen["gradient"][name] is None] == ["neck.bias"]
    assert optimizers[0].defaults["momentum"] == 0.9


def test_two_processes_equal_one_even_when_one_is_killed(few, finetune, tmp_path, monkeypatch):
    flags = "--epochs 1 --epoch_steps 6 --save_every 2 --lr 1e-1".split()
    with monkeypatch.context() as patch:
        patch.setattr(train, "build", lambda arch: WithoutBatchStatistics())
        one = checkpoint(finetune(*flags))["student"]
    driver = DRIVER.format(paths=PATHS, make_views="make_shifted_views")
    (tmp_path / "driver.py").write_text(driver)
    command = [*TWO, "--max-restarts=1", tmp_path / "driver.py", "--finetune", few, *TINY, *flags]
    result = run_captured([*map(str, command), "--name", "two"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resume" in result.stdout and "at step 2" in result.stdout
    two = checkpoint(tmp_path / "runs" / "two")["student"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def pretrained(few, tmp_path_factory):
    """Weights of a pre-training without a step."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ["--data", few, "--arch", "r10ibn", *"--recipe demo --size 64 32 --batch 16".split()]
    flags += "--identities true --tracklet_epochs 0 --K 2 --epochs 0 --workers 0 --name run".split()
    command = [sys.executable, ROOT / "train.py", *flags]
    result = run_captured([*map(str, command)], folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "run" / "last.pt"


def test_it_learns_and_goes_on_and_is_read(few, finetune, pretrained, in_process, capsys):
    """From a checkpoint, whose network and size it has; killed in its second epoch; and evaluate.py
    reads what it leaves."""
    flags = ["--epochs", 8, "--lr", 3e-2, "--weights", pretrained]
    whole = finetune(*flags, "--name", "whole").parent / "whole"
    stages = {event["stage"]: event["mAP"] for event in events(whole, "evaluate")}
    tests = [f"epoch {epoch}" for epoch in (1, 2, 4, 5, 6)]
    assert list(stages) == ["weights", *tests, "finetuned"]
    assert stages["finetuned"] > stages["weights"] + 0.1
    steps = [event["step"] for event in events(whole, "train")]
    assert steps == [18 * epoch for epoch in range(1, 9)]  # of 289 images, 16 a step

    in_process("evaluate.py", "--data", few, "--weights", whole / "last.pt")
    assert f"mAP {stages['finetuned']:.1%}" in capsys.readouterr().out

    save = train.save

    def save_and_die(state, s):
        save(state, s)
        if state.step == 2 * 18:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", save_and_die)
        finetune(*flags)
    again = finetune(*flags)
    assert "at step 36" in capsys.readouterr().out
    one, two = checkpoint(whole), checkpoint(again)
    assert one["results"] == two["results"]
    for name, value in one["student"].items():
        assert torch.equal(two["student"][name], value)


def test_network_size_and_recipe_are_the_checkpoints_unless_given(pretrained, tmp_path):
    start = ["--finetune", "X", "--weights", str(pretrained)]
    s = train.parse_settings(start)
    assert (s.arch, s.size, s.recipe, s.batch, s.lr) == ("r10ibn", (64, 32), "demo", 64, 4e-2)
    export(pretrained, tmp_path / "cion.pth")  # which keeps no recipe
    s = train.parse_settings(["--finetune", "X", "--weights", str(tmp_path / "cion.pth")])
    assert (s.arch, s.size, s.recipe) == ("r10ibn", (64, 32), "paper")
    s = train.parse_settings([*start, "--arch", "r50ibn", "--recipe", "paper"])
    assert (s.arch, s.size, s.recipe, s.batch) == ("r50ibn", (64, 32), "paper", 512)
    torch.save({"settings": {"recipe": "none"}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: its recipe is none, not one of"):
        train.parse_settings(["--finetune", "X", "--weights", str(tmp_path / "other.pt")])


def test_so_many_people_have_labels(few, finetune, given_to):
    given = given_to(data, "sample_identities")
    drawn = given_to(train, "generator_of")
    learned = given_to(train, "supervised_loss")
    finetune("--labels_share", 0.5, "--epochs", 1, "--seed", 1)
    _, truth = data.read_training(few)
    labels, *_, seed, epoch, steps = given[0]
    assert (seed, epoch, steps) == (1, 0, (labels >= 0).sum() // 16)
    assert drawn == [[1, step] for step in range(steps)]
    batches = data.sample_identities(*given[0])
    assert [people.tolist() for _, _, people in learned] == labels[batches].tolist()
    assert set(labels) == {-1, 0, 1, 2}
    for label in range(3):
        people = truth[labels == label]
        assert len(set(people)) == 1 and len(people) == (truth == people[0]).sum()
    with pytest.raises(ValueError, match="images of other names, number or labels"):
        finetune("--labels_share", 1, "--epochs", 1, "--seed", 1)
    # two people are the least
    finetune("--labels_share", 0.1, "--epochs", 1, "--seed", 1, "--name", "fewer")
    fewer = given[-1][0]
    assert set(fewer) == {-1, 0, 1}
    assert (fewer == np.where(labels < 2, labels, -1)).all()


def test_a_seed_draws_whose_labels_are_used(few, one_process):
    drawn = set()
    for seed in "0123":
        flags = ["--finetune", str(few), "--labels_share", "0.5", "--seed", seed]
        _, labels, _ = train.read_people(train.parse_settings(flags))
        drawn.add(tuple(labels))
    assert len(drawn) == 4


@pytest.fixture
def benchmark(market, tmp_path):
    """Of Market-1501's layout, whose test people are not learned from."""
    root = tmp_path / "Market"
    shutil.copytree(market, root)
    for file in [*(root / "bounding_box_train").iterdir()]:
        person, rest = file.name.split("_", 1)
        file.rename(file.with_name(f"{int(person) + 100:04d}_{rest}"))
    return root


def test_benchmarks_training_images(benchmark, finetune, capsys):
    images = sorted((benchmark / "bounding_box_train").iterdir())
    person = images[0].name.split("_")[0]
    for image in images[1:]:
        if image.name.startswith(person):
            image.unlink()
    broken = images[-1]
    broken.write_bytes(b"broken")  # which its person's next image replaces
    folder = finetune("--finetune", benchmark, "--epochs", 1)
    assert "1 people have fewer than 4 images, which are repeated" in capsys.readouterr().out
    assert [event["stage"] for event in events(folder, "evaluate")] == ["random", "finetuned"]


def test_what_cannot_be_learned_from_is_refused(benchmark, market, few, tmp_path, finetune):
    with pytest.raises(ValueError, match="person 1 is in the training images and in the test's"):
        finetune("--finetune", market)
    shutil.rmtree(benchmark / "bounding_box_train")
    with pytest.raises(ValueError, match="Market: no images to learn from"):
        finetune("--finetune", benchmark)
    shutil.copytree(few, tmp_path / "set")
    (tmp_path / "set" / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match="set/train.json"):
        finetune("--finetune", tmp_path / "set")
    (tmp_path / "set" / "test.json").unlink()
    with pytest.raises(ValueError, match="set: expected a folder with"):
        finetune("--finetune", tmp_path / "set")


def test_msmt17_and_mars_have_training_images(tmp_path):
    """Their names tell who it is."""
    msmt17 = tmp_path / "msmt17" / "train" / "0007"
    msmt17.mkdir(parents=True)
    for name in ("0007_000_01_0303morning_0015_0", "0009_001_02_0303noon_0015_1"):
        (msmt17 / f"{name}.jpg").touch()
    tracklets, person = data.read_training(tmp_path / "msmt17")
    assert person.tolist() == [7, 9]
    assert tracklets.path(1) == "train/0007/0009_001_02_0303noon_0015_1.jpg"
    mars = tmp_path / "mars" / "bbox_train" / "0003"
    mars.mkdir(parents=True)
    (mars / "0003C1T0001F001.jpg").touch()
    tracklets, person = data.read_training(tmp_path / "mars")
    assert person.tolist() == [3] and tracklets.path(0) == "bbox_train/0003/0003C1T0001F001.jpg"
