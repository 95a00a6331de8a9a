#pragma once
// Tiles: a map's positions, cut into runs small enough that what is computed of them stays in the cache.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/check.h"
#include "../common/map.h"
#include "kernels.h"

namespace resdense::cpu {

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// The maps of one call are walked together, so all get one layout. A map of one channel whose positions are adjacent, or of
// one position a sample, can be read in either.
inline void unify(std::initializer_list<Map*> maps, const char* op) {
  const auto fixed = [](const Map* m) { return m->C > 1 ? m->S > 1 || m->sc > 1 : m->S > 1 && m->ss > 1; };
  bool channels_last = (*maps.begin())->channels_last;
  for (const Map* m : maps)
    if (fixed(m)) { channels_last = m->channels_last; break; }
  for (Map* m : maps) {
    if (m->channels_last == channels_last) continue;
    RESDENSE_CHECK(!fixed(m), op, ": expected all maps in one layout, got channels-first and channels-last together");
    m->channels_last = channels_last;
    if (channels_last) m->sc = 1;
    else m->ss = 1;
  }
}

inline void check_positions(const Map& m, const char* name, const Map& x) {
  RESDENSE_CHECK(m.N == x.N && m.S == x.S, name, ": expected ", x.N, " samples of ", x.S, " positions, as x, got ", m.N,
                 " of ", m.S);
}

inline Operand operand(const Map& m) { return {m.data, m.sn, m.sc, m.ss, false}; }

// A scratch tile of `channels` x `size` values in the layout of the maps.
inline Operand scratch(void* data, bool channels_last, int64_t channels, int64_t size) {
  return channels_last ? Operand{data, 0, 1, channels, true} : Operand{data, 0, size, 1, true};
}

// The positions of a map in tiles of (at most) `size`, as many for a thread as for another.
struct Tiling {
  int64_t rows, S, lines, count, chunks, size;

  // `bytes_a_position` is what the kernel's scratch takes of each, and `matrices` what every tile is multiplied with or added to:
  // where that exceeds the cache, it comes from memory for every tile. `least` positions are worth a thread of their own.
  Tiling(const Map& m, int64_t bytes_a_position, int64_t matrices = 0, int64_t least = SMALLEST)
      : rows(m.rows()), S(m.S), lines((rows + LINE - 1) / LINE) {
    constexpr int64_t CACHE = 512 << 10, LARGEST = 1024;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp(std::max(CACHE, matrices) / std::max<int64_t>(bytes_a_position, 1), SMALLEST, LARGEST) / LINE;
    count = (lines + most - 1) / most;
    count = std::min((count + threads - 1) / threads * threads, (rows + least - 1) / least);
    chunks = std::min(threads, count);
    size = count > 0 ? (lines + count - 1) / count * LINE : 0;
  }

  int64_t first_row(int64_t tile) const { return std::min(rows, lines * tile / count * LINE); }
  int64_t rows_of(int64_t tile) const { return first_row(tile + 1) - first_row(tile); }

  void segments(int64_t tile, std::vector<Segment>& out) const {
    out.clear();
    const int64_t begin = first_row(tile), end = begin + rows_of(tile);
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / S, s = row % S, run = std::min(S - s, end - row);
      out.push_back({n, s, row - begin, run});
      row += run;
    }
  }

  // The positions whose products with a matrix of so many elements are worth a thread of their own.
  static int64_t least_of_products(int64_t elements) {
    constexpr int64_t PRODUCTS = 1 << 20;
    return std::clamp(PRODUCTS / std::max<int64_t>(elements, 1), LINE, SMALLEST);
  }

  // Those of the tile behind this one in its chunk.
  std::vector<Segment> behind(int64_t chunk, int64_t tile) const {
    std::vector<Segment> found;
    if (tile + 1 < count * (chunk + 1) / chunks) segments(tile + 1, found);
    return found;
  }

