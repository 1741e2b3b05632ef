"""Networks, their weights and the features they make: what turns a person crop into a vector.
ResNet-IBN and ViT with an IBN convolution stem (Luo et al., 2021) are our own; their instance-batch normalisation (IBN-Net, Pan et al.,
ECCV 2018) removes camera style and keeps identity. Names in state dicts are those of the authors' release. The other structures of the
paper's zoo (table 5) come from torchvision and timm. Features are made here, for denoise.py, train.py and evaluate.py.

    python model.py r50ibn timm/ghostnet_100     # parameters, multiply-adds and speed; without names, of the paper's 32 networks

Read first: `ResNet`, `build`, `extract`.
"""
import argparse
import hashlib
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, distributed as dist, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from data import Tracklets, load_batches, replacing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the paper


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the rest. (B, C, H, W) -> same."""
    def __init__(self, channels: int):
        super().__init__()
        self.IN, self.BN = nn.InstanceNorm2d(channels // 2, affine=True), nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        half = self.IN.num_features
        return torch.cat([self.IN(x[:, :half]), self.BN(x[:, half:])], dim=1)


class ResNet(nn.Module):
    """ResNet (He et al., CVPR 2016), its last stage at stride 1 (Luo et al., 2019), with `ibn` IBN in each block of stages 1 to 3 (IBN-a).
    Images (B, 3, H, W) -> features (B, embed_dim), the mean of the last feature map."""
    memory_format = torch.channels_last  # in which it trains faster

    def __init__(self, block: type, layers: tuple, width: int = 64, ibn: bool = True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.embed_dim = width
        for stage, (depth, stride) in enumerate(zip(layers, (1, 2, 2, 1)), start=1):
            planes, blocks = width * 2 ** (stage - 1), []
            for step in [stride] + [1] * (depth - 1):
                inplanes, self.embed_dim, shortcut = self.embed_dim, planes * block.expansion, None
                if step > 1 or inplanes != self.embed_dim:
                    shortcut = nn.Sequential(conv1x1(inplanes, self.embed_dim, step), nn.BatchNorm2d(self.embed_dim))
                blocks.append(block(inplanes, planes, step, shortcut))
                last = blocks[-1].bn2 if block is BasicBlock else blocks[-1].bn3
                nn.init.zeros_(last.weight)  # each block starts as its shortcut (Goyal et al., 2017)
                if ibn and stage < 4:
                    blocks[-1].bn1 = IBN(planes)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)  # (B, width, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, embed_dim, H/16, W/16)
        return x.mean(dim=(2, 3))


class Block(nn.Module):
    """Self-attention and a perceptron, each behind a norm (Dosovitskiy et al., ICLR 2021). (B, N, C) -> same."""
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, C/heads)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer with a convolution stem: images (B, 3, H, W) -> the class token's feature (B, embed_dim).
    The position embeddings are those of a `grid` of tokens, that of 256x128, and are resized for any other."""
    def __init__(self, embed_dim: int, heads: int, depth: int = 12, grid: tuple = (16, 8)):
        super().__init__()
        self.embed_dim, self.grid = embed_dim, grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], embed_dim))
        stem = [nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), IBN(64), nn.ReLU(), conv3x3(64, 64), IBN(64), nn.ReLU(),
                conv3x3(64, 64), nn.BatchNorm2d(64), nn.ReLU()]
        self.patch_embed = nn.ModuleDict({"conv": nn.Sequential(*stem), "proj": nn.Conv2d(64, embed_dim, 8, stride=8)})
        self.blocks = nn.Sequential(*[Block(embed_dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed.proj(self.patch_embed.conv(images))  # (B, C, H/16, W/16)
        positions = resize_positions(self.pos_embed, self.grid, tokens.shape[2:])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + N, C)
        return self.norm(self.blocks(x + positions))[:, 0]


def resize_positions(positions: Tensor, old: tuple, new: tuple) -> Tensor:
    """Position embeddings for another grid of tokens, bicubic: (1, n + old, C) -> (1, n + new, C), those of n other tokens first."""
    if old == new:
        return positions
    n = positions.shape[1] - math.prod(old)
    grid = positions[:, n:].unflatten(1, old).permute(0, 3, 1, 2)  # (1, C, *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :n], grid.flatten(2).transpose(1, 2)], dim=1)


class Head(nn.Module):
    """Projection head of DINO (Caron et al., ICCV 2021): features (B, embed_dim) -> logits (B, D), cosines of what a perceptron
    makes of the features and D prototypes: a last layer with weight norm, its gain fixed at 1.
    `batch_norm` puts a batch norm without affine before the L2 norm, with which a short run on few images learns more."""
    def __init__(self, embed_dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, batch_norm: bool = False):
        super().__init__()
        norm = [nn.BatchNorm1d(bottleneck, affine=False)] if batch_norm else []
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck), *norm)
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        for name, values in self.named_parameters():
            nn.init.zeros_(values) if name.endswith("bias") else nn.init.trunc_normal_(values, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        z = self.mlp(features)
        # in float32 under autocast too: a logit is divided by a small temperature, and told from D others
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)  # (B, bottleneck)
            prototypes = F.normalize(self.last_layer.weight, dim=-1)  # (D, bottleneck)
            return z @ prototypes.T


