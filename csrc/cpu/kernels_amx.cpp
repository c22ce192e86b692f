// AMX (Intel Sapphire Rapids and later): bfloat16 weights times bfloat16 operands on tile registers.
// Everything else is that of AVX-512 with BF16. Compiled with the flags of kernels_avx512_bf16.cpp and
// -mamx-tile -mamx-bf16; tests compile it once more with RESMOE_EMULATE_AMX (see amx_tiles.h).
#include <immintrin.h>

#include <utility>

#include "amx_tiles.h"
#include "kernels.h"

namespace resmoe {
namespace {

// Fewer rows go to the vector kernel: vdpbf16ps keeps up with memory for 3 to 4 rows of operands (measured on
// Sapphire Rapids: 76 GFLOP/s against 17 GB/s of weights a core), while a tile multiplies 16 rows or none.
constexpr int64_t kMinRows = 4;

#include "lanes_avx512.inl"

constexpr int64_t kStepLines = 16;  // lines of a weight tile (pairs of columns) of one tdpbf16ps
constexpr int64_t kLineBytes = 64;  // 16 rows x 2 columns, and 32 columns of an operand row
constexpr int64_t kTileBytes = kStepLines * kLineBytes;

// Steps that are multiplied with every row before the next ones are touched. 512 columns: 32 rows of x and
// two weight tiles are 32 KiB each, so that of the four tile loads to four products (64 cycles) two come from
// the first-level cache; with more columns all come from the second-level one, which cannot deliver 64 bytes
// a cycle. The sums of a block cost about 1/10 of it to add up; hardly any of that is waited for.
constexpr int64_t kMaxBlockSteps = 16;

// How far ahead of its use a line is asked for, in each of the streams (one a tile): two steps, in which four
// streams at 17 GB/s pass 0.5 us, several times the latency of memory.
constexpr int64_t kPrefetchBytes = 2 * kTileBytes;

constexpr int kRegisters = 4;  // that hold sums; the other four hold x and weights

struct Scratch {
  std::byte x[2][kMaxBlockSteps * kTileBytes];
  std::byte weights[kPanelTiles][kMaxBlockSteps * kTileBytes];
  float sums[kRegisters][kTileRows * kTileRows];
};

// 16 rows of x: the tile of step s starts at `at + s * step`.
struct Rows {
  const std::byte* at;
  int64_t stride, step;
};

// One tile of weights in a block: `whole` steps at `at`, and where the columns end within a step the rest,
// filled up with zeros, at `rest`. While steps are multiplied, the first `asking` of them, those at `ahead`
// are asked for.
struct Weights {
  const std::byte* at;
  const std::byte* rest;
  const std::byte* ahead;
};

struct Block {
  int64_t steps, whole, asking;
};

int64_t steps_of(int64_t columns) { return (even(columns) / 2 + kStepLines - 1) / kStepLines; }

void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

template <int n, class Visit>
inline __attribute__((always_inline)) void each(const Visit& visit) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (visit.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, n>{});
}

// sums[r kTiles + j] = x[r] weights[j]^T over a block. kRows kTiles <= 4.
template <int kRows, int kTiles>
void multiply_block(const Rows* x, const Weights* weights, const Block& block,
                    float (*sums)[kTileRows * kTileRows]) {
  constexpr int kFirstWeights = kRegisters + kRows, kWeights = 8 - kFirstWeights;
  each<kRows * kTiles>([]<int c>() { Tiles::zero<c>(); });
  for (int64_t s = 0; s < block.steps; ++s) {
    each<kRows>([&]<int r>() { Tiles::load<kRegisters + r>(x[r].at + s * x[r].step, x[r].stride); });
    each<kTiles>([&]<int j>() {
      constexpr int b = kFirstWeights + j % kWeights;
      Tiles::load<b>(s < block.whole ? weights[j].at + s * kTileBytes : weights[j].rest, kLineBytes);
      each<kRows>([&]<int r>() { Tiles::dot<r * kTiles + j, kRegisters + r, b>(); });
    });
    if (s >= block.asking) continue;
    for (int j = 0; j < kTiles; ++j)
      for (int64_t line = 0; line < kStepLines; ++line)
        prefetch(weights[j].ahead + s * kTileBytes + line * kLineBytes);
  }
  each<kRows * kTiles>([&]<int c>() { Tiles::store<c>(sums[c], kLineBytes); });
}

// The distance of rows that lie evenly and apart, else 0.
int64_t even_stride(const void* const* x) {
  const auto distance = [&](int i) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(x[i]) - reinterpret_cast<uintptr_t>(x[i - 1]));
  };
  const int64_t stride = distance(1);
  for (int i = 2; i < kTileRows; ++i)
    if (distance(i) != stride) return 0;
  return stride >= kLineBytes ? stride : 0;
}

