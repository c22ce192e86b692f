// The weights of a warp's tasks on their way: chunks, one behind the other across tasks and kinds, through a
// ring in shared memory. They depend on no task's results, so they arrive while a task waits.
//
// By cp.async, 16 bytes a lane, from sm_90 on too. Bulk copies would bring a row each, of 128, 64 or 32
// bytes: SASS issues those of a warp's lanes one after another, 10 instructions for each of a chunk's 16 to
// 64 rows, where a chunk takes 99 in all (sm_90a, up to 8 tokens), 37 of them for its copies.
#pragma once

#include "cuda/low_rank_chunks.cuh"
#include "cuda/low_rank_tasks.cuh"
#include "cuda/ptx.h"

namespace resmoe::cuda {

template <typename T, int Stages>
class Ring {
 public:
  __device__ __forceinline__ Ring(const LowRankCall& call, const Plan& plan, uint8_t* memory)
      : call_(call),
        s_(shape_of(call)),
        plan_(plan),
        warp_(static_cast<int>(threadIdx.x) / 32),
        lane_(static_cast<int>(threadIdx.x) % 32),
        memory_(memory) {}

  // Those of a base, if it is the first task's, need no plan: they arrive while it is made.
  __device__ __forceinline__ void load_base(Task first) {
    task_ = first;
    if (first.number >= base_tasks(call_)) return;
    point_to_strip(call_.gate_up.base, 16 * first.number, 16, s_.H);
#pragma unroll 1
    for (; loads_ < Stages - 1 && left_ > 0; ++loads_) {
      copy();
      ptx::commit_copies();
    }
  }

  // As far as the ring goes, with the plan's first task for this block.
  __device__ __forceinline__ void load_rest(Task first) {
    if (left_ <= 0) enter(loads_ == 0 ? first : task_behind());
#pragma unroll 1
    for (; loads_ < Stages - 1; ++loads_) load();
  }

  // The oldest chunk, when it has arrived; the place of the one before it is loaded anew.
  __device__ __forceinline__ const uint8_t* take() {
    ptx::wait_copies<Stages - 2>();
    __syncwarp();  // the copies of all lanes have arrived, and all lanes are done with the chunk before
    const uint8_t* const chunk = memory_ + taken_;
    taken_ = place_behind(taken_);
    load();
    return chunk;
  }

 private:
  static __device__ __forceinline__ int place_behind(int place) {
    return place + kChunkBytes == Stages * kChunkBytes ? 0 : place + kChunkBytes;
  }
  __device__ __forceinline__ Task task_behind() const {
    return task_after(task_, static_cast<int>(gridDim.x), plan_);
  }

  __device__ __forceinline__ void copy() {
    uint8_t* const to = memory_ + loaded_ + lane_ * 16;
    const T* from = from_;
#pragma unroll
    for (int j = 0; j < 4; ++j, from += apart_) ptx::copy_async_16(to + j * kQuarterBytes, from, j < copies_);
    loaded_ = place_behind(loaded_);
    from_ += step_;
    left_ -= less_;
    copies_ -= fewer_;
    if (left_ <= edge_) copies_ = 0;
  }

  __device__ __forceinline__ void load() {
    if (left_ > 0) {
      copy();
      if (left_ <= 0) move_on();
    }
    ptx::commit_copies();  // also where there is nothing left, so that groups count chunks
  }

  __device__ __forceinline__ void move_on() {
    if (task_.kind == u_gate_up || task_.kind == u_down) {
      at_.block = (plan_.rank[task_.kind == u_down][at_.i] - left_) / 32;
      at_ = settled(at_, plan_, task_.kind == u_down, warp_);
      if (at_.i < plan_.routing.hits) return point_to_ranks();
    }
    enter(task_behind());
  }

  // To this warp's first chunk in a task or in those behind it.
  __device__ __forceinline__ void enter(Task task) {
    for (task_ = task; task_.kind < kinds; task_ = task_behind()) {
      const bool down = task_.kind >= base_down;
      const LowRankMatrix& matrix = down ? call_.down : call_.gate_up;
      if (task_.kind == u_gate_up || task_.kind == u_down) {
        at_ = first_block(plan_, down, warp_);
        if (at_.i < plan_.routing.hits) point_to_ranks();
      } else if (task_.kind == v_gate_up || task_.kind == v_down) {
        const Strip strip = strip_of(plan_, down, task_.number);
        point_to_strip(matrix.v, plan_.start[down][strip.i] + strip.r, plan_.rank[down][strip.i] - strip.r,
                       down ? s_.I : s_.H);
      } else {
        point_to_strip(matrix.base, 16 * task_.number, 16, down ? s_.I : s_.H);
      }
      if (left_ > 0) return;
    }
  }

  // To 16 rows, of which there are `rows`: this warp's chunks of their K columns.
  __device__ __forceinline__ void point_to_strip(const void* matrix, int row, int rows, int K) {
    const int own_row = lane_ / 8, first = warp_ * 64;
    edge_ = strip_piece(lane_) * 8;
    from_ = static_cast<const T*>(matrix) + static_cast<int64_t>(row + own_row) * K + first + edge_;
    apart_ = int64_t{4} * K;
    step_ = kWarps * 64;
    left_ = K - first;
    less_ = kWarps * 64;
    copies_ = left_ > edge_ ? (rows - own_row + 3) / 4 : 0;
    fewer_ = 0;
  }

  // To the ranks of at_: 16 columns of either half, in down 32 that follow one another.
  __device__ __forceinline__ void point_to_ranks() {
    const bool down = task_.kind == u_down;
    const int N = down ? s_.H : s_.N, own_rank = at_.block * 32 + lane_ / 4;
    const bool is_second = lane_ % 4 >= 2;
    const int column =
        down ? 32 * task_.number + (is_second ? 16 : 0) : 16 * task_.number + (is_second ? s_.I : 0);
    from_ = static_cast<const T*>(down ? call_.down.u : call_.gate_up.u) +
            static_cast<int64_t>(plan_.start[down][at_.i] + own_rank) * N + column + lane_ % 2 * 8;
    apart_ = int64_t{8} * N;
    const int blocks = down ? kWarps : plan_.ways;  // from one of this warp to its next
    step_ = int64_t{32} * blocks * N;
    left_ = plan_.rank[down][at_.i] - at_.block * 32;
    less_ = 32 * blocks;
    copies_ = is_second && !down && !call_.gated ? 0 : (left_ - lane_ / 4 + 7) / 8;
    fewer_ = 4 * blocks;
    edge_ = 0;
  }

  const LowRankCall& call_;
  const Shape s_;
  const Plan& plan_;
  const int warp_, lane_;
  uint8_t* const memory_;
  int loads_ = 0, loaded_ = 0, taken_ = 0;  // the latter two as places in memory_
  // The chunks to copy next: of task_, and where that has ranks, of at_.
  Task task_{};
  RankBlock at_{};
  const T* from_ = nullptr;  // what this lane copies to the first quarter
  int64_t apart_ = 0;        // from there to what it copies to the next
  int copies_ = 0;           // how many quarters get something, the others zeros
  int left_ = 0;             // columns of the strip, or ranks of the expert
  int edge_ = 0;             // so many columns are left where this lane has none any more
  int64_t step_ = 0;         // what from_, left_ and copies_ change by from a chunk to the next
  int less_ = 0, fewer_ = 0;
};

}  // namespace resmoe::cuda
