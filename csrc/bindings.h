// What the files that know torch share: through its stable ABI, so that one build serves every torch from 2.10 on.
// Schemas, fakes and the reference are Python's (resmoe_kernels/ops.py); here are only implementations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "packed.h"

namespace resmoe::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// std::invalid_argument reaches Python as ValueError; STD_TORCH_CHECK would raise RuntimeError and begin the
// sentence with the path of this file on the machine that built it.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

// A text argument. Ops take handles, because torch's conversion to std::string (seen in 2.13) never frees the
// copy that it makes: 48 bytes a call.
inline std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// What came: "(3, 2) Int", as a message shows it.
inline std::string shown(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d == 0 ? "" : ", ") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",) " : ") ") << torch::headeronly::toString(tensor.scalar_type())
       << (tensor.is_contiguous() ? "" : ", not contiguous");
  return text.str();
}

inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

inline Dtype dtype_of(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Float:
      return Dtype::float32;
    default:
      refuse(op, ": weights must be bfloat16, float16 or float32, got ", torch::headeronly::toString(dtype));
  }
}

inline ScalarType scalar_type_of(Dtype dtype) {
  return dtype == Dtype::bfloat16  ? ScalarType::BFloat16
         : dtype == Dtype::float16 ? ScalarType::Half
                                   : ScalarType::Float;
}

// The arguments of an op one by one. For ops with the weight form's, which TORCH_BOX would have listed once
// more for each. All must be taken before anything throws: who does not take a tensor leaks it.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  OptionalTensor tensor() { return take<OptionalTensor>(); }

 private:
  const StableIValue* next_;
};

template <Tensor (*op)(Arguments&), uint64_t count>
void boxed(StableIValue* stack, uint64_t num_args, uint64_t) {
  STD_TORCH_CHECK(num_args == count, "the schema has ", num_args, " arguments, the kernel ", count);
  Arguments arguments(stack);
  stack[0] = torch::stable::detail::from(op(arguments));
}

inline void check_slots(const char* op, const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights) {
  const ScalarType index_dtype = top_k_index.scalar_type();
  if (top_k_index.dim() != 2 || top_k_index.size(0) != x.size(0) ||
      (index_dtype != ScalarType::Int && index_dtype != ScalarType::Long))
    refuse(op, ": top_k_index must be (", x.size(0), ", top_k) int32 or int64, got ", shown(top_k_index));
  if (top_k_weights.dim() != 2 || top_k_weights.size(0) != x.size(0) ||
      top_k_weights.size(1) != top_k_index.size(1))
    refuse(op, ": top_k_weights must be (", x.size(0), ", ", top_k_index.size(1), "), got ",
           shown(top_k_weights));
}

inline Activation activation_of(const char* op, const std::string& name) {
  constexpr std::pair<const char*, Activation> known[] = {
      {"silu", Activation::silu}, {"gelu", Activation::gelu},   {"gelu_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu}, {"relu2", Activation::relu2}, {"identity", Activation::identity}};
  for (const auto& [its_name, activation] : known)
    if (name == its_name) return activation;
  refuse(op, ": activation must be silu, gelu, gelu_tanh, relu, relu2 or identity, got '", name, "'");
}

}  // namespace resmoe::bindings
