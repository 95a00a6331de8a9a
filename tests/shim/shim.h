#pragma once
// An execution model of a GPU's threads on the CPU, to run kernels under the sanitizers: a fiber a thread, one block at a
// time; barriers and warp collectives yield. Fibers that can go on do so in a chosen order, so that a missing barrier shows.

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __global__
#define __device__
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
inline float __half2float(__half v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }

template <typename T>
struct alignas(4) Pair {
  T x, y;
};
using __half2 = Pair<__half>;
using __nv_bfloat162 = Pair<__nv_bfloat16>;
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
template <typename T, typename F>
inline uint32_t pair_mask(Pair<T> a, Pair<T> b, F holds) {
  return (holds(float(a.x), float(b.x)) ? 0xffffu : 0) | (holds(float(a.y), float(b.y)) ? 0xffff0000u : 0);
}
template <typename T>
inline uint32_t __hgt2_mask(Pair<T> a, Pair<T> b) {
  return pair_mask(a, b, std::greater<>());
}
template <typename T>
inline uint32_t __hle2_mask(Pair<T> a, Pair<T> b) {
  return pair_mask(a, b, std::less_equal<>());
}
template <typename T>
inline uint32_t __hneu2_mask(Pair<T> a, Pair<T> b) {
  return pair_mask(a, b, std::not_equal_to<>());
}

// The bytes of low and high, of eight, that the selector's four digits name.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = selector >> 4 * i & 7;
    result |= ((byte < 4 ? low : high) >> byte % 4 * 8 & 0xff) << 8 * i;
  }
  return result;
}

namespace shim {

struct Index {
  unsigned x = 0;
};

// 0 forward and 1 reverse, all warps in step; else the seed of a shuffle, in which a warp goes as far as it can before the next.
inline int order = 0;
inline int multiprocessors = 1;
inline int64_t shared_bytes = 100 * 1024;  // of a multiprocessor
inline int64_t launches = 0;               // so far

}  // namespace shim

inline shim::Index threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

class Block {
 public:
  Block(unsigned threads, const std::function<void()>& kernel, size_t shared_bytes)
      : kernel_(kernel), shared_bytes_(shared_bytes), fibers_(threads) {
    blockDim.x = threads;
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
  }

