// The only file that knows torch, through its stable ABI: one build serves every torch from 2.10 on.
// Schemas, fakes and the reference are Python's (resmoe_kernels/ops.py); here are only implementations.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "assignment.h"
#include "cpu/isa.h"
#include "cuda/decode_call.h"
#ifdef RESMOE_CUDA
#include <dlfcn.h>

#include "cuda/block_sparse_decode.h"
#include "cuda/device.h"
#include "cuda/low_rank_decode.h"
#endif
#include "experts.h"
#include "packed.h"
#include "sparse.h"

namespace {

using resmoe::SparseFault;
using resmoe::SparseRule;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
std::string taken(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// What came: "(3, 2) Int", as a message shows it.
std::string shown(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d == 0 ? "" : ", ") << tensor.size(d);
  text << (tensor.dim() == 1 ? ",) " : ") ") << torch::headeronly::toString(tensor.scalar_type())
       << (tensor.is_contiguous() ? "" : ", not contiguous");
  return text.str();
}

// ---- expand_sparse

// Runs kernel(begin, end) over all rows on torch's threads and returns the fault of the lowest row, so that a
// message does not depend on the number of threads. Kernels report faults and do not throw: no exception may
// cross the C callback of parallel_for.
template <typename Kernel>
SparseFault over_rows(int64_t rows, int64_t width, const Kernel& kernel) {
  const int64_t rows_per_task = 32768 / std::clamp<int64_t>(width, 1, 32768);  // torch's elementwise grain
  SparseFault lowest;
  std::mutex guard;
  torch::stable::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    const SparseFault fault = kernel(begin, end);
    if (fault.rule == SparseRule::ok) return;
    const std::lock_guard<std::mutex> lock(guard);
    if (lowest.rule == SparseRule::ok || fault.row < lowest.row) lowest = fault;
  });
  return lowest;
}

template <typename T>
SparseFault expand(const Tensor& mask, const Tensor& values, const std::optional<Tensor>& row_offsets,
                   const Tensor& dense) {
  const auto* mask_ptr = static_cast<const uint32_t*>(mask.const_data_ptr());
  const auto* values_ptr = static_cast<const T*>(values.const_data_ptr());
  auto* dense_ptr = static_cast<T*>(dense.mutable_data_ptr());
  const int64_t rows = dense.size(0), width = dense.size(1);
  if (!row_offsets) {
    const int64_t n = values.size(2);
    return over_rows(rows, width, [=](int64_t begin, int64_t end) {
      return resmoe::expand_sparse_block<T>(mask_ptr, values_ptr, n, dense_ptr, width, begin, end);
    });
  }
  const int64_t nnz = values.size(0);
  const auto bitmap = [=](const auto* offsets_ptr) {
    return over_rows(rows, width, [=](int64_t begin, int64_t end) {
      return resmoe::expand_sparse_bitmap<T>(mask_ptr, values_ptr, nnz, offsets_ptr, dense_ptr, width, begin,
                                             end);
    });
  };
  const void* offsets_ptr = row_offsets->const_data_ptr();
  return row_offsets->scalar_type() == ScalarType::Int ? bitmap(static_cast<const int32_t*>(offsets_ptr))
                                                       : bitmap(static_cast<const int64_t*>(offsets_ptr));
}

int64_t offset_at(const Tensor& row_offsets, int64_t row) {
  const void* offsets = row_offsets.const_data_ptr();
  return row_offsets.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(offsets)[row]
                                                      : static_cast<const int64_t*>(offsets)[row];
}

