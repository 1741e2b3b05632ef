"""distill.py: views against torchvision's, the loss against plain loops over its equation, the rest
against its definition."""
import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import distributed as dist
from torch.multiprocessing import start_processes
from torch.testing import assert_close

import distill


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def smooth_images(n):
    """Random images (n, 3, 64, 32), uint8, without edges that resizing would blur."""
    small = torch.rand(n, 3, 8, 4, generator=seeded(0))
    return (torch.nn.functional.interpolate(small, (64, 32), mode="bilinear") * 255).byte()


def plain_views(**changes):
    """Views that leave an image as it is but for what is given, and mirroring."""
    off = {"size": (64, 32), "scale": (1, 1), "ratio": (0.5, 0.5)}
    off |= {"jitter_p": 0, "grey_p": 0, "blur_p": 0}
    return distill.Views(**off | changes)


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.05, 0.8)])
def test_crops_are_torchvisions(scale):
    """Exactly for floats, as on a GPU; bytes up to their rounding for columns and for rows."""
    images = torch.randint(0, 256, (12, 3, 64, 32), dtype=torch.uint8, generator=seeded(0))
    views = plain_views(size=(32, 16), scale=scale, ratio=(0.4, 0.6))
    drawn = views.draw(12, (64, 32), seeded(0))
    floats = distill.crop_and_resize(images.float(), drawn["box"], (32, 16))
    got = views.render(images, drawn)
    for i, box in enumerate(drawn["box"].tolist()):
        want = TF.resized_crop(images[i].float() / 255, *box, [32, 16], antialias=True)
        assert_close(floats[i], want, atol=1e-5, rtol=0)
        if drawn["flip"][i]:
            want = want.flip(2)
        assert_close(got[i], want, atol=1.01 / 255, rtol=0)
    assert 0 < drawn["flip"].sum() < 12


OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def test_colours_are_torchvisions_each_image_in_its_own_order():
    images = smooth_images(24)
    images[0, :, :4] = 128  # grey and black have no hue
    images[1, :, :4] = 0
    views = plain_views(jitter_p=0.8, jitter=(0.4, 0.4, 0.2, 0.1))
    drawn = views.draw(24, (64, 32), seeded(2))
    drawn["flip"][:] = False
    got = views.render(images, drawn)
    orders = set()
    for i, want in enumerate(images / 255):
        if drawn["jitter"][i]:
            order = tuple(drawn["order"][i].tolist())
            for k in order:
                want = OPERATIONS[k](want, drawn["factors"][i, k].item())
            orders.add(order)
        assert_close(got[i], want, atol=2e-4, rtol=0)
    assert len(orders) > 4 and not drawn["jitter"].all()
    # without a strength an operation is left out
    views.jitter = (0.4, 0, 0, 0)
    factor = drawn["factors"][:, 0].where(drawn["jitter"], 1)[:, None, None, None]
    assert_close(views.render(images, drawn), (images / 255 * factor).clamp(0, 1))


def test_blur_is_torchvisions():
    images = smooth_images(2) / 255
    sigmas = (0.8, 1.5)
    got = distill.Views(blur_sigma=1.5).blur(images, torch.tensor(sigmas)[:, None, None, None])
    # torchvision mirrors at the border, and has a reach of 3 x 1.5 pixels here
    padded = torch.nn.functional.pad(images, [5] * 4, mode="replicate")
    for i, sigma in enumerate(sigmas):
        want = TF.gaussian_blur(padded[i], [11, 11], sigma)[:, 5:-5, 5:-5]
        assert_close(got[i], want, atol=1e-5, rtol=0)


def test_each_image_gets_what_was_drawn_for_it():
    images = smooth_images(5)
    views = plain_views()
    drawn = views.draw(5, (64, 32), seeded(0))
    for n, name in enumerate(("flip", "grey", "solarize", "blur")):
        drawn[name] = torch.arange(5) == n
    x = views.render(images, drawn)
    plain = images / 255
    assert_close(x[0], plain[0].flip(2))
    assert_close(x[1], TF.rgb_to_grayscale(plain[1], 3), atol=2e-4, rtol=0)
    assert_close(x[2], TF.solarize(plain[2], 0.5))
    assert_close(x[3:4], views.blur(plain[3:4], drawn["sigma"][3].view(1, 1, 1, 1)))
    assert_close(x[4], plain[4])


