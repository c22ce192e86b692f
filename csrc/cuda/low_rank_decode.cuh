// The kernel behind low_rank_decode.h: one grid of blocks that stay, six kinds of tasks, no barrier across the grid.
//
//     base_gate_up   a[t, n]   = B x                    16 rows n of gate_up
//     v_gate_up      c[t, r]   = V_e x                  16 ranks r of an expert that was hit
//     u_gate_up      wh        = w f(a + U_e c)         16 columns of I, all experts hit; sum[t] = their sum
//     base_down      y0[t, n]  = B' sum                 16 rows n of H
//     v_down         c'[t, r]  = V'_e wh                16 ranks r
//     u_down         y[t, n]   = y0 + sum_e U'_e c'_e   32 rows n of H
//
// Tasks are numbered in this order and dealt round the blocks, so a task only waits for tasks with smaller numbers. All
// blocks must be resident (a cooperative launch): each takes its own tasks in order.
//
// Weights depend on no other task. Every warp streams those of its tasks, across tasks and kinds, through a ring of its
// own in shared memory, kStages chunks of 2 KB: while a task waits for its flag, the weights behind it arrive.
//
// Within a task the 8 warps share the sum (K, or the ranks, or the experts); their parts are added through shared memory
// in the order of the warps. So results depend on nothing but the call. Flags are counters that the launch clears: a
// block adds 1 (release) when a task's results are stored, and waits (acquire) for the number it knows must come.
#pragma once

#include "cuda/low_rank_decode.h"
#include "cuda/ptx.h"

namespace resmoe::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kChunkBytes = 2048;  // 16 rows of 64 columns, or 32 ranks of 32 columns

struct Shape {
  int T, top_k, E, H, I, N;
};

// Where the ranks of expert e, which start at `start`, lie in a row of c: padded with zeros to a multiple of 16, no
// expert's reach into the next one's.
__host__ __device__ __forceinline__ int place_of(int start, int e) { return (start / 16 + e) * 16; }
__host__ __device__ __forceinline__ int padded(int rank) { return (rank + 15) / 16 * 16; }

// Where the workspace's parts begin, as offsets in bytes.
struct Workspace {
  size_t flags, flag_bytes, a, c, wh, sum, y0, c_down, bytes;
  int places, places_down;  // elements in a row of c and c_down
};

__host__ __device__ inline Workspace workspace_of(const LowRankCall& call) {
  const size_t T = static_cast<size_t>(call.tokens), I = static_cast<size_t>(call.inner), size = 2;
  const size_t H = static_cast<size_t>(call.hidden), N = (call.gated ? 2 : 1) * I;
  Workspace at{};
  at.places = place_of(call.gate_up.total_rank, call.experts) + 16;
  at.places_down = place_of(call.down.total_rank, call.experts) + 16;
  at.flag_bytes = (4 + I / 16 + H / 32) * sizeof(uint32_t);
  size_t end = 0;
  const auto take = [&end](size_t bytes) {
    const size_t begin = end;
    end += (bytes + 255) / 256 * 256;
    return begin;
  };
  at.flags = take(at.flag_bytes);
  at.a = take(T * N * sizeof(float));
  at.c = take(T * static_cast<size_t>(at.places) * size);
  at.wh = take(T * static_cast<size_t>(call.top_k) * I * size);
  at.sum = take(T * I * size);
  at.y0 = take(T * H * sizeof(float));
  at.c_down = take(T * static_cast<size_t>(at.places_down) * size);
  at.bytes = end;
  return at;
}

enum Kind { base_gate_up, v_gate_up, u_gate_up, base_down, v_down, u_down, kinds };

// What a block works out about the routing, in shared memory. i numbers the experts hit, in ascending order.
struct Routing {
  int32_t hits;
  int16_t expert[kMaxPairs];
  uint8_t has_base[kMaxPairs];
  uint16_t tokens[kMaxPairs];             // bit t: token t goes to the expert
  float weight[kMaxPairs][kMaxTokens];    // 0 where it does not
  uint8_t slot[kMaxPairs][kMaxTokens];    // the first slot of the expert, where its h is kept
  int32_t start[2][kMaxPairs];            // its first rank, of gate_up and of down
  int32_t rank[2][kMaxPairs];
  int32_t strips_before[2][kMaxPairs + 1];  // 16-rank strips of the experts before it
  int32_t tasks[kinds];                     // how many there are of each kind
};

