// Bytes of dynamic shared memory that csrc/cuda asks for when it launches a kernel, as the code itself works them out.
// Host code alone, and no GPU. cubin_report.py compiles and runs it:
//
//     launch_memory 900 232448 SHAPE ...    for code of sm_90, on a GPU that gives a block so many bytes
//
// each shape as five numbers, T, top_k, H, I and n; prints a line per kernel, the most that one of the shapes takes.
#include "cuda/block_sparse_scatter.cuh"
#include "cuda/block_sparse_walk.cuh"
#include "cuda/low_rank_decode.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

using namespace resmoe::cuda;

int main(int count, char** words) {
  const auto number = [&](int at) { return std::atoi(words[at]); };
  const int architecture = number(1), stages = block_sparse::stages_of(architecture);
  const auto limit = static_cast<size_t>(number(2));
  size_t walk = 0, scatter = 0;
  for (int at = 3; at + 5 <= count; at += 5) {
    BlockSparseCall call{};
    call.tokens = number(at), call.top_k = number(at + 1), call.hidden = number(at + 2), call.inner = number(at + 3);
    call.gate_up.n = call.down.n = number(at + 4);
    scatter = std::max(scatter, block_sparse::scatter_bytes(call, stages));
    if (block_sparse::walks(call, stages, limit)) walk = std::max(walk, block_sparse::walk_bytes(call, stages));
  }
  std::printf("low_rank_decode_kernel %zu\nwalk_kernel %zu\nscatter_kernel %zu\n", shared_bytes(stages_of(architecture)),
              walk, scatter);
}
