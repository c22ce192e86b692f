// The arithmetic of kernels.h, written once over what an instruction set calls a vector. Included by
// kernels_<isa>.cpp inside its anonymous namespace, after `Lanes` and its steps are defined there: no code of
// one instruction set may be shared with, and so run on, a machine of another.
//
// Lanes: 16 float32 in whatever registers there are.
//     Floats             the type
//     load, store        16 float32, unaligned
//     set(float)         all lanes
//     add sub mul div fma(a, b, c) = a b + c
//     min, max           the second argument where either is NaN
//     round              to the nearest integer
//     times_power(x, n)  x 2^n, infinite past the range; n integral within [-151, 151]
//     where_negative(z, a, b)   a where z < 0, else b
//     load_bfloat16, store_bfloat16, load_float16, store_float16
//                        16 elements, to nearest even, NaN stays NaN
//
// Step: how two columns of a tile meet two elements of an operand.
//     weight, operand    their types
//     kRows, kTiles      rows x tiles whose sums fit into the registers
//     kBytes             of two columns of a dense tile
//     Line               two columns of a tile in registers
//     load(bytes)        a Line of a dense tile
//     expand(values, mask)   a Line of a sparse tile: value after value to the set bits
//     store(bytes, line)     the inverse of load
//     kBaseCost              Kernels::base_cost; where it is not 0:
//     add(line, line)        the sum, rounded to the type of the weights
//     Pair, pair(x, step)    two elements of an operand for all lanes
//     dot(sum, line, pair)   sum + line . pair
//     Coded              the Step that multiplies coded tiles, see kernels_codes.inl

// ((c0 x + c1) x + c2) x + ...
template <typename... Coefficients>
inline Lanes::Floats polynomial(Lanes::Floats x, float first, Coefficients... rest) {
  Lanes::Floats p = Lanes::set(first);
  ((p = Lanes::fma(p, x, Lanes::set(rest))), ...);
  return p;
}

// exp(x) as 2^n exp(r), |r| <= ln 2 / 2; below 1.3 ulp of float32 wherever the result is normal. The
// polynomial is the Taylor series to r^7, whose rest is below 6e-9 there.
inline Lanes::Floats exponential(Lanes::Floats x) {
  x = Lanes::max(Lanes::set(-104.0f), Lanes::min(Lanes::set(104.0f), x));
  const Lanes::Floats n = Lanes::round(Lanes::mul(x, Lanes::set(1.44269504f)));
  Lanes::Floats r =
      Lanes::fma(n, Lanes::set(-0.693145752f), x);  // ln 2 in two parts, the first with 12 bits to spare
  r = Lanes::fma(n, Lanes::set(-1.42860677e-6f), r);
  return Lanes::times_power(
      polynomial(r, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f), n);
}

// erfc(y) for y >= 0 as exp(-y^2) t P(t), t = 1 / (1 + y / 2). P is a least-squares fit of ours in relative
// error over y in [0, 10], reweighted towards the largest: 4.3e-8 before rounding.
inline Lanes::Floats erfc_of_positive(Lanes::Floats y) {
  const Lanes::Floats t = Lanes::div(Lanes::set(1.0f), Lanes::fma(y, Lanes::set(0.5f), Lanes::set(1.0f)));
  const Lanes::Floats p = polynomial(t, -0.0590642020f, 0.284553379f, -0.487158597f, 0.278023839f,
                                     -0.0265985727f, 0.202676564f, 0.243106082f, 0.282375038f, 0.282086432f);
  return Lanes::mul(Lanes::mul(p, t), exponential(Lanes::mul(Lanes::sub(Lanes::set(0.0f), y), y)));
}