struct Scratch {
  Routing routing;
  union {
    struct {
      int32_t index[kMaxPairs];
      uint32_t seen[kMaxExperts];
    } slots;
    float parts[2][kWarps][16 * kMaxTokens];
  };
};

// Chunks in a warp's ring: what shared memory holds beside the scratch, for code of an architecture (900 for sm_90).
// 227 KiB from sm_90 on, 163 on sm_80, 99 on sm_86, sm_89 and sm_120.
constexpr int stages_of(int architecture) {
  return architecture == 800 ? 7 : architecture >= 900 && architecture < 1200 ? 11 : 3;
}

constexpr size_t shared_bytes(int stages) {
  return static_cast<size_t>(kWarps * stages * kChunkBytes) + sizeof(Scratch);
}
static_assert(shared_bytes(stages_of(800)) <= 163 << 10);
static_assert(shared_bytes(stages_of(900)) <= 227 << 10);
static_assert(shared_bytes(stages_of(890)) <= 99 << 10);

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half(value);
}

__device__ __forceinline__ float apply(Function f, float z) {
  switch (f) {
    case Function::silu: return z / (1.0f + expf(-z));
    case Function::gelu: return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
    case Function::gelu_tanh: return z / (1.0f + expf(-1.5957691216057308f * (z + 0.044715f * z * z * z)));
    case Function::relu: return fmaxf(z, 0.0f);
    case Function::relu2: return fmaxf(z, 0.0f) * fmaxf(z, 0.0f);
    case Function::identity: break;
  }
  return z;
}

__device__ __forceinline__ float weight_of(const LowRankCall& call, int pair) {
  switch (call.weights_type) {
    case Real::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(call.top_k_weights)[pair]);
    case Real::float16: return __half2float(static_cast<const __half*>(call.top_k_weights)[pair]);
    case Real::float32: break;
  }
  return static_cast<const float*>(call.top_k_weights)[pair];
}

// ---- routing

__device__ __forceinline__ int base_tasks(const LowRankCall& call) {
  return call.gate_up.base == nullptr ? 0 : (call.gated ? 2 : 1) * call.inner / 16;
}

__device__ inline void find_routing(const LowRankCall& call, Scratch& scratch) {
  Routing& routing = scratch.routing;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, pairs = call.tokens * call.top_k;
  for (int e = thread; e < call.experts; e += kThreads) scratch.slots.seen[e] = 0;
  __syncthreads();
  if (thread < pairs) {
    const int64_t id = call.index_is_64 ? static_cast<const int64_t*>(call.top_k_index)[thread]
                                        : static_cast<const int32_t*>(call.top_k_index)[thread];
    const bool valid = id >= 0 && id < call.experts;
    scratch.slots.index[thread] = valid ? static_cast<int32_t>(id) : -1;
    if (valid) atomicOr(&scratch.slots.seen[id], 1u << (thread / call.top_k));
  }
  __syncthreads();
  if (thread < 32) {  // one warp lists what was seen, then adds up the strips
    int hits = 0;
    for (int first = 0; first < call.experts; first += 32) {
      const int e = first + lane;
      const uint32_t seen = e < call.experts ? scratch.slots.seen[e] : 0;
      const uint32_t vote = __ballot_sync(~0u, seen != 0);
      if (seen != 0) {
        const int i = hits + __popc(vote & ((1u << lane) - 1));
        routing.expert[i] = static_cast<int16_t>(e);
        routing.tokens[i] = static_cast<uint16_t>(seen);
        routing.has_base[i] = call.group != nullptr && call.group[e] >= 0;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int32_t* offsets = m == 0 ? call.gate_up.rank_offsets : call.down.rank_offsets;
          routing.start[m][i] = offsets == nullptr ? 0 : offsets[e];
          routing.rank[m][i] = offsets == nullptr ? 0 : offsets[e + 1] - offsets[e];
        }
      }
      hits += __popc(vote);
    }
    __syncwarp();
    for (int m = 0; m < 2; ++m) {
      int before = 0;
      for (int first = 0; first < hits; first += 32) {
        const int i = first + lane;
        int sum = i < hits ? (routing.rank[m][i] + 15) / 16 : 0;
        const int own = sum;
        for (int step = 1; step < 32; step *= 2) {
          const int lower = __shfl_up_sync(~0u, sum, static_cast<unsigned>(step));
          if (lane >= step) sum += lower;
        }
        if (i < hits) routing.strips_before[m][i] = before + sum - own;
        before += __shfl_sync(~0u, sum, 31);
      }
      if (lane == 0) routing.strips_before[m][hits] = before;
    }
    if (lane == 0) {
      const bool has_base = call.gate_up.base != nullptr;
      routing.hits = hits;
      routing.tasks[base_gate_up] = base_tasks(call);
      routing.tasks[v_gate_up] = routing.strips_before[0][hits];
      routing.tasks[u_gate_up] = call.inner / 16;
      routing.tasks[base_down] = has_base ? call.hidden / 16 : 0;
      routing.tasks[v_down] = routing.strips_before[1][hits];
      routing.tasks[u_down] = call.hidden / 32;
    }
  }
  __syncthreads();
  for (int at = thread; at < routing.hits * kMaxTokens; at += kThreads) {
    const int i = at / kMaxTokens, t = at % kMaxTokens;
    float weight = 0.0f;
    int slot = 0;
    if (t < call.tokens) {
      for (int j = call.top_k - 1; j >= 0; --j) {
        if (scratch.slots.index[t * call.top_k + j] == routing.expert[i]) {
          weight += weight_of(call, t * call.top_k + j);
          slot = j;
        }
      }
    }
    routing.weight[i][t] = weight;
    routing.slot[i][t] = static_cast<uint8_t>(slot);
  }
  __syncthreads();
}

