// The persistent low-rank kernel on the emulation of CUDA, against plain loops in double: every order of
// threads and every arrival of copies must give the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/low_rank_decode.cuh"
#include "low_rank_case.h"

namespace {

using namespace resmoe::cuda;
using resmoe::emulation::Config;

std::vector<uint16_t> run(const Case& c, const Config& config, unsigned blocks) {
  Memory memory(c);
  const Workspace at = workspace_of(memory.call);
  std::vector<uint16_t> before;
  for (int launch = 0; launch < 2; ++launch) {  // the second finds the first one's workspace, flags apart
    before = memory.y;
    std::memset(memory.workspace.data() + at.flags, 0, at.flag_bytes);
    std::fill(memory.y.begin(), memory.y.end(), uint16_t{0xFFFF});
    const auto kernel =
        c.tokens <= 8 ? low_rank_decode_kernel<__nv_bfloat16, 1> : low_rank_decode_kernel<__nv_bfloat16, 2>;
    const auto counts = resmoe::emulation::launch(config, kernel, dim3(blocks), dim3(kThreads),
                                                  shared_bytes(kStages), memory.call);
    CHECK(counts.bank_conflicts == 0, "%llu", static_cast<unsigned long long>(counts.bank_conflicts));
  }
  CHECK(memory.y == before, "the second launch");
  return memory.y;
}

void check_case(const std::string& name, const Case& c) {
  if (failures != 0) return;  // one case's say enough
  const std::vector<double> expected = c.expected();
  double largest = 0;
  for (const double y : expected) largest = std::max(largest, std::abs(y));
  const std::vector<uint16_t> first = run(c, Config{}, 3);
  double worst = 0;
  for (size_t at = 0; at < expected.size(); ++at) {
    worst =
        std::max(worst, std::abs(bfloat16(first[at]) - expected[at]));  // NaN: a place that was not written
    CHECK(std::isfinite(bfloat16(first[at])), "%s, element %zu", name.c_str(), at);
  }
  std::printf("%s: error %.4f of the largest output\n", name.c_str(), largest > 0 ? worst / largest : worst);
  CHECK(worst <= 0.01 * largest, "%s: %g of %g", name.c_str(), worst,
        largest);  // c, w h, their sum and y are rounded to bfloat16, 0.004 each
  unsigned blocks = 1;
  for (const Config& config : resmoe::emulation::configs(1)) {
    CHECK(run(c, config, blocks) == first, "%s: %u blocks", name.c_str(),
          blocks);  // any number of blocks, too
    blocks = blocks % 4 + 1;
  }
}

}  // namespace

int main() {
  const std::vector<int> ragged{16, 0, 5, 33, 70, 8};
  check_case("all", {});
  check_case("one token", {.tokens = 1});
  check_case("two tiles of tokens", {.tokens = 13});
  check_case("ragged ranks", {.ranks_gate_up = ragged, .ranks_down = {8, 70, 0, 16, 33, 5}});
  check_case("no base", {.has_base = false});
  check_case("experts without the base", {.group = {0, -1, 0, -1, -1, 0}});
  check_case("no low rank", {.ranks_gate_up = {}, .ranks_down = {}});
  check_case("low rank in one matrix", {.ranks_down = {}});
  check_case("no gate", {.gated = false});
  check_case("one expert", {.routing = Case::one_expert});
  check_case("two experts", {.tokens = 2, .top_k = 1, .routing = Case::in_turns});
  check_case("three experts", {.tokens = 3, .top_k = 1, .routing = Case::in_turns});
  check_case(
      "experts beside some that are not hit",
      {.tokens = 3, .top_k = 1, .ranks_gate_up = ragged, .ranks_down = ragged, .routing = Case::in_turns});
  check_case("more experts than lanes", {.tokens = 12,
                                         .experts = 40,
                                         .hidden = 32,
                                         .inner = 16,
                                         .group = std::vector<int>(40),
                                         .ranks_gate_up = std::vector<int>(40, 8),
                                         .ranks_down = std::vector<int>(40, 40),
                                         .routing = Case::every});
  check_case("skipped slots", {.routing = Case::skipping});
  check_case("nothing routed", {.routing = Case::nothing});
  check_case("one expert twice", {.routing = Case::twice});
  check_case("sizes that are no multiple of a chunk", {.hidden = 96, .inner = 80});
  check_case("several chunks in a row", {.tokens = 3, .top_k = 1, .hidden = 1120, .inner = 16});
  check_case("several chunks in a row of down", {.tokens = 9, .top_k = 1, .hidden = 32, .inner = 592});
  for (const Function f :
       {Function::gelu, Function::gelu_tanh, Function::relu, Function::relu2, Function::identity}) {
    check_case("function " + std::to_string(static_cast<int>(f)), {.tokens = 2, .function = f});
  }
  return failures == 0 ? 0 : 1;
}