template <Activation activation>
inline Lanes::Floats act(Lanes::Floats z) {
  const Lanes::Floats one = Lanes::set(1.0f), zero = Lanes::set(0.0f);
  if constexpr (activation == Activation::silu) {
    return Lanes::div(z, Lanes::add(one, exponential(Lanes::sub(zero, z))));
  } else if constexpr (activation == Activation::gelu) {
    const Lanes::Floats y = Lanes::mul(Lanes::max(Lanes::sub(zero, z), z), Lanes::set(0.707106781f));
    const Lanes::Floats tail = erfc_of_positive(y);
    const Lanes::Floats twice = Lanes::where_negative(z, tail, Lanes::sub(Lanes::set(2.0f), tail));
    return Lanes::mul(Lanes::mul(z, Lanes::set(0.5f)), twice);
  } else if constexpr (activation == Activation::gelu_tanh) {
    // 0.5 z (1 + tanh u) = z / (1 + exp(-2 u)),  u = sqrt(2 / pi) (z + 0.044715 z^3)
    const Lanes::Floats inner = Lanes::fma(Lanes::mul(z, z), Lanes::set(0.044715f), one);
    const Lanes::Floats u2 = Lanes::mul(Lanes::mul(z, inner), Lanes::set(-1.59576912f));
    return Lanes::div(z, Lanes::add(one, exponential(u2)));
  } else if constexpr (activation == Activation::relu) {
    return Lanes::max(zero, z);
  } else if constexpr (activation == Activation::relu2) {
    const Lanes::Floats r = Lanes::max(zero, z);
    return Lanes::mul(r, r);
  } else {
    return z;
  }
}

template <Operand operand>
inline void store_operand(void* to, int64_t c, Lanes::Floats value) {
  if constexpr (operand == Operand::bfloat16) {
    Lanes::store_bfloat16(static_cast<uint16_t*>(to) + c, value);
  } else {
    Lanes::store(static_cast<float*>(to) + c, value);
  }
}

template <Operand operand, Activation activation, bool gated>
void activate_rows(const float* z, int64_t z_stride, const float* w, void* const* h, float* const* sum,
                   int64_t m, int64_t n) {
  for (int64_t i = 0; i < m; ++i) {
    const float* row = z + i * z_stride;
    for (int64_t c = 0; c < n; c += 16) {
      Lanes::Floats value = act<activation>(Lanes::load(row + c));
      if constexpr (gated) value = Lanes::mul(value, Lanes::load(row + n + c));
      value = Lanes::mul(value, Lanes::set(w[i]));
      store_operand<operand>(h[i], c, value);
      if (sum != nullptr) Lanes::store(sum[i] + c, Lanes::add(Lanes::load(sum[i] + c), value));
    }
  }
}

template <Operand operand>
void activate(Activation activation, bool gated, const float* z, int64_t z_stride, const float* w,
              void* const* h, float* const* sum, int64_t m, int64_t n) {
  const auto rows = [&]<Activation a>() {
    (gated ? activate_rows<operand, a, true> : activate_rows<operand, a, false>)(z, z_stride, w, h, sum, m,
                                                                                 n);
  };
  switch (activation) {
    case Activation::silu:
      return rows.template operator()<Activation::silu>();
    case Activation::gelu:
      return rows.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return rows.template operator()<Activation::gelu_tanh>();
    case Activation::relu:
      return rows.template operator()<Activation::relu>();
    case Activation::relu2:
      return rows.template operator()<Activation::relu2>();
    case Activation::identity:
      return rows.template operator()<Activation::identity>();
  }
}

// ---- conversions

inline Lanes::Floats load_as_float(Dtype dtype, const void* from, int64_t c) {
  if (dtype == Dtype::float32) return Lanes::load(static_cast<const float*>(from) + c);
  const auto* halves = static_cast<const uint16_t*>(from) + c;
  return dtype == Dtype::bfloat16 ? Lanes::load_bfloat16(halves) : Lanes::load_float16(halves);
}

inline void store_as(Dtype dtype, void* to, int64_t c, Lanes::Floats value) {
  if (dtype == Dtype::float32) return Lanes::store(static_cast<float*>(to) + c, value);
  auto* halves = static_cast<uint16_t*>(to) + c;
  return dtype == Dtype::bfloat16 ? Lanes::store_bfloat16(halves, value)
                                  : Lanes::store_float16(halves, value);
}