// ---- tasks

struct Task {
  int kind, number;  // number within its kind
};

__device__ __forceinline__ Task task_after(Task task, int step, const Routing& routing) {
  task.number += step;
  while (task.kind < kinds && task.number >= routing.tasks[task.kind]) {
    task.number -= routing.tasks[task.kind];
    ++task.kind;
  }
  return task;
}

// The expert (by its number among those hit) that owns a strip.
__device__ __forceinline__ int owner_of(const Routing& routing, int matrix, int strip) {
  int low = 0, high = routing.hits - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (routing.strips_before[matrix][middle] <= strip) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// In u_gate_up, warps that share one expert's ranks: 1 where there are enough experts for all warps. More than one only
// where every expert has a warp to begin with, so that a warp then has one expert at most.
__device__ __forceinline__ int ways_of(int hits) { return hits > 4 ? 1 : hits > 2 ? 2 : hits > 1 ? 4 : 8; }

// A warp's place in the chunks of a task: those of a strip are 64 columns each, number `block`; those of ranks are 32
// ranks of expert i, from rank 32 block.
struct Chunks {
  int i, block;
};

__device__ __forceinline__ int rank_blocks(const Routing& routing, int matrix, int i) {
  return (routing.rank[matrix][i] + 31) / 32;
}

// Moves on to where expert i has a block, or behind the last expert. `ahead`: experts from one to a warp's next, and
// `first`, the block it begins with there; in u_down (ahead 0) blocks are dealt to the warps across experts.
__device__ __forceinline__ Chunks settle(Chunks at, const Routing& routing, int matrix, int ahead, int first) {
  while (at.i < routing.hits && at.block >= rank_blocks(routing, matrix, at.i)) {
    if (ahead == 0) {
      at.block -= rank_blocks(routing, matrix, at.i);
      ++at.i;
    } else {
      at.i += ahead;
      at.block = first;
    }
  }
  return at;
}

__device__ __forceinline__ Chunks first_chunk(int kind, int warp, const Routing& routing) {
  if (kind == u_gate_up) {
    const int ways = ways_of(routing.hits);
    return settle({warp / ways, warp % ways}, routing, 0, kWarps / ways, warp % ways);
  }
  if (kind == u_down) return settle({0, warp}, routing, 1, 0, 0);
  return {0, warp};
}

__device__ __forceinline__ Chunks next_chunk(int kind, int warp, Chunks at, const Routing& routing) {
  if (kind == u_gate_up) {
    const int ways = ways_of(routing.hits);
    return settle({at.i, at.block + ways}, routing, 0, kWarps / ways, warp % ways);
  }
  at.block += kWarps;
  return kind == u_down ? settle(at, routing, 1, 0, 0) : at;
}

__device__ __forceinline__ bool is_chunk(int kind, Chunks at, const Shape& s, const Routing& routing) {
  if (kind == u_gate_up || kind == u_down) return at.i < routing.hits;
  return at.block * 64 < (kind <= v_gate_up ? s.H : s.I);
}

// ---- loading

// 16 rows of 64 columns, as 8 pieces of 16 bytes a row. Odd rows have their halves exchanged, so that the pieces that 8
// lanes read at once lie in different banks.
__device__ __forceinline__ int strip_piece(int row, int piece) { return row * 128 + (piece ^ ((row & 1) << 2)) * 16; }

// 32 ranks of 32 columns, as 4 pieces a rank. ldmatrix reads 8 ranks at once: 0, 1, 8, 9, 16, 17, 24, 25, and 2, 4 or 6
// more (see multiply_ranks), whose pieces must lie in different banks.
__device__ __forceinline__ int rank_piece(int r, int piece) { return r * 64 + (piece ^ ((r >> 3) & 3)) * 16; }

template <typename T>
__device__ void load_strip(const void* matrix, int64_t first_row, int rows, int K, int chunk, uint8_t* ring) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int row = lane / 8 + 4 * j, piece = lane % 8, column = chunk * 64 + piece * 8;
    const bool valid = row < rows && column < K;
    const T* source = static_cast<const T*>(matrix) + (valid ? (first_row + row) * K + column : 0);
    ptx::copy_async_16(ring + strip_piece(row, piece), source, valid);
  }
}

