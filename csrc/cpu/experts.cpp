#include "../experts.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "arena.h"
#include "matrix.h"
#include "phases.h"
#include "routing.h"

namespace resmoe {
namespace {

// Tokens that are worked on at once: their sums for one panel (128 KiB) stay in the second-level cache.
constexpr int64_t kMaxTokens = 512;

enum Phase { shrink, gate_up, shrink_down, down, kPhases };

// The call on at most kMaxTokens tokens, its intermediate results and its tasks.
class Layer {
 public:
  Layer(const PackedHeader& header, const ExpertsCall& call, const Kernels& kernels, int64_t threads)
      : header_(header),
        call_(call),
        kernels_(kernels),
        gate_up_(header, header.gate_up),
        down_(header, header.down),
        group_of_(header.group == 0 ? nullptr
                                    : reinterpret_cast<const int32_t*>(
                                          reinterpret_cast<const std::byte*>(&header) + header.group)),
        routing_(call.index_is_64 ? route(static_cast<const int64_t*>(call.top_k_index), call.top_k_weights,
                                          call.tokens, call.top_k, header.experts, group_of_)
                                  : route(static_cast<const int32_t*>(call.top_k_index), call.top_k_weights,
                                          call.tokens, call.top_k, header.experts, group_of_)),
        columns_a_task_(header.gated != 0 ? kPanelTiles / 2 : kPanelTiles),
        threads_(threads),
        tasks_(count_tasks()),
        phases_(tasks_) {
    plan(threads);
  }

  void work() {
    const Scratch scratch = take_scratch();
    phases_.work(
        [&](int phase, int64_t task) {
          switch (phase) {
            case shrink:
              return run_shrink(gate_up_, task, x_of_pairs(), z_low_, scratch);
            case gate_up:
              return run_gate_up(task, scratch);
            case shrink_down:
              return run_shrink(down_, task, h_rows_.data(), y_low_, scratch);
            default:
              return run_down(task, scratch);
          }
        },
        [&](int phase, int64_t task, int64_t n) { return fetch_for(phase, task, n); });
  }

 private:
  struct ShrinkTask {
    int64_t expert, first_tile;  // expert: place in routing_.experts
  };
  struct Scratch {
    float *a, *z, *sum;
    void** rows;
    float** out;
    float** sums;
    std::byte* multiply;
  };

  std::array<int64_t, kPhases> count_tasks() {
    for (size_t i = 0; i < 2; ++i) {
      const Matrix& matrix = i == 0 ? gate_up_ : down_;
      for (size_t e = 0; e < routing_.experts.size(); ++e)
        for (int64_t tile = 0; tile < tiles_of(matrix.rank(routing_.experts[e].id)); tile += kPanelTiles)
          shrink_tasks_[i].push_back({static_cast<int64_t>(e), tile});
    }
    const auto over = [](int64_t tiles, int64_t a_task) { return (tiles + a_task - 1) / a_task; };
    return {static_cast<int64_t>(shrink_tasks_[0].size()),
            routing_.pairs() == 0 ? 0 : over(header_.gate_up.half_tiles, columns_a_task_),
            static_cast<int64_t>(shrink_tasks_[1].size()), over(header_.down.half_tiles, kPanelTiles)};
  }

