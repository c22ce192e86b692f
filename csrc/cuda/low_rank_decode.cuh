// The kernel behind low_rank_decode.h: one grid of blocks that stay, six kinds of tasks, no barrier across
// the grid.
//
//     base_gate_up   a[t, n]   = B x                    16 rows n of gate_up
//     v_gate_up      c[t, r]   = V_e x                  16 ranks r of an expert that was hit
//     u_gate_up      wh        = w f(a + U_e c)         16 columns of I, all experts hit; sum[t] = their sum
//     base_down      y0[t, n]  = B' sum                 16 rows n of H
//     v_down         c'[t, r]  = V'_e wh                16 ranks r
//     u_down         y[t, n]   = y0 + sum_e U'_e c'_e   32 rows n of H
//
// Tasks are numbered in this order and dealt round the blocks, so a task only waits for tasks with smaller
// numbers. All blocks must be resident (a cooperative launch): each takes its own tasks in order. A block
// adds 1 to a flag (release) when a task's results are stored, and waits (acquire) for the number it knows
// must come.
//
// Within a task the 8 warps share the sum (K, or the ranks, or the experts); their parts are added through
// shared memory in the order of the warps. So results depend on nothing but the call.
#pragma once

#include "cuda/low_rank_ring.cuh"

namespace resmoe::cuda {

// Where the ranks of expert e, which start at `start`, lie in a row of c: padded with zeros to a multiple of
// 16, no expert's reach into the next one's.
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
  at.flag_bytes = (3 + I / 16 + H / 32) * sizeof(uint32_t);
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

// Behind the rings.
struct Scratch {
  Plan plan;
  union {
    RoutingScratch routing;
    float parts[2][kWarps][16 * kMaxTokens];
  };
};

// Chunks in a warp's ring: what shared memory holds beside the scratch, for code of an architecture (900 for
// sm_90). 227 KiB from sm_90 on, 163 on sm_80, 99 on sm_86, sm_89 and sm_120.
constexpr int stages_of(int architecture) {
  return architecture == 800 ? 8 : architecture >= 900 && architecture < 1200 ? 12 : 4;
}

constexpr size_t shared_bytes(int stages) {
  return static_cast<size_t>(kWarps * stages * kChunkBytes) + sizeof(Scratch);
}
static_assert(shared_bytes(stages_of(800)) <= 163 << 10);
static_assert(shared_bytes(stages_of(900)) <= 227 << 10);
static_assert(shared_bytes(stages_of(890)) <= 99 << 10);

template <typename T, int TokenTiles, int Stages>
class Block {
 public:
  __device__ Block(const LowRankCall& call, uint8_t* shared)
      : call_(call),
        s_(shape_of(call)),
        at_(workspace_of(call)),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        scratch_(*reinterpret_cast<Scratch*>(shared + kWarps * Stages * kChunkBytes)),
        plan_(scratch_.plan),
        ring_(call, scratch_.plan, shared + warp_ * Stages * kChunkBytes) {}

  __device__ void run() {
    const Task dealt{base_gate_up, static_cast<int>(blockIdx.x)};
    ring_.load_base(dealt);
    find_plan(call_, scratch_.routing, scratch_.plan);
    Task task = task_after(dealt, 0, plan_);
    ring_.load_rest(task);
    for (; task.kind < kinds; task = task_after(task, static_cast<int>(gridDim.x), plan_)) {
      if (task.kind == u_gate_up) {
        gate_up(task);
      } else if (task.kind == u_down) {
        down(task);
      } else {
        base_or_v(task);
      }
    }
    ptx::wait_copies<0>();
  }

 private:
  using Sums = cuda::Sums<TokenTiles>;

  template <typename P>
  __device__ P* part(size_t offset) const {
    return reinterpret_cast<P*>(static_cast<uint8_t*>(call_.workspace) + offset);
  }
  __device__ const Routing& routing() const { return plan_.routing; }

  // Of the results of v_gate_up, u_gate_up and v_down; of 16 columns of I of a; of 32 columns of y0.
  __device__ uint32_t* flag_c() const { return part<uint32_t>(at_.flags); }
  __device__ uint32_t* flag_wh() const { return flag_c() + 1; }
  __device__ uint32_t* flag_c_down() const { return flag_c() + 2; }
  __device__ uint32_t* flag_a(int tile) const { return flag_c() + 3 + tile; }
  __device__ uint32_t* flag_y0(int tile) const { return flag_c() + 3 + s_.I / 16 + tile; }

  // ---- sums of all warps