// 16 columns from `column` on and 16 from `second` on; none where that is -1.
template <typename T>
__device__ void load_ranks(const void* u, int64_t first_rank, int ranks, int N, int column, int second, uint8_t* ring) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int r = lane / 4 + 8 * j, piece = lane % 4, first = piece < 2 ? column : second;
    const bool valid = r < ranks && first >= 0;
    const T* source = static_cast<const T*>(u) + (valid ? (first_rank + r) * N + first + piece % 2 * 8 : 0);
    ptx::copy_async_16(ring + rank_piece(r, piece), source, valid);
  }
}

template <typename T>
__device__ void load_chunk(const LowRankCall& call, const Shape& s, const Routing& routing, Task task, Chunks at,
                           uint8_t* ring) {
  const int m = task.kind < base_down ? 0 : 1;
  const int N = m == 0 ? s.N : s.H, K = m == 0 ? s.H : s.I;
  if (task.kind == base_gate_up || task.kind == base_down) {
    load_strip<T>(m == 0 ? call.gate_up.base : call.down.base, task.number * 16, 16, K, at.block, ring);
  } else if (task.kind == v_gate_up || task.kind == v_down) {
    const int i = owner_of(routing, m, task.number), r = (task.number - routing.strips_before[m][i]) * 16;
    load_strip<T>(m == 0 ? call.gate_up.v : call.down.v, routing.start[m][i] + r, routing.rank[m][i] - r, K, at.block,
                  ring);
  } else {
    const int column = m == 1 ? task.number * 32 : task.number * 16;
    const int second = m == 1 ? column + 16 : call.gated ? s.I + column : -1;
    load_ranks<T>(m == 0 ? call.gate_up.u : call.down.u, routing.start[m][at.i] + at.block * 32,
                  routing.rank[m][at.i] - at.block * 32, N, column, second, ring);
  }
}

// ---- multiplying

// Sums of one warp in the layout of mma.m16n8k16: lane 4 g + q holds rows g, g + 8 and tokens 2 q, 2 q + 1 of 8 tokens.
template <int TokenTiles>
struct Sums {
  float of[TokenTiles][4];
  __device__ void clear() {
    for (auto& tile : of) {
      for (float& sum : tile) sum = 0.0f;
    }
  }
};

template <typename T>
__device__ __forceinline__ void multiply_pair(float (&sums)[4], const uint4& low, const uint4& high, const uint4& token) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
  const uint32_t first_token[2] = {token.x, token.y}, second_token[2] = {token.z, token.w};
  ptx::mma_m16n8k16<T>(sums, first, first_token);
  ptx::mma_m16n8k16<T>(sums, second, second_token);
}

