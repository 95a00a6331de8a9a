// A 1x1 convolution behind which stands a batch norm, without its output: what ops/conv1x1_bn_add_act.py asks of the convolution's
// input a = act(scale * x + shift), a cache-sized tile at a time. Deviations of bfloat16 maps are rounded as the maps are, and what
// is added up of their products is float32.

#include <numeric>

#include <torch/csrc/stable/library.h>

#include "matmul.h"

namespace resdense::cpu {
namespace {

void check_dtypes(const Map& x, const Map& grad) {
  RESDENSE_CHECK(x.dtype == ScalarType::Float || x.dtype == ScalarType::Double || by_pairs(x, x.C, grad.C),
                 "x: expected dtype float32 or float64, or, channels_last on a processor that multiplies bfloat16, with a multiple "
                 "of 16 channels and an even number of outputs, bfloat16, got ", x.C, " channels of ", dtype_name(x.dtype), " and ",
                 grad.C, " outputs");
  RESDENSE_CHECK(grad.dtype == x.dtype, "grad: expected dtype ", dtype_name(x.dtype), ", got ", dtype_name(grad.dtype));
}

// Whether a map of bfloat16 can be read by pairs of neighbouring channels.
bool lies_in_pairs(const Map& m) { return m.ss % 2 == 0 && reinterpret_cast<uintptr_t>(m.data) % 4 == 0; }

// A tile of a map as the matrix channels x positions: where it lies, if it may and is one, or copied into scratch.
struct Reader {
  const Map& map;
  const bool direct;
  const std::vector<double> zeros;  // as float32, too

  Reader(const Map& m, bool in_place)
      : map(m), direct(in_place && is_matrix(m)), zeros(direct ? 0 : m.C, 0.0) {}

  int64_t bytes_a_position() const { return direct ? 0 : map.C * element_size(map.dtype); }

  Operand values(void* copy, int64_t size) const { return direct ? operand(map) : scratch(copy, map.channels_last, map.C, size); }

  Matrix read(const Tiling& tiling, int64_t tile, const std::vector<Segment>& segments, void* copy) const {
    if (direct) return tile_of(map, tiling, tile);
    Sweep s{Pass::bias, map.dtype, map.channels_last, segments.data(), static_cast<int64_t>(segments.size()), map.C};
    s.in[0] = operand(map), s.out = values(copy, tiling.size), s.coef[0] = zeros.data();
    kernels.sweep(s);
    return channels_by_positions(copy, map.channels_last, map.C, tiling.rows_of(tile), tiling.size);
  }
};

// out = a b, or out += a b
void product(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate, Ahead* ahead) {
  accumulate ? matmul_accumulate(out, a, b, dtype, ahead) : matmul(out, a, b, dtype, ahead);
}

// The same of a a^T, of which our own product leaves out most of what is below the diagonal.
void square(const Matrix& out, const Matrix& a, ScalarType dtype, bool accumulate, Ahead* ahead) {
  constexpr int64_t WIDTH = 32;
  if (!by_gemm(dtype, out.cols) || a.row_stride != 1) return product(out, a, a.t(), dtype, accumulate, ahead);
  float* values = static_cast<float*>(a.data);
  for (int64_t c = 0; c < out.cols; c += WIDTH) {
    const int64_t width = std::min(WIDTH, out.cols - c), rows = c + width;
    product({static_cast<float*>(out.data) + c, rows, width, out.row_stride, 1},
            {values, rows, a.cols, 1, a.col_stride, false, a.pairs}, {values + c, a.cols, width, a.col_stride, 1, false, a.pairs},
            dtype, accumulate, ahead);
  }
}

// Rows of a matrix for as many threads, in whole blocks.
template <class F> void each_rows(int64_t rows, const F& f) {
  constexpr int64_t BLOCK = 16;
  torch::stable::parallel_for(0, (rows + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    f(begin * BLOCK, std::min(end * BLOCK, rows));
  });
}

// What is below the diagonal, from what is above it, or the other way round.
template <class A> void mirror(A* values, int64_t size, bool upper) {
  each_rows(size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = upper ? 0 : i + 1; j < (upper ? i : size); ++j) values[i * size + j] = values[j * size + i];
  });
}

