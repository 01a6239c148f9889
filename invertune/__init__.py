"""InverTune: removing backdoors from CLIP by trigger inversion and activation tuning."""

import warnings

__version__ = "0.1.0"

# What open_clip imports misses ipywidgets, which nothing here needs: our progress bars are text.
warnings.filterwarnings("ignore", "IProgress not found")
