// Products with coded tiles (payload.h), for every instruction set. Included by kernels.inl.
//
// A Step that multiplies them has
//     kCodeRows          rows that meet Lines made in registers at a time
//     kCodeBlocks<bits>  such blocks of rows at most: for more rows Lines are made once, in scratch
//     Codes<bits>        kParts of a unit, of kLines lines each, and
//     line<i>(part)      the i-th of these lines, of c - (2^bits - 1) / 2: no weight is rounded
//
// The products of a group of columns are summed, and their sum times the group's scale is added to out:
// sums of at most 128 columns, and one rounding a group and row for the scale.

// Columns whose lines are in scratch at a time: 4 tiles of 64-byte lines are 32 KiB.
inline constexpr int64_t kCodeColumns = 256;
inline constexpr int64_t kCodeUnits = kCodeColumns / kUnitColumns;

template <int n, class Visit>
inline __attribute__((always_inline)) void each(const Visit& visit) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (visit.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, n>{});
}

// How far ahead of its use a line of a coded tile is asked for. With one thread of a Zen 5 that read 36 to 38 GB/s,
// tiles of 4 bits (2 bits) in four streams were multiplied at 24 GB/s (21) with 512 bytes, 27 (23) with 1 KiB, 29 (24)
// with 2 KiB and 29 (20) with 4 KiB; and at 33 (31) once the end of a tile asked for the tile after it.
inline constexpr int64_t kCodePrefetchBytes = 2048;

// Where kTiles coded tiles are read: scales of the group, or null, and units; where they end, and what is read
// after them. A tile of u is often shorter than what is asked for ahead: the end of one tile asks for the next.
template <int kTiles>
struct CodeTiles {
  const uint16_t* scales[kTiles];
  const std::byte* units[kTiles];
  const std::byte* end[kTiles];
  const std::byte* after[kTiles];

  void ask(int j, const std::byte* ahead) const {
    prefetch(ahead < end[j] ? ahead : after[j] + (ahead - end[j]));
  }
};

// out[i][16 j ...] += scale sum[i][j], or += sum[i][j].
template <int kRows, int kTiles>
inline __attribute__((always_inline)) void add_group(const Lanes::Floats (&sum)[kRows][kTiles],
                                                     const uint16_t* const* scales, float* const* out,
                                                     int64_t column) {
  for (int j = 0; j < kTiles; ++j) {
    const Lanes::Floats scale = scales[j] == nullptr ? Lanes::set(1.0f) : Lanes::load_bfloat16(scales[j]);
    for (int i = 0; i < kRows; ++i) {
      float* const to = out[i] + column + 16 * j;
      Lanes::store(to, Lanes::fma(scale, sum[i][j], Lanes::load(to)));
    }
  }
}

// `units` units of kTiles tiles with kRows rows, lines made in registers.
template <class Step, int bits, int kRows, int kTiles>
void code_block(CodeTiles<kTiles> at, int64_t units, int64_t group_units, const void* const* x,
                float* const* out, int64_t column, bool asks) {
  using Codes = typename Step::template Codes<bits>;
  const void* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = x[i];
  int64_t step = 0;
  // A dot waits for the one before it: where sums are few, those of even and of odd lines are kept apart. For one
  // row in cache 94 became 119 GMAC/s at 4 bits and 99 became 131 at 2 (Zen 5); four sums a tile gave no more.
  constexpr int kChains = kRows * kTiles <= 8 ? 2 : 1;
  for (int64_t begin = 0; begin < units; begin += group_units) {
    Lanes::Floats sum[kChains][kRows][kTiles];
    for (int c = 0; c < kChains; ++c)
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTiles; ++j) sum[c][i][j] = Lanes::set(0.0f);
    const int64_t parts = Codes::kParts * least(group_units, units - begin);
    for (int64_t part = 0; part < parts; ++part) {
      for (int j = 0; asks && j < kTiles; ++j)
        for (int64_t b = 0; b < Codes::kBytes; b += 64) at.ask(j, at.units[j] + kCodePrefetchBytes + b);
      each<Codes::kLines>([&]<int line>() {
        typename Step::Line lines[kTiles];
        for (int j = 0; j < kTiles; ++j) lines[j] = Codes::template line<line>(at.units[j]);
        for (int i = 0; i < kRows; ++i) {
          const typename Step::Pair pair = Step::pair(row[i], step + line);
          auto& to = sum[line % kChains][i];
          for (int j = 0; j < kTiles; ++j) to[j] = Step::dot(to[j], lines[j], pair);
        }
      });
      step += Codes::kLines;
      for (int j = 0; j < kTiles; ++j) at.units[j] += Codes::kBytes;
    }
    for (int c = 1; c < kChains; ++c)
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTiles; ++j) sum[0][i][j] = Lanes::add(sum[0][i][j], sum[c][i][j]);
    add_group<kRows, kTiles>(sum[0], at.scales, out, column);
    for (int j = 0; j < kTiles; ++j)
      if (at.scales[j] != nullptr) at.scales[j] += kTileRows;
  }
}

