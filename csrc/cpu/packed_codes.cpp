// The coded parts of a packed layer: a checkpoint's rows of codes and their scales to tiles, and back.
#include <bit>
#include <cstring>
#include <vector>

#include "packed_parts.h"

namespace resmoe {
namespace {

constexpr int kLineElements = 2 * kTileRows;

bool is_scale(uint16_t bits) { return bits <= 0x7f7f; }  // finite and without a sign

// A coded tensor of a checkpoint: count matrices (rows, columns) where `matrices`, else rows alone.
struct Stored {
  const char* stem;
  const void *codes, *scales;
  Payload payload;
  int64_t count, rows, columns;
  bool matrices;
};

// That what fills rows up is 0 and that scales are scales: both would come back, but mean nothing. As check_padding
// and check_scales of resmoe_kernels/payload.py, with their words.
void check(const Stored& t, const char* name) {
  const int64_t bytes = stored_row_bytes(t.columns, t.payload);
  const int64_t scales = t.payload.group == 0 ? 1 : groups_of(t.columns, t.payload);
  const auto place = [&](int64_t row, int64_t column) {  // column < 0: the tensor has none
    std::ostringstream text;
    text << " at (";
    if (t.matrices) text << row / t.rows << ", " << row % t.rows;
    if (!t.matrices) text << row;
    if (column >= 0) text << ", " << column;
    text << (column < 0 ? ",)" : ")");
    return text.str();
  };
  for (int64_t row = 0; row < t.count * t.rows; ++row) {
    const auto* codes = static_cast<const uint8_t*>(t.codes) + row * bytes;
    for (int64_t begin = t.columns / kUnitColumns * kUnitColumns; begin * t.payload.bits < 8 * bytes;
         begin += kUnitColumns) {
      uint8_t unit[kUnitColumns];
      load_unit(t.payload.bits, codes + begin * t.payload.bits / 8, unit);
      for (int64_t k = std::max(begin, t.columns); k < begin + kUnitColumns; ++k)
        if (unit[k - begin] != 0)
          refuse(t.stem, "_", name, ": codes behind the ", t.columns, " of a row must be 0, got ",
                 int{unit[k - begin]}, place(row, k));
    }
    for (int64_t g = 0; g < scales; ++g) {
      const uint16_t scale = static_cast<const uint16_t*>(t.scales)[row * scales + g];
      if (!is_scale(scale))
        refuse("scales_", t.stem, "_", name, ": scales must be finite and at least +0, got ",
               std::bit_cast<float>(uint32_t{scale} << 16), place(row, t.payload.group == 0 ? -1 : g));
    }
  }
}

// Up to 16 rows of codes, groups along the columns, to a tile; `row` is the first.
void pack_rows(Payload payload, const void* codes, const void* scales, int64_t row, int64_t count, int64_t columns,
               std::byte* tile) {
  const int64_t groups = groups_of(columns, payload), bytes = stored_row_bytes(columns, payload);
  std::memset(tile, 0, static_cast<size_t>(scale_bytes(columns, payload)));
  for (int64_t r = 0; r < count; ++r)
    for (int64_t g = 0; g < groups; ++g)
      at<uint16_t>(tile, 0)[g * kTileRows + r] = static_cast<const uint16_t*>(scales)[(row + r) * groups + g];
  std::byte* unit = tile + scale_bytes(columns, payload);
  for (int64_t u = 0; u < units_of(columns); ++u, unit += kAlignment * payload.bits) {
    uint8_t lines[kUnitLines][kLineElements] = {}, own[kUnitColumns];
    for (int64_t r = 0; r < count; ++r) {
      load_unit(payload.bits, static_cast<const uint8_t*>(codes) + (row + r) * bytes + u * 4 * payload.bits, own);
      for (int64_t k = 0; k < kUnitColumns; ++k) lines[k / 2][2 * r + k % 2] = own[k];
    }
    pack_unit(payload.bits, lines, unit);
  }
}

void unpack_rows(Payload payload, const std::byte* tile, int64_t row, int64_t count, int64_t columns, void* codes,
                 void* scales) {
  const int64_t groups = groups_of(columns, payload), bytes = stored_row_bytes(columns, payload);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t g = 0; g < groups; ++g)
      static_cast<uint16_t*>(scales)[(row + r) * groups + g] = at<uint16_t>(tile, 0)[g * kTileRows + r];
  const std::byte* unit = tile + scale_bytes(columns, payload);
  const int64_t units = bytes / (4 * payload.bits);  // a row is filled up to whole groups, a tile to whole units
  for (int64_t u = 0; u < units; ++u, unit += kAlignment * payload.bits) {
    uint8_t lines[kUnitLines][kLineElements] = {}, own[kUnitColumns];
    if (u < units_of(columns)) unpack_unit(payload.bits, unit, lines);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t k = 0; k < kUnitColumns; ++k) own[k] = lines[k / 2][2 * r + k % 2];
      store_unit(payload.bits, own, static_cast<uint8_t*>(codes) + (row + r) * bytes + u * 4 * payload.bits);
    }
  }
}

