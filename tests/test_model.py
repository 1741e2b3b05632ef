"""model.py: published sizes, names, weights from elsewhere, and features in memory and on disk."""
import argparse
import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from torchvision.io import encode_jpeg, read_image

import data
import distill
import model

PUBLISHED = {
    "r18": (11_176_512, 512), "r18ibn": (11_176_512, 512), "r50": (23_508_032, 2048), "r50ibn": (23_508_032, 2048),
    "r101ibn": (42_500_160, 2048), "r152ibn": (58_143_808, 2048),
    "r101": (42_500_160, 2048), "r152": (58_143_808, 2048),
    "vit_tiny": (6_233_856, 192), "vit_small": (23_001_024, 384), "vit_base": (88_385_856, 768),
    "convnext_tiny": (27_820_128, 768), "convnext_small": (49_454_688, 768), "convnext_base": (87_566_464, 1024),
    "swin_t": (27.5, 768), "swin_s": (48.9, 768), "swin_b": (86.8, 1024),  # millions, with the index buffers of their windows
    "timm/ghostnet_050": (1_306_292, 1280), "timm/ghostnet_100": (3_901_508, 1280), "timm/ghostnet_130": (6_077_820, 1280),
    "timm/edgenext_x_small": (2_143_804, 192), "timm/edgenext_small": (5_281_832, 304), "timm/edgenext_base": (17_926_292, 584),
    "timm/repvit_m0_9": (4.72, 384), "timm/repvit_m1_0": (6.40, 448), "timm/repvit_m1_5": (13_616_384, 512),
    "timm/fastvit_s12": (8_448_576, 1024), "timm/fastvit_sa12": (10_555_968, 1024), "timm/fastvit_sa24": (20_529_216, 1024),
    "timm/volo_d1_224": (25.8, 384), "timm/volo_d2_224": (57.6, 512), "timm/volo_d3_224": (85.3, 512),
}


def test_the_zoo_is_the_papers():
    assert set(PUBLISHED) == set(model.ZOO) and len(model.ZOO) == 32


def build(arch: str) -> torch.nn.Module:
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    return model.build(arch)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_counts_and_embeddings_are_the_published_ones(arch):
    with torch.device("meta"):
        network = build(arch)
    count, (published, embedding) = sum(p.numel() for p in network.parameters()), PUBLISHED[arch]
    count += sum(b.numel() for name, b in network.named_buffers() if name.endswith("relative_position_index"))
    assert network.embed_dim == embedding
    assert count == published if isinstance(published, int) else round(count / 1e6, len(str(published).split(".")[1])) == published


@pytest.mark.parametrize("arch", PUBLISHED)
def test_takes_both_crop_sizes_and_a_training_step(arch):
    """A global and a local crop of two images of one identity go through student and teacher; the loss moves the student."""
    torch.manual_seed(0)
    student = distill.Network(build(arch), model.Head(PUBLISHED[arch][1], prototypes=32, hidden=32, bottleneck=16))
    with torch.no_grad():
        teacher = student([torch.randn(4, 3, 256, 128), torch.randn(4, 3, 256, 128)])
    logits = student([torch.randn(4, 3, 256, 128), torch.randn(4, 3, 128, 64)])
    assert logits.shape == teacher.shape == (2, 4, 32)
    distill.identity_loss(logits, teacher, torch.zeros(32), K=4).backward()
    gradients = {name: p.grad for name, p in student.backbone.named_parameters()}
    lost = [name for name, g in gradients.items() if g is None or not torch.isfinite(g).all()]
    assert not lost and sum(g.abs().sum() for g in gradients.values()) > 0
    with torch.no_grad():  # nothing is drawn by chance
        small = torch.randn(3, 3, 128, 64)
        assert torch.equal(student.backbone(small), student.backbone(small))
    before = [p.detach().clone() for p in student.backbone.parameters()]
    torch.optim.AdamW(student.parameters(), lr=1e-3).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, student.backbone.parameters()))


@pytest.mark.parametrize("arch, published", [("r50ibn", 4.09e9), ("vit_small", 3.79e9)])
def test_multiply_adds_are_the_published_ones(arch, published):
    assert model.multiply_adds(model.build(arch)) == pytest.approx(published, rel=0.02)


