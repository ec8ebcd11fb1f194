// Kernel of rotary positions and the cache write: a token is one thread's.
namespace FSSA_ISA {

// y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin; channels past rotary_dim pass through.
template <typename T>
FSSA_INLINE void rotate(const T* x, T* y, const float* cos_sin, int64_t rotary_dim,
                        int64_t head_dim) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = smaller(16, half - i);
    const Vec cos = load_up_to(cos_sin + i, left), sin = load_up_to(cos_sin + half + i, left);
    const Vec x1 = load_up_to(x + i, left), x2 = load_up_to(x + half + i, left);
    store_up_to(y + i, sub(mul(x1, cos), mul(x2, sin)), left);
    store_up_to(y + half + i, add(mul(x2, cos), mul(x1, sin)), left);
  }
  for (int64_t i = rotary_dim; i < head_dim; ++i) y[i] = x[i];
}

// x / rms(x) * (weight + offset) into `normed`, rounded to T; x itself without a norm.
template <typename T>
FSSA_INLINE const T* normalised(const RopeCall& a, const HeadNorm& norm, const T* x, T* normed) {
  if (norm.weight == nullptr) return x;
  Vec squares = broadcast(0.0f);
  for (int64_t i = 0; i < a.head_dim; i += 16) {
    const Vec value = load_up_to(x + i, a.head_dim - i);
    squares = fma(value, value, squares);
  }
  const Vec mean = broadcast(sum(squares) / static_cast<float>(a.head_dim) + a.eps);
  const Vec inverse = div(broadcast(1.0f), square_root(mean));
  for (int64_t i = 0; i < a.head_dim; i += 16) {
    const int64_t left = smaller(16, a.head_dim - i);
    const Vec weight = add(load_first_as(norm.weight, norm.dtype, i, left),
                           broadcast(a.weight_offset));
    store_up_to(normed + i, mul(mul(load_up_to(x + i, left), inverse), weight), left);
  }
  return normed;
}

template <typename T>
void rope(const RopeCall& a, Team& team) {
  const Range mine = team.share(a.count.get());
  const int64_t kv_width = a.num_kv_heads * a.head_dim;
  T normed[kMaxNormedHead];
  for (int64_t t = mine.first; t < mine.last; ++t) {
    const float* cos_sin = a.cos_sin + a.positions[t] * a.rotary_dim;
    const T* q = static_cast<const T*>(a.q.data) + t * a.q.token_stride;
    T* rotated = static_cast<T*>(a.rotated) + t * a.num_heads * a.head_dim;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const T* head = normalised(a, a.q_norm, q + h * a.q.head_stride, normed);
      rotate(head, rotated + h * a.head_dim, cos_sin, a.rotary_dim, a.head_dim);
    }
    if (a.kv_slots[t] < 0) continue;
    const T* k = static_cast<const T*>(a.k.data) + t * a.k.token_stride;
    const T* v = static_cast<const T*>(a.v.data) + t * a.v.token_stride;
    T* k_cache = static_cast<T*>(a.k_cache) + a.kv_slots[t] * kv_width;
    T* v_cache = static_cast<T*>(a.v_cache) + a.kv_slots[t] * kv_width;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      const T* head = normalised(a, a.k_norm, k + h * a.k.head_stride, normed);
      rotate(head, k_cache + h * a.head_dim, cos_sin, a.rotary_dim, a.head_dim);
      for (int64_t i = 0; i < a.head_dim; ++i) {
        v_cache[h * a.head_dim + i] = v[h * a.v.head_stride + i];
      }
    }
  }
}

}  // namespace FSSA_ISA
