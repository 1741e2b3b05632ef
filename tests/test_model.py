"""model.py: networks of the published sizes and names, and weights from elsewhere."""
import argparse
import hashlib
import os
import pickle
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import model

# parameters without a classifier, and width of the embedding
PUBLISHED = """
    r10ibn             1,230,240    256
    vit_tiny           6,233,856    192
    vit_small         23,001,024    384
    vit_base          88,385,856    768
    resnet18          11,176,512    512
    resnet50          23,508,032   2048
    resnet101         42,500,160   2048
    resnet152         58,143,808   2048
    resnet18_ibn      11,176,512    512
    resnet50_ibn      23,508,032   2048
    resnet101_ibn     42,500,160   2048
    resnet152_ibn     58,143,808   2048
    convnext_tiny     27,820,128    768
    convnext_small    49,454,688    768
    convnext_base     87,566,464   1024
    edgenext_x_small   2,143,804    192
    edgenext_small     5,281,832    304
    edgenext_base     17,926,292    584
    fastvit_s12        8,448,576   1024
    fastvit_sa12      10,555,968   1024
    fastvit_sa24      20,529,216   1024
    ghostnet_0_5       1,306,292   1280
    ghostnet_1_0       3,901,508   1280
    ghostnet_1_3       6,077,820   1280
    volo_d1           25,835,928    384
    volo_d2           57,617,520    512
    volo_d3           85,264,256    512
"""
TABLE = [line.split() for line in PUBLISHED.strip().splitlines()]


def build(arch):
    if model.AUTHORS.get(arch, arch).startswith("timm/"):
        pytest.importorskip("timm")
    return model.build(arch)


def refused(weights, arch, file):
    """The words with which a network, left as it was, refuses weights saved into a file."""
    torch.save(weights, file)
    network = model.build(arch)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError) as error:
        model.load_weights(network, file)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return str(error.value)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("arch, parameters, width", TABLE)
def test_sizes_are_the_published_ones_and_crops_reach_every_parameter(arch, parameters, width):
    with torch.device("meta"):
        network = build(arch)
        count = sum(p.numel() for p in network.parameters())
        assert [f"{count:,}", str(network.embed_dim)] == [parameters, width]
        for size in ((256, 128), (128, 64)):
            features = network(torch.empty(2, 3, *size))
            assert features.shape == (2, network.embed_dim)
    features.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    "arch, digest", [("r50ibn", "765d1e8cc813ce2a"), ("vit_small", "e1c3cd189d63ceb5")]
)
def test_names_and_shapes_are_those_of_the_released_weights(arch, digest):
    """The digest was made from a list of the names and shapes of the authors' networks."""
    with torch.device("meta"):
        state = model.build(arch).state_dict()
    shapes = sorted((name, list(value.shape)) for name, value in state.items())
    assert hashlib.sha256(repr(shapes).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet50_ibn", "r101", "r10ibn"])
def test_the_last_stage_keeps_the_resolution_whatever_the_name(arch):
    with torch.device("meta"):
        network = model.build(arch)
        shapes = []
        network.layer4.register_forward_hook(lambda _, x, y: shapes.append(y.shape[2:]))
        network(torch.empty(1, 3, 64, 32))
    assert shapes == [(4, 2)]


def test_ibn_normalises_each_image_in_one_half_and_the_batch_in_the_other():
    x = torch.randn(5, 8, 6, 4) + torch.randn(5, 8, 1, 1)
    first, second = model.IBN(8)(x).chunk(2, dim=1)
    assert first.mean((2, 3)).abs().max() < 1e-5
    assert second.mean((0, 2, 3)).abs().max() < 1e-5
    assert second.mean((2, 3)).abs().max() > 0.1  # differences between images are kept


def test_a_residual_block_starts_as_its_shortcut():
    for arch, n, width, last in (("r10ibn", 0, 32, "bn2"), ("r50ibn", 1, 256, "bn3")):
        block = model.build(arch).layer1[n]
        x = torch.randn(2, width, 8, 4)
        assert torch.equal(block(x), F.relu(x))
        assert not getattr(block, last).weight.any()  # a zero before it would never be unlearned


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_resnet_is_torchvisions_but_for_its_last_stride(arch):
    original = torchvision.models.get_model(arch).eval()
    original.fc = nn.Identity()
    for module in original.layer4[0].modules():
        if isinstance(module, nn.Conv2d):
            module.stride = 1
    network = model.build(arch).eval()
    network.load_state_dict(original.state_dict())
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(network(images), original(images))


def test_layers_start_from_the_papers_distributions():
    for layer in (model.Head(64, 9).mlp[2], model.build("vit_tiny").blocks[3].mlp.fc1):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()
    kernel = model.build("r50ibn").conv1.weight  # of 64 channels, 7 x 7
    assert kernel.std().item() == pytest.approx((2 / 64 / 49) ** 0.5, rel=0.05)


def test_a_transformer_block_is_the_textbook_formula():
    block = model.Block(128)
    x = torch.randn(2, 5, 128)
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    heads = []
    for h in (slice(0, 64), slice(64, 128)):
        attention = torch.softmax(q[..., h] @ k[..., h].mT / 64**0.5, dim=-1)
        heads.append(attention @ v[..., h])
    attended = x + block.attn.proj(torch.cat(heads, dim=-1))
    perceptron = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(attended))))
    torch.testing.assert_close(block(x), attended + perceptron)


