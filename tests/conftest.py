"""What several test files share: the modules on the path, and a tiny set of walkers drawn once."""
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
