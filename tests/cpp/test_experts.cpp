// The driver of the expert layer: right against a plain loop in double, the same bits on any number of
// threads, one after the other or all at once, and from several callers. On the chosen instruction set and on
// emulated AMX. Runs under ThreadSanitizer too.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "experts.h"

namespace resmoe {
const Kernels* kernels_amx_emulated(Dtype weight, Operand operand);
}

using resmoe::Activation;
using resmoe::Dtype;
using resmoe::ExpertsCall;
using resmoe::Factored;
using resmoe::Kernels;
using resmoe::Operand;
using resmoe::PackedHeader;

namespace {

struct Shape {
  const char* name;
  int64_t experts, hidden, intermediate, groups;
  bool gated, low_rank, sparse;
  int32_t bits = 0;  // of every part but the biases, where they are codes: groups of 32, and a full residual
};

// More than one panel of 64 in every direction, and nothing a multiple of a tile in the first two.
constexpr Shape kShapes[] = {
    {"everything", 5, 150, 77, 2, true, true, true},
    {"ungated", 4, 77, 150, 1, false, true, false},
    {"dense", 6, 128, 64, 6, true, false, false},
    {"no base", 3, 64, 96, 0, true, true, true},
    {"codes of 4 bits", 5, 150, 77, 2, true, true, false, 4},
    {"codes of 3 bits", 3, 77, 150, 1, false, true, false, 3},
};

// Numbers as the elements of a tensor: float32, or bfloat16 which they must fit.
class Elements {
 public:
  Elements(const std::vector<float>& numbers, Dtype dtype) {
    for (const float number : numbers) {
      unsigned char bytes[4];
      std::memcpy(bytes, &number, 4);
      bytes_.insert(bytes_.end(), dtype == Dtype::float32 ? bytes : bytes + 2, bytes + 4);  // little-endian
    }
  }
  void* data() { return bytes_.data(); }

 private:
  std::vector<unsigned char> bytes_;
};

// Towards zero is good enough for inputs. Not `float32 ? number : masked`: GCC 12.2 then drops the mask.
float rounded(float number, Dtype dtype) {
  const uint32_t mask = dtype == Dtype::float32 ? 0xffffffff : 0xffff0000;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(number) & mask);
}

// Numbers as codes, stored as payload.h says, with one scale for a row or for 32 columns; they become what the codes
// stand for.
struct Codes {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales;

  Codes(std::vector<float>& numbers, size_t row_length, resmoe::Payload payload) {
    const auto padded = (row_length + 31) / 32 * 32, bits = static_cast<size_t>(payload.bits);
    const float middle = static_cast<float>((1 << bits) - 1) / 2;
    for (size_t row = 0; row < numbers.size(); row += row_length) {
      std::vector<uint8_t> own(padded, 0);
      for (size_t begin = 0; begin < row_length; begin += payload.group == 0 ? row_length : 32) {
        const size_t end = payload.group == 0 ? row_length : std::min(begin + 32, row_length);
        float largest = 0;
        for (size_t c = begin; c < end; ++c) largest = std::max(largest, std::abs(numbers[row + c]));
        const float scale = rounded(largest / middle, Dtype::bfloat16);
        scales.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(scale) >> 16));
        for (size_t c = begin; c < end; ++c) {
          const float code = scale == 0 ? 0 : std::round(numbers[row + c] / scale + middle);
          own[c] = static_cast<uint8_t>(std::clamp(code, 0.0f, 2 * middle));
          numbers[row + c] = scale * (static_cast<float>(own[c]) - middle);
        }
      }
      codes.resize(codes.size() + padded * bits / 8);
      for (size_t c = 0; c < padded; c += 32)
        resmoe::store_unit(payload.bits, own.data() + c,
                           codes.data() + codes.size() - (padded - c) * bits / 8);
    }
  }
};

