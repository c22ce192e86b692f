// The CUDA ops on CPU tensors, for tests: csrc/bindings_cuda.cpp itself, on the emulation of CUDA and a CUDA
// runtime made up here. tests/cuda/emulated_cuda.py builds it into a library of its own and defines
// resmoe_emulated::low_rank_decode and block_sparse_decode.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "emulated_runtime.h"

// ---- the GPU

namespace {

struct Gpu {
  int units = 3;                 // blocks of a launch
  int shared_bytes = 227 << 10;  // that a block may ask for
  resmoe::emulation::Config config;
};
Gpu gpu;
std::string error;  // of the last launch that failed

}  // namespace

extern "C" {

// How launches run from now on: Config's order (0 forward, 1 reverse, 2 shuffled by the seed) and arrival of
// copies (0 late, 1 early).
[[gnu::visibility("default")]] void emulate(int units, int shared_bytes, int order, int copies,
                                            unsigned seed) {
  using namespace resmoe::emulation;
  gpu = {units, shared_bytes, {static_cast<Order>(order), static_cast<Arrival>(copies), seed}};
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? gpu.units
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? gpu.shared_bytes
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 8
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNotSupported; }

// ptxVersion 0: stages_of() gives what the kernels were compiled with here.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= gpu.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorLaunchFailure ? error.c_str() : "invalid argument";
}
}

cudaError_t resmoe::emulation::start(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (config.gridDim.x < 1) return cudaErrorInvalidConfiguration;
  try {
    run(gpu.config, config.gridDim, config.blockDim, config.dynamicSmemBytes, thread);
    return cudaSuccess;
  } catch (const std::exception& fault) {
    error = fault.what();
    return cudaErrorLaunchFailure;
  }
}

// ---- the binding: ops for CUDA alone, registered for CPU tensors; torch's current stream is none

namespace {

int32_t no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace

#define dlopen(...) reinterpret_cast<void*>(&no_stream)
#define dlsym(library, name) (library)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) REGISTER_##key(m)
#define REGISTER_CUDA(m) _STABLE_TORCH_LIBRARY_IMPL(resmoe_emulated, CPU, m, 0)
#define RESMOE_CUDA
#include "bindings_cuda.cpp"
#include "bindings_form.cpp"
