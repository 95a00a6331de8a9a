// The convolution of an activation, and its backward, by the libraries of the device's vendor, on activations in memory: those of
// some samples at a time. One call from Python for all that it takes, since that costs several times what a launch does.

#include <torch/csrc/stable/library.h>

#include "call.h"
#include "common/map.h"

namespace resdense::vendor {
namespace {

using torch::headeronly::MemoryFormat;
using Sizes = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

struct Conv {
  const Tensor& weight;
  const Sizes &stride, &padding, &dilation;
  int64_t groups;

  int64_t outputs() const { return weight.size(0); }

  // Whether every output is made of one position of the input, in its place, and of all its channels.
  bool is_matrix_product() const {
    if (groups != 1 || weight.numel() != weight.size(0) * weight.size(1)) return false;
    const auto all = [](const Sizes& sizes, int64_t value) {
      return std::all_of(sizes.begin(), sizes.end(), [=](int64_t size) { return size == value; });
    };
    return all(stride, 1) && all(padding, 0);
  }

  Sizes shape() const {
    Sizes sizes;
    for (int64_t i = 0; i < weight.dim(); ++i) sizes.push_back(weight.size(i));
    return sizes;
  }

  Tensor matrix() const { return torch::stable::view(weight, {outputs(), weight.size(1)}); }
};

// A map as a matrix [positions, channels] where it lies in memory; nothing where that would take a copy. The memory is the map's.
Optional rows(const Tensor& x) {
  const Map m = map_of(x, "x");
  if (!m.channels_last || !(m.uniform_rows() || m.N <= 1)) return std::nullopt;
  const int64_t sizes[] = {m.rows(), m.C}, strides[] = {m.ss, 1};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2}, x.device(), m.dtype);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

MemoryFormat format_of(const Tensor& x) {
  if (!map_of(x, "x").channels_last || x.dim() < 4) return MemoryFormat::Contiguous;
  return x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

Tensor in_dtype(const Tensor& x, ScalarType dtype) { return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype); }

// The ranges of samples whose activations are at most so many bytes.
class Parts {
 public:
  Parts(const Tensor& x, int64_t bytes) : samples_(x.size(0)) {
    const int64_t all = std::max<int64_t>(x.numel() * x.element_size(), 1);
    size_ = std::max<int64_t>(static_cast<int64_t>(static_cast<double>(bytes) * samples_ / all), 1);
  }

  int64_t count() const { return samples_ == 0 ? 1 : (samples_ + size_ - 1) / size_; }

  Tensor of(const Tensor& x, int64_t part) const {
    if (count() == 1) return x;
    Tensor whole = x;
    return torch::stable::narrow(whole, 0, part * size_, std::min(size_, samples_ - part * size_));
  }

 private:
  int64_t samples_, size_;
};

// A norm and the activation behind it, or neither.
struct Prologue {
  const Optional &scale, &shift;
  double negative_slope;