  // Lays out the intermediate results, and fills the tables of row addresses.
  void plan(int64_t threads) {
    const int64_t element = kernels_.operand == Operand::bfloat16 ? 2 : 4;
    const int64_t pairs = routing_.pairs(), items = routing_.items();
    int64_t rank[2] = {0, 0}, rows = 0;
    for (const Routing::Expert& expert : routing_.experts) {
      rank[0] = std::max(rank[0], gate_up_.rank(expert.id));
      rank[1] = std::max(rank[1], down_.rank(expert.id));
      rows = std::max(rows, expert.pairs_end - expert.pairs_begin);
    }
    for (const Routing::Group& group : routing_.groups)
      rows = std::max(rows, group.items_end - group.items_begin);
    rows = std::max(rows, call_.tokens);

    const auto plan_rows = [&](Operands& operands, int64_t count, int64_t columns) {
      operands.element = element;
      operands.row_bytes = rounded_up(columns, kOperandPad) * element;
      return arena_.plan<std::byte>(count * operands.row_bytes);
    };
    const bool x_as_it_is =
        call_.dtype == (element == 2 ? Dtype::bfloat16 : Dtype::float32) && header_.hidden % kOperandPad == 0;
    const int64_t x_at = plan_rows(x_, x_as_it_is ? 0 : call_.tokens, header_.hidden);
    const int64_t z_low_at = plan_rows(z_low_, pairs, rank[0]);
    const int64_t h_at = plan_rows(h_, pairs, header_.intermediate);
    const int64_t h_sum_at = plan_rows(h_sum_, down_.has_base() ? items : 0, header_.intermediate);
    const int64_t y_low_at = plan_rows(y_low_, pairs, rank[1]);

    scratch_.a = arena_.plan<float>(rows * kPanelRows);
    scratch_.z = arena_.plan<float>(rows * kPanelRows);
    scratch_.sum = arena_.plan<float>(rows * kPanelRows);
    scratch_.rows = arena_.plan<void*>(rows);
    scratch_.out = arena_.plan<float*>(rows);
    scratch_.sums = arena_.plan<float*>(rows);
    scratch_.multiply = arena_.plan<std::byte>(kernels_.multiply_scratch);
    scratch_.bytes = arena_.plan<std::byte>(0) - scratch_.a;
    arena_.plan<std::byte>((threads - 1) * scratch_.bytes);
    arena_.allocate();

    if (x_as_it_is) {
      x_.rows = const_cast<std::byte*>(static_cast<const std::byte*>(call_.x));  // only read
      x_.row_bytes = call_.x_stride * element;
    } else {
      x_.rows = arena_.at(x_at);
      for (int64_t t = 0; t < call_.tokens; ++t) {
        const auto* from = static_cast<const std::byte*>(call_.x) + t * call_.x_stride * size_of(call_.dtype);
        kernels_.load(call_.dtype, from, x_.row(t), header_.hidden);
        clear(x_, t, header_.hidden);
      }
    }
    z_low_.rows = arena_.at(z_low_at);
    h_.rows = arena_.at(h_at);
    h_sum_.rows = arena_.at(h_sum_at);
    y_low_.rows = arena_.at(y_low_at);
    x_rows_.resize(static_cast<size_t>(pairs));
    h_rows_.resize(static_cast<size_t>(pairs));
    for (size_t p = 0; p < x_rows_.size(); ++p) {
      x_rows_[p] = x_.row(routing_.pair_token[p]);
      h_rows_[p] = h_.row(static_cast<int64_t>(p));
    }
  }

  Scratch take_scratch() {
    const int64_t at = scratch_.bytes * taken_.fetch_add(1, std::memory_order_relaxed);
    const auto part = [&](int64_t offset) { return arena_.at(offset + at); };
    return {reinterpret_cast<float*>(part(scratch_.a)),
            reinterpret_cast<float*>(part(scratch_.z)),
            reinterpret_cast<float*>(part(scratch_.sum)),
            reinterpret_cast<void**>(part(scratch_.rows)),
            reinterpret_cast<float**>(part(scratch_.out)),
            reinterpret_cast<float**>(part(scratch_.sums)),
            part(scratch_.multiply)};
  }

  const void* const* x_of_pairs() const { return x_rows_.data(); }

  // ---- panels in the order in which they are multiplied, so that the next one can be fetched in time

