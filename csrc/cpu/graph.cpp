#include "graph.h"

#include <algorithm>
#include <chrono>
#include <typeinfo>

namespace fssa::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPollInterval = std::chrono::milliseconds(50);
constexpr size_t kMaxScattered = 1024;
// How many calls before one that reads in many places bring that: the more, the less of it each has
// to ask for beside its own weights.
constexpr size_t kReadersThatBring = 3;

// Has the graph for one replay.
class Hold {
 public:
  explicit Hold(std::atomic<bool>& busy) : busy_(busy) {
    if (busy_.exchange(true)) {
      throw std::runtime_error("replay: expected one thread at a time, got a graph that runs");
    }
  }
  ~Hold() { busy_.store(false); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  std::atomic<bool>& busy_;
};

}  // namespace

void Graph::add(std::shared_ptr<const Call> call) {
  const Call& added = *call;
  if (keys_.emplace(typeid(added), added.check_key()).second) checked_.push_back(&added);
  if (added.first_reads(Team(0, 1, nullptr, nullptr)).known()) {
    for (auto after = reader_after_.rbegin(); after != reader_after_.rend() && !*after; ++after) {
      *after = &added;
    }
    readers_.push_back(calls_.size());
  } else if (added.reads_scattered()) {
    const size_t brings = std::min(readers_.size(), kReadersThatBring);
    if (brings > 0) scattered_after_[*(readers_.end() - brings)] = &added;
    readers_.clear();
  }
  calls_.push_back(std::move(call));
  reader_after_.push_back(nullptr);
  scattered_after_.push_back(nullptr);
}

void Graph::bring_ahead(size_t index, Team& team, std::vector<Span>& scattered) const {
  const Call& call = *calls_[index];
  FirstReads first = call.first_reads(team);
  if (first.known()) {
    team.due() = team.upcoming().known() ? team.upcoming() : first;
    const Call* reader = reader_after_[index];
    team.upcoming() = reader != nullptr ? reader->first_reads(team) : FirstReads{};
  }
  if (call.reads_scattered()) team.set_meanwhile(nullptr, nullptr);
  if (scattered_after_[index] == nullptr) return;
  scattered.clear();
  scattered_after_[index]->scattered_reads(team, scattered);
  team.set_meanwhile(scattered.data(), scattered.data() + scattered.size());
}

void Graph::prepare(const std::vector<int64_t>& dims, int num_threads) {
  if (dims.size() != dims_.size()) {
    throw std::invalid_argument("replay: expected " + std::to_string(dims_.size()) +
                                " dimensions, got " + std::to_string(dims.size()));
  }
  // In place: the calls hold the addresses.
  for (size_t i = 0; i < dims.size(); ++i) dims_[i] = dims[i];
  for (const Call* call : checked_) call->check();
  scattered_.resize(std::max(num_threads, 1));
  for (std::vector<Span>& spans : scattered_) spans.reserve(kMaxScattered);
}

void Graph::run(const std::vector<int64_t>& dims, int num_threads, int repeats, const Poll& poll,
                double* seconds) {
  const Hold hold(busy_);
  prepare(dims, num_threads);
  const int64_t num_calls = size();
  // Brought forward to the step at hand before the barrier that ends it, so that every thread
  // leaves there: whoever has passed that barrier sees it, and whoever has not is no further.
  std::atomic<int64_t> last_step{num_calls * repeats - 1};
  run_team(num_threads, [&](Team& team) {
    const bool first = team.index() == 0;
    auto start = Clock::now(), polled = start;
    // On the thread's own stack: it would share a cache line with those of the others.
    std::vector<Span> scattered;
    scattered.swap(scattered_[team.index()]);
    for (int64_t step = 0; step <= last_step.load(std::memory_order_relaxed); ++step) {
      const size_t index = step % num_calls;
      bring_ahead(index, team, scattered);
      calls_[index]->run(team);
      if (first && poll && Clock::now() - polled >= kPollInterval) {
        if (poll()) last_step.store(step, std::memory_order_relaxed);
        polled = Clock::now();
      }
      team.barrier();
      if (first && seconds != nullptr) {
        const auto stop = Clock::now();
        seconds[index] += std::chrono::duration<double>(stop - start).count();
        start = stop;
      }
    }
    scattered.swap(scattered_[team.index()]);
  });
}

void Graph::replay(const std::vector<int64_t>& dims, int num_threads, const Poll& poll) {
  run(dims, num_threads, 1, poll, nullptr);
}

std::vector<double> Graph::profile(const std::vector<int64_t>& dims, int num_threads, int repeats,
                                   const Poll& poll) {
  std::vector<double> seconds(calls_.size(), 0.0);
  run(dims, num_threads, repeats, poll, seconds.data());
  return seconds;
}

}  // namespace fssa::cpu
