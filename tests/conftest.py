"""What several test files share: the modules on the path, tiny sets of walkers, and programs run in
this process, since starting another one takes longer than most tests."""
import contextlib
import importlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

# On a port that is free, whatever else runs.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
# What makes a run of train.py tiny: nine steps.
TINY = """--arch r10ibn --recipe demo --size 64 32 --batch 16 --head 32 16 --prototypes 32 --K 2 4
    --local_crops 2 --epochs 1 1 --rounds 2 --epoch_steps 3 --log_every 1 --workers 0""".split()


@contextlib.contextmanager
def full_disk(room):
    """Within this no file can grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def checkpoint(folder):
    """The checkpoint of a run."""
    return torch.load(folder / "last.pt", weights_only=True)


def events(folder, kind):
    """The lines of a kind in a run's log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def pytest_configure(config):
    # torchvision's JPEG functions announce a successor that is not among the required packages
    successor = "ignore:The image decoding and encoding capabilities:DeprecationWarning"
    config.addinivalue_line("filterwarnings", successor)


@pytest.fixture(scope="session")
def walkers(tmp_path_factory):
    """A folder with a set of 10 people in 6 videos, and 6 people held out."""
    from data import draw_walkers

    root = tmp_path_factory.mktemp("walkers") / "set"
    draw_walkers(root, people=10, videos=6, held_out=6, test_videos=3)
    return root


@pytest.fixture(scope="session")
def market(walkers, tmp_path_factory):
    """Held-out walkers under Market-1501's names: every fifth image of a person is a query, and all
    are in the gallery; those who are somebody are in the training set too."""
    from data import read_labels, read_tracklets

    root = tmp_path_factory.mktemp("market") / "Market-1501-v15.09.15"
    t = read_tracklets(walkers / "test")
    ids = read_labels(walkers / "test.json", t)
    for folder in "query", "bounding_box_test", "bounding_box_train":
        (root / folder).mkdir(parents=True)
    for i in range(len(t)):
        source = walkers / "test" / t.path(i)
        person = "-1" if ids[i] < 0 else f"{ids[i] + 1:04d}"
        name = f"{person}_c{t.video[i] + 1}s1_{i:06d}"
        shutil.copy(source, root / "bounding_box_test" / f"{name}_01.jpg")
        if ids[i] >= 0:
            shutil.copy(source, root / "bounding_box_train" / f"{name}_01.jpg")
        if ids[i] >= 0 and i % 5 == 0:
            shutil.copy(source, root / "query" / f"{name}_00.jpg")
    return root


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder with a set of 6 people in 3 videos, and 4 people held out."""
    from data import draw_walkers

    root = tmp_path_factory.mktemp("few") / "set"
    draw_walkers(root, people=6, videos=3, held_out=4, test_videos=2)
    return root


@pytest.fixture
def in_process(monkeypatch):
    """in_process("data.py crop", *flags) is `python data.py crop FLAGS`, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    kept = []

    def call(program, *flags):
        script, *words = program.split()
        monkeypatch.setattr("sys.argv", [script, *words, *map(str, flags)])
        module = importlib.import_module(script.removeprefix("tests/").removesuffix(".py"))
        try:
            module.main()
        finally:
            if torch.distributed.is_initialized():
                # where DistributedDataParallel is the last to let go of the processes' group, it
                # may wait for ever for a thread that waits for Python (seen once, with torch 2.8)
                kept[:] = [torch.distributed.group.WORLD]
                torch.distributed.destroy_process_group()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if script == "train.py":
                module.signals.clear()

    return call


@pytest.fixture
def run(few, in_process, tmp_path, monkeypatch):
    """run(*flags) is a tiny run of train.py on a few walkers; returns its folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        in_process("train.py", "--data", few, *TINY, "--name", "run", *flags)
        names = [name for flag, name in zip(flags, flags[1:]) if flag == "--name"]
        return tmp_path / "runs" / ["run", *map(str, names)][-1]

    return call


@pytest.fixture
def given_to(monkeypatch):
    """given_to(module, name) is a list of what each call of a function is given from now on."""

    def note(module, name):
        original = getattr(module, name)
        given = []

        def noted(*args):
            given.append([arg.detach().clone() if torch.is_tensor(arg) else arg for arg in args])
            return original(*args)

        monkeypatch.setattr(module, name, noted)
        return given

    return note


@pytest.fixture
def one_process():
    """Within this, torch.distributed has a group of this process alone."""
    from evaluate import join_processes

    join_processes()
    yield
    torch.distributed.destroy_process_group()
