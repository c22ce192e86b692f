"""Blocks per multiprocessor: NVIDIA's header and heuristics agree with benchmarks/gpu/occupancy.py."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import occupancy
from resmoe_kernels.heuristics import GPUS

NVIDIA_PROGRAM = """
#include <cstdio>
#include <cstring>
#include <cuda_runtime_api.h>
#include <cuda_occupancy.h>

int main() {
  int major, minor, warps_per_sm, warps, registers;
  size_t shared_per_sm, shared;
  while (std::scanf("%d %d %d %zu %d %d %zu", &major, &minor, &warps_per_sm, &shared_per_sm, &warps, &registers,
                    &shared) == 7) {
    cudaOccDeviceProp device;
    std::memset(&device, 0, sizeof device);
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps_per_sm;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = shared_per_sm;
    device.reservedSharedMemPerBlock = 1024;
    device.sharedMemPerBlockOptin = shared_per_sm - 1024;
    device.numSms = 100;
    cudaOccFuncAttributes function;
    std::memset(&function, 0, sizeof function);
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.maxDynamicSharedSizeBytes = shared_per_sm - 1024;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state;
    std::memset(&state, 0, sizeof state);
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, 32 * warps, shared);
    std::printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_what_nvidias_header_says(tmp_path):
    """The header is in Triton's wheel; it needs no driver."""
    triton = importlib.util.find_spec("triton")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include" if triton else None
    if include is None or not (include / "cuda_occupancy.h").is_file() or shutil.which("g++") is None:
        pytest.skip("needs g++, and Triton with cuda_occupancy.h in its wheel")
    (tmp_path / "occupancy.cpp").write_text(NVIDIA_PROGRAM)
    program = tmp_path / "occupancy"
    subprocess.run(["g++", "-w", "-I", include, tmp_path / "occupancy.cpp", "-o", program], check=True)
    rng = random.Random(0)
    inputs, ours = [], []
    for target in ("sm_80", "sm_89", "sm_90", "sm_100"):
        unit, capability = occupancy.UNITS[target], int(target.removeprefix("sm_"))
        for _ in range(500):
            warps, registers = rng.choice([1, 2, 4, 8, 12, 16, 32]), rng.randint(1, 255)
            shared = rng.choice([0, 0, rng.randint(1, 20 << 10), rng.randint(1, unit.shared)])
            inputs.append(
                f"{capability // 10} {capability % 10} {unit.warps} {unit.shared} {warps} {registers} {shared}"
            )
            ours.append(occupancy.occupancy(target, warps, registers, shared).blocks)
    output = subprocess.run([program], input="\n".join(inputs), capture_output=True, text=True, check=True).stdout
    theirs = [int(line) for line in output.split()]
    assert [(i, a, b) for i, a, b in zip(inputs, ours, theirs, strict=True) if a != b] == []
    assert len(set(theirs)) > 10 and -1 not in theirs


def test_occupancy_says_what_limits_it():
    found = occupancy.occupancy("sm_100", 4, 64, 60 << 10, tensor_columns=256)
    assert found.limits == {"registers": 8, "shared memory": 3, "threads": 16, "blocks": 32, "tensor memory": 2}
    assert (found.blocks, found.percent, found.limited_by) == (2, 12, ["tensor memory"])
    assert occupancy.occupancy("gfx942", 4, 64, 32 << 10).limited_by == ["shared memory"]
    assert occupancy.occupancy("sm_80", 8, 256, 200 << 10).blocks == 0


def test_a_block_has_as_much_shared_memory_as_tiles_are_chosen_by():
    for target, gpu in GPUS.items():
        unit = occupancy.UNITS[target]
        assert gpu.shared == unit.shared - unit.reserved, target