  // f(chunk, tile, positions in the tile, its segments). A chunk's tiles run in order on one thread, so that what is
  // added up by chunk is the same every time.
  template <class F> void each(const F& f) const {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<Segment> run;
      for (int64_t chunk = begin; chunk < end; ++chunk)
        for (int64_t tile = count * chunk / chunks; tile < count * (chunk + 1) / chunks; ++tile) {
          segments(tile, run);
          f(chunk, tile, rows_of(tile), run);
        }
    });
  }

 private:
  static constexpr int64_t SMALLEST = 64, LINE = 16;  // tiles begin at multiples of the latter
};

// What a chunk's next tile touches of some maps, for products to ask for.
class Upcoming {
 public:
  Upcoming(const std::vector<Segment>& segments, std::initializer_list<const Map*> maps) {
    for (const Map* m : maps)
      for (const Segment& s : segments) {
        const int64_t first = s.n * m->sn + s.s * m->ss;
        if (!m->channels_last) continue;
        if (m->ss == m->C) add(*m, first, s.count * m->C);
        else
          for (int64_t i = 0; i < s.count; ++i) add(*m, first + i * m->ss, m->C);
      }
    ahead_ = {ranges_.data(), ranges_.data() + ranges_.size()};
  }
  Upcoming(const Upcoming&) = delete;

  Ahead* ahead() { return &ahead_; }

 private:
  void add(const Map& m, int64_t first, int64_t values) {
    const char* begin = static_cast<const char*>(m.data) + first * element_size(m.dtype);
    const char* end = begin + values * element_size(m.dtype);
    if (!ranges_.empty() && ranges_.back().end == begin) ranges_.back().end = end;
    else ranges_.push_back({begin, end});
  }

  std::vector<Ahead::Range> ranges_;
  Ahead ahead_;
};

// Scratch comes from torch's allocator, where it is seen and counted: `chunks` areas of `bytes` each.
class Scratch {
 public:
  Scratch(int64_t chunks, int64_t bytes)
      : stride_((bytes + 63) / 64 * 64),
        tensor_(torch::stable::empty({chunks * stride_ + 64}, ScalarType::Byte)),
        base_((reinterpret_cast<uintptr_t>(tensor_.mutable_data_ptr()) + 63) / 64 * 64) {}

  template <class T = void> T* of(int64_t chunk, int64_t offset = 0) const {
    return reinterpret_cast<T*>(base_ + chunk * stride_ + offset);
  }

 private:
  int64_t stride_;
  Tensor tensor_;
  uintptr_t base_;
};

inline Tensor vector_of(int64_t size, const Map& like) {
  return torch::stable::empty({size}, stats_dtype(like.dtype));
}

// Writes float64 sums out in the dtype of the statistics.
inline Tensor vector_from(const double* values, int64_t size, const Map& like) {
  const Tensor out = vector_of(size, like);
  if (like.dtype == ScalarType::Double) std::copy_n(values, size, static_cast<double*>(out.mutable_data_ptr()));
  else std::transform(values, values + size, static_cast<float*>(out.mutable_data_ptr()),
                      [](double v) { return static_cast<float>(v); });
  return out;
}

inline const void* coefficients(const Tensor& v, const char* name, int64_t channels, const Tensor& like) {
  check_vector(v, name, channels, like, "x");
  return v.const_data_ptr();
}

// Per-channel sums, gathered by chunk and added up in the order of the chunks; zeros where an empty map has none.
class Sums {
 public:
  Sums(int64_t chunks, int64_t channels, int count = 2)
      : channels_(channels), count_(count), values_(std::max<int64_t>(chunks, 1) * count * channels) {}

  int count() const { return count_; }
  double* of(int64_t chunk, int which) { return values_.data() + (chunk * count_ + which) * channels_; }

  std::vector<double> added(int which) {
    std::vector<double> first(of(0, which), of(0, which) + channels_);
    const int64_t chunks = static_cast<int64_t>(values_.size()) / (count_ * std::max<int64_t>(channels_, 1));
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t c = 0; c < channels_; ++c) first[c] += of(chunk, which)[c];
    return first;
  }

  Tensor total(int which, const Map& like) { return vector_from(added(which).data(), channels_, like); }

 private:
  int64_t channels_;
  int count_;
  std::vector<double> values_;
};

}  // namespace resdense::cpu
