// A team of threads that work through the same list of ops, with a barrier cheap enough to stand
// between two of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fssa::cpu {

struct Range {
  int64_t first;
  int64_t last;
};

struct Span {
  const char* data = nullptr;
  int64_t bytes = 0;
};

// What a call reads first, in order. Whoever asks for some of it ahead leaves the rest.
struct FirstReads {
  Span spans[3];
  int first = 0, last = 0;

  void add(Span memory) { spans[last++] = memory; }
  void left_from(const Span* rest) { first = static_cast<int>(rest - spans); }
  bool known() const { return last > 0; }
  Span* begin() { return spans + first; }
  Span* end() { return spans + last; }
};

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A thread's share of some pieces of work, which it takes from the front and others, once they have
// none of their own left, from the back: so that nobody waits for a thread whose core is slower.
class alignas(64) Share {
 public:
  static constexpr int64_t kMaxPieces = UINT32_MAX;

  void set(Range pieces) {
    bounds_.store(static_cast<uint64_t>(pieces.first) << 32 | static_cast<uint64_t>(pieces.last),
                  std::memory_order_release);
  }

  // The piece that is taken, -1 where none is left.
  int64_t take_first() { return take(true); }
  int64_t take_last() { return take(false); }

 private:
  int64_t take(bool front) {
    uint64_t bounds = bounds_.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t first = bounds >> 32, last = bounds & UINT32_MAX;
      if (first >= last) return -1;
      const uint64_t rest = front ? (first + 1) << 32 | last : first << 32 | (last - 1);
      if (bounds_.compare_exchange_weak(bounds, rest, std::memory_order_acq_rel)) {
        return static_cast<int64_t>(front ? first : last - 1);
      }
    }
  }

  std::atomic<uint64_t> bounds_{0};
};

// How often a thread has arrived. Each has a line of its own, and the one its core brings along: a
// plain store says so, where a counter that all add to would hold every one of them up until its line
// has come over from another core.
struct alignas(128) Arrivals {
  std::atomic<int64_t> count{0};
};

// One thread's view of its team. arrive() and wait() are the two halves of a barrier: whatever a
// thread wrote before it arrived is seen by those that have waited, and work that needs nothing
// from the others fits in between. Every thread must wait for a phase before it arrives again.
class Team {
 public:
  Team(int index, int size, Arrivals* arrivals, Share* shares)
      : index_(index), size_(size), arrivals_(arrivals), shares_(shares) {}

  int index() const { return index_; }
  int size() const { return size_; }

  void arrive() {
    ++phase_;
    if (size_ > 1) arrivals_[index_].count.store(phase_, std::memory_order_release);
  }

  void wait() {
    // Spinning is right while every thread has a core; past that the others need ours.
    for (int other = 0, spins = 0; other < size_; ++other) {
      if (other == index_) continue;
      while (arrivals_[other].count.load(std::memory_order_acquire) < phase_) {
        if (++spins < kMaxSpins) {
          relax();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

  void barrier() {
    arrive();
    wait();
  }

  // What this thread reads first in the call at hand, as far as the calls before have not asked for
  // it, and in the next one that reads memory, for this one to ask for in the end.
  FirstReads& due() { return reads_due_; }
  FirstReads& upcoming() { return upcoming_; }

  // What it will read in many places then, for the call at hand to bring while it has time: a
  // queue, whose entries may be changed.
  Span* meanwhile() const { return meanwhile_; }
  Span* meanwhile_end() const { return meanwhile_end_; }
  void set_meanwhile(Span* first, Span* last) {
    meanwhile_ = first;
    meanwhile_end_ = last;
  }

  // This thread's contiguous part of `count` equal pieces of work.
  Range share(int64_t count) const {
    return {count * index_ / size_, count * (index_ + 1) / size_};
  }

  // Pieces of this thread that others may take as well, until the next barrier. The work must come
  // out the same whoever does it, and those before the last barrier must all have been taken.
  void offer(Range pieces) { shares_[index_].set(pieces); }

  // The first of them that nobody has taken, -1 where none is left.
  int64_t take() { return shares_[index_].take_first(); }

  // One that another thread offers and has not begun, -1 where there is none.
  int64_t help() {
    for (int other = 1; other < size_; ++other) {
      const int64_t piece = shares_[(index_ + other) % size_].take_last();
      if (piece >= 0) return piece;
    }
    return -1;
  }

 private:
  static constexpr int kMaxSpins = 2000;

  int index_;
  int size_;
  Arrivals* arrivals_;
  Share* shares_;
  int64_t phase_ = 0;
  FirstReads reads_due_, upcoming_;
  Span* meanwhile_ = nullptr;
  Span* meanwhile_end_ = nullptr;
};

// Runs work(team) on `num_threads` threads at once (fewer where OpenMP grants fewer) and returns
// when all have finished. `work` must not throw.
template <typename Work>
void run_team(int num_threads, const Work& work) {
#ifdef _OPENMP
  if (num_threads > 1) {
    std::vector<Arrivals> arrivals(num_threads);
    std::vector<Share> shares(num_threads);
#pragma omp parallel num_threads(num_threads)
    {
      Team team(omp_get_thread_num(), omp_get_num_threads(), arrivals.data(), shares.data());
      work(team);
    }
    return;
  }
#endif
  (void)num_threads;
  Arrivals arrivals;
  Share share;
  Team team(0, 1, &arrivals, &share);
  work(team);
}

}  // namespace fssa::cpu
