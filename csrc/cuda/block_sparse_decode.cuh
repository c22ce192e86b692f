// The kernel behind block_sparse_decode.h: one grid of blocks that stay, two kinds of tasks.
//
//     gate_up   wh = w f(B x + S_e x), sum[t] = the sum of wh   some columns of I, all experts hit
//     down      y  = B' sum + sum_e S'_e wh                     some rows of H
//
// Tasks are numbered in this order and dealt round the blocks, all of which are resident (a cooperative
// launch). Tasks of down wait until a counter says that those of gate_up are done: a block adds 1 (release)
// when a task's results are stored, and waits (acquire).
//
// Every warp streams the weights of its tasks, across tasks, through a ring of its own in shared memory:
// chunks of 64 words of the mask and their values, or of 1 KiB of a base. They depend on no other task, so
// those of down arrive while it waits.
//
// Two ways to multiply, each a kernel of its own:
//
//     Walk      tasks are 4 columns of I or 4 rows of H; its instructions grow with the tokens of an expert
//     Scatter   tasks are 16 rows, the tensor cores' M; its instructions do not grow
//
// The base is multiplied once per task for all tokens, in both: merged with each expert's values it would be
// copied to shared memory instead of zeros and multiplied once per expert, in bfloat16 sums of two roundings.
//
// Within a task the warps share the rows or the experts; parts are added in the order of the warps, so
// results depend on nothing but the call.
#pragma once

#include "cuda/block_sparse_decode.h"
#include "cuda/decode_block.cuh"
#include "cuda/ptx.h"
#include "cuda/routing.cuh"

namespace resmoe::cuda::block_sparse {

constexpr int kWords = 64;  // of a chunk: 16 rows of 4, or as many of consecutive rows
constexpr int kMaskBytes = kWords * 4;
constexpr int kBaseBytes = 1024;

__host__ __device__ constexpr int slot_bytes(int n) {
  return kMaskBytes + kWords * 2 * n > kBaseBytes ? kMaskBytes + kWords * 2 * n : kBaseBytes;
}

// Chunks in a warp's ring, for code of an architecture: shared memory also holds Walk's activations, or has
// to do with 99 KiB. Four chunks on their way are 40 KiB of a block for n = 8; at 3.35 TB/s, 132 blocks and
// 0.8 us from request to arrival 20 would do.
constexpr int stages_of(int architecture) {
  return architecture == 800 || (architecture >= 900 && architecture < 1200) ? 5 : 3;
}

#ifdef __CUDA_ARCH__
constexpr int kStages = stages_of(__CUDA_ARCH__);
#else
constexpr int kStages = stages_of(0);  // the host compiler's view of the kernel, and the emulation
#endif

__host__ __device__ __forceinline__ int up_to(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Activations that are walked stand transposed: column 32 b + c at c * stride + b. So the lanes of a warp,
// whose words follow one another, read from different banks, or two lanes from one, whatever their c.
__host__ __device__ __forceinline__ int stride_of(int columns) { return up_to(columns / 32, 32); }
__host__ __device__ __forceinline__ int transposed_bytes(int columns) { return 64 * stride_of(columns); }

struct Workspace {
  size_t flag, wh, sum, bytes;  // offsets
};

__host__ __device__ inline Workspace workspace_of(const BlockSparseCall& call) {
  const size_t T = static_cast<size_t>(call.tokens), I = static_cast<size_t>(call.inner);
  Workspace at{};
  at.wh = 256;
  at.sum = at.wh + T * static_cast<size_t>(call.top_k) * static_cast<size_t>(transposed_bytes(call.inner));
  at.bytes = at.sum + (T * I * 2 + 255) / 256 * 256;
  return at;
}

constexpr int kZerosBytes = 128 + 2048;  // of a warp: for bits that are not there, and for 32 lanes' words

// Behind the ring.
struct Shared {
  Routing routing;
  union {
    RoutingScratch scratch;
    struct {
      float z[kMaxPairs * 2 * 4 * 2];  // of every expert hit: 4 rows of gate and up, 2 tokens
      float a[8][2];                   // B x of a task's rows
      float parts[kWarps][4][2];       // the warps' sums of a task of down
    } walk;
    uint8_t zeros[kWarps][kZerosBytes];  // Scatter's
  };
};

__host__ __device__ inline size_t ring_bytes(const BlockSparseCall& call, int stages) {
  const int n = call.gate_up.n > call.down.n ? call.gate_up.n : call.down.n;
  return static_cast<size_t>(kWarps * stages * slot_bytes(n));
}

constexpr size_t kSharedBytes = (sizeof(Shared) + 127) / 128 * 128;

inline size_t scatter_bytes(const BlockSparseCall& call, int stages) {
  return ring_bytes(call, stages) + kSharedBytes;
}
static_assert(kWarps * stages_of(800) * slot_bytes(16) + kSharedBytes <= 163 << 10);
static_assert(kWarps * stages_of(890) * slot_bytes(16) + kSharedBytes <= 99 << 10);

inline size_t walk_bytes(const BlockSparseCall& call, int stages) {
  const size_t T = static_cast<size_t>(call.tokens), pairs = T * static_cast<size_t>(call.top_k);
  const size_t gate_up = T * static_cast<size_t>(transposed_bytes(call.hidden) + 2 * call.hidden);
  const size_t down =
      pairs * static_cast<size_t>(transposed_bytes(call.inner)) + T * static_cast<size_t>(2 * call.inner);
  return scatter_bytes(call, stages) + (gate_up > down ? gate_up : down);
}

// Whether a call is walked on a GPU that gives a block so much shared memory.
inline bool walks(const BlockSparseCall& call, int stages, size_t limit) {
  return call.tokens <= 2 && walk_bytes(call, stages) <= limit;
}

template <typename T>
__device__ __forceinline__ float low_of(uint32_t pair);
template <typename T>
__device__ __forceinline__ float high_of(uint32_t pair);
template <>
__device__ __forceinline__ float low_of<__nv_bfloat16>(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
template <>
__device__ __forceinline__ float high_of<__nv_bfloat16>(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000);
}
template <>
__device__ __forceinline__ float low_of<__half>(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xFFFF)));
}
template <>
__device__ __forceinline__ float high_of<__half>(uint32_t pair) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