Tensor expand_sparse(Tensor mask, Tensor values, std::optional<Tensor> row_offsets, int64_t width) {
  if (width < 0) refuse("expand_sparse: width must be at least 0, got ", width);
  const int64_t words = width / 32 + (width % 32 != 0);
  if (mask.dim() != 2 || mask.size(1) != words || mask.scalar_type() != ScalarType::Int ||
      !mask.is_contiguous())
    refuse("expand_sparse: mask must be (N, ", words, ") contiguous int32 for width ", width, ", got ",
           shown(mask));
  const int64_t rows = mask.size(0);

  const ScalarType dtype = values.scalar_type();
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half && dtype != ScalarType::Float &&
      dtype != ScalarType::Double)
    refuse("expand_sparse: values must be bfloat16, float16, float32 or float64, got ", shown(values));
  if (row_offsets) {
    if (values.dim() != 1 || !values.is_contiguous())
      refuse("expand_sparse: values must be (nnz,) contiguous where row_offsets are given, got ",
             shown(values));
    const ScalarType offset_dtype = row_offsets->scalar_type();
    if (row_offsets->dim() != 1 || row_offsets->size(0) != rows + 1 || !row_offsets->is_contiguous() ||
        (offset_dtype != ScalarType::Int && offset_dtype != ScalarType::Long))
      refuse("expand_sparse: row_offsets must be (", rows + 1,
             ",) contiguous int32 or int64, one more than mask has rows, got ", shown(*row_offsets));
  } else if (values.dim() != 3 || values.size(0) != rows || values.size(1) != words ||
             !values.is_contiguous()) {
    refuse("expand_sparse: values must be (", rows, ", ", words,
           ", n) contiguous where row_offsets is None, got ", shown(values));
  }

  const Tensor dense = torch::stable::empty({rows, width}, dtype, std::nullopt, values.device());
  const size_t size = values.element_size();
  const SparseFault fault = size == 2   ? expand<uint16_t>(mask, values, row_offsets, dense)
                            : size == 4 ? expand<uint32_t>(mask, values, row_offsets, dense)
                                        : expand<uint64_t>(mask, values, row_offsets, dense);
  switch (fault.rule) {
    case SparseRule::ok:
      break;
    case SparseRule::bits_below_width:
      refuse("expand_sparse: mask must have no bit at or past column ", width, ", the width, got one in row ",
             fault.row);
    case SparseRule::bits_fit_word:
      refuse("expand_sparse: mask must have at most ", values.size(2),
             " bits in a word, the places values has for it, got ", fault.bits, " in row ", fault.row);
    case SparseRule::bits_fit_row:
      refuse("expand_sparse: mask must have as many bits in a row as row_offsets gives it values, got ",
             fault.bits, " bits and ",
             offset_at(*row_offsets, fault.row + 1) - offset_at(*row_offsets, fault.row), " values in row ",
             fault.row);
    case SparseRule::offsets_in_values:
      refuse("expand_sparse: row_offsets must ascend within 0 and ", values.size(0),
             ", the length of values, got ", offset_at(*row_offsets, fault.row), " and ",
             offset_at(*row_offsets, fault.row + 1), " for row ", fault.row);
  }
  return dense;
}

// ---- pack and unpack: the weight form of resmoe_kernels/factored.py to one block, and back

using resmoe::Dtype;
using resmoe::Factored;
using resmoe::FactoredMatrix;
using OptionalTensor = std::optional<Tensor>;

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// Tensors of the weight form, as ops take them.
struct Taker {
  const char* op;
  ScalarType dtype;
  std::optional<int32_t> gpu;  // on which they must be

  // The address of a tensor that must have this shape and type, and on a GPU, where 16 bytes are read at
  // once, this alignment; null where it is not there.
  const void* operator()(const std::string& name, const OptionalTensor& tensor,
                         const std::vector<int64_t>& shape, ScalarType wanted) const {
    if (!tensor) return nullptr;
    bool fits = tensor->dim() == static_cast<int64_t>(shape.size()) && tensor->scalar_type() == wanted;
    for (size_t d = 0; fits && d < shape.size(); ++d)
      fits = tensor->size(static_cast<int64_t>(d)) == shape[d];
    if (!fits || !tensor->is_contiguous()) {
      std::ostringstream text;
      for (size_t d = 0; d < shape.size(); ++d) text << (d == 0 ? "" : ", ") << shape[d];
      refuse(op, ": ", name, " must be (", text.str(), shape.size() == 1 ? ",) " : ") ",
             torch::headeronly::toString(wanted), " contiguous, got ", shown(*tensor));
    }
    if (gpu && tensor->get_device_index() != *gpu)
      refuse(op, ": ", name, " must be on x's GPU ", *gpu, ", got one on ", tensor->get_device_index());
    if (gpu && !is_aligned(*tensor))
      refuse(op, ": ", name, " must begin at a multiple of 16 bytes, got one at ", tensor->const_data_ptr());
    return tensor->const_data_ptr();
  }