template <class Step, int bits, int kTiles, int kRows = Step::kCodeRows>
inline void code_block_of_rows(int64_t rows, const CodeTiles<kTiles>& at, int64_t units, int64_t group_units,
                               const void* const* x, float* const* out, int64_t column, bool asks) {
  if (rows == kRows) return code_block<Step, bits, kRows, kTiles>(at, units, group_units, x, out, column, asks);
  if constexpr (kRows > 1)
    code_block_of_rows<Step, bits, kTiles, kRows - 1>(rows, at, units, group_units, x, out, column, asks);
}

// The lines of `units` units of kTiles tiles to scratch, kCodeUnits units for each tile.
template <class Step, int bits, int kTiles>
void expand_codes(const CodeTiles<kTiles>& at, int64_t units, std::byte* scratch) {
  using Codes = typename Step::template Codes<bits>;
  for (int64_t part = 0; part < units * Codes::kParts; ++part)
    for (int j = 0; j < kTiles; ++j) {
      const std::byte* const from = at.units[j] + part * Codes::kBytes;
      for (int64_t b = 0; b < Codes::kBytes; b += 64) at.ask(j, from + kCodePrefetchBytes + b);
      std::byte* const to = scratch + (j * kCodeUnits * kUnitLines + part * Codes::kLines) * Step::kBytes;
      each<Codes::kLines>(
          [&]<int line>() { Step::store(to + line * Step::kBytes, Codes::template line<line>(from)); });
    }
}

// The same as code_block for lines in scratch; `first` is their first unit's place in a row of x.
template <class Step, int kRows, int kTiles>
void line_block(const std::byte* lines, const uint16_t* const* scales, int64_t first, int64_t units,
                int64_t group_units, const void* const* x, float* const* out, int64_t column) {
  const void* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = x[i];
  const uint16_t* scale[kTiles];
  for (int j = 0; j < kTiles; ++j) scale[j] = scales[j];
  for (int64_t begin = 0; begin < units; begin += group_units) {
    Lanes::Floats sum[kRows][kTiles];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kTiles; ++j) sum[i][j] = Lanes::set(0.0f);
    const int64_t end = least(begin + group_units, units) * kUnitLines;
    for (int64_t s = begin * kUnitLines; s < end; ++s) {
      typename Step::Line line[kTiles];
      for (int j = 0; j < kTiles; ++j)
        line[j] = Step::load(lines + (j * kCodeUnits * kUnitLines + s) * Step::kBytes);
      for (int i = 0; i < kRows; ++i) {
        const typename Step::Pair pair = Step::pair(row[i], first * kUnitLines + s);
        for (int j = 0; j < kTiles; ++j) sum[i][j] = Step::dot(sum[i][j], line[j], pair);
      }
    }
    add_group<kRows, kTiles>(sum, scale, out, column);
    for (int j = 0; j < kTiles; ++j)
      if (scale[j] != nullptr) scale[j] += kTileRows;
  }
}

template <class Step, int kTiles, int kRows = Step::kRows>
inline void line_block_of_rows(int64_t rows, const std::byte* lines, const uint16_t* const* scales,
                               int64_t first, int64_t units, int64_t group_units, const void* const* x,
                               float* const* out, int64_t column) {
  if (rows == kRows)
    return line_block<Step, kRows, kTiles>(lines, scales, first, units, group_units, x, out, column);
  if constexpr (kRows > 1)
    line_block_of_rows<Step, kTiles, kRows - 1>(rows, lines, scales, first, units, group_units, x, out, column);
}