  int64_t tiles_of_task(int64_t task) const {
    return std::min(columns_a_task_, header_.gate_up.half_tiles - task * columns_a_task_);
  }
  Panel gate_up_of_group(size_t group, int64_t task) const {
    const Routing::Group& g = routing_.groups[group];
    if (g.id >= 0) return gate_up_.base(g.id, task * columns_a_task_, tiles_of_task(task));
    return residual(gate_up_, g.experts_begin, task * columns_a_task_, tiles_of_task(task));
  }
  Panel down_of_group(size_t group, int64_t task) const {
    const int64_t first = task * kPanelTiles, tiles = std::min(kPanelTiles, header_.down.half_tiles - first);
    if (routing_.groups[group].id >= 0) return down_.base(routing_.groups[group].id, first, tiles);
    return residual(down_, routing_.groups[group].experts_begin, first, tiles);
  }
  // Whether a group's base is added to its experts' sparse residuals as they are expanded, and not multiplied
  // on its own: pays where its tokens are many for the experts they hit.
  bool onto_base(const Matrix& matrix, const Routing::Group& group) const {
    const int64_t saved = group.items_end - group.items_begin;
    const int64_t cost = kernels_.base_cost * (group.experts_end - group.experts_begin);
    return group.id >= 0 && matrix.is_sparse() && !matrix.has_coded_base() && kernels_.base_cost > 0 &&
           saved > cost;
  }
  // The first of an expert's residuals; empty where it has none.
  Panel residual(const Matrix& matrix, int64_t expert, int64_t first, int64_t tiles) const {
    const int32_t id = routing_.experts[static_cast<size_t>(expert)].id;
    if (matrix.rank(id) > 0) return matrix.u(id, first, tiles);
    if (matrix.is_sparse()) return matrix.sparse(id, first, tiles);
    return matrix.is_full() ? matrix.full(id, first, tiles) : Panel{};
  }
  // The first panel of a task, or of the first task of a later phase where the phase has no such task.
  Panel first_panel(int phase, int64_t task) const {
    for (; phase < kPhases; ++phase, task = 0) {
      if (task >= tasks_[static_cast<size_t>(phase)]) continue;
      if (phase == gate_up) return gate_up_of_group(0, task);
      if (phase == down) return routing_.groups.empty() ? Panel{} : down_of_group(0, task);
      const ShrinkTask& shrinking = shrink_tasks_[phase == shrink ? 0 : 1][static_cast<size_t>(task)];
      const int32_t id = routing_.experts[static_cast<size_t>(shrinking.expert)].id;
      return (phase == shrink ? gate_up_ : down_).v(id, shrinking.first_tile);
    }
    return {};
  }
  // The panel that this thread will most likely begin its next task with.
  Panel panel_after(int phase, int64_t task) const { return first_panel(phase, task + threads_); }

  // Fetches the n-th kilobyte of every tile of a task's first panel; false past 64 KiB a tile or the end.
  bool fetch_for(int phase, int64_t task, int64_t n) const {
    const Panel panel = first_panel(phase, task);
    if (n >= 64 || n * 1024 >= panel.tile_bytes) return false;
    for (int64_t j = 0; j < panel.tiles; ++j)
      for (int64_t b = 0; b < 1024; b += 64) __builtin_prefetch(panel.values[j] + n * 1024 + b, 0, 2);
    return true;
  }

  // Zeroes what lies behind the last column of a row: operands meet the padding of weights, and 0 * NaN is
  // NaN.
  void clear(const Operands& operands, int64_t row, int64_t columns) const {
    std::memset(operands.at(row, columns), 0,
                static_cast<size_t>(operands.row_bytes - columns * operands.element));
  }

