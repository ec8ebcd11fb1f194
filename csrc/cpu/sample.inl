// The two passes over logits that choosing a token needs.
namespace FSSA_ISA {

template <typename T>
FSSA_INLINE ChunkStats stats_of(const T* logits, int64_t count) {
  Vec highest = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) highest = max(load(logits + i), highest);
  float top = largest(highest);
  for (int64_t j = i; j < count; ++j) {
    const float value = to_float(logits[j]);
    top = value > top ? value : top;
  }
  int32_t index = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (to_float(logits[j]) == top) {
      index = static_cast<int32_t>(j);
      break;
    }
  }
  Vec total = broadcast(0.0f);
  const Vec shift = broadcast(top);
  for (i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const Vec term = exp(sub(load_up_to(logits + i, left), shift));
    total = add(total, keep_lanes(term, 0, left, 0.0f));
  }
  return {top, index, sum(total), 0.0f};
}

ChunkStats chunk_stats(const void* logits, DType dtype, int64_t first, int64_t count) {
  return dtype == DType::kFloat32
             ? stats_of(static_cast<const float*>(logits) + first, count)
             : stats_of(static_cast<const BFloat16*>(logits) + first, count);
}

// out = exp((logits - top) * inverse_temperature).
void softmax_weights(const void* logits, DType dtype, int64_t first, int64_t count, float top,
                     float inverse_temperature, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = smaller(16, count - i);
    const Vec value = load_first_as(logits, dtype, first + i, left);
    const Vec scaled = mul(sub(value, broadcast(top)), broadcast(inverse_temperature));
    store_up_to(out + i, exp(scaled), left);
  }
}

}  // namespace FSSA_ISA
