// A prepared call of one op: everything it reads and writes by address, ready to run many times.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/dtype.h"
#include "threads.h"

namespace fssa::cpu {

// How many rows a call has: a number, or whatever stands at an address when the call runs.
struct RowCount {
  int64_t fixed = 0;
  const int64_t* variable = nullptr;

  int64_t get() const { return variable != nullptr ? *variable : fixed; }
};

// An index array whose values must lie in [low, high).
struct IndexCheck {
  const char* op;
  const char* argument;
  const int32_t* values;
  int64_t low;
  int64_t high;

  // Throws std::invalid_argument that names the first value out of range.
  void run(int64_t count) const {
    for (int64_t t = 0; t < count; ++t) {
      if (values[t] < low || values[t] >= high) {
        throw std::invalid_argument(std::string(op) + ": " + argument + ": expected values in [" +
                                    std::to_string(low) + ", " + std::to_string(high) + "), got " +
                                    std::to_string(values[t]) + " at row " + std::to_string(t));
      }
    }
  }
};

inline int64_t key(const void* address) { return reinterpret_cast<int64_t>(address); }

class Call {
 public:
  virtual ~Call() = default;

  // Throws std::invalid_argument for indices that would lead outside the call's memory. Runs on
  // one thread, before anything is written.
  virtual void check() const = 0;

  // Calls of one op with equal keys check the same memory against the same bounds.
  virtual std::vector<int64_t> check_key() const = 0;

  // What the thread reads first of what is too large to stay in a cache between two runs of the
  // call, or nothing: the call before that reads memory too brings it.
  virtual FirstReads first_reads(const Team&) const { return {}; }

  // Appends what the thread reads in many places of a memory no cache holds, as far as `reads` has
  // room without growing. Calls before it that have first_reads bring it, as far as they compute
  // longer than they read.
  virtual void scattered_reads(const Team&, std::vector<Span>&) const {}
  virtual bool reads_scattered() const { return false; }

  // This thread's part of the work. Every thread of the team calls it, in the same order of calls.
  virtual void run(Team& team) const = 0;
};

// Checks the call, then runs it on a team of its own.
inline void run_alone(const Call& call, int num_threads) {
  call.check();
  run_team(num_threads, [&](Team& team) { call.run(team); });
}

}  // namespace fssa::cpu
