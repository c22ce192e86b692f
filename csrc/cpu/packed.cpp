#include "../packed.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "packed_parts.h"

namespace resmoe {
namespace {

// ---- the layout: where every part stands

struct Layout {
  PackedHeader header = {};
  std::vector<int64_t> ends;  // of the parts

  int64_t take(int64_t bytes) {
    const int64_t start = header.bytes;
    ends.push_back(start + bytes);
    header.bytes = (start + bytes + kAlignment - 1) / kAlignment * kAlignment;
    return start;
  }
};

int64_t v_bytes(const PackedMatrix& m, int64_t rank, Dtype dtype) {
  return tiles_of(rank) * tile_bytes(m.columns, dtype, m.v_payload);
}

int64_t u_bytes(const PackedMatrix& m, int64_t rank, Dtype dtype) {
  return m.tiles() * tile_bytes(rank, dtype, m.u_payload);
}

void check_offsets(const char* name, const char* matrix, int64_t count, int64_t total, auto offset) {
  if (offset(0) != 0)
    refuse(name, matrix, ": must rise from 0 to ", total, " without falling, got ", offset(0), " at place 0");
  for (int64_t i = 1; i <= count; ++i)
    if (offset(i) < offset(i - 1) || offset(i) > total || (i == count && offset(i) != total))
      refuse(name, matrix, ": must rise from 0 to ", total, " without falling, got ", offset(i), " at place ",
             i);
}

int64_t block_values(const PackedMatrix& m) {  // in one row
  const int64_t last = m.columns - kWordColumns * (words_of(m.columns) - 1);
  return (words_of(m.columns) - 1) * m.block_kept + std::min(m.block_kept, last);
}

// `a_row`: u, whose scales are one a rank.
void check_payload(const char* stem, const char* matrix, Payload payload, bool a_row = false) {
  if (payload == Payload{}) return;
  if (payload.bits != 8 && payload.bits != 4 && payload.bits != 3 && payload.bits != 2)
    refuse(stem, matrix, ": codes must have 8, 4, 3 or 2 bits, got ", payload.bits);
  if (a_row && payload.group != 0)
    refuse(stem, matrix, ": must have one scale a rank, a group of 0, got ", payload.group);
  if (!a_row && payload.group != 32 && payload.group != 64 && payload.group != 128)
    refuse(stem, matrix, ": a group must be 32, 64 or 128 columns, got ", payload.group);
}

PackedMatrix lay_out_matrix(const Factored<const void>& from, bool down, Layout& layout) {
  const char* name = down ? "down" : "gate_up";
  const auto& f = down ? from.down : from.gate_up;
  PackedMatrix m = {};
  m.rows = from.rows(down);
  m.columns = from.columns(down);
  m.halves = !down && from.gated ? 2 : 1;
  m.half_tiles = tiles_of(m.rows / m.halves);
  m.base_payload = f.base_payload, m.u_payload = f.u_payload;
  m.v_payload = f.v_payload, m.values_payload = f.values_payload;
  check_payload("base_", name, m.base_payload);
  check_payload("u_", name, m.u_payload, true);
  check_payload("v_", name, m.v_payload);
  check_payload("values_", name, m.values_payload);
  if (from.group != nullptr)
    m.base = layout.take(from.groups * m.tiles() * tile_bytes(m.columns, from.dtype, m.base_payload));
  if (f.rank_offsets != nullptr) {
    const auto* offsets = static_cast<const int32_t*>(f.rank_offsets);
    check_offsets("rank_offsets_", name, from.experts, f.ranks, [=](int64_t i) { return offsets[i]; });
    int64_t v = 0, u = 0;
    for (int64_t e = 0; e < from.experts; ++e) {
      v += v_bytes(m, offsets[e + 1] - offsets[e], from.dtype);
      u += u_bytes(m, offsets[e + 1] - offsets[e], from.dtype);
    }
    m.rank_offsets = layout.take((from.experts + 1) * 4);
    m.v_starts = layout.take((from.experts + 1) * 8);
    m.u_starts = layout.take((from.experts + 1) * 8);
    m.v = layout.take(v);
    m.u = layout.take(u);
    if (m.u_payload.is_coded()) m.u_scales = layout.take(f.ranks * 2);
  }
  if (f.mask != nullptr && m.values_payload.is_coded())
    refuse("values_", name, ": codes must be those of a full residual, got a mask too; the reference runs them");
  if (f.mask == nullptr && f.values != nullptr)
    m.values =
        layout.take(from.experts * m.tiles() * tile_bytes(m.columns, from.dtype, m.values_payload));
  if (f.mask != nullptr) {
    m.block_kept = f.block_kept;
    m.row_offset_size = f.row_offset_size;
    const int64_t values = f.block_kept == 0 ? f.nnz : from.experts * m.rows * block_values(m);
    m.tile_starts = layout.take((from.experts * m.tiles() + 1) * 8);
    m.mask = layout.take(from.experts * m.tiles() * even(m.columns) / 2 * 4);
    m.values = layout.take(values * size_of(from.dtype));
  }
  if (f.bias != nullptr) m.bias = layout.take(from.experts * m.tiles() * kTileRows * 4);
  return m;
}

Layout lay_out(const Factored<const void>& from) {
  Layout layout;
  layout.take(sizeof(PackedHeader));
  PackedHeader& header = layout.header;
  header.magic = kPackedMagic;
  header.version = kPackedVersion;
  header.experts = from.experts;
  header.hidden = from.hidden;
  header.intermediate = from.intermediate;
  header.groups = from.groups;
  header.dtype = from.dtype;
  header.gated = from.gated;
  if (from.group != nullptr) {
    const auto* group = static_cast<const int32_t*>(from.group);
    for (int64_t e = 0; e < from.experts; ++e)
      if (group[e] < -1 || group[e] >= from.groups)
        refuse("group: entries must be in [-1, ", from.groups, "), got ", group[e], " for expert ", e);
    header.group = layout.take(from.experts * 4);
  }
  header.gate_up = lay_out_matrix(from, false, layout);
  header.down = lay_out_matrix(from, true, layout);
  header.bytes += kSlack;
  return layout;
}

// ---- dense parts, in both directions: tensors are const where a block is made of them

template <typename Void, typename T>
using OfBlock = std::conditional_t<std::is_const_v<Void>, T, const T>;
template <typename Void, typename T>
using OfTensor = std::conditional_t<std::is_const_v<Void>, const T, T>;

template <typename Void, typename T>
OfTensor<Void, T>* tensor(Void* pointer) {
  return static_cast<OfTensor<Void, T>*>(pointer);
}

// One tile and the rows of a matrix it holds: element (r, k) is matrix[r row_stride + k column_stride].
template <typename Void, typename T>
struct Tile {
  OfBlock<Void, T>* tile;
  OfTensor<Void, T>* matrix;
  int64_t row_stride, column_stride, rows, columns;