// m <= 16 rows of x from a byte on. Rows in any order, and fewer than 16, are copied, tile after tile.
Rows rows_of(const void* const* x, int64_t m, int64_t from, int64_t steps, std::byte* copied) {
  const int64_t stride = m == kTileRows ? even_stride(x) : 0;
  if (stride != 0) return {static_cast<const std::byte*>(x[0]) + from, stride, kLineBytes};
  for (int64_t i = 0; i < kTileRows; ++i) {
    const std::byte* row = i < m ? static_cast<const std::byte*>(x[i]) + from : nullptr;
    for (int64_t s = 0; s < steps; ++s) {
      const __m512i line = row == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(row + s * kLineBytes);
      _mm512_store_si512(copied + s * kTileBytes + i * kLineBytes, line);
    }
  }
  return {copied, kLineBytes, kTileBytes};
}

// Adds sums of m rows and kTiles tiles to out, from a column on, row after row as rows of out may coincide.
template <int kTiles>
void add(const float (*sums)[kTileRows * kTileRows], float* const* out, int64_t m, int64_t column) {
  for (int64_t i = 0; i < m; ++i)
    for (int j = 0; j < kTiles; ++j) {
      float* const to = out[i] + column + j * kTileRows;
      const float* const from = sums[i / kTileRows * kTiles + j] + i % kTileRows * kTileRows;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(from)));
    }
}

template <int kRows, int kTiles>
void multiply_tiles(const Rows* x, const Weights* weights, const Block& block, float* const* out, int64_t m,
                    int64_t first, Scratch& scratch) {
  multiply_block<kRows, kTiles>(x, weights + first, block, scratch.sums);
  add<kTiles>(scratch.sums, out, m, first * kTileRows);
}

// Up to 32 rows with all tiles of a block: 16 rows x 4 tiles or 32 rows x 2 tiles at a time.
void multiply_rows(const void* const* x, const Weights* weights, int64_t tiles, int64_t from,
                   const Block& block, float* const* out, int64_t m, Scratch& scratch) {
  Rows rows[2] = {rows_of(x, m < kTileRows ? m : kTileRows, from, block.steps, scratch.x[0]), {}};
  if (m <= kTileRows) {
    switch (tiles) {
      case 1:
        return multiply_tiles<1, 1>(rows, weights, block, out, m, 0, scratch);
      case 2:
        return multiply_tiles<1, 2>(rows, weights, block, out, m, 0, scratch);
      case 3:
        return multiply_tiles<1, 3>(rows, weights, block, out, m, 0, scratch);
      default:
        return multiply_tiles<1, 4>(rows, weights, block, out, m, 0, scratch);
    }
  }
  rows[1] = rows_of(x + kTileRows, m - kTileRows, from, block.steps, scratch.x[1]);
  int64_t first = 0;
  for (; first + 2 <= tiles; first += 2) multiply_tiles<2, 2>(rows, weights, block, out, m, first, scratch);
  if (first < tiles) multiply_tiles<2, 1>(rows, weights, block, out, m, first, scratch);
}