// n elements from one type to another; the last, incomplete 16 go through a buffer.
inline void convert(Dtype from_dtype, const void* from, Dtype to_dtype, void* to, int64_t n) {
  const int64_t whole = n & ~int64_t{15};
  for (int64_t c = 0; c < whole; c += 16) store_as(to_dtype, to, c, load_as_float(from_dtype, from, c));
  if (whole == n) return;
  alignas(64) std::byte source[64] = {}, target[64];
  const auto bytes = [&](Dtype dtype, int64_t count) { return static_cast<size_t>(count * size_of(dtype)); };
  __builtin_memcpy(source, static_cast<const std::byte*>(from) + bytes(from_dtype, whole),
                   bytes(from_dtype, n - whole));
  store_as(to_dtype, target, 0, load_as_float(from_dtype, source, 0));
  __builtin_memcpy(static_cast<std::byte*>(to) + bytes(to_dtype, whole), target, bytes(to_dtype, n - whole));
}

template <Operand operand>
constexpr Dtype dtype_of() {
  return operand == Operand::bfloat16 ? Dtype::bfloat16 : Dtype::float32;
}

template <Operand operand>
void to_operand(const float* from, void* to, int64_t n) {
  convert(Dtype::float32, from, dtype_of<operand>(), to, n);
}

template <Operand operand>
void load_operand(Dtype dtype, const void* from, void* to, int64_t n) {
  if (dtype == dtype_of<operand>()) {
    __builtin_memcpy(to, from, static_cast<size_t>(n * size_of(dtype)));
  } else {
    convert(dtype, from, dtype_of<operand>(), to, n);
  }
}

inline void store_output(Dtype dtype, const float* from, void* to, int64_t n) {
  convert(Dtype::float32, from, dtype, to, n);
}

// ---- multiply

// How far ahead of its use a line is asked for, in each of the streams (one a tile). On Zen 4 with two
// threads 512 bytes gave 53 GB/s, 1 KiB 57 to 62, 4 KiB 45. Into the second-level cache: into the first it
// was 44 GB/s, and without asking, 33.
inline constexpr int64_t kPrefetchBytes = 1024;

// Columns that are multiplied with every row before the next ones are touched: 64 rows of them, 256 KiB of
// bfloat16, stay in the second-level cache.
inline constexpr int64_t kColumnBlock = 2048;

// Columns that are summed in one register before the sum is added to what `out` holds. The error of a sum of n
// terms one after another grows with n, that of sums of blocks with the block and the number of blocks.
inline constexpr int64_t kSumColumns = 256;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// What a block asks for while it reads its lines: nothing, because they are in the cache and so is the rest;
// the lines that it will read itself; or the first lines of what comes after it.
enum class Ask { nothing, own, after };

// Where the lines of a tile come from.
template <class Step>
struct Dense {
  const std::byte* tile;
  const std::byte* after;
  typename Step::Line next() {
    const auto line = Step::load(tile);
    tile += Step::kBytes;
    return line;
  }
  void ask_ahead(int64_t) const {
    for (int64_t b = 0; b < Step::kBytes; b += 64) prefetch(tile + kPrefetchBytes + b);
  }
  void ask_after(int64_t step) const {
    for (int64_t b = 0; b < Step::kBytes; b += 64) prefetch(after + step * Step::kBytes + b);
  }
};

template <class Step>
struct Sparse {
  const std::byte* values;
  const uint32_t* mask;
  typename Step::Line next() {
    const auto line = Step::expand(values, *mask);
    values += __builtin_popcount(*mask++) * size_of(Step::weight);
    return line;
  }
  // A step reads about 16 bytes of values and 4 of the mask, where 8 of 32 are kept.
  void ask_ahead(int64_t step) const {
    if (step % 4 != 0) return;
    prefetch(values + kPrefetchBytes);
    if (step % 16 == 0) prefetch(reinterpret_cast<const std::byte*>(mask) + kPrefetchBytes / 2);
  }
  void ask_after(int64_t) const {}
};