  // 32 columns at a time: a line of each row is read once, and what is written stays in the first cache.
  template <bool pairs>
  void move() const {
    if constexpr (std::is_const_v<Void>)
      if (rows < kTileRows || columns % 2 != 0) std::fill_n(tile, kTileRows * even(columns), T{0});
    for (int64_t begin = 0; begin < columns; begin += 32) {
      const int64_t end = std::min<int64_t>(begin + 32, columns);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = begin; k < end; ++k) {
          auto& packed = tile[pairs ? k / 2 * 32 + r * 2 + k % 2 : k * kTileRows + r];
          auto& element = matrix[r * row_stride + k * column_stride];
          if constexpr (std::is_const_v<Void>)
            packed = element;
          else
            element = packed;
        }
    }
  }

  void move(bool pairs) const { pairs ? move<true>() : move<false>(); }
};

template <typename T, typename Void>
void move_dense(const PackedHeader& header, const PackedMatrix& m, OfBlock<Void, std::byte>* block,
                const FactoredMatrix<Void>& f, const ParallelFor& parallel_for) {
  const bool pairs = header.dtype == Dtype::bfloat16;
  const int64_t rows = m.rows, columns = m.columns;
  const auto move_matrices = [&](Void* tensors, int64_t part, int64_t count) {
    parallel_for(count * m.tiles(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const TileRows own = rows_of(m, i % m.tiles());
        auto* matrix = tensor<Void, T>(tensors) + (i / m.tiles() * rows + own.first) * columns;
        auto* tile = at<T>(block, part + i * tile_bytes(columns, header.dtype));
        Tile<Void, T>{tile, matrix, columns, 1, own.count, columns}.move(pairs);
      }
    });
  };
  if (m.base != 0 && !m.base_payload.is_coded()) move_matrices(f.base, m.base, header.groups);
  if (m.is_full() && !m.values_payload.is_coded()) move_matrices(f.values, m.values, header.experts);
  if (m.rank_offsets == 0) return;
  const auto* offsets = at<int32_t>(block, m.rank_offsets);
  const auto* v_starts = at<int64_t>(block, m.v_starts);
  const auto* u_starts = at<int64_t>(block, m.u_starts);
  parallel_for(header.experts, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t first = offsets[e], rank = offsets[e + 1] - first;
      for (int64_t i = 0; !m.v_payload.is_coded() && i < tiles_of(rank); ++i) {
        auto* matrix = tensor<Void, T>(f.v) + (first + i * kTileRows) * columns;
        auto* tile = at<T>(block, m.v + v_starts[e] + i * tile_bytes(columns, header.dtype));
        const int64_t count = std::min(kTileRows, rank - i * kTileRows);
        Tile<Void, T>{tile, matrix, columns, 1, count, columns}.move(pairs);
      }
      for (int64_t i = 0; !m.u_payload.is_coded() && rank != 0 && i < m.tiles(); ++i) {
        const TileRows own = rows_of(m, i);
        auto* matrix = tensor<Void, T>(f.u) + first * rows + own.first;
        auto* tile = at<T>(block, m.u + u_starts[e] + i * tile_bytes(rank, header.dtype));
        Tile<Void, T>{tile, matrix, 1, rows, own.count, rank}.move(pairs);
      }
    }
  });
}

