// Calls recorded once and replayed many times, by one team, with a barrier between two of them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <typeindex>
#include <utility>
#include <vector>

#include "call.h"

namespace fssa::cpu {

class Graph {
 public:
  explicit Graph(int64_t num_dims) : dims_(num_dims, 0) {}

  // Where the calls find dimension `dim` when they run.
  const int64_t* dim(int64_t dim) const { return &dims_.at(dim); }

  void add(std::shared_ptr<const Call> call);

  // What is added from here on follows a step that is repeated, and makes the next one's inputs of
  // what it left. A repetition ends once one of the first rows (of dimension `dim`) of `ended`, or
  // `interrupt`, which any thread may write, is not zero.
  void end_step(const int32_t* ended, int64_t dim, const int32_t* interrupt);

  // Calls of a step.
  int64_t size() const { return end_ ? end_->num_calls : static_cast<int64_t>(calls_.size()); }

  // Asked now and then, on the thread that replays, whether to leave the rest undone; must not
  // throw.
  using Poll = std::function<bool()>;

  // Runs every call in order, on these dimensions. Throws before anything is written:
  // std::invalid_argument for indices out of range, std::runtime_error if the graph runs already.
  void replay(const std::vector<int64_t>& dims, int num_threads, const Poll& poll);

  // The same up to `times` >= 1 times, each followed by what was added after `end_step`; how often.
  // None begins that would end later than `seconds` after the first began, if it takes as long as
  // the one before, and none on indices out of range, for which it throws as above.
  int64_t repeat(const std::vector<int64_t>& dims, int num_threads, int64_t times, double seconds,
                 const Poll& poll);

  // The same, `repeats` times; seconds spent in each call.
  std::vector<double> profile(const std::vector<int64_t>& dims, int num_threads, int repeats,
                              const Poll& poll);

 private:
  // Where a step ends, and what ends its repetition.
  struct End {
    int64_t num_calls;
    const int32_t* ended;
    const int64_t* num_rows;
    const int32_t* interrupt;

    bool reached() const;
  };

  // Asked on one thread, with every thread's work done, whether to go on after a round of calls.
  using GoOn = std::function<bool()>;

  void prepare(const std::vector<int64_t>& dims, int num_threads);
  void check() const;
  void run(const std::vector<int64_t>& dims, int num_threads, int64_t num_calls, int64_t rounds,
           const Poll& poll, const GoOn& go_on, double* seconds);
  void bring_ahead(size_t index, Team& team, std::vector<Span>& scattered) const;

  std::atomic<bool> busy_{false};
  std::vector<int64_t> dims_;
  std::vector<std::shared_ptr<const Call>> calls_;
  std::optional<End> end_;
  std::vector<const Call*> reader_after_;  // by call, the next that reads memory; or null
  std::vector<const Call*> scattered_after_;  // by call that reads memory, one that reads it in
                                             // many places and for which it is the first to bring
                                             // that; or null
  std::vector<size_t> readers_;  // calls that read memory, since one read it in many places
  std::vector<const Call*> checked_;  // one of all that check the same
  std::set<std::pair<std::type_index, std::vector<int64_t>>> keys_;
  std::vector<std::vector<Span>> scattered_;  // by thread, what it reads in many places
};

}  // namespace fssa::cpu