// A layer in the checkpoint form, and packed.
class Layer {
 public:
  Layer(const Shape& shape, Dtype dtype) : shape_(shape), dtype_(dtype) {
    std::vector<std::unique_ptr<Elements>> kept;
    std::vector<std::unique_ptr<Codes>> coded;
    const auto elements = [&](const std::vector<float>& numbers) {
      kept.push_back(std::make_unique<Elements>(numbers, dtype));
      return kept.back()->data();
    };
    Factored<const void> f;
    f.experts = shape.experts, f.hidden = shape.hidden, f.intermediate = shape.intermediate;
    f.groups = shape.groups, f.dtype = dtype, f.gated = shape.gated;
    for (int64_t e = 0; e < shape.experts; ++e)  // with a base, the last expert of the first form has none
      group_.push_back(
          e == 4 && shape.groups == 2 ? -1 : static_cast<int32_t>(e % std::max<int64_t>(shape.groups, 1)));
    if (shape.groups > 0) f.group = group_.data();
    for (const bool down : {false, true}) {
      auto& from = down ? f.down : f.gate_up;
      auto& tensors = down ? down_ : gate_up_;
      const auto rows = static_cast<size_t>(f.rows(down)), columns = static_cast<size_t>(f.columns(down));
      tensors.base =
          normal(static_cast<size_t>(shape.groups) * rows * columns, 1 / std::sqrt(float(columns)));
      from.base = elements(tensors.base);
      const auto code = [&](std::vector<float>& numbers, size_t row_length, resmoe::Payload payload,
                            const void*& codes, const void*& scales, resmoe::Payload& its_payload) {
        if (shape.bits == 0) return;
        coded.push_back(std::make_unique<Codes>(numbers, row_length, payload));
        codes = coded.back()->codes.data(), scales = coded.back()->scales.data(), its_payload = payload;
      };
      const resmoe::Payload grouped{shape.bits, 32}, a_rank{shape.bits, 0};
      code(tensors.base, columns, grouped, from.base, from.base_scales, from.base_payload);
      if (shape.bits != 0) {
        tensors.full = normal(static_cast<size_t>(shape.experts) * rows * columns, 1 / std::sqrt(float(columns)));
        code(tensors.full, columns, grouped, from.values, from.values_scales, from.values_payload);
      }
      tensors.bias = normal(static_cast<size_t>(shape.experts) * rows, 0.3f);
      from.bias = elements(tensors.bias);
      if (shape.low_rank) {
        tensors.rank_offsets = {0};
        for (int64_t e = 0; e < shape.experts; ++e)  // none, more than a panel, odd, a tile
          tensors.rank_offsets.push_back(tensors.rank_offsets.back() + (e == 0   ? 0
                                                                        : e == 1 ? 83
                                                                        : e == 2 ? 7
                                                                                 : 16));
        from.ranks = tensors.rank_offsets.back();
        tensors.u = normal(static_cast<size_t>(from.ranks) * rows, 0.3f);
        tensors.v = normal(static_cast<size_t>(from.ranks) * columns, 1 / std::sqrt(float(columns)));
        from.rank_offsets = tensors.rank_offsets.data(), from.u = elements(tensors.u),
        from.v = elements(tensors.v);
        code(tensors.u, rows, a_rank, from.u, from.u_scales, from.u_payload);
        code(tensors.v, columns, grouped, from.v, from.v_scales, from.v_payload);
      }
      if (shape.sparse) {
        const size_t words = (columns + 31) / 32;
        tensors.mask.assign(static_cast<size_t>(shape.experts) * rows * words, 0);
        tensors.row_offsets = {0};
        for (size_t row = 0; row < static_cast<size_t>(shape.experts) * rows; ++row) {
          for (size_t c = 0; c < columns; ++c) {
            if (generator_() % 4 != 0) continue;
            tensors.mask[row * words + c / 32] |= uint32_t{1} << c % 32;
            tensors.values.push_back(normal(1, 1 / std::sqrt(float(columns)))[0]);
          }
          tensors.row_offsets.push_back(static_cast<int64_t>(tensors.values.size()));
        }
        from.mask = tensors.mask.data(), from.values = elements(tensors.values);
        from.row_offsets = tensors.row_offsets.data(), from.row_offset_size = 8;
        from.nnz = static_cast<int64_t>(tensors.values.size());
      }
    }
    const int64_t bytes = resmoe::packed_bytes(f);
    block_.reset(
        static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64))));
    resmoe::pack(f, block_.get(),
                 [](int64_t count, const std::function<void(int64_t, int64_t)>& body) { body(0, count); });
  }

  const PackedHeader& packed() const { return *reinterpret_cast<const PackedHeader*>(block_.get()); }
  const Shape& shape() const { return shape_; }
  Dtype dtype() const { return dtype_; }
  int32_t group(int64_t expert) const {
    return shape_.groups == 0 ? -1 : group_[static_cast<size_t>(expert)];
  }

  // W_e x, summed in double from the checkpoint form.
  std::vector<double> product(bool down, int64_t expert, const std::vector<double>& x) const {
    const auto& t = down ? down_ : gate_up_;
    const size_t rows = t.bias.size() / static_cast<size_t>(shape_.experts), columns = x.size();
    std::vector<double> y(rows, 0.0);
    const auto e = static_cast<size_t>(expert);
    for (size_t r = 0; group(expert) >= 0 && r < rows; ++r)
      for (size_t c = 0; c < columns; ++c)
        y[r] += double(t.base[(static_cast<size_t>(group(expert)) * rows + r) * columns + c]) * x[c];
    for (int32_t k = shape_.low_rank ? t.rank_offsets[e] : 0; shape_.low_rank && k < t.rank_offsets[e + 1];
         ++k) {
      double s = 0;
      for (size_t c = 0; c < columns; ++c) s += double(t.v[static_cast<size_t>(k) * columns + c]) * x[c];
      for (size_t r = 0; r < rows; ++r) y[r] += double(t.u[static_cast<size_t>(k) * rows + r]) * s;
    }
    for (size_t r = 0; shape_.sparse && r < rows; ++r) {
      auto at = static_cast<size_t>(t.row_offsets[e * rows + r]);
      for (size_t c = 0; c < columns; ++c)
        if (t.mask[(e * rows + r) * ((columns + 31) / 32) + c / 32] >> c % 32 & 1)
          y[r] += double(t.values[at++]) * x[c];
    }
    for (size_t r = 0; shape_.bits != 0 && r < rows; ++r)
      for (size_t c = 0; c < columns; ++c) y[r] += double(t.full[(e * rows + r) * columns + c]) * x[c];
    for (size_t r = 0; r < rows; ++r) y[r] += double(t.bias[e * rows + r]);
    return y;
  }

 private:
  std::vector<float> normal(size_t count, float scale) {
    std::vector<float> numbers(count);
    for (float& number : numbers)
      number = rounded(scale * std::normal_distribution<float>()(generator_), dtype_);
    return numbers;
  }

  struct Free {
    void operator()(std::byte* block) const { std::free(block); }
  };
  struct Tensors {
    std::vector<float> base, bias, u, v, values, full;
    std::vector<int32_t> rank_offsets;
    std::vector<uint32_t> mask;
    std::vector<int64_t> row_offsets;
  };
  Shape shape_;
  Dtype dtype_;
  std::mt19937 generator_{7};
  std::vector<int32_t> group_;
  Tensors gate_up_, down_;
  std::unique_ptr<std::byte, Free> block_;
};

