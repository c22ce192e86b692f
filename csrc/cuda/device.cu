#include "cuda/device.h"

#include <cuda_runtime.h>

#include <cstdio>

namespace resmoe::cuda {
namespace {

constexpr int kOldest = 8;  // major compute capability: bfloat16 tensor cores, asynchronous copies

thread_local char message[384];

const char* failed(int device, const char* what) {
  std::snprintf(message, sizeof message, "GPU %d: %s", device, what);
  return message;
}

const char* too_old(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return failed(device, cudaGetErrorString(error));
  if (major >= kOldest) return nullptr;
  cudaDeviceProp properties{};
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const bool named = cudaGetDeviceProperties(&properties, device) == cudaSuccess;
  std::snprintf(message, sizeof message, "GPU %d, %s (sm_%d%d), is older than sm_80", device,
                named ? properties.name : "of unknown name", major, minor);
  return message;
}

}  // namespace

OnDevice::OnDevice(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) {
    error = cudaSetDevice(device);
    if (error == cudaSuccess) before_ = current;
  }
  fault_ = error == cudaSuccess ? too_old(device) : failed(device, cudaGetErrorString(error));
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace resmoe::cuda
