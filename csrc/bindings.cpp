// The ops of the CPU, and those that say what this library is.
#include "bindings.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <mutex>
#include <tuple>

#include "assignment.h"
#include "bindings_form.h"
#include "cpu/isa.h"
#include "cuda/decode_call.h"
#include "experts.h"
#include "sparse.h"

namespace {

using namespace resmoe::bindings;
using resmoe::Dtype;
using resmoe::Factored;
using resmoe::FactoredMatrix;
using resmoe::Payload;
using resmoe::SparseFault;
using resmoe::SparseRule;

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

void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
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

Tensor pack(Arguments& arguments) {
  const Factored<const void> from = form_of("pack", FormArguments(arguments));

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
// and does not free strings that an op returns), the sizes E, H, I, gated, and bits and group of what can be codes.
std::tuple<std::vector<Tensor>, std::vector<int64_t>, std::vector<int64_t>> unpack(Tensor packed) {
  header_of(packed);
  const Factored<const void> sizes = resmoe::packed_sizes(packed.const_data_ptr());
  const ScalarType dtype = scalar_type_of(sizes.dtype);
  std::vector<Tensor> tensors;
  std::vector<int64_t> arguments;
  const auto make = [&](FormTensor argument, const std::vector<int64_t>& shape, ScalarType of) {
    arguments.push_back(argument);
    tensors.push_back(torch::stable::empty(shape, of));
    return tensors.back().mutable_data_ptr();
  };

  Factored<void> to;
  to.experts = sizes.experts, to.hidden = sizes.hidden, to.intermediate = sizes.intermediate;
  to.groups = sizes.groups, to.dtype = sizes.dtype, to.gated = sizes.gated;
  if (sizes.group != nullptr) to.group = make(kGroup, {to.experts}, ScalarType::Int);
  Payload payloads[4][2];
  for (const bool down : {false, true}) {
    const FactoredMatrix<const void>& from = down ? sizes.down : sizes.gate_up;
    FactoredMatrix<void>& f = down ? to.down : to.gate_up;
    const MatrixTensors& t = kMatrixTensors[down ? 1 : 0];
    const int64_t rows = to.rows(down), columns = to.columns(down),
                  words = columns / 32 + (columns % 32 != 0);
    f.ranks = from.ranks, f.nnz = from.nnz;
    f.block_kept = from.block_kept, f.row_offset_size = from.row_offset_size;
    std::array<std::vector<int64_t>, 4> shapes;  // empty: not there
    if (sizes.group != nullptr) shapes[0] = {to.groups, rows, columns};
    if (from.rank_offsets != nullptr) {
      shapes[1] = {f.ranks, rows}, shapes[2] = {f.ranks, columns};
      f.rank_offsets = make(t.rank_offsets, {to.experts + 1}, ScalarType::Int);
    }
    if (from.mask != nullptr) {
      shapes[3] = f.block_kept != 0 ? std::vector<int64_t>{to.experts, rows, words, f.block_kept}
                                    : std::vector<int64_t>{f.nnz};
      f.mask = make(t.mask, {to.experts, rows, words}, ScalarType::Int);
      if (f.block_kept == 0)
        f.row_offsets = make(t.row_offsets, {to.experts * rows + 1},
                             f.row_offset_size == 4 ? ScalarType::Int : ScalarType::Long);
    } else if (from.values != nullptr) {
      shapes[3] = {to.experts, rows, columns};
    }
    const auto has = t.storable<const void>();
    const auto gets = t.storable<void>();
    for (size_t i = 0; i < gets.size(); ++i) {
      if (shapes[i].empty()) continue;
      const Payload payload = payloads[i][down ? 1 : 0] = f.*gets[i].payload = from.*has[i].payload;
      std::vector<int64_t> shape = shapes[i];
      if (payload.is_coded()) shape.back() = resmoe::stored_row_bytes(shapes[i].back(), payload);
      f.*gets[i].values = make(gets[i].tensor, shape, payload.is_coded() ? ScalarType::Byte : dtype);
      if (!payload.is_coded()) continue;
      shape.pop_back();
      if (payload.group != 0) shape.push_back(resmoe::groups_of(shapes[i].back(), payload));
      f.*gets[i].its_scales = make(gets[i].scales, shape, ScalarType::BFloat16);
    }
    if (from.bias != nullptr) f.bias = make(t.bias, {to.experts, rows}, dtype);
  }
  resmoe::unpack(packed.const_data_ptr(), to, parallel_for);
  std::vector<int64_t> numbers{to.experts, to.hidden, to.intermediate, to.gated ? 1 : 0};
  // In the order of CODED: base of both matrices, u and v of one and of the other, values of both.
  for (const auto& [part, matrix] : {std::pair{0, 0}, {0, 1}, {1, 0}, {2, 0}, {1, 1}, {2, 1}, {3, 0}, {3, 1}}) {
    numbers.push_back(payloads[part][matrix].bits);
    numbers.push_back(payloads[part][matrix].group);
  }
  return {tensors, arguments, numbers};
}

// ---- the expert layer

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

STABLE_TORCH_LIBRARY_IMPL(resmoe, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("decode_limits", TORCH_BOX(&decode_limits));
}