// Activations of a chunk for the lanes of a warp: 8 numbers of token g from column 8 q on, of each half. The order of
// the columns within a sum is free as long as weights and activations agree; this one makes both 16-byte loads.
template <int TokenTiles>
struct Operand {
  uint4 of[2][TokenTiles];
};

template <typename T, int TokenTiles>
__device__ __forceinline__ void multiply_strip(Sums<TokenTiles>& sums, const uint8_t* ring,
                                               const Operand<TokenTiles>& operand) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 low = ptx::load_shared_16(ring + strip_piece(g, half * 4 + q));
    const uint4 high = ptx::load_shared_16(ring + strip_piece(g + 8, half * 4 + q));
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) multiply_pair<T>(sums.of[tile], low, high, operand.of[half][tile]);
  }
}

// sums[0] and sums[1] += the two halves of 16 columns, over 32 ranks. Place s of a sum over 16 is rank
// 8 (s / 2 mod 4) + s mod 2, 2 more from s = 8 on, 4 more in the second product: so a lane's activations are the 8 ranks
// from 8 q on.
template <typename T, int TokenTiles>
__device__ __forceinline__ void multiply_ranks(Sums<TokenTiles> (&sums)[2], const uint8_t* ring,
                                               const uint4 (&operand)[TokenTiles]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane % 8, matrix = lane / 8;
#pragma unroll
  for (int product = 0; product < 2; ++product) {
    const int r = 8 * (row / 2) + row % 2 + 2 * (matrix / 2) + 4 * product;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t weights[4];
      ptx::load_matrix_x4_transposed(weights, ring + rank_piece(r, 2 * half + matrix % 2));
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
        const uint4& token = operand[tile];
        const uint32_t b[2] = {product == 0 ? token.x : token.z, product == 0 ? token.y : token.w};
        ptx::mma_m16n8k16<T>(sums[half].of[tile], weights, b);
      }
    }
  }
}

__device__ __forceinline__ void wait_for(const uint32_t* flag, uint32_t count) {
  if (threadIdx.x % 32 == 0) {
    while (ptx::acquire(flag) < count) ptx::pause();
  }
  __syncwarp();
}

// ---- the kernel

template <typename T, int TokenTiles, int Stages>
class Block {
 public:
  __device__ Block(const LowRankCall& call, uint8_t* shared)
      : call_(call),
        s_{call.tokens, call.top_k, call.experts, call.hidden, call.inner, (call.gated ? 2 : 1) * call.inner},
        at_(workspace_of(call)),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        ring_(shared + warp_ * Stages * kChunkBytes),
        scratch_(*reinterpret_cast<Scratch*>(shared + kWarps * Stages * kChunkBytes)) {}

  __device__ void run() {
    // The first task's weights need no routing, if they are a base's: they arrive while it is worked out.
    const Task dealt{base_gate_up, static_cast<int>(blockIdx.x)};
    int loads = 0;
    loading_ = {dealt, {0, warp_}};
    if (dealt.number < base_tasks(call_)) {
      for (; loads < Stages - 1 && loading_.at.block * 64 < s_.H; ++loads) {
        load_chunk<T>(call_, s_, routing(), dealt, loading_.at, ring_ + loads * kChunkBytes);
        ptx::commit_copies();
        loading_.at.block += kWarps;
      }
      loaded_ = loads;
    }
    find_routing(call_, scratch_);
    Task task = task_after(dealt, 0, routing());
    if (loads == 0) {
      loading_ = begin(task);
    } else if (!is_chunk(base_gate_up, loading_.at, s_, routing())) {
      loading_ = begin(next_task(task));
    }
    for (; loads < Stages - 1; ++loads) load_next();

    for (; task.kind < kinds; task = next_task(task)) {
      switch (task.kind) {
        case base_gate_up: base_or_v(task, part<float>(at_.a), s_.N, flag_a(task.number % (s_.I / 16))); break;
        case v_gate_up: base_or_v(task, part<T>(at_.c), at_.places, flags() + 0); break;
        case u_gate_up: gate_up(task); break;
        case base_down: base_or_v(task, part<float>(at_.y0), s_.H, flag_y0(task.number / 2)); break;
        case v_down: base_or_v(task, part<T>(at_.c_down), at_.places_down, flags() + 2); break;
        default: down(task);
      }
    }
    ptx::wait_copies<0>();
  }

