#include "graph.h"

#include <algorithm>
#include <chrono>
#include <exception>
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

void Graph::end_step(const int32_t* ended, int64_t dim, const int32_t* interrupt) {
  end_ = End{size(), ended, this->dim(dim), interrupt};
}

bool Graph::End::reached() const {
  if (__atomic_load_n(interrupt, __ATOMIC_RELAXED) != 0) return true;
  return std::any_of(ended, ended + *num_rows, [](int32_t row) { return row != 0; });
}

void Graph::prepare(const std::vector<int64_t>& dims, int num_threads) {
  if (dims.size() != dims_.size()) {
    throw std::invalid_argument("replay: expected " + std::to_string(dims_.size()) +
                                " dimensions, got " + std::to_string(dims.size()));
  }
  // In place: the calls hold the addresses.
  for (size_t i = 0; i < dims.size(); ++i) dims_[i] = dims[i];
  check();
  scattered_.resize(std::max(num_threads, 1));
  for (std::vector<Span>& spans : scattered_) spans.reserve(kMaxScattered);
}

void Graph::check() const {
  for (const Call* call : checked_) call->check();
}

void Graph::run(const std::vector<int64_t>& dims, int num_threads, int64_t num_calls,
                int64_t rounds, const Poll& poll, const GoOn& go_on, double* seconds) {
  const Hold hold(busy_);
  prepare(dims, num_threads);
  // Brought forward to the step at hand before the barrier that ends it, so that every thread
  // leaves there: whoever has passed that barrier sees it, and whoever has not is no further.
  std::atomic<int64_t> last_step{num_calls * rounds - 1};
  run_team(num_threads, [&](Team& team) {
    const bool first = team.index() == 0;
    auto start = Clock::now(), polled = start;
    // On the thread's own stack: it would share a cache line with those of the others.
    std::vector<Span> scattered;
    scattered.swap(scattered_[team.index()]);
    for (int64_t step = 0; step <= last_step.load(std::memory_order_relaxed); ++step) {
      const int64_t index = step % num_calls;
      bring_ahead(index, team, scattered);
      calls_[index]->run(team);
      if (first && poll && Clock::now() - polled >= kPollInterval) {
        if (poll()) last_step.store(step, std::memory_order_relaxed);
        polled = Clock::now();
      }
      if (go_on && index + 1 == num_calls) {
        team.barrier();
        if (first && !go_on()) last_step.store(step, std::memory_order_relaxed);
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
  run(dims, num_threads, size(), 1, poll, nullptr, nullptr);
}

int64_t Graph::repeat(const std::vector<int64_t>& dims, int num_threads, int64_t times,
                      double seconds, const Poll& poll) {
  if (!end_) throw std::runtime_error("repeat: expected a step recorded with what follows it");
  int64_t done = 0;
  std::exception_ptr error;
  auto start = Clock::now(), round = start;
  const auto go_on = [&] {
    ++done;
    const auto now = Clock::now();
    const double end_of_next = std::chrono::duration<double>(now - start + (now - round)).count();
    round = now;
    if (done == times || end_->reached() || end_of_next > seconds) return false;
    try {
      check();
    } catch (...) {  // a thread of a team must not throw
      error = std::current_exception();
      return false;
    }
    return true;
  };
  run(dims, num_threads, static_cast<int64_t>(calls_.size()), times, poll, go_on, nullptr);
  if (error) std::rethrow_exception(error);
  return done;
}

std::vector<double> Graph::profile(const std::vector<int64_t>& dims, int num_threads, int repeats,
                                   const Poll& poll) {
  std::vector<double> seconds(size(), 0.0);
  run(dims, num_threads, size(), repeats, poll, nullptr, seconds.data());
  return seconds;
}

}  // namespace fssa::cpu
