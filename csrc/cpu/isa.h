// Which of the instruction sets of kernels.h this CPU, and its operating system, can run, and which one is
// used.
#pragma once

#include "kernels.h"

namespace resmoe {

const char* name(Isa isa);

// Whether this build has the instruction set and this machine runs it:
//     avx2         AVX2, FMA, F16C
//     avx512       AVX-512 F, BW, VL, DQ
//     avx512_bf16  avx512, AVX512_BF16, AVX512_VBMI2
//     amx          avx512_bf16, AMX-TILE, AMX-BF16; asks Linux, the first time, to let this process use tiles
bool supported(Isa isa);

// The last of the supported ones in the order of Isa.
Isa best();

// The one that the environment variable RESMOE_CPU_ISA names, or best() where it is unset or empty. Raises
// std::invalid_argument where it is no instruction set, or none of this machine.
Isa chosen();

// The arithmetic of a supported instruction set; null where it has none for these types (see kernels.h).
const Kernels* kernels(Isa isa, Dtype weight, Operand operand);

}  // namespace resmoe