def test_a_vit_adds_positions_of_the_inputs_grid():
    vit = model.build("vit_tiny")
    stem = vit.patch_embed
    images = torch.randn(2, 3, 64, 32)
    grid = vit.pos_embed[:, 1:].reshape(1, 16, 8, 192).permute(0, 3, 1, 2)
    x = images
    for n in (0, 3, 6):
        x = F.relu(stem.conv[n + 1](stem.conv[n](x)))
    tokens = stem.proj(x) + F.interpolate(grid, size=(4, 2), mode="bicubic")
    first = vit.cls_token + vit.pos_embed[:, :1]
    x = torch.cat([first.expand(2, 1, 192), tokens.flatten(2).mT], dim=1)
    torch.testing.assert_close(vit(images), vit.norm(vit.blocks(x))[:, 0])
    assert torch.equal(model.resize_positions(grid, grid.shape[1:3]), grid)


def test_the_head_is_a_cosine_in_float32():
    head = model.Head(16, prototypes=10, hidden=8, bottleneck=4)
    features = torch.randn(6, 16) * 100
    with torch.autocast("cpu", torch.bfloat16):
        z = head.mlp(features)
        logits = head(features)
        head.last_layer.weight.data *= 8
        assert torch.equal(head(features), logits)
    cosines = torch.cosine_similarity(z.double()[:, None], head.last_layer.weight.double(), dim=-1)
    assert z.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), cosines, atol=1e-6, rtol=0)
    head = model.Head(16, prototypes=10, hidden=8, bottleneck=4, batch_norm=True)
    assert head.mlp(features).mean(0).abs().max() < 1e-5 and len(list(head.parameters())) == 7


def test_images_are_normalised_by_imagenets_statistics():
    images = torch.rand(2, 3, 4, 5)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    want = torchvision.transforms.functional.normalize(images, preset.mean, preset.std)
    assert torch.equal(model.normalize(images), want)