  // low[pair] = V_e row[pair] for one expert and up to 64 of its ranks, times the scales of a coded U_e.
  void run_shrink(const Matrix& matrix, int64_t number, const void* const* rows, const Operands& low,
                  const Scratch& scratch) const {
    const int phase = &matrix == &gate_up_ ? shrink : shrink_down;
    const ShrinkTask& task = shrink_tasks_[phase == shrink ? 0 : 1][static_cast<size_t>(number)];
    const Routing::Expert& expert = routing_.experts[static_cast<size_t>(task.expert)];
    const Panel panel = matrix.v(expert.id, task.first_tile), next = panel_after(phase, number);
    const int64_t m = expert.pairs_end - expert.pairs_begin, rank = matrix.rank(expert.id);
    std::memset(scratch.a, 0, static_cast<size_t>(m * kPanelRows) * sizeof(float));
    for (int64_t i = 0; i < m; ++i) scratch.out[i] = scratch.a + i * kPanelRows;
    kernels_.multiply(panel, rows + expert.pairs_begin, scratch.out, m, &next, scratch.multiply);
    const int64_t column = kTileRows * task.first_tile;
    const int64_t n = std::min(kTileRows * panel.tiles, rank - column);
    const uint16_t* const scales = matrix.u_scales(expert.id);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t pair = expert.pairs_begin + i;
      for (int64_t c = 0; scales != nullptr && c < n; ++c)
        scratch.out[i][c] *= std::bit_cast<float>(uint32_t{scales[column + c]} << 16);
      kernels_.to_operand(scratch.out[i], low.at(pair, column), n);
      if (column + n == rank) clear(low, pair, rank);
    }
  }

  // h and sum w h of all pairs, for up to 32 columns of I (64 without a gate).
  void run_gate_up(int64_t task, const Scratch& scratch) const {
    const int64_t first = task * columns_a_task_;
    const int64_t tiles = tiles_of_task(task);
    const int64_t n = kTileRows * tiles, column = kTileRows * first;
    const int64_t kept = std::min(n, header_.intermediate - column);
    const bool last = column + kept == header_.intermediate;
    const int64_t width = n * header_.gate_up.halves;  // of a row of a and z

    for (size_t g = 0; g < routing_.groups.size(); ++g) {
      const Routing::Group& group = routing_.groups[g];
      const int64_t items = group.items_end - group.items_begin;
      const Panel after_group =
          g + 1 < routing_.groups.size() ? gate_up_of_group(g + 1, task) : panel_after(gate_up, task);
      const bool with_base = group.id >= 0 && !onto_base(gate_up_, group);
      std::memset(scratch.a, 0, static_cast<size_t>(items * width) * sizeof(float));
      std::memset(scratch.sum, 0, static_cast<size_t>(items * n) * sizeof(float));
      if (with_base) {
        const Panel first_residual = residual(gate_up_, group.experts_begin, first, tiles);
        const Panel* next = first_residual.tiles > 0 ? &first_residual : &after_group;
        for (int64_t i = 0; i < items; ++i) {
          scratch.rows[i] = x_.row(routing_.item_token[static_cast<size_t>(group.items_begin + i)]);
          scratch.out[i] = scratch.a + i * width;
        }
        kernels_.multiply(gate_up_.base(group.id, first, tiles), scratch.rows, scratch.out, items, next,
                          scratch.multiply);
      }
      for (int64_t e = group.experts_begin; e < group.experts_end; ++e) {
        const bool last_expert = e + 1 == group.experts_end;
        const Panel next = last_expert ? after_group : residual(gate_up_, e + 1, first, tiles);
        run_gate_up_expert(routing_.experts[static_cast<size_t>(e)], group, first, tiles, next, scratch);
      }
      if (group.id < 0 || onto_base(down_, group)) continue;  // no one reads sum w h
      for (int64_t i = 0; i < items; ++i) {
        kernels_.to_operand(scratch.sum + i * n, h_sum_.at(group.items_begin + i, column), kept);
        if (last) clear(h_sum_, group.items_begin + i, header_.intermediate);
      }
    }
  }

