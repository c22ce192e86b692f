#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace resmoe {
namespace {

struct Entry {
  Isa isa;
  const char* name;
  const Kernels* (*kernels)(Dtype weight, Operand operand);
};

constexpr Entry kEntries[] = {
    {Isa::portable, "portable", kernels_portable},
#if defined(__x86_64__)
    {Isa::avx2, "avx2", kernels_avx2},
    {Isa::avx512, "avx512", kernels_avx512},
    {Isa::avx512_bf16, "avx512_bf16", kernels_avx512_bf16},
    {Isa::amx, "amx", kernels_amx},
#else
    {Isa::avx2, "avx2", nullptr},
    {Isa::avx512, "avx512", nullptr},
    {Isa::avx512_bf16, "avx512_bf16", nullptr},
    {Isa::amx, "amx", nullptr},
#endif
};

const Entry& entry(Isa isa) { return kEntries[static_cast<size_t>(isa)]; }

#if defined(__x86_64__)

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // all 0 where the CPU has no such leaf
  Leaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

constexpr bool has(uint64_t bits, std::initializer_list<int> wanted) {
  for (const int bit : wanted)
    if (((bits >> bit) & 1) == 0) return false;
  return true;
}

// The registers that the operating system saves when it switches threads (XCR0).
uint64_t saved_registers() {
  if (!has(Leaf(1, 0).ecx, {27})) return 0;  // OSXSAVE: xgetbv is there
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux hands out the 8 KiB of tile registers only to processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa find_best() {
  const Leaf one(1, 0), seven(7, 0), seven_one(7, 1);
  const uint64_t saved = saved_registers();
  if (!(has(one.ecx, {12, 28, 29}) && has(seven.ebx, {5}) && has(saved, {1, 2}))) return Isa::portable;
  if (!(has(seven.ebx, {16, 17, 30, 31}) && has(saved, {5, 6, 7}))) return Isa::avx2;
  if (!(has(seven_one.eax, {5}) && has(seven.ecx, {6}))) return Isa::avx512;
  if (!(has(seven.edx, {22, 24}) && has(saved, {17, 18}) && may_use_tiles())) return Isa::avx512_bf16;
  return Isa::amx;
}

#else

Isa find_best() { return Isa::portable; }

#endif

}  // namespace

const char* name(Isa isa) { return entry(isa).name; }

Isa best() {
  static const Isa isa = find_best();
  return isa;
}

// Each instruction set contains the ones before it.
bool supported(Isa isa) { return isa <= best(); }

Isa chosen() {
  const char* const wanted = std::getenv("RESMOE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best();
  std::string here;
  for (const Entry& entry : kEntries) {
    if (!supported(entry.isa)) continue;
    if (std::string(wanted) == entry.name) return entry.isa;
    here += std::string(here.empty() ? "" : ", ") + entry.name;
  }
  throw std::invalid_argument("RESMOE_CPU_ISA: must be one of the instruction sets of this CPU (" + here +
                              "), got '" + wanted + "'; unset it to use the fastest");
}

const Kernels* kernels(Isa isa, Dtype weight, Operand operand) {
  const auto table = entry(isa).kernels;
  return table == nullptr ? nullptr : table(weight, operand);
}

}  // namespace resmoe
