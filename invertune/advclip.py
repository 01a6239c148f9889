"""AdvCLIP's generator of a universal adversarial patch (Zhou et al. 2023), the paper's step 1.

The paper runs AdvCLIP on images alone, so the texts here are the prompts of the classes that the
suspected model itself predicts. AdvCLIP's generator draws 224 x 224 pixels; this one draws the
patch, at the smallest of 16, 32, 64, ... pixels a side that holds it, which are scaled to it.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invertune.models import image_features, to_pixels
from invertune.perturbations import View, perturb
from invertune.prefetch import with_rows
from invertune.sampling import batch_indices
from invertune.sections import Identification
from invertune.terminal import progress

NOISES, NOISE_DIM = 16, 100
ALPHA, BETA, GAMMA, DELTA = 10.0, 5.0, 5.0, 1.0  # AdvCLIP's weights
NCE_TEMPERATURE = 0.1
DISCRIMINATOR_CLAMP = 0.01


def patch_generator(patch_px: int) -> nn.Module:
    """Fixed noise [16, 100, 1, 1] to 16 feature maps, mixed into one patch [1, 3, side, side].

    For the paper's 38 px its filters are AdvCLIP's 1024, 512, 256 and 128.
    """
    doublings = max(2, math.ceil(math.log2(patch_px / 4)))
    side = 4 << doublings
    widths = (NOISE_DIM, *(64 << i for i in reversed(range(doublings + 1))))
    layers: list[nn.Module] = []
    for i in range(doublings + 1):
        stride, padding = (1, 0) if i == 0 else (2, 1)
        layers += [
            nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride, padding, bias=False),
            nn.BatchNorm2d(widths[i + 1]),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers,
        nn.Conv2d(widths[-1], 1, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Unflatten(0, (1, NOISES)),
        nn.Unflatten(2, (side, side)),
        nn.Conv2d(NOISES, 3, 3, padding=1),
        nn.Sigmoid(),
    )


def patch_discriminator() -> nn.Module:
    """Scores whether an image [N, 3, H, W] is untouched (one logit each)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 4),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 1),
    )


def nce_loss(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE of paired unit features [N, D] at temperature 0.1."""
    return F.cross_entropy(a @ b.T / NCE_TEMPERATURE, torch.arange(len(a), device=a.device))


def topology_gap(a: Tensor, b: Tensor) -> Tensor:
    """AdvCLIP's U: KL divergence between the cosine graphs of two unit feature sets [N, D]."""
    p, q = ((x @ x.T + 1) / 2 for x in (a, b))
    p, q = (x / x.sum(1, keepdim=True) for x in (p, q))
    near, far = (
        (a * (a.clamp_min(1e-8) / b.clamp_min(1e-8)).log()).sum(1)
        for a, b in ((p, q), (1 - p, 1 - q))
    )
    return (near + far).mean()


def generated_patch(view: View, settings: Identification, seed: int) -> Tensor:
    """Trains the generator against the frozen model and returns its patch [3, p, p] in [0, 1]."""
    clip, clean, texts = view.clip, view.features, view.texts
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        generator = patch_generator(settings.patch_px).to(clip.device)
        discriminator = patch_discriminator().to(clip.device)
        noise = torch.randn(NOISES, NOISE_DIM, 1, 1).to(clip.device)
    lr, betas = settings.generator_lr, (0.5, 0.999)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=betas)

    def patch() -> Tensor:
        side = (settings.patch_px, settings.patch_px)
        return F.interpolate(generator(noise), side, mode="bilinear", align_corners=False)[0]

    rows_at = functools.partial(batch_indices, len(view.images), settings.batch, seed)
    batches = with_rows(view.images, rows_at, clip.device)
    for step in progress(range(settings.steps), "AdvCLIP generator"):
        pictures, rows = batches(step)
        real = to_pixels(pictures, clip.device)
        fake = perturb("patch", patch(), real)
        discriminator_optimizer.zero_grad()
        discriminator_loss(discriminator, real, fake.detach()).backward()
        discriminator_optimizer.step()
        with torch.no_grad():
            for weight in discriminator.parameters():
                weight.clamp_(-DISCRIMINATOR_CLAMP, DISCRIMINATOR_CLAMP)
        adversarial = image_features(clip, fake)
        hidden = F.binary_cross_entropy_with_logits(
            discriminator(fake), fake.new_ones(len(fake), 1)
        )
        loss = (
            hidden
            + F.mse_loss(fake, real)
            - ALPHA * nce_loss(clean[rows], adversarial)
            - ALPHA * BETA * nce_loss(adversarial, texts[rows])
            - DELTA * topology_gap(clean[rows], adversarial)
            - DELTA * GAMMA * topology_gap(adversarial, texts[rows])
        )
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    generator.eval()
    with torch.no_grad():
        return patch()


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of telling ``real`` images [N, 3, H, W] from as many ``fake`` ones."""
    scores = discriminator(torch.cat([real, fake]))
    truth = torch.cat([scores.new_ones(len(real), 1), scores.new_zeros(len(fake), 1)])
    return F.binary_cross_entropy_with_logits(scores, truth)