// The ranks of one expert's u, (rank, N) codes that are multiplied transposed: 32 ranks are a unit of every tile.
// Void as in packed.h: a tile is written where the codes are read, and read where they are written.
template <typename Void, typename Byte>
void move_u(const PackedMatrix& m, Void* tensor, int64_t first, int64_t rank, Byte* tiles) {
  constexpr bool packing = std::is_const_v<Void>;
  const int32_t bits = m.u_payload.bits;
  const int64_t bytes = stored_row_bytes(m.rows, m.u_payload), width = units_of(m.rows) * kUnitColumns;
  const int64_t a_tile = tile_bytes(rank, Dtype::bfloat16, m.u_payload);
  std::vector<uint8_t> codes(static_cast<size_t>(kUnitColumns * width));
  for (int64_t begin = 0; begin < rank; begin += kUnitColumns) {
    const int64_t ranks = std::min(kUnitColumns, rank - begin);
    std::fill(codes.begin(), codes.end(), uint8_t{0});
    const auto each_unit = [&](const auto& body) {
      for (int64_t k = 0; k < ranks; ++k)
        for (int64_t n = 0; n < width; n += kUnitColumns)
          body((first + begin + k) * bytes + n * bits / 8, codes.data() + k * width + n);
    };
    if constexpr (packing)
      each_unit([&](int64_t at, uint8_t* own) { load_unit(bits, static_cast<const uint8_t*>(tensor) + at, own); });
    for (int64_t i = 0; i < m.tiles(); ++i) {
      const TileRows own = rows_of(m, i);
      Byte* const unit = tiles + i * a_tile + begin / kUnitColumns * kAlignment * bits;
      uint8_t lines[kUnitLines][kLineElements] = {};
      if constexpr (!packing) unpack_unit(bits, unit, lines);
      for (int64_t k = 0; k < ranks; ++k)
        for (int64_t r = 0; r < own.count; ++r) {
          uint8_t& in_line = lines[k / 2][2 * r + k % 2];
          uint8_t& in_row = codes[static_cast<size_t>(k * width + own.first + r)];
          if constexpr (packing)
            in_line = in_row;
          else
            in_row = in_line;
        }
      if constexpr (packing) pack_unit(bits, lines, unit);
    }
    if constexpr (!packing)
      each_unit([&](int64_t at, const uint8_t* own) { store_unit(bits, own, static_cast<uint8_t*>(tensor) + at); });
  }
}

