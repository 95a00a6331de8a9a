// The convolution of an activation, and its backward: by the operators that activate what they read as they go, where they serve,
// else by the libraries of the device's vendor, on activations in memory, those of some samples at a time. One call from Python for
// all that it takes, since such a call costs several times what a launch does.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "call.h"
#include "common/activation.h"
#include "common/conv_limits.h"
#include "common/memory.h"

namespace resdense::convolution {
namespace {

using torch::headeronly::MemoryFormat;
using Sizes = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

struct Conv {
  const Tensor& weight;
  const Sizes &stride, &padding, &dilation;
  int64_t groups;

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

  // (outputs, taps, channels) in the weight's shape.
  Tensor of_taps(const Tensor& t) const {
    Sizes sizes = shape(), strides(sizes.size(), 1);
    int64_t stride = sizes[1];
    for (size_t i = sizes.size() - 1; i >= 2; --i) strides[i] = stride, stride *= sizes[i];
    strides[0] = stride;
    return view_of(t, weight.dim(), sizes.data(), strides.data());
  }

  Tensor matrix() const { return matrix_view(weight, weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)); }
};

// A map as a matrix [positions, channels] where it lies in memory; nothing where that would take a copy.
Optional rows(const Tensor& x) {
  const Map m = map_of(x, "x");
  if (!m.channels_last || !(m.uniform_rows() || m.N <= 1)) return std::nullopt;
  return matrix_view(x, m.rows(), m.C, m.ss, 1);
}

Tensor transposed(const Tensor& matrix) {
  return matrix_view(matrix, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

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
    size_ = all <= bytes ? std::max<int64_t>(samples_, 1) : std::max<int64_t>(bytes / ((all + samples_ - 1) / samples_), 1);
  }

  // All of them at once.
  static Parts all(const Tensor& x) { return Parts(x, std::numeric_limits<int64_t>::max()); }

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
  double activation;

  Tensor operator()(const Tensor& x) const {
    if (!scale) return x;
    const Tensor out = torch::stable::empty_like(x);
    call("resdense::bn_act", "", x, *scale, *shift, activation, out);
    return out;
  }
};

// Whether our kernels take such a map, of so many channels at most, where they compute in `dtype`.
bool is_ours(const Tensor& t, ScalarType dtype, int64_t channels) {
  if (t.scalar_type() != dtype || !is_half_precision(dtype)) return false;
  const Map m = map_of(t, "map");
  // The 3x3's kernel counts a row of padding between samples: of maps one position high that is as many again.
  const bool few = has_few_rows(m) && 2 * m.rows() < int64_t(1) << 30;
  return takes_channels(m, channels) && has_aligned_rows(m) && few;
}

// Whether the operator bn_act_conv3x3 takes it, and those of its backward: `outputs` is what is written, or its gradient, of so
// many channels at most.
bool is_conv3x3(const Tensor& x, const Conv& conv, const Tensor& outputs, int64_t most) {
  const auto ones = [](const Sizes& sizes) { return sizes == Sizes{1, 1}; };
  const ScalarType dtype = conv.weight.scalar_type();
  return x.dim() == 4 && conv.weight.size(2) == 3 && conv.weight.size(3) == 3 && conv.groups == 1 && ones(conv.stride) &&
         ones(conv.padding) && ones(conv.dilation) && is_ours(x, dtype, kConv3x3Inputs) && is_ours(outputs, dtype, most);
}

// Whether the operators bn_act_conv1x1 take it, and those of its backward: `outputs` is what is written, or its gradient.
bool is_conv1x1(const Tensor& x, const Conv& conv, const Tensor& outputs) {
  const ScalarType dtype = conv.weight.scalar_type();
  const auto takes = [&](const Tensor& t, int64_t channels) {
    return is_ours(t, dtype, channels) && (t.numel() == 0 || map_of(t, "map").uniform_rows());
  };
  return conv.is_matrix_product() && takes(x, kConv1x1Inputs) && takes(outputs, kConv1x1Outputs);
}

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

// Scale, shift and rstd of the norm that reads what is written, where one does.
using Folded = std::tuple<Optional, Optional, Optional>;

Folded bn_act_conv(const Tensor& x, const Optional& scale, const Optional& shift, double activation, const Tensor& weight,
                   const Optional& bias, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, bool fuse, int64_t scratch,
                   const Tensor& out, const Optional& mean, const Optional& m2, std::optional<double> eps,
                   const Optional& reader_weight, const Optional& reader_bias, const Optional& before_mean,
                   const Optional& before_m2, const Optional& ticket) {
  check_reader(eps, reader_weight, reader_bias, mean, out, check_before(before_mean, before_m2, out));
  const Conv conv{weight, stride, padding, dilation, groups};
  const bool by_kernels = scale && fuse && !bias && is_slope(activation);
  if (by_kernels && is_conv3x3(x, conv, out, kConv3x3Outputs))
    return call<Folded>("resdense::bn_act_conv3x3", "", x, *scale, *shift, activation, weight, out, mean, m2, eps, reader_weight,
                        reader_bias, before_mean, before_m2, ticket);
  const Optional none;
  if (before_mean) eps.reset();
  if (by_kernels && is_conv1x1(x, conv, out))
    return call<Folded>("resdense::bn_act_conv1x1", "", x, *scale, *shift, activation, conv.matrix(), bias, out, mean, m2, eps,
                        eps ? reader_weight : none, eps ? reader_bias : none);
  const Prologue activated{scale, shift, activation};
  const Parts parts(x, scratch);
  for (int64_t part = 0; part < parts.count(); ++part)
    convolve(in_dtype(activated(parts.of(x, part)), weight.scalar_type()), conv, bias, parts.of(out, part));
  if (mean) call("resdense::channel_stats_into", "", out, *mean, *m2);
  if (!eps) return {};
  const double count = static_cast<double>(out.numel() / out.size(1));
  return call<std::tuple<Tensor, Tensor, Tensor>>("resdense::bn_fold", "", *mean, *m2, count, *eps, reader_weight, reader_bias);
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
  Tensor one = empty_vector(to.size(1), dtype, to);
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

struct Pending {
  const Tensor& grad;
  const Optional &z, &alpha, &beta, &delta;

  // That of some samples, finished in a new map unless it is finished already.
  Tensor finished(const Parts& parts, int64_t part) const {
    const Tensor of_part = parts.of(grad, part);
    if (!z) return of_part;
    const auto [made] =
        call<std::tuple<Tensor>>("resdense::finished_grad", "", of_part, parts.of(*z, part), *alpha, *beta, *delta);
    return made;
  }
};

// A norm's correction of the gradient of its input: what it is made of, and the vectors that it is written to or added to. One whose
// statistics are not of the batch has an infinite count: it corrects nothing.
struct Correction {
  const Optional &center, &rstd;
  double count;
  Optional beta, delta;
};

// What a backward finds. Where `masked` says so, dy has been multiplied by the activation's slope.
struct Found {
  Optional dy;
  bool masked = true;
  Sum dweight, dbias;
  Optional dgamma, dbeta;
};

// The operators of a convolution's backward that activate as they multiply.
struct Kernels {
  const char *weight, *data;
};

std::optional<Kernels> kernels_of_backward(const Tensor& x, const Conv& conv, const Pending& pending, const Optional& out) {
  // Of maps of the input's channels and positions, and of those of the output's.
  const auto all = [&](auto take) {
    return take(x, pending.grad) && (!out || take(*out, pending.grad)) && (!pending.z || take(x, *pending.z));
  };
  if (all([&](const Tensor& in, const Tensor& of_out) { return is_conv1x1(in, conv, of_out); }))
    return Kernels{"resdense::bn_act_conv1x1_weight_backward", "resdense::bn_act_conv1x1_data_backward"};
  if (all([&](const Tensor& in, const Tensor& of_out) { return is_conv3x3(in, conv, of_out, kConv3x3BackwardOutputs); }))
    return Kernels{"resdense::bn_act_conv3x3_weight_backward", "resdense::bn_act_conv3x3_data_backward"};
  return std::nullopt;
}

// The weight gradient finishes the pending one as it reads it; only where nobody wants it that takes a pass.
Found backward_by_kernels(const Kernels& kernels, const Tensor& x, const Prologue& prologue, const Correction& correction,
                          const Conv& conv, const Pending& pending, const Optional& out, bool need_weight, bool overwrite) {
  const auto& [scale, shift, activation] = prologue;
  Found found;
  Optional parts, finished, dweight;
  if (need_weight)
    std::tie(parts, finished) =
        call<std::tuple<Optional, Optional>>(kernels.weight, "", pending.grad, x, *scale, *shift, activation, pending.z,
                                             pending.alpha, pending.beta, pending.delta, overwrite);
  else
    finished = pending.finished(Parts::all(x), 0);
  if (!out) found.dy = torch::stable::empty_like(x);
  std::tie(found.dgamma, found.dbeta, dweight) = call<std::tuple<Optional, Optional, Optional>>(
      kernels.data, "", finished ? *finished : pending.grad, x, *scale, *shift, *correction.center, *correction.rstd,
      correction.count, activation, conv.is_matrix_product() ? conv.matrix() : conv.weight, out ? *out : *found.dy,
      *correction.beta, *correction.delta, out.has_value(), parts);
  if (dweight) found.dweight.add(conv.of_taps(*dweight));
  return found;
}

Found backward_by_library(const Tensor& x, const Prologue& prologue, const Correction& correction, const Conv& conv,
                          const Parts& parts, const Pending& pending, const Optional& out, bool mask, bool need_weight,
                          bool need_bias) {
  const auto& [scale, shift, activation] = prologue;
  const auto& [center, rstd, count, beta, delta] = correction;
  const ScalarType dtype = conv.weight.scalar_type();
  Found found;
  Sum all_dy, all_dy_xc;
  found.masked = mask || out;
  if (!out && parts.count() > 1) found.dy = torch::stable::empty_like(x);
  for (int64_t part = 0; part < parts.count(); ++part) {
    const Tensor raw = parts.of(x, part);
    // The activation and the finished gradient are not beside what follows.
    const Tensor product = [&] {
      // Only the weight's gradient reads the activation; the other's takes its shape alone.
      const Tensor a = in_dtype(need_weight ? prologue(raw) : raw, dtype);
      const Tensor upstream = in_dtype(pending.finished(parts, part), dtype);
      if (need_bias) found.dbias.add(bias_gradient(upstream));
      const auto [dx, dweight] = convolve_backward(upstream, a, conv, need_weight);
      found.dweight.add(dweight);
      return dx;
    }();
    // The framework picks the layout of its gradient by its own rules.
    const Tensor dx = torch::stable::contiguous(in_dtype(product, x.scalar_type()), format_of(x));
    if (scale) {
      using Sums = std::tuple<Tensor, Tensor>;
      const auto [sum_dy, sum_dy_xc] =
          out ? call<Sums>("resdense::bn_act_backward_accumulate", "", parts.of(*out, part), dx, raw, *scale, *shift, *center,
                           activation)
              : call<Sums>(mask ? "resdense::bn_act_backward" : "resdense::bn_act_sums", "", dx, raw, *scale, *shift, *center,
                           activation);
      all_dy.add(sum_dy), all_dy_xc.add(sum_dy_xc);
    } else if (out) {
      add(parts.of(*out, part), dx);
    }
    if (out) continue;
    if (found.dy) {
      Tensor place = parts.of(*found.dy, part);
      torch::stable::copy_(place, dx);
    } else {
      found.dy = dx;
    }
  }
  if (scale) {
    found.dbeta = all_dy.total(scale->scalar_type());
    std::tie(found.dgamma) =
        call<std::tuple<Tensor>>("resdense::bn_correction", "", *found.dbeta, *all_dy_xc.total(scale->scalar_type()), *scale,
                                 *center, *rstd, count, *beta, *delta, out.has_value());
  }
  return found;
}

// The gradients of the input, which are pending on `scale` and the vectors behind dy (or were added to `out` and its vectors), of
// the convolution's weight and bias, and of the norm's. To `finish`, that of the input is finished by a library's way, which masks it
// when the correction is known, in the one pass; what kernels have masked is left pending, as those before them finish it: to
// `overwrite` in its place.
std::tuple<Optional, Optional, Optional, Optional, Optional, Optional, Optional> bn_act_conv_backward(
    const Tensor& x, const Optional& scale, const Optional& shift, const Optional& center, const Optional& rstd, double count,
    double activation, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation, int64_t groups, bool fuse,
    int64_t scratch, const Tensor& grad, const Optional& z, const Optional& alpha, const Optional& beta, const Optional& delta,
    const Optional& out, const Optional& out_beta, const Optional& out_delta, bool finish, bool need_weight, bool need_bias,
    bool overwrite) {
  const Conv conv{weight, stride, padding, dilation, groups};
  const Prologue prologue{scale, shift, activation};
  const Pending pending{grad, z, alpha, beta, delta};
  const auto vector = [&](const Optional& of_out) {
    return out || !scale ? of_out : Optional(empty_vector(x.size(1), scale->scalar_type(), x));
  };
  const Correction correction{center, rstd, count, vector(out_beta), vector(out_delta)};
  const auto kernels =
      scale && fuse && !need_bias && is_slope(activation) ? kernels_of_backward(x, conv, pending, out) : std::nullopt;
  const Found found =
      kernels ? backward_by_kernels(*kernels, x, prologue, correction, conv, pending, out, need_weight, overwrite)
              : backward_by_library(x, prologue, correction, conv, Parts(x, scratch), pending, out, !finish, need_weight, need_bias);
  const bool finishes = finish && scale && !out && !found.masked;
  if (finishes) call("resdense::pending_grad", "", *found.dy, x, *scale, *correction.beta, *correction.delta, shift, activation);
  const bool pends = !out && !finishes;
  const ScalarType dtype = weight.scalar_type();
  return {found.dy, pends ? correction.beta : std::nullopt, pends ? correction.delta : std::nullopt, found.dweight.total(dtype),
          found.dbias.total(dtype), found.dgamma, found.dbeta};
}

}  // namespace
}  // namespace resdense::convolution

STABLE_TORCH_LIBRARY_IMPL(resdense, CompositeExplicitAutograd, m) {
  m.impl("bn_act_conv", TORCH_BOX(&resdense::convolution::bn_act_conv));
  m.impl("bn_act_conv_backward", TORCH_BOX(&resdense::convolution::bn_act_conv_backward));
}
