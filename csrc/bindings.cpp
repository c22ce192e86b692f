// The only file that knows torch, through its stable ABI: one build serves every torch from 2.10 on.
// Schemas, fakes and the reference are Python's (resmoe_kernels/ops.py); here are only implementations.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

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
  (sentence << "expand_sparse: " << ... << parts);
  throw std::invalid_argument(sentence.str());
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
  if (width < 0) refuse("width must be at least 0, got ", width);
  const int64_t words = width / 32 + (width % 32 != 0);
  if (mask.dim() != 2 || mask.size(1) != words || mask.scalar_type() != ScalarType::Int ||
      !mask.is_contiguous())
    refuse("mask must be (N, ", words, ") contiguous int32 for width ", width, ", got ", shown(mask));
  const int64_t rows = mask.size(0);

  const ScalarType dtype = values.scalar_type();
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half && dtype != ScalarType::Float &&
      dtype != ScalarType::Double)
    refuse("values must be bfloat16, float16, float32 or float64, got ", shown(values));
  if (row_offsets) {
    if (values.dim() != 1 || !values.is_contiguous())
      refuse("values must be (nnz,) contiguous where row_offsets are given, got ", shown(values));
    const ScalarType offset_dtype = row_offsets->scalar_type();
    if (row_offsets->dim() != 1 || row_offsets->size(0) != rows + 1 || !row_offsets->is_contiguous() ||
        (offset_dtype != ScalarType::Int && offset_dtype != ScalarType::Long))
      refuse("row_offsets must be (", rows + 1,
             ",) contiguous int32 or int64, one more than mask has rows, got ", shown(*row_offsets));
  } else if (values.dim() != 3 || values.size(0) != rows || values.size(1) != words ||
             !values.is_contiguous()) {
    refuse("values must be (", rows, ", ", words, ", n) contiguous where row_offsets is None, got ",
           shown(values));
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
      refuse("mask must have no bit at or past column ", width, ", the width, got one in row ", fault.row);
    case SparseRule::bits_fit_word:
      refuse("mask must have at most ", values.size(2), " bits in a word, the places values has for it, got ",
             fault.bits, " in row ", fault.row);
    case SparseRule::bits_fit_row:
      refuse("mask must have as many bits in a row as row_offsets gives it values, got ", fault.bits,
             " bits and ", offset_at(*row_offsets, fault.row + 1) - offset_at(*row_offsets, fault.row),
             " values in row ", fault.row);
    case SparseRule::offsets_in_values:
      refuse("row_offsets must ascend within 0 and ", values.size(0), ", the length of values, got ",
             offset_at(*row_offsets, fault.row), " and ", offset_at(*row_offsets, fault.row + 1), " for row ",
             fault.row);
  }
  return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resmoe, CPU, m) { m.impl("expand_sparse", TORCH_BOX(&expand_sparse)); }
