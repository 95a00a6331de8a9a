// Replays a sequence of operators' calls that ops/program.py has recorded: what an engine does on tensors of known shapes, without
// the Python that has worked it out. A tensor lives from the call that makes it to the last that reads it, as in Python; so does an
// input that is handed over, while those that are given stay with whoever gives them.

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/memory.h"

namespace resdense::program {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::Layout;
using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;

// As in ops/program.py. An argument is a kind, whether its type is optional, and what belongs to the kind; so is a result, a tensor
// with a negative place where nobody reads it, or tensors.
enum class Kind : int64_t {
  none,
  tensor,         // its place
  tensors,        // how many, and their places
  integer,        // its value
  number,         // the bits of a float64
  boolean,
  integers,       // how many, and their values
  numbers,
  booleans,
  dtype,          // the numbers of the enumerations
  layout,
  memory_format,
  device,         // type and index
  string,         // where it begins in the names
};

// In the place of an operator's name: what is done without one.
constexpr int64_t VIEW = -1, EMPTY = -2;

// Reads a program from its beginning on.
class Reader {
 public:
  explicit Reader(const int64_t* at) : at_(at) {}

  int64_t next() { return *at_++; }

  // So many of them as they are.
  const int64_t* skip(int64_t count) { return std::exchange(at_, at_ + count); }

  double number() {
    double value;
    std::memcpy(&value, at_++, sizeof value);
    return value;
  }

  template <class T, class F> std::vector<T> list(const F& item) {
    std::vector<T> values(next());
    for (size_t i = 0; i < values.size(); ++i) values[i] = item();
    return values;
  }

 private:
  const int64_t* at_;
};

using Inputs = std::vector<std::optional<Tensor>>;

class Replay {
 public:
  Replay(const Tensor& code, const char* names) : read_(static_cast<const int64_t*>(code.const_data_ptr())), names_(names) {}

  // Whether the inputs are what they were when the program was recorded: those that are given, and behind them those handed over.
  bool takes(const Inputs& given, Inputs handed = {}) {
    tensors_.resize(read_.next());
    return read_.next() == static_cast<int64_t>(given.size() + handed.size()) && take(given) && take(std::move(handed));
  }

  std::vector<Tensor> operator()() {
    for (int64_t calls = read_.next(); calls > 0; --calls) call();
    return read_.list<Tensor>([&] { return tensor(); });
  }

 private:
  bool take(Inputs inputs) {
    for (auto& input : inputs) {
      const int64_t place = read_.next();
      if ((place >= 0) != input.has_value()) return false;
      if (!input) continue;
      if (!is_next(*input)) return false;
      tensors_[place] = std::move(input);
    }
    return true;
  }

  // Whether its dtype, device, sizes and strides are the next.
  bool is_next(const Tensor& t) {
    const auto device = t.device();
    bool same = read_.next() == static_cast<int64_t>(t.scalar_type());
    same &= read_.next() == static_cast<int64_t>(device.type());
    same &= read_.next() == static_cast<int64_t>(device.index());
    if (!same || read_.next() != t.dim()) return false;
    for (int64_t d = 0; d < t.dim(); ++d) same &= read_.next() == t.size(d);
    for (int64_t d = 0; d < t.dim(); ++d) same &= read_.next() == t.stride(d);
    return same;
  }

  const Tensor& tensor() { return *tensors_[read_.next()]; }

  template <class T> static StableIValue value(bool optional, T v) {
    return optional ? from(std::optional<T>(std::move(v))) : from(std::move(v));
  }

  StableIValue argument() {
    const Kind kind = static_cast<Kind>(read_.next());
    const bool optional = read_.next() != 0;
    const auto next = [&] { return read_.next(); };
    switch (kind) {
      case Kind::none: return from(std::nullopt);
      case Kind::tensor: return value(optional, tensor());
      case Kind::tensors: return value(optional, read_.list<Tensor>([&] { return tensor(); }));
      case Kind::integer: return value(optional, next());
      case Kind::number: return value(optional, read_.number());
      case Kind::boolean: return value(optional, next() != 0);
      case Kind::integers: return value(optional, read_.list<int64_t>(next));
      case Kind::numbers: return value(optional, read_.list<double>([&] { return read_.number(); }));
      case Kind::booleans: {
        const int64_t size = next();
        const std::unique_ptr<bool[]> values(new bool[size]);
        for (int64_t i = 0; i < size; ++i) values[i] = next() != 0;
        return value(optional, torch::headeronly::HeaderOnlyArrayRef<bool>(values.get(), size));
      }
      case Kind::dtype: return value(optional, static_cast<ScalarType>(next()));
      case Kind::layout: return value(optional, static_cast<Layout>(next()));
      case Kind::memory_format: return value(optional, static_cast<MemoryFormat>(next()));
      case Kind::device: {
        const auto type = static_cast<DeviceType>(next());
        return value(optional, torch::stable::Device(type, static_cast<torch::stable::DeviceIndex>(next())));
      }
      case Kind::string: return value(optional, std::string(names_ + next()));
    }
    fail("program: no argument of kind ", static_cast<int64_t>(kind));
  }