// The next `lines` lines of every tile of a sparse panel, in packed order and filled up to whole steps; moves
// the panel behind them. All tiles at once: memory is read faster in several streams.
void expand(Panel& panel, int64_t lines, int64_t steps, Scratch& scratch) {
  for (int64_t line = 0; line < steps * kStepLines; ++line)
    for (int64_t j = 0; j < panel.tiles; ++j) {
      const uint32_t mask = line < lines ? *panel.masks[j]++ : 0;
      const __m512i stored = _mm512_loadu_si512(panel.values[j]);
      _mm512_store_si512(scratch.weights[j] + line * kLineBytes, _mm512_maskz_expand_epi16(mask, stored));
      panel.values[j] += __builtin_popcount(mask) * size_of(Dtype::bfloat16);
      // A line takes about 16 bytes of values and 4 of the mask, where 8 of 32 are kept.
      if (line % 4 == 0) prefetch(panel.values[j] + kPrefetchBytes);
      if (line % 16 == 0) prefetch(reinterpret_cast<const std::byte*>(panel.masks[j]) + kPrefetchBytes / 4);
    }
}

// 32 bfloat16, pairs of two columns of 16 rows, times a scale a row: the one rounding of a weight that is staged.
__m512i scaled(__m512i line, __m512 scale) {
  const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16)),
               odd = _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  const auto words = [&](__m512 values) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, scale)));
  };
  return _mm512_or_si512(words(even), _mm512_slli_epi32(words(odd), 16));
}

// A coded panel: the steps [from, from + steps) of every tile, whose units they are, as weights. Sums of a group would
// have to leave the tile registers for their scale, every 32 to 128 columns and for every 16 rows, which takes longer
// than their products: so operands are scaled instead, once for all rows. u has no scales, and is not rounded.
template <int bits>
void stage_codes(const Panel& panel, int64_t from, int64_t steps, Scratch& scratch) {
  using Words = CodeWords<bits>;
  const int64_t scales = scale_bytes(panel.columns, panel.payload), group = panel.payload.group;
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t j = 0; j < panel.tiles; ++j) {
      const std::byte* const tile = panel.values[j];
      const std::byte* const unit = tile + scales + (from + s) * kLineBytes * bits;
      const int64_t row_of_scales = group == 0 ? 0 : (from + s) * kUnitColumns / group;
      const __m512 scale =
          Lanes::load_bfloat16(reinterpret_cast<const uint16_t*>(tile) + row_of_scales * kTileRows);
      std::byte* const to = scratch.weights[j] + s * kTileBytes;
      for (int64_t b = 0; b < kLineBytes * bits; b += kLineBytes) prefetch(unit + kPrefetchBytes + b);
      each<Words::kParts>([&]<int part>() {
        each<Words::kLines>([&]<int i>() {
          const __m512i line = Words::template line<i>(unit + part * Words::kBytes);
          _mm512_store_si512(to + (part * Words::kLines + i) * kLineBytes, group == 0 ? line : scaled(line, scale));
        });
      });
    }
}

void stage_codes(const Panel& panel, int64_t from, int64_t steps, Scratch& scratch) {
  switch (panel.payload.bits) {
    case 8:
      return stage_codes<8>(panel, from, steps, scratch);
    case 4:
      return stage_codes<4>(panel, from, steps, scratch);
    case 3:
      return stage_codes<3>(panel, from, steps, scratch);
    case 2:
      return stage_codes<2>(panel, from, steps, scratch);
  }
}

// Copies the lines behind the last whole step and fills the step up with zeros.
const std::byte* fill_up(const std::byte* from, int64_t lines, std::byte* to) {
  for (int64_t line = 0; line < kStepLines; ++line)
    _mm512_store_si512(to + line * kLineBytes,
                       line < lines ? _mm512_loadu_si512(from + line * kLineBytes) : _mm512_setzero_si512());
  return to;
}

