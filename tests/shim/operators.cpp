// The CUDA operators, kernels and launchers both, compiled as plain C++ for the shim.

#include "cuda/add_act.cu"
#include "cuda/bn_act.cu"
#include "cuda/bn_act_conv1x1.cu"
#include "cuda/bn_act_conv1x1_data.cu"
#include "cuda/bn_act_conv1x1_weight.cu"
#include "cuda/bn_act_conv3x3.cu"
#include "cuda/bn_act_conv3x3_data.cu"
#include "cuda/bn_act_conv3x3_weight.cu"
#include "cuda/bn_act_pool.cu"
#include "cuda/bn_add_act.cu"
#include "cuda/channel_stats.cu"
#include "cuda/copy_map.cu"
#include "cuda/fold.cu"
#include "cuda/pending_grad.cu"

static void configure(int64_t order, int64_t multiprocessors, int64_t shared_kib) {
  shim::order = static_cast<int>(order);
  shim::multiprocessors = static_cast<int>(multiprocessors);
  shim::shared_bytes = 1024 * shared_kib;
}

static int64_t launches() { return shim::launches; }

STABLE_TORCH_LIBRARY(resdense_shim, m) {
  m.def("configure(int order, int multiprocessors, int shared_kib=100) -> ()");
  m.def("launches() -> int");
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
  m.def("copy_map(Tensor x, Tensor(a!) out) -> ()");
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
      "bn_act_conv1x1(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor? bias, "
      "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, "
      "Tensor? reader_bias=None) -> (Tensor? scale, Tensor? shift, Tensor? rstd)");
  m.def(
      "bn_act_conv3x3(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor(a!) out, "
      "Tensor(b!)? mean, Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, Tensor? reader_bias=None, "
      "Tensor? before_mean=None, Tensor? before_m2=None, Tensor(d!)? ticket=None) "
      "-> (Tensor? scale, Tensor? shift, Tensor? rstd)");
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
  m.def(
      "pending_grad(Tensor(a!) dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor? shift=None, "
      "float activation=1.0) -> ()");
  m.def("finished_grad(Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resdense_shim, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("launches", TORCH_BOX(&launches));
}