// Calls rows(payload, codes, scales, first row of the tensor, rows, tile) for every tile whose scales are its own, and
// u(first rank, rank, tiles) for every expert's u.
template <typename Void, typename Byte, typename Rows, typename U>
void each_coded(const PackedHeader& header, const PackedMatrix& m, Byte* block, const FactoredMatrix<Void>& f,
                const ParallelFor& parallel_for, const Rows& rows, const U& u) {
  const auto matrices = [&](Payload payload, Void* codes, Void* scales, int64_t part, int64_t count) {
    parallel_for(count * m.tiles(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const TileRows own = rows_of(m, i % m.tiles());
        rows(payload, codes, scales, i / m.tiles() * m.rows + own.first, own.count,
             block + part + i * tile_bytes(m.columns, header.dtype, payload));
      }
    });
  };
  if (m.base != 0 && m.base_payload.is_coded())
    matrices(m.base_payload, f.base, f.base_scales, m.base, header.groups);
  if (m.is_full() && m.values_payload.is_coded())
    matrices(m.values_payload, f.values, f.values_scales, m.values, header.experts);
  if (m.rank_offsets == 0 || !(m.u_payload.is_coded() || m.v_payload.is_coded())) return;
  const auto* offsets = at<int32_t>(block, m.rank_offsets);
  const auto *v_starts = at<int64_t>(block, m.v_starts), *u_starts = at<int64_t>(block, m.u_starts);
  parallel_for(header.experts, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t first = offsets[e], rank = offsets[e + 1] - first;
      for (int64_t i = 0; m.v_payload.is_coded() && i < tiles_of(rank); ++i)
        rows(m.v_payload, f.v, f.v_scales, first + i * kTileRows, std::min(kTileRows, rank - i * kTileRows),
             block + m.v + v_starts[e] + i * tile_bytes(m.columns, header.dtype, m.v_payload));
      if (m.u_payload.is_coded()) u(first, rank, block + m.u + u_starts[e]);
    }
  });
}

}  // namespace

void pack_codes(const PackedHeader& header, const PackedMatrix& m, const char* name, std::byte* block,
                const FactoredMatrix<const void>& f, const ParallelFor& parallel_for) {
  if (m.base != 0 && m.base_payload.is_coded())
    check({"base", f.base, f.base_scales, m.base_payload, header.groups, m.rows, m.columns, true}, name);
  if (m.is_full() && m.values_payload.is_coded())
    check({"values", f.values, f.values_scales, m.values_payload, header.experts, m.rows, m.columns, true}, name);
  if (f.ranks != 0 && m.u_payload.is_coded())
    check({"u", f.u, f.u_scales, m.u_payload, 1, f.ranks, m.rows, false}, name);
  if (f.ranks != 0 && m.v_payload.is_coded())
    check({"v", f.v, f.v_scales, m.v_payload, 1, f.ranks, m.columns, false}, name);
  if (m.u_scales != 0 && f.ranks != 0)
    std::memcpy(block + m.u_scales, f.u_scales, static_cast<size_t>(f.ranks) * 2);
  each_coded(
      header, m, block, f, parallel_for,
      [&](Payload payload, const void* codes, const void* scales, int64_t row, int64_t count, std::byte* tile) {
        pack_rows(payload, codes, scales, row, count, m.columns, tile);
      },
      [&](int64_t first, int64_t rank, std::byte* tiles) { move_u(m, f.u, first, rank, tiles); });
}

void unpack_codes(const PackedHeader& header, const PackedMatrix& m, const std::byte* block,
                  const FactoredMatrix<void>& f, const ParallelFor& parallel_for) {
  if (m.u_scales != 0 && f.ranks != 0)
    std::memcpy(f.u_scales, block + m.u_scales, static_cast<size_t>(f.ranks) * 2);
  each_coded(
      header, m, block, f, parallel_for,
      [&](Payload payload, void* codes, void* scales, int64_t row, int64_t count, const std::byte* tile) {
        unpack_rows(payload, tile, row, count, m.columns, codes, scales);
      },
      [&](int64_t first, int64_t rank, const std::byte* tiles) { move_u(m, f.u, first, rank, tiles); });
}

}  // namespace resmoe
