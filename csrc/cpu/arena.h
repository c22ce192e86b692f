// The memory of one call: its intermediate results and what its threads scribble on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../packed.h"

namespace resmoe {

constexpr int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One allocation, handed out in parts of whole cache lines.
class Arena {
 public:
  template <typename T>
  int64_t plan(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += rounded_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return at;
  }
  // Aligned by hand: where the caller keeps small blocks of its own between calls, glibc 2.36 rarely reuses
  // what aligned_alloc returned, and a process grew by 70 KB a call.
  void allocate() {
    block_.reset(std::malloc(static_cast<size_t>(bytes_ + 2 * kAlignment)));
    if (!block_) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(block_.get());
    begin_ = static_cast<std::byte*>(block_.get()) + (kAlignment - address % kAlignment) % kAlignment;
  }
  std::byte* at(int64_t offset) const { return begin_ + offset; }

 private:
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> block_;
  std::byte* begin_ = nullptr;
};

// Rows of operands, one a pair, an item or a token.
struct Operands {
  std::byte* rows = nullptr;
  int64_t row_bytes = 0;
  int64_t element = 0;
  std::byte* row(int64_t i) const { return rows + i * row_bytes; }
  std::byte* at(int64_t i, int64_t column) const { return row(i) + column * element; }
};

}  // namespace resmoe
