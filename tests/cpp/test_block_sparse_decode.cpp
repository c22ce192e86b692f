// The block-sparse kernels on the emulation of CUDA, against plain loops in double: every order of threads
// and every arrival of copies must give the same bits.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/block_sparse_scatter.cuh"
#include "cuda/block_sparse_walk.cuh"
#include "plain_activation.h"

namespace {

using namespace resmoe::cuda;
using resmoe::emulation::Config;

float number(__nv_bfloat16 value) { return __bfloat162float(value); }
float number(__half value) { return __half2float(value); }

struct Case {
  enum Routing { random, one_expert, in_turns, skipping, nothing, twice, every };

  int tokens = 2, top_k = 2, experts = 5, hidden = 160, inner = 96, kept_gate_up = 8, kept_down = 8;
  bool gated = true, has_base = true, broken_masks = false;
  std::vector<int> group{0, 0, 0, 0, 0};
  Routing routing = random;
  Function function = Function::silu;

  int rows() const { return (gated ? 2 : 1) * inner; }

  // The expert of each (token, slot); anything outside [0, experts) skips it.
  std::vector<int64_t> index() const {
    std::mt19937 generator(7);
    std::vector<int64_t> chosen;
    for (int t = 0; t < tokens; ++t) {
      const auto first = static_cast<int64_t>(generator() % static_cast<unsigned>(experts));
      for (int j = 0; j < top_k; ++j) {
        switch (routing) {
          case random:
            chosen.push_back((first + j) % experts);
            break;
          case one_expert:
            chosen.push_back(experts - 1);
            break;
          case in_turns:
            chosen.push_back((2 * t + 1) % experts);
            break;
          case skipping:
            chosen.push_back((t + j) % 3 == 0 ? (t % 2 == 0 ? -1 : int64_t{1} << 32) : first);
            break;
          case nothing:
            chosen.push_back(experts + t);
            break;
          case twice:
            chosen.push_back(j == 1 ? first : (t + j) % experts);
            break;
          case every:
            chosen.push_back(t * top_k + j < experts ? t * top_k + j : -1);
            break;
        }
      }
    }
    return chosen;
  }
};

// What a matrix is made of; `rows` of it for each expert, and of the base.
template <typename T>
struct Matrix {
  int rows, columns, kept;
  std::vector<T> base, values;
  std::vector<uint32_t> mask;

  Matrix(const Case& c, int rows_, int columns_, int kept_, std::mt19937& generator)
      : rows(rows_), columns(columns_), kept(kept_) {
    std::normal_distribution<float> normal(0.0F, 1.0F / std::sqrt(static_cast<float>(columns)));
    const auto many = [&](int n) {
      return static_cast<size_t>(c.experts * rows * (columns / 32)) * static_cast<size_t>(n);
    };
    for (int at = 0; at < rows * columns; ++at) base.push_back(from_float<T>(normal(generator)));
    for (size_t at = 0; at < many(1); ++at) {
      int places[32];
      for (int c32 = 0; c32 < 32; ++c32) places[c32] = c32;
      std::shuffle(places, places + 32, generator);
      uint32_t word = 0;
      for (int k = 0; k < kept; ++k) word |= 1U << places[k];
      mask.push_back(c.broken_masks ? static_cast<uint32_t>(generator() & generator()) : word);
    }
    for (size_t at = 0; at < many(kept); ++at) values.push_back(from_float<T>(2 * normal(generator)));
    base.shrink_to_fit();  // AddressSanitizer knows where memory ends, not vectors
    mask.shrink_to_fit();
    values.shrink_to_fit();
  }

  BlockSparseMatrix pointers(bool has_base) const {
    return {has_base ? base.data() : nullptr, mask.data(), values.data(), kept};
  }

  std::vector<double> product(int expert, bool with_base, const std::vector<double>& x) const {
    std::vector<double> out(static_cast<size_t>(rows));
    for (int n = 0; n < rows; ++n) {
      double sum = 0;
      for (int k = 0; k < columns; ++k) {
        if (with_base)
          sum += static_cast<double>(number(base[static_cast<size_t>(n * columns + k)])) *
                 x[static_cast<size_t>(k)];
      }
      for (int word = 0; word < columns / 32; ++word) {
        const auto at = static_cast<size_t>((expert * rows + n) * (columns / 32) + word);
        auto value = at * static_cast<size_t>(kept);
        for (int bit = 0; bit < 32; ++bit) {
          if ((mask[at] >> bit & 1) != 0)
            sum += static_cast<double>(number(values[value++])) * x[static_cast<size_t>(32 * word + bit)];
        }
      }
      out[static_cast<size_t>(n)] = sum;
    }
    return out;
  }
};

// A layer in memory, a call of it, and what must come out.
template <typename T>
struct Layer {
  std::mt19937 generator{20251206};
  std::vector<T> x, y;
  std::vector<int64_t> index;
  std::vector<int32_t> index_32;
  std::vector<T> weights;
  Matrix<T> gate_up, down;
  std::vector<uint8_t> workspace;
  BlockSparseCall call{};

