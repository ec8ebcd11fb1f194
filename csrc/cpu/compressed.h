// bf16 weights in three quarters of their memory, to the bit.
//
// A weight's high byte is its sign and all but the lowest bit of its exponent, and in a trained matrix
// nearly all of them are among sixteen. So a panel (modulated_linear.h) is kept as
//
//   header  the sixteen bytes that are most frequent in it, and its exceptions: words whose high byte
//           is none of them, by their place, ended by one that lies in no panel
//   units   128 words each, in two groups of 64: the low bytes of one, those of the other, and 64 bytes
//           of which each holds two numbers of four bits, which name the high bytes of a word of
//           either group
//
// Headers of a matrix are equally long, so that its panels are. Within 64 words the bytes lie as
// instructions take them that put low and high bytes together sixteen at a time: see `byte_of`. A unit
// is two column pairs of a panel of two halves, and four of one half.
#pragma once

#include <cstdint>

namespace fssa::cpu {

constexpr int64_t kUnitWords = 128;
constexpr int64_t kUnitBytes = 192;
constexpr int64_t kGroupWords = 64;
constexpr int kCodebookBytes = 16;
constexpr uint32_t kNoWord = UINT32_MAX;

// The word's bits, and where it is among the words of its panel.
struct Exception {
  uint32_t word;
  uint32_t bits;
};

inline const Exception* exceptions_of(const char* panel) {
  return reinterpret_cast<const Exception*>(panel + kCodebookBytes);
}

// Where the low byte of word `word` of a group lies among 64, and what names its high byte.
inline int64_t byte_of(int64_t word) {
  const int64_t half = word / 32, in_half = word % 32;
  return in_half / 8 * 16 + half * 8 + in_half % 8;
}

inline int64_t compressed_panel_bytes(int64_t header_bytes, int64_t num_words) {
  return header_bytes + num_words / kUnitWords * kUnitBytes;
}

// Word `word` of a group of a unit, if its high byte is in the panel's codebook.
inline uint16_t word_in_unit(const char* panel, const char* unit, int64_t group, int64_t word) {
  const auto* const bytes = reinterpret_cast<const uint8_t*>(unit);
  const int64_t at = byte_of(word);
  const int code = bytes[2 * kGroupWords + at] >> (4 * group) & 15;
  const int high = reinterpret_cast<const uint8_t*>(panel)[code];
  return static_cast<uint16_t>(high << 8 | bytes[group * kGroupWords + at]);
}

// How long the header of every one of `num_panels` packed panels of `num_words` has to be; 0 where the panels had
// better stay as they are: short, or larger than seven eighths of their memory, or with more than an
// exception in every sixteen units, each of which takes the time of several units.
int64_t compressed_header_bytes(const void* packed, int64_t num_panels, int64_t num_words,
                                int num_threads);

// Compresses packed panels to `out`.
void compress_panels(void* out, const void* packed, int64_t num_panels, int64_t num_words,
                     int64_t header_bytes, int num_threads);

// The reverse.
void decompress_panels(void* packed, const void* compressed, int64_t num_panels,
                       int64_t num_words, int64_t header_bytes, int num_threads);

}  // namespace fssa::cpu