  void run_gate_up_expert(const Routing::Expert& expert, const Routing::Group& group, int64_t first,
                          int64_t tiles, const Panel& next, const Scratch& scratch) const {
    const int64_t m = expert.pairs_end - expert.pairs_begin, begin = expert.pairs_begin;
    const int64_t n = kTileRows * tiles, width = n * header_.gate_up.halves, column = kTileRows * first;
    for (int64_t i = 0; i < m; ++i) {
      const int64_t item = routing_.pair_item[static_cast<size_t>(begin + i)];
      float* z = scratch.out[i] = scratch.z + i * width;
      std::memcpy(z, scratch.a + item * width, static_cast<size_t>(width) * sizeof(float));
      for (int64_t half = 0; half < header_.gate_up.halves; ++half) {
        const float* bias = gate_up_.bias(expert.id, half * header_.gate_up.half_tiles + first);
        for (int64_t c = 0; bias != nullptr && c < n; ++c) z[half * n + c] += bias[c];
      }
    }
    if (gate_up_.rank(expert.id) > 0) {
      for (int64_t i = 0; i < m; ++i) scratch.rows[i] = z_low_.row(begin + i);
      kernels_.multiply(gate_up_.u(expert.id, first, tiles), scratch.rows, scratch.out, m, &next,
                        scratch.multiply);
    }
    if (gate_up_.is_sparse())
      kernels_.multiply(gate_up_.sparse(expert.id, first, tiles, onto_base(gate_up_, group) ? group.id : -1),
                        x_of_pairs() + begin, scratch.out, m, &next, scratch.multiply);
    if (gate_up_.is_full())
      kernels_.multiply(gate_up_.full(expert.id, first, tiles), x_of_pairs() + begin, scratch.out, m, &next,
                        scratch.multiply);
    for (int64_t i = 0; i < m; ++i) {
      scratch.rows[i] = h_.at(begin + i, column);
      scratch.sums[i] = scratch.sum + routing_.pair_item[static_cast<size_t>(begin + i)] * n;
    }
    kernels_.activate(call_.activation, header_.gated != 0, scratch.z, width,
                      &routing_.pair_weight[static_cast<size_t>(begin)], scratch.rows,
                      group.id >= 0 && !onto_base(down_, group) ? scratch.sums : nullptr, m, n);
    if (column + n >= header_.intermediate)
      for (int64_t i = 0; i < m; ++i) clear(h_, begin + i, header_.intermediate);
  }

  // y of all tokens, for up to 64 columns of H.
  void run_down(int64_t task, const Scratch& scratch) const {
    const int64_t first = task * kPanelTiles;
    const int64_t tiles = std::min(kPanelTiles, header_.down.half_tiles - first);
    const int64_t n = kTileRows * tiles, column = kTileRows * first;
    const int64_t kept = std::min(n, header_.hidden - column);
    float* const y = scratch.a;
    std::memset(y, 0, static_cast<size_t>(call_.tokens * n) * sizeof(float));

    const Panel after_task = panel_after(down, task);
    for (size_t g = 0; g < routing_.groups.size(); ++g) {
      const Routing::Group& group = routing_.groups[g];
      const Panel after_group = g + 1 < routing_.groups.size() ? down_of_group(g + 1, task) : after_task;
      if (group.id >= 0 && !onto_base(down_, group)) {
        const int64_t items = group.items_end - group.items_begin;
        for (int64_t i = 0; i < items; ++i) {
          scratch.rows[i] = h_sum_.row(group.items_begin + i);
          scratch.out[i] = y + routing_.item_token[static_cast<size_t>(group.items_begin + i)] * n;
        }
        const Panel first_residual = residual(down_, group.experts_begin, first, tiles);
        const Panel& next = first_residual.tiles > 0 ? first_residual : after_group;
        kernels_.multiply(down_.base(group.id, first, tiles), scratch.rows, scratch.out, items, &next,
                          scratch.multiply);
      }
      for (int64_t e = group.experts_begin; e < group.experts_end; ++e) {
        const Panel next = e + 1 < group.experts_end ? residual(down_, e + 1, first, tiles) : after_group;
        run_down_expert(routing_.experts[static_cast<size_t>(e)], group, first, tiles, next, y, scratch);
      }
    }
    auto* to = static_cast<std::byte*>(call_.y);
    for (int64_t t = 0; t < call_.tokens; ++t)
      kernels_.store(call_.dtype, y + t * n, to + (t * header_.hidden + column) * size_of(call_.dtype), kept);
  }

