"""Speed of poisoned fine-tuning and of evaluation, side by side in one process.

ceiling: the forward and backward passes (evaluation: the forward pass) of the bare network on
images that are ready. ours: training.fit with batches, tokens and AdamW; embed_images from 8 bits.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from benchmarks.timing import common_options, ratios, side_by_side, spread
from invertune.models import MODEL_FOLDER, Clip, build_clip, embed_images, normalize, to_pixels
from invertune.training import Recipe, block_indices, contrastive_loss, fit, pair_features

BATCH = 128


def finetune(clip: Clip, images: Tensor, tokens: Tensor, steps: int) -> None:
    """The attacks' fine-tuning loop."""

    def loss_at(step: int) -> dict[str, Tensor]:
        rows = block_indices(len(images), BATCH, 0, step)
        image, text = pair_features(clip, images[rows], tokens[rows])
        return {"loss": contrastive_loss(image, text, clip.net.logit_scale)}

    clip.net.train()
    fit(clip.net, loss_at, Recipe(steps, 1e-4))


def bare_training(clip: Clip, pixels: Tensor, tokens: Tensor, steps: int) -> None:
    """Both towers' forward and backward passes, no loss, no optimizer."""
    clip.net.train()
    for _ in range(steps):
        clip.net.zero_grad()
        (clip.net.encode_image(pixels).sum() + clip.net.encode_text(tokens).sum()).backward()


@torch.no_grad()
def bare_evaluation(clip: Clip, pixels: Tensor, steps: int) -> None:
    """The image tower's forward pass."""
    clip.net.eval()
    for _ in range(steps):
        clip.net.encode_image(pixels)


def main() -> None:
    options = common_options(__doc__, steps=8).parse_args()
    os.environ["INVERTUNE_PROGRESS"] = "0"
    torch.manual_seed(0)
    clip = build_clip(MODEL_FOLDER / options.backbone, options.backbone, options.device)
    size, steps = clip.image_size, options.steps
    images = torch.randint(0, 256, (BATCH * 4, 3, size, size), dtype=torch.uint8)
    tokens = clip.tokenizer(["a photo of a mushroom"] * len(images)).to(clip.device)
    ready = normalize(clip, to_pixels(images[:BATCH], clip.device))
    batches = images[:BATCH].repeat(steps, 1, 1, 1)
    print(
        f"{options.backbone} {size} px, batch {BATCH}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    works = {
        "fine-tuning": {
            "ours": lambda: finetune(clip, images, tokens, steps),
            "ceiling": lambda: bare_training(clip, ready, tokens[:BATCH], steps),
        },
        "evaluation": {
            "ours": lambda: embed_images(clip, batches, BATCH),
            "ceiling": lambda: bare_evaluation(clip, ready, steps),
        },
    }
    for name, ways in works.items():
        times = side_by_side(ways, steps, clip.device, options.repeats)
        print(f"{name}: median (min to max) of {options.repeats} repeats")
        for way, values in times.items():
            print(f"  {way:16} {spread(values)} ms a batch")
        print(f"  ours / ceiling   {spread(ratios(times, 'ours', 'ceiling'))}", flush=True)


if __name__ == "__main__":
    main()
