// Device code of residual add, FiLM and RMS norm; see residual_film_rms_norm.h.
#pragma once

#include "numbers.cuh"
#include "residual_film_rms_norm.h"
#include "rows.cuh"

namespace fssa::cuda {

// Eight numbers of a tensor of T or fp32, at once where they are aligned.
template <typename T>
FSSA_DEVICE void load_eight(const void* base, bool is_float, bool aligned, int64_t index,
                            float (&numbers)[8]) {
  if (aligned && is_float) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words4 words = load_words(static_cast<const float*>(base) + index + 4 * half);
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[4 * half + i] = as_float(words.word[i]);
    }
  } else if (aligned) {
    unpack<T>(load_words(static_cast<const T*>(base) + index), numbers);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) numbers[i] = load_number<T>(base, is_float, index + i);
  }
}

// Row `token` of h, rounded, at channels c .. c + 7.
template <typename T>
FSSA_DEVICE Words4 residual_film(const NormArguments& args, int token, int c) {
  float s[8];
  unpack<T>(load_words(static_cast<const T*>(args.x) + token * args.stride_x + c), s);
  if (args.residual != nullptr) {
    float before[8];
    unpack<T>(load_words(static_cast<const T*>(args.residual) + token * args.stride_residual + c),
              before);
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] += before[i];
  }
  if (args.film != nullptr) {
    const int slot = load(args.slots + token);
    if (slot >= 0 && slot < args.num_users) {
      float gamma[8], beta[8];
      const int64_t at = slot * args.stride_film + c;
      load_eight<T>(args.film, args.film_is_float, args.film_aligned, at, gamma);
      load_eight<T>(args.film, args.film_is_float, args.film_aligned, at + args.num_channels, beta);
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i] = fmaf(gamma[i], s[i], beta[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) s[i] = not_a_number();
    }
  }
  return pack<T>(s);
}

template <typename T>
FSSA_DEVICE float squares(const Words4& words) {
  float h[8], total = 0.0f;
  unpack<T>(words, h);
#pragma unroll
  for (int i = 0; i < 8; ++i) total = fmaf(h[i], h[i], total);
  return total;
}

FSSA_DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// h times 1 / rms times the weight, at channels c .. c + 7.
template <typename T>
FSSA_DEVICE Words4 normalised(const NormArguments& args, const Words4& words, float inverse_rms,
                              int c) {
  float h[8], weight[8];
  unpack<T>(words, h);
  load_eight<T>(args.weight, args.weight_is_float, args.weight_aligned, c, weight);
#pragma unroll
  for (int i = 0; i < 8; ++i) h[i] = h[i] * inverse_rms * (weight[i] + args.weight_offset);
  return pack<T>(h);
}

template <typename T>
FSSA_DEVICE void store_normed(const NormArguments& args, int token, int c, const Words4& words) {
  T* target = static_cast<T*>(args.normed) + token * args.stride_normed + c;
  if (args.normed_aligned) {
    store_words(target, words);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store(target + i, T{static_cast<uint16_t>(words.word[i / 2] >> (16 * (i % 2)))});
    }
  }
}

template <typename T>
FSSA_GLOBAL(kMaxNormThreads, 1)
norm_kernel(const FSSA_GRID_CONSTANT NormArguments args) {
  char* row = shared_memory();
  float* parts = reinterpret_cast<float*>(shared_memory() + args.plan.parts);
  const int token = block_x();
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  T* h = static_cast<T*>(args.h) + static_cast<int64_t>(token) * args.num_channels;
  float total = 0.0f;
  for (int c = 8 * thread_index(); c < args.num_channels; c += 8 * num_threads()) {
    const Words4 words = residual_film<T>(args, token, c);
    store_words(h + c, words);
    // A thread reads back only what it wrote itself.
    *reinterpret_cast<Words4*>(row + 2 * c) = words;
    total += squares<T>(words);
  }
  total = sum_of_warp(total);
  if (lane == 0) parts[warp] = total;
  sync_block();
  total = 0.0f;
  for (int i = 0; i < num_threads() / 32; ++i) total += parts[i];
  const float inverse_rms = inverse_root(total / args.num_channels + args.eps);
  for (int c = 8 * thread_index(); c < args.num_channels; c += 8 * num_threads()) {
    store_normed<T>(args, token, c, normalised<T>(args, read_words(row + 2 * c), inverse_rms, c));
  }
}

