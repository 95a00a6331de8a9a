#pragma once
// Operators by their names, through the framework's dispatcher: so that they run on the device of their tensors.

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include <torch/csrc/stable/stableivalue_conversions.h>

#include "common/dispatch.h"

namespace resdense {

namespace detail {

template <typename R, typename Stack, size_t... I>
R taken(Stack& stack, std::index_sequence<I...>) {
  return R{torch::stable::detail::to<std::tuple_element_t<I, R>>(stack[I])...};
}

}  // namespace detail

// Calls an operator with a value for every argument of its schema. R is a tuple of what it returns, which is never left behind.
template <typename R = std::tuple<>, typename... Args>
R call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args), std::tuple_size_v<R>)> stack{torch::stable::detail::from(args)...};
  dispatch(name, overload, stack.data());
  return detail::taken<R>(stack, std::make_index_sequence<std::tuple_size_v<R>>{});
}

}  // namespace resdense
