// A layer of random low-rank experts and a call of it: the memory a kernel is given, and what must come out.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/low_rank_decode.cuh"
#include "plain_activation.h"

inline float bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

struct Case {
  enum Routing { random, one_expert, in_turns, skipping, nothing, twice, every };

  int tokens = 5, top_k = 3, experts = 6, hidden = 64, inner = 48;
  bool gated = true, has_base = true;
  std::vector<int> group{0, 0, 0, 0, 0, 0};
  std::vector<int> ranks_gate_up{16, 16, 32, 48, 16, 32}, ranks_down{16, 32, 16, 16, 48, 16};
  Routing routing = random;
  resmoe::cuda::Function function = resmoe::cuda::Function::silu;

  int rows() const { return (gated ? 2 : 1) * inner; }

  // The expert of each (token, slot); anything outside [0, experts) skips it.
  std::vector<int64_t> index() const {
    std::mt19937 generator(7);
    const int64_t outside[] = {-1, int64_t{1} << 32, -(int64_t{1} << 33)};
    std::vector<int64_t> chosen;
    for (int t = 0; t < tokens; ++t) {
      for (int j = 0; j < top_k; ++j) {
        const auto any = static_cast<int64_t>(generator() % static_cast<unsigned>(experts));
        switch (routing) {
          case random:
            chosen.push_back((any / 2 * 2 + j) % experts);
            break;
          case one_expert:
            chosen.push_back(experts - 1);
            break;
          case in_turns:
            chosen.push_back((2 * t + 1) % experts);
            break;
          case skipping:
            chosen.push_back((t + j) % 3 == 0 ? outside[t % 3] : any);
            break;
          case nothing:
            chosen.push_back(experts + t);
            break;
          case twice:
            chosen.push_back(j == 1 ? any : t % experts);
            break;
          case every:
            chosen.push_back(experts - 1 - t * top_k - j);
            break;
        }
      }
    }
    return chosen;
  }

  std::vector<float> weights() const {
    std::mt19937 generator(8);
    std::uniform_real_distribution<float> uniform(0.1F, 1.0F);
    std::vector<float> w(static_cast<size_t>(tokens * top_k));
    for (float& value : w) value = uniform(generator);
    return w;
  }

  std::vector<double> expected() const;
};

// Tensors of a case, filled with values that are the same in every run.
struct Memory {
  std::vector<uint16_t> x, base_gate_up, base_down, u_gate_up, v_gate_up, u_down, v_down, y;
  std::vector<int32_t> group, offsets_gate_up, offsets_down;
  std::vector<int64_t> index;
  std::vector<float> weights;
  std::vector<uint8_t> workspace_memory;
  struct {
    uint8_t* begin;
    uint8_t* data() const { return begin; }
  } workspace{};
  resmoe::cuda::LowRankCall call{};

  explicit Memory(const Case& c);
  Memory(const Memory&) = delete;
};

inline std::vector<uint16_t> normal(std::mt19937& generator, int rows, int columns, double scale) {
  std::normal_distribution<double> distribution(0.0, scale);
  std::vector<uint16_t> values(static_cast<size_t>(rows) * static_cast<size_t>(columns));
  for (uint16_t& value : values) value = to_bfloat16(static_cast<float>(distribution(generator)));
  return values;
}

