"""What several test files share: the modules on the path, and a tiny set of walkers drawn once."""
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_configure(config):
    # torchvision's JPEG functions announce a successor that is not among the required packages
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding capabilities:DeprecationWarning")


@pytest.fixture(scope="session")
def walkers(tmp_path_factory):
    """A folder with a set of 10 people in 6 videos, and 6 people held out."""
    from data import draw_walkers

    root = tmp_path_factory.mktemp("walkers") / "set"
    draw_walkers(root, people=10, videos=6, held_out=6, test_videos=3)
    return root


@pytest.fixture(scope="session")
def market(walkers, tmp_path_factory):
    """Held-out walkers under Market-1501's names: the first three videos are queries' cameras and all are the gallery's."""
    root = tmp_path_factory.mktemp("market") / "Market-1501-v15.09.15"
    import data

    t = data.read_tracklets(walkers / "test")
    ids = data.read_labels(walkers / "test.json", t)
    for folder in ("query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    for i in range(len(t)):
        source, person = walkers / "test" / t.path(i), -1 if ids[i] < 0 else ids[i] + 1
        shutil.copy(source, root / "bounding_box_test" / f"{person if person < 0 else f'{person:04d}'}_c{t.video[i] + 1}s1_{i:06d}_01.jpg")
        if person > 0 and i % 5 == 0:
            shutil.copy(source, root / "query" / f"{person:04d}_c{t.video[i] + 1}s1_{i:06d}_00.jpg")
    return root