def test_multiply_adds_of_a_known_layer():
    assert model.multiply_adds(torch.nn.Conv2d(3, 5, 3, padding=1, bias=False), (8, 4)) == 8 * 4 * 3 * 5 * 9


@pytest.mark.parametrize("arch", ["convnext_tiny", "swin_t", "mobilenet_v3_small"])
def test_torchvisions_models_lose_only_their_classifier(arch):
    original = torchvision.models.get_model(arch).eval()
    network = model.build(arch).eval()
    assert {name for name, _ in original.named_parameters()} - {name for name, _ in network.named_parameters()} == {
        name for name, p in original.named_parameters() if len(p) == 1000
    }
    assert not any(module.p for module in network.modules() if isinstance(module, (torch.nn.Dropout, torchvision.ops.StochasticDepth)))
    network.load_state_dict(original.state_dict(), strict=False)
    images, last = torch.randn(1, 3, 64, 64), [m for m in original.modules() if isinstance(m, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(network(images)), original(images))


def test_volos_positions_follow_the_input():
    timm = pytest.importorskip("timm")
    original, network = timm.create_model("volo_d1_224", num_classes=0, img_size=(256, 128)).eval(), model.build("timm/volo_d1_224").eval()
    assert original.state_dict().keys() == network.state_dict().keys()
    network.load_state_dict(original.state_dict())
    images = torch.randn(1, 3, 256, 128)
    with torch.no_grad():
        torch.testing.assert_close(network(images), original(images))
        network(torch.randn(1, 3, 128, 64))
        assert network.pos_embed.shape == (1, 8, 4, 384) and network._parameters["pos_embed"].shape == (1, 16, 8, 384)
        with pytest.raises(RuntimeError):  # what the few lines are for
            original(torch.randn(1, 3, 128, 64))
        for size in ((72, 40), (120, 60), (200, 100)):
            assert network(torch.randn(1, 3, *size)).shape == (1, 384)


def test_imagenet_weights_of_volo_load_with_their_positions_resized(tmp_path):
    timm = pytest.importorskip("timm")
    source = timm.create_model("volo_d1_224")  # 14x14 tokens, and two classifiers
    torch.save(source.state_dict(), tmp_path / "volo.pth")
    network = model.build("timm/volo_d1_224")
    report = model.load_weights(network, tmp_path / "volo.pth")
    assert not report["missing"] and report["left_over"] == ["aux_head.weight", "aux_head.bias", "head.weight", "head.bias"]
    resized = torch.nn.functional.interpolate(source.pos_embed.permute(0, 3, 1, 2), size=(16, 8), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(network._parameters["pos_embed"], resized)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"])
def test_other_models_of_timm_take_both_crop_sizes(name):
    pytest.importorskip("timm")
    network = model.build(f"timm/{name}").eval()
    model.check_sizes(network, f"timm/{name}", [(256, 128), (128, 64)])


def test_what_cannot_take_a_crop_is_refused_with_its_name():
    with pytest.raises(ValueError, match=r"vit_b_16 cannot take images of 128x64: .*224"):
        model.check_sizes(model.build("vit_b_16"), "vit_b_16", [(128, 64)])


def test_timm_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="timm/ghostnet_100' needs the package timm: pip install timm"):
        model.build("timm/ghostnet_100")


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


@pytest.mark.parametrize("arch, digest", [("r50ibn", "765d1e8cc813ce2a"), ("vit_small", "e1c3cd189d63ceb5")])
def test_names_and_shapes_are_those_of_the_released_weights(arch, digest):
    """The digest was made from a list of the names and shapes of the authors' networks."""
    state = {name: list(value.shape) for name, value in model.build(arch).state_dict().items()}
    assert hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()[:16] == digest


def test_a_transformer_block_is_the_textbook_formula():
    block = model.Block(12, heads=3)
    x = torch.randn(2, 5, 12)
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    heads = [torch.softmax(q[..., h] @ k[..., h].mT / 2, -1) @ v[..., h] for h in (slice(0, 4), slice(4, 8), slice(8, 12))]
    attended = x + block.attn.proj(torch.cat(heads, -1))
    perceptron = block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(attended))))
    torch.testing.assert_close(block(x), attended + perceptron)


def test_position_embeddings_are_used_as_they_are_at_the_papers_size():
    vit = model.build("vit_tiny")
    assert model.resize_positions(vit.pos_embed, vit.grid, (16, 8)) is vit.pos_embed
    smaller = model.resize_positions(vit.pos_embed, vit.grid, (4, 2))
    assert smaller.shape == (1, 9, 192) and torch.equal(smaller[:, 0], vit.pos_embed[:, 0])


