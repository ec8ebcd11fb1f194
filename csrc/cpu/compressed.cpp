#include "compressed.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "threads.h"

namespace fssa::cpu {
namespace {

constexpr int64_t kLine = 64;
// What a panel takes besides its units is small from here on.
constexpr int64_t kMinWords = 2048;

// The sixteen most frequent high bytes of a panel, and the number of words that have none of them.
struct Codebook {
  std::array<uint8_t, kCodebookBytes> bytes;
  int64_t num_exceptions;

  Codebook(const uint16_t* words, int64_t count) {
    std::array<int64_t, 256> frequency{};
    for (int64_t i = 0; i < count; ++i) ++frequency[words[i] >> 8];
    std::array<uint8_t, 256> order;
    std::iota(order.begin(), order.end(), uint8_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](uint8_t a, uint8_t b) { return frequency[a] > frequency[b]; });
    std::copy_n(order.begin(), bytes.size(), bytes.begin());
    num_exceptions = std::accumulate(
        order.begin() + kCodebookBytes, order.end(), int64_t{0},
        [&](int64_t sum, uint8_t high) { return sum + frequency[high]; });
  }
};

int64_t header_bytes_for(int64_t num_exceptions) {
  const int64_t bytes =
      kCodebookBytes + (num_exceptions + 1) * static_cast<int64_t>(sizeof(Exception));
  return (bytes + kLine - 1) / kLine * kLine;
}

void compress(char* panel, const uint16_t* words, int64_t count, int64_t header_bytes) {
  const Codebook codebook(words, count);
  std::array<int, 256> codes;
  codes.fill(-1);
  for (int i = 0; i < kCodebookBytes; ++i) codes[codebook.bytes[i]] = i;
  std::memcpy(panel, codebook.bytes.data(), kCodebookBytes);
  auto* exception = reinterpret_cast<Exception*>(panel + kCodebookBytes);
  auto* const header_end = reinterpret_cast<Exception*>(panel + header_bytes);
  uint8_t* unit = reinterpret_cast<uint8_t*>(panel + header_bytes);
  for (int64_t first = 0; first < count; first += kUnitWords, unit += kUnitBytes) {
    for (int64_t i = 0; i < kGroupWords; ++i) {
      int both = 0;
      for (int64_t group = 0; group < 2; ++group) {
        const int64_t word = first + group * kGroupWords + i;
        unit[group * kGroupWords + byte_of(i)] = static_cast<uint8_t>(words[word]);
        const int code = codes[words[word] >> 8];
        both |= std::max(code, 0) << (4 * group);
      }
      unit[2 * kGroupWords + byte_of(i)] = static_cast<uint8_t>(both);
    }
    for (int64_t word = first; word < first + kUnitWords; ++word) {
      if (codes[words[word] >> 8] < 0) *exception++ = {static_cast<uint32_t>(word), words[word]};
    }
  }
  std::fill(exception, header_end, Exception{kNoWord, 0});
}

void decompress(uint16_t* words, const char* panel, int64_t count, int64_t header_bytes) {
  for (int64_t word = 0; word < count; ++word) {
    const char* const unit = panel + header_bytes + word / kUnitWords * kUnitBytes;
    const int64_t group = word % kUnitWords / kGroupWords;
    words[word] = word_in_unit(panel, unit, group, word % kGroupWords);
  }
  for (const Exception* e = exceptions_of(panel); e->word != kNoWord; ++e) {
    words[e->word] = static_cast<uint16_t>(e->bits);
  }
}

// Calls each(panel) for every panel, on a team.
template <typename Each>
void for_each_panel(int64_t num_panels, int num_threads, const Each& each) {
  run_team(num_threads, [&](Team& team) {
    const Range mine = team.share(num_panels);
    for (int64_t panel = mine.first; panel < mine.last; ++panel) each(panel);
  });
}

}  // namespace

int64_t compressed_header_bytes(const void* packed, int64_t num_panels, int64_t num_words,
                                int num_threads) {
  if (num_panels == 0 || num_words < kMinWords || num_words % kUnitWords != 0) return 0;
  if (num_words > static_cast<int64_t>(kNoWord)) return 0;
  std::vector<int64_t> exceptions(num_panels);
  for_each_panel(num_panels, num_threads, [&](int64_t panel) {
    const auto* const words = static_cast<const uint16_t*>(packed) + panel * num_words;
    exceptions[panel] = Codebook(words, num_words).num_exceptions;
  });
  const int64_t all = std::accumulate(exceptions.begin(), exceptions.end(), int64_t{0});
  const int64_t header = header_bytes_for(*std::max_element(exceptions.begin(), exceptions.end()));
  const bool is_small = 8 * compressed_panel_bytes(header, num_words) <= 7 * 2 * num_words;
  return is_small && 16 * all <= num_panels * (num_words / kUnitWords) ? header : 0;
}

void compress_panels(void* out, const void* packed, int64_t num_panels, int64_t num_words,
                     int64_t header_bytes, int num_threads) {
  const int64_t bytes = compressed_panel_bytes(header_bytes, num_words);
  for_each_panel(num_panels, num_threads, [&](int64_t panel) {
    compress(static_cast<char*>(out) + panel * bytes,
             static_cast<const uint16_t*>(packed) + panel * num_words, num_words, header_bytes);
  });
}

void decompress_panels(void* packed, const void* compressed, int64_t num_panels,
                       int64_t num_words, int64_t header_bytes, int num_threads) {
  const int64_t bytes = compressed_panel_bytes(header_bytes, num_words);
  for_each_panel(num_panels, num_threads, [&](int64_t panel) {
    decompress(static_cast<uint16_t*>(packed) + panel * num_words,
               static_cast<const char*>(compressed) + panel * bytes, num_words, header_bytes);
  });
}

}  // namespace fssa::cpu