  void run_down_expert(const Routing::Expert& expert, const Routing::Group& group, int64_t first,
                       int64_t tiles, const Panel& next, float* y, const Scratch& scratch) const {
    const int64_t m = expert.pairs_end - expert.pairs_begin, begin = expert.pairs_begin,
                  n = kTileRows * tiles;
    const float* bias = down_.bias(expert.id, first);
    for (int64_t i = 0; i < m; ++i) {
      scratch.rows[i] = y_low_.row(begin + i);
      scratch.out[i] = y + routing_.pair_token[static_cast<size_t>(begin + i)] * n;
      const float weight = routing_.pair_weight[static_cast<size_t>(begin + i)];
      for (int64_t c = 0; bias != nullptr && c < n; ++c) scratch.out[i][c] += weight * bias[c];
    }
    if (down_.rank(expert.id) > 0)
      kernels_.multiply(down_.u(expert.id, first, tiles), scratch.rows, scratch.out, m, &next,
                        scratch.multiply);
    if (down_.is_sparse()) {
      const Panel panel = down_.sparse(expert.id, first, tiles, onto_base(down_, group) ? group.id : -1);
      kernels_.multiply(panel, h_rows_.data() + begin, scratch.out, m, &next, scratch.multiply);
    }
    if (down_.is_full())
      kernels_.multiply(down_.full(expert.id, first, tiles), h_rows_.data() + begin, scratch.out, m, &next,
                        scratch.multiply);
  }

  const PackedHeader& header_;
  const ExpertsCall& call_;
  const Kernels& kernels_;
  const Matrix gate_up_, down_;
  const int32_t* const group_of_;
  const Routing routing_;
  const int64_t columns_a_task_;  // tiles of a half of gate_up in one task
  const int64_t threads_;
  std::vector<ShrinkTask> shrink_tasks_[2];
  const std::array<int64_t, kPhases> tasks_;
  Phases<kPhases> phases_;
  Arena arena_;
  Operands x_, z_low_, h_, h_sum_, y_low_;
  std::vector<const void*> x_rows_, h_rows_;  // of pairs
  struct {
    int64_t a, z, sum, rows, out, sums, multiply, bytes;
  } scratch_{};
  std::atomic<int64_t> taken_{0};
};

}  // namespace

void experts_packed(const PackedHeader& layer, const ExpertsCall& call, const Kernels& kernels,
                    int64_t threads, Parallel parallel) {
  const int64_t chunks = (call.tokens + kMaxTokens - 1) / kMaxTokens;
  for (int64_t c = 0, begin = 0; c < chunks; ++c) {
    ExpertsCall part = call;
    part.tokens = call.tokens / chunks + (c < call.tokens % chunks);
    const auto shifted = [](const void* from, int64_t bytes) {
      return static_cast<const void*>(static_cast<const std::byte*>(from) + bytes);
    };
    part.x = shifted(call.x, begin * call.x_stride * size_of(call.dtype));
    part.top_k_index = shifted(call.top_k_index, begin * call.top_k * (call.index_is_64 ? 8 : 4));
    part.top_k_weights = call.top_k_weights + begin * call.top_k;
    part.y = static_cast<std::byte*>(call.y) + begin * layer.hidden * size_of(call.dtype);
    Layer whole(layer, part, kernels, threads);
    parallel(threads, [](void* work) { static_cast<Layer*>(work)->work(); }, &whole);
    begin += part.tokens;
  }
}

}  // namespace resmoe