  const void* operator()(const std::string& name, const OptionalTensor& tensor,
                         const std::vector<int64_t>& shape) const {
    return (*this)(name, tensor, shape, dtype);
  }
};

int64_t side(const OptionalTensor& tensor, int64_t d) {  // 0 where there is none: the shape check tells
  return tensor && d < tensor->dim() ? tensor->size(d) : 0;
}

Dtype dtype_of(const char* op, ScalarType dtype) {
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

// Weights are streamed, and in a virtual machine each new 4 KiB page costs a walk through two page tables:
// decoding read 35 GB/s from small pages and 57 GB/s from huge ones (AMD EPYC, 2 threads). Must come before
// the first write.
void advise_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a wish: may fail
#endif
}

ScalarType scalar_type_of(Dtype dtype) {
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

// The weight form as the arguments of an op, in their order.
struct FormArguments {
  Arguments& next;
  OptionalTensor group = next.tensor(), base_gate_up = next.tensor(), base_down = next.tensor(),
                 u_gate_up = next.tensor(), v_gate_up = next.tensor(), rank_offsets_gate_up = next.tensor(),
                 u_down = next.tensor(), v_down = next.tensor(), rank_offsets_down = next.tensor(),
                 mask_gate_up = next.tensor(), values_gate_up = next.tensor(),
                 row_offsets_gate_up = next.tensor(), mask_down = next.tensor(), values_down = next.tensor(),
                 row_offsets_down = next.tensor(), bias_gate_up = next.tensor(), bias_down = next.tensor(),
                 scales_base_gate_up = next.tensor(), scales_base_down = next.tensor(),
                 scales_u_gate_up = next.tensor(), scales_v_gate_up = next.tensor(),
                 scales_u_down = next.tensor(), scales_v_down = next.tensor(),
                 scales_values_gate_up = next.tensor(), scales_values_down = next.tensor();
  int64_t num_experts = next.take<int64_t>(), hidden_size = next.take<int64_t>(),
          intermediate_size = next.take<int64_t>();
  bool gated = next.take<bool>();
  StringHandle factorization = next.take<StringHandle>(), payloads = next.take<StringHandle>();
};
constexpr uint64_t kFormArguments = 25 + 3 + 1 + 2;

// The same as addresses. Refuses arguments that do not fit each other, or a GPU's kernels.
Factored<const void> form_of(const char* op, const FormArguments& a,
                             std::optional<int32_t> gpu = std::nullopt) {
  const std::string factorization = taken(a.factorization), payloads = taken(a.payloads);
  if (a.num_experts < 1 || a.hidden_size < 1 || a.intermediate_size < 1)
    refuse(op, ": num_experts, hidden_size and intermediate_size must be at least 1, got ", a.num_experts,
           ", ", a.hidden_size, " and ", a.intermediate_size);
  if (factorization != "stacked")
    refuse(op, ": factorization must be 'stacked', got '", factorization, "'; the reference runs the others");
  if (!payloads.empty()) refuse(op, ": payloads must be '', got '", payloads, "'; the reference runs codes");
  const OptionalTensor* floats[] = {&a.base_gate_up, &a.base_down, &a.u_gate_up,      &a.v_gate_up,
                                    &a.u_down,       &a.v_down,    &a.values_gate_up, &a.values_down,
                                    &a.bias_gate_up, &a.bias_down};
  const auto* first =
      std::find_if(std::begin(floats), std::end(floats), [](const auto* t) { return t->has_value(); });
  if (first == std::end(floats)) refuse(op, ": there must be a base, a low-rank or a sparse part, got none");
  const Taker take{op, (*first)->value().scalar_type(), gpu};

  Factored<const void> from;
  from.dtype = dtype_of(op, take.dtype);
  from.experts = a.num_experts, from.hidden = a.hidden_size, from.intermediate = a.intermediate_size;
  from.gated = a.gated;
  from.groups = side(a.base_gate_up, 0);
  if (a.group.has_value() != a.base_gate_up.has_value() || a.group.has_value() != a.base_down.has_value())
    refuse(op, ": group, base_gate_up and base_down must be given together");
  from.group = take("group", a.group, {a.num_experts}, ScalarType::Int);

  const auto matrix =
      [&](bool down, const std::string& name, const OptionalTensor& base, const OptionalTensor& u,
          const OptionalTensor& v, const OptionalTensor& rank_offsets, const OptionalTensor& mask,
          const OptionalTensor& values, const OptionalTensor& row_offsets, const OptionalTensor& bias) {
        const int64_t rows = from.rows(down), columns = from.columns(down),
                      words = columns / 32 + (columns % 32 != 0);
        if (u.has_value() != v.has_value() || u.has_value() != rank_offsets.has_value())
          refuse(op, ": u_", name, ", v_", name, " and rank_offsets_", name, " must be given together");
        if (mask.has_value() != values.has_value() || (row_offsets && !mask))
          refuse(op, ": mask_", name, " and values_", name, " must be given together, and row_offsets_", name,
                 " only with them");
        FactoredMatrix<const void> f;
        f.ranks = side(u, 0);
        f.base = take("base_" + name, base, {from.groups, rows, columns});
        f.u = take("u_" + name, u, {f.ranks, rows});
        f.v = take("v_" + name, v, {f.ranks, columns});
        f.rank_offsets = take("rank_offsets_" + name, rank_offsets, {a.num_experts + 1}, ScalarType::Int);
        f.mask = take("mask_" + name, mask, {a.num_experts, rows, words}, ScalarType::Int);
        if (row_offsets) {
          const bool narrow = row_offsets->scalar_type() == ScalarType::Int;
          f.row_offset_size = narrow ? 4 : 8;
          f.row_offsets = take("row_offsets_" + name, row_offsets, {a.num_experts * rows + 1},
                               narrow ? ScalarType::Int : ScalarType::Long);
          f.nnz = side(values, 0);
          f.values = take("values_" + name, values, {f.nnz});
        } else if (values) {
          f.block_kept = side(values, 3);
          f.values = take("values_" + name, values, {a.num_experts, rows, words, f.block_kept});
          if (f.block_kept < 1 || f.block_kept > 32)
            refuse(op, ": values_", name, " must keep 1 to 32 of 32 columns, got ", f.block_kept);
        }
        f.bias = take("bias_" + name, bias, {a.num_experts, rows});
        return f;
      };
  from.gate_up = matrix(false, "gate_up", a.base_gate_up, a.u_gate_up, a.v_gate_up, a.rank_offsets_gate_up,
                        a.mask_gate_up, a.values_gate_up, a.row_offsets_gate_up, a.bias_gate_up);
  from.down = matrix(true, "down", a.base_down, a.u_down, a.v_down, a.rank_offsets_down, a.mask_down,
                     a.values_down, a.row_offsets_down, a.bias_down);
  return from;
}

Tensor pack(Arguments& arguments) {
  const Factored<const void> from = form_of("pack", FormArguments{arguments});

  // A tensor of its own, so the allocator's 64 bytes are its alignment.
  const Tensor packed = torch::stable::empty({resmoe::packed_bytes(from)}, ScalarType::Byte);
  advise_huge_pages(packed.mutable_data_ptr(), packed.size(0));
  resmoe::pack(from, packed.mutable_data_ptr(), parallel_for);
  return packed;
}

const resmoe::PackedHeader& header_of(const Tensor& packed) {
  if (packed.dim() != 1 || packed.scalar_type() != ScalarType::Byte || !packed.is_contiguous())
    refuse("packed: must be (bytes,) contiguous uint8, as PackedExperts.pack makes it, got ", shown(packed));
  return resmoe::check_packed(packed.const_data_ptr(), packed.size(0));
}

// The tensors, for each the number of the argument of `pack` that it was (names would leak: torch 2.13 copies
// and does not free strings that an op returns), and the sizes E, H, I, gated.
std::tuple<std::vector<Tensor>, std::vector<int64_t>, std::vector<int64_t>> unpack(Tensor packed) {
  header_of(packed);
  const Factored<const void> sizes = resmoe::packed_sizes(packed.const_data_ptr());
  const ScalarType dtype = scalar_type_of(sizes.dtype);
  std::vector<Tensor> tensors;
  std::vector<int64_t> arguments;
  const auto make = [&](int64_t argument, const std::vector<int64_t>& shape, ScalarType of) {
    arguments.push_back(argument);
    tensors.push_back(torch::stable::empty(shape, of));
    return tensors.back().mutable_data_ptr();
  };

  Factored<void> to;
  to.experts = sizes.experts, to.hidden = sizes.hidden, to.intermediate = sizes.intermediate;
  to.groups = sizes.groups, to.dtype = sizes.dtype, to.gated = sizes.gated;
  if (sizes.group != nullptr) to.group = make(0, {to.experts}, ScalarType::Int);
  for (const bool down : {false, true}) {
    const FactoredMatrix<const void>& from = down ? sizes.down : sizes.gate_up;
    FactoredMatrix<void>& f = down ? to.down : to.gate_up;
    const int64_t low_rank = down ? 6 : 3, sparse = down ? 12 : 9;  // the first of their arguments
    const int64_t rows = to.rows(down), columns = to.columns(down),
                  words = columns / 32 + (columns % 32 != 0);
    f.ranks = from.ranks, f.nnz = from.nnz;
    f.block_kept = from.block_kept, f.row_offset_size = from.row_offset_size;
    if (sizes.group != nullptr) f.base = make(down ? 2 : 1, {to.groups, rows, columns}, dtype);
    if (from.rank_offsets != nullptr) {
      f.u = make(low_rank, {f.ranks, rows}, dtype);
      f.v = make(low_rank + 1, {f.ranks, columns}, dtype);
      f.rank_offsets = make(low_rank + 2, {to.experts + 1}, ScalarType::Int);
    }
    if (from.mask != nullptr) {
      f.mask = make(sparse, {to.experts, rows, words}, ScalarType::Int);
      f.values = f.block_kept != 0 ? make(sparse + 1, {to.experts, rows, words, f.block_kept}, dtype)
                                   : make(sparse + 1, {f.nnz}, dtype);
      if (f.block_kept == 0)
        f.row_offsets = make(sparse + 2, {to.experts * rows + 1},
                             f.row_offset_size == 4 ? ScalarType::Int : ScalarType::Long);
    }
    if (from.bias != nullptr) f.bias = make(down ? 16 : 15, {to.experts, rows}, dtype);
  }
  resmoe::unpack(packed.const_data_ptr(), to, parallel_for);
  std::vector<int64_t> numbers{to.experts, to.hidden, to.intermediate, to.gated ? 1 : 0};
  numbers.resize(numbers.size() + 2 * 8);  // bits and group of what can be codes: all are floats
  return {tensors, arguments, numbers};
}

// ---- the expert layer

void check_slots(const char* op, const Tensor& x, const Tensor& top_k_index, const Tensor& top_k_weights) {
  const ScalarType index_dtype = top_k_index.scalar_type();
  if (top_k_index.dim() != 2 || top_k_index.size(0) != x.size(0) ||
      (index_dtype != ScalarType::Int && index_dtype != ScalarType::Long))
    refuse(op, ": top_k_index must be (", x.size(0), ", top_k) int32 or int64, got ", shown(top_k_index));
  if (top_k_weights.dim() != 2 || top_k_weights.size(0) != x.size(0) ||
      top_k_weights.size(1) != top_k_index.size(1))
    refuse(op, ": top_k_weights must be (", x.size(0), ", ", top_k_index.size(1), "), got ",
           shown(top_k_weights));
}

resmoe::Activation activation_of(const char* op, const std::string& name) {
  using resmoe::Activation;
  constexpr std::pair<const char*, Activation> known[] = {
      {"silu", Activation::silu}, {"gelu", Activation::gelu},   {"gelu_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu}, {"relu2", Activation::relu2}, {"identity", Activation::identity}};
  for (const auto& [its_name, activation] : known)
    if (name == its_name) return activation;
  refuse(op, ": activation must be silu, gelu, gelu_tanh, relu, relu2 or identity, got '", name, "'");
}

Tensor experts_packed(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor packed, int64_t hidden_size,
                      StringHandle activation_handle) {
  const std::string activation = taken(activation_handle);
  const resmoe::PackedHeader& layer = header_of(packed);
  const ScalarType dtype = x.scalar_type();
  if (x.dim() != 2 || x.size(1) != layer.hidden ||
      (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half && dtype != ScalarType::Float))
    refuse("experts: x must be (T, ", layer.hidden, ") bfloat16, float16 or float32, got ", shown(x));
  if (hidden_size != layer.hidden)
    refuse("experts: hidden_size must be ", layer.hidden, ", that of the packed layer, got ", hidden_size);
  check_slots("experts", x, top_k_index, top_k_weights);

  if (x.stride(1) != 1 || x.stride(0) < x.size(1)) x = torch::stable::contiguous(x);
  top_k_index = torch::stable::contiguous(top_k_index);
  if (top_k_weights.scalar_type() != ScalarType::Float)
    top_k_weights = torch::stable::to(top_k_weights, ScalarType::Float);
  top_k_weights = torch::stable::contiguous(top_k_weights);
  const Tensor y = torch::stable::empty({x.size(0), x.size(1)}, dtype, std::nullopt, x.device());

  const resmoe::Isa isa = resmoe::chosen();
  const resmoe::Kernels* kernels = nullptr;
  if (dtype == ScalarType::BFloat16) kernels = resmoe::kernels(isa, layer.dtype, resmoe::Operand::bfloat16);
  if (kernels == nullptr) kernels = resmoe::kernels(isa, layer.dtype, resmoe::Operand::float32);
  resmoe::experts_packed(layer,
                         {x.const_data_ptr(), x.stride(0), dtype_of("experts", dtype),
                          top_k_index.const_data_ptr(), top_k_index.scalar_type() == ScalarType::Long,
                          static_cast<const float*>(top_k_weights.const_data_ptr()), x.size(0),
                          top_k_index.size(1), activation_of("experts", activation), y.mutable_data_ptr()},
                         *kernels, torch::stable::get_num_threads(),
                         [](int64_t participants, void (*body)(void*), void* context) {
                           torch::stable::parallel_for(0, participants, 1, [&](int64_t begin, int64_t end) {
                             for (int64_t i = begin; i < end; ++i) body(context);
                           });
                         });
  return y;
}

#ifdef RESMOE_CUDA
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
  const FormArguments weights{arguments};
  const std::string activation = taken(arguments.take<StringHandle>());
  const bool has_bias = weights.bias_gate_up || weights.bias_down;
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
#endif

// ---- assignment

std::tuple<Tensor, Tensor, double, double> assignment(Tensor score, Tensor prices, bool exact) {
  const int64_t n = score.dim() == 2 ? score.size(0) : -1;
  if (n < 0 || score.size(1) != n || score.scalar_type() != ScalarType::Float || !score.is_contiguous())
    refuse("score: must be (n, n) contiguous float32, got ", shown(score));
  if (prices.dim() != 1 || prices.size(0) != n || prices.scalar_type() != ScalarType::Double || !prices.is_contiguous())
    refuse("prices: must be (", n, ",) contiguous float64, got ", shown(prices));
  const Tensor columns = torch::stable::empty({n}, ScalarType::Long);
  const Tensor final_prices = torch::stable::empty({n}, ScalarType::Double);
  auto* const to = static_cast<double*>(final_prices.mutable_data_ptr());
  std::copy_n(static_cast<const double*>(prices.const_data_ptr()), n, to);
  const resmoe::Assignment found =
      resmoe::assign(static_cast<const float*>(score.const_data_ptr()), n, to,
                     static_cast<int64_t*>(columns.mutable_data_ptr()), exact, parallel_for);
  return {columns, final_prices, found.value, found.gap};
}

// ---- what this library is

std::string cpu_isa() { return resmoe::name(resmoe::chosen()); }

std::string build_info() { return RESMOE_BUILT; }  // a sentence: setup.py says it

// T, pairs and E up to which the CUDA kernels serve a call, whether they are built or not.
std::vector<int64_t> decode_limits() {
  return {resmoe::cuda::kMaxTokens, resmoe::cuda::kMaxPairs, resmoe::cuda::kMaxExperts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resmoe, CPU, m) {
  m.impl("expand_sparse", TORCH_BOX(&expand_sparse));
  m.impl("pack", &boxed<pack, kFormArguments>);
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("experts_packed", TORCH_BOX(&experts_packed));
  m.impl("assignment", TORCH_BOX(&assignment));
}

#ifdef RESMOE_CUDA
STABLE_TORCH_LIBRARY_IMPL(resmoe, CUDA, m) {
  m.impl(LowRankDecode::op, &boxed<decode<LowRankDecode>, kDecodeArguments>);
  m.impl(BlockSparseDecode::op, &boxed<decode<BlockSparseDecode>, kDecodeArguments>);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(resmoe, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("decode_limits", TORCH_BOX(&decode_limits));
}