// out[i][16 j ...] += sum over `steps` pairs of columns, for kRows rows and kTiles tiles: the innermost loop.
// x0 is the first pair of columns of x that the sources stand at; what comes after has after_steps pairs.
template <class Step, class Source, int kRows, int kTiles, Ask kAsk>
inline __attribute__((always_inline)) void block(const Source* source, int64_t x0, int64_t steps,
                                                 int64_t after_steps, const void* const* x, float* const* out,
                                                 int64_t column) {
  Source at[kTiles];
  const void* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = x[i];
  for (int j = 0; j < kTiles; ++j) at[j] = source[j];
  for (int64_t s0 = x0; s0 < x0 + steps; s0 += kSumColumns / 2) {
    Lanes::Floats sum[kRows][kTiles];
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kTiles; ++j) sum[i][j] = Lanes::set(0.0f);
    for (int64_t s = s0; s < least(x0 + steps, s0 + kSumColumns / 2); ++s) {
      if constexpr (kAsk == Ask::after) {
        for (int j = 0; s - x0 < after_steps && j < kTiles; ++j) at[j].ask_after(s - x0);
      }
      typename Step::Line line[kTiles];
      for (int j = 0; j < kTiles; ++j) {
        if constexpr (kAsk == Ask::own) at[j].ask_ahead(s);
        line[j] = at[j].next();
      }
      for (int i = 0; i < kRows; ++i) {
        const typename Step::Pair pair = Step::pair(row[i], s);
        for (int j = 0; j < kTiles; ++j) sum[i][j] = Step::dot(sum[i][j], line[j], pair);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kTiles; ++j)
        Lanes::store(out[i] + column + 16 * j, Lanes::add(Lanes::load(out[i] + column + 16 * j), sum[i][j]));
  }
}

template <class Step, class Source, int kTiles, Ask kAsk, int kRows = Step::kRows>
inline void block_of_rows(int64_t rows, const Source* source, int64_t x0, int64_t steps, int64_t after_steps,
                          const void* const* x, float* const* out, int64_t column) {
  if (rows == kRows)
    return block<Step, Source, kRows, kTiles, kAsk>(source, x0, steps, after_steps, x, out, column);
  if constexpr (kRows > 1)
    block_of_rows<Step, Source, kTiles, kAsk, kRows - 1>(rows, source, x0, steps, after_steps, x, out,
                                                         column);
}

// m rows in blocks of nearly equal height. The first reads the weights from memory; while the second reads
// them from the cache, what comes after them is fetched.
template <class Step, int kTiles>
void dense_blocks(const Dense<Step>* source, int64_t x0, int64_t steps, int64_t after_steps,
                  const void* const* x, float* const* out, int64_t m, int64_t column) {
  using Source = Dense<Step>;
  const int64_t count = (m + Step::kRows - 1) / Step::kRows;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t rows = m / count + (b < m % count);
    if (b == 0) {
      block_of_rows<Step, Source, kTiles, Ask::own>(rows, source, x0, steps, 0, x, out, column);
    } else if (b == 1) {
      block_of_rows<Step, Source, kTiles, Ask::after>(rows, source, x0, steps, after_steps, x, out, column);
    } else {
      block_of_rows<Step, Source, kTiles, Ask::nothing>(rows, source, x0, steps, 0, x, out, column);
    }
    x += rows;
    out += rows;
  }
}

