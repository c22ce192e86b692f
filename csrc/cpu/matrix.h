// The panels of a packed matrix.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace resmoe {

// One matrix of a layer: where its panels are.
class Matrix {
 public:
  Matrix(const PackedHeader& header, const PackedMatrix& matrix)
      : block_(reinterpret_cast<const std::byte*>(&header)), dtype_(header.dtype), m_(matrix) {}

  bool has_base() const { return m_.base != 0; }
  bool has_low_rank() const { return m_.u != 0; }
  bool is_sparse() const { return m_.mask != 0; }

  int64_t rank(int64_t expert) const {
    if (!has_low_rank()) return 0;
    const auto* offsets = part<int32_t>(m_.rank_offsets);
    return offsets[expert + 1] - offsets[expert];
  }

  // Bias of an expert from a row tile on, or null.
  const float* bias(int64_t expert, int64_t tile) const {
    return m_.bias == 0 ? nullptr : part<float>(m_.bias) + (expert * m_.tiles() + tile) * kTileRows;
  }

  // Panels over the rows of the matrix: `count` tiles from `first` on, in every half.
  Panel base(int64_t group, int64_t first, int64_t count) const {
    const int64_t bytes = tile_bytes(m_.columns, dtype_);
    return dense(part(m_.base) + group * m_.tiles() * bytes, m_.columns, first, count);
  }
  Panel u(int64_t expert, int64_t first, int64_t count) const {
    return dense(part(m_.u) + part<int64_t>(m_.u_starts)[expert], rank(expert), first, count);
  }
  // onto_group >= 0: with that group's base under it.
  Panel sparse(int64_t expert, int64_t first, int64_t count, int64_t onto_group = -1) const {
    Panel panel{m_.columns};
    const int64_t words = even(m_.columns) / 2, bytes = tile_bytes(m_.columns, dtype_);
    for_tiles(first, count, [&](int64_t tile) {
      if (onto_group >= 0) panel.base[panel.tiles] = part(m_.base) + (onto_group * m_.tiles() + tile) * bytes;
      const int64_t at = expert * m_.tiles() + tile;
      panel.values[panel.tiles] = part(m_.values) + part<int64_t>(m_.tile_starts)[at] * size_of(dtype_);
      panel.masks[panel.tiles++] = part<uint32_t>(m_.mask) + at * words;
    });
    return panel;
  }
  // A panel over the ranks of an expert: tiles [first, first + 4) of its V.
  Panel v(int64_t expert, int64_t first) const {
    Panel panel{m_.columns};
    const std::byte* tiles = part(m_.v) + part<int64_t>(m_.v_starts)[expert];
    const int64_t end = std::min(first + kPanelTiles, tiles_of(rank(expert)));
    for (int64_t tile = first; tile < end; ++tile)
      panel.values[panel.tiles++] = tiles + tile * tile_bytes(m_.columns, dtype_);
    return panel;
  }

 private:
  template <typename T = std::byte>
  const T* part(int64_t offset) const {
    return reinterpret_cast<const T*>(block_ + offset);
  }
  template <typename Visit>
  void for_tiles(int64_t first, int64_t count, const Visit& visit) const {
    for (int64_t half = 0; half < m_.halves; ++half)
      for (int64_t tile = first; tile < first + count; ++tile) visit(half * m_.half_tiles + tile);
  }
  Panel dense(const std::byte* tiles, int64_t columns, int64_t first, int64_t count) const {
    Panel panel{columns};
    for_tiles(first, count, [&](int64_t tile) {
      panel.values[panel.tiles++] = tiles + tile * tile_bytes(columns, dtype_);
    });
    return panel;
  }

  const std::byte* block_;
  Dtype dtype_;
  const PackedMatrix& m_;
};

}  // namespace resmoe
