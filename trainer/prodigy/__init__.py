"""Prodigy at memory speed: the optimizer, and its kernels for CPU and CUDA."""

from trainer.prodigy.optimizer import Prodigy as Prodigy
