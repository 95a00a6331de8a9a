// The operators' schemas, all in this one place, and what the library can tell of itself. Implementations register
// themselves: csrc/cpu/*.cpp in this module, csrc/cuda/*.cu in a library of its own.

// Older torch's copy of pybind11 refuses to be included where only the stable ABI may be, although it has nothing of torch.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "cpu/kernels.h"

#define RESDENSE_STRING_(...) #__VA_ARGS__
#define RESDENSE_STRING(...) RESDENSE_STRING_(__VA_ARGS__)

// Words used below. A map is (N, C, ...) in either memory format, or a slice of the channels of one. Vectors are (C,).
//   act(y)          the activation, a number of common/activation.h
//   mean, m2        of every channel: the mean and the sum of the squared deviations from it
//   folds           (3, ...): scale, shift and rstd of every norm, which begin at the next multiple of 4 behind those of the one before
//   dy, xc          grad * act'(scale * x + shift), and x - center
//   g, zc, ic       grad * act' as out tells it, z - center, and identity - identity_center (none without them)
//   pending grad    alpha * dy + beta * z + delta, by whoever reads it: finished in place, or as a new map; with a shift dy is
//                   first multiplied by act'(alpha * z + shift)
//   tap             the place in a window of kernel_size, row by row; padding is of the activated map
// Windows have one value a spatial dimension. out of a backward is dy, or with `accumulate` out + scale * dy.
// bn_act_conv1x1_data_backward and that of the 3x3 get the gradient of what the convolution has put out: its product with the
// weight is what dy is of; the norm's correction of its input's gradient, beta * x + delta, is written or added to likewise. The
// weight gradients finish a gradient that is pending on z, as a new map or, to `overwrite`, in its place where a kernel can; and leave
// `parts`, (splits, outputs, channels) or, of the 3x3, (splits, outputs, 3, 3, channels), in float32: the data gradient, with the
// finished gradient, adds them up to dweight in the dtype of x.
// To a convolution `eps` says that a norm reads what it writes, with these statistics: it is folded, as by bn_fold. So it is where it
// reads channels of a buffer before those, too, but by bn_act_conv only where the 3x3's kernel does. A `ticket`, one int32, is 0
// before and after a launch: its blocks draw from it, so that the last of them does what would take one more launch.
// Only copy_map takes maps of different dtypes.
// What an operator returns is of one type: torch_call_dispatcher takes other returns by each other's types (torch 2.13).
// A schema that writes an argument does not bump its version counter: the Python wrappers do.
STABLE_TORCH_LIBRARY(resdense, m) {
  m.def("channel_stats(Tensor x) -> (Tensor mean, Tensor m2)");
  m.def("channel_stats_into(Tensor x, Tensor(a!) mean, Tensor(b!) m2) -> ()");
  m.def("bn_fold(Tensor mean, Tensor m2, float count, float eps, Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "bn_folds(Tensor[] mean, Tensor[] m2, float[] count, float[] eps, Tensor[] weight, Tensor[] bias) -> Tensor");
  m.def(
      "bn_correction(Tensor sum_dy, Tensor sum_dy_xc, Tensor scale, Tensor mean, Tensor rstd, float count, Tensor(a!) beta, "
      "Tensor(b!) delta, bool accumulate) -> Tensor dgamma");
  m.def("bn_act(Tensor x, Tensor scale, Tensor shift, float activation, Tensor(a!) out) -> ()");
  m.def(
      "bn_act_sums(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, float activation) "
      "-> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "bn_act_backward(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, Tensor center, float activation) "
      "-> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "bn_act_backward_accumulate(Tensor(a!) out, Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, "
      "float activation) -> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "pending_grad(Tensor(a!) dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor? shift=None, "
      "float activation=1.0) -> ()");
  m.def("finished_grad(Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta) -> Tensor");
  m.def("copy_map(Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "bn_act_conv1x1(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor? bias, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, "
      "Tensor? reader_bias=None) -> (Tensor? scale, Tensor? shift, Tensor? rstd)");
  m.def(
      "bn_act_conv1x1_backward(Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, "
      "Tensor weight, Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor(a!) out, bool accumulate, "
      "bool need_weight) "
      "-> (Tensor dweight, Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "conv1x1_moments(Tensor x, Tensor scale, Tensor shift, float activation, Tensor near, Tensor grad) "
      "-> (Tensor rest, Tensor products, Tensor sum_grad, Tensor grad_products)");
  m.def(
      "conv1x1_moments_terms(Tensor rest, Tensor products, Tensor sum_grad, Tensor grad_products, Tensor weight, Tensor scale, "
      "Tensor rstd, float count, bool need_weight) "
      "-> (Tensor dgamma, Tensor dweight, Tensor scaled, Tensor terms, Tensor offset)");
  m.def(
      "conv1x1_moments_backward(Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, Tensor grad, "
      "Tensor weight, Tensor products, Tensor near, Tensor offset, Tensor(a!) out, bool accumulate) "
      "-> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "bn_act_winograd(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor? bias, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? m2) -> ()");
  m.def(
      "bn_act_winograd_backward(Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, "
      "Tensor weight, Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor(a!) out, bool accumulate, "
      "bool need_weight) -> (Tensor dweight, Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "bn_act_avg_pool(Tensor x, Tensor scale, Tensor shift, float activation, int[] kernel_size, int[] stride, "
      "int[] padding, Tensor(a!) out) -> ()");
  m.def(
      "bn_act_avg_pool_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, "
      "int[] kernel_size, int[] stride, int[] padding, Tensor(a!) out, bool accumulate) "
      "-> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "bn_act_max_pool(Tensor x, Tensor scale, Tensor shift, float activation, int[] kernel_size, int[] stride, "
      "int[] padding, Tensor(a!) out, Tensor(b!) taps) -> ()");
  m.def(
      "bn_act_max_pool_backward(Tensor grad, Tensor taps, Tensor x, Tensor scale, Tensor shift, Tensor center, "
      "float activation, int[] kernel_size, int[] stride, int[] padding, Tensor(a!) out, bool accumulate) "
      "-> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def("bn_act_global_pool(Tensor x, Tensor scale, Tensor shift, float activation) -> Tensor");
  m.def(
      "bn_act_global_pool_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, "
      "float activation, Tensor(a!) out, bool accumulate) -> (Tensor sum_dy, Tensor sum_dy_xc)");
  m.def(
      "bn_act_conv3x3(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor(a!) out, "
      "Tensor(b!)? mean, Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, Tensor? reader_bias=None, "
      "Tensor? before_mean=None, Tensor? before_m2=None, Tensor(d!)? ticket=None) "
      "-> (Tensor? scale, Tensor? shift, Tensor? rstd)");
  m.def(
      "bn_act_conv(Tensor x, Tensor? scale, Tensor? shift, float activation, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool fuse, int scratch, Tensor(a!) out, Tensor(b!)? mean, "
      "Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, Tensor? reader_bias=None, Tensor? before_mean=None, "
      "Tensor? before_m2=None, Tensor(d!)? ticket=None) -> (Tensor? scale, Tensor? shift, Tensor? rstd)");
  m.def(
      "bn_act_conv_backward(Tensor x, Tensor? scale, Tensor? shift, Tensor? center, Tensor? rstd, float count, "
      "float activation, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, bool fuse, int scratch, "
      "Tensor(d!) grad, Tensor? z, Tensor? alpha, Tensor? beta, Tensor? delta, Tensor(a!)? out, Tensor(b!)? out_beta, "
      "Tensor(c!)? out_delta, bool finish, bool need_weight, bool need_bias, bool overwrite=False) "
      "-> (Tensor? dy, Tensor? dy_beta, Tensor? dy_delta, Tensor? dweight, Tensor? dbias, Tensor? dgamma, Tensor? dbeta)");
  m.def(
      "bn_act_conv1x1_weight_backward(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, float activation, "
      "Tensor? z=None, Tensor? alpha=None, Tensor? beta=None, Tensor? delta=None, bool overwrite=False) "
      "-> (Tensor? parts, Tensor? finished)");
  m.def(
      "bn_act_conv1x1_data_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, Tensor rstd, float count, "
      "float activation, Tensor weight, Tensor(a!) out, Tensor(b!) beta, Tensor(c!) delta, bool accumulate, "
      "Tensor? parts=None) -> (Tensor? dgamma, Tensor? dbeta, Tensor? dweight)");
  m.def(
      "bn_act_conv3x3_weight_backward(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, float activation, "
      "Tensor? z=None, Tensor? alpha=None, Tensor? beta=None, Tensor? delta=None, bool overwrite=False) "
      "-> (Tensor? parts, Tensor? finished)");
  m.def(
      "bn_act_conv3x3_data_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, Tensor rstd, float count, "
      "float activation, Tensor weight, Tensor(a!) out, Tensor(b!) beta, Tensor(c!) delta, bool accumulate, "
      "Tensor? parts=None) -> (Tensor? dgamma, Tensor? dbeta, Tensor? dweight)");
  m.def("add_act(Tensor x, Tensor y, float activation) -> Tensor");
  m.def("add_act_backward(Tensor grad, Tensor out, float activation) -> Tensor");
  m.def(
      "bn_add_act(Tensor z, Tensor scale, Tensor shift, Tensor identity, Tensor? identity_scale, "
      "Tensor? identity_shift, float activation) -> Tensor");
  m.def(
      "bn_add_act_backward(Tensor grad, Tensor out, Tensor z, Tensor center, Tensor? identity, Tensor? identity_center, "
      "float activation) -> (Tensor g, Tensor sum_g, Tensor sum_g_zc, Tensor sum_g_ic)");
  m.def("hand_over(Tensor?[] tensors) -> ()");
  m.def("fits(Tensor code, Tensor?[] inputs) -> bool");
  m.def("replay(Tensor code, str names, Tensor?[] inputs) -> Tensor[]");
}

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " RESDENSE_STRING(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  const std::string archs = RESDENSE_STRING(RESDENSE_CUDA_ARCHS);
  info["version"] = RESDENSE_STRING(RESDENSE_VERSION);
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch_target_version"] = pybind11::make_tuple(static_cast<int>(TORCH_TARGET_VERSION >> 56 & 0xff),
                                                      static_cast<int>(TORCH_TARGET_VERSION >> 48 & 0xff));
  info["torch_build_version"] = TORCH_VERSION;
  info["cuda"] = !archs.empty();
  info["cuda_archs"] = archs;
  info["cpu_capability"] = resdense::cpu::kernels.name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled operators of resdense_ext; importing it registers them in torch.ops.resdense.";
  module.def("build_info", &build_info, "Versions, compilers and targets of this build, and what this processor can do.");
}
