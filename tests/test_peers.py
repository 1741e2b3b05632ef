"""tests/peers.py: the memory of clusters against its definition, and both peers from end to end."""
import peers
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, events


def test_the_memory_follows_the_images():
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]))
    criterion = peers.Clusters(features, torch.tensor([0, 0, 1, -1]))
    middle = F.normalize(features[0] + features[1], dim=0)
    assert torch.allclose(criterion.memory, torch.stack([middle, features[2]]))
    image = torch.tensor([[3.0, 4.0]])
    loss = criterion(image, torch.tensor([1]))
    first, second = 20 * middle @ image[0] / 5, 20 * 0.8
    assert loss.item() == pytest.approx(float(torch.log(1 + (first - second).exp())), rel=1e-4)
    want = F.normalize(0.1 * torch.tensor([0.0, 1.0]) + 0.9 * torch.tensor([0.6, 0.8]), dim=0)
    assert torch.allclose(criterion.memory[1], want)


@pytest.mark.parametrize("peer", ["clusters", "supervised"])
def test_a_peer_from_end_to_end(peer, few, in_process, tmp_path, monkeypatch):
    if peer == "clusters":
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    in_process(f"tests/peers.py {peer}", "--data", few, *TINY, "--name", "run")
    assert [event["step"] for event in events(tmp_path / "runs" / "run", "train")] == [3, 6, 9]
    (result,) = events(tmp_path / "runs" / "run", "evaluate")
    assert result["stage"] == peer and 0.2 < result["mAP"] < 1
    found = events(tmp_path / "runs" / "run", "denoise")
    assert len(found) == (2 if peer == "clusters" else 0)
    assert all(0.3 < event["f1"] <= 1 for event in found)
