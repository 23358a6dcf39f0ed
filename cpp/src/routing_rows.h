// Rows of tensors by batch row and token, and the inverse of a list. For the baseline units of the routing family.
#pragma once
#include <algorithm>
#include <cstdint>

#include "effcore/routing.h"
#include "routing_kernels.h"
#include "scratch.h"

namespace effcore::routing {

inline std::int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 || dtype == DType::int32 ? 4 : 2;
}
inline std::int64_t sum_size(DType dtype) {
  return dtype == DType::float64 ? 8 : 4;
}

// A piece of scratch memory begins at a cache line.
inline std::int64_t round_up(std::int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

struct Rows {
  char* data;
  std::int64_t stride[2];  // in bytes
  std::int64_t bytes;      // of a row

  explicit Rows(const TensorView& t)
      : data(static_cast<char*>(t.data)),
        stride{t.stride[0] * element_size(t.dtype), t.stride[1] * element_size(t.dtype)},
        bytes(t.size[2] * element_size(t.dtype)) {}
  void* operator()(std::int64_t b, std::int64_t token) const { return data + b * stride[0] + token * stride[1]; }
};

struct Lists {
  const std::int32_t* data;
  std::int64_t stride[2];

  explicit Lists(const TensorView& t) : data(static_cast<const std::int32_t*>(t.data)), stride{t.stride[0], t.stride[1]} {}
  std::int32_t operator()(std::int64_t b, std::int64_t i) const { return data[b * stride[0] + i * stride[1]]; }
};

// For each token the first place of the list that names it, and for each place the next one that names the same token; -1:
// none. In the caller's shared scratch memory, followed by `extra` bytes for other use.
class Inverse {
 public:
  Inverse(const TensorView& index, std::int64_t tokens, const Threads& threads, std::int64_t extra)
      : tokens_(tokens), size_(index.size[1]) {
    const std::int64_t batch = index.size[0], bytes = batch * (tokens_ + size_) * 4, padded = round_up(bytes);
    data_ = static_cast<std::int32_t*>(scratch::get(scratch::Slot::shared, padded + extra));
    extra_ = reinterpret_cast<char*>(data_) + padded;
    const Lists list(index);
    const auto invert = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        std::int32_t* const first = data_ + b * (tokens_ + size_);
        std::int32_t* const next = first + tokens_;
        std::fill(first, first + tokens_, -1);
        for (std::int64_t i = size_ - 1; i >= 0; --i) {
          std::int32_t& head = first[list(b, i)];
          next[i] = head;
          head = static_cast<std::int32_t>(i);
        }
      }
    };
    if (bytes <= 64 << 10)
      invert(0, batch);
    else
      threads(batch, invert);
  }
  std::int32_t first(std::int64_t b, std::int64_t token) const { return data_[b * (tokens_ + size_) + token]; }
  std::int32_t next(std::int64_t b, std::int64_t place) const { return data_[b * (tokens_ + size_) + tokens_ + place]; }
  void* extra() const { return extra_; }

 private:
  std::int64_t tokens_, size_;
  std::int32_t* data_;
  void* extra_;
};

}  // namespace effcore::routing