  explicit Layer(const Case& c)
      : index(c.index()),
        gate_up(c, c.rows(), c.hidden, c.kept_gate_up, generator),
        down(c, c.hidden, c.inner, c.kept_down, generator) {
    std::normal_distribution<float> normal(0.0F, 1.0F);
    std::uniform_real_distribution<float> uniform(0.1F, 1.0F);
    for (int at = 0; at < c.tokens * c.hidden; ++at) x.push_back(from_float<T>(normal(generator)));
    for (int at = 0; at < c.tokens * c.top_k; ++at) weights.push_back(from_float<T>(uniform(generator)));
    for (const int64_t id : index) index_32.push_back(id == int64_t{1} << 32 ? -7 : static_cast<int32_t>(id));
    x.shrink_to_fit();
    y.resize(x.size());
    call.element = std::is_same_v<T, __half> ? Element::float16 : Element::bfloat16;
    call.x = x.data();
    call.index_is_64 = c.function == Function::silu;
    call.top_k_index = call.index_is_64 ? static_cast<const void*>(index.data()) : index_32.data();
    call.top_k_weights = weights.data();
    call.weights_type = std::is_same_v<T, __half> ? Real::float16 : Real::bfloat16;
    call.tokens = c.tokens;
    call.top_k = c.top_k;
    call.experts = c.experts;
    call.hidden = c.hidden;
    call.inner = c.inner;
    call.gated = c.gated;
    call.function = c.function;
    call.group = c.has_base ? c.group.data() : nullptr;
    call.gate_up = gate_up.pointers(c.has_base);
    call.down = down.pointers(c.has_base);
    const size_t bytes = block_sparse::workspace_of(call).bytes;
    workspace.resize(bytes + 256);
    call.workspace = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256) % 256;
    call.y = y.data();
  }

  std::vector<double> expected(const Case& c) const {
    std::vector<double> out(y.size());
    for (int t = 0; t < c.tokens; ++t) {
      std::vector<double> token;
      for (int k = 0; k < c.hidden; ++k) token.push_back(number(x[static_cast<size_t>(t * c.hidden + k)]));
      for (int j = 0; j < c.top_k; ++j) {
        const int64_t id = index[static_cast<size_t>(t * c.top_k + j)];
        if (id < 0 || id >= c.experts) continue;
        const bool with_base = c.has_base && c.group[static_cast<size_t>(id)] >= 0;
        const auto z = gate_up.product(static_cast<int>(id), with_base, token);
        std::vector<double> h;
        for (int n = 0; n < c.inner; ++n) {
          const auto at = static_cast<size_t>(n);
          h.push_back(applied(c.function, z[at]) * (c.gated ? z[at + static_cast<size_t>(c.inner)] : 1.0));
        }
        const auto from_expert = down.product(static_cast<int>(id), with_base, h);
        for (int n = 0; n < c.hidden; ++n) {
          out[static_cast<size_t>(t * c.hidden + n)] +=
              static_cast<double>(number(weights[static_cast<size_t>(t * c.top_k + j)])) *
              from_expert[static_cast<size_t>(n)];
        }
      }
    }
    return out;
  }

  // y, bit by bit. A second launch finds the first one's workspace, flag apart.
  std::vector<uint16_t> run(bool walk, const Config& config, unsigned blocks) {
    namespace bs = block_sparse;
    const auto kernel = walk               ? bs::walk_kernel<T>
                        : call.tokens <= 8 ? bs::scatter_kernel<T, 1>
                                           : bs::scatter_kernel<T, 2>;
    const size_t shared = walk ? bs::walk_bytes(call, bs::kStages) : bs::scatter_bytes(call, bs::kStages);
    std::vector<uint16_t> bits[2];
    workspace.assign(workspace.size(), 0xFF);  // NaN until it is written
    for (auto& of_launch : bits) {
      std::memset(call.workspace, 0, sizeof(uint32_t));
      std::memset(static_cast<void*>(y.data()), 0xFF, y.size() * 2);
      const auto counts =
          resmoe::emulation::launch(config, kernel, dim3(blocks), dim3(kThreads), shared, call);
      CHECK(counts.bank_conflicts == 0, "%llu", static_cast<unsigned long long>(counts.bank_conflicts));
      of_launch.resize(y.size());
      std::memcpy(of_launch.data(), y.data(), y.size() * 2);
    }
    CHECK(bits[0] == bits[1], "the second launch");
    return bits[1];
  }
};