// The chunks' sums of products in order, less count left right^T. Of a square the upper triangle is there.
template <class A>
void total_products(const Scratch& partial, int64_t chunks, const Matrix& out, bool square, double count, const double* left,
                    const double* right) {
  A* values = static_cast<A*>(out.data);
  each_rows(out.rows, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(out.cols);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = square ? i : 0;
      for (int64_t j = first; j < out.cols; ++j) sum[j] = -count * (left[i] * right[j]);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const A* part = partial.of<A>(chunk) + i * out.cols;
        for (int64_t j = first; j < out.cols; ++j) sum[j] += part[j];
      }
      std::copy(sum.begin() + first, sum.end(), values + i * out.cols + first);
    }
  });
  if (square) mirror(values, out.cols, true);
}

Tensor doubles(const double* values, int64_t size) {
  const Tensor out = torch::stable::empty({size}, ScalarType::Double);
  std::copy_n(values, size, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

// A vector of statistics' dtype.
template <class A> const A* vector(const Tensor& v, const char* name, int64_t size, const Tensor& like) {
  return static_cast<const A*>(coefficients(v, name, size, like));
}

// Several sums, so that none waits for the one before it.
template <class A> double dot(const A* a, const A* b, int64_t size) {
  constexpr int SUMS = 16;
  double sums[SUMS] = {};
  int64_t i = 0;
  for (; i + SUMS <= size; i += SUMS)
    for (int j = 0; j < SUMS; ++j) sums[j] += static_cast<double>(a[i + j]) * b[i + j];
  for (; i < size; ++i) sums[0] += static_cast<double>(a[i]) * b[i];
  return std::accumulate(sums, sums + SUMS, 0.0);
}

// out = a^T b, which is symmetric: of a row of blocks those up to the diagonal, and the rest from there.
template <class A> void symmetric(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype) {
  const int64_t blocks = (out.rows + PANELS - 1) / PANELS;
  A* values = static_cast<A*>(out.data);
  const auto row = [&](int64_t block) {
    const int64_t first = block * PANELS, rows = std::min(PANELS, out.rows - first), cols = first + rows;
    matmul({values + first * out.cols, rows, cols, out.cols, 1}, {static_cast<A*>(a.data) + first, rows, a.rows, 1, a.row_stride},
           {b.data, b.rows, cols, b.row_stride, 1, b.packed}, dtype);
  };
  // A short one and a long one together.
  torch::stable::parallel_for(0, (blocks + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      row(block);
      if (blocks - 1 - block > block) row(blocks - 1 - block);
    }
  });
  mirror(values, out.cols, false);
}

// Of weights in T.
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> terms(const double* rest, const Tensor& products, const double* sum_grad,
                                                         const Tensor& grad_products, const Tensor& weight, const Tensor& scale,
                                                         const Tensor& rstd, double count, bool need_weight) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const ScalarType dtype = weight.scalar_type(), wide = stats_dtype(dtype);
  const int64_t K = weight.size(0), C = weight.size(1);
  const Tensor dgamma = torch::stable::empty({K}, wide), dweight = torch::stable::empty({need_weight ? K : 0, C}, dtype),
               scaled = torch::stable::empty({K, C}, dtype), out = torch::stable::empty({C, C}, dtype),
               offset = torch::stable::empty({C}, wide);
  const A *s = vector<A>(scale, "scale", K, weight), *r = vector<A>(rstd, "rstd", K, weight);
  Matrix W = matrix_of(weight, "weight", K, C, dtype);
  const Matrix R = matrix_of(products, "products", C, C, wide), G = matrix_of(grad_products, "grad_products", K, C, wide);
  for (const auto& [m, name] : {std::pair(W, "weight"), std::pair(R, "products"), std::pair(G, "grad_products")})
    RESDENSE_CHECK(m.row_stride == C && m.col_stride == 1, name, ": expected a contiguous matrix");
  const T* w = static_cast<const T*>(W.data);
  const A* g = static_cast<const A*>(G.data);
  T *dw = static_cast<T*>(dweight.mutable_data_ptr()), *sw = static_cast<T*>(scaled.mutable_data_ptr()),
    *p = static_cast<T*>(out.mutable_data_ptr());
  A *dg = static_cast<A*>(dgamma.mutable_data_ptr()), *constant = static_cast<A*>(offset.mutable_data_ptr());

  // What is rounded to T is made in A first, and of W there is a copy in A, whose place dW takes.
  constexpr bool ROUNDS = !std::is_same_v<T, A>;
  const bool packs = by_gemm(wide, C);
  const Scratch memory(1, K * C * sizeof(A)), packed(1, packs ? (K + C) * C * sizeof(A) : 0), matrices(ROUNDS, K * C * sizeof(A)),
      squares(ROUNDS, C * C * sizeof(A));
  const auto in_a = [](auto* place, const Scratch& scratch) {
    if constexpr (ROUNDS) return scratch.of<A>(0);
    else return place;
  };
  A* const turned = memory.of<A>(0);  // -Q W
  A *const made_dw = in_a(dw, matrices), *const made_p = in_a(p, squares);
  const A* const plain = in_a(w, matrices);
  std::vector<double> mean_grad(K);
  each_rows(K, [&](int64_t begin, int64_t end) {
    if constexpr (ROUNDS) std::copy(w + begin * C, w + end * C, made_dw + begin * C);
    for (int64_t k = begin; k < end; ++k) {
      const double of_gamma = r[k] * dot(plain + k * C, g + k * C, C);
      dg[k] = static_cast<A>(of_gamma);
      mean_grad[k] = sum_grad[k] / count;
      const A q = static_cast<A>(-s[k] * r[k] * of_gamma / count);
      for (int64_t c = 0; c < C; ++c) {
        sw[k * C + c] = static_cast<T>(s[k] * plain[k * C + c]);
        turned[k * C + c] = q * plain[k * C + c];
      }
    }
  });

  W.data = const_cast<A*>(plain);
  symmetric<A>({made_p, C, C, C, 1}, {turned, K, C, C, 1}, packs ? pack(W, packed.of<uint32_t>(0) + C * C) : W, wide);
  if constexpr (ROUNDS) std::copy_n(made_p, C * C, p);
  if (need_weight) {
    const Matrix b = packs ? pack(R, packed.of<uint32_t>(0)) : R;
    each_rows(K, [&](int64_t begin, int64_t end) {
      matmul({made_dw + begin * C, end - begin, C, C, 1}, {turned + begin * C, end - begin, C, C, 1}, b, wide);
      for (int64_t k = begin; k < end; ++k)
        for (int64_t c = 0; c < C; ++c) dw[k * C + c] = static_cast<T>(made_dw[k * C + c] + s[k] * g[k * C + c]);
    });
  }
  // Of the matrices as they are rounded: an offset is wrong by the same amount at all positions.
  each_rows(C, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(end - begin);
    const auto subtract = [&](double factor, const T* row) {
      for (int64_t c = begin; c < end; ++c) sum[c - begin] -= factor * static_cast<A>(row[c]);
    };
    for (int64_t k = 0; k < K; ++k) subtract(mean_grad[k], sw + k * C);
    for (int64_t j = 0; j < C; ++j) subtract(rest[j], p + j * C);
    for (int64_t c = begin; c < end; ++c) constant[c] = static_cast<A>(sum[c - begin]);
  });
  return {dgamma, dweight, scaled, out, offset};
}

