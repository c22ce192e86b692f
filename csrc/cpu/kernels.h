// The arithmetic of an expert layer on one instruction set: what the driver (experts.cpp) calls.
//
// One table of functions per instruction set, weight type and operand type. An operand is a vector that meets
// weights: a row of x, of V x, of h, of sum w h, of V' h. It is bfloat16 where the instruction set multiplies
// pairs of bfloat16 and both x and the weights are bfloat16; otherwise float32, and weights are widened.
// Operand rows are readable, and zero behind their last column, up to a multiple of kOperandPad columns.
#pragma once

#include <cstdint>

#include "packed.h"

namespace resmoe {

inline constexpr int64_t kOperandPad = 32;
inline constexpr int64_t kPanelTiles = 4;
inline constexpr int64_t kPanelRows = kPanelTiles * kTileRows;  // 64

enum class Operand { bfloat16, float32 };
enum class Activation { silu, gelu, gelu_tanh, relu, relu2, identity };

// Up to four tiles of one matrix (see packed.h): their 16 * tiles rows are the outputs of one multiply. The
// tiles need not be neighbours: two of the gate and two of the up matrix make a panel.
struct Panel {
  int64_t columns = 0;
  int64_t tiles = 0;
  Payload payload = {};    // of a dense panel
  int64_t tile_bytes = 0;  // of a tile of a dense panel; 0 in a sparse one
  const std::byte* values[kPanelTiles] = {};  // a tile; in a sparse matrix its first stored value
  const uint32_t* masks[kPanelTiles] = {};    // sparse only, else null
  // Sparse only, and only where Kernels::base_cost says so: dense tiles that the stored values are added to.
  const std::byte* base[kPanelTiles] = {};
};

struct Kernels {
  Dtype weight;
  Operand operand;

  // out[i][r] += sum_k x[i][k] W[r][k]      for i in [0, m), r in [0, 16 * tiles)
  // Sums in float32. `next`, if not null, is the panel this thread will most likely multiply next: its first
  // lines are prefetched. `scratch` is multiply_scratch bytes of this thread's own, 64-byte aligned. Rows of
  // out may coincide (a token that met an expert twice): each is added to in turn.
  void (*multiply)(const Panel& panel, const void* const* x, float* const* out, int64_t m, const Panel* next,
                   std::byte* scratch);
  int64_t multiply_scratch;

  // What it costs to add a sparse panel to a dense one while it is expanded, in rows of a multiply: where
  // fewer rows are saved, multiplying both is cheaper. 0: multiply does not do it. The sums are rounded to
  // the type of the weights, as the weights of a dense layer are.
  int64_t base_cost;

  // h[i][c] = operand(w[i] f(z[i])[c]), and, where sum is not null, sum[i][c] += w[i] f(z[i])[c] in float32,
  // for i in [0, m), c in [0, n), n a multiple of 16. Gated: f(z)[c] = act(z[c]) * z[n + c]; else act(z[c]).
  // z[i] = z + i * z_stride.
  void (*activate)(Activation activation, bool gated, const float* z, int64_t z_stride, const float* w,
                   void* const* h, float* const* sum, int64_t m, int64_t n);

  // n elements each; rounding is to nearest even, and a NaN stays one. `load` makes bfloat16 operands of
  // bfloat16 only.
  void (*to_operand)(const float* from, void* to, int64_t n);
  void (*load)(Dtype dtype, const void* from, void* to, int64_t n);    // dtype -> operand
  void (*store)(Dtype dtype, const float* from, void* to, int64_t n);  // float32 -> dtype
};

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// The table of one instruction set; null where it has none for these types (bfloat16 operands need
// avx512_bf16 or amx, and bfloat16 weights).
const Kernels* kernels_portable(Dtype weight, Operand operand);
const Kernels* kernels_avx2(Dtype weight, Operand operand);
const Kernels* kernels_avx512(Dtype weight, Operand operand);
const Kernels* kernels_avx512_bf16(Dtype weight, Operand operand);
const Kernels* kernels_amx(Dtype weight, Operand operand);

}  // namespace resmoe