// kTiles coded tiles of a panel, from its tile `first` on. m rows in blocks of nearly equal height.
template <class Step, int bits, int kTiles>
void multiply_code_tiles(const Panel& panel, int64_t first, const void* const* x, float* const* out, int64_t m,
                         const Panel* next, std::byte* scratch) {
  const int64_t units = units_of(panel.columns), column = kTileRows * first;
  // Without scales (u) the sums are cut all the same: long ones in float32 would lose what codes keep.
  const int64_t group_units = panel.payload.group == 0 ? 4 : panel.payload.group / kUnitColumns;
  CodeTiles<kTiles> at;
  for (int j = 0; j < kTiles; ++j) {
    const std::byte* const tile = panel.values[first + j];
    at.scales[j] = panel.payload.group == 0 ? nullptr : reinterpret_cast<const uint16_t*>(tile);
    at.units[j] = tile + scale_bytes(panel.columns, panel.payload);
    at.end[j] = at.after[j] = tile + panel.tile_bytes;
    if (next != nullptr && next->tiles > 0) at.after[j] = next->values[least(first + j, next->tiles - 1)];
  }
  const auto blocks_of = [&](int64_t rows_a_block, const auto& visit) {
    const int64_t count = (m + rows_a_block - 1) / rows_a_block;
    for (int64_t b = 0, i = 0; b < count; ++b) {
      const int64_t rows = m / count + (b < m % count);
      visit(b, rows, x + i, out + i);
      i += rows;
    }
  };
  if (m <= Step::template kCodeBlocks<bits> * Step::kCodeRows)
    return blocks_of(Step::kCodeRows, [&](int64_t b, int64_t rows, const void* const* x_of, float* const* out_of) {
      code_block_of_rows<Step, bits, kTiles>(rows, at, units, group_units, x_of, out_of, column, b == 0);
    });
  for (int64_t begin = 0; begin < units; begin += kCodeUnits) {
    const int64_t width = least(units - begin, kCodeUnits);
    expand_codes<Step, bits, kTiles>(at, width, scratch);
    blocks_of(Step::kRows, [&](int64_t, int64_t rows, const void* const* x_of, float* const* out_of) {
      line_block_of_rows<Step, kTiles>(rows, scratch, at.scales, begin, width, group_units, x_of, out_of, column);
    });
    for (int j = 0; j < kTiles; ++j) {
      at.units[j] += kCodeUnits * 64 * bits;
      if (at.scales[j] != nullptr) at.scales[j] += kCodeUnits / group_units * kTileRows;
    }
  }
}

template <class Step, int bits>
void multiply_codes_of(const Panel& panel, const void* const* x, float* const* out, int64_t m,
                       const Panel* next, std::byte* scratch) {
  for (int64_t first = 0; first < panel.tiles;) {
    const int64_t left = panel.tiles - first;
    if constexpr (Step::kTiles >= 4) {
      if (left >= 4) {
        multiply_code_tiles<Step, bits, 4>(panel, first, x, out, m, next, scratch);
        first += 4;
        continue;
      }
    }
    if constexpr (Step::kTiles >= 2) {
      if (left >= 2) {
        multiply_code_tiles<Step, bits, 2>(panel, first, x, out, m, next, scratch);
        first += 2;
        continue;
      }
    }
    multiply_code_tiles<Step, bits, 1>(panel, first, x, out, m, next, scratch);
    first += 1;
  }
}

template <class Step>
void multiply_codes(const Panel& panel, const void* const* x, float* const* out, int64_t m, const Panel* next,
                    std::byte* scratch) {
  switch (panel.payload.bits) {
    case 8:
      return multiply_codes_of<Step, 8>(panel, x, out, m, next, scratch);
    case 4:
      return multiply_codes_of<Step, 4>(panel, x, out, m, next, scratch);
    case 3:
      return multiply_codes_of<Step, 3>(panel, x, out, m, next, scratch);
    case 2:
      return multiply_codes_of<Step, 2>(panel, x, out, m, next, scratch);
  }
}
