// What packing and unpacking share: refusals, typed places in a block, the rows of a tile.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "../packed.h"

namespace resmoe {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

inline constexpr int64_t kWordColumns = 32;  // of a word of a checkpoint's mask

constexpr int64_t words_of(int64_t columns) { return (columns + kWordColumns - 1) / kWordColumns; }

// A place in a block, `offset` bytes from its start.
template <typename T, typename Byte>
auto* at(Byte* block, int64_t offset) {
  if constexpr (std::is_const_v<Byte>)
    return reinterpret_cast<const T*>(static_cast<const std::byte*>(block) + offset);
  else
    return reinterpret_cast<T*>(static_cast<std::byte*>(block) + offset);
}

// The rows of its matrix that a tile holds.
struct TileRows {
  int64_t first, count;
};

inline TileRows rows_of(const PackedMatrix& m, int64_t tile) {
  const int64_t half_rows = m.rows / m.halves;
  const int64_t within = tile % m.half_tiles * kTileRows;
  return {tile / m.half_tiles * half_rows + within, std::min(kTileRows, half_rows - within)};
}

// Masks, values and tile_starts of one matrix, from a checkpoint's sparse part and back; nothing where it has
// none. `name` is the matrix's, for messages. pack_sparse throws as pack does.
void pack_sparse(const PackedHeader& header, const PackedMatrix& m, const char* name, std::byte* block,
                 const FactoredMatrix<const void>& f, const ParallelFor& parallel_for);
void unpack_sparse(const PackedHeader& header, const PackedMatrix& m, const std::byte* block,
                   const FactoredMatrix<void>& f, const ParallelFor& parallel_for);

// The coded tensors of one matrix, from a checkpoint's order to that of tiles and back; nothing where there are
// none. pack_codes throws as pack does.
void pack_codes(const PackedHeader& header, const PackedMatrix& m, const char* name, std::byte* block,
                const FactoredMatrix<const void>& f, const ParallelFor& parallel_for);
void unpack_codes(const PackedHeader& header, const PackedMatrix& m, const std::byte* block,
                  const FactoredMatrix<void>& f, const ParallelFor& parallel_for);

}  // namespace resmoe
