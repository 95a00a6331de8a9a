#pragma once
// The framework's dispatcher, with an error that says what went wrong in the operator that it called.

#include <torch/csrc/stable/library.h>

#include "check.h"

// What the latest error of this thread said: in torch from 2.13 on, and nullptr in an older one.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace resdense {

// Calls an operator, whose arguments `stack` has and whose results it then has.
inline void dispatch(const char* name, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) == TORCH_SUCCESS) return;
  fail(name, ": ",
       torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "failed; the line above says why");
}

}  // namespace resdense
