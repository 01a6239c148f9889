"""InverTune: removing backdoors from CLIP by trigger inversion and activation tuning."""

import os
import warnings

# torch takes large tensors in 2 MB pages where the kernel gives them: on a CPU the page faults of
# small ones are a fifth of a training step (benchmarks/README.md). It must be set before the first
# tensor; numbers do not change.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

# What open_clip imports misses ipywidgets, which nothing here needs: our progress bars are text.
warnings.filterwarnings("ignore", "IProgress not found")
