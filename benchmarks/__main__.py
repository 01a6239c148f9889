"""Speed and memory of ours, a plain version and the bare passes; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import finetuning, inversion, jobs, loader
from benchmarks.timing import CLOCKS, Contender, Meter, table
from invertune.sections import BACKBONES
from invertune.weights import untrained_clip

TASKS = ("loader", "inversion", "finetuning", "evaluation", "jobs")
PRECISIONS = ("float32", "bfloat16")
SIZES = (64, 224)


def parse() -> argparse.Namespace:
    """The options; the defaults suit a CPU with two cores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--backbone", choices=BACKBONES, default="RN50")
    parser.add_argument("--image-size", type=int, choices=SIZES, default=64)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--batch", type=int, help="default: 64, 128 and 256")
    parser.add_argument("--steps", type=int, default=3, help="of each way in a round")
    parser.add_argument(
        "--rounds", type=int, choices=range(2, 101), metavar="N", default=5, help="2 to 100"
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["INVERTUNE_PROGRESS"] = "0"
    torch.backends.cudnn.allow_tf32 = False  # as chain.open_chain
    meter = Meter(torch.device(options.device), options.clock, options.rounds)
    name = torch.cuda.get_device_name() if meter.device.type == "cuda" else "CPU"
    print(
        f"{options.backbone} {options.image_size} px, random weights, {name}, "
        f"{torch.get_num_threads()} threads, {options.clock} clock, torch {torch.__version__}; "
        f"median (quartiles) of {options.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "00000.tar"
        loader.write_shard(shard, 2 * (options.batch or 128))
        for precision in options.precision:
            measure(options, meter, precision, shard)


def measure(options: argparse.Namespace, meter: Meter, precision: str, shard: Path) -> None:
    """Prints the tables of one precision; the loader's come with the first."""
    size, steps, chosen = options.image_size, options.steps, options.tasks
    dtype = getattr(torch, precision)
    peak = meter.matrix_peak(dtype)
    print(f"\n{precision}: matrix peak {peak / 1e12:.3g} TFLOP/s", flush=True)
    torch.manual_seed(0)
    clip = replace(untrained_clip(options.backbone, size, options.device), precision=dtype)

    def show(title: str, batch: int, ways: Mapping[str, Contender]) -> None:
        print(f"\n{title}, {precision}, batch {batch}")
        print(table(ways, meter.measure(ways), peak), flush=True)

    large, small = options.batch or 128, options.batch or 64
    if "loader" in chosen and precision == options.precision[0]:
        batches = loader.batches(shard, size, large, steps, meter.device)
        print("\nloader, a part decoded once")
        decoding = loader.decoding(shard, size)
        print(table(decoding, meter.measure(decoding), peak))
        print(f"\nloader, batch {large}")
        print(table(batches, meter.measure(batches), peak), flush=True)
    if "inversion" in chosen:
        show("inversion", small, inversion.ways(clip, steps, small))
    if "finetuning" in chosen:
        show("poisoned fine-tuning", large, finetuning.finetuning(clip, steps, large, shard))
    if "evaluation" in chosen:
        whole = options.batch or 256
        show("evaluation", whole, finetuning.evaluation(clip, steps, whole))
    if "jobs" in chosen and size == 64 and meter.device.type == "cpu" and meter.clock == "wall":
        with jobs.ways(options.backbone, precision, steps, small) as ways:
            show("fine-tuning in several processes", small, ways)


if __name__ == "__main__":
    main()
