#pragma once
// What the bodies of the kernels include.

#include <cmath>
#include <limits>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../common/activation.h"
#include "kernels.h"

#if RESDENSE_TARGETS
#include <immintrin.h>
#endif
