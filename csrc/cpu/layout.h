// Offsets in a half, and whether another rank's make sense.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "exchange.h"
#include "rows.h"

namespace scalemoe {

inline int64_t row_bytes_of(const OpArgs& args) { return args.hidden * item_bytes(static_cast<int>(args.dtype)); }

// Up to the next cache line.
inline size_t at_line(size_t offset) { return (offset + 63) / 64 * 64; }

// Whether count * each bytes from `offset` lie within `size`.
inline bool fits(int64_t offset, int64_t count, int64_t each, size_t size) {
  int64_t bytes, end;
  return offset >= 0 && count >= 0 && !__builtin_mul_overflow(count, each, &bytes) && !__builtin_add_overflow(offset, bytes, &end) &&
         static_cast<uint64_t>(end) <= size;
}

// 2, 4 or 8 bytes.
inline void copy_value(void* dst, const void* src, int64_t bytes) {
  switch (bytes) {
    case 2: std::memcpy(dst, src, 2); break;
    case 4: std::memcpy(dst, src, 4); break;
    default: std::memcpy(dst, src, 8);
  }
}

}  // namespace scalemoe
