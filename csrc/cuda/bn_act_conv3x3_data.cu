#include "bn_act_conv3x3_data.cuh"

#include "conv.h"
#include "stack.h"

namespace resdense::cuda {
namespace {
}  // namespace
}  // namespace resdense::cuda