def test_head_is_a_cosine():
    head, features = model.Head(16, prototypes=10, hidden=8, bottleneck=4), torch.randn(6, 16) * 100
    cosines = torch.cosine_similarity(head.mlp(features)[:, None], head.last_layer.weight, dim=-1)
    torch.testing.assert_close(head(features), cosines)
    head.last_layer.weight.data *= 7
    torch.testing.assert_close(head(features), cosines)


def test_unknown_arch_lists_the_known():
    with pytest.raises(ValueError, match="unknown arch 'resnet'; known: r10ibn, r18.*timm/ghostnet_100"):
        model.build("resnet")
    with pytest.raises(ValueError, match="unknown arch 'fasterrcnn_resnet50_fpn'"):  # torchvision's, but no classifier
        model.build("fasterrcnn_resnet50_fpn")
    with pytest.raises(ValueError, match="squeezenet1_0: does not end in a linear classifier"):
        model.build("squeezenet1_0")
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="unknown arch 'timm/resnet_of_nobody'"):
        model.build("timm/resnet_of_nobody")


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best_prec1": __import__("numpy").float64(71.5)},
    lambda state: {"model": {"state_dict": {f"_orig_mod.backbone.module.{k}": v for k, v in state.items()}}},
    lambda state: {f"base.{k}": v for k, v in state.items()},
    lambda state: {"state_dict": {f"module.encoder_q.{k}": v for k, v in state.items()}},
    lambda state: {"teacher": {f"module.backbone.{k}": v for k, v in state.items()} | {"module.head.mlp.0.weight": torch.ones(2)}, "student": {},
                   "epoch": 100, "args": argparse.Namespace(arch="resnet50_ibn", lr=5e-4)},
    lambda state: state | {"fc.weight": torch.ones(10, 256)},
])
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
    with pytest.raises(ValueError, match="No such file"):
        model.load_weights(model.build("r10ibn"), tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="Is a directory"):
        model.load_weights(model.build("r10ibn"), tmp_path)


def test_missing_tensors_are_warned_of(tmp_path):
    state = {name: value for name, value in model.build("r10ibn").state_dict().items() if "running_" not in name}
    torch.save(state, tmp_path / "weights.pth")
    report = model.load_weights(model.build("r10ibn"), tmp_path / "weights.pth")
    assert "WARNING: what is missing keeps its initial values" in model.describe(report)


def test_imagenet_weights_of_torchvision_load(tmp_path):
    source = torchvision.models.resnet50()
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    target = model.build("r50")
    report = model.load_weights(target, tmp_path / "resnet50.pth")
    assert not report["missing"] and report["left_over"] == ["fc.weight", "fc.bias"]
    torch.testing.assert_close(target.layer3[2].conv2.weight, source.layer3[2].conv2.weight)
    ibn = model.load_weights(model.build("r50ibn"), tmp_path / "resnet50.pth")  # enough of it fits, and what does not is named
    assert "layer1.0.bn1.IN.weight" in ibn["missing"] and "layer1.0.bn1.weight" in ibn["left_over"] and "layer4.0.bn1.weight" in ibn["matched"]
    assert model.describe(ibn).startswith(f"{len(ibn['matched'])} tensors matched, missing {len(ibn['missing'])} (layer1.0.bn1.IN.weight, ")


def test_a_classifiers_norm_is_loaded_with_the_backbone(tmp_path):
    source = torchvision.models.convnext_tiny()
    torch.nn.init.uniform_(source.classifier[0].weight)
    torch.save(source.state_dict(), tmp_path / "convnext.pth")
    target = model.build("convnext_tiny")
    report = model.load_weights(target, tmp_path / "convnext.pth")
    assert not report["missing"] and report["left_over"] == ["classifier.2.weight", "classifier.2.bias"]
    assert torch.equal(target.classifier[0].weight, source.classifier[0].weight)


