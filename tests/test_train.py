"""train.py: settings, schedules, what a step does, runs that are stopped, killed and taken up."""
import dataclasses
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, events, full_disk, in_process, run

import data
import distill
import train

# ---------------------------------------------------------------- settings and schedules


def test_recipes_and_flags_that_override_them():
    demo = train.parse_settings([])
    assert (demo.recipe, demo.size, demo.local_size) == ("demo", (64, 32), (32, 16))
    for kind in train.view_kinds(demo):
        assert (kind.size, kind.jitter, kind.grey_p) == ((64, 32), (0.2, 0.2, 0, 0), 0)
    people = train.parse_settings(["--data", "my/set", "--recipe", "people", "--arch", "r10ibn"])
    assert (people.size, people.K, people.jitter) == ((64, 32), (2,), (0.4, 0.4, 0.2, 0.1))
    paper = train.parse_settings(["--data", "my/set"])
    assert (paper.recipe, paper.size, paper.name) == ("paper", (256, 128), "set-r50ibn")
    flags = "--arch r10ibn --K 2 4 --epochs 1 3 --lr 1e-3 --no-head_norm"
    mine = train.parse_settings(flags.split())
    assert (mine.K, mine.epochs, mine.lr, mine.head_norm) == ((2, 4), (1, 3), 1e-3, False)
    assert (mine.batch, mine.rounds, mine.name) == (64, 3, "walkers-r10ibn")
    other = train.parse_settings(["--identities", "instance", "--seed", "3"])
    assert (other.K, other.name) == ((1, 1), "walkers-3-r50ibn-instance")


def test_the_defaults_are_the_papers_recipe():
    s = train.Settings()
    assert (s.size, s.local_size, s.local_crops) == ((256, 128), (128, 64), 8)
    assert (s.K, tuple(np.cumsum(s.epochs)), s.batch) == ((2, 4, 6, 8), (40, 60, 80, 100), 120 * 8)
    assert (s.prototypes, s.head, s.student_temp, s.teacher_temp) == (65536, (2048, 256), 0.1, 0.04)
    assert (s.centering, s.loss, s.lr, s.warmup, s.ema) == ("ema", "paper", 5e-4, 0.1, (0.996, 1))
    assert (s.tracklet_epochs, s.rounds, s.freeze_last, s.grey, s.r_s) == (20, 2, 1, 0.2, 1000)
    first, second, *local = train.view_kinds(s)
    assert (first.scale, first.ratio) == ((0.8, 1.0), (0.4, 0.6))
    assert first.jitter == (0.4, 0.4, 0.2, 0.1)
    assert [kind.blur_p for kind in (first, second, *local)] == [1.0, 0.1] + [0.5] * 8
    assert [kind.solarize_p for kind in (first, second, *local)] == [0.0, 0.2] + [0.0] * 8
    assert {(kind.size, kind.scale) for kind in local} == {((128, 64), (0.05, 0.8))}


def test_every_setting_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        train.parse_settings(["--help"])
    words = capsys.readouterr().out.split()
    for field in dataclasses.fields(train.Settings):
        assert f"--{field.name}" in " ".join(words) and len(field.metadata["help"]) > 5