  void result(StableIValue value) {
    const Kind kind = static_cast<Kind>(read_.next());
    const bool optional = read_.next() != 0;
    if (kind == Kind::tensors) {
      const auto list = to<std::vector<Tensor>>(value);
      if (read_.next() != static_cast<int64_t>(list.size())) fail("program: a call gives more or fewer tensors than it did");
      for (const Tensor& t : list) keep(t);
    } else {
      keep(optional ? to<std::optional<Tensor>>(value) : to<Tensor>(value));
    }
  }

  void keep(std::optional<Tensor> t) {
    const int64_t place = read_.next();
    if (place >= 0) tensors_[place] = std::move(t);
  }

  void call() {
    const int64_t name = read_.next();
    if (name == VIEW) {
      view();
    } else if (name == EMPTY) {
      empty();
    } else {
      call(names_ + name, names_ + read_.next());
    }
    for (int64_t dead = read_.next(); dead > 0; --dead) tensors_[read_.next()].reset();
  }

  // More than half of all calls: of a tensor with these strides, some sizes, strides and an offset.
  void view() {
    const Tensor& from = tensor();
    bool same = read_.next() == from.dim();
    for (int64_t d = 0; same && d < from.dim(); ++d) same = read_.next() == from.stride(d);
    if (!same) fail("program: a call gives a tensor with other strides than it did");
    const int64_t dim = read_.next();
    const int64_t *sizes = read_.skip(dim), *strides = read_.skip(dim);
    keep(view_of(from, dim, sizes, strides, read_.next()));
  }

  // New memory, likewise: its dtype, device, sizes and strides.
  void empty() {
    const auto dtype = static_cast<ScalarType>(read_.next());
    const auto device_type = static_cast<int32_t>(read_.next()), device_index = static_cast<int32_t>(read_.next());
    const int64_t dim = read_.next();
    const int64_t *sizes = read_.skip(dim), *strides = read_.skip(dim);
    keep(resdense::empty(dim, sizes, strides, dtype, device_type, device_index));
  }

  void call(const char* name, const char* overload) {
    const int64_t arguments = read_.next(), results = read_.next();
    stack_.resize(std::max(arguments, results));
    for (int64_t i = 0; i < arguments; ++i) stack_[i] = argument();
    dispatch(name, overload, stack_.data());
    for (int64_t i = 0; i < results; ++i) result(stack_[i]);
  }

  Reader read_;
  const char* names_;
  Inputs tensors_;
  std::vector<StableIValue> stack_;
};

// What a thread hands over to its next replay.
thread_local Inputs handed_over;

void check(const Tensor& code) {
  const bool numbers = code.scalar_type() == ScalarType::Long && code.dim() == 1 && code.is_contiguous();
  RESDENSE_CHECK(numbers && code.device().type() == DeviceType::CPU, "code: expected a program's, contiguous int64 on the CPU, got ",
                 dtype_name(code.scalar_type()), " of shape ", shape_string(code));
}

}  // namespace

void hand_over(Inputs tensors) { handed_over = std::move(tensors); }

bool fits(const Tensor& code, Inputs inputs) {
  check(code);
  return Replay(code, nullptr).takes(inputs);
}

// Nothing where the inputs do not fit.
std::vector<Tensor> replay(const Tensor& code, std::string names, Inputs inputs) {
  Inputs handed = std::exchange(handed_over, {});
  check(code);
  Replay program(code, names.c_str());
  return program.takes(inputs, std::move(handed)) ? program() : std::vector<Tensor>();
}

}  // namespace resdense::program

STABLE_TORCH_LIBRARY_IMPL(resdense, CompositeExplicitAutograd, m) {
  m.impl("hand_over", TORCH_BOX(&resdense::program::hand_over));
  m.impl("fits", TORCH_BOX(&resdense::program::fits));
  m.impl("replay", TORCH_BOX(&resdense::program::replay));
}
