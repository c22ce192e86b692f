// Few tokens: nonzeros are walked on the ordinary units. block_sparse_decode.cuh says what the tasks are.
//
// A lane takes a word of the mask, and for each of its bits adds w x, with x from shared memory: all
// activations stand there, those of down from when gate_up is done.
#pragma once

#include "cuda/block_sparse_decode.cuh"

namespace resmoe::cuda::block_sparse {

// A task's rows are dealt to the warps in units: rows of the base, and 4 rows of an expert, whose words
// follow one another in memory.
template <typename T>
class Walk : Layer {
 public:
  __device__ Walk(const BlockSparseCall& call, uint8_t* shared)
      : Layer(call, shared, 4, 4),
        z_(shared_.walk.z),
        x_(reinterpret_cast<uint8_t*>(&shared_) + kSharedBytes) {}

  __device__ void run() {
    task_ = static_cast<int>(blockIdx.x);
    unit_ = warp_ - kWarps;
    int loads = 0;
    if (!is_down(task_) && warp_ < base_units(false)) {  // needs no routing: arrives while it is worked out
      unit_ = warp_;
      point();
      for (; loads < kStages - 1 && words_ > 0; ++loads) load_next();
    }
    stage_x();
    find_routing();
    for (; loads < kStages - 1; ++loads) load_next();
    bool staged = false;
    for (int task = static_cast<int>(blockIdx.x); task < tasks_; task += static_cast<int>(gridDim.x)) {
      const bool down = is_down(task);
      if (down && !staged) stage_wh();
      staged = down;
      float sums[2][4] = {};
      multiply(down, sums);
      if (down) {
        store_y(first_of(task), sums);
      } else {
        store_h(first_of(task));
      }
    }
    ptx::wait_copies<0>();
  }

 private:
  __device__ int base_units(bool down) const { return !has_base_ ? 0 : down || !call_.gated ? 4 : 8; }
  // Of an expert.
  __device__ int halves(bool down) const { return down || !call_.gated ? 1 : 2; }
  __device__ int units(bool down) const { return base_units(down) + routing().hits * halves(down); }

  // ---- the ring

  // To this lane's place in the memory of unit_ of task_.
  __device__ void point() {
    const bool down = is_down(task_);
    const BlockSparseMatrix& m = matrix(down);
    const int first = first_of(task_), W = words_of(down), expert_unit = unit_ - base_units(down);
    if (expert_unit < 0) {
      const int row = unit_ % 4 + first + (unit_ < 4 ? 0 : s_.I);
      mask_ = nullptr;
      values_ = static_cast<const uint8_t*>(m.base) + static_cast<int64_t>(row) * W * 64 + lane_ * 16;
      words_ = W;
    } else {
      const bool two = halves(down) == 2;
      const int i = two ? expert_unit >> 1 : expert_unit, row = first + (two ? (expert_unit & 1) * s_.I : 0);
      const int64_t word = row_of(down, i, row) * W;
      mask_ = m.mask + word + lane_ * 4;
      values_ = static_cast<const uint8_t*>(m.values) + word * (2 * m.n) + lane_ * 16;
      words_ = W * 4;
      value_bytes_ = 2 * m.n;
    }
  }

  // Only what there is: what lies behind it in the ring is not read.
  __device__ void load_next() {
    if (words_ <= 0 && task_ < tasks_) {
      unit_ += kWarps;
      while (task_ < tasks_ && unit_ >= units(is_down(task_))) {
        task_ += static_cast<int>(gridDim.x);
        unit_ = warp_;
      }
      if (task_ < tasks_) point();
    }
    const bool used = words_ > 0;
    if (used) {
      uint8_t* const slot = load_slot() + lane_ * 16;
      if (mask_ == nullptr) {
        if (lane_ < words_ * 4) ptx::copy_async_16(slot, values_, true);
        if (lane_ + 32 < words_ * 4) ptx::copy_async_16(slot + 512, values_ + 512, true);
        values_ += kBaseBytes;
        words_ -= kBaseBytes / 64;
      } else {
        const int words = words_ < kWords ? words_ : kWords, bytes = words * value_bytes_ - lane_ * 16;
        if (lane_ * 4 < words) ptx::copy_async_16(slot, mask_, true);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (k * 512 < bytes) ptx::copy_async_16(slot + kMaskBytes + k * 512, values_ + k * 512, true);
        }
        mask_ += kWords;
        values_ += kWords * value_bytes_;
        words_ -= kWords;
      }
    }
    close_slot(used);
  }

