// The kernels of every op in one instruction set, and which set this process uses.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../common/dtype.h"
#include "threads.h"

namespace fssa::cpu {

struct ModulatedLinearCall;
struct TakeRowsCall;
struct NormCall;
struct RopeCall;
struct AttentionCall;
struct ChunkStats;

// Numbers that `multiply_add` begins with.
constexpr int kMultiplyAddStart = 64;

struct Kernels {
  const char* name;
  int64_t max_rows;       // of a tile of a product
  bool reads_compressed;  // weights, in products
  void (*modulated_linear)(const ModulatedLinearCall&, Team&);
  void (*take_rows)(const TakeRowsCall&, Team&);
  void (*norm)(const NormCall&, Team&);
  void (*rope)(const RopeCall&, Team&);
  void (*attention)(const AttentionCall&, Team&);
  ChunkStats (*chunk_stats)(const void* logits, DType dtype, int64_t first, int64_t count);
  void (*softmax_weights)(const void* logits, DType dtype, int64_t first, int64_t count, float top,
                          float inverse_temperature, float* out);
  double (*stream)(const void* data, int64_t bytes, Team&);
  double (*multiply_add)(int64_t steps, const float* start, int64_t& flop);
};

// The set in use: the best this machine has, unless another was set.
const Kernels& kernels();

// Names of the sets that this build has and this machine runs, best first.
std::vector<std::string> instruction_sets();

// Uses the set of that name from now on; throws std::invalid_argument if it is not among them.
void set_instruction_set(const std::string& name);

}  // namespace fssa::cpu
