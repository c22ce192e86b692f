#include "bindings_form.h"

#include <algorithm>

namespace resmoe::bindings {
namespace {

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

// The payload of a tensor, of a text like "base_gate_up=int4/128 u_gate_up=int4": bits 0 where it is not named.
Payload payload_of(const char* op, const std::string& payloads, const std::string& name) {
  std::istringstream words(payloads);
  for (std::string word; words >> word;) {
    if (word.rfind(name + "=int", 0) != 0) continue;
    std::istringstream numbers(word.substr(name.size() + 4));
    Payload payload;
    char slash = 0;
    if (!(numbers >> payload.bits) || (numbers >> slash && (slash != '/' || !(numbers >> payload.group))))
      refuse(op, ": payloads must be like 'base_down=int4/128 u_down=int4', got '", payloads, "'");
    const bool is_u = name[0] == 'u';
    if ((payload.bits != 8 && payload.bits != 4 && payload.bits != 3 && payload.bits != 2) ||
        (is_u ? payload.group != 0 : payload.group != 32 && payload.group != 64 && payload.group != 128))
      refuse(op, ": payloads must give ", name, " 8, 4, 3 or 2 bits and ",
             is_u ? "no group, one scale a rank" : "a group of 32, 64 or 128", ", got '", payloads, "'");
    return payload;
  }
  return {};
}

// One tensor that floats or codes store: codes have their own last dimension and scales.
void take_storable(const Taker& take, const FormArguments& a, const std::string& name,
                   const Storable<const void>& part, std::vector<int64_t> shape, Payload payload,
                   FactoredMatrix<const void>& f) {
  const OptionalTensor &tensor = a[part.tensor], &scales = a[part.scales];
  if (scales.has_value() != (tensor.has_value() && payload.is_coded()))
    refuse(take.op, ": scales_", name, " must be given where payloads names ", name, ", and only there");
  if (!payload.is_coded()) {
    f.*part.values = take(name, tensor, shape);
    return;
  }
  const int64_t columns = shape.back();
  shape.back() = stored_row_bytes(columns, payload);
  f.*part.payload = payload;
  f.*part.values = take(name, tensor, shape, ScalarType::Byte);
  shape.pop_back();
  if (payload.group != 0) shape.push_back(groups_of(columns, payload));
  f.*part.its_scales = take("scales_" + name, scales, shape, ScalarType::BFloat16);
}

FactoredMatrix<const void> matrix_of(const Taker& take, const FormArguments& a, const Factored<const void>& from,
                                     bool down) {
  const MatrixTensors& t = kMatrixTensors[down ? 1 : 0];
  const std::string name = t.name;
  const OptionalTensor &u = a[t.u], &mask = a[t.mask], &values = a[t.values], &row_offsets = a[t.row_offsets];
  const int64_t rows = from.rows(down), columns = from.columns(down), words = columns / 32 + (columns % 32 != 0);
  if (u.has_value() != a[t.v].has_value() || u.has_value() != a[t.rank_offsets].has_value())
    refuse(take.op, ": u_", name, ", v_", name, " and rank_offsets_", name, " must be given together");
  if ((mask && !values) || (row_offsets && !mask))
    refuse(take.op, ": mask_", name, " and values_", name, " must be given together, and row_offsets_", name,
           " only with them");
  FactoredMatrix<const void> f;
  f.ranks = side(u, 0);
  f.rank_offsets = take("rank_offsets_" + name, a[t.rank_offsets], {a.num_experts + 1}, ScalarType::Int);
  f.mask = take("mask_" + name, mask, {a.num_experts, rows, words}, ScalarType::Int);
  if (row_offsets) {
    const bool narrow = row_offsets->scalar_type() == ScalarType::Int;
    f.row_offset_size = narrow ? 4 : 8;
    f.row_offsets = take("row_offsets_" + name, row_offsets, {a.num_experts * rows + 1},
                         narrow ? ScalarType::Int : ScalarType::Long);
    f.nnz = side(values, 0);
  } else if (mask) {
    f.block_kept = side(values, 3);
    if (f.block_kept < 1 || f.block_kept > 32)
      refuse(take.op, ": values_", name, " must keep 1 to 32 of 32 columns, got ", f.block_kept);
  }
  const std::array<std::vector<int64_t>, 4> shapes = {{
      {from.groups, rows, columns},
      {f.ranks, rows},
      {f.ranks, columns},
      row_offsets ? std::vector<int64_t>{f.nnz}
      : mask      ? std::vector<int64_t>{a.num_experts, rows, words, f.block_kept}
                  : std::vector<int64_t>{a.num_experts, rows, columns},
  }};
  const auto storable = t.storable<const void>();
  for (size_t i = 0; i < storable.size(); ++i) {
    const std::string its_name = storable[i].stem + name;
    const Payload payload = payload_of(take.op, a.payloads, its_name);
    if (payload.is_coded() && storable[i].tensor == t.values && mask)
      refuse(take.op, ": ", its_name, " must be floats where there is a mask, got codes; the reference runs them");
    take_storable(take, a, its_name, storable[i], shapes[i], payload, f);
  }
  f.bias = take("bias_" + name, a[t.bias], {a.num_experts, rows});
  if (take.gpu && f.mask == nullptr && f.values != nullptr)
    refuse(take.op, ": values_", name, " must have a mask, got a full residual; the reference runs it");
  return f;
}

}  // namespace

FormArguments::FormArguments(Arguments& next) {
  for (int64_t i = 0; i < kFormTensors; ++i) tensors.push_back(next.tensor());
  num_experts = next.take<int64_t>(), hidden_size = next.take<int64_t>(), intermediate_size = next.take<int64_t>();
  gated = next.take<bool>();
  factorization = taken(next.take<StringHandle>()), payloads = taken(next.take<StringHandle>());
}

Factored<const void> form_of(const char* op, const FormArguments& a, std::optional<int32_t> gpu) {
  if (a.num_experts < 1 || a.hidden_size < 1 || a.intermediate_size < 1)
    refuse(op, ": num_experts, hidden_size and intermediate_size must be at least 1, got ", a.num_experts,
           ", ", a.hidden_size, " and ", a.intermediate_size);
  if (a.factorization != "stacked")
    refuse(op, ": factorization must be 'stacked', got '", a.factorization, "'; the reference runs the others");
  if (gpu && !a.payloads.empty())
    refuse(op, ": payloads must be '', got '", a.payloads, "'; the reference runs codes");
  // The type of all floats is that of the first; where there are none, codes meet operands of any type.
  bool is_there = false;
  std::optional<ScalarType> floats;
  for (const MatrixTensors& t : kMatrixTensors) {
    for (const auto& part : t.storable<const void>()) {
      is_there |= a[part.tensor].has_value();
      if (!floats && a[part.tensor] && !a[part.scales]) floats = a[part.tensor]->scalar_type();
    }
    is_there |= a[t.bias].has_value();
    if (!floats && a[t.bias]) floats = a[t.bias]->scalar_type();
  }
  if (!is_there) refuse(op, ": there must be a base, a low-rank or a sparse part, got none");
  const Taker take{op, floats.value_or(ScalarType::BFloat16), gpu};

  Factored<const void> from;
  from.dtype = dtype_of(op, take.dtype);
  from.experts = a.num_experts, from.hidden = a.hidden_size, from.intermediate = a.intermediate_size;
  from.gated = a.gated;
  from.groups = side(a[kBaseGateUp], 0);
  if (a[kGroup].has_value() != a[kBaseGateUp].has_value() || a[kGroup].has_value() != a[kBaseDown].has_value())
    refuse(op, ": group, base_gate_up and base_down must be given together");
  from.group = take("group", a[kGroup], {a.num_experts}, ScalarType::Int);
  from.gate_up = matrix_of(take, a, from, false);
  from.down = matrix_of(take, a, from, true);
  return from;
}

}  // namespace resmoe::bindings