// ---- biases: float32 in the block. Moved as bits, because a conversion in hardware changes NaNs.

uint32_t widen(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::float32) return bits;
  if (dtype == Dtype::bfloat16) return bits << 16;
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 31) return sign | 0x7f800000u | mantissa << 13;
  if (exponent == 0) return sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f);
  return sign | (exponent + 112) << 23 | mantissa << 13;
}

uint32_t narrow(uint32_t bits, Dtype dtype) {  // of what widen returned
  if (dtype == Dtype::float32) return bits;
  if (dtype == Dtype::bfloat16) return bits >> 16;
  const uint32_t sign = bits >> 16 & 0x8000u, exponent = bits >> 23 & 255u, mantissa = bits >> 13 & 0x3ffu;
  if (exponent == 255) return sign | 0x7c00u | mantissa;
  if (exponent < 113) {
    const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
    return sign | static_cast<uint32_t>(magnitude * 0x1p24f);
  }
  return sign | (exponent - 112) << 10 | mantissa;
}

template <typename T, typename Void>
void move_bias(const PackedHeader& header, const PackedMatrix& m, OfBlock<Void, std::byte>* block,
               const FactoredMatrix<Void>& f) {
  if (m.bias == 0) return;
  for (int64_t i = 0; i < header.experts * m.tiles(); ++i) {
    const TileRows own = rows_of(m, i % m.tiles());
    auto* packed = at<uint32_t>(block, m.bias) + i * kTileRows;
    auto* bias = tensor<Void, T>(f.bias) + i / m.tiles() * m.rows + own.first;
    if constexpr (std::is_const_v<Void>) std::fill_n(packed, kTileRows, 0u);
    for (int64_t r = 0; r < own.count; ++r)
      if constexpr (std::is_const_v<Void>)
        packed[r] = widen(bias[r], header.dtype);
      else
        bias[r] = static_cast<T>(narrow(packed[r], header.dtype));
  }
}

// ---- a whole layer

template <typename T>
void pack_layer(const Factored<const void>& from, const PackedHeader& header, std::byte* block,
                const ParallelFor& parallel_for) {
  if (header.group != 0) std::memcpy(block + header.group, from.group, static_cast<size_t>(from.experts) * 4);
  for (const bool down : {false, true}) {
    const PackedMatrix& m = down ? header.down : header.gate_up;
    const FactoredMatrix<const void>& f = down ? from.down : from.gate_up;
    if (m.rank_offsets != 0) {
      auto* offsets = at<int32_t>(block, m.rank_offsets);
      std::memcpy(offsets, f.rank_offsets, static_cast<size_t>(from.experts + 1) * 4);
      auto *v_starts = at<int64_t>(block, m.v_starts), *u_starts = at<int64_t>(block, m.u_starts);
      v_starts[0] = u_starts[0] = 0;
      for (int64_t e = 0; e < from.experts; ++e) {
        v_starts[e + 1] = v_starts[e] + v_bytes(m, offsets[e + 1] - offsets[e], from.dtype);
        u_starts[e + 1] = u_starts[e] + u_bytes(m, offsets[e + 1] - offsets[e], from.dtype);
      }
    }
    pack_sparse(header, m, down ? "down" : "gate_up", block, f, parallel_for);
    pack_codes(header, m, down ? "down" : "gate_up", block, f, parallel_for);
    move_dense<T>(header, m, block, f, parallel_for);
    move_bias<T>(header, m, block, f);
  }
}

