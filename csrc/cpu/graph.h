// Calls recorded once and replayed many times, by one team, with a barrier between two of them.
#pragma once

#include <cstdint>
#include <memory>
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
  int64_t size() const { return static_cast<int64_t>(calls_.size()); }

  // Runs every call in order, on these dimensions. Throws std::invalid_argument, before anything
  // is written, for indices out of range.
  void replay(const std::vector<int64_t>& dims, int num_threads);

  // The same, `repeats` times; seconds spent in each call.
  std::vector<double> profile(const std::vector<int64_t>& dims, int num_threads, int repeats);

 private:
  void prepare(const std::vector<int64_t>& dims);
  void run(size_t index, Team& team, std::vector<Span>& scattered) const;

  std::vector<int64_t> dims_;
  std::vector<std::shared_ptr<const Call>> calls_;
  std::vector<const Call*> reader_after_;  // by call, the next that reads memory; or null
  std::vector<const Call*> scattered_after_;  // by call that reads memory, one that reads it in
                                             // many places before the next; or null
  size_t last_reader_ = SIZE_MAX;
  std::vector<const Call*> checked_;  // one of all that check the same
  std::set<std::pair<std::type_index, std::vector<int64_t>>> keys_;
};

}  // namespace fssa::cpu
