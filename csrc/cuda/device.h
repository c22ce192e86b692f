// The GPU a kernel is started on. No CUDA headers: for callers that a plain C++ compiler compiles.
#pragma once

namespace resmoe::cuda {

// Makes a GPU current for this thread, and the one from before when it goes. In the CUDA runtime of these
// kernels, which need not be the caller's.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  // Why no kernel can run there, null if they can: "GPU 0, an NVIDIA GeForce GTX 1080 (sm_61), is older than
  // sm_80". Static until the next OnDevice of this thread.
  const char* fault() const { return fault_; }

 private:
  const char* fault_ = nullptr;
  int before_ = -1;  // -1: nothing to restore
};

}  // namespace resmoe::cuda
