#pragma once
// How a feature map lies in memory. A map is N samples x C channels x S positions (the spatial dimensions, 0 to 3 of them,
// flattened), possibly a slice of the channels of a larger buffer.

#include "check.h"

namespace resdense {

struct Map {
  void* data;             // nullptr only where the map is empty
  int64_t N, C, S;        // samples, channels, positions of a sample
  int64_t sn, sc, ss;     // strides of sample, channel and position, in elements
  bool channels_last;     // true: sc == 1, rows of channels; false: ss == 1, rows of positions
  ScalarType dtype;

  int64_t rows() const { return N * S; }
  int64_t numel() const { return N * C * S; }

  // channels_last: all N * S positions have the one stride ss, so that the map is a matrix of rows() x C.
  bool uniform_rows() const { return channels_last && sn == S * ss; }

  // channels_first: a sample's C x S values are adjacent; and those of the whole map.
  bool dense_samples() const { return channels_last ? ss == C && sc == 1 : sc == S && ss == 1; }
  bool dense() const { return dense_samples() && sn == C * S; }
};

namespace detail {

inline Map map_from(const Tensor& t, const char* name, void* data) {
  RESDENSE_CHECK(t.dim() >= 2, name, ": expected shape (N, C, ...), got ", shape_string(t));
  RESDENSE_CHECK(t.layout() == torch::headeronly::Layout::Strided, name, ": expected a dense tensor, got a sparse one");
  Map m{data, t.size(0), t.size(1), 1, t.stride(0), t.stride(1), 0, false, t.scalar_type()};

  // The stride of a dimension of size 1 means nothing and may be anything. The others must nest into one stride.
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    const int64_t size = t.size(i);
    if (size != 1) {
      if (m.S == 1) {
        m.ss = t.stride(i);
      } else {
        RESDENSE_CHECK(t.stride(i) == m.S * m.ss || t.numel() == 0, name,
                       ": expected spatial positions with one stride (contiguous or channels_last, or a slice of channels of "
                       "such a tensor), got shape ", shape_string(t), " with strides ", stride_string(t));
      }
      m.S *= size;
    }
  }

  if (m.numel() == 0) {
    m.ss = 1, m.sc = m.S, m.sn = m.C * m.S;
    return m;
  }
  // Give the strides that mean nothing a value that suits, so that no kernel meets a special case.
  if (m.S == 1 && (m.C == 1 || m.sc == 1)) {
    // A matrix of N rows (or a batch of single values): rows of channels.
    m.channels_last = true, m.sc = 1, m.ss = m.N == 1 ? m.C : m.sn;
  } else if (m.C == 1 && m.ss != 1) {
    m.channels_last = true, m.sc = 1;
  } else if (m.C == 1) {
    m.sc = m.S;
  } else if (m.S == 1) {
    m.ss = 1;
  } else {
    // With both strides 1 positions overlap (an expanded or as_strided tensor); reading it as channels-first is as good.
    m.channels_last = m.sc == 1 && m.ss != 1;
  }
  if (m.N == 1) m.sn = m.channels_last ? m.S * m.ss : m.C * m.sc;
  RESDENSE_CHECK(m.channels_last ? m.sc == 1 : m.ss == 1, name,
                 ": expected adjacent channels (channels_last) or adjacent positions (contiguous), got shape ",
                 shape_string(t), " with strides ", stride_string(t));
  return m;
}

}  // namespace detail

// A map to read. An error names the argument where positions have no single stride, or where neither neighbouring
// positions nor neighbouring channels are adjacent. Strides may be 0 (an expanded tensor).
inline Map map_of(const Tensor& t, const char* name) {
  check_float(t, name);
  return detail::map_from(t, name, const_cast<void*>(t.const_data_ptr()));
}

// A map of bytes, such as the places of maxima, to read.
inline Map byte_map_of(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Byte);
  return detail::map_from(t, name, const_cast<void*>(t.const_data_ptr()));
}

namespace detail {

// No two elements of a map that is written may share memory.
inline Map check_no_overlap(const Map& m, const Tensor& t, const char* name) {
  if (m.numel() == 0) return m;
  const int64_t row = m.channels_last ? m.C : m.S;        // elements of the unit-stride axis
  const int64_t step = m.channels_last ? m.ss : m.sc;     // stride and count of the axis around it
  const int64_t count = m.channels_last ? m.S : m.C;
  const int64_t sample = (count - 1) * step + row;
  RESDENSE_CHECK((count == 1 || step >= row) && (m.N == 1 || m.sn >= sample), name,
                 ": expected a tensor whose elements do not overlap, got shape ", shape_string(t), " with strides ",
                 stride_string(t));
  return m;
}

}  // namespace detail

// Maps to write.
inline Map mutable_map_of(const Tensor& t, const char* name) {
  check_float(t, name);
  return detail::check_no_overlap(detail::map_from(t, name, t.mutable_data_ptr()), t, name);
}

inline Map mutable_byte_map_of(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Byte);
  return detail::check_no_overlap(detail::map_from(t, name, t.mutable_data_ptr()), t, name);
}

}  // namespace resdense
