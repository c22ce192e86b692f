#include "cuda/low_rank_decode.cuh"

#include <cuda_runtime.h>

#include <cstdio>

namespace resmoe::cuda {
namespace {

thread_local char message[256];

const char* failed(const char* what, cudaError_t error, int blocks, size_t shared) {
  std::snprintf(message, sizeof message, "low_rank_decode (%d blocks of %d threads, %zu bytes of shared memory): %s: %s",
                blocks, kThreads, shared, what, cudaGetErrorString(error));
  return message;
}

template <typename T, int TokenTiles>
const char* start(const LowRankCall& call, cudaStream_t stream, int blocks) {
  const auto kernel = low_rank_decode_kernel<T, TokenTiles>;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return failed("no code for this GPU", error, blocks, 0);
  // Of the code that was chosen, not of the GPU: sm_86 may run that of sm_80.
  const size_t shared = shared_bytes(stages_of(attributes.binaryVersion * 10));
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return failed("shared memory", error, blocks, shared);
  const Workspace at = workspace_of(call);
  error = cudaMemsetAsync(static_cast<uint8_t*>(call.workspace) + at.flags, 0, at.flag_bytes, stream);
  if (error != cudaSuccess) return failed("clearing the flags", error, blocks, shared);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;  // all blocks are resident, or the launch fails
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, call);
  return error == cudaSuccess ? nullptr : failed("launch", error, blocks, shared);
}

}  // namespace

const char* declines(const LowRankCall& call) {
  if (call.tokens > kMaxTokens) return "more than 16 tokens";
  if (call.tokens * call.top_k > kMaxPairs) return "more than 256 token-expert pairs";
  if (call.experts > kMaxExperts) return "more than 1024 experts";
  if (call.hidden % 32 != 0) return "a hidden size that is not a multiple of 32";
  if (call.inner % 16 != 0) return "an intermediate size that is not a multiple of 16";
  return nullptr;
}

size_t workspace_bytes(const LowRankCall& call) { return workspace_of(call).bytes; }

const char* low_rank_decode(const LowRankCall& call, void* stream_of_caller) {
  int device = 0, units = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return failed("device", error, 0, 0);
  const auto stream = static_cast<cudaStream_t>(stream_of_caller);
  const bool one_tile = call.tokens <= 8;
  if (call.element == Element::bfloat16) {
    return one_tile ? start<__nv_bfloat16, 1>(call, stream, units) : start<__nv_bfloat16, 2>(call, stream, units);
  }
  return one_tile ? start<__half, 1>(call, stream, units) : start<__half, 2>(call, stream, units);
}

}  // namespace resmoe::cuda