def vit_file(dim: int, grid: int = 14) -> dict:
    """Names and shapes of timm's and DINO's ViTs with 16x16 patches."""
    own = {k: torch.randn_like(v) for k, v in model.ViT(dim, dim // 64).state_dict().items() if not k.startswith("patch_embed")}
    return own | {"pos_embed": torch.randn(1, 1 + grid * grid, dim), "patch_embed.proj.weight": torch.randn(dim, 3, 16, 16),
                  "patch_embed.proj.bias": torch.randn(dim), "head.weight": torch.randn(10, dim)}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"student": {}, "teacher": {f"module.backbone.{k}": v for k, v in s.items()}}])
def test_vits_of_timm_and_dino_load_as_far_as_names_fit(tmp_path, wrap):
    source, target = vit_file(384), model.build("vit_small")
    torch.save(wrap(source), tmp_path / "vit.pth")
    report = model.load_weights(target, tmp_path / "vit.pth")
    assert all(name.startswith("patch_embed.") for name in report["missing"]) and "head.weight" in report["left_over"]
    assert torch.equal(target.blocks[7].attn.qkv.weight, source["blocks.7.attn.qkv.weight"])
    assert torch.equal(target.pos_embed[:, 0], source["pos_embed"][:, 0]) and target.pos_embed.shape == (1, 129, 384)


