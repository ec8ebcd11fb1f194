// Small kernels, right ones and wrong ones, that show what the emulation of a GPU does and notices.
// Prints a line for each: its name, and what came of it.
#include <cstdio>
#include <functional>
#include <string>

#include "launch.cuh"

using namespace fssa::cuda;

namespace {

constexpr int kSharedBytes = 3072 + 64;
int result;  // what a probe's kernel found
float global_memory[64];

BF16 rounded(float value) {
  BF16 number;
  from_float(value, number);
  return number;
}

uint32_t pair(float low, float high) {
  return rounded(low).bits | static_cast<uint32_t>(rounded(high).bits) << 16;
}

float left(int row, int k) { return static_cast<float>((3 * row + 5 * k) % 7 - 3); }
float right(int k, int column) { return static_cast<float>((2 * k + 3 * column) % 5 - 2); }

// Fragments filled as the PTX manual lists them for mma.m16n8k16, register by register.
void matrix_product() {
  const int lane = thread_index(), group = lane >> 2, in_group = lane & 3;
  uint32_t a[4], b[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int k = in_group * 2 + (i < 4 ? 0 : 8);
    a[i / 2] = pair(left(row, k), left(row, k + 1));
  }
  for (int i = 0; i < 4; i += 2) {
    const int k = in_group * 2 + (i < 2 ? 0 : 8);
    b[i / 2] = pair(right(k, group), right(k + 1, group));
  }
  float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  multiply_add<BF16>(sum, a, b);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    float expected = 1.0f;
    for (int k = 0; k < 16; ++k) expected += left(row, k) * right(k, column);
    if (sum[i] != expected) ++result;
  }
}

// ldmatrix .x4.trans: a lane gets of each matrix the elements (2c, g) and (2c + 1, g).
void matrix_load() {
  auto* numbers = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = thread_index();
  for (int i = lane; i < 256; i += 32) numbers[i] = static_cast<uint16_t>(i);
  sync_block();
  uint32_t words[4];
  load_matrices_transposed(words, numbers + 8 * lane);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32_t first = 64 * matrix + 8 * (2 * (lane % 4)) + lane / 4;
    if (words[matrix] != (first | (first + 8) << 16)) ++result;
  }
}

void neighbours(bool with_barrier) {
  auto* numbers = reinterpret_cast<int*>(shared_memory());
  const int next = (thread_index() + 1) % num_threads();
  numbers[thread_index()] = thread_index();
  if (with_barrier) sync_block();
  if (numbers[next] != next) ++result;
}

void copied(bool with_wait) {
  auto* numbers = reinterpret_cast<float*>(shared_memory()) + 4 * thread_index();
  copy_async(numbers, global_memory);
  copy_commit();
  if (with_wait) copy_wait<0>();
  if (numbers[0] != 5.0f) ++result;
  copy_wait<0>();
}

// A matrix of 11 rows of 72 numbers, each 1000 * row + column, of which boxes of 8 rows are copied:
// two, the second of which reaches over the end of rows and of columns.
constexpr int kRows = 11, kColumns = 72, kBox = 8;
uint16_t matrix[kRows * kColumns];

void copied_in_tiles(bool with_wait, uint32_t expected) {
  char* memory = shared_memory() + (-reinterpret_cast<uintptr_t>(shared_memory()) & 1023);
  auto* barrier = reinterpret_cast<uint64_t*>(memory + 2048);
  const TileMap map = map_tiles(DType::kFloat16, matrix, kRows, kColumns, kColumns, kBox);
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
  }
  sync_block();
  if (thread_index() == 0) barrier_arrive_expecting(barrier, expected);
  if (thread_index() < 2) {
    const int box = thread_index();
    copy_tile(memory + 1024 * box, map, 64 * box, kBox * box, barrier);
  }
  if (with_wait) barrier_wait(barrier, 0);
  for (int box = 0; box < 2; ++box) {
    for (int row = 0; row < kBox; ++row) {
      for (int column = 0; column < 64; ++column) {
        uint16_t number;
        // As the manual draws the pattern of 128 bytes: bits 4 to 6 of an address and bits 7 to 9.
        int at = 1024 * box + 128 * row + 2 * column;
        at ^= (at >> 7 & 7) << 4;
        std::memcpy(&number, memory + at, 2);
        const int from_row = 8 * box + row, from_column = 64 * box + column;
        const bool there = from_row < kRows && from_column < kColumns;
        if (number != (there ? 1000 * from_row + from_column : 0)) ++result;
      }
    }
  }
  barrier_wait(barrier, 0);
}

// A seed for which the result is wrong counts; an error ends the probe with its message.
void probe(const char* name, int threads, const std::function<void()>& kernel) {
  constexpr int kSeeds = 8;
  int wrong = 0;
  try {
    for (int seed = 0; seed < kSeeds; ++seed) {
      emulation::machine().seed(seed);
      result = 0;
      emulation::machine().launch(1, 1, 1, threads, kSharedBytes, kernel);
      wrong += result != 0;
    }
    const char* verdict = wrong == 0 ? "right" : wrong == kSeeds ? "wrong" : "sometimes wrong";
    std::printf("%s: %s\n", name, verdict);
  } catch (const std::exception& error) {
    const std::string what = error.what();
    std::printf("%s: %s\n", name, what.substr(what.rfind(": ") + 2).c_str());
  }
}

}  // namespace

int main() {
  for (float& value : global_memory) value = 5.0f;
  for (int i = 0; i < kRows * kColumns; ++i) {
    matrix[i] = static_cast<uint16_t>(1000 * (i / kColumns) + i % kColumns);
  }
  probe("matrix product", 32, matrix_product);
  probe("matrix load", 32, matrix_load);
  probe("barrier", 64, [] { neighbours(true); });
  probe("no barrier", 64, [] { neighbours(false); });
  probe("copy", 32, [] { copied(true); });
  probe("copy not waited for", 32, [] { copied(false); });
  probe("tiles", 64, [] { copied_in_tiles(true, 2048); });
  probe("tiles not waited for", 64, [] { copied_in_tiles(false, 2048); });
  probe("tiles of fewer bytes than expected", 64, [] { copied_in_tiles(true, 2064); });
  probe("barrier not initialised", 32, [] {
    barrier_wait(reinterpret_cast<uint64_t*>(shared_memory()), 0);
  });
  probe("past the end", 32, [] { shared_memory()[kSharedBytes + thread_index()] = 1; });
  probe("diverged", 32, [] {
    if (thread_index() < 16) {
      shuffle_xor(1.0f, 1);
    } else {
      matrix_product();
    }
  });
  probe("left early", 64, [] {
    if (thread_index() < 32) sync_block();
  });
  probe("half a warp", 32, [] {
    if (thread_index() < 16) shuffle_xor(1.0f, 1);
  });
  probe("misaligned", 32, [] { load_words(reinterpret_cast<const char*>(global_memory) + 8); });
  return 0;
}