def test_parameters_follow_the_recipe():
    views = distill.Views(scale=(0.05, 0.8), blur_p=0.5, solarize_p=0.2)
    drawn = views.draw(20_000, (2560, 1280), seeded(0))
    shares = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarize": 0.2}
    chances = torch.stack([drawn[name].float() for name in shares])
    assert_close(chances.mean(1), torch.tensor([*shares.values()]), atol=0.02, rtol=0)
    assert_close(chances.corrcoef(), torch.eye(5), atol=0.03, rtol=0)
    top, left, height, width = drawn["box"].T
    assert (top + height).max() == 2560 and (left + width).max() == 1280
    # what is uniform has its mean in the middle and fills its range
    for values, low, high in (
        (height * width / 2560 / 1280, 0.05, 0.8),
        ((width / height).log(), math.log(0.4), math.log(0.6)),
        (top / (2560 - height), 0, 1),
        (drawn["sigma"], 0.1, 2.0),
        (drawn["order"][:, 0].float(), 0, 3),
        (drawn["factors"][:, 0], 0.6, 1.4),
        (drawn["factors"][:, 3], -0.1, 0.1),
    ):
        found = torch.stack([values.min(), values.mean(), values.max()])
        wanted = torch.tensor([low, (low + high) / 2, high])
        assert ((found - wanted).abs() < 0.025 * (high - low)).all(), (found, wanted)


def test_a_box_that_cannot_fit_is_the_largest_in_the_middle():
    """Of a square image, no box of 0.9 of the area is half as wide as high."""
    boxes = distill.draw_boxes(5, (64, 64), (0.9, 1.0), (0.4, 0.5), seeded(0))
    assert boxes.tolist() == [[0, 16, 64, 32]] * 5
    boxes = distill.draw_boxes(5, (100, 20), (0.9, 1.0), (0.4, 0.5), seeded(0))
    assert boxes.tolist() == [[25, 0, 50, 20]] * 5