 private:
  struct Loading {
    Task task;
    Chunks at;
  };

  template <typename P>
  __device__ P* part(size_t offset) const {
    return reinterpret_cast<P*>(static_cast<uint8_t*>(call_.workspace) + offset);
  }
  __device__ uint32_t* flags() const { return part<uint32_t>(at_.flags); }
  __device__ uint32_t* flag_a(int tile) const { return flags() + 4 + tile; }
  __device__ uint32_t* flag_y0(int tile) const { return flags() + 4 + s_.I / 16 + tile; }
  __device__ const Routing& routing() const { return scratch_.routing; }
  __device__ Task next_task(Task task) const { return task_after(task, static_cast<int>(gridDim.x), routing()); }

  // ---- the ring

  // The first chunk of this warp in a task or the tasks behind it.
  __device__ Loading begin(Task task) const {
    while (task.kind < kinds) {
      const Chunks at = first_chunk(task.kind, warp_, routing());
      if (is_chunk(task.kind, at, s_, routing())) return {task, at};
      task = next_task(task);
    }
    return {task, {}};
  }

  __device__ void load_next() {
    if (loading_.task.kind < kinds) {
      load_chunk<T>(call_, s_, routing(), loading_.task, loading_.at, ring_ + loaded_ * kChunkBytes);
      loaded_ = loaded_ + 1 == Stages ? 0 : loaded_ + 1;
      loading_.at = next_chunk(loading_.task.kind, warp_, loading_.at, routing());
      if (!is_chunk(loading_.task.kind, loading_.at, s_, routing())) {
        loading_ = begin(next_task(loading_.task));
      }
    }
    ptx::commit_copies();  // also where there is nothing left, so that groups count chunks
  }

  // The oldest chunk, when it has arrived; the place of the one before it is loaded anew.
  __device__ const uint8_t* take_chunk() {
    ptx::wait_copies<Stages - 2>();
    __syncwarp();  // the pieces of all lanes have arrived, and all lanes are done with the chunk before
    const uint8_t* chunk = ring_ + taken_ * kChunkBytes;
    taken_ = taken_ + 1 == Stages ? 0 : taken_ + 1;
    load_next();
    return chunk;
  }

  // ---- sums of all warps