template <typename T>
void unpack_layer(const PackedHeader& header, const std::byte* block, const Factored<void>& to,
                  const ParallelFor& parallel_for) {
  if (header.group != 0) std::memcpy(to.group, block + header.group, static_cast<size_t>(to.experts) * 4);
  for (const bool down : {false, true}) {
    const PackedMatrix& m = down ? header.down : header.gate_up;
    const FactoredMatrix<void>& f = down ? to.down : to.gate_up;
    if (m.rank_offsets != 0)
      std::memcpy(f.rank_offsets, block + m.rank_offsets, static_cast<size_t>(to.experts + 1) * 4);
    unpack_sparse(header, m, block, f, parallel_for);
    unpack_codes(header, m, block, f, parallel_for);
    move_dense<T>(header, m, block, f, parallel_for);
    move_bias<T>(header, m, block, f);
  }
}

}  // namespace

int64_t packed_bytes(const Factored<const void>& from) { return lay_out(from).header.bytes; }

void pack(const Factored<const void>& from, void* block, const ParallelFor& parallel_for) {
  const Layout layout = lay_out(from);
  auto* bytes = static_cast<std::byte*>(block);
  for (const int64_t end : layout.ends) {
    const int64_t aligned = (end + kAlignment - 1) / kAlignment * kAlignment;
    std::memset(bytes + end, 0, static_cast<size_t>(aligned - end));
  }
  std::memset(bytes + layout.header.bytes - kSlack, 0, kSlack);
  std::memcpy(bytes, &layout.header, sizeof(PackedHeader));
  from.dtype == Dtype::float32 ? pack_layer<uint32_t>(from, layout.header, bytes, parallel_for)
                               : pack_layer<uint16_t>(from, layout.header, bytes, parallel_for);
}

const PackedHeader& check_packed(const void* block, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(block);
  if (address % kAlignment != 0)
    refuse("packed: must begin at a multiple of ", kAlignment, " bytes, got one ", address % kAlignment,
           " bytes behind; clone the tensor");
  const auto* header = static_cast<const PackedHeader*>(block);
  if (bytes < static_cast<int64_t>(sizeof(PackedHeader)) || header->magic != kPackedMagic)
    refuse("packed: must be a block that resmoe::pack returned, got ", bytes,
           " bytes of something else; make one with PackedExperts.pack");
  if (header->version != kPackedVersion)
    refuse("packed: must have version ", kPackedVersion, ", got ", header->version,
           "; pack the checkpoint's tensors again");
  if (header->bytes != bytes)
    refuse("packed: must be whole, ", header->bytes, " bytes, got ", bytes,
           "; make one with PackedExperts.pack");
  return *header;
}

Factored<const void> packed_sizes(const void* block) {
  const auto& header = *static_cast<const PackedHeader*>(block);
  const auto part = [&](int64_t offset) -> const void* {
    return offset == 0 ? nullptr : static_cast<const std::byte*>(block) + offset;
  };
  Factored<const void> sizes;
  sizes.experts = header.experts;
  sizes.hidden = header.hidden;
  sizes.intermediate = header.intermediate;
  sizes.groups = header.groups;
  sizes.dtype = header.dtype;
  sizes.gated = header.gated != 0;
  sizes.group = part(header.group);
  for (const bool down : {false, true}) {
    const PackedMatrix& m = down ? header.down : header.gate_up;
    FactoredMatrix<const void>& f = down ? sizes.down : sizes.gate_up;
    f.rank_offsets = part(m.rank_offsets);
    f.mask = part(m.mask);
    f.bias = part(m.bias);
    if (m.is_full()) f.values = part(m.values);
    f.base_payload = m.base_payload, f.u_payload = m.u_payload;
    f.v_payload = m.v_payload, f.values_payload = m.values_payload;
    f.block_kept = m.block_kept;
    f.row_offset_size = m.row_offset_size;
    if (m.rank_offsets != 0) f.ranks = at<int32_t>(block, m.rank_offsets)[header.experts];
    if (m.mask != 0) f.nnz = at<int64_t>(block, m.tile_starts)[header.experts * m.tiles()];
  }
  return sizes;
}

void unpack(const void* block, const Factored<void>& to, const ParallelFor& parallel_for) {
  const auto* bytes = static_cast<const std::byte*>(block);
  const auto& header = *static_cast<const PackedHeader*>(block);
  header.dtype == Dtype::float32 ? unpack_layer<uint32_t>(header, bytes, to, parallel_for)
                                 : unpack_layer<uint16_t>(header, bytes, to, parallel_for);
}

}  // namespace resmoe
