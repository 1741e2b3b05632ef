"""distill.py: views against torchvision, the loss against its definition, centering against direct computation."""
import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import distill


def uint8_images(n, size=(64, 32), seed=0):
    small = torch.rand(n, 3, 8, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(small, size, mode="bilinear") * 255).byte()


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("scale", [(0.8, 1.0), (0.05, 0.8)])
def test_crop_equals_torchvisions(scale):
    images = uint8_images(12)
    views = distill.Views(size=(32, 16), scale=scale)
    drawn = views.draw(12, (64, 32), torch.Generator().manual_seed(0))
    got = distill.crop_resize(images, drawn, views.size)
    for i in range(12):
        box = [int(drawn[key][i]) for key in ("top", "left", "height", "width")]
        want = TF.resized_crop(images[i].float() / 255, *box, [32, 16], antialias=True)
        torch.testing.assert_close(got[i], want.flip(2) if drawn["flip"][i] else want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("operation, reference, factors", [
    (0, TF.adjust_brightness, [0.6, 1.0, 1.4]), (1, TF.adjust_contrast, [0.6, 1.0, 1.4]),
    (2, TF.adjust_saturation, [0.0, 0.8, 1.2]), (3, TF.adjust_hue, [-0.1, 0.0, 0.1]),
])  # fmt: skip
def test_colour_equals_torchvisions(operation, reference, factors):
    images = uint8_images(3).float() / 255
    images[0, :, :4] = 0.5  # grey and black have no hue
    images[1, :, :4] = 0
    got = distill.ADJUST[operation](images.clone(), torch.tensor(factors)[:, None, None, None])
    torch.testing.assert_close(got, torch.stack([reference(i, f) for i, f in zip(images, factors)]), atol=2e-4, rtol=0)


def test_blur_equals_torchvisions_inside():
    images = uint8_images(2).float() / 255
    got = distill.blur(images, torch.tensor([0.8, 1.5])[:, None, None, None])
    for i, sigma in enumerate((0.8, 1.5)):
        want = TF.gaussian_blur(images[i], [11, 11], sigma)  # 3 sigma of the largest: 5 pixels each way
        torch.testing.assert_close(got[i, :, 8:-8, 8:-8], want[:, 8:-8, 8:-8], atol=1e-4, rtol=0)


def test_each_image_gets_its_own_parameters_and_the_rest_stay():
    images = uint8_images(4)
    views = distill.Views(size=(64, 32), jitter_p=0, blur_p=0)
    drawn = views.draw(4, (64, 32), torch.Generator().manual_seed(0))
    drawn["flip"][:], drawn["top"][:], drawn["left"][:], drawn["height"][:], drawn["width"][:] = False, 0, 0, 64, 32
    drawn["grey"] = torch.tensor([True, False, False, False])
    drawn["solarize"] = torch.tensor([False, True, False, False])
    drawn["jitter"] = torch.tensor([False, False, True, False])
    drawn["factors"][2] = torch.tensor([0.5, 1.0, 1.0, 0.0])
    x, want = views.render(images, drawn), images.float() / 255
    torch.testing.assert_close(x[3], want[3], atol=1e-6, rtol=0)
    assert (x[0] == x[0, :1]).all()
    torch.testing.assert_close(x[1], TF.solarize(want[1], 0.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(x[2], want[2] * 0.5, atol=1e-3, rtol=0)


def test_parameters_follow_the_recipe():
    views = distill.Views(size=(64, 32), scale=(0.05, 0.8), blur_p=0.5, solarize_p=0.2)
    drawn = views.draw(20_000, (256, 128), torch.Generator().manual_seed(0))
    mean = lambda x: x.float().mean().item()
    for key, p in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("solarize", 0.2)):
        assert mean(drawn[key]) == pytest.approx(p, abs=0.02), key
    assert mean(drawn["sigma"] > 0) == pytest.approx(0.5, abs=0.02)
    assert drawn["sigma"][drawn["sigma"] > 0].min() >= 0.1 and drawn["sigma"].max() <= 2.0
    share = drawn["height"] * drawn["width"] / (256 * 128)
    assert share.min() > 0.045 and share.max() < 0.82 and mean(share) == pytest.approx(0.425, abs=0.02)
    ratio = drawn["width"] / drawn["height"]
    assert ratio.min() > 0.38 and ratio.max() < 0.63 and mean(ratio.log()) == pytest.approx(math.log(0.24) / 2, abs=0.02)
    assert (drawn["top"] + drawn["height"] <= 256).all() and (drawn["left"] + drawn["width"] <= 128).all() and drawn["top"].min() >= 0
    low, high = torch.tensor([0.6, 0.6, 0.8, -0.1]), torch.tensor([1.4, 1.4, 1.2, 0.1])
    assert (drawn["factors"] >= low).all() and (drawn["factors"] <= high).all()
    torch.testing.assert_close(drawn["factors"].mean(0), (low + high) / 2, atol=0.01, rtol=0)
    torch.testing.assert_close(drawn["order"].float().mean(0), torch.full((4,), 1.5), atol=0.05, rtol=0)


def test_views_do_not_depend_on_the_number_of_processes():
    images = uint8_images(8)
    kinds = [distill.Views(size=(32, 16)), distill.Views(size=(16, 8), scale=(0.05, 0.8), solarize_p=0.5)]
    whole = distill.make_views(images, kinds, torch.Generator().manual_seed(5))
    parts = [distill.make_views(images[r * 4 : r * 4 + 4], kinds, torch.Generator().manual_seed(5), r, 2) for r in range(2)]
    for v in range(2):
        torch.testing.assert_close(torch.cat([parts[0][v], parts[1][v]]), whole[v])
    other = distill.make_views(images, kinds, torch.Generator().manual_seed(6))
    assert (other[0] - whole[0]).abs().max() > 0.1


# ---------------------------------------------------------------- loss


def by_definition(student, teacher, center, K, student_temp=0.1, teacher_temp=0.04):
    """The loss as the paper writes it: loops over views, over pairs of images of an identity, and over identities."""
    p = torch.softmax((teacher - center) / teacher_temp, -1)
    log_q = torch.log_softmax(student / student_temp, -1)
    H = lambda p, q: -(p * q).sum()
    V, B = len(student), student.shape[1]
    losses = []
    for u in range(2):
        for v in range(V):
            if u == v:
                continue
            loss = sum(H(p[u, b], log_q[v, b]) for b in range(B)) / B
            for i in range(K):
                for j in range(K):
                    if i != j:
                        loss = loss + sum(H(p[u, n + i], log_q[v, n + j]) for n in range(0, B, K)) / (B // K)
            losses.append(loss / (K * (K - 1) + 1))
    return sum(losses) / len(losses)


def logits(V=4, B=8, D=12, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(V, B, D, generator=g, dtype=dtype) / 5).requires_grad_()
    return student, torch.randn(2, B, D, generator=g, dtype=dtype) / 5, torch.randn(D, generator=g, dtype=dtype) / 9


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("V", [2, 4, 10])
def test_loss_equals_its_definition(K, V):
    student, teacher, center = logits(V, dtype=torch.float32)
    fast, slow = distill.identity_loss(student, teacher, center, K), by_definition(student.double(), teacher.double(), center.double(), K)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    a, b = torch.autograd.grad(fast, student)[0], torch.autograd.grad(slow, student)[0]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert a.abs().max() > 1e-3


def test_loss_knows_identities_and_nothing_else():
    student, teacher, center = logits()
    loss = lambda order: distill.identity_loss(student[:, order], teacher[:, order], center, 4).item()
    plain = loss([0, 1, 2, 3, 4, 5, 6, 7])
    assert loss([4, 5, 6, 7, 0, 1, 2, 3]) == pytest.approx(plain, abs=1e-12)  # identities in another order
    assert loss([0, 2, 1, 3, 4, 5, 6, 7]) == pytest.approx(plain, abs=1e-12)  # images of one identity swapped
    assert abs(loss([0, 4, 2, 3, 1, 5, 6, 7]) - plain) > 1e-4  # images of two identities swapped


def test_loss_refuses_a_batch_that_K_does_not_divide():
    with pytest.raises(ValueError, match="batch of 8 images cannot hold K=3"):
        distill.identity_loss(*logits(), K=3)


def test_center_is_the_moving_average_of_the_teachers_mean():
    _, teacher, center = logits(dtype=torch.float32)
    torch.testing.assert_close(distill.update_center(center, teacher, 0.9), 0.9 * center + 0.1 * teacher.mean((0, 1)))


def test_sinkhorn_equals_direct_alternation_and_balances_prototypes():
    _, teacher, _ = logits(B=32, D=8, dtype=torch.float32)
    q = torch.exp(teacher.double().flatten(0, 1) / 0.04)
    q = q / q.sum(1, keepdim=True)
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    got = distill.sinkhorn(teacher, 0.04, 3)
    torch.testing.assert_close(got.flatten(0, 1).double(), q, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 32))
    balanced = distill.sinkhorn(teacher, 0.04, 100).sum((0, 1))
    torch.testing.assert_close(balanced, torch.full((8,), 64 / 8), atol=0.05, rtol=0)


def test_sinkhorn_survives_extreme_logits():
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)) * 100
    p = distill.sinkhorn(logits, temp=0.01)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 4))
    assert (p >= 0).all()


def test_network_scores_every_crop_and_batches_equal_sizes():
    class Mean(torch.nn.Module):
        calls = 0

        def forward(self, x):
            Mean.calls += 1
            return x.mean((2, 3))

    crops = [torch.randn(3, 3, 8, 4), torch.randn(3, 3, 8, 4), torch.randn(3, 3, 4, 2)]
    out = distill.Network(Mean(), torch.nn.Identity())(crops)
    torch.testing.assert_close(out, torch.stack([c.mean((2, 3)) for c in crops]))
    assert Mean.calls == 2


def test_teacher_follows_the_student():
    student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = [0.9 * t + 0.1 * s for s, t in zip(student.parameters(), teacher.parameters())]
    distill.update_teacher(teacher, student, 0.9)
    for got, value in zip(teacher.parameters(), want):
        torch.testing.assert_close(got, value)


def test_entropy_of_uniform_and_certain():
    assert distill.teacher_entropy(torch.full((2, 3, 8), 1 / 8)).item() == pytest.approx(math.log(8), abs=1e-5)
    assert distill.teacher_entropy(torch.eye(8)).item() == pytest.approx(0, abs=1e-6)
