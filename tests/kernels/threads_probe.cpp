// Two threads offer eight pieces each. One begins one of its own and goes on only when all others are
// done, so the other must have helped. Prints how often each piece was done, or fails after a while.
#include <chrono>
#include <cstdio>

#include "threads.h"

int main() {
  using fssa::cpu::Team;
  constexpr int kPieces = 16;
  std::atomic<int> done[kPieces] = {}, num_done{0};
  std::atomic<bool> late{false};
  fssa::cpu::run_team(2, [&](Team& team) {
    if (team.size() != 2) {
      late = true;
      return;
    }
    team.offer(team.share(kPieces));
    team.barrier();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    const auto work = [&](int64_t piece) {
      while (piece == 0 && num_done < kPieces - 1 && !late) {
        if (std::chrono::steady_clock::now() > deadline) late = true;
        std::this_thread::yield();
      }
      ++done[piece];
      ++num_done;
    };
    for (int64_t piece = team.take(); piece >= 0; piece = team.take()) work(piece);
    for (int64_t piece = team.help(); piece >= 0; piece = team.help()) work(piece);
  });
  for (const auto& count : done) std::printf("%d ", count.load());
  return late ? 1 : 0;
}
