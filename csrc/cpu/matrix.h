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
  bool is_full() const { return m_.is_full(); }
  bool has_coded_base() const { return m_.base_payload.is_coded(); }

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
    return dense(m_.base, group, m_.base_payload, first, count);
  }
  Panel full(int64_t expert, int64_t first, int64_t count) const {
    return dense(m_.values, expert, m_.values_payload, first, count);
  }
  Panel u(int64_t expert, int64_t first, int64_t count) const {
    return dense(part(m_.u) + part<int64_t>(m_.u_starts)[expert], m_.u_payload, rank(expert), first, count);
  }
  // One scale a rank of an expert, bfloat16, or null where u has none.
  const uint16_t* u_scales(int64_t expert) const {
    return m_.u_scales == 0 ? nullptr
                            : part<uint16_t>(m_.u_scales) + part<int32_t>(m_.rank_offsets)[expert];
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
    Panel panel{m_.columns, 0, m_.v_payload, tile_bytes(m_.columns, dtype_, m_.v_payload)};
    const std::byte* tiles = part(m_.v) + part<int64_t>(m_.v_starts)[expert];
    const int64_t end = std::min(first + kPanelTiles, tiles_of(rank(expert)));
    for (int64_t tile = first; tile < end; ++tile)
      panel.values[panel.tiles++] = tiles + tile * panel.tile_bytes;
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
  Panel dense(const std::byte* tiles, Payload payload, int64_t columns, int64_t first, int64_t count) const {
    Panel panel{columns, 0, payload, tile_bytes(columns, dtype_, payload)};
    for_tiles(first, count,
              [&](int64_t tile) { panel.values[panel.tiles++] = tiles + tile * panel.tile_bytes; });
    return panel;
  }
  // Of matrix `index` of those that begin at an offset.
  Panel dense(int64_t offset, int64_t index, Payload payload, int64_t first, int64_t count) const {
    const int64_t bytes = m_.tiles() * tile_bytes(m_.columns, dtype_, payload);
    return dense(part(offset) + index * bytes, payload, m_.columns, first, count);
  }

  const std::byte* block_;
  Dtype dtype_;
  const PackedMatrix& m_;
};

}  // namespace resmoe