ARCHITECTURES = {
    "r10ibn": lambda: ResNet(BasicBlock, (1, 1, 1, 1), width=32),
    "r18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), ibn=False), "r18ibn": lambda: ResNet(BasicBlock, (2, 2, 2, 2)),
    "r50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), ibn=False), "r50ibn": lambda: ResNet(Bottleneck, (3, 4, 6, 3)),
    "r101": lambda: ResNet(Bottleneck, (3, 4, 23, 3), ibn=False), "r101ibn": lambda: ResNet(Bottleneck, (3, 4, 23, 3)),
    "r152": lambda: ResNet(Bottleneck, (3, 8, 36, 3), ibn=False), "r152ibn": lambda: ResNet(Bottleneck, (3, 8, 36, 3)),
    "vit_tiny": lambda: ViT(192, heads=3), "vit_small": lambda: ViT(384, heads=6), "vit_base": lambda: ViT(768, heads=12),
}
ZOO = [name for name in ARCHITECTURES if name != "r10ibn"] + """
    convnext_tiny convnext_small convnext_base swin_t swin_s swin_b timm/ghostnet_050 timm/ghostnet_100 timm/ghostnet_130
    timm/edgenext_x_small timm/edgenext_small timm/edgenext_base timm/repvit_m0_9 timm/repvit_m1_0 timm/repvit_m1_5
    timm/fastvit_s12 timm/fastvit_sa12 timm/fastvit_sa24 timm/volo_d1_224 timm/volo_d2_224 timm/volo_d3_224""".split()  # the paper's 32


