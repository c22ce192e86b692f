// The ops of NVIDIA GPUs.
#ifdef RESMOE_CUDA
#include <dlfcn.h>

#include "bindings_form.h"
#include "cuda/block_sparse_decode.h"
#include "cuda/decode_call.h"
#include "cuda/device.h"
#include "cuda/low_rank_decode.h"

namespace {

using namespace resmoe::bindings;
using resmoe::Factored;
using resmoe::FactoredMatrix;

// ---- the expert layer on a GPU

// Found at run time, for one extension that loads in every torch: one without CUDA has no such function to
// link, and the stable ABI has it from torch 2.13 on.
void* current_stream(int32_t gpu) {
  using CurrentStream = AOTITorchError (*)(int32_t gpu, void** stream);
  static const auto function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr
               ? nullptr
               : reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  if (function == nullptr) throw std::runtime_error("resmoe_kernels: this torch is built without CUDA");
  void* stream = nullptr;
  if (function(gpu, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("resmoe_kernels: torch has no current stream on GPU " + std::to_string(gpu));
  return stream;
}

// An argument of a call as kernels read it. Weights are refused instead: copying them would take longer than
// the call.
Tensor laid_out(const Tensor& tensor) {
  const Tensor contiguous = torch::stable::contiguous(tensor);
  return is_aligned(contiguous) ? contiguous : torch::stable::clone(contiguous);
}

// A size for kernels, which count in 32 bits.
int32_t counted(const char* op, const char* name, int64_t size) {
  constexpr int64_t limit = 1 << 26;
  if (size > limit) refuse(op, ": ", name, " must be at most ", limit, ", got ", size);
  return static_cast<int32_t>(size);
}

resmoe::cuda::Function function_of(resmoe::Activation activation) {
  using resmoe::Activation;
  using resmoe::cuda::Function;
  switch (activation) {
    case Activation::silu:
      return Function::silu;
    case Activation::gelu:
      return Function::gelu;
    case Activation::gelu_tanh:
      return Function::gelu_tanh;
    case Activation::relu:
      return Function::relu;
    case Activation::relu2:
      return Function::relu2;
    case Activation::identity:
      break;
  }
  return Function::identity;
}

// `resmoe::experts` for few tokens, by the kernel of one form each.
struct LowRankDecode {
  using Call = resmoe::cuda::LowRankCall;
  static constexpr const char* op = "low_rank_decode";
  static constexpr const char* serves = "a low-rank part";
  static constexpr auto start = resmoe::cuda::low_rank_decode;

  static bool has_other_parts(const FactoredMatrix<const void>& from) { return from.mask != nullptr; }

  static resmoe::cuda::LowRankMatrix matrix(const FactoredMatrix<const void>& from) {
    return {from.base, from.u, from.v, static_cast<const int32_t*>(from.rank_offsets),
            counted(op, "the sum of ranks", from.ranks)};
  }
};

struct BlockSparseDecode {
  using Call = resmoe::cuda::BlockSparseCall;
  static constexpr const char* op = "block_sparse_decode";
  static constexpr const char* serves = "a block-sparse part";
  static constexpr auto start = resmoe::cuda::block_sparse_decode;

  static bool has_other_parts(const FactoredMatrix<const void>& from) {
    return from.rank_offsets != nullptr || from.row_offsets != nullptr;
  }

  static resmoe::cuda::BlockSparseMatrix matrix(const FactoredMatrix<const void>& from) {
    return {from.base, static_cast<const uint32_t*>(from.mask), from.values,
            static_cast<int32_t>(from.block_kept)};
  }
};

constexpr uint64_t kDecodeArguments = 3 + kFormArguments + 1;

template <typename Decode>
Tensor decode(Arguments& arguments) {
  constexpr const char* op = Decode::op;
  auto x = arguments.take<Tensor>(), top_k_index = arguments.take<Tensor>(),
       top_k_weights = arguments.take<Tensor>();
  const FormArguments weights(arguments);
  const std::string activation = taken(arguments.take<StringHandle>());
  const bool has_bias = weights[kBiasGateUp] || weights[kBiasDown];
  const int32_t gpu = x.get_device_index();
  const Factored<const void> form = form_of(op, weights, gpu);
  if (form.groups > 1 || has_bias || Decode::has_other_parts(form.gate_up) ||
      Decode::has_other_parts(form.down))
    refuse(
        op, ": weights must be at most one base and ", Decode::serves, ", got ", form.groups, " bases",
        has_bias ? ", biases" : "",
        Decode::has_other_parts(form.gate_up) || Decode::has_other_parts(form.down) ? ", other parts" : "");
  const ScalarType dtype = x.scalar_type();
  if (x.dim() != 2 || x.size(1) != form.hidden || dtype == ScalarType::Float ||
      dtype != scalar_type_of(form.dtype))
    refuse(op, ": x must be (T, ", form.hidden, ") bfloat16 or float16, and the weights the same, which are ",
           torch::headeronly::toString(scalar_type_of(form.dtype)), ", got ", shown(x));
  check_slots(op, x, top_k_index, top_k_weights);
  for (const Tensor* slots : {&top_k_index, &top_k_weights})
    if (slots->get_device_index() != gpu)
      refuse(op, ": top_k_index and top_k_weights must be on x's GPU ", gpu, ", got one on ",
             slots->get_device_index());

  typename Decode::Call call{};
  call.tokens = counted(op, "T", x.size(0));
  call.top_k = counted(op, "top_k", top_k_index.size(1));
  call.experts = counted(op, "num_experts", form.experts);
  call.hidden = counted(op, "hidden_size", form.hidden);
  call.inner = counted(op, "intermediate_size", form.intermediate);
  call.gated = form.gated;
  call.function = function_of(activation_of(op, activation));
  call.group = static_cast<const int32_t*>(form.group);
  call.gate_up = Decode::matrix(form.gate_up);
  call.down = Decode::matrix(form.down);
  if (const char* reason = declines(call))
    refuse(op, ": the kernel does not serve ", reason, ", got T ", call.tokens, ", top_k ", call.top_k,
           ", E ", call.experts, ", H ", call.hidden, ", I ", call.inner);
  if (call.tokens == 0 || call.top_k == 0) return torch::stable::new_zeros(x, {x.size(0), x.size(1)});

  void* stream = current_stream(gpu);
  const resmoe::cuda::OnDevice there(gpu);
  if (there.fault() != nullptr) throw std::runtime_error(std::string(op) + ": " + there.fault());
  x = laid_out(x), top_k_index = laid_out(top_k_index);
  const ScalarType weights_dtype = top_k_weights.scalar_type();
  const bool is_half = weights_dtype == ScalarType::BFloat16 || weights_dtype == ScalarType::Half;
  top_k_weights = laid_out(is_half ? top_k_weights : torch::stable::to(top_k_weights, ScalarType::Float));
  const Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const Tensor workspace =
      torch::stable::new_empty(x, {static_cast<int64_t>(workspace_bytes(call))}, ScalarType::Byte);

  using resmoe::cuda::Element;
  using resmoe::cuda::Real;
  call.element = dtype == ScalarType::BFloat16 ? Element::bfloat16 : Element::float16;
  call.x = x.const_data_ptr();
  call.top_k_index = top_k_index.const_data_ptr();
  call.index_is_64 = top_k_index.scalar_type() == ScalarType::Long;
  call.top_k_weights = top_k_weights.const_data_ptr();
  call.weights_type = weights_dtype == ScalarType::BFloat16 ? Real::bfloat16
                      : weights_dtype == ScalarType::Half   ? Real::float16
                                                            : Real::float32;
  call.workspace = workspace.mutable_data_ptr();
  call.y = y.mutable_data_ptr();
  if (const char* error = Decode::start(call, stream)) throw std::runtime_error(error);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resmoe, CUDA, m) {
  m.impl(LowRankDecode::op, &boxed<decode<LowRankDecode>, kDecodeArguments>);
  m.impl(BlockSparseDecode::op, &boxed<decode<BlockSparseDecode>, kDecodeArguments>);
}
#endif
