// Walks through the weights of two products, one after the other in every step, as a thread of
// csrc/cpu does, and notes what is asked for ahead and when it is read. On standard input: rows,
// columns of x, panels of either product, bytes of a header (0: weights are not compressed), threads,
// thread, bytes of the first-level cache, rank of a low-rank term. Prints, of the second step: lines read,
// those not asked for before, requests, how many bytes were read between a line's request and itself, at
// least and at most, and how many requests were for the second-level cache.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "isa_prologue.h"
#include "kernels.h"

namespace {

std::unordered_map<uintptr_t, long> asked;  // lines, and how many reads there were before
long reads = 0, requests = 0, unasked = 0, nearest = 0, furthest = 0, second = 0;

void ask(const void* p, int, int locality) {
  ++requests;
  second += locality == 2;
  asked.emplace(reinterpret_cast<uintptr_t>(p) / 64, reads);
}

void read(const char* p) {
  const auto found = asked.find(reinterpret_cast<uintptr_t>(p) / 64);
  if (found == asked.end()) {
    ++unasked;
  } else {
    const long ahead = 64 * (reads - found->second);
    if (ahead > furthest) furthest = ahead;
    if (ahead < nearest) nearest = ahead;
    asked.erase(found);
  }
  ++reads;
}

}  // namespace

#define __builtin_prefetch ask
#define FSSA_ISA probed
namespace fssa::cpu {
#include "vec_portable.h"
#include "math.inl"
#include "ahead.inl"
#include "multiply.inl"

// Units are put together by no portable kernel: here they are only read.
namespace probed {
bool first_tile = true;
struct Codebook {};
Codebook load_codebook(const void*) { return {}; }
void store_pairs(void*, Pairs) {}
template <int kPair>
void put_together(const char* unit, Codebook, Pairs (&)[2]) {
  if (!first_tile) return;
  read(unit + 64 * kPair);
  if (kPair == 1) read(unit + 128);
}
}  // namespace probed

#include "compressed.inl"
#include "low_rank.inl"
#include "panel_reads.inl"

long cache_bytes;
int64_t first_cache_bytes() { return cache_bytes; }
const Kernels& kernels() { std::abort(); }
void ModulatedLinearCall::check() const {}
std::vector<int64_t> ModulatedLinearCall::check_key() const { return {}; }
void ModulatedLinearCall::run(Team&) const {}
FirstReads ModulatedLinearCall::first_reads(const Team& team) const {
  FirstReads reads;
  reads.add(first_panel(team));
  return reads;
}

namespace probed {

// A tile of compressed weights, as the kernels take it: the header, then its units.
void walk_compressed(const ModulatedLinearCall& call, int64_t panel, Ahead& ahead) {
  const char* const at = call.panel(panel);
  for (int64_t i = 0; i < call.header_bytes && first_tile; i += 64) read(at + i);
  const std::vector<BFloat16> x(call.in_features);
  Vec acc[1][2] = {};
  accumulate_compressed(SpacedRows<1, BFloat16>(x.data(), 0), at, call.header_bytes,
                        call.in_features, acc, ahead);
}

// The steps of a low-rank term, which read nothing of the weight.
void walk_expand(const ModulatedLinearCall& call, Ahead& brought) {
  Ahead ahead = early_requests(brought);
  for (int64_t pair = 0; pair < call.rank / 2; ++pair) fetch_some<kEarlyBytes>(ahead);
  count_early(brought, ahead);
}

// What a thread reads of one product, and asks for, tile by tile. Up to three rows in steps of one
// column pair, more of them in steps of four, as `accumulate` takes them.
void walk(const ModulatedLinearCall& call, Team& team) {
  const int64_t rows = call.count.get(), tiles = num_tiles(rows);
  const bool both_halves = 2 * ((rows + tiles - 1) / tiles) <= kMaxSums;
  const Range mine = team.share(call.num_panels());
  PanelReads reads(call, team, rows);
  reads.begin(mine.first, mine.last - 1, true);
  for (int64_t panel = mine.first; panel < mine.last; ++panel) {
    Ahead ahead = reads.of(panel);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      first_tile = tile == 0;
      if (call.header_bytes != 0) {
        walk_compressed(call, panel, ahead);
        walk_expand(call, ahead);
        continue;
      }
      for (int first = 0; first < 2; first += both_halves ? 2 : 1) {
        for (int64_t pair = 0; pair < call.in_features / 2; ++pair) {
          const char* const at = call.panel(panel) + pair * kStepBytes;
          if (tile == 0) {
            read(at + 64 * first);
            if (both_halves) read(at + 64);
          }
          if (both_halves && rows < kWidenedRows) {
            fetch_some<kStepBytes>(ahead);
          } else if (rows < kWidenedRows) {
            fetch_some<kStepBytes / 2>(ahead);
          } else if (pair % 4 == 3) {
            const int times = (both_halves ? 2 : 1) * (ahead.halved ? 1 : 2);
            for (int i = 0; i < times; ++i) fetch<kStepBytes>(ahead);
          }
        }
      }
      walk_expand(call, ahead);
    }
    reads.leave(panel, ahead);
  }
  reads.end(reads.of_queue());
}

}  // namespace probed
}  // namespace fssa::cpu

int main() {
  using namespace fssa::cpu;
  long rows, columns, panels[2], header_bytes, threads, thread, rank;
  if (std::scanf("%ld %ld %ld %ld %ld %ld %ld %ld %ld", &rows, &columns, panels, panels + 1,
                 &header_bytes, &threads, &thread, &cache_bytes, &rank) != 9) {
    return 1;
  }
  ModulatedLinearCall calls[2];
  for (int i = 0; i < 2; ++i) {
    calls[i].dtype = fssa::DType::kBFloat16;
    calls[i].in_features = columns;
    calls[i].rank = rank;
    calls[i].num_halves = 2 * panels[i];
    calls[i].count.fixed = rows;
    calls[i].header_bytes = header_bytes;
    // Nothing is read but addresses, and the headers' exceptions, of which there are none.
    calls[i].weight = reinterpret_cast<const void*>(uintptr_t(i + 1) << 40);
    if (header_bytes != 0) {
      const size_t bytes = panels[i] * calls[i].panel_bytes();
      calls[i].weight = std::memset(std::aligned_alloc(64, bytes), 0xff, bytes);
    }
  }
  Team team(static_cast<int>(thread), static_cast<int>(threads), nullptr, nullptr);
  long before = 0;
  for (int step = 0; step < 2; ++step) {
    before = reads;
    requests = unasked = furthest = second = 0;
    nearest = INT64_MAX;
    for (int i = 0; i < 2; ++i) {
      const FirstReads first = calls[i].first_reads(team);
      team.due() = team.upcoming().known() ? team.upcoming() : first;
      team.upcoming() = calls[1 - i].first_reads(team);
      probed::walk(calls[i], team);
    }
  }
  std::printf("%ld %ld %ld %ld %ld %ld\n", reads - before, unasked, requests, nearest, furthest,
              second);
  return 0;
}