  void run(unsigned block) {
    blockIdx.x = block;
    current_ = this;
    // Allocated to the byte, so that the address sanitizer sees what is beyond; and full of values that are not numbers.
    shared_ = std::make_unique<Piece[]>(shared_bytes_ / sizeof(Piece));
    std::memset(shared_.get(), 0xff, shared_bytes_);
    turns_.clear();
    for (Fiber& fiber : fibers_) {
      fiber.state = State::ready;
      fiber.exchanges = 0;
      fiber.groups = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    for (;;) {
      bool moved = false;
      if (order > 1) {
        for (unsigned warp : turns((fibers_.size() + 31) / 32))
          while (pass(warp * 32, std::min<size_t>(32, fibers_.size() - warp * 32))) moved = true;
      } else {
        moved = pass(0, fibers_.size());
      }
      if (moved) continue;
      if (count(State::done) == fibers_.size()) return;
      if (!release_barriers())
        throw std::runtime_error("shim: not all threads arrive at the barrier or warp collective");
    }
  }

  static std::vector<unsigned> permutation(size_t size, unsigned salt) {
    std::vector<unsigned> indices(size);
    std::iota(indices.begin(), indices.end(), 0u);
    if (order == 1) std::reverse(indices.begin(), indices.end());
    if (order > 1) std::shuffle(indices.begin(), indices.end(), std::mt19937(order + salt));
    return indices;
  }

  // The barrier of all threads has the number 0.
  static void barrier() { barrier(0, blockDim.x); }

  static void barrier(unsigned number, unsigned threads) {
    Fiber& fiber = current_->fibers_[threadIdx.x];
    fiber.barrier = number, fiber.barrier_threads = threads;
    current_->yield(State::barrier);
  }

  // What every lane of the warp brings, as a function of the lane; valid until this lane's next but one exchange.
  template <typename V>
  static auto exchange(const V& value) {
    static_assert(sizeof(V) <= kSlot);
    const unsigned thread = threadIdx.x;
    Fiber& self = current_->fibers_[thread];
    // Two slots: a lane may write its next value before a neighbour has read this one, but not the one after.
    const unsigned slot = self.exchanges++ % 2;
    std::memcpy(self.slots[slot], &value, sizeof(V));
    current_->yield(State::exchange);
    return [slot, warp = thread - thread % 32](unsigned lane) {
      V other;
      std::memcpy(&other, current_->fibers_.at(warp + lane).slots[slot], sizeof(V));
      return other;
    };
  }

  static unsigned char* shared() { return current_->shared_[0].bytes; }

  // 16 bytes, or zeros where there is no `from`, at some time before they are waited for: every other thread at once, the others
  // as late as can be, so that both a missing wait and a place that is still being read show.
  static void copy(void* to, const void* from) {
    Fiber& fiber = current_->fibers_[threadIdx.x];
    const Copy mine{static_cast<Piece*>(to), static_cast<const Piece*>(from), fiber.groups};
    threadIdx.x % 2 ? mine.run() : fiber.copies.push_back(mine);
  }

  // Closes a group of copies.
  static void commit_copies() { ++current_->fibers_[threadIdx.x].groups; }

  // Waits for all closed groups but the latest `left`.
  static void wait_for_copies(int left) {
    Fiber& fiber = current_->fibers_[threadIdx.x];
    finish_copies(fiber.groups - left);
  }

  static void finish_copies() { finish_copies(std::numeric_limits<int>::max()); }

 private:
  static constexpr size_t kStack = 64 * 1024;
  static constexpr size_t kSlot = 48;
  enum class State { ready, barrier, exchange, done };
  struct alignas(16) Piece {
    unsigned char bytes[16];
  };
  struct Copy {
    Piece* to;
    const Piece* from;
    int group;
    void run() const { *to = from ? *from : Piece{}; }
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    unsigned exchanges;
    unsigned char slots[2][kSlot];
    std::vector<Copy> copies;
    int groups;
    unsigned barrier, barrier_threads;
  };

  static void finish_copies(int groups) {
    auto& copies = current_->fibers_[threadIdx.x].copies;
    std::erase_if(copies, [=](const Copy& copy) {
      if (copy.group >= groups) return false;
      copy.run();
      return true;
    });
  }

  static void enter() {
    current_->kernel_();
    current_->fibers_[threadIdx.x].state = State::done;
  }

  // Lets every thread of some go on to where it next waits; false where none could.
  bool pass(unsigned first, size_t threads) {
    bool moved = false;
    for (unsigned i : turns(threads)) {
      const unsigned t = first + i;
      if (fibers_[t].state != State::ready) continue;
      moved = true;
      threadIdx.x = t;
      swapcontext(&scheduler_, &fibers_[t].context);
      release_warp(t / 32);
    }
    return moved;
  }

  // In which so many threads, or warps, of this block take turns.
  const std::vector<unsigned>& turns(size_t size) {
    auto& turns = turns_[size];
    if (turns.empty()) turns = permutation(size, blockIdx.x);
    return turns;
  }

  void yield(State state) {
    const unsigned thread = threadIdx.x;
    fibers_[thread].state = state;
    swapcontext(&fibers_[thread].context, &scheduler_);
  }

  void release_warp(unsigned warp) {
    const size_t end = std::min<size_t>(fibers_.size(), warp * 32 + 32);
    for (size_t t = warp * 32; t < end; ++t)
      if (fibers_[t].state != State::exchange) return;
    for (size_t t = warp * 32; t < end; ++t) fibers_[t].state = State::ready;
  }

  // Lets the threads at every barrier go on at which as many wait as are to come; false where there is none.
  bool release_barriers() {
    bool released = false;
    for (unsigned number = 0; number < 16; ++number) {
      size_t waiting = 0;
      const auto waits = [=](const Fiber& fiber) { return fiber.state == State::barrier && fiber.barrier == number; };
      for (const Fiber& fiber : fibers_) waiting += waits(fiber);
      for (Fiber& fiber : fibers_) {
        if (!waits(fiber) || waiting != fiber.barrier_threads) continue;
        fiber.state = State::ready;
        released = true;
      }
    }
    return released;
  }

  size_t count(State state) const {
    size_t n = 0;
    for (const Fiber& fiber : fibers_) n += fiber.state == state;
    return n;
  }

  static inline Block* current_ = nullptr;
  const std::function<void()>& kernel_;
  const size_t shared_bytes_;
  std::vector<Fiber> fibers_;
  std::map<size_t, std::vector<unsigned>> turns_;
  std::unique_ptr<Piece[]> shared_;
  ucontext_t scheduler_;
};

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel, size_t shared_bytes = 0) {
  if (threads == 0 || threads > 1024 || blocks == 0 || shared_bytes % 16 != 0)
    throw std::runtime_error("shim: bad launch configuration");
  ++launches;
  gridDim.x = blocks;
  Block block(threads, kernel, shared_bytes);
  for (unsigned b : Block::permutation(blocks, 0)) block.run(b);
}

}  // namespace shim

inline void __syncthreads() { shim::Block::barrier(); }

// One thread runs at a time, and all of them see the same memory.
inline void __threadfence() {}
inline float __ldcg(const float* from) { return *from; }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }

template <typename V>
inline V __shfl_down_sync(unsigned, V value, unsigned delta) {
  const auto values = shim::Block::exchange(value);
  const unsigned from = threadIdx.x % 32 + delta;
  return from < 32 ? values(from) : value;
}

template <typename V>
inline V __shfl_xor_sync(unsigned, V value, unsigned mask) {
  return shim::Block::exchange(value)(threadIdx.x % 32 ^ mask);
}