const double* doubles_of(const Tensor& v, const char* name, int64_t size) {
  RESDENSE_CHECK(v.dim() == 1 && v.size(0) == size, name, ": expected shape (", size, ",), got ", shape_string(v));
  check_dtype(v, name, ScalarType::Double);
  return static_cast<const double*>(v.const_data_ptr());
}

}  // namespace

// Of the M positions: how far the mean of a is from `near`, a point some deviations from it, around which the products are added
// up; R = (a - mean)^T (a - mean); and with the gradient g of the convolution's output 1^T g and G = g^T (a - mean).
std::tuple<Tensor, Tensor, Tensor, Tensor> conv1x1_moments(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                           double activation, const Tensor& near, const Tensor& grad) {
  Map from = map_of(x, "x"), of_grad = map_of(grad, "grad");
  check_positions(of_grad, "grad", from);
  unify({&from, &of_grad}, "conv1x1_moments");
  check_dtypes(from, of_grad);
  const ScalarType dtype = from.dtype, wide = stats_dtype(dtype);
  const bool last = from.channels_last, paired = dtype == ScalarType::BFloat16;
  const int64_t C = from.C, K = of_grad.C, bytes = element_size(dtype), sum_bytes = element_size(wide);
  const void* coef[] = {coefficients(scale, "scale", C, x), coefficients(shift, "shift", C, x), coefficients(near, "near", C, x)};

  const Reader reader(of_grad, paired);  // a product that walks it across its rows waits for memory
  const int64_t bytes_a_position = C * bytes + reader.bytes_a_position() + (paired ? (C + K) * bytes : 0);
  const Tiling tiling(from, bytes_a_position, (K + C) * C * sum_bytes);
  const Scratch memory(tiling.chunks, bytes_a_position * tiling.size);
  const Scratch squares(tiling.chunks, C * C * sum_bytes), products(tiling.chunks, K * C * sum_bytes);
  Sums sums(tiling.chunks, C, 1), grad_sums(tiling.chunks, K, 1);
  std::vector<char> started(tiling.chunks, 0);
  tiling.each([&](int64_t chunk, int64_t tile, int64_t positions, const std::vector<Segment>& segments) {
    Upcoming upcoming(tiling.behind(chunk, tile), {&of_grad, &from});
    char *deviations = memory.of<char>(chunk), *copy = deviations + C * tiling.size * bytes;
    Matrix b = channels_by_positions(deviations, last, C, positions, tiling.size);
    Matrix g = reader.read(tiling, tile, segments, copy);
    Sweep s{Pass::deviate, dtype, last, segments.data(), static_cast<int64_t>(segments.size()), C};
    s.in[0] = operand(from), s.out = scratch(deviations, last, C, tiling.size), s.activation = activation;
    std::copy_n(coef, 3, s.coef);
    kernels.sweep(s);
    s.pass = Pass::sum, s.in[0] = s.out, s.sums[0] = sums.of(chunk, 0);
    kernels.sweep(s);
    s.channels = K, s.in[0] = reader.values(copy, tiling.size), s.sums[0] = grad_sums.of(chunk, 0);
    kernels.sweep(s);
    if (paired) {
      char* pairs = copy + reader.bytes_a_position() * tiling.size;
      b = pair_columns(b, pairs), g = pair_columns(g, pairs + C * tiling.size * bytes);
    }
    square({squares.of(chunk), C, C, C, 1}, b, wide, started[chunk] != 0, upcoming.ahead());
    product({products.of(chunk), K, C, C, 1}, g, b.t(), wide, started[chunk] != 0, upcoming.ahead());
    started[chunk] = 1;
  });

  const double count = static_cast<double>(from.rows());
  std::vector<double> rest = sums.added(0);
  const std::vector<double> sum_g = grad_sums.added(0);
  for (double& of_channel : rest) of_channel /= count;
  const Tensor R = torch::stable::empty({C, C}, wide), G = torch::stable::empty({K, C}, wide);
  const auto total = dtype == ScalarType::Double ? total_products<double> : total_products<float>;
  total(squares, tiling.chunks, {R.mutable_data_ptr(), C, C, C, 1}, true, count, rest.data(), rest.data());
  total(products, tiling.chunks, {G.mutable_data_ptr(), K, C, C, 1}, false, 1, sum_g.data(), rest.data());
  return {doubles(rest.data(), C), R, doubles(sum_g.data(), K), G};
}

