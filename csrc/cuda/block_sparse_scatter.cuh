// More tokens: values are spread to dense words in shared memory and multiplied by the tensor cores, with
// weights as the M operand. block_sparse_decode.cuh says what the tasks are.
#pragma once

#include "cuda/block_sparse_decode.cuh"

namespace resmoe::cuda::block_sparse {

// A task is 16 rows, the tensor cores' M: of gate_up 8 of each half, so that the lane that has z of the gate
// has that of the up row too, or 16 where there is no gate.
template <typename T, int TokenTiles>
class Scatter : Layer {
 public:
  __device__ Scatter(const BlockSparseCall& call, uint8_t* shared)
      : Layer(call, shared, call.gated ? 8 : 16, 16),
        g_(lane_ / 4),
        q_(lane_ % 4),
        zeros_(shared_.zeros[warp_] + 128) {}

  __device__ void run() {
    at_ = {static_cast<int>(blockIdx.x), -1, warp_};
    load_down_ = is_down(at_.task);
    point_kind();
    int loads = 0;
    if (has_base_) {  // needs no routing: arrives while it is worked out
      for (; loads < kStages - 1 && at_.task < tasks_ && at_.j < words_of(load_down_); ++loads) load_base();
    }
    find_routing();
    ways_ = ways_of(routing().hits);
    first_expert_ = warp_ / ways_;
    way_ = warp_ % ways_;
    clear();
    if (at_.task < tasks_) settle();
    for (; loads < kStages - 1; ++loads) load_next();
    bool waited = false;
    for (int task = static_cast<int>(blockIdx.x); task < tasks_; task += static_cast<int>(gridDim.x)) {
      const bool down = is_down(task);
      if (down && !waited) wait_for(flag(), static_cast<uint32_t>(gate_up_tasks_));
      waited = down;
      multiply(task, down);
    }
    ptx::wait_copies<0>();
  }

 private:
  using Sums = cuda::Sums<TokenTiles>;

  // A chunk: of the base 32 columns, number j (i = -1), of expert i 4 words of every row.
  struct Chunk {
    int task, i, j;
  };

  __device__ int chunks(bool down) const { return (words_of(down) + 3) >> 2; }

  // ---- the ring

  // Where the 16-byte pieces that this lane copies lie behind the first row of a tile, and where row 8 does.
  __device__ void point_kind() {
    const int W = words_of(load_down_);
    const int n = matrix(load_down_).n;
    second_ = load_down_ || !call_.gated ? 8 : s_.I;
    const auto row_at = [&](int row) { return (row < 8 ? row : second_ + row - 8) * W; };
    mask_piece_ = row_at(lane_ % 16);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int piece = lane_ + 32 * k;
      value_piece_[k] = row_at(piece / (n / 2)) * 2 * n + piece % (n / 2) * 16;
    }
  }

  // To chunk j of expert i.
  __device__ void point() {
    const BlockSparseMatrix& m = matrix(load_down_);
    const int64_t word = row_of(load_down_, at_.i, first_of(at_.task)) * words_of(load_down_) + at_.j * 4;
    mask_ = m.mask + word;
    values_ = static_cast<const uint8_t*>(m.values) + word * (2 * m.n);
    value_bytes_ = 2 * m.n;
    step_ = load_down_ ? kWarps : ways_;
  }

  __device__ void load_base() {
    const int K = width(load_down_);
    const T* from = static_cast<const T*>(matrix(load_down_).base);
    from += static_cast<int64_t>(first_of(at_.task) + g_) * K + at_.j * 32 + q_ * 8;
    uint8_t* const slot = load_slot() + lane_ * 16;
    ptx::copy_async_16(slot, from, true);
    ptx::copy_async_16(slot + 512, from + static_cast<int64_t>(second_) * K, true);
    at_.j += kWarps;
    close_slot(true);
  }

