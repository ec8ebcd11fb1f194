// The blocks, warps and threads of emulation.h, and the order in which they get on.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "layout.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fssa::cuda::emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 256;

// What stands in a TileMap here.
struct Matrix {
  const char* base;
  int64_t columns, rows, row_bytes;
  int box_rows;
};
static_assert(sizeof(Matrix) <= sizeof(TileMap));

// A copy on its way: 16 bytes, or zeros if there is no source; or a box of a matrix.
struct Copy {
  char* target;
  const char* source;
  const Matrix* matrix = nullptr;
  int k = 0, row = 0;
  uint64_t* barrier = nullptr;

  size_t bytes() const {
    return matrix == nullptr ? 16 : static_cast<size_t>(matrix->box_rows) * kTileRowBytes;
  }

  void issue() const { std::memset(target, 0xff, bytes()); }

  void finish() const {
    if (matrix == nullptr) return bring(target, source);
    for (int r = 0; r < matrix->box_rows; ++r) {
      for (int chunk = 0; chunk < 8; ++chunk) {
        const int64_t column = k + 8 * chunk;
        const bool there = row + r < matrix->rows && column < matrix->columns;
        const char* at = matrix->base + (row + r) * matrix->row_bytes + 2 * column;
        bring(target + tile_offset(r, chunk), there ? at : nullptr);
      }
    }
  }

  static void bring(char* to, const char* from) {
    from != nullptr ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
  }
};

// What an mbarrier holds: 64 bits, as in shared memory.
struct BarrierState {
  int16_t arrivals;
  int16_t pending;
  int32_t bytes : 24;
  uint32_t phase : 8;

  void settle() {
    if (pending == 0 && bytes == 0) {
      phase = (phase + 1) & 1;
      pending = arrivals;
    }
  }
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

inline BarrierState& state_of(uint64_t* barrier) {
  return *reinterpret_cast<BarrierState*>(barrier);
}

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::function<bool()> ready;  // what it waits for; empty if it can run
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  const void* sent = nullptr;  // to the other lanes of its warp
  void* received = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

using Collective = void (*)(Thread* const* lanes);

struct Warp {
  int arrived = 0;
  uint64_t rounds = 0;
  Collective operation = nullptr;
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // 0: threads in order, copies as late as possible. Others: drawn.
  void seed(uint64_t value) {
    drawn_ = value != 0;
    random_.seed(value);
  }

  template <typename Kernel>
  void launch(int grid_x, int grid_y, int grid_z, int block, size_t shared_bytes, Kernel kernel) {
    std::vector<int> blocks(static_cast<size_t>(grid_x) * grid_y * grid_z);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int>(i);
    if (drawn_) std::shuffle(blocks.begin(), blocks.end(), random_);
    while (static_cast<int>(threads_.size()) < block) {
      threads_.push_back(std::make_unique<Thread>());
    }
    kernel_ = kernel;
    block_threads = block;
    // 128 bytes is what a kernel may expect of its alignment.
    shared_.assign(shared_bytes + kGuardBytes + 128, char(0xff));
    shared = shared_.data() + (-reinterpret_cast<uintptr_t>(shared_.data()) & 127);
    for (const int index : blocks) {
      x = index % grid_x;
      y = index / grid_x % grid_y;
      z = index / grid_x / grid_y;
      std::memset(shared, 0xff, shared_bytes + kGuardBytes);
      run_block();
      for (size_t i = 0; i < kGuardBytes; ++i) {
        if (shared[shared_bytes + i] != char(0xff)) fail("wrote past the end of shared memory");
      }
    }
  }

  // Suspends the running thread until `ready` says yes.
  void wait(std::function<bool()> ready) {
    threads_[current]->ready = std::move(ready);
    switch_to_scheduler(false);
  }

  void sync_block() {
    const uint64_t round = block_rounds_;
    if (++block_arrived_ == block_threads) {
      block_arrived_ = 0;
      ++block_rounds_;
      // Whoever comes first into the barrier is not first out of it.
      wait([] { return true; });
    } else {
      wait([this, round] { return block_rounds_ != round; });
    }
  }