  // visit(row, token, sum) for the sums this lane has.
  template <typename Visit>
  __device__ void each(Sums& sums, const Visit& visit) const {
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        visit(lane_ / 4 + j / 2 * 8, tile * 8 + lane_ % 4 * 2 + j % 2, sums.of[tile][j]);
      }
    }
  }

  __device__ void put(Sums& sums, int which) const {
    each(sums, [&](int row, int t, float sum) { scratch_.parts[which][warp_][t * 16 + row] = sum; });
  }

  // Stores this warp's sums of 16 rows, waits for the others', and gives the sum of all to store(row, token,
  // sum).
  template <typename Store>
  __device__ void add_up(Sums& sums, int which, const Store& store) const {
    put(sums, which);
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < 16 * s_.T; at += kThreads) {
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += scratch_.parts[which][warp][at];
      store(at % 16, at / 16, sum);
    }
  }

  // ---- 16 rows of a base or of V

  __device__ void base_or_v(Task task) {
    const bool is_v = task.kind == v_gate_up || task.kind == v_down, is_down = task.kind >= base_down;
    const int K = is_down ? s_.I : s_.H;
    Strip strip{};
    if (is_v) strip = strip_of(plan_, is_down, task.number);
    if (is_down) wait_for(flag_wh(), static_cast<uint32_t>(plan_.tasks[u_gate_up]));

    const T* from[TokenTiles];  // activations of the token whose column this lane loads; null: zeros
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      const int t = tile * 8 + lane_ / 4;
      from[tile] = nullptr;
      if (t >= s_.T || (is_v && !routing().takes(strip.i, t))) continue;
      const T* const rows = !is_down ? static_cast<const T*>(call_.x)
                            : is_v   ? part<T>(at_.wh)
                                     : part<T>(at_.sum);
      const int row = is_down && is_v ? routing().pair(strip.i, t) : t;
      from[tile] = rows + static_cast<int64_t>(row) * K + lane_ % 4 * 8;
    }
    Sums sums;
    sums.clear();
    const int own = K - lane_ % 4 * 8;
    Operand<TokenTiles> next = activations(from, warp_ * 64, own - warp_ * 64);
    for (int column = warp_ * 64; column < K; column += kWarps * 64) {
      const Operand<TokenTiles> now = next;
      next = activations(from, column + kWarps * 64,
                         own - column - kWarps * 64);  // on their way while this chunk is waited for
      multiply_strip<T>(sums, ring_.take(), now);
    }

    if (is_v) {
      T* const c = part<T>(is_down ? at_.c_down : at_.c) +
                   place_of(plan_.start[is_down][strip.i], routing().expert[strip.i]) + strip.r;
      const int places = is_down ? at_.places_down : at_.places;
      add_up(sums, 0, [&](int row, int t, float sum) {
        c[static_cast<int64_t>(t) * places + row] = from_float<T>(sum);
      });
      publish(is_down ? flag_c_down() : flag_c());
    } else {
      float* const a = part<float>(is_down ? at_.y0 : at_.a) + task.number * 16;
      const int rows = is_down ? s_.H : s_.N;
      add_up(sums, 0, [&](int row, int t, float sum) { a[static_cast<int64_t>(t) * rows + row] = sum; });
      publish(is_down ? flag_y0(task.number / 2) : flag_a(task.number % (s_.I / 16)));
    }
  }

  // `left`: columns from this lane's first on.
  __device__ static Operand<TokenTiles> activations(const T* const (&from)[TokenTiles], int column,
                                                    int left) {
    Operand<TokenTiles> operand;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
        const bool there = from[tile] != nullptr && half * 32 < left;
        operand.of[half][tile] = there ? ptx::load_l2_16(from[tile] + column + half * 32) : uint4{0, 0, 0, 0};
      }
    }
    return operand;
  }

  // ---- U c, with c a block of ranks ahead

  struct Ranks {
    RankBlock at;
    uint4 c[TokenTiles];  // 8 numbers for the token this lane loads, from rank 32 at.block + 8 q on
  };

  __device__ Ranks ranks_at(RankBlock at, int m) const {
    Ranks ranks{at, {}};
    if (at.i >= routing().hits) return ranks;
    const int r = at.block * 32 + lane_ % 4 * 8;
    const T* const c =
        part<T>(m == 0 ? at_.c : at_.c_down) + place_of(plan_.start[m][at.i], routing().expert[at.i]) + r;
    const bool there = r < padded(plan_.rank[m][at.i]);
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      const int t = tile * 8 + lane_ / 4;
      if (there && t < s_.T) {
        ranks.c[tile] =
            ptx::load_l2_16(c + static_cast<int64_t>(t) * (m == 0 ? at_.places : at_.places_down));
      }
    }
    return ranks;
  }

  // sums += U_i c_i, over this warp's blocks of the experts i < end that are left.
  __device__ void add_ranks(Sums (&sums)[2], Ranks& ranks, int m, int end) {
    while (ranks.at.i < end) {
      const Ranks now = ranks;
      ranks = ranks_at(next_block(now.at, plan_, m, warp_), m);
      multiply_ranks<T>(sums, ring_.take(), now.c);
    }
  }

  // 16 columns of I: z of every expert hit, wh and the sum of wh.
  __device__ void gate_up(Task task) {
    const int first = task.number * 16, ways = plan_.ways, hits = routing().hits;
    const bool has_base = plan_.tasks[base_gate_up] != 0;
    wait_for(flag_c(), static_cast<uint32_t>(plan_.tasks[v_gate_up]));
    if (has_base) wait_for(flag_a(task.number), call_.gated ? 2 : 1);
    Sums a[2], total;
    total.clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half].clear();
      if (!has_base || (half == 1 && !call_.gated)) continue;
      each(a[half], [&](int row, int t, float& sum) {
        const float* const from = part<float>(at_.a) + half * s_.I + first + row;
        if (t < s_.T) sum = ptx::load_l2(from + static_cast<int64_t>(t) * s_.N);
      });
    }
    Ranks ranks = ranks_at(first_block(plan_, 0, warp_), 0);
    for (int i = warp_ / ways; i < hits || ways > 1; i += kWarps / ways) {
      Sums z[2];
      z[0].clear();
      z[1].clear();
      add_ranks(z, ranks, 0, i < hits ? i + 1 : hits);
      if (ways > 1) {  // one round: the first of the warps that share an expert adds up their parts
        put(z[0], 0);
        put(z[1], 1);
        __syncthreads();
        if (i < hits && warp_ % ways == 0) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            each(z[half], [&](int row, int t, float& sum) {
              for (int other = 1; other < ways; ++other) {
                sum += scratch_.parts[half][warp_ + other][t * 16 + row];
              }
            });
          }
        }
      }
      if (i < hits && warp_ % ways == 0) store_h(z, a, i, first, total);
      if (ways > 1) break;
    }
    if (ways > 1) __syncthreads();  // before parts are written again
    if (has_base) {
      add_up(total, 0, [&](int row, int t, float sum) {
        part<T>(at_.sum)[static_cast<int64_t>(t) * s_.I + first + row] = from_float<T>(sum);
      });
    }
    publish(flag_wh());
  }

  __device__ void store_h(const Sums (&z)[2], const Sums (&a)[2], int i, int first, Sums& total) const {
    const float with_base = routing().has_base[i] != 0 ? 1.0f : 0.0f;
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = lane_ / 4 + j / 2 * 8, t = tile * 8 + lane_ % 4 * 2 + j % 2;
        if (!routing().takes(i, t)) continue;
        const int entry = routing().entry(i, t);
        float h = apply(call_.function, z[0].of[tile][j] + with_base * a[0].of[tile][j]);
        if (call_.gated) h *= z[1].of[tile][j] + with_base * a[1].of[tile][j];
        h *= routing().weights[entry];
        part<T>(at_.wh)[static_cast<int64_t>(routing().pairs[entry]) * s_.I + first + row] = from_float<T>(h);
        total.of[tile][j] += with_base * h;
      }
    }
  }

  // 32 rows of H.
  __device__ void down(Task task) {
    const bool has_base = plan_.tasks[base_down] != 0;
    wait_for(flag_c_down(), static_cast<uint32_t>(plan_.tasks[v_down]));
    if (has_base) wait_for(flag_y0(task.number), 2);
    Sums sums[2];
    sums[0].clear();
    sums[1].clear();
    Ranks ranks = ranks_at(first_block(plan_, 1, warp_), 1);
    add_ranks(sums, ranks, 1, routing().hits);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_up(sums[half], half, [&](int row, int t, float sum) {
        const int64_t to = static_cast<int64_t>(t) * s_.H + task.number * 32 + half * 16 + row;
        if (has_base) sum += ptx::load_l2(part<float>(at_.y0) + to);
        static_cast<T*>(call_.y)[to] = from_float<T>(sum);
      });
    }
  }  // the next one's barrier is between those that read parts and those that write the same ones again

  const LowRankCall& call_;
  const Shape s_;
  const Workspace at_;
  const int warp_, lane_;
  Scratch& scratch_;
  const Plan& plan_;
  Ring<T, Stages> ring_;
};

#ifdef __CUDA_ARCH__
constexpr int kStages = stages_of(__CUDA_ARCH__);
#else
constexpr int kStages = stages_of(0);  // the host compiler's view of the kernel, and the emulation
#endif

// One block on a multiprocessor: without the 1 ptxas keeps to 128 registers and spills.
template <typename T, int TokenTiles>
__global__ void __launch_bounds__(kThreads, 1)
    low_rank_decode_kernel(const __grid_constant__ LowRankCall call) {
  RESMOE_SHARED_MEMORY(shared);
  Block<T, TokenTiles, kStages>(call, shared).run();
}

}  // namespace resmoe::cuda
