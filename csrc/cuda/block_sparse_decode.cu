#include "cuda/block_sparse_scatter.cuh"
#include "cuda/block_sparse_walk.cuh"
#include "cuda/cooperative_launch.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace resmoe::cuda {
namespace {

constexpr const char* kName = "block_sparse_decode";

using Kernel = void (*)(BlockSparseCall);

// What the code was compiled as, __CUDA_ARCH__, not the GPU: sm_86 may run the code of sm_80, and sm_120 what
// its driver makes of the PTX of sm_100.
cudaError_t stages_of_code(Kernel kernel, int* stages) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *stages = block_sparse::stages_of(attributes.ptxVersion * 10);
  return error;
}

const char* start(const BlockSparseCall& call, Kernel kernel, size_t shared, cudaStream_t stream,
                  int blocks) {
  return start_cooperative(kName, kernel, call, call.workspace, sizeof(uint32_t), shared, stream, blocks,
                           kThreads);
}

template <typename T>
const char* choose(const BlockSparseCall& call, cudaStream_t stream, int blocks, size_t limit) {
  const Kernel walk = block_sparse::walk_kernel<T>;
  int stages = 0;
  const cudaError_t error = stages_of_code(walk, &stages);
  if (error != cudaSuccess) return failed(kName, "no code for this GPU", error, blocks, kThreads, 0);
  if (block_sparse::walks(call, stages, limit)) {
    return start(call, walk, block_sparse::walk_bytes(call, stages), stream, blocks);
  }
  const Kernel scatter =
      call.tokens <= 8 ? block_sparse::scatter_kernel<T, 1> : block_sparse::scatter_kernel<T, 2>;
  return start(call, scatter, block_sparse::scatter_bytes(call, stages), stream, blocks);
}

bool is_kept(int32_t n) { return n == 4 || n == 8 || n == 12 || n == 16; }

// Of gate_up; those of down are fewer or as many.
int64_t value_bytes(const BlockSparseCall& call, int32_t n) {
  return static_cast<int64_t>(call.gated ? 2 : 1) * call.inner * call.hidden / 32 * 2 * n;
}

}  // namespace

const char* declines(const BlockSparseCall& call) {
  if (const char* reason = declines_sizes(call)) return reason;
  if (call.inner % 32 != 0) return "an intermediate size that is not a multiple of 32";
  if (!is_kept(call.gate_up.n) || !is_kept(call.down.n)) return "values other than 4, 8, 12 or 16 of 32";
  if (value_bytes(call, std::max(call.gate_up.n, call.down.n)) >> 31 != 0)
    return "an expert of 2 GiB or more";
  return nullptr;
}

size_t workspace_bytes(const BlockSparseCall& call) { return block_sparse::workspace_of(call).bytes; }

const char* block_sparse_decode(const BlockSparseCall& call, void* stream_of_caller) {
  int device = 0, units = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return failed(kName, "device", error, 0, kThreads, 0);
  const auto stream = static_cast<cudaStream_t>(stream_of_caller);
  return call.element == Element::bfloat16
             ? choose<__nv_bfloat16>(call, stream, units, static_cast<size_t>(limit))
             : choose<__half>(call, stream, units, static_cast<size_t>(limit));
}

}  // namespace resmoe::cuda