template <typename T>
FSSA_GLOBAL(32 * kShrinkWarps, 1)
norm_shrink_kernel(const FSSA_GRID_CONSTANT NormArguments args) {
  char* rows = shared_memory();
  float* parts = reinterpret_cast<float*>(shared_memory() + args.plan.parts);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int g = lane / 4, c = lane % 4;
  const int first = block_x() * kShrinkTokens, first_a = block_y() * 16;
  const bool writes = block_y() == 0;

  // A warp normalises one row, which stays in shared memory.
  const int token = first + warp;
  if (token < args.num_tokens) {
    char* row = rows + row_offset(warp, args.plan.row_bytes);
    T* h = static_cast<T*>(args.h) + static_cast<int64_t>(token) * args.num_channels;
    float total = 0.0f;
    for (int at = 8 * lane; at < args.num_channels; at += 256) {
      const Words4 words = residual_film<T>(args, token, at);
      if (writes) store_words(h + at, words);
      *reinterpret_cast<Words4*>(row + 2 * at) = words;
      total += squares<T>(words);
    }
    total = sum_of_warp(total);
    const float inverse_rms = inverse_root(total / args.num_channels + args.eps);
    for (int at = 8 * lane; at < args.num_channels; at += 256) {
      const Words4 words = normalised<T>(args, read_words(row + 2 * at), inverse_rms, at);
      if (writes) store_normed<T>(args, token, at, words);
      *reinterpret_cast<Words4*>(row + 2 * at) = words;
    }
  }
  sync_block();

  // Warps share the channels out. A comes straight into registers: nobody else here needs it.
  const Words4 nothing{{0, 0, 0, 0}};
  const T* a = static_cast<const T*>(args.lora_a) + (first_a + g) * args.stride_a + 8 * c;
  const bool has_low = first_a + g < args.low_rank, has_high = first_a + g + 8 < args.low_rank;
  const char* x = rows + row_offset(g, args.plan.row_bytes) + 16 * c;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int k = 32 * warp; k < args.num_channels; k += 32 * kShrinkWarps) {
    const bool there = k + 8 * c < args.num_channels;
    const Left left{there && has_low ? load_words(a + k) : nothing,
                    there && has_high ? load_words(a + 8 * args.stride_a + k) : nothing};
    multiply_add_rows<T>(sum, left, there ? read_words(x + 2 * k) : nothing);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = g + 8 * (i / 2), t = 2 * c + i % 2;
    parts[(warp * kShrinkTokens + t) * 16 + r] = sum[i];
  }
  sync_block();
  for (int i = thread_index(); i < kShrinkTokens * 16; i += num_threads()) {
    const int t = first + i / 16, r = first_a + i % 16;
    if (t >= args.num_tokens || r >= args.low_rank) continue;
    float u = 0.0f;
    for (int part = 0; part < kShrinkWarps; ++part) u += parts[part * kShrinkTokens * 16 + i];
    if (args.gates != nullptr) {
      const int slot = load(args.slots + t);
      u = slot >= 0 && slot < args.num_gates
              ? u * load_number<T>(args.gates, args.gates_is_float, slot * args.stride_gates + r)
              : not_a_number();
    }
    T result;
    from_float(u, result);
    store(static_cast<T*>(args.normed) + t * args.stride_normed + args.num_channels + r, result);
  }
}

}  // namespace fssa::cuda
