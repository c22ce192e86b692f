// The tasks of low_rank_decode.cuh, and what of each a warp multiplies. Every block works out the same.
#pragma once

#include "cuda/decode_block.cuh"
#include "cuda/low_rank_decode.h"
#include "cuda/routing.cuh"

namespace resmoe::cuda {

enum Kind { base_gate_up, v_gate_up, u_gate_up, base_down, v_down, u_down, kinds };

struct Task {
  int kind, number;  // number within its kind
};

struct Plan {
  Routing routing;
  int32_t ways, at_once;        // see ways_of; how many experts the warps of u_gate_up have at once
  int32_t tasks[kinds];         // how many there are of each kind
  int32_t start[2][kMaxPairs];  // an expert's first rank, of gate_up and of down
  int32_t rank[2][kMaxPairs];
  int32_t strips_before[2][kMaxPairs + 1];  // 16-rank strips of the experts before it
};

__device__ __forceinline__ int base_tasks(const LowRankCall& call) {
  return call.gate_up.base == nullptr ? 0 : (call.gated ? 2 : 1) * call.inner / 16;
}

// By all threads, who may read the plan then.
__device__ inline void find_plan(const LowRankCall& call, RoutingScratch& scratch, Plan& plan) {
  find_experts(call, scratch, plan.routing);
  find_pairs(call, scratch, plan.routing);
  const int hits = plan.routing.hits, m = static_cast<int>(threadIdx.x) / 32,
            lane = static_cast<int>(threadIdx.x) % 32;
  if (m < 2) {
    const int32_t* const offsets = m == 0 ? call.gate_up.rank_offsets : call.down.rank_offsets;
    for (int i = lane; i < hits; i += 32) {
      const int e = plan.routing.expert[i];
      plan.start[m][i] = offsets == nullptr ? 0 : offsets[e];
      plan.rank[m][i] = offsets == nullptr ? 0 : offsets[e + 1] - offsets[e];
    }
    __syncwarp();
    add_up_before(plan.strips_before[m], hits, [&](int i) { return (plan.rank[m][i] + 15) / 16; });
    if (lane == 0) {
      if (m == 0) {
        plan.ways = ways_of(hits);
        plan.at_once = kWarps / plan.ways;
        plan.tasks[base_gate_up] = base_tasks(call);
        plan.tasks[v_gate_up] = plan.strips_before[0][hits];
        plan.tasks[u_gate_up] = call.inner / 16;
      } else {
        plan.tasks[base_down] = call.gate_up.base == nullptr ? 0 : call.hidden / 16;
        plan.tasks[v_down] = plan.strips_before[1][hits];
        plan.tasks[u_down] = call.hidden / 32;
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ Task task_after(Task task, int step, const Plan& plan) {
  task.number += step;
  while (task.kind < kinds && task.number >= plan.tasks[task.kind]) {
    task.number -= plan.tasks[task.kind];
    ++task.kind;
  }
  return task;
}

// ---- tasks of v_gate_up and v_down

// 16 ranks of expert i from r on, or as many as it has.
struct Strip {
  int i, r;
};

__device__ __forceinline__ Strip strip_of(const Plan& plan, int m, int number) {
  int low = 0, high = plan.routing.hits - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (plan.strips_before[m][middle] <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return {low, (number - plan.strips_before[m][low]) * 16};
}

// ---- tasks of u_gate_up and u_down

// 32 ranks of expert i, from 32 block on. In gate_up a warp has its experts' blocks, in down all experts'
// blocks are dealt to the warps.
struct RankBlock {
  int i, block;
};

// From behind an expert's end to where there is a block, or behind the last expert.
__device__ __forceinline__ RankBlock settled(RankBlock at, const Plan& plan, int m, int warp) {
  while (at.i < plan.routing.hits) {
    const int blocks = (plan.rank[m][at.i] + 31) / 32;
    if (at.block < blocks) break;
    at.block = m == 0 ? warp & (plan.ways - 1) : at.block - blocks;
    at.i += m == 0 ? plan.at_once : 1;
  }
  return at;
}

__device__ __forceinline__ RankBlock first_block(const Plan& plan, int m, int warp) {
  return settled(
      m == 0 ? RankBlock{warp * plan.at_once / kWarps, warp & (plan.ways - 1)} : RankBlock{0, warp}, plan, m,
      warp);
}

__device__ __forceinline__ RankBlock next_block(RankBlock at, const Plan& plan, int m, int warp) {
  return settled({at.i, at.block + (m == 0 ? plan.ways : kWarps)}, plan, m, warp);
}

}  // namespace resmoe::cuda