template <typename T>
void check_way(const std::string& name, const Case& c, bool walk) {
  Layer<T> layer(c);
  const std::vector<uint16_t> first = layer.run(walk, Config{}, 3);
  if (!c.broken_masks) {
    const std::vector<double> expected = layer.expected(c);
    double largest = 0, worst = 0;
    for (size_t at = 0; at < expected.size(); ++at) {
      largest = std::max(largest, std::abs(expected[at]));
      const double y = number(layer.y[at]);
      CHECK(std::isfinite(y), "%s, element %zu", name.c_str(), at);
      worst = std::max(worst, std::abs(y - expected[at]));
    }
    std::printf("%s: error %.5f of the largest output\n", name.c_str(),
                largest > 0 ? worst / largest : worst);
    // w h, their sum and y are rounded: 2^-9 each in bfloat16, 2^-12 in float16.
    CHECK(worst <= (std::is_same_v<T, __half> ? 0.001 : 0.008) * largest, "%s: %g of %g", name.c_str(), worst,
          largest);
  }
  unsigned blocks = 1;
  for (const Config& config : resmoe::emulation::configs(1)) {
    CHECK(layer.run(walk, config, blocks) == first, "%s: %u blocks", name.c_str(), blocks);
    blocks = blocks % 4 + 1;
  }
}

void check_case(const std::string& name, const Case& c) {
  if (failures != 0) return;  // one case's say enough
  if (c.tokens <= 2) check_way<__nv_bfloat16>(name + ", walked", c, true);
  check_way<__nv_bfloat16>(name + ", spread", c, false);
}

}  // namespace

int main() {
  check_case("all", {});
  check_case("one token", {.tokens = 1, .top_k = 3});
  check_case("a tile of tokens", {.tokens = 5, .top_k = 3});
  check_case("two tiles of tokens", {.tokens = 13});
  for (const int n : {4, 12, 16}) {
    const std::string name = std::to_string(n) + " of 32";
    check_case(name, {.kept_gate_up = n, .kept_down = n});
    check_case(name + ", rows of 16 bytes",
               {.hidden = 128, .inner = 128, .kept_gate_up = n, .kept_down = 20 - n});
  }
  check_case("long rows", {.hidden = 2176, .inner = 32});
  check_case("long rows of down", {.tokens = 3, .hidden = 32, .inner = 1152});
  check_case("rows of one word", {.hidden = 32, .inner = 32});
  check_case("no base", {.has_base = false});
  check_case("experts without the base", {.group = {0, -1, 0, -1, -1}});
  check_case("experts without the base, more tokens", {.tokens = 6, .group = {0, -1, 0, -1, -1}});
  check_case("no gate", {.gated = false});
  check_case("no gate, no base", {.tokens = 9, .gated = false, .has_base = false});
  check_case("one expert", {.routing = Case::one_expert});
  check_case("two experts", {.tokens = 4, .top_k = 1, .experts = 4, .routing = Case::in_turns});
  check_case("three experts", {.tokens = 3, .top_k = 1, .routing = Case::in_turns});
  check_case(
      "many experts",
      {.top_k = 10, .experts = 20, .inner = 32, .group = std::vector<int>(20), .routing = Case::every});
  check_case("skipped slots", {.routing = Case::skipping});
  check_case("skipped slots, more tokens", {.tokens = 6, .routing = Case::skipping});
  check_case("nothing routed", {.routing = Case::nothing});
  check_case("nothing routed, no base", {.tokens = 3, .has_base = false, .routing = Case::nothing});
  check_case("one expert twice", {.top_k = 3, .routing = Case::twice});
  check_case("one expert twice, more tokens", {.tokens = 5, .top_k = 3, .routing = Case::twice});
  check_case("masks that break the rule", {.broken_masks = true});
  for (const Function f :
       {Function::gelu, Function::gelu_tanh, Function::relu, Function::relu2, Function::identity}) {
    check_case("function " + std::to_string(static_cast<int>(f)), {.hidden = 32, .inner = 64, .function = f});
  }
  check_way<__half>("float16, walked", {}, true);
  check_way<__half>("float16, spread", {.tokens = 4}, false);
  return failures == 0 ? 0 : 1;
}
