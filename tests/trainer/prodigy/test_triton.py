"""Prodigy's Triton kernels without a GPU: interpreted, and compiled for every architecture. Needs Triton alone
(`pip install triton` beside torch's CPU build is enough)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.prodigy.interpreted import STEPS
from trainer.prodigy.kernels import CHUNK_SIZE
from trainer.prodigy.triton_kernels import load_triton_kernels

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent.parent
POINTERS = {"table": "*i64", "owner": "*i32", "c": "*fp32", "out": "*fp64"}
CONSTANTS = {"CHUNK": CHUNK_SIZE, "BLOCK": 1024}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("slice_p", [1, 11])
def test_interpreted_kernels_give_the_numbers_of_pytorchs_operations(slice_p: int) -> None:
    command = [sys.executable, "-m", "tests.trainer.prodigy.interpreted", str(slice_p)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    launches, parameters, d, rests, skipped = output.split()
    assert int(launches) == 2 * STEPS, "the kernels did not run"
    assert float(parameters) < 1e-5 and float(d) < 1e-5
    assert 3 < int(rests) < STEPS - 3, "d must rise, and then rest"
    assert skipped == "True"


def compile_kernel(which: int, capability: int, slice_p: int) -> Any:
    """A kernel's code for an architecture; needs no device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = load_triton_kernels()
    assert kernels is not None
    kernel = kernels[which]
    constants = CONSTANTS | ({"STEP": slice_p} if "STEP" in kernel.arg_names else {})
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize(("which", "slice_p"), [(0, 1), (0, 11), (1, 1)])
def test_kernels_compile_for_every_architecture(which: int, capability: int, slice_p: int) -> None:
    assert len(compile_kernel(which, capability, slice_p).asm["cubin"]) > 1000


@pytest.mark.parametrize("which", [0, 1])
def test_offsets_have_64_bits(which: int) -> None:
    # A tensor of 2**31 elements or more: an offset of 32 bits would be negative.
    code = compile_kernel(which, 90, 11).asm["ttir"]
    offsets = re.findall(r"tt\.addptr [^\n]*: tensor<1024x!tt\.ptr<f32>>, tensor<1024x(i\d+)>", code)
    assert len(offsets) >= 3 and set(offsets) == {"i64"}