# ---------------------------------------------------------------- other libraries' networks


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "swin_t"])
def test_torchvisions_networks_lose_their_classifier_and_what_is_random(arch):
    original = torchvision.models.get_model(arch).eval()
    network = model.build(arch)
    report = network.load_state_dict(original.state_dict(), strict=False)
    assert not report.missing_keys and len(report.unexpected_keys) == 2
    for module in network.modules():
        assert getattr(module, "p", 0) == 0
    images = torch.randn(1, 3, 64, 32)
    features = network.eval()(images)
    assert features.shape == (1, network.embed_dim)
    classifier = [module for module in original.modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(classifier(features), original(images))


def test_volos_positions_follow_the_input_and_load_from_imagenet(tmp_path):
    timm = pytest.importorskip("timm")
    network = model.build("volo_d1").eval()
    state = network.state_dict()
    for size, grid in (((256, 128), (16, 8)), ((128, 64), (8, 4))):
        original = timm.create_model("volo_d1_224", num_classes=0, img_size=size).eval()
        resized = model.resize_positions(network.pos_embed, grid)
        original.load_state_dict(state | {"pos_embed": resized})
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(network(images), original(images))

    imagenet = timm.create_model("volo_d1_224").state_dict()  # 14 x 14 tokens, two classifiers
    torch.save(imagenet, tmp_path / "volo.pth")
    report = model.load_weights(network, tmp_path / "volo.pth")
    assert not report["missing"] and len(report["left_over"]) == 4
    want = model.resize_positions(imagenet["pos_embed"], (16, 8))
    torch.testing.assert_close(network.pos_embed.data, want)


@pytest.mark.parametrize("arch", ["ghostnet_0_5", "timm/mobilenetv3_small_050", "r10ibn"])
def test_synchronised_batch_norm_changes_no_output(arch):
    network = build(arch).eval()
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        before = network(images)
        network = model.sync_batch_norm(network)
        torch.testing.assert_close(network(images), before)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def test_nothing_in_a_network_of_timm_is_left_to_chance():
    network = build("ghostnet_0_5")
    images = torch.randn(4, 3, 64, 32)
    assert torch.equal(network(images), network(images))


def test_what_cannot_take_a_crop_is_refused_and_running_statistics_stay():
    with torch.device("meta"), pytest.raises(ValueError, match="vit_b_16 cannot .* 128x64: .*224"):
        model.check_sizes(model.build("vit_b_16"), "vit_b_16", [(128, 64)])
    network = model.build("r10ibn")
    model.check_sizes(network, "r10ibn", [(64, 32), (32, 16)])
    assert network.training and network.bn1.num_batches_tracked == 0


def test_unknown_networks_are_refused(monkeypatch):
    for arch in ("resnet", "fasterrcnn_resnet50_fpn", "swin_tiny", "r50_ibn"):
        with pytest.raises(ValueError, match=f"unknown arch '{arch}'"):
            model.build(arch)
    with pytest.raises(ValueError, match="squeezenet1_0: has no linear layer"):
        model.build("squeezenet1_0")
    with pytest.raises(ValueError, match="timm/nobodys: "):
        model.build("timm/nobodys")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="timm/ghostnet_050: .*timm"):
        model.build("ghostnet_0_5")


# ---------------------------------------------------------------- weights


def release(state):
    """A checkpoint as the authors' code writes it, with a head and a student of no use."""
    teacher = renamed("module.backbone.", state) | {"module.head.mlp.0.weight": torch.ones(2)}
    args = argparse.Namespace(arch="resnet50_ibn", lr=5e-4)
    return {"student": {}, "teacher": teacher, "epoch": 100, "args": args}


