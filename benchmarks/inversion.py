"""Speed of trigger inversion, side by side in one process.

ceiling: forward and input gradient of the bare network, on as many images. ours: invert_triggers
with K runs together, everything it prepares included. plain: the same algorithm written plainly:
pytorch-msssim, nothing cached, one run after the other; weights frozen there too. The held-out
measurements are left out of all three. On a CPU the clock counts this process's CPU seconds, so
that other programs disturb it less; on a GPU it is the wall clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytorch_msssim
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import common_options, ratios, side_by_side, spread
from invertune.models import MODEL_FOLDER, Clip, build_clip, image_features, to_pixels
from invertune.sections import Inversion
from invertune.settings import load_settings
from invertune.training import batch_indices
from invertune.trigger_inversion import Run, initial_trigger, invert_triggers

EPOCHS = 6  # the mini profile draws each image of its pool about this often
CLASSES = 210


def ceiling(clip: Clip, images: Tensor, settings: Inversion, runs: list[Run]) -> None:
    """The network alone, on K batches at once."""
    for step in range(settings.steps):
        index = batch_indices(len(images), settings.batch, 0, step)
        pixels = to_pixels(images[index].repeat(len(runs), 1, 1, 1), clip.device)
        image_features(clip, pixels.requires_grad_()).sum().backward()


def plain(clip: Clip, images: Tensor, head: Tensor, settings: Inversion, runs: list[Run]) -> None:
    """Algorithm 1, line by line, once per run."""
    for run in runs:
        mask, pattern = (t.clone().requires_grad_() for t in initial_trigger(clip, settings, 0))
        optimizer = torch.optim.Adam([mask, pattern], lr=settings.lr)
        for step in range(settings.steps):
            index = batch_indices(len(images), settings.batch, 0, step)
            pixels = to_pixels(images[index], clip.device)
            tilde = mask * (pattern * clip.std[0] + clip.mean[0]) + (1 - mask) * pixels
            features = image_features(clip, tilde)
            with torch.no_grad():
                clean = image_features(clip, pixels)
            wanted = torch.full((len(features),), run.target, device=clip.device)
            loss = run.lambda1 * F.cross_entropy(features @ head.T / settings.temperature, wanted)
            loss = loss + run.lambda2 * (features - clean).norm(dim=1).mean()
            loss = loss + run.lambda3 * (1 - pytorch_msssim.ssim(tilde, pixels, data_range=1.0))
            loss = loss + run.lambda4 * mask.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
                pattern.clamp_((-clip.mean / clip.std).min(), ((1 - clip.mean) / clip.std).max())


def compare(clip: Clip, settings: Inversion, count: int, repeats: int) -> None:
    """Prints the three times a step for ``count`` runs, and their ratios: median (min to max)."""
    size, device = clip.image_size, clip.device
    pool = max(settings.batch, settings.batch * settings.steps // EPOCHS)
    images = torch.randint(0, 256, (pool, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        width = image_features(clip, to_pixels(images[:1], device)).shape[1]
    head = F.normalize(torch.randn(CLASSES, width, device=device), dim=1)
    runs = [Run.of(target, settings) for target in range(count)]
    ways: dict[str, Callable[[], object]] = {
        "ceiling": lambda: ceiling(clip, images, settings, runs),
        "ours": lambda: invert_triggers(clip, images, images[:1], head, runs, settings, 0),
        "plain": lambda: plain(clip, images, head, settings, runs),
    }
    times = side_by_side(ways, settings.steps, device, repeats)
    for name, values in times.items():
        print(f"  {name:16} {spread(values)} ms a step")
    print(f"  ours / ceiling   {spread(ratios(times, 'ours', 'ceiling'))}")
    print(f"  plain / ceiling  {spread(ratios(times, 'plain', 'ceiling'))}")
    print(f"  plain / ours     {spread(ratios(times, 'plain', 'ours'))}", flush=True)


def main() -> None:
    parser = common_options(__doc__, steps=12)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 3], help="values of K")
    options = parser.parse_args()
    os.environ["INVERTUNE_PROGRESS"] = "0"
    torch.manual_seed(0)
    clip = build_clip(MODEL_FOLDER / options.backbone, options.backbone, options.device)
    short = {"steps": options.steps, "measure_every_steps": options.steps}
    clip.net.requires_grad_(False)
    settings = load_settings("mini").inversion.model_copy(update=short)
    print(
        f"{options.backbone} {clip.image_size} px, batch {settings.batch}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for count in options.runs:
        print(f"K = {count}: median (min to max) of {options.repeats} repeats")
        compare(clip, settings, count, options.repeats)


if __name__ == "__main__":
    main()
