// The two passes over logits that choosing a token needs.
namespace FSSA_ISA {

template <typename T>
FSSA_INLINE ChunkStats stats_of(const T* logits, int64_t count) {
  const int64_t whole = count / 16 * 16, left = count - whole;
  Vec highest = broadcast(-__builtin_inff());
  if (left > 0) {
    const Vec last = keep_lanes(load_first(logits + whole, left), 0, left, -__builtin_inff());
    highest = max(last, highest);
  }
  for (int64_t i = 0; i < whole; i += 16) highest = max(load(logits + i), highest);
  const float top = largest(highest);
  const Vec shift = broadcast(top);
  Vec total = broadcast(0.0f);
  for (int64_t i = 0; i < whole; i += 16) {
    total = add(total, exp(sub(load(logits + i), shift)));
  }
  if (left > 0) {
    const Vec term = exp(sub(load_first(logits + whole, left), shift));
    total = add(total, keep_lanes(term, 0, left, 0.0f));
  }
  return {top, sum(total)};
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