// kTiles tiles of a panel, from its tile `first` on.
template <class Step, int kTiles>
void multiply_tiles(const Panel& panel, int64_t first, const void* const* x, float* const* out, int64_t m,
                    const Panel* next, std::byte* scratch) {
  const int64_t steps = even(panel.columns) / 2, column = kTileRows * first;
  Sparse<Step> sparse[kTiles] = {};
  Dense<Step> dense[kTiles] = {};
  const bool is_sparse = panel.masks[0] != nullptr, onto_base = panel.base[0] != nullptr;
  for (int j = 0; j < kTiles; ++j) {
    if (is_sparse) sparse[j] = {panel.values[first + j], panel.masks[first + j]};
    dense[j] = {panel.values[first + j], nullptr};
  }
  if (is_sparse && !onto_base && m <= Step::kRows)
    return block_of_rows<Step, Sparse<Step>, kTiles, Ask::own>(m, sparse, 0, steps, 0, x, out, column);

  for (int64_t x0 = 0; x0 < steps; x0 += kColumnBlock / 2) {
    const int64_t width = least(steps - x0, kColumnBlock / 2);
    if (is_sparse) {
      for (int j = 0; j < kTiles; ++j) dense[j].tile = scratch + j * (kColumnBlock / 2) * Step::kBytes;
      for (int64_t s = 0; s < width; ++s) {
        for (int j = 0; j < kTiles; ++j) {
          sparse[j].ask_ahead(s);
          auto line = sparse[j].next();
          if constexpr (Step::kBaseCost > 0) {
            if (onto_base) {
              const std::byte* base = panel.base[first + j] + (x0 + s) * Step::kBytes;
              prefetch(base + kPrefetchBytes);
              line = Step::add(line, Step::load(base));
            }
          }
          Step::store(scratch + (j * (kColumnBlock / 2) + s) * Step::kBytes, line);
        }
      }
    }
    int64_t after_steps = 0;
    if (!is_sparse && x0 + width < steps) {
      after_steps = least(steps - x0 - width, width);
      for (int j = 0; j < kTiles; ++j) dense[j].after = dense[j].tile + width * Step::kBytes;
    } else if (next != nullptr && next->masks[0] == nullptr && next->tiles > 0) {
      after_steps = least(next->tile_bytes / Step::kBytes, width);
      for (int j = 0; j < kTiles; ++j) dense[j].after = next->values[least(first + j, next->tiles - 1)];
    }
    dense_blocks<Step, kTiles>(dense, x0, width, after_steps, x, out, m, column);
    for (int j = 0; j < kTiles; ++j) dense[j].tile += width * Step::kBytes;
  }
}

#include "kernels_codes.inl"

template <class Step>
void multiply(const Panel& panel, const void* const* x, float* const* out, int64_t m, const Panel* next,
              std::byte* scratch) {
  if (m == 0) return;
  if (panel.payload.is_coded()) return multiply_codes<typename Step::Coded>(panel, x, out, m, next, scratch);
  for (int64_t first = 0; first < panel.tiles;) {
    const int64_t left = panel.tiles - first;
    if constexpr (Step::kTiles >= 4) {
      if (left >= 4) {
        multiply_tiles<Step, 4>(panel, first, x, out, m, next, scratch);
        first += 4;
        continue;
      }
    }
    if constexpr (Step::kTiles >= 2) {
      if (left >= 2) {
        multiply_tiles<Step, 2>(panel, first, x, out, m, next, scratch);
        first += 2;
        continue;
      }
    }
    multiply_tiles<Step, 1>(panel, first, x, out, m, next, scratch);
    first += 1;
  }
  for (int64_t j = 0; next != nullptr && j < next->tiles; ++j) {
    for (int64_t b = 0; b < kPrefetchBytes; b += 64) prefetch(next->values[j] + b);
    for (int64_t b = 0; next->masks[0] != nullptr && b < kPrefetchBytes / 2; b += 64)
      prefetch(reinterpret_cast<const std::byte*>(next->masks[j]) + b);
  }
}

// The table of one Step.
template <class Step>
inline constexpr Kernels table = {
    Step::weight,
    Step::operand,
    multiply<Step>,
    Step::kTiles*(kColumnBlock / 2) * Step::kBytes,
    Step::kBaseCost,
    activate<Step::operand>,
    to_operand<Step::operand>,
    load_operand<Step::operand>,
    store_output,
};

// The table of a Step for weights of this type.
template <template <Dtype> class Step>
const Kernels* table_for(Dtype weight) {
  switch (weight) {
    case Dtype::bfloat16:
      return &table<Step<Dtype::bfloat16>>;
    case Dtype::float16:
      return &table<Step<Dtype::float16>>;
    case Dtype::float32:
      return &table<Step<Dtype::float32>>;
  }
  return nullptr;
}