def renamed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPPINGS = {
    "release": release,
    "classifier": lambda state: state | {"fc.weight": torch.ones(10, 256), 0: torch.ones(1)},
    "moco": lambda state: {"state_dict": renamed("module.encoder_q.", state), "epoch": 3},
    "nested": lambda state: {"model": {"state_dict": renamed("_orig_mod.backbone.", state)}},
    "average": lambda state: {"model": {}, "model_ema": renamed("base.", state)},
    "below it": lambda state: {"model_ema": {"model": renamed("module.", state), 3: 4}},
    "timm": lambda state: {"state_dict": {}, "state_dict_ema": state},
    "odd": lambda state: state | {"a": torch.eye(2).to_sparse(), "b": torch.quantize_per_tensor(
        torch.ones(2), 0.1, 0, torch.qint8)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_load_from_every_wrapping(tmp_path, wrapping):
    source = model.build("r10ibn").state_dict()
    target = model.build("r10ibn")
    torch.save(WRAPPINGS[wrapping](source), tmp_path / "weights.pth")
    report = model.load_weights(target, tmp_path / "weights.pth")
    assert report["matched"] == list(source) and not report["missing"]
    assert all(torch.equal(value, source[name]) for name, value in target.state_dict().items())


def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path):
    file = tmp_path / "weights.pth"
    state = model.build("r10ibn").state_dict()
    assert "has only 0%" in refused({"weights": 1}, "r10ibn", file)
    words = refused({0: torch.ones(2), 1: torch.ones(2)}, "r10ibn", file)
    assert "has in another shape, ['conv1.weight', " in words and "; it has ['0', '1']" in words
    assert "expected a dict of weights, got a list" in refused([torch.ones(2)], "r10ibn", file)
    assert re.search(r"has only \d+%", refused(model.build("r18ibn").state_dict(), "r10ibn", file))
    state["layer2.0.conv1.weight"][0, 0] = float("nan")
    assert "layer2.0.conv1.weight holds numbers that are not" in refused(state, "r10ibn", file)
    huge = {name: value.double() * 1e300 for name, value in state.items()}
    assert "holds numbers that are not finite" in refused(huge, "r10ibn", file)
    whole = {name: value.to(torch.int8) for name, value in state.items()}
    assert "has only 0%" in refused(whole, "r10ibn", file)


def test_files_that_carry_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    (tmp_path / "pickled.pth").write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    torch.save({"model": Evil()}, tmp_path / "saved.pth")
    for name in ("pickled", "saved"):
        with pytest.raises(ValueError, match=f"{name}.pth: cannot be read .*: UnpicklingError"):
            model.read_checkpoint(tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        model.read_checkpoint(tmp_path / "gone.pth")
    assert not (tmp_path / "owned").exists()


def test_imagenet_weights_of_torchvision_load_and_what_is_missing_is_named(tmp_path):
    source = torchvision.models.resnet18().state_dict()
    torch.save(source, tmp_path / "resnet18.pth")
    report = model.load_weights(model.build("r18"), tmp_path / "resnet18.pth")
    assert report["missing"] == [] and report["left_over"] == ["fc.weight", "fc.bias"]
    assert "WARNING" not in model.describe(report)
    report = model.load_weights(model.build("r18ibn"), tmp_path / "resnet18.pth")
    assert "layer1.0.bn1.weight" in report["left_over"] and "bn1.weight" in report["matched"]
    missing = len(report["missing"])
    assert f"{missing} missing ['layer1.0.bn1.IN.weight', " in model.describe(report)
    assert "WARNING: what is missing keeps its initial values" in model.describe(report)


def test_a_vit_takes_the_blocks_of_timms_and_dinos_but_not_the_stem(tmp_path):
    source = model.build("vit_small").state_dict()
    dino = {name: value for name, value in source.items() if "patch_embed" not in name}
    dino["patch_embed.proj.weight"] = torch.randn(384, 3, 16, 16)
    dino["pos_embed"] = torch.randn(1, 197, 384)
    torch.save(dino, tmp_path / "dino.pth")
    target = model.build("vit_small")
    report = model.load_weights(target, tmp_path / "dino.pth")
    assert report["missing"] == [name for name in source if "patch_embed" in name]
    assert torch.equal(target.blocks[7].attn.qkv.weight, source["blocks.7.attn.qkv.weight"])
    tiny = model.build("vit_tiny").state_dict()
    tiny = {name: value for name, value in tiny.items() if "patch_embed" not in name}
    assert "has only 86% of this network" in refused(tiny, "vit_tiny", tmp_path / "tiny.pth")


@pytest.mark.parametrize("height, width", [(14, 14), (24, 24), (24, 8)])
def test_positions_are_resized_as_a_picture(tmp_path, height, width):
    """Embeddings that grow from the left to the right do so in our grid too."""
    across = (torch.arange(width) + 0.5) / width
    grid = across.repeat(height)[:, None].expand(-1, 192)
    state = model.build("vit_tiny").state_dict()
    state["pos_embed"] = torch.cat([torch.full((1, 192), 5), grid])[None].half()
    torch.save(state, tmp_path / "vit.pth")
    vit = model.build("vit_tiny")
    with warnings.catch_warnings(record=True) as record:
        model.load_weights(vit, tmp_path / "vit.pth")
    # 256x192 images have as many tokens as 384x128
    said = [str(w.message) for w in record if "position embeddings" in str(w.message)]
    assert len(said) == (height * width == 192)
    first, rest = vit.pos_embed[0].split([1, 128])
    want = (torch.arange(8) + 0.5) / 8
    assert (first == 5).all()
    assert (rest.unflatten(0, (16, 8)) - want[:, None]).abs().max() < 0.02


@pytest.mark.parametrize("n", [18 * 8, 32 * 8, 20 * 10])
def test_positions_of_grids_that_n_does_not_tell_are_refused(tmp_path, n):
    state = model.build("vit_tiny").state_dict()
    state["pos_embed"] = torch.randn(1, 1 + n, 192)
    words = refused(state, "vit_tiny", tmp_path / "vit.pth")
    assert f"vit.pth: {n} position embeddings; known grids are" in words
    state["pos_embed"] = torch.randn(1 + n, 192)
    words = refused(state, "vit_tiny", tmp_path / "vit.pth")
    assert f"pos_embed, which is of another grid, has the shape ({1 + n}, 192), expect" in words


# timm's names as patterns, and the published ones: of ConvNeXt and EdgeNeXt, and of FastViT
NEXT = r"""
    ^stem\.                      downsample_layers.0.
    ^stages\.(\d)\.downsample    downsample_layers.\1
    \.blocks\.                   .
    conv_dw                      dwconv
    mlp\.fc                      pwconv
    ^head\.norm                  norm
"""
FASTVIT = r"""
    ^stem                        patch_embed
    ^stages\.1\.downsample       network.1
    ^stages\.2\.downsample       network.3
    ^stages\.3\.downsample       network.5
    ^stages\.0\.blocks           network.0
    ^stages\.1\.blocks           network.2
    ^stages\.2\.blocks           network.4
    ^stages\.3\.blocks           network.6
    conv_kxk                     rbr_conv
    conv_scale                   rbr_scale
    identity                     rbr_skip
    final_conv                   conv_exp
    large_conv                   lkb_origin
    mlp                          convffn
    se\.fc1                      se.reduce
    se\.fc2                      se.expand
    layer_scale\.gamma           layer_scale
"""


@pytest.mark.parametrize(
    "arch, names", [("convnext_tiny", NEXT), ("edgenext_x_small", NEXT), ("fastvit_s12", FASTVIT)]
)
def test_published_names_of_timms_networks_are_translated(tmp_path, arch, names):
    source = build(arch).state_dict()
    published = {}
    for name, value in source.items():
        for line in names.strip().splitlines():
            name = re.sub(*line.split(), name)
        published[name] = value
    assert published.keys().isdisjoint(source)
    torch.save(release(published), tmp_path / "weights.pth")
    target = model.build(arch)
    report = model.load_weights(target, tmp_path / "weights.pth")
    assert len(report["matched"]) == len(source) and not report["missing"]
    assert all(torch.equal(value, source[name]) for name, value in target.state_dict().items())
    assert "has only" in refused(torchvision.models.resnet18().state_dict(), arch, tmp_path / "r")


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize("arch, prefix", [("r10ibn", "module."), ("edgenext_x_small", "")])
def test_exported_weights_give_the_same_features(tmp_path, monkeypatch, arch, prefix):
    monkeypatch.chdir(tmp_path)
    backbone = build(arch).eval()
    teacher = renamed("backbone.", backbone.state_dict())
    teacher["head.last_layer.weight"] = torch.ones(1)
    settings = {"arch": arch, "size": (64, 32), "lr": 1}
    torch.save({"teacher": teacher, "step": 1, "settings": settings}, "last.pt")
    for command in ("export last.pt --out a.pth", "export last.pt --out b.pth --names plain"):
        monkeypatch.setattr("sys.argv", ["model.py", *command.split()])
        model.main()
    with pytest.raises(ValueError, match="b.pth: exists already"):
        model.main()
    for exported in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match=f"{exported}: is not a checkpoint of train.py"):
            model.export(exported, "c.pth")
    assert sorted(os.listdir()) == ["a.pth", "b.pth", "last.pt"]

    names = renamed(f"{prefix}backbone.", backbone.state_dict())
    assert torch.load("a.pth", weights_only=True)["teacher"].keys() == names.keys()
    build(arch).load_state_dict(torch.load("b.pth", weights_only=True))
    images = torch.randn(2, 3, 64, 32)
    loaded, size = model.load_backbone("a.pth")
    assert size == (64, 32) and torch.equal(loaded(images), backbone(images))
    loaded, size = model.load_backbone("b.pth", arch)
    assert size == (256, 128) and torch.equal(loaded(images), backbone(images))


def test_a_checkpoint_says_its_architecture_and_size(tmp_path, capsys):
    state = model.build("r10ibn").state_dict()
    settings = {"arch": "r10ibn", "size": (64, 32)}
    file = tmp_path / "last.pt"
    torch.save({"teacher": renamed("backbone.", state), "settings": settings}, file)
    backbone, size = model.load_backbone(file)
    assert size == (64, 32) and not backbone.training
    assert f"{file}: images of 64x32, {len(state)} matched [" in capsys.readouterr().out
    torch.save(state | {"settings": argparse.Namespace(arch="r10ibn")}, file)
    with pytest.raises(ValueError, match="last.pt: does not say which architecture"):
        model.load_backbone(file)


def test_the_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model.py", "r10ibn", "vit_tiny"])
    model.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == TABLE[:2] and [row[0] for row in TABLE] == model.ARCHITECTURES
    # all are listed without timm, too
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("sys.argv", ["model.py"])
    model.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == model.ARCHITECTURES
    assert lines[-1].endswith("needs timm; pip install timm")
