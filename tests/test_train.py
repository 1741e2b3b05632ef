"""train.py: settings, schedules, and what is refused before the first step."""
import math

import numpy as np
import pytest
import torch

import train


def test_recipes_and_flags_that_override_them():
    assert train.parse_settings([]).recipe == "demo" and train.parse_settings([]).size == (64, 32)
    paper = train.parse_settings(["--data", "my/set"])
    assert (paper.recipe, paper.size, paper.K, paper.name) == ("paper", (256, 128), (2, 4, 6, 8), "set-r50ibn")
    mine = train.parse_settings(["--arch", "r10ibn", "--size", "32", "16", "--K", "2", "4", "--epochs", "1", "3", "--lr", "1e-3", "--no-head_norm"])
    assert (mine.size, mine.K, mine.epochs, mine.lr, mine.head_norm, mine.name) == ((32, 16), (2, 4), (1, 3), 1e-3, False, "walkers-r10ibn")
    assert mine.batch == train.DEMO["batch"]


def test_the_paper_recipe_is_the_papers():
    s = train.Settings()
    assert (s.size, s.local_size, s.local_crops, s.global_scale, s.local_scale, s.ratio) == ((256, 128), (128, 64), 8, (0.8, 1.0), (0.05, 0.8), (0.4, 0.6))
    assert (s.jitter, s.grey, s.blur, s.solarize) == ((0.4, 0.4, 0.2, 0.1), 0.2, (1.0, 0.1, 0.5), 0.2)
    assert (s.K, tuple(np.cumsum(s.epochs)), s.batch) == ((2, 4, 6, 8), (40, 60, 80, 100), 120 * 8)
    assert (s.prototypes, s.hidden, s.bottleneck, s.student_temp, s.teacher_temp, s.centering) == (65536, 2048, 256, 0.1, (0.04, 0.04), "ema")
    assert (s.lr, s.min_lr, s.warmup, s.weight_decay, s.clip, s.ema, s.center_momentum) == (5e-4, 1e-6, 10 / 100, (0.04, 0.4), 3.0, (0.996, 1.0), 0.9)
    first, second, local = train.view_kinds(s)
    assert (first.blur_p, second.blur_p, local.blur_p, first.solarize_p, second.solarize_p, local.copies) == (1.0, 0.1, 0.5, 0.0, 0.2, 8)


def test_every_setting_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        train.parse_settings(["--help"])
    text = capsys.readouterr().out
    for field in train.Settings.__dataclass_fields__:
        assert f"--{field}" in text
    assert "share of the image's area in a global crop" in text


@pytest.mark.parametrize("flags, message", [
    (["--arch", "resnet"], "unknown arch 'resnet'; known: r10ibn"),
    (["--batch", "30", "--K", "4", "--epochs", "1"], "--batch 30 is not divisible by K=4"),
    (["--K", "2", "4", "--epochs", "1"], "2 phases and --epochs 1"),
    (["--K", "0", "--epochs", "1"], "expected K of 1"),
    (["--recipe", "quick"], "expected paper or demo"),
    (["--centering", "none"], "expected ema or sinkhorn"),
    (["--sigma", "3"], r"lies in \[0, 2\]"),
    (["--tau", "nan"], r"lies in \[0, 2\]"),
    (["--window", "8"], "ranges must overlap"),
    (["--teacher_temp", "0"], "expected a number above 0"),
    (["--save_every", "0"], "expected a number above 0"),
    (["--warmup", "1"], "expected a share of the steps"),
    (["--lr", "-1"], "--lr -1.0: expected a number of 0 or more"),
    (["--name", "../elsewhere"], "not a path"),
    (["--canvas", "16", "16"], "smaller than --size"),
    (["--local_size", "16", "8"], "need at least 32 16"),
    (["--weights", "nothing.pt"], "nothing.pt: no such file"),
    (["--labels", "nothing.json"], "nothing.json: no such file"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train.parse_settings(flags)


def test_schedules_at_their_corners():
    lr = lambda step: train.learning_rate(step, total=100, warmup=10, peak=2.0, end=0.5)
    assert lr(0) == pytest.approx(0.2) and lr(9) == pytest.approx(2.0) and lr(10) == pytest.approx(2.0)
    assert lr(55) == pytest.approx(1.25) and lr(99) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 89 / 90)) / 2)
    assert train.cosine(0, 10, 0.04, 0.4) == pytest.approx(0.04) and train.cosine(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    assert train.cosine(10, 10, 0.996, 1.0) == pytest.approx(1.0)


def test_steps_are_counted_over_all_phases():
    labels = np.repeat(np.arange(10), 6)  # K=2: 3 groups an identity, K=4: 1, K=6: 1
    s = train.Settings(batch=12)
    assert train.plan_epochs(labels, s, (2, 4, 6), (2, 1, 1)) == [(2, 5), (2, 5), (4, 3), (6, 5)]


def test_gradients_are_clipped_one_parameter_at_a_time():
    network = torch.nn.Linear(2, 2)
    network.weight.grad, network.bias.grad = torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([0.3, 0.4])
    train.clip_gradients(network, 2.5)
    torch.testing.assert_close(network.weight.grad, torch.tensor([[1.5, 0], [0, 2]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(network.bias.grad, torch.tensor([0.3, 0.4]))
    network.bias.grad[0] = torch.inf
    with pytest.raises(FloatingPointError, match="a gradient is not finite"):
        train.clip_gradients(network, 2.5)