  __device__ void load_expert() {
    const int W = words_of(load_down_);
    uint8_t* const slot = load_slot();
    if (W % 4 == 0) {
      if (lane_ < 16) ptx::copy_async_16(slot + lane_ * 16, mask_ + mask_piece_, true);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (8 * k >= value_bytes_) continue;
        ptx::copy_async_16(slot + kMaskBytes + (lane_ + 32 * k) * 16, values_ + value_piece_[k], true);
      }
    } else {  // rows that do not begin at 16 bytes: by plain loads of the words this lane will spread
      const bool there = at_.j * 4 + q_ < W;
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int64_t from = (half * second_ + g_) * static_cast<int64_t>(W) + q_;
        const int to = lane_ + 32 * half;
        *reinterpret_cast<uint32_t*>(slot + to * 4) = there ? mask_[from] : 0;
#pragma unroll 1
        for (int at = 0; at < value_bytes_; at += 8) {
          *reinterpret_cast<uint2*>(slot + kMaskBytes + to * value_bytes_ + at) =
              there ? *reinterpret_cast<const uint2*>(values_ + from * value_bytes_ + at) : uint2{0, 0};
        }
      }
    }
    at_.j += step_;
    mask_ += step_ * 4;
    values_ += step_ * 4 * value_bytes_;
    close_slot(true);
  }

  // From behind the end of a base, an expert or a task to the next chunk there is.
  __device__ void settle() {
    for (;;) {
      if (at_.i < 0) {
        if (has_base_ && at_.j < words_of(load_down_)) return;
        at_.i = load_down_ ? 0 : first_expert_;
        at_.j = load_down_ ? warp_ : way_;
      }
      while (at_.i < routing().hits && at_.j >= chunks(load_down_)) {
        at_.j = load_down_ ? at_.j - chunks(true) : way_;
        at_.i += load_down_ ? 1 : kWarps / ways_;
      }
      if (at_.i < routing().hits) {
        point();
        return;
      }
      at_ = {at_.task + static_cast<int>(gridDim.x), -1, warp_};
      if (at_.task >= tasks_) return;
      if (load_down_ != is_down(at_.task)) {
        load_down_ = true;
        point_kind();
      }
    }
  }

  __device__ void load_next() {
    if (at_.task >= tasks_) {
      close_slot(false);
    } else if (at_.i < 0) {
      load_base();
      if (at_.j >= words_of(load_down_)) settle();
    } else {
      load_expert();
      if (at_.j >= chunks(load_down_)) settle();
    }
  }

  __device__ const uint8_t* take_chunk() {
    const uint8_t* chunk = arrived();
    load_next();
    return chunk;
  }

  // ---- multiplying

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < 16; ++j) *reinterpret_cast<uint32_t*>(zeros_ + j * 128 + lane_ * 4) = 0;
  }

  // The 32 columns of a word as pairs. This lane's zeros lie 128 bytes apart, in its own bank, and are zeros
  // again at the end. Bits that are not there (-1) land in the 128 bytes before a warp's.
  template <int Kept>
  __device__ void spread(const uint8_t* chunk, int word, uint32_t (&pairs)[16]) {
    uint32_t bits = *reinterpret_cast<const uint32_t*>(chunk + word * 4);
    uint32_t values[Kept / 2];
    load_values<Kept>(chunk + kMaskBytes + word * 2 * Kept, values);
    uint8_t* const own = zeros_ + lane_ * 4;
    int at[Kept];
#pragma unroll
    for (int k = Kept - 1; k >= 0; --k) {
      const int c = take_bit(bits);
      at[k] = c * 64 - (c & 1) * 62;
      const uint32_t pair = values[k / 2];
      *reinterpret_cast<uint16_t*>(own + at[k]) = static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16);
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) pairs[j] = load_pair(own + j * 128);
#pragma unroll
    for (int k = 0; k < Kept; ++k) *reinterpret_cast<uint16_t*>(own + at[k]) = 0;
  }

  // Lane 4 g + q has word q of rows g and g + 8: all 32 columns, of which each of 8 products takes 4. The
  // order of the columns in a sum is free as long as weights and activations agree.
  template <int Kept>
  __device__ void multiply_expert(Sums& sums, const uint8_t* chunk, const uint4 (&x)[TokenTiles][4]) {
    uint32_t low[16], high[16];
    spread<Kept>(chunk, lane_, low);
    spread<Kept>(chunk, lane_ + 32, high);
#pragma unroll
    for (int four = 0; four < 4; ++four) {
      const uint4 first{low[4 * four], low[4 * four + 1], low[4 * four + 2], low[4 * four + 3]};
      const uint4 second{high[4 * four], high[4 * four + 1], high[4 * four + 2], high[4 * four + 3]};
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile)
        multiply_pair<T>(sums.of[tile], first, second, x[tile][four]);
    }
  }

  // Chunks j, j + step, ... of expert i, and the first that is not there. Activations: the 32 columns of this
  // lane's word of the token whose column it loads; x through L1, where every expert finds it again.
  __device__ int expert(bool down, int i, int j, Sums& sums) {
    const int C = chunks(down), W = words_of(down), step = down ? kWarps : ways_, n = matrix(down).n;
    const T* source[TokenTiles];
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      const int t = tile * 8 + g_;
      const T* rows = down ? wh<T>() : static_cast<const T*>(call_.x);
      const bool routed = routing().takes(i, t);
      source[tile] = routed ? rows + static_cast<int64_t>(down ? routing().pair(i, t) : t) * width(down) +
                                  (j * 4 + q_) * 32
                            : nullptr;
    }
    for (; j < C; j += step) {
      uint4 x[TokenTiles][4];
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
        x[tile][0] = x[tile][1] = x[tile][2] = x[tile][3] = uint4{0, 0, 0, 0};
        if (source[tile] != nullptr) {
          if (j * 4 + q_ < W) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
              const T* from = source[tile] + part * 8;
              x[tile][part] = down ? ptx::load_l2_16(from) : *reinterpret_cast<const uint4*>(from);
            }
          }
          source[tile] += step * 128;
        }
      }
      const uint8_t* chunk = take_chunk();
      switch (n) {
        case 4:
          multiply_expert<4>(sums, chunk, x);
          break;
        case 8:
          multiply_expert<8>(sums, chunk, x);
          break;
        case 12:
          multiply_expert<12>(sums, chunk, x);
          break;
        default:
          multiply_expert<16>(sums, chunk, x);
      }
    }
    return j;
  }

  __device__ void base(bool down, Sums& sums) {
    const int K = width(down);
    const T* source[TokenTiles];
    const T* rows = down ? sum<T>() : static_cast<const T*>(call_.x);
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      const int t = tile * 8 + g_;
      source[tile] = t < s_.T ? rows + static_cast<int64_t>(t) * K + q_ * 8 : nullptr;
    }
    const auto load = [&](int j, uint4(&x)[TokenTiles]) {
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) {
        const bool there = source[tile] != nullptr && j * 32 < K;
        x[tile] = there ? ptx::load_l2_16(source[tile] + j * 32) : uint4{0, 0, 0, 0};
      }
    };
    uint4 next[TokenTiles];
    load(warp_, next);
    for (int j = warp_; j < K / 32; j += kWarps) {
      uint4 x[TokenTiles];
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) x[tile] = next[tile];
      load(j + kWarps, next);  // on its way while this chunk is waited for
      const uint8_t* chunk = take_chunk();
      const uint4 low = ptx::load_shared_16(chunk + lane_ * 16),
                  high = ptx::load_shared_16(chunk + lane_ * 16 + 512);
