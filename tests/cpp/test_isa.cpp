// Which instruction set is chosen: by the machine, and by RESMOE_CPU_ISA.
#include "check.h"
#include "cpu/isa.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

using resmoe::Dtype;
using resmoe::Isa;
using resmoe::Operand;

namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

// The name chosen with RESMOE_CPU_ISA set to a text, or the sentence it is refused with.
std::string chosen_with(const char* wanted) {
  setenv("RESMOE_CPU_ISA", wanted, 1);
  try {
    return name(resmoe::chosen());
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

void the_best_is_chosen_unless_one_is_named() {
  unsetenv("RESMOE_CPU_ISA");
  CHECK(resmoe::chosen() == resmoe::best(), "%s", name(resmoe::chosen()));
  CHECK(chosen_with("") == name(resmoe::best()), "%s", chosen_with("").c_str());
  for (const Isa isa : kAll)
    if (supported(isa)) CHECK(chosen_with(name(isa)) == name(isa), "%s", chosen_with(name(isa)).c_str());
}

void what_is_not_there_is_refused() {
  std::string here;
  for (const Isa isa : kAll)
    if (supported(isa)) here += std::string(here.empty() ? "" : ", ") + name(isa);
  const auto refused = [&](const std::string& wanted) {
    return "RESMOE_CPU_ISA: must be one of the instruction sets of this CPU (" + here + "), got '" + wanted +
           "'; unset it to use the fastest";
  };
  for (const char* wanted : {"avx", "AVX2", "avx512 ", "portable,avx2", "native"})
    CHECK(chosen_with(wanted) == refused(wanted), "%s", chosen_with(wanted).c_str());
  for (const Isa isa : kAll)
    if (!supported(isa))
      CHECK(chosen_with(name(isa)) == refused(name(isa)), "%s", chosen_with(name(isa)).c_str());
}

#if defined(__x86_64__)
// The compiler's own reading of cpuid and of what the operating system saves.
void the_compiler_agrees() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  CHECK(supported(Isa::avx2) == avx2, "%d", avx2);
  CHECK(supported(Isa::avx512) == avx512, "%d", avx512);
  CHECK(supported(Isa::avx512_bf16) == avx512_bf16, "%d", avx512_bf16);
  CHECK(!supported(Isa::amx) || avx512_bf16, "AMX without AVX-512");
}
#endif

// Every instruction set takes float32 operands; bfloat16 ones are multiplied from avx512_bf16 on.
void tables_serve_what_they_say() {
  for (const Isa isa : kAll) {
    if (!supported(isa)) continue;
    for (const Dtype weight : {Dtype::bfloat16, Dtype::float16, Dtype::float32})
      for (const Operand operand : {Operand::bfloat16, Operand::float32}) {
        const resmoe::Kernels* const kernels = resmoe::kernels(isa, weight, operand);
        const bool wanted =
            operand == Operand::float32 || (weight == Dtype::bfloat16 && isa >= Isa::avx512_bf16);
        CHECK((kernels != nullptr) == wanted, "%s, weight %d", name(isa), static_cast<int>(weight));
        if (kernels == nullptr) continue;
        CHECK(kernels->weight == weight && kernels->operand == operand, "%s, weight %d", name(isa),
              static_cast<int>(weight));
      }
  }
}

}  // namespace

int main() {
  the_best_is_chosen_unless_one_is_named();
  what_is_not_there_is_refused();
#if defined(__x86_64__)
  the_compiler_agrees();
#endif
  tables_serve_what_they_say();
  std::printf(failures == 0 ? "all checks passed on %s\n" : "checks failed on %s\n", name(resmoe::best()));
  return failures == 0 ? 0 : 1;
}