  // Stores this warp's sums of 16 rows, waits for the others', and gives the sum of all to store(row, token, sum).
  template <typename Store>
  __device__ void add_up(const Sums<TokenTiles>& sums, int which, const Store& store) {
    put(sums, which, warp_);
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < 16 * kMaxTokens; at += kThreads) {
      const int row = at % 16, t = at / 16;
      if (t < s_.T) {
        float sum = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) sum += scratch_.parts[which][warp][at];
        store(row, t, sum);
      }
    }
  }

  __device__ void put(const Sums<TokenTiles>& sums, int which, int warp) {
    const int g = lane_ / 4, q = lane_ % 4;
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = g + j / 2 * 8, t = tile * 8 + 2 * q + j % 2;
        scratch_.parts[which][warp][t * 16 + row] = sums.of[tile][j];
      }
    }
  }

  // What this block has stored is there for whoever acquires the flag; scratch may be used again.
  __device__ void publish(uint32_t* flag) {
    __syncthreads();
    if (threadIdx.x == 0) ptx::release_add(flag, 1);
  }

  // ---- tasks

  // out[t, first + row] = W[row] . activations[t] for 16 rows of a base or of V.
  template <typename Out>
  __device__ void base_or_v(Task task, Out* out, int stride, uint32_t* flag) {
    const bool is_v = task.kind == v_gate_up || task.kind == v_down, is_down = task.kind >= base_down;
    const int m = is_down ? 1 : 0, K = is_down ? s_.I : s_.H;
    const int i = is_v ? owner_of(routing(), m, task.number) : 0;
    if (is_down) wait_for(flags() + 1, static_cast<uint32_t>(routing().tasks[u_gate_up]));

    const T* source[TokenTiles];  // activations of the token whose column this lane loads; null: zeros
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      const int t = tile * 8 + lane_ / 4;
      const bool takes = t < s_.T && (!is_v || (routing().tokens[i] >> t & 1) != 0);
      int64_t row = t;
      if (is_down && is_v && takes) row = static_cast<int64_t>(t) * s_.top_k + routing().slot[i][t];
      const T* rows = !is_down ? static_cast<const T*>(call_.x) : is_v ? part<T>(at_.wh) : part<T>(at_.sum);
      source[tile] = takes ? rows + row * K : nullptr;
    }
    Sums<TokenTiles> sums;
    sums.clear();
    Chunks at = first_chunk(task.kind, warp_, routing());
    Operand<TokenTiles> operand = activations(source, at.block, K);
    while (is_chunk(task.kind, at, s_, routing())) {
      const Operand<TokenTiles> now = operand;
      at.block += kWarps;
      operand = activations(source, at.block, K);  // on their way while this chunk is waited for
      multiply_strip<T>(sums, take_chunk(), now);
    }
    int first = task.number * 16;
    if (is_v) {
      const int r = (task.number - routing().strips_before[m][i]) * 16;
      first = place_of(routing().start[m][i], routing().expert[i]) + r;
    }
    add_up(sums, 0, [&](int row, int t, float sum) {
      if constexpr (sizeof(Out) == sizeof(float)) {
        out[static_cast<int64_t>(t) * stride + first + row] = sum;
      } else {
        out[static_cast<int64_t>(t) * stride + first + row] = from_float<T>(sum);
      }
    });
    publish(flag);
  }

  __device__ Operand<TokenTiles> activations(const T* const (&source)[TokenTiles], int chunk, int K) const {
    Operand<TokenTiles> operand;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = chunk * 64 + half * 32 + lane_ % 4 * 8;
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
        const bool there = source[tile] != nullptr && column < K;
        operand.of[half][tile] = there ? ptx::load_l2_16(source[tile] + column) : uint4{0, 0, 0, 0};
      }
    }
    return operand;
  }

  // 8 numbers of c for the token this lane loads, from rank 32 block + 8 q of expert i on.
  __device__ void ranks_of(const T* c, int stride, int m, Chunks at, uint4 (&operand)[TokenTiles]) const {
    const int r = at.block * 32 + lane_ % 4 * 8;
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      const int t = tile * 8 + lane_ / 4;
      const bool there = at.i < routing().hits && t < s_.T && r < padded(routing().rank[m][at.i]);
      const T* from = c;
      if (there) {
        from += static_cast<int64_t>(t) * stride + place_of(routing().start[m][at.i], routing().expert[at.i]) + r;
      }
      operand[tile] = there ? ptx::load_l2_16(from) : uint4{0, 0, 0, 0};
    }
  }

  // 16 columns of I: z of every expert hit, wh and the sum of wh.
  __device__ void gate_up(Task task) {
    wait_for(flags() + 0, static_cast<uint32_t>(routing().tasks[v_gate_up]));
    const bool has_base = routing().tasks[base_gate_up] != 0;
    if (has_base) wait_for(flag_a(task.number), call_.gated ? 2 : 1);
    const int n = task.number * 16, g = lane_ / 4, q = lane_ % 4;
    Sums<TokenTiles> shared[2], total;
    total.clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = g + j / 2 * 8, t = tile * 8 + 2 * q + j % 2;
          const bool there = has_base && t < s_.T && (half == 0 || call_.gated);
          const float* a = part<float>(at_.a);
          shared[half].of[tile][j] =
              there ? ptx::load_l2(a + static_cast<int64_t>(t) * s_.N + half * s_.I + n + row) : 0.0f;
        }
      }
    }
    const int ways = ways_of(routing().hits);
    Chunks at = first_chunk(u_gate_up, warp_, routing());
    uint4 operand[TokenTiles];
    ranks_of(part<T>(at_.c), at_.places, 0, at, operand);
    for (int i = warp_ / ways; i < routing().hits || ways > 1; i += kWarps / ways) {
      Sums<TokenTiles> z[2];
      z[0].clear();
      z[1].clear();
      while (at.i == i && i < routing().hits) {
        uint4 now[TokenTiles];
#pragma unroll
        for (int tile = 0; tile < TokenTiles; ++tile) now[tile] = operand[tile];
        at = next_chunk(u_gate_up, warp_, at, routing());
        ranks_of(part<T>(at_.c), at_.places, 0, at, operand);
        multiply_ranks<T>(z, take_chunk(), now);
      }
      if (ways > 1) {  // one round: the first of the warps that share an expert adds up their parts
        put(z[0], 0, warp_);
        put(z[1], 1, warp_);
        __syncthreads();
        if (warp_ % ways == 0 && i < routing().hits) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int row = g + j / 2 * 8, t = tile * 8 + 2 * q + j % 2;
                for (int other = 1; other < ways; ++other) {
                  z[half].of[tile][j] += scratch_.parts[half][warp_ + other][t * 16 + row];
                }
              }
            }
          }
          store_h(z, shared, i, n, total);
        }
        __syncthreads();
        break;
      }
      store_h(z, shared, i, n, total);
    }
    if (has_base) {
      add_up(total, 0, [&](int row, int t, float sum) {
        part<T>(at_.sum)[static_cast<int64_t>(t) * s_.I + n + row] = from_float<T>(sum);
      });
    }
    publish(flags() + 1);
  }

  __device__ void store_h(const Sums<TokenTiles> (&z)[2], const Sums<TokenTiles> (&shared)[2], int i, int n,
                          Sums<TokenTiles>& total) {
    const int g = lane_ / 4, q = lane_ % 4;
    const float with_base = routing().has_base[i] != 0 ? 1.0f : 0.0f;
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = g + j / 2 * 8, t = tile * 8 + 2 * q + j % 2;
        if ((routing().tokens[i] >> t & 1) == 0) continue;
        float h = apply(call_.function, z[0].of[tile][j] + with_base * shared[0].of[tile][j]);
        if (call_.gated) h *= z[1].of[tile][j] + with_base * shared[1].of[tile][j];
        h *= routing().weight[i][t];
        const int64_t pair = static_cast<int64_t>(t) * s_.top_k + routing().slot[i][t];
        part<T>(at_.wh)[pair * s_.I + n + row] = from_float<T>(h);
        total.of[tile][j] += with_base * h;
      }
    }
  }

  // 32 rows of H.
  __device__ void down(Task task) {
    wait_for(flags() + 2, static_cast<uint32_t>(routing().tasks[v_down]));
    const bool has_base = routing().tasks[base_down] != 0;
    if (has_base) wait_for(flag_y0(task.number), 2);
    Sums<TokenTiles> sums[2];
    sums[0].clear();
    sums[1].clear();
    Chunks at = first_chunk(u_down, warp_, routing());
    uint4 operand[TokenTiles];
    ranks_of(part<T>(at_.c_down), at_.places_down, 1, at, operand);
    while (at.i < routing().hits) {
      uint4 now[TokenTiles];
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) now[tile] = operand[tile];
      at = next_chunk(u_down, warp_, at, routing());
      ranks_of(part<T>(at_.c_down), at_.places_down, 1, at, operand);
      multiply_ranks<T>(sums, take_chunk(), now);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_up(sums[half], half, [&](int row, int t, float sum) {
        const int64_t to = static_cast<int64_t>(t) * s_.H + task.number * 32 + half * 16 + row;
        if (has_base) sum += ptx::load_l2(part<float>(at_.y0) + to);
        static_cast<T*>(call_.y)[to] = from_float<T>(sum);
      });
    }
    __syncthreads();  // before parts are written again
  }

  const LowRankCall& call_;
  const Shape s_;
  const Workspace at_;
  const int warp_, lane_;
  uint8_t* const ring_;
  Scratch& scratch_;
  Loading loading_;
  int loaded_ = 0, taken_ = 0;
};

#ifdef __CUDA_ARCH__
constexpr int kStages = stages_of(__CUDA_ARCH__);
#else
constexpr int kStages = stages_of(0);  // the host compiler's view of the kernel, and the emulation
#endif

template <typename T, int TokenTiles>
__global__ void __launch_bounds__(kThreads) low_rank_decode_kernel(const __grid_constant__ LowRankCall call) {
  RESMOE_SHARED_MEMORY(shared);
  Block<T, TokenTiles, kStages>(call, shared).run();
}

}  // namespace resmoe::cuda
