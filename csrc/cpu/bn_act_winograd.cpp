// A 3x3 convolution of stride 1 and padding 1 with batch norm and activation as its prologue, and its backward, by Winograd's
// algorithm on channels-last maps: a block of tiles at a time is activated and transformed into scratch, multiplied there, and
// what belongs to the result (bias, statistics; mask, sums, accumulation) is done where it is transformed back.

#include <torch/csrc/stable/library.h>

#include "matmul.h"
#include "stats.h"

namespace resdense::cpu {
namespace {

using Elements = Points::Elements;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tiles of maps of one size, in blocks of a few runs, and these dealt out to the threads.
class Blocks {
 public:
  // `filters` has the bytes of what every block is multiplied with: from memory where they exceed the cache.
  Blocks(const Tensor& x, int tile, int64_t bytes_a_tile, int64_t filters)
      : tile_(tile), height_(x.size(2)), width_(x.size(3)), rows_(ceil_div(height_, tile)), columns_(ceil_div(width_, tile)) {
    constexpr int64_t CACHE = 768 << 10, SMALLEST = 14, LARGEST = 112;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp(std::max(CACHE, filters) / bytes_a_tile, SMALLEST, LARGEST);
    parts_ = std::max<int64_t>(1, (columns_ + most - 1) / most);
    runs_ = x.size(0) * rows_ * parts_ * (columns_ > 0);
    longest_ = (columns_ + parts_ - 1) / parts_;
    // Beside small maps the scratch is to be small, too: two blocks a thread.
    const int64_t together = longest_ > 0 ? std::clamp<int64_t>(most / longest_, 1, std::max<int64_t>(1, runs_ / (2 * threads))) : 1;
    // As many a thread as another.
    count_ = std::min(runs_, ((runs_ + together - 1) / together + threads - 1) / threads * threads);
    size = count_ > 0 ? (runs_ + count_ - 1) / count_ * longest_ : 0;
    chunks = std::min(threads, count_);
  }

  int64_t size = 0, chunks = 0;  // the largest block's tiles; the threads that have one

  // f(chunk, runs, tiles, segments of the chunk's next block). A chunk's blocks run in order on one thread.
  template <class F> void each(const F& f) const {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<TileRun> runs;
      std::vector<Segment> upcoming;
      for (int64_t chunk = begin; chunk < end; ++chunk)
        for (int64_t block = count_ * chunk / chunks; block < count_ * (chunk + 1) / chunks; ++block) {
          upcoming.clear();
          if (block + 1 < count_ * (chunk + 1) / chunks) block_runs(block + 1, runs), segments(runs, upcoming);
          f(chunk, runs, block_runs(block, runs), upcoming);
        }
    });
  }

  // The positions that a block's tiles cover.
  int64_t segments(const std::vector<TileRun>& runs, std::vector<Segment>& out) const {
    out.clear();
    int64_t positions = 0;
    for (const TileRun& run : runs)
      for (int64_t row = tile_ * run.row; row < std::min(tile_ * (run.row + 1), height_); ++row) {
        const int64_t first = tile_ * run.column, count = std::min(tile_ * run.count, width_ - first);
        out.push_back({run.n, row * width_ + first, positions, count});
        positions += count;
      }
    return positions;
  }

 private:
  // Returns the number of tiles.
  int64_t block_runs(int64_t block, std::vector<TileRun>& out) const {
    out.clear();
    int64_t tiles = 0;
    for (int64_t run = runs_ * block / count_; run < runs_ * (block + 1) / count_; ++run) {
      const int64_t part = run % parts_, row = run / parts_;
      const int64_t first = columns_ * part / parts_, end = columns_ * (part + 1) / parts_;
      out.push_back({row / rows_, row % rows_, first, end - first});
      tiles += end - first;
    }
    return tiles;
  }

  int64_t tile_, height_, width_, rows_, columns_, parts_, runs_, longest_, count_;
};

// A transform walks the channels of its tiles one vector after another; of so few tiles all of them stay in the first cache.
void each_run(void (*transform)(const Transform&), Transform t, const std::vector<TileRun>& runs) {
  constexpr int64_t PIECE = 7;
  t.first = 0;
  for (const TileRun& run : runs)
    for (int64_t i = 0; i < run.count; i += PIECE) {
      t.tiles = {run.n, run.row, run.column + i, std::min(PIECE, run.count - i)};
      transform(t);
      t.first += t.tiles.count;
    }
}

