#include "cuda/cooperative_launch.h"
#include "cuda/low_rank_decode.cuh"

#include <cuda_runtime.h>

namespace resmoe::cuda {
namespace {

constexpr const char* kName = "low_rank_decode";

template <typename T, int TokenTiles>
const char* start(const LowRankCall& call, cudaStream_t stream, int blocks) {
  const auto kernel = low_rank_decode_kernel<T, TokenTiles>;
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return failed(kName, "no code for this GPU", error, blocks, kThreads, 0);
  // What the code was compiled as, __CUDA_ARCH__, not the GPU: sm_86 may run the code of sm_80, and sm_120
  // what its driver makes of the PTX of sm_100.
  const size_t shared = shared_bytes(stages_of(attributes.ptxVersion * 10));
  const Workspace at = workspace_of(call);
  void* flags = static_cast<uint8_t*>(call.workspace) + at.flags;
  return start_cooperative(kName, kernel, call, flags, at.flag_bytes, shared, stream, blocks, kThreads);
}

}  // namespace

const char* declines(const LowRankCall& call) {
  if (const char* reason = declines_sizes(call)) return reason;
  if (call.inner % 16 != 0) return "an intermediate size that is not a multiple of 16";
  return nullptr;
}

size_t workspace_bytes(const LowRankCall& call) { return workspace_of(call).bytes; }

const char* low_rank_decode(const LowRankCall& call, void* stream_of_caller) {
  int device = 0, units = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return failed(kName, "device", error, 0, kThreads, 0);
  const auto stream = static_cast<cudaStream_t>(stream_of_caller);
  const bool one_tile = call.tokens <= 8;
  if (call.element == Element::bfloat16) {
    return one_tile ? start<__nv_bfloat16, 1>(call, stream, units)
                    : start<__nv_bfloat16, 2>(call, stream, units);
  }
  return one_tile ? start<__half, 1>(call, stream, units) : start<__half, 2>(call, stream, units);
}

}  // namespace resmoe::cuda
