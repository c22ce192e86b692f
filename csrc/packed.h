// One layer of factored experts in the order in which the CPU kernels read it: one block of memory.
//
// A weight matrix W (N, K) is cut into tiles of 16 rows, one tile after the other. A tile holds, for
// bfloat16, pairs of columns of its 16 rows, so that one 64-byte line is one operand of vdpbf16ps and 16
// lines are one AMX tile:
//
//     bfloat16           tile[k / 2][row][k % 2]
//     float16, float32   tile[k][row]
//
// Rows are padded to 16 and columns to 2 with zeros. The two halves of a gated gate_up are padded each on its
// own: tiles [0, t) are the gate, [t, 2t) the up matrix, with t = ceil(I / 16).
//
// A sparse matrix stores a word of 32 bits for two columns of a tile, whose bit b says that the b-th value of
// those two columns, in the order above, is stored (bfloat16: b = 2 row + k % 2; otherwise b = 16 (k % 2) +
// row), and after one another the stored values of a tile. The block and the bitmap layout of checkpoints
// become this one; it needs no padding of rows: a row that is not there has no bits.
//
// A tensor of codes (payload.h) becomes tiles of the same 16 rows: first the scales of the tile, group after group,
// [ceil(K / group)][row] bfloat16, then its units of 32 columns. Columns are padded to whole units, rows with
// scales that are zero. u has no scales in its tiles, because it has one a rank: they multiply V x.
//
// The block is position independent, never written to disk, and carries everything needed to give the
// checkpoint form back bit by bit. Equal tensors give equal blocks: what is not used is zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "parallel.h"
#include "payload.h"

namespace resmoe {

enum class Dtype : int32_t { bfloat16, float16, float32 };

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kAlignment = 64;  // of the block and of every part in it
inline constexpr int64_t kSlack = 256;     // readable bytes behind the last part: vector loads may run over

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int64_t even(int64_t columns) { return columns + columns % 2; }

// One of the two matrices of every expert. Offsets are bytes from the start of the block, 0 for a part that
// is not there.
struct PackedMatrix {
  int64_t rows, columns;  // N, K
  int64_t halves;         // 2 for a gated gate_up, else 1
  int64_t half_tiles;     // tiles of one half: tiles_of(rows / halves)

  int64_t base;          // G matrices (N, K), each tiles() * tile_bytes(columns) bytes
  int64_t rank_offsets;  // (E + 1,) int32, as in the checkpoint
  int64_t v;             // of expert e from v + v_starts[e]: (r, K) in tiles
  int64_t v_starts;      // (E + 1,) int64, bytes
  int64_t u;             // of expert e from u + u_starts[e]: (N, r) in tiles: the checkpoint's u transposed
  int64_t u_starts;      // (E + 1,) int64, bytes
  int64_t u_scales;      // (R,) bfloat16, where u is coded
  int64_t mask;          // (E, tiles(), even(K) / 2) uint32; 0 where the values are full
  int64_t values;        // the stored values, tile after tile; full ones are E matrices (N, K) in tiles
  int64_t tile_starts;   // (E tiles() + 1,) int64: the first value of a tile, counted in values
  int64_t bias;          // (E, 16 tiles()) float32, padded with zeros

  int64_t block_kept;       // n of the block layout it came from, 0 for bitmap
  int64_t row_offset_size;  // 4 or 8: bytes of an element of the bitmap's row_offsets

  Payload base_payload, u_payload, v_payload, values_payload;

