// The weight form of resmoe_kernels/factored.py as the arguments of an op.
#pragma once

#include <array>

#include "bindings.h"

namespace resmoe::bindings {

// The tensors in the order in which schemas have them (TENSOR_NAMES of factored.py): the one place in C++ that says it.
enum FormTensor : int64_t {
  kGroup,
  kBaseGateUp,
  kBaseDown,
  kUGateUp,
  kVGateUp,
  kRankOffsetsGateUp,
  kUDown,
  kVDown,
  kRankOffsetsDown,
  kMaskGateUp,
  kValuesGateUp,
  kRowOffsetsGateUp,
  kMaskDown,
  kValuesDown,
  kRowOffsetsDown,
  kBiasGateUp,
  kBiasDown,
  kScalesBaseGateUp,
  kScalesBaseDown,
  kScalesUGateUp,
  kScalesVGateUp,
  kScalesUDown,
  kScalesVDown,
  kScalesValuesGateUp,
  kScalesValuesDown,
  kFormTensors
};

// A tensor that floats or codes may store: its scales, and where a layer's addresses and payload of it are.
template <typename Void>
struct Storable {
  const char* stem;
  FormTensor tensor, scales;
  Void* FactoredMatrix<Void>::*values;
  Void* FactoredMatrix<Void>::*its_scales;
  Payload FactoredMatrix<Void>::*payload;
};

// The tensors of one matrix.
struct MatrixTensors {
  const char* name;
  FormTensor base, u, v, rank_offsets, mask, values, row_offsets, bias;
  FormTensor scales_base, scales_u, scales_v, scales_values;

  // In the order of CODED of factored.py, but for one matrix.
  template <typename Void>
  std::array<Storable<Void>, 4> storable() const {
    using M = FactoredMatrix<Void>;
    return {{{"base_", base, scales_base, &M::base, &M::base_scales, &M::base_payload},
             {"u_", u, scales_u, &M::u, &M::u_scales, &M::u_payload},
             {"v_", v, scales_v, &M::v, &M::v_scales, &M::v_payload},
             {"values_", values, scales_values, &M::values, &M::values_scales, &M::values_payload}}};
  }
};

inline constexpr MatrixTensors kMatrixTensors[2] = {
    {"gate_up", kBaseGateUp, kUGateUp, kVGateUp, kRankOffsetsGateUp, kMaskGateUp, kValuesGateUp, kRowOffsetsGateUp,
     kBiasGateUp, kScalesBaseGateUp, kScalesUGateUp, kScalesVGateUp, kScalesValuesGateUp},
    {"down", kBaseDown, kUDown, kVDown, kRankOffsetsDown, kMaskDown, kValuesDown, kRowOffsetsDown, kBiasDown,
     kScalesBaseDown, kScalesUDown, kScalesVDown, kScalesValuesDown},
};

// All of them, in their order; taken before anything throws.
struct FormArguments {
  explicit FormArguments(Arguments& next);
  const OptionalTensor& operator[](FormTensor tensor) const { return tensors[static_cast<size_t>(tensor)]; }

  std::vector<OptionalTensor> tensors;
  int64_t num_experts, hidden_size, intermediate_size;
  bool gated;
  std::string factorization, payloads;
};
inline constexpr uint64_t kFormArguments = kFormTensors + 3 + 1 + 2;

// The same as addresses. Refuses arguments that do not fit each other, or a GPU's kernels.
Factored<const void> form_of(const char* op, const FormArguments& arguments, std::optional<int32_t> gpu = std::nullopt);

}  // namespace resmoe::bindings