@pytest.mark.parametrize("flags, message", [
    ("--finetune X --data Y", "--finetune goes without"),
    ("--finetune X --labels Y", "--finetune goes without"),
    ("--finetune X --identities true", "--finetune goes without"),
    ("--finetune X --K 4 8 --epochs 1 1", "--finetune goes without"),
    ("--labels_share 0.5", "--labels_share goes with --finetune"),
    ("--finetune X --labels_share 1.5", "expected a number"),
    ("--finetune X --labels_share 0", "expected a number"),
    ("--batch 30 --K 4 --epochs 1", "--batch 30 over 1 processes is not a multiple of K=4"),
    ("--K 2 4 --epochs 1", "give each phase its epochs"),
    ("--K 0 --epochs 1", "--K 0: expected a number, 1 to inf"),
    ("--identities true --labels x.json", "goes without --labels"),
    ("--identities true --weights x.pt", "goes without --labels and --weights"),
    ("--local_scale 0.8 0.05", "expected the smaller share first"),
    ("--sigma_cst 3", "expected a number, 0 to 2"),
    ("--sigma_drm nan", "expected a number, 0 to 2"),
    ("--local_scale 0.05 1.5", "expected a number, 0.01 to 1"),
    ("--jitter 0.1 0.1 -0.1 0", "expected a number, 0 to 1"),
    ("--ema 0.9 1.01", "expected a number, 0 to 1"),
    ("--grey nan", "expected a number, 0 to 1"),
    ("--lr inf", "--lr inf: expected a number, 0 to inf"),
    ("--prototypes 1", "expected a number, 2 to inf"),
    ("--seed -1", "--seed -1: expected a number, 0 to 4294967295"),
    ("--name ../elsewhere", "not a path"),
    ("--name ..", "not a path"),
])
def test_settings_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train.parse_settings(flags.split())


