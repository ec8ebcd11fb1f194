// Kernel of residual add, FiLM and RMS norm: a row is one thread's.
namespace FSSA_ISA {

template <typename T>
void norm(const NormCall& a, Team& team) {
  const Range mine = team.share(a.count.get());
  const int64_t size = sizeof(T);
  const RowsForOthers rows(team, a.normed, a.out_stride * size, a.channels * size);
  for (int64_t t = mine.first; t < mine.last; ++t) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
    const T* residual =
        a.residual ? static_cast<const T*>(a.residual) + t * a.residual_stride : nullptr;
    T* h = static_cast<T*>(a.h) + t * a.out_stride;
    T* normed = static_cast<T*>(a.normed) + t * a.out_stride;
    const int64_t film = a.film ? a.slots[t] * a.film_stride : 0;
    Vec squares = broadcast(0.0f);
    for (int64_t c = 0; c < a.channels; c += 16) {
      const int64_t left = smaller(16, a.channels - c);
      Vec value = load_up_to(x + c, left);
      if (residual) value = add(value, load_up_to(residual + c, left));
      if (a.film) {
        const Vec gamma = load_first_as(a.film, a.film_dtype, film + c, left);
        const Vec beta = load_first_as(a.film, a.film_dtype, film + a.channels + c, left);
        value = fma(gamma, value, beta);
      }
      // The norm is taken from what the next block reads as its residual.
      value = rounded_to(h, value);
      store_up_to(h + c, value, left);
      squares = fma(value, value, squares);
    }
    const Vec mean_square = broadcast(sum(squares) / static_cast<float>(a.channels) + a.eps);
    const Vec inverse = div(broadcast(1.0f), square_root(mean_square));
    for (int64_t c = 0; c < a.channels; c += 16) {
      const int64_t left = smaller(16, a.channels - c);
      const Vec weight = add(load_first_as(a.weight, a.weight_dtype, c, left),
                             broadcast(a.weight_offset));
      rows.store(normed + c, mul(mul(load_up_to(h + c, left), inverse), weight), left);
    }
  }
  rows.finish();
}

}  // namespace FSSA_ISA
