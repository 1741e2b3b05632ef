"""The run, from video tracklets to mAP (paper, section 3 and appendix).

    torchrun train.py --arch r10ibn                     # walkers, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data DIR     # your tracklets, the paper's recipe
    torchrun train.py --finetune DIR --weights FILE     # supervised, on a benchmark

Stage 1 learns from raw tracklets, denoising finds people with that encoder, stage 2 learns from
them, and retrieval of people never seen says what it was worth. Fine-tuning learns from people who
are known.

Read first: `train_epoch`, `pretrain`, `finetune`.
"""
import argparse
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from denoise import ADDITIONS, OPTIONS, denoise_tracklets, extract_features, show_identities
from distill import (
    Classifier,
    Network,
    Views,
    all_mean,
    collapse,
    identity_loss,
    make_shifted_views,
    make_views,
    sinkhorn,
    supervised_loss,
    teacher_statistics,
    update_center,
    update_teacher,
)
from evaluate import (
    evaluate_features,
    extract,
    join_processes,
    label_tracklets,
    read_benchmark,
    show_retrieval,
)
from model import (
    Head,
    build,
    check_sizes,
    describe,
    load_weights,
    normalize,
    read_checkpoint,
    sync_batch_norm,
    write_checkpoint,
)

# ---------------------------------------------------------------- settings


def setting(default, help, low=None, high=math.inf, choices=None):
    """A field of Settings: its default, its flag's help, and the values that are allowed."""
    limits = {"help": help, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=limits)