  __device__ const uint8_t* take_chunk() {
    const uint8_t* chunk = arrived();
    load_next();
    return chunk;
  }

  // ---- activations

  // Behind so many that are transposed.
  __device__ uint8_t* plain(int columns, int transposed) const {
    return x_ + transposed * transposed_bytes(columns);
  }

  // x, transposed and plain.
  __device__ void stage_x() {
    const int W = words_of(false), stride = stride_of(s_.H);
    uint8_t* const rows = plain(s_.H, s_.T);
    for (int at = static_cast<int>(threadIdx.x); at < s_.T * 4 * W; at += kThreads) {
      const int b = at % W, part = at / W % 4, t = at / (4 * W), column = t * s_.H + b * 32 + part * 8;
      const uint4 x = *reinterpret_cast<const uint4*>(static_cast<const T*>(call_.x) + column);
      *reinterpret_cast<uint4*>(rows + column * 2) = x;
      auto* const to = reinterpret_cast<uint16_t*>(x_ + t * transposed_bytes(s_.H)) + part * 8 * stride + b;
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j * stride] = static_cast<uint16_t>(pairs[j / 2] >> (j % 2 * 16));
    }
  }

  // wh, which was stored transposed, and its sum, over x: no thread reads that any more, as publish() was a
  // barrier.
  __device__ void stage_wh() {
    wait_for(flag(), static_cast<uint32_t>(gate_up_tasks_));
    const int pieces = transposed_bytes(s_.I) / 16;
    for (int at = static_cast<int>(threadIdx.x); at < routing().hits * s_.T * pieces; at += kThreads) {
      const int i = at / pieces / s_.T, t = at / pieces % s_.T, piece = at % pieces;
      if (!routing().takes(i, t)) continue;
      const int64_t from = static_cast<int64_t>(routing().pair(i, t)) * pieces + piece;
      ptx::copy_async_16(x_ + from * 16, wh<uint4>() + from, true);
    }
    if (has_base_) {
      uint8_t* const rows = plain(s_.I, s_.T * s_.top_k);
      for (int at = static_cast<int>(threadIdx.x); at < s_.T * s_.I / 8; at += kThreads) {
        ptx::copy_async_16(rows + at * 16, sum<uint4>() + at, true);
      }
    }
    ptx::commit_copies();
    ptx::wait_copies<0>();
    __syncthreads();
  }

  // ---- multiplying

  static __device__ float dot(const uint4& w, const uint4& x) {
    float sum = low_of<T>(w.x) * low_of<T>(x.x) + high_of<T>(w.x) * high_of<T>(x.x);
    sum += low_of<T>(w.y) * low_of<T>(x.y) + high_of<T>(w.y) * high_of<T>(x.y);
    sum += low_of<T>(w.z) * low_of<T>(x.z) + high_of<T>(w.z) * high_of<T>(x.z);
    return sum + (low_of<T>(w.w) * low_of<T>(x.w) + high_of<T>(w.w) * high_of<T>(x.w));
  }

  // A row of the base times all tokens: this lane's part.
  __device__ void base_row(const uint8_t* x, int W, float (&sums)[2]) {
    for (int piece = lane_; piece - lane_ < W * 4;) {
      const uint8_t* chunk = take_chunk() + lane_ * 16;
#pragma unroll
      for (int j = 0; j < 2; ++j, piece += 32) {
        if (piece >= W * 4) continue;
        const uint4 w = ptx::load_shared_16(chunk + j * 512);
        sums[0] += dot(w, ptx::load_shared_16(x + piece * 16));
        if (s_.T > 1) sums[1] += dot(w, ptx::load_shared_16(x + (piece + W * 4) * 16));
      }
    }
  }

  // sums[row] += 4 rows of an expert times the activations at x; others those that lie `second` bytes behind.
  template <bool Two>
  __device__ void expert_rows(int n, int W, const uint8_t* x, int second, float (&sums)[4],
                              float (&others)[4]) {
    const int stride = 2 * up_to(W, 32), own_values = kMaskBytes + lane_ * 2 * n;
    int row = 0, b = lane_ * 2;  // in bytes
    for (int left = 4 * W - lane_; left + lane_ > 0; left -= kWords) {
      const uint8_t* chunk = take_chunk();
#pragma unroll
      for (int j = 0; j < 2; ++j, b += 64) {
        if (32 * j >= left) continue;
        for (; b >= 2 * W; b -= 2 * W) ++row;
        uint32_t bits = *reinterpret_cast<const uint32_t*>(chunk + lane_ * 4 + 128 * j);
        const auto* values = reinterpret_cast<const uint2*>(chunk + own_values + 64 * n * j);
        const uint8_t* at = x + b;
        float sum = 0.0f, other = 0.0f;
#pragma unroll
        for (int four = 3; four >= 0; --four) {
          if (4 * four >= n) continue;
          const uint2 v = values[four];
#pragma unroll
          for (int k = 3; k >= 0; --k) {
            const uint8_t* column = at + take_bit(bits) * stride;
            const uint32_t pair = k < 2 ? v.x : v.y;
            const float w = k % 2 == 0 ? low_of<T>(pair) : high_of<T>(pair);
            sum += w * low_of<T>(*reinterpret_cast<const uint16_t*>(column));
            if (Two) other += w * low_of<T>(*reinterpret_cast<const uint16_t*>(column + second));
          }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (row == r) sums[r] += sum;
          if (Two && row == r) others[r] += other;
        }
      }
    }
  }

  // 4 rows of expert i; 0 for a token that does not go there.
  __device__ void expert_unit(bool down, int i, float (&sums)[2][4]) {
    const uint32_t tokens = routing().tokens[i];
    const int first = (tokens & 1) != 0 ? 0 : 1, size = transposed_bytes(down ? s_.I : s_.H);
    const int64_t from = down ? routing().pair(i, first) : first;
    const uint8_t* x = x_ + from * size;
    if (tokens == 3) {
      const int second = static_cast<int>((down ? routing().pair(i, 1) : 1) - from) * size;
      expert_rows<true>(matrix(down).n, words_of(down), x, second, sums[0], sums[1]);
    } else {
      float own[4] = {};
      expert_rows<false>(matrix(down).n, words_of(down), x, 0, own, own);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sums[0][r] += first == 0 ? own[r] : 0.0f;
        sums[1][r] += first == 0 ? 0.0f : own[r];
      }
    }
  }

  // The sum of all lanes of row lane / 8.
  __device__ float add_lanes(const float (&sums)[4]) const {
    const bool upper = (lane_ & 16) != 0, odd = (lane_ & 8) != 0;
    const float a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    const float even = (upper ? c : a) + __shfl_xor_sync(~0u, upper ? a : c, 16);
    const float next = (upper ? d : b) + __shfl_xor_sync(~0u, upper ? b : d, 16);
    float sum = (odd ? next : even) + __shfl_xor_sync(~0u, odd ? even : next, 8);
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
  }

  // This warp's units of a task: of gate_up into z and a, of down summed up, by token and row.
  __device__ void multiply(bool down, float (&sums)[2][4]) {
    const int bases = base_units(down);
    const uint8_t* rows = down ? plain(s_.I, s_.T * s_.top_k) : plain(s_.H, s_.T);
    for (int unit = warp_; unit < units(down); unit += kWarps) {
      if (unit < bases) {
        float row[2] = {};
        base_row(rows, words_of(down), row);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sums[0][r] += unit % 4 == r ? row[0] : 0.0f;
          sums[1][r] += unit % 4 == r ? row[1] : 0.0f;
        }
      } else {
        expert_unit(down, halves(down) == 2 ? (unit - bases) >> 1 : unit - bases, sums);
      }
      if (down) continue;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if (t >= s_.T) continue;
        const float sum = add_lanes(sums[t]);
        if (unit >= bases) {
          if (lane_ % 8 == 0) z_[((unit - bases) * 4 + lane_ / 8) * 2 + t] = sum;
        } else {
          if (lane_ == unit % 4 * 8) shared_.walk.a[unit][t] = sum;
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[t][r] = 0.0f;
      }
    }
  }

  // ---- the ends of tasks

  // 4 columns of I from n on.
  __device__ void store_h(int first) {
    const int size = halves(false) * 8;  // of an expert's z: rows, and of each 2 tokens
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < routing().hits * 4; at += kThreads) {
      const int i = at / 4, column = at % 4, n = first + column;
      float* const z = z_ + i * size + column * 2;
      for (int t = 0; t < s_.T; ++t) {
        if (!routing().takes(i, t)) continue;
        const bool with_base = routing().has_base[i] != 0;
        float h = apply(call_.function, z[t] + (with_base ? shared_.walk.a[column][t] : 0.0f));
        if (call_.gated) h *= z[8 + t] + (with_base ? shared_.walk.a[4 + column][t] : 0.0f);
        const int entry = routing().entry(i, t);
        h *= routing().weights[entry];
        z[t] = h;
        const int stride = stride_of(s_.I);
        wh<T>()[static_cast<int64_t>(routing().pairs[entry]) * (32 * stride) + n % 32 * stride + n / 32] =
            from_float<T>(h);
      }
    }
    __syncthreads();
    if (has_base_ && static_cast<int>(threadIdx.x) < 4 * s_.T) {
      const int column = static_cast<int>(threadIdx.x) % 4, t = static_cast<int>(threadIdx.x) / 4;
      float total = 0.0f;
      for (int i = 0; i < routing().hits; ++i) {
        const bool adds = routing().takes(i, t) && routing().has_base[i] != 0;
        if (adds) total += z_[i * size + column * 2 + t];
      }
      sum<T>()[static_cast<int64_t>(t) * s_.I + first + column] = from_float<T>(total);
    }
    publish(flag());
  }

  // 4 rows of H.
  __device__ void store_y(int first, const float (&sums)[2][4]) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const float sum = add_lanes(sums[t]);
      if (lane_ % 8 == 0) shared_.walk.parts[warp_][lane_ / 8][t] = sum;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < 4 * s_.T) {
      const int row = static_cast<int>(threadIdx.x) % 4, t = static_cast<int>(threadIdx.x) / 4;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared_.walk.parts[warp][row][t];
      static_cast<T*>(call_.y)[static_cast<int64_t>(t) * s_.H + first + row] = from_float<T>(sum);
    }
    __syncthreads();
  }

  float* const z_;    // of 4 rows of a unit, 2 tokens: z, then w h in the place of its gate's
  uint8_t* const x_;  // activations, transposed, by token or by pair; behind them plain(), by token
  // What is loaded next.
  int task_, unit_, words_ = 0, value_bytes_ = 0;
  const uint32_t* mask_ = nullptr;  // null: a row of the base
  const uint8_t* values_ = nullptr;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) walk_kernel(const __grid_constant__ BlockSparseCall call) {
  RESMOE_SHARED_MEMORY(shared);
  Walk<T>(call, shared).run();
}

}  // namespace resmoe::cuda::block_sparse