// Takes the highest bit from a word and gives its place, -1 where there is none. Three instructions: a search
// (FLO, from a unit with half a warp's rate), a rotation, an AND.
__device__ __forceinline__ int take_bit(uint32_t& bits) {
  const int place = ptx::highest_bit(bits);
  bits &= ptx::rotate_left(0xFFFFFFFE, place);
  return place;
}

// Of what was stored as 16-bit elements.
__device__ __forceinline__ uint32_t load_pair(const uint8_t* shared) {
  uint32_t pair;
  __builtin_memcpy(&pair, __builtin_assume_aligned(shared, 4), 4);
  return pair;
}

// Of a word: n of them, 2 n bytes aligned as far as 16 goes.
template <int Kept>
__device__ __forceinline__ void load_values(const uint8_t* shared, uint32_t (&pairs)[Kept / 2]) {
  if constexpr (Kept % 8 == 0) {
#pragma unroll
    for (int j = 0; j < Kept / 8; ++j) {
      const uint4 v = reinterpret_cast<const uint4*>(shared)[j];
      pairs[4 * j] = v.x, pairs[4 * j + 1] = v.y, pairs[4 * j + 2] = v.z, pairs[4 * j + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < Kept / 4; ++j) {
      const uint2 v = reinterpret_cast<const uint2*>(shared)[j];
      pairs[2 * j] = v.x, pairs[2 * j + 1] = v.y;
    }
  }
}

// What both ways have in common. rows_gate_up columns of I, 4 or 16 rows of H: a task.
class Layer {
 public:
  __device__ Layer(const BlockSparseCall& call, uint8_t* shared, int columns, int rows)
      : call_(call),
        s_(shape_of(call)),
        columns_(columns),
        rows_(rows),
        gate_up_tasks_(s_.I / columns),
        tasks_(gate_up_tasks_ + s_.H / rows),
        has_base_(call.gate_up.base != nullptr),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        ring_end_(static_cast<int>(ring_bytes(call, kStages)) / kWarps),
        ring_(shared + warp_ * ring_end_),
        shared_(*reinterpret_cast<Shared*>(shared + ring_bytes(call, kStages))) {}

 protected:
  // By all threads, who may read the routing then.
  __device__ void find_routing() {
    find_experts(call_, shared_.scratch, shared_.routing);
    find_pairs(call_, shared_.scratch, shared_.routing);
    __syncthreads();
  }
  __device__ const Routing& routing() const { return shared_.routing; }
  __device__ uint32_t* flag() const { return static_cast<uint32_t*>(call_.workspace); }
  template <typename T>
  __device__ T* wh() const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(call_.workspace) + workspace_of(call_).wh);
  }
  template <typename T>
  __device__ T* sum() const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(call_.workspace) + workspace_of(call_).sum);
  }
  __device__ bool is_down(int task) const { return task >= gate_up_tasks_; }
  __device__ const BlockSparseMatrix& matrix(bool down) const { return down ? call_.down : call_.gate_up; }
  __device__ int width(bool down) const { return down ? s_.I : s_.H; }
  __device__ int words_of(bool down) const {
    return static_cast<int>(static_cast<uint32_t>(width(down)) >> 5);
  }
  // The first column of I or row of H.
  __device__ int first_of(int task) const {
    return is_down(task) ? (task - gate_up_tasks_) * rows_ : task * columns_;
  }
  __device__ int64_t row_of(bool down, int i, int row) const {
    return static_cast<int64_t>(routing().expert[i]) * (down ? s_.H : s_.N) + row;
  }

  __device__ uint8_t* load_slot() const { return ring_ + loaded_; }
  __device__ void close_slot(bool used) {
    const int next = loaded_ + ring_end_ / kStages;
    if (used) loaded_ = next == ring_end_ ? 0 : next;
    ptx::commit_copies();  // also where there is nothing left, so that groups count chunks
  }
  // The oldest chunk, when it has arrived: the one before it may then be loaded anew.
  __device__ const uint8_t* arrived() {
    ptx::wait_copies<kStages - 2>();
    __syncwarp();  // the pieces of all lanes have arrived, and all lanes are done with the chunk before
    const uint8_t* chunk = ring_ + taken_;
    const int next = taken_ + ring_end_ / kStages;
    taken_ = next == ring_end_ ? 0 : next;
    return chunk;
  }

  const BlockSparseCall& call_;
  const Shape s_;
  const int columns_, rows_, gate_up_tasks_, tasks_;
  const bool has_base_;
  const int warp_, lane_, ring_end_;
  uint8_t* const ring_;
  Shared& shared_;
  int loaded_ = 0, taken_ = 0;
};

}  // namespace resmoe::cuda::block_sparse