void multiply(const Panel& panel, const void* const* x, float* const* out, int64_t m, const Panel* next,
              std::byte* scratch_bytes) {
  if (m < kMinRows) {
    const Kernels* vector = kernels_avx512_bf16(Dtype::bfloat16, Operand::bfloat16);
    return vector->multiply(panel, x, out, m, next, scratch_bytes);
  }
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = kStepLines;
    config.row_bytes[t] = kLineBytes;
  }
  Tiles::configure(config);
  Scratch& scratch = *reinterpret_cast<Scratch*>(scratch_bytes);
  const bool sparse = panel.masks[0] != nullptr, coded = panel.payload.is_coded(), staged = sparse || coded;
  const int64_t lines = even(panel.columns) / 2, steps = steps_of(panel.columns);
  // Blocks of nearly equal length.
  const int64_t blocks = (steps + kMaxBlockSteps - 1) / kMaxBlockSteps;
  Panel left = panel;  // what is not multiplied yet
  for (int64_t b = 0, from = 0; b < blocks; ++b) {
    const int64_t end = steps * (b + 1) / blocks;
    const bool last = b + 1 == blocks;
    const int64_t block_lines = (last ? lines : end * kStepLines) - from * kStepLines;
    Block block{end - from, staged ? end - from : block_lines / kStepLines, 0};
    if (sparse) expand(left, block_lines, block.steps, scratch);
    if (coded) stage_codes(panel, from, block.steps, scratch);

    Weights weights[kPanelTiles] = {};
    for (int64_t j = 0; j < panel.tiles; ++j) {
      weights[j].at = staged ? scratch.weights[j] : left.values[j];
      if (staged) continue;
      left.values[j] += block_lines * kLineBytes;
      if (block.whole < block.steps)
        weights[j].rest =
            fill_up(weights[j].at + block.whole * kTileBytes, block_lines % kStepLines, scratch.weights[j]);
    }
    // The first rows read the weights from memory, shortly after asking for them. While the second ones read
    // them from the cache, the next block is fetched: of this panel or, after the last one, of the next
    // panel.
    const Panel* const then = last ? next : &left;
    const bool is_dense = then != nullptr && then->tiles > 0 && then->masks[0] == nullptr && (last || !coded);
    const int64_t then_steps = !is_dense ? 0 : last ? then->tile_bytes / kTileBytes : block.steps;
    for (int64_t i = 0; i < m; i += 2 * kTileRows) {
      const int64_t rows = m - i < 2 * kTileRows ? m - i : 2 * kTileRows;
      block.asking = i == 0 ? (staged ? 0 : block.steps) : i == 2 * kTileRows ? then_steps : 0;
      for (int64_t j = 0; j < panel.tiles && block.asking > 0; ++j)
        weights[j].ahead = i == 0 ? weights[j].at + kPrefetchBytes : then->values[j < then->tiles ? j : 0];
      multiply_rows(x + i, weights, panel.tiles, from * kLineBytes, block, out + i, rows, scratch);
    }
    from = end;
  }
  Tiles::release();
  for (int64_t j = 0; next != nullptr && j < next->tiles; ++j) {
    for (int64_t b = 0; b < kPrefetchBytes; b += 64) prefetch(next->values[j] + b);
    for (int64_t b = 0; next->masks[0] != nullptr && b < kPrefetchBytes / 4; b += 64)
      prefetch(reinterpret_cast<const std::byte*>(next->masks[j]) + b);
  }
}

Kernels with_tiles() {
  Kernels kernels = *kernels_avx512_bf16(Dtype::bfloat16, Operand::bfloat16);
  kernels.multiply = multiply;
  // A line times 16 rows takes one cycle here and its sum with another about eight: more than the base
  // product of 512 tokens, once 4 experts are hit.
  kernels.base_cost = 0;
  const auto own = static_cast<int64_t>(sizeof(Scratch));
  if (kernels.multiply_scratch < own) kernels.multiply_scratch = own;
  return kernels;
}

}  // namespace

#ifdef RESMOE_EMULATE_AMX
const Kernels* kernels_amx_emulated(Dtype weight, Operand operand);
const Kernels* kernels_amx_emulated(Dtype weight, Operand operand) {
#else
const Kernels* kernels_amx(Dtype weight, Operand operand) {
#endif
  if (operand != Operand::bfloat16) return kernels_avx512_bf16(weight, operand);
  static const Kernels tiled = with_tiles();
  return weight == Dtype::bfloat16 ? &tiled : nullptr;
}

}  // namespace resmoe
