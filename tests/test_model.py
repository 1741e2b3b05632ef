"""model.py: published sizes, names, and weights from elsewhere."""
import argparse
import pickle

import pytest
import torch

import model

PUBLISHED = {
    "r18": (11_176_512, 512), "r18ibn": (11_176_512, 512), "r50": (23_508_032, 2048), "r50ibn": (23_508_032, 2048),
    "r101ibn": (42_500_160, 2048), "r152ibn": (58_143_808, 2048),
    "vit_tiny": (6_233_856, 192), "vit_small": (23_001_024, 384), "vit_base": (88_385_856, 768),
}  # fmt: skip


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_counts_and_embeddings_are_the_published_ones(arch):
    with torch.device("meta"):
        network = model.build(arch)
    assert (sum(p.numel() for p in network.parameters()), network.embed_dim) == PUBLISHED[arch]


@pytest.mark.parametrize("arch", ["r10ibn", "r18", "r50ibn", "vit_tiny"])
@pytest.mark.parametrize("size", [(64, 32), (32, 16), (96, 40)])
def test_any_input_size_gives_one_vector_an_image(arch, size):
    network = model.build(arch).eval()
    with torch.no_grad():
        out = network(torch.randn(2, 3, *size))
    assert out.shape == (2, network.embed_dim) and torch.isfinite(out).all()


def test_last_stage_keeps_the_resolution():
    network = model.build("r10ibn").eval()
    shapes = []
    network.layer4.register_forward_hook(lambda _, x, y: shapes.append((x[0].shape[2:], y.shape[2:])))
    network(torch.randn(1, 3, 64, 32))
    assert shapes == [((4, 2), (4, 2))]


def test_ibn_normalises_each_image_in_one_half_and_the_batch_in_the_other():
    ibn = model.IBN(8)
    x = torch.randn(5, 8, 6, 4) * torch.rand(5, 8, 1, 1) * 9 + torch.randn(5, 8, 1, 1)
    y = ibn(x)
    torch.testing.assert_close(y[:, :4].mean((2, 3)), torch.zeros(5, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[:, 4:].mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert y[:, 4:].mean((2, 3)).abs().max() > 0.1  # a batch norm keeps the differences between images


def test_state_dict_names_are_the_releases():
    names = model.build("r50ibn").state_dict()
    assert {"layer1.0.bn1.IN.weight", "layer1.0.bn1.BN.running_var", "layer3.5.bn1.IN.bias", "layer4.0.bn1.weight", "layer2.0.downsample.0.weight"} <= set(names)
    assert len(names) == 344 and "layer4.0.bn1.IN.weight" not in names
    names = model.build("vit_small").state_dict()
    assert {"cls_token", "pos_embed", "patch_embed.conv.1.IN.weight", "patch_embed.proj.bias", "blocks.11.attn.qkv.weight", "norm.bias"} <= set(names)
    assert len(names) == 172 and names["pos_embed"].shape == (1, 129, 384)


def test_attention_is_the_textbook_formula():
    attention = model.Attention(12, heads=3)
    x = torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = [torch.softmax(q[..., h] @ k[..., h].mT / 2, -1) @ v[..., h] for h in (slice(0, 4), slice(4, 8), slice(8, 12))]
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, -1)))


def test_position_embeddings_are_used_as_they_are_at_the_papers_size():
    vit = model.build("vit_tiny")
    assert vit.positions(16, 8) is vit.pos_embed and vit.positions(4, 2).shape == (1, 9, 192)


def test_head_is_a_cosine():
    head = model.Head(16, prototypes=10, hidden=8, bottleneck=4)
    z, prototypes = head(torch.randn(6, 16) * 100)
    assert z.shape == (6, 4) and prototypes.shape == (10, 4)
    for unit in (z, prototypes):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(unit)))
    before = prototypes
    head.last_layer.weight.data *= 7
    torch.testing.assert_close(head(torch.ones(1, 16))[1], before)


def test_unknown_arch_lists_the_known():
    with pytest.raises(ValueError, match="unknown arch 'resnet'; known: r10ibn, r18"):
        model.build("resnet")


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {"teacher": {f"module.backbone.{k}": v for k, v in state.items()} | {"module.head.mlp.0.weight": torch.ones(2)}, "student": {},
                   "epoch": 100, "args": argparse.Namespace(arch="resnet50_ibn", lr=5e-4)},
    lambda state: state | {"fc.weight": torch.ones(10, 256)},
])  # fmt: skip
def test_weights_load_from_every_wrapping(tmp_path, wrap):
    source, target = model.build("r10ibn"), model.build("r10ibn")
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    report = model.load_weights(target, tmp_path / "weights.pth")
    assert len(report["matched"]) == len(source.state_dict()) and not report["missing"]
    for a, b in zip(source.state_dict().values(), target.state_dict().values()):
        assert torch.equal(a, b)


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    torch.save(model.build("r18ibn").state_dict(), tmp_path / "weights.pth")
    target = model.build("r10ibn")
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"only \d+% of the model's parameters matched"):
        model.load_weights(target, tmp_path / "weights.pth")
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_a_missing_tensor_is_named(tmp_path):
    state = model.build("r10ibn").state_dict()
    del state["bn1.bias"]
    torch.save(state | {"extra.weight": torch.ones(1)}, tmp_path / "weights.pth")
    report = model.load_weights(model.build("r10ibn"), tmp_path / "weights.pth")
    assert report["missing"] == ["bn1.bias"] and report["left_over"] == ["extra.weight"]


def test_files_that_carry_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        model.load_weights(model.build("r10ibn"), tmp_path / "weights.pth")
    torch.save({"model": Evil()}, tmp_path / "weights.pth")
    (tmp_path / "owned").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        model.load_weights(model.build("r10ibn"), tmp_path / "weights.pth")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match="no such file"):
        model.load_weights(model.build("r10ibn"), tmp_path / "nothing.pth")
