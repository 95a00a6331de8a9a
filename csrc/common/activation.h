#pragma once
// An activation is one number among an operator's arguments: the slope of what is negative, 0 for the ReLU and 1 for the identity, or
// one of these, which no slope is.

namespace resdense {

constexpr double kRelu6 = 0x1p1000, kElu = 0x1p1001, kSilu = 0x1p1002;

inline bool is_slope(double activation) { return !(activation >= kRelu6); }

}  // namespace resdense