#pragma unroll
      for (int tile = 0; tile < TokenTiles; ++tile) multiply_pair<T>(sums.of[tile], low, high, x[tile]);
    }
  }

  // ---- sums of all warps, in the place of their zeros

  __device__ float& part(int warp, int tile, int j) {
    return reinterpret_cast<float*>(zeros_ + (warp - warp_) * kZerosBytes)[(tile * 4 + j) * 32 + lane_];
  }
  __device__ void put(const Sums& sums) {
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) part(warp_, tile, j) = sums.of[tile][j];
    }
    __syncthreads();
  }
  __device__ float added(int tile, int j, int first, int count) {
    float sum = 0.0f;
    for (int warp = first; warp < first + count; ++warp) sum += part(warp, tile, j);
    return sum;
  }
  __device__ void add(Sums& sums, int first, int count) {
    put(sums);
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.of[tile][j] = added(tile, j, first, count);
    }
    __syncthreads();
    clear();
  }
  // The sums of all warps to store(row, token, sum), shared out among them.
  template <typename Store>
  __device__ void add_up(const Sums& sums, const Store& store) {
    put(sums);
    for (int at = warp_; at < 4 * TokenTiles; at += kWarps) {
      const int tile = at / 4, j = at % 4, t = tile * 8 + 2 * q_ + j % 2;
      const float sum = added(tile, j, 0, kWarps);
      if (t < s_.T) store(g_ + j / 2 * 8, t, sum);
    }
    __syncthreads();
    clear();
  }

  // ---- tasks

  // In gate_up the sums are an expert's, and `ways_` warps share one. In down they are all experts', whose
  // chunks are dealt to the warps.
  __device__ void multiply(int task, bool down) {
    const int first = first_of(task), C = chunks(down);
    Sums a, z, total;
    a.clear();
    total.clear();
    if (has_base_) base(down, a);
    if (has_base_ && !down) add(a, 0, kWarps);
    z = a;
    const bool shared_out = !down && ways_ > 1;  // one round: every expert has its warps
    int j = down ? warp_ : way_;
    for (int i = down ? 0 : first_expert_; i < routing().hits || shared_out; i += down ? 1 : kWarps / ways_) {
      if (!down) z.clear();
      if (i < routing().hits && j < C) j = expert(down, i, j, z);
      j = down ? j - C : way_;
      if (down) continue;
      if (shared_out) add(z, first_expert_ * ways_, ways_);
      if (i < routing().hits && way_ == 0) store_h(z, a, i, first, total);
      if (shared_out) break;
    }
    if (down) {
      add_up(z, [&](int row, int t, float sum_of_t) {
        static_cast<T*>(call_.y)[static_cast<int64_t>(t) * s_.H + first + row] = from_float<T>(sum_of_t);
      });
    } else {
      if (has_base_) {
        add_up(total, [&](int row, int t, float sum_of_t) {
          if (row < columns_)
            sum<T>()[static_cast<int64_t>(t) * s_.I + first + row] = from_float<T>(sum_of_t);
        });
      }
      publish(flag());
    }
  }

  __device__ void store_h(const Sums& z, const Sums& a, int i, int n, Sums& total) {
    const float with_base = routing().has_base[i] != 0 ? 1.0f : 0.0f;
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = g_ + j / 2 * 8, t = tile * 8 + 2 * q_ + j % 2;
        if ((call_.gated && j >= 2) || !routing().takes(i, t)) continue;
        float h = apply(call_.function, z.of[tile][j] + with_base * a.of[tile][j]);
        if (j < 2 && call_.gated) h *= z.of[tile][j + 2] + with_base * a.of[tile][j + 2];
        const int entry = routing().entry(i, t);
        h *= routing().weights[entry];
        wh<T>()[static_cast<int64_t>(routing().pairs[entry]) * s_.I + n + row] = from_float<T>(h);
        total.of[tile][j] += with_base * h;
      }
    }
  }

  const int g_, q_;
  uint8_t* const zeros_;
  int ways_ = 1, first_expert_ = 0, way_ = 0;  // of gate_up, see ways_of
  // What is loaded next.
  Chunk at_;
  bool load_down_;
  int second_, value_bytes_ = 0, step_ = 0;
  int mask_piece_, value_piece_[4];
  const uint32_t* mask_ = nullptr;
  const uint8_t* values_ = nullptr;
};

template <typename T, int TokenTiles>
__global__ void __launch_bounds__(kThreads, 1) scatter_kernel(const __grid_constant__ BlockSparseCall call) {
  RESMOE_SHARED_MEMORY(shared);
  Scatter<T, TokenTiles>(call, shared).run();
}

}  // namespace resmoe::cuda::block_sparse