def test_views_do_not_depend_on_the_number_of_processes_nor_on_each_other():
    images = smooth_images(8)
    kind = distill.Views((32, 16), (0.05, 1.0), solarize_p=0.5)
    whole = distill.make_views(images, [kind, kind], seeded(5))
    first = kind.render(images, kind.draw(8, (64, 32), seeded(5)))
    assert_close(whole[0], distill.normalize(first), atol=1e-5, rtol=0)
    for n in (1, 4):
        shares = []
        for rank, mine in enumerate(images.split(n)):
            views = distill.make_views(mine, [kind, kind], seeded(5), rank, 8 // n)
            shares.append(torch.stack(views))
        assert_close(torch.cat(shares, dim=1), torch.stack(whole), atol=1e-5, rtol=0)
    assert (whole[0] - whole[1]).abs().max() > 0.1  # each view is drawn anew
    other = distill.make_views(images, [kind], seeded(6))
    assert (other[0] - whole[0]).abs().max() > 0.1


def test_no_view_waits_for_the_device():
    """On a device that has no values: reading one would raise."""
    views = distill.Views((32, 16), solarize_p=0.5)
    drawn = views.draw(6, (64, 32), seeded(0))
    assert views.render(smooth_images(6).to("meta"), drawn).shape == (6, 3, 32, 16)


# ---------------------------------------------------------------- the loss


def H(p, log_q):
    return -(p * log_q).sum()


def papers(p, log_q, K):
    """Eq. 9 as it reads: all ordered pairs (i, j) of an identity's images, both global views x of
    i, all views x' != x of j."""
    V, B, _ = log_q.shape
    terms = []
    for first in range(0, B, K):
        for i in range(first, first + K):
            for j in range(first, first + K):
                for x in range(2):
                    for x_ in range(V):
                        if (i, x) != (j, x_):
                            terms.append(H(p[x, i], log_q[x_, j]))
    return sum(terms) / len(terms)


def releases(p, log_q, K):
    """The authors' code: pairs of different views u, v, and of each the mean over images and, for
    each i != j, the mean over identities."""
    V, B, _ = log_q.shape
    losses = []
    for u in range(2):
        for v in range(V):
            if u == v:
                continue
            loss = sum(H(p[u, b], log_q[v, b]) for b in range(B)) / B
            for i in range(K):
                for j in range(K):
                    if i != j:
                        pairs = [H(p[u, n + i], log_q[v, n + j]) for n in range(0, B, K)]
                        loss = loss + sum(pairs) / len(pairs)
            losses.append(loss / (K * (K - 1) + 1))
    return sum(losses) / len(losses)


def logits(V, B=8, D=12):
    generator = seeded(V)
    student = torch.randn(V, B, D, generator=generator) / 5
    teacher = torch.randn(2, B, D, generator=generator) / 5
    center = torch.randn(D, generator=generator) / 9
    return student.requires_grad_(), teacher.requires_grad_(), center


@pytest.mark.parametrize("weights, definition", [("paper", papers), ("release", releases)])
@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("V", [2, 4, 10])
def test_loss_and_gradient_are_the_definitions(weights, definition, K, V):
    """In float32; the definition is summed in float64. K = 1 is DINO."""
    student, teacher, center = logits(V)
    loss = distill.identity_loss(student, teacher, center, K, 0.2, 0.05, weights)
    p = torch.softmax((teacher.detach() - center).double() / 0.05, dim=-1)
    want = definition(p, torch.log_softmax(student.double() / 0.2, dim=-1), K)
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(want, student)
    loss.backward()
    assert_close(student.grad, gradient, atol=1e-6, rtol=0)
    assert gradient.abs().max() > 1e-3
    assert teacher.grad is None


def test_loss_refuses_a_batch_that_K_does_not_divide():
    with pytest.raises(ValueError, match="batch of 8 images cannot hold K=3"):
        distill.identity_loss(*logits(4), K=3)


# ---------------------------------------------------------------- center, teacher, gauges


def test_center_is_the_moving_average_of_the_teachers_mean():
    _, teacher, center = logits(4)
    want = 0.9 * center + 0.1 * teacher.mean((0, 1))
    assert_close(distill.update_center(center, teacher, 0.9), want)


@pytest.mark.parametrize("temp, iterations", [(0.04, 3), (0.1, 3), (0.02, 1)])
def test_sinkhorns_center_is_alternation(temp, iterations):
    teacher = torch.randn(2, 32, 8, generator=seeded(0)) / 5
    center = distill.sinkhorn(teacher, temp, iterations)
    if (temp, iterations) == (0.04, 3):
        assert torch.equal(distill.sinkhorn(teacher), center)
    p = torch.softmax((teacher - center) / temp, dim=-1)
    q = torch.exp(teacher.double() / temp)
    q = q / q.sum(-1, keepdim=True)
    for _ in range(iterations):
        q = q / q.sum((0, 1))
        q = q / q.sum(-1, keepdim=True)
    assert_close(p.double(), q, atol=1e-5, rtol=0)


def test_sinkhorn_balances_what_no_exponential_could_hold():
    teacher = torch.randn(2, 16, 6, generator=seeded(0)) * 100
    teacher[..., 5] -= 2000  # a prototype far from every image still gets its share
    p = torch.softmax((teacher - distill.sinkhorn(teacher, 20, 300)) / 20, dim=-1)
    assert p.sum((0, 1)).sub(32 / 6).abs().max() < 0.6


def measured(teacher, center):
    """All that is summed over processes; teacher (2, B, D)."""
    p = torch.softmax(teacher * 9, dim=-1)
    centers = distill.sinkhorn(teacher), distill.update_center(center, teacher)
    statistics = torch.tensor(distill.teacher_statistics(p))
    return torch.cat([*centers, statistics, distill.all_mean(teacher.mean())[None]]).detach()


def half_a_batch(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    _, teacher, center = logits(4)
    torch.save(measured(teacher[:, 4 * rank : 4 * rank + 4], center), folder / str(rank))
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    start_processes(half_a_batch, (tmp_path,), nprocs=2, start_method="fork")
    _, teacher, center = logits(4)
    want = measured(teacher, center)
    for rank in "01":
        assert_close(torch.load(tmp_path / rank), want, atol=1e-5, rtol=0)


def test_network_places_every_crop_and_batches_equal_sizes():
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    calls = []
    backbone.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    crops = [torch.randn(3, 3, *size) for size in ((8, 4), (8, 4), (4, 2))]
    got = distill.Network(backbone, torch.nn.Identity())(crops)
    assert_close(got, torch.stack([crop.mean((2, 3)) for crop in crops]))
    assert calls == [6, 3]


def test_teacher_follows_parameters_and_not_batch_statistics():
    student = torch.nn.BatchNorm1d(2)
    teacher = torch.nn.BatchNorm1d(2)
    student(torch.randn(8, 2) + 5)
    torch.nn.init.constant_(student.weight, 3.0)
    distill.update_teacher(teacher, student, 0.9)
    assert_close(teacher.weight, torch.full((2,), 1.2))
    assert student.running_mean.all() and not teacher.running_mean.any()


def test_statistics_of_uniform_certain_and_mixed_teachers():
    mixed = torch.eye(8).view(2, 4, 8)
    certain = mixed[:1, :1].expand(2, 4, 8)
    assert distill.teacher_statistics(mixed) == (0, 8)
    assert distill.teacher_statistics(certain) == (0, 1)
    entropy, _ = distill.teacher_statistics(torch.full((2, 4, 8), 1 / 8))
    assert entropy == pytest.approx(math.log(8))


@pytest.mark.parametrize("share, used, words", [
    (0.6, 16, ""),
    (0.94, 64, ""),
    (0.96, 64, "uniform collapse"),
    (0.01, 15, "collapse to few prototypes"),
    (0.01, 1, "collapse to few prototypes"),
])
def test_a_collapse_is_named_and_health_is_not(share, used, words):
    """30 identities in a batch, D 64; share: of the entropy of chance."""
    found = distill.collapse(share * math.log(64), used, D=64, identities=30)
    assert found.startswith(words) and bool(found) == bool(words)