Map image_of(Map m, const Tensor& t, const char* name, const Tensor& x) {
  RESDENSE_CHECK(t.dim() == 4, name, ": expected shape (N, C, H, W), got ", shape_string(t));
  RESDENSE_CHECK(t.size(0) == x.size(0) && t.size(2) == x.size(2) && t.size(3) == x.size(3), name, ": expected ", x.size(0),
                 " samples of ", x.size(2), "x", x.size(3), ", as x, got ", shape_string(t));
  check_dtype(t, name, x.scalar_type());
  RESDENSE_CHECK(t.scalar_type() != ScalarType::Double, name, ": expected dtype float32, bfloat16 or float16, got float64");
  if (m.C == 1) m.channels_last = true, m.sc = 1;
  RESDENSE_CHECK(m.channels_last || m.numel() == 0, name, ": expected a channels_last map, got strides ", stride_string(t));
  return m;
}

void check_filters(const Tensor& weight, const Tensor& x, int64_t outputs) {
  RESDENSE_CHECK(weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
                     weight.size(3) == 3,
                 "weight: expected shape (", outputs, ", ", x.size(1), ", 3, 3), got ", shape_string(weight));
  check_dtype(weight, "weight", x.scalar_type());
}

// The distance of two points' matrices. A tile is stored to all of them, and a power of two would put them all into one cache set.
int64_t point_size(int64_t rows, int64_t channels, bool paired) {
  return ((paired ? (rows + 1) / 2 : rows) * Points::padded(channels) + 1023) / 1024 * 1024 + 16;
}

// The bytes of all points.
int64_t bytes(int tile, int64_t rows, int64_t channels, bool paired = false) {
  return points_of(tile) * 4 * point_size(rows, channels, paired);
}

// Scratch of one chunk, or shared by all, in points.
Points points_in(const Scratch& scratch, int64_t chunk, int tile, int64_t rows, int64_t channels, int64_t offset = 0,
                 Elements elements = Elements::values) {
  return {scratch.of<float>(chunk, offset), Points::padded(channels), point_size(rows, channels, elements != Elements::values),
          tile, elements};
}

Matrix matrix(const Points& p, int i, int64_t rows, int64_t channels) {
  float* const data = p.data + i * p.size;
  switch (p.elements) {
    case Elements::values: return {data, rows, channels, p.channels, 1};
    case Elements::channel_pairs: return {data, rows, (channels + 1) / 2, p.channels / 2, 1, false, true};
    default: return {data, (rows + 1) / 2, channels, p.channels, 1, false, true};
  }
}

// Rows that are pairs stay together.
void transform_filters(const Filters& f, const Points& points) {
  torch::stable::parallel_for(0, (f.rows + 1) / 2, 8, [&](int64_t begin, int64_t end) {
    kernels.winograd_filters(f, points, 2 * begin, std::min(2 * end, f.rows));
  });
}

// The filters of one point.
Matrix filters_at(const Points& p, int i, int64_t rows) {
  Matrix m = matrix(p, i, rows, p.channels);
  m.packed = kernels.gemm != nullptr;
  return m;
}

// Whether the points of such maps are pairs in backward. Forward, where what is rounded decides which activations are zero, all
// gradients would show it.
bool by_pairs(const Map& m) { return kernels.gemm_bf16 != nullptr && m.dtype == ScalarType::BFloat16; }

// The side of the tiles forward. Of 16 bits it is 4, which costs float32 a digit that they do not show, where that takes fewer
// products and the filters are at most twice as large as the transformed maps.
int best_tile(const Tensor& x, int64_t outputs) {
  if (x.scalar_type() == ScalarType::Float) return 2;
  const int64_t C = x.size(1);
  const auto tiles = [&](int tile) { return x.size(0) * ceil_div(x.size(2), tile) * ceil_div(x.size(3), tile); };
  if (points_of(4) * tiles(4) >= points_of(2) * tiles(2)) return 2;
  return C * outputs <= 2 * tiles(4) * (C + outputs) ? 4 : 2;
}

// The side of the tiles backward.
constexpr int TILE = 2;

// Adds up the chunks' gradients of the transformed filters in order, and transforms them back.
void transform_gradients(const Scratch& partial, int64_t chunks, int64_t rows, int64_t columns, float* out) {
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    const Points sum = points_in(partial, 0, TILE, rows, columns);
    const Points part{sum.data + begin * sum.channels, sum.channels, sum.size};
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* other = points_in(partial, chunk, TILE, rows, columns).data + begin * sum.channels;
      for (int point = 0; point < sum.count(); ++point)
        for (int64_t i = 0; i < (end - begin) * sum.channels; ++i) part.data[point * sum.size + i] += other[point * sum.size + i];
    }
    kernels.winograd_filter_gradient(part, end - begin, columns, out + begin * 9 * columns);
  });
}

}  // namespace