inline Memory::Memory(const Case& c) : index(c.index()), weights(c.weights()) {
  std::mt19937 generator(20251206);
  const int N = c.rows(), H = c.hidden, I = c.inner;
  const auto sum = [](const std::vector<int>& ranks) {
    int total = 0;
    for (const int rank : ranks) total += rank;
    return total;
  };
  const auto offsets = [](const std::vector<int>& ranks) {
    std::vector<int32_t> ends{0};
    for (const int rank : ranks) ends.push_back(ends.back() + rank);
    return ends;
  };
  x = normal(generator, c.tokens, H, 1.0);
  base_gate_up = normal(generator, N, H, 1 / std::sqrt(H));
  base_down = normal(generator, H, I, 1 / std::sqrt(I));
  u_gate_up = normal(generator, sum(c.ranks_gate_up), N, 0.5);
  v_gate_up = normal(generator, sum(c.ranks_gate_up), H, 1 / std::sqrt(H));
  u_down = normal(generator, sum(c.ranks_down), H, 0.5);
  v_down = normal(generator, sum(c.ranks_down), I, 1 / std::sqrt(I));
  offsets_gate_up = offsets(c.ranks_gate_up);
  offsets_down = offsets(c.ranks_down);
  for (int e = 0; e < c.experts; ++e) {  // NaN: nothing may come of experts that are not hit
    if (std::find(index.begin(), index.end(), e) != index.end()) continue;
    const auto forget = [e](std::vector<uint16_t>& matrix, const std::vector<int32_t>& ends, int width) {
      if (ends.size() == 1) return;
      const auto at = static_cast<size_t>(e);
      std::fill(matrix.begin() + ends[at] * width, matrix.begin() + ends[at + 1] * width, uint16_t{0xFFFF});
    };
    forget(u_gate_up, offsets_gate_up, N);
    forget(v_gate_up, offsets_gate_up, H);
    forget(u_down, offsets_down, H);
    forget(v_down, offsets_down, I);
  }
  group.assign(c.group.begin(), c.group.end());
  y.resize(static_cast<size_t>(c.tokens) * static_cast<size_t>(H));
  const auto matrix = [&](const std::vector<uint16_t>& base, const std::vector<uint16_t>& u,
                          const std::vector<uint16_t>& v, const std::vector<int32_t>& ends) {
    const bool has_rank = ends.size() > 1;
    return resmoe::cuda::LowRankMatrix{c.has_base ? base.data() : nullptr, has_rank ? u.data() : nullptr,
                                       has_rank ? v.data() : nullptr, has_rank ? ends.data() : nullptr,
                                       ends.back()};
  };
  call.element = resmoe::cuda::Element::bfloat16;
  call.x = x.data();
  call.top_k_index = index.data();
  call.index_is_64 = true;
  call.top_k_weights = weights.data();
  call.weights_type = resmoe::cuda::Real::float32;
  call.tokens = c.tokens;
  call.top_k = c.top_k;
  call.experts = c.experts;
  call.hidden = H;
  call.inner = I;
  call.gated = c.gated;
  call.function = c.function;
  call.group = c.has_base ? group.data() : nullptr;
  call.gate_up = matrix(base_gate_up, u_gate_up, v_gate_up, offsets_gate_up);
  call.down = matrix(base_down, u_down, v_down, offsets_down);
  workspace_memory.assign(resmoe::cuda::workspace_of(call).bytes + 256, 0xFF);  // NaN until it is written
  const auto address = reinterpret_cast<uintptr_t>(workspace_memory.data());
  workspace.begin = workspace_memory.data() + (256 - address % 256) % 256;
  call.workspace = workspace.begin;
  call.y = y.data();
}

inline std::vector<double> Case::expected() const {
  const Memory m(*this);
  const auto product = [&](const std::vector<uint16_t>& base, const std::vector<uint16_t>& u,
                           const std::vector<uint16_t>& v, const std::vector<int32_t>& ends, int e, int N,
                           int K, const std::vector<double>& from) {
    std::vector<double> out(static_cast<size_t>(N));
    const auto dot = [&](const std::vector<uint16_t>& matrix, int row) {
      double sum = 0;
      for (int k = 0; k < K; ++k)
        sum += bfloat16(matrix[static_cast<size_t>(row * K + k)]) * from[static_cast<size_t>(k)];
      return sum;
    };
    if (has_base && group[static_cast<size_t>(e)] >= 0) {
      for (int n = 0; n < N; ++n) out[static_cast<size_t>(n)] = dot(base, n);
    }
    const auto expert = static_cast<size_t>(e);
    for (int r = ends.size() > 1 ? ends[expert] : 0; r < (ends.size() > 1 ? ends[expert + 1] : 0); ++r) {
      const double c = dot(v, r);
      for (int n = 0; n < N; ++n)
        out[static_cast<size_t>(n)] += bfloat16(u[static_cast<size_t>(r * N + n)]) * c;
    }
    return out;
  };
  std::vector<double> y(m.y.size());
  for (int t = 0; t < tokens; ++t) {
    std::vector<double> token;
    for (int k = 0; k < hidden; ++k) token.push_back(bfloat16(m.x[static_cast<size_t>(t * hidden + k)]));
    for (int j = 0; j < top_k; ++j) {
      const int64_t id = m.index[static_cast<size_t>(t * top_k + j)];
      if (id < 0 || id >= experts) continue;
      const int e = static_cast<int>(id);
      const auto z =
          product(m.base_gate_up, m.u_gate_up, m.v_gate_up, m.offsets_gate_up, e, rows(), hidden, token);
      std::vector<double> h;
      for (int n = 0; n < inner; ++n) {
        const auto at = static_cast<size_t>(n);
        h.push_back(applied(function, z[at]) * (gated ? z[at + static_cast<size_t>(inner)] : 1.0));
      }
      const auto out = product(m.base_down, m.u_down, m.v_down, m.offsets_down, e, hidden, inner, h);
      for (int n = 0; n < hidden; ++n) {
        y[static_cast<size_t>(t * hidden + n)] +=
            static_cast<double>(m.weights[static_cast<size_t>(t * top_k + j)]) * out[static_cast<size_t>(n)];
      }
    }
  }
  return y;
}