  void together(Collective operation, const void* sent, void* received) {
    Thread& thread = *threads_[current];
    Warp& warp = warps_[current / kWarp];
    thread.sent = sent;
    thread.received = received;
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) fail("the lanes of a warp are at different instructions");
    const uint64_t round = warp.rounds;
    if (++warp.arrived < kWarp) {
      wait([&warp, round] { return warp.rounds != round; });
      return;
    }
    Thread* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      lanes[lane] = threads_[current / kWarp * kWarp + lane].get();
    }
    operation(lanes);
    warp.arrived = 0;
    ++warp.rounds;
  }

  void in_flight(const Copy& copy) {
    copy.issue();
    flying_.push_back(copy);
  }

  Thread& thread() { return *threads_[current]; }

  [[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error("emulation: block (" + std::to_string(x) + ", " + std::to_string(y) +
                             ", " + std::to_string(z) + "), thread " + std::to_string(current) +
                             ": " + what);
  }

  int current = 0;
  int block_threads = 0;
  int x = 0, y = 0, z = 0;
  char* shared = nullptr;

 private:
  void run_block() {
    if (block_threads % kWarp) fail("a block of incomplete warps");
    warps_.assign(block_threads / kWarp, Warp{});
    block_arrived_ = 0;
    flying_.clear();
    for (int i = 0; i < block_threads; ++i) {
      Thread& thread = *threads_[i];
      thread.ready = nullptr;
      thread.done = false;
      thread.open.clear();
      thread.groups.clear();
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Machine::entry, 0);
    }
    std::vector<int> order(block_threads);
    for (int i = 0; i < block_threads; ++i) order[i] = i;
    int left = block_threads;
    while (left > 0) {
      if (drawn_) std::shuffle(order.begin(), order.end(), random_);
      bool moved = false;
      for (const int index : order) {
        Thread& thread = *threads_[index];
        if (thread.done || (thread.ready && !thread.ready())) continue;
        thread.ready = nullptr;
        moved = true;
        resume(index);
        if (error_) {
          const std::exception_ptr error = std::exchange(error_, nullptr);
          std::rethrow_exception(error);
        }
        if (thread.done) {
          --left;
          if (block_arrived_ > 0) fail("a thread ended while others wait at the block's barrier");
        }
        if (drawn_ && !flying_.empty() && random_() % 64 == 0) land();
      }
      if (moved) continue;
      if (flying_.empty()) fail("every thread waits for another");
      land();
    }
    if (!flying_.empty()) fail("the block ended while copies into its memory were under way");
    for (int i = 0; i < block_threads; ++i) {
      const Thread& thread = *threads_[i];
      if (!thread.open.empty() || !thread.groups.empty()) {
        current = i;
        fail("ended with copies it never waited for");
      }
    }
  }

  // One bulk copy arrives.
  void land() {
    const size_t which = drawn_ ? random_() % flying_.size() : 0;
    const Copy copy = flying_[which];
    flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(which));
    copy.finish();
    BarrierState& state = state_of(copy.barrier);
    state.bytes -= static_cast<int32_t>(copy.bytes());
    state.settle();
  }

  void resume(int index) {
    current = index;
    Thread& thread = *threads_[index];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, thread.stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler_, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  void switch_to_scheduler(bool for_good) {
    Thread& thread = *threads_[current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#else
    (void)for_good;
#endif
    swapcontext(&thread.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(thread.fake_stack, nullptr, nullptr);
#endif
  }

  static void entry() {
    Machine& machine = get();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_,
                                    &machine.scheduler_stack_bytes_);
#endif
    try {
      machine.kernel_();
    } catch (...) {
      machine.error_ = std::current_exception();
    }
    machine.thread().done = true;
    machine.switch_to_scheduler(true);
  }

  bool drawn_ = false;
  std::mt19937_64 random_{1};
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<char> shared_;
  std::vector<Copy> flying_;
  std::function<void()> kernel_;
  std::exception_ptr error_;
  ucontext_t scheduler_;
  int block_arrived_ = 0;
  uint64_t block_rounds_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#endif
};

inline Machine& machine() { return Machine::get(); }

}  // namespace fssa::cuda::emulation