def test_position_embeddings_are_resized_as_a_picture(tmp_path):
    rows = torch.arange(14.0)[:, None, None].expand(14, 14, 384)  # they grow from top to bottom
    file = vit_file(384) | {"pos_embed": torch.cat([torch.zeros(1, 384), rows.reshape(196, 384)])[None]}
    torch.save(file, tmp_path / "vit.pth")
    target = model.build("vit_small")
    model.load_weights(target, tmp_path / "vit.pth")
    grid = target.pos_embed[0, 1:].view(16, 8, 384)
    assert (grid.std(1) < 1e-4).all() and (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()


def test_a_vit_whose_stem_is_much_of_it_is_refused(tmp_path):
    torch.save(vit_file(192), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="only 8[0-9]% of the model's parameters matched"):
        model.load_weights(model.build("vit_tiny"), tmp_path / "vit.pth")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = model.build("r10ibn").state_dict()
    state["layer2.0.conv1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="1 of .* tensors hold numbers that are not finite, the first: layer2.0.conv1.weight"):
        model.load_weights(model.build("r10ibn"), tmp_path / "weights.pth")


def test_safetensors_load(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    source = model.build("r10ibn")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    assert not model.load_weights(model.build("r10ibn"), tmp_path / "weights.safetensors")["missing"]
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        model.load_weights(model.build("r10ibn"), tmp_path / "broken.safetensors")


class Colours(torch.nn.Module):
    """A network that answers the mean colour; it counts its images, and may break down after some."""

    embed_dim = 3

    def __init__(self, breaks_after=10**9, gain=1.0):
        super().__init__()
        self.gain, self.seen, self.breaks_after = torch.nn.Parameter(torch.tensor(gain)), 0, breaks_after

    def forward(self, x):
        self.seen += len(x)
        if self.seen > self.breaks_after:
            raise KeyboardInterrupt
        return self.gain * x.mean((2, 3)) + 5


@pytest.fixture
def crops(tmp_path):
    """Tracklets of 3, 1 and 2 images, each of a colour of its own."""
    for i, (track, frame) in enumerate([(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (3, 2)]):
        file = tmp_path / "crops" / "video" / f"{track:06d}_{frame:07d}_00.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = torch.tensor((250 - 40 * i, 20, 15 * i), dtype=torch.uint8)[:, None, None].expand(3, 16, 8).contiguous()
        file.write_bytes(encode_jpeg(image, quality=95).numpy().tobytes())
    return data.read_tracklets(tmp_path / "crops")


def test_features_on_disk_go_on_where_they_were_and_are_not_computed_twice(walkers, tmp_path):
    t = data.read_tracklets(walkers / "test")
    arguments = t, (32, 16), torch.device("cpu")
    want, _ = model.extract(Colours(), *arguments)
    options = dict(batch=16, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        model.extract_to_file(tmp_path, Colours(breaks_after=50), *arguments, **options)
    assert not list(tmp_path.glob("features-*.npy"))  # nothing that looks finished
    network = Colours()
    got = model.extract_to_file(tmp_path, network, *arguments, **options)
    assert network.seen == len(t) - 48  # three blocks were there
    assert got.dtype == np.float16 and np.abs(got - want.numpy()).max() < 1e-3
    again = Colours()
    assert (model.extract_to_file(tmp_path, again, *arguments, **options) == got).all() and again.seen == 0
    other = Colours(gain=2.0)
    model.extract_to_file(tmp_path, other, *arguments, **options)
    assert other.seen == len(t) and len(list(tmp_path.iterdir())) == 2  # other weights, another file


def test_any_number_of_batches_gives_the_same_features(walkers):
    t = data.read_tracklets(walkers / "test")
    want, readable = model.extract(Colours(), t, (32, 16), torch.device("cpu"))
    assert readable.all()
    for batch in (1, 7, 10**6):
        torch.testing.assert_close(model.extract(Colours(), t, (32, 16), torch.device("cpu"), batch=batch)[0], want)


def test_a_feature_is_the_networks_answer_to_the_normalised_image_alone(crops):
    """Known pixels through ImageNet's mean and deviation, in the size asked for; batch norm in evaluation mode."""

    class Recorder(Colours):
        def __init__(self):
            super().__init__()
            self.norm, self.sizes = torch.nn.BatchNorm1d(3), set()

        def forward(self, x):
            self.sizes.add(x.shape[2:])
            return self.norm(x.mean((2, 3)))

    network = Recorder()
    features, _ = model.extract(network, crops, (24, 12), torch.device("cpu"))
    colour = read_image(str(crops.root / crops.path(0))).float().mean((1, 2)) / 255
    want = (colour - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(features[0], torch.nn.functional.normalize(want, dim=0), atol=1e-3, rtol=1e-3)
    assert network.sizes == {(24, 12)}


def test_an_items_feature_is_the_mean_of_its_images_without_the_unreadable(crops):
    item = crops.track - crops.track.min()
    single, _ = model.extract(Colours(), crops, (16, 8), torch.device("cpu"), batch=4)
    features, readable = model.extract(Colours(), crops, (16, 8), torch.device("cpu"), batch=4, item=item)
    for i, rows in enumerate((slice(0, 3), slice(3, 4), slice(4, 6))):
        torch.testing.assert_close(features[i], torch.nn.functional.normalize(single[rows].mean(0), dim=0))
    assert features.shape == (3, 3) and readable.all()
    (crops.root / crops.path(1)).write_bytes(b"")
    features, readable = model.extract(Colours(), crops, (16, 8), torch.device("cpu"), item=item)
    assert readable.tolist() == [True, False] + [True] * 4
    torch.testing.assert_close(features[0], torch.nn.functional.normalize(single[[0, 2]].mean(0), dim=0))
    features, _ = model.extract(Colours(), crops, (16, 8), torch.device("cpu"))
    assert not features[1].any() and features[[0, 2, 3, 4, 5]].any(1).all()


def test_an_items_images_are_never_split_between_batches(walkers):
    t = data.read_tracklets(walkers / "test")
    item, seen = t.track, []
    network = Colours()
    network.register_forward_hook(lambda _, x, y: seen.append(len(x[0])))
    features, _ = model.extract(network, t, (32, 16), torch.device("cpu"), batch=20, item=item)
    ends, sizes = np.cumsum(seen), np.bincount(item)
    assert ends[-1] == len(t) and set(ends) <= set(np.cumsum(sizes)) and max(seen) < 20 + sizes.max()
    assert len(features) == item.max() + 1


def test_flipping_makes_an_image_and_its_mirror_image_alike(monkeypatch):
    class Left(Colours):
        def forward(self, x):
            return super().forward(x[..., : x.shape[3] // 2])

    images = torch.randint(0, 256, (2, 3, 8, 4), dtype=torch.uint8)
    images[1] = images[0].flip(2)
    monkeypatch.setattr(model, "load_batches", lambda *_: [(images, torch.ones(2, dtype=torch.bool))])
    plain, flipped = (next(model.embed(Left(), None, [np.arange(2)], None, "cpu", flip=flip))[1] for flip in (False, True))
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(flipped[0], flipped[1])


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model.py", "vit_b_16", "r10ibn", "nothing"])
    with pytest.raises(SystemExit):
        model.main()
    header, refused, row, unknown = capsys.readouterr().out.splitlines()
    assert refused.startswith("vit_b_16 ") and "cannot take images of 256x128" in refused and "unknown arch 'nothing'" in unknown
    assert row.split()[:2] == ["r10ibn", "1,230,240"] and row.split()[4] == "256" and float(row.split()[5]) > 0
