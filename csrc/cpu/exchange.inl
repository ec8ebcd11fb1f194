// What threads write for one another to read. A line that several cores have read is in the caches of all
// of them, and the next store to it waits until the others have given it up: where cores share no cache,
// many times as long as for a line that is one core's alone (Zen 4).
namespace FSSA_ISA {

constexpr int64_t kLineBytes = 64;

// From p to where a line begins.
FSSA_INLINE int64_t bytes_to_line(const void* p) {
  return -reinterpret_cast<intptr_t>(p) & (kLineBytes - 1);
}

// Rows that every thread reads next, stored past the caches: a store that takes whole lines waits for
// none to be given up. It needs whole lines and another thread that reads them.
class RowsForOthers {
 public:
  FSSA_INLINE_MEMBER RowsForOthers(const Team& team, const void* rows, int64_t stride_bytes,
                                   int64_t row_bytes)
      : past_caches_(team.size() > 1 &&
                     (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(stride_bytes) |
                      static_cast<uintptr_t>(row_bytes)) % kLineBytes == 0) {}

  // The first `count` lanes of x, or all of them, from column 16 i of a row on.
  template <typename T>
  FSSA_INLINE_MEMBER void store(T* p, Vec x, int64_t count) const {
    if (past_caches_) {
      store_past_caches(p, x);
    } else {
      store_up_to(p, x, count);
    }
  }

  // After the last store of a thread, before it says that it has arrived: these stores are not in order
  // with others.
  FSSA_INLINE_MEMBER void finish() const {
    if (past_caches_) finish_past_caches();
  }

 private:
  const bool past_caches_;
};

// Takes the line at `p` from the caches of other cores, while something else is computed. It will be
// written at `p` before anybody reads it. A request would leave it as it is where this cache has a copy.
FSSA_INLINE void claim(void* p) { *static_cast<volatile char*>(p) = 0; }

}  // namespace FSSA_ISA
