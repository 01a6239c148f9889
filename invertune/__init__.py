"""InverTune: removing backdoors from CLIP by trigger inversion and activation tuning."""

__version__ = "0.1.0"
