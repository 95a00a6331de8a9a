#pragma once
// Argument checks of the host functions. A message names the argument, what was expected and what came; it carries no
// file name or line, which would be those of the machine that built the library.

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/ScalarType.h>

namespace resdense {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] inline void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

#define RESDENSE_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      ::resdense::fail(__VA_ARGS__);   \
  } while (0)

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    default: return torch::headeronly::toString(dtype);
  }
}

// The dtype of statistics, sums and per-channel vectors that go with activations of this dtype.
inline ScalarType stats_dtype(ScalarType activation) {
  return activation == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_string(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ')';
  return text.str();
}

inline std::string stride_string(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.stride(i);
  text << ')';
  return text.str();
}

inline std::string device_string(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  std::ostringstream text;
  text << (t.is_cuda() ? "cuda:" : "another device:") << t.get_device_index();
  return text.str();
}

inline void check_float(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  RESDENSE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                     dtype == ScalarType::BFloat16,
                 name, ": expected dtype float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  RESDENSE_CHECK(t.scalar_type() == expected, name, ": expected dtype ", dtype_name(expected), ", got ",
                 dtype_name(t.scalar_type()));
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  // One kind of device cannot be told from another here except CPU and CUDA, which are the ones these kernels serve.
  RESDENSE_CHECK(t.is_cpu() == like.is_cpu() && t.is_cuda() == like.is_cuda() &&
                     t.get_device_index() == like.get_device_index(),
                 name, ": expected device ", device_string(like), " (that of ", like_name, "), got ", device_string(t));
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  RESDENSE_CHECK(same, name, ": expected shape ", shape_string(like), " (that of ", like_name, "), got ",
                 shape_string(t));
}

// Same dtype, device and shape: two maps that are walked together. Strides may differ.
inline void check_same(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_dtype(t, name, like.scalar_type());
  check_same_device(t, name, like, like_name);
  check_same_shape(t, name, like, like_name);
}

// A per-channel vector: contiguous, `channels` long, on the device of `like`, in the dtype of its statistics.
inline void check_vector(const Tensor& t, const char* name, int64_t channels, const Tensor& like,
                         const char* like_name) {
  RESDENSE_CHECK(t.dim() == 1 && t.size(0) == channels, name, ": expected shape (", channels, ",), one value a channel of ",
                 like_name, ", got ", shape_string(t));
  RESDENSE_CHECK(channels <= 1 || t.stride(0) == 1, name, ": expected a contiguous vector, got stride ", t.stride(0));
  check_dtype(t, name, stats_dtype(like.scalar_type()));
  check_same_device(t, name, like, like_name);
}

// Where an operator is to leave statistics of `out` there are both vectors.
inline void check_stats(const std::optional<Tensor>& mean, const std::optional<Tensor>& m2, const Tensor& out) {
  RESDENSE_CHECK(mean.has_value() == m2.has_value(), "m2: expected to be given where mean is, and only there");
  if (!mean) return;
  check_vector(*mean, "mean", out.size(1), out, "out");
  check_vector(*m2, "m2", out.size(1), out, "out");
}

// Where `eps` is given a norm reads `out`, with these statistics, behind so many channels `before`.
inline void check_reader(std::optional<double> eps, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& mean, const Tensor& out, int64_t before = 0) {
  RESDENSE_CHECK(!eps || mean, "eps: expected only with the statistics of what the norm reads, mean and m2");
  const int64_t channels = before + out.size(1);
  if (weight) check_vector(*weight, "reader_weight", channels, out, "out");
  if (bias) check_vector(*bias, "reader_bias", channels, out, "out");
}

// The statistics of those channels, where there are any: their number.
inline int64_t check_before(const std::optional<Tensor>& mean, const std::optional<Tensor>& m2, const Tensor& out) {
  RESDENSE_CHECK(mean.has_value() == m2.has_value(), "before_m2: expected to be given where before_mean is, and only there");
  if (!mean) return 0;
  const int64_t channels = mean->numel();
  check_vector(*mean, "before_mean", channels, out, "out");
  check_vector(*m2, "before_m2", channels, out, "out");
  return channels;
}

}  // namespace resdense