// What follows from them (see ops/conv1x1_bn_add_act.py): the gradients of the norm's weight and of the convolution's, and what
// conv1x1_moments_backward wants: s W, -W^T diag(Q) W and the offset.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv1x1_moments_terms(const Tensor& rest, const Tensor& products,
                                                                         const Tensor& sum_grad, const Tensor& grad_products,
                                                                         const Tensor& weight, const Tensor& scale,
                                                                         const Tensor& rstd, double count, bool need_weight) {
  const ScalarType dtype = weight.scalar_type();
  RESDENSE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16,
                 "weight: expected dtype float32, float64 or bfloat16, got ", dtype_name(dtype));
  RESDENSE_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got ", weight.dim());
  const auto found = dtype == ScalarType::Double ? terms<double> : dtype == ScalarType::Float ? terms<float> : terms<c10::BFloat16>;
  return found(doubles_of(rest, "rest", weight.size(1)), products, doubles_of(sum_grad, "sum_grad", weight.size(0)), grad_products,
               weight, scale, rstd, count, need_weight);
}

// da = g weight + (a - near) products + offset, then through the activation as bn_act_backward, or bn_act_backward_accumulate.
std::tuple<Tensor, Tensor> conv1x1_moments_backward(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& center,
                                                    double activation, const Tensor& grad, const Tensor& weight,
                                                    const Tensor& products, const Tensor& near, const Tensor& offset,
                                                    const Tensor& out, bool accumulate) {
  check_same(out, "out", x, "x");
  Map from = map_of(x, "x"), to = mutable_map_of(out, "out"), of_grad = map_of(grad, "grad");
  check_positions(of_grad, "grad", from);
  unify({&from, &to, &of_grad}, "conv1x1_moments_backward");
  check_dtypes(from, of_grad);
  const ScalarType dtype = from.dtype;
  const bool last = from.channels_last, paired = dtype == ScalarType::BFloat16;
  const int64_t C = from.C, K = of_grad.C, bytes = element_size(dtype);
  const void* coef[] = {coefficients(scale, "scale", C, x), coefficients(shift, "shift", C, x),
                        coefficients(center, "center", C, x)};
  const void *of_a = coefficients(near, "near", C, x), *constant = coefficients(offset, "offset", C, x);
  Matrix w = matrix_of(weight, "weight", K, C, dtype), p = matrix_of(products, "products", C, C, dtype);
  RESDENSE_CHECK(!paired || (w.col_stride == 1 && p.col_stride == 1), "weight, products: expected rows of adjacent values");
  const bool packs = paired || (last && by_gemm(dtype, C));
  const Scratch pairs(1, paired ? (K + C) * C * bytes : 0), packed(1, packs ? (K + C) * C * bytes : 0);
  if (paired) w = pair_columns(w.t(), pairs.of(0)).t(), p = pair_columns(p.t(), pairs.of(0, K * C * bytes)).t();
  if (packs) w = pack(w, packed.of<uint32_t>(0)), p = pack(p, packed.of<uint32_t>(0) + w.rows * C);

  const Reader reader(of_grad, !paired || lies_in_pairs(of_grad));
  const int64_t sum_bytes = element_size(stats_dtype(dtype));
  const int64_t bytes_a_position = C * (bytes + sum_bytes) + reader.bytes_a_position();
  const Tiling tiling(from, bytes_a_position, (K + C) * C * bytes);
  const Scratch memory(tiling.chunks, bytes_a_position * tiling.size);
  Sums sums(tiling.chunks, C);
  tiling.each([&](int64_t chunk, int64_t tile, int64_t positions, const std::vector<Segment>& segments) {
    Upcoming upcoming(tiling.behind(chunk, tile), {&from, &of_grad, &to});
    char *deviations = memory.of<char>(chunk), *gradient = deviations + C * tiling.size * bytes;
    const Matrix da = channels_by_positions(gradient, last, C, positions, tiling.size);
    const Matrix g = reader.read(tiling, tile, segments, gradient + C * tiling.size * sum_bytes);
    Sweep s{Pass::deviate, dtype, last, segments.data(), static_cast<int64_t>(segments.size()), C};
    s.in[0] = operand(from), s.out = scratch(deviations, last, C, tiling.size), s.activation = activation;
    s.coef[0] = coef[0], s.coef[1] = coef[1], s.coef[2] = of_a;
    kernels.sweep(s);
    if (paired) {
      // Once rounded, the sum takes the place of the deviations.
      float* sum = reinterpret_cast<float*>(gradient);
      kernels.gemm_bf16({sum, deviations, p.data, positions, C, C / 2, C, C / 2, 1, C, true, static_cast<const float*>(constant), 0,
                         nullptr, upcoming.ahead()});
      kernels.gemm_bf16({nullptr, g.data, w.data, positions, C, K / 2, C, g.col_stride / 2, 1, C, true, sum, C, deviations,
                         upcoming.ahead()});
      s.in[0] = s.out;
    } else {
      matmul(da, p.t(), channels_by_positions(deviations, last, C, positions, tiling.size), dtype, upcoming.ahead());
      matmul_accumulate(da, w.t(), g, dtype, upcoming.ahead());
      s.pass = Pass::bias, s.in[0] = s.out = scratch(gradient, last, C, tiling.size), s.coef[0] = constant;
      kernels.sweep(s);
    }
    s.pass = accumulate ? Pass::mask_accumulate : Pass::mask;
    s.in[1] = operand(from), s.in[2] = operand(to), s.out = operand(to);
    std::copy_n(coef, 3, s.coef);
    s.sums[0] = sums.of(chunk, 0), s.sums[1] = sums.of(chunk, 1);
    kernels.sweep(s);
  });
  return {sums.total(0, from), sums.total(1, from)};
}

}  // namespace resdense::cpu

STABLE_TORCH_LIBRARY_IMPL(resdense, CPU, m) {
  m.impl("conv1x1_moments", TORCH_BOX(&resdense::cpu::conv1x1_moments));
  m.impl("conv1x1_moments_terms", TORCH_BOX(&resdense::cpu::conv1x1_moments_terms));
  m.impl("conv1x1_moments_backward", TORCH_BOX(&resdense::cpu::conv1x1_moments_backward));
}