def build(arch: str) -> nn.Module:
    """The backbone of that name: images (B, 3, H, W), normalised -> features (B, embed_dim); has the attribute `embed_dim`.
    arch: of ARCHITECTURES, any classifier of torchvision by its name, or of timm as timm/<name>. Raises ValueError for others."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]()
    if arch.startswith("timm/"):
        model = build_timm(arch.removeprefix("timm/"))
    elif arch in torchvision.models.list_models(torchvision.models):
        model = torchvision.models.get_model(arch)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"{arch}: does not end in a linear classifier that could be removed")
        model.embed_dim = model.get_submodule(linear[-1]).in_features
        model.set_submodule(linear[-1], nn.Identity())
    else:
        raise ValueError(f"unknown arch '{arch}'; known: {', '.join(ARCHITECTURES)}, torchvision's models by their names (convnext_tiny), "
                         "timm's as timm/<name> (timm/ghostnet_100)")
    for module in model.modules():  # dropout and stochastic depth draw from a global generator, which a resumed run could not repeat
        for name in ("p", "drop_rate", "drop_prob"):  # of torchvision's layers, of timm's networks, of timm's layers
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def build_timm(name: str) -> nn.Module:
    """A model of timm without its classifier, for images of any size where timm or a few lines here can make it so."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"arch 'timm/{name}' needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"unknown arch 'timm/{name}'; python -c 'import timm; print(timm.list_models())' prints what this timm knows")
    volo = name.startswith("volo")
    # ViTs of timm resize their positions, and its Swins cut their windows, where they are asked to; others don't know the question
    for option in [{"img_size": (256, 128)}] if volo else [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]:
        try:
            model = timm.create_model(name, num_classes=0, **option)
            break
        except TypeError:
            if not option:
                raise
    model.embed_dim = getattr(model, "head_hidden_size", None) or model.num_features
    if volo:
        class AnySize(type(model)):
            """VOLO adds position embeddings of one size to any tokens; these follow the input."""
            @property
            def pos_embed(self) -> Tensor:
                """The embeddings for the grid of the last input."""
                return resize_positions(self._parameters["pos_embed"].flatten(1, 2), (16, 8), self.grid).unflatten(1, self.grid)

            def forward(self, images: Tensor) -> Tensor:
                self.grid = tuple((side + 1) // 2 // 8 for side in images.shape[2:])  # as its strided convolutions round
                return super().forward(images)
        model.__class__ = AnySize  # not a wrapper, so that weights keep their names
    return model


def check_sizes(backbone: nn.Module, arch: str, sizes) -> None:
    """Try a network of another library on images of the sizes (H, W). Raises ValueError where it gives no (B, embed_dim)."""
    for size in sizes if arch not in ARCHITECTURES else ():
        try:
            with torch.no_grad():
                out = backbone(torch.zeros(2, 3, *size))
            if out.shape != (2, backbone.embed_dim):
                raise ValueError(f"expected features (2, {backbone.embed_dim}) of two, got {tuple(out.shape)}")
        except Exception as error:  # whatever a network of somebody else's raises
            raise ValueError(f"{arch} cannot take images of {size[0]}x{size[1]}: {error}") from None


def read_checkpoint(file) -> dict:
    """What torch.save or safetensors wrote, as tensors and plain values: nothing in the file is executed. Raises ValueError."""
    scalar = np.float64(0).__reduce__()[0]  # makes a NumPy number; the authors keep their command line in the file, others an accuracy
    values = [argparse.Namespace, (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype,
              *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]
    try:
        if str(file).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(file)
        with torch.serialization.safe_globals(values):
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a missing, foreign or damaged file makes them raise
        why = re.search(r"Unsupported (global|operand|class)[^.\n]*|No such file|Is a directory|No module named '\w+'", str(error))
        raise ValueError(f"{file}: cannot be read as weights, a dict of tensors and values: {why[0] if why else repr(error)}") from None


def backbone_weights(checkpoint: dict, own) -> dict[str, Tensor]:
    """The state dict in a checkpoint, the teacher's where there is one; names that `own` does not have lose the prefixes of wrappers."""
    while nested := [checkpoint[key] for key in ("teacher", "student", "state_dict", "model") if isinstance(checkpoint.get(key), dict)]:
        checkpoint = nested[0]
    state = {}
    for name, value in checkpoint.items():
        while name not in own and (wrapper := re.match(r"(module|backbone|base|model|_orig_mod|encoder_q)\.", name)):
            name = name[wrapper.end() :]
        if isinstance(value, Tensor):
            state[name] = value
    return state


def load_weights(model: nn.Module, file) -> dict:
    """Load backbone weights from our checkpoints, the authors' release, ImageNet's of IBN-Net, torchvision and timm, or DINO's. A ViT
    takes the blocks of timm's and DINO's, not the stem. Returns {"matched", "missing", "left_over"}: lists of names. Raises ValueError,
    leaving the model as it was, where less than 90% of its parameters find a tensor of their name and shape, or one is not finite."""
    own = model.state_dict()
    state = backbone_weights(read_checkpoint(file), own)
    theirs, ours = state.get("pos_embed", Tensor()), own.get("pos_embed", Tensor())
    side = math.isqrt(theirs.shape[1]) if theirs.ndim == 3 else 0
    if theirs.ndim == ours.ndim == 4:  # VOLO's, (1, h, w, C)
        grid = ours.shape[1:3]
        state["pos_embed"] = resize_positions(theirs.float().flatten(1, 2), theirs.shape[1:3], grid).unflatten(1, grid)
    elif isinstance(model, ViT) and side and theirs.shape[1] == 1 + side * side:  # a class token and a square of others
        state["pos_embed"] = resize_positions(theirs.float(), (side, side), model.grid)
    matched = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    report = {"matched": list(matched), "missing": [name for name in own if name not in matched],
              "left_over": [name for name in state if name not in matched]}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    share = sum(size for name, size in sizes.items() if name in matched) / sum(sizes.values())
    if share < 0.9:
        raise ValueError(f"{file}: only {share:.0%} of the model's parameters matched; another architecture's? "
                         f"missing {report['missing'][:3]}, left over {report['left_over'][:3]}")
    if broken := [name for name, tensor in matched.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{file}: {len(broken)} of {len(matched)} tensors hold numbers that are not finite, the first: {broken[0]}")
    model.load_state_dict(matched, strict=False)
    return report


def describe(report: dict) -> str:
    """What `load_weights` did, in a line."""
    name = lambda names: f"{len(names)}" + (f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "")
    text = f"{len(report['matched'])} tensors matched, missing {name(report['missing'])}, left over {name(report['left_over'])}"
    return text + "; WARNING: what is missing keeps its initial values, so features are not the file's" * bool(report["missing"])


def load_backbone(weights, arch: str | None = None, size: tuple[int, int] | None = None, say=lambda text: None):
    """A backbone with weights, its input size and the settings of the run they come from (empty for other people's files)."""
    settings = read_checkpoint(weights).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    arch, size = arch or settings.get("arch"), tuple(size or settings.get("size", (256, 128)))
    if not arch:
        raise ValueError(f"{weights}: does not say which architecture it is for; add --arch")
    torch.manual_seed(0)  # whatever the file does not hold is at least the same every time
    backbone = build(arch).eval()
    say(f"{weights}: {describe(load_weights(backbone, weights))}")
    check_sizes(backbone, arch, [size])
    return backbone, size, settings


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> zero mean, unit variance over ImageNet."""
    mean, std = torch.tensor([MEAN, STD], dtype=images.dtype).to(images.device, non_blocking=True)  # which is not waited for
    return (images - mean[:, None, None]).div_(std[:, None, None])


@torch.no_grad()
def embed(backbone: nn.Module, tracklets: Tracklets, batches: list, canvas: tuple[int, int], device, workers: int = 0, flip: bool = False):
    """Features of batches of images: yields (rows, float32 (B, embed_dim) of unit length on the CPU), zero where unreadable.
    flip: of the sum of the image's and its mirror image's."""
    backbone.eval()
    for rows, (images, readable) in zip(batches, load_batches(tracklets, batches, canvas, workers)):
        images = normalize(images.to(device, non_blocking=True).float() / 255)
        out = backbone(images) + backbone(images.flip(3)) if flip else backbone(images)
        yield rows, F.normalize(out.float(), dim=1).cpu() * readable[:, None]


def extract(backbone: nn.Module, tracklets: Tracklets, canvas: tuple[int, int], device, workers: int = 0, batch: int = 256,
            item: np.ndarray | None = None, flip: bool = False) -> tuple[Tensor, np.ndarray]:
    """Features of all images, float32 (N, embed_dim) of unit length on the CPU, zero where unreadable; which are readable, bool (N,).
    item (N,), ascending: instead, the mean of the features of each item's images, one row an item, of unit length again.
    Several processes share the batches, which are the same for any number of them, and all end with all features."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    item = np.arange(len(tracklets)) if item is None else item
    begin = np.searchsorted(item, item) // batch  # an item's images stay together, so that their sum has one order
    batches = np.split(np.arange(len(item)), np.flatnonzero(np.diff(begin)) + 1)[rank::world_size]
    features, readable = torch.zeros(int(item[-1]) + 1, backbone.embed_dim), torch.zeros(len(item), dtype=torch.uint8)
    for rows, out in embed(backbone, tracklets, batches, canvas, device, workers, flip):
        features.index_add_(0, torch.from_numpy(item[rows]), out)
        readable[rows] = out.any(1).byte()
    for mine in (features, readable) if world_size > 1 else ():
        total = mine.to(device)
        dist.all_reduce(total)  # of each row one summand is not zero
        mine.copy_(total)
    return features if len(features) == len(item) else F.normalize(features, dim=1), readable.numpy().astype(bool)


def extract_to_file(folder, backbone: nn.Module, tracklets: Tracklets, canvas: tuple[int, int], device, workers: int = 0,
                    batch: int = 256, save_every: float = 30) -> np.ndarray:
    """Features as `extract`'s, float16 (N, embed_dim), memory-mapped from folder/features-<key>.npy; the key stands for weights and
    names of images (after changing images under their names, delete it). What is there is not computed again, and a killed run goes
    on, on any number of processes: features-<key>.done ticks off the blocks of `batch` images on the disk, every `save_every` seconds."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wait = dist.barrier if world_size > 1 else lambda: None
    key = hashlib.sha256(repr((str(tracklets.root.resolve()), tracklets.folders, canvas, batch)).encode())
    for array in (tracklets.name, tracklets.video, *(tensor.cpu().float().numpy() for tensor in backbone.state_dict().values())):
        key.update(np.ascontiguousarray(array))
    file = Path(folder) / f"features-{key.hexdigest()[:12]}.npy"
    part, done = file.with_suffix(".part"), file.with_suffix(".done")
    if rank == 0:
        begun = part.exists() and done.exists()
        print("features:", f"found in {file}" if file.exists() else f"going on with {part}" if begun else f"into {file}", flush=True)
        if not (file.exists() or begun):
            with replacing(part) as new_part, replacing(done) as new_done:
                np.lib.format.open_memmap(new_part, "w+", np.float16, (len(tracklets), backbone.embed_dim))
                np.zeros(math.ceil(len(tracklets) / batch), bool).tofile(new_done)
    wait()
    if not file.exists():
        features, ticks = np.lib.format.open_memmap(part, "r+"), np.memmap(done, bool, "r+")
        blocks = np.flatnonzero(~ticks)[rank::world_size]
        wait()  # nobody ticks before all have looked
        batches, clock = [np.arange(block * batch, min((block + 1) * batch, len(features))) for block in blocks], time.time()
        for n, (rows, out) in enumerate(embed(backbone, tracklets, batches, canvas, device, workers), start=1):
            features[rows] = out.numpy()
            if time.time() >= clock + save_every or n == len(blocks):
                features.flush()  # to the disk before it is said to be there
                ticks[blocks[:n]], clock = True, time.time()
                if rank == 0:
                    print(f"features of {ticks.mean():.1%} of {len(tracklets):,} images", flush=True)
        wait()
        if rank == 0:
            part.replace(file)
            done.unlink()
        wait()
    return np.load(file, mmap_mode="r")


def multiply_adds(backbone: nn.Module, size: tuple[int, int] = (256, 128)) -> int:
    """Multiply-adds of one image, which torch counts as two operations; attention as plain products, which all versions count."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


@torch.no_grad()
def main() -> None:
    """Print a table of architectures: parameters, multiply-adds of a 256x128 image, width of the embedding, speed here."""
    from torch.utils.benchmark import Timer  # which looks for compilers, and says so

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("arch", nargs="*", help="names as --arch of train.py takes them (default: the paper's 32 networks)")
    names, failed = parser.parse_args().arch, False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'arch':<22} {'parameters':>12} {'multiply-adds':>14} {'embedding':>10} {'images/s':>9}   ({device.type}, float32, eval mode)")
    for arch in names or ["r10ibn", *ZOO]:
        try:
            model = build(arch).eval()
            check_sizes(model, arch, [(256, 128)])
            count, work = sum(p.numel() for p in model.parameters()), multiply_adds(model)
            forward = {"model": model.to(device), "images": torch.randn(16, 3, 256, 128, device=device)}
            seconds = Timer("model(images)", globals=forward, num_threads=torch.get_num_threads()).timeit(3).mean
            print(f"{arch:<22} {count:>12,} {work / 1e9:>12.2f} G {model.embed_dim:>10} {16 / seconds:>9,.0f}", flush=True)
        except ValueError as error:
            print(f"{arch:<22} {error}", flush=True)
            failed = True
    if names and failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
