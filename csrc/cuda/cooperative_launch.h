// How the kernels whose blocks wait for each other are started: their flags cleared, all blocks resident.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>

namespace resmoe::cuda {

// A sentence with the kernel's name and configuration; static until the next of this thread.
inline const char* failed(const char* name, const char* what, cudaError_t error, int blocks, int threads,
                          size_t shared) {
  thread_local char message[256];
  std::snprintf(message, sizeof message, "%s (%d blocks of %d threads, %zu bytes of shared memory): %s: %s",
                name, blocks, threads, shared, what, cudaGetErrorString(error));
  return message;
}

// Returns null, or what the driver said. flags: device memory that the kernel finds zero.
template <typename Call>
const char* start_cooperative(const char* name, void (*kernel)(Call), const Call& call, void* flags,
                              size_t flag_bytes, size_t shared, cudaStream_t stream, int blocks,
                              int threads) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return failed(name, "shared memory", error, blocks, threads, shared);
  error = cudaMemsetAsync(flags, 0, flag_bytes, stream);
  if (error != cudaSuccess) return failed(name, "clearing the flags", error, blocks, threads, shared);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;  // all blocks are resident, or the launch fails
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, call);
  return error == cudaSuccess ? nullptr : failed(name, "launch", error, blocks, threads, shared);
}

}  // namespace resmoe::cuda