void bn_act_winograd(const Tensor& x, const Tensor& scale, const Tensor& shift, double activation,
                     const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out,
                     const std::optional<Tensor>& mean, const std::optional<Tensor>& m2) {
  const Map from = image_of(map_of(x, "x"), x, "x", x), to = image_of(mutable_map_of(out, "out"), out, "out", x);
  check_stats(mean, m2, out);
  const int64_t C = from.C, K = to.C;
  check_filters(weight, x, K);
  const std::vector<float> zeros(bias ? 0 : K, 0.0f);

  const int tile = best_tile(x, K);
  const Blocks blocks(x, tile, points_of(tile) * 4 * (Points::padded(C) + Points::padded(K)), bytes(tile, C, K));
  const int64_t of_windows = bytes(tile, blocks.size, C);
  const Scratch shared(1, bytes(tile, C, K)), scratch(blocks.chunks, of_windows + bytes(tile, blocks.size, K));
  const Points filters = points_in(shared, 0, tile, C, K);
  transform_filters({weight.const_data_ptr(), from.dtype, C, K, weight.stride(1), weight.stride(0),
                    {weight.stride(2), weight.stride(3)}}, filters);

  Transform input{{Pass::act, from.dtype, true, nullptr, 0, C}, x.size(2), x.size(3)};
  input.sweep.in[0] = operand(from), input.sweep.activation = activation;
  input.sweep.coef[0] = coefficients(scale, "scale", C, x), input.sweep.coef[1] = coefficients(shift, "shift", C, x);
  Transform output{{Pass::bias, to.dtype, true, nullptr, 0, K}, x.size(2), x.size(3)};
  output.sweep.out = operand(to);
  output.sweep.coef[0] = bias ? coefficients(*bias, "bias", K, out) : zeros.data();

  Stats statistics(mean ? blocks.chunks : 0, to);
  blocks.each([&](int64_t chunk, const std::vector<TileRun>& runs, int64_t tiles, const std::vector<Segment>& next) {
    Upcoming upcoming(next, {&from, &to});
    const Points windows = points_in(scratch, chunk, tile, blocks.size, C);
    const Points products = points_in(scratch, chunk, tile, blocks.size, K, of_windows);
    Transform t = input;
    t.points = windows;
    each_run(kernels.winograd_input, t, runs);
    for (int i = 0; i < filters.count(); ++i)
      matmul(matrix(products, i, tiles, products.channels), matrix(windows, i, tiles, C),
             filters_at(filters, i, C), ScalarType::Float, upcoming.ahead());
    t = output;
    t.points = products;
    each_run(kernels.winograd_output, t, runs);
    if (mean) {
      std::vector<Segment> segments;
      const int64_t positions = blocks.segments(runs, segments);
      statistics.add(chunk, segments, positions, true, operand(to));
    }
  });
  if (mean) statistics.total(to, *mean, *m2);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_winograd_backward(
    const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& center, double activation,
    const Tensor& weight, const Tensor& dy, const Tensor& z, const Tensor& alpha, const Tensor& beta, const Tensor& delta,
    const Tensor& out, bool accumulate, bool need_weight) {
  check_same(out, "out", x, "x");
  check_same(z, "z", dy, "dy");
  const Map from = image_of(map_of(x, "x"), x, "x", x), to = image_of(mutable_map_of(out, "out"), out, "out", x);
  const Map grad = image_of(map_of(dy, "dy"), dy, "dy", x), raw = image_of(map_of(z, "z"), z, "z", x);
  const int64_t C = from.C, K = grad.C;
  check_filters(weight, x, K);

  const bool paired = by_pairs(from);
  const Elements in_tiles = paired ? Elements::tile_pairs : Elements::values;
  const Elements in_channels = paired ? Elements::channel_pairs : Elements::values;
  const int64_t bytes_a_tile = points_of(TILE) * (Points::padded(C) * 4 + 2 * Points::padded(K) * (paired ? 2 : 4));
  const Blocks blocks(x, TILE, bytes_a_tile, bytes(TILE, K, C, paired));
  const int64_t of_windows = bytes(TILE, blocks.size, C), of_gradient = bytes(TILE, blocks.size, K, paired);
  const Scratch shared(1, bytes(TILE, K, C, paired)), scratch(blocks.chunks, of_windows + 2 * of_gradient);
  const Scratch partial(need_weight ? blocks.chunks : 0, bytes(TILE, K, C));
  const Points filters = points_in(shared, 0, TILE, K, C, 0, in_tiles);
  // Turned: from the last tap to the first.
  const char* last = static_cast<const char*>(weight.const_data_ptr()) +
                     2 * (weight.stride(2) + weight.stride(3)) * element_size(from.dtype);
  transform_filters({last, from.dtype, K, C, weight.stride(0), weight.stride(1), {-weight.stride(2), -weight.stride(3)}}, filters);

  Transform input{{Pass::act, from.dtype, true, nullptr, 0, C}, x.size(2), x.size(3)};
  input.sweep.in[0] = operand(from), input.sweep.activation = activation;
  input.sweep.coef[0] = coefficients(scale, "scale", C, x), input.sweep.coef[1] = coefficients(shift, "shift", C, x);
  Transform output = input;
  output.sweep.pass = accumulate ? Pass::mask_accumulate : Pass::mask;
  output.sweep.in[1] = operand(from), output.sweep.in[2] = output.sweep.out = operand(to);
  output.sweep.coef[2] = coefficients(center, "center", C, x);
  Transform gradient{{Pass::pending, grad.dtype, true, nullptr, 0, K}, x.size(2), x.size(3)};
  gradient.sweep.in[0] = operand(grad), gradient.sweep.in[1] = operand(raw);
  gradient.sweep.coef[0] = coefficients(alpha, "alpha", K, dy), gradient.sweep.coef[1] = coefficients(beta, "beta", K, dy);
  gradient.sweep.coef[2] = coefficients(delta, "delta", K, dy);

  std::vector<char> started(blocks.chunks, 0);
  Sums sums(blocks.chunks, C);
  blocks.each([&](int64_t chunk, const std::vector<TileRun>& runs, int64_t tiles, const std::vector<Segment>& next) {
    Upcoming upcoming(next, {&grad, &raw, &from, &to});
    const Points windows = points_in(scratch, chunk, TILE, blocks.size, C, 0, in_tiles);
    const Points turned = points_in(scratch, chunk, TILE, blocks.size, K, of_windows, in_channels);
    const Points expanded = points_in(scratch, chunk, TILE, blocks.size, K, of_windows + of_gradient, in_tiles);
    Transform t = gradient;
    t.points = turned;
    if (need_weight) t.gradient = expanded;
    each_run(kernels.winograd_input, t, runs);

    if (need_weight) {
      t = input;
      t.points = windows;
      each_run(kernels.winograd_input, t, runs);
      const Points total = points_in(partial, chunk, TILE, K, C);
      const auto product = started[chunk] ? matmul_accumulate : matmul;
      for (int i = 0; i < filters.count(); ++i)
        product(matrix(total, i, K, total.channels), matrix(expanded, i, tiles, K).t(),
                matrix(windows, i, tiles, windows.channels), ScalarType::Float, upcoming.ahead());
      started[chunk] = 1;
    }

    // The data gradient takes the place of the windows.
    const Points products = points_in(scratch, chunk, TILE, blocks.size, C);
    for (int i = 0; i < filters.count(); ++i)
      matmul(matrix(products, i, tiles, products.channels), matrix(turned, i, tiles, K),
             filters_at(filters, i, K), ScalarType::Float, upcoming.ahead());
    t = output;
    t.points = products;
    t.sweep.sums[0] = sums.of(chunk, 0), t.sweep.sums[1] = sums.of(chunk, 1);
    each_run(kernels.winograd_output, t, runs);
  });

  const Tensor dweight = torch::stable::empty({need_weight ? K : 0, 3, 3, C}, ScalarType::Float);
  if (need_weight) {
    float* result = static_cast<float*>(dweight.mutable_data_ptr());
    if (blocks.chunks == 0) std::fill_n(result, K * 9 * C, 0.0f);
    else transform_gradients(partial, blocks.chunks, K, C, result);
  }
  return {dweight, sums.total(0, from), sums.total(1, from)};
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("bn_act_winograd", TORCH_BOX(&resdense::cpu::bn_act_winograd));
  m.impl("bn_act_winograd_backward", TORCH_BOX(&resdense::cpu::bn_act_winograd_backward));
}