struct Inputs {
  int64_t tokens, top_k;
  std::vector<float> x, weights;
  std::vector<int64_t> index;

  Inputs(const Layer& layer, int64_t tokens_, uint32_t seed) : tokens(tokens_), top_k(3) {
    const Shape& shape = layer.shape();
    std::mt19937 generator(seed);
    x.resize(static_cast<size_t>(tokens * shape.hidden));
    for (float& number : x) number = rounded(std::normal_distribution<float>()(generator), layer.dtype());
    for (int64_t s = 0; s < tokens * top_k; ++s) {
      // Sometimes nobody's id, sometimes one that repeats within a token.
      index.push_back(static_cast<int64_t>(generator() % static_cast<uint32_t>(shape.experts + 2)) - 1);
      weights.push_back(std::uniform_real_distribution<float>(-0.2f, 1)(generator));
    }
  }
};

void one_after_the_other(int64_t participants, void (*body)(void*), void* context) {
  for (int64_t i = 0; i < participants; ++i) body(context);
}

void all_at_once(int64_t participants, void (*body)(void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < participants; ++i) threads.emplace_back(body, context);
  body(context);
  for (std::thread& thread : threads) thread.join();
}

std::vector<float> run(const Layer& layer, const Inputs& in, const Kernels& kernels, int64_t threads,
                       resmoe::Parallel parallel) {
  Elements x(in.x, layer.dtype()), y(std::vector<float>(in.x.size(), std::nanf("")), layer.dtype());
  const ExpertsCall call{
      x.data(), layer.shape().hidden, layer.dtype(), in.index.data(), true, in.weights.data(), in.tokens,
      in.top_k, Activation::silu,     y.data()};
  resmoe::experts_packed(layer.packed(), call, kernels, threads, parallel);
  std::vector<float> numbers(in.x.size());
  const Dtype dtype = layer.dtype();
  for (size_t i = 0; i < numbers.size(); ++i) {
    const size_t size = dtype == Dtype::float32 ? 4 : 2;
    unsigned char bytes[4] = {};
    std::memcpy(bytes + 4 - size, static_cast<unsigned char*>(y.data()) + i * size, size);
    std::memcpy(&numbers[i], bytes, 4);
  }
  return numbers;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_against_double(const Layer& layer, const Inputs& in, const std::vector<float>& got) {
  const auto hidden = static_cast<size_t>(layer.shape().hidden),
             inner = static_cast<size_t>(layer.shape().intermediate);
  double error = 0, scale = 0;
  for (size_t t = 0; t < static_cast<size_t>(in.tokens); ++t) {
    std::vector<double> y(hidden, 0.0);
    const std::vector<double> x(in.x.begin() + static_cast<int64_t>(t * hidden),
                                in.x.begin() + static_cast<int64_t>((t + 1) * hidden));
    for (size_t s = t * 3; s < t * 3 + 3; ++s) {
      if (in.index[s] < 0 || in.index[s] >= layer.shape().experts) continue;
      const std::vector<double> z = layer.product(false, in.index[s], x);
      std::vector<double> h(inner);
      for (size_t i = 0; i < inner; ++i)
        h[i] = z[i] / (1 + std::exp(-z[i])) * (layer.shape().gated ? z[inner + i] : 1);
      const std::vector<double> out = layer.product(true, in.index[s], h);
      for (size_t r = 0; r < hidden; ++r) y[r] += double(in.weights[s]) * out[r];
    }
    for (size_t r = 0; r < hidden; ++r) {
      const double here = std::abs(y[r] - double(got[t * hidden + r]));
      if (std::isnan(here) || here > error) error = here;  // NaN, of a row that was not written, stays
      scale = std::max(scale, std::abs(y[r]));
    }
  }
  // In bfloat16 the output alone is off by 2^-9 of it, and each of s, h and sum w h by as much of itself.
  const double allowed = layer.dtype() == Dtype::float32 ? 1e-6 : 1e-2;
  CHECK(error <= allowed * scale, "%s: error %g of %g", layer.shape().name, error, scale);
}

void test_threads(const Layer& layer, const Kernels& kernels) {
  for (const int64_t tokens : {1, 9, 40, 1100}) {  // one, a few, many, and more than are worked on at once
    const Inputs in(layer, tokens, static_cast<uint32_t>(tokens));
    const std::vector<float> alone = run(layer, in, kernels, 1, one_after_the_other);
    check_against_double(layer, in, alone);
    for (const int64_t threads : {2, 3, 7}) {
      CHECK(same(alone, run(layer, in, kernels, threads, one_after_the_other)),
            "%s: %ld participants in turn", layer.shape().name, threads);
      CHECK(same(alone, run(layer, in, kernels, threads, all_at_once)), "%s: %ld threads", layer.shape().name,
            threads);
    }
  }
}

void test_callers(const Layer& layer, const Kernels& kernels) {
  std::vector<Inputs> inputs;
  std::vector<std::vector<float>> expected, got(4);
  for (uint32_t i = 0; i < 4; ++i) {
    inputs.emplace_back(layer, 5 + 20 * i, i);
    expected.push_back(run(layer, inputs[i], kernels, 1, one_after_the_other));
  }
  std::vector<std::thread> callers;
  for (size_t i = 0; i < 4; ++i)
    callers.emplace_back([&, i] { got[i] = run(layer, inputs[i], kernels, 2, all_at_once); });
  for (std::thread& caller : callers) caller.join();
  for (size_t i = 0; i < 4; ++i) CHECK(same(got[i], expected[i]), "caller %zu", i);
}

void test_no_tokens(const Layer& layer, const Kernels& kernels) {
  const Inputs in(layer, 0, 0);
  CHECK(run(layer, in, kernels, 2, all_at_once).empty(), "something came of nothing");
}

void test(const char* name, Dtype dtype, const Kernels* kernels) {
  if (kernels == nullptr) return;  // bfloat16 operands, which this instruction set does not have
  const int before = failures;
  for (const Shape& shape : kShapes) {
    const Layer layer(shape, dtype);
    test_threads(layer, *kernels);
    test_callers(layer, *kernels);
    test_no_tokens(layer, *kernels);
  }
  std::printf("experts on %s: %d failures\n", name, failures - before);
}

}  // namespace

int main() {
  const resmoe::Isa isa = resmoe::chosen();
  test(resmoe::name(isa), Dtype::float32, resmoe::kernels(isa, Dtype::float32, Operand::float32));
  test(resmoe::name(isa), Dtype::bfloat16, resmoe::kernels(isa, Dtype::bfloat16, Operand::float32));
  test(resmoe::name(isa), Dtype::bfloat16, resmoe::kernels(isa, Dtype::bfloat16, Operand::bfloat16));
#ifdef RESMOE_EMULATE_AMX
  if (resmoe::supported(resmoe::Isa::avx512_bf16))
    test("emulated amx", Dtype::bfloat16, resmoe::kernels_amx_emulated(Dtype::bfloat16, Operand::bfloat16));
#endif
  return failures == 0 ? 0 : 1;
}