  Tensor operator()(const Tensor& x) const {
    if (!scale) return x;
    const Tensor out = torch::stable::empty_like(x);
    call("resdense::bn_act", "", x, *scale, *shift, negative_slope, out);
    return out;
  }
};

void convolve(const Tensor& a, const Conv& conv, const Optional& bias, const Tensor& out) {
  const auto from = rows(a), to = rows(out);
  if (from && to && !bias && conv.is_matrix_product()) {
    call<std::tuple<Tensor>>("aten::mm", "out", *from, transposed(conv.matrix()), *to);
    return;
  }
  const Sizes none(conv.stride.size(), 0);
  const auto [made] = call<std::tuple<Tensor>>("aten::convolution", "", a, conv.weight, bias, conv.stride, conv.padding,
                                               conv.dilation, false, none, conv.groups);
  Tensor target = out;
  torch::stable::copy_(target, made);
}

// Whether every position's channels are aligned to 16 bytes, and the positions of one stride.
bool has_aligned_rows(const Tensor& t) {
  bool nested = t.stride(1) == 1 && (t.size(2) == 1 || t.size(3) == 1 || t.stride(2) == t.size(3) * t.stride(3));
  for (int64_t i : {0, 2, 3}) nested = nested && (t.size(i) == 1 || t.stride(i) % 8 == 0);
  return nested && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Whether the operator bn_act_conv3x3 takes it, which activates what it reads as it goes.
bool is_conv3x3(const Tensor& x, const Conv& conv, const Optional& bias, const Tensor& out) {
  const ScalarType dtype = x.scalar_type();
  const auto ones = [](const Sizes& sizes) { return sizes == Sizes{1, 1}; };
  const auto takes = [&](const Tensor& t, int64_t most) {
    const int64_t channels = t.size(1);
    return t.scalar_type() == dtype && channels > 0 && channels % 8 == 0 && channels <= most && has_aligned_rows(t);
  };
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && x.dim() == 4 && conv.weight.scalar_type() == dtype &&
         conv.weight.size(2) == 3 && conv.weight.size(3) == 3 && conv.groups == 1 && !bias && ones(conv.stride) &&
         ones(conv.padding) && ones(conv.dilation) && takes(x, 256) && takes(out, 64);
}

void bn_act_conv(const Tensor& x, const Optional& scale, const Optional& shift, double negative_slope, const Tensor& weight,
                 const Optional& bias, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, int64_t scratch,
                 const Tensor& out, const Optional& mean, const Optional& m2) {
  const Conv conv{weight, stride, padding, dilation, groups};
  if (scale && is_conv3x3(x, conv, bias, out)) {
    call("resdense::bn_act_conv3x3", "", x, *scale, *shift, negative_slope, weight, out, mean, m2);
    return;
  }
  const Prologue activated{scale, shift, negative_slope};
  const Parts parts(x, scratch);
  for (int64_t part = 0; part < parts.count(); ++part)
    convolve(in_dtype(activated(parts.of(x, part)), weight.scalar_type()), conv, bias, parts.of(out, part));
  if (mean) call("resdense::channel_stats_into", "", out, *mean, *m2);
}

// The gradients of the convolution's input, in the layout of `a`, and of its weight.
std::tuple<Tensor, Optional> convolve_backward(const Tensor& grad, const Tensor& a, const Conv& conv, bool need_weight) {
  const auto from = rows(grad), inputs = rows(a);
  if (from && inputs && conv.is_matrix_product()) {
    const Tensor dx = torch::stable::empty_like(a);
    call<std::tuple<Tensor>>("aten::mm", "out", *from, conv.matrix(), *rows(dx));
    if (!need_weight) return {dx, std::nullopt};
    const auto [dweight] = call<std::tuple<Tensor>>("aten::mm", "", transposed(*from), *inputs);
    return {dx, torch::stable::view(dweight, conv.shape())};
  }
  const Sizes none(conv.stride.size(), 0);
  const bool wanted[] = {true, need_weight, false};
  // Those that are not wanted are undefined.
  const auto [dx, dweight, dbias] = call<std::tuple<Tensor, Tensor, Tensor>>(
      "aten::convolution_backward", "", grad, a, conv.weight, std::optional<Sizes>(), conv.stride, conv.padding, conv.dilation,
      false, none, conv.groups, torch::headeronly::HeaderOnlyArrayRef<bool>(wanted, 3));
  return {dx, need_weight ? Optional(dweight) : std::nullopt};
}

// to += from
void add(const Tensor& to, const Tensor& from) {
  const ScalarType dtype = stats_dtype(to.scalar_type());
  Tensor one = torch::stable::new_empty(to, {to.size(1)}, dtype);
  torch::stable::fill_(one, 1.0);
  const Tensor zero = torch::stable::new_zeros(to, {to.size(1)}, dtype);
  call("resdense::pending_grad", "", to, from, one, one, zero, Optional(), 1.0);
}

// What every part has of a sum: added up once all are there, in the dtype of the statistics.
class Sum {
 public:
  void add(const Optional& part) {
    if (part) parts_.push_back(*part);
  }

  Optional total(ScalarType dtype) const {
    if (parts_.empty()) return std::nullopt;
    if (parts_.size() == 1) return in_dtype(parts_[0], dtype);
    Sizes sizes{static_cast<int64_t>(parts_.size())};
    for (int64_t i = 0; i < parts_[0].dim(); ++i) sizes.push_back(parts_[0].size(i));
    const Tensor all = torch::stable::new_empty(parts_[0], sizes, stats_dtype(parts_[0].scalar_type()));
    for (size_t i = 0; i < parts_.size(); ++i) {
      Tensor to = torch::stable::select(all, 0, i);
      torch::stable::copy_(to, parts_[i]);
    }
    return in_dtype(torch::stable::sum(all, Sizes{0}), dtype);
  }

 private:
  std::vector<Tensor> parts_;
};

Tensor bias_gradient(const Tensor& grad) {
  Sizes dimensions{0};
  for (int64_t i = 2; i < grad.dim(); ++i) dimensions.push_back(i);
  return torch::stable::sum(grad, dimensions, false, stats_dtype(grad.scalar_type()));
}

// The gradients of the input, which are pending on `scale` and the vectors behind dy (or were added to `out` and its vectors), of
// the convolution's weight and bias, and of the norm's. To `finish`, that of the input is finished: it is masked when the correction
// is known, in the one pass. A norm whose statistics are not of the batch has an infinite count: it corrects nothing.
std::tuple<Optional, Optional, Optional, Optional, Optional, Optional, Optional> bn_act_conv_backward(
    const Tensor& x, const Optional& scale, const Optional& shift, const Optional& center, const Optional& rstd, double count,
    double negative_slope, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, int64_t scratch,
    const Tensor& grad, const Optional& z, const Optional& alpha, const Optional& beta, const Optional& delta,
    const Optional& out, const Optional& out_beta, const Optional& out_delta, bool finish, bool need_weight, bool need_bias) {
  const Conv conv{weight, stride, padding, dilation, groups};
  const Prologue activated{scale, shift, negative_slope};
  const Parts parts(x, scratch);
  const ScalarType dtype = weight.scalar_type();
  Sum dweight, dbias, sum_dy, sum_dy_xc;
  Optional dy;
  if (!out && parts.count() > 1) dy = torch::stable::empty_like(x);
  for (int64_t part = 0; part < parts.count(); ++part) {
    const Tensor raw = parts.of(x, part);
    // Only the weight's gradient reads it; the other's takes the shape alone.
    const Tensor a = in_dtype(need_weight ? activated(raw) : raw, dtype);
    Tensor upstream = parts.of(grad, part);
    if (z) {
      const Optional none = torch::stable::new_zeros(*beta, {beta->size(0)});
      const auto [finished] =
          call<std::tuple<Tensor>>("resdense::bn_add_act", "", upstream, *alpha, *delta, parts.of(*z, part), beta, none, 1.0);
      upstream = finished;
    }
    upstream = in_dtype(upstream, dtype);
    if (need_bias) dbias.add(bias_gradient(upstream));
    auto [dx, of_weight] = convolve_backward(upstream, a, conv, need_weight);
    dweight.add(of_weight);
    // The framework picks the layout of its gradient by its own rules.
    dx = torch::stable::contiguous(in_dtype(dx, x.scalar_type()), format_of(x));
    Tensor to = out ? parts.of(*out, part) : dx;
    if (scale) {
      const auto sums = out ? call<std::tuple<Tensor, Tensor>>("resdense::bn_act_backward_accumulate", "", to, dx, raw, *scale,
                                                               *shift, *center, negative_slope)
                            : call<std::tuple<Tensor, Tensor>>(finish ? "resdense::bn_act_sums" : "resdense::bn_act_backward", "",
                                                               to, raw, *scale, *shift, *center, negative_slope);
      sum_dy.add(std::get<0>(sums)), sum_dy_xc.add(std::get<1>(sums));
    } else if (out) {
      add(to, dx);
    }
    if (dy) {
      Tensor place = parts.of(*dy, part);
      torch::stable::copy_(place, dx);
    } else if (!out) {
      dy = dx;
    }
  }
  if (!scale) return {dy, std::nullopt, std::nullopt, dweight.total(dtype), dbias.total(dtype), std::nullopt, std::nullopt};

  const ScalarType of_sums = scale->scalar_type();
  const Tensor dbeta = *sum_dy.total(of_sums);
  const Optional to_beta = out ? out_beta : Optional(torch::stable::empty_like(*scale));
  const Optional to_delta = out ? out_delta : Optional(torch::stable::empty_like(*scale));
  const auto [dgamma] =
      call<std::tuple<Tensor>>("resdense::bn_correction", "", dbeta, *sum_dy_xc.total(of_sums), *scale, *center, *rstd, count,
                               *to_beta, *to_delta, out.has_value());
  if (out) return {dy, std::nullopt, std::nullopt, dweight.total(dtype), dbias.total(dtype), dgamma, dbeta};
  if (finish) {
    call("resdense::pending_grad", "", *dy, x, *scale, *to_beta, *to_delta, shift, negative_slope);
    return {dy, std::nullopt, std::nullopt, dweight.total(dtype), dbias.total(dtype), dgamma, dbeta};
  }
  return {dy, to_beta, to_delta, dweight.total(dtype), dbias.total(dtype), dgamma, dbeta};
}

}  // namespace
}  // namespace resdense::vendor

STABLE_TORCH_LIBRARY_IMPL(resdense, CompositeExplicitAutograd, m) {
  m.impl("bn_act_conv", TORCH_BOX(&resdense::vendor::bn_act_conv));
  m.impl("bn_act_conv_backward", TORCH_BOX(&resdense::vendor::bn_act_conv_backward));
}
