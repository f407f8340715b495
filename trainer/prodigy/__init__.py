"""Prodigy at memory speed: the optimizer, and its kernels in C for CPU and in Triton for CUDA."""

from trainer.prodigy.optimizer import Prodigy as Prodigy
