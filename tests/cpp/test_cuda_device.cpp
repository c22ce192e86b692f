// The choice of a GPU, with a CUDA runtime made up here: older GPUs, several GPUs, no driver.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "cuda/device.cu"

namespace {

struct Gpu {
  int major, minor;
  const char* name;
};

std::vector<Gpu> gpus;
int current = 0;
std::vector<int> set;  // the devices that were made current
cudaError_t driver = cudaSuccess;

cudaError_t at(int device) {
  if (driver != cudaSuccess) return driver;
  return device >= 0 && device < static_cast<int>(gpus.size()) ? cudaSuccess : cudaErrorInvalidDevice;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return driver;
}

cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = at(device);
  if (error == cudaSuccess) set.push_back(current = device);
  return error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const cudaError_t error = at(device);
  if (error != cudaSuccess) return error;
  const Gpu& gpu = gpus[static_cast<size_t>(device)];
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? gpu.major
           : attribute == cudaDevAttrComputeCapabilityMinor ? gpu.minor
                                                            : -1;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  const cudaError_t error = at(device);
  if (error == cudaSuccess) std::strcpy(properties->name, gpus[static_cast<size_t>(device)].name);
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "no such device" : "no driver";
}
}

namespace {

using resmoe::cuda::OnDevice;

void is_there(int device, const char* expected) {
  const OnDevice there(device);
  const char* fault = there.fault();
  CHECK(expected == nullptr ? fault == nullptr : fault != nullptr && std::strcmp(fault, expected) == 0,
        "device %d: got %s", device, fault == nullptr ? "none" : fault);
}

void the_device_is_changed_only_where_it_differs_and_restored() {
  gpus = {{8, 0, "A"}, {9, 0, "B"}};
  current = 0;
  is_there(0, nullptr);
  CHECK(set.empty() && current == 0, "%zu changes", set.size());
  {
    const OnDevice there(1);
    CHECK(there.fault() == nullptr && current == 1, "current %d", current);
  }
  CHECK((set == std::vector<int>{1, 0}), "%zu changes, current %d", set.size(), current);
}

void faults_are_named_and_leave_the_device_as_it_was() {
  gpus = {{6, 1, "NVIDIA GeForce GTX 1080"}, {7, 5, "NVIDIA T4"}, {8, 0, "A"}, {12, 1, "C"}};
  current = 2;
  is_there(0, "GPU 0, NVIDIA GeForce GTX 1080 (sm_61), is older than sm_80");
  is_there(1, "GPU 1, NVIDIA T4 (sm_75), is older than sm_80");
  is_there(2, nullptr);
  is_there(3, nullptr);
  is_there(4, "GPU 4: no such device");
  CHECK(current == 2, "current %d", current);
  driver = cudaErrorInsufficientDriver;
  is_there(2, "GPU 2: no driver");
  driver = cudaSuccess;
}

}  // namespace

int main() {
  the_device_is_changed_only_where_it_differs_and_restored();
  faults_are_named_and_leave_the_device_as_it_was();
  std::printf(failures == 0 ? "all checks passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