@dataclass
class Settings:
    """Every flag of the run. Defaults are the paper's recipe for ResNet50-IBN; where the paper is
    silent, the released code's."""

    arch: str = setting("r50ibn", "backbone; `python model.py` lists them")
    data: str = setting("", "folder of tracklets, <video>/<track>_<frame>_<det>.jpg; none: walkers")
    recipe: str = setting("", "default: demo, for walkers", choices=("paper", "demo", "people"))
    name: str = setting("", "folder below runs/; the same command goes on with what is there")
    weights: str = setting("", "backbone weights that replace stage 1, or that are fine-tuned")
    labels: str = setting("", "annotation JSON that replaces stage 1 and denoising")
    identities: str = setting(
        "cion",
        "who teaches whom: cion (denoised), instance (itself: DINO), tracklet (raw), true",
        choices=("cion", "instance", "tracklet", "true"),
    )
    seed: int = setting(0, "of everything random", 0, 2**32 - 1)

    # fine-tuning, whose other defaults are FINETUNING's, below
    finetune: str = setting("", "benchmark, or folder with train.json, to learn from supervised")
    labels_share: float = setting(1.0, "of the people, whose labels are used", 1e-3, 1)

    # views
    size: tuple = setting((256, 128), "height, width of global crops; local ones have half", 32)
    local_crops: int = setting(8, "how many, for the student only", 0)
    local_scale: tuple = setting((0.05, 0.8), "share of the image in a local crop", 0.01, 1)
    jitter: tuple = setting((0.4, 0.4, 0.2, 0.1), "brightness, contrast, saturation, hue", 0, 1)
    grey: float = setting(0.2, "probability of a grey view", 0, 1)
    blur: tuple = setting((1.0, 0.1, 0.5), "probability: first, second global, local view", 0, 1)
    solarize: float = setting(0.2, "probability, second global view", 0, 1)

    # batches and phases
    batch: int = setting(960, "images of a step, over all processes", 1)
    tracklet_epochs: int = setting(20, "stage 1, on raw tracklets, with the first of the K", 0)
    K: tuple = setting((2, 4, 6, 8), "images of each identity in a batch, phase by phase", 1)
    epochs: tuple = setting((40, 20, 20, 20), "epochs of each phase of stage 2", 0)
    rounds: int = setting(2, "how often identities are found, evenly over stage 2", 1)
    epoch_steps: int = setting(0, "steps of an epoch; 0: as many as the images fill", 0)

    # head and loss
    prototypes: int = setting(65536, "D, the width of the head's output", 2)
    head: tuple = setting((2048, 256), "widths of its layers and of its bottleneck", 1)
    head_norm: bool = setting(False, "batch norm (no affine) before the head's L2 norm")
    loss: str = setting("paper", "eq. 9, or the released code's", choices=("paper", "release"))
    centering: str = setting("ema", "of the teacher's logits", choices=("ema", "sinkhorn"))
    student_temp: float = setting(0.1, "softmax temperature", 1e-3)
    teacher_temp: float = setting(0.04, "softmax temperature; lower is sharper", 1e-3)

    # optimiser
    lr: float = setting(5e-4, "AdamW, for 256 images; scaled by batch / 256", 0)
    warmup: float = setting(0.1, "share of the steps over which lr rises from 0", 0, 0.99)
    ema: tuple = setting((0.996, 1.0), "the teacher's momentum, first and last step", 0, 1)
    freeze_last: int = setting(1, "epochs in which the prototypes stay as they are", 0)

    # denoising
    paper: bool = setting(False, "the paper's equations alone, without our additions")
    sigma_cst: float = setting(None, "intra-identity consistency (none: calibrated)", 0, 2)
    sigma_drm: float = setting(None, "inter-identity discrimination, likewise", 0, 2)
    r_s: int = setting(1000, "half-width of the sliding range, in tracklets", 1, 2**31 - 1)
    levels: int = setting(3, "1 within tracklets, 2 within videos, 3 across videos", 1, 3)
    without: tuple = setting((), "additions of ours that are left out", choices=ADDITIONS)

    # this machine
    precision: str = setting(
        "auto",
        "of the networks; auto: bfloat16 on a GPU that has it",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = setting(False, "torch.compile the backbone: a slow start, faster steps")
    workers: int = setting(4, "processes that decode images, for each that trains", 0)
    log_every: int = setting(20, "steps between log lines", 1)
    save_every: int = setting(500, "steps between checkpoints, beside each epoch's", 1)

    @property
    def folder(self) -> Path:
        """Where the run leaves what it makes."""
        return Path("runs") / self.name

    @property
    def local_size(self) -> tuple:
        """Height and width of local crops."""
        return self.size[0] // 2, self.size[1] // 2


# The demo differs from the paper where a short run on small images needs it; docs/training.md says
# why, line by line.
DEMO = {
    "size": (64, 32),
    "local_crops": 0,
    "jitter": (0.2, 0.2, 0.0, 0.0),
    "grey": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarize": 0.0,
    "batch": 64,
    "tracklet_epochs": 1,
    "K": (2, 4),
    "epochs": (2, 4),
    "rounds": 3,
    "prototypes": 256,
    "head": (512, 64),
    "head_norm": True,
    "centering": "sinkhorn",
    "lr": 1.2e-2,
    "ema": (0.5, 0.5),
    "freeze_last": 0,
    "r_s": 130,
    "workers": 1,
}
# Real people in half an hour: cameras differ more than those of walkers, and learning is slower.
PEOPLE = DEMO | {
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "tracklet_epochs": 4,
    "K": (2,),
    "epochs": (36,),
    "rounds": 9,
    "r_s": 300,
}
RECIPES = {"paper": {}, "demo": DEMO, "people": PEOPLE}
# What --finetune changes in them: to the released trainer's, as it was used for Market-1501; in the
# others, to what suits some minutes on a laptop.
FINETUNING = {"batch": 512, "K": (4,), "epochs": (120,), "lr": 1.6e-3, "warmup": 1 / 6}
SHORT_FINETUNING = FINETUNING | {"batch": 64, "epochs": (20,), "lr": 4e-2}
ANY_NUMBER = {"K", "epochs", "without"}  # of values
# what a run makes, beside last.pt
MADE = {"log.jsonl", "identities.json", "crops.jpg", "denoised.jpg", "retrieval.jpg"}
# what changes nothing in its result; what is read is compared for itself
CHANGE_NOTHING = {"name", "data", "finetune", "labels", "labels_share"}
CHANGE_NOTHING |= {"workers", "log_every", "save_every"}


def parse_flags(argv):
    """The flags that are given, a dict."""
    parser = argparse.ArgumentParser(
        description="Pre-train on tracklets, or fine-tune (docs/finetuning.md has its defaults). "
        "Defaults in brackets are the paper's recipe for pre-training.",
        usage="train.py [--FLAG VALUE ...]",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in fields(Settings):
        options = {"help": f"{f.metadata['help']} [{f.default}]"}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["choices"] = f.metadata["choices"]
            options["type"] = f.type
        if f.type is tuple:
            options["type"] = type(f.default[0]) if f.default else str
            options["nargs"] = "+" if f.name in ANY_NUMBER else len(f.default)
        parser.add_argument(f"--{f.name}", **options)
    return vars(parser.parse_args(argv))


def parse_settings(argv=None):
    """Settings from the recipe and the flags that override it. Raises ValueError where they cannot
    work."""
    given = parse_flags(argv)
    if "finetune" in given and "weights" in given:
        # unless they are given, network and recipe are those of the checkpoint
        made = read_checkpoint(given["weights"]).get("settings")
        if isinstance(made, dict):
            kept = {"arch", "recipe", "size"} & made.keys()
            given = {name: made[name] for name in kept} | given
    own_data = given.get("data") or given.get("finetune")
    recipe = given.get("recipe") or ("paper" if own_data else "demo")
    if recipe not in RECIPES:  # argparse has not seen a checkpoint's
        raise ValueError(f"{given['weights']}: its recipe is {recipe}, not one of {[*RECIPES]}")
    s = Settings(recipe=recipe, **RECIPES[recipe])
    if "finetune" in given:
        vars(s).update(FINETUNING if recipe == "paper" else SHORT_FINETUNING)
    for name, value in given.items():
        setattr(s, name, tuple(value) if isinstance(value, list) else value)
    if s.identities == "instance":
        s.K = (1,) * len(s.K)
    if not s.name:
        folder = data_folder(s).resolve().name.lstrip(".")  # a hidden name would be refused
        s.name = f"{folder}-{s.arch.replace('/', '-')}"
        if s.identities != "cion":
            s.name += f"-{s.identities}"
        if s.finetune:
            s.name += "-finetuned"
        if s.labels_share < 1:
            s.name += f"-{s.labels_share:g}"
    check_settings(s)
    return s


def check_settings(s):
    """Raises ValueError for settings that cannot work, before anything is read or drawn."""
    for f in fields(Settings):
        low = f.metadata["low"]
        high = f.metadata["high"]
        for value in np.atleast_1d(getattr(s, f.name)):
            # not (a and b), so that nan is refused too; no setting may be infinite
            if None not in (low, value) and not (low <= value <= high and value < math.inf):
                raise ValueError(f"--{f.name} {value}: expected a number, {low} to {high}")
    if len(s.K) != len(s.epochs):
        raise ValueError(f"--K {s.K} and --epochs {s.epochs}: give each phase its epochs")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    for K in s.K:
        if s.batch % (processes * K):
            raise ValueError(
                f"--batch {s.batch} over {processes} processes is not a multiple of K={K}: "
                "identities are not split"
            )
    if s.local_scale[0] > s.local_scale[1]:
        raise ValueError(f"--local_scale {s.local_scale}: expected the smaller share first")
    if s.name != Path(s.name).name or s.name.startswith("."):
        raise ValueError(f"--name {s.name}: expected the name of a folder below runs/, not a path")
    if s.identities != "cion" and (s.labels or s.weights):
        raise ValueError(f"--identities {s.identities} goes without --labels and --weights")
    if s.finetune and (s.data or s.labels or s.identities != "cion" or len(s.K) > 1):
        wrong = "--data, --labels, --identities and a second value of --K and --epochs"
        raise ValueError(f"--finetune goes without {wrong}")
    if s.labels_share < 1 and not s.finetune:
        raise ValueError("--labels_share goes with --finetune")


def data_folder(s):
    """Where the images are; another seed draws other walkers."""
    walkers = f"data/walkers-{s.seed}" if s.seed else "data/walkers"
    return Path(s.finetune or s.data or walkers)


# ---------------------------------------------------------------- schedules


def cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def schedule(s, step, total):
    """What changes from step to step, at a step of the whole run, 0 to total - 1."""
    warmup = max(1, round(s.warmup * total))
    peak = s.lr * s.batch / 256
    if step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        lr = cosine(step - warmup, total - warmup, peak, 1e-6)
    weight_decay = cosine(step, total, 0.04, 0.4)
    return {"lr": lr, "weight_decay": weight_decay, "ema": cosine(step, total, *s.ema)}


def finetuning_lr(s, epoch):
    """The learning rate of an epoch: it rises from 0.01 of the peak over the warm-up, then falls by
    a cosine towards 0.002 of it."""
    peak = s.lr * s.batch / 256
    total = s.epochs[0]
    warmup = round(s.warmup * total)
    if epoch < warmup:
        return peak * (0.01 + 0.99 * epoch / warmup)
    return cosine(epoch - warmup, total - warmup, peak, 0.002 * peak)


def plan_epochs(s):
    """K of every epoch, and the epochs before which identities are found."""
    first = 0 if s.weights or s.labels else s.tracklet_epochs
    Ks = [s.K[0]] * first
    for K, epochs in zip(s.K, s.epochs):
        Ks += [K] * epochs
    if s.identities != "cion" or s.labels:
        return Ks, []
    finds = {first + i * sum(s.epochs) // s.rounds for i in range(s.rounds)}
    return Ks, sorted(finds)


# ---------------------------------------------------------------- processes


@functools.cache
def waiting_group():
    """The processes once more, to wait for each other on the CPU: for hours, where the first one
    denoises. In the other group, a process that waits for minutes is taken for lost."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def say(what, text):
    """One line on the first process's terminal."""
    if dist.get_rank() == 0:
        print(f"{what:<9}{text}", flush=True)


say_once = functools.cache(say)


def log(s, event, **values):
    """One line in log.jsonl."""
    if dist.get_rank() == 0:
        with open(s.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")


signals = []  # that came while steps are made


def note_signal(number, frame):
    """Ctrl-C or SIGTERM while steps are made: the run ends after this one, see `save_where_due`."""
    signals.append(number)


def leave(number=signal.SIGTERM, frame=None):
    """Ctrl-C or SIGTERM at other times: the run ends at once, with 128 + the signal's number."""
    say("stopped", "the same command goes on from the last checkpoint")
    sys.exit(128 + (signals or [number])[0])


@contextmanager
def stopping_after_a_step():
    """Within this, signals wait for the end of a step; after it they end the run at once."""
    on_signals(note_signal)
    yield
    if asked_to_stop():
        leave()
    on_signals(leave)


def on_signals(handler):
    """From now on, Ctrl-C and SIGTERM call the handler."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


# ---------------------------------------------------------------- the state of a run


@dataclass
class State:
    """What a run has come to: all that a checkpoint holds, but for the settings."""

    student: Network
    teacher: Network
    optimizer: torch.optim.Optimizer
    center: torch.Tensor  # (D,), the running center of the teacher's logits
    images: str  # a digest of the indices and of their labels
    step: int = 0
    rounds: int = 0  # how often identities were found
    labels: torch.Tensor | None = None  # int32 (N,), the identities found last
    results: dict = field(default_factory=dict)  # retrieval, by stage


def make_backbone(s, device):
    """The backbone, from the seed the same on every process. Raises ValueError for an architecture
    that is unknown or cannot take the views, and for weights that are not its own."""
    torch.manual_seed(s.seed)
    backbone = build(s.arch)
    sizes = [s.size]
    if s.local_crops and not s.finetune:
        sizes.append(s.local_size)
    check_sizes(backbone, s.arch, sizes)
    million = sum(p.numel() for p in backbone.parameters()) / 1e6
    processes = f"{dist.get_world_size()} x {device.type}"
    say("network", f"{s.arch}, {million:.1f} M parameters, recipe {s.recipe}, {processes}")
    if s.weights:
        say("weights", f"{s.weights}: {describe(load_weights(backbone, s.weights))}")
    # weights in the format that a backbone asks for are enough: its convolutions bring what they
    # are given into the same one
    return backbone.to(memory_format=getattr(backbone, "memory_format", torch.contiguous_format))


def make_networks(s, device):
    """Student and teacher; see `make_backbone`."""
    backbone = make_backbone(s, device)
    head = Head(backbone.embed_dim, s.prototypes, *s.head, s.head_norm)
    student = Network(backbone, head).to(device)
    if device.type == "cuda":
        student = sync_batch_norm(student)  # statistics over all processes; CPUs keep their own
    teacher = copy.deepcopy(student).requires_grad_(False)
    if s.compile:
        student.backbone.compile(dynamic=False)
        teacher.backbone.compile(dynamic=False)
    return student, teacher


def make_optimizer(student):
    """AdamW. Matrices and kernels decay, biases and norms do not."""
    decaying = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def make_sgd(network):
    """The optimizer of fine-tuning: all weights, then all biases, which learn at twice the rate."""
    named = list(network.named_parameters())
    weights = [parameter for name, parameter in named if not name.endswith("bias")]
    biases = [parameter for name, parameter in named if name.endswith("bias")]
    groups = [{"params": weights}, {"params": biases}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=1e-4)


def save(state, s):
    """Write last.pt, which appears whole or not at all. Raises FloatingPointError, and leaves the
    old one, where a parameter is not finite."""
    for parameter in state.student.parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"the student is not finite by step {state.step}; {s.folder}/last.pt is the last "
                f"good state. Try a lower --lr (now {s.lr}) under another --name"
            )
    # Each process gathers batch-norm statistics from its own images: their mean counts. (Where the
    # student is its own teacher, DistributedDataParallel keeps those of the first process.)
    for buffer in state.teacher.buffers():
        if buffer.is_floating_point():
            all_mean(buffer)
    if dist.get_rank() == 0:
        checkpoint = vars(state) | {"settings": asdict(s)}
        for name in ("student", "teacher", "optimizer"):
            checkpoint[name] = checkpoint[name].state_dict()
        write_checkpoint(s.folder / "last.pt", checkpoint)
    dist.barrier(group=waiting_group())


def start(state, s, benchmark):
    """Go on from last.pt or, where no step was made, measure what the run begins with. Raises
    ValueError where last.pt was made with other settings or images, is damaged, or is not there for
    every process, and where others' files are."""
    s.folder.mkdir(parents=True, exist_ok=True)
    file = s.folder / "last.pt"
    if file.exists():
        found = read_checkpoint(file)
        if not isinstance(found.get("settings"), dict):
            raise ValueError(f"{file}: is not a checkpoint of train.py")
        differ = []
        for name, value in asdict(s).items():
            then = found["settings"].get(name)
            if name not in CHANGE_NOTHING and then != value:
                differ.append(f"--{name} {then} there, {value} here")
        if found.get("images") != state.images:
            differ.append("images of other names, number or labels")
        # a run that came to no step is no loss
        if differ and found.get("step") != 0:
            raise ValueError(
                f"{s.folder} was made with other settings ({'; '.join(differ)}); give this run "
                "another --name, or delete the folder"
            )
        if not differ:
            for name in ("student", "teacher", "optimizer"):
                getattr(state, name).load_state_dict(found[name])
            state.center.copy_(found["center"])
            for name in ("step", "rounds", "labels", "results"):
                setattr(state, name, found[name])
            say("resume", f"{s.folder} at step {state.step:,}")
    elif MADE & set(os.listdir(s.folder)):
        raise ValueError(f"{s.folder}: has no last.pt; give this run another --name, or delete it")
    step = torch.tensor(state.step, dtype=torch.float64, device=state.center.device)
    if all_mean(step) != state.step:
        raise ValueError(f"{s.folder}: expected a file system that all processes share")
    if state.step == 0:
        save(state, s)  # from now on the folder is this run's
        measure(s, state, benchmark, "weights" if s.weights else "random")


def save_where_due(state, s, steps):
    """Save every so many steps, at the end of an epoch of `steps`, and where a signal asks for the
    end of the run, which this is then."""
    asked = asked_to_stop()
    if asked or 0 in (state.step % s.save_every, state.step % steps):
        save(state, s)
    if asked:
        leave()


def asked_to_stop():
    """Whether a signal has reached any process; on the CPU, so that no device waits."""
    asked = torch.tensor(len(signals))
    dist.all_reduce(asked, group=waiting_group())
    return bool(asked)


# ---------------------------------------------------------------- training


def train_epoch(state, network, s, tracklets, labels, Ks, epoch, steps):
    """Identity-guided self-distillation on labels (N,), from state.step to the end of an epoch of
    so many steps. network: the student, as DistributedDataParallel wraps it. Ks: of all epochs."""
    K = Ks[epoch]
    total = len(Ks) * steps
    since = state.step, time.time()
    batches = data.sample_identities(labels, K, s.batch, s.seed, epoch, steps, tracklets.video)
    state.teacher.train()  # it normalises by its own batch, as the student does
    for images in load_epoch(state, s, tracklets, batches):
        # this step's schedule and its own random numbers, so that a resumed run repeats it
        now = follow_schedule(state, s, total)
        generator = generator_of(s.seed, state.step)

        # the teacher sees the two global views, the student all
        views = make_views(images, view_kinds(s), generator, dist.get_rank(), dist.get_world_size())
        with networks_in_bfloat16(s, images.device):
            with torch.no_grad():
                teacher = state.teacher(views[:2])  # logits (2, B, D)
            student = network(views)  # logits (V, B, D)

        # what the teacher says of one view, the student learns to say of its identity's others
        center = state.center
        if s.centering == "sinkhorn":
            center = sinkhorn(teacher, s.teacher_temp)
        loss = identity_loss(student, teacher, center, K, s.student_temp, s.teacher_temp, s.loss)
        loss.backward()
        clip_gradients(state.student)
        if epoch < s.freeze_last:
            state.student.head.last_layer.weight.grad = None
        state.optimizer.step()
        state.optimizer.zero_grad()

        # the next step's center and teacher
        state.center = update_center(state.center, teacher)
        update_teacher(state.teacher, state.student, now["ema"])
        state.step += 1

        if state.step % s.log_every == 0 or state.step == total:
            log_step(state, s, K, total, now, loss, teacher, center, since)
        save_where_due(state, s, steps)


def generator_of(seed, step):
    """The random numbers of a step. (Of a generator's seed only 32 bits count.)"""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def load_epoch(state, s, tracklets, batches):
    """Yields uint8 images (B, 3, H, W) of every step of an epoch that is still to come: of its row
    of batches (steps, batch), K images of each identity side by side, this process's columns."""
    share = s.batch // dist.get_world_size()
    first = dist.get_rank() * share
    mine = batches[state.step % len(batches) :, first : first + share]
    for images in data.load_batches(tracklets, list(mine), s.size, s.workers):
        yield images.to(state.center.device, non_blocking=True)


def follow_schedule(state, s, total):
    """Set this step's learning rate, and weight decay for the parameters that have any."""
    now = schedule(s, state.step, total)
    for group in state.optimizer.param_groups:
        group["lr"] = now["lr"]
    state.optimizer.param_groups[0]["weight_decay"] = now["weight_decay"]
    return now


def view_kinds(s):
    """The views of an image by the recipe: two global ones, then the local ones."""
    colours = {"jitter": s.jitter, "grey_p": s.grey}
    first = Views(s.size, blur_p=s.blur[0], **colours)
    second = Views(s.size, blur_p=s.blur[1], solarize_p=s.solarize, **colours)
    local = Views(s.local_size, s.local_scale, blur_p=s.blur[2], **colours)
    return [first, second] + [local] * s.local_crops


def networks_in_bfloat16(s, device):
    """The context in which networks compute, in bfloat16 where it is asked for. Their logits, the
    loss, parameters and the optimizer are float32 anyway."""
    enabled = s.precision == "bfloat16"
    if s.precision == "auto" and device.type == "cuda":
        enabled = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def clip_gradients(network, largest=3.0):
    """Scale each parameter's gradient down to a norm of `largest` (DINO)."""
    for parameter in network.parameters():
        nn.utils.clip_grad_norm_(parameter, largest)


def log_step(state, s, K, total, now, loss, teacher, center, since):
    """A line on the terminal and in log.jsonl; a warning, once, where the teacher has collapsed.
    now: the schedule; teacher: logits (2, B, D); since: step and time from which speed counts."""
    rate = (state.step - since[0]) * s.batch / (time.time() - since[1])
    p = torch.softmax((teacher - center) / s.teacher_temp, dim=-1)
    entropy, used = teacher_statistics(p)
    loss = all_mean(loss.detach()).item()
    uniform = math.log(s.prototypes)
    left = timedelta(seconds=round((total - state.step) * s.batch / rate))
    say(
        "",
        f"step {state.step:>5,}/{total:,}  K {K}  loss {loss:.3f} of {uniform:.3f}  "
        f"entropy {entropy / uniform:4.0%}  used {used:,}  lr {now['lr']:.1e}  "
        f"{rate:6,.0f} images/s  {left} left",
    )
    figures = {"loss": loss, "entropy": entropy, "prototypes_used": used, "images_per_second": rate}
    log(s, "train", stage=stage_name(s, state), step=state.step, K=K, **figures, **now)
    words = collapse(entropy, used, s.prototypes, s.batch // K)
    if words and state.step > s.warmup * total:
        say_once("warning", words)


def finetune_epoch(state, network, s, tracklets, labels, epoch, steps):
    """Supervised learning of labels (N,), from state.step to the end of an epoch of so many steps.
    network: a `Classifier`, as DistributedDataParallel wraps it."""
    lr = finetuning_lr(s, epoch)
    weights, biases = state.optimizer.param_groups
    weights["lr"] = lr
    biases["lr"] = 2 * lr
    batches = data.sample_identities(labels, s.K[0], s.batch, s.seed, epoch, steps)
    since = state.step, time.time()
    network.train()
    for images in load_epoch(state, s, tracklets, batches):
        generator = generator_of(s.seed, state.step)
        views = make_shifted_views(images, generator, dist.get_rank(), dist.get_world_size())
        with networks_in_bfloat16(s, images.device):
            features, logits = network(views)
        people = labels[batches[state.step % steps]]
        loss = supervised_loss(features, logits, torch.from_numpy(people).to(images.device))
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        save_where_due(state, s, steps)
    rate = (state.step - since[0]) * s.batch / (time.time() - since[1])
    loss = loss.item()
    say("", f"epoch {epoch + 1}/{s.epochs[0]}  loss {loss:.3f}  lr {lr:.1e}  {rate:,.0f} images/s")
    figures = {"loss": loss, "lr": lr, "images_per_second": rate}
    log(s, "train", stage="finetuned", step=state.step, **figures)


# ---------------------------------------------------------------- around training


def stage_name(s, state):
    """Whose images teach each other: under this name figures are logged."""
    if s.identities == "cion" and not s.labels and state.labels is None:
        return "tracklet"
    return s.identities


def read_inputs(s):
    """Find the tracklets or draw walkers: the index, the labels (N,) of stage 1 or those given, the
    truth (N,) where it is known, and the held-out split or None. Raises ValueError."""
    root = data_folder(s)
    if not s.data and not root.exists() and dist.get_rank() == 0:
        say("data", f"drawing walkers into {root}/")
        try:
            data.draw_walkers(root, s.seed)
        except OSError:
            if not root.exists():  # else another run has drawn the same ones
                raise
    dist.barrier(group=waiting_group())
    train_folder, test_folder = data.find_splits(root)
    truth = None
    if s.labels:
        tracklets, labels = data.read_identities(s.labels, train_folder)
    else:
        tracklets = data.read_tracklets(train_folder)
        labels = tracklets.track
        if test_folder and (root / "train.json").exists():
            truth = data.read_labels(root / "train.json", tracklets)
    say("data", f"{train_folder}: {tracklets}")
    if s.identities == "instance":
        labels = np.arange(len(tracklets))
    if s.identities == "true":
        labels = truth
        if truth is None:
            raise ValueError(f"--identities true: {root} does not hold train/, test/, their .json")
    benchmark = None
    if test_folder:
        test = data.read_tracklets(test_folder)
        say("", f"{test_folder}: {test}, held out")
        benchmark = label_tracklets(test, data.read_labels(root / "test.json", test))
    return tracklets, labels, truth, benchmark


def read_people(s):
    """What to fine-tune on: the index, labels (N,) of so large a share of its people, -1 for the
    others, and the benchmark. Raises ValueError, also where Market-1501's or MARS' splits share a
    person; elsewhere the two number theirs independently."""
    root = data_folder(s)
    benchmark = read_benchmark(root)
    tracklets, person = data.read_training(root)
    shared = np.intersect1d(person, benchmark.ids)
    if len(shared) and ((root / "query").exists() or (root / "info").exists()):
        raise ValueError(f"{root}: person {shared[0]} is in the training images and in the test's")
    people, labels = np.unique(person, return_inverse=True)
    known = max(2, round(s.labels_share * len(people)))
    labels = np.random.default_rng(s.seed).permutation(len(people))[labels]
    labels[labels >= known] = -1
    say("data", f"{root}: {len(labels):,} images of {len(people):,} people, {known:,} with labels")
    few = (np.bincount(labels[labels >= 0]) < s.K[0]).sum()
    if few:
        say("", f"{few} people have fewer than {s.K[0]} images, which are repeated in a batch")
    return tracklets, labels, benchmark


def fingerprint(tracklets, labels, benchmark):
    """A digest of the images to learn from and of those held out, and of their labels."""
    images = tracklets.digest(labels)
    if benchmark is not None:
        images += benchmark.images.digest(benchmark.ids)
    return images


def measure(s, state, benchmark, stage):
    """Retrieval on the held-out split, once for each stage, and a picture of it. Call it after
    `save`, which makes the batch-norm statistics of all processes their mean."""
    if benchmark is None or stage in state.results:
        return
    device = state.center.device
    features = extract(state.teacher.backbone, benchmark.images, s.size, device, s.workers)
    state.results[stage] = None
    if dist.get_rank() == 0:
        result = evaluate_features(features, benchmark)
        del result["ap"]
        state.results[stage] = result
        say("evaluate", f"{stage:<9} mAP {result['mAP']:5.1%}   R1 {result['R1']:5.1%}")
        log(s, "evaluate", stage=stage, step=state.step, **result)
        queries = benchmark.query[:: len(benchmark.query) // 12 + 1]  # 12 at most
        show_retrieval(s.folder / "retrieval.jpg", benchmark, features, queries)
    dist.barrier(group=waiting_group())


def find_identities(s, state, tracklets, truth):
    """Denoise with the teacher's features: state.labels, on every process, and identities.json.
    Call it after `save`, as `measure`."""
    backbone = state.teacher.backbone
    device = state.center.device
    file = s.folder / ".features.npy"
    features = extract_features(backbone, tracklets, s.size, device, s.workers, file)
    state.labels = torch.empty(len(tracklets), dtype=torch.int32)
    if features is not None:  # on the first process
        options = {name: getattr(s, name) for name in OPTIONS}
        scratch = s.folder / ".placed.npy"
        labels, figures = denoise_tracklets(tracklets, features, scratch, truth, **options)
        file.unlink()
        log(s, "denoise", step=state.step, **figures)
        show_identities(s.folder / "denoised.jpg", tracklets, labels)
        data.write_labels(s.folder / "identities.json", tracklets, labels)
        state.labels = torch.from_numpy(labels).int()
    dist.broadcast(state.labels, 0, group=waiting_group())
    state.rounds += 1
    save(state, s)


def show_views(s, tracklets):
    """crops.jpg: eight images, a column each, and below them what networks are shown of them."""
    rows = np.linspace(0, len(tracklets) - 1, 8).astype(int)
    images = next(data.load_batches(tracklets, [rows], s.size))
    views = make_views(images, view_kinds(s), generator_of(s.seed, 0))
    shown = [normalize(images / 255), *views]
    sheet = torch.cat([F.interpolate(view, s.size) for view in shown])
    sheet = (sheet - sheet.min()) / (sheet.max() - sheet.min())
    data.write_pictures(s.folder / "crops.jpg", sheet, len(rows))


def pretrain(s, device):
    """Data, stage 1, denoising, stage 2, evaluation: the same command goes on where it ended."""
    student, teacher = make_networks(s, device)
    tracklets, labels, truth, benchmark = read_inputs(s)

    center = torch.zeros(s.prototypes, device=device)
    images = fingerprint(tracklets, labels, benchmark)
    state = State(student, teacher, make_optimizer(student), center, images)
    start(state, s, benchmark)
    if state.step == 0 and dist.get_rank() == 0:
        show_views(s, tracklets)

    network = DistributedDataParallel(student)
    Ks, finds = plan_epochs(s)
    steps = s.epoch_steps or max(1, len(tracklets) // s.batch)
    for epoch in range(state.step // steps, len(Ks)):
        if epoch in finds[state.rounds :]:
            encoder = "weights" if s.weights else "tracklet"
            if state.rounds:
                encoder = f"round {state.rounds}"
            measure(s, state, benchmark, encoder)
            find_identities(s, state, tracklets, truth)
        if state.labels is not None:
            labels = state.labels.numpy()
        with stopping_after_a_step():
            train_epoch(state, network, s, tracklets, labels, Ks, epoch, steps)
    measure(s, state, benchmark, stage_name(s, state))
    return state


def finetune(s, device):
    """A benchmark's training images and their people, evaluation. There is no teacher: the network
    itself has its place."""
    tracklets, labels, benchmark = read_people(s)
    backbone = make_backbone(s, device)
    network = Classifier(backbone, labels.max() + 1).to(device)
    if device.type == "cuda":
        network.backbone = sync_batch_norm(backbone)
    if s.compile:
        network.backbone.compile(dynamic=False)

    images = fingerprint(tracklets, labels, benchmark)
    no_center = torch.zeros(0, device=device)
    state = State(network, network, make_sgd(network), no_center, images)
    start(state, s, benchmark)

    network = DistributedDataParallel(network)
    steps = s.epoch_steps or max(1, (labels >= 0).sum() // s.batch)
    epochs = s.epochs[0]
    tests = {epochs * part // 6 for part in range(1, 6)} - {0}
    for epoch in range(state.step // steps, epochs):
        if epoch in tests:
            measure(s, state, benchmark, f"epoch {epoch}")
        with stopping_after_a_step():
            finetune_epoch(state, network, s, tracklets, labels, epoch, steps)
    measure(s, state, benchmark, "finetuned")
    return state


def main():
    """Pre-training or fine-tuning, and what each stage was worth."""
    s = parse_settings()
    device = join_processes()
    waiting_group.cache_clear()  # that of an earlier run in this process
    on_signals(leave)
    run = finetune if s.finetune else pretrain
    state = run(s, device)
    save(state, s)
    if dist.get_rank() == 0:
        for stage, result in state.results.items():
            say("result", f"{stage:<9} mAP {result['mAP']:5.1%}   R1 {result['R1']:5.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
