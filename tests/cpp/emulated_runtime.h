// For csrc/cuda/*.cu as C++ on the emulation (g++ -include): how those files call the CUDA runtime's C++
// interface, which cuda_runtime.h has for nvcc only. emulated_kernels.cpp has the runtime.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "cuda_emulation.h"

namespace resmoe::emulation {

// Runs thread() as every thread of the grid, on the GPU that emulated_kernels.cpp makes up.
cudaError_t start(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

}  // namespace resmoe::emulation

template <typename Call>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Call)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <typename Call>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Call), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// More special than the runtime's own, which would lose the type of the kernel.
template <typename Call>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Call), const Call& call) {
  return resmoe::emulation::start(*config, [&] { kernel(call); });
}
