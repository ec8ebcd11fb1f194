#include "graph.h"

#include <chrono>
#include <typeinfo>

namespace fssa::cpu {

void Graph::add(std::shared_ptr<const Call> call) {
  const Call& added = *call;
  if (keys_.emplace(typeid(added), added.check_key()).second) checked_.push_back(&added);
  if (added.first_read(Team(0, 1, nullptr)).bytes > 0) {
    for (auto after = reader_after_.rbegin(); after != reader_after_.rend() && !*after; ++after) {
      *after = &added;
    }
    last_reader_ = calls_.size();
  } else if (added.reads_scattered() && last_reader_ < calls_.size()) {
    scattered_after_[last_reader_] = &added;
  }
  calls_.push_back(std::move(call));
  reader_after_.push_back(nullptr);
  scattered_after_.push_back(nullptr);
}

void Graph::run(size_t index, Team& team, std::vector<Span>& scattered) const {
  const Call* reader = reader_after_[index];
  team.set_upcoming(reader != nullptr ? reader->first_read(team) : Span{});
  scattered.clear();
  if (scattered_after_[index] != nullptr) scattered_after_[index]->scattered_reads(team, scattered);
  team.set_meanwhile(scattered.data(), scattered.data() + scattered.size());
  calls_[index]->run(team);
  team.barrier();
}

void Graph::prepare(const std::vector<int64_t>& dims) {
  if (dims.size() != dims_.size()) {
    throw std::invalid_argument("replay: expected " + std::to_string(dims_.size()) +
                                " dimensions, got " + std::to_string(dims.size()));
  }
  // In place: the calls hold the addresses.
  for (size_t i = 0; i < dims.size(); ++i) dims_[i] = dims[i];
  for (const Call* call : checked_) call->check();
}

void Graph::replay(const std::vector<int64_t>& dims, int num_threads) {
  prepare(dims);
  run_team(num_threads, [&](Team& team) {
    std::vector<Span> scattered;
    for (size_t i = 0; i < calls_.size(); ++i) run(i, team, scattered);
  });
}

std::vector<double> Graph::profile(const std::vector<int64_t>& dims, int num_threads,
                                   int repeats) {
  using Clock = std::chrono::steady_clock;
  prepare(dims);
  std::vector<double> seconds(calls_.size(), 0.0);
  run_team(num_threads, [&](Team& team) {
    std::vector<Span> scattered;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      for (size_t i = 0; i < calls_.size(); ++i) {
        const auto start = Clock::now();
        run(i, team, scattered);
        if (team.index() == 0) {
          seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
        }
      }
    }
  });
  return seconds;
}

}  // namespace fssa::cpu