  int64_t tiles() const { return halves * half_tiles; }
  bool is_full() const { return values != 0 && mask == 0; }
};

struct PackedHeader {
  uint64_t magic;
  int64_t version;
  int64_t bytes;  // of the whole block, kSlack included
  int64_t experts, hidden, intermediate, groups;
  Dtype dtype;  // of every tensor of floats but scales
  int32_t gated;
  int64_t group;  // (E,) int32; 0 where there is no base
  PackedMatrix gate_up, down;
};

inline constexpr uint64_t kPackedMagic = 0x65'6f'6d'73'65'72'2e'31;  // "1.resmoe"
inline constexpr int64_t kPackedVersion = 2;

// Bytes of the scales at the beginning of a coded tile, and of a whole tile of `columns` columns.
constexpr int64_t scale_bytes(int64_t columns, Payload payload) {
  return (groups_of(columns, payload) * kTileRows * 2 + kAlignment - 1) / kAlignment * kAlignment;
}
constexpr int64_t tile_bytes(int64_t columns, Dtype dtype, Payload payload = {}) {
  return payload.bits == 0 ? kTileRows * even(columns) * size_of(dtype)
                           : scale_bytes(columns, payload) + units_of(columns) * kAlignment * payload.bits;
}

// The checkpoint form, which resmoe_kernels/factored.py defines (factorization "stacked"): contiguous
// tensors. Void is const void for one to be read, void for one to be written. Which parts there are: those
// whose index tensor is not null (group for the bases, rank_offsets for u and v, mask for values), because an
// empty tensor may have no address. Full values, which have no mask, are there where they are not null.
//
// A coded tensor is its codes, uint8 with stored_row_bytes(last dimension) in place of the last dimension, and
// its scales, bfloat16: (G, N, groups), (R,) of u, (R, groups) of v, (E, N, groups) of full values.
template <typename Void>
struct FactoredMatrix {
  Void* base = nullptr;          // (G, N, K)
  Void* rank_offsets = nullptr;  // (E + 1,) int32
  Void* u = nullptr;             // (R, N)
  Void* v = nullptr;             // (R, K)
  Void* mask = nullptr;          // (E, N, ceil(K / 32)) uint32
  Void* row_offsets = nullptr;   // bitmap layout only: (E N + 1,) int32 or int64
  Void* values = nullptr;        // block layout: (E, N, ceil(K / 32), block_kept); bitmap layout: (nnz,);
                                 // full: (E, N, K)
  Void* bias = nullptr;          // (E, N)
  Void *base_scales = nullptr, *u_scales = nullptr, *v_scales = nullptr, *values_scales = nullptr;
  Payload base_payload, u_payload, v_payload, values_payload;  // of values: only where they are full
  int64_t ranks = 0;             // R
  int64_t nnz = 0;
  int64_t block_kept = 0;       // n of the block layout, 0 for bitmap
  int64_t row_offset_size = 0;  // 4 or 8
};

template <typename Void>
struct Factored {
  int64_t experts = 0, hidden = 0, intermediate = 0, groups = 0;
  Dtype dtype = Dtype::bfloat16;  // of every tensor of floats but scales
  bool gated = true;
  Void* group = nullptr;  // (E,) int32
  FactoredMatrix<Void> gate_up, down;

  int64_t rows(bool down_matrix) const { return down_matrix ? hidden : (gated ? 2 : 1) * intermediate; }
  int64_t columns(bool down_matrix) const { return down_matrix ? intermediate : hidden; }
};

// Bytes of the block of this layer.
// Both throw std::invalid_argument, naming the tensor, the rule and what came, where contents would lead a
// kernel out of bounds or would not come back as they are: groups, offsets, masks, the values of a narrower
// last word of the block layout, which must be zero behind those that count, codes that fill a row up, which
// must be zero, and scales, which must be finite and not negative.
int64_t packed_bytes(const Factored<const void>& from);

// Fills a block of packed_bytes(from) bytes, kAlignment aligned.
void pack(const Factored<const void>& from, void* block, const ParallelFor& parallel_for);

// The header of a block of `bytes` bytes. Throws std::invalid_argument where it is none.
const PackedHeader& check_packed(const void* block, int64_t bytes);

// What a checked block holds: all sizes, and for each part that is there an index tensor (full values: the
// tensor) that is not null. Pointers of `unpack`'s argument must replace them.
Factored<const void> packed_sizes(const void* block);

// Fills the tensors of `to`, which has the sizes of packed_sizes(block).
void unpack(const void* block, const Factored<void>& to, const ParallelFor& parallel_for);

}  // namespace resmoe