@pytest.mark.parametrize(
    "flags", ["--loss dino", "--recipe quick", "--without everything", "--size 64", "--lr fast"]
)
def test_flags_that_argparse_refuses(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_settings(flags.split())
    assert flags.split()[0] in capsys.readouterr().err


def test_schedules_at_their_corners():
    """20 + 180 steps, by hand: the warm-up's end, halfway down, the last step."""
    s = train.Settings(batch=512, lr=1.0, warmup=0.1, ema=(0.9, 1.0))
    at = [train.schedule(s, step, 200) for step in range(200)]
    peak = 1.0 * 512 / 256
    lrs = [at[step]["lr"] for step in (0, 9, 19, 20)]
    assert lrs == pytest.approx([peak / 20, peak / 2, peak, peak])
    assert at[110]["lr"] == pytest.approx(1e-6 + (peak - 1e-6) / 2)
    assert at[199]["lr"] == pytest.approx(1e-6 + peak * (1 + math.cos(math.pi * 179 / 180)) / 2)
    assert [at[0]["weight_decay"], at[100]["weight_decay"]] == pytest.approx([0.04, 0.22])
    assert [at[0]["ema"], at[100]["ema"]] == pytest.approx([0.9, 0.95])
    assert at[199]["weight_decay"] == pytest.approx(0.4, abs=1e-4)


def test_identities_are_found_evenly_over_stage_2():
    s = train.Settings(K=(2, 4), epochs=(2, 4), tracklet_epochs=1, rounds=3)
    assert train.plan_epochs(s) == ([2, 2, 2, 4, 4, 4, 4], [1, 3, 5])
    assert train.plan_epochs(dataclasses.replace(s, rounds=1))[1] == [1]
    weights = dataclasses.replace(s, weights="file", rounds=2)
    assert train.plan_epochs(weights) == ([2, 2, 4, 4, 4, 4], [0, 3])
    assert train.plan_epochs(dataclasses.replace(s, labels="file")) == ([2, 2, 4, 4, 4, 4], [])
    for who in ("instance", "tracklet", "true"):  # as many epochs as cion has
        plan = train.plan_epochs(dataclasses.replace(s, identities=who))
        assert plan == ([2, 2, 2, 4, 4, 4, 4], [])


# ---------------------------------------------------------------- runs in this process

def assert_same_bits(one, other):
    for name in ("student", "teacher"):
        assert one[name].keys() == other[name].keys()
        for key in one[name]:
            assert torch.equal(one[name][key], other[name][key]), key
    assert one["results"] == other["results"]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """The checkpoint and the log of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        call = in_process.__wrapped__(monkeypatch)
        run.__wrapped__(few, call, folder, monkeypatch)()
    return checkpoint(folder / "runs" / "run"), events(folder / "runs" / "run", "train")


class Crash(BaseException):
    """The process is killed here: nothing catches it."""


@pytest.mark.parametrize("moment", ["a step", "writing", "renaming", "denoising", "evaluation"])
def test_killed_at_any_moment_it_ends_with_the_same_bits(moment, run, whole, monkeypatch):
    """The function in which the process dies is called once more by the run that goes on."""
    module, name, count = {
        "a step": (train, "update_teacher", 5),
        "writing": (train.data.os, "fsync", 3),
        "renaming": (train.data.os, "replace", 3),
        "denoising": (train, "denoise_tracklets", 2),
        "evaluation": (train, "evaluate_features", 4),
    }[moment]
    original = getattr(module, name)
    calls = []

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            if moment == "writing":
                os.ftruncate(args[0], 1000)
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dies)
    with pytest.raises(Crash):
        run("--save_every", 2)
    assert_same_bits(checkpoint(run("--save_every", 2)), whole[0])
    assert len(calls) > count


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, run, whole, monkeypatch):
    original = train.make_views

    def interrupted(*args):
        if len(seen) == 2:  # the first is the picture's
            os.kill(os.getpid(), number)
        seen.append(args)
        return original(*args)

    seen = []
    monkeypatch.setattr(train, "make_views", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + number
    folder = train.Path("runs/run")
    assert checkpoint(folder)["step"] == 2
    assert_same_bits(checkpoint(run()), whole[0])


def test_a_finished_run_is_not_run_again(run, whole, monkeypatch):
    folder = run()
    log = (folder / "log.jsonl").read_text()
    monkeypatch.setattr(train, "make_views", None)
    run("--log_every", 5)  # which changes nothing
    assert (folder / "log.jsonl").read_text() == log
    with pytest.raises(ValueError, match="other settings.*--lr 0.012 there, 0.5 here"):
        run("--lr", 0.5)
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="last.pt: cannot be read"):
        run()


def test_images_that_were_renamed_are_noticed(run, few, tmp_path):
    """Labels belong to paths: a video of another name comes elsewhere in the order."""
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    run("--data", copy, "--epochs", 0, 0)
    moved = shutil.copytree(copy, tmp_path / "moved")
    run("--data", moved, "--epochs", 0, 0)  # the same images somewhere else
    true = ["--data", copy, "--epochs", 0, 0, "--identities", "true", "--name", "true"]
    run(*true)
    truth = copy / "train.json"
    truth.write_text(truth.read_text().replace('"id": 2}', '"id": 1}'))
    with pytest.raises(ValueError, match="images of other names, number or labels"):
        run(*true)
    (copy / "train" / "video_000000").rename(copy / "train" / "video_000999")
    truth.unlink()
    with pytest.raises(ValueError, match="images of other names, number or labels"):
        run("--data", copy, "--epochs", 0, 0)


def test_two_runs_at_once_may_draw_the_same_walkers(few, run, tmp_path, monkeypatch):
    def another_was_first(root, seed):
        shutil.copytree(few, root)
        raise OSError("exists already")

    monkeypatch.setattr(train.data, "draw_walkers", another_was_first)
    assert (run("--data", "", "--epochs", 0, 0) / "last.pt").exists()
    shutil.rmtree("data")
    monkeypatch.setattr(train.data, "draw_walkers", lambda root, seed: os.listdir("/nowhere"))
    with pytest.raises(OSError, match="nowhere"):
        run("--data", "", "--epochs", 0, 0)


def test_a_full_disk_leaves_the_last_good_state(run):
    content = (run("--epochs", 0, 0) / "last.pt").read_bytes()
    with full_disk(len(content) // 2), pytest.raises(OSError, match="last.pt: cannot be written: "):
        run("--epochs", 0, 0)
    folder = run("--epochs", 0, 0)
    assert not list(folder.glob(".*"))
    # and a folder of which a run would overwrite something is not its
    (folder / "last.pt").unlink()
    with pytest.raises(ValueError, match="run: has no last.pt; give .* another --name"):
        run("--epochs", 0, 0)
    for file in folder.iterdir():
        file.unlink()
    (folder / "notes.txt").write_text("what a user writes does not matter")
    run("--epochs", 0, 0)
    torch.save({"student": {}}, folder / "last.pt")
    with pytest.raises(ValueError, match="last.pt: is not a checkpoint of train.py"):
        run("--epochs", 0, 0)


def test_a_run_without_a_step_is_no_loss(run, tmp_path):
    with pytest.raises(ValueError, match="groups of K=2 images do not fill a batch of 4096"):
        run("--batch", 4096)
    assert checkpoint(tmp_path / "runs" / "run")["step"] == 0
    assert checkpoint(run())["step"] == 9


def test_other_people_held_out_are_noticed(run, few, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(few, copy)
    run("--data", copy, "--epochs", 0, 0)
    held_out = copy / "test.json"
    held_out.write_text(held_out.read_text().replace('"id": 2}', '"id": 1}'))
    with pytest.raises(ValueError, match="images of other names, number or labels"):
        run("--data", copy, "--epochs", 0, 0)
    assert train.parse_settings(["--data", str(copy / ".hidden")]).name == "hidden-r50ibn"


def test_a_step_that_is_not_finite_leaves_the_last_good_state(run, monkeypatch):
    original = distill.identity_loss
    calls = []

    def breaks(*args):
        calls.append(args)
        return original(*args) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(train, "identity_loss", breaks)
    with pytest.raises(FloatingPointError, match="not finite by step 6"):
        run()
    last = checkpoint(train.Path("runs/run"))
    assert last["step"] == 3
    assert all(value.isfinite().all() for value in last["student"].values())


def test_a_collapse_shows_in_every_line_and_is_named_once(run, capsys):
    folder = run("--identities", "true", "--teacher_temp", 100, "--warmup", 0)
    assert capsys.readouterr().out.count("uniform collapse") == 1
    assert all(event["entropy"] > 0.99 * math.log(32) for event in events(folder, "train"))


# ---------------------------------------------------------------- two processes


def one_of_two(rank, folder):
    os.chdir(folder)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    train.signals[:] = [signal.SIGTERM] * rank
    assert train.asked_to_stop()
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank)
    optimizer = torch.optim.SGD(norm.parameters())
    state = train.State(norm, norm, optimizer, torch.zeros(1), "", step=7)
    s = train.Settings(name="run")
    train.save(state, s)
    assert (norm.running_mean == 0.5).all()
    os.chdir(("runs", folder)[rank])  # here the second one has the file, the first one has not
    state.step = 0
    with pytest.raises(ValueError, match="expected a file system that all processes share"):
        train.start(state, s, None)


def test_processes_share_signals_statistics_and_files(tmp_path):
    """One is asked to stop, and both stop; a checkpoint has the mean of what they gathered."""
    (tmp_path / "runs" / "run").mkdir(parents=True)
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    last = checkpoint(tmp_path / "runs" / "run")
    assert last["teacher"]["running_mean"].tolist() == [0.5, 0.5]


# ---------------------------------------------------------------- one step


ONE = ("--identities", "true", "--tracklet_epochs", 0, "--K", 2, "--epochs", 1)


@pytest.mark.parametrize("freeze", [0, 1])
def test_a_step_does_what_its_schedule_says(freeze, run, monkeypatch):
    monkeypatch.setattr(train, "schedule", lambda *_: {"lr": 1e-3, "weight_decay": 0.5, "ema": 0.9})
    networks = []
    seen = []
    make_networks = train.make_networks

    def ones(network):
        for parameter in network.parameters():
            parameter.grad.fill_(1)

    def note(module, inputs):
        if module.training:  # not where retrieval is measured
            seen.append(inputs[0].shape)

    def keep_first(*args):
        student, teacher = make_networks(*args)
        teacher.backbone.register_forward_pre_hook(note)
        networks.append({name: p.detach().clone() for name, p in student.named_parameters()})
        return student, teacher

    monkeypatch.setattr(train, "make_networks", keep_first)
    monkeypatch.setattr(train, "clip_gradients", ones)
    last = checkpoint(run(*ONE, "--epoch_steps", 1, "--freeze_last", freeze))
    for name, old in networks[0].items():
        new = last["student"][name]
        torch.testing.assert_close(last["teacher"][name], 0.9 * old + 0.1 * new, atol=1e-6, rtol=0)
    prototypes = "head.last_layer.weight"
    assert torch.equal(last["student"][prototypes], networks[0][prototypes]) == bool(freeze)
    assert not torch.equal(last["student"]["head.mlp.0.bias"], networks[0]["head.mlp.0.bias"])
    decaying, others = last["optimizer"]["param_groups"]
    assert (decaying["lr"], decaying["weight_decay"]) == (1e-3, 0.5)
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0)
    assert len(others["params"]) == sum(p.ndim == 1 for p in networks[0].values())
    for moments in last["optimizer"]["state"].values():  # of the gradients as they were clipped
        torch.testing.assert_close(moments["exp_avg"], torch.full_like(moments["exp_avg"], 0.1))
    assert seen == [(2 * 16, 3, 64, 32)]  # the teacher's, both global views
    assert "head.mlp.5.running_mean" in last["student"]


def test_resnets_run_in_channels_last_and_others_do_not(one_process):
    for arch, last in (("r10ibn", True), ("vit_tiny", False)):
        backbone = train.make_backbone(train.Settings(arch=arch), torch.device("cpu"))
        weight = next(p for p in backbone.parameters() if p.dim() == 4)
        assert weight.is_contiguous(memory_format=torch.channels_last) == last


def test_the_teacher_normalises_by_its_own_batch(run):
    """Features are made before the first step, in eval mode."""
    last = checkpoint(run(*ONE, "--epoch_steps", 0, "--batch", 128))  # 305 images fill two
    assert last["teacher"]["backbone.bn1.num_batches_tracked"] == last["step"] == 2


def test_the_loss_is_given_what_the_settings_say(run, given_to):
    given = given_to(train, "identity_loss")
    run(*ONE, "--loss", "release", "--student_temp", 0.2, "--teacher_temp", 0.03)
    student, teacher, _, *others = given[0]
    assert student.shape == (4, 16, 32) and teacher.shape == (2, 16, 32)
    assert others == [2, 0.2, 0.03, "release"]


def test_the_running_center_moves_after_it_was_used(run, given_to):
    given = given_to(train, "identity_loss")
    last = checkpoint(run(*ONE, "--centering", "ema", "--epoch_steps", 2))
    (_, first, center, *_), (_, second, moved, *_) = given
    assert not center.any()
    torch.testing.assert_close(moved, 0.1 * first.mean((0, 1)))
    torch.testing.assert_close(last["center"], 0.9 * moved + 0.1 * second.mean((0, 1)))


def test_sinkhorn_has_the_teachers_temperature(run, given_to):
    given = given_to(train, "identity_loss")
    run(*ONE, "--centering", "sinkhorn", "--teacher_temp", 0.07)
    _, teacher, center, *_ = given[0]
    torch.testing.assert_close(center, distill.sinkhorn(teacher, 0.07))


def test_a_step_has_its_own_random_numbers_and_a_seed_too():
    drawn = {}
    for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**32 - 1, 1)):
        drawn[key] = torch.rand(4, generator=train.generator_of(*key))
        assert torch.equal(drawn[key], torch.rand(4, generator=train.generator_of(*key)))
    assert len({tuple(numbers.tolist()) for numbers in drawn.values()}) == len(drawn)


def test_gradients_are_clipped_one_parameter_at_a_time():
    network = torch.nn.Linear(2, 2)
    network.weight.grad = torch.tensor([[3.0, 0], [0, 4]])
    network.bias.grad = torch.tensor([0.3, 0.4])
    train.clip_gradients(network, 2.5)
    torch.testing.assert_close(network.weight.grad, torch.tensor([[1.5, 0], [0, 2]]))
    torch.testing.assert_close(network.bias.grad, torch.tensor([0.3, 0.4]))


def test_bfloat16_goes_the_same_way_and_a_run_goes_on_in_it(run, whole):
    steps = whole[1]
    folder = run("--precision", "bfloat16")
    losses = [event["loss"] for event in events(folder, "train")]
    assert losses[:3] != [event["loss"] for event in steps[:3]]
    np.testing.assert_allclose(losses[:3], [event["loss"] for event in steps[:3]], atol=0.05)


def test_workers_change_nothing_and_a_seed_everything(run, whole, given_to):
    assert_same_bits(checkpoint(run("--workers", 2)), whole[0])
    sampled = given_to(data, "sample_identities")
    drawn = given_to(train, "generator_of")
    other = checkpoint(run("--name", "other", "--seed", 1))
    assert [args[3:5] for args in sampled] == [[1, epoch] for epoch in range(3)]
    assert drawn == [[1, step] for step in (0, *range(9))]  # the first is the picture's
    assert other["results"]["random"] != whole[0]["results"]["random"]


# ---------------------------------------------------------------- who teaches whom


def test_who_teaches_whom_changes_nothing_else(run, whole, few, given_to):
    """--identities: the same steps and schedules, on other identities."""
    t = data.read_tracklets(few / "train")
    truth = data.read_labels(few / "train.json", t)
    given = given_to(data, "sample_identities")
    for who, labels in (("instance", np.arange(len(t))), ("tracklet", t.track), ("true", truth)):
        given.clear()
        folder = run("--identities", who, "--name", who)
        assert len(given) == 3 and all(np.array_equal(args[0], labels) for args in given)
        assert all(np.array_equal(args[6], t.video) for args in given)
        assert [event["stage"] for event in events(folder, "evaluate")] == ["random", who]
        for event, other in zip(events(folder, "train"), whole[1], strict=True):
            assert event["K"] == (1 if who == "instance" else other["K"])
            for key in ("step", "lr", "ema"):
                assert event[key] == other[key]


@pytest.mark.parametrize("levels", [1, 2])
def test_denoising_up_to_a_level(levels, run, few):
    """--levels 1 keeps identities within tracklets, --levels 2 within videos."""
    t = data.read_tracklets(few / "train")
    labels = data.read_labels(run("--levels", levels, "--rounds", 1) / "identities.json", t)
    for identity in range(labels.max() + 1):
        within = (t.track, t.video)[levels - 1][labels == identity]
        assert len(np.unique(within)) == 1


def test_flags_of_denoising_reach_it(run, monkeypatch):
    given = {}
    denoise_tracklets = train.denoise_tracklets

    def noted(*args, **options):
        given.update(options)
        return denoise_tracklets(*args, **options)

    monkeypatch.setattr(train, "denoise_tracklets", noted)
    run("--rounds", 1, "--paper", "--sigma_cst", 0.9, "--r_s", 7, "--without", "cut", "whiten")
    expected = {"paper": True, "sigma_cst": 0.9, "sigma_drm": None, "r_s": 7, "levels": 3}
    assert given == expected | {"without": ("cut", "whiten")}


def test_the_readmes_commands_can_split_their_batches(monkeypatch):
    lines = re.findall(r"torchrun (.*?)train\.py([^#`\n]*)", (ROOT / "README.md").read_text())
    assert len(lines) >= 3
    for launcher, flags in lines:
        processes = re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", launcher)
        monkeypatch.setenv("WORLD_SIZE", str(math.prod(map(int, processes))))
        train.parse_settings(flags.split())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--batch 28 over 2 processes is not a multiple of K=4"):
        train.parse_settings("--batch 28 --K 4 --epochs 1".split())


def test_only_sizes_of_views_that_are_made_are_tried(one_process, given_to):
    tried = given_to(train, "check_sizes")
    for flags in ("--local_crops 2", "--local_crops 0", "--local_crops 2 --finetune X"):
        s = train.parse_settings([*"--arch r10ibn --size 64 32".split(), *flags.split()])
        train.make_backbone(s, torch.device("cpu"))
    assert [sizes for _, _, sizes in tried] == [[(64, 32), (32, 16)], [(64, 32)], [(64, 32)]]
